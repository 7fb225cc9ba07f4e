"""ServePlan: a frozen answer to "will it fit, and how fast will it be", with an error band on every prediction.

Data only. `plan` writes it, `serve`, `bench` and the terminal read it. Must not hold formulas.
"""

from __future__ import annotations

from megalith.base.config import Config


class Estimate(Config, kw_only=True):
    """A predicted quantity: the value and the band that should hold the measured one in nine cases of ten."""

    value: float
    low: float
    high: float

    def scaled(self, factor: float) -> Estimate:
        """The same estimate in another unit; `factor` must be positive."""
        return Estimate(value=self.value * factor, low=self.low * factor, high=self.high * factor)

    def inverse(self, numerator: float = 1.0) -> Estimate:
        """`numerator` divided by the quantity; the ends of the band change places."""
        return Estimate(value=numerator / self.value, low=numerator / self.high, high=numerator / self.low)


class MemoryLine(Config, kw_only=True):
    """One item of the memory of an instance, with the sum that gives it."""

    item: str
    num_bytes: int
    formula: str


class Remedy(Config, kw_only=True):
    """One change that would make a plan fit, with what it would then need of each device."""

    change: str
    need_bytes: int
    limit_bytes: int


class BatchPoint(Config, kw_only=True):
    """What one batch size gives: `batch` sequences that each have `context` tokens behind them."""

    batch: int
    context: int
    fits: bool
    """Whether the KV cache holds that batch."""
    tpot_ns: Estimate
    tokens_per_s: Estimate
    """Of all sequences together."""
    binding: str
    """The resource that bounds the step: memory bandwidth, compute, links, fixed time per step, or KV capacity."""
    power_w: Estimate | None = None
    joules_per_token: Estimate | None = None
    usd_per_million_tokens: Estimate | None = None


class ServePlan(Config, kw_only=True):
    """Model on device, before anything is loaded. Every time, rate and power is predicted."""

    model: str
    parameters: int
    active_parameters: int
    device: str
    device_source: str
    devices: int
    """Tensor-parallel degree; memory figures are of one device."""
    weight_format: str
    kv_format: str
    context: int
    batch: int
    block_tokens: int
    num_blocks: int
    """KV blocks of this plan. Where the batch at full context does not fit, but some does, fewer than asked."""
    kv_bytes_per_token: int
    memory: tuple[MemoryLine, ...]
    need_bytes: int
    limit_bytes: int
    limit_source: str
    fits: bool
    remedies: tuple[Remedy, ...] = ()
    max_context: int = 0
    """Longest context one sequence could have in what is left beside the weights; 0 when the weights do not fit."""
    max_sequences: int = 0
    """Sequences of `context` tokens that fit."""
    prompt_tokens: int
    prefill_tokens_per_s: Estimate
    ttft_ns: Estimate
    """One prompt of `prompt_tokens`, alone, nothing queued."""
    points: tuple[BatchPoint, ...]
    band_source: str
    """Where the width of the error bands comes from."""
    notes: tuple[str, ...] = ()
    window: ServePlan | None = None
    """Where weights do not fit and could stream from disk: the plan of that."""
