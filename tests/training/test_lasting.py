"""Runs that are killed: nothing half-written is resumed from, and nothing of the run is lost."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import Blobs, arguments, tiny_model
from transformers import TrainerCallback

from solarchip_hf.training import SolarChipTrainer
from solarchip_hf.training.checkpoints import INCOMPLETE, MANIFEST, last_complete_checkpoint, why_incomplete

OPTIONS = {"max_steps": 6, "per_device_train_batch_size": 8, "lr_scheduler_type": "constant", "logging_steps": 1}


def trainer_in(folder, *, seed=0, kind=SolarChipTrainer, **options) -> SolarChipTrainer:
    return kind(tiny_model(seed=seed), arguments(folder, **{**OPTIONS, **options}), train_dataset=Blobs(40))


class KilledWhileSaving(SolarChipTrainer):
    """Its process is killed (SIGKILL) at step 4, with the weights written and the optimizer's state not."""

    def _save_optimizer_and_scheduler(self, output_dir):
        if self.state.global_step == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        super()._save_optimizer_and_scheduler(output_dir)


class Announce(TrainerCallback):
    """Says on standard output that a step begins, and waits for a word on standard input."""

    def on_step_begin(self, args, state, control, **kwargs):
        print(f"step {state.global_step}", flush=True)
        sys.stdin.readline()


def command(mode: str, folder: Path) -> list[str]:
    return [sys.executable, __file__, mode, str(folder)]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As in the processes that are killed: sums over threads round differently for different numbers of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    trainer = trainer_in(tmp_path_factory.mktemp("whole"), save_strategy="steps", save_steps=2, save_total_limit=None)
    trainer.train()
    return trainer


def assert_resumed_run_is_the_undisturbed_one(checkpoint, folder, undisturbed):
    again = trainer_in(folder, seed=9)
    again.train(resume_from_checkpoint=checkpoint)
    expected, resumed = undisturbed.model.state_dict(), again.model.state_dict()
    start = load_file(Path(checkpoint) / "model.safetensors")
    assert not torch.equal(start["logit_scales"], expected["logit_scales"])
    assert set(expected) == set(resumed)
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in expected.items())


def test_killed_while_saving(tmp_path, undisturbed):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command("kill", tmp_path), env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == -signal.SIGKILL, result.stderr[-3000:]
    assert (tmp_path / INCOMPLETE / "checkpoint-4" / "model.safetensors").exists()
    assert not (tmp_path / "checkpoint-4").exists()
    found = last_complete_checkpoint(tmp_path)
    assert found == str(tmp_path / "checkpoint-2")
    assert_resumed_run_is_the_undisturbed_one(found, tmp_path, undisturbed)


def test_terminated_in_a_step(tmp_path, undisturbed):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command("term", tmp_path), env=environment, text=True, bufsize=1, **pipes) as process:
        for line in process.stdout:
            if line == "step 2\n":
                process.send_signal(signal.SIGTERM)
            if line.startswith("step"):
                process.stdin.write("go\n")
                process.stdin.flush()
            last = line
        errors = process.stderr.read()
    assert process.returncode == 0, errors[-3000:]
    assert "SIGTERM: saving step 3 and stopping" in errors
    assert last == "stopped: True\n"
    found = last_complete_checkpoint(tmp_path)
    assert found == str(tmp_path / "checkpoint-3")  # the run was told to save nothing
    assert_resumed_run_is_the_undisturbed_one(found, tmp_path, undisturbed)


def test_the_signal_is_given_back_however_training_ends(tmp_path):
    class Broken(SolarChipTrainer):
        def compute_loss(self, *args, **kwargs):
            assert signal.getsignal(signal.SIGTERM) is not before
            raise RuntimeError("broken")

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RuntimeError, match="broken"):
        trainer_in(tmp_path, kind=Broken).train()
    assert signal.getsignal(signal.SIGTERM) is before


class ToldInAWorker(Blobs):
    """Its loading process gets the signal at every item, as from a launcher that signals a whole group."""

    def __getitem__(self, index):
        os.kill(os.getpid(), signal.SIGTERM)
        return super().__getitem__(index)


def test_loading_processes_leave_the_signal_to_training(tmp_path):
    options = arguments(tmp_path, max_steps=2, dataloader_num_workers=1)
    trainer = SolarChipTrainer(tiny_model(), options, train_dataset=ToldInAWorker(16))
    trainer.train()
    assert trainer.state.global_step == 2
    assert not trainer.stopped_by_signal


def test_a_half_written_checkpoint_is_never_chosen(tmp_path, undisturbed, caplog):
    source = Path(undisturbed.args.output_dir)
    assert [path.name for path in sorted(source.glob("checkpoint-*"))] == [
        "checkpoint-2",
        "checkpoint-4",
        "checkpoint-6",
    ]
    for name in ("checkpoint-2", "checkpoint-4", "checkpoint-6"):
        (tmp_path / name).mkdir()
        for file in (source / name).iterdir():
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
    planted = tmp_path / "checkpoint-8"  # as another program that died would leave it
    planted.mkdir()
    (planted / "model.safetensors").write_bytes((source / "checkpoint-6" / "model.safetensors").read_bytes())
    (tmp_path / "checkpoint-best").mkdir()
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-6")
    assert "checkpoint-8 is passed over: it has no" in caplog.text

    weights = tmp_path / "checkpoint-6" / "optimizer.pt"
    os.truncate(weights, weights.stat().st_size - 1)
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    (tmp_path / "checkpoint-4" / "rng_state.pth").unlink()
    assert why_incomplete(tmp_path / "checkpoint-4") == "its rng_state.pth is missing"
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    (tmp_path / "checkpoint-2" / MANIFEST).write_text("{")
    assert last_complete_checkpoint(tmp_path) is None

    trainer = trainer_in(tmp_path)
    with pytest.raises(ValueError, match=r"optimizer.pt has \d+ bytes instead of"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    with pytest.raises(ValueError, match="expected a complete checkpoint in"):
        trainer.train(resume_from_checkpoint=True)


def test_old_checkpoints_go_only_after_the_new_one_is_whole(tmp_path):
    seen = []

    class Watched(SolarChipTrainer):
        def _save_rng_state(self, output_dir):
            seen.append(last_complete_checkpoint(tmp_path))
            super()._save_rng_state(output_dir)

    trainer = trainer_in(tmp_path, kind=Watched, save_strategy="steps", save_steps=2, save_total_limit=1)
    trainer.train()
    assert seen == [None, str(tmp_path / "checkpoint-2"), str(tmp_path / "checkpoint-4")]
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-6"]
    assert not (tmp_path / INCOMPLETE).exists()


def test_the_best_checkpoint_is_named_by_its_place(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    args = arguments(tmp_path, **{**OPTIONS, **options, "load_best_model_at_end": True, "save_total_limit": 1})
    trainer = SolarChipTrainer(tiny_model(), args, train_dataset=Blobs(40), eval_dataset=Blobs(8, seed=1))
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert Path(best) == tmp_path / f"checkpoint-{trainer.state.best_global_step}"
    assert why_incomplete(best) is None
    state = json.loads((Path(best) / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == best


def test_a_checkpoint_cannot_run_code(undisturbed, tmp_path):
    """Every pickle of a checkpoint is read by the restricted reader, and one with code in it is refused."""
    source = Path(undisturbed.args.output_dir) / "checkpoint-4"
    names = {path.name for path in source.iterdir()}
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth"} <= names
    assert "training_args.bin" not in names
    target = tmp_path / "checkpoint-4"
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    (target / MANIFEST).unlink()
    for name in ("optimizer.pt", "rng_state.pth", "scheduler.pt"):
        torch.save({"state": Exploit(tmp_path / "executed")}, target / name)
        with pytest.raises(Exception, match="Weights only load failed"):
            trainer_in(tmp_path).train(resume_from_checkpoint=str(target))
        (target / name).write_bytes((source / name).read_bytes())
    assert not (tmp_path / "executed").exists()


class Exploit:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_temperatures_stay_within_bounds_and_do_not_decay(tmp_path):
    trainer = trainer_in(tmp_path, max_steps=1)
    with torch.no_grad():
        trainer.model.logit_scales.copy_(torch.tensor([4.7, 2.0, 5.0]))
    trainer.train()
    scales = trainer.model.logit_scales.detach()
    assert scales.max() == pytest.approx(4.60517)
    assert scales[1] == pytest.approx(2.0, abs=0.01)
    decayed = {id(p) for group in trainer.optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    names = {name for name, parameter in trainer.model.named_parameters() if id(parameter) in decayed}
    assert any(name.endswith("patch_embedding.weight") for name in names)
    for part in ("logit_scales", "modality_embedding", "class_embedding", "position_embedding", "norm", "bias"):
        assert not [name for name in names if part in name], part


if __name__ == "__main__":
    if sys.argv[1] == "kill":
        trainer_in(sys.argv[2], kind=KilledWhileSaving, save_strategy="steps", save_steps=2).train()
    else:
        run = trainer_in(sys.argv[2])
        run.add_callback(Announce())
        run.train()
        print(f"stopped: {run.stopped_by_signal}", flush=True)
