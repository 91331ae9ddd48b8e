"""Small dataset folders for the tests of the verifier: a hand is a square whose colours say where on it one is."""

from pathlib import Path

import numpy as np

from hoi.conditions import Conditions, draw_segmentation
from hoi.data.writer import DatasetWriter, write_pictures

SIDE = 32
HAND_SIDE, OBJECT_SIDE = 14, 6
# 7 x 3 places on the hand, from its corner.
JOINT_PLACES = np.stack(np.meshgrid([2.0, 6.5, 11.0], np.arange(0.5, 14, 2)), axis=-1).reshape(21, 2)
TEXT = "A hand is grasping a blue mug on the beach"


def draw(generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Picture (32, 32, 3), label map, keypoints (21, 2): a hand anywhere on noise, a blue object beside it."""
    image = generator.integers(0, 40, (SIDE, SIDE, 3)).astype(np.uint8)
    label_map = np.zeros((SIDE, SIDE), np.uint8)
    left, top = generator.integers(0, SIDE - HAND_SIDE, 2)
    corner = 0 if left > SIDE // 2 - HAND_SIDE // 2 else SIDE - OBJECT_SIDE
    label_map[corner : corner + OBJECT_SIDE, corner : corner + OBJECT_SIDE] = 2
    image[label_map == 2] = (36, 74, 191)
    along = np.linspace(60, 255, HAND_SIDE).astype(np.uint8)
    here = np.s_[top : top + HAND_SIDE, left : left + HAND_SIDE]
    image[(*here, 0)], image[(*here, 1)], image[(*here, 2)] = along[None], along[:, None], 120
    label_map[here] = 1
    return image, label_map, JOINT_PLACES + [left, top]


def make_folder(folder: Path, count: int, seed: int = 0, text: str = TEXT, **record: object) -> Path:
    """A dataset folder of such pictures, of a network that needs no more than pictures, labels and keypoints."""
    writer = DatasetWriter(folder, {"command": "test", "job": {"seed": seed}})
    for index in range(count):
        image, label_map, points = draw(np.random.default_rng([seed, index]))
        black = np.zeros((SIDE, SIDE, 3), np.uint8)
        full = {"text": text, "keypoints_2d": points.ravel(), **record}
        conditions = Conditions(skeleton=black, normal=black, segmentation=draw_segmentation(label_map))
        writer.append(write_pictures(folder, index, full, image, conditions))
    writer.finish(grid=False)
    return folder
