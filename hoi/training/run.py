"""Training states: written whole, found again, and read without running code."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hoi.common.files import write_atomically
from hoi.common.tensors import load_torch_file

STATE_PATTERN = "state_{step:09d}.pt"


def save_training_state(folder: str | Path, step: int, state: Mapping[str, Any], keep: int = 2) -> Path:
    """Write folder/state_STEP.pt atomically and delete all others but the newest `keep` - 1 before it.

    state   a dict of tensors and plain values (dicts, lists, tuples, numbers, strings), so that reading needs no code
    Raises ValueError for anything else: better now than when the training is to be resumed.
    States of later steps are deleted, too: the run goes on from here, so they were damaged or are of another future.
    So is what killed processes left half written.
    """
    if keep < 1:
        raise ValueError(f"keep is {keep}; at least the state just written must stay")
    check_plain(state, "state")
    path = Path(folder) / STATE_PATTERN.format(step=step)
    write_atomically(path, lambda temporary: torch.save(dict(state), temporary))
    states = training_states(folder)
    place = states.index(path)
    for old in [*states[: max(place + 1 - keep, 0)], *states[place + 1 :], *Path(folder).glob(".state_*.pt.tmp")]:
        old.unlink()
    return path


def check_plain(value: Any, place: str) -> None:
    """Raise ValueError naming the place of the first value that loading with weights_only=True would refuse."""
    if isinstance(value, dict):
        for key, item in value.items():
            check_plain(key, f"a key of {place}")
            check_plain(item, f"{place}[{key!r}]")
    elif type(value) in (list, tuple):
        for index, item in enumerate(value):
            check_plain(item, f"{place}[{index}]")
    elif not isinstance(value, Tensor) and type(value) not in (str, int, float, bool, bytes, type(None)):
        raise ValueError(f"{place} is a {type(value).__name__}; a training state holds tensors and plain values only")


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
