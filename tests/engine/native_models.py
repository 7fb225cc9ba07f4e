"""Small random models in any format, a NumPy forward pass with the roundings of the native backend, and batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from megalith.engine.batch import SamplingBatch, StepBatch
from megalith.model.checkpoint import Tensor, expected_shapes
from megalith.model.encode import encode
from megalith.model.formats import FORMATS, dequantize
from megalith.model.rope import inverse_frequencies
from megalith.specs.model import ModelSpec, Rope


def random_raw(rng: np.random.Generator, kind: str, rows: int, cols: int, scale: float = 0.1) -> np.ndarray:
    """Random bytes of format `kind`, [rows, row bytes], whose values are about `scale`."""
    if kind == "F32":
        return (rng.standard_normal((rows, cols)).astype(np.float32) * scale).view(np.uint8).reshape(rows, -1)
    if kind == "F16":
        return (rng.standard_normal((rows, cols)) * scale).astype(np.float16).view(np.uint8).reshape(rows, -1)
    if kind == "BF16":
        wide = (rng.standard_normal((rows, cols)) * scale).astype(np.float32)
        return np.ascontiguousarray(wide.view(np.uint16)[:, 1::2]).view(np.uint8).reshape(rows, -1)
    elements, num_bytes = FORMATS[kind].block_elements, FORMATS[kind].block_bytes
    if kind.startswith("BIPOLAR"):
        return encode((rng.standard_normal((rows, cols)) * scale).astype(np.float32), kind)
    blocks = rng.integers(0, 256, (rows, cols // elements, num_bytes), dtype=np.uint8)
    peak = {"Q4_0": 8, "Q4_1": 8, "Q5_0": 16, "Q5_1": 16, "Q8_0": 127, "Q4_K": 400, "Q5_K": 800, "Q6_K": 2000}[kind]
    halves = rng.uniform(0.5, 1.5, (rows, cols // elements, 2)) * scale / peak
    if kind in ("Q4_1", "Q5_1"):
        halves[..., 1] *= -peak
    where = {"Q6_K": (208, 210)}.get(kind, (0, 4 if kind in ("Q4_1", "Q5_1", "Q4_K", "Q5_K") else 2))
    blocks[..., where[0] : where[1]] = halves.astype(np.float16).view(np.uint8)[..., : where[1] - where[0]]
    return blocks.reshape(rows, -1)


@dataclass
class RandomCheckpoint:
    """Random weights of a spec; matrices in `kind`. Has what NativeRunner uses of a Checkpoint."""

    spec: ModelSpec
    kind: str = "Q8_0"
    seed: int = 0
    head_kind: str = ""
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        for name, shape in expected_shapes(self.spec).items():
            if len(shape) == 2:
                kind = self.head_kind or self.kind if name in ("embed.weight", "head.weight") else self.kind
                raw = random_raw(rng, kind, *shape, scale=1.0 if name == "embed.weight" else shape[1] ** -0.5)
                self.tensors[name] = Tensor(name, shape, kind, raw)
            else:
                middle = 0.0 if name.endswith("bias") else 1.0
                values = (middle + 0.2 * rng.standard_normal(shape)).astype(np.float32)
                self.tensors[name] = Tensor(name, shape, "F32", values.view(np.uint8).reshape(1, -1))

    def names(self) -> list[str]:
        return list(self.tensors)

    def tensor(self, name: str) -> Tensor:
        return self.tensors[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape

    def stored_format(self, name: str) -> str:
        return self.tensors[name].format

    def forget(self, *, cached: bool = True) -> None:
        """There is no file."""

    def formats(self) -> dict[str, int]:
        return {t.format: 1 for t in self.tensors.values()}


def llama(**changes: object) -> ModelSpec:
    base: dict[str, object] = {
        "name": "tiny-llama", "family": "llama", "num_layers": 2, "hidden": 96, "num_heads": 6, "num_kv_heads": 2,
        "head_dim": 16, "ffn": 160, "vocab": 203, "max_context": 512, "tied_embeddings": True,
    }  # fmt: skip
    return ModelSpec(**(base | changes))  # type: ignore[arg-type]


SPECS = {
    "llama": llama(),
    "llama3": llama(
        num_heads=4, num_kv_heads=1, head_dim=48, tied_embeddings=False,
        rope=Rope(theta=1e4, scaling="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                  original_context=64),
    ),
    "qwen2": llama(name="tiny-qwen2", family="qwen2", attention_bias=True, num_kv_heads=6, norm_eps=1e-6),
    "qwen3": llama(name="tiny-qwen3", family="qwen3", qk_norm=True, head_dim=32, num_kv_heads=3),
    "gemma3": llama(
        name="tiny-gemma3", family="gemma3", num_layers=3, qk_norm=True, post_norms=True, activation="gelu_tanh",
        embedding_scale=96**0.5, query_scale=0.2, sliding_window=21, global_layer_period=3, num_heads=2,
        num_kv_heads=1, head_dim=64, rope=Rope(theta=1e6, scaling="linear", factor=8.0), rope_local=Rope(theta=1e4),
    ),
    "many-heads": llama(name="tiny-mqa", num_heads=50, num_kv_heads=1, num_layers=1),
}  # fmt: skip


def quantized(x_MK: np.ndarray) -> np.ndarray:
    """What 8-bit activations with one scale for each group of 32 hold."""
    groups = x_MK.reshape(x_MK.shape[0], -1, 32)
    peak = np.abs(groups).max(axis=2, keepdims=True)
    inverse = np.where(peak > 0, np.float32(127) / np.where(peak > 0, peak, 1), 0).astype(np.float32)
    return (np.rint(groups * inverse) * (peak / np.float32(127))).astype(np.float32).reshape(x_MK.shape)


def bf16(x: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def _norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return (x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + eps)).astype(np.float32) * weight


def forward(
    spec: ModelSpec, checkpoint: RandomCheckpoint, tokens: np.ndarray, exact: bool = False,
    inside: Callable[[np.ndarray], np.ndarray] | None = None,
) -> np.ndarray:  # fmt: skip
    """Logits [M, V] of one sequence; with 8-bit activations and bfloat16 K and V unless `exact`.

    `inside` is what activations of the layers' matrices hold, where that is something else.
    """
    kept_last = (lambda x: x) if exact else quantized
    kept = kept_last if inside is None else inside
    cached = (lambda x: x) if exact else bf16

    def w(name: str) -> np.ndarray:
        t = checkpoint.tensor(name)
        return dequantize(t.raw, t.format, t.shape)

    rows, e = len(tokens), spec.head_dim
    x = w("embed.weight")[tokens] * np.float32(spec.embedding_scale)
    for layer in range(spec.num_layers):
        p = f"layers.{layer}."
        h = kept(_norm(x, w(p + "attn_norm.weight"), spec.norm_eps))
        q, k, v = (h @ w(f"{p}{n}.weight").T for n in "qkv")
        if spec.attention_bias:
            q, k, v = q + w(p + "q.bias"), k + w(p + "k.bias"), v + w(p + "v.bias")
        q, k, v = (t.reshape(rows, -1, e) for t in (q, k, v))
        if spec.qk_norm:
            q, k = _norm(q, w(p + "q_norm.weight"), spec.norm_eps), _norm(k, w(p + "k_norm.weight"), spec.norm_eps)
        window = spec.layer_window(layer)
        rope = spec.rope_local if window is not None and spec.rope_local is not None else spec.rope
        q, k = _rotated(q, rope), cached(_rotated(k, rope))
        h = _attended(spec, q, k, cached(v), window)
        h = kept(h.reshape(rows, -1)) @ w(p + "o.weight").T
        x = x + (_norm(h, w(p + "post_attn_norm.weight"), spec.norm_eps) if spec.post_norms else h)
        h = kept(_norm(x, w(p + "ffn_norm.weight"), spec.norm_eps))
        gate, up = h @ w(p + "gate.weight").T, h @ w(p + "up.weight").T
        if spec.activation == "silu":
            gate = gate / (1 + np.exp(-gate))
        else:
            gate = gate * 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
        h = kept((gate * up).astype(np.float32)) @ w(p + "down.weight").T
        x = x + (_norm(h, w(p + "post_ffn_norm.weight"), spec.norm_eps) if spec.post_norms else h)
    head = w("embed.weight" if spec.tied_embeddings else "head.weight")
    return (kept_last(_norm(x, w("final_norm.weight"), spec.norm_eps)) @ head.T).astype(np.float32)


def _rotated(x_MHE: np.ndarray, rope: Rope) -> np.ndarray:
    rows, _, e = x_MHE.shape
    angles = (np.arange(rows, dtype=np.float32)[:, None] * inverse_frequencies(rope, e).astype(np.float32))[:, None, :]
    a, b = x_MHE[..., : e // 2], x_MHE[..., e // 2 :]
    return np.concatenate(
        [a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles)], -1
    ).astype(np.float32)


def _attended(
    spec: ModelSpec, q_MHE: np.ndarray, k_MKE: np.ndarray, v_MKE: np.ndarray, window: int | None
) -> np.ndarray:
    rows, heads = q_MHE.shape[:2]
    at = np.arange(rows)
    seen = at[None, :] <= at[:, None]
    if window is not None:
        seen &= at[None, :] > at[:, None] - window
    out = np.empty_like(q_MHE)
    for h in range(heads):
        kv = h * spec.num_kv_heads // heads
        scores = (q_MHE[:, h] @ k_MKE[:, kv].T * np.float32(spec.attention_scale)).astype(np.float64)
        scores = np.where(seen, scores, -np.inf)
        p = np.exp(scores - scores.max(1, keepdims=True))
        out[:, h] = (p / p.sum(1, keepdims=True)) @ v_MKE[:, kv]
    return out


def batch_of(
    parts: list[tuple[np.ndarray, int]], tables: list[np.ndarray], outputs: list[list[int]] | None = None
) -> StepBatch:
    """One step over `parts` = (new tokens, tokens before them), with one table each. Default output: each last row."""
    starts = np.cumsum([0] + [len(t) for t, _ in parts]).astype(np.int32)
    width = max(len(t) for t in tables)
    padded = np.zeros((len(parts), width), np.int32)
    for row, table in zip(padded, tables, strict=True):
        row[: len(table)] = table
    positions = np.concatenate([np.arange(before, before + len(t)) for t, before in parts]).astype(np.int32)
    wanted = [[len(t) - 1] for t, _ in parts] if outputs is None else outputs
    rows = np.array([starts[i] + r for i, picks in enumerate(wanted) for r in picks], np.int32)
    return StepBatch(np.concatenate([t for t, _ in parts]).astype(np.int32), positions, starts, padded, rows)


def sampling_of(rows: int, **changes: np.ndarray) -> SamplingBatch:
    """Greedy for every row, but for `changes`."""

    def full(kind: type, value: float = 0) -> np.ndarray:
        return np.full(rows, value, kind)

    fields: dict[str, np.ndarray] = {
        "temperature_N": full(np.float32), "top_k_N": full(np.int32), "top_p_N": full(np.float32, 1),
        "min_p_N": full(np.float32), "repetition_N": full(np.float32, 1), "presence_N": full(np.float32),
        "frequency_N": full(np.float32), "seed_N": full(np.uint64), "draw_N": full(np.uint64),
        "seen_starts_N1": np.zeros(rows + 1, np.int32), "seen_ids": np.zeros(0, np.int32),
        "seen_counts": np.zeros(0, np.int32), "bias_starts_N1": np.zeros(rows + 1, np.int32),
        "bias_ids": np.zeros(0, np.int32), "bias_values": np.zeros(0, np.float32),
        "mask_rows_N": full(np.int32, -1), "masks": np.zeros((0, 0), np.uint32), "targets_N": full(np.int32, -1),
        "num_logprobs_N": full(np.int32, -1),
    }  # fmt: skip
    return SamplingBatch(**(fields | changes))
