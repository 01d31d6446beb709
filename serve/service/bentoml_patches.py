"""Replaces what BentoML and uvicorn have no setting for; the only place that does so.

`tests/serve/service/test_bentoml_patches.py` fails when one of them changes. BentoML 1.4.39 and
uvicorn 0.54 have no setting for:

- The HTTP protocol. BentoML starts uvicorn itself and passes on only its keep-alive and TLS
  options. uvicorn alone waits for slow clients as long as they like, answers invalid HTTP in plain
  text, and upgrades to websockets. A reverse proxy guards against such clients too, but the service
  may run without one.
- The timeout of requests. `traffic.timeout` has to be above 0. With it BentoML starts a timer per
  request, and keeps it with the request's context until it is due, long after the answer. The
  gateway limits the time, and answers in JSON.
- Paths with an encoded line feed, which do not match the mount of our application: their 404 is in
  plain text.
- The log of the process that starts the workers. `Service.serve_http` always sets up one of its
  own, in text.
"""

import uvicorn.config
from bentoml._internal import log as bentoml_log
from bentoml._internal.server.http import traffic
from starlette.convertors import CONVERTOR_TYPES
from starlette.types import ASGIApp

_PROTOCOL = "serve.service.protocol:ServiceProtocol"


def apply_patches() -> None:
    """Replace the protocol, the timeout, the mount and the set-up of the log in this process."""
    uvicorn.config.HTTP_PROTOCOLS["auto"] = _PROTOCOL
    uvicorn.config.WS_PROTOCOLS["auto"] = None
    vars(traffic)["TimeoutMiddleware"] = _without_timeout
    type(CONVERTOR_TYPES["path"]).regex = "(?s:.*)"
    bentoml_log.configure_logging = _keep_log


def _without_timeout(app: ASGIApp, timeout: float) -> ASGIApp:
    return app


def _keep_log() -> None:
    """Leave the log as `serve.service.logs` has set it up."""
