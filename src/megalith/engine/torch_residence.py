"""A model for the torch runner, and what of it is in memory: all, a window of layers or neurons, a cache of experts.

Knows who keeps weights; knows nothing about steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from megalith.engine.expert_cache import ExpertCache
from megalith.engine.layer_far import FarFile, FarMemory
from megalith.engine.layer_stow import LayerStow
from megalith.engine.layer_window import ModuleWindow
from megalith.engine.sparse_ffn import SparseNeurons
from megalith.engine.streamed import StreamTally
from megalith.engine.torch_linear import packed_linear
from megalith.model.checkpoint import Checkpoint
from megalith.model.transformer import LinearFactory, Transformer, plain_linear
from megalith.policy.layer_share import LayerShare


@dataclass(frozen=True, slots=True)
class Residence:
    """What is in memory; at most one of the first three. What is not comes from a file, to a device from the host."""

    layers: LayerShare | None = None
    """A window of them."""
    experts: int | None = None
    """So many of all layers together."""
    neurons: SparseNeurons | None = None
    """FFNs come from here. Owned by who loads."""
    make_linear: LinearFactory | None = None
    channel_orders: NDArray[np.int64] | None = None
    """Of q and k [L, K, E] (engine.k_order), where all weights are in memory."""


class HeldModel:
    """The model that a Residence describes. close() gives everything back."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, residence: Residence) -> None:
        on_cpu = device.type == "cpu"
        self.streamed = StreamTally("disk" if on_cpu else "host memory")
        self.window: ModuleWindow | None = None
        """Of layers or experts."""
        self.neurons = residence.neurons
        share, near = residence.layers, residence.experts
        if share is None and near is None:
            factory = residence.make_linear or (packed_linear if on_cpu else plain_linear)
            make_ffn = None
            if self.neurons is not None:
                # How many neurons fire is not known before, so nothing is predicted.
                self.streamed.detail, self.streamed.predicts = self.neurons.summary, False
                make_ffn = self.neurons.make
            self.model = Transformer(
                checkpoint, dtype=dtype, device=device, make_linear=factory, make_ffn=make_ffn,
                channel_orders=residence.channel_orders,
            )  # fmt: skip
            return
        stow = LayerStow(FarFile() if on_cpu else FarMemory())

        def made(module: nn.Module) -> None:
            stow.add(module)
            checkpoint.forget()  # The source's own pages, too.

        try:
            if near is not None:
                self.model = Transformer(checkpoint, dtype=dtype, device=device, made_expert=made)
                cache = ExpertCache(self.model, near, stow)
                self.window, self.streamed.detail = cache.window, cache.summary
            elif share is not None:
                self.model = Transformer(checkpoint, dtype=dtype, device=device, made=made)
                self.window = ModuleWindow(
                    self.model, self.model.layers, share.k, share.k_prime, keep=share.keep, stowed=stow
                )
        except BaseException:
            stow.far.close()
            raise

    @property
    def streams(self) -> bool:
        """Whether weights come from elsewhere."""
        return self.window is not None or self.neurons is not None

    @property
    def read_bytes(self) -> int:
        """From elsewhere, so far."""
        source = self.window or self.neurons
        return 0 if source is None else source.read_bytes

    def close(self) -> None:
        """Idempotent."""
        if self.window is not None:
            self.window.close(restore=False)
        if self.neurons is not None:
            self.neurons.close()
