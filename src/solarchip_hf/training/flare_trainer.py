"""Tuning a classifier for flares on transformers' Trainer: probes, staged unfreezing, full tuning, low-rank updates.

    model = build_flare_model("solarchip/vit-base", modalities=["hmi"])
    fit = fit_flare_model(model, parts["train"], parts["validation"], FlareTrainingArguments(tuning="attentive"),
                          score=ValidationScore(parts["train"].classes))
    predictions = predict_flares(fit.model, parts["test"])          # logits (N, 4), labels (N,), times (N,)

`ValidationScore` and what follows (calibration, report) are in `solarchip_hf.evaluation`.
"""

import copy
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import EarlyStoppingCallback, EvalPrediction, Trainer, set_seed

from ..models.modeling_solarchip_classification import SolarChipForImageClassification
from .checkpoints import checkpoint_to_resume
from .flare_arguments import FROZEN, FlareTrainingArguments
from .flare_features import (
    FlareDataCollator,
    FlareProbe,
    FrozenFeatures,
    encode_observations,
    features_gib,
    pooled_statistics,
)
from .flare_models import add_lora, count_parameters
from .trainer import SolarChipTrainer

logger = logging.getLogger(__name__)

# (logits (N, K), labels (N,), none unknown) to scores by name
Score = Callable[[np.ndarray, np.ndarray], Mapping[str, float]]

_STAGE = "frozen"
_HEAD = "classifier.safetensors"


@dataclass
class FlareFit:
    """A tuned classifier and how it came about.

    Attributes:
        model: The classifier with the weights of the best checkpoint, in evaluation mode.
        score_name: What chose the checkpoint, as `"bss"`; empty without a validation part.
        best_score: Its value there; NaN without a validation part.
        best_step: The optimiser step of that checkpoint.
        steps: Optimiser steps of the last stage in all.
        seconds: Time that training took, features included.
        learning: Parameters that learnt in the last stage.
        parameters: All parameters.
        history: The log lines.
        stopped: Whether SIGTERM ended training early, with a checkpoint to resume from.
    """

    model: SolarChipForImageClassification
    score_name: str
    best_score: float
    best_step: int
    steps: int
    seconds: float
    learning: int
    parameters: int
    history: list[dict[str, float]] = field(repr=False)
    stopped: bool = False

    def facts(self) -> dict[str, Any]:
        """All but the model and the history, for JSON."""
        return {name: value for name, value in vars(self).items() if name not in ("model", "history")}


@dataclass
class FlarePredictions:
    """Forecasts of a dataset before calibration.

    Attributes:
        logits: (N, K) float32.
        labels: (N,) int64 classes.
        times: (N,) nominal slots, or None where the dataset has none.
    """

    logits: np.ndarray
    labels: np.ndarray
    times: Any = None


class FlareTrainer(SolarChipTrainer):
    """`SolarChipTrainer` for a classifier: one loss, labels, scores of a validation part, a rate for the backbone.

    Complete checkpoints, SIGTERM, augmentation and resume are those of `SolarChipTrainer`.

    Args:
        model: A `SolarChipForImageClassification`, or a `FlareProbe` on its features.
        args: Training arguments.
        score: Called with the logits and labels of the validation part; its scores become metrics.
        **kwargs: Further arguments of `SolarChipTrainer`.
    """

    args: FlareTrainingArguments

    def __init__(self, model: Any, args: FlareTrainingArguments, *, score: Score | None = None, **kwargs: Any):
        kwargs.setdefault("data_collator", FlareDataCollator(model.config.modalities))
        super().__init__(model, args, compute_metrics=None if score is None else self._metrics(score), **kwargs)

    def _metrics(self, score: Score) -> Callable[[EvalPrediction], dict[str, float]]:
        def compute(prediction: EvalPrediction) -> dict[str, float]:
            logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
            known = prediction.label_ids >= 0
            if not np.isfinite(logits[known]).all():
                raise self._diverged("logits of the validation part")
            metrics = {name: float(v) for name, v in score(logits[known], prediction.label_ids[known]).items()}
            chosen = (self.args.metric_for_best_model or "").removeprefix("eval_")
            if chosen in metrics and not np.isfinite(metrics[chosen]):
                raise ValueError(
                    f"metric_for_best_model: {chosen} is undefined on the validation part (a class is absent there). "
                    "Take a longer validation part, or 'loss'."
                )
            return metrics

        return compute

    def augment(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """As in `SolarChipTrainer`; features are left as they are."""
        return super().augment(inputs) if "pixel_values" in inputs else self._prepare_inputs(inputs)

    def _remember_terms(self, outputs: Mapping[str, Any]) -> None:
        pass  # the loss has one term, which transformers logs

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' own: there is nothing to retrieve."""
        return Trainer.evaluation_loop(self, *args, **kwargs)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """As in transformers, with groups of their own, and their own rate, for the backbone's parameters."""
        if self.optimizer is None:
            super().create_optimizer(model)
            named = (self.model if model is None else model).named_parameters()
            ours = {id(parameter) for name, parameter in named if "solarchip." in name}
            for group in list(self.optimizer.param_groups):
                backbone = [parameter for parameter in group["params"] if id(parameter) in ours]
                if backbone:
                    group["params"] = [parameter for parameter in group["params"] if id(parameter) not in ours]
                    rest = {name: value for name, value in group.items() if name not in ("params", "lr")}
                    self.optimizer.add_param_group({**rest, "params": backbone, "lr": self.args.backbone_rate})
        return self.optimizer


def fit_flare_model(
    model: SolarChipForImageClassification,
    train: Any,
    validation: Any = None,
    args: FlareTrainingArguments | None = None,
    *,
    score: Score | None = None,
    processor: Any = None,
) -> FlareFit:
    """Tunes a classifier, in place, and returns it with the weights of the best checkpoint.

    With a frozen backbone and no augmentation the features are computed once, and the head learns on standardised
    statistics of theirs (`FlareProbe`); pass `FrozenFeatures` (`encode_observations`) in place of datasets to fit
    several heads on the same ones.

    Staged tuning is two trainings: a probe for `frozen_epochs`, which leaves its head in `output_dir/frozen`, then
    everything, with an optimiser and a schedule that begin anew; the best checkpoint is one of the second. Low-rank
    updates are merged into the backbone.

    Args:
        model: What `build_flare_model` gives; for `tuning="linear"` one with `classifier_head="linear"`.
        train: `FlareObservations`, `FrozenFeatures`, or a dataset whose items have `pixel_values`, `observed`,
            `labels`.
        validation: The same of the validation part; None: the last weights are kept.
        args: Training arguments.
        score: `ValidationScore` of `solarchip_hf.evaluation`; needed unless the validation loss is to choose
            (`metric_for_best_model="loss"`).
        processor: Image processor whose statistics tell augmentation what a reversed field is; by default that of
            `train`.

    Returns:
        The tuned model and how it came about.

    Raises:
        ValueError: Arguments that do not fit together, a checkpoint of another model, or a score that the validation
            part leaves undefined.
        FloatingPointError: The training has diverged: logits or weights are not finite. Checkpoints before it stay.
        ImportError: `tuning="lora"` without peft.
    """
    args = copy.copy(args) if args is not None else FlareTrainingArguments()
    _check(model, train, validation, args, score)
    set_seed(args.seed)
    if validation is None:
        args.eval_strategy, args.load_best_model_at_end, args.metric_for_best_model = "no", False, None
    else:
        args.greater_is_better = not (args.metric_for_best_model or "loss").removeprefix("eval_").endswith("loss")
    resume = checkpoint_to_resume(args.resume_from_checkpoint, args.output_dir) if args.resume_from_checkpoint else None
    if processor is None:
        processor = getattr(train, "processor", None)
    if args.tuning != "staged":
        return _run(model, train, validation, args, score, processor, resume)

    head = Path(args.output_dir) / _STAGE / _HEAD
    first = None
    if resume is None and args.resume_from_checkpoint and head.is_file():
        _check_resumed(head, model.classifier)
        model.classifier.load_state_dict(load_file(head))
        logger.info("%s: the first stage is done.", head)
    elif resume is None:
        stage = copy.copy(args)
        stage.tuning, stage.augmentation, stage.num_train_epochs = "attentive", "none", args.frozen_epochs
        stage.output_dir = str(head.parent)
        earlier = checkpoint_to_resume("last", stage.output_dir) if args.resume_from_checkpoint else None
        first = _run(model, train, validation, stage, score, processor, earlier)
        if first.stopped:
            return first
        if args.should_save:
            part = head.with_suffix(".partial")
            save_file(model.classifier.state_dict(), part)
            part.replace(head)
    fit = _run(model, train, validation, args, score, processor, resume)
    if first is not None:
        fit.seconds += first.seconds
        fit.history = first.history + fit.history
    return fit


def predict_flares(
    model: SolarChipForImageClassification,
    dataset: Any,
    *,
    batch_size: int = 32,
    num_workers: int = 0,
    device: Any = None,
    progress: bool = True,
) -> FlarePredictions:
    """Logits of a dataset, in its order.

    Args:
        model: The classifier.
        dataset: `FlareObservations`, `FrozenFeatures`, or a dataset whose items have `pixel_values`, `observed` and
            `labels`.
        batch_size: Observations at a time.
        num_workers: Processes that load.
        device: Where to compute; by default where the model is.
        progress: Whether to show a bar.

    Returns:
        Logits, labels and times. `calibrated_probabilities(torch.from_numpy(p.logits), calibration)` gives
        probabilities.
    """
    device = next(model.parameters()).device if device is None else torch.device(device)
    training = model.training
    model.eval().to(device)
    forward = FlareProbe(model).eval() if isinstance(dataset, FrozenFeatures) else model
    loader = DataLoader(
        dataset, batch_size, num_workers=num_workers, collate_fn=FlareDataCollator(model.config.modalities)
    )
    logits, labels = [], []
    with torch.no_grad():
        for batch in tqdm(loader, desc="forecasts", unit="batch", disable=not progress):
            labels.append(batch.pop("labels"))
            logits.append(forward(**{name: value.to(device) for name, value in batch.items()}).logits.float().cpu())
    model.train(training)
    if not logits:
        raise ValueError("dataset: expected at least one observation, got none.")
    return FlarePredictions(torch.cat(logits).numpy(), torch.cat(labels).numpy(), getattr(dataset, "times", None))


def _check(model: Any, train: Any, validation: Any, args: FlareTrainingArguments, score: Score | None) -> None:
    if not len(train) or (validation is not None and not len(validation)):
        raise ValueError("train, validation: expected at least one observation in each, got none.")
    if args.tuning == "linear" and model.config.classifier_head != "linear":
        raise ValueError(
            "tuning: expected a model with classifier_head='linear' for a linear probe, got "
            f"{model.config.classifier_head!r}. Build it with build_flare_model(..., classifier_head='linear')."
        )
    if isinstance(train, FrozenFeatures) and (args.tuning not in FROZEN or args.augmentation != "none"):
        raise ValueError(
            f"train: expected observations for tuning={args.tuning!r} with augmentation={args.augmentation!r}, got "
            "features of a frozen backbone."
        )
    if args.tuning in FROZEN and args.gradient_checkpointing:
        raise ValueError(
            f"gradient_checkpointing: expected False for tuning={args.tuning!r}, got True: a frozen backbone keeps no "
            "activations."
        )
    wanted = (args.metric_for_best_model or "loss").removeprefix("eval_")
    if validation is not None and args.load_best_model_at_end and score is None and wanted != "loss":
        raise ValueError(
            f"score: expected a function that gives {wanted!r}, got none. Pass score=ValidationScore(train.classes) of "
            "solarchip_hf.evaluation, or metric_for_best_model='loss'."
        )


def _freeze(model: SolarChipForImageClassification, tuning: str) -> None:
    model.requires_grad_(True)
    if tuning in FROZEN:
        model.solarchip.requires_grad_(False)
    if tuning == "linear":  # flat attention: plain mean and deviation of all tokens
        for pool in (model.classifier.token_pool, model.classifier.modality_pool):
            torch.nn.init.zeros_(pool.score.weight)
            pool.requires_grad_(False)


def _run(
    model: SolarChipForImageClassification,
    train: Any,
    validation: Any,
    args: FlareTrainingArguments,
    score: Score | None,
    processor: Any,
    resume: str | None,
) -> FlareFit:
    """One training, to its best checkpoint."""
    _freeze(model, args.tuning)
    trained: torch.nn.Module = model
    start = time.perf_counter()
    if args.tuning in FROZEN and args.augmentation == "none" and not isinstance(train, FrozenFeatures):
        count = len(train) + (0 if validation is None else len(validation))
        needed = features_gib(model.config, count)
        if needed > args.feature_cache_gib:
            logger.warning(
                "features of %d observations take %.1f GiB, more than feature_cache_gib=%.1f: they are computed "
                "anew every epoch.",
                count,
                needed,
                args.feature_cache_gib,
            )
        else:
            train, validation = _encode(model, train, validation, args)
    if args.tuning in FROZEN:
        statistics = pooled_statistics(model, train, **_encoding(args))  # first: encoding moves the model to its device
        probe = trained = FlareProbe(model, images=not isinstance(train, FrozenFeatures))
        probe.standardize(*statistics)
    tuner = None
    if args.tuning == "lora":
        tuner = add_lora(model, args.lora_rank, args.lora_alpha, args.lora_dropout, args.lora_targets)
    learning = count_parameters(model)[0]
    if resume is not None:
        _check_resumed(Path(resume), trained)
    trainer = FlareTrainer(
        trained, args, score=score, train_dataset=train, eval_dataset=validation, processing_class=processor
    )
    if args.early_stopping and validation is not None:
        trainer.add_callback(EarlyStoppingCallback(args.early_stopping))
    try:
        trainer.train(resume)
    except BaseException:
        if tuner is not None:
            tuner.unload()  # what was not learned to the end is not merged
        raise
    finally:  # of an interrupted training too: the model is the caller's
        if isinstance(trained, FlareProbe):
            trained.fold()
        model.requires_grad_(True)
        trainer.release()
    stopped = trainer.stopped_by_signal
    if tuner is not None:
        tuner.merge_and_unload()
        model.requires_grad_(True)
    state = trainer.state
    return FlareFit(
        model=model.eval(),
        score_name=(args.metric_for_best_model or "").removeprefix("eval_"),
        best_score=float("nan") if state.best_metric is None else float(state.best_metric),
        best_step=state.best_global_step or state.global_step,
        steps=state.global_step,
        seconds=time.perf_counter() - start,
        learning=learning,
        parameters=count_parameters(model)[1],
        history=list(state.log_history),
        stopped=stopped,
    )


def _check_resumed(saved: Path, module: torch.nn.Module) -> None:
    theirs: dict[str, tuple[int, ...]] = {}
    for path in sorted(saved.glob("*.safetensors")) if saved.is_dir() else [saved]:
        with safe_open(path, framework="pt") as file:
            theirs |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    ours = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    if theirs and theirs != ours:
        name = min(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
        raise ValueError(
            f"resume_from_checkpoint: expected weights of this model and tuning, got {saved}, where {name} is "
            f"{theirs.get(name, 'absent')} and here {ours.get(name, 'absent')}. Resume with the arguments of that run "
            "(feature_cache_gib is one), or start in another output_dir."
        )


def _encode(
    model: SolarChipForImageClassification, train: Any, validation: Any, args: FlareTrainingArguments
) -> tuple[FrozenFeatures, FrozenFeatures | None]:
    options = _encoding(args)
    return (
        encode_observations(model, train, **options),
        None if validation is None else encode_observations(model, validation, **options),
    )


def _encoding(args: FlareTrainingArguments) -> dict[str, Any]:
    return {
        "batch_size": args.per_device_eval_batch_size,
        "num_workers": args.dataloader_num_workers,
        "device": args.device,
        "progress": not args.disable_tqdm,
    }


__all__ = ["FlareFit", "FlarePredictions", "FlareTrainer", "fit_flare_model", "predict_flares"]
