"""A model's matrices in the native backend's panels, in one file: made once, then read in pieces.

Layout: 4 KiB of header, then pieces of a few MiB, each at a multiple of 4 KiB, then the index as JSON. Matrices follow
each other in the order in which a step uses them, cut into spans of whole panels where a piece is full; the head, and
an embedding of its own, begin new pieces. The header is written last and the file is renamed when it is on the disk:
there is never half of one under its name. Packing holds one piece at a time. Knows nothing about steps.
"""

from __future__ import annotations

import glob
import hashlib
import shutil
import struct
import zlib
from bisect import bisect_right
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
from megalith.policy.weight_window import piece_limit
from megalith.specs.model import ModelSpec
from megalith.tier.block import checksum
from megalith.tier.disk import ALIGN, DirectFile
from megalith.tier.memory import HugeBuffer

U8 = NDArray[np.uint8]
Progress = Callable[[str], None]
LAYOUT = 2
"""Changes with anything that changes these bytes: the panels of engine/native/c/pack.c too."""
PANEL = 16
"""Rows of a panel."""
_IN_LAYER = ("q", "k", "v", "o", "gate", "up", "down")
_MAGIC = b"MEGAPACK"
_HEADER = struct.Struct("<8sIIQQ")


class Piece(Config, kw_only=True):
    """Bytes that are read together."""

    offset: int
    num_bytes: int
    checksum: int
    """tier.block.checksum of them."""
    name: str
    """Of the first matrix in it."""


class Span(Config, kw_only=True):
    """Panels of a matrix from `first_panel` on, up to its next span's."""

    piece: int
    first_panel: int
    offset: int
    """In the piece; a multiple of 64."""


class Matrix(Config, kw_only=True):
    """One matrix and where its panels are."""

    layer: int
    tensor: str
    format: str
    inputs: int
    panel_bytes: int
    spans: tuple[Span, ...]

    def at(self, panel: int) -> tuple[int, int]:
        """(piece, offset in it) of a panel."""
        span = self.spans[bisect_right(self.spans, panel, key=lambda span: span.first_panel) - 1]
        return span.piece, span.offset + (panel - span.first_panel) * self.panel_bytes


class Index(Config, kw_only=True):
    """What is in the file. Steps use pieces in order: layers, then the head; rows of an embedding of its own follow."""

    model: str
    pieces: tuple[Piece, ...]
    head: int
    """The first piece of the head."""
    used: int
    """Pieces that steps use."""
    matrices: tuple[Matrix, ...]


class Weights(Protocol):
    """What of a Checkpoint is needed."""

    def forget(self) -> None:
        """Let go of what was read so far."""
        ...

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
    return home_dir() / "packed" / f"{source.stem}-{_place(source)}-{digest.hexdigest()[:16]}.panels"


def _place(source: Path) -> str:
    """Tells models of one name in several folders apart; stays the same when the model's file changes."""
    return hashlib.sha256(str(source.resolve()).encode()).hexdigest()[:8]


def remove_outdated(path: Path) -> list[Path]:
    """Remove what was packed of the same model before its file, or the layout, changed. Gives what went."""
    begin = path.name.rsplit("-", 1)[0]
    gone = []
    for old in sorted(path.parent.glob(f"{glob.escape(begin)}-{'?' * 16}.panels")):
        if old != path:
            old.unlink(missing_ok=True)  # Who has it open reads on.
            gone.append(old)
    return gone


def matrices_of(spec: ModelSpec) -> list[tuple[int, str, str]]:
    """(layer, tensor, canonical name) of each matrix, in the order in which steps use them."""
    layers = [(i, tensor, f"layers.{i}.{tensor}.weight") for i in range(spec.num_layers) for tensor in _IN_LAYER]
    embed = (-1, "embed", "embed.weight")
    return [*layers, embed] if spec.tied_embeddings else [*layers, (-1, "head", "head.weight"), embed]


def packed_size(spec: ModelSpec, weights: Weights) -> int:
    """Bytes of the panels."""
    library, total = binding.load(), 0
    for _, _, name in matrices_of(spec):
        outputs, inputs = weights.shape(name)
        total += single.packed_bytes(library, weights.stored_format(name), outputs, inputs)
    return total


def ensure_packed(
    path: Path, spec: ModelSpec, weights: Weights, progress: Progress | None = None, piece_bytes: int | None = None
) -> Path:
    """The packed file, made now if it is not there, in pieces of about `piece_bytes` (None: what suits its size).

    Raises TierError where there is no room for it.
    """
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_outdated(path)
    size = packed_size(spec, weights)
    needed = size + size // 100 + MIB
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        raise TierError(
            f"The packed weights of {spec.name} take {format_bytes(needed)} under {path.parent}, where "
            f"{format_bytes(free)} are free.",
            "Free some, or set MEGALITH_HOME to a folder on a larger disk.",
        )
    largest = max(_panel_bytes(weights, name) for _, _, name in matrices_of(spec))
    with written_whole(path) as partial, _Packer(partial, piece_bytes or piece_limit(size), largest) as packer:
        _pack(packer, spec, weights, progress)
    return path


def _panel_bytes(weights: Weights, name: str) -> int:
    return single.packed_bytes(binding.load(), weights.stored_format(name), PANEL, weights.shape(name)[1])


def _pack(packer: _Packer, spec: ModelSpec, weights: Weights, progress: Progress | None) -> None:
    todo, matrices = matrices_of(spec), []
    first_head, used = 0, 0
    for number, (layer, tensor, name) in enumerate(todo):
        if progress is not None and number % 32 == 0:
            progress(f"pack the weights: matrix {number + 1} of {len(todo)}")
        if layer == -1:
            packer.end_piece()
            if tensor == "head" or spec.tied_embeddings:
                first_head = packer.count
        found = weights.tensor(name)
        matrices.append(packer.add(layer, tensor, name, found, weights.forget))
        if layer == -1 and not used:
            packer.end_piece()
            used = packer.count
    packer.end_piece()
    packer.finish(
        Index(
            model=spec.name, pieces=tuple(packer.pieces), head=first_head, used=used, matrices=tuple(matrices)
        )
    )  # fmt: skip


class _Packer:
    """Fills one piece after the other in one aligned buffer, so that all of them go past the page cache."""

    def __init__(self, path: Path, piece_bytes: int, largest_panel: int) -> None:
        self.pieces: list[Piece] = []
        self._limit = -(-piece_bytes // ALIGN) * ALIGN
        self._library = binding.load()
        self._at = 0
        """Bytes in the piece that is being filled."""
        self._offset = ALIGN
        self._name = ""
        self._buffer = HugeBuffer(-(-max(piece_bytes, largest_panel) // ALIGN) * ALIGN)
        try:
            self._file = DirectFile(path, "w")
        except TierError:
            self._buffer.close()
            raise

    @property
    def count(self) -> int:
        """Pieces that are complete."""
        return len(self.pieces)

    def add(self, layer: int, tensor: str, name: str, found: Tensor, forget: Callable[[], None]) -> Matrix:
        """A matrix, in as many spans as it takes."""
        outputs, inputs = found.shape
        panel_bytes, spans, row = single.packed_bytes(self._library, found.format, PANEL, inputs), [], 0
        while row < outputs:
            begin = -(-self._at // 64) * 64
            room = self._limit if self._at else max(self._limit, panel_bytes)
            count = (room - begin) // panel_bytes
            if count < 1:
                self.end_piece()
                continue
            raw = found.raw[row : row + PANEL * count]
            end = begin + -(-raw.shape[0] // PANEL) * panel_bytes
            to = np.frombuffer(self._buffer.view, np.uint8)
            to[self._at : begin] = 0
            single.pack_into(self._library, found.format, raw, inputs, to[begin:end])
            spans.append(Span(piece=self.count, first_panel=row // PANEL, offset=begin))
            self._name = self._name or name.removesuffix(".weight")
            self._at, row = end, row + raw.shape[0]
            forget()
        return Matrix(
            layer=layer, tensor=tensor, format=found.format, inputs=inputs, panel_bytes=panel_bytes, spans=tuple(spans)
        )

    def end_piece(self) -> None:
        """Write what there is."""
        if not self._at:
            return
        size = -(-self._at // ALIGN) * ALIGN
        view = self._buffer.view[:size]
        view[self._at :] = bytes(size - self._at)
        self._file.write_from(self._offset, view)
        self.pieces.append(Piece(offset=self._offset, num_bytes=size, checksum=checksum(view), name=self._name))
        self._offset, self._at, self._name = self._offset + size, 0, ""

    def finish(self, index: Index) -> None:
        """The index, then the header that says where it is."""
        body = msgspec.json.encode(index)
        self._file.write_from(self._offset, memoryview(body))
        header = _HEADER.pack(_MAGIC, LAYOUT, zlib.crc32(body), self._offset, len(body))
        self._file.write_from(0, memoryview(header.ljust(ALIGN, b"\0")))
        self._file.sync()

    def __enter__(self) -> _Packer:
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
        magic, layout, crc, at, length = _HEADER.unpack(head.tobytes())
        if magic != _MAGIC or layout != LAYOUT or at + length > self.file.size:
            raise TierError(
                f"{self.path} is no packed file of layout {LAYOUT}, or was cut short: it has {self.file.size} bytes "
                f"and its index should be at {at}, {length} bytes long.",
                remedy,
            )
        body = np.empty(length, np.uint8)
        self.file.read_into(at, body.data)
        if zlib.crc32(body.data) != crc:
            raise TierError(f"The index of {self.path} is corrupted.", remedy)
        return msgspec.json.decode(body.tobytes(), type=Index)

    def read_piece(self, number: int, view: memoryview) -> None:
        """Fill the front of `view` with a piece; its checksum is verified the first time."""
        piece = self.index.pieces[number]
        self.file.read_into(piece.offset, view[: piece.num_bytes])
        if number in self._verified:
            return
        found = checksum(view[: piece.num_bytes])
        if found != piece.checksum:
            raise TierError(
                f"Piece {number} of {self.path}, which begins with {piece.name}, is corrupted: {piece.num_bytes} bytes "
                f"at {piece.offset} have checksum {found:016x}, {piece.checksum:016x} were written.",
                f"Remove {self.path}: it is made again at the next start.",
            )
        self._verified.add(number)

    def close(self) -> None:
        """Again is no error."""
        self.file.close()
