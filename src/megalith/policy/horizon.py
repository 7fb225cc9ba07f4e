"""How long a step of decodes stays the right thing to do, and which blocks it takes meanwhile: exact, in closed form.

Every run of such a step writes one token to each row. A row whose table covers `capacity` tokens takes a new block
with the first token past that and with every block_tokens-th one after it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence as Rows

from megalith.policy.sequence import Sequence


def further_runs(rows: Rows[Sequence], block_tokens: int, free_blocks: int) -> int:
    """How many further runs a planned step of decodes has.

    It ends before the first of: a row has all its tokens, or the blocks that the rows would take exceed `free_blocks`.
    The tables cover the first run already. O(rows), times the logarithm of the answer when blocks are the bound.
    """
    limit = min((row.end - row.known for row in rows), default=1) - 1
    if limit <= 0:
        return 0
    slacks = [len(row.table.blocks) * block_tokens - row.computed - 1 for row in rows]

    def blocks_taken(runs: int) -> int:
        return sum([(runs - slack - 1) // block_tokens + 1 for slack in slacks if runs > slack])

    if blocks_taken(limit) <= free_blocks:
        return limit
    return bisect_right(range(limit + 1), free_blocks, key=blocks_taken) - 1


def crossings(rows: Rows[Sequence], block_tokens: int, ran: int, ahead: int) -> list[Sequence]:
    """The rows that take a block, in the order in which single runs take them; a row may come up more than once.

    The rows' counts already include the `ran` runs; the tables still cover the first of these only, and are to cover
    `ahead` further ones. In one run the rows take their blocks in row order.
    """
    last = ran + ahead
    events: list[tuple[int, int]] = []
    for index, row in enumerate(rows):
        capacity = len(row.table.blocks) * block_tokens
        if row.computed + ahead > capacity:
            first = capacity - (row.computed - ran) + 1
            events.extend((run, index) for run in range(first, last + 1, block_tokens))
    events.sort()
    return [rows[index] for _, index in events]
