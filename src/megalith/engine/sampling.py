"""The reference sampler: what `SamplingBatch` means, in NumPy. Knows logits and one batch; knows no request.

The semantics, which the native sampler must equal token for token. Row n has raw float32 logits r[V].

1.  x = r. For each bias entry: x[id] += value (float32; a value may be -inf).
2.  For each seen id: x = x / repetition if x > 0 else x * repetition (float32).
3.  For each seen id with count c > 0: x -= presence + frequency * c (the subtrahend is computed in float32).
4.  Ids whose mask bit is 0 get -inf. Ids at or past 32 * (width of the mask) count as masked.
5.  If the largest x is not finite (NaN anywhere, nothing allowed), the row cannot be sampled: StepFailed.
6.  temperature 0: the arg-max of x, the lowest id on a tie. No draw is made.
7.  Else the candidates are all ids with x > -inf, ordered by x descending, then id ascending. Their weight is
    z_i = exp((x_i - x_0) / temperature) in float64, so z_0 = 1.
8.  top_k > 0 keeps the first top_k candidates. Ties are cut by the order, never kept beyond k.
9.  top_p < 1 keeps the smallest prefix whose mass (sum of z) is at least top_p times the mass of what step 8 left.
10. min_p > 0 keeps the candidates with z_i >= min_p, that is at least min_p times the largest probability.
11. u = base.random.uniform(seed, draw), 24 bits. The token is the first kept candidate, in order, whose cumulative
    mass exceeds u times the mass kept; the last one should rounding leave none.

Sums are float64 in any order: two implementations may differ only where a cumulative mass meets its threshold within
about 1e-12. Filters keep at least one candidate. A row with targets_N >= 0 takes no draw and returns its target.
Log probabilities are log_softmax(r), of the raw logits, within 1e-5; the most likely are ordered by r descending, then
id ascending.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from megalith.base.errors import StepFailed
from megalith.base.random import uniform
from megalith.engine.batch import F32, I32, MAX_LOGPROBS, SamplingBatch, StepResult

F64 = NDArray[np.float64]
_FIRST_CANDIDATES = 512
"""How many candidates are ordered at first; nearly every draw ends among them, so that no row sorts a vocabulary."""
_LOGPROB_ROWS = 32
"""Rows whose log probabilities are computed at once: bounds the float32 copy of the logits."""


def sample(logits_NV: F32, batch: SamplingBatch) -> StepResult:
    """Choose one token for each row of `logits_NV`, which is not changed. Raises StepFailed (step 5 above)."""
    rows = logits_NV.shape[0]
    tokens_N = np.empty(rows, np.int32)
    plain_N = plain_rows(batch)
    if plain_N.all():
        np.argmax(logits_NV, axis=1, out=(best_N := np.empty(rows, np.intp)))
        tokens_N[:] = best_N
        if not np.isfinite(logits_NV[np.arange(rows), best_N]).all():
            raise StepFailed("The logits of a row hold no finite maximum.")
    else:
        for n in range(rows):
            tokens_N[n] = _sample_row(logits_NV[n], batch, n)
    if batch.num_logprobs_N.size == 0 or int(batch.num_logprobs_N.max()) < 0:
        return StepResult(tokens_N)
    return _with_logprobs(logits_NV, batch, tokens_N)


def plain_rows(batch: SamplingBatch) -> NDArray[np.bool_]:
    """True for rows that are a bare arg-max: greedy, no penalty, bias, mask or target."""
    plain: NDArray[np.bool_] = (
        (batch.temperature_N == 0)
        & (np.diff(batch.seen_starts_N1) == 0)
        & (np.diff(batch.bias_starts_N1) == 0)
        & (batch.mask_rows_N < 0)
        & (batch.targets_N < 0)
    )
    return plain


def _sample_row(raw_V: F32, batch: SamplingBatch, n: int) -> int:
    target = int(batch.targets_N[n])
    if target >= 0:
        return target
    x_V = _adjusted(raw_V, batch, n)
    best = int(np.argmax(x_V))
    if not np.isfinite(x_V[best]):
        raise StepFailed("No token can be sampled: the logits hold no finite maximum after bias, penalties and mask.")
    temperature = float(batch.temperature_N[n])
    if temperature == 0.0:
        return best
    u = uniform(int(batch.seed_N[n]), int(batch.draw_N[n]))
    filters = (int(batch.top_k_N[n]), float(batch.top_p_N[n]), float(batch.min_p_N[n]))
    return _draw(x_V, temperature, filters, u)


def _adjusted(raw_V: F32, batch: SamplingBatch, n: int) -> F32:
    """Steps 1 to 4: the logits after bias, penalties and mask; `raw_V` itself where nothing applies."""
    low, high = int(batch.bias_starts_N1[n]), int(batch.bias_starts_N1[n + 1])
    seen_low, seen_high = int(batch.seen_starts_N1[n]), int(batch.seen_starts_N1[n + 1])
    mask_row = int(batch.mask_rows_N[n])
    if low == high and seen_low == seen_high and mask_row < 0:
        return raw_V
    x_V = raw_V.copy()
    if low != high:
        x_V[batch.bias_ids[low:high]] += batch.bias_values[low:high]
    if seen_low != seen_high:
        ids, counts = batch.seen_ids[seen_low:seen_high], batch.seen_counts[seen_low:seen_high]
        repetition = batch.repetition_N[n]
        x = x_V[ids]
        x = np.where(x > 0, x / repetition, x * repetition)
        penalty = batch.presence_N[n] + batch.frequency_N[n] * counts.astype(np.float32)
        x_V[ids] = np.where(counts > 0, x - penalty, x)
    if mask_row >= 0:
        allowed = np.unpackbits(batch.masks[mask_row].view(np.uint8), bitorder="little")[: x_V.size]
        x_V[: allowed.size][allowed == 0] = -np.inf
        x_V[allowed.size :] = -np.inf
    return x_V


def _draw(x_V: F32, temperature: float, filters: tuple[int, float, float], u: float) -> int:
    """Steps 7 to 11 over `x_V`, ordering no more candidates than the draw needs."""
    top_k, top_p, min_p = filters
    vocab = x_V.size
    count = min(top_k or _FIRST_CANDIDATES, vocab)
    if top_k:
        ids, z = _ordered(x_V, count, temperature)
        return _pick(ids, z, float(z.sum()), (top_p, min_p), u)
    scaled = np.exp((x_V.astype(np.float64) - float(x_V.max())) / temperature)
    mass = float(scaled.sum())
    if top_p >= 1.0 and min_p > 0.0:  # min-p needs no order: it says by itself how many remain
        count = max(1, int(np.count_nonzero(scaled >= min_p)))
        ids, z = _ordered(x_V, count, temperature)
        return _pick(ids, z, float(z.sum()), (1.0, min_p), u)
    needed = mass * (top_p if top_p < 1.0 else u)
    while True:
        ids, z = _ordered(x_V, count, temperature)
        if count >= vocab or float(z.sum()) > needed:
            return _pick(ids, z, mass, (top_p, min_p), u)
        count = min(vocab, count * 8)


def _pick(ids: I32, z: F64, mass: float, nucleus: tuple[float, float], u: float) -> int:
    """Steps 9 to 11 over ordered candidates; `mass` is that of all that step 8 left, also of those not ordered."""
    top_p, min_p = nucleus
    cumulative = np.cumsum(z)
    if top_p < 1.0:
        kept = min(int(np.searchsorted(cumulative, top_p * mass, side="left")) + 1, z.size)
        z, cumulative = z[:kept], cumulative[:kept]
        mass = float(cumulative[-1])
    if min_p > 0.0:
        kept = int(np.count_nonzero(z >= min_p))
        cumulative = cumulative[:kept]
        mass = float(cumulative[-1])
    return int(ids[min(int(np.searchsorted(cumulative, u * mass, side="right")), cumulative.size - 1)])


def _ordered(x_V: F32, count: int, temperature: float) -> tuple[I32, F64]:
    """The first `count` candidates in order (fewer where logits are -inf), and their weights."""
    ids = leaders(x_V, count)
    x = x_V[ids].astype(np.float64)
    ids, x = ids[x > -np.inf], x[x > -np.inf]
    return ids, np.exp((x - x[0]) / temperature)


def leaders(x_V: F32, count: int) -> I32:
    """Ids of the `count` largest values, by value descending, then id ascending."""
    if count >= x_V.size:
        candidates = np.arange(x_V.size)
    else:
        threshold = np.partition(x_V, x_V.size - count)[x_V.size - count]
        candidates = np.flatnonzero(x_V >= threshold)
    order = np.argsort(-x_V[candidates], kind="stable")[:count]
    return candidates[order].astype(np.int32)


def _with_logprobs(logits_NV: F32, batch: SamplingBatch, tokens_N: I32) -> StepResult:
    rows = logits_NV.shape[0]
    logprobs_N = np.zeros(rows, np.float32)
    top_ids_NK = np.zeros((rows, MAX_LOGPROBS), np.int32)
    top_logprobs_NK = np.full((rows, MAX_LOGPROBS), -np.inf, np.float32)
    asked = np.flatnonzero(batch.num_logprobs_N >= 0)
    for start in range(0, asked.size, _LOGPROB_ROWS):
        part = asked[start : start + _LOGPROB_ROWS]
        x = logits_NV[part]
        peak = x.max(axis=1, keepdims=True)
        norm = peak[:, 0].astype(np.float64) + np.log(np.exp(x - peak).sum(axis=1, dtype=np.float64))
        logprobs_N[part] = x[np.arange(part.size), tokens_N[part]] - norm
        for i, n in enumerate(part):
            wanted = min(int(batch.num_logprobs_N[n]), MAX_LOGPROBS, x.shape[1])
            if wanted > 0:
                ids = leaders(x[i], wanted)
                top_ids_NK[n, :wanted] = ids
                top_logprobs_NK[n, :wanted] = x[i, ids] - norm[i]
    return StepResult(tokens_N, logprobs_N, top_ids_NK, top_logprobs_NK)
