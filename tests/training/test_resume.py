"""Runs killed at a random step and resumed: the weights of the undisturbed run, bit for bit, whatever the data."""

import os
import random
import signal
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from processes import errors, run
from safetensors.torch import load_file
from tiny_run import Blobs, arguments, tiny_model
from torch.utils.data import IterableDataset

from solarchip_hf import SolarChipImageProcessor
from solarchip_hf.data import (
    Observations,
    SyntheticSun,
    load_observations,
    pair_observations,
    prepare_dataset,
    scan_archive,
)
from solarchip_hf.training import SolarChipTrainer
from solarchip_hf.training.checkpoints import last_complete_checkpoint
from solarchip_hf.training.order import StreamOrder

STEPS = 8  # of batches of 8 out of 24: nearly three epochs
ROWS = 24


class KilledTrainer(SolarChipTrainer):
    """Its process is killed (SIGKILL) in a step, behind the backward pass."""

    kill_at = -1

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        if self.state.global_step == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return loss


class Numbers(IterableDataset):
    """A plain iterable with a length and an order by epoch, which transformers and Accelerate handle by themselves."""

    def __init__(self, data):
        self.data, self.epoch = data, 0

    def __len__(self):
        return len(self.data)

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        return (self.data[int(index)] for index in np.random.default_rng((7, self.epoch)).permutation(len(self.data)))


def dataset(kind: str, prepared: Path):
    if kind == "map":
        return Blobs(ROWS)
    if kind == "iterable":
        return Numbers(Blobs(ROWS))
    return load_observations(prepared, streaming=True, seed=5, window=2)


def train(folder, kind, prepared, seed=0, kill_at=-1, resume=None, batch=8, **options):
    trainer = KilledTrainer(
        tiny_model(seed=seed),
        arguments(
            folder,
            max_steps=STEPS,
            per_device_train_batch_size=batch,
            save_strategy="steps",
            save_steps=2,
            save_total_limit=None,
            logging_steps=1,
            **options,
        ),
        train_dataset=dataset(kind, prepared),
    )
    trainer.kill_at = kill_at
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(str(Path(folder) / "last"))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """24 observations in six files, AIA 304 missing in some."""
    archive, out = tmp_path_factory.mktemp("archive"), tmp_path_factory.mktemp("out")
    times = pd.date_range("2014-01-01", periods=ROWS, freq="2D")
    SyntheticSun(seed=0, size=32).write_archive(archive, times, ["hmi", "aia171", "aia304"], progress=False)
    for file in sorted(archive.rglob("AIA*_0304.fits"))[::5]:
        file.unlink()
    pairs = pair_observations(scan_archive(archive, workers=0, progress=False))
    processor = SolarChipImageProcessor(size=32)
    prepare_dataset(pairs, out, processor, rows_per_shard=4, workers=0, progress=False)
    return out


@pytest.mark.parametrize(
    ("kind", "world_size"), [("map", 1), ("map", 2), ("stream", 1), ("stream", 2), ("iterable", 1)]
)
def test_killed_at_a_random_step_and_resumed_is_the_undisturbed_run(tmp_path, prepared, kind, world_size):
    kill_at = random.SystemRandom().randrange(2, STEPS)
    options = {"kind": kind, "prepared": prepared, "batch": 8 // world_size}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run(train, whole, world_size, **options) == [0] * world_size, errors(whole)
    assert run(train, killed, world_size, kill_at=kill_at, **options) == [-signal.SIGKILL] * world_size
    found = last_complete_checkpoint(killed)
    assert found is not None
    assert Path(found).name == f"checkpoint-{kill_at // 2 * 2}"
    assert not (killed / "last").exists()
    assert run(train, killed, world_size, resume=found, seed=9, **options) == [0] * world_size, errors(killed)

    expected, resumed = (load_file(folder / "last" / "model.safetensors") for folder in (whole, killed))
    middle = load_file(Path(found) / "model.safetensors")
    assert not torch.equal(middle["logit_scales"], expected["logit_scales"])
    assert expected.keys() == resumed.keys()
    different = [name for name, tensor in expected.items() if not torch.equal(tensor, resumed[name])]
    assert not different, f"killed in step {kill_at + 1}"


def test_a_resumed_stream_reads_what_is_left_and_no_more(tmp_path, prepared, monkeypatch):
    train(tmp_path, "stream", prepared)
    read = []
    plain = Observations.__getitem__
    monkeypatch.setattr(Observations, "__getitem__", lambda self, index: read.append(index) or plain(self, index))
    train(tmp_path, "stream", prepared, resume=str(tmp_path / "checkpoint-4"))  # epochs of three steps
    stream = dataset("stream", prepared)
    stream.set_epoch(1)
    second = stream.order()
    stream.set_epoch(2)
    assert read == [*second[8:], *stream.order()]  # the loader is one batch ahead
    assert sorted(second) == list(range(ROWS))


def test_a_stream_that_is_dealt_out_already_is_refused(prepared):
    stream = load_observations(prepared, streaming=True, rank=1, world_size=2)
    with pytest.raises(ValueError, match="expected a stream of all rows, got one of rank 1 of 2"):
        StreamOrder(stream)


def test_held_out_observations_of_a_stream_come_in_their_own_order(tmp_path, prepared):
    stream = dataset("stream", prepared)
    trainer = SolarChipTrainer(tiny_model(), arguments(tmp_path), train_dataset=stream, eval_dataset=stream)
    rows = torch.cat([batch["pixel_values"] for batch in trainer.get_eval_dataloader()])
    assert torch.equal(rows, torch.stack([stream.observations[index]["pixel_values"] for index in range(ROWS)]))
