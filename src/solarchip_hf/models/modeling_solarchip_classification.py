"""Classification of observations: statistics of every modality's tokens, fused by attention, into ordered classes."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.utils.generic import can_return_tuple

from .configuration_solarchip import SolarChipConfig
from .distributed import all_reduce_sum, world_size
from .modalities import MODALITY_NAMES
from .modeling_solarchip import SolarChipModel, SolarChipPreTrainedModel
from .modeling_solarchip_layers import run_towers
from .modeling_solarchip_outputs import SolarChipImageClassifierOutput


def classification_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    class_weights: Sequence[float] | None = None,
    focal_gamma: float = 0.0,
    gather: bool = False,
) -> torch.Tensor:
    """Weighted focal cross-entropy (Lin et al. 2017) over the labelled rows.

        sum over b of w[y_b] (1 - p_b)^gamma (-log p_b) / sum over b of w[y_b], with p_b the probability of label y_b

    Args:
        logits: (B, K).
        labels: (B,) integers in 0..K-1, or negative where unknown.
        class_weights: K weights; None: equal.
        focal_gamma: 0 is plain cross-entropy.
        gather: Whether the weights of all processes are summed in the denominator, for training: every process must
            call it then.

    Returns:
        A scalar, zero if no label is known; with `gather` this process's part, times the number of processes: averaged
        over them, values and gradients are those of one process with the whole batch.

    Raises:
        ValueError: Labels of another shape, or that are no classes.
    """
    if labels.shape != logits.shape[:1] or labels.is_floating_point():
        raise ValueError(f"labels: expected {len(logits)} integers, got {tuple(labels.shape)} of {labels.dtype}.")
    if (labels >= logits.shape[1]).any():  # on a GPU, indexing beyond the classes would end the process
        raise ValueError(f"labels: expected classes in 0..{logits.shape[1] - 1}, or -1, got {int(labels.max())}.")
    known = labels >= 0
    targets = labels.clamp_min(0).long()
    log_probability = logits.float().log_softmax(dim=-1).gather(1, targets[:, None])[:, 0]
    loss = -log_probability
    if focal_gamma > 0:
        loss = loss * (1 - log_probability.exp()).clamp_min(1e-12) ** focal_gamma
    weight = known.to(loss.dtype)
    if class_weights is not None:
        weight = weight * torch.tensor(class_weights, dtype=loss.dtype, device=loss.device)[targets]
    total, processes = (all_reduce_sum(weight.sum()), world_size()) if gather else (weight.sum(), 1)
    return (loss * weight).sum() / total.clamp_min(1e-12) * processes


class SolarChipAttentionPool(nn.Module):
    """Mean of n vectors weighted by the softmax of a learned score, which starts flat.

    Args:
        width: Width of the vectors.
    """

    def __init__(self, width: int):
        super().__init__()
        self.score = nn.Linear(width, 1, bias=False)

    def forward(self, vectors: torch.Tensor, mask: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """(..., n, width) and (..., n) bool of those that count -> (..., width) and the weights (..., n)."""
        scores = self.score(vectors)[..., 0]
        if mask is not None:
            # Finite, so that an observation without any image gives zeros and not NaN.
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        weights = scores.softmax(dim=-1)
        if mask is not None:
            weights = weights * mask  # all missing: no weight at all
        return (weights[..., None] * vectors).sum(dim=-2), weights


class SolarChipStatisticsPool(SolarChipAttentionPool):
    """Mean and standard deviation of n vectors under the weights of `SolarChipAttentionPool`.

    Attentive statistics pooling (Okabe, Koshinaka and Shinoda 2018, arXiv 1803.10963, eqs. 5 and 6). A few active
    patches among many quiet ones hardly move the mean; they are what the deviation measures.
    """

    _least_variance = 1e-5  # added, so that equal vectors have a finite gradient

    def forward(self, vectors: torch.Tensor, mask: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """(..., n, width) and (..., n) bool of those that count -> (..., 2 width) and the weights (..., n)."""
        mean, weights = super().forward(vectors, mask)
        variance = (weights[..., None] * (vectors - mean[..., None, :]).square()).sum(dim=-2)
        return torch.cat([mean, (variance + self._least_variance).sqrt()], dim=-1), weights


class SolarChipClassificationHead(nn.Module):
    """From tokens and projections of each image to one feature, from the features of all modalities to logits.

    An image's feature is the mean and the standard deviation of its tokens under attention, projected by a layer of its
    modality's own (towers differ in what their channels mean), plus the class token in the contrastive space, which all
    modalities share, through a gate that starts closed. Features of the observed modalities are fused by attention and
    classified by a small MLP, or, with `classifier_head="linear"`, by one linear layer: a linear probe of means and
    deviations while the attention stays flat.

    Args:
        config: Widths, classes, and whether they are ordered.
    """

    def __init__(self, config: SolarChipConfig):
        super().__init__()
        width = config.classifier_hidden_size
        self.config = config
        self.token_norm = nn.LayerNorm(config.hidden_size)
        self.token_pool = SolarChipStatisticsPool(config.hidden_size)
        self.token_projections = nn.ModuleDict(
            {name: nn.Linear(2 * config.hidden_size, width) for name in config.modalities}
        )
        self.contrastive_norm = nn.LayerNorm(config.projection_dim)
        self.contrastive_projection = nn.Linear(config.projection_dim, width)
        self.contrastive_gate = nn.Parameter(torch.zeros(()))
        self.modality_pool = SolarChipAttentionPool(width)
        if config.classifier_head == "mlp":
            self.norm = nn.LayerNorm(width)
            self.dense = nn.Linear(width, width)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.output = nn.Linear(width, 1 if config.ordinal else config.num_labels)
        # Thresholds on the severity scale: the first, and the logarithms of the steps to the next ones.
        self.thresholds = nn.Parameter(torch.zeros(config.num_labels - 1)) if config.ordinal else None

    def pool(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(N, 1+L, hidden) -> mean and deviation of the tokens (N, 2 hidden), their weights (N, 1+L)."""
        return self.token_pool(self.token_norm(tokens))

    def project(self, pooled: torch.Tensor, contrastive: torch.Tensor, ids: Sequence[int] | int) -> torch.Tensor:
        """(N, 2 hidden), (N, projection) and the N modalities, or the one of all images -> features (N, width)."""
        gated = torch.tanh(self.contrastive_gate) * self.contrastive_projection(self.contrastive_norm(contrastive))
        if isinstance(ids, int):
            return self.token_projections[self.config.modalities[ids]](pooled) + gated
        projected = run_towers(
            {name: [name] for name in self.config.modalities},
            self.config.modalities,
            ids,
            pooled,
            lambda name, rows, _: {"features": self.token_projections[name](rows)},
        )
        return projected["features"] + gated

    def image_features(
        self, tokens: torch.Tensor, contrastive: torch.Tensor, ids: Sequence[int] | int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `pool`, then `project`: features (N, width), weights of the tokens (N, 1+L)."""
        pooled, token_weights = self.pool(tokens)
        return self.project(pooled, contrastive, ids), token_weights

    def forward(self, features: torch.Tensor, observed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, M, width) and (B, M) bool -> logits (B, K), modality weights (B, M)."""
        fused, weights = self.modality_pool(features, observed)
        hidden = F.gelu(self.dense(self.norm(fused))) if self.config.classifier_head == "mlp" else fused
        score = self.output(self.dropout(hidden))
        return score if self.thresholds is None else self._ordered_logits(score), weights

    def _ordered_logits(self, severity: torch.Tensor) -> torch.Tensor:
        # Proportional odds (McCullagh 1980): P(class >= k) = sigmoid(severity - t_k) with t_1 < t_2 < ... The logarithm
        # of a class's probability, a difference of two sigmoids, is written so that it never cancels:
        # sigmoid(a) - sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - exp(b - a)).
        steps = F.softplus(self.thresholds[1:]) + 1e-3
        cuts = torch.cat([self.thresholds[:1], self.thresholds[:1] + steps.cumsum(0)])  # (K-1,)
        above = severity.float() - cuts.float()  # (B, K-1)
        at_least = F.pad(F.logsigmoid(above), (1, 0))  # log P(class >= k), 0 for the first
        below_next = F.pad(F.logsigmoid(-above), (0, 1))  # log P(class <= k), 0 for the last
        between = torch.log(-torch.expm1(-steps.float()))  # (K-2,)
        return at_least + below_next + F.pad(between, (1, 1))


class SolarChipForImageClassification(SolarChipPreTrainedModel):
    """Classes of observations, as flares within a day: `0AB`, `C`, `M`, `X` by default.

    Args:
        config: Towers, modalities, and the classes (`id2label` or `num_labels`).
    """

    def __init__(self, config: SolarChipConfig):
        if config.num_labels < 2:
            raise ValueError(f"num_labels: expected at least 2 classes, got {config.num_labels}.")
        super().__init__(config)
        absent = "|".join(name for name in MODALITY_NAMES if name not in config.modalities) or "(?!)"
        self._keys_to_ignore_on_load_unexpected += [
            r"^decoders\.",  # what pretraining adds
            r"^logit_scales$",
            rf"^classifier\.token_projections\.({absent})\.",
        ]
        self.solarchip = SolarChipModel(config)
        self.classifier = SolarChipClassificationHead(config)
        self.post_init()
        self._keys_to_ignore_on_load_unexpected.discard(r"^classifier\.")  # taken over from the backbone; here ours

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any
    ) -> Any:
        """As in transformers; a folder with another version's head, or with part of a calibrated one, is refused.

        A folder without any head, as of a pretrained backbone, gets a new one, for tuning.

        Args:
            pretrained_model_name_or_path: As in transformers.
            *args: As in transformers.
            output_loading_info: Whether to return the names of keys that did not fit, too.
            **kwargs: As in transformers.

        Returns:
            The model, or the model and a dict.

        Raises:
            ValueError: Weights of another head, a head that lacks weights beside a calibration that was fitted on it,
                or a checkpoint that a probe or low-rank updates left in the middle of their tuning.
        """
        model, found = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        _check_loaded(model, str(pretrained_model_name_or_path), found)
        return (model, found) if output_loading_info else model

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, SolarChipAttentionPool):
            init.zeros_(module.score.weight)
        elif isinstance(module, SolarChipClassificationHead):
            init.zeros_(module.contrastive_gate)
            if module.thresholds is not None:
                init.zeros_(module.thresholds)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.FloatTensor,
        observed: torch.BoolTensor | None = None,
        modality_ids: torch.LongTensor | Sequence[int] | None = None,
        labels: torch.LongTensor | None = None,
        *,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> SolarChipImageClassifierOutput:
        """Classifies observations.

        Args:
            pixel_values: (B, M, H, H) in the order of `config.modalities`; or, with `modality_ids`, (B, 1, H, H), each
                image being an observation of one modality.
            observed: (B, M) bool, false where the image is missing; None: all are there.
            modality_ids: (B,) positions in `config.modalities`.
            labels: (B,) classes, -1 where unknown.
            output_hidden_states: As for `SolarChipModel`.
            output_attentions: As for `SolarChipModel`.

        Returns:
            The output, or a tuple of what is not None with `return_dict=False`.

        Raises:
            ValueError: Shapes or ids that do not fit, or `observed` together with `modality_ids`.
        """
        if modality_ids is None:
            pixel_values, observed = self._observations(pixel_values, observed)
            ids = list(range(observed.shape[1])) * observed.shape[0]
        elif observed is None:
            ids = self._image_ids(modality_ids, len(pixel_values))
            observed = torch.ones(len(ids), 1, dtype=torch.bool, device=pixel_values.device)
        else:
            raise ValueError(
                "observed: expected None together with modality_ids, where every image is there, got both."
            )
        encoded = self.solarchip(
            pixel_values.flatten(0, 1)[:, None] if modality_ids is None else pixel_values,
            ids,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
        )
        features, token_weights = self.classifier.image_features(
            encoded.last_hidden_state, encoded.contrastive_embeds[:, 0], ids
        )
        logits, modality_weights = self.classifier(features.unflatten(0, observed.shape), observed)
        loss = None
        if labels is not None:
            loss = classification_loss(
                logits,
                labels,
                class_weights=self.config.class_weights,
                focal_gamma=self.config.focal_gamma,
                gather=self.training,  # in evaluation one process may have no batch left
            )
        return SolarChipImageClassifierOutput(
            loss=loss,
            logits=logits,
            modality_weights=modality_weights,
            token_weights=token_weights.unflatten(0, observed.shape) * observed[..., None],
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )


def _check_loaded(model: SolarChipForImageClassification, place: str, found: Mapping[str, Any]) -> None:
    """Refuses what transformers would load with a warning: a head that is partly random, yet keeps its calibration."""
    missing, foreign = set(found["missing_keys"]), sorted(found["unexpected_keys"])
    if model.config.calibration is not None:  # of another shape, where that is allowed: drawn anew
        missing |= {key for key, *_ in found.get("mismatched_keys", ())}
    # What `FlareProbe` and peft add to the checkpoints of a tuning; the saved model has neither.
    if {"mean", "deviation"} <= set(foreign) or any(".lora_" in key for key in foreign):
        raise ValueError(
            f"{place}: expected a saved model, got a checkpoint from the middle of a tuning, whose weights are not yet "
            "those of the model (standardised statistics or low-rank updates are not folded in). Load the folder that "
            "the tuning saved at its end, or finish it with resume_from_checkpoint."
        )
    head, absent, other = (
        [key for key in keys if key.startswith("classifier.")]
        for keys in (model.state_dict(), sorted(missing), foreign)
    )
    calibrated = model.config.calibration is not None  # fitted on one head, of which nothing may lack or be left over
    if (absent and other) or (calibrated and (other or 0 < len(absent) < len(head))):
        got = "; ".join(f"{kind} {_few(keys)}" for kind, keys in (("none for", absent), ("others:", other)) if keys)
        raise ValueError(
            f"{place}: expected the weights of this version's classifier, got {got}: they belong to another head, and "
            "its forecasts would be partly random. Tune anew with examples/finetune_flare.py, from the pretrained "
            "model that this one was tuned from."
        )


def _few(keys: Sequence[str]) -> str:
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")


__all__ = [
    "SolarChipAttentionPool",
    "SolarChipClassificationHead",
    "SolarChipForImageClassification",
    "SolarChipStatisticsPool",
    "classification_loss",
]
