"""Rasterising: mesh, Camera -> the face seen in each pixel, and where its ray meets it.  Paper: Sec. 3.2.

A face map holds the index of the nearest face in every pixel.  Two backends make it: pyrender's GL, and a z-buffer in
numpy where GL does not start.  What is seen is then computed from the face and the pixel's ray in float64, alike for
both (meet_rays), so a change of backend moves a silhouette pixel at most.
"""

import os
import sys
import zlib
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np

from hoi.common.files import ASSETS
from hoi.geometry.camera import Camera, transform_points

NEAR, FAR = 0.01, 100.0  # metres; nothing nearer or farther is seen
NO_FACE = -1
PIXELS_AT_ONCE = 500_000  # of all faces together: bounds the z-buffer's memory at some 50 MB when large faces overlap
EDGE_SLACK = 1e-9  # pixels: a centre on an edge belongs to both faces, whatever rounding (1e-13) says
CACHED_MESHES = 8  # kept by GL, for an object is drawn many times; the hand moves, so its meshes pass through


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
    # Zero: seen exactly from the side, which covers no pixel centre; any other number keeps the division harmless.
    safe = np.where(determinant == 0, 1.0, determinant)
    return opposite @ np.linalg.inv(intrinsics) / safe[:, None, None], determinant


def _chunks(counts: np.ndarray) -> list[np.ndarray]:
    """Indices of counts in order, cut so that the counts of a piece sum to about PIXELS_AT_ONCE."""
    piece = np.cumsum(counts) // PIXELS_AT_ONCE
    return np.split(np.arange(len(counts)), np.flatnonzero(np.diff(piece)) + 1)


def numpy_face_map(vertices: np.ndarray, faces: np.ndarray, camera: Camera) -> np.ndarray:
    """Index of the nearest face in every pixel, by a z-buffer: each face tries all pixels of its box.

    vertices (V, 3) world, faces (F, 3) -> (H, W) int32, -1 where there is none
    """
    points = transform_points(camera.world_to_camera, vertices)
    in_front, inverse = points[:, 2] > NEAR, 1.0 / np.maximum(points[:, 2], NEAR)
    corners, front = ((points @ camera.intrinsics.T)[:, :2] * inverse[:, None])[faces], in_front[faces]
    low, high = np.ceil(corners.min(axis=1) - EDGE_SLACK), np.floor(corners.max(axis=1) + EDGE_SLACK)
    # The box of a face that passes the near plane means nothing: it tries the whole picture.
    crossing = front.any(axis=1) & ~front.all(axis=1)
    low[crossing], high[crossing] = 0, np.inf
    low = np.maximum(low, 0)
    size = np.minimum(high, [camera.width - 1, camera.height - 1]) - low + 1
    kept = np.flatnonzero(front.any(axis=1) & (size > 0).all(axis=1))
    low, size, crossing = low[kept].astype(np.int64), size[kept].astype(np.int64), crossing[kept]
    functions, determinant = _ray_weights(points[faces[kept]], camera.intrinsics)
    edges = np.ascontiguousarray(functions.transpose(1, 2, 0))  # (3, 3, N): of each corner, times (column, row, 1)
    edges[:, 2] += EDGE_SLACK * np.abs(edges[:, :2]).sum(axis=1)
    count = np.where(determinant == 0, 0, size.prod(axis=1))  # seen exactly from the side: no pixels
    # 1 / depth is the sum of the three functions.  Rounding must not lift a face seen almost from the side out of its
    # own range of depths.
    along_row, along_column, constant = functions.sum(axis=1).T
    lowest, highest = np.where(crossing, 0.0, inverse[faces[kept]].min(axis=1)), inverse[faces[kept]].max(axis=1)
    nearest = np.full(camera.height * camera.width, 1.0 / FAR)  # largest 1 / depth so far
    face_map = np.full(camera.height * camera.width, NO_FACE, dtype=np.int32)
    for chunk in _chunks(count):
        # Of counts (2, 3): faces 0 0 1 1 1, and numbers 0 1 0 1 2 of their pixels.
        face = np.repeat(chunk, count[chunk])
        place = np.arange(len(face)) - np.repeat(np.cumsum(count[chunk]) - count[chunk], count[chunk])
        row, column = np.divmod(place, size[face, 0])
        column, row = column + low[face, 0], row + low[face, 1]
        for a, b, c in edges:
            inside = a[face] * column + b[face] * row + c[face] >= 0
            face, column, row = face[inside], column[inside], row[inside]
        value = along_row[face] * column + along_column[face] * row + constant[face]
        inside = ~crossing[face] | (value <= 1.0 / NEAR)
        face, value = face[inside], np.clip(value, lowest[face], highest[face])[inside]
        pixel = (row * camera.width + column)[inside]
        np.maximum.at(nearest, pixel, value)
        won = value == nearest[pixel]
        face_map[pixel[won]] = kept[face[won]]
    return face_map.reshape(camera.height, camera.width)


class Recent:
    """A function of arrays that remembers its last few results, by the contents of the arrays.

    make    the function;  size  results kept;  forget  called with a result that is dropped
    """

    def __init__(
        self, make: Callable[..., Any], size: int, forget: Callable[[Any], None] = lambda result: None
    ) -> None:
        self.make, self.size, self.forget = make, size, forget
        self.kept: OrderedDict[tuple, Any] = OrderedDict()

    def __call__(self, *arrays: np.ndarray) -> Any:
        """make(*arrays), now or as made before."""
        key = tuple((array.shape, zlib.crc32(np.ascontiguousarray(array).data)) for array in arrays)
        if key not in self.kept:
            self.kept[key] = self.make(*arrays)
        self.kept.move_to_end(key)
        if len(self.kept) > self.size:
            self.forget(self.kept.popitem(last=False)[1])
        return self.kept[key]


class PyrenderFaceMap:
    """The same face maps from pyrender's SEG pass, whose shader is made to write a face's number in place of a colour.

    Only that pass samples pixel centres alone; the others resolve four samples and blur silhouettes. It always drops
    faces seen from behind, so every face is drawn in both windings.
    """

    def __init__(self) -> None:
        if sys.platform.startswith("linux"):
            # Before the first import of PyOpenGL. EGL needs no display, and a DISPLAY that is set may lead nowhere.
            os.environ.setdefault("PYOPENGL_PLATFORM", "egl")
        with suppress(ImportError):
            # Of torch's compiler, which torch may import later: its LLVM after that of Mesa's GL crashes the process.
            import triton._C.libtriton  # noqa: F401
        import pyrender
        from pyrender.shader_program import ShaderProgram

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

        self.process = os.getpid()
        self.pyrender = pyrender
        self.offscreen = pyrender.OffscreenRenderer(16, 16)
        program = ShaderProgram(*(str(ASSETS / "shaders" / f"face_number.{kind}") for kind in ("vert", "frag")))
        program._add_to_context()
        # Stands in the place of pyrender's own shaders, whatever it asks for.
        cache_of_one = SimpleNamespace(get_program=lambda *_, **__: program, clear=lambda: None)
        self.offscreen._renderer._program_cache = cache_of_one
        self.scene = pyrender.Scene()
        self.camera_node = self.scene.add(PinholeCamera(znear=NEAR, zfar=FAR))
        self.node_of = Recent(self._upload, CACHED_MESHES, self.scene.remove_node)
        self._check()

    def _check(self) -> None:
        """A driver may start and still draw nonsense: two triangles must come out as the z-buffer has them."""
        vertices = np.array([[-1.0, -1, 2], [1, -1, 2], [0, 1, 2], [-1, 1, 3], [1, 1, 3], [0, -1, 1]])
        faces = np.array([[0, 1, 2], [3, 4, 5]])
        camera = Camera(np.array([[20.0, 0, 15.5], [0, 20.0, 11.5], [0, 0, 1]]), np.eye(4), 24, 32)
        drawn, expected = self(vertices, faces, camera), numpy_face_map(vertices, faces, camera)
        if (drawn != expected).mean() > 0.02:  # 15 of 768 pixels; drivers that work differ in none
            raise RuntimeError("GL drew a wrong test picture")

    def _upload(self, vertices: np.ndarray, faces: np.ndarray) -> Any:
        """A mesh as a node of pyrender's scene, on the GL side, every face in both windings."""
        both = np.concatenate([faces, faces[:, ::-1]]).astype(np.uint32)
        primitive = self.pyrender.Primitive(positions=vertices.astype(np.float32), indices=both)
        return self.scene.add(self.pyrender.Mesh([primitive]))

    def __call__(self, vertices: np.ndarray, faces: np.ndarray, camera: Camera) -> np.ndarray:
        """Arguments and result as those of numpy_face_map.  Raises RuntimeError in a process forked after the start."""
        if self.process != os.getpid():
            raise RuntimeError("this renderer was made before the process forked; make a new Renderer in each worker")
        self.offscreen.viewport_width, self.offscreen.viewport_height = camera.width, camera.height
        self.camera_node.camera.view = camera
        self.scene.set_pose(self.camera_node, np.linalg.inv(camera.world_to_camera))
        flags = self.pyrender.RenderFlags.SEG
        color, _ = self.offscreen.render(self.scene, flags, {self.node_of(vertices, faces): 0})
        number = color.astype(np.int32) @ np.array([1, 256, 65536], dtype=np.int32)
        # Number 0 is the background; the second half of the numbers are the faces in their other winding.
        return np.where(number > 0, (number - 1) % len(faces), NO_FACE).astype(np.int32)


@cache  # the end of a second GL renderer in a process would break the first
def _start() -> "PyrenderFaceMap | str":
    try:
        return PyrenderFaceMap()
    except Exception as error:  # drivers fail in many ways: a library or device missing, no display, a shader refused
        return f"{type(error).__name__}: {error}".splitlines()[0]


def start_pyrender() -> "PyrenderFaceMap | str":
    """The one GL renderer of this process, or a line that says why there is none."""
    started = _start()
    if isinstance(started, PyrenderFaceMap) and started.process != os.getpid():
        return "GL was started before this process forked and would hang in it; start workers with spawn"
    return started


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


def meet_rays(face_map: np.ndarray, vertices: np.ndarray, faces: np.ndarray, camera: Camera) -> tuple[np.ndarray, ...]:
    """Where the rays of the N pixels that a face map covers meet their faces.

    face_map (H, W) from either backend; vertices (V, 3) metres, the camera's world frame; faces (F, 3)
    returns  pixel (N,) flat index, row by row; face (N,); weights (N, 3) barycentric; depth (N,) metres along the
             optical axis; from_behind (N,) bool: the face shows its inside
    """
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
    return pixel, face, weights, (weights * points[:, 2][faces[face]]).sum(axis=1), from_behind
