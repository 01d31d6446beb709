"""The routes of jobs: start one, see how far it is, cancel it.

POST   /jobs       segment a slide
GET    /jobs       the last jobs
GET    /jobs/{id}  one, with its progress
DELETE /jobs/{id}  cancel it; its work is kept, and the next job of the slide continues from it
"""

from typing import Annotated

from fastapi import Body, Path, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from serve.contract.errors import OptionError
from serve.service.route import Route
from serve.service.slides.described import JOB, JOBS, NEW_JOB, with_errors
from serve.service.slides.documents import Job, JobList, JobRequest
from serve.service.slides.state import Slides

_JSON = "application/json"
JobId = Annotated[
    str, Path(description="of a job, from /jobs", examples=["0f2d8c6b7e3a4d5f9b1c2a3e4d5f6a7b"])
]


def _answer(job: Job, status: int = 200) -> Response:
    return Response(job.model_dump_json(), status, media_type=_JSON)


async def _job_start(request: Request, body: Annotated[JobRequest, Body()]) -> Response:
    """Segment a slide in the background, with the engine and the folder of the command line.

    A slide that waits or is segmented already keeps its job, which is answered with 200.
    """
    slides: Slides = request.app.state.slides
    slide = await run_in_threadpool(slides.folder.find, body.slide)
    if slide.problem:
        raise OptionError(f"{slide.file} cannot be segmented: {slide.problem}")
    job, is_new = await run_in_threadpool(slides.jobs.add, body, slide.name, slide.path)
    return _answer(job, 201 if is_new else 200)


async def _job_list(request: Request) -> Response:
    """The last jobs, the newest first."""
    slides: Slides = request.app.state.slides
    found = JobList(jobs=tuple(await run_in_threadpool(slides.jobs.list)))
    return Response(found.model_dump_json(), media_type=_JSON)


async def _job_job(request: Request, job_id: JobId) -> Response:
    """A job with its progress."""
    slides: Slides = request.app.state.slides
    return _answer(await run_in_threadpool(slides.jobs.get, job_id))


async def _job_cancel(request: Request, job_id: JobId) -> Response:
    """Cancel a job. A running one ends within seconds; one that has ended does not change."""
    slides: Slides = request.app.state.slides
    return _answer(await run_in_threadpool(slides.jobs.cancel, job_id))


def job_routes() -> tuple[Route, ...]:
    """The routes, of an application whose state has `slides`."""
    new = with_errors(NEW_JOB, 400, 404, 408, 413, 429, 503, 504)
    return (
        Route("POST", "/jobs", _job_start, new),
        Route("GET", "/jobs", _job_list, with_errors(JOBS, 400, 503)),
        Route("GET", "/jobs/{job_id}", _job_job, with_errors(JOB, 400, 404, 503)),
        Route("DELETE", "/jobs/{job_id}", _job_cancel, with_errors(JOB, 400, 404, 429, 503, 504)),
    )
