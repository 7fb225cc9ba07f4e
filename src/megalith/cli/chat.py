"""`megalith chat`: a conversation in the terminal with a local model or an endpoint.

Ctrl-C stops the answer and keeps what was said; Ctrl-D leaves. Piped, the whole of stdin is one message.
"""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter

from megalith.base.errors import ConfigError, MegalithError, PromptTooLong
from megalith.cli.complete import Sampling, Where
from megalith.cli.output import JsonFlag, print_error, print_json, result_console, say

if TYPE_CHECKING:
    from megalith.cli.talk import Answer, Message, Partner
    from megalith.engine.params import SamplingParams

_MAX_PIPED_BYTES = 64 << 20
_MAX_ANSWER_TOKENS = 1024
_INTERRUPTED = 130
_PROMPT = "> "
_WHERE, _SAMPLING = Where(), Sampling()

COMMANDS = {
    "/clear": "forget the conversation (the system message stays)",
    "/system TEXT": "set the system message; without text, show it",
    "/save FILE": "write the conversation as JSON",
    "/help": "show this",
    "/exit": "leave (also Ctrl-D)",
}

app = App(
    name="chat",
    help_format="plaintext",
    help_epilogue="""\
Examples:
  megalith chat smollm2
  megalith chat smollm2 --system "You answer in one sentence." --temperature 0
  megalith chat --url http://127.0.0.1:8000/v1
  echo "Name three rivers." | megalith chat smollm2
  megalith chat smollm2 --message "Name three rivers." --json""",
)


@dataclass
class Conversation:
    """What was said. `messages()` is what the model sees: the system message, where there is one, then the turns."""

    system: str = ""
    turns: list[Message] = field(default_factory=list)

    def messages(self) -> list[Message]:
        """System message and turns, in OpenAI's shape."""
        head = [{"role": "system", "content": self.system}] if self.system else []
        return head + self.turns

    def add(self, role: str, content: str) -> None:
        """Append a turn."""
        self.turns.append({"role": role, "content": content})


@app.default
def chat(
    model: str | None = None,
    *,
    system: str = "",
    message: Annotated[str | None, Parameter(name=["--message", "-m"])] = None,
    where: Where = _WHERE,
    sampling: Sampling = _SAMPLING,
    json: JsonFlag = False,
) -> int:
    """Talk to a local model, or to an endpoint.

    In the conversation: /clear, /system TEXT, /save FILE, /help, /exit. Ctrl-C
    stops an answer, not the program. A piped stdin is one message; its answer
    is printed and the program ends.

    Parameters
    ----------
    model
        Name or path of a local model, or a name that the endpoint knows. [default: smollm2]
    system
        System message.
    message
        Answer this one message and leave.
    """
    from megalith.cli.talk import open_partner

    params = sampling.params(temperature=0.7, max_tokens=_MAX_ANSWER_TOKENS)
    if message is None and not sys.stdin.isatty():
        message = sys.stdin.read(_MAX_PIPED_BYTES).strip()
    if message is not None and not message.strip():
        raise ConfigError("The message is empty, so there is nothing to answer.", "Pipe one in, or use --message.")
    if json and message is None:
        raise ConfigError("--json needs one message to answer.", "Give it with --message, or pipe it in.")
    partner = open_partner(model, where.url, where.api_key, where.engine())
    conversation = Conversation(system)
    partner.load()
    with asyncio.Runner() as runner:
        try:
            runner.run(partner.start())
            if message is not None:
                return _one_answer(runner, partner, conversation, message, params, json=json)
            return _converse(runner, partner, conversation, params)
        finally:
            with contextlib.suppress(KeyboardInterrupt):
                runner.run(partner.close())


def _one_answer(
    runner: asyncio.Runner,
    partner: Partner,
    conversation: Conversation,
    message: str,
    params: SamplingParams,
    *,
    json: bool,
) -> int:
    from megalith.cli.talk import rates

    conversation.add("user", message)
    answer = runner.run(partner.chat(conversation.messages(), params, (lambda _: None) if json else _show))
    if json:
        said = {"model": partner.name, "messages": conversation.messages()}
        print_json({**said, "answer": answer, **rates(answer, partner)})
    else:
        print(flush=True)
        say(answer.summary(partner.predicted))
    return 0


def _converse(runner: asyncio.Runner, partner: Partner, conversation: Conversation, params: SamplingParams) -> int:
    """Prompt, answer, repeat. The event loop runs only while an answer does; the prompt is the terminal's own."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - its import gives input() line editing and history

    say(f"{partner.name}: /help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves.")
    interrupts = 0
    while True:
        try:
            line = input(_PROMPT).strip()
            if line.startswith("/"):
                if not _command(line, conversation):
                    return 0
            elif line:
                _turn(runner, partner, conversation, line, params)
            interrupts = 0 if line else interrupts
        except EOFError:
            print()
            return 0
        except KeyboardInterrupt:
            interrupts += 1
            print()
            if interrupts > 1:
                return _INTERRUPTED
            say("Ctrl-C again, Ctrl-D or /exit leaves.")


def _turn(
    runner: asyncio.Runner, partner: Partner, conversation: Conversation, line: str, params: SamplingParams
) -> None:
    """One message and its answer. A stopped answer stays in the conversation as far as it came."""
    conversation.add("user", line)
    pieces: list[str] = []

    def keep(piece: str) -> None:
        pieces.append(piece)
        _show(piece)

    answer: Answer | None = None
    try:
        answer = runner.run(partner.chat(conversation.messages(), params, keep))
    except KeyboardInterrupt:
        pass
    except PromptTooLong as error:
        conversation.turns.pop()
        print_error(PromptTooLong(error.what, "Start over with /clear, or say less."), json=False)
        return
    except MegalithError as error:
        conversation.turns.pop()
        print_error(error, json=False)
        return
    print(flush=True)
    conversation.add("assistant", "".join(pieces))
    if answer is None:
        say("stopped")
    else:
        cut = "; cut at --max-tokens" if answer.finish_reason == "length" else ""
        say(answer.summary(partner.predicted) + cut)


def _command(line: str, conversation: Conversation) -> bool:
    """Run a slash command; False when it is time to leave."""
    name, _, rest = line.partition(" ")
    rest = rest.strip()
    match name:
        case "/exit" | "/quit":
            return False
        case "/clear":
            conversation.turns.clear()
            say("cleared")
        case "/system":
            conversation.system = rest or conversation.system
            say(f"system: {conversation.system or '(none)'}")
        case "/save":
            _save(rest, conversation)
        case "/help":
            console = result_console()
            for usage, meaning in COMMANDS.items():
                console.print(f"  {usage:<14} {meaning}", markup=False)
        case _:
            near = difflib.get_close_matches(name, [usage.split()[0] for usage in COMMANDS], n=1)
            hint = f"Did you mean {near[0]}?" if near else "/help lists them."
            print_error(ConfigError(f"There is no command {name}.", hint), json=False)
    return True


def _save(name: str, conversation: Conversation) -> None:
    import msgspec

    if not name:
        print_error(ConfigError("/save needs a file name.", "For example /save talk.json."), json=False)
        return
    try:
        text = msgspec.json.format(msgspec.json.encode({"messages": conversation.messages()}), indent=2)
        Path(name).expanduser().write_bytes(text + b"\n")
        say(f"saved {len(conversation.turns)} turns in {name}")
    except OSError as error:
        reason = error.strerror or str(error)
        print_error(ConfigError(f"{name} cannot be written: {reason}.", "Name a file elsewhere."), json=False)


def _show(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()
