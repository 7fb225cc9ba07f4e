"""Time and energy: the roofline's limits, monotonicity, experts, links, power and money."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalith.cost import energy, parameters
from megalith.cost.compute import CostModel, StepCost, combine, row_factor
from megalith.cost.memory import weight_bytes
from megalith.cost.profile import Rates, from_device
from megalith.specs import catalog
from megalith.specs.model import ModelSpec
from megalith.specs.plan import Estimate

NAMES = st.sampled_from(sorted(catalog.models()))
DEVICES = st.sampled_from(sorted(catalog.devices()))


def model(name: str, device: str, devices: int = 1, weight_format: str = "bf16") -> CostModel:
    spec = catalog.model(name)
    profile = from_device(catalog.device(device), weight_format)
    return CostModel(spec, profile, weight_bytes(spec, weight_format), devices=devices)


@given(NAMES, DEVICES, st.integers(1, 256), st.integers(0, 100_000))
def test_never_faster_than_the_peaks(name: str, device_name: str, batch: int, context: int) -> None:
    cost, device = model(name, device_name), catalog.device(device_name)
    step = cost.decode_step(batch, context)
    flops = 2 * batch * (cost.layer_macs + cost.head_macs)
    number = cost.profile.number
    kv = batch * parameters.seen_tokens(cost.spec, context + 1) * cost.kv_layer_token_bytes
    assert step.duration_ns >= 1e9 * flops / device.peak_flops_per_s(number)
    assert step.duration_ns >= 1e9 * kv / device.memory_bytes_per_s
    if not cost.weights.experts:
        assert step.duration_ns >= 1e9 * cost.weights.layers / device.memory_bytes_per_s


@given(NAMES, DEVICES, st.integers(1, 512), st.integers(0, 50_000), st.integers(1, 512), st.integers(1, 5_000))
def test_more_work_takes_no_less(name: str, device: str, batch: int, context: int, more: int, deeper: int) -> None:
    cost = model(name, device)
    base = cost.decode_step(batch, context).duration_ns
    assert cost.decode_step(batch + more, context).duration_ns >= base
    assert cost.decode_step(batch, context + deeper).duration_ns >= base
    chunk = cost.step(cost.shape([(batch, context)])).duration_ns
    assert cost.step(cost.shape([(batch + more, context)])).duration_ns >= chunk
    assert cost.step(cost.shape([(batch, context), (more, 0)])).duration_ns >= chunk


@given(NAMES, st.integers(1, 300), st.integers(0, 4000))
def test_pairs_and_seen_tokens_are_sums_over_rows(name: str, new: int, context: int) -> None:
    """The closed forms equal the definition: row i of a chunk reads min(context + i + 1, window) keys of each layer."""
    spec = catalog.model(name)
    rows = sum(parameters.seen_tokens(spec, context + i + 1) for i in range(new))
    assert parameters.chunk_pairs(spec, new, context) == rows


def test_decode_step_is_the_shape_of_its_requests() -> None:
    cost = model("llama-3-8b", "h100")
    assert cost.decode_step(3, 700) == cost.step(cost.shape([(1, 700)] * 3))


def test_prefill_in_chunks_covers_all_pairs_and_one_row_of_logits() -> None:
    cost = model("llama-3-8b", "h100")
    whole, halves = cost.prefill(1024, 1024), cost.prefill(1024, 512)
    assert halves.compute_ns == pytest.approx(whole.compute_ns, rel=1e-6)
    assert halves.fixed_ns == pytest.approx(2 * whole.fixed_ns, rel=1e-6)
    assert halves.duration_ns > whole.duration_ns


def test_forward_flops_match_the_usual_rule() -> None:
    """About two FLOPs a parameter and token (the embedding table does not multiply)."""
    spec = catalog.model("llama-2-7b")
    assert parameters.flops_per_token(spec) == pytest.approx(2 * (6_738_415_616 - 32000 * 4096), rel=1e-2)


def test_training_flops_match_megatron() -> None:
    """F = 72 B s l h^2 (1 + s/6h + V/12lh), arXiv:2104.04473 without recomputation, for its 1T model."""
    spec = catalog.model("gpt-1t")
    s, layers, h, v = 2048, 128, 25600, 51200
    formula = 72 * s * layers * h**2 * (1 + s / (6 * h) + v / (12 * layers * h))
    assert parameters.training_flops(spec, s, s) == pytest.approx(formula, rel=1e-9)


def test_experts_read_grows_to_all() -> None:
    cost = model("mixtral-8x7b", "h200")
    one, many = cost.touched_bytes(1), cost.touched_bytes(64)
    assert one == pytest.approx(2 * parameters.active_parameters(cost.spec) - 4 * 32000 * 4096, rel=0.01)
    assert many == pytest.approx(cost.weights.layers + cost.weights.vectors, rel=1e-3)


def test_tensor_parallel_is_faster_but_not_free() -> None:
    alone, four = model("llama-3.1-8b", "h100"), model("llama-3.1-8b", "h100", devices=4)
    t1, t4 = alone.decode_step(16, 2048), four.decode_step(16, 2048)
    assert t1.duration_ns / 4 < t4.duration_ns < t1.duration_ns
    assert t4.link_ns > 0 == t1.link_ns


@given(st.floats(0, 1e12), st.floats(0, 1e12), st.floats(1, 20))
def test_combine_lies_between_larger_and_sum(memory: float, compute: float, exponent: float) -> None:
    both = combine(memory, compute, exponent)
    assert max(memory, compute) * (1 - 1e-9) <= both <= (memory + compute) * (1 + 1e-9)


def test_row_factors_interpolate_in_the_logarithm() -> None:
    rates = Rates(
        step_ns=0, weight_byte_ns=1, mac_ns=1, logit_mac_ns=1, kv_byte_ns=1, pair_mac_ns=1,
        row_factors=((1, 4.0), (4, 2.0), (16, 1.0)),
    )  # fmt: skip
    assert [row_factor(rates, rows) for rows in (1, 2, 4, 8, 16, 500)] == [4.0, 3.0, 2.0, 1.5, 1.0, 1.0]


@pytest.mark.parametrize(
    ("name", "device", "batch", "binding"),
    [
        ("llama-3-8b", "h100", 1, "memory bandwidth"),
        ("llama-3-8b", "sn40l", 1, "memory bandwidth"),
        ("smollm2-135m", "h100", 1, "fixed time per step"),
    ],
)
def test_what_binds_a_decode(name: str, device: str, batch: int, binding: str) -> None:
    assert model(name, device).decode_step(batch, 1024).binding == binding


def test_what_binds_a_prompt() -> None:
    assert model("llama-3-8b", "h100").prefill(4096, 4096).binding == "compute"


def test_power_of_the_two_phases_on_a100() -> None:
    """POLCA: 400 W while a long prompt runs, about 250 W while tokens are generated, 63 W idle."""
    power = from_device(catalog.device("a100")).power
    assert power is not None
    busy = StepCost(duration_ns=100, compute_ns=100, memory_ns=30, link_ns=0, fixed_ns=0)
    token = StepCost(duration_ns=100, compute_ns=0, memory_ns=100, link_ns=0, fixed_ns=0)
    idle = StepCost(duration_ns=100, compute_ns=0, memory_ns=0, link_ns=0, fixed_ns=100)
    assert energy.power_w(power, busy).value == pytest.approx(400)
    assert energy.power_w(power, token).value == pytest.approx(250, rel=0.01)
    assert energy.power_w(power, idle).value == pytest.approx(63)


def test_genz_shares() -> None:
    power = energy.genz_power(700)
    full = StepCost(duration_ns=10, compute_ns=10, memory_ns=10, link_ns=10, fixed_ns=0)
    half = StepCost(duration_ns=10, compute_ns=5, memory_ns=10, link_ns=0, fixed_ns=0)
    assert energy.power_w(power, full).value == pytest.approx(700)
    assert energy.power_w(power, half).value == pytest.approx(700 * (0.3 + 0.2 + 0.2))


@settings(max_examples=50)
@given(st.floats(1, 1e6), st.floats(0.5, 1), st.floats(1, 2))
def test_bands_stay_ordered(value: float, low: float, high: float) -> None:
    estimate = Estimate(value=value, low=value * low, high=value * high)
    for made in (
        estimate.inverse(3.0),
        estimate.scaled(2.0),
        energy.joules_per_token(estimate, estimate, 4, 2),
        energy.usd_per_million_tokens(2.0, estimate),
    ):
        assert made.low <= made.value * (1 + 1e-12)
        assert made.value <= made.high * (1 + 1e-12)
        assert math.isfinite(made.high)


def test_money() -> None:
    """3.67 USD an hour at 1,000 tok/s is 1.02 USD a million tokens."""
    rate = Estimate(value=1000.0, low=1000.0, high=1000.0)
    assert energy.usd_per_million_tokens(3.67, rate).value == pytest.approx(3.67 / 3.6)


def test_spec_without_links_cannot_hide_them() -> None:
    spec: ModelSpec = catalog.model("llama-3.1-70b")
    slow = from_device(catalog.device("l4"))
    cost = CostModel(spec, slow, weight_bytes(spec, "bf16"), devices=8)
    assert cost.link_ns(64) > 2 * 80 * slow.peer_latency_ns
