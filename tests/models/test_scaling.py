"""Intensity transforms: invertible, sign-keeping, vectorised."""

import math

import numpy as np
import pytest

from solarchip_hf.models.scaling import SCALINGS, compress, expand, standardize, unstandardize

# Bounds of what SDO images hold: saturated AIA counts, sunspot fields, small negative counts.
VALUES = np.array([-3500, -30, -1, -1e-3, 0, 1e-3, 0.5, 1, 12, 950, 16383], dtype=np.float32)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_round_trip_keeps_values(scaling):
    image = np.broadcast_to(VALUES, (2, 3, len(VALUES)))
    back = unstandardize(standardize(image, 3.2, 1.7, scaling), 3.2, 1.7, scaling)
    assert back.shape == image.shape
    assert back.dtype == np.float32
    # the z-score's own rounding, about 1e-6 of the standard deviation, is what is left near zero
    np.testing.assert_allclose(back, image, rtol=1e-5, atol=2e-3 if scaling == "linear" else 2e-6)


def test_log1p_is_the_published_formula():
    expected = [math.copysign(math.log1p(abs(float(x))), float(x)) for x in VALUES]
    np.testing.assert_allclose(compress(VALUES), expected, rtol=1e-6)
    np.testing.assert_allclose(standardize(VALUES, -0.3, 2.0), (np.array(expected) + 0.3) / 2, rtol=1e-5, atol=1e-6)
    assert np.all(compress(-VALUES) == -compress(VALUES))


@pytest.mark.parametrize("scaling", SCALINGS)
def test_nan_stays_and_the_input_is_untouched(scaling):
    image = VALUES.copy()
    image[2] = np.nan
    before = image.copy()
    values = standardize(image, 1.0, 2.0, scaling)
    assert np.array_equal(np.isnan(values), np.isnan(image))
    assert np.isnan(expand(values, scaling)[2])
    assert np.array_equal(image, before, equal_nan=True)


def test_integers_are_taken_and_unknown_scalings_refused():
    assert compress(np.array([0, 9], dtype=np.int16)).dtype == np.float32
    with pytest.raises(ValueError, match=r"scaling: expected one of log1p, asinh, linear, got 'sqrt'"):
        compress(VALUES, "sqrt")
