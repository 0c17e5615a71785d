"""The open loop against real HTTP servers: when it sends, what it counts as lag and as latency, what it loses."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from itertools import pairwise

import pytest
from starlette.requests import Request as HttpRequest
from starlette.responses import Response, StreamingResponse

from loadtest.chaos.open_loop import IDLE_S, arrivals, fire, poisson, steady
from loadtest.chaos.outcomes import (
    ABANDONED,
    LOST,
    REFUSED,
    TIMED_OUT,
    Answer,
    Arrival,
    Judged,
    OpenLoad,
    Outcome,
    Request,
)
from loadtest.chaos.scenario import LAG_LIMIT_MS, prompt_generator
from loadtest.closed_loop import http_get, http_request
from tests.conftest import free_port
from tests.loadtest.serving import serving, serving_raw


def well(answer: Answer) -> Judged:
    return Judged(answer.body.decode())


def asked(body: bytes = b"", name: str = "one") -> Request:
    return Request(name, http_request("/", body), well)


def test_moments_are_due_at_the_rate() -> None:
    assert list(steady(4, 1)) == [0, 0.25, 0.5, 0.75]
    moments = list(poisson(50, 200, seed=1))
    assert moments == list(poisson(50, 200, seed=1)) != list(poisson(50, 200, seed=2))
    assert moments == sorted(moments)
    assert 0 < moments[0] < moments[-1] < 200
    gaps = [later - earlier for earlier, later in pairwise(moments)]
    assert len(moments) == pytest.approx(10_000, rel=0.05)
    # Of an exponential law, e⁻¹ of the gaps are longer than the mean.
    assert sum(gap > 1 / 50 for gap in gaps) / len(gaps) == pytest.approx(0.368, abs=0.02)


async def test_requests_are_sent_in_turn_and_each_answer_is_judged() -> None:
    async def echo(request: HttpRequest) -> Response:
        return Response(await request.body(), 201)

    requests = [asked(b"a", "first"), asked(b"b", "second")]
    async with serving(echo) as port:
        load = await fire(port, arrivals(steady(100, 0.1), requests))
    assert len(load.outcomes) == 10
    assert load.counts() == {"201 a": 5, "201 b": 5}
    assert load.named("first").counts() == {"201 a": 5}
    assert (load.faults, load.successes.outcomes) == ([], [])
    assert sorted(outcome.at_s for outcome in load.outcomes) == list(steady(100, 0.1))
    assert all(outcome.latency_s > outcome.lag_s >= 0 for outcome in load.outcomes)
    assert load.seconds >= 0.09
    assert load.cpu_s > 0


async def test_a_get_is_sent_too() -> None:
    async def method(request: HttpRequest) -> Response:
        return Response(request.method)

    async with serving(method) as port:
        load = await fire(port, [Arrival(0, Request("probe", http_get("/"), well))])
    assert load.counts() == {"200 GET": 1}


async def test_slow_answers_delay_no_request_after_them() -> None:
    """Twenty requests are due within 0.1 s and each takes half a second: one after the other, that would be 10 s."""

    async def slow(_: HttpRequest) -> Response:
        await asyncio.sleep(0.5)
        return Response()

    async with serving(slow) as port:
        load = await fire(port, arrivals(steady(200, 0.1), [asked()]))
    assert load.counts() == {"200": 20}
    assert load.latency_ms(0) >= 500
    assert load.seconds < 5


async def test_a_free_connection_is_used_again_and_a_busy_one_is_not() -> None:
    callers: list[object] = []

    async def who(request: HttpRequest) -> Response:
        assert request.client is not None
        callers.append(request.client.port)
        while await request.body() and len(callers) < 4:  # the slow one waits for all others
            await asyncio.sleep(0.01)
        return Response()

    async with serving(who) as port:
        quick, slow = asked(), asked(b"slow")
        await fire(port, [Arrival(0, slow), Arrival(0.2, quick), Arrival(1.6, quick), Arrival(3, quick)])
    assert sorted(Counter(callers).values()) == [1, 3]


async def test_a_connection_that_was_idle_for_long_is_not_used_again() -> None:
    callers: list[object] = []

    async def who(request: HttpRequest) -> Response:
        assert request.client is not None
        callers.append(request.client.port)
        return Response()

    async with serving(who) as port:
        await fire(port, [Arrival(0, asked()), Arrival(IDLE_S + 1.5, asked())])
    assert len(set(callers)) == 2


async def test_latency_and_lag_count_from_when_a_request_was_due() -> None:
    """The generator stands still for 0.3 s: what was due then is late, says so, and the run is void."""

    async def answer(_: HttpRequest) -> Response:
        return Response()

    def due() -> Iterator[Arrival]:
        yield Arrival(0, asked())
        time.sleep(0.3)
        yield Arrival(0.1, asked(name="late"))

    async with serving(answer) as port:
        load = await fire(port, due())
    late = load.named("late")
    assert late.lag_ms() >= 200
    assert late.latency_ms(50) > late.lag_ms()
    assert not prompt_generator(load).met


async def test_judging_an_answer_is_not_waiting_for_it() -> None:
    async def answer(_: HttpRequest) -> Response:
        return Response()

    def judge(_: Answer) -> Judged:
        time.sleep(0.3)
        return Judged()

    async with serving(answer) as port:
        load = await fire(port, [Arrival(0, Request("one", http_request("/", b""), judge))])
    assert load.outcomes[0].latency_s <= load.seconds - 0.3


def test_a_load_is_void_by_its_greatest_lag() -> None:
    def outcome(lag_ms: float) -> Outcome:
        return Outcome("one", 0, lag_ms / 1e3, 0.5, 200, "", None)

    prompt = [outcome(1)] * 999
    assert prompt_generator(OpenLoad([*prompt, outcome(LAG_LIMIT_MS)])).met
    load = OpenLoad([*prompt, outcome(LAG_LIMIT_MS + 0.1)])
    assert not prompt_generator(load).met
    assert (load.lag_ms(99), load.lag_ms()) == (1.0, LAG_LIMIT_MS + 0.1)
    assert not prompt_generator(OpenLoad([])).met, "whoever has sent nothing was not prompt"


async def test_a_request_lost_with_its_connection_is_counted_and_the_next_gets_a_new_one() -> None:
    served = 0

    async def every_second(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal served
        while await reader.readuntil(b"\r\n\r\n"):
            served += 1
            if served % 2 == 0:
                break
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\nx")

    async with serving_raw(every_second) as port:
        load = await fire(port, arrivals(steady(20, 0.5), [asked()]))
    assert load.counts() == {f"0 {LOST}": 5, "200 x": 5}
    assert load.faults == []


async def test_a_caller_who_abandons_hangs_up_and_the_others_are_answered() -> None:
    left = asyncio.Event()

    async def slow(request: HttpRequest) -> Response:
        if await request.body() == b"leave":
            while not await request.is_disconnected():
                await asyncio.sleep(0.01)
            left.set()
        else:
            await asyncio.sleep(0.3)
        return Response()

    async with serving(slow) as port:
        due = [Arrival(0, asked()), Arrival(0, asked(b"leave"), abandon_s=0.05), Arrival(0.1, asked())]
        load = await fire(port, due)
        async with asyncio.timeout(20):
            await left.wait()
    assert load.counts() == {f"0 {ABANDONED}": 1, "200": 2}
    [abandoned] = load.where(lambda outcome: outcome.how == ABANDONED).outcomes
    assert abandoned.latency_s - abandoned.lag_s >= 0.05


async def test_an_answer_that_comes_before_the_caller_leaves_counts() -> None:
    async def answer(_: HttpRequest) -> Response:
        return Response()

    async with serving(answer) as port:
        load = await fire(port, [Arrival(0, asked(), abandon_s=5.0)])
    assert load.counts() == {"200": 1}
    assert load.seconds < 4


async def test_patience_ends() -> None:
    async def never(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        await reader.read()

    async with serving_raw(never) as port:
        load = await fire(port, [Arrival(0, asked()), Arrival(0.05, asked())], patience_s=0.2)
    assert load.counts() == {f"0 {TIMED_OUT}": 2}
    assert 0.15 < load.seconds < 5


async def test_nobody_listens() -> None:
    load = await fire(free_port(), arrivals(steady(100, 0.05), [asked()]))
    assert load.counts() == {f"0 {REFUSED}": 5}


async def test_an_answer_in_pieces_is_put_together() -> None:
    pieces = [b"a" * 70_000, b"b", b"c" * 300_000]

    async def in_pieces(_: HttpRequest) -> Response:
        async def stream() -> AsyncIterator[bytes]:
            for piece in pieces:
                yield piece
                await asyncio.sleep(0.005)

        return StreamingResponse(stream(), headers={"content-length": str(sum(map(len, pieces)))})

    def whole(answer: Answer) -> Judged:
        return Judged("whole" if answer.body == b"".join(pieces) else "cut")

    async with serving(in_pieces) as port:
        load = await fire(port, [Arrival(0, Request("pieces", http_request("/", b""), whole))])
    assert load.counts() == {"200 whole": 1}


async def test_an_answer_that_is_no_http_is_a_fault() -> None:
    answers = [b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.1 what\r\ncontent-length: 0\r\n\r\n"]

    async def nonsense(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answers.pop())
        await writer.drain()
        await reader.read()

    async with serving_raw(nonsense) as port:
        load = await fire(port, [Arrival(0, asked()), Arrival(0.1, asked())])
    assert Counter(outcome.how for outcome in load.outcomes) == {"not understood": 2}
    assert len(load.faults) == 2
    assert "no Content-Length" in load.faults[1]


async def test_a_server_that_closes_after_its_answer_loses_nothing() -> None:
    async def once(_: HttpRequest) -> Response:
        return Response(headers={"connection": "close"})

    async with serving(once) as port:
        load = await fire(port, arrivals(steady(200, 0.1), [asked()]))
    assert load.counts() == {"200": 20}
