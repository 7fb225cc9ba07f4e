"""The near memory of a layer window: a ring of equal slots on the CPU or a CUDA device, and layers in and out of it.

On the CPU a slot is aligned memory that the far tier writes into. On CUDA the slots are one allocation of the device,
and layers pass through pinned memory and a stream of their own, beside the one that computes. Knows slots, tensors and
tickets; knows neither modules nor which layer is next.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megalith.base.errors import TierError
from megalith.engine.layer_stow import LayerStow
from megalith.tier.disk import ALIGN
from megalith.tier.memory import HugeBuffer
from megalith.tier.mover import Move, Mover, Ticket
from megalith.tier.pool import Lease, Pool


@dataclass(slots=True)
class Slot:
    """Room for one layer. `part` is the one that is in it or on its way; None: free."""

    data: Tensor
    """[slot bytes] uint8, with a storage of its own on the CPU."""
    view: memoryview
    """The same bytes on the CPU; on CUDA the pinned ones that they pass through."""
    pinned: Tensor | None = None
    """Those, as a tensor."""
    part: int | None = None
    ticket: Ticket | None = None
    lease: Lease | None = None
    freed: Any = None
    """CUDA event: the device is done with what was in it."""


class Ring:
    """`count` slots of `slot_bytes`, filled by `mover` over its link `link`; bytes in use are `pool`'s."""

    def __init__(self, count: int, slot_bytes: int, stow: LayerStow, mover: Mover, link: str, pool: Pool) -> None:
        self.far, self.mover, self.link, self.pool = stow.far, mover, link, pool
        self.slot_bytes = size = -(-max(1, slot_bytes) // ALIGN) * ALIGN
        self._moves = 0
        self._memory: HugeBuffer | None = None
        self._stream: Any = None
        device = stow.device or torch.device("cpu")
        with torch.inference_mode(False):
            if device.type == "cuda":  # Written for, never run on: our machines have no CUDA device.
                self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
                ring = torch.empty((count, size), dtype=torch.uint8, device=device)
                pinned = torch.empty((count, size), dtype=torch.uint8, pin_memory=True)
                self.slots = [Slot(ring[n], pinned[n].numpy().data, pinned[n]) for n in range(count)]
            else:
                self._memory = HugeBuffer(count * size)
                views = [self._memory.view[n * size : (n + 1) * size] for n in range(count)]
                self.slots = [Slot(torch.frombuffer(view, dtype=torch.uint8), view) for view in views]
        self._by_storage = {slot.data.untyped_storage().data_ptr(): slot for slot in self.slots}

    @property
    def full(self) -> bool:
        """No slot is free."""
        return all(slot.part is not None for slot in self.slots)

    def find(self, storage: int, offset: int, element_bytes: int) -> tuple[Slot, int] | None:
        """(slot, offset in it in elements) of a tensor whose storage begins at that address, if it is in a slot."""
        slot = self._by_storage.get(storage)
        if slot is None or self._stream is None:
            return None if slot is None else (slot, offset)
        number, inside = divmod(offset, self.slot_bytes // element_bytes)
        return self.slots[number], inside

    def fill(self, part: int, num_bytes: int) -> Slot:
        """Begin to bring a part into a free slot. Raises TierError without one, PoolFull where the cap is reached."""
        slot = next((slot for slot in self.slots if slot.part is None), None)
        if slot is None:
            raise TierError(f"All {len(self.slots)} slots of the window are in use, and layer {part} is needed too.")
        lease = self.pool.take(f"layer {part}", num_bytes)
        self._moves += 1
        work = partial(self._load, slot, part, num_bytes)
        try:
            slot.ticket = self.mover.submit(
                Move(self.link, num_bytes, work, priority=self._moves, label=f"layer {part}")
            )
        except BaseException:
            lease.release()
            raise
        slot.part, slot.lease = part, lease
        return slot

    def drain(self, slot: Slot, num_bytes: int, *, save: bool) -> None:
        """Empty a slot; with `save` its bytes are first written to the far tier, and that is awaited.

        What is on its way to it is called back or awaited. Raises what the write raises; the slot then keeps its layer.
        """
        if slot.ticket is not None and not slot.ticket.done and not slot.ticket.cancel():
            with suppress(TierError):  # Nobody wants it any more.
                slot.ticket.wait()
        if self._stream is not None:
            slot.freed = torch.cuda.Event()  # type: ignore[no-untyped-call]
            slot.freed.record(torch.cuda.current_stream(slot.data.device))
        if save and slot.part is not None:
            work = partial(self._save, slot, slot.part, num_bytes)
            label = f"layer {slot.part}, changed"
            self.mover.submit(Move(self.link, num_bytes, work, label=label)).wait()  # priority 0: ahead of all loads
        if slot.lease is not None:
            slot.lease.release()
        slot.part = slot.ticket = slot.lease = None

    def _load(self, slot: Slot, part: int, num_bytes: int) -> None:
        """On the mover's thread."""
        self.far.read_into(part, slot.view[:num_bytes])
        if self._stream is not None:
            assert slot.pinned is not None
            with torch.cuda.stream(self._stream):
                if slot.freed is not None:
                    self._stream.wait_event(slot.freed)
                slot.data[:num_bytes].copy_(slot.pinned[:num_bytes], non_blocking=True)
            self._stream.synchronize()

    def _save(self, slot: Slot, part: int, num_bytes: int) -> None:
        """On the mover's thread."""
        if self._stream is not None:
            assert slot.pinned is not None
            with torch.cuda.stream(self._stream):
                self._stream.wait_event(slot.freed)
                slot.pinned[:num_bytes].copy_(slot.data[:num_bytes], non_blocking=True)
            self._stream.synchronize()
        self.far.write(part, slot.view[:num_bytes])

    def close(self) -> None:
        """Give the memory back; tensors in it must not be used any more. Again is no error."""
        for slot in self.slots:
            if slot.ticket is not None and not slot.ticket.cancel():
                with suppress(Exception):
                    slot.ticket.wait()
            if slot.lease is not None:
                slot.lease.release()
        self.slots, self._by_storage = [], {}
        if self._memory is not None:
            self._memory.close()
