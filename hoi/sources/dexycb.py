"""DexYCB, the dataset that the paper trains on: its folder -> SourceFrame number i.  Paper: Sec. 4.

In the order of reading: the 21 YCB models; single files (YAML, npz) -> checked values; what the published splits take;
the dataset.  Nothing that a file holds is run.

Layout, splits and conventions are those of the dataset's own toolkit: seg holds YCB ids and 255 for the hand, poses
take model points to the OpenCV camera, hands are 45 PCA coefficients about a mean pose, as manopth takes them.
"""

from collections.abc import Collection, Sequence
from dataclasses import astuple, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hoi.common.files import DAMAGE, content_expected, read_npz, read_text
from hoi.geometry.hand import HandParams, pca_to_hand_pose
from hoi.geometry.mano import read_pca
from hoi.geometry.mesh_files import read_mesh
from hoi.geometry.objects import ObjectMesh
from hoi.sources.frame import (
    MOST_NUMBER,
    Rejected,
    Source,
    SourceFrame,
    read_millimetres,
    read_or_reject,
    read_picture,
)

# Name of each model, and what captions call it: a plain noun, without the catalogue's number and brands, which text
# encoders know.  Ids run from 1.
YCB = (
    ("002_master_chef_can", "can"), ("003_cracker_box", "cracker box"), ("004_sugar_box", "sugar box"),
    ("005_tomato_soup_can", "soup can"), ("006_mustard_bottle", "mustard bottle"), ("007_tuna_fish_can", "tuna can"),
    ("008_pudding_box", "pudding box"), ("009_gelatin_box", "gelatin box"), ("010_potted_meat_can", "meat can"),
    ("011_banana", "banana"), ("019_pitcher_base", "pitcher"), ("021_bleach_cleanser", "bleach bottle"),
    ("024_bowl", "bowl"), ("025_mug", "mug"), ("035_power_drill", "power drill"), ("036_wood_block", "wood block"),
    ("037_scissors", "scissors"), ("040_large_marker", "marker"), ("051_large_clamp", "clamp"),
    ("052_extra_large_clamp", "large clamp"), ("061_foam_brick", "foam brick"),
)  # fmt: skip
MODEL_FILE = "textured_simple.obj"  # in a folder of the model's name
# In metres.  The models measure some 5 to 30 cm: one in millimetres or centimetres is far outside, whatever it shows.
MODEL_EXTENT = (0.01, 0.6)

HEIGHT, WIDTH = 480, 640  # of all pictures and labels
HAND_LABEL = 255  # in seg, for hands of both sides
MOST_YAML, MOST_FRAMES = 1 << 16, 10_000  # bytes of a .yml and frames of a recording; they have hundreds
# Serial numbers in the toolkit's order, by which splits name cameras.
CAMERAS = (
    "836212060125", "839512060362", "840412060917", "841412060263", "932122060857", "932122060861", "932122061900",
    "932122062010",
)  # fmt: skip
SEQUENCES_A_SUBJECT, TAKES_AN_OBJECT = 100, 5
_read_pca = lru_cache(maxsize=4)(read_pca)  # once in each process, the file holds megabytes


@lru_cache(maxsize=32)  # all 21; and the renderer knows a mesh again by its identity
def load_ycb(models: Path, number: int) -> ObjectMesh | None:
    """The YCB model of an id in its own frame and metres, as the poses take it; None when it is not there.

    Raises ValueError for a mesh whose size cannot be metres.
    """
    name, noun = YCB[number - 1]
    path = models / name / MODEL_FILE
    if not path.is_file():
        return None
    file = read_mesh(path)
    extent = float(np.ptp(file.vertices, axis=0).max())
    if not MODEL_EXTENT[0] <= extent <= MODEL_EXTENT[1]:
        raise ValueError(f"{path} is {extent:g} units long; expected the YCB model in metres")
    vertices = file.vertices.astype(np.float32).astype(np.float64)  # what the dataset folder's copy will hold
    return ObjectMesh(vertices, file.faces, name, noun, str(path), np.eye(4), False, tuple(file.notes))


@dataclass(frozen=True)
class Recording:
    """What meta.yml says of one sequence, which eight cameras saw.

    ycb_ids        of the objects on the table, in the order of pose_y
    ycb_grasp_ind  place of the grasped one among them
    mano_side      right or left
    mano_calib     name of the hand's calibration, opaque
    """

    folder: Path
    num_frames: int
    ycb_ids: tuple[int, ...]
    ycb_grasp_ind: int
    mano_side: str
    mano_calib: str


def read_yaml(path: Path) -> dict[str, Any]:
    """A mapping from a file of the dataset: plain values and the tag python/tuple, nothing that could run code.

    Raises FileNotFoundError, or ValueError when PyYAML is missing or the file holds anything else.
    """
    try:
        import yaml  # comes with open-clip-torch, which needs it for its own downloads
    except ImportError as error:
        raise ValueError(f"reading {path} needs PyYAML: pip install pyyaml") from error

    class Loader(yaml.SafeLoader):  # a class of our own: the constructor must not be added to everybody's
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):  # a kilobyte of them, each in the next, stands for gigabytes
                raise ValueError("it repeats values by aliases, which DexYCB's files do not")
            return super().compose_node(parent, index)

    # The calibration files carry this tag, which a plain SafeLoader refuses.
    Loader.add_constructor("tag:yaml.org,2002:python/tuple", Loader.construct_sequence)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; it is part of DexYCB")
    try:
        if path.stat().st_size > MOST_YAML:  # PyYAML reads 50 kB a second
            raise ValueError(f"it has more than {MOST_YAML >> 10} kB, expected a few hundred bytes")
        content = yaml.load(read_text(path), Loader)
    except (yaml.YAMLError, *DAMAGE) as error:
        raise ValueError(f"{path} cannot be read as plain YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a mapping")
    return content


def read_recording(folder: Path) -> Recording:
    """meta.yml of a sequence; raises ValueError naming the file when a field is missing or impossible."""
    path = folder / "meta.yml"
    content = read_yaml(path)
    # One hand a sequence, and lists of one all the same.
    fields = (f"num_frames, ycb_ids from 1 to {len(YCB)}, ycb_grasp_ind into them, mano_sides, mano_calib, "
              f"at most {MOST_FRAMES} frames")  # fmt: skip
    with content_expected(path, fields):
        ids, grasped = tuple(int(i) for i in content["ycb_ids"]), int(content["ycb_grasp_ind"])
        side = content["mano_sides"][0]
        frames = int(content["num_frames"])
        known = side in ("right", "left") and all(1 <= i <= len(YCB) for i in ids) and 0 <= frames <= MOST_FRAMES
        if not known or not 0 <= grasped < len(ids):
            raise ValueError(f"num_frames {frames}, mano_sides {side}, ycb_ids {ids}, ycb_grasp_ind {grasped}")
        return Recording(folder, frames, ids, grasped, side, str(content["mano_calib"][0]))


@lru_cache(maxsize=64)  # more than there are cameras: one file serves half a million frames
def read_intrinsics(path: Path) -> np.ndarray:
    """(3, 3) of the colour camera, pixels; depth pictures are aligned to it.  Raises as read_yaml, or ValueError."""
    content = read_yaml(path)
    with content_expected(path, "color with fx, fy, ppx, ppy"):
        fx, fy, cx, cy = (float(content["color"][key]) for key in ("fx", "fy", "ppx", "ppy"))
        if not (min(fx, fy) > 0 and np.abs([fx, fy, cx, cy]).max() < MOST_NUMBER):
            raise ValueError(f"fx {fx}, fy {fy}, ppx {cx}, ppy {cy}")
        return np.array([[fx, 0.0, cx], [0.0, fy, cy], [0.0, 0.0, 1.0]])


@lru_cache(maxsize=64)
def read_hand_betas(path: Path) -> np.ndarray:
    """(10,) MANO shape of a subject's hand.  Raises as read_yaml, or ValueError."""
    content = read_yaml(path)
    with content_expected(path, "betas, ten numbers"):
        hand_betas = np.array(content["betas"], dtype=np.float64).reshape(10)
        if not (np.abs(hand_betas) < MOST_NUMBER).all():
            raise ValueError(f"betas {hand_betas.tolist()}")
        return hand_betas


def read_labels(path: Path, num_objects: int) -> dict[str, np.ndarray]:
    """The annotation of one picture.

    num_objects  in the recording
    returns      seg (480, 640) uint8; float64: pose_y (num_objects, 3, 4), pose_m (51,), joint_3d (21, 3),
                 joint_2d (21, 2)
    Raises Rejected when the file is missing, damaged or of other shapes.
    """
    shapes = {"seg": (HEIGHT, WIDTH), "pose_y": (num_objects, 3, 4), "pose_m": (1, 51), "joint_3d": (1, 21, 3),
              "joint_2d": (1, 21, 2)}  # fmt: skip
    labels = read_or_reject(path, "the label file", lambda path: read_npz(path, "label file", tuple(shapes)))
    for name, shape in shapes.items():
        if name not in labels:
            raise Rejected("the label file is damaged", f"{path} has no {name}")
        if labels[name].shape != shape or not (np.abs(labels[name]) < MOST_NUMBER).all():
            found = f"{path}: {name} is {labels[name].shape}"
            raise Rejected("the label file is damaged", f"{found}, expected {shape} finite numbers")
        if name != "seg":
            labels[name] = labels[name].astype(np.float64)
    turns = labels["pose_y"][..., :3]
    rigid = np.abs(turns @ turns.swapaxes(1, 2) - np.eye(3)).max(axis=(1, 2)) < 1e-3
    if not (rigid | ~labels["pose_y"].any(axis=(1, 2))).all():  # zeros: it is not in the picture
        raise Rejected("the label file is damaged", f"{path}: a matrix of pose_y is no rotation")
    return labels | {name: labels[name][0] for name in ("pose_m", "joint_3d", "joint_2d")}  # of the only hand


class SplitPart(NamedTuple):
    """What a part of a split takes; the defaults are everything.

    A subject's hundred sequences, in order of name, are twenty objects with five takes each.

    subjects  numbers from 1
    cameras   places in CAMERAS
    objects   sequence // 5
    takes     sequence % 5
    """

    subjects: Collection[int] = range(1, 11)
    cameras: Collection[int] = range(8)
    objects: Collection[int] = range(20)
    takes: Collection[int] = range(5)


# s0 has seen everything, s1 no subject, s2 no camera, s3 no object of its test part.  Source: the toolkit's table.
SPLITS = {
    ("s0", "train"): SplitPart(takes=range(4)),
    ("s0", "val"): SplitPart(subjects=(1, 2), takes=(4,)),
    ("s0", "test"): SplitPart(subjects=range(3, 11), takes=(4,)),
    ("s1", "train"): SplitPart(subjects=(*range(1, 7), 10)),
    ("s1", "val"): SplitPart(subjects=(7,)),
    ("s1", "test"): SplitPart(subjects=(8, 9)),
    ("s2", "train"): SplitPart(cameras=range(6)),
    ("s2", "val"): SplitPart(cameras=(6,)),
    ("s2", "test"): SplitPart(cameras=(7,)),
    ("s3", "train"): SplitPart(objects=[k for k in range(20) if k % 4 != 3]),
    ("s3", "val"): SplitPart(objects=(3, 19)),
    ("s3", "test"): SplitPart(objects=(7, 11, 15)),
}


class DexYCB(Source):
    """The frames of a DexYCB folder, in order of subject, sequence, camera, frame.

    root            folder with 20200709-subject-01 ..., calibration and models
    split           ("s0", "train") and the like, or None for everything
    subjects        names or numbers from 1; None: all.  sequences: names of their folders.  cameras: serial numbers
    frames          slice of the frame numbers of every sequence
    mano_path       MANO file; without it hand_params is None, since finger poses are coordinates in MANO's pose space
    models          folder of <name>/textured_simple.obj; None: root/models
    Raises FileNotFoundError or ValueError naming what is missing, and for a split of an incomplete subject: a split
    goes by a sequence's place among the subject's hundred.
    """

    name = "DexYCB"

    def __init__(
        self, root: str | Path, split: Sequence[str] | None = None, subjects: Sequence[str] | None = None,
        sequences: Sequence[str] | None = None, cameras: Sequence[str] | None = None, frames: slice = slice(None),
        mano_path: str | Path | None = None, models: str | Path | None = None,
    ) -> None:  # fmt: skip
        self.root, self.mano_path = Path(root), mano_path
        self.models = Path(models) if models else self.root / "models"
        if not (self.root / "calibration").is_dir():
            raise FileNotFoundError(f"{self.root} has no folder calibration: it is not the root of DexYCB")
        if split and tuple(split) not in SPLITS:
            raise ValueError(
                f"DexYCB has no split {' '.join(split)!r}; expected s0, s1, s2 or s3, then train, val or test"
            )
        part = SPLITS[tuple(split)] if split else SplitPart()
        serials = _chosen("camera", cameras, CAMERAS)
        places = [k for k, serial in enumerate(CAMERAS) if serial in serials and k in part.cameras]
        self.recordings = [read_recording(folder) for folder in self._folders(part, subjects, sequences)]
        # Three numbers a frame instead of objects: the dataset has half a million, and every worker gets a copy.
        rows = [(k, camera, frame) for k, recording in enumerate(self.recordings) for camera in places
                for frame in range(recording.num_frames)[frames]]  # fmt: skip
        self.rows = np.array(rows, dtype=np.int32).reshape(-1, 3)

    def _folders(
        self, part: SplitPart, subjects: Sequence[str] | None, sequences: Sequence[str] | None
    ) -> list[Path]:
        """Folders of the chosen sequences among those that the part of the split takes."""
        found = {path.name: path for path in sorted(self.root.glob("*-subject-*")) if path.is_dir()}
        if not found:
            raise FileNotFoundError(f"{self.root} has no folder like 20200709-subject-01: it is not the root of DexYCB")
        # "20200709-subject-01" is subject 1 for those who read the paper of the dataset.
        by_number = {str(int(name[-2:])): name for name in found}
        wanted = None if subjects is None else [by_number.get(subject, subject) for subject in subjects]
        allowed = [path for name in _chosen("subject", wanted, list(found)) if int(name[-2:]) in part.subjects
                   for path in sequences_of(found[name], part)]  # fmt: skip
        if missing := set(sequences or ()) - {path.name for path in allowed}:
            raise ValueError(f"no sequence {', '.join(sorted(missing))} among the chosen subjects of {self.root}")
        return [path for path in allowed if sequences is None or path.name in sequences]

    def frame_name(self, number: int) -> str:
        """Subject, sequence, camera and frame."""
        place, camera, frame = (int(value) for value in self.rows[number])
        folder = self.recordings[place].folder
        return f"{folder.parent.name}/{folder.name}/{CAMERAS[camera]}/{frame:06d}"

    def listing(self) -> str:
        """What the recordings say of themselves, and the chosen frames of each."""
        told = [(each.folder.parent.name, each.folder.name, *astuple(each)[1:]) for each in self.recordings]
        return f"{told}{self.rows.tolist()}"

    def missing_models(self) -> list[str]:
        """Files of the grasped objects that are not there."""
        grasped = {recording.ycb_ids[recording.ycb_grasp_ind] for recording in self.recordings}
        paths = [self.models / YCB[i - 1][0] / MODEL_FILE for i in sorted(grasped)]
        return [str(path) for path in paths if not path.is_file()]

    def read(self, number: int) -> SourceFrame:
        """Frame `number`; raises Rejected for one that gives no record, ValueError for damaged calibration."""
        place, camera, frame = (int(value) for value in self.rows[number])
        recording, serial = self.recordings[place], CAMERAS[camera]
        folder = recording.folder / serial
        # Labels first: they say whether the pictures are worth reading.
        labels = read_labels(folder / f"labels_{frame:06d}.npz", len(recording.ycb_ids))
        # How the toolkit marks what is not in the picture: -1 for joints, zeros for poses.
        if (labels["joint_2d"] == -1).all() or not labels["pose_m"].any():
            seen = (labels["seg"] == HAND_LABEL).any()
            raise Rejected("the source has no pose of the hand in it" if seen else "the source has no hand in it")
        pose = labels["pose_y"][recording.ycb_grasp_ind]
        if not pose.any():
            raise Rejected("the source has no pose of the grasped object")
        image = read_picture(folder / f"color_{frame:06d}.jpg", "the picture")
        if image.shape != (HEIGHT, WIDTH, 3):
            raise Rejected("the picture has another size", f"{image.shape[1]}x{image.shape[0]}, not {WIDTH}x{HEIGHT}")
        seg, grasped = labels["seg"], recording.ycb_ids[recording.ycb_grasp_ind]
        label_map = np.zeros(seg.shape, dtype=np.uint8)
        label_map[seg == grasped], label_map[seg == HAND_LABEL] = 2, 1  # no others: the text names one object
        depth_path = folder / f"aligned_depth_to_color_{frame:06d}.png"
        return SourceFrame(
            name=self.frame_name(number),
            image=image, noun=YCB[grasped - 1][1], label_map=label_map,
            keypoints_3d=labels["joint_3d"], keypoints_2d=labels["joint_2d"],
            keypoint_convention="openpose21, fingertips of manopth",
            intrinsics=read_intrinsics(self.root / "calibration/intrinsics" / f"{serial}_640x480.yml"),
            depth=read_millimetres(depth_path) if depth_path.is_file() else None,
            hand_params=self._hand_params(recording, labels["pose_m"]), hand_side=recording.mano_side,
            object_mesh=load_ycb(self.models, grasped), object_to_camera=np.vstack([pose, [0, 0, 0, 1]]),
        )  # fmt: skip

    def _hand_params(self, recording: Recording, pose_m: np.ndarray) -> HandParams | None:
        """pose_m (51,): rotation about the wrist at rest, 45 coefficients, translation.  Both ends mean what ours do,
        so only the fingers change.
        """
        if self.mano_path is None:
            return None
        components, mean = _read_pca(str(self.mano_path), recording.mano_side)
        hand_betas = read_hand_betas(self.root / "calibration" / f"mano_{recording.mano_calib}" / "mano.yml")
        fingers = pca_to_hand_pose(pose_m[3:48], components, mean)
        return HandParams(pose_m[:3], fingers, pose_m[48:51], hand_betas, recording.mano_side)


def sequences_of(subject: Path, part: SplitPart) -> list[Path]:
    """A subject's folders of sequences that the part takes, in order of name.

    Raises ValueError when the part takes not all and the subject is incomplete: the places would be wrong.
    """
    folders = sorted(path for path in subject.iterdir() if (path / "meta.yml").is_file())
    if part == SplitPart():
        return folders
    if len(folders) != SEQUENCES_A_SUBJECT:
        raise ValueError(
            f"{subject} has {len(folders)} sequences; a split goes by their place among all {SEQUENCES_A_SUBJECT}. "
            "Complete the subject, or choose frames without a split"
        )
    return [path for k, path in enumerate(folders)
            if k // TAKES_AN_OBJECT in part.objects and k % TAKES_AN_OBJECT in part.takes]  # fmt: skip


def _chosen(what: str, wanted: Sequence[str] | None, known: Sequence[str]) -> list[str]:
    """The wanted ones in the order of the known; None: all.  Raises ValueError for one that is not known."""
    unknown = [name for name in wanted or () if name not in known]
    if unknown:
        raise ValueError(f"DexYCB has no {what} {', '.join(unknown)}; there are {', '.join(known)}")
    return [name for name in known if wanted is None or name in wanted]
