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
        train_dataset=Blobs(96),
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("accumulation", [1, 4])
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


def test_accumulation_adds_no_negatives_and_a_cached_batch_does(tmp_path):
    """Four micro-steps of 8 are the mean of four gradients, which is not that of 32; 32 in chunks is that of 32."""

    class Spy(SolarChipTrainer):
        def _clip_grad_norm(self, model):
            self.gradient = torch.cat([p.grad.flatten().clone() for p in model.parameters()])
            return super()._clip_grad_norm(model)

    gradients = {}
    options = {"max_steps": 1, "learning_rate": 0.0, "augmentation": "none", "train_sampling_strategy": "sequential"}
    for name, batch, more in (
        ("whole", 32, {}),
        ("cached", 32, {"gradient_cache_chunk": CHUNK}),
        ("accumulated", 8, {"gradient_accumulation_steps": 4}),
        ("accumulated, cached", 8, {"gradient_accumulation_steps": 4, "gradient_cache_chunk": CHUNK}),
    ):
        args = arguments(tmp_path, per_device_train_batch_size=batch, **options, **more)
        trainer = Spy(tiny_model().double(), args, data_collator=double, train_dataset=Blobs(32, missing=False))
        trainer.train()
        gradients[name] = trainer.gradient
    torch.testing.assert_close(gradients["cached"], gradients["whole"], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(gradients["accumulated, cached"], gradients["accumulated"], rtol=1e-6, atol=1e-9)
    assert torch.cosine_similarity(gradients["accumulated"], gradients["whole"], dim=0) < 0.99


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
