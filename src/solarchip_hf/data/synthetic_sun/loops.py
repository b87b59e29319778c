"""Coronal loops: arcs in three dimensions between the fragments of the photospheric field."""

import math
from dataclasses import dataclass

import numpy as np
from scipy.ndimage import gaussian_filter

from .ephemeris import surface_to_observer
from .magnetogram import MagneticSurface
from .state import LOOPS, generator

MEGAMETRES_PER_RADIUS = 696.0
SCALE_HEIGHT = 47.0  # Mm at 1 MK, hydrostatic
EPOCH_DAYS = 0.5  # days between two independent sets of loops of a region
SLOTS = 32  # loops of a large region
LINKS = 6  # loops to a neighbouring region
LINK_REACH = 40.0  # degrees
FAN_SHARE, WARM_SHARE = 0.20, 0.30


@dataclass(frozen=True, eq=False)
class LoopPoints:
    """Points along loops, in the observer's frame.

    Attributes:
        position: (3, P) in solar radii: west, north, towards the observer.
        log_temperature: (P,) log10 of kelvin.
        emission: (P,) relative emission measure times length.
    """

    position: np.ndarray
    log_temperature: np.ndarray
    emission: np.ndarray


@dataclass(frozen=True, eq=False)
class _Arcs:
    """Loops before they are sampled: arrays (..., K) over the loops."""

    feet: np.ndarray  # (2, 3, K)
    lean: np.ndarray
    rise: np.ndarray
    emission: np.ndarray
    log_peak: np.ndarray
    isothermal: np.ndarray  # 1 for warm loops
    fan: np.ndarray  # 1 for those of which only the near leg shines


def coronal_loops(magnetic: MagneticSurface, size: int) -> LoopPoints | None:
    """All loops of the visible regions and between neighbours.

    Args:
        magnetic: The field of the visible hemisphere.
        size: Pixels across the image: a larger one gets more points along a loop, not other loops.

    Returns:
        The points, or None where there is no region.
    """
    if not magnetic.regions:
        return None
    draws, weights = _draws(magnetic)
    arcs = [_region_arcs(magnetic, draws, weights)]
    links = _links(magnetic, draws, weights)
    if links is not None:
        arcs.append(links)
    joined = _Arcs(*(np.concatenate([getattr(a, f) for a in arcs], axis=-1) for f in _Arcs.__dataclass_fields__))
    return _trace(joined, samples=int(21 * max(1.0, size / 128.0)))


def _draws(magnetic: MagneticSurface) -> tuple[np.ndarray, np.ndarray]:
    """Random numbers of the two sets of loops that every region has at a time, and their weights: one fades, one grows.

    Returns:
        (R, 11, 2 x (SLOTS + LINKS)) uniform in [0, 1), and (R, 2 x (SLOTS + LINKS)).
    """
    slots = SLOTS + LINKS
    draws = np.empty((len(magnetic.regions), 11, 2, slots))
    weights = np.empty((len(magnetic.regions), 2, slots))
    for row, visible in enumerate(magnetic.regions):
        region = visible.region
        position = (magnetic.days - region.emergence) / EPOCH_DAYS
        epoch = math.floor(position)
        for step in (0, 1):
            draws[row, :, step] = generator(region.seed, LOOPS, region.number, epoch + step).random((11, slots))
        weights[row, 0], weights[row, 1] = 1.0 - (position - epoch), position - epoch
    return draws.reshape(len(draws), 11, -1), weights.reshape(len(draws), -1)


def _part(array: np.ndarray, links: bool) -> np.ndarray:
    """The slots of the regions' own loops, or of their links, out of the last axis."""
    split = array.reshape(*array.shape[:-1], 2, SLOTS + LINKS)
    chosen = split[..., SLOTS:] if links else split[..., :SLOTS]
    return chosen.reshape(*array.shape[:-1], -1)


def _pick(flux: np.ndarray, sign: int, uniform: np.ndarray) -> np.ndarray:
    """(R, K) indices of fragments of one polarity, drawn in proportion to their flux (R, F)."""
    cumulative = np.cumsum(np.clip(sign * flux, 0.0, None), axis=1)
    return (cumulative[:, None, :] <= (uniform * cumulative[:, -1:])[..., None]).sum(-1).clip(max=flux.shape[1] - 1)


def _region_arcs(magnetic: MagneticSurface, draws: np.ndarray, weights: np.ndarray) -> _Arcs:
    regions = magnetic.regions
    uniform, weight = np.moveaxis(_part(draws, False), 1, 0), _part(weights, False)  # (11, R, K), (R, K)
    latitude = np.stack([r.latitude for r in regions])
    longitude = np.stack([r.longitude for r in regions])
    flux = np.stack([r.fragment_flux for r in regions])
    widths = np.stack([r.widths for r in regions])
    total = np.array([r.flux for r in regions])[:, None]
    stress = np.minimum(np.array([r.stress for r in regions]), 3.0)[:, None]
    shear = np.array([r.shear for r in regions])[:, None]
    flaring = np.array([r.flaring for r in regions])[:, None]
    age = np.array([magnetic.days - r.region.emergence for r in regions])[:, None]
    north = np.where(np.array([r.region.latitude for r in regions]) >= 0, 1.0, -1.0)[:, None]

    kind = uniform[8]
    fan, warm = kind < FAN_SHARE, (kind >= FAN_SHARE) & (kind < FAN_SHARE + WARM_SHARE)
    ends = []
    for sign, choice, east_west, north_south in ((1, 0, 2, 3), (-1, 1, 4, 7)):
        picked = _pick(flux, sign, uniform[choice])
        spread = np.sqrt(0.25 * total**0.4 + np.take_along_axis(widths, picked, 1) ** 2)
        ends.append(
            [
                np.take_along_axis(latitude, picked, 1)
                + (2.0 * uniform[north_south] - 1.0) * spread
                + sign * north * 1.5 * shear,
                np.take_along_axis(longitude, picked, 1) + (2.0 * uniform[east_west] - 1.0) * spread,
            ]
        )
    # A fan leaves the region: its far end lies 6 to 20 degrees outwards from the region's middle
    middle = np.stack([latitude.mean(1), longitude.mean(1)])[..., None]
    outward = np.arctan2(ends[0][0] - middle[0], ends[0][1] - middle[1]) + 1.2 * (uniform[9] - 0.5)
    distance = (6.0 + 14.0 * uniform[10]) * total**0.15
    ends[1][0] = np.where(fan, ends[0][0] + distance * np.sin(outward), ends[1][0])
    ends[1][1] = np.where(fan, ends[0][1] + distance * np.cos(outward), ends[1][1])

    feet = np.stack([surface_to_observer(end[0], end[1], magnetic.view.b0) for end in ends])  # (2, 3, R, K)
    chord = np.linalg.norm(feet[0] - feet[1], axis=0) + 1e-3
    length = 1.6 * chord * MEGAMETRES_PER_RADIUS
    heating = np.exp(0.45 * _normal(uniform[9], uniform[10])) * (1.0 + 0.8 * stress)
    # Mean field over the region's extent; peak temperature and emission measure of a static loop whose heating goes as
    # B/L (Rosner, Tucker & Vaiana 1978; Mandrini, Demoulin & Klimchuk 2000).
    extent = 2.5 * (total + 1.0) ** 0.4 * 1.2147e9  # cm
    mean_field = 8.0 + 1.6 * total * 1e21 / extent**2
    log_peak = np.log10(2.1e6 * (mean_field * length / 3000.0 * heating) ** (2.0 / 7.0))
    emission = (mean_field / 60.0) ** (8.0 / 7.0) * (length / 50.0) ** -0.9 * heating ** (8.0 / 7.0)
    # Some loops are warm, denser than static balance and nearly isothermal (Aschwanden et al. 2000); fans are cool.
    log_peak = np.where(warm, 5.85 + 0.4 * (kind - FAN_SHARE) / WARM_SHARE, log_peak)
    log_peak = np.where(fan, 5.80 + 0.6 * kind, log_peak)
    emission = np.where(fan, 0.5 * mean_field / 60.0, emission)
    hot = kind > 0.97 - 0.10 * stress / 3.0
    log_peak = np.where(hot, 6.85, log_peak)
    rise = 0.35 + 0.5 * uniform[6]
    # Flare loops: low, at the core, at 10 MK; their emission measure follows the soft X-rays.
    flare_loop = (kind > 0.75) & (flaring > 1e-6)
    log_peak = np.where(flare_loop, 7.02, log_peak)
    rise = np.where(flare_loop, 0.35, rise)
    emission = emission + np.where(flare_loop, 12.0 * flaring / 1e-5, 0.0)

    count = np.clip(6.0 + 5.0 * np.sqrt(total), 6, SLOTS) * np.minimum(1.0, age / 1.5)
    rank = np.tile(np.arange(SLOTS), 2)
    emission = emission * weight * np.clip(count - rank, 0.0, 1.0)
    lean = (uniform[5] - 0.5) * 0.7 + north * 0.5 * shear
    kept = emission > 1e-4
    return _Arcs(feet[:, :, kept], *(a[kept] for a in (lean, rise, emission, log_peak, warm * 1.0, fan * 1.0)))


def _links(magnetic: MagneticSurface, draws: np.ndarray, weights: np.ndarray) -> _Arcs | None:
    """Long, faint, warm loops from each region to its two nearest neighbours."""
    strong = [row for row, visible in enumerate(magnetic.regions) if visible.flux > 0.5]
    if len(strong) < 2:
        return None
    regions = [magnetic.regions[row] for row in strong]
    latitude = np.stack([r.latitude for r in regions])
    longitude = np.stack([r.longitude for r in regions])
    flux = np.stack([r.fragment_flux for r in regions])
    middle = np.stack([latitude.mean(1), longitude.mean(1)])
    distance = np.hypot(*(middle[:, :, None] - middle[:, None, :]))
    np.fill_diagonal(distance, np.inf)
    nearest = np.argsort(distance, axis=1, kind="stable")[:, :2]
    uniform, weight = np.moveaxis(_part(draws, True)[strong], 1, 0), _part(weights, True)[strong]  # (11, R, K)
    partner = np.where(uniform[8] < 0.5, nearest[:, :1], nearest[:, -1:])  # (R, K)
    start = _pick(flux, 1, uniform[0])
    cumulative = np.cumsum(np.clip(-flux, 0.0, None), axis=1)[partner]  # (R, K, F)
    end = (cumulative <= (uniform[1] * cumulative[..., -1])[..., None]).sum(-1).clip(max=flux.shape[1] - 1)
    feet = np.stack(
        [
            surface_to_observer(
                np.take_along_axis(latitude, start, 1) + 3.0 * (uniform[2] - 0.5),
                np.take_along_axis(longitude, start, 1) + 3.0 * (uniform[3] - 0.5),
                magnetic.view.b0,
            ),
            surface_to_observer(
                latitude[partner, end] + 3.0 * (uniform[4] - 0.5),
                longitude[partner, end] + 3.0 * (uniform[7] - 0.5),
                magnetic.view.b0,
            ),
        ]
    )
    strength = np.array([r.flux for r in regions])
    near = np.take_along_axis(distance, partner, 1)
    emission = 0.12 * np.sqrt(np.minimum(strength[:, None], strength[partner])) * weight
    emission = emission * np.exp(0.4 * _normal(uniform[9], uniform[10])) * np.clip((LINK_REACH - near) / 10.0, 0.0, 1.0)
    kept = emission > 1e-4
    return _Arcs(
        feet[:, :, kept],
        *(
            array[kept]
            for array in (
                0.6 * (uniform[5] - 0.5),
                0.3 + 0.2 * uniform[6],
                emission,
                5.95 + 0.4 * uniform[9],
                np.ones_like(emission),
                np.zeros_like(emission),
            )
        ),
    )


def _normal(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Normal numbers from two uniform ones (Box and Muller)."""
    return np.sqrt(-2.0 * np.log(1.0 - first)) * np.cos(2.0 * math.pi * second)


def _trace(arcs: _Arcs, samples: int) -> LoopPoints:
    along = np.linspace(0.0, 1.0, samples)
    first, second = arcs.feet
    chord = np.linalg.norm(first - second, axis=0) + 1e-3
    normal = np.cross(first, second, axis=0)
    normal /= np.linalg.norm(normal, axis=0) + 1e-9
    base = first[..., None] * (1.0 - along) + second[..., None] * along  # (3, K, samples)
    base /= np.linalg.norm(base, axis=0)
    arch = np.sin(math.pi * along) * (chord * arcs.rise)[:, None]
    position = base * (1.0 + arch) + normal[..., None] * (arcs.lean[:, None] * arch)
    # Conduction keeps most of a loop near its peak temperature; towards the feet it falls as u**(1/3).
    fall = np.log10(np.clip(4.0 * along * (1.0 - along), 0.02, 1.0)) / 3.0
    cool = np.maximum(arcs.isothermal, arcs.fan)[:, None] > 0
    temperature = arcs.log_peak[:, None] + np.where(cool, 0.25, 1.0) * fall
    emission = (arcs.emission * chord / 0.08)[:, None] * np.where(arcs.fan[:, None] > 0, np.exp(-along / 0.25), 1.0)
    height = arch * MEGAMETRES_PER_RADIUS / (SCALE_HEIGHT * 10.0 ** (temperature - 6.0))
    emission = emission * np.exp(-height) * (21.0 / samples)
    return LoopPoints(position.reshape(3, -1), temperature.ravel(), emission.ravel())


def draw_loops(loops: LoopPoints | None, plate, passbands: dict) -> dict[str, np.ndarray]:
    """Projects loops on a plate.

    Args:
        loops: Points along the loops, or None.
        plate: The `Plate` to draw on.
        passbands: `Passband` by channel.

    Returns:
        (N, N) float32 images, DN/s.
    """
    size = plate.size
    if loops is None:
        return {name: np.zeros((size, size), np.float32) for name in passbands}
    x, y, z = loops.position
    columns, rows = plate.pixels_of(x, y)
    seen = ((z > 0.0) | (np.hypot(x, y) > 1.0)) & (columns > 0) & (columns < size - 2) & (rows > 0) & (rows < size - 2)
    column, row = columns[seen].astype(np.int64), rows[seen].astype(np.int64)
    right, up = columns[seen] - column, rows[seen] - row
    corners = [
        ((row + i) * size + column + j, (up if i else 1.0 - up) * (right if j else 1.0 - right))
        for i in (0, 1)
        for j in (0, 1)
    ]
    scale = 0.02 * (size / 128.0) ** 2  # a pixel of half the width gathers a quarter of the points
    images = {}
    for name, passband in passbands.items():
        weights = passband.responds(loops.log_temperature[seen]) * loops.emission[seen]
        image = np.sum([np.bincount(index, weights * share, size * size) for index, share in corners], axis=0)
        blurred = gaussian_filter(image.reshape(size, size).astype(np.float32), 0.6 * (size / 128.0) ** 0.5, truncate=3)
        images[name] = blurred * (passband.loop * scale)
    return images
