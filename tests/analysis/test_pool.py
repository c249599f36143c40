"""Every task gets an answer, whatever its worker does."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from dropsurgery.analysis.pool import Lost, Pool

LIMIT = 60.0


def square(task: int) -> int:
    return task * task


def unruly(task: str) -> str:
    if task == "dies":
        os._exit(3)
    if task == "is killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if task == "hangs":
        time.sleep(1000)
    return f"{task} well"


def overlapping(task: tuple[str, Path]) -> int:
    """How many of these run at once, told by a file for each."""
    name, folder = task
    (folder / name).touch()
    time.sleep(0.3)
    running = len(list(folder.iterdir()))
    (folder / name).unlink()
    return running


@pytest.mark.parametrize("jobs", [1, 3])
def test_all_tasks_are_answered(jobs: int) -> None:
    with Pool(square, jobs, LIMIT) as pool:
        assert dict(pool.run(range(20))) == {n: n * n for n in range(20)}
        assert dict(pool.run([3])) == {3: 9}
        assert len(pool._workers) <= jobs


def test_a_lost_task_is_reported_and_its_worker_replaced() -> None:
    with Pool(unruly, 1, LIMIT) as pool:
        answers = dict(pool.run(["goes", "dies", "is killed", "lives"]))
    assert answers == {
        "goes": "goes well",
        "dies": Lost("the worker process died (exit code 3)"),
        "is killed": Lost("the worker process died (signal 9, SIGKILL)"),
        "lives": "lives well",
    }


def test_a_task_over_its_time_is_ended() -> None:
    with Pool(unruly, 1, LIMIT) as pool:
        assert dict(pool.run(["goes"])) == {"goes": "goes well"}
        pool._limit = 1.0  # now that there is a worker: to start one takes what it takes
        assert dict(pool.run(["hangs"])) == {"hangs": Lost("no answer within 1 seconds")}
        pool._limit = LIMIT
        assert dict(pool.run(["lives"])) == {"lives": "lives well"}


def test_no_two_heavy_tasks_at_once(tmp_path: Path) -> None:
    tasks = [(str(number), tmp_path) for number in range(4)]
    with Pool(overlapping, 2, LIMIT, heavy=lambda task: True) as pool:
        assert set(dict(pool.run(tasks)).values()) == {1}


def test_workers_end_with_the_pool() -> None:
    with Pool(square, 2, LIMIT) as pool:
        dict(pool.run(range(4)))
        processes = [worker._process for worker in pool._workers]
    assert processes and not any(process.is_alive() for process in processes)


def test_no_tasks_start_no_workers() -> None:
    with Pool(square, 2, LIMIT) as pool:
        assert not list(pool.run([])) and not pool._workers
