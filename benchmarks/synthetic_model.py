"""Writes a Llama-shaped GGUF file of random weights: the bytes and shapes of a large model, without its meaning.

    python benchmarks/synthetic_model.py 7b OUT.gguf
    python benchmarks/synthetic_model.py 13b OUT.gguf --seed 3
    python benchmarks/synthetic_model.py 7b OUT.gguf --layers 2 --hidden 256 --vocab 2048

Every linear layer is Q4_1 (half-precision scale and minimum, 16 bytes of nibbles for 32 weights), norms are F32, the
embedding is Q8_0 or Q4_1. Weights have mean 0 and a standard deviation of 1/sqrt(inputs), so that activations stay
finite. Shape, seed and type give the same bytes every time; memory is bounded by the largest tensor. The tokenizer is
that of an installed GGUF model (SmolLM2), cut or padded to the vocabulary, so that text goes in and comes out.

Shapes: Touvron et al., LLaMA (2023), table 2; context of Llama 2.
"""

from __future__ import annotations

import argparse
import math
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from megalith.model.gguf import GgufFile
from megalith.model.source import resolve

Bytes = NDArray[np.uint8]
BLOCK = 32
NIBBLE_DEVIATION = math.sqrt((16**2 - 1) / 12)
"""Standard deviation of a number drawn evenly from 0 to 15."""
CODE_DEVIATION = 127 / math.sqrt(3)
"""Of one drawn evenly from -127 to 127."""
USER_DEFINED = 4


@dataclass(frozen=True)
class Shape:
    """What decides the tensors. `heads` divides `hidden`; all sizes are multiples of 32."""

    layers: int
    hidden: int
    inner: int
    heads: int
    vocab: int = 32_000
    context: int = 4096


SHAPES = {"7b": Shape(32, 4096, 11_008, 32), "13b": Shape(40, 5120, 13_824, 40)}
Q4_1, Q8_0, F32 = (gguf.GGMLQuantizationType[name] for name in ("Q4_1", "Q8_0", "F32"))
ROW_BYTES = {Q4_1: 20 / BLOCK, Q8_0: 34 / BLOCK, F32: 4.0}


@dataclass(frozen=True)
class Tensor:
    """One tensor of the file; `shape` has rows first."""

    name: str
    shape: tuple[int, ...]
    kind: Any

    @property
    def num_bytes(self) -> int:
        """Bytes in the file, without padding."""
        return int(math.prod(self.shape) * ROW_BYTES[self.kind])


def tensors(shape: Shape, embedding: Any) -> Iterator[Tensor]:
    """All tensors, in the order in which a forward pass reads them."""
    hidden, inner = shape.hidden, shape.inner
    yield Tensor("token_embd.weight", (shape.vocab, hidden), embedding)
    for layer in range(shape.layers):
        at = f"blk.{layer}"
        yield Tensor(f"{at}.attn_norm.weight", (hidden,), F32)
        for part in ("q", "k", "v", "output"):
            yield Tensor(f"{at}.attn_{part}.weight", (hidden, hidden), Q4_1)
        yield Tensor(f"{at}.ffn_norm.weight", (hidden,), F32)
        yield Tensor(f"{at}.ffn_gate.weight", (inner, hidden), Q4_1)
        yield Tensor(f"{at}.ffn_up.weight", (inner, hidden), Q4_1)
        yield Tensor(f"{at}.ffn_down.weight", (hidden, inner), Q4_1)
    yield Tensor("output_norm.weight", (hidden,), F32)
    yield Tensor("output.weight", (shape.vocab, hidden), Q4_1)


def draw(tensor: Tensor, seed: int) -> Bytes:
    """The bytes of one tensor, one row of the result a row of the tensor; the same for the same name and seed."""
    rows = tensor.shape[0]
    if tensor.kind == F32:
        return np.ones(rows, np.float32).view(np.uint8)
    random = np.random.Generator(np.random.SFC64([seed, zlib.crc32(tensor.name.encode())]))
    blocks = rows * tensor.shape[1] // BLOCK
    deviation = 1 / math.sqrt(tensor.shape[1])
    jitter = random.uniform(0.75, 1.25, blocks).astype(np.float32)
    if tensor.kind == Q8_0:
        out = np.empty((blocks, 34), np.uint8)
        out[:, :2] = (jitter * (deviation / CODE_DEVIATION)).astype(np.float16).view(np.uint8).reshape(blocks, 2)
        codes = np.frombuffer(random.bytes(blocks * BLOCK), np.int8)
        out[:, 2:] = np.maximum(codes, -127).view(np.uint8).reshape(blocks, BLOCK)
        return out.reshape(rows, -1)
    out = np.empty((blocks, 20), np.uint8)
    scale = jitter * (deviation / NIBBLE_DEVIATION)
    out[:, 0:2] = scale.astype(np.float16).view(np.uint8).reshape(blocks, 2)
    out[:, 2:4] = (-7.5 * scale).astype(np.float16).view(np.uint8).reshape(blocks, 2)
    out[:, 4:] = np.frombuffer(random.bytes(blocks * 16), np.uint8).reshape(blocks, 16)
    return out.reshape(rows, -1)


def add_tokenizer(writer: gguf.GGUFWriter, donor: GgufFile, vocab: int) -> None:
    """The byte-level BPE of `donor`, cut or padded to `vocab` tokens; merges that would leave it are left out."""
    data = {k.removeprefix("tokenizer.ggml."): v for k, v in donor.metadata.items() if k.startswith("tokenizer.ggml.")}
    tokens = data["tokens"][:vocab]
    types = [int(kind) for kind in data["token_type"][:vocab]]
    missing = vocab - len(tokens)
    tokens = tokens + [f"<|padding_{number}|>" for number in range(missing)]
    known = set(tokens)
    merges = [merge for merge in data["merges"] if {*merge.split(" "), merge.replace(" ", "", 1)} <= known]
    writer.add_tokenizer_model(data["model"])
    writer.add_tokenizer_pre(data["pre"])
    writer.add_token_list(tokens)
    writer.add_token_types(types + [USER_DEFINED] * missing)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(data["bos_token_id"])
    writer.add_eos_token_id(data["eos_token_id"])
    writer.add_add_bos_token(False)


def write(path: Path, shape: Shape, *, seed: int = 0, embedding: str = "Q8_0", donor: str = "smollm2") -> int:
    """Write the file, whole or not at all; its size in bytes."""
    beside = path.with_name(f".{path.name}.part")
    writer = gguf.GGUFWriter(beside, "llama")
    writer.add_name(f"synthetic Llama, {shape.layers} layers of {shape.hidden}")
    writer.add_block_count(shape.layers)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.inner)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(shape.hidden // shape.heads)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(shape.vocab)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_1)
    add_tokenizer(writer, GgufFile(resolve(donor).path), shape.vocab)
    wanted = list(tensors(shape, gguf.GGMLQuantizationType[embedding]))
    for tensor in wanted:
        if tensor.kind == F32:
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.num_bytes)
        else:
            stored = (tensor.shape[0], tensor.num_bytes // tensor.shape[0])
            writer.add_tensor_info(tensor.name, stored, np.dtype(np.uint8), tensor.num_bytes, raw_dtype=tensor.kind)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in wanted:
            writer.write_tensor_data(draw(tensor, seed))
        writer.close()
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    return path.stat().st_size


def main() -> None:
    """Write what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("path", type=Path)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--hidden", type=int, help="a multiple of 64; heads and the inner size follow in proportion")
    parser.add_argument("--vocab", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--embedding", choices=("Q8_0", "Q4_1"), default="Q8_0")
    options = parser.parse_args()
    shape = SHAPES[options.shape]
    if options.hidden is not None:
        shape = narrowed(shape, options.hidden)
    shape = replace(shape, layers=options.layers or shape.layers, vocab=options.vocab or shape.vocab)
    size = write(options.path, shape, seed=options.seed, embedding=options.embedding)
    print(f"{options.path}: {size:,} bytes, {shape}")


def narrowed(shape: Shape, hidden: int) -> Shape:
    """`shape` at another width: heads of 128 (64 below 512), inner size in proportion, rounded up to whole blocks."""
    head = 128 if hidden >= 512 else 64
    if hidden < 64 or hidden % head:
        raise SystemExit(f"--hidden {hidden} is not a multiple of {head}")
    inner = -(-shape.inner * hidden // shape.hidden // BLOCK) * BLOCK
    return replace(shape, hidden=hidden, inner=inner, heads=hidden // head)


if __name__ == "__main__":
    main()
