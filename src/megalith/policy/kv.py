"""Who holds which KV block: block tables, the prefix cache and the host blocks of swapped requests.

Knows counts and ids; never touches a byte of KV, knows neither scheduling nor time. Deterministic: the same calls give
the same block ids.

A device block is in exactly one state. Only an open block may be written, which is what makes sharing safe:

    state   in tables   hash   counted as   who may write
    free    0           no     free         nobody
    open    1           no     used         its one owner, at positions that it has not computed yet
    sealed  1 or more   yes    used         nobody: the content is final
    idle    0           yes    free         nobody; taken back least recently used first, which drops its hash

    free -> open (open, grow)   open -> sealed (seal)   open -> free (release)
    sealed -> idle (last release)   idle -> sealed (a prefix hit)   idle -> open (eviction)

A block whose hash another block already carries stays open when it is sealed (the older block stays the cached one);
nobody writes it again either, since its owner has computed all of its positions.

Blocks are promised before they are given: a table says how many it `held`, and gets their ids when somebody reads or
seals them (materialise). A promise counts as used at once and idle blocks are evicted for it at once, so nothing that a
policy decides depends on when ids are given. A simulation of plain requests never gives any.

A prefix hit never covers a whole sequence: at least its last token is computed, for there would be no logits to sample
from. So a fully cached prompt whose length is a multiple of the block size computes its last block again, into an open
block of its own; no copy-on-write is needed.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import KeysView, Sequence
from dataclasses import dataclass

from megalith.base.errors import ConfigError
from megalith.policy.facts import BlockId, RequestId


class IntegrityError(Exception):
    """The books do not add up: a bug of ours, never the user's doing."""


class BlockTable:
    """The device blocks of one request; token p lives in blocks[p // block_tokens]. Only KvAccount changes it."""

    __slots__ = ("away", "blocks", "held", "sealed")

    def __init__(self, blocks: list[BlockId], sealed: int, held: int) -> None:
        self.blocks = blocks
        """Those that have an id by now, in position order."""
        self.sealed = sealed
        """Leading blocks whose content is final and whose hash is known to the account."""
        self.held = held
        """Blocks of the request, with and without an id."""
        self.away = 0
        """Leading ones of them that another instance holds (policy/pooled_memory.py); none in a plain account."""


@dataclass(frozen=True, slots=True)
class Short:
    """Refused, nothing changed: `needed` blocks were asked for and `free` can be had."""

    needed: int
    free: int


@dataclass(frozen=True, slots=True)
class Opened:
    """A new table. Its first `hit_blocks` blocks came from the prefix cache."""

    table: BlockTable
    hit_blocks: int


@dataclass(frozen=True, slots=True)
class SwappedOut:
    """device_blocks[i] is to be copied to host_blocks[i] before anything else is written."""

    device_blocks: tuple[BlockId, ...]
    host_blocks: tuple[BlockId, ...]


@dataclass(frozen=True, slots=True)
class SwappedIn:
    """host_blocks[i] is to be copied to device_blocks[i]; blocks that the prefix cache still had need no copy."""

    table: BlockTable
    hit_blocks: int
    host_blocks: tuple[BlockId, ...]
    device_blocks: tuple[BlockId, ...]


class KvAccount:
    """The books of one instance's KV storage.

    `watermark_blocks` stay free at admission, so that running requests can grow a little before anyone is preempted.
    All operations are O(blocks of the request) or better. A request is unknown, on the device, or on the host.
    """

    def __init__(
        self,
        num_blocks: int,
        block_tokens: int,
        num_host_blocks: int = 0,
        prefix_cache: bool = True,
        watermark_blocks: int = 0,
    ) -> None:
        if num_blocks < 1 or block_tokens < 1:
            raise ConfigError(f"A KV cache of {num_blocks} blocks of {block_tokens} tokens holds nothing.")
        if num_host_blocks < 0 or not 0 <= watermark_blocks < num_blocks:
            raise ConfigError(
                f"num_host_blocks is {num_host_blocks} and watermark_blocks {watermark_blocks} of {num_blocks} blocks.",
                "Use at least 0 host blocks and a watermark below the number of blocks.",
            )
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        self.num_host_blocks = num_host_blocks
        self.prefix_cache = prefix_cache
        self.watermark_blocks = watermark_blocks
        self.evictions = 0
        self.free_blocks = num_blocks
        """Device blocks that can be had at once: free and idle ones, less those that were promised. Read it only.

        There are never more idle ones than this, so there is always a free one for a promised one.
        """
        self._free: list[BlockId] = []
        """Free blocks that were used before; the last one goes first. Those from `_fresh` on, which come after them,
        never were: ten thousand simulated caches take memory for what is used of them."""
        self._fresh = 0
        self._references: list[int] = []
        """Of the blocks below `_fresh`."""
        self._tables: dict[RequestId, BlockTable] = {}
        self._hash_of: dict[BlockId, int] = {}
        self._block_of: dict[int, BlockId] = {}
        self._idle: OrderedDict[BlockId, None] = OrderedDict()
        self._host_free = list(range(num_host_blocks - 1, -1, -1))
        self._host_tables: dict[RequestId, list[BlockId]] = {}

    # Reading

    @property
    def used_blocks(self) -> int:
        """Device blocks in at least one table."""
        return self.num_blocks - self.free_blocks

    @property
    def idle_blocks(self) -> int:
        """Cached blocks that no request holds."""
        return len(self._idle)

    @property
    def free_host_blocks(self) -> int:
        """Host blocks that hold nothing."""
        return len(self._host_free)

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold `tokens` tokens."""
        return -(-tokens // self.block_tokens)

    def table(self, request_id: RequestId) -> BlockTable:
        """The table of a request on the device. KeyError when it has none."""
        return self._tables[request_id]

    def away_blocks(self, request_id: RequestId) -> int:  # noqa: ARG002
        """Blocks of a request that another instance holds, or keeps for it; see policy/pooled_memory.py."""
        return 0

    @property
    def requests_on_device(self) -> KeysView[RequestId]:
        """Requests that have a table."""
        return self._tables.keys()

    @property
    def requests_on_host(self) -> KeysView[RequestId]:
        """Requests that are swapped out."""
        return self._host_tables.keys()

    def match_blocks(self, tokens: int, hashes: Sequence[int]) -> int:
        """Leading blocks of a sequence of `tokens` tokens that the prefix cache has now. Changes nothing."""
        return len(self._match(tokens, hashes))

    def needed_blocks(self, tokens: int, hashes: Sequence[int]) -> int:
        """Blocks that `open` would take from the free ones now. Changes nothing."""
        return self._needed(tokens, self._match(tokens, hashes))

    # Taking and giving back

    def open(self, request_id: RequestId, tokens: int, hashes: Sequence[int], reserve: int = 0) -> Opened | Short:
        """Make a table that covers `tokens` tokens, sharing cached blocks; `reserve` blocks must stay free after it."""
        if request_id in self._tables or request_id in self._host_tables:
            raise ValueError(f"request {request_id} already holds blocks")
        return self._open(request_id, tokens, hashes, reserve)

    def open_plain(self, request_id: RequestId, tokens: int, reserve: int = 0) -> BlockTable | None:
        """open() for a sequence without hashes; None when there is no room. The caller knows that it is not here."""
        count = -(-tokens // self.block_tokens)
        if count + reserve > self.free_blocks or not self.promise(count):
            return None
        table = BlockTable([], 0, count)
        self._tables[request_id] = table
        return table

    def grow(self, table: BlockTable) -> bool:
        """Append one open block to the table; False, with nothing changed, when none is left."""
        if not self.promise(1):
            return False
        table.held += 1
        return True

    def promise(self, count: int) -> bool:
        """Set `count` blocks aside, which the caller adds to `held` of tables; False, nothing changed, when short."""
        left = self.free_blocks - count
        if left < 0:
            return False
        self.free_blocks = left
        if self._idle and len(self._idle) > left:
            self._evict(len(self._idle) - left)
        return True

    def shrink(self, table: BlockTable) -> None:
        """Take back the last block of a table; it must be an open one."""
        table.held -= 1
        self.free_blocks += 1
        if len(table.blocks) > table.held:
            block = table.blocks.pop()
            self._references[block] = 0
            self._free.append(block)

    def materialise(self, table: BlockTable) -> list[BlockId]:
        """The blocks of a table, all with ids. A live view: do not change it."""
        lacking = table.held - len(table.blocks)
        if lacking:
            blocks = _pop_many(self._free, min(lacking, len(self._free)))
            for block in blocks:
                self._references[block] = 1
            fresh = lacking - len(blocks)
            blocks += range(self._fresh, self._fresh + fresh)
            self._references += [1] * fresh
            self._fresh += fresh
            table.blocks += blocks
        return table.blocks

    def seal(self, table: BlockTable, block_hash: int) -> None:
        """The next unsealed block of the table is complete and its content has this hash."""
        if self.prefix_cache and block_hash not in self._block_of:
            block = self.materialise(table)[table.sealed]
            self._block_of[block_hash] = block
            self._hash_of[block] = block_hash
        table.sealed += 1

    def seal_all(self, table: BlockTable, hashes: Sequence[int], complete: int) -> None:
        """seal() for the blocks up to number `complete`, as far as there are hashes."""
        first, last = table.sealed, min(len(hashes), complete)
        if first >= last:
            return
        if self.prefix_cache:
            block_of, hash_of = self._block_of, self._hash_of
            blocks = self.materialise(table)
            for index in range(first, last):
                block_hash = hashes[index]
                if block_hash not in block_of:
                    block = blocks[index]
                    block_of[block_hash] = block
                    hash_of[block] = block_hash
        table.sealed = last

    def release(self, request_id: RequestId) -> None:
        """Drop the request's hold on its blocks, device and host. Sealed blocks stay cached until they are evicted."""
        table = self._tables.pop(request_id, None)
        if table is None:
            self._host_free.extend(reversed(self._host_tables.pop(request_id)))
            return
        blocks = table.blocks
        self.free_blocks += table.held - len(blocks)
        if not blocks:
            return
        references, hash_of, idle, free = self._references, self._hash_of, self._idle, self._free
        shared = 0
        # Last block first: a tail without its head is useless, so it must be evicted earlier.
        for block in reversed(blocks):
            references[block] = left = references[block] - 1
            if left:
                shared += 1
            elif block in hash_of:
                idle[block] = None
            else:
                free.append(block)
        self.free_blocks += len(blocks) - shared

    # Swapping

    def swap_out(self, request_id: RequestId, tokens: int) -> SwappedOut | Short:
        """Move the first `tokens` tokens of a request to host blocks and release its device blocks."""
        count = self.blocks_for(tokens)
        if count > len(self._host_free):
            return Short(count, len(self._host_free))
        host = _pop_many(self._host_free, count)
        device = tuple(self.materialise(self._tables[request_id])[:count])
        self.release(request_id)
        self._host_tables[request_id] = host
        return SwappedOut(device, tuple(host))

    def swap_in(self, request_id: RequestId, tokens: int, hashes: Sequence[int], reserve: int = 0) -> SwappedIn | Short:
        """Bring a request back into a table that covers `tokens` tokens, and free its host blocks."""
        host = self._host_tables[request_id]
        opened = self._open(request_id, tokens, hashes, reserve)
        if isinstance(opened, Short):
            return opened
        del self._host_tables[request_id]
        self._host_free.extend(reversed(host))
        hits = opened.hit_blocks
        return SwappedIn(
            opened.table, hits, tuple(host[hits:]), tuple(self.materialise(opened.table)[hits : len(host)])
        )

    # Checking

    def check_integrity(self) -> None:
        """Count everything afresh and compare. O(all blocks). Raises IntegrityError with both sides."""
        promised = self._promised()
        free = len(self._free) + self.num_blocks - self._fresh
        without_id = free + len(self._idle) - self.free_blocks
        if promised != without_id or promised > free:
            raise IntegrityError(f"{promised} blocks lack an id, {without_id} counted; {free} free")
        held = Counter(block for table in self._tables.values() for block in table.blocks)
        counted = {block: count for block, count in enumerate(self._references) if count}
        if held != counted:
            wrong = {b: (held[b], counted.get(b, 0)) for b in held.keys() | counted.keys() if held[b] != counted.get(b)}
            raise IntegrityError(f"references differ, block: (in tables, counted): {wrong}")
        places = free + len(self._idle) + len(held)
        distinct = set(self._free) | self._idle.keys() | held.keys()
        if places != self.num_blocks or distinct != set(range(self._fresh)) or self._fresh > self.num_blocks:
            raise IntegrityError(
                f"{free} free + {len(self._idle)} idle + {len(held)} held = {places} blocks, "
                f"{len(distinct)} distinct of {self._fresh} that were ever used, of {self.num_blocks}"
            )
        if {h: b for b, h in self._hash_of.items()} != self._block_of or not self._idle.keys() <= self._hash_of.keys():
            raise IntegrityError(f"{len(self._hash_of)} hashed blocks, {len(self._block_of)} hashes, idle without hash")
        if not self._hash_of.keys() <= held.keys() | self._idle.keys():
            raise IntegrityError(f"free blocks carry hashes: {self._hash_of.keys() - held.keys() - self._idle.keys()}")
        host = [block for blocks in self._host_tables.values() for block in blocks] + self._host_free
        if sorted(host) != list(range(self.num_host_blocks)):
            raise IntegrityError(f"{len(host)} host blocks, {len(set(host))} distinct, of {self.num_host_blocks}")
        if self._tables.keys() & self._host_tables.keys():
            raise IntegrityError(f"on device and host: {self._tables.keys() & self._host_tables.keys()}")

    # Inside

    def _promised(self) -> int:
        """Blocks that count as used and have no id."""
        return sum([table.held - len(table.blocks) for table in self._tables.values()])

    def _match(self, tokens: int, hashes: Sequence[int]) -> list[BlockId]:
        if not self.prefix_cache:
            return []
        found: list[BlockId] = []
        block_of = self._block_of
        for index in range(min(len(hashes), (tokens - 1) // self.block_tokens)):
            block = block_of.get(hashes[index])
            if block is None:
                break
            found.append(block)
        return found

    def _needed(self, tokens: int, hits: list[BlockId]) -> int:
        # A hit that somebody holds costs nothing; an idle one is free now and would not be.
        references = self._references
        return self.blocks_for(tokens) - sum([1 for block in hits if references[block]])

    def _open(self, request_id: RequestId, tokens: int, hashes: Sequence[int], reserve: int) -> Opened | Short:
        hits = self._match(tokens, hashes)
        references, idle = self._references, self._idle
        needed = self._needed(tokens, hits) + reserve
        if needed > self.free_blocks:
            return Short(needed, self.free_blocks)
        for block in hits:
            if references[block] == 0:
                del idle[block]
                self.free_blocks -= 1
            references[block] += 1
        count = self.blocks_for(tokens)
        self.promise(count - len(hits))
        table = BlockTable(hits, len(hits), count)
        self._tables[request_id] = table
        return Opened(table, len(hits))

    def _evict(self, count: int) -> None:
        """Make `count` idle blocks free, least recently used first; the caller knows that they are there."""
        idle, block_of, hash_of = self._idle, self._block_of, self._hash_of
        for _ in range(count):
            block, _none = idle.popitem(False)
            del block_of[hash_of.pop(block)]
            self._free.append(block)
        self.evictions += count


def _pop_many(stack: list[BlockId], count: int) -> list[BlockId]:
    """What `count` pops give, in that order."""
    if count == 0:
        return []
    taken = stack[-count:]
    del stack[-count:]
    taken.reverse()
    return taken
