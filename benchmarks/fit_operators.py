"""Composes the steps of catalogue models from measured operators and writes catalog/operators.

    python benchmarks/fit_operators.py --package DIR [--data DIR] [--only h100-sxm llama-3.1-8b] [--kernels vllm]

The measurements are NVIDIA's (aiconfigurator-core 0.12.0, Apache-2.0): one operator call on one GPU, kernels of vLLM
or, with --kernels, of another engine (`ENGINES`) or other kernels of the experts (`MXFP4`), as `VARIANTS` lists. A
layer is qkv, attention, output, two all-reduces, gate and up, down, and four element-wise kernels: two norms, the
rotary embedding with the write to the cache, the activation. Norms of q and k, where a model has them, are one more.
FP8 products were measured with the kernels that find a scale for their input and quantise it. Checkpoints come with
scales, and engines quantise in the kernel before the product: what was measured of these kernels alone is taken off
again (TensorRT-LLM and SGLang: of the output and down products alone, as aiconfigurator does). FP8 scaled in blocks
quantises on its own, and nothing is taken off.
Nothing is fitted to a run of a whole engine; silicon_e2e.parquet is never opened.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path
from typing import Any

import duckdb
import numpy as np

from megalith.cost.operators import NOTICE
from megalith.specs import catalog
from megalith.specs.model import ModelSpec

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "src" / "megalith" / "catalog" / "operators"
SYSTEMS = {
    "a100-80gb": "a100_sxm", "h100-sxm": "h100_sxm", "h200": "h200_sxm", "b200": "b200_sxm", "l40s": "l40s",
}  # fmt: skip
MODELS = (
    "llama-3.1-8b", "llama-3.1-70b", "llama-2-70b", "qwen3-8b", "qwen3-32b", "qwen3-30b-a3b", "gpt-oss-120b",
    "mixtral-8x7b",
)  # fmt: skip
TYPES = {"bf16": "bfloat16", "fp8": "fp8"}
ENGINES = {"trtllm": "trtllm/1.3.0rc20", "trtllm-block": "trtllm/1.3.0rc20", "sglang": "sglang/0.5.14"}
"""Where the package has the tables of engines other than vLLM."""
VLLM, SGLANG = "vllm/0.24.0", "sglang/0.5.14"
MXFP4 = {
    "vllm": VLLM, "marlin": VLLM, "mxfp8": SGLANG, "trtllm": SGLANG, "trtllm-block": SGLANG, "sglang": SGLANG,
}  # fmt: skip
"""{kernels: where experts in mxfp4 were measured}. FlashInfer's kernels for mxfp8 inputs are the same in vLLM, SGLang
and TensorRT-LLM, and only SGLang's table has all degrees."""
MXFP8_INPUT = ("mxfp8", "trtllm")
KERNELS = {
    "vllm": "vLLM", "marlin": "vLLM (experts: Marlin)", "mxfp8": "vLLM (experts: FlashInfer with mxfp8 inputs)",
    "trtllm": "TensorRT-LLM", "trtllm-block": "TensorRT-LLM (fp8 scaled in blocks)", "sglang": "SGLang",
}  # fmt: skip
"""In words."""
MARLIN = 3584, 3072, 16, 896
"""Hidden, inner, experts a token and experts of the model whose mxfp4 experts were measured with Marlin."""
VARIANTS = {
    "trtllm": (("h100-sxm", "llama-3.1-8b"), ("b200", "llama-3.1-70b"), ("b200", "gpt-oss-120b")),
    "trtllm-block": (("h100-sxm", "qwen3-32b"),),
    "sglang": (("h100-sxm", "qwen3-32b"),),
    "marlin": (("h100-sxm", "gpt-oss-120b"),),
    "mxfp8": (("b200", "gpt-oss-120b"),),
}
"""{kernels other than vLLM's defaults: what the catalogue has of them}."""
DEGREES = (1, 2, 4, 8)
KERNEL_MS = 3e-3
"""Fixed time of a memory-bound kernel: gpu.mem_empirical_constant_latency of systems.csv, as NVIDIA ships it."""
MEMORY_SHARE = 0.8
"""gpu.mem_bw_empirical_scaling_factor of systems.csv."""
HOST_NS = 650_000
"""Calibrated on a real vLLM run on another GPU (docs/fidelity.md, RTX PRO 6000)."""
TOLERANCE = 0.02
"""Largest relative error of a piecewise linear function against what it was thinned from."""
TOKENS = (1, 16, 32, 64, 128, 256, 512, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 10240, 12288, 16384)
DECODES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
CONTEXTS = (2, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)


class Operators:
    """The measured operators of one system, by interpolation. All times in milliseconds."""

    def __init__(self, data: Path, system: str, package: Path | None = None, kernels: str = "vllm") -> None:
        self.data, self.system, self.kernels = data, system, kernels
        self.package = None if package is None else package / system
        self.engine = ENGINES.get(kernels)
        self.norm_quantises, self.blocks = self.engine is None, kernels == "trtllm-block"
        with (data / "systems.csv").open() as file:
            facts = next(row for row in csv.DictReader(file) if row["system"] == system)
        self.memory_bytes_per_ms = float(facts["gpu.mem_bw"]) * MEMORY_SHARE / 1e3
        self.peer_bytes_per_ms = float(facts["node.intra_node_bw"]) * MEMORY_SHARE / 1e3
        self._gemm = {name: self._read_gemm(dtype) for name, dtype in TYPES.items()}
        self._scales = (
            []
            if self.package is None or self.blocks
            else [self._read_scale(name) for name in ("computescale", "scale_matrix")]
        )
        self._attention = {kind: self._read_attention(kind) for kind in ("context", "generation")}
        self._experts = self._group(
            data / f"moe_{system}.parquet",
            "dtype, hidden_size, inter_size, topk, num_experts, num_tokens, moe_tp_size, latency_ms",
            "where moe_ep_size = 1 and distribution = 'power_law_1.2'",
        )
        if self.package is not None:
            dtype = "w4a8_mxfp4_mxfp8" if kernels in MXFP8_INPUT else "w4a16_mxfp4"
            self._experts |= self._group(
                self.package / "moe" / MXFP4[kernels] / "moe_perf.parquet",
                "'mxfp4', hidden_size, inter_size, topk, num_experts, num_tokens, moe_tp_size, min(latency)",
                f"where moe_dtype = '{dtype}' and moe_ep_size = 1 and distribution = 'power_law_1.2' group by all",
            )
        self._reduce = self._read_reduce()

    def _rows(self, path: Path, columns: str, where: str = "") -> list[tuple[Any, ...]]:
        return duckdb.sql(f"select {columns} from '{path}' {where}").fetchall()

    def _group(self, path: Path, columns: str, where: str = "") -> dict[tuple[Any, ...], dict[tuple[int, int], float]]:
        """{leading columns: {(two whole numbers before the last): latency}}."""
        found: dict[tuple[Any, ...], dict[tuple[int, int], float]] = {}
        for *key, first, second, latency in self._rows(path, columns, where):
            found.setdefault(tuple(key), {})[first, second] = latency
        return found

    def _of_engine(self, operator: str, file: str) -> Path:
        """A table of another engine than vLLM."""
        assert self.package is not None
        assert self.engine is not None
        return self.package / operator / self.engine / f"{file}_perf.parquet"

    def _read_attention(self, kind: str) -> dict[tuple[Any, ...], dict[tuple[int, int], float]]:
        """By (head_dim, window, query heads, KV heads, cache). Engines but vLLM read prompts in the cache's type."""
        tokens = "isl" if kind == "context" else "context"
        if self.engine is None:
            columns = f"head_dim, window_size, q_heads, kv_heads, kv_cache_dtype, batch_size, {tokens}, latency_ms"
            return self._group(self.data / f"attn_{kind}_{self.system}.parquet", columns)
        tokens = "isl" if kind == "context" else "isl + step"
        columns = "head_dim, window_size, num_heads, num_key_value_heads, kv_cache_dtype, batch_size"
        where = "where attn_dtype = kv_cache_dtype" if kind == "context" else ""
        path = self._of_engine("attention", f"{kind}_attention")
        return self._group(path, f"{columns}, {tokens}, min(latency)", f"{where} group by all")

    def _read_gemm(self, dtype: str) -> tuple[Any, Any, Any] | None:
        if self.engine is None:
            rows = self._rows(
                self.data / f"gemm_{self.system}.parquet", "m, n, k, latency_ms", f"where dtype = '{dtype}'"
            )
        else:
            path = self._of_engine("gemm", "gemm")
            dtype = "fp8_block" if dtype == "fp8" and self.blocks else dtype
            rows = self._rows(path, "m, n, k, min(latency)", f"where gemm_dtype = '{dtype}' group by all")
        if not rows:
            return None
        m, n = (np.array(sorted({row[i] for row in rows})) for i in (0, 1))
        cube = np.full((len(m), len(n), len(n)), np.nan)
        index_m, index_n = ({value: i for i, value in enumerate(axis)} for axis in (m, n))
        for row_m, row_n, row_k, latency in rows:
            if row_k in index_n:
                cube[index_m[row_m], index_n[row_n], index_n[row_k]] = latency
        for i, j in np.argwhere(np.isnan(cube).any(axis=0)):
            line = cube[:, i, j]
            known = ~np.isnan(line)
            cube[:, i, j] = np.interp(m, m[known], line[known]) if known.any() else np.inf
        return m, n, cube

    def _read_scale(self, file: str) -> tuple[Any, Any, Any]:
        """(m, k, ms[m][k]) of what was measured with a product in fp8: finding a scale, and quantising with it."""
        assert self.package is not None
        path = self.package / "quantize" / (self.engine or VLLM) / f"{file}_perf.parquet"
        found = {(m, k): latency for m, k, latency in self._rows(path, "m, k, min(latency)", "group by all")}
        m, k = (np.array(sorted({key[axis] for key in found})) for axis in (0, 1))
        return m, k, np.array([[found.get((row, column), np.nan) for column in k] for row in m])

    def _read_reduce(self) -> dict[int, tuple[Any, Any]]:
        """{devices: (elements, ms)}: the faster of NCCL and the engine's own all-reduce in a graph."""
        best: dict[int, dict[int, float]] = {}
        own: list[tuple[Any, ...]] = []
        if self.engine is not None:
            path = self._of_engine("comm", "custom_allreduce")
            own = self._rows(path, "num_gpus, message_size, latency", "where kernel_source not like '%eager'")
        with (self.data / "comm_collectives.csv").open() as file:
            for row in csv.DictReader(file):
                wide = row["dtype"] in ("half", "bfloat16") and row["mode"] != "vLLM_custom_eager"
                ours = self.engine is None or row["library"] == "nccl"
                if row["gpu"] == self.system and row["op_name"] == "all_reduce" and wide and ours:
                    own.append((int(row["num_gpus"]), int(row["message_size"]), float(row["latency_ms"])))
        for devices, size, latency in own:
            sizes = best.setdefault(devices, {})
            sizes[size] = min(sizes.get(size, np.inf), latency)
        return {
            devices: (np.array(sorted(sizes)), np.array([sizes[size] for size in sorted(sizes)]))
            for devices, sizes in best.items()
        }

    def has(self, number: str) -> bool:
        """Whether matrix products in `number` were measured."""
        return self._gemm[number] is not None

    def rows(self, number: str) -> Any:
        """The row counts that were measured."""
        found = self._gemm[number]
        assert found is not None
        return found[0]

    def gemm(self, number: str, n: int, k: int, fused: bool = False) -> Any:
        """Times over `rows(number)` of a product with an n x k matrix, bilinear in n and k.

        In fp8 the measured call finds a scale, quantises and multiplies. Checkpoints have static scales, so the first
        is taken off; `fused`: the kernel before it quantises, so the second is as well.
        """
        found = self._gemm[number]
        assert found is not None
        rows, axis, cube = found
        pieces = -(-n // int(axis[-1]))
        n_part = n / pieces
        i, part_n = _cell(axis, n_part)
        j, part_k = _cell(axis, k)
        top = cube[:, i, j] * (1 - part_k) + cube[:, i, j + 1] * part_k
        bottom = cube[:, i + 1, j] * (1 - part_k) + cube[:, i + 1, j + 1] * part_k
        times = top * (1 - part_n) + bottom * part_n
        if number == "fp8":
            for m, width, scale in self._scales[: 2 if fused else 1]:
                at, part = _cell(width, k)
                known = np.nan_to_num(scale[:, at] * (1 - part) + scale[:, at + 1] * part)
                times = np.maximum(times - _extended(rows, m, known), n_part * k / self.memory_bytes_per_ms)
        return pieces * times

    def reduce(self, devices: int, elements: Any) -> Any:
        """Times of an all-reduce of 16-bit elements."""
        if devices == 1:
            return np.zeros(len(elements))
        sizes, times = self._reduce[devices]
        slope = (times[-1] - times[-2]) / (sizes[-1] - sizes[-2])
        return np.interp(elements, sizes, times) + np.maximum(elements - sizes[-1], 0) * slope

    def element_wise(self, num_bytes: Any) -> Any:
        """Times of a kernel that streams this many bytes."""
        return KERNEL_MS + num_bytes / self.memory_bytes_per_ms

    def experts(self, spec: ModelSpec, devices: int, number: str, tokens: Any) -> Any:
        """Times of all routed experts of a layer. Raises LookupError when that shape was not measured."""
        shape = spec.hidden, spec.ffn, spec.experts_per_token, spec.num_experts
        own = self._experts_of(shape, devices, number, tokens)
        if self.kernels != "marlin":
            return own
        hidden, inner, chosen, experts = MARLIN
        each = spec.experts_per_token / spec.num_experts * experts / chosen
        work = spec.num_experts * spec.hidden * spec.ffn / (experts * hidden * inner)
        other = self._experts_of(MARLIN, devices, number, np.append(1.0, tokens * each))
        return own[0] + work * (other[1:] - other[0])

    def _experts_of(self, shape: tuple[int, int, int, int], devices: int, number: str, tokens: Any) -> Any:
        measured = self._experts.get((TYPES.get(number, number), *shape), {})
        times = {count: ms for (count, cut), ms in measured.items() if cut == devices}
        if not times:
            raise LookupError(f"experts of shape {shape} in {number} over {devices} devices on {self.system}")
        sizes = sorted(times)
        return _extended(tokens, np.array(sizes), np.array([times[size] for size in sizes]))

    def attention(self, kind: str, head: tuple[int, int, int, int], kv: str) -> dict[tuple[int, int], float] | None:
        """{(batch, tokens): ms} of (head_dim, window, query heads, KV heads), None when not measured."""
        head_dim, window, heads, kv_heads = head
        return self._attention[kind].get((head_dim, window, heads, kv_heads, TYPES[kv]))


def _cell(axis: Any, value: float) -> tuple[int, float]:
    """Index of the cell that holds `value` (the last ones go on beyond the ends) and where in it."""
    i = int(np.clip(np.searchsorted(axis, value) - 1, 0, len(axis) - 2))
    return i, float((value - axis[i]) / (axis[i + 1] - axis[i]))


def _extended(x: Any, at: Any, values: Any) -> Any:
    slope = (values[-1] - values[-2]) / (at[-1] - at[-2])
    return np.interp(x, at, values) + np.maximum(x - at[-1], 0) * slope


def rows_ms(ops: Operators, spec: ModelSpec, devices: int, number: str) -> tuple[Any, Any]:
    """(rows, ms): everything of all layers but attention."""
    dense = "bf16" if number == "mxfp4" else number
    rows = ops.rows(dense)
    hidden, width = spec.hidden, spec.num_heads * spec.head_dim // devices
    kv = max(1, spec.num_kv_heads // devices) * spec.head_dim
    layer = ops.gemm(dense, width + 2 * kv, hidden, ops.norm_quantises) + ops.gemm(dense, hidden, width, True)
    layer = layer + 2 * ops.reduce(devices, rows * hidden)
    layer = layer + ops.element_wise(rows * (width + 2 * kv) * 4.0)
    layer = layer + 2 * ops.element_wise(rows * hidden * 8.0)
    if spec.qk_norm:
        layer = layer + ops.element_wise(rows * (width + kv) * 4.0)
    if spec.num_experts:
        layer = layer + ops.gemm("bf16", spec.num_experts, hidden) + ops.experts(spec, devices, number, rows)
        layer = layer + ops.element_wise(rows * spec.num_experts * 4.0)
    else:
        inner = spec.ffn // devices
        up = (2 if spec.gated_ffn else 1) * inner
        layer = layer + ops.gemm(dense, up, hidden, ops.norm_quantises) + ops.gemm(dense, hidden, inner, True)
        layer = layer + ops.element_wise(rows * (up + inner) * 2.0)
    return rows, spec.num_layers * layer


def outputs_ms(ops: Operators, spec: ModelSpec, devices: int) -> tuple[Any, Any]:
    """(outputs, ms): the head's product in bf16, the logits of all devices in one place, three passes over them."""
    outputs = ops.rows("bf16")
    logits = outputs * spec.vocab * 4.0
    share = logits / 2 * (devices - 1) / devices / ops.peer_bytes_per_ms
    cut = -(-spec.vocab // devices)
    return outputs, ops.gemm("bf16", cut, spec.hidden) + share + 3 * ops.element_wise(logits)


def windows(spec: ModelSpec) -> dict[int, int]:
    """{window or 0: layers that have it}."""
    found: dict[int, int] = {}
    for layer in range(spec.num_layers):
        window = spec.layer_window(layer) or 0
        found[window] = found.get(window, 0) + 1
    return found


def decode_grid(ops: Operators, spec: ModelSpec, devices: int, kv: str) -> Any | None:
    """Milliseconds [DECODES][CONTEXTS] of all layers; what was too large to measure goes on in proportion."""
    total = np.zeros((len(DECODES), len(CONTEXTS)))
    for window, layers in windows(spec).items():
        head = (spec.head_dim, window, spec.num_heads // devices, max(1, spec.num_kv_heads // devices))
        measured = ops.attention("generation", head, kv)
        if measured is None:
            return None
        for i, batch in enumerate(DECODES):
            known = sorted(context for size, context in measured if size == batch)
            values = np.array([measured[batch, context] for context in known])
            values = _monotone(values)
            grid = np.interp(CONTEXTS, known, values)
            if not window:
                grid *= np.maximum(np.array(CONTEXTS) / known[-1], 1.0)
            total[i] += layers * grid
    return np.minimum.accumulate(np.minimum.accumulate(total[::-1, ::-1], axis=0), axis=1)[::-1, ::-1]


def prompt_lines(ops: Operators, spec: ModelSpec, devices: int, kv: str) -> tuple[Any, Any] | None:
    """Milliseconds over TOKENS: (alone, packed), of all layers."""
    alone, packed = np.zeros(len(TOKENS)), np.zeros(len(TOKENS))
    for window, layers in windows(spec).items():
        head = (spec.head_dim, window, spec.num_heads // devices, max(1, spec.num_kv_heads // devices))
        measured = ops.attention("context", head, kv)
        if measured is None:
            return None
        for i, tokens in enumerate(TOKENS):
            sizes = [batch for batch, length in measured if length == tokens]
            if not sizes or (1, tokens) not in measured:
                return None
            alone[i] += layers * measured[1, tokens]
            packed[i] += layers * min(measured[batch, tokens] / batch for batch in sizes)
    return _convex(alone, alone[0]), _convex(packed, 0.0)


def _convex(values: Any, origin: float) -> Any:
    """The largest convex function through (0, origin) that is nowhere above `values`: more context never costs less."""
    x, y = np.array((0, *TOKENS), dtype=float), np.array((origin, *values))
    hull: list[int] = []
    for i in range(len(x)):
        while len(hull) > 1 and (y[hull[-1]] - y[hull[-2]]) * (x[i] - x[hull[-2]]) >= (y[i] - y[hull[-2]]) * (
            x[hull[-1]] - x[hull[-2]]
        ):
            hull.pop()
        hull.append(i)
    return np.interp(x[1:], x[hull], y[hull])


def _monotone(values: Any) -> Any:
    """Never falling, and nowhere above `values`: a batch that runs slowly can be padded to a faster, larger one."""
    return np.minimum.accumulate(values[::-1])[::-1]


def thinned(at: Any, ms: Any) -> dict[str, list[int]]:
    """Knots in nanoseconds that stay within the tolerance of every point: the longest pieces that do."""
    ns = np.round(_monotone(np.asarray(ms)) * 1e6)
    keep, start = [0], 0
    while start < len(at) - 1:
        end = next(
            (
                end for end in range(len(at) - 1, start + 1, -1)
                if np.all(np.abs(_between(at, ns, start, end) / ns[start : end + 1] - 1) <= TOLERANCE)
            ),
            start + 1,
        )  # fmt: skip
        keep.append(end)
        start = end
    return {"at": [int(at[i]) for i in keep], "ns": [int(ns[i]) for i in keep]}


def _between(at: Any, ns: Any, start: int, end: int) -> Any:
    return np.interp(at[start : end + 1], [at[start], at[end]], [ns[start], ns[end]])


def compose(ops: Operators, spec: ModelSpec, device: str) -> dict[str, Any] | None:
    """The tables of a model on a device, None when its attention or experts were not measured there."""
    dense: list[dict[str, Any]] = []
    attention: list[dict[str, Any]] = []
    for devices in (degree for degree in DEGREES if spec.num_heads % degree == 0):
        for kv in TYPES:
            grid, prompts = decode_grid(ops, spec, devices, kv), prompt_lines(ops, spec, devices, kv)
            if grid is None or prompts is None:
                continue
            alone, packed = (thinned(np.array(TOKENS), line) for line in prompts)
            attention.append({
                "tensor_parallel": devices, "kv": kv, "decodes": list(DECODES), "contexts": list(CONTEXTS),
                "decode_ns": [[int(value) for value in np.round(row * 1e6)] for row in grid],
                "alone": alone, "packed": packed,
            })  # fmt: skip
        numbers = ("mxfp4",) if spec.name == "gpt-oss-120b" else tuple(TYPES)
        for number in numbers:
            if not ops.has("bf16" if number == "mxfp4" else number) or devices not in {
                a["tensor_parallel"] for a in attention
            }:
                continue
            try:
                rows = thinned(*rows_ms(ops, spec, devices, number))
            except LookupError:
                continue
            outputs = thinned(*outputs_ms(ops, spec, devices))
            dense.append({"tensor_parallel": devices, "number": number, "rows": rows, "outputs": outputs})
    if not dense:
        return None
    return {
        "notice": NOTICE, "model": spec.name, "device": device, "layers": spec.num_layers, "host_ns": HOST_NS,
        "dense": dense, "attention": attention,
        "source": f"benchmarks/fit_operators.py over operator measurements of {KERNELS[ops.kernels]} kernels",
        "date": "2026-11-23",
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data" / "calibration")
    parser.add_argument("--only", nargs="*", default=())
    parser.add_argument(
        "--package", type=Path, required=True, help="aiconfigurator_core/systems/data of the wheel: what --data lacks"
    )
    parser.add_argument("--kernels", default="vllm", choices=("vllm", *VARIANTS))
    options = parser.parse_args()
    for device, system in SYSTEMS.items():
        if options.only and not set(options.only) & {device, *MODELS}:
            continue
        if options.only and set(options.only) & set(SYSTEMS) and device not in options.only:
            continue
        wanted = [
            model
            for model in MODELS
            if (options.kernels == "vllm" or (device, model) in VARIANTS[options.kernels])
            and (not set(options.only) & set(MODELS) or model in options.only)
        ]
        if not wanted:
            continue
        ops = Operators(options.data, system, None if device == "a100-80gb" else options.package, options.kernels)
        for model in wanted:
            tables = compose(ops, catalog.model(model), device)
            if tables is None:
                print(f"{device:10} {model:15} not measured")
                continue
            path = OUT / device / (f"{model}.json" if options.kernels == "vllm" else f"{model}@{options.kernels}.json")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(tables, separators=(",", ":")) + "\n", encoding="utf-8")
            cases = " ".join(f"{table['tensor_parallel']}/{table['number']}" for table in tables["dense"])
            print(f"{device:10} {model:15} {path.stat().st_size:6} bytes: {cases}")


if __name__ == "__main__":
    main()
