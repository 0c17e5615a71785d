"""Hypothesis over the record codec: records damaged, cut, spliced, forged, and others' records; none may be scored.

What must hold of each mutated record, asked for as the user whose record it was made from:

- it is byte for byte a valid record of that user (the mutation changed nothing), or
- it is refused with RecordError, and with nothing else, or
- the mutation made its CRC-32 right again, so that no check can know the damage, and every check that needs no CRC has
  been passed: it names this user, model and generation, and has the bundle's sizes, finite numbers and an ordered tail.

The same through the service: `decode_record`, and for a sample the record in the store and a request over HTTP.
"""

import struct
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from model.cache_format import PRECISIONS, RecordError, UserRecord, encode
from model.identifiers import Id
from service.active import ActiveModel
from service.users.lookup import DEGRADED_BY_RECORD, decode_record
from tests.fuzz.target import CANDIDATES, HISTORIES, Found, Target
from tests.service.cache import GENERATION, Cache

# Where the header has what (docs/record-format.md).
TOTAL_AT, CRC_AT, DIGEST_AT, GENERATION_AT, HEADER_SIZE = 8, 12, 16, 64, 104
FIELDS = {"version": (4, "<H"), "reserved": (6, "<H"), "total": (8, "<I"), "watermark": (32, "<q"), "L": (48, "<I"),
          "S": (52, "<I"), "rows": (56, "<I"), "sections": (60, "<I"), "reserved too": (100, "<I")}  # fmt: skip
USER = 7_000_000_001  # whom nobody else asks for, so that he never becomes resident
OTHER_GENERATION, OTHER_MODEL = "20250101T000000-000000", "0123456789ab"
PER_EXAMPLE = 20  # mutations: hypothesis takes longer to begin an example than the codec for a record
ASKED_OVER_HTTP = 100  # every so many-th record
REASONS = set(DEGRADED_BY_RECORD.values())


@dataclass(frozen=True)
class Mutated:
    """One mutated record, how it came about, and whether its CRC was made right again."""

    how: str
    data: bytes
    is_resealed: bool = False


def fuzz_records(target: Target, records: int, seed_: int) -> dict[str, Any]:
    """Judge `records` mutated records or more. Raises Found with the first one that is not refused."""
    with target.cache() as cache, httpx.Client(base_url=target.base_url, timeout=30) as client:
        mine = _encoded(cache, USER)
        others = [data for other in HISTORIES for data in _encoded(cache, other)]
        others += _encoded(cache, USER, generation=OTHER_GENERATION) + _encoded(cache, USER, model_id=OTHER_MODEL)
        judge = _Judge(cache, client, ActiveModel(cache.bundle, GENERATION), mine)

        @seed(seed_)
        @settings(
            max_examples=-(-records // PER_EXAMPLE),
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(st.lists(mutations(mine, others), min_size=PER_EXAMPLE, max_size=PER_EXAMPLE))
        def judge_all(found: list[Mutated]) -> None:
            for mutated in found:
                judge.judge(mutated)

        judge_all()
    return {"records": judge.outcomes.total(), "asked": judge.asked, "outcomes": dict(sorted(judge.outcomes.items()))}


def _encoded(cache: Cache, user: Id, **changes: Any) -> list[bytes]:
    """The user's record in every precision."""
    record = cache.record(user, HISTORIES.get(user, CANDIDATES), **changes)
    return [encode(record, shape=cache.bundle.record_shape, precision=precision) for precision in PRECISIONS]


# --- mutations --------------------------------------------------------------------------------------------------------


def mutations(mine: Sequence[bytes], others: Sequence[bytes]) -> st.SearchStrategy[Mutated]:
    """Damaged records of one user. `others` are of other users, generations and models."""
    bases, places = st.sampled_from(mine), st.integers(0, max(map(len, mine)) - 1)
    all_records, field = st.sampled_from([*mine, *others]), st.sampled_from(list(FIELDS))
    numbers = st.one_of(st.integers(0, 300), st.integers(-(2**63), 2**63 - 1))
    plain = [
        st.builds(_flip, bases, st.lists(st.tuples(places, st.integers(0, 7)), min_size=1, max_size=8)),
        st.builds(_cut, bases, places),
        st.builds(_lengthen, bases, st.binary(min_size=1, max_size=40)),
        st.builds(_overwrite, bases, places, st.binary(min_size=1, max_size=16)),
        st.builds(_splice, bases, all_records, places, places),
        st.builds(_set_field, bases, field, numbers),
        st.builds(_set_section_head, bases, st.integers(0, 3), st.sampled_from(["<H", "<HH", "<HHI"]), numbers),
        st.sampled_from(others).map(lambda data: Mutated("another's", data)),
    ]
    return st.one_of(*plain, st.builds(_reseal, st.one_of(plain), st.booleans()))


def _flip(data: bytes, bits: Sequence[tuple[int, int]]) -> Mutated:
    changed = bytearray(data)
    for place, bit in bits:
        changed[place % len(data)] ^= 1 << bit
    return Mutated(f"bits {bits} flipped", bytes(changed))


def _cut(data: bytes, size: int) -> Mutated:
    return Mutated(f"cut to {size % len(data)}", data[: size % len(data)])


def _lengthen(data: bytes, more: bytes) -> Mutated:
    return Mutated("lengthened", data + more)


def _overwrite(data: bytes, place: int, new: bytes) -> Mutated:
    at = place % len(data)
    return Mutated(f"overwritten at {at}", (data[:at] + new + data[at + len(new) :])[: len(data)])


def _splice(data: bytes, other: bytes, start: int, end: int) -> Mutated:
    return Mutated(f"{start} bytes, then another record's from {end}", data[:start] + other[end:])


def _set_field(data: bytes, name: str, value: int) -> Mutated:
    at, layout = FIELDS[name]
    return Mutated(f"{name} set to {value}", _with_number(data, at, layout, value))


def _set_section_head(data: bytes, number: int, layout: str, value: int) -> Mutated:
    """The tag, the flags or the length of a section: the last of `layout`."""
    at = HEADER_SIZE
    for _ in range(number):
        size = struct.unpack_from("<I", data, at + 4)[0]
        following = at + 8 + size + -size % 8
        if following >= len(data):
            break
        at = following
    skipped = struct.calcsize(layout[:-1])
    return Mutated(
        f"section at {at}, {layout} set to {value}", _with_number(data, at + skipped, "<" + layout[-1], value)
    )


def _with_number(data: bytes, at: int, layout: str, value: int) -> bytes:
    size = struct.calcsize(layout)
    number: int = value % 256**size
    return data[:at] + number.to_bytes(size, "little") + data[at + size :]


def _reseal(mutated: Mutated, corrects_length: bool) -> Mutated:
    """The CRC made right again, and if `corrects_length` the total length before it."""
    data = bytearray(mutated.data)
    if len(data) < DIGEST_AT:
        return mutated
    if corrects_length:
        struct.pack_into("<I", data, TOTAL_AT, len(data))
    struct.pack_into("<I", data, CRC_AT, 0)
    struct.pack_into("<I", data, CRC_AT, zlib.crc32(data))
    return Mutated(mutated.how + ", resealed", bytes(data), True)


# --- what must hold ---------------------------------------------------------------------------------------------------


class _Judge:
    """Decides on each record, and counts."""

    def __init__(self, cache: Cache, client: httpx.Client, model: ActiveModel, valid: Sequence[bytes]) -> None:
        self.outcomes: Counter[str] = Counter()
        self.asked = 0
        self._cache = cache
        self._client = client
        self._model = model
        self._valid = valid

    def judge(self, mutated: Mutated) -> None:
        """Raises Found unless the record is what the head of this file says."""
        try:
            record = decode_record(self._model, GENERATION, USER, mutated.data)
        except RecordError as error:
            self.outcomes[f"refused: {error.reason}"] += 1
            if self.outcomes.total() % ASKED_OVER_HTTP == 0:
                self._ask(mutated)
            return
        except Exception as error:
            raise _found(mutated, f"raised {error!r}") from error
        if mutated.data in self._valid:
            self.outcomes["as it was"] += 1
            return
        if not mutated.is_resealed:
            raise _found(mutated, "was decoded")
        if wrong := self._wrong(mutated.data, record):
            raise _found(mutated, f"was decoded with a wrong {', '.join(wrong)}")
        self.outcomes["forged, and whole"] += 1

    def _wrong(self, data: bytes, record: UserRecord) -> list[str]:
        """What of a forged record no reader may let through; told without the codec where that can be."""
        shape, names = self._model.bundle.record_shape, slice(GENERATION_AT, HEADER_SIZE - 4)
        pair = np.stack([record.keys_RD, record.values_RD])
        holds = {
            "version": data[:8] == self._valid[0][:8],
            "user": data[DIGEST_AT : DIGEST_AT + 16] == self._valid[0][DIGEST_AT : DIGEST_AT + 16],
            "generation or model": data[names] == self._valid[0][names],
            "size": struct.unpack_from("<I", data, TOTAL_AT) == (len(data),),
            "pair": pair.shape == (2, shape.rank, shape.width) and bool(np.isfinite(pair).all()),
            "sketch": record.sketch_M.shape == (shape.sketch_size,),
            "codes": record.user_codes.shape == (shape.user_features,),
            "tail": len(record.tail_ids) == len(record.tail_timestamps) <= shape.short_length,
            "order": bool((record.tail_timestamps[1:] >= record.tail_timestamps[:-1]).all()),
            "ids": all(type(item) is int for item in record.tail_ids),
            "rows": 0 <= record.long_rows <= shape.long_length,
        }
        return [what for what, right in holds.items() if not right]

    def _ask(self, mutated: Mutated) -> None:
        """The same of the service, with the record in its store."""
        self.asked += 1
        self._cache.redis.set(self._cache.key(USER), mutated.data)
        answer = self._client.post("/v1/score", json={"user_id": USER, "candidates": CANDIDATES})
        is_miss = answer.status_code == 200 and answer.json()["user_state"] == "empty"
        if not (is_miss and REASONS & set(answer.json()["degraded"])):
            raise _found(mutated, f"was answered with {answer.status_code}: {answer.text}")


def _found(mutated: Mutated, what: str) -> Found:
    return Found(f"a record of user {USER} ({mutated.how}) {what}:\n{mutated.data.hex()}")
