"""Batch policies: what kind of work goes into the next step of one instance.

A policy sees counts (BatchFacts) and answers with the shape of the step; the Scheduler fills that shape in the order
of rank (higher priority, then earlier arrival, then lower id). The counts stay the same while only decodes run, so a
step of decodes keeps its shape until something arrives, finishes or is aborted: `StepPlan.repeats` rests on that.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar, NamedTuple, Protocol

from megalith.base.errors import ConfigError


class BatchFacts(NamedTuple):
    """What a batch policy sees of its instance."""

    running: int
    """Requests on the device, decoding or with prompt tokens to compute."""
    waiting: int
    """Requests off the device: new, preempted or swapped."""


class Admission(Enum):
    """Which waiting requests may join the step."""

    NONE = "none"
    BUDGET = "while tokens of the budget are left"
    ALL = "as many as blocks and max_sequences allow, whatever the budget"


@dataclass(frozen=True, slots=True)
class StepShape:
    """The rules by which one step is filled."""

    token_budget: int
    mixed: bool
    """True: decodes first, then prompt tokens, in one step within the budget. False: prompts alone if there are any
    that can run, else all decodes; the budget then bounds prompt steps only."""
    split: bool
    """True: a prompt may be cut to fit the budget. False: prompts go whole; one that is longer than the budget goes
    alone."""
    admission: Admission
    prompts_first: bool = False
    """In a mixed step: prompts first, then decodes in what the budget has left. Decodes that are left out keep their
    place and their KV, and go before the other decodes in the next step."""
    max_left_out: int = 1 << 30
    """A decode that was left out of so many steps in a row goes before prompts, too."""
    padded: bool = False
    """The budget of a step of prompts counts rows times the longest of them, as if all were filled up to it."""


class BatchPolicy(Protocol):
    """Pure and stateless: the same facts give the same shape, in O(1).

    One that always gives the same may say so in an attribute `constant`; it is then not asked for every step.
    """

    name: ClassVar[str]

    def shape(self, facts: BatchFacts) -> StepShape:
        """The shape of the next step."""
        ...


class SplitFuse:
    """Every running decode, then prompt chunks that fill the step up to a constant budget.

    Prompts are cut where the budget ends and only their last chunk samples, so the forward pass has nearly the same
    size under load whatever the prompt lengths. Dynamic SplitFuse: Holmes et al., arXiv:2401.08671.
    """

    name: ClassVar[str] = "splitfuse"

    def __init__(self, token_budget: int) -> None:
        self.constant = StepShape(_checked(token_budget), mixed=True, split=True, admission=Admission.BUDGET)

    def shape(self, facts: BatchFacts) -> StepShape:  # noqa: ARG002 - the same shape for every fact
        """Always mixed."""
        return self.constant


class PrefillFirst:
    """Whole prompts as soon as there is room for them, decodes otherwise.

    Iteration-level batching as in Orca (Yu et al., OSDI 2022) with the prompt priority of vLLM before chunked prefill
    (Kwon et al., SOSP 2023): best time to first token, and long prompts stall every decode.
    """

    name: ClassVar[str] = "prefill-first"

    def __init__(self, token_budget: int) -> None:
        self.constant = StepShape(_checked(token_budget), mixed=False, split=False, admission=Admission.BUDGET)

    def shape(self, facts: BatchFacts) -> StepShape:  # noqa: ARG002 - the same shape for every fact
        """Always prompts first."""
        return self.constant


class FirstCome:
    """Static batches: admit a batch, compute its prompts, decode until its last request is done, then the next."""

    name: ClassVar[str] = "first-come"

    def __init__(self, token_budget: int) -> None:
        self._gather = StepShape(_checked(token_budget), mixed=False, split=False, admission=Admission.ALL)
        self._drain = StepShape(token_budget, mixed=False, split=False, admission=Admission.NONE)

    def shape(self, facts: BatchFacts) -> StepShape:
        """A new batch only when nothing runs."""
        return self._drain if facts.running else self._gather


class PaddedPrefillFirst:
    """Prefill-first with a budget of padded tokens: rows times the longest prompt of the step.

    As vLLM did before it took prompts without padding, and as the `vllm` scheduler of Vidur does.
    """

    name: ClassVar[str] = "prefill-first-padded"

    def __init__(self, token_budget: int) -> None:
        self._shape = StepShape(
            _checked(token_budget), mixed=False, split=False, admission=Admission.BUDGET, padded=True
        )

    def shape(self, facts: BatchFacts) -> StepShape:  # noqa: ARG002 - the same shape for every fact
        """Always prompts first."""
        return self._shape


class PromptsThenDecodes:
    """Whole prompts up to the budget, then decodes in what is left of it, in the same step.

    The batching of Splitwise's machines (Patel et al., ISCA 2024; splitwise-sim, instance.py, SplitwiseInstance): on a
    machine with both, a prompt makes decodes wait only when the step is full, and none waits more than four steps.
    """

    name: ClassVar[str] = "splitwise"
    MAX_LEFT_OUT: ClassVar[int] = 4

    def __init__(self, token_budget: int) -> None:
        self._shape = StepShape(
            _checked(token_budget),
            mixed=True,
            split=False,
            admission=Admission.BUDGET,
            prompts_first=True,
            max_left_out=self.MAX_LEFT_OUT,
        )

    def shape(self, facts: BatchFacts) -> StepShape:  # noqa: ARG002 - the same shape for every fact
        """Always mixed."""
        return self._shape


_POLICIES: dict[
    str, type[SplitFuse] | type[PrefillFirst] | type[FirstCome] | type[PaddedPrefillFirst] | type[PromptsThenDecodes]
] = {policy.name: policy for policy in (SplitFuse, PrefillFirst, FirstCome, PaddedPrefillFirst, PromptsThenDecodes)}
POLICY_NAMES: tuple[str, ...] = tuple(_POLICIES)


def by_name(name: str, token_budget: int) -> BatchPolicy:
    """The batch policy of that name. Raises ConfigError with the nearest name."""
    if name in _POLICIES:
        return _POLICIES[name](token_budget)
    known = ", ".join(POLICY_NAMES)
    near = difflib.get_close_matches(name.lower(), POLICY_NAMES, n=1, cutoff=0.0)[0]
    raise ConfigError(f"There is no batch policy {name!r}.", f"Did you mean {near!r}? Known: {known}.")


def _checked(token_budget: int) -> int:
    if token_budget < 1:
        raise ConfigError(f"token_budget is {token_budget}.", "A step needs a budget of at least 1 token.")
    return token_budget
