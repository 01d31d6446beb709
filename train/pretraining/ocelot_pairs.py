"""OCELOT's published pairs as a source of views: real tissue at two aligned scales."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from train.data.convert.images import FoldSettings, folds_of
from train.data.convert.ocelot import find_images, read_metadata
from train.data.folder import Split
from train.errors import SourceError
from train.pretraining.footprints import Footprint
from train.pretraining.regions import ImageRegions, SlideInfo
from train.pretraining.split_source import SPLIT_OF_FOLD, OpenImage, SplitSource


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
    slides: list[SlideInfo] = []
    tissue: list[SlideInfo] = []
    cell: list[SlideInfo] = []
    tissue_paths: list[Path] = []
    cell_paths: list[Path] = []
    splits: dict[Split, list[int]] = {"training": [], "validation": [], "test": []}
    for pair_id, pair in sorted(pairs.items()):
        paths = [
            root / "images" / pair["subset"] / kind / f"{pair_id}.jpg"
            for kind in ("tissue", "cell")
        ]
        if pair_id not in folds or not all(path.is_file() for path in paths):
            continue
        info, fine = _ocelot_slide(pair_id, pair)
        splits[SPLIT_OF_FOLD.get(folds[pair_id], "training")].append(len(slides))
        slides.append(info)
        tissue.append(_as_image(info, info.outer_mpp or info.base_mpp, info.height_um))
        cell.append(_as_image(info, info.base_mpp, fine.side_um))
        tissue_paths.append(paths[0])
        cell_paths.append(paths[1])
    if not slides:
        raise SourceError(
            f"{root} has a metadata.json, but no pair of images; expected "
            "images/train/tissue/ID.jpg and images/train/cell/ID.jpg, as OCELOT is published"
        )
    source = OcelotRegions(
        ImageRegions(tissue, OpenImage(tuple(tissue_paths))),
        ImageRegions(cell, OpenImage(tuple(cell_paths))),
        slides,
    )
    return SplitSource(
        source, {split: tuple(found) for split, found in splits.items()}, root.resolve().name
    )


def _ocelot_slide(pair_id: str, pair: dict[str, dict[str, float]]) -> tuple[SlideInfo, Footprint]:
    """A pair as a slide in um, with its origin at the tissue patch's upper left corner."""
    tissue, cell = pair["tissue"], pair["cell"]
    um_per_px = float(pair["mpp_x"])  # type: ignore[arg-type]
    fine = Footprint(
        y_um=(cell["y_start"] - tissue["y_start"]) * um_per_px,
        x_um=(cell["x_start"] - tissue["x_start"]) * um_per_px,
        side_um=(cell["x_end"] - cell["x_start"]) * um_per_px,
    )
    side_um = (tissue["x_end"] - tissue["x_start"]) * um_per_px
    info = SlideInfo(
        name=pair_id,
        width_um=side_um,
        height_um=side_um,
        base_mpp=float(cell["resized_mpp_x"]),
        group=str(pair["slide_name"])[:12],
        fine_area=fine,
        outer_mpp=float(tissue["resized_mpp_x"]),
    )
    return info, fine


def _as_image(info: SlideInfo, mpp: float, side_um: float) -> SlideInfo:
    return SlideInfo(
        name=info.name, width_um=side_um, height_um=side_um, base_mpp=mpp, group=info.group
    )
