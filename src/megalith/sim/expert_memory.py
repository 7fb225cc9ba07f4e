"""How an instance with many models divides its device memory, and how fast models come into it.

Knows a pool, the catalogue and sizes; must not run anything.
"""

from __future__ import annotations

from typing import NamedTuple

from megalith.base.errors import ConfigError, DoesNotFit
from megalith.base.units import format_bytes
from megalith.cost.memory import WeightBytes, per_device_weights
from megalith.sim.expert_weights import ExpertShape
from megalith.specs import catalog
from megalith.specs.experts import ExpertsSpec
from megalith.specs.fleet import FleetSpec, PoolSpec
from megalith.specs.node import node
from megalith.specs.workload import WorkloadSpec


class Division(NamedTuple):
    """Device memory of an instance."""

    kv_blocks: int
    experts: ExpertShape


class Paths(NamedTuple):
    """How models come to the device of an instance."""

    host_bytes: int | None
    host_bytes_per_s: float
    source: str


def divide(pool: PoolSpec, weights: WeightBytes, block_bytes: int, fitting_blocks: int) -> Division:
    """Models and KV in the memory that holds one model and `fitting_blocks` KV blocks of so many bytes each (on all
    devices of the instance). KV blocks that the pool asks for are its own, else models have their share or slots.

    Raises DoesNotFit when not even one model, or no KV, is left.
    """
    spec = pool.experts
    assert spec is not None
    devices = pool.tensor_parallel * pool.pipeline_parallel
    held = per_device_weights(weights, devices) * devices
    beside = fitting_blocks * block_bytes - (held if spec.router else 0)
    if spec.slots is not None:
        models = min(spec.slots, spec.count) * held
        blocks = pool.kv_blocks or (beside + held - models) // block_bytes
    elif pool.kv_blocks is not None:
        blocks = pool.kv_blocks
        models = beside + held - blocks * block_bytes
    else:
        models = held + int(beside * spec.memory_share)
        models = min(models // held, spec.count) * held
        blocks = (beside + held - models) // block_bytes
    if blocks < 2 or models < held or models + blocks * block_bytes > beside + held:
        raise DoesNotFit(
            f"Pool {pool.name!r} has {format_bytes(max(0, beside + held))} for models of {format_bytes(held)} and KV "
            f"blocks of {format_bytes(block_bytes)}{', beside the router' if spec.router else ''}; "
            f"{max(0, models // held)} models and {max(0, blocks)} blocks are asked for.",
            "Take fewer slots or KV blocks, raise tensor_parallel, or take a smaller format.",
        )
    path = paths(spec, pool.device, devices)
    shape = ExpertShape(
        spec, weights.total, held, models, path.host_bytes, path.host_bytes_per_s, spec.disk_bytes_per_s, path.source
    )
    return Division(blocks, shape)


def paths(spec: ExpertsSpec, device: str, devices: int) -> Paths:
    """From options, else the node, else the links of the device. Raises ConfigError where nothing says it."""
    host_bytes, rate, source = spec.host_bytes, spec.host_bytes_per_s, "as given"
    if spec.node is not None:
        found = node(spec.node)
        same = catalog.find_device(device) is catalog.find_device(found.device)
        if not same or devices > found.devices:
            raise ConfigError(
                f"The node {spec.node} has {found.devices} devices {found.device}, the instance {devices} of {device}.",
                "Name the node of that device, or give host_bytes_per_s instead.",
            )
        host_bytes = found.host_memory_bytes if host_bytes is None else host_bytes
        if rate is None:
            rate, source = float(found.host_bytes_per_s), f"profile {spec.node} ({found.source})"
    if rate is None:
        known = catalog.find_device(device)
        links = {} if known is None else known.link_bytes_per_s
        link = links.get("near") or links.get("host")
        if link is None:
            raise ConfigError(
                f"Nothing says how fast models come from host memory to {device}.",
                "Give experts.host_bytes_per_s, or a node of the catalogue as experts.node.",
            )
        rate, source = float(link * devices), f"{devices} links of {device} (data sheet)"
    return Paths(host_bytes, rate, source)


def check_experts(fleet: FleetSpec, workload: WorkloadSpec) -> None:
    """Raise ConfigError for pools with many models that cannot be run, or that do not have what requests ask for."""
    asked = 1 if workload.experts is None else workload.experts.count
    for pool in fleet.pools:
        have = 1 if pool.experts is None else pool.experts.count
        if asked > have:
            raise ConfigError(
                f"The workload asks for {asked} models and pool {pool.name!r} has {have}.",
                f"Give the pool experts.count={asked}, or the workload experts={have}.",
            )
        if pool.experts is None:
            continue
        if workload.experts is None:
            raise ConfigError(
                f"Pool {pool.name!r} has {have} models, and the workload does not say which are asked for.",
                f"Add experts={have} (and zipf=1.0, say) to the workload.",
            )
        if pool.role != "mixed" or pool.pipeline_parallel > 1:
            raise ConfigError(
                f"Pool {pool.name!r} has many models, and is a {pool.role} pool with {pool.pipeline_parallel} pipeline "
                "stages.",
                "Many models run on mixed instances without a pipeline: a turn holds prompts and decodes of one model.",
            )
