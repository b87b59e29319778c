"""The average of the weights: its formula, its file, its resume."""

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import Blobs, Processor, arguments, tiny_model
from transformers import TrainerCallback

from solarchip_hf import SolarChipForPreTraining
from solarchip_hf.training import SolarChipTrainer


class Record(TrainerCallback):
    """Every step's weights."""

    def __init__(self, model):
        self.steps = [self.copy(model)]

    def copy(self, model):
        return {name: parameter.detach().double().clone() for name, parameter in model.named_parameters()}

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.append(self.copy(kwargs["model"]))


def trainer_in(folder, model, **options):
    options = {"max_steps": 6, "ema_decay": 0.5, "lr_scheduler_type": "constant", **options}
    return SolarChipTrainer(model, arguments(folder, **options), train_dataset=Blobs(40), processing_class=Processor())


def test_average_is_that_of_the_steps_and_survives_a_resume(tmp_path):
    model = tiny_model()
    trainer = trainer_in(tmp_path / "whole", model, save_strategy="steps", save_steps=3)
    record = Record(model)
    trainer.add_callback(record)
    trainer.train()
    trainer.save_model()
    expected = record.steps[0]
    for step, weights in enumerate(record.steps[1:], 1):
        decay = min(0.5, (1 + step) / (10 + step))
        expected = {name: decay * expected[name] + (1 - decay) * weights[name] for name in expected}
    saved = load_file(tmp_path / "whole" / "ema" / "model.safetensors")
    for name, tensor in expected.items():
        torch.testing.assert_close(saved[name].double(), tensor, rtol=1e-5, atol=1e-7)
    last = load_file(tmp_path / "whole" / "model.safetensors")
    assert not torch.allclose(saved["logit_scales"], last["logit_scales"], rtol=1e-5)
    assert torch.equal(last["logit_scales"], model.logit_scales)
    assert (tmp_path / "whole" / "ema" / "preprocessor_config.json").exists()
    averaged = SolarChipForPreTraining.from_pretrained(tmp_path / "whole" / "ema")
    assert torch.equal(averaged.logit_scales, saved["logit_scales"])

    again = trainer_in(tmp_path / "again", tiny_model(seed=9))
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert again._average.weights.keys() == expected.keys()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in again._average.weights.items())


def test_no_average_without_being_asked(tmp_path):
    trainer = trainer_in(tmp_path, tiny_model(), ema_decay=None, max_steps=1)
    trainer.train()
    trainer.save_model()
    assert not (tmp_path / "ema").exists()
    with pytest.raises(ValueError, match="ema_decay: expected a number between 0 and 1, got 1"):
        arguments(tmp_path, ema_decay=1.0)
