"""The HTTP service: BentoML runs the workers, the gateway and the endpoints the requests.

BentoML brings the worker processes, `/livez` and `/readyz`. The rest is an application mounted in
it: BentoML's own request parsing fetches URLs that a caller names, answers 500 to broken multipart
bodies and hides the message of a 503; its limits, access log and metrics see neither a request's id
nor the name of its key, and its metrics grow with every path that anybody makes up.
"""

import os
from typing import Any

import bentoml
from bentoml._internal import log as bentoml_log
from bentoml._internal.server.http import traffic
from starlette.exceptions import HTTPException

from serve.service.endpoints import build_app
from serve.service.gateway import build_gateway
from serve.service.logs import configure_logging
from serve.service.protocol import use_service_protocol
from serve.service.telemetry import configure_tracing, flush_traces, forget_dead_workers
from serve.settings import ServeSettings

os.environ.setdefault("BENTOML_DO_NOT_TRACK", "True")  # BentoML reads it when it starts to serve
# The gateway limits the time. BentoML cannot be told so: it starts a timer for every request, and
# keeps it and the request's context until it is due, even where the answer was sent long before.
vars(traffic)["TimeoutMiddleware"] = lambda app, timeout: app
use_service_protocol()
_settings = ServeSettings.from_environment()
app = build_app(_settings)


@bentoml.service(
    name="focalpath",
    workers=_settings.workers,
    logging={"access": {"enabled": False}},
    metrics={"enabled": False},
    tracing={"excluded_urls": ".*"},
)
@bentoml.asgi_app(build_gateway(app, _settings, app.state.telemetry))
class SegmentationService:
    """Segments histopathology images: see `serve.service.endpoints`."""

    def __init__(self) -> None:
        configure_logging(_settings.log_format)
        configure_tracing(_settings)
        forget_dead_workers()
        app.state.model.open_in_background()

    @bentoml.on_shutdown  # type: ignore[untyped-decorator]
    def close(self) -> None:
        """Give back what Triton keeps for us, and send the spans that have not been sent yet."""
        app.state.model.close()
        flush_traces()

    def __is_ready__(self) -> bool:
        if reason := app.state.model.why_not_ready():
            raise HTTPException(503, reason)
        return True


def run(host: str, port: int) -> None:
    """Serve at an IP address and port; returns when the process is told to stop."""
    # Here BentoML would set up a log of its own, in text, in the process that starts the workers.
    bentoml_log.configure_logging = lambda: None
    service: Any = SegmentationService  # the decorator made it a `bentoml.Service`
    service.serve_http(host=host, port=port)
