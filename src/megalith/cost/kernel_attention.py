"""Attention time from a measured grid: between its points straight lines, and a share of the way to the longest decode.

A batch of decodes with contexts of unequal length takes

    t = (1 - alpha) t(mean context) + alpha t(longest context)

with t from the grid, which was measured with equal contexts, and alpha from the skew fit (see SkewFit). All in integer
picoseconds for all layers of the model together; a piece of a line has a whole slope, so that a sum over many steps
has no rounding in it. Knows no step, no batch and no file.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from typing import NamedTuple

from megalith.base.errors import ConfigError
from megalith.cost.kernel_profile import Curve, KernelProfile, SkewPoint

_SHARES = 10_000
"""alpha is a whole number of these."""
_LONGEST_STEP = 256
"""alpha changes with the longest context in steps of so many tokens."""
_ALWAYS = 1 << 60


def between(curve: Curve, size: int) -> int:
    """The value at `size`: on the line between its neighbours, beyond the last point on that of the last two."""
    sizes, times = curve
    index = min(bisect_right(sizes, size), len(sizes) - 1)
    if index == 0 or size <= sizes[0]:
        return times[0]
    low = sizes[index - 1]
    return times[index - 1] + (times[index] - times[index - 1]) * (size - low) // (sizes[index] - low)


class SkewFit:
    """alpha of a batch: how far uneven contexts push it from the time of its mean to that of its longest.

    The fit has a value for each bucket of five axes. In decodes and in the longest context its points were measured at
    the upper end of the bucket: between two of them alpha goes along a line, beyond them it stays. In the other three
    the bucket decides.
    """

    def __init__(self, profile: KernelProfile) -> None:
        self._points = profile.skew
        self._default = profile.skew_default
        axes = [sorted({point[axis] for point in profile.skew}) for axis in range(5)]
        self._chunks, self._decodes, self.rates, self._longest, self._contexts = axes
        self._known: dict[tuple[int, int, int, int, int], int] = {}

    def __bool__(self) -> bool:
        return bool(self._points)

    def rate(self, decodes: int, context_sum: int, longest: int) -> int:
        """Which of `rates` the batch has; its rate is (mean - shortest) / (longest - shortest), in percent.

        The shortest is not known. It is taken to be as far below the mean as the longest is above it, or 0 where that
        is below 0: then the rate is mean / longest, else one half. So it never falls while all contexts grow.
        """
        whole = decodes * longest
        return bisect_left(self.rates, 50 if 2 * context_sum >= whole else -(-100 * context_sum // whole))

    def same_rate(self, decodes: int, context_sum: int, longest: int, rate: int) -> int:
        """For how many steps the batch has the `rate` that it has now."""
        bound = self.rates[rate]
        if bound >= 50:
            return _ALWAYS
        # 100 (sum + j decodes) <= bound decodes (longest + j)
        return (bound * decodes * longest - 100 * context_sum) // (decodes * (100 - bound)) + 1

    def share(self, chunk: int, decodes: int, rate: int, longest: int, context: int) -> int:
        """alpha in ten-thousandths. It changes with the longest context in steps of _LONGEST_STEP."""
        ends = _ceiling(self._chunks, chunk), _ceiling(self._contexts, context if chunk else 0)
        key = (*ends, decodes, rate, longest // _LONGEST_STEP)
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = self._share(*key)
        return known

    def _share(self, chunk: int, context: int, decodes: int, rate: int, step: int) -> int:
        few, many, along_decodes = _bracket(self._decodes, min(decodes, self._decodes[-1]))
        middle = step * _LONGEST_STEP + _LONGEST_STEP // 2
        short, long, along_longest = _bracket(self._longest, min(middle, self._longest[-1]))
        alpha = 0.0
        for count, count_weight in ((few, 1.0 - along_decodes), (many, along_decodes)):
            for longest, weight in ((short, 1.0 - along_longest), (long, along_longest)):
                point = SkewPoint(chunk, self._decodes[count], self.rates[rate], self._longest[longest], context)
                alpha += self._points.get(point, self._default) * count_weight * weight
        return round(_SHARES * alpha)


def _ceiling(points: list[int], value: int) -> int:
    """The smallest point that is not below the value, else the largest."""
    return points[min(bisect_left(points, value), len(points) - 1)]


def _bracket(points: list[int], value: int) -> tuple[int, int, float]:
    """Indices of two neighbours, and how far between them the value lies; above 1 beyond the last."""
    if len(points) == 1 or value <= points[0]:
        return 0, 0, 0.0
    index = min(bisect_right(points, value), len(points) - 1)
    low = points[index - 1]
    return index - 1, index, (value - low) / (points[index] - low)


class _DecodeRow(NamedTuple):
    """Attention of one number of decodes over their context, closed by a size that no context reaches."""

    sizes: list[int]
    times: list[int]
    slopes: list[int]
    shares: dict[int, int]
    """By longest context // _LONGEST_STEP and rate."""


class Attention:
    """Attention of all layers, for a batch of decodes and for a batch with prompt chunks."""

    def __init__(self, profile: KernelProfile, num_layers: int, scales: tuple[float, float] = (1.0, 1.0)) -> None:
        """`scales` multiply the times of decodes alone and of steps with prompts.

        Raises ConfigError when the grid lacks decodes alone or no number of decodes stands beside every chunk.
        """
        self._layers = num_layers
        self._alone_scale, self._mixed_scale = scales
        self._skew = SkewFit(profile)
        self._grid = profile.attention
        self._chunks = sorted({chunk for chunk, _ in profile.attention if chunk})
        self._alone = sorted({decodes for chunk, decodes in profile.attention if not chunk and decodes})
        self._beside = sorted(
            set.intersection(*[{n for c, n in profile.attention if c == chunk} for chunk in self._chunks or (0,)])
        )
        if not self._alone or not self._chunks or not self._beside or self._beside[0]:
            raise ConfigError(
                f"The attention table has {len(self._alone)} numbers of decodes alone, {len(self._chunks)} prompt "
                f"chunks and {len(self._beside)} numbers of decodes beside every chunk.",
                "Measure decodes without a chunk, and every chunk with the same numbers of decodes, 0 among them.",
            )
        curves = [item for plane in profile.attention.values() for item in plane.items()]
        self._contexts = sorted({size for size, _ in curves})
        self._decode_contexts = sorted({size for _, (sizes, _) in curves for size in sizes})
        self._planes: dict[tuple[int, int], list[list[int]]] = {}
        self._rows: dict[int, _DecodeRow] = {}

    # Decodes alone

    def decode_piece(self, decodes: int, context_sum: int, longest: int) -> tuple[int, int, int]:
        """The step of these decodes and those that follow it on the same line: first, slope, steps."""
        row = self._rows.get(decodes)
        if row is None:
            row = self._rows[decodes] = self._decode_row(decodes)
        sizes, times, slopes, shares = row
        index = bisect_right(sizes, context_sum // decodes)
        # The next size is reached with the first step whose sum is not below that size times the decodes.
        steps = -((context_sum - sizes[index] * decodes) // decodes)
        index -= 1
        slope, past = slopes[index], context_sum - sizes[index] * decodes
        skew = self._skew
        if not skew:
            return times[index] + past * slope // decodes, slope, steps
        rate = skew.rate(decodes, context_sum, longest)
        key = longest // _LONGEST_STEP
        share = shares.get(16 * key + rate)
        if share is None:
            share = shares[16 * key + rate] = skew.share(0, decodes, rate, longest, 0)
        top = bisect_right(sizes, longest)
        steps = min(steps, sizes[top] - longest, (key + 1) * _LONGEST_STEP - longest,
                    skew.same_rate(decodes, context_sum, longest, rate))  # fmt: skip
        top -= 1
        slope, top_slope = slope * (_SHARES - share) // _SHARES, slopes[top] * share // _SHARES
        first = (times[index] * (_SHARES - share) + times[top] * share) // _SHARES
        return first + past * slope // decodes + (longest - sizes[top]) * top_slope, slope + top_slope, steps

    def _decode_row(self, decodes: int) -> _DecodeRow:
        few, many, along = _bracket(self._alone, decodes)
        low, high = (self._plane(0, self._alone[index])[0] for index in (few, many))
        sizes = self._decode_contexts
        times = [max(0, int((a + (b - a) * along) * self._alone_scale)) for a, b in zip(low, high, strict=True)]
        slopes = [(times[i + 1] - times[i]) // (sizes[i + 1] - sizes[i]) for i in range(len(sizes) - 1)]
        # Below the first size attention takes as long as there; above the last it grows on as before.
        if sizes[0]:
            sizes, times, slopes = [0, *sizes], [times[0], *times], [0, *slopes]
        return _DecodeRow([*sizes, _ALWAYS], times, [*slopes, slopes[-1] if slopes else 0], {})

    # With prompt chunks

    def mixed_ps(self, chunk: int, context: int, decodes: int, context_sum: int, longest: int) -> int:
        """A step with `chunk` prompt tokens behind `context` ones, beside these decodes.

        One prompt token already takes the kernel of the mixed batch, so below the smallest chunk the time stays.
        """
        small, large, along_chunks = _bracket(self._chunks, chunk)
        few, many, along_decodes = _bracket(self._beside, decodes)
        low, high, along_contexts = _bracket(self._contexts, context)
        mean, past_mean, along_mean = _bracket(self._decode_contexts, context_sum // decodes if decodes else 0)
        top, past_top, along_top = _bracket(self._decode_contexts, longest)
        at_mean = at_top = 0.0
        rows = [(low, 1.0 - along_contexts), (high, along_contexts)] if along_contexts else [(low, 1.0)]
        for chunk_index, chunk_weight in ((small, 1.0 - along_chunks), (large, along_chunks)):
            for count_index, count_weight in ((few, 1.0 - along_decodes), (many, along_decodes)):
                weight = chunk_weight * count_weight
                if not weight:
                    continue
                plane = self._plane(self._chunks[chunk_index], self._beside[count_index])
                for index, row_weight in rows:
                    row, share = plane[index], weight * row_weight
                    value = row[mean]
                    at_mean += share * (value + (row[past_mean] - value) * along_mean)
                    value = row[top]
                    at_top += share * (value + (row[past_top] - value) * along_top)
        if decodes > 1 and self._skew:
            rate = self._skew.rate(decodes, context_sum, longest)
            at_mean += (at_top - at_mean) * self._skew.share(chunk, decodes, rate, longest, context) / _SHARES
        return max(0, int(at_mean * self._mixed_scale))

    def _plane(self, chunk: int, decodes: int) -> list[list[int]]:
        """All layers' time over the KV of the prompt and of a decode, on the axes of the whole table."""
        plane = self._planes.get((chunk, decodes))
        if plane is None:
            measured = self._grid[chunk, decodes]
            known = sorted(measured)
            rows = {
                context: [self._layers * between(measured[context], size) for size in self._decode_contexts]
                for context in known
            }
            across = [
                (known, [rows[context][index] for context in known]) for index in range(len(self._decode_contexts))
            ]
            plane = [[between(curve, context) for curve in across] for context in self._contexts]
            self._planes[chunk, decodes] = plane
        return plane
