"""Superpipeline (arXiv:2410.08791): a window of the layers of unmodified modules in memory, against all of them.

Measured on this machine: near bytes and bits of a language and a vision model, the peak of a process from outside, and
the time of a step over (k, k') beside its prediction, on a link of an imposed rate and on none. What the points run is
in superpipeline_cases.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

from megalith.report.table import Column, Table
from megalith.studies.results import Results
from megalith.studies.study import Arm, Case, Claim, Computed, Experiment, Finding, Gate, Judgement, Picture, Study
from megalith.studies.superpipeline_cases import LAYERS, PROCESS_LAYERS

WINDOW, RESIDENT, IDLE = (
    Arm("window", "on", "a window"), Arm("resident", "off", "all layers in memory"),
    Arm("idle", "baseline", "one layer"),
)  # fmt: skip
MODELS = (1.0, 2.0)
"""1: language (SmolLM2), 2: vision."""
SLOW, FAST = 1.5, 0.6
"""Times a layer's computing that its move takes on the imposed link."""
KS, WHOLE = (2.0, 4.0, 8.0, 14.0, 20.0), (2.0, 4.0, 8.0)
_CASES = "megalith.studies.superpipeline_cases"
CURVES = {
    "inference": "inference, k' = 1",
    "whole": "inference, k' = k",
    "training": "training, k' = 1",
    "fast-link": "inference, k' = 1, moves 0.6 times a layer",
}
FREE = {"copies": "no throttle, from host memory", "disk": "no throttle, from disk"}


def _memory(case: Case) -> Computed:
    return Computed(call=f"{_CASES}:memory", options={"arm": case.arm, "model": case.at})


def _process(case: Case) -> Computed:
    return Computed(call=f"{_CASES}:process", options={"arm": case.arm})


def _curve(kind: str, moves: float, whole: bool = False) -> Callable[[Case], Computed]:
    def task(case: Case) -> Computed:
        train = kind == "training"
        options: dict[str, float | str] = {"arm": case.arm, "kind": "training" if train else "inference"}
        if case.arm == WINDOW.name:  # All in memory is the same wherever it stands.
            options |= {"kind": kind, "moves": moves, "k": case.at, "k_prime": case.at if whole else 1.0}
        return Computed(call=f"{_CASES}:curve", options=options)

    return task


def judge(results: Results) -> Judgement:
    """Bytes saved, bits, peaks, and measured over predicted of every point of the curves."""
    claim = STUDY.claim
    findings = [
        Finding(claim(key), results.middle("memory", WINDOW.name, "saved", at), *_megabytes(results, at), "k = 0.4 L")
        for key, at in (("language", 1.0), ("vision", 2.0))
    ]
    ratios = {name: _ratios(results, name) for name in CURVES}
    every = [ratio for found in ratios.values() for ratio in found.values()]
    near = sum(abs(ratio - 1) <= 0.2 for ratio in every) / len(every) if every else None
    findings += [
        Finding(claim("process"), *_process_share(results)),
        Finding(claim("predicted"), near, _span(every), "-", f"{len(every)} points of (k, k')"),
        Finding(
            claim("hidden"), results.middle("fast-link", WINDOW.name, "slower", 8.0), *_times(results), "k = 0.4 L"
        ),
    ]
    gates = [
        Gate(f"same bits, {name}", results.middle("memory", WINDOW.name, "same", at), 1.0, 1.0, "exact")
        for name, at in (("language", 1.0), ("vision", 2.0))
    ]
    gates += [
        Gate(f"near bytes over k / L of all, {name}", _share(results, at), 0.95, 1.05, "k / L")
        for name, at in (("language", 1.0), ("vision", 2.0))
    ]
    gates += [
        Gate(f"measured over predicted, median, {CURVES[name]}", median(found.values()) if found else None, 0.8, 1.2,
             "recursion")
        for name, found in ratios.items()
    ]  # fmt: skip
    panels = {
        f"step, s: {title}": {
            "measured": results.curve(name, WINDOW.name, "step_s"),
            "predicted": results.curve(name, WINDOW.name, "predicted_s"),
            "all in memory": results.curve(name, RESIDENT.name, "step_s"),
        }
        for name, title in CURVES.items()
    }
    pictures = [
        Picture("curve", f"Step over the window, {LAYERS} layers", "k, layers near", panels=panels, logarithmic=False)
    ]
    return Judgement(findings, gates, {"curve": _table(results)}, pictures, _NOTES)


def _ratios(results: Results, name: str) -> dict[float, float]:
    return {at: median(values) for at, values in results.curve(name, WINDOW.name, "ratio").items()}


def _span(ratios: list[float]) -> str:
    return f"{min(ratios):.2f} to {max(ratios):.2f} times predicted" if ratios else "-"


def _megabytes(results: Results, at: float) -> tuple[str, str]:
    on, off = (results.middle("memory", arm.name, "near_mb", at) for arm in (WINDOW, RESIDENT))
    return tuple("-" if value is None else f"{value:.0f} MiB of layers" for value in (on, off))  # type: ignore[return-value]


def _share(results: Results, at: float) -> float | None:
    on, off = (results.middle("memory", arm.name, "near_mb", at) for arm in (WINDOW, RESIDENT))
    count = LAYERS if at == 2.0 else 30
    return on / off / (round(0.4 * count) / count) if on and off else None


def _process_share(results: Results) -> tuple[float | None, str, str, str]:
    on, off, idle = (results.middle("process", arm.name, "peak_mb", 16.0) for arm in (WINDOW, RESIDENT, IDLE))
    if on is None or off is None or idle is None:
        return None, "-", "-", ""
    note = f"over a process with one layer ({idle:.0f} MiB); k = 0.4 L, {PROCESS_LAYERS} layers from disk"
    return 1 - (on - idle) / (off - idle), f"{on:.0f} MiB", f"{off:.0f} MiB", note


def _times(results: Results) -> tuple[str, str]:
    on, off = (results.middle("fast-link", arm.name, "step_s", 8.0) for arm in (WINDOW, RESIDENT))
    return tuple("-" if value is None else f"{value:.3g} s a step" for value in (on, off))  # type: ignore[return-value]


def _table(results: Results) -> Table:
    columns = [
        Column("setting", "setting", "text"), Column("k", "k", "count"),
        Column("near", "near, MiB", "number", "measured"), Column("step", "step, s", "number", "measured"),
        Column("predicted", "step, s", "number", "predicted"), Column("ratio", "measured / predicted", "number"),
        Column("resident", "all in memory, s", "number", "measured"),
    ]  # fmt: skip
    table = Table(columns, "The memory-time curve")
    for name, title in {**CURVES, **FREE}.items():
        for at in results.places(name):
            values = [
                results.middle(name, WINDOW.name, key, at) for key in ("near_mb", "step_s", "predicted_s", "ratio")
            ]
            table.add(title, int(at), *values, results.middle(name, RESIDENT.name, "step_s", at))
    return table


_NOTES = [
    "Saved are the weights of the layers, as published. Embedding and head stay: of all weights of SmolLM2 in float32 "
    "they are a fifth.",
    "The prediction takes compute times from the module with all layers in memory, in the same process just before; "
    "the imposed link is 1.5 times (fast: 0.6 times) as slow as computing. One thread computes, another moves.",
    "Without a throttle the prediction takes what a move takes alone, while both share the machine's memory and cores: "
    "printed, not judged.",
    "Run for 3 seconds a point on whatever else the machine does; read ratios, not seconds.",
]
_SHOWN = {"step, s": "step_s", "near, MiB": "near_mb"}
_ARMS = (WINDOW, RESIDENT)


def _experiment(
    name: str, title: str, kind: str, moves: float, at: tuple[float, ...], whole: bool = False
) -> Experiment:
    fast = (at[0], 8.0) if 8.0 in at else at[:1]
    return Experiment(
        name, title, _ARMS, "k", at, _curve(kind, moves, whole), 1, fast, nature="measured", shown=_SHOWN
    )  # fmt: skip


STUDY = Study(
    name="superpipeline",
    system="Superpipeline: A Universal Approach for Reducing GPU Memory Usage in Large Models",
    title="Superpipeline: a window of layers in memory",
    summary=(
        "A module is a list of layers. k of them are in device memory; when k' have run, those are exchanged for the",
        "next k', behind the computing. Forward walks up, backward walks down; weights and results do not change.",
        "Here the device's memory is the host's, and the host's a second pool of it, or a disk, behind a link of an",
        "imposed rate. Control: the same module with all its layers in memory.",
    ),
    reference="Abbasi et al., Superpipeline: A Universal Approach for Reducing GPU Memory Usage in Large Models, "
    "arXiv:2410.08791",
    claims=(
        Claim("language", "weights of layers saved, language", "SmolLM2 135M", 0.6, (0.57, 0.7), 0.0, ""),
        Claim("vision", "weights of layers saved, vision", "plain ViT", 0.6, (0.57, 0.7), 0.0, ""),
        Claim("process", "peak of the process saved", "from outside", 0.6, (0.57, 0.7), 0.0, ""),
        Claim("predicted", "points within 20 % of predicted", "imposed link", 1.0, (0.9, 1.0), 0.0, "",
              "no figure; all of them is what we ask of the planner"),
        Claim("hidden", "step over that in memory", "moves 0.6 times a layer", 1.1, (0.9, 1.1), 1.0, "x",
              "an acceptable slow-down; we take 10 %"),
    ),
    experiments=(
        Experiment("memory", "weights near, and bits", _ARMS, "model", MODELS, _memory, 1, nature="measured",
                   shown={"near, MiB": "near_mb", "with the rest, MiB": "all_mb", "same bits": "same"}),
        Experiment("process", "peak of a process, from outside", (*_ARMS, IDLE), "k", (16.0,), _process, 1,
                   nature="measured", shown={"peak, MiB": "peak_mb"}),
        _experiment("inference", CURVES["inference"], "inference", SLOW, KS),
        _experiment("whole", CURVES["whole"], "inference", SLOW, WHOLE, True),
        _experiment("training", CURVES["training"], "training", SLOW, KS),
        _experiment("fast-link", CURVES["fast-link"], "inference", FAST, (2.0, 8.0)),
        _experiment("copies", FREE["copies"], "inference", 0.0, (2.0, 8.0)),
        _experiment("disk", FREE["disk"], "disk", 0.0, (2.0, 8.0)),
    ),
    judge=judge,
    profiles=("measured: this machine, one thread of torch, one of the mover",),
    differences=(
        "No GPU here: near memory is host memory, the far tier a second pool of it or a disk, behind a token bucket.",
        "k counts all layers that are near, those on their way included; published k' layers may come on top.",
        "The window also walks down for the backward; at both ends it keeps what it has, so training moves 2 (L - k) "
        "layers a step.",
    ),
)  # fmt: skip
