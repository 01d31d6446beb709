"""Alignment and determinism, on a slide whose colours are its coordinates."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from tests.support.coordinates import coordinate_colors, largest_error_px
from tests.support.errors import raises
from train.errors import ScaleError
from train.pretraining.footprints import Footprint
from train.pretraining.regions import ImageRegions, SlideInfo
from train.pretraining.settings import ViewSettings
from train.pretraining.views import ViewDataset

MPP, SIDE_PX = 0.25, 1024
SIDE_UM = MPP * SIDE_PX
UM_PER_LEVEL = SIDE_UM / 255
"""What one step of an 8-bit colour means in um."""


def _coordinates(_: int) -> np.ndarray:
    """Red is the row, green the column, 0 to 255 over the slide; blue is full."""
    at = (np.arange(SIDE_PX) + 0.5) / SIDE_PX * 255
    rows, columns = np.meshgrid(at, at, indexing="ij")
    return np.rint(np.stack([rows, columns, np.full_like(rows, 255)], -1)).astype(np.uint8)


def _source(number: int = 2) -> ImageRegions:
    info = SlideInfo("slide", SIDE_UM, SIDE_UM, MPP, "case")
    return ImageRegions([info] * number, _coordinates)


def _dataset(**settings: object) -> ViewDataset:
    views = ViewSettings(view_px=96, num_local=1, local_px=48, **settings)  # type: ignore[arg-type]
    return ViewDataset(_source(), [0, 1], views, patch_size=16, num_samples=8, seed=3)


@pytest.mark.parametrize("mpp", [0.25, 0.3, 0.5, 0.61, 1.0, 1.3])
def test_every_pixel_lies_where_its_footprint_says(mpp: float) -> None:
    """To half a pixel of the level that is read, the rounding of colours included."""
    info = SlideInfo("slide", SIDE_UM, SIDE_UM, MPP, "case")
    source = ImageRegions([info], lambda _: coordinate_colors(SIDE_PX, SIDE_PX))
    corner = (31.3, 77.7)
    view = source.read(0, Footprint(*corner, 64 * mpp), 64)
    level = 2 ** int(np.log2(mpp / MPP * 1.02))
    in_px = (corner[0] / MPP, corner[1] / MPP)
    assert largest_error_px(view, in_px, mpp / MPP) <= level / 2


@pytest.mark.parametrize("side_px", [991, 1023, 1024])
@pytest.mark.parametrize("mpp", [0.5, 1.0, 1.9, 2.0])
def test_a_view_in_the_last_corner_is_not_stretched(side_px: int, mpp: float) -> None:
    """Levels of a side that two does not divide reach to the slide's edge, too."""
    side_um = side_px * MPP
    info = SlideInfo("slide", side_um, side_um, MPP, "case")
    source = ImageRegions([info], lambda _: coordinate_colors(side_px, side_px))
    corner = side_um - 64 * mpp
    view = source.read(0, Footprint(corner, corner, 64 * mpp), 64)
    level = 2 ** int(np.log2(mpp / MPP * 1.02))
    assert largest_error_px(view, (corner / MPP, corner / MPP), mpp / MPP) <= level / 2


def test_tissue_is_judged_up_to_the_last_pixel() -> None:
    tissue = np.full((1023, 1023, 3), (180, 90, 150), np.uint8)
    side_um = 1023 * MPP
    source = ImageRegions([SlideInfo("slide", side_um, side_um, MPP, "case")], lambda _: tissue)
    assert source.tissue_share(0, Footprint(side_um - 1, side_um - 1, 1.0)) == 1


def test_reduction_is_antialiased() -> None:
    board = (np.indices((256, 256)).sum(0) % 2 * 255).astype(np.uint8)
    source = ImageRegions(
        [SlideInfo("board", 64, 64, MPP, "case")], lambda _: np.stack([board] * 3, -1)
    )
    view = source.read(0, Footprint(0, 0, 64), 64)
    assert np.abs(view.astype(int) - 128).max() <= 2


def test_pixels_that_were_not_scanned_are_refused() -> None:
    with raises(ScaleError, 0.2, 1.25):
        _source().read(0, Footprint(0, 0, 64 * 0.2), 64)


def test_fine_views_lie_in_both_coarse_views_and_weights_find_them() -> None:
    dataset = _dataset()
    for number in range(8):
        layout = dataset.draw_layout(np.random.default_rng(number))
        assert len(layout.fine) == 2
        assert all(coarse.contains(fine) for coarse in layout.coarse for fine in layout.fine)
        sample = dataset[(0, number)]  # turned and flipped by chance, not yet jittered
        cells = torch.nn.functional.avg_pool2d(sample["coarse"].float(), 16)  # 2 x 3 x G x G
        place = torch.einsum("afij,acij->afc", sample["weights"], cells)
        detail = sample["fine"].float().mean(dim=(2, 3))
        patch_um = 16 * 1.0 * np.exp(0.2)
        assert (place - detail).abs().max() * UM_PER_LEVEL < patch_um / 2


def test_views_are_drawn_on_tissue_and_slides_by_their_area() -> None:
    """Tissue in a slide's right half, and a thread of it that fills fine views and no coarse one.

    Beside it, a slide of a quarter of the area.
    """

    def halves(index: int) -> np.ndarray:
        side = (1024, 512)[index]
        pixels = np.full((side, side, 3), 245, np.uint8)
        pixels[:, side // 2 :] = (180, 90, 150)
        pixels[:, side // 8 : side // 8 + 64] = (180, 90, 150)
        return pixels

    slides = [SlideInfo(str(s), s * MPP, s * MPP, MPP, str(s)) for s in (1024, 512)]
    source = ImageRegions(slides, halves)
    views = ViewSettings(view_px=64, fine_mpps=(0.25,), num_local=0, local_px=32)
    dataset = ViewDataset(source, [0, 1], views, patch_size=16, num_samples=8, seed=0)
    layouts = [dataset.draw_layout(np.random.default_rng(seed)) for seed in range(300)]
    for layout in layouts:
        assert all(source.tissue_share(layout.slide, square) >= 0.4 for square in layout.coarse)
        assert all(source.tissue_share(layout.slide, square) >= 0.6 for square in layout.fine)
    share_of_large = np.mean([layout.slide == 0 for layout in layouts])
    assert share_of_large == pytest.approx(0.8, abs=0.08)


def test_the_shuffled_control_takes_fine_views_from_elsewhere() -> None:
    layout = _dataset(pairing="shuffled").draw_layout(np.random.default_rng(0))
    assert layout.fine_slide != layout.slide


def test_fine_views_from_elsewhere_are_on_tissue_too() -> None:
    pixels = np.full((SIDE_PX, SIDE_PX, 3), 245, np.uint8)
    pixels[:, SIDE_PX // 2 :] = (180, 90, 150)
    info = SlideInfo("slide", SIDE_UM, SIDE_UM, MPP, "case")
    source = ImageRegions([info] * 2, lambda _: pixels)
    views = ViewSettings(
        view_px=64, fine_mpps=(0.25,), num_local=0, local_px=32, pairing="shuffled"
    )
    dataset = ViewDataset(source, [0, 1], views, patch_size=16, num_samples=8, seed=0)
    for seed in range(40):
        layout = dataset.draw_layout(np.random.default_rng(seed))
        (fine,) = layout.fine
        assert source.tissue_share(layout.fine_slide, fine) >= 0.6


@pytest.mark.parametrize(
    ("scales", "low", "high"),
    [
        ("coarse", 0.8, 1.23),
        ("fine", 0.25, 0.31),
        ("mixed", 0.25, 1.23),
        ("continuous", 0.25, 1.23),
    ],
)
def test_dinos_views_have_the_scales_that_were_asked_for(
    scales: str, low: float, high: float
) -> None:
    dataset = _dataset(method="dino", dino_scales=scales)
    layouts = [dataset.draw_layout(np.random.default_rng(i)) for i in range(20)]
    mpps = [square.side_um / 96 for layout in layouts for square in layout.coarse]
    assert min(mpps) >= low - 1e-6
    assert max(mpps) <= high
    assert (len({layout.scale for layout in layouts}) > 1) == (scales in ("mixed", "continuous"))
    assert dataset[(0, 0)]["fine"].shape[0] == 0


class _Pairs:
    """Slides that are fine in a square alone, as OCELOT's pairs; keeps what it was asked for."""

    def __init__(self) -> None:
        area = Footprint(300.0, 420.0, 199.0)
        self.slides = [SlideInfo("pair", 796.0, 796.0, 0.194, "case", area, 0.778)]
        self.asked: list[tuple[Footprint, float]] = []

    def read(self, slide: int, footprint: Footprint, size_px: int) -> np.ndarray:
        self.asked.append((footprint, footprint.side_um / size_px))
        return np.zeros((size_px, size_px, 3), np.uint8)

    def tissue_share(self, slide: int, footprint: Footprint) -> float:
        return 1.0


@pytest.mark.parametrize(
    ("method", "scales"),
    [("mad", "mixed"), *(("dino", s) for s in ("coarse", "fine", "mixed", "continuous"))],
)
def test_slides_that_are_fine_in_a_part_show_fine_scales_there_and_nothing_is_enlarged(
    method: str, scales: str
) -> None:
    source = _Pairs()
    views = ViewSettings(
        method=method,  # type: ignore[arg-type]
        dino_scales=scales,  # type: ignore[arg-type]
        coarse_mpp=0.778,
        fine_mpps=(0.389, 0.194),
        view_px=96,
        num_local=1,
        local_px=48,
    )
    dataset = ViewDataset(source, [0], views, patch_size=16, num_samples=40, seed=3)
    for number in range(40):
        dataset[(0, number)]
    info = source.slides[0]
    whole = Footprint(0.0, 0.0, info.width_um)
    assert all(whole.contains(square) for square, _ in source.asked)
    assert all(mpp >= info.mpp_of(square) / 1.15 for square, mpp in source.asked)
    mpps = [mpp for _, mpp in source.asked]
    assert (min(mpps) < 0.25) == (scales != "coarse")
    assert (max(mpps) > 0.7) == (scales != "fine")


def test_another_seed_epoch_or_number_is_another_sample() -> None:
    dataset, other = _dataset(), _dataset()
    other.seed += 1
    drawn = [dataset[(0, 1)], dataset[(1, 1)], dataset[(0, 2)], other[(0, 1)]]
    assert len({sample["coarse"].numpy().tobytes() for sample in drawn}) == len(drawn)


@pytest.mark.parametrize("width_px", [200, 300])
def test_views_stay_on_a_slide_that_is_smaller_than_they_are(width_px: int) -> None:
    info = SlideInfo("slide", width_px * MPP, SIDE_UM, MPP, "case")
    source = ImageRegions([info], lambda _: coordinate_colors(SIDE_PX, width_px))
    views = ViewSettings(
        view_px=96,
        fine_mpps=(0.25,),
        num_local=1,
        local_px=96,
        local_share=(0.9, 1.0),
    )
    dataset = ViewDataset(source, [0], views, patch_size=16, num_samples=8, seed=3)
    asked: list[Footprint] = []
    read = source.read
    source.read = lambda slide, at, size: asked.append(at) or read(slide, at, size)  # type: ignore[method-assign,func-returns-value]
    for number in range(8):
        dataset[(0, number)]
    edges = [(at.x_um, info.width_um - at.x_um - at.side_um) for at in asked]
    assert np.min(edges) >= -1e-6


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_a_sample_depends_on_seed_epoch_and_number_alone(num_workers: int) -> None:
    keys = [(1, 4), (0, 2), (1, 0)]
    loader = DataLoader(_dataset(), sampler=keys, batch_size=1, num_workers=num_workers)  # type: ignore[arg-type]
    for key, batch in zip(keys, loader, strict=True):
        alone = _dataset()[key]
        assert all(torch.equal(batch[name][0], value) for name, value in alone.items())  # type: ignore[attr-defined]


def test_a_views_blur_is_of_um_at_its_own_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small view shows its square with other pixels than the large view it lies in."""
    dataset = _dataset()
    squares: list[float] = []
    drawn: list[float] = []
    read = dataset.source.read
    monkeypatch.setattr(
        dataset.source,
        "read",
        lambda slide, square, size: (
            squares.append(square.side_um / size) or read(slide, square, size)
        ),
    )
    monkeypatch.setattr(
        "train.pretraining.views.draw_colors",
        lambda rng, mpp, settings: drawn.append(mpp) or np.zeros(6, np.float32),
    )
    dataset[0, 0]
    assert drawn == pytest.approx(squares)
