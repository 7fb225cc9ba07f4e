"""A reader of GGUF files: header into plain values, tensors as views of the mapped file.

Knows the container (versions 2 and 3, little-endian; https://github.com/ggml-org/ggml/blob/master/docs/gguf.md) and
nothing of what the metadata mean. The file is not trusted: every count and offset is checked against the bytes that
are there before anything is allocated, so a broken or hostile file ends in ModelFormatError, soon.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megalith.base.errors import ModelFormatError, ModelNotFound
from megalith.model.bipolar import BITS_OF
from megalith.model.formats import FORMATS
from megalith.model.mapped import forget_pages

_MAGIC = b"GGUF"
_MAX_ARRAY_ELEMENTS = 1 << 24
"""Elements of all metadata arrays together; the largest known vocabularies need about 2**20."""
_MAX_ARRAY_DEPTH = 3
_MAX_TENSORS = 1 << 20
_MAX_DIMS = 4
_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS: dict[int, tuple[str, Any]] = {
    0: ("<B", np.uint8),
    1: ("<b", np.int8),
    2: ("<H", np.uint16),
    3: ("<h", np.int16),
    4: ("<I", np.uint32),
    5: ("<i", np.int32),
    6: ("<f", np.float32),
    7: ("<?", np.bool_),
    10: ("<Q", np.uint64),
    11: ("<q", np.int64),
    12: ("<d", np.float64),
}
_TENSOR_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K",
    12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip
TENSOR_TYPE_NUMBERS = {name: number for number, name in _TENSOR_TYPES.items()}
"""The container's number of each weight format."""
OWN_FORMATS_KEY = "megalith.formats"
"""Metadata: `tensor=FORMAT` for tensors in our own formats, which the container stores as rows of I8."""
ACTIVATION_BITS_KEY = "megalith.activation_bits"
"""Metadata: bits of the activations that bipolar matrices were meant to be multiplied with."""
_U64 = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Where one tensor lies. `shape` is in torch order, rows first; `offset` counts from the start of its part file."""

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    num_bytes: int
    part: int = 0


class GgufFile:
    """One GGUF model, mapped read-only; a model split into `-00001-of-0000N.gguf` files is opened by its first.

    `metadata` maps keys to int, float, bool, str, list[str] or a read-only NumPy array. Raises ModelNotFound if a file
    is missing and ModelFormatError, with the numbers, for anything that cannot be right.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, GgufTensor] = {}
        self._parts: list[mmap.mmap] = []
        self._spans: dict[str, tuple[int, int]] = {}
        for part, part_path in enumerate(_part_paths(self.path)):
            mapped = _map(part_path)
            header = _Header(mapped, part_path, part)
            header.read()
            if part == 0:
                self.metadata, self.version, self._spans = header.metadata, header.version, header.spans
            twice = self.tensors.keys() & header.tensors.keys()
            if twice:
                raise ModelFormatError(f"{part_path}: tensor {min(twice)} is already in an earlier part of this model.")
            self.tensors.update(header.tensors)
            self._parts.append(mapped)
        split = self.metadata.get("split.count", 1)
        if isinstance(split, int) and split > len(self._parts):
            raise ModelFormatError(
                f"{self.path} says that it is one of {split} files, but {len(self._parts)} was given.",
                "Keep the names ending in -00001-of-0000N.gguf, all in one folder, and open the first.",
            )

    def metadata_bytes(self, key: str) -> bytes:
        """The pair of `key` exactly as the file has it: key, value type, value."""
        start, end = self._spans[key]
        return self._parts[0][start:end]

    def raw(self, name: str) -> NDArray[np.uint8]:
        """The bytes of tensor `name`, a read-only view of the mapped file: nothing is read until it is touched."""
        tensor = self.tensors.get(name)
        if tensor is None:
            raise ModelFormatError(f"{self.path} has no tensor named {name}.")
        return np.frombuffer(self._parts[tensor.part], np.uint8, tensor.num_bytes, tensor.offset)

    def forget(self, *, cached: bool = True) -> None:
        """Let go of the pages that were read so far: for who reads all of a file that is bigger than memory.

        With `cached=False` the page cache keeps them for the next process, and only this one does not hold them.
        """
        for mapped, path in zip(self._parts, _part_paths(self.path), strict=True):
            forget_pages(mapped, path, cached=cached)


def _part_paths(path: Path) -> list[Path]:
    """All files of a model, in order, from the path of its first (or only) file."""
    match = re.fullmatch(r"(.+)-(\d{5})-of-(\d{5})\.gguf", path.name)
    if match is None:
        return [path]
    count = int(match.group(3))
    paths = [path.with_name(f"{match.group(1)}-{i:05d}-of-{match.group(3)}.gguf") for i in range(1, count + 1)]
    # Look before opening: a name may claim 99,999 parts.
    missing = next((other for other in paths if not other.exists()), None)
    if missing is not None:
        raise ModelNotFound(f"{path.name} is one of {count} files, but {missing} does not exist.")
    return paths or [path]


def _map(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            if size < 24:
                raise ModelFormatError(f"{path} has {size} bytes; a GGUF header alone takes 24.")
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (FileNotFoundError, IsADirectoryError):
        raise ModelNotFound(f"{path} is not a file.") from None
    except OSError as error:
        raise ModelFormatError(f"{path} cannot be read: {error.strerror}.") from None


class _Header:
    """The header of one file; `read` fills `metadata` and `tensors`."""

    def __init__(self, mapped: mmap.mmap, path: Path, part: int) -> None:
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, GgufTensor] = {}
        self.spans: dict[str, tuple[int, int]] = {}
        self.version = 0
        self._map, self._path, self._part = mapped, path, part
        self._size = len(mapped)
        self._at = 0
        self._elements_left = _MAX_ARRAY_ELEMENTS

    def read(self) -> None:
        """Read everything up to the tensor data. Raises ModelFormatError."""
        magic = self._map[:4]
        if magic != _MAGIC:
            raise self._bad(f"starts with {magic!r}, not {_MAGIC!r}: it is not a GGUF file")
        self._at = 4
        self.version = self._number("<I", "version")
        if self.version not in (2, 3):
            swapped = int.from_bytes(self.version.to_bytes(4, "little"), "big")
            what = "is big-endian" if swapped in (2, 3) else f"has GGUF version {self.version}"
            raise self._bad(f"{what}; versions 2 and 3, little-endian, are supported")
        tensor_count = self._number("<Q", "number of tensors")
        key_count = self._number("<Q", "number of keys")
        # The smallest key takes 8 + 4 + 1 bytes, the smallest tensor entry 8 + 4 + 8 + 4 + 8.
        self._check_count(key_count, 13, "keys", _MAX_ARRAY_ELEMENTS)
        self._check_count(tensor_count, 32, "tensors", _MAX_TENSORS)
        for _ in range(key_count):
            start = self._at
            key = self._string("a key")
            if key in self.metadata:
                raise self._bad(f"has the key {key!r} twice")
            self.metadata[key] = self._value(self._number("<I", f"type of {key}"), key, 0)
            self.spans[key] = (start, self._at)
        self._tensors(tensor_count)

    def _tensors(self, count: int) -> None:
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or isinstance(alignment, bool) or not _sound_alignment(alignment):
            raise self._bad(f"has general.alignment {alignment!r}, which is not a power of two from 1 to 1 MiB")
        own = self._own_formats()
        found: list[tuple[str, tuple[int, ...], str, int]] = []
        for _ in range(count):
            name = self._string("a tensor name")
            dims = self._number("<I", f"dimensions of {name}")
            if not 1 <= dims <= _MAX_DIMS:
                raise self._bad(f"gives tensor {name!r} {dims} dimensions; 1 to {_MAX_DIMS} are possible")
            sizes = tuple(self._number("<Q", f"shape of {name}") for _ in range(dims))
            kind = self._number("<I", f"type of {name}")
            shape, kind_name = self._own(kind, name, sizes[::-1], own)
            found.append((name, shape, kind_name, self._number("<Q", f"offset of {name}")))
        start = -(-self._at // alignment) * alignment
        for name, shape, kind_name, offset in found:
            if name in self.tensors:
                raise self._bad(f"has the tensor {name!r} twice")
            self.tensors[name] = self._placed(name, shape, kind_name, offset, start, alignment)

    def _placed(
        self, name: str, shape: tuple[int, ...], kind: str, offset: int, start: int, alignment: int
    ) -> GgufTensor:
        size, size_bytes = FORMATS[kind]
        elements = math.prod(shape)
        if elements == 0 or shape[-1] % size:
            raise self._bad(f"gives tensor {name!r} shape {shape}, impossible in {kind} (blocks of {size})")
        num_bytes = elements // size * size_bytes
        if offset % alignment:
            raise self._bad(f"puts tensor {name!r} at offset {offset}, not a multiple of {alignment}")
        if start + offset + num_bytes > self._size:
            raise self._bad(
                f"ends at byte {self._size}, but tensor {name!r} ({num_bytes} bytes) would end at byte "
                f"{start + offset + num_bytes}: the file is truncated or damaged"
            )
        return GgufTensor(name, shape, kind, start + offset, num_bytes, self._part)

    def _own_formats(self) -> dict[str, str]:
        """{tensor: format} of the tensors that the container cannot name the format of."""
        listed = self.metadata.get(OWN_FORMATS_KEY, [])
        if not isinstance(listed, list) or not all(isinstance(text, str) for text in listed):
            raise self._bad(f"has a {OWN_FORMATS_KEY} that is not a list of texts")
        own = {name: kind for name, _, kind in (text.rpartition("=") for text in listed)}
        for name, kind in own.items():
            if kind not in BITS_OF:
                raise self._bad(f"gives tensor {name!r} the format {kind!r} in {OWN_FORMATS_KEY}, which is not known")
        return own

    def _own(self, kind: int, name: str, shape: tuple[int, ...], own: dict[str, str]) -> tuple[tuple[int, ...], str]:
        """Shape in weights, and format: of rows of bytes if the format is our own."""
        if name not in own:
            return shape, self._format(kind, name)
        size, size_bytes = FORMATS[own[name]]
        stored = _TENSOR_TYPES.get(kind, f"number {kind}")
        if stored != "I8" or shape[-1] % size_bytes:
            raise self._bad(
                f"says that tensor {name!r} is {own[name]}, but stores it as {stored} with rows of {shape[-1]} (blocks "
                f"take {size_bytes} bytes)"
            )
        return (*shape[:-1], shape[-1] // size_bytes * size), own[name]

    def _format(self, kind: int, name: str) -> str:
        text = _TENSOR_TYPES.get(kind, f"number {kind}")
        if text not in FORMATS:
            raise ModelFormatError(
                f"{self._path}: tensor {name!r} has weight format {text}, which is not supported.",
                f"Use a file whose tensors are among {', '.join(FORMATS)}.",
            )
        return text

    def _value(self, kind: int, key: str, depth: int) -> Any:
        if kind == _STRING:
            return self._string(key)
        if kind == _ARRAY:
            return self._array(key, depth)
        if kind not in _SCALARS:
            raise self._bad(f"gives {key!r} the value type {kind}, which GGUF does not have")
        return self._number(_SCALARS[kind][0], key)

    def _array(self, key: str, depth: int) -> Any:
        kind = self._number("<I", f"element type of {key}")
        count = self._number("<Q", f"length of {key}")
        if kind == _STRING:
            self._check_count(count, 8, f"strings in {key!r}", self._elements_left)
            self._elements_left -= count
            return self._strings(count, key)
        if kind == _ARRAY:
            if depth >= _MAX_ARRAY_DEPTH:
                raise self._bad(f"nests arrays in {key!r} more than {_MAX_ARRAY_DEPTH} deep")
            self._check_count(count, 12, f"arrays in {key!r}", self._elements_left)
            self._elements_left -= count
            return [self._array(key, depth + 1) for _ in range(count)]
        if kind not in _SCALARS:
            raise self._bad(f"gives the elements of {key!r} type {kind}, which GGUF does not have")
        dtype = np.dtype(_SCALARS[kind][1])
        self._check_count(count, dtype.itemsize, f"numbers in {key!r}", self._elements_left)
        self._elements_left -= count
        taken = self._map[self._at : self._at + count * dtype.itemsize]
        self._at += len(taken)
        values = np.frombuffer(taken, np.uint8 if kind == _BOOL else dtype)
        return values != 0 if kind == _BOOL else values

    def _strings(self, count: int, key: str) -> list[str]:
        """The hot loop of start-up: 98 thousand strings for SmolLM2, half a million for Gemma 3."""
        mapped, at, size = self._map, self._at, self._size
        unpack = _U64.unpack_from
        out: list[str] = []
        append = out.append
        try:
            for _ in range(count):
                start = at + 8
                at = start + unpack(mapped, at)[0]
                # Past the end a slice would silently come out short.
                if at > size:
                    raise self._bad(f"ends at byte {size}, inside {key!r}: the file is truncated or damaged")
                try:
                    append(mapped[start:at].decode())
                except UnicodeDecodeError:
                    append(mapped[start:at].decode("utf-8", "replace"))
        except struct.error:
            raise self._bad(f"ends at byte {size}, inside {key!r}: the file is truncated or damaged") from None
        self._at = at
        return out

    def _string(self, what: str) -> str:
        return self._strings(1, what)[0]

    def _number(self, layout: str, what: str) -> Any:
        try:
            value = struct.unpack_from(layout, self._map, self._at)[0]
        except struct.error:
            raise self._bad(f"ends at byte {self._size}, before the {what}: the file is truncated or damaged") from None
        self._at += struct.calcsize(layout)
        return value

    def _check_count(self, count: int, least_bytes: int, what: str, limit: int) -> None:
        left = self._size - self._at
        if count * least_bytes > left:
            raise self._bad(f"claims {count} {what}, which needs {count * least_bytes} bytes, but only {left} are left")
        if count > limit:
            raise self._bad(f"claims {count} {what}; at most {limit} are read")

    def _bad(self, what: str) -> ModelFormatError:
        return ModelFormatError(f"{self._path} {what}.")


def _sound_alignment(alignment: int) -> bool:
    return 1 <= alignment <= 1 << 20 and alignment & (alignment - 1) == 0
