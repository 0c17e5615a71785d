"""What every answer must be, whatever was asked: no failure of the service, and every error a valid one."""

from pydantic import ValidationError

from service.http.inference_protocol.errors import in_protocol
from service.http.inference_protocol.schemas import ProtocolError
from service.schemas import Problem
from tests.fuzz.target import Found


def check_error(
    path: str | None, status: int, headers: dict[str, str], body: bytes, *, in_a_hurry: bool = False
) -> None:
    """Raises Found for a 5xx, and for a 4xx that is not of the documented form. path: None where it is not known.

    in_a_hurry: the request says how long it waits, and may be told that it was too short (504).
    """
    if status >= 500 and not (status == 504 and in_a_hurry):
        raise Found(f"{status}: {body[:500]!r}")
    if status < 400:
        return
    media_type = headers.get("content-type", "")
    protocol = media_type == "application/json"
    if path is not None and protocol != in_protocol(path):
        raise Found(f"{path} answers an error as {media_type}")
    if not protocol and media_type != "application/problem+json":
        raise Found(f"an error has the content-type {media_type!r}")
    try:
        if protocol:
            ProtocolError.model_validate_json(body)
            return
        problem = Problem.model_validate_json(body)
    except ValidationError as error:
        raise Found(f"{status} with another document than documented: {body[:500]!r}") from error
    if (
        problem.status != status
        or not problem.type.startswith("urn:lrea:problem:")
        or not problem.title
        or problem.request_id != headers.get("x-request-id")
    ):
        raise Found(f"{status} with a document that contradicts it: {body[:500]!r}")
