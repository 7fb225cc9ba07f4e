"""Attention on other devices: the rotation against closed forms and its bounds, the bytes, the timer's contract."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalith.base.errors import ConfigError
from megalith.cost.attention_devices import attention_devices, crossing_bytes, kept_share, largest_share, slice_times
from megalith.cost.attention_elsewhere import (
    SliceTimes,
    Way,
    bound_ps,
    chain_ps,
    decode_graph,
    layer_ps,
    period_ps,
    steady_ps,
)
from megalith.cost.compute import CostModel
from megalith.cost.graph import check, schedule
from megalith.cost.memory import weight_bytes
from megalith.cost.profile import from_device
from megalith.cost.timer import Prompt
from megalith.cost.timer_elsewhere import KNOTS, ElsewhereTimer
from megalith.specs import catalog
from megalith.specs.attention import parse_attention

LATE = Way(early=False)
TIMES = st.builds(
    SliceTimes, query_ps=st.integers(1, 90), pair_ps=st.integers(1, 90), output_ps=st.integers(1, 400),
    attend_ps=st.integers(0, 900), merge_ps=st.integers(0, 9), down_query_ps=st.integers(0, 60),
    down_pair_ps=st.integers(0, 60), up_ps=st.integers(0, 60), flight_ps=st.integers(0, 60),
    carry_ps=st.integers(0, 20), head_ps=st.integers(0, 500), host_ps=st.integers(0, 900),
)  # fmt: skip


def slices(model: int, attend: int, **more: int) -> SliceTimes:
    """A slice of so much on the model device, of which a tenth each is q and k, v."""
    return SliceTimes(model // 10, model // 10, model - 2 * (model // 10), attend, **more)


def timer_of(model: str, tensor_parallel: int, text: str, device: str = "h100-sxm") -> ElsewhereTimer:
    spec = catalog.model(model)
    cost = CostModel(spec, from_device(catalog.device(device)), weight_bytes(spec, "bf16"), devices=tensor_parallel)
    return ElsewhereTimer(cost, attention_devices(parse_attention(text)))


TIMERS = {
    case: timer_of(*case) for case in [
        ("llama-65b", 2, "4xh20"), ("llama-3.1-70b", 2, "4xh20/batches=3/early=off"),
        ("gemma-3-27b", 2, "2xh20/at=home/batches=1"), ("opt-13b", 1, "1xinstcsd/batches=1"),
    ]
}  # fmt: skip
CASE = st.sampled_from(list(TIMERS))


@given(st.integers(10, 900), st.integers(1, 900))
@settings(deadline=None, max_examples=15)
def test_two_batches_play_ping_pong(model: int, attend: int) -> None:
    """Without a link: the longer side twice. Between two tokens the other batch may come in between."""
    one = slices(model, attend)
    assert layer_ps([one, one], LATE) == 2 * max(one.model_ps, attend)
    exact = 12 * 2 * max(one.model_ps, attend)
    assert exact <= steady_ps([one, one], 12, LATE, checked=False) <= exact + one.model_ps


@pytest.mark.parametrize("batches", [3, 4, 5])
def test_n_batches_keep_n_less_1_replicas_and_attention_busy(batches: int) -> None:
    """t_a = t_m / (n - 1): nothing is idle, and a layer of all takes n * t_a."""
    attend = 120
    one = slices(attend * (batches - 1), attend)
    way = Way(early=False, replicas=batches - 1)
    assert layer_ps([one] * batches, way) == batches * attend == chain_ps(one, 1, way)


def test_one_batch_is_its_chain() -> None:
    one = slices(300, 200, down_query_ps=5, down_pair_ps=10, up_ps=5, flight_ps=20, head_ps=50, host_ps=70, merge_ps=3)
    late = 300 + 15 + 20 + 200 + 5 + 20
    assert steady_ps([one], 8, LATE) == period_ps([one], 8, LATE) == 8 * late + 120
    # q goes 30 ps and 10 ps of the link before k and v are there; the merge is a kernel more.
    assert period_ps([one], 8, Way()) == 8 * (late - 30 - 10 + 3) + 120


def test_sending_q_first_hides_what_comes_after_it_and_no_more() -> None:
    short = slices(300, 5, down_query_ps=5, down_pair_ps=10, up_ps=5, flight_ps=20)
    saved = short.down_query_ps + short.attend_ps
    assert chain_ps(short, 1, Way()) == chain_ps(short, 1, LATE) - saved, "k and v are what it waits for"


def test_at_home_the_link_or_the_device_binds() -> None:
    home = Way(at_home=True, early=False)
    for wire, expected in ((900, 900), (10, 350)):
        one = slices(300, 50, up_ps=wire)
        assert steady_ps([one], 20, home) == pytest.approx(20 * expected, rel=0.03)


@given(TIMES, st.integers(1, 4), st.booleans(), st.integers(1, 5))
@settings(deadline=None, max_examples=25)
def test_graphs_are_sound_and_no_faster_than_their_bounds(
    one: SliceTimes, number: int, early: bool, layers: int
) -> None:
    way = Way(early=early, replicas=max(1, number - 1))
    ops = decode_graph([one] * number, layers, way, 3)
    plan = schedule(ops)
    check(ops, plan)
    assert steady_ps([one] * number, layers, way, checked=False) >= bound_ps([one] * number, layers, way)
    assert period_ps([one] * number, layers, way) >= bound_ps([one] * number, layers, way)


@pytest.mark.parametrize(("text", "slack"), [("4xh20", 0.02), ("4xh20/early=off", 0.02), ("4xh20/batches=3", 0.08)])
def test_the_short_way_agrees_with_scheduling_everything(text: str, slack: float) -> None:
    timer = timer_of("llama-65b", 2, text)
    for requests, context in ((100, 1_200), (300, 300)):
        batches, way = timer.times(requests, context, timer.devices.spec.batches)
        full = steady_ps(batches, 40, way, checked=False)
        assert period_ps(batches, 40, way) == pytest.approx(full, rel=slack)


@pytest.mark.parametrize("model", ["llama-65b", "llama-3.1-70b", "opt-13b"])
def test_bytes_across_the_link(model: str) -> None:
    """(2 + 2 / G) * e * d a layer, whatever the context."""
    spec = catalog.model(model)
    group = spec.num_heads / spec.num_kv_heads
    assert crossing_bytes(spec) == spec.num_layers * (2 + 2 / group) * 2 * spec.hidden
    timer = timer_of(model, 1 if model == "opt-13b" else 2, "4xh20/link=1e9")
    near, far = (slice_times(timer.cost, timer.devices, 7, context, 1.0) for context in (10, 100_000))
    wire = near.down_ps + near.up_ps
    assert wire == far.down_ps + far.up_ps
    assert wire == pytest.approx(7 * crossing_bytes(spec) / spec.num_layers * 1_000, rel=1e-6)
    assert far.attend_ps > 10 * near.attend_ps


def test_kv_is_cut_by_heads_and_then_by_requests() -> None:
    spec = catalog.model("llama-3.1-70b")
    assert largest_share(spec, 5, 4) == 2 / 8
    assert largest_share(spec, 5, 3) == 3 / 8
    assert largest_share(spec, 5, 10) == 1 / 5


def test_what_sparf_reads() -> None:
    spec = catalog.model("opt-13b")

    def share(options: str) -> float:
        return kept_share(attention_devices(parse_attention(f"1xinstcsd/unmeasured=true/{options}")), spec)

    assert share("keep=1") == 1.0
    assert share("keep=8/run=16") == pytest.approx(1 / 16 + 1 / 8)
    assert share("keep=8/run=1") == pytest.approx(1 / 16 + 1 - (7 / 8) ** 16)
    with pytest.raises(ConfigError, match="no accuracy was measured"):
        timer_of("opt-13b", 1, "1xinstcsd/batches=1/keep=8", "a6000")
    assert timer_of("opt-13b", 1, "1xinstcsd/batches=1/keep=8/delta=-0.01", "a6000").step_ps((), 1, 1, 1) > 0


@given(CASE, st.integers(1, 90), st.integers(0, 30_000), st.data())
@settings(deadline=None, max_examples=40)
def test_a_line_is_its_steps(case: tuple[str, int, str], decodes: int, mean: int, data: st.DataObject) -> None:
    timer = TIMERS[case]
    context = decodes * mean + data.draw(st.integers(0, decodes - 1))
    line = timer.decode_line(decodes, context, mean)
    assert line.steps >= 1
    assert line.slope_ps >= 0
    for ahead in {0, line.steps - 1, data.draw(st.integers(0, min(line.steps, 100_000) - 1))}:
        step = timer.step_ps((), decodes, context + ahead * decodes, mean + ahead)
        assert line.first_ps + ahead * line.slope_ps == step


@given(CASE, st.integers(1, 90), st.integers(0, 500_000), st.integers(1, 999))
@settings(deadline=None, max_examples=40)
def test_more_takes_no_less(case: tuple[str, int, str], decodes: int, context: int, more: int) -> None:
    """Context never; one decode more within the 10 % by which a list schedule may be lucky."""
    timer = TIMERS[case]
    step = timer.step_ps((), decodes, context, context)
    assert step > 0
    assert timer.step_ps((), decodes, context + more, context + more) >= step * 0.999
    assert timer.step_ps((), decodes + 1, context + more, context + more) >= step * 0.9
    chunk = Prompt(more + 1, context, True)
    assert timer.step_ps([chunk], decodes, context, context) > step
    assert timer.step_ps([chunk], decodes, context, context) <= timer.step_ps(
        [chunk._replace(new_tokens=more + 2)], decodes, context, context
    )
    one = Prompt(1, more, True)
    assert timer.step_ps([one], decodes, context, context) == timer.step_ps((), decodes + 1, context + more, context)


def test_between_knots_a_step_is_never_too_fast() -> None:
    timer = TIMERS["llama-65b", 2, "4xh20"]
    for place in (3, 8, 12):
        middle = (KNOTS[place] + KNOTS[place + 1]) // 2
        batches, way = timer.times(60, middle, 2)
        exact = min(
            period_ps(batches, 80, way), period_ps(*timer.times(60, middle, 1)[:1], 80, timer.times(60, middle, 1)[1])
        )
        assert 0.9995 <= timer.step_ps((), 60, 60 * middle, middle) / exact <= 1.05


def test_rotation_is_left_out_where_one_batch_is_faster() -> None:
    """Two batches read the weights twice, which a few requests do not pay for."""
    two, one = (timer_of("llama-65b", 2, f"4xh20/batches={batches}") for batches in (2, 1))
    assert two.step_ps((), 8, 8_000, 1_000) == one.step_ps((), 8, 8_000, 1_000)
    assert two.step_ps((), 200, 200_000, 1_000) < one.step_ps((), 200, 200_000, 1_000)


def test_slower_and_lower() -> None:
    timer = TIMERS["llama-65b", 2, "4xh20"]
    assert timer.scaled(2.0).step_ps((), 50, 50_000, 1_000) == pytest.approx(
        2 * timer.step_ps((), 50, 50_000, 1_000), rel=1e-4
    )
    assert timer.at_clock(0.7).step_ps((), 50, 50_000, 1_000) > timer.step_ps((), 50, 50_000, 1_000)
    drive = TIMERS["opt-13b", 1, "1xinstcsd/batches=1"]
    step = drive.step_ps((), 64, 64 * 1_536, 1_536)
    assert drive.at_clock(0.7).step_ps((), 64, 64 * 1_536, 1_536) < 1.02 * step, "flash has no clock to lower"


def test_power_is_of_all_devices() -> None:
    two, eight = (timer_of("llama-65b", 2, f"{count}xh20").power_w() for count in (2, 8))
    assert eight.idle_w - two.idle_w == pytest.approx(64.0 * 6 / 2)
    assert two.idle_w < two.decode_w < two.prompt_w


def test_an_instorage_step_is_its_bytes() -> None:
    """80.5 GB of KV at 11.2 GB/s; over a path as fast as the drive nothing is left of the gain."""
    step = timer_of("opt-13b", 1, "1xinstcsd/batches=1", "a6000").step_ps((), 64, 64 * 1_536, 1_536)
    assert step / 1e12 == pytest.approx(80.5 / 11.2, rel=0.02)
    for rate, ratio in ((5.5e9, 11.2 / 5.5), (11.2e9, 1.0)):
        home = timer_of("opt-13b", 1, f"1xnvme-gen4/batches=1/at=home/rate={rate}/link={rate}", "a6000")
        assert home.step_ps((), 64, 64 * 1_536, 1_536) / step == pytest.approx(ratio, rel=0.03)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("h20", "no devices"), ("4xh20/early", "no option"), ("4xh21", "no device or drive"), ("0xh20", "count"),
        ("4xh20/batch=2", "unknown field"), ("1xnvme-gen4", "computes nothing"), ("1xinstcsd/at=home/keep=8", "keep"),
        ("4xh20/link=-1", "link_bytes_per_s"), ("4xh20/trip=9", "round trip"),
    ],
)  # fmt: skip
def test_what_cannot_be(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        attention_devices(parse_attention(text))
