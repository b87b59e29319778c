"""The table of rival translations: rows, intervals, paired differences, notes, files; and the figures."""

import json

import numpy as np
import pandas as pd
import pytest
from tiny_translation import SIZE, made_up_cases

from solarchip_hf.evaluation.bootstrap import block_bootstrap
from solarchip_hf.evaluation.translation_figures import rivals_figure, spread_figure, translation_figure, write_figures
from solarchip_hf.evaluation.translation_report import BOUNDS, compare_translations, fitting_block, write_report


def rivals(cases, seed: int = 0):
    """A good ensemble, a poor one, and no structure at all."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(0, 20, (len(cases), 9, SIZE, SIZE)).astype(np.float32)
    centre = cases.truth + rng.normal(0, 20, cases.truth.shape).astype(np.float32)
    samples = {"good": centre[:, None] + noise, "poor": np.roll(cases.truth, 5, axis=0)[:, None] + noise}
    predictions = {name: values.mean(axis=1) for name, values in samples.items()}
    return {**predictions, "zero": np.zeros_like(cases.truth)}, samples


@pytest.fixture(scope="module")
def table():
    cases = made_up_cases()
    predictions, samples = rivals(cases)
    return compare_translations(
        predictions, cases, samples=samples, method="good", note="synthetic", remarks={"poor": "shifted in time."}
    )


def test_rows_intervals_and_differences(table):
    good, poor = table.intervals["good"], table.intervals["poor"]
    assert good["correlation_disk"].low > poor["correlation_disk"].high
    assert good["correlation_disk"].estimate == pytest.approx(table.rows["good"]["correlation_disk"])
    apart = table.differences["poor"]["rmse"]
    assert apart.high < 0
    assert apart.estimate == pytest.approx(table.rows["good"]["rmse"] - table.rows["poor"]["rmse"])
    assert "good" not in table.differences
    assert "crps" in table.differences["poor"]
    assert "crps" not in table.differences["zero"]
    assert table.rows["good"]["expected_coverage"] == pytest.approx(0.8)
    assert table.rows["good"]["coverage"] == pytest.approx(0.8, abs=0.03)


def test_markdown_has_every_row_and_says_what_it_is(table):
    text = table.to_markdown()
    rows = [line for line in text.splitlines() if line.startswith("|")]
    header, body = rows[0], rows[2:5]
    assert [line.split("|")[1].strip() for line in body] == ["**good**", "poor", "zero"]
    assert all(line.count("|") == header.count("|") for line in body)
    for part in ("synthetic", "data range of PSNR and SSIM 3132 DN", "12 observations, 2014-03-01", "too narrow"):
        assert part in text
    assert "0.800 is expected" in text
    assert "poor: shifted in time." in text
    assert "r, disk 12" in text  # undefined for the zero image
    assert "-0.000" not in text
    assert "good less" in text
    short = table.to_text()
    assert "good less poor" in short
    assert max(map(len, short.splitlines())) < 200


def test_magnetograms_have_their_own_columns():
    cases = made_up_cases(target="hmi")
    predictions = {"truth": cases.truth, "zero field": np.zeros_like(cases.truth), "flipped truth": -cases.truth}
    table = compare_translations(predictions, cases, num_resamples=50)
    assert (table.method, table.differences) == (None, {})
    assert table.rows["truth"]["polarity_agreement"] == 1
    text = table.to_markdown()
    assert "Hale's law on the true regions reaches" in text
    assert "500 G" in text
    assert "less |" not in text
    assert "PPE10" not in text
    json.dumps(table.to_dict(), allow_nan=False)


def test_intervals_stay_within_what_a_score_can_be():
    cases = made_up_cases(target="hmi")
    noise = np.random.default_rng(0).normal(0, 1, cases.truth.shape).astype(np.float32)
    noise[::4] *= 300  # most days all but perfect, some worthless: intervals that reach far beyond
    table = compare_translations({"good": cases.truth + noise, "flipped": -cases.truth}, cases, method="good")
    scores, apart = table.intervals["good"], table.differences["flipped"]
    for name, (low, high) in BOUNDS.items():
        if name in scores and np.isfinite(scores[name].low):
            assert low <= scores[name].low <= scores[name].high <= high, name
            assert low - high <= apart[name].low <= apart[name].high <= high - low, name
    unbounded = block_bootstrap(
        np.mean, np.array(table.rows["good"]["per_sample"]["correlation"]), times=cases.times, block=table.block
    )
    assert unbounded.high > scores["correlation"].high == 1.0
    assert {*scores} >= {*BOUNDS} - {"spread_skill", "coverage", "spread_error_ratio", "ppe10", "flux_error_abs"}


def test_files(table, tmp_path):
    written = write_report(table, tmp_path / "new" / "folder")
    assert [path.name for path in written] == ["fidelity.json", "fidelity.md"]
    assert {path.name for path in written[0].parent.iterdir()} == {"fidelity.json", "fidelity.md"}
    facts = json.loads(written[0].read_text())
    assert (facts["sources"], facts["target"], facts["unit"], facts["data"]) == (["hmi"], "aia171", "DN", "synthetic")
    assert facts["observations"] == len(facts["times"]) == 12
    good = facts["rows"]["good"]
    assert good["scores"]["rmse"]["low"] < good["scores"]["rmse"]["estimate"] < good["scores"]["rmse"]["high"]
    assert len(good["per_sample"]["correlation_disk"]) == good["count"] == 12
    assert facts["rows"]["zero"]["scores"]["correlation"]["estimate"] is None


def test_block_follows_the_span():
    assert fitting_block(pd.date_range("2014-01-01", "2015-01-01", freq="1D", tz="UTC")) == "27D"
    assert fitting_block(pd.date_range("2014-01-01", "2014-02-10", freq="1D", tz="UTC")) == "80h"
    assert fitting_block(pd.date_range("2014-01-01", "2014-01-03", freq="6h", tz="UTC")) == "4h"


def test_bad_names_are_refused():
    cases = made_up_cases(count=3)
    with pytest.raises(ValueError, match="expected other"):
        compare_translations({"zero": np.zeros_like(cases.truth)}, cases, method="other")
    with pytest.raises(ValueError, match="at least one"):
        compare_translations({}, cases)


def test_images_are_drawn_north_up_with_the_limb():
    cases = made_up_cases(count=4)
    predictions, samples = rivals(cases)
    figure = translation_figure(
        cases, predictions["good"], uncertainty=samples["good"].std(axis=1), indices=[0, 2], title="synthetic"
    )
    panels = [axes for axes in figure.axes if axes.images and axes.patches]
    assert len(panels) == 10
    titles = [axes.get_title() for axes in panels[:5]]
    assert titles == ["HMI magnetogram", "AIA 171 Å, truth", "prediction", "error / DN", "uncertainty / DN"]
    for axes in panels:
        assert axes.images[0].origin == "lower"
        assert axes.patches[0].get_radius() == pytest.approx(406.67 * SIZE / 1024)
        assert axes.patches[0].center == ((SIZE - 1) / 2, (SIZE - 1) / 2)
    truth, prediction, error = (axes.images[0] for axes in panels[1:4])
    assert truth.norm is prediction.norm or (truth.norm.vmin, truth.norm.vmax) == (
        prediction.norm.vmin,
        prediction.norm.vmax,
    )
    np.testing.assert_allclose(
        np.ma.filled(error.get_array(), np.nan), predictions["good"][0] - cases.truth[0], rtol=1e-5
    )
    assert error.norm.vmin == -error.norm.vmax
    assert figure.axes[0].get_ylabel().startswith("2014-03-01")
    rows = rivals_figure(cases, predictions, index=1)
    assert len([axes for axes in rows.axes if axes.images and axes.get_visible()]) == 1 + 2 * 3


def test_spread_figure_shows_spread_against_error():
    cases = made_up_cases(count=6)
    rng = np.random.default_rng(0)
    scale = rng.gamma(2.0, 10.0, cases.truth.shape)
    samples = cases.truth[:, None] + scale[:, None] * rng.normal(size=(6, 8, SIZE, SIZE))
    samples += (scale * rng.normal(size=cases.truth.shape))[:, None]
    figure = spread_figure(cases, samples, bins=5)
    line = next(line for line in figure.axes[0].lines if line.get_label() == "RMSE by class of spread")
    spread, error = line.get_xdata(), line.get_ydata()
    assert (np.diff(spread) > 0).all()
    assert error[-1] > 3 * error[0]
    np.testing.assert_allclose(error[1:] / spread[1:], np.sqrt(1 + 1 / 8), rtol=0.3)


def test_write_figures(tmp_path):
    cases = made_up_cases(count=5, target="hmi")
    predictions, samples = rivals(cases)
    written = write_figures(
        cases, predictions, tmp_path / "figures", method="good", samples=samples["good"], note="synthetic"
    )
    assert [path.name for path in written] == ["translation.png", "rivals.png", "spread.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)
    alone = write_figures(cases, {"zero": predictions["zero"]}, tmp_path / "zero", method="zero")
    assert [path.name for path in alone] == ["translation.png", "rivals.png"]
