"""Counting: parameters, active parameters, multiply-adds and FLOPs of a model, from its spec alone.

Knows shapes. Must not know formats, devices or time.
"""

from __future__ import annotations

from dataclasses import dataclass

from megalith.specs.model import ModelSpec


@dataclass(frozen=True, slots=True)
class ParameterCount:
    """Parameters by part of the model; layer parts are summed over all layers.

    `head` is 0 when the head shares the embedding's matrix.
    """

    embedding: int
    positions: int
    head: int
    attention: int
    ffn: int
    router: int
    norms: int
    biases: int

    @property
    def total(self) -> int:
        """All of them; what a model card prints."""
        return self.matrices + self.norms + self.biases

    @property
    def matrices(self) -> int:
        """All weight matrices and tables, without norms and biases."""
        return self.embedding + self.positions + self.head + self.attention + self.ffn + self.router

    @property
    def vectors(self) -> int:
        """Norm weights and biases: the part that no format compresses."""
        return self.norms + self.biases


def attention_weights(spec: ModelSpec) -> int:
    """Weights of q, k, v and o in one layer: d * e * (2h + 2k)."""
    return spec.hidden * spec.head_dim * (2 * spec.num_heads + 2 * spec.num_kv_heads)


def expert_weights(spec: ModelSpec) -> int:
    """Weights of one FFN (one expert where there are several): 3 * d * f gated, else 2 * d * f."""
    return (3 if spec.gated_ffn else 2) * spec.hidden * spec.ffn


def count(spec: ModelSpec) -> ParameterCount:
    """The parameters of `spec`, exactly."""
    d, layers, experts = spec.hidden, spec.num_layers, max(spec.num_experts, 1)
    return ParameterCount(
        embedding=spec.vocab * d,
        positions=spec.num_positions * d,
        head=0 if spec.tied_embeddings else spec.vocab * d,
        attention=layers * attention_weights(spec),
        ffn=layers * experts * expert_weights(spec),
        router=layers * d * spec.num_experts,
        norms=_norms(spec),
        biases=layers * _layer_biases(spec),
    )


def _norms(spec: ModelSpec) -> int:
    width = spec.hidden * (2 if spec.norm == "layer" else 1)
    layer = width * (4 if spec.post_norms else 2) + (2 * spec.head_dim if spec.qk_norm else 0)
    return spec.num_layers * layer + width * (2 if spec.embedding_norm else 1)


def _layer_biases(spec: ModelSpec) -> int:
    biases = 0
    if spec.attention_bias:
        biases += (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
    if spec.linear_bias:
        biases += 2 * spec.hidden + spec.ffn * (2 if spec.gated_ffn else 1)
    return biases


def active_parameters(spec: ModelSpec) -> int:
    """Parameters that one token meets: all, less the experts that it is not sent to."""
    idle = max(spec.num_experts - spec.experts_per_token, 0)
    return count(spec).total - idle * spec.num_layers * expert_weights(spec)


def layer_macs(spec: ModelSpec) -> int:
    """Multiply-adds of one row in the linear parts of all layers (no attention scores, no head)."""
    experts = spec.experts_per_token if spec.num_experts else 1
    layer = attention_weights(spec) + experts * expert_weights(spec) + spec.hidden * spec.num_experts
    return spec.num_layers * layer


def head_macs(spec: ModelSpec) -> int:
    """Multiply-adds of one row of logits: v * d."""
    return spec.vocab * spec.hidden


def seen_tokens(spec: ModelSpec, tokens: int) -> int:
    """Keys that the last of `tokens` tokens reads, summed over layers; sliding windows cut it."""
    if spec.sliding_window is None:
        return spec.num_layers * tokens
    return sum(min(tokens, spec.layer_window(layer) or tokens) for layer in range(spec.num_layers))


def chunk_pairs(spec: ModelSpec, new_tokens: int, context_tokens: int) -> int:
    """Query-key pairs of a chunk over all layers: row i of the chunk sees context + i + 1 keys, at most the window."""
    full = new_tokens * context_tokens + new_tokens * (new_tokens + 1) // 2
    if spec.sliding_window is None:
        return spec.num_layers * full
    local = _windowed_pairs(new_tokens, context_tokens, spec.sliding_window)
    globals_ = spec.num_layers // spec.global_layer_period if spec.global_layer_period > 0 else 0
    return globals_ * full + (spec.num_layers - globals_) * local


def _windowed_pairs(new_tokens: int, context_tokens: int, window: int) -> int:
    """Sum of min(context + i + 1, window) over the rows i of the chunk."""
    below = min(max(window - context_tokens, 0), new_tokens)
    return below * context_tokens + below * (below + 1) // 2 + (new_tokens - below) * window


def flops_per_token(spec: ModelSpec, context_tokens: int = 0, with_head: bool = True) -> int:
    """FLOPs of the forward pass of one token that has `context_tokens` before it (a multiply-add is two)."""
    macs = layer_macs(spec) + (head_macs(spec) if with_head else 0)
    attention = 2 * spec.num_heads * spec.head_dim * seen_tokens(spec, context_tokens + 1)
    return 2 * (macs + attention)


def training_flops(spec: ModelSpec, tokens: int, sequence: int) -> int:
    """Model FLOPs (forward and backward, no recomputation) of `tokens` tokens in sequences of `sequence`: 3 * forward.

    Attention counts every query-key pair, masked or not, as Megatron-LM (arXiv:2104.04473, equation 3) does.
    """
    macs = layer_macs(spec) + head_macs(spec)
    attention = 2 * spec.num_layers * spec.num_heads * spec.head_dim * sequence
    return 3 * 2 * (macs + attention) * tokens


def idle_experts(spec: ModelSpec, rows: int) -> float:
    """The expected share of a layer's routed experts that a step of `rows` rows does not meet, tokens routed evenly."""
    return (1.0 - spec.experts_per_token / spec.num_experts) ** rows
