"""Leaving a training run at a good moment.  Signals, losses, gradients -> go on or stop, agreed between processes."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterable
from types import FrameType, TracebackType

import torch
import torch.distributed as dist
from torch import Tensor


class StopSignals:
    """Within this block SIGTERM and SIGINT (Ctrl-C) only leave a note, so that the step at hand can be finished.

    received   the signal's number, or None
    More of them change nothing: launchers pass on what the terminal has sent already.  SIGKILL leaves at once.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            self._before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or number

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def agreed(*flags: bool, device: str | torch.device = "cpu") -> list[bool]:
    """Each flag as any process has it: without agreement one would leave while the others wait for its gradients."""
    if not dist.is_initialized():
        return list(flags)
    votes = torch.tensor(flags, dtype=torch.int32, device=device)
    dist.all_reduce(votes, op=dist.ReduceOp.MAX)
    return [bool(vote) for vote in votes.tolist()]


def gradient_norm(parameters: Iterable[Tensor]) -> Tensor:
    """Euclidean norm of all gradients together, a scalar; not finite as soon as one of their numbers is not."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
