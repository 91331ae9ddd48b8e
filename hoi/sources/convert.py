"""Photographs of real datasets -> records of a dataset folder.  Paper: Sec. 4 (training data), 3.3 (conditions).

A Source gives frames; each is cropped, its annotation moved to the crop, its conditions drawn and everything written.
What happens to a frame is the same for all sources; a frame that gives no record is listed with its reason.  At the end
the records are held against their own annotation: how well a re-render and the posed hands fit.
"""

import json
from array import array
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from hoi.common.arrays import intersection_over_union
from hoi.common.choices import DPT_HYBRID, MARGIN, MIN_AREA
from hoi.common.files import JsonLines, write_whole
from hoi.common.machine import barrier, mapper
from hoi.conditions import Conditions, draw_normal, draw_segmentation, draw_skeleton, normals_from_inverse_depth
from hoi.data.folder import each_record, metadata_files, part_of
from hoi.data.writer import DatasetWriter, write_object, write_pictures
from hoi.geometry.camera import Camera, inside_picture, transform_points
from hoi.geometry.hand import TIP_KEYPOINTS, HandMesh, load_hand
from hoi.geometry.mano import WHERE
from hoi.geometry.render import HAND, OBJECT, GBuffer, Renderer
from hoi.geometry.scene import PLAIN_TEXTS
from hoi.sources.frame import Crop, Rejected, Source, SourceFrame, box_around
from hoi.sources.normals import DepthEstimator, normals_of_crop, read_depth_file, resize_normals

LABELS = ((HAND, "hand"), (OBJECT, "object"))
FAR = 65.0  # metres; sensors write the largest number for no answer, and the folder's depth ends at 65.5
FIT_LIMIT_MM = 2.0  # with the right MANO file posed joints miss the source's by rounding alone, a thousandth of it
MANO_FILE = WHERE.split(" Without")[0]  # the built-in hand is no way out here: real hands are MANO's
REJECTED_FILE = "rejected.jsonl"  # in the dataset folder; a run that continues leaves these frames alone,
OUTSIDE = (" is missing", " is damaged", " has another size")  # unless the reason ends so: the file may be another now


@dataclass(frozen=True)
class ConversionSettings:
    """How frames become records.

    size         height and width of the crops, pixels
    margin       of the crop around hand and object, pixels of the whole picture
    normals      one of NORMALS; depth_files is the folder for "depth-files", depth_model the network for "estimated"
    device       of that network
    mano_path    MANO file; without it the records have no hand parameters and no normals can be rendered
    strokes      "crop": the skeleton is drawn at `size`, as rendered skeletons are; "source": in the whole picture and
                 resized with it, as in the authors' reader
    text         caption with {object} for the noun; None: the paper's template
    min_area     pixels of the whole picture that hand and object must each have
    """

    size: int = 512
    margin: int = MARGIN
    normals: str = "rendered"
    depth_files: str | Path | None = None
    depth_model: str = DPT_HYBRID
    mano_path: str | Path | None = None
    strokes: str = "crop"
    text: str | None = None
    min_area: int = MIN_AREA
    device: str = "cpu"


def check_needs(source: Source, settings: ConversionSettings) -> None:
    """Raise ValueError or FileNotFoundError when what was chosen needs something that is not there, naming what else
    can be chosen.
    """
    normals, depth_files = settings.normals, settings.depth_files
    if normals == "rendered" and not source.has_geometry:
        raise ValueError(f"{source.name} has no 3D annotation to render normals from; choose --normals estimated, "
                         "depth-files or sensor-depth")  # fmt: skip
    if settings.mano_path is None and normals == "rendered":
        raise ValueError(
            f"--normals rendered draws the hand's surface, and {source.name}'s hands are MANO's: pass --mano FILE, or "
            f"choose --normals sensor-depth, depth-files or estimated, which need no MANO file. {MANO_FILE}"
        )
    missing = source.missing_models() if normals == "rendered" else []
    if missing:
        raise ValueError(
            f"{len(missing)} object models are missing, the first is {missing[0]}; they come with DexYCB in its folder "
            "models: pass --models DIR, or choose other --normals"
        )
    if (normals == "depth-files") != (depth_files is not None):
        raise ValueError("--normals depth-files needs --depth-files DIR, and only it does")
    if depth_files is not None and not Path(depth_files).is_dir():
        raise FileNotFoundError(f"--depth-files {depth_files} is no folder")
    if not len(source):
        raise ValueError(f"no frame of {source.name} fits the selection")


def convert_source(
    source: Source, order: np.ndarray, settings: ConversionSettings, writer: DatasetWriter, workers: int = 1
) -> dict[str, int]:
    """Make records of a source's frames, in order, so that every run writes the same lines.

    order    numbers of the source's frames; record i is frame order[i].  Those that an earlier run saw are left
             alone, but for those whose reason was a file: it may have been put there or mended since
    writer   of the folder, for a job that check_needs accepts
    workers  processes; the result is the same for any number
    returns  on rank 0 how often each reason for a rejection occurred in all runs, the most frequent first
    Raises ValueError when the folder has no record at the end.
    """
    path, rank = writer.folder / REJECTED_FILE, writer.rank
    rejected, known = JsonLines(part_of(path, rank, writer.world_size)), _rejected(writer)
    left_alone = {index for index, line in known.items() if not line["rejected"].endswith(OUTSIDE)}
    todo = [k for k in range(len(order)) if not writer.done(k) and k not in left_alone]
    barrier()  # all ranks have seen the same records
    mine = np.array_split(todo, writer.world_size)[rank].tolist()
    build = partial(FrameConverter, source, order, settings, writer.folder)
    bar = tqdm(total=len(mine), unit="frame", disable=rank > 0)
    with bar, mapper(workers, build) as run:
        for result in run(FrameConverter.convert, mine):
            if "rejected" not in result:
                writer.append(result)
            elif known.get(result["index"]) != result:
                rejected.append(result)
            bar.update()
    writer.flush()
    barrier()
    if rank > 0:
        return {}
    writer.merge()
    known = _rejected(writer)
    if known:  # without what holds no longer; the same file whatever was interrupted
        write_whole(path, "".join(json.dumps(known[index]) + "\n" for index in sorted(known)).encode())
    for left in metadata_files(writer.folder, REJECTED_FILE):
        if left != path or not known:
            left.unlink()
    counts = dict(Counter(known[index]["rejected"] for index in sorted(known)).most_common())
    if not len(writer):
        raise ValueError("\n".join(["no frame gave a record:", *(f"  {n} {reason}" for reason, n in counts.items())]))
    return counts


def _rejected(writer: DatasetWriter) -> dict[int, dict[str, Any]]:
    """Lines of REJECTED_FILE in all runs and ranks, of each index the last, without those that are records now."""
    lines = (line for path in metadata_files(writer.folder, REJECTED_FILE)
             for line in JsonLines(path, index=int, rejected=str))  # fmt: skip
    return {line["index"]: line for line in lines if not writer.done(line["index"])}


@dataclass(frozen=True)
class CroppedFrame:
    """A frame with its crop and what is drawn of it there.

    hand_mesh  the posed hand, camera frame; None without a MANO file
    image      (size, size, 3) uint8
    label_map  (size, size)
    gbuffer    what is annotated, rendered in the crop; None where the source has no camera
    """

    frame: SourceFrame
    crop: Crop
    hand_mesh: HandMesh | None
    image: np.ndarray
    label_map: np.ndarray
    gbuffer: GBuffer | None


class FrameConverter:
    """Writes frames of a source into a dataset folder; one in each process.

    order   as of convert_source
    folder  the dataset folder
    """

    def __init__(self, source: Source, order: np.ndarray, settings: ConversionSettings, folder: str | Path) -> None:
        self.source, self.order, self.settings, self.folder = source, order, settings, Path(folder)
        self.hand = load_hand(settings.mano_path) if settings.mano_path else None
        estimates = settings.normals == "estimated" and not source.is_scenery
        self.estimator = DepthEstimator(settings.depth_model, settings.device) if estimates else None
        # After the estimator: GL's software driver and the compiler behind torch each bring an LLVM, and loading the
        # compiler's second crashes the process.
        self.renderer = Renderer() if source.has_geometry else None

    def convert(self, index: int) -> dict[str, Any]:
        """Write the pictures of record `index`.

        returns  the record; for a frame that gives none the line of REJECTED_FILE: index, rejected (why), detail
        """
        try:
            frame = self.source.read(int(self.order[index]))
            return self._write_scenery(index, frame) if self.source.is_scenery else self._write(index, frame)
        except Rejected as rejected:
            return {"index": index, "rejected": rejected.reason, "detail": rejected.detail}

    def _write_scenery(self, index: int, frame: SourceFrame) -> dict[str, Any]:
        """The whole picture and its text: the background buffer needs no more."""
        height, width = frame.image.shape[:2]
        image = Crop(0, 0, width, height, self.settings.size).cut_picture(frame.image)
        return write_pictures(self.folder, index, self._record(frame, frame.sentence), image)

    def _write(self, index: int, frame: SourceFrame) -> dict[str, Any]:
        """Picture, conditions and annotation of the crop around hand and object."""
        cropped = self._cropped(frame)
        normals, known = self._surface_normals(cropped)  # before _annotation, which writes meshes: it may reject
        pictures = self._skeleton(cropped), draw_normal(normals, known), draw_segmentation(cropped.label_map)
        text = self.settings.text or PLAIN_TEXTS["hand_object"]
        record = self._record(frame, frame.sentence or text.replace("{object}", frame.noun or "object"))
        record |= self._annotation(cropped)
        depth = None if frame.depth is None else cropped.crop.cut_map(np.where(frame.depth < FAR, frame.depth, 0))
        object_mask = None if frame.object_mesh is None else cropped.gbuffer.object_mask
        return write_pictures(self.folder, index, record, cropped.image, Conditions(*pictures), depth, object_mask)

    def _cropped(self, frame: SourceFrame) -> CroppedFrame:
        """Find hand and object in the picture and cut them out; raises Rejected where too little of them is seen."""
        shape, size = frame.image.shape[:2], self.settings.size
        # Not aligned to the picture then: its depths would belong to other pixels.
        if frame.depth is not None and frame.depth.shape != shape:
            raise Rejected("the depth file has another size", f"{frame.depth.shape}, picture {shape}")
        hand_mesh = self.hand(frame.hand_params) if self.hand and frame.hand_params else None
        for label, what in LABELS:
            area = int((frame.label_map == label).sum())
            if area < self.settings.min_area:
                detail = f"{area} pixels, {self.settings.min_area} asked for"
                raise Rejected(f"too little of the {what} is seen", detail)
        crop = Crop(*(frame.box or box_around(frame.label_map > 0, self.settings.margin)), size)
        intrinsics = None if frame.intrinsics is None else crop.intrinsics(frame.intrinsics)
        gbuffer = None if intrinsics is None else self._render(frame, hand_mesh, intrinsics)
        label_map = crop.cut_map(frame.label_map)
        return CroppedFrame(frame, crop, hand_mesh, crop.cut_picture(frame.image), label_map, gbuffer)

    def _render(self, frame: SourceFrame, hand_mesh: HandMesh | None, intrinsics: np.ndarray) -> GBuffer:
        """Hand and object of a frame that has a pose of it, in the crop."""
        hand_vertices = hand_faces = vertices = faces = None
        # In the object's frame: the renderer prepares a mesh once and knows it again only if its vertices stay.
        if hand_mesh is not None:
            hand_vertices = transform_points(np.linalg.inv(frame.object_to_camera), hand_mesh.vertices)
            hand_faces = hand_mesh.faces
        if frame.object_mesh is not None:
            vertices, faces = frame.object_mesh.vertices, frame.object_mesh.faces
        camera = Camera(intrinsics, frame.object_to_camera, self.settings.size, self.settings.size)
        return self.renderer.render(hand_vertices, hand_faces, vertices, faces, camera)

    def _skeleton(self, cropped: CroppedFrame) -> np.ndarray:
        """(size, size, 3): the source's own, or drawn at its keypoints."""
        frame, crop, size = cropped.frame, cropped.crop, self.settings.size
        if frame.skeleton is not None:
            return crop.cut_picture(frame.skeleton)
        if self.settings.strokes == "source":
            return crop.cut_picture(draw_skeleton(frame.keypoints_2d, *frame.image.shape[:2]))
        return draw_skeleton(crop.points(frame.keypoints_2d), size, size)

    def _surface_normals(self, cropped: CroppedFrame) -> tuple[np.ndarray, np.ndarray]:
        """Normals (size, size, 3) and where they are known (size, size), by the chosen way."""
        frame, kind, seen = cropped.frame, self.settings.normals, cropped.label_map > 0
        if kind == "rendered":
            # Labels of the source and meshes of the annotation need not agree to the pixel.
            return cropped.gbuffer.surface_normals, seen & (cropped.gbuffer.label_map > 0)
        if kind == "estimated":
            # The network sees the crop, as in the paper: it knows objects by their context.
            return resize_normals(normals_from_inverse_depth(self.estimator(cropped.image)), self.settings.size), seen
        depth, in_metres = frame.depth, True
        if kind == "depth-files":
            depth, in_metres = read_depth_file(self.settings.depth_files, frame.name)
        if depth is None:
            raise Rejected("the depth file is missing")
        normals, known = normals_of_crop(depth, in_metres, cropped.crop, frame.label_map, frame.intrinsics)
        return normals, seen & known

    def _record(self, frame: SourceFrame, text: str | None) -> dict[str, Any]:
        """What every record of a source has; keys beyond the folder's own are always there, so rows share a schema."""
        extra = dict.fromkeys(("crop_box", "skeleton_strokes", "hand_fit_mm", "rerender_iou"))
        size, source = self.settings.size, self.source.name
        known = {"text": text, "height": size, "width": size, "source": source, "source_frame": frame.name}
        return known | extra

    def _annotation(self, cropped: CroppedFrame) -> dict[str, Any]:
        """Numbers of the source in the pixels of the crop; nothing that the source does not say."""
        frame, crop, size = cropped.frame, cropped.crop, self.settings.size
        record: dict[str, Any] = {
            "category": frame.noun, "normal_source": self.settings.normals, "hand_side": frame.hand_side,
            "keypoints_3d": frame.keypoints_3d, "keypoint_convention": frame.keypoint_convention,
            "crop_box": [crop.left, crop.top, crop.right, crop.bottom],
            "skeleton_strokes": "source" if frame.skeleton is not None else self.settings.strokes,
        }  # fmt: skip
        if frame.intrinsics is not None:
            record["intrinsics"] = crop.intrinsics(frame.intrinsics)
        if frame.keypoints_2d is not None:  # of a hand that leaves the picture some lie beside the crop
            record["keypoints_2d"] = crop.points(frame.keypoints_2d)
            record["hand_in_picture"] = bool(inside_picture(record["keypoints_2d"], size, size))
        if frame.object_to_camera is not None:
            record["object_path"] = frame.object_mesh and write_object(self.folder, frame.object_mesh)
            record["object_to_camera"] = frame.object_to_camera.ravel().tolist()
        if cropped.hand_mesh is not None:
            record |= vars(frame.hand_params) | {"hand_model": self.hand.name}  # a record's keys are their names
            off = np.linalg.norm(cropped.hand_mesh.keypoints_3d - frame.keypoints_3d, axis=1)
            # Of joints alone: each hand package has its own fingertips.
            record["hand_fit_mm"] = round(float(1000 * np.delete(off, TIP_KEYPOINTS).max()), 4)
            # Where the model is missing the re-render would lack it, and the overlap would say nothing.
            if frame.object_mesh is not None:
                drawn, given = cropped.gbuffer.label_map, cropped.label_map
                record["rerender_iou"] = {
                    name: round(intersection_over_union(drawn == label, given == label), 4) for label, name in LABELS
                }
        return record


def summary(folder: str | Path) -> dict[str, Any]:
    """How well records agree with their own annotation: mean IoU of a re-render with the source's segmentation, and how
    far the posed hand's joints lie from the source's, for each side.  Empty where nothing could be measured.
    """
    overlaps, fits = defaultdict(partial(array, "d")), {"right": array("d"), "left": array("d")}
    for record in each_record(folder, ("index", "rerender_iou", "hand_fit_mm", "hand_side")):
        for name, value in (record["rerender_iou"] or {}).items():
            overlaps[name].append(value)
        if record["hand_fit_mm"] is not None:
            fits[record["hand_side"]].append(record["hand_fit_mm"])
    means = {name: round(float(np.mean(values)), 4) for name, values in overlaps.items()}
    return ({"mean_rerender_iou": means} if means else {}) | {
        f"hand_fit_mm_{side}": {"median": round(float(np.median(values)), 3), "max": max(values)}
        for side, values in fits.items() if values
    }  # fmt: skip


def fit_warning(findings: dict[str, Any]) -> str:
    """A sentence when posed hands miss the source's joints, empty otherwise.

    findings  of summary()
    A wrong MANO file shows itself here, and so does a left pose space that is not the mirror image of the right one.
    """
    far = {side: findings[f"hand_fit_mm_{side}"]["median"] for side in ("right", "left")
           if findings.get(f"hand_fit_mm_{side}", {}).get("median", 0.0) > FIT_LIMIT_MM}  # fmt: skip
    if not far:
        return ""
    told = " and ".join(f"{side} hands {value:g} mm" for side, value in far.items())
    return (f"WARNING: posed joints lie off the source's own, {told} (median of the farthest joint): is the MANO file "
            "the official one, with MANO_LEFT.pkl beside MANO_RIGHT.pkl for left hands?")  # fmt: skip
