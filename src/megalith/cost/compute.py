"""Time of one step: from what each request brings to duration, busy time by resource and the resource that binds.

    t_layers = combine(weight bytes * ns/B, rows * multiply-adds * ns/MAC)          every step reads every weight once
    t_head   = combine(head bytes * ns/B,   output rows * multiply-adds * ns/MAC)
    t_attn   = sum over decodes of KV bytes * ns/B + sum over prompt chunks of max(KV bytes * ns/B, pairs * ns)
    t_link   = two all-reduces a layer of rows * hidden values, ring
    t_step   = fixed + layers * op + sequences * s + rows * values * v + t_layers + t_head + t_attn + t_link

Batch size alone is never enough: the shape carries new and context tokens of every request. Knows no clock and no I/O.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable
from dataclasses import dataclass

from megalith.cost import parameters as counting
from megalith.cost.memory import WeightBytes, kv_bytes_per_token, row_values
from megalith.cost.profile import Profile, Rates
from megalith.specs.model import ModelSpec


@dataclass(frozen=True, slots=True)
class StepShape:
    """The work of one step, summed over its requests; make it with `CostModel.shape`."""

    rows: int
    outputs: int
    sequences: int
    decode_tokens: int
    """Keys that the decodes read, summed over layers."""
    chunk_tokens: int
    """Keys that prompt chunks read, summed over layers."""
    chunk_pairs: int
    """Query-key pairs of the prompt chunks, summed over layers."""


@dataclass(frozen=True, slots=True)
class StepCost:
    """Predicted time of one step and how long it keeps each resource busy (resources overlap)."""

    duration_ns: int
    compute_ns: int
    memory_ns: int
    link_ns: int
    fixed_ns: int

    @property
    def binding(self) -> str:
        """The resource that was busy longest."""
        busy = {
            "memory bandwidth": self.memory_ns,
            "compute": self.compute_ns,
            "links": self.link_ns,
            "fixed time per step": self.fixed_ns,
        }
        return max(busy, key=lambda name: busy[name])


class CostModel:
    """The cost of steps of one model in one weight format on one profile (and `devices` of it side by side)."""

    def __init__(
        self, spec: ModelSpec, profile: Profile, weights: WeightBytes, kv_format: str = "bf16", devices: int = 1
    ) -> None:
        """Precompute all that does not depend on the batch."""
        self.spec, self.profile, self.weights, self.devices = spec, profile, weights, devices
        self.kv_format = kv_format
        self.layer_macs = counting.layer_macs(spec)
        self.head_macs = counting.head_macs(spec)
        self.kv_layer_token_bytes = kv_bytes_per_token(spec, kv_format) / spec.num_layers
        self.pair_macs = 2 * spec.num_heads * spec.head_dim
        self.row_values = row_values(spec) * spec.num_layers
        self._dense_bytes = weights.layers - weights.experts + weights.vectors

    def shape(self, requests: Iterable[tuple[int, int]], outputs: int | None = None) -> StepShape:
        """The shape of a step whose requests bring (new tokens, context tokens) each; outputs: one each unless said."""
        rows = sequences = decode_tokens = chunk_tokens = pairs = 0
        for new_tokens, context_tokens in requests:
            rows += new_tokens
            sequences += 1
            seen = counting.seen_tokens(self.spec, context_tokens + new_tokens)
            if new_tokens == 1:
                decode_tokens += seen
            else:
                chunk_tokens += seen
                pairs += counting.chunk_pairs(self.spec, new_tokens, context_tokens)
        return StepShape(rows, sequences if outputs is None else outputs, sequences, decode_tokens, chunk_tokens, pairs)

    def touched_bytes(self, rows: int) -> float:
        """Layer weights that a step of `rows` rows reads; of routed experts the expected number of distinct ones."""
        if not self.weights.experts:
            return float(self.weights.layers + self.weights.vectors)
        idle = counting.idle_experts(self.spec, rows)
        return self._dense_bytes + self.weights.experts * (1.0 - idle)

    def step(self, shape: StepShape) -> StepCost:
        """Duration and busy times of one step, in nanoseconds."""
        rates, share = self.profile.rates, 1.0 / self.devices
        layers_memory = self.touched_bytes(shape.rows) * rates.weight_byte_ns * share
        mac_ns = rates.mac_ns * row_factor(rates, shape.rows) * self.weights.mac_times
        layers_compute = shape.rows * self.layer_macs * mac_ns * share
        head_memory = self.weights.head * rates.weight_byte_ns * share if shape.outputs else 0.0
        head_macs = shape.outputs * self.head_macs * share
        head_compute = head_macs * rates.logit_mac_ns * row_factor(rates, shape.outputs) if shape.outputs else 0.0
        kv_share = max(1, -(-self.spec.num_kv_heads // self.devices)) / self.spec.num_kv_heads
        kv_ns = self.kv_layer_token_bytes * rates.kv_byte_ns * kv_share
        decode = shape.decode_tokens * kv_ns
        chunk_memory = shape.chunk_tokens * kv_ns
        chunk_compute = shape.chunk_pairs * self.pair_macs * rates.pair_mac_ns * share
        link = self.link_ns(shape.rows)
        elements = shape.rows * self.row_values * rates.row_value_ns * share
        fixed = rates.step_ns + self.spec.num_layers * rates.op_ns + shape.sequences * rates.sequence_ns
        duration = (
            fixed + elements + link + decode + max(chunk_memory, chunk_compute)
            + combine(layers_memory, layers_compute, rates.combine)
            + combine(head_memory, head_compute, rates.combine)
        )  # fmt: skip
        return StepCost(
            duration_ns=round(duration),
            compute_ns=round(layers_compute + head_compute + chunk_compute),
            memory_ns=round(layers_memory + head_memory + decode + chunk_memory + elements),
            link_ns=round(link),
            fixed_ns=round(fixed),
        )

    def decode_step(self, batch: int, context_tokens: int) -> StepCost:
        """A step that gives one token to each of `batch` sequences with `context_tokens` behind them."""
        seen = counting.seen_tokens(self.spec, context_tokens + 1)
        return self.step(StepShape(batch, batch, batch, batch * seen, 0, 0))

    def prefill(self, prompt_tokens: int, budget: int) -> StepCost:
        """A prompt alone, in chunks of at most `budget` rows; only the last chunk makes logits."""
        total = StepCost(0, 0, 0, 0, 0)
        done = 0
        while done < prompt_tokens:
            new = min(budget, prompt_tokens - done)
            cost = self.step(self.shape([(new, done)], outputs=1 if done + new == prompt_tokens else 0))
            done += new
            total = StepCost(
                total.duration_ns + cost.duration_ns, total.compute_ns + cost.compute_ns,
                total.memory_ns + cost.memory_ns, total.link_ns + cost.link_ns, total.fixed_ns + cost.fixed_ns,
            )  # fmt: skip
        return total

    def link_ns(self, rows: int) -> float:
        """Two ring all-reduces a layer of `rows` x hidden bf16 values: 2(n-1)/n of the bytes, plus latency."""
        if self.devices == 1 or self.profile.peer_bytes_per_s <= 0.0:
            return 0.0
        payload = rows * self.spec.hidden * 2
        one = 2 * (self.devices - 1) / self.devices * payload / self.profile.peer_bytes_per_s * 1e9
        return 2 * self.spec.num_layers * (one + self.profile.peer_latency_ns)


def combine(memory_ns: float, compute_ns: float, exponent: float) -> float:
    """Memory and compute time of one operator together: exponent 1 adds, a large one takes the larger."""
    if exponent == 1.0:
        return memory_ns + compute_ns
    larger = max(memory_ns, compute_ns)
    if larger == 0.0:
        return 0.0
    return larger * math.pow(1.0 + (min(memory_ns, compute_ns) / larger) ** exponent, 1.0 / exponent)


def row_factor(rates: Rates, rows: int) -> float:
    """How much dearer a multiply-add is with `rows` rows than with many."""
    table = rates.row_factors
    if not table:
        return 1.0
    if rows <= table[0][0]:
        return table[0][1]
    if rows >= table[-1][0]:
        return table[-1][1]
    position = bisect.bisect_right(table, (rows, math.inf))
    (low_rows, low), (high_rows, high) = table[position - 1], table[position]
    part = math.log(rows / low_rows) / math.log(high_rows / low_rows)
    return low + (high - low) * part
