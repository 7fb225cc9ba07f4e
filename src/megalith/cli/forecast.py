"""`megalith forecast`: learn the distribution of a load, say how good it is, and hand it to the simulator."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cyclopts import App, Parameter

from megalith.base.errors import ConfigError
from megalith.cli.output import JsonFlag, print_tables, progress, result_console

if TYPE_CHECKING:
    from megalith.specs.load_series import LoadSeries
    from megalith.train.forecast import Forecaster, ForecastOptions

app = App(
    name="forecast",
    help="Learn the distribution of a load, score it, and write what a fleet may be sized by.",
    help_format="plaintext",
    default_parameter=Parameter(negative=()),
)
_EXAMPLES = """\
LOAD is a CSV: a time first (ISO 8601 or seconds, in equal steps), a column
`load`, and any number of indicators; or `seasonal` or `white`, loads that
Megalith makes itself (`seasonal:3` from another seed). 70 % of the rows train,
10 % choose when to stop, 20 % are scored and forecast. Row 0 of the posterior
is the first of these; --workload writes the requests of the same rows.

Examples:
  megalith forecast load.csv
  megalith forecast load.csv --target rps --level sessions=1 --model rps.npz
  megalith forecast seasonal --width 64 --posterior month.posterior \\
      --workload month.toml --input 1000 --output lognormal:5500:0.4
  megalith simulate --trace month.toml --model llama-3.1-8b --fleet fleet.toml \\
      --controller posterior-scaling:path=month.posterior:capacity_per_s=0.006"""
app.help_epilogue = _EXAMPLES


@Parameter(name="*", group="What to learn")
@dataclass(frozen=True)
class Learn:
    """Data and network."""

    target: str = "load"
    """The column that is forecast."""
    level: tuple[str, ...] = ()
    """NAME=LEVEL of an indicator, 1 the top (traffic), 2 services, 3 resources; 2 unless said."""
    window: int = 144
    """Steps that are seen."""
    horizon: int = 4
    """Steps that are forecast together."""
    width: int = 128
    """Of the network."""
    epochs: int = 20
    """At most; it stops when the validation rows get no better."""
    gaussian: bool = False
    """Leave the flow out: the control."""
    seed: int = 0
    """Of weights, order and samples."""


@Parameter(name="*", group="What to write")
@dataclass(frozen=True)
class Write:
    """Files."""

    model: Path | None = None
    """The forecaster: read when it is there, else trained and written. An interrupted training goes on."""
    posterior: Path | None = None
    """Samples of the load for posterior-scaling."""
    samples: int = 200
    """Of each row."""
    workload: Path | None = None
    """A workload (.toml) that plays the same rows."""
    input: str = "1000"
    """Prompt lengths of the workload."""
    output: str = "lognormal:250:0.8"
    """Answer lengths."""
    scale: float = 1.0
    """Requests a second for one unit of load."""


@app.default
def forecast(load: str, /, learn: Learn | None = None, write: Write | None = None, *, json: JsonFlag = False) -> int:
    """Train on LOAD or read a trained forecaster, score it and write files."""
    from megalith.train.forecast_report import hand_on, score_table, scores, write_workload
    from megalith.train.forecast_windows import parts

    learn, write = learn or Learn(), write or Write()
    if write.samples < 2 or not 0 < write.scale < 1e12:
        raise ConfigError("--samples must be at least 2 and --scale above 0.", "Leave them as they are.")
    series = _series(load, learn.target)
    forecaster = _forecaster(series, _options(learn), write.model)
    rows = parts(len(series), forecaster.options.split, load).test
    samples = forecaster.samples(series, rows, write.samples, learn.seed)
    found = scores(forecaster, series, samples, rows, learn.seed)
    written = {}
    if write.posterior is not None:
        hand_on(write.posterior, series, rows, samples, f"{load}, rows {rows.start} to {rows.stop - 1}")
        written["posterior"] = str(write.posterior)
    if write.workload is not None:
        from megalith.specs.lengths import parse_lengths

        lengths = parse_lengths(write.input), parse_lengths(write.output)
        requests = write_workload(write.workload, series, rows, write.scale, lengths)
        written["workload"] = (
            f"{write.workload}: {requests:,} requests in {len(rows) * series.step_s / 86_400:.1f} days"
        )
    course = forecaster.course
    facts = {
        "load": load, "steps": len(series), "step_s": series.step_s, "indicators": list(series.names),
        "epochs": len(course.valid_nats), "best_epoch": course.best_epoch,
        "valid_nats": min(course.valid_nats), "written": written,
    }  # fmt: skip
    if not json:
        console = result_console()
        console.print(f"{load}: {len(series):,} steps of {series.step_s:g} s, {len(series.names)} columns; ended after "
                      f"epoch {len(course.valid_nats)}, kept {course.best_epoch}", soft_wrap=True)  # fmt: skip
        for name, text in written.items():
            console.print(f"{name}: {text}", soft_wrap=True)
    print_tables({"scores": score_table(found, len(rows))}, json=json, facts=facts)
    return 0


def _series(load: str, target: str) -> LoadSeries:
    from megalith.specs.load_series import read_load_series
    from megalith.specs.load_synthetic import SyntheticLoad, synthesize

    kind, _, seed = load.partition(":")
    if kind in ("seasonal", "white") and (not seed or seed.isdecimal()):
        return synthesize(SyntheticLoad(kind="white" if kind == "white" else "seasonal"), int(seed or 0))
    return read_load_series(Path(load).expanduser(), target)


def _options(learn: Learn) -> ForecastOptions:
    from megalith.train.forecast import ForecastOptions
    from megalith.train.forecast_net import NetOptions
    from megalith.train.forecast_windows import SplitOptions

    levels: dict[str, int] = {}
    for text in learn.level:
        name, equals, level = text.rpartition("=")
        if not equals or not level.isdecimal():
            raise ConfigError(f"--level {text} is not NAME=LEVEL.", "Write it like --level sessions=1.")
        levels[name] = int(level)
    net = NetOptions(width=learn.width, inner=2 * learn.width, flow_width=max(1, learn.width // 2),
                     flows=0 if learn.gaussian else 2)  # fmt: skip
    split = SplitOptions(window=learn.window, horizon=learn.horizon)
    return ForecastOptions(split=split, net=net, levels=levels, most_epochs=learn.epochs, seed=learn.seed)


def _forecaster(series: LoadSeries, options: ForecastOptions, path: Path | None) -> Forecaster:
    """The one in the file, if it is that of these options; else a new one."""
    from megalith.train.forecast import fit, load_forecaster

    if path is not None and path.exists():
        stored = load_forecaster(path)
        if stored.options != options:
            what = f"The forecaster in {path} was trained with other options than are asked for."
            raise ConfigError(what, "Name another file, delete this one, or give the flags that it was trained with.")
        return stored
    checkpoint = None if path is None else path.with_name(f"{path.name}.part")
    with progress("training", options.most_epochs, "epochs") as advance:
        trained = fit(series, options, checkpoint, lambda _epoch, _nats: advance(1))
    if path is not None and checkpoint is not None:
        trained.save(path)
        checkpoint.unlink(missing_ok=True)
    return trained
