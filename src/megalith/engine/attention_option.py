"""`--attention`: where decode and prompt attention run. Parsing and refusals; knows no process and no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from megalith.base.errors import ConfigError
from megalith.specs.model import ModelSpec

if TYPE_CHECKING:
    from megalith.engine.api import EngineConfig

FORMS = "here, workers:N, spread:N, storage:FOLDER or storage:FOLDER/keep=N"
MOST_WORKERS = 64


@dataclass(frozen=True, slots=True)
class AttentionOption:
    """Where attention runs. `here`: in the step. `workers`: in so many processes that own all KV, by head, or by
    request where there are fewer KV heads. `spread`: this instance and so many lenders share each request's KV.
    `storage`: in one process whose KV is a file in `folder`, dense, or reading about 1/keep of it.
    """

    place: Literal["here", "workers", "spread", "storage"] = "here"
    count: int = 1
    folder: str = ""
    keep: int = 1

    @property
    def elsewhere(self) -> bool:
        """Whether other processes take part."""
        return self.place != "here"

    @property
    def instances(self) -> int:
        """How many times one instance's KV blocks there are."""
        return self.count + 1 if self.place == "spread" else 1


def parse_attention(text: str) -> AttentionOption:
    """The option of that text. Raises ConfigError with the forms that there are."""
    if text == "here":
        return AttentionOption()
    counted = re.fullmatch(r"(workers|spread):([0-9]{1,4})", text)
    if counted is not None and 1 <= int(counted[2]) <= MOST_WORKERS:
        return AttentionOption("workers" if counted[1] == "workers" else "spread", int(counted[2]))
    if counted is not None:
        raise ConfigError(f"attention is {text!r}, but 1 to {MOST_WORKERS} processes can take part.", f"Take {FORMS}.")
    stored = re.fullmatch(r"storage:(.+?)(?:/keep=([0-9]{1,4}))?", text)
    if stored is not None and int(stored[2] or 1) >= 1:
        return AttentionOption("storage", 1, stored[1], int(stored[2] or 1))
    raise ConfigError(f"attention is {text!r}.", f"Take {FORMS}.")


def check_attention(config: EngineConfig, spec: ModelSpec) -> AttentionOption:
    """The option of this configuration. Raises ConfigError where it cannot be combined with the rest."""
    option = parse_attention(config.attention)
    if not option.elsewhere:
        return option
    if config.mode == "native":
        raise ConfigError(
            f"The native backend attends in its own step, not in {config.attention}.", "Use --mode float32 or bf16."
        )
    if config.device != "cpu":
        raise ConfigError(f"{config.attention} is for the torch runner on the CPU so far.", "Use --device cpu.")
    if config.preempt == "swap":
        raise ConfigError(f"With {config.attention} there are no host blocks to swap to.", "Use --preempt recompute.")
    if option.place == "storage" and not Path(option.folder).is_dir():
        raise ConfigError(f"storage:{option.folder} is not a folder.", "Name one that exists; its file has no name.")
    if option.keep > 1 and any(spec.layer_window(layer) is not None for layer in range(spec.num_layers)):
        raise ConfigError(
            f"{spec.name} has sliding windows, and SparF selects from whole contexts.", "Leave /keep off."
        )
    if option.keep > spec.head_dim:
        raise ConfigError(f"keep={option.keep} leaves nothing of heads of {spec.head_dim}.", "Take 8.")
    return option


def check_room(option: AttentionOption, config: EngineConfig, num_blocks: int) -> None:
    """Whether this instance holds what a step writes to. Raises ConfigError."""
    if option.place != "spread":
        return
    if config.policy != "splitfuse":
        raise ConfigError("With spread a step may not be longer than the budget.", "Use --policy splitfuse.")
    needed = blocks_written(config.token_budget, config.max_sequences, config.block_tokens)
    if needed > num_blocks:
        raise ConfigError(
            f"A step of {config.token_budget} rows and {config.max_sequences} sequences can write to {needed} blocks, "
            f"but this instance has {num_blocks}.",
            "Lower --token-budget or --max-sequences.",
        )


def blocks_written(rows: int, sequences: int, block_tokens: int) -> int:
    """Most blocks that one step can write to: whole ones, and each sequence begins and ends inside one."""
    return rows // block_tokens + 2 * min(sequences, rows)


HERE = AttentionOption()
