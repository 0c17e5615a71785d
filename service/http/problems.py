"""Errors as `application/problem+json` (RFC 9457): one shape for every answer that is not a success.

An unexpected exception becomes a plain 500 with the request's id; its text goes to the log and never to a client.
"""

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import orjson
from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from service.errors import MAX_ERRORS, FieldError, ServiceError
from service.http.body import shortened
from service.http.inference_protocol.errors import in_protocol, protocol_error

MEDIA_TYPE = "application/problem+json"


def problem_response(
    status: int,
    kind: str,
    title: str,
    request: Request,
    detail: str = "",
    errors: tuple[FieldError, ...] = (),
    headers: Mapping[str, str] | None = None,
) -> Response:
    """One problem document, or what the inference protocol has for one. Of `errors`, the first MAX_ERRORS are told."""
    path = request.scope["path"]  # request.url is made from Host, which may be anything, and then raises
    if in_protocol(path):
        return protocol_error(status, detail or title, errors[:MAX_ERRORS], headers)
    document: dict[str, Any] = {
        "type": f"urn:lrea:problem:{kind}",
        "title": title,
        "status": status,
        "detail": detail,
        "request_id": request.scope.get("request_id", ""),
    }
    if errors:
        document["errors"] = errors[:MAX_ERRORS]
    return Response(orjson.dumps(document), status, headers, MEDIA_TYPE)


def service_problem(request: Request, error: ServiceError) -> Response:
    """What a caller is told of `error`."""
    return problem_response(error.status, error.kind, error.title, request, error.detail, error.errors, error.headers)


async def _service_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServiceError)
    return service_problem(request, error)


async def _http_error(request: Request, error: Exception) -> Response:
    """What the router says by itself: 404 for a path, 405 for a method (with its Allow header)."""
    assert isinstance(error, HTTPException)
    phrase = HTTPStatus(error.status_code).phrase
    detail = f"{request.method} {shortened(request.scope['path'])}: see /docs for the routes of this service"
    kind = phrase.lower().replace(" ", "-")
    return problem_response(error.status_code, kind, phrase, request, detail, headers=error.headers)


async def _client_gone(request: Request, error: Exception) -> Response:
    """The client left before its body was whole: nobody reads this, but the metrics count it as the client's."""
    return problem_response(400, "incomplete-body", "The body ended early", request)


def internal_error(request: Request) -> Response:
    """The answer to an exception that nobody expected."""
    detail = "the service failed; its log has the details under this request_id"
    return problem_response(500, "internal", "Internal error", request, detail)


_ANSWERS = {ServiceError: _service_error, HTTPException: _http_error, ClientDisconnect: _client_gone}


def install(app: FastAPI) -> None:
    """Have `app` answer with problem documents."""
    for kind, answer_one in _ANSWERS.items():
        app.add_exception_handler(kind, answer_one)


async def answer(request: Request, error: Exception) -> Response:
    """The problem document of an expected error, as of an installed app. Raises any other one again."""
    for kind, answer_one in _ANSWERS.items():
        if isinstance(error, kind):
            return await answer_one(request, error)
    raise error
