"""Hugging Face accelerate with every layer offloaded to disk, in one process that may run inside a memory limit.

    python accelerate_offload.py make FOLDER 7b|13b
    python accelerate_offload.py run FOLDER OUT.json TOKENS THREADS

`make` writes a Llama of random bfloat16 weights as safetensors, one file for each layer, the format that accelerate
offloads to. Run with an interpreter that has torch, transformers and accelerate. Imports nothing of Megalith.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

SHAPES = {"7b": (32, 4096, 11_008, 32), "13b": (40, 5120, 13_824, 40)}
SHARD = "layer-{:02}.safetensors"


def configuration(shape: str) -> Any:
    """The model's configuration."""
    from transformers import LlamaConfig

    layers, hidden, inner, heads = SHAPES[shape]
    return LlamaConfig(
        vocab_size=32_000, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=4096, dtype="bfloat16",
    )  # fmt: skip


def make(folder: Path, shape: str) -> None:
    """Write the files, one layer in memory at a time."""
    import torch
    from accelerate import init_empty_weights
    from safetensors.torch import save_file
    from transformers import LlamaForCausalLM

    config = configuration(shape)
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    with init_empty_weights():
        model = LlamaForCausalLM(config)
    shards: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        shard = SHARD.format(int(parts[2]) if parts[1] == "layers" else config.num_hidden_layers)
        shards.setdefault(shard, {})[name] = parameter.shape
    generator = torch.Generator().manual_seed(0)
    for shard, wanted in shards.items():
        tensors = {
            name: torch.ones(size, dtype=torch.bfloat16)
            if len(size) == 1
            else (torch.rand(size, generator=generator, dtype=torch.float32) - 0.5).mul_(size[1] ** -0.5).bfloat16()
            for name, size in wanted.items()
        }
        save_file(tensors, folder / shard, metadata={"format": "pt"})
    total = sum((folder / shard).stat().st_size for shard in shards)
    names = {name: shard for shard, wanted in shards.items() for name in wanted}
    index = {"metadata": {"total_size": total}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def run(folder: Path, out: Path, tokens: int, threads: int) -> None:
    """Generate greedily with all weights on disk; the first token pays for the prompt and is not counted."""
    import torch
    from accelerate import dispatch_model, init_empty_weights
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(threads)
    names = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    with init_empty_weights():
        model = LlamaForCausalLM(LlamaConfig.from_pretrained(folder)).eval()
    offload = {
        name: {"safetensors_file": str(folder / shard), "weight_name": name, "dtype": "bfloat16"}
        for name, shard in names.items()
    }
    places: dict[str, Any] = {f"model.layers.{i}": "disk" for i in range(model.config.num_hidden_layers)}
    places |= dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "disk")
    model = dispatch_model(model, places, main_device="cpu", offload_index=offload, force_hooks=True)
    ids, cache, times = torch.tensor([[1, 450, 7483, 310, 3444, 338]]), None, []
    with torch.inference_mode():
        for _ in range(tokens):
            begin = time.perf_counter()
            answer = model(input_ids=ids, past_key_values=cache, use_cache=True)
            ids, cache = answer.logits[:, -1:].argmax(-1), answer.past_key_values
            times.append(time.perf_counter() - begin)
            print(f"{times[-1]:.1f} s", file=sys.stderr, flush=True)
    decode = times[1:]
    out.write_text(json.dumps({"decode_tok_s": len(decode) / sum(decode), "times_s": times}))


def main() -> None:
    """One of the two."""
    verb, folder = sys.argv[1], Path(sys.argv[2])
    if verb == "make":
        make(folder, sys.argv[3])
    else:
        run(folder, Path(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]))


if __name__ == "__main__":
    main()
