"""The script that writes large models of random weights: same bytes each time, opened and run by the engine."""

from __future__ import annotations

import hashlib
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megalith.model.formats import dequantize
from megalith.model.gguf import GgufFile

ROOT = Path(__file__).resolve().parents[2]


def write(path: Path, *options: str) -> GgufFile:
    script = ROOT / "benchmarks" / "synthetic_model.py"
    small = ("--layers", "2", "--hidden", "256", "--vocab", "1024")
    subprocess.run([sys.executable, script, "7b", path, *small, *options], check=True, capture_output=True, timeout=60)
    return GgufFile(path)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_same_bytes_each_time_and_others_for_another_seed(tmp_path: Path) -> None:
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        write(tmp_path / name, "--seed", seed)
    assert digest(tmp_path / "a") == digest(tmp_path / "b") != digest(tmp_path / "c")
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", "c"}


@pytest.mark.parametrize("embedding", ["Q8_0", "Q4_1"])
def test_weights_have_mean_0_and_the_deviation_that_keeps_activations_finite(tmp_path: Path, embedding: str) -> None:
    file = write(tmp_path / "m.gguf", "--embedding", embedding)
    kinds = {tensor.type for name, tensor in file.tensors.items() if name.startswith("blk") and "norm" not in name}
    assert kinds == {"Q4_1"}
    assert file.tensors["token_embd.weight"].type == embedding
    for name in ("token_embd.weight", "blk.1.ffn_down.weight", "output.weight"):
        tensor = file.tensors[name]
        values = dequantize(file.raw(name), tensor.type, tensor.shape)
        expected = 1 / math.sqrt(tensor.shape[1])
        assert abs(float(values.mean())) < 0.02 * expected
        assert float(values.std()) == pytest.approx(expected, rel=0.05)
    assert np.all(dequantize(file.raw("output_norm.weight"), "F32", (256,)) == 1)


def test_the_engine_runs_it(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write(path)
    command = [
        sys.executable,
        "-m",
        "megalith",
        "complete",
        str(path),
        "The cat",
        "--max-tokens",
        "4",
        "--threads",
        "1",
    ]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip()
