"""The closed loop against a real HTTP server: what it sends, counts and refuses."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from loadtest.closed_loop import Load, LoadError, drive, http_request, size_of_answer
from tests.conftest import free_port
from tests.loadtest.serving import serving


def well(_head: bytes, _body: bytes) -> None:
    """Nothing is wrong."""


async def test_one_caller_sends_the_requests_in_turn_and_sees_each_answer() -> None:
    sent: list[bytes] = []
    seen: list[bytes] = []

    async def echo(request: Request) -> Response:
        assert request.headers["content-type"] == "application/json"
        sent.append(await request.body())
        return Response(sent[-1] * 2, headers={"x-number": str(len(sent))})

    def check(head: bytes, body: bytes) -> None:
        assert head.startswith(b"HTTP/1.1 200")
        assert f"x-number: {len(seen) + 1}".encode() in head
        seen.append(body)

    async with serving(echo) as port:
        load = await drive(port, [http_request("/", body) for body in (b"1", b"22", b"333")], 1, 0.1, check)
    assert len(load.latencies_s) == len(sent) == len(seen) > 3
    assert sent[:4] == [b"1", b"22", b"333", b"1"]
    assert seen == [body * 2 for body in sent]
    assert sum(load.latencies_s) <= load.seconds
    assert load.cpu_s > 0


async def test_as_many_requests_are_under_way_as_there_are_callers() -> None:
    under_way, most = 0, 0

    async def slow(_: Request) -> Response:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0.02)
        under_way -= 1
        return Response()

    async with serving(slow) as port:
        load = await drive(port, [http_request("/", b"")], 5, 0.2, well)
    assert most == 5
    assert len(load.latencies_s) % 5 == 0
    assert min(load.latencies_s) >= 0.02


async def test_no_time_at_all_is_one_request_of_each_caller() -> None:
    async def answer(_: Request) -> Response:
        return Response()

    async with serving(answer) as port:
        assert len((await drive(port, [http_request("/", b"")], 3, 0, well)).latencies_s) == 3


async def test_an_answer_in_pieces_is_put_together() -> None:
    pieces = [b"a" * 70_000, b"b", b"c" * 300_000]

    async def in_pieces(_: Request) -> Response:
        async def stream() -> AsyncIterator[bytes]:
            for piece in pieces:
                yield piece
                await asyncio.sleep(0.005)

        return StreamingResponse(stream(), headers={"content-length": str(sum(map(len, pieces)))})

    def check(_: bytes, body: bytes) -> str | None:
        return None if body == b"".join(pieces) else f"found {len(body)} bytes"

    async with serving(in_pieces) as port:
        assert len((await drive(port, [http_request("/", b"")], 2, 0, check)).latencies_s) == 2


async def test_what_check_finds_is_raised() -> None:
    async def answer(_: Request) -> Response:
        return Response(status_code=503)

    def check(head: bytes, _: bytes) -> str | None:
        return None if b" 200 " in head else "not a success"

    async with serving(answer) as port:
        with pytest.raises(LoadError, match="3 wrong answers, the first: not a success"):
            await drive(port, [http_request("/", b"")], 3, 0, check)


async def test_an_answer_without_a_length_is_refused() -> None:
    async def chunked(_: Request) -> Response:
        async def stream() -> AsyncIterator[bytes]:
            yield b"x"

        return StreamingResponse(stream())

    async with serving(chunked) as port:
        with pytest.raises(LoadError, match="no Content-Length"):
            await drive(port, [http_request("/", b"")], 2, 0, well)


async def test_a_server_that_hangs_up_is_an_error() -> None:
    async def hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    async with await asyncio.start_server(hang_up, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(LoadError, match="closed a connection"):
            await drive(port, [http_request("/", b"")], 2, 1, well)


async def test_nobody_listens() -> None:
    with pytest.raises(LoadError, match="nothing listens"):
        await drive(free_port(), [http_request("/", b"")], 1, 1, well)


@pytest.mark.parametrize(
    ("data", "size"),
    [
        (b"", 0),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n", 0),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n", 43),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 12\r\nx: y\r\n\r\nabc", 57),
        (b"HTTP/1.1 200 OK\r\nother-content-length: 3\r\ncontent-length: 5\r\n\r\n", 68),
    ],
)
def test_size_of_answer(data: bytes, size: int) -> None:
    assert size_of_answer(data) == size


def test_figures_of_a_load() -> None:
    load = Load([0.001, 0.002, 0.003, 0.004], seconds=2.0)
    assert load.requests_per_s == 2.0
    assert (load.latency_ms(50), load.latency_ms(99)) == (2.0, 4.0)
