"""OpenVINO GenAI, which reads the GGUF file itself and batches continuously over a paged cache."""

from __future__ import annotations

from typing import Any

import driver


class OpenVino:
    """One ContinuousBatchingPipeline without prefix cache.

    Its model is the folder that `LLMPipeline(GGUF, "CPU", enable_save_ov_model=True)` writes beside the GGUF file.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        try:
            import numpy as np
            import openvino as ov
            import openvino_genai as genai
        except ImportError as error:
            raise driver.Skip(f"openvino-genai is not installed: {error}") from None
        self.version = f"openvino-genai {genai.__version__}"
        folder = settings["model"].get(settings["source"])
        if folder is None:
            raise driver.Skip(f"no OpenVINO model folder for {settings['source']}")
        scheduler = genai.SchedulerConfig()
        scheduler.enable_prefix_caching = False
        scheduler.cache_size = 2
        scheduler.max_num_seqs = 64
        scheduler.max_num_batched_tokens = settings.get("token_budget", 256)
        scheduler.dynamic_split_fuse = True
        properties = {"INFERENCE_NUM_THREADS": settings["threads"], **settings.get("properties", {})}
        self._pipe = genai.ContinuousBatchingPipeline(folder, scheduler, "CPU", properties)
        self._genai, self._tensor, self._np = genai, ov.Tensor, np
        self._requests = 0

    def generate(self, prompts: list[list[int]], output_tokens: int, tick: driver.Tick) -> int:
        config = self._genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = output_tokens
        config.ignore_eos = True
        config.do_sample = False
        handles = []
        for ids in prompts:
            self._requests += 1
            ids_1T = self._np.array([ids], dtype=self._np.int64)
            handles.append(self._pipe.add_request(self._requests, self._tensor(ids_1T), config))
        made = [0] * len(handles)
        while self._pipe.has_non_finished_requests():
            self._pipe.step()
            for i, handle in enumerate(handles):
                while handle.can_read():
                    made[i] += sum(len(output.generated_ids) for output in handle.read().values())
            tick(sum(made), sum(1 for tokens in made if tokens))
        return sum(made)


if __name__ == "__main__":
    driver.main(OpenVino)
