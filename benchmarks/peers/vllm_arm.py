"""vLLM's CPU build: the offline `LLM` with its paged cache and continuous batching, prefix cache off."""

from __future__ import annotations

import os
from typing import Any

import driver


class Vllm:
    """One `LLM` in this process, so that the pinned core and the CPU clock cover all of it."""

    def __init__(self, settings: dict[str, Any]) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = settings.get("bind", str(settings["core"]))
        os.environ["VLLM_NO_USAGE_STATS"] = "1"
        os.environ["HF_HUB_OFFLINE"] = "1"
        os.environ["OMP_NUM_THREADS"] = str(settings["threads"])
        try:
            import vllm
        except ImportError as error:
            raise driver.Skip(f"vllm-cpu is not installed: {error}") from None
        self.version = f"vllm-cpu {vllm.__version__}"
        self._vllm = vllm
        self._requests = 0
        self._llm = vllm.LLM(
            model=settings["model"][settings["source"]],
            dtype=settings["dtype"],
            max_model_len=1024,
            max_num_seqs=64,
            enable_prefix_caching=False,
            enforce_eager=settings.get("eager", False),
            disable_log_stats=True,
        )

    def generate(self, prompts: list[list[int]], output_tokens: int, tick: driver.Tick) -> int:
        params = self._vllm.SamplingParams(
            temperature=0.0, max_tokens=output_tokens, min_tokens=output_tokens, ignore_eos=True, detokenize=False
        )
        engine = self._llm.llm_engine
        for ids in prompts:
            self._requests += 1
            engine.add_request(str(self._requests), {"prompt_token_ids": ids}, params)
        made: dict[str, int] = {}
        while engine.has_unfinished_requests():
            for output in engine.step():
                made[output.request_id] = len(output.outputs[0].token_ids)
            tick(sum(made.values()), len(made))
        return sum(made.values())


if __name__ == "__main__":
    driver.main(Vllm)
