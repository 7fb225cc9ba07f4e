"""The HTTP and event parsers: any split of the bytes gives the same, and what is broken is told, not hung on."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalith.base.errors import ConfigError
from megalith.serve.load_http import EndpointError, ResponseParser, parse_endpoint
from megalith.serve.load_stream import BodySink, StreamSink, error_text


def event(data: Any) -> bytes:
    return b"data: " + json.dumps(data, ensure_ascii=False).encode() + b"\n\n"


def chunked(pieces: list[bytes]) -> bytes:
    return b"".join(b"%x;x=y\r\n%s\r\n" % (len(p), p) for p in pieces if p) + b"0\r\nTrailer: 1\r\n\r\n"


EVENTS = [
    event({"choices": [{"delta": {"role": "assistant", "content": ""}}]}),
    event({"choices": [{"delta": {"content": "héllo"}}]}),
    b": a comment\n\n",
    event({"choices": [{"delta": {"content": " wörld"}, "finish_reason": "stop"}]}),
    event({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 2}}),
    b"data: [DONE]\n\n",
]
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
RESPONSE = b"HTTP/1.1 100 Continue\r\n\r\n" + HEAD + chunked(EVENTS)


@given(st.lists(st.integers(1, len(RESPONSE) - 1), max_size=60))
def test_any_split_of_the_bytes_gives_the_same(cuts: list[int]) -> None:
    texts: list[str] = []
    sink = StreamSink(texts.append)
    parser = ResponseParser(sink)
    edges = [0, *sorted(set(cuts)), len(RESPONSE)]
    for at, (begin, end) in enumerate(itertools.pairwise(edges)):
        assert parser.state != "done"
        parser.feed(RESPONSE[begin:end], at)
    assert parser.state == "done"
    assert parser.keep_alive
    assert "".join(texts) == "héllo wörld"
    assert (sink.status, sink.finished, sink.finish_reason, sink.error) == (200, True, "stop", "")
    assert sink.usage is not None
    assert (sink.usage.prompt_tokens, sink.usage.completion_tokens) == (7, 2)
    assert len(sink.piece_ns) == 2
    assert sink.piece_ns == sorted(sink.piece_ns)


@given(st.binary(max_size=300), st.integers(1, 50))
def test_a_body_of_known_length_arrives_whole(body: bytes, step: int) -> None:
    sink = BodySink()
    parser = ResponseParser(sink)
    raw = b"HTTP/1.1 404 Not Found\r\nconnection: close\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body)
    for begin in range(0, len(raw), step):
        parser.feed(raw[begin : begin + step], 0)
    assert (parser.state, sink.status, bytes(sink.body), parser.keep_alive) == ("done", 404, body, False)


def test_a_body_until_close() -> None:
    sink = BodySink()
    parser = ResponseParser(sink)
    parser.feed(b"HTTP/1.0 200 OK\r\n\r\nabc", 0)
    parser.feed(b"def", 0)
    parser.feed_eof()
    assert (parser.state, bytes(sink.body), parser.keep_alive) == ("done", b"abcdef", False)


@given(st.binary(max_size=400))
def test_garbage_never_hangs_or_escapes_the_error_tree(data: bytes) -> None:
    parser = ResponseParser(StreamSink())
    try:
        parser.feed(data, 0)
        parser.feed_eof()
    except EndpointError:
        return
    assert parser.state == "done"


@pytest.mark.parametrize(
    "raw",
    [
        b"SSH-2.0-OpenSSH_9\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nab",
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * 70_000,
    ],
)
def test_what_is_not_http_is_told(raw: bytes) -> None:
    with pytest.raises(EndpointError):
        ResponseParser(BodySink()).feed(raw, 0)


def test_an_end_in_the_middle_is_told() -> None:
    parser = ResponseParser(StreamSink())
    parser.feed(RESPONSE[:-20], 0)
    with pytest.raises(EndpointError, match="in the middle"):
        parser.feed_eof()


def test_a_broken_event_is_an_error_of_the_answer() -> None:
    sink = StreamSink()
    sink.on_head(200, {}, 0)
    sink.on_body(b"data: {broken\n\n", 0)
    assert "not the JSON" in sink.error
    told = StreamSink()
    told.on_head(200, {}, 0)
    told.on_body(event({"error": {"message": "step failed"}}), 0)
    assert told.error == "step failed"


def test_error_bodies_in_the_shapes_that_servers_use() -> None:
    assert error_text(b'{"error": {"message": "m", "type": "t"}}') == "m"
    assert error_text(b'{"error": "plain"}') == "plain"
    assert error_text(b'{"detail": "fastapi"}') == "fastapi"
    assert error_text(b"<html>") == "<html>"


@pytest.mark.parametrize(
    ("url", "written", "loopback"),
    [
        ("http://127.0.0.1:8000/v1", "http://127.0.0.1:8000/v1", True),
        ("localhost:9000", "http://localhost:9000/v1", True),
        ("http://[::1]:1/v1/", "http://[::1]:1/v1", True),
        ("https://api.example.com/openai/v1", "https://api.example.com:443/openai/v1", False),
        ("http://10.0.0.7", "http://10.0.0.7:80/v1", False),
    ],
)
def test_addresses(url: str, written: str, loopback: bool) -> None:
    endpoint = parse_endpoint(url)
    assert (endpoint.url, endpoint.is_loopback()) == (written, loopback)


@pytest.mark.parametrize("url", ["ftp://x/v1", "http://:80", "http://x:99999/v1"])
def test_bad_addresses(url: str) -> None:
    with pytest.raises(ConfigError):
        parse_endpoint(url)


def test_a_key_cannot_smuggle_a_header() -> None:
    with pytest.raises(ConfigError, match="line break"):
        parse_endpoint("http://127.0.0.1:1", "key\r\nX-Evil: 1")
