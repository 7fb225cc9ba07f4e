"""The step times of Vidur: polynomials over measured operators of one layer, added up layer by layer.

    n = tokens of the step, rounded up to 8
    layer = pre and post projection + rope + cache save + attention of decodes + attention of prompts + norm
            + up, act and down projection + norm + add + 2 x (all-reduce(n) + launch)
    attention of decodes (b, c): b decodes with c known tokens on average, rounded up to 64; x 1.1 for more than one
    attention of prompts (c, s): c = sum of contexts, each rounded up to 64; s = sum of squares of new tokens, its root
            rounded to whole tokens; x 1.1 for more than one prompt
    stage = layers / pipeline x layer, plus send/recv(n) unless it is the last stage

After Vidur (Agrawal et al., MLSys 2024; its predictor at commit 7d47513 with grouped-query attention and without host
overhead, as it is by default). Embedding and head cost nothing there; all-reduce and launch count where tensor parallel
is above 1. Vidur stops where a step leaves the range for which it predicts (4,096 tokens, 128 decodes); here the
polynomial goes on. Durations are whole picoseconds. For step_ps a row of one token behind a context is a decode.
The polynomials come from `vidur_fit`. Knows no cluster and no policy.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from math import isqrt
from typing import Protocol, TypeAlias, runtime_checkable

from megalith.base.config import Config
from megalith.base.errors import ConfigError
from megalith.cost.timer import Line, Prompt, StepTimer
from megalith.cost.timer_phases import (
    POWER_EXPONENT,
    PhasePower,
    check_clock,
    check_factor,
    memory_slowdown,
    quick_line,
)
from megalith.specs import catalog

Polynomial: TypeAlias = tuple[tuple[int, int, float], ...]
"""Terms (power of x, power of y, factor); milliseconds."""

TOKEN_OPERATORS = (
    "attn_pre_proj", "attn_post_proj", "attn_rope", "attn_kv_cache_save", "input_layernorm",
    "mlp_up_proj", "mlp_act", "mlp_down_proj", "post_attention_layernorm", "add",
)  # fmt: skip
"""Operators of a layer whose time depends on the tokens of the step only."""
_PS_PER_MS = 1_000_000_000
_ROUND_TOKENS, _ROUND_CONTEXT = 8, 64


@runtime_checkable
class StagedTimer(StepTimer, Protocol):
    """A timer of a pipeline: it also says how long each stage takes. step_ps is their sum."""

    def stages_ps(self, prompts: Sequence[Prompt], decodes: int, context_sum: int, context_max: int) -> tuple[int, ...]:
        """Duration of each stage, in order, in picoseconds; what it takes to send on is in the stage that sends.

        Other than for step_ps, all decodes are counted in `decodes`: a row of one token is the end of a prompt.
        """
        ...


class VidurModel(Config, kw_only=True):
    """One model on one kind of device and network: what `vidur_fit` learnt from measured operators."""

    model: str
    """Catalogue name."""
    device: str
    """Catalogue name."""
    network: str
    tensor_parallel: int
    layers: int
    operators: dict[str, Polynomial]
    """By name: those of TOKEN_OPERATORS, `all_reduce` and `send_recv` in tokens; `attn_decode` in decodes and known
    tokens; `attn_prefill` in context tokens and squared new tokens."""
    launch_ms: float = 0.02
    """Host time of one collective."""
    batching: float = 0.1
    """What attention over more than one request costs on top, as a fraction (grouped-query attention)."""

    def timer(self, pipeline_parallel: int = 1) -> VidurTimer:
        """The timer of this model in a pipeline of so many stages."""
        return VidurTimer(self, pipeline_parallel)


class VidurTimer:
    """See the module, StepTimer and StagedTimer. What was computed once is kept: a run meets few sizes."""

    def __init__(self, model: VidurModel, pipeline_parallel: int = 1) -> None:
        """Raises ConfigError unless the layers can be cut into so many equal stages and all operators are there."""
        if pipeline_parallel < 1 or model.layers % pipeline_parallel:
            raise ConfigError(f"{model.layers} layers cannot be cut into {pipeline_parallel} equal stages.")
        needed = {*TOKEN_OPERATORS, "attn_decode", "attn_prefill"}
        needed |= {"all_reduce"} if model.tensor_parallel > 1 else set()
        needed |= {"send_recv"} if pipeline_parallel > 1 else set()
        if missing := sorted(needed - model.operators.keys()):
            raise ConfigError(f"{model.model} on {model.device} lacks the operators {', '.join(missing)}.")
        self.model = model
        self.pipeline_parallel = pipeline_parallel
        self._nominal, self._factor, self._clock = self, 1.0, 1.0
        self._slowdown: tuple[float, float] | None = None
        """Factors on steps with prompts and on steps of decodes alone, unless both are 1."""
        self._layers = model.layers // pipeline_parallel
        self._tokens: dict[int, tuple[int, int]] = {}
        self._decodes: dict[tuple[int, int], int] = {}
        self._prompts: dict[tuple[int, int, bool], int] = {}

    def step_ps(self, prompts: Sequence[Prompt], decodes: int, context_sum: int, context_max: int) -> int:  # noqa: ARG002
        """See StepTimer: the sum of the stages."""
        rows = []
        for row in prompts:
            if row.new_tokens == 1 and row.context_tokens:
                decodes += 1
                context_sum += row.context_tokens
            else:
                rows.append(row)
        stage, hop = self._stage(rows, decodes, context_sum)
        return self.pipeline_parallel * (stage + hop) - hop

    def stages_ps(self, prompts: Sequence[Prompt], decodes: int, context_sum: int, context_max: int) -> tuple[int, ...]:  # noqa: ARG002
        """See StagedTimer."""
        stage, hop = self._stage(prompts, decodes, context_sum)
        return (stage + hop,) * (self.pipeline_parallel - 1) + (stage,)

    def parts_ps(
        self,
        prompts: Sequence[Prompt],
        decodes: int,
        context_sum: int,
        context_max: int,  # noqa: ARG002
    ) -> tuple[tuple[int, ...], int]:
        """See SendingTimer."""
        stage, hop = self._stage(prompts, decodes, context_sum)
        return (stage,) * self.pipeline_parallel, hop

    def decode_line(self, decodes: int, context_sum: int, context_max: int) -> Line:
        """See StepTimer: the same until the average of known tokens passes a multiple of 64."""
        average = (context_sum + decodes) // decodes
        steps = -average % _ROUND_CONTEXT + 1
        return quick_line((self.step_ps((), decodes, context_sum, context_max), 0, steps))

    def scaled(self, factor: float) -> VidurTimer:
        """See DeviceTimer."""
        return self._nominal._slower(self._factor * check_factor(factor), self._clock)

    def at_clock(self, fraction: float) -> VidurTimer:
        """See DeviceTimer: steps with prompts count as compute, steps of decodes alone as memory."""
        return self._nominal._slower(self._factor, check_clock(fraction))

    def power_w(self, exponent: float = POWER_EXPONENT) -> PhasePower:  # noqa: ARG002
        """See DeviceTimer. Raises ConfigError: Vidur has no power figures."""
        raise ConfigError("Vidur's tables have no power figures.", "Use a timer that has, such as `analytic`.")

    def _slower(self, factor: float, clock: float) -> VidurTimer:
        timer = VidurTimer(self.model, self.pipeline_parallel)
        timer._nominal, timer._factor, timer._clock = self, factor, clock
        timer._slowdown = (factor / clock, factor * memory_slowdown(clock))
        return timer

    def _stage(self, prompts: Sequence[Prompt], decodes: int, context_sum: int) -> tuple[int, int]:
        """(picoseconds of one stage, picoseconds to send on)."""
        tokens = contexts = squares = 0
        for new, context, _ in prompts:
            tokens += new
            contexts += _up(context, _ROUND_CONTEXT)
            squares += new * new
        size = _up(tokens + decodes, _ROUND_TOKENS)
        found = self._tokens.get(size)
        if found is None:
            found = self._tokens[size] = self._token_times(size)
        stage, hop = found
        if decodes:
            stage += self._attention_of_decodes(decodes, _up((context_sum + decodes) // decodes, _ROUND_CONTEXT))
        if prompts:
            stage += self._attention_of_prompts(contexts, squares, len(prompts) > 1)
        if self._slowdown is not None:
            factor = self._slowdown[0 if prompts else 1]
            return round(stage * factor), round(hop * factor)
        return stage, hop

    def _token_times(self, size: int) -> tuple[int, int]:
        operators, model = self.model.operators, self.model
        layer = sum([_value(operators[name], size) for name in TOKEN_OPERATORS])
        if model.tensor_parallel > 1:
            layer += 2 * (_value(operators["all_reduce"], size) + model.launch_ms)
        hop = _value(operators["send_recv"], size) if self.pipeline_parallel > 1 else 0.0
        return self._ps(layer, f"{size} tokens"), round(hop * _PS_PER_MS)

    def _attention_of_decodes(self, decodes: int, known: int) -> int:
        found = self._decodes.get((decodes, known))
        if found is None:
            factor = 1.0 + self.model.batching * (decodes > 1)
            time_ms = _value(self.model.operators["attn_decode"], decodes, known) * factor
            found = self._decodes[decodes, known] = round(time_ms * self._layers * _PS_PER_MS)
        return found

    def _attention_of_prompts(self, contexts: int, squares: int, several: bool) -> int:
        key = (contexts, squares, several)
        found = self._prompts.get(key)
        if found is None:
            root = isqrt(squares)
            root += squares - root * root > root  # rounded to the nearest
            factor = 1.0 + self.model.batching * several
            time_ms = _value(self.model.operators["attn_prefill"], contexts, root * root) * factor
            found = self._prompts[key] = round(time_ms * self._layers * _PS_PER_MS)
        return found

    def _ps(self, layer_ms: float, what: str) -> int:
        if layer_ms <= 0.0:
            raise ConfigError(f"The fit of {self.model.model} gives {layer_ms:.6f} ms for a layer of {what}.")
        return round(layer_ms * self._layers * _PS_PER_MS)


def _up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def _value(terms: Polynomial, x: float, y: float = 1.0) -> float:
    """Of a polynomial; only additions and multiplications, so the same on every machine."""
    total = 0.0
    for x_power, y_power, factor in terms:
        term = factor
        for _ in range(x_power):
            term *= x
        for _ in range(y_power):
            term *= y
        total += term
    return total


@functools.cache
def vidur_models() -> Mapping[str, VidurModel]:
    """Every fitted model of the catalogue by its name, such as "llama-2-70b/a100/a100_dgx/tp2"."""
    return catalog.entries("timers", "vidur", VidurModel)


def vidur(name: str) -> VidurModel:
    """The fitted model of that name. Raises ConfigError with the nearest names."""
    return catalog.named(name, vidur_models(), "Vidur model")


def vidur_for(model: str, device: str, tensor_parallel: int, network: str = "") -> VidurModel:
    """The fitted model for these catalogue names, on its first network unless one is named. Raises ConfigError."""
    for entry in vidur_models().values():
        same = (entry.model, entry.device, entry.tensor_parallel) == (model, device, tensor_parallel)
        if same and network in ("", entry.network):
            return entry
    known = ", ".join(vidur_models())
    raise ConfigError(
        f"Vidur's tables have no {model} on {device} with tensor parallel {tensor_parallel} {network}.",
        f"Known: {known}.",
    )
