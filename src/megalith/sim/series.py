"""Periodic samples of the instances of a simulated cluster, in bounded memory.

Knows what one sample of an instance holds; must not know instances. When the rows outgrow their limit, neighbouring
samples of each instance are joined by pairs, and later ones are joined on arrival: one row then stands for a longer
time, with the mean of each figure over it. Energy and the peaks are taken before any joining.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np

from megalith.base.units import NS_PER_S
from megalith.sim.histogram import IntArray
from megalith.sim.timeline import FloatArray

MOST_ROWS = 200_000


class InstanceSample(NamedTuple):
    """One instance at one time; rates, busy share and power are means since the sample before."""

    instance: int
    running: int
    """Requests that hold device blocks."""
    waiting: int
    used_share: float
    """Of its KV blocks, those not free."""
    prompt_tokens_per_s: float
    decode_tokens_per_s: float
    busy_share: float
    power_w: float


FIGURES = InstanceSample._fields[1:]
_RUNNING, _WAITING, _USED, _PROMPT, _DECODE, _BUSY, _POWER = range(len(FIGURES))


class _Frame(NamedTuple):
    """All instances over one stretch of time: rows by instance id, which rise."""

    start_ns: int
    end_ns: int
    instances: IntArray
    figures: FloatArray


class Series:
    """Samples of all instances over time; at most about `most_rows` rows of 64 bytes."""

    def __init__(self, most_rows: int = MOST_ROWS) -> None:
        self.samples = 0
        """Times at which samples were taken."""
        self.joined = 1
        """Samples that one row stands for."""
        self.peak_used_share = 0.0
        self.peak_waiting = 0
        """Of the whole cluster."""
        self.peak_power_w = 0.0
        """Of the whole cluster."""
        self.energy_j = 0.0
        """Power times the time since the sample before."""
        self._most_rows = most_rows
        self._frames: list[_Frame] = []
        self._open: list[_Frame] = []
        self._open_samples = 0
        self._rows = 0
        self._last_ns = 0

    def add(self, now_ns: int, rows: Sequence[InstanceSample]) -> None:
        """Take one sample of every instance, at a later time than the one before (0 or later for the first)."""
        start_ns, self._last_ns = self._last_ns, now_ns
        if now_ns < start_ns:
            raise ValueError(f"a sample at {now_ns} ns after one at {start_ns} ns")
        self.samples += 1
        if not rows:
            return
        width = len(InstanceSample._fields)
        table = np.fromiter(chain.from_iterable(rows), dtype=np.float64, count=len(rows) * width).reshape(-1, width)
        instances = table[:, 0].astype(np.int64)
        if (instances[1:] < instances[:-1]).any():
            order = np.argsort(instances, kind="stable")
            table, instances = table[order], instances[order]
        figures = table[:, 1:].copy()
        power_w = float(figures[:, _POWER].sum())
        self.energy_j += power_w * (now_ns - start_ns) / NS_PER_S
        self.peak_power_w = max(self.peak_power_w, power_w)
        self.peak_waiting = max(self.peak_waiting, int(figures[:, _WAITING].sum()))
        self.peak_used_share = max(self.peak_used_share, float(figures[:, _USED].max()))
        self._open.append(_Frame(start_ns, now_ns, instances, figures))
        self._open_samples += 1
        if self._open_samples >= self.joined:
            self._close()

    def columns(self) -> dict[str, IntArray | FloatArray]:
        """All rows: start_ns, time_ns (end of the stretch), instance, and each of FIGURES. Sorted by time, then id."""
        frames = [*self._frames, *([_join(self._open)] if self._open else [])]
        sizes = [len(frame.instances) for frame in frames]
        if not frames:
            empty = np.zeros(0, dtype=np.int64)
            return {"start_ns": empty, "time_ns": empty, "instance": empty} | {n: np.zeros(0) for n in FIGURES}
        figures = np.concatenate([frame.figures for frame in frames])
        return {
            "start_ns": np.repeat(np.array([frame.start_ns for frame in frames], dtype=np.int64), sizes),
            "time_ns": np.repeat(np.array([frame.end_ns for frame in frames], dtype=np.int64), sizes),
            "instance": np.concatenate([frame.instances for frame in frames]),
        } | {name: figures[:, i] for i, name in enumerate(FIGURES)}

    def cluster(self) -> dict[str, IntArray | FloatArray]:
        """The whole cluster over time: time_ns, instances, sums of the figures, means of used_share and busy_share."""
        frames = [*self._frames, *([_join(self._open)] if self._open else [])]
        table = np.array([frame.figures.sum(axis=0) for frame in frames]).reshape(-1, len(FIGURES))
        counts = np.array([len(frame.instances) for frame in frames], dtype=np.int64)
        for share in (_USED, _BUSY):
            table[:, share] /= counts
        times = np.array([frame.end_ns for frame in frames], dtype=np.int64)
        return {"time_ns": times, "instances": counts} | {name: table[:, i] for i, name in enumerate(FIGURES)}

    def mean(self, figure: str) -> float | None:
        """The time-weighted mean of one of FIGURES over instances and time; None without samples."""
        column = FIGURES.index(figure)
        total = weight = 0.0
        for frame in (*self._frames, *self._open):
            length = frame.end_ns - frame.start_ns
            total += float(frame.figures[:, column].sum()) * length
            weight += len(frame.instances) * length
        return total / weight if weight else None

    def _close(self) -> None:
        frame = _join(self._open)
        self._open, self._open_samples = [], 0
        self._frames.append(frame)
        self._rows += len(frame.instances)
        if self._rows > self._most_rows and len(self._frames) > 1:
            frames = self._frames
            if len(frames) % 2:
                # The last one is half of the next row.
                self._open, self._open_samples = [frames.pop()], self.joined
            self._frames = [_join(frames[i : i + 2]) for i in range(0, len(frames), 2)]
            self._rows = sum(len(kept.instances) for kept in self._frames)
            self.joined *= 2


def _join(frames: Sequence[_Frame]) -> _Frame:
    """One frame for several that follow one another: means weighted by time, while an instance is there."""
    if len(frames) == 1:
        return frames[0]
    lengths = [max(frame.end_ns - frame.start_ns, 1) for frame in frames]
    instances = np.unique(np.concatenate([frame.instances for frame in frames]))
    sums = np.zeros((len(instances), len(FIGURES)))
    weights = np.zeros((len(instances), 1))
    for frame, length in zip(frames, lengths, strict=True):
        at = np.searchsorted(instances, frame.instances)
        sums[at] += frame.figures * length
        weights[at] += length
    return _Frame(frames[0].start_ns, frames[-1].end_ns, instances, sums / weights)
