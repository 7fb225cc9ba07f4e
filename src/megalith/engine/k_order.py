"""The order of K's channels, for each layer and KV head: the best of three for the logits of a calibration text.

K is quantised as it is cached, after rotary embedding. Rows of W_q and W_k take the order when weights are loaded, and
each channel takes its angle and its partner along (model.transformer), so that q . k is the same sum in another order
and nothing is moved at run time. Any order of channels is valid so; pairs need not stay side by side. They had better
not: rotation moves what one of a pair has to the other, and side by side they have the larger of both in one block.

Candidates: as it is; by the norms of W_k's rows (K-sort, arXiv:2403.20137); the larger of each pair before the smaller,
both by energy. K-sort alone makes some heads worse, so each head takes what has the least error of its logits.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megalith.model import block_float
from megalith.model.checkpoint import Checkpoint
from megalith.model.transformer import Transformer, causal_attention
from megalith.specs.kv_format import BlockFloat

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]
TEXT = Path(__file__).with_name("calibration.txt")
"""Prose, code and figures, written for this; no part of the text of `megalith perplexity`."""
MOST_TOKENS = 512


def channel_orders(checkpoint: Checkpoint, tokens: list[int], form: BlockFloat) -> I64:
    """Channels [L, K, E] of K in the order that they are cached in, by `tokens` (one sequence, cut to MOST_TOKENS).

    A model is built in float32 for it and goes before this returns.
    """
    tokens, spec = tokens[:MOST_TOKENS], checkpoint.spec
    found = np.zeros((spec.num_layers, spec.num_kv_heads, spec.head_dim), np.int64)
    plain = causal_attention(spec, (0, len(tokens)))

    def attend(layer: int, q_MHE: Tensor, k_MKE: Tensor, v_MKE: Tensor) -> Tensor:
        rows = checkpoint.tensor(f"layers.{layer}.k.weight").float32()
        norms_KE = np.square(rows).sum(1).reshape(found.shape[1:])
        q_MKGE = q_MHE.view(len(tokens), spec.num_kv_heads, -1, spec.head_dim).numpy() * np.float32(
            spec.attention_scale
        )
        for head, norms_E in enumerate(norms_KE):
            found[layer, head] = best_order(q_MKGE[:, head], k_MKE[:, head].numpy(), norms_E, form)
        return plain(layer, q_MHE, k_MKE, v_MKE)

    with torch.inference_mode():
        Transformer(checkpoint)(torch.tensor(tokens), torch.arange(len(tokens)), attend)
    return found


def best_order(q_MGE: F32, k_ME: F32, norms_E: F32, form: BlockFloat) -> I64:
    """Of the candidates the one with the least `logit_error`; the channels as they are where none is better."""
    energy = np.square(k_ME).mean(0)
    able = [np.arange(k_ME.shape[1]), np.argsort(-norms_E, kind="stable"), larger_first(energy)]
    return min(able, key=lambda order: logit_error(q_MGE[..., order], k_ME[:, order], form))


def larger_first(energy_E: F32) -> I64:
    """The channel of each rotary pair (i, i + E / 2) with more energy, by falling energy, then the other ones."""
    first, second = np.split(np.arange(energy_E.size), 2)
    ahead = energy_E[first] >= energy_E[second]
    halves = np.where(ahead, first, second), np.where(ahead, second, first)
    return np.concatenate([half[np.argsort(-energy_E[half], kind="stable")] for half in halves])


def logit_error(q_MGE: F32, k_ME: F32, form: BlockFloat) -> float:
    """Mean square of what encoding K does to scaled logits, less what it does to all of a query's (softmax ignores)."""
    error_EM = (block_float.decode(block_float.encode(k_ME, form), form) - k_ME).T
    logits = q_MGE.reshape(-1, k_ME.shape[1]) @ error_EM
    return float(logits.var(axis=1).mean())
