"""A reader of safetensors files and sharded directories: names to views of the mapped files.

Knows the container (8-byte header length, JSON header, data; https://github.com/huggingface/safetensors) and nothing of
what the tensors mean. The files are not trusted: every offset is checked.
"""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import msgspec
import numpy as np
from numpy.typing import NDArray

from megalith.base.errors import ModelFormatError
from megalith.model.formats import FORMATS
from megalith.model.mapped import forget_pages

_MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""
_MAX_INDEX_BYTES = 256 << 20
_OTHER_BYTES = {"F64": 8, "I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where one tensor lies; `dtype` is the file's word for it, which for F32, F16 and BF16 is our format's too."""

    shape: tuple[int, ...]
    dtype: str
    start: int
    num_bytes: int
    file: int


class SafetensorsModel:
    """All tensors of a directory: `model.safetensors`, or the shards that the index names.

    Raises ModelFormatError, with the numbers, for a missing shard or anything that cannot be right.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.tensors: dict[str, StoredTensor] = {}
        self._maps: list[mmap.mmap] = []
        self._paths = _shards(directory)
        for path in self._paths:
            self._add(path)

    def raw(self, name: str) -> NDArray[np.uint8]:
        """The bytes of tensor `name`, a read-only view of the mapped file."""
        tensor = self.tensors[name]
        return np.frombuffer(self._maps[tensor.file], np.uint8, tensor.num_bytes, tensor.start)

    def forget(self, *, cached: bool = True) -> None:
        """Let go of the pages that were read so far; see model.mapped."""
        for mapped, path in zip(self._maps, self._paths, strict=True):
            forget_pages(mapped, path, cached=cached)

    def _add(self, path: Path) -> None:
        try:
            with path.open("rb") as file:
                size = file.seek(0, 2)
                if size < 10:
                    raise ModelFormatError(f"{path} has {size} bytes; a safetensors header alone takes 10.")
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise ModelFormatError(f"{path} cannot be read: {error.strerror}.") from None
        header_bytes = int.from_bytes(mapped[:8], "little")
        if header_bytes > min(size - 8, _MAX_HEADER_BYTES):
            raise ModelFormatError(
                f"{path} claims a header of {header_bytes} bytes, but has {size} bytes: it is truncated or damaged."
            )
        try:
            header = msgspec.json.decode(mapped[8 : 8 + header_bytes])
        except (ValueError, RecursionError) as error:
            raise ModelFormatError(f"{path} has a header that is not JSON: {error}.") from None
        if not isinstance(header, dict):
            raise ModelFormatError(f"{path} has a header that is not a JSON object.")
        self._maps.append(mapped)
        for name, entry in header.items():
            if name != "__metadata__":
                if name in self.tensors:
                    raise ModelFormatError(f"{path}: tensor {name} is in another shard too.")
                self.tensors[name] = _entry(
                    entry, f"{path}: tensor {name}", 8 + header_bytes, size, len(self._maps) - 1
                )


def _entry(entry: Any, what: str, data_start: int, size: int, file: int) -> StoredTensor:
    """The checked header entry of one tensor."""
    fields: dict[str, Any] = entry if isinstance(entry, dict) else {}
    dtype, shape, span = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not (isinstance(dtype, str) and _naturals(shape) and _naturals(span) and len(span) == 2 and len(shape) <= 8):
        raise ModelFormatError(f"{what} has no sound dtype, shape and data_offsets.")
    begin, end = span
    if begin > end or data_start + end > size:
        raise ModelFormatError(
            f"{what} lies at bytes {begin} to {end} of {size - data_start}: the file is truncated or damaged."
        )
    item = FORMATS[dtype].block_bytes if dtype in ("F32", "F16", "BF16") else _OTHER_BYTES.get(dtype)
    if item is not None and math.prod(shape) * item != end - begin:
        raise ModelFormatError(
            f"{what} of shape {shape} in {dtype} takes {math.prod(shape) * item} bytes, not {end - begin}."
        )
    return StoredTensor(tuple(shape), dtype, data_start + begin, end - begin, file)


def _naturals(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _shards(directory: Path) -> list[Path]:
    """The files that hold the weights, in name order."""
    index = directory / _INDEX
    if index.is_file():
        return _indexed(directory, index)
    single = directory / "model.safetensors"
    found = [single] if single.is_file() else sorted(directory.glob("*.safetensors"))
    if not found:
        old = any(directory.glob("*.bin"))
        raise ModelFormatError(
            f"{directory} has no *.safetensors files{', only pickled *.bin ones' if old else ''}.",
            "Save the model as safetensors.",
        )
    return found


def _indexed(directory: Path, index: Path) -> list[Path]:
    try:
        if index.stat().st_size > _MAX_INDEX_BYTES:
            raise ModelFormatError(f"{index} has {index.stat().st_size} bytes; at most {_MAX_INDEX_BYTES} are read.")
        data = msgspec.json.decode(index.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelFormatError(f"{index} cannot be read as JSON: {error}.") from None
    weight_map = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ModelFormatError(f"{index} has no weight_map from tensors to files.")
    names = sorted(set(weight_map.values()))
    for name in names:
        # An index must not reach out of its directory.
        if Path(name).name != name:
            raise ModelFormatError(f"{index} names the shard {name!r}, which is not a plain file name.")
        if not (directory / name).is_file():
            raise ModelFormatError(f"{directory} lacks the shard {name}, one of {len(names)} that its index names.")
    if not names:
        raise ModelFormatError(f"{index} names no shard.")
    return [directory / name for name in names]
