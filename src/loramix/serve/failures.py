"""Errors as OpenAI's clients expect them: a status, and one sentence that says what to do."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from loramix.errors import Busy, LoramixError, TooLong, UnknownAdapter

log = logging.getLogger("loramix.serve")

TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
CODES: dict[type[LoramixError], str] = {
    UnknownAdapter: "model_not_found",
    TooLong: "context_length_exceeded",
    Busy: "server_busy",
}
RETRY = {"retry-after": "1"}


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """What every response beyond 299 holds."""

    error: ErrorDetail


FAILURES: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody},
    "5XX": {"model": ErrorBody},
}


def body(status: int, message: str, param: str | None = None, code: str | None = None) -> Any:
    kind = TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def failure(error: LoramixError) -> Any:
    """The JSON of an error raised on purpose."""
    return body(error.status, str(error), _named(str(error)), CODES.get(type(error)))


def _named(message: str) -> str | None:
    """The parameter that a message begins with, as ours do: "top_p is 2; expected ..."."""
    first, _, rest = message.partition(" ")
    return first if rest.startswith("is ") and first.isidentifier() and first.islower() else None


async def on_loramix_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, LoramixError)
    headers = dict(RETRY) if error.status in (429, 503) else {}
    headers |= getattr(error, "headers", {})
    return _response(request, error.status, failure(error), headers)


async def on_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    param, message = _invalid(error.errors())
    return _response(request, 400, body(400, message, param))


async def on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    messages = {
        404: f"There is no {request.url.path} here; /docs lists what there is.",
        405: f"{request.url.path} cannot be asked by {request.method}; /docs says how.",
        400: "The body is no JSON; expected an object.",
    }
    message = messages.get(error.status_code, str(error.detail))
    return _response(
        request, error.status_code, body(error.status_code, message), dict(error.headers or {})
    )


async def on_bug(request: Request, error: Exception) -> Response:
    log.error("An error nobody expected.", exc_info=error, extra={"trace": _trace(request)})
    message = f"Something is wrong in the server; its log has more under {_trace(request)}."
    return _response(request, 500, body(500, message))


def _response(
    request: Request, status: int, content: Any, headers: Mapping[str, str] | None = None
) -> Response:
    if trip := getattr(request.state, "trip", None):
        trip.facts["error"] = content["error"]["message"]
    return Plain(content, status, headers)


class Plain(JSONResponse):
    """JSON in ASCII, so that it can quote whatever a client sent."""

    def render(self, content: Any) -> bytes:
        import json

        return json.dumps(content, separators=(",", ":")).encode()


def _trace(request: Request) -> str:
    return str(request.state.trip.trace)


def _invalid(errors: Sequence[Any]) -> tuple[str | None, str]:
    """The field that is wrong and one sentence on it; of several the deepest, as the likeliest."""
    error = max(errors, key=lambda error: (len(error["loc"]), error["type"] == "extra_forbidden"))
    path = [str(part) for part in error["loc"][1:] if not _is_branch(str(part))]
    if error["type"] == "json_invalid":
        return None, f"The body is no JSON ({error['ctx']['error']}); expected an object."
    if error["type"] in ("model_attributes_type", "missing") and not path:
        return None, "The body is no JSON object; send one, as content-type: application/json."
    if not path:
        return None, f"The body cannot be read: {error['msg']}."
    param = ".".join(path)
    if error["type"] == "extra_forbidden":
        return param, f"Unknown parameter {param!r}; {hint(path[-1], known_fields())}"
    if error["type"] == "none_required":
        return param, f"{param} is not supported here; leave it out."
    return param, f"{param}: {error['msg'][0].lower()}{error['msg'][1:]}."


def hint(name: str, known: Sequence[str]) -> str:
    """What to do about a name that is not known here. One of another request's is no slip."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}?" if close and close != [name] else "leave it out."


def _is_branch(part: str) -> bool:
    """Whether pydantic named a branch of a union here, not a field."""
    return "[" in part or part in BRANCHES


BRANCHES = {
    "str",
    "int",
    "float",
    "bool",
    "none",
    "system",
    "developer",
    "user",
    "assistant",
    "tool",
}


def known_fields() -> list[str]:
    from loramix.serve.wire import Wire

    return sorted({name for model in _below(Wire) for name in model.model_fields})


def _below(model: type[BaseModel]) -> list[type[BaseModel]]:
    below = model.__subclasses__()
    return below + [deeper for each in below for deeper in _below(each)]
