"""Named arrays in one file, with what they are and a checksum: how a forecaster and its training are kept.

A zip of NumPy arrays without pickled objects. Written beside and then renamed, so that a file is whole or not there.
Knows bytes; must not know networks.
"""

from __future__ import annotations

import os
import zipfile
from hashlib import blake2b
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from megalith.base.errors import MachineError, ModelFormatError, ModelNotFound
from megalith.specs.load_series import Values

_FORMAT = "megalith-forecast-1"


def write_arrays(path: Path, kind: str, meta: dict[str, Any], arrays: dict[str, Values]) -> None:
    """Raises MachineError when the file cannot be written."""
    head = {"format": _FORMAT, "kind": kind, "meta": meta, "checksum": _checksum(arrays)}
    text = np.frombuffer(msgspec.json.encode(head), dtype=np.uint8)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("wb") as file:
            np.savez(file, **{"head": text, **arrays})  # type: ignore[arg-type]
        beside.replace(path)
    except OSError as error:
        raise MachineError(f"{path} cannot be written ({error.strerror}).", "Name another file.") from None


def read_arrays(path: Path, kind: str) -> tuple[dict[str, Any], dict[str, Values]]:
    """(what they are, arrays). Raises ModelNotFound, or ModelFormatError for a damaged file or another kind."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
            head = msgspec.json.decode(arrays.pop("head").tobytes())
    except FileNotFoundError:
        raise ModelNotFound(f"There is no forecaster at {path}.", "Train one: megalith forecast LOAD.csv.") from None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, msgspec.DecodeError) as error:
        raise ModelFormatError(f"{path} is no forecaster, or damaged ({error}).", "Train it anew.") from None
    if head.get("format") != _FORMAT or head.get("kind") != kind:
        what = f"{path} holds {head.get('format')} {head.get('kind')}, not {_FORMAT} {kind}."
        raise ModelFormatError(what, "Name the file that `megalith forecast` wrote.")
    if head["checksum"] != _checksum(arrays):
        raise ModelFormatError(f"{path} is damaged: its checksum does not match.", "Train it anew.")
    return head["meta"], arrays


def _checksum(arrays: dict[str, Values]) -> str:
    digest = blake2b(digest_size=16)
    for name in sorted(arrays):
        value = arrays[name]
        digest.update(f"{name} {value.dtype.str} {value.shape} ".encode())
        digest.update(np.ascontiguousarray(value).tobytes())
    return digest.hexdigest()
