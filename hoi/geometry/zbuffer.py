"""Z-buffer in numpy: mesh, Camera -> the face seen in each pixel.  Paper: Sec. 3.2 (rendering of the grasp)."""

import numpy as np

from hoi.geometry.camera import Camera, transform_points

NEAR, FAR = 0.01, 100.0  # metres; nothing nearer or farther is seen
PIXELS_AT_ONCE = 500_000  # bounds the memory when many large faces overlap
NO_FACE = -1


def ray_weights(corners: np.ndarray, intrinsics: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
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

    The limits are the face's edges (L = 3) and, when any face passes the near plane, 1 / depth <= 1 / NEAR.
    """
    limits = functions.transpose(1, 2, 0)
    if crossing.any():
        near_plane = -functions.sum(axis=1).T
        near_plane[2] += 1.0 / NEAR
        limits = np.concatenate([limits, near_plane[None]])
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
    nearest = np.full(camera.height * camera.width, 1.0 / FAR)  # largest 1 / depth so far
    face_map = np.full(camera.height * camera.width, NO_FACE, dtype=np.int32)
    kept, top, bottom, crossing = _candidate_faces(points, faces, camera)
    functions, determinant = ray_weights(points[faces[kept]], camera.intrinsics)
    bottom = np.where(determinant == 0, top - 1, bottom)  # seen exactly from the side
    lines = _row_lines(functions, crossing)
    along_row, along_column, constant = functions.sum(axis=1).T
    # Rounding must not lift a face seen almost from the side out of its own range of depths.
    inverse = 1.0 / np.where(points[:, 2] > NEAR, points[:, 2], NEAR)
    (lowest,), (highest,) = (_over_corners(e, inverse[:, None], faces[kept]) for e in (np.minimum, np.maximum))
    lowest = np.where(crossing, 0.0, lowest)
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
