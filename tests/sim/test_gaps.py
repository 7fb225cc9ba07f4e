"""Gaps between tokens against a clock for every request, with prompt steps that stall the decodes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from megalith.sim.gaps import GapMeter
from megalith.sim.record import Recorder

# What an instance does next: ("prompt", duration, joins), ("decode", first, slope, steps), ("mixed", duration, joins),
# ("leave",): the youngest goes.
DURATIONS = st.integers(10**6, 10**10)
ACTS = st.lists(
    st.one_of(
        st.tuples(st.just("prompt"), DURATIONS, st.integers(0, 3)),
        st.tuples(st.just("decode"), DURATIONS, st.integers(0, 10**6), st.integers(1, 30)),
        st.tuples(st.just("mixed"), DURATIONS, st.integers(0, 3)),
        st.tuples(st.just("leave")),
    ),
    max_size=40,
)


@given(ACTS)
def test_gaps_are_those_that_each_request_sees(acts: list[tuple[object, ...]]) -> None:
    recorder, expected = Recorder(), Recorder()
    meter = GapMeter(recorder)
    now_ps = 0
    last: list[int] = []  # of each request that decodes, the time of its last token; by age

    def token(end_ps: int) -> None:
        for i, before in enumerate(last):
            expected.steps(end_ps - before, 0, 1, 1)
            last[i] = end_ps

    steps = 0
    for act, *numbers in acts:
        match act:
            case "prompt":
                duration, joins = numbers
                meter.prompt_step(duration, 100, 0, len(last))
                now_ps += duration
                last += [now_ps] * joins
                steps += 1
            case "mixed":
                duration, joins = numbers
                meter.prompt_step(duration, 100, len(last), 0)
                now_ps += duration
                token(now_ps)
                last += [now_ps] * joins
                steps += 1
            case "decode" if last:
                first, slope, many = numbers
                meter.steps(first, slope, many, len(last))
                for j in range(many):
                    now_ps += first + j * slope
                    token(now_ps)
                steps += many
            case "leave" if last:
                last.pop()
    figures = recorder.figures()
    expected.flush()
    assert recorder.gaps_ps == expected.gaps_ps
    assert figures.steps == steps
    assert figures.step_decode_tokens == expected.gaps_ps.count
    assert figures.busy_s == now_ps / 1e12


def test_without_stalls_nothing_is_late() -> None:
    class Sink(Recorder):
        def late_step(self, *_: object) -> None:  # type: ignore[override]
            raise AssertionError("late")

    meter = GapMeter(Sink())
    meter.prompt_step(5, 10, 0, 0)
    meter.steps(7, 1, 10, 3)
    meter.prompt_step(5, 10, 3, 0)


def test_a_stall_is_in_one_gap() -> None:
    recorder = Recorder()
    meter = GapMeter(recorder)
    meter.steps(30 * 10**9, 0, 10, 4)
    meter.prompt_step(500 * 10**9, 4096, 0, 4)
    meter.prompt_step(300 * 10**9, 2048, 0, 5)
    meter.steps(30 * 10**9, 0, 10, 6)
    itl = recorder.figures().latencies["itl_ns"]
    assert itl is not None
    assert itl.count == 40 + 60
    assert itl.maximum == 830 * 10**6
    assert recorder.gaps_ps.total == 100 * 30 * 10**9 + 4 * 800 * 10**9 + 300 * 10**9
