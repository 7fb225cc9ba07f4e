"""A pool whose attention runs on other devices: its timer, the KV that these hold, and what all of it costs.

Knows the words of a pool and of its attention; must not run anything.
"""

from __future__ import annotations

from typing import NamedTuple

from megalith.base.errors import ConfigError, DoesNotFit
from megalith.base.units import format_bytes
from megalith.cost.attention_devices import AttentionDevices, attention_devices, held_share
from megalith.cost.compute import CostModel
from megalith.cost.memory import (
    RESIDENCY,
    WeightBytes,
    Workspace,
    activation_bytes,
    kv_block_bytes,
    per_device_weights,
)
from megalith.cost.profile import Profile
from megalith.cost.timer_elsewhere import ElsewhereTimer
from megalith.sim.scenario import Scenario
from megalith.specs.attention import parse_attention
from megalith.specs.fleet import PoolSpec
from megalith.specs.model import ModelSpec


class Elsewhere(NamedTuple):
    """What all instances of such a pool have in common."""

    timer: ElsewhereTimer
    kv_blocks: int
    timing: str
    price_per_hour_usd: float | None
    """Of one instance, all its devices."""


def elsewhere(
    pool: PoolSpec, timer: str, spec: ModelSpec, profile: Profile | None, weights: WeightBytes, scenario: Scenario
) -> Elsewhere:
    """The parts of a pool with `attention`. Raises ConfigError for what does not go with it, DoesNotFit for weights."""
    devices = attention_devices(parse_attention(pool.attention or ""))
    _check(pool, timer)
    if profile is None:
        raise ConfigError(f"There is no device {pool.device!r}.", "`megalith simulate --list` names them.")
    work = Workspace(pool.token_budget, pool.max_sequences, min(spec.max_context, pool.token_budget))
    fixed = (
        per_device_weights(weights, pool.tensor_parallel)
        + activation_bytes(spec, profile.kind, work)[0] // pool.tensor_parallel
        + RESIDENCY[profile.kind].base_bytes
    )
    room = int(profile.memory_bytes * scenario.memory_share)
    if fixed > room:
        raise DoesNotFit(
            f"{spec.name} needs {format_bytes(fixed)} on each {pool.device} of pool {pool.name!r} (tensor parallel "
            f"{pool.tensor_parallel}) without any KV, which has {format_bytes(room)} to give.",
            "Raise tensor_parallel, take a smaller format or a larger device.",
        )
    blocks = pool.kv_blocks or kv_blocks(devices, spec, pool.block_tokens, scenario.kv_format, scenario.memory_share)
    if blocks < 2:
        raise DoesNotFit(f"{pool.attention} have no room for two blocks of KV of {spec.name}.", "Take more of them.")
    cost = CostModel(spec, profile, weights, scenario.kv_format, pool.tensor_parallel)
    timing = f"rates of {profile.name} ({profile.source}); {devices.label} ({devices.source})"
    price = instance_price(devices, profile.price_per_hour_usd, pool.tensor_parallel)
    return Elsewhere(ElsewhereTimer(cost, devices), blocks, timing, price)


def kv_blocks(devices: AttentionDevices, spec: ModelSpec, block_tokens: int, kv_format: str, share: float) -> int:
    """Blocks that the attention devices hold together in `share` of their memory. Nothing else lies there."""
    block = kv_block_bytes(spec, block_tokens, kv_format) * held_share(devices)
    return int(devices.spec.count * devices.memory_bytes * share / block)


def instance_price(devices: AttentionDevices, model_device_usd: float | None, tensor_parallel: int) -> float | None:
    """An hour of all devices of an instance; None where one of them has no price."""
    if model_device_usd is None or devices.price_per_hour_usd is None:
        return None
    spec = devices.spec
    return model_device_usd * tensor_parallel * spec.replicas + devices.price_per_hour_usd * spec.count


def _check(pool: PoolSpec, timer: str) -> None:
    where = f"Pool {pool.name!r} has its attention on {pool.attention}"
    if pool.role == "prefill":
        raise ConfigError(f"{where}, and prompts only, which never decode.", "Give that to a decode or mixed pool.")
    if pool.pipeline_parallel > 1:
        raise ConfigError(
            f"{where} and {pool.pipeline_parallel} stages of a pipeline, which do not go together.",
            "Use tensor_parallel.",
        )
    if pool.preempt == "swap":
        raise ConfigError(f"{where}, whose KV has no way to host memory.", "Say preempt=recompute.")
    if timer not in ("auto", "analytic"):
        raise ConfigError(
            f"{where}, and steps timed by {timer!r}, which does not say what attention is of a step.",
            "Use the timer analytic.",
        )
