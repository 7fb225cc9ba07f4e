"""The feed-forward weights of a model, neuron by neuron, in one file: row-column bundling of LLM in a flash.

A neuron of a gated FFN is a row of gate, a row of up and a column of down (arXiv:2312.11514, section 3.2). `groups`
says which of the three lie together: all three are one read of three times the bytes. Layout: 4 KiB of header; each
group as [layers, neurons] bundles padded to 4 KiB; checksums, one for each bundle; the index as JSON. The header is
written last and the file is renamed when it is on the disk. Packing holds the FFN of one layer. Knows nothing of steps.
"""

from __future__ import annotations

import hashlib
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from megalith.base.config import Config
from megalith.base.errors import ConfigError, TierError
from megalith.base.home import home_dir
from megalith.base.units import MIB, format_bytes
from megalith.base.whole_file import written_whole
from megalith.engine.packed_file import Weights
from megalith.specs.model import ModelSpec
from megalith.tier.block import row_checksums
from megalith.tier.disk import ALIGN, DirectFile
from megalith.tier.memory import HugeBuffer

U8 = NDArray[np.uint8]
U64 = NDArray[np.uint64]
Groups = tuple[tuple[str, ...], ...]
BUNDLED: Groups = (("gate", "up", "down"),)
GATE_APART: Groups = (("gate",), ("up", "down"))
APART: Groups = (("gate",), ("up",), ("down",))
LAYOUT = 1
ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
_MAGIC = b"MEGANEUR"
_HEADER = struct.Struct("<8sIIQQQ")
_WRITE_BYTES = 8 * MIB


class Index(Config, kw_only=True):
    """What is in the file."""

    model: str
    layers: int
    neurons: int
    """Of a layer."""
    hidden: int
    format: str
    """Of a weight: F32, F16 or BF16."""
    groups: Groups

    @property
    def row_bytes(self) -> int:
        """Of one row of gate or up, or column of down."""
        return self.hidden * ITEM_BYTES[self.format]

    def stride(self, group: int) -> int:
        """Bytes of a bundle of that group, padding included."""
        return -(-len(self.groups[group]) * self.row_bytes // ALIGN) * ALIGN

    def offset(self, group: int, layer: int, neuron: int) -> int:
        """Where a bundle begins in the file."""
        before = sum(self.stride(other) for other in range(group)) * self.layers * self.neurons
        return ALIGN + before + (layer * self.neurons + neuron) * self.stride(group)

    @property
    def end(self) -> int:
        """Where the checksums begin."""
        return self.offset(len(self.groups) - 1, self.layers, 0)


def check_sparse(spec: ModelSpec) -> None:
    """Raise ConfigError for a model whose neurons cannot be left out exactly."""
    if spec.activation != "relu" or not spec.gated_ffn or spec.num_experts:
        raise ConfigError(
            f"{spec.name} has {spec.activation} neurons{' in experts' if spec.num_experts else ''}: a window of "
            "neurons is for gated ReLU, whose neurons are exactly zero unless their gate is positive.",
            "Use --memory alone: the native backend then streams whole layers.",
        )


def neuron_path(source: Path, groups: Groups = BUNDLED) -> Path:
    """Where the file of the model at `source` belongs: its name changes with the source, the layout and the groups."""
    parts = sorted(source.iterdir()) if source.is_dir() else [source]
    digest = hashlib.sha256(repr((LAYOUT, groups)).encode())
    for part in parts:
        status = part.stat()
        digest.update(repr((str(part.resolve()), status.st_size, status.st_mtime_ns)).encode())
    return home_dir() / "packed" / f"{source.stem}-{digest.hexdigest()[:16]}.neurons"


def ensure_neurons(
    path: Path, spec: ModelSpec, weights: Weights, groups: Groups = BUNDLED,
    progress: Callable[[str], None] | None = None,
) -> Path:  # fmt: skip
    """The file, made now if it is not there. Raises ConfigError as check_sparse, TierError without room."""
    check_sparse(spec)
    if path.exists():
        return path
    stored = {weights.stored_format(f"layers.{i}.{part}.weight") for i in range(spec.num_layers) for part in BUNDLED[0]}
    kind = stored.pop() if len(stored) == 1 and stored <= ITEM_BYTES.keys() else "F32"
    index = Index(
        model=spec.name, layers=spec.num_layers, neurons=spec.ffn, hidden=spec.hidden, format=kind, groups=groups
    )
    needed = index.end + 8 * len(groups) * spec.num_layers * spec.ffn + MIB
    path.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        raise TierError(
            f"The neurons of {spec.name} take {format_bytes(needed)} under {path.parent}, where {format_bytes(free)} "
            "are free.", "Free some, or set MEGALITH_HOME to a folder on a larger disk.",
        )  # fmt: skip
    with written_whole(path) as partial, DirectFile(partial, "w") as file:
        sums = np.zeros((len(groups), spec.num_layers, spec.ffn), np.uint64)
        for layer in range(spec.num_layers):
            if progress is not None:
                progress(f"bundle the neurons: layer {layer + 1} of {spec.num_layers}")
            rows = {part: _rows(weights, layer, part, kind) for part in BUNDLED[0]}
            for group in range(len(groups)):
                sums[group, layer] = _write_group(file, index, group, layer, rows)
        _finish(file, index, sums)
    return path


def _rows(weights: Weights, layer: int, part: str, kind: str) -> U8:
    """[neurons, row bytes]: rows of gate and up as they are, columns of down as rows."""
    tensor = weights.tensor(f"layers.{layer}.{part}.weight")
    if tensor.format != kind:
        values = tensor.float32()
    else:
        values = tensor.raw.view(np.float32 if kind == "F32" else np.uint16)
    if part == "down":
        values = np.ascontiguousarray(values.T)
    return np.ascontiguousarray(values).view(np.uint8)


def _write_group(file: DirectFile, index: Index, group: int, layer: int, rows: dict[str, U8]) -> U64:
    """Write a layer of a group; the checksums of its bundles."""
    stride, width = index.stride(group), index.row_bytes
    step, sums = max(1, _WRITE_BYTES // stride), np.empty(index.neurons, np.uint64)
    with HugeBuffer(step * stride) as buffer:
        room = np.frombuffer(buffer.view, np.uint8).reshape(step, stride)
        for begin in range(0, index.neurons, step):
            count = min(step, index.neurons - begin)
            for place, part in enumerate(index.groups[group]):
                room[:count, place * width : (place + 1) * width] = rows[part][begin : begin + count]
            sums[begin : begin + count] = row_checksums(room[:count].view(np.uint64))
            file.write_from(index.offset(group, layer, begin), buffer.view[: count * stride])
        del room
    return sums


def _finish(file: DirectFile, index: Index, sums: U64) -> None:
    body = msgspec.json.encode(index)
    table = sums.tobytes()
    file.write_from(index.end, memoryview(table + body))
    crc = zlib.crc32(table + body)
    header = _HEADER.pack(_MAGIC, LAYOUT, crc, index.end, len(table), len(body))
    file.write_from(0, memoryview(header.ljust(ALIGN, b"\0")))
    file.sync()


class NeuronFile:
    """An opened file. Raises TierError for one that is cut short, damaged or none."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = DirectFile(path)
        try:
            self.index, self.sums = self._read_index()
        except BaseException:
            self.file.close()
            raise

    def _read_index(self) -> tuple[Index, U64]:
        remedy = f"Remove {self.path}: it is made again at the next start."
        size, head = self.file.size, np.zeros(_HEADER.size, np.uint8)
        if size >= ALIGN:
            self.file.read_into(0, head.data)
        magic, layout, crc, at, table, body = _HEADER.unpack(head.tobytes())
        if magic != _MAGIC or layout != LAYOUT or at + table + body != size:
            raise TierError(
                f"{self.path} is no file of neurons of layout {LAYOUT}, or was cut short: it has {size} bytes and "
                f"should have {at + table + body}.", remedy,
            )  # fmt: skip
        end = np.empty(table + body, np.uint8)
        self.file.read_into(at, end.data)
        if zlib.crc32(end.data) != crc:
            raise TierError(f"The index of {self.path} is corrupted.", remedy)
        index = msgspec.json.decode(end[table:].tobytes(), type=Index)
        sums = end[:table].view(np.uint64).reshape(len(index.groups), index.layers, index.neurons)
        return index, sums

    def verify(self, group: int, layer: int, neurons: NDArray[np.int64], rows: U8) -> None:
        """Raise TierError, by name, where `rows` [N, stride] are not the bundles that were written."""
        found = row_checksums(rows.view(np.uint64))
        wrong = np.flatnonzero(found != self.sums[group, layer, neurons])
        if wrong.size:
            neuron = int(neurons[wrong[0]])
            raise TierError(
                f"Neuron {neuron} of layer {layer} ({'+'.join(self.index.groups[group])}) of {self.path} is corrupted: "
                f"{self.index.stride(group)} bytes at {self.index.offset(group, layer, neuron)} have checksum "
                f"{int(found[wrong[0]]):016x}, {int(self.sums[group, layer, neuron]):016x} were written.",
                f"Remove {self.path}: it is made again at the next start.",
            )

    def close(self) -> None:
        """Again is no error."""
        self.file.close()
