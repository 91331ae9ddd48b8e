"""hoi/common/machine.py: results come in order for any number of processes, and no crowd of calls waits."""

import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch

from hoi.common import machine


class Squares:
    """A maker; the function that builds it is pickled."""

    def square(self, number: int) -> int:
        if number == 99:
            raise ValueError("99 cannot be squared")
        return number * number

    def end(self, number: int) -> int:
        """As a process that runs out of memory ends."""
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def waiting(monkeypatch) -> list[int]:
    """How many calls are handed to the pool at once."""
    counts, original = [], ProcessPoolExecutor.map

    def noted(self, function, methods, numbers):
        counts.append(len(numbers))
        return original(self, function, methods, numbers)

    monkeypatch.setattr(ProcessPoolExecutor, "map", noted)
    return counts


@pytest.mark.parametrize("processes", [1, 2])
def test_results_come_in_order_in_blocks_and_faults_reach_the_caller(processes, waiting, monkeypatch):
    monkeypatch.setattr(machine, "CALLS_AT_ONCE", 4)
    with machine.mapper(processes, Squares) as run:
        assert list(run(Squares.square, range(10))) == [number * number for number in range(10)]
        assert waiting == ([] if processes == 1 else [4, 4, 2])
        with pytest.raises(ValueError, match="99 cannot be squared"):
            list(run(Squares.square, [1, 99]))


def test_each_process_under_torchrun_takes_a_gpu_of_its_own_as_far_as_there_are_enough(monkeypatch):
    assert machine.choose_device("cpu") == "cpu"
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert machine.choose_device(None) == "cuda"
    taken = []
    for rank in range(3):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        taken.append(machine.choose_device(None))
    assert taken == ["cuda:0", "cuda:1", "cuda:0"] and machine.choose_device("cuda:1") == "cuda:1"
    with pytest.raises(ValueError, match="device 'cuda:2' is not there; expected cpu or cuda:0 or cuda:1"):
        machine.choose_device("cuda:2")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert machine.choose_device(None) == "cpu"
    monkeypatch.setattr("torch.mps.device_count", lambda: 1)
    assert machine.choose_device(None) == "mps:0" and machine.fast_dtype("mps") == torch.float16
    monkeypatch.setattr("torch.mps.device_count", lambda: 0)
    with pytest.raises(ValueError, match="device 'cuda' is not there"):
        machine.choose_device("cuda")


@pytest.mark.parametrize(("emulated", "expected"), [(True, torch.float16), (False, torch.bfloat16)])
def test_where_a_gpu_emulates_bf16_float16_is_taken(emulated, expected, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: not emulated)
    assert machine.fast_dtype("cuda:1") == expected


def test_free_memory_of_a_gpu_is_what_nobody_uses_and_what_torch_keeps(monkeypatch):
    for name, value in (("mem_get_info", (3000, 9000)), ("memory_reserved", 500), ("memory_allocated", 200)):
        monkeypatch.setattr(f"torch.cuda.{name}", lambda device, value=value: value)
    assert machine.free_device_memory("cuda:1") == 3300
    assert machine.free_device_memory("cpu") == machine.free_device_memory("mps:0") == 0


def test_a_processor_that_is_told_to_be_avx2_is_fast_in_float32(monkeypatch):
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX512")
    assert machine.fast_dtype("cpu") == torch.bfloat16
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX2")
    assert machine.fast_dtype("cpu") == torch.float32


def test_a_worker_that_is_killed_is_told_in_a_sentence():
    with machine.mapper(2, Squares) as run, pytest.raises(OSError, match="a worker process ended .*fewer --workers"):
        list(run(Squares.end, range(4)))


# --- torchrun's environment ---

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.mark.parametrize(
    "words, expected",
    [
        ("", (0, 1)),
        ("WORLD_SIZE=1", (0, 1)),  # as clusters set it for jobs of one process
        ("RANK=1 WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=1", (1, 2)),
        ("RANK=0", (0, 1)),
        ("WORLD_SIZE=", "says WORLD_SIZE='', which is not all that torchrun sets.*unset RANK WORLD_SIZE"),
        ("RANK=one WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=1", "says RANK='one', WORLD_SIZE='2'"),
        ("RANK=1", "says RANK='1', which"),
        ("WORLD_SIZE=2", "says WORLD_SIZE='2', which is not all"),
        ("RANK=2 WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=1", "RANK='2', WORLD_SIZE='2', .*or no such process"),
    ],
)
def test_rank_and_world_size_are_torchruns_or_a_sentence(words, expected, monkeypatch):
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    for word in words.split():
        monkeypatch.setenv(*word.split("="))
    if isinstance(expected, tuple):
        assert machine.rank_and_world_size() == expected
    else:
        with pytest.raises(ValueError, match=expected):
            machine.rank_and_world_size()


JOIN = """
import signal, sys, time, torch
from hoi.common import machine
from hoi.common.command import problems_as_messages
machine.SECONDS_OF_SILENCE = float(sys.argv[1])
signal.signal(signal.SIGINT, signal.default_int_handler)  # which processes in the background do not get
with problems_as_messages("script", "stopped"):
    rank, world_size = machine.rank_and_world_size()
    machine.join_processes("gloo", rank, world_size)
    print("joined", flush=True)
    if rank == 0:
        machine.barrier()
    time.sleep(60)
"""


def joining(rank: int, port: int, silence: float) -> subprocess.Popen:
    shared = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
    shared |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared["OMP_NUM_THREADS"] = "1"
    words, pipe = [sys.executable, "-c", JOIN, str(silence)], subprocess.PIPE
    return subprocess.Popen(words, env=shared, text=True, stdout=pipe, stderr=pipe, cwd=Path(__file__).parents[2])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("rank, number", [(0, signal.SIGTERM), (1, signal.SIGINT)])
def test_one_process_of_two_says_that_it_waits_and_stops_on_a_signal(rank, number):
    process = joining(rank, free_port(), 0.2)
    said = process.stdout.readline()
    told = f"waiting for other processes (WORLD_SIZE=2, RANK={rank}, meeting at 127.0.0.1:"
    assert said.startswith(told), process.communicate()
    process.send_signal(number)
    began = time.monotonic()
    _, error = process.communicate(timeout=120)
    assert time.monotonic() - began < 60 and process.returncode == 1
    assert "stopped" in error and "Traceback" not in error


def test_a_port_that_is_taken_is_told():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        process = joining(0, taken.getsockname()[1], 60)
        _, error = process.communicate(timeout=120)
    assert "script: the processes cannot meet (WORLD_SIZE=2, RANK=0" in error and process.returncode == 1


def test_a_process_that_waits_for_a_slower_one_stops_on_a_signal_and_tells_when_that_one_ended():
    for number in (signal.SIGTERM, None):
        port = free_port()
        ranks = [joining(rank, port, 60) for rank in (0, 1)]
        assert [process.stdout.readline() for process in ranks] == ["joined\n"] * 2
        (ranks[0] if number else ranks[1]).send_signal(number or signal.SIGKILL)
        _, error = ranks[0].communicate(timeout=120)
        ranks[1].kill()
        ranks[1].communicate()
        assert ("stopped" if number else "script: another process ended; its own message says why") in error
        assert "Traceback" not in error and ranks[0].returncode == 1


# Blocks of 10 MB; every other one is freed.  The first, freed, is what makes glibc take the others from its heap.
MEMORY_LEFT = """
import sys, torch
from hoi.common.machine import return_freed_memory

if "return" in sys.argv:
    return_freed_memory()
torch.ones(4 << 20)
blocks = [torch.ones(5 << 19) for _ in range(20)]
pages = lambda: int(open("/proc/self/statm").read().split()[1])
full = pages()
blocks = blocks[::2]
print((full - pages()) * 4096 / 1e6)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_freed_blocks_between_others_go_back_to_the_system():
    run = partial(subprocess.run, cwd=Path(__file__).parents[2], check=True, capture_output=True, text=True)
    freed = [float(run([sys.executable, "-c", MEMORY_LEFT, word]).stdout) for word in ("return", "keep")]
    assert freed[0] > 99 > freed[1], "ten blocks of 10.5 MB; without it they stay, as holes"
