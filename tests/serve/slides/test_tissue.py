import numpy as np
import pytest
from numpy.typing import NDArray

from serve.images.readers.registry import open_reader
from serve.slides.options import TissueRule
from serve.slides.tissue import TISSUE_MPP, tissue_of
from tests.support.real_slide import real_slide

EXACT = TissueRule(grow_um=0)


def overview(**painted: tuple[int, int, int]) -> NDArray[np.uint8]:
    """Glass of 100 x 120 pixels with noise, and a rectangle of a colour."""
    rng = np.random.default_rng(0)
    found = np.clip(rng.normal(243, 1, (100, 120, 1)).repeat(3, axis=2), 0, 255)
    for color in painted.values():
        found[30:70, 40:90] = color
    return found.astype(np.uint8)


@pytest.mark.parametrize(
    "color",
    [(200, 120, 180), (120, 60, 160), (236, 215, 228), (150, 100, 60), (230, 200, 215)],
    ids=["pink", "purple", "pale", "brown", "fat"],
)
def test_stained_tissue_is_found_and_glass_is_not(color: tuple[int, int, int]) -> None:
    mask = tissue_of(overview(tissue=color), EXACT)
    inside = mask[32:68, 42:88]
    assert inside.all()
    mask[28:72, 38:92] = False
    assert not mask.any()


def test_an_empty_slide_and_a_full_one_are_told_apart() -> None:
    assert not tissue_of(overview(), EXACT).any()
    full = np.full((60, 60, 3), (200, 120, 180), np.uint8)
    assert tissue_of(full, EXACT).all()


@pytest.mark.parametrize("color", [(20, 150, 60), (10, 120, 100), (15, 12, 14)])
def test_a_green_pen_and_black_are_left_out_unless_they_are_wanted(
    color: tuple[int, int, int],
) -> None:
    picture = overview(pen=color)
    assert not tissue_of(picture, EXACT).any()
    everything = TissueRule(grow_um=0, exclude_pen=False)
    assert tissue_of(picture, everything)[32:68, 42:88].all()


def test_dust_is_no_tissue_and_gaps_are_closed() -> None:
    picture = overview(tissue=(200, 120, 180))
    picture[10:12, 10:12] = (200, 40, 180)
    picture[50, 60:64] = 243
    mask = tissue_of(picture, EXACT)
    assert not mask[:25].any()
    assert mask[32:68, 42:88].all()


def test_the_tissue_is_grown_by_as_many_um_as_asked() -> None:
    picture = overview(tissue=(200, 120, 180))
    exact = tissue_of(picture, EXACT)
    grown = tissue_of(picture, TissueRule(grow_um=5 * TISSUE_MPP))
    rows, columns = (np.flatnonzero(exact.any(axis=axis)) for axis in (1, 0))
    wider, longer = (np.flatnonzero(grown.any(axis=axis)) for axis in (1, 0))
    assert (wider[0], wider[-1]) == (rows[0] - 5, rows[-1] + 5)
    assert (longer[0], longer[-1]) == (columns[0] - 5, columns[-1] + 5)


def test_the_tissue_of_a_real_slide_is_about_a_third_of_it() -> None:
    with open_reader(real_slide()) as slide:
        share = tissue_of(slide.thumbnail(TISSUE_MPP), TissueRule()).mean()
    assert 0.25 < share < 0.6
