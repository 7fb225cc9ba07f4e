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


_POLICIES: dict[str, type[SplitFuse] | type[PrefillFirst] | type[FirstCome]] = {
    policy.name: policy for policy in (SplitFuse, PrefillFirst, FirstCome)
}
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
