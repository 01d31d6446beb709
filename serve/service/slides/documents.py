"""What /slides and /jobs answer as JSON, and what a job is asked for with."""

from typing import Literal

from pydantic import Field

from serve.contract.strict import Strict
from serve.images.mpp import MAX_MPP, MIN_MPP, PixelSize
from serve.slides.outputs.registry import DEFAULT, FORMATS
from serve.slides.summary import SlideSummary

Status = Literal["waiting", "running", "done", "failed", "cancelled"]
_FORMAT_NAMES = tuple(FORMATS)
State = Literal["new", "waiting", "running", "stopped", "failed", "done"]


class JobRequest(Strict):
    """What to segment, and the settings of the command line that a caller may choose."""

    slide: str = Field(max_length=64, description="id of the slide", examples=["0f2d8c6b7e3a4d5f"])
    mpp: float | None = Field(
        None,
        strict=True,  # true is not a number
        ge=MIN_MPP,
        le=MAX_MPP,
        description="um per pixel at full resolution, where the file does not say it or is wrong",
        examples=[0.25],
    )
    tissue: Literal["auto", "none"] = Field(
        "auto", description="auto: look where tissue is found; none: look everywhere"
    )
    formats: tuple[Literal[_FORMAT_NAMES], ...] = Field(  # type: ignore[valid-type]
        DEFAULT,
        max_length=len(_FORMAT_NAMES),
        description="what to write; ome-zarr always is, since the page shows it",
    )
    overwrite: bool = Field(
        False, strict=True, description="replace a result of other settings or models"
    )


class Job(Strict):
    """A job, as it is now."""

    id: str
    slide: str = Field(description="id of the slide")
    name: str = Field(description="of the slide's result")
    status: Status
    request: JobRequest
    created: float = Field(description="seconds since 1970, as all times here")
    started: float | None = None
    ended: float | None = None
    tiles: int = Field(description="of the whole slide; 0 until it is planned")
    tiles_done: int
    tiles_per_second: float | None = Field(None, description="since the job began")
    seconds_left: float | None = Field(None, description="until the tiles are done, at that rate")
    step: str = Field(description="which output is being written, after the tiles")
    attempts: int = Field(description="how often its process was started")
    error: str = Field(description="why it failed")
    code: str = Field(description="names the kind of failure")


class JobList(Strict):
    """The last jobs, the newest first."""

    jobs: tuple[Job, ...]


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


class SlideInfo(SlideEntry):
    """A slide, with what a viewer needs."""

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
