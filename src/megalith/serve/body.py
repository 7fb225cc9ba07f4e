"""From the bytes of a request body to a checked struct: size, time, type, depth, known and unknown fields.

Knows OpenAI's fields that we do not serve and what to say about each; knows nothing of prompts or engines.
"""

from __future__ import annotations

import asyncio
import difflib
import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
from starlette.types import Receive, Scope

from megalith.base.units import NS_PER_S
from megalith.serve.config import ServerConfig
from megalith.serve.errors import ApiError, ClientGone

T = TypeVar("T", bound=msgspec.Struct)
logger = logging.getLogger("megalith.serve")
# A client that sends too much is read on for this long and this much, so that it sees the 413 instead of a reset.
_LINGER_S = 2.0
_LINGER_TIMES = 8


@dataclass(frozen=True, slots=True)
class Unserved:
    """A field of OpenAI's that we do not serve: the values that change nothing, and what to say to others."""

    harmless: Callable[[Any], bool]
    message: str


def _never(value: Any) -> bool:
    return value in ([], {}, False, "")


IGNORED = frozenset(
    {"metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "prompt_cache_options", "user"}
)
"""Fields of OpenAI's that never change an answer of ours."""
UNSERVED: dict[str, Unserved] = {
    "audio": Unserved(_never, "Audio output is not served; leave `audio` out."),
    "modalities": Unserved(lambda v: v == ["text"], 'Only text is served; use ["text"] or leave `modalities` out.'),
    "prediction": Unserved(_never, "Predicted outputs are not served; leave `prediction` out."),
    "service_tier": Unserved(lambda v: v in ("auto", "default"), "There is one tier; use `auto` or leave it out."),
    "store": Unserved(lambda v: v is False, "Answers are never stored; use false or leave `store` out."),
    "reasoning_effort": Unserved(lambda v: v == "none", "No served model has reasoning levels; leave it out."),
    "verbosity": Unserved(lambda v: v == "medium", "No served model has verbosity levels; leave it out."),
    "web_search_options": Unserved(_never, "Web search is not served; leave `web_search_options` out."),
    "moderation": Unserved(_never, "Moderation is not served; leave `moderation` out."),
    "functions": Unserved(_never, "`functions` is deprecated; send `tools`."),
    "function_call": Unserved(lambda v: v == "none", "`function_call` is deprecated; send `tool_choice`."),
    "suffix": Unserved(_never, "Insertion (`suffix`) is not served; leave it out."),
    "use_beam_search": Unserved(_never, "Beam search is not served; use `n`."),
}


async def read_body(scope: Scope, receive: Receive, config: ServerConfig) -> bytes:
    """The whole body. Raises ApiError 408, 413 or 415, or ClientGone. Counts what arrives, whatever was announced."""
    headers = {name: value for name, value in scope["headers"] if name.startswith(b"content-")}
    kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
    if kind != b"application/json":
        shown = kind.decode("latin-1") or "none"
        raise ApiError(415, f"The content type is {shown}. Send JSON with `content-type: application/json`.")
    coding = headers.get(b"content-encoding", b"identity").strip().lower()
    if coding not in (b"", b"identity"):
        raise ApiError(415, f"The content encoding {coding.decode('latin-1')} is not served. Send the body plain.")
    try:
        async with asyncio.timeout(config.body_timeout_ns / NS_PER_S):
            return await _collect(receive, config.max_body_bytes)
    except TimeoutError:
        raise ApiError(
            408,
            f"The body did not arrive within {config.body_timeout_ns / NS_PER_S:g} s.",
            code="request_timeout",
            headers=(("connection", "close"), ("x-should-retry", "false")),
        ) from None


async def _collect(receive: Receive, limit: int) -> bytes:
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        chunk = message.get("body", b"")
        size += len(chunk)
        if size > limit:
            if message.get("more_body", False):
                await _linger(receive, size, limit)
            raise ApiError(
                413,
                f"The body is larger than {limit} bytes. Send a shorter prompt, or raise server.max_body_bytes.",
                code="body_too_large",
                headers=(("connection", "close"),),
            )
        parts.append(chunk)
        if not message.get("more_body", False):
            return b"".join(parts)


async def _linger(receive: Receive, size: int, limit: int) -> None:
    deadline = time.monotonic() + _LINGER_S
    while size < limit * _LINGER_TIMES and (left := deadline - time.monotonic()) > 0:
        try:
            message = await asyncio.wait_for(receive(), left)
        except TimeoutError:
            return
        size += len(message.get("body", b""))
        if message["type"] == "http.disconnect" or not message.get("more_body", False):
            return


def parse_body(body: bytes, kind: type[T], config: ServerConfig) -> T:
    """The JSON in `body` as a `kind`. Raises ApiError 400 that names the field, and the nearest known one."""
    try:
        raw = msgspec.json.decode(body)
        _check_depth(raw, config.max_json_depth)
    except RecursionError:
        raise ApiError(400, f"The JSON is nested deeper than {config.max_json_depth} levels.") from None
    except (msgspec.DecodeError, UnicodeError) as error:
        raise ApiError(400, f"The body is not valid JSON: {error}.", code="invalid_json") from None
    if not isinstance(raw, dict):
        raise ApiError(400, f"The body must be a JSON object, not {type(raw).__name__}.", code="invalid_json")
    known = frozenset(kind.__struct_encode_fields__)
    fields = {key: value for key, value in raw.items() if value is not None and _keep(key, value, known, config)}
    try:
        return msgspec.convert(fields, kind)
    except msgspec.ValidationError as error:
        match = re.search(r"`\$\.?([^`]*)`$", str(error))
        raise ApiError(
            400, f"{error}.", param=match.group(1) or None if match else None, code="invalid_value"
        ) from None


def _check_depth(raw: Any, limit: int) -> None:
    level = [raw] if isinstance(raw, dict | list) else []
    for _ in range(limit):
        below: list[Any] = []
        for item in level:
            inside = item.values() if type(item) is dict else item
            below += [part for part in inside if type(part) is dict or type(part) is list]
        if not below:
            return
        level = below
    raise RecursionError


def _keep(key: str, value: Any, known: frozenset[str], config: ServerConfig) -> bool:
    if key in known:
        return True
    if key in IGNORED:
        return False
    unserved = UNSERVED.get(key)
    if unserved is not None:
        if unserved.harmless(value):
            return False
        raise ApiError(400, unserved.message, param=key, code="unsupported_parameter")
    if config.lenient:
        logger.warning("dropped the unknown request field %s", ascii(key[:64]))
        return False
    near = difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.0)[0]
    raise ApiError(
        400,
        f"Unknown field `{key[:64]}`. Did you mean `{near}`? (A server started with --lenient drops unknown fields.)",
        param=key[:64],
        code="unknown_parameter",
    )
