"""Turns an upload into an answer: decodes, segments and encodes in threads."""

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
from serve.inference.segmenter import Segmentation, TileSegmenter
from serve.inference.summary import ImageInfo
from serve.service.kept import KeptResults, ResultKey
from serve.service.model import Model
from serve.service.telemetry import Telemetry
from serve.settings import MEBIBYTE, ServeSettings

T = TypeVar("T")
MPP_HEADER, MPP_SOURCE_HEADER = "X-Mpp", "X-Mpp-Source"
"""Response headers: the um per pixel that was used for the image, and where it comes from."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """The formats and options that a request asks for."""

    formats: Sequence[str]
    """Names of the answer formats."""
    mpp: float | None = None
    """um per pixel that the request states."""
    options: Mapping[str, object] = field(default_factory=dict)
    """Values of the formats' options, by name."""
    keep: bool = False
    """Keep the result for further requests with the same image, or take a kept one."""


@dataclass(frozen=True)
class Answer:
    """The answers for one image."""

    contents: list[bytes]
    """In the order of the job's formats."""
    image: ImageInfo
    """Its um per pixel and where that comes from, which most formats cannot hold."""


class Worker:
    """Works on at most `settings.concurrency` images at the same time; the others wait."""

    def __init__(self, settings: ServeSettings, telemetry: Telemetry) -> None:
        self._settings = settings
        self._telemetry = telemetry
        self._kept = KeptResults(settings.keep_results_mib * MEBIBYTE)
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

    def answer(self, model: Model, data: bytes, job: Job, name: str = "") -> Answer:
        """Segment a file, and encode the result in each format of the job, in their order.

        Args:
            model: segments the image.
            data: the file's content.
            job: the formats and options.
            name: the file's name; it may say where the image lies in its slide.

        Raises:
            FocalPathError: the file or an option cannot be used, or the model is not available.
        """
        picture = self._decode(data)

        def work(segmenter: TileSegmenter) -> Answer:
            result = self._segment(segmenter, picture, data, job)
            with self._telemetry.stage("encode"):
                source = Source(picture.pixels, result, segmenter.manifest, name)
                contents = [FORMATS[name].render(source, job.options) for name in job.formats]
            return Answer(contents, result.summary.image)

        return model.run(work)

    def _segment(
        self, segmenter: TileSegmenter, picture: Picture, data: bytes, job: Job
    ) -> Segmentation:
        with_probabilities = needs_probabilities(job.formats, job.options)
        key = ResultKey.of(data, job.mpp, segmenter.manifest) if job.keep else None
        kept = self._kept.get(key, with_probabilities=with_probabilities) if key else None
        if kept is not None:
            return kept
        with self._telemetry.stage("segment"):
            result = segmenter.segment(
                picture.pixels,
                mpp=picture.pixel_size if job.mpp is None else job.mpp,
                mpp_source=picture.mpp_source if job.mpp is None else FROM_REQUEST,
                with_probabilities=with_probabilities,
            )
        result = result.with_notes(picture.mpp_note, picture.notes)
        self._telemetry.observe_summary(result.summary)
        if key:
            self._kept.put(key, result)
        return result
