"""What every rank builds the same way: its linear layers, summed or not, in memory or through a window."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from megalith.engine.parallel.collectives import Ranks
from megalith.engine.parallel.shard import SUMMED
from megalith.engine.parallel.window import BlockWindow
from megalith.engine.torch_linear import packed_linear


class Summed(nn.Module):
    """A layer whose output is an addend: the sum over all ranks comes out, added in float32."""

    def __init__(self, addend: nn.Module, ranks: Ranks) -> None:
        super().__init__()
        self.addend = addend
        self._ranks = ranks

    def forward(self, x: Tensor) -> Tensor:
        """[M, in] to [M, out]."""
        own: Tensor = self.addend(x)
        if self._ranks.size == 1:
            return own
        return torch.from_numpy(self._ranks.all_reduce(own.float().numpy())).to(own.dtype)


class Layers:
    """A LinearFactory for this rank; call seal() when the model is built."""

    def __init__(
        self, ranks: Ranks, window_blocks: int, folder: str, disk_bytes_per_s: int | None,
        forget: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self._ranks = ranks
        self._forget = forget
        """Lets go of what was read of the model's file: a window is for what does not fit."""
        self.window = BlockWindow(window_blocks, Path(folder), disk_bytes_per_s) if window_blocks else None

    def __call__(self, name: str, weight: Tensor, bias: Tensor | None) -> nn.Module:
        """See model.transformer.LinearFactory."""
        streamed = self.window is not None and name != "head.weight"
        make = self.window.linear if streamed and self.window is not None else packed_linear
        module = make(name, weight, bias)
        if streamed and name.endswith(SUMMED):  # the last of a block
            self._forget()
        return Summed(module, self._ranks) if name.endswith(SUMMED) else module

    def seal(self) -> None:
        """No layer comes any more."""
        if self.window is not None:
            self.window.seal()

    @property
    def window_bytes(self) -> int:
        """In memory, of the window."""
        return 0 if self.window is None else self.window.num_bytes

    def close(self) -> None:
        """Idempotent."""
        self._ranks.close()
        if self.window is not None:
            self.window.close()
