"""A posterior of the load, frozen: at each step, samples of the load in the next steps. What a forecaster writes, and
what a scaling policy reads; between the two there is this file and no torch.

Row k was drawn at the beginning of step k, knowing what came before it, and says the load in steps k, k + 1, ... up to
the horizon; the values of one sample belong together. Time 0 is that of the simulated or served load. The file is a
line of JSON and 32-bit floats in the order row, sample, step; its checksum is in the line.
"""

from __future__ import annotations

import json
import sys
from array import array
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from megalith.base.errors import ConfigError, MachineError

_FORMAT = "megalith-posterior-1"
_MOST_BYTES = 4 << 30
_HINT = "Write one with `megalith forecast LOAD.csv --posterior FILE`."


@dataclass(frozen=True, slots=True)
class Posterior:
    """Samples of the load, by step."""

    step_s: float
    rows: int
    count: int
    """Samples of a row."""
    horizon: int
    """Steps of a sample; the first is the one that begins as the row is drawn."""
    values: array[float]
    """rows * count * horizon, requests a second (or whatever the load was counted in)."""
    source: str = ""
    """What it was drawn from, in words."""

    def __post_init__(self) -> None:
        sizes = self.rows, self.count, self.horizon
        if min(sizes) < 1 or self.step_s <= 0 or len(self.values) != self.rows * self.count * self.horizon:
            what = (
                f"A posterior of {self.rows} rows of {self.count} samples of {self.horizon} steps of {self.step_s:g} s"
            )
            raise ConfigError(f"{what} does not go with {len(self.values):,} values.", _HINT)

    def peaks(self, from_s: float, until_s: float) -> list[float]:
        """For each sample the largest load in the steps that touch [from_s, until_s), as known at `from_s`.

        The last row speaks for the steps of its horizon too; a wish that reaches beyond what is forecast is answered
        for as far as it goes. Raises ConfigError where nothing is forecast at `from_s`.
        """
        now = int(from_s // self.step_s)
        row = min(now, self.rows - 1)
        if from_s < 0 or now - row >= self.horizon:
            raise ConfigError(
                f"The posterior ({self.source or 'no source given'}) covers {self.covered_s:g} s "
                f"({self.rows} rows of {self.step_s:g} s and {self.horizon - 1} more), and a decision is due at "
                f"{from_s:g} s.",
                "Forecast more rows, or simulate no longer than it covers.",
            )
        first = now - row
        last = max(first + 1, min(self.horizon, -int(-until_s // self.step_s) - row))
        horizon, values = self.horizon, self.values
        start = row * self.count * horizon
        return [
            max(values[place + first : place + last]) for place in range(start, start + self.count * horizon, horizon)
        ]

    @property
    def covered_s(self) -> float:
        """Up to when decisions can be made."""
        return (self.rows + self.horizon - 1) * self.step_s


def write_posterior(path: Path, posterior: Posterior) -> None:
    """Raises MachineError when the file cannot be written."""
    body = _little(array("f", posterior.values)).tobytes()
    head = {
        "format": _FORMAT, "step_s": posterior.step_s, "rows": posterior.rows, "count": posterior.count,
        "horizon": posterior.horizon, "source": posterior.source, "checksum": _checksum(body),
    }  # fmt: skip
    beside = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_bytes(json.dumps(head).encode() + b"\n" + body)
        beside.replace(path)
    except OSError as error:
        raise MachineError(f"{path} cannot be written ({error.strerror}).", "Name another file.") from None


def read_posterior(name: str | Path) -> Posterior:
    """What `write_posterior` wrote. Raises ConfigError for a missing, foreign or damaged file."""
    path = Path(name).expanduser()
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ConfigError(f"The posterior {path} is larger than {_MOST_BYTES >> 30} GiB.", "Draw fewer samples.")
        head_line, newline, body = path.read_bytes().partition(b"\n")
        head: dict[str, Any] = json.loads(head_line) if newline else {}
    except OSError as error:
        raise ConfigError(f"The posterior {path} cannot be read ({error.strerror}).", _HINT) from None
    except ValueError:
        head, body = {}, b""
    if not isinstance(head, dict) or head.get("format") != _FORMAT:
        raise ConfigError(f"{path} is no posterior of the form {_FORMAT}.", _HINT)
    if head.get("checksum") != _checksum(body) or len(body) % 4:
        raise ConfigError(f"The posterior {path} is damaged: its checksum does not match.", "Write it anew.")
    values = array("f")
    values.frombytes(body)
    numbers = {name: head.get(name) for name in ("step_s", "rows", "count", "horizon")}
    if not all(isinstance(number, int | float) and not isinstance(number, bool) for number in numbers.values()):
        raise ConfigError(f"The head of the posterior {path} lacks a number: {numbers}.", _HINT)
    return Posterior(
        float(head["step_s"]), int(head["rows"]), int(head["count"]), int(head["horizon"]), _little(values),
        str(head.get("source", "")),
    )  # fmt: skip


def _little(values: array[float]) -> array[float]:
    """Little-endian, whatever the machine is."""
    if sys.byteorder == "big":
        values = values[:]
        values.byteswap()
    return values


def _checksum(body: bytes) -> str:
    return blake2b(body, digest_size=16).hexdigest()
