"""A job as JSON: what a caller asks for, and what is answered."""

from typing import Literal

from pydantic import Field

from serve.contract.strict import Strict
from serve.images.mpp import MAX_MPP, MIN_MPP
from serve.slides.outputs.registry import DEFAULT, FORMATS

Status = Literal["waiting", "running", "done", "failed", "cancelled"]
_FORMAT_NAMES = tuple(FORMATS)


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
