"""Two gloo processes: gradients are means over both, runs stay equal and resume bit for bit, a signal stops both."""

import json
import os
import signal
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from process_scenes import play
from safetensors.torch import load_file, save_file
from tiny_latents import RandomLatents, arguments, schedule, tiny_controlnet, tiny_prior
from torch.nn.parallel import DistributedDataParallel

from solarchip_hf.training.checkpoints import why_incomplete
from solarchip_hf.translation.diffusion_objective import ControlNetPrediction, prior_prediction
from solarchip_hf.translation.diffusion_training import DiffusionTrainer, ShuffledBatches

STEPS = {"max_steps": 5, "logging_steps": 4}  # a checkpoint behind step 2 or 3 has losses that are not logged yet


class Recorder(DiffusionTrainer):
    """Keeps the gradients of its first step, before they are clipped, and its own losses."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gradients, self.losses = {}, []
        self.optimizer.optimizer.register_step_pre_hook(lambda *_: self._record())

    def _record(self):
        if not self.gradients:
            named = dict(self.model.named_parameters())
            self.gradients = {name: parameter.grad.clone() for name, parameter in named.items()}

    def _step(self, batches):
        loss, norm = super()._step(batches)
        self.losses.append(float(loss))
        return loss, norm


class ToldInStepTwo(Recorder):
    """The second process gets a SIGTERM; the first is not told."""

    def _step(self, batches):
        if self.step == 1 and self.accelerator.process_index == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return super()._step(batches)


def prior_trainer(folder: Path, *, seed: int = 0, kind=Recorder, **options) -> Recorder:
    args = arguments(folder, max_grad_norm=1e9, **options)
    return kind(tiny_prior(seed), RandomLatents(), prior_prediction, schedule(), args)


def controlnet_trainer(folder: Path, **options) -> Recorder:
    prior = tiny_prior()
    predict = ControlNetPrediction(prior, class_label=1, hint_dropout=0.3)
    args = arguments(folder, max_grad_norm=1e9, **options)
    return Recorder(tiny_controlnet(prior), RandomLatents(), predict, schedule("v_prediction"), args)


KINDS = {"prior": prior_trainer, "controlnet": controlnet_trainer}


def note(trainer: Recorder, folder: Path, rank: int) -> None:
    """What a process has in the end, into its own folder."""
    place = folder / f"rank-{rank}"
    place.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in trainer.model.state_dict().items()}, place / "weights")
    names = [name for name, _ in trainer.model.named_parameters()]
    save_file(dict(zip(names, trainer.ema.shadow_params, strict=True)), place / "averages")
    save_file({name: value.contiguous() for name, value in trainer.gradients.items()}, place / "gradients")
    facts = {"step": trainer.step, "stopped": trainer.stopped, "log": trainer.log_history, "losses": trainer.losses}
    (place / "facts.json").write_text(json.dumps(facts))


def first_prior_step(folder: Path, rank: int) -> None:
    trainer = prior_trainer(folder / "prior", max_steps=1, gradient_accumulation_steps=2)
    trainer.train()
    note(trainer, folder / "prior", rank)


def first_controlnet_step(folder: Path, rank: int) -> None:
    trainer = controlnet_trainer(folder / "controlnet", max_steps=1, gradient_accumulation_steps=2)
    trainer.train()
    note(trainer, folder / "controlnet", rank)


def undisturbed(folder: Path, rank: int) -> None:
    trainer = prior_trainer(folder / "whole", **STEPS)
    wrapped = weakref.ref(trainer.wrapped)
    assert isinstance(wrapped(), DistributedDataParallel)
    trainer.train()
    assert not torch.distributed.is_initialized()
    note(trainer, folder / "whole", rank)
    (folder / "whole" / f"outlived_{rank}").write_text(str(wrapped() is not None))


def told(folder: Path, rank: int) -> None:
    trainer = prior_trainer(folder / "told", kind=ToldInStepTwo, **STEPS)
    trainer.train()
    note(trainer, folder / "told", rank)


def resumed(folder: Path, rank: int) -> None:
    trainer = prior_trainer(folder / "told", seed=9 + rank, resume_from_checkpoint="last", **STEPS)
    assert trainer.step == 2
    trainer.train()
    note(trainer, folder / "resumed", rank)


def other_beginnings(folder: Path, rank: int) -> None:
    """Networks that differ between the processes before DDP makes them one."""
    trainer = prior_trainer(folder / "other", seed=rank, max_steps=2)
    trainer.train()
    note(trainer, folder / "other", rank)


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    folder = tmp_path_factory.mktemp("played")
    play([first_prior_step, first_controlnet_step, undisturbed, told, resumed, other_beginnings], folder)
    return folder


def facts(folder: Path, rank: int = 0) -> dict:
    return json.loads((folder / f"rank-{rank}" / "facts.json").read_text())


def tensors(folder: Path, what: str, rank: int = 0) -> dict[str, torch.Tensor]:
    return load_file(folder / f"rank-{rank}" / what)


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_the_mean_over_what_each_process_alone_would_have(kind, played, tmp_path):
    """Process r of two reads batch 2 m + r in micro-step m and draws by (seed, step, m, r)."""
    AcceleratorState._reset_state(reset_partial_state=True)
    alone = KINDS[kind](tmp_path)
    expected = {name: torch.zeros_like(parameter) for name, parameter in alone.model.named_parameters()}
    losses = []
    for rank in range(2):
        batches = list(ShuffledBatches(24, 5, seed=3, first=0, last=2, rank=rank, world=2))
        losses.append([])
        for micro_step, indices in enumerate(batches):
            alone.model.zero_grad()
            state = np.random.SeedSequence((3, 0, micro_step, rank)).generate_state(1, np.uint64)[0]
            loss = alone._loss(alone.batch(indices), torch.Generator().manual_seed(int(state >> 1)))
            loss.backward()
            losses[rank].append(float(loss.detach()))
            for name, parameter in alone.model.named_parameters():
                expected[name] += parameter.grad / 4
    assert losses[0] != losses[1]
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    assert scale > 1e-3
    for rank in range(2):
        found = tensors(played / kind, "gradients", rank)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6 * scale)
    assert_equal(tensors(played / kind, "gradients"), tensors(played / kind, "gradients", 1))
    own = [facts(played / kind, rank)["losses"][0] for rank in range(2)]
    assert own == pytest.approx([sum(row) / 2 for row in losses], rel=1e-5)


@pytest.mark.parametrize("run", ["whole", "resumed", "other"])
def test_weights_averages_and_log_are_the_same_in_both_processes(run, played):
    for what in ("weights", "averages"):
        assert_equal(tensors(played / run, what), tensors(played / run, what, 1))
    assert facts(played / run)["log"] == facts(played / run, 1)["log"]
    assert facts(played / run)["losses"] != facts(played / run, 1)["losses"]  # of different data
    start = tiny_prior().state_dict()
    assert not torch.equal(tensors(played / run, "weights")["conv_in.weight"], start["conv_in.weight"])
    assert not torch.equal(tensors(played / run, "averages")["conv_in.weight"], start["conv_in.weight"])


def test_the_wrapper_does_not_outlive_its_process_group(played):
    """It would join its threads under the GIL, for which one of them may be waiting."""
    assert [(played / "whole" / f"outlived_{rank}").read_text() for rank in range(2)] == ["False", "False"]


def test_the_logged_loss_is_the_mean_over_both_processes(played):
    own = np.array([facts(played / "whole", rank)["losses"] for rank in range(2)])
    logged = [row["loss"] for row in facts(played / "whole")["log"]]
    assert logged == pytest.approx([own[:, :4].mean(), own[:, 4].mean()], rel=1e-6)


def test_a_signal_to_one_process_stops_both_with_a_checkpoint(played):
    for rank in range(2):
        assert facts(played / "told", rank)["stopped"]
        assert facts(played / "told", rank)["step"] == 2
    checkpoint = played / "told" / "checkpoint-2"
    assert why_incomplete(checkpoint) is None
    assert_equal(load_file(checkpoint / "model.safetensors"), tensors(played / "told", "weights", 1))


def test_two_processes_resume_bit_for_bit(played):
    for rank in range(2):
        for what in ("weights", "averages"):
            assert_equal(tensors(played / "resumed", what, rank), tensors(played / "whole", what, rank))
        assert facts(played / "resumed", rank)["log"] == facts(played / "whole", rank)["log"]
        assert facts(played / "resumed", rank)["losses"] == facts(played / "whole", rank)["losses"][2:]


def test_a_run_of_two_processes_may_go_on_in_one(played, caplog):
    AcceleratorState._reset_state(reset_partial_state=True)
    alone = prior_trainer(played / "told", resume_from_checkpoint=str(played / "told" / "checkpoint-2"), **STEPS)
    assert "processes 2 -> 1" in caplog.text
    own = [facts(played / "told", rank)["losses"] for rank in range(2)]
    assert [float(loss) for loss in alone._pending] == pytest.approx(np.mean(own, axis=0).tolist(), rel=1e-6)
