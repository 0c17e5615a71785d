"""What the OpenAPI document says of the protocol's routes beyond their schemas."""

import re
from typing import Any

from service.http.inference_protocol import wire
from service.http.inference_protocol.schemas import InferRequest
from service.http.openapi import json_body

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


def _path_parameter(name: str) -> dict[str, Any]:
    return {"name": name, "in": "path", "required": True, "description": PARAMETERS[name], "schema": {"type": "string"}}
