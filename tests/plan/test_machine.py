"""What this machine is, and that a stored profile counts only here."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from megalith.cost.profile import Profile, band_for, from_device, model_shape
from megalith.engine import probe, probe_disk
from megalith.plan import machine
from megalith.plan.machine import MachineFacts
from megalith.specs import catalog


@pytest.fixture(autouse=True)
def _own_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MEGALITH_HOME", str(tmp_path))


def test_profiles_are_used_once_stored_and_only_on_their_machine() -> None:
    guessed = machine.here("native", 2)
    assert "guess" in guessed.source
    facts = MachineFacts(
        machine=machine.machine_name(), date="2026-01-02", threads=2,
        figures={"memory_read_all_bytes_per_s": 2e10, "linear_native_macs_per_s": 1e11},
    )  # fmt: skip
    machine.store(machine.facts_path(), facts)
    probed = machine.here("native", 2)
    assert probed.rates.weight_byte_ns == pytest.approx(0.05)
    assert probed.rates.mac_ns == pytest.approx(0.01)
    assert probed.band.high < guessed.band.high
    fitted = msgspec.structs.replace(probed, source="fitted")
    machine.store(machine.profile_path("native", 2), fitted)
    assert machine.here("native", 2) == fitted
    assert machine.here("native", 1).source != "fitted"
    machine.store(machine.profile_path("native", 2), msgspec.structs.replace(fitted, name="another machine"))
    assert machine.here("native", 2) == probed
    machine.profile_path("native", 2).write_text("{broken")
    assert machine.here("native", 2) == probed


def test_profiles_survive_json() -> None:
    for device in catalog.devices().values():
        profile = from_device(device)
        assert msgspec.json.decode(msgspec.json.encode(profile), type=Profile) == profile


def test_a_fitted_band_is_wider_for_another_model() -> None:
    own, other = catalog.model("smollm2"), catalog.model("gemma-3-270m")
    plain = machine.here("native", 1)
    assert band_for(plain, other) == plain.band
    fitted = msgspec.structs.replace(plain, fitted_on=model_shape(own))
    assert band_for(fitted, own) == plain.band
    wider = band_for(fitted, other)
    assert wider.low < plain.band.low
    assert wider.high > plain.band.high
    assert "another model" in wider.source


def test_memory_figures_make_sense() -> None:
    assert 0 < machine.available_memory_bytes() <= machine.total_memory_bytes()
    assert machine.cores() >= 1
    assert str(machine.cores()) in machine.machine_name()


def test_driver_names_find_their_catalogue_entry() -> None:
    for name, mib, found in (
        ("NVIDIA H100 80GB HBM3", 81559, "h100-sxm"),
        ("NVIDIA H200", 143771, "h200"),
        ("NVIDIA A100-SXM4-40GB", 40960, "a100-40gb"),
        ("NVIDIA GeForce RTX 4090", 24564, "rtx-4090"),
        ("NVIDIA L4", 23034, "l4"),
    ):
        assert machine._closest_gpu(name, mib << 20, "bf16").name == found


def test_disk_figures_are_real_and_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_disk, "_FILE_BYTES", 16 << 20)
    monkeypatch.setattr(probe_disk, "_RANDOM", ((4096, 20), (1 << 20, 5)))
    notes: list[str] = []
    folder = tmp_path / "disk"
    figures = dict(probe_disk.disk_figures(folder, notes.append))
    assert set(figures) == {
        "disk_sequential_write_bytes_per_s", "disk_sequential_read_bytes_per_s", "disk_random_read_4k_bytes_per_s",
        "disk_random_read_1m_bytes_per_s",
    }  # fmt: skip
    assert all(1e4 < value < 1e12 for value in figures.values())
    assert list(folder.iterdir()) == []


def test_probe_figures_of_memory_and_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_TRIAL_NS", 50_000_000)
    monkeypatch.setattr(probe, "_READ_BYTES", 32 << 20)
    monkeypatch.setattr(probe, "_COPY_BYTES", 32 << 20)
    figures = dict([*probe.memory_figures(2), *probe.process_figures()])
    assert len(figures) == 5
    assert all(1e7 < value < 1e13 for value in figures.values())
