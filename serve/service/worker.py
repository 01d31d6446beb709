"""Turns an upload into an answer: decodes, segments and encodes in threads."""

import asyncio
import contextvars
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import TypeVar

from starlette.datastructures import State
from starlette.responses import Response, StreamingResponse

from serve.answers.format import Source
from serve.answers.frame import Frame
from serve.answers.pictures import rgb_png
from serve.answers.registry import FORMATS, needs_probabilities
from serve.contract.errors import ImageTooLargeError
from serve.images.decode import Picture, decode_picture, read_head
from serve.images.mpp import FROM_REQUEST, MppSource
from serve.inference.segmenter import Segmentation, TileSegmenter
from serve.inference.summary import ImageInfo
from serve.service.kept import KeptResults, ResultKey
from serve.service.model import Model
from serve.service.telemetry import Telemetry
from serve.service.work_queue import WorkQueue
from serve.service.written_ahead import WrittenAhead
from serve.settings import MEBIBYTE, ServeSettings

T = TypeVar("T")
_LOOKING = 4
"""Threads for what takes a moment: to weigh an image, to tell what the model is."""
MPP_HEADER, MPP_SOURCE_HEADER = "X-Mpp", "X-Mpp-Source"
"""Response headers: the um per pixel that was used for the image, and where it comes from."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """The formats and options that a request asks for."""

    formats: Sequence[str]
    """Names of the answer formats."""
    mpp: float | None = None
    """um per pixel that comes before the file's own."""
    mpp_source: MppSource = FROM_REQUEST
    """Where `mpp` comes from: what a slide's file states where the image is a region of it."""
    notes: tuple[str, ...] = ()
    """On the image, beside those from reading its file."""
    frame: Frame | None = None
    """Where the image lies in its slide, where it is a region of it."""
    options: Mapping[str, object] = field(default_factory=dict)
    """Values of the formats' options, by name."""
    keep: bool = False
    """Keep the result for further requests with the same image, or take a kept one."""


Content = bytes | Iterator[bytes]
"""An answer in one format. A large one may come block by block: its blocks are still being written
then, for which the model is not needed any more."""


def whole(content: Content) -> bytes:
    """All of an answer."""
    return content if isinstance(content, bytes) else b"".join(content)


@dataclass(frozen=True)
class Answer:
    """The answers for one image."""

    contents: list[Content]
    """In the order of the job's formats."""
    image: ImageInfo
    """Its um per pixel and where that comes from, which most formats cannot hold."""


class Worker:
    """Works on images in threads, as `WorkQueue` lets it."""

    def __init__(self, settings: ServeSettings, telemetry: Telemetry) -> None:
        self._limits = {
            "max_bytes": settings.max_upload_bytes,
            "max_pixels": settings.max_image_pixels,
        }
        self._telemetry = telemetry
        self._kept = KeptResults(settings.keep_results_mib * MEBIBYTE)
        self.images_at_once = settings.images_at_once
        self.queue = WorkQueue(
            self.images_at_once, settings.max_waiting_tiles, observe=telemetry.observe_queue
        )
        self._looking = ThreadPoolExecutor(_LOOKING, thread_name_prefix="look")
        self._writing = ThreadPoolExecutor(self.images_at_once, thread_name_prefix="write")

    async def look(self, work: Callable[[], T]) -> T:
        """Do what takes a moment, in a thread that no image keeps busy."""
        context = contextvars.copy_context()
        return await asyncio.get_running_loop().run_in_executor(self._looking, context.run, work)

    async def run(self, work: Callable[[], T], *, tiles: int = 0, may_refuse: bool = True) -> T:
        """Do `work` when its turn comes, with the request's id, span and record for the log.

        Args:
            work: on an image.
            tiles: what the image costs, by `weigh`.
            may_refuse: whether a full queue refuses it; else it waits all the same.

        Raises:
            BusyError: the queue is full.
        """
        submitted = time.perf_counter()

        def timed() -> T:
            self._telemetry.observe_stage("queue", time.perf_counter() - submitted)
            return work()

        return await self.queue.run(timed, tiles=tiles, may_refuse=may_refuse)

    def weigh(self, model: Model, data: bytes, job: Job) -> int:
        """Tiles that an image costs, by its file's head; 0 where its result was kept.

        What the head or the options tell of is refused here, before the image waits for its turn.

        Raises:
            FocalPathError: the file or an option cannot be used, or the model is not available.
        """

        def work(segmenter: TileSegmenter) -> int:
            for name in job.formats:
                FORMATS[name].options.of(job.options).check(segmenter.manifest)
            if self._find_kept(segmenter, data, job) is not None:
                return 0
            mpp = head.pixel_size if job.mpp is None else job.mpp
            source = head.mpp_source if job.mpp is None else job.mpp_source
            return segmenter.num_tiles(head.height, head.width, mpp, source)

        head = read_head(data, **self._limits)
        tiles = model.run(work)
        self._telemetry.observe_weight(tiles)
        return tiles

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
            return decode_picture(data, **self._limits)

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
        picture = replace(picture, notes=(*picture.notes, *job.notes))

        def work(segmenter: TileSegmenter) -> Answer:
            result = self._segment(segmenter, picture, data, job)
            with self._telemetry.stage("encode"):
                source = Source(picture.pixels, result, segmenter.manifest, name, job.frame)
                try:
                    blocks = [FORMATS[one].blocks(source, job.options) for one in job.formats]
                except ImageTooLargeError:  # the same image with other options need not run again
                    key = ResultKey.of(data, job.mpp, job.mpp_source, segmenter.manifest)
                    self._kept.put(key, result, for_all=True)
                    raise
                contents = [self._begun(one) for one in blocks]
            return Answer(contents, result.summary.image)

        return model.run(work)

    def _begun(self, blocks: Iterator[bytes]) -> Content:
        """An answer whose first block is written; as a whole where it has no other."""
        first, second = next(blocks), next(blocks, None)
        if second is None:
            return first
        return iter(WrittenAhead(chain((first, second), blocks), self._writing))

    def _segment(
        self, segmenter: TileSegmenter, picture: Picture, data: bytes, job: Job
    ) -> Segmentation:
        kept = self._find_kept(segmenter, data, job)
        if kept is not None:
            return kept
        with self._telemetry.stage("segment"):
            wanted = needs_probabilities(job.formats, job.options)
            result = segmenter.segment_picture(
                picture, mpp=job.mpp, mpp_source=job.mpp_source, with_probabilities=wanted
            )
        self._telemetry.observe_summary(result.summary)
        if job.keep:
            self._kept.put(ResultKey.of(data, job.mpp, job.mpp_source, segmenter.manifest), result)
        return result

    def _find_kept(self, segmenter: TileSegmenter, data: bytes, job: Job) -> Segmentation | None:
        """The result that was kept of the same image, if the job may take it."""
        if not (job.keep or self._kept.has_for_all):
            return None
        return self._kept.get(
            ResultKey.of(data, job.mpp, job.mpp_source, segmenter.manifest),
            with_probabilities=needs_probabilities(job.formats, job.options),
            asked=job.keep,
        )


async def answer_image(state: State, data: bytes, job: Job, name: str) -> Response:
    """The response to a request for an image in one format, when the image's turn has come.

    Args:
        state: of the application; has the worker and the model.
        data: the file's content.
        job: has one format.
        name: the file's name; see `Worker.answer`.

    Raises:
        FocalPathError: the image is refused, cannot be used, or the model is not available.
    """
    worker: Worker = state.worker
    model: Model = state.model
    tiles = await worker.look(lambda: worker.weigh(model, data, job))
    done = await worker.run(lambda: worker.answer(model, data, job, name), tiles=tiles)
    headers = {MPP_SOURCE_HEADER: done.image.mpp_source}
    if done.image.mpp is not None:
        headers[MPP_HEADER] = f"{done.image.mpp:.6g}"
    (content,), media_type = done.contents, FORMATS[job.formats[0]].media_type
    if isinstance(content, bytes):
        return Response(content, media_type=media_type, headers=headers)
    return StreamingResponse(content, media_type=media_type, headers=headers)
