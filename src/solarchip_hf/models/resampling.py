"""One anti-aliased affine resampling of a float image, with invalid pixels kept apart from the valid ones.

The filter follows the step, the number of input pixels an output pixel is wide:

- below 1.5, the mean of 2 x 2 samples inside the output pixel by Keys' cubic interpolation, with a third of the
  integral over square input pixels mixed in (none when enlarging by two or more). On AIA's noisiest channel at a step
  of .98 this correlates by .9993 with either area-true reference, exact areas of square pixels and block means of a
  finer cubic registration, which agree with each other by .998 only;
- from 1.5 on, the mean over the output pixel's area. Where the axes are parallel that integral is taken exactly. A
  turned image is averaged over s x s bilinear samples inside the output pixel, s = round(step): samples one input pixel
  apart add up to the area integral, while samples two pixels apart let pixel noise through. From 3.5 on the same sum is
  had at a fraction of the cost by running means of s x s input pixels and one bilinear sample of them.
"""

import math

import numpy as np
import torch
from torch.nn import functional as F

# From this step (input pixels an output pixel) on, areas are averaged; below it, cubic samples.
AVERAGING_STEP = 1.5
# From this step on, running means replace many samples.
_RUNNING_MEAN_STEP = 3.5
# Pixels or samples that are held at a time: bounds the working set to a few times 4 MB, whatever the image.
_SLICE = 2**20
# Input rows of a slice of running means, which should stay in the processor's cache.
_CACHED_ROWS = 64
# Displacement in input pixels below which a shear over the whole image is not worth a general resampling.
_NEGLIGIBLE = 1e-3
# Share of an output pixel's weight that must fall on valid input pixels.
_VALID_SHARE = 0.5


def _cubic(distance: torch.Tensor) -> torch.Tensor:
    """Keys' interpolation kernel with a = -1/2 at a distance in pixels.

    Source: R. Keys, IEEE Trans. ASSP 29 (1981) 1153.
    """
    d = distance.abs()
    inner = (1.5 * d - 2.5) * d * d + 1
    outer = ((-0.5 * d + 2.5) * d - 4) * d + 2
    return torch.where(d < 1, inner, torch.where(d < 2, outer, torch.zeros_like(d)))


def _overlap(distance: torch.Tensor, width: float) -> torch.Tensor:
    """Share of an output pixel of `width` that a square input pixel at a distance covers."""
    high, low = (distance + 0.5).clamp(max=width / 2), (distance - 0.5).clamp(min=-width / 2)
    return (high - low).clamp_(min=0) / width


def _fine_weights(fraction: torch.Tensor, width: float) -> list[torch.Tensor]:
    """Weights of the pixels -2 to 3 about a position, `fraction` after pixel 0, for a step `width` below 1.5."""
    area = min(max(2 * width - 1, 0), 1) / 3
    weights = []
    for tap in range(-2, 4):
        distance = tap - fraction
        cubic = (_cubic(distance - width / 4) + _cubic(distance + width / 4)) / 2
        weights.append(cubic.lerp_(_overlap(distance, width), area))
    return weights


def _axis_taps(centre: float, step: float, size: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices (K, size) into an axis of `length` pixels and float32 weights (K, size)."""
    width = abs(step)
    positions = torch.from_numpy(centre + step * (np.arange(size) - (size - 1) / 2))
    if width < AVERAGING_STEP:
        index = positions.floor() + torch.arange(-2, 4)[:, None]
        weights = torch.stack(_fine_weights(positions - positions.floor(), width))
    else:
        index = (positions - width / 2 + 0.5).floor() + torch.arange(math.ceil(width) + 1)[:, None]
        weights = _overlap(index - positions, width)
    return index.clamp_(0, length - 1).long(), weights.float()


def _separable(image: torch.Tensor, matrix: np.ndarray, origin: np.ndarray, size: int) -> torch.Tensor:
    """Resamples (H, W) to (size, size) where the axes are parallel or opposite: rows, then columns."""
    for axis in (1, 0):
        index, weights = _axis_taps(origin[axis], matrix[axis, axis], size, image.shape[0])
        result = image.index_select(0, index[0]).mul_(weights[0, :, None])
        for tap in range(1, len(index)):
            result.addcmul_(image.index_select(0, index[tap]), weights[tap, :, None])
        image = result.T.contiguous()
    return image


def _fine_samples(image: torch.Tensor, x: torch.Tensor, y: torch.Tensor, step: float) -> torch.Tensor:
    """Values of (H, W) at input positions `x`, `y` of one shape, for a step below 1.5."""
    height, width = image.shape
    flat = image.reshape(-1)
    left, below = x.floor(), y.floor()
    across = _fine_weights(x - left, step)
    columns = [(left.long() + tap).clamp_(0, width - 1) for tap in range(-2, 4)]
    result = torch.zeros_like(x)
    for tap, weight in enumerate(_fine_weights(y - below, step)):
        row = (below.long() + (tap - 2)).clamp_(0, height - 1).mul_(width)
        line = torch.zeros_like(x)
        for column, column_weight in zip(columns, across, strict=True):
            line.addcmul_(flat[row + column], column_weight)
        result.addcmul_(line, weight)
    return result


def _running_sum(image: np.ndarray, count: int) -> np.ndarray:
    """Sums of `count` neighbouring rows, `count` - 1 rows fewer; by doubling, in about log2(count) passes."""
    total, reach = None, 0
    power, width = image, 1
    while True:
        if count & 1:
            total = power if total is None else total[: len(power) - reach] + power[reach:]
            reach += width
        count >>= 1
        if not count:
            return total
        power = power[:-width] + power[width:]
        width *= 2


def _bilinear(image: torch.Tensor, along: list[torch.Tensor], across: list[torch.Tensor]) -> torch.Tensor:
    """Bilinear samples of (H, W) at x = along[0] + across[0], y = along[1] + across[1]; edges are repeated.

    `along` holds the parts that change along an output row, (columns,); `across` those that change from row to row.
    """
    grid = torch.empty(len(across[0]), len(along[0]), 2)
    for axis, length in ((0, image.shape[1]), (1, image.shape[0])):
        scale = 2 / length  # grid_sample counts from -1 to 1 over the frame
        torch.add((across[axis] * scale + (1 / length - 1)).float()[:, None], (along[axis] * scale).float(),
                  out=grid[..., axis])  # fmt: skip
    return F.grid_sample(image[None, None], grid[None], mode="bilinear", padding_mode="border", align_corners=False)[
        0, 0
    ]


def _turned(image: torch.Tensor, matrix: np.ndarray, origin: np.ndarray, size: int, step: float) -> torch.Tensor:
    """Resamples (H, W) to (size, size) for any matrix, a slice of output rows at a time."""
    samples = round(step) if step >= AVERAGING_STEP else 1
    running = samples if step >= _RUNNING_MEAN_STEP else 1
    running = min(running, *image.shape)
    fine = samples if running == 1 else 1  # samples an output pixel has on a side
    offsets = torch.from_numpy((np.arange(size * fine) - (size * fine - 1) / 2) / fine)
    along = [offsets * matrix[axis, 0] for axis in (0, 1)]
    across = [offsets * matrix[axis, 1] + origin[axis] for axis in (0, 1)]
    slant = float(along[1].abs().max())  # input rows that one output row runs through, up or down
    rows = max(1, _SLICE // (size * fine * fine))
    if step < AVERAGING_STEP:
        rows = max(1, rows // 8)  # some thirty arrays of weights and indices are held beside the samples
    elif running > 1:
        rows = min(rows, math.ceil(max(_CACHED_ROWS, 4 * slant) / step))
    result, pixels = torch.empty(size, size), image.numpy()
    for start in range(0, size, rows):
        part = slice(start * fine, min(start + rows, size) * fine)
        x, y = (values[part] for values in across)
        if step < AVERAGING_STEP:
            columns, lines = (x[:, None] + along[0]).float(), (y[:, None] + along[1]).float()
            result[start : start + rows] = _fine_samples(image, columns, lines, step)
        elif running == 1:
            result[start : start + rows] = F.avg_pool2d(_bilinear(image, along, [x, y])[None], fine)[0]
        else:
            low = math.floor(float(y.min()) - slant - running / 2)
            high = math.ceil(float(y.max()) + slant + running / 2) + 1
            low = min(max(low, 0), image.shape[0] - running)
            high = min(max(high, low + running), image.shape[0])
            # NumPy here: a hundred small torch operations would each wait for all threads
            sums = _running_sum(_running_sum(pixels[low:high], running).T, running).T
            shift = (running - 1) / 2  # the first sum is centred there
            result[start : start + rows] = _bilinear(torch.from_numpy(sums), along, [x - shift, y - (low + shift)])
    return result.div_(running**2)


def _inside(matrix: np.ndarray, origin: np.ndarray, size: int, shape: tuple[int, int]) -> np.ndarray | None:
    """(size, size) bool: output pixels whose centre lies within the input frame; None where all do."""
    reach = (size - 1) / 2
    corners = origin[:, None] + matrix @ np.array([[-reach, -reach, reach, reach], [-reach, reach, -reach, reach]])
    limits = np.array([[shape[1]], [shape[0]]]) - 0.5
    if ((corners >= -0.5) & (corners <= limits)).all():
        return None
    steps = np.arange(size) - reach
    inside = np.ones((size, size), dtype=bool)
    for axis in (0, 1):
        position = origin[axis] + matrix[axis, 0] * steps[None, :] + matrix[axis, 1] * steps[:, None]
        inside &= (position >= -0.5) & (position <= limits[axis])
    return inside


def affine_resample(data: np.ndarray, matrix: np.ndarray, origin: np.ndarray, size: int) -> np.ndarray:
    """Resamples an image once, anti-aliased, conserving surface brightness.

    An output pixel at offset d = (column, row) - (size - 1) / 2 from the output's centre looks at the input position
    `origin + matrix @ d`. Non-finite input pixels are left out: a value is sum(w x m) / sum(w m), valid where valid
    pixels hold at least half of the weight.

    Args:
        data: (H, W) float32; NaN or infinite where invalid.
        matrix: 2 x 2, input pixels per output pixel; axes in the order (x, y), that is (column, row).
        origin: (2,) input position (x, y) of the output's centre; the centre of the first pixel is (0, 0).
        size: Output pixels on a side.

    Returns:
        (size, size) float32, NaN where invalid and outside the input frame.
    """
    matrix, origin = np.asarray(matrix, dtype=np.float64), np.asarray(origin, dtype=np.float64)
    data = np.ascontiguousarray(data, dtype=np.float32)
    if not data.flags.writeable:  # torch warns of memory that it could not write to
        data = data.copy()
    unmoved = np.abs(matrix - np.eye(2)).max() * size < _NEGLIGIBLE
    if unmoved and data.shape == (size, size) and np.abs(origin - (size - 1) / 2).max() < _NEGLIGIBLE:
        return np.where(np.isfinite(data), data, np.float32(np.nan))

    parallel = max(abs(matrix[0, 1]), abs(matrix[1, 0])) * size / 2 < _NEGLIGIBLE
    step = math.sqrt(abs(np.linalg.det(matrix)))

    def resample(values: np.ndarray) -> np.ndarray:
        image = torch.from_numpy(values)
        if parallel:
            return _separable(image, matrix, origin, size).numpy()
        return _turned(image, matrix, origin, size, step).numpy()

    if np.isfinite(data.sum(dtype=np.float32)):  # one pass; a NaN or an infinity anywhere shows in the sum
        result = resample(data)
    else:
        mask = np.isfinite(data)
        weight = resample(mask.astype(np.float32))
        result = resample(np.where(mask, data, np.float32(0)))
        result = np.divide(result, weight, out=np.full_like(result, np.nan), where=weight >= _VALID_SHARE)
    inside = _inside(matrix, origin, size, data.shape)
    if inside is not None:
        result[~inside] = np.nan
    return result


def resize(data: np.ndarray, size: int) -> np.ndarray:
    """Resizes as the published method does: NaN counts as zero, then an anti-aliased bilinear (triangle) filter.

    Args:
        data: (H, W) float32; NaN or infinite where invalid.
        size: Output pixels on a side.

    Returns:
        (size, size) float32; NaN where no valid pixel contributes.
    """
    data = np.ascontiguousarray(data, dtype=np.float32)
    mask = np.isfinite(data)

    def interpolate(image: np.ndarray) -> np.ndarray:
        if image.shape == (size, size):
            return image
        tensor = torch.from_numpy(image)[None, None]
        return F.interpolate(tensor, size=(size, size), mode="bilinear", antialias=True)[0, 0].numpy()

    result = interpolate(np.where(mask, data, np.float32(0)))
    if mask.all():
        return result
    return np.where(interpolate(mask.astype(np.float32)) > 0, result, np.float32(np.nan))


__all__ = ["AVERAGING_STEP", "affine_resample", "resize"]
