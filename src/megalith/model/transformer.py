"""The decoder of every family that runs, in plain torch: one class whose parts follow from ModelSpec.

Knows the arithmetic between token ids and logits except attention over the KV cache, which the caller supplies as
`attend`; so it knows no batch, no block and no engine. In float32 it is the oracle for everything faster.

Letters: M rows, N output rows, D hidden, H query heads, K KV heads, E head_dim, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from megalith.base.errors import ModelFormatError
from megalith.model.checkpoint import Checkpoint
from megalith.model.mixture import GatedFfn, Mixture
from megalith.model.rope import inverse_frequencies
from megalith.specs.model import ModelSpec, Rope

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""attend(layer, q_MHE, k_MKE, v_MKE) -> o_MHE: stores K and V, and scales by `spec.attention_scale` within
`spec.layer_window(layer)`. Rotary embedding is already applied. One with a method early(layer, q_MHE) is given q first,
before k and v are computed."""

LinearFactory = Callable[[str, Tensor, Tensor | None], nn.Module]
"""make_linear(name, weight [out, in], bias or None) -> a module from [M, in] to [M, out]; name is canonical."""

FfnFactory = Callable[[Checkpoint, int], nn.Module]
"""make_ffn(checkpoint, layer) -> a module from [M, D] to [M, D] that is the layer's FFN, its norms apart."""

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
}


def plain_linear(name: str, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """torch's own linear layer around the given tensors."""
    del name
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear


@dataclass(frozen=True, slots=True)
class Part:
    """What of a model a process has: some layers, the embedding, the final norm and the head."""

    layers: range | None = None
    """None: all."""
    embedding: bool = True
    head: bool = True


WHOLE = Part()


class Transformer(nn.Module):
    """A model with its weights, or a part of it, in `dtype` on `device`; norms compute in float32.

    The weights are read, decoded and converted one by one, so loading needs little more memory than the result.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        make_linear: LinearFactory = plain_linear,
        made: Callable[[nn.Module], None] | None = None,
        made_expert: Callable[[nn.Module], None] | None = None,
        make_ffn: FfnFactory | None = None,
        part: Part = WHOLE,
        channel_orders: NDArray[np.int64] | None = None,
    ) -> None:
        """`made` is told of each layer as soon as it has its weights, `made_expert` of each expert.

        `channel_orders` [L, K, E]: which channels of q and k come where. Logits stay, K is laid out another way.
        """
        super().__init__()
        self.spec = spec = checkpoint.spec
        self.dtype, self.device = dtype, torch.device(device)
        weights = _Weights(checkpoint, dtype, self.device, make_linear, made_expert)
        weights.make_ffn, weights.channel_orders = make_ffn, channel_orders
        if channel_orders is not None and spec.qk_norm:
            raise ModelFormatError(f"{spec.name} norms q and k alike in all heads: they cannot be put in order.")
        embedding = weights.tensor("embed.weight") if part.embedding else torch.empty(0, spec.hidden, dtype=dtype)
        self.embedding = nn.Parameter(embedding, requires_grad=False)
        self.layers = nn.ModuleList()
        for i in range(spec.num_layers) if part.layers is None else part.layers:
            self.layers.append(_Layer(spec, weights, i))
            if made is not None:
                made(self.layers[-1])
        self.final_norm: nn.Module = nn.Identity()
        self.output: nn.Module = nn.Identity()
        if part.head:
            self.final_norm = weights.norm("final_norm.weight", spec.norm_eps)
            # A tied head is the embedding, seen as a linear layer: no second copy unless the factory makes one.
            shared = spec.tied_embeddings and part.embedding
            name = "embed.weight" if spec.tied_embeddings else "head.weight"
            self.output = make_linear("head.weight", self.embedding.data if shared else weights.tensor(name), None)
        self.rotation = _Rotation(spec, self.device)

    def forward(self, tokens_M: Tensor, positions_M: Tensor, attend: Attend) -> Tensor:
        """Hidden states [M, D] after the final norm, for rows in any order of sequences and positions."""
        return self.run(self.embed(tokens_M), positions_M, attend)

    def embed(self, tokens_M: Tensor) -> Tensor:
        """What goes into the first layer [M, D]."""
        hidden_MD = functional.embedding(tokens_M, self.embedding)
        if self.spec.embedding_scale != 1.0:
            # Rounded to the working type first, as the models were trained.
            hidden_MD = hidden_MD * torch.tensor(self.spec.embedding_scale, dtype=self.dtype, device=self.device)
        return hidden_MD

    def run(self, hidden_MD: Tensor, positions_M: Tensor, attend: Attend) -> Tensor:
        """Through the layers that are here, and the final norm where it is."""
        turns = self.rotation(positions_M, self.dtype)
        for layer in self.layers:
            hidden_MD = layer(hidden_MD, turns, attend)
        normed: Tensor = self.final_norm(hidden_MD)
        return normed

    def head(self, hidden_ND: Tensor) -> Tensor:
        """Float32 logits [N, V] of rows of hidden states."""
        logits: Tensor = self.output(hidden_ND)
        return logits.float()

    def weight_bytes(self) -> int:
        """Bytes of the parameters as they lie in memory, a tied head counted once."""
        seen = {p.data_ptr(): p.nbytes for p in self.parameters()}
        return sum(seen.values())


class _Weights:
    """Tensors of a checkpoint in the type and place that the model computes in."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device: torch.device,
        make_linear: LinearFactory,
        made_expert: Callable[[nn.Module], None] | None,
    ) -> None:
        self._made = made_expert
        if checkpoint.spec.linear_bias or checkpoint.spec.norm != "rms" or checkpoint.spec.position != "rope":
            raise ModelFormatError(f"{checkpoint.spec.name} ({checkpoint.spec.family}) has no torch modules here.")
        self._checkpoint, self._dtype, self._device = checkpoint, dtype, device
        self._make_linear = make_linear
        self.make_ffn: FfnFactory | None = None
        """What makes FFNs, where they are not three matrices in memory."""
        self.channel_orders: NDArray[np.int64] | None = None

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        values = torch.from_numpy(self._checkpoint.tensor(name).float32())
        return values.to(device=self._device, dtype=dtype or self._dtype)

    def norm(self, name: str, eps: float) -> _Norm:
        return _Norm(self.tensor(name, torch.float32), eps)

    def ffn_of(self, spec: ModelSpec, index: int) -> nn.Module:
        if self.make_ffn is not None:
            return self.make_ffn(self._checkpoint, index)
        return self.mixture(spec, f"layers.{index}") if spec.num_experts else self.ffn(spec, f"layers.{index}")

    def linear(self, prefix: str, order: _Order | None = None) -> nn.Module:
        name, bias_name = f"{prefix}.weight", f"{prefix}.bias"
        weight = self.tensor(name)
        bias = self.tensor(bias_name) if bias_name in self._checkpoint else None
        if order is not None:
            rows = order.rows(weight.shape[0])
            weight, bias = weight[rows], bias if bias is None else bias[rows]
        return self._make_linear(name, weight, bias)

    def ffn(self, spec: ModelSpec, at: str) -> GatedFfn:
        gate, up, down = (self.linear(f"{at}.{name}") for name in ("gate", "up", "down"))
        return GatedFfn(gate, up, down, _ACTIVATIONS[spec.activation])

    def mixture(self, spec: ModelSpec, at: str) -> Mixture:
        experts = []
        for number in range(spec.num_experts):
            experts.append(self.ffn(spec, f"{at}.experts.{number}"))
            if self._made is not None:
                self._made(experts[-1])
        return Mixture(self.linear(f"{at}.router"), experts, spec.experts_per_token)


class _Norm(nn.Module):
    """Root-mean-square norm over the last dimension (Zhang and Sennrich, arXiv:1910.07467), in float32."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        normed = functional.rms_norm(x.float(), self.weight.shape, self.weight, self.eps)
        return normed.to(x.dtype)


class _Rotation(nn.Module):
    """Cosines and sines of the rows of one step, for global layers and for sliding-window ones."""

    def __init__(self, spec: ModelSpec, device: torch.device) -> None:
        super().__init__()
        self.full = nn.Buffer(_frequencies(spec.rope, spec.head_dim, device), persistent=False)
        local = spec.rope_local or spec.rope
        self.local = nn.Buffer(_frequencies(local, spec.head_dim, device), persistent=False)
        self.differ = local != spec.rope

    def forward(self, positions_M: Tensor, dtype: torch.dtype) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        full = _turns(positions_M, self.full, dtype)
        return full, _turns(positions_M, self.local, dtype) if self.differ else full


def _frequencies(rope: Rope, head_dim: int, device: torch.device) -> Tensor:
    return torch.from_numpy(inverse_frequencies(rope, head_dim)).to(device=device, dtype=torch.float32)


def _turns(positions_M: Tensor, frequencies: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine [M, 1, E / 2]; the angle itself needs float32 whatever the model's type."""
    angles = positions_M.to(torch.float32)[:, None, None] * frequencies
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _rotated(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding (Su et al., arXiv:2104.09864); the pairs are i and i + E / 2."""
    cos, sin = turn
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class _Order:
    """An order of the channels of q and k: rows of their matrices, and rotary embedding of what comes out."""

    def __init__(self, channels_KE: NDArray[np.int64], heads: int) -> None:
        """`channels_KE`: which channel of each KV head comes where; its query heads take the same."""
        channels = torch.from_numpy(channels_KE)
        kv_heads, size = channels.shape
        self._channels_KE, self._heads, self._pairs = channels, heads, size // 2
        places = channels.argsort(-1)  # Of each channel.
        self._partners_KE = places.gather(1, (channels + self._pairs) % size)
        self._signs_KE = torch.where(channels < self._pairs, -1.0, 1.0)
        self._starts = {each: torch.arange(each)[:, None] * size for each in (heads, kv_heads)}

    def rows(self, outputs: int) -> Tensor:
        """Which rows of W_q or W_k [outputs, D] come where."""
        return self._of_heads(self._channels_KE, outputs // (2 * self._pairs))

    def rotated(self, x_MHE: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        """As `_rotated`, every channel with the angle and the partner that it had before."""
        heads = x_MHE.shape[1]
        each = heads // self._channels_KE.shape[0]
        cos, sin = (part[:, 0][:, self._channels_KE % self._pairs] for part in turn)
        sin = sin * self._signs_KE.to(sin.dtype)
        partners = x_MHE.flatten(1)[:, self._of_heads(self._partners_KE, heads)].view(x_MHE.shape)
        return x_MHE * cos.repeat_interleave(each, 1) + partners * sin.repeat_interleave(each, 1)

    def _of_heads(self, places_KE: Tensor, heads: int) -> Tensor:
        """Places within each head as places in all of them."""
        return (self._starts[heads] + places_KE.repeat_interleave(heads // places_KE.shape[0], 0)).flatten()


class _Layer(nn.Module):
    """One block: attention and FFN, each with a residual sum around it."""

    def __init__(self, spec: ModelSpec, weights: _Weights, index: int) -> None:
        super().__init__()
        at, eps = f"layers.{index}", spec.norm_eps
        self.index = index
        self.heads, self.head_dim = (spec.num_heads, spec.num_kv_heads), spec.head_dim
        self.local = spec.layer_window(index) is not None
        self.attn_norm = weights.norm(f"{at}.attn_norm.weight", eps)
        self.ffn_norm = weights.norm(f"{at}.ffn_norm.weight", eps)
        orders = weights.channel_orders
        self.order = None if orders is None else _Order(orders[index], spec.num_heads)
        self.q, self.k = (weights.linear(f"{at}.{name}", self.order) for name in "qk")
        self.v, self.o = (weights.linear(f"{at}.{name}") for name in "vo")
        self.ffn = weights.ffn_of(spec, index)
        same: nn.Module = nn.Identity()
        self.q_norm = weights.norm(f"{at}.q_norm.weight", eps) if spec.qk_norm else same
        self.k_norm = weights.norm(f"{at}.k_norm.weight", eps) if spec.qk_norm else same
        self.post_attn_norm = weights.norm(f"{at}.post_attn_norm.weight", eps) if spec.post_norms else same
        self.post_ffn_norm = weights.norm(f"{at}.post_ffn_norm.weight", eps) if spec.post_norms else same

    def forward(self, hidden_MD: Tensor, turns: tuple[tuple[Tensor, Tensor], ...], attend: Attend) -> Tensor:
        rows, (heads, kv_heads), turn = hidden_MD.shape[0], self.heads, turns[1 if self.local else 0]
        x = self.attn_norm(hidden_MD)
        q_MHE = self._turned(self.q_norm(self.q(x).view(rows, heads, self.head_dim)), turn)
        if (early := getattr(attend, "early", None)) is not None:  # attention elsewhere: q leaves before k, v exist
            early(self.index, q_MHE)
        k_MKE = self._turned(self.k_norm(self.k(x).view(rows, kv_heads, self.head_dim)), turn)
        v_MKE = self.v(x).view(rows, kv_heads, self.head_dim)
        attended = attend(self.index, q_MHE, k_MKE, v_MKE).reshape(rows, heads * self.head_dim)
        hidden_MD = hidden_MD + self.post_attn_norm(self.o(attended))
        x = self.ffn_norm(hidden_MD)
        result: Tensor = hidden_MD + self.post_ffn_norm(self.ffn(x))
        return result

    def _turned(self, x_MHE: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        return _rotated(x_MHE, turn) if self.order is None else self.order.rotated(x_MHE, turn)


def causal_attention(spec: ModelSpec, row_starts: Sequence[int]) -> Attend:
    """`attend` without a cache: rows [row_starts[s], row_starts[s + 1]) are a whole sequence from position 0."""

    def attend(layer: int, q_MHE: Tensor, k_MKE: Tensor, v_MKE: Tensor) -> Tensor:
        window = spec.layer_window(layer)
        pieces = []
        for start, end in itertools.pairwise(row_starts):
            q, k, v = (x[start:end].transpose(0, 1)[None] for x in (q_MHE, k_MKE, v_MKE))
            seen = torch.ones(end - start, end - start, dtype=torch.bool, device=q.device).tril()
            if window is not None:
                seen = seen.triu(1 - window)
            out = functional.scaled_dot_product_attention(
                q, k, v, attn_mask=seen, scale=spec.attention_scale, enable_gqa=True
            )
            pieces.append(out[0].transpose(0, 1))
        return torch.cat(pieces)

    return attend
