"""`--kv-format`: what it may be combined with. Knows no torch; the cache is in `engine/block_float_kv.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megalith.base.errors import ConfigError
from megalith.specs.kv_format import KvFormat, parse_kv_format
from megalith.specs.model import ModelSpec

if TYPE_CHECKING:
    from megalith.engine.api import EngineConfig


def check_kv(config: EngineConfig, spec: ModelSpec) -> KvFormat | None:
    """The format of this configuration. Raises ConfigError where it cannot be combined with the rest."""
    form = parse_kv_format(config.kv_format)
    if form is None:
        return None
    form.token_bytes(spec)
    if config.mode == "native":
        raise ConfigError("The native backend has KV in bfloat16 only.", "Use --mode float32 or bf16.")
    if config.device != "cpu":
        raise ConfigError("Block floating point KV is for the torch runner on the CPU so far.", "Use --device cpu.")
    if config.attention != "here" or config.tensor_parallel > 1 or config.window_blocks:
        raise ConfigError(
            f"{config.kv_format} is for KV in this process alone.", "Use --attention here and --tensor-parallel 1."
        )
    if not form.reorder:
        return form
    if spec.qk_norm:
        raise ConfigError(
            f"{spec.name} norms q and k with weights that all heads share, so that heads cannot have orders of their "
            "own.",
            "Leave `reorder` away.",
        )
    if config.window or config.expert_cache or config.neuron_window or config.weights == "window":
        raise ConfigError("`reorder` calibrates with all weights in memory.", "Leave the window away, or `reorder`.")
    return form
