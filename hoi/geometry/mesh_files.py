"""Mesh files of other programs.  File -> triangles in the file's own units.

trimesh reads STL and glTF.  It fills faces with notches by a fan, and its binary PLY knows neither faces of different
lengths nor strips: so OBJ, OFF and PLY are read here.  Its glTF is silent about required extensions, fans, and
accessors that are normalized or sparse: files with these are refused before.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import trimesh
from trimesh.util import append_faces, decode_text, triangle_strips_to_faces

from hoi.common.command import first_few
from hoi.common.files import files_under, parse_json

GLTF_SUFFIXES = (".glb", ".gltf")
MESH_SUFFIXES = (".obj", ".ply", ".stl", *GLTF_SUFFIXES, ".off")
OTHER_SUFFIXES = (
    ".dae", ".3mf", ".step", ".stp", ".fbx", ".blend", ".usd", ".usda", ".usdc", ".usdz", ".3ds", ".wrl", ".x3d",
    ".vtk", ".igs", ".iges", ".drc", ".max", ".skp",
)  # fmt: skip
ARCHIVES = (".zip", ".gz", ".bz2", ".tar", ".tgz")
CONVERT = f"convert it to one of {', '.join(MESH_SUFFIXES)}"
PLY_TYPES = {"char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2", "int": "i4", "uint": "u4", "float": "f4",
             "double": "f8"}  # fmt: skip
PLY_TYPES |= {np.dtype(of).name: of for of in PLY_TYPES.values()}  # int8 and the like, as numpy calls them
PLY_ROWS = 4096  # looked at together: where lists of two lengths take turns, all that follows would be looked at often
PLY_ORDERS = {"ascii": "<", "binary_little_endian": "<", "binary_big_endian": ">"}
# Parts of the names of extensions that leave shapes alone; any other required one is refused.
GLTF_READ = ("material", "texture", "light", "KHR_xmp", "animation", "variants", "EXT_image")
TRIANGLES, FLOAT32 = 4, 5126  # how glTF calls them
GLTF_MODES = (0, 1, TRIANGLES, 5)  # points, lines, triangles, strips; trimesh passes over fans, loops, joined lines
MOST_CORNERS = 3000  # of a face with notches: cutting ears takes the square of it
MOST_UNPACKED = 3_000_000  # corners or bytes of a glTF that has fewer bytes: a small one can place its mesh often
FLAT = 1e-6  # thickness over length below which a mesh is a sheet
FLAT_TURN = 1e-5  # sine of the angle below which a corner that turns back counts as straight: coordinates are rounded
COARSEST = 1e-3  # of the longest side; float32 steps above it show as stairs
Parts = list[tuple[np.ndarray, np.ndarray]]  # vertices (V, 3) and faces (F, 3) of each part, which may have none


def left_out_of(folder: Path) -> str:
    """A sentence about files under a folder that are meshes of kinds not looked for; empty when there are none."""
    names = [str(file.relative_to(folder)) for file in files_under(folder) if file.suffix.lower() in OTHER_SUFFIXES]
    return f"Left out of {folder}, for such kinds are not read: {first_few(names)}." if names else ""


@dataclass(frozen=True)
class MeshFile:
    """What a mesh file holds.

    vertices  (V, 3) float64 in the file's units          faces  (F, 3) int64
    notes     sentences: what was joined or left out
    """

    vertices: np.ndarray
    faces: np.ndarray
    notes: list[str] = field(default_factory=list)


def read_mesh(path: Path) -> MeshFile:
    """All triangles of a file, parts of a scene in their places, vertices that no face names left out.

    Raises ValueError for a file that is damaged, of an unknown kind or without triangles, that needs a glTF extension,
    or whose numbers cannot be a shape: NaN, flat, too coarse for their size.
    """
    suffix = path.suffix.lower()
    if suffix not in MESH_SUFFIXES:  # trimesh knows more: archives, drawings, JSON with code-like trees
        kind = "an archive; unpack it and name the mesh in it" if suffix in ARCHIVES else f"not read here; {CONVERT}"
        raise ValueError(f"{path} cannot be read as a {suffix or 'mesh'} file: it is {kind}")
    readers = {".obj": _read_obj, ".ply": _read_ply, ".off": _read_off}
    try:
        found = readers.get(suffix, _read_by_trimesh)(path)
    except Exception as error:  # trimesh raises whatever it meets
        raise ValueError(f"{path} cannot be read as a {suffix} file: {str(error)[:500]}") from error
    parts = [part for part in found if len(part[1])]
    skipped = len(found) - len(parts)
    if not parts:
        raise ValueError(f"{path} has no triangles ({skipped} parts of other kinds); expected a surface mesh")
    notes = [f"Joined {len(parts)} parts of the scene."] if len(parts) > 1 else []
    if skipped:
        notes.append(f"Left out {skipped} parts without triangles (points, lines or empty).")
    vertices, faces = append_faces(*zip(*parts, strict=True))
    if faces.min() < 0 or faces.max() >= len(vertices):
        raise ValueError(f"{path}: a face names vertex {faces.max()}, but there are {len(vertices)} vertices")
    vertices, faces = drop_unused(vertices.astype(np.float64), faces.astype(np.int64))
    _check_numbers(vertices, path)
    return MeshFile(vertices, faces, notes)


def drop_unused(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Vertices that no face names would only disturb boxes and nearest-point searches."""
    used = np.zeros(len(vertices), dtype=bool)
    used[faces] = True
    return vertices[used], (np.cumsum(used) - 1)[faces]


def _check_numbers(vertices: np.ndarray, path: Path) -> None:
    bad = ~np.isfinite(vertices).all(axis=1)
    if bad.any():
        raise ValueError(f"{path}: {bad.sum()} of {len(vertices)} vertices have NaN or infinite coordinates "
                         f"(first: vertex {bad.argmax()}); expected finite numbers. Export the mesh again")
    extent, far = np.ptp(vertices, axis=0), np.abs(vertices).max()
    with np.errstate(over="ignore"):
        rounded = vertices.astype(np.float32)
    step = float(np.spacing(np.abs(rounded).max()))
    # A file with more digits than float32 has (an OBJ, double PLY) shows it: its numbers are no float32 numbers.
    if step > COARSEST * extent.max() > 0.0 and (vertices == rounded).all():
        raise ValueError(f"{path}: the object lies {far:.4g} units from the origin, where float32 numbers are {step:g} "
                         f"apart, and is {extent.max():.4g} units long: its shape is lost. Move it to the origin in "
                         "the program that made it, and export it again")
    if extent.min() <= FLAT * extent.max() or extent.max() == 0.0:
        raise ValueError(f"{path} is flat: its box is {' x '.join(f'{e:g}' for e in extent)} units; "
                         "a grasp needs an object with a volume")


# --- by trimesh ---


def _read_by_trimesh(path: Path) -> Parts:
    """Parts of an STL or glTF in their scene; a mirrored one keeps its outside outside."""
    suffix, content, parts = path.suffix.lower(), path.read_bytes(), []
    beside = _check_gltf(content, path.parent) if suffix in GLTF_SUFFIXES else None
    scene = trimesh.load(io.BytesIO(content), suffix[1:], beside, force="scene", process=False, skip_materials=True)
    for node in scene.graph.nodes_geometry:
        transform, name = scene.graph[node]
        part = scene.geometry[name]
        faces = getattr(part, "faces", np.zeros((0, 3), dtype=np.int64))  # points and lines have none
        mirrored = np.linalg.det(transform[:3, :3]) < 0
        parts.append((trimesh.transform_points(part.vertices, transform), faces[:, ::-1] if mirrored else faces))
    return parts


def _check_gltf(content: bytes, folder: Path) -> dict[str, bytes]:
    """The buffers that stand in files beside a glTF, by their addresses.

    Raises ValueError for one of which trimesh would read another shape than it has, or that unfolds to a giant.
    Source: glTF 2.0, Khronos 2021.
    """
    head = content[20 : 20 + int.from_bytes(content[12:16], "little")] if content[:4] == b"glTF" else content
    tree = parse_json(head.decode())
    if not str(tree.get("asset", {}).get("version", "")).startswith("2"):
        raise ValueError("it is not glTF 2; export it again as glTF 2.0")
    required = [str(name) for name in tree.get("extensionsRequired", [])]
    if unknown := [name for name in required if not any(word in name for word in GLTF_READ)]:
        raise ValueError(f"it needs the glTF extension {', '.join(unknown)}, which is not read here: export it without "
                         "(in Blender, untick Compression)")  # fmt: skip
    beside = {}
    for address in {buffer.get("uri", "data:") for buffer in tree.get("buffers", [])}:
        if not address.startswith("data:"):
            path = folder / unquote(address)
            if not path.resolve().is_relative_to(folder.resolve()) or not path.is_file():
                raise ValueError(f"its buffer {address!r:.80} is no file beside it")
            beside[address] = path.read_bytes()
    size = len(content) + sum(map(len, beside.values()))
    nodes, accessors = tree.get("nodes", []), tree.get("accessors", [])
    corners = [sum(_gltf_corners(part, accessors) for part in mesh["primitives"]) for mesh in tree.get("meshes", [])]
    roots = tree["scenes"][tree.get("scene", 0)].get("nodes", []) if tree.get("scenes") else []
    placed = [*roots, *chain.from_iterable(node.get("children", []) for node in nodes)]
    if len(set(placed)) < len(placed) or any("camera" in node and "mesh" in node for node in nodes):
        raise ValueError("a node of it stands in its tree twice, or is a camera with a mesh")
    unpacked = (sum(corners[node["mesh"]] for node in nodes if "mesh" in node),
                sum(accessor["count"] for accessor in accessors),
                sum(view["byteLength"] for view in tree.get("bufferViews", [])))  # fmt: skip
    if max(unpacked) > max(MOST_UNPACKED, size):
        raise ValueError(f"it has {size} bytes and unfolds to {max(unpacked)} corners or bytes: simplify it")
    return beside


def _gltf_corners(primitive: dict[str, Any], accessors: Sequence[dict[str, Any]]) -> int:
    """How many corners or vertices a primitive has, the larger number.  Raises ValueError as _check_gltf."""
    points = accessors[primitive["attributes"]["POSITION"]]
    corners = accessors[primitive["indices"]] if "indices" in primitive else points
    if primitive.get("mode", TRIANGLES) not in GLTF_MODES:
        raise ValueError("it has triangle fans or joined lines, which are not read here: export triangles")
    if points["componentType"] != FLOAT32 or points.get("normalized"):
        raise ValueError("its positions are quantized, which is not read here: export it without compression")
    if any("sparse" in each or "bufferView" not in each for each in (points, corners)):
        raise ValueError("its positions are sparse or have no data: export it without compression and shape keys")
    return max(points["count"], corners["count"])


# --- faces with more than three corners ---


def _triangles(vertices: np.ndarray, polygons: Iterable[Sequence[int] | np.ndarray]) -> np.ndarray:
    """Polygons, each the numbers of its corners (n,) or some of one kind (M, n) -> triangles (F, 3), by n.

    Convex ones become a fan as trimesh makes it, those with notches are cut.  Raises IndexError for a missing vertex.
    """
    kinds: dict[int, list[np.ndarray]] = {}
    for polygon in polygons:
        corners = np.array(polygon, dtype=np.int64, ndmin=2)
        kinds.setdefault(corners.shape[1], []).append(corners)
    faces = [np.zeros((0, 3), dtype=np.int64)]
    for count in sorted(kinds.keys() - {0, 1, 2}):
        corners = np.concatenate(kinds[count])
        notched = _notched(vertices[corners]) if count > 3 else np.zeros(len(corners), dtype=bool)
        fan = [(0, 1, 2), *((k, k + 1, 0) for k in range(2, count - 1))]
        whole = corners[~notched]
        faces += [whole[:, triangle] for triangle in fan]
        faces += [polygon[_cut_ears(vertices[polygon])] for polygon in corners[notched]]
    return np.concatenate(faces)


def _notched(corners: np.ndarray) -> np.ndarray:
    """Whether each of M faces (M, n, 3) turns back somewhere, so that a fan would leave it (M,)."""
    before, after = corners - np.roll(corners, 1, axis=1), np.roll(corners, -1, axis=1) - corners
    normal = _area_vector(corners)[:, None]
    lengths = np.linalg.norm(before, axis=2) * np.linalg.norm(after, axis=2) * np.linalg.norm(normal, axis=2)
    return ((np.cross(before, after) * normal).sum(axis=2) < -FLAT_TURN * lengths).any(axis=1)


def _area_vector(corners: np.ndarray) -> np.ndarray:
    """Normals of faces (..., n, 3), twice their area long (Newell)."""
    arms = corners - corners[..., :1, :]
    return np.cross(arms, np.roll(arms, -1, axis=-2)).sum(axis=-2)


def _cut_ears(points: np.ndarray) -> np.ndarray:
    """One face (n, 3) with notches -> n - 2 triangles (n - 2, 3) of its corners' numbers (Meisters 1975).

    An ear is a corner that turns the face's way and whose triangle holds no other corner.  A face that crosses itself
    has none at last; the rest is a fan.  Raises ValueError for more than MOST_CORNERS corners.
    """
    if len(points) > MOST_CORNERS:
        raise ValueError(f"a face with notches has {len(points)} corners, more than {MOST_CORNERS}: export triangles")
    normal = _area_vector(points)
    axis = np.abs(normal).argmax()
    flat = np.roll(points - points[0], -axis - 1, axis=1)[:, :2] * [np.sign(normal[axis]) or 1.0, 1.0]
    left, ears, ear = list(range(len(points))), [], 0
    while len(left) > 3:
        # From the last ear on: one is mostly near, where the first corners of a spiral are none for long.
        around = (k % len(left) for k in range(ear, ear + len(left)))
        ear = next((k for k in around if _is_ear(flat, left, k)), None)
        if ear is None:
            break
        ears.append((left[ear - 1], left[ear], left[(ear + 1) % len(left)]))
        del left[ear]
    return np.array([*ears, *((left[0], b, c) for b, c in zip(left[1:-1], left[2:], strict=True))])


def _is_ear(flat: np.ndarray, left: list[int], k: int) -> bool:
    """Whether corner k of those that are left, counter-clockwise in the plane (n, 2), can be cut off."""
    a, b, c = triangle = flat[[left[k - 1], left[k], left[(k + 1) % len(left)]]]
    if _turn(a, b, c) <= 0.0:
        return False
    others = flat[left]
    # A bridge to a hole passes its two ends twice: the same place is not inside.
    others = others[(others[:, None] != triangle).any(axis=2).all(axis=1)]
    return not ((_turn(a, b, others) >= 0) & (_turn(b, c, others) >= 0) & (_turn(c, a, others) >= 0)).any()


def _turn(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Positive where c lies to the left of the way from a to b."""
    return (b[0] - a[0]) * (c[..., 1] - a[1]) - (b[1] - a[1]) * (c[..., 0] - a[0])


# --- OBJ, OFF and PLY ---


def _read_obj(path: Path) -> Parts:
    """Vertices and faces, whatever their materials and groups.

    Corners counted back (f -3 -2 -1) are named from the last vertex so far: trimesh counts from the file's end.
    """
    vertices: list[list[str]] = []
    polygons: list[list[int]] = []
    for line in decode_text(path.read_bytes()).replace("\r\n", "\n").replace("\\\n", " ").split("\n"):
        kind, *words = line.split("#")[0].split() or [""]
        if kind == "v":
            vertices.append(words[:3])
        elif kind == "f":
            corners = [int(word.split("/")[0]) for word in words]
            polygons.append([corner - 1 if corner >= 0 else len(vertices) + corner for corner in corners])
    points = np.array(vertices, dtype=np.float64)
    return [(points, _triangles(points, polygons))]


def _read_off(path: Path) -> Parts:
    """Vertices, a line each, then faces: how many corners, which, perhaps a colour.  The counts may touch the head."""
    lines = [cut for line in decode_text(path.read_bytes()).splitlines() if (cut := line.split("#")[0].strip())]
    head = re.match(r"(ST)?C?N?OFF", lines[0] if lines else "")
    if head is None:
        raise ValueError("it does not begin with OFF")
    lines = list(filter(None, (lines[0][head.end() :], *lines[1:])))
    count, face_count = (int(word) for word in lines[0].split()[:2])
    if not 0 <= count + face_count < len(lines):
        raise ValueError(f"it promises {count} vertices and {face_count} faces and has {len(lines) - 1} lines")
    vertices = np.array([line.split()[:3] for line in lines[1 : count + 1]], dtype=np.float64).reshape(-1, 3)
    rows = [[int(word) for word in line.split()] for line in lines[count + 1 : count + face_count + 1]]
    return [(vertices, _triangles(vertices, [row[1 : row[0] + 1] for row in rows]))]


def _read_ply(path: Path) -> Parts:
    """Vertices, and faces of any numbers of corners, or triangle strips cut by -1 (as VRIP and zipper write them)."""
    head, _, body = path.read_bytes().partition(b"end_header")
    body = body[2 if b"\r\n" in head else 1 :]
    lines = [line.split() for line in decode_text(head).splitlines()]
    layout = next((line[1] for line in lines if line[:1] == ["format"]), None)
    if lines[:1] != [["ply"]] or layout not in PLY_ORDERS:
        raise ValueError("its header is not PLY's")
    if layout == "ascii":  # tokens become doubles, and every type a double
        body = np.array(body.split(), dtype="<f8").tobytes()
    elements: dict[str, tuple[int, dict[str, list[np.dtype]]]] = {}  # count; of a property its types, of a list two
    for line in lines:
        if line[:1] == ["element"]:
            elements[line[1]] = int(line[2]), (properties := {})
        elif line[:1] == ["property"]:
            types = [np.dtype("f8" if layout == "ascii" else PLY_TYPES[word]) for word in line[1:-1] if word != "list"]
            properties[line[-1]] = [of.newbyteorder(PLY_ORDERS[layout]) for of in types]
    at, columns = 0, {}
    for name, (count, properties) in elements.items():
        if not 0 <= count <= len(body):
            raise ValueError(f"it promises {count} of {name!r} and has {len(body)} bytes")
        columns[name], at = _ply_rows(body, at, count, properties)
    vertices = np.stack([np.concatenate(columns["vertex"][axis]) for axis in "xyz"], axis=1).astype(np.float64)
    of_faces = columns.get("face", {})
    faces = [_triangles(vertices, of_faces.get("vertex_indices", of_faces.get("vertex_index", ())))]
    for strip in chain.from_iterable(columns.get("tristrips", {}).get("vertex_indices", ())):
        strips = (part[part != -1].astype(np.int64) for part in np.split(strip, np.flatnonzero(strip == -1)))
        faces += [triangle_strips_to_faces([part]) for part in strips if len(part) > 2]
    return [(vertices, np.concatenate(faces))]


def _ply_rows(
    body: bytes, at: int, count: int, properties: dict[str, list[np.dtype]]
) -> tuple[dict[str, list[np.ndarray]], int]:
    """The columns of one element from byte `at` on, each in pieces whose lists have one length, and where the next
    element begins.  Raises ValueError when the file ends before this one does.
    """
    columns: dict[str, list[np.ndarray]] = {name: [] for name in properties}
    while count > 0:
        lengths, fields = {}, []  # of the first row's lists: mostly those of many more
        for name, types in properties.items():
            if len(types) == 2:
                place = at + np.dtype(fields).itemsize
                lengths[name] = int(np.frombuffer(body, types[0], 1, place)[0])
                fields.append((f"{name} count", types[0]))
            fields.append((name, types[-1], (lengths[name],) if len(types) == 2 else ()))
        row = np.dtype(fields)
        some = min(count, PLY_ROWS, (len(body) - at) // row.itemsize)
        if some < 1:
            raise ValueError(f"it ends {count} rows too early")
        table = np.frombuffer(body, row, some, at)
        other = np.any([table[f"{name} count"] != length for name, length in lengths.items()], axis=0)
        table = table[: other.argmax()] if other.any() else table
        if not len(table):  # text and floats can promise 2.5
            raise ValueError(f"a list in it has no whole number of entries: {lengths} and a part of one")
        for name in properties:
            columns[name].append(table[name])
        at, count = at + table.nbytes, count - len(table)
    return columns, at
