"""llama.cpp through its own `llama-batched-bench`: prefill and decode of a batch, no sampling, no scheduler.

That is its best case: its server and bindings add their costs on top.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import driver

TIMEOUT_S = 300


class LlamaCpp:
    """The tools of one build of llama.cpp; each case is one run of a tool that maps the file anew (well under 1 s)."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._bin = Path(settings.get("bin", "/nonexistent"))
        self._tool = self._bin / "llama-batched-bench"
        if not self._tool.exists():
            raise driver.Skip(f"no llama-batched-bench in {self._bin}")
        self._model = settings["model"].get(settings["source"])
        if self._model is None or not Path(self._model).exists():
            raise driver.Skip(f"no model file for {settings['source']}")
        self._threads = str(settings["threads"])
        self._flags = settings.get("flags", [])
        version = subprocess.run(
            [self._bin / "llama-bench", "--version"], capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
        found = re.search(r"version: (.+)", version.stdout + version.stderr)
        self.version = settings.get("version") or (f"llama.cpp {found.group(1)}" if found else "llama.cpp")

    def measure(self, case: dict[str, Any]) -> dict[str, Any]:
        """One run of the tool; its own figures, brought to the words of `driver.measure`."""
        batch, prompt, made = case["batch"], case["prompt_tokens"], case["output_tokens"]
        context = batch * (prompt + made) + 256
        command = [
            str(self._tool), "-m", str(self._model), "-t", self._threads, "-tb", self._threads, "-c", str(context),
            "-npp", str(prompt), "-ntg", str(made), "-npl", str(batch), "-b", "2048", "-ub", "512",
            "--output-format", "jsonl", *self._flags,
        ]  # fmt: skip
        before, begin = os.times(), time.perf_counter()
        run = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
        wall, after = time.perf_counter() - begin, os.times()
        rows = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
        if not rows:
            raise RuntimeError(f"llama-batched-bench gave no row: {run.stderr[-300:]}")
        row = rows[-1]
        cpu = after.children_user + after.children_system - before.children_user - before.children_system
        decode = {"decode_tok_s": row["speed_tg"], "out_tok_s": batch * made / row["t"]} if made > 1 else {}
        return {
            "prefill_tok_s": row["speed_pp"],
            **decode,
            "wall_s": wall,
            "cpu_share": cpu / wall,
            "involuntary_switches": 0,
        }


if __name__ == "__main__":
    driver.main(LlamaCpp)
