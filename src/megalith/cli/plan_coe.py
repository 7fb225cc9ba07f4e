"""`megalith plan coe`: many models behind one node: footprint by tier, switch time, latency of a request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, cast

from cyclopts import App, Parameter

from megalith.base.errors import ConfigError
from megalith.cli.output import JsonFlag, print_json, result_console

if TYPE_CHECKING:
    from megalith.plan.experts import ExpertsQuestion, Fusion

app = App(
    name="coe",
    help="Say what many models behind one node cost: memory by tier, switch time, latency.",
    help_format="plaintext",
)
_EXAMPLES = """\
A composition of experts: every request is answered by one of many models of
one shape, which a router names; a model that is not in device memory is
copied there first. Nodes: sn40l-node, dgx-a100, dgx-h100 (profiles, published
figures). Every figure is predicted.

Examples:
  megalith plan coe llama-2-7b --experts 150
  megalith plan coe llama-2-7b --experts 150 --node dgx-h100 --batch 8 --zipf 1
  megalith plan coe llama-3.1-8b --experts 300 --node sn40l-node --output 200"""
app.help_epilogue = _EXAMPLES


@Parameter(name="*", group="What to plan")
@dataclass(frozen=True)
class What:
    """Models, nodes and the request."""

    experts: int = 150
    """Models."""
    node: tuple[str, ...] = ()
    """A node of the catalogue. Give it once for each; by default all."""
    prompt: int = 512
    """Prompt tokens of a request."""
    output: int = 20
    """Answer tokens of a request."""
    batch: int = 1
    """Requests at once; they are grouped by model."""
    zipf: float = 0.0
    """Popularity falls as rank**-zipf; 0 is uniform."""
    router: bool = True
    """A model of the same size reads each prompt first and stays on the device."""
    all_links: bool = False
    """Let every link of a node carry its share of a switch, at its rating."""
    fusion: str = "profile"
    """profile, ideal (only weights, KV and products take time) or kernels."""
    weight_format: Annotated[str, Parameter(name="--format")] = "bf16"
    """Weights: bf16, fp8, int4, ..."""


@app.default
def coe(model: str, /, what: What | None = None, *, json: JsonFlag = False) -> int:
    """Print what many models of the shape of MODEL cost on each node."""
    from megalith.plan import experts_explain
    from megalith.plan.experts import plan_experts
    from megalith.specs.node import nodes

    what = what or What()
    plans = {name: plan_experts(_question(model, what, name)) for name in what.node or nodes()}
    if json:
        print_json({"nature": "predicted", "plans": plans})
        return 0
    console = result_console()
    first = next(iter(plans))
    console.print(experts_explain.headline(plans[first], _question(model, what, first)), soft_wrap=True)
    for table in (
        experts_explain.tier_table(plans), experts_explain.latency_table(plans), experts_explain.hit_table(plans),
    ):  # fmt: skip
        console.print(table.to_rich())
    return 0


def _question(model: str, what: What, name: str) -> ExpertsQuestion:
    from megalith.plan.experts import ExpertsQuestion
    from megalith.plan.source import resolve
    from megalith.specs.node import node

    if what.fusion not in ("profile", "ideal", "kernels"):
        raise ConfigError(f"There is no fusion {what.fusion!r}.", "Give profile, ideal or kernels.")
    return ExpertsQuestion(
        spec=resolve(model).spec, node=node(name), count=what.experts, weight_format=what.weight_format,
        prompt_tokens=what.prompt, output_tokens=what.output, batch=what.batch, zipf=what.zipf, router=what.router,
        all_links=what.all_links, fusion=cast("Fusion", what.fusion),
    )  # fmt: skip
