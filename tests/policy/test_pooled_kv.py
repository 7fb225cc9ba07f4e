"""Which blocks move where, on made-up facts."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from megalith.policy.cluster import Event, MoveKv
from megalith.policy.pooled_kv import PooledKv, PooledKvOptions
from tests.policy.facts import Facts, Seen, instances_of, many, running, tick

LONG = running(1, 800)
HEAD = running(9, 0, known_tokens=160, decoding=False)


def policy(**options: float) -> PooledKv:
    return PooledKv(PooledKvOptions(**options))  # type: ignore[arg-type]


def full(**more: object) -> Facts:
    """One long request, and somebody who waits for 100 blocks."""
    values = {"batch": (LONG,), "num_waiting": 1, "num_waiting_blocks": 100,
              "head": replace_head(1600), **more}  # fmt: skip
    return Facts(**values)  # type: ignore[arg-type]


def replace_head(tokens: int) -> object:
    return HEAD._replace(known_tokens=tokens)


def test_blocks_of_the_longest_go_where_most_is_free() -> None:
    seen = Seen(many(full(), Facts(batch=(running(2, 400),)), Facts()), now_ns=5, as_of_ns=5)
    (move,) = policy().act(tick(5), seen)
    assert isinstance(move, MoveKv)
    assert (move.request_id, move.source, move.target) == (1, 0, 2)
    assert 100 - 51 <= move.blocks <= 798


def test_nothing_moves_where_nobody_lacks_memory_or_nobody_has_any() -> None:
    assert list(policy().act(tick(), Seen(many(Facts(batch=(LONG,)), Facts())))) == []
    crowded = Facts(batch=(running(3, 800),))
    assert list(policy().act(tick(), Seen(many(full(), crowded)))) == []
    gone = Facts(accepting=False)
    assert list(policy().act(tick(), Seen(many(full(), gone)))) == []


def test_a_large_batch_is_no_debtor() -> None:
    seen = Seen(many(full(), Facts()))
    assert list(policy(beta=2).act(tick(), seen))
    assert list(policy(beta=1).act(tick(), seen)) == []


def test_a_prompt_longer_than_an_instance_is_spread_before_it_runs() -> None:
    waits = Facts(num_waiting=1, num_waiting_blocks=2000, head=replace_head(32_000))  # type: ignore[arg-type]
    moves = list(policy().act(tick(), Seen(many(waits, Facts(), Facts(), Facts()))))
    assert [move.request_id for move in moves] == [9] * len(moves)
    assert len({move.target for move in moves}) == len(moves) >= 2
    assert 2000 - 851 < sum(move.blocks for move in moves) < 2000
    # On too few others nothing is kept: it would wait with their memory in its hands.
    assert list(policy().act(tick(), Seen(many(waits, Facts())))) == []


def test_an_old_view_is_not_asked_for_the_same_again() -> None:
    asked = policy()
    seen = Seen(many(full(), Facts()), now_ns=10, as_of_ns=0)
    (move,) = asked.act(tick(10), seen)
    assert list(asked.act(tick(20), replace(seen, now_ns=20))) == []
    list(asked.act(Event("command", 30, data={"command": move, "outcome": "done", "reason": ""}), seen))
    assert list(asked.act(tick(40), replace(seen, now_ns=40, as_of_ns=25))) == []
    assert list(asked.act(tick(50), replace(seen, now_ns=50, as_of_ns=45)))


def test_refused_is_tried_again_with_a_newer_view() -> None:
    asked = policy()
    seen = Seen(many(full(), Facts()), now_ns=10, as_of_ns=10)
    (move,) = asked.act(tick(10), seen)
    list(asked.act(Event("command", 11, data={"command": move, "outcome": "refused", "reason": ""}), seen))
    assert list(asked.act(tick(20), replace(seen, now_ns=20, as_of_ns=10))) == []
    assert list(asked.act(tick(30), replace(seen, now_ns=30, as_of_ns=30))) == [move]


@settings(max_examples=150, deadline=None)
@given(instances_of(("mixed",)), st.integers(0, 2000))
def test_whatever_the_facts_no_more_is_asked_of_a_creditor_than_it_lends(facts: list[Facts], tokens: int) -> None:
    head = replace_head(tokens + 1)
    facts = [replace(one, head=head if one.num_waiting else None) for one in facts]  # type: ignore[arg-type]
    moves = list(policy().act(tick(), Seen(facts)))
    for one in facts:
        taken = sum(move.blocks for move in moves if move.target == one.id)
        assert taken <= max(0, one.free_blocks() - (one.kv_blocks - int(0.8 * one.kv_blocks)))
        assert not taken or one.accepting
    assert all(move.blocks > 0 and move.source != move.target for move in moves)
