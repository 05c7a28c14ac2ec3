"""Jobs in several processes, each with a copy of the same data and its share of the threads."""

from __future__ import annotations

import multiprocessing
import os
import signal
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from typing import TYPE_CHECKING, Any, TypeVar

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

Job = TypeVar("Job")
Data = TypeVar("Data")
Found = TypeVar("Found")


def side_by_side(
    jobs: Sequence[Job], work: Callable[[Job, Data], Found | None], data: Data, workers: int
) -> Iterator[tuple[Job, Found | None]]:
    """Yield every job with the result of `work(job, data)`, as they end; None for one that Ctrl-C cut off.

    Args:
        jobs: picklable where there are several processes, as the next two.
        work: does one job; returns None when Ctrl-C cut it off.
        data: the second argument of `work`, sent to each process once.
        workers: processes; 1 works in this one.
    """
    if workers == 1 or len(jobs) < 2:
        for job in jobs:
            found = work(job, data)
            yield job, found
            if found is None:
                return
        return
    threads = max(1, (os.cpu_count() or 1) // workers)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start, (work, data, threads)) as pool:
        # No job waits in the pool: it would still be done after Ctrl-C.
        waiting = list(reversed(jobs))
        running: dict[Future[Found | None], Job] = {}
        try:
            while waiting or running:
                while waiting and len(running) < workers:
                    job = waiting.pop()
                    running[pool.submit(_work, job)] = job
                finished, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    yield running.pop(future), future.result()
        except KeyboardInterrupt:
            # Processes got the same Ctrl-C and stop at their next step.
            pool.shutdown(wait=True, cancel_futures=True)
            for future, job in running.items():
                yield job, None if future.cancelled() else future.result()


_task: tuple[Callable[[Any, Any], Any], Any]


def _start(work: Callable[[Any, Any], Any], data: Any, threads: int) -> None:
    """Prepare a new process: keep the data, and leave Ctrl-C to the trainer, which finishes its step."""
    global _task
    _task = (work, data)
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _work(job: Any) -> Any:
    work, data = _task
    return work(job, data)
