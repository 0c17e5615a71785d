"""The client believes nothing: what is not one probability per candidate, from a service, is a ServiceError."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import numpy as np
import orjson
import pytest

from loadtest.client import ScoringClient, ServiceError, logits_of

CANDIDATES = [11, 12, 13]
RIGHT = {"user_id": 7, "model_id": "0123456789ab", "scores": [0.5, 0.25, 1.0], "user_state": "cached", "degraded": []}


class Answering(BaseHTTPRequestHandler):
    """Gives the same answer to everybody, and keeps what it was asked."""

    status, content = 200, b""
    asked: list[bytes]

    def do_POST(self) -> None:
        self.asked.append(self.rfile.read(int(self.headers["content-length"])))
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self) -> None:
        self.send_response(self.status)
        self.send_header("content-length", str(len(self.content)))
        self.send_header("server-timing", "fetch;dur=1.5")
        self.end_headers()
        self.wfile.write(self.content)


@contextmanager
def answering(status: int, content: bytes) -> Iterator[tuple[ScoringClient, list[bytes]]]:
    """A client of a real HTTP server that answers this, and the bodies that reach it."""
    asked: list[bytes] = []
    handler = type("Handler", (Answering,), {"status": status, "content": content, "asked": asked})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            with ScoringClient(f"http://127.0.0.1:{server.server_port}") as client:
                yield client, asked
        finally:
            server.shutdown()
            thread.join()


def test_a_right_answer_is_given_back_and_timed() -> None:
    with answering(200, orjson.dumps(RIGHT)) as (client, asked):
        assert client.score(7, CANDIDATES) == RIGHT
        assert client.score(7, tuple(CANDIDATES), {"device": None}) == RIGHT
        stages = client.stages.percentiles()
    assert orjson.loads(asked[0]) == {"user_id": 7, "candidates": CANDIDATES}
    assert orjson.loads(asked[1]) == {"user_id": 7, "candidates": CANDIDATES, "context": {"device": None}}
    assert stages["fetch"] == {"p50": 1.5, "p99": 1.5}
    assert stages["total"]["p50"] > 0


@pytest.mark.parametrize(
    ("status", "content", "message"),
    [
        (503, b'{"title": "draining"}', 'found 503 {"title": "draining"}, wanted 200'),
        (422, b"no", "found 422 no, wanted 200"),
        (204, b"", "found 204"),
        (200, b"<html>", "wanted JSON: is this the scoring service?"),
        (200, b"", "wanted JSON"),
        (200, b"\xff", "wanted JSON"),
        (200, b"[]", "wanted an object"),
        (200, b"null", "wanted an object"),
        (200, b"{}", "wanted the field user_id"),
        *(
            (200, orjson.dumps({name: value for name, value in RIGHT.items() if name != field}), wanted)
            for field, wanted in (
                ("model_id", "wanted the field model_id"),
                ("user_state", "wanted the field user_state"),
                ("degraded", "wanted the field degraded"),
                ("scores", "scores: wanted 3 of them, found None"),
            )
        ),
        (200, orjson.dumps(RIGHT | {"user_id": 8}), "of 7, found .*: another user"),
        (200, orjson.dumps(RIGHT | {"user_id": "7"}), "another user"),
        (200, orjson.dumps(RIGHT | {"scores": [0.5, 0.5]}), "scores: wanted 3 of them"),
        (200, orjson.dumps(RIGHT | {"scores": [0.5] * 4}), "scores: wanted 3 of them"),
        (200, orjson.dumps(RIGHT | {"scores": [0.5, None, 0.5]}), r"scores\[1\]: wanted a probability, found None"),
        (200, orjson.dumps(RIGHT | {"scores": [0.5, 0.5, 1.5]}), r"scores\[2\]: wanted a probability, found 1.5"),
        (200, orjson.dumps(RIGHT).replace(b"0.25", b"NaN"), r"scores\[1\]: wanted a probability, found nan"),
        (200, orjson.dumps(RIGHT | {"scores": {"items": [11], "scores": [0.5]}}), "scores: wanted 3 of them"),
    ],
)
def test_a_wrong_answer_is_an_error(status: int, content: bytes, message: str) -> None:
    with answering(status, content) as (client, _), pytest.raises(ServiceError, match=message):
        client.score(7, CANDIDATES)


def test_what_is_served() -> None:
    with answering(200, b'{"model_id": "0123456789ab"}') as (client, _):
        assert client.model() == {"model_id": "0123456789ab"}
    with answering(404, b"") as (client, _), pytest.raises(httpx.HTTPStatusError, match="404"):
        client.model()
    with answering(200, b"hello") as (client, _), pytest.raises(ServiceError, match="wanted JSON"):
        client.model()


def test_nobody_listens() -> None:
    with ScoringClient("http://127.0.0.1:1") as client, pytest.raises(httpx.ConnectError):
        client.score(7, CANDIDATES)


def test_logits_undo_a_sigmoid_in_float32() -> None:
    """From -80 (a denormal probability) to 10; above that 1 - p has few bits left, a step at 1 - 2**-24 is 0.69."""
    logits = np.linspace(-80, 10, 1001)
    probabilities = (1 / (1 + np.exp(-logits))).astype(np.float32)
    np.testing.assert_allclose(logits_of(probabilities.tolist()), logits, atol=2e-3)
    inside = np.abs(logits) <= 3
    np.testing.assert_allclose(logits_of(probabilities[inside].tolist()), logits[inside], atol=1e-6)


def test_logits_of_what_rounds_to_0_or_1_stay_finite() -> None:
    smallest, largest = float(np.nextafter(np.float32(0), np.float32(1))), float(np.nextafter(np.float32(1), 0))
    found = logits_of([0.0, smallest, 0.5, largest, 1.0])
    assert found[0] == found[1] == pytest.approx(-149 * np.log(2))
    assert found[2] == 0
    assert found[3] == found[4] == pytest.approx(24 * np.log(2), abs=1e-6)
    assert bool(np.isfinite(found).all())


def test_logits_of_nothing() -> None:
    assert logits_of([]).shape == (0,)
