"""How long a step of decodes stays the right thing to do, and which blocks it takes meanwhile: exact, in closed form.

Every run of such a step writes one token to each row. A row whose table covers `capacity` tokens takes a new block
with the first token past that and with every block_tokens-th one after it.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows

from megalith.policy.sequence import Sequence


def further_runs(rows: Rows[Sequence], block_tokens: int, free_blocks: int) -> int:
    """How many further runs a planned step of decodes has. O(rows log rows).

    It ends before the first of: a row has all its tokens, or the blocks that the rows would take exceed `free_blocks`.
    The tables cover the first run already, with less than a block to spare.
    """
    if not rows:
        return 0
    until_end = min([row.end - row.known for row in rows]) - 1
    # Row i takes a block with further run slacks[i] + 1 and then every block_tokens runs, so in a cycle of block_tokens
    # runs each row takes one, always in this order. The first block that is not there belongs to rows[index].
    slacks = sorted([len(row.table.blocks) * block_tokens - row.computed - 1 for row in rows])
    cycles, index = divmod(free_blocks, len(rows))
    return min(until_end, cycles * block_tokens + slacks[index])


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
