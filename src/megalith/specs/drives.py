"""DriveSpec: a drive that holds a KV cache, with or without a processor for attention, as the catalogue has it.

Knows figures and their sources. Must not know models or formulas.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

from megalith.base.config import Config
from megalith.specs import catalog


class DriveSpec(Config, kw_only=True):
    """One drive. Rates are those that are reached."""

    title: str
    memory_bytes: int
    bytes_per_s: float
    """Reading, inside the drive."""
    flops_per_s: float
    """Of the processor inside; a multiply-add counts as two."""
    link_bytes_per_s: float
    """To the accelerator, each way."""
    trip_s: float
    """To the accelerator and back, without bytes."""
    page_bytes: int
    """The least that is read at once."""
    tdp_w: float
    idle_w: float
    computes: bool
    price_per_hour_usd: float | None = None
    source: str
    date: str


@functools.cache
def drives() -> Mapping[str, DriveSpec]:
    """Every drive of the catalogue by its name."""
    return catalog.entries("drives", "drives", DriveSpec)
