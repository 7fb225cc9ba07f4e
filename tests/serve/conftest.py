from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from megalith.engine.api import EngineConfig
from megalith.engine.launch import build_engine
from megalith.engine.service import LocalEngine
from megalith.model.open import OpenModel, open_model
from tests.engine.tiny import write_tiny_llama


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("served") / "tiny")


@pytest.fixture(scope="session")
def tiny_model(tiny_path: Path) -> OpenModel:
    return open_model(str(tiny_path))


@pytest.fixture(scope="session")
def make_engine(tiny_path: Path) -> Callable[..., LocalEngine]:
    """Builds real engines over the tiny model, with little KV; the exact torch path unless `mode` says otherwise."""

    def make(**changes: object) -> LocalEngine:
        settings = {
            "model": str(tiny_path), "mode": "float32", "threads": 1, "num_blocks": 256, "max_sequences": 32,
            "token_budget": 128, **changes,
        }  # fmt: skip
        return build_engine(EngineConfig(**settings)).engine  # type: ignore[arg-type]

    return make
