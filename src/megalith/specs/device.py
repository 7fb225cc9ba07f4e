"""DeviceSpec: what the data sheet of one accelerator says, and how much of it real kernels reach.

Knows figures and their sources. Must not know models, batches or formulas; those are `cost`.
"""

from __future__ import annotations

from typing import Literal

from megalith.base.config import Config

DeviceKind = Literal["gpu", "cpu", "accelerator"]


class Achievable(Config, kw_only=True):
    """The part of the data-sheet peaks that well-tuned kernels reach, as fractions of 1, with the source."""

    memory: float
    """Of `memory_bytes_per_s`, while streaming weights or KV."""
    compute: dict[str, float]
    """Of `flops_per_s`, by number type, for large matrix products."""
    link: float = 0.8
    op_ns: int = 3_000
    """Fixed time of one kernel beside its roofline time."""
    step_ns: int = 1_000_000
    """Fixed time of one engine step outside the device: scheduling, launch, sampling."""
    residual: float = 0.35
    """Half width of the error band, as a fraction: where such an estimate lies in nine cases of ten."""
    source: str
    measured: bool = False
    """True when the fractions come from measured tables of this device; False when carried over from a sibling."""


class DeviceSpec(Config, kw_only=True):
    """One device as its maker describes it. Peaks are dense (no structured sparsity)."""

    name: str
    title: str
    kind: DeviceKind
    memory_bytes: int
    memory_bytes_per_s: int
    flops_per_s: dict[str, float]
    """Dense peak by number type: fp32, tf32, fp16, bf16, fp8, int8, int4, fp4. Multiply-add counts as two."""
    link_bytes_per_s: dict[str, int] = {}
    """One direction: `peer` (NVLink, xGMI), `host` (PCIe), `network` (its share), `near` (slower attached memory)."""
    max_group: int = 8
    """Devices of one node that share the fast links; 1 when there are none."""
    tdp_w: float | None = None
    idle_w: float | None = None
    price_per_hour_usd: float | None = None
    price_source: str = ""
    achievable: Achievable
    aliases: tuple[str, ...] = ()
    source: str
    date: str

    def peak_flops_per_s(self, number: str) -> float:
        """The dense peak for `number`, or of the nearest wider type that the device has."""
        order = ("int4", "fp4", "int8", "fp8", "bf16", "fp16", "tf32", "fp32")
        if number in self.flops_per_s:
            return self.flops_per_s[number]
        start = order.index(number) if number in order else 0
        wider = [name for name in order[start:] if name in self.flops_per_s]
        return self.flops_per_s[wider[0]] if wider else max(self.flops_per_s.values())
