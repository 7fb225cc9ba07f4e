"""Scenario: everything that decides a simulated run, in one strict struct that is stored with its results."""

from __future__ import annotations

from megalith.base.config import Config
from megalith.specs.fleet import FleetSpec
from megalith.specs.slo import Slo
from megalith.specs.workload import WorkloadSpec


class Scenario(Config, kw_only=True):
    """A model on a fleet under a load. Two runs of equal scenarios have the same digest on every machine."""

    model: str
    """Name of a catalogue model, unless its ModelSpec is handed over beside the scenario."""
    fleet: FleetSpec
    workload: WorkloadSpec
    slo: Slo | None = None
    reference: str = "a100-80gb"
    """Device that slowdowns are measured against, alone with each request; tensor parallel as in the first pool."""
    seed: int = 0
    weight_format: str = "bf16"
    kv_format: str = "bf16"
    timer: str = "auto"
    """How steps are timed: `operators` (measured operator tables), `analytic` (rates of the device), the name of a
    published model; `auto` takes operator tables where they exist."""
    memory_share: float = 0.9
    """Of a device's memory, what weights, activations and KV may take."""
    max_context: int | None = None
    """Most tokens of prompt and answer together; None: what the model and the smallest KV cache allow."""
    sample_s: float | None = None
    """Between two samples of every instance; 0 takes none, None takes them as often as costs little."""
    leap: bool = True
    """False runs every step one by one; the results are the same."""
