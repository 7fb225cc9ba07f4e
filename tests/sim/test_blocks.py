"""A fleet of blocks: every token is given once, bytes are given back, one block is a whole model."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalith.base.errors import ConfigError, DoesNotFit
from megalith.cost.timer import Prompt
from megalith.cost.timer_choice import choose_timer
from megalith.sim.blocks import BlockResult, BlockRun
from megalith.specs.arrivals import PoissonArrivals
from megalith.specs.blocks import BlockScenario, ZooSpec
from megalith.specs.lengths import FixedLength, UniformLength
from megalith.specs.workload import WorkloadSpec


def scenario(requests: int = 30, rate: float = 30.0, **change: Any) -> BlockScenario:
    zoo = ZooSpec(**change.pop("zoo", {}))
    load = WorkloadSpec(
        input=change.pop("input", UniformLength(low=10, high=900)), output=UniformLength(low=1, high=20),
        arrivals=PoissonArrivals(rate_per_s=rate), requests=requests,
    )  # fmt: skip
    return BlockScenario(workload=load, zoo=zoo, **change)


def run(setting: BlockScenario) -> tuple[BlockRun, BlockResult]:
    one = BlockRun(setting)
    free = sum(device.free_bytes + device.weights_bytes for device in one.fleet.devices)
    result = one.run()
    assert result.requests == setting.workload.requests
    assert free == sum(device.free_bytes + device.weights_bytes for device in one.fleet.devices)
    for device in one.fleet.devices:
        assert not device.running
        assert device.busy_ps <= result.end_ns * 1000
        assert sum(instance.present + len(instance.queue) for instance in device.instances) == 0
        assert device.weights_bytes == sum(instance.num_bytes for instance in device.instances)
    return one, result


@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from(["model", "parameters", "blocks"]), st.sampled_from(["coordinated", "queue", "pinned"]),
    st.booleans(), st.booleans(), st.integers(0, 99), st.sampled_from([0.98, 1.0]), st.sampled_from([1, 3, 8]),
)  # fmt: skip
def test_everybody_gets_all_tokens_and_gives_all_bytes_back(
    sharing: Any, kv: Any, speculation: bool, locality: bool, seed: int, merge: float, blocks: int
) -> None:
    setting = scenario(
        sharing=sharing, kv=kv, speculation=speculation, locality=locality, seed=seed, max_sequences=4,
        zoo={"merge_cosine": merge, "blocks": blocks},
    )  # fmt: skip
    _, result = run(setting)
    assert result.figures.latencies["e2e_ns"] is not None
    assert result.counters.redone <= result.counters.trials
    assert result.digest == BlockRun(setting).run().digest


def test_a_lone_request_on_one_device_takes_its_steps() -> None:
    setting = scenario(
        1, servers=(1,), zoo={"applications": 1, "bases": ("llama-2-7b",), "blocks": 4, "adapter_share": 1.0},
        input=FixedLength(tokens=700),
    )  # fmt: skip
    _, result = run(setting)
    timer = choose_timer("analytic", "llama-2-7b", "a100-80gb")
    first = timer.step_ps([Prompt(700, 0, True)], 0, 0, 0)
    ttft = result.figures.latencies["ttft_ns"]
    assert ttft is not None
    assert abs(ttft.mean * 1000 - first) <= 4 * 1000  # each block ends at a whole nanosecond
    assert result.counters.messages == 0


def test_a_chain_of_one_block_is_the_whole_model() -> None:
    """With adapters only, sharing by parameters and by blocks of a whole model are the same thing."""
    zoo = {"blocks": 1, "adapter_share": 1.0}
    one, two = (run(scenario(sharing=sharing, kv="pinned", zoo=zoo))[1] for sharing in ("parameters", "blocks"))
    assert one.digest == two.digest


def test_surrogates_that_are_always_right_redo_nothing() -> None:
    _, right = run(scenario(surrogate_accuracy=1.0, servers=(1,) * 12, rate=3.0, locality=False))
    _, wrong = run(scenario(surrogate_accuracy=0.0, servers=(1,) * 12, rate=3.0, locality=False))
    assert right.counters.trials > 0
    assert right.counters.redone == 0
    assert wrong.counters.redone > 0


def test_queues_that_are_full_get_another_instance() -> None:
    setting = scenario(60, 500.0, max_sequences=4, zoo={"applications": 3})
    _, result = run(setting)
    assert result.counters.added > 0
    _, still = run(msgspec.structs.replace(setting, scale_above=1.0, weights_share=0.2))
    assert still.instances < result.instances


def test_what_is_stored_shrinks_with_sharing() -> None:
    sizes = [run(scenario(5, sharing=sharing))[1].unit_bytes for sharing in ("model", "parameters", "blocks")]
    assert sizes[0] > sizes[1] > sizes[2]


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(DoesNotFit, match="weights_share"):
        BlockRun(scenario(servers=(1,), sharing="model"))
    with pytest.raises(ConfigError, match="never ends"):
        scenario(requests=None)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="devices"):
        scenario(servers=())


def test_whole_chains_stay_on_one_device() -> None:
    """Every application has its chain on some device, so no hidden value is a message; apart they are."""
    one, result = run(scenario())
    for chain in one.fleet.zoo.chains:
        homes = [{instance.device.id for instance in one.fleet.instances[unit]} for unit in chain]
        assert set.intersection(*homes)
    assert result.counters.messages == result.counters.kv_moves == 0
    _, apart = run(scenario(locality=False))
    assert apart.counters.messages > 0


def test_kv_that_is_coordinated_does_not_go_back_and_forth() -> None:
    moves, waits = [], []
    for kv in ("coordinated", "queue", "pinned"):
        _, result = run(scenario(60, 25.0, locality=False, kv=kv))
        moves.append(result.counters.kv_moves + result.counters.recomputes)
        latency = result.figures.latencies["tpot_ns"]
        assert latency is not None
        waits.append(latency.mean)
    assert moves[2] == 0
    assert moves[0] * 5 < moves[1]
    assert waits[0] < waits[1]


def test_one_place_for_each_application_is_less_than_popularity_gives() -> None:
    one, result = run(scenario(sharing="model", replicas="one"))
    assert result.instances == 20
    assert BlockRun(scenario(sharing="model")).fleet.instances != one.fleet.instances
    _, many = run(scenario(sharing="model"))
    assert many.instances > 20


def test_where_the_popular_do_not_all_fit_there_are_fewer_of_them() -> None:
    """Models of twenty applications fill 60 % of nine devices, once each."""
    few = scenario(sharing="model", servers=(9,))
    _, result = run(few)
    assert 20 <= result.instances < 25
    with pytest.raises(DoesNotFit):
        BlockRun(scenario(sharing="model", servers=(7,)))


def test_a_chain_that_is_full_grows_as_a_whole() -> None:
    one, result = run(scenario(60, 500.0, max_sequences=4, zoo={"applications": 3}))
    assert result.counters.added > 0
    for device in one.fleet.devices:
        for base in {instance.unit.base for instance in device.instances}:
            places = {instance.unit.first for instance in device.instances if instance.unit.base == base}
            assert places == {0, 1, 2, 3}
