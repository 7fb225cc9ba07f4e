"""What the points of the TPI-LLM study run: sums over imposed links, and real instances over ranks of this machine."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Barrier
from typing import cast

import msgspec
import numpy as np

from megalith.base.errors import EngineError
from megalith.base.home import home_dir
from megalith.base.units import NS_PER_S
from megalith.cost.collective import Collective, Link, all_reduce_ns, step_link_ns
from megalith.engine.parallel.collectives import Ranks
from megalith.engine.parallel.ports import Port, PortChannel
from megalith.plan import machine
from megalith.plan.tensor_parallel import RanksQuestion, plan_ranks
from megalith.specs import catalog

Options = Mapping[str, float | str]
Figures = dict[str, float | None]

RANKS = 4
GIGABIT = 125_000_000
SUM_VALUES = 8192
"""Of one decode row of Llama 2 70B: 32 KiB in float32."""
ROUNDS = 20
SHAPE = {"layers": 64, "hidden": 1024, "heads": 16}
SMALL = {"layers": 8, "hidden": 256, "heads": 8}
QUICK = {"layers": 12, "hidden": 512, "heads": 8}
DISK = 100_000_000
"""Imposed on each rank's window: four of them are what this class of machine's disk gives beside other work."""
_RUN_DEADLINE_S = 900


def all_reduce(options: Options) -> Figures:
    """Sums that all ranks, threads over socket pairs, begin at once; and what the model says of them."""
    collective = cast(Collective, options["collective"])
    link = Link(latency_ns=round(float(options["latency_ms"]) * 1e6), bytes_per_s=GIGABIT)
    values = SUM_VALUES * int(options.get("rows", 1))
    bare = _round_ns(collective, None, values)
    hops = 2 if collective == "star" else 2 * (RANKS - 1)
    num_bytes = 4 * values
    return {
        "ms": _round_ns(collective, link, values) / 1e6,
        "predicted_ms": all_reduce_ns(collective, num_bytes, RANKS, link, bare / hops) / 1e6,
        "link_ms": all_reduce_ns(collective, num_bytes, RANKS, link) / 1e6,
        "bare_ms": bare / 1e6,
    }


def _round_ns(collective: Collective, link: Link | None, values: int) -> float:
    """Of one all-reduce; median of three runs of several."""
    found = []
    for _ in range(3):
        channels: list[dict[int, PortChannel]] = [{} for _ in range(RANKS)]
        ports = [None if link is None else Port(link) for _ in range(RANKS)]
        for low in range(RANKS):
            for high in range(low + 1, RANKS):
                one, other = socket.socketpair()
                channels[low][high] = PortChannel(one, 30.0, ports[low])
                channels[high][low] = PortChannel(other, 30.0, ports[high])
        ranks = [Ranks(rank, RANKS, collective, channels[rank]) for rank in range(RANKS)]
        try:
            with ThreadPoolExecutor(RANKS) as pool:
                barrier = Barrier(RANKS)
                begins, ends = zip(*pool.map(partial(_rounds, values, barrier), ranks), strict=True)
            found.append(float(np.median(np.max(ends, axis=0) - np.min(begins, axis=0))))
        finally:
            for mine in channels:
                for channel in mine.values():
                    channel.sock.close()
    return float(np.median(found))


def _rounds(count: int, barrier: Barrier, ranks: Ranks) -> tuple[list[int], list[int]]:
    """When each sum began and ended on this rank. Without the barrier, a sum begins while the one before still ends."""
    values = np.ones(count, np.float32)
    begins, ends = [], []
    for _ in range(ROUNDS if count == SUM_VALUES else ROUNDS // 4):
        barrier.wait(30)
        begins.append(time.monotonic_ns())
        ranks.all_reduce(values)
        ends.append(time.monotonic_ns())
    ranks.close()
    return begins, ends


def serve(options: Options) -> Figures:
    """Decode steps of a small model over four ranks at a latency."""
    link = Link(latency_ns=round(float(options["latency_ms"]) * 1e6), bytes_per_s=GIGABIT)
    collective = cast(Collective, options["collective"])
    figures = _run(SMALL, ranks=RANKS, collective=collective, latency_ns=link.latency_ns, bytes_per_s=GIGABIT, steps=8)
    predicted = step_link_ns(collective, SMALL["hidden"], SMALL["layers"], 1, RANKS, link)
    return {**figures, "link_s": predicted / NS_PER_S}


def window(options: Options) -> Figures:
    """A model of many layers: in one process's memory, or over four ranks with windows of two blocks."""
    shape = QUICK if options["fast"] == "yes" else SHAPE
    if options["arm"] == "whole":
        return _run(shape, ranks=1, steps=3)
    figures = _run(shape, ranks=RANKS, window_blocks=2, disk_bytes_per_s=DISK, steps=3)
    layers = (figures["weight_bytes"] or 0.0) - 4 * 2 * 4096 * shape["hidden"]
    return {**figures, "disk_s": layers / RANKS / DISK}


def plan(options: Options) -> Figures:
    """Llama 2 70B in float32 by number of devices; on one device of them all weights, or a window of two blocks."""
    question = RanksQuestion(
        spec=catalog.model("llama-2-70b"), profile=machine.here("torch-cpu"), ranks=int(options["ranks"]),
        window_blocks=2 if options["arm"] == "window" else 0, context=1024,
    )  # fmt: skip
    found = plan_ranks(question)
    return {"first_gb": found.memory[0].num_bytes / 1e9, "other_gb": found.memory[-1].num_bytes / 1e9}


def _run(shape: dict[str, int], **options: float | str) -> Figures:
    """Figures of tpi_llm_run with a model of that shape, which goes away again."""
    base = home_dir() / "windows"
    base.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=base, prefix="tpi-llm-") as folder:
        code = "import sys; from pathlib import Path; from megalith.studies.tpi_llm_run import write_model; "
        code += "write_model(Path(sys.argv[1]), *map(int, sys.argv[2:]))"
        sizes = [str(shape[name]) for name in ("layers", "hidden", "heads")]
        _call(["-c", code, folder, *sizes])
        text = _call(["-m", "megalith.studies.tpi_llm_run", json.dumps({"model": folder, **options})])
    return cast(Figures, msgspec.json.decode(text, type=dict[str, float]))


def _call(arguments: list[str]) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=_RUN_DEADLINE_S, check=False
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no word"])[-1]
        raise EngineError(f"A run of the study ended with code {done.returncode}: {last}")
    return done.stdout
