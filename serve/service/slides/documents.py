"""The JSON answers of /slides."""

from typing import Literal

from pydantic import Field

from serve.contract.strict import Strict
from serve.images.mpp import PixelSize
from serve.service.slides.job import Job
from serve.slides.summary import SlideSummary

State = Literal["new", "waiting", "running", "stopped", "failed", "done"]


class SlideEntry(Strict):
    """A slide in the list."""

    id: str = Field(description="stays the same while the file keeps its place")
    name: str = Field(description="of its result")
    file: str = Field(description="path below the folder of slides")
    num_bytes: int | None = Field(None, description="null for a slide that is a folder")
    state: State = Field(description="stopped: a new job continues where the last one ended")
    problem: str = Field("", description="why it cannot be segmented as it is called")


class SlideList(Strict):
    """All slides of the folder."""

    slides: tuple[SlideEntry, ...]


class Tiles(Strict):
    """The tiles of a slide: Deep Zoom over its scanned part."""

    width_px: int
    height_px: int
    tile_px: int
    overlap_px: int
    num_levels: int = Field(description="levels are 0, one pixel, to this less 1, all pixels")
    origin_px: tuple[int, int] = Field(description="x and y of the corner, in pixels of level 0")
    version: str = Field(description="changes with the file; as `v` in a tile's query it is cached")


class ResultFile(Strict):
    """An output to download, at `/slides/ID/result/files/FILE`."""

    file: str
    title: str
    description: str
    media_type: str
    num_bytes: int | None = Field(None, description="null for a folder, which is sent as a zip")


class ResultInfo(Strict):
    """A finished result, and where its cells are on the slide."""

    summary: SlideSummary
    is_of_this_file: bool = Field(description="false: the slide was replaced since")
    width_cells: int
    height_cells: int
    cell_px: tuple[float, float] = Field(description="x and y of a cell, in pixels of level 0")
    origin_px: tuple[float, float] = Field(description="x and y of the corner of cell 0")
    tile_cells: int
    num_levels: int = Field(description="levels are 0, the finest, to this less 1")
    version: str
    files: tuple[ResultFile, ...]


class SlideInfo(Strict):
    """A slide, with what a viewer needs."""

    id: str
    name: str
    file: str
    num_bytes: int | None = None
    state: State
    problem: str = ""
    width_px: int
    height_px: int
    mpp: float | None = Field(
        None,
        description="um per pixel of level 0, null where it is not known; where pixels are not "
        "squares, the side of the square with the same area",
    )
    mpp_xy: PixelSize | None = Field(
        None,
        description="um per pixel along a row and along a column, where pixels are not squares",
    )
    mpp_source: str
    reader: str
    tiles: Tiles
    max_region_px: int = Field(
        description="most pixels of a region to segment, at the model's um per pixel"
    )
    result_problem: str = Field("", description="why a result that is there cannot be shown")
    result: ResultInfo | None = None
    job: Job | None = Field(None, description="the last one")
