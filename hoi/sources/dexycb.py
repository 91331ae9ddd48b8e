"""DexYCB.  Its folder -> SourceFrame number i.  Paper: Sec. 4, the dataset it trains on.

The layout, the splits and the conventions are those of the dataset's own toolkit: seg holds YCB ids and 255 for the
hand, poses take model points to the OpenCV camera, hands are PCA coefficients about a mean pose (manopth, 45 of them).
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from hoi.geometry.hand import HandPose, pca_to_hand_pose
from hoi.geometry.mano import read_pca
from hoi.sources.dexycb_files import HEIGHT, WIDTH, Recording, read_betas, read_intrinsics, read_labels, read_meta
from hoi.sources.frame import PosedObject, Rejected, SourceFrame, read_picture
from hoi.sources.ycb import YCB, load_ycb, model_path

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
    mano_path       MANO file; without it hand_pose is None, since finger poses are coordinates in MANO's pose space
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
            hand_pose=self._hand_pose(sequence, labels["pose_m"]), hand_side=sequence.mano_side,
            objects=self._objects(sequence, labels["pose_y"]),
        )  # fmt: skip

    def _depth(self, path: Path) -> np.ndarray | None:
        return read_picture(path, "the depth file", None).astype(np.float32) / 1000 if path.is_file() else None

    def _hand_pose(self, sequence: Recording, pose_m: np.ndarray) -> HandPose | None:
        """Rotation about the rest wrist, then translation: the same meaning as ours, so only the fingers change."""
        if self.mano_path is None:
            return None
        components, mean = _pca(str(self.mano_path), sequence.mano_side)
        hand_betas = read_betas(self.root / "calibration" / f"mano_{sequence.mano_calib}" / "mano.yml")
        fingers = pca_to_hand_pose(pose_m[3:48], components, mean)
        return HandPose(pose_m[:3], fingers, pose_m[48:51], hand_betas, sequence.mano_side)

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
