"""COCO export, read back by pycocotools."""

import contextlib
import io
import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from silhouettes import depth_of, iou

from hoi.data.folder import load_mesh, load_object_mask, load_picture, read_records
from hoi.export.coco import keypoint_states, run_lengths
from hoi.export.formats import export_folders

COLORS = {"hand": (128, 128, 128), "object": (153, 51, 51)}


@pytest.fixture(scope="module")
def exported(export_source, tmp_path_factory):
    out = tmp_path_factory.mktemp("coco") / "out"
    assert export_folders([export_source], "coco", out)[0].total() == 6
    with contextlib.redirect_stdout(io.StringIO()):
        return out, COCO(str(out / "annotations.json"))


def test_pictures_are_those_of_the_folder(exported, export_source):
    out, coco = exported
    records = read_records(export_source)
    assert coco.getImgIds() == [record["index"] for record in records]
    for record in records:
        (entry,) = coco.loadImgs(record["index"])
        with Image.open(out / entry["file_name"]) as picture:
            assert picture.size == (entry["width"], entry["height"])
            np.testing.assert_array_equal(np.array(picture), load_picture(export_source, record, "file_name"))


def test_masks_boxes_and_areas_are_those_of_the_segmentation(exported, export_source):
    _, coco = exported
    names = {category["id"]: category["name"] for category in coco.loadCats(coco.getCatIds())}
    assert sorted(names.values()) == ["bottle", "bowl", "can", "hand", "mug", "object"]
    count = 0
    for record in read_records(export_source):
        for annotation in coco.loadAnns(coco.getAnnIds(record["index"])):
            color = COLORS["hand" if names[annotation["category_id"]] == "hand" else "object"]
            true = (load_picture(export_source, record, "segmentation_file_name") == color).all(axis=-1)
            mask = coco.annToMask(annotation)
            np.testing.assert_array_equal(mask, true)
            assert annotation["area"] == true.sum() == coco_mask.area(annotation["segmentation"])
            assert annotation["bbox"] == coco_mask.toBbox(annotation["segmentation"]).tolist()
            count += 1
    assert count == 8  # hand and object of three, an object, a hand, nothing of scenery


def test_keypoints_are_the_projected_joints_and_the_pose_gives_the_silhouette(exported, export_source):
    _, coco = exported
    records = {record["index"]: record for record in read_records(export_source)}
    hands = coco.loadAnns(coco.getAnnIds(catIds=1))
    assert len(hands) == 4 and [hand["hand_side"] for hand in hands] == ["right", "left", "right", "right"]
    states = set()
    for hand in hands:
        intrinsics = np.reshape(coco.loadImgs(hand["image_id"])[0]["intrinsics"], (3, 3))
        points = np.reshape(hand["keypoints_3d"], (21, 3)) @ intrinsics.T
        x, y, v = np.reshape(hand["keypoints"], (21, 3)).T
        given = v > 0
        off = np.stack([x, y], 1) - points[:, :2] / points[:, 2:]
        assert np.abs(off[given]).max() < 0.5 and hand["num_keypoints"] == given.sum() >= 15
        assert not x[~given].any() and not y[~given].any()
        states |= set(v)
    assert states >= {1, 2}
    for thing in coco.loadAnns([a for a in coco.getAnnIds() if coco.anns[a]["category_id"] != 1]):
        record = records[thing["image_id"]]
        intrinsics = np.reshape(coco.loadImgs(thing["image_id"])[0]["intrinsics"], (3, 3))
        vertices, faces = load_mesh(export_source, thing)
        pose = np.reshape(thing["object_to_camera"], (4, 4))
        drawn = depth_of(vertices @ pose[:3, :3].T + pose[:3, 3], faces, intrinsics, 160, 160)
        assert iou(np.isfinite(drawn), load_object_mask(export_source, record)) >= 0.99
        assert (coco.annToMask(thing)[~load_object_mask(export_source, record)] == 0).all()


def test_pycocotools_scores_the_annotation_against_itself_as_perfect(exported):
    _, coco = exported
    category = coco.loadCats(1)[0]
    assert len(category["keypoints"]) == 21 and len(category["skeleton"]) == 20
    assert category["sigmas"] == [0.05] * 21
    assert category["keypoints"][:5] == ["wrist", "thumb_mcp", "thumb_pip", "thumb_dip", "thumb_tip"]
    assert category["skeleton"][:5] == [[1, 2], [2, 3], [3, 4], [4, 5], [1, 6]]
    hands = coco.loadAnns(coco.getAnnIds(catIds=1))
    with contextlib.redirect_stdout(io.StringIO()):
        found = coco.loadRes([hand | {"score": 1.0} for hand in hands])
        for kind in ("keypoints", "segm", "bbox"):
            scores = COCOeval(coco, found, kind)
            scores.params.catIds, scores.params.kpt_oks_sigmas = [1], np.array(category["sigmas"])
            scores.evaluate()
            scores.accumulate()
            scores.summarize()
            assert scores.stats[0] == pytest.approx(1.0), kind


def test_the_snippet_of_the_readme_scores_results(exported, monkeypatch):
    out, coco = exported
    truth = next(annotation for annotation in coco.imgToAnns[0] if annotation["category_id"] == 1)
    moved = (np.array(truth["keypoints"]) + 3).tolist()  # right and down by three pixels
    results = [{"image_id": 0, "category_id": 1, "keypoints": moved, "score": 1.0}]
    monkeypatch.chdir(out)
    (out / "results.json").write_text(json.dumps(results))
    scope, text = {}, (out / "README.md").read_text()
    with contextlib.redirect_stdout(io.StringIO()):
        exec(text.split("```python\n")[1].split("```")[0], scope)
    (out / "results.json").unlink()
    (oks,) = scope["scores"].computeOks(0, 1).ravel()
    assert oks == pytest.approx(np.exp(-(3**2 + 3**2) / (2 * (2 * 0.05) ** 2 * truth["area"])), rel=1e-3)


@pytest.mark.parametrize("fill", [0.0, 0.02, 0.5, 1.0])
def test_run_lengths_are_those_of_pycocotools(fill):
    generator = np.random.default_rng(0)
    for size in ((1, 1), (7, 5), (200, 333)):
        mask = generator.random(size) < fill
        blocks = np.kron(mask, np.ones((9, 40), bool)) if mask.size < 100 else mask
        for each in (mask, blocks):
            encoded = coco_mask.encode(np.asfortranarray(each.astype(np.uint8)))["counts"].decode()
            assert run_lengths(each) == encoded


def test_a_joint_is_missing_outside_the_picture_and_hidden_behind_anything_but_its_own_skin():
    labels, depth = np.zeros((20, 20), np.uint8), np.zeros((20, 20))
    labels[:8], labels[8:14] = 1, 2
    depth[:8], depth[8:14] = 0.40, 0.38
    points = np.tile([5.0, 2.0], (21, 1))
    points[1], points[2], points[3], points[4] = (5, 11), (5, 17), (-3, 2), (19.6, 2)
    z = np.full(21, 0.41)
    z[5] = 0.45  # another finger is in front
    assert keypoint_states(points, labels, depth, z)[:7].tolist() == [2, 1, 1, 0, 0, 1, 2]
    assert keypoint_states(points, labels)[:7].tolist() == [2, 1, 1, 0, 0, 2, 2]
