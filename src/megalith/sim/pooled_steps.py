"""How long a step takes when part of its KV lies on other instances, and what that costs these.

Knows step timers, the network and which blocks are where; must not know why they are there. DistAttention
(Infinite-LLM, arXiv:2401.02669, section 3): in every layer the owner sends its queries to each holder, the holder
attends to what it has, and sends back (maximum, sum, weighted values), which the owner merges exactly. So the bytes of
a decoded token do not depend on its context. A step of the owner takes

    all but attention + max(attention to what is here, max over holders of
        2 * layers * latency + bytes / bandwidth + waiting for the holder + attention there)

and the holder's own next step is longer by the attention that it did for others since its last one began. A holder
takes the queries of several owners one after another, at once and before its own work; its work is conserved. Prompts
with KV elsewhere are the same with more rows; the KV of a chunk that belongs elsewhere is sent there under the step,
which takes as long as that at least. What merging takes is left out: it is below 1 % in the publication.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from megalith.base.units import NS_PER_S
from megalith.cost.timer import PS_PER_NS, Prompt, StepTimer
from megalith.policy.cluster import InstanceId
from megalith.policy.facts import RequestId, StepPlan
from megalith.sim.network import Network, Transfer
from megalith.sim.pooled_instance import PooledInstance
from megalith.specs.model import ModelSpec

PS_PER_S = NS_PER_S * PS_PER_NS
QUERY_BYTES = 2
"""Of one element of a query or of weighted values: bf16."""
STATE_BYTES = 8
"""Of one head's running maximum and sum: two float32."""


class QueryShape(NamedTuple):
    """What goes over the network for attention at another instance."""

    layers: int
    query_bytes: int
    """Of one row in one layer."""
    result_bytes: int
    """Of one row in one layer: weighted values, maximum and sum of every head."""
    token_bytes: int
    """KV of one token over all layers."""

    @staticmethod
    def of(spec: ModelSpec, token_bytes: int) -> QueryShape:
        """Of a model."""
        values = spec.num_heads * spec.head_dim * QUERY_BYTES
        return QueryShape(spec.num_layers, values, values + spec.num_heads * STATE_BYTES, token_bytes)

    def row_bytes(self) -> int:
        """There and back, of one row over all layers: what one decoded token costs for each holder."""
        return self.layers * (self.query_bytes + self.result_bytes)


class Span:
    """Consecutive blocks of one request on one instance."""

    __slots__ = ("blocks", "holder")

    def __init__(self, holder: InstanceId, blocks: int) -> None:
        self.holder = holder
        self.blocks = blocks


@dataclass(slots=True)
class StepCounters:
    """What coupled steps did since the start. Only ever rises."""

    steps: int = 0
    """Steps with attention elsewhere."""
    remote_tokens: int = 0
    """Tokens that were attended to elsewhere, added up over steps."""
    spread_tokens: int = 0
    """Tokens decoded by requests with KV elsewhere,"""
    spread_bytes: int = 0
    """and the bytes of queries and results for them."""
    query_bytes: int = 0
    """Of all queries and results, those of prompts too."""
    streamed_bytes: int = 0
    """KV of prompts that was sent where it belongs as it was computed."""
    waited_ps: int = 0
    """Time that steps were longer because something elsewhere was not done."""
    foreign_ps: int = 0
    """Attention done for others."""


class _Part:
    """What one step asks of one holder."""

    __slots__ = ("decodes", "longest", "prompts", "rows", "streamed", "tokens")

    def __init__(self) -> None:
        self.decodes = self.tokens = self.longest = 0
        self.prompts: list[tuple[int, int]] = []
        """(rows, tokens there)."""
        self.rows = 0
        self.streamed = 0
        """Tokens of KV that go there."""


@dataclass(slots=True)
class CoupledSteps:
    """Times coupled steps; `spans` is kept by sim/pooled.py."""

    network: Network
    shape: QueryShape
    block_tokens: int
    instances: Mapping[InstanceId, PooledInstance]
    spans: dict[InstanceId, dict[RequestId, list[Span]]] = field(default_factory=dict)
    """By owner: where the leading blocks of its requests are, in the order of positions."""
    counters: StepCounters = field(default_factory=StepCounters)
    _until_ps: dict[InstanceId, int] = field(default_factory=dict)
    """When each holder has done all attention that it was asked for."""
    _owed_ps: dict[InstanceId, int] = field(default_factory=dict)
    """Attention for others that no step of the holder has been longer by yet."""

    def forget(self, instance: InstanceId) -> None:
        """It failed: what it was doing is lost."""
        self._until_ps.pop(instance, None)
        self._owed_ps.pop(instance, None)

    def stretch_ps(self, instance: PooledInstance, plan: StepPlan, alone_ps: int) -> int:
        """How much longer than `alone_ps` the step takes that begins now; see PooledInstance.stretch."""
        owed_ps = self._pay(instance)
        spans = self.spans.get(instance.id)
        if not spans:
            return owed_ps
        parts: dict[InstanceId, _Part] = {}
        away = self._decodes(instance, plan, spans, parts) if plan.decodes else {}
        prompts = self._prompts(plan, spans, parts)
        if not parts:
            return owed_ps
        self.counters.steps += 1
        timer, decodes = instance.timer, plan.decodes
        contexts = plan.decode_context_sum - sum(away.values())
        longest = _longest(instance, away) if decodes else 0
        here_ps = timer.step_ps(prompts, decodes, contexts, longest)
        bare = [Prompt(new, 0, samples) for new, _, samples in prompts]
        attention_ps = max(0, here_ps - timer.step_ps(bare, decodes, 0, 0))
        waited_ps = max(0, self._slowest_ps(instance, parts) - attention_ps)
        waited_ps = max(waited_ps, self._stream(instance, parts) - here_ps)
        self.counters.waited_ps += waited_ps
        return here_ps + waited_ps + owed_ps - alone_ps

    # What is asked of whom

    def _decodes(
        self,
        instance: PooledInstance,
        plan: StepPlan,
        spans: dict[RequestId, list[Span]],
        parts: dict[InstanceId, _Part],
    ) -> dict[RequestId, int]:
        """Adds the decodes of a step; returns by request the tokens that are elsewhere."""
        away: dict[RequestId, int] = {}
        listed = {chunk.request_id for chunk in plan.listed}
        for request_id, held in spans.items():
            if request_id in listed or instance.memory.decoding(request_id) < 0:
                continue
            for span in held:
                tokens = span.blocks * self.block_tokens
                part = parts.setdefault(span.holder, _Part())
                part.rows += 1
                part.decodes += 1
                part.tokens += tokens
                part.longest = max(part.longest, tokens)
                away[request_id] = away.get(request_id, 0) + tokens
            if held:
                self.counters.spread_tokens += 1
                self.counters.spread_bytes += len(held) * self.shape.row_bytes()
        return away

    def _prompts(
        self, plan: StepPlan, spans: dict[RequestId, list[Span]], parts: dict[InstanceId, _Part]
    ) -> list[Prompt]:
        """Adds the listed rows; returns them with the contexts that are here."""
        prompts = []
        for request_id, new, context, samples in plan.listed:
            here, first = context, 0
            for span in spans.get(request_id, ()):
                last = first + span.blocks * self.block_tokens
                there = min(context, last) - first
                fresh = min(context + new, last) - max(context, first)
                if there > 0 or fresh > 0:
                    part = parts.setdefault(span.holder, _Part())
                    part.streamed += max(0, fresh)
                    if there > 0:
                        part.rows += new
                        part.prompts.append((new, there))
                        here -= there
                first = last
            prompts.append(Prompt(new, here, samples))
        return prompts

    # What it takes

    def _slowest_ps(self, owner: PooledInstance, parts: dict[InstanceId, _Part]) -> int:
        """From the first query to the last result."""
        shape, counters, slowest = self.shape, self.counters, 0
        now_ps = owner.begun_ps
        sent_bytes = sum([part.rows for part in parts.values()]) * shape.layers * shape.query_bytes
        back_bytes = sum([part.rows for part in parts.values()]) * shape.layers * shape.result_bytes
        for holder_id, part in parts.items():
            if not part.rows:
                continue
            holder = self.instances[holder_id]
            work_ps = _attention_ps(holder.timer, part)
            until_ps = self._until_ps[holder_id] = max(now_ps, self._until_ps.get(holder_id, 0)) + work_ps
            if holder.resting:
                holder.busy_decode_ps += work_ps
            else:
                self._owed_ps[holder_id] = self._owed_ps.get(holder_id, 0) + work_ps
            counters.foreign_ps += work_ps
            counters.remote_tokens += part.tokens + sum([tokens for _, tokens in part.prompts])
            # All queries of a step leave by the owner's ports, and all results come in by them.
            there, back = (owner.id, holder_id), (holder_id, owner.id)
            latency_ns = self.network.latency_ns(*there) + self.network.latency_ns(*back)
            wire_s = sent_bytes / self.network.next_bytes_per_s(*there)
            wire_s += back_bytes / self.network.next_bytes_per_s(*back)
            wire_ps = shape.layers * latency_ns * PS_PER_NS + round(wire_s * PS_PER_S)
            slowest = max(slowest, until_ps - now_ps + wire_ps)
        counters.query_bytes += sent_bytes + back_bytes
        return slowest

    def _stream(self, owner: PooledInstance, parts: dict[InstanceId, _Part]) -> int:
        """Send the KV of prompts to where it belongs; returns how long that takes."""
        longest = 0
        for holder_id, part in parts.items():
            if part.streamed:
                num_bytes = part.streamed * self.shape.token_bytes
                rate = self.network.next_bytes_per_s(owner.id, holder_id)
                self.counters.streamed_bytes += num_bytes
                self.network.send(owner.id, holder_id, num_bytes, _arrived)
                longest = max(longest, round(num_bytes / rate * PS_PER_S))
        return longest

    def _pay(self, instance: PooledInstance) -> int:
        """What the step is longer by for the attention that was done for others."""
        owed_ps = self._owed_ps.pop(instance.id, 0)
        if instance.rested:
            # What was asked for meanwhile was done while nothing else ran; only the rest of it is in the way.
            left_ps = max(0, self._until_ps.get(instance.id, 0) - instance.begun_ps)
            instance.busy_decode_ps += owed_ps - left_ps  # the rest counts with the step
            owed_ps = left_ps
        return owed_ps


def _attention_ps(timer: StepTimer, part: _Part) -> int:
    """What attention to the tokens there takes the holder: what they add to a step."""
    total = 0
    if part.decodes:
        total += timer.step_ps((), part.decodes, part.tokens, part.longest) - timer.step_ps((), part.decodes, 0, 0)
    for rows, tokens in part.prompts:
        total += timer.step_ps([Prompt(rows, tokens, False)], 0, 0, 0) - timer.step_ps(
            [Prompt(rows, 0, False)], 0, 0, 0
        )
    return max(0, total)


def _longest(instance: PooledInstance, away: dict[RequestId, int]) -> int:
    """The longest context of a decode that is here."""
    cohort = instance.memory.cohort
    return max([member.computed - away.get(member.request.id, 0) for member in cohort.members])


def _arrived(_transfer: Transfer) -> None:
    """KV of a prompt is where it belongs; the step waited for it."""
