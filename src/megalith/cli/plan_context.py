"""`megalith plan context`: what long contexts cost against a short one, and the ways back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, cast

from cyclopts import App, Parameter

from megalith.base.errors import ConfigError
from megalith.cli.number_list import whole_numbers
from megalith.cli.output import JsonFlag, print_json, result_console

if TYPE_CHECKING:
    from megalith.plan.context import ContextQuestion, Rates

app = App(
    name="context",
    help="Say what long contexts cost: users, prefill, decode, switching; and the ways back to a short one.",
    help_format="plaintext",
)
_EXAMPLES = """\
Every figure is predicted: by `reached` rates as `megalith plan serve` does, or
by data-sheet `peak` ones with the formulas of arXiv:2405.08944.

Examples:
  megalith plan context yi-34b-200k --device a100-80gb --context 50000,200000
  megalith plan context yi-34b-200k --device a100-80gb --rates peak --context 1000000
  megalith plan context llama-3.1-70b --device h100 --devices 4 --format fp8"""
app.help_epilogue = _EXAMPLES


@Parameter(name="*", group="What to plan")
@dataclass(frozen=True)
class What:
    """Deployment, contexts and users."""

    device: str = "a100-80gb"
    """A device of the catalogue."""
    devices: int = 1
    """Devices side by side (tensor parallel)."""
    context: str = "50000,1000000"
    """Tokens, separated by commas."""
    against: int = 4096
    """The short context."""
    new_tokens: int = 250
    """Of one answer."""
    rates: str = "reached"
    """reached or peak."""
    users: int = 20
    """Who have a session at once."""
    rounds: int = 5
    """Questions of a session."""
    think: float = 60.0
    """Seconds between them."""
    weight_format: Annotated[str, Parameter(name="--format")] = "bf16"
    """Weights: bf16, fp8, int4, ..."""


@app.default
def context(model: str, /, what: What | None = None, *, json: JsonFlag = False) -> int:
    """Print the costs of MODEL's contexts."""
    from megalith.plan import context_explain
    from megalith.plan.context import plan_context

    question = _question(model, what or What())
    plan = plan_context(question)
    if json:
        print_json(plan)
        return 0
    console = result_console()
    console.print(context_explain.headline(plan), soft_wrap=True)
    console.print(context_explain.cost_table(plan, question.new_tokens, question.session).to_rich())
    console.print(context_explain.way_table(plan, question.request.spec.num_layers).to_rich())
    return 0


def _question(model: str, what: What) -> ContextQuestion:
    from megalith.cost.long_context import Session
    from megalith.cost.profile import from_device
    from megalith.plan import fit
    from megalith.plan.context import ContextQuestion
    from megalith.plan.request import ServeRequest
    from megalith.plan.source import resolve
    from megalith.specs import catalog

    if what.rates not in ("peak", "reached"):
        raise ConfigError(f"--rates {what.rates!r} are no rates.", "Choose reached or peak.")
    if what.users < 1 or what.rounds < 1 or what.think < 0:
        raise ConfigError("--users and --rounds must be at least 1, and --think not below zero.")
    planned, device = resolve(model), catalog.device(what.device)
    profile = from_device(device, what.weight_format)
    limit, source = fit.memory_limit(None, profile.kind, profile.memory_bytes)
    request = ServeRequest(
        model=planned.name, spec=planned.spec, profile=profile,
        weights=planned.weights(profile.kind, what.weight_format), limit_bytes=limit, limit_source=source,
        context=1, devices=what.devices, rows=2048, outputs=1,
    )  # fmt: skip
    contexts = whole_numbers("--context", what.context, "50000,1000000", "tokens")
    return ContextQuestion(
        request=request, device=device, contexts=contexts, against=what.against,
        new_tokens=what.new_tokens, rates=cast("Rates", what.rates),
        session=Session(what.rounds, what.think, what.users),
    )  # fmt: skip
