"""Documentation that cannot drift: docs/service.md against the code, /openapi.json against the answers."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import httpx
import pytest
from prometheus_client import CollectorRegistry
from pydantic import BaseModel

from model.cache_format import Reason
from service import errors, schemas
from service.http.inference_protocol import schemas as protocol_schemas
from service.metrics import STAGES, Metrics
from service.settings import Settings
from service.users.lookup import DEGRADED_BY_RECORD
from tests.service.cache import Cache
from tests.service.conftest import Serve
from tests.tiny import item_id, user_id

MANUAL = (Path(__file__).parents[2] / "docs" / "service.md").read_text()
USER = user_id("int", 1)
GOOD = {"user_id": USER, "candidates": [item_id("int", 1), item_id("int", 2)]}
MODELS = [
    model
    for module in (schemas, protocol_schemas)
    for model in vars(module).values()
    if isinstance(model, type) and issubclass(model, BaseModel) and model.__module__ == module.__name__
    if model.model_fields
]


def rows(first_column: str) -> dict[str, list[str]]:
    """The cells of the manual's table whose first heading this is, by their first cell, without backticks."""
    lines = iter(MANUAL.splitlines())
    next(line for line in lines if line.startswith(f"| {first_column} |"))
    next(lines)
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in _rows_of_table(lines)]
    return {row[0].strip("`"): row for row in cells}


def _rows_of_table(lines: Iterator[str]) -> Iterator[str]:
    for line in lines:
        if not line.startswith("|"):
            return
        yield line


def test_every_setting_is_in_the_manual_with_its_default() -> None:
    documented = rows("Variable")
    assert list(documented) == [f"LREA_{name.upper()}" for name in Settings.model_fields]
    for name, field in Settings.model_fields.items():
        cells = documented[f"LREA_{name.upper()}"]
        wanted = "none" if field.default is None else f"`{field.default}`"
        assert cells[1:] == [wanted, field.description], name


def test_every_metric_is_in_the_manual_with_type_and_labels() -> None:
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    documented = rows("Metric")
    found = {}
    for family in registry.collect():
        name = f"{family.name}_total" if family.type == "counter" else family.name
        found[name] = [family.type, family.documentation]
    assert {name: [cells[1], cells[3]] for name, cells in documented.items()} == found
    for metric in vars(metrics).values():
        if hasattr(metric, "_labelnames"):
            name = metric._name + ("_total" if metric._type == "counter" else "")
            wanted = ", ".join(f"`{label}`" for label in metric._labelnames)
            assert documented[name][2] == wanted, name


def test_every_field_is_in_the_manual() -> None:
    missing = [
        f"{model.__name__}.{name}"
        for model in MODELS
        for name, field in model.model_fields.items()
        if not re.search(rf"^\| `{name}` \|.*{re.escape(field.description or 'undescribed')} \|$", MANUAL, re.MULTILINE)
    ]
    assert missing == []


def test_every_reason_stage_and_problem_is_in_the_manual() -> None:
    for stage in STAGES:
        assert f"| `{stage}` |" in MANUAL
    stores = {error.reason for error in errors.StoreError.__subclasses__()}
    reasons = {"no_active_generation", *stores, *DEGRADED_BY_RECORD.values()}
    assert reasons == set(rows("Reason"))
    assert set(Reason) == set(DEGRADED_BY_RECORD), "every reason of the codec has a word for the caller"
    kinds = {error.kind: str(error.status) for error in errors.ServiceError.__subclasses__()}
    documented = {kind: cells[1] for kind, cells in rows("Kind").items()}
    assert kinds.items() <= documented.items()


@pytest.fixture
def client(cache: Cache, serve: Serve) -> httpx.Client:
    cache.publish({USER: [item_id("int", 3)]})
    return serve(cache)


def test_every_route_is_in_the_manual(client: httpx.Client) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    found = {f"{method.upper()} {path}" for path, methods in paths.items() for method in methods}
    documented = set(rows("Route"))
    assert documented == {route.replace(":path}", "}") for route in found} | {"GET /docs", "GET /openapi.json"}


def test_every_reference_of_openapi_resolves(client: httpx.Client) -> None:
    document = client.get("/openapi.json").json()
    references = set(re.findall(r'"\$ref": ?"#/components/schemas/([^"]+)"', client.get("/openapi.json").text))
    schemas_ = document["components"]["schemas"]
    assert references == set(schemas_), "none missing, none unused"
    assert {"ScoreRequest", "BatchRequest", "Behaviour", "ScoreResponse", "Problem"} <= references
    for path in ("/v1/score", "/v1/score/batch"):
        assert document["paths"][path]["post"]["requestBody"]["required"] is True
    assert schemas_["ScoreRequest"]["required"] == ["user_id", "candidates"]


def test_answers_are_what_the_schemas_say(client: httpx.Client) -> None:
    def check(model: type[BaseModel], answer: httpx.Response) -> None:
        parsed = model.model_validate_json(answer.content)
        assert parsed.model_dump(exclude_unset=True).keys() == answer.json().keys()

    check(schemas.ScoreResponse, client.post("/v1/score", json=GOOD))
    check(schemas.ScoreResponse, client.post("/v1/score", json=GOOD | {"top_k": 1}))
    check(schemas.BatchResponse, client.post("/v1/score/batch", json={"requests": [GOOD]}))
    check(schemas.ModelResponse, client.get("/v1/model"))
    check(schemas.UserResponse, client.get(f"/v1/users/{USER}"))
    check(schemas.ReadyResponse, client.get("/readyz"))
    check(schemas.LiveResponse, client.get("/livez"))
    check(schemas.Problem, client.post("/v1/score", json={}))
    check(schemas.Problem, client.get("/nowhere"))


def test_the_docs_page_needs_nobody_else(client: httpx.Client) -> None:
    page = client.get("/docs")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert not re.findall(r"""(?:src|href)\s*=\s*["']?(?:https?:)?//|<script|@import|url\(""", page.text)
    for text in ("/v1/score/batch", "unknown_candidates", "candidate_features", 'id="ScoreRequest"', "readyz"):
        assert text in page.text
    anchors, targets = set(re.findall(r'href="#([^"]+)"', page.text)), set(re.findall(r'id="([^"]+)"', page.text))
    assert anchors <= targets


def test_the_manuals_examples_are_requests_that_work() -> None:
    """Every JSON body that a curl example sends is a valid request of its route."""
    example = r"curl[^\n]*(/v1/score(?:/batch)?) -H 'content-type[^']*'[^']*'([^']+)'"
    examples: list[tuple[str, str]] = re.findall(example, MANUAL)
    assert {path for path, _ in examples} == {"/v1/score", "/v1/score/batch"}
    for path, body in examples:
        (schemas.BatchRequest if path.endswith("batch") else schemas.ScoreRequest).model_validate_json(body)


def test_states_are_told_apart_by_name() -> None:
    for state in get_args(schemas.ScoreResponse.model_fields["user_state"].annotation):
        assert f"| `{state}` |" in MANUAL
