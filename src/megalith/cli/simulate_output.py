"""The files that `megalith simulate` leaves: Parquet, pictures, a trace; and the scenario beside them."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from megalith.base.errors import MachineError

if TYPE_CHECKING:
    from megalith.sim.build import Builder
    from megalith.sim.record import Recorder
    from megalith.sim.run import Run, SimResult
    from megalith.sim.scenario import Scenario
    from megalith.sim.tables import RequestTable
    from megalith.sim.tracing import RunTrace


def settings(scenario: Scenario) -> dict[str, str]:
    """A scenario in words: what one must know to read its figures."""
    from megalith.specs.fleet_text import render_pool

    fleet, workload = scenario.fleet, scenario.workload
    load = workload.name or (workload.trace.path if workload.trace is not None else "drawn")
    here = any(pool.device == "this-machine" for pool in fleet.pools)
    weights = "as stored here" if here else f"in {scenario.weight_format}"
    words = {
        "simulated": f"{scenario.model} {weights} on {', '.join(map(render_pool, fleet.pools))}",
        "load": f"{load} ({workload.nature}{', ORACLE: true lengths told' if workload.oracle else ''})",
        "policies": ", ".join(
            dict.fromkeys(
                [*[pool.policy for pool in fleet.pools], fleet.router.name, *[c.name for c in fleet.controllers]]
            )
        ),
    }
    if scenario.slo is not None:
        words["service level"] = str(scenario.slo)
    return words


class Files:
    """Opened before the run, so that a path that cannot be written fails at once; given up when the run fails."""

    def __init__(self, scenario: Scenario, plot: Path | None, parquet: Path | None, trace_events: Path | None) -> None:
        from megalith.report.plot import check_plot_path
        from megalith.report.trace_events import check_trace_path

        self._scenario, self._plot, self._parquet = scenario, plot, parquet
        self._words = settings(scenario)
        self._requests: RequestTable | None = None
        self._trace: RunTrace | None = None
        if plot is not None:
            check_plot_path(plot)
        if trace_events is not None:
            from megalith.sim.tracing import RunTrace

            check_trace_path(trace_events)
            self._trace = RunTrace(trace_events, self._words)
        if parquet is not None:
            from megalith.sim.tables import RequestTable

            try:
                parquet.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise MachineError(f"{parquet} cannot be made ({error.strerror}).", "Name another folder.") from None
            self._requests = RequestTable(parquet / "requests.parquet", self._words)

    def recorder(self, builder: Builder) -> Recorder:
        """A recorder that feeds the files."""
        return builder.recorder(self._requests)

    def watch(self, run: Run) -> None:
        """Draw the run into the trace."""
        if self._trace is not None:
            run.draw(self._trace)

    def write(self, result: SimResult) -> None:
        """What is known only at the end."""
        from megalith.base.errors import MegalithError

        if self._requests is not None and self._parquet is not None:
            import msgspec

            from megalith.sim.tables import write_series

            self._requests.close()
            self._requests = None
            write_series(self._parquet / "instances.parquet", result.series, self._words)
            text = msgspec.json.format(msgspec.json.encode(result.scenario), indent=2)
            try:
                (self._parquet / "scenario.json").write_bytes(text + b"\n")
            except OSError as error:
                raise MegalithError(f"{self._parquet}/scenario.json cannot be written ({error.strerror}).") from None
        if self._plot is not None:
            self._draw(self._plot, result)
        if self._trace is not None:
            self._trace.close()
            self._trace = None

    def _draw(self, path: Path, result: SimResult) -> None:
        from megalith.report.plot_frame import Caption
        from megalith.report.plot_run import plot_cdfs, plot_occupancy, plot_power

        caption = Caption("Latencies", self._words)
        names = {"TTFT": "ttft_ns", "TPOT": "tpot_ns", "E2E": "e2e_ns"}
        curves = {title: result.samples[name].cdf() for title, name in names.items()}
        limits: dict[str, list[tuple[int, float]]] = {}
        if result.scenario.slo is not None:
            for bound in result.scenario.slo.bounds:
                if bound.limit_ns is not None:
                    share = (bound.percent or 100 * result.scenario.slo.attain) / 100
                    limits.setdefault(bound.metric.upper(), []).append((bound.limit_ns, share))
        plot_cdfs(path, caption, curves, limits)
        whole = result.series.cluster()
        times = whole["time_ns"].tolist()
        if times:
            shown = {name: whole[name].tolist() for name in ("running", "waiting", "used_share", "busy_share")}
            plot_occupancy(path.with_stem(f"{path.stem}-occupancy"), Caption("Occupancy", self._words), times, shown)
            power = whole["power_w"].tolist()
            if all(value == value for value in power):
                plot_power(path.with_stem(f"{path.stem}-power"), Caption("Power", self._words), times, {"all": power})

    def __enter__(self) -> Files:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._requests is not None:
            self._requests.discard()
        if self._trace is not None:
            self._trace.discard()
