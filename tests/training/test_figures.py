"""Figures: drawn without a display, with the field's orientation, colours and limb; files that can be opened."""

import sys
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
from PIL import Image

from solarchip_hf.models.geometry import disk_mask
from solarchip_hf.training.figures import (
    colormap,
    reconstruction_figure,
    retrieval_figure,
    similarity_figure,
    spread,
    training_curves,
    write_figures,
)
from solarchip_hf.training.retrieval import RetrievalTable, retrieval_scores

MODALITIES = ["hmi", "aia171", "aia304"]
HISTORY = [
    *({"step": step, "cls_loss": 3 - step / 50, "reconstruction_loss": 1.0} for step in range(0, 50, 10)),
    {"step": 40, "eval_cls_loss": 2.9, "eval_patch_recall@1": 0.4, "eval_class_recall@1": 0.1},
]


@pytest.fixture
def images() -> np.ndarray:
    """(3, 64, 64): a bright spot in the north-west on a disk."""
    pixels = np.random.default_rng(0).normal(size=(3, 64, 64)) * disk_mask(64)
    pixels[:, 45:50, 40:45] += 6
    return pixels


def test_images_are_north_up_with_a_limb_and_missing_ones_are_said_so(images):
    figure = reconstruction_figure(images, images * 0.5, MODALITIES, observed=np.array([True, True, False]))
    panels = figure.axes[:9]
    shown = panels[1].images[0]
    assert shown.origin == "lower"
    np.testing.assert_allclose(shown.get_array(), images[1])
    limb = panels[1].patches[0]
    assert limb.center == (31.5, 31.5)
    assert limb.radius == pytest.approx(406.67 / 16)
    np.testing.assert_allclose(panels[7].images[0].get_array(), -0.5 * images[1])
    assert not panels[2].images
    assert [text.get_text() for text in panels[2].texts] == ["not observed"]
    low, high = panels[0].images[0].get_clim()
    assert low == -high  # a signed field is drawn about zero


def test_support_blanks_what_is_not_asked_for(images):
    support = np.stack([disk_mask(64)] * 3)
    shown = reconstruction_figure(images + 1, images, MODALITIES, support=support).axes[3].images[0].get_array()
    assert np.ma.getmaskarray(np.ma.masked_invalid(shown))[~disk_mask(64)].all()
    assert np.isfinite(shown[disk_mask(64)]).all()


def test_colours_are_sunpys_or_a_stand_in(monkeypatch):
    pytest.importorskip("sunpy")
    assert colormap("171").name.lower().startswith("sdo")
    assert colormap("hmi").name == "gray"
    monkeypatch.setitem(sys.modules, "sunpy.visualization.colormaps", None)
    assert colormap("aia171").name == "YlOrBr_r"


def test_similarity_is_drawn_in_time_order_in_days():
    times = [datetime(2015, 1, 1, tzinfo=UTC) + timedelta(hours=6 * index) for index in range(20)]
    figure = similarity_figure({"class token": np.eye(20), "patches": np.eye(20)}, times=times)
    panel = figure.axes[0]
    assert panel.images[0].origin == "lower"
    assert panel.images[0].get_extent() == [0, 4.75, 0, 4.75]
    assert "2015-01-01" in panel.get_xlabel()


def test_retrieval_bars_reach_the_scores():
    table = RetrievalTable()
    table.add("patch similarity", ("hmi", "aia171"), retrieval_scores(np.eye(4)))
    table.add("control", ("hmi", "aia171"), retrieval_scores(np.ones((4, 4))))
    axes = retrieval_figure(table).axes[0]
    assert sorted(bar.get_width() for bar in axes.patches) == [0.25, 1.0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["patch similarity", "control"]


def test_curves_show_the_terms_that_occur():
    figure = training_curves(HISTORY)
    assert [axes.get_title() for axes in figure.axes if axes.get_visible()] == [
        "class term",
        "reconstruction",
        "held-out recall@1",
    ]
    with pytest.raises(ValueError, match="at least one logged term"):
        training_curves([{"step": 1, "loss": 2.0}])


def test_spread_is_even_and_within_bounds():
    assert spread(10, 2) == [2, 7]
    assert spread(2, 5) == [0, 1]
    assert spread(0, 3) == []


def test_all_figures_are_written_and_not_blank(tmp_path, images):
    table = RetrievalTable()
    table.add("patch similarity", ("hmi", "aia171"), retrieval_scores(np.eye(4)))
    held = {"pixel_values": np.stack([images] * 4), "observed": np.ones((4, 3), dtype=bool)}
    written = write_figures(
        tmp_path / "figures",
        held,
        held["pixel_values"][:2],
        MODALITIES,
        table=table,
        similarities={"patches": np.eye(4)},
        log_history=HISTORY,
        note="a test",
    )
    assert [path.name for path in written] == [
        "reconstruction_0.png",
        "reconstruction_1.png",
        "similarity.png",
        "retrieval.png",
        "training.png",
    ]
    for path in written:
        with Image.open(path) as picture:
            assert min(picture.size) > 200
            assert len(np.unique(np.asarray(picture.convert("L")))) > 10
