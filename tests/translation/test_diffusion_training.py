"""The training loop: exact resume however it ends, a prior that stays frozen, losses against their definitions."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from tiny_latents import RandomLatents, arguments, schedule, tiny_controlnet, tiny_prior

from solarchip_hf.training.checkpoints import INCOMPLETE, last_complete_checkpoint, write_manifest
from solarchip_hf.translation.components import null_context
from solarchip_hf.translation.diffusion_objective import (
    ControlNetPrediction,
    diffusion_loss,
    draw_timesteps,
    prior_prediction,
)
from solarchip_hf.translation.diffusion_training import DiffusionArguments, DiffusionTrainer, ShuffledBatches


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As in the processes that are killed: sums over threads round differently for different numbers of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Accelerate keeps precision and device of the process's first run."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def prior_trainer(folder, *, seed=0, kind=DiffusionTrainer, on_sample=None, **options) -> DiffusionTrainer:
    args = arguments(folder, **options)
    return kind(tiny_prior(seed), RandomLatents(), prior_prediction, schedule(), args, on_sample=on_sample)


def controlnet_trainer(folder, *, hint_dropout=0.3, **options) -> DiffusionTrainer:
    prior = tiny_prior()
    predict = ControlNetPrediction(prior, class_label=1, hint_dropout=hint_dropout)
    args = arguments(folder, **options)
    return DiffusionTrainer(tiny_controlnet(prior), RandomLatents(), predict, schedule("v_prediction"), args)


class KilledWhileSaving(DiffusionTrainer):
    """Its process is killed (SIGKILL) at step 4, with the weights written and the optimiser's state not."""

    def _facts(self):
        if self.step == 4:
            folder = Path(self.args.output_dir) / INCOMPLETE / "checkpoint-4"
            assert (folder / "model.safetensors").exists()
            os.kill(os.getpid(), signal.SIGKILL)
        return super()._facts()


class ToldInStepThree(DiffusionTrainer):
    def _step(self, batches):
        if self.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return super()._step(batches)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    trainer = prior_trainer(tmp_path_factory.mktemp("whole"))
    trainer.train()
    return trainer


def assert_same_run(trainer, undisturbed):
    for name, tensor in undisturbed.model.state_dict().items():
        assert torch.equal(tensor, trainer.model.state_dict()[name]), name
    for ours, theirs in zip(trainer.ema.shadow_params, undisturbed.ema.shadow_params, strict=True):
        assert torch.equal(ours, theirs)
    assert trainer.log_history == undisturbed.log_history


def run(mode: str, folder: Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, mode, str(folder)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_killed_while_saving(tmp_path, undisturbed):
    result = run("kill", tmp_path)
    assert result.returncode == -signal.SIGKILL, result.stderr[-3000:]
    assert (tmp_path / INCOMPLETE / "checkpoint-4").exists()
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    again = prior_trainer(tmp_path, seed=9, resume_from_checkpoint="last")
    assert again.step == 2
    assert not torch.equal(again.model.conv_in.weight, undisturbed.model.conv_in.weight)
    again.train()
    assert not (tmp_path / INCOMPLETE).exists()
    assert_same_run(again, undisturbed)


def test_terminated_in_a_step(tmp_path, undisturbed):
    before = signal.getsignal(signal.SIGTERM)
    trainer = prior_trainer(tmp_path, kind=ToldInStepThree)
    assert trainer.train()["steps"] == 3
    assert trainer.stopped
    assert signal.getsignal(signal.SIGTERM) is before
    again = prior_trainer(tmp_path, seed=9, resume_from_checkpoint="last")
    again.train()
    assert_same_run(again, undisturbed)


def test_accumulation_and_worker_processes_resume_too(tmp_path):
    options = {"gradient_accumulation_steps": 2, "dataloader_num_workers": 1, "save_steps": 3}
    whole = prior_trainer(tmp_path / "whole", **options)
    whole.train()
    again = prior_trainer(
        tmp_path / "again", seed=9, resume_from_checkpoint=str(tmp_path / "whole/checkpoint-3"), **options
    )
    again.train()
    assert_same_run(again, whole)


def test_a_checkpoint_that_kept_the_losses_of_one_process_plainly_resumes(tmp_path):
    whole = prior_trainer(tmp_path / "whole", save_steps=3)
    whole.train()
    folder = tmp_path / "whole" / "checkpoint-3"
    state = json.loads((folder / "trainer_state.json").read_text())
    assert len(state["pending"]) == 1
    assert len(state["pending"][0]) == 1  # losses are logged every second step
    (folder / "trainer_state.json").write_text(json.dumps({**state, "pending": state["pending"][0]}))
    write_manifest(folder)
    again = prior_trainer(tmp_path / "again", save_steps=3, resume_from_checkpoint=str(folder))
    again.train()
    assert_same_run(again, whole)


def test_checkpoints_hold_nothing_that_must_be_unpickled_and_the_oldest_goes(tmp_path):
    prior_trainer(tmp_path, save_steps=2, save_total_limit=2).train()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-4", "checkpoint-6"]
    torch.load(tmp_path / "checkpoint-6" / "optimizer.pt", weights_only=True)
    state = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
    assert [row["step"] for row in state["log_history"]] == [2, 4, 6]
    (tmp_path / "checkpoint-6" / "ema.safetensors").unlink()
    assert prior_trainer(tmp_path, resume_from_checkpoint="last").step == 4


def test_a_new_run_does_not_begin_among_old_checkpoints(tmp_path):
    prior_trainer(tmp_path, save_steps=4).train()
    with pytest.raises(ValueError, match=r"output_dir: expected a folder without checkpoints.*checkpoint-4"):
        prior_trainer(tmp_path)


def test_the_checkpoint_just_written_outlives_later_ones_of_an_older_branch(tmp_path):
    prior_trainer(tmp_path, save_steps=2, save_total_limit=3).train()
    again = prior_trainer(tmp_path, save_total_limit=1, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    again.step = 3
    again.save_checkpoint()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


@pytest.mark.parametrize("where", ["loss", "weights"])
def test_what_is_not_finite_replaces_no_checkpoint(where, tmp_path):
    prior_trainer(tmp_path, save_steps=4, max_steps=4).train()
    before = {path: path.read_bytes() for path in (tmp_path / "checkpoint-4").iterdir()}
    again = prior_trainer(
        tmp_path, resume_from_checkpoint="last", save_steps=1, logging_steps=100, save_total_limit=1, max_steps=9
    )
    if where == "loss":
        again.dataset.target[:] = torch.nan
    else:
        again.model.conv_out.bias.data[0] = torch.inf
        again._pending.clear()
    with pytest.raises(FloatingPointError, match=where if where == "loss" else "finite numbers"):
        again.train() if where == "loss" else again.save_checkpoint()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_resumed_run_takes_its_own_rates(tmp_path):
    prior_trainer(tmp_path, save_steps=2, max_steps=2, lr_scheduler="constant", warmup_steps=0).train()
    options = {"learning_rate": 1e-4, "weight_decay": 0.5, "lr_scheduler": "constant", "warmup_steps": 0}
    again = prior_trainer(tmp_path, resume_from_checkpoint="last", max_steps=4, **options)
    assert [(group["lr"], group["weight_decay"]) for group in again.optimizer.param_groups] == [(1e-4, 0.5)]
    again.train()
    assert again.log_history[-1]["learning_rate"] == 1e-4


def test_a_figure_that_fails_costs_nothing(tmp_path, undisturbed, caplog):
    kept = []

    def draw(trainer, step):
        assert bool(kept) == (step == 6)  # the result is saved before the last figure
        raise RuntimeError("the canvas is torn")

    trainer = prior_trainer(tmp_path, on_sample=draw, sample_steps=4)
    metrics = trainer.train(kept.append)
    assert kept == [metrics]
    assert "No figure of samples at step 4" in caplog.text
    assert "the canvas is torn" in caplog.text
    assert_same_run(trainer, undisturbed)


def test_other_settings_are_warned_about_and_other_networks_refused(tmp_path, caplog):
    prior_trainer(tmp_path, save_steps=2, max_steps=2).train()
    prior_trainer(tmp_path, resume_from_checkpoint="last")
    assert "resumed with other settings" in caplog.text
    assert "max_steps 2 -> 6" in caplog.text
    prior = tiny_prior(prior_modalities=None)
    with pytest.raises(ValueError, match="expected the weights of this network"):
        DiffusionTrainer(
            prior, RandomLatents(), prior_prediction, schedule(), arguments(tmp_path, resume_from_checkpoint="last")
        )
    with pytest.raises(ValueError, match="resume_from_checkpoint: expected"):
        prior_trainer(tmp_path, resume_from_checkpoint="nowhere")


def test_batches_are_epochs_without_repetition_shared_among_processes():
    def stream(**options):
        return list(ShuffledBatches(10, 4, seed=1, first=0, last=10, **options))

    flat = [index for batch in stream() for index in batch]
    assert all(sorted(flat[start : start + 10]) == list(range(10)) for start in range(0, 40, 10))
    assert flat[:10] != flat[10:20]
    assert list(ShuffledBatches(10, 4, seed=1, first=3, last=10)) == stream()[3:]
    two = [stream(rank=rank, world=2) for rank in (0, 1)]
    alternating = [batch for pair in zip(*two, strict=True) for batch in pair]
    assert alternating[:10] == stream()


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_loss_is_its_definition(kind):
    scheduler, random = schedule(kind), torch.Generator().manual_seed(0)
    latents, noise, prediction = (torch.randn(3, 4, 8, 8, generator=random) for _ in range(3))
    timesteps = torch.tensor([5, 400, 990])
    for gamma in (None, 5.0):
        expected = []
        for index, step in enumerate(timesteps.tolist()):
            alpha = float(scheduler.alphas_cumprod[step])
            target = noise[index]
            if kind == "v_prediction":
                target = alpha**0.5 * noise[index] - (1 - alpha) ** 0.5 * latents[index]
            snr = alpha / (1 - alpha)
            weight = min(snr, 5.0) / (snr if kind == "epsilon" else snr + 1) if gamma else 1.0
            expected.append(weight * float((prediction[index] - target).square().mean()))
        loss = diffusion_loss(prediction, latents, noise, timesteps, scheduler, gamma)
        assert float(loss) == pytest.approx(float(np.mean(expected)), rel=1e-4)


def test_both_kinds_of_weighting_measure_the_same_error_of_the_clean_latent():
    """min(SNR, gamma) weighs the clean latent's error, whatever the network is made to predict."""
    random, step = torch.Generator().manual_seed(0), torch.tensor([300])
    clean, noise, guess = (torch.randn(1, 4, 8, 8, generator=random) for _ in range(3))
    alpha = float(schedule().alphas_cumprod[300])
    noisy = alpha**0.5 * clean + (1 - alpha) ** 0.5 * noise
    as_noise = (noisy - alpha**0.5 * guess) / (1 - alpha) ** 0.5
    as_velocity = alpha**0.5 * as_noise - (1 - alpha) ** 0.5 * guess
    first = diffusion_loss(as_noise, clean, noise, step, schedule(), 5.0)
    second = diffusion_loss(as_velocity, clean, noise, step, schedule("v_prediction"), 5.0)
    assert float(first) == pytest.approx(float(second), rel=1e-4)


def test_cubic_timesteps_dwell_on_the_noisiest_and_uniform_ones_on_none():
    cubic, uniform = (
        draw_timesteps(20_000, 1000, how, torch.Generator().manual_seed(0)) for how in ("cubic", "uniform")
    )
    for drawn in (cubic, uniform):
        assert drawn.dtype == torch.int64
        assert drawn.min() >= 0
        assert drawn.max() == 999
    # t > T - T / 8 wherever u^3 < 1 / 8: half of all draws, against an eighth of uniform ones.
    assert (cubic >= 875).float().mean() == pytest.approx(0.5, abs=0.02)
    assert (uniform >= 875).float().mean() == pytest.approx(0.125, abs=0.02)


@pytest.mark.parametrize("label", [None, 1])
def test_a_new_controlnet_leaves_the_prior_alone(label):
    prior = tiny_prior(prior_modalities=None if label is None else ("hmi", "aia171"))
    controlnet, items = tiny_controlnet(prior), RandomLatents(count=3)
    predict = ControlNetPrediction(prior, class_label=label)
    batch = {name: torch.stack([items[index][name] for index in range(3)]) for name in ("target", "hint", "context")}
    predict.check_initial(controlnet, batch, steps=1000)
    with torch.no_grad():
        controlnet.controlnet_mid_block.bias.add_(0.1)
    with pytest.raises(ValueError, match="zero-initialised outputs"):
        predict.check_initial(controlnet, batch, steps=1000)


def test_the_prior_stays_frozen_and_the_controlnet_learns(tmp_path):
    trainer = controlnet_trainer(tmp_path, max_steps=60, batch_size=8, learning_rate=1e-2)
    prior = trainer.predict.prior
    before = {name: tensor.clone() for name, tensor in prior.state_dict().items()}
    fixed, generator = trainer.batch(list(range(24))), lambda: torch.Generator().manual_seed(0)
    trainer.predict.hint_dropout = 0.0
    with torch.no_grad():
        start = float(trainer._loss(fixed, generator()))
    trainer.predict.hint_dropout = 0.3
    trainer.train()
    trainer.predict.hint_dropout = 0.0
    with torch.no_grad():
        end = float(trainer._loss(fixed, generator()))
    assert end < 0.9 * start
    assert all(torch.equal(before[name], tensor) for name, tensor in prior.state_dict().items())
    assert all(parameter.grad is None for parameter in prior.parameters())
    assert all(
        not torch.equal(weight, torch.zeros_like(weight)) for weight in [trainer.model.controlnet_mid_block.weight]
    )


def test_dropped_hints_see_the_null_context(tmp_path):
    """With every hint dropped, the sources play no part, and zeros of any number are the null context."""
    trainer = controlnet_trainer(tmp_path, hint_dropout=0.999)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        batch, steps = trainer.batch([0, 1]), torch.tensor([10, 500])
        other = {**batch, "hint": batch["hint"] + 1, "context": batch["context"] - 1}
        random = lambda: torch.Generator().manual_seed(0)  # noqa: E731
        first, second = (trainer.predict(trainer.model, batch["target"], steps, b, random()) for b in (batch, other))
        assert torch.equal(first, second)
        null = {**batch, "hint": torch.zeros_like(batch["hint"]), "context": null_context(trainer.model, 2)}
        third = trainer.predict(trainer.model, batch["target"], steps, null, random())
        torch.testing.assert_close(first, third, rtol=0, atol=1e-5)
        trainer.predict.hint_dropout = 0.0
        seen = trainer.predict(trainer.model, batch["target"], steps, batch, random())
        assert not torch.allclose(first, seen, atol=1e-3)


def test_one_prior_learns_two_modalities(tmp_path):
    """Two constant images, told apart by the label only: the mean of what it predicts follows the label."""
    items = RandomLatents(count=2)
    items.target = torch.stack([torch.full((8, 8, 8), 1.0), torch.full((8, 8, 8), -1.0)])
    args = arguments(tmp_path, max_steps=60, batch_size=8, learning_rate=3e-3, ema_decay=0.0)
    trainer = DiffusionTrainer(tiny_prior(), items, prior_prediction, schedule("v_prediction"), args)
    trainer.train()
    noise = torch.randn(1, 8, 8, 8, generator=torch.Generator().manual_seed(0)).expand(2, -1, -1, -1)
    with torch.no_grad():
        labels = {"class_label": torch.tensor([0, 1])}
        velocity = prior_prediction(trainer.model, noise, torch.tensor([999, 999]), labels, torch.Generator())
    clean = -velocity.mean((1, 2, 3))  # nearly all noise: the velocity is minus the clean latent
    assert clean[0] > 0.2
    assert clean[1] < -0.2


def test_bfloat16_trains_and_averages(tmp_path):
    trainer = prior_trainer(tmp_path, mixed_precision="bf16")
    trainer.train()
    live = trainer.model.conv_in.weight.clone()
    assert live.dtype == torch.float32
    assert np.isfinite(trainer.log_history[-1]["loss"])
    assert not torch.equal(trainer.averaged().conv_in.weight, live)
    assert torch.equal(trainer.model.conv_in.weight, trainer.ema.shadow_params[0])


@pytest.mark.parametrize(("given", "effective"), [(None, "bf16"), ("no", "no"), (False, "no"), ("bf16", "bf16")])
def test_the_launchers_precision_holds_unless_the_arguments_say_otherwise(given, effective, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # what accelerate launch --mixed_precision bf16 sets
    options = {} if given is None else {"mixed_precision": given}
    trainer = prior_trainer(tmp_path, max_steps=1, save_steps=1, **options)
    assert trainer.accelerator.mixed_precision == effective
    trainer.train()
    state = json.loads((tmp_path / "checkpoint-1" / "trainer_state.json").read_text())
    assert state["args"]["mixed_precision"] == effective


def test_samples_are_drawn_with_averaged_weights_and_change_nothing(tmp_path, undisturbed):
    seen = []

    def draw(trainer, step):
        weights = list(trainer.model.parameters())
        assert all(torch.equal(weight, mean) for weight, mean in zip(weights, trainer.ema.shadow_params, strict=True))
        seen.append(step)

    trainer = prior_trainer(tmp_path, on_sample=draw, sample_steps=2)
    trainer.train()
    assert seen == [2, 4, 6]
    assert_same_run(trainer, undisturbed)


def test_a_loss_that_is_not_finite_ends_training(tmp_path):
    items = RandomLatents()
    items.target[:] = torch.nan
    trainer = DiffusionTrainer(tiny_prior(), items, prior_prediction, schedule(), arguments(tmp_path))
    with pytest.raises(FloatingPointError, match="at step 2"):
        trainer.train()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_steps": 0}, "max_steps: expected 1 or more"),
        ({"learning_rate": 0.0}, "learning_rate: expected a positive"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"snr_gamma": -1.0}, "snr_gamma"),
        ({"timestep_sampling": "linear"}, "timestep_sampling"),
        ({"lr_scheduler": "piecewise_constant"}, "lr_scheduler: expected one of 'cosine'"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        DiffusionArguments(**options)


if __name__ == "__main__":
    torch.set_num_threads(1)
    prior_trainer(Path(sys.argv[2]), kind=KilledWhileSaving, save_steps=2).train()
