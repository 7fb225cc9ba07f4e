"""The one asynchronous copier: moves in order of priority and deadline, over links that may be slowed on purpose.

Who wants bytes somewhere else submits a move and gets a ticket; a few threads do the work, which releases the
interpreter's lock (direct I/O, large copies). The queue is bounded, so a submitter waits where the mover cannot keep
up. A throttled link holds its next move, and no other link's, until its bucket lets the last one be over. Knows links,
bytes and deadlines; must not know what is moved.
"""

from __future__ import annotations

import heapq
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import NamedTuple

from megalith.base.clock import Clock, MonotonicClock
from megalith.base.errors import TierError
from megalith.base.units import NS_PER_S, format_bytes, format_duration
from megalith.tier.throttle import TokenBucket

WAIT_NS = 60 * NS_PER_S
"""The longest wait of whoever names no deadline."""
_LOOK_S = 0.02
"""How long a wait for the clock sleeps at most before it looks again: the clock may be one that is moved by hand."""


class Move(NamedTuple):
    """Bytes to be moved over a link, by `work`, which may raise; what it raises is the ticket's error."""

    link: str
    num_bytes: int
    work: Callable[[], None]
    priority: int = 0
    """The lowest goes first; of equals the earliest deadline, then who came first."""
    deadline_ns: int | None = None
    """On the mover's clock. A move that is over later counts as late; it is not dropped. None: whenever."""
    label: str = ""
    ended: Callable[[BaseException | None], None] | None = None
    """Called once, whichever way it ends, before the ticket says so: None, or what broke it. For who holds bytes."""


class LinkStats(NamedTuple):
    """What a link has done."""

    num_bytes: int = 0
    """Of moves that succeeded."""
    moves: int = 0
    failed: int = 0
    cancelled: int = 0
    late: int = 0
    busy_ns: int = 0
    """Sum over moves from begin to over, imposed waiting included."""
    waited_ns: int = 0
    """Sum over moves from submitted to begun."""


class Ticket:
    """A move under way. `error` is what broke it, None while it may still succeed."""

    __slots__ = ("_ended", "_mover", "error", "move", "over_ns", "submitted_ns")

    def __init__(self, move: Move, mover: Mover, submitted_ns: int) -> None:
        self.move = move
        self.submitted_ns = submitted_ns
        self.over_ns = 0
        """When the link lets it be over; meaningful once the work has ended."""
        self.error: BaseException | None = None
        self._ended = threading.Event()
        self._mover = mover

    @property
    def done(self) -> bool:
        """It succeeded, failed or was cancelled, and wait() returns at once."""
        return self._ended.is_set() and self._mover.clock.now_ns() >= self.over_ns

    def cancel(self) -> bool:
        """Take it out of the queue: True. False when it is being done or is over: then it runs to its end."""
        return self._mover._cancel(self)

    def wait(self, timeout_ns: int = WAIT_NS) -> None:
        """Return when it is done; raises what broke it, or TierError when it is cancelled or not done in time."""
        clock = self._mover.clock
        until_ns = clock.now_ns() + timeout_ns
        while not self.done:
            now_ns = clock.now_ns()
            if now_ns >= until_ns:
                raise TierError(f"The move of {self} was not over in {format_duration(timeout_ns)}.")
            if self._ended.is_set():  # Only the link's own time is left.
                time.sleep(max(0, min((min(until_ns, self.over_ns) - now_ns) / NS_PER_S, _LOOK_S)))
            else:
                self._ended.wait(min((until_ns - now_ns) / NS_PER_S, _LOOK_S))
        if self.error is not None:
            raise self.error

    def __str__(self) -> str:
        return f"{self.move.label or 'a block'} ({format_bytes(self.move.num_bytes)} over {self.move.link})"


_Entry = tuple[int, float, int, Ticket]


class _Link:
    """The queue of one link, under the mover's lock."""

    __slots__ = ("bucket", "free_ns", "queue", "stats")

    def __init__(self, bucket: TokenBucket | None) -> None:
        self.bucket = bucket
        self.free_ns = 0
        """When a throttled link may begin its next move."""
        self.queue: list[_Entry] = []
        self.stats = LinkStats()

    def add(self, **counts: int) -> None:
        self.stats = self.stats._replace(**{name: getattr(self.stats, name) + count for name, count in counts.items()})


class Mover:
    """`workers` threads and at most `queue` moves that wait. Close it, or use it as a context."""

    def __init__(self, workers: int = 1, clock: Clock | None = None, queue: int = 256) -> None:
        if workers < 1 or queue < 1:
            raise TierError(f"A mover of {workers} workers with a queue of {queue} cannot be.", "Give it 1 of each.")
        self.clock: Clock = MonotonicClock() if clock is None else clock
        self.queue = queue
        self._links: dict[str, _Link] = {}
        self._lock = threading.Condition()
        self._waiting = self._count = 0
        self._closed = False
        self._running: dict[int, Ticket] = {}
        self._threads = [threading.Thread(target=self._work, name=f"mover-{n}", daemon=True) for n in range(workers)]
        for thread in self._threads:
            thread.start()

    def add_link(self, name: str, bucket: TokenBucket | None = None) -> None:
        """Declare a link, slowed to what `bucket` allows. Raises TierError for a name that is taken."""
        with self._lock:
            if name in self._links:
                raise TierError(f"The link {name} is there already.")
            self._links[name] = _Link(bucket)

    def submit(self, move: Move) -> Ticket:
        """Queue a move. Where the queue is full, waits for room until the move's deadline, then raises TierError."""
        with self._lock:
            link = self._links.get(move.link)
            if link is None:
                raise TierError(f"There is no link {move.link!r}.", f"There are: {', '.join(self._links) or 'none'}.")
            begin_ns = self.clock.now_ns()
            until_ns = begin_ns + WAIT_NS if move.deadline_ns is None else move.deadline_ns
            while self._waiting >= self.queue and not self._closed:
                left_ns = until_ns - self.clock.now_ns()
                if left_ns <= 0:
                    waited = format_duration(self.clock.now_ns() - begin_ns)
                    raise TierError(
                        f"The mover's queue of {self.queue} was still full at the deadline of "
                        f"{move.label or 'a block'}, {waited} after it was submitted.",
                        "Ask for less ahead, or give it more time.",
                    )
                self._lock.wait(min(left_ns / NS_PER_S, _LOOK_S))
            if self._closed:
                raise TierError(f"The mover was closed before {move.label or 'a block'} was submitted.")
            ticket = Ticket(move, self, self.clock.now_ns())
            deadline = float("inf") if move.deadline_ns is None else float(move.deadline_ns)
            heapq.heappush(link.queue, (move.priority, deadline, self._count, ticket))
            self._count += 1
            self._waiting += 1
            self._lock.notify_all()
            return ticket

    def stats(self) -> dict[str, LinkStats]:
        """What each link has done so far."""
        with self._lock:
            return {name: link.stats for name, link in self._links.items()}

    @property
    def waiting(self) -> int:
        """Moves in the queue, not begun."""
        return self._waiting

    def close(self, timeout_ns: int = 10 * NS_PER_S) -> None:
        """Cancel what has not begun and wait for what has. Again is no error.

        Raises TierError, and returns anyway, when a move does not end in `timeout_ns`; its thread ends with it.
        """
        dropped = []
        with self._lock:
            self._closed = True
            for link in self._links.values():
                for *_, ticket in list(link.queue):
                    self._drop(link, ticket, "the mover was closed")
                    dropped.append(ticket)
            self._lock.notify_all()
        for ticket in dropped:
            _end(ticket)
        until_ns = MonotonicClock().now_ns() + timeout_ns
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(max(0, until_ns - MonotonicClock().now_ns()) / NS_PER_S)
        with self._lock:
            stuck = [str(ticket) for ident, ticket in self._running.items() if ident != threading.get_ident()]
        if stuck:
            raise TierError(
                f"Still moving {format_duration(timeout_ns)} after the mover was closed: {', '.join(stuck)}."
            )

    def _cancel(self, ticket: Ticket) -> bool:
        with self._lock:
            link = self._links[ticket.move.link]
            if all(entry[-1] is not ticket for entry in link.queue):
                return False
            self._drop(link, ticket, "it was cancelled")
            self._lock.notify_all()
        _end(ticket)
        return True

    def _drop(self, link: _Link, ticket: Ticket, why: str) -> None:
        """Out of the queue at once, so that who cancels often does not fill it with the dead."""
        link.queue = [entry for entry in link.queue if entry[-1] is not ticket]
        heapq.heapify(link.queue)
        self._waiting -= 1
        link.add(cancelled=1)
        ticket.error = TierError(f"The move of {ticket} was not done: {why}.")

    def _take(self) -> tuple[_Link, Ticket, int] | None:
        """The next move to begin, and now; None when closed. Under the lock."""
        while not self._closed:
            now_ns = self.clock.now_ns()
            queued = [link for link in self._links.values() if link.queue]
            free = [link for link in queued if link.free_ns <= now_ns]
            if free:
                link = min(free, key=lambda link: link.queue[0][:3])
                ticket = heapq.heappop(link.queue)[-1]
                self._waiting -= 1
                self._running[threading.get_ident()] = ticket
                if link.bucket is not None:
                    ticket.over_ns = link.bucket.ready_ns(now_ns, ticket.move.num_bytes)
                    link.free_ns = ticket.over_ns - link.bucket.latency_ns
                self._lock.notify_all()
                return link, ticket, now_ns
            left_ns = min([link.free_ns - now_ns for link in queued], default=0)
            self._lock.wait(min(left_ns / NS_PER_S, _LOOK_S) if queued else None)
        return None

    def _work(self) -> None:
        """One thread: moves until closed."""
        while True:
            with self._lock:
                taken = self._take()
                if taken is None:
                    return
                link, ticket, begin_ns = taken
            try:
                ticket.move.work()
            except BaseException as error:  # Whatever it is belongs to who waits, and this thread goes on.
                ticket.error = error
            with self._lock:
                ticket.over_ns = max(ticket.over_ns, self.clock.now_ns())
                late = ticket.move.deadline_ns is not None and ticket.over_ns > ticket.move.deadline_ns
                link.add(
                    num_bytes=0 if ticket.error else ticket.move.num_bytes,
                    moves=1,
                    failed=int(ticket.error is not None),
                    late=int(late),
                    busy_ns=ticket.over_ns - begin_ns,
                    waited_ns=begin_ns - ticket.submitted_ns,
                )
                del self._running[threading.get_ident()]
            _end(ticket)
            del taken, ticket  # What a move holds on to goes when its ticket does, not when the next one comes.

    def __enter__(self) -> Mover:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _end(ticket: Ticket) -> None:
    """Tell who holds the bytes, then who waits. Outside the lock: the hook may submit and cancel."""
    if ticket.move.ended is not None:
        try:
            ticket.move.ended(ticket.error)
        except BaseException as error:
            ticket.error = ticket.error or error
    ticket._ended.set()
