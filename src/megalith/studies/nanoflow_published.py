"""What NanoFlow published: tokens a second of one of eight A100-80GB with Llama-2-70B, prompts and answers together.

Source: efeslab/Nanoflow, pipeline/eval/baseline_data.py (Apache-2.0); some baselines differ slightly from the paper.
"""

from __future__ import annotations

from typing import Final

FLOPS_PER_S: Final = 260e12
"""Measured by them for products on an A100."""
PARAMETERS: Final = 70e9
"""As they count them."""
_NAMES: Final = ("512/512", "1024/512", "512/1024", "azure-conv", "lmsys", "sharegpt")
OWN: Final = dict(zip(_NAMES, (1286.0, 1263.0, 1212.0, 1259.0, 1247.0, 1272.0), strict=True))
ENGINES: Final = {
    "vLLM": dict(zip(_NAMES, (494.0, 552.0, 410.0, 484.0, 251.0, 255.0), strict=True)),
    "FastGen": dict(zip(_NAMES, (490.0, 513.0, 372.0, 548.0, 293.0, 335.0), strict=True)),
    "TensorRT-LLM": dict(zip(_NAMES, (735.0, 817.0, 636.0, 831.0, 560.0, 639.0), strict=True)),
}
