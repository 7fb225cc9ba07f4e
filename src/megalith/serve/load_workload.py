"""What the load generator will send: when each request is due, how long its prompt and its answer are, and its text.

Everything is decided by (seed, request number), so the same flags give the same load whatever the server does. Knows
the formats of recorded traces; knows nothing of HTTP.
"""

from __future__ import annotations

import csv
import gzip
import io
import math
import random
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from itertools import chain
from pathlib import Path
from statistics import NormalDist
from typing import Any, Literal

import msgspec

from megalith.base.errors import ConfigError
from megalith.base.random import splitmix64, uniform
from megalith.base.units import NS_PER_S

PromptKind = Literal["ids", "text"]

# Mooncake's traces name the prefix of a prompt by one id for each 512 tokens.
_MOONCAKE_BLOCK_TOKENS = 512
_STREAM_INPUT, _STREAM_OUTPUT, _STREAM_ARRIVAL, _STREAM_PROMPT, _STREAM_PREFIX = range(1, 6)

# Short frequent English words: one token each, with the space before it, in the usual vocabularies.
_TEXT = (
    "the of and to in is you that it he was for on are as with his they at be this have from or one had by word but "
    "not what all were we when your can said there use an each which she do how their if will up other about out many "
    "then them these so some her would make like him into time has look two more write go see number no way could "
    "people my than first water been call who oil its now find long down day did get come made may part over new "
    "sound take only little work know place year live me back give most very after thing our just name good sentence "
    "man think say great where help through much before line right too mean old any same tell boy follow came want "
    "show also around form three small set put end does another well large must big even such because turn here why "
    "ask went men read need land different home us move try kind hand picture again change off play spell air away "
    "animal house point page letter mother answer found study still learn should world high every near add food"
)
_WORDS = tuple(_TEXT.split())


@dataclass(frozen=True, slots=True)
class RequestShape:
    """One request before it has a text. `at_ns` counts from the start of the run; None: as soon as a place is free."""

    index: int
    at_ns: int | None
    input_tokens: int
    output_tokens: int
    prefix_ids: tuple[int, ...] = ()
    """Equal id, equal block of `_MOONCAKE_BLOCK_TOKENS` prompt tokens, counted from the start of the prompt."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """A distribution over token counts: `fixed`, `uniform` (low..high), `normal` (mean, deviation), `lognormal`
    (median, sigma)."""

    kind: Literal["fixed", "uniform", "normal", "lognormal"]
    first: float
    second: float = 0.0

    def draw(self, seed: int, index: int) -> int:
        """The `index`-th length, at least 1."""
        share = min(max(uniform(seed, index), 2.0**-25), 1 - 2.0**-25)
        match self.kind:
            case "fixed":
                value = self.first
            case "uniform":
                value = math.floor(self.first + share * (self.second - self.first + 1))
            case "normal":
                value = NormalDist(self.first, self.second).inv_cdf(share) if self.second else self.first
            case "lognormal":
                value = self.first * math.exp(self.second * NormalDist().inv_cdf(share))
        return max(1, round(value))


def parse_lengths(text: str) -> Lengths:
    """`128`, `64-256`, `normal:128:32` or `lognormal:128:0.5`. Raises ConfigError."""
    number = r"(\d+(?:\.\d+)?)"
    if match := re.fullmatch(r"(\d+)", text):
        lengths = Lengths("fixed", float(match[1]))
    elif match := re.fullmatch(r"(\d+)-(\d+)", text):
        lengths = Lengths("uniform", float(match[1]), float(match[2]))
    elif match := re.fullmatch(rf"(normal|lognormal):{number}:{number}", text):
        kind: Literal["normal", "lognormal"] = "normal" if match[1] == "normal" else "lognormal"
        lengths = Lengths(kind, float(match[2]), float(match[3]))
    else:
        hint = "Write 128, 64-256, normal:128:32 (mean, deviation) or lognormal:128:0.5 (median, sigma)."
        raise ConfigError(f"{text!r} is not a distribution of token counts.", hint)
    if lengths.first < 1 or (lengths.kind == "uniform" and lengths.second < lengths.first):
        raise ConfigError(f"{text!r} gives lengths below 1 or runs backwards.", "Write the smaller number first.")
    return lengths


def synthetic(
    lengths: tuple[Lengths, Lengths], rate: float | None, arrivals: Literal["poisson", "fixed"], seed: int
) -> Iterator[RequestShape]:
    """Endless requests with (input, output) `lengths`; `rate` requests a second, or None for no due times.

    Poisson: exponential gaps, the first request after one gap. Fixed: the first at zero, then every 1/rate.
    """
    at_s = 0.0
    index = 0
    while True:
        due_ns = None
        if rate is not None:
            if arrivals == "poisson":
                at_s += -math.log1p(-uniform(_stream(seed, _STREAM_ARRIVAL), index)) / rate
            due_ns = round((at_s if arrivals == "poisson" else index / rate) * NS_PER_S)
        input_tokens = lengths[0].draw(_stream(seed, _STREAM_INPUT), index)
        output_tokens = lengths[1].draw(_stream(seed, _STREAM_OUTPUT), index)
        yield RequestShape(index, due_ns, input_tokens, output_tokens)
        index += 1


def read_trace(path: Path, speedup: float = 1.0) -> Iterator[RequestShape]:
    """Requests of a recorded trace, due as recorded (the first at zero), `speedup` times faster.

    Reads Azure's CSV (`TIMESTAMP, ContextTokens, GeneratedTokens`), Mooncake's JSON lines (`timestamp` in ms,
    `input_length, output_length, hash_ids`), and CSV or JSON lines with the columns `at_s` (or `timestamp_ms`),
    `input_tokens, output_tokens`; each may be gzipped. Raises ConfigError, naming the line, on anything else.
    """
    if not speedup > 0:
        raise ConfigError(f"--speedup {speedup:g} stops time.", "Give a number above 0; 2 is twice as fast.")
    if not path.is_file():
        raise ConfigError(f"There is no trace at {path}.", "Give a .csv or .jsonl file, gzipped or not.")
    try:
        yield from _read_rows(path, speedup)
    except (OSError, EOFError, UnicodeDecodeError, csv.Error, zlib.error) as error:
        raise ConfigError(f"The trace {path} cannot be read ({error}).", "Give UTF-8 text, gzipped or not.") from None


def _read_rows(path: Path, speedup: float) -> Iterator[RequestShape]:
    start_s: float | None = None
    with _open_text(path) as lines:
        name = path.name.removesuffix(".gz")
        rows = csv.DictReader(lines) if name.endswith(".csv") else _json_rows(lines, path)
        for index, row in enumerate(rows):
            try:
                at_s, input_tokens, output_tokens = _row_facts(row)
                hashes = tuple(int(h) for h in row.get("hash_ids") or ())
            except (KeyError, TypeError, ValueError) as error:
                hint = "Columns: TIMESTAMP,ContextTokens,GeneratedTokens or at_s,input_tokens,output_tokens."
                raise ConfigError(f"Request {index + 1} of {path} cannot be read ({error!r}).", hint) from None
            start_s = at_s if start_s is None else start_s
            due_ns = max(0, round((at_s - start_s) / speedup * NS_PER_S))
            if input_tokens < 0 or output_tokens < 0:
                raise ConfigError(f"Request {index + 1} of {path} has {input_tokens} and {output_tokens} tokens.")
            yield RequestShape(index, due_ns, max(1, input_tokens), max(1, output_tokens), hashes)


def _open_text(path: Path) -> io.TextIOWrapper:
    if path.name.endswith(".gz"):
        return io.TextIOWrapper(gzip.open(path, "rb"), encoding="utf-8")
    return path.open(encoding="utf-8")


def _json_rows(lines: Iterable[str], path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = msgspec.json.decode(line, type=dict[str, Any])
        except msgspec.DecodeError as error:
            raise ConfigError(f"Line {number} of {path} is not a JSON object ({error}).") from None
        yield row


def _row_facts(row: dict[str, Any]) -> tuple[float, int, int]:
    """(seconds, input tokens, output tokens) of one row of any of the formats."""
    if "TIMESTAMP" in row:
        return _azure_seconds(row["TIMESTAMP"]), int(row["ContextTokens"]), int(row["GeneratedTokens"])
    if "input_length" in row:
        return float(row["timestamp"]) / 1000, int(row["input_length"]), int(row["output_length"])
    at_s = float(row["at_s"]) if "at_s" in row else float(row["timestamp_ms"]) / 1000
    return at_s, int(row["input_tokens"]), int(row["output_tokens"])


def _azure_seconds(text: str) -> float:
    """Seconds since the epoch's day one; Azure writes seven digits of fraction, one more than `datetime` reads."""
    whole, _, fraction = text.partition(".")
    seconds = (datetime.fromisoformat(whole).replace(tzinfo=None) - datetime(2000, 1, 1)).total_seconds()
    return seconds + (float(f"0.{fraction}") if fraction else 0.0)


def capped(shapes: Iterable[RequestShape], max_input: int | None, max_output: int | None) -> Iterator[RequestShape]:
    """The same requests with prompts and answers cut to what the endpoint's context can take."""
    for shape in shapes:
        yield RequestShape(
            shape.index,
            shape.at_ns,
            min(shape.input_tokens, max_input or shape.input_tokens),
            min(shape.output_tokens, max_output or shape.output_tokens),
            shape.prefix_ids,
        )


@dataclass(frozen=True, slots=True)
class PromptMaker:
    """Prompts of given lengths. `ids`: token ids drawn from `id_range`, exact in length. `text`: frequent English
    words, about one token each; the server's usage says how many they were.

    The first `shared_tokens` of every prompt are the same, which a prefix cache can use; nothing else repeats, except
    where a trace says so.
    """

    kind: PromptKind = "ids"
    seed: int = 0
    id_range: tuple[int, int] = (1000, 32_000)
    shared_tokens: int = 0

    def prompt(self, shape: RequestShape) -> str | list[int]:
        """The prompt of one request."""
        shared = min(self.shared_tokens, shape.input_tokens)
        runs = [self._run(_stream(self.seed, _STREAM_PREFIX), 0, shared)]
        left = shape.input_tokens - shared
        for block in shape.prefix_ids:
            taken = min(left, _MOONCAKE_BLOCK_TOKENS)
            runs.append(self._run(_stream(self.seed, _STREAM_PREFIX), block + 1, taken))
            left -= taken
        runs.append(self._run(_stream(self.seed, _STREAM_PROMPT), shape.index, left))
        if self.kind == "text":
            return " ".join(_WORDS[i % len(_WORDS)] for i in chain.from_iterable(runs))
        return list(chain.from_iterable(runs))

    def _run(self, stream: int, index: int, count: int) -> list[int]:
        """`count` ids. The standard generator, seeded by our own: 20 times faster than a hash an id."""
        if count <= 0:
            return []
        return random.Random(splitmix64(stream, index)).choices(range(*self.id_range), k=count)


def _stream(seed: int, purpose: int) -> int:
    return splitmix64(seed, purpose)
