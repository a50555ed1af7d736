"""Run one function over many files in worker processes, surviving a worker that a file crashes."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from tqdm import tqdm

Task = TypeVar("Task")
Result = TypeVar("Result")


def run_parallel(
    function: Callable[[Task], Result],
    tasks: Sequence[Task],
    workers: int,
    label: str,
    on_crash: Callable[[Task], Result],
) -> Iterator[tuple[Task, Result]]:
    """Yield (task, function(task)) as they finish, with a progress bar on stderr; at most `workers` processes.

    `function` must be importable and turn its own exceptions into results. When a worker dies (a decoder that
    crashes, memory that runs out), what was not finished runs again, each task in a process of its own, and a task
    that dies once more yields `on_crash(task)`. With one worker everything runs in this process.
    Workers end when this process does, even if it is killed.
    """
    with tqdm(total=len(tasks), desc=label, unit="video", disable=not tasks) as bar:
        done: set[int] = set()
        for n, result in _finished(function, tasks, workers):
            done.add(n)
            bar.update()
            yield tasks[n], result
        for n, task in enumerate(tasks):
            if n not in done:
                yield task, _alone(function, task, on_crash)
                bar.update()


def _finished(function: Callable[[Task], Result], tasks: Sequence[Task], workers: int) -> Iterator[tuple[int, Result]]:
    """Results with the position of their task, until all are done or a worker dies."""
    if workers <= 1:
        yield from ((n, function(task)) for n, task in enumerate(tasks))
        return
    pool = ProcessPoolExecutor(max_workers=min(workers, max(len(tasks), 1)), initializer=_end_with_parent)
    try:
        position = {pool.submit(function, task): n for n, task in enumerate(tasks)}
        for future in as_completed(position):
            yield position[future], future.result()
    except BrokenProcessPool:
        return
    finally:
        pool.shutdown(cancel_futures=True)


def _alone(function: Callable[[Task], Result], task: Task, on_crash: Callable[[Task], Result]) -> Result:
    with ProcessPoolExecutor(max_workers=1, initializer=_end_with_parent) as pool:
        try:
            return pool.submit(function, task).result()
        except BrokenProcessPool:
            return on_crash(task)


def _end_with_parent() -> None:
    """Make this worker exit when its parent is gone: one that was killed can tell nobody, and workers wait for ever."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        parent.join()
        os._exit(1)  # sys.exit would end this thread only

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()
