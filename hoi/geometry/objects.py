"""Objects to grasp.  Mesh file, or family name and seed -> ObjectMesh in the canonical frame.  Paper: Sec. 4, data.

Canonical frame: metres, z up, origin at the centre of the bounding box; mugs of the built-in family have their handle
towards +x.  A file is read, its units and its vertical axis are settled, its surface is mended as far as numpy can
(merged, without double or empty faces, facing outwards); whatever is found or changed is said in `notes`, and
`file_to_canonical` undoes it.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from trimesh.graph import connected_component_labels
from trimesh.grouping import unique_ordered
from trimesh.triangles import nondegenerate

from hoi.common.arrays import box_centre
from hoi.common.choices import CATEGORIES
from hoi.common.files import ASSETS, files_under, unlike_a_split, write_whole
from hoi.geometry.mesh_files import CONVERT, GLTF_SUFFIXES, MESH_SUFFIXES, MeshFile, drop_unused, left_out_of, read_mesh
from hoi.geometry.shapes import FAMILIES

METRES_PER_UNIT = {"m": 1.0, "dm": 0.1, "cm": 0.01, "mm": 0.001, "in": 0.0254}
UNIT_WORDS = {"m": "metres", "dm": "decimetres", "cm": "centimetres", "mm": "millimetres", "in": "inches"}
SMALLEST, LARGEST = 0.01, 0.60  # metres: what one hand can be asked to grasp
# Lengths in a file's units that are taken as metres (up to LARGEST, or refused as too large with advice) and as
# centimetres; what is longer is in millimetres, as scanners and CAD have it.  Between the two limits an object would be
# shorter than 2 cm in millimetres, beyond the second longer than 20 in centimetres: neither is as likely.
LONGEST_IN_METRES, LONGEST_IN_CM = 3.0, 20.0
ALREADY_CENTRED = 1e-6  # metres; keeps a saved mesh bit-identical when it is read again
GRID_BITS = 21  # positions are compared on a grid of 2**21 cells a side: three of them fit one 64-bit key
SLIVER = 1e-9  # metres: a face that is less high is rounding
STRAY_SHARE = 0.01  # of the faces lie back to back on a scan with a few fins; on a two-sided sheet all do
CATALOGUE_NUMBER = 8  # characters: so long a token of letters and digits is a catalogue number, not a word
Y_UP_TO_Z_UP = np.array([[1.0, 0, 0, 0], [0, 0, -1.0, 0], [0, 1.0, 0, 0], [0, 0, 0, 1.0]])
HOMES = ("home", "homes", "users", "media")  # the folders in these are called after people
# Parts of file names that say how a mesh was made, measured or kept, not what it shows.
EMPTY_WORDS = frozenset((ASSETS / "empty_words.txt").read_text(encoding="utf-8").split())
CJK = 0x2E80  # from here on a single character is a word


@dataclass(frozen=True)
class ObjectMesh:
    """One object in its canonical frame.

    vertices           (V, 3) float64, metres, representable in float32 so that a saved file is exact
    faces              (F, 3) int64, counter-clockwise seen from outside
    object_id          name usable as a file name
    category           noun for captions
    source             "built-in family" or the file that it came from
    file_to_canonical  (4, 4) takes the file's coordinates (the family's own for built-in ones) to `vertices`
    watertight         every edge belongs to exactly two faces
    notes              sentences: what was found, guessed or changed
    """

    vertices: np.ndarray
    faces: np.ndarray
    object_id: str
    category: str
    source: str
    file_to_canonical: np.ndarray
    watertight: bool
    notes: tuple[str, ...] = field(default=())


def _unit_of(file: MeshFile, units: str | float | None, path: Path) -> tuple[float, list[str], str]:
    """Metres per unit of the file, a sentence about it unless its format defines it, and in a few words how we know."""
    extent = np.ptp(file.vertices, axis=0).max()
    if units is not None:
        try:
            metres = METRES_PER_UNIT.get(units) or float(units)
        except ValueError:
            metres = -1.0
        if not 0.0 < metres < np.inf:
            raise ValueError(f"{path}: units is {units!r}, expected one of {', '.join(METRES_PER_UNIT)} "
                             "or metres per unit as a number")
        name = UNIT_WORDS.get(units, f"{metres:g} m each")
        return metres, [f"Units as given: {name} ({extent:.4g} units long)."], f"--units {units}"
    if path.suffix.lower() in GLTF_SUFFIXES:
        return 1.0, [], "the file's unit is 1 m"
    guessed = "units were guessed from the size"
    if extent <= LONGEST_IN_METRES:
        return 1.0, [f"Taken as metres: {extent:.4g} units long."], guessed
    name = "cm" if extent < LONGEST_IN_CM else "mm"
    metres = METRES_PER_UNIT[name]
    return metres, [f"The file does not state its units: {extent:.4g} units long cannot be metres, so it was taken as "
                    f"{UNIT_WORDS[name]} ({1e3 * extent * metres:.0f} mm); pass --units if that is wrong."], guessed


def _size_message(path: Path, size: float, metres: float, how: str) -> str:
    extent = size / metres
    fits = [name for name, factor in METRES_PER_UNIT.items() if SMALLEST <= extent * factor <= LARGEST]
    advice = f"Pass --units {' or '.join(fits)}, or" if fits else "Pass"
    return (f"{path} would be {size:.4g} m long ({extent:.4g} units, {how}); a hand grasps {SMALLEST} to {LARGEST} m. "
            f"{advice} the metres per unit as a number, such as --units {0.12 / extent:.3g} for a length of 0.12 m")


def _upright(up: str | None, path: Path) -> tuple[np.ndarray, list[str]]:
    """Rotation (4, 4) that turns the file's vertical axis to z, and a sentence where which one it is is not plain."""
    axis = up or ("y" if path.suffix.lower() in GLTF_SUFFIXES else "z")
    if axis not in ("y", "z"):
        raise ValueError(f"{path}: up is {axis!r}, expected 'z' or 'y'")
    if axis == "y":
        return Y_UP_TO_Z_UP, ["The file's y axis is up; turned to z up (pass --up z if it already was)."]
    unsaid = up is None and path.suffix.lower() == ".obj"
    return np.eye(4), ["The z axis is taken as up; an OBJ does not say, and Blender writes it with y up: pass --up y "
                       "if the object lies on its side."] * unsaid


def merge_vertices(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One vertex per position (STL repeats them for every face, textures along their seams).

    vertices (V, 3), faces (F, 3) -> the same, the order of first appearance kept
    """
    low, extent = vertices.min(axis=0), np.ptp(vertices, axis=0).max()
    # A cell is half a millionth of the size, a few times float32's rounding: one point written twice falls together.
    cell = np.round((vertices - low) / extent * (2**GRID_BITS - 1)).astype(np.int64)
    key = (cell[:, 0] << 2 * GRID_BITS) | (cell[:, 1] << GRID_BITS) | cell[:, 2]
    _, first, inverse = unique_ordered(key, return_index=True, return_inverse=True)
    return vertices[first], inverse[faces]


def _edge_keys(faces: np.ndarray) -> np.ndarray:
    """One integer per side of every face (3F,), equal for the two directions."""
    ends = faces.T, np.roll(faces.T, -1, axis=0)
    return (np.minimum(*ends) * (faces.max(initial=0) + 1) + np.maximum(*ends)).ravel()


def edge_faults(faces: np.ndarray) -> tuple[int, int]:
    """Numbers of edges with one face (open) and with more than two (non-manifold)."""
    counts = np.unique(_edge_keys(faces), return_counts=True)[1]
    return int((counts == 1).sum()), int((counts > 2).sum())


def _drop_duplicates(faces: np.ndarray) -> np.ndarray:
    """Keep one of several faces on the same vertices, and none of a few stray pairs back to back.

    A pair back to back is a fin without volume on an otherwise closed scan: with one side gone the scan would be open.
    Where more than STRAY_SHARE of the faces have such a twin, a two-sided sheet is meant, and one side of it stays.
    """
    ordered = np.sort(faces, axis=1)
    count = faces.max(initial=0) + 1
    edge = np.unique(ordered[:, 0] * count + ordered[:, 1], return_inverse=True)[1].reshape(-1)
    _, first, inverse = np.unique(edge * count + ordered[:, 2], return_index=True, return_inverse=True)
    if len(first) == len(faces):
        return faces
    # An even permutation of the sorted vertices winds one way, an odd one the other.
    winding = np.sign(np.prod(np.roll(faces, -1, axis=1) - faces, axis=1))
    balance = np.bincount(inverse.reshape(-1), -winding)
    stray = balance[inverse.reshape(-1)] == 0.0
    keep = np.sort(first)
    return faces[keep[~stray[keep]]] if stray.mean() < STRAY_SHARE else faces[keep]


def _drop_slivers(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, int]:
    """Remove faces with three positions on one line, unless they keep the surface closed."""
    solid = nondegenerate(vertices[faces], height=SLIVER)
    if solid.all() or (sum(edge_faults(faces)) == 0 and sum(edge_faults(faces[solid])) > 0):
        return faces, 0
    return faces[solid], int((~solid).sum())


def _disagreeing(faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which faces to turn so that neighbours agree (F,), and the connected piece of every face (F,).

    Each face is two nodes, as it is and turned.  Neighbours that traverse their common edge in opposite directions
    agree: as-is joins as-is.  Otherwise as-is joins turned.  The two halves of every piece are its two windings.
    """
    count = len(faces)
    keys, face = _edge_keys(faces), np.tile(np.arange(count), 3)
    forward = (faces.T < np.roll(faces.T, -1, axis=0)).ravel()
    order = np.argsort(keys, kind="stable")
    same = keys[order][1:] == keys[order][:-1]
    pair = np.flatnonzero(same & ~np.append(False, same[:-1]) & ~np.append(same[1:], False))  # exactly two faces
    first, second = order[pair], order[pair + 1]
    agree = forward[first] != forward[second]
    partner = face[second] + np.where(agree, 0, count)
    links = np.concatenate([[face[first], partner], [face[first] + count, (partner + count) % (2 * count)]], axis=1).T
    label = connected_component_labels(links, node_count=2 * count)
    # A piece is a label and its counterpart; the smaller stands for both.
    as_is, turned = label[:count], label[count:]
    piece = np.minimum(as_is, turned)
    turn = as_is > turned
    # Turn the smaller part of each piece; a one-sided surface (as_is == turned) cannot agree and is left alone.
    size, wrong = np.bincount(piece, minlength=label.max() + 1), np.bincount(piece, turn, minlength=label.max() + 1)
    return np.where(wrong[piece] * 2 > size[piece], ~turn, turn) & (as_is != turned), piece


def signed_volume(vertices: np.ndarray, faces: np.ndarray) -> float:
    """Volume inside a mesh (V, 3), (F, 3) in cubic units, positive when faces are counter-clockwise from outside.

    Of tetrahedra from the vertices' mean, so that the gap of an open mesh matters as little as it can.
    """
    a, b, c = np.moveaxis((vertices - vertices.mean(axis=0))[faces], 1, 0)
    return float(np.einsum("ij,ij->", a, np.cross(b, c)) / 6.0)


def wind_outwards(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, int]:
    """Make neighbours agree where some do not, then turn an inside-out surface.

    vertices (V, 3), faces (F, 3) -> faces, and how many of them were turned
    """
    turn, piece = _disagreeing(faces)
    if turn.any():
        faces = np.where(turn[:, None], faces[:, ::-1], faces)
        for label in np.unique(piece[turn]):  # untouched pieces stay: an inner wall is rightly wound inwards
            mine = piece == label
            if signed_volume(vertices, faces[mine]) < 0.0:
                faces[mine], turn[mine] = faces[mine][:, ::-1], ~turn[mine]
    if signed_volume(vertices, faces) < 0.0:
        faces, turn = faces[:, ::-1].copy(), ~turn
    return np.ascontiguousarray(faces), int(turn.sum())


def clean_mesh(vertices: np.ndarray, faces: np.ndarray, path: Path) -> tuple[np.ndarray, np.ndarray, list[str], bool]:
    """Merge vertices by position, drop faces that are none, turn the surface outwards.

    vertices (V, 3), faces (F, 3)
    returns  vertices, faces, notes, watertight
    Raises ValueError when no face is left; `path` is for its message.
    """
    notes, given = [], len(faces)
    vertices, faces = merge_vertices(vertices, faces)
    faces = faces[(faces != np.roll(faces, 1, axis=1)).all(axis=1)]  # three different corners
    empty, distinct = given - len(faces), len(faces)
    faces = _drop_duplicates(faces)
    duplicates = distinct - len(faces)
    faces, slivers = _drop_slivers(vertices, faces)  # after the merging, which makes some
    if len(faces) == 0:
        raise ValueError(f"{path}: none of its {given} faces has an area; expected a surface mesh")
    if empty + slivers:
        notes.append(f"Removed {empty + slivers} faces without area.")
    if duplicates:
        notes.append(f"Removed {duplicates} duplicate faces.")
    vertices, faces = drop_unused(vertices, faces)
    faces, flipped = wind_outwards(vertices, faces)
    if flipped == len(faces):
        notes.append("The surface was inside out; all faces were turned.")
    elif flipped:
        notes.append(f"Turned {flipped} faces that were wound against their neighbours.")
    open_edges, crowded_edges = edge_faults(faces)
    if open_edges:
        notes.append(f"Warning: the surface is open ({open_edges} boundary edges); its inside is a guess there.")
    if crowded_edges:
        notes.append(f"Warning: {crowded_edges} edges join more than two faces (non-manifold).")
    return vertices, faces, notes, not open_edges and not crowded_edges


def describe_size(vertices: np.ndarray) -> str:
    """vertices (V, 3) metres -> "83 x 117 x 91 mm"."""
    return " x ".join(f"{1e3 * extent:.0f}" for extent in np.ptp(vertices, axis=0)) + " mm"


def _meaningful_words(path: Path) -> tuple[list[str], str]:
    """Words of the first name, from the file upwards, that says something, and that name.

    A home folder ends the search: captions and file names of a dataset must not tell who made it.
    """
    names = [path.stem]
    for folder in path.absolute().parents:
        if folder == Path.home() or folder.parent.name.lower() in HOMES:
            break
        names.append(folder.name)
    for name in names[:3]:  # .../025_mug/google_16k/textured.obj
        tokens = _kept(re.sub(r"(?<=[^\W\d_A-Z])(?=[A-Z])", " ", name)).split()
        tokens = [token for token in tokens if len(token) < CATALOGUE_NUMBER or not re.search(r"\d", token)]
        words = [re.sub(r"\d+", "", token).lower() for token in tokens]
        words = [word for word in words if word and word not in EMPTY_WORDS and (len(word) > 1 or word >= chr(CJK))]
        if words:
            return words, name
    return [], path.stem


def _kept(name: str, others: str = "") -> str:
    """Letters of any script, digits and `others` of a name, composed (macOS splits accents off); the rest blank."""
    # Marks (vowels of Thai or Hindi) belong to their letters; no class of `re` says so.
    return "".join(sign if sign.isalnum() or unicodedata.category(sign)[0] == "M" or sign in others else " "
                   for sign in unicodedata.normalize("NFC", name))  # fmt: skip


def guess_category(path: str | Path) -> str:
    """A noun from the file's name, or from its folders' where the name says nothing: 025_mug.stl -> "mug"."""
    return " ".join(_meaningful_words(Path(path))[0]) or "object"


def load_object(
    path: str | Path, category: str | None = None, units: str | float | None = None, up: str | None = None
) -> ObjectMesh:
    """Read any mesh that trimesh reads and bring it into the canonical frame.

    path      obj, ply, stl, glb, gltf or off; all parts of a scene are taken, in their places
    category  noun for captions; None: from the file's or its folder's name
    units     "m", "dm", "cm", "mm", "in", or metres per unit as a number; None: metres for glTF, else guessed
              from the size
    up        "z" or "y", the file's vertical axis; None: y for glTF, else z
    The notes name the flags of the scripts, which are called as these arguments are.
    Raises FileNotFoundError; ValueError for a file that is unreadable, empty, flat, has NaN or infinity, or is smaller
    than 1 cm or larger than 0.6 m after conversion.  Open, badly wound or non-manifold meshes are noted, not refused.
    """
    path = Path(path)
    if not path.is_file():
        hint = " It is a folder: name a file in it." if path.is_dir() else ""
        raise FileNotFoundError(f"mesh file {path} does not exist.{hint}")
    file = read_mesh(path)
    metres, unit_notes, how = _unit_of(file, units, path)
    upright, up_notes = _upright(up, path)
    notes = [*file.notes, *unit_notes, *up_notes]
    file_to_canonical = upright @ np.diag([metres, metres, metres, 1.0])
    vertices = file.vertices @ file_to_canonical[:3, :3].T
    vertices, faces, repair_notes, watertight = clean_mesh(vertices, file.faces, path)
    size = np.ptp(vertices, axis=0).max()
    if not 0.999 * SMALLEST <= size <= 1.001 * LARGEST:  # a size of exactly 0.6 must not fail by rounding
        raise ValueError(_size_message(path, size, metres, how))
    centre = box_centre(vertices)
    if np.abs(centre).max() > ALREADY_CENTRED:
        file_to_canonical[:3, 3] = -centre
        vertices = vertices - centre
        place = ", ".join(f"{1e3 * coordinate:.1f}" for coordinate in centre)
        notes.append(f"Moved the centre of its box from ({place}) mm to the origin.")
    notes += [f"Size {describe_size(vertices)}; {len(vertices)} vertices, {len(faces)} faces.", *repair_notes]
    if category is None:
        category = guess_category(path)
        notes.append(f"Called '{category}' after its name; pass --category for another noun.")
    # In characters that every file system takes.
    name = "_".join(_kept(_meaningful_words(path)[1], "_.-").split()).strip("._")
    return ObjectMesh(
        vertices.astype(np.float32).astype(np.float64), faces, unlike_a_split(name) or "object", category, str(path),
        file_to_canonical, watertight, tuple(notes),
    )


def make_object(category: str, seed: int) -> ObjectMesh:
    """A built-in object; the same category and seed give the same mesh.

    category  one of CATEGORIES
    seed      non-negative integer
    """
    vertices, faces = FAMILIES[category](np.random.default_rng([CATEGORIES.index(category), seed]))
    file_to_canonical = np.eye(4)
    file_to_canonical[:3, 3] = -box_centre(vertices)
    vertices = (vertices + file_to_canonical[:3, 3]).astype(np.float32).astype(np.float64)
    return ObjectMesh(
        vertices, faces.astype(np.int64), f"{category}_{seed:04d}", category, "built-in family", file_to_canonical,
        watertight=True, notes=(f"Built-in {category}, shape {seed}: {describe_size(vertices)}, closed.",),
    )


def find_objects(path: str | Path) -> list[Path]:
    """Mesh files under a folder, linked folders included, sorted by path; a file stands for itself.

    Raises FileNotFoundError when the path does not exist, ValueError when no mesh is there.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such file or folder, and no built-in family ({', '.join(CATEGORIES)})")
    found = [file for file in files_under(path) if file.suffix.lower() in MESH_SUFFIXES]
    if not found:
        others = f"; {left_out} {CONVERT}" if (left_out := left_out_of(path)) else ""
        raise ValueError(f"folder {path} holds no mesh; looked for {', '.join(MESH_SUFFIXES)}{others}")
    return found


def collect_objects(
    words: Iterable[str], shapes: Iterable[int] = (0,), category: str | Sequence[str] | None = None,
    units: str | float | None = None, up: str | None = None,
) -> list[ObjectMesh]:
    """Objects as a command line names them: mesh files, folders of meshes, built-in families.

    shapes    seeds of the shapes made of each built-in family
    category  noun of all mesh files, or one for each in their order, folders sorted; None: from their names
    units, up of mesh files, see load_object
    Files of one name get different object ids.  Raises ValueError that reports every object that cannot be used.
    """
    found, notes, problems, shapes = [], {}, [], list(shapes)
    for word in words:
        if word in CATEGORIES:
            found.append(word)
            continue
        try:
            found += (paths := find_objects(word))
            if left_out := left_out_of(Path(word)):
                notes[paths[0]] = (left_out,)
        except (ValueError, OSError) as error:  # all problems are told at once, not one a run
            problems.append(str(error))
    files = [item for item in found if isinstance(item, Path)]
    nouns = [category] if isinstance(category, str) or category is None else list(category)
    if len(nouns) not in (1, len(files)) and not problems:
        names = ", ".join(map(str, files)) or "none"
        raise ValueError(f"--category has {len(nouns)} nouns ({', '.join(nouns)}) for {len(files)} mesh files "
                         f"({names}): pass one, or one for each in this order; quote a noun of two words")
    nouns, objects = iter(nouns * len(files) if len(nouns) == 1 else nouns), []
    for item in found:
        if isinstance(item, str):
            objects += [make_object(item, shape) for shape in shapes]
            continue
        try:
            mesh = load_object(item, next(nouns, None), units, up)
            objects.append(replace(mesh, notes=mesh.notes + notes.get(item, ())))
        except (ValueError, OSError) as error:
            problems.append(str(error))
    if problems:
        raise ValueError("\n  ".join([f"{len(problems)} object(s) cannot be used, nothing was made:", *problems]))
    return with_distinct_ids(objects)


def with_distinct_ids(objects: Iterable[ObjectMesh]) -> list[ObjectMesh]:
    """The objects, a number behind the ids of those that have one already taken."""
    taken: set[str] = set()  # in one case: some file systems take Mug.ply for mug.ply
    named = []
    for mesh in objects:
        name, number = mesh.object_id, 1
        while name.casefold() in taken:
            number += 1
            name = f"{mesh.object_id}_{number}"
        taken.add(name.casefold())
        named.append(replace(mesh, object_id=name))
    return named


def save_object(mesh: ObjectMesh, path: str | Path) -> None:
    """Write vertices and faces as a binary PLY in metres, to a path ending so; load_object gives the same arrays back.

    The file appears whole or not at all.
    """
    # Float32, as the vertices are already; another writer might turn, reorder or print them.
    header = (
        f"ply\nformat binary_little_endian 1.0\ncomment metres, z up, {mesh.object_id}\n"
        f"element vertex {len(mesh.vertices)}\nproperty float x\nproperty float y\nproperty float z\n"
        f"element face {len(mesh.faces)}\nproperty list uchar int vertex_indices\nend_header\n"
    )
    rows = np.empty(len(mesh.faces), dtype=[("count", "u1"), ("indices", "<i4", 3)])
    rows["count"], rows["indices"] = 3, mesh.faces
    write_whole(path, header.encode() + mesh.vertices.astype("<f4").tobytes() + rows.tobytes())


def object_card(mesh: ObjectMesh) -> dict[str, Any]:
    """Entry of dataset.json: what the mesh is, what was found in its file, and how that file's coordinates were turned
    into the stored ones (file_to_canonical, 16 numbers, row-major).
    """
    return {
        "object_id": mesh.object_id, "category": mesh.category, "source": mesh.source,
        "file_to_canonical": mesh.file_to_canonical.ravel().tolist(), "watertight": mesh.watertight,
        "notes": list(mesh.notes),
    }  # fmt: skip
