"""Batches in fixed sizes, as a GPU's graphs read them: requests are copied into the same memory again and again.

A bucket is the size that ragged requests are padded to. What comes from the host is written into one pinned buffer and
sent by one copy; what is on the device already, the tensors of resident users, is gathered there. Everything that a
forward reads is written anew for every batch, so that nothing of the batch before is left. The padding: users repeat
the first one, and candidates are item row 0 of the last one, so that every row is computed from numbers of this batch.

Letters: U users, N candidates of all of them, r slots, d width, M sketch bytes, S short window, F feature columns, C
hashed columns, B bytes.
"""

import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from model.cache_format.shape import sketch_width
from model.catalogue import Items
from model.config import RankerConfig
from model.ranker import ScoringInput

_ALIGNMENT_BYTES = 256  # what CUDA's own allocations have; Triton compiles for at least 16
_Fields = Sequence[tuple[torch.dtype, tuple[int, ...]]]


class Bucket(NamedTuple):
    """The most users and candidates of all of them that a batch may have."""

    users: int
    candidates: int

    def holds(self, users: int, candidates: int) -> bool:
        """Whether a batch of this size can be padded to it."""
        return users <= self.users and candidates <= self.candidates


class PaddedUsers(NamedTuple):
    """The user's side of U requests, in the order of `user_tensors`."""

    keys_URd: Tensor
    values_URd: Tensor
    sketch_UM: Tensor
    codes_UF: Tensor
    short_rows_US: Tensor
    short_codes_USF: Tensor
    short_hashes_USC: Tensor

    @property
    def short(self) -> Items:
        """The short windows [U, S], zero where padded."""
        return Items(self.short_rows_US, self.short_codes_USF, self.short_hashes_USC)


class PaddedRows(NamedTuple):
    """The rest of them: whose candidates there are, and the request's own features."""

    offsets_U1: Tensor  # int32: where each user's candidates begin, and N
    context_codes_UF: Tensor
    rows_N: Tensor
    codes_NF: Tensor
    hashes_NC: Tensor

    @property
    def candidates(self) -> Items:
        """The candidates [N]."""
        return Items(self.rows_N, self.codes_NF, self.hashes_NC)

    def user_of_candidate(self) -> Tensor:
        """Whose candidate each row is, int64 [N]."""
        places_N = torch.arange(len(self.rows_N), dtype=torch.int32, device=self.rows_N.device)
        return torch.searchsorted(self.offsets_U1[1:], places_N, right=True)


class PaddedBatch(NamedTuple):
    """Everything that a forward reads of a batch, on the device, always in the same memory."""

    users: PaddedUsers
    rows: PaddedRows


class Staging:
    """The memory of one bucket, on both sides. For one thread and one batch at a time."""

    def __init__(self, config: RankerConfig, bucket: Bucket, device: torch.device, *, pinned: bool) -> None:
        """pinned: the host's side cannot be swapped out, which a copy that nobody waits for needs."""
        self._bucket = bucket
        row_fields, user_fields = _row_fields(config, bucket), _user_fields(config)
        # The users who are sent come last, each in one piece: only as many are copied as there are.
        self._row_bytes, self._user_bytes = _size(row_fields), _size(user_fields)
        size = self._row_bytes + bucket.users * self._user_bytes
        self._host_B = torch.zeros(size, dtype=torch.uint8, pin_memory=pinned)
        self._sent_B = torch.zeros(size, dtype=torch.uint8, device=device)
        self._host_rows = PaddedRows(*_carved(self._host_B[: self._row_bytes], row_fields))
        self._host_users, self._sent_users = (
            PaddedUsers(*_carved(side_B[self._row_bytes :].view(bucket.users, -1), user_fields))
            for side_B in (self._host_B, self._sent_B)
        )
        gathered = (torch.zeros(bucket.users, *shape, dtype=dtype, device=device) for dtype, shape in user_fields)
        self.batch = PaddedBatch(
            PaddedUsers(*gathered), PaddedRows(*_carved(self._sent_B[: self._row_bytes], row_fields))
        )
        self._nothing = [torch.zeros_like(tensor[0]) for tensor in self.batch.users]
        self.logits_N = torch.zeros(bucket.candidates, device=device)
        self._host_logits_N = torch.zeros(bucket.candidates, pin_memory=pinned)

    @property
    def host_bytes(self) -> int:
        """Memory on the host's side."""
        return self._host_B.nbytes + self._host_logits_N.nbytes

    @property
    def device_bytes(self) -> int:
        """Memory on the device, without what a forward needs in between."""
        tensors = (self._sent_B, *self.batch.users, *self._nothing, self.logits_N)
        return sum(tensor.nbytes for tensor in tensors)

    def write(self, requests: Sequence[ScoringInput], is_resident: Callable[[Tensor], bool]) -> None:
        """Put these requests, and nothing else, into `batch`. The device may still be at it when this returns.

        Candidates and context codes are on the CPU; a user is resident if all of his tensors are.
        """
        self._write_rows(requests)
        users, sent = self._write_users(requests, is_resident)
        size = self._row_bytes + sent * self._user_bytes
        self._sent_B[:size].copy_(self._host_B[:size], non_blocking=True)
        users += users[:1] * (self._bucket.users - len(users))
        for target, nothing, tensors in zip(self.batch.users, self._nothing, zip(*users, strict=True), strict=True):
            if nothing.numel():
                _gather(tensors, nothing, target)

    def read(self, sizes: Sequence[int], wait: Callable[[], None]) -> list[Tensor]:
        """The logits float32 [B] of each request, on the CPU. `wait`, until the device has done all of it."""
        total = sum(sizes)
        self._host_logits_N[:total].copy_(self.logits_N[:total], non_blocking=True)
        wait()
        return list(torch.split(self._host_logits_N[:total].clone(), list(sizes)))

    def _write_rows(self, requests: Sequence[ScoringInput]) -> None:
        ends = list(accumulate(len(request.candidates.rows) for request in requests))
        offsets = [0, *ends, *[ends[-1]] * (self._bucket.users - len(requests))]
        offsets[-1] = self._bucket.candidates
        self._host_rows.offsets_U1.copy_(torch.tensor(offsets, dtype=torch.int32))
        contexts = [request.context_codes.unsqueeze(0) for request in requests]
        _join(contexts, self._host_rows.context_codes_UF)
        parts = zip(*(request.candidates for request in requests), strict=True)
        for tensors, target in zip(parts, self._host_rows.candidates, strict=True):
            _join(tensors, target)

    def _write_users(
        self, requests: Sequence[ScoringInput], is_resident: Callable[[Tensor], bool]
    ) -> tuple[list[tuple[Tensor, ...]], int]:
        """Where on the device each user's tensors are, or will be when those that are counted are sent."""
        places: list[tuple[Tensor, ...]] = []
        sent = 0
        for request in requests:
            tensors = user_tensors(request)
            if not all(map(is_resident, tensors)):
                for tensor, target in zip(tensors, self._host_users, strict=True):
                    _join([tensor], target[sent])
                tensors = tuple(field[sent] for field in self._sent_users)
                sent += 1
            places.append(tensors)
        return places, sent


def user_tensors(request: ScoringInput) -> tuple[Tensor, ...]:
    """The user's side of a request: his state, his features, his short window."""
    return (*request.state, request.user_codes, *request.short)


def _row_fields(config: RankerConfig, bucket: Bucket) -> _Fields:
    features = len(config.item_features)
    return (
        (torch.int32, (bucket.users + 1,)),
        (torch.int64, (bucket.users, len(config.context_features))),
        (torch.int64, (bucket.candidates,)),
        (torch.int64, (bucket.candidates, features)),
        (torch.int64, (bucket.candidates, 1 + features)),
    )


def _user_fields(config: RankerConfig) -> _Fields:
    features, window = len(config.item_features), config.short_length
    return (
        (torch.float32, (config.slots, config.width)),
        (torch.float32, (config.slots, config.width)),
        (torch.uint8, (sketch_width(config.sketch_cells),)),
        (torch.int64, (len(config.user_features),)),
        (torch.int64, (window,)),
        (torch.int64, (window, features)),
        (torch.int64, (window, 1 + features)),
    )


def _carved(memory: Tensor, fields: _Fields) -> list[Tensor]:
    """Views of uint8 [..., B], field behind field."""
    begin, views = 0, []
    for dtype, shape in fields:
        size = math.prod(shape) * dtype.itemsize
        views.append(memory[..., begin : begin + size].view(dtype).view(*memory.shape[:-1], *shape))
        begin += _aligned(size)
    return views


def _size(fields: _Fields) -> int:
    return sum(_aligned(math.prod(shape) * dtype.itemsize) for dtype, shape in fields)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES


def _join(tensors: Sequence[Tensor], target: Tensor) -> None:
    """All of them, and zeros behind them, into `target` on the CPU."""
    begin = 0
    for tensor in tensors:
        target[begin : begin + len(tensor)].copy_(tensor)
        begin += len(tensor)
    target[begin:].zero_()


def _gather(tensors: Sequence[Tensor], nothing: Tensor, target_UX: Tensor) -> None:
    """Each user's tensor, and zeros behind it where it is shorter than the others may be, by one launch for all.

    Raises ValueError for a longer one: torch would move the target, and a graph would go on reading where it was.
    """
    pieces = []
    for tensor in tensors:
        if len(tensor) > len(nothing):
            raise ValueError(f"a user's tensor has {len(tensor)} rows, the model's have {len(nothing)}: cut it")
        pieces.append(tensor)
        if len(tensor) < len(nothing):
            pieces.append(nothing[len(tensor) :])
    torch.cat(pieces, out=target_UX.flatten(0, 1))
