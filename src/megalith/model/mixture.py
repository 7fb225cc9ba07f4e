"""The FFN of a mixture of experts: a router sends each row to a few of many FFNs (Mixtral, arXiv:2401.04088).

Knows rows and experts. Whoever keeps experts elsewhere is told which are wanted before the first of them runs.

Letters: M rows, D hidden, X experts, T experts of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

Activation: TypeAlias = Callable[[Tensor], Tensor]
Wanted: TypeAlias = Callable[[Sequence[nn.Module]], None]


class GatedFfn(nn.Module):
    """down(act(gate(x)) * up(x)), [M, D] to [M, D]."""

    def __init__(self, gate: nn.Module, up: nn.Module, down: nn.Module, activation: Activation) -> None:
        super().__init__()
        self.gate, self.up, self.down = gate, up, down
        self.activation = activation

    def forward(self, x_MD: Tensor) -> Tensor:
        """The FFN of each row."""
        result: Tensor = self.down(self.activation(self.gate(x_MD)) * self.up(x_MD))
        return result


class Mixture(nn.Module):
    """Each row goes through the `per_row` experts that the router likes best; their softmax over these alone weighs."""

    def __init__(self, router: nn.Module, experts: Sequence[GatedFfn], per_row: int) -> None:
        super().__init__()
        self.router, self.experts, self.per_row = router, nn.ModuleList(experts), per_row
        self.wanted: Wanted | None = None
        """Told the experts of a step in the order in which they run."""

    def forward(self, x_MD: Tensor) -> Tensor:
        """Experts run in ascending order, each over its rows, and add up in that order whatever memory they lie in."""
        weights_MX = functional.softmax(self.router(x_MD).float(), dim=-1)
        weights_MT, experts_MT = torch.topk(weights_MX, self.per_row, dim=-1)
        weights_MT = (weights_MT / weights_MT.sum(dim=-1, keepdim=True)).to(x_MD.dtype)
        chosen = torch.unique(experts_MT).tolist()
        if self.wanted is not None:
            self.wanted([self.experts[expert] for expert in chosen])
        sum_MD = torch.zeros_like(x_MD)
        for expert in chosen:
            rows_R, places_R = torch.where(experts_MT == expert)
            out_RD = self.experts[expert](x_MD[rows_R]) * weights_MT[rows_R, places_R, None]
            sum_MD.index_add_(0, rows_R, out_RD)
        return sum_MD
