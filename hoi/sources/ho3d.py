"""HO-3D, versions 2 and 3: its folder -> SourceFrame number i.  Not used by the paper; more real hands.

Single files (pickles) -> checked values; the dataset.  Annotation is in OpenGL camera axes (y up, z backwards) and is
turned to OpenCV's.  There are no segmentation files: hand and object are rendered from the annotation.
"""

import re
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

from hoi.common.files import array_globals, read_text, restricted_load
from hoi.geometry.camera import OPENGL_TO_OPENCV, project, transform_points
from hoi.geometry.hand import MANO_TO_OPENPOSE, HandModel, HandParams, hand_in_camera, load_hand
from hoi.sources.dexycb import YCB_NOUNS, load_ycb, missing_ycb, model_path
from hoi.sources.frame import MOST_NUMBER, PosedObject, Rejected, Source, SourceFrame, read_or_reject, read_picture

DEPTH_SCALE = 0.00012498664727900177  # metres per step of the depth pictures, from the dataset's own scripts
SPLIT_FOLDERS = ("train", "evaluation")
# What is read of a frame's annotation, with how many numbers it has.
FIELDS = {"camMat": 9, "objRot": 3, "objTrans": 3, "handPose": 48, "handTrans": 3, "handBeta": 10, "handJoints3D": 63}


def read_annotation(path: Path) -> dict[str, Any]:
    """Annotation of one frame; raises Rejected when the file is missing, damaged or names more than arrays."""
    of_arrays = partial(restricted_load, allowed=array_globals(), what="an HO-3D file")
    meta = read_or_reject(path, "the annotation file", of_arrays)
    if not isinstance(meta, dict):
        raise Rejected("the annotation file is damaged", f"{path} holds a {type(meta).__name__}, expected a dict")
    return meta


def checked_fields(meta: dict[str, Any], where: str) -> dict[str, np.ndarray]:
    """FIELDS as flat float64 arrays of the right length; raises Rejected for a frame without them."""
    # Two kinds of absence: the evaluation split was published without these keys, and frames of the training split that
    # nobody annotated hold None.
    if "handPose" not in meta:
        raise Rejected("the source publishes no hand pose for it", f"{where}, as all of the evaluation split")
    if any(meta.get(name) is None for name in (*FIELDS, "objName")):
        raise Rejected("the source has no annotation of it", where)
    values = {}
    for name, count in FIELDS.items():
        array = meta[name]
        fits = isinstance(array, np.ndarray) and array.dtype.kind in "iuf" and array.size == count
        if not fits or not (np.abs(array) < MOST_NUMBER).all():
            found = f"{array.shape} {array.dtype}" if isinstance(array, np.ndarray) else type(array).__name__
            raise Rejected("the annotation file is damaged", f"{where}: {name} is {found}, expected {count} finite "
                           f"numbers below {MOST_NUMBER:g}")  # fmt: skip
        values[name] = array.astype(np.float64).ravel()
    camera = values["camMat"]
    if camera[[0, 4]].min() < 1 or camera[6:].tolist() != [0, 0, 1]:
        raise Rejected("the annotation file is damaged", f"{where}: camMat is no camera: {camera.tolist()}")
    return values


def object_name(meta: dict[str, Any], where: str) -> str:
    """Of the YCB model, a folder's name; raises Rejected for a frame without it: it must not lead elsewhere."""
    name = meta.get("objName")
    if not isinstance(name, str) or not re.fullmatch(r"[\w-]{1,80}", name):
        raise Rejected("the annotation file is damaged", f"{where}: objName is {name!r:.80}, expected a YCB model's")
    return str(name)


class HO3D(Source):
    """The annotated frames of an HO-3D folder, in the order of its list.

    root       folder with train, evaluation, train.txt, evaluation.txt
    split      "train" (default) or "evaluation", whose published files have no hand pose
    sequences  names such as ABF10; None: all
    frames     slice of each sequence's annotated frames
    mano_path  MANO file; without it hand_params is None, since its wrist decides where a turned hand lies
    models     folder of <name>/textured_simple.obj (the YCB models come separately); None: root/models
    Raises FileNotFoundError or ValueError naming what is missing.
    """

    name = "HO-3D"
    has_labels = False

    def __init__(
        self, root: str | Path, split: str | None = None, sequences: Sequence[str] | None = None,
        frames: slice = slice(None), mano_path: str | Path | None = None, models: str | Path | None = None,
    ) -> None:
        self.root, self.split, self.mano_path = Path(root), split or "train", mano_path
        self.models = Path(models) if models else self.root / "models"
        if self.split not in SPLIT_FOLDERS:
            raise ValueError(f"HO-3D has no split {self.split!r}; expected {' or '.join(SPLIT_FOLDERS)}")
        if not (self.root / self.split).is_dir():
            raise FileNotFoundError(f"{self.root} has no folder {self.split}: it is not the root of HO-3D")
        by_sequence: dict[str, list[str]] = {}
        for line in self._listed():
            by_sequence.setdefault(line.split("/")[0], []).append(line)
        unknown = set(sequences or ()) - by_sequence.keys()
        if unknown:
            raise ValueError(f"no sequence {', '.join(sorted(unknown))} in {self.split} of {self.root}")
        self.rows = [line for name, lines in by_sequence.items() if sequences is None or name in sequences
                     for line in lines[frames]]  # fmt: skip

    def _listed(self) -> list[str]:
        """SEQ/0000 of every annotated frame."""
        path = self.root / f"{self.split}.txt"
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; it lists the annotated frames of HO-3D, one SEQ/0000 a line")
        lines = [line.strip() for line in read_text(path).splitlines()]
        for number, line in enumerate(lines, start=1):
            if line and line.count("/") != 1:
                raise ValueError(f"{path} line {number} is {line!r}, expected SEQ/0000")
        return [line for line in lines if line]

    def frame_name(self, number: int) -> str:
        """Split, sequence and frame."""
        return f"{self.split}/{self.rows[number]}"

    def listing(self) -> str:
        """The chosen frames."""
        return "\n".join(map(self.frame_name, range(len(self))))

    def missing_models(self) -> list[str]:
        """Object files that are not there, of the first frame of each sequence: a sequence holds one object."""
        first = {line.split("/")[0]: line for line in reversed(self.rows)}
        names = set()
        for line in first.values():
            try:
                names.add(object_name(self._annotation(line), line))
            except Rejected:  # told when the frame is converted
                continue
        return missing_ycb(self.models, names)

    @cached_property
    def hand(self) -> HandModel:
        """Read by the processes that read frames, once in each."""
        return load_hand(self.mano_path)

    def _annotation(self, line: str) -> dict[str, Any]:
        """Of the frame SEQ/0000."""
        sequence, frame = line.split("/")
        return read_annotation(self.root / self.split / sequence / "meta" / f"{frame}.pkl")

    def read(self, number: int) -> SourceFrame:
        """Frame `number`; raises Rejected for one that gives no record."""
        line = self.rows[number]
        sequence, frame = line.split("/")
        folder = self.root / self.split / sequence
        meta = self._annotation(line)
        values = checked_fields(meta, line)
        picture = folder / "rgb" / f"{frame}.jpg"  # of version 3; version 2 has .png
        picture = picture if picture.is_file() else picture.with_suffix(".png")
        keypoints_3d = values["handJoints3D"].reshape(21, 3)[list(MANO_TO_OPENPOSE)]  # tips stand last there
        keypoints_3d = transform_points(OPENGL_TO_OPENCV, keypoints_3d)
        intrinsics = values["camMat"].reshape(3, 3)
        keypoints_2d = project(keypoints_3d, intrinsics)
        if not np.isfinite(keypoints_2d).all():  # project gives NaN for z <= 0
            raise Rejected("a part of the hand is behind the camera")
        pose = HandParams(values["handPose"][:3], values["handPose"][3:], values["handTrans"], values["handBeta"])
        object_to_opengl = np.eye(4)
        object_to_opengl[:3, :3] = Rotation.from_rotvec(values["objRot"]).as_matrix()
        object_to_opengl[:3, 3] = values["objTrans"]
        name = object_name(meta, line)
        if (mesh := load_ycb(str(self.models), name)) is None:  # it would not be drawn, and too little of it be seen
            raise Rejected("the model of the object is missing", str(model_path(self.models, name)))
        return SourceFrame(
            name=self.frame_name(number), image=read_picture(picture, "the picture"),
            noun=YCB_NOUNS.get(name, name), keypoints_3d=keypoints_3d, keypoints_2d=keypoints_2d,
            keypoint_convention="openpose21, fingertips of HO-3D", intrinsics=intrinsics,
            depth=self._depth(folder / "depth" / f"{frame}.png"),
            hand_params=hand_in_camera(pose, self.hand, OPENGL_TO_OPENCV) if self.mano_path else None,
            hand_side="right",
            objects=(PosedObject(mesh, OPENGL_TO_OPENCV @ object_to_opengl),),
        )  # fmt: skip

    def _depth(self, path: Path) -> np.ndarray | None:
        """(H, W) float32 metres, None where there is no file; the low byte is in red, the high byte in green."""
        if not path.is_file():
            return None
        colors = read_picture(path, "the depth file").astype(np.float32)
        return (colors[..., 0] + 256 * colors[..., 1]) * np.float32(DEPTH_SCALE)
