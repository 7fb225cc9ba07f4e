"""Instances built from configurations: sizes, refusals, and what requests get from a whole one."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from megalith.base.errors import ConfigError, DoesNotFit, ModelNotFound, RequestError
from megalith.base.units import MIB
from megalith.engine.api import Delta, EngineConfig
from megalith.engine.launch import BuiltEngine, build_engine, choose_runner, max_rows, why_not_native
from megalith.engine.params import Grammar, SamplingParams
from megalith.engine.service import merge
from megalith.model.open import OpenModel


def config(model: Path, **changes: object) -> EngineConfig:
    settings = {"model": str(model), "mode": "float32", "num_blocks": 64, "threads": 1, **changes}
    return EngineConfig(**settings)  # type: ignore[arg-type]


def use(settings: EngineConfig, work: Callable[[BuiltEngine], Awaitable[None]]) -> None:
    async def main() -> None:
        built = build_engine(settings)
        await built.engine.start()
        try:
            await asyncio.wait_for(work(built), 120)
        finally:
            await built.engine.stop()
        assert built.engine.stats().kv_blocks_used == 0

    asyncio.run(main())


async def ask(built: BuiltEngine, prompt: str, params: SamplingParams) -> Delta:
    ids = built.model.tokenizer.encode(prompt)
    return merge([delta async for delta in built.engine.generate(ids, params)])


def test_sizes_come_from_the_plan_and_progress_is_told(tiny: Path) -> None:
    told: list[str] = []
    plans: list[int] = []
    built = build_engine(config(tiny, max_context=200), told.append, lambda fit: plans.append(fit.num_blocks))
    assert built.runner.num_blocks == built.fit.num_blocks == 64 == plans[0]
    assert built.engine.max_context == 200
    assert told == list(built.spans.ns)
    assert all(ns >= 0 for ns in built.spans.ns.values())
    assert "tiny" in built.fit.text
    built.runner.close()


def test_a_small_kv_cache_bounds_the_context(tiny: Path) -> None:
    built = build_engine(config(tiny, num_blocks=5))
    assert built.engine.max_context == 80
    built.runner.close()


def test_swap_gets_as_many_host_blocks(tiny: Path) -> None:
    built = build_engine(config(tiny, preempt="swap"))
    assert built.runner.num_host_blocks == 64
    built.runner.close()


def test_what_cannot_fit_is_refused_with_numbers_before_loading(tiny: Path) -> None:
    with pytest.raises(DoesNotFit, match=r"more than the limit of 100\.00 MiB"):
        build_engine(config(tiny, memory_bytes=100 * MIB))


def test_configurations_that_contradict_themselves(tiny_model: OpenModel, tiny: Path) -> None:
    with pytest.raises(ConfigError, match="native backend runs on the CPU"):
        choose_runner(config(tiny, mode="native", device="cuda"), tiny_model)
    with pytest.raises(ConfigError, match="device is 'tpu'"):
        choose_runner(config(tiny, device="tpu"), tiny_model)
    with pytest.raises(ConfigError, match="splitfuse"):
        build_engine(config(tiny, policy="splitfus"))
    with pytest.raises(ModelNotFound):
        build_engine(config(tiny / "nothing.gguf"))


def test_auto_takes_the_native_backend_where_it_can_run(tiny_model: OpenModel, tiny: Path) -> None:
    kind, why = choose_runner(config(tiny, mode="auto"), tiny_model)
    reason = why_not_native(tiny_model)
    if reason is None:
        assert (kind, why) == ("native", "native CPU backend")
    else:
        assert kind == "torch-cpu"
        assert reason in why


def test_policies_that_do_not_cut_prompts_need_rows_for_whole_ones(tiny: Path) -> None:
    assert max_rows(config(tiny), 512) == 256
    assert max_rows(config(tiny, policy="prefill-first"), 512) == 512
    assert max_rows(config(tiny, policy="first-come", max_sequences=1000), 512) == 1000


@pytest.mark.parametrize("policy", ["splitfuse", "prefill-first", "first-come"])
def test_every_policy_serves_long_prompts_in_every_mode(tiny: Path, policy: str) -> None:
    outputs = []

    async def work(built: BuiltEngine) -> None:
        params = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
        outputs.append(
            [d.token_ids for d in await asyncio.gather(*(ask(built, "long " * n, params) for n in (80, 3, 40)))]
        )

    use(config(tiny, policy=policy, token_budget=32), work)
    use(config(tiny, policy=policy, token_budget=32, mode="auto"), work)
    assert all(len(tokens) == 10 for output in outputs for tokens in output)


def test_echo_needs_the_prompt_and_n_shares_it(tiny: Path) -> None:
    async def work(built: BuiltEngine) -> None:
        params = SamplingParams(temperature=0, max_tokens=4, prompt_logprobs=True, logprobs=1, ignore_eos=True)
        scored = await ask(built, "the same text", params)
        assert scored.prompt_logprobs is not None
        assert len(scored.prompt_logprobs) == scored.prompt_tokens
        assert scored.cached_tokens == 0
        several = [SamplingParams(temperature=1, seed=i, max_tokens=12, ignore_eos=True) for i in range(4)]
        long = "one prompt that four answers share " * 3
        answers = await asyncio.gather(*(ask(built, long, params) for params in several))
        assert len({answer.token_ids for answer in answers}) == 4
        assert sum(answer.cached_tokens > 0 for answer in answers) >= 3

    use(config(tiny), work)


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["red", "green"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


def test_constrained_output_is_what_the_grammar_says() -> None:
    import jsonschema_rs

    validator = jsonschema_rs.validator_for(SCHEMA)

    async def work(built: BuiltEngine) -> None:
        def params(kind: str, definition: str = "", **changes: object) -> SamplingParams:
            settings = {"temperature": 1.0, "max_tokens": 150, "seed": 3, **changes}
            return SamplingParams(grammar=Grammar(kind=kind, definition=definition), **settings)  # type: ignore[arg-type]

        def chat(text: str) -> str:
            assert built.model.chat_template is not None
            return built.model.chat_template.render([{"role": "user", "content": text}])

        schemas = [params("json_schema", json.dumps(SCHEMA), seed=i) for i in range(6)]
        answers = await asyncio.gather(*(ask(built, chat("Describe a person as JSON."), p) for p in schemas))
        for answer in answers:
            assert answer.finish_reason == "stop"
            validator.validate(json.loads(answer.text))
        assert len({answer.text for answer in answers}) > 1
        regex = r"(Mon|Tues|Sun)day, [0-9]{1,2} (May|June)"
        dates = await asyncio.gather(*(ask(built, "The date is ", params("regex", regex, seed=i)) for i in range(3)))
        assert all(re.fullmatch(regex, date.text) for date in dates)
        lark = 'start: "(" start ")" | "x"'
        nested = await ask(
            built,
            "Brackets: ",
            params("lark", lark, max_tokens=60, logit_bias={built.model.tokenizer.encode("x")[0]: 5}),
        )
        assert re.fullmatch(r"\(*x\)*", nested.text)
        assert nested.text.count("(") == nested.text.count(")")
        free = await ask(built, chat("Give me a JSON object with three colours."), params("json_object", temperature=0))
        if free.finish_reason == "stop":
            assert isinstance(json.loads(free.text), dict)
        with pytest.raises(RequestError) as caught:
            await ask(built, "x", params("regex", "(["))
        assert caught.value.param == "response_format"

    use(EngineConfig(model="smollm2", num_blocks=128, max_context=1024, threads=1), work)
