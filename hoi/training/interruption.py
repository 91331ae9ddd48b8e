"""Leaving a training run at a good moment, and coming back to the same one.  Signals, losses, gradients, settings -> go
on or stop, agreed between processes.
"""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# What may change between parts of one run: its length and housekeeping.
FREE_SETTINGS = (
    "steps", "save_every", "keep_states", "preview_every", "threads", "device", "dtype", "out", "accumulate",
)  # fmt: skip


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


def unusable_step(
    step: int,
    losses: Sequence[float],
    norm: float,
    names: Sequence[Sequence[str]],
    learning_rate: float,
    rank: int,
    saved: int,
) -> str:
    """What to say of a step whose loss or gradient is not finite on this or another process.

    losses, names  of the step's parts, and of the pictures in each
    saved          step of the last training state
    """
    culprits = [names[k] for k, loss in enumerate(losses) if not math.isfinite(loss)] or names
    return (
        f"step {step + 1}: loss {', '.join(map(str, losses))}, gradient norm {norm} (process {rank}, learning rate "
        f"{learning_rate:g}); pictures {', '.join(name for group in culprits for name in group)}. No weight was "
        f"touched; the last state is of step {saved}. Look at these pictures, or try --dtype fp32, or begin anew with "
        "a lower --learning-rate or --clip-gradient in another --out"
    )


def check_same_run(
    folder: Path, before: Mapping[str, Any], now: Mapping[str, Any], processes_before: int, processes: int
) -> None:
    """Raise ValueError unless `now` goes on with the run that `before` began; only FREE_SETTINGS may differ.

    before, now  settings by name, those of train.py
    """
    if changed := [name for name in now if name not in FREE_SETTINGS and before.get(name) != now[name]]:
        details = ", ".join(f"--{name.replace('_', '-')} was {before.get(name)}, is {now[name]}" for name in changed)
        raise ValueError(f"{folder} holds a run with other settings ({details}); use them again or another --out")
    if now["reg_mode"] == "swap" and processes_before != processes:
        raise ValueError(
            f"{folder} holds a run of {processes_before} processes, each with its own --reg-mode swap; here are "
            f"{processes}"
        )
    batches = processes_before * before["accumulate"]
    if batches != processes * now["accumulate"]:
        raise ValueError(
            f"{folder} holds a run with {batches} batches a step (processes x --accumulate); here they are "
            f"{processes} x {now['accumulate']}: set --accumulate to make up for it, or use another --out"
        )
