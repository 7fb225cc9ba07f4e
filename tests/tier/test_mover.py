import threading
import time
from collections.abc import Iterator

import pytest

from megalith.base.clock import ManualClock, MonotonicClock
from megalith.base.errors import TierError
from megalith.base.units import NS_PER_S
from megalith.tier.mover import Move, Mover, Ticket
from megalith.tier.throttle import TokenBucket

MS = 1_000_000


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("mover-")]


class Gate:
    """A move that holds a worker until it is opened."""

    def __init__(self, mover: Mover, link: str = "disk") -> None:
        self.begun, self.open = threading.Event(), threading.Event()
        self.ticket = mover.submit(Move(link, 1, self._work, priority=-100, label="gate"))
        assert self.begun.wait(5)

    def _work(self) -> None:
        self.begun.set()
        assert self.open.wait(5)


def nothing() -> None:
    return None


def test_moves_go_by_priority_then_deadline_then_order() -> None:
    done: list[str] = []
    with Mover() as mover:
        mover.add_link("disk")
        mover.add_link("pcie")
        gate = Gate(mover)
        late = MonotonicClock().now_ns() + 60 * NS_PER_S
        for label, link, priority, deadline in [
            ("d", "disk", 1, None), ("c", "disk", 1, late + 2), ("b", "pcie", 1, late + 1), ("e", "disk", 1, None),
            ("a", "pcie", 0, None), ("f", "disk", 2, late),
        ]:  # fmt: skip
            last = mover.submit(Move(link, 10, lambda label=label: done.append(label), priority, deadline, label))  # type: ignore[misc]
        assert mover.waiting == 6
        gate.open.set()
        last.wait()
        assert done == list("abcdef")
        stats = mover.stats()
        assert (stats["disk"].moves, stats["disk"].num_bytes, stats["disk"].late) == (5, 41, 0)
        assert (stats["pcie"].moves, stats["pcie"].num_bytes) == (2, 20)
        assert stats["disk"].waited_ns > 0


def test_what_a_move_raises_is_its_tickets_and_the_worker_goes_on() -> None:
    def broken() -> None:
        raise TierError("The disk is on fire.")

    def leave() -> None:
        raise SystemExit(3)

    with Mover() as mover:
        mover.add_link("disk")
        tickets = [mover.submit(Move("disk", 10, work)) for work in (broken, leave, nothing)]
        with pytest.raises(TierError, match="on fire"):
            tickets[0].wait()
        with pytest.raises(SystemExit):
            tickets[1].wait()
        tickets[2].wait()
        assert isinstance(tickets[0].error, TierError)
        assert mover.stats()["disk"][:3] == (10, 3, 2)


def test_a_cancelled_move_is_never_done_and_one_under_way_is_finished() -> None:
    done: list[int] = []
    with Mover() as mover:
        mover.add_link("disk")
        gate = Gate(mover)
        tickets = [mover.submit(Move("disk", 1, lambda n=n: done.append(n))) for n in range(5)]  # type: ignore[misc]
        assert tickets[2].cancel()
        assert not tickets[2].cancel(), "once"
        assert tickets[2].done
        assert mover.waiting == 4
        assert not gate.ticket.cancel(), "mid-move it runs to its end"
        gate.open.set()
        tickets[4].wait()
        assert done == [0, 1, 3, 4]
        assert not tickets[4].cancel()
        with pytest.raises(TierError, match=r"a block \(1 B over disk\) was not done: it was cancelled"):
            tickets[2].wait()
        assert mover.stats()["disk"].cancelled == 1
        gate.ticket.wait()


def test_a_full_queue_holds_the_submitter_until_there_is_room_or_its_deadline() -> None:
    with Mover(queue=2) as mover:
        mover.add_link("disk")
        gate = Gate(mover)
        tickets = [mover.submit(Move("disk", 1, nothing)) for _ in range(2)]
        begin = time.monotonic()
        with pytest.raises(TierError, match="queue of 2 was still full at the deadline of w7"):
            mover.submit(Move("disk", 1, nothing, deadline_ns=mover.clock.now_ns() + 30 * MS, label="w7"))
        assert 0.03 <= time.monotonic() - begin < 5
        submitted: list[Ticket] = []
        waiter = threading.Thread(target=lambda: submitted.append(mover.submit(Move("disk", 1, nothing))))
        waiter.start()
        time.sleep(0.05)
        assert not submitted
        assert tickets[0].cancel(), "a cancelled one makes room at once"
        waiter.join(5)
        assert len(submitted) == 1
        gate.open.set()
        submitted[0].wait()


def test_a_throttled_link_takes_its_time_and_holds_no_other() -> None:
    """One worker: 3 x 1 MB at 50 MB/s take 60 ms; a second link's move is done in between."""
    with Mover() as mover:
        mover.add_link("slow", TokenBucket(50_000_000))
        mover.add_link("fast")
        begin = mover.clock.now_ns()
        slow = [mover.submit(Move("slow", 1_000_000, nothing, priority=-1)) for _ in range(3)]
        mover.submit(Move("fast", 1, nothing)).wait()
        assert mover.clock.now_ns() - begin < 60 * MS, "not behind the slow link"
        assert not slow[2].done
        slow[2].wait()
        assert mover.clock.now_ns() - begin >= 60 * MS
        assert slow[2].over_ns - begin >= 60 * MS
        assert mover.stats()["slow"].busy_ns >= 60 * MS
        assert mover.stats()["slow"].num_bytes == 3_000_000


def test_on_a_clock_moved_by_hand_a_link_is_exact_to_the_nanosecond() -> None:
    clock = ManualClock()
    with Mover(clock=clock) as mover:
        mover.add_link("pcie", TokenBucket(NS_PER_S, latency_ns=5))
        first = mover.submit(Move("pcie", 100, nothing, deadline_ns=104))
        second = mover.submit(Move("pcie", 50, nothing, deadline_ns=155))
        assert not first.done
        while mover.stats()["pcie"].moves < 1:
            time.sleep(0.001)
        assert first.over_ns == 105
        clock.advance(100)  # The link is free, the latency is not over.
        while mover.stats()["pcie"].moves < 2:
            time.sleep(0.001)
        assert not first.done
        clock.advance(5)
        assert first.done
        assert second.over_ns == 155
        assert not second.done
        with pytest.raises(TierError, match="not over in 0 ns"):
            second.wait(timeout_ns=0)
        clock.advance(50)
        second.wait()
        assert mover.stats()["pcie"].late == 1, "the first, by a nanosecond"


def test_close_cancels_what_has_not_begun_and_names_what_is_stuck() -> None:
    mover = Mover(workers=2)
    mover.add_link("disk")
    gates = [Gate(mover), Gate(mover)]
    queued = mover.submit(Move("disk", 1, nothing))
    with pytest.raises(TierError, match=r"Still moving 20 ms after .*gate \(1 B over disk\)"):
        mover.close(timeout_ns=20 * MS)
    with pytest.raises(TierError, match="the mover was closed"):
        queued.wait()
    with pytest.raises(TierError, match="closed before w1"):
        mover.submit(Move("disk", 1, nothing, label="w1"))
    for gate in gates:
        gate.open.set()
        gate.ticket.wait()
    mover.close()


def test_close_wakes_a_submitter_that_waits_for_room() -> None:
    mover = Mover(queue=1)
    mover.add_link("disk")
    gate = Gate(mover)
    mover.submit(Move("disk", 1, nothing))
    errors: list[BaseException] = []

    def submit() -> None:
        try:
            mover.submit(Move("disk", 1, nothing))
        except TierError as error:
            errors.append(error)

    waiter = threading.Thread(target=submit)
    waiter.start()
    time.sleep(0.03)
    with pytest.raises(TierError, match="Still moving"):
        mover.close(timeout_ns=0)
    waiter.join(5)
    assert "closed before" in str(errors[0])
    gate.open.set()
    mover.close()


def test_close_from_inside_a_move_does_not_wait_for_itself() -> None:
    mover = Mover()
    mover.add_link("disk")
    ticket = mover.submit(Move("disk", 1, mover.close))
    ticket.wait(5 * NS_PER_S)
    mover.close()
    assert ticket.done
    assert ticket.error is None
    with pytest.raises(TierError, match="closed before"):
        mover.submit(Move("disk", 1, nothing))


def test_links_have_to_be_declared_once() -> None:
    with Mover() as mover:
        mover.add_link("disk")
        with pytest.raises(TierError, match="there already"):
            mover.add_link("disk")
        with pytest.raises(TierError, match=r"no link 'dsk'. There are: disk"):
            mover.submit(Move("dsk", 1, nothing))
    with pytest.raises(TierError, match="cannot be"):
        Mover(workers=0)


def test_two_workers_and_many_submitters_lose_nothing() -> None:
    total = []
    lock = threading.Lock()

    def work() -> None:
        with lock:
            total.append(1)

    with Mover(workers=2, queue=8) as mover:
        mover.add_link("disk")

        def submit() -> None:
            for n in range(100):
                ticket = mover.submit(Move("disk", 3, work, priority=n % 3))
                if n % 10 == 0:
                    ticket.cancel()

        threads = [threading.Thread(target=submit) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        mover.submit(Move("disk", 3, nothing, priority=9)).wait()
        while mover.stats()["disk"].moves + mover.stats()["disk"].cancelled < 401:
            time.sleep(0.001)
        stats = mover.stats()["disk"]
        assert stats.moves == len(total) + 1
        assert stats.num_bytes == 3 * stats.moves
        assert stats.moves + stats.cancelled == 401
