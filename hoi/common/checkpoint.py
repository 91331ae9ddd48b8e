"""Weight files.  safetensors or torch file <-> plain tensors under our names, strictly; training state, atomically.

    python -m hoi.common.checkpoint FILE ...       # what each file is, whether it fits, what is missing

Nothing here runs code from a file: torch files are read with weights_only=True.
"""

from __future__ import annotations

import hashlib
import os
import re
import warnings
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from hoi.common.weight_files import WeightFile, load_torch_file, readable_file, shown

STATE_PATTERN = "state_{step:09d}.pt"

# The three branches under the official release's names: its "depth" branch sees a normal map (paper Sec. 3.3).
OFFICIAL_BRANCHES = {"pose_ada": "skeleton", "depth_ada": "normal", "mask_ada": "segmentation"}


def write_atomically(path: str | Path, write: Callable[[Path], None]) -> None:
    """Write to a temporary name beside path, fsync, rename: path holds the old content or the new, never a part.

    write   receives the temporary path and fills it
    A killed process may leave the temporary file; the next write to the same path replaces it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder last through a power cut; where folders cannot be opened (Windows), do nothing."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def save_model(path: str | Path, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors and string metadata as one safetensors file, atomically."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata=dict(metadata)))


def load_model_file(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a whole .safetensors or torch weight file.

    returns   tensors by name on the CPU, and the string metadata (empty for torch files)
    Raises FileNotFoundError, PermissionError, or ValueError if unreadable; see weight_files.WeightFile.
    """
    file = WeightFile(path)
    return {name: tensor.clone() for name, tensor in file.items()}, file.metadata


def strict_load(module: nn.Module, state: Mapping[str, Tensor], file_name: str | Path) -> None:
    """Copy tensors into a module; every name and shape must agree, nothing is left over.

    The module keeps its dtype and device (values are cast).  Raises ValueError naming the file, the counts found and
    expected, and the first offending names, and then leaves the module untouched.
    """
    check_fit(module, {name: tuple(tensor.shape) for name, tensor in state.items()}, file_name)
    module.load_state_dict(state, strict=True)


def check_fit(module: nn.Module, shapes: Mapping[str, tuple[int, ...]], file_name: str | Path) -> None:
    """Raise ValueError unless a module has exactly the tensors of these names and shapes."""
    own = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    missing, extra = own.keys() - shapes.keys(), shapes.keys() - own.keys()
    other = [
        f"{name} is {shapes[name]}, expected {own[name]}"
        for name in own.keys() & shapes.keys()
        if own[name] != shapes[name]
    ]
    problems = [f"{len(missing)} missing: {shown(missing)}"] if missing else []
    problems += [f"{len(extra)} unexpected: {shown(extra)}"] if extra else []
    problems += [f"{len(other)} of another shape: {shown(other)}"] if other else []
    if problems:
        raise ValueError(
            f"{file_name} does not fit {type(module).__name__}: {len(own)} tensors expected, {len(shapes)} found; "
            + "; ".join(problems)
        )


def from_official_adapter_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names of the official model_ad_N.pth (pose_ada, depth_ada, mask_ada) -> ours (skeleton, normal, segmentation)."""
    return {rename(name.removeprefix("adapter."), OFFICIAL_BRANCHES): tensor for name, tensor in state.items()}


def to_official_adapter_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our condition encoder names -> those of the official model_ad_N.pth."""
    official = {ours: theirs for theirs, ours in OFFICIAL_BRANCHES.items()}
    return {rename(name, official): tensor for name, tensor in state.items()}


def rename(name: str, branches: Mapping[str, str]) -> str:
    branch, _, rest = name.partition(".")
    return f"{branches.get(branch, branch)}.{rest}"


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a file, hexadecimal.  Remembered for as long as size and modification time stay the same."""
    status = readable_file(path).stat()
    return _sha256(os.path.abspath(path), status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=32)
def _sha256(path: str, size: int, modified_ns: int) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def weights_hash(module: nn.Module) -> str:
    """SHA-256 of a module's tensors, hexadecimal: names, types, shapes and numbers, whatever file they came from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


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
