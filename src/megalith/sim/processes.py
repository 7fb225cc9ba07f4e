"""Work on all cores: tasks go to worker processes one by one, results come back as they are ready.

Unlike the pools of the standard library it says which task a process died of and goes on with a new one; workers die
with whoever started them, in the middle of a task too. Knows tasks and a function; must not know what they mean.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Generic, TypeAlias, TypeVar, cast

from megalith.base.errors import MegalithError

TaskT = TypeVar("TaskT")
ResultT = TypeVar("ResultT")


class Failed(str):
    """Why a task has no result."""

    __slots__ = ()


Outcome: TypeAlias = ResultT | Failed


def run_tasks(
    tasks: Sequence[TaskT], run: Callable[[TaskT], ResultT], workers: int | None = None
) -> Generator[tuple[int, Outcome[ResultT]], None, None]:
    """(place of the task, what came of it) as they come; see Crew."""
    with Crew(run, min(count_workers(workers), len(tasks))) as crew:
        yield from crew.results(tasks)


def count_workers(asked: int | None) -> int:
    """By default one a core that this process may use."""
    return asked or len(os.sched_getaffinity(0))


class Crew(Generic[TaskT, ResultT]):
    """Worker processes that stay from one list of tasks to the next. 1 worker runs tasks here, in this process.

    `run` is a function of a module, tasks and results can be pickled. A MegalithError, a fault of ours and the end of
    a process become Failed. KeyboardInterrupt passes through; leaving the `with` block gives up what runs.
    """

    def __init__(self, run: Callable[[TaskT], ResultT], workers: int) -> None:
        self._run, self._most = run, workers
        self._idle: list[_Worker[TaskT, ResultT]] = []
        self._busy: dict[Connection, _Worker[TaskT, ResultT]] = {}

    def results(self, tasks: Sequence[TaskT]) -> Iterator[tuple[int, Outcome[ResultT]]]:
        """(place of the task, what came of it) as they come."""
        if self._most <= 1:
            for place, task in enumerate(tasks):
                yield place, _attempt(self._run, task)
            return
        waiting = iter(enumerate(tasks))
        for _ in range(min(self._most, len(tasks))):
            self._give(next(waiting))
        while self._busy:
            for pipe in wait(list(self._busy)):
                worker = self._busy.pop(cast(Connection, pipe))
                place, result = worker.place, worker.take()
                if result is None:
                    result = Failed(f"Its process ended by itself ({worker.end()}): out of memory? Try fewer workers.")
                else:
                    self._idle.append(worker)
                following = next(waiting, None)
                if following is not None:
                    self._give(following)
                yield place, result

    def _give(self, task: tuple[int, TaskT]) -> None:
        worker = self._idle.pop() if self._idle else _Worker(self._run)
        self._busy[worker.pipe] = worker
        worker.give(*task)

    def __enter__(self) -> Crew[TaskT, ResultT]:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in (*self._busy.values(), *self._idle):
            worker.end()


def _attempt(run: Callable[[TaskT], ResultT], task: TaskT) -> Outcome[ResultT]:
    """What came of a task; a fault of ours says where it is."""
    try:
        return run(task)
    except MegalithError as error:
        return Failed(error)
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(frame.filename).name}:{frame.lineno}"
        return Failed(f"{type(error).__name__} at {where}: {error} (a fault of Megalith)")


class _Worker(Generic[TaskT, ResultT]):
    """One process that runs tasks one after another."""

    def __init__(self, run: Callable[[TaskT], ResultT]) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, run), daemon=True)
        self.process.start()
        theirs.close()
        self.place = -1

    def give(self, place: int, task: TaskT) -> None:
        """Start a task; its result, or the end of the process, will make `pipe` readable."""
        self.place = place
        with suppress(OSError):  # the process is gone; reading says so
            self.pipe.send(task)

    def take(self) -> Outcome[ResultT] | None:
        """The result; None when the process has ended without one."""
        try:
            return cast("Outcome[ResultT]", self.pipe.recv())
        except (EOFError, OSError):
            return None

    def end(self) -> str:
        """Stop it, whatever it does; how it ended."""
        self.pipe.close()
        self.process.join(0.05)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        code = self.process.exitcode or 0
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _serve(pipe: Connection, run: Callable[[TaskT], ResultT]) -> None:
    """A worker process: tasks in, results out, until nobody asks any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for whoever gave the tasks
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    with suppress(EOFError, OSError):  # the pipe is closed: nobody waits for results any more
        while True:
            pipe.send(_attempt(run, pipe.recv()))


def _end_with(sentinel: int) -> None:
    """Leave when the process that started this one is gone, even in the middle of a task."""
    wait([sentinel])
    os._exit(1)
