"""HEAD: what GET answers, without the body."""

from starlette.types import ASGIApp, Message, Receive, Scope, Send

IS_HEAD = "focalpath.is_head"
"""In the scope of a request whose body nobody gets, for endpoints whose body costs much."""


class HeadRequests:
    """ASGI middleware that answers HEAD as GET without a body, as HTTP asks of every resource."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass HEAD on as a GET whose body is dropped."""
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return

        async def send_head(message: Message) -> None:
            if message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await send(message)

        await self._app({**scope, "method": "GET", IS_HEAD: True}, receive, send_head)
