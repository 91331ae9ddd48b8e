"""hoi/training/run.py: the average is the formula's, and the model carries it only where it is asked to."""

import pytest
import torch

from hoi.training.run import WeightAverage


def run(decay: float, steps: int) -> tuple[WeightAverage, list[float]]:
    """A weight that counts the steps, its average, and the values that it had."""
    weight, values = torch.nn.Parameter(torch.zeros(1)), []
    average = WeightAverage({"weight": weight}, decay)
    for done in range(1, steps + 1):
        weight.data.fill_(done)
        values.append(float(done))
        average.update(done)
    return average, values


def test_the_average_weighs_every_fourth_step_and_forgets_fast_at_first():
    average, values = run(decay=0.9, steps=400)
    expected = 0.0
    for done in range(4, 401, 4):
        kept = min(0.9**4, done / (done + 40))
        expected = kept * expected + (1 - kept) * values[done - 1]
    assert average.values["weight"].item() == pytest.approx(expected, rel=1e-5)


def test_the_model_carries_the_average_within_the_block_even_if_that_fails():
    average, _ = run(decay=0.9, steps=8)
    with pytest.raises(ZeroDivisionError), average.in_place():
        assert torch.equal(average.trained["weight"].data, average.values["weight"])
        raise ZeroDivisionError
    assert average.trained["weight"].item() == 8


def test_without_a_decay_there_is_no_average():
    average, _ = run(decay=0.0, steps=8)
    with average.in_place():
        assert average.trained["weight"].item() == 8
    assert average.values == {}
