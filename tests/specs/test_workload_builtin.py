"""The built-in workloads against the published figures that they stand for, and the sessions between requests."""

from __future__ import annotations

import itertools
import statistics
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalith.base.errors import ConfigError
from megalith.specs.arrivals import ClosedLoop, PoissonArrivals
from megalith.specs.conversations import Conversations, Sessions
from megalith.specs.lengths import FixedLength, LognormalLength
from megalith.specs.shape import RequestShape
from megalith.specs.workload import WorkloadSpec, open_workload, read_trace
from megalith.specs.workload_catalog import workload, workloads

from .test_workload import digest

TRACES = Path(__file__).parents[2].parent / "shared" / "data" / "traces"

# name: rate per second, CV of the gaps, then (mean, p50, p90, p99, max) of prompts and of answers. Azure and Mooncake:
# the statistics published with the recordings. ShareGPT and LMSYS: NanoFlow's files. None: not published.
PUBLISHED: dict[str, tuple[float, float, tuple[float | None, ...], tuple[float | None, ...]]] = {
    "azure-conv": (5.53, 1.09, (1154.7, 1020, 2734, 4142, 14050), (211.1, 129, 424, 601, 1000)),
    "azure-code": (2.57, 13.15, (2047.8, 1469, 5188, 7436, 7437), (27.9, 13, 55, 251, 1899)),
    "mooncake-conversation": (3.40, 1.0, (12035, 6909, 27367, 85400, 126195), (342.6, 350, 597, 1119, 2000)),
    "sharegpt": (5.0, 1.0, (299, 36, 829, 3474, 16384), (324, 280, 683, 999, None)),
    "lmsys": (5.0, 1.0, (92, 28, 302, 750, 3894), (207, 140, 512, 850, 4819)),
}


def percentile(values: list[int], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def many(name: str, requests: int) -> list[RequestShape]:
    spec = msgspec.structs.replace(workload(name), requests=requests, conversations=None)
    return list(open_workload(spec, 11))


@pytest.mark.parametrize("name", PUBLISHED)
def test_lengths_are_those_of_the_recording(name: str) -> None:
    _, _, prompts, answers = PUBLISHED[name]
    shapes = many(name, 100_000)
    for drawn, published in (([s.input_tokens for s in shapes], prompts), ([s.output_tokens for s in shapes], answers)):
        mean, p50, p90, p99, most = published
        assert statistics.mean(drawn) == pytest.approx(mean, rel=0.03)
        assert percentile(drawn, 0.5) == pytest.approx(p50, rel=0.03, abs=1)
        assert percentile(drawn, 0.9) == pytest.approx(p90, rel=0.03, abs=1)
        assert percentile(drawn, 0.99) == pytest.approx(p99, rel=0.03, abs=1)
        if most is not None:
            assert 0.8 * most < max(drawn) <= most


@pytest.mark.parametrize(
    ("name", "mean", "p50", "p80", "p95", "p99"),
    [("s", 128, 38, 113, 413, 1464), ("m", 256, 32, 173, 1288, 4208), ("l", 512, 55, 582, 3113, 5166)],
)
def test_llumnix_lengths_are_those_of_its_table(name: str, mean: int, p50: int, p80: int, p95: int, p99: int) -> None:
    shapes = many(f"llumnix-{name}", 100_000)
    for drawn in ([s.input_tokens for s in shapes], [s.output_tokens for s in shapes]):
        assert statistics.mean(drawn) == pytest.approx(mean, rel=0.03)
        for share, tokens in ((0.5, p50), (0.8, p80), (0.95, p95), (0.99, p99)):
            assert percentile(drawn, share) == pytest.approx(tokens, rel=0.04)
        assert max(drawn) <= 6144


@pytest.mark.parametrize("name", PUBLISHED)
def test_arrivals_are_as_fast_and_as_bursty(name: str) -> None:
    rate, cv, _, _ = PUBLISHED[name]
    times = [s.at_ns or 0 for s in many(name, 400_000 if cv > 5 else 50_000)]
    gaps = [b - a for a, b in itertools.pairwise([0, *times])]
    # The mean gap of a bursty process takes long to settle: 400,000 gaps are 2,600 pauses of azure-code.
    assert statistics.mean(gaps) / 1e9 == pytest.approx(1 / rate, rel=0.06 if cv > 5 else 0.02)
    assert statistics.pstdev(gaps) / statistics.mean(gaps) == pytest.approx(cv, rel=0.06 if cv > 5 else 0.02)


def test_an_hour_of_code_is_as_empty_as_the_recorded_one() -> None:
    """Of the recorded hour 73 % of all seconds have no arrival; a Poisson process of that rate would leave 8 %."""
    times = [(s.at_ns or 0) // 1_000_000_000 for s in many("azure-code", 100_000)]
    assert 1 - len(set(times)) / (times[-1] + 1) == pytest.approx(0.73, abs=0.04)


def reuse(shapes: list[RequestShape]) -> float:
    """Share of the blocks that an infinite cache would hold at arrival."""
    seen: set[int] = set()
    blocks = found = 0
    for shape in shapes:
        blocks += len(shape.prefix_ids)
        found += sum(i in seen for i in shape.prefix_ids)
        seen.update(shape.prefix_ids)
    return found / blocks


def test_an_hour_of_conversations_can_reuse_what_the_recorded_one_can() -> None:
    shares = []
    for seed in range(4):
        shapes = list(open_workload(workload("mooncake-conversation"), seed))
        assert len(shapes) == 12_031
        assert all(len(s.prefix_ids) == -(-s.input_tokens // 512) for s in shapes)
        shares.append(reuse(shapes))
    assert statistics.mean(shares) == pytest.approx(0.366, abs=0.01)
    assert max(shares) - min(shares) < 0.03
    blocks = sum(len(s.prefix_ids) for s in shapes)
    assert blocks == pytest.approx(288_500, rel=0.03)
    # 38.7 % of the recorded requests find more than the system prompt.
    seen: set[int] = set()
    further = 0
    for shape in shapes:
        further += len(shape.prefix_ids) > 1 and shape.prefix_ids[1] in seen
        seen.update(shape.prefix_ids)
    assert further / len(shapes) == pytest.approx(0.387, abs=0.1)


@pytest.mark.skipif(not TRACES.is_dir(), reason="needs the recorded public traces")
@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("azure-conv", "azure2023_conv.csv.gz"),
        ("azure-code", "azure2023_code.csv.gz"),
        ("mooncake-conversation", "mooncake_fast25_conversation.jsonl.gz"),
    ],
)
def test_no_quantile_is_far_from_the_recording(name: str, file: str) -> None:
    """The largest distance between the two distribution functions (Kolmogorov-Smirnov), over prompts and answers."""
    recorded = list(read_trace(TRACES / file))
    drawn = many(name, 50_000)
    for field in ("input_tokens", "output_tokens"):
        real = sorted(getattr(s, field) for s in recorded)
        ours = sorted(getattr(s, field) for s in drawn)
        worst = 0.0
        place = 0
        for at, tokens in enumerate(real):
            if at + 1 < len(real) and real[at + 1] == tokens:
                continue
            while place < len(ours) and ours[place] <= tokens:
                place += 1
            worst = max(worst, abs((at + 1) / len(real) - place / len(ours)))
        assert worst < 0.05


@pytest.mark.parametrize("name", workloads())
def test_every_built_in_says_what_it_is(name: str) -> None:
    entry = workloads()[name]
    assert entry.spec.nature == "synthetic"
    assert not entry.spec.endless
    assert entry.source
    assert entry.spec.source == entry.source
    for alias in (name, *entry.aliases):
        assert workload(alias) is entry.spec


def test_an_unknown_name_names_the_near_ones() -> None:
    with pytest.raises(ConfigError, match=r"Did you mean .*llumnix-m"):
        workload("lumnix-m")


def test_the_built_ins_are_the_same_on_every_machine() -> None:
    """Golden: a change here changes every simulated result."""
    assert {
        name: digest(itertools.islice(open_workload(entry.spec, 1), 1000)) for name, entry in workloads().items()
    } == GOLDEN


GOLDEN = {
    "azure-conv": "a0e074779502fe37",
    "azure-code": "8cf9dc3aec163cbd",
    "sharegpt": "1f3a536af5f12b42",
    "lmsys": "f477516cb9210943",
    "llumnix-s": "32c723153eb73873",
    "llumnix-m": "ec4d25d9f0e8e42f",
    "llumnix-l": "18b22ffa79b32b06",
    "mooncake-conversation": "992c4a1bbc45aad3",
}

TALK = Conversations(
    continue_share=0.6, turn=LognormalLength(median=80, sigma=1.0), pause_s=5.0, idle_s=60.0, shared_tokens=100
)


@given(st.integers(0, 2**32), st.integers(1, 700), st.floats(0.2, 20))
@settings(max_examples=25, deadline=None)
def test_ids_of_sessions_name_prefixes(seed: int, block_tokens: int, rate: float) -> None:
    """Equal id, equal parent: an id names everything before it. The system prompt starts every prompt that holds it."""
    spec = WorkloadSpec(
        input=LognormalLength(median=600, sigma=1.0),
        output=FixedLength(tokens=30),
        arrivals=PoissonArrivals(rate_per_s=rate),
        conversations=TALK,
        requests=300,
        prefix_block_tokens=block_tokens,
    )
    parents: dict[int, int] = {}
    shared = tuple(range(100 // block_tokens))
    for shape in open_workload(spec, seed):
        assert len(shape.prefix_ids) == -(-shape.input_tokens // block_tokens)
        assert shape.prefix_ids[: len(shared)] == shared[: len(shape.prefix_ids)] or shape.input_tokens < 100
        before = -1
        for i in shape.prefix_ids:
            assert parents.setdefault(i, before) == before
            before = i


def test_a_turn_extends_the_prompt_before_it_after_a_pause() -> None:
    always = msgspec.structs.replace(
        TALK, continue_share=1.0, turn=FixedLength(tokens=100), pause_sigma=0.0, shared_tokens=0
    )
    sessions = Sessions(always, 100, 0)
    second = 1_000_000_000
    at_ns = [0, 4 * second, 6 * second, 7 * second, 20 * second, 200 * second]
    first, early, turn, other, later, late = sessions.prefix_ids(
        0, at_ns, [1000, 2000, 1150, 300, 5000, 5000], [50] * 6
    )
    assert first == tuple(range(10))
    assert not set(early) & set(first), "the pause of 5 s is not over"
    assert turn[:10] == first
    assert not set(turn[10:]) & set(early)
    assert not set(other) & {*first, *early, *turn}, "nothing that is ready fits into 300 tokens"
    assert later[:20] == early, "the longest history that fits"
    assert not set(late) & {*first, *early, *turn, *other, *later}, "all of them ended long ago"


def test_sessions_that_nobody_continues_are_forgotten() -> None:
    sessions = Sessions(TALK, 100, 0)
    for start in range(0, 50_000, 1000):
        sessions.prefix_ids(start, [(start + i) * 100_000_000 for i in range(1000)], [300] * 1000, [10] * 1000)
        assert len(sessions._prompts) < 2500, "10 a second for a pause of 5 s and 60 s idle, with a long tail"


def test_conversations_need_drawn_times() -> None:
    with pytest.raises(ConfigError, match="drawn lengths at drawn times"):
        WorkloadSpec(
            input=FixedLength(tokens=8),
            output=FixedLength(tokens=8),
            arrivals=ClosedLoop(clients=2),
            conversations=TALK,
        )
    with pytest.raises(ConfigError, match="continue_share"):
        msgspec.structs.replace(TALK, continue_share=2.0)
