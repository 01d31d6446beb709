"""The HTTP service: BentoML runs the endpoints.

BentoML brings worker processes, `/livez`, `/readyz`, `/metrics`, the time limit (504) and the limit
on waiting requests (429). The endpoints are an application mounted in it, since BentoML's own
request parsing fetches URLs that a caller names, answers 500 to broken multipart bodies and hides
the message of a 503.
"""

import os
from typing import Any

import bentoml

from serve.endpoints import build_app
from serve.settings import ServeSettings

os.environ.setdefault("BENTOML_DO_NOT_TRACK", "True")  # BentoML reads it when it starts to serve
_settings = ServeSettings.from_environment()
app = build_app(_settings)


@bentoml.service(
    name="focalpath",
    workers=_settings.workers,
    traffic={
        "timeout": _settings.request_timeout_s,
        "max_concurrency": _settings.max_waiting * _settings.workers,  # BentoML divides it
    },
    # BentoML's access log breaks off the answer when this header is not UTF-8.
    logging={"access": {"request_content_type": False}},
)
@bentoml.asgi_app(app)
class SegmentationService:
    """Segments histopathology images: see the module for the endpoints."""

    def __init__(self) -> None:
        app.state.model.open_in_background()

    def __is_ready__(self) -> bool:
        ready: bool = app.state.model.is_ready()
        return ready


def run(host: str, port: int) -> None:
    """Serve at an IP address and port; returns when the process is told to stop."""
    service: Any = SegmentationService  # the decorator made it a `bentoml.Service`
    service.serve_http(host=host, port=port)
