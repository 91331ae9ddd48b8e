"""What a training run leaves to read.  Losses of its steps -> log.jsonl, loss.png."""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from hoi.common.files import write_atomically
from hoi.common.sheets import curve, smooth

NO_LOSS = {"step", "learning_rate", "gradient_norm", "pictures_per_second"}


class TrainingLog:
    """log.jsonl in a run's folder, one object now and then.

    start  steps that are done; lines of later ones, left by an interrupted run, are dropped: they are done again
    """

    def __init__(self, folder: Path, start: int) -> None:
        self.path = folder / "log.jsonl"
        self._logged, self._time = start, time.time()
        if self.path.exists():
            whole = [line for line in self.path.read_text().splitlines() if line.endswith("}")]
            kept = "".join(f"{line}\n" for line in whole if json.loads(line)["step"] <= start)
            write_atomically(self.path, lambda temporary: temporary.write_text(kept))

    def append(
        self, step: int, losses: Mapping[str, Sequence[Tensor]], pictures: int, **others: float
    ) -> dict[str, float]:
        """Write and return a line: the mean of each loss over the parts of this step, and others.

        pictures  of one step, all processes together, for the pictures a second since the last line
        """
        rate = (step - self._logged) * pictures / (time.time() - self._time)
        self._logged, self._time = step, time.time()
        line = {"step": step, **{name: torch.stack(list(parts)).mean().item() for name, parts in losses.items()}}
        line |= {**others, "pictures_per_second": round(rate, 1)}
        with open(self.path, "a") as log:
            log.write(json.dumps(line) + "\n")
        return line

    def draw(self) -> None:
        """loss.png, all losses so far, smoothed."""
        lines = [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []
        if not lines:
            return
        names = sorted({name for line in lines for name in line} - NO_LOSS)
        series = {name: smooth([(line["step"], line[name]) for line in lines if name in line], 10) for name in names}
        curve(series, f"{self.path.parent.name}: step {lines[-1]['step']}").save(self.path.parent / "loss.png")
