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
# Fractions of a pixel that weights are tabulated at.
_TABLE = 4096
# Displacement in input pixels below which a shear over the whole image is not worth a general resampling.
_NEGLIGIBLE = 1e-3
# Share of an output pixel's weight that must fall on valid input pixels.
_VALID_SHARE = 0.5


def _cubic(distance: np.ndarray) -> np.ndarray:
    """Keys' interpolation kernel with a = -1/2 at a distance in pixels.

    Source: R. Keys, IEEE Trans. ASSP 29 (1981) 1153.
    """
    d = np.abs(distance)
    inner = (1.5 * d - 2.5) * d * d + 1
    outer = ((-0.5 * d + 2.5) * d - 4) * d + 2
    return np.where(d < 1, inner, np.where(d < 2, outer, 0))


def _overlap(distance: np.ndarray, width: float) -> np.ndarray:
    """Share of an output pixel of `width` that a square input pixel at a distance covers."""
    high, low = np.minimum(distance + 0.5, width / 2), np.maximum(distance - 0.5, -width / 2)
    return np.maximum(high - low, 0) / width


def _fine_weights(fraction: np.ndarray, width: float) -> np.ndarray:
    """Weights (6, n) of the pixels -2 to 3 about positions, `fraction` after pixel 0, for a step `width` below 1.5."""
    area = min(max(2 * width - 1, 0), 1) / 3
    distance = np.arange(-2, 4)[:, None] - fraction
    cubic = (_cubic(distance - width / 4) + _cubic(distance + width / 4)) / 2
    return cubic + area * (_overlap(distance, width) - cubic)


def _axis_taps(centre: float, step: float, size: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices (K, size) into an axis of `length` pixels and float32 weights (K, size)."""
    width = abs(step)
    positions = centre + step * (np.arange(size) - (size - 1) / 2)
    if width < AVERAGING_STEP:
        index = np.floor(positions) + np.arange(-2, 4)[:, None]
        weights = _fine_weights(positions - np.floor(positions), width)
    else:
        index = np.floor(positions - width / 2 + 0.5) + np.arange(math.ceil(width) + 1)[:, None]
        weights = _overlap(index - positions, width)
    return np.clip(index, 0, length - 1).astype(np.intp), weights.astype(np.float32)


def _separable(image: np.ndarray, matrix: np.ndarray, origin: np.ndarray, size: int) -> np.ndarray:
    """Resamples (H, W) to (size, size) where the axes are parallel or opposite: rows, then columns."""
    for axis in (1, 0):
        index, weights = _axis_taps(origin[axis], matrix[axis, axis], size, len(image))
        result, term = (np.empty((size, image.shape[1]), dtype=np.float32) for _ in range(2))
        np.multiply(np.take(image, index[0], axis=0, out=term, mode="clip"), weights[0][:, None], out=result)
        for rows, weight in zip(index[1:], weights[1:], strict=True):
            np.take(image, rows, axis=0, out=term, mode="clip")
            term *= weight[:, None]
            result += term
        image = np.ascontiguousarray(result.T)
    return image


def _fine_samples(image: np.ndarray, x: np.ndarray, y: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Values of (H, W) at input positions `x`, `y` of one shape; `table` (6, n + 1) holds weights by the fraction."""
    height, width = image.shape
    lefts, weights = [], []
    for position in (x, y):
        left = np.floor(position)
        entry = np.rint((position - left) * (table.shape[1] - 1)).astype(np.int32)
        lefts.append(left.astype(np.int32))
        weights.append([np.take(row, entry) for row in table])
    columns = [np.clip(lefts[0] + tap, 0, width - 1) for tap in range(-2, 4)]
    result, line, term = (np.zeros(x.shape, dtype=np.float32) for _ in range(3))
    for tap, weight in zip(range(-2, 4), weights[1], strict=True):
        start = np.clip(lefts[1] + tap, 0, height - 1) * width
        line[:] = 0
        for column, column_weight in zip(columns, weights[0], strict=True):
            np.take(image, start + column, out=term, mode="clip")
            term *= column_weight
            line += term
        line *= weight
        result += line
    return result


def _running_sum(image: np.ndarray, count: int) -> np.ndarray:
    """Sums of `count` neighbouring rows, `count` - 1 rows fewer; by doubling, in about log2(count) passes."""
    power, width = image, 1  # sums of `width` rows
    total, reach = image[:0], 0
    while True:
        if count & 1:
            total = total[: len(power) - reach] + power[reach:] if reach else power
            reach += width
        count >>= 1
        if not count:
            return total
        power = power[:-width] + power[width:]
        width *= 2


def _bilinear(image: np.ndarray, along: list[np.ndarray], across: list[np.ndarray]) -> torch.Tensor:
    """Bilinear samples of (H, W) at x = along[0] + across[0], y = along[1] + across[1]; edges are repeated.

    `along` holds the parts that change along an output row, (columns,); `across` those that change from row to row.
    """
    grid = np.empty((len(across[0]), len(along[0]), 2), dtype=np.float32)
    for axis, length in ((0, image.shape[1]), (1, image.shape[0])):
        scale = 2 / length  # grid_sample counts from -1 to 1 over the frame
        start = (across[axis] * scale + (1 / length - 1)).astype(np.float32)
        np.add(start[:, None], (along[axis] * scale).astype(np.float32), out=grid[..., axis])
    tensor, points = torch.from_numpy(image)[None, None], torch.from_numpy(grid)[None]
    return F.grid_sample(tensor, points, mode="bilinear", padding_mode="border", align_corners=False)[0, 0]


def _turned(image: np.ndarray, matrix: np.ndarray, origin: np.ndarray, size: int, step: float) -> np.ndarray:
    """Resamples (H, W) to (size, size) for any matrix, a slice of output rows at a time.

    Most of it is NumPy, since hundreds of small torch operations would each wait for all of torch's threads.
    """
    samples = round(step) if step >= AVERAGING_STEP else 1
    running = min(samples, *image.shape) if step >= _RUNNING_MEAN_STEP else 1
    fine = samples if running == 1 else 1  # samples an output pixel has on a side
    offsets = (np.arange(size * fine) - (size * fine - 1) / 2) / fine
    along = [offsets * matrix[axis, 0] for axis in (0, 1)]
    across = [offsets * matrix[axis, 1] + origin[axis] for axis in (0, 1)]
    slant = float(np.abs(along[1]).max())  # input rows that one output row runs through, up or down
    rows = max(1, _SLICE // (size * fine * fine))
    if step < AVERAGING_STEP:
        rows = max(1, rows // 32)  # some thirty arrays of weights and indices are held beside the samples
        table = _fine_weights(np.linspace(0, 1, _TABLE + 1), step).astype(np.float32)
    elif running > 1:
        rows = min(rows, math.ceil(max(_CACHED_ROWS, 4 * slant) / step))
    result = np.empty((size, size), dtype=np.float32)
    for start in range(0, size, rows):
        part = slice(start * fine, min(start + rows, size) * fine)
        x, y = (values[part] for values in across)
        if step < AVERAGING_STEP:
            result[start : start + rows] = _fine_samples(image, x[:, None] + along[0], y[:, None] + along[1], table)
        elif running == 1:
            result[start : start + rows] = F.avg_pool2d(_bilinear(image, along, [x, y])[None], fine)[0].numpy()
        else:
            low = math.floor(float(y.min()) - slant - running / 2)
            high = math.ceil(float(y.max()) + slant + running / 2) + 1
            low = min(max(low, 0), image.shape[0] - running)
            high = min(max(high, low + running), image.shape[0])
            sums = _running_sum(_running_sum(image[low:high], running).T, running).T
            shift = (running - 1) / 2  # the first sum is centred there
            drawn = _bilinear(sums, along, [x - shift, y - (low + shift)]).numpy()
            np.divide(drawn, running**2, out=result[start : start + rows])
    return result


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
        if parallel:
            return _separable(values, matrix, origin, size)
        return _turned(values, matrix, origin, size, step)

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
