"""The task `solar-flare-forecasting`: real and synthetic files in, forecasts with a reason out, or a sentence."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import pipeline

from solarchip_hf import (
    SolarChipConfig,
    SolarChipForImageClassification,
    SolarChipForPreTraining,
    SolarChipImageProcessor,
    SolarImageError,
    SyntheticSun,
    read_image,
)
from solarchip_hf.hub.flare_figures import forecast_figure

MAGNETOGRAM = "2022_08_02__10_47_53_000__SDO_HMI_HMI_magnetogram.jp2"
CALIBRATION = {
    "method": "platt",
    "slope": [1.0, 2.0, 1.0],
    "intercept": [0.5, -1.0, -2.0],
    "fitted_on": "nothing",
    "thresholds": {"c_plus": 0.5, "m_plus": 0.999},
}
TOWER = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}


def save_model(folder: Path, modalities: list[str], **fields) -> Path:
    torch.manual_seed(0)
    config = SolarChipConfig.from_name(
        "vit-tiny", modalities=modalities, projection_dim=16, classifier_hidden_size=16, **TOWER, **fields
    )
    model = SolarChipForImageClassification(config)
    with torch.no_grad():  # as after some training: attention that is not flat, an open gate, a head that matters
        for name, parameter in model.classifier.named_parameters():
            if "score" in name or "gate" in name or "output" in name:
                parameter.copy_(0.5 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    SolarChipImageProcessor(modalities=modalities, size=32).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def hmi_model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("hmi"), ["hmi"], calibration=CALIBRATION)


@pytest.fixture(scope="module")
def both_model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("both"), ["hmi", "aia171"])


@pytest.fixture(scope="module")
def hmi(hmi_model):
    return pipeline("solar-flare-forecasting", model=str(hmi_model), device="cpu")


@pytest.fixture(scope="module")
def both(both_model):
    return pipeline("solar-flare-forecasting", model=str(both_model), device="cpu")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two synthetic slots of HMI and 171 as FITS files: `files[time][modality]`."""
    sun = SyntheticSun(seed=3, size=64)
    times = ["2014-02-03T00:00", "2014-02-04T00:00"]
    table = sun.write_archive(tmp_path_factory.mktemp("sun"), times, ["hmi", "aia171"], progress=False)
    return [dict(zip(rows["modality"], rows["path"], strict=True)) for _, rows in table.groupby("time_nominal")]


def test_one_call_answers_for_a_real_magnetogram(hmi_model, sdo_folder):
    forecast = pipeline("solar-flare-forecasting", model=str(hmi_model), device="cpu")(str(sdo_folder / MAGNETOGRAM))
    probabilities = list(forecast["probabilities"].values())
    assert list(forecast["probabilities"]) == ["0AB", "C", "M", "X"]
    assert sum(probabilities) == pytest.approx(1)
    assert forecast["exceedance"]["m_plus"] == pytest.approx(probabilities[2] + probabilities[3], abs=1e-6)
    assert forecast["label"] == max(forecast["probabilities"], key=forecast["probabilities"].get)
    assert forecast["time"].startswith("2022-08-02T10:48")
    assert forecast["valid_until"].startswith("2022-08-03T10:4")
    (image,) = forecast["images"]
    assert image["modality"] == "hmi"
    assert image["approximate"]
    assert not image["synthetic"]
    json.dumps(forecast)


def test_calibration_and_thresholds_of_the_model_are_used(hmi, files):
    forecast = hmi(files[0]["hmi"])
    pixels = hmi.image_processor([files[0]["hmi"]])["pixel_values"]
    with torch.no_grad():
        raw = hmi.model(pixels).logits[0].double()
    odds = (raw[2:].logsumexp(0) - raw[:2].logsumexp(0)).item()
    assert forecast["exceedance"]["m_plus"] == pytest.approx(1 / (1 + math.exp(-(2 * odds - 1))), rel=1e-4)
    assert forecast["calibrated"]
    assert forecast["thresholds"] == {"c_plus": 0.5, "m_plus": 0.999}
    assert forecast["warnings"] == {
        "c_plus": forecast["exceedance"]["c_plus"] >= 0.5,
        "m_plus": forecast["exceedance"]["m_plus"] >= 0.999,
    }
    assert forecast["images"][0]["synthetic"]


def test_the_window_is_that_of_the_model(tmp_path, files):
    window = {"horizon": "48h", "latency": "90min", "by": "peak"}
    folder = save_model(tmp_path, ["hmi"], forecast_window=window)
    forecast = pipeline("solar-flare-forecasting", model=str(folder), device="cpu")(files[0]["hmi"], attribution=True)
    assert forecast["time_nominal"] == "2014.02.03_00:00:00_TAI"  # the slot's own scale
    assert (forecast["valid_from"], forecast["valid_until"]) == ("2014-02-03T01:30:00Z", "2014-02-05T01:30:00Z")
    assert forecast["window"] == window
    assert "largest flare within 48 h" in forecast_figure(forecast).get_suptitle()


def test_a_model_that_was_not_tuned_is_refused(tmp_path):
    config = SolarChipConfig.from_name("vit-tiny", modalities=["hmi"], projection_dim=16, **TOWER)
    SolarChipForPreTraining(config).save_pretrained(tmp_path)
    SolarChipImageProcessor(modalities=["hmi"], size=32).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="expected a tuned flare model, got a SolarChipForPreTraining"):
        pipeline("solar-flare-forecasting", model=str(tmp_path), device="cpu")


def test_a_model_without_calibration_says_so(both, files):
    forecast = both(files[0])
    assert not forecast["calibrated"]
    assert forecast["thresholds"] is None
    assert forecast["warnings"] is None


def test_every_kind_of_input_gives_the_same_forecast(hmi, files):
    from astropy.io import fits
    from sunpy.map import Map

    path = files[0]["hmi"]
    expected = hmi(path)["probabilities"]
    with fits.open(path) as units:
        assert hmi(units)["probabilities"] == pytest.approx(expected)
        assert hmi(units[1] if len(units) > 1 else units[0])["probabilities"] == pytest.approx(expected)
    for form in (Path(path), Path(path).read_bytes(), read_image(path), {"hmi": path}, Map(path)):
        assert hmi(form)["probabilities"] == pytest.approx(expected, abs=1e-5), type(form)
    physical = hmi.image_processor.to_physical(path)[1]
    array = hmi({"hmi": physical})
    assert array["probabilities"] == pytest.approx(expected, abs=1e-5)
    assert array["time"] is None
    assert array["valid_until"] is None


def test_lists_and_batches_answer_in_order(hmi, files):
    paths = [slot["hmi"] for slot in files]
    singles = [hmi(path) for path in paths]
    assert singles[0]["probabilities"] != singles[1]["probabilities"]
    for options in ({}, {"batch_size": 2}):
        for single, listed in zip(singles, hmi(paths, **options), strict=True):
            assert listed["probabilities"] == pytest.approx(single["probabilities"], abs=1e-5)
            assert listed["valid_from"] == single["valid_from"]
    batched = hmi(tuple(paths), batch_size=2, attribution="c_plus", attribution_steps=2)
    assert [forecast["attribution"].headers["hmi"].source for forecast in batched] == paths


def test_an_observation_may_lack_a_channel(both, files):
    whole, alone = both(files[0]), both(files[0]["aia171"])
    assert set(whole["modality_weights"]) == {"hmi", "aia171"}
    assert sum(whole["modality_weights"].values()) == pytest.approx(1)
    assert alone["modality_weights"] == {"aia171": pytest.approx(1)}
    assert whole["probabilities"] != alone["probabilities"]
    assert both({"hmi": None, "aia171": files[0]["aia171"]})["probabilities"] == pytest.approx(alone["probabilities"])


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("2023_01_31__03_39_23_200__SDO_HMI_HMI_continuum.jp2", "expected 'MAGNETOGRAM', got 'CONTINUUM INTENSITY'"),
        ("hmi.sharp_cea_720s.377.20110215_020000_TAI.magnetogram.fits", "expected helioprojective axes"),
        ("AIAsynoptic0171.fits", r"expected one that this processor has \(hmi\), got aia171"),
        ("aia_171_cutout.fits", "the whole solar disk"),
        ("mdi.fd_m_96m_lev182.20101015_000000_TAI.data.fits", "expected AIA or HMI of SDO, got MDI"),
        ("broken/html_not_fits.fits", "got an HTML or XML page"),
    ],
)
def test_what_is_no_full_disk_magnetogram_is_refused_in_a_sentence(hmi, sdo_folder, name, sentence):
    with pytest.raises(SolarImageError, match=sentence):
        hmi(str(sdo_folder / name))


def test_what_does_not_fit_together_is_refused(both, hmi, hmi_model, files):
    with pytest.raises(SolarImageError, match=r"time: expected within 12 minutes of hmi's 2014-02-0"):
        both({"hmi": files[0]["hmi"], "aia171": files[1]["aia171"]})
    with pytest.raises(SolarImageError, match="images: expected one of hmi, aia171, got none"):
        both({"hmi": None})
    with pytest.raises(SolarImageError, match="modality: expected modality= with an array"):
        hmi(np.zeros((32, 32)))
    with pytest.raises(ValueError, match="attribution: expected True or one of c_plus, m_plus, x_plus, got 'm'"):
        hmi(files[0]["hmi"], attribution="m")
    with pytest.raises(ValueError, match=r"expected attribution=.*, got top_k"):
        hmi(files[0]["hmi"], top_k=1)
    with pytest.raises(ValueError, match=r"image_processor: expected one for the model's channels \['hmi'\]"):
        pipeline(
            "solar-flare-forecasting",
            model=hmi.model,
            image_processor=SolarChipImageProcessor(modalities=["hmi", "aia171"], size=32),
        )


def test_channels_can_be_chosen_at_loading(both_model, files):
    alone = pipeline(
        "solar-flare-forecasting", model=str(both_model), device="cpu", model_kwargs={"modalities": ["hmi"]}
    )
    assert alone.model.config.modalities == ["hmi"]
    assert set(alone(files[0]["hmi"])["modality_weights"]) == {"hmi"}


def test_a_saved_pipeline_comes_back(hmi, files, tmp_path):
    hmi.save_pretrained(tmp_path)
    again = pipeline("solar-flare-forecasting", model=str(tmp_path), device="cpu")
    assert again(files[0]["hmi"])["probabilities"] == pytest.approx(hmi(files[0]["hmi"])["probabilities"])


def test_the_task_costs_nothing_until_it_is_asked_for():
    code = """
import sys, solarchip_hf
from transformers.pipelines import PIPELINE_REGISTRY
print("solar-flare-forecasting" in PIPELINE_REGISTRY.get_supported_tasks())
print("solarchip_hf.hub.flare_pipeline" in sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["True", "False"]


# --- attribution ------------------------------------------------------------------------------------------------------


def test_attribution_has_the_right_wcs_and_adds_up(both, files, tmp_path):
    import sunpy.map

    forecast = both(files[0], attribution=True)
    attribution = forecast["attribution"]
    assert attribution.target == "m_plus"
    assert set(attribution.maps) == {"hmi", "aia171"}
    difference = attribution.log_odds - attribution.baseline_log_odds
    assert abs(difference) > 1e-3
    assert abs(attribution.residual) < 0.02 * abs(difference)
    probability = forecast["exceedance"]["m_plus"]  # not calibrated: the same log-odds
    assert attribution.log_odds == pytest.approx(math.log(probability / (1 - probability)), abs=1e-4)
    path = tmp_path / "attribution.fits"
    attribution.to_map("aia171").save(path)
    drawn = sunpy.map.Map(path)
    assert drawn.data.shape == (32, 32)
    assert drawn.reference_coordinate.Tx.value == 0
    assert drawn.meta["content"] == "M_PLUS ATTRIBUTION FROM AIA171"
    for peak in attribution.peaks("aia171"):
        assert np.hypot(peak["tx"], peak["ty"]) < 1800
    assert len(attribution.overlay("171", tmp_path / "overlay.png").axes) == 2
    assert (tmp_path / "overlay.png").stat().st_size > 5000
