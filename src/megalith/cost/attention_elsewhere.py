"""One decode step whose attention runs on other devices than its matrices, as a graph of operators at places.

Lamina (arXiv:2405.01814): matrices on `n - 1` model replicas, the KV cache and attention on devices of their own, and
`n` batches in rotation, so that one batch has its attention done while others have their matrices. InstInfer
(arXiv:2409.04992) is the same with one batch and drives. A slice of a batch is all between two attentions: output
projection and FFN of a layer, projections of the next.

    model r   | output, FFN of layer k-1 | q | k, v |        slice k of batch j runs on replica (j + k) mod (n - 1)
    down                                     | q |  | k, v |
    attention                                    | old keys      | merge |
    up                                                                   | o |

`early`: q is sent before k and v are projected, attention over the keys that are there begins at once, and the new pair
is merged by an online softmax. `at_home` is the control: the same devices hold the KV cache, and the model device
computes attention, so that KV crosses the link in every layer, one layer ahead. Knows durations; must not know models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from megalith.cost.graph import Op, Schedule, check, schedule

MOST_TOKENS = 12
"""Of each batch, that are scheduled while the rotation has not settled; then the mean of the last ones counts."""
MOST_WINDOWS = 9
"""The same for layers, in turns over the replicas."""


class SliceTimes(NamedTuple):
    """Durations of one batch in one layer, in picoseconds; `head` and `host` once a token."""

    query_ps: int
    """Projecting q."""
    pair_ps: int
    """Projecting k and v."""
    output_ps: int
    """Output projection and FFN."""
    attend_ps: int
    """Attention over the keys, where it runs."""
    merge_ps: int = 0
    """Taking the new key and value in, when they came after the query."""
    down_query_ps: int = 0
    down_pair_ps: int = 0
    up_ps: int = 0
    """Of `at_home`: all KV of the layer."""
    flight_ps: int = 0
    """Latency of one way; keeps no link busy."""
    carry_ps: int = 0
    """Handing the residual to the next replica, where there are several."""
    head_ps: int = 0
    host_ps: int = 0
    """Between two tokens of a batch: scheduling, sampling. Model devices may compute other batches meanwhile."""

    @property
    def model_ps(self) -> int:
        """A slice on a model device."""
        return self.query_ps + self.pair_ps + self.output_ps

    @property
    def down_ps(self) -> int:
        """Both sendings."""
        return self.down_query_ps + self.down_pair_ps


class Way(NamedTuple):
    """How batches go round."""

    early: bool = True
    at_home: bool = False
    replicas: int = 1


def decode_graph(batches: Sequence[SliceTimes], layers: int, way: Way, tokens: int = 1) -> list[Op]:
    """Operators of `tokens` decode steps of each batch, slice by slice: a place goes on with the slice it has begun.

    The last operator of batch j in token t is named `j.t`.
    """
    ops: list[Op] = []
    ends: list[int | None] = [None] * len(batches)
    attended: list[list[int]] = [[] for _ in batches]
    for token in range(tokens):
        for layer in range(layers + 1):
            for number, times in enumerate(batches):
                one = _Slice(ops, times, number, token * layers + layer, way, ends[number])
                if layer:
                    one.output()
                if layer == layers:
                    one.head(f"{number}.{token}")
                elif way.at_home:
                    one.at_home(attended[number])
                else:
                    one.elsewhere()
                ends[number] = one.last
    return ops


class _Slice:
    """A slice of one batch and the attention after it: adds operators; `last` is the number of the last one."""

    def __init__(self, ops: list[Op], times: SliceTimes, batch: int, slice_: int, way: Way, last: int | None) -> None:
        self.ops, self.times, self.batch, self.way, self.last = ops, times, batch, way, last
        self.model = f"model {(batch + slice_) % way.replicas}"

    def add(self, name: str, at: str, duration_ps: int, *after: int) -> int:
        """One operator; after the last one where it names none."""
        waits = after if after or self.last is None else (self.last,)
        self.ops.append(Op(f"{name} of {self.batch}", at, duration_ps, waits))
        return len(self.ops) - 1

    def send(self, name: str, link: str, wire_ps: int, *after: int) -> int:
        """Over a link, and then the flight, which keeps only the receiver waiting."""
        sent = self.add(name, link, wire_ps, *after)
        if not self.times.flight_ps:
            return sent
        return self.add(f"flight: {name}", f"{name} of {self.batch}", self.times.flight_ps, sent)

    def output(self) -> None:
        """The rest of the layer before: on the replica of this slice, where the residual has to be."""
        if self.way.replicas > 1 and self.times.carry_ps:
            self.last = self.add("carry", "replicas", self.times.carry_ps)
        self.last = self.add("output", self.model, self.times.output_ps)

    def head(self, name: str) -> None:
        """Logits, and what the host does between two tokens."""
        self.last = self.add("head", self.model, self.times.head_ps)
        self.ops.append(Op(name, "host", self.times.host_ps, (self.last,)))
        self.last += 1

    def elsewhere(self) -> None:
        """Attention at the place `attention`. A merge takes microseconds beside the attention of another batch."""
        times = self.times
        if self.way.early:
            query = self.add("q", self.model, times.query_ps)
            pair = self.add("kv", self.model, times.pair_ps, query)
            came = self.send("send q", "down", times.down_query_ps, query)
            other = self.send("send kv", "down", times.down_pair_ps, pair)
            attend = self.add("attend", "attention", times.attend_ps, came)
            attend = self.add("merge", "merge", times.merge_ps, attend, other)
        else:
            all_three = self.add("qkv", self.model, times.query_ps + times.pair_ps)
            came = self.send("send qkv", "down", times.down_ps, all_three)
            attend = self.add("attend", "attention", times.attend_ps, came)
        self.last = self.send("send o", "up", times.up_ps, attend)

    def at_home(self, attended: list[int]) -> None:
        """Attention on the model device. KV of a layer has room beside that of the one before it."""
        times = self.times
        all_three = self.add("qkv", self.model, times.query_ps + times.pair_ps)
        self.last = None
        came = self.send("fetch", "up", times.up_ps, *attended[-2:-1])
        self.last = self.add("attend", self.model, times.attend_ps, all_three, came)
        attended.append(self.last)


def period_ps(batches: Sequence[SliceTimes], layers: int, way: Way) -> int:
    """Duration of a decode step of all batches in the steady state of their rotation, from few operators.

    Layers are scheduled until every batch takes the same time for one more (`layer_ps`); heads, and the host's time
    between the tokens of one batch, are added. Never less than the bounds. `steady_ps`, which schedules all of it, is
    the oracle: within 2 % for two batches and 8 % for three at realistic sizes.
    """
    heads = -(-sum(times.head_ps for times in batches) // way.replicas)
    step = layers * layer_ps(batches, way) + heads + max(times.host_ps for times in batches)
    return max(step, bound_ps(batches, layers, way))


def layer_ps(batches: Sequence[SliceTimes], way: Way) -> int:
    """What one more layer takes, of the slowest batch: whole turns over the replicas until they are equally long."""
    window = 2 * way.replicas
    without = [times._replace(head_ps=0, host_ps=0) for times in batches]
    layers = 3 * window
    while True:
        ops = decode_graph(without, layers, way)
        plan = schedule(ops)
        ends: list[list[int]] = [[] for _ in batches]
        for op, end in zip(ops, plan.end_ps, strict=True):
            if op.name.startswith("output"):
                ends[int(op.name.rpartition(" ")[2])].append(end)
        late = [one[-1] - one[-1 - window] for one in ends]
        if late == [one[-1 - window] - one[-1 - 2 * window] for one in ends] or layers >= MOST_WINDOWS * window:
            return -(-max(late) // window)
        layers += 2 * window


def steady_ps(batches: Sequence[SliceTimes], layers: int, way: Way, checked: bool = True) -> int:
    """The same by scheduling all of it: the mean time of a token of the slowest batch once it does not change."""
    window = 2 * way.replicas
    tokens = 2 * window + 1
    while True:
        ops = decode_graph(batches, layers, way, tokens)
        plan = schedule(ops)
        if checked:
            check(ops, plan)
        ends = _ends(ops, plan, len(batches))
        late = [one[-1] - one[-1 - window] for one in ends]
        if late == [one[-1 - window] - one[-1 - 2 * window] for one in ends] or tokens > MOST_TOKENS:
            return -(-max(late) // window)
        tokens += window


def bound_ps(batches: Sequence[SliceTimes], layers: int, way: Way) -> int:
    """No rotation is faster: the busiest place, or the chain of one batch."""
    chain = max(chain_ps(times, layers, way) for times in batches)
    if way.at_home:
        model = sum(layers * (times.model_ps + times.attend_ps) + times.head_ps for times in batches)
        return max(chain, -(-model // way.replicas), layers * sum(times.up_ps for times in batches))
    model = sum(layers * times.model_ps + times.head_ps for times in batches)
    attention = layers * sum(times.attend_ps for times in batches)
    down, up = layers * sum(t.down_ps for t in batches), layers * sum(t.up_ps for t in batches)
    carry = layers * sum(times.carry_ps for times in batches) if way.replicas > 1 else 0
    return max(chain, -(-model // way.replicas), attention, down, up, carry)


def chain_ps(times: SliceTimes, layers: int, way: Way) -> int:
    """One token of one batch that is alone."""
    once = times.head_ps + times.host_ps
    if way.at_home:
        return layers * (times.model_ps + times.attend_ps) + once
    carry = times.carry_ps if way.replicas > 1 else 0
    flight = times.flight_ps
    if way.early:
        attended = times.down_query_ps + flight + times.attend_ps
        pair = max(times.pair_ps, times.down_query_ps) + times.down_pair_ps + flight
        middle = times.query_ps + max(attended, pair) + times.merge_ps
    else:
        middle = times.query_ps + times.pair_ps + times.down_ps + flight + times.attend_ps
    return layers * (middle + times.up_ps + flight + carry + times.output_ps) + once


def _ends(ops: Sequence[Op], plan: Schedule, batches: int) -> list[list[int]]:
    """When each token of each batch is there."""
    ends: list[list[int]] = [[] for _ in range(batches)]
    for number, op in enumerate(ops):
        if op.at == "host":
            ends[int(op.name.partition(".")[0])].append(plan.end_ps[number])
    return ends
