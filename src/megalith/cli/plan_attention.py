"""`megalith plan attention`: where attention on other devices or drives pays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter

from megalith.base.errors import ConfigError
from megalith.cli.number_list import whole_numbers
from megalith.cli.output import JsonFlag, print_json, result_console

if TYPE_CHECKING:
    from megalith.plan.attention import AttentionQuestion

app = App(
    name="attention",
    help="Say where attention on other devices or drives pays, by context, with the link that it needs.",
    help_format="plaintext",
)
_EXAMPLES = """\
Decode only, as many requests at once as memory holds. Every figure is
predicted. --options are those of a fleet: link=25e9/trip=66e-6/early=off;
with drives also keep=8/run=4 (SparF, which changes answers: refused unless
delta=... says what was measured, or unmeasured=true).

Examples:
  megalith plan attention llama-3.1-70b
  megalith plan attention llama-65b --device h100 --attention-device h20 --tensor-parallel 2 --counts 4
  megalith plan attention llama-3.1-70b --tpot 60 --context 8192,131072 --json
  megalith plan attention opt-13b --device a6000 --attention-device instcsd --tensor-parallel 1 --batches 1
Simulated: megalith simulate --model llama-3.1-70b --timer analytic --policy distserve
  --fleet prefill=2xh100-sxm:tp4,decode=1xh100-sxm:tp2:attention=4xh20"""
app.help_epilogue = _EXAMPLES


@Parameter(name="*", group="What to plan")
@dataclass(frozen=True)
class What:
    """Devices and contexts."""

    device: str = "h100-sxm"
    """Of the matrices, and of the fleet that it is compared with."""
    attention_device: str = "h20"
    """A device, or a drive (instcsd, nvme-gen4 with --options at=home)."""
    context: str = "1024,4096,16384,65536,131072"
    """Tokens behind a request in the mean, separated by commas."""
    tensor_parallel: str = "1,2,4,8"
    """Model devices of an instance that are tried."""
    counts: str = "1,2,4,8"
    """Attention devices of an instance that are tried."""
    batches: str = "1,2"
    """Batches in rotation that are tried; n take n - 1 replicas of the model."""
    options: str = ""
    """Of the attention: link=25e9/trip=66e-6."""
    tpot: float | None = None
    """Milliseconds that a step may take."""
    requests: int = 100_000
    """Most at once on an instance."""
    weight_format: Annotated[str, Parameter(name="--format")] = "bf16"
    """Weights: bf16, fp8, int4, ..."""


@app.default
def attention(model: str, /, what: What | None = None, *, json: JsonFlag = False) -> int:
    """Print the best deployments of MODEL by context."""
    from megalith.plan import attention_explain
    from megalith.plan.attention import plan_attention

    plan = plan_attention(_question(model, what or What()))
    if json:
        print_json(plan)
        return 0
    console = result_console()
    console.print(attention_explain.headline(plan), soft_wrap=True)
    console.print(attention_explain.attention_table(plan).to_rich())
    return 0


def _question(model: str, what: What) -> AttentionQuestion:
    from megalith.plan.attention import AttentionQuestion
    from megalith.plan.source import resolve
    from megalith.specs import catalog

    return AttentionQuestion(
        spec=resolve(model).spec, device=catalog.device(what.device).name, attention_device=what.attention_device,
        contexts=_numbers("--context", what.context),
        tensor_parallel=_numbers("--tensor-parallel", what.tensor_parallel),
        counts=_numbers("--counts", what.counts), batches=_numbers("--batches", what.batches), options=what.options,
        weight_format=what.weight_format, tpot_ms=what.tpot, most_requests=what.requests,
    )  # fmt: skip


def _numbers(flag: str, text: str) -> tuple[int, ...]:
    found = whole_numbers(flag, text, f"{flag} 1,2,4")
    if min(found) < 1:
        raise ConfigError(f"{flag} {text} has a number below 1.")
    return found
