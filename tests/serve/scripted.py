"""A small engine whose every move a test can predict, for the edges of the protocol: injected failures, exact pauses.

The main path is tested with the real engine. Tokens are bytes; the answer to a prompt is its text reversed, again and
again; KV blocks are counted so that a leak shows.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from types import SimpleNamespace

from megalith.base.errors import EngineStopped, PromptTooLong, QueueFull
from megalith.engine.api import Delta, EngineConfig, EngineStats, TokenLogprob
from megalith.engine.params import SamplingParams
from megalith.specs.model import ModelSpec

EOS = 256
SPEC = ModelSpec(
    name="bytes", family="llama", num_layers=1, hidden=8, num_heads=1, num_kv_heads=1, head_dim=8, ffn=8, vocab=257,
    max_context=512,
)  # fmt: skip


class ByteTokenizer:
    """Every byte is a token."""

    eos_ids = frozenset({EOS})
    bos_id = None
    vocab = 257

    def encode(self, text: str, add_bos: bool | None = None, parse_special: bool = True) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int], skip_special: bool = True) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < 256 else b"<eos>"

    def token_text(self, token_id: int) -> str:
        return self.token_bytes(token_id).decode("utf-8", "replace")


class PlainTemplate:
    """`role: content` lines."""

    def render(self, messages: list[dict], add_generation_prompt: bool = True, tools: object = None, **kw: str) -> str:
        lines = [f"{message['role']}: {message['content']}" for message in messages]
        if tools:
            lines.insert(0, f"tools: {len(tools)}")
        return "\n".join(lines) + ("\nassistant: " if add_generation_prompt else "")


def byte_model(chat: bool = True) -> SimpleNamespace:
    return SimpleNamespace(
        spec=SPEC,
        tokenizer=ByteTokenizer(),
        chat_template=PlainTemplate() if chat else None,
        files=SimpleNamespace(name="bytes"),
    )


class ScriptedEngine:
    """Implements AsyncEngine on the event loop, one token a `pause_s`."""

    def __init__(
        self, pause_s: float = 0.0, max_running: int = 4, max_waiting: int = 8, num_blocks: int = 4096
    ) -> None:
        self.config = EngineConfig(model="bytes", max_sequences=max_running, max_waiting=max_waiting)
        self.spec = SPEC
        self.max_context = SPEC.max_context
        self.pause_s = pause_s
        self.text_factor = 1
        """How often each token's text is repeated: big events for tests of slow readers."""
        self.fail_at: dict[bytes, int] = {}
        """Prompts that break the engine after so many tokens."""
        self.gate: asyncio.Event | None = None
        """When set, requests wait here before their first token."""
        self.seen: list[tuple[list[int], SamplingParams, int, str]] = []
        self._num_blocks = num_blocks
        self._stats = EngineStats(kv_blocks_total=num_blocks)
        self._slots = asyncio.Semaphore(max_running)
        self._stopped = False
        self._draining = False

    def _add(self, **changes: int) -> None:
        self._stats = dataclasses.replace(
            self._stats, **{name: getattr(self._stats, name) + change for name, change in changes.items()}
        )

    def set_stats(self, **values: object) -> None:
        self._stats = dataclasses.replace(self._stats, **values)

    async def start(self) -> None:
        pass

    def stats(self) -> EngineStats:
        return self._stats

    async def drain(self, deadline_ns: int) -> None:
        self._draining = True
        deadline = asyncio.get_running_loop().time() + deadline_ns / 1e9
        while (self._stats.running or self._stats.waiting) and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.01)
        self._stopped = True

    async def stop(self) -> None:
        self._stopped = self._draining = True

    async def generate(
        self, prompt_ids: list[int], params: SamplingParams, *, priority: int = 0, request_id: str = ""
    ) -> AsyncIterator[Delta]:
        if self._draining:
            raise EngineStopped("The engine is draining.")
        room = self.max_context - len(prompt_ids)
        if room < 1:
            raise PromptTooLong(f"The prompt has {len(prompt_ids)} tokens; the context is {self.max_context}.")
        if self._stats.waiting >= self.config.max_waiting:
            raise QueueFull(f"{self._stats.waiting} requests wait, the limit.", "Come back later.", retry_after_s=3)
        self.seen.append((list(prompt_ids), params, priority, request_id))
        self._add(waiting=1)
        try:
            if self.gate is not None:
                await self.gate.wait()
            await self._slots.acquire()
        finally:
            self._add(waiting=-1)
        blocks = -(-(len(prompt_ids) + min(room, params.max_tokens or room)) // 16)
        self._add(running=1, kv_blocks_used=blocks)
        try:
            async for delta in self._tokens(prompt_ids, params, min(room, params.max_tokens or room)):
                yield delta
        finally:
            self._slots.release()
            self._add(running=-1, kv_blocks_used=-blocks)

    async def _tokens(self, prompt_ids: list[int], params: SamplingParams, limit: int) -> AsyncIterator[Delta]:
        answer = prompt_ids[::-1]
        fail_at = self.fail_at.get(bytes(prompt_ids), -1)
        for count in range(1, limit + 1):
            await asyncio.sleep(self.pause_s)
            self._add(steps=1, generated_tokens=1)
            ends: dict = {"prompt_tokens": len(prompt_ids), "completion_tokens": count, "cached_tokens": 0}
            if self._stopped:
                yield Delta("", (), "abort", **ends)
                return
            if count - 1 == fail_at:
                yield Delta("", (), "error", error="The step failed: injected.", **ends)
                return
            token = answer[(count - 1) % len(answer)]
            text = chr(token) * self.text_factor
            if text in params.stop:
                yield Delta("", (token,), "stop", stop_reason=text, **ends)
                return
            top = tuple((i, -1.0 - i) for i in range(params.logprobs or 0))
            yield Delta(
                text,
                (token,),
                "length" if count == limit else None,
                logprobs=None if params.logprobs is None else (TokenLogprob(token, -0.5, top),),
                prompt_logprobs=(None, *(TokenLogprob(i, -2.0) for i in prompt_ids[1:]))
                if params.prompt_logprobs and count == 1
                else None,
                **ends,
            )
