"""The contrastive Trainer: transformers' own, with augmentation, terms by name, and retrieval as its evaluation."""

import gc
import math
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from .arguments import SolarChipTrainingArguments
from .augmentation import SolarAugmentation, sign_shifts
from .callbacks import StopOnSignal, TemperatureClamp, start_worker
from .checkpoints import (
    INCOMPLETE,
    MANIFEST,
    clear_incomplete,
    last_complete_checkpoint,
    publish,
    why_incomplete,
    write_manifest,
)
from .collapse import CollapseWarning
from .collator import SolarChipDataCollator
from .gradient_cache import gradient_cache_step
from .held_out import HeldOut
from .order import EpochOrder, StreamOrder, observations_of
from .physical_error import PhysicalError
from .retrieval import RetrievalTable
from .trackers import EvaluationFigures, place_tensorboard
from .weight_average import FOLDER as AVERAGE_FOLDER
from .weight_average import WeightAverage

LOSS_TERMS = ("cls_loss", "patch_loss", "intra_loss", "reconstruction_loss", "kl_loss")
TEMPERATURES = ("cls_temperature", "patch_temperature", "intra_temperature")
# temperatures, vectors that are learned as they are, and diffusers' names of norms
UNDECAYED = re.compile(r"logit_scales|norm\w*\.weight$|(class|position|modality|mask)_(embedding|token)s?(\.|$)")


class SolarChipTrainer(Trainer):
    """Trains a `SolarChipForPreTraining`.

    The loop, accumulation, Accelerate, checkpoints and resume are those of `transformers.Trainer`. What is added:

    - every training batch goes through `SolarAugmentation` on the device, by a draw that depends on the seed, the step
      and the micro-step alone, so that a resumed run and all processes see the same one;
    - each log line carries every term of the loss (mean over micro-steps and processes) and the temperatures;
    - evaluation gives every term on the held-out observations, the reconstruction's error in physical units, and
      cross-modal retrieval among them. The full table of the last evaluation stays in `retrieval_table`; figures go to
      the trackers of `report_to`.

    A stream with random access below it (`ObservationStream`) is read in its own order, dealt out here and resumed
    without reading what was used; give it undealt. Other iterables are handled by transformers, which reads up to the
    place where a resumed run goes on.

    The contrastive terms depend on the number of negatives: held-out terms compare only at one evaluation batch size,
    and gradient accumulation does not add negatives: the gradients of its micro-steps are averaged, with the gradient
    cache and without. A large batch with `gradient_cache_chunk` has its negatives, in the memory of a chunk.

    A model may come sharded (`from_pretrained(..., distributed_config=DistributedConfig(fsdp_size=2))`), on CPUs too.
    Such a run can save weights but no state to resume from; `accelerate launch` with FSDP, on GPUs, can.

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
        if args.n_gpu > 1:
            raise ValueError(
                f"args: expected one GPU a process, got {args.n_gpu}: replicas in one process would compare only what "
                "each holds. Start with `accelerate launch`, or set CUDA_VISIBLE_DEVICES to one GPU."
            )
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
        self.shown_observation: dict[str, torch.Tensor] | None = None
        self._term_sums: dict[str, torch.Tensor] = {}
        self._term_count = 0
        self._micro_key = (-1, -1)
        self._held_out: HeldOut | None = None
        self._aside = False
        self._stop = StopOnSignal()
        self._average = WeightAverage(args.ema_decay) if args.ema_decay is not None else None
        warning = CollapseWarning(args.collapse_patience) if args.collapse_patience else None
        loaded_sharded = self.is_distributed_loading_by_transformers
        if loaded_sharded:  # transformers cannot save their optimiser's state, at a signal neither
            self.args.save_only_model = True
        if self._average is not None and (self.is_fsdp_enabled or self.is_deepspeed_enabled or loaded_sharded):
            raise ValueError("ema_decay: expected one process or DDP, got sharded weights. Leave the average out.")
        for callback in (EpochOrder(), TemperatureClamp(), self._average, warning, EvaluationFigures(self), self._stop):
            if callback is not None:
                self.add_callback(callback)
        place_tensorboard(self.callback_handler.callbacks, args.output_dir)

    @property
    def stopped_by_signal(self) -> bool:
        """Whether the last training was ended early by SIGTERM, with a checkpoint to resume from."""
        return self._stop.stopped

    def end(self) -> None:
        """Parts from the other processes, at the end of a script; nothing is trained or evaluated behind it.

        All arrive first, and the wrapper goes before its process group. Not to be called in an `except` block: the
        traceback there keeps the frames of the training, and they the wrapper.
        """
        self.accelerator.wait_for_everyone()
        self.release()
        self.accelerator.end_training()

    def release(self) -> None:
        """Lets the wrapper of several processes go; the model itself stays.

        A DDP that outlives its process group keeps gloo's threads, which may abort the interpreter as it ends (SIGABRT)
        or hang it.
        """
        self.model_wrapped = self.model
        self.accelerator.free_memory()
        gc.collect()

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, from a whole checkpoint only.

        Args:
            resume_from_checkpoint: A folder, or true for the last complete checkpoint of `output_dir`.
            *args: As in transformers.
            **kwargs: As in transformers.

        Returns:
            transformers' `TrainOutput`.

        Raises:
            ValueError: The folder lists files that are not there in full, or there is no complete checkpoint.
            FloatingPointError: The training has diverged; weights that are not finite are never saved.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"resume_from_checkpoint: expected a complete checkpoint in {self.args.output_dir}, got none. "
                    "Start without it."
                )
        elif resume_from_checkpoint and (Path(resume_from_checkpoint) / MANIFEST).exists():
            reason = why_incomplete(resume_from_checkpoint)
            if reason is not None:
                raise ValueError(
                    f"resume_from_checkpoint: expected a complete checkpoint, got {resume_from_checkpoint}: {reason}. "
                    "Resume from an earlier one."
                )
        if self._average is not None:
            self._average.resume_from = resume_from_checkpoint or None
        try:
            output = super().train(resume_from_checkpoint or None, *args, **kwargs)
        finally:
            self._stop.release()
        self._check_finite()
        return output

    def _check_finite(self) -> None:
        # The running centring too, which one bad batch spoils even where a scaler of gradients skips the step.
        tensors = [*self.model.parameters(), *(each for each in self.model.buffers() if each.is_floating_point())]
        local = (tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors)
        here = torch.stack([tensor.isfinite().all().to(self.accelerator.device) for tensor in local]).all()
        if not self.accelerator.gather(here[None]).all():
            raise self._diverged("weights")

    def _diverged(self, what: str) -> FloatingPointError:
        args = self.args
        return FloatingPointError(
            f"{what}: expected finite numbers, got others at step {self.state.global_step}: the training has diverged. "
            f"Lower learning_rate ({args.learning_rate:g}) or max_grad_norm ({args.max_grad_norm}); checkpoints "
            f"before it stay in {args.output_dir}."
        )

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        """Weights that decay: neither biases and norms, nor temperatures and vectors that stand for themselves."""
        return [name for name in super().get_decay_parameter_names(model) if not UNDECAYED.search(name)]

    def _get_dataloader(self, dataset: Any, *args: Any, **kwargs: Any) -> torch.utils.data.DataLoader:
        observations = observations_of(dataset)
        if observations is not None:  # a stream; held-out observations come in their own order
            if kwargs.get("is_training"):
                kwargs["sampler_fn"] = lambda _, stream=dataset: StreamOrder(stream)
            dataset = observations
        loader = super()._get_dataloader(dataset, *args, **kwargs)
        plain = getattr(loader, "base_dataloader", loader)  # Accelerate's wrapper starts no worker itself
        plain.worker_init_fn = partial(start_worker, plain.worker_init_fn)
        return loader

    # ---- a training step

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """One micro-step: augmentation on the device, then transformers' own step, or the gradient cache's.

        Args:
            model: The wrapped model.
            inputs: `pixel_values` (B, M, N, N) and `observed` (B, M).
            num_items_in_batch: Unused by contrastive losses.

        Returns:
            The detached loss of this micro-step.
        """
        inputs = self.augment(inputs)
        if self.args.gradient_cache_chunk is None:
            return super().training_step(model, inputs, num_items_in_batch)
        model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()
        share = 1.0 / self.current_gradient_accumulation_steps
        terms = gradient_cache_step(
            model,
            inputs["pixel_values"],
            inputs.get("observed"),
            chunk_size=self.args.gradient_cache_chunk,
            autocast=self.accelerator.autocast,  # what it puts around the forward, which chunks replace
            backward=lambda objective: self.accelerator.backward(objective * share),
        )
        self._remember_terms(terms)
        return terms["loss"].detach() * share

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
            self._remember_terms(outputs)
        elif self._held_out is not None:
            self._held_out.add(self, loss, outputs, inputs)
        return (loss, outputs) if return_outputs else loss

    # ---- logging

    def _remember_terms(self, outputs: Mapping[str, Any]) -> None:
        for name in LOSS_TERMS:
            if outputs.get(name) is not None:
                self._term_sums[name] = self._term_sums.get(name, 0.0) + outputs[name].detach().float()
        self._term_count += 1

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
        if isinstance(scales, DTensor):
            scales = scales.full_tensor()
        values = torch.exp(-scales.detach().float().clamp(max=math.log(100.0))).tolist()
        return dict(zip(TEMPERATURES, values, strict=True))

    # ---- saving

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return str(Path(folder) / INCOMPLETE) if self._aside else folder

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        self._check_finite()  # or rotation would let a diverged training push the good ones out
        # Written aside, then renamed. What must see the folder in its place waits: rotation and upload.
        run_dir, name = Path(self._get_output_dir(trial)), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            clear_incomplete(run_dir)
        self.accelerator.wait_for_everyone()
        self._aside, push, self.args.push_to_hub = True, self.args.push_to_hub, False
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._aside, self.args.push_to_hub = False, push
        part = run_dir / INCOMPLETE / name
        self._correct_best(part, run_dir)
        self.accelerator.wait_for_everyone()  # every process has written its random state
        if self.args.should_save:
            write_manifest(part)
            publish(run_dir, name)
        self.accelerator.wait_for_everyone()
        if push:
            self._push_from_checkpoint(str(run_dir / name))
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            rotate_checkpoints(str(run_dir), self.args.save_total_limit, best, use_mtime=True)

    def _correct_best(self, part: Path, run_dir: Path) -> None:
        """The best checkpoint is named by its place to be."""
        if self.state.best_global_step is not None:
            best = f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
            if best == part.name or (run_dir / best).is_dir():
                self.state.best_model_checkpoint = str(run_dir / best)
        if self.args.should_save:
            self.state.save_to_json(str(part / TRAINER_STATE_NAME))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        # Folders of ours are published: the arguments go into them as JSON, not as a pickle.
        super()._save(output_dir, state_dict)
        if not self.args.should_save:  # other processes come here too: gathering sharded weights needs them
            return
        folder = Path(output_dir if output_dir is not None else self.args.output_dir)
        if self._average is not None:
            self._average.save(folder, self.accelerator.unwrap_model(self.model, keep_torch_compile=False))
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder / AVERAGE_FOLDER)
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
            the pairs of modalities), `retrieval_chance@1` and the figures of `embedding_statistics`; with an image
            processor that has statistics also `reconstruction_mae_hmi_G`, `reconstruction_mae_aia171_DN`, ...: the mean
            absolute error on the disk in physical units.
        """
        if ignore_keys is None:  # transformers adds a list to it
            ignore_keys = list(self.model.config.keys_to_ignore_at_inference)
        error = PhysicalError(self.processing_class, self.modalities)
        self._held_out = HeldOut(self.args.retrieval_gallery, LOSS_TERMS, error)
        try:
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
            metrics, table = self._held_out.metrics(self)
            self.shown_observation = self._held_out.shown
        finally:
            self._held_out = None
        self.retrieval_table = table if table is not None else self.retrieval_table
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        return output


__all__ = ["LOSS_TERMS", "TEMPERATURES", "SolarChipTrainer"]
