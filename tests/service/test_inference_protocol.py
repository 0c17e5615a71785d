"""The Open Inference Protocol, asked by a client made for other servers: its scores are those of /v1/score."""

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import pytest
import tritonclient.http as triton

from model.identifiers import Id, IdKind
from tests.service.cache import WATERMARK, Cache
from tests.service.conftest import Serve
from tests.tiny import ITEMS, item_id, user_id

Tensors = Mapping[str, list[Any]]
Arrays = dict[str, npt.NDArray[Any]]


class Client:
    """A service, asked in both of its interfaces."""

    def __init__(self, http: httpx.Client, kind: IdKind) -> None:
        self.http = http
        self.kind = kind
        self.user = user_id(kind, 1)
        self.triton = triton.InferenceServerClient(f"{http.base_url.host}:{http.base_url.port}")

    def items(self, *numbers: int) -> list[Id]:
        return [item_id(self.kind, number) for number in numbers]

    def infer(self, tensors: Tensors, *, binary: bool, outputs: Any = None, **more: Any) -> triton.InferResult:
        inputs = [_input(name, values, binary) for name, values in tensors.items()]
        return self.triton.infer("lrea", inputs, outputs=outputs, **more)

    def score(self, **fields: Any) -> dict[str, Any]:
        answer = self.http.post("/v1/score", json=fields)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())


def _input(name: str, values: list[Any], binary: bool) -> triton.InferInput:
    datatype, dtype = ("BYTES", np.object_) if values and isinstance(values[0], str) else ("INT64", np.int64)
    tensor = triton.InferInput(name, [len(values)], datatype)
    tensor.set_data_from_numpy(np.array(values, dtype), binary_data=binary)
    return tensor


def _in_json(*names: str) -> list[triton.InferRequestedOutput]:
    return [triton.InferRequestedOutput(name, binary_data=False) for name in names]


def _arrays(result: triton.InferResult) -> Arrays:
    return {output["name"]: result.as_numpy(output["name"]) for output in result.get_response()["outputs"]}


def _texts(array: npt.NDArray[Any]) -> list[str]:
    """BYTES come as bytes where they were sent as bytes, else as text."""
    return [value.decode() if isinstance(value, bytes) else value for value in array.tolist()]


def assert_bits(found: npt.NDArray[Any], wanted: list[float]) -> None:
    assert found.dtype == np.float32
    assert found.tobytes() == np.array(wanted, np.float32).tobytes()


@pytest.fixture(params=["int", "string"])
def client(request: pytest.FixtureRequest, serve: Serve) -> Iterator[Client]:
    kind: IdKind = request.param
    cache: Cache = request.getfixturevalue("cache" if kind == "int" else "string_cache")
    cache.publish({user_id(kind, 1): [item_id(kind, (7 * number) % ITEMS) for number in range(60)]})
    client = Client(serve(cache), kind)
    yield client
    client.triton.close()


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False])
def test_a_thousand_candidates_score_as_in_v1(client: Client, binary_in: bool, binary_out: bool) -> None:
    """Known and unknown ones, by all four ways in and out."""
    candidates = client.items(*range(1000))
    tensors = {"user_id": [client.user], "candidates": candidates}
    outputs = None if binary_out else _in_json("scores", "user_state", "degraded")
    result = client.infer(tensors, binary=binary_in, outputs=outputs, request_id="a request")
    wanted = client.score(user_id=client.user, candidates=candidates)
    found = _arrays(result)
    assert list(found) == ["scores", "user_state", "degraded"]
    assert found["scores"].shape == (1000,)
    assert_bits(found["scores"], wanted["scores"])
    assert _texts(found["user_state"]) == ["cached"]
    assert _texts(found["degraded"]) == []
    response = result.get_response()
    assert [response[name] for name in ("model_name", "model_version", "id")] == [
        "lrea",
        wanted["model_id"],
        "a request",
    ]
    facts = ("generation", "gap_rows", "dropped_rows", "unknown_candidates")
    assert response["parameters"] == {name: wanted[name] for name in facts}
    assert response["parameters"]["unknown_candidates"] == 1000 - ITEMS
    assert ("data" in result.get_output("scores")) is not binary_out


@pytest.mark.parametrize("binary", [True, False])
def test_top_k_gives_items_and_scores(client: Client, binary: bool) -> None:
    candidates = client.items(*range(100))
    outputs = None if binary else _in_json("scores", "items")
    tensors = {"user_id": [client.user], "candidates": candidates}
    result = client.infer(tensors, binary=binary, outputs=outputs, parameters={"top_k": 7})
    wanted = client.score(user_id=client.user, candidates=candidates, top_k=7)["scores"]
    found = _arrays(result)
    assert list(found) == (["items", "scores", "user_state", "degraded"] if binary else ["scores", "items"])
    items = found["items"].tolist() if client.kind == "int" else _texts(found["items"])
    assert items == wanted["items"]
    assert_bits(found["scores"], wanted["scores"])


@pytest.mark.parametrize("binary", [True, False])
def test_recent_items_and_history_count_as_in_v1(client: Client, binary: bool) -> None:
    candidates, recent = client.items(*range(50)), client.items(4, 8, 15, 16)
    times = [WATERMARK - 1, WATERMARK, WATERMARK + 1, WATERMARK + 2]
    rows = [{"item_id": item, "timestamp": time} for item, time in zip(recent, times, strict=True)]
    base: dict[str, list[Any]] = {"user_id": [client.user], "candidates": candidates}

    def check(more: Tensors, state: str, **fields: Any) -> Any:
        result = client.infer({**base, **more}, binary=binary)
        wanted = client.score(user_id=client.user, candidates=candidates, **fields)
        assert_bits(result.as_numpy("scores"), wanted["scores"])
        assert _texts(result.as_numpy("user_state")) == [wanted["user_state"]] == [state]
        parameters = result.get_response()["parameters"]
        assert parameters == {name: wanted[name] for name in parameters}
        return parameters

    assert check({"recent_items": recent}, "cached", recent_items=recent)["dropped_rows"] == 0
    dated: Tensors = {"recent_items": recent, "recent_timestamps": times}
    assert check(dated, "cached", recent_items=rows)["dropped_rows"] == 2
    check({"history": recent}, "recomputed", history=recent)
    check({"history": recent, "history_timestamps": times}, "recomputed", history=rows)
    check({"history": recent, "recent_items": recent[:1]}, "recomputed", history=recent, recent_items=recent[:1])


@pytest.mark.parametrize("binary", [True, False])
def test_context_and_features_count_as_in_v1(client: Client, binary: bool) -> None:
    candidates, categories = client.items(0, 1, 2), ["category-3", "category-4", "unheard of"]
    tensors: Tensors = {"user_id": [client.user], "candidates": candidates, "context.device": ["tablet"]}
    features = {"candidate_features.category": categories}
    found = client.infer({**tensors, **features}, binary=binary).as_numpy("scores")
    asked = {"user_id": client.user, "candidates": candidates}
    changed = {"context": {"device": "tablet"}, "candidate_features": {"category": categories}}
    assert_bits(found, client.score(**asked, **changed)["scores"])
    assert found.tolist() != client.score(**asked)["scores"]


def test_a_leading_axis_of_one_is_taken(client: Client) -> None:
    """As clients of servers that batch along the first axis send it; nested data is JSON's way to say the same."""
    wanted = client.score(user_id=client.user, candidates=client.items(1, 2, 3))["scores"]
    datatype = "INT64" if client.kind == "int" else "BYTES"
    user, data = [client.user], client.items(1, 2, 3)
    for users, candidates in ((user, data), ([user], [data])):
        inputs = [
            {"name": "user_id", "shape": [1, 1], "datatype": datatype, "data": users},
            {"name": "candidates", "shape": [1, 3], "datatype": datatype, "data": candidates},
        ]
        answer = client.http.post("/v2/models/lrea/infer", json={"inputs": inputs}).json()
        assert answer["outputs"][0] == {"name": "scores", "datatype": "FP32", "shape": [3], "data": wanted}
        assert "id" not in answer


def test_each_output_is_sent_as_it_is_wanted(client: Client) -> None:
    outputs = [
        triton.InferRequestedOutput("degraded", binary_data=True),
        triton.InferRequestedOutput("user_state", binary_data=False),
        triton.InferRequestedOutput("scores", binary_data=True),
    ]
    tensors = {"user_id": [client.user], "candidates": client.items(1, 2)}
    result = client.infer(tensors, binary=True, outputs=outputs)
    found = [
        (output["name"], output.get("parameters"), output.get("data")) for output in result.get_response()["outputs"]
    ]
    assert found == [
        ("degraded", {"binary_data_size": 0}, None),
        ("user_state", None, ["cached"]),
        ("scores", {"binary_data_size": 8}, None),
    ]
    assert_bits(result.as_numpy("scores"), client.score(user_id=client.user, candidates=client.items(1, 2))["scores"])


def test_what_the_server_and_the_model_say_of_themselves(client: Client) -> None:
    model_id = client.http.get("/v1/model").json()["model_id"]
    assert client.triton.get_server_metadata() == {
        "name": "lrea", "version": "1", "extensions": ["binary_tensor_data"],
    }  # fmt: skip
    assert client.triton.is_server_live()
    assert client.triton.is_server_ready()
    assert client.triton.is_model_ready("lrea")
    assert client.triton.is_model_ready("lrea", model_id)
    assert not client.triton.is_model_ready("lrea", "1")
    assert not client.triton.is_model_ready("other")
    index = [{"name": "lrea", "version": model_id, "state": "READY", "reason": ""}]
    assert client.triton.get_model_repository_index() == index
    metadata = client.triton.get_model_metadata("lrea")
    assert metadata == client.triton.get_model_metadata("lrea", model_id)
    ids = "INT64" if client.kind == "int" else "BYTES"
    assert (metadata["name"], metadata["versions"], metadata["platform"]) == ("lrea", [model_id], "lrea_torch")
    assert {(tensor["name"], tensor["datatype"], *tensor["shape"]) for tensor in metadata["inputs"]} == {
        ("user_id", ids, 1), ("candidates", ids, -1), ("recent_items", ids, -1), ("history", ids, -1),
        ("recent_timestamps", "INT64", -1), ("history_timestamps", "INT64", -1),
        ("context.device", "BYTES", 1), ("candidate_features.category", "BYTES", -1),
    }  # fmt: skip
    assert {(tensor["name"], tensor["datatype"], *tensor["shape"]) for tensor in metadata["outputs"]} == {
        ("items", ids, -1), ("scores", "FP32", -1), ("user_state", "BYTES", 1), ("degraded", "BYTES", -1),
    }  # fmt: skip


def test_a_version_that_is_not_served_is_not_found(client: Client) -> None:
    tensors = {"user_id": [client.user], "candidates": client.items(1)}
    model_id = client.http.get("/v1/model").json()["model_id"]
    wanted = client.infer(tensors, binary=True).as_numpy("scores")
    assert client.infer(tensors, binary=True, model_version=model_id).as_numpy("scores") == wanted
    asks: list[Callable[[], object]] = [
        lambda: client.infer(tensors, binary=True, model_version="7"),
        lambda: client.triton.get_model_metadata("lrea", "7"),
    ]
    for ask in asks:
        with pytest.raises(triton.InferenceServerException, match=f"version '7' .* version '{model_id}' is") as error:
            ask()
        assert error.value.status() == "404"
    with pytest.raises(triton.InferenceServerException, match=r"no model 'other': .* called 'lrea'") as error:
        client.triton.infer("other", [_input("user_id", [client.user], True)])
    assert error.value.status() == "404"


def test_time_and_counts_are_kept_as_for_v1(client: Client) -> None:
    def numbers() -> dict[str, float]:
        lines = client.http.get("/metrics").text.splitlines()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}

    before = numbers()
    client.infer({"user_id": [client.user], "candidates": client.items(1, 2, 500)}, binary=True)
    after = numbers()
    route = 'route="/v2/models/{model_name}/infer"'
    assert after[f"lrea_request_seconds_count{{{route}}}"] == 1
    assert after[f'lrea_requests_total{{{route},status="200"}}'] == 1
    for name, change in {
        "lrea_candidates_total": 3,
        "lrea_unknown_candidates_total": 1,
        'lrea_users_total{state="cached"}': 1,
        'lrea_stage_seconds_count{stage="parse"}': 1,
        'lrea_stage_seconds_count{stage="serialize"}': 1,
    }.items():
        assert after[name] - before.get(name, 0) == change, name
    inputs = [{"name": "user_id", "shape": [1], "datatype": "INT64" if client.kind == "int" else "BYTES"}]
    inputs.append({**inputs[0], "name": "candidates"})
    body = {"inputs": [inputs[0] | {"data": [client.user]}, inputs[1] | {"data": client.items(1)}]}
    timing = client.http.post("/v2/models/lrea/infer", json=body).headers["server-timing"]
    assert [part.partition(";")[0] for part in timing.split(", ")][:3] == ["parse", "encode", "queue"]


def test_the_manuals_example_works(cache: Cache, serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    manual = (Path(__file__).parents[2] / "docs" / "service.md").read_text()
    [example] = [block for block in re.findall(r"```python\n(.*?)```", manual, re.DOTALL) if "tritonclient" in block]
    cache.publish()
    http = serve(cache)
    address = f"{http.base_url.host}:{http.base_url.port}"
    assert "127.0.0.1:8000" in example
    names: dict[str, Any] = {}
    exec(example.replace("127.0.0.1:8000", address), names)
    names["client"].close()
    wanted = http.post("/v1/score", json={"user_id": 1, "candidates": [10, 11, 12], "top_k": 2}).json()["scores"]
    assert capsys.readouterr().out == f"{np.array(wanted['items'])} {np.array(wanted['scores'], np.float32)}\n"


def test_what_is_degraded_says_so(int_bundles: Any, serve: Serve, store_url: str, key_prefix: str) -> None:
    """Nothing is published: an unknown user, and the answer says why."""
    with Cache.of_bundles(store_url, key_prefix, int_bundles) as cache:
        client = Client(serve(cache), "int")
        for binary in (True, False):
            outputs = None if binary else _in_json("degraded", "user_state")
            result = client.infer({"user_id": [client.user], "candidates": [1]}, binary=True, outputs=outputs)
            assert _texts(result.as_numpy("degraded")) == ["no_active_generation"]
            assert _texts(result.as_numpy("user_state")) == ["empty"]
            assert "generation" not in result.get_response()["parameters"]
        client.triton.close()
