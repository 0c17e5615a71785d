"""Connections by hand: heads without end, callers that stop in between, too many of them, and shapes that smuggle."""

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.http.connection import MAX_HEADERS, MAX_PIPELINED
from service.http.seats import RESERVED
from tests.service.cache import Cache
from tests.service.raw_http import WAIT_S, Answer, RawConnection
from tests.service.serving import running_service
from tests.tiny import item_id, user_id

USER = user_id("int", 1)
BODY = json.dumps({"user_id": USER, "candidates": [item_id("int", 1), item_id("int", 2)]}).encode()
LIVEZ = b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"
HEAD = b"POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
GOOD = HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
MAX_HEADER_BYTES = 4096


@pytest.fixture(scope="module")
def cache(store_url: str, int_bundles: Path) -> Iterator[Cache]:
    with Cache.of_bundles(store_url, "test-connection", int_bundles) as cache:
        cache.publish({USER: [item_id("int", 3)]})
        yield cache


def settings(cache: Cache, **changes: Any) -> dict[str, Any]:
    return {"store_url": cache.url, "key_prefix": cache.prefix, "bundles_dir": cache.bundles_dir} | changes


@pytest.fixture(scope="module")
def client(cache: Cache) -> Iterator[httpx.Client]:
    """A service with limits of size, and time enough."""
    with running_service(**settings(cache, max_header_bytes=MAX_HEADER_BYTES)) as client:
        yield client


@pytest.fixture(scope="module")
def hasty(cache: Cache) -> Iterator[httpx.Client]:
    """A service that waits for nobody."""
    with running_service(**settings(cache, header_timeout_s=0.5, body_timeout_s=0.5, keep_alive_s=1)) as client:
        yield client


def ask(client: httpx.Client, data: bytes) -> list[Answer]:
    """All answers to `data`, of which the last must be the connection's end."""
    with RawConnection(client) as connection:
        connection.send(data)
        return connection.answers()


def check_problem(answer: Answer, status: int, kind: str) -> None:
    assert answer.status == status, answer
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["connection"] == "close"
    document = answer.json()
    assert document["type"] == f"urn:lrea:problem:{kind}"
    assert document["status"] == status
    assert document["detail"]
    assert document["request_id"] == answer.headers["x-request-id"]


def counted(client: httpx.Client, route: str, status: int) -> float:
    name = f'lrea_requests_total{{route="{route}",status="{status}"}} '
    lines = [line for line in client.get("/metrics").text.splitlines() if line.startswith(name)]
    return float(lines[0].removeprefix(name)) if lines else 0.0


# --- size -------------------------------------------------------------------------------------------------------------


def padded(head: bytes, size: int) -> bytes:
    """`head`, which ends with an empty line, with one more header, so that it has `size` bytes."""
    start = head[:-2] + b"X-Padding: "
    return start + b"p" * (size - len(start) - 4) + b"\r\n\r\n"


def test_a_head_up_to_the_limit_is_read_whatever_body_follows_it(client: httpx.Client) -> None:
    body = BODY + b" " * 10_000
    head = padded(HEAD + b"Content-Length: %d\r\n\r\n" % len(body), MAX_HEADER_BYTES)
    with RawConnection(client) as connection:
        for _ in range(2):
            connection.send(head + body)
            answer = connection.answer()
            assert answer is not None
            assert answer.status == 200


@pytest.mark.parametrize(
    "data",
    [
        padded(LIVEZ, MAX_HEADER_BYTES + 1),
        padded(LIVEZ, 300_000),
        LIVEZ[:-2] + b"X-Endless: " + b"x" * 10_000,
        LIVEZ[:-2] + b"x" * 10_000,
        LIVEZ[:-2] + b"a: b\r\n" * (MAX_HEADERS + 1) + b"\r\n",
        b"GET /" + b"x" * 10_000,
        b"GET /v1/users/" + b"x" * 10_000 + b" HTTP/1.1\r\n\r\n",
        b"\r\n" * 5_000,
    ],
    ids=["padded", "far padded", "value", "name", "many headers", "endless path", "path", "empty lines"],
)
def test_a_head_that_is_too_large_is_431(client: httpx.Client, data: bytes) -> None:
    before = counted(client, "none", 431)
    [answer] = ask(client, data)
    check_problem(answer, 431, "request-header-too-large")
    assert counted(client, "none", 431) == before + 1


def test_a_head_in_pieces_is_counted_as_a_whole(client: httpx.Client) -> None:
    with RawConnection(client) as connection:
        for piece in (LIVEZ[:-2], *[b"a: %s\r\n" % (b"b" * 500)] * 10):
            connection.send(piece)
        [answer] = connection.answers()
    check_problem(answer, 431, "request-header-too-large")


def test_a_refusal_has_the_caller_s_id_and_the_path_s_form(client: httpx.Client) -> None:
    data = b"GET /v2 HTTP/1.1\r\nX-Request-Id: abc-1\r\nX: " + b"x" * 5_000
    [answer] = ask(client, data)
    assert (answer.status, answer.headers["x-request-id"]) == (431, "abc-1")
    assert answer.headers["content-type"] == "application/json"
    assert list(answer.json()) == ["error"]


@pytest.mark.parametrize(
    "data",
    [
        CHUNKED + b"1;" + b"x" * 5_000,
        CHUNKED + b"".join(b"1;%s\r\n \r\n" % (b"x" * 100) for _ in range(100)),
        CHUNKED + b"0\r\n" + b"a: b\r\n" * 1_000,
    ],
    ids=["no end of an extension", "many extensions", "trailers"],
)
def test_what_a_chunked_body_has_beside_its_data_counts_as_header(client: httpx.Client, data: bytes) -> None:
    before = counted(client, "/v1/score", 431)
    [answer] = ask(client, data)
    check_problem(answer, 431, "request-header-too-large")
    assert counted(client, "/v1/score", 431) == before + 1, "its head was good: the route answers"


def test_small_chunks_are_fine_and_trailers_are_no_headers(client: httpx.Client) -> None:
    body = BODY + b" " * 3_000
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in body)
    with RawConnection(client) as connection:
        for _ in range(2):
            connection.send(CHUNKED + chunks + b"0\r\nX-Request-Id: from-a-trailer\r\n\r\n")
            answer = connection.answer()
            assert answer is not None
            assert answer.status == 200
            assert answer.headers["x-request-id"] != "from-a-trailer"


# --- form -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"get / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/2.0\r\n\r\n",
        b"GET /\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\n\r\n",
        b"GET /\0 HTTP/1.1\r\n\r\n",
        b"CONNECT other:443 HTTP/1.1\r\nHost: other\r\n\r\n",
        b"GET / HTTP/1.1\nHost: x\n\n",
        b"GET / HTTP/1.1\r\nHost : x\r\n\r\n",
        b"GET / HTTP/1.1\r\nX: a\r\n folded\r\n\r\n",
        b"GET / HTTP/1.1\r\nX: a\0b\r\n\r\n",
    ],
    ids=["tls", "http/2", "method", "2.0", "0.9", "path", "zero", "connect", "lines", "space", "fold", "zero value"],
)
def test_what_is_not_http_is_a_problem(client: httpx.Client, data: bytes) -> None:
    before = counted(client, "none", 400)
    [answer] = ask(client, data)
    check_problem(answer, 400, "malformed-http")
    assert counted(client, "none", 400) == before + 1


SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.mark.parametrize(
    "headers",
    [
        b"Content-Length: 5\r\nTransfer-Encoding: chunked",
        b"Transfer-Encoding: chunked\r\nContent-Length: 5",
        b"Content-Length: 5\r\nContent-Length: 6",
        b"Content-Length: 5\r\nContent-Length: 5",
        b"Content-Length: 5, 5",
        b"Content-Length: +5",
        b"Content-Length: -5",
        b"Content-Length: 0x5",
        b"Content-Length: 99999999999999999999999",
        b"Content-Length:",
        b"Content-Length: 5\r\nTransfer-Encoding:",
        b"Transfer-Encoding: identity",
        b"Transfer-Encoding: xchunked",
        b'Transfer-Encoding: "chunked"',
        b"Transfer-Encoding: chunked, identity",
        b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity",
        b"Transfer-Encoding: chunked, chunked",
        b"Transfer-Encoding : chunked",
        b"Transfer-Encoding: \x0bchunked",
        b"Transfer-Encoding:\r\n chunked",
        b"Content-Length: 5\r\n\tTransfer-Encoding: chunked",
        b"X: a\nTransfer-Encoding: chunked\r\nContent-Length: 5",
        b"X: a\rContent-Length: 5",
    ],
)
def test_two_ideas_of_a_body_s_length_are_refused(client: httpx.Client, headers: bytes) -> None:
    """Whoever is in front of the service may have the other idea: then the rest would be the next caller's request."""
    [answer] = ask(client, HEAD + headers + b"\r\n\r\n0\r\n\r\n" + SMUGGLED)
    check_problem(answer, 400, "malformed-http")


@pytest.mark.parametrize(
    "chunks",
    [b"-1\r\nx\r\n", b"0x1\r\nx\r\n", b"f" * 17 + b"\r\n", b"1 \r\nx\r\n", b"1\r\nxy\r\n", b"1;a\nx\r\n", b"z"],
)
def test_a_body_that_is_badly_chunked_is_refused_by_its_route(client: httpx.Client, chunks: bytes) -> None:
    before = counted(client, "/v1/score", 400)
    [answer] = ask(client, CHUNKED + chunks + SMUGGLED)
    check_problem(answer, 400, "malformed-http")
    assert counted(client, "/v1/score", 400) == before + 1
    infer = CHUNKED.replace(b"/v1/score", b"/v2/models/lrea/infer")
    [answer] = ask(client, infer + chunks + SMUGGLED)
    assert (answer.status, list(answer.json())) == (400, ["error"])


def test_nothing_is_answered_ahead_of_an_answer_that_is_due(client: httpx.Client) -> None:
    answers = ask(client, GOOD + GOOD + b"garbage\r\n\r\n")
    assert [answer.status for answer in answers] == [200, 200]


def test_a_host_that_is_no_host_is_nobody_s_failure(client: httpx.Client) -> None:
    with RawConnection(client) as connection:
        for host in (b"[", b"a b", b"::1]", b"\xff", b""):
            for path, status in ((b"/nowhere", 404), (b"/livez", 200), (b"/v2/nowhere", 404)):
                connection.send(b"GET %b HTTP/1.1\r\nHost: %b\r\n\r\n" % (path, host))
                answer = connection.answer()
                assert answer is not None
                assert answer.status == status, (host, path)


# --- what goes on working ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("upgrade", [b"h2c", b"websocket"])
def test_an_upgrade_is_ignored_and_the_body_read(client: httpx.Client, upgrade: bytes) -> None:
    """Java's client asks for h2c with its first request, whatever that is."""
    asks = GOOD.replace(b"Host: x", b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: " + upgrade)
    streamed = CHUNKED.replace(b"Host: x", b"Connection: upgrade\r\nUpgrade: h2c") + b"%x\r\n" % len(BODY) + BODY
    with RawConnection(client) as connection:
        connection.send(asks[:-10])
        connection.send(asks[-10:] + asks + streamed + b"\r\n0\r\n\r\n" + LIVEZ)
        answers = [connection.answer() for _ in range(4)]
        assert [answer.status for answer in answers if answer] == [200, 200, 200, 200]
    [answer] = ask(client, asks.replace(b"Upgrade,", b"Upgrade, close,"))
    assert answer.status == 200


def test_http_1_0_and_close_end_the_connection(client: httpx.Client) -> None:
    for data in (GOOD.replace(b"1.1", b"1.0", 1), GOOD.replace(b"Host: x", b"Connection: close")):
        [answer] = ask(client, data + LIVEZ)
        assert (answer.status, answer.headers["connection"]) == (200, "close")


def test_expect_continue_is_answered(client: httpx.Client) -> None:
    head, _, body = GOOD.replace(b"Host: x", b"Expect: 100-continue").partition(b"\r\n\r\n")
    with RawConnection(client) as connection:
        connection.send(head + b"\r\n\r\n")
        first = connection.answer()
        assert first is not None
        assert first.status == 100
        connection.send(body)
        second = connection.answer()
        assert second is not None
        assert second.status == 200


def test_pipelined_requests_are_answered_in_order_up_to_a_limit(client: httpx.Client) -> None:
    requests = b"".join(LIVEZ.replace(b"Host: x", b"X-Request-Id: %d" % number) for number in range(200))
    answers = ask(client, requests)
    assert [answer.headers["x-request-id"] for answer in answers] == [
        str(number) for number in range(MAX_PIPELINED + 1)
    ]


def test_a_caller_who_leaves_with_requests_in_line_is_no_failure(
    client: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    """Uvicorn tells only the last of them that nobody is there: the first one wrote, failed, and filled the log."""
    for _ in range(20):
        with RawConnection(client) as connection:
            connection.send(GOOD * 3)
    with RawConnection(client) as connection:
        connection.send(GOOD)
        answer = connection.answer()
        assert answer is not None
        assert answer.status == 200
    assert caplog.text == ""
    assert counted(client, "/v1/score", 500) == 0


# --- time -------------------------------------------------------------------------------------------------------------


def test_a_head_that_does_not_end_is_408(hasty: httpx.Client) -> None:
    for data in (b"GET /livez HTTP/1.1\r\nHost:", b"G", b"\r\n"):
        [answer] = ask(hasty, data)
        check_problem(answer, 408, "request-timeout")


def test_a_caller_who_says_nothing_is_told_nothing(hasty: httpx.Client) -> None:
    with RawConnection(hasty) as connection:
        assert connection.rest() == b""


@pytest.mark.parametrize("data", [GOOD[:-1], CHUNKED + b"5\r\nab", CHUNKED + b"5;"])
def test_a_body_that_does_not_end_is_408_of_its_route(hasty: httpx.Client, data: bytes) -> None:
    before = counted(hasty, "/v1/score", 408)
    [answer] = ask(hasty, data)
    check_problem(answer, 408, "request-timeout")
    assert counted(hasty, "/v1/score", 408) == before + 1


def test_a_body_that_nobody_waits_for_ends_the_connection(hasty: httpx.Client) -> None:
    """Answered at once, for its method or type; the rest of the body may not trickle in for ever."""
    for data in (GOOD[:-1].replace(b"POST", b"PUT"), GOOD[:-1].replace(b"application/json", b"text/plain")):
        [answer] = ask(hasty, data)
        assert answer.status in (405, 415)


def test_a_body_that_ends_after_its_answer_leaves_an_idle_connection(hasty: httpx.Client) -> None:
    request = GOOD.replace(b"POST", b"PUT")
    with RawConnection(hasty) as connection:
        connection.send(request[:-1])
        answer = connection.answer()
        assert answer is not None
        assert answer.status == 405
        connection.send(request[-1:] + LIVEZ)
        answer = connection.answer()
        assert answer is not None
        assert answer.status == 200
        connection.send(request[:-1])
        assert connection.answer() is not None
        connection.send(request[-1:])
        assert connection.rest() == b""


def test_one_byte_after_the_other_does_not_help(hasty: httpx.Client) -> None:
    with RawConnection(hasty) as connection:
        send_until_reset(connection, b"a")


def send_until_reset(connection: RawConnection, data: bytes) -> None:
    """Send `data` again and again, and read nothing, until the service has closed the connection."""
    started = time.monotonic()
    try:
        while time.monotonic() < started + WAIT_S:
            connection.send(data)
            time.sleep(0.05)
    except (ConnectionResetError, BrokenPipeError):
        return
    raise AssertionError("the connection was still open")


def test_a_connection_that_is_used_is_not_closed_and_then_counts_from_its_last_answer(cache: Cache) -> None:
    with running_service(**settings(cache, keep_alive_s=3)) as client, RawConnection(client) as connection:
        for _ in range(4):
            connection.send(LIVEZ)
            answer = connection.answer()
            assert answer is not None
            assert answer.status == 200
            time.sleep(1)  # four of them are longer than an idle one is kept
        connection.send(LIVEZ)
        assert connection.answer() is not None
        answered = time.monotonic()
        assert connection.answer() is None
        assert 2.9 < time.monotonic() - answered < 20


def test_an_idle_connection_is_closed(hasty: httpx.Client) -> None:
    with RawConnection(hasty) as connection:
        connection.send(LIVEZ)
        answer = connection.answer()
        assert answer is not None
        assert answer.status == 200
        assert connection.rest() == b""


def test_a_caller_who_does_not_take_his_answers_is_cut_off(hasty: httpx.Client) -> None:
    document = b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n"
    with RawConnection(hasty, receive_bytes=4096) as connection:
        send_until_reset(connection, document * 4)


# --- number -----------------------------------------------------------------------------------------------------------


def test_beyond_the_most_connections_only_probes_are_answered(cache: Cache, caplog: pytest.LogCaptureFixture) -> None:
    with running_service(**settings(cache, max_connections=3)) as client, ExitStack() as stack:
        client.close()  # it holds a connection of its own

        def connect() -> RawConnection:
            return stack.enter_context(RawConnection(port))

        port = int(client.base_url.port or 0)
        taken = [connect() for _ in range(3)]
        for connection in taken:
            connection.send(LIVEZ)
            answer = connection.answer()
            assert answer is not None
            assert answer.status == 200
        for path in (b"/livez", b"/readyz", b"/metrics", b"/v2/health/live", b"/v2/health/ready"):
            connection = connect()
            connection.send(LIVEZ.replace(b"/livez", path))
            [answer] = connection.answers()
            assert (answer.status, answer.headers["connection"]) == (200, "close")
        connection = connect()
        connection.send(GOOD)
        [answer] = connection.answers()
        check_problem(answer, 503, "too-many-connections")
        taken[0].send(GOOD)
        answer = taken[0].answer()
        assert answer is not None
        assert answer.status == 200, "who is in is served"
        crowd = [connect() for _ in range(RESERVED + 20)]
        [answer] = crowd[-1].answers()
        check_problem(answer, 503, "too-many-connections")
        for connection in (*crowd, *taken):
            connection.__exit__(None, None, None)
        deadline = time.monotonic() + 20
        status = 503
        while status == 503 and time.monotonic() < deadline:
            status = httpx.post(f"http://127.0.0.1:{port}/v1/score", json=json.loads(BODY)).status_code
        assert status == 200, "and when they have left, everybody is"
    assert [record.message for record in caplog.records if record.name == "service.http.seats"] == [
        "LREA_MAX_CONNECTIONS (3) are open, a further one is for probes or refused: find who holds them"
    ]
