"""The metric against scikit-image, SciPy and scikit-learn, against cases worked by hand, its traps, and its doctest."""

import doctest
import json
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from skimage import metrics as images

from solarchip_hf.evaluation.bootstrap import block_bootstrap
from solarchip_hf.evaluation.translation_fidelity.ensemble_scores import central_interval, crps, ensemble_scores
from solarchip_hf.evaluation.translation_fidelity.fidelity_scores import (
    fidelity_scores,
    northern_leaders,
    score_names,
)
from solarchip_hf.evaluation.translation_fidelity.image_scores import (
    DATA_RANGES,
    INNER_SHARE,
    RADIUS_SHARE,
    concordance,
    image_scores,
    intensity_scores,
    pearson,
    radial_distance,
    remove_radial_profile,
)
from solarchip_hf.evaluation.translation_fidelity.magnetogram_scores import (
    hale_polarity,
    magnetogram_scores,
    polarity_agreement,
)
from solarchip_hf.models.geometry import RSUN_PIXELS_1024, disk_mask
from solarchip_hf.models.image_processing_solarchip import SolarChipImageProcessor
from solarchip_hf.models.modalities import MODALITY_NAMES

evaluate = pytest.importorskip("evaluate")
FOLDER = Path(str(files("solarchip_hf.evaluation") / "translation_fidelity"))
SIZE = 64


@pytest.fixture(scope="module")
def metric(tmp_path_factory):
    return evaluate.load(str(FOLDER), cache_dir=str(tmp_path_factory.mktemp("metrics")))


def sun(seed: int, count: int = 1) -> np.ndarray:
    """(count, 64, 64) bright disks with a limb, each with blobs of its own."""
    rng = np.random.default_rng(seed)
    distance = radial_distance(SIZE)
    disk = 200.0 * (1 + distance**4) * (distance < 1) + 100 * np.exp(-5 * np.clip(distance - 1, 0, None)) * (
        distance >= 1
    )
    offset = (np.arange(SIZE) - (SIZE - 1) / 2) / (RADIUS_SHARE * SIZE)
    result = np.repeat(disk[None], count, axis=0)
    for image in result:
        for x, y in rng.uniform(-0.6, 0.6, (6, 2)):
            image += 400 * np.exp(-((offset[:, None] - y) ** 2 + (offset[None, :] - x) ** 2) / 0.01)
    return result


def bipole(sign: int = 1, row: int = 42, column: int = 30) -> np.ndarray:
    """A magnetogram with one region: `sign` in the west, its opposite in the east; NaN off the disk."""
    field = np.where(disk_mask(SIZE), 2.0, np.nan)
    field[row : row + 4, column : column + 3] = -300.0 * sign
    field[row : row + 4, column + 5 : column + 8] = 300.0 * sign
    return field


def test_geometry_is_that_of_the_canonical_grid():
    assert RADIUS_SHARE * 1024 == RSUN_PIXELS_1024
    for size in (32, 63, 128):
        np.testing.assert_array_equal(radial_distance(size) <= 1, disk_mask(size))
    assert set(DATA_RANGES) == set(MODALITY_NAMES)


def test_equals_scikit_image_and_scipy():
    truth, other = sun(0)[0], sun(1)[0]
    guess = 0.7 * truth + 0.3 * other
    scores = image_scores(guess, truth, data_range=3132.0)
    assert scores["correlation"] == pytest.approx(stats.pearsonr(guess.ravel(), truth.ravel()).statistic, abs=1e-12)
    assert scores["ssim"] == pytest.approx(images.structural_similarity(truth, guess, data_range=3132.0), abs=1e-12)
    assert scores["psnr"] == pytest.approx(images.peak_signal_noise_ratio(truth, guess, data_range=3132.0), abs=1e-9)
    assert scores["rmse"] == pytest.approx(np.sqrt(images.mean_squared_error(truth, guess)), rel=1e-12)
    root = images.normalized_root_mse(truth, guess, normalization="euclidean")
    assert scores["nmse"] == pytest.approx(root**2, rel=1e-9)
    assert scores["mae"] == pytest.approx(np.abs(truth - guess).mean(), rel=1e-12)


def test_concordance_by_hand_and_by_its_other_form():
    rng = np.random.default_rng(0)
    first = rng.normal(size=500)
    second = 0.8 * first + rng.normal(size=500) + 0.3
    bias = np.sqrt(second.std() / first.std()), (first.mean() - second.mean()) / np.sqrt(first.std() * second.std())
    expected = pearson(first, second) * 2 / (bias[0] ** 2 + bias[0] ** -2 + bias[1] ** 2)
    assert concordance(first, second) == pytest.approx(expected, abs=1e-12)
    assert concordance(first, first) == pytest.approx(1)
    assert concordance(np.array([1.0, 2.0, 3.0]), np.array([2.0, 3.0, 4.0])) == pytest.approx(4 / 3 / (4 / 3 + 1))
    assert np.isnan(pearson(np.full(9, 0.1), first[:9]))


def test_the_frame_rewards_the_disk_and_the_headline_does_not():
    truth, others = sun(0)[0], sun(7, 8)
    both = [image_scores(image, truth, data_range=3132.0) for image in others]
    assert np.mean([scores["correlation"] for scores in both]) > 0.5
    assert abs(np.mean([scores["correlation_disk"] for scores in both])) < 0.15
    # an image of rings alone has no structure to be compared
    rings = 300.0 - 100 * radial_distance(SIZE)
    alone = image_scores(rings, truth, data_range=3132.0)
    assert abs(alone["ccc_disk"]) < 0.01
    inner = radial_distance(SIZE) < 0.95
    flat = remove_radial_profile(truth, inner, None)
    assert flat.mean() == pytest.approx(0, abs=1e-9)
    assert flat.std() > 20


def test_the_traps_on_real_images(sdo_folder):
    processor = SolarChipImageProcessor(size=256)
    names = ("2014_01_01__00_00_11_34__SDO_AIA_AIA_171.jp2", "2021_06_01__00_01_21_347__SDO_AIA_AIA_171.jp2")
    first, second = (processor.to_physical(sdo_folder / name, quicklook=True)[1] for name in names)
    unrelated = fidelity_scores([first], [second], modality="aia171")
    assert unrelated["correlation"] > 0.5
    assert abs(unrelated["correlation_disk"]) < 0.2
    field = np.load(sdo_folder / "HMI20130131_0000_bz.npz")["x"].astype(float)
    nothing = [np.zeros_like(field)]
    wide, stated = (
        fidelity_scores(nothing, [field], modality="hmi", northern_leader=-1, data_range=span) for span in (7000, 500)
    )
    assert wide["ssim"] > 0.98
    assert stated["ssim_strong"] < 0.1
    assert stated["rmse_gain_over_zero"] == 0


def test_power_tells_a_smooth_image_and_a_noisy_one():
    from scipy.ndimage import gaussian_filter

    truth = sun(0)[0] + np.random.default_rng(0).normal(0, 30, (SIZE, SIZE))
    smooth = image_scores(gaussian_filter(truth, 1.5), truth, data_range=3132.0)
    noisy = image_scores(truth + np.random.default_rng(1).normal(0, 60, truth.shape), truth, data_range=3132.0)
    assert smooth["power_fine_db"] < -5 < smooth["power_coarse_db"] < 0.5
    assert noisy["power_fine_db"] > 3
    double = image_scores(2 * truth, truth, data_range=3132.0)
    assert double["power_fine_db"] == pytest.approx(10 * np.log10(4))
    assert np.isnan(image_scores(np.zeros_like(truth), truth, data_range=1.0)["power_fine_db"])


def test_power_counts_all_directions_alike():
    from scipy.ndimage import gaussian_filter

    truth = np.random.default_rng(0).normal(0, 30, (SIZE, SIZE))
    guess = gaussian_filter(truth, (2.0, 0.3))  # smooth from north to south only
    upright, lying = (image_scores(*pair, data_range=1.0) for pair in ((guess, truth), (guess.T, truth.T)))
    inner = radial_distance(SIZE) < INNER_SHARE
    power = []
    for image in (guess, truth):
        flat = np.zeros((SIZE, SIZE))
        flat[inner] = remove_radial_profile(image, inner)
        power.append(np.abs(np.fft.fft2(flat)) ** 2)
    waves = np.fft.fftfreq(SIZE) * RADIUS_SHARE * SIZE  # a solar radius
    waves = np.hypot(waves[:, None], waves)
    for name, band in {"power_coarse_db": (waves > 0) & (waves < 2.5), "power_fine_db": waves > 5}.items():
        assert upright[name] == pytest.approx(lying[name], abs=1e-9)
        assert upright[name] == pytest.approx(10 * np.log10(power[0][band].sum() / power[1][band].sum()), abs=1e-9)


def test_invalid_pixels_are_left_out_and_counted():
    truth, guess = sun(0, 2), sun(0, 2) * 0.9
    clean = fidelity_scores(guess, truth, modality="171")
    holed = truth.copy()
    holed[:, :4] = np.nan
    holes = guess.copy()
    holes[1, 30:34, 30:34] = np.nan
    scores = fidelity_scores(holes, holed, modality="171")
    assert (clean["missing_pixels"], clean["valid_pixels"]) == (0, 2 * SIZE**2)
    assert (scores["missing_pixels"], scores["valid_pixels"]) == (16, 2 * SIZE * (SIZE - 4) - 16)
    both = np.isfinite(holes[1]) & np.isfinite(holed[1])
    expected = stats.pearsonr(holes[1][both], holed[1][both]).statistic
    assert scores["per_sample"]["correlation"][1] == pytest.approx(expected, abs=1e-12)
    assert np.isfinite([scores[name] for name in score_names("171")]).all()
    # the window of a hole is not compared: what fills the hole does not matter
    filled = fidelity_scores(
        np.where(np.isnan(holes), 1e6, holes), np.where(np.isnan(holes), np.nan, holed), modality="171"
    )
    assert filled["ssim"] == pytest.approx(scores["ssim"], abs=1e-12)
    nothing = fidelity_scores(np.full_like(truth, np.nan), truth, modality="171")
    assert nothing["undefined"]["correlation_disk"] == nothing["undefined"]["rmse"] == 2
    assert np.isnan(nothing["ssim"])


def test_intensity_by_hand():
    truth = np.full((SIZE, SIZE), 10.0)
    guess = np.full((SIZE, SIZE), 10.9)
    guess[: SIZE // 2] = 8.0
    scores = intensity_scores(guess, truth)
    assert scores["flux_error"] == pytest.approx(-0.055)
    assert scores["flux_error_abs"] == pytest.approx(0.055)
    assert scores["ppe10"] == pytest.approx(0.5)


def test_the_zero_magnetogram_gets_no_credit():
    truth = bipole()
    scores = fidelity_scores([np.zeros((SIZE, SIZE))], [truth], modality="hmi", northern_leader=1)
    wide = fidelity_scores([np.zeros((SIZE, SIZE))], [truth], modality="hmi", northern_leader=1, data_range=7000.0)
    assert wide["ssim"] > 0.95  # the trap: a range of +-3500 G
    assert scores["ssim_strong"] < 0.2
    assert scores["ssim_strong"] == scores["ssim_strong_zero"]
    assert scores["rmse_gain_over_zero"] == scores["ssim_gain_over_zero"] == 0
    assert (scores["unsigned_flux_error"], scores["polarity_agreement"], scores["nmse"]) == (-1, 0.5, 1)
    assert scores["undefined"]["correlation"] == scores["undefined"]["correlation_disk"] == 1
    flipped = fidelity_scores([-truth], [truth], modality="hmi", northern_leader=1)
    assert flipped["polarity_agreement"] == 0
    assert flipped["polarity_gain_over_hale"] == -flipped["polarity_agreement_hale"]
    assert flipped["rmse_gain_over_zero"] == pytest.approx(-1)
    assert flipped["unsigned_flux_error"] == pytest.approx(0, abs=1e-12)
    perfect = fidelity_scores([truth], [truth], modality="hmi", northern_leader=1)
    assert perfect["rmse_gain_over_zero"] == perfect["polarity_agreement"] == perfect["correlation_strong"] == 1


def test_a_magnetogram_is_scored_on_the_disk_only():
    truth = bipole()
    filled = np.nan_to_num(truth)  # zeros beyond the limb, in both images: no credit for them
    options = {"modality": "hmi", "northern_leader": 1}
    assert fidelity_scores([filled * 0.5], [filled], **options)["rmse"] == pytest.approx(
        fidelity_scores([truth * 0.5], [truth], **options)["rmse"]
    )
    quiet = np.where(disk_mask(SIZE), 2.0, np.nan)
    scores = fidelity_scores([quiet], [quiet], **options)
    assert scores["undefined"]["polarity_agreement"] == scores["undefined"]["ssim_strong"] == 1


def test_hales_law():
    north, south = bipole(1), bipole(1, row=16)
    for field, sign in ((north, 1), (south, -1)):
        polarity = hale_polarity(field, northern_leader=sign)
        strong = np.abs(np.nan_to_num(field)) > 100
        np.testing.assert_array_equal(polarity[strong], np.sign(field[strong]))
        np.testing.assert_array_equal(hale_polarity(-field, northern_leader=sign), polarity)  # strength, never sign
        np.testing.assert_array_equal(hale_polarity(field, northern_leader=-sign), -polarity)
        assert (polarity == 0).mean() > 0.9
    # 3 degrees south of the disk's centre, but north of the equator where B0 is 7 degrees
    near = bipole(1, row=29)
    tipped = hale_polarity(near, northern_leader=1, b0=7.0)
    np.testing.assert_array_equal(tipped, -hale_polarity(near, northern_leader=1, b0=-7.0))
    assert tipped[30, 36] == 1
    assert northern_leaders(["2012-01-01", np.datetime64("2019-11-30"), "2024-05-10"]) == [-1, -1, 1]
    scores = magnetogram_scores(north, north, northern_leader=-1)
    assert scores["polarity_agreement_hale"] == 0
    assert scores["polarity_gain_over_hale"] == 1
    with pytest.raises(ValueError, match="northern_leader"):
        hale_polarity(north, northern_leader=0)


def test_polarity_counts_no_opinion_by_half():
    assert polarity_agreement(np.array([1.0, -1.0, 0.0, 5.0]), np.array([9.0, 9.0, 9.0, 9.0])) == pytest.approx(0.625)
    assert np.isnan(polarity_agreement(np.array([]), np.array([])))


def test_crps_by_its_definition():
    rng = np.random.default_rng(0)
    samples, truth = rng.normal(size=(7, 50)), rng.normal(size=50)
    pairs = np.abs(samples[:, None] - samples[None]).sum(axis=(0, 1)) / (2 * 7 * 6)
    np.testing.assert_allclose(crps(samples, truth), np.abs(samples - truth).mean(axis=0) - pairs, atol=1e-12)
    np.testing.assert_allclose(crps(np.ones((3, 2)), np.array([1.0, 3.0])), [0.0, 2.0], atol=1e-12)
    # fair: its mean does not depend on the number of members; for a standard normal it is 1 / sqrt(pi)
    for members in (2, 8):
        drawn = crps(rng.normal(size=(members, 200_000)), rng.normal(size=200_000)).mean()
        assert drawn == pytest.approx(1 / np.sqrt(np.pi), abs=0.01), members
    with pytest.raises(ValueError, match="2 or more"):
        crps(samples[:1], truth)


@pytest.mark.parametrize(
    ("members", "expected"), [(2, 1 / 3), (4, 0.6), (8, 7 / 9), (9, 0.8), (19, 0.8), (30, 25 / 31)]
)
def test_coverage_of_a_right_ensemble_is_what_is_expected(members, expected):
    assert central_interval(members)[1] == pytest.approx(expected)
    rng = np.random.default_rng(members)
    # skewed, with a spread that differs from pixel to pixel
    scale = rng.gamma(2.0, 1.0, (SIZE, SIZE))
    drawn = scale * rng.exponential(size=(40, members, SIZE, SIZE))
    truth = scale * rng.exponential(size=(40, SIZE, SIZE))
    scores = [ensemble_scores(samples, image) for samples, image in zip(drawn, truth, strict=True)]
    mean = {name: np.mean([row[name] for row in scores]) for name in scores[0]}
    assert mean["coverage"] == pytest.approx(expected, abs=0.01)
    assert mean["spread_error_ratio"] == pytest.approx(1, abs=0.03)
    assert mean["spread_skill"] > 0.1


def test_a_spread_of_the_wrong_size_shows():
    rng = np.random.default_rng(0)
    truth, samples = rng.normal(size=(SIZE, SIZE)), rng.normal(size=(9, SIZE, SIZE))
    narrow = ensemble_scores(0.3 * samples, truth)
    right = ensemble_scores(samples, truth)
    assert narrow["coverage"] < 0.5 < right["coverage"]
    assert narrow["spread_error_ratio"] < 0.4
    assert narrow["crps"] > right["crps"]
    assert abs(right["spread_skill"]) < 0.1


def test_through_evaluate(metric):
    truth = sun(0, 3)
    truth[:, :5] = np.nan
    rng = np.random.default_rng(0)
    samples = truth[:, None] * rng.uniform(0.8, 1.3, (3, 4, 1, 1)) + rng.normal(0, 20, (3, 4, SIZE, SIZE))
    direct = fidelity_scores(samples.mean(axis=1), truth, modality="aia171", samples=samples)
    loaded = metric.compute(predictions=samples, references=truth, modality="aia171")
    assert loaded.pop("per_sample")["crps"] == pytest.approx(direct.pop("per_sample")["crps"])
    assert loaded.pop("undefined") == direct.pop("undefined") == {}
    assert loaded == pytest.approx(direct)
    assert loaded["members"] == 4
    assert set(score_names("aia171", ensemble=True)) <= set(loaded)
    single = metric.compute(predictions=samples[:, 0], references=truth, modality=171)
    assert "crps" not in single
    assert single["count"] == 3
    metric.add_batch(predictions=samples[:2, 0], references=truth[:2])
    metric.add(prediction=samples[2, 0], reference=truth[2])
    assert metric.compute(modality="0171")["correlation"] == pytest.approx(single["correlation"])
    json.dumps(loaded)


def test_means_take_the_intervals_of_the_bootstrap():
    truth = sun(0, 12)
    scores = fidelity_scores(truth * 0.9 + sun(5, 12) * 0.1, truth, modality="aia171")
    values = np.array(scores["per_sample"]["correlation_disk"])
    times = [f"2014-01-{day:02d}" for day in range(1, 13)]
    interval = block_bootstrap(np.mean, values, times=times, block="1D", num_resamples=100)
    assert interval.estimate == pytest.approx(scores["correlation_disk"])
    assert interval.low < interval.estimate < interval.high


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modality": "aia172"}, "modality: expected one of"),
        ({"modality": "hmi"}, "times: expected"),
        ({"modality": "hmi", "times": ["2013-01-01"]}, "one an image"),
        ({"modality": "aia171", "data_range": 0}, "data_range"),
        ({"modality": "aia171", "samples": np.zeros((2, 1, SIZE, SIZE))}, "m of 2 or more"),
    ],
)
def test_bad_options_are_refused(options, message):
    truth = sun(0, 2)
    with pytest.raises(ValueError, match=message):
        fidelity_scores(truth, truth, **options)


def test_bad_shapes_are_refused():
    with pytest.raises(ValueError, match="expected two arrays"):
        fidelity_scores(sun(0)[0], sun(0)[0], modality="aia171")
    with pytest.raises(ValueError, match="at least one"):
        fidelity_scores(np.zeros((0, 8, 8)), np.zeros((0, 8, 8)), modality="aia171")


def test_doctest_runs(metric):
    from solarchip_hf.evaluation.translation_fidelity import translation_fidelity

    text = translation_fidelity._KWARGS_DESCRIPTION
    test = doctest.DocTestParser().get_doctest(text, {}, "translation_fidelity", None, 0)
    assert len(test.examples) >= 8
    assert doctest.DocTestRunner().run(test).failed == 0


def test_metric_card_names_every_score():
    card = (FOLDER / "README.md").read_text()
    for name in (*score_names("hmi", ensemble=True), *score_names("aia171")):
        assert f"`{name}`" in card or name == "unsigned_flux_error_abs", name
    for name, value in DATA_RANGES.items():
        assert f"{name.removeprefix('aia')} {value:g}" in card or name in ("hmi", "aia304"), name
