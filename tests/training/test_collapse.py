"""Figures of embeddings against their definitions, and the warning of a collapsed run."""

import math
import re

import pytest
import torch
from tiny_run import Blobs, arguments, tiny_model

from solarchip_hf.training import SolarChipTrainer
from solarchip_hf.training.collapse import embedding_statistics


def test_statistics_of_known_embeddings():
    axes = torch.eye(8)[:, None].repeat(1, 2, 1)  # eight orthogonal observations, alike in two modalities
    observed = torch.ones(8, 2, dtype=torch.bool)
    values = embedding_statistics(3 * axes, axes, observed, [(0, 1)])
    assert values["class_alignment"] == pytest.approx(0.0)
    assert values["class_uniformity"] == pytest.approx(-4.0)  # squared distance 2
    assert values["class_effective_rank"] == pytest.approx(7.0, rel=1e-3)  # one dimension goes with the mean
    assert values["class_deviation"] == pytest.approx(math.sqrt(1 - 1 / 8))
    alike = torch.ones(8, 2, 8)
    values = embedding_statistics(alike, alike, observed, [(0, 1)])
    assert values["class_deviation"] == pytest.approx(0.0, abs=1e-12)
    assert values["class_uniformity"] == pytest.approx(0.0)


def test_missing_observations_are_left_out():
    embeds = torch.randn(6, 2, 4, generator=torch.Generator().manual_seed(0))
    observed = torch.ones(6, 2, dtype=torch.bool)
    observed[4:, 1] = False
    spoilt = embeds.clone()
    spoilt[4:, 1] = float("nan")
    assert embedding_statistics(spoilt, spoilt, observed, [(0, 1)]) == embedding_statistics(
        embeds, embeds, observed, [(0, 1)]
    )
    assert embedding_statistics(embeds, embeds, torch.zeros(6, 2, dtype=torch.bool), [(0, 1)]) == {}


def run(folder, model, caplog, **options):
    options = {"eval_strategy": "steps", "eval_steps": 1, "collapse_patience": 3, "max_steps": 5, **options}
    trainer = SolarChipTrainer(
        model, arguments(folder, **options), train_dataset=Blobs(40), eval_dataset=Blobs(32, seed=1, missing=False)
    )
    trainer.evaluate()
    caplog.clear()
    trainer.train()
    return trainer, [record.message for record in caplog.records if "collapsed" in record.message]


def test_a_collapsed_model_is_reported_once_and_a_sound_one_is_not(tmp_path, caplog):
    model = tiny_model(projection_centering="none")
    for tower in model.solarchip.towers.values():  # class tokens that no image reaches
        for name, parameter in tower.named_parameters():
            if "projection" in name:
                parameter.requires_grad_(False).zero_()
                if name.endswith("bias"):
                    parameter.fill_(1.0)
    trainer, said = run(tmp_path / "collapsed", model, caplog, learning_rate=0.0)
    assert any("Class tokens all alike" in line and "until step 3" in line for line in said), said
    assert len(said) == len({line[:20] for line in said})
    trainer, said = run(tmp_path / "sound", tiny_model(), caplog, max_steps=40, eval_steps=8, learning_rate=5e-3)
    metrics = next(line for line in reversed(trainer.state.log_history) if "eval_class_deviation" in line)
    assert metrics["eval_class_effective_rank"] > 1.5
    assert not [line for line in said if line.startswith("Class tokens")]


class Strangers(Blobs):
    """Held-out observations whose modalities show different Suns: no embedding can retrieve among them."""

    def __init__(self, count):
        super().__init__(count, seed=1, missing=False)
        self.pixel_values[:, 1] = self.pixel_values[:, 1].roll(5, 0)
        self.pixel_values[:, 2] = self.pixel_values[:, 2].roll(11, 0)


@pytest.mark.parametrize("trained", [True, False])
def test_retrieval_at_chance_is_reported_once_a_term(tmp_path, caplog, trained):
    """Embeddings that tell observations apart, but not which belong together; a term without weight says nothing."""
    weights = {} if trained else {"cls_loss_weight": 0.0, "patch_loss_weight": 0.0}
    options = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 5, "learning_rate": 0.0}
    trainer = SolarChipTrainer(
        tiny_model(**weights), arguments(tmp_path, **options), train_dataset=Blobs(48), eval_dataset=Strangers(128)
    )
    trainer.train()
    metrics = next(line for line in reversed(trainer.state.log_history) if "eval_class_deviation" in line)
    assert metrics["eval_class_deviation"] > 0.01
    said = [record.message for record in caplog.records if "may have collapsed" in record.message]
    if not trained:
        assert not said
        return
    assert sorted(line.partition(" (")[0] for line in said) == [
        "Class retrieval at chance",
        "Patch retrieval at chance",
    ]
    assert all(re.search(r"over 3 evaluations, until step [34]", line) and "chance 0.008" in line for line in said)
