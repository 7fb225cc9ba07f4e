"""How far each setting is from float32 on the same weights: perplexity, KL divergence and same top-1 on two texts.

    python benchmarks/quality.py [--peers peers.toml] [--tokens 900] [--skip-bf16]

The reference is transformers in float32 on the weights of the shipped file, exactly dequantised. Scored against it:

- `megalith native`: our runner's own logits, through its paged cache in chunks as the engine would feed them;
- `bfloat16`: the same weights rounded to bfloat16, bfloat16 activations (transformers);
- `llama.cpp Q4_0` and `Q8_0`: the weights of the requantised files, float32 arithmetic; llama.cpp's own int8
  activations are left out, which flatters it;
- `W8A8 simulated`: int8 weights a channel and int8 activations a token, as vLLM runs such a checkpoint.
"""

from __future__ import annotations

import argparse
import datetime
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import history
import machine
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from megalith.engine.batch import StepBatch
from megalith.model.checkpoint import Checkpoint
from megalith.model.open import OpenModel, open_model

HERE = Path(__file__).resolve().parent
TEXTS = {"licence": HERE.parent / "LICENSE", "interface": HERE / "texts" / "interface.md"}
PIECE = 128


def main() -> None:
    """Score every setting that can be had here."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tokens", type=int, default=900)
    parser.add_argument("--only", nargs="+", help="names of settings; without it all")
    parser.add_argument("--skip-bf16", action="store_true", help="bfloat16 is very slow on CPUs without it")
    options = parser.parse_args()
    machine.raise_priority()
    torch.set_num_threads(1)
    model = open_model(options.model)
    texts = {name: model.tokenizer.encode(path.read_text())[: options.tokens] for name, path in TEXTS.items()}
    stamp = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": machine.commit(),
        "machine": machine.describe(),
    }
    exact = hugging_face(model, model.checkpoint)
    reference = {name: logits_of(exact, ids) for name, ids in texts.items()}
    for arm, of_text in settings(model, exact, options):
        if options.only and arm not in options.only:
            continue
        for name, ids in texts.items():
            row = {**stamp, "kind": "quality", "arm": arm, "case": name, "tokens": len(ids)}
            row |= score(reference[name], of_text(ids), ids)
            print(row["arm"], name, row["perplexity"], row["kl"], row["top1"], file=sys.stderr)
            history.append([row])
    history.write_results()


def settings(model: OpenModel, exact: LlamaForCausalLM, options: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """(name, function from token ids to logits) of each setting, one loaded at a time."""
    yield "float32", lambda ids: logits_of(exact, ids)
    reason = native_missing(model)
    if reason:
        print(f"megalith native: {reason}", file=sys.stderr)
    else:
        yield "megalith native", lambda ids: native_logits(model, ids)
    yield "W8A8 simulated", lambda ids: logits_of(with_int8_linears(hugging_face(model, model.checkpoint)), ids)
    peers = tomllib.loads(options.peers.read_text()) if options.peers else {}
    files = peers.get("llama_cpp", {}).get("models", {})
    for name in ("q4_0", "q8_0"):
        if name in files:
            other = hugging_face(model, open_model(files[name]).checkpoint)
            yield f"llama.cpp {name.upper()}", lambda ids, other=other: logits_of(other, ids)
    if not options.skip_bf16:
        rounded = hugging_face(model, model.checkpoint).to(torch.bfloat16)
        yield "bfloat16", lambda ids: logits_of(rounded, ids)


def hugging_face(model: OpenModel, checkpoint: Checkpoint) -> LlamaForCausalLM:
    """transformers' Llama in float32 with our checkpoint's weights, exactly dequantised."""
    spec = model.spec
    config = LlamaConfig(
        hidden_size=spec.hidden, intermediate_size=spec.ffn, num_hidden_layers=spec.num_layers, vocab_size=spec.vocab,
        num_attention_heads=spec.num_heads, num_key_value_heads=spec.num_kv_heads, head_dim=spec.head_dim,
        rms_norm_eps=spec.norm_eps, max_position_embeddings=spec.max_context, tie_word_embeddings=spec.tied_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": spec.rope.theta},
    )  # fmt: skip
    twin = LlamaForCausalLM(config)
    names = {"embed.weight": "model.embed_tokens.weight", "final_norm.weight": "model.norm.weight"}
    for i in range(spec.num_layers):
        for ours, theirs in (("q", "self_attn.q_proj"), ("k", "self_attn.k_proj"), ("v", "self_attn.v_proj"),
                             ("o", "self_attn.o_proj"), ("gate", "mlp.gate_proj"), ("up", "mlp.up_proj"),
                             ("down", "mlp.down_proj"), ("attn_norm", "input_layernorm"),
                             ("ffn_norm", "post_attention_layernorm")):  # fmt: skip
            names[f"layers.{i}.{ours}.weight"] = f"model.layers.{i}.{theirs}.weight"
    state = {theirs: torch.from_numpy(checkpoint.tensor(ours).float32()) for ours, theirs in names.items()}
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    twin.load_state_dict(state)
    return twin.eval()


def logits_of(twin: LlamaForCausalLM, ids: list[int]) -> np.ndarray:
    """Float32 logits [tokens, vocabulary] of one forward pass over the text."""
    with torch.inference_mode():
        return twin(torch.tensor([ids])).logits[0].float().numpy()


class _Int8Linear(torch.nn.Module):
    """y = x W^T with W rounded to int8 a row and x to int8 a token; exact in float32 afterwards."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.weight = self._rounded(linear.weight.detach())

    @staticmethod
    def _rounded(values: torch.Tensor) -> torch.Tensor:
        scale = values.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127
        return torch.round(values / scale) * scale

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return self._rounded(values) @ self.weight.T


def with_int8_linears(twin: LlamaForCausalLM) -> LlamaForCausalLM:
    """Every linear layer of the trunk made W8A8; the head stays as it is."""
    for layer in twin.model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, child in list(part.named_children()):
                if isinstance(child, torch.nn.Linear):
                    setattr(part, name, _Int8Linear(child))
    return twin


def native_missing(model: OpenModel) -> str | None:
    """Why our native runner cannot be scored here."""
    try:
        from megalith.engine.native_runner import supports
    except ImportError as error:
        return str(error)
    return supports(model.spec, model.checkpoint)


def native_logits(model: OpenModel, ids: list[int]) -> np.ndarray:
    """Logits of every position from the native runner, fed in chunks through its paged cache."""
    from megalith.engine.native_runner import NativeRunner

    block_tokens = 16
    num_blocks = -(-len(ids) // block_tokens)
    runner = NativeRunner(
        model.spec, model.checkpoint, block_tokens=block_tokens, num_blocks=num_blocks, num_host_blocks=0,
        max_rows=PIECE, threads=1,
    )  # fmt: skip
    parts = []
    for begin in range(0, len(ids), PIECE):
        rows = ids[begin : begin + PIECE]
        batch = StepBatch.of_one(rows, begin, np.arange(len(rows)), block_tokens)
        parts.append(np.array(runner.logits(batch)))
    runner.close()
    return np.concatenate(parts)


def score(reference: np.ndarray, logits: np.ndarray, ids: list[int]) -> dict[str, float]:
    """Perplexity of the text, mean KL(reference || setting) a position, share of positions with the same arg-max."""
    loss, kl = 0.0, 0.0
    for begin in range(0, len(ids), PIECE):
        want = torch.log_softmax(torch.from_numpy(reference[begin : begin + PIECE]).double(), -1)
        got = torch.log_softmax(torch.from_numpy(logits[begin : begin + PIECE]).double(), -1)
        kl += float((want.exp() * (want - got)).sum())
        following = torch.tensor(ids[begin + 1 : begin + 1 + len(got)])
        loss -= float(got[: len(following)].gather(1, following[:, None]).sum())
    same = float((reference.argmax(-1) == logits.argmax(-1)).mean())
    return {"perplexity": float(np.exp(loss / (len(ids) - 1))), "kl": kl / len(ids), "top1": same}


if __name__ == "__main__":
    main()
