"""Figures that need no peer: from command to first token, and reading the GGUF file.

    python benchmarks/startup.py [--repeats 5] [--core 1]

First token: a fresh `megalith complete` process, until its standard output carries the first byte of the answer.
Reading: header, all metadata and tensor table of the file by our own reader in a fresh interpreter, without imports.
The file is in the page cache in both.
"""

from __future__ import annotations

import argparse
import datetime
import os
import statistics
import subprocess
import sys
import time

import history
import machine

TIMEOUT_S = 120
READ = """
import time
from megalith.model.gguf import GgufFile
from megalith.model.source import resolve
path = resolve("smollm2").path
begin = time.perf_counter()
file = GgufFile(path)
tokens = len(file.metadata["tokenizer.ggml.tokens"])
print(time.perf_counter() - begin)
assert tokens == 49152 and len(file.tensors) == 272
"""


def main() -> None:
    """Measure and append one row a figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--core", type=int, default=1)
    options = parser.parse_args()
    machine.raise_priority()
    stamp = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": machine.commit(),
        "machine": machine.describe(),
    }
    figures = (("from command to first token", first_token_s, 2.0), ("reading the GGUF file", read_s, 0.3))
    for case, measure, bar in figures:
        measure(options.core)  # fills the page cache
        values = [measure(options.core) for _ in range(options.repeats)]
        row = {"kind": "figure", "arm": "megalith", "case": case, "unit": "s", "bar": bar}
        row |= {"value": round(statistics.median(values), 4), "spread": [min(values), max(values)]}
        print(row, file=sys.stderr)
        history.append([{**stamp, **row}])
    history.write_results()


def first_token_s(core: int) -> float:
    """Seconds from starting the command to the first byte of its answer."""
    command = [sys.executable, "-m", "megalith", "complete", "smollm2", "Once upon a time", "--max-tokens", "64"]
    command += ["--temperature", "0", "--threads", "1"]
    begin = time.perf_counter()
    with subprocess.Popen([*machine.pinned((core,)), *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        assert run.stdout is not None
        byte = os.read(run.stdout.fileno(), 1)
        took = time.perf_counter() - begin
        _, errors = run.communicate(timeout=TIMEOUT_S)
    if not byte or run.returncode:
        raise RuntimeError(f"the command failed with {run.returncode}: {errors[-400:].decode(errors='replace')}")
    return took


def read_s(core: int) -> float:
    """Seconds that our reader takes for the whole header."""
    command = [*machine.pinned((core,)), sys.executable, "-c", READ]
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=TIMEOUT_S)
    return float(run.stdout)


if __name__ == "__main__":
    main()
