"""`--neuron-window`: neurons of a ReLU model that come from disk when they may fire. Parsing, refusals and bytes.

Knows no torch; what runs is in `engine/sparse_ffn.py`, imported when it is opened.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from megalith.base.errors import ConfigError
from megalith.base.units import parse_bytes
from megalith.cost.memory import WeightBytes
from megalith.cost.parameters import expert_weights
from megalith.engine.neuron_file import ITEM_BYTES, check_sparse
from megalith.model.open import OpenModel
from megalith.plan.source import PlannedModel
from megalith.specs.model import ModelSpec

if TYPE_CHECKING:
    from megalith.engine.api import EngineConfig
    from megalith.engine.sparse_ffn import SparseNeurons

FORM = "TOKENS, TOKENS/memory=SIZE or TOKENS/sigmas=S, such as 5/memory=256MiB"
SHARE = 0.1
"""Of the FFN's bytes, that the window may take where nobody says how much."""
_TEXT = re.compile(r"([0-9]{1,6})(?:/memory=([0-9A-Za-z.]+))?(?:/sigmas=([0-9.]+))?")


@dataclass(frozen=True, slots=True)
class NeuronOption:
    """Neurons of the last `tokens` tokens stay, in `memory_bytes` (None: SHARE of the FFN). `sigmas` None: exact."""

    tokens: int
    memory_bytes: int | None = None
    sigmas: float | None = None

    def window_bytes(self, spec: ModelSpec) -> int:
        """Of memory that neurons may take."""
        if self.memory_bytes is not None:
            return self.memory_bytes
        return int(SHARE * ITEM_BYTES["F32"] * spec.num_layers * expert_weights(spec))


def parse_neurons(text: str) -> NeuronOption | None:
    """The option of that text, None for none. Raises ConfigError with the form."""
    if not text:
        return None
    found = _TEXT.fullmatch(text)
    if found is None:
        raise ConfigError(f"neuron_window is {text!r}.", f"Take {FORM}.")
    try:
        sigmas = None if found[3] is None else float(found[3])
    except ValueError:
        raise ConfigError(f"neuron_window is {text!r}.", f"Take {FORM}.") from None
    return NeuronOption(int(found[1]), None if found[2] is None else parse_bytes(found[2]), sigmas)


def check_neurons(config: EngineConfig, spec: ModelSpec) -> NeuronOption | None:
    """The option of this configuration. Raises ConfigError where it cannot be combined with the rest."""
    option = parse_neurons(config.neuron_window)
    if option is None:
        return None
    check_sparse(spec)
    if config.device != "cpu":
        raise ConfigError("A window of neurons is for the torch runner on the CPU so far.", "Use --device cpu.")
    if config.mode == "native":
        raise ConfigError(
            "The native backend has no window of neurons; it streams whole layers.", "Use --mode float32 or bf16."
        )
    return option


@dataclass(frozen=True, slots=True)
class _Windowed(PlannedModel):
    """A model whose FFN is on disk, but for a window and the 8-bit copy of gate."""

    window_bytes: int

    def weights(self, kind: str, name: str | None) -> WeightBytes:
        whole = PlannedModel.weights(self, kind, name)
        spec = self.spec
        ffn = spec.num_layers * expert_weights(spec)
        attention = whole.layers - round(whole.layers * ffn / (ffn + _attention(spec)))
        gate = spec.num_layers * spec.ffn * (spec.hidden + 10)
        # The neurons of one layer are gathered, widened, to be multiplied with.
        gathered = 2 * self.window_bytes // spec.num_layers
        return msgspec.structs.replace(
            whole, layers=attention + gate + self.window_bytes + gathered,
            source=f"{whole.source}; neurons on disk, a window of {self.window_bytes:,} B of them and an 8-bit gate",
        )  # fmt: skip


def _attention(spec: ModelSpec) -> int:
    """Elements of the matrices of attention in all layers."""
    return spec.num_layers * spec.hidden * spec.head_dim * 2 * (spec.num_heads + spec.num_kv_heads)


def planned(model: PlannedModel, option: NeuronOption | None) -> PlannedModel:
    """The model as the planner shall see it."""
    if option is None:
        return model
    return _Windowed(model.name, model.spec, model.stored, model.origin, option.window_bytes(model.spec))


def open_neurons(
    model: OpenModel, option: NeuronOption | None, progress: Callable[[str], None] | None = None
) -> SparseNeurons | None:
    """The neurons of `model` on disk, in a file that is made first where there is none; None without the option."""
    if option is None:
        return None
    from megalith.engine.neuron_file import NeuronFile, ensure_neurons, neuron_path
    from megalith.engine.neuron_store import NeuronStore
    from megalith.engine.sparse_ffn import SparseNeurons

    path = ensure_neurons(neuron_path(model.files.path), model.spec, model.checkpoint, progress=progress)
    store = NeuronStore(NeuronFile(path), option.tokens, option.window_bytes(model.spec))
    return SparseNeurons(store, sigmas=option.sigmas)
