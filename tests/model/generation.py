"""Greedy decoding with the torch decoder and the simplest cache that works: the oracle's own output, for tests."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from megalith.model.transformer import Transformer
from megalith.specs.model import ModelSpec


class DenseCache:
    """K and V of S sequences, each a growing tensor per layer; `attend` for rows given sequence by sequence."""

    def __init__(self, spec: ModelSpec, sequences: int) -> None:
        self._spec = spec
        self._kv: list[list[tuple[Tensor, Tensor] | None]] = [[None] * sequences for _ in range(spec.num_layers)]
        self.row_counts: list[int] = []

    def attend(self, layer: int, q_MHE: Tensor, k_MKE: Tensor, v_MKE: Tensor) -> Tensor:
        out, start, window = [], 0, self._spec.layer_window(layer)
        for s, rows in enumerate(self.row_counts):
            end = start + rows
            k, v, known = k_MKE[start:end], v_MKE[start:end], self._kv[layer][s]
            if known is not None:
                k, v = torch.cat((known[0], k)), torch.cat((known[1], v))
            self._kv[layer][s] = (k, v)
            last = torch.arange(k.shape[0] - rows, k.shape[0])[:, None]
            at = torch.arange(k.shape[0])[None]
            seen = at <= last if window is None else (at <= last) & (at > last - window)
            q, k, v = (x.transpose(0, 1)[None] for x in (q_MHE[start:end], k, v))
            scale = self._spec.attention_scale
            mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=True)
            out.append(mixed[0].transpose(0, 1))
            start = end
        return torch.cat(out)


@torch.inference_mode()
def greedy(model: Transformer, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
    """`num_tokens` greedy tokens after each prompt, all prompts in one batch; end-of-text does not stop it."""
    cache = DenseCache(model.spec, len(prompts))
    rows, lengths = prompts, [0] * len(prompts)
    produced: list[list[int]] = [[] for _ in prompts]
    for _ in range(num_tokens):
        cache.row_counts = [len(row) for row in rows]
        tokens = torch.tensor([token for row in rows for token in row])
        positions = torch.cat([torch.arange(n, n + len(row)) for n, row in zip(lengths, rows, strict=True)])
        hidden = model(tokens, positions, cache.attend)
        last = torch.tensor(cache.row_counts).cumsum(0) - 1
        chosen = model.head(hidden[last]).argmax(-1).tolist()
        lengths = [n + len(row) for n, row in zip(lengths, rows, strict=True)]
        rows = [[token] for token in chosen]
        for sequence, token in zip(produced, chosen, strict=True):
            sequence.append(token)
    return produced
