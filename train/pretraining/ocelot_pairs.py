"""OCELOT's published pairs as a source of views: real tissue at two aligned scales."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from train.data.convert.images import FoldSettings, folds_of
from train.data.convert.ocelot import find_images, read_metadata
from train.errors import SourceError
from train.pretraining.footprints import Footprint
from train.pretraining.regions import ImageRegions, SlideInfo
from train.pretraining.split_source import OpenImage, SplitSource, split_by_fold


class OcelotRegions:
    """OCELOT's pairs: a tissue patch, and inside it a cell patch at four times the magnification.

    Each pair is one slide: fine inside its cell patch, coarse around it (Ryu et al., CVPR 2023).
    """

    def __init__(self, tissue: ImageRegions, cell: ImageRegions, slides: list[SlideInfo]) -> None:
        self._tissue, self._cell = tissue, cell
        self.slides: Sequence[SlideInfo] = slides

    def read(self, slide: int, footprint: Footprint, size_px: int) -> NDArray[np.uint8]:
        """Read a square from the cell patch if that is needed and has it, else from the tissue."""
        info = self.slides[slide]
        assert info.fine_area is not None
        assert info.outer_mpp is not None
        wanted_mpp = footprint.side_um / size_px
        if wanted_mpp >= info.outer_mpp * 0.98 or not info.fine_area.contains(footprint):
            return self._tissue.read(slide, footprint, size_px)
        inside = Footprint(
            footprint.y_um - info.fine_area.y_um,
            footprint.x_um - info.fine_area.x_um,
            footprint.side_um,
        )
        return self._cell.read(slide, inside, size_px)

    def tissue_share(self, slide: int, footprint: Footprint) -> float:
        """Share of tissue in a square, in [0, 1]."""
        return self._tissue.tissue_share(slide, footprint)


def open_ocelot(root: Path) -> SplitSource:
    """Open OCELOT's published folder, with the folds that `train prepare ocelot` draws by default.

    Raises:
        SourceError: the metadata is not as published, or there is no pair of images.
    """
    pairs = read_metadata(root / "metadata.json")
    folds = folds_of(find_images(root)[0], FoldSettings())
    found: dict[str, tuple[Path, Path]] = {}
    for name, pair in sorted(pairs.items()):
        folder = root / "images" / pair["subset"]
        tissue, cell = (folder / kind / f"{name}.jpg" for kind in ("tissue", "cell"))
        if name in folds and tissue.is_file() and cell.is_file():
            found[name] = tissue, cell
    if not found:
        raise SourceError(
            f"{root} has a metadata.json, but no pair of images; expected "
            "images/train/tissue/ID.jpg and images/train/cell/ID.jpg, as OCELOT is published"
        )
    described = [_describe(name, pairs[name]) for name in found]
    tissue_paths, cell_paths = zip(*found.values(), strict=True)
    source = OcelotRegions(
        ImageRegions([tissue for _, tissue, _ in described], OpenImage(tissue_paths)),
        ImageRegions([cell for _, _, cell in described], OpenImage(cell_paths)),
        [pair for pair, _, _ in described],
    )
    splits = split_by_fold(folds[name] for name in found)
    return SplitSource(source, splits, root.resolve().name)


def _describe(
    name: str, pair: dict[str, dict[str, float]]
) -> tuple[SlideInfo, SlideInfo, SlideInfo]:
    """A pair as a slide in um, from the tissue patch's upper left corner; and its two images."""
    tissue, cell = pair["tissue"], pair["cell"]
    um_per_px = float(pair["mpp_x"])  # type: ignore[arg-type]
    fine = Footprint(
        y_um=(cell["y_start"] - tissue["y_start"]) * um_per_px,
        x_um=(cell["x_start"] - tissue["x_start"]) * um_per_px,
        side_um=(cell["x_end"] - cell["x_start"]) * um_per_px,
    )
    side_um = (tissue["x_end"] - tissue["x_start"]) * um_per_px
    outer, inner = float(tissue["resized_mpp_x"]), float(cell["resized_mpp_x"])
    group = str(pair["slide_name"])[:12]
    return (
        SlideInfo(name, side_um, side_um, inner, group, fine_area=fine, outer_mpp=outer),
        SlideInfo(name, side_um, side_um, outer, group),
        SlideInfo(name, fine.side_um, fine.side_um, inner, group),
    )
