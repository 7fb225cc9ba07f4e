"""`megalith plan serve`: what fits, how fast, and at what power and cost, before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter

from megalith.base.units import parse_bytes, parse_duration_ns
from megalith.cli.output import JsonFlag, print_json, result_console

if TYPE_CHECKING:
    from megalith.plan.request import ServeRequest
    from megalith.specs.plan import ServePlan

app = App(
    name="plan",
    help="Say what fits, how fast and at what cost, before loading anything.",
    help_format="plaintext",
)

_EXAMPLES = """\
MODEL is a catalogue name (`megalith models` lists them), a GGUF file, a
Hugging Face directory, or a model that is installed here. DEVICE is a
catalogue name, `here` (this machine's processor) or `cuda` (its first GPU).
Every figure is predicted; [low, high] should hold the measured value in nine
cases of ten.

Examples:
  megalith plan serve smollm2                            on this machine
  megalith plan serve llama-3.1-70b --device h100        what would fit?
  megalith plan serve llama-3.1-70b --device h100 --devices 4
  megalith plan serve qwen3-8b --device l4 --format fp8 --context 16384
  megalith plan serve smollm2 --memory 256MiB --json
  megalith plan serve llama-2-70b --tensor-parallel 8 --window-blocks 2 --link 1ms/125MB"""
app.help_epilogue = _EXAMPLES
_VERBS = {
    "fleet": "Find the cheapest fleet that keeps a service level under a load.",
    "placement": "Place prefill and decode apart: degrees and instances of each, by goodput a device.",
    "platform": "Say what a platform must have for a use case, and its links.",
    "coe": "Say what many models behind one node cost: memory by tier, switch time, latency.",
    "context": "Say what long contexts cost, and the ways back to a short one.",
    "power": "Say how many servers a row's power budget carries, and what capping costs them.",
    "attention": "Say where attention on other devices or drives pays, by context.",
    "nano": "Overlap compute, memory and links inside a device, and say how far the optimum is.",
}
"""By name; each is the app of `megalith.cli.plan_NAME`."""
for _name, _help in _VERBS.items():
    app.command(f"megalith.cli.plan_{_name}:app", name=_name, help=_help)


@Parameter(name="*", group="What to plan")
@dataclass(frozen=True)
class Question:
    """The deployment in question."""

    device: str = "here"
    """Catalogue device, `here` or `cuda`."""
    devices: int = 1
    """Devices side by side (tensor parallel)."""
    memory: str | None = None
    """Memory limit of each device, such as 4GiB; by default what is free here, or 90 % of a catalogue device."""
    context: int | None = None
    """Tokens of prompt and output of each sequence; by default the model's own, at most 4096."""
    batch: int = 1
    """Sequences at once, each with its full context."""
    prompt: int | None = None
    """Prompt tokens of the TTFT prediction; by default half the context, at most 512."""
    weight_format: Annotated[str | None, Parameter(name="--format")] = None
    """Weight format: bf16, fp8, int8, q8_0, q4_1, q4_k, ...; by default as stored, else bf16."""
    kv_format: Annotated[str, Parameter(name="--kv")] = "bf16"
    """KV format: bf16, fp8 or f32."""
    peer_layers: int = 0
    """Layers that lie in the memory of a peer device and are fetched a layer ahead."""
    host_layers: int = 0
    """Layers that lie in host memory, likewise."""
    mode: str = "auto"
    """On `here`: auto (native), native, bf16 or float32."""
    tensor_parallel: int | None = None
    """Processes or small devices that the layers are cut over: memory of each, and steps (as `serve` runs it)."""
    window_blocks: int = 0
    """With --tensor-parallel: attention and FFN blocks that each keeps, the rest streams from disk. [default: all]"""
    collective: str = "star"
    """With --tensor-parallel: star or ring."""
    link: str | None = None
    """With --tensor-parallel: latency, or latency/bytes a second, such as 1ms/125MB."""
    disk: str | None = None
    """With --tensor-parallel: bytes a second of each one's disk, such as 1GB; by default what probe measured."""


@app.command(help_epilogue=_EXAMPLES)
def serve(model: str, question: Question | None = None, *, json: JsonFlag = False) -> int:
    """Print the plan of serving MODEL; exit code 1 when it does not fit."""
    if question is not None and question.tensor_parallel is not None:
        return _print_ranks(model, question, as_json=json)
    from megalith.plan.serve import plan_serve

    question = question or Question()
    request = _request(model, question)
    plan = plan_serve(request)
    if not plan.fits and question.device == "here":
        plan = _with_window(plan, request, may_shorten=question.context is None)
    if json:
        print_json(plan)
    else:
        _print(plan)
    return 0 if plan.fits or plan.window is not None else 1


def _with_window(plan: ServePlan, request: ServeRequest, *, may_shorten: bool) -> ServePlan:
    """The plan with that of streamed weights, where the limit leaves room for it; with a context of 256 if need be."""
    import msgspec

    from megalith.plan.request import SMALLEST_CONTEXT
    from megalith.plan.serve import plan_serve
    from megalith.plan.window import streaming

    streamed = streaming(request)
    if streamed is None and may_shorten and request.context > SMALLEST_CONTEXT:
        streamed = streaming(msgspec.structs.replace(request, context=SMALLEST_CONTEXT))
    return plan if streamed is None else msgspec.structs.replace(plan, window=plan_serve(streamed))


def _request(model: str, question: Question) -> ServeRequest:
    from megalith.cost.profile import RunnerKind, from_device
    from megalith.plan import fit, machine
    from megalith.plan.request import ServeRequest
    from megalith.plan.source import resolve
    from megalith.specs import catalog

    planned = resolve(model)
    number = question.weight_format or "bf16"
    if question.device == "here":
        kind: RunnerKind = "native" if question.mode in ("auto", "native") else "torch-cpu"
        profile = machine.here(kind)
    else:
        cuda = question.device.startswith("cuda")
        profile = machine.cuda_profile(number) if cuda else from_device(catalog.device(question.device), number)
    exact = question.mode == "float32" and profile.kind == "torch-cpu"
    given = None if question.memory is None else parse_bytes(question.memory)
    limit, limit_source = fit.memory_limit(given, profile.kind, profile.memory_bytes)
    return ServeRequest(
        model=planned.name, spec=planned.spec, profile=profile,
        weights=planned.weights(profile.kind, question.weight_format or ("f32" if exact else None)),
        limit_bytes=limit, limit_source=limit_source,
        context=min(planned.spec.max_context, 4096) if question.context is None else question.context,
        batch=question.batch,
        prompt_tokens=question.prompt, kv_format=question.kv_format, devices=question.devices,
        rows=256 if question.device == "here" else 2048, outputs=question.batch,
        peer_layers=question.peer_layers, host_layers=question.host_layers,
    )  # fmt: skip


def _print_ranks(model: str, question: Question, *, as_json: bool) -> int:
    """Plan a model that is cut over processes; exit code 1 when one needs more than --memory."""
    from megalith.base.errors import ConfigError
    from megalith.cost.collective import Link
    from megalith.cost.profile import from_device
    from megalith.plan import machine, tensor_parallel_explain
    from megalith.plan.source import resolve
    from megalith.plan.tensor_parallel import RanksQuestion, plan_ranks
    from megalith.specs import catalog

    if question.collective not in ("star", "ring"):
        raise ConfigError(f"There is no collective {question.collective!r}.", "Take star or ring.")
    latency, _, rate = (question.link or "0ms").partition("/")
    spec, number = resolve(model).spec, question.weight_format or "f32"
    here = question.device == "here"
    plan = plan_ranks(RanksQuestion(
        spec=spec, profile=machine.here("torch-cpu") if here else from_device(catalog.device(question.device), number),
        ranks=question.tensor_parallel or 1, window_blocks=question.window_blocks, weight_format=number,
        kv_format="f32" if question.mode == "float32" else question.kv_format,
        context=question.context or min(spec.max_context, 1024), batch=question.batch,
        collective="ring" if question.collective == "ring" else "star",
        link=Link(latency_ns=parse_duration_ns(latency), bytes_per_s=parse_bytes(rate) if rate else None),
        disk_bytes_per_s=None if question.disk is None else parse_bytes(question.disk),
    ))  # fmt: skip
    if as_json:
        print_json(plan)
    else:
        console = result_console()
        console.print(tensor_parallel_explain.memory_table(plan).to_rich())
        for line in tensor_parallel_explain.step_lines(plan):
            console.print(line, soft_wrap=True)
    limit = None if question.memory is None else parse_bytes(question.memory)
    return 0 if limit is None or plan.memory[0].num_bytes <= limit else 1


def _print(plan: ServePlan) -> None:
    from megalith.plan import explain

    console = result_console()
    for line in explain.headline(plan):
        console.print(line, soft_wrap=True)
    console.print(explain.memory_table(plan).to_rich())
    if plan.remedies:
        console.print(explain.remedy_table(plan).to_rich())
    if plan.window is None:
        console.print(explain.speed_table(plan).to_rich())
        return
    console.print()
    console.print("With weights that stream from disk in every step:", soft_wrap=True)
    _print(plan.window)
