"""Turned and swept solids.  Profile or path -> closed triangle mesh, faces outward, metres.

A profile is (N, 2) points (radius, height) that run from the axis at the bottom along the outside and back to the axis.
"""

from __future__ import annotations

import numpy as np
from scipy.interpolate import PchipInterpolator

Mesh = tuple[np.ndarray, np.ndarray]  # vertices (V, 3) metres, faces (F, 3)
SECTIONS = 48  # steps around the axis
TUBE_SECTIONS = 14  # steps around a handle


def fillet(points: list[tuple[float, float]], radii: list[float], steps: int = 4) -> np.ndarray:
    """Round the inner corners of a polyline.

    points (N, 2), radii (N,) metres, ignored at both ends and shortened where the sides are too short
    returns (M, 2), each rounded corner as steps + 1 points on a tangent arc
    """
    corners = np.asarray(points, dtype=np.float64)
    result = [corners[:1]]
    for previous, corner, following, radius in zip(corners, corners[1:], corners[2:], radii[1:], strict=False):
        back, ahead = previous - corner, following - corner
        back_length, ahead_length = np.linalg.norm(back), np.linalg.norm(ahead)
        back, ahead = back / back_length, ahead / ahead_length
        half = np.arccos(np.clip(back @ ahead, -1.0, 1.0)) / 2.0
        cut = min(radius / np.tan(half), 0.45 * back_length, 0.45 * ahead_length)
        if radius <= 0.0 or half > 1.56:
            result.append(corner[None])
            continue
        centre = corner + (back + ahead) / np.linalg.norm(back + ahead) * cut / np.cos(half)
        start, end = corner + cut * back - centre, corner + cut * ahead - centre
        sweep = np.pi - 2.0 * half
        turn = np.linspace(0.0, 1.0, steps + 1)[:, None]
        result.append(centre + (np.sin((1 - turn) * sweep) * start + np.sin(turn * sweep) * end) / np.sin(sweep))
    return np.concatenate([*result, corners[-1:]])


def resample(profile: np.ndarray, longest: float) -> np.ndarray:
    """Split segments longer than `longest` (metres); shorter ones and all corners stay."""
    pieces = [profile[:1]]
    for start, end in zip(profile, profile[1:], strict=False):
        count = max(1, int(np.ceil(np.linalg.norm(end - start) / longest)))
        pieces.append(start + np.linspace(0.0, 1.0, count + 1)[1:, None] * (end - start))
    return np.concatenate(pieces)


def smooth_side(knots: list[tuple[float, float]], count: int) -> np.ndarray:
    """Smooth radius over height through knots (height fraction order), (count, 2)."""
    radius, height = np.asarray(knots).T
    z = np.linspace(height[0], height[-1], count)
    return np.stack([PchipInterpolator(height, radius)(z), z], axis=1)


def bezier(control: list[tuple[float, float]], count: int) -> np.ndarray:
    """Cubic Bezier curve, (count, 2)."""
    a, b, c, d = np.asarray(control, dtype=np.float64)
    t = np.linspace(0.0, 1.0, count)[:, None]
    return (1 - t) ** 3 * a + 3 * t * (1 - t) ** 2 * b + 3 * t**2 * (1 - t) * c + t**3 * d


def inner_side(outer: np.ndarray, wall: float) -> np.ndarray:
    """The outer side of a vessel moved inwards by the wall's thickness; same order, base to rim."""
    tangent = np.gradient(outer, axis=0)
    tangent /= np.linalg.norm(tangent, axis=1, keepdims=True)
    return outer + wall * np.stack([-tangent[:, 1], tangent[:, 0]], axis=1)


def rim(outer: np.ndarray, inner: np.ndarray, steps: int = 5) -> np.ndarray:
    """Half circle over the top, from the outer side's last point to the inner side's last point, ends excluded."""
    middle, arm = (outer + inner) / 2.0, (outer - inner) / 2.0
    up = np.array([-arm[1], arm[0]])
    angle = np.linspace(0.0, np.pi, steps + 2)[1:-1, None]
    return middle + np.cos(angle) * arm + np.sin(angle) * up


def revolve(profile: np.ndarray, sections: int = SECTIONS) -> Mesh:
    """Turn a profile that begins and ends on the axis into a closed mesh, faces outward."""
    rings = profile[1:-1]
    angle = 2.0 * np.pi * np.arange(sections) / sections
    circle = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    side = np.empty((len(rings), sections, 3))
    side[..., :2], side[..., 2] = rings[:, None, :1] * circle, rings[:, None, 1]
    poles = np.array([[0.0, 0.0, profile[0, 1]], [0.0, 0.0, profile[-1, 1]]])
    return np.concatenate([side.reshape(-1, 3), poles]), tube_faces(len(rings), sections)


def tube_faces(rings: int, sections: int) -> np.ndarray:
    """Faces of `rings` closed rings in a row, then one pole vertex for the first ring and one for the last."""
    ring, step = np.meshgrid(np.arange(rings - 1), np.arange(sections), indexing="ij")
    a, b = ring * sections + step, ring * sections + (step + 1) % sections
    quads = np.concatenate([np.stack([a, b, b + sections], -1), np.stack([a, b + sections, a + sections], -1)])
    first, following = np.arange(sections), (np.arange(sections) + 1) % sections
    last = (rings - 1) * sections
    bottom = np.stack([following, first, np.full(sections, rings * sections)], axis=1)
    top = np.stack([last + first, last + following, np.full(sections, rings * sections + 1)], axis=1)
    return np.concatenate([quads.reshape(-1, 3), bottom, top])


def sweep(path: np.ndarray, half_widths: np.ndarray, sections: int = TUBE_SECTIONS) -> Mesh:
    """A closed tube with an elliptic section along a path in the plane y = 0.

    path (N, 3); half_widths (N, 2) along y and across the path within the plane, metres
    """
    tangent = np.gradient(path, axis=0)
    tangent /= np.linalg.norm(tangent, axis=1, keepdims=True)
    across = np.cross(tangent, np.array([0.0, 1.0, 0.0]))
    angle = 2.0 * np.pi * np.arange(sections) / sections
    rings = (path[:, None]
             + (half_widths[:, :1] * np.cos(angle))[..., None] * np.array([0.0, 1.0, 0.0])
             + (half_widths[:, 1:] * np.sin(angle))[..., None] * across[:, None])
    return np.concatenate([rings.reshape(-1, 3), path[[0, -1]]]), tube_faces(len(path), sections)


def join(*meshes: Mesh) -> Mesh:
    """Several closed bodies as one mesh."""
    offsets = np.cumsum([0] + [len(vertices) for vertices, _ in meshes])
    faces = [faces + offset for (_, faces), offset in zip(meshes, offsets, strict=False)]
    return np.concatenate([vertices for vertices, _ in meshes]), np.concatenate(faces)
