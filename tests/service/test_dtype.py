"""LREA_DTYPE: scores in bfloat16 are close to the model's, and a model that does not bear it is served in float32."""

import logging

import numpy as np
import pytest

from tests.service.cache import Cache, logit
from tests.service.conftest import Serve

HISTORY, CANDIDATES = [1000 + number for number in range(20)], [1000 + number for number in range(100)]


@pytest.mark.parametrize(("asked", "most", "served"), [
    ("float32", 0.02, "float32"), ("bfloat16", 0.5, "bfloat16"), ("bfloat16", 1e-9, "float32"),
])  # fmt: skip
def test_a_dtype_is_served_only_within_its_bound(
    cache: Cache, serve: Serve, asked: str, most: float, served: str, caplog: pytest.LogCaptureFixture
) -> None:
    cache.publish({1: HISTORY})
    with caplog.at_level(logging.INFO):
        client = serve(cache, dtype=asked, max_logit_error=most)
    assert client.get("/v1/model").json()["dtype"] == served
    scores = client.post("/v1/score", json={"user_id": 1, "candidates": CANDIDATES}).json()["scores"]
    off = np.abs(logit(scores) - cache.logits(1, CANDIDATES)).max()
    assert off < (1e-4 if served == "float32" else most)
    assert ("is served in float32: torch.bfloat16 moves its logits" in caplog.text) == (asked != served)
    assert ("is served in torch.bfloat16, logits within" in caplog.text) == (served == "bfloat16")


def test_a_new_generation_is_served_in_the_same_dtype(cache: Cache, serve: Serve) -> None:
    cache.publish({1: HISTORY})
    client = serve(cache, dtype="bfloat16", max_logit_error=0.5, poll_seconds=0.05)
    before = client.post("/v1/score", json={"user_id": 1, "candidates": CANDIDATES}).json()
    cache.publish({1: HISTORY[:10]}, generation="20260102T000000-000000")
    for _ in range(200):
        after = client.post("/v1/score", json={"user_id": 1, "candidates": CANDIDATES}).json()
        if after["generation"] != before["generation"]:
            break
    assert after["generation"] == "20260102T000000-000000"
    assert client.get("/v1/model").json()["dtype"] == "bfloat16"
