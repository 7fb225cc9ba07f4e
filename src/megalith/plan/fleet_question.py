"""What `plan fleet` is asked, and the fleets that may answer: devices, degrees, set-ups and sizes.

Knows how a candidate becomes a FleetSpec and what it costs; must not know how well it does.
"""

from __future__ import annotations

import difflib
from typing import Literal, NamedTuple, TypeAlias

from megalith.base.config import Config
from megalith.base.errors import ConfigError
from megalith.cost.attention_devices import attention_devices
from megalith.sim.scenario import Scenario
from megalith.sim.setups import SETUPS, with_policies
from megalith.specs import catalog
from megalith.specs.attention import AttentionSpec, parse_attention
from megalith.specs.fleet import FleetSpec, PoolSpec
from megalith.specs.slo import Slo
from megalith.specs.workload import WorkloadSpec

Objective: TypeAlias = Literal["cost", "power", "devices"]
OBJECTIVES: tuple[Objective, ...] = ("cost", "power", "devices")
SETUP_NAMES = ("mixed", "llumnix", "splitwise", "distserve")
"""From plain to involved: of two fleets that are as good, the plainer one is chosen."""


class FleetQuestion(Config, kw_only=True):
    """All that decides the answer."""

    model: str
    workload: WorkloadSpec
    slo: Slo
    devices: tuple[str, ...]
    attention_devices: tuple[str, ...] = ()
    """Devices or drives that may hold KV and compute attention beside them, and nothing else."""
    tensor_parallel: tuple[int, ...] = (1, 2, 4, 8)
    setups: tuple[str, ...] = SETUP_NAMES
    minimise: Objective = "cost"
    most_devices: int = 1024
    prices_usd: dict[str, float] = {}
    """Of one device for an hour; the catalogue's where it is not said."""
    seed: int = 0
    weight_format: str = "bf16"
    kv_format: str = "bf16"
    timer: str = "auto"
    max_context: int | None = None
    most_requests: int = 20_000
    """Of the workload, so many are simulated at most (more where they pass within two minutes)."""
    power_budget_w: float | None = None
    """Of all devices and what stands beside them: no fleet is provisioned for more by its rating."""
    beside_w: float = 388.0
    """What a server draws beside each of its devices: host, fans, network. A DGX A100 has 3,105 W beside eight."""
    start_s: float | None = None
    """From the decision to start one more instance until it serves; None: the fleet keeps its size."""
    posterior: str | None = None
    """File of samples of the load to come, for a fleet that scales by forecast."""

    def __post_init__(self) -> None:
        """ConfigError for a question without an answer."""
        if not self.devices:
            raise ConfigError("There is no device to choose from.", "Add --device h100-sxm.")
        if not any(bound.metric in ("ttft", "e2e") for bound in self.slo.bounds):
            raise ConfigError(
                f"The service level {self.slo} lets everybody wait for ever: one instance would keep it.",
                "Add a bound on ttft or e2e, such as ttft=1s.",
            )
        for name in self.setups:
            if name not in SETUP_NAMES:
                near = difflib.get_close_matches(name, SETUP_NAMES, n=1, cutoff=0.0)[0]
                raise ConfigError(
                    f"There is no set-up {name!r} to plan with.",
                    f"Did you mean {near!r}? Known: {', '.join(SETUP_NAMES)}, all.",
                )
        if min(self.tensor_parallel, default=0) < 1 or self.most_devices < 1 or self.most_requests < 1:
            raise ConfigError("Degrees, devices and requests are at least 1.", "Give numbers above 0.")
        self._check_further()
        for name in self.attention_devices:
            attention_devices(AttentionSpec(device=name, count=1))
        unknown = set(self.prices_usd) - set(self.devices) - set(self.attention_devices)
        if unknown:
            raise ConfigError(f"There is a price for {', '.join(sorted(unknown))}, which is no --device.", "Add it.")
        if self.minimise == "cost":
            self._check_prices()

    def price_usd(self, device: str) -> float | None:
        """Of one device for an hour."""
        return self.prices_usd.get(device, catalog.device(device).price_per_hour_usd)

    def instance_price_usd(self, shape: Shape) -> float | None:
        """Of all devices of one instance for an hour; None where one of them has no price."""
        own = self.price_usd(shape.device)
        if shape.attention is None:
            return None if own is None else own * shape.devices
        spec = parse_attention(shape.attention)
        other = self.prices_usd.get(spec.device, attention_devices(spec).price_per_hour_usd)
        if own is None or other is None:
            return None
        return own * shape.tensor_parallel * spec.replicas + other * spec.count

    def rated_w(self, shape: Shape) -> float:
        """What one instance is provisioned for: its devices as they are rated, and what stands beside them."""
        rated = catalog.device(shape.device).tdp_w
        if rated is None:
            raise ConfigError(f"Nobody says what {shape.device} is rated for.", "Leave --power-budget out.")
        return shape.devices * (rated + self.beside_w)

    def most(self, shape: Shape) -> int:
        """Instances of the largest fleet of a kind: by devices, and by rated power where there is a budget."""
        most = shape.most(self.most_devices)
        return most if self.power_budget_w is None else min(most, int(self.power_budget_w / self.rated_w(shape)))

    def scenario(self, fleet: FleetSpec, **changes: object) -> Scenario:
        """The scenario of a fleet under this load."""
        given: dict[str, object] = {
            "model": self.model, "fleet": fleet, "workload": self.workload, "slo": self.slo, "seed": self.seed,
            "weight_format": self.weight_format, "kv_format": self.kv_format, "timer": self.timer,
            "max_context": self.max_context,
        }  # fmt: skip
        return Scenario(**(given | changes))  # type: ignore[arg-type]

    def _check_further(self) -> None:
        if self.power_budget_w is not None and not 0 < self.power_budget_w < 1e12:
            raise ConfigError(f"A power budget of {self.power_budget_w:g} W is none.", "Give watts above 0.")
        if not 0 <= self.beside_w < 1e6:
            raise ConfigError(f"{self.beside_w:g} W cannot stand beside a device.", "Give 0 W or more.")
        if self.start_s is not None and not 0 <= self.start_s < 1e6:
            raise ConfigError(f"An instance cannot take {self.start_s:g} s to serve.", "Give 0 s or more.")
        if self.posterior is not None and self.start_s is None:
            raise ConfigError(
                "A forecast of the load is of use only to a fleet that scales.",
                "Add --start SECONDS, which an instance takes to serve.",
            )

    def _check_prices(self) -> None:
        free = [device for device in self.devices if self.price_usd(device) is None]
        if free:
            raise ConfigError(
                f"The catalogue has no price for {', '.join(free)}.",
                f"Add --price {free[0]}=USD for an hour of one, or --minimise devices.",
            )


class Size(NamedTuple):
    """How many instances, and how many of them do prompts only (0: every one does both)."""

    instances: int
    prefill: int = 0

    @property
    def decode(self) -> int:
        """Instances that decode only."""
        return self.instances - self.prefill if self.prefill else 0

    def __str__(self) -> str:
        return f"{self.prefill}+{self.decode}" if self.prefill else f"{self.instances}"


class Shape(Config, kw_only=True):
    """A kind of fleet: all of it but the size."""

    device: str
    tensor_parallel: int
    setup: str
    lengths: str = "capped"
    """What `splitwise` reserves for an answer; `predicted` where requests do not say how much they want."""
    extras: tuple[str, ...] = ()
    """What `megalith simulate --policy` takes beside the set-up: a batch policy, a further mechanism."""
    pipeline_parallel: int = 1
    pipeline: Literal["queue", "blocking", "non-blocking"] = "queue"
    """How its stages send, where it has several."""
    start_s: float = 0.0
    """What one more instance takes to serve, where the fleet scales."""
    attention: str | None = None
    """Devices of each instance that hold its KV cache and compute attention, as `4xh20/batches=2`."""

    @property
    def split(self) -> bool:
        """Whether prompts and decodes have pools of their own."""
        return self.setup in SETUPS and SETUPS[self.setup].split

    @property
    def devices(self) -> int:
        """Of one instance."""
        own = self.tensor_parallel * self.pipeline_parallel
        if self.attention is None:
            return own
        other = parse_attention(self.attention)
        return own * other.replicas + other.count

    @property
    def smallest(self) -> int:
        """Instances of the smallest fleet."""
        return 2 if self.split else 1

    def most(self, devices: int) -> int:
        """Instances that so many devices make."""
        return devices // self.devices

    def sizes(self, instances: int, prefill_share: float, most: int) -> list[Size]:
        """Sizes of so many instances: one where all do both, else the splits nearest to a share, at most so many."""
        if not self.split:
            return [Size(instances)]
        center = instances * prefill_share
        splits = sorted(range(1, instances), key=lambda prefill: (abs(prefill - center), prefill))
        return [Size(instances, prefill) for prefill in splits[:most]]

    def fleet(self, size: Size) -> FleetSpec:
        """The FleetSpec. Raises ConfigError when this set-up cannot have that size."""
        if size.prefill:
            pools: tuple[PoolSpec, ...] = (
                self._pool("prefill", size.prefill, "prefill"),
                self._pool("decode", size.decode, "decode"),
            )
        else:
            pools = (self._pool("mixed", size.instances, "mixed"),)
        return with_policies(FleetSpec(pools=pools), self.policies)

    @property
    def policies(self) -> tuple[str, ...]:
        """For `megalith simulate --policy`."""
        lengths = f":lengths={self.lengths}" if self.setup == "splitwise" else ""
        return (*(() if self.setup == "mixed" else (f"{self.setup}{lengths}",)), *self.extras)

    @property
    def mechanisms(self) -> str:
        """Set-up and extras in a few words."""
        return " + ".join((self.setup, *self.extras))

    def _pool(self, name: str, count: int, role: Literal["mixed", "prefill", "decode"]) -> PoolSpec:
        return PoolSpec(
            name=name, device=self.device, count=count, role=role, tensor_parallel=self.tensor_parallel,
            start_s=self.start_s, pipeline_parallel=self.pipeline_parallel, pipeline=self.pipeline,
            attention=self.attention,
        )  # fmt: skip

    def flags(self, size: Size) -> str:
        """What `megalith simulate` is told to run it."""
        degree = f":tp{self.tensor_parallel}" if self.tensor_parallel > 1 else ""
        degree += f":pp{self.pipeline_parallel}:pipeline={self.pipeline}" if self.pipeline_parallel > 1 else ""
        degree += f":attention={self.attention}" if self.attention else ""
        start = f":start_s={self.start_s:g}" if self.start_s else ""
        unit = f"x{self.device}{degree}{start}"
        fleet = (
            f"prefill={size.prefill}{unit},decode={size.decode}{unit}" if size.prefill else f"{size.instances}{unit}"
        )
        return " ".join([f"--fleet {fleet}", *(f"--policy {policy}" for policy in self.policies)])

    def render(self, size: Size | None = None) -> str:
        """In a few words: `4 x h100-sxm tp2, llumnix`."""
        degree = f" tp{self.tensor_parallel}" if self.tensor_parallel > 1 else ""
        degree += f" pp{self.pipeline_parallel} {self.pipeline}" if self.pipeline_parallel > 1 else ""
        degree += f" + {self.attention}" if self.attention else ""
        count = "" if size is None else f"{size} x "
        return f"{count}{self.device}{degree}, {self.mechanisms}"


def shapes(question: FleetQuestion) -> list[Shape]:
    """All kinds of fleets that the question allows, plain set-ups first."""
    lengths = "predicted" if question.workload.max_new == "context" else "capped"
    return [
        Shape(device=device, tensor_parallel=degree, setup=setup, lengths=lengths)
        for setup in sorted(dict.fromkeys(question.setups), key=SETUP_NAMES.index)
        for device in dict.fromkeys(question.devices)
        for degree in sorted(set(question.tensor_parallel))
        if degree <= question.most_devices
    ]
