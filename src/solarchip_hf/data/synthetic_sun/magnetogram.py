"""The radial magnetic field of the visible hemisphere: active regions, network, polar caps."""

import math
from dataclasses import dataclass

import numpy as np

from .ephemeris import Viewpoint, surface_to_observer, viewpoint
from .state import Region, RegionHistory, cycle_parity, cycle_phase
from .surface import SurfaceMap, SurfaceNoise

# Fragments are drawn in the width bins of the first row (degrees), each blurred once.
WIDTH_BINS = np.array([0.35, 0.6, 1.0, 1.7, 2.9, 5.2])
DIFFUSION = 0.20  # square degrees a day: about 340 km2/s, within the 200 to 600 of flux transport models
FAINTEST_REGION = 0.05  # 1e21 Mx
POLAR_FIELD = 5.5  # G at the pole at minimum (WSO and MDI: 5 to 8)
NETWORK_FIELD = 11.0  # G at 128 px


@dataclass(frozen=True, eq=False)
class VisibleRegion:
    """A region as it stands at one time.

    Attributes:
        region: The region.
        latitude, longitude: (28,) of its fragments, degrees, longitude from the central meridian.
        fragment_flux: (28,) signed, 1e21 Mx.
        widths: (28,) standard deviation in degrees.
        flux: Flux of one polarity, 1e21 Mx.
        stress: Energy per F**1.5, hidden: it shows as shear and hot loops only.
        shear: Twist of the axis in radians.
        flaring: Soft X-ray flux of a flare in progress, W/m2.
    """

    region: Region
    latitude: np.ndarray
    longitude: np.ndarray
    fragment_flux: np.ndarray
    widths: np.ndarray
    flux: float
    stress: float
    shear: float
    flaring: float


@dataclass(frozen=True, eq=False)
class MagneticSurface:
    """Radial field on the map, G, and what the corona needs of it.

    Attributes:
        surface: The map.
        view: The viewpoint.
        days: Days since the epoch.
        regions: Those on the visible side or just behind the limb.
        active: (size, size) field of active regions.
        compact: (size, size) field of their youngest, most concentrated parts: spots.
        network: (size, size) field of the network.
        radial: (size, size) the sum, with the polar field.
        points: The lattice points of the noise in view.
    """

    surface: SurfaceMap
    view: Viewpoint
    days: float
    regions: list[VisibleRegion]
    active: np.ndarray
    compact: np.ndarray
    network: np.ndarray
    radial: np.ndarray
    points: tuple[np.ndarray, np.ndarray]


def visible_regions(history: RegionHistory, days: float, l0: float) -> list[VisibleRegion]:
    """The regions within 110 degrees of the central meridian `l0`, with their fragments in place."""
    return [
        _place(region, days, distance)
        for region in history.alive(days)
        if abs(distance := region.meridian_distance(days, l0)) < 110.0 and region.flux_at(days) >= FAINTEST_REGION
    ]


def _place(region: Region, days: float, meridian_distance: float) -> VisibleRegion:
    flux = region.flux_at(days)
    age = days - region.emergence
    stress = region.stress_at(days)
    # Free energy twists the bipole; together with the natural scatter of tilts it shows only partly.
    shear = 0.5 * math.tanh(stress / 2.0)
    opening = 1.0 - math.exp(-age / 2.0)  # the polarities part as the region emerges
    along, across, share, width = region.fragments.T
    angle = region.tilt - 0.6 * shear
    hemisphere = 1.0 if region.latitude >= 0 else -1.0
    east_west = along * math.cos(angle) * opening
    north_south = -hemisphere * along * math.sin(angle) * opening + across * (0.3 + 0.7 * opening)
    latitude = region.latitude + north_south
    longitude = meridian_distance + east_west / math.cos(math.radians(region.latitude))
    widths = np.sqrt(width**2 + DIFFUSION * age * np.where(np.abs(share) > 0.19, 0.5, 1.0))
    return VisibleRegion(
        region=region,
        latitude=latitude,
        longitude=longitude,
        fragment_flux=share * region.leader_sign * flux,
        widths=widths,
        flux=flux,
        stress=stress,
        shear=shear,
        flaring=region.flaring_at(days),
    )


def magnetic_surface(history: RegionHistory, noise: SurfaceNoise, days: float, size: int) -> MagneticSurface:
    """Builds the radial field of the visible hemisphere.

    Args:
        history: The active regions.
        noise: The random fields.
        days: Days since the epoch.
        size: Pixels across the image that will be drawn; the map is 1 degree x 128/size fine.
    """
    surface = SurfaceMap(128.0 / size)
    view = viewpoint(days)
    regions = visible_regions(history, days, view.l0)
    points = noise.view(surface, view)
    # Plage is not smooth: flux gathers in knots, which a coarse image averages away.
    knot = max(0.45, 0.7 * surface.cell)
    depth = 0.8 * 0.45 / knot
    mottle = noise.field("mottle", surface, points, days, lifetime=1.0, degrees=knot)
    mottle = np.exp(depth * mottle - depth**2 / 2.0)
    active, compact = (part * mottle for part in _paint(surface, regions, view))

    sine = surface.sine_latitude(view.b0)
    phase = float(cycle_phase(days))
    polar = cycle_parity(days) * POLAR_FIELD * math.cos(math.pi * phase) * np.sign(sine) * np.abs(sine) ** 7
    large_scale = surface.blur(active, 6.0) + polar
    lanes = noise.field("lanes", surface, points, days, lifetime=1.5, degrees=1.1)
    polarity = noise.field("polarity", surface, points, days, lifetime=2.5, degrees=0.8)
    strength = noise.field("strength", surface, points, days, lifetime=8.0, degrees=6.0)
    # Lanes are the zero contours of a smooth field: a mesh like the supergranular network. Their polarity leans to that
    # of the surroundings, their strength varies over tens of degrees and grows with resolution, as less cancels.
    network = (
        np.exp(-((lanes / 0.45) ** 2))
        * np.tanh(2.0 * (polarity + 0.35 * np.tanh(large_scale / 3.0)))
        * (NETWORK_FIELD * (size / 128.0) ** 0.35)
        * np.exp(0.45 * strength)
    )
    return MagneticSurface(surface, view, days, regions, active, compact, network, active + network + polar, points)


def _paint(surface: SurfaceMap, regions: list[VisibleRegion], view: Viewpoint) -> tuple[np.ndarray, np.ndarray]:
    """Fields of the active regions, all of it and the concentrated part, G."""
    total = np.zeros((surface.size, surface.size), np.float32)
    compact = total.copy()
    if not regions:
        return total, compact
    latitude = np.concatenate([r.latitude for r in regions])
    longitude = np.concatenate([r.longitude for r in regions])
    field = np.concatenate([r.fragment_flux for r in regions]) * 1e21 / surface.cell_area  # G in one cell
    widths = np.concatenate([r.widths for r in regions])
    vectors = surface_to_observer(latitude, longitude, view.b0)
    rows, columns = surface.cells_of(vectors)
    # a width between two bins is shared between them
    bins = np.interp(np.log(widths), np.log(WIDTH_BINS), np.arange(len(WIDTH_BINS)))
    for index, width in enumerate(WIDTH_BINS):
        share = np.clip(1.0 - np.abs(bins - index), 0.0, None)
        chosen = (share > 0) & (vectors[2] > -0.3)
        if chosen.any():
            layer = surface.blur(surface.scatter(rows[chosen], columns[chosen], (field * share)[chosen]), width)
            total += layer
            if index <= 2:
                compact += layer
    return total, compact


def line_of_sight(
    radial: np.ndarray, mu: np.ndarray, on_disk: np.ndarray, size: int, random: np.random.Generator
) -> np.ndarray:
    """Line-of-sight magnetogram, G, NaN off the disk: B mu plus noise that grows towards the limb and with resolution.

    Args:
        radial: (N, N) radial field at the pixels, G.
        mu: (N, N) cosine of the angle to the local vertical.
        on_disk: (N, N) bool.
        size: N.
        random: Source of the noise.
    """
    deviation = (1.0 + 1.2 * (1.0 - mu)) * math.sqrt(size / 128.0)
    observed = radial * mu + random.standard_normal(radial.shape, dtype=np.float32) * deviation
    return np.where(on_disk, observed, np.nan).astype(np.float32)
