"""A guess of output lengths, learned from requests that have finished.

Knows counts of tokens only. An Estimator: nobody knows the true length before the last token, so a policy that has to
reserve memory asks this. Its state has a fixed size.
"""

from __future__ import annotations

from collections.abc import Mapping

_SUB_BITS = 3
"""Each power of two is cut in 2**3 bins: a quantile is at most 12.5 % above the sample that it stands for."""


def _bin(tokens: int) -> int:
    """Logarithmic bins with exact integers, so that every machine puts a length into the same one."""
    shift = max(0, tokens.bit_length() - _SUB_BITS - 1)
    return (shift << _SUB_BITS) + (tokens >> shift)


def _last_of(index: int) -> int:
    """The largest length in a bin."""
    shift = max(0, (index >> _SUB_BITS) - 1)
    return (((index - (shift << _SUB_BITS)) + 1) << shift) - 1


class _Bucket:
    """Output lengths of the prompts of one size class."""

    __slots__ = ("count", "counts", "total")

    def __init__(self) -> None:
        self.count = 0
        self.total = 0
        self.counts: dict[int, int] = {}

    def add(self, tokens: int) -> None:
        self.count += 1
        self.total += tokens
        index = _bin(tokens)
        self.counts[index] = self.counts.get(index, 0) + 1

    def mean(self) -> int:
        """Rounded up: a promise that is short by a token is short by a block."""
        return -(-self.total // self.count)

    def quantile(self, share: float) -> int:
        """The upper end of the bin in which the share is reached."""
        wanted, seen = share * self.count, 0
        for index in sorted(self.counts):
            seen += self.counts[index]
            if seen >= wanted:
                return _last_of(index)
        return _last_of(max(self.counts))


class OutputLengths:
    """Mean or quantile of the outputs of requests with a prompt of the same power of two.

    Until `least` of such a class have finished it answers from all that have, and until `least` of these, with
    max_new_tokens. It never answers more than max_new_tokens, nor less than 1.
    """

    def __init__(self, quantile: float | None = None, least: int = 20) -> None:
        self._quantile = quantile
        self._least = least
        self._all = _Bucket()
        self._classes: dict[int, _Bucket] = {}

    def observe(self, features: Mapping[str, float], outcome: Mapping[str, float]) -> None:
        """Features: prompt_tokens. Outcome: new_tokens."""
        tokens = int(outcome["new_tokens"])
        self._all.add(tokens)
        self._classes.setdefault(int(features["prompt_tokens"]).bit_length(), _Bucket()).add(tokens)

    def predict(self, features: Mapping[str, float]) -> Mapping[str, float]:
        """Features: prompt_tokens, max_new_tokens. Answers new_tokens, a whole number."""
        most = int(features["max_new_tokens"])
        bucket = self._classes.get(int(features["prompt_tokens"]).bit_length())
        if bucket is None or bucket.count < self._least:
            bucket = self._all
        if bucket.count < max(1, self._least):
            return {"new_tokens": most}
        guess = bucket.mean() if self._quantile is None else bucket.quantile(self._quantile)
        return {"new_tokens": max(1, min(most, guess))}
