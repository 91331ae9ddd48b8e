"""One photograph of a real dataset, and the square crop around its hand and object.  Paper: Sec. 4 (training data).

Files of a dataset -> SourceFrame -> the pixels and cameras of its Crop.  Every real dataset becomes SourceFrames first,
so that all of them share one conversion; a frame that cannot become one raises Rejected and says why.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from hoi.common import files
from hoi.common.arrays import box_of, resized_points
from hoi.geometry.camera import crop_intrinsics
from hoi.geometry.hand import HandParams
from hoi.geometry.objects import ObjectMesh

MOST_NUMBER = 1e6  # of an annotation, metres, pixels or radians: beyond it a file is damaged


class Rejected(Exception):  # not a ValueError: damaged calibration stops a conversion, a damaged frame does not
    """A frame that gives no record.

    reason  a sentence without numbers, so that equal reasons can be counted
    detail  what exactly, for the list of rejected frames
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class SourceFrame:
    """What the files of one picture say, in the pixels of the whole picture.  None: they do not say it.

    name                 unique in the dataset, a relative path without suffix; captions and depth files are found by it
    image                (H, W, 3) uint8
    noun                 what captions call the object
    sentence             the caption that the dataset itself gives
    label_map            (H, W) uint8, 0 background, 1 hand, 2 object
    box                  left, top, right, bottom in pixels, the last two exclusive; None: around hand and object
    skeleton             (H, W, 3) uint8, already drawn; None: drawn at keypoints_2d
    keypoints_3d         (21, 3) metres, camera frame, OpenPose order
    keypoints_2d         (21, 2) pixels
    keypoint_convention  whose fingertips these are: hand packages take different skin vertices
    intrinsics           (3, 3) pixels
    depth                (H, W) float32 metres, 0 = unknown
    hand_params          camera frame, our convention
    hand_side            known even where hand_params is not
    object_mesh          the held one in the dataset's own model frame, metres; None also where its file is not there
    object_to_camera     (4, 4) rigid
    """

    name: str
    image: np.ndarray
    noun: str | None = None
    sentence: str | None = None
    label_map: np.ndarray | None = None
    box: tuple[int, int, int, int] | None = None
    skeleton: np.ndarray | None = None
    keypoints_3d: np.ndarray | None = None
    keypoints_2d: np.ndarray | None = None
    keypoint_convention: str | None = None
    intrinsics: np.ndarray | None = None
    depth: np.ndarray | None = None
    hand_params: HandParams | None = None
    hand_side: str | None = None
    object_mesh: ObjectMesh | None = None
    object_to_camera: np.ndarray | None = None


class Source(Protocol):
    """What DexYCB and OfficialCSV have in common.

    name          of the dataset
    rows          an entry for each frame
    has_geometry  hand parameters and object poses are annotated
    is_scenery    pictures without hand or object, for the background buffer
    """

    name: str
    rows: Sequence[Any]
    has_geometry: bool = True
    is_scenery: bool = False

    def __len__(self) -> int:
        return len(self.rows)

    def frame_name(self, number: int) -> str:
        """Name of frame `number`, known without reading it."""

    def listing(self) -> str:
        """What was selected and is read once: equal for equal selections of equal sources, wherever they lie."""

    def read(self, number: int) -> SourceFrame:
        """Frame `number`, from 0.  Raises Rejected for one that gives no record."""

    def missing_models(self) -> list[str]:
        """Paths of object models that frames need and that are not there; none without 3D annotation."""
        return []


def read_or_reject(path: Path, what: str, read: Callable[[Path], Any]) -> Any:
    """read(path); raises Rejected with "<what> is missing", or "<what> is damaged" where it raises ValueError."""
    if not os.path.isfile(path):  # also where a table's cell can be no path at all
        raise Rejected(f"{what} is missing", str(path))
    try:
        return read(path)
    except ValueError as error:
        raise Rejected(f"{what} is damaged", str(error)) from error


def read_picture(path: Path, what: str, mode: str | None = "RGB") -> np.ndarray:
    """A picture file as an array; mode as of files.read_picture.  Raises as read_or_reject."""
    return read_or_reject(path, what, lambda path: files.read_picture(path, mode))


def read_millimetres(path: Path) -> np.ndarray:
    """A depth file of 16-bit millimetres -> (H, W) float32 metres, 0 = unknown.  Raises Rejected as read_picture."""
    return read_picture(path, "the depth file", None).astype(np.float32) / 1000


def box_around(mask: np.ndarray, margin: int) -> tuple[int, int, int, int]:
    """Tight box of a mask (H, W) bool, grown by `margin` pixels and cut at the picture's border.

    returns  left, top, right, bottom; the last two exclusive
    Source: the authors' preparation script.
    """
    left, top, right, bottom = box_of(mask)  # cut at the border: what lies beyond would be black anyway
    height, width = mask.shape
    return max(left - margin, 0), max(top - margin, 0), min(right + margin, width), min(bottom + margin, height)


@dataclass(frozen=True)
class Crop:
    """A box of the picture, made square with black and resized to size x size pixels.

    The authors' reader pads (side - h) // 2 on both sides, so its square can be one pixel short and is then stretched;
    here the odd pixel goes to the right or the bottom and both axes have one scale.  The square lies on whole pixels:
    pictures, labels, depth and camera are cut alike, and resized once.
    """

    left: int
    top: int
    right: int
    bottom: int
    size: int

    @property
    def side(self) -> int:
        """Of the square, in pixels of the whole picture."""
        return max(self.right - self.left, self.bottom - self.top)

    @property
    def corner(self) -> tuple[int, int]:
        """Left and top of the square, which may lie outside the picture."""
        height, width = self.bottom - self.top, self.right - self.left
        # Halves are rounded down as in the authors' reader: the longer part of the border is right or below.
        return self.left - (self.side - width) // 2, self.top - (self.side - height) // 2

    def intrinsics(self, intrinsics: np.ndarray) -> np.ndarray:
        """Of the crop: (3, 3) -> (3, 3)."""
        return crop_intrinsics(intrinsics, *self.corner, self.side, self.side, self.size, self.size)

    def points(self, points: np.ndarray) -> np.ndarray:
        """Pixels of the whole picture (..., 2) -> pixels of the crop, which may lie outside it."""
        return resized_points(points, (self.side, self.side), (self.size, self.size), self.corner)

    def square(self, pixels: np.ndarray) -> np.ndarray:
        """The square before it is resized, zero beside the box: (H, W, ...) -> (side, side, ...)."""
        left, top = self.corner
        canvas = np.zeros((self.side, self.side, *pixels.shape[2:]), dtype=pixels.dtype)
        box = pixels[self.top : self.bottom, self.left : self.right]
        canvas[self.top - top : self.bottom - top, self.left - left : self.right - left] = box
        return canvas

    def cut_picture(self, picture: np.ndarray) -> np.ndarray:
        """(H, W, 3) uint8 -> (size, size, 3), bilinear as in the authors' reader."""
        # Where it shrinks, Pillow averages over all pixels that fall into one.
        square = Image.fromarray(self.square(picture))
        return np.asarray(square.resize((self.size, self.size), Image.Resampling.BILINEAR))

    def cut_map(self, values: np.ndarray) -> np.ndarray:
        """(H, W) labels or depths -> (size, size): the nearest pixel, since mixtures of them mean nothing."""
        # Pixel centres to pixel areas, as intrinsics() and points() have it.
        nearest = ((np.arange(self.size) + 0.5) * (self.side / self.size)).astype(np.int64)
        return self.square(values)[np.ix_(nearest, nearest)]
