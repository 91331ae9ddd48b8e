"""Similarity between two sets of corresponding points.  (N, 3) -> (N, 3): scale, rotation, translation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Similarity:
    """x -> scale * rotation @ x + translation."""

    scale: float
    rotation: np.ndarray
    translation: np.ndarray

    def __call__(self, points: np.ndarray) -> np.ndarray:
        """(N, 3) -> (N, 3)"""
        return self.scale * points @ self.rotation.T + self.translation


def umeyama(source: np.ndarray, target: np.ndarray) -> Similarity:
    """The similarity (never a reflection) that takes source (N, 3) to target (N, 3) with the least squared error.

    Raises ValueError for points on a line or fewer than three, which fix no rotation, and for numbers not finite.
    Source: Umeyama 1991, eq. 40 to 43.
    """
    if source.shape != target.shape or source.ndim != 2 or source.shape[1] != 3:
        raise ValueError(f"source is {source.shape}, target {target.shape}; expected the same (N, 3) of both")
    if not (np.isfinite(source).all() and np.isfinite(target).all()):
        raise ValueError("points to be aligned are not finite")
    centred_source, centred_target = source - source.mean(axis=0), target - target.mean(axis=0)
    u, singular, vt = np.linalg.svd(centred_target.T @ centred_source / len(source))
    if singular[1] <= 1e-9 * max(singular[0], 1e-300) or singular[0] == 0:
        raise ValueError("points on a line or in one place have no rotation; at least three others are needed")
    signs = np.array([1.0, 1.0, np.sign(np.linalg.det(u) * np.linalg.det(vt))])
    rotation = u * signs @ vt
    scale = float(singular @ signs / (centred_source**2).sum(axis=1).mean())
    return Similarity(scale, rotation, target.mean(axis=0) - scale * rotation @ source.mean(axis=0))
