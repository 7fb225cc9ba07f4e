"""Routers: where a request goes, decided at its arrival.

Knows dated facts of instances and nothing of how they are made up; must not know costs, clocks, tokens or the true
output length. One rule chooses among the instances that accept. With mixed instances the whole request runs on one of
them. With a prefill pool the prompt goes to it and the decode to the decode pool, chosen at arrival as well, so that
the KV may be sent while the prompt is computed. Where both kinds of pool exist, the prompt may go to either; on a mixed
instance the decode stays.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from operator import attrgetter

from mypy_extensions import mypyc_attr

from megalith.base.random import splitmix64
from megalith.base.units import NS_PER_S
from megalith.policy.cluster import Defer, InstanceFacts, Placement, Reject, Route, TransferMode, View
from megalith.policy.facts import Request
from megalith.policy.router_options import (
    PrefixAwareOptions,
    PrefixThresholdOptions,
    RouterOptions,
    TwoChoicesOptions,
)

OUTSTANDING: Callable[[InstanceFacts], int] = attrgetter("outstanding")


def queued_tokens(instance: InstanceFacts) -> int:
    """Prompt tokens that are not done, and one for each unfinished request.

    The load that splitwise-sim's token_jsq compares (scheduler.py, TokenJSQScheduler): the prompt counts until it is
    done, the output counts as one token until its last one. So with no prompt waiting it is the number of decodes.
    """
    return instance.pending_tokens + instance.outstanding


def spare_blocks(instance: InstanceFacts) -> int:
    """Free blocks, less what those who wait here need for the tokens that they have; below 0 when it is not enough."""
    return instance.free_blocks() - instance.waiting_blocks()


def unpromised_tokens(instance: InstanceFacts) -> int:
    """Tokens that fit here beside the prompts and most new tokens of all that was routed here, on its way or not."""
    return instance.kv_blocks * instance.block_tokens - instance.promised_tokens


@mypyc_attr(allow_interpreted_subclasses=True)
class RuleRouter(ABC):
    """A router that is one rule: the subclass says which of the instances, of which there is at least one."""

    name = "rule"

    def __init__(self, options: RouterOptions, seed: int = 0) -> None:
        self.options = options
        self.seed = seed
        self.transfer: TransferMode = options.transfer

    @abstractmethod
    def pick(self, request: Request, instances: Sequence[InstanceFacts]) -> InstanceFacts:
        """Where the prompt runs, and the decode with it on a mixed instance."""

    def pick_decode(self, request: Request, instances: Sequence[InstanceFacts]) -> InstanceFacts:
        """Where the decode runs when the prompt runs on a prefill instance. By the same rule unless overridden."""
        return self.pick(request, instances)

    def route(self, request: Request, view: View) -> Placement:
        """A Route; when nobody accepts, a Defer until the patience is over and then a Reject."""
        prefill, mixed = view.by_role("prefill"), view.by_role("mixed")
        if not prefill:
            if mixed:
                return Route(request.id, self.pick(request, mixed).id)
            return later(request, view, self.options)
        decode = view.by_role("decode") or mixed
        if not decode:
            return later(request, view, self.options)
        chosen = self.pick(request, [*prefill, *mixed] if mixed else prefill)
        if chosen.role != "prefill":
            return Route(request.id, chosen.id)
        return Route(request.id, chosen.id, self.pick_decode(request, decode).id, self.transfer)


def later(request: Request, view: View, options: RouterOptions) -> Placement:
    """Nobody accepts: try again, but not for ever."""
    waited_ns = max(0, view.now_ns - request.arrival_ns)
    if waited_ns < options.patience_s * NS_PER_S:
        return Defer(request.id, view.now_ns + max(1, round(options.retry_s * NS_PER_S)))
    counts = {role: len(view.by_role(role)) for role in ("prefill", "decode", "mixed")}
    accepting = ", ".join(f"{count} {role}" for role, count in counts.items() if count) or "none"
    return Reject(
        request.id,
        f"No instance took the request for {waited_ns / NS_PER_S:.1f} s: of {len(view.instances)} instances those that "
        f"accept are: {accepting}.",
    )


@mypyc_attr(allow_interpreted_subclasses=True)
class RoundRobin(RuleRouter):
    """One after the other, prompts and decodes counted apart. O(1)."""

    name = "round-robin"

    def __init__(self, options: RouterOptions, seed: int = 0) -> None:
        super().__init__(options, seed)
        self._turn = 0
        self._decode_turn = 0

    def pick(self, request: Request, instances: Sequence[InstanceFacts]) -> InstanceFacts:  # noqa: ARG002
        """The next one."""
        chosen = instances[self._turn % len(instances)]
        self._turn += 1
        return chosen

    def pick_decode(self, request: Request, instances: Sequence[InstanceFacts]) -> InstanceFacts:  # noqa: ARG002
        """The next one of those that decode."""
        chosen = instances[self._decode_turn % len(instances)]
        self._decode_turn += 1
        return chosen


@mypyc_attr(allow_interpreted_subclasses=True)
class RandomChoice(RuleRouter):
    """Any of them, with equal chances, from the seed. O(1)."""

    name = "random"

    def __init__(self, options: RouterOptions, seed: int = 0) -> None:
        super().__init__(options, seed)
        self._draws = 0

    def pick(self, request: Request, instances: Sequence[InstanceFacts]) -> InstanceFacts:  # noqa: ARG002
        """One draw of the seeded counter."""
        self._draws += 1
        return instances[splitmix64(self.seed, self._draws) * len(instances) >> 64]


@mypyc_attr(allow_interpreted_subclasses=True)
class LeastOutstanding(RuleRouter):
    """The fewest unfinished requests; the first of equals. splitwise-sim's jsq."""

    name = "least-outstanding"

    def pick(self, request: Request, instances: Sequence[InstanceFacts]) -> InstanceFacts:  # noqa: ARG002
        """A linear search in C: about 25 ns an instance."""
        return min(instances, key=OUTSTANDING)


@mypyc_attr(allow_interpreted_subclasses=True)
class LeastTokens(RuleRouter):
    """The fewest queued_tokens; the first of equals. splitwise-sim's token_jsq."""

    name = "least-tokens"

    def pick(self, request: Request, instances: Sequence[InstanceFacts]) -> InstanceFacts:  # noqa: ARG002
        """Linear in the instances."""
        return min(instances, key=queued_tokens)


@mypyc_attr(allow_interpreted_subclasses=True)
class TwoChoices(RuleRouter):
    """The better of two drawn from the seed (Mitzenmacher, IEEE TPDS 2001). O(1), and hard to fool with old facts."""

    name = "power-of-two"

    def __init__(self, options: TwoChoicesOptions, seed: int = 0) -> None:
        super().__init__(options, seed)
        self._load = OUTSTANDING if options.by == "outstanding" else queued_tokens
        self._draws = 0

    def pick(self, request: Request, instances: Sequence[InstanceFacts]) -> InstanceFacts:  # noqa: ARG002
        """Two different ones, as long as there are two."""
        count = len(instances)
        if count == 1:
            return instances[0]
        self._draws += 1
        # Both indices from one draw of 64 bits: 32 bits each are enough for any number of instances.
        bits = splitmix64(self.seed, self._draws)
        first = (bits >> 32) * count >> 32
        second = (bits & 0xFFFFFFFF) * (count - 1) >> 32
        one, two = instances[first], instances[second + (second >= first)]
        load = self._load
        return one if load(one) <= load(two) else two


@mypyc_attr(allow_interpreted_subclasses=True)
class LeastKv(RuleRouter):
    """The most spare_blocks; the first of equals."""

    name = "least-kv"

    def pick(self, request: Request, instances: Sequence[InstanceFacts]) -> InstanceFacts:  # noqa: ARG002
        """Linear in the instances."""
        return max(instances, key=spare_blocks)


@mypyc_attr(allow_interpreted_subclasses=True)
class PrefixAware(RuleRouter):
    """The longest cached prefix weighed against load, as NVIDIA Dynamo's KV router does it.

    cost = overlap_weight * prompt blocks to compute + blocks in use, the least wins (Dynamo, routing concepts).
    Prompt blocks to compute: the prompts that wait here and this one less its cached prefix. Blocks in use: held now,
    needed by those who wait, and this request's own prompt.
    """

    name = "prefix-aware"

    def __init__(self, options: PrefixAwareOptions, seed: int = 0) -> None:
        super().__init__(options, seed)
        self._weight = options.overlap_weight

    def cost(self, request: Request, instance: InstanceFacts, computes: bool = True) -> float:
        """What routing the request there costs, in blocks. `computes`: the prompt runs there."""
        in_use = instance.kv_blocks - spare_blocks(instance)
        blocks = in_use + request.prompt_tokens / instance.block_tokens
        if not computes:
            return blocks
        cached = instance.cached_tokens(request) if request.prefix_hashes else 0
        return (
            blocks + self._weight * (instance.pending_tokens + request.prompt_tokens - cached) / instance.block_tokens
        )

    def pick(self, request: Request, instances: Sequence[InstanceFacts]) -> InstanceFacts:
        """Linear in instances times blocks of the prompt."""
        return min(instances, key=lambda instance: self.cost(request, instance))

    def pick_decode(self, request: Request, instances: Sequence[InstanceFacts]) -> InstanceFacts:
        """The KV is sent whole: only the blocks in use count."""
        return min(instances, key=lambda instance: self.cost(request, instance, computes=False))


@mypyc_attr(allow_interpreted_subclasses=True)
class PrefixThreshold(RuleRouter):
    """The longest cached prefix while loads are even, else the fewest outstanding: SGLang's cache_aware policy.

    Its router keeps an approximate tree of what it sent where; here the facts say what is cached.
    """

    name = "prefix-threshold"

    def __init__(self, options: PrefixThresholdOptions, seed: int = 0) -> None:
        super().__init__(options, seed)
        self._rule = options

    def pick(self, request: Request, instances: Sequence[InstanceFacts]) -> InstanceFacts:
        """Balance when it is needed, a good match when there is one, else the instance with the most spare blocks."""
        idlest = min(instances, key=OUTSTANDING)
        fewest, most = idlest.outstanding, max(map(OUTSTANDING, instances))
        if most - fewest > self._rule.imbalance and most > fewest * self._rule.imbalance_ratio:
            return idlest
        if request.prefix_hashes:
            cached = [instance.cached_tokens(request) for instance in instances]
            longest = max(cached)
            if longest > self._rule.match * request.prompt_tokens:
                return instances[cached.index(longest)]
        return max(instances, key=spare_blocks)


@mypyc_attr(allow_interpreted_subclasses=True)
class ShortestQueue(RuleRouter):
    """The shortest prompt queue for the prompt, and the most unpromised memory for the decode. After DistServe.

    DistServe sends the prompt to the shortest queue; its simulator counts requests, here it is tokens: what the queue
    takes to drain.
    """

    name = "shortest-queue"

    def pick(self, request: Request, instances: Sequence[InstanceFacts]) -> InstanceFacts:  # noqa: ARG002
        """Equal queues: the fewest outstanding requests, which on a prefill instance wait to be fetched."""
        return min(instances, key=lambda instance: (instance.pending_tokens, instance.outstanding))

    def pick_decode(self, request: Request, instances: Sequence[InstanceFacts]) -> InstanceFacts:  # noqa: ARG002
        """Free blocks would not do: those who are to come hold none yet, and all prompts in flight would go to one."""
        return max(instances, key=unpromised_tokens)
