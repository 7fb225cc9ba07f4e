from __future__ import annotations

from pathlib import Path

import pytest

from megalith.model.open import OpenModel, open_model
from tests.engine.tiny import write_tiny_llama


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny_model(tiny: Path) -> OpenModel:
    return open_model(str(tiny))
