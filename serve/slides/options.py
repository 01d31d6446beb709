"""What a user chooses about slides; importable without the libraries of the extra `slides`."""

import re
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import tyro
from pydantic import Field, field_validator

from serve.contract.strict import CommandOptions, Strict
from serve.images.mpp import MAX_MPP, MIN_MPP
from serve.images.tiles import OVERLAP

Overlap = Annotated[float, Field(ge=0, le=0.75)]
BlockCells = Annotated[int, Field(ge=16, le=16_384, multiple_of=16)]


def mask_file(tissue: str) -> Path | None:
    """The file that says where tissue is; None where the option names none."""
    return None if tissue in ("auto", "none") else Path(tissue)


def absolute_tissue(tissue: str) -> str:
    """The same with an absolute path, for other processes."""
    file = mask_file(tissue)
    return tissue if file is None else str(file.absolute())


class TissueRule(CommandOptions):
    """How tissue is told from glass; see `serve.slides.tissue`."""

    flag_prefix: ClassVar[str] = "rule."

    saturation: int = Field(8, ge=0, le=255)
    """Tissue has more than this saturation (HSV, 0 to 255)."""
    median_px: int = Field(7, ge=1, le=101)
    """Side of the window, in pixels of 8 um, whose median counts."""
    close_px: int = Field(5, ge=1, le=101)
    """Gaps of up to about this many pixels of 8 um are closed."""
    grow_um: float = Field(40.0, ge=0, le=1000)
    """How far the tissue is grown, in um."""
    exclude_pen: bool = True
    """Leave out marks of a green pen and what is nearly black. Not for green stains."""
    green_hue: tuple[int, int] = (50, 122)
    """Hues of a green pen, of 256 (70 to 172 degrees)."""
    green_saturation: int = Field(90, ge=0, le=255)
    """Green from this saturation on is a pen's."""
    black_value: int = Field(35, ge=0, le=255)
    """Pixels darker than this (HSV value) are not tissue."""


class Settings(Strict):
    """What the labels of a slide depend on, beside the slide and the model."""

    overlap: Overlap
    block_cells: BlockCells
    tissue: Literal["auto", "none", "mask"]
    """How it was decided where to look."""
    mask_file_sha256: str = ""
    """Of the file with the mask or the regions, where there is one."""
    rule: TissueRule


class OutputOptions(CommandOptions):
    """How outputs are drawn; the labels do not depend on it."""

    simplify_cells: float = Field(2.0, ge=0, le=100)
    """GeoJSON, DSA: simplify outlines by about this many cells; 0: exact."""
    min_area_um2: float = Field(256.0, ge=0)
    """GeoJSON, DSA: leave out regions of less area."""
    max_vertices: int = Field(4_000_000, ge=1000)
    """GeoJSON, DSA: simplify further, until the outlines have at most this many vertices."""


class RunOptions(CommandOptions):
    """How the slides of a cohort are run."""

    mpp: float | None = Field(None, ge=MIN_MPP, le=MAX_MPP)
    """um per pixel at full resolution, for slides that do not state it or state it wrongly."""
    reader: str | None = None
    """tiff, ome-tiff, openslide, ome-zarr or picture; by default the one that fits."""
    tissue: str = "auto"
    """Where to look: auto finds the tissue, none looks everywhere; or a PNG mask of the whole
    slide, or GeoJSON with regions in pixels at full resolution."""
    rule: TissueRule = TissueRule()
    """How the tissue is found."""
    overlap: Overlap = OVERLAP
    """Share of a tile that it has in common with the next one, at least."""
    block_cells: BlockCells = 2048
    """Side of the squares that are computed and stored at once, in cells of 4 x 4 pixels. Larger
    ones repeat fewer tiles at their edges and lose more work when they are stopped."""
    outputs: Annotated[OutputOptions, tyro.conf.arg(name="")] = OutputOptions()
    """How outputs are drawn."""
    read_threads: int = Field(2, ge=1, le=256)
    """Threads that read the slide."""
    overwrite: bool = False
    """Replace results and work of other settings, models or slides."""

    def absolute(self) -> "RunOptions":
        """The same with absolute paths, for other processes."""
        return self.model_copy(update={"tissue": absolute_tissue(self.tissue)})


class ClusterOptions(CommandOptions):
    """Where the workers of a cluster run, and how large each is."""

    cluster: str = ""
    """Run on a Ray cluster: host:port of its head; auto: the cluster that this machine belongs to;
    local: a new one on this machine alone, for several GPUs. Needs the extra `cluster`."""
    workers: int = Field(0, ge=0, le=4096)
    """Processes with a model each, on a cluster; 0: as many as it has room for now."""
    worker_cpus: int = Field(0, ge=0, le=1024)
    """Cores of each; 0: all cores of a machine, or its share beside each GPU."""
    worker_gpus: float | None = Field(None, ge=0, le=16)
    """GPUs of each, such as 1 or 0.5; by default 1 where the cluster has any."""

    @field_validator("cluster")
    @classmethod
    def _is_address(cls, value: str) -> str:
        if value in ("", "auto", "local") or re.fullmatch(r"[\w.\[\]:-]+:\d{1,5}", value):
            return value
        raise ValueError("expected host:port of the cluster's head, auto or local")
