"""Two mechanisms together: what each is worth alone, what it is worth beside the other, and whether gains multiply.

Knows four figures of one kind, with neither mechanism, with either and with both; must not know what they are.
Published gains cannot be multiplied: some mechanisms sell the same slack twice, others make room for each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from megalith.report.plot_sweep import Curve
from megalith.report.table import Column, Nature, Table
from megalith.studies.results import quotient
from megalith.studies.study import Claim, Finding

INDEPENDENT = 0.05
"""Within that share of 1 the gains multiply."""


class Square(NamedTuple):
    """One figure in the four cells; larger is better (take one over a cost)."""

    neither: float | None
    first: float | None
    second: float | None
    both: float | None

    @property
    def alone(self) -> tuple[float | None, float | None]:
        """The gain of each mechanism without the other."""
        return quotient(self.first, self.neither), quotient(self.second, self.neither)

    @property
    def beside(self) -> tuple[float | None, float | None]:
        """The gain of each mechanism where the other is there."""
        return quotient(self.both, self.second), quotient(self.both, self.first)

    @property
    def interaction(self) -> float | None:
        """The gain beside the other over that alone, the same for both: 1 when gains multiply."""
        return quotient(self.beside[0], self.alone[0])


def claim(key: str, first: str, second: str, setting: str) -> Claim:
    """That the gains of two mechanisms multiply: what one would have to believe to add published gains up."""
    text = f"gains multiply: {first} beside {second} over {first} alone"
    band = (1.0 - INDEPENDENT, 1.0 + INDEPENDENT)
    return Claim(key, text, setting, 1.0, band, 0.0, said="nothing (1x if gains multiplied)")


def finding(claim: Claim, square: Square, note: str = "", *, counts: bool = True) -> Finding:
    """The claim against the square."""
    return Finding(claim, square.interaction, _times(square.beside[0]), _times(square.alone[0]), note, counts)


def square_table(
    title: str,
    names: tuple[str, str],
    axis: str,
    figure: str,
    squares: Mapping[str, Square],
    nature: Nature = "simulated",
) -> Table:
    """A row a place: the four cells, the gains alone and beside the other, the interaction."""
    first, second = names
    columns = [
        Column("at", axis),
        Column("neither", f"neither: {figure}", nature=nature, kind="number"),
        Column("first", first, nature=nature, kind="number"),
        Column("second", second, nature=nature, kind="number"),
        Column("both", "both", nature=nature, kind="number"),
        Column("first_alone", f"gain of {first} alone", "number"),
        Column("first_beside", f"beside {second}", "number"),
        Column("second_alone", f"gain of {second} alone", "number"),
        Column("second_beside", f"beside {first}", "number"),
        Column("interaction", "interaction", "number"),
    ]
    table = Table(columns, title)
    for at, one in squares.items():
        (first_alone, second_alone), (first_beside, second_beside) = one.alone, one.beside
        table.add(at, *one, first_alone, first_beside, second_alone, second_beside, one.interaction)
    table.notes.append(
        "Interaction 1: gains multiply; below 1 both sell the same slack; above 1 they make room for each other."
    )
    return table


def curve(squares: Mapping[float, Square]) -> Curve:
    """The interaction along an axis, for a picture."""
    return {at: [value] for at, one in squares.items() if (value := one.interaction) is not None}


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}x"
