"""The flags that describe a scenario, shared by `megalith simulate` and `megalith sweep`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from megalith.base.errors import ConfigError

if TYPE_CHECKING:
    from megalith.sim.scenario import Scenario
    from megalith.specs.fleet import FleetSpec


@Parameter(name="*", group="What to simulate")
@dataclass(frozen=True)
class What:
    """The scenario, by flags."""

    trace: str = ""
    """A trace file, a built-in workload or a drawn one (`poisson:rate=5,...`)."""
    model: str = ""
    """A model of the catalogue (`megalith models`)."""
    fleet: str = ""
    """Pools such as 4xh100-sxm:tp2, or a TOML file."""
    policy: tuple[str, ...] = ()
    """A set-up such as splitwise, a batch policy of all pools, a router or a controller; give it once for each."""
    router: str | None = None
    """A router with options, such as prefix-aware or rebalance:threshold=10."""
    controller: tuple[str, ...] = ()
    """Controllers with options; each adds one."""
    slo: str | None = None
    """Service level, such as ttft=400ms,tpot=40ms@p90 or splitwise."""
    rate: float | None = None
    """Requests a second: the workload at another rate."""
    requests: int | None = None
    """Stop after so many requests."""
    seed: int | None = None
    """Of everything that is drawn; 0 unless said."""


@Parameter(name="*", group="How")
@dataclass(frozen=True)
class How:
    """Model formats, costs and details."""

    timer: str | None = None
    """auto (default), operators, analytic, or a published model (see --list)."""
    weight_format: Annotated[str | None, Parameter(name="--format")] = None
    """Weights: bf16 (default), fp8, int8, ..."""
    kv_format: Annotated[str | None, Parameter(name="--kv")] = None
    """KV cache: bf16 (default) or fp8."""
    max_context: int | None = None
    """Most tokens of prompt and answer together."""
    max_new: str | None = None
    """What schedulers are told of an answer: context (default), a number, or true (an oracle)."""
    config: Path | None = None
    """A stored scenario (JSON); flags override it."""


def make_scenario(what: What, how: How) -> Scenario:
    """The scenario that the flags describe. Raises ConfigError."""
    import msgspec

    from megalith.base.config import convert
    from megalith.sim.scenario import Scenario
    from megalith.specs.slo import parse_slo
    from megalith.specs.workload_text import parse_workload

    stored: Scenario | None = None
    if how.config is not None:
        try:
            stored = convert(msgspec.json.decode(how.config.read_bytes()), Scenario, str(how.config))
        except (OSError, msgspec.DecodeError) as error:
            raise ConfigError(f"The scenario {how.config} cannot be read ({error}).", "Give a scenario.json.") from None
    else:
        for name in ("trace", "model", "fleet"):
            if not getattr(what, name):
                raise ConfigError(f"A simulation needs --{name}.", "`megalith simulate --help` has examples.")
    workload = parse_workload(what.trace) if what.trace or stored is None else stored.workload
    if what.rate is not None:
        from megalith.specs.workload_rate import at_rate

        workload = at_rate(workload, what.rate)
    if what.requests is not None:
        workload = msgspec.structs.replace(workload, requests=what.requests)
    if workload.endless:
        hint = "Add --requests 10000, or duration=10m to the workload."
        raise ConfigError(f"The workload {workload.name or what.trace} never ends.", hint)
    if how.max_new is not None:
        told: int | str = int(how.max_new) if how.max_new.isdecimal() else how.max_new
        workload = convert(msgspec.to_builtins(workload) | {"max_new": told}, type(workload), "--max-new")
    fleet = _fleet(what, stored.fleet if stored is not None else None)
    flags: dict[str, Any] = {
        "fleet": fleet,
        "workload": workload,
        "model": what.model or None,
        "slo": None if what.slo is None else parse_slo(what.slo),
        "seed": what.seed,
        "timer": how.timer,
        "weight_format": how.weight_format,
        "kv_format": how.kv_format,
        "max_context": how.max_context,
    }
    given = {name: value for name, value in flags.items() if value is not None}
    return Scenario(**given) if stored is None else msgspec.structs.replace(stored, **given)


def _fleet(what: What, stored: FleetSpec | None) -> FleetSpec:
    import msgspec

    from megalith.sim.setups import with_policies
    from megalith.specs.fleet_text import parse_fleet, parse_policy

    fleet = with_policies(parse_fleet(what.fleet) if what.fleet or stored is None else stored, what.policy)
    if what.router is not None:
        fleet = msgspec.structs.replace(fleet, router=parse_policy(what.router))
    if what.controller:
        more = tuple(parse_policy(text) for text in what.controller)
        fleet = msgspec.structs.replace(fleet, controllers=(*fleet.controllers, *more))
    return fleet
