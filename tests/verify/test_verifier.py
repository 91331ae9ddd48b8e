"""The verifier and its training: heat maps are exact, moved pictures keep their truth, and the network learns."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from verifier_world import SIDE, draw, make_folder

from hoi.data.folder import load_image, read_records
from hoi.data.writer import DatasetWriter, write_pictures
from hoi.toyworld.backgrounds import BACKGROUNDS
from hoi.verify import training, verifier
from hoi.verify.scores import Estimators, load_truth
from tools.measure_generated import mean_scores


def gaussian_logits(points: np.ndarray, height: int, width: int, spread: float) -> torch.Tensor:
    """(1, N, height, width), each a Gaussian round one of the points (N, 2), written out cell by cell."""
    y, x = np.mgrid[:height, :width]
    squares = (x - points[:, 0, None, None]) ** 2 + (y - points[:, 1, None, None]) ** 2
    return torch.from_numpy(-squares / (2 * spread**2))[None]


def test_a_drawn_gaussian_is_found_between_the_cells_exactly():
    points = np.random.default_rng(0).uniform(4, 15, (21, 2))
    logits = gaussian_logits(points, 20, 24, 1.5)
    found, confidence = verifier.decode_heat(logits)
    np.testing.assert_allclose(found[0], points, atol=1e-9)
    for heat, point, sure in zip(logits[0].exp().numpy(), points, confidence[0], strict=True):
        x, y = np.rint(point).astype(int)
        near = heat[max(y - 3, 0) : y + 4, max(x - 3, 0) : x + 4].sum()
        assert float(sure) == pytest.approx(near / heat.sum(), abs=1e-9)
        assert 0.95 < sure < 1


def test_level_heat_is_no_confidence_and_a_peak_in_the_corner_stays_there():
    logits = torch.zeros(1, 21, 16, 16)
    assert verifier.decode_heat(logits)[1].max() <= 49 / 256
    logits[..., 0, 0] = 9.0
    assert verifier.decode_heat(logits)[0].abs().max() == 0


def test_a_map_of_fingertips_is_read_as_it_was_drawn():
    tips = torch.full((2, 6, 2), torch.nan)
    tips[0, :3] = torch.tensor([[10.5, 20.5], [18.5, 20.5], [40.5, 2.5]])  # centres of cells, four cells apart
    bumps, _ = training.gaussians(verifier.pixels_to_cells(tips), 32, 32, training.TIP_SPREAD)
    logits = torch.where(bumps.isnan(), 0.0, bumps).amax(1, keepdim=True).clamp(1e-4, 1 - 1e-4).logit()
    first, second = map(verifier.cells_to_pixels, verifier.decode_tips(logits))
    assert sorted(first.tolist()) == sorted(tips[0, :3].tolist()) and len(second) == 0
    right = training.tip_loss(logits, tips)
    for wrong in (logits.flip(2), torch.full_like(logits, -9.0), torch.full_like(logits, 9.0)):
        assert training.tip_loss(wrong, tips) > 20 * right


def test_targets_decode_to_the_keypoints_that_they_were_made_of():
    points = torch.from_numpy(np.random.default_rng(1).uniform(8, 54, (2, 21, 2))).float()
    targets, known = training.heat_targets(points, torch.ones(2, 64, 64), 32, 32)
    found, _ = verifier.decode_heat(targets.clamp_min(1e-30).log())
    assert known.all()
    torch.testing.assert_close(verifier.cells_to_pixels(found), points, atol=1e-3, rtol=0)


def test_a_moved_picture_takes_its_labels_and_keypoints_along():
    y, x = np.mgrid[:64, :64]
    points = np.random.default_rng(2).uniform(22, 42, (24, 1, 2))
    blobs = np.exp(-((x - points[..., :1]) ** 2 + (y - points[..., 1:]) ** 2) / 18)
    labels = torch.from_numpy((blobs > 0.5).astype(np.uint8))
    image = torch.from_numpy(blobs).float()[:, None].expand(-1, 3, -1, -1)
    generator = torch.Generator().manual_seed(0)
    moved = training.move(image, labels, torch.from_numpy(points).float(), generator)
    for weights in (moved["image"][:, 0], moved["labels"].float()):
        total = weights.sum((1, 2))
        centre = torch.stack([(weights * torch.from_numpy(axis)).sum((1, 2)) / total for axis in (x, y)], dim=1)
        assert (centre - moved["points"][:, 0]).norm(dim=1).max() < 0.5
    mirrored = (moved["points"] - 31.5).sign()[..., 0] != (torch.from_numpy(points) - 31.5).sign()[..., 0]
    assert 0.2 < mirrored.float().mean() < 0.8


def empty_outputs(count: int) -> verifier.Outputs:
    half = SIDE // 2
    shapes = ((count, 3, SIDE, SIDE), (count, 21, half, half), (count, len(BACKGROUNDS)), (count, 4),
              (count, 1, half, half), (count, 7))  # fmt: skip
    return verifier.Outputs(*(torch.zeros(shape, requires_grad=True) for shape in shapes))


def test_a_record_teaches_only_what_it_has():
    hand = torch.ones(1, SIDE, SIDE, dtype=torch.uint8)
    nobody_knows, no_points = torch.full_like(hand, training.UNKNOWN), torch.full((1, 27, 2), torch.nan)
    inside_and_out = torch.full((1, 27, 2), 10.0)
    inside_and_out[0, 5:] = -4.0
    unnamed = torch.tensor([-1])
    for labels, points, taught in (
        (hand, no_points, {"labels"}),
        (nobody_knows, no_points, set()),
        (torch.zeros_like(hand), no_points, {"labels", "heat", "tips"}),  # no hand: level heat, no fingertip
        (hand, inside_and_out, {"labels", "heat", "tips"}),
        (nobody_knows, inside_and_out, {"heat"}),
    ):
        outputs = empty_outputs(1)
        outputs.heat.data += torch.randn(outputs.heat.shape, generator=torch.Generator().manual_seed(0))
        batch = {"labels": labels, "points": points, "background": unnamed, "material": unnamed}
        training.verifier_loss(outputs, batch).backward()
        gradients = {name: getattr(outputs, name).grad for name in ("labels", "heat", "tips", "background", "material")}
        assert {name for name, g in gradients.items() if g is not None and g.abs().sum() > 0} == taught
    assert (gradients["heat"][0, :5].abs().sum() > 0) and gradients["heat"][0, 5:].abs().sum() == 0


def test_a_folder_without_any_3d_annotation_or_conditions_can_be_learned_from(tmp_path):
    make_folder(tmp_path / "csv", 1, keypoints_2d=None)
    writer = DatasetWriter(tmp_path / "scenery", {"command": "test"})
    writer.append(write_pictures(tmp_path / "scenery", 0, {"text": "the sea"}, np.full((64, 48, 3), 7, np.uint8)))
    writer.finish(grid=False)
    training_set = training.VerifierTrainingSet([tmp_path / "csv", tmp_path / "scenery"], SIDE)
    generator = torch.Generator().manual_seed(0)
    batch = training.augment(training_set.read([0, 1], [0, 1]), generator)
    assert batch["image"].shape == (2, 3, SIDE, SIDE) and batch["points"].isnan().all()
    assert set(batch["labels"][0].unique().tolist()) == {0, 1, 2} and batch["labels"][1].max() == 0
    assert sorted(BACKGROUNDS)[batch["background"][0]] == "on the beach"


def test_pictures_are_seen_where_the_verifier_is_and_brought_back():
    elsewhere = verifier.load_verifier().to("meta")  # a device without numbers: they are missed when they come back
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        verifier.predict(elsewhere, [np.zeros((40, 40, 3), dtype=np.uint8)])


def test_the_verifier_refuses_to_learn_from_generated_pictures_and_from_nothing(tmp_path):
    make_folder(tmp_path / "generated", 3, checkpoint={"name": "x", "sha256": "0"})
    with pytest.raises(ValueError, match="generated: 3 pictures .first images/000000.png. are generated; .* shaded or"):
        training.VerifierTrainingSet([tmp_path / "generated"], SIDE)
    assert len(training.VerifierTrainingSet([tmp_path / "generated"], SIDE, allow_generated=True).entries) == 3
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "metadata.jsonl").write_text("")
    with pytest.raises(ValueError, match="empty holds no records"):
        training.VerifierTrainingSet([tmp_path / "empty"], SIDE)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> verifier.Verifier:
    """After a few seconds of training, and through its file."""
    folder = tmp_path_factory.mktemp("verifier")
    pictures = make_folder(folder / "train", 96)
    made = training.train_verifier([pictures], np.linspace(0, 1, 150), seed=0, side=SIDE, batch_size=16)
    verifier.save_verifier(folder / "v.safetensors", made)
    assert (folder / "v.safetensors").stat().st_size < 3e6
    return verifier.load_verifier(folder / "v.safetensors")


def test_training_goes_on_from_another_verifier_of_the_same_words(trained, tmp_path):
    pictures = make_folder(tmp_path / "new", 20)
    same = training.train_verifier([pictures], [], seed=3, side=SIDE, start=trained)
    for name, weights in trained.state_dict().items():
        assert torch.equal(same.state_dict()[name], weights)
    with pytest.raises(ValueError, match=f"the verifier to go on from sees {SIDE} pixels, or other words"):
        training.train_verifier([pictures], [], seed=3, side=2 * SIDE, start=trained)


@pytest.mark.parametrize("factor", [1, 4])
def test_a_trained_verifier_finds_hand_object_and_joints_in_new_pictures_of_any_size(trained, tmp_path, factor):
    folder = make_folder(tmp_path / "new", 16, seed=1)
    rows = []
    for record in read_records(folder):
        truth, image = load_truth(folder, record), load_image(folder, record)
        seen = verifier.predict(trained, [image.repeat(factor, 0).repeat(factor, 1)])[0]
        points = (seen.keypoints_2d + 0.5) / factor - 0.5
        small = replace(seen, label_map=seen.label_map[::factor, ::factor], keypoints_2d=points)
        assert seen.label_map.shape == (SIDE * factor, SIDE * factor)
        rows.append(Estimators(trained).score(record["file_name"], image, truth, small))
    means = mean_scores(rows, ("iou_hand", "iou_object", "pck", "keypoint_error_px"))
    assert means["iou_hand"] > 0.8 and means["iou_object"] > 0.6
    assert means["pck"] > 0.9 and means["keypoint_error_px"] < 2.0  # the hand is 14 pixels wide


def test_a_picture_does_not_depend_on_its_batch(trained):
    images = [draw(np.random.default_rng(k))[0] for k in range(3)]
    together = verifier.predict(trained, images)
    for image, seen in zip(images, together, strict=True):
        alone = verifier.predict(trained, [image])[0]
        np.testing.assert_allclose(alone.keypoints_2d, seen.keypoints_2d, atol=1e-3)
        np.testing.assert_array_equal(alone.label_map, seen.label_map)


def test_other_files_and_sizes_are_refused_and_the_message_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="hoi.verify train .* --verifier FILE"):
        verifier.load_verifier(tmp_path / "absent.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors", metadata={"kind": "x"})
    with pytest.raises(ValueError, match="other.safetensors is no verifier; train one with `python -m hoi"):
        verifier.load_verifier(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="side is 100 pixels; it must be a multiple of 32"):
        verifier.Verifier(["a"], side=100)


def test_the_network_is_small():
    assert sum(p.numel() for p in verifier.Verifier(sorted(BACKGROUNDS)).parameters()) < 1.1e6
