"""The OpenAPI document. Handlers read their bodies themselves, so their schemas are named here and added at the end."""

from collections.abc import Iterable
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from service.http.inference_protocol.errors import in_protocol
from service.http.inference_protocol.schemas import InferRequest, ProtocolError
from service.http.problems import MEDIA_TYPE
from service.schemas import BatchRequest, Problem, ScoreRequest

REF = "#/components/schemas/{model}"
OF_ANY_REQUEST = (400, 408, 431, 503)  # a connection may answer these, whatever the route (connection.py)
NAMED_BY_HANDLERS: tuple[type[BaseModel], ...] = (ScoreRequest, BatchRequest, Problem, InferRequest, ProtocolError)


def json_body(schema: type[BaseModel]) -> dict[str, Any]:
    """`openapi_extra` of a route that reads a body of `schema`."""
    return {"requestBody": {"required": True, "content": {"application/json": schema_content(schema)}}}


def schema_content(schema: type[BaseModel]) -> dict[str, Any]:
    """What a media type's content is, by reference."""
    return {"schema": {"$ref": REF.format(model=schema.__name__)}}


def path_parameter(name: str, description: str) -> dict[str, Any]:
    """`openapi_extra` of a route that reads `name` from its path."""
    parameter = {"name": name, "in": "path", "required": True, "description": description, "schema": {"type": "string"}}
    return {"parameters": [parameter]}


def problem_responses(statuses: Iterable[int]) -> dict[int | str, dict[str, Any]]:
    """`responses` of a route for its failures."""
    return _failures(statuses, {MEDIA_TYPE: schema_content(Problem)})


def protocol_error_responses(statuses: Iterable[int]) -> dict[int | str, dict[str, Any]]:
    """The same of a route of the inference protocol."""
    return _failures(statuses, {"application/json": schema_content(ProtocolError)})


def failure_responses(path: str, statuses: Iterable[int]) -> dict[int | str, dict[str, Any]]:
    """The same of whichever route this path is."""
    return (protocol_error_responses if in_protocol(path) else problem_responses)(statuses)


def _failures(statuses: Iterable[int], content: dict[str, Any]) -> dict[int | str, dict[str, Any]]:
    return {status: {"description": HTTPStatus(status).phrase, "content": content} for status in statuses}


def document(app: FastAPI) -> dict[str, Any]:
    """The whole document, every reference in it resolvable."""
    result = get_openapi(
        title=app.title, version=app.version, summary=app.summary, description=app.description, routes=app.routes
    )
    for path, operations in result["paths"].items():
        failures = failure_responses(path, OF_ANY_REQUEST)
        for operation in operations.values():
            responses = {str(status): each for status, each in failures.items()} | operation["responses"]
            operation["responses"] = dict(sorted(responses.items()))
    _, definitions = models_json_schema([(schema, "validation") for schema in NAMED_BY_HANDLERS], ref_template=REF)
    result.setdefault("components", {}).setdefault("schemas", {}).update(definitions["$defs"])
    return result
