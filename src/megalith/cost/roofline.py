"""Operator-level roofline of GenZ (arXiv:2406.01698, section IV): every operator takes the longest of its three times.

    t = max(FLOPs / (F * eff_c), bytes / (BW * eff_m), collective)         summed over the operators of one layer

The operators are those of the released analyser (github.com/abhibambhaniya/GenZ-LLM-Analyzer, MIT), and so are its
habits: scores of attention stay on the chip, and so do the activations of a decode; no pair of a prompt is masked;
norms and element-wise work cost nothing; a layer is all there is. `PLANNED` leaves masked pairs out and puts the head
in, which is how the planner asks. Knows shapes, rates and groups; must not know catalogues, engines or measurements
(`compute` is the model that is fitted to those).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from megalith.cost.memory import bits_per_weight
from megalith.cost.parameters import idle_experts
from megalith.specs.model import ModelSpec

Bound = Literal["compute", "memory", "links"]
RING_START_S = 5e-6
"""Fixed time of a collective in the released analyser (collective_times.py)."""


@dataclass(frozen=True, slots=True)
class Platform:
    """Rates of one device of a platform, and the part of them that is reached."""

    flops_per_s: float
    memory_bytes_per_s: float
    compute_reach: float = 1.0
    memory_reach: float = 1.0
    chip_bytes_per_s: float = float("inf")
    """Of memory on the chip, for what never leaves it."""
    link_bytes_per_s: float = float("inf")
    """One direction, to the next device of the ring."""
    link_latency_s: float = 0.0
    ring_start_s: float = RING_START_S


@dataclass(frozen=True, slots=True)
class Habits:
    """What an analysis counts."""

    counts_masked: bool = True
    """FLOPs of pairs that a causal mask hides."""
    with_head: bool = False
    """The matrix that makes logits, beside the layers."""


class Sizes(NamedTuple):
    """Bytes of one weight, one value of the KV cache and one activation."""

    weight: float = 2.0
    kv: float = 2.0
    value: float = 2.0


HALF_PRECISION = Sizes()
GENZ = Habits()
PLANNED = Habits(counts_masked=False, with_head=True)


class Operator(NamedTuple):
    """One operator on one device."""

    name: str
    flops: float
    num_bytes: float
    """To and from the memory beside the chip."""
    chip_bytes: float = 0.0
    payload_bytes: float = 0.0
    """Of an all-reduce; such an operator has neither FLOPs nor bytes."""


class Matrix(Protocol):
    """A matrix product with its inputs, outputs and rows."""

    def __call__(  # noqa: D102
        self, name: str, inputs: float, outputs: float, rows: float = ..., on_chip: bool | None = ...
    ) -> Operator: ...


class Cost(NamedTuple):
    """Times of one operator, or sums over operators, in seconds."""

    seconds: float
    compute_s: float
    memory_s: float
    link_s: float

    @property
    def binding(self) -> Bound:
        """The longest of the three."""
        times: dict[Bound, float] = {"compute": self.compute_s, "memory": self.memory_s, "links": self.link_s}
        return max(times, key=lambda name: times[name])


@dataclass(frozen=True, slots=True)
class Work:
    """A forward pass: `sequences` prompts, each answered by `beams`, with `new_tokens` rows a sequence and beam."""

    new_tokens: int
    prompt_keys: int = 0
    """Keys of the prompt, shared by the beams of a sequence; 0 while the prompt itself is read."""
    answer_keys: int = 0
    """Keys of what was generated so far, of every beam its own."""
    sequences: int = 1
    beams: int = 1

    @property
    def decodes(self) -> bool:
        """Whether there is a prompt behind it."""
        return self.prompt_keys > 0

    @property
    def rows(self) -> int:
        """Rows of the matrix products."""
        return self.sequences * self.beams * self.new_tokens


def prefill(tokens: int, sequences: int = 1) -> Work:
    """Whole prompts, nothing before them."""
    return Work(tokens, sequences=sequences)


def decode(prompt_tokens: int, generated: int, sequences: int = 1, beams: int = 1) -> Work:
    """One token for each sequence and beam, with `generated` tokens of the answer behind it."""
    return Work(1, prompt_tokens, generated, sequences, beams)


def layer_operators(
    spec: ModelSpec, work: Work, devices: int = 1, habits: Habits = GENZ, sizes: Sizes = HALF_PRECISION
) -> list[Operator]:
    """The operators of one layer on one of `devices` that share it.

    Matrices are cut over the devices; two all-reduces of rows * hidden put the layer together again.
    """
    heads, kv_heads = -(-spec.num_heads // devices), max(1, -(-spec.num_kv_heads // devices))
    width, rows = spec.head_dim, work.rows

    def matrix(name: str, inputs: float, outputs: float, rows: float = rows, on_chip: bool | None = None) -> Operator:
        values = sizes.value * rows * (inputs + outputs)
        flops, weights = 2.0 * rows * inputs * outputs, sizes.weight * inputs * outputs
        stays = work.decodes if on_chip is None else on_chip
        return Operator(name, flops, weights, values) if stays else Operator(name, flops, weights + values)

    def reduced(name: str) -> list[Operator]:
        return [Operator(name, 0.0, 0.0, payload_bytes=sizes.value * rows * spec.hidden)] if devices > 1 else []

    return [
        matrix("QKV", spec.hidden, (heads + 2 * kv_heads) * width),
        *_attention(work, (heads, kv_heads, width), habits, sizes),
        matrix("out", heads * width, spec.hidden),
        *reduced("attention all-reduce"),
        *_ffn(spec, work, devices, matrix),
        *reduced("FFN all-reduce"),
    ]


def _ffn(spec: ModelSpec, work: Work, devices: int, matrix: Matrix) -> list[Operator]:
    """Dense, or the experts that a pass meets: the expected number of distinct ones, with tokens routed evenly."""
    inner = -(-spec.ffn // devices)
    wide = 2 if spec.gated_ffn else 1
    if not spec.num_experts:
        return [matrix("up", spec.hidden, wide * inner), matrix("down", inner, spec.hidden)]
    met = spec.num_experts * (1.0 - idle_experts(spec, work.rows))
    each = work.rows * spec.experts_per_token / met
    return [
        matrix("gate", -(-spec.hidden // devices), spec.num_experts, on_chip=False),
        matrix("up", spec.hidden, met * wide * inner, each),
        matrix("down", met * inner, spec.hidden, each),
    ]


def _attention(work: Work, shape: tuple[int, int, int], habits: Habits, sizes: Sizes) -> list[Operator]:
    """Scores and weighted sums, over the prompt's keys (one copy for all beams) and over each beam's own."""
    heads, kv_heads, width = shape
    answers = work.sequences * work.beams
    if not work.decodes:
        parts = [("", work.answer_keys + work.new_tokens, answers)]
    else:
        parts = [(" prompt", work.prompt_keys, work.sequences), (" answer", work.answer_keys, answers)]
    operators = []
    for title, keys, copies in parts:
        if not keys:
            continue
        pairs = answers * heads * work.new_tokens * keys
        counted = float(pairs)
        if not (habits.counts_masked or work.decodes):
            counted -= answers * heads * work.new_tokens * (work.new_tokens - 1) / 2
        queries = sizes.value * answers * heads * work.new_tokens * width
        cache, scores = sizes.kv * copies * kv_heads * keys * width, sizes.value * pairs
        outside, inside = (cache, queries + scores) if work.decodes else (cache + queries, scores)
        operators += [Operator(f"{name}{title}", 2.0 * counted * width, outside, inside) for name in ("scores", "sums")]
    return operators


def model_operators(
    spec: ModelSpec, work: Work, devices: int = 1, habits: Habits = PLANNED, sizes: Sizes = HALF_PRECISION
) -> list[tuple[Operator, int]]:
    """(operator, how often) of a whole pass."""
    found = [(one, spec.num_layers) for one in layer_operators(spec, work, devices, habits, sizes)]
    if habits.with_head:
        answers, vocab = work.sequences * work.beams, -(-spec.vocab // devices)
        num_bytes = sizes.value * answers * (spec.hidden + vocab) + sizes.weight * spec.hidden * vocab
        found.append((Operator("head", 2.0 * answers * spec.hidden * vocab, num_bytes), 1))
    return found


def sizes_of(weight_format: str, kv_format: str = "bf16") -> Sizes:
    """Sizes under formats of `cost.memory`; activations are bf16."""
    return Sizes(bits_per_weight(weight_format) / 8.0, bits_per_weight(kv_format) / 8.0)


def all_reduce_s(payload_bytes: float, devices: int, platform: Platform) -> float:
    """Ring: start + 2 (n - 1) (latency + payload / n / link)."""
    if devices == 1 or not payload_bytes:
        return 0.0
    hops = 2 * (devices - 1)
    return platform.ring_start_s + hops * (
        platform.link_latency_s + payload_bytes / devices / platform.link_bytes_per_s
    )


def operator_cost(operator: Operator, platform: Platform, devices: int = 1) -> Cost:
    """The three times of one operator; the longest is what it takes."""
    compute = operator.flops / (platform.flops_per_s * platform.compute_reach)
    memory = operator.num_bytes / platform.memory_bytes_per_s + operator.chip_bytes / platform.chip_bytes_per_s
    memory /= platform.memory_reach
    link = all_reduce_s(operator.payload_bytes, devices, platform)
    return Cost(max(compute, memory, link), compute, memory, link)


def pass_cost(operators: list[tuple[Operator, int]], platform: Platform, devices: int = 1) -> Cost:
    """One pass over all operators, one after the other."""
    costs = [(operator_cost(operator, platform, devices), times) for operator, times in operators]
    return Cost(*(sum(cost[part] * times for cost, times in costs) for part in range(4)))
