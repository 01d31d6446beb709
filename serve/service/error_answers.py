"""Answers errors as `{"error": message, "code": code}`, with the HTTP status of their kind."""

import difflib
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from serve.contract.errors import (
    AccessError,
    BusyError,
    FocalPathError,
    FormError,
    ImageError,
    ImageTooLargeError,
    NotFoundError,
    OptionError,
    TookTooLongError,
    UploadTooLargeError,
    UploadTooSlowError,
)

Handler = Callable[[Request, Any], Coroutine[Any, Any, Response]]
INTERNAL_CODE = "internal"
"""Code of all errors that are bugs of ours."""
_STATUS: Mapping[type[FocalPathError], int] = {
    AccessError: 401,
    FormError: 400,
    OptionError: 400,
    ImageError: 400,
    ImageTooLargeError: 413,
    UploadTooLargeError: 413,
    UploadTooSlowError: 408,
    NotFoundError: 404,
    BusyError: 429,
    TookTooLongError: 504,
}
_OTHER_STATUS = 503
"""Status of all other errors, which are not the caller's: the model is not available."""
_CODES = {404: "not_found", 405: "method_not_allowed", 503: "backend_unavailable"}
"""Codes of requests that the web framework refuses, by status."""


def status_of(error: FocalPathError) -> int:
    """The HTTP status of an error."""
    return next((_STATUS[kind] for kind in type(error).__mro__ if kind in _STATUS), _OTHER_STATUS)


def as_fields(error: FocalPathError) -> dict[str, str]:
    """The fields of an error's answer: its message and its code."""
    return {"error": str(error), "code": error.code}


def error_answer(error: FocalPathError, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """The answer to a request that ends in an error; says when to try again where that helps."""
    if isinstance(error, BusyError):
        headers = {"Retry-After": str(error.retry_after_s), **(headers or {})}
    return JSONResponse(as_fields(error), status_of(error), headers)


async def _answer_ours(_: Request, error: Exception) -> Response:
    assert isinstance(error, FocalPathError)
    return error_answer(error)


async def _answer_http(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = _CODES.get(error.status_code, "request_refused")
    fields = {"error": error.detail, "code": code}
    return JSONResponse(fields, error.status_code, error.headers)


async def _answer_invalid_option(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"][1:])
    if first["type"] == "extra_forbidden":
        return error_answer(
            _unknown_option(place, request.app.state.queries[request.scope["route"].path])
        )
    return error_answer(OptionError(f"{place} is {first['input']!r}: {first['msg']}."))


def _unknown_option(name: str, known: Sequence[str]) -> OptionError:
    nearest = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    return OptionError(f"{name!r} is not an option here.{hint} There are: {', '.join(known)}.")


async def _answer_disconnect(_: Request, __: Exception) -> Response:
    # Nobody is left to read it.
    return error_answer(FormError("The request ended before its body did."))


async def _answer_internal(_: Request, __: Exception) -> Response:
    message = "The service failed on this request. Its log says more."
    return JSONResponse({"error": message, "code": INTERNAL_CODE}, 500)


EXCEPTION_HANDLERS: dict[int | type[Exception], Handler] = {
    FocalPathError: _answer_ours,
    HTTPException: _answer_http,
    RequestValidationError: _answer_invalid_option,
    ClientDisconnect: _answer_disconnect,
    Exception: _answer_internal,
}
"""For the application of the endpoints."""
