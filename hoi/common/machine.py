"""The machine: which devices it has, and two facts that decide how fast training and sampling run.

Work shared between processes.  A maker and numbers -> the maker's results, in order, for any number of processes.

The processes of one training run.  torchrun's environment -> a process group of torch.distributed.
"""

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
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(M_TOP_PAD, 256 * 2**20)


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


PATIENCE = timedelta(hours=12)  # for the slowest process, which may encode most of what an interrupted run left


def join_processes(backend: str, rank: int, world_size: int) -> None:
    """Connect the processes that torchrun started.

    After a restart torchrun's store may still hold the addresses of the dead, which the living would then call in
    vain; so on one machine each restart gets a room of its own in it.  (Machines count restarts on their own: for them
    torchrun itself must open new stores, with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment.)
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
