"""Measured kernel tables of one model on one device, as they lie in a directory.

The layout is that of LLMServingSim's profiler (casys-kaist/LLMServingSim, MIT), one directory for a device and a model:

    tp<N>_dense.csv          layer,tokens,time_us                          one call of one layer
    tp<N>_per_sequence.csv   layer,sequences,time_us                       what runs once for each sequence that samples
    tp<N>_attention.csv      prefill_chunk,kv_prefill,n_decode,kv_decode,time_us    attention of one layer
    tp<N>_skew_fit.csv       pc,n_label,skew_rate_label,kv_big_label,kp_label,alpha,n_samples    may be missing
    tp1_moe.csv              tokens,activated_experts,time_us              experts of one layer, of one rank
    meta.yaml                what was measured and how; may be missing

Each table may be gzipped (`.csv.gz`) and may lie in `tp<N>/` instead of carrying it in its name. Times become integer
picoseconds. Knows files only; what a step is made of stands in kernel_table.py.
"""

from __future__ import annotations

import csv
import gzip
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeAlias, TypeVar

from megalith.base.errors import ConfigError

T = TypeVar("T")
K = TypeVar("K", int, str)

PS_PER_US = 1_000_000

Curve: TypeAlias = tuple[list[int], list[int]]
"""Sizes in rising order and the time of each, in picoseconds."""
Plane: TypeAlias = dict[int, Curve]
"""KV of the prompt -> curve over the KV of each decode."""


class SkewPoint(NamedTuple):
    """Where one bucket of the skew fit was measured: the upper end of each of its axes."""

    chunk: int
    decodes: int
    skew_percent: int
    longest: int
    chunk_context: int


class KernelProfile(NamedTuple):
    """All tables of one directory at one degree of tensor parallelism. Times in picoseconds."""

    dense: dict[str, Curve]
    sequences: dict[str, Curve]
    attention: dict[tuple[int, int], Plane]
    """(prompt chunk, decodes) -> plane."""
    experts: Plane
    """Activated experts -> curve over tokens; empty without experts."""
    skew: dict[SkewPoint, float]
    """Empty when none was measured, or when the makers of the tables switched it off (`skew_fit: enabled: false`)."""
    skew_default: float
    """For buckets without samples."""


_UNBOUNDED = 1 << 40
_UNITS = {"": 1, "k": 1024, "%": 1}


def read_profile(directory: Path, tensor_parallel: int = 1) -> KernelProfile:
    """The tables of `directory` for this degree. Raises ConfigError for what is missing or not a number."""
    degree = f"tp{tensor_parallel}"
    attention: dict[tuple[int, int], Plane] = {}
    axes = ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode", "time_us")
    for (chunk, context, decodes, size), time in _rows(directory, degree, "attention", axes, _timed):
        _put(attention.setdefault((chunk, decodes), {}), context, size, time)
    experts: Plane = {}
    if _find(directory, "tp1", "moe") is not None:
        columns = ("tokens", "activated_experts", "time_us")
        for (tokens, awake), time in _rows(directory, "tp1", "moe", columns, _timed):
            _put(experts, awake, tokens, time)
    for plane in (*attention.values(), experts):
        _sort(plane)
    meta = _read_meta(directory / "meta.yaml")
    return KernelProfile(
        _curves(directory, degree, "dense", "tokens"),
        _curves(directory, degree, "per_sequence", "sequences"),
        attention,
        experts,
        _read_skew(directory, degree) if meta.get("skew_fit.enabled", "true") == "true" else {},
        float(meta.get(f"skew_fit.per_tp.{tensor_parallel}.alpha_default", "0")),
    )


def _find(directory: Path, degree: str, table: str) -> Path | None:
    names = (f"{degree}_{table}.csv", f"{degree}/{table}.csv")
    paths = [directory / (name + ending) for name in names for ending in ("", ".gz")]
    return next((path for path in paths if path.is_file()), None)


def _rows(
    directory: Path, degree: str, table: str, columns: tuple[str, ...], read: Callable[[list[str]], T]
) -> Iterator[T]:
    """Each row of a table as `read` makes it of the cells of these columns."""
    path = _find(directory, degree, table)
    if path is None:
        found = sorted({match[1] for p in directory.glob("tp*") if (match := re.match(r"tp(\d+)", p.name))})
        have = f"It has tables for tensor parallelism {', '.join(found)}." if found else "It has no tables at all."
        raise ConfigError(
            f"{directory} has no table {degree}_{table}.csv (nor .csv.gz, nor {degree}/{table}.csv). {have}",
            "Point to a directory of LLMServingSim's profiler, and ask for a degree that it has.",
        )
    with gzip.open(path, "rt", newline="") if path.suffix == ".gz" else path.open(newline="") as lines:
        reader = csv.reader(lines)
        head = next(reader, [])
        lacking = [column for column in columns if column not in head]
        if lacking:
            raise ConfigError(f"{path} has no column {lacking[0]!r}; it has {', '.join(head)}.")
        places = [head.index(column) for column in columns]
        try:
            for row in reader:
                yield read([row[place] for place in places])
        except (ValueError, OverflowError, IndexError) as error:
            raise ConfigError(f"{path}, line {reader.line_num}: {error}.", "Mend or remove that line.") from None


def _timed(cells: list[str]) -> tuple[list[int], int]:
    """Whole numbers and, last, a time."""
    return [int(cell) for cell in cells[:-1]], _ps(cells[-1])


def _ps(microseconds: str) -> int:
    time = round(float(microseconds) * PS_PER_US)
    if time < 0:
        raise ValueError(f"{microseconds} is not a time")
    return time


def _put(plane: dict[K, Curve], key: K, size: int, time: int) -> None:
    sizes, times = plane.setdefault(key, ([], []))
    sizes.append(size)
    times.append(time)


def _sort(plane: dict[K, Curve]) -> None:
    for key, curve in plane.items():
        pairs = sorted(zip(*curve, strict=True))
        plane[key] = [size for size, _ in pairs], [time for _, time in pairs]


def _curves(directory: Path, degree: str, table: str, size: str) -> dict[str, Curve]:
    curves: dict[str, Curve] = {}
    rows = _rows(directory, degree, table, ("layer", size, "time_us"), lambda cells: (cells[0], *_timed(cells[1:])))
    for layer, (count,), time in rows:
        _put(curves, layer, count, time)
    _sort(curves)
    return curves


def _read_skew(directory: Path, degree: str) -> dict[SkewPoint, float]:
    if _find(directory, degree, "skew_fit") is None:
        return {}
    columns = ("pc", "n_label", "skew_rate_label", "kv_big_label", "kp_label", "alpha")
    return dict(_rows(directory, degree, "skew_fit", columns, _skew_row))


def _skew_row(cells: list[str]) -> tuple[SkewPoint, float]:
    chunk, decodes, rate, longest, context, alpha = cells
    ends = (_upper_end(decodes), min(100, _upper_end(rate)), _upper_end(longest), _upper_end(context))
    return SkewPoint(int(chunk), *ends), float(alpha)


def _upper_end(label: str) -> int:
    """`n<=64` is 64, `kvB<=4k` 4,096, `kp=0` 0; `n>256` has none and is taken as very large."""
    match = re.fullmatch(r"\w+(<=|=|>)(\d+)([k%]?)", label)
    if match is None:
        raise ValueError(f"{label!r} is no label of a bucket")
    return _UNBOUNDED if match[1] == ">" else int(match[2]) * _UNITS[match[3]]


def _read_meta(path: Path) -> dict[str, str]:
    """The scalars of a YAML file of nested maps, by dotted path; lists and what else YAML has are passed over."""
    found: dict[str, str] = {}
    if not path.is_file():
        return found
    open_keys: list[tuple[int, str]] = []
    for line in path.read_text().splitlines():
        match = re.match(r"( *)([\w.]+): *(.*)$", line)
        if match is None:
            continue
        indent = len(match[1])
        while open_keys and open_keys[-1][0] >= indent:
            open_keys.pop()
        open_keys.append((indent, match[2]))
        if match[3]:
            found[".".join(key for _, key in open_keys)] = match[3].strip()
    return found
