"""The HTTP service as BentoML runs it: worker processes, `/livez` and `/readyz`.

The gateway and the endpoints are an ASGI application that is mounted in it. They replace BentoML's
own endpoints, which fetch URLs that a caller names, answer 500 to broken multipart bodies and hide
the message of a 503. They replace its limits, access log and metrics too: those know neither the
request id nor the name of the key, and the metrics grow with every path that a caller invents.
"""

import os
import signal
import threading
import time
from typing import Any

import bentoml
from starlette.exceptions import HTTPException

from serve.service.bentoml_patches import apply_patches
from serve.service.endpoints import build_app
from serve.service.gateway import build_gateway
from serve.service.logs import configure_logging
from serve.service.telemetry import forget_dead_workers
from serve.service.tracing import configure_tracing, flush_traces
from serve.settings import ServeSettings

_LOOK_EVERY_S = 1.0
_PARENT_VARIABLE = "PARENT_OF_FOCALPATH"
"""Of the process that starts the workers: it may be gone before they can ask for it."""
os.environ.setdefault("BENTOML_DO_NOT_TRACK", "True")  # BentoML reads it when it starts to serve
apply_patches()
_settings = ServeSettings.from_environment()
app = build_app(_settings)


@bentoml.service(
    name="focalpath",
    workers=_settings.workers,
    logging={"access": {"enabled": False}},
    metrics={"enabled": False},
    tracing={"excluded_urls": ".*"},
)
@bentoml.asgi_app(build_gateway(app, _settings))
class SegmentationService:
    """Segments histopathology images: see `serve.service.endpoints`."""

    def __init__(self) -> None:
        configure_logging(_settings.log_format)
        threading.Thread(target=_end_with_the_parent, name="parent", daemon=True).start()
        configure_tracing(_settings)
        forget_dead_workers()
        app.state.model.open_in_background()
        if app.state.slides is not None:
            app.state.slides.start()

    @bentoml.on_shutdown  # type: ignore[untyped-decorator]
    def close(self) -> None:
        """Close the model, and send the spans that have not been sent yet."""
        if app.state.slides is not None:
            app.state.slides.close()
        app.state.model.close()
        flush_traces()

    def __is_ready__(self) -> bool:
        if reason := app.state.model.why_not_ready():
            raise HTTPException(503, reason)
        return True


def _end_with_the_parent() -> None:
    """End this worker when the process that started it is killed: else it would keep the port."""
    parent = int(os.environ.get(_PARENT_VARIABLE, os.getppid()))
    while os.getppid() == parent:
        time.sleep(_LOOK_EVERY_S)
    os.kill(os.getpid(), signal.SIGTERM)


def run(host: str, port: int) -> None:
    """Serve at an IP address and port; returns when the process is told to stop."""
    os.environ[_PARENT_VARIABLE] = str(os.getpid())
    service: Any = SegmentationService  # the decorator made it a `bentoml.Service`
    service.serve_http(host=host, port=port)
