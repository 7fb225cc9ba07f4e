"""Bytes: weights by format, KV cache, activations and overhead of one instance, each with the formula that gives it.

Knows how many bytes things take. Must not know how fast they move.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megalith.base.config import Config
from megalith.base.errors import ConfigError
from megalith.base.units import MIB
from megalith.cost.parameters import count, expert_weights
from megalith.specs.kv_format import is_block_float, parse_kv_format
from megalith.specs.model import ModelSpec
from megalith.specs.plan import MemoryLine

FORMATS: dict[str, tuple[int, int]] = {
    "f32": (1, 4), "fp32": (1, 4), "float32": (1, 4), "f16": (1, 2), "fp16": (1, 2), "bf16": (1, 2),
    "fp8": (1, 1), "int8": (32, 34), "int4": (32, 18), "fp4": (16, 9),
    "q8_0": (32, 34), "q5_1": (32, 24), "q5_0": (32, 22), "q4_1": (32, 20), "q4_0": (32, 18),
    "q6_k": (256, 210), "q5_k": (256, 176), "q4_k": (256, 144), "q3_k": (256, 110), "q2_k": (256, 84),
} | {f"bipolar{n}": (64, 2 + 8 * n) for n in range(1, 9)}  # fmt: skip
"""{format: (elements of a block, bytes of a block)}. q*: GGUF. int8 and int4: one fp16 scale for 32 values. fp4: one
fp8 scale for 16. bipolar: n bits and one fp16 scale for 64 (docs/guides/bipolar-int.md)."""

PANEL_WEIGHTS = 512
"""16 output columns x 32 inputs: the unit in which the native CPU backend packs weights."""
PANEL_BYTES = {
    "q4_0": 288, "q4_1": 320, "q4_k": 384, "q8_0": 544, "q5_0": 544, "q5_1": 576, "q5_k": 640, "q6_k": 576,
    "f32": 576, "f16": 576, "bf16": 576,
} | {f"bipolar{n}": 16 + 64 * n for n in range(1, 9)}  # fmt: skip
"""Bytes of one such panel record by file format: 4 or 8 bits a weight, 16 scales and, where the format has them, 16
minima, in half floats or (K-quants, Q6_K and floats) in floats. Source: engine/native/c/pack.c."""

KV_FORMATS = ("bf16", "f16", "fp16", "f32", "fp32", "float32", "fp8")
SHRINKING = {
    "native": ("q8_0", "q4_1"),
    "torch-cpu": ("bf16",),
    "cuda": ("bf16", "fp8", "q6_k", "q5_k", "q4_k"),
}
"""Formats offered as a remedy to each kind of runner, from the largest to the smallest."""


def block_of(name: str) -> tuple[int, int]:
    """(elements, bytes) of one block of a format. Raises ConfigError that lists the formats."""
    try:
        return FORMATS[name.lower()]
    except KeyError:
        raise ConfigError(f"{name!r} is not a weight format.", f"Known: {', '.join(FORMATS)}.") from None


def encoded_bytes(elements: int, name: str) -> int:
    """Bytes of `elements` values in a format, whole blocks."""
    per_block, block_bytes = block_of(name)
    return math.ceil(elements / per_block) * block_bytes


def packed_bytes(elements: int, name: str) -> int:
    """Bytes that the native backend packs `elements` weights of a file format into."""
    name = {"fp32": "f32", "float32": "f32", "fp16": "f16"}.get(name.lower(), name.lower())
    if name not in PANEL_BYTES:
        raise ConfigError(f"The native backend does not pack {name!r}.", f"It packs {', '.join(PANEL_BYTES)}.")
    return math.ceil(elements / PANEL_WEIGHTS) * PANEL_BYTES[name]


def mac_times(name: str, activation_bits: int = 8) -> float:
    """Time of a multiply-add over that of the native backend's 4-bit kernel; 1 but for bipolar formats.

    A constant and a share for each pair of bit planes, measured on one AVX2 core (`megalith reproduce bipolar-int`:
    32 rows by 1,536 x 576 weights, times over Q4_0's).
    """
    if not name.lower().startswith("bipolar"):
        return 1.0
    return 0.58 + 0.22 * int(name[-1]) * activation_bits


def bits_per_weight(name: str) -> float:
    """Bits of one weight in a format, scales included."""
    per_block, block_bytes = block_of(name)
    return 8.0 * block_bytes / per_block


class WeightBytes(Config, kw_only=True):
    """Weights of an instance in memory, split by how a step reads them."""

    format: str
    layers: int
    """Matrices of all layers: read once a step (all experts counted)."""
    experts: int
    """The part of `layers` that belongs to routed experts; 0 for a dense model."""
    head: int
    """The matrix that makes logits."""
    tables: int
    """Embedding and position tables that are not the head as well: read by the row only."""
    vectors: int
    """Norms and biases."""
    source: str = "formula"
    """`formula`, or the file whose tensors were summed."""
    mac_times: float = 1.0
    """Time of a multiply-add of the layers over that of the profile's kernel."""

    @property
    def total(self) -> int:
        """All of them."""
        return self.layers + self.head + self.tables + self.vectors


def default_head_format(spec: ModelSpec, name: str) -> str:
    """The format of embedding and head when the layers are in `name`.

    Four- and five-bit files keep a tied embedding in q8_0, as the published SmolLM2 and Gemma 3 files do; an untied
    one follows the layers. Beside bipolar layers both are q8_0.
    """
    if name.startswith("bipolar"):
        return "q8_0"
    small = bits_per_weight(name) < 8.0
    return "q8_0" if small and spec.tied_embeddings and name.startswith("q") else name


def weight_bytes(spec: ModelSpec, name: str, head_format: str | None = None) -> WeightBytes:
    """Bytes of the weights of `spec` in a format. Vectors stay float32, except beside 16-bit matrices."""
    name = name.lower()
    head = head_format or default_head_format(spec, name)
    parameters = count(spec)
    vector_bytes = 2 if name in ("bf16", "f16", "fp16") else 4
    routed = spec.num_layers * spec.num_experts * expert_weights(spec)
    tables = parameters.positions + (0 if spec.tied_embeddings else parameters.embedding)
    return WeightBytes(
        format=name if head == name else f"{name} (head {head})",
        layers=encoded_bytes(parameters.attention + parameters.ffn + parameters.router, name),
        experts=encoded_bytes(routed, name) if routed else 0,
        head=encoded_bytes(spec.vocab * spec.hidden, head),
        tables=encoded_bytes(tables, head) if tables else 0,
        vectors=parameters.vectors * vector_bytes,
    )


def kv_bytes_per_token(spec: ModelSpec, kv_format: str = "bf16") -> int:
    """Bytes that one token adds to the KV cache: 2 * layers * KV heads * head size * bytes of a value."""
    if is_block_float(kv_format) and (form := parse_kv_format(kv_format)) is not None:
        return form.token_bytes(spec)
    if kv_format.lower() not in KV_FORMATS:
        raise ConfigError(f"{kv_format!r} is not a KV format.", f"Known: {', '.join(KV_FORMATS)}, bfp4:block=32.")
    return encoded_bytes(spec.kv_elements_per_token(), kv_format)


def kv_block_bytes(spec: ModelSpec, block_tokens: int, kv_format: str = "bf16") -> int:
    """Bytes of one KV block over all layers. The paged cache keeps every token in every layer, sliding or not."""
    return kv_bytes_per_token(spec, kv_format) * block_tokens


def blocks_for(tokens: int, block_tokens: int) -> int:
    """Blocks that hold `tokens` tokens of one sequence."""
    return -(-tokens // block_tokens)


@dataclass(frozen=True, slots=True)
class Residency:
    """What an instance keeps in memory beside weights and KV, by kind of runner."""

    base_bytes: int
    """The process before any model: interpreter, libraries, device context."""
    base_note: str
    row_value_bytes: int
    """Bytes of one activation value of a row."""
    logit_bytes: int
    """Bytes of one logit while sampling."""
    margin: float
    """Part of weights + KV + activations that allocators lose to rounding and fragmentation."""


RESIDENCY: dict[str, Residency] = {
    "native": Residency(64 * MIB, "interpreter, NumPy, native library", 4, 8, 0.01),
    "torch-cpu": Residency(384 * MIB, "interpreter, PyTorch CPU libraries", 4, 12, 0.03),
    "cuda": Residency(1200 * MIB, "device context 600 MiB, CUDA graphs and workspaces 600 MiB", 2, 8, 0.03),
}
"""Sources: `native` and `torch-cpu` measured on the reference machine by `megalith bench` (docs/prediction.md); `cuda`
is an assumption until a GPU run corrects it."""


def row_values(spec: ModelSpec) -> int:
    """Activation values that one row needs at once: residual, q, k, v, attention output, and the FFN's inner rows."""
    attention = (2 * spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
    ffn = spec.ffn * (2 if spec.gated_ffn else 1) * max(spec.experts_per_token, 1)
    return 3 * spec.hidden + attention + ffn


@dataclass(frozen=True, slots=True)
class Workspace:
    """What sizes the working memory of a step."""

    rows: int
    """Rows of the largest step."""
    outputs: int
    """Rows that give logits."""
    context: int = 0
    """Longest sequence: attention scores of the native backend."""
    threads: int = 1
    activation_bits: int = 0
    """Bit planes of activations, beside bipolar weights of the native backend."""


NATIVE_LOGIT_ROWS, NATIVE_TILE_QUERIES = 32, 24
"""Rows of logits at once, and query vectors of one attention tile, of the native backend (engine/native/c/model.h)."""


def activation_bytes(spec: ModelSpec, kind: str, work: Workspace) -> tuple[int, str]:
    """(bytes, formula) of the working memory of a step."""
    if kind == "native":
        return _native_workspace(spec, work)
    residency = RESIDENCY[kind]
    size = work.rows * row_values(spec) * residency.row_value_bytes + work.outputs * spec.vocab * residency.logit_bytes
    return size, (
        f"{work.rows} rows x {row_values(spec):,} values x {residency.row_value_bytes} B + "
        f"{work.outputs} outputs x {spec.vocab:,} logits x {residency.logit_bytes} B"
    )


def _native_workspace(spec: ModelSpec, work: Workspace) -> tuple[int, str]:
    """The workspace of the native backend: rows, logits of 32 rows, and for each thread scores and a sampler."""
    heads, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    widest = max(spec.hidden, heads, spec.ffn)
    wide = max(heads + 2 * kv, 2 * spec.ffn, spec.hidden)
    row = 4 * (spec.hidden + wide + heads + 2 * spec.head_dim) + widest * 5 // 4 + 16
    if work.activation_bits:
        row += widest * work.activation_bits // 4 + widest // 16
    logits = NATIVE_LOGIT_ROWS * spec.vocab * 4
    thread = 4 * (widest + NATIVE_TILE_QUERIES * max(16, work.context) + 3 * spec.vocab) + 64 * 1024
    formula = (
        f"{work.rows} rows x {row:,} B + {NATIVE_LOGIT_ROWS} rows x {spec.vocab:,} logits x 4 B + "
        f"{work.threads} threads x {thread:,} B"
    )
    return work.rows * row + logits + work.threads * thread, formula


@dataclass(frozen=True, slots=True)
class MemoryRequest:
    """What `itemise` needs to know beside the model and its weights."""

    kind: str
    """A key of RESIDENCY."""
    kv_format: str
    block_tokens: int
    num_blocks: int
    work: Workspace
    devices: int = 1
    """Tensor-parallel degree."""
    num_host_blocks: int = 0


def per_device_weights(weights: WeightBytes, devices: int) -> int:
    """Matrices are cut over the devices; vectors are on each."""
    return -(-(weights.total - weights.vectors) // devices) + weights.vectors


def per_device_kv_heads(spec: ModelSpec, devices: int) -> int:
    """KV heads that one of `devices` holds; fewer heads than devices are repeated."""
    return max(1, -(-spec.num_kv_heads // devices))


def device_block_bytes(spec: ModelSpec, request: MemoryRequest) -> int:
    """Bytes of one KV block on one device."""
    share = per_device_kv_heads(spec, request.devices) / spec.num_kv_heads
    return round(kv_block_bytes(spec, request.block_tokens, request.kv_format) * share)


def itemise(spec: ModelSpec, weights: WeightBytes, request: MemoryRequest) -> tuple[MemoryLine, ...]:
    """Memory of one device of an instance, line by line; the lines add up to what is needed."""
    residency = RESIDENCY[request.kind]
    cut = f" / {request.devices} devices" if request.devices > 1 else ""
    block = device_block_bytes(spec, request)
    weights_here = per_device_weights(weights, request.devices)
    kv_here = request.num_blocks * block
    activations, how = activation_bytes(spec, request.kind, request.work)
    lines = [
        MemoryLine(item="weights", num_bytes=weights_here, formula=_weights_formula(weights) + cut),
        MemoryLine(
            item="kv", num_bytes=kv_here,
            formula=f"{request.num_blocks:,} blocks x {request.block_tokens} tokens x "
            f"{block // request.block_tokens:,} B ({request.kv_format})",
        ),
        MemoryLine(
            item="activations", num_bytes=activations, formula=how,
        ),
    ]  # fmt: skip
    if request.num_host_blocks:
        lines.append(
            MemoryLine(item="host_kv", num_bytes=request.num_host_blocks * block,
                       formula=f"{request.num_host_blocks:,} blocks for swapped requests")
        )  # fmt: skip
    if request.devices > 1:
        lines.append(
            MemoryLine(item="links", num_bytes=256 * MIB, formula="buffers of the collectives (assumption: 256 MiB)")
        )
    lines.append(MemoryLine(item="overhead", num_bytes=residency.base_bytes, formula=residency.base_note))
    rounding = round(residency.margin * sum(line.num_bytes for line in lines[:3]))
    lines.append(
        MemoryLine(item="margin", num_bytes=rounding, formula=f"{residency.margin:.0%} of weights, kv and activations")
    )
    return tuple(lines)


def _weights_formula(weights: WeightBytes) -> str:
    if weights.source != "formula":
        return f"{weights.format}, {weights.source}"
    parts = [f"layers {weights.layers:,}", f"head {weights.head:,}"]
    if weights.tables:
        parts.append(f"tables {weights.tables:,}")
    return f"{weights.format}: " + " + ".join([*parts, f"norms and biases {weights.vectors:,} B"])
