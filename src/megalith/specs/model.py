"""ModelSpec: everything about a decoder-only model that planning, loading and running it need, and nothing else.

One struct serves the catalogue, Hugging Face `config.json`, GGUF metadata, the cost formulas and both runners.
"""

from __future__ import annotations

from typing import Literal

from megalith.base.config import Config

Family = Literal["llama", "qwen2", "qwen3", "gemma3", "mixtral", "gpt2", "opt", "bloom"]
Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
RopeScaling = Literal["none", "linear", "llama3"]


class Rope(Config):
    """Rotary position embedding: angle of pair i at position p is p * theta**(-2i/head_dim), after scaling."""

    theta: float = 10_000.0
    scaling: RopeScaling = "none"
    factor: float = 1.0
    """Linear: positions are divided by it. Llama 3: the low-frequency divisor."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192


class ModelSpec(Config):
    """A decoder-only transformer.

    Shapes: hidden = d, query heads = h, KV heads = k, head_dim = e (h * e need not equal d), ffn = f, vocabulary = v.
    """

    name: str
    family: Family
    num_layers: int
    hidden: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    max_context: int
    norm_eps: float = 1e-5
    norm: Literal["rms", "layer"] = "rms"
    activation: Activation = "silu"
    gated_ffn: bool = True
    """True: down(act(gate(x)) * up(x)), three matrices. False: down(act(up(x))), two."""
    position: Literal["rope", "learned", "alibi"] = "rope"
    rope: Rope = Rope()
    rope_local: Rope | None = None
    """Rotary embedding of the sliding-window layers where it differs (Gemma 3)."""
    num_positions: int = 0
    """Rows of the learned position table (OPT has max_context + 2); 0 unless position is `learned`."""
    tied_embeddings: bool = False
    attention_bias: bool = False
    """Bias on q, k and v (Qwen 2) and, for GPT-likes, on every linear layer (see `linear_bias`)."""
    linear_bias: bool = False
    qk_norm: bool = False
    """RMS norm over head_dim on q and k before the rotary embedding (Qwen 3, Gemma 3)."""
    post_norms: bool = False
    """A further norm on the output of attention and of the FFN, before the residual sum (Gemma 3)."""
    embedding_norm: bool = False
    """Layer norm right after the embedding (BLOOM)."""
    embedding_scale: float = 1.0
    """Multiplies the embedding (Gemma: sqrt(hidden))."""
    query_scale: float | None = None
    """Multiplies q.k; None means head_dim ** -0.5."""
    sliding_window: int | None = None
    """Keys seen by a sliding-window layer, itself included; None: every layer is global."""
    global_layer_period: int = 1
    """Layer i is global when (i + 1) % period == 0; 1 means all are. Ignored without a sliding window."""
    num_experts: int = 0
    experts_per_token: int = 0
    source: str = ""
    """Where the figures come from (paper, model card, file), with a date for the catalogue."""

    def layer_window(self, layer: int) -> int | None:
        """The sliding window of `layer` in tokens, or None where it sees the whole context."""
        if self.sliding_window is None or (layer + 1) % self.global_layer_period == 0:
            return None
        return self.sliding_window

    def kv_elements_per_token(self) -> int:
        """K and V elements that one token adds over all layers: 2 * layers * k * e."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim

    @property
    def attention_scale(self) -> float:
        """What q.k is multiplied by."""
        return self.head_dim**-0.5 if self.query_scale is None else self.query_scale
