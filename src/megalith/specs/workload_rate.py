"""How fast requests come, and the same workload at another rate: what a sweep over rates turns.

Knows arrivals and traces; knows nothing of what is done with the requests.
"""

from __future__ import annotations

import msgspec

from megalith.base.errors import ConfigError
from megalith.base.units import NS_PER_S
from megalith.specs.arrivals import ClosedLoop, arrivals_at
from megalith.specs.workload import WorkloadSpec, open_workload


def mean_rate(spec: WorkloadSpec) -> float:
    """Requests a second: as asked for where arrivals are drawn, else gaps over span of the recording (read once).

    Raises ConfigError for a closed loop, whose rate is a result, and for a recording that has no span.
    """
    if isinstance(spec.arrivals, ClosedLoop):
        raise ConfigError(
            "A closed loop has no rate of its own: its clients wait for answers.", "Vary clients instead."
        )
    if spec.arrivals is not None:
        return spec.arrivals.rate_per_s * spec.speedup
    first_ns = last_ns = 0
    count = 0
    for count, shape in enumerate(open_workload(spec), 1):
        last_ns = shape.at_ns or 0
        first_ns = last_ns if count == 1 else first_ns
    if last_ns == first_ns:
        raise ConfigError(f"{count} requests at one time have no rate.", "Widen the window, or draw the arrivals.")
    return (count - 1) * NS_PER_S / (last_ns - first_ns)


def at_rate(spec: WorkloadSpec, rate_per_s: float) -> WorkloadSpec:
    """The same workload at another mean rate: drawn arrivals get it and keep their CV; a recording is played faster or
    slower, which keeps its pattern. Raises ConfigError for a closed loop."""
    if spec.arrivals is None or isinstance(spec.arrivals, ClosedLoop):
        return msgspec.structs.replace(spec, speedup=spec.speedup * rate_per_s / mean_rate(spec))
    return msgspec.structs.replace(spec, arrivals=arrivals_at(spec.arrivals, rate_per_s), speedup=1.0)
