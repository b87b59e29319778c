"""Two gloo processes: one draw, terms averaged over ranks, the held-out gallery whole, equal weights at the end."""

import json
import os
import signal
import socket
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import Blobs, arguments, tiny_model
from transformers import TrainerCallback

from solarchip_hf.training import SolarChipTrainer
from solarchip_hf.training.checkpoints import why_incomplete

OPTIONS = {"max_steps": 3, "logging_steps": 1, "per_device_eval_batch_size": 4}


class TerminateOneRank(TrainerCallback):
    """Sends SIGTERM to the second process in its second step; the first is not told."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1 and args.process_index == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def run(folder: Path, batch: int, *, callbacks=None, resume=None, **options) -> SolarChipTrainer:
    """Three steps and an evaluation; the log, the draws and the weights go to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    trainer = SolarChipTrainer(
        tiny_model(),
        arguments(folder, per_device_train_batch_size=batch, **OPTIONS, **options),
        train_dataset=Blobs(24),
        eval_dataset=Blobs(11, seed=1),
        callbacks=callbacks,
    )
    draws = []
    augment = trainer.augmentation.draw
    trainer.augmentation.draw = lambda *key: draws.append(repr(augment(*key))) or augment(*key)
    trainer.train(resume_from_checkpoint=resume)
    metrics = trainer.evaluate()
    facts = {"log": trainer.state.log_history, "draws": draws, "metrics": metrics, "rows": trainer.retrieval_table.rows}
    (folder / f"facts_{trainer.args.process_index}.json").write_text(json.dumps(facts))
    trainer.save_model(str(folder / "model"))
    return trainer


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One process with batches of 8, and two with batches of 4."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    run(one, 8)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = Path(__file__).parents[2] / "examples" / "accelerate" / "cpu_ddp.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    command += ["--main_process_port", str(port), __file__, str(two)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-3000:]
    return one, two


def facts(folder: Path, rank: int = 0) -> dict:
    return json.loads((folder / f"facts_{rank}.json").read_text())


def test_ranks_draw_the_same_and_log_the_terms_of_one_process(folders):
    one, two = folders
    assert facts(two)["draws"] == facts(two, 1)["draws"] == facts(one)["draws"]
    assert len(set(facts(one)["draws"])) == 3
    single = [line for line in facts(one)["log"] if "cls_loss" in line]
    double = [line for line in facts(two)["log"] if "cls_loss" in line]
    assert len(single) == len(double) == 3
    for left, right in zip(single, double, strict=True):
        for name in ("loss", "cls_loss", "patch_loss", "intra_loss", "reconstruction_loss", "grad_norm"):
            assert right[name] == pytest.approx(left[name], rel=2e-3), name


def test_weights_after_the_steps_are_those_of_one_process(folders):
    one, two = (load_file(folder / "model" / "model.safetensors") for folder in folders)
    start = tiny_model().state_dict()
    weights = [name for name, tensor in one.items() if tensor.is_floating_point()]
    moved = torch.cat([(one[name] - start[name]).flatten() for name in weights])
    apart = torch.cat([(one[name] - two[name]).flatten() for name in weights])
    assert moved.norm() > 0.1
    assert apart.norm() < 0.02 * moved.norm()


def test_the_gradient_cache_takes_the_same_steps_on_two_processes(folders):
    two, cached = (load_file(folder / "model" / "model.safetensors") for folder in (folders[1], folders[1] / "cached"))
    start = tiny_model().state_dict()
    weights = [name for name, tensor in two.items() if tensor.is_floating_point()]
    moved = torch.cat([(two[name] - start[name]).flatten() for name in weights])
    apart = torch.cat([(two[name] - cached[name]).flatten() for name in weights])
    assert apart.norm() < 1e-2 * moved.norm()
    lines = [
        [line for line in facts(folder)["log"] if "cls_loss" in line] for folder in (folders[1] / "cached", folders[1])
    ]
    assert len(lines[0]) == len(lines[1]) == 3
    for left, right in zip(*lines, strict=True):
        for name in ("loss", "cls_loss", "patch_loss", "intra_loss", "reconstruction_loss", "grad_norm"):
            assert left[name] == pytest.approx(right[name], rel=1e-3), name


def test_a_signal_to_one_process_stops_both_and_the_resumed_run_is_the_undisturbed_one(folders):
    stopped = folders[1] / "stopped"
    assert [path.name for path in stopped.glob("checkpoint-*")] == ["checkpoint-2"]
    assert why_incomplete(stopped / "checkpoint-2") is None
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= {path.name for path in (stopped / "checkpoint-2").iterdir()}
    for rank in (0, 1):
        assert [line["step"] for line in facts(stopped, rank)["log"] if "cls_loss" in line] == [1, 2]
    whole = load_file(folders[1] / "model" / "model.safetensors")
    resumed = load_file(folders[1] / "resumed" / "model" / "model.safetensors")
    middle = load_file(stopped / "checkpoint-2" / "model.safetensors")
    assert not torch.equal(middle["logit_scales"], whole["logit_scales"])
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


def test_at_the_end_the_wrapper_goes_before_its_group(folders):
    for rank in (0, 1):
        ending = json.loads((folders[1] / "resumed" / f"ending_{rank}.json").read_text())
        assert ending == {"wrapper": "DistributedDataParallel", "wrapper lives": False, "group lives": False}


def test_gallery_is_whole_and_in_order(folders):
    one, two = folders
    for left, right in zip(facts(one)["rows"], facts(two)["rows"], strict=True):
        assert left["gallery"] == right["gallery"] == (11 if left["pair"] == "hmi / aia171" else 8)
        assert right["recall@1"] == pytest.approx(left["recall@1"], abs=0.15)


if __name__ == "__main__":
    run(Path(sys.argv[1]), 4)
    run(Path(sys.argv[1]) / "cached", 4, gradient_cache_chunk=3)
    stopped = Path(sys.argv[1]) / "stopped"
    run(stopped, 4, callbacks=[TerminateOneRank()])
    resumed = Path(sys.argv[1]) / "resumed"
    trainer = run(resumed, 4, resume=str(stopped / "checkpoint-2"))
    wrapped = weakref.ref(trainer.model_wrapped)
    kind = type(wrapped()).__name__
    trainer.end()
    ending = {"wrapper": kind, "wrapper lives": wrapped() is not None}
    ending["group lives"] = torch.distributed.is_initialized()
    (resumed / f"ending_{trainer.args.process_index}.json").write_text(json.dumps(ending))
