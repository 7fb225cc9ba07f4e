"""Pools whose attention runs on other devices: whole runs, KV room, price, power, and what does not go with it."""

from __future__ import annotations

import msgspec
import pytest

from megalith.base.errors import ConfigError, DoesNotFit
from megalith.cost.memory import kv_bytes_per_token
from megalith.sim.build import Builder
from megalith.sim.run import simulate
from megalith.sim.scenario import Scenario
from megalith.specs import catalog
from megalith.specs.fleet import PolicySpec
from megalith.specs.fleet_text import parse_fleet, render_pool
from megalith.specs.workload_rate import at_rate
from megalith.specs.workload_text import parse_workload

MODEL = "llama-3.1-70b"
SPLIT = "prefill=1xh100-sxm:tp4,decode=1xh100-sxm:tp2:attention=4xh20"


def scenario(fleet: str, router: str = "shortest-queue", requests: int = 60, **more: object) -> Scenario:
    spec = msgspec.structs.replace(parse_fleet(fleet), router=PolicySpec(name=router))
    load = msgspec.structs.replace(at_rate(parse_workload("azure-conv"), 3.0), requests=requests)
    base = Scenario(model=MODEL, timer="analytic", fleet=spec, workload=load, sample_s=5.0)
    return msgspec.structs.replace(base, **more)


def test_a_decode_pool_is_fed_by_hand_off() -> None:
    result = simulate(scenario(SPLIT))
    assert result.figures.finished == 60
    assert result.handoffs.done > 50
    assert "attention on 4xh20" in result.timing["decode"]


@pytest.mark.parametrize(
    "attention", ["4xh20", "4xh20/batches=1/early=off", "2xh20/at=home/batches=1", "4xh20/batches=3"]
)
def test_leaping_is_stepping(attention: str) -> None:
    fleet = f"prefill=1xh100-sxm:tp4,decode=1xh100-sxm:tp2:attention={attention}"
    runs = [simulate(scenario(fleet, requests=25, leap=leap, sample_s=0.0)) for leap in (True, False)]
    assert runs[0].digest == runs[1].digest
    assert runs[0].end_ns == runs[1].end_ns


def test_a_mixed_pool_computes_prompts_too_and_preempts_by_recomputing() -> None:
    """Requests of about 1,300 tokens in 6,400: those that step aside are computed again."""
    result = simulate(scenario("1xh100-sxm:tp2:attention=4xh20:kv_blocks=400:prefix_cache=false", "least-outstanding"))
    assert result.figures.finished + result.figures.rejected == 60
    assert result.figures.preemptions > 0
    assert result.handoffs.done == 0


def test_room_price_and_power_are_those_of_all_devices() -> None:
    plain, other = (
        Builder(scenario(fleet)).kinds["mixed"]
        for fleet in ("1xh100-sxm:tp2", "1xh100-sxm:tp2:attention=4xh20:block_tokens=16")
    )
    block = kv_bytes_per_token(catalog.model(MODEL)) * 16
    room = 4 * catalog.device("h20").memory_bytes * 0.9
    assert 0.97 * room < other.kv_blocks * block < room
    assert plain.price_per_hour_usd is not None
    assert other.price_per_hour_usd == pytest.approx(plain.price_per_hour_usd + 4 * 3.15)
    assert plain.power is not None
    assert other.power is not None
    assert other.power.idle_w == pytest.approx(plain.power.idle_w + 4 * 64.0 / 2)
    pool = parse_fleet("1xh100-sxm:tp2:attention=4xh20/batches=3").pools[0]
    assert pool.devices == 2 * 2 + 4
    assert "attention on 4xh20" in render_pool(pool)


def test_a_drive_without_a_price_has_none() -> None:
    kind = Builder(scenario("1xh100-sxm:tp4:attention=1xinstcsd/batches=1")).kinds["mixed"]
    assert kind.price_per_hour_usd is None


@pytest.mark.parametrize(
    ("fleet", "message"),
    [
        ("prefill=1xh100-sxm:tp4:attention=4xh20,decode=1xh100-sxm:tp4", "never decode"),
        ("1xh100-sxm:tp2:pp2:attention=4xh20", "pipeline"),
        ("1xh100-sxm:tp2:attention=4xh20:preempt=swap:host_blocks=9", "host memory"),
        ("1xh100-sxm:tp2:attention=4xh20:timer=operators", "timed by 'operators'"),
        ("1xh100-sxm:tp2:attention=4xh20/keep=8", "no accuracy was measured"),
        ("1xh100-sxm:tp2:attention=4xa20", "no device or drive"),
    ],
)
def test_what_does_not_go_together(fleet: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Builder(scenario(fleet))


def test_weights_that_do_not_fit() -> None:
    with pytest.raises(DoesNotFit, match="without any KV"):
        Builder(scenario("1xh100-sxm:attention=4xh20"))
