"""The Parquet files of a simulated run: one row a request, one row an instance and stretch of time.

Knows the columns of the recorder and of the series; must not know how Parquet is written (report.parquet). Every file
says in its metadata that it is simulated, and by which settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from megalith.report.parquet import ParquetColumn, ParquetWriter
from megalith.sim.histogram import IntArray
from megalith.sim.record import COLUMNS, OUTCOMES
from megalith.sim.series import FIGURES, Series

_MAY_MISS = frozenset({"scheduled_ns", "first_ns", "finish_ns", "instance", "decode_instance"})
_DERIVED = ("ttft_ns", "tpot_ns", "e2e_ns")

REQUEST_COLUMNS = (
    *(
        ParquetColumn(
            name,
            never=-1 if name in _MAY_MISS else None,
            labels=OUTCOMES if name == "outcome" else (),
        )
        for name in COLUMNS
    ),
    *(ParquetColumn(name, never=-1) for name in _DERIVED),
)
INSTANCE_COLUMNS = (
    ParquetColumn("start_ns"),
    ParquetColumn("time_ns"),
    ParquetColumn("instance"),
    *(ParquetColumn(name, "float") for name in FIGURES),
)


class RequestTable:
    """A sink for the recorder that writes every request to a file. Close it after the recorder's `figures()`."""

    def __init__(self, path: Path, settings: Mapping[str, str]) -> None:
        self._writer = ParquetWriter(path, REQUEST_COLUMNS, {"nature": "simulated", **settings})

    def __call__(self, columns: Mapping[str, IntArray]) -> None:
        """Take a batch of COLUMNS."""
        self._writer.append({**columns, **_derived(columns)})

    def close(self) -> int:
        """Complete the file; how many rows it has."""
        self._writer.close()
        return self._writer.rows

    def discard(self) -> None:
        """Give up and leave no file."""
        self._writer.discard()


def write_series(path: Path, series: Series, settings: Mapping[str, str]) -> int:
    """Write the samples of all instances; how many rows there are."""
    with ParquetWriter(path, INSTANCE_COLUMNS, {"nature": "simulated", **settings}) as writer:
        writer.append(series.columns())
    return writer.rows


def _derived(columns: Mapping[str, IntArray]) -> dict[str, IntArray]:
    """Latencies as the recorder counts them: of the requests that finished, else -1."""
    arrival, first, finish = columns["arrival_ns"], columns["first_ns"], columns["finish_ns"]
    done, tokens = columns["outcome"] == 0, columns["generated"]
    return {
        "ttft_ns": np.where(done, first - arrival, -1),
        "tpot_ns": np.where(done & (tokens > 1), (finish - first) // np.maximum(tokens - 1, 1), -1),
        "e2e_ns": np.where(done, finish - arrival, -1),
    }
