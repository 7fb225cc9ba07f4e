"""Rotary embeddings: what files say about them, and the frequencies that follow.

NumPy only, so that the native backend and the torch modules share one set of frequencies.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from megalith.base.errors import ModelFormatError
from megalith.model.fields import Fields
from megalith.specs.model import Rope


def inverse_frequencies(rope: Rope, head_dim: int) -> NDArray[np.float32]:
    """Radians per position of each of the head_dim / 2 pairs, with scaling applied, [head_dim / 2] float32.

    Computed in float32 step by step, as training frameworks do: at position 1,000 a frequency that is "more exact" by
    one unit in the last place moves Gemma 3's logits by 0.01.

    Llama 3 scaling (Llama 3.1 model card and reference code, July 2024): pairs whose wavelength is beyond
    original_context / low_freq_factor are slowed by `factor`, those below original_context / high_freq_factor are left
    alone, and between the two the divisor is interpolated linearly in 1 / wavelength.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    base: NDArray[np.float32] = np.asarray(np.float32(1) / np.power(np.float32(rope.theta), exponents))
    if rope.scaling == "linear":
        return np.asarray(base / np.float32(rope.factor))
    if rope.scaling == "llama3":
        return np.asarray(base * _llama3_multipliers(rope, base), np.float32)
    return base


def _llama3_multipliers(rope: Rope, base: NDArray[np.float32]) -> NDArray[np.float64]:
    turns = rope.original_context * base.astype(np.float64) / (2 * math.pi)
    kept = np.clip((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor), 0.0, 1.0)
    return (1 - kept) / rope.factor + kept


def rope_from_factors(factors: NDArray[np.float32], theta: float, head_dim: int, origin: str) -> Rope:
    """The Llama 3 scaling behind GGUF's divisors of each pair's frequency (tensor `rope_freqs.weight`).

    Raises ModelFormatError if they are not of that form.
    """
    if np.allclose(factors, 1.0, rtol=1e-6):
        return Rope(theta=theta)
    base = inverse_frequencies(Rope(theta=theta), head_dim)
    rope = Rope(theta=theta, scaling="llama3", factor=float(factors.max()), low_freq_factor=1.0, high_freq_factor=4.0)
    divisors = 1.0 / _llama3_multipliers(rope, base) if rope.factor >= 1.0 else np.zeros_like(base)
    if not np.allclose(factors, divisors, rtol=1e-4):
        raise ModelFormatError(
            f"{origin}: rope_freqs.weight does not follow Llama 3's rule (low factor 1, high factor 4, context 8192): "
            f"its largest divisor is {rope.factor:g}."
        )
    return rope


def rope_from_hf(config: Fields, layer_type: str = "", default_theta: float = 10_000.0) -> Rope:
    """The rotary embedding of a Hugging Face config, of its layers of `layer_type` where it has several.

    Reads both spellings: `rope_theta` + `rope_scaling` (transformers 4) and `rope_parameters` (transformers 5).
    Raises ModelFormatError for a scaling we do not have.
    """
    parameters = config.section("rope_parameters")
    if layer_type and parameters.present(layer_type):
        parameters = parameters.section(layer_type)
    elif not parameters.present("rope_theta"):
        scaling = config.section("rope_scaling")
        local = layer_type == "sliding_attention"
        theta = default_theta if local else config.number("rope_theta", default_theta)
        # Gemma 3 scales its global layers only.
        return _scaled(Fields({}, config.origin) if local else scaling, theta)
    return _scaled(parameters, parameters.number("rope_theta", default_theta))


def _scaled(parameters: Fields, theta: float) -> Rope:
    if parameters.number("partial_rotary_factor", 1.0) != 1.0:
        raise parameters.bad("partial_rotary_factor", "1: partial rotary embedding is not supported")
    kind = parameters.text("rope_type", parameters.text("type", "default"))
    if kind == "default":
        return Rope(theta=theta)
    if kind == "linear":
        return Rope(theta=theta, scaling="linear", factor=_positive(parameters, "factor"))
    if kind == "llama3":
        low, high = _positive(parameters, "low_freq_factor"), _positive(parameters, "high_freq_factor")
        if low >= high:
            raise parameters.bad("low_freq_factor", f"below high_freq_factor {high:g}")
        return Rope(
            theta=theta,
            scaling="llama3",
            factor=_positive(parameters, "factor"),
            low_freq_factor=low,
            high_freq_factor=high,
            original_context=parameters.integer("original_max_position_embeddings"),
        )
    raise ModelFormatError(
        f"{parameters.origin}: rotary scaling {kind!r} is not supported.", "Supported: default, linear, llama3."
    )


def _positive(parameters: Fields, key: str) -> float:
    value = parameters.number(key)
    if value <= 0:
        raise parameters.bad(key, "above 0")
    return value
