"""A module behind a window of its layers: the same bits forward and backward, few bytes near, failures that name."""

from __future__ import annotations

import copy
import gc
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megalith.base.errors import ConfigError, PoolFull, TierError
from megalith.engine.layer_far import Far, FarFile, FarMemory
from megalith.engine.layer_window import ModuleWindow
from megalith.tier.pool import Pool


class Vit(nn.Module):
    """A vision transformer of plain parts."""

    def __init__(self, layers: int = 10, width: int = 64) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 4, 4)
        self.place = nn.Parameter(torch.randn(1, 16, width) / 10)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        for parameter in self.encoder.parameters():
            nn.init.normal_(parameter, std=0.1)
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch(images).flatten(2).transpose(1, 2) + self.place
        return self.head(self.encoder(x).mean(1))


class Block(nn.Module):
    """A residual block with batch norm, whose running figures are buffers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.body(x))


class Convnet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.blocks = nn.ModuleList(Block(16) for _ in range(6))
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


class Tied(nn.Module):
    """Layers that share a matrix with each other and with the head, one of them run twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16)) for _ in range(5))
        self.layers[3][0].weight = self.layers[1][0].weight
        self.layers[4][2].bias = nn.Parameter(self.layers[0][2].bias.data)  # two parameters, one memory
        self.head = nn.Linear(16, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in [*self.layers, self.layers[2]]:
            x = x + layer(x)
        return self.head(x)


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    torch.manual_seed(1)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def images() -> Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], nn.ModuleList], Callable[[], Tensor]]] = {
    "vit": (Vit, lambda m: m.encoder.layers, images),  # type: ignore[union-attr, return-value]
    "convnet": (Convnet, lambda m: m.blocks, images),  # type: ignore[return-value]
    "channels-last": (
        lambda: Convnet().to(memory_format=torch.channels_last),  # type: ignore[call-overload]
        lambda m: m.blocks, images,  # type: ignore[return-value]
    ),
    "tied": (Tied, lambda m: m.layers, lambda: torch.arange(40).view(2, 20)),  # type: ignore[return-value]
}  # fmt: skip


def far_of(kind: str, folder: Path) -> Far:
    return FarFile(folder) if kind == "disk" else FarMemory()


def gradients(module: nn.Module, given: Tensor) -> dict[str, Tensor]:
    module.zero_grad()
    out = module(given)
    (out.float() ** 2).sum().backward()
    found = {name: parameter.grad.clone() for name, parameter in module.named_parameters()}  # type: ignore[union-attr]
    return {"": out.detach(), **found}


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name
        assert not value.isnan().any()


@pytest.mark.parametrize(
    ("kind", "k", "k_prime"), [("disk", 1, 1), ("memory", 2, 1), ("memory", 4, 2), ("disk", 3, 3), ("memory", 99, 1)]
)
@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients_have_the_bits_of_memory(
    name: str, kind: str, k: int, k_prime: int, tmp_path: Path
) -> None:
    make, layers_of, given = MODELS[name]
    plain = make()
    module = copy.deepcopy(plain)
    with ModuleWindow(module, layers_of(module), k, k_prime, far=far_of(kind, tmp_path)) as window:
        for _ in range(2):
            assert_same(gradients(module, given()), gradients(plain, given()))
        plain.eval()
        module.eval()
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                for _ in range(2):
                    assert torch.equal(module(given()), plain(given()))
        assert_same(gradients(module, given()), gradients(plain, given()))
        assert window.pool.peak_bytes <= window.cap_bytes
    assert_same(dict(module.state_dict()), dict(plain.state_dict()))
    assert list(tmp_path.iterdir()) == []


def test_peak_is_the_windows_share_of_the_weights() -> None:
    """k = 0.4 L: 60 % less; the parameters that are out hold nothing."""
    module = Vit()
    whole = sum(parameter.nbytes for parameter in module.encoder.layers.parameters())
    with ModuleWindow(module, module.encoder.layers, 4, 2) as window:
        gradients(module, images())
        assert window.num_bytes == pytest.approx(whole, rel=0.05)
        assert window.pool.peak_bytes == pytest.approx(0.4 * whole, rel=0.05)
        held = [p.untyped_storage().nbytes() for p in module.encoder.layers[9].parameters()]
        assert held == [4] * len(held)
        assert module.encoder.layers[9].linear1.weight.shape == (256, 64)


def test_an_optimizer_steps_layer_by_layer_or_inside_the_backward(tmp_path: Path) -> None:
    plain = Vit(5, 32)
    visited, inside = copy.deepcopy(plain), copy.deepcopy(plain)

    def adam(module: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.Adam(module.parameters(), 0.01)

    whole = adam(plain)
    with (
        ModuleWindow(visited, visited.encoder.layers, 3, far=FarFile(tmp_path)) as window,
        ModuleWindow(inside, inside.encoder.layers, 2, 2),
    ):
        optimizers = {layer: adam(layer) for layer in visited.encoder.layers}
        rest = torch.optim.Adam(
            [p for n, p in visited.named_parameters() if not n.startswith("encoder.layers")], 0.01
        )  # fmt: skip
        each = {parameter: torch.optim.Adam([parameter], 0.01) for parameter in inside.parameters()}

        def step(parameter: Tensor) -> None:
            each[parameter].step()  # type: ignore[index]

        for parameter in inside.parameters():
            parameter.register_post_accumulate_grad_hook(step)
        for _ in range(3):
            expected = gradients(plain, images())
            assert_same(gradients(visited, images()), expected)
            assert_same(gradients(inside, images()), expected)
            whole.step()
            rest.step()
            for layer in window.visit():
                optimizers[layer].step()
        with pytest.raises(RuntimeError, match="single memory location"):
            adam(visited.encoder.layers[1]).step()
    assert_same(dict(visited.state_dict()), dict(plain.state_dict()))
    assert_same(dict(inside.state_dict()), dict(plain.state_dict()))


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpoints_still_save_memory_and_give_the_same_bits(reentrant: bool) -> None:
    class Checkpointed(Convnet):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=reentrant)
            return self.head(x.mean((2, 3)))

    runs = [0]

    def counted(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        runs[0] += 1

    plain = Checkpointed()
    module = copy.deepcopy(plain)
    module.blocks[0].body[0].register_forward_pre_hook(counted)
    with ModuleWindow(module, module.blocks, 2):
        assert_same(gradients(module, images()), gradients(plain, images()))
    assert runs == [2], "run again in the backward"


def test_activations_are_freed_with_the_graph() -> None:
    """An operation that saves its own result (tanh) must not keep itself alive through our note of it."""
    made: list[weakref.ref[object]] = []

    class Mark:
        pass

    class Marked(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.mark = Mark()
            made.append(weakref.ref(ctx.mark))
            return x.clone()

    class Layer(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(Marked.apply(super().forward(x)))

    module = nn.Sequential(Layer(8, 8), Layer(8, 8), Layer(8, 8))
    gc.disable()
    try:
        with ModuleWindow(module, module, 2):
            out = module(torch.randn(1, 8))
            assert [ref() is not None for ref in made] == [True] * 3
            del out
            assert [ref() for ref in made] == [None] * 3
    finally:
        gc.enable()


def test_a_failing_forward_leaves_the_window_usable() -> None:
    plain = Vit()
    module = copy.deepcopy(plain)
    with ModuleWindow(module, module.encoder.layers, 3):
        for _ in range(2):
            with pytest.raises((RuntimeError, AssertionError)):
                module.encoder(torch.randn(1, 4, 63))
            with pytest.raises((RuntimeError, AssertionError)):
                module.encoder.layers[7](torch.randn(1, 4, 63))
            assert_same(gradients(module, images()), gradients(plain, images()))
        out = module(images())
        module.encoder.layers[8](torch.randn(1, 4, 64))  # out of turn, between forward and backward
        module.zero_grad()
        (out**2).sum().backward()
        assert torch.equal(module.encoder.layers[0].linear1.weight.grad, plain.encoder.layers[0].linear1.weight.grad)


def test_layers_that_are_not_in_the_window_cannot_be_misused() -> None:
    module = Vit()
    window = ModuleWindow(module, module.encoder.layers, 2)
    with pytest.raises(ConfigError, match="has a window already"):
        ModuleWindow(module, module.encoder.layers, 2)
    with pytest.raises(TierError, match="Close the window"):
        module.state_dict()
    x = torch.randn(1, 4, 64, requires_grad=True)
    (first,) = torch.autograd.grad(module.encoder(x).sum(), x, retain_graph=True)
    assert not first.isnan().any()
    with pytest.raises(TierError, match="second derivative"):
        torch.autograd.grad(module.encoder(x).sum(), x, create_graph=True)
    # Past the hooks: a product made outside of a layer's forward while its weight was near.
    weight = module.encoder.layers[0].linear2.weight
    layer = iter(window.visit())
    next(layer)
    stale = (torch.randn(3, 256, requires_grad=True) @ weight.t()).sum()
    layer.close()  # type: ignore[attr-defined]
    module(images())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stale.backward()
    out = module(images())
    window.close()
    window.close()
    with pytest.raises(TierError, match="after it was closed"):
        out.sum().backward()
    assert "forward" not in module.encoder.layers[0].__dict__
    with ModuleWindow(module, module.encoder.layers, 2):
        gradients(module, images())


def test_versions_of_other_saved_tensors_are_still_watched() -> None:
    class Spoils(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Tanh()])

        def forward(self, x: Tensor) -> Tensor:
            return self.layers[1](self.layers[0](x)).mul_(2)

    module = Spoils()
    with ModuleWindow(module, module.layers, 1), pytest.raises(RuntimeError, match="modified by an inplace"):
        module(torch.randn(3, 4)).sum().backward()


def test_windows_that_cannot_be_leave_the_module_as_it_was() -> None:
    module = Vit()
    before = gradients(module, images())
    with pytest.raises(ConfigError, match="cannot be"):
        ModuleWindow(module, module.encoder.layers, 1, 2)
    with pytest.raises(ConfigError, match="no layers"):
        ModuleWindow(module, [], 1)
    with pytest.raises(PoolFull, match="layer 2 asked"):
        ModuleWindow(module, module.encoder.layers, 1, far=FarMemory(Pool("host", 500_000)))
    assert_same(gradients(module, images()), before)


class Broken(FarMemory):
    """Far memory that fails for one layer."""

    reads = writes = -1

    def read_into(self, part: int, view: memoryview) -> None:
        if part == self.reads:
            raise TierError(f"layer {part} cannot be read")
        super().read_into(part, view)

    def write(self, part: int, view: memoryview) -> None:
        if part == self.writes:
            raise TierError(f"layer {part} cannot be written")
        super().write(part, view)


def add_one(window: ModuleWindow) -> None:
    for layer in window.visit():
        layer.linear1.bias += 1  # type: ignore[union-attr, operator]


def test_a_far_tier_that_fails_is_named_and_the_next_call_tries_again() -> None:
    plain = Vit()
    module, far = copy.deepcopy(plain), Broken()
    with ModuleWindow(module, module.encoder.layers, 3, far=far) as window:
        far.reads = 5
        with pytest.raises(TierError, match="layer 5 cannot be read"):
            module(images())
        far.reads = -1
        assert_same(gradients(module, images()), gradients(plain, images()))
        far.writes = 4
        with torch.no_grad(), pytest.raises(TierError, match="layer 4 cannot be written"):
            add_one(window)
        far.writes = -1
        module(images())  # what could not be written is still there, and is written now
    done = [
        n for n in range(10)
        if torch.equal(module.encoder.layers[n].linear1.bias, plain.encoder.layers[n].linear1.bias + 1)
    ]  # fmt: skip
    assert set(done) >= {0, 1, 2, 3, 4}
    assert window.pool.used_bytes == 0


def test_a_corrupted_layer_is_named(tmp_path: Path) -> None:
    far = FarFile(tmp_path)
    module = Vit(4)
    window = ModuleWindow(module, module.encoder.layers, 1, far=far)
    offset, _ = far._blocks[2]
    os.pwrite(far._file._plain, b"\x55" * 9, offset + 1000)
    far._file.sync()
    with pytest.raises(TierError, match=r"window/layer\.2 .*corrupted"):
        module(images())
    with pytest.raises(TierError, match=r"window/layer\.2 .*corrupted"):
        window.close()
    with pytest.raises(TierError, match="cannot hold layers"):
        FarFile(Path("/proc/no-such-folder"))


def test_a_second_thread_does_not_take_a_layer_that_runs() -> None:
    module = Vit(4)
    entered, go_on = threading.Event(), threading.Event()

    class Slow(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            entered.set()
            assert go_on.wait(10)
            return x

    module.encoder.layers[1].dropout1 = Slow()
    results: list[object] = []

    def run() -> None:
        with torch.no_grad():
            results.append(module.encoder.layers[1](x))

    x = torch.randn(1, 4, 64)
    plain = copy.deepcopy(module)
    with ModuleWindow(module, module.encoder.layers, 1):
        thread = threading.Thread(target=run)
        thread.start()
        assert entered.wait(10)
        with pytest.raises(TierError, match="Layer 1 is running"), torch.no_grad():
            module.encoder.layers[3](x)
        go_on.set()
        thread.join(10)
        with torch.no_grad():
            assert torch.equal(results[0], plain.encoder.layers[1](x))  # type: ignore[arg-type]
            module(images())
