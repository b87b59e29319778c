"""One training loop for prior and ControlNet: noise in, prediction out, checkpoints that are whole, exact resume.

Every draw (order of the data, noise, timesteps, dropped hints) is a function of seed, step and process, never of what
ran before: a resumed run repeats the interrupted one bit for bit on a CPU, whenever it was killed. Accelerate gives
devices, processes, mixed precision and trackers.
"""

import gc
import json
import logging
import math
import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import DistributedType, gather_object
from diffusers import ModelMixin, SchedulerMixin
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from accelerate import Accelerator

from ..models.settings import choice
from ..training.callbacks import start_worker
from ..training.checkpoints import INCOMPLETE, checkpoint_to_resume, clear_incomplete, publish, write_manifest
from ..training.continuation import check_output_dir
from .diffusion_objective import TIMESTEP_SAMPLINGS, Predict, diffusion_loss, draw_timesteps

logger = logging.getLogger(__name__)

_WEIGHTS, _AVERAGE, _OPTIMIZER, _STATE = "model.safetensors", "ema.safetensors", "optimizer.pt", "trainer_state.json"
# Of diffusers' schedules those that need no further settings.
LR_SCHEDULERS = ("cosine", "linear", "constant", "constant_with_warmup", "cosine_with_restarts", "polynomial")


@dataclass
class DiffusionArguments:
    """How a prior or a ControlNet is trained. Published: 5e-5, warm-up and cosine, batches of 16, bf16."""

    output_dir: str = field(default="solarchip/diffusion", metadata={"help": "Folder for checkpoints and the result."})
    max_steps: int = field(default=100_000, metadata={"help": "Steps of the optimiser."})
    batch_size: int = field(default=16, metadata={"help": "Latents a process and micro-step."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Micro-steps a step."})
    learning_rate: float = field(default=5e-5, metadata={"help": "Largest learning rate of the schedule."})
    lr_scheduler: str = field(
        default="cosine", metadata={"help": f"Schedule behind the warm-up: {', '.join(LR_SCHEDULERS)}."}
    )
    warmup_steps: int = field(default=500, metadata={"help": "Steps of linear warm-up."})
    weight_decay: float = field(default=0.01, metadata={"help": "Decoupled weight decay of AdamW."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Largest norm of the gradient."})
    snr_gamma: float | None = field(
        default=5.0, metadata={"help": "Min-SNR weighting (Hang et al. 2023); 0: every timestep counts alike."}
    )
    timestep_sampling: str = field(
        default="uniform",
        metadata={"help": "How often each timestep is drawn: uniform, or cubic, which dwells on the noisiest ones."},
    )
    ema_decay: float = field(default=0.9999, metadata={"help": "Largest decay of the averaged weights; 0: no average."})
    mixed_precision: str | None = field(
        default=None,
        metadata={"help": "no, bf16 or fp16; by default what the launcher says.", "choices": ["no", "bf16", "fp16"]},
    )
    seed: int = field(default=0, metadata={"help": "Of all that is drawn."})
    logging_steps: int = field(default=50, metadata={"help": "Steps between log lines."})
    save_steps: int = field(default=1000, metadata={"help": "Steps between checkpoints; 0: none but on SIGTERM."})
    save_total_limit: int = field(default=2, metadata={"help": "Checkpoints that are kept."})
    sample_steps: int = field(default=0, metadata={"help": "Steps between sampled figures; 0: one at the end."})
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "A checkpoint's folder, or 'last' for the newest complete one."}
    )
    dataloader_num_workers: int = field(default=0, metadata={"help": "Processes that read latents."})
    report_to: str = field(
        default="none", metadata={"help": "tensorboard or none.", "choices": ["tensorboard", "none"]}
    )
    use_cpu: bool = field(default=False, metadata={"help": "Stay on the CPU where there is an accelerator."})
    disable_tqdm: bool = field(default=False, metadata={"help": "Show no progress bars."})

    def __post_init__(self):
        positive = ("max_steps", "batch_size", "gradient_accumulation_steps", "logging_steps", "save_total_limit")
        for name in positive:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected 1 or more, got {getattr(self, name)}.")
        for name in ("learning_rate", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}.")
        for name in ("warmup_steps", "weight_decay", "snr_gamma", "save_steps", "sample_steps"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name}: expected 0 or more, got {getattr(self, name)}.")
        choice("lr_scheduler", self.lr_scheduler, LR_SCHEDULERS)
        if self.mixed_precision is False:  # YAML's bare `no`
            self.mixed_precision = "no"
        choice("timestep_sampling", self.timestep_sampling, TIMESTEP_SAMPLINGS)
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay: expected 0 or more and below 1, got {self.ema_decay}.")


class ShuffledBatches(Sampler[list[int]]):
    """Batches of an endless stream of shuffled epochs, from any micro-step on, each process with its own share.

    Args:
        length: Items of the dataset.
        batch_size: Items a process and micro-step.
        seed: Of the epochs' orders.
        first: First micro-step.
        last: Micro-step before which the stream ends.
        rank: This process.
        world: Number of processes.
    """

    def __init__(
        self, length: int, batch_size: int, *, seed: int, first: int, last: int, rank: int = 0, world: int = 1
    ):
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.first, self.last, self.rank, self.world = first, last, rank, world

    def __len__(self) -> int:
        return self.last - self.first

    def __iter__(self) -> Iterator[list[int]]:
        epoch, order = -1, np.empty(0, dtype=np.int64)
        for step in range(self.first, self.last):
            start = (step * self.world + self.rank) * self.batch_size
            batch = []
            for position in range(start, start + self.batch_size):
                if position // self.length != epoch:
                    epoch = position // self.length
                    order = np.random.default_rng((self.seed, epoch)).permutation(self.length)
                batch.append(int(order[position % self.length]))
            yield batch


class DiffusionTrainer:
    """Trains a prior or a ControlNet.

    Args:
        model: The network that learns.
        dataset: `PriorLatents` or `TranslationLatents`: items with `target` and what `predict` needs.
        predict: `prior_prediction`, or a `ControlNetPrediction`.
        scheduler: A DDPM scheduler: the noise schedule and what is predicted.
        args: Everything else.
        on_sample: Called as `on_sample(trainer, step)` on the main process with the averaged weights in place; draws
            samples. None: nothing is drawn.

    Attributes:
        step: Steps done.
        log_history: Step, loss, learning rate and gradient norm, a row every `logging_steps`.
        stopped: Whether a SIGTERM ended training.

    Raises:
        ValueError: A checkpoint cannot be resumed, a new run would begin among the checkpoints of another, or the
            processes are of a kind whose weights are sharded.
    """

    def __init__(
        self,
        model: ModelMixin,
        dataset: Dataset,
        predict: Predict,
        scheduler: SchedulerMixin,
        args: DiffusionArguments,
        *,
        on_sample: Callable[["DiffusionTrainer", int], None] | None = None,
    ):
        self.args, self.dataset, self.predict, self.scheduler = args, dataset, predict, scheduler
        self.on_sample = on_sample
        self.accelerator = Accelerator(
            mixed_precision=args.mixed_precision,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            cpu=args.use_cpu,
            log_with=None if args.report_to == "none" else args.report_to,
            project_dir=args.output_dir,
        )
        if self.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            raise ValueError(
                f"distributed_type: expected one process or DDP, got {self.accelerator.distributed_type.value}, "
                "whose sharded weights these checkpoints do not hold."
            )
        self.device = self.accelerator.device
        self.model = model.to(self.device).train()
        self.optimizer = torch.optim.AdamW(model.parameters(), args.learning_rate, weight_decay=args.weight_decay)
        self.wrapped, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)
        # of the weights that DDP has made equal
        self.ema = EMAModel(model.parameters(), decay=args.ema_decay, foreach=True) if args.ema_decay else None
        # left to itself, Accelerate would move the schedule once a process
        self.lr_scheduler = get_scheduler(
            args.lr_scheduler,
            self.optimizer.optimizer,
            num_warmup_steps=args.warmup_steps,
            num_training_steps=args.max_steps,
        )
        self.log_history: list[dict[str, float]] = []
        self.step, self.stopped, self._told = 0, False, False
        self._pending: list[torch.Tensor] = []  # losses since the last log line
        wish = args.resume_from_checkpoint
        found = checkpoint_to_resume(wish, args.output_dir) if wish else None
        if found is None:
            check_output_dir(args.output_dir)
        else:
            self._load(Path(found))

    def train(self, keep: Callable[[dict[str, float]], None] | None = None) -> dict[str, float]:
        """Trains to `max_steps`, or to a SIGTERM, which leaves a checkpoint.

        Args:
            keep: Saves the result: called with what is returned on the main process when training is complete, before
                the last figures are drawn, whose failure then costs nothing.

        Returns:
            `steps` and the last logged `loss`.

        Raises:
            FloatingPointError: Loss or weights are not finite any more; nothing of them is saved.
        """
        args, accelerator = self.args, self.accelerator
        if accelerator.is_main_process:
            Path(args.output_dir).mkdir(parents=True, exist_ok=True)
            clear_incomplete(args.output_dir)
        if args.report_to != "none":
            accelerator.init_trackers("logs", config=vars(args))
        former = self._listen()
        batches = iter(self._loader())
        hidden = args.disable_tqdm or not accelerator.is_main_process
        bar = tqdm(total=args.max_steps, initial=self.step, desc="Training", unit="step", disable=hidden)
        try:
            while self.step < args.max_steps and not self.stopped:
                loss, norm = self._step(batches)
                self._pending.append(loss)
                self.step += 1
                bar.update()
                if self.step % args.logging_steps == 0 or self.step == args.max_steps:
                    self._log(torch.stack(self._pending).mean(), norm, bar)
                    self._pending.clear()
                if args.sample_steps and self.step % args.sample_steps == 0 and self.step < args.max_steps:
                    self._sample()
                self.stopped = self._any_told() and self.step < args.max_steps
                if self.stopped or (args.save_steps and self.step % args.save_steps == 0):
                    self.save_checkpoint()
        finally:
            bar.close()
            if former is not None:
                signal.signal(signal.SIGTERM, former)
        metrics = {"steps": self.step, "loss": self.log_history[-1]["loss"] if self.log_history else math.nan}
        if not self.stopped:
            self._check_finite()
            if keep is not None and accelerator.is_main_process:
                keep(metrics)
            self._sample()
        self.wrapped = self.model  # a DDP that outlives its process group may hang when it goes
        accelerator.free_memory()
        gc.collect()
        accelerator.end_training()
        return metrics

    def averaged(self) -> ModelMixin:
        """The network itself, with the averaged weights copied in where there are any; for the end of training."""
        if self.ema is not None:
            self.ema.copy_to(self.model.parameters())
        return self.model.eval()

    def batch(self, indices: list[int]) -> dict[str, torch.Tensor]:
        """Items of the dataset as a batch on the device."""
        items = [self.dataset[index] for index in indices]
        return {name: torch.stack([item[name] for item in items]).to(self.device) for name in items[0]}

    def generator(self, step: int, micro_step: int = 0) -> torch.Generator:
        """The source of everything that is drawn in a micro-step of this process."""
        state = np.random.SeedSequence((self.args.seed, step, micro_step, self.accelerator.process_index))
        return torch.Generator().manual_seed(int(state.generate_state(1, np.uint64)[0] >> 1))

    def show(self, path: str | Path, step: int) -> None:
        """Passes a figure that was written as PNG on to the trackers, where there are any.

        Args:
            path: The figure.
            step: At which step it was drawn.
        """
        for tracker in self.accelerator.trackers:
            with Image.open(path) as image:
                pixels = np.asarray(image.convert("RGB"))
            tracker.log_images({"samples": pixels[None]}, step=step, dataformats="NHWC")  # type: ignore[attr-defined]

    # One step --------------------------------------------------------------------------------------------------------

    def _loader(self) -> DataLoader:
        micro_steps = self.args.gradient_accumulation_steps
        sampler = ShuffledBatches(
            len(self.dataset),  # type: ignore[arg-type]
            self.args.batch_size,
            seed=self.args.seed,
            first=self.step * micro_steps,
            last=self.args.max_steps * micro_steps,
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
        )
        return DataLoader(
            self.dataset,
            batch_sampler=sampler,
            num_workers=self.args.dataloader_num_workers,
            worker_init_fn=partial(start_worker, None),
        )

    def _step(self, batches: Iterator[dict[str, torch.Tensor]]) -> tuple[torch.Tensor, float]:
        """One step of the optimiser; returns the mean loss of its micro-steps and the gradient's norm."""
        total, norm = torch.zeros((), device=self.device), math.nan
        for micro_step in range(self.args.gradient_accumulation_steps):
            batch = {name: values.to(self.device) for name, values in next(batches).items()}
            with self.accelerator.accumulate(self.wrapped):
                loss = self._loss(batch, self.generator(self.step, micro_step))
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    norm = float(self.accelerator.clip_grad_norm_(self.wrapped.parameters(), self.args.max_grad_norm))
                self.optimizer.step()
                self.optimizer.zero_grad()
            total += loss.detach() / self.args.gradient_accumulation_steps
        self.lr_scheduler.step()
        if self.ema is not None:
            self.ema.step(self.model.parameters())
        return total, norm

    def _loss(self, batch: Mapping[str, torch.Tensor], generator: torch.Generator) -> torch.Tensor:
        latents, scheduler = batch["target"], self.scheduler
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        steps, how = scheduler.config.num_train_timesteps, self.args.timestep_sampling
        timesteps = draw_timesteps(len(latents), steps, how, generator).to(latents.device)
        noisy = scheduler.add_noise(latents, noise, timesteps)
        with self.accelerator.autocast():
            prediction = self.predict(self.wrapped, noisy, timesteps, batch, generator)
        return diffusion_loss(prediction, latents, noise, timesteps, scheduler, self.args.snr_gamma)

    def _log(self, loss: torch.Tensor, norm: float, bar: tqdm) -> None:
        value = float(self.accelerator.reduce(loss, "mean"))
        if not math.isfinite(value):
            raise self._diverged("loss", str(value))
        row = {"loss": value, "learning_rate": self.lr_scheduler.get_last_lr()[0], "grad_norm": norm}
        self.log_history.append({"step": self.step, **row})
        self.accelerator.log(row, step=self.step)
        bar.set_postfix(loss=f"{value:.4f}")

    def _check_finite(self) -> None:
        """Refuses losses that are not logged yet, and weights, that are not finite; alike in every process.

        Raises:
            FloatingPointError: With what is not finite.
        """
        if self._pending:
            value = float(self.accelerator.reduce(torch.stack(self._pending).mean(), "mean"))
            if not math.isfinite(value):
                raise self._diverged("loss", str(value))
        for name, parameter in self.model.named_parameters():
            if not torch.isfinite(parameter).all():
                raise self._diverged("weights", f"others in {name}")

    def _diverged(self, what: str, got: str) -> FloatingPointError:
        return FloatingPointError(
            f"{what}: expected finite numbers, got {got} at step {self.step}. Resume from an earlier checkpoint with a "
            "lower learning_rate, or without mixed precision."
        )

    def _sample(self) -> None:
        if self.on_sample is None or not self.accelerator.is_main_process:
            return
        if self.ema is not None:
            self.ema.store(self.model.parameters())
            self.ema.copy_to(self.model.parameters())
        self.model.eval()
        try:
            with torch.no_grad():
                self.on_sample(self, self.step)
        except (RuntimeError, ValueError, OSError, ImportError):  # days of training outweigh a figure
            logger.exception("No figure of samples at step %d; training is not affected.", self.step)
        finally:
            self.model.train()
            if self.ema is not None:
                self.ema.restore(self.model.parameters())

    # Signals and checkpoints -----------------------------------------------------------------------------------------

    def _listen(self) -> Any:
        """Notes a SIGTERM from now on; returns the former handler, or None outside the main thread."""
        if threading.current_thread() is not threading.main_thread():
            return None

        def remember(number: int, frame: Any) -> None:
            self._told = True

        return signal.signal(signal.SIGTERM, remember)

    def _any_told(self) -> bool:
        if self.accelerator.num_processes == 1:
            return self._told
        return bool(self.accelerator.reduce(torch.tensor(int(self._told), device=self.device), "sum"))

    def save_checkpoint(self) -> None:
        """Writes `checkpoint-N` of the present step, whole or not at all, and removes the oldest beyond the limit.

        Raises:
            FloatingPointError: Loss or weights are not finite; the checkpoints that are there stay.
        """
        self._check_finite()
        pending = gather_object([[float(loss) for loss in self._pending]])  # of every process
        if self.accelerator.is_main_process:
            run = Path(self.args.output_dir)
            folder = run / INCOMPLETE / f"checkpoint-{self.step}"
            folder.mkdir(parents=True, exist_ok=True)
            save_file(_contiguous(self.model.state_dict()), folder / _WEIGHTS)
            state: dict[str, Any] = {"step": self.step, "log_history": self.log_history, "args": self._facts()}
            state["pending"] = pending
            if self.ema is not None:
                names = [name for name, _ in self.model.named_parameters()]
                save_file(_contiguous(dict(zip(names, self.ema.shadow_params, strict=True))), folder / _AVERAGE)
                state["ema_steps"] = self.ema.optimization_step
            moments = {"optimizer": self.optimizer.state_dict(), "lr_scheduler": self.lr_scheduler.state_dict()}
            if self.accelerator.scaler is not None:
                moments["scaler"] = self.accelerator.scaler.state_dict()
            torch.save(moments, folder / _OPTIMIZER)
            (folder / _STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
            write_manifest(folder)
            publish(run, folder.name)
            others = [path for path in _checkpoints(run) if path.name != folder.name]
            for old in others[: max(0, len(others) + 1 - self.args.save_total_limit)]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def _facts(self) -> dict[str, Any]:
        """What must be equal for a resumed run to be the interrupted one."""
        names = ("seed", "batch_size", "gradient_accumulation_steps", "max_steps", "learning_rate", "lr_scheduler")
        more = ("warmup_steps", "weight_decay", "snr_gamma", "ema_decay", "max_grad_norm", "timestep_sampling")
        facts = {name: getattr(self.args, name) for name in names + more}
        facts["mixed_precision"] = self.accelerator.mixed_precision  # the launcher's where the arguments are silent
        return {**facts, "processes": self.accelerator.num_processes, "items": len(self.dataset)}  # type: ignore[arg-type]

    def _load(self, folder: Path) -> None:
        state = json.loads((folder / _STATE).read_text(encoding="utf-8"))
        saved, facts = state["args"], self._facts()
        changed = [f"{name} {saved.get(name)} -> {facts[name]}" for name in facts if saved.get(name) != facts[name]]
        if changed:
            logger.warning("%s is resumed with other settings, so not exactly: %s.", folder, ", ".join(changed))
        try:
            self.model.load_state_dict(load_file(folder / _WEIGHTS))
            if self.ema is not None:
                averages = load_file(folder / _AVERAGE) if (folder / _AVERAGE).is_file() else {}
                for (name, parameter), shadow in zip(
                    self.model.named_parameters(), self.ema.shadow_params, strict=True
                ):
                    shadow.copy_(averages.get(name, parameter.detach()))
                self.ema.optimization_step = state.get("ema_steps", 0)
        except RuntimeError as error:
            raise ValueError(f"{folder}: expected the weights of this network, got others: {error}") from error
        moments = torch.load(folder / _OPTIMIZER, weights_only=True, map_location="cpu")
        self.optimizer.load_state_dict(moments["optimizer"])
        self.lr_scheduler.load_state_dict(moments["lr_scheduler"])
        self._apply_rates()
        if self.accelerator.scaler is not None and "scaler" in moments:
            self.accelerator.scaler.load_state_dict(moments["scaler"])
        self.step, self.log_history = state["step"], state["log_history"]
        pending = state["pending"]
        if not pending or not isinstance(pending[0], list):  # of one process, as they were kept at first
            pending = [pending]
        if len(pending) == self.accelerator.num_processes:
            own = pending[self.accelerator.process_index]
        else:
            own = np.mean(pending, axis=0).tolist()
        self._pending = [torch.tensor(loss, device=self.device) for loss in own]

    def _apply_rates(self) -> None:
        """Puts this run's learning rate and weight decay in the place of those that a checkpoint brought along."""
        schedule = self.lr_scheduler
        schedule.base_lrs = [self.args.learning_rate] * len(self.optimizer.param_groups)
        for index, group in enumerate(self.optimizer.param_groups):
            rate = self.args.learning_rate * schedule.lr_lambdas[index](schedule.last_epoch)
            group.update(lr=rate, initial_lr=self.args.learning_rate, weight_decay=self.args.weight_decay)
        schedule._last_lr = [group["lr"] for group in self.optimizer.param_groups]


def _contiguous(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def _checkpoints(run: Path) -> list[Path]:
    """In the order in which they were written: a run that went on from an earlier one writes smaller numbers later."""
    found = [path for path in run.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name) and path.is_dir()]
    return sorted(found, key=lambda path: path.stat().st_mtime_ns)


__all__ = ["DiffusionArguments", "DiffusionTrainer", "ShuffledBatches"]
