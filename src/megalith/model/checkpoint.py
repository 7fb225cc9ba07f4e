"""The weights of a model under one set of names, whatever file they came from.

Canonical names: `embed.weight`, `head.weight` (absent when tied), `final_norm.weight`, and for each layer
`layers.{i}.{q,k,v,o,gate,up,down}.{weight,bias}` (experts: `layers.{i}.router.weight` and
`layers.{i}.experts.{j}.{gate,up,down}.weight`) and
`layers.{i}.{attn_norm,ffn_norm,post_attn_norm,post_ffn_norm,q_norm,k_norm}.weight`.

Two conventions are settled here, so that nobody downstream has to know them: rows of q and k are in Hugging Face order
(rotary pairs are i and i + head_dim / 2), and a norm weight is the multiplier itself. Everything is lazy: a tensor is a
view of the mapped file until someone touches it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from megalith.base.errors import ModelFormatError
from megalith.model.compressed import WeightFiles
from megalith.model.describe import RUNNABLE, spec_from_gguf, spec_from_hf
from megalith.model.formats import dequantize, row_bytes
from megalith.model.gguf import ACTIVATION_BITS_KEY, GgufFile
from megalith.model.source import ModelFiles
from megalith.specs.model import ModelSpec

U8 = NDArray[np.uint8]
F32 = NDArray[np.float32]
_Change = Literal["none", "unpermute", "plus_one"]

_GGUF_LAYER = {
    "attn_norm": "attn_norm", "ffn_norm": "ffn_norm", "post_attn_norm": "post_attention_norm",
    "post_ffn_norm": "post_ffw_norm", "q_norm": "attn_q_norm", "k_norm": "attn_k_norm", "q": "attn_q", "k": "attn_k",
    "v": "attn_v", "o": "attn_output", "gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down", "router": "ffn_gate_inp",
}  # fmt: skip
_GGUF_TOP = {
    "embed.weight": "token_embd.weight",
    "head.weight": "output.weight",
    "final_norm.weight": "output_norm.weight",
}
_HF_LAYER = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm", "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj",
    "o": "self_attn.o_proj", "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
    "router": "block_sparse_moe.gate",
}  # fmt: skip
_HF_EXPERT = {"gate": "w1", "up": "w3", "down": "w2"}
_HF_POST_NORMS = {
    "ffn_norm": "pre_feedforward_layernorm",
    "post_attn_norm": "post_attention_layernorm",
    "post_ffn_norm": "post_feedforward_layernorm",
}
_HF_TRUNKS = ("model.", "", "language_model.model.", "model.language_model.")


@dataclass(frozen=True, slots=True)
class Tensor:
    """One weight. `raw` is uint8 [rows, row_bytes] in `format`; a vector is one row. Treat it as read-only."""

    name: str
    shape: tuple[int, ...]
    format: str
    raw: U8

    def float32(self) -> F32:
        """The exact values, in a fresh writable array of `shape`."""
        return dequantize(self.raw, self.format, self.shape)


@dataclass(frozen=True, slots=True)
class _Entry:
    """How a canonical tensor is had: the file's name for it, and what has to be done to it."""

    file_name: str
    shape: tuple[int, ...]
    format: str
    change: _Change = "none"
    heads: int = 0
    expert: int | None = None
    """Which slice along the first axis of a tensor that stacks all experts."""


class _Files(Protocol):
    def raw(self, name: str) -> U8: ...
    def forget(self, *, cached: bool = True) -> None: ...


class Checkpoint:
    """The weights of one model, checked against its spec when opened, read when asked for."""

    def __init__(
        self, spec: ModelSpec, files: _Files, entries: dict[str, _Entry], activation_bits: int | None = None
    ) -> None:
        self.spec = spec
        self.activation_bits = activation_bits
        """Of what bipolar matrices were meant to be multiplied with, where the file says so."""
        self._files = files
        self._entries = entries

    def names(self) -> list[str]:
        """All canonical names, embedding first, then layer by layer, then the end."""
        return list(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def tensor(self, name: str) -> Tensor:
        """The tensor of canonical `name`. Raises ModelFormatError for a name that this model does not have."""
        entry = self._entries.get(name)
        if entry is None:
            raise ModelFormatError(f"{self.spec.name} has no tensor {name!r}; it has {len(self._entries)} others.")
        raw = self._files.raw(entry.file_name)
        if entry.expert is not None:
            raw = raw.reshape(self.spec.num_experts, -1)[entry.expert]
        if entry.change == "unpermute":
            raw = _unpermuted(raw, entry.heads, entry.shape[0])
        if entry.change == "plus_one":
            values = dequantize(raw, entry.format, entry.shape) + np.float32(1)
            return Tensor(name, entry.shape, "F32", values.view(np.uint8).reshape(1, -1))
        rows = entry.shape[0] if len(entry.shape) > 1 else 1
        return Tensor(name, entry.shape, entry.format, raw.reshape(rows, -1))

    def forget(self, *, cached: bool = True) -> None:
        """Let go of pages of the files that were read so far; see model.mapped."""
        self._files.forget(cached=cached)

    def stored_name(self, name: str) -> str:
        """The file's own name of canonical `name`."""
        return self._entries[name].file_name

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of canonical `name`."""
        return self._entries[name].shape

    def stored_format(self, name: str) -> str:
        """The format in which the file holds canonical `name`."""
        return self._entries[name].format

    def weight_bytes(self) -> int:
        """Bytes of all weights as stored."""
        return sum(self.formats().values())

    def formats(self) -> dict[str, int]:
        """{format: bytes stored in it}, most bytes first."""
        sums: dict[str, int] = {}
        for entry in self._entries.values():
            rows = entry.shape[0] if len(entry.shape) > 1 else 1
            sums[entry.format] = sums.get(entry.format, 0) + rows * row_bytes(entry.format, entry.shape[-1])
        return dict(sorted(sums.items(), key=lambda item: -item[1]))


def expected_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """The canonical tensors of a runnable model and their shapes, in order."""
    d, e = spec.hidden, spec.head_dim
    q, kv = spec.num_heads * e, spec.num_kv_heads * e
    layer: dict[str, tuple[int, ...]] = {"attn_norm.weight": (d,)}
    layer |= {"q.weight": (q, d), "k.weight": (kv, d), "v.weight": (kv, d), "o.weight": (d, q)}
    if spec.attention_bias:
        layer |= {"q.bias": (q,), "k.bias": (kv,), "v.bias": (kv,)}
    if spec.qk_norm:
        layer |= {"q_norm.weight": (e,), "k_norm.weight": (e,)}
    layer |= {"ffn_norm.weight": (d,)}
    ffn: dict[str, tuple[int, ...]] = {"gate": (spec.ffn, d), "up": (spec.ffn, d), "down": (d, spec.ffn)}
    if spec.num_experts:
        layer["router.weight"] = (spec.num_experts, d)
    for at in [f"experts.{j}." for j in range(spec.num_experts)] or [""]:
        layer |= {f"{at}{name}.weight": shape for name, shape in ffn.items()}
    if spec.post_norms:
        layer |= {"post_attn_norm.weight": (d,), "post_ffn_norm.weight": (d,)}
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (spec.vocab, d)}
    for i in range(spec.num_layers):
        shapes |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
    shapes["final_norm.weight"] = (d,)
    if not spec.tied_embeddings:
        shapes["head.weight"] = (spec.vocab, d)
    return shapes


def open_checkpoint(files: ModelFiles) -> Checkpoint:
    """The weights of `files`. Reads headers only.

    Raises ModelFormatError: a family that can only be planned, a tensor that is missing, has a wrong shape or a format
    we do not decode, or a layer tensor that we would have to ignore.
    """
    if files.kind == "gguf":
        return gguf_checkpoint(GgufFile(files.path))
    spec = spec_from_hf(files.path)
    _check_runnable(spec)
    return _hf_checkpoint(spec, WeightFiles(files.path))


def gguf_checkpoint(file: GgufFile) -> Checkpoint:
    """The weights of an opened GGUF file."""
    spec = spec_from_gguf(file)
    _check_runnable(spec)
    stored = {name: (tensor.shape, tensor.type) for name, tensor in file.tensors.items()}
    names = {name: gguf_name(name) for name in expected_shapes(spec)}
    entries = _matched(spec, names, stored, "blk.", str(file.path))
    if spec.family in ("llama", "mixtral"):
        # llama.cpp's converter interleaves the rotary pairs of this family, and of no other that we read.
        for name, entry in entries.items():
            part = name.split(".")[-2]
            if part in ("q", "k"):
                heads = spec.num_heads if part == "q" else spec.num_kv_heads
                entries[name] = _Entry(entry.file_name, entry.shape, entry.format, "unpermute", heads)
    return Checkpoint(spec, file, entries, _activation_bits(file))


def _activation_bits(file: GgufFile) -> int | None:
    bits = file.metadata.get(ACTIVATION_BITS_KEY)
    if bits is None or (type(bits) is int and 1 <= bits <= 8):
        return bits
    raise ModelFormatError(f"{file.path} has {ACTIVATION_BITS_KEY} {bits!r}, which is not from 1 to 8.")


def _hf_checkpoint(spec: ModelSpec, model: WeightFiles) -> Checkpoint:
    stored = model.stored
    trunk = next((t for t in _HF_TRUNKS if f"{t}embed_tokens.weight" in stored), None)
    if trunk is None:
        raise ModelFormatError(
            f"{model.directory} has no tensor embed_tokens.weight; its first is {min(stored, default='none')!r}."
        )
    names = {name: hf_name(name, trunk, spec.post_norms) for name in expected_shapes(spec)}
    entries = _matched(spec, names, stored, f"{trunk}layers.", str(model.directory))
    if spec.family == "gemma3":
        # Gemma's own checkpoints store the multiplier less one.
        for name, entry in entries.items():
            if name.split(".")[-2].endswith("norm"):
                entries[name] = _Entry(entry.file_name, entry.shape, entry.format, "plus_one")
    return Checkpoint(spec, model, entries)


def _check_runnable(spec: ModelSpec) -> None:
    if spec.family not in RUNNABLE:
        raise ModelFormatError(
            f"{spec.name} is of the {spec.family} family, which can be planned but not run.",
            f"Families that run: {', '.join(RUNNABLE)}.",
        )


def _matched(
    spec: ModelSpec,
    names: dict[str, str],
    stored: dict[str, tuple[tuple[int, ...], str]],
    layer_prefix: str,
    origin: str,
) -> dict[str, _Entry]:
    """An entry for every expected tensor; every stored layer tensor must be one of them."""
    entries = {}
    for name, shape in expected_shapes(spec).items():
        found = stored.get(names[name])
        if found is None:
            raise ModelFormatError(
                f"{origin} lacks the tensor {names[name]}, one of {len(names)} that its description needs."
            )
        expert = _expert_of(name) if len(found[0]) == 3 else None
        shape = shape if expert is None else (spec.num_experts, *shape)
        if found[0] != shape:
            raise ModelFormatError(f"{origin}: tensor {names[name]} has shape {found[0]}, but {shape} is needed.")
        row_bytes(found[1], shape[-1])
        entries[name] = _Entry(names[name], shape[-2:], found[1], expert=expert)
    unused = {n for n in stored if n.startswith(layer_prefix) and not n.endswith("rotary_emb.inv_freq")} - set(
        names.values()
    )
    if unused:
        raise ModelFormatError(f"{origin} has {len(unused)} layer tensors that we would ignore, such as {min(unused)}.")
    return entries


def gguf_name(name: str) -> str:
    """The name that GGUF files give to canonical `name`."""
    if name in _GGUF_TOP:
        return _GGUF_TOP[name]
    _, layer, *_, part, kind = name.split(".")
    stacked = "" if _expert_of(name) is None else "_exps"
    return f"blk.{layer}.{_GGUF_LAYER[part]}{stacked}.{kind}"


def _expert_of(name: str) -> int | None:
    """The number of the expert that canonical `name` belongs to."""
    _, _, *path = name.split(".")
    return int(path[1]) if path[:1] == ["experts"] else None


def hf_name(name: str, trunk: str, post_norms: bool) -> str:
    """The name that Hugging Face files give to canonical `name` under `trunk`."""
    if name == "embed.weight":
        return f"{trunk}embed_tokens.weight"
    if name == "final_norm.weight":
        return f"{trunk}norm.weight"
    if name == "head.weight":
        return "language_model.lm_head.weight" if trunk == "language_model.model." else "lm_head.weight"
    _, layer, *_, part, kind = name.split(".")
    if (expert := _expert_of(name)) is not None:
        return f"{trunk}layers.{layer}.block_sparse_moe.experts.{expert}.{_HF_EXPERT[part]}.{kind}"
    words = _HF_LAYER | _HF_POST_NORMS if post_norms else _HF_LAYER
    return f"{trunk}layers.{layer}.{words[part]}.{kind}"


def permuted(raw: U8, heads: int) -> U8:
    """Rows of each head from half order to pair order, as GGUF files of the llama family hold q and k."""
    halves = raw.reshape(heads, 2, raw.shape[0] // heads // 2, -1)
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(raw.shape)


def _unpermuted(raw: U8, heads: int, rows: int) -> U8:
    """Rows of each head from pair order (0, e/2, 1, e/2 + 1, ...) to half order (0, 1, ..., e - 1)."""
    pairs = raw.reshape(heads, rows // heads // 2, 2, -1)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(raw.shape)
