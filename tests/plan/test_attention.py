"""`plan attention`: the best of each kind, the link that is needed, and what is refused."""

from __future__ import annotations

import msgspec
import pytest

from megalith.base.errors import ConfigError
from megalith.plan.attention import AttentionQuestion, mixed, needed_link, plain, plan_attention
from megalith.plan.attention_explain import attention_table, headline
from megalith.specs import catalog
from megalith.studies.lamina_cases import deployment, timer

QUESTION = AttentionQuestion(
    spec=catalog.model("llama-3.1-70b"), contexts=(1_024, 65_536), tensor_parallel=(2, 4), counts=(4,), batches=(1, 2)
)


def test_the_best_is_the_best_of_all_ways() -> None:
    plan = plan_attention(QUESTION)
    for row in plan.rows:
        ways = [mixed(QUESTION, row.context, tp, 4, batches) for tp in (2, 4) for batches in (1, 2)]
        assert row.mixed is not None
        assert row.mixed.tokens_per_usd == max(one.tokens_per_usd for one in ways if one is not None)
        assert row.own is not None
        assert row.gain_over_own == row.mixed.tokens_per_usd / row.own.tokens_per_usd
    near, far = plan.rows
    assert near.gain_over_own is not None
    assert far.gain_over_own is not None
    assert far.gain_over_own > near.gain_over_own, "attention grows with the context"
    assert len(attention_table(plan).rows) == 2
    assert "predicted" in headline(plan)


def test_the_link_that_is_needed_costs_what_it_may() -> None:
    one = timer("llama-65b", "batches=2")
    link = needed_link(one, 100, 1_200)
    assert 1e8 < link < 100e9
    slow, fast = (
        type(one)(one.cost, one.devices._replace(link_bytes_per_s=rate)).step_ps((), 100, 120_000, 1_200)
        for rate in (link, 1e15)
    )
    assert slow / fast == pytest.approx(1.05, abs=0.02)


def test_a_limit_on_tpot_is_kept() -> None:
    limited = msgspec.structs.replace(QUESTION, tpot_ms=45.0)
    for found in (mixed(limited, 1_024, 2, 4, 1), plain(limited, 1_024, 4, "h100-sxm")):
        assert found is not None
        assert found.step_s <= 0.045
    assert mixed(msgspec.structs.replace(QUESTION, tpot_ms=5.0), 1_024, 2, 4, 1) is None


def test_equal_cost_pairs_hold_more_requests() -> None:
    on, own = (deployment("llama-65b", 1_260, arm) for arm in ("lamina", "own"))
    assert on is not None
    assert own is not None
    assert on.usd_per_hour is not None
    assert own.usd_per_hour is not None
    assert on.usd_per_hour <= own.usd_per_hour
    assert on.requests > 2 * own.requests


def test_what_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least one token"):
        plan_attention(msgspec.structs.replace(QUESTION, contexts=()))
    with pytest.raises(ConfigError, match="no accuracy was measured"):
        plan_attention(msgspec.structs.replace(QUESTION, attention_device="instcsd", options="keep=8"))
