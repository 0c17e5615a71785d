"""Batches that waste little and stay within memory, and requests cut into pieces."""

import numpy as np
import pytest
import torch

from model.config import RankerConfig
from model.log.batches import equal_sized, in_pieces, most_candidates
from model.log.samples import Requests


def some_requests(sizes: list[int]) -> Requests:
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    number = np.arange(len(sizes))
    items = np.arange(offsets[-1], dtype=np.int32)
    return Requests(number, 10 * number, 100 * number, offsets, items, (items % 2).astype(np.int8))


def test_pieces_hold_the_same_candidates_in_the_same_order() -> None:
    requests = some_requests([3, 1, 8, 4, 9])
    pieces = in_pieces(requests, most=4)
    assert np.diff(pieces.offsets).tolist() == [3, 1, 4, 4, 4, 4, 4, 1]
    assert pieces.user.tolist() == [0, 1, 2, 2, 3, 4, 4, 4]
    assert (pieces.before == 10 * pieces.user).all()
    assert (pieces.row == 100 * pieces.user).all()
    np.testing.assert_array_equal(pieces.items, requests.items)
    np.testing.assert_array_equal(pieces.labels, requests.labels)
    owner = requests.user[requests.request_of_candidate]
    np.testing.assert_array_equal(pieces.user[pieces.request_of_candidate], owner)


def test_batches_keep_like_sizes_together_and_stay_within_the_limit() -> None:
    sizes = [5, 1, 7, 1, 2, 30, 5, 2]
    rows = np.array([0, 9, 0, 3, 0, 0, 4, 1])
    batches = [batch.tolist() for batch in equal_sized(some_requests(sizes), rows, most=10)]
    # By candidates, then rows: widths 1, 1, 2, 2 padded to 2 are 8 candidates; a fifth, of 5, would make them 25.
    assert batches == [[3, 1, 4, 7], [0, 6], [2], [5]]


@pytest.mark.parametrize(
    ("long_length", "device", "expected"),
    [(512, "cpu", 256), (10_000, "cpu", 13), (10_000_000, "cpu", 1), (512, "cuda", 8192), (1, "cpu", 1024)],
)
def test_the_longer_the_history_the_fewer_candidates(long_length: int, device: str, expected: int) -> None:
    config = RankerConfig(long_length=long_length, head_width=32, rank=1)
    assert most_candidates(config, torch.device(device)) == expected
