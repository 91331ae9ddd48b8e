"""Faults of hands, painted into pictures.  Picture + label map + fingertips -> the same with a finger wrong.

Generated hands lose, gain and fuse fingers.  A verifier that has only seen right hands overlooks it, so that it is
trained on pictures with such faults painted in (hoi/verify/training.py), and tried on them (tools/planted_faults.py).
"""

from dataclasses import dataclass, replace

import numpy as np
from scipy import ndimage

from hoi.geometry.hand import TIP_KEYPOINTS
from hoi.geometry.render import HAND

RADIUS = 0.055  # of a finger, over the longer side of the box around the hand's joints: 9 mm of 165
MOST_TIPS = 6  # five, and an added one
TRIES = 30  # places that are tried for an added finger


@dataclass(frozen=True)
class Fingers:
    """A picture and the fingertips that it shows.

    image   (H, W, 3) uint8;  labels  (H, W) 0/1/2
    points  (21, 2) pixels, NaN where there is no joint (any more)
    tips    (6, 2) pixels, NaN where there is none: those of the five fingers that can be seen, and an added one
    """

    image: np.ndarray
    labels: np.ndarray
    points: np.ndarray
    tips: np.ndarray

    @property
    def radius(self) -> float:
        """Of a finger, pixels."""
        return RADIUS * float(np.nanmax(np.nanmax(self.points, axis=0) - np.nanmin(self.points, axis=0)))

    @property
    def seen(self) -> list[int]:
        """Fingers, thumb first, whose tip and last joint are known and seen."""
        bent = self.points[np.array(TIP_KEYPOINTS) - 1]
        return [k for k in range(len(bent)) if np.isfinite([self.tips[k], bent[k]]).all()]

    def end(self, finger: int) -> tuple[np.ndarray, np.ndarray]:
        """Last joint and tip of a finger, pixels."""
        return self.points[TIP_KEYPOINTS[finger] - 1], self.tips[finger]


def capsule(labels: np.ndarray, start: np.ndarray, end: np.ndarray, radius: float) -> np.ndarray:
    """Mask (H, W) of what lies within a radius of the line from start to end, (2,) pixels each."""
    y, x = np.indices(labels.shape)
    away, along = np.stack([x, y], axis=-1) - start, end - start
    share = np.clip(away @ along / max(float(along @ along), 1e-9), 0, 1)
    return np.hypot(*np.moveaxis(away - share[..., None] * along, -1, 0)) < radius


def filled_from_around(picture: Fingers, mask: np.ndarray) -> Fingers:
    """What is not hand grows into a mask (H, W): its nearest pixels' colours, softened, and labels."""
    hand = picture.labels == HAND
    if hand.all():
        return picture
    rows, columns = ndimage.distance_transform_edt(hand | mask, return_distances=False, return_indices=True)
    grown = picture.image[rows, columns]
    soft = ndimage.gaussian_filter(grown.astype(np.float32), (1.2, 1.2, 0))  # or the streaks would tell of it
    image = np.where(mask[..., None], soft + 0.5, picture.image).astype(np.uint8)
    return replace(picture, image=image, labels=np.where(mask, picture.labels[rows, columns], picture.labels))


def erase_tip(picture: Fingers, generator: np.random.Generator) -> Fingers | None:
    """A finger ends at its last joint.  None where no tip is seen."""
    if not picture.seen:
        return None
    finger = generator.choice(picture.seen)
    joint, tip = picture.end(finger)
    mask = capsule(picture.labels, joint + 0.3 * (tip - joint), tip, 1.25 * picture.radius) & (picture.labels == HAND)
    points, tips = picture.points.copy(), picture.tips.copy()
    points[TIP_KEYPOINTS[finger]] = tips[finger] = np.nan
    return replace(filled_from_around(picture, mask), points=points, tips=tips)


def add_tip(picture: Fingers, generator: np.random.Generator) -> Fingers | None:
    """A copy of a finger's end grows from another place of the hand's edge.  None where there is no room for it."""
    if not picture.seen:
        return None
    labels, hand, radius = picture.labels, picture.labels == HAND, picture.radius
    joint, tip = picture.end(generator.choice(picture.seen))
    edge = np.argwhere(hand & ~ndimage.binary_erosion(hand, iterations=2))[:, ::-1]
    others = picture.tips[np.isfinite(picture.tips[:, 0])]
    for root in edge[generator.integers(len(edge), size=TRIES)]:
        shift = np.rint(root - joint).astype(int)
        new_tip = tip + shift
        x, y = np.rint(new_tip).astype(int)
        inside = 0 <= x < labels.shape[1] and 0 <= y < labels.shape[0]
        if inside and labels[y, x] != HAND and np.linalg.norm(others - new_tip, axis=1).min() > 3 * radius:
            break
    else:
        return None
    end = (capsule(labels, joint, tip, 1.15 * radius) & hand).astype(np.uint8)
    new = ndimage.shift(end, shift[::-1], order=0) > 0
    image = np.where(new[..., None], ndimage.shift(picture.image, (*shift[::-1], 0), order=0), picture.image)
    tips = np.concatenate([picture.tips[:-1], [new_tip]])
    return replace(picture, image=image, labels=np.where(new, HAND, labels).astype(np.uint8), tips=tips)


def fuse_tips(picture: Fingers, generator: np.random.Generator) -> Fingers | None:
    """Two neighbouring fingers end as one.  None where no two are near each other."""
    seen, radius = picture.seen, picture.radius
    pairs = [(a, b) for a, b in zip(seen, seen[1:], strict=False)
             if b == a + 1 and np.linalg.norm(picture.tips[a] - picture.tips[b]) < 6 * radius]  # fmt: skip
    if not pairs:
        return None
    first, second = pairs[generator.integers(len(pairs))]
    (joint, tip), (joint_2, tip_2) = picture.end(first), picture.end(second)
    shares = np.linspace(0, 1, 6)[:, None]
    between = zip(joint + shares * (joint_2 - joint), tip + shares * (tip_2 - tip), strict=True)
    mask = np.any([capsule(picture.labels, *ends, radius) for ends in between], axis=0)
    # Skin of both fingers, smeared until no gap shows.
    skin = (mask & (picture.labels == HAND)).astype(np.float32)
    blurred = ndimage.gaussian_filter(picture.image * skin[..., None], (radius, radius, 0))
    smeared = blurred / np.maximum(ndimage.gaussian_filter(skin, radius), 1e-3)[..., None]
    points, tips = picture.points.copy(), picture.tips.copy()
    points[[TIP_KEYPOINTS[first], TIP_KEYPOINTS[second]]] = np.nan
    tips[first], tips[second] = (tip + tip_2) / 2, np.nan
    image = np.where(mask[..., None], np.clip(smeared, 0, 255), picture.image).astype(np.uint8)
    return replace(picture, image=image, labels=np.where(mask, HAND, picture.labels).astype(np.uint8),
                   points=points, tips=tips)  # fmt: skip


FAULTS = {"erased": erase_tip, "added": add_tip, "fused": fuse_tips}


def with_fault(picture: Fingers, generator: np.random.Generator) -> Fingers:
    """One of FAULTS, or the picture as it is where that cannot be painted."""
    paint = list(FAULTS.values())[generator.integers(len(FAULTS))]
    return (picture.labels == HAND).any() and paint(picture, generator) or picture
