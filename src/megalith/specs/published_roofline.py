"""Figures of a published roofline, to compare ours with: tables of one layer's operators, and sums over a pass.

Data only, from `catalog/roofline`; its source and licence stand there. Must not compute.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

from megalith.base.config import Config
from megalith.specs import catalog


class PublishedOperator(Config, kw_only=True):
    """One operator of a published table."""

    kind: str
    flops: float
    mebibytes: float
    compute_ms: float
    memory_ms: float
    latency_ms: float


class PublishedRates(Config, kw_only=True):
    """What the publication computed on; the part `reach` of compute and memory rates."""

    flops_per_s: float
    memory_bytes_per_s: float
    chip_bytes_per_s: float
    reach: float
    link_bytes_per_s: float = float("inf")
    link_latency_s: float = 0.0


class PublishedTable(PublishedRates, kw_only=True):
    """The operators of one layer."""

    model: str
    prompt_tokens: int
    generated: int
    """Tokens of the answer behind a decode; 0 for the prompt itself."""
    operators: tuple[PublishedOperator, ...]
    source: str


class PublishedPass(PublishedRates, kw_only=True):
    """Sums over all layers of GPT-2 (12 layers of 768, 12 heads, FFN of 3,072), without its head."""

    prompt_tokens: int
    devices: int
    linear_ms: float
    attention_ms: float
    links_ms: float
    source: str


@functools.cache
def published_tables() -> Mapping[str, PublishedTable]:
    """By name."""
    return catalog.entries("roofline", "tables", PublishedTable)


@functools.cache
def published_passes() -> Mapping[str, PublishedPass]:
    """By name."""
    return catalog.entries("roofline", "passes", PublishedPass)
