"""The gradient cache within the Trainer: the same run as without, accumulated or not; what it refuses."""

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import Blobs, arguments, tiny_model

from solarchip_hf.training import SolarChipDataCollator, SolarChipTrainer

CHUNK = 3  # divides neither the batch nor an epoch


def double(observations):
    batch = SolarChipDataCollator()(observations)
    return {**batch, "pixel_values": batch["pixel_values"].double()}


def train(folder, **options):
    """Three steps in float64 by SGD, whose weights show a gradient's scale."""
    trainer = SolarChipTrainer(
        tiny_model(weight_sharing="instrument").double(),
        arguments(folder, max_steps=3, logging_steps=1, optim="sgd", learning_rate=0.05, **options),
        data_collator=double,
        train_dataset=Blobs(48),
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_run_with_the_cache_is_the_run_without(tmp_path, accumulation):
    options = {"gradient_accumulation_steps": accumulation}
    whole = train(tmp_path / "whole", **options)
    cached = train(tmp_path / "cached", gradient_cache_chunk=CHUNK, **options)
    start = dict(tiny_model(weight_sharing="instrument").double().named_parameters())
    expected = whole.model.state_dict()
    for name, tensor in cached.model.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-9, msg=name)
    assert sum((tensor - expected[name]).norm() for name, tensor in start.items()) > 1e-2
    lines = [[line for line in run.state.log_history if "cls_loss" in line] for run in (whole, cached)]
    assert len(lines[0]) == len(lines[1]) == 3
    for left, right in zip(*lines, strict=True):
        assert left.keys() == right.keys()
        for name in left:
            assert right[name] == pytest.approx(left[name], rel=1e-4), name  # the log line is float32


def test_bfloat16_autocast_reaches_the_chunks(tmp_path):
    seen = []
    trainer = SolarChipTrainer(
        tiny_model(),
        arguments(tmp_path, max_steps=2, bf16=True, gradient_cache_chunk=CHUNK, logging_steps=1),
        train_dataset=Blobs(16),
    )
    layer = next(module for module in trainer.model.solarchip.modules() if isinstance(module, torch.nn.Linear))
    layer.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    trainer.train()
    assert set(seen) == {torch.bfloat16}
    assert all(parameter.dtype == torch.float32 for parameter in trainer.model.parameters())
    assert all(torch.isfinite(parameter).all() for parameter in trainer.model.parameters())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo's, as it traces
def test_a_compiled_run_is_the_run_uncompiled(tmp_path):
    """Traced by dynamo; the backend leaves the graphs as they are, since compilers take a minute."""
    losses = {}
    for compiled in (False, True):
        options = {"torch_compile": True, "torch_compile_backend": "eager"} if compiled else {}
        args = arguments(tmp_path, max_steps=2, logging_steps=1, **options)
        trainer = SolarChipTrainer(tiny_model(), args, train_dataset=Blobs(16))
        trainer.train()
        losses[compiled] = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert isinstance(trainer.model_wrapped, torch._dynamo.OptimizedModule)
    assert losses[True] == pytest.approx(losses[False], rel=1e-5)
    trainer.save_model()
    assert not [name for name in load_file(tmp_path / "model.safetensors") if "_orig_mod" in name]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gradient_cache_chunk": 0}, "gradient_cache_chunk: expected at least 1"),
        ({"deepspeed": "zero2.json"}, "got DeepSpeed"),
        ({"ddp_find_unused_parameters": False}, "ddp_find_unused_parameters: expected true"),
    ],
)
def test_refuses_what_would_give_another_gradient(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **{"gradient_cache_chunk": 2, **options})


def test_unused_towers_are_looked_for_by_itself(tmp_path):
    assert arguments(tmp_path, gradient_cache_chunk=2).ddp_find_unused_parameters is True
