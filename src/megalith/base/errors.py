"""The one tree of expected failures.

    MegalithError
    +-- ConfigError            a flag, key, recipe or profile that cannot be used
    +-- RequestError           one request asks for something impossible (HTTP 400)
    |   +-- PromptTooLong
    +-- ModelError             a model that cannot be found, read or run
    |   +-- ModelNotFound
    |   +-- ModelFormatError   a broken or unsupported file
    +-- CapacityError          the numbers do not fit
    |   +-- DoesNotFit         a plan against a memory limit
    |   +-- LimitExceeded      a process wanted more memory than its limit
    |   +-- QueueFull          admission refused for now (HTTP 429)
    |   +-- PoolFull           a pool of a tier is at its cap in bytes
    +-- EngineError            the engine could not finish something it had accepted
    |   +-- StepFailed         one request broke a step; the others go on
    |   +-- EngineStopped      the engine is draining or stopped (HTTP 503)
    +-- TierError              bytes that could not be moved, read back or believed (disk, memory, a corrupted block)
    +-- MachineError           this machine lacks something (compiler, device, disk space)

An expected failure prints one paragraph: what happened, with numbers, and the nearest thing that works. It never
prints a traceback; a traceback means a bug of ours.
"""

from __future__ import annotations


class MegalithError(Exception):
    """An expected failure.

    `what` is one or two sentences with the numbers. `hint` is the nearest thing that works, as an imperative
    sentence; it may be empty only when there is none.
    """

    exit_code = 1

    def __init__(self, what: str, hint: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.what} {self.hint}".strip()


class ConfigError(MegalithError):
    """A flag, key, recipe or profile that cannot be used."""

    exit_code = 2


class RequestError(MegalithError):
    """One request asks for something impossible. `param` names the offending field, when there is one."""

    def __init__(self, what: str, hint: str = "", param: str | None = None) -> None:
        super().__init__(what, hint)
        self.param = param


class PromptTooLong(RequestError):
    """The prompt plus what was asked for does not fit the context window or the KV cache."""


class ModelError(MegalithError):
    """A model that cannot be found, read or run."""


class ModelNotFound(ModelError):
    """No file, directory or catalogue entry of that name."""


class ModelFormatError(ModelError):
    """A model file that is broken, truncated or of a kind we do not read."""


class CapacityError(MegalithError):
    """The numbers do not fit."""


class DoesNotFit(CapacityError):
    """A plan needs more memory than its limit."""


class LimitExceeded(CapacityError):
    """A process wanted more memory than the limit that it ran in, and was ended."""


class QueueFull(CapacityError):
    """Admission is refused for now. `retry_after_s` is a whole number of seconds, at least 1."""

    def __init__(self, what: str, hint: str = "", retry_after_s: int = 1) -> None:
        super().__init__(what, hint)
        self.retry_after_s = retry_after_s


class PoolFull(CapacityError):
    """A pool of a tier has too few bytes left under its cap."""


class EngineError(MegalithError):
    """The engine could not finish something that it had accepted."""


class StepFailed(EngineError):
    """One request broke a step. It is failed; the others go on."""


class EngineStopped(EngineError):
    """The engine is draining or stopped."""


class TierError(MegalithError):
    """Bytes could not be moved, read back or believed: a full or failing disk, a short file, a corrupted block."""


class MachineError(MegalithError):
    """This machine lacks something: a compiler, a device, disk space."""
