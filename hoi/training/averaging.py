"""Moving average of the trained weights, which is smoother than the weights of any step.  weights, step -> weights."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

EVERY = 4  # steps; the average moves slowly enough


class WeightAverage:
    """Exponential average of `trained` (parameters by name); nothing at all when decay is 0.

    decay   a step, e.g. 0.998; at first less, so that the average does not remember the beginning
    values  by name, on the device of the weights; part of the training state
    """

    def __init__(self, trained: Mapping[str, nn.Parameter], decay: float) -> None:
        self.trained, self.decay = trained, decay
        self.values = {name: parameter.detach().clone() for name, parameter in trained.items()} if decay else {}

    def restore(self, values: Mapping[str, Tensor]) -> None:
        """Go on from the values of a training state."""
        self.values = {name: value.to(self.trained[name].device) for name, value in values.items()}

    def update(self, done: int) -> None:
        """Take in the weights as they are after `done` steps."""
        if self.values and done % EVERY == 0:
            decay = min(self.decay**EVERY, done / (done + 10 * EVERY))
            weights = [self.trained[name].detach() for name in self.values]
            torch._foreach_lerp_(list(self.values.values()), weights, 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within this block the model carries the average, if there is one."""
        own = {name: self.trained[name].detach().clone() for name in self.values}
        for name, value in self.values.items():
            self.trained[name].data.copy_(value)
        try:
            yield
        finally:
            for name, value in own.items():
                self.trained[name].data.copy_(value)
