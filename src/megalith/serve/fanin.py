"""Runs the choices of one HTTP request and merges their deltas into one stream; closing it aborts all of them.

Knows the engine's protocol; knows nothing of HTTP or of OpenAI's shapes.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence

from megalith.base.errors import MegalithError
from megalith.engine.api import AsyncEngine, Delta
from megalith.serve.metrics import RequestTimer, ServerMetrics
from megalith.serve.sampling import Choice

# Deltas that may wait for a slow reader before the pumps stand still.
_QUEUE_PER_CHOICE = 8


class FanIn:
    """Engine requests of one HTTP request."""

    def __init__(
        self, engine: AsyncEngine, metrics: ServerMetrics, choices: Sequence[Choice], priority: int, request_id: str
    ) -> None:
        self._engine = engine
        self._metrics = metrics
        self._choices = choices
        self._priority = priority
        self._request_id = request_id

    def run(self, arrival_ns: int) -> AsyncGenerator[tuple[int, Delta], None]:
        """(choice index, delta) pairs; each choice ends with a delta that has a finish reason.

        Raises what the engine raises. Must be closed: that frees the KV of what still runs.
        """
        if len(self._choices) == 1:
            return self._one(self._choices[0], arrival_ns)
        return self._many(arrival_ns)

    async def _one(self, choice: Choice, arrival_ns: int) -> AsyncGenerator[tuple[int, Delta], None]:
        suffix = f"-{choice.index}" if len(self._choices) > 1 else ""
        timer = RequestTimer(self._metrics, arrival_ns)
        deltas = self._engine.generate(
            choice.prompt_ids, choice.params, priority=self._priority, request_id=self._request_id + suffix
        )
        try:
            async for delta in deltas:
                timer.see(delta)
                yield choice.index, delta
                if delta.finish_reason is not None:
                    return
        except MegalithError:  # raised before the first delta only (AsyncEngine.generate)
            timer.refuse()
            raise
        finally:
            timer.close()
            close = getattr(deltas, "aclose", None)
            if close is not None:
                await close()

    async def _many(self, arrival_ns: int) -> AsyncGenerator[tuple[int, Delta], None]:
        queue: asyncio.Queue[tuple[int, Delta] | Exception] = asyncio.Queue(_QUEUE_PER_CHOICE * len(self._choices))
        first_seen = {choice.prompt_index: asyncio.Event() for choice in self._choices}
        leaders: set[int] = set()
        pumps = []
        for choice in self._choices:
            event = first_seen[choice.prompt_index]
            # The first choice computes the prompt; the others follow once its blocks are in the prefix cache.
            follows = choice.prompt_index in leaders and self._worth_waiting(choice)
            leaders.add(choice.prompt_index)
            pumps.append(asyncio.create_task(self._pump(choice, arrival_ns, queue, event, follows)))
        unfinished = len(self._choices)
        try:
            while unfinished:
                item = await queue.get()
                if isinstance(item, Exception):
                    raise item
                if item[1].finish_reason is not None:
                    unfinished -= 1
                yield item
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)

    def _worth_waiting(self, choice: Choice) -> bool:
        config = self._engine.config
        return config.prefix_cache and len(choice.prompt_ids) >= 2 * config.block_tokens

    async def _pump(
        self,
        choice: Choice,
        arrival_ns: int,
        queue: asyncio.Queue[tuple[int, Delta] | Exception],
        first_seen: asyncio.Event,
        follows: bool,
    ) -> None:
        try:
            if follows:
                await first_seen.wait()
            async with contextlib.aclosing(self._one(choice, arrival_ns)) as deltas:
                async for item in deltas:
                    first_seen.set()
                    await queue.put(item)
        except Exception as error:
            await queue.put(error)
        finally:
            first_seen.set()
