"""A writer of Hugging Face directories: `model.safetensors`, streamed, and the files beside it; whole or not at all.

Knows the container. The directory grows under a temporary name beside its place, so that an interrupt or a full disk
leaves what was there before.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from megalith.base.errors import ConfigError, MachineError
from megalith.base.units import format_bytes
from megalith.model.gguf_write import check_room, write_tensors

U8 = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor to be written: `dtype` is the container's word."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int


def write_directory(
    path: Path, tensors: Sequence[Stored], pieces: Iterator[U8], beside: Mapping[str, bytes], *, force: bool = False
) -> int:
    """Write the directory; `pieces` are the tensors' bytes in order, in pieces that end where a tensor ends.

    Gives the bytes written. Raises ConfigError when `path` is there and not `force`, MachineError for too little room
    or a disk that fails.
    """
    header = _header(tensors)
    total = len(header) + sum(tensor.num_bytes for tensor in tensors) + sum(map(len, beside.values()))
    _check_target(path, total, force=force)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.mkdir()
        for name, body in beside.items():
            (partial / name).write_bytes(body)
        with (partial / "model.safetensors").open("xb") as out:
            out.write(header)
            write_tensors(out.write, tensors, pieces, 1)
            out.flush()
            os.fsync(out.fileno())
        if path.exists():
            shutil.rmtree(path)
        partial.rename(path)
    except OSError as error:
        raise MachineError(f"Writing {path} ({format_bytes(total)}) failed: {error.strerror}.") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return total


def _check_target(path: Path, total: int, *, force: bool) -> None:
    if path.exists():
        if not force:
            raise ConfigError(f"{path} is there already.", "Give another name, or --force.")
        if not (path / "config.json").is_file() or any(child.is_dir() for child in path.iterdir()):
            raise ConfigError(f"{path} is not a directory of a model alone: it is not replaced.", "Give another name.")
    check_room(path, total)


def _header(tensors: Sequence[Stored]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        span = [offset, offset + tensor.num_bytes]
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": span}
        offset += tensor.num_bytes
    body = msgspec.json.encode(entries)
    body += b" " * (-len(body) % 8)
    return len(body).to_bytes(8, "little") + body
