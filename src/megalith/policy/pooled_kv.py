"""Infinite-LLM: where blocks of a request's KV live, decided over the whole cluster (arXiv:2401.02669, section 5).

Knows dated facts and a straight line for the time of a step; must not know how blocks are moved, or true output
lengths. The manager of the cluster looks once a period. An instance is a debtor when its batch is small (below `beta`)
and its memory is what keeps it so, a creditor while less than `lend_share` of its memory is used. For each debtor, the
smallest batch first, it moves blocks of the longest request to the creditors that have most free, as many as make the
modelled throughput of all of them largest:

    tokens a second of an instance = batch / (base + each * batch + per token * tokens here)
    n* = argmax over n of [ debtor with n blocks moved out, and whom that lets in ] + [ creditors with n blocks in ]

and nothing when that gains nothing. Short of memory is, as in version 1 of the publication (DistKV-LLM), an instance
whose requests are about to be preempted; or one whose next request cannot come in. A prompt that is longer than the
memory of an instance has blocks kept for it elsewhere before it runs, on as many creditors as it takes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megalith.base.config import Config
from megalith.base.units import NS_PER_S
from megalith.policy.cluster import (
    SHORTEST_PERIOD_S,
    Command,
    Event,
    InstanceFacts,
    InstanceId,
    MoveKv,
    RequestFacts,
    View,
)
from megalith.policy.facts import RequestId
from megalith.policy.router_options import require

GRID = 8
"""Sizes of a move that are tried beside those that let one more request in."""


class Lending(NamedTuple):
    """What whoever carries out moves of KV keeps to."""

    share: float
    """An instance lends while at most this share of its blocks is used, lent ones included."""
    hold_s: float
    """Blocks kept for a request that does not come in within this are given back."""
    least_free_share: float
    """What is left free when a request comes in by what is lent to it."""


class StepLine(NamedTuple):
    """Time of a step of decodes: base + each * batch + token * tokens in the cache here. In any one unit."""

    base: float
    each: float
    token: float


DEFAULT_LINE = StepLine(32_768.0, 32.0, 1.0)
"""Until learn(): reading the weights takes as long as 32,768 tokens of KV (13B in bf16: 26 GB over 0.8 MB), one more
row as long as 32 of them."""


class PooledKvOptions(Config):
    """When and how much. The publication gives no figures for the thresholds; these are ours."""

    period_s: float = 0.1
    """How often the cluster is looked at."""
    beta: int = 128
    """An instance with at least this many running requests is no debtor."""
    lend_share: float = 0.8
    """A creditor lends while at most this share of its blocks is used, so that its own requests can grow."""
    short_share: float = 0.02
    """With less than this share of its blocks free, an instance is short of memory,"""
    room_share: float = 0.05
    """and moves as many blocks out as it takes to have this share free."""
    least_blocks: int = 16
    """Smaller moves are not made."""
    place_from: float = 1.0
    """Requests that wait are spread before they run when they need more than this share of an instance's blocks. Below
    1 more of them come in at once, but prompts with KV elsewhere make both sides wait for longer than that gains."""
    hold_s: float = 2.0
    """Blocks that are kept for a request are given back unless it comes in within this."""
    waits: bool = True
    """Reckon that the step of a debtor waits for attention elsewhere that takes longer than its own. False: as
    published, where a block that is elsewhere costs its owner nothing."""

    def __post_init__(self) -> None:
        require(self.period_s >= SHORTEST_PERIOD_S, f"period_s must be at least {SHORTEST_PERIOD_S}")
        require(self.beta >= 1 and self.least_blocks >= 1, "beta and least_blocks must be at least 1")
        require(0 < self.lend_share <= 1, "lend_share must be above 0 and at most 1")
        require(0 <= self.short_share <= self.room_share < 1, "0 <= short_share <= room_share < 1 must hold")
        require(self.hold_s > 0 and 0 < self.place_from <= 1, "hold_s must be above 0, place_from from 0 to 1")


@dataclass(slots=True)
class _Book:
    """One instance as the decisions of this tick leave it."""

    facts: InstanceFacts
    line: StepLine
    free: int
    batch: int
    tokens: int
    waiting: int
    head: RequestFacts | None
    head_lacks: int
    """Blocks short of what the first of the waiting ones needs to come in; 0 when nobody waits."""
    next_blocks: int
    """Mean need of those that wait behind it."""
    away: int
    """Blocks that others hold of requests that run here; 0 when nobody waits for them."""

    def throughput(self, moved: int, joined: int = 0, preempted: int = 0, away: int = 0) -> float:
        """Tokens a second with `moved` blocks fewer here (more, below 0), so many more or fewer in the batch, and
        `away` blocks more to wait for."""
        batch = self.batch + joined - preempted
        blocks = self.tokens // self.facts.block_tokens + joined * self.next_blocks - moved
        line, read = self.line, max(0, blocks, self.away + away if self.away or away else 0)
        return batch / (line.base + line.each * batch + line.token * read * self.facts.block_tokens)


class PooledKv:
    """See the module. State: what was asked for and may not show in the view yet."""

    name = "pooled-kv"
    listens = frozenset({"tick", "command"})

    def __init__(self, options: PooledKvOptions, seed: int = 0) -> None:  # noqa: ARG002
        self.options = options
        self.lending = Lending(options.lend_share, options.hold_s, options.short_share)
        self.period_ns: int | None = max(1, round(options.period_s * NS_PER_S))
        self._lines: Mapping[str, StepLine] = {}
        self._asked: dict[RequestId, tuple[MoveKv, int]] = {}
        """Copies under way, by request, and since when."""
        self._changed_ns: dict[InstanceId, int] = {}
        """When something was last moved to or from an instance: an older view does not show it."""
        self._taken: list[tuple[int, InstanceId, int]] = []
        """(when, creditor, blocks) that a view older than that does not show."""

    def learn(self, lines: Mapping[str, StepLine]) -> None:
        """How long steps take, by pool; without it, DEFAULT_LINE."""
        self._lines = dict(lines)

    def act(self, event: Event, view: View) -> Iterable[Command]:
        """Moves on a tick; takes note of how they end."""
        if event.kind == "command":
            self._over(event)
            return ()
        self._forget(view.as_of_ns)
        books = [self._book(facts) for facts in view.instances if facts.role == "mixed"]
        creditors = [book for book in books if self._lends(book)]
        moves: list[MoveKv] = []
        for debtor in sorted(books, key=lambda book: (book.batch, book.facts.id)):
            if debtor.batch < self.options.beta and debtor.facts.id not in self._changed_ns and creditors:
                others = [book for book in creditors if book is not debtor]
                others.sort(key=lambda book: (-self._spare(book), book.facts.id))
                moves += self._relieve(debtor, others, event.at_ns)
        return moves

    # What there is

    def _book(self, facts: InstanceFacts) -> _Book:
        free = facts.free_blocks() - sum([blocks for _, target, blocks in self._taken if target == facts.id])
        running, waiting = facts.running(), facts.waiting()
        here = facts.kv_blocks - free
        book = _Book(
            facts, self._lines.get(facts.pool, DEFAULT_LINE), free, running, here * facts.block_tokens, waiting,
            facts.first_waiting(), 0, 0, 0,
        )  # fmt: skip
        if self.options.waits:
            book.away = sum([request.away_blocks for request in facts.requests()])
        if book.head is not None:
            needed = self._blocks(book.head.known_tokens, facts) - book.head.away_blocks
            book.head_lacks = max(0, needed + self._reserve(facts, running) - free)
            behind = facts.waiting_blocks() - self._blocks(book.head.known_tokens, facts)
            book.next_blocks = behind // (waiting - 1) if waiting > 1 and behind > 0 else 0
        return book

    def _reserve(self, facts: InstanceFacts, running: int) -> int:
        """Blocks that stay free here when one more comes in, for all to grow."""
        return int(self.options.short_share * facts.kv_blocks) + 1 if running else 1

    def _lends(self, book: _Book) -> bool:
        """Whether its memory is used little enough; what waits there and lacks more than that loses nothing by it."""
        return book.facts.accepting and self._spare(book) >= self.options.least_blocks

    def _spare(self, book: _Book) -> int:
        return book.free - (book.facts.kv_blocks - int(self.options.lend_share * book.facts.kv_blocks))

    @staticmethod
    def _blocks(tokens: int, facts: InstanceFacts) -> int:
        return -(-tokens // facts.block_tokens)

    # What is moved

    def _relieve(self, debtor: _Book, creditors: Sequence[_Book], at_ns: int) -> list[MoveKv]:
        """Moves that let the next request of a debtor in, or keep those that run there from being preempted."""
        options, facts = self.options, debtor.facts
        spare = [self._spare(book) for book in creditors]
        if not spare:
            return []
        short = debtor.batch > 0 and debtor.free < options.short_share * facts.kv_blocks
        room = int(options.room_share * facts.kv_blocks) - debtor.free
        if not debtor.head_lacks and not short:
            return []
        least = max(debtor.head_lacks, room if short else 0, options.least_blocks)
        longest = self._longest(debtor)
        here = 0 if longest is None else longest.blocks - 2
        if debtor.head is not None and debtor.head_lacks and self._is_next(debtor):
            blocks = self._blocks(debtor.head.known_tokens, facts) - debtor.head.away_blocks
            if blocks > options.place_from * facts.kv_blocks - self._reserve(facts, 0):
                return self._place(debtor, creditors, blocks - 1, at_ns)
        if longest is None:
            return []
        most = min(here, spare[0])
        if short and not debtor.head_lacks:
            least = min(least, most)
        blocks = self._best(debtor, creditors[:1], least, most, short)
        if blocks < options.least_blocks:
            return []
        return [self._move(longest.id, debtor, creditors[0], blocks, at_ns, copied=True)]

    def _place(self, debtor: _Book, creditors: Sequence[_Book], most: int, at_ns: int) -> list[MoveKv]:
        """Keep blocks elsewhere for the request that waits first, on as many creditors as it takes."""
        head = debtor.head
        assert head is not None
        spare = sum([max(0, self._spare(book)) for book in creditors])
        # Room for it to grow, if there is any; just what lets it in, if there is not.
        room = int(self.options.room_share * debtor.facts.kv_blocks)
        least = max(debtor.head_lacks, min(debtor.head_lacks + room, spare, most))
        blocks = self._best(debtor, creditors, least, min(max(most, least), spare), False)
        moves = []
        for creditor in creditors:
            part = min(blocks, self._spare(creditor))
            if part > 0:
                moves.append(self._move(head.id, debtor, creditor, part, at_ns, copied=False))
                blocks -= part
        return moves

    def _longest(self, debtor: _Book) -> RequestFacts | None:
        """The request that decodes there with the most blocks there."""
        movable = [
            request
            for request in debtor.facts.requests()
            if request.decoding and not request.moving and request.id not in self._asked
        ]
        return max(movable, key=lambda request: (request.blocks, -request.id), default=None)

    @staticmethod
    def _is_next(debtor: _Book) -> bool:
        """Whether the first who waits lacks nothing but room: no prompt is being computed there."""
        return all(request.decoding for request in debtor.facts.requests())

    def _best(self, debtor: _Book, creditors: Sequence[_Book], least: int, most: int, short: bool) -> int:
        """n*: the number of blocks, `least` to `most`, that gains most; 0 when none gains anything."""
        if least > most or least < 1:
            return 0
        step = debtor.next_blocks or 1
        behind = min(max(0, debtor.waiting - 1), (most - least) // step) if debtor.next_blocks else 0
        sizes = {least + k * step for k in range(behind + 1)}
        sizes |= {least + (most - least) * k // GRID for k in range(GRID + 1)}
        best, gained = 0, 0.0
        for blocks in sorted(sizes):
            gain = self._gain(debtor, creditors, blocks, blocks - least, short)
            if gain > gained:
                best, gained = blocks, gain
        return best

    def _gain(self, debtor: _Book, creditors: Sequence[_Book], blocks: int, over: int, short: bool) -> float:
        """Tokens a second more on all of them together. `over`: what is left for those behind the first who waits."""
        before = debtor.throughput(0, preempted=1 if short and debtor.batch > 1 else 0)
        joined = 1 if debtor.head_lacks else 0
        if debtor.next_blocks:
            joined += min(max(0, debtor.waiting - 1), over // debtor.next_blocks)
        own = 0
        if joined and debtor.head is not None:
            # The first who waits counts with its own blocks, not with the mean of the others.
            own = self._blocks(debtor.head.known_tokens, debtor.facts) - debtor.next_blocks
        away = blocks if self.options.waits else 0
        gain = debtor.throughput(blocks - own, joined, away=away) - before
        for creditor in creditors:
            part = min(blocks, max(0, self._spare(creditor)))
            gain += creditor.throughput(-part) - creditor.throughput(0)
            blocks -= part
        return gain

    def _move(
        self, request_id: RequestId, debtor: _Book, creditor: _Book, blocks: int, at_ns: int, copied: bool
    ) -> MoveKv:
        command = MoveKv(request_id, debtor.facts.id, creditor.facts.id, blocks)
        creditor.free -= blocks
        creditor.head_lacks += blocks if creditor.head_lacks else 0
        creditor.tokens += blocks * creditor.facts.block_tokens
        self._taken.append((at_ns, creditor.facts.id, blocks))
        self._changed_ns[debtor.facts.id] = at_ns
        if copied:
            self._asked[request_id] = (command, at_ns)
        return command

    # What became of it

    def _over(self, event: Event) -> None:
        command = event.data["command"]
        if not isinstance(command, MoveKv):
            return
        asked = self._asked.get(command.request_id)
        if asked is not None and asked[0] == command:
            del self._asked[command.request_id]
            self._changed_ns[command.source] = event.at_ns
        if event.data["outcome"] == "refused":
            # The view was wrong about the target: it counts as full until a newer one.
            self._taken.append((event.at_ns, command.target, command.blocks))

    def _forget(self, as_of_ns: int) -> None:
        """Drop what the view shows by now."""
        under_way = {command.source for command, _ in self._asked.values()}
        self._taken = [taken for taken in self._taken if taken[0] > as_of_ns]
        self._changed_ns = {
            instance: at_ns for instance, at_ns in self._changed_ns.items() if at_ns > as_of_ns or instance in under_way
        }
