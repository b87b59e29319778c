"""The table of channels, its aliases, and detection from a header."""

import json

import pytest

from solarchip_hf.models.header_cards import instrument_of
from solarchip_hf.models.modalities import (
    MODALITIES,
    MODALITY_NAMES,
    detect_modality,
    resolve_modality,
    wavelength_of,
)

AIA = {"TELESCOP": "SDO/AIA", "INSTRUME": "AIA_3", "WAVELNTH": 171, "CTYPE1": "HPLN-TAN", "CTYPE2": "HPLT-TAN"}
HMI = {"TELESCOP": "SDO/HMI", "INSTRUME": "HMI_FRONT2", "WAVELNTH": 6173.0, "CTYPE1": "HPLN-TAN", "CTYPE2": "HPLT-TAN"}


def test_table_has_the_eleven_channels_in_order():
    wavelengths = (94, 131, 171, 193, 211, 304, 335, 1600, 1700, 4500)
    assert list(MODALITY_NAMES) == ["hmi", *(f"aia{wavelength}" for wavelength in wavelengths)]
    for name, modality in MODALITIES.items():
        assert modality.name == name
        assert modality.signed == (name == "hmi")
        assert (modality.nominal_exposure is None) == (name == "hmi")
        assert modality.unit == ("G" if name == "hmi" else "DN")
    assert MODALITIES["aia4500"].cadence == 3600.0


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("0171", "aia171"),
        (171, "aia171"),
        ("171", "aia171"),
        ("171A", "aia171"),
        ("131A", "aia131"),
        ("AIA_171", "aia171"),
        ("aia 0094", "aia94"),
        ("AIA171", "aia171"),
        ("4500", "aia4500"),
        ("HMI", "hmi"),
        ("hmi_m", "hmi"),
        ("magnetogram", "hmi"),
    ],
)
def test_aliases(alias, name):
    assert resolve_modality(alias) == name


@pytest.mark.parametrize("alias", ["172", "", "hmi_v", "aia", "continuum", 0, "17100"])
def test_unknown_alias_names_the_choices(alias):
    with pytest.raises(ValueError, match="expected one of hmi, aia94"):
        resolve_modality(alias)


@pytest.mark.parametrize("wavelength", [m.wavelength for m in MODALITIES.values() if m.instrument == "aia"])
def test_every_aia_channel_is_detected(wavelength):
    assert detect_modality(AIA | {"WAVELNTH": wavelength}) == f"aia{wavelength}"
    assert detect_modality(AIA | {"WAVELNTH": str(float(wavelength))}) == f"aia{wavelength}"
    assert detect_modality({key.lower(): value for key, value in AIA.items()} | {"wavelnth": wavelength})


@pytest.mark.parametrize(
    ("unit", "value"), [("nm", 17.1), ("angstrom", 171), ("", 171), (None, 171), ("Angstrom", 171.0), ("m", 1.71e-8)]
)
def test_wavelength_unit(unit, value):
    header = AIA | {"WAVELNTH": value} | ({} if unit is None else {"WAVEUNIT": unit})
    assert wavelength_of(header) == pytest.approx(171.0)
    assert detect_modality(header) == "aia171"


@pytest.mark.parametrize("instrument", ["HMI_SIDE1", "HMI_FRONT2", "HMI_COMBINED"])
@pytest.mark.parametrize("unit", ["Gauss", "G", "Mx/cm^2", ""])
def test_hmi_is_told_by_content_not_by_unit(instrument, unit):
    header = HMI | {"INSTRUME": instrument, "BUNIT": unit}
    assert detect_modality(header | {"CONTENT": "MAGNETOGRAM"}) == "hmi"
    for content in ("CONTINUUM INTENSITY", "DOPPLERGRAM", "LINE WIDTH", "LINE DEPTH", "HMI observable"):
        assert detect_modality(header | {"CONTENT": content}) is None, content


def test_hmi_without_content_is_told_by_segment():
    assert detect_modality(HMI | {"DRMS_ID": "hmi.M_720s:123:magnetogram"}) == "hmi"
    assert detect_modality(HMI | {"DRMS_ID": "hmi.Ic_45s:123:continuum"}) is None
    assert detect_modality(HMI | {"BUNIT": "Gauss"}) is None


@pytest.mark.parametrize(
    "change",
    [
        {"HARPNUM": 377},
        {"CTYPE1": "CRLN-CEA", "CTYPE2": "CRLT-CEA"},
        {"TELESCOP": "SOHO", "INSTRUME": "MDI", "CONTENT": "MDI Full Disk 96m Magnetogram"},
        {"TELESCOP": "", "INSTRUME": ""},
    ],
)
def test_patches_projections_and_other_instruments_are_none(change):
    header = HMI | {"CONTENT": "MAGNETOGRAM"}
    assert detect_modality(header) == "hmi"
    assert detect_modality(header | change) is None


@pytest.mark.parametrize(
    ("cards", "name"),
    [
        ({"INSTRUME": "AIA_3"}, "AIA"),
        ({"TELESCOP": "SDO/AIA"}, "AIA"),
        ({"INSTRUME": "HMI_SIDE1"}, "HMI"),
        ({"TELESCOP": "SOHO", "CAMERA": "MDI"}, "MDI"),
        ({"INSTRUME": "SECCHI", "DETECTOR": "EUVI"}, "SECCHI"),
        ({"INSTRUME": "MAIAN"}, "MAIAN"),  # a name that only contains AIA
        ({}, ""),
    ],
)
def test_instrument(cards, name):
    assert instrument_of(cards) == name
    assert json.dumps(cards)
