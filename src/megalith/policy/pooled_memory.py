"""KV memory that instances lend to each other: the account and the scheduler of one instance among several.

Knows counts of one instance; must not know which other instance holds what, nor how it got there. Two things are
different from a plain account (Infinite-LLM, Lin et al., arXiv:2401.02669, section 4: rManager):

    lent     blocks that hold KV of requests of other instances: used here, in no table here
    away     leading blocks of a request of this instance that others hold: in its table, not used here

Position p of a request lies in block p // block_tokens of its table; the first `away` of these are elsewhere, the rest
is here, the newest always. A request that waits may have blocks `placed` for it elsewhere: they are away once it runs.
Blocks that go away and carry a hash stay in the prefix cache as idle ones, for their content is as good as before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megalith.policy.batching import BatchPolicy
from megalith.policy.facts import BlockId, RequestId
from megalith.policy.kv import BlockTable, IntegrityError, KvAccount, Opened, Short
from megalith.policy.limits import Limits
from megalith.policy.scheduler import Scheduler
from megalith.policy.sequence import RUNNING, WAITING


class PooledAccount(KvAccount):
    """See the module and KvAccount. Lending is refused from `most_used` blocks in use on, so that whoever runs here
    can grow."""

    def __init__(
        self, num_blocks: int, block_tokens: int, prefix_cache: bool, watermark_blocks: int, most_used: int
    ) -> None:
        super().__init__(num_blocks, block_tokens, 0, prefix_cache, watermark_blocks)
        self.most_used = most_used
        self.lent = 0
        """Blocks that hold KV of others."""
        self.placed: dict[RequestId, int] = {}
        """Of requests that wait here: blocks that others keep for them."""
        self.on_release: Callable[[RequestId], object] | None = None
        """Told when a request gives up its blocks here, by whatever way: what others hold of it is to be freed too."""

    # For others

    def lend(self, blocks: int) -> bool:
        """Set blocks aside for somebody else's KV; False, with nothing changed, when that is more than may be lent."""
        if self.used_blocks + blocks > self.most_used or not self.promise(blocks):
            return False
        self.lent += blocks
        return True

    def reclaim(self, blocks: int) -> None:
        """Lent blocks are free again."""
        if blocks > self.lent:
            raise IntegrityError(f"{blocks} blocks come back where {self.lent} were lent")
        self.lent -= blocks
        self.free_blocks += blocks

    # Of others

    def away_blocks(self, request_id: RequestId) -> int:
        """See KvAccount."""
        table = self._tables.get(request_id)
        return self.placed.get(request_id, 0) if table is None else table.away

    def send_away(self, request_id: RequestId, blocks: int) -> None:
        """The next `blocks` leading blocks of a request are elsewhere now, and are given up here."""
        table = self._tables[request_id]
        if not 0 < blocks < table.held - table.away:
            raise ValueError(f"{blocks} of the {table.held - table.away} blocks here of request {request_id} cannot go")
        known = table.blocks[:blocks]
        del table.blocks[:blocks]
        table.away += blocks
        self.free_blocks += blocks - len(known)
        for block in known:
            self._references[block] -= 1
            if self._references[block]:
                continue
            self.free_blocks += 1
            if block in self._hash_of:
                self._idle[block] = None
            else:
                self._free.append(block)

    # What a plain account does, for tables of which a part is away

    def open(self, request_id: RequestId, tokens: int, hashes: Sequence[int], reserve: int = 0) -> Opened | Short:
        """See KvAccount. A request with placed blocks needs so many fewer here, and shares no prefix."""
        if not self.placed.get(request_id):
            return super().open(request_id, tokens, hashes, reserve)
        table = self._open_placed(request_id, tokens, reserve)
        needed = self.blocks_for(tokens) - self.placed.get(request_id, 0) + reserve
        return Short(needed, self.free_blocks) if table is None else Opened(table, 0)

    def open_plain(self, request_id: RequestId, tokens: int, reserve: int = 0) -> BlockTable | None:
        """See KvAccount."""
        if self.placed.get(request_id):
            return self._open_placed(request_id, tokens, reserve)
        return super().open_plain(request_id, tokens, reserve)

    def release(self, request_id: RequestId) -> None:
        """See KvAccount."""
        table = self._tables.get(request_id)
        if table is not None and table.away:
            table.held -= table.away
            table.away = 0
        super().release(request_id)
        if self.on_release is not None:
            self.on_release(request_id)

    def shrink(self, table: BlockTable) -> None:
        """See KvAccount."""
        table.held -= table.away
        super().shrink(table)
        table.held += table.away

    def materialise(self, table: BlockTable) -> list[BlockId]:
        """See KvAccount: of the blocks that are here."""
        table.held -= table.away
        blocks = super().materialise(table)
        table.held += table.away
        return blocks

    def seal(self, table: BlockTable, block_hash: int) -> None:
        """See KvAccount; nothing is cached of a block that is elsewhere."""
        if table.sealed < table.away:
            table.sealed += 1
        else:
            self._seal_here(table, [block_hash])

    def seal_all(self, table: BlockTable, hashes: Sequence[int], complete: int) -> None:
        """See KvAccount."""
        if not table.away:
            super().seal_all(table, hashes, complete)
            return
        last = min(len(hashes), complete)
        table.sealed = max(table.sealed, min(last, table.away))
        if table.sealed < last:
            self._seal_here(table, hashes[table.sealed : last])

    def _seal_here(self, table: BlockTable, hashes: Sequence[int]) -> None:
        blocks = self.materialise(table)
        for block_hash in hashes:
            if self.prefix_cache and block_hash not in self._block_of:
                block = blocks[table.sealed - table.away]
                self._block_of[block_hash] = block
                self._hash_of[block] = block_hash
            table.sealed += 1

    def _open_placed(self, request_id: RequestId, tokens: int, reserve: int) -> BlockTable | None:
        count, placed = self.blocks_for(tokens), self.placed[request_id]
        here = count - placed
        if here < 1:
            raise IntegrityError(f"{placed} blocks are placed for request {request_id}, which has {count}")
        if here + reserve > self.free_blocks or not self.promise(here):
            return None
        del self.placed[request_id]
        table = BlockTable([], 0, count)
        table.away = placed
        self._tables[request_id] = table
        return table

    def _promised(self) -> int:
        away = sum([table.away for table in self._tables.values()])
        return super()._promised() - away + self.lent


class PooledScheduler(Scheduler):
    """A Scheduler whose KV account lends and borrows. See the module."""

    def __init__(self, policy: BatchPolicy, kv: PooledAccount, limits: Limits, most_tokens: int) -> None:
        """`most_tokens`: of one request, prompt and answer, on all instances that may lend to this one."""
        super().__init__(policy, kv, limits)
        self.memory = kv
        self._most_tokens = most_tokens

    def lend(self, blocks: int) -> bool:
        """PooledAccount.lend; ends the validity of a plan, whose further runs may count on these blocks."""
        lent = self.memory.lend(blocks)
        self._changed = self._changed or lent
        return lent

    def reclaim(self, blocks: int) -> None:
        """PooledAccount.reclaim; whoever waits may come in now."""
        self.memory.reclaim(blocks)
        self._changed = True

    def waits(self, request_id: RequestId) -> bool:
        """Whether the request is here and holds nothing."""
        sequence = self._roster.sequences.get(request_id)
        return sequence is not None and sequence.phase is WAITING

    def place(self, request_id: RequestId, blocks: int) -> bool:
        """Others keep so many blocks more (fewer, below 0) for a request that waits; False when that is too many."""
        sequence = self._roster.sequences[request_id]
        placed = self.memory.placed.get(request_id, 0) + blocks
        if not 0 <= placed < self.kv.blocks_for(sequence.known_):
            return False
        self.memory.placed[request_id] = placed
        if not placed:
            del self.memory.placed[request_id]
        self._changed = True
        return True

    def movable(self, request_id: RequestId) -> int:
        """Blocks that may be sent away: all complete ones here of a request that decodes, but the newest; else 0."""
        sequence = self._roster.sequences.get(request_id)
        if sequence is None or sequence.cohort is None:
            return 0
        return max(0, (sequence.computed - 1) // self.kv.block_tokens - sequence.table.away)

    def send_away(self, request_id: RequestId, blocks: int) -> bool:
        """PooledAccount.send_away between two steps; False when the request does not decode with so many any more."""
        sequence = self._roster.sequences.get(request_id)
        if sequence is None or sequence.cohort is None or blocks > self.movable(request_id):
            return False
        sequence.cohort.settle(sequence)
        self.memory.send_away(request_id, blocks)
        self._changed = True
        return True

    def decoding(self, request_id: RequestId) -> int:
        """Tokens in the cache of a request that decodes; -1 when it does not."""
        sequence = self._roster.sequences.get(request_id)
        return -1 if sequence is None or sequence.cohort is None else sequence.computed

    def drop(self, request_id: RequestId) -> bool:
        """KV of a running request was lost elsewhere: it waits, and is computed again. Between two steps."""
        sequence = self._roster.sequences.get(request_id)
        if sequence is None or sequence.phase is not RUNNING:
            return False
        self._roster.preempt(sequence, "recompute")
        self._changed = True
        return True
