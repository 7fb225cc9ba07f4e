"""Counter-based random numbers: the same (seed, index) gives the same number everywhere.

SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014). Stateless, so that a
request's draws do not depend on its batch, its instance, or whether it was preempted. The native backend has the same
function; a test holds the two equal.
"""

from __future__ import annotations

_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15


def splitmix64(seed: int, index: int) -> int:
    """The `index`-th 64-bit number of the stream `seed` (both taken modulo 2**64)."""
    z = (seed + (index + 1) * _GAMMA) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def uniform(seed: int, index: int) -> float:
    """A float in [0, 1) with 24 random bits, exact in float32."""
    return (splitmix64(seed, index) >> 40) * 2.0**-24
