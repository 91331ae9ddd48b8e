"""Rendering: hand mesh, object mesh, Camera -> GBuffer (depth, labels, normals, amodal object mask).  Paper: Sec. 3.2.

A backend answers one question, which face is seen in each pixel: pyrender's GL, or a z-buffer in numpy where GL does
not start. Depth, normals and labels are then computed from the face and the pixel's ray in float64, alike for both, so
a change of backend moves a silhouette pixel at most.
"""

import os
import sys
import zlib
from collections import OrderedDict
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from hoi.camera import Camera, transform_points

BACKGROUND, HAND, OBJECT = 0, 1, 2
NEAR, FAR = 0.01, 100.0  # metres; nothing nearer or farther is seen
CREASE_DEG = 50.0  # edges that fold more stay sharp: rims and bases do, a tube of 8 sides does not
CACHED_OBJECTS = 8
PIXELS_AT_ONCE = 500_000  # bounds the memory of the z-buffer when many large faces overlap
NO_FACE = -1


@dataclass(frozen=True)
class GBuffer:
    """Everything later stages need of one view.

    depth            (H, W) float32       metres along the optical axis, 0 = nothing there
    label_map        (H, W) uint8         0 background, 1 hand, 2 object
    surface_normals  (H, W, 3) float32    unit, outward, camera frame (x right, y down, z forward, so what faces the
                                          camera has z < 0), 0 outside
    object_mask      (H, W) bool          whole silhouette of the object, the hand ignored (amodal)
    """

    depth: np.ndarray
    label_map: np.ndarray
    surface_normals: np.ndarray
    object_mask: np.ndarray


def smooth_normals(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Area-weighted normals of the vertices, handed to the faces' corners.

    vertices (V, 3), faces (F, 3) -> (F, 3, 3), unit (zero where every face around a vertex is degenerate)
    """
    face_vectors = _face_vectors(vertices, faces)
    return _normalized(_sum_by_label(faces.ravel(), np.repeat(face_vectors, 3, axis=0), len(vertices)))[faces]


def crease_normals(vertices: np.ndarray, faces: np.ndarray, crease_deg: float = CREASE_DEG) -> np.ndarray:
    """Area-weighted corner normals that are smooth across flat edges and sharp across folded ones.

    Corners at one position share a normal when a fan of edges joins them, each folded by less than `crease_deg`.
    Vertices at equal positions count as one, so seams of textured meshes do not show.

    vertices (V, 3), faces (F, 3) -> (F, 3, 3), unit (zero where every face around a corner is degenerate)
    """
    _, same_position = np.unique(vertices, axis=0, return_inverse=True)
    welded = same_position.reshape(-1)[faces]
    face_vectors = _face_vectors(vertices, faces)
    unit = _normalized(face_vectors)
    corner = np.arange(3 * len(faces)).reshape(-1, 3)
    start, end = welded.ravel(), np.roll(welded, -1, axis=1).ravel()
    start_corner, end_corner = corner.ravel(), np.roll(corner, -1, axis=1).ravel()
    low_corner = np.where(start < end, start_corner, end_corner)
    high_corner = np.where(start < end, end_corner, start_corner)
    edge = np.minimum(start, end) * len(vertices) + np.maximum(start, end)
    order = np.argsort(edge, kind="stable")
    first, second = order[:-1], order[1:]
    folded_little = np.einsum("ij,ij->i", unit[first // 3], unit[second // 3]) > np.cos(np.radians(crease_deg))
    joined = (edge[first] == edge[second]) & folded_little
    first, second = first[joined], second[joined]
    rows = np.concatenate([low_corner[first], high_corner[first]])
    columns = np.concatenate([low_corner[second], high_corner[second]])
    links = coo_matrix((np.ones(len(rows), dtype=bool), (rows, columns)), shape=(corner.size, corner.size))
    count, group = connected_components(links, directed=False)
    return _normalized(_sum_by_label(group, np.repeat(face_vectors, 3, axis=0), count))[group].reshape(-1, 3, 3)


def _face_vectors(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Normals with the length of twice the area: (F, 3)."""
    origin = vertices[faces[:, 0]]
    return np.cross(vertices[faces[:, 1]] - origin, vertices[faces[:, 2]] - origin)


def _sum_by_label(labels: np.ndarray, vectors: np.ndarray, count: int) -> np.ndarray:
    return np.stack([np.bincount(labels, weights=vectors[:, axis], minlength=count) for axis in range(3)], axis=1)


def _normalized(vectors: np.ndarray) -> np.ndarray:
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.divide(vectors, length, out=np.zeros_like(vectors), where=length > 1e-30)


def _ray_weights(corners: np.ndarray, intrinsics: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Linear functions of the pixel that give a face's barycentric weights divided by depth.

    The ray of pixel p = (u, v, 1) is z K^-1 p. The weights w of the point where it meets the face's plane solve
    corners^T w = z K^-1 p, so w / z is linear in p. Source: 2D homogeneous rasterisation, Olano and Greer 1997; a face
    that passes behind the camera needs no clipping.

    corners  (F, 3, 3)  of each face, camera frame
    returns  functions (F, 3, 3), row i for corner i; determinant (F,), negative when the front is seen
    """
    a, b, c = corners[:, 0], corners[:, 1], corners[:, 2]
    opposite = np.stack([np.cross(b, c), np.cross(c, a), np.cross(a, b)], axis=1)
    determinant = np.einsum("ij,ij->i", a, opposite[:, 0])
    safe = np.where(
        determinant == 0, 1.0, determinant
    )  # seen exactly from the side: never covers a pixel centre in the z-buffer
    return opposite @ np.linalg.inv(intrinsics) / safe[:, None, None], determinant


def _candidate_faces(points: np.ndarray, faces: np.ndarray, camera: Camera) -> tuple[np.ndarray, ...]:
    """Faces whose box holds a pixel centre: index, first row, last row, whether it passes the near plane, each (N,)."""
    in_front = points[:, 2] > NEAR
    homogeneous = points @ camera.intrinsics.T
    pixels = homogeneous[:, :2] / np.where(in_front, points[:, 2], 1.0)[:, None]
    (left, top), (right, bottom) = (_over_corners(extreme, pixels, faces) for extreme in (np.minimum, np.maximum))
    any_in_front = in_front[faces[:, 0]] | in_front[faces[:, 1]] | in_front[faces[:, 2]]
    crossing = any_in_front & ~(in_front[faces[:, 0]] & in_front[faces[:, 1]] & in_front[faces[:, 2]])
    # The box of a face that passes the near plane means nothing: look at every row.
    left, top = (np.maximum(np.where(crossing, 0, np.ceil(low - 1e-9)), 0) for low in (left, top))
    right = np.minimum(np.where(crossing, np.inf, np.floor(right + 1e-9)), camera.width - 1)
    bottom = np.minimum(np.where(crossing, np.inf, np.floor(bottom + 1e-9)), camera.height - 1)
    kept = np.flatnonzero(any_in_front & (right >= left) & (bottom >= top))
    return kept, top[kept].astype(np.int64), bottom[kept].astype(np.int64), crossing[kept]


def _over_corners(extreme: np.ufunc, values: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Extreme over each face's three corners, column by column: (V, D) -> (D, F)."""
    columns = np.ascontiguousarray(values.T)
    return np.stack([extreme(extreme(c[faces[:, 0]], c[faces[:, 1]]), c[faces[:, 2]]) for c in columns])


def _row_lines(functions: np.ndarray, crossing: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each limit of a face as a bound on the column, linear in the row: slope, constant, is_left_bound, each (L, F).

    The limits are the face's edges (L = 3) and, when any face passes the near plane, 1 / FAR <= 1 / depth <= 1 / NEAR.
    """
    limits = functions.transpose(1, 2, 0)
    if crossing.any():
        inverse_depth = functions.sum(axis=1).T
        planes = np.stack([-inverse_depth, inverse_depth])
        planes[:, 2] += np.array([1.0 / NEAR, -1.0 / FAR])[:, None]
        limits = np.concatenate([limits, planes])
    a, b, c = limits[:, 0], limits[:, 1], limits[:, 2]
    a = np.where(a == 0, 1e-9 * (np.abs(b) + np.abs(c)) + 1e-300, a)  # along a row: everything or nothing
    return -b / a, -c / a, a > 0


def _row_spans(lines: tuple[np.ndarray, ...], face: np.ndarray, row: np.ndarray, width: int) -> tuple[np.ndarray, ...]:
    """First and last column inside all limits of face (R,) in row (R,): (R,), (R,) int, last < first when none is."""
    first, last = np.zeros(len(row)), np.full(len(row), width - 1.0)
    for slope, constant, is_left in zip(*lines, strict=True):
        bound, left = slope[face] * row + constant[face], is_left[face]
        first = np.where(left, np.maximum(first, bound), first)
        last = np.where(left, last, np.minimum(last, bound))
    first, last = np.minimum(first, width), np.maximum(last, -1)
    return np.ceil(first - 1e-9).astype(np.int64), np.floor(last + 1e-9).astype(np.int64)


def _expand(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Counts (2, 3) -> owner (0, 0, 1, 1, 1), position within the owner (0, 1, 0, 1, 2)."""
    owner = np.repeat(np.arange(len(counts)), counts)
    return owner, np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)


def _chunks(counts: np.ndarray) -> list[np.ndarray]:
    """Indices of counts in order, cut so that the counts of a piece sum to about PIXELS_AT_ONCE."""
    piece = np.cumsum(counts) // PIXELS_AT_ONCE
    return np.split(np.arange(len(counts)), np.flatnonzero(np.diff(piece)) + 1)


def numpy_face_map(vertices: np.ndarray, faces: np.ndarray, camera: Camera) -> np.ndarray:
    """Index of the nearest face in every pixel, by a z-buffer filled row by row of each face.

    vertices (V, 3) world, faces (F, 3) -> (H, W) int32, -1 where there is none
    """
    points = transform_points(camera.world_to_camera, vertices)
    nearest = np.zeros(camera.height * camera.width)  # largest 1 / depth so far
    face_map = np.full(camera.height * camera.width, NO_FACE, dtype=np.int32)
    kept, top, bottom, crossing = _candidate_faces(points, faces, camera)
    functions, determinant = _ray_weights(points[faces[kept]], camera.intrinsics)
    bottom = np.where(determinant == 0, top - 1, bottom)  # seen exactly from the side
    lines = _row_lines(functions, crossing)
    along_row, along_column, constant = functions.sum(axis=1).T
    # Rounding must not lift a face seen almost from the side out of its own range of depths.
    inverse = 1.0 / np.where(points[:, 2] > NEAR, points[:, 2], NEAR)
    (lowest,), (highest,) = (_over_corners(e, inverse[:, None], faces[kept]) for e in (np.minimum, np.maximum))
    lowest = np.where(crossing, 1.0 / FAR, lowest)
    for chunk in _chunks(bottom - top + 1):
        owner, row = _expand((bottom - top + 1)[chunk])
        face = chunk[owner]
        row += top[face]
        first, last = _row_spans(lines, face, row, camera.width)
        filled = np.flatnonzero(last >= first)
        for part in _chunks((last - first + 1)[filled]):
            part = filled[part]
            span, step = _expand((last - first + 1)[part])
            owner, column, line = face[part][span], first[part][span] + step, row[part][span]
            value = along_row[owner] * column + along_column[owner] * line + constant[owner]
            value = np.clip(value, lowest[owner], highest[owner])
            pixel = line * camera.width + column
            np.maximum.at(nearest, pixel, value)
            won = value == nearest[pixel]
            face_map[pixel[won]] = kept[owner[won]]
    return face_map.reshape(camera.height, camera.width)


class _PyrenderFaceMaps:
    """The same face maps from pyrender's SEG pass, whose shader is made to write a face's number in place of a colour.

    Only that pass samples pixel centres alone; the others resolve four samples and blur silhouettes. It always drops
    faces seen from behind, so every face is drawn in both windings.
    """

    VERTEX_SHADER = """#version 330 core
layout(location = 0) in vec3 position;
uniform mat4 P; uniform mat4 V; uniform mat4 M;
void main() { gl_Position = P * V * M * vec4(position, 1.0); }
"""
    FRAGMENT_SHADER = """#version 330 core
out vec4 number;
void main() {
    int n = gl_PrimitiveID + 1;
    number = vec4(float(n & 255), float((n >> 8) & 255), float((n >> 16) & 255), 255.0) / 255.0;
}
"""

    def __init__(self) -> None:
        if sys.platform.startswith("linux"):
            # Before the first import of PyOpenGL. EGL needs no display, and a DISPLAY that is set may lead nowhere.
            os.environ.setdefault("PYOPENGL_PLATFORM", "egl")
        import pyrender
        from pyrender.shader_program import ShaderProgram

        shaders = {"vertex": self.VERTEX_SHADER, "fragment": self.FRAGMENT_SHADER}

        class FaceNumberProgram(ShaderProgram):
            def _load(self, shader_filename: str) -> str:
                return shaders[shader_filename]

        class FaceNumberCache:
            program: Any = None

            def get_program(self, *unused: Any, **also_unused: Any) -> Any:
                if self.program is None:
                    self.program = FaceNumberProgram("vertex", "fragment")
                    self.program._add_to_context()
                return self.program

            def clear(self) -> None:
                self.program = None

        class PinholeCamera(pyrender.camera.Camera):
            """OpenCV axes and any intrinsics, so the scene's poses need no flip."""

            view: Camera

            def get_projection_matrix(self, width: int | None = None, height: int | None = None) -> np.ndarray:
                clip = np.zeros((4, 4))
                fx, fy, fw = self.view.intrinsics
                clip[0, :3] = 2 * (fx + 0.5 * fw) / self.view.width - fw  # GL's pixel centres are at halves
                clip[1, :3] = fw - 2 * (fy + 0.5 * fw) / self.view.height
                clip[2, 2:] = (FAR + NEAR) / (FAR - NEAR), -2 * FAR * NEAR / (FAR - NEAR)
                clip[3, :3] = fw
                return clip

        self.pyrender = pyrender
        self.offscreen = pyrender.OffscreenRenderer(16, 16)
        self.offscreen._renderer._program_cache = FaceNumberCache()
        self.scene = pyrender.Scene()
        self.camera_node = self.scene.add(PinholeCamera(znear=NEAR, zfar=FAR))
        self.nodes: OrderedDict[tuple, Any] = OrderedDict()
        self._check()

    def _check(self) -> None:
        """A driver may start and still draw nonsense: two triangles must come out as the z-buffer has them."""
        vertices = np.array([[-1.0, -1, 2], [1, -1, 2], [0, 1, 2], [-1, 1, 3], [1, 1, 3], [0, -1, 1]])
        faces = np.array([[0, 1, 2], [3, 4, 5]])
        camera = Camera(np.array([[20.0, 0, 15.5], [0, 20.0, 11.5], [0, 0, 1]]), np.eye(4), 24, 32)
        drawn, expected = self(vertices, faces, camera), numpy_face_map(vertices, faces, camera)
        if (drawn != expected).mean() > 0.02:
            raise RuntimeError("GL drew a wrong test picture")

    def _node(self, vertices: np.ndarray, faces: np.ndarray) -> Any:
        """The uploaded mesh; the last few stay on the GL side, so an object is sent once."""
        key = _content_key(vertices, faces)
        if key not in self.nodes:
            primitive = self.pyrender.Primitive(
                positions=vertices.astype(np.float32), indices=np.concatenate([faces, faces[:, ::-1]]).astype(np.uint32)
            )
            self.nodes[key] = self.scene.add(self.pyrender.Mesh([primitive]))
        self.nodes.move_to_end(key)
        while len(self.nodes) > CACHED_OBJECTS:
            self.scene.remove_node(self.nodes.popitem(last=False)[1])
        return self.nodes[key]

    def __call__(self, vertices: np.ndarray, faces: np.ndarray, camera: Camera) -> np.ndarray:
        self.offscreen.viewport_width, self.offscreen.viewport_height = camera.width, camera.height
        self.camera_node.camera.view = camera
        self.scene.set_pose(self.camera_node, np.linalg.inv(camera.world_to_camera))
        flags = self.pyrender.RenderFlags.SEG
        color, _ = self.offscreen.render(self.scene, flags, {self._node(vertices, faces): 0})
        number = color.astype(np.int32) @ np.array([1, 256, 65536], dtype=np.int32)
        return np.where(number > 0, (number - 1) % len(faces), NO_FACE).astype(np.int32)


@lru_cache(maxsize=1)
def _start_pyrender(process: int) -> "_PyrenderFaceMaps | str":
    """The one GL renderer of this process, or why there is none.

    The end of a second renderer would break the first, hence the cache; a forked process gets its own.
    """
    try:
        return _PyrenderFaceMaps()
    except Exception as error:  # drivers fail in many ways: missing libraries, no device, no display, a shader refused
        return f"{type(error).__name__}: {error}"


def _content_key(*arrays: np.ndarray) -> tuple:
    return tuple((array.shape, zlib.crc32(np.ascontiguousarray(array).data)) for array in arrays)


class Renderer:
    """Draws GBuffers; remembers the corner normals of the last few objects.

    backend      "auto" (pyrender where its GL starts, otherwise numpy), "pyrender" or "numpy"
    .backend     the one in use, "pyrender" or "numpy"
    .reason      one line: why this one
    Raises RuntimeError when "pyrender" is asked for and its GL does not start, ValueError for another name.
    """

    def __init__(self, backend: str = "auto") -> None:
        if backend not in ("auto", "pyrender", "numpy"):
            raise ValueError(f'backend is {backend!r}; expected "auto", "pyrender" or "numpy"')
        started = "not tried" if backend == "numpy" else _start_pyrender(os.getpid())
        if backend == "pyrender" and isinstance(started, str):
            raise RuntimeError(
                f'pyrender does not start ({started}); install libegl1 and libgl1, or use backend "numpy"'
            )
        self.backend = "numpy" if isinstance(started, str) else "pyrender"
        self.reason = f"pyrender: {started}" if isinstance(started, str) else "pyrender's GL starts"
        self._face_map = numpy_face_map if isinstance(started, str) else started
        self._object_normals: OrderedDict[tuple, np.ndarray] = OrderedDict()

    def render(
        self,
        hand_vertices: np.ndarray | None,
        hand_faces: np.ndarray | None,
        object_vertices: np.ndarray | None,
        object_faces: np.ndarray | None,
        camera: Camera,
    ) -> GBuffer:
        """Draw a hand, an object or both.

        hand_vertices, object_vertices  (V, 3)  metres, the camera's world frame; None (with its faces) leaves it out
        hand_faces, object_faces        (F, 3)  int, counter-clockwise seen from outside; a face seen from behind (an
                                                open mesh) is drawn too, its normal turned to the camera
        Raises ValueError for wrong shapes, indices out of range or values that are not finite.
        """
        layers = []
        if object_vertices is not None and len(object_faces):
            mesh = _checked("object", object_vertices, object_faces)
            layers.append(
                (OBJECT, _meet_rays(self._face_map(*mesh, camera), *mesh, self._cached_normals(*mesh), camera))
            )
        if hand_vertices is not None and len(hand_faces):
            mesh = _checked("hand", hand_vertices, hand_faces)
            layers.append((HAND, _meet_rays(self._face_map(*mesh, camera), *mesh, smooth_normals(*mesh), camera)))
        return _nearest_of(layers, camera)

    def _cached_normals(self, vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
        key = _content_key(vertices, faces)
        if key not in self._object_normals:
            self._object_normals[key] = crease_normals(vertices, faces)
        self._object_normals.move_to_end(key)
        while len(self._object_normals) > CACHED_OBJECTS:
            self._object_normals.popitem(last=False)
        return self._object_normals[key]


def _checked(what: str, vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    vertices, faces = np.asarray(vertices, dtype=np.float64), np.asarray(faces, dtype=np.int64)
    if vertices.ndim != 2 or vertices.shape[1] != 3 or faces.ndim != 2 or faces.shape[1] != 3:
        raise ValueError(f"{what}: vertices are {vertices.shape} and faces {faces.shape}; expected (V, 3) and (F, 3)")
    if not np.isfinite(vertices).all():
        raise ValueError(
            f"{what}: {(~np.isfinite(vertices).all(axis=1)).sum()} of {len(vertices)} vertices are not finite"
        )
    if faces.min() < 0 or faces.max() >= len(vertices):
        raise ValueError(
            f"{what}: face indices run from {faces.min()} to {faces.max()}; there are {len(vertices)} vertices"
        )
    return vertices, faces


def _meet_rays(
    face_map: np.ndarray, vertices: np.ndarray, faces: np.ndarray, corner_normals: np.ndarray, camera: Camera
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where the rays of covered pixels meet their faces: flat pixel index (N,), depth (N,), surface normal (N, 3)."""
    pixel = np.flatnonzero(face_map >= 0)
    face = face_map.ravel()[pixel]
    points = transform_points(camera.world_to_camera, vertices)
    weights, from_behind = _corner_weights(points, faces, face, pixel, camera)
    # GL rounds corners to 1/256 pixel, so it may choose a face that ends just beside the pixel's centre. Ask the faces
    # around it; where none covers the centre, stay on the border of the first.
    beside = np.flatnonzero(weights.min(axis=1) < -1e-6)
    if len(beside):
        touched = np.zeros(len(vertices), dtype=bool)
        touched[faces[face[beside]]] = True
        around = np.flatnonzero(touched[faces].any(axis=1))
        exact = numpy_face_map(vertices, faces[around], camera).ravel()[pixel[beside]]
        face[beside] = np.where(exact >= 0, around[exact], face[beside])
        weights[beside], from_behind[beside] = _corner_weights(points, faces, face[beside], pixel[beside], camera)
    weights = np.clip(weights, 0.0, 1.0)
    weights /= weights.sum(axis=1, keepdims=True)
    depth = (weights * points[:, 2][faces[face]]).sum(axis=1)
    normals = np.einsum("ij,ijk->ik", weights, corner_normals[face]) @ camera.world_to_camera[:3, :3].T
    return pixel, depth, _normalized(np.where(from_behind[:, None], -normals, normals))


def _corner_weights(
    points: np.ndarray, faces: np.ndarray, face: np.ndarray, pixel: np.ndarray, camera: Camera
) -> tuple[np.ndarray, np.ndarray]:
    """Barycentric weights (N, 3) of each pixel's ray on its face's plane, and whether the face is seen from behind."""
    is_seen = np.zeros(len(faces), dtype=bool)
    is_seen[face] = True
    seen = np.flatnonzero(is_seen)
    place = np.cumsum(is_seen)[face] - 1
    functions, determinant = _ray_weights(points[faces[seen]], camera.intrinsics)
    of_pixel = functions.reshape(-1, 9)[place]
    row, column = (each[:, None] for each in np.divmod(pixel, camera.width))
    weights = of_pixel[:, 0::3] * column + of_pixel[:, 1::3] * row + of_pixel[:, 2::3]
    total = weights.sum(axis=1, keepdims=True)  # zero when GL shows a face that is seen exactly from the side
    weights = np.divide(weights, total, out=np.full(weights.shape, 1 / 3), where=total != 0)
    return weights, determinant[place] > 0


def _nearest_of(layers: list[tuple[int, tuple[np.ndarray, ...]]], camera: Camera) -> GBuffer:
    """Put the layers (object, then hand) together; the later one wins where both are equally near."""
    size = camera.height * camera.width
    depth, label_map = np.full(size, np.inf), np.zeros(size, dtype=np.uint8)
    surface_normals, object_mask = np.zeros((size, 3), dtype=np.float32), np.zeros(size, dtype=bool)
    for label, (pixel, layer_depth, layer_normals) in layers:
        if label == OBJECT:
            object_mask[pixel] = True
        wins = layer_depth <= depth[pixel]
        pixel = pixel[wins]
        depth[pixel], label_map[pixel], surface_normals[pixel] = layer_depth[wins], label, layer_normals[wins]
    depth[label_map == BACKGROUND] = 0.0
    shape = camera.height, camera.width
    return GBuffer(
        depth.astype(np.float32).reshape(shape),
        label_map.reshape(shape),
        surface_normals.reshape(*shape, 3),
        object_mask.reshape(shape),
    )
