"""Linear layers as the processor likes them: weights prepacked through oneDNN where this build of torch can do that.

Knows matrices; knows no model. A packed weight is an opaque tensor: it can be multiplied with, nothing else.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn

from megalith.model.transformer import plain_linear

log = logging.getLogger(__name__)
_PACK_ROWS = 32
"""Rows that the packed layout is chosen for; within a few per cent of the best from 1 to 256 rows on the CPUs tried."""


def cpu_has_bf16() -> bool:
    """Whether oneDNN multiplies bfloat16 matrices with this processor's own instructions."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class PackedLinear(nn.Module):
    """y = x W^T + b with W in oneDNN's blocked layout."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, _PACK_ROWS)
        self.bias = bias
        self.weight_bytes = weight.nbytes

    def forward(self, x: Tensor) -> Tensor:
        """[M, in] to [M, out]."""
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return out


def packed_linear(name: str, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A packed layer where packing works here, else torch's own.

    The head stays as it is: tied to the embedding, a packed copy would cost its memory twice.
    """
    if name == "head.weight" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return plain_linear(name, weight, bias)
    try:
        return PackedLinear(weight, bias)
    except RuntimeError as error:
        log.debug("%s cannot be packed: %s", name, error)
        return plain_linear(name, weight, bias)
