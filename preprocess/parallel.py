"""Run one function over many files in worker processes, where a file that crashes its worker costs no other."""

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from itertools import islice
from typing import TypeVar

from engine.progress import Bar

T = TypeVar("T")  # a task
R = TypeVar("R")  # its result


def run_parallel(
    function: Callable[[T], R], tasks: Sequence[T], workers: int, label: str, on_crash: Callable[[T], R]
) -> Iterator[tuple[T, R]]:
    """Yield (task, function(task)) as they finish, showing progress; at most `workers` processes.

    `function` must be importable and turn its own exceptions into results. A task whose worker dies (a decoder that
    crashes, memory that runs out) yields `on_crash(task)`. Workers end when this process does, even if it is killed.
    """
    waiting = iter(tasks)
    running: dict[Future[R], tuple[T, ProcessPoolExecutor]] = {}
    # A pool for each worker: a crash breaks a whole pool, so it must hold one task only.
    with Bar(label, len(tasks)) as bar, ExitStack() as pools:

        def start(task: T, pool: ProcessPoolExecutor | None = None) -> None:
            pool = pool or pools.enter_context(ProcessPoolExecutor(1, initializer=_end_with_parent))
            try:
                running[pool.submit(function, task)] = task, pool
            except BrokenProcessPool:  # the worker died after its last task
                start(task)

        for task in islice(waiting, max(workers, 1)):
            start(task)
        while running:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                task, pool = running.pop(future)
                try:
                    result = future.result()
                except BrokenProcessPool:
                    result, pool = on_crash(task), None
                for following in islice(waiting, 1):
                    start(following, pool)
                yield task, result
                bar.advance()


def _end_with_parent() -> None:
    """Make this worker exit when its parent is gone: one that was killed can tell nobody, and workers wait for ever."""

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)  # sys.exit would end this thread only

    threading.Thread(target=watch, daemon=True).start()
