"""An FFN from neurons on disk: what a dense one gives, under the cap, and failures that name what failed."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megalith.base.errors import ConfigError, DoesNotFit, TierError
from megalith.engine.neuron_file import APART, BUNDLED, GATE_APART, Groups, NeuronFile, ensure_neurons
from megalith.engine.neuron_store import NeuronStore
from megalith.engine.sparse_ffn import GateBound, Predict, SparseNeurons
from megalith.model.checkpoint import Tensor
from megalith.specs.model import ModelSpec

D, F, LAYERS = 96, 200, 2
SPEC = ModelSpec(
    name="relu", family="llama", num_layers=LAYERS, hidden=D, num_heads=4, num_kv_heads=2, head_dim=24, ffn=F, vocab=64,
    max_context=64, activation="relu",
)  # fmt: skip


class Random:
    """Weights of which about one neuron in eight fires; `kind` is F32 or BF16."""

    def __init__(self, kind: str = "F32") -> None:
        rng, self.kind = np.random.default_rng(5), kind
        self.values: dict[str, np.ndarray] = {}
        for layer in range(LAYERS):
            for part in ("gate", "up", "down"):
                shape = (D, F) if part == "down" else (F, D)
                found = (rng.standard_normal(shape) / D**0.5).astype(np.float32)
                if part == "gate":
                    found[:, 0] -= 1.2
                if kind == "BF16":
                    found = (found.view(np.uint32) & 0xFFFF0000).view(np.float32)
                self.values[f"layers.{layer}.{part}.weight"] = found

    def forget(self) -> None: ...

    def shape(self, name: str) -> tuple[int, ...]:
        return self.values[name].shape

    def stored_format(self, name: str) -> str:
        return self.kind

    def tensor(self, name: str) -> Tensor:
        found = self.values[name]
        raw = found if self.kind == "F32" else (found.view(np.uint32) >> 16).astype(np.uint16)
        return Tensor(name, found.shape, self.kind, np.ascontiguousarray(raw).view(np.uint8))

    def dense(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        gate, up, down = (torch.from_numpy(self.values[f"layers.{layer}.{p}.weight"]) for p in ("gate", "up", "down"))
        return (torch.relu(x @ gate.T) * (x @ up.T)) @ down.T


def rows(count: int, seed: int = 1) -> torch.Tensor:
    x = torch.randn(count, D, generator=torch.Generator().manual_seed(seed))
    x[:, 0] = 1.0
    return x


def opened(
    path: Path,
    weights: Random,
    groups: Groups = BUNDLED,
    predict: Predict = "bound",
    tokens: int = 3,
    share: float = 0.5,
) -> SparseNeurons:
    ensure_neurons(path, SPEC, weights, groups)
    file = NeuronFile(path)
    slots = (1,) if predict == "gate" else None
    budget = int(share * LAYERS * F * sum(file.index.stride(g) for g in slots or range(len(groups))))
    neurons = SparseNeurons(NeuronStore(file, tokens, budget, slots), predict)
    for layer in range(LAYERS):
        neurons.make(weights, layer)
    return neurons


ARMS: list[tuple[Groups, Predict, int]] = [
    (BUNDLED, "bound", 3), (BUNDLED, "bound", 0), (APART, "bound", 3), (GATE_APART, "gate", 3), (BUNDLED, "all", 0),
]  # fmt: skip


@pytest.mark.parametrize("kind", ["F32", "BF16"])
@pytest.mark.parametrize(("groups", "predict", "tokens"), ARMS)
def test_every_way_gives_what_a_dense_ffn_gives(
    kind: str, groups: Groups, predict: Predict, tokens: int, tmp_path: Path
) -> None:
    weights = Random(kind)
    neurons = opened(tmp_path / "n", weights, groups, predict, tokens)
    for step, count in enumerate((7, 1, 1, 1, 3)):
        x = rows(count, step)
        for layer in range(LAYERS):
            torch.testing.assert_close(neurons.apply(layer, x), weights.dense(layer, x), atol=2e-5, rtol=1e-4)
    assert neurons.fired
    neurons.close()
    neurons.close()


def test_window_and_bundles_change_no_bit(tmp_path: Path) -> None:
    weights, found = Random(), []
    for number, (groups, predict, tokens) in enumerate(ARMS[:3]):
        neurons = opened(tmp_path / str(number), weights, groups, predict, tokens)
        found.append([neurons.apply(layer, rows(1, step)) for step in range(6) for layer in range(LAYERS)])
        neurons.close()
    for other in found[1:]:
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(found[0], other, strict=True))


def test_each_technique_off_reads_more_or_smaller(tmp_path: Path) -> None:
    weights, traffic = Random(), []
    for number, (groups, predict, tokens) in enumerate(ARMS):
        neurons = opened(tmp_path / str(number), weights, groups, predict, tokens)
        for step in range(8):
            neurons.apply(0, rows(1, step))
        traffic.append(neurons.store.traffic)
        neurons.close()
    everything, no_window, no_bundles, no_predictor, naive = traffic
    assert everything.num_bytes < no_window.num_bytes < naive.num_bytes
    assert everything.num_bytes < no_predictor.num_bytes
    assert no_bundles.neurons == everything.neurons
    assert no_bundles.reads >= 2.5 * everything.reads
    assert naive.num_bytes == 8 * F * 4096  # all of a layer in every step


@given(seed=st.integers(0, 10**6), size=st.floats(1e-3, 1e3), spike=st.floats(0, 100))
@settings(max_examples=40, deadline=None)
def test_the_bound_misses_no_neuron(seed: int, size: float, spike: float) -> None:
    maker = torch.Generator().manual_seed(seed)
    gate, x = torch.randn(300, 64, generator=maker), size * torch.randn(3, 64, generator=maker)
    gate[:, 3] += spike  # an outlier makes the scale coarse
    bound = GateBound(gate)
    fires = x.double() @ gate.double().T > 0
    assert not (fires & ~bound.may_fire(x, None)).any()


def test_standard_deviations_are_tighter_than_the_bound() -> None:
    maker = torch.Generator().manual_seed(1)
    gate, x = torch.randn(2000, 256, generator=maker), torch.randn(4, 256, generator=maker)
    bound = GateBound(gate)
    fires = x @ gate.T > 0
    sure, likely = bound.may_fire(x, None), bound.may_fire(x, 4.0)
    assert fires.sum() < likely.sum() < sure.sum()
    assert not (fires & ~likely & ((x @ gate.T) > 0.2)).any()


def test_more_neurons_than_the_cap_go_in_turns(tmp_path: Path) -> None:
    weights = Random()
    neurons = opened(tmp_path / "n", weights, share=0.04)
    assert neurons.store.cap == 8
    x = rows(5)
    torch.testing.assert_close(neurons.apply(1, x), weights.dense(1, x), atol=2e-5, rtol=1e-4)
    assert len(neurons.store._slots[1]) <= 8
    neurons.close()


def test_a_window_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DoesNotFit, match="at the very least"):
        opened(tmp_path / "n", Random(), share=0.001)


def test_other_activations_are_refused(tmp_path: Path) -> None:
    import msgspec

    with pytest.raises(ConfigError, match="silu"):
        ensure_neurons(tmp_path / "n", msgspec.structs.replace(SPEC, activation="silu"), Random())


def test_a_file_cut_short_is_refused_and_none_is_left_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = ensure_neurons(tmp_path / "n", SPEC, Random())
    os.truncate(path, path.stat().st_size - 100)
    with pytest.raises(TierError, match="cut short"):
        NeuronFile(path)
    path.unlink()
    monkeypatch.setattr("megalith.engine.neuron_file._finish", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        ensure_neurons(path, SPEC, Random())
    assert list(tmp_path.iterdir()) == []


def test_a_corrupted_neuron_is_named_and_the_layer_goes_on_when_it_is_repaired(tmp_path: Path) -> None:
    path, weights = tmp_path / "n", Random()
    neurons = opened(path, weights)
    x = rows(1)
    fires = torch.relu(x @ torch.from_numpy(weights.values["layers.0.gate.weight"]).T)[0]
    neuron = int(fires.argmax())
    at = neurons.store.index.offset(0, 0, neuron) + 10
    before = path.read_bytes()[at : at + 1]
    for byte, good in ((bytes([before[0] ^ 1]), False), (before, True)):
        with path.open("r+b") as file:
            file.seek(at)
            file.write(byte)
            file.flush()
            os.fsync(file.fileno())
        if good:
            torch.testing.assert_close(neurons.apply(0, x), weights.dense(0, x), atol=2e-5, rtol=1e-4)
        else:
            with pytest.raises(TierError, match=f"Neuron {neuron} of layer 0"):
                neurons.apply(0, x)
    neurons.close()


@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_slots_hold_the_bundles_of_the_file_and_never_more_than_the_cap(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "held.neurons"
    weights = Random()
    ensure_neurons(path, SPEC, weights)
    tokens = data.draw(st.integers(0, 4))
    store = NeuronStore(NeuronFile(path), tokens, 40 * LAYERS * 4096, readers=2)
    try:  # A draw may end an example early.
        for _ in range(6):
            layer = data.draw(st.integers(0, 1))
            wanted = np.array(sorted(data.draw(st.sets(st.integers(0, F - 1), min_size=1, max_size=40))), np.int64)
            slots = store.fetch(layer, wanted)
            assert len(set(slots.tolist())) == len(wanted)
            held = store.slots(layer)[slots].view(np.float32)
            for place, part in enumerate(("gate", "up")):
                expected = weights.values[f"layers.{layer}.{part}.weight"][wanted]
                np.testing.assert_array_equal(held[:, place * D : (place + 1) * D], expected)
            expected = weights.values[f"layers.{layer}.down.weight"].T[wanted]
            np.testing.assert_array_equal(held[:, 2 * D : 3 * D], expected)
            assert len(store._slots[layer]) + len(store._free[layer]) == store.cap == 40
    finally:
        store.close()
