"""The 21 YCB objects of DexYCB and HO-3D.  Model folder -> ObjectMesh in the frame that their poses take.

Single files of DexYCB (YAML, npz) -> checked values.  Nothing that a file holds is run.

DexYCB.  Its folder -> SourceFrame number i.  Paper: Sec. 4, the dataset it trains on.

The layout, the splits and the conventions are those of the dataset's own toolkit: seg holds YCB ids and 255 for the
hand, poses take model points to the OpenCV camera, hands are PCA coefficients about a mean pose (manopth, 45 of them).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from hoi.common.files import read_npz
from hoi.geometry.hand import HandParams, pca_to_hand_pose
from hoi.geometry.mano import read_pca
from hoi.geometry.objects import ObjectMesh, read_mesh
from hoi.sources.frame import PosedObject, Rejected, SourceFrame, read_picture

# Name of each model and what captions call it; ids run from 1.
YCB = (
    ("002_master_chef_can", "can"), ("003_cracker_box", "cracker box"), ("004_sugar_box", "sugar box"),
    ("005_tomato_soup_can", "soup can"), ("006_mustard_bottle", "mustard bottle"), ("007_tuna_fish_can", "tuna can"),
    ("008_pudding_box", "pudding box"), ("009_gelatin_box", "gelatin box"), ("010_potted_meat_can", "meat can"),
    ("011_banana", "banana"), ("019_pitcher_base", "pitcher"), ("021_bleach_cleanser", "bleach bottle"),
    ("024_bowl", "bowl"), ("025_mug", "mug"), ("035_power_drill", "power drill"), ("036_wood_block", "wood block"),
    ("037_scissors", "scissors"), ("040_large_marker", "marker"), ("051_large_clamp", "clamp"),
    ("052_extra_large_clamp", "large clamp"), ("061_foam_brick", "foam brick"),
)  # fmt: skip
YCB_NOUNS = dict(YCB)


def model_path(models: str | Path, name: str) -> Path:
    """Where a model's mesh is."""
    return Path(models) / name / "textured_simple.obj"


@lru_cache(maxsize=32)
def load_ycb(models: str, name: str) -> ObjectMesh | None:
    """A YCB model in its own frame and metres, as the poses of DexYCB and HO-3D take it; None when it is not there."""
    path = model_path(models, name)
    if not path.is_file():
        return None
    vertices, faces, notes = read_mesh(path)
    extent = float(np.ptp(vertices, axis=0).max())
    if not 0.01 <= extent <= 0.6:
        raise ValueError(f"{path} is {extent:g} units long; expected the YCB model in metres")
    vertices = vertices.astype(np.float32).astype(np.float64)
    return ObjectMesh(vertices, faces, name, YCB_NOUNS.get(name, name), str(path), np.eye(4), False, tuple(notes))


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
        labels = read_npz(path, "label file", tuple(shapes))
    except ValueError as error:
        raise Rejected("the label file is damaged", str(error)) from error
    for name, shape in shapes.items():
        if name not in labels:
            raise Rejected("the label file is damaged", f"{path} has no {name}")
        if labels[name].shape != shape or not np.isfinite(labels[name]).all():
            raise Rejected("the label file is damaged", f"{path}: {name} is {labels[name].shape}, expected {shape}")
        if name != "seg":
            labels[name] = labels[name].astype(np.float64)
    return labels | {name: labels[name][0] for name in ("pose_m", "joint_3d", "joint_2d")}


CAMERAS = (
    "836212060125", "839512060362", "840412060917", "841412060263", "932122060857", "932122060861", "932122061900",
    "932122062010",
)  # fmt: skip
HAND_LABEL = 255
SEQUENCES_A_SUBJECT, SUBJECTS = 100, 10
# Which subjects (by number), cameras (by place in CAMERAS) and object slots (sequence // 5) each part has; the takes of
# s0 (sequence % 5) come beside.  Source: the toolkit's table of its setups.
ALL_SUBJECTS, ALL_CAMERAS, ALL_SLOTS, ALL_TAKES = range(1, 11), range(8), range(20), range(5)
TRAIN_SLOTS = tuple(slot for slot in ALL_SLOTS if slot not in (3, 7, 11, 15, 19))
SPLITS = {
    ("s0", "train"): (ALL_SUBJECTS, ALL_CAMERAS, ALL_SLOTS, range(4)),
    ("s0", "val"): ((1, 2), ALL_CAMERAS, ALL_SLOTS, (4,)),
    ("s0", "test"): (range(3, 11), ALL_CAMERAS, ALL_SLOTS, (4,)),
    ("s1", "train"): ((*range(1, 7), 10), ALL_CAMERAS, ALL_SLOTS, ALL_TAKES),
    ("s1", "val"): ((7,), ALL_CAMERAS, ALL_SLOTS, ALL_TAKES),
    ("s1", "test"): ((8, 9), ALL_CAMERAS, ALL_SLOTS, ALL_TAKES),
    ("s2", "train"): (ALL_SUBJECTS, range(6), ALL_SLOTS, ALL_TAKES),
    ("s2", "val"): (ALL_SUBJECTS, (6,), ALL_SLOTS, ALL_TAKES),
    ("s2", "test"): (ALL_SUBJECTS, (7,), ALL_SLOTS, ALL_TAKES),
    ("s3", "train"): (ALL_SUBJECTS, ALL_CAMERAS, TRAIN_SLOTS, ALL_TAKES),
    ("s3", "val"): (ALL_SUBJECTS, ALL_CAMERAS, (3, 19), ALL_TAKES),
    ("s3", "test"): (ALL_SUBJECTS, ALL_CAMERAS, (7, 11, 15), ALL_TAKES),
}


class DexYCB:
    """The frames of a DexYCB folder, in order of subject, sequence, camera, frame.

    root            folder with 20200709-subject-01 ..., calibration and models
    split           ("s0", "train") and the like, or None for everything
    subjects        names or numbers from 1; None: all.  sequences: names of their folders.  cameras: serial numbers
    frames          slice of the frame numbers of every sequence
    mano_path       MANO file; without it hand_params is None, since finger poses are coordinates in MANO's pose space
    models          folder of <name>/textured_simple.obj; None: root/models
    all_objects     label every object of the scene instead of the grasped one
    Raises FileNotFoundError or ValueError naming what is missing, and for a split of an incomplete subject: a split
    goes by a sequence's place among the subject's hundred.
    """

    name = "DexYCB"
    has_geometry = True
    has_labels = True
    is_scenery = False

    def __init__(
        self,
        root: str | Path,
        split: Sequence[str] | None = None,
        subjects: Sequence[str] | None = None,
        sequences: Sequence[str] | None = None,
        cameras: Sequence[str] | None = None,
        frames: slice = slice(None),
        mano_path: str | Path | None = None,
        models: str | Path | None = None,
        all_objects: bool = False,
    ) -> None:
        self.root, self.mano_path, self.all_objects = Path(root), mano_path, all_objects
        self.models = Path(models) if models else self.root / "models"
        if not (self.root / "calibration").is_dir():
            raise FileNotFoundError(f"{self.root} has no folder calibration: it is not the root of DexYCB")
        self.cameras = _chosen("camera", cameras, CAMERAS)
        self.sequences: list[Recording] = []
        rows = []
        for folder, split_cameras in self._sequence_folders(split, subjects, sequences):
            sequence = read_meta(folder)
            for camera in (number for number, serial in enumerate(CAMERAS)
                           if serial in self.cameras and number in split_cameras):  # fmt: skip
                numbers = range(sequence.num_frames)[frames]
                rows += [(len(self.sequences), camera, number) for number in numbers]
            self.sequences.append(sequence)
        self.rows = np.array(rows, dtype=np.int32).reshape(-1, 3)

    def __len__(self) -> int:
        return len(self.rows)

    def missing_models(self) -> list[str]:
        """Files of the objects that frames hold and that are not there."""
        used = {sequence.ycb_ids[sequence.ycb_grasp_ind] for sequence in self.sequences}
        if self.all_objects:
            used = {number for sequence in self.sequences for number in sequence.ycb_ids}
        paths = [model_path(self.models, YCB[number - 1][0]) for number in sorted(used)]
        return [str(path) for path in paths if not path.is_file()]

    def _sequence_folders(self, split, subjects, sequences) -> list[tuple[Path, Sequence[int]]]:
        """Folders of the chosen sequences, each with the cameras that the split allows."""
        found = sorted(path for path in self.root.glob("*-subject-*") if path.is_dir())
        if not found:
            raise FileNotFoundError(f"{self.root} has no folder like 20200709-subject-01: it is not the root of DexYCB")
        names = {path.name: path for path in found}
        wanted = _chosen_subjects(subjects, list(names))
        parts = SPLITS[_split_name(split)] if split else (ALL_SUBJECTS, ALL_CAMERAS, ALL_SLOTS, ALL_TAKES)
        result, seen = [], set()
        for name in wanted:
            if int(name[-2:]) not in parts[0]:
                continue
            folders = sorted(path for path in names[name].iterdir() if (path / "meta.yml").is_file())
            if split and len(folders) != SEQUENCES_A_SUBJECT:
                raise ValueError(
                    f"{names[name]} has {len(folders)} sequences; a split goes by their place among all "
                    f"{SEQUENCES_A_SUBJECT}. Complete the subject, or choose frames without a split"
                )
            for number, folder in enumerate(folders):
                if split and (number // 5 not in parts[2] or number % 5 not in parts[3]):
                    continue
                seen.add(folder.name)
                if sequences is None or folder.name in sequences:
                    result.append((folder, parts[1]))
        missing = set(sequences or ()) - seen
        if missing:
            raise ValueError(f"no sequence {', '.join(sorted(missing))} among the chosen subjects of {self.root}")
        return result

    def read(self, number: int) -> SourceFrame:
        """Frame `number`; raises Rejected for one that gives no record, ValueError for damaged calibration."""
        place, camera, frame = (int(value) for value in self.rows[number])
        sequence, serial = self.sequences[place], CAMERAS[camera]
        folder = sequence.folder / serial
        labels = read_labels(folder / f"labels_{frame:06d}.npz", len(sequence.ycb_ids))
        grasped = sequence.ycb_ids[sequence.ycb_grasp_ind]
        if (labels["joint_2d"] == -1).all() or not labels["pose_m"].any():
            raise Rejected("the source has no hand in it")
        if not labels["pose_y"][sequence.ycb_grasp_ind].any():
            raise Rejected("the source has no pose of the grasped object")
        image = read_picture(folder / f"color_{frame:06d}.jpg", "the picture")
        if image.shape != (HEIGHT, WIDTH, 3):
            raise Rejected("the picture has another size", f"{image.shape[1]}x{image.shape[0]}, not {WIDTH}x{HEIGHT}")
        seg = labels["seg"]
        label_map = np.zeros(seg.shape, dtype=np.uint8)
        label_map[(seg > 0) & (seg != HAND_LABEL) if self.all_objects else seg == grasped] = 2
        label_map[seg == HAND_LABEL] = 1
        return SourceFrame(
            name=f"{sequence.folder.parent.name}/{sequence.folder.name}/{serial}/{frame:06d}",
            source=self.name, image=image, noun=YCB[grasped - 1][1], label_map=label_map,
            keypoints_3d=labels["joint_3d"], keypoints_2d=labels["joint_2d"],
            keypoint_convention="openpose21, fingertips of manopth",
            intrinsics=read_intrinsics(self.root / "calibration/intrinsics" / f"{serial}_640x480.yml"),
            depth=self._depth(folder / f"aligned_depth_to_color_{frame:06d}.png"),
            hand_params=self._hand_params(sequence, labels["pose_m"]), hand_side=sequence.mano_side,
            objects=self._objects(sequence, labels["pose_y"]),
        )  # fmt: skip

    def _depth(self, path: Path) -> np.ndarray | None:
        return read_picture(path, "the depth file", None).astype(np.float32) / 1000 if path.is_file() else None

    def _hand_params(self, sequence: Recording, pose_m: np.ndarray) -> HandParams | None:
        """Rotation about the rest wrist, then translation: the same meaning as ours, so only the fingers change."""
        if self.mano_path is None:
            return None
        components, mean = _pca(str(self.mano_path), sequence.mano_side)
        hand_betas = read_betas(self.root / "calibration" / f"mano_{sequence.mano_calib}" / "mano.yml")
        fingers = pca_to_hand_pose(pose_m[3:48], components, mean)
        return HandParams(pose_m[:3], fingers, pose_m[48:51], hand_betas, sequence.mano_side)

    def _objects(self, sequence: Recording, pose_y: np.ndarray) -> tuple[PosedObject, ...]:
        first = sequence.ycb_grasp_ind
        order = [first, *(k for k in range(len(pose_y)) if k != first)] if self.all_objects else [first]
        found = []
        for k in order:
            if pose_y[k].any():  # all zeros: not in this picture
                mesh = load_ycb(str(self.models), YCB[sequence.ycb_ids[k] - 1][0])
                found.append(PosedObject(mesh, np.vstack([pose_y[k], [0, 0, 0, 1]])))
        return tuple(found)


def _split_name(split: Sequence[str]) -> tuple[str, str]:
    if tuple(split) not in SPLITS:
        raise ValueError(f"DexYCB has no split {' '.join(split)!r}; expected s0, s1, s2 or s3, then train, val or test")
    return tuple(split)


def _chosen(what: str, wanted: Sequence[str] | None, known: Sequence[str]) -> list[str]:
    unknown = [name for name in wanted or () if name not in known]
    if unknown:
        raise ValueError(f"DexYCB has no {what} {', '.join(unknown)}; there are {', '.join(known)}")
    return list(known) if wanted is None else [name for name in known if name in wanted]


def _chosen_subjects(subjects: Sequence[str] | None, names: list[str]) -> list[str]:
    by_number = {str(int(name[-2:])): name for name in names}
    return _chosen("subject", None if subjects is None else [by_number.get(s, s) for s in subjects], names)


@lru_cache(maxsize=4)
def _pca(mano_path: str, hand_side: str) -> tuple[np.ndarray, np.ndarray]:
    return read_pca(mano_path, hand_side)
