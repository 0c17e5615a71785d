"""Who may ask what: every route and every kind of key, over HTTP, against a service that has keys."""

import json
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from service.access.api_keys import ApiKey, Role, digest_of
from service.access.key_ring import KeyRing
from service.access.who_may import ADMIN, EVERYBODY, MONITOR, SCORE, WHO_MAY, Access, Who
from service.http.guard import Guard
from service.http.inference_protocol.errors import in_protocol
from service.metrics import Metrics
from service.process.serve import compose
from service.settings import Settings
from tests.conftest import free_port
from tests.service.cache import Cache
from tests.service.conftest import Serve
from tests.service.keys import key_of
from tests.service.serving import running_service
from tests.service.test_documentation import rows
from tests.tiny import item_id, user_id

USER = user_id("int", 1)
BODY = {"user_id": USER, "candidates": [item_id("int", 1), item_id("int", 2)]}
INFER = {
    "inputs": [
        {"name": "user_id", "shape": [1], "datatype": "INT64", "data": [USER]},
        {"name": "candidates", "shape": [2], "datatype": "INT64", "data": BODY["candidates"]},
    ]
}
PRESENTED = ("none", "wrong", "expired", "score", "monitor", "admin")
KEYS = {role: key_of(role) for role in PRESENTED[1:]}
NO_BEARER = "what Authorization has is no Bearer KEY, send Authorization: Bearer KEY, or X-API-Key: KEY"
EXPIRED_AT = datetime(2026, 1, 1, tzinfo=UTC)

# What a request gets with no key, a wrong one, an expired one, one to score, one to monitor, the administrator's.
TABLE: dict[tuple[str, str], tuple[int, int, int, int, int, int]] = {
    ("POST", "/v1/score"): (401, 401, 401, 200, 403, 200),
    ("POST", "/v1/score/batch"): (401, 401, 401, 200, 403, 200),
    ("GET", "/v1/model"): (401, 401, 401, 200, 403, 200),
    ("GET", "/v1/users/{user_id}"): (401, 401, 401, 403, 403, 200),
    ("POST", "/v2/models/{model_name}/infer"): (401, 401, 401, 200, 403, 200),
    ("POST", "/v2/models/{model_name}/versions/{model_version}/infer"): (401, 401, 401, 200, 403, 200),
    ("GET", "/v2/models/{model_name}"): (401, 401, 401, 200, 403, 200),
    ("GET", "/v2/models/{model_name}/versions/{model_version}"): (401, 401, 401, 200, 403, 200),
    ("GET", "/v2/models/{model_name}/ready"): (401, 401, 401, 200, 403, 200),
    ("GET", "/v2/models/{model_name}/versions/{model_version}/ready"): (401, 401, 401, 200, 403, 200),
    ("GET", "/v2"): (401, 401, 401, 200, 403, 200),
    ("GET", "/v2/health/live"): (200, 200, 200, 200, 200, 200),
    ("HEAD", "/v2/health/live"): (200, 200, 200, 200, 200, 200),
    ("GET", "/v2/health/ready"): (200, 200, 200, 200, 200, 200),
    ("HEAD", "/v2/health/ready"): (200, 200, 200, 200, 200, 200),
    ("POST", "/v2/repository/index"): (401, 401, 401, 200, 403, 200),
    ("GET", "/livez"): (200, 200, 200, 200, 200, 200),
    ("HEAD", "/livez"): (200, 200, 200, 200, 200, 200),
    ("GET", "/readyz"): (200, 200, 200, 200, 200, 200),
    ("HEAD", "/readyz"): (200, 200, 200, 200, 200, 200),
    ("GET", "/metrics"): (401, 401, 401, 403, 200, 200),
    ("GET", "/openapi.json"): (401, 401, 401, 200, 403, 200),
    ("GET", "/docs"): (401, 401, 401, 200, 403, 200),
}
NO_ROUTES: dict[tuple[str, str], tuple[int, int, int, int, int, int]] = {
    ("GET", "/"): (401, 401, 401, 404, 404, 404),
    ("GET", "/nowhere"): (401, 401, 401, 404, 404, 404),
    ("POST", "/v1/score/"): (401, 401, 401, 404, 404, 404),
    ("GET", "/v2/nowhere"): (401, 401, 401, 404, 404, 404),
    ("GET", "/v1/score"): (401, 401, 401, 405, 405, 405),
    ("POST", "/livez"): (401, 401, 401, 405, 405, 405),
    ("HEAD", "/v1/model"): (401, 401, 401, 405, 405, 405),
    ("DELETE", "/v1/users/1"): (401, 401, 401, 405, 405, 405),
    ("OPTIONS", "/v1/score"): (401, 401, 401, 405, 405, 405),
}
EVERY_ANSWER = [
    pytest.param(method, path, presented, status, id=f"{method} {path} {presented}")
    for (method, path), statuses in (TABLE | NO_ROUTES).items()
    for presented, status in zip(PRESENTED, statuses, strict=True)
]


def ring(tmp_path: Path, *keys: ApiKey) -> KeyRing:
    (tmp_path / "keys").write_text("\n".join(key.line() for key in keys))
    return KeyRing(tmp_path / "keys", None, Metrics(CollectorRegistry()))


def api_key(name: str, role: Role, expires: datetime | None = None) -> ApiKey:
    return ApiKey(f"the-{name}", role, digest_of(KEYS[name].encode()), expires)


ALL_KEYS = (
    api_key("expired", Role.ADMIN, EXPIRED_AT),
    api_key("score", Role.SCORE),
    api_key("monitor", Role.MONITOR, datetime.now(UTC) + timedelta(days=1)),
    api_key("admin", Role.ADMIN),
)


@dataclass(frozen=True)
class Guarded:
    """A service with a key for each role."""

    client: httpx.Client
    model_id: str

    def ask(self, method: str, path: str, headers: dict[str, str]) -> httpx.Response:
        """path: may have parameters' names in it."""
        for name, value in (("user_id", USER), ("model_name", "lrea"), ("model_version", self.model_id)):
            path = path.replace(f"{{{name}}}", str(value))
        body: Any = INFER if path.endswith("infer") else {"requests": [BODY]} if path.endswith("batch") else BODY
        return self.client.request(method, path, headers=headers, json=body if method == "POST" else None)

    def score(self, headers: dict[str, str]) -> httpx.Response:
        return self.ask("POST", "/v1/score", headers)


@pytest.fixture(scope="module")
def guarded(store_url: str, int_bundles: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    """For all of this file: it has 170 requests to answer."""
    folder = tmp_path_factory.mktemp("access")
    (folder / "keys").write_text("\n".join(key.line() for key in ALL_KEYS))
    with Cache.of_bundles(store_url, f"{folder.name}-{os.getpid()}", int_bundles) as cache:
        cache.publish({USER: [item_id("int", 3)]})
        values = {"store_url": cache.url, "key_prefix": cache.prefix, "bundles_dir": cache.bundles_dir}
        with running_service(**values, api_keys_file=folder / "keys") as client:
            yield Guarded(client, cache.bundle.model_id)


def bearer(presented: str) -> dict[str, str]:
    return {} if presented == "none" else {"authorization": f"Bearer {KEYS[presented]}"}


@pytest.mark.parametrize(("method", "path", "presented", "status"), EVERY_ANSWER)
def test_who_may_ask_what(guarded: Guarded, method: str, path: str, presented: str, status: int) -> None:
    answer = guarded.ask(method, path, bearer(presented))
    assert answer.status_code == status
    assert answer.headers.get("www-authenticate") == ("Bearer" if status == 401 else None)
    assert len(answer.headers["x-request-id"]) >= 32
    if method != "HEAD" and status in (401, 403):
        if in_protocol(path):
            assert answer.json().keys() == {"error"}
        else:
            kind = {401: "unauthorized", 403: "forbidden"}[status]
            assert answer.json()["type"] == f"urn:lrea:problem:{kind}"
            assert answer.json()["request_id"] == answer.headers["x-request-id"]


def test_the_answers_differ_by_role_as_the_code_s_table_says() -> None:
    statuses: dict[Who, tuple[int, ...]] = {
        EVERYBODY: (200, 200, 200, 200, 200, 200),
        SCORE: (401, 401, 401, 200, 403, 200),
        MONITOR: (401, 401, 401, 403, 200, 200),
        ADMIN: (401, 401, 401, 403, 403, 200),
    }
    assert {(method, path): TABLE[method, path] for method, path in TABLE} == {
        tuple(route.split(" ")): statuses[who] for route, who in WHO_MAY.items()
    }


def test_the_manual_has_the_same_table() -> None:
    roles = {EVERYBODY: "everybody", SCORE: "score, admin", MONITOR: "monitor, admin", ADMIN: "admin"}
    documented = {cells[0].strip("`"): cells[1].replace("`", "") for cells in rows("Asked").values()}
    assert documented == {route: roles[who] for route, who in WHO_MAY.items()}


async def test_every_route_of_the_application_is_in_the_table(cache: Cache, tmp_path: Path) -> None:
    """Also those that the OpenAPI document leaves out."""
    cache.publish({})
    place: dict[str, Any] = {
        "store_url": cache.url,
        "key_prefix": cache.prefix,
        "bundles_dir": cache.bundles_dir,
        "device": "cpu",
    }
    (tmp_path / "keys").write_text(ALL_KEYS[-1].line())
    settings = Settings(**place, port=free_port(), api_keys_file=tmp_path / "keys")
    async with compose(settings, CollectorRegistry()) as server:
        direct: Any = server.config.app
        [routes] = [each.kwargs["routes"] for each in direct._app.user_middleware if each.cls is Guard]
    found = {f"{method} {route.path_format}" for route in routes for method in getattr(route, "methods", ())}
    assert found == set(WHO_MAY)


async def test_a_route_that_nobody_put_into_the_table_is_the_administrator_s(tmp_path: Path) -> None:
    app = FastAPI()

    async def forgotten() -> str:
        return "secret"

    app.add_api_route("/forgotten", forgotten)
    app.add_middleware(Guard, access=Access(ring(tmp_path, *ALL_KEYS)), routes=app.routes)
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        found = {role: (await client.get("/forgotten", headers=bearer(role))).status_code for role in PRESENTED}
    assert found == {"none": 401, "wrong": 401, "expired": 401, "score": 403, "monitor": 403, "admin": 200}


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": f"Bearer {KEYS['score']}"},
        {"authorization": f"bEARER   {KEYS['score']}"},
        {"x-api-key": KEYS["score"]},
        {"x-api-key": KEYS["score"], "authorization": "Basic dXNlcjpwYXNzd29yZA=="},
        {"x-api-key": KEYS["score"], "authorization": "Bearer of-a-proxy"},
        {"x-api-key": "", "authorization": f"Bearer {KEYS['score']}"},
    ],
    ids=["bearer", "any case", "x-api-key", "beside Basic", "beside another Bearer", "beside an empty one"],
)
def test_ways_to_show_a_key(guarded: Guarded, headers: dict[str, str]) -> None:
    answer = guarded.score(headers)
    assert (answer.status_code, answer.json()["user_state"]) == (200, "cached")


@pytest.mark.parametrize(
    ("headers", "detail"),
    [
        ({}, "there is no API key: send Authorization: Bearer KEY, or X-API-Key: KEY"),
        ({"authorization": "Basic dXNlcjpwYXNzd29yZA=="}, f"there is no API key: {NO_BEARER}"),
        ({"authorization": KEYS["score"]}, f"there is no API key: {NO_BEARER}"),
        ({"authorization": "Bearer"}, f"there is no API key: {NO_BEARER}"),
        ({"authorization": "", "x-api-key": ""}, "there is no API key: send Authorization: Bearer KEY"),
        ({"authorization": f"Bearer {KEYS['wrong']}"}, "the API key is none of this service's: ask for one"),
        ({"x-api-key": ""}, "there is no API key: send Authorization: Bearer KEY, or X-API-Key: KEY"),
        ({"x-api-key": KEYS["score"][:-1]}, "the API key is none of this service's"),
        ({"x-api-key": KEYS["score"] + "A"}, "the API key is none of this service's"),
        ({"x-api-key": digest_of(KEYS["score"].encode()).hex()}, "the API key is none of this service's"),
        ({"x-api-key": "\xff" * 5000}, "the API key is none of this service's"),
        ({"x-api-key": KEYS["wrong"], **bearer("score")}, "the API key is none of this service's"),
        (bearer("expired"), "the API key the-expired expired at 2026-01-01T00:00:00Z: ask for a new one"),
    ],
)
def test_what_is_no_key(guarded: Guarded, headers: dict[str, str], detail: str) -> None:
    raw: Any = [(name, value.encode("latin-1")) for name, value in headers.items()]
    answer = guarded.score(raw)
    assert answer.status_code == 401
    assert answer.json()["detail"].startswith(detail)


@pytest.mark.parametrize(
    ("name", "value"), [("X-API-Key", KEYS["score"]), ("Authorization", f"Bearer {KEYS['score']}")]
)
def test_a_header_that_is_there_twice_is_refused(guarded: Guarded, name: str, value: str) -> None:
    """A proxy in front may have judged the other one."""
    for second in (value, "", KEYS["wrong"]):
        raw: Any = [(name, value), (name.lower(), second)]
        answer = guarded.score(raw)
        assert answer.status_code == 401
        assert answer.json()["detail"] == f"{name} is there more than once: send one"
        assert guarded.client.get("/livez", headers=raw).status_code == 200


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/v2/health/live", "/v2/health/ready"])
def test_a_probe_by_head_is_answered_as_one_by_get_without_a_body(guarded: Guarded, path: str) -> None:
    by_get, by_head = guarded.client.get(path), guarded.client.head(path)
    assert (by_head.status_code, by_head.content) == (by_get.status_code, b"")
    for name in ("content-length", "content-type"):
        assert by_head.headers[name] == by_get.headers[name]


def test_a_key_for_something_else_is_told_so(guarded: Guarded) -> None:
    answer = guarded.ask("GET", "/v1/users/{user_id}", bearer("score"))
    assert answer.json()["detail"] == "the API key the-score is for score, wanted one for admin: ask with that one"
    answer = guarded.ask("GET", "/v2", bearer("monitor"))
    assert answer.json() == {"error": "the API key the-monitor is for monitor, wanted one for admin or score: "
                             "ask with that one"}  # fmt: skip


@pytest.mark.parametrize("path", ["/v1/score", "/v2/models/lrea/versions/1/infer", "/nowhere"])
def test_no_body_is_awaited_from_whoever_has_no_key(guarded: Guarded, path: str) -> None:
    with socket.create_connection(("127.0.0.1", guarded.client.base_url.port or 0), timeout=20) as connection:
        head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 1000000\r\n\r\n"
        connection.sendall(head.encode() + b"{")
        assert connection.recv(65536).startswith(b"HTTP/1.1 401 ")


def test_refusals_are_counted_by_route(guarded: Guarded) -> None:
    def count(route: str, status: int) -> float:
        text = guarded.ask("GET", "/metrics", bearer("monitor")).text
        series = f'lrea_requests_total{{route="{route}",status="{status}"}} '
        return sum(float(line.removeprefix(series)) for line in text.splitlines() if line.startswith(series))

    asked = [
        ("POST", "/v1/score", "none", "/v1/score", 401),
        ("POST", "/v1/score", "monitor", "/v1/score", 403),
        ("GET", "/v1/users/7", "score", "/v1/users/{user_id:path}", 403),
        ("GET", "/v1/users/7", "none", "/v1/users/{user_id:path}", 401),
        ("GET", "/nowhere", "none", "none", 401),
        ("GET", "/v1/score", "none", "none", 401),
    ]
    for method, path, presented, route, status in asked:
        before = count(route, status)
        assert guarded.ask(method, path, bearer(presented)).status_code == status
        assert count(route, status) == before + 1


@pytest.mark.parametrize("presented", ["none", "score"])
@pytest.mark.parametrize(("method", "path"), [("OPTIONS", "/v1/score"), ("POST", "/v1/score"), ("GET", "/livez")])
def test_no_page_of_another_origin_may_read_answers(guarded: Guarded, method: str, path: str, presented: str) -> None:
    headers = {
        "origin": "https://elsewhere.example",
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization",
    }
    answer = guarded.ask(method, path, headers | bearer(presented))
    assert answer.status_code == TABLE.get((method, path), NO_ROUTES.get((method, path)))[PRESENTED.index(presented)]  # type: ignore[index]
    assert not [name for name in answer.headers if name.startswith("access-control-")]


def test_the_openapi_document_tells_of_keys(guarded: Guarded, cache: Cache) -> None:
    document = guarded.ask("GET", "/openapi.json", bearer("score")).json()
    assert document["components"]["securitySchemes"].keys() == {"bearer", "x-api-key"}
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            asks = WHO_MAY[f"{method.upper()} {path}"] is not EVERYBODY
            assert operation.get("security") == ([{"bearer": []}, {"x-api-key": []}] if asks else None)
            assert ({"401", "403"} <= operation["responses"].keys()) == asks
    schema = document["paths"]["/v2"]["get"]["responses"]["401"]["content"]["application/json"]["schema"]
    assert schema == {"$ref": "#/components/schemas/ProtocolError"}
    assert "ProtocolError" in document["components"]["schemas"]


def test_without_keys_everybody_may_ask_everything(cache: Cache, serve: Serve) -> None:
    cache.publish({USER: [item_id("int", 3)]})
    client = serve(cache)
    statuses = [client.get(path).status_code for path in (f"/v1/users/{USER}", "/metrics", "/v1/model", "/nowhere")]
    assert statuses == [200, 200, 200, 404]
    assert client.post("/v1/score", json=BODY, headers=bearer("wrong")).status_code == 200
    assert "securitySchemes" not in json.dumps(client.get("/openapi.json").json())
