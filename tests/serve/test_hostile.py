"""Clients that send garbage, too much or nothing, do not read, or vanish: the server goes on and holds nothing."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest

from .running import Running, serve
from .scripted import ScriptedEngine, byte_model

SECOND = 10**9


def crowd_engine() -> ScriptedEngine:
    return ScriptedEngine(max_running=64, max_waiting=1024)


@pytest.fixture(scope="module")
def short_server() -> Iterator[Running]:
    """Short deadlines, for the tests that wait for one."""
    limits = {"header_timeout_ns": SECOND, "body_timeout_ns": SECOND, "write_timeout_ns": SECOND,
              "keep_alive_timeout_ns": SECOND}  # fmt: skip
    with serve(crowd_engine, byte_model(), **limits) as running:
        yield running


@pytest.fixture(scope="module")
def long_server() -> Iterator[Running]:
    """The deadlines of every day, so that a busy machine does not cut what should live."""
    with serve(crowd_engine, byte_model(), max_body_bytes=100_000) as running:
        yield running


@pytest.fixture
def hasty(short_server: Running) -> Iterator[Running]:
    yield short_server
    check_still_works(short_server)


@pytest.fixture
def server(long_server: Running) -> Iterator[Running]:
    yield long_server
    check_still_works(long_server)


def check_still_works(server: Running) -> None:
    """After every attack: an ordinary request is answered, and no block is held."""
    server.engine.pause_s, server.engine.text_factor = 0.0, 1
    server.wait_idle(20)
    with server.client() as client:
        answer = client.post("/v1/completions", json={"prompt": "abc", "max_tokens": 3})
        assert answer.json()["choices"][0]["text"] == "cba"


def dial(server: Running, receive_buffer: int | None = None) -> socket.socket:
    sock = socket.socket()
    if receive_buffer is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    sock.settimeout(5)
    sock.connect(("127.0.0.1", server.port))
    return sock


def request_bytes(body: bytes, path: str = "/v1/completions", **headers: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "host: localhost", "content-type: application/json",
             f"content-length: {len(body)}", *(f"{name}: {value}" for name, value in headers.items())]  # fmt: skip
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def read_all(sock: socket.socket) -> bytes:
    found = b""
    try:
        while piece := sock.recv(65536):
            found += piece
    except ConnectionResetError:
        pass
    return found


def talk(server: Running, data: bytes) -> bytes:
    with dial(server) as sock:
        sock.sendall(data)
        return read_all(sock)


@pytest.mark.parametrize(
    "data",
    [
        b"\x00\x01\x02\x03\r\n\r\n",
        b"GET\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\xaa" * 64,
        b"GET / HTTP/1.1\r\nno colon here\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\nabcde",
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\nZZ\r\n",
        b"GET / HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\nx: " + b"a" * 100_000 + b"\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
    ids=range(9),
)
def test_what_is_no_http_gets_a_400_in_our_shape(server: Running, data: bytes) -> None:
    answer = talk(server, data)
    assert answer == b"" or answer.startswith(b"HTTP/1.1 4"), answer[:200]
    if answer.startswith(b"HTTP/1.1 400"):
        assert "message" in json.loads(answer.partition(b"\r\n\r\n")[2])["error"]


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"\xff\xfe", b'{"prompt": "\xff"}', b"[" * 50_000, b'{"prompt": "\\ud800"}', b'{"prompt": NaN}',
     b'{"prompt": "a", "max_tokens": 99999999999999999999999}x', b'{"prompt": [1e400]}', b"\x00" * 1000,
     b'{"prompt": "a", "logit_bias": {"\\u0000": 1}}', b'{"prompt": "a", "stop": {}}', b'"' + b"a" * 50_000 + b'"',
     b'{"prompt": "a", "n": 1000000000}', b'{"prompt": "a", "\\ud83d\\ude00": 1}'],
    ids=range(15),
)  # fmt: skip
def test_malformed_bodies_get_400(server: Running, body: bytes) -> None:
    with server.client() as client:
        for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize", "/v1/embeddings"):
            answer = client.post(path, content=body, headers={"content-type": "application/json"})
            assert answer.status_code == 400, (path, answer.text)
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_invalid_utf8_in_path_and_headers(server: Running) -> None:
    for line in (b"GET /v1/models/%ff%fe HTTP/1.1", b"GET /v1/models/%0a%0dx HTTP/1.1"):
        answer = talk(server, line + b"\r\nhost: localhost\r\nx-request-id: \xff\xfe\r\nconnection: close\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 404"), answer


def test_huge_bodies_are_refused_whatever_they_announce(server: Running) -> None:
    big = b'{"prompt": "' + b"a" * 150_000 + b'"}'
    with server.client() as client:
        headers = {"content-type": "application/json"}
        assert client.post("/v1/completions", content=big, headers=headers).status_code == 413

        def chunks() -> Iterator[bytes]:
            for start in range(0, len(big), 10_000):
                yield big[start : start + 10_000]

        assert client.post("/v1/completions", content=chunks(), headers=headers).status_code == 413
    with dial(server) as sock:
        sock.sendall(request_bytes(b"").replace(b"content-length: 0", b"content-length: 99999999999"))
        begin = time.monotonic()
        sent = 0
        try:
            while time.monotonic() - begin < 8:
                sent += sock.send(b"x" * 65536)
        except OSError:
            pass
        else:
            pytest.fail("an endless body was read to no end")
        assert sent < 20_000_000


def test_slow_loris_headers_and_bodies_get_408(hasty: Running) -> None:
    for begin in (b"", b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nx: ",
                  request_bytes(b"").replace(b"content-length: 0", b"content-length: 1000")):  # fmt: skip
        with dial(hasty) as sock:
            sock.sendall(begin)
            start = time.monotonic()
            answer = b""
            sock.settimeout(0.1)
            while not answer and time.monotonic() - start < 8:
                try:
                    sock.send(b"x" if begin else b"")
                    answer = sock.recv(4096)
                except TimeoutError:
                    continue
            assert answer.startswith(b"HTTP/1.1 408"), answer
            assert time.monotonic() - start < 5


def test_drip_after_an_early_refusal_is_cut(hasty: Running) -> None:
    """The answer (404) is out, the announced body never ends: the connection must not live on."""
    with dial(hasty) as sock:
        sock.sendall(request_bytes(b"", path="/nowhere").replace(b"content-length: 0", b"content-length: 100000"))
        assert sock.recv(4096).startswith(b"HTTP/1.1 404")
        start = time.monotonic()
        try:
            while time.monotonic() - start < 8:
                sock.send(b"x")
                time.sleep(0.05)
        except OSError:
            pass
        assert time.monotonic() - start < 5


def test_idle_connections_are_closed(hasty: Running) -> None:
    with dial(hasty) as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
        start = time.monotonic()
        assert read_all(sock).startswith(b"HTTP/1.1 200")
        assert 0.5 < time.monotonic() - start < 8


def test_pipelined_requests_are_answered_in_order(server: Running) -> None:
    one = request_bytes(b'{"prompt": "ab", "max_tokens": 1}')
    two = request_bytes(b'{"prompt": "cd", "max_tokens": 1}', connection="close")
    answer = talk(server, one + two)
    assert answer.count(b"HTTP/1.1 200") == 2
    assert answer.index(b'"text":"b"') < answer.index(b'"text":"d"')


def test_garbage_behind_a_request_waits_and_gets_a_400(server: Running) -> None:
    server.engine.pause_s = 0.01
    with dial(server) as sock:
        sock.sendall(request_bytes(b'{"prompt": "ab", "max_tokens": 20, "stream": true}'))
        answer = sock.recv(4096)
        sock.sendall(b"\x00\x01garbage\r\n\r\n" * 10)
        answer += read_all(sock)
    first, _, second = answer.partition(b"[DONE]")
    assert first.startswith(b"HTTP/1.1 200")
    assert b"HTTP/1.1 400" in second


def test_reader_that_stalls_is_cut_and_frees_its_blocks(hasty: Running) -> None:
    hasty.engine.pause_s, hasty.engine.text_factor = 0.001, 200_000
    body = json.dumps({"prompt": "ab", "max_tokens": 400, "stream": True}).encode()
    socks = [dial(hasty, receive_buffer=4096) for _ in range(5)]
    try:
        for sock in socks:
            sock.sendall(request_bytes(body))
        deadline = time.monotonic() + 5
        while hasty.engine.stats().running < 5:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        hasty.wait_idle(20)
    finally:
        for sock in socks:
            sock.close()


def test_reader_of_a_finished_answer_that_stalls_is_cut(hasty: Running) -> None:
    hasty.engine.text_factor = 100_000
    body = json.dumps({"prompt": "ab", "max_tokens": 100}).encode()
    with dial(hasty, receive_buffer=4096) as sock:
        sock.sendall(request_bytes(body, connection="close"))
        time.sleep(0.3)
        hasty.wait_idle(20)
        connections = hasty.runner._server.server_state.connections
        deadline = time.monotonic() + 20
        while connections:
            assert time.monotonic() < deadline, "the connection is still held"
            time.sleep(0.05)


def test_500_connections_vanish_in_mid_stream(server: Running) -> None:
    server.engine.pause_s = 0.005

    async def one(number: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        body = {"prompt": "ab", "max_tokens": 500, "stream": True, "n": 1 + number % 2}
        writer.write(request_bytes(json.dumps(body).encode()))
        await writer.drain()
        if number % 5:
            await reader.readuntil(b"data: ")
        # Half of them reset the connection, half close it.
        if number % 2:
            linger = b"\x01\x00\x00\x00\x00\x00\x00\x00"
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            writer.transport.abort()
        else:
            writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()

    async def everyone() -> None:
        gate = asyncio.Semaphore(100)

        async def bounded(number: int) -> None:
            async with gate:
                await asyncio.wait_for(one(number), 60)

        await asyncio.gather(*(bounded(number) for number in range(500)))

    before = server.engine.stats().kv_blocks_used
    assert before == 0
    asyncio.run(everyone())
    server.wait_idle(30)


def test_clients_that_leave_while_waiting_for_a_whole_answer(server: Running) -> None:
    server.engine.pause_s = 0.1
    socks = [dial(server) for _ in range(20)]
    for sock in socks:
        sock.sendall(request_bytes(b'{"prompt": "ab", "max_tokens": 500}'))
    while server.engine.stats().running < 20:
        time.sleep(0.01)
    for sock in socks:
        sock.close()
    server.wait_idle(20)


def test_too_many_connections_get_503() -> None:
    with serve(ScriptedEngine, byte_model(), max_connections=20) as server:
        connections = server.runner._server.server_state.connections
        socks = [dial(server) for _ in range(20)]
        try:
            while len(connections) < 20:
                time.sleep(0.01)
            with dial(server) as extra:
                answer = read_all(extra)
                assert answer.startswith(b"HTTP/1.1 503"), answer
                assert b"too_many_connections" in answer
                assert b"retry-after: 1" in answer
        finally:
            for sock in socks:
                sock.close()
        deadline = time.monotonic() + 5
        while connections:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        with server.client() as client:
            assert client.get("/health").status_code == 200


def test_nothing_is_left_behind(server: Running) -> None:
    """After all of the above: no task of ours lives on in the server's loop."""
    box: list[Any] = []

    def count() -> None:
        names = [str(task.get_coro()) for task in asyncio.all_tasks()]
        box.append([name for name in names if "run_asgi" in name or "_pump" in name or "_work" in name])

    server.call(count)
    deadline = time.monotonic() + 2
    while not box and time.monotonic() < deadline:
        time.sleep(0.01)
    assert box == [[]]
