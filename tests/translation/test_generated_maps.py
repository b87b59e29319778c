"""Generated images as Maps and FITS files: the source's coordinates and time, honest cards, whole files."""

import hashlib
from datetime import datetime, timedelta

import astropy.units as u
import numpy as np
import pytest
import torch
from astropy.io import fits
from astropy.visualization import AsinhStretch, LinearStretch
from astropy.visualization.mpl_normalize import ImageNormalize
from sunpy.coordinates.utils import get_limb_coordinates
from sunpy.map import Map
from sunpy.map.sources import AIAMap, HMIMap
from tiny_pipeline import SIZE, tiny_pipeline

from solarchip_hf import SolarImageError, SyntheticSun, read_image, scan_archive
from solarchip_hf.translation import write_fits
from solarchip_hf.translation.figures import colorbar_ticks, translation_figure

RADIUS = 406.67 * SIZE / 1024


def generate(pipeline, image, num_samples=2, **options):
    generators = [torch.Generator().manual_seed(index) for index in range(num_samples)]
    options = {"num_inference_steps": 2, "num_samples": num_samples, "generator": generators, **options}
    return pipeline(image, output_type="map", **options)


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """Files of a synthetic Sun by channel."""
    folder = tmp_path_factory.mktemp("archive")
    sun = SyntheticSun(seed=0, start="2014-06-01", days=1, size=128)
    sun.write_archive(folder, sun.times("1D")[:1], ["hmi", "aia171"], progress=False)
    return {"hmi": next(folder.rglob("hmi*.fits")), "aia171": next(folder.rglob("*_0171.fits"))}


@pytest.fixture(scope="module")
def from_hmi(archive):
    return generate(tiny_pipeline(), archive["hmi"])


@pytest.mark.parametrize(("source", "target", "kind"), [("hmi", "aia171", AIAMap), ("aia171", "hmi", HMIMap)])
def test_the_file_opens_in_sunpy_with_the_sources_coordinates(archive, tmp_path, source, target, kind):
    pipeline = tiny_pipeline(sources=(source,), target=target)
    output = generate(pipeline, archive[source])
    path = write_fits(output.prediction[0], tmp_path / "made" / "generated.fits")
    generated, observed = Map(path), Map(archive[source])
    assert type(generated) is kind
    assert generated.dimensions == output.prediction[0].dimensions
    assert np.array_equal(generated.data, output.prediction[0].data, equal_nan=True)
    # The same Sun, seen from the same place at the same time
    assert abs(generated.reference_date - observed.reference_date) < 1 * u.ms
    assert abs(generated.observer_coordinate.radius / observed.observer_coordinate.radius - 1) < 1e-5
    assert abs(generated.observer_coordinate.lat - observed.observer_coordinate.lat) < 1e-4 * u.deg
    # The limb that sunpy computes lies where the canonical grid has it
    edge = generated.world_to_pixel(get_limb_coordinates(generated.observer_coordinate, generated.rsun_meters))
    distance = np.hypot(*(axis.to_value("pix") - (SIZE - 1) / 2 for axis in edge))
    assert np.abs(distance - RADIUS).max() < 0.01
    # The strongest pixel of the source file, by sunpy's coordinates alone, is as strong where it comes to lie
    row, column = np.unravel_index(np.nanargmax(np.abs(observed.data)), observed.data.shape)
    place = generated.world_to_pixel(observed.pixel_to_world(column * u.pix, row * u.pix))
    column, row = (round(axis.to_value("pix")) for axis in place)
    _, canonical = pipeline.image_processor.to_physical(archive[source])
    around = np.abs(canonical[row - 1 : row + 2, column - 1 : column + 2])
    assert np.nanmax(around) > 0.9 * np.nanmax(np.abs(canonical))


def test_cards_say_that_it_is_generated_from_what_and_by_which_weights(archive, tmp_path):
    pipeline = tiny_pipeline(sources=("hmi", "aia171"), target="aia304")
    pipeline.save_pretrained(tmp_path / "solarchip" / "corona")
    pipeline = type(pipeline).from_pretrained(tmp_path / "solarchip" / "corona")
    pipeline.set_progress_bar_config(disable=True)
    output = generate(pipeline, archive, guidance_scale=2.0)
    with fits.open(write_fits(output.prediction[0], tmp_path / "generated.fits"), checksum=True) as units:
        units.verify("exception")
        assert len(units) == 1  # sunpy makes one Map of it, not a list
        header = units[0].header
        assert (units[0].verify_checksum(), units[0].verify_datasum()) == (1, 1)
        assert units[0].data.dtype == np.dtype(">f4")
    assert header["GENERATD"] is True
    assert header["CREATOR"] == "solarchip_hf.SolarChipControlNetPipeline"
    assert (header["MODEL"], header["MODELREV"]) == ("solarchip/corona", "local")
    assert header["WEIGHTS"] == pipeline.weights_digest()
    assert (header["SCHEDULR"], header["GENSTEPS"], header["GUIDANCE"]) == ("UniPCMultistepScheduler", 2, 2.0)
    assert (header["PHOTOMET"], header["DEGRADAT"], header["GEOMETRY"]) == ("nominal", "none", "rsun")
    assert (header["BUNIT"], header["EXPTIME"], header["WAVELNTH"]) == ("DN", 2.9, 304)
    assert header["GENKIND"] == "mean of 2 samples"
    assert header["NSOURCES"] == 2
    for index, name in enumerate(("hmi", "aia171"), start=1):
        assert header[f"SRCMOD{index}"] == name
        assert header[f"SRCFIL{index}"] == archive[name].name
        assert header[f"SRCSHA{index}"] == hashlib.sha256(archive[name].read_bytes()).hexdigest()
        assert header[f"SRCHAS{index}"] == "file"
        assert header[f"SRCCRE{index}"] == "solarchip_hf.data.SyntheticSun"  # of a synthetic Sun, and it says so
    assert "drawn by a diffusion model" in " ".join(header["HISTORY"])
    assert header["HISTORY"][2].startswith("Translated to ")
    assert "from a SYNTHETIC image of" in header["HISTORY"][2]
    assert str(tmp_path) not in header.tostring()  # no paths of this machine
    # From the first of HMI's 720 s to its last; AIA's two seconds lie within
    times = [read_image(archive[name]).time.replace(tzinfo=None) for name in ("hmi", "aia171")]
    assert header["TIMESYS"] == "UTC"
    begin, middle, end = (datetime.fromisoformat(header[f"DATE-{part}"]) for part in ("BEG", "AVG", "END"))
    assert abs(middle - times[0]) < timedelta(milliseconds=1)
    assert abs(begin - (times[0] - timedelta(seconds=360))) < timedelta(milliseconds=1)
    assert abs(end - (times[0] + timedelta(seconds=360))) < timedelta(milliseconds=1)


def test_uncertainty_and_samples_are_maps_too(from_hmi):
    assert len(from_hmi.prediction) == len(from_hmi.uncertainty) == len(from_hmi.samples) == 1
    stack = np.stack([image.data for image in from_hmi.samples[0]])
    np.testing.assert_allclose(from_hmi.prediction[0].data, stack.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(from_hmi.uncertainty[0].data, stack.std(axis=0, ddof=1), rtol=1e-4, atol=1e-4)
    kinds = [image.meta["genkind"] for image in (*from_hmi.samples[0], from_hmi.uncertainty[0])]
    assert kinds == ["sample 1 of 2", "sample 2 of 2", "standard deviation of 2 samples"]
    assert from_hmi.uncertainty[0].meta["content"] == "UNCERTAINTY"
    assert from_hmi.uncertainty[0].unit == u.DN


def test_what_is_not_a_file_is_known_by_its_pixels(archive):
    pipeline = tiny_pipeline(sources=("aia171",), target="hmi")
    observed = Map(archive["aia171"])
    cards = generate(pipeline, observed, 1).prediction[0].meta
    assert (cards["srcfil1"], cards["srchas1"]) == ("AIAMap", "pixels")
    assert cards["srcsha1"] == hashlib.sha256(observed.data.astype("<f4").tobytes()).hexdigest()
    content = archive["aia171"].read_bytes()
    cards = generate(pipeline, content, 1).prediction[0].meta
    assert (cards["srchas1"], cards["srcsha1"]) == ("file", hashlib.sha256(content).hexdigest())
    assert generate(pipeline, content, 1).uncertainty is None


def test_a_generated_file_is_never_taken_for_an_observation(from_hmi, tmp_path):
    path = write_fits(from_hmi.prediction[0], tmp_path / "generated.fits")
    row = scan_archive(tmp_path).iloc[0]
    assert not row["usable"]
    assert "QUALITY bit 31" in row["reason"]
    with pytest.raises(SolarImageError, match="an image that a pipeline generated"):
        tiny_pipeline(sources=("aia171",), target="hmi")(path, 2)


def test_files_are_whole_and_never_overwritten_silently(from_hmi, tmp_path):
    path = write_fits(from_hmi.prediction[0], tmp_path / "generated.fits")
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match=r"generated\.fits: expected no such file.*overwrite=True"):
        write_fits(from_hmi.uncertainty[0], path)
    assert path.read_bytes() == before
    write_fits(from_hmi.uncertainty[0], path, overwrite=True)
    assert path.read_bytes() != before
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(OSError, match="folder"):
        write_fits(from_hmi.prediction[0], folder, overwrite=True)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["folder", "generated.fits"]


def test_a_name_that_ends_in_gz_gives_a_compressed_file(from_hmi, tmp_path):
    path = write_fits(from_hmi.prediction[0], tmp_path / "generated.fits.gz")
    assert path.read_bytes()[:2] == b"\x1f\x8b"
    assert np.array_equal(fits.getdata(path), from_hmi.prediction[0].data, equal_nan=True)
    assert list(tmp_path.iterdir()) == [path]


def test_real_files_are_translated(sdo_folder, tmp_path):
    path = sdo_folder / "AIAsynoptic0171.fits"
    output = generate(tiny_pipeline(sources=("aia171",), target="hmi"), path)
    generated, observed = Map(write_fits(output.prediction[0], tmp_path / "made.fits")), Map(path)
    assert abs(generated.reference_date - observed.reference_date) < 2 * u.s
    assert abs(generated.rsun_obs / observed.rsun_obs - 1) < 1e-4
    assert "srccre1" not in generated.meta
    quicklook = sorted(sdo_folder.glob("2021_06_01__*171.jp2"))[0]
    history = generate(tiny_pipeline(sources=("aia171",), target="hmi"), quicklook, 1).prediction[0].meta["history"]
    assert "from an approximate quick-look of aia171" in history


def test_the_figure_draws_the_limb_on_every_panel(archive, from_hmi, tmp_path):
    processor = tiny_pipeline().image_processor
    facts, physical = processor.to_physical(archive["hmi"])
    given = {"hmi": processor.to_map(physical, "hmi", facts)}
    figure = translation_figure(given, from_hmi.prediction[0], from_hmi.uncertainty[0], "aia171", "synthetic")
    figure.savefig(tmp_path / "figure.png")
    panels = [axes for axes in figure.axes if axes.get_title()]
    expected = ["given: HMI magnetogram", "generated: AIA 171 Å", "spread of the samples"]
    assert [axes.get_title() for axes in panels] == expected
    assert [axes.images[0].get_cmap().name for axes in panels] == ["gray", "sdoaia171", "sdoaia171"]
    bars = [axes for axes in figure.axes if axes.get_ylabel() in ("G", "DN")]
    assert len(bars) == 3
    for bar in bars:
        labels = [label.get_text() for label in bar.get_yticklabels()]
        assert len(labels) > 2
        assert all(label.strip("-0.") in ("", "1", "2", "3", "5") for label in labels), labels
    for axes in panels:
        (edge,) = [patch for patch in axes.patches if len(patch.get_path().vertices) > 3]
        (outline,) = edge.get_transform().transform_path(edge.get_path()).to_polygons()
        points = axes.transData.inverted().transform(outline)
        assert np.abs(np.hypot(*(points - (SIZE - 1) / 2).T) - RADIUS).max() < 0.1


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0.0, 2580.0, [0, 100, 200, 500, 1000, 2000]), (-100.0, 100.0, [-100, -50, 0, 50, 100]), (0.0, 6.9, None)],
)
def test_colour_bars_have_round_numbers_that_lie_apart(low, high, expected):
    stretch = AsinhStretch(0.05) if low == 0 else LinearStretch()
    norm = ImageNormalize(vmin=low, vmax=high, stretch=stretch, clip=False)
    ticks = colorbar_ticks(low, high, norm)
    assert expected is None or ticks == expected
    assert np.diff(norm(ticks)).min() >= 0.1
