"""Controls: header geometry, activity maps, the untrained network, each on cases whose answer is known."""

import numpy as np
import pytest
import torch
from tiny_run import MODALITIES, Blobs, tiny_model

from solarchip_hf.models.geometry import disk_mask
from solarchip_hf.training.controls import (
    activity_maps,
    add_controls,
    batches_of,
    compare_with_controls,
    correlation_similarity,
    embed_observations,
    geometry_similarity,
    settle_statistics,
    untrained_copy,
)
from solarchip_hf.training.retrieval import RetrievalTable, retrieval_scores

STATISTICS = {"modalities": {"hmi": {"mean": 0.1, "std": 1.5}, "aia171": {"mean": 4.0, "std": 2.0}}}


def test_geometry_resolves_what_a_tenth_of_a_pixel_shows():
    b0 = np.linspace(-7.25, 7.25, 100)
    radius = np.full(100, 960.0)
    fine = retrieval_scores(geometry_similarity(radius, b0, size=1024))
    coarse = retrieval_scores(geometry_similarity(radius, b0, size=128))
    # at 128 px a tenth of a pixel is .113 degrees of B0, less than the step of .146; at 32 px it is .45
    assert fine["recall@1"] == 1.0
    assert coarse["recall@1"] > 0.9
    assert 0.25 < retrieval_scores(geometry_similarity(radius, b0, size=32))["recall@1"] < 0.45
    equal = geometry_similarity(radius, np.zeros(100), size=128)
    assert retrieval_scores(equal)["recall@1"] == pytest.approx(0.01)
    other = geometry_similarity(radius, b0, size=1024, other_rsun_arcsec=radius, other_b0=b0[::-1])
    assert retrieval_scores(other)["recall@1"] < 0.05


def test_activity_maps_drop_sign_and_fill_and_what_all_share():
    random = np.random.default_rng(0)
    on_disk = disk_mask(64)
    field = random.normal(size=(5, 64, 64)) * on_disk
    maps = activity_maps(field, signed=True, mean=0.0, std=2.0)
    np.testing.assert_allclose(maps, activity_maps(-field, signed=True, mean=0.0, std=2.0))
    np.testing.assert_allclose(maps.mean(0), 0, atol=1e-6)
    assert maps.shape == (5, 32)  # cells with a quarter of disk or more
    first = np.abs(field[0] * 2.0).reshape(8, 8, 8, 8).mean((1, 3))
    shared = np.abs(field * 2.0).mean(0).reshape(8, 8, 8, 8).mean((1, 3))
    np.testing.assert_allclose(np.sort(maps[0])[-1], (first - shared).max(), rtol=1e-4)
    # a fill of exactly zero stays zero, whatever the statistics
    assert activity_maps(np.zeros((2, 64, 64)), signed=True, mean=5.0).max() == 0
    with pytest.raises(ValueError, match="divisible by 8"):
        activity_maps(np.zeros((2, 60, 60)), signed=False)


def test_correlation_is_pearsons():
    random = np.random.default_rng(1)
    queries, gallery = random.normal(size=(3, 20)), random.normal(size=(4, 20))
    np.testing.assert_allclose(
        correlation_similarity(queries, gallery), np.corrcoef(queries, gallery)[:3, 3:], atol=1e-12
    )


def test_activity_finds_blobs_and_geometry_the_day():
    data = Blobs(40, seed=2, size=64)
    table = add_controls(
        RetrievalTable(),
        data.pixel_values.numpy(),
        data.observed.numpy(),
        MODALITIES,
        anchor="hmi",
        statistics=STATISTICS,
        rsun_arcsec=np.linspace(945, 975, 40),
        b0=np.linspace(-7, 7, 40),
    )
    assert table.methods() == ["header geometry (R, B0)", "8 x 8 activity maps"]
    assert [row["gallery"] for row in table.rows] == [40, 32, 40, 32]
    assert table.mean("8 x 8 activity maps") > 0.8
    assert table.mean("header geometry (R, B0)") > 0.8
    without = add_controls(
        RetrievalTable(), data.pixel_values.numpy(), data.observed.numpy(), MODALITIES, rsun_arcsec=np.full(40, np.nan),
        b0=np.zeros(40),
    )  # fmt: skip
    assert without.methods() == ["8 x 8 activity maps"]


def test_untrained_copy_has_the_shape_and_other_weights_and_leaves_random_state_alone():
    model = tiny_model()
    state = torch.get_rng_state()
    other = untrained_copy(model, seed=5)
    assert torch.equal(state, torch.get_rng_state())
    ours, theirs = dict(model.named_parameters()), dict(other.named_parameters())
    assert {name: p.shape for name, p in ours.items()} == {name: p.shape for name, p in theirs.items()}
    weights = [name for name, p in ours.items() if p.ndim > 1]
    assert weights
    assert not any(torch.equal(ours[name], theirs[name]) for name in weights)
    again = dict(untrained_copy(model, seed=5).named_parameters())
    assert all(torch.equal(again[name], theirs[name]) for name in weights)


def test_settling_moves_running_statistics_and_no_weight():
    model = untrained_copy(tiny_model(), seed=1)
    weights = {name: p.clone() for name, p in model.named_parameters()}
    before = embed_observations(model, batches_of(Blobs(12), 8))["embeds"]
    settle_statistics(model, batches_of(Blobs(32), 8))
    after = embed_observations(model, batches_of(Blobs(12), 8))["embeds"]
    assert not model.training
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert after.mean(0).abs().mean() < 0.5 * before.mean(0).abs().mean() / before.std(0).mean()
    assert after.std(0).mean() == pytest.approx(1.0, abs=0.3)


def test_table_of_network_and_controls_on_one_gallery():
    pandas = pytest.importorskip("pandas")
    gallery = Blobs(14, seed=3, size=32)
    facts = pandas.DataFrame({"rsun_arcsec": np.linspace(945, 975, 14), "b0": np.linspace(-7, 7, 14)})
    table, held = compare_with_controls(
        tiny_model(), gallery, Blobs(16), statistics=STATISTICS, metadata=facts, limit=12, batch_size=5
    )
    assert table.methods() == [
        "class token",
        "patch similarity",
        "untrained class token",
        "untrained patch similarity",
        "header geometry (R, B0)",
        "8 x 8 activity maps",
    ]
    assert {row["gallery"] for row in table.rows if row["pair"] == "hmi / aia171"} == {12}
    assert held["embeds"].shape == (12, 3, 17, 16)
    assert held["pixel_values"].shape == (12, 3, 32, 32)
    assert not held["pixel_values"].isfinite().all()  # a missing image of NaN does no harm
