"""Work shared between processes.  A maker and numbers -> the maker's results, in order, for any number of processes."""

import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any

import torch

BLOCK = 1024  # calls handed to the pool at once: half a million waiting ones would cost a gigabyte

_maker: Any = None  # one in each worker process


def start_worker(build: Callable[[], Any]) -> None:
    global _maker
    torch.set_num_threads(1)
    _maker = build()


def call_worker(method: str, argument: int) -> Any:
    return getattr(_maker, method)(argument)


@contextmanager
def mapper(workers: int, build: Callable[[], Any]) -> Iterator[Any]:
    """Yields map(method name, numbers) -> results in order, run here or in workers, each with its own maker.

    build  makes a maker; with several workers it is pickled and called once in each
    """
    if workers == 1:
        maker = build()
        yield lambda method, numbers: map(getattr(maker, method), numbers)
        return
    # Spawn: a forked process would share the parent's GL context and thread pools.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), start_worker, (build,))

    def submit(method: str, numbers: Sequence[int]) -> Iterator[Any]:
        # Processes that start here inherit the deaf ear: Ctrl-C reaches the whole group, the parent ends the workers.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            return pool.map(call_worker, [method] * len(numbers), numbers)
        finally:
            signal.signal(signal.SIGINT, before)

    def run(method: str, numbers: Sequence[int]) -> Iterator[Any]:
        for start in range(0, len(numbers), BLOCK):
            yield from submit(method, numbers[start : start + BLOCK])

    try:
        yield run
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
