"""The catalogue: names, sources, and parameter counts that equal the published ones."""

from __future__ import annotations

import msgspec
import pytest

from megalith.base.errors import ConfigError, ModelNotFound
from megalith.cost.parameters import active_parameters, count
from megalith.specs import catalog
from megalith.specs.workload_catalog import workloads

# The figures as their makers print them, once more and independently of the catalogue's own field.
PUBLISHED = {
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "mistral-7b-v0.1": 7_241_732_096,
    "mistral-7b": 7_248_023_552,
    "mixtral-8x7b": 46_702_792_704,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-32b": 32_762_123_264,
    "gemma-3-270m": 268_098_176,
    "gemma-3-1b": 999_885_952,
    "bloom-176b": 176_247_271_424,
}
WANTED = [
    "smollm2-135m",
    "smollm2-360m",
    "smollm2-1.7b",
    "llama-2-7b",
    "llama-2-13b",
    "llama-2-70b",
    "llama-3-8b",
    "llama-3-70b",
    "llama-3-405b",
    "llama-3.2-1b",
    "llama-3.2-3b",
    "mistral-7b",
    "mixtral-8x7b",
    "qwen2.5-0.5b",
    "qwen2.5-1.5b",
    "qwen2.5-3b",
    "qwen2.5-7b",
    "qwen2.5-14b",
    "qwen2.5-32b",
    "qwen2.5-72b",
    "qwen3-0.6b",
    "qwen3-1.7b",
    "qwen3-4b",
    "qwen3-8b",
    "qwen3-14b",
    "qwen3-32b",
    "gemma-3-270m",
    "gemma-3-1b",
    "gemma-3-4b",
    "gemma-3-12b",
    "gemma-3-27b",
    "opt-13b",
    "opt-66b",
    "opt-175b",
    "gpt-3-175b",
    "bloom-176b",
    "gpt-1t",
]
DEVICES = [
    "v100",
    "a100-40",
    "a100",
    "h100",
    "h100-pcie",
    "h200",
    "b200",
    "l4",
    "l40s",
    "a10g",
    "a6000",
    "rtx-4090",
    "mi250x",
    "sn40l",
]


@pytest.mark.parametrize("name", sorted(catalog.models()))
def test_count_equals_the_published_one(name: str) -> None:
    entry = catalog.entry(name)
    off = abs(count(entry.spec).total - entry.published_parameters)
    assert off <= entry.published_resolution // 2
    assert entry.source
    assert entry.date


@pytest.mark.parametrize(("name", "parameters"), sorted(PUBLISHED.items()))
def test_exact_published_counts(name: str, parameters: int) -> None:
    assert count(catalog.model(name)).total == parameters


def test_gemma3_text_matches_the_report() -> None:
    """Table 1 of arXiv:2503.19786 prints the parameters without embedding: 698 M, 3,209 M, 10,759 M, 25,600 M."""
    for name, millions in (("1b", 698), ("4b", 3209), ("12b", 10759), ("27b", 25600)):
        parts = count(catalog.model(f"gemma-3-{name}"))
        assert round((parts.total - parts.embedding) / 1e6) == pytest.approx(millions, abs=6)


def test_bloom_embedding_and_mixtral_active() -> None:
    assert count(catalog.model("bloom-176b")).embedding == 3_596_615_680
    assert round(active_parameters(catalog.model("mixtral-8x7b")) / 1e9, 1) == 12.9


@pytest.mark.parametrize("name", WANTED)
def test_every_promised_model_is_there(name: str) -> None:
    spec = catalog.model(name)
    assert spec.num_heads % spec.num_kv_heads == 0


@pytest.mark.parametrize("name", DEVICES)
def test_every_promised_device_is_there(name: str) -> None:
    device = catalog.device(name)
    assert device.memory_bytes >= 16 << 30
    assert 0 < device.achievable.memory <= 1
    assert all(0 < part <= 1 for part in device.achievable.compute.values())
    assert set(device.achievable.compute) & set(device.flops_per_s)
    assert device.source
    assert device.achievable.source
    assert device.date
    if device.price_per_hour_usd is not None:
        assert device.price_source
    if device.tdp_w is not None:
        assert device.idle_w is not None
        assert device.idle_w < device.tdp_w


@pytest.mark.parametrize(
    ("typed", "found"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", "llama-3.1-8b"),
        ("SMOLLM2", "smollm2-135m"),
        ("Qwen/Qwen2.5-0.5B-Instruct", "qwen2.5-0.5b"),
        ("google/gemma-3-270m-it", "gemma-3-270m"),
        ("gpt3", "gpt-3-175b"),
    ],
)
def test_names_people_type(typed: str, found: str) -> None:
    assert catalog.model(typed).name == found


def test_no_two_entries_claim_one_alias() -> None:
    for entries in (catalog.models(), catalog.devices(), workloads()):
        owner: dict[str, str] = {}
        for name, entry in entries.items():
            for label in (name, *entry.aliases):
                key = catalog.canonical(label)
                assert owner.setdefault(key, name) == name, f"{label} is claimed by {owner[key]} and {name}"


def test_unknown_names_name_the_nearest() -> None:
    with pytest.raises(ModelNotFound, match=r"lama-3\.1-8bb.*llama-3\.1-8b"):
        catalog.model("lama-3.1-8bb")
    with pytest.raises(ConfigError, match=r"'h300'.*h200"):
        catalog.device("h300")


def test_entries_survive_json() -> None:
    for name, entry in catalog.models().items():
        again = msgspec.json.decode(msgspec.json.encode(entry), type=catalog.CatalogModel)
        assert again == entry, name
