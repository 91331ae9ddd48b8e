"""tools/evaluation_folders.py: conditions of one record under the words, or the text, of another."""

import evaluation_folders
import numpy as np
import pytest
from verifier_world import make_folder

from hoi.data.check import check_folder
from hoi.data.folder import load_conditions, load_depth, load_image, load_label_map, load_object_mask, read_records
from hoi.data.writer import DatasetWriter, copy_folder


def test_each_text_is_shown_the_conditions_of_the_next_record(tmp_path):
    shaded, out = make_folder(tmp_path / "shaded", 3), tmp_path / "skeletons"
    evaluation_folders.make_folder("skeletons", shaded, out)
    evaluation_folders.make_folder("skeletons", shaded, out)  # again: nothing is left to do
    records, shown = read_records(shaded), read_records(out)
    assert [record["text"] for record in shown] == [record["text"] for record in records]
    for k, record in enumerate(shown):
        assert (load_label_map(out, record) == load_label_map(shaded, records[(k + 1) % 3])).all()


def test_every_colour_meets_every_material():
    words = [evaluation_folders.words_of("materials", k, "A mug on the beach")[0] for k in range(208)]
    pairs = {(each["color"], each["material"]) for each in words}
    colors, materials = ({pair[k] for pair in pairs} for k in (0, 1))
    assert len(pairs) == len(colors) * len(materials) and materials == {"metallic", "striped", "marble"}


@pytest.fixture
def grasps(export_source, tmp_path):
    """Of the shared folder the records with object and hand."""
    chosen = [record for record in read_records(export_source) if record["object_to_camera"] and record["keypoints_2d"]]
    copy_folder(export_source, chosen, DatasetWriter(tmp_path / "grasps", {"command": "test"}))
    return tmp_path / "grasps"


def test_plain_pictures_show_the_object_alone_where_it_was(grasps, tmp_path):
    evaluation_folders.make_folder("plain", grasps, tmp_path / "plain")
    record, true = read_records(tmp_path / "plain")[0], read_records(grasps)[0]
    assert record["object_to_camera"] == true["object_to_camera"] and record["keypoints_2d"] is None
    mask = load_object_mask(grasps, true)
    assert ((load_label_map(tmp_path / "plain", record) == 2) == mask).all()
    image = load_image(tmp_path / "plain", record).astype(int)
    border = np.concatenate([image[0], image[:, 0]])
    assert np.ptp(border, axis=0).max() < 40 and np.abs(image[mask].mean(0) - border.mean(0)).max() > 10
    assert check_folder(tmp_path / "plain").ok


def test_estimated_normals_are_those_of_the_depth_without_its_details(grasps, tmp_path):
    evaluation_folders.make_folder("normals", grasps, tmp_path / "normals")
    for record, true in zip(read_records(tmp_path / "normals"), read_records(grasps), strict=True):
        assert record["normal_source"] == "estimated-like"
        seen, exact = load_conditions(tmp_path / "normals", record), load_conditions(grasps, true)
        assert (seen.skeleton == exact.skeleton).all() and (seen.segmentation == exact.segmentation).all()
        inside = load_depth(grasps, true) > 0
        assert not seen.normal[~inside].any()
        a, b = (1 - each.normal[inside] / 127.5 for each in (seen, exact))
        cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
        assert 0.6 < np.median(cosine) < 0.999
        assert (load_image(tmp_path / "normals", record) == load_image(grasps, true)).all()
