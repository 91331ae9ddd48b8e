"""The pose network: perfect coordinates give perfect poses, turns of symmetric things cost nothing, and it learns."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from hoi.data.folder import read_records
from hoi.data.writer import DatasetWriter, write_object, write_pictures
from hoi.geometry.camera import transform_points
from hoi.geometry.objects import CATEGORIES, make_object
from hoi.geometry.scene import GraspedObject, ViewSettings, annotate, compose_scene, pictures_of
from hoi.metrics import pose_network
from hoi.metrics.poses import CLASS_NAMES, average_precisions, pose_error, read_poses, true_objects
from hoi.verify.verifier import Verifier, save_verifier

SIDE = 32
BOTTLE, MUG = CLASS_NAMES.index("bottle"), CLASS_NAMES.index("mug")


def make_folder(folder, hand, renderer, count: int, seed: int = 0):
    """Objects alone in front of noise, each pixel in the colour of its normal."""
    writer = DatasetWriter(folder, {"command": "test"})
    for index in range(count):
        generator = np.random.default_rng([seed, index])
        mesh = make_object(CATEGORIES[index % len(CATEGORIES)], index)
        settings = ViewSettings(2 * SIDE, 2 * SIDE, framing="tight")
        scene = compose_scene([GraspedObject(mesh)], hand, renderer, generator, settings, "object")
        record = annotate(scene, 0, hand) | {"text": f"a {mesh.category}", "object_path": write_object(folder, mesh)}
        drawn = pictures_of(scene, 0, record, hand, renderer)
        noise = generator.integers(0, 60, (2 * SIDE, 2 * SIDE, 3), dtype=np.uint8)
        seen = (drawn["conditions"].segmentation > 0).any(axis=2, keepdims=True)
        image = np.where(seen, drawn["conditions"].normal, noise)
        writer.append(write_pictures(folder, index, record, image, **drawn))
    writer.finish(grid=False)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory, hand, renderer):
    return make_folder(tmp_path_factory.mktemp("poses"), hand, renderer, 8)


@pytest.fixture(scope="module")
def views(folder):
    return [pose_network.read_view(folder, record, {}) for record in read_records(folder)]


def random_pose(generator: np.random.Generator) -> np.ndarray:
    pose = np.eye(4)
    pose[:3, :3] = generator.uniform(0.05, 0.3) * Rotation.random(rng=generator).as_matrix()
    pose[:3, 3] = generator.normal(size=3)
    return pose


def test_perfect_coordinates_give_pose_and_size_exactly_whatever_a_third_of_the_points_says():
    generator = np.random.default_rng(0)
    size = np.array([0.5, 0.7, 0.3])
    coordinates = generator.uniform(-0.5, 0.5, (300, 3)) * size
    coordinates[:3] = np.diag(size) / 2  # where the box is touched
    for wrong in (0, 100):
        true = random_pose(generator)
        points = transform_points(true, coordinates)
        points[300 - wrong :] += generator.uniform(0.02, 0.1, (wrong, 3))
        pose, found, share = pose_network.fit_pose(coordinates, points)
        np.testing.assert_allclose(pose, true, atol=1e-9)
        np.testing.assert_allclose(found, size, atol=1e-9)
        assert share == pytest.approx(1 - wrong / 300)


def test_points_that_fix_no_pose_are_no_object():
    line = np.linspace(0, 1, 20)[:, None] * [1.0, 2.0, 3.0]
    cloud = np.random.default_rng(1).normal(size=(20, 3))
    assert pose_network.fit_pose(np.zeros((20, 3)), cloud) is None
    assert pose_network.fit_pose(line, line) is None
    assert pose_network.fit_pose(cloud, 1e-3 * cloud) is None  # smaller than any object


def test_a_network_that_says_the_truth_of_a_record_has_its_pose_to_the_depths_millimetre(export_source):
    """A mug in a right hand, a bowl in a left one, a bottle alone."""
    checked = 0
    for record in read_records(export_source):
        view = pose_network.read_view(export_source, record, {})
        if isinstance(view, str):
            continue
        _, points, visible = view.crop(*view.square(), SIDE)
        exact = transform_points(np.linalg.inv(view.model_to_camera), points).astype(np.float32)
        told = torch.from_numpy(np.where(visible, 9.0, -9.0))[None], torch.from_numpy(exact).movedim(-1, 0)[None]
        true = true_objects(export_source, record, {})
        network = lambda image, class_ids, told=told: told  # noqa: E731
        network.side = SIDE
        (found,) = pose_network.predict_pose(network, view)
        degrees, centimetres = pose_error(np.array(found["model_to_camera"]), true.poses[0], symmetric=False)
        assert (degrees, centimetres) == (pytest.approx(0, abs=1e-2), pytest.approx(0, abs=1e-4))
        assert (
            np.array(found["size"]) <= true.sizes[0] + 2 * 0.002 / np.linalg.det(true.poses[0][:3, :3]) ** (1 / 3)
        ).all()
        assert found["category"] == record["category"] and found["score"] > 0.99
        checked += 1
    assert checked >= 3


def test_a_crop_is_cut_where_its_points_lie_and_black_beyond_the_border(views):
    view = views[0]
    ramp = np.stack(np.meshgrid(np.arange(2 * SIDE), np.arange(2 * SIDE)), axis=-1).astype(np.uint8)
    coded = replace(view, image=np.concatenate([ramp, ramp[..., :1] * 0 + 255], axis=2), depth=np.ones_like(view.depth),
                    intrinsics=np.eye(3))  # fmt: skip
    image, points, visible = coded.crop(-8.0, 4.0, 32.0, 16)  # two pixels become one
    assert not image[:, :4].any() and not points[:, :4].any() and not visible[:, :4].any()
    # A point is of the nearest pixel, the colour the mean of the four around.
    np.testing.assert_allclose(points[:, 5:, :2], image[:, 5:, :2], atol=1)
    np.testing.assert_allclose(points[0, 5:, 0], np.arange(3, 24, 2))


def batch_of(coordinates: torch.Tensor, class_id: int, seen: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"target": coordinates, "seen": seen, "visible": seen, "class_id": torch.tensor([class_id])}


def test_turns_about_the_axis_cost_a_symmetric_class_nothing_and_a_mug_much():
    generator = torch.Generator().manual_seed(0)
    target = torch.rand(1, 3, SIDE, SIDE, generator=generator) - 0.5
    seen = torch.rand(1, SIDE, SIDE, generator=generator) < 0.4
    mask = torch.where(seen, 30.0, -30.0)
    for degrees in (0, 7, 120, 250):
        turn = torch.from_numpy(Rotation.from_euler("y", degrees, degrees=True).as_matrix()).float()
        turned = torch.einsum("ij,bjhw->bihw", turn, target)
        turned[:, :, ~seen[0]] = 7.0  # what is not seen does not count
        assert pose_network.pose_loss(mask, turned, batch_of(target, BOTTLE, seen)) < 1e-6
        assert (pose_network.pose_loss(mask, turned, batch_of(target, MUG, seen)) < 1e-6) == (degrees == 0)
    tilted = target.flip(1)
    assert pose_network.pose_loss(mask, tilted, batch_of(target, BOTTLE, seen)) > 0.1


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    """After a few seconds on eight pictures, and through its file."""
    network, left_out = pose_network.train_pose_network([folder], steps=150, seed=0, side=SIDE, batch_size=8)
    assert not left_out
    path = tmp_path_factory.mktemp("network") / "pose.safetensors"
    pose_network.save_pose_network(path, network, {"steps": "150"})
    return path, network


def test_eight_pictures_are_learned_and_judged_by_the_metrics(trained, folder, views, tmp_path, capsys):
    path, network = trained
    fresh = pose_network.PoseNetwork(SIDE)
    batch = pose_network.read_batch(views, range(8), SIDE)
    before, after = (float(pose_network.pose_loss(*each(batch["image"], batch["class_id"]), batch).detach())
                     for each in (fresh, network))  # fmt: skip
    assert after < before / 3
    arguments = ["predict", "--data", str(folder), "--network", str(path), "--out", str(tmp_path / "poses.json")]
    pose_network.main(pose_network.parse_args(arguments))
    assert "8 objects found in 8 pictures" in capsys.readouterr().out
    true, predicted = read_poses(tmp_path / "poses.json", folder, read_records(folder))
    errors = [pose_error(p.poses[0], t.poses[0], t.is_symmetric(0)) for p, t in zip(predicted, true, strict=True)]
    assert np.median([degrees for degrees, _ in errors]) < 10 and np.median([cm for _, cm in errors]) < 2
    found = [float(ap(np.ones((1, 8)))[0]) for ap in average_precisions(true, predicted, "aabb")["IoU50"].values()]
    assert np.mean(found) > 0.7


def test_a_saved_network_says_the_same_and_is_written_alike_twice(trained, views, tmp_path):
    path, network = trained
    loaded = pose_network.load_pose_network(path)
    for view in views[:2]:
        (a,), (b,) = (pose_network.predict_pose(each, view) for each in (network, loaded))
        np.testing.assert_allclose(a["model_to_camera"], b["model_to_camera"], atol=5e-3)
    pose_network.save_pose_network(tmp_path / "again.safetensors", loaded, {"steps": "150"})
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()
    save_verifier(tmp_path / "verifier.safetensors", Verifier(["on the beach"], SIDE))
    with pytest.raises(ValueError, match="verifier.safetensors is no pose network; make one with .*pose_network train"):
        pose_network.load_pose_network(tmp_path / "verifier.safetensors")


def test_the_same_seed_makes_the_same_weights(folder):
    one, same, other = (
        pose_network.train_pose_network([folder], 2, seed, SIDE, 2)[0].head.weight for seed in (3, 3, 4)
    )
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_what_teaches_nothing_is_counted_and_nothing_at_all_is_refused(folder, export_source, tmp_path):
    _, left_out = pose_network.train_pose_network([folder, export_source], 1, 0, SIDE, 1)
    # A hand alone and scenery, which have no object.
    assert sum(left_out.values()) >= 1 and all(" " in reason for reason in left_out)
    writer = DatasetWriter(tmp_path / "scenery", {"command": "test"})
    writer.append(write_pictures(tmp_path / "scenery", 0, {"text": "the sea"}, np.full((64, 48, 3), 7, np.uint8)))
    writer.finish(grid=False)
    with pytest.raises(ValueError, match="scenery: nothing to learn poses from; 1 records left out: .*none of NOCS's"):
        pose_network.train_pose_network([tmp_path / "scenery"], 1, 0)
    found, left_out = pose_network.predictions_of(pose_network.PoseNetwork(SIDE), [tmp_path / "scenery"])
    assert found == {"images/000000.png": []} and list(left_out.values()) == [1]


def test_records_say_why_they_have_no_view(folder):
    record = read_records(folder)[0]
    for change, reason in ((dict(depth_file_name=None), "no depth_file_name"), (dict(object_frame="file"), "--scenes"),
                           (dict(file_name=None), "no picture")):  # fmt: skip
        assert reason in pose_network.read_view(folder, record | change, {})
