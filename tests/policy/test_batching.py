from __future__ import annotations

import pytest

from megalith.base.errors import ConfigError
from megalith.policy.batching import POLICY_NAMES, Admission, BatchFacts, FirstCome, PrefillFirst, SplitFuse, by_name


@pytest.mark.parametrize("name", POLICY_NAMES)
def test_by_name(name: str) -> None:
    policy = by_name(name, 32)
    assert policy.name == name
    assert policy.shape(BatchFacts(0, 1)).token_budget == 32


@pytest.mark.parametrize(
    ("wrong", "near"), [("splitfus", "splitfuse"), ("Prefill_First", "prefill-first"), ("firstcome", "first-come")]
)
def test_an_unknown_name_gets_the_nearest(wrong: str, near: str) -> None:
    with pytest.raises(ConfigError, match=f"Did you mean '{near}'"):
        by_name(wrong, 32)


@pytest.mark.parametrize("name", POLICY_NAMES)
def test_a_budget_below_one_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        by_name(name, 0)


def test_shapes() -> None:
    splitfuse = SplitFuse(8).shape(BatchFacts(4, 2))
    assert (splitfuse.mixed, splitfuse.split, splitfuse.admission) == (True, True, Admission.BUDGET)
    prefill_first = PrefillFirst(8).shape(BatchFacts(4, 2))
    assert (prefill_first.mixed, prefill_first.split, prefill_first.admission) == (False, False, Admission.BUDGET)


def test_first_come_admits_only_when_nothing_runs() -> None:
    policy = FirstCome(8)
    assert policy.shape(BatchFacts(0, 5)).admission is Admission.ALL
    assert policy.shape(BatchFacts(1, 5)).admission is Admission.NONE
