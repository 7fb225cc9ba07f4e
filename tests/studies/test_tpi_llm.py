"""What the points of the TPI-LLM study run: real sums behind links, and the plan of the published model."""

from __future__ import annotations

from megalith.studies import tpi_llm_cases


def test_a_slow_link_makes_the_ring_wait_three_times_as_long() -> None:
    found = {}
    for collective in ("star", "ring"):
        figures = tpi_llm_cases.all_reduce({"collective": collective, "latency_ms": 5.0})
        assert figures["link_ms"] is not None
        assert figures["ms"] is not None
        assert 0.99 * figures["link_ms"] < figures["ms"]
        found[collective] = figures
    star, ring = found["star"]["ms"], found["ring"]["ms"]
    assert star is not None
    assert ring is not None
    assert 2.0 < ring / star < 4.0


def test_the_published_model_takes_what_was_published_with_the_window_alone() -> None:
    window, cut = (tpi_llm_cases.plan({"arm": arm, "ranks": 8.0}) for arm in ("window", "cut"))
    assert window["first_gb"] is not None
    assert cut["first_gb"] is not None
    assert 2.8 < window["first_gb"] < 3.4
    assert cut["first_gb"] > 30
