"""Weight files.  safetensors or torch file <-> plain tensors under our names, strictly; training state, atomically.

    python -m hoi.common.checkpoint FILE ...       # what each file is, whether it fits, what is missing

Nothing here runs code from a file: torch files are read with weights_only=True.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from hoi.common.files import write_atomically
from hoi.common.weight_files import WeightFile, shown


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


def weights_hash(module: nn.Module) -> str:
    """SHA-256 of a module's tensors, hexadecimal: names, types, shapes and numbers, whatever file they came from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
