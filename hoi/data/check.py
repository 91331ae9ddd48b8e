"""Validate a dataset folder: everything in it against everything else.  Folder -> Report.

Files and sizes, keypoints against hand parameters and drawn skeletons, and the condition images against a render from
the annotation alone.
"""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hoi.common.files import read_json
from hoi.conditions import SEGMENTATION_COLORS, draw_conditions, draw_skeleton
from hoi.data import folder as dataset
from hoi.geometry.camera import project, transform_points
from hoi.geometry.hand import TIP_KEYPOINTS, HandModel, load_hand
from hoi.geometry.render import GBuffer, Renderer

KEYPOINT_TOLERANCE_PX = 0.01  # records hold nine digits, so a mistake shows far above it
KEYPOINT_TOLERANCE = 1e-5  # metres; the hand model computes in float32
# Keypoints of a dataset are its own: their pixels are rounded, and its fingertips are other vertices than ours.
OUR_KEYPOINTS = "openpose21"
SOURCE_TOLERANCE_PX, FIT_TOLERANCE_MM = 1.0, 0.1
# A folder made with one renderer is checked with another: GL and numpy round depths and normals otherwise, and give
# single pixels of a silhouette to the other side.
DEPTH_TOLERANCE_MM = 1.0  # half a millimetre is rounding
NORMAL_TOLERANCE = 4  # grey levels
SILHOUETTE_SHARE, SILHOUETTE_PIXELS = 0.005, 4  # of hand and object pixels, and besides, may differ
SHOWN_PROBLEMS = 20
NOTHING = "there is no geometry"  # scenery; not told as a lack


@dataclass
class Report:
    """What `check_folder` found.

    records, pictures, rendered   how many there are, and how many views were rendered again
    problems                      make the folder invalid, notes do not
    """

    folder: Path
    records: int = 0
    pictures: int = 0
    rendered: int = 0
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether the folder is valid."""
        return not self.problems

    def __str__(self) -> str:
        lines = [f"{self.folder}: {self.records} records, {self.pictures} with a picture, "
                 f"{self.rendered} geometries rendered again from their annotation"]  # fmt: skip
        lines += [f"  note: {note}" for note in self.notes]
        lines += [f"  PROBLEM: {problem}" for problem in self.problems[:SHOWN_PROBLEMS]]
        lines.append("  everything agrees" if self.ok else f"  {len(self.problems)} problems in all")
        return "\n".join(lines)


def check_folder(folder: str | Path, hand: HandModel | None = None, renderer: Renderer | None = None) -> Report:
    """Compare everything in a folder with everything else in it; what is wrong is reported, not raised.

    hand      the model for records made with MANO (the built-in hand is loaded when needed)
    renderer  that draws again; None: one is started when needed
    Every file is opened; keypoints_2d must be the projection of keypoints_3d, these the hand model's at the stored
    parameters, and the skeleton drawn exactly there; where normal_source is "geometry" the scene is rendered again from
    hand parameters, mesh and pose, and label map, depth, normals and object mask must agree.
    """
    folder = Path(folder)
    report = Report(folder)
    try:
        records = dataset.read_records(folder)
    except (ValueError, OSError) as error:
        report.problems.append(str(error))
        return report
    report.records, report.pictures = len(records), sum(record["file_name"] is not None for record in records)
    _check_description(report)
    checker, on_disk = _Checker(folder, hand, renderer), dataset.FolderFiles(folder)
    first_of: dict[str, dict[str, Any]] = {}
    unknown: Counter[str] = Counter()
    for record in records:
        problems = _file_problems(folder, on_disk, record)
        # Looks of a view share its condition images: the first is compared with them, the others with the first.
        shared = first_of.setdefault(record.get("skeleton_file_name") or f"record {record['index']}", record)
        if not problems and shared is record:
            problems = checker.annotation_problems(record)
            reason = checker.cannot_render(record) if not problems else ""
            if reason:
                unknown[reason] += 1
            elif not problems:
                problems = checker.render_problems(record)
                report.rendered += 1
        elif shared is not record:
            problems += [f"{key} differs from record {shared['index']}, which has the same condition images"
                         for key in dataset.NUMBER_SHAPES if record.get(key) != shared.get(key)]  # fmt: skip
        report.problems += [f"record {record['index']}: {problem}" for problem in problems]
    unknown.pop(NOTHING, None)
    report.notes += [f"{count} geometries were not rendered again: {reason}" for reason, count in unknown.items()]
    leftovers = [path.name for path in folder.rglob(".*.tmp")]
    if leftovers:
        report.notes.append(f"{len(leftovers)} temporary files of an interrupted run, harmless: {leftovers[0]} ...")
    return report


def _check_description(report: Report) -> None:
    try:
        counts = read_json(report.folder / "dataset.json", "description").get("counts")
    except (ValueError, OSError) as error:
        report.problems.append(str(error))
        return
    if counts is None:
        report.notes.append("dataset.json has no counts: the run was not finished; the same command continues it")
    elif counts.get("records") != report.records:
        counted = counts.get("records")
        report.problems.append(f"dataset.json counts {counted} records, the metadata holds {report.records}")


def _file_problems(folder: Path, on_disk: dataset.FolderFiles, record: dict[str, Any]) -> list[str]:
    """Keys, lengths, and every file: present, readable, of the right size and kind."""
    absent = [key for key in dataset.RECORD_KEYS if key not in record]
    problems = [f"keys are missing: {', '.join(absent)}"] if absent else []
    missing = on_disk.missing(record)
    problems += [f"{path} is missing" for path in missing]
    for key in dataset.PICTURE_FOLDERS:
        if record.get(key) is None or record[key] in missing:
            continue
        try:
            dataset.load_picture(folder, record, key)
        except (ValueError, OSError) as error:
            problems.append(str(error))
    return problems


class _Checker:
    """Models and meshes that are loaded once for all records."""

    def __init__(self, folder: Path, hand: HandModel | None, renderer: Renderer | None) -> None:
        self.folder, self.renderer = folder, renderer
        self.hands = {} if hand is None else {hand.name: hand}
        self.meshes: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def hand(self, name: str) -> HandModel | None:
        """The model of that name, None for one that was not given."""
        if name == "builtin" and name not in self.hands:
            self.hands[name] = load_hand()
        return self.hands.get(name)

    def annotation_problems(self, record: dict[str, Any]) -> list[str]:
        """Keypoints against each other, against the hand model and against the drawn skeleton; colours."""
        problems = []
        segmentation = self._picture(record, "segmentation_file_name")
        if segmentation is not None:
            known = (segmentation[:, :, None] == np.asarray(SEGMENTATION_COLORS)).all(axis=-1).any(axis=-1)
            if not known.all():
                row, column = np.argwhere(~known)[0]
                color = segmentation[row, column].tolist()
                problems.append(
                    f"segmentation has {(~known).sum()} pixels of a colour that is not one of its three, "
                    f"the first is {color} at row {row}, column {column}"
                )
        if record["keypoints_2d"] is None:
            return problems
        keypoints_2d = dataset.array_of(record, "keypoints_2d")
        skeleton = self._picture(record, "skeleton_file_name")
        # Strokes drawn in a source's pixels were enlarged with its picture and cannot be drawn again.
        if skeleton is not None and record.get("skeleton_strokes") != "source":
            try:
                redrawn = draw_skeleton(keypoints_2d, *skeleton.shape[:2], record.get("skeleton_rule"))
            except ValueError as error:  # a rule that does not exist
                return [*problems, str(error)]
            if wrong := (redrawn != skeleton).any(axis=-1).sum():
                problems.append(f"skeleton differs in {wrong} pixels from the one drawn at keypoints_2d")
        if record["keypoints_3d"] is None or record["intrinsics"] is None:
            return problems
        keypoints_3d = dataset.array_of(record, "keypoints_3d")
        off = np.abs(project(keypoints_3d, dataset.array_of(record, "intrinsics")) - keypoints_2d).max(axis=1)
        ours = record["keypoint_convention"] in (OUR_KEYPOINTS, None)
        if not off.max() <= (KEYPOINT_TOLERANCE_PX if ours else SOURCE_TOLERANCE_PX):
            worst = int(np.nan_to_num(off, nan=np.inf).argmax())
            problems.append(f"keypoints_2d is not the projection of keypoints_3d: {worst} is {off[worst]:.2f} px off")
        hand = self.hand(record["hand_model"]) if record["hand_model"] else None
        if hand is not None and record["transl"] is not None:
            off = np.linalg.norm(hand(dataset.hand_of(record)).keypoints_3d - keypoints_3d, axis=1)
            if not ours:
                fit_mm = 1000 * np.delete(off, TIP_KEYPOINTS).max()
                if abs(fit_mm - record.get("hand_fit_mm", 0.0)) > FIT_TOLERANCE_MM:
                    problems.append(f"hand parameters put a joint {fit_mm:.2f} mm from keypoints_3d, the record says "
                                    f"{record.get('hand_fit_mm')}")  # fmt: skip
            elif off.max() > KEYPOINT_TOLERANCE:
                far_mm = 1000 * off.max()
                problems.append(f"hand parameters put keypoint {off.argmax()} {far_mm:.2f} mm from keypoints_3d")
        return problems

    def cannot_render(self, record: dict[str, Any]) -> str:
        """Why a record is not rendered again, or an empty string; NOTHING for scenery, which has no geometry."""
        if all(record[key] is None for key in list(dataset.PICTURE_FOLDERS)[1:]):
            return NOTHING
        if record["normal_source"] != "geometry":
            return "their condition images do not come from meshes"
        if record["transl"] is None and record["object_path"] is None:
            return "they have neither hand parameters nor an object mesh"
        if record["transl"] is not None and self.hand(record["hand_model"]) is None:
            return f"give the hand model {record['hand_model']!r} (--mano FILE)"
        return ""

    def render_problems(self, record: dict[str, Any]) -> list[str]:
        """Label map, depth, normals and object mask against a render from parameters, mesh and poses alone."""
        try:
            gbuffer = self._render(record)
        except ValueError as error:
            return [f"cannot be rendered again: {error}"]
        conditions = draw_conditions(None, gbuffer.label_map, gbuffer.surface_normals)
        normal = conditions.normal.astype(int)  # differences of uint8 would wrap
        foreground = max(int((gbuffer.label_map > 0).sum()), 1)
        allowed = SILHOUETTE_PIXELS + SILHOUETTE_SHARE * foreground
        differences = {
            "segmentation_file_name": lambda pixels: (pixels != conditions.segmentation).any(axis=-1),
            "normal_file_name": lambda pixels: (np.abs(pixels - normal) > NORMAL_TOLERANCE).any(axis=-1),
            "depth_file_name": lambda pixels: np.abs(pixels - 1000.0 * gbuffer.depth) > DEPTH_TOLERANCE_MM,
            "object_mask_file_name": lambda pixels: (pixels > 0) != gbuffer.object_mask,
        }
        wrong = {dataset.PICTURE_FOLDERS[key]: difference(self._picture(record, key)).sum()
                 for key, difference in differences.items() if record[key] is not None}  # fmt: skip
        return [f"{name} differs from a re-render in {count} pixels ({allowed:.0f} allowed)"
                for name, count in wrong.items() if count > allowed]  # fmt: skip

    def _render(self, record: dict[str, Any]) -> GBuffer:
        if self.renderer is None:
            self.renderer = Renderer()
        # The object's frame is the world, so its mesh (and the renderer's cache of it) stays as it is on disk.
        camera = dataset.camera_of(record)
        hand = thing = (None, None)  # vertices and faces
        if record["transl"] is not None:
            hand_mesh = self.hand(record["hand_model"])(dataset.hand_of(record))
            hand = transform_points(np.linalg.inv(camera.world_to_camera), hand_mesh.vertices), hand_mesh.faces
        if record["object_path"] is not None:
            if record["object_path"] not in self.meshes:
                self.meshes[record["object_path"]] = dataset.load_mesh(self.folder, record)
            thing = self.meshes[record["object_path"]]
        return self.renderer.render(*hand, *thing, camera)

    def _picture(self, record: dict[str, Any], key: str) -> np.ndarray | None:
        return None if record[key] is None else dataset.load_picture(self.folder, record, key)
