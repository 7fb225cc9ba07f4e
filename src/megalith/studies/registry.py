"""Studies by name. A study is imported when it is asked for."""

from __future__ import annotations

import difflib
import importlib
from typing import TYPE_CHECKING

from megalith.base.errors import ConfigError

if TYPE_CHECKING:
    from megalith.studies.study import Study

STUDIES: dict[str, str] = {
    "genz": "GenZ: what a platform must have for a use case, by a roofline of operators, against one roof alone",
    "long-context": "Long contexts: four costs of KV at 50K against 4K, with KV held small as the control",
    "fastgen": "DeepSpeed-FastGen: prompts cut to fill every pass, against whole prompts first",
    "distserve": "DistServe: prefill and decode on devices of their own, by goodput, against devices that do both",
    "splitwise": "Splitwise: prompts and tokens on machines of their own at equal power, against mixed machines",
    "splitwise-designs": "Splitwise: prompt and token machines by rate, cost and power, against mixed machines",
    "llumnix": "Llumnix: running requests moved live between instances, against dispatch by the same figure alone",
    "infinite-llm": "Infinite-LLM: one request's KV on several instances, against instances that are each alone",
    "melange": "Mélange: the cheapest mix of GPU types by an integer program, against the best single type",
    "harmony": "HARMONY: a fleet sized under a learned posterior of the load, against rules that react to it",
    "polca": "POLCA: more servers in one power budget, low priority slowed first, against a brake alone",
    "nanoflow": "NanoFlow: nano-batches that overlap inside a device, against one operator after the other",
    "lamina": "Lamina: attention on cheaper devices with much memory, against one kind and against attention at home",
    "instinfer": "InstInfer: decode attention inside the drives that hold KV, against KV over the host's path",
    "superpipeline": "Superpipeline: a window of layers in memory, against all of them, measured on this machine",
    "tpi-llm": "TPI-LLM: cut over small devices, layers through windows, sums by a star; each against itself off",
    "sn40l": "SN40L, a composition of experts: 150 models in three tiers of memory, against DGX nodes and one tier",
    "energonai": "EnergonAI: packed batches, a pipeline that does not block, layers on a peer; each against itself off",
    "blockllm": "BlockLLM: blocks shared by many fine-tuned models, against a model for each and shared bases",
    "bipolar-int": "Bipolar integers: any width of 1 to 8 bits by bit planes, against all planes and int8 products",
    "bfp-outliers": "Block floating point KV: K's channels in an order for its blocks, against the order they have",
    "tension-splitfuse-disaggregation": "SplitFuse x prompts on devices of their own: do the gains multiply?",
    "tension-nanoflow-polca": "nano-batches x more servers on one power budget: do the gains multiply?",
    "tension-migration-consolidation": "live migration x a fleet that follows its load: do the gains multiply?",
}
"""By name, in the order of `--all`; the module of that name (`_` for `-`) in this package has it as STUDY."""


def study(name: str) -> Study:
    """The study of that name. Raises ConfigError with the nearest one."""
    if name not in STUDIES:
        near = difflib.get_close_matches(name.lower(), STUDIES, n=1, cutoff=0.0)[0]
        raise ConfigError(f"There is no study {name!r}.", f"Did you mean {near!r}? Known: {', '.join(STUDIES)}.")
    found: Study = importlib.import_module(f"megalith.studies.{name.replace('-', '_')}").STUDY
    return found
