"""A gated ReLU FFN that computes only neurons that can be positive, from a NeuronStore. LLM in a flash, section 3.

y = sum over neurons n with gate_n . x > 0 of (gate_n . x) (up_n . x) down_n: all others add exactly zero. Who may be
positive is told by an 8-bit copy of gate that stays in memory, with a bound on its error, so that no neuron is missed
(exact), or with a margin of so many standard deviations (approximate: a missed neuron was close to zero).

Letters: M rows, D hidden, F neurons, N neurons that are computed.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from megalith.base.units import MIB, format_bytes
from megalith.engine.neuron_file import BUNDLED
from megalith.engine.neuron_store import I64, NeuronStore
from megalith.engine.packed_file import Weights
from megalith.tier.memory import HugeBuffer

Predict = Literal["bound", "gate", "all"]
"""bound: the 8-bit copy says who may fire. gate: all of gate is read in every step. all: every neuron is read."""
_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_ROWS = 4096
"""Of gate, that are quantised or multiplied at once."""
_GATE_BYTES = 16 * MIB


class GateBound:
    """gate [F, D] in 8 bits, one scale a row, and what each row's error can be.

    For any x: |gate_n . x - estimate_n| <= |error_n| |x| + roundings (Cauchy-Schwarz); F x D bytes, and 8 F.
    """

    def __init__(self, gate_FD: Tensor) -> None:
        rows, self.hidden = gate_FD.shape
        self.weight = torch.empty(rows, self.hidden, dtype=torch.int8)
        self.scale = torch.empty(rows, dtype=torch.bfloat16)
        self.error, self.norm = torch.empty(rows), torch.empty(rows)
        for at in range(0, rows, _ROWS):
            part, to = gate_FD[at : at + _ROWS].float(), slice(at, at + _ROWS)
            # Rounded before use, so that the product below has no error of the scale.
            scale = (part.abs().amax(1) / 127).clamp_min(1e-30).bfloat16()
            whole = (part / scale.float()[:, None]).round().clamp(-127, 127)
            near = whole * scale.float()[:, None]
            self.weight[to], self.scale[to] = whole.to(torch.int8), scale
            self.error[to], self.norm[to] = (part - near).norm(dim=1), near.norm(dim=1)

    @property
    def num_bytes(self) -> int:
        """In memory."""
        return sum(t.nbytes for t in (self.weight, self.scale, self.error, self.norm))

    def may_fire(self, x_MD: Tensor, sigmas: float | None) -> Tensor:
        """bool [M, F]: where gate_n . x may be positive; with `sigmas`, is likely to be.

        Roundings: of x and of the result to bfloat16 (2**-8 each at most), and of sums in float32 (a generous 2**-12).
        """
        x = x_MD.float()
        coarse = x.bfloat16()
        estimate = torch.ops.aten._weight_int8pack_mm(coarse, self.weight, self.scale).float()
        size, rounded = x.norm(dim=1, keepdim=True), (x - coarse.float()).norm(dim=1, keepdim=True)
        if sigmas is None:
            margin = self.error * size + self.norm * (rounded + size * 2**-12)
        else:  # of a sum of D errors that do not know x
            margin = (self.error * size + self.norm * rounded) * (sigmas / self.hidden**0.5)
        result: Tensor = estimate + estimate.abs() * 2**-8 + margin > 0
        return result


class SparseNeurons:
    """The FFNs of all layers: what stays of them, the store, and counts."""

    def __init__(self, store: NeuronStore, predict: Predict = "bound", sigmas: float | None = None) -> None:
        self.store, self.predict, self.sigmas = store, predict, sigmas
        self.rows = self.predicted = self.fired = 0
        """Rows x layers so far, neurons that were computed for them, and those that were positive."""
        self.bounds: list[GateBound] = []
        self._room = HugeBuffer(_GATE_BYTES) if predict == "gate" else None

    def make(self, weights: Weights, layer: int) -> nn.Module:
        """The module of a layer; layers come in order."""
        if self.predict == "bound":
            gate = torch.from_numpy(weights.tensor(f"layers.{layer}.gate.weight").float32())
            self.bounds.append(GateBound(gate))
        return _SparseFfn(self, layer)

    def num_bytes(self) -> int:
        """Of memory that is held for them."""
        room = 0 if self._room is None else self._room.num_bytes
        return self.store.num_bytes + room + sum(bound.num_bytes for bound in self.bounds)

    @property
    def wait_ns(self) -> int:
        """Time that steps waited for reads."""
        return self.store.traffic.wait_ns

    @property
    def read_bytes(self) -> int:
        """Read from the disk so far."""
        return self.store.traffic.num_bytes

    def summary(self) -> str:
        """What fired and how it was read, in a few words."""
        traffic, neurons = self.store.traffic, max(1, self.rows * self.store.index.neurons)
        return (
            f"neurons: {self.fired / neurons:.1%} fired, {self.predicted / neurons:.1%} were computed, in reads of "
            f"{format_bytes(traffic.num_bytes // max(1, traffic.reads))}"
        )

    def apply(self, layer: int, x_MD: Tensor) -> Tensor:
        """The FFN of a layer."""
        with torch.inference_mode():
            out = torch.zeros_like(x_MD, dtype=torch.float32)
            x = x_MD.float()
            gates = self._read_gate(layer, x) if self.predict == "gate" else None
            fires = self._fires(layer, x, gates)
            for rows in self._together(fires):
                neurons = np.flatnonzero(fires[rows].any(0).numpy())
                self.predicted += len(neurons) * (rows.stop - rows.start)
                for at in range(0, len(neurons), self.store.cap):
                    part = neurons[at : at + self.store.cap]
                    gate = None if gates is None else gates[rows][:, torch.from_numpy(part)]
                    out[rows] += self._some(layer, x[rows], part, gate)
            self.rows += len(x)
            return out.to(x_MD.dtype)

    def _fires(self, layer: int, x_MD: Tensor, gates_MF: Tensor | None) -> Tensor:
        if gates_MF is not None:
            return gates_MF > 0
        if self.predict == "all":
            return torch.ones(len(x_MD), self.store.index.neurons, dtype=torch.bool)
        return self.bounds[layer].may_fire(x_MD, self.sigmas)

    def _together(self, fires_MF: Tensor) -> list[slice]:
        """Runs of rows whose neurons fit together; a row alone may be more than the cap."""
        if self.predict == "all":
            return [slice(0, len(fires_MF))]
        runs, begin, union = [], 0, fires_MF[0]
        for row in range(1, len(fires_MF)):
            wider = union | fires_MF[row]
            if int(wider.sum()) > self.store.cap:
                runs.append(slice(begin, row))
                begin, wider = row, fires_MF[row]
            union = wider
        return [*runs, slice(begin, len(fires_MF))]

    def _some(self, layer: int, x_MD: Tensor, neurons: I64, gate_MN: Tensor | None) -> Tensor:
        """What these neurons add to each row."""
        slots, store = self.store.fetch(layer, neurons), self.store
        kind = _TYPES[store.index.format]
        rows = torch.from_numpy(store.slots(layer)).view(kind).index_select(0, torch.from_numpy(slots)).float()
        width, item = store.index.hidden, kind.itemsize
        up, down = (rows[:, store.place(p) // item :][:, :width] for p in BUNDLED[0][1:])
        if gate_MN is None:
            gate_MN = x_MD @ rows[:, store.place("gate") // item :][:, :width].T
        active = functional.relu(gate_MN)
        self.fired += int((active > 0).sum())
        return (active * (x_MD @ up.T)) @ down

    def _read_gate(self, layer: int, x_MD: Tensor) -> Tensor:
        """gate . x [M, F] from the group of gate alone, all of it read now."""
        assert self._room is not None
        index, store = self.store.index, self.store
        stride, kind = index.stride(0), _TYPES[index.format]
        step, parts = _GATE_BYTES // stride, []
        each = -(-step // store.readers)
        for begin in range(0, index.neurons, step):
            count = min(step, index.neurons - begin)
            jobs = [
                (index.offset(0, layer, begin + n), self._room.view[n * stride : min(n + each, count) * stride])
                for n in range(0, count, each)
            ]
            store.read(jobs, f"gate of layer {layer}")
            raw = torch.from_numpy(np.frombuffer(self._room.view, np.uint8, count * stride).reshape(count, stride))
            parts.append(x_MD @ raw.view(kind)[:, : index.hidden].float().T)
        return torch.cat(parts, 1)

    def close(self) -> None:
        """Give everything back. Idempotent."""
        self.store.close()
        self.bounds.clear()
        if self._room is not None:
            self._room.close()


class _SparseFfn(nn.Module):
    """A layer's part, where a Transformer wants a module."""

    def __init__(self, neurons: SparseNeurons, layer: int) -> None:
        super().__init__()
        self.neurons, self.layer = neurons, layer

    def forward(self, x_MD: Tensor) -> Tensor:
        return self.neurons.apply(self.layer, x_MD)
