"""Worker processes that may die or hang: each task gets an answer, if only that there was none.

A worker has one task at a time. One that dies or is over its time is replaced, and its task reported.
"""

from __future__ import annotations

import gc
import multiprocessing
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any, Generic, TypeVar

Task = TypeVar("Task")
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Lost:
    """There is no answer to a task: why."""

    reason: str


class Pool(Generic[Task, Answer]):
    """Workers that run one function, which like tasks and answers has to be picklable.

    Args:
        function: gives the answer to a task.
        jobs: how many workers.
        limit: seconds that a task may take, the start of its worker included.
        heavy: whether a task is so large that no two of them may run at once.
    """

    def __init__(
        self, function: Callable[[Task], Answer], jobs: int, limit: float, heavy: Callable[[Task], bool] | None = None
    ) -> None:
        self._function = function
        self._limit = limit
        self._heavy = heavy or (lambda task: False)
        self._jobs = jobs
        self._workers: list[_Worker] = []

    def __enter__(self) -> Pool[Task, Answer]:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for worker in self._workers:
            worker.stop()

    def run(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, Answer | Lost]]:
        """Each task with its answer, as they come."""
        waiting = deque(tasks)
        while waiting or any(worker.busy for worker in self._workers):
            self._hand_out(waiting)
            busy = [worker for worker in self._workers if worker.busy]
            wait([worker.connection for worker in busy], timeout=min(worker.left(self._limit) for worker in busy))
            for worker in busy:
                task = worker.task
                answer = worker.answer(self._limit)
                if answer is None:
                    continue
                if isinstance(answer, Lost):
                    self._workers.remove(worker)
                yield task, answer

    def _hand_out(self, waiting: deque[Task]) -> None:
        while len(self._workers) < min(self._jobs, len(waiting)):
            self._workers.append(_Worker(self._function))
        for worker in self._workers:
            if worker.busy:
                continue
            crowded = any(other.busy and self._heavy(other.task) for other in self._workers)
            task = next((task for task in waiting if not (crowded and self._heavy(task))), None)
            if task is not None:
                waiting.remove(task)
                worker.give(task)


class _Worker:
    def __init__(self, function: Callable[..., Any]) -> None:
        context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs, function), daemon=True)
        self._process.start()
        theirs.close()  # so that a worker's death ends the pipe
        self.busy = False
        self.task: Any = None
        self._begin = 0.0

    def give(self, task: Any) -> None:
        self.task, self.busy, self._begin = task, True, time.monotonic()
        self.connection.send(task)

    def left(self, limit: float) -> float:
        return max(0.0, self._begin + limit - time.monotonic())

    def answer(self, limit: float) -> Any:
        """The answer, `Lost`, or None where it is not there yet."""
        answer: Any = None
        try:
            if self.connection.poll():
                answer = self.connection.recv()
            elif not self.left(limit):
                answer = Lost(f"no answer within {limit:g} seconds")
        except (EOFError, ConnectionError):
            self._process.join()
            answer = Lost(f"the worker process died ({_cause(self._process.exitcode)})")
        if answer is not None:
            self.busy = False
        if isinstance(answer, Lost):
            self.stop()
        return answer

    def stop(self) -> None:
        self._process.kill()
        self._process.join()
        self.connection.close()


def _cause(code: int | None) -> str:
    if code is not None and code < 0:
        return f"signal {-code}, {signal.Signals(-code).name}"
    return f"exit code {code}"


def _work(connection: Connection, function: Callable[..., Any]) -> None:
    """The worker's life: until the pipe ends. Ctrl-C is for the parent, which ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        try:
            task = connection.recv()
        except (EOFError, ConnectionError):
            return
        connection.send(function(task))
        gc.freeze()  # what there is now has been imported or is kept: not to be looked through for garbage again
