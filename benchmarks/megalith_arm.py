"""Megalith's own arm: the real asynchronous engine, all requests submitted at once, prefix cache off.

`settings.mode` is EngineConfig's mode. Beside the common figures it gives what Python costs a step.
"""

from __future__ import annotations

import asyncio
from typing import Any

import driver


class Megalith:
    """An engine built the way the server builds it, driven from one event loop."""

    def __init__(self, settings: dict[str, Any]) -> None:
        try:
            import megalith
            from megalith.engine.api import EngineConfig
            from megalith.engine.launch import build_engine
            from megalith.engine.params import SamplingParams
        except ImportError as error:
            raise driver.Skip(f"the engine cannot be imported: {error}") from None
        config = EngineConfig(
            model=settings.get("name", "smollm2"),
            mode=settings.get("mode", "auto"),
            threads=settings["threads"],
            prefix_cache=False,
            token_budget=settings.get("token_budget", 256),
        )
        self.version = f"megalith {megalith.__version__}, mode {config.mode}"
        self._engine = build_engine(config).engine
        self._params = SamplingParams
        self._loop = asyncio.new_event_loop()
        self._loop.run_until_complete(self._engine.start())
        self.generate(driver.prompts(driver.WARM_UP), driver.WARM_UP["output_tokens"], driver.ignore)

    def measure(self, case: dict[str, Any]) -> dict[str, Any]:
        """`driver.measure`, plus milliseconds a step inside the runner and in Python around it."""
        before = self._engine.stats()
        result = driver.measure(self, case)
        after = self._engine.stats()
        steps = max(1, after.steps - before.steps)
        result["steps"] = after.steps - before.steps
        result["python_ms_a_step"] = (after.python_ns - before.python_ns) / steps * 1e-6
        result["runner_ms_a_step"] = (after.step_ns - before.step_ns) / steps * 1e-6
        return result

    def generate(self, prompts: list[list[int]], output_tokens: int, tick: driver.Tick) -> int:
        """All prompts at once; ticks on every delta."""
        return self._loop.run_until_complete(self._all(prompts, output_tokens, tick))

    async def _all(self, prompts: list[list[int]], output_tokens: int, tick: driver.Tick) -> int:
        made = [0] * len(prompts)
        started = 0

        async def one(index: int, ids: list[int]) -> None:
            nonlocal started
            params = self._params(temperature=0.0, max_tokens=output_tokens, ignore_eos=True)
            async for delta in self._engine.generate(ids, params):
                if delta.error:
                    raise RuntimeError(delta.error)
                started += made[index] == 0 and bool(delta.token_ids)
                made[index] += len(delta.token_ids)
                if started == len(prompts):
                    tick(sum(made), started)

        await asyncio.gather(*(one(index, ids) for index, ids in enumerate(prompts)))
        return sum(made)


if __name__ == "__main__":
    driver.main(Megalith)
