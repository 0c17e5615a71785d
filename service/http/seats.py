"""How many connections there are, and what the newest of them may be used for.

Beyond the most, some are kept for probes: under any load whoever looks after the service must hear of it.
"""

import logging
import time
from enum import Enum

logger = logging.getLogger(__name__)
RESERVED = 64  # connections beyond the most, for probes only
RESERVED_S = 1.0  # for a probe's request: nobody shall hold the reserve by sending nothing
CALM_S = 60.0  # below the most connections, after which reaching it is news


class Seat(Enum):
    """What a connection may be used for."""

    ANY = "any request"
    RESERVED = "probes"
    NONE = "nothing"

    def time_s(self, seconds: float) -> float:
        """Of the time that something may take, what it may take here."""
        return min(seconds, RESERVED_S) if self is Seat.RESERVED else seconds


class Seats:
    """The seats of all connections. Logs that there are too many, once, however many come."""

    def __init__(self, max_connections: int) -> None:
        self._max_connections = max_connections
        self._last_beyond = -CALM_S

    def of(self, count: int) -> Seat:
        """The seat of the newest of `count` connections."""
        beyond = count - self._max_connections
        if beyond <= 0:
            return Seat.ANY
        self._note()
        return Seat.RESERVED if beyond <= RESERVED else Seat.NONE

    def _note(self) -> None:
        """One too many is news if none was for `CALM_S`: else callers could fill the log."""
        now = time.monotonic()
        if now >= self._last_beyond + CALM_S:
            logger.warning(
                "LREA_MAX_CONNECTIONS (%d) are open, a further one is for probes or refused: find who holds them",
                self._max_connections,
            )
        self._last_beyond = now
