"""How far a model on a device is from the most it could do, and how near nano-batches bring it (NanoFlow).

    optimum = F / (2 P)                     tokens a second of a device; F: FLOP/s reached, P: active weights
    class   = the longest of T_compute, T_memory, T_links of a step of B rows under a workload

Then the pipeline: sequential, nano-batches without overlap, with collectives overlapped, with attention as well. Knows
costs and pipelines; must not know how they are printed.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias

import msgspec

from megalith.base.errors import ConfigError, DoesNotFit
from megalith.cost import parameters as counting
from megalith.cost.compute import CostModel
from megalith.cost.graph import WHOLE, Moment, Op, Schedule, check, occupancy, schedule
from megalith.cost.lowering import LayerCosts, StepWork, gemm_ns, layer_costs, sequential, sequential_ps, step_power_w
from megalith.cost.memory import kv_bytes_per_token, per_device_kv_heads, per_device_weights
from megalith.cost.nano import STREAM_OF, Enough, Frame, Pipeline, cut, frame, operators, slowed_ps
from megalith.cost.nano_choice import Chosen, candidate_cuts
from megalith.cost.timer import Prompt
from megalith.cost.timer_phases import DeviceTimer
from megalith.plan.nano_search import Effort, Searched, first_stage, search

Bound: TypeAlias = Literal["compute", "memory", "links"]
SHOWN_LAYERS = 7
"""Layers that are scheduled to show one in steady state."""
MEMORY_SHARE = 0.9


class Traffic(NamedTuple):
    """What a dense batch is made of."""

    prompt_tokens: int
    output_tokens: int
    batch: int = 2048
    """Rows of a step, decodes and prompt chunks together."""


class Times(NamedTuple):
    """How long a step keeps each resource of a device busy, in nanoseconds."""

    compute_ns: float
    memory_ns: float
    link_ns: float

    @property
    def bound(self) -> Bound:
        """The longest."""
        named: dict[Bound, float] = {"compute": self.compute_ns, "memory": self.memory_ns, "links": self.link_ns}
        return max(named, key=lambda name: named[name])


class Way(msgspec.Struct, frozen=True, kw_only=True):
    """One way to run the step."""

    name: str
    step_ns: int
    tokens_per_s: float
    """Of one device."""
    share: float
    """Of the optimum."""
    gain: float
    """Over sequential."""
    power_w: float | None


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """One operator of a layer in steady state."""

    kind: str
    rows: tuple[int, int]
    share: float
    alone_ns: int
    takes_ns: int
    start_ns: int
    """From where the layer's first operator begins."""


class Shown(msgspec.Struct, frozen=True, kw_only=True):
    """One operator of the timeline, of whatever layer."""

    kind: str
    stream: str
    row: int
    """Its first."""
    start_ns: int
    end_ns: int


class Steady(NamedTuple):
    """The middle of a pipeline."""

    lines: tuple[Line, ...]
    busy: dict[str, tuple[float, float, float]]
    timeline: tuple[Shown, ...] = ()
    levels: dict[str, tuple[tuple[int, float], ...]] = {}


class NanoPlan(msgspec.Struct, frozen=True, kw_only=True):
    """The answer."""

    model: str
    device: str
    devices: int
    rows: int
    decodes: int
    context: int
    """Mean tokens in the cache of a decode."""
    limited: bool
    """The batch is smaller than asked, because the cache of so many requests does not fit."""
    flops_per_s: float
    parameters: int
    optimum: float
    """Tokens a second and device."""
    times: Times
    ways: tuple[Way, ...]
    cuts: tuple[tuple[int, ...], tuple[int, ...]]
    period_ns: int
    pipeline: tuple[Line, ...]
    busy: dict[str, tuple[float, float, float]]
    """By resource: mean of a step without nano-batches, mean with them in steady state, most at any moment."""
    timeline: tuple[Shown, ...]
    """Two periods in steady state."""
    levels: dict[str, tuple[tuple[int, float], ...]]
    """By resource: (nanosecond, how busy from then on)."""
    programs: int
    proven: int
    enough: Enough

    @property
    def gain(self) -> float:
        """Of all that overlaps, over sequential."""
        return self.ways[-1].gain


def step_of(cost: CostModel, traffic: Traffic) -> tuple[StepWork, bool]:
    """A step in steady state: of every prompt + output tokens, that many are prompt rows and that many decodes.

    Fewer rows where the cache of so many decodes does not fit; then True as well. Raises ConfigError and DoesNotFit.
    """
    prompt, output, batch = traffic
    if prompt < 0 or output < 0 or prompt + output < 1 or batch < 1:
        raise ConfigError(f"{batch} rows of prompts of {prompt} and answers of {output} cannot be.", "Give 1 or more.")
    spec, context = cost.spec, prompt + output // 2
    heads = per_device_kv_heads(spec, cost.devices) / spec.num_kv_heads
    token_bytes = kv_bytes_per_token(spec, cost.kv_format) * heads
    room = cost.profile.memory_bytes * MEMORY_SHARE - per_device_weights(cost.weights, cost.devices)
    fits = int(room / (token_bytes * max(context, 1)))
    if fits < 1:
        raise DoesNotFit(
            f"{spec.name} over {cost.devices} {cost.profile.name} leaves {max(room, 0) / 1e9:.1f} GB of each for the "
            f"cache, and one request of {context:,} tokens needs {token_bytes * context / 1e9:.1f} GB.",
            "Use more devices or shorter requests.",
        )
    decodes = min(round(batch * output / (prompt + output)), fits)
    limited = decodes < round(batch * output / (prompt + output))
    rest = round(decodes * prompt / output) if limited else batch - decodes
    chunks = [Prompt(min(prompt, rest - done), 0, done + prompt <= rest) for done in range(0, rest, max(prompt, 1))]
    return StepWork(decodes, decodes * context, tuple(chunks)), limited


def times_of(cost: CostModel, work: StepWork) -> Times:
    """Busy times of one step: multiply-adds; weights and the cache of decodes; collectives."""
    requests = [(1, work.context_sum // max(work.decodes, 1))] * work.decodes
    requests += [(prompt.new_tokens, prompt.context_tokens) for prompt in work.prompts]
    shape, rates = cost.shape(requests, outputs=0), cost.profile.rates
    key_ns = cost.kv_layer_token_bytes * rates.kv_byte_ns * per_device_kv_heads(cost.spec, cost.devices)
    memory, _ = gemm_ns(cost, work.rows)
    memory += shape.decode_tokens * key_ns / cost.spec.num_kv_heads
    return Times(float(cost.step(shape).compute_ns), memory, cost.link_ns(work.rows))


def optimum_per_s(flops_per_s: float, parameters: float) -> float:
    """Tokens a second of one device that does nothing but multiply: F / (2 P)."""
    return flops_per_s / (2.0 * parameters)


def reached_flops_per_s(cost: CostModel) -> float:
    """What products reach on many rows."""
    return 2e9 / cost.profile.rates.mac_ns


def plan_nano(
    timer: DeviceTimer,
    traffic: Traffic,
    *,
    enough: Enough = Enough(),  # noqa: B008 - a constant
    flops_per_s: float | None = None,
    effort: Effort = Effort(),  # noqa: B008
) -> NanoPlan:
    """Search the pipeline of the step that `traffic` makes. Raises ConfigError, DoesNotFit and MachineError."""
    costs = layer_costs(timer)
    work, limited = step_of(costs.cost, traffic)
    return plan_step(costs, work, limited=limited, enough=enough, flops_per_s=flops_per_s, effort=effort)


def plan_step(
    costs: LayerCosts,
    work: StepWork,
    *,
    limited: bool = False,
    enough: Enough = Enough(),  # noqa: B008 - a constant
    flops_per_s: float | None = None,
    effort: Effort = Effort(),  # noqa: B008
) -> NanoPlan:
    """The same for a given step."""
    cost = costs.cost
    flops = reached_flops_per_s(cost) if flops_per_s is None else flops_per_s
    parameters = counting.active_parameters(cost.spec)
    optimum = optimum_per_s(flops, parameters)
    stage = first_stage(costs, work, effort)
    links = search(costs, work, enough, "link", effort, stage)
    both = search(costs, work, enough, "both", effort, stage)
    steady = _steady(costs, work, both, enough)
    return NanoPlan(
        model=cost.spec.name, device=cost.profile.name, devices=cost.devices, rows=work.rows, decodes=work.decodes,
        context=work.context_sum // max(work.decodes, 1), limited=limited, flops_per_s=flops, parameters=parameters,
        optimum=optimum, times=times_of(cost, work), ways=_ways(costs, work, (links.chosen, both.chosen), optimum),
        cuts=(both.chosen.cuts.fine, both.chosen.cuts.coarse), period_ns=both.chosen.period_ps // 1000,
        pipeline=steady.lines, busy=steady.busy, timeline=steady.timeline, levels=steady.levels,
        programs=stage.programs, proven=stage.proven, enough=enough,
    )  # fmt: skip


def _ways(costs: LayerCosts, work: StepWork, found: tuple[Chosen, Chosen], optimum: float) -> tuple[Way, ...]:
    links, both = found
    rest = round(costs.rest_ps(work))
    plain = sequential_ps(costs, work)
    times = {
        "sequential": plain,
        "nano-batches, nothing overlapped": rest + unoverlapped_ps(costs, work, both),
        "collectives overlapped": rest + links.layers_ps,
        "collectives and attention overlapped": rest + min(both.layers_ps, links.layers_ps),
    }
    power = costs.cost.profile.power
    return tuple(
        Way(
            name=name, step_ns=time // 1000, tokens_per_s=work.rows / time * 1e12 / costs.cost.devices,
            share=work.rows / time * 1e12 / costs.cost.devices / optimum, gain=plain / time,
            power_w=None if power is None else step_power_w(costs, work, time),
        )
        for name, time in times.items()
    )  # fmt: skip


def unoverlapped_ps(costs: LayerCosts, work: StepWork, chosen: Chosen) -> int:
    """All layers with the chosen nano-batches one after the other; with halves where it was better not to split."""
    if chosen.pipeline is not None:
        return chosen.unoverlapped_ps
    ways = candidate_cuts(work.rows, (0.5,))
    if not ways:
        return chosen.unoverlapped_ps
    return sum(piece.duration_ps for piece in cut(costs, work, ways[0])) * costs.cost.spec.num_layers


def timeline(pipeline: Pipeline, enough: Enough, layers: int = SHOWN_LAYERS) -> tuple[list[Op], Schedule]:
    """Some layers of a pipeline in time, checked: nothing waits wrongly, and no resource is above 1."""
    ops = operators(pipeline, frame(pipeline.parts, pipeline.order, layers), enough)
    plan = schedule(ops)
    check(ops, plan)
    return ops, plan


def _steady(costs: LayerCosts, work: StepWork, found: Searched, enough: Enough) -> Steady:
    """The operators of a layer in the middle, and how busy resources are there."""
    before = _plain_busy(costs, work)
    pipeline, period = found.chosen.pipeline, found.chosen.period_ps
    if pipeline is None:
        return Steady((), {name: (mean, mean, 1.0) for name, mean in before.items()})
    shape = frame(pipeline.parts, pipeline.order, SHOWN_LAYERS)
    ops, plan = timeline(pipeline, enough)
    middle = SHOWN_LAYERS // 2
    begin = min(start for start, layer in zip(plan.start_ps, shape.layers, strict=True) if layer == middle)
    window, two = (begin, begin + period), (begin, begin + 2 * period)
    busy, levels = {}, {}
    for name, mean in before.items():
        moments = occupancy(ops, plan, name)
        busy[name] = (mean, _mean(moments, window), max((moment.value for moment in moments), default=0.0))
        levels[name] = tuple(
            (max(moment.start_ps - begin, 0) // 1000, moment.value) for moment in moments
            if moment.end_ps > two[0] and moment.start_ps < two[1]
        )  # fmt: skip
    shown = tuple(
        Shown(
            kind=pipeline.parts[number].kind, stream=STREAM_OF[pipeline.parts[number].kind],
            row=pipeline.parts[number].rows[0], start_ns=(start - begin) // 1000, end_ns=(end - begin) // 1000,
        )
        for number, start, end in zip(shape.pieces, plan.start_ps, plan.end_ps, strict=True)
        if end > two[0] and start < two[1]
    )  # fmt: skip
    return Steady(_lines(pipeline, shape, plan, middle, enough), busy, shown, levels)


def _lines(pipeline: Pipeline, shape: Frame, plan: Schedule, layer: int, enough: Enough) -> tuple[Line, ...]:
    times = slowed_ps(pipeline, enough)
    here = {piece: at for at, piece in enumerate(shape.pieces) if shape.layers[at] == layer}
    begin = min(plan.start_ps[at] for at in here.values())
    lines = [
        Line(
            kind=piece.kind, rows=piece.rows, share=pipeline.shares[number] / WHOLE,
            alone_ns=piece.duration_ps // 1000, takes_ns=times[number] // 1000,
            start_ns=(plan.start_ps[here[number]] - begin) // 1000,
        )
        for number, piece in enumerate(pipeline.parts)
    ]  # fmt: skip
    return tuple(sorted(lines, key=lambda line: line.start_ns))


def _plain_busy(costs: LayerCosts, work: StepWork) -> dict[str, float]:
    layer = sequential(costs, work)
    whole = sum(piece.duration_ps for piece in layer)
    sums = {name: sum(getattr(piece, f"{name}_ps") for piece in layer) for name in ("compute", "memory", "link")}
    return {name: total / whole for name, total in sums.items()}


def _mean(moments: list[Moment], window: tuple[int, int]) -> float:
    total = sum(
        moment.value * max(0, min(moment.end_ps, window[1]) - max(moment.start_ps, window[0])) for moment in moments
    )
    return total / (window[1] - window[0])
