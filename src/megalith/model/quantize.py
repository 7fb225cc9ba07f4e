"""Writing a model again with its weights in another format, tensor by tensor, in bounded memory.

Knows which tensors take which format and what a GGUF file needs besides weights. A GGUF source keeps its metadata and
its row order byte for byte (blocks never cross rows, so the order of rows does not matter to encoding); a Hugging Face
source is brought into GGUF's conventions: rows of q and k of the llama family in pair order, norms as multipliers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megalith.base.errors import ConfigError, ModelFormatError
from megalith.model.checkpoint import Checkpoint, gguf_checkpoint, gguf_name, open_checkpoint, permuted
from megalith.model.encode import encode, writable
from megalith.model.formats import FORMATS, dequantize
from megalith.model.gguf import ACTIVATION_BITS_KEY, GgufFile
from megalith.model.gguf_metadata import pairs_from_hf
from megalith.model.gguf_write import NewTensor, pair, write_gguf
from megalith.model.source import ModelFiles

U8 = NDArray[np.uint8]
Advance = Callable[[int], None]
"""Told how many bytes more have been written."""

_PIECE_ELEMENTS = 1 << 20
EXACT = ("F32", "F16", "BF16")
_FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "BF16": 32}
FALLBACK = "F16"
"""For matrices whose rows the format's blocks do not divide."""
TABLES = ("embed", "head")


@dataclass(frozen=True, slots=True)
class Recipe:
    """Formats: `to` for matrices, `keep` for exceptions by part (`embed`, `q`, `down`, ...) or `layers.3.down`.

    Embedding and head take Q8_0 under a bipolar or a 4 or 5 bit `to` unless `keep` says otherwise: they are read once
    a step, and their errors reach every token.
    """

    to: str
    keep: Mapping[str, str] = field(default_factory=dict)
    activation_bits: int | None = None
    """Of what bipolar matrices are to be multiplied with; written to the file."""

    @staticmethod
    def of(text: str, keep: Mapping[str, str]) -> Recipe:
        """`text` as people write it: a format, or bipolar4a8 for weights of 4 and activations of 8 bits."""
        match = re.fullmatch(r"(BIPOLAR[1-8])A([1-8])", text.upper())
        if match is None:
            return Recipe(text.upper(), keep)
        return Recipe(match.group(1), keep, int(match.group(2)))

    def __post_init__(self) -> None:
        for name in (self.to, *self.keep.values()):
            if name not in writable():
                raise ConfigError(f"Weights cannot be written as {name}.", f"Take one of {', '.join(writable())}.")

    def format_of(self, name: str, shape: tuple[int, ...]) -> str:
        """The format of canonical tensor `name`."""
        if len(shape) < 2:
            return "F32"
        stem = name.rpartition(".")[0]
        part = stem.rpartition(".")[2]
        wanted = self.keep.get(stem) or self.keep.get(part)
        if wanted is None:
            wanted = "Q8_0" if part in TABLES and self.to[:2] in ("Q4", "Q5", "BI") else self.to
        return wanted if shape[-1] % FORMATS[wanted].block_elements == 0 else FALLBACK

    def check_used(self, names: list[str]) -> None:
        """Raise ConfigError for an exception that no tensor meets, and for a model that cannot be written."""
        if any(name.endswith(".router.weight") for name in names):
            raise ConfigError("A mixture of experts cannot be quantized yet.", "Take a dense model.")
        stems = {name.rpartition(".")[0] for name in names}
        known = stems | {stem.rpartition(".")[2] for stem in stems}
        for key in self.keep:
            if key not in known:
                parts = sorted({stem.rpartition(".")[2] for stem in stems if "norm" not in stem})
                raise ConfigError(f"This model has no tensor {key!r} to keep.", f"Parts: {', '.join(parts)}.")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was written."""

    path: Path
    num_bytes: int
    formats: dict[str, int]
    """{format: bytes in it}."""
    requantized: dict[str, int]
    """{lossy source format: tensors that were encoded from it}: their old error stays and the new one is added."""
    fallbacks: tuple[str, ...]
    """Tensors that took F16, because their rows are no multiple of the format's block."""


@dataclass(frozen=True, slots=True)
class Job:
    """One tensor: what it will be, what it is, and where its bytes are when asked for."""

    new: NewTensor
    source_format: str
    raw: Callable[[], U8]


def total_bytes(files: ModelFiles, recipe: Recipe) -> int:
    """Bytes of tensor data that `quantize` will write."""
    return sum(job.new.num_bytes for job in _jobs(files, recipe)[1])


def quantize(
    files: ModelFiles, recipe: Recipe, path: Path, *, force: bool = False, advance: Advance | None = None
) -> Outcome:
    """Write the model at `files` to the GGUF file `path`. Raises what its parts raise; never leaves half a file."""
    pairs, jobs = _jobs(files, recipe)
    if path.exists() and files.path.resolve() == path.resolve():
        raise ConfigError(f"{path} is the model that is being read.", "Give another name.")
    if recipe.to in _FILE_TYPES:
        pairs = [*pairs, pair("general.file_type", _FILE_TYPES[recipe.to])]
    if recipe.activation_bits is not None:
        pairs = [*pairs, pair(ACTIVATION_BITS_KEY, recipe.activation_bits)]
    tensors = [job.new for job in jobs]
    size = write_gguf(path, pairs, tensors, _pieces(jobs, advance), force=force)
    return outcome_of(path, size, jobs, recipe)


def outcome_of(path: Path, size: int, jobs: Sequence[Job], recipe: Recipe) -> Outcome:
    """What was written, from what was asked."""
    formats: dict[str, int] = {}
    requantized: dict[str, int] = {}
    for job in jobs:
        formats[job.new.format] = formats.get(job.new.format, 0) + job.new.num_bytes
        if job.source_format not in EXACT and job.source_format != job.new.format:
            requantized[job.source_format] = requantized.get(job.source_format, 0) + 1
    size_of = FORMATS[recipe.to].block_elements
    short = tuple(job.new.name for job in jobs if len(job.new.shape) > 1 and job.new.shape[-1] % size_of)
    return Outcome(path, size, formats, requantized, short)


def _jobs(files: ModelFiles, recipe: Recipe) -> tuple[list[bytes], list[Job]]:
    if files.kind == "gguf":
        return _gguf_jobs(GgufFile(files.path), recipe)
    checkpoint = open_checkpoint(files)
    recipe.check_used(checkpoint.names())
    return pairs_from_hf(checkpoint.spec, files.path), [_hf_job(checkpoint, n, recipe) for n in checkpoint.names()]


def _gguf_jobs(file: GgufFile, recipe: Recipe) -> tuple[list[bytes], list[Job]]:
    checkpoint = gguf_checkpoint(file)
    recipe.check_used(checkpoint.names())
    canonical = {checkpoint.stored_name(name): name for name in checkpoint.names()}
    jobs = []
    for name, tensor in file.tensors.items():
        ours = canonical.get(name)
        # What the model does not know (rope_freqs.weight, say) is copied as it is.
        kind = tensor.type if ours is None else recipe.format_of(ours, tensor.shape)
        jobs.append(Job(NewTensor(name, tensor.shape, kind), tensor.type, lambda name=name: file.raw(name)))  # type: ignore[misc]
    # The new file is one file with our own alignment.
    dropped = ("split.", "general.file_type", "general.alignment", "megalith.")
    return [file.metadata_bytes(key) for key in file.metadata if not key.startswith(dropped)], jobs


def _hf_job(checkpoint: Checkpoint, name: str, recipe: Recipe) -> Job:
    spec = checkpoint.spec
    part = name.split(".")[-2]
    heads = {"q": spec.num_heads, "k": spec.num_kv_heads}.get(part, 0) if spec.family == "llama" else 0
    kind, shape = checkpoint.stored_format(name), checkpoint.shape(name)
    if kind not in FORMATS:
        raise ModelFormatError(f"Tensor {name} is {kind}, which cannot be read.")

    def raw() -> U8:
        tensor = checkpoint.tensor(name)
        # A norm that is stored less one comes as F32 whatever the file holds; a vector is F32 in GGUF anyway.
        data = tensor.float32().view(np.uint8) if len(shape) == 1 else tensor.raw
        return permuted(data.reshape(shape[0], -1), heads) if heads else data

    new = NewTensor(gguf_name(name), shape, recipe.format_of(name, shape))
    return Job(new, "F32" if len(shape) == 1 else kind, raw)


def _pieces(jobs: list[Job], advance: Advance | None) -> Iterator[U8]:
    for job in jobs:
        for piece in encoded(job):
            yield piece
            if advance is not None:
                advance(piece.size)


def encoded(job: Job) -> Iterator[U8]:
    """The tensor's new bytes, a few MiB of weights at a time. The same format is copied, not encoded again."""
    columns = job.new.shape[-1]
    rows = int(np.prod(job.new.shape[:-1], dtype=np.int64))
    raw = job.raw().reshape(rows, -1)
    stride = max(1, _PIECE_ELEMENTS // columns)
    for start in range(0, rows, stride):
        part = raw[start : start + stride]
        if job.source_format == job.new.format:
            yield part
            continue
        try:
            yield encode(dequantize(part, job.source_format, (len(part), columns)), job.new.format)
        except ModelFormatError as error:
            raise ModelFormatError(f"{job.new.name}, rows from {start}: {error.what}", error.hint) from None
