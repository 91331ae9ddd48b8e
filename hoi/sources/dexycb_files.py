"""Single files of DexYCB (YAML, npz) -> checked values.  Nothing that a file holds is run."""

import zipfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from hoi.sources.frame import Rejected
from hoi.sources.ycb import YCB

HEIGHT, WIDTH = 480, 640


@dataclass(frozen=True)
class Recording:
    """What meta.yml says of one recording."""

    folder: Path
    num_frames: int
    ycb_ids: tuple[int, ...]
    ycb_grasp_ind: int
    mano_side: str
    mano_calib: str


def _read_yaml(path: Path) -> dict[str, Any]:
    """A mapping from a file of the dataset: plain values and the tag python/tuple, nothing that could run code."""
    try:
        import yaml  # comes with open-clip-torch, which needs it for its own downloads
    except ImportError as error:
        raise ValueError(f"reading {path} needs PyYAML: pip install pyyaml") from error

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("tag:yaml.org,2002:python/tuple", Loader.construct_sequence)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; it is part of DexYCB")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader)  # a SafeLoader: no objects are built
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as plain YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a mapping")
    return content


def _checked(path: Path, read, what: str):
    """read() with its errors told as what the file should hold."""
    try:
        return read()
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ValueError(f"{path}: expected {what} ({type(error).__name__}: {error})") from error


def read_meta(folder: Path) -> Recording:
    """meta.yml of a sequence; raises ValueError naming the file when a field is missing or impossible."""
    path = folder / "meta.yml"
    content = _read_yaml(path)

    def read() -> Recording:
        ids, grasped = tuple(int(i) for i in content["ycb_ids"]), int(content["ycb_grasp_ind"])
        side = content["mano_sides"][0]
        if side not in ("right", "left") or not all(1 <= i <= len(YCB) for i in ids) or not 0 <= grasped < len(ids):
            raise ValueError(f"mano_sides {side}, ycb_ids {ids}, ycb_grasp_ind {grasped}")
        return Recording(folder, int(content["num_frames"]), ids, grasped, side, str(content["mano_calib"][0]))

    return _checked(path, read, f"num_frames, ycb_ids from 1 to {len(YCB)}, ycb_grasp_ind into them, mano_sides, "
                    "mano_calib")  # fmt: skip


@lru_cache(maxsize=64)
def read_intrinsics(path: Path) -> np.ndarray:
    """(3, 3) of the colour camera."""
    content = _read_yaml(path)

    def read() -> np.ndarray:
        color = content["color"]
        fx, fy, cx, cy = (float(color[key]) for key in ("fx", "fy", "ppx", "ppy"))
        return np.array([[fx, 0.0, cx], [0.0, fy, cy], [0.0, 0.0, 1.0]])

    return _checked(path, read, "color with fx, fy, ppx, ppy")


@lru_cache(maxsize=64)
def read_betas(path: Path) -> np.ndarray:
    """(10,) hand shape."""
    content = _read_yaml(path)
    return _checked(path, lambda: np.array(content["betas"], dtype=np.float64).reshape(10), "betas, ten numbers")


def read_labels(path: Path, num_objects: int) -> dict[str, np.ndarray]:
    """seg (480, 640), pose_y (num_objects, 3, 4), pose_m (51,), joint_3d (21, 3), joint_2d (21, 2); floats as float64.

    Raises Rejected when the file is missing, damaged or of other shapes.
    """
    shapes = {"seg": (HEIGHT, WIDTH), "pose_y": (num_objects, 3, 4), "pose_m": (1, 51), "joint_3d": (1, 21, 3),
              "joint_2d": (1, 21, 2)}  # fmt: skip
    if not path.is_file():
        raise Rejected("the label file is missing", str(path))
    try:
        with np.load(path, allow_pickle=False) as stored:
            labels = {name: stored[name] for name in shapes}
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise Rejected("the label file is damaged", f"{path}: {error}") from error
    for name, shape in shapes.items():
        if labels[name].shape != shape or not np.isfinite(labels[name]).all():
            raise Rejected("the label file is damaged", f"{path}: {name} is {labels[name].shape}, expected {shape}")
        if name != "seg":
            labels[name] = labels[name].astype(np.float64)
    return labels | {name: labels[name][0] for name in ("pose_m", "joint_3d", "joint_2d")}
