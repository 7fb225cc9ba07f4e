"""Matrix-product and attention rates of what computes here: the native library and torch. Part of `probe`.

torch is imported when asked, and only if it is installed.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from megalith.base.errors import MachineError
from megalith.base.units import NS_PER_S

ROWS = (1, 8, 32, 128, 512)
SHAPES = ((576, 1536), (2048, 2048))
"""(inputs, outputs): the FFN of a 135M model, and one that does not fit a core's own cache."""
_BUDGET_NS = 120_000_000
_ATTENTION = ((1, 512), (32, 512), (1, 4096))
"""(sequences, context) of the decode attention that is timed; heads as in SmolLM2 135M."""


def versions() -> dict[str, str]:
    """Versions of the libraries that compute."""
    found = {}
    for package in ("torch",):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _torch(threads: int) -> Any:
    if importlib.util.find_spec("torch") is None:
        raise MachineError("torch is not installed, so its rows are left out.", "Install megalith[engine].")
    import torch

    torch.set_num_threads(threads)
    return torch


def torch_figures(threads: int) -> Iterator[tuple[str, float]]:
    """FLOP/s of a linear layer by number type and shape, and the best multiply-add rate of all."""
    from megalith.engine.probe import best_ns

    torch = _torch(threads)
    best = 0.0
    with torch.inference_mode():
        for name, kind in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            for inputs, outputs in SHAPES:
                weight = torch.randn(outputs, inputs).to(kind)
                for rows in ROWS:
                    x = torch.randn(rows, inputs).to(kind)
                    duration_ns = best_ns(partial(torch.nn.functional.linear, x, weight), _BUDGET_NS)
                    flops_per_s = 2 * rows * inputs * outputs * NS_PER_S / duration_ns
                    best = max(best, flops_per_s)
                    yield f"torch_linear_{name}_{rows}x{inputs}x{outputs}_flops_per_s", flops_per_s
    yield "linear_torch_cpu_macs_per_s", best / 2


def attention_figures(threads: int) -> Iterator[tuple[str, float]]:
    """KV bytes a second of decode attention, and FLOP/s of a causal prompt of 512 tokens (9 heads of 64, fp32)."""
    from megalith.engine.probe import best_ns

    torch = _torch(threads)
    attend = torch.nn.functional.scaled_dot_product_attention
    with torch.inference_mode():
        for sequences, context in _ATTENTION:
            q = torch.randn(sequences, 3, 3, 64)
            k, v = torch.randn(sequences, 3, context, 64), torch.randn(sequences, 3, context, 64)
            duration_ns = best_ns(partial(attend, q, k, v), _BUDGET_NS)
            yield f"torch_attention_decode_{sequences}x{context}_bytes_per_s", 2 * k.nbytes * NS_PER_S / duration_ns
        q = torch.randn(1, 9, 512, 64)
        duration_ns = best_ns(partial(attend, q, q, q, is_causal=True), _BUDGET_NS)
        yield "torch_attention_prompt_512_flops_per_s", 2 * 9 * 64 * 512 * 513 * NS_PER_S / duration_ns


def native_figures(threads: int) -> Iterator[tuple[str, float]]:
    """FLOP/s of the native kernels on one thread by format and shape; the best multiply-add rate times `threads`."""
    from megalith.engine.native import binding, single
    from megalith.engine.probe import best_ns

    library, best = binding.load(), 0.0
    draw = np.random.default_rng(1)
    for name, (elements, size) in (("Q4_1", (32, 20)), ("Q8_0", (32, 34))):
        for inputs, outputs in SHAPES:
            blocks = inputs // elements * outputs
            raw = draw.integers(0, 256, (blocks, size), dtype=np.uint8)
            # The scales are half floats: make them small finite numbers.
            raw[:, 1] = 0x1C
            if name == "Q4_1":
                raw[:, 3] = 0x1C
            matrix = single.PackedMatrix(library, name, raw.reshape(outputs, -1), (outputs, inputs))
            for rows in ROWS:
                x = draw.standard_normal((rows, inputs), np.float32)
                duration_ns = best_ns(partial(matrix.multiply, x), _BUDGET_NS)
                flops_per_s = 2 * rows * inputs * outputs * NS_PER_S / duration_ns
                best = max(best, flops_per_s)
                yield f"native_linear_{name.lower()}_{rows}x{inputs}x{outputs}_flops_per_s", flops_per_s
    yield "linear_native_macs_per_s", best / 2 * threads
