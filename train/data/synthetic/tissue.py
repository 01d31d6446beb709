"""One tile of synthetic haematoxylin-and-eosin tissue with its label map.

The order follows a real slide: tissue regions, their cells and fibres, the stains that these take
up, the light that the stains absorb (Beer-Lambert), and a microscope camera. Sizes are in um. `mpp`
converts them to pixels, so tissue has the same scale at any resolution.

Maps are (H, W) float32 unless said otherwise; points are (N, 2) float32, row and column in pixels.
"""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import cKDTree

from train.data.synthetic.nuclei import (
    DUST,
    FIBROBLAST,
    LYMPHOCYTE,
    TUMOR_NUCLEUS,
    Map,
    Stains,
    at,
    blur,
    draw_nuclei,
    mix,
    neighbours,
    packed,
    random_field,
    scatter,
    smooth_step,
)
from train.settings import LabelClass

CLASSES = (
    LabelClass(name="Tumor", color="#d55e00"),
    LabelClass(name="Stroma", color="#009e73"),
    LabelClass(name="Inflammatory", color="#f0e442"),
    LabelClass(name="Necrosis", color="#0072b2"),
    LabelClass(name="Other", color="#56b4e9"),
)
"""Labels 1..5. The colours are from Okabe and Ito's palette for colour-blind
viewers; none is close to the pink and purple of the tissue."""

TUMOR, STROMA, INFLAMMATORY, NECROSIS, OTHER = range(1, 6)

# Optical densities of haematoxylin, then eosin, in red, green and blue, as unit vectors from two
# laboratories. A slide's vectors lie between them.
# Macenko et al. 2009 (ISBI), "A method for normalizing histology slides for quantitative analysis";
# Ruifrok & Johnston 2001 (Anal Quant Cytol Histol 23:291), "... by color deconvolution".
_MACENKO = np.array([[0.5626, 0.7201, 0.4062], [0.2159, 0.8012, 0.5581]])
_RUIFROK = np.array([[0.650, 0.704, 0.286], [0.072, 0.990, 0.105]])


Drawing = tuple[NDArray[np.uint8], NDArray[np.uint8]]
"""An image (H, W, 3) uint8 RGB in [0, 255], and its labels (H, W) uint8: 0 unlabelled, 1..5 as in
`CLASSES`."""


def make_tile(rng: np.random.Generator, size_px: int, mpp: float = 0.5) -> Drawing:
    """Draw one tile.

    Args:
        rng: the only source of randomness; the same state gives the same bytes.
        size_px: height and width.
        mpp: um per pixel.
    """
    return draw_tissue(rng, lay_out_regions(rng, size_px, mpp), mpp)


def draw_tissue(rng: np.random.Generator, regions: NDArray[np.uint8], mpp: float) -> Drawing:
    """Draw tissue from a map of regions, and its annotation.

    Args:
        rng: the only source of randomness.
        regions: (H, W) uint8, 1..5 as in `CLASSES`; H = W.
        mpp: um per pixel.

    Returns:
        The image, and the regions as labels, with 0 where the annotator skipped an area.
    """
    size_px = len(regions)
    tumor, stroma, infiltrate, necrosis, other = (
        blur(regions == label, 1 / mpp) for label in range(1, 6)
    )
    stains = Stains(*np.zeros((2, size_px, size_px), np.float32))
    angle = _draw_collagen(rng, stains, tumor, mpp)
    _draw_necrosis(rng, stains, necrosis, mpp)
    _draw_other(rng, stains, other, mpp)
    _draw_stromal_cells(rng, stains, stroma, infiltrate, angle, mpp)
    _draw_tumor(rng, stains, tumor, mpp)
    return _photograph(rng, stains, mpp), _annotate(rng, regions, mpp)


def _top(score: Map, share: float) -> NDArray[np.bool_]:
    """Mask of the `share` of all pixels with the highest `score`."""
    return score > np.quantile(score, 1 - share) if share else np.zeros(score.shape, bool)


def lay_out_regions(rng: np.random.Generator, size_px: int, mpp: float) -> NDArray[np.uint8]:
    """Lay out the five classes as smooth regions that fill the tile: (H, W) uint8.

    Inflammatory and Necrosis are equally rare in any data set. They have the same share in tiles
    with both, and the same distribution in tiles with one of them.
    """
    tumor_share = rng.uniform(0.15, 0.62) * (rng.random() < 0.92)
    other_share = rng.uniform(0.12, 0.5) * (rng.random() < 0.52)
    rare_share = rng.uniform(0.08, 0.22)
    company = rng.random()  # rising: both, only inflammatory, only necrosis, neither
    inflammatory_share = rare_share * (company < 0.39)
    necrosis_share = rare_share * (company < 0.31 or 0.39 <= company < 0.47)
    tumor, other, necrosis, infiltrate = (
        random_field(rng, size_px, um / mpp) for um in (14, 16, 18, 22)
    )

    labels = np.full((size_px, size_px), STROMA, np.uint8)
    labels[_top(tumor, tumor_share)] = TUMOR
    # Fat avoids tumour, tumour dies at its core, and lymphocytes gather around tumour.
    labels[_top(other - 0.7 * tumor, other_share)] = OTHER
    labels[_top(necrosis + 0.6 * tumor - 3 * (labels == OTHER), necrosis_share)] = NECROSIS
    infiltrate = infiltrate - 1.5 * blur(labels != STROMA, 5 / mpp)
    labels[_top(infiltrate, inflammatory_share)] = INFLAMMATORY
    # Smooths corners and slivers where regions meet.
    votes = [blur(labels == label, 2.5 / mpp) for label in range(1, 6)]
    return np.asarray(np.argmax(votes, axis=0) + 1, np.uint8)


def _annotate(
    rng: np.random.Generator, regions: NDArray[np.uint8], mpp: float
) -> NDArray[np.uint8]:
    """Leave part of some tiles unlabelled, as annotators do."""
    share = rng.uniform(0.04, 0.16) * (rng.random() < 0.15)
    left_out = _top(random_field(rng, len(regions), 15 / mpp), share)
    return np.where(left_out, 0, regions).astype(np.uint8)


def _draw_collagen(rng: np.random.Generator, stains: Stains, tumor: Map, mpp: float) -> Map:
    """Fill the tile with wavy collagen that bends around tumour; return the fibres' angle."""
    size_px = len(tumor)
    y, x = np.mgrid[:size_px, :size_px].astype(np.float32)
    direction = rng.uniform(0, np.pi)
    along = x * np.cos(direction) + y * np.sin(direction)
    across = y * np.cos(direction) - x * np.sin(direction)
    across += (6 * random_field(rng, size_px, 22 / mpp) + 9 * blur(tumor, 8 / mpp)) / mpp
    phase = 2 * np.pi * along * mpp / rng.uniform(18, 30)
    phase += 2 * random_field(rng, size_px, 12 / mpp)
    across += rng.uniform(0.5, 1.5) / mpp * np.sin(phase)

    def fibres(width_um: float, length_um: float) -> Map:
        """Draw straight streaks and bend them. Along them, every fourth pixel is enough."""
        straight = rng.standard_normal((2 * size_px, size_px // 2), np.float32)
        sigma = (width_um / mpp, length_um / mpp / 4)
        straight = ndimage.gaussian_filter(straight, sigma, mode="wrap", truncate=2.5)
        bent = ndimage.map_coordinates(straight, (across, along / 4), order=1, mode="grid-wrap")
        return np.asarray(bent / straight.std(), np.float32)

    fine, bundles = fibres(0.45, 7.0), fibres(2.0, 16.0)
    grain = random_field(rng, size_px, 0.5 / mpp)
    gaps = smooth_step((-bundles - 0.6 * fine - rng.uniform(1.3, 2.2)) * 1.5)
    eosin = rng.uniform(0.19, 0.26) * (1 + 0.2 * fine + 0.2 * bundles + 0.07 * grain)
    stains.eosin += np.maximum(eosin * (1 - 0.85 * gaps), 0.01)
    stains.haematoxylin += 0.03 + 0.01 * (fine + grain) * (1 - gaps)
    by_row, by_column = np.gradient(across)
    return np.asarray(np.arctan2(-by_column, by_row), np.float32)


def _draw_stromal_cells(
    rng: np.random.Generator,
    stains: Stains,
    stroma: Map,
    infiltrate: Map,
    angle: Map,
    mpp: float,
) -> None:
    """Draw fibroblasts along the fibres, and lymphocytes: many in infiltrates, some everywhere.

    The density of lymphocytes varies between tiles, in infiltrates and in plain stroma. The two
    ranges overlap, which makes Inflammatory a hard class.
    """
    size_px = len(stroma)
    spindles = scatter(rng, 0.5 * stroma + 0.25 * infiltrate, 12 / mpp)
    angles = at(angle, spindles) + rng.normal(0, 0.15, len(spindles))
    draw_nuclei(rng, stains, spindles, angles, FIBROBLAST, mpp)

    patches = smooth_step(random_field(rng, size_px, 10 / mpp) - 1.0)
    strays = rng.uniform(0.01, 0.05) + rng.uniform(0.0, 0.5) * patches
    crowd = rng.uniform(0.45, 1.0) * blur(infiltrate, 3 / mpp)
    density = (stroma + infiltrate) * np.maximum(strays, crowd)
    draw_nuclei(rng, stains, scatter(rng, density, 6.8 / mpp), None, LYMPHOCYTE, mpp)


def _draw_tumor(rng: np.random.Generator, stains: Stains, tumor: Map, mpp: float) -> None:
    """Draw nests of tumour cells with clefts around them, in some tiles with gland lumens."""
    size_px = len(tumor)
    lumen = smooth_step((random_field(rng, size_px, 6 / mpp) - rng.uniform(1.2, 3)) * 3)
    lumen *= smooth_step((blur(tumor, 5 / mpp) - 0.8) * 6)
    grade = replace(
        TUMOR_NUCLEUS,
        length_um=rng.uniform(9.5, 12.5),
        haematoxylin=rng.uniform(0.38, 0.54),
        clumps=rng.uniform(0.2, 0.4),
    )
    cells = packed(rng, size_px, 0.76 * grade.length_um / mpp)
    (nearest, second), owner = neighbours(cells, size_px, 2)
    border = np.exp(-(((second - nearest) * mpp / 0.9) ** 2))
    tint = rng.standard_normal(len(cells)).astype(np.float32)[owner]
    tint = blur(tint, 0.5 / mpp)
    grain = random_field(rng, size_px, 0.6 / mpp) + 0.8 * random_field(rng, size_px, 2 / mpp)
    body = 1 - 0.95 * lumen
    shade = 1 + 0.13 * tint + 0.14 * grain
    mix(stains.haematoxylin, tumor, rng.uniform(0.07, 0.14) * (shade - 0.3 * border) * body)
    mix(stains.eosin, tumor, rng.uniform(0.15, 0.23) * (shade + 0.25 * border) * body)
    # Fixation makes nests shrink away from the stroma.
    rim = np.exp(-(((tumor - 0.25) / 0.18) ** 2))
    cleft = rng.uniform(0.2, 1.0) * rim * smooth_step(random_field(rng, size_px, 9 / mpp))
    stains.eosin *= 1 - 0.8 * cleft
    stains.haematoxylin *= 1 - 0.7 * cleft
    shown = rng.random(len(cells)) < 0.97 * at(tumor * (1 - lumen), cells)
    draw_nuclei(rng, stains, cells[shown], None, grade, mpp)


def _draw_necrosis(rng: np.random.Generator, stains: Stains, necrosis: Map, mpp: float) -> None:
    """Draw dead tissue: pale granular eosin and dust from burst nuclei, no whole nuclei."""
    size_px = len(necrosis)
    grain = random_field(rng, size_px, 0.5 / mpp) + 0.8 * random_field(rng, size_px, 1.4 / mpp)
    clouds = random_field(rng, size_px, 7 / mpp)
    mix(stains.eosin, necrosis, 0.12 * (1 + 0.2 * grain + 0.18 * clouds))
    mix(stains.haematoxylin, necrosis, 0.05 * (1 + 0.35 * grain - 0.3 * clouds))
    dust = scatter(rng, necrosis * (0.2 + 0.45 * smooth_step(clouds)), 2.8 / mpp)
    draw_nuclei(rng, stains, dust, None, DUST, mpp)


def _draw_other(rng: np.random.Generator, stains: Stains, other: Map, mpp: float) -> None:
    """Draw tissue of no other class: mostly fat, sometimes a pool of blood or mucin."""
    draw = (_draw_fat, _draw_blood, _draw_mucin)[rng.choice(3, p=[0.6, 0.2, 0.2])]
    if other.max() > 0.01:
        draw(rng, stains, other, mpp)


def _draw_fat(rng: np.random.Generator, stains: Stains, other: Map, mpp: float) -> None:
    """Draw empty vacuoles with thin walls and a few flat nuclei on them."""
    size_px = len(other)
    centres = packed(rng, size_px, rng.uniform(26, 38) / mpp)
    (first, second, third), _ = neighbours(centres, size_px, 3)
    # The soft minimum of the distances to two walls rounds the vacuole's corners.
    walls = np.stack([second - first, third - first]) * (mpp / 2)
    walls += 0.4 * random_field(rng, size_px, 5 / mpp)
    inside_um = -1.6 * np.log(np.exp(-walls / 1.6).sum(axis=0))
    wall = smooth_step((0.9 - inside_um) * 0.8)
    mix(stains.eosin, other, 0.006 + 0.2 * wall)
    mix(stains.haematoxylin, other, 0.003 + 0.03 * wall)
    nuclei = scatter(rng, 0.2 * other * (wall > 0.9), 5 / mpp)
    if len(nuclei):
        _, (owner, neighbour) = (a.T for a in cKDTree(centres).query(nuclei, k=2))
        normal = centres[neighbour] - centres[owner]
        draw_nuclei(rng, stains, nuclei, np.arctan2(-normal[:, 1], normal[:, 0]), FIBROBLAST, mpp)


def _draw_blood(rng: np.random.Generator, stains: Stains, other: Map, mpp: float) -> None:
    """Draw tightly packed red cells: no nuclei, strong eosin."""
    size_px = len(other)
    cells = packed(rng, size_px, 4.6 / mpp)
    (nearest, second), owner = neighbours(cells, size_px, 2)
    size_um = rng.normal(3.2, 0.25, len(cells)).astype(np.float32)[owner]
    edge_um = np.minimum(size_um - nearest * mpp, (second - nearest) * mpp / 2 + 0.1)
    edge_um += 0.25 * random_field(rng, size_px, 1.5 / mpp)
    tint = 1 + 0.12 * rng.standard_normal(len(cells)).astype(np.float32)[owner]
    cell = smooth_step(edge_um * 1.4) * (1 - 0.25 * smooth_step(edge_um - 1.8)) * tint
    mix(stains.eosin, other, 0.06 + 0.36 * cell)
    mix(stains.haematoxylin, other, 0.012 * (1 + cell))


def _draw_mucin(rng: np.random.Generator, stains: Stains, other: Map, mpp: float) -> None:
    """Draw pale blue-grey mucus with wisps."""
    size_px = len(other)
    wisps = np.zeros_like(other)
    for length_um, width in ((9, 0.15), (4, 0.22), (2, 0.35)):
        wisps += np.exp(-np.abs(random_field(rng, size_px, length_um / mpp)) / width) / 3
    haze = smooth_step(random_field(rng, size_px, 12 / mpp))
    mix(stains.haematoxylin, other, 0.03 + 0.03 * haze + 0.09 * wisps)
    mix(stains.eosin, other, 0.012 + 0.03 * wisps)


def _photograph(rng: np.random.Generator, stains: Stains, mpp: float) -> NDArray[np.uint8]:
    """Convert stain amounts to the scanner's image: (H, W, 3) uint8 RGB."""
    size_px = len(stains.eosin)
    vectors = _MACENKO + rng.uniform(0.0, 0.5) * (_RUIFROK - _MACENKO)
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    vectors *= rng.uniform(0.88, 1.15, (2, 1)).astype(np.float32)  # strength of each stain
    density = np.maximum(stains.haematoxylin, 0)[..., None] * vectors[0]
    density += np.maximum(stains.eosin, 0)[..., None] * vectors[1]
    density *= 1 + 0.04 * random_field(rng, size_px, 30 / mpp)[..., None]  # uneven section
    white = rng.uniform(240, 245, 3).astype(np.float32)
    light = white * np.float32(10) ** -density  # Beer-Lambert: H x W x 3
    sigma_px = rng.uniform(0.25, 0.42) / mpp
    light = ndimage.gaussian_filter(light, (sigma_px, sigma_px, 0), truncate=3.0)
    noise = 2.5 * np.sqrt(light / 255) * rng.standard_normal(light.shape, np.float32)
    return np.asarray(np.clip(np.rint(light + noise), 0, 255), np.uint8)
