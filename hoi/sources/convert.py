"""What real datasets have in common, what converting them needs, and what became of their frames.

A source is a sequence of frames; DexYCB, HO3D and OfficialCSV are such.  hoi/sources/convert.py makes records
of them.

Photographs of real datasets -> records of the dataset folder.  Paper: Sec. 4 (training data), 3.3 (conditions).

What happens to a frame is the same for all sources: crop, re-project, draw the conditions, write.
"""

from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from hoi.common.arrays import intersection_over_union
from hoi.conditions import (
    Conditions,
    draw_normal,
    draw_segmentation,
    draw_skeleton,
    normals_from_inverse_depth,
    scale_inverse_depth,
)
from hoi.data.writer import DatasetWriter, write_object, write_pictures
from hoi.geometry.camera import Camera, inside_picture, transform_points
from hoi.geometry.hand import HandMesh, load_hand
from hoi.geometry.mano import WHERE
from hoi.geometry.render import GBuffer, Renderer
from hoi.geometry.scene import PLAIN_TEXTS
from hoi.sources.frame import Crop, PosedObject, Rejected, RejectionLog, Source, SourceFrame, box_around
from hoi.sources.normals import DPT_HYBRID, DepthEstimator, normals_from_depth, read_depth_file, resize_normals

NORMALS = ("rendered", "sensor-depth", "depth-files", "estimated")
FIT_LIMIT_MM = 2.0  # rounding gives a thousandth of it
MANO_FILE = WHERE.split(" Without")[0]


def check_needs(
    source: Source, normals: str, mano_path: str | Path | None, depth_files: str | Path | None = None
) -> None:
    """Raise ValueError when what was chosen needs something that is not there."""
    if normals not in NORMALS:
        raise ValueError(f"normals is {normals!r}, expected one of {', '.join(NORMALS)}")
    if normals == "rendered" and not source.has_geometry:
        raise ValueError(f"{source.name} has no 3D annotation to render normals from; choose --normals estimated, "
                         "depth-files or sensor-depth")  # fmt: skip
    if mano_path is None and source.has_geometry and not source.has_labels:
        raise ValueError(
            f"{source.name} has no segmentation files, so hand and object are rendered from its annotation, and its "
            f"hands are MANO's: pass --mano FILE. {MANO_FILE} There is no way around it; DexYCB can be read without one"
        )
    if mano_path is None and normals == "rendered":
        raise ValueError(
            f"--normals rendered draws the hand's surface, and {source.name}'s hands are MANO's: pass --mano FILE, or "
            f"choose --normals sensor-depth, depth-files or estimated, which need no MANO file. {MANO_FILE}"
        )
    missing = source.missing_models() if normals == "rendered" or not source.has_labels else []
    if missing:
        raise ValueError(
            f"{len(missing)} object models are missing, the first is {missing[0]}; they come with DexYCB in its folder "
            f"models: pass --models DIR{', or choose other --normals' if source.has_labels else ''}"
        )
    if (normals == "depth-files") != (depth_files is not None):
        raise ValueError("--normals depth-files needs --depth-files DIR, and only it does")
    if depth_files is not None and not Path(depth_files).is_dir():
        raise FileNotFoundError(f"--depth-files {depth_files} is no folder")


def summary(records: list[dict[str, Any]]) -> dict[str, Any]:
    """How well records agree with their own annotation: mean IoU of a re-render with the source's segmentation, and how
    far the posed hand's joints lie from the source's, for each side.  Empty where nothing could be measured.
    """
    overlaps = [record["rerender_iou"] for record in records if record.get("rerender_iou")]
    result: dict[str, Any] = {}
    if overlaps:
        result["mean_rerender_iou"] = {
            name: round(float(np.mean([each[name] for each in overlaps])), 4) for name in ("hand", "object")
        }
    for side in ("right", "left"):
        fits = [record["hand_fit_mm"] for record in records
                if record.get("hand_fit_mm") is not None and record["hand_side"] == side]  # fmt: skip
        if fits:
            result[f"hand_fit_mm_{side}"] = {"median": round(float(np.median(fits)), 3), "max": max(fits)}
    return result


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


STROKES = ("crop", "source")
MARGIN = 50  # pixels of the whole picture, the authors' number
MIN_AREA = 200  # pixels of the whole picture that hand and object must each have
FAR = 65.0  # metres; sensors write the largest number for no answer, and the folder's depth ends at 65.5
SKIN_JOINTS = [k for k in range(21) if k not in (4, 8, 12, 16, 20)]  # keypoints that are joints, not fingertips


class FrameConverter:
    """Writes frames of a source into a dataset folder; one in each process.

    folder       the dataset folder
    size         height and width of the crops, pixels
    margin       of the crop around hand and object, pixels of the whole picture
    normals      one of NORMALS; depth_files is the folder for "depth-files", depth_model the network for "estimated"
    mano_path    MANO file; without it the records have no hand parameters and no normals can be rendered
    strokes      "crop": the skeleton is drawn at `size`, as rendered skeletons are; "source": in the whole picture and
                 resized with it, as in the authors' reader
    text         caption with {object} for the noun; None: the paper's template
    min_area     pixels of the whole picture below which hand or object count as not there
    order        numbers of the source's frames; record i is frame order[i].  None: all in their order
    Raises ValueError when the choices need something that is not there, naming what else can be chosen.
    """

    def __init__(
        self,
        source: Source,
        folder: str | Path,
        size: int = 512,
        margin: int = MARGIN,
        normals: str = "rendered",
        depth_files: str | Path | None = None,
        depth_model: str = DPT_HYBRID,
        mano_path: str | Path | None = None,
        strokes: str = "crop",
        text: str | None = None,
        min_area: int = MIN_AREA,
        order: np.ndarray | None = None,
    ) -> None:
        check_needs(source, normals, mano_path, depth_files)
        self.source, self.folder, self.size, self.margin = source, Path(folder), size, margin
        self.normals, self.depth_files, self.strokes, self.min_area = normals, depth_files, strokes, min_area
        self.text = text or PLAIN_TEXTS["hand_object"]
        self.order = np.arange(len(source)) if order is None else order
        self.hand = load_hand(mano_path) if mano_path else None
        estimates = normals == "estimated" and not source.is_scenery
        self.estimator = DepthEstimator(depth_model) if estimates else None
        # After the estimator: GL's software driver and the compiler behind torch each bring an LLVM, and loading the
        # compiler's second crashes the process.
        self.renderer = Renderer() if source.has_geometry else None

    def convert(self, index: int) -> dict[str, Any]:
        """Write the pictures of record `index`; returns the record, or what RejectionLog.add takes."""
        try:
            frame = self.source.read(int(self.order[index]))
            return self._write(index, frame)
        except Rejected as rejected:
            return {"index": index, "rejected": rejected.reason, "detail": rejected.detail}

    def _write(self, index: int, frame: SourceFrame) -> dict[str, Any]:
        if frame.is_scenery:
            height, width = frame.image.shape[:2]
            image = Crop(0, 0, width, height, self.size).cut_picture(frame.image)
            return write_pictures(self.folder, index, self._record(frame, frame.sentence), image)
        if frame.depth is not None and frame.depth.shape != frame.image.shape[:2]:
            raise Rejected("the depth file has another size", f"{frame.depth.shape}, picture {frame.image.shape[:2]}")
        hand_mesh = self.hand(frame.hand_params) if self.hand and frame.hand_params else None
        whole = frame.label_map
        if whole is None:
            whole = self._render(frame, hand_mesh, frame.intrinsics, *frame.image.shape[:2]).label_map
        for label, what in ((1, "hand"), (2, "object")):
            area = int((whole == label).sum())
            if area < self.min_area:
                raise Rejected(f"too little of the {what} is seen", f"{area} pixels, {self.min_area} asked for")
        window = Crop(*(frame.box or box_around(whole > 0, self.margin)), self.size)
        image = window.cut_picture(frame.image)
        gbuffer = None
        if frame.intrinsics is not None:
            gbuffer = self._render(frame, hand_mesh, window.intrinsics(frame.intrinsics), self.size, self.size)
        label_map = window.cut_map(whole) if frame.label_map is not None else gbuffer.label_map
        surface_normals, drawn = self._surface_normals(frame, window, whole, label_map, gbuffer, image)
        conditions = Conditions(
            self._skeleton(frame, window), draw_normal(surface_normals, drawn), draw_segmentation(label_map)
        )
        record = self._record(frame, frame.sentence or self.text.replace("{object}", frame.noun or "object"))
        record |= self._annotation(frame, window, hand_mesh)
        has_mesh = bool(frame.objects) and frame.objects[0].object_mesh is not None
        complete = hand_mesh is not None and has_mesh and all(posed.object_mesh for posed in frame.objects)
        record["rerender_iou"] = overlap(gbuffer, label_map) if complete and frame.label_map is not None else None
        return write_pictures(
            self.folder, index, record, image, conditions,
            depth=None if frame.depth is None else window.cut_map(np.where(frame.depth < FAR, frame.depth, 0)),
            object_mask=gbuffer.object_mask if has_mesh else None,
        )  # fmt: skip

    def _record(self, frame: SourceFrame, text: str) -> dict[str, Any]:
        """What every record of a source has; keys beyond the folder's own are always there, so rows share a schema."""
        extra = dict.fromkeys(("crop_box", "skeleton_strokes", "hand_fit_mm", "rerender_iou", "other_objects"))
        return {"text": text, "height": self.size, "width": self.size, "source": frame.source,
                "source_frame": frame.name, **extra}  # fmt: skip

    def _annotation(self, frame: SourceFrame, window: Crop, hand_mesh: HandMesh | None) -> dict[str, Any]:
        """Numbers of the source in the pixels of the crop; nothing that the source does not say."""
        record: dict[str, Any] = {
            "category": frame.noun, "normal_source": self.normals, "hand_side": frame.hand_side,
            "keypoints_3d": frame.keypoints_3d, "keypoint_convention": frame.keypoint_convention,
            "crop_box": [window.left, window.top, window.right, window.bottom],
            "skeleton_strokes": "source" if frame.skeleton is not None else self.strokes,
        }  # fmt: skip
        if frame.intrinsics is not None:
            record["intrinsics"] = window.intrinsics(frame.intrinsics)
        if frame.keypoints_2d is not None:
            record["keypoints_2d"] = window.points(frame.keypoints_2d)
            record["hand_in_picture"] = bool(inside_picture(record["keypoints_2d"], self.size, self.size))
        if frame.objects:
            held, *others = [
                {"object_path": posed.object_mesh and write_object(self.folder, posed.object_mesh),
                 "object_to_camera": posed.object_to_camera.ravel().tolist()} for posed in frame.objects
            ]  # fmt: skip
            record |= held | {"other_objects": others}
        if hand_mesh is not None:
            pose = frame.hand_params
            record |= {key: getattr(pose, key) for key in ("hand_betas", "global_orient", "hand_pose", "transl")}
            record["hand_model"] = self.hand.name
            off = np.linalg.norm(hand_mesh.keypoints_3d - frame.keypoints_3d, axis=1)[SKIN_JOINTS]
            record["hand_fit_mm"] = round(float(1000 * off.max()), 4)
        return record

    def _skeleton(self, frame: SourceFrame, window: Crop) -> np.ndarray:
        if frame.skeleton is not None:
            return window.cut_picture(frame.skeleton)
        if self.strokes == "source":
            return window.cut_picture(draw_skeleton(frame.keypoints_2d, *frame.image.shape[:2]))
        return draw_skeleton(window.points(frame.keypoints_2d), self.size, self.size)

    def _render(
        self, frame: SourceFrame, hand_mesh: HandMesh | None, intrinsics: np.ndarray, height: int, width: int
    ) -> GBuffer:
        """Everything annotated in one view, the nearest in front; its object_mask is the held object's."""
        posed = [each for each in frame.objects if each.object_mesh is not None]
        pieces = []
        # One object a call, in its own frame, so that the renderer knows its mesh again; the hand with the first.
        for k, each in enumerate(posed or [PosedObject(None, np.eye(4))]):
            hand_vertices = hand_faces = vertices = faces = None
            if k == 0 and hand_mesh is not None:
                hand_vertices = transform_points(np.linalg.inv(each.object_to_camera), hand_mesh.vertices)
                hand_faces = hand_mesh.faces
            if each.object_mesh is not None:
                vertices, faces = each.object_mesh.vertices, each.object_mesh.faces
            camera = Camera(intrinsics, each.object_to_camera, height, width)
            pieces.append(self.renderer.render(hand_vertices, hand_faces, vertices, faces, camera))
        return nearest_of(pieces)

    def _surface_normals(
        self, frame: SourceFrame, window: Crop, whole: np.ndarray, label_map: np.ndarray, gbuffer: GBuffer | None,
        image: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
        """Normals (size, size, 3) and where they are known, by the chosen way."""
        seen = label_map > 0
        if self.normals == "rendered":
            return gbuffer.surface_normals, seen & (gbuffer.label_map > 0)
        if self.normals == "estimated":
            return resize_normals(normals_from_inverse_depth(self.estimator(image)), self.size), seen
        if self.normals == "sensor-depth":
            if frame.depth is None:
                raise Rejected("the depth file is missing")
            depth, in_metres = frame.depth, True
        else:
            depth, in_metres = read_depth_file(self.depth_files, frame.name)
        is_whole = depth.shape == frame.image.shape[:2]
        if not is_whole and depth.shape[0] != depth.shape[1]:
            raise Rejected("the depth file has another size", f"{depth.shape}: neither the picture's nor a square")
        depth = window.square(depth) if is_whole else depth
        if not in_metres or frame.intrinsics is None:
            inverse_depth = scale_inverse_depth(depth) if in_metres else depth
            return resize_normals(normals_from_inverse_depth(inverse_depth), self.size), seen
        side = len(depth)
        square = Crop(window.left, window.top, window.right, window.bottom, side)
        normals = normals_from_depth(depth, square.cut_map(whole), square.intrinsics(frame.intrinsics))
        normals = resize_normals(normals, self.size)
        length = np.sqrt(np.einsum("hwk,hwk->hw", normals, normals))
        known = seen & (length > 0.1)
        normals[known] /= length[known, None]  # most of a crop is background
        return normals, known


def convert_frames(run: Any, writer: DatasetWriter, log: RejectionLog, todo: list[int]) -> None:
    """Convert frames and append their records in order, so that every run writes the same lines.

    run   map(method name, numbers) of hoi/common/machine.py, whose makers are FrameConverters
    todo  numbers of the records
    """
    with tqdm(total=len(todo), unit="frame") as progress:
        for result in run("convert", todo):
            (log.add if "rejected" in result else writer.append)(result)
            progress.update()


def nearest_of(pieces: list[GBuffer]) -> GBuffer:
    """One or more renders of one view as one; the first gives object_mask, and wins where two are equally near."""
    if len(pieces) == 1:
        return pieces[0]
    first = pieces[0]
    depth, label_map, normals = first.depth.copy(), first.label_map.copy(), first.surface_normals.copy()
    for piece in pieces[1:]:
        wins = (piece.label_map > 0) & ((piece.depth < depth) | (label_map == 0))
        depth[wins], label_map[wins] = piece.depth[wins], piece.label_map[wins]
        normals[wins] = piece.surface_normals[wins]
    return GBuffer(depth, label_map, normals, first.object_mask)


def overlap(gbuffer: GBuffer, label_map: np.ndarray) -> dict[str, float]:
    """Intersection over union of rendered and annotated pixels: hand, object."""
    result = {}
    for label, name in ((1, "hand"), (2, "object")):
        result[name] = round(intersection_over_union(gbuffer.label_map == label, label_map == label), 4)
    return result
