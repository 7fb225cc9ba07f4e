"""`python -m megalith.studies.tpi_llm_run JSON`: one instance over ranks, a prompt and some steps; figures as JSON.

A process of its own, so that the kernel's record of its peak memory is of this run alone. The other ranks' is read
while they live, from /proc: nobody's own word. Weights are random; shape and seed give the same ones.
"""

from __future__ import annotations

import json
import os
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from megalith.cost.collective import Link
from megalith.engine.batch import I32, StepBatch
from megalith.engine.parallel.option import ParallelOption
from megalith.engine.parallel.runner import TensorParallelRunner
from megalith.model.checkpoint import open_checkpoint
from megalith.model.source import resolve

PROMPT = 16
_BLOCK = 16
VOCAB = 4096


def write_model(folder: Path, layers: int, hidden: int, heads: int, seed: int = 0) -> Path:
    """A Llama of that shape with random bfloat16 weights, one set of matrices for all layers; its directory."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    ffn = -(-hidden * 8 // 3 // 32) * 32
    draw = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int, scale: float = 1.0) -> torch.Tensor:
        drawn = torch.randn(rows, columns, generator=draw)
        scaled: torch.Tensor = drawn * (scale / columns**0.5)
        return scaled.to(torch.bfloat16)

    ones = torch.ones(hidden, dtype=torch.bfloat16)
    shapes = {"self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (hidden, hidden),
              "self_attn.v_proj": (hidden, hidden), "self_attn.o_proj": (hidden, hidden),
              "mlp.gate_proj": (ffn, hidden), "mlp.up_proj": (ffn, hidden), "mlp.down_proj": (hidden, ffn)}  # fmt: skip
    parts = {name: matrix(*shape) for name, shape in shapes.items()}
    tensors = {"model.embed_tokens.weight": matrix(VOCAB, hidden, 8.0), "model.norm.weight": ones.clone(),
               "lm_head.weight": matrix(VOCAB, hidden, 4.0)}  # fmt: skip
    for layer in range(layers):
        at = f"model.layers.{layer}."
        for name, value in parts.items():
            tensors[f"{at}{name}.weight"] = value.roll(layer, 0).clone()
        tensors[f"{at}input_layernorm.weight"] = ones.clone()
        tensors[f"{at}post_attention_layernorm.weight"] = ones.clone()
    save_file(tensors, folder / "model.safetensors")
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
              "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": heads,
              "intermediate_size": ffn, "vocab_size": VOCAB, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
              "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": False, "torch_dtype": "bfloat16",
              "attention_bias": False, "mlp_bias": False}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def main(options: dict[str, Any]) -> dict[str, float]:
    """Prompt, then steps, each feeding the likeliest token of the one before."""
    rate = options.get("bytes_per_s")
    link = Link(latency_ns=options["latency_ns"], bytes_per_s=rate) if "latency_ns" in options else None
    option = ParallelOption(
        options["ranks"], options.get("collective", "star"), link, options.get("window_blocks", 0),
        options.get("disk_bytes_per_s"),
    )  # fmt: skip
    path = Path(options["model"])
    checkpoint = open_checkpoint(resolve(str(path)))
    begin = time.monotonic()
    runner = TensorParallelRunner(
        checkpoint, path, option, dtype="float32", block_tokens=_BLOCK, num_blocks=8, threads=option.ranks
    )
    loaded = time.monotonic()
    try:
        tokens, times = _steps(runner, options["steps"])
        peaks = [_peak_bytes("self"), *(_peak_bytes(str(link.process.pid)) for link in runner.group.links)]
    finally:
        runner.close()
    whole = sum(4 * int(np.prod(checkpoint.shape(name))) for name in checkpoint.names())
    return {
        "step_s": float(np.median(times)), "load_s": loaded - begin, "tokens": float(zlib.crc32(tokens.tobytes())),
        "weight_bytes": float(whole), "first_bytes": float(peaks[0]), "other_bytes": float(max(peaks[1:], default=0)),
    }  # fmt: skip


def _steps(runner: TensorParallelRunner, count: int) -> tuple[I32, list[float]]:
    rows = np.arange(PROMPT, dtype=np.int32)
    table = np.arange(8, dtype=np.int32)[None]
    batch = StepBatch(rows * 37 % VOCAB, rows, np.array([0, PROMPT], np.int32), table, rows[-1:])
    tokens, times = [], []
    for position in range(PROMPT, PROMPT + count + 1):
        begin = time.monotonic()
        tokens.append(int(runner.logits(batch)[0].argmax()))
        times.append(time.monotonic() - begin)
        at, one = np.array([position], np.int32), np.array([0, 1], np.int32)
        batch = StepBatch(np.array(tokens[-1:], np.int32), at, one, table, one[:1])
    return np.array(tokens, np.int32), times[1:]


def _peak_bytes(process: str) -> int:
    """Of resident memory, by the kernel."""
    lines = Path("/proc", process, "status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    print(json.dumps(main(json.loads(sys.argv[1]))))
