"""Augmentation: the physics of the signs, one draw for all, no wedge, missing images left alone."""

import numpy as np
import pytest
import torch

from solarchip_hf.training.augmentation import AugmentationDraw, SolarAugmentation, rotate, sign_shifts

MODALITIES = ["hmi", "aia171", "aia304"]
STATISTICS = {"modalities": {"hmi": {"mean": -0.3, "std": 1.4}, "aia171": {"mean": 4.0, "std": 2.0}}}


def disk(size: int, radius: float) -> torch.Tensor:
    offset = torch.arange(size) - (size - 1) / 2
    return offset[:, None] ** 2 + offset**2 <= radius**2


@pytest.fixture
def batch() -> torch.Tensor:
    """(4, 3, 64, 64) z-scored images, zero outside the inscribed circle, the magnetogram zero off the disk."""
    torch.manual_seed(0)
    pixels = torch.randn(4, 3, 64, 64)
    pixels[:, 0] *= disk(64, 25)
    return pixels * disk(64, 32)


def test_shifts_come_from_the_statistics_of_signed_modalities():
    assert sign_shifts(MODALITIES, STATISTICS) == [pytest.approx(2 * -0.3 / 1.4), None, None]
    assert sign_shifts(["aia171", "hmi"], None) == [None, 0.0]


def test_reversed_sign_is_that_of_the_field_and_leaves_fill_alone(batch):
    augmentation = SolarAugmentation("solar", sign_shifts(MODALITIES, STATISTICS))
    result = augmentation.apply(batch, AugmentationDraw(reverse_polarity=True))
    field = lambda z: z * 1.4 - 0.3  # noqa: E731  the transformed field, an odd function of gauss
    on_disk = disk(64, 25)
    torch.testing.assert_close(field(result[:, 0])[:, on_disk], -field(batch[:, 0])[:, on_disk])
    assert (result[:, 0][:, ~on_disk] == 0).all()
    assert torch.equal(result[:, 1:], batch[:, 1:])
    torch.testing.assert_close(augmentation.apply(result, AugmentationDraw(reverse_polarity=True)), batch)


def test_north_south_flip_reverses_the_field_and_only_rows(batch):
    """Hale: after the flip each hemisphere's leading polarity must be what it was."""
    augmentation = SolarAugmentation("solar", [0.0, None, None], polarity_reversal=False, roll_degrees=0.0)
    draws = [augmentation.draw(7, step) for step in range(64)]
    assert {draw.flip_north_south for draw in draws} == {True, False}
    assert all(draw.reverse_polarity == draw.flip_north_south and not draw.flip_east_west for draw in draws)
    draw = next(draw for draw in draws if draw.flip_north_south)
    result = augmentation.apply(batch, draw)
    assert torch.equal(result[:, 1:], batch[:, 1:].flip(-2))
    torch.testing.assert_close(result[:, 0], -batch[:, 0].flip(-2))


def test_polarity_reversal_is_independent_of_the_flip():
    draws = [SolarAugmentation("solar").draw(0, step) for step in range(400)]
    counts = {
        key: sum((draw.flip_north_south, draw.reverse_polarity) == key for draw in draws)
        for key in [(True, True), (True, False), (False, True), (False, False)]
    }
    assert all(60 < count < 140 for count in counts.values()), counts
    angles = np.array([draw.angle for draw in draws])
    assert np.abs(angles).max() <= 3
    assert angles.std() == pytest.approx(3 / 3**0.5, rel=0.1)


def test_published_preset_flips_both_axes_and_turns_by_any_angle():
    draws = [SolarAugmentation("published").draw(0, step) for step in range(200)]
    assert {draw.flip_east_west for draw in draws} == {True, False} == {draw.flip_north_south for draw in draws}
    assert max(abs(draw.angle) for draw in draws) > 150
    assert not any(draw.reverse_polarity for draw in draws)
    assert SolarAugmentation("none").draw(0, 5) == AugmentationDraw()


def test_draws_depend_on_seed_step_and_micro_step_only(batch):
    augmentation = SolarAugmentation("solar", [0.1, None, None])
    assert augmentation.draw(3, 5, 1) == SolarAugmentation("solar").draw(3, 5, 1)
    assert len({augmentation.draw(*key) for key in [(3, 5, 1), (3, 5, 2), (3, 6, 1), (4, 5, 1)]}) == 4
    whole = augmentation(batch, 3, 5, 1)
    parts = torch.cat([augmentation(batch[:1], 3, 5, 1), augmentation(batch[1:], 3, 5, 1)])
    torch.testing.assert_close(whole, parts)


def test_rotation_is_counter_clockwise_and_exact_at_right_angles():
    image = torch.zeros(1, 1, 16, 16)
    image[0, 0, 8, 15] = 1.0  # due west, row 0 in the south: a turn by 90 degrees brings it to the north
    torch.testing.assert_close(rotate(image, 90.0)[0, 0, 15, 7], torch.tensor(1.0), atol=1e-4, rtol=0)
    random = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(rotate(random, 180.0, inscribed=False), random.flip(-1, -2), atol=1e-4, rtol=0)


def test_roll_keeps_smooth_images_and_leaves_no_wedge():
    offset = (torch.arange(64) - 31.5) / 32
    smooth = torch.exp(-3 * (offset[:, None] - 0.2) ** 2 - 3 * (offset - 0.1) ** 2)[None, None]
    back = rotate(rotate(smooth, 3.0), -3.0)
    inside = disk(64, 30)
    torch.testing.assert_close(back[0, 0][inside], smooth[0, 0][inside], atol=5e-3, rtol=0)
    assert (rotate(torch.ones(1, 1, 64, 64), 3.0)[0, 0][~disk(64, 32)] == 0).all()
    assert (rotate(torch.ones(1, 1, 64, 64), 3.0)[0, 0][disk(64, 31)] > 0.99).all()


def test_missing_image_of_nan_touches_no_other(batch):
    augmentation = SolarAugmentation("solar", [0.1, None, None])
    draw = AugmentationDraw(flip_north_south=True, reverse_polarity=True, angle=2.0)
    clean = augmentation.apply(batch, draw)
    broken = batch.clone()
    broken[1, 0] = torch.nan
    result = augmentation.apply(broken, draw)
    clean[1, 0] = result[1, 0] = 0
    assert torch.isfinite(result).all()
    torch.testing.assert_close(result, clean)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SolarAugmentation("mirror"), "expected one of solar, published, none, got 'mirror'"),
        (lambda: SolarAugmentation(roll_degrees=-1), "roll_degrees"),
        (lambda: SolarAugmentation().apply(torch.zeros(3, 8, 8), AugmentationDraw()), r"expected \(B, M, N, N\)"),
        (
            lambda: SolarAugmentation(shifts=[0.0]).apply(
                torch.zeros(1, 2, 8, 8), AugmentationDraw(reverse_polarity=True)
            ),
            "expected 1 modalities",
        ),
    ],
)
def test_errors_say_what_was_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call()
