"""Rendering: hand mesh, object mesh, Camera -> GBuffer (depth, label map, surface normals, amodal object mask).  Paper: Sec. 3.2.

A backend answers one question, which face is seen in each pixel: pyrender's GL, or a z-buffer in numpy where GL does not start. Depth, normals and labels
are then computed from the face and the pixel's ray in float64, the same for both, so a change of backend moves a silhouette pixel at most.
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
    surface_normals  (H, W, 3) float32    unit, outward, camera frame (x right, y down, z forward: what faces the camera has z < 0), 0 outside
    object_mask      (H, W) bool          whole silhouette of the object, the hand ignored (amodal)
    """

    depth: np.ndarray
    label_map: np.ndarray
    surface_normals: np.ndarray
    object_mask: np.ndarray


def smooth_normals(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Area-weighted normal of every vertex, handed to the corners of every face: vertices (V, 3), faces (F, 3) -> (F, 3, 3) unit."""
    face_vectors = _face_vectors(vertices, faces)
    return _normalized(_sum_by_label(faces.ravel(), np.repeat(face_vectors, 3, axis=0), len(vertices)))[faces]


def crease_normals(vertices: np.ndarray, faces: np.ndarray, crease_deg: float = CREASE_DEG) -> np.ndarray:
    """Area-weighted corner normals that are smooth across flat edges and sharp across folded ones.

    Corners at one position share a normal when a fan of edges joins them, each folded by less than `crease_deg`. Vertices at equal positions count as one,
    so seams of textured meshes do not show.

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

    The ray of pixel p is z K^-1 (u, v, 1); the weights w of the point where it meets the face's plane solve corners^T w = z K^-1 p, so w / z is linear in p
    (2D homogeneous rasterisation, Olano and Greer 1997). It needs no clipped polygon when a face passes behind the camera.

    corners (F, 3, 3) of each face in the camera frame -> functions (F, 3, 3), row i for corner i; determinant (F,), negative when the face is seen from the front
    """
    a, b, c = corners[:, 0], corners[:, 1], corners[:, 2]
    opposite = np.stack([np.cross(b, c), np.cross(c, a), np.cross(a, b)], axis=1)
    determinant = np.einsum("ij,ij->i", a, opposite[:, 0])
    safe = np.where(
        determinant == 0, 1.0, determinant
    )  # seen exactly from the side: never covers a pixel centre in the z-buffer
    return opposite @ np.linalg.inv(intrinsics) / safe[:, None, None], determinant


def _candidate_faces(
    points: np.ndarray, faces: np.ndarray, camera: Camera
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Faces whose box holds a pixel centre, with the first and last picture row of the box: three (N,) int arrays."""
    depth = points[:, 2]
    in_front = depth > NEAR
    pixel = points @ camera.intrinsics.T
    pixel = pixel[:, :2] / np.where(in_front, depth, 1.0)[:, None]
    corner_pixels = pixel[faces]
    low = np.ceil(corner_pixels.min(axis=1) - 1e-9)
    high = np.floor(corner_pixels.max(axis=1) + 1e-9)
    corners_in_front = in_front[faces].sum(axis=1)
    crossing = (corners_in_front > 0) & (corners_in_front < 3)  # passes the near plane: its projected box means nothing
    low[crossing], high[crossing] = 0, (camera.width - 1, camera.height - 1)
    low = np.maximum(low, 0)
    high = np.minimum(high, (camera.width - 1, camera.height - 1))
    kept = np.flatnonzero((corners_in_front > 0) & (high >= low).all(axis=1))
    return kept, low[kept, 1].astype(np.int64), high[kept, 1].astype(np.int64)


def _row_spans(
    functions: np.ndarray, face_of_row: np.ndarray, rows: np.ndarray, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """First and last column where a face's row is inside its three edges and between the near and far planes: (R,), (R,) int (empty when last < first)."""
    inverse_depth = functions.sum(axis=1, keepdims=True)
    limits = np.concatenate([functions, -inverse_depth, inverse_depth], axis=1)  # each of the five must not be negative
    limits[:, 3, 2] += 1.0 / NEAR
    limits[:, 4, 2] -= 1.0 / FAR
    slope = limits[face_of_row, :, 0]
    constant = limits[face_of_row, :, 1] * rows[:, None] + limits[face_of_row, :, 2]
    with np.errstate(divide="ignore", invalid="ignore"):
        crossing = -constant / slope
    first = np.where(slope > 0, crossing, np.where((slope == 0) & (constant < 0), np.inf, -np.inf)).max(axis=1)
    last = np.where(slope < 0, crossing, np.inf).min(axis=1)
    first = np.ceil(np.clip(first, 0, width) - 1e-9).astype(np.int64)
    last = np.floor(np.clip(last, -1, width - 1) + 1e-9).astype(np.int64)
    return first, last


def _expand(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Counts (2, 3) -> owner (0, 0, 1, 1, 1), position within the owner (0, 1, 0, 1, 2)."""
    owner = np.repeat(np.arange(len(counts)), counts)
    return owner, np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)


def _chunks(counts: np.ndarray) -> list[np.ndarray]:
    """Indices of counts in order, cut so that the counts of a piece sum to about PIXELS_AT_ONCE (counts are at most a picture's side)."""
    piece = np.cumsum(counts) // PIXELS_AT_ONCE
    return np.split(np.arange(len(counts)), np.flatnonzero(np.diff(piece)) + 1)


def numpy_face_map(vertices: np.ndarray, faces: np.ndarray, camera: Camera) -> np.ndarray:
    """Index of the nearest face in every pixel, by a z-buffer: vertices (V, 3) world, faces (F, 3) -> (H, W) int32, -1 where there is none."""
    points = transform_points(camera.world_to_camera, vertices)
    nearest = np.zeros(camera.height * camera.width)  # largest 1 / depth so far
    face_map = np.full(camera.height * camera.width, NO_FACE, dtype=np.int32)
    kept, top, bottom = _candidate_faces(points, faces, camera)
    functions, determinant = _ray_weights(points[faces[kept]], camera.intrinsics)
    seen = determinant != 0
    kept, top, bottom, functions = kept[seen], top[seen], bottom[seen], functions[seen]
    inverse_depth = functions.sum(axis=1)
    for chunk in _chunks(bottom - top + 1):
        face_of_row, row = _expand(bottom[chunk] - top[chunk] + 1)
        face_of_row = chunk[face_of_row]
        row += top[face_of_row]
        first, last = _row_spans(functions, face_of_row, row, camera.width)
        filled = last >= first
        face_of_row, row, first, last = face_of_row[filled], row[filled], first[filled], last[filled]
        for part in _chunks(last - first + 1):
            span, step = _expand((last - first + 1)[part])
            face = face_of_row[part][span]
            column, line = first[part][span] + step, row[part][span]
            value = inverse_depth[face, 0] * column + inverse_depth[face, 1] * line + inverse_depth[face, 2]
            pixel = line * camera.width + column
            np.maximum.at(nearest, pixel, value)
            won = value == nearest[pixel]
            face_map[pixel[won]] = kept[face[won]]
    return face_map.reshape(camera.height, camera.width)


class _PyrenderFaceMaps:
    """The same face maps from pyrender's SEG pass, with a shader that writes the face's number instead of a node's colour.

    Only that pass samples pixel centres alone; the others resolve four samples and blur silhouettes. It always drops faces seen from behind, so every face
    is drawn in both windings.
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
            # Must precede the first import of PyOpenGL. EGL needs no display, and a DISPLAY that is set may lead nowhere.
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
    """The only GL renderer of this process (a second one's end would break the first), or why there is none. A forked process gets its own."""
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
        hand_faces, object_faces        (F, 3)  int, counter-clockwise seen from outside; faces seen from behind are drawn too, with the normal turned
        Raises ValueError for wrong shapes, indices out of range or values that are not finite.
        """
        hand, amodal = None, None
        if hand_vertices is not None and len(hand_faces):
            hand_vertices, hand_faces = _checked("hand", hand_vertices, hand_faces)
            hand = _shade(
                self._face_map(hand_vertices, hand_faces, camera),
                hand_vertices,
                hand_faces,
                smooth_normals(hand_vertices, hand_faces),
                camera,
            )
        if object_vertices is not None and len(object_faces):
            object_vertices, object_faces = _checked("object", object_vertices, object_faces)
            normals = self._cached_normals(object_vertices, object_faces)
            amodal = _shade(
                self._face_map(object_vertices, object_faces, camera), object_vertices, object_faces, normals, camera
            )
        return _nearest_of(hand, amodal, camera)

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


def _shade(
    face_map: np.ndarray, vertices: np.ndarray, faces: np.ndarray, corner_normals: np.ndarray, camera: Camera
) -> tuple[np.ndarray, np.ndarray]:
    """Depth (H, W) and surface normals (H, W, 3) of one mesh from its face map, by meeting each pixel's ray with its face."""
    covered = face_map >= 0
    line, column = np.nonzero(covered)
    seen, face = np.unique(face_map[covered], return_inverse=True)
    corners = transform_points(camera.world_to_camera, vertices[faces[seen]])
    functions, determinant = _ray_weights(corners, camera.intrinsics)
    functions = functions[face]
    weights = functions[..., 0] * column[:, None] + functions[..., 1] * line[:, None] + functions[..., 2]
    # GL may give a pixel to a face whose exact outline passes just beside its centre; stay on the face.
    weights = np.clip(weights / weights.sum(axis=1, keepdims=True), 0.0, 1.0)
    weights /= weights.sum(axis=1, keepdims=True)
    depth = np.zeros(face_map.shape)
    depth[covered] = np.einsum("ij,ij->i", weights, corners[face, :, 2])
    normals = np.zeros((*face_map.shape, 3))
    turned = (
        corner_normals[seen] @ camera.world_to_camera[:3, :3].T * np.where(determinant > 0, -1.0, 1.0)[:, None, None]
    )
    normals[covered] = _normalized(np.einsum("ij,ijk->ik", weights, turned[face]))
    return depth, normals


def _nearest_of(
    hand: tuple[np.ndarray, np.ndarray] | None, amodal: tuple[np.ndarray, np.ndarray] | None, camera: Camera
) -> GBuffer:
    """Put the two layers together; the hand wins where both are equally near."""
    nothing = np.zeros((camera.height, camera.width)), np.zeros((camera.height, camera.width, 3))
    hand_depth, hand_normals = hand or nothing
    object_depth, object_normals = amodal or nothing
    object_mask = object_depth > 0
    hand_wins = (hand_depth > 0) & (~object_mask | (hand_depth <= object_depth))
    label_map = np.where(hand_wins, HAND, np.where(object_mask, OBJECT, BACKGROUND)).astype(np.uint8)
    depth = np.where(hand_wins, hand_depth, object_depth).astype(np.float32)
    surface_normals = np.where(hand_wins[..., None], hand_normals, object_normals).astype(np.float32)
    return GBuffer(depth, label_map, surface_normals, object_mask)
