"""Workloads as one word of a command line: `azure-conv:rate=10`, `hour.csv.gz:speedup=2`, `poisson:rate=5,input=...`.

    SOURCE[:KEY=VALUE,...]    SOURCE is a built-in name, the path of a trace or of a .toml file with a WorkloadSpec, or
                              an arrival process: poisson, gamma, onoff, fixed, closed

Knows the text form only; what the values mean is in `workload.py` and below.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import msgspec

from megalith.base.config import convert
from megalith.base.errors import ConfigError
from megalith.base.units import NS_PER_S, parse_duration_ns
from megalith.specs.arrivals import ClosedLoop, arrivals_at
from megalith.specs.lengths import parse_lengths
from megalith.specs.trace import KNOWN, TraceColumns
from megalith.specs.workload import WorkloadSpec
from megalith.specs.workload_catalog import find_workload, workload

Options: TypeAlias = dict[str, str]

_KINDS = ("poisson", "gamma", "onoff", "fixed", "closed")
_ARRIVAL_KEYS = {
    "rate": "rate_per_s", "cv": "cv", "on": "on_s", "off": "off_s", "clients": "clients", "think": "think_s",
}  # fmt: skip
_LIMIT_KEYS = {
    "speedup": "speedup", "requests": "requests", "duration": "duration_s", "max_total": "max_total_tokens",
    "max_input": "max_input_tokens", "max_output": "max_output_tokens", "priority": "priority_share",
    "max_new": "max_new", "prefix_block": "prefix_block_tokens",
}  # fmt: skip
_TRACE_KEYS = {"resample": "resample", "start": "start_s", "end": "end_s", "format": "format"}
_COLUMN_KEYS = {
    "at": "arrival", "unit": "unit", "input": "input", "output": "output", "hashes": "hashes", "level": "priority",
    "hash_kind": "hash_kind",
}  # fmt: skip
_TALK_KEYS = {
    "continue": "continue_share", "turn": "turn", "pause": "pause_s", "idle": "idle_s", "shared": "shared_tokens",
}  # fmt: skip

_EXPERT_KEYS = {"experts": "count", "zipf": "zipf"}

_CHOICES = {
    "resample": ("none", "joint", "independent"), "format": ("csv", "jsonl"), "hash_kind": ("prefix", "content"),
    "unit": ("s", "ms", "us", "ns", "iso"),
}  # fmt: skip


def parse_workload(text: str) -> WorkloadSpec:
    """The workload that `text` names; its `name` is the text. Raises ConfigError with the nearest thing that works."""
    match = re.fullmatch(r"(.+?)(?::([A-Za-z_]+=.*))?", text.strip(), re.DOTALL)
    if match is None:
        raise ConfigError(
            f"{text!r} names no workload.", "Write azure-conv, a trace's path, or poisson:rate=5,input=..."
        )
    source, options = match[1], _options(match[2] or "", text)
    if source in _KINDS:
        fields = _synthetic(source, options)
    elif (built_in := find_workload(source)) is not None and not _is_file(_path(source)):
        fields = _changed(built_in, options)
    elif source.endswith(".toml"):
        fields = _changed(_from_file(_path(source)), options)
    else:
        fields = _recorded(source, options)
    if "experts" in options or (fields.get("experts") and "zipf" in options):
        fields["experts"] = {**(fields.get("experts") or {}), **_taken(options, _EXPERT_KEYS)}
    if options:
        known = ", ".join(sorted(options))
        raise ConfigError(f"{text!r} has {known}, which do not apply to {source}.", "Leave them out.")
    return convert({**fields, "name": text.strip()}, WorkloadSpec, text)


def _options(text: str, whole: str) -> Options:
    """{key: value}; every key is known, none is there twice."""
    keys = {*_ARRIVAL_KEYS, *_LIMIT_KEYS, *_TRACE_KEYS, *_COLUMN_KEYS, *_TALK_KEYS, *_EXPERT_KEYS, "arrivals"}
    result: Options = {}
    for part in filter(None, text.split(",")):
        key, equals, value = part.partition("=")
        key = key.strip()
        if not equals or not value:
            raise ConfigError(f"{part!r} in {whole!r} is not KEY=VALUE.", "Write it like rate=5.")
        if key not in keys:
            near = difflib.get_close_matches(key, sorted(keys), n=1, cutoff=0.0)
            hint = f"Did you mean {near[0]}? All: {', '.join(sorted(keys))}."
            raise ConfigError(f"{key!r} in {whole!r} is not known.", hint)
        if key in result:
            raise ConfigError(f"{key!r} is twice in {whole!r}.", "Give it once.")
        result[key] = value.strip()
    return result


def _synthetic(kind: str, options: Options) -> dict[str, Any]:
    for key in ("input", "output"):
        if key not in options:
            what = f"A {kind} workload needs {key} lengths."
            raise ConfigError(what, f"Add {key}=128, {key}=64-256 or {key}=lognormal:700:1.0.")
    lengths = {key: parse_lengths(options.pop(key)) for key in ("input", "output")}
    arrivals = _arrivals(kind, options)
    talk = _taken(options, _TALK_KEYS)
    fields = {**lengths, "arrivals": arrivals, **({"conversations": talk} if talk else {})}
    return msgspec.to_builtins({**fields, **_taken(options, _LIMIT_KEYS)})  # type: ignore[no-any-return]


def _arrivals(kind: str, options: Options) -> dict[str, Any]:
    if kind not in _KINDS:
        near = difflib.get_close_matches(kind, _KINDS, n=1, cutoff=0.0)
        raise ConfigError(f"Arrivals {kind!r} are not known.", f"Did you mean {near[0]}? Known: {', '.join(_KINDS)}.")
    needed = {"gamma": ("rate", "cv"), "onoff": ("rate", "on", "off"), "closed": ("clients",)}.get(kind, ("rate",))
    missing = [key for key in needed if key not in options]
    if missing:
        what = f"Arrivals of kind {kind} need {' and '.join(missing)}."
        raise ConfigError(what, f"Write {','.join(f'{key}=NUMBER' for key in needed)}.")
    used = {key: _ARRIVAL_KEYS[key] for key in (*needed, "think") if key != "think" or kind == "closed"}
    return {"kind": kind, **_taken(options, used)}


def _changed(spec: WorkloadSpec, options: Options) -> dict[str, Any]:
    """A spec with some of its values replaced."""
    fields: dict[str, Any] = msgspec.to_builtins(spec)
    for key in ("input", "output"):
        if key in options and spec.trace is None:
            fields[key] = msgspec.to_builtins(parse_lengths(options.pop(key)))
    if "arrivals" in options:
        fields["arrivals"] = _arrivals(options.pop("arrivals"), options)
        if fields["arrivals"]["kind"] == "closed":
            fields["conversations"] = None
    elif spec.arrivals is not None:
        if "rate" in options and not isinstance(spec.arrivals, ClosedLoop):
            fields["arrivals"] = msgspec.to_builtins(arrivals_at(spec.arrivals, _value("rate", options.pop("rate"))))
        known = {key: name for key, name in _ARRIVAL_KEYS.items() if name in fields["arrivals"]}
        fields["arrivals"] |= _taken(options, known)
    for key, names in (("conversations", _TALK_KEYS), ("trace", _TRACE_KEYS)):
        if fields[key] is not None:
            fields[key] |= _taken(options, names)
    limits = _taken(options, _LIMIT_KEYS)
    if "duration_s" in limits and "requests" not in limits and spec.trace is None:
        fields["requests"] = None  # the time that is asked for decides, not the built-in count
    return fields | limits


def _path(text: str) -> Path:
    return Path(os.path.expanduser(text))


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # longer than a name may be, or with a zero byte
        return False


def _from_file(path: Path) -> WorkloadSpec:
    """A spec in TOML; the path of its trace is taken from where the file lies."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"The workload {path} cannot be read ({error}).", "Give a TOML file.") from None
    spec = convert(data, WorkloadSpec, str(path))
    if spec.trace is None:
        return spec
    beside = msgspec.structs.replace(spec.trace, path=str(path.parent / _path(spec.trace.path)))
    return msgspec.structs.replace(spec, trace=beside)


def _recorded(source: str, options: Options) -> dict[str, Any]:
    path = _path(source)
    if not _is_file(path):
        _refuse_path(source, path)
    columns = _taken(options, _COLUMN_KEYS)
    fields: dict[str, Any] = {"trace": {"path": str(path), **_taken(options, _TRACE_KEYS)}}
    if columns:
        fields["trace"]["columns"] = _columns(columns, source)
    if "arrivals" in options:
        fields["arrivals"] = _arrivals(options.pop("arrivals"), options)
    elif "rate" in options:
        hint = "Add arrivals=poisson to draw the times, or use speedup to keep their pattern."
        raise ConfigError(f"A recorded trace has its own times, so rate={options['rate']} says nothing.", hint)
    return fields | _taken(options, _LIMIT_KEYS)


def _columns(columns: dict[str, Any], source: str) -> dict[str, Any]:
    if columns.get("arrival") in ("none", "None"):
        columns["arrival"] = None
    missing = [key for key in ("at", "input", "output") if _COLUMN_KEYS[key] not in columns]
    if missing:
        what = f"The columns of {source} are not all named: {', '.join(missing)} missing."
        known = KNOWN["megalith"]
        hint = f"Name at (or at=none), input and output, such as at={known.arrival},input={known.input}."
        raise ConfigError(what, hint)
    return msgspec.to_builtins(convert(columns, TraceColumns, source))  # type: ignore[no-any-return]


def _refuse_path(source: str, path: Path) -> None:
    """A name that is no file: which of the built-in names, or of the files beside it, was meant?"""
    if not re.search(r"[/\\]|\.(csv|tsv|jsonl)", source):
        workload(source)
    folder = path.parent
    beside = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    near = difflib.get_close_matches(path.name, beside, n=1, cutoff=0.4)
    hint = "Give a .csv or .jsonl file, gzipped or not, or the name of a built-in workload."
    raise ConfigError(f"There is no trace at {source}.", f"Did you mean {folder / near[0]}?" if near else hint)


def _taken(options: Options, names: Mapping[str, str]) -> dict[str, Any]:
    """{field: value} of the options that are among `names`, which are taken out."""
    return {name: _value(key, options.pop(key)) for key, name in names.items() if key in options}


def _value(key: str, text: str) -> Any:
    readers: dict[str, Callable[[str], Any]] = {
        **dict.fromkeys(("requests", "clients", "max_total", "max_input", "max_output", "prefix_block", "shared"), int),
        "experts": int,
        **dict.fromkeys(("rate", "cv", "speedup", "priority", "continue", "zipf"), float),
        **dict.fromkeys(("on", "off", "think", "duration", "start", "end", "pause", "idle"), _seconds),
        "max_new": lambda value: value if value in ("context", "true") else int(value),
        "turn": lambda value: msgspec.to_builtins(parse_lengths(value)),
    }
    if key in _CHOICES and text not in _CHOICES[key]:
        near = difflib.get_close_matches(text, _CHOICES[key], n=1, cutoff=0.0)
        raise ConfigError(f"{key}={text} is not known.", f"Did you mean {near[0]}? Known: {', '.join(_CHOICES[key])}.")
    reader = readers.get(key)
    if reader is None:
        return text
    try:
        return reader(text)
    except ValueError:
        kind = "a whole number" if reader is int else "a number" if reader is float else "context, true or a number"
        raise ConfigError(f"{key}={text} is not {kind}.", f"Write it like {key}=10.") from None


def _seconds(text: str) -> float:
    return parse_duration_ns(text) / NS_PER_S
