"""Profile: the constants of one machine or device that turn bytes and multiply-adds into time, with source and date.

A profile is either carried over from a catalogue device or fitted to measurements. Knows rates. Must not know models.
"""

from __future__ import annotations

from typing import Literal

from megalith.base.config import Config
from megalith.base.errors import ConfigError
from megalith.base.units import NS_PER_S
from megalith.specs.device import DeviceSpec
from megalith.specs.model import ModelSpec

RunnerKind = Literal["native", "torch-cpu", "cuda"]


class Rates(Config, kw_only=True):
    """What one unit of each kind of work costs, in nanoseconds; the whole time model of a step (see `compute`)."""

    step_ns: float
    """Fixed time of a step."""
    op_ns: float = 0.0
    """Fixed time of a layer."""
    sequence_ns: float = 0.0
    """Time of each sequence in the batch, whatever its length."""
    row_value_ns: float = 0.0
    """Element-wise work: one activation value of one row."""
    weight_byte_ns: float
    """Streaming one byte of weights."""
    mac_ns: float
    """One multiply-add of the linear layers."""
    logit_mac_ns: float
    """One multiply-add of the head."""
    kv_byte_ns: float
    """Reading one byte of KV for a decode."""
    pair_mac_ns: float
    """One multiply-add of attention in a prompt chunk."""
    combine: float = 1.0
    """Exponent p of (t_memory**p + t_compute**p)**(1/p): 1 adds them, a large p takes the larger one."""
    row_factors: tuple[tuple[int, float], ...] = ()
    """(rows, factor on `mac_ns`), ascending, interpolated in log2(rows): kernels are less efficient on few rows."""


class Band(Config, kw_only=True):
    """Measured divided by predicted: the quantiles that hold nine cases of ten, with where they come from."""

    low: float
    high: float
    source: str


class Power(Config, kw_only=True):
    """Power of one device by how busy its parts are (see `energy`)."""

    idle_w: float
    peak_w: float
    compute_share: float = 1.0
    memory_share: float = 0.555
    link_share: float = 0.1
    error: float = 0.3
    """Half width of the band, as a fraction."""
    source: str


class Profile(Config, kw_only=True):
    """One device as the cost formulas see it."""

    name: str
    kind: RunnerKind
    memory_bytes: int
    rates: Rates
    number: str = "bf16"
    """Number type of the matrix products."""
    peer_bytes_per_s: float = 0.0
    """Achieved, one direction, between devices of a group; 0 where there are none."""
    peer_latency_ns: float = 10_000.0
    max_group: int = 1
    band: Band
    """Of step times whose attention part is small."""
    power: Power | None = None
    price_per_hour_usd: float | None = None
    fitted_on: str = ""
    """Shape (`model_shape`) of the model whose steps the rates were fitted to; empty where they are of no model."""
    source: str
    date: str
    raw: dict[str, float] = {}
    """Further measured figures (bytes/s of memory and disk, matrix products by shape), for people and later uses."""
    versions: dict[str, str] = {}


OTHER_MODEL_LOW, OTHER_MODEL_HIGH = 0.75, 1.6
"""Widening of a fitted band for another model: Gemma 3 270M on SmolLM2's profile needed it (docs/prediction.md)."""


def model_shape(spec: ModelSpec) -> str:
    """What makes two models the same to a fitted profile, whatever they are called."""
    return f"{spec.num_layers}x{spec.hidden}x{spec.ffn}x{spec.vocab}"


def band_for(profile: Profile, spec: ModelSpec) -> Band:
    """The band of a profile for a model: wider for one that it was not fitted on."""
    if not profile.fitted_on or profile.fitted_on == model_shape(spec):
        return profile.band
    return Band(
        low=profile.band.low * OTHER_MODEL_LOW,
        high=profile.band.high * OTHER_MODEL_HIGH,
        source=f"{profile.band.source}; widened, because this is another model",
    )


def number_for(weight_format: str, device: DeviceSpec) -> str:
    """The number type that a device multiplies in when weights come in `weight_format`."""
    name = weight_format.lower()
    if name in ("fp8", "int8", "fp4") and name in device.flops_per_s:
        return name
    if name in ("f32", "fp32", "float32"):
        return "fp32"
    return "bf16" if "bf16" in device.flops_per_s else "fp16"


def from_device(device: DeviceSpec, weight_format: str = "bf16") -> Profile:
    """The profile of a catalogue device: data-sheet peaks times the fractions that real kernels reach."""
    number = number_for(weight_format, device)
    reach = device.achievable
    compute = reach.compute.get(number, min(reach.compute.values()))
    flops_per_s = device.peak_flops_per_s(number) * compute
    wide = "bf16" if "bf16" in device.flops_per_s else "fp16"
    attention_flops_per_s = device.peak_flops_per_s(wide) * reach.compute.get(wide, compute) * 0.5
    byte_ns = NS_PER_S / (device.memory_bytes_per_s * reach.memory)
    if flops_per_s <= 0 or byte_ns <= 0:
        raise ConfigError(f"Device {device.name} has a rate of zero for {number}.", "Correct its catalogue entry.")
    rates = Rates(
        step_ns=float(reach.step_ns),
        op_ns=6.0 * reach.op_ns,
        sequence_ns=0.0,
        row_value_ns=4.0 * byte_ns,
        weight_byte_ns=byte_ns,
        mac_ns=2.0 * NS_PER_S / flops_per_s,
        logit_mac_ns=2.0 * NS_PER_S / (device.peak_flops_per_s(wide) * reach.compute.get(wide, compute)),
        kv_byte_ns=byte_ns,
        pair_mac_ns=2.0 * NS_PER_S / attention_flops_per_s,
        combine=3.0,
    )
    return Profile(
        name=device.name, kind="cuda", memory_bytes=device.memory_bytes, rates=rates, number=number,
        peer_bytes_per_s=device.link_bytes_per_s.get("peer", device.link_bytes_per_s.get("host", 0)) * reach.link,
        max_group=max(device.max_group, 1),
        band=Band(low=1.0 - reach.residual, high=1.0 + 2.0 * reach.residual, source=_band_source(device)),
        power=_power(device), price_per_hour_usd=device.price_per_hour_usd,
        source=f"{device.source}; reached: {reach.source}", date=device.date,
    )  # fmt: skip


def _band_source(device: DeviceSpec) -> str:
    if not device.achievable.measured:
        return f"default of the catalogue entry {device.name}, whose rates come from a sibling or an assumption"
    return (
        "default for devices with measured operator tables; it held 97 % of 380 published runs on H100 and B200 "
        "(docs/prediction.md)"
    )


def _power(device: DeviceSpec) -> Power | None:
    if device.tdp_w is None:
        return None
    idle = 0.16 * device.tdp_w if device.idle_w is None else device.idle_w
    return Power(
        idle_w=idle, peak_w=device.tdp_w,
        source="shares such that A100 draws 400 W in the prompt phase and 250 W in the token phase (POLCA)",
    )  # fmt: skip
