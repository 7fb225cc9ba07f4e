"""A writer of GGUF files: metadata pairs as bytes, tensors streamed in order; whole under its name or not there at all.

Knows the container (version 3, little-endian) and nothing of what the metadata mean. The file grows under a temporary
name beside its place and takes its name when the last tensor is written, so that an interrupt or a full disk leaves
what was there before.
"""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from megalith.base.errors import ConfigError, MachineError
from megalith.base.units import format_bytes
from megalith.base.whole_file import written_whole
from megalith.model.formats import row_bytes
from megalith.model.gguf import OWN_FORMATS_KEY, TENSOR_TYPE_NUMBERS

U8 = NDArray[np.uint8]
_ALIGNMENT = 32
_DISK_MARGIN_BYTES = 16 << 20
_COUNT, _STRING, _ARRAY = struct.Struct("<Q"), 8, 9


@dataclass(frozen=True, slots=True)
class NewTensor:
    """A tensor to be written: `shape` in torch order."""

    name: str
    shape: tuple[int, ...]
    format: str

    @property
    def is_own(self) -> bool:
        """Whether GGUF has no number for the format: the rows are stored as I8, and metadata say what they are."""
        return self.format not in TENSOR_TYPE_NUMBERS

    @property
    def num_bytes(self) -> int:
        """Bytes it takes, without padding."""
        rows = 1
        for size in self.shape[:-1]:
            rows *= size
        return rows * row_bytes(self.format, self.shape[-1])


def pair(key: str, value: str | bool | int | float | Sequence[str] | NDArray[np.int32]) -> bytes:
    """One metadata pair: text, bool, uint32, float32, an array of texts or an array of int32."""
    head = _text(key)
    if isinstance(value, str):
        return head + struct.pack("<I", _STRING) + _text(value)
    if isinstance(value, bool):
        return head + struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return head + struct.pack("<II", 4, value)
    if isinstance(value, float):
        return head + struct.pack("<If", 6, value)
    if isinstance(value, np.ndarray):
        return head + struct.pack("<IIQ", _ARRAY, 5, len(value)) + value.astype("<i4").tobytes()
    return head + struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + b"".join(map(_text, value))


def _text(text: str) -> bytes:
    data = text.encode()
    return _COUNT.pack(len(data)) + data


def write_gguf(
    path: Path, pairs: Sequence[bytes], tensors: Sequence[NewTensor], pieces: Iterable[U8], *, force: bool = False
) -> int:
    """Write the file; `pieces` are the tensors' bytes, tensor by tensor in pieces that end where a tensor ends.

    Gives the bytes written. Raises ConfigError when `path` is there and not `force`, MachineError for too little room
    or a disk that fails.
    """
    header = _header(pairs, tensors)
    total = len(header) + sum(_padded(tensor.num_bytes) for tensor in tensors)
    check_target(path, total, force=force)
    try:
        with written_whole(path) as partial, partial.open("xb") as out:
            out.write(header)
            write_tensors(out.write, tensors, pieces, _ALIGNMENT)
            out.flush()
            os.fsync(out.fileno())
    except OSError as error:
        raise MachineError(f"Writing {path} ({format_bytes(total)}) failed: {error.strerror}.") from None
    return total


def check_target(path: Path, total: int, *, force: bool) -> None:
    """Raise ConfigError or MachineError unless `total` bytes can be put at `path`."""
    if path.is_dir():
        raise ConfigError(f"{path} is a directory.", "Name a file that ends in .gguf.")
    if path.exists() and not force:
        size = format_bytes(path.stat().st_size)
        raise ConfigError(f"{path} is there already ({size}).", "Give another name, or --force.")
    check_room(path, total)


def check_room(path: Path, total: int) -> None:
    """Raise MachineError unless there is room for `total` bytes beside `path`."""
    try:
        free = shutil.disk_usage(path.parent).free
    except OSError as error:
        raise MachineError(
            f"{path.parent} cannot be written: {error.strerror}.", "Name a folder that exists."
        ) from None
    if free < total + _DISK_MARGIN_BYTES:
        raise MachineError(
            f"{path} will take {format_bytes(total)}; {path.parent.resolve()} has {format_bytes(free)} free.",
            "Make room, name another folder, or take a smaller format.",
        )


def _header(pairs: Sequence[bytes], tensors: Sequence[NewTensor]) -> bytes:
    own = [f"{tensor.name}={tensor.format}" for tensor in tensors if tensor.is_own]
    pairs = [*pairs, pair(OWN_FORMATS_KEY, own)] if own else pairs
    parts = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(pairs)), *pairs]
    offset = 0
    for tensor in tensors:
        kind, shape = tensor.format, tensor.shape
        if tensor.is_own:
            kind, shape = "I8", (*shape[:-1], row_bytes(kind, shape[-1]))
        sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        parts.append(_text(tensor.name) + sizes + struct.pack("<IQ", TENSOR_TYPE_NUMBERS[kind], offset))
        offset += _padded(tensor.num_bytes)
    body = b"".join(parts)
    return body + bytes(_padded(len(body)) - len(body))


class Sized(Protocol):
    """What must be known of a tensor to write its bytes."""

    @property
    def name(self) -> str:
        """Its name."""
        ...

    @property
    def num_bytes(self) -> int:
        """Bytes it takes, without padding."""
        ...


def write_tensors(
    write: Callable[[memoryview | bytes], object], tensors: Sequence[Sized], pieces: Iterable[U8], alignment: int
) -> None:
    """Write `pieces`, which end where a tensor ends, each tensor padded to a multiple of `alignment`."""
    source = iter(pieces)
    for tensor in tensors:
        left = tensor.num_bytes
        while left > 0:
            piece = next(source)
            left -= piece.size
            write(np.ascontiguousarray(piece).data)
        assert left == 0, f"{tensor.name}: pieces cross its end"
        write(bytes(-tensor.num_bytes % alignment))


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
