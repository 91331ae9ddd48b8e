"""The machine: its devices and memory, work shared out to other processes, and the processes of torchrun."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing import get_context
from typing import Any

import torch
import torch.distributed as dist

# Parameters of glibc's mallopt, from malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
CALLS_AT_ONCE = 1024  # handed to the worker processes: half a million waiting ones would cost a gigabyte
PATIENCE = timedelta(hours=12)  # for the slowest process, which may encode most of what an interrupted run left

Run = Callable[[Callable[[Any, int], Any], Sequence[int]], Iterator[Any]]


# --- devices and memory ---


def check_device(device: str) -> None:
    """Raise ValueError unless the machine has the device: cpu, or with a GPU cuda or cuda:N."""
    if device != "cpu" and not (device.split(":")[0] == "cuda" and torch.cuda.is_available()):
        raise ValueError(f"device {device!r} is not there; expected cpu or, with a GPU, cuda or cuda:N")


def choose_device(device: str | None) -> str:
    """The device that was asked for; by default "cuda" where there is one.  Raises ValueError when it is not there.

    Under torchrun each process that asks for "cuda" gets a GPU of its own, as far as there are enough.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        return f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"
    return device


def has_fast_bf16(device: str) -> bool:
    """Whether bf16 is worth it on "cpu" or "cuda...": on a CPU without bf16 instructions it is several times slower."""
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # torch has no public question for it.
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def keep_freed_memory() -> None:
    """Ask glibc to keep freed memory instead of returning it to the kernel after every operation.

    A step allocates the same large buffers again and again; mapping and clearing fresh pages each time took a third of
    a tiny U-Net's training step (20 against 13 pictures a second).  Does nothing where there is no glibc.
    """
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)  # large blocks come from the heap, too
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)  # which does not shrink
        libc.mallopt(M_TOP_PAD, 256 * 2**20)  # and grows in large steps


# --- worker processes ---


class _Worker:
    """What a worker process keeps from call to call."""

    maker: Any = None


def _start_worker(build: Callable[[], Any]) -> None:
    torch.set_num_threads(1)  # the processes share the cores
    _Worker.maker = build()


def _call_worker(method: Callable[[Any, int], Any], number: int) -> Any:
    return method(_Worker.maker, number)


@contextmanager
def mapper(workers: int, build: Callable[[], Any]) -> Iterator[Run]:
    """Yields run(method, numbers) -> the method's results in order, worked out here or in several processes.

    build    makes the object whose method is called, such as a SceneMaker; with several workers it is pickled and
             called once in each
    method   of that object's class, such as SceneMaker.make_scene; it takes one number
    """
    if workers == 1:
        maker = build()
        yield lambda method, numbers: (method(maker, number) for number in numbers)
        return
    # Spawn: a forked process would share the parent's GL context and thread pools.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (build,))

    def submit(method: Callable[[Any, int], Any], numbers: Sequence[int]) -> Iterator[Any]:
        # Ctrl-C reaches every process of the terminal.  Workers, which start within this call, ignore it as their
        # parent does meanwhile, and are ended by the parent, which does not lose what they had finished.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            return pool.map(_call_worker, [method] * len(numbers), numbers)
        finally:
            signal.signal(signal.SIGINT, before)

    def run(method: Callable[[Any, int], Any], numbers: Sequence[int]) -> Iterator[Any]:
        for start in range(0, len(numbers), CALLS_AT_ONCE):
            yield from submit(method, numbers[start : start + CALLS_AT_ONCE])

    try:
        yield run
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


# --- processes of torchrun ---


def join_processes(backend: str, rank: int, world_size: int) -> None:
    """Connect the processes that torchrun started, as torch.distributed's process group.

    backend  "nccl" on GPUs, "gloo" on CPUs
    torchrun keeps its store of addresses when it restarts a run, so the addresses of processes that ended may still be
    in it, and calling those would wait for ever.  On one machine each restart therefore writes its keys with a prefix
    of its own.  (Machines count restarts separately: for several, torchrun itself must open new stores, with
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment.)
    """
    store, env = None, os.environ
    restarts = int(env.get("TORCHELASTIC_RESTART_COUNT", 0))
    alone, shared = int(env.get("LOCAL_WORLD_SIZE", 0)) == world_size, env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if restarts and alone and shared:
        server = dist.TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), world_size, is_master=False)
        store = dist.PrefixStore(f"restart_{restarts}", server)
    elif restarts == 0 and shared and not alone and rank == 0 and int(env.get("TORCHELASTIC_MAX_RESTARTS", 0)):
        print("restarts over several machines need TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in torchrun's environment")
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=PATIENCE)
