"""Answers errors as `{"error": message, "code": code}`, with the HTTP status of their kind."""

from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
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
from serve.contract.refusal import most_telling, problem_line, shown
from serve.service.queries import unknown_option

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
_EXPECTED_BODY = "Expected a JSON object, sent with the Content-Type application/json."
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
    first: Any = most_telling(error.errors())
    place = ".".join(str(part) for part in first["loc"][1:])
    if first["type"] == "extra_forbidden":  # in a body: `queries` refuses those of a query
        body: type[BaseModel] = request.scope["route"].body_field.field_info.annotation
        return error_answer(unknown_option(place, body.model_fields))
    if first["type"] == "json_invalid":
        where = f"{first['ctx']['error']} at character {place}"
        return error_answer(OptionError(f"The body is not JSON: {where}. {_EXPECTED_BODY}"))
    if not place:
        found = "missing" if first["input"] is None else f"{shown(first['input'])}"
        return error_answer(OptionError(f"The body is {found}. {_EXPECTED_BODY}"))
    return error_answer(OptionError(f"{problem_line(first, place)}."))


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
