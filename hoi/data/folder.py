"""The dataset folder, read: disk -> records, pictures, and their numbers as arrays.  writer.py is the way back.

    out/metadata.jsonl             one JSON object a picture, first key `file_name` (a Hugging Face image folder)
    out/images/000000.png          RGB, absent in a conditions-only folder
    out/skeleton, segmentation, normal/000000.png   the three condition images
    out/depth/000000.png           16 bit, millimetres, 0 = nothing
    out/object_mask/000000.png     whole object silhouette, the hand ignored, 0 or 255
    out/objects/mug_0003.ply       each mesh once, metres, in the canonical frame that `object_to_camera` refers to
    out/dataset.json, out/grid.png how it was made; a contact sheet to look at first
    out/README.md                  what the numbers mean and how to load them (hoi/assets/dataset.md)

Hand parameters and keypoints_3d are in the camera frame: the hand model called with them gives camera coordinates.
A record is complete or absent: its pictures are renamed into place first, its line is appended last.
"""

import hashlib
import json
import math
import os
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from hoi.common.files import read_json, read_json_lines, read_picture, short_hash, unlike_a_split, write_whole
from hoi.conditions import KEYPOINTS, Conditions, read_segmentation
from hoi.geometry.camera import Camera
from hoi.geometry.hand import HandParams
from hoi.geometry.mesh_files import read_mesh

# Numbers in a record and the shapes of their arrays; a record holds them flat, row after row.
NUMBER_SHAPES = {
    "intrinsics": (3, 3), "object_to_camera": (4, 4), "hand_betas": (10,), "global_orient": (3,), "hand_pose": (45,),
    "transl": (3,), "keypoints_3d": (KEYPOINTS, 3), "keypoints_2d": (KEYPOINTS, 2),
}  # fmt: skip
PICTURE_FOLDERS = {
    "file_name": "images", "skeleton_file_name": "skeleton", "segmentation_file_name": "segmentation",
    "normal_file_name": "normal", "depth_file_name": "depth", "object_mask_file_name": "object_mask",
}  # fmt: skip
FLAT_KEYS = ("depth_file_name", "object_mask_file_name")  # pictures without colours
CONDITION_KEYS = ("skeleton_file_name", "segmentation_file_name", "normal_file_name")
FILE_KEYS = (*PICTURE_FOLDERS, "object_path")
# Every record has all of these, null where unknown: readers of the folder want one schema.
RECORD_KEYS = (
    "file_name", "index", "text", *list(PICTURE_FOLDERS)[1:], "height", "width", "category", "object_path",
    "intrinsics", "object_to_camera", "hand_side", "hand_model", "hand_betas", "global_orient", "hand_pose", "transl",
    "keypoints_3d", "keypoints_2d", "hand_in_picture", "trajectory", "frame", "contact", "penetration_mm", "grasp",
    "normal_source", "keypoint_convention", "source", "look",
    "seed", "guidance_scale", "sampler", "num_inference_steps", "checkpoint", "negative_prompt", "verification",
)  # fmt: skip
FIRST_KEYS = RECORD_KEYS[: RECORD_KEYS.index("intrinsics")]
USUAL_PATH = re.compile(r"\w+/\w+\.\w+")
NUMBERED = re.compile(r"(\d{6}|[1-9]\d{6})\.png", re.ASCII)
# In a line; not in a text, where a quotation mark has a backslash before it.
NUMBERS = re.compile(rf'"(?:{"|".join(NUMBER_SHAPES)})": \[[^][{{"]*\]'.encode())

# What other keys hold where they are not null.
KINDS = {
    **dict.fromkeys(("text", "category", "hand_side", "hand_model", "normal_source", "keypoint_convention", "source",
                     "sampler", "negative_prompt", "skeleton_rule", "object_frame",
                     *FILE_KEYS), (str, "text")),
    **dict.fromkeys(("index", "height", "width", "scene", "trajectory", "frame", "seed", "num_inference_steps"),
                    (int, "a whole number")),
    **dict.fromkeys(("penetration_mm", "guidance_scale"), ((int, float), "a finite number")),
    **dict.fromkeys(("hand_in_picture", "contact"), (bool, "true or false")),
    **dict.fromkeys(("grasp", "look", "checkpoint", "verification"), (dict, "an object")),
}  # fmt: skip


# --- records ---


def read_records(folder: str | Path, keys: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """All complete records of a folder in order of `index`; lines of ranks that were not merged yet are included.

    keys  keep these alone, `index` among them; None: all.  Half a million whole records take gigabytes
    Raises FileNotFoundError without any metadata file, ValueError naming file, line and key for what is no record:
    every value has its kind, numbers are finite, paths lead nowhere but into the folder.  A last line cut short by an
    interruption counts as absent.  When an index appears twice the later line holds.
    """
    if not metadata_files(folder):
        raise FileNotFoundError(f"{folder} has no metadata.jsonl: it is no dataset folder (make_dataset.py makes one)")
    # A record that lost a picture is made again and its line appended: the later one replaces the earlier.
    by_index = {record["index"]: record for record in each_record(folder, keys)}
    return [by_index[index] for index in sorted(by_index)]


def metadata_files(folder: str | Path, name: str = "metadata.jsonl") -> list[Path]:
    """The file of that name in a folder, then those of ranks (part_of) that were not merged yet."""
    path = Path(folder) / name
    return sorted(path.parent.glob(f"{path.stem}*.jsonl"), key=lambda found: (found != path, found))


def part_of(path: Path, rank: int, world_size: int) -> Path:
    """Where one of several processes writes its lines of a file."""
    return path if world_size == 1 else path.with_stem(f"{path.stem}-{rank:05d}")


def merge_lines(folder: str | Path) -> set[int]:
    """Put the lines of all metadata files into metadata.jsonl in order of index, of each index the last; returns these.

    Of a record where its line begins is kept, not the line: a million take four gigabytes.
    """
    paths, numbers, starts = metadata_files(folder), array("q"), array("q")
    for k, path in enumerate(paths):
        start = 0
        with open(path, "rb") as stream:
            for line, record in zip(stream, _records_of(path, ("index",)), strict=False):
                numbers.append(record["index"])
                starts.append(start * len(paths) + k)
                start += len(line)
    indices, last = np.unique(numbers[::-1], return_index=True)
    places = np.divmod(np.asarray(starts)[::-1][last], len(paths))

    def write(merged: BinaryIO) -> None:
        with ExitStack() as stack:
            streams = [stack.enter_context(open(path, "rb")) for path in paths]
            for start, k in zip(*places, strict=True):
                streams[k].seek(start)
                merged.write(streams[k].readline())

    write_whole(Path(folder) / "metadata.jsonl", write)
    for path in paths:  # only now: killed before, the next run finds lines twice, which readers take once
        if path.name != "metadata.jsonl":
            path.unlink()
    return set(indices.tolist())


def read_folders(folders: Sequence[str | Path]) -> tuple[Path, list[dict[str, Any]]]:
    """Records of several folders as if of one: the folder that holds it all, and its records.

    One folder comes back as it is.  Of several, records are numbered on in order, paths lead down from the folder above
    all, and meshes of one name and content are one.
    Raises as read_records and, of several, as path_of.
    """
    folders = [Path(folder) for folder in folders]
    if len(folders) == 1:
        return folders[0], read_records(folders[0])
    home = Path(os.path.commonpath([folder.resolve() for folder in folders]))
    joined, mesh_of, first = [], {}, {}
    for folder in folders:
        for record in read_records(folder):
            for key in FILE_KEYS:
                if record.get(key) is not None:
                    record[key] = path_of(folder, record, key).resolve().relative_to(home).as_posix()
            if (path := record.get("object_path")) and path not in mesh_of:
                content = file_of(home, record, "object_path").read_bytes()
                mesh_of[path] = first.setdefault((Path(path).name, hashlib.sha256(content).digest()), path)
            joined.append(record | {"index": len(joined), "object_path": mesh_of.get(path)})
    return home, joined


def each_record(folder: str | Path, keys: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """Records in the order of their lines, none held; of one index the last holds.  Keys and errors: read_records."""
    return (record for path in metadata_files(folder) for record in _records_of(path, keys))


def _records_of(path: Path, keys: Sequence[str] | None) -> Iterator[dict[str, Any]]:
    """Records of one metadata file."""
    shorten = bytes
    if keys is not None and NUMBER_SHAPES.keys().isdisjoint(keys):
        # Lists of numbers take most of the time.
        shorten = _beginning if set(keys) <= set(FIRST_KEYS) else partial(NUMBERS.sub, b'"": 0')
    for number, record in read_json_lines(path, shorten=shorten):
        if not isinstance(record, dict) or record.get("index") is None or "file_name" not in record:
            raise ValueError(f"{path} line {number}: expected an object with file_name and an integer index")
        record = record if keys is None else {key: record.get(key) for key in keys}
        for key, value in record.items():
            if value is not None and (fault := _fault(key, value)):
                raise ValueError(f"{path} line {number}: {key} {fault}")
        yield record


def _beginning(line: bytes) -> bytes:
    """FIRST_KEYS of a line as it is written here, a tenth of it; the whole of another."""
    beginning, cut, _ = line.partition(b', "intrinsics": ')
    ours = cut and beginning.startswith(b'{"file_name": ') and b', "object_path": ' in beginning
    return beginning + b"}" if ours else line


def _fault(key: str, value: Any) -> str:
    """What is wrong with a value of a record that is not null; empty when nothing is."""
    if key in FILE_KEYS and type(value) is str and USUAL_PATH.fullmatch(value):  # most of what is asked about
        return ""
    if key in NUMBER_SHAPES:
        count = math.prod(NUMBER_SHAPES[key])
        found = f"is {_shown(value)}"
        if isinstance(value, list) and {type(x) for x in value} <= {int, float}:  # Python counts with true, too
            with suppress(OverflowError):  # of a number with hundreds of digits
                if len(value) == count and all(map(math.isfinite, value)):
                    return ""
                found = f"has {len(value)} numbers"
        return f"{found}, expected {count}, all finite, in one list"
    kind, words = KINDS.get(key, (object, "finite numbers"))
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool) and key in KINDS):
        return f"is {_shown(value)}, expected {words}"
    if key in FILE_KEYS and not _stays_inside(value):
        return f"is {value!r}, expected a path inside the folder, such as images/000000.png"
    if isinstance(value, (float, dict, list)):  # what would be invalid JSON as soon as it is written again
        try:
            json.dumps(value, allow_nan=False)
        except ValueError:
            return f"is {_shown(value)}, expected finite numbers"
    return ""


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _stays_inside(path: str) -> bool:
    """Whether a record's path, as it is written, is a file's below the folder."""
    return path not in ("", ".") and not Path(path).is_absolute() and ".." not in Path(path).parts and "\0" not in path


def path_of(folder: str | Path, record: dict[str, Any], key: str) -> Path:
    """Where record[key] is: the only way from a record to a file that is read, for records may be of others' making.

    Raises ValueError when the record has none or it lies outside of the folder, also by a link.
    """
    if record.get(key) is None:
        raise ValueError(f"record {record.get('index')} of {folder} has no {key}")
    path, home = Path(folder) / record[key], Path(folder).resolve()
    if not _stays_inside(record[key]) or not path.resolve().is_relative_to(home):
        raise ValueError(
            f"record {record.get('index')} of {folder}: {key} {record[key]!r} leads out of the folder to "
            f"{path.resolve()}; only files of the folder are read: copy it there if it is yours"
        )
    return path


def file_of(folder: str | Path, record: dict[str, Any], key: str) -> Path:
    """The file at path_of, which is there.  Raises as that does, and FileNotFoundError."""
    path = path_of(folder, record, key)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing ({key} of record {record.get('index')})")
    return path


def read_description(folder: str | Path) -> dict[str, Any]:
    """dataset.json, {} where there is none.  Raises ValueError naming a damaged one."""
    path = Path(folder) / "dataset.json"
    advice = "; delete it: the command that made it writes it anew"
    return read_json(path, "description", advice) if path.is_file() else {}


# --- what a job needs ---


class FolderFiles:
    """The names of a folder's files, each sub-folder listed once.

    Asking the disk for every file of half a million records takes minutes; a listing takes seconds.  Of numbered
    pictures a byte each is kept: their names would take a hundred.
    """

    def __init__(self, folder: str | Path) -> None:
        """folder: a dataset folder, as it is when a sub-folder is first asked for."""
        self.folder = Path(folder)
        self._listed: dict[str, tuple[bytearray, set[str]]] = {}

    def missing(self, record: dict[str, Any], keys: Iterable[str] = FILE_KEYS) -> list[str]:
        """Relative paths that a record names under these keys and the folder does not have."""
        return [record[key] for key in keys if record.get(key) is not None and not self._has(record[key])]

    def _has(self, path: str) -> bool:
        parent, _, name = path.rpartition("/")
        numbers, others = self._listed.get(parent) or self._list(parent)
        number = _number(name)
        return name in others if number < 0 else number < len(numbers) and numbers[number] == 1

    def _list(self, parent: str) -> tuple[bytearray, set[str]]:
        numbers, others = self._listed[parent] = bytearray(), set()
        place = self.folder / parent
        for name in os.listdir(place) if place.is_dir() else ():
            if (number := _number(name)) < 0:
                others.add(name)
            else:
                numbers.extend(bytes(max(0, number + 1 - len(numbers))))
                numbers[number] = 1
        return numbers, others


def _number(name: str) -> int:
    """Of a picture that is named for it, as writer.write_pictures does, up to ten millions; -1 for other names."""
    found = NUMBERED.fullmatch(name)
    return int(found[1]) if found else -1


def require(
    folder: str | Path, records: Sequence[dict[str, Any]], files: Sequence[str] = (),
    size: tuple[int, int] | None = None, pictures: bool = False,
) -> None:  # fmt: skip
    """Refuse a folder whose records lack what a job needs: before anything is made, not in the middle of the night.

    records   of the folder, with the keys that are asked about; there must be one at least
    files     keys of files that must be there where a record names them.  The condition images come all three or, as
              for scenery, not at all
    size      height and width in pixels that every record must have; None: any
    pictures  whether every record must have a picture
    Raises ValueError or FileNotFoundError naming the first record that does not fit and what to do.
    """
    if not records:
        raise ValueError(f"{folder} holds no records; make them with make_dataset.py or sample.py")
    on_disk = FolderFiles(folder)
    for record in records:
        where = f"{folder} record {record['index']}"
        if pictures and record["file_name"] is None:
            raise ValueError(f"{where} has no picture: make the folder with make_dataset.py --shade, from real "
                             "pictures, or with sample.py")  # fmt: skip
        height, width = record.get("height"), record.get("width")
        if size is not None and (height, width) != size:
            raise ValueError(f"{where} is {width} x {height} px, the model takes {size[1]} x {size[0]}; make the "
                             f"folder with --size {size[0]}")  # fmt: skip
        absent = [key for key in CONDITION_KEYS if key in files and record.get(key) is None]
        if 0 < len(absent) < len(CONDITION_KEYS):
            raise ValueError(f"{where} has no {', '.join(absent)}; the condition encoders need all three images")
        if missing := on_disk.missing(record, files):
            raise FileNotFoundError(f"{Path(folder) / missing[0]} is missing (record {record['index']}); run the "
                                    f"command that made {folder} again")  # fmt: skip


def pictured(folder: str | Path, records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records that have a picture.  Raises ValueError when none has."""
    require(folder, records)
    found = [record for record in records if record["file_name"] is not None]
    if not found:
        raise ValueError(f"{folder} has no pictures: its records are conditions only; sample.py --data makes pictures")
    return found


# --- pictures ---


def load_picture(folder: str | Path, record: dict[str, Any], key: str) -> np.ndarray:
    """The picture that record[key] names: uint8 (H, W, 3), of object masks uint8 (H, W), of depth uint16 (H, W).

    Raises as file_of, and ValueError naming a file that is damaged, of another kind or not of the record's size.
    """
    path = file_of(folder, record, key)
    try:
        pixels = read_picture(path)
    except ValueError as error:
        raise ValueError(f"{error}; delete it and run the command that made it again") from error
    kind = np.dtype(np.uint16 if key == "depth_file_name" else np.uint8)
    size = record.get("height") or pixels.shape[0], record.get("width") or pixels.shape[1]
    expected = size if key in FLAT_KEYS else (*size, 3)
    if pixels.shape != expected or pixels.dtype != kind:
        raise ValueError(f"{path} is {pixels.shape} {pixels.dtype}, expected {expected} {kind}, as its record says")
    return pixels


def load_conditions(folder: str | Path, record: dict[str, Any]) -> Conditions | None:
    """Condition images of a record; None where it has none (scenery).  Raises as load_picture."""
    if all(record.get(key) is None for key in CONDITION_KEYS):
        return None
    skeleton, segmentation, normal = (load_picture(folder, record, key) for key in CONDITION_KEYS)
    return Conditions(skeleton=skeleton, normal=normal, segmentation=segmentation)


def load_image(folder: str | Path, record: dict[str, Any]) -> np.ndarray:
    """(H, W, 3) uint8.  Raises as load_picture."""
    return load_picture(folder, record, "file_name")


def load_depth(folder: str | Path, record: dict[str, Any]) -> np.ndarray:
    """(H, W) float32 metres, 0 = nothing.  Raises as load_picture."""
    return load_picture(folder, record, "depth_file_name").astype(np.float32) / 1000


def load_label_map(folder: str | Path, record: dict[str, Any]) -> np.ndarray:
    """(H, W) uint8: 0 background, 1 hand, 2 object, from the segmentation picture.  Raises as load_picture."""
    return read_segmentation(load_picture(folder, record, "segmentation_file_name"))


def load_object_mask(folder: str | Path, record: dict[str, Any]) -> np.ndarray:
    """(H, W) bool, the whole object with the hand ignored.  Raises as load_picture."""
    return load_picture(folder, record, "object_mask_file_name") > 0


def load_mesh(folder: str | Path, record: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Vertices (V, 3) float64 metres and faces (F, 3) of a record's object, in its canonical frame, exactly as stored.

    Raises as file_of, and ValueError naming a damaged file.
    """
    path = file_of(folder, record, "object_path")
    if path.suffix.lower() != ".ply":  # nothing else is written here, and other formats are whole programs to read
        raise ValueError(f"{path} (object_path of record {record.get('index')}) is no .ply, as which a dataset folder "
                         "holds its meshes")  # fmt: skip
    try:
        file = read_mesh(path)  # merges no vertices: a re-render is the same pixels
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}; delete it and run the command that made it again") from error
    return file.vertices, file.faces


def mesh_file_name(object_path: str) -> str:
    """Where the mesh that a record names is copied to in another folder: objects/NAME.

    Meshes of one name in several sub-folders get names of their own, and none that looks like a split.
    """
    name = Path(object_path).name
    if object_path == f"objects/{name}" == unlike_a_split(object_path):
        return object_path
    return f"objects/{unlike_a_split(Path(name).stem)}_{short_hash(object_path)[:8]}{Path(name).suffix}"


# --- numbers ---


def array_of(record: dict[str, Any], key: str) -> np.ndarray:
    """Numbers of a record, which must have them, in the shape that NUMBER_SHAPES says: float64."""
    return np.array(record[key], dtype=np.float64).reshape(NUMBER_SHAPES[key])


def hand_of(record: dict[str, Any]) -> HandParams:
    """Parameters of a record's hand, in the camera frame; the record must have them (its `transl` is not null)."""
    return HandParams(*(record[field.name] for field in fields(HandParams)))  # of the same names


def camera_of(record: dict[str, Any]) -> Camera:
    """The camera of a record with intrinsics.  Its world is the object's frame, or its own where there is no object."""
    object_to_camera = np.eye(4) if record["object_to_camera"] is None else array_of(record, "object_to_camera")
    return Camera(array_of(record, "intrinsics"), object_to_camera, record["height"], record["width"])
