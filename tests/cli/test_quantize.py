"""`megalith quantize` as a person or a script runs it: the name of --out says what is written."""

from __future__ import annotations

import json
from pathlib import Path

from tests.engine.tiny import write_tiny_llama

from .command import megalith


def test_int8_as_a_directory_and_as_a_file(tmp_path: Path) -> None:
    tiny = str(write_tiny_llama(tmp_path / "tiny"))
    directory, file = tmp_path / "tiny-int8", tmp_path / "tiny-int8.gguf"
    same = ["--to", "int8", "--keep", "embed=f16", "--keep", "head=f16"]
    found = [
        json.loads(megalith("quantize", tiny, *same, "--out", str(out), "--json").stdout) for out in (directory, file)
    ]
    assert found[0]["formats"] == found[1]["formats"]
    assert set(found[0]["formats"]) == {"F16", "F32", "Q8_0"}
    said = [
        json.loads(megalith("perplexity", str(out), "--context", "64", "--tokens", "640", "--json").stdout)[
            "perplexity"
        ]
        for out in (directory, file)
    ]
    assert said[0] == said[1]
    refused = megalith("quantize", tiny, "--to", "q5_1", "--out", str(tmp_path / "other"))
    assert refused.returncode != 0
    assert ".gguf" in refused.stderr
    assert "Traceback" not in refused.stderr
