"""Mend triangle meshes as far as numpy can.  Triangle soup -> merged, outward faces, and sentences about the rest."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

GRID_BITS = 21  # positions are compared on a grid of 2**21 cells a side: three of them fit one 64-bit key


def clean_mesh(vertices: np.ndarray, faces: np.ndarray, path: Path) -> tuple[np.ndarray, np.ndarray, list[str], bool]:
    """Merge vertices by position, drop faces that are none, turn the surface outwards.

    vertices (V, 3), faces (F, 3)
    returns  vertices, faces, notes, watertight
    Raises ValueError when no face is left; `path` is for its message.
    """
    notes = []
    given = len(faces)
    vertices, faces = merge_vertices(vertices, faces)
    distinct = (faces != np.roll(faces, 1, axis=1)).all(axis=1)
    faces = faces[distinct]
    before = len(faces)
    faces = _drop_duplicates(faces)
    duplicates = before - len(faces)
    faces, slivers = _drop_slivers(vertices, faces)
    if len(faces) == 0:
        raise ValueError(f"{path}: none of its {given} faces has an area; expected a surface mesh")
    if given - distinct.sum() + slivers:
        notes.append(f"Removed {given - distinct.sum() + slivers} faces without area.")
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


def merge_vertices(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One vertex per position (STL repeats them for every face, textures along their seams); order is kept."""
    low, extent = vertices.min(axis=0), np.ptp(vertices, axis=0).max()
    cell = np.round((vertices - low) / extent * (2**GRID_BITS - 1)).astype(np.int64)
    key = (cell[:, 0] << 2 * GRID_BITS) | (cell[:, 1] << GRID_BITS) | cell[:, 2]
    _, first, inverse = np.unique(key, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return vertices[first[order]], rank[inverse.reshape(-1)][faces]


def drop_unused(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Vertices that no face names would only disturb boxes and nearest-point searches."""
    used = np.zeros(len(vertices), dtype=bool)
    used[faces] = True
    return vertices[used], (np.cumsum(used) - 1)[faces]


def edge_faults(faces: np.ndarray) -> tuple[int, int]:
    """Numbers of edges with one face (open) and with more than two (non-manifold)."""
    counts = np.unique(_edge_keys(faces), return_counts=True)[1]
    return int((counts == 1).sum()), int((counts > 2).sum())


def signed_volume(vertices: np.ndarray, faces: np.ndarray) -> float:
    """Positive when faces are counter-clockwise from outside; about the centroid, for the sake of open meshes."""
    a, b, c = np.moveaxis((vertices - vertices.mean(axis=0))[faces], 1, 0)
    return float(np.einsum("ij,ij->", a, np.cross(b, c)) / 6.0)


def wind_outwards(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, int]:
    """Make neighbours agree where some do not, then turn an inside-out surface; also says how many were turned."""
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


def _disagreeing(faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which faces to turn so that neighbours agree (F,), and the connected piece of every face (F,).

    Each face is two nodes, as it is and turned.  Neighbours that traverse their common edge in opposite directions
    agree: as-is joins as-is.  Otherwise as-is joins turned.  The two halves of every piece are its two windings.
    """
    count = len(faces)
    keys, face = _edge_keys(faces), np.tile(np.arange(count), 3)
    forward = np.concatenate([faces[:, k] < faces[:, (k + 1) % 3] for k in range(3)])
    order = np.argsort(keys, kind="stable")
    same = keys[order][1:] == keys[order][:-1]
    pair = np.flatnonzero(same & ~np.append(False, same[:-1]) & ~np.append(same[1:], False))  # exactly two faces
    first, second = order[pair], order[pair + 1]
    agree = forward[first] != forward[second]
    partner = np.where(agree, face[second], face[second] + count)
    mirror = np.where(agree, face[second] + count, face[second])
    rows, columns = np.concatenate([face[first], face[first] + count]), np.concatenate([partner, mirror])
    graph = coo_matrix((np.ones(len(rows), dtype=np.int8), (rows, columns)), shape=(2 * count, 2 * count))
    label = connected_components(graph, directed=False)[1]
    as_is, turned = label[:count], label[count:]
    piece = np.minimum(as_is, turned)
    turn = as_is > turned
    # Turn the smaller part of each piece; a one-sided surface (as_is == turned) cannot agree and is left alone.
    size, wrong = np.bincount(piece, minlength=label.max() + 1), np.bincount(piece, turn, minlength=label.max() + 1)
    return np.where(wrong[piece] * 2 > size[piece], ~turn, turn) & (as_is != turned), piece


def _drop_slivers(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, int]:
    """Remove faces with three positions on one line, unless they keep the surface closed."""
    a, b, c = np.moveaxis(vertices[faces], 1, 0)
    doubled_area = np.linalg.norm(np.cross(b - a, c - a), axis=1)
    longest = np.maximum(np.linalg.norm(b - a, axis=1), np.linalg.norm(c - a, axis=1))
    solid = doubled_area > 1e-9 * longest**2
    if solid.all() or (sum(edge_faults(faces)) == 0 and sum(edge_faults(faces[solid])) > 0):
        return faces, 0
    return faces[solid], int((~solid).sum())


def _edge_keys(faces: np.ndarray) -> np.ndarray:
    """One integer per side of every face (3F,), equal for the two directions."""
    low = np.concatenate([np.minimum(faces[:, k], faces[:, (k + 1) % 3]) for k in range(3)])
    high = np.concatenate([np.maximum(faces[:, k], faces[:, (k + 1) % 3]) for k in range(3)])
    return low * (faces.max(initial=0) + 1) + high


def _drop_duplicates(faces: np.ndarray) -> np.ndarray:
    """Keep one of several faces on the same vertices, and none of a few stray pairs back to back.

    A pair back to back is a fin without volume on an otherwise closed scan: with one side gone the scan would be open.
    Where more than one face in a hundred has such a twin, a two-sided sheet is meant, and one side of it stays.
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
    return faces[keep[~stray[keep]]] if stray.mean() < 0.01 else faces[keep]
