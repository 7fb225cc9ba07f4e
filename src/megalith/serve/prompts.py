"""From prompts and conversations to token ids. Long texts are tokenized on a thread, so that streams keep flowing.

Knows the tokenizer and the chat template; knows nothing of sampling or HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from megalith.base.errors import MegalithError, RequestError
from megalith.serve.errors import ApiError
from megalith.serve.schema import ContentPart, Message

if TYPE_CHECKING:
    from megalith.model.open import OpenModel

R = TypeVar("R")
# Up to here tokenizing takes about a millisecond and a thread hand-over would cost as much.
INLINE_CHARS = 4096


class PromptReader:
    """Turns what clients send into token ids of one model."""

    def __init__(self, model: OpenModel) -> None:
        self._model = model
        self._pool = ThreadPoolExecutor(max_workers=2, thread_name_prefix="tokenize")

    def warm(self) -> None:
        """Compile the template and wake the tokenizer on a thread, so that the first request does not pay for it."""
        self._pool.submit(self._warm)

    def _warm(self) -> None:
        template = self._model.chat_template
        # A template that refuses this conversation, or cannot be compiled, says so to the request that needs it.
        with contextlib.suppress(MegalithError):
            text = "" if template is None else template.render([{"role": "user", "content": "a"}])
            self._model.tokenizer.encode(text, add_bos=False)

    def close(self) -> None:
        """Let the threads go."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def chat(
        self,
        messages: Sequence[Message],
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        template_kwargs: dict[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of a conversation in the model's own template. Raises RequestError or ApiError (400)."""
        template = self._model.chat_template
        if template is None:
            raise RequestError(
                f"The model {self._model.spec.name} has no chat template.", "Use /v1/completions.", param="messages"
            )
        turns = [_as_template_dict(index, message) for index, message in enumerate(messages)]
        reserved = {"messages", "tools", "add_generation_prompt"} & set(template_kwargs or ())
        if reserved:
            raise RequestError(f"chat_template_kwargs must not hold {sorted(reserved)}.", param="chat_template_kwargs")

        def work() -> list[int]:
            text = template.render(
                turns, add_generation_prompt=add_generation_prompt, tools=tools, **(template_kwargs or {})
            )
            # The template writes the begin-of-text token itself where the model wants one.
            return self._model.tokenizer.encode(text, add_bos=False)

        size = sum(len(turn["content"] or "") for turn in turns)
        return await self._run(work, size + (INLINE_CHARS if tools else 0))

    async def text(self, text: str, add_bos: bool | None = None) -> list[int]:
        """Token ids of a plain text."""
        return await self._run(lambda: self._model.tokenizer.encode(text, add_bos=add_bos), len(text))

    async def prompts(self, prompt: str | list[str | int | list[int]], add_bos: bool | None) -> list[list[int]]:
        """Token ids of the `prompt` field of a completion: a text, ids, or a list of either. Raises ApiError."""
        if isinstance(prompt, str):
            return [await self.text(prompt, add_bos)]
        if not prompt:
            raise ApiError(400, "The list of prompts is empty.", param="prompt", code="invalid_value")
        if all(isinstance(part, int) for part in prompt):
            return [self.check_ids([part for part in prompt if isinstance(part, int)])]
        found = []
        for part in prompt:
            if isinstance(part, int):
                raise ApiError(
                    400, "A list of prompts mixes token ids with texts or lists.", param="prompt", code="invalid_value"
                )
            found.append(await self.text(part, add_bos) if isinstance(part, str) else self.check_ids(part))
        return found

    async def decode(self, ids: list[int]) -> str:
        """The text of `ids`, special tokens included."""
        return await self._run(lambda: self._model.tokenizer.decode(ids, skip_special=False), len(ids))

    async def echo_texts(self, prompt: str | list[str | int | list[int]], ids: list[list[int]]) -> list[str]:
        """The text of each prompt, as it was sent or, for token ids, as it decodes."""
        if isinstance(prompt, str):
            return [prompt]
        if all(isinstance(part, int) for part in prompt):
            return [await self.decode(ids[0])]
        return [
            part if isinstance(part, str) else await self.decode(mine) for part, mine in zip(prompt, ids, strict=True)
        ]

    def check_ids(self, ids: list[int], param: str = "prompt") -> list[int]:
        """`ids` when the model has a token for each. Raises ApiError."""
        vocab = self._model.spec.vocab
        if ids and not 0 <= min(ids) <= max(ids) < vocab:
            wrong = next(i for i in ids if not 0 <= i < vocab)
            raise ApiError(
                400, f"Token id {wrong} is outside the vocabulary of {vocab}.", param=param, code="invalid_value"
            )
        return ids

    async def _run(self, work: Callable[[], R], size: int) -> R:
        try:
            if size <= INLINE_CHARS:
                return work()
            return await asyncio.get_running_loop().run_in_executor(self._pool, work)
        except UnicodeEncodeError:
            raise ApiError(400, "The text holds a lone surrogate, no character.", code="invalid_value") from None


def _as_template_dict(index: int, message: Message) -> dict[str, Any]:
    """A message as chat templates know it: text content, `system` for `developer`, tool arguments as objects."""
    content = message.content
    if isinstance(content, list):
        content = "\n".join(_part_text(index, part) for part in content)
    turn: dict[str, Any] = {
        "role": "system" if message.role == "developer" else message.role,
        "content": "" if content is None else content,
    }
    for name in ("name", "tool_call_id", "reasoning_content"):
        value = getattr(message, name)
        if value is not None:
            turn[name] = value
    if message.tool_calls:
        turn["tool_calls"] = [_with_parsed_arguments(call) for call in message.tool_calls]
    return turn


def _part_text(index: int, part: ContentPart) -> str:
    if part.type != "text" or part.text is None:
        raise ApiError(
            400,
            f"Message {index} has a part of type `{part.type[:64]}`; this model reads only text parts.",
            param=f"messages[{index}].content",
            code="unsupported_content",
        )
    return part.text


def _with_parsed_arguments(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = msgspec.json.decode(function["arguments"].encode())
    except (msgspec.DecodeError, RecursionError, UnicodeError):
        return call
    return {**call, "function": {**function, "arguments": arguments}}
