"""The contrastive Trainer: transformers' own, with augmentation, terms by name, and retrieval as its evaluation."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer

from .arguments import SolarChipTrainingArguments
from .augmentation import SolarAugmentation, sign_shifts
from .collator import SolarChipDataCollator
from .retrieval import RetrievalTable, cross_modal_retrieval, patch_disk_mask

LOSS_TERMS = ("cls_loss", "patch_loss", "intra_loss", "reconstruction_loss", "kl_loss")
TEMPERATURES = ("cls_temperature", "patch_temperature", "intra_temperature")


class SolarChipTrainer(Trainer):
    """Trains a `SolarChipForPreTraining`.

    The loop, accumulation, Accelerate, checkpoints and resume are those of `transformers.Trainer`. What is added:

    - every training batch goes through `SolarAugmentation` on the device, by a draw that depends on the seed, the step
      and the micro-step alone, so that a resumed run and all processes see the same one;
    - each log line carries every term of the loss (mean over micro-steps and processes) and the temperatures;
    - evaluation gives every term on the held-out observations and cross-modal retrieval among them. The full table of
      the last evaluation stays in `retrieval_table`.

    The contrastive terms depend on the number of negatives: held-out terms compare only at one evaluation batch size,
    and gradient accumulation does not add negatives.

    Args:
        model: A `SolarChipForPreTraining`.
        args: Training arguments.
        processing_class: The image processor; its statistics tell what a reversed sign of the field is in scaled
            pixels, and it is saved beside the model.
        data_collator: By default a `SolarChipDataCollator` of the model's modalities.
        **kwargs: Further arguments of `transformers.Trainer` (`train_dataset`, `eval_dataset`, `callbacks`, ...).

    Example:
        ```python
        trainer = SolarChipTrainer(model, SolarChipTrainingArguments(max_steps=100), train_dataset=train,
                                   eval_dataset=validation, processing_class=processor)
        trainer.train()
        print(trainer.evaluate()["eval_patch_recall@1"])
        ```
    """

    args: SolarChipTrainingArguments

    def __init__(
        self,
        model: Any = None,
        args: SolarChipTrainingArguments | None = None,
        *,
        processing_class: Any = None,
        data_collator: Any = None,
        **kwargs: Any,
    ):
        args = args if args is not None else SolarChipTrainingArguments()
        if data_collator is None:
            data_collator = SolarChipDataCollator(getattr(getattr(model, "config", None), "modalities", None))
        super().__init__(model, args, data_collator=data_collator, processing_class=processing_class, **kwargs)
        # `**kwargs` in the model's forward would be read as "normalises its loss over accumulation", which it does not
        self.model_accepts_loss_kwargs = False
        self.modalities = list(self.model.config.modalities)
        self.augmentation = SolarAugmentation(
            args.augmentation,
            sign_shifts(self.modalities, getattr(processing_class, "statistics", None)),
            polarity_reversal=args.polarity_reversal,
            roll_degrees=args.roll_degrees,
        )
        self.retrieval_table: RetrievalTable | None = None
        self._term_sums: dict[str, torch.Tensor] = {}
        self._term_count = 0
        self._micro_key = (-1, -1)
        self._held_out: _HeldOut | None = None

    # ---- a training step

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """One micro-step: augmentation on the device, then transformers' own step.

        Args:
            model: The wrapped model.
            inputs: `pixel_values` (B, M, N, N) and `observed` (B, M).
            num_items_in_batch: Unused by contrastive losses.

        Returns:
            The detached loss of this micro-step.
        """
        return super().training_step(model, self.augment(inputs), num_items_in_batch)

    def augment(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The batch of the next micro-step on the device, augmented by the draw of (seed, step, micro-step)."""
        step, micro_step = self._micro_key
        self._micro_key = (step, micro_step + 1) if step == self.state.global_step else (self.state.global_step, 0)
        inputs = self._prepare_inputs(inputs)
        pixel_values = self.augmentation(inputs["pixel_values"], self.args.seed, *self._micro_key)
        return {**inputs, "pixel_values": pixel_values}

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The model's loss; remembers its terms for the log, or the embeddings for evaluation.

        Args:
            model: The wrapped model.
            inputs: Its inputs.
            return_outputs: Whether to return the outputs too.
            num_items_in_batch: Unused by contrastive losses.

        Returns:
            The loss, or the loss and the outputs.
        """
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training:
            for name in LOSS_TERMS:
                if outputs.get(name) is not None:
                    term = outputs[name].detach().float()
                    self._term_sums[name] = self._term_sums.get(name, 0.0) + term
            self._term_count += 1
        elif self._held_out is not None:
            self._held_out.add(self, loss, outputs, inputs)
        return (loss, outputs) if return_outputs else loss

    # ---- logging

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the terms since the last line, and the temperatures, to a log line of training.

        Args:
            logs: The line; changed in place.
            start_time: When training started.
        """
        if self._term_count and "loss" in logs:
            logs.update(self._collect_terms())
            logs.update(self.temperatures())
        super().log(logs, start_time)

    def _collect_terms(self) -> dict[str, float]:
        names = list(self._term_sums)
        means = torch.stack([self._term_sums[name] for name in names]) / self._term_count
        means = self.accelerator.reduce(means, reduction="mean")
        self._term_sums, self._term_count = {}, 0
        return dict(zip(names, means.tolist(), strict=True))

    def temperatures(self) -> dict[str, float]:
        """The temperature of each contrastive term, never below 1/100."""
        scales = getattr(self.accelerator.unwrap_model(self.model), "logit_scales", None)
        if scales is None:
            return {}
        values = torch.exp(-scales.detach().float().clamp(max=math.log(100.0))).tolist()
        return dict(zip(TEMPERATURES, values, strict=True))

    # ---- saving

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        # Folders of ours are published: the arguments go into them as JSON, not as a pickle.
        super()._save(output_dir, state_dict)
        if not self.args.should_save:  # other processes come here too: gathering sharded weights needs them
            return
        folder = Path(output_dir if output_dir is not None else self.args.output_dir)
        (folder / "training_args.bin").unlink(missing_ok=True)
        (folder / "training_args.json").write_text(self.args.to_json_string(), encoding="utf-8")

    # ---- evaluation

    def get_eval_dataloader(self, eval_dataset: Any = None) -> torch.utils.data.DataLoader:
        """As in transformers, but the short last batch of the held-out observations is kept."""
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.args.dataloader_drop_last = drop_last

    def evaluation_loop(
        self,
        dataloader: torch.utils.data.DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """As in transformers, with the loss's terms and cross-modal retrieval among the metrics.

        Returns:
            transformers' `EvalLoopOutput`. Its metrics have, beside the loss, every term by name and, where retrieval
            is asked for, `class_recall@1`, `class_recall@5`, `class_median_rank`, `patch_recall@1`, ... (means over
            the pairs of modalities) and `retrieval_chance@1`.
        """
        if ignore_keys is None:  # transformers adds a list to it
            ignore_keys = list(self.model.config.keys_to_ignore_at_inference)
        self._held_out = _HeldOut(self.args.retrieval_gallery)
        try:
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
            metrics, table = self._held_out.metrics(self)
        finally:
            self._held_out = None
        self.retrieval_table = table if table is not None else self.retrieval_table
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        return output


class _HeldOut:
    """What evaluation gathers from its batches: terms of the loss, and the embeddings of the first observations."""

    def __init__(self, gallery: int):
        self.gallery = gallery
        self.size = 0
        self.names: list[str] = []
        self.terms: list[torch.Tensor] = []
        self.embeds: list[torch.Tensor] = []
        self.observed: list[torch.Tensor] = []

    def add(self, trainer: Trainer, loss: torch.Tensor, outputs: Mapping[str, Any], inputs: Mapping[str, Any]) -> None:
        gather = trainer.accelerator.gather_for_metrics  # drops what only fills up the last batch of a process
        self.names = ["loss"] + [name for name in LOSS_TERMS if outputs.get(name) is not None]
        values = [loss, *(outputs[name] for name in self.names[1:])]
        batch = len(inputs["pixel_values"])
        terms = torch.stack([value.detach().float() for value in values]).repeat(batch, 1)
        self.terms.append(gather(terms).cpu())
        held = sum(len(part) for part in self.observed)
        if held >= self.gallery or outputs.get("contrastive_embeds") is None:
            return
        observed = inputs.get("observed")
        if observed is None:
            observed = torch.ones(inputs["pixel_values"].shape[:2], dtype=torch.bool, device=terms.device)
        embeds = gather(outputs["contrastive_embeds"].detach()).cpu()
        self.embeds.append(embeds[: self.gallery - held])
        self.observed.append(gather(observed).cpu()[: self.gallery - held])
        self.size = inputs["pixel_values"].shape[-1]

    def metrics(self, trainer: "SolarChipTrainer") -> tuple[dict[str, float], RetrievalTable | None]:
        if not self.terms:
            return {}, None
        means = torch.cat(self.terms).mean(0).tolist()
        metrics = dict(zip(self.names, means, strict=True))
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
        if table.rows:
            metrics["retrieval_chance@1"] = table.mean("class token", "chance@1")
        return metrics, table


__all__ = ["LOSS_TERMS", "TEMPERATURES", "SolarChipTrainer"]
