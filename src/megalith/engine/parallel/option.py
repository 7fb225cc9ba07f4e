"""`--tensor-parallel N` and what goes with it: parsing and refusals; knows no process and no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from megalith.base.errors import ConfigError
from megalith.base.units import parse_bytes, parse_duration_ns
from megalith.cost.collective import Collective, Link
from megalith.specs.model import ModelSpec

if TYPE_CHECKING:
    from megalith.engine.api import EngineConfig

MOST_RANKS = 16


@dataclass(frozen=True, slots=True)
class ParallelOption:
    """How one instance is spread over processes. `window_blocks` 0: all of a rank's weights stay in memory."""

    ranks: int = 1
    collective: Collective = "star"
    link: Link | None = None
    """Imposed on what ranks send each other; None: as fast as this machine goes."""
    window_blocks: int = 0
    disk_bytes_per_s: int | None = None
    """Imposed on what windows read; None: as fast as the disk goes."""

    @property
    def used(self) -> bool:
        """Whether anything of it is asked for."""
        return self.ranks > 1 or self.window_blocks > 0


def degrees(spec: ModelSpec) -> list[int]:
    """Ranks that the heads of this model can be cut over."""
    return [n for n in range(1, MOST_RANKS + 1) if cuts(spec, n)]


def cuts(spec: ModelSpec, ranks: int) -> bool:
    """Query heads are divided; KV heads are, too, or each is repeated on a whole number of ranks."""
    heads, kv = spec.num_heads, spec.num_kv_heads
    return heads % ranks == 0 and (kv % ranks == 0 or ranks % kv == 0) and ranks <= min(heads, spec.ffn)


def parse_link(text: str) -> Link | None:
    """`LATENCY` or `LATENCY/BYTES`, such as 2ms/125MB (a second); empty: none. Raises ConfigError."""
    if not text:
        return None
    latency, _, rate = text.partition("/")
    return Link(latency_ns=parse_duration_ns(latency), bytes_per_s=parse_bytes(rate) if rate else None)


def check_parallel(config: EngineConfig, spec: ModelSpec) -> ParallelOption:
    """The option of this configuration. Raises ConfigError where it cannot be combined with the rest."""
    ranks, blocks = config.tensor_parallel, config.window_blocks
    if not 1 <= ranks <= MOST_RANKS:
        raise ConfigError(f"tensor_parallel is {ranks}.", f"Take 1 to {MOST_RANKS}.")
    if blocks < 0 or blocks == 1:
        raise ConfigError(
            f"A window of {blocks} blocks cannot be: one is computed with while the next is read.",
            "Take --window-blocks 2 or more; a layer is two, attention and FFN.",
        )
    option = ParallelOption(
        ranks, config.collective, parse_link(config.link), blocks,
        None if config.disk_bytes_per_s is None else int(config.disk_bytes_per_s),
    )  # fmt: skip
    if not option.used:
        if option.link is not None or option.disk_bytes_per_s is not None:
            raise ConfigError("There is one rank without a window: no link and no disk to slow down.",
                              "Give --tensor-parallel or --window-blocks, too.")  # fmt: skip
        return option
    if not cuts(spec, ranks):
        able = ", ".join(map(str, degrees(spec)[1:])) or "no number above 1"
        raise ConfigError(
            f"The {spec.num_heads} heads and {spec.num_kv_heads} KV heads of {spec.name} cannot be cut over {ranks} "
            "ranks evenly.",
            f"Take --tensor-parallel of: {able}.",
        )
    if spec.num_experts:
        raise ConfigError(f"{spec.name} has experts, which are not cut over ranks yet.", "Take a dense model.")
    _check_rest(config)
    return option


def _check_rest(config: EngineConfig) -> None:
    asked = "--window-blocks" if config.tensor_parallel == 1 else "--tensor-parallel"
    if config.mode == "native":
        raise ConfigError(f"{asked} is the torch runner's.", "Use --mode float32 or bf16.")
    if config.device != "cpu":
        raise ConfigError(f"{asked} is for processes on the CPU so far.", "Use --device cpu.")
    if config.attention != "here":
        raise ConfigError(f"{asked} cuts the heads of attention itself.", "Use --attention here.")
    if config.window is not None:
        raise ConfigError(f"--window is of one process, {asked} of ranks.", "Use --window-blocks alone, or --window.")
    if config.preempt == "swap":
        raise ConfigError(f"With {asked} there are no host blocks to swap to.", "Use --preempt recompute.")
    if config.memory_bytes is not None:
        raise ConfigError(
            f"--memory limits one process, and {asked} makes several or streams.",
            "Leave it off; `megalith plan serve MODEL --tensor-parallel N` says what each needs.",
        )
