"""Two gloo processes, one without any image of a modality: sharded (FSDP2) and DDP take the steps of one process."""

import json
from pathlib import Path

import pytest
import torch
from processes import errors, run
from safetensors.torch import load_file
from tiny_run import Blobs, arguments, tiny_model
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModel
from transformers.distributed import DistributedConfig

from solarchip_hf import SolarChipForPreTraining
from solarchip_hf.training import SolarChipTrainer
from solarchip_hf.training.checkpoints import why_incomplete

MODEL = {"weight_sharing": "modality"}  # a tower that a process has no image for
RUNS = {
    "one": {"batch": 8},
    "ddp": {"batch": 4},
    "fsdp": {"batch": 4, "sharded": True, "save_strategy": "steps", "save_steps": 2, "save_only_model": True},
    "fsdp, cached": {"batch": 4, "sharded": True, "gradient_cache_chunk": 3},
    "ddp, accumulated": {"batch": 4, "gradient_accumulation_steps": 4},
    "ddp, accumulated, cached": {"batch": 4, "gradient_accumulation_steps": 4, "gradient_cache_chunk": 3},
    "one, accumulated": {"batch": 8, "gradient_accumulation_steps": 4},
}


class Gappy(Blobs):
    """Read in order by two processes in batches of four, the second never sees AIA 304."""

    def __init__(self):
        super().__init__(96, missing=False)
        second = torch.arange(96) // 4 % 2 == 1
        self.observed[second, 2] = False
        self.pixel_values[second, 2] = torch.nan


class Watched(SolarChipTrainer):
    """Keeps the gradient of the first step, whole."""

    gradient: dict | None = None

    def _clip_grad_norm(self, model):
        if self.gradient is None:
            whole = {name: parameter.grad for name, parameter in self.model.named_parameters()}
            self.gradient = {
                name: (grad.full_tensor() if isinstance(grad, DTensor) else grad).clone()
                for name, grad in whole.items()
            }
        return super()._clip_grad_norm(model)


def train(folder: Path, names: list[str], model: str) -> None:
    for name in names:
        train_one(Path(folder) / name, model, **RUNS[name])


def train_one(folder: Path, model: str, batch: int, sharded: bool = False, **options) -> None:
    folder.mkdir(exist_ok=True, parents=True)
    args = arguments(
        folder,
        max_steps=3,
        logging_steps=1,
        per_device_train_batch_size=batch,
        train_sampling_strategy="sequential",
        optim="sgd",
        learning_rate=1e-3,
        **options,
    )
    config = {"distributed_config": DistributedConfig(fsdp_size=2)} if sharded else {}
    network = SolarChipForPreTraining.from_pretrained(model, **config)
    trainer = Watched(network, args, train_dataset=Gappy(), eval_dataset=Blobs(11, seed=1))
    trainer.train()
    if sharded:
        assert all(isinstance(parameter, DTensor) for parameter in network.parameters())
        assert all(parameter.to_local().numel() < parameter.numel() for parameter in network.parameters())
        assert isinstance(trainer.model_wrapped, FSDPModule)
    else:
        assert isinstance(trainer.model_wrapped, DistributedDataParallel) == (args.world_size == 2)
    metrics = trainer.evaluate()
    trainer.save_model(str(folder / "model"))
    if args.process_index == 0:
        torch.save(trainer.gradient, folder / "gradient.pt")
        facts = {"log": trainer.state.log_history, "metrics": metrics}
        (folder / "facts.json").write_text(json.dumps(facts))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    tiny_model(**MODEL).save_pretrained(folder / "start")
    for world_size in (1, 2):
        names = [name for name in RUNS if name.startswith("one") == (world_size == 1)]
        options = {"names": names, "model": str(folder / "start")}
        assert run(train, folder, world_size, **options) == [0] * world_size, errors(folder)
    return folder


def steps(folder: Path) -> list[dict]:
    log = json.loads((folder / "facts.json").read_text())["log"]
    return [line for line in log if "cls_loss" in line]


def assert_same_gradient(ours: Path, expected: Path, accuracy: float) -> None:
    ours, expected = (torch.load(path / "gradient.pt", weights_only=True) for path in (ours, expected))
    assert ours.keys() == expected.keys()
    total = torch.cat([grad.flatten() for grad in expected.values()]).norm()
    assert total > 0.1
    for name, grad in expected.items():
        assert (ours[name] - grad).norm() < accuracy * total, name
    together = [torch.cat([grad.flatten() for grad in part.values()]).double() for part in (ours, expected)]
    assert torch.cosine_similarity(*together, dim=0) > 0.999999


@pytest.mark.parametrize("name", ["ddp", "fsdp", "fsdp, cached"])
def test_steps_are_those_of_one_process(folder, name):
    assert_same_gradient(folder / name, folder / "one", 1e-5)
    lines, expected = steps(folder / name), steps(folder / "one")
    assert len(lines) == len(expected) == 3
    for left, right in zip(lines, expected, strict=True):
        for key in ("loss", "cls_loss", "patch_loss", "intra_loss", "reconstruction_loss", "grad_norm"):
            assert left[key] == pytest.approx(right[key], rel=1e-4), key


@pytest.mark.parametrize("name", ["ddp", "fsdp", "fsdp, cached"])
def test_saved_weights_are_those_of_one_process_and_load(folder, name):
    start, expected, saved = (
        load_file(folder / part / "model.safetensors") for part in ("start", "one/model", f"{name}/model")
    )
    assert saved.keys() == expected.keys()
    weights = [key for key in expected if expected[key].is_floating_point()]
    moved = torch.cat([(expected[key] - start[key]).flatten() for key in weights])
    apart = torch.cat([(saved[key] - expected[key]).flatten() for key in weights])
    assert moved.norm() > 0.1
    assert apart.norm() < 1e-4 * moved.norm()
    model, info = AutoModel.from_pretrained(folder / name / "model", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    loaded = dict(model.named_parameters())
    assert all(torch.equal(tensor, saved[f"solarchip.{key}"]) for key, tensor in loaded.items())


def test_a_sharded_run_leaves_whole_checkpoints_of_weights_alone(folder):
    checkpoint = folder / "fsdp" / "checkpoint-2"
    assert why_incomplete(checkpoint) is None
    assert not (checkpoint / "optimizer.pt").exists()
    weights, end = load_file(checkpoint / "model.safetensors"), load_file(folder / "fsdp/model/model.safetensors")
    assert {name: tensor.shape for name, tensor in weights.items()} == {name: end[name].shape for name in end}
    assert not torch.equal(weights["logit_scales"], end["logit_scales"])


def test_accumulation_averages_micro_steps_with_and_without_the_cache(folder):
    """Four micro-steps: the mean of four gradients, by one process, two, and two with the cache."""
    for name in ("ddp, accumulated", "ddp, accumulated, cached"):
        assert_same_gradient(folder / name, folder / "one, accumulated", 1e-5)
        for left, right in zip(steps(folder / name), steps(folder / "one, accumulated"), strict=True):
            assert left["cls_loss"] == pytest.approx(right["cls_loss"], rel=1e-4)


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_evaluation_sees_all_held_out_observations(folder, name):
    ours, expected = (json.loads((folder / part / "facts.json").read_text())["metrics"] for part in (name, "one"))
    assert ours["eval_reconstruction_loss"] == pytest.approx(expected["eval_reconstruction_loss"], rel=0.05)
    assert ours["eval_retrieval_chance@1"] == pytest.approx(expected["eval_retrieval_chance@1"])
