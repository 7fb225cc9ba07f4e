"""Paged KV in block floating point: packed when written, decoded when gathered. On the CPU, by NumPy."""

from __future__ import annotations

import torch
from torch import Tensor

from megalith.engine.torch_attention import PagedKv
from megalith.model import block_float
from megalith.specs.kv_format import BlockFloat, KvFormat


class BlockFloatKv(PagedKv):
    """A PagedKv whose rows are bytes: for every token and KV head the blocks of K, then those of V."""

    def __init__(
        self, layout_LKE: tuple[int, int, int], form: KvFormat, *, blocks: tuple[int, int], block_tokens: int
    ) -> None:
        layers, kv_heads, head_dim = layout_LKE
        self._form = form
        self._key_bytes = form.keys.row_bytes(head_dim)
        row = self._key_bytes + form.values.row_bytes(head_dim)
        super().__init__(
            (layers, kv_heads, row), blocks=blocks, block_tokens=block_tokens, dtype=torch.uint8,
            device=torch.device("cpu"), sides=1,
        )  # fmt: skip

    def write(self, layer: int, slots_M: Tensor, k_MKE: Tensor, v_MKE: Tensor) -> None:
        """Encode and store K and V of M rows. Raises EngineError where they are not finite."""
        store = self.device_blocks[layer, 0]
        packed = torch.cat((_encoded(k_MKE, self._form.keys), _encoded(v_MKE, self._form.values)), dim=-1)
        store.view(-1, *store.shape[2:]).index_copy_(0, slots_M, packed)

    def gather(self, layer: int, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """K and V [S, L, K, E] in float32 of the blocks [S, W], in table order."""
        store = self.device_blocks[layer, 0]
        sequences, width = blocks.shape
        packed = store.index_select(0, blocks.reshape(-1))
        packed = packed.view(sequences, width * self.block_tokens, *store.shape[2:])
        cut = self._key_bytes
        return _decoded(packed[..., :cut], self._form.keys), _decoded(packed[..., cut:], self._form.values)


def _encoded(rows: Tensor, form: BlockFloat) -> Tensor:
    return torch.from_numpy(block_float.encode(rows.float().contiguous().numpy(), form))


def _decoded(raw: Tensor, form: BlockFloat) -> Tensor:
    return torch.from_numpy(block_float.decode(raw.contiguous().numpy(), form))
