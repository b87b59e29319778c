"""Two gloo processes encode a dataset and train a prior: the same bytes as one process writes, and no error waits."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from process_scenes import play
from tiny_latents import MODALITIES, draw_dataset, tiny_autoencoder

from solarchip_hf import SolarChipImageProcessor
from solarchip_hf.data import load_observations
from solarchip_hf.translation.latents import encode_dataset
from solarchip_hf.translation.shared_work import share_tasks
from solarchip_hf.translation.training_runs import load_prior

SETTINGS = {"shard_rows": 3, "batch_size": 2, "progress": False}


def begin_group(rank: int) -> None:
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)


def encode(folder: Path, where: str) -> int:
    """Encodes; returns how often the encoder ran."""
    model, calls = tiny_autoencoder(), []
    model.solarchip.register_forward_hook(lambda *_: calls.append(1))
    encode_dataset(model, load_observations(folder / "prepared"), folder / where, **SETTINGS)
    return len(calls)


def encoded(folder: Path, rank: int) -> None:
    begin_group(rank)
    (folder / f"calls_{rank}.json").write_text(json.dumps([encode(folder, "two"), encode(folder, "cut")]))


def failed(folder: Path, rank: int) -> None:
    begin_group(rank)
    assert share_tasks("abc", lambda task: f"{task}{rank}") == ["a0", "b1", "c0"]
    assert share_tasks([None], lambda _: rank) == [0]
    said = []
    with pytest.raises(KeyError) as both:
        share_tasks(range(4), lambda task: {}[task])
    said.append(str(both.value))

    def fail(task: int) -> None:
        if task == 3:
            raise FileNotFoundError("the third is not there")

    for tasks in (range(4), [3]):
        with pytest.raises(ValueError if (rank == 0) == (len(tasks) > 1) else FileNotFoundError) as caught:
            share_tasks(tasks, fail)
        said.append(str(caught.value))
    (folder / f"said_{rank}.json").write_text(json.dumps(said))


def trained(folder: Path, rank: int) -> None:
    script = Path(__file__).parents[2] / "examples" / "train_prior.py"
    spec = importlib.util.spec_from_file_location("prior_example", script)
    example = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = example
    spec.loader.exec_module(example)
    places = {"autoencoder": "autoencoder", "data_dir": "prepared", "latents_dir": "latents", "output_dir": "prior"}
    words = [word for name, place in places.items() for word in (f"--{name}", str(folder / place))]
    words += ["--modalities", "hmi", "171", "--base_width", "16", "--multipliers", "1", "2", "--num_heads", "2"]
    words += ["--max_steps", "2", "--batch_size", "3", "--warmup_steps", "1", "--save_steps", "2"]
    assert example.main([*words, "--use_cpu", "--disable_tqdm"]) == 0


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared")
    draw_dataset(folder)
    tiny_autoencoder().save_pretrained(folder / "autoencoder")
    SolarChipImageProcessor(modalities=MODALITIES, size=32).save_pretrained(folder / "autoencoder")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the two have: sums over threads round differently
    encode(folder, "one")
    encode(folder, "cut")
    torch.set_num_threads(threads)
    for name in ("manifest.json", "latents-00001.safetensors", "latents-00004.safetensors"):
        (folder / "cut" / name).unlink()
    play([encoded, failed, trained], folder)
    return folder


def test_one_process_and_two_write_the_same_bytes(world):
    one = {path.name: path.read_bytes() for path in (world / "one").iterdir()}
    assert len([name for name in one if name.endswith(".safetensors")]) == 5
    for other in ("two", "cut"):
        assert {path.name: path.read_bytes() for path in (world / other).iterdir()} == one
    calls = [json.loads((world / f"calls_{rank}.json").read_text()) for rank in range(2)]
    assert calls == [[5, 2], [4, 1]]  # two batches a shard of three rows, one for the last two rows


def test_an_error_of_one_process_is_raised_in_both(world):
    first, second = (json.loads((world / f"said_{rank}.json").read_text()) for rank in range(2))
    assert (first[0], second[0]) == ("0", "1")  # both failed: each raises its own
    assert first[1:] == ["process 1: the third is not there", "the third is not there"]
    assert second[1:] == ["the third is not there", "process 0: the third is not there"]


def test_a_prior_trained_by_two_processes(world):
    prior = load_prior(world / "prior")
    assert prior.modalities == ["hmi", "aia171"]
    state = json.loads((world / "prior" / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["args"]["processes"] == 2
    assert (world / "prior" / "samples" / "step-000002.png").is_file()
