"""Requests that no client sends, over sockets: cut, bent, badly framed, badly chunked, smuggling, or no HTTP at all.

What must hold of each: it is answered, or the connection is closed, within the service's time limits; no answer is a
failure of the service, and every error is of the documented form. After each ROUND the service answers a good request
rightly; at the end it has as many open files as at the start, and about as much memory.
"""

import asyncio
import json
import random
import struct
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from tests.fuzz.answers import check_error
from tests.fuzz.target import BODY_TIMEOUT_S, CANDIDATES, HEADER_TIMEOUT_S, HISTORIES, Found, GoodRequest, Target
from tests.service.raw_http import Answer

ROUND = 100
AT_ONCE = 25
QUIET_S = 0.05  # without another answer after the first one, the caller has seen enough
HANGS_S = HEADER_TIMEOUT_S + BODY_TIMEOUT_S + 20  # the machine may be busy
MORE_MEMORY_MB = 300.0  # than at the start: buffers, and what the allocator keeps
MORE_FILES = 10
SETTLES_S = 20.0

Make = Callable[[random.Random], bytes]
USER = min(HISTORIES)


def fuzz_raw_requests(target: Target, requests: int, seed: int) -> dict[str, Any]:
    """Send `requests` requests or more. Raises Found with the first one that is not taken as it should be."""
    rng, good = random.Random(seed), GoodRequest(target)
    good.check()
    memory_mb, files = target.memory_mb(), target.open_files()
    statuses: Counter[str] = Counter()
    for _ in range(-(-requests // ROUND)):
        batch = [_make(rng) for _ in range(ROUND)]
        asyncio.run(_send_all(target.port, batch, rng.getrandbits(32), statuses))
        good.check()
    grown_mb = target.memory_mb() - memory_mb
    if grown_mb > MORE_MEMORY_MB:
        raise Found(f"the service takes {grown_mb:.0f} MiB more than before {requests} requests")
    _check_files(target, files)
    return {
        "requests": statuses.total(),
        "answers": dict(sorted(statuses.items())),
        "memory_growth_mb": round(grown_mb),
    }


def _check_files(target: Target, before: int) -> None:
    deadline = time.monotonic() + SETTLES_S
    while (found := target.open_files()) > before + MORE_FILES:
        if time.monotonic() > deadline:
            raise Found(f"the service has {found} open files, {before} before all callers left")
        time.sleep(0.2)


# --- sending ----------------------------------------------------------------------------------------------------------


async def _send_all(port: int, batch: Sequence[bytes], seed: int, statuses: Counter[str]) -> None:
    rng, slots = random.Random(seed), asyncio.Semaphore(AT_ONCE)

    async def send(data: bytes, pieces: int) -> None:
        async with slots:
            try:
                async with asyncio.timeout(HANGS_S):
                    answers = await _exchange(port, _pieces(data, pieces))
            except TimeoutError:
                raise Found(f"no end after {HANGS_S:.0f} s:\n{_shown(data)}") from None
            _check(data, answers)
            statuses[str(answers[0].status) if answers else "closed"] += 1

    await asyncio.gather(*[send(data, rng.choice((1, 1, 1, 2, 5))) for data in batch])


async def _exchange(port: int, pieces: Sequence[bytes]) -> list[Answer]:
    """Send, and read answers until there are no more."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    found: list[Answer] = []
    try:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0)
        while True:
            patience_s = QUIET_S if found else HANGS_S
            async with asyncio.timeout(patience_s):
                answer = await _read_answer(reader)
            if answer is None:
                return found
            found.append(answer)
    except TimeoutError:
        if found:
            return found
        raise
    except ConnectionError:
        return found
    finally:
        writer.close()


async def _read_answer(reader: asyncio.StreamReader) -> Answer | None:
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError as error:
        if error.partial:
            raise Found(f"half an answer: {error.partial!r}") from None
        return None
    line, *lines = head.decode("latin-1").split("\r\n")[:-2]
    headers = {name.lower(): value for name, value in (each.split(": ", 1) for each in lines)}
    status = int(line.split(" ")[1])
    body = await reader.readexactly(int(headers.get("content-length", 0)))
    return Answer(status, headers, body)


def _pieces(data: bytes, count: int) -> list[bytes]:
    size = max(1, -(-len(data) // count))
    return [data[start : start + size] for start in range(0, len(data), size)]


def _check(data: bytes, answers: Sequence[Answer]) -> None:
    try:
        for answer in answers:
            is_head = data.startswith(b"HEAD ") and not answer.body
            if not is_head:
                check_error(None, answer.status, answer.headers, answer.body, in_a_hurry=b"timeout" in data)
    except Found as error:
        raise Found(f"{error}\n{_shown(data)}") from error


def _shown(data: bytes) -> str:
    return repr(data) if len(data) <= 4000 else f"{data[:2000]!r} … {data[-500:]!r} ({len(data)} bytes)"


# --- requests ---------------------------------------------------------------------------------------------------------

BODIES = (b"/v1/score", b"/v1/score/batch", b"/v2/models/lrea/infer", b"/v2/repository/index")
INFORMATION = (b"/v1/users/11", b"/v1/model", b"/v2", b"/livez", b"/readyz", b"/metrics", b"/openapi.json", b"/docs")
ROUTES = (*BODIES, *INFORMATION, b"/nowhere")
FRAMINGS = (
    b"Content-Length: 5", b"Content-Length: 6", b"Content-Length: +5", b"Content-Length:5\t", b"Content-Length: 5,5",
    b"Transfer-Encoding: chunked", b"Transfer-Encoding: xchunked", b"Transfer-Encoding : chunked",
    b"Transfer-Encoding:\tchunked", b"Transfer-Encoding: identity", b"Transfer-Encoding: chunked, identity",
    b"Transfer-Encoding:\r\n chunked", b"transfer-encoding: CHUNKED", b"Transfer_Encoding: chunked",
    b"X: y\nTransfer-Encoding: chunked", b"X: y\rContent-Length: 5", b"Connection: Content-Length",
    b"Connection: close", b"Connection: Upgrade\r\nUpgrade: h2c", b"Expect: 100-continue", b"Host: [",
)  # fmt: skip
NAMES = (
    b"user_id", b"candidates", b"top_k", b"recent_items", b"history", b"context", b"candidate_features", b"timeout_ms",
    b"requests", b"inputs", b"parameters", b"", b"x" * 3000,
)  # fmt: skip
VALUES = (
    b"null", b"true", b"-0", b"1.5", b"NaN", b"Infinity", b"1e400", b"9" * 19, b"9" * 4300, b"9" * 100_000, b"[]",
    b'""',
    b'"\\ud800"', b'"\\u0000"', b'"' + b"x" * 2000 + b'"', b'"\xff"', b"{}", b"[[]]", b'[{"item_id": 1}]',
    b"[1," * 3000 + b"1" + b"]" * 3000, b'{"": 1, "": 2}', b"[" + b"1," * 20_000 + b"1]", b"\xef\xbb\xbf1",
)  # fmt: skip
SCORE = json.dumps({"user_id": USER, "candidates": CANDIDATES}).encode()


def _make(rng: random.Random) -> bytes:
    return rng.choice(MAKERS)(rng)


def _request(path: bytes, body: bytes, *headers: bytes, method: bytes = b"POST") -> bytes:
    lines = [b"%b %b HTTP/1.1" % (method, path), b"Host: x", b"Content-Type: application/json", *headers]
    return b"\r\n".join([*lines, b"Content-Length: %d" % len(body), b"", body])


def _good(rng: random.Random) -> bytes:
    path = rng.choice(ROUTES)
    posts = path in BODIES
    if path == b"/v1/score/batch":
        return _request(path, b'{"requests": [%b]}' % SCORE)
    if path == b"/v2/models/lrea/infer":
        return _infer(rng, spoils=False)
    return _request(path, SCORE if posts else b"", method=b"POST" if posts else b"GET")


def _garbage(rng: random.Random) -> bytes:
    begins = (
        b"",
        b"GET ",
        b"POST /v1/score HTTP/1.1\r\n",
        b"\x16\x03\x01\x02\x00",
        b"PRI * HTTP/2.0\r\n\r\n",
        b"\r\n\r\n",
    )
    return rng.choice(begins) + rng.randbytes(rng.choice((1, 10, 200, 5000)))


def _bent(rng: random.Random) -> bytes:
    """A good request with some bytes changed, taken out, put in or said twice; in its head or anywhere."""
    data = bytearray(_good(rng))
    end = data.index(b"\r\n\r\n") + 4 if rng.random() < 0.7 else len(data)
    for _ in range(rng.randint(1, 4)):
        at, size = rng.randrange(end), rng.choice((1, 1, 2, 8))
        change = rng.randrange(4)
        if change == 0:
            data[at : at + size] = rng.randbytes(size)
        elif change == 1:
            del data[at : at + size]
        elif change == 2:
            data[at:at] = rng.choice((b"\0", b"\r", b"\n", b"\r\n", b" ", b":", b"\x80", b"%00", rng.randbytes(size)))
        else:
            data[at:at] = data[at : at + 50]
        end = min(end, len(data)) or 1
    return bytes(data)


def _cut(rng: random.Random) -> bytes:
    data = _good(rng)
    return data[: rng.randrange(1, len(data))]


def _wrong_length(rng: random.Random) -> bytes:
    lengths = (0, 1, len(SCORE) - 1, len(SCORE) + 1, 10**6, 2**31, 2**63, 2**64, -1)
    length = rng.choice([b"%d" % number for number in lengths] + [b"", b"ten", b"1e3", b"0x10", b"5, 5", b"+5", b"5 5"])
    return _request(rng.choice(ROUTES), SCORE).replace(b"Content-Length: %d" % len(SCORE), b"Content-Length: " + length)


def _chunked(rng: random.Random) -> bytes:
    head = _request(rng.choice(ROUTES), b"").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
    chunks, rest = b"", SCORE
    while rest:
        size = rng.randint(1, 40)
        part, rest = rest[:size], rest[size:]
        said = len(part) + rng.choice((0, 0, 0, 0, 0, 0, -1, 1, 2**40, 2**70))
        extension = rng.choice((b"", b"", b"", b";a", b";a=b", b' ; a="', b";" + b"x" * 200, b"\t"))
        ends = rng.choice((b"\r\n",) * 12 + (b"\n", b"\r", b""))
        chunks += b"%x" % max(0, said) + extension + ends + part + rng.choice((b"\r\n",) * 12 + (b"\n", b"", b"xx"))
    return (
        head
        + chunks
        + rng.choice((b"0\r\n\r\n", b"0\r\nTrailer: x\r\n\r\n", b"0\r\n" + b"t: x\r\n" * 20 + b"\r\n", b"0", b""))
    )


def _smuggling(rng: random.Random) -> bytes:
    """Two or three ideas of where the body ends, and another request behind one of the ends."""
    chosen = rng.sample(FRAMINGS, rng.randint(1, 3))
    version = rng.choice((b"1.1", b"1.1", b"1.1", b"1.0", b"0.9", b"2.0"))
    head = b"\r\n".join([b"POST /v1/score HTTP/" + version, b"Host: x", *chosen, b"", b""])
    return head + rng.choice((b"0\r\n\r\n", b"5\r\nabcde\r\n0\r\n\r\n", b"abcde")) + _good(rng) * rng.randint(1, 3)


def _deep(rng: random.Random) -> bytes:
    depth = rng.choice((10, 199, 201, 1000, 20_000, 100_000))
    opens, closes = rng.choice(((b"[", b"]"), (b'{"a":', b"}"), (b'[{"":', b"}]")))
    value = opens * depth + (b"1" + closes * depth if rng.random() < 0.8 else b"")
    return _request(rng.choice(BODIES), rng.choice((value, SCORE[:-1] + b', "context": ' + value + b"}")))


def _values(rng: random.Random) -> bytes:
    """A field of a wrong type, or a right one out of all bounds."""
    fields = b", ".join(b'"%b": %b' % (rng.choice(NAMES), rng.choice(VALUES)) for _ in range(rng.randint(1, 3)))
    body = rng.choice((SCORE[:-1] + b", " + fields + b"}", b"{" + fields + b"}"))
    encoding = rng.choice((None, None, None, None, "utf-16", "utf-32"))
    return _request(rng.choice(BODIES), body if encoding is None else body.decode("latin-1").encode(encoding))


def _infer(rng: random.Random, *, spoils: bool = True) -> bytes:
    """Binary tensors, of which some number is wrong."""

    def off(number: int) -> int:
        return number + rng.choice((0, 0, 0, -1, 1, 7, -number, 2**31, 2**63, -(2**63))) if spoils else number

    raw = struct.pack(f"<{1 + len(CANDIDATES)}q", USER, *CANDIDATES)
    names = ("user_id", "candidates")
    counts = (1, len(CANDIDATES))
    inputs = [
        {
            "name": rng.choice((name, name, name, "history", "scores", "")) if spoils else name,
            "shape": [off(count)] if rng.random() < 0.8 else [1, off(count)],
            "datatype": rng.choice(("INT64", "INT64", "BYTES", "FP32")) if spoils else "INT64",
            "parameters": {"binary_data_size": off(8 * count)},
        }
        for name, count in zip(names, counts, strict=True)
    ]
    text = json.dumps({"inputs": inputs}).encode()
    raw += rng.randbytes(rng.choice((0, 0, 3, 100))) if spoils else b""
    header = b"Inference-Header-Content-Length: %d" % off(len(text))
    return _request(b"/v2/models/lrea/infer", text + raw, header)


def _long(rng: random.Random) -> bytes:
    """Something of the head that is too long, or that does not end."""
    size = rng.choice((1000, 30_000, 40_000, 200_000))
    thing = rng.choice((b"/v1/users/%b", b"/%%%b", b"/v1/users/1?%b", b"//%b")) % (b"f" * size)
    return rng.choice(
        (
            b"GET " + thing + b" HTTP/1.1\r\nHost: x\r\n\r\n",
            b"GET " + thing,
            _request(b"/v1/score", SCORE, b"X: " + b"x" * size),
            _request(b"/v1/score", SCORE, *[b"x%d: y" % number for number in range(size // 100)]),
            b"G" * size,
        )
    )


def _many(rng: random.Random) -> bytes:
    """Several at once on one connection."""
    return (
        b"".join(_make(rng) for _ in range(rng.randint(2, 4)))
        if rng.random() < 0.7
        else _good(rng) * rng.randint(2, 40)
    )


MAKERS: tuple[Make, ...] = (
    _good, _garbage, _bent, _bent, _bent, _cut, _wrong_length, _chunked, _chunked, _smuggling, _smuggling, _deep,
    _values, _values, _infer, _infer, _long, _many,
)  # fmt: skip
