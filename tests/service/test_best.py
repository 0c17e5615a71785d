"""The best k of some logits are those of a stable sort of all of them."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from service.http.scoring import best


@given(
    logits=st.lists(st.integers(-3, 3) | st.floats(-50, 50, width=32), min_size=1, max_size=200),
    top_k=st.integers(1, 250),
)
def test_the_best_are_those_of_a_stable_sort(logits: list[float], top_k: int) -> None:
    values = np.array(logits, np.float32)
    assert best(values, top_k).tolist() == np.argsort(-values, kind="stable")[:top_k].tolist()
