"""What the OpenAPI document says of the protocol's routes beyond their schemas."""

import re
from collections.abc import Iterable
from http import HTTPStatus
from typing import Any

from service.inference_protocol import wire
from service.inference_protocol.schemas import InferRequest, ProtocolError
from service.openapi import json_body, schema_content

PARAMETERS = {"model_name": "always lrea", "model_version": "model_id of the active model; any other is not found"}
RAW = {wire.BINARY: {"schema": {"type": "string", "format": "binary"}}}  # JSON, then raw tensors
HEADER = {
    "name": wire.HEADER_LENGTH,
    "in": "header",
    "required": False,
    "description": "bytes of JSON in front of the raw tensors; without it, all of the body is JSON",
    "schema": {"type": "integer"},
}


def path_parameters(path: str) -> dict[str, Any]:
    """`openapi_extra` of a route for what it reads from its path."""
    names = re.findall(r"\{(\w+)\}", path)
    return {"parameters": [_path_parameter(name) for name in names]}


def infer(path: str) -> dict[str, Any]:
    """`openapi_extra` of the route that infers: a body of JSON, or of JSON and raw tensors."""
    body = json_body(InferRequest)
    body["requestBody"]["content"] |= RAW
    return {"parameters": [*path_parameters(path)["parameters"], HEADER], **body}


def error_responses(statuses: Iterable[int]) -> dict[int | str, dict[str, Any]]:
    """`responses` of a route for its failures."""
    content = {"application/json": schema_content(ProtocolError)}
    return {status: {"description": HTTPStatus(status).phrase, "content": content} for status in statuses}


def _path_parameter(name: str) -> dict[str, Any]:
    return {"name": name, "in": "path", "required": True, "description": PARAMETERS[name], "schema": {"type": "string"}}
