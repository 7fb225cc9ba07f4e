"""Attention to a context in parts, merged exactly: what lets one request's KV lie on several instances.

Every part is attended to by itself and gives, for each head, the maximum of its scores, the sum of their exponentials
and the weighted values; whoever asked merges these. DistAttention (Infinite-LLM, arXiv:2401.02669, section 3), after
the online softmax (Milakov and Gimelshein, arXiv:1805.02867):

    m = max_j m_j        l = sum_j exp(m_j - m) l_j        o = sum_j exp(m_j - m) l_j o_j / l

Knows arrays and nothing of blocks or instances. Merging is associative and does not depend on the order, but for
rounding; the size of a Partial does not depend on the context.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


class Partial(NamedTuple):
    """What attention to a part of a context gives; h heads of e values."""

    maximum: Floats
    """(h,): largest score; -inf for an empty part."""
    total: Floats
    """(h,): sum of exp(score - maximum); 0 for an empty part."""
    values: Floats
    """(h, e): the values, weighted and divided by `total`; 0 for an empty part."""

    @property
    def num_bytes(self) -> int:
        """What is sent back of it."""
        return self.maximum.nbytes + self.total.nbytes + self.values.nbytes


def attend(query: Floats, keys: Floats, values: Floats, scale: float) -> Partial:
    """Attention of one row to a part of its context.

    `query` is (h, e), `keys` and `values` (k, t, e) with t tokens and k KV heads, of which h is a multiple. Raises
    ValueError for shapes that do not fit.
    """
    heads, width = query.shape
    kv_heads, tokens, _ = keys.shape
    if keys.shape != values.shape or keys.shape[2] != width or heads % kv_heads:
        raise ValueError(f"a query of {query.shape} cannot attend to keys {keys.shape} and values {values.shape}")
    if not tokens:
        empty = np.full(heads, -np.inf, dtype=np.float32)
        return Partial(empty, np.zeros(heads, dtype=np.float32), np.zeros((heads, width), dtype=np.float32))
    group = heads // kv_heads
    scores = np.einsum("kge,kte->kgt", query.reshape(kv_heads, group, width), keys) * np.float32(scale)
    maximum = scores.max(axis=2)
    weights = np.exp(scores - maximum[:, :, None])
    total = weights.sum(axis=2)
    mixed = np.einsum("kgt,kte->kge", weights, values) / total[:, :, None]
    return Partial(maximum.reshape(heads), total.reshape(heads), mixed.reshape(heads, width))


def merge(parts: Sequence[Partial]) -> Partial:
    """Attention to the whole, from its parts in any order. Raises ValueError without a part."""
    if not parts:
        raise ValueError("nothing to merge")
    maximum = np.max([part.maximum for part in parts], axis=0)
    finite = np.where(np.isfinite(maximum), maximum, np.float32(0.0))
    shares = [np.exp(part.maximum - finite) * part.total for part in parts]
    total = np.sum(shares, axis=0)
    divisor = np.where(total > 0.0, total, np.float32(1.0))
    values = np.sum([share[:, None] * part.values for share, part in zip(shares, parts, strict=True)], axis=0)
    return Partial(maximum, total.astype(np.float32), (values / divisor[:, None]).astype(np.float32))
