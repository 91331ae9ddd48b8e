"""NOCS-CAMERA, for category-level pose estimation: records of a dataset folder -> frames, models, exact poses.

What the files are, and how their axes are turned, is said by assets/exports/nocs.md, which goes with every export.
"""

import pickle
import shutil
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import trimesh
from PIL import Image, ImageFilter
from tqdm import tqdm

from hoi.common.arrays import box_centre, box_of
from hoi.data.folder import array_of, load_depth, load_image, load_label_map, load_mesh
from hoi.export.folder import OBJECT_KEYS, hand_annotation, lacking, lines_of_json, model_name
from hoi.geometry.camera import CAMERA_FOV_DEG, Camera, make_intrinsics, unproject
from hoi.geometry.render import OBJECT, Renderer
from hoi.geometry.shapes import Mesh

HEIGHT, WIDTH, LEFT = 480, 640, 80  # of a frame; first column of the middle square
# Readers have these numbers in their code, so every frame has this camera, whatever its picture was made with.
INTRINSICS = np.array([[577.5, 0.0, 319.5], [0.0, 577.5, 239.5], [0.0, 0.0, 1.0]])
FRAMES_PER_SCENE = 10
MIN_PIXELS, MAX_WIDTH, MAX_HEIGHT = 64, 600, 440  # of the visible object: readers drop what is smaller or larger
# Number of the class, and the synset of ShapeNet that its models are filed under.  Camera and laptop are not held here.
NOCS_CLASSES = {"bottle": (1, "02876657"), "bowl": (2, "02880940"), "can": (4, "02946921"), "mug": (6, "03797390")}
OTHER_SYNSETS = ("02942699", "03642806")  # cameras and laptops: SPD lists their folders too
NOCS_KEYS = ("depth_file_name", *OBJECT_KEYS)
Z_UP_TO_Y_UP = np.array([[1.0, 0, 0], [0, 0, 1.0], [0, -1.0, 0]])
READERS_SIGNS = np.array([1.0, 1.0, -1.0])  # they turn z of models and coordinates around, see nocs.md
BLUR = 12  # pixels; chosen by eye: the sides keep the picture's colours and show no second object
SHAPE_POINTS, DRAWN_POINTS = 1024, 3072  # of a model in camera_train.pkl; what SPD draws to choose them from


@dataclass(frozen=True)
class Normalization:
    """Between a mesh in metres, z up, and the NOCS model q: box centre at the origin, box diagonal 1, y up.

    centre (3,) metres; diagonal metres
    """

    centre: np.ndarray
    diagonal: float

    @classmethod
    def of(cls, vertices: np.ndarray) -> "Normalization":
        """Of the box around vertices (V, 3), metres."""
        return cls(box_centre(vertices), float(np.linalg.norm(np.ptp(vertices, axis=0))))

    def model(self, vertices: np.ndarray) -> np.ndarray:
        """(V, 3) metres -> (V, 3) q."""
        return (vertices - self.centre) @ Z_UP_TO_Y_UP.T / self.diagonal

    def pose(self, object_to_camera: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rotation (3, 3) and translation (3,) metres that take diagonal * q to the camera frame."""
        rotation = object_to_camera[:3, :3]
        return rotation @ Z_UP_TO_Y_UP.T, rotation @ self.centre + object_to_camera[:3, 3]


@dataclass(frozen=True)
class SPDModel:
    """A model as SPD prepares it: a mug is moved until its body, not body and handle, is centred, then scaled again.

    points  (1024, 3) scale * (q + shift)
    shift   (3,) T0, in units of q; zero but for mugs
    scale   s0, which makes the box around the origin as long as 1 again; 1 but for mugs
    """

    points: np.ndarray
    shift: np.ndarray
    scale: float

    @classmethod
    def of(cls, vertices: np.ndarray, faces: np.ndarray, category: str) -> "SPDModel":
        """Of a model with vertices (V, 3) q.  Source: SPD, preprocess/shape_data.py."""
        drawn, _ = trimesh.sample.sample_surface(trimesh.Trimesh(vertices, faces, process=False), DRAWN_POINTS, seed=0)
        points = drawn[farthest_points(drawn, SHAPE_POINTS)]
        if category != "mug":
            return cls(points, np.zeros(3), 1.0)
        x, z = points[:, 0], points[:, 2]
        shift = np.array([-np.ptp(z) / 2 - x.min(), 0.0, 0.0])  # the body is as deep as wide and begins at x.min()
        scale = 1 / float(np.linalg.norm(2 * np.abs(points + shift).max(axis=0)))
        return cls(scale * (points + shift), shift, scale)


def farthest_points(points: np.ndarray, count: int) -> list[int]:
    """Indices of the first of the points (N, 3), then `count` - 1 times of that farthest from all chosen."""
    chosen, distances = [0], np.full(len(points), np.inf)
    while len(chosen) < count:
        distances = np.minimum(distances, np.square(points - points[chosen[-1]]).sum(axis=1))
        chosen.append(int(distances.argmax()))
    return chosen


def unfit_for_nocs(record: dict[str, Any]) -> str:
    """Why a record cannot be a frame of NOCS; empty when it can."""
    if absent := lacking(record, NOCS_KEYS):
        return absent
    if record.get("object_frame") == "file":
        return "their meshes stand in their own frames (--scenes), and NOCS needs all of a category in one"
    height, width = record["height"], record["width"]
    # Half a frame's height over its focal length is the same at every size, so pictures of any size will do.
    wanted = make_intrinsics(height, height, CAMERA_FOV_DEG["nocs"])
    given = array_of(record, "intrinsics")
    if height != width or not np.allclose(given, wanted, atol=1e-3):
        return (
            f"their camera is not that of NOCS (focal length {wanted[0, 0]:.1f} px at a height of {height}): "
            "make them with make_dataset.py --camera nocs"
        )
    if record.get("category") not in NOCS_CLASSES:
        return f"their category is none of NOCS's that are known here ({', '.join(NOCS_CLASSES)})"
    return ""


def write_frames(
    folder: Path, records: list[dict[str, Any]], out: Path, labels: bool = False, first_scene: int = 0
) -> Counter[str]:
    """Write records that are fit for NOCS into an empty folder.

    labels       also write what SPD's training reads: each frame's exact pose, points of the models, moves of the mugs
    first_scene  number of the first folder of ten frames
    returns      how many were left out after all, by reason: what is seen of the object is known only when it is drawn
    """
    make_folders(out)
    categories = {record["object_path"]: record["category"] for record in records}
    meshes = {path: load_mesh(folder, {"object_path": path}) for path in sorted(categories)}
    normalizations = {path: Normalization.of(vertices) for path, (vertices, _) in meshes.items()}
    names = {path: model_name(path) for path in meshes}
    for path, mesh in meshes.items():
        write_model(out / "obj_models" / "train" / NOCS_CLASSES[categories[path]][1] / names[path], *mesh)
    moved = {}
    if labels:
        for path, (vertices, faces) in meshes.items():
            moved[path] = SPDModel.of(normalizations[path].model(vertices), faces, categories[path])
        points = {names[path]: model.points for path, model in moved.items()}
        mugs = {names[path]: [moved[path].shift, moved[path].scale] for path in moved if categories[path] == "mug"}
        write_pickle(out / "obj_models" / "camera_train.pkl", points)
        write_pickle(out / "obj_models" / "mug_meta.pkl", mugs)
    renderer, left_out, hands = Renderer(), Counter(), []
    for record in tqdm(records, unit="picture"):
        path = record["object_path"]
        frame = draw_frame(folder, record, meshes[path], normalizations[path], renderer)
        if isinstance(frame, str):
            left_out[frame] += 1
            continue
        # Readers count to the number of folders times ten: there may be no gaps.
        scene, number = divmod(len(hands), FRAMES_PER_SCENE)
        name = f"train/{first_scene + scene:05d}/{number:04d}"
        _write_frame(out / "CAMERA" / name, record, frame)
        if labels:
            _write_label(out / "CAMERA" / name, record, frame, normalizations[path], moved[path])
        hands.append((name, {"record": record["index"], "text": record.get("text"), "hand": hand_annotation(record)}))
    if rest := len(hands) % FRAMES_PER_SCENE:  # in a scene that is not whole
        left_out[f"they do not fill a scene of {FRAMES_PER_SCENE}, and DualPoseNet takes whole scenes alone"] += rest
        shutil.rmtree((out / "CAMERA" / hands[-1][0]).parent)
        del hands[-rest:]
    (out / "hands.json").write_text(lines_of_json(hands), encoding="utf-8")
    if labels:
        (out / "CAMERA" / "train_list.txt").write_text("".join(f"{name}\n" for name, _ in hands))
    return left_out


def make_folders(out: Path) -> None:
    """The folders that the preparations of SPD and DualPoseNet list, whether anything is in them or not."""
    synsets = [*(synset for _, synset in NOCS_CLASSES.values()), *OTHER_SYNSETS]
    places = ["CAMERA/train", "CAMERA/val", "Real/train", "Real/test"]
    for place in places + [f"obj_models/{part}/{synset}" for part in ("train", "val") for synset in synsets]:
        (out / place).mkdir(parents=True)
    for name in ("CAMERA", "Real"):
        # On a disk that takes both for one name nothing is missing; without links, nocs.md says what to do.
        with suppress(OSError):
            (out / name.lower()).symlink_to(name, target_is_directory=True)


@dataclass(frozen=True)
class Frame:
    """Pictures of one frame: color (480, 640, 3), visible (480, 640) bool, depth_mm uint16, coordinates in [0, 1]."""

    color: np.ndarray
    visible: np.ndarray
    depth_mm: np.ndarray
    coordinates: np.ndarray


def draw_frame(
    folder: Path, record: dict[str, Any], mesh: Mesh, normalization: Normalization, renderer: Renderer
) -> Frame | str:
    """The pictures of a record's frame, or why readers would drop it."""
    object_to_camera = array_of(record, "object_to_camera")
    seen = renderer.render(None, None, *mesh, Camera(INTRINSICS, object_to_camera, HEIGHT, WIDTH))
    visible = seen.object_mask & (_in_frame(load_label_map(folder, record)) == OBJECT)
    if visible.sum() < MIN_PIXELS:
        return f"less than {MIN_PIXELS} pixels of the object are visible"
    left, top, right, bottom = box_of(visible)
    if right - left > MAX_WIDTH or bottom - top > MAX_HEIGHT:
        return f"the object is larger than {MAX_WIDTH} x {MAX_HEIGHT} pixels"
    # The object's depth is rendered anew: readers fit coordinates to depths, so both have the frame's resolution.  The
    # hand's is the record's.
    depth = np.where(visible, seen.depth, _in_frame(load_depth(folder, record)))
    rotation, translation = normalization.pose(object_to_camera)
    rows, columns = np.nonzero(visible)
    points = unproject(columns, rows, depth[visible], INTRINSICS)
    points = (points - translation) @ rotation / normalization.diagonal
    coordinates = np.zeros((HEIGHT, WIDTH, 3))
    coordinates[visible] = points * READERS_SIGNS + 0.5
    return Frame(color_frame(load_image(folder, record)), visible, np.rint(1000 * depth).astype(np.uint16), coordinates)


def _in_frame(pixels: np.ndarray) -> np.ndarray:
    """(N, N) values of a square picture -> (480, 640), those of the nearest pixels, 0 beside the square."""
    nearest = (np.arange(HEIGHT) + 0.5) * len(pixels) / HEIGHT
    chosen = nearest.astype(int)
    frame = np.zeros((HEIGHT, WIDTH), dtype=pixels.dtype)
    frame[:, LEFT : LEFT + HEIGHT] = pixels[chosen[:, None], chosen]
    return frame


def color_frame(image: np.ndarray) -> np.ndarray:
    """(N, N, 3) uint8 -> (480, 640, 3): the picture in the middle of a wide, blurred copy of itself."""
    square = Image.fromarray(image).resize((HEIGHT, HEIGHT), Image.Resampling.LANCZOS)
    frame = square.resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR).filter(ImageFilter.GaussianBlur(BLUR))
    frame.paste(square, (LEFT, 0))
    return np.asarray(frame)


def _write_frame(stem: Path, record: dict[str, Any], frame: Frame) -> None:
    """Write the five files of a frame."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    class_id, synset = NOCS_CLASSES[record["category"]]
    # One object a frame, number 1: the others of a scene are not annotated.
    instance = np.where(frame.visible, 1, 255).astype(np.uint8)  # readers take red, and demand 255 as background
    pictures = {
        "color": frame.color,
        "coord": np.rint(255 * frame.coordinates.clip(0, 1)).astype(np.uint8),
        "depth": frame.depth_mm,
        "mask": np.repeat(instance[:, :, None], 3, axis=2),
    }
    for kind, pixels in pictures.items():
        Image.fromarray(pixels).save(f"{stem}_{kind}.png", compress_level=1)
    Path(f"{stem}_meta.txt").write_text(f"1 {class_id} {synset} {model_name(record['object_path'])}\n")


def _write_label(
    stem: Path, record: dict[str, Any], frame: Frame, normalization: Normalization, model: SPDModel
) -> None:
    """Write a frame's exact pose in SPD's form, of the model as SPD moved it."""
    rotation, translation = normalization.pose(array_of(record, "object_to_camera"))
    left, top, right, bottom = box_of(frame.visible)
    label = {
        "class_ids": [NOCS_CLASSES[record["category"]][0]],
        "bboxes": np.array([[top, left, bottom, right]], dtype=np.int32),
        "scales": np.array([normalization.diagonal / model.scale]),
        "rotations": rotation[None],
        "translations": (translation - normalization.diagonal * rotation @ model.shift)[None],
        "instance_ids": [1],
        "model_list": [model_name(record["object_path"])],
    }
    write_pickle(Path(f"{stem}_label.pkl"), label)


def write_pickle(path: Path, content: dict[str, Any]) -> None:
    """Pickle arrays so that the readers' older numpy finds its modules, which numpy 2 moved."""
    # Protocol 2 names modules in plain text, a line each.
    path.write_bytes(pickle.dumps(content, protocol=2).replace(b"numpy._core", b"numpy.core"))


def write_model(folder: Path, vertices: np.ndarray, faces: np.ndarray) -> None:
    """Write model.obj and bbox.txt (largest corner, then smallest) of a mesh in metres, z up."""
    folder.mkdir(parents=True)
    points = Normalization.of(vertices).model(vertices) * READERS_SIGNS
    with open(folder / "model.obj", "w") as stream:
        np.savetxt(stream, points, "v %.8f %.8f %.8f")
        np.savetxt(stream, faces[:, ::-1] + 1, "f %d %d %d")  # turning z around turned the faces inside out
    np.savetxt(folder / "bbox.txt", [points.max(axis=0), points.min(axis=0)], "%.8f")
