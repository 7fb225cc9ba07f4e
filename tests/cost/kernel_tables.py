"""Small directories of kernel tables whose times are known formulas, written in the layout that is read."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

CHUNKS, CONTEXTS, DECODES, DECODE_CONTEXTS = (16, 64, 256), (0, 16, 256, 2048), (0, 1, 2, 8, 32), (16, 256, 2048, 4096)
LAYERS = ("embedding", "layernorm", "qkv_proj", "final_layernorm")
META = "skew_fit:\n  enabled: {enabled}\n  per_tp:\n    1:\n      alpha_default: 0.25\n"


def attention_us(chunk: int, context: int, decodes: int, decode_context: int) -> float:
    """Linear along each axis, so that straight lines between grid points are exact."""
    fixed = 5.0 if chunk else 3.0
    return fixed + 0.01 * chunk + 0.001 * context + 0.002 * decodes * decode_context


def write(
    folder: Path,
    *,
    skew: dict[str, float] | None = None,
    enabled: bool = True,
    experts: bool = False,
    nested: bool = False,
    attention: Callable[[int, int, int, int], float] = attention_us,
) -> Path:
    """Write them; `skew` maps the labels of a bucket, joined by commas, to its alpha."""
    rows = [(0, 0, n, kv) for n in DECODES if n for kv in DECODE_CONTEXTS]
    rows += [
        (c, kp, n, kv) for c in CHUNKS for kp in CONTEXTS for n in DECODES for kv in (DECODE_CONTEXTS if n else (0,))
    ]
    tables = {
        "dense": ["layer,tokens,time_us", *(f"{name},{n},{10 + n}" for name in LAYERS for n in (1, 8, 64, 256))],
        "per_sequence": ["layer,sequences,time_us", *(f"lm_head,{n},{100 + n}" for n in (1, 16))],
        "attention": [
            "prefill_chunk,kv_prefill,n_decode,kv_decode,time_us",
            *(f"{c},{kp},{n},{kv},{attention(c, kp, n, kv):.6f}" for c, kp, n, kv in rows),
        ],
    }
    if skew is not None:
        head = "pc,n_label,skew_rate_label,kv_big_label,kp_label,alpha,n_samples"
        tables["skew_fit"] = [head, *(f"{labels},{alpha},4" for labels, alpha in skew.items())]
    if experts:
        tables["moe"] = [
            "tokens,activated_experts,time_us",
            *(f"{n},{awake},{n + 10 * awake}" for awake in (2, 8) for n in (1, 256)),
        ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "meta.yaml").write_text(META.format(enabled=str(enabled).lower()))
    for name, lines in tables.items():
        text = "\n".join(lines) + "\n"
        if nested:
            (folder / "tp1").mkdir(exist_ok=True)
            (folder / "tp1" / f"{name}.csv").write_text(text)
        else:
            with gzip.open(folder / f"tp1_{name}.csv.gz", "wt") as file:
                file.write(text)
    return folder
