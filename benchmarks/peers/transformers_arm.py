"""Hugging Face transformers: `generate()` on the dequantised weights, in bfloat16 or float32."""

from __future__ import annotations

from typing import Any

import driver


class Transformers:
    """AutoModelForCausalLM with its default (SDPA) attention and dynamic cache."""

    def __init__(self, settings: dict[str, Any]) -> None:
        try:
            import torch
            import transformers
        except ImportError as error:
            raise driver.Skip(f"transformers is not installed: {error}") from None
        torch.set_num_threads(settings["threads"])
        self.version = f"transformers {transformers.__version__}, torch {torch.__version__}"
        dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[settings["source"]]
        model = transformers.AutoModelForCausalLM.from_pretrained(settings["model"][settings["source"]], dtype=dtype)
        self._model, self._torch = model.eval(), torch

    def generate(self, prompts: list[list[int]], output_tokens: int, tick: driver.Tick) -> int:
        del tick  # generate() shows nothing of its steps
        torch = self._torch
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            out = self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=output_tokens,
                min_new_tokens=output_tokens,
                do_sample=False,
            )
        return int(out.shape[0] * (out.shape[1] - ids.shape[1]))


if __name__ == "__main__":
    driver.main(Transformers)
