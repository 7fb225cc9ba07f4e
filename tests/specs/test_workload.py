"""Where requests come from: arrivals, drawn requests, replayed and resampled traces."""

from __future__ import annotations

import itertools
import math
import statistics
from hashlib import blake2b
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalith.base.config import convert
from megalith.base.errors import ConfigError
from megalith.specs.arrivals import (
    ClosedLoop,
    GammaArrivals,
    OnOffArrivals,
    OpenArrivals,
    PoissonArrivals,
    SteadyArrivals,
    arrival_times,
)
from megalith.specs.lengths import FixedLength, LognormalLength, UniformLength, parse_lengths
from megalith.specs.replay import told_max_new_tokens
from megalith.specs.shape import RequestShape, prefix_hashes
from megalith.specs.workload import TraceSource, WorkloadSpec, open_workload, read_trace

EIGHT = FixedLength(tokens=8)


def digest(shapes: Any) -> str:
    """A hash of every field of every request."""
    state = blake2b(digest_size=8)
    for s in shapes:
        facts = (
            s.index,
            -1 if s.at_ns is None else s.at_ns,
            s.input_tokens,
            s.output_tokens,
            s.priority,
            *s.prefix_ids,
        )
        state.update(",".join(map(str, facts)).encode() + b"\n")
    return state.hexdigest()


def gaps_s(arrivals: OpenArrivals, count: int, seed: int = 3) -> list[float]:
    times = itertools.islice(arrival_times(arrivals, seed), count)
    return [(b - a) / 1e9 for a, b in itertools.pairwise([0, *times])]


def test_poisson_gaps_are_exponential_with_the_right_rate() -> None:
    gaps = gaps_s(PoissonArrivals(rate_per_s=20.0), 4000)
    assert min(gaps) >= 0
    assert statistics.mean(gaps) == pytest.approx(1 / 20, rel=0.05)
    # The coefficient of variation of an exponential is 1, and a share of 1/e of it lies above the mean.
    assert statistics.pstdev(gaps) / statistics.mean(gaps) == pytest.approx(1, rel=0.07)
    assert sum(g > 1 / 20 for g in gaps) / len(gaps) == pytest.approx(0.368, abs=0.03)


@pytest.mark.parametrize(("cv", "tolerance"), [(0.25, 0.02), (1.0, 0.02), (2.0, 0.04), (6.0, 0.1)])
def test_gamma_gaps_have_the_mean_and_the_variation_that_are_asked(cv: float, tolerance: float) -> None:
    gaps = gaps_s(GammaArrivals(rate_per_s=5.0, cv=cv), 100_000)
    assert statistics.mean(gaps) == pytest.approx(0.2, rel=tolerance)
    assert statistics.pstdev(gaps) / statistics.mean(gaps) == pytest.approx(cv, rel=tolerance)


def test_gamma_of_variation_one_is_exponential() -> None:
    gaps = gaps_s(GammaArrivals(rate_per_s=5.0, cv=1.0), 50_000)
    for share in (0.1, 0.5, 0.9, 0.99):
        assert sum(g < -math.log(1 - share) / 5 for g in gaps) / len(gaps) == pytest.approx(share, abs=0.01)


def test_on_off_gaps_are_those_of_an_interrupted_poisson_process() -> None:
    arrivals = OnOffArrivals(rate_per_s=4.0, on_s=5.0, off_s=15.0)
    gaps = gaps_s(arrivals, 200_000)
    assert statistics.mean(gaps) == pytest.approx(0.25, rel=0.03)
    assert statistics.pstdev(gaps) / statistics.mean(gaps) == pytest.approx(arrivals.cv, rel=0.04)
    # Simulated the plain way: bursts of 16 a second for 5 s on average, pauses of 15 s.
    assert sum(g > 1.0 for g in gaps) / len(gaps) == pytest.approx(_share_of_long_gaps(), rel=0.1)


def _share_of_long_gaps() -> float:
    """Gaps above 1 s of on/off arrivals that are made by playing the periods one by one."""
    import random

    draw = random.Random(5)
    now = last = 0.0
    end, count, long = draw.expovariate(1 / 5), 0, 0
    while count < 100_000:
        step = draw.expovariate(16)
        if now + step < end:
            now += step
            count, long, last = count + 1, long + (now - last > 1.0), now
        else:
            now = end + draw.expovariate(1 / 15)
            end = now + draw.expovariate(1 / 5)
    return long / count


def test_steady_arrivals_do_not_drift() -> None:
    times = list(itertools.islice(arrival_times(SteadyArrivals(rate_per_s=3.0), 0), 3001))
    assert (times[0], times[1], times[3000]) == (0, 333_333_333, 1_000_000_000_000)


@pytest.mark.parametrize("chunk", [1, 7, 5000])
@pytest.mark.parametrize(
    "arrivals",
    [
        PoissonArrivals(rate_per_s=5),
        GammaArrivals(rate_per_s=5, cv=3),
        OnOffArrivals(rate_per_s=5, on_s=1, off_s=3),
        SteadyArrivals(rate_per_s=7),
    ],
)
def test_times_do_not_depend_on_how_many_are_drawn_at_once(arrivals: OpenArrivals, chunk: int) -> None:
    usual = list(itertools.islice(arrival_times(arrivals, 9), 300))
    assert list(itertools.islice(arrival_times(arrivals, 9, chunk), 300)) == usual


@pytest.mark.parametrize(
    "make",
    [
        lambda: PoissonArrivals(rate_per_s=0),
        lambda: PoissonArrivals(rate_per_s=math.nan),
        lambda: GammaArrivals(rate_per_s=1, cv=0),
        lambda: OnOffArrivals(rate_per_s=1, on_s=0, off_s=1),
        lambda: ClosedLoop(clients=0),
        lambda: ClosedLoop(clients=1, think_s=-1),
    ],
)
def test_impossible_arrivals(make: Any) -> None:
    with pytest.raises(ConfigError, match="cannot be"):
        make()


DRAWN = WorkloadSpec(
    input=LognormalLength(median=700, sigma=1.0),
    output=UniformLength(low=20, high=300),
    arrivals=PoissonArrivals(rate_per_s=5),
    requests=1000,
)


def test_same_seed_same_load() -> None:
    first = list(open_workload(DRAWN, 1))
    assert len(first) == 1000
    assert [s.index for s in first] == list(range(1000))
    assert first == list(open_workload(DRAWN, 1))
    assert first != list(open_workload(DRAWN, 2))


def test_the_first_thousand_requests_are_the_same_on_every_machine() -> None:
    """Golden: a change here changes every simulated result."""
    assert digest(open_workload(DRAWN, 1)) == "45cff76bf0dc5efd"
    gamma = msgspec.structs.replace(DRAWN, arrivals=GammaArrivals(rate_per_s=5, cv=4), priority_share=0.1)
    assert digest(open_workload(gamma, 1)) == "3f7c0c853f06803a"
    bursts = msgspec.structs.replace(DRAWN, arrivals=OnOffArrivals(rate_per_s=5, on_s=20, off_s=60), speedup=1.5)
    assert digest(open_workload(bursts, 1)) == "87b55ce8d2899526"


def test_prompts_answers_and_times_are_independent() -> None:
    shapes = list(open_workload(msgspec.structs.replace(DRAWN, requests=20_000), 4))
    prompts = [math.log(s.input_tokens) for s in shapes]
    answers = [float(s.output_tokens) for s in shapes]
    gaps = [float(b - a) for a, b in itertools.pairwise([0, *(s.at_ns or 0 for s in shapes)])]
    for left, right in itertools.combinations((prompts, answers, gaps), 2):
        assert abs(statistics.correlation(left, right)) < 0.03


def test_limits() -> None:
    spec = msgspec.structs.replace(DRAWN, requests=None, duration_s=100.0)
    assert not spec.endless
    shapes = list(open_workload(spec))
    assert len(shapes) == pytest.approx(500, rel=0.15)
    assert shapes[-1].at_ns is not None
    assert shapes[-1].at_ns < 100e9
    fast = list(open_workload(msgspec.structs.replace(spec, speedup=2.0)))
    assert len(fast) == pytest.approx(1000, rel=0.15)
    assert fast[0].at_ns == round((shapes[0].at_ns or 0) / 2)
    cut = list(open_workload(msgspec.structs.replace(DRAWN, max_input_tokens=800, max_new=100)))
    assert max(s.input_tokens for s in cut) == 800
    assert max(s.output_tokens for s in cut) == 100
    kept = list(open_workload(msgspec.structs.replace(DRAWN, max_total_tokens=1000)))
    assert len(kept) == 1000, "what is left out is replaced"
    assert max(s.input_tokens + s.output_tokens for s in kept) <= 1000
    with pytest.raises(ConfigError, match="None of"):
        list(open_workload(msgspec.structs.replace(DRAWN, input=EIGHT, max_total_tokens=4)))


def test_a_closed_loop_has_no_times() -> None:
    spec = WorkloadSpec(input=EIGHT, output=EIGHT, arrivals=ClosedLoop(clients=4, think_s=1.0), requests=5)
    assert [s.at_ns for s in open_workload(spec)] == [None] * 5
    assert msgspec.structs.replace(spec, requests=None, duration_s=5.0).endless


def test_the_share_of_priority() -> None:
    shapes = list(open_workload(msgspec.structs.replace(DRAWN, priority_share=0.1, requests=10_000)))
    assert {s.priority for s in shapes} == {0, 1}
    assert statistics.mean(s.priority for s in shapes) == pytest.approx(0.1, abs=0.01)
    plain = list(open_workload(msgspec.structs.replace(DRAWN, requests=10_000)))
    assert [s.at_ns for s in plain] == [s.at_ns for s in shapes], "priorities move nothing else"


def test_what_the_scheduler_is_told_of_the_answer() -> None:
    shape = RequestShape(0, 0, 1000, 200)
    assert told_max_new_tokens(DRAWN, shape, 4096) == 3096
    assert told_max_new_tokens(DRAWN, shape, 500) == 1
    assert told_max_new_tokens(msgspec.structs.replace(DRAWN, max_new=256), shape, 4096) == 256
    oracle = msgspec.structs.replace(DRAWN, max_new="true")
    assert told_max_new_tokens(oracle, shape, 4096) == 200
    assert (DRAWN.oracle, oracle.oracle) == (False, True)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "needs a trace, or both"),
        ({"input": EIGHT}, "needs a trace, or both"),
        ({"input": EIGHT, "output": EIGHT}, "no arrival times"),
        ({"input": EIGHT, "trace": TraceSource(path="t.csv")}, "needs a trace, or both"),
        ({"trace": TraceSource(path="t.csv"), "speedup": 0.0}, "speedup is 0"),
        ({"trace": TraceSource(path="t.csv"), "requests": -4}, "requests is -4"),
        ({"trace": TraceSource(path="t.csv"), "priority_share": 10.0}, "priority_share is 10"),
        ({"trace": TraceSource(path="t.csv", start_s=10, end_s=5)}, "window"),
        ({"trace": TraceSource(path="t.csv"), "max_new": 0}, "max_new is 0"),
    ],
)
def test_contradictions(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        WorkloadSpec(**fields)


def test_a_spec_is_data() -> None:
    spec = msgspec.structs.replace(DRAWN, arrivals=OnOffArrivals(rate_per_s=2, on_s=1, off_s=2), max_new=300)
    assert convert(msgspec.to_builtins(spec), WorkloadSpec, "test") == spec
    with pytest.raises(ConfigError, match="`speedup`"):
        convert({"sped_up": 2}, WorkloadSpec, "test")


ROWS = [(0.0, 10, 5), (1.0, 20, 6), (1.5, 3000, 7), (4.0, 40, 8)]


@pytest.fixture
def trace(tmp_path: Path) -> TraceSource:
    path = tmp_path / "t.csv"
    path.write_text("at_s,input_tokens,output_tokens\n" + "".join(f"{a},{b},{c}\n" for a, b, c in ROWS))
    return TraceSource(path=str(path))


def test_a_replayed_trace(trace: TraceSource) -> None:
    spec = WorkloadSpec(trace=trace)
    assert (spec.nature, spec.endless) == ("recorded", False)
    assert [(s.index, s.at_ns, s.input_tokens) for s in open_workload(spec)] == [
        (0, 0, 10), (1, 1_000_000_000, 20), (2, 1_500_000_000, 3000), (3, 4_000_000_000, 40),
    ]  # fmt: skip
    filtered = WorkloadSpec(trace=trace, max_total_tokens=2048, speedup=2.0)
    assert [(s.index, s.at_ns) for s in open_workload(filtered)] == [(0, 0), (1, 500_000_000), (2, 2_000_000_000)]
    assert [s.at_ns for s in open_workload(WorkloadSpec(trace=trace, requests=2))] == [0, 1_000_000_000]
    assert len(list(open_workload(WorkloadSpec(trace=trace, duration_s=1.5)))) == 2
    assert [s.at_ns for s in read_trace(Path(trace.path), 2.0)] == [0, 500_000_000, 750_000_000, 2_000_000_000]


def test_a_window_starts_at_zero(trace: TraceSource) -> None:
    window = msgspec.structs.replace(trace, start_s=1.0, end_s=4.0)
    assert [(s.at_ns, s.input_tokens) for s in open_workload(WorkloadSpec(trace=window))] == [
        (0, 20),
        (500_000_000, 3000),
    ]
    late = msgspec.structs.replace(trace, start_s=100.0)
    for resample in ("none", "joint"):
        with pytest.raises(ConfigError, match=r"Nothing is left|no requests"):
            list(open_workload(WorkloadSpec(trace=msgspec.structs.replace(late, resample=resample))))


def test_recorded_requests_at_drawn_times(trace: TraceSource) -> None:
    spec = WorkloadSpec(trace=trace, arrivals=PoissonArrivals(rate_per_s=5))
    assert spec.nature == "resampled"
    shapes = list(open_workload(spec, 2))
    assert [s.input_tokens for s in shapes] == [10, 20, 3000, 40]
    assert [s.at_ns for s in shapes] != [0, 1_000_000_000, 1_500_000_000, 4_000_000_000]
    closed = WorkloadSpec(trace=trace, arrivals=ClosedLoop(clients=2))
    assert [s.at_ns for s in open_workload(closed)] == [None] * 4


def test_drawn_requests_at_recorded_times(trace: TraceSource) -> None:
    spec = WorkloadSpec(trace=msgspec.structs.replace(trace, resample="joint"))
    assert not spec.endless
    assert [s.at_ns for s in open_workload(spec, 2)] == [0, 1_000_000_000, 1_500_000_000, 4_000_000_000]


def test_joint_and_independent_resampling(trace: TraceSource) -> None:
    pairs = {(b, c) for _, b, c in ROWS}
    drawn = {}
    for resample in ("joint", "independent"):
        source = msgspec.structs.replace(trace, resample=resample)
        spec = WorkloadSpec(trace=source, arrivals=PoissonArrivals(rate_per_s=5), requests=2000)
        shapes = list(open_workload(spec, 2))
        assert len(shapes) == 2000
        drawn[resample] = {(s.input_tokens, s.output_tokens) for s in shapes}
        counts = [sum(s.input_tokens == b for s in shapes) for _, b, _ in ROWS]
        assert all(count == pytest.approx(500, abs=80) for count in counts)
    assert drawn["joint"] == pairs
    assert len(drawn["independent"]) == 16


@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=12),
    st.lists(st.integers(0, 3), min_size=1, max_size=12),
    st.sampled_from([1, 2, 16, 64, 128, 512]),
    st.integers(0, 511),
    st.integers(0, 511),
)
@settings(deadline=None)
def test_equal_prefixes_have_equal_hashes_and_no_others(
    a: list[int], b: list[int], block_tokens: int, cut_a: int, cut_b: int
) -> None:
    """Prompts over ids that name prefixes: a trie node for each different prefix of contents."""
    nodes: dict[tuple[int, ...], int] = {}
    shapes = []
    for contents, cut in ((a, cut_a), (b, cut_b)):
        ids = tuple(nodes.setdefault(tuple(contents[: i + 1]), len(nodes)) for i in range(len(contents)))
        shapes.append(RequestShape(0, 0, max(1, 512 * len(contents) - cut), 1, ids))
    left, right = (prefix_hashes(shape, block_tokens) for shape in shapes)
    for shape, hashes in zip(shapes, (left, right), strict=True):
        assert len(hashes) == shape.input_tokens // block_tokens
        assert len(set(hashes)) == len(hashes)
        assert all(h < 2**63 for h in hashes)
    for i, (x, y) in enumerate(zip(left, right, strict=False)):
        # Blocks of a prompt are the same when all contents up to their end are.
        end = -(-(i + 1) * block_tokens // 512)
        assert (x == y) == (a[:end] == b[:end])
    assert not set(left[len(right) :]) & set(right)


def test_block_sizes_that_do_not_divide_name_one_that_does() -> None:
    shape = RequestShape(0, 0, 2000, 1, (4, 5, 6, 7))
    assert prefix_hashes(shape, 512) == (4, 5, 6)
    assert len(prefix_hashes(shape, 256)) == 7
    assert len(prefix_hashes(msgspec.structs.replace(shape, prefix_ids=(4, 5)), 256)) == 4, "ids may cover a part"
    assert prefix_hashes(RequestShape(0, 0, 2000, 1), 48) == ()
    assert len(prefix_hashes(shape, 300, 600)) == 6
    for wrong, near in ((48, 32), (1024, 512), (20, 16), (0, 1)):
        with pytest.raises(ConfigError, match=f"blocks of {near} tokens"):
            prefix_hashes(shape, wrong)


@pytest.mark.parametrize(
    ("text", "mean", "low", "high"),
    [
        ("128", 128, 128, 128),
        ("64-256", 160, 64, 256),
        ("normal:200:30", 200, 50, 350),
        ("lognormal:100:0.5", 113.3, 5, 1000),
        ("power:100:1000:2", 200 * (1 - 0.1) / (1 - 0.01), 100, 1000),
    ],
)
def test_lengths_have_the_distribution_that_is_asked(text: str, mean: float, low: int, high: int) -> None:
    spec = msgspec.structs.replace(DRAWN, input=parse_lengths(text), requests=20_000)
    drawn = [s.input_tokens for s in open_workload(spec, 5)]
    assert statistics.mean(drawn) == pytest.approx(mean, rel=0.015)
    assert low <= min(drawn) <= max(drawn) <= high
    if text == "64-256":
        assert {min(drawn), max(drawn)} == {64, 256}


@pytest.mark.parametrize("text", ["", "0", "-5", "9-3", "normal:0:3", "gauss:1:2", "1.5", "12x", "power:5:5:1"])
def test_bad_lengths(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_lengths(text)


def test_a_bad_name_of_a_distribution_names_the_near_one() -> None:
    with pytest.raises(ConfigError, match="Did you mean lognormal"):
        parse_lengths("lognorm:7:1")


def test_a_workload_that_ends_before_its_first_request(trace: TraceSource) -> None:
    late = msgspec.structs.replace(DRAWN, duration_s=1e-6)
    with pytest.raises(ConfigError, match="No request arrives"):
        list(open_workload(late))
    window = msgspec.structs.replace(trace, start_s=0.5)
    with pytest.raises(ConfigError, match="Nothing is left"):
        list(open_workload(WorkloadSpec(trace=window, duration_s=0.1)))
