"""What the points of the Superpipeline study run: real modules behind a window, over a link of an imposed rate.

The vision model is plain torch with random weights, the language model is SmolLM2. Compute times are taken from the
module with all its layers in memory, in the same process and just before and after; the windowed steps are then
measured and held against the prediction from those.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from megalith.base.confined import Confinement, Peak, run_confined
from megalith.base.errors import MachineError
from megalith.base.units import GIB, MIB, NS_PER_S
from megalith.cost.layer_window import inference_turns, training_turns, walk_ns
from megalith.policy.residency import LayerWindow
from megalith.tier.mover import Mover
from megalith.tier.throttle import TokenBucket

if TYPE_CHECKING:
    from torch import Tensor, nn

    from megalith.engine.layer_far import Far
    from megalith.engine.layer_window import ModuleWindow

LAYERS, WIDTH = 20, 384
_REPEATS = 3
Figures = dict[str, float | None]


@cache
def _vision(layers: int = LAYERS, width: int = WIDTH) -> Any:
    """A vision transformer of plain torch parts, random weights."""
    import torch
    from torch import nn

    torch.manual_seed(3)
    torch.set_num_threads(1)  # The other core moves.

    class Vision(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch = nn.Conv2d(3, width, 8, 8)
            self.layers = nn.ModuleList()
            self.head = nn.Linear(width, 100)

        def forward(self, images: Tensor) -> Tensor:
            x = self.patch(images).flatten(2).transpose(1, 2)
            for layer in self.layers:
                x = layer(x)
            out: Tensor = self.head(x.mean(1))
            return out

        def new_layer(self) -> nn.Module:
            layer = nn.TransformerEncoderLayer(
                width, 8, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True, bias=True
            )
            self.layers.append(layer)
            return layer

    model = Vision()
    for _ in range(layers):
        model.new_layer()
    return model


def _images() -> Tensor:
    import torch

    return torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(4))


@cache
def _language() -> tuple[Any, Callable[[nn.Module], Tensor]]:
    """SmolLM2 in float32 as our Transformer, and a pass of a text over it."""
    import torch

    from megalith.model.open import open_model
    from megalith.model.transformer import Transformer, causal_attention

    torch.set_num_threads(1)
    opened = open_model("smollm2")
    model = Transformer(opened.checkpoint)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    ids = torch.tensor(opened.tokenizer.encode("A window slides over the layers of a model that does not fit."))

    def run(module: nn.Module) -> Tensor:
        attend = causal_attention(opened.spec, [0, len(ids)])
        logits: Tensor = module.head(module(ids, torch.arange(len(ids)), attend))  # type: ignore[operator]
        return logits

    return model, run


def memory(options: Mapping[str, Any]) -> Figures:
    """Near bytes at k = 0.4 L, and whether outputs and gradients are those of memory, bit by bit."""
    import torch

    from megalith.engine.layer_window import ModuleWindow

    if options["model"] == 1.0:
        model, run = _language()
    else:
        model, run = _vision(), lambda module: module(_images())

    def outcome() -> list[Tensor]:
        model.zero_grad()
        out = run(model)
        (out.float() ** 2).mean().backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            again = run(model)
        return [out.detach(), again, *(parameter.grad for parameter in model.parameters())]

    whole = float(sum(parameter.nbytes for layer in model.layers for parameter in layer.parameters()))
    total = float(sum({parameter.data_ptr(): parameter.nbytes for parameter in model.parameters()}.values()))
    if options["arm"] != "window":
        return {"near_mb": whole / MIB, "all_mb": total / MIB, "saved": 0.0, "same": 1.0}
    expected = [tensor.clone() for tensor in outcome()]
    with ModuleWindow(model, model.layers, round(0.4 * len(model.layers)), 1) as window:
        found = outcome()
        same = all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    model.zero_grad()
    near = float(window.pool.peak_bytes)
    return {
        "near_mb": near / MIB, "all_mb": (total - whole + near) / MIB, "saved": 1 - near / whole, "same": float(same)
    }  # fmt: skip


def curve(options: Mapping[str, Any]) -> Figures:
    """Seconds of a step of the vision model over k, measured, and predicted from the step in memory."""
    import torch

    from megalith.engine.layer_far import FarFile, FarMemory
    from megalith.engine.layer_window import ModuleWindow

    model, images = _vision(), _images()
    train = options["kind"] == "training"
    model.train(train)
    layer_bytes = sum(parameter.nbytes for parameter in model.layers[0].parameters())
    if options["arm"] != "window":
        times = [_step(model, images, train) for _ in range(_REPEATS + 1)][1:]
        return {"step_s": median(sum(two) for two in times) / NS_PER_S, "near_mb": LAYERS * layer_bytes / MIB}
    k, k_prime = int(options["k"]), int(options["k_prime"])
    before = [_step(model, images, train) for _ in range(_REPEATS + 1)][1:]
    layers, model.layers = model.layers, torch.nn.ModuleList()
    rest = [_step(model, images, train) for _ in range(_REPEATS)]
    model.layers = layers
    forward, backward = (median(two[part] for two in before) for part in (0, 1))
    rests = tuple(median(two[part] for two in rest) for part in (0, 1))
    compute = (forward - rests[0]) / LAYERS
    with tempfile.TemporaryDirectory() as folder:
        far: Far = FarFile(Path(folder)) if options["kind"] == "disk" else FarMemory()
        with _mover(options, layer_bytes, compute) as (mover, move_ns):
            window = ModuleWindow(model, model.layers, k, k_prime, far=far, mover=mover, link="link")
            with window:
                if move_ns is None:
                    move_ns = _alone(far, layer_bytes)
                times = [_step(model, images, train) for _ in range(_REPEATS + 2)][2:]
            measured = sum(sum(two) for two in times) / len(times)
    turns = inference_turns(LAYERS, compute, rests[0])
    if train:
        turns = training_turns(LAYERS, compute, (backward - rests[1]) / LAYERS, (rests[0], rests[1]))
    policy = LayerWindow(LAYERS, k, k_prime, turns=train)
    predicted = walk_ns(policy, turns, [move_ns] * LAYERS, _REPEATS + 2)
    return {
        "step_s": measured / NS_PER_S, "predicted_s": predicted / NS_PER_S, "ratio": measured / predicted,
        "slower": measured / (forward + backward), "near_mb": window.pool.peak_bytes / MIB, "move_ms": move_ns / 1e6,
        "layer_ms": compute / 1e6,
    }  # fmt: skip


@contextmanager
def _mover(options: Mapping[str, Any], layer_bytes: int, compute_ns: float) -> Iterator[tuple[Mover, float | None]]:
    """A mover whose link takes `moves` times as long for a layer as computing it; 0: no throttle."""
    ratio = float(options["moves"])
    rate = round(layer_bytes * NS_PER_S / (ratio * compute_ns)) if ratio else 0
    with Mover(workers=1) as mover:
        mover.add_link("link", TokenBucket(rate) if rate else None)
        yield mover, layer_bytes * NS_PER_S / rate if rate else None


def _alone(far: Far, layer_bytes: int) -> float:
    """What bringing a layer takes while nothing else runs, in ns."""
    from megalith.tier.memory import HugeBuffer

    times = []
    with HugeBuffer(layer_bytes + (1 << 13)) as buffer:
        for part in range(LAYERS):
            begin = time.perf_counter_ns()
            far.read_into(part, buffer.view)
            times.append(time.perf_counter_ns() - begin)
    return float(median(times[2:]))


def _step(model: Any, images: Tensor, train: bool) -> tuple[float, float]:
    """(forward, backward) of one step, in ns."""
    import torch

    begin = time.perf_counter_ns()
    if not train:
        with torch.no_grad():
            model(images)
        return float(time.perf_counter_ns() - begin), 0.0
    model.zero_grad()
    loss = (model(images) ** 2).mean()
    middle = time.perf_counter_ns()
    loss.backward()
    return float(middle - begin), float(time.perf_counter_ns() - middle)


def process(options: Mapping[str, Any]) -> Figures:
    """Peak of a process that runs the vision model, measured from outside (a memory group, or samples)."""
    peaks: list[Peak] = []
    wish = Confinement(4 * GIB, "auto")
    code = run_confined([sys.executable, "-m", __name__, str(options["arm"])], wish, peaks.append)
    if code:
        raise MachineError(f"The process of the arm {options['arm']} ended with {code}.", "Run it by itself.")
    return {"peak_mb": peaks[-1].peak_bytes / MIB}


def _inside(arm: str) -> None:
    """The process of one arm: 40 layers of 12 MiB and more, which in the window never are in memory together."""
    import torch

    from megalith.engine.layer_far import FarFile
    from megalith.engine.layer_stow import LayerStow
    from megalith.engine.layer_window import ModuleWindow

    model = _vision(0, 512)
    model.eval()
    images = _images()
    with tempfile.TemporaryDirectory() as folder:
        window: ModuleWindow | None = None
        stow = LayerStow(FarFile(Path(folder)))
        for _ in range({"idle": 1}.get(arm, PROCESS_LAYERS)):
            layer = model.new_layer().eval()
            if arm == "window":
                stow.add(layer)
        if arm == "window":
            window = ModuleWindow(model, model.layers, round(0.4 * PROCESS_LAYERS), stowed=stow)
        with torch.no_grad():
            for _ in range(2):
                model(images)
        if window is not None:
            window.close(restore=False)


PROCESS_LAYERS = 40

if __name__ == "__main__":
    _inside(sys.argv[1])
