"""Official MANO file -> plain arrays, without running anything that the file contains.  Paper: Sec. 3.1 (MANO).

The file is a Python 2 pickle holding chumpy and SciPy objects.  An unpickler that knows a few names only reads it; the
objects of those libraries become inert holders of their state, from which the arrays concerned are computed.

What comes out is always a right hand, because the left one is made by mirroring (hoi/geometry/hand.py): the published
left file has an error.  Only the finger pose space is read for each side from its own file (read_pca).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from hoi.common.files import array_globals, read_npz, restricted_load

# Shape of every array that the hand needs; V and F vary between files of this form, never within one.
MANO_SHAPES = {
    "v_template": ("V", 3), "f": ("F", 3), "shapedirs": ("V", 3, 10), "posedirs": ("V", 3, 135),
    "J_regressor": (16, "V"), "weights": ("V", 16), "kintree_table": (2, 16),
}
PCA_SHAPES = {"hands_components": (45, 45), "hands_mean": (45,)}  # only for poses given as PCA coefficients
MANO_VERTICES = 778  # another number would be another hand: fingertips and GrabNet's inputs are vertex numbers
OFFICIAL_NAMES = {"right": "MANO_RIGHT.pkl", "left": "MANO_LEFT.pkl"}
WHERE = (
    "The file is MANO_RIGHT.pkl of mano_v1_2.zip, https://mano.is.tue.mpg.de (free registration; its licence forbids "
    "shipping it here). Without a MANO file the built-in hand is used, which needs none."
)
MIRROR = np.array([-1.0, 1.0, 1.0])  # points under the reflection in x = 0
MIRROR_AXIS = np.array([1.0, -1.0, -1.0])  # rotation vectors (pseudo-vectors) under the same reflection


def mirror_rotations(rotations: np.ndarray) -> np.ndarray:
    """(..., 3 K) rotation vectors of K joints under the reflection x -> -x, radians."""
    return rotations * np.tile(MIRROR_AXIS, rotations.shape[-1] // 3)


def check_hand_side(hand_side: str) -> None:
    """Raises ValueError for anything but "right" and "left"."""
    if hand_side not in ("right", "left"):
        raise ValueError(f"hand_side is {hand_side!r}, expected 'right' or 'left'")


class _Holder:
    """Stands for a chumpy or SciPy object: keeps the pickled state, does nothing."""

    state: dict = {}

    def __setstate__(self, state: dict) -> None:
        self.state = state


class _Ch(_Holder):
    """A chumpy array."""


class _Select(_Holder):
    """A chumpy selection of another array's elements; shapedirs is one, of the first ten of many directions."""


class _SparseColumns(_Holder):
    """A SciPy matrix in compressed sparse column form; J_regressor is one."""


# Everything that a MANO file may name, with the spellings of both Pythons and of old and new SciPy.
ALLOWED = array_globals() | {
    ("__builtin__", "set"): set, ("builtins", "set"): set,
    ("chumpy.ch", "Ch"): _Ch, ("chumpy.reordering", "Select"): _Select,
    ("scipy.sparse.csc", "csc_matrix"): _SparseColumns, ("scipy.sparse._csc", "csc_matrix"): _SparseColumns,
}  # fmt: skip


def _read_file(path: str | Path) -> tuple[dict[str, np.ndarray], str, Path]:
    """Arrays as they are in the file, checked; the side of that hand; the file (path may be a folder)."""
    path = Path(path)
    if path.is_dir():
        files = [path / name for name in OFFICIAL_NAMES.values()]
        path = next((file for file in files if file.is_file()), files[0])
    if not path.is_file():
        raise FileNotFoundError(f"MANO file {path} does not exist. {WHERE}")
    known = (*MANO_SHAPES, *PCA_SHAPES)
    fields = read_npz(path, "MANO file", known) if path.suffix.lower() == ".npz" else _read_pickle(path)
    absent = [name for name in MANO_SHAPES if name not in fields]
    if absent:
        raise ValueError(f"MANO file {path} has no {absent[0]}; it has {sorted(map(str, fields))}. {WHERE}")
    arrays = {name: _plain_array(fields[name], f"MANO file {path}: {name}") for name in known if name in fields}
    _check_shapes(arrays, path)
    arrays |= {name: arrays[name].astype(np.int64) for name in ("f", "kintree_table")}
    arrays["kintree_table"][0, 0] = -1  # the file holds 2**32 - 1
    _check_indices(arrays, path)
    joints = arrays["J_regressor"] @ arrays["v_template"]
    # The middle finger's knuckle: fingers point to -x on the right hand, to +x on the left.
    return arrays, "left" if joints[4, 0] > joints[0, 0] else "right", path


def _read_pickle(path: Path) -> Mapping:
    """Fields of an official file, chumpy's and SciPy's objects as holders."""
    try:
        fields = restricted_load(path, ALLOWED, "a MANO pickle")
    except ValueError as error:
        raise ValueError(f"{error}. {WHERE}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} holds a {type(fields).__name__}, expected a dict of arrays. {WHERE}")
    return fields


def _plain_array(value: object, where: str) -> np.ndarray:
    """Evaluate what the holders hold; float64."""
    if isinstance(value, _Holder) and not isinstance(value.state, dict):
        raise ValueError(f"{where}: the state of {type(value).__name__[1:]} is no dict")
    try:
        if isinstance(value, _Ch):
            value = value.state["x"]
        elif isinstance(value, _Select):
            source = _plain_array(value.state["a"], where)
            value = source.ravel()[np.fromiter(value.state["idxs"], np.int64)].reshape(value.state["preferred_shape"])
        elif isinstance(value, _SparseColumns):
            value = _dense(value.state)
        return _numbers(value).astype(np.float64)
    except (LookupError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"{where} cannot be evaluated ({type(error).__name__}: {error})") from error


def _numbers(value: object) -> np.ndarray:
    """An array of numbers as it is; lists are none, for lists in lists can stand for more than fits into memory."""
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "iuf":
        raise TypeError(f"it is {value.dtype if isinstance(value, np.ndarray) else type(value).__name__}, no numbers")
    return value


def _dense(state: Mapping) -> np.ndarray:
    """Expand a compressed sparse column matrix: column k holds entries indptr[k] to indptr[k + 1]."""
    starts, rows, data = (_numbers(state[name]) for name in ("indptr", "indices", "data"))
    if (shape := tuple(state["_shape"])) != (16, MANO_VERTICES):
        raise ValueError(f"its shape is {shape}, expected (16, {MANO_VERTICES})")
    dense = np.zeros(shape)
    np.add.at(dense, (rows, np.searchsorted(starts, np.arange(len(data)), side="right") - 1), data)
    return dense


def _check_shapes(arrays: Mapping[str, np.ndarray], path: Path) -> None:
    """All as in MANO_SHAPES and PCA_SHAPES, with one V and one F, and finite."""
    sizes = {"V": arrays["v_template"].shape[:1], "F": arrays["f"].shape[:1]}
    for name, expected in {**MANO_SHAPES, **PCA_SHAPES}.items():
        if name not in arrays:
            continue
        expected = tuple(size for sides in expected for size in sizes.get(sides, (sides,)))
        if arrays[name].shape != expected:
            raise ValueError(f"MANO file {path}: {name} has shape {arrays[name].shape}, expected {expected}")
        if not np.isfinite(arrays[name]).all():
            raise ValueError(f"MANO file {path}: {name} contains NaN or infinity")


def _check_indices(arrays: Mapping[str, np.ndarray], path: Path) -> None:
    """Faces name vertices that exist, and joints parents that come before them."""
    vertex_count = len(arrays["v_template"])
    if arrays["f"].min() < 0 or arrays["f"].max() >= vertex_count:
        raise ValueError(f"MANO file {path}: a face names vertex {arrays['f'].max()}, there are {vertex_count}")
    if vertex_count != MANO_VERTICES:
        raise ValueError(f"MANO file {path} has {vertex_count} vertices, expected {MANO_VERTICES}")
    parents = arrays["kintree_table"][0, 1:]
    if (parents < 0).any() or (parents >= np.arange(1, 16)).any():
        raise ValueError(f"MANO file {path}: joint parents are {parents.tolist()}; each must come before its child")


def read_mano(path: str | Path) -> dict[str, np.ndarray]:
    """Read MANO_RIGHT.pkl, an .npz of the same arrays, or the folder that holds it.

    returns  the arrays of MANO_SHAPES and, where the file has them, of PCA_SHAPES: floats as float64, f and
             kintree_table as int64 with -1 for the wrist's parent
    Raises FileNotFoundError, or ValueError when the file is damaged, names anything unexpected, lacks an array, has
    one of a wrong shape or with NaN, or is of a left hand.
    """
    arrays, hand_side, path = _read_file(path)
    if hand_side == "left":  # in MANO_LEFT.pkl the x of the shape directions has the wrong sign
        raise ValueError(f"MANO file {path} is a left hand, whose published shapes are wrong; give MANO_RIGHT.pkl of "
                         "the same archive: both hands are made of it")  # fmt: skip
    return arrays


def read_pca(path: str | Path, hand_side: str) -> tuple[np.ndarray, np.ndarray]:
    """The finger pose space of one hand: its axes (45, 45) in rows and its mean pose (45,).

    path     as in read_mano.  Each side has a file of its own; the one not named by path is looked for beside it.
             If it is not there, the mirror image of the other serves.
    returns  radians, axis-angle of the 15 finger joints in MANO's order, in that side's own frame; see
             hoi.geometry.hand.pca_to_hand_pose
    Raises as read_mano, and ValueError when the file holds no pose space or hand_side is unknown.
    """
    check_hand_side(hand_side)
    arrays, file_side, path = _read_file(path)
    beside = path.with_name(OFFICIAL_NAMES[hand_side])
    if file_side != hand_side and beside.is_file():
        arrays, file_side, path = _read_file(beside)
    absent = PCA_SHAPES.keys() - arrays.keys()
    if absent:
        raise ValueError(f"MANO file {path} has no {' and no '.join(sorted(absent))}: PCA coefficients need both")
    pose_space = arrays["hands_components"], arrays["hands_mean"]
    return pose_space if file_side == hand_side else tuple(map(mirror_rotations, pose_space))
