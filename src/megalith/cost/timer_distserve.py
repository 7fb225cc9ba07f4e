"""The step times of DistServe's simulator: fitted lines by model, engine and tensor parallel degree, cut into stages.

    prompts   (a + b * tokens + c * sum of squares) / stages + 1 ms * stages      in every stage
    decodes   (a + b * tokens in the cache + c * decodes) / stages                in every stage
    overhead  2 ms + 0.0001 ms for every token that a step's requests have        in the first stage

After simdistserve (Zhong et al., OSDI 2024; estimators/time_estimator.py and base/worker.py of LLMServe/DistServe),
which has two such sets: `distserve`, its own engine, and `vllm`, the one that it was compared with. From 95 decodes on
they have other terms. A step with prompts and decodes, which neither engine had, costs what LinearTimer says: all
tokens of both, and the larger fixed part once. Knows tables by name; knows no cluster and no policy.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias

from megalith.base.config import Config
from megalith.base.errors import ConfigError
from megalith.cost.timer import Line, Prompt
from megalith.cost.timer_linear import DecodeTerms, LinearTimer, PromptTerms
from megalith.cost.timer_phases import POWER_EXPONENT, DeviceTimer, PhasePower
from megalith.cost.timer_published import in_ps
from megalith.specs import catalog

DistServeEngine: TypeAlias = Literal["distserve", "vllm"]
ENGINES: tuple[DistServeEngine, ...] = ("distserve", "vllm")
STAGE_MS = 1.0
"""Of every stage of a prompt step, times the stages (pp_const)."""
OVERHEAD_MS, OVERHEAD_TOKEN_MS = 2.0, 1e-4
"""Of every step: add_ray_overhead."""


class DistServeTable(Config, kw_only=True):
    """Fitted terms of one model on one engine, in milliseconds."""

    engine: DistServeEngine
    model: str
    """Catalogue name."""
    device: str
    """Catalogue name."""
    tensor_parallel: int
    prompt_ms: tuple[float, float, float]
    """Fixed, per token, per square of a prompt's length."""
    decode_ms: tuple[float, float, float]
    """Fixed, per token of context, per decode."""
    large_decode_ms: tuple[float, float, float]
    """The same from `large_from` decodes on."""
    large_from: int
    source: str
    date: str

    def timer(self, stages: int = 1) -> DeviceTimer:
        """The timer of one instance, in a pipeline of so many stages."""
        first, later = self._stage(stages, True), self._stage(stages, False)
        return first if stages == 1 else StagedLinear(first, later, stages)

    def _stage(self, stages: int, first: bool) -> LinearTimer:
        fixed_ms, token_ms = (OVERHEAD_MS, OVERHEAD_TOKEN_MS) if first else (0.0, 0.0)
        fixed, each, square = (term / stages for term in self.prompt_ms)

        def decodes(terms: tuple[float, float, float]) -> DecodeTerms:
            base, context, decode = (term / stages for term in terms)
            return DecodeTerms(in_ps(base), in_ps(decode), in_ps(context + token_ms))

        return LinearTimer(
            PromptTerms(in_ps(fixed + STAGE_MS * stages), in_ps(each + token_ms), in_ps(square)),
            decodes(self.decode_ms), in_ps(fixed_ms), [(self.large_from, decodes(self.large_decode_ms))],
        )  # fmt: skip


class DistServeKv(Config, kw_only=True):
    """What instances of one model hold, as published."""

    device: str
    tokens: tuple[tuple[int, int, int], ...]
    """(tensor parallel, pipeline parallel, tokens)."""
    source: str
    date: str


class StagedLinear:
    """A pipeline of linear stages, of which the first is different; see StagedTimer and DeviceTimer."""

    def __init__(self, first: LinearTimer, later: LinearTimer, stages: int) -> None:
        self._first, self._later, self._stages = first, later, stages

    def step_ps(self, prompts: Sequence[Prompt], decodes: int, context_sum: int, context_max: int) -> int:
        """See StepTimer."""
        return sum(self.stages_ps(prompts, decodes, context_sum, context_max))

    def stages_ps(self, prompts: Sequence[Prompt], decodes: int, context_sum: int, context_max: int) -> tuple[int, ...]:
        """See StagedTimer."""
        later = self._later.step_ps(prompts, decodes, context_sum, context_max)
        return (self._first.step_ps(prompts, decodes, context_sum, context_max), *[later] * (self._stages - 1))

    def decode_line(self, decodes: int, context_sum: int, context_max: int) -> Line:
        """See StepTimer: of all stages together."""
        first = self._first.decode_line(decodes, context_sum, context_max)
        later = self._later.decode_line(decodes, context_sum, context_max)
        rest = self._stages - 1
        return Line(first.first_ps + rest * later.first_ps, first.slope_ps + rest * later.slope_ps, first.steps)

    def scaled(self, factor: float) -> StagedLinear:
        """See DeviceTimer."""
        return StagedLinear(self._first.scaled(factor), self._later.scaled(factor), self._stages)

    def at_clock(self, fraction: float) -> StagedLinear:
        """See DeviceTimer."""
        return StagedLinear(self._first.at_clock(fraction), self._later.at_clock(fraction), self._stages)

    def power_w(self, exponent: float = POWER_EXPONENT) -> PhasePower:
        """See DeviceTimer. Raises ConfigError: nobody published what these draw."""
        return self._first.power_w(exponent)


@functools.cache
def distserve_tables() -> Mapping[str, DistServeTable]:
    """Every table of the catalogue by its name, such as "vllm/opt-13b/tp1"."""
    return catalog.entries("timers", "distserve", DistServeTable)


@functools.cache
def _capacities() -> Mapping[str, DistServeKv]:
    return catalog.entries("timers", "distserve_kv", DistServeKv)


def distserve_for(
    model: str, device: str, tensor_parallel: int, pipeline_parallel: int, engine: str
) -> tuple[DeviceTimer, str, int | None]:
    """(timer, where it is from, KV tokens where they were published) of these catalogue names.

    Raises ConfigError with what there is.
    """
    known = engine or ENGINES[0]
    if known not in ENGINES:
        raise ConfigError(f"distserve timers know no engine {engine!r}.", f"Known: {', '.join(ENGINES)}.")
    for table in distserve_tables().values():
        same = (table.engine, table.model, table.device) == (known, model, device)
        if same and table.tensor_parallel == tensor_parallel:
            held = {row[:2]: row[2] for row in _capacities()[model].tokens}
            source = f"DistServe's simulator, engine {known}, its dispatch overhead included: {table.source}"
            return table.timer(pipeline_parallel), source, held.get((tensor_parallel, pipeline_parallel))
    raise ConfigError(
        f"DistServe's simulator has no {model} on {device} with tensor parallel {tensor_parallel} and the engine "
        f"{known}.",
        f"It has: {', '.join(distserve_tables())}.",
    )
