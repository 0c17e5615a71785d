"""Which users are worth a slot: TinyLFU, as Einziger, Friedman and Manes describe it, over a segmented LRU.

A sketch counts how often each user was asked for lately, residents or not. A newcomer gets the place of the least
recently used user only if he was asked for more often; so a scan of users who come once evicts nobody who comes twice.
The segmented LRU keeps who was hit again (protected) out of reach of who was not (probation), for when counts are equal
or have aged away.

Why not a library: theine chooses and drops its victim itself, which may be pinned by a batch that is being scored, and
runs a thread from its import on; cachetools has neither admission nor a sketch. Not thread-safe: `UserCache` locks.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Generic, TypeVar

ROWS = 4
COUNTERS_PER_SLOT = 16  # per row: at the end of a sample 1 to 8 % of newcomers are taken for somebody seen before
SAMPLE_PER_SLOT = 10  # counts are halved after so many: what was asked for before 10 turnovers is half forgotten
MAX_COUNT = 15
PROTECTED_SHARE = 0.8

_MULTIPLIERS = (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93)
_MASK_64 = (1 << 64) - 1
_HALVED = bytes(count // 2 for count in range(256))

K = TypeVar("K", bound=Hashable)


class FrequencySketch:
    """How often keys were counted lately, up to 15; may say more than is true, never less (but for the halving)."""

    def __init__(self, slots: int) -> None:
        """slots: how many keys are kept apart well."""
        self._bits = max(6, (COUNTERS_PER_SLOT * slots - 1).bit_length())
        self._counters = bytearray(ROWS << self._bits)
        self._sample = max(64, SAMPLE_PER_SLOT * slots)
        self._counted = 0

    def count(self, key: Hashable) -> None:
        places = self._places(key)
        least = min(self._counters[place] for place in places)
        if least < MAX_COUNT:
            # Only the least: the others are too high already, by other keys.
            for place in places:
                if self._counters[place] == least:
                    self._counters[place] = least + 1
        self._counted += 1
        if self._counted >= self._sample:
            self._counters = self._counters.translate(_HALVED)
            self._counted //= 2

    def estimate(self, key: Hashable) -> int:
        return min(self._counters[place] for place in self._places(key))

    def _places(self, key: Hashable) -> list[int]:
        mixed = hash(key) & _MASK_64
        mixed ^= mixed >> 32
        shift = 64 - self._bits
        return [
            (row << self._bits) + ((mixed * multiplier & _MASK_64) >> shift)
            for row, multiplier in enumerate(_MULTIPLIERS)
        ]


@dataclass(frozen=True)
class Contest(Generic[K]):
    """What became of a newcomer when every slot was taken: who gives way, or why nobody does."""

    victim: K | None
    all_pinned: bool = False


class Admission(Generic[K]):
    """The order of the residents, and the contest for their slots."""

    def __init__(self, slots: int) -> None:
        self._sketch = FrequencySketch(slots)
        self._protected_size = int(PROTECTED_SHARE * slots)
        self._probation: OrderedDict[K, None] = OrderedDict()  # least recently used first
        self._protected: OrderedDict[K, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._probation) + len(self._protected)

    def count(self, key: K) -> None:
        """Somebody asked for this user."""
        self._sketch.count(key)

    def hit(self, key: K) -> None:
        """It was a resident. Hit twice he is protected, and whoever is least recently used there is not any more."""
        if key in self._protected:
            self._protected.move_to_end(key)
            return
        del self._probation[key]
        self._protected[key] = None
        if len(self._protected) > self._protected_size:
            oldest, _ = self._protected.popitem(last=False)
            self._probation[oldest] = None

    def add(self, key: K) -> None:
        self._probation[key] = None

    def remove(self, key: K) -> None:
        (self._probation if key in self._probation else self._protected).pop(key)

    def contest(self, newcomer: K, pinned: Callable[[K], bool]) -> Contest[K]:
        """Whether a newcomer is worth more than the least recently used resident whom no batch holds."""
        candidates: Iterator[K] = chain(self._probation, self._protected)
        for resident in candidates:
            if not pinned(resident):
                wins = self._sketch.estimate(newcomer) > self._sketch.estimate(resident)
                return Contest(resident if wins else None)
        return Contest(None, all_pinned=True)
