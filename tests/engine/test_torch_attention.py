"""Paged attention against the plain formula, over ragged steps, groups of heads, windows, and blocks in any order."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megalith.engine.batch import StepBatch
from megalith.engine.torch_attention import PagedKv, StepAttention

BLOCK = 4
CPU = torch.device("cpu")


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None, scale: float) -> torch.Tensor:
    """Rows at positions 0, 1, .. attend over all keys up to themselves: the definition, one row and head at a time."""
    group = q.shape[1] // k.shape[1]
    out = torch.zeros_like(q)
    for row in range(q.shape[0]):
        low = 0 if window is None else max(0, row - window + 1)
        for head in range(q.shape[1]):
            keys, values = k[low : row + 1, head // group], v[low : row + 1, head // group]
            out[row, head] = torch.softmax(keys @ q[row, head] * scale, 0) @ values
    return out


@pytest.mark.parametrize("heads", [(4, 4), (9, 3), (6, 1)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_ragged_steps_equal_the_formula(heads: tuple[int, int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    windows, size, lengths = [None, 5], 8, [1, 7, 19, 30, 12]
    kv = PagedKv((2, heads[1], size), blocks=(64, 0), block_tokens=BLOCK, dtype=torch.float32, device=CPU)
    kv.device_blocks.fill_(1e4)  # stale contents must never be read
    tables = rng.permutation(64)[: 5 * 10].reshape(5, 10).astype(np.int32)
    q = [[torch.randn(n, heads[0], size) for n in lengths] for _ in windows]
    k = [[torch.randn(n, heads[1], size) for n in lengths] for _ in windows]
    v = [[torch.randn(n, heads[1], size) for n in lengths] for _ in windows]
    done = [0] * 5
    outs: list[list[list[torch.Tensor]]] = [[[] for _ in lengths] for _ in windows]
    while any(d < n for d, n in zip(done, lengths, strict=True)):
        take = [min(n - d, int(rng.choice([0, 1, 1, 3, 8]))) for d, n in zip(done, lengths, strict=True)]
        active = [s for s in range(5) if take[s]]
        if not active:
            continue
        starts = np.concatenate([[0], np.cumsum([take[s] for s in active])]).astype(np.int32)
        positions = np.concatenate([np.arange(done[s], done[s] + take[s]) for s in active]).astype(np.int32)
        batch = StepBatch(np.zeros_like(positions), positions, starts, tables[active], np.zeros(0, np.int32))
        attend = StepAttention(kv, batch, windows, 0.3)
        for layer in range(2):
            rows = [[x[layer][s][done[s] : done[s] + take[s]] for s in active] for x in (q, k, v)]
            out = attend(layer, *(torch.cat(part) for part in rows))
            for i, s in enumerate(active):
                outs[layer][s].append(out[starts[i] : starts[i + 1]])
        done = [d + t for d, t in zip(done, take, strict=True)]
    for layer, window in enumerate(windows):
        for s in range(5):
            expected = plain(q[layer][s], k[layer][s], v[layer][s], window, 0.3)
            torch.testing.assert_close(torch.cat(outs[layer][s]), expected, atol=2e-5, rtol=1e-4)


def test_swap_moves_whole_blocks_both_ways() -> None:
    kv = PagedKv((3, 2, 4), blocks=(8, 4), block_tokens=BLOCK, dtype=torch.bfloat16, device=CPU)
    kv.device_blocks.normal_()
    before = kv.device_blocks.clone()
    kv.swap_out(np.array([5, 1], np.int32), np.array([0, 3], np.int32))
    kv.device_blocks[:, :, [5, 1]] = 0
    kv.swap_in(np.array([3, 0], np.int32), np.array([6, 2], np.int32))
    assert torch.equal(kv.device_blocks[:, :, 6], before[:, :, 1])
    assert torch.equal(kv.device_blocks[:, :, 2], before[:, :, 5])
    assert kv.block_bytes * (8 + 1 + 4) == kv.num_bytes()
