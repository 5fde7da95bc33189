"""Processes that share the work of a study: one thread each, and none outlives the process that started it."""

from __future__ import annotations

import functools
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from emq_lib.core.errors import InvalidParameterError, WorkerLostError

Task, Result = TypeVar("Task"), TypeVar("Result")


def share(work: Callable[[Task], Result], tasks: Sequence[Task], workers: int | None) -> Iterator[Result]:
    """Yield the results of all tasks, in order.

    Args:
        work: a function of one task; both must be picklable. What it raises is raised here.
        tasks: what it is called with.
        workers: processes; None: one per processor. With 1 this process works.

    Raises:
        InvalidParameterError: no such number of workers.
        WorkerLostError: a worker was ended from outside.
    """
    if workers is not None and (not isinstance(workers, int) or workers < 1):
        raise InvalidParameterError(f"the number of workers must be a whole number from 1, or None; got {workers!r}.")
    work = functools.partial(_alone, work)
    if workers == 1:
        yield from map(work, tasks)
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_watch) as pool:
        try:
            yield from pool.map(work, tasks)
        except BrokenProcessPool as error:
            raise WorkerLostError(
                "A process that shared the work was ended from outside, perhaps for want of memory. What was finished "
                "is kept: call again, with fewer workers."
            ) from error
        except BaseException:  # also when whoever iterates stops early: what has not begun need not begin
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _alone(work: Callable[[Task], Result], task: Task) -> Result:
    from book.studies.study import one_thread  # not above: a worker must watch before it imports PyTorch, for seconds

    with one_thread():  # here, not when a worker starts: libraries that work imports would not know of it
        return work(task)


def _watch() -> None:
    """End as soon as the parent does, however it ends."""
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
