"""Official MANO file -> plain arrays, without running anything that the file contains.  Paper: Sec. 3.1 (MANO).

The file is a Python 2 pickle holding chumpy and SciPy objects.  Here an unpickler that knows seven names reads it; the
objects of those libraries become inert holders of their state, from which the two arrays concerned are computed.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

# Shape of every array that the hand needs; V and F vary between files of this form, never within one.
MANO_SHAPES = {
    "v_template": ("V", 3), "f": ("F", 3), "shapedirs": ("V", 3, 10), "posedirs": ("V", 3, 135),
    "J_regressor": (16, "V"), "weights": ("V", 16), "kintree_table": (2, 16),
}
MANO_VERTICES = 778  # the fingertips are named by vertex number
WHERE = "The file is MANO_RIGHT.pkl of mano_v1_2.zip, https://mano.is.tue.mpg.de (free registration, licence)."


class _Holder:
    """Stands for a chumpy or SciPy object: keeps the pickled state, does nothing."""

    state: dict = {}

    def __setstate__(self, state: dict) -> None:
        self.state = state


class _Ch(_Holder):
    """A chumpy array."""


class _Select(_Holder):
    """A chumpy selection of another array's elements."""


class _SparseColumns(_Holder):
    """A SciPy matrix in compressed sparse column form."""


def _latin1(text: str, encoding: str) -> bytes:
    """How Python 3 writes bytes at protocol 2; a codec of the file's choosing is not looked up."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it encodes bytes as {encoding!r}, expected 'latin1'")
    return text.encode("latin1")


def _allowed() -> dict[tuple[str, str], object]:
    """Everything that a MANO file may name, with the spellings of both Pythons and of old and new numpy and SciPy."""
    reconstruct = np.empty(0).__reduce__()[0]
    return {
        ("numpy", "ndarray"): np.ndarray, ("numpy", "dtype"): np.dtype,
        ("numpy.core.multiarray", "_reconstruct"): reconstruct, ("numpy._core.multiarray", "_reconstruct"): reconstruct,
        ("__builtin__", "set"): set, ("builtins", "set"): set, ("_codecs", "encode"): _latin1,
        ("chumpy.ch", "Ch"): _Ch, ("chumpy.reordering", "Select"): _Select,
        ("scipy.sparse.csc", "csc_matrix"): _SparseColumns, ("scipy.sparse._csc", "csc_matrix"): _SparseColumns,
    }


class _RestrictedUnpickler(pickle.Unpickler):
    """Refuses every global outside _allowed(): a pickle can run code only through a function that it names."""

    def find_class(self, module: str, name: str) -> object:
        allowed = _allowed()
        if (module, name) not in allowed:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which a MANO file does not contain")
        return allowed[module, name]


def read_mano(path: str | Path) -> dict[str, np.ndarray]:
    """Read MANO_RIGHT.pkl, an .npz of the same arrays, or the folder that holds MANO_RIGHT.pkl.

    returns  the arrays of MANO_SHAPES: floats as float64, f and kintree_table as int64 with -1 for the wrist's parent
    Raises FileNotFoundError, or ValueError when the file is damaged, names anything unexpected, lacks an array, has one
    of a wrong shape or with NaN, or is the left hand.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "MANO_RIGHT.pkl"
    if not path.is_file():
        raise FileNotFoundError(f"MANO file {path} does not exist. {WHERE}")
    fields = _read_npz(path) if path.suffix == ".npz" else _read_pickle(path)
    arrays = {}
    for name in MANO_SHAPES:
        if name not in fields:
            raise ValueError(f"MANO file {path} has no {name}; it has {sorted(map(str, fields))}. {WHERE}")
        arrays[name] = _plain_array(fields[name], f"MANO file {path}: {name}")
    _check_shapes(arrays, path)
    arrays["f"] = arrays["f"].astype(np.int64)
    parents = arrays["kintree_table"].astype(np.int64)
    parents[0, 0] = -1  # the file holds 2**32 - 1
    arrays["kintree_table"] = parents
    _check_content(arrays, path)
    return arrays


def _read_pickle(path: Path) -> Mapping:
    try:
        with open(path, "rb") as file:
            fields = _RestrictedUnpickler(file, encoding="latin1").load()
    except (pickle.UnpicklingError, EOFError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a MANO pickle: {error}. Nothing in it was run. {WHERE}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} holds a {type(fields).__name__}, expected a dict of arrays. {WHERE}")
    return fields


def _read_npz(path: Path) -> Mapping:
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files if name in MANO_SHAPES}
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} cannot be read as an .npz of plain arrays: {error}") from error


def _plain_array(value: object, where: str) -> np.ndarray:
    """Evaluate what the holders hold; float64."""
    if isinstance(value, _Holder) and not isinstance(value.state, dict):
        raise ValueError(f"{where}: the state of {type(value).__name__[1:]} is no dict")
    try:
        if isinstance(value, _Ch):
            value = value.state["x"]
        elif isinstance(value, _Select):
            source = _plain_array(value.state["a"], where)
            value = source.ravel()[np.asarray(value.state["idxs"])].reshape(value.state["preferred_shape"])
        elif isinstance(value, _SparseColumns):
            value = _dense(value.state)
        return np.array(value, dtype=np.float64)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ValueError(f"{where} cannot be evaluated ({type(error).__name__}: {error})") from error


def _dense(state: Mapping) -> np.ndarray:
    """Expand a compressed sparse column matrix: column k holds entries indptr[k] to indptr[k + 1]."""
    columns = np.repeat(np.arange(len(state["indptr"]) - 1), np.diff(state["indptr"]))
    dense = np.zeros(state["_shape"])
    np.add.at(dense, (state["indices"], columns), state["data"])
    return dense


def _check_shapes(arrays: Mapping[str, np.ndarray], path: Path) -> None:
    sizes = {"V": arrays["v_template"].shape[0], "F": arrays["f"].shape[0]}
    for name, expected in MANO_SHAPES.items():
        expected = tuple(sizes.get(size, size) for size in expected)
        if arrays[name].shape != expected:
            raise ValueError(f"MANO file {path}: {name} has shape {arrays[name].shape}, expected {expected}")
        if not np.isfinite(arrays[name]).all():
            raise ValueError(f"MANO file {path}: {name} contains NaN or infinity")


def _check_content(arrays: Mapping[str, np.ndarray], path: Path) -> None:
    vertex_count = len(arrays["v_template"])
    if arrays["f"].min() < 0 or arrays["f"].max() >= vertex_count:
        raise ValueError(f"MANO file {path}: a face names vertex {arrays['f'].max()}, there are {vertex_count}")
    if vertex_count != MANO_VERTICES:
        raise ValueError(f"MANO file {path} has {vertex_count} vertices, expected {MANO_VERTICES}")
    parents = arrays["kintree_table"][0, 1:]
    if (parents < 0).any() or (parents >= np.arange(1, 16)).any():
        raise ValueError(f"MANO file {path}: joint parents are {parents.tolist()}; each must come before its child")
    joints = arrays["J_regressor"] @ arrays["v_template"]
    if joints[4, 0] > joints[0, 0]:  # fingers point to -x on the right hand
        raise ValueError(f"{path} is a left hand. Give MANO_RIGHT.pkl: the left hand is made by mirroring it")
