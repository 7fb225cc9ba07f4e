"""Infinite-LLM: one request's KV over several processes along the sequence (arXiv:2401.02669, section 3).

This instance owns the requests and holds `num_blocks` blocks; each lender holds as many. Whatever a step writes to is
here, so the newest block of a request always is; when room is wanted, blocks that were written longest ago move to the
lender with most room. In a step queries go to the lenders and partial results (max, sum, values) come back, to be
merged with the part of here: KV does not move for attention, and what crosses does not depend on the context.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from megalith.base.errors import StepFailed
from megalith.engine import attention_wire as wire
from megalith.engine.attention_link import WorkerLink, start_workers
from megalith.engine.attention_share import KvShare
from megalith.engine.attention_wire import Run
from megalith.engine.attention_workers import KvShape, cat, from_wire, runs_of, to_wire
from megalith.engine.batch import I32, StepBatch
from megalith.engine.partial_attention import Partial, merge
from megalith.engine.worker_process import WorkerGroup

_HERE = 0
_NOWHERE = -1


class SpreadKv:
    """Blocks of the account, each in one slot of this process or of a lender. Place 0 is here, place i lender i - 1."""

    def __init__(self, lenders: int, shape: KvShape, threads: int) -> None:
        self.shape = shape
        self.num_blocks = shape.num_blocks * (lenders + 1)
        self.here = KvShare(shape.setup())
        self._place = np.full(self.num_blocks, _NOWHERE, np.int32)
        self._slot = np.zeros(self.num_blocks, np.int32)
        self._written = np.zeros(self.num_blocks, np.int64)
        """Step in which a block was last written to."""
        self._free = [list(range(shape.num_blocks)) for _ in range(lenders + 1)]
        self._steps = 0
        self.moved_blocks = 0
        names = [f"Lender {i + 1} of {lenders}" for i in range(lenders)]
        setups = [shape.setup(partial=True)] * lenders
        self.group: WorkerGroup[WorkerLink] = start_workers(names, setups, max(1, threads // 2))

    def step(self, batch: StepBatch) -> SpreadStep:
        """Bring here what the step writes to, and tell lenders whose blocks they attend to."""
        self.group.check()
        runs = runs_of(batch, self.shape.block_tokens)
        wanted = self._wanted(runs)
        try:
            self._make_local(wanted)
            return SpreadStep(self, runs)
        except StepFailed as error:
            raise self.group.broken(error) from None

    def part(self, run: Run, place: int) -> Run:
        """The run with those of its blocks that lie at that place, by slot."""
        blocks = run.blocks[:, 0]
        there = self._place[blocks] == place
        return Run(run.rows, run.first, np.stack([self._slot[blocks[there]], run.blocks[there, 1]], axis=1))

    def slots(self, blocks: I32) -> I32:
        """Where blocks lie that are here."""
        slots: I32 = self._slot[blocks]
        return slots

    def num_bytes(self) -> int:
        """In all processes."""
        return self.shape.num_bytes(self.num_blocks)

    def close(self) -> None:
        """End the lenders."""
        self.group.close()

    def _wanted(self, runs: list[Run]) -> dict[int, bool]:
        """Blocks that the step writes to, and whether they were begun before: then their contents count."""
        tokens = self.shape.block_tokens
        wanted: dict[int, bool] = {}
        for run in runs:
            for block, index in run.blocks[run.first // tokens :].tolist():
                wanted[block] = index * tokens < run.first
        if len(wanted) > self.shape.num_blocks:
            raise StepFailed(f"The step writes to {len(wanted)} blocks; this instance has {self.shape.num_blocks}.")
        return wanted

    def _make_local(self, wanted: dict[int, bool]) -> None:
        self._steps += 1
        self._written[list(wanted)] = self._steps
        missing = [block for block in wanted if self._place[block] != _HERE]
        victims = self._victims(len(missing) - len(self._free[_HERE]))
        for block in missing:
            self._bring(block, victims, keep=wanted[block])

    def _victims(self, count: int) -> list[int]:
        """Blocks of here that were written longest ago, in that order, none of this step."""
        if count <= 0:
            return []
        here = np.flatnonzero((self._place == _HERE) & (self._written < self._steps))
        return [int(block) for block in here[np.argsort(self._written[here], kind="stable")][:count]]

    def _bring(self, block: int, victims: list[int], *, keep: bool) -> None:
        contents = None
        if self._place[block] > _HERE:
            place, slot = int(self._place[block]), int(self._slot[block])
            if keep:
                link = self._link(place)
                link.send(wire.GET, count=slot)
                contents = link.receive(wire.BLOCK).payload
            self._free[place].append(slot)
            self._place[block] = _NOWHERE
        if not self._free[_HERE]:
            self._lend(victims.pop(0))
        slot = self._free[_HERE].pop()
        self._place[block], self._slot[block] = _HERE, slot
        if contents is not None:
            self.here.put_block(slot, contents)

    def _lend(self, block: int) -> None:
        """To the lender with most room: there is some, for there are as many slots as blocks."""
        place = max(range(1, len(self._free)), key=lambda i: len(self._free[i]))
        slot = self._free[place].pop()
        mine = int(self._slot[block])
        self._link(place).send(wire.PUT, self.here.block(mine), count=slot)
        self._free[_HERE].append(mine)
        self._place[block], self._slot[block] = place, slot
        self.moved_blocks += 1

    def _link(self, place: int) -> WorkerLink:
        return self.group.links[place - 1]


class SpreadStep:
    """One step: queries to whoever holds a part, and the merge."""

    def __init__(self, kv: SpreadKv, runs: list[Run]) -> None:
        self._kv = kv
        self._runs = runs
        self._local = [kv.part(run, _HERE) for run in runs]
        self._asked: list[tuple[WorkerLink, list[int]]] = []
        tokens = kv.shape.block_tokens
        for number, link in enumerate(kv.group.links):
            parts = [kv.part(run, number + 1) for run in runs]
            mine = [s for s, part in enumerate(parts) if len(part.blocks)]
            if mine:
                link.step([parts[s] for s in mine])
                self._asked.append((link, mine))
        positions = [np.arange(run.first, run.first + run.rows) for run in runs]
        blocks = [run.blocks[at // tokens, 0] for run, at in zip(runs, positions, strict=True)]
        self._blocks_M, self._offsets_M = kv.slots(np.concatenate(blocks)), np.concatenate(positions) % tokens
        self._ends = np.cumsum([run.rows for run in runs])

    def early(self, layer: int, q_MHE: Tensor) -> None:
        """Queries go out before k and v are projected; the lenders attend meanwhile."""
        wired = np.split(to_wire(q_MHE, self._kv.shape.compute), self._ends[:-1])
        try:
            for link, mine in self._asked:
                link.send(wire.QUERY, *(wired[s] for s in mine), layer=layer)
        except StepFailed as error:
            raise self._kv.group.broken(error) from None

    def __call__(self, layer: int, q_MHE: Tensor, k_MKE: Tensor, v_MKE: Tensor) -> Tensor:
        """Store K and V here, attend to what is here, merge what comes back."""
        kv, shape = self._kv.here, self._kv.shape
        k, v = (to_wire(x, shape.kv) for x in (k_MKE, v_MKE))
        if shape.kv != torch.float32:
            k, v = k.view(np.uint16), v.view(np.uint16)
        q = np.split(q_MHE.float().cpu().numpy(), self._ends[:-1])
        parts: list[list[Partial]] = [
            [kv.stored(layer, rows, run), kv.new(layer, rows, k_rows, v_rows)]
            for rows, run, k_rows, v_rows in zip(
                q, self._local, np.split(k, self._ends[:-1]), np.split(v, self._ends[:-1]), strict=True
            )
        ]
        kv.write(layer, self._blocks_M, self._offsets_M, k, v)
        try:
            for link, mine in self._asked:
                self._collect(link.receive(wire.PARTIAL).payload, mine, parts)
        except StepFailed as error:
            raise self._kv.group.broken(error) from None
        values = cat([merge(of_run).values for of_run in parts])
        return torch.from_numpy(values).to(device=q_MHE.device, dtype=q_MHE.dtype).view(q_MHE.shape)

    def _collect(self, payload: memoryview, mine: list[int], parts: list[list[Partial]]) -> None:
        spec = self._kv.shape.spec
        counts = [self._runs[s].rows * spec.num_heads for s in mine]
        total = sum(counts)
        sums = np.frombuffer(payload[: 8 * total], np.float32).reshape(2, total)
        values = from_wire(payload[8 * total :], self._kv.shape.compute).float().numpy().reshape(total, spec.head_dim)
        low = 0
        for s, count in zip(mine, counts, strict=True):
            high = low + count
            parts[s].append(Partial(sums[0, low:high], sums[1, low:high], values[low:high]))
            low = high
