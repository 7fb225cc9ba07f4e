"""Neurons in memory: those of the last tokens, each layer under its cap; what is new is read from the bundles' file.

LLM in a flash (arXiv:2312.11514): windowing decides what stays (`policy/residency.py`), bundling how much a read gets.
Reads go past the page cache, several at once, into slots that never move; neighbours in file and memory are one read. A
neuron is checked against its checksum when it is first read. Knows bytes and slots; must not know torch or steps.
"""

from __future__ import annotations

import heapq
import time
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megalith.base.errors import DoesNotFit, TierError
from megalith.base.units import MIB, format_bytes
from megalith.engine.neuron_file import NeuronFile
from megalith.policy.residency import NeuronWindow
from megalith.tier.memory import HugeBuffer
from megalith.tier.mover import Move, Mover, Ticket

I64 = NDArray[np.int64]
READERS = 4
"""Reads under way at once."""
MOST_READ_BYTES = 4 * MIB
"""Neighbours are read together up to this."""
_LINK = "disk"


class Read(NamedTuple):
    """Bundles of one group that are neighbours in the file and in memory."""

    group: int
    neuron: int
    slot: int
    bundles: int


class Traffic(NamedTuple):
    """What was read so far."""

    num_bytes: int = 0
    reads: int = 0
    neurons: int = 0
    """Loaded into slots."""
    wait_ns: int = 0
    """Time that steps waited for reads."""


class NeuronStore:
    """Slots for at most `budget_bytes` over all layers. Owns the file. `tokens` 0: nothing stays after a token.

    `groups` are those that slots hold, by number. Raises DoesNotFit where not even READERS neurons of each layer fit.
    """

    def __init__(
        self, file: NeuronFile, tokens: int, budget_bytes: int, groups: tuple[int, ...] | None = None,
        readers: int = READERS,
    ) -> None:  # fmt: skip
        self.index, self.tokens, self.readers = file.index, tokens, readers
        self.groups = tuple(range(len(self.index.groups))) if groups is None else groups
        self.slot_bytes = sum(self.index.stride(group) for group in self.groups)
        self.cap = min(self.index.neurons, budget_bytes // (self.slot_bytes * self.index.layers))
        """Neurons of a layer that are in memory at most."""
        if self.cap < readers:
            least = readers * self.slot_bytes * self.index.layers
            raise DoesNotFit(
                f"A window of {format_bytes(budget_bytes)} holds {max(0, self.cap)} neurons of {self.slot_bytes} bytes "
                f"in each of {self.index.layers} layers.",
                f"Give it {format_bytes(least)} at the very least.",
            )
        self.traffic = Traffic()
        self._file = file
        self._known = np.zeros((len(self.index.groups), self.index.layers, self.index.neurons), np.bool_)
        """Whether a bundle's checksum was verified."""
        self.num_bytes = self.cap * self.slot_bytes * self.index.layers
        self._buffer = HugeBuffer(self.num_bytes)
        self._windows: list[NeuronWindow] = []
        self._free: list[list[int]] = []
        self._slots: list[dict[int, int]] = []
        for layer in range(self.index.layers):
            self._windows.append(NeuronWindow(1, 1))
            self._free.append([])
            self._slots.append({})
            self.reset(layer)
        self._mover = Mover(workers=readers)
        self._mover.add_link(_LINK)

    def reset(self, layer: int) -> None:
        """Forget what is in memory of a layer."""
        self._windows[layer] = NeuronWindow(max(1, self.tokens), self.cap)
        self._free[layer] = list(range(self.cap))
        self._slots[layer] = {}

    def slots(self, layer: int) -> NDArray[np.uint8]:
        """[cap, slot bytes] of a layer."""
        at, size = layer * self.cap * self.slot_bytes, self.cap * self.slot_bytes
        return np.frombuffer(self._buffer.view, np.uint8, size, at).reshape(self.cap, self.slot_bytes)

    def place(self, part: str) -> int:
        """Where in a slot a part begins, in bytes."""
        at = 0
        for group in self.groups:
            if part in self.index.groups[group]:
                return at + self.index.groups[group].index(part) * self.index.row_bytes
            at += self.index.stride(group)
        raise KeyError(part)

    def fetch(self, layer: int, neurons: I64) -> I64:
        """Slots of `neurons` (ascending, at most `cap`), after those that are not there were read. They hold until the
        next fetch of the layer. Raises TierError; the layer then begins anew.
        """
        if not self.tokens:
            self.reset(layer)
        slot_of, free = self._slots[layer], self._free[layer]
        change = self._windows[layer].need(*neurons.tolist())
        for gone in change.drop:
            heapq.heappush(free, slot_of.pop(gone))
        for new in change.load:
            slot_of[new] = heapq.heappop(free)
        if change.load:
            load = np.array(change.load, np.int64)
            try:
                self._load(layer, load, np.array([slot_of[new] for new in change.load], np.int64))
            except BaseException:
                self.reset(layer)
                raise
        return np.array([slot_of[neuron] for neuron in neurons.tolist()], np.int64)

    def _load(self, layer: int, neurons: I64, slots: I64) -> None:
        view = self._buffer.view[layer * self.cap * self.slot_bytes : (layer + 1) * self.cap * self.slot_bytes]
        jobs, at = [], 0
        for group in self.groups:
            stride = self.index.stride(group)
            joined = len(self.groups) == 1  # else other groups' bytes are between a slot's and the next
            for read in _reads(group, neurons, slots, max(1, MOST_READ_BYTES // stride) if joined else 1):
                begin = read.slot * self.slot_bytes + at
                jobs.append((self.index.offset(group, layer, read.neuron), view[begin : begin + read.bundles * stride]))
            at += stride
        self.read(jobs, f"layer {layer}")
        self.traffic = self.traffic._replace(neurons=self.traffic.neurons + len(neurons))
        self._verify(layer, neurons, slots)

    def _verify(self, layer: int, neurons: I64, slots: I64) -> None:
        at, rows = 0, self.slots(layer)
        for group in self.groups:
            stride = self.index.stride(group)
            new = ~self._known[group, layer, neurons]
            if new.any():
                found = np.ascontiguousarray(rows[slots[new], at : at + stride])
                self._file.verify(group, layer, neurons[new], found)
                self._known[group, layer, neurons[new]] = True
            at += stride

    def read(self, jobs: list[tuple[int, memoryview]], label: str) -> None:
        """Fill each view from its place in the file, `readers` at once. Raises TierError."""
        begin_ns, tickets = time.perf_counter_ns(), list[Ticket]()
        total = sum(view.nbytes for _, view in jobs)
        for reader in range(min(self.readers, len(jobs))):
            mine = jobs[reader :: self.readers]
            work = partial(_read_all, self._file, mine)
            tickets.append(
                self._mover.submit(Move(_LINK, sum(view.nbytes for _, view in mine), work, label=f"neurons of {label}"))
            )
        errors = [error for ticket in tickets if (error := _end(ticket)) is not None]
        waited_ns = self.traffic.wait_ns + time.perf_counter_ns() - begin_ns
        self.traffic = self.traffic._replace(
            num_bytes=self.traffic.num_bytes + total, reads=self.traffic.reads + len(jobs), wait_ns=waited_ns
        )
        if errors:
            raise errors[0]

    def close(self) -> None:
        """Wait for reads under way and give the memory back. Idempotent."""
        try:
            self._mover.close()
        finally:
            self._buffer.close()
            self._file.close()


def _reads(group: int, neurons: I64, slots: I64, most: int) -> list[Read]:
    """As few reads as there can be: `most` bundles each."""
    if not len(neurons):
        return []
    breaks = np.flatnonzero((np.diff(neurons) != 1) | (np.diff(slots) != 1)) + 1
    found = []
    for begin, end in zip([0, *breaks.tolist()], [*breaks.tolist(), len(neurons)], strict=True):
        found += [
            Read(group, int(neurons[first]), int(slots[first]), min(most, end - first))
            for first in range(begin, end, most)
        ]
    return found


def _read_all(file: NeuronFile, jobs: list[tuple[int, memoryview]]) -> None:
    for offset, view in jobs:
        file.file.read_into(offset, view)


def _end(ticket: Ticket) -> BaseException | None:
    """What broke it. All are waited for, so that nothing writes into memory that is given to others."""
    try:
        ticket.wait()
    except TierError as error:
        return error
    return None
