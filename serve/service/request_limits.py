"""Bounds how many requests wait, how many upload, and how long one may take."""

import asyncio
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.contract.errors import BusyError, TookTooLongError
from serve.service.error_answers import error_answer
from serve.service.work_queue import WorkQueue


class _Caller:
    """The client of a request, which may leave before the answer.

    Args:
        receive: of the request.
        on_body: called once, when the whole body has arrived; may raise to refuse the request.
    """

    def __init__(self, receive: Receive, on_body: Callable[[], None]) -> None:
        self._receive = receive
        self._on_body = on_body
        self._body_read = asyncio.Event()

    async def receive(self) -> Message:
        """The next part of the body."""
        message = await self._receive()
        if not message.get("more_body", False) and not self._body_read.is_set():
            self._body_read.set()
            if message["type"] == "http.request":
                self._on_body()
        return message

    async def leaves(self) -> None:
        """Return when the client has left. Starts to look once the body has been read."""
        await self._body_read.wait()
        while (await self._receive())["type"] != "http.disconnect":
            pass


class RequestLimits:
    """ASGI middleware that answers 429 when too many requests wait, and 504 to slow ones.

    A request takes a place among those that wait when its body is there, so that slow uploads keep
    none from others; how many upload at the same time is bounded apart. When a client leaves, its
    place is free at once, and work that has not begun is dropped. GET and HEAD are not counted:
    they take no place of an image.

    Args:
        app: the application behind it.
        max_requests: how many may be at work or wait.
        max_uploads: how many may send their bodies.
        timeout_s: seconds until a 504, from the request's start.
        queue: of the images, which refuses requests while it is full.
    """

    def __init__(
        self,
        app: ASGIApp,
        max_requests: int,
        max_uploads: int,
        timeout_s: float,
        queue: WorkQueue,
    ) -> None:
        self._app = app
        self._max_requests = max_requests
        self._max_uploads = max_uploads
        self._timeout_s = timeout_s
        self._queue = queue
        self._requests = 0
        self._uploads = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on within the limits."""
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD"):
            await self._app(scope, receive, send)
            return
        refusal = self._refusal()  # at once, before a body is sent for nothing
        if refusal is not None:
            await error_answer(refusal)(scope, receive, send)
            return
        is_waiting = False

        def take_place() -> None:
            nonlocal is_waiting
            if is_waiting:
                return
            if self._requests >= self._max_requests:
                raise self._too_many()
            is_waiting = True
            self._uploads -= 1
            self._requests += 1

        self._uploads += 1
        try:
            if not _has_body(scope):
                take_place()
            await self._within_time(scope, _Caller(receive, take_place), send)
        finally:
            if is_waiting:
                self._requests -= 1
            else:
                self._uploads -= 1

    def _refusal(self) -> BusyError | None:
        if self._requests >= self._max_requests:
            return self._too_many()
        if self._uploads >= self._max_uploads:
            return BusyError(f"{self._uploads} uploads are under way already. Try again later.")
        # What it costs is not known yet, so only where not even one tile would be taken.
        return self._queue.refusal()

    def _too_many(self) -> BusyError:
        return BusyError(
            f"{self._max_requests} requests are waiting already. Try again later.",
            retry_after_s=self._queue.seconds_for_one(),
        )

    async def _within_time(self, scope: Scope, caller: _Caller, send: Send) -> None:
        limit = asyncio.timeout(self._timeout_s)
        started = has_left = False

        async def watch() -> None:
            nonlocal has_left
            await caller.leaves()
            if not started:
                has_left = True
                limit.reschedule(0)

        async def first_ends_the_limit(message: Message) -> None:
            nonlocal started
            if not started:
                started = True
                limit.reschedule(None)  # an answer that has begun cannot become an error
            await send(message)

        watching = asyncio.create_task(watch())
        try:
            async with limit:
                try:
                    await self._app(scope, caller.receive, first_ends_the_limit)
                finally:
                    watching.cancel()
        except TimeoutError:
            if started or not limit.expired():
                raise
            if has_left:
                return  # `RequestLog` says so
            error = TookTooLongError(
                f"The request took longer than {self._timeout_s:g} s. Send a smaller image."
            )
            await error_answer(error)(scope, caller.receive, send)


def _has_body(scope: Scope) -> bool:
    """Whether a body is to arrive, by the request's head."""
    headers = Headers(scope=scope)
    return "transfer-encoding" in headers or headers.get("content-length", "0") != "0"
