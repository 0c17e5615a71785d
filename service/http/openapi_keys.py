"""What the OpenAPI document says of API keys, where they are asked for."""

from typing import Any

from service.access.who_may import EVERYBODY, who_may
from service.http.openapi import failure_responses

SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "x-api-key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
}
REFUSALS = (401, 403)


def add_keys(document: dict[str, Any]) -> None:
    """Add how a key is presented, and what whoever may not ask gets, to every route but the probes."""
    document["components"]["securitySchemes"] = SCHEMES
    for path, methods in document["paths"].items():
        refusals = failure_responses(path, REFUSALS)
        for method, operation in methods.items():
            if who_may(method.upper(), path) is not EVERYBODY:
                operation["responses"] |= {str(status): response for status, response in refusals.items()}
                operation["security"] = [{name: []} for name in SCHEMES]
