"""The loop that every peer driver shares: one JSON request a line in, one JSON line out. Standard library only.

It knows the case description and the clock; it must not import Megalith or any peer, because each driver runs in the
environment of its own peer.

A driver gives `open_peer(settings) -> Peer`. The first request opens it, the others are cases:

    {"open": {"setting": "q4_1", "threads": 1, "model": {"gguf": PATH, "bf16": DIR}, ...}}
    {"case": "batch-32", "batch": 32, "prompt_tokens": 128, "output_tokens": 128, "seed": 0, "vocab": 49152}

Answers: {"ready": true, "version": ..., "load_s": ...}, {"skipped": REASON}, a result, or {"failed": REASON}.
"""

from __future__ import annotations

import json
import os
import random
import resource
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, Protocol

FIRST_PLAIN_ID = 64
"""Ids below are special tokens in the models that we use."""


WARM_UP = {"case": "warm-up", "batch": 2, "prompt_tokens": 128, "output_tokens": 4, "vocab": 4096}


class Skip(Exception):
    """This peer cannot run here; the message says why."""


Tick = Callable[[int, int], None]
"""Told after each step of an engine: tokens made so far, and requests that have their first token."""


class Peer(Protocol):
    """One loaded engine under one setting."""

    version: str

    def generate(self, prompts: list[list[int]], output_tokens: int, tick: Tick) -> int:
        """Complete all prompts greedily with exactly `output_tokens` each, submitted at once; return the tokens made.

        Calls `tick` after each step. A peer that cannot look into its steps never calls it.
        """
        ...


def prompts(case: dict[str, Any]) -> list[list[int]]:
    """The case's prompts: random ids, the same for every peer, no two with a common first block."""
    source = random.Random(f"{case['case']}/{case.get('seed', 0)}")
    ids = range(FIRST_PLAIN_ID, case["vocab"])
    return [source.choices(ids, k=case["prompt_tokens"]) for _ in range(case["batch"])]


def _cpu_s() -> float:
    """CPU seconds of this process and its children so far."""
    mine, theirs = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return mine.ru_utime + mine.ru_stime + theirs.ru_utime + theirs.ru_stime


def ignore(tokens: int, started: int) -> None:
    """The tick of a run that nobody times."""
    del tokens, started


class Timeline:
    """When the last request got its first token, how many tokens there were then, and when all was done."""

    def __init__(self, peer: Peer, batch: list[list[int]], output_tokens: int) -> None:
        self._batch = len(batch)
        self.first_s = self.first_tokens = 0.0
        before = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
        cpu, self._begin = _cpu_s(), time.perf_counter()
        self.tokens = peer.generate(batch, output_tokens, self._tick)
        self.wall_s = time.perf_counter() - self._begin
        self.cpu_s = _cpu_s() - cpu
        self.involuntary_switches = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw - before
        if self.tokens != len(batch) * output_tokens:
            raise RuntimeError(f"made {self.tokens} tokens, asked for {len(batch)} x {output_tokens}")

    def _tick(self, tokens: int, started: int) -> None:
        if not self.first_s and started == self._batch:
            self.first_s, self.first_tokens = time.perf_counter() - self._begin, tokens


def measure(peer: Peer, case: dict[str, Any]) -> dict[str, Any]:
    """Run one case and give its rates, in tokens a second.

    `out_tok_s`: all output tokens over the whole run, prefill included. `decode_tok_s`: the tokens after the moment
    when the last request got its first token, over the time since. `prefill_tok_s`: prompt tokens over the time to the
    last first token; only where nothing decodes meanwhile (one request, or one output token). A peer without ticks is
    run a second time for one token each, and decode is the difference.
    """
    batch, made = case["batch"], case["output_tokens"]
    full = Timeline(peer, prompts(case), made)
    runs, first_s, first_tokens = [full], full.first_s, full.first_tokens
    result: dict[str, Any] = {}
    if made == 1:
        first_s = full.wall_s
    else:
        if not full.first_s:
            runs.append(Timeline(peer, prompts({**case, "seed": f"{case.get('seed', 0)}/first"}), 1))
            first_s, first_tokens = runs[1].wall_s, batch
        result["decode_tok_s"] = (full.tokens - first_tokens) / max(full.wall_s - first_s, 1e-9)
        result["out_tok_s"] = full.tokens / full.wall_s
    if made == 1 or batch == 1 or not full.first_s:
        result["prefill_tok_s"] = batch * case["prompt_tokens"] / first_s
    wall = sum(run.wall_s for run in runs)
    return result | {
        "wall_s": wall,
        "cpu_share": sum(run.cpu_s for run in runs) / wall,
        "involuntary_switches": sum(run.involuntary_switches for run in runs),
    }


def main(open_peer: Callable[[dict[str, Any]], Peer]) -> None:
    """Answer requests from standard input until it closes."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a peer prints goes to standard error, so that answers stay one JSON line each
    peer: Any = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if "open" in request:
                begin = time.perf_counter()
                peer = open_peer(request["open"])
                if not hasattr(peer, "measure"):
                    peer.generate(prompts(WARM_UP), WARM_UP["output_tokens"], ignore)
                answer = {"ready": True, "version": peer.version, "load_s": time.perf_counter() - begin}
            elif hasattr(peer, "measure"):
                answer = {"case": request["case"], **peer.measure(request)}
            else:
                answer = {"case": request["case"], **measure(peer, request)}
        except Skip as reason:
            answer = {"skipped": str(reason)}
        except Exception as error:
            traceback.print_exc()
            answer = {"failed": f"{type(error).__name__}: {error}"[:500]}
        answers.write(json.dumps(answer) + "\n")
    sys.stdout.flush()
    os._exit(0)  # some peers' worker threads never end
