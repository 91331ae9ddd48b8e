"""The authors' CSVs, read back by column name as their code reads them, and projected again."""

import csv
import shutil

import numpy as np
import pytest
import trimesh
from PIL import Image
from silhouettes import depth_of, iou

from hoi.data.folder import load_object_mask, load_picture, read_records
from hoi.data.writer import write_records
from hoi.export.formats import export_folders
from hoi.geometry.hand import HandParams
from hoi.sources.official_csv import OfficialCSV

FLIP = np.diag([1.0, -1.0, -1.0])
# Finger order (wrist, then thumb to little, base to tip) from MANO's joints followed by the five tips.
FINGER_ORDER = [0, 13, 14, 15, 16, 1, 2, 3, 17, 4, 5, 6, 18, 10, 11, 12, 19, 7, 8, 9, 20]


@pytest.fixture(scope="module")
def exported(export_source, tmp_path_factory):
    out = tmp_path_factory.mktemp("csv") / "out"
    assert export_folders([export_source], "csv", out)[0].total() == 6
    return out


def rows(path):
    with open(path, newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def test_columns_and_rows_are_those_of_the_release(exported):
    headers = [(exported / f"{name}.csv").read_text().splitlines()[0] for name in ("train", "test", "reg")]
    train = "image,skeleton,top,bottom,left,right,sentence,seg,mask"
    assert headers == [train, f"{train},depth,label,objpath", "image,sentence"]
    assert [len(rows(exported / f"{name}.csv")) for name in ("train", "test", "reg")] == [5, 3, 1]
    assert rows(exported / "reg.csv")[0]["sentence"] == "a can, drawn"  # a comma inside


def test_training_pictures_are_those_of_the_folder(exported, export_source):
    for row, record in zip(rows(exported / "train.csv"), read_records(export_source)[:4], strict=False):
        box = [int(float(row[name])) for name in ("top", "bottom", "left", "right")]
        assert box == [0, record["height"], 0, record["width"]] and row["sentence"] == record["text"]
        for column, key in (("image", "file_name"), ("skeleton", "skeleton_file_name"),
                            ("mask", "segmentation_file_name")):  # fmt: skip
            pixels = np.array(Image.open(exported / row[column]).convert("RGB"))
            np.testing.assert_array_equal(pixels, load_picture(export_source, record, key))
        seg = np.array(Image.open(exported / row["seg"]))
        assert seg.ndim == 2
        np.testing.assert_array_equal(seg == 255, np.array(Image.open(exported / row["mask"])).any(axis=-1))


def test_labels_put_hand_and_object_where_the_pictures_show_them(exported, export_source, hand):
    records = {f"images/{record['index']:06d}.png": record for record in read_records(export_source)}
    for row in rows(exported / "test.csv"):
        record, label = records[row["image"]], np.load(exported / row["label"])
        to_camera = label["extrinsics"][:3, :3]
        np.testing.assert_array_equal(to_camera, FLIP)
        keypoints = (label["joint3d"][FINGER_ORDER] + label["obj_trans"]) @ to_camera.T @ label["intrinsics"].T
        there = np.reshape(record["keypoints_2d"], (21, 2))
        assert np.abs(keypoints[:, :2] / keypoints[:, 2:] - there).max() < 0.5
        # The parameters, given to the hand model, put the joints there too.
        pose = HandParams(label["handparam"][0, :3], label["handparam"][0, 3:], label["trans"][0],
                        label["hand_betas"][0], str(label["hand_side"]))  # fmt: skip
        assert np.abs(hand(pose).keypoints_3d - label["joint3d"][FINGER_ORDER]).max() < 1e-5
        mesh = trimesh.load(exported / row["objpath"], process=False)
        points = (mesh.vertices @ label["obj_pose"].T + label["obj_trans"]) @ to_camera.T
        assert np.linalg.det(label["obj_pose"]) == pytest.approx(1)
        drawn = depth_of(points, mesh.faces, label["intrinsics"], record["height"], record["width"])
        assert iou(np.isfinite(drawn), load_object_mask(export_source, record)) >= 0.99
        depth = np.array(Image.open(exported / row["depth"]))
        np.testing.assert_array_equal(depth, load_picture(export_source, record, "depth_file_name"))


def test_a_hand_without_a_side_gets_no_label_that_only_a_pickle_could_hold(export_source, tmp_path):
    folder = shutil.copytree(export_source, tmp_path / "copy")
    first, *others = read_records(folder)
    write_records(folder, [first | {"hand_side": None}, *others])
    export_folders([folder], "csv", tmp_path / "out")
    assert len(rows(tmp_path / "out" / "train.csv")) == 5
    labels = [row["label"] for row in rows(tmp_path / "out" / "test.csv")]
    assert len(labels) == 2
    for label in labels:
        with np.load(tmp_path / "out" / label, allow_pickle=False) as arrays:
            assert all(arrays[name] is not None for name in arrays.files)


def test_our_own_reader_of_the_release_takes_it(exported, export_source):
    source = OfficialCSV(exported / "train.csv")
    assert len(source) == 5 and OfficialCSV(exported / "reg.csv").is_scenery
    record, frame = read_records(export_source)[0], source.read(0)
    segmentation = load_picture(export_source, record, "segmentation_file_name")
    np.testing.assert_array_equal(frame.label_map > 0, segmentation.any(axis=-1))
