"""The CSV of the authors' release (HOI4D, OakInk, their own data; its regularisation CSV): row -> SourceFrame.

Paper: Sec. 4 (training data).

Columns image, skeleton, top, bottom, left, right, sentence, seg, mask; or image, sentence for scenery.  Its `mask` is
our segmentation, its `seg` the binary mask.  It has no 3D annotation.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from hoi.common.files import read_csv
from hoi.conditions import read_segmentation
from hoi.sources.frame import Rejected, Source, SourceFrame, read_millimetres, read_picture

TRAIN_COLUMNS = ("image", "skeleton", "top", "bottom", "left", "right", "sentence", "seg", "mask")
SCENERY_COLUMNS = ("image", "sentence")
# The sentences of the release name the object and nothing else does; other sentences leave it open.
TEMPLATE = re.compile(r"^A hand is grasping an? (.+?)\.?$")


class OfficialCSV(Source):
    """The rows of a CSV of the authors' release.

    path  the CSV; relative picture paths are looked for from its folder, then from the working directory
    A header that repeats inside the file (a second run of the authors' script appends one) is skipped.
    Raises FileNotFoundError, or ValueError when a column is missing or a row does not fit.
    """

    name = "official CSV"
    has_geometry = False

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"no CSV at {self.path}")
        self.rows = list(self._read())
        names = [self._name(row["image"]) for _, row in self.rows]
        times = Counter(names)  # a picture may have several rows; names must be unique
        self.names = [f"{name}#{line}" if times[name] > 1 else name
                      for name, (line, _) in zip(names, self.rows, strict=True)]  # fmt: skip

    def _name(self, image: str) -> str:
        """A picture's path without suffix; an absolute one in the CSV's folder as seen from there."""
        path, folder = Path(image).with_suffix(""), self.path.parent.absolute()
        return str(path.relative_to(folder) if path.is_relative_to(folder) else path)

    def _read(self) -> Iterator[tuple[int, dict[str, str]]]:
        """Line number and columns of every row."""
        rows = ((number, row) for number, row in read_csv(self.path) if row)
        _, header = next(rows, (0, []))
        self.is_scenery = "skeleton" not in header
        wanted = SCENERY_COLUMNS if self.is_scenery else TRAIN_COLUMNS
        if absent := [name for name in wanted if name not in header]:
            raise ValueError(
                f"{self.path} has no column {', '.join(absent)}; it has {', '.join(header)[:200]}; expected "
                f"{', '.join(TRAIN_COLUMNS)}, or image, sentence for scenery"
            )
        for number, cells in rows:
            row = dict(zip(header, cells, strict=False))
            if row.get("image") == "image":  # the header of a second run
                continue
            if len(cells) > len(header) or not row.keys() >= set(wanted):
                raise ValueError(f"{self.path} line {number} has another number of cells than the {len(header)} of the "
                                 "header; sentences with commas need quotes")  # fmt: skip
            yield number, row

    def frame_name(self, number: int) -> str:
        """Path of the picture without suffix, with its line where it has several rows."""
        return self.names[number]

    def listing(self) -> str:
        """All rows."""
        return json.dumps([row for _, row in self.rows])

    def read(self, number: int) -> SourceFrame:
        """Row `number`; raises Rejected for one that gives no record."""
        line, row = self.rows[number]
        if is_left_out_of_oakink(row["image"]):
            raise Rejected("OakInk: two people, or a handover", row["image"])
        image = self._picture(row, "image")
        if self.is_scenery:
            if image.shape[0] != image.shape[1]:
                raise Rejected("a scenery picture is not square", f"line {line}: {image.shape[1]}x{image.shape[0]}")
            return SourceFrame(self.names[number], image, sentence=row["sentence"])
        mask, seg, skeleton = (self._picture(row, name) for name in ("mask", "seg", "skeleton"))
        sizes = {picture.shape[:2] for picture in (image, mask, seg, skeleton)}
        if len(sizes) > 1:
            raise Rejected("its pictures differ in size", f"line {line}: {sorted(sizes)} (height, width)")
        # Their reader draws nothing itself: the skeleton is a picture, and where its joints lie is not known.
        noun = TEMPLATE.match(row["sentence"])
        return SourceFrame(
            name=self.names[number], image=image, sentence=row["sentence"],
            noun=noun.group(1) if noun else None, label_map=label_map_of(mask, seg[..., 0]), skeleton=skeleton,
            box=self._box(row, line, *image.shape[:2]),
            depth=read_millimetres(self._find(row["depth"])) if row.get("depth") else None,  # in test CSVs alone
        )  # fmt: skip

    def _find(self, cell: str) -> Path:
        """Where a cell's file is.  The authors' reader looks from the working directory alone; here a CSV may be moved
        with its pictures.
        """
        path = self.path.parent / cell  # an absolute path stays what it is
        return path if os.path.isfile(path) or not os.path.isfile(cell) else Path(cell)

    def _picture(self, row: dict[str, str], name: str) -> np.ndarray:
        """One of a row's pictures, (H, W, 3) uint8; raises Rejected as read_picture."""
        what = {"image": "the picture", "mask": "the mask picture", "seg": "the seg picture"}.get(name, f"the {name}")
        return read_picture(self._find(row[name]), what)

    def _box(self, row: dict[str, str], line: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Numbers through float, as their reader takes them; bottom and right are exclusive."""
        try:
            left, top, right, bottom = (int(float(row[name])) for name in ("left", "top", "right", "bottom"))
        except (ValueError, OverflowError) as error:  # no number, or an infinite one
            raise Rejected("its box is no box", f"line {line}: {error}") from error
        if not (0 <= left < right <= width and 0 <= top < bottom <= height):
            detail = f"line {line}: left {left}, top {top}, right {right}, bottom {bottom} in {width}x{height}"
            raise Rejected("its box is no box", detail)
        return left, top, right, bottom


def is_left_out_of_oakink(image: str) -> bool:
    """OakInk's sequences object_intent_subject[_receiver] with two people or the intent 0004, handover.

    The authors' reader leaves them out; the sequence is the third part of the path from its end.
    """
    parts = image.split("/")
    if "oakink" not in image or len(parts) < 3:
        return False
    fields = parts[-3].split("_")
    return len(fields) == 4 or (len(fields) > 1 and fields[1] == "0004")


def label_map_of(mask: np.ndarray, seg: np.ndarray) -> np.ndarray:
    """Labels from the coloured mask, cut by the binary seg.

    mask (H, W, 3) uint8, seg (H, W) uint8, 255 inside -> (H, W) uint8, 0 background, 1 hand, 2 object
    """
    # Pictures of the release are JPEG: the two values of seg and the three colours of mask come back blurred.
    return np.where(seg > 127, read_segmentation(mask), 0).astype(np.uint8)
