"""Processes that share the work of a study: one thread each, and none outlives the process that started it."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

Task, Result = TypeVar("Task"), TypeVar("Result")


def share(work: Callable[[Task], Result], tasks: Sequence[Task], workers: int | None) -> Iterator[Result]:
    """Yield the results of all tasks, in order.

    Args:
        work: a function of one task; both must be picklable.
        tasks: what it is called with.
        workers: processes; None: one per processor. With 1 this process works.
    """
    if workers == 1:
        yield from map(work, tasks)
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_start) as pool:
        try:
            yield from pool.map(work, tasks)
        except BaseException:  # also when whoever iterates stops early: what has not begun need not begin
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _start() -> None:
    """Use one thread, and end as soon as the parent does, however it ends."""
    import torch

    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
