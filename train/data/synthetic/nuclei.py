"""Building blocks of synthetic tissue: random fields, scattered points, stain maps and nuclei.

Maps are (H, W) float32 unless said otherwise; points are (N, 2) float32, row and column in pixels.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import cKDTree

Map = NDArray[np.float32]
Points = NDArray[np.float32]


@dataclass
class Stains:
    """The amount of each stain per pixel, as optical density (base 10)."""

    haematoxylin: Map
    eosin: Map


@dataclass(frozen=True, kw_only=True)
class Nucleus:
    """The appearance of one kind of nucleus."""

    length_um: float
    """Mean of the longer diameter."""
    spread: float
    """Log-normal spread of the length between nuclei."""
    aspect: tuple[float, float]
    """Range of width over length."""
    irregularity: float
    """Bumps of the outline, in radii."""
    haematoxylin: float
    """Mean stain inside, as optical density."""
    rim: float = 0.1
    """Extra stain at the membrane, as a fraction of the inside."""
    clumps: float = 0.2
    """Contrast of the chromatin, as a fraction of the inside."""
    nucleoli: float = 0.0
    """Mean number of nucleoli per nucleus, at most two."""


TUMOR_NUCLEUS = Nucleus(
    length_um=11.0,
    spread=0.17,
    aspect=(0.66, 0.95),
    irregularity=0.05,
    haematoxylin=0.45,
    rim=0.4,
    clumps=0.3,
    nucleoli=1.2,
)
LYMPHOCYTE = Nucleus(
    length_um=7.2,
    spread=0.09,
    aspect=(0.82, 1.0),
    irregularity=0.03,
    haematoxylin=0.78,
    rim=0.2,
    clumps=0.24,
)
FIBROBLAST = Nucleus(
    length_um=14.0, spread=0.22, aspect=(0.16, 0.3), irregularity=0.06, haematoxylin=0.58
)
DUST = Nucleus(length_um=1.9, spread=0.4, aspect=(0.6, 1.0), irregularity=0.1, haematoxylin=0.6)


def random_field(rng: np.random.Generator, size_px: int, length_px: float) -> Map:
    """Gaussian random field of zero mean and unit variance, smooth over `length_px`."""
    if length_px < 6:
        white = rng.standard_normal((size_px, size_px), np.float32)
        field = ndimage.gaussian_filter(white, length_px, mode="wrap", truncate=3.0)
        return np.asarray(field / field.std(), np.float32)
    # White noise on a coarse grid gives the same field, many times faster.
    nodes = np.arange(-3 * length_px, size_px + 4 * length_px, 1.2 * length_px)
    kernel = np.exp(-0.5 * ((np.arange(size_px)[:, None] - nodes) / length_px) ** 2)
    kernel = (kernel / np.sqrt((kernel**2).sum(axis=1, keepdims=True))).astype(np.float32)
    white = rng.standard_normal((len(nodes), len(nodes)), np.float32)
    # kernel @ white @ kernel.T. Here, BLAS threads would cost far more than they save.
    field = np.einsum("ij,kj->ik", kernel, np.einsum("ij,kj->ik", kernel, white))
    return np.asarray(field, np.float32)


def smooth_step(x: NDArray[np.floating]) -> Map:
    """Rise from 0 to 1 around zero, over about one unit."""
    return np.asarray(0.5 + 0.5 * np.tanh(2 * x), np.float32)


def blur(image: NDArray[np.generic], sigma_px: float) -> Map:
    """Smooth with a Gaussian."""
    return np.asarray(
        ndimage.gaussian_filter(image.astype(np.float32), sigma_px, truncate=2.5), np.float32
    )


def mix(canvas: Map, weight: Map, value: NDArray[np.floating] | float) -> None:
    """Blend `value` into the canvas in place, by `weight` in [0, 1]."""
    canvas += weight * (value - canvas)


def at(image: Map, points: Points) -> Map:
    """Read the map at points (N, 2); points outside read the nearest edge."""
    rows, columns = np.clip(points.astype(int), 0, len(image) - 1).T
    return np.asarray(image[rows, columns], np.float32)


def scatter(rng: np.random.Generator, density: Map, spacing_px: float) -> Points:
    """Scatter points at least `spacing_px` apart, then thin them to the `density` in [0, 1]."""
    # Also covers a margin outside the tile, because its edges cut nuclei.
    low, high = -spacing_px / 2, len(density) + spacing_px / 2
    count = int(4 * ((high - low) / spacing_px) ** 2)
    points = rng.uniform(low, high, (count, 2)).astype(np.float32)
    chance = rng.random(count)
    points, chance = points[at(density, points) > 0.01], chance[at(density, points) > 0.01]
    if not len(points):
        return points
    pairs = cKDTree(points).query_pairs(spacing_px, output_type="ndarray")
    keep = np.ones(len(points), bool)
    for first, second in pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))].tolist():
        if keep[first]:
            keep[second] = False
    return points[keep & (chance < at(density, points))]


def packed(rng: np.random.Generator, size_px: int, spacing_px: float) -> Points:
    """Centres of cells that fill the tile, including neighbours that reach into it."""
    margin_px = int(2 * spacing_px)
    side_px = size_px + 2 * margin_px
    return scatter(rng, np.ones((side_px, side_px), np.float32), spacing_px) - np.float32(margin_px)


def neighbours(points: Points, size_px: int, k: int) -> tuple[list[Map], NDArray[np.intp]]:
    """Find the distance in pixels to the nearest k points, and which point is nearest."""
    # Every second pixel is enough for soft borders, and is four times as fast.
    half = np.mgrid[:size_px:2, :size_px:2].reshape(2, -1).T
    distances, owners = cKDTree(points).query(half, k=k)
    side = -(-size_px // 2)
    maps = [
        ndimage.zoom(d.reshape(side, side).astype(np.float32), 2, order=1)[:size_px, :size_px]
        for d in distances.T
    ]
    owner = owners[:, 0].reshape(side, side).repeat(2, axis=0).repeat(2, axis=1)
    return maps, owner[:size_px, :size_px]


def draw_nuclei(
    rng: np.random.Generator,
    stains: Stains,
    centres: Points,
    angles: NDArray[np.floating] | None,
    kind: Nucleus,
    mpp: float,
) -> None:
    """Draw nuclei of one kind over the existing stains.

    Args:
        rng: the source of randomness.
        stains: changed in place.
        centres: (N, 2) row and column.
        angles: (N,) of the longer axis, in radians from the columns; None for random ones.
        kind: their appearance.
        mpp: um per pixel.
    """
    n = len(centres)
    if not n:
        return
    if angles is None:
        angles = rng.uniform(0, np.pi, n)
    length = kind.length_um / mpp * np.exp(rng.normal(0, kind.spread, n))
    width = length * rng.uniform(*kind.aspect, n)
    reach = int(np.ceil(0.65 * length.max())) + 2
    corners = np.floor(centres).astype(int) - reach
    steps = np.arange(2 * reach + 1)
    dy = (corners[:, 0] - centres[:, 0])[:, None, None] + steps[:, None]
    dx = (corners[:, 1] - centres[:, 1])[:, None, None] + steps
    # Each nucleus has its own plane, scaled so that the outline is at 1: N x P x P complex
    offset = ((dx + 1j * dy) * np.exp(-1j * angles)[:, None, None]).astype(np.complex64)
    half_length, half_width = (d.astype(np.float32)[:, None, None] / 2 for d in (length, width))
    plane = offset.real / half_length + 1j * (offset.imag / half_width)
    radius = _radius(rng, plane, kind.irregularity)
    opacity = smooth_step((1 - radius) * half_width / 1.3)
    dye = 1 + kind.clumps * _chromatin(rng, corners, len(steps), len(stains.eosin), mpp)
    dye += kind.rim * np.exp(-(((radius - 0.86) / 0.14) ** 2))
    if kind.nucleoli:
        dye += _nucleoli(rng, plane * half_width * mpp, half_width * mpp, kind.nucleoli)
    dye *= kind.haematoxylin * np.exp(rng.normal(0, 0.16, n)).astype(np.float32)[:, None, None]
    _paste(stains, corners, opacity, dye)


def _radius(rng: np.random.Generator, plane: NDArray[np.complex64], irregularity: float) -> Map:
    """Distance from the centre, scaled to 1 at an outline with random bumps: N x P x P."""
    radius = np.abs(plane) + np.float32(1e-4)
    heading = plane / radius
    outline, wave = np.ones_like(radius), heading
    for _ in range(3):
        wave = wave * heading
        size = rng.normal(0, irregularity, len(plane))
        bump = size * np.exp(2j * np.pi * rng.random(len(plane)))
        outline += (wave * bump.astype(np.complex64)[:, None, None]).real
    return np.asarray(radius / outline, np.float32)


def _chromatin(
    rng: np.random.Generator, corners: NDArray[np.int_], patch_px: int, size_px: int, mpp: float
) -> Map:
    """Cut each nucleus's patch from one field of clumps, wrapped at the edges: N x P x P."""
    field = random_field(rng, size_px, 0.5 / mpp) + random_field(rng, size_px, 1.1 / mpp)
    rows = (corners[:, :1] + np.arange(patch_px)) % size_px
    columns = (corners[:, 1:] + np.arange(patch_px)) % size_px
    return np.asarray(0.7 * field[rows[:, :, None], columns[:, None, :]], np.float32)


def _nucleoli(
    rng: np.random.Generator,
    plane_um: NDArray[np.complex64],
    radius_um: NDArray[np.floating],
    mean_number: float,
) -> Map:
    """Zero to two dark spots per nucleus, 1 um in radius, away from the outline: N x P x P."""
    n, spots = len(plane_um), np.zeros(plane_um.shape, np.float32)
    for _ in range(2):
        place = 0.45 * np.sqrt(rng.random(n)) * np.exp(2j * np.pi * rng.random(n))
        distance = np.abs(plane_um - place.astype(np.complex64)[:, None, None] * radius_um)
        shown = (rng.random(n) < mean_number / 2)[:, None, None]
        spots += 0.9 * shown * np.exp(-(distance**4))
    return spots


def _paste(stains: Stains, corners: NDArray[np.int_], opacity: Map, dye: Map) -> None:
    """Blend patches (N, P, P) into the stains, cut at the tile's edges."""
    size_px, patch_px = len(stains.eosin), opacity.shape[1]
    for (top, left), cover, amount in zip(corners.tolist(), opacity, dye, strict=True):
        rows, columns = (
            slice(min(max(low, 0), size_px), min(max(low + patch_px, 0), size_px))
            for low in (top, left)
        )
        patch = (
            slice(rows.start - top, rows.stop - top),
            slice(columns.start - left, columns.stop - left),
        )
        mix(stains.haematoxylin[rows, columns], cover[patch], amount[patch])
        stains.eosin[rows, columns] *= 1 - 0.3 * cover[patch]
