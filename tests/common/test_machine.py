"""hoi/common/machine.py: results come in order for any number of processes, and no crowd of calls waits."""

from concurrent.futures import ProcessPoolExecutor

import pytest

from hoi.common import machine


class Squares:
    """A maker; the function that builds it is pickled."""

    def square(self, number: int) -> int:
        if number == 99:
            raise ValueError("99 cannot be squared")
        return number * number


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
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert machine.choose_device(None) == "cuda"
    taken = []
    for rank in range(3):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        taken.append(machine.choose_device(None))
    assert taken == ["cuda:0", "cuda:1", "cuda:0"] and machine.choose_device("cuda:1") == "cuda:1"
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert machine.choose_device(None) == "cpu"
    with pytest.raises(ValueError, match="device 'cuda' is not there"):
        machine.choose_device("cuda")
