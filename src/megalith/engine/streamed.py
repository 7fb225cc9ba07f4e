"""What streaming weights took: measured beside predicted, for whoever moves them."""

from __future__ import annotations

from collections.abc import Callable

from megalith.base.units import NS_PER_S, format_bytes, format_duration
from megalith.engine.batch import StepBatch


class StreamTally:
    """Counts of a window that weights stream through."""

    def __init__(self, source: str) -> None:
        self.source = source
        """Where the weights come from."""
        self.decode_steps = self.decode_ns = self.decode_read_bytes = 0
        """Steps that only decode, their time, and what was read for them."""

        self.detail: Callable[[], str] = str
        """More to say at the end."""
        self.predicts = True
        """Whether the plan knows what a step reads."""

    @property
    def step_bytes(self) -> int:
        """What one decode step reads, in the mean, beside embedding rows."""
        return round(self.decode_read_bytes / max(1, self.decode_steps))

    def note(self, batch: StepBatch, step_ns: int, read_bytes: int) -> None:
        """A step took so long and read so much; counted if it only decodes."""
        if batch.tokens_M.size == batch.output_rows_N.size:
            self.decode_steps += 1
            self.decode_ns += step_ns
            self.decode_read_bytes += read_bytes

    def summary(self, predicted_ns: float) -> str:
        """Measured beside predicted, in a line; empty before the first decode step."""
        if not self.decode_steps:
            return ""
        mean_ns = self.decode_ns / self.decode_steps
        beside = (
            f"; {format_duration(predicted_ns)} predicted, {mean_ns / predicted_ns - 1:+.0%}" if self.predicts else ""
        )
        rate, more = format_bytes(round(self.step_bytes * NS_PER_S / mean_ns)), self.detail()
        return (
            f"streamed {format_bytes(self.step_bytes)} a step from {self.source}: {self.decode_steps} decode steps of "
            f"{format_duration(mean_ns)} (measured{beside}), {rate}/s" + (f"; {more}" if more else "")
        )
