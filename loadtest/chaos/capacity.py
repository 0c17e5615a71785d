"""How many requests per second a service answers when it is never idle and nothing is refused: a closed loop."""

from collections.abc import Sequence

from loadtest.chaos.outcomes import Request
from loadtest.chaos.scenario import on_a_loop
from loadtest.closed_loop import drive


def capacity_per_s(port: int, requests: Sequence[Request], callers: int, seconds: float) -> float:
    """Answers per second. Raises LoadError if one isn't a 200: fewer callers are wanted then."""
    data = [request.data for request in requests]
    return on_a_loop(drive(port, data, callers, seconds, _is_success)).requests_per_s


def _is_success(head: bytes, body: bytes) -> str | None:
    return None if head.startswith(b"HTTP/1.1 200") else f"{head[:40]!r} {body[:200]!r}"
