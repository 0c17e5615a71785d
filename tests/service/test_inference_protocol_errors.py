"""Hostile and mistaken requests of the Open Inference Protocol: a status, one line of words, never a 5xx."""

import json
import struct
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.http as triton
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from service.errors import InvalidRequest, MalformedJson
from service.http.body import Size
from service.http.inference_protocol.wire import read_request, texts
from tests.service.cache import Cache
from tests.service.serving import running_service
from tests.tiny import item_id, user_id

USER = user_id("int", 1)
ITEMS = [item_id("int", 1), item_id("int", 2)]
INFER = "/v2/models/lrea/infer"
LIMITS = {"max_candidates": 5, "max_history": 6, "max_body_bytes": 20_000}
LENGTH = "inference-header-content-length"
USER_INPUT = {"name": "user_id", "shape": [1], "datatype": "INT64", "data": [USER]}
CANDIDATES = {"name": "candidates", "shape": [2], "datatype": "INT64", "data": ITEMS}
GOOD: dict[str, Any] = {"inputs": [USER_INPUT, CANDIDATES]}
MOST = Size(10_000, 1_000)
DEEP = b"[" * 3000 + b"]" * 3000


@pytest.fixture(scope="module")
def client(store_url: str, int_bundles: Any) -> Iterator[httpx.Client]:
    """One service for the module: nothing here changes what it serves."""
    with Cache.of_bundles(store_url, "test-protocol-errors", int_bundles) as cache:
        cache.publish({USER: [item_id("int", 3)]})
        with running_service(
            store_url=store_url, key_prefix=cache.prefix, bundles_dir=cache.bundles_dir, **LIMITS
        ) as client:
            yield client


def error(answer: httpx.Response, status: int) -> str:
    """The words, once the answer is known to be an error of the protocol's form."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"]
    body: dict[str, str] = answer.json()
    assert list(body) == ["error"]
    assert body["error"]
    return body["error"]


def with_input(**changes: Any) -> dict[str, Any]:
    """The good request, its candidates changed; None takes a field away."""
    changed = {name: value for name, value in {**CANDIDATES, **changes}.items() if value is not None}
    return {"inputs": [USER_INPUT, changed]}


def more(name: str, data: list[Any], datatype: str = "INT64") -> dict[str, Any]:
    """The good request with one input more."""
    extra = {"name": name, "shape": [len(data)], "datatype": datatype, "data": data}
    return {"inputs": [*GOOD["inputs"], extra]}


def test_the_good_request_is_good(client: httpx.Client) -> None:
    assert client.post(INFER, json=GOOD).json()["outputs"][1]["data"] == ["cached"]


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ([], "Input should be an object"),
        ({}, "inputs: is missing: send it"),
        ({"inputs": []}, "inputs: is empty: send at least one"),
        ({"inputs": [USER_INPUT]}, "inputs: there is no input 'candidates'"),
        ({"inputs": [CANDIDATES]}, "inputs: there is no input 'user_id'"),
        ({"inputs": [USER_INPUT, CANDIDATES, CANDIDATES]}, "inputs/2: input 'candidates' is there twice"),
        (GOOD | {"id": 7}, "id: Input should be a valid string"),
        (GOOD | {"parameters": {"top_k": 0}}, "parameters/top_k: Input should be greater than or equal to 1"),
        (GOOD | {"parameters": {"top_k": 1.5}}, "parameters/top_k"),
        (GOOD | {"parameters": {"timeout_ms": 0}}, "parameters/timeout_ms"),
        (GOOD | {"parameters": {"sequence_id": 3}}, "parameters/sequence_id: is no field of this route"),
        (GOOD | {"outputs": [{"name": "logits"}]}, "outputs/0: no output is called 'logits': there are scores,"),
        (GOOD | {"outputs": [{"name": "items"}]}, "items only with the parameter top_k"),
        (GOOD | {"outputs": [{"name": "scores"}] * 2}, "outputs/1: output 'scores' is wanted twice"),
        (GOOD | {"outputs": [{"name": "scores", "parameters": {"classification": 2}}]}, "classification"),
        (with_input(name="items"), "inputs: no input is called 'items': there are user_id, candidates,"),
        (with_input(datatype="FP32"), "inputs/1/datatype: Input should be 'INT64' or 'BYTES'"),
        (with_input(shape=[]), "inputs/1/shape"),
        (with_input(shape=[-2]), "inputs/1/shape/0: Input should be greater than or equal to 0"),
        (with_input(shape=[2, 1]), "inputs/1/shape: is [2, 1], wanted [n] or [1, n]"),
        (with_input(shape=[-1, -2]), "inputs/1/shape/0"),
        (with_input(shape=[1, 1, 2]), "inputs/1/shape"),
        (with_input(shape=[3]), "inputs/1/data: has 2 elements, and the shape says 3"),
        (with_input(shape=[2**70]), f"inputs/1/shape: has {2**70} elements, at most 6 are taken"),
        (with_input(shape=[6], data=[1] * 6), "candidates: has 6 rows, at most 5 are taken"),
        (with_input(shape=[0], data=[]), "candidates: has no elements"),
        (with_input(data=None), "inputs/1: has neither data nor binary_data_size"),
        (with_input(data=[1, True]), "inputs/1/data/1: must be an integer or a string"),
        (with_input(data=[1, None]), "inputs/1/data/1: must be an integer or a string"),
        (with_input(data=[1, 2.0]), "inputs/1/data/1: must be an integer or a string"),
        (with_input(data=[1, "2"]), "inputs/1/data: has other elements than 64-bit integers"),
        (with_input(data=[[1], [2]]), "inputs/1/data: has other elements than 64-bit integers"),
        (with_input(data=[1, 2**63]), "inputs/1/data: an element does not fit"),
        (with_input(data=[1, -(2**63) - 1]), "inputs/1/data: an element does not fit"),
        (with_input(datatype="BYTES"), "inputs/1/data: has other elements than strings"),
        (with_input(datatype="BYTES", data=["a", "b"]), "candidates/0: is a string, and this model's item ids"),
        (with_input(datatype="BYTES", data=["a", ""]), "candidates: has an empty string"),
        (with_input(parameters={"binary_data_size": 0}), "inputs/1: has both data and binary_data_size"),
        (with_input(data=None, parameters={"binary_data_size": 16}), "binary_data_size is 16, and 0 bytes are left"),
        (with_input(data=None, parameters={"binary_data_size": -8}), "binary_data_size: Input should be greater"),
        (with_input(data=None, parameters={"shared_memory_region": "x"}), "shared_memory_region"),
        ({"inputs": [USER_INPUT | {"shape": [2], "data": [1, 2]}, CANDIDATES]}, "user_id: has 2 elements, wanted 1"),
        (more("recent_items", [1] * 7), "inputs/2/shape: has 7 elements, at most 6 are taken"),
        (more("recent_timestamps", [1]), "recent_timestamps: has 1 for no recent_items"),
        (more("history_timestamps", ["a"], "BYTES"), "history_timestamps: is of BYTES"),
        (more("context.nothing", [1]), "context: no context feature is called 'nothing'"),
        (more("context.device", ["a", "b"], "BYTES"), "context.device: has 2 elements, wanted 1"),
        (more("context.device", [1]), "context: feature 'device': found a value of type int, wanted strings"),
        (more("candidate_features.nothing", [1, 2]), "candidate_features: no item feature is called 'nothing'"),
        (more("candidate_features.category", ["a"], "BYTES"), "'category' has 1 values for 2 items"),
    ],
)
def test_a_mistake_is_named(client: httpx.Client, request_: Any, words: str) -> None:
    assert words in error(client.post(INFER, json=request_), 400)


def test_timestamps_are_one_for_each_row(client: httpx.Client) -> None:
    request = more("recent_items", [1, 2])
    request["inputs"].append({"name": "recent_timestamps", "shape": [1], "datatype": "INT64", "data": [1]})
    assert "recent_timestamps: has 1 for 2 recent_items" in error(client.post(INFER, json=request), 400)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"\xff", b'{"inputs": "\\ud800"}', DEEP, b'{"inputs": [' + b"9" * 5000 + b"]}"]
)
def test_what_is_no_json(client: httpx.Client, body: bytes) -> None:
    error(client.post(INFER, content=body), 400)


def binary(datatype: str, shape: list[int], raw: bytes, size: int | None = None) -> tuple[bytes, bytes]:
    """JSON and bytes of a request with these candidates."""
    parameters = {"binary_data_size": len(raw) if size is None else size}
    return json.dumps(with_input(datatype=datatype, shape=shape, data=None, parameters=parameters)).encode(), raw


def bytes_of(*values: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(value)) + value for value in values)


EIGHT = struct.pack("<q", ITEMS[0])


@pytest.mark.parametrize(
    ("datatype", "shape", "raw", "size", "words"),
    [
        ("INT64", [2], EIGHT, None, "has 8 bytes, wanted 16 for 2 of INT64"),
        ("INT64", [1], EIGHT * 2, None, "has 16 bytes, wanted 8 for 1 of INT64"),
        ("INT64", [1], EIGHT[:7], None, "has 7 bytes, wanted 8"),
        ("INT64", [1], EIGHT, 16, "binary_data_size is 16, and 8 bytes are left"),
        ("INT64", [1], EIGHT * 2, 8, "8 bytes belong to no input"),
        ("INT64", [0], b"", None, "candidates: has no elements"),
        ("INT64", [2**64], EIGHT, None, "at most 6 are taken"),
        ("BYTES", [1], b"", None, "its 0 bytes are not 1 of BYTES"),
        ("BYTES", [1], b"\x01\x00\x00", None, "its 3 bytes are not 1 of BYTES"),
        ("BYTES", [1], b"\x05\x00\x00\x00abc", None, "its 7 bytes are not 1 of BYTES"),
        ("BYTES", [1], b"\xff\xff\xff\xffabc", None, "its 7 bytes are not 1 of BYTES"),
        ("BYTES", [2], bytes_of(b"abc"), None, "its 7 bytes are not 2 of BYTES"),
        ("BYTES", [1], bytes_of(b"abc", b"d"), None, "its 12 bytes are not 1 of BYTES"),
        ("BYTES", [2], b"\x64\x00\x00\x00abc" + bytes_of(b"d"), None, "its 12 bytes are not 2 of BYTES"),
        ("BYTES", [2], bytes_of(b"abc", b"\xff\xfe"), None, "element 1 is not UTF-8"),
        ("BYTES", [1], bytes_of("\ud800".encode("utf-8", "surrogatepass")), None, "element 0 is not UTF-8"),
        ("BYTES", [2], bytes_of(b"abc", b""), None, "candidates: has an empty string"),
        ("BYTES", [1], bytes_of(b"abc"), None, "candidates/0: is a string, and this model's item ids are of type int"),
    ],
)
def test_bytes_that_are_no_tensor(
    client: httpx.Client, datatype: str, shape: list[int], raw: bytes, size: int | None, words: str
) -> None:
    text, raw = binary(datatype, shape, raw, size)
    assert words in error(client.post(INFER, content=text + raw, headers={LENGTH: str(len(text))}), 400)


@pytest.mark.parametrize("length", ["", "-1", "1e3", "0x10", "99999", "9" * 30, "9" * 5000, "a", "+5", "1_0"])
def test_a_header_length_that_is_none(client: httpx.Client, length: str) -> None:
    text, raw = binary("INT64", [1], EIGHT)
    assert "inference-header-content-length is" in error(
        client.post(INFER, content=text + raw, headers={LENGTH: length}), 400
    )


@pytest.mark.parametrize("shift", [-1, 1, 8])
def test_a_header_length_that_is_wrong(client: httpx.Client, shift: int) -> None:
    text, raw = binary("INT64", [1], EIGHT)
    error(client.post(INFER, content=text + raw, headers={LENGTH: str(len(text) + shift)}), 400)
    error(client.post(INFER, content=text + raw, headers={LENGTH: "0"}), 400)
    error(client.post(INFER, content=text + raw), 400)


def test_routes_methods_types_and_sizes(client: httpx.Client) -> None:
    assert "no model 'LREA'" in error(client.post("/v2/models/LREA/infer", json=GOOD), 404)
    assert "version '1' " in error(client.post("/v2/models/lrea/versions/1/infer", json=GOOD), 404)
    assert "GET /v2/nothing" in error(client.get("/v2/nothing"), 404)
    assert "GET /v2/models/lrea/config" in error(client.get("/v2/models/lrea/config"), 404)
    refused = client.get(INFER)
    assert "GET /v2/models/lrea/infer" in error(refused, 405)
    assert refused.headers["allow"] == "POST"
    assert "more than 20000 bytes" in error(client.post(INFER, content=b" " * 20_001), 413)
    body = json.dumps(GOOD).encode()
    assert "'text/plain', wanted application/json or application/octet-stream" in error(
        client.post(INFER, content=body, headers={"content-type": "text/plain"}), 415
    )
    assert "content-encoding is 'gzip'" in error(
        client.post(INFER, content=body, headers={"content-encoding": "gzip"}), 415
    )
    assert client.get("/v20").headers["content-type"] == "application/problem+json", "another path has another form"


def test_the_clients_own_errors_have_our_words(client: httpx.Client) -> None:
    asks = triton.InferenceServerClient(f"{client.base_url.host}:{client.base_url.port}")
    user, candidates = triton.InferInput("user_id", [1], "INT64"), triton.InferInput("candidates", [6], "INT64")
    user.set_data_from_numpy(np.array([USER]))
    candidates.set_data_from_numpy(np.arange(6))
    with pytest.raises(triton.InferenceServerException, match="candidates: has 6 rows, at most 5 are taken") as found:
        asks.infer("lrea", [user, candidates])
    assert found.value.status() == "400"
    with pytest.raises(triton.InferenceServerException, match="content-encoding is 'gzip'") as found:
        asks.infer("lrea", [user, candidates], request_compression_algorithm="gzip")
    assert found.value.status() == "415"
    asks.close()


def test_no_answer_in_time_is_a_504(client: httpx.Client, store_url: str, int_bundles: Any) -> None:
    """The deadline is the caller's: `timeout` in microseconds, as other servers of the protocol have it."""
    with Cache.of_bundles(store_url, "test-protocol-errors", int_bundles) as cache:
        for parameters in ({"timeout": 1}, {"timeout": 1000, "timeout_ms": 1}):
            cache.redis.execute_command("CLIENT", "PAUSE", 200, "ALL")
            words = error(client.post(INFER, json=GOOD | {"parameters": parameters}), 504)
            assert "no answer within 1 ms" in words
    assert client.post(INFER, json=GOOD | {"parameters": {"timeout": 1, "timeout_ms": 20_000}}).status_code == 200


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    datatype=st.sampled_from(["INT64", "BYTES"]),
    shape=st.lists(st.integers(-2, 6), max_size=3),
    raw=st.binary(max_size=60) | st.lists(st.binary(max_size=6), max_size=5).map(lambda texts: bytes_of(*texts)),
    size=st.none() | st.integers(-1, 64),
    shift=st.sampled_from([0, 0, 0, 0, -1, 1, 8]),
)
def test_any_bytes_are_scored_or_refused(
    client: httpx.Client, datatype: str, shape: list[int], raw: bytes, size: int | None, shift: int
) -> None:
    text, raw = binary(datatype, shape, raw, size)
    answer = client.post(INFER, content=text + raw, headers={LENGTH: str(len(text) + shift)})
    if answer.status_code == 200:
        assert answer.json()["outputs"][0]["shape"] == [len(raw) // 8]
    else:
        error(answer, 400)


@given(values=st.lists(st.text(max_size=20), max_size=20))
def test_texts_come_through(values: list[str]) -> None:
    raw = bytes_of(*(value.encode() for value in values))
    assert texts(memoryview(raw), len(values), "") == values
    for cut in range(len(raw)):
        with pytest.raises(InvalidRequest):
            texts(memoryview(raw[:cut]), len(values), "")


@settings(max_examples=300)
@given(body=st.binary(max_size=200), declared=st.none() | st.text(max_size=4) | st.integers(0, 200).map(str))
@example(body=json.dumps({"inputs": [CANDIDATES | {"data": [2**4000]}]}).encode(), declared=None)
@example(body=b'{"inputs": [{"name": "a", "shape": [1' + b"0" * 4400 + b'], "datatype": "BYTES"}]}', declared=None)
def test_what_is_no_request_is_refused_in_words(body: bytes, declared: str | None) -> None:
    with pytest.raises((InvalidRequest, MalformedJson)):
        read_request(body, declared, MOST, 6)


def test_integers_are_read_where_they_lie() -> None:
    """No copy and no Python object for an element: the array is a view of the body."""
    wanted = np.array([5, -(2**63), 2**63 - 1])
    text, raw = binary("INT64", [3], wanted.tobytes())
    body = text + raw
    _, tensors = read_request(body, str(len(text)), MOST, 6)
    found = tensors["candidates"]
    assert isinstance(found, np.ndarray)
    np.testing.assert_array_equal(found, wanted)
    assert np.shares_memory(found, np.frombuffer(body, np.uint8))
