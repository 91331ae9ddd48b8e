"""hoi/verify.py: what the scores mean, and that a judge learns to see."""

import numpy as np
import pytest
import torch
from torch import nn

from hoi import verify
from hoi.appearance import PALETTE
from hoi.backgrounds import BACKGROUNDS
from hoi.conditions import Conditions, draw_segmentation
from hoi.dataset_writer import DatasetWriter, write_pictures

SIDE = 32
NAMES = sorted(BACKGROUNDS)


class Known(nn.Module):
    """A judge that reads the label map off the red channel (0, 100, 200) and always says the same background."""

    def __init__(self, background: int):
        super().__init__()
        self.said = background

    def forward(self, image):
        red = (image[:, 0] + 1) * 127.5
        labels = torch.stack([-(red - level).abs() for level in (0, 100, 200)], dim=1)
        return labels, nn.functional.one_hot(torch.full((len(image),), self.said), len(NAMES)).float()


def picture(label_map: np.ndarray, color: str) -> np.ndarray:
    image = np.zeros((*label_map.shape, 3), np.uint8)
    image[..., 0] = label_map * 100
    image[label_map == 2] = np.rint(255 * np.asarray(PALETTE[color]))
    return image


def two_halves(left: int, right: int) -> np.ndarray:
    label_map = np.zeros((SIDE, SIDE), np.uint8)
    label_map[:, : SIDE // 2], label_map[:, SIDE // 2 :] = left, right
    return label_map


def test_iou_of_masks_counted_by_hand():
    a, b = np.array([1, 1, 1, 0, 0], bool), np.array([0, 1, 1, 1, 0], bool)
    assert verify.intersection_over_union(a, b) == 2 / 4
    assert verify.intersection_over_union(~(a | ~a), ~(a | ~a)) == 1.0
    assert verify.intersection_over_union(a, ~a) == 0.0


def test_scores_of_pictures_known_by_hand():
    # A hand on the left half, nothing else; the picture shows it in the left three quarters.
    shown = two_halves(1, 0)
    shown[:, : 3 * SIDE // 4] = 1
    scores, rows = verify.score(
        Known(NAMES.index("on the beach")),
        NAMES,
        np.stack([picture(shown, "red")]),
        np.stack([two_halves(1, 0)]),
        ["A hand is grasping a red mug on the beach"],
    )
    assert rows[0]["iou_hand"] == rows[0]["iou_foreground"] == 2 / 3
    assert scores.background_right == 1.0 and scores.color_right is None  # there is no object to have a colour


@pytest.mark.parametrize("named, right", [("green", 1.0), ("red", 0.0)])
def test_a_colour_is_right_when_the_object_has_the_palette_colour_that_the_caption_names(named, right):
    label_map = two_halves(0, 2)
    scores, _ = verify.score(
        Known(0), NAMES, picture(label_map, "green")[None], label_map[None], [f"A hand is grasping a {named} mug"]
    )
    assert scores.color_right == right and scores.background_right is None


def test_the_label_map_is_read_back_from_the_segmentation_picture():
    label_map = np.arange(9, dtype=np.uint8).reshape(3, 3) % 3
    np.testing.assert_array_equal(verify.label_map_of(draw_segmentation(label_map)), label_map)


def make_folder(folder, count: int, generated: bool, seed: int = 0) -> None:
    """Pictures of a bright square (the object) at a random place, with exact segmentation."""
    writer = DatasetWriter(folder, {"command": "test"})
    for index in range(count):
        generator = np.random.default_rng([seed, index])
        label_map = np.zeros((SIDE, SIDE), np.uint8)
        top, left = generator.integers(0, SIDE - 12, 2)
        label_map[top : top + 12, left : left + 12] = 2
        image = generator.integers(0, 60, (SIDE, SIDE, 3)).astype(np.uint8)
        image[label_map == 2] += 180
        black = np.zeros((SIDE, SIDE, 3), np.uint8)
        record = {"text": "A hand is grasping a white mug on the beach"}
        if generated:
            record["checkpoint"] = {"name": "x", "sha256": "0"}
        conditions = Conditions(black, black, draw_segmentation(label_map))
        writer.append(write_pictures(folder, index, record, image, conditions))
    writer.finish(grid=False)


def test_a_trained_judge_finds_what_it_was_shown_and_survives_its_file(tmp_path):
    make_folder(tmp_path / "train", 48, generated=False)
    make_folder(tmp_path / "shaded", 8, generated=False, seed=1)
    make_folder(tmp_path / "generated", 8, generated=True, seed=1)
    verify.save_judge(tmp_path / "judge.safetensors", *verify.train_judge([tmp_path / "train"], minutes=0.1, seed=0))
    rows = verify.measure(tmp_path / "judge.safetensors", tmp_path / "shaded", tmp_path / "generated")
    assert rows["shaded"].iou_object > 0.8
    assert rows["generated"] == rows["shaded"]  # the same pictures
    assert rows["shuffled"].iou_object < 0.5 * rows["shaded"].iou_object
    assert "| generated / shaded | | 1.000" in verify.as_table(rows)


def test_the_judge_refuses_to_learn_from_generated_pictures(tmp_path):
    make_folder(tmp_path / "generated", 3, generated=True)
    with pytest.raises(ValueError, match="3 pictures .* are generated; the judge learns from shaded ones"):
        verify.train_judge([tmp_path / "generated"], minutes=0.01, seed=0)


def test_folders_of_different_captions_are_not_compared(tmp_path):
    make_folder(tmp_path / "shaded", 3, generated=False)
    make_folder(tmp_path / "generated", 2, generated=True)
    verify.save_judge(tmp_path / "judge.safetensors", verify.Judge(len(NAMES)), NAMES)
    with pytest.raises(ValueError, match="does not hold the captions"):
        verify.measure(tmp_path / "judge.safetensors", tmp_path / "shaded", tmp_path / "generated")
