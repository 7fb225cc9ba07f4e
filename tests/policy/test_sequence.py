from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from megalith.policy.facts import Request
from megalith.policy.sequence import RankQueue, Sequence


@given(st.lists(st.tuples(st.integers(-2, 2), st.integers(0, 3), st.sampled_from(["push", "pop", "discard"]))))
def test_the_queue_is_a_sorted_list(calls: list[tuple[int, int, str]]) -> None:
    queue, model = RankQueue(), []
    for request_id, (priority, arrival, call) in enumerate(calls):
        if call == "push" or not model:
            sequence = Sequence(Request(request_id, arrival, 1, 1, priority))
            queue.push(sequence)
            model.append(sequence)
            model.sort(key=lambda s: (-s.request.priority, s.request.arrival_ns, s.request.id))
        else:
            gone = model.pop(0 if call == "pop" else arrival % len(model))
            queue.discard(gone)
            if call == "pop":
                queue.push(gone)  # admitted and preempted at once
                queue.discard(gone)
        assert queue.head() is (model[0] if model else None)
        assert len(queue) == len(model)
        assert sorted(s.request.id for s in queue) == sorted(s.request.id for s in model)


def test_a_queue_with_a_stuck_head_does_not_grow_with_those_who_leave() -> None:
    queue = RankQueue()
    queue.push(Sequence(Request(0, 0, 1, 1, priority=1)))
    for request_id in range(1, 1000):
        sequence = Sequence(Request(request_id, request_id, 1, 1))
        queue.push(sequence)
        queue.discard(sequence)
    assert len(queue) == 1
    assert len(queue.items) == 1


def test_hashes_of_the_request_are_not_written_to() -> None:
    request = Request(1, 0, 8, 1, 0, (11, 12))
    sequence = Sequence(request)
    sequence.add_hash(13)
    sequence.add_hash(14)
    assert list(sequence.hashes) == [11, 12, 13, 14]
    assert request.prefix_hashes == (11, 12)
