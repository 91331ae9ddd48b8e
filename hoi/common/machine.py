"""The machine: its devices and memory, work shared out to other processes, and the processes of torchrun."""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from threading import Thread
from typing import Any

import torch
import torch.distributed as dist

ACCELERATORS = ("cuda", "xpu", "mps")  # the kinds that torch knows, in the order in which they are taken
# Parameters of glibc's mallopt, from malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -2, -3, -4
CALLS_AT_ONCE = 1024  # handed to the worker processes: half a million waiting ones would cost a gigabyte
PATIENCE = timedelta(hours=12)  # for the slowest process, which may encode most of what an interrupted run left
SECONDS_OF_SILENCE = 5  # until a process says that it waits for others

Run = Callable[[Callable[[Any, int], Any], Sequence[int]], Iterator[Any]]


# --- devices and memory ---


def choose_device(device: str | None) -> str:
    """The device that was asked for; by default the first of ACCELERATORS that is there, else "cpu".

    Under torchrun each process that names no number gets an accelerator of its own, as far as there are enough.
    Raises ValueError when the device is not there.
    """
    device = device or next((kind for kind in ACCELERATORS if _count(kind)), "cpu")
    kind, _, number = device.partition(":")
    if device != "cpu" and not ((number or "0").isdigit() and int(number or 0) < _count(kind)):
        there = [f"{kind}:{k}" for kind in ACCELERATORS for k in range(_count(kind))]
        raise ValueError(f"device {device!r} is not there; expected cpu{''.join(f' or {name}' for name in there)}")
    if device in ACCELERATORS and "LOCAL_RANK" in os.environ:
        return f"{device}:{int(os.environ['LOCAL_RANK']) % _count(device)}"
    return device


def _count(kind: str) -> int:
    """How many devices of one of ACCELERATORS torch can use here."""
    return getattr(torch, kind).device_count() if kind in ACCELERATORS and hasattr(torch, kind) else 0


def fast_dtype(device: str) -> torch.dtype:
    """The fewest bits in which a device is fast: bfloat16, or where that is emulated on a GPU float16, else float32.

    Without bf16 instructions a CPU is several times slower in 16 bits than in 32; a T4, V100 or RTX 20 in bf16.
    """
    kind = device.partition(":")[0]
    if kind == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if kind != "cpu":
        return torch.float16 if kind == "mps" else torch.bfloat16
    # torch has no public question for it.  ATEN_CPU_CAPABILITY=avx2 makes a processor one that has neither.
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast and torch.backends.cpu.get_cpu_capability() != "AVX2" else torch.float32


def available_memory() -> int:
    """Bytes that new work can take without swapping; where Linux does not say, what is not used at all."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def free_device_memory(device: str) -> int:
    """Bytes of a GPU that nobody uses, or that torch keeps for what comes; 0 for a CPU, and where torch cannot tell."""
    kind = getattr(torch, device.partition(":")[0])
    if not hasattr(kind, "mem_get_info"):
        return 0
    return kind.mem_get_info(device)[0] + kind.memory_reserved(device) - kind.memory_allocated(device)


def processor() -> str:
    """What tells kinds of CPUs apart, as far as speed goes: model and instructions, and torch's version."""
    path = Path("/proc/cpuinfo")
    first = path.read_text().partition("\n\n")[0] if path.exists() else platform.processor()
    said = [line for line in first.splitlines() if line.startswith(("vendor", "cpu family", "model", "flags"))]
    return "\n".join([*said, torch.backends.cpu.get_cpu_capability(), torch.__version__])


def keep_freed_memory() -> None:
    """Ask glibc to keep freed memory instead of returning it to the kernel after every operation.

    A step allocates the same large buffers again and again; mapping and clearing fresh pages each time took a third of
    a tiny U-Net's training step (20 against 13 pictures a second).  Does nothing where there is no glibc.
    """
    # Large blocks come from the heap, too, which does not shrink and grows in large steps.
    _set_malloc({M_MMAP_MAX: 0, M_TRIM_THRESHOLD: 2**31 - 1, M_TOP_PAD: 256 * 2**20})


def return_freed_memory() -> None:
    """Ask glibc to return every freed block of a megabyte and more at once.

    By itself it takes blocks of up to 32 MB from the heap once some were freed, where they leave holes: 0.6 GB of what
    two pictures of 512 px need at full size.  There an operation takes so long that fresh pages cost nothing that could
    be measured.
    """
    _set_malloc({M_MMAP_THRESHOLD: 2**20})


def _set_malloc(settings: dict[int, int]) -> None:
    """Parameters of mallopt, where there is a glibc."""
    if sys.platform.startswith("linux") and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        for parameter, value in settings.items():
            libc.mallopt(parameter, value)


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
    Raises ChildProcessError when a worker process ends.
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
        try:
            for start in range(0, len(numbers), CALLS_AT_ONCE):
                yield from submit(method, numbers[start : start + CALLS_AT_ONCE])
        except BrokenProcessPool as error:
            raise ChildProcessError(
                "a worker process ended before its work was done: killed, or out of memory, which fewer --workers need "
                "less of. What was finished is safe; the same command goes on"
            ) from error

    try:
        yield run
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


# --- the processes of a launcher ---


def rank_and_world_size() -> tuple[int, int]:
    """This process's number and how many there are, as torchrun's environment says; 0 and 1 without it.

    Raises ValueError for what no launcher sets: clusters set WORLD_SIZE for jobs of one process, too.
    """
    env, needed = os.environ, ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    rank, world_size = env.get("RANK", "0"), env.get("WORLD_SIZE", "1")
    if (rank, world_size) == ("0", "1"):
        return 0, 1
    numbers = all(word.isdigit() for word in (rank, world_size, env.get("LOCAL_RANK", "0")))
    if not (numbers and int(rank) < int(world_size) and env.keys() >= set(needed)):
        said = ", ".join(f"{name}={env[name]!r}" for name in (*needed, "LOCAL_RANK") if name in env)
        raise ValueError(f"the environment says {said}, which is not all that torchrun sets, or no such process: start "
                         "several processes with torchrun, or one after: unset RANK WORLD_SIZE")  # fmt: skip
    return int(rank), int(world_size)


def join_processes(backend: str, rank: int, world_size: int, patience: timedelta = PATIENCE) -> None:
    """Connect the processes that torchrun started, as torch.distributed's process group; nothing for a single one.

    backend   "nccl" on GPUs, "gloo" on CPUs
    patience  for the slowest process, wherever the others wait for it
    Says after seconds that it waits for others.  Raises OSError when they cannot meet, such as at a port that is taken.
    (Machines count restarts separately: over several, torchrun must open a new store for each, with
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment.)
    """
    if world_size == 1:
        return
    env, failures = os.environ, []

    def meet() -> None:
        try:
            dist.init_process_group(backend, rank=rank, world_size=world_size, timeout=patience)
        except RuntimeError as error:
            failures.append(error)

    # In a thread that ends with the process: torch hears no signal while it waits, and says nothing.
    joining = Thread(target=meet, daemon=True)
    joining.start()
    joining.join(SECONDS_OF_SILENCE)
    place = f"WORLD_SIZE={world_size}, RANK={rank}, meeting at {env['MASTER_ADDR']}:{env['MASTER_PORT']}"
    if joining.is_alive():
        print(f"waiting for other processes ({place}). For a single process: unset RANK WORLD_SIZE", flush=True)
    while joining.is_alive():
        joining.join(0.1)
    if failures:
        raise OSError(f"the processes cannot meet ({place}): {str(failures[0]).splitlines()[0]}") from failures[0]


def barrier() -> None:
    """Wait for the other processes, where there are any; signals end the waiting.

    Raises ConnectionError when another process ended meanwhile.
    """
    if not dist.is_initialized():
        return
    try:
        work = dist.barrier(async_op=True)
        while not work.is_completed():
            time.sleep(0.02)
        work.wait()
    except RuntimeError as error:
        raise ConnectionError("another process ended; its own message says why") from error


def leave_processes() -> None:
    """Close the process group at the end; after a fault it ends with the process: closing would wait for the others."""
    if dist.is_initialized():
        dist.destroy_process_group()
