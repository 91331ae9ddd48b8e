"""Weight files <-> tensors by name.  .safetensors, .ckpt, .pth, .bin, of any origin; read lazily, loaded strictly.

WeightFile opens a file and reads its tensors one by one; load_model_file reads a whole one; strict_load puts tensors
into a module, all of them and nothing else; save_model writes safetensors.  Nothing here runs code from a file: torch
files are read with weights_only=True, and the few classes and functions that the pickles of Stable Diffusion and
Lightning name are stood for by inert or harmless ones.
"""

from __future__ import annotations

import hashlib
import json
import warnings
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from hoi.common.command import first_few
from hoi.common.files import MOST_UNPACKED, ZIP_MAGIC, array_globals, check_unpacked, readable_file, write_whole

Shapes = Mapping[str, tuple[int, ...]]

# A mapped file counts as this process's memory page by page as it is read; so it is mapped anew every so many bytes.
# Each mapping of a torch file reads its table of contents again, hence not after every tensor.
REMAP_BYTES = 96 << 20
LONGEST_OFFENCE = 200  # characters of torch's own sentence in a message
PICKLE_MAGIC = b"\x80"  # torch files of before 2020 begin so
WRAPPERS = ("module.", "adapter.")  # of DataParallel around a model; of diffusers around a T2I-Adapter
TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}  # in safetensors
TRAINERS_NOTES = ("global_step", "epoch", "step", "iteration", "pytorch-lightning_version")  # beside the weights


class WeightFile(Mapping[str, Tensor]):
    """The tensors of a file by name, each read from disk when it is asked for and not kept.

    path      the file
    shapes    of every tensor, known without reading the tensors
    metadata  strings of a safetensors header; empty for torch files
    A file is read as what it holds, whatever its suffix.  A `state_dict` nesting in a torch file is unwrapped, and one
    of WRAPPERS before all names is taken off.
    Raises FileNotFoundError, PermissionError, or ValueError when the file is damaged or holds anything but tensors.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = readable_file(path)
        self.metadata: dict[str, str] = {}
        self._before = ""  # of the names in the file
        self._read: Callable[[str], Tensor] | None = self._open()
        self._bytes_read = 0

    def unmap(self) -> None:
        """Let go of the memory of what was read; the next tensor maps the file again."""
        self._read, self._bytes_read = None, 0

    def _open(self) -> Callable[[str], Tensor]:
        """Map the file; the function gives a tensor by its name in the file."""
        if is_safetensors(self.path):
            try:
                file = safe_open(self.path, framework="pt", device="cpu")
                # A slice knows its shape before a byte of it is read.
                shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
                self.metadata, read = dict(file.metadata() or {}), file.get_tensor
            except SafetensorError as error:
                reason = f"({error}); is it complete?"
                raise ValueError(f"{self.path} is not a readable safetensors file {reason}") from error
        else:
            tensors = only_tensors(load_torch_file(self.path, mapped=True), self.path)
            wanted = sum(tensor.nbytes for tensor in tensors.values())  # a stride of 0 makes gigabytes of one number
            if wanted > max(MOST_UNPACKED, 4 * self.path.stat().st_size):
                raise ValueError(f"{self.path}: its tensors stand for {wanted} bytes, more than four times the file's")
            shapes, read = shapes_of(tensors), tensors.__getitem__
        fits = (prefix for prefix in WRAPPERS if all(name.startswith(prefix) for name in shapes))
        self._before = next(fits, "")
        self.shapes = {name.removeprefix(self._before): shape for name, shape in shapes.items()}
        return read

    def __getitem__(self, name: str) -> Tensor:
        """A tensor on the CPU that may share memory with the file: copy it before changing or keeping it."""
        if name not in self.shapes:
            raise KeyError(name)
        if self._bytes_read > REMAP_BYTES:
            self.unmap()
        if self._read is None:
            self._read = self._open()
        tensor = self._read(self._before + name)
        self._bytes_read += tensor.nbytes
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def is_safetensors(path: Path) -> bool:
    """Whether a file is to be read as safetensors: by its beginning, or by its name when that is no torch file's."""
    with open(path, "rb") as file:
        start = file.read(9)  # a length of eight bytes, then JSON
    is_torch = start.startswith((ZIP_MAGIC, PICKLE_MAGIC))
    return start.endswith(b"{", 8) or (path.suffix.lower() == ".safetensors" and not is_torch)


def load_torch_file(path: str | Path, mapped: bool = False) -> dict[str, Any]:
    """Read a torch file that holds a dict of plain values and tensors, on the CPU, running no code from it.

    mapped   leave the tensors on disk until they are used; torch files of before 2020 cannot be mapped and are read
    Raises FileNotFoundError, PermissionError, or ValueError when the file is damaged, names code or holds no dict.
    """
    path = readable_file(path)
    with open(path, "rb") as file:
        is_zip = file.read(len(ZIP_MAGIC)) == ZIP_MAGIC
    misnamed = path.name.endswith(".safetensors")  # torch would believe the name of a path, which alone can be mapped
    try:
        if is_zip:
            check_unpacked(zipfile.ZipFile(path).infolist(), path.stat().st_size)
        with torch.serialization.safe_globals(_lightning_globals()), open(path, "rb") as file:
            source, mapped = (file, False) if misnamed else (path, mapped and is_zip)
            content = torch.load(source, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, EOFError and others for damaged files
        if "GLOBAL" in str(error) or "Unsupported class" in str(error):
            told = next(line.strip() for line in str(error).splitlines() if "GLOBAL" in line or "Unsupported" in line)
            reason = f"it names code that is not allowed to run: {told[:LONGEST_OFFENCE]}"
        elif is_zip:
            reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}; is it complete?"
        else:  # torch's own words are of no use here: it takes any bytes for a pickle, and advises to run it
            reason = "neither the zip archive nor the pickle that torch writes; is it a weight file, and complete?"
        raise ValueError(f"{path} is not a readable torch file ({reason})") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a dict")
    return dict(content)


def _lightning_globals() -> list[Any]:
    """What the pickles of Stable Diffusion 1.x name beside tensors: numbers in numpy's form, and a callback's class.

    The class only labels a dictionary entry, so an empty one stands for it and Lightning need not be installed.
    """
    scalar = array_globals()["numpy", "scalar"]
    stand_in = type("ModelCheckpoint", (), {})
    return [
        (stand_in, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"),
        (scalar, "numpy.core.multiarray.scalar"),
        (scalar, "numpy._core.multiarray.scalar"),
        np.dtype,
        *(type(np.dtype(name)) for name in ("float64", "float32", "int64")),
    ]


def only_tensors(content: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """The tensors of a torch file's content, without a `state_dict` nesting.

    A trainer's notes, such as `global_step`, are left out with a warning; ValueError when anything else is there.
    """
    if isinstance(content.get("state_dict"), Mapping):  # Lightning's and many others' way to save
        content = content["state_dict"]
    notes = [name for name in TRAINERS_NOTES if isinstance(content.get(name), int | float | str)]
    if notes:
        warn_left_out(path, notes)
        content = {name: value for name, value in content.items() if name not in notes}
    other = [str(name) for name, value in content.items() if not isinstance(value, Tensor)]
    if other:
        raise ValueError(f"{path} should hold tensors only, but {first_few(sorted(other))} are something else")
    return dict(content)


def warn_left_out(path: Path, names: Iterable[str]) -> None:
    """Say which entries of a weight file were not read, because no network here has a place for them."""
    text = f"{path}: left out {first_few(names)}, for which no network here has a place"
    warnings.warn(text, RuntimeWarning, stacklevel=3)


def is_finite(tensor: Tensor) -> bool:
    """Whether all values are numbers; the extremes tell, without another tensor of the same size."""
    low, high = tensor.aminmax()
    return bool(torch.isfinite(low) & torch.isfinite(high))


def save_model(path: str | Path, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors, of any device, and string metadata as one safetensors file, whole or not at all.

    The library draws the order of metadata anew each time, so that equal weights would have unequal hashes; its own
    temporary file would lie about when it is killed.  Format: a length of 8 bytes, JSON, all numbers one after another.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # aligned, as the library's
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in order:
        tensor, start = tensors[name], end
        end += tensor.nbytes
        header[name] = {"dtype": TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // 8) * 8)

    def save(stream: BinaryIO) -> None:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            stream.write(tensors[name].reshape(-1).view(torch.uint8).numpy())

    write_whole(path, save)


def load_model_file(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a whole .safetensors or torch weight file.

    returns   tensors by name on the CPU, and the string metadata (empty for torch files)
    Raises FileNotFoundError, PermissionError, or ValueError if unreadable; see WeightFile.
    """
    file = WeightFile(path)
    # Copies: the tensors may share memory with the file, and the caller may change them.
    return {name: tensor.clone() for name, tensor in file.items()}, file.metadata


def shapes_of(state: Mapping[str, Tensor]) -> Shapes:
    """The shape of every tensor, by name."""
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def check_shapes(expected: Shapes, found: Shapes, problem: str, extras: Collection[str] = ()) -> None:
    """Raise ValueError unless exactly the expected names were found, with the expected shapes.

    problem   how the message begins: which file does not fit what
    extras    names that may be there or not, of any shape
    """
    missing, unexpected = expected.keys() - found.keys(), found.keys() - expected.keys() - set(extras)
    other = [f"{name} is {found[name]}, expected {shape}"
             for name, shape in expected.items() if found.get(name, shape) != shape]  # fmt: skip
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": other}
    told = [f"{len(names)} {kind}: {first_few(sorted(names))}" for kind, names in problems.items() if names]
    if told:
        raise ValueError(f"{problem}: {len(expected)} tensors expected, {len(found)} found; {'; '.join(told)}")


def strict_load(module: nn.Module, state: Mapping[str, Tensor], file_name: str | Path) -> None:
    """Copy tensors into a module; every name and shape must agree, nothing is left over.

    The module keeps its dtype and device (values are cast).  Raises ValueError naming the file, the counts found and
    expected, and the first offending names, and then leaves the module untouched.
    """
    own, found = shapes_of(module.state_dict()), shapes_of(state)
    check_shapes(own, found, f"{file_name} does not fit {type(module).__name__}")
    module.load_state_dict(state, strict=True)


def weights_hash(module: nn.Module) -> str:
    """SHA-256 of a module's tensors, hexadecimal: names, types, shapes and numbers, whatever file they came from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
