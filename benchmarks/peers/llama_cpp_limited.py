"""llama.cpp in one process that may run inside a memory limit: reads the file through mmap, generates, writes a figure.

    python llama_cpp_limited.py MODEL.gguf OUT.json PROMPT TOKENS THREADS CONTEXT

Run with an interpreter that has the `xllamacpp` wheel. Imports nothing of Megalith.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """Answer one prompt, greedily, without a warm-up and with a small KV cache."""
    import xllamacpp

    model, out, prompt, tokens, threads, context = sys.argv[1:]
    params: Any = xllamacpp.CommonParams()
    params.model.path = model
    params.load_mode = xllamacpp.llama_load_mode.LLAMA_LOAD_MODE_MMAP
    params.n_ctx, params.n_batch, params.n_ubatch, params.n_parallel = int(context), 64, 64, 1
    params.warmup, params.fit_params, params.cache_ram_mib = False, False, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(threads)
    answer: Any = xllamacpp.Server(params).handle_completions(
        {"prompt": prompt, "max_tokens": int(tokens), "temperature": 0.0, "ignore_eos": True}
    )
    if isinstance(answer, str):
        answer = json.loads(answer)
    Path(out).write_text(json.dumps({"timings": answer["timings"], "load_mode": str(params.load_mode)}))


if __name__ == "__main__":
    main()
