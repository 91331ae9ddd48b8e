"""BOP, for 6D pose estimation: records of a dataset folder -> scenes, masks, models in millimetres.

What the files are is said by assets/exports/bop.md, which goes with every export.
"""

import json
import re
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import trimesh
from scipy.spatial import ConvexHull
from scipy.spatial.distance import cdist
from tqdm import tqdm
from trimesh.exchange.ply import export_ply

from hoi.common.arrays import box_centre, box_of
from hoi.data.folder import array_of, load_label_map, load_mesh, load_object_mask
from hoi.export.folder import OBJECT_KEYS, copy_picture, hand_annotation, lines_of_json, model_name, save_mask
from hoi.geometry.camera import Camera, project, transform_points
from hoi.geometry.objects import ALREADY_CENTRED, make_object
from hoi.geometry.render import OBJECT, Renderer
from hoi.geometry.shapes import Mesh

IMAGES_PER_SCENE = 1000  # as BOP's own synthetic training pictures have
BOP_KEYS = ("depth_file_name", "object_mask_file_name", *OBJECT_KEYS)
SCENE_FILES = ("scene_camera", "scene_gt", "scene_gt_info", "scene_hand")
BUILT_IN = re.compile(r"(bowl|bottle|can)_(\d{4,})")  # mugs have a handle
ROUND = 0.001  # metres between width and depth below which a built-in object is round: its polygon is not exactly


def write_scenes(
    folder: Path, records: list[dict[str, Any]], out: Path, whole: list[dict[str, Any]] | None = None
) -> None:
    """Write records that have all of BOP_KEYS into an empty folder.

    whole  the records of all splits, so that models have the same numbers in each; None: there are no others
    """
    whole = whole or records
    shown = {record["object_path"]: record for record in whole}  # of each mesh one record
    paths = sorted(shown)
    ids = {path: number for number, path in enumerate(paths, start=1)}
    meshes = {path: load_mesh(folder, {"object_path": path}) for path in paths}
    centres = {path: model_centre(shown[path], meshes[path][0]) for path in paths}
    write_models(out / "models", meshes, centres)
    # BOP keeps one camera for the whole set, to simulate sensors with; each picture has its own in scene_camera.json.
    fx, _, cx, _, fy, cy, *_ = records[0]["intrinsics"]
    camera = {"width": records[0]["width"], "height": records[0]["height"], "fx": fx, "fy": fy, "cx": cx, "cy": cy}
    (out / "camera.json").write_text(json.dumps(camera | {"depth_scale": 1.0}, indent=2) + "\n")
    renderer, pictures = Renderer(), iter(tqdm(records, unit="picture"))
    for number in range(-(-len(records) // IMAGES_PER_SCENE)):
        scene = out / "train" / f"{number:06d}"
        entries = []  # of one scene at a time: of 50,000 pictures they would take half a gigabyte
        for image_id, record in enumerate(islice(pictures, IMAGES_PER_SCENE)):
            path = record["object_path"]
            entry = _write_image(folder, record, scene, image_id, meshes[path], renderer)
            entries.append(entry | {"scene_gt": [scene_gt(record, ids[path], centres[path])]})
        for name in SCENE_FILES:
            lines = ((str(image_id), entry[name]) for image_id, entry in enumerate(entries))
            (scene / f"{name}.json").write_text(lines_of_json(lines))


def _write_image(
    folder: Path, record: dict[str, Any], scene: Path, image_id: int, mesh: Mesh, renderer: Renderer
) -> dict[str, Any]:
    """Write one picture with its masks; returns its entry in each of SCENE_FILES but scene_gt."""
    name = f"{image_id:06d}"
    copy_picture(folder, record, "file_name", scene / "rgb" / f"{name}.png")
    depth = copy_picture(folder, record, "depth_file_name", scene / "depth" / f"{name}.png")  # millimetres already
    mask = load_object_mask(folder, record)
    visible = mask & (load_label_map(folder, record) == OBJECT)
    for kind, pixels in (("mask", mask), ("mask_visib", visible)):
        save_mask(scene / kind / f"{name}_000000.png", pixels)
    silhouette, left, top = whole_silhouette(record, mask, *mesh, renderer)
    count, seen = int(silhouette.sum()), int(visible.sum())
    info = {
        "bbox_obj": _box(silhouette, left, top), "bbox_visib": _box(visible), "px_count_all": count,
        "px_count_valid": int((mask & (depth > 0)).sum()), "px_count_visib": seen,
        "visib_fract": seen / count if count else 0.0,
    }  # fmt: skip
    return {
        "scene_camera": {"cam_K": record["intrinsics"], "depth_scale": 1.0},
        "scene_gt_info": [info],
        "scene_hand": {"record": record["index"], "text": record.get("text"), "hand": hand_annotation(record)},
    }


def scene_gt(record: dict[str, Any], obj_id: int, centre: np.ndarray) -> dict[str, Any]:
    """The pose of the model, whose origin is at `centre` (3,) of the mesh, metres."""
    object_to_camera = array_of(record, "object_to_camera")
    translation = 1000 * (object_to_camera[:3, :3] @ centre + object_to_camera[:3, 3])
    return {"cam_R_m2c": object_to_camera[:3, :3].ravel().tolist(), "cam_t_m2c": translation.tolist(), "obj_id": obj_id}


def model_centre(record: dict[str, Any], vertices: np.ndarray) -> np.ndarray:
    """Of a record's mesh (V, 3), metres -> (3,); zero for one that is centred but for rounding, or of a scenes file:
    that keeps its own frame.
    """
    if record.get("object_frame") == "file":
        return np.zeros(3)
    centre = box_centre(vertices)
    return centre if np.abs(centre).max() > ALREADY_CENTRED else np.zeros(3)


def whole_silhouette(
    record: dict[str, Any], mask: np.ndarray, vertices: np.ndarray, faces: np.ndarray, renderer: Renderer
) -> tuple[np.ndarray, int, int]:
    """The object's silhouette also beyond the picture, on a canvas of three times its height and width, as BOP counts.

    mask     (H, W) bool, the silhouette inside the picture
    returns  silhouette (h, w) bool, and column and row of the picture at which its first pixel lies.  The mask itself
             when the object does not leave the picture: most do not, and rendering takes most of the time.
    """
    height, width = mask.shape
    object_to_camera = array_of(record, "object_to_camera")
    intrinsics = array_of(record, "intrinsics")
    pixels = project(transform_points(object_to_camera, vertices), intrinsics)
    if ((pixels >= -0.5) & (pixels <= np.array([width, height]) - 0.5)).all():  # false for NaN, behind the camera
        return mask, 0, 0
    shifted = intrinsics.copy()  # the same view, the picture in the middle of three by three
    shifted[:2, 2] += (width, height)
    camera = Camera(shifted, object_to_camera, 3 * height, 3 * width)
    return renderer.render(None, None, vertices, faces, camera).object_mask, -width, -height


def _box(mask: np.ndarray, left: int = 0, top: int = 0) -> list[int]:
    """[x, y, last x - first x, last y - first y], a pixel less than the true size, as in BOP; -1 for an empty mask."""
    if not mask.any():
        return [-1] * 4
    first_x, first_y, end_x, end_y = box_of(mask)
    return [first_x + left, first_y + top, end_x - first_x - 1, end_y - first_y - 1]


def write_models(folder: Path, meshes: dict[str, Mesh], centres: dict[str, np.ndarray]) -> None:
    """Write obj_000001.ply ... in the order of `meshes` (path in the dataset folder -> mesh), and what they are.

    centres  (3,) metres, by path: where the origin of each model lies
    """
    folder.mkdir()
    infos = []
    for number, (path, (vertices, faces)) in enumerate(meshes.items(), start=1):
        points = 1000 * (vertices - centres[path])
        model = trimesh.Trimesh(points, faces, process=False)  # with normals: BOP's renderer shades by them
        (folder / f"obj_{number:06d}.ply").write_bytes(export_ply(model, encoding="ascii", vertex_normal=True))
        infos.append((str(number), model_info(points) | symmetries(Path(path).stem, vertices)))
    (folder / "models_info.json").write_text(lines_of_json(infos))
    names = {str(number): model_name(path) for number, path in enumerate(meshes, start=1)}
    (folder / "names.json").write_text(json.dumps(names, indent=2) + "\n")


def model_info(vertices: np.ndarray) -> dict[str, float]:
    """Box and diameter of a model, vertices (V, 3) in millimetres."""
    low, size = vertices.min(axis=0), np.ptp(vertices, axis=0)
    outer = vertices[ConvexHull(vertices).vertices]  # the two farthest points lie on the hull
    parts = np.array_split(outer, -(-len(outer) // 1000))  # bounds memory
    info = {"diameter": float(max(cdist(part, outer).max() for part in parts))}
    for axis, least, extent in zip("xyz", low, size, strict=True):
        info |= {f"min_{axis}": float(least), f"size_{axis}": float(extent)}
    return info


def symmetries(object_id: str, vertices: np.ndarray) -> dict[str, Any]:
    """Symmetries of a built-in object under BOP's names; none is claimed for meshes of other origin.

    object_id, vertices (V, 3) metres  as stored in the dataset folder
    Bowls, cans (a ring pull, 2 mm high, does not count) and round bottles may be turned about z by any angle, oval
    bottles by half a turn, mugs not at all.
    """
    name = BUILT_IN.fullmatch(object_id)
    # The name alone proves nothing: a user's file may be called can_0003.
    if not name or not np.array_equal(make_object(name[1], int(name[2])).vertices, vertices):
        return {}
    size = np.ptp(vertices, axis=0)
    if abs(size[0] - size[1]) < ROUND:
        return {"symmetries_continuous": [{"axis": [0, 0, 1], "offset": [0, 0, 0]}]}
    return {"symmetries_discrete": [np.diag([-1.0, -1.0, 1.0, 1.0]).ravel().tolist()]}
