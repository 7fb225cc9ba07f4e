"""The folder of a sweep: what was asked for, and the results so far.

Knows points and a few words that describe them; must not know which flags these words came from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import blake2b
from pathlib import Path

import msgspec

from megalith import __version__
from megalith.base.config import Config, convert
from megalith.base.errors import ConfigError, MachineError
from megalith.base.whole_file import write_whole
from megalith.sim.sweep import Point, Store

DEFINITION, RESULTS = "sweep.json", "results.jsonl"


class Definition(Config, kw_only=True):
    """What a sweep is: two with the same definition have the same results."""

    version: str
    """Of Megalith: another one may simulate otherwise."""
    words: dict[str, str]
    """What was asked for, as a person wrote it."""
    load: str
    """Digest of the trace; empty where requests are drawn."""
    points: str
    """Digest of all scenarios."""


def define(words: Mapping[str, str], points: Sequence[Point]) -> Definition:
    """The definition of these points. Raises MachineError for a trace that cannot be read."""
    digest = blake2b(digest_size=12)
    for key in sorted(point.key for point in points):
        digest.update(key.encode())
    traces = {point.scenario.workload.trace.path for point in points if point.scenario.workload.trace is not None}
    load = ",".join(_file_digest(Path(path)) for path in sorted(traces))
    return Definition(version=__version__, words=dict(words), load=load, points=digest.hexdigest())


def open_folder(folder: Path, definition: Definition, *, restart: bool = False) -> Store:
    """The results so far of this very sweep; `restart` throws away what is there.

    Raises ConfigError when another sweep lies in the folder, with what differs, and MachineError when it cannot be
    written.
    """
    path, results = folder / DEFINITION, folder / RESULTS
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if restart:
            results.unlink(missing_ok=True)
            path.unlink(missing_ok=True)
        stored = path.read_bytes() if path.exists() else None
    except OSError as error:
        raise MachineError(f"{folder} cannot be used ({error.strerror}).", "Name another folder.") from None
    if stored is None:
        if results.exists():
            raise ConfigError(f"{results} is there and {DEFINITION} is not.", "Name another --out, or --restart.")
        _write(path, definition)
    else:
        _check(folder, stored, definition)
    return Store(results)


def _check(folder: Path, stored: bytes, asked: Definition) -> None:
    hint = "Name another --out, or --restart to throw away what is there."
    try:
        kept = convert(msgspec.json.decode(stored), Definition, str(folder / DEFINITION))
    except msgspec.DecodeError:
        raise ConfigError(f"{folder / DEFINITION} is damaged.", hint) from None
    if kept == asked:
        return
    differs = [
        f"{name} was {kept.words.get(name) or 'not given'} and is {asked.words.get(name) or 'not given'}"
        for name in dict.fromkeys([*kept.words, *asked.words])
        if kept.words.get(name) != asked.words.get(name)
    ]
    if kept.version != asked.version:
        differs.append(f"Megalith was {kept.version} and is {asked.version}")
    if kept.load != asked.load:
        differs.append("the trace has other contents")
    if not differs:
        differs.append("a file that it names (a fleet, a workload or a scenario) has changed")
    raise ConfigError(f"{folder} holds another sweep: {'; '.join(differs)}.", hint)


def _write(path: Path, definition: Definition) -> None:
    """Whole or not at all."""
    try:
        write_whole(path, msgspec.json.format(msgspec.json.encode(definition), indent=2) + b"\n")
    except OSError as error:
        raise MachineError(f"{path} cannot be written ({error.strerror}).", "Name another folder.") from None


def _file_digest(path: Path) -> str:
    digest = blake2b(digest_size=12)
    try:
        with path.open("rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
    except OSError as error:
        raise MachineError(f"The trace {path} cannot be read ({error.strerror}).", "Name one that is there.") from None
    return digest.hexdigest()
