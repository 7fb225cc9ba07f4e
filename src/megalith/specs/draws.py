"""Many counter-based draws at once, the same bits on every machine.

Number i of stream s is `base.random.splitmix64(s, i)`, here for a whole range of i. Logarithm, exponential and the
normal quantile are made of IEEE additions, multiplications, divisions and square roots only, because those of C and
vector libraries differ in the last bits between machines. Knows numbers; knows nothing of requests.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.float64]
Ints: TypeAlias = NDArray[np.int64]
Words: TypeAlias = NDArray[np.uint64]

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_LN2_HIGH, _LN2_LOW = 6.93147180369123816490e-01, 1.90821492927058770002e-10
"""ln 2 in two parts; a product of the first with a small integer is exact (the split of Sun's fdlibm)."""
_ATANH = tuple(1.0 / n for n in range(21, 0, -2))
_EXP = (1.0 / 6227020800, 1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040,
        1.0 / 720, 1.0 / 120, 1.0 / 24, 1.0 / 6, 0.5, 1.0, 1.0)  # fmt: skip
_MIN_EXPONENT, _MAX_EXPONENT = -745.0, 709.0

# PPND16 of algorithm AS 241: Wichura, "The percentage points of the normal distribution", Applied Statistics 37, 1988.
_CENTRE = (
    (2.5090809287301226727e3, 3.3430575583588128105e4, 6.7265770927008700853e4, 4.5921953931549871457e4,
     1.3731693765509461125e4, 1.9715909503065514427e3, 1.3314166789178437745e2, 3.3871328727963666080e0),
    (5.2264952788528545610e3, 2.8729085735721942674e4, 3.9307895800092710610e4, 2.1213794301586595867e4,
     5.3941960214247511077e3, 6.8718700749205790830e2, 4.2313330701600911252e1, 1.0),
)  # fmt: skip
_TAIL = (
    (7.74545014278341407640e-4, 2.27238449892691845833e-2, 2.41780725177450611770e-1, 1.27045825245236838258e0,
     3.64784832476320460504e0, 5.76949722146069140550e0, 4.63033784615654529590e0, 1.42343711074968357734e0),
    (1.05075007164441684324e-9, 5.47593808499534494600e-4, 1.51986665636164571966e-2, 1.48103976427480074590e-1,
     6.89767334985100004550e-1, 1.67638483018380384940e0, 2.05319162663775882187e0, 1.0),
)  # fmt: skip
_FAR = (
    (2.01033439929228813265e-7, 2.71155556874348757815e-5, 1.24266094738807843860e-3, 2.65321895265761230930e-2,
     2.96560571828504891230e-1, 1.78482653991729133580e0, 5.46378491116411436990e0, 6.65790464350110377720e0),
    (2.04426310338993978564e-15, 1.42151175831644588870e-7, 1.84631831751005468180e-5, 7.86869131145613259100e-4,
     1.48753612908506148525e-2, 1.36929880922735805310e-1, 5.99832206555887937690e-1, 1.0),
)  # fmt: skip


def words(stream: int, first: int, count: int) -> Words:
    """`splitmix64(stream, i)` for i in first .. first + count - 1."""
    return words_at(stream, np.arange(count, dtype=np.uint64) + np.uint64(first % 2**64))


def words_at(stream: int, indices: Words) -> Words:
    """`splitmix64(stream, i)` for each of `indices`."""
    z = np.uint64(stream % 2**64) + (indices + np.uint64(1)) * _GAMMA
    z = (z ^ (z >> np.uint64(30))) * _FIRST
    z = (z ^ (z >> np.uint64(27))) * _SECOND
    return z ^ (z >> np.uint64(31))


def shares(stream: int, first: int, count: int) -> Floats:
    """Uniform numbers strictly between 0 and 1: the upper 52 bits of each word, in the middle of their interval."""
    return as_shares(words(stream, first, count))


def as_shares(random: Words) -> Floats:
    """A share for each word."""
    return ((random >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def log(values: Floats) -> Floats:
    """Natural logarithm of positive normal numbers, within 2 units in the last place or so."""
    mantissa, exponent = np.frexp(values)
    small = mantissa < 0.7071067811865476
    mantissa = np.where(small, mantissa + mantissa, mantissa)
    scale = (exponent - small).astype(np.float64)
    ratio = (mantissa - 1.0) / (mantissa + 1.0)
    series = ratio * _polynomial(_ATANH, ratio * ratio)
    return scale * _LN2_HIGH + (scale * _LN2_LOW + (series + series))


def exp(values: Floats) -> Floats:
    """e to the power of `values`, within a few units in the last place; 0 far below, 8e307 far above."""
    bounded = np.minimum(np.maximum(values, _MIN_EXPONENT), _MAX_EXPONENT)
    scale = np.rint(bounded * 1.4426950408889634)
    rest = (bounded - scale * _LN2_HIGH) - scale * _LN2_LOW
    return np.where(values < _MIN_EXPONENT, 0.0, np.ldexp(_polynomial(_EXP, rest), scale.astype(np.int32)))


def power(values: Floats, exponent: float) -> Floats:
    """Positive `values` to a power."""
    return exp(log(values) * exponent)


def exponentials(stream: int, first: int, count: int) -> Floats:
    """Exponential numbers with mean 1."""
    return -log(shares(stream, first, count))


def normals(stream: int, first: int, count: int) -> Floats:
    """Normal numbers with mean 0 and deviation 1."""
    return normal_quantile(shares(stream, first, count))


def normal_quantile(share: Floats) -> Floats:
    """The number below which that share of a standard normal lies."""
    centred = share - 0.5
    result = centred * _ratio(_CENTRE, 0.180625 - centred * centred)
    outside = np.abs(centred) > 0.425
    if outside.any():
        result[outside] = _tails(share[outside])
    return result


def _tails(share: Floats) -> Floats:
    depth = np.sqrt(-log(np.minimum(share, 1.0 - share)))
    size = np.where(depth <= 5.0, _ratio(_TAIL, depth - 1.6), _ratio(_FAR, depth - 5.0))
    return np.where(share < 0.5, -size, size)


def _ratio(coefficients: tuple[tuple[float, ...], tuple[float, ...]], x: Floats) -> Floats:
    return _polynomial(coefficients[0], x) / _polynomial(coefficients[1], x)


def _polynomial(coefficients: tuple[float, ...], x: Floats) -> Floats:
    """Horner's scheme, highest power first."""
    result = np.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        result *= x
        result += coefficient
    return result
