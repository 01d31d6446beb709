"""From an upload to an answer: decode, segment, encode, off the event loop."""

import asyncio
import contextvars
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from serve.answers.format import Source
from serve.answers.pictures import rgb_png
from serve.answers.registry import FORMATS, needs_probabilities
from serve.images.decode import Picture, decode_picture
from serve.images.mpp import FROM_REQUEST
from serve.inference.segmenter import TileSegmenter
from serve.inference.summary import ImageInfo
from serve.service.model import Model
from serve.service.telemetry import Telemetry
from serve.settings import ServeSettings

T = TypeVar("T")
MPP_HEADER, MPP_SOURCE_HEADER = "X-Mpp", "X-Mpp-Source"
"""Of an answer: the um per pixel that the image was taken to have, and where it is from."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a request asks for."""

    formats: Sequence[str]
    """Names of the answer formats."""
    mpp: float | None = None
    """um per pixel that the request states."""
    options: Mapping[str, object] = field(default_factory=dict)
    """Values of the formats' options, by name."""


@dataclass(frozen=True)
class Answer:
    """What became of an image."""

    contents: list[bytes]
    """In the order of the job's formats."""
    image: ImageInfo
    """Its um per pixel and where that is from, which most formats have no place for."""


class Worker:
    """Works on at most `settings.concurrency` images at the same time; the others wait."""

    def __init__(self, settings: ServeSettings, telemetry: Telemetry) -> None:
        self._settings = settings
        self._telemetry = telemetry
        self._pool = ThreadPoolExecutor(settings.concurrency, thread_name_prefix="segment")

    async def run(self, work: Callable[[], T]) -> T:
        """Do `work` in a thread, with the request's id, span and record for the log."""
        submitted = time.perf_counter()

        def timed() -> T:
            self._telemetry.observe_stage("queue", time.perf_counter() - submitted)
            return work()

        context = contextvars.copy_context()
        return await asyncio.get_running_loop().run_in_executor(self._pool, context.run, timed)

    def picture(self, data: bytes) -> bytes:
        """A file's image as a PNG, for clients that cannot show the file.

        Raises:
            ImageError: the file cannot be used.
        """
        picture = self._decode(data)
        with self._telemetry.stage("encode"):
            return rgb_png(picture.pixels)

    def _decode(self, data: bytes) -> Picture:
        with self._telemetry.stage("decode"):
            return decode_picture(
                data,
                max_bytes=self._settings.max_upload_bytes,
                max_pixels=self._settings.max_image_pixels,
            )

    def answer(self, model: Model, data: bytes, job: Job) -> Answer:
        """A file's segmentation in each format of the job, in their order.

        Raises:
            FocalPathError: the file or an option cannot be used, or the model is not available.
        """
        picture = self._decode(data)

        def work(segmenter: TileSegmenter) -> Answer:
            with self._telemetry.stage("segment"):
                result = segmenter.segment(
                    picture.pixels,
                    mpp=picture.mpp if job.mpp is None else job.mpp,
                    mpp_source=picture.mpp_source if job.mpp is None else FROM_REQUEST,
                    with_probabilities=needs_probabilities(job.formats, job.options),
                )
            result = result.with_notes(picture.mpp_note, picture.notes)
            self._telemetry.observe_summary(result.summary)
            with self._telemetry.stage("encode"):
                source = Source(picture.pixels, result, segmenter.manifest)
                contents = [FORMATS[name].render(source, job.options) for name in job.formats]
            return Answer(contents, result.summary.image)

        return model.run(work)
