"""Attention in other processes as a KV storage of the torch runner: Lamina, Infinite-LLM and InstInfer as placements.

The Transformer gives q, k and v of a layer to `attend` and takes o; here `attend` sends them away. Lamina
(arXiv:2405.01814, section 4): workers own all KV, by head, or by request where heads are fewer; q leaves before k and v
are projected, and the worker has attended to the keys it holds when they come. InstInfer (arXiv:2409.04992) is one such
worker with its KV in a file. What crosses for a token is (2 + 2 / G) * e * d bytes a layer, whatever the context.

Infinite-LLM is in engine.attention_spread. Letters: M rows, H query heads, K KV heads, E head size.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megalith.base.errors import StepFailed
from megalith.engine import attention_wire as wire
from megalith.engine.attention_link import WorkerLink, start_workers
from megalith.engine.attention_option import AttentionOption
from megalith.engine.attention_wire import Run, WorkerSetup
from megalith.engine.batch import StepBatch
from megalith.engine.worker_process import WorkerGroup
from megalith.specs.model import ModelSpec

DEADLINE_S = 60.0
"""For any one answer; a step of a large prompt chunk takes a second."""


class StepAway(Protocol):
    """Attention of one step, layer by layer."""

    def early(self, layer: int, q_MHE: Tensor) -> None:
        """Send q before k and v exist."""
        ...

    def __call__(self, layer: int, q_MHE: Tensor, k_MKE: Tensor, v_MKE: Tensor) -> Tensor:
        """Hand over K and V; returns [M, H, E] in q's dtype. Raises StepFailed."""
        ...


class KvElsewhere(Protocol):
    """KV storage that is not, or not only, in this process."""

    num_blocks: int
    group: WorkerGroup[WorkerLink]

    def step(self, batch: StepBatch) -> StepAway:
        """Announce a step. Raises StepFailed."""
        ...

    def num_bytes(self) -> int:
        """Of KV in all processes together."""
        ...

    def close(self) -> None:
        """End the processes. Idempotent."""
        ...


class KvShape(NamedTuple):
    """What the runner needs stored."""

    spec: ModelSpec
    block_tokens: int
    num_blocks: int
    """Of one instance."""
    compute: torch.dtype
    """Of q and o."""
    kv: torch.dtype

    def setup(self, **changes: Any) -> WorkerSetup:
        """A worker that serves all heads."""
        spec = self.spec
        fields: dict[str, Any] = {
            "layers": spec.num_layers, "heads": spec.num_heads, "kv_heads": spec.num_kv_heads,
            "head_dim": spec.head_dim, "block_tokens": self.block_tokens, "num_blocks": self.num_blocks,
            "scale": spec.attention_scale, "windows": tuple(spec.layer_window(i) for i in range(spec.num_layers)),
            "float_queries": self.compute == torch.float32, "float_kv": self.kv == torch.float32,
            "deadline_s": DEADLINE_S,
        }  # fmt: skip
        return WorkerSetup(**{**fields, **changes})

    def num_bytes(self, blocks: int) -> int:
        """K and V of so many blocks."""
        spec = self.spec
        each = 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * self.kv.itemsize
        return blocks * self.block_tokens * each


def open_attention(option: AttentionOption, shape: KvShape, threads: int) -> KvElsewhere:
    """The storage for this option, its processes ready. Raises MachineError."""
    if option.place == "spread":
        from megalith.engine.attention_spread import SpreadKv

        return SpreadKv(option.count, shape, threads)
    return OwnedKv(option, shape, threads)


class OwnedKv:
    """All KV in workers: by head, by request, or one with a file."""

    def __init__(self, option: AttentionOption, shape: KvShape, threads: int) -> None:
        self.num_blocks = shape.num_blocks
        self._shape = shape
        self.early_query = True
        """Send q before k and v; False: all three at once."""
        kv_heads, count = shape.spec.num_kv_heads, option.count
        self._by_request = count > kv_heads
        cuts = [0, kv_heads] if self._by_request else [round(i * kv_heads / count) for i in range(count + 1)]
        self.heads = [slice(low, high) for low, high in itertools.pairwise(cuts)]
        if self._by_request:
            self.heads *= count
        g = shape.spec.num_heads // kv_heads
        folder = option.folder or None
        setups = [
            shape.setup(kv_heads=h.stop - h.start, heads=g * (h.stop - h.start), folder=folder, keep=option.keep)
            for h in self.heads
        ]
        what = "Storage worker" if folder else "Attention worker"
        names = [f"{what} {i + 1} of {count}" for i in range(count)]
        self.group = start_workers(names, setups, max(1, threads // count))

    def step(self, batch: StepBatch) -> OwnedStep:
        """Tell every worker the rows that it will get."""
        self.group.check()
        runs = runs_of(batch, self._shape.block_tokens)
        starts = batch.row_starts_S1
        step = OwnedStep(self.group, self._shape, self.early_query)
        try:
            for number, link in enumerate(self.group.links):
                mine = list(range(len(runs)))
                if self._by_request:  # a request's first block names it as long as it lives, and those that share it
                    mine = [s for s in mine if int(runs[s].blocks[0, 0]) % len(self.group.links) == number]
                if mine:
                    rows = None
                    if len(mine) < len(runs):
                        rows = torch.from_numpy(np.concatenate([np.arange(starts[s], starts[s + 1]) for s in mine]))
                    link.step([runs[s] for s in mine])
                    step.parts.append(_Part(link, self.heads[number], rows))
        except StepFailed as error:
            raise self.group.broken(error) from None
        return step

    def num_bytes(self) -> int:
        """Of KV in the workers."""
        return self._shape.num_bytes(self.num_blocks)

    def close(self) -> None:
        """End the workers."""
        self.group.close()


class _Part(NamedTuple):
    """What one worker gets of a step; None: all rows."""

    link: WorkerLink
    heads: slice
    rows: Tensor | None


class OwnedStep:
    """One step over workers that own the KV."""

    def __init__(self, group: WorkerGroup[WorkerLink], shape: KvShape, early: bool) -> None:
        self.parts: list[_Part] = []
        self._group = group
        self._shape = shape
        self._early = early
        self._each = shape.spec.num_heads // shape.spec.num_kv_heads

    def early(self, layer: int, q_MHE: Tensor) -> None:
        """Send q before k and v exist."""
        if self._early:
            self._send_query(layer, q_MHE)

    def __call__(self, layer: int, q_MHE: Tensor, k_MKE: Tensor, v_MKE: Tensor) -> Tensor:
        """Send k and v; collect o."""
        if not self._early:
            self._send_query(layer, q_MHE)
        out_MHE = torch.empty_like(q_MHE)
        try:
            for link, heads, rows in self.parts:
                pair = (to_wire(pick(x, heads, rows), self._shape.kv) for x in (k_MKE, v_MKE))
                link.send(wire.PAIR, *pair, layer=layer)
            for link, heads, rows in self.parts:
                mine = slice(heads.start * self._each, heads.stop * self._each)
                got = from_wire(link.receive(wire.OUTPUT).payload, self._shape.compute).to(out_MHE.device)
                got = got.view(-1, mine.stop - mine.start, q_MHE.shape[2])
                if rows is None:
                    out_MHE[:, mine] = got
                else:
                    out_MHE[rows, mine] = got
        except StepFailed as error:
            raise self._group.broken(error) from None
        return out_MHE

    def _send_query(self, layer: int, q_MHE: Tensor) -> None:
        try:
            for link, heads, rows in self.parts:
                mine = slice(heads.start * self._each, heads.stop * self._each)
                link.send(wire.QUERY, to_wire(pick(q_MHE, mine, rows), self._shape.compute), layer=layer)
        except StepFailed as error:
            raise self._group.broken(error) from None


def runs_of(batch: StepBatch, block_tokens: int) -> list[Run]:
    """The sequences of a step, each with its blocks up to its last row."""
    runs = []
    for s, (low, high) in enumerate(itertools.pairwise(batch.row_starts_S1)):
        first, rows = int(batch.positions_M[low]), int(high - low)
        blocks = batch.block_tables_SW[s, : (first + rows - 1) // block_tokens + 1]
        runs.append(Run(rows, first, np.stack([blocks, np.arange(len(blocks), dtype=np.int32)], axis=1)))
    return runs


def pick(x: Tensor, heads: slice, rows: Tensor | None) -> Tensor:
    """Rows and heads of [M, H, E]."""
    return x[:, heads] if rows is None else x[rows.to(x.device), heads]


def to_wire(x: Tensor, dtype: torch.dtype) -> NDArray[Any]:
    """The values in that type, as NumPy can hold them."""
    x = x.to(dtype).contiguous().cpu()
    values: NDArray[Any] = (x if dtype == torch.float32 else x.view(torch.int16)).numpy()
    return values


def from_wire(payload: memoryview, dtype: torch.dtype) -> Tensor:
    """Values that came in that type."""
    return torch.frombuffer(payload, dtype=dtype) if len(payload) else torch.empty(0, dtype=dtype)


def cat(pieces: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """One after another; a single one as it is."""
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
