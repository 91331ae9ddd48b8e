"""Formulas on pictures, points and masks that several rooms need.  Arrays -> arrays.

Pixel centres lie at integers everywhere, so a picture of width W reaches from -0.5 to W - 0.5.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def numbers(value: Any, shape: tuple[int, ...], place: str) -> np.ndarray:
    """A float64 array of that shape; ValueError naming the place for another shape or a number that is not finite."""
    items = np.asarray(value, dtype=object)
    if items.shape != shape:
        raise ValueError(f"{place} is {items.shape}, expected {shape}")
    # numpy would take text and true for numbers, too, and whole numbers may have more digits than it has.
    plain = (float, np.ndarray)  # the second of numbers that were read one by one
    other = [x for x in items.flat if not isinstance(x, plain) and not (type(x) is int and abs(x) < 2**63)]
    if other:
        raise ValueError(f"{place} holds {other[0]!r:.40}, expected numbers")
    array = items.astype(np.float64)
    if not np.isfinite(array).all():
        raise ValueError(f"{place} holds {(~np.isfinite(array)).sum()} numbers that are not finite")
    return array


def pictures_to_tensor(pictures: np.ndarray) -> Tensor:
    """Pictures as networks take them: (..., H, W, 3) uint8 -> (..., 3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(pictures).movedim(-1, -3).float() / 127.5 - 1


def to_uint8(image: np.ndarray) -> np.ndarray:
    """A picture as a network makes it, (3, H, W) in [-1, 1] -> (H, W, 3) uint8, rounded to the nearest level."""
    return np.clip(np.rint((image.transpose(1, 2, 0) + 1) * 127.5), 0, 255).astype(np.uint8)


def resized_points(
    points: np.ndarray, size: tuple[float, float], new_size: tuple[float, float], corner: Sequence[float] = (0, 0)
) -> np.ndarray:
    """Where points of a picture lie after a box of it was cut out and resized.

    points    (..., 2) pixels
    size      of the box, height and width        new_size  of the new picture, height and width
    corner    of the box, first column and row
    returns   (..., 2) pixels of the new picture.  A resize maps areas, not centres: hence the two half pixels
    """
    factor = np.array([new_size[1] / size[1], new_size[0] / size[0]])
    return (points + 0.5 - np.asarray(corner)) * factor - 0.5


def box_of(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Tight box of a mask (H, W) bool that is not empty: left, top, right, bottom, the last two exclusive."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def box_centre(points: np.ndarray) -> np.ndarray:
    """Middle of the box around points along the axes: (N, D) -> (D,)."""
    return (points.min(axis=0) + points.max(axis=0)) / 2


def intersection_over_union(one: np.ndarray, other: np.ndarray) -> float:
    """How much two masks of one shape, bool, agree: 0 to 1, and 0 when both are empty."""
    return float((one & other).sum() / max((one | other).sum(), 1))  # 1: nothing is divided by nothing


def step(low: float, high: float, x: np.ndarray) -> np.ndarray:
    """Rise smoothly from 0 at low to 1 at high, constant beyond; low may be the larger.  "Smoothstep" of shaders."""
    t = np.clip((x - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)
