"""`megalith plan platform`: the memory, compute, bandwidth and links that a use case asks of a platform."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter

from megalith.base.errors import ConfigError
from megalith.cli.output import JsonFlag, print_json, result_console

if TYPE_CHECKING:
    from megalith.plan.platform import PlatformQuestion
    from megalith.specs.use_case import UseCase

app = App(
    name="platform",
    help="Say what a platform must have for a use case: memory, compute, bandwidth, links.",
    help_format="plaintext",
)
_EXAMPLES = """\
MODEL is what `megalith plan serve` takes, or a model that nobody has made yet:
`dense:100T` and `moe:200T` have the proportions of published hypothetical
ones. Use cases: qa, chat, rag, summary, code; lengths and limits may be given
instead. Every figure is predicted, for reached rates.

Examples:
  megalith plan platform llama-3.1-70b --use-case chat
  megalith plan platform llama-3.1-405b --use-case rag --devices 8 --device h100
  megalith plan platform dense:100T --use-case qa --format fp8
  megalith plan platform qwen3-32b --prompt 8000 --output 500 --slo ttft=1s,tpot=30ms"""
app.help_epilogue = _EXAMPLES


@Parameter(name="*", group="What to plan")
@dataclass(frozen=True)
class What:
    """The use case and the cut."""

    use_case: str | None = None
    """qa, chat, rag, summary or code; by default chat."""
    prompt: int | None = None
    """Prompt tokens, instead of the use case's."""
    output: int | None = None
    """Answer tokens, instead of the use case's."""
    beams: int | None = None
    """Answers to one prompt side by side, instead of the use case's."""
    slo: str | None = None
    """Limits such as ttft=200ms,tpot=10ms, instead of the use case's."""
    batch: int = 1
    """Requests at once."""
    devices: int = 1
    """Devices that share every layer: their links are then part of the answer."""
    link_share: float = 0.2
    """Part of each limit that collectives may take."""
    link_latency_ns: float = 500.0
    """Of one hop between neighbours."""
    device: tuple[str, ...] = ()
    """A device of the catalogue to count. Give it once for each; by default the twelve that need fewest."""
    weight_format: Annotated[str, Parameter(name="--format")] = "bf16"
    """Weights: bf16, fp8, int4, ..."""
    kv_format: Annotated[str, Parameter(name="--kv")] = "bf16"
    """KV cache: bf16 or fp8."""


@app.default
def platform(model: str, /, what: What | None = None, *, json: JsonFlag = False) -> int:
    """Print what MODEL needs."""
    from megalith.plan import platform_explain
    from megalith.plan.platform import device_counts, plan_platform
    from megalith.specs import catalog

    what = what or What()
    question = _question(model, what)
    plan = plan_platform(question)
    devices = [catalog.device(name) for name in what.device] or list(catalog.devices().values())
    counts = device_counts(plan, what.weight_format, devices)
    if json:
        print_json({"plan": plan, "memory_bytes": plan.memory_bytes, "devices": counts})
        return 0
    console = result_console()
    for line in platform_explain.headline(plan):
        console.print(line, soft_wrap=True)
    console.print(platform_explain.need_table(plan, question).to_rich())
    console.print(platform_explain.count_table(counts, every=bool(what.device)).to_rich())
    return 0


def _question(model: str, what: What) -> PlatformQuestion:
    from megalith.plan.platform import PlatformQuestion
    from megalith.plan.source import resolve

    return PlatformQuestion(
        spec=resolve(model).spec, use_case=_use_case(what), weight_format=what.weight_format, kv_format=what.kv_format,
        batch=what.batch, devices=what.devices, link_share=what.link_share, link_latency_ns=what.link_latency_ns,
    )  # fmt: skip


def _use_case(what: What) -> UseCase:
    """The named use case with what was given instead. Raises ConfigError."""
    import msgspec

    from megalith.specs.slo import parse_slo
    from megalith.specs.use_case import use_case

    base = use_case(what.use_case or "chat")
    given: dict[str, str | int | float] = {
        key: value
        for key, value in (("prompt_tokens", what.prompt), ("output_tokens", what.output), ("beams", what.beams))
        if value is not None
    }
    for bound in parse_slo(what.slo).bounds if what.slo else ():
        if bound.limit_ns is None or bound.metric not in ("ttft", "tpot"):
            raise ConfigError(f"{bound} says nothing of a platform.", "Give times: --slo ttft=200ms,tpot=10ms.")
        given[f"{bound.metric}_ms"] = bound.limit_ns / 1e6
    if given and what.use_case is None:
        given["title"] = "given lengths and limits"
    return msgspec.structs.replace(base, **given)
