"""What the routes of slides share: the folder, the reading processes, results and jobs."""

import os
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Path, Request
from starlette.concurrency import run_in_threadpool

from serve.contract.errors import FocalPathError, NotFoundError, SettingsError
from serve.images.mpp import PixelSize
from serve.service.slides.deep_zoom import OVERLAP_PX, TILE_PX
from serve.service.slides.documents import Job, SlideEntry, SlideInfo, State, Tiles
from serve.service.slides.folder import SlideFile, SlideFolder
from serve.service.slides.jobs import JobStore
from serve.service.slides.jobs_file import JOBS_FILE, JobsError
from serve.service.slides.readers import SlideReaders
from serve.service.slides.results import Results
from serve.service.slides.scheduler import Scheduler
from serve.service.telemetry import Telemetry
from serve.settings import ServeSettings
from serve.slides.job import WORK_FOLDER
from serve.slides.outputs.ome_zarr import OME_ZARR
from serve.slides.outputs.registry import DEFAULT, FORMATS

_BYTES_PER_PIXEL = 3
_PNG_SHARE = 0.98
"""Share of a PNG that is left for pixels beside its headers."""
SlideId = Annotated[
    str, Path(description="of a slide, from /slides", examples=["0f2d8c6b7e3a4d5f"])
]
_ENDED: dict[str, State] = {"failed": "failed", "cancelled": "stopped"}


@dataclass(frozen=True)
class Slides:
    """The slides of a service.

    Raises:
        FocalPathError: the folders cannot be used.
    """

    settings: ServeSettings
    folder: SlideFolder
    readers: SlideReaders
    results: Results
    jobs: JobStore
    scheduler: Scheduler

    @classmethod
    def of(cls, settings: ServeSettings, telemetry: Telemetry) -> "Slides":
        """Open what the settings name, without starting anything."""
        out = settings.slides_out_folder
        assert settings.slides is not None
        assert out is not None
        jobs = JobStore(out, settings.max_slide_jobs)
        return cls(
            settings=settings,
            folder=SlideFolder(settings.slides, out),
            readers=SlideReaders(settings.slide_readers, on_crash=telemetry.slide_reader_crashed),
            results=Results(out),
            jobs=jobs,
            scheduler=Scheduler(settings, jobs, telemetry),
        )

    def start(self) -> None:
        """Start the reading processes and the scheduler of jobs."""
        self.readers.start()
        self.scheduler.start()

    def close(self) -> None:
        """End all processes."""
        self.scheduler.close()
        self.readers.close()

    @property
    def formats(self) -> list[dict[str, Any]]:
        """What a job can write, for the page's choice."""
        return [
            {
                "name": entry.name,
                "title": entry.title,
                "description": entry.description,
                "chosen": entry.name in DEFAULT,
                "always": entry is OME_ZARR,
            }
            for entry in FORMATS.values()
        ]

    def entries(self) -> tuple[SlideEntry, ...]:
        """The list of all slides."""
        jobs = self.jobs.last_by_slide()
        return tuple(self._entry(slide, jobs.get(slide.id)) for slide in self.folder.slides())

    def _entry(self, slide: SlideFile, job: Job | None) -> SlideEntry:
        return SlideEntry(
            id=slide.id,
            name=slide.name,
            file=slide.file,
            num_bytes=slide.num_bytes,
            state=self._state(slide, job),
            problem=slide.problem,
        )

    def _state(self, slide: SlideFile, job: Job | None) -> State:
        if job is not None and job.status in ("waiting", "running"):
            return job.status
        if self.results.has(slide.name):
            return "done"
        if job is not None and job.status in _ENDED:
            return _ENDED[job.status]
        is_begun = (self.results.out / WORK_FOLDER / slide.name).is_dir()
        return "stopped" if is_begun else "new"

    async def info(self, slide: SlideFile) -> SlideInfo:
        """What a viewer needs of a slide.

        Raises:
            SlideError: it cannot be read.
        """
        found, _ = await self.readers.ask("info", **self.place(slide))
        return await run_in_threadpool(self._describe, slide, found)

    def _describe(self, slide: SlideFile, found: dict[str, Any]) -> SlideInfo:
        job = self.jobs.last_by_slide().get(slide.id)
        result, result_problem = None, ""
        try:
            result = self.results.find(slide.name)
        except NotFoundError as error:  # the slide itself can be shown
            result_problem = str(error)
        x, y, width, height = found["bounds"]
        return SlideInfo(
            **dict(self._entry(slide, job)),
            width_px=found["width_px"],
            height_px=found["height_px"],
            mpp=found["mpp"],
            mpp_xy=found["mpp_xy"] and PixelSize(*found["mpp_xy"]),
            mpp_source=found["mpp_source"],
            reader=found["reader"],
            tiles=Tiles(
                width_px=width,
                height_px=height,
                tile_px=TILE_PX,
                overlap_px=OVERLAP_PX,
                num_levels=found["num_levels"],
                origin_px=(x, y),
                version=slide.version,
            ),
            max_region_px=self.max_region_px,
            result_problem=result_problem,
            result=None if result is None else result.info(found["fingerprint"]),
            job=job,
        )

    @property
    def max_region_px(self) -> int:
        """Most pixels of a region: as of an image, and its PNG must fit into an upload."""
        most_bytes = self.settings.max_upload_bytes * _PNG_SHARE
        return min(self.settings.max_image_pixels, int(most_bytes / _BYTES_PER_PIXEL))

    def place(self, slide: SlideFile) -> dict[str, Any]:
        """The path of a slide, for the reading processes."""
        root = str(self.folder.path)
        return {"path": str(slide.path), "root": root, "version": slide.version}


async def slide_of(request: Request, slide_id: str) -> tuple[Slides, SlideFile]:
    """The slides of the application, and the one of an id.

    Raises:
        NotFoundError: there is none of this id.
    """
    slides: Slides = request.app.state.slides
    return slides, await run_in_threadpool(slides.folder.find, slide_id)


def check_slides(settings: ServeSettings) -> None:
    """Check the folders of slides and results, and that the libraries for slides are installed.

    Raises:
        FocalPathError: they cannot be used.
    """
    folder, out = settings.slides, settings.slides_out_folder
    assert folder is not None
    assert out is not None
    if not folder.is_dir():
        raise SettingsError(f"--slides is {folder}, which is not a folder. Name one with slides.")
    try:
        JobStore(out, settings.max_slide_jobs)
    except JobsError as error:
        raise JobsError(f"{out}: {error}") from error
    for path in (out, out / JOBS_FILE):
        if not os.access(path, os.W_OK):
            raise FocalPathError(f"{path} cannot be written to. Name another --slides-out.")
