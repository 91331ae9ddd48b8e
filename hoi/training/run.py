"""What a training run is beside its loss.  Signals, losses, gradients, settings, weights -> go on or stop, and files.

In the order in which a run meets it: signals and bad steps, agreed between processes; the check that a run is the same
that began; the moving average of the weights; the log; training states, written whole, found again, and read without
running code.
"""

from __future__ import annotations

import json
import math
import re
import signal
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from hoi.common.files import JsonLines, encode_png, make_lasting, remove_leftovers, write_whole
from hoi.common.sheets import curve, smooth
from hoi.common.tensors import load_torch_file

# What may change between parts of one run: its length and housekeeping.  --accumulate is looked at together with the
# number of processes: their product is what a step is made of.
FREE_SETTINGS = (
    "steps", "save_every", "keep_states", "preview_every", "threads", "device", "dtype", "out", "accumulate",
)  # fmt: skip
AVERAGE_EVERY = 4  # steps; the average moves slowly, so a quarter of the work gives nearly the same
NO_LOSS = {"step", "learning_rate", "gradient_norm", "pictures_per_second"}  # what of a line of the log is not drawn
STATE_PATTERN = "state_{step:09d}.pt"


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
        self._before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or number

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def agreed(*flags: bool, device: str | torch.device = "cpu") -> list[bool]:
    """Each flag, set as soon as one process has it set; all processes must call this.

    Without agreement one would leave while the others wait for its gradients.
    """
    if not dist.is_initialized():
        return list(flags)
    # On the GPU for nccl, which knows no other memory.
    votes = torch.tensor(flags, dtype=torch.int32, device=device)
    dist.all_reduce(votes, op=dist.ReduceOp.MAX)
    return [bool(vote) for vote in votes.tolist()]


def gradient_norm(parameters: Iterable[Tensor]) -> Tensor:
    """Euclidean norm of all gradients together, a scalar; not finite as soon as one of their numbers is not."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    # As torch's clip_grad_norm_ does it: for all at once instead of hundreds one by one.
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

    losses, names  of the step's batches, and of the pictures in each
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
    # Everything else depends on the pictures of a step alone, but every process draws its own swaps.
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
        if self.values and done % AVERAGE_EVERY == 0:
            # Early on it reaches back over about the last tenth of the steps (the 10 was chosen by trial), so that the
            # weights of the beginning are soon forgotten.
            decay = min(self.decay**AVERAGE_EVERY, done / (done + 10 * AVERAGE_EVERY))
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


class TrainingLog:
    """log.jsonl in a run's folder, one object now and then.

    start  steps that are done; lines of later ones, left by an interrupted run, are dropped: they are done again
    """

    def __init__(self, folder: Path, start: int) -> None:
        self.lines = JsonLines(folder / "log.jsonl", step=int)
        self._logged, self._time = start, time.monotonic()
        kept = [json.dumps(line) + "\n" for line in self.lines if line["step"] <= start]
        if self.lines.path.exists():
            write_whole(self.lines.path, "".join(kept).encode())

    def append(
        self, step: int, losses: Mapping[str, Sequence[Tensor]], pictures: int, **others: float
    ) -> dict[str, float]:
        """Write and return a line: the mean of each loss over the batches of this step, and others.

        pictures  of one step, all processes together, for the pictures a second since the last line
        """
        now = time.monotonic()  # a clock that is set back must not stop a training, nor one that stands still
        rate = (step - self._logged) * pictures / (now - self._time) if now > self._time else 0.0
        self._logged, self._time = step, now
        line = {"step": step, **{name: torch.stack(list(each)).mean().item() for name, each in losses.items()}}
        line |= {**others, "pictures_per_second": round(rate, 1)}
        self.lines.append(line)
        make_lasting([self.lines.path])  # as the state that says that its step is done
        return line

    def draw(self) -> None:
        """loss.png, all losses so far, smoothed."""
        lines = list(self.lines)
        if not lines:
            return
        names = sorted({name for line in lines for name in line} - NO_LOSS)
        series = {name: smooth([(line["step"], line[name]) for line in lines if name in line], 10) for name in names}
        folder = self.lines.path.parent
        drawn = curve(series, f"{folder.name}: step {lines[-1]['step']}")
        write_whole(folder / "loss.png", encode_png(np.asarray(drawn)))


def save_training_state(folder: str | Path, step: int, state: Mapping[str, Any], keep: int = 2) -> Path:
    """Write folder/state_STEP.pt atomically and delete all others but the newest `keep` - 1 before it.

    state   a dict of tensors and plain values (dicts, lists, tuples, numbers, strings): reading runs no code
    keep    1 or more
    States of later steps are deleted, too: the run goes on from here, so they were damaged or are of another future.
    So is what killed processes left half written.
    """
    path = Path(folder) / STATE_PATTERN.format(step=step)
    write_whole(path, lambda stream: torch.save(dict(state), stream))
    states = training_states(folder)
    place = states.index(path)
    for old in [*states[: max(place + 1 - keep, 0)], *states[place + 1 :]]:
        old.unlink()
    remove_leftovers(Path(folder), r"state_\d+\.pt")
    return path


def load_training_state(folder: str | Path) -> dict[str, Any] | None:
    """The newest training state in the folder that is whole, on the CPU, or None when there is none yet.

    A damaged one is skipped with a warning in favour of the one before.  Raises ValueError when all are damaged:
    beginning anew would throw the training away without a word.
    """
    paths = training_states(folder)
    for path in reversed(paths):
        try:
            return load_torch_file(path)
        except ValueError as error:
            problem = error
            warnings.warn(f"skipping a damaged training state: {error}", RuntimeWarning, stacklevel=2)
    if paths:
        raise ValueError(f"no training state in {folder} is whole ({problem}); delete state_*.pt to begin anew")
    return None


def training_states(folder: str | Path) -> list[Path]:
    """Complete training states, oldest first."""
    return sorted(path for path in Path(folder).glob("state_*.pt") if re.fullmatch(r"state_\d+\.pt", path.name))
