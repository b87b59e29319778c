"""The three steps of examples/prepare_data.py, as a user calls them."""

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from astropy.io import fits

from solarchip_hf.data import load_observations

EXAMPLE = Path(__file__).parents[2] / "examples" / "prepare_data.py"


@pytest.fixture(scope="module")
def example(load_example):
    return load_example("prepare_data")


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """Four moments of AIA 171 and 193 and a page that is no image."""
    folder = tmp_path_factory.mktemp("archive")
    rng = np.random.default_rng(0)
    for day in range(4):
        time = datetime(2015, 1, 1, tzinfo=UTC) + timedelta(days=day)
        for wavelength in (171, 193):
            header = fits.Header(
                {"TELESCOP": "SDO/AIA", "INSTRUME": "AIA_3", "WAVELNTH": wavelength, "T_OBS": f"{time:%Y-%m-%dT%H:%M}",
                 "EXPTIME": 2.0, "QUALITY": 0, "CTYPE1": "HPLN-TAN", "CTYPE2": "HPLT-TAN", "CUNIT1": "arcsec",
                 "CUNIT2": "arcsec", "CRPIX1": 32.5, "CRPIX2": 32.5, "CRVAL1": 0.0, "CRVAL2": 0.0, "CDELT1": 38.4,
                 "CDELT2": 38.4, "CROTA2": 0.0, "RSUN_OBS": 960.0, "DSUN_OBS": 1.496e11}
            )  # fmt: skip
            pixels = rng.gamma(2.0, 100.0, (64, 64)).astype(np.float32)
            fits.PrimaryHDU(pixels, header).writeto(folder / f"{wavelength}_{day}.fits")
    (folder / "page.fits").write_text("<html></html>")
    return folder


def test_scan_pair_and_prepare_in_turn(example, archive, tmp_path, capsys):
    index, pairs, out = (str(tmp_path / name) for name in ("catalog.parquet", "pairs.parquet", "prepared"))
    example.main(["scan", str(archive), "--index", index])
    text = capsys.readouterr().out
    assert "9 files: 9 read now" in text
    assert "page.fits" in text
    assert "HTML" in text
    example.main(["pair", index, "--output", pairs, "--anchor", "171"])
    text = capsys.readouterr().out
    assert "9 files, 8 candidates, 8 used in 4 observations (4 complete)" in text
    assert "dropped 1: unreadable" in text
    assert len(pd.read_parquet(pairs)) == 4
    example.main(["prepare", pairs, out, "--size", "32", "--workers", "0"])
    text = capsys.readouterr().out
    assert "4 observations in 1 shards: {'train': 4}" in text
    assert "(2, 32, 32) torch.float32" in text
    assert len(load_observations(out)) == 4


def test_prepare_takes_the_folder_itself(example, archive, tmp_path, capsys):
    arguments = ["prepare", str(archive), str(tmp_path / "out"), "--anchor", "aia193", "--size", "32", "--workers", "0"]
    example.main([*arguments, "--modalities", "171", "193", "--dtype", "float32"])
    assert "4 observations" in capsys.readouterr().out
    assert load_observations(tmp_path / "out").modalities == ["aia171", "aia193"]


def test_errors_are_one_sentence_without_a_traceback(example, archive, tmp_path, capsys):
    index = str(tmp_path / "catalog.parquet")
    assert example.main(["pair", index]) == 2
    assert capsys.readouterr().err.startswith("prepare_data.py: catalogue: expected a Parquet file")
    assert example.main(["scan", str(archive), "--index", index]) == 0
    assert example.main(["pair", index, "--output", str(tmp_path / "pairs.parquet")]) == 2
    assert re.search(r"^prepare_data.py: anchor: expected a modality.*aia171", capsys.readouterr().err, re.MULTILINE)
    assert example.main(["pair", index, "--output", str(tmp_path / "nowhere" / "pairs.parquet")]) == 2
    assert "--output: expected a file in a folder that exists" in capsys.readouterr().err
