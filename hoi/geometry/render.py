"""Rendering: hand mesh, object mesh, Camera -> GBuffer (depth, labels, normals, amodal object mask).  Paper: Sec. 3.2.

Each mesh is a layer: which face a pixel sees and where its ray meets it comes from hoi/geometry/raster.py, the normal
there is mixed from the normals of the face's corners, made here.  The layers are then put together, nearest first.
"""

from dataclasses import dataclass

import numpy as np
from trimesh.graph import connected_component_labels

from hoi.geometry.camera import Camera
from hoi.geometry.raster import Recent, meet_rays, numpy_face_map, start_pyrender

BACKGROUND, HAND, OBJECT = 0, 1, 2
CREASE_DEG = 50.0  # edges that fold more stay sharp: rims and bases do, a tube of 8 sides does not
CACHED_OBJECTS = 8  # whose corner normals are remembered: 6 ms for a mug that is drawn in 10 (512 px)
FLESH = 0.025  # metres: a joint lies at most so deep below the skin that hides it; deeper, something else is before it


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


def _normalized(vectors: np.ndarray) -> np.ndarray:
    """(..., 3) of length 1; what is shorter than any edge can be becomes 0."""
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.divide(vectors, length, out=np.zeros_like(vectors), where=length > 1e-30)


def _sum_by_label(labels: np.ndarray, vectors: np.ndarray, count: int) -> np.ndarray:
    """Sum of the vectors (N, 3) of each label 0 to count - 1: (count, 3)."""
    return np.stack([np.bincount(labels, weights=vectors[:, axis], minlength=count) for axis in range(3)], axis=1)


def _corner_parts(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Unit normals of the faces (F, 3), and what each corner adds to its vertex: that normal times its angle (3 F, 3).

    Weights by angle do not depend on how a quad is cut in two, weights by area do: on a surface of revolution with 64
    sections they lean by 0.9 degrees. Source: Thuermer and Wuethrich 1998.
    """
    corners = vertices[faces]
    edges = np.roll(corners, -1, axis=1) - corners  # edge i runs from corner i to the next
    unit = _normalized(np.cross(edges[:, 0], edges[:, 1]))
    directions = _normalized(edges)
    cosines = -np.einsum("fij,fij->fi", directions, np.roll(directions, 1, axis=1))
    angles = np.arccos(np.clip(cosines, -1.0, 1.0))
    return unit, (angles[..., None] * unit[:, None]).reshape(-1, 3)


def smooth_normals(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Angle-weighted normals of the vertices, handed to the faces' corners.

    vertices (V, 3), faces (F, 3) -> (F, 3, 3), unit (zero where every face around a vertex is degenerate)
    """
    _, parts = _corner_parts(vertices, faces)
    return _normalized(_sum_by_label(faces.ravel(), parts, len(vertices)))[faces]


def crease_normals(vertices: np.ndarray, faces: np.ndarray, crease_deg: float = CREASE_DEG) -> np.ndarray:
    """Angle-weighted corner normals that are smooth across flat edges and sharp across folded ones.

    Corners at one position share a normal when a fan of edges joins them, each folded by less than `crease_deg`.
    Vertices at equal positions count as one, so seams of textured meshes do not show.

    vertices (V, 3), faces (F, 3) -> (F, 3, 3), unit (zero where every face around a corner is degenerate)
    """
    _, same_position = np.unique(vertices, axis=0, return_inverse=True)
    welded = same_position.reshape(-1)[faces]
    unit, parts = _corner_parts(vertices, faces)
    # Each side of a face with the corners at its two ends, sorted so that equal edges come one after the other.
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
    # Across an edge folded little, corners at the same end join; what hangs together is one group.
    links = np.concatenate([of_corner[[first, second]] for of_corner in (low_corner, high_corner)], axis=1).T
    group = connected_component_labels(links, node_count=corner.size)
    return _normalized(_sum_by_label(group, parts, group.max() + 1))[group].reshape(-1, 3, 3)


def _nearest_of(layers: list[tuple[int, np.ndarray, np.ndarray, np.ndarray]], camera: Camera) -> GBuffer:
    """Put the layers (object, then hand) together; the later one wins where both are equally near."""
    size = camera.height * camera.width
    depth, label_map = np.full(size, np.inf), np.zeros(size, dtype=np.uint8)
    surface_normals, object_mask = np.zeros((size, 3), dtype=np.float32), np.zeros(size, dtype=bool)
    for label, pixel, layer_depth, layer_normals in layers:
        if label == OBJECT:
            object_mask[pixel] = True
        wins = layer_depth <= depth[pixel]
        pixel = pixel[wins]
        depth[pixel], label_map[pixel], surface_normals[pixel] = layer_depth[wins], label, layer_normals[wins]
    depth[label_map == BACKGROUND] = 0.0
    shape = camera.height, camera.width
    return GBuffer(
        depth.astype(np.float32).reshape(shape), label_map.reshape(shape), surface_normals.reshape(*shape, 3),
        object_mask.reshape(shape),
    )  # fmt: skip


class Renderer:
    """Draws GBuffers; remembers the corner normals of the last few objects.

    backend      "auto" (pyrender where its GL starts, otherwise numpy) or "numpy"
    .backend     the one in use, "pyrender" or "numpy"
    .reason      one line: why this one
    """

    def __init__(self, backend: str = "auto") -> None:
        started = "not asked for" if backend == "numpy" else start_pyrender()
        self.backend = "numpy" if isinstance(started, str) else "pyrender"
        self.reason = f"pyrender: {started}" if isinstance(started, str) else "pyrender's GL starts"
        self._face_map = numpy_face_map if isinstance(started, str) else started
        self._object_normals = Recent(lambda *mesh: crease_normals(*mesh).astype(np.float32), CACHED_OBJECTS)

    def __str__(self) -> str:
        return f"{self.backend} ({self.reason})"

    def render(
        self, hand_vertices: np.ndarray | None, hand_faces: np.ndarray | None, object_vertices: np.ndarray | None,
        object_faces: np.ndarray | None, camera: Camera,
    ) -> GBuffer:
        """Draw a hand, an object or both.

        hand_vertices, object_vertices  (V, 3)  metres, float64, the camera's world frame; None (with its faces) leaves
                                                it out
        hand_faces, object_faces        (F, 3)  int, counter-clockwise seen from outside; a face seen from behind (an
                                                open mesh) is drawn too, its normal turned to the camera
        """
        layers = []
        if object_vertices is not None and len(object_faces):
            normals = self._object_normals(object_vertices, object_faces)
            layers.append((OBJECT, *self._draw(object_vertices, object_faces, normals, camera)))
        if hand_vertices is not None and len(hand_faces):
            # Smooth throughout: a closing fist folds its edges, and creases would come and go between frames.
            normals = smooth_normals(hand_vertices, hand_faces)
            layers.append((HAND, *self._draw(hand_vertices, hand_faces, normals, camera)))
        return _nearest_of(layers, camera)

    def _draw(
        self, vertices: np.ndarray, faces: np.ndarray, corner_normals: np.ndarray, camera: Camera
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of the pixels that one mesh covers: flat index (N,), depth (N,), normal (N, 3) in the camera frame."""
        face_map = self._face_map(vertices, faces, camera)
        pixel, face, weights, depth, from_behind = meet_rays(face_map, vertices, faces, camera)
        normals = np.einsum("ij,ijk->ik", weights, corner_normals[face]) @ camera.world_to_camera[:3, :3].T
        return pixel, depth, _normalized(np.where(from_behind[:, None], -normals, normals))


def joints_shown(
    points: np.ndarray, label_map: np.ndarray, depth: np.ndarray | None = None, z: np.ndarray | None = None,
    flesh: float = FLESH,
) -> np.ndarray:  # fmt: skip
    """Which joints the picture shows: the hand is what is seen there, with no more than flesh before the joint.

    points     (21, 2) pixels; label_map (H, W); depth (H, W) metres, 0 = unknown; z (21,) metres, depth of the joints
    flesh      metres of hand that may lie before a joint that is shown
    returns    (21,) bool
    One pixel around is enough, since fingertips lie on the outline.  Without depth the label decides alone, so a finger
    behind another counts as seen.
    """
    height, width = label_map.shape
    # The joint's pixel and its eight neighbours.
    steps = np.stack(np.meshgrid([-1, 0, 1], [-1, 0, 1]), axis=-1).reshape(-1, 2)
    near = np.rint(points).astype(np.int64)[:, None] + steps  # (21, 9, 2)
    inside = ((near >= 0) & (near < [width, height])).all(axis=2)
    x, y = np.clip(near, 0, [width - 1, height - 1]).transpose(2, 0, 1)
    shown = inside & (label_map[y, x] == HAND)
    if depth is not None and z is not None:
        shown &= (depth[y, x] == 0) | (depth[y, x] > z[:, None] - flesh)
    return shown.any(axis=1)
