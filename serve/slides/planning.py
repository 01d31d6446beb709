"""Plans a slide: where its tissue is, and all else that its labels depend on; opens it again."""

from pathlib import Path

import numpy as np

from serve.contract.manifest import sha256_of
from serve.images.mpp import FROM_REQUEST
from serve.images.readers.errors import SlideError
from serve.images.readers.reader import RegionReader
from serve.images.readers.registry import open_reader
from serve.slides.errors import MaskError
from serve.slides.options import RunOptions, Settings, mask_file
from serve.slides.plan import ModelInfo, Plan, make_plan, open_view
from serve.slides.tissue import Mask, find_tissue, mask_shape, read_mask


def plan_slide(
    slide: RegionReader, model: ModelInfo, settings: Settings, tissue: str
) -> tuple[Plan, Mask]:
    """Plan a slide: find its tissue, or read where it is.

    Args:
        slide: open.
        model: that will run.
        settings: as `settings_of` makes them of `tissue`.
        tissue: auto, none, or a file with a mask or regions.

    Raises:
        SlideScaleError: the slide's um per pixel is not known.
        MaskError: the file cannot be used, or is another by now.
    """
    view = open_view(slide, model)
    match settings.tissue:
        case "auto":
            mask = find_tissue(view, settings.rule)
        case "none":
            mask = np.ones(mask_shape(view), bool)
        case "mask":
            file = Path(tissue)
            mask = read_mask(file, view)
            if sha256_of(file) != settings.mask_file_sha256:
                raise MaskError(f"the mask {file} was replaced while it was read. Run it again.")
    return make_plan(slide, model, settings, mask), mask


def settings_of(options: RunOptions, tissue: str) -> Settings:
    """The settings of one slide: with how its tissue is found, and which file says where it is.

    Raises:
        MaskError: the file cannot be read.
    """
    file, sha256 = mask_file(tissue), ""
    if file is not None:
        try:
            tissue, sha256 = "mask", sha256_of(file)
        except OSError as error:
            raise MaskError(f"the mask {file} cannot be read: {error.strerror}.") from error
    return Settings(
        overlap=options.overlap,
        block_cells=options.block_cells,
        tissue=tissue,
        mask_file_sha256=sha256,
        rule=options.rule,
    )


def open_planned(plan: Plan) -> RegionReader:
    """Open the slide that a plan is of.

    Raises:
        SlideError: it cannot be opened, or another file is in its place.
    """
    given = plan.slide.mpp if plan.slide.mpp_source == FROM_REQUEST else None
    reader = open_reader(Path(plan.slide.path), plan.slide.reader, mpp=given)
    if reader.fingerprint() != plan.slide.fingerprint:
        reader.close()
        raise SlideError(
            f"{plan.slide.path} is not the file that the work began with. Start the slide again "
            "with --overwrite."
        )
    return reader
