"""BlockScenario: many fine-tuned models on one set of devices, and how much of them they share.

What a person writes; names are resolved above. Must not know costs or decisions.
"""

from __future__ import annotations

from typing import Literal

from megalith.base.config import Config
from megalith.base.errors import ConfigError
from megalith.specs.slo import Slo
from megalith.specs.workload import WorkloadSpec

Sharing = Literal["model", "parameters", "blocks"]
MOST_BLOCKS = 8
"""Of one model: every hop is an event, so chains are kept short."""


class ZooSpec(Config, kw_only=True):
    """Synthetic fine-tunes: no such set was published, so shares and similarities are assumptions."""

    bases: tuple[str, ...] = ("llama-2-7b", "llama-3.1-8b", "llama-2-13b")
    """Catalogue models that applications are tuned from, in turn."""
    applications: int = 20
    blocks: int = 4
    """Blocks that each model is cut into."""
    adapter_share: float = 0.5
    """Of the applications, those that only add an adapter: their base is theirs to the bit."""
    alike_share: float = 0.6
    """Of the blocks of the others, those whose weights stay close to their base: cosine from 0.98 to 1."""
    skew: float = 1.0
    """Popularity of the application of rank r: (r + 1) ** -skew; 0 makes all the same."""
    cosine: float = 0.98
    """A block at least this like its base's is equivalent to it: the base may stand in. Recalled from BlockLLM."""
    merge_cosine: float = 0.98
    """At least this alike, and only the base's block is deployed at all. Above `cosine`, blocks between the two are
    deployed, and the base stands in for them only where their queues are long."""

    def __post_init__(self) -> None:
        if not self.bases or not 1 <= self.applications <= 10_000:
            raise ConfigError(f"{self.applications} applications of {len(self.bases)} bases cannot be.", "Give some.")
        if not 1 <= self.blocks <= MOST_BLOCKS:
            raise ConfigError(f"A model cannot be cut into {self.blocks} blocks.", f"Use 1 to {MOST_BLOCKS}.")
        for name in ("adapter_share", "alike_share", "cosine", "merge_cosine"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ConfigError(f"{name} is {getattr(self, name):g}.", "Give a share from 0 to 1.")
        if not 0.0 <= self.skew <= 10.0:
            raise ConfigError(f"A skew of {self.skew:g} cannot be.", "Give 0 to 10.")


class BlockScenario(Config, kw_only=True):
    """Applications on devices under a load. Two runs of equal scenarios have the same digest on every machine."""

    workload: WorkloadSpec
    zoo: ZooSpec = ZooSpec()
    device: str = "a100-80gb"
    servers: tuple[int, ...] = (2, 2, 4, 4)
    """Devices of each server. BlockLLM: twelve A100 in two servers of two and two of four."""
    between_bytes_per_s: float = 12.5e9
    """Of a device's port to other servers: 100 Gb/s, as in BlockLLM."""
    between_latency_s: float = 10e-6
    inside_latency_s: float = 5e-6
    host_bytes_per_s: float = 25e9
    """Weights of a new instance come from host memory at this rate: what copies reach over PCIe 4.0 x16."""
    sharing: Sharing = "blocks"
    """`model`: each application has instances of its own. `parameters`: those with adapters share their base whole, as
    S-LoRA does. `blocks`: equivalent blocks are there once for all, each with its own queue."""
    kv: Literal["coordinated", "queue", "pinned"] = "coordinated"
    """How the next hop is chosen among instances of a block: by queue and KV, by queue alone, or never anew."""
    adaptive: bool = True
    """A long queue sends new requests to an equivalent block that is already there."""
    speculation: bool = True
    """A pruned surrogate lets the next block begin before the true output has crossed servers."""
    locality: bool = True
    """Chains are placed as wholes where they fit; False: each block by itself, on the device with the least load."""
    replicas: Literal["popularity", "one"] = "popularity"
    """Of each application at the start: as its part of the requests is of the devices, or one. More come with load."""
    scale_above: float = 0.7
    """Occupancy of an instance above which another one is started. Recalled from BlockLLM."""
    max_sequences: int = 64
    """Requests that one instance may have at once."""
    token_budget: int = 4096
    """Prompt tokens of one step; a longer prompt runs alone."""
    surrogate_share: float = 0.25
    """Time of a surrogate over that of its block. An assumption."""
    surrogate_accuracy: float = 0.85
    """How often its output stands. An assumption."""
    memory_share: float = 0.9
    weights_share: float = 0.6
    """Of that memory, the most that weights take where instances are added; KV has the rest."""
    slo: Slo | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.servers or min(self.servers) < 1 or sum(self.servers) > 1000:
            raise ConfigError(f"Servers of {self.servers} devices cannot be.", "Give 1 to 1,000 devices in all.")
        positive = ("between_bytes_per_s", "host_bytes_per_s", "max_sequences", "token_budget")
        for name in positive:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name):g}.", "Give 1 or more.")
        shares = ("scale_above", "surrogate_share", "surrogate_accuracy", "memory_share", "weights_share")
        for name in (*shares, "between_latency_s", "inside_latency_s"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ConfigError(f"{name} is {getattr(self, name):g}.", "Give 0 to 1.")
        if self.workload.endless:
            raise ConfigError("This workload never ends.", "Give it a number of requests, or a duration.")
