"""The average of the weights: its formula, its file, its resume, its centring."""

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import Blobs, Processor, arguments, tiny_model
from transformers import TrainerCallback, TrainerState

from solarchip_hf import SolarChipForPreTraining
from solarchip_hf.training import SolarChipTrainer
from solarchip_hf.training.weight_average import WeightAverage


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
    averages = {**again._average.weights, **again._average.statistics}
    assert len(averages) > len(expected)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in averages.items())


def test_no_average_without_being_asked(tmp_path):
    trainer = trainer_in(tmp_path, tiny_model(), ema_decay=None, max_steps=1)
    trainer.train()
    trainer.save_model()
    assert not (tmp_path / "ema").exists()
    with pytest.raises(ValueError, match="ema_decay: expected a number between 0 and 1, got 1"):
        arguments(tmp_path, ema_decay=1.0)


def true_means(model, data):
    """(M, 1+L, projection) of the projections over the observations, as the statistics are meant to be."""
    with torch.no_grad():
        projections = model.eval()(data.pixel_values, data.observed, return_loss=False).projections
    return torch.stack([projections[data.observed[:, index], index].mean(0) for index in range(3)])


def test_averaged_weights_come_with_centring_of_their_own(tmp_path):
    """While the network moves fast, its statistics are wrong for the average, and the average of them is right."""
    model, data = tiny_model(), Blobs(40)
    options = {"ema_decay": 0.9, "max_steps": 40, "learning_rate": 5e-3, "augmentation": "none"}
    trainer = trainer_in(tmp_path / "run", model, **options)
    trainer.train()
    trainer.save_model()
    averaged = SolarChipForPreTraining.from_pretrained(tmp_path / "run" / "ema")
    true = true_means(averaged, data)
    error = {}
    for name, network in {"own": averaged, "live": model}.items():
        means = torch.stack([network.solarchip.centering[modality].mean for modality in network.config.modalities])
        error[name] = (means - true).norm() / true.norm()
    assert error["own"] < 0.5 * error["live"], error
    counts = [network.solarchip.centering["hmi"].num_updates.item() for network in (averaged, model)]
    assert counts == [40, 40]


@pytest.mark.parametrize("momentum", [0.01, 0.3])
def test_statistics_of_the_average_are_those_of_the_batches(momentum):
    """Several updates a step, as with accumulation; a modality that comes late, and one that never comes."""
    model = tiny_model(centering_momentum=momentum)
    average = WeightAverage(0.9)
    average.on_train_begin(None, TrainerState(), None, model=model)
    always, late = (model.solarchip.centering[name] for name in ("hmi", "aia171"))
    generator = torch.Generator().manual_seed(0)
    expected = {}
    for step in range(1, 12):
        decay = min(0.9, (1 + step) / (10 + step))
        for name, centering in {"hmi": always, "aia171": late}.items():
            if centering is late and step < 6:
                continue
            running, weight = torch.zeros_like(centering.mean), 0.0
            for _ in range(2):
                share = max(1 / (centering.num_updates.item() + 1), momentum)
                mean = torch.randn(centering.mean.shape, generator=generator)
                centering.update(mean, mean.exp(), torch.tensor(4), momentum)
                running, weight = running * (1 - share) + mean * share, weight * (1 - share) + share
            batch = running / weight
            expected[name] = decay * expected[name] + (1 - decay) * batch if name in expected else batch
        average.on_step_end(None, TrainerState(global_step=step), None, model=model)
    for name, mean in expected.items():
        torch.testing.assert_close(average.statistics[f"solarchip.centering.{name}.mean"], mean, rtol=1e-4, atol=1e-4)
    assert not average.statistics["solarchip.centering.aia304.mean"].any()
    assert (average.statistics["solarchip.centering.aia304.std"] == 1).all()
