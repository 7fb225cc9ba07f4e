"""The two models that come in packages, for tests that need real bytes."""

from __future__ import annotations

from functools import cache

import gguf
import pytest

from megalith.base.errors import ModelNotFound
from megalith.model.open import OpenModel, open_model
from megalith.model.source import resolve

NAMES = ("smollm2", "gemma3-270m")


@cache
def opened(name: str) -> OpenModel:
    """The opened model; the test is skipped when its package is not installed."""
    try:
        resolve(name)
    except ModelNotFound as error:
        pytest.skip(str(error))
    return open_model(name)


@cache
def package_reader(name: str) -> gguf.GGUFReader:
    """The gguf package's reading of the same file; it takes seconds, so it is shared."""
    return gguf.GGUFReader(opened(name).files.path)
