"""Many images in one request: one line of JSON per image, in their order, as each is done."""

import asyncio
import base64
import json
import logging
from collections import deque
from collections.abc import AsyncIterator, Sequence

from starlette.datastructures import FormData

from serve.answers.registry import FORMATS
from serve.contract.errors import FocalPathError
from serve.inference.summary import ImageInfo
from serve.service.batch_files import BatchFile
from serve.service.error_answers import INTERNAL_CODE, as_fields, status_of
from serve.service.model import Model
from serve.service.worker import Job, Worker, whole

_log = logging.getLogger(__name__)


async def answer_batch(
    files: Sequence[BatchFile],
    form: FormData,
    job: Job,
    worker: Worker,
    model: Model,
) -> AsyncIterator[bytes]:
    """Yield the lines of the answer, in the order of the files.

    A file that cannot be used gets a line that says so; the others are answered all the same.

    Args:
        files: the files to answer.
        form: the form that the files are read from; closed at the end.
        job: what is asked for each file.
        worker: does the work.
        model: segments the images.
    """
    pending: deque[asyncio.Future[bytes]] = deque()
    try:
        for index, file in enumerate(files):
            if len(pending) >= worker.images_at_once:
                yield await pending.popleft()
            pending.append(asyncio.ensure_future(_line(index, file, job, worker, model)))
        while pending:
            yield await pending.popleft()
    finally:  # also when the caller has left
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        await form.close()


async def _line(index: int, file: BatchFile, job: Job, worker: Worker, model: Model) -> bytes:
    entry: dict[str, object] = {"index": index, "name": file.name}

    def weigh() -> tuple[bytes, int]:
        data = file.read()
        return data, worker.weigh(model, data, job)

    def answer(data: bytes) -> tuple[ImageInfo, list[object]]:
        done = worker.answer(model, data, job, file.name)
        pairs = zip(job.formats, done.contents, strict=True)
        return done.image, [_as_json(name, whole(content)) for name, content in pairs]

    try:
        data, tiles = await worker.look(weigh)
        image, outputs = await worker.run(
            lambda: answer(data),
            tiles=tiles,
            may_refuse=False,  # the batch has its place
        )
    except FocalPathError as error:
        entry |= {"status": status_of(error), **as_fields(error)}
    except Exception:  # a bug of ours must not end the other files
        _log.exception("a file of a batch failed")
        message = "The service failed on this file. Its log says more."
        entry |= {"status": 500, "error": message, "code": INTERNAL_CODE}
    else:
        entry |= {"status": 200, "mpp": image.mpp, "mpp_source": image.mpp_source}
        entry |= {"outputs": dict(zip(job.formats, outputs, strict=True))}
    return json.dumps(entry, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def _as_json(name: str, answer: bytes) -> object:
    """Put the answer of a format into JSON: documents as they are, anything else in base64."""
    if FORMATS[name].document is not None:
        return json.loads(answer)
    return base64.b64encode(answer).decode()
