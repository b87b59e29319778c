"""The synthetic flare report and the hazard behind it."""

import numpy as np
import pandas as pd
import pytest

from solarchip_hf.data.synthetic_sun import SyntheticSun
from solarchip_hf.data.synthetic_sun.catalogue import goes_class, parse_goes_class
from solarchip_hf.data.synthetic_sun.state import ENERGY_STEP, RegionHistory, largest_peak, share_above


@pytest.fixture(scope="module")
def sun():
    """Two and a half years through the maximum of the cycle."""
    return SyntheticSun(seed=0, start="2012-07-01", days=900)


@pytest.fixture(scope="module")
def report(sun):
    return sun.flares()


@pytest.fixture(scope="module")
def daily_maximum(sun, report):
    day = (report["start_time"] - sun.start) // pd.Timedelta("1D")
    return report["xrsb_irrad"].groupby(day).max().reindex(range(900), fill_value=0.0).to_numpy()


def test_columns_and_conventions_are_those_of_the_real_report(report, shared_data):
    real = pd.read_csv(shared_data / "goes_flare_report_excerpt.csv")
    assert list(report.columns) == list(real.columns)
    assert (report["start_time"] < report["time"]).all()
    assert (report["time"] < report["end_time"]).all()
    assert report["start_time"].is_monotonic_increasing
    assert set(report["xrsb_irrad_source"]) == {"SYNTHETIC"}
    assert (report["flare_loc_swpc_hgs_lon"].abs() <= 90).all()
    assert (report["xrsb_irrad"] >= report["background_irrad"]).all()
    for row in report.iloc[::97].itertuples():
        assert parse_goes_class(row.flare_class) == pytest.approx(row.xrsb_irrad, rel=0.1)
        assert np.hypot(row.flare_loc_xrs_hpc_x, row.flare_loc_xrs_hpc_y) < 980


def test_flares_are_as_frequent_as_at_a_solar_maximum(report, daily_maximum, shared_data):
    """Beside the real years 2012 to 2014, on the operational scale and on that of the science-quality list."""
    real = pd.read_csv(shared_data / "swpc_flares_2010_2023.csv")
    flux = real["goes_class"].map(parse_goes_class)
    start = pd.to_datetime(real["start_time"])
    chosen = (start >= "2012-07-01") & (start < "2014-12-18")
    day = (start[chosen] - pd.Timestamp("2012-07-01")) // pd.Timedelta("1D")
    for letter, low, high in (("C", 1e-6, 1e-5), ("M", 1e-5, 1e-4), ("X", 1e-4, 1.0)):
        counts, shares = [], []
        for scale in (1.0, 1 / 0.7):
            brightest = (scale * flux[chosen]).groupby(day).max().reindex(range(900), fill_value=0.0)
            counts.append(((scale * flux[chosen] >= low) & (scale * flux[chosen] < high)).sum())
            shares.append(((brightest >= low) & (brightest < high)).mean())
        ours = ((report["xrsb_irrad"] >= low) & (report["xrsb_irrad"] < high)).sum()
        share = ((daily_maximum >= low) & (daily_maximum < high)).mean()
        slack = 3.0 if letter == "X" else 1.5  # X flares come in clusters, and this is one Sun of many
        assert min(counts) / slack < ours < max(counts) * slack, letter
        assert min(shares) / slack < share < max(shares) * slack, letter


def test_no_region_flares_at_class_x_again_and_again():
    """The richest real regions of a cycle had 6 to 12 flares of class X; most that have any have one."""
    reports = [SyntheticSun(seed=seed).flares("2012-06-01", "2015-06-01") for seed in range(2)]
    counts = [r[r["xrsb_irrad"] >= 1e-4].groupby("active_region").size() for r in reports]
    assert 1.0 < pd.concat(counts).mean() < 2.2
    assert max(count.max() for count in counts) <= 12
    assert max(r["xrsb_irrad"].max() for r in reports) > 4e-4


def test_minimum_is_quiet():
    report = SyntheticSun(seed=0).flares("2019-07-01", "2020-01-01")
    assert (report["xrsb_irrad"] >= 1e-5).sum() < 20


def test_flaring_days_cluster_and_forget(daily_maximum):
    label = (daily_maximum >= 1e-5).astype(float)
    label -= label.mean()
    correlation = [np.corrcoef(label[:-lag], label[lag:])[0, 1] for lag in (1, 3, 7)]
    assert 0.15 < correlation[0] < 0.65
    assert correlation[0] > correlation[2] > -0.1


def test_sizes_follow_a_power_law(report):
    large = report["xrsb_irrad"].to_numpy()
    counts = [(large >= flux).sum() for flux in (2e-6, 1e-5, 5e-5)]
    slopes = np.diff(np.log(counts)) / np.log(5)
    assert (slopes > -1.6).all()
    assert (slopes < -0.4).all()


def test_hazard_is_calibrated_and_beats_the_base_rate(sun, daily_maximum):
    label = (daily_maximum >= 1e-5).astype(float)
    hazard = sun.hazard(sun.times(), horizon="24h", threshold="M1.0")
    assert hazard.shape == (900,)
    assert ((hazard >= 0) & (hazard <= 1)).all()
    assert hazard.mean() == pytest.approx(label.mean(), abs=0.06)
    skill = 1 - ((hazard - label) ** 2).mean() / label.var()
    assert 0.2 < skill < 0.7
    for low, high in ((0.0, 0.2), (0.2, 0.6), (0.6, 1.0)):
        chosen = (hazard >= low) & (hazard <= high)
        assert hazard[chosen].mean() == pytest.approx(label[chosen].mean(), abs=0.12)


def test_the_share_of_large_flares_is_that_of_the_draws():
    """`share_above` against the flares of simulated regions, by the flux that their region had."""
    flux, peak = [], []
    for region in RegionHistory(0).between(1000.0, 1600.0):
        for flare in region.history.flares:
            flux.append(region.history.flux[int((flare.start - region.emergence) / ENERGY_STEP)])
            peak.append(flare.flux)
    flux, peak = np.array(flux), np.array(peak)
    assert len(peak) > 20_000
    assert (peak <= 1e-5 * largest_peak(flux) * (1 + 1e-9)).all()
    for low, high in ((4.0, 8.0), (8.0, 16.0), (16.0, 60.0)):
        chosen = (flux >= low) & (flux < high)
        for threshold in (1e-6, 1e-5, 1e-4):
            share = (peak[chosen] >= threshold).mean()
            expected = share_above(threshold, flux[chosen]).mean()
            assert expected == pytest.approx(share, abs=4 * np.sqrt(expected / chosen.sum()) + 1e-4)


def test_probabilities_of_the_classes_are_calibrated(sun, daily_maximum):
    probabilities = sun.flare_probabilities(sun.times())
    assert probabilities.shape == (900, 4)
    assert (probabilities >= 0).all()
    np.testing.assert_allclose(probabilities.sum(1), 1.0)
    above = probabilities[:, ::-1].cumsum(1)[:, ::-1]
    for column, (threshold, tolerance) in enumerate(((1e-6, 0.08), (1e-5, 0.06), (1e-4, 0.015)), start=1):
        assert above[:, column].mean() == pytest.approx((daily_maximum >= threshold).mean(), abs=tolerance)
        np.testing.assert_allclose(above[:, column], sun.hazard(sun.times(), threshold=threshold))
    assert sun.flare_probabilities([]).shape == (0, 4)


def test_hazard_grows_with_the_horizon_and_falls_with_the_threshold(sun):
    times = sun.times("30D")
    day = sun.hazard(times)
    assert (sun.hazard(times, horizon="48h") >= day - 0.02).all()
    assert (sun.hazard(times, threshold="X1.0") <= day).all()
    assert (sun.hazard(times, threshold=1e-5) == day).all()


def test_span_and_order_do_not_change_the_report(report):
    part = SyntheticSun(seed=0).flares("2013-05-01", "2013-05-20")
    same = report[(report["start_time"] >= "2013-05-01") & (report["start_time"] < "2013-05-20")]
    assert len(part) > 20
    pd.testing.assert_frame_equal(part.reset_index(drop=True), same.reset_index(drop=True))


@pytest.mark.parametrize(
    ("flux", "text"), [(1e-4, "X1.0"), (3.39e-4, "X3.3"), (9.99e-6, "C9.9"), (1e-5, "M1.0"), (2.2e-7, "B2.2")]
)
def test_classes_are_cut_not_rounded(flux, text):
    assert goes_class(flux) == text


def test_bad_thresholds_and_horizons_are_refused(sun):
    with pytest.raises(ValueError, match="threshold"):
        sun.hazard(["2014-01-01"], threshold="Q1")
    with pytest.raises(ValueError, match="horizon"):
        sun.hazard(["2014-01-01"], horizon="-1h")
