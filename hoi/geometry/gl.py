"""pyrender's GL: mesh, Camera -> the face seen in each pixel, as the z-buffer has it.  Paper: Sec. 3.2."""

import os
import sys
import zlib
from collections import OrderedDict
from functools import cache
from typing import Any

import numpy as np

from hoi.geometry.camera import Camera
from hoi.geometry.zbuffer import FAR, NEAR, NO_FACE, numpy_face_map

CACHED_MESHES = 8


class PyrenderFaceMap:
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

        self.process = os.getpid()
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
        key = content_key(vertices, faces)
        if key not in self.nodes:
            primitive = self.pyrender.Primitive(
                positions=vertices.astype(np.float32), indices=np.concatenate([faces, faces[:, ::-1]]).astype(np.uint32)
            )
            self.nodes[key] = self.scene.add(self.pyrender.Mesh([primitive]))
        self.nodes.move_to_end(key)
        while len(self.nodes) > CACHED_MESHES:
            self.scene.remove_node(self.nodes.popitem(last=False)[1])
        return self.nodes[key]

    def __call__(self, vertices: np.ndarray, faces: np.ndarray, camera: Camera) -> np.ndarray:
        if self.process != os.getpid():
            raise RuntimeError("this renderer was made before the process forked; make a new Renderer in each worker")
        self.offscreen.viewport_width, self.offscreen.viewport_height = camera.width, camera.height
        self.camera_node.camera.view = camera
        self.scene.set_pose(self.camera_node, np.linalg.inv(camera.world_to_camera))
        flags = self.pyrender.RenderFlags.SEG
        color, _ = self.offscreen.render(self.scene, flags, {self._node(vertices, faces): 0})
        number = color.astype(np.int32) @ np.array([1, 256, 65536], dtype=np.int32)
        return np.where(number > 0, (number - 1) % len(faces), NO_FACE).astype(np.int32)


def content_key(*arrays: np.ndarray) -> tuple:
    """Equal for equal contents: shapes and checksums."""
    return tuple((array.shape, zlib.crc32(np.ascontiguousarray(array).data)) for array in arrays)


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
