"""The cheapest mix of instance types for a load, as an integer program: Mélange (Griggs et al., arXiv:2404.14527).

The load is cut into groups of requests of similar size, each group into S equal slices. With n_gj slices of group g on
type j, l_gj the instances of type j that the whole group would keep busy, and B_j instances of type j at c_j each:

    min  sum_j c_j B_j
    s.t. sum_j n_gj = S                             for every group g
         sum_g n_gj l_gj / S <= B_j <= most_j       for every type j
         sum_j d_j B_j <= most_devices
         n_gj, B_j whole numbers, not below 0

The paper has one binary variable for each slice and type. The slices of a group are alike, so counting them says the
same with fewer variables and without its symmetry. Uncut groups (S = 1 and n_gj any share) are what slices approach as
they get finer: never dearer, and a router can send any share. Knows numbers only; must not know devices or requests.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import ceil, inf, isfinite
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from megalith.base.errors import CapacityError, ConfigError, MachineError
from megalith.base.units import NS_PER_S

if TYPE_CHECKING:
    from highspy import Highs, HighsLp

SLICES = 8
"""Parts of a group in the paper: 4 to 8 (`slice_factor`)."""
DEADLINE_NS = 30 * NS_PER_S
"""For one program. What is found by then is returned with its distance from the bound."""
TOLERANCE = 1e-6
"""Instances by which a type may be overloaded: HiGHS keeps its constraints to within this."""
_MOST_SLICES = 10_000


class Offer(NamedTuple):
    """A type of instance that may be bought."""

    name: str
    price: float
    """Of one instance, in what is minimised: USD an hour, or devices."""
    most: int | None = None
    """None: as many as one likes."""
    devices: int = 1
    """Of one instance."""


class Mix(msgspec.Struct, frozen=True, kw_only=True):
    """How many instances of which type, and which part of each group they serve."""

    counts: tuple[int, ...]
    """By offer."""
    price: float
    """Of all of them together, in the unit of the offers."""
    shares: tuple[tuple[float, ...], ...]
    """By group and offer: which share of the group's requests an offer serves."""
    busy: tuple[float, ...]
    """By offer, the instances that its shares keep busy; at most its count."""
    bound: float
    """No mix is cheaper than that. Equal to `price` unless the deadline came first."""

    @property
    def proven(self) -> bool:
        """Whether there is no cheaper one."""
        return self.price <= self.bound + TOLERANCE


def cheapest_mix(
    offers: Sequence[Offer],
    loads: Sequence[Sequence[float]],
    *,
    slices: int | None = SLICES,
    most_devices: int | None = None,
    deadline_ns: int = DEADLINE_NS,
) -> Mix:
    """The cheapest mix. `loads[group][offer]`: instances that the group keeps busy; infinite where it cannot be served.
    `slices` None: groups are not cut, any share of one may go anywhere.

    Raises ConfigError for numbers that mean nothing, CapacityError when no mix serves every group, MachineError
    without the solver.
    """
    _check(offers, loads, slices)
    highs = solver(deadline_ns)
    program = _program(offers, loads, slices, most_devices)
    highs.passModel(program)
    highs.run()
    values = list(highs.getSolution().col_value)
    info = highs.getInfo()
    if info.primal_solution_status != 2:
        raise _without(offers, loads, most_devices, highs.modelStatusToString(highs.getModelStatus()), deadline_ns)
    shares = _shares(loads, values, slices)
    bought = tuple(round(value) for value in values[-len(offers) :])
    price = sum(offer.price * count for offer, count in zip(offers, bought, strict=True))
    bound = min(price, float(info.mip_dual_bound)) if isfinite(info.mip_dual_bound) else 0.0
    if price - bound <= TOLERANCE * max(1.0, price):
        bound = price
    return Mix(counts=bought, price=price, shares=shares, busy=_busy(loads, shares), bound=bound)


def single(offer: Offer, loads: Sequence[float], most_devices: int | None = None) -> int | None:
    """Instances of one type that serve every group; None where it cannot or there are not so many."""
    needed = sum(loads)
    if not isfinite(needed):
        return None
    count = max(0, ceil(needed - TOLERANCE))
    within = offer.most is None or count <= offer.most
    return count if within and (most_devices is None or count * offer.devices <= most_devices) else None


def _check(offers: Sequence[Offer], loads: Sequence[Sequence[float]], slices: int | None) -> None:
    if not offers:
        raise ConfigError("There is no type of instance to choose from.", "Name at least one device.")
    if not loads:
        raise ConfigError("There is no load to serve.", "Give at least one group of requests.")
    if slices is not None and not 1 <= slices <= _MOST_SLICES:
        raise ConfigError(f"A group cannot be cut into {slices:,} slices.", f"Give 1 to {_MOST_SLICES:,}.")
    for offer in offers:
        if not (offer.price >= 0 and isfinite(offer.price)) or offer.devices < 1:
            raise ConfigError(f"{offer.name} at {offer.price:g} of {offer.devices} devices is no offer.", "Price it.")
        if offer.most is not None and offer.most < 0:
            raise ConfigError(f"At most {offer.most} of {offer.name} cannot be bought.", "Give 0 or more.")
    for group, row in enumerate(loads):
        if len(row) != len(offers):
            raise ConfigError(f"Group {group} has {len(row)} loads for {len(offers)} types.", "Give one for each.")
        for offer, load in zip(offers, row, strict=True):
            if not load >= 0:
                raise ConfigError(f"Group {group} keeps {load:g} instances of {offer.name} busy.", "Give 0 or more.")


def check_solver() -> None:
    """Raise before the work, not after it: MachineError without the solver."""
    try:
        import highspy
    except ImportError:
        hint = "Install it with `pip install 'megalith[plan]'`, or plan single types without --mix."
        raise MachineError("highspy (the HiGHS solver) is not installed, so no mix can be found.", hint) from None
    del highspy


def solver(deadline_ns: int) -> Highs:
    """HiGHS, silent: one thread, no gap, a fixed seed and a deadline. MachineError without it."""
    check_solver()
    import highspy

    make: Any = highspy.Highs  # its own types leave it out
    with _no_banner():
        highs: Highs = make()
    highs.silent()
    for name, value in {
        "threads": 1, "random_seed": 0, "time_limit": deadline_ns / NS_PER_S,
        "mip_rel_gap": 0.0, "mip_abs_gap": TOLERANCE, "mip_feasibility_tolerance": TOLERANCE,
        "primal_feasibility_tolerance": TOLERANCE,
    }.items():  # fmt: skip
        highs.setOptionValue(name, value)
    return highs


@contextmanager
def _no_banner() -> Iterator[None]:
    """HiGHS writes its name to file 1 as it is made, before it can be told to be silent: into what --json prints."""
    sys.stdout.flush()
    try:
        kept = os.dup(1)
    except OSError:  # closed: nothing can be written to it
        yield
        return
    nothing = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nothing)


def _program(
    offers: Sequence[Offer], loads: Sequence[Sequence[float]], slices: int | None, most_devices: int | None
) -> HighsLp:
    """The program by columns: n_gj group by group, then B_j. Rows: groups, then types, then devices in all."""
    import highspy
    import numpy as np

    groups, types, parts = len(loads), len(offers), float(slices or 1)
    columns: list[tuple[float, float, list[tuple[int, float]]]] = []
    for group, row in enumerate(loads):
        for place, load in enumerate(row):
            if isfinite(load):
                columns.append((0.0, parts, [(group, 1.0), (groups + place, load / parts)]))
    for place, offer in enumerate(offers):
        most = inf if offer.most is None else float(offer.most)
        columns.append((offer.price, most, [(groups + place, -1.0), (groups + types, float(offer.devices))]))
    lp = highspy.HighsLp()
    lp.num_col_, lp.num_row_ = len(columns), groups + types + 1
    lp.col_cost_ = np.array([cost for cost, _, _ in columns])
    lp.col_lower_ = np.zeros(len(columns))
    lp.col_upper_ = np.array([upper for _, upper, _ in columns])
    devices = inf if most_devices is None else float(most_devices)
    lp.row_lower_ = np.array([parts] * groups + [-inf] * (types + 1))
    lp.row_upper_ = np.array([parts] * groups + [0.0] * types + [devices])
    lp.a_matrix_.format_ = highspy.MatrixFormat.kColwise
    entries = [entry for _, _, column in columns for entry in column]
    lp.a_matrix_.start_ = np.cumsum([0] + [len(column) for _, _, column in columns]).astype(np.int32)
    lp.a_matrix_.index_ = np.array([row for row, _ in entries], dtype=np.int32)
    lp.a_matrix_.value_ = np.array([value for _, value in entries])
    whole, any_number = highspy.HighsVarType.kInteger, highspy.HighsVarType.kContinuous
    lp.integrality_ = [any_number if slices is None else whole] * (len(columns) - types) + [whole] * types
    return lp


def _shares(
    loads: Sequence[Sequence[float]], values: Sequence[float], slices: int | None
) -> tuple[tuple[float, ...], ...]:
    """Of each group, by offer, from the solver's columns; whole slices without its rounding."""
    shares, at = [], 0
    for row in loads:
        wide = [isfinite(load) for load in row]
        found = [max(value, 0.0) if slices is None else round(value) / slices for value in values[at : at + sum(wide)]]
        total, rest = sum(found), iter(found)
        shares.append(tuple(next(rest) / total if one else 0.0 for one in wide))
        at += sum(wide)
    return tuple(shares)


def _busy(loads: Sequence[Sequence[float]], shares: Sequence[Sequence[float]]) -> tuple[float, ...]:
    totals = [0.0] * len(loads[0])
    for row, parts in zip(loads, shares, strict=True):
        for place, (load, share) in enumerate(zip(row, parts, strict=True)):
            if share:
                totals[place] += load * share
    return tuple(totals)


def _without(
    offers: Sequence[Offer], loads: Sequence[Sequence[float]], most_devices: int | None, status: str, deadline_ns: int
) -> CapacityError:
    """Why there is no mix, with numbers."""
    alone = [group for group, row in enumerate(loads) if not any(map(isfinite, row))]
    names = ", ".join(offer.name for offer in offers)
    if alone:
        what = f"{len(alone)} of {len(loads)} groups of requests can be served by none of {names}."
        return CapacityError(what, "Offer a larger or faster type.")
    if "ime limit" in status:
        what = f"No mix was found within {deadline_ns / NS_PER_S:g} s."
        return CapacityError(what, "Cut the groups into fewer slices.")
    least = [
        f"{offer.name} alone would need {sum(column):.4g}" if isfinite(sum(column := [row[j] for row in loads]))
        else f"{offer.name} cannot serve all of it"
        for j, offer in enumerate(offers)
    ]  # fmt: skip
    limits = [f"at most {offer.most} of {offer.name}" for offer in offers if offer.most is not None]
    limits += [] if most_devices is None else [f"at most {most_devices:,} devices in all"]
    return CapacityError(f"No mix serves the load ({'; '.join(least)}) with {', '.join(limits)}.", "Allow more.")
