"""A model's matrices in the native backend's panels, in one file: made once, then read in pieces.

Layout: 4 KiB of header, then pieces (attention and FFN matrices of each layer, the head, and an embedding of its own),
each at a multiple of 4 KiB, then the index as JSON. The header is written last and the file is renamed when it is on
the disk: there is never half of one under its name. Packing holds a few MiB at a time. Knows nothing about steps.
"""

from __future__ import annotations

import hashlib
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from megalith.base.config import Config
from megalith.base.errors import TierError
from megalith.base.home import home_dir
from megalith.base.units import MIB, format_bytes
from megalith.base.whole_file import written_whole
from megalith.engine.native import binding, single
from megalith.model.checkpoint import Tensor
from megalith.specs.model import ModelSpec
from megalith.tier.disk import ALIGN, DirectFile
from megalith.tier.memory import HugeBuffer

U8 = NDArray[np.uint8]
Progress = Callable[[str], None]
LAYOUT = 1
"""Changes with anything that changes these bytes: the panels of engine/native/c/pack.c too."""
ATTENTION, FFN = ("q", "k", "v", "o"), ("gate", "up", "down")
_MAGIC = b"MEGAPACK"
_HEADER = struct.Struct("<8sIIQQ")
_STAGE_BYTES = 4 * MIB
_CHUNK_BYTES = 2 * MIB


class Piece(Config, kw_only=True):
    """Bytes that are read together."""

    name: str
    offset: int
    num_bytes: int
    checksum: int
    """CRC-32 of them."""


class Matrix(Config, kw_only=True):
    """One matrix in a piece."""

    piece: int
    layer: int
    tensor: str
    format: str
    offset: int
    """In the piece; a multiple of 64."""
    inputs: int


class Index(Config, kw_only=True):
    """What is in the file. Piece 2i: attention of layer i; 2i + 1: its FFN; then the head; then an untied embedding."""

    model: str
    pieces: tuple[Piece, ...]
    matrices: tuple[Matrix, ...]


class Weights(Protocol):
    """What of a Checkpoint is needed."""

    def tensor(self, name: str) -> Tensor:
        """The tensor of a canonical name."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Its shape, without reading it."""
        ...

    def stored_format(self, name: str) -> str:
        """Its format, without reading it."""
        ...


def packed_path(source: Path) -> Path:
    """Where the packed file of the model at `source` belongs: its name changes with the source and the layout."""
    parts = sorted(source.iterdir()) if source.is_dir() else [source]
    digest = hashlib.sha256(repr(LAYOUT).encode())
    for part in parts:
        status = part.stat()
        digest.update(repr((str(part.resolve()), status.st_size, status.st_mtime_ns)).encode())
    return home_dir() / "packed" / f"{source.stem}-{digest.hexdigest()[:16]}.panels"


def pieces_of(spec: ModelSpec) -> list[tuple[str, list[tuple[int, str, str]]]]:
    """(name, [(layer, tensor, canonical name)]) of each piece, in order."""
    pieces = []
    for i in range(spec.num_layers):
        for part, tensors in (("attention", ATTENTION), ("ffn", FFN)):
            pieces.append((f"layers.{i}.{part}", [(i, t, f"layers.{i}.{t}.weight") for t in tensors]))
    if spec.tied_embeddings:
        return [*pieces, ("embed", [(-1, "embed", "embed.weight")])]
    return [*pieces, ("head", [(-1, "head", "head.weight")]), ("embed", [(-1, "embed", "embed.weight")])]


def packed_size(spec: ModelSpec, weights: Weights) -> int:
    """Bytes of the file, but for its index."""
    library, total = binding.load(), ALIGN
    for _, tensors in pieces_of(spec):
        for _, _, name in tensors:
            outputs, inputs = weights.shape(name)
            total += single.packed_bytes(library, weights.stored_format(name), outputs, inputs) + 64
        total += ALIGN
    return total


def ensure_packed(path: Path, spec: ModelSpec, weights: Weights, progress: Progress | None = None) -> Path:
    """The packed file, made now if it is not there. Raises TierError where there is no room for it."""
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    needed = packed_size(spec, weights) + MIB
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        raise TierError(
            f"The packed weights of {spec.name} take {format_bytes(needed)} under {path.parent}, where "
            f"{format_bytes(free)} are free.",
            "Free some, or set MEGALITH_HOME to a folder on a larger disk.",
        )
    with written_whole(path) as partial, _Writer(partial) as writer:
        _pack(writer, spec, weights, progress)
    return path


def _pack(writer: _Writer, spec: ModelSpec, weights: Weights, progress: Progress | None) -> None:
    pieces, matrices = [], []
    todo = pieces_of(spec)
    writer.append(np.zeros(ALIGN, np.uint8))
    for number, (name, tensors) in enumerate(todo):
        writer.pad(ALIGN)
        begin, writer.checksum = writer.offset, 0
        if progress is not None and number % 8 == 0:
            progress(f"pack the weights: piece {number + 1} of {len(todo)}")
        for layer, tensor, canonical in tensors:
            writer.pad(64)
            found = weights.tensor(canonical)
            offset = writer.offset - begin
            _pack_matrix(writer, found, getattr(weights, "forget", None))
            matrices.append(
                Matrix(piece=number, layer=layer, tensor=tensor, format=found.format, offset=offset,
                       inputs=found.shape[1])
            )  # fmt: skip
        writer.pad(ALIGN)
        pieces.append(Piece(name=name, offset=begin, num_bytes=writer.offset - begin, checksum=writer.checksum))
    index = msgspec.json.encode(Index(model=spec.name, pieces=tuple(pieces), matrices=tuple(matrices)))
    writer.finish(index)


def _pack_matrix(writer: _Writer, tensor: Tensor, forget: Callable[[], None] | None) -> None:
    """A few panels at a time, so that neither the file's pages nor the panels add up."""
    library = binding.load()
    outputs, inputs = tensor.shape
    panel = single.packed_bytes(library, tensor.format, 16, inputs)
    rows = 16 * max(1, _CHUNK_BYTES // panel)
    for first in range(0, outputs, rows):
        raw = tensor.raw[first : first + rows]
        to = np.empty(-(-raw.shape[0] // 16) * panel, np.uint8)
        single.pack_into(library, tensor.format, raw, inputs, to)
        writer.append(to)
        if forget is not None:
            forget()


class _Writer:
    """Appends through one aligned buffer, so that all but the end goes past the page cache."""

    def __init__(self, path: Path) -> None:
        self.offset = 0
        self.checksum = 0
        """Of what was appended since it was set to 0."""
        self._flushed = 0
        self._buffer = HugeBuffer(_STAGE_BYTES)
        try:
            self._file = DirectFile(path, "w")
        except TierError:
            self._buffer.close()
            raise

    def append(self, data: U8) -> None:
        self.checksum = zlib.crc32(data.data, self.checksum)
        view, done = data.data, 0
        while done < len(view):
            at = self.offset - self._flushed
            part = view[done : done + _STAGE_BYTES - at]
            self._buffer.view[at : at + len(part)] = part
            self.offset += len(part)
            done += len(part)
            if self.offset - self._flushed == _STAGE_BYTES:
                self._flush()

    def pad(self, multiple: int) -> None:
        self.append(np.zeros(-self.offset % multiple, np.uint8))

    def finish(self, index: bytes) -> None:
        """The index, then the header that says where it is."""
        at = self.offset
        self.append(np.frombuffer(index, np.uint8))
        self.pad(ALIGN)
        self._flush()
        header = _HEADER.pack(_MAGIC, LAYOUT, zlib.crc32(index), at, len(index))
        self._buffer.view[:ALIGN] = header.ljust(ALIGN, b"\0")
        self._file.write_from(0, self._buffer.view[:ALIGN])
        self._file.sync()

    def _flush(self) -> None:
        self._file.write_from(self._flushed, self._buffer.view[: self.offset - self._flushed])
        self._flushed = self.offset

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *ended: object) -> None:
        self._file.close()
        self._buffer.close()


class PackedFile:
    """An opened packed file. Raises TierError for one that is cut short or is none."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = DirectFile(path)
        try:
            self.index = self._read_index()
        except BaseException:
            self.file.close()
            raise
        self._verified: set[int] = set()

    def _read_index(self) -> Index:
        remedy = f"Remove {self.path}: it is made again at the next start."
        head = np.empty(_HEADER.size, np.uint8)
        self.file.read_into(0, head.data)
        magic, layout, checksum, at, length = _HEADER.unpack(head.tobytes())
        if magic != _MAGIC or layout != LAYOUT or at + length > self.file.size:
            raise TierError(
                f"{self.path} is no packed file of layout {LAYOUT}, or was cut short: it has {self.file.size} bytes "
                f"and its index should be at {at}, {length} bytes long.",
                remedy,
            )
        body = np.empty(length, np.uint8)
        self.file.read_into(at, body.data)
        if zlib.crc32(body.data) != checksum:
            raise TierError(f"The index of {self.path} is corrupted.", remedy)
        return msgspec.json.decode(body.tobytes(), type=Index)

    def read_piece(self, number: int, view: memoryview) -> None:
        """Fill the front of `view` with a piece; its checksum is verified the first time."""
        piece = self.index.pieces[number]
        self.file.read_into(piece.offset, view[: piece.num_bytes])
        if number in self._verified:
            return
        found = zlib.crc32(view[: piece.num_bytes])
        if found != piece.checksum:
            raise TierError(
                f"Piece {piece.name} of {self.path} is corrupted: {piece.num_bytes} bytes at {piece.offset} have "
                f"checksum {found:08x}, {piece.checksum:08x} were written.",
                f"Remove {self.path}: it is made again at the next start.",
            )
        self._verified.add(number)

    def close(self) -> None:
        """Again is no error."""
        self.file.close()
