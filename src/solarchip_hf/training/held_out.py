"""What an evaluation gathers from its batches, and the metrics that this gives."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..models.losses import make_pairs
from .collapse import embedding_statistics
from .physical_error import PhysicalError
from .retrieval import RetrievalTable, cross_modal_retrieval, patch_disk_mask


class HeldOut:
    """What evaluation gathers from its batches: terms, physical errors, the embeddings of the first observations.

    Args:
        gallery: Number of observations whose embeddings are kept.
        terms: Names of the terms of the loss.
        error: What measures reconstructions in physical units.

    Attributes:
        shown: The first observation: `pixel_values` and `reconstruction` (M, N, N), `observed` (M,), on the CPU.
    """

    def __init__(self, gallery: int, terms: Sequence[str], error: PhysicalError):
        self.gallery = gallery
        self.known = terms
        self.error = error
        self.errors: list[torch.Tensor] = []
        self.shown: dict[str, torch.Tensor] | None = None
        self.size = 0
        self.names: list[str] = []
        self.terms: list[torch.Tensor] = []
        self.embeds: list[torch.Tensor] = []
        self.class_projections: list[torch.Tensor] = []
        self.observed: list[torch.Tensor] = []

    def add(self, trainer: Any, loss: torch.Tensor, outputs: Mapping[str, Any], inputs: Mapping[str, Any]) -> None:
        gather = trainer.accelerator.gather_for_metrics  # drops what only fills up the last batch of a process
        self.names = ["loss"] + [name for name in self.known if outputs.get(name) is not None]
        values = [loss, *(outputs[name] for name in self.names[1:])]
        batch = len(inputs["pixel_values"])
        terms = torch.stack([value.detach().float() for value in values]).repeat(batch, 1)
        self.terms.append(gather(terms).cpu())
        observed = inputs.get("observed")
        if observed is None:
            observed = torch.ones(inputs["pixel_values"].shape[:2], dtype=torch.bool, device=terms.device)
        self._look_at_reconstructions(gather, outputs["reconstruction"].detach(), inputs["pixel_values"], observed)
        held = sum(len(part) for part in self.observed)
        if held >= self.gallery or outputs.get("contrastive_embeds") is None:
            return
        embeds = gather(outputs["contrastive_embeds"].detach()).cpu()
        self.embeds.append(embeds[: self.gallery - held])
        self.class_projections.append(gather(outputs["projections"][:, :, 0].detach()).cpu()[: self.gallery - held])
        self.observed.append(gather(observed).cpu()[: self.gallery - held])
        self.size = inputs["pixel_values"].shape[-1]

    def _look_at_reconstructions(
        self, gather: Any, reconstruction: torch.Tensor, pixel_values: torch.Tensor, observed: torch.Tensor
    ) -> None:
        if self.error.known_at(pixel_values.shape[-1]):
            self.errors.append(gather(self.error(reconstruction, pixel_values, observed)).cpu())
        if self.shown is None:
            parts = {"pixel_values": pixel_values, "reconstruction": reconstruction}
            self.shown = {name: images[0].float().cpu() for name, images in parts.items()}
            self.shown["observed"] = observed[0].cpu()

    def metrics(self, trainer: Any) -> tuple[dict[str, float], RetrievalTable | None]:
        if not self.terms:
            return {}, None
        means = torch.cat(self.terms).mean(0).tolist()
        metrics = dict(zip(self.names, means, strict=True))
        if self.errors:
            metrics.update(self.error.metrics(torch.cat(self.errors)))
        if not self.embeds:
            return metrics, None
        embeds, observed = torch.cat(self.embeds), torch.cat(self.observed)
        config = trainer.model.config
        table = cross_modal_retrieval(
            embeds,
            observed,
            trainer.modalities,
            anchor=config.anchor_modality if config.pairing == "anchor" else None,
            patch_mask=patch_disk_mask(embeds.shape[2] - 1, self.size, config.min_disk_fraction),
            block=trainer.args.retrieval_block,
        )
        for kind, method in (("class", "class token"), ("patch", "patch similarity")):
            if method in table.methods():
                for key in ("recall@1", "recall@5", "median_rank"):
                    metrics[f"{kind}_{key}"] = table.mean(method, key)
        pairs = make_pairs(config.modalities, config.anchor_modality, config.pairing)
        projections = torch.cat(self.class_projections)
        metrics.update(embedding_statistics(projections, embeds[:, :, 0], observed, pairs))
        if table.rows:
            metrics["retrieval_chance@1"] = table.mean("class token", "chance@1")
        return metrics, table


__all__ = ["HeldOut"]
