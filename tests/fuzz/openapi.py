"""Schemathesis over the service's own OpenAPI document: cases that it allows, and cases that it does not.

Half of the cases are made from the document as it is. Of those, few get past the checks of ids: so the other half is
made from a narrowed one, whose ids are those of this model and its users, and what is valid there must be answered.
"""

import copy
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from schemathesis import Case, GenerationMode, Response
from schemathesis.checks import CHECKS, load_all_checks
from schemathesis.core.failures import FailureGroup
from schemathesis.core.result import Ok
from schemathesis.schemas import APIOperation

from tests.fuzz.answers import check_error
from tests.fuzz.target import HISTORIES, Found, Target

Json = dict[str, Any]
Operation = APIOperation[Any, Any, Any, Any]
TAKEN = ("/v1/score", "/v1/score/batch", "/v1/users/{user_id}")  # what is valid in the narrowed document is answered
HELD_CHECKS = (  # a 5xx is told in answers.py: 504 is right where a case is in a hurry
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
)


def fuzz_openapi(target: Target, cases: int, seed_: int) -> Json:
    """Ask `cases` cases or more, shared among the operations. Raises Found with the first one answered wrongly."""
    document = httpx.get(f"{target.base_url}/openapi.json").json()
    statuses: Counter[int] = Counter()
    model_id = httpx.get(f"{target.base_url}/v1/model").json()["model_id"]
    documents = (document, narrowed(document, model_id))
    operations = [(operation, each is not document) for each in documents for operation in _operations(each)]
    # An operation without parameters has one case; the others share what it leaves.
    varied = sum(_varies(operation) for operation, _ in operations)
    share = -(-(cases - len(operations) + varied) // varied)
    with requests.Session() as session:
        for operation, is_narrow in operations:
            wanted = share if _varies(operation) else 1
            _fuzz(operation, wanted, seed_, _Asker(session, target, is_narrow, statuses))
    return {"cases": statuses.total(), "statuses": dict(sorted(statuses.items()))}


def narrowed(document: Json, model_id: str) -> Json:
    """The document for this model alone: known users, integer items, its columns; the model's name in paths."""
    narrow = copy.deepcopy(document)
    schemas = narrow["components"]["schemas"]
    user, item = {"enum": sorted(HISTORIES)}, {"type": "integer", "minimum": 900, "maximum": 1200}
    score = schemas["ScoreRequest"]["properties"]
    score["user_id"] = user
    score["candidates"]["items"] = item
    row = {"anyOf": [item, {"$ref": "#/components/schemas/Behaviour"}]}
    score["recent_items"]["items"] = row
    score["history"] = {"type": "array", "items": row}
    schemas["Behaviour"]["properties"]["item_id"] = item
    device = {"enum": ["phone", "tablet", "watch", None]}
    score["context"] = {"type": "object", "properties": {"device": device}, "additionalProperties": False}
    score["candidate_features"] = {"type": "object", "maxProperties": 0}  # a schema cannot say one per candidate
    score["timeout_ms"] = {"type": "integer", "minimum": 20_000}
    names = {"user_id": user, "model_name": {"enum": ["lrea"]}, "model_version": {"enum": [model_id]}}
    for operations in narrow["paths"].values():
        for operation in operations.values():
            for parameter in operation.get("parameters", []):
                parameter["schema"] = names.get(parameter["name"], parameter["schema"])
    return narrow


def _operations(document: Json) -> Iterator[Operation]:
    for found in schemathesis.openapi.from_dict(document).get_all_operations():
        assert isinstance(found, Ok), found
        yield found.ok()


def _varies(operation: Operation) -> bool:
    return bool(list(operation.iter_parameters()) or operation.body)


def _fuzz(
    operation: Operation,
    cases: int,
    seed_: int,
    asker: "_Asker",
) -> None:
    strategies = [operation.as_strategy(mode) for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)]

    @seed(seed_)
    @settings(
        max_examples=cases,
        database=None,
        deadline=None,
        phases=[Phase.generate],  # what is found is shown as it was sent; shrinking would take the rest of the time
        suppress_health_check=list(HealthCheck),
    )
    @given(case=st.one_of(strategies) if _varies(operation) else strategies[0])
    def ask(case: Case[Any]) -> None:
        asker.ask(case)

    ask()


@dataclass
class _Asker:
    """Asks one case and looks at the answer."""

    session: requests.Session
    target: Target
    is_narrow: bool
    statuses: Counter[int]

    def ask(self, case: Case[Any]) -> None:
        answer = case.call(base_url=self.target.base_url, session=self.session)
        self.statuses[answer.status_code] += 1
        try:
            case.validate_response(answer, checks=_checks())
            self._check(case, answer)
        except (FailureGroup, Found) as error:
            raise Found(f"{error}\n{case.as_curl_command(base_url=self.target.base_url)}") from error

    def _check(self, case: Case[Any], answer: Response) -> None:
        headers = {name.lower(): values[0] for name, values in answer.headers.items()}
        in_a_hurry = "timeout" in str(case.body)
        path = urlsplit(answer.request.url or "").path
        check_error(path, answer.status_code, headers, answer.content, in_a_hurry=in_a_hurry)
        is_valid = case.meta is not None and case.meta.generation.mode is GenerationMode.POSITIVE
        if not (self.is_narrow and is_valid and case.path in TAKEN) or _has_floats(case.body):
            return
        if answer.status_code != 200:
            raise Found(f"what the document allows got {answer.status_code}: {answer.text}")


def _has_floats(value: Any) -> bool:
    """1.0 is an integer to JSON Schema, and none to the service."""
    if isinstance(value, dict):
        return any(map(_has_floats, value.values()))
    return any(map(_has_floats, value)) if isinstance(value, list) else isinstance(value, float)


def _checks() -> list[Any]:
    load_all_checks()
    return list(CHECKS.get_by_names(HELD_CHECKS))
