"""Errors of reconstructions in gauss and DN, against the processor's own inverse and by hand."""

import json

import numpy as np
import pytest
import torch
from tiny_run import MODALITIES, Blobs, arguments, tiny_model

from solarchip_hf import SolarChipImageProcessor
from solarchip_hf.models.geometry import disk_mask
from solarchip_hf.training import SolarChipTrainer
from solarchip_hf.training.physical_error import PhysicalError

ROWS = {"hmi": (0.0, 1.5, "G"), "aia171": (4.0, 2.0, "DN"), "aia304": (1.7, 1.4, "DN")}


def processor(photometry="nominal", scaling="log1p", geometry="rsun") -> SolarChipImageProcessor:
    rows = {
        name: {"mean": mean, "std": std, "unit": unit if unit == "G" or photometry == "nominal" else "DN/s"}
        for name, (mean, std, unit) in ROWS.items()
    }
    key = {"photometry": photometry, "degradation": None, "geometry": geometry, "size": 32, "scaling": scaling}
    statistics = {**key, "source": "a test", "modalities": rows}
    return SolarChipImageProcessor(modalities=MODALITIES, statistics=statistics, **key)


@pytest.mark.parametrize("scaling", ["log1p", "asinh", "linear"])
@pytest.mark.parametrize("geometry", ["rsun", "none"])
def test_errors_are_those_of_the_processors_inverse(scaling, geometry):
    ours = processor(scaling=scaling, geometry=geometry)
    error = PhysicalError(ours, MODALITIES)
    assert error.known_at(32)
    assert not error.known_at(64)
    generator = torch.Generator().manual_seed(0)
    pixel_values, reconstruction = (torch.randn(4, 3, 32, 32, generator=generator) for _ in range(2))
    observed = torch.ones(4, 3, dtype=torch.bool)
    observed[1, 2] = False
    pixel_values[1, 2] = torch.nan
    errors = error(reconstruction, pixel_values, observed)
    inside = disk_mask(32) if geometry == "rsun" else np.ones((32, 32), dtype=bool)
    for row in range(4):
        for index, name in enumerate(MODALITIES):
            if not observed[row, index]:
                assert errors[row, index].isnan()
                continue
            apart = ours.unscale(reconstruction[row, index], name) - ours.unscale(pixel_values[row, index], name)
            assert errors[row, index].item() == pytest.approx(np.abs(apart)[inside].mean(), rel=1e-4)
    metrics = error.metrics(errors)
    assert list(metrics) == [f"reconstruction_mae_{name}" for name in ("hmi_G", "aia171_DN", "aia304_DN")]
    assert metrics["reconstruction_mae_aia304_DN"] == pytest.approx(errors[[0, 2, 3], 2].mean().item())


def test_off_disk_pixels_do_not_count_and_units_follow_the_photometry():
    error = PhysicalError(processor("dn_per_s"), MODALITIES)
    pixel_values = torch.zeros(1, 3, 32, 32)
    beyond = pixel_values + 5.0 * ~torch.from_numpy(disk_mask(32))
    observed = torch.tensor([[True, True, False]])
    metrics = error.metrics(error(beyond, pixel_values, observed))
    assert metrics == {"reconstruction_mae_hmi_G": 0.0, "reconstruction_mae_aia171_DN_per_s": 0.0}
    shifted = error(pixel_values + 0.5, pixel_values, observed)
    assert shifted[0, 0].item() == pytest.approx(np.expm1(0.75))
    assert shifted[0, 1].item() == pytest.approx(np.exp(5) - np.exp(4), rel=1e-5)


def test_without_statistics_there_are_no_figures():
    assert not PhysicalError(None, MODALITIES).known_at(32)
    assert not PhysicalError(SolarChipImageProcessor(size=32, scaling="asinh"), MODALITIES).known_at(32)


def test_training_brings_the_error_down_and_evaluation_logs_it(tmp_path):
    args = arguments(tmp_path, max_steps=100, learning_rate=5e-3)
    trainer = SolarChipTrainer(
        tiny_model(),
        args,
        train_dataset=Blobs(64),
        eval_dataset=Blobs(21, seed=1),
        processing_class=processor(),
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    for name in ("hmi_G", "aia171_DN", "aia304_DN"):
        key = f"eval_reconstruction_mae_{name}"
        assert 0 < after[key] < 0.8 * before[key], name
        assert trainer.state.log_history[-1][key] == after[key]
    json.dumps(after, allow_nan=False)
