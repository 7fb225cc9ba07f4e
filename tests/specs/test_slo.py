"""Service levels as text and back, and what cannot be promised."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalith.base.config import convert
from megalith.base.errors import ConfigError
from megalith.specs.slo import METRICS, SPLITWISE_SLO, Bound, Slo, make_slo, parse_slo

MS = 10**6


def test_reads_what_the_guide_shows() -> None:
    slo = parse_slo("ttft=400ms, tpot=40ms@p90")
    assert slo.bounds == (
        Bound(metric="ttft", limit_ns=400 * MS),
        Bound(metric="tpot", limit_ns=40 * MS, percent=90.0),
    )
    assert slo.attain == 0.9
    assert slo.joint == slo.bounds[:1]
    assert parse_slo("TTFT=1.5s,attain=95%") == make_slo(ttft_ns=1500 * MS, attain=0.95)
    assert parse_slo("itl=50ms@p99.9").bounds[0].percent == 99.9


def test_splitwise_is_nine_slowdowns() -> None:
    assert parse_slo("splitwise") == SPLITWISE_SLO
    table = {(b.metric, b.percent): b.slowdown for b in SPLITWISE_SLO.bounds}
    assert len(table) == 9
    assert table[("ttft", 99.0)] == 6
    assert table[("tpot", 50.0)] == table[("e2e", 50.0)] == 1.25
    assert SPLITWISE_SLO.needs_reference
    assert not parse_slo("ttft=1s").needs_reference


BOUNDS = st.builds(
    lambda metric, whole, slow, percent: Bound(
        metric=metric, limit_ns=None if slow else whole * 1001, slowdown=whole / 4 if slow else None, percent=percent
    ),
    st.sampled_from([metric for metric in METRICS if metric != "itl"]),
    st.integers(1, 9_999_999),
    st.booleans(),
    st.sampled_from([None, 50.0, 90.0, 99.9]),
)


@given(st.lists(BOUNDS, min_size=1, max_size=5), st.sampled_from([0.5, 0.9, 0.99, 1.0]))
def test_text_and_data_say_the_same(bounds: list[Bound], attain: float) -> None:
    slo = Slo(bounds=tuple(bounds), attain=attain)
    read = parse_slo(str(slo))
    assert read.bounds == slo.bounds
    assert not slo.joint or read.attain == attain
    assert convert(msgspec.to_builtins(slo), Slo, "test") == slo


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "needs a bound"),
        ("attain=0.9", "needs a bound"),
        ("ttft", "no service level"),
        ("latency=4ms", "no service level"),
        ("ttft=", "no service level"),
        ("ttft=@p90", "no limit"),
        ("ttft=4 parsecs", "not a duration"),
        ("ttft=4ms@often", "no percentile"),
        ("ttft=4ms@p101", "at most p100"),
        ("ttft=0ms", "not above zero"),
        ("ttft=0x", "not above zero"),
        ("ttft=1s,attain=1.5", "no share of the requests"),
        ("ttft=1s,attain=most", "no share"),
        ("itl=50ms", "gaps between tokens"),
        ("itl=2x@p90", "gaps between tokens"),
    ],
)
def test_refuses_with_a_way_out(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse_slo(text)
    assert caught.value.hint


def test_a_bound_is_a_time_or_a_slowdown() -> None:
    with pytest.raises(ConfigError, match="not both"):
        Bound(metric="ttft")
    with pytest.raises(ConfigError, match="not both"):
        Bound(metric="ttft", limit_ns=1, slowdown=1.0)
