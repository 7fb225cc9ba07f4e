"""The command line that runs, for verbs that run it once more in a process of its own."""

from __future__ import annotations

from contextvars import ContextVar

tokens: ContextVar[tuple[str, ...]] = ContextVar("tokens")
"""The words after `megalith`; set by `cli.main.run`."""
