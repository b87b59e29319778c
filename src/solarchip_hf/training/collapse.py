"""Whether embeddings still tell observations apart: figures of evaluation, and a warning when they no longer do."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)

SMALLEST_DEVIATION = 1e-3  # of raw projections, relative to their length
AT_CHANCE = 2.0  # times chance; of one query's hit expected, two are no evidence
COARSEST_CHANCE = 0.25  # among four observations or fewer nothing can be told
REMEDY = "Look at the temperatures; try projection_centering 'tokens', a lower learning_rate or a larger batch."


def embedding_statistics(
    projections: torch.Tensor, embeds: torch.Tensor, observed: torch.Tensor, pairs: Sequence[tuple[int, int]]
) -> dict[str, float]:
    """Figures of class tokens, each a mean over modalities or pairs with at least two observations.

    Args:
        projections: (N, M, P) raw projections of class tokens.
        embeds: (N, M, P) embeddings as compared: centred where the model centres.
        observed: (N, M) bool.
        pairs: Positions of the modalities that are compared.

    Returns:
        `class_deviation`, the deviation of the projections over observations relative to their length, 0 where all are
        equal; `class_effective_rank`, the exponential of the entropy of the centred embeddings' singular values (Roy &
        Vetterli 2007); `class_alignment`, the mean squared distance of co-temporal unit embeddings, and
        `class_uniformity`, the logarithm of the mean Gaussian potential of the others (Wang & Isola 2020). Empty where
        there are too few observations.
    """
    sums: dict[str, list[torch.Tensor]] = {}
    for modality in range(observed.shape[1]):
        seen = observed[:, modality]
        if seen.sum() < 2:
            continue
        raw = projections[seen, modality].double()
        length = raw.square().sum(-1).mean().sqrt()
        sums.setdefault("class_deviation", []).append(raw.var(0, correction=0).sum().sqrt() / length.clamp_min(1e-30))
        unit = F.normalize(embeds[seen, modality].double(), dim=-1)
        values = torch.linalg.svdvals(unit - unit.mean(0))
        share = values / values.sum().clamp_min(1e-30)
        sums.setdefault("class_effective_rank", []).append(torch.special.entr(share).sum().exp())
        sums.setdefault("class_uniformity", []).append(torch.pdist(unit).square().mul(-2).exp().mean().log())
    for first, second in pairs:
        both = observed[:, first] & observed[:, second]
        if both.sum() >= 2:
            apart = F.normalize(embeds[both, first].double(), dim=-1) - F.normalize(
                embeds[both, second].double(), dim=-1
            )
            sums.setdefault("class_alignment", []).append(apart.square().sum(-1).mean())
    return {name: torch.stack(values).mean().item() for name, values in sums.items()}


class CollapseWarning(TrainerCallback):
    """Warns once a term when, over some evaluations in a row, its embeddings no longer tell observations apart.

    Signs are class or patch retrieval at chance, where the term has a weight, and class tokens that are all alike.

    Args:
        patience: Evaluations in a row, after the first step, that must show the sign.
    """

    def __init__(self, patience: int):
        self.patience = patience
        self._counts: dict[str, int] = {}

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """Looks at the metrics of an evaluation."""
        if state.global_step == 0:
            return
        config = getattr(kwargs.get("model"), "config", None)
        signs = _signs(kwargs.get("metrics") or {}, config)
        self._counts = {sign: self._counts.get(sign, 0) + 1 for sign in signs}
        for sign, text in signs.items():
            if self._counts[sign] == self.patience and state.is_world_process_zero:
                logger.warning(
                    "%s over %d evaluations, until step %d: the %s term may have collapsed. %s",
                    text, self.patience, state.global_step, sign.partition(" ")[0], REMEDY,
                )  # fmt: skip


def _signs(metrics: Mapping[str, float], config: Any) -> dict[str, str]:
    signs: dict[str, str] = {}
    chance = metrics.get("eval_retrieval_chance@1", 1.0)
    for kind, weight in (("class", "cls_loss_weight"), ("patch", "patch_loss_weight")):
        recall = metrics.get(f"eval_{kind}_recall@1")
        trained = getattr(config, weight, 1.0) > 0
        if recall is not None and trained and chance < COARSEST_CHANCE and recall < AT_CHANCE * chance:
            signs[f"{kind} retrieval"] = (
                f"{kind.capitalize()} retrieval at chance (recall@1 {recall:.3f}, chance {chance:.3f})"
            )
    deviation = metrics.get("eval_class_deviation")
    if deviation is not None and deviation < SMALLEST_DEVIATION:
        signs["class deviation"] = f"Class tokens all alike (deviation {deviation:.1e} of their length)"
    return signs


__all__ = ["CollapseWarning", "embedding_statistics"]
