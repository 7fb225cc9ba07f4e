"""The `megalith` command: finds the verb, loads that verb's file and no other, and turns failures into exit codes.

Exit codes: 0 done; 1 an expected failure (or something `doctor` finds bad); 2 a command line that cannot be used;
130 interrupted. An expected failure prints one paragraph; a traceback means a bug of ours.
"""

from __future__ import annotations

import difflib
import importlib.util
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from megalith import __version__
from megalith.base.errors import ConfigError, MegalithError
from megalith.cli import command_line

if TYPE_CHECKING:
    from cyclopts import App, CycloptsError

VERBS: dict[str, str] = {
    "serve": "Serve a model on an OpenAI-compatible endpoint.",
    "chat": "Talk to a local model, or to an endpoint.",
    "complete": "Complete one prompt and print the text.",
    "bench": "Measure: predicted against measured, or load on an endpoint (`bench serve`).",
    "quantize": "Write a model with its weights in another format.",
    "perplexity": "Measure a model's perplexity, alone or against a reference.",
    "plan": "Say what fits, how fast and at what cost, before loading anything.",
    "simulate": "Run a simulated cluster on a trace, under any policy.",
    "reproduce": "Reproduce a published system's claim, with its mechanism on and off.",
    "sweep": "Simulate fleets, policies, rates and seeds on all cores.",
    "forecast": "Learn the distribution of a load, and what a fleet may be sized by.",
    "probe": "Measure this machine and store its profile.",
    "models": "List the models that are here and those that are known.",
    "doctor": "Say what this machine has and what is wrong.",
}
"""Each verb is `app` in the file of its name in this package; the text is its line in `megalith --help`."""

_INTERRUPTED = 130
_BROKEN_PIPE = 141

_EXAMPLES = """\
Examples:
  megalith serve smollm2          an OpenAI endpoint on 127.0.0.1:8000
  megalith chat smollm2           talk to it in the terminal
  megalith plan serve llama-2-7b  will it fit, how fast, at what cost
  megalith doctor                 what this machine has and what is wrong
  megalith VERB --help            flags and examples of one verb"""


def main() -> None:
    """Run the command line and leave with its exit code."""
    sys.exit(run(sys.argv[1:]))


def run(tokens: Sequence[str]) -> int:
    """Run one command line and give its exit code; never a traceback for an expected failure."""
    json = "--json" in _own_flags(tokens)
    command_line.tokens.set(tuple(tokens))
    try:
        code = _dispatch(list(tokens))
        sys.stdout.flush()
        return code
    except MegalithError as error:
        from megalith.cli.output import print_error

        print_error(error, json=json)
        return error.exit_code
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:
        # The reader left (`| head`). Point stdout at nothing, so that the interpreter's own flush stays quiet too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE


def _dispatch(tokens: list[str]) -> int:
    if tokens in (["--version"], ["-V"]):
        print(f"megalith {__version__}")
        return 0
    if tokens and tokens[0] not in ("-h", "--help"):
        _check_verb(tokens[0])
    from cyclopts import CycloptsError

    try:
        app = build_app(tokens[0] if tokens else None)
        if tokens[:1] == ["bench"]:
            attach_load_generator(app, chosen=tokens[1:2] == ["serve"])
        result = app(tokens, exit_on_error=False, print_error=False, result_action="return_value")
    except CycloptsError as error:
        raise _usage_error(error, tokens) from None
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else 0
    return result if isinstance(result, int) else 0


def build_app(chosen: str | None = None) -> App:
    """The command with every verb registered by import path: listing them imports none of them.

    The `chosen` verb's own help is shown in full; the others are one line each.
    """
    from cyclopts import App, Group

    app = App(
        name="megalith",
        help="Plan and serve models that are bigger than the machine.",
        help_format="plaintext",
        help_epilogue=None if chosen in VERBS else _EXAMPLES,
        version=f"megalith {__version__}",
        usage="Usage: megalith VERB [OPTIONS]",
        suppress_keyboard_interrupt=False,
    )
    app["--help"].group = app["--version"].group = Group("Options", sort_key=1)
    verbs = Group("Verbs", sort_key=0)
    for number, (verb, summary) in enumerate(VERBS.items()):
        line = None if verb == chosen else summary
        if _installed(verb):
            app.command(f"megalith.cli.{verb}:app", name=verb, help=line, sort_key=number, group=verbs)
    return app


def attach_load_generator(app: App, *, chosen: bool = False) -> None:
    """Put `serve`, the load generator, under `bench`, unless that verb's file has already done so."""
    from cyclopts import App

    if "bench" in app:
        bench: Any = app["bench"]
    else:
        bench = App(name="bench", help=VERBS["bench"])
        app.command(bench)
    if "serve" not in bench:
        line = None if chosen else "Put load on an OpenAI endpoint and measure it."
        bench.command("megalith.cli.bench_serve:app", name="serve", help=line)


def _installed(verb: str) -> bool:
    return importlib.util.find_spec(f"megalith.cli.{verb}") is not None


def _check_verb(name: str) -> None:
    """Raise ConfigError with the nearest verb, unless `name` is one."""
    if name in VERBS:
        return
    near = difflib.get_close_matches(name, VERBS, n=1, cutoff=0.5)
    known = f"Verbs: {', '.join(VERBS)}."
    if name.startswith("-"):
        raise ConfigError(f"`megalith` has no flag `{name}`; flags come after the verb.", known)
    raise ConfigError(f"There is no verb `{name}`.", f"Did you mean `megalith {near[0]}`? {known}" if near else known)


def _usage_error(error: CycloptsError, tokens: Sequence[str]) -> ConfigError:
    """A command line that Cyclopts refuses, in our words, with the nearest flag."""
    from cyclopts import UnknownCommandError, UnknownOptionError, UnusedCliTokensError

    error.verbose = False
    verb = " ".join(["megalith", *(error.command_chain or [t for t in tokens[:1] if t in VERBS])])
    help_line = f"`{verb} --help` lists the flags."
    if isinstance(error, UnusedCliTokensError | UnknownCommandError) and error.unused_tokens:
        word = error.unused_tokens[0]
        known = [name for name in error.app or () if not name.startswith("-")]
        near = difflib.get_close_matches(word, known, n=1, cutoff=0.4)
        hint = f"Did you mean `{verb} {near[0]}`? {help_line}" if near else help_line
        return ConfigError(f"`{verb}` has no use for `{word}`.", hint)
    if not isinstance(error, UnknownOptionError):
        return ConfigError(" ".join(str(error).split()), help_line)
    flag = (error.token.keyword or error.token.value).partition("=")[0]
    flags = sorted({name for argument in error.argument_collection for name in argument.names if name[:2] == "--"})
    near = difflib.get_close_matches(flag, flags, n=1, cutoff=0.4)
    hint = f"Did you mean `{near[0]}`? {help_line}" if near else help_line
    return ConfigError(f"`{verb}` has no flag `{flag}`.", hint)


def _own_flags(tokens: Sequence[str]) -> Sequence[str]:
    """The tokens before a bare `--`: what follows it is text, not flags."""
    return tokens[: tokens.index("--")] if "--" in tokens else tokens


if __name__ == "__main__":
    main()
