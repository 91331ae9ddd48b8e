"""BOP export, read back by a plain reader that follows the format's specification, and projected again."""

import json
import shutil

import numpy as np
import pytest
import trimesh
from PIL import Image
from silhouettes import depth_of, iou

from hoi.data.folder import load_object_mask, read_records
from hoi.data.writer import write_records
from hoi.export.bop import symmetries
from hoi.export.formats import export_folders
from hoi.geometry.objects import make_object


@pytest.fixture(scope="module")
def exported(export_source, tmp_path_factory):
    out = tmp_path_factory.mktemp("bop") / "out"
    assert export_folders([export_source], "bop", out)[0].total() == 4
    return out


def read_scene(scene):
    """Everything that the specification promises of each image: id, camera, pose, info, model, pictures."""
    files = {name: json.loads((scene / f"scene_{name}.json").read_text()) for name in ("camera", "gt", "gt_info")}
    for image_id, (pose,) in files["gt"].items():
        name = f"{int(image_id):06d}"
        model = trimesh.load(scene.parent.parent / "models" / f"obj_{pose['obj_id']:06d}.ply", process=False)
        yield {
            "id": image_id,
            "K": np.reshape(files["camera"][image_id]["cam_K"], (3, 3)),
            "points": model.vertices @ np.reshape(pose["cam_R_m2c"], (3, 3)).T + pose["cam_t_m2c"],
            "model": model,
            "info": files["gt_info"][image_id][0],
            "rgb": np.array(Image.open(scene / "rgb" / f"{name}.png")),
            "depth": np.array(Image.open(scene / "depth" / f"{name}.png")) * files["camera"][image_id]["depth_scale"],
            "mask": np.array(Image.open(scene / "mask" / f"{name}_000000.png")),
            "mask_visib": np.array(Image.open(scene / "mask_visib" / f"{name}_000000.png")),
        }


def test_models_projected_again_give_the_stored_silhouettes_and_depths(exported, export_source):
    records = [record for record in read_records(export_source) if record["object_path"]]
    images = list(read_scene(exported / "train" / "000000"))
    assert len(images) == len(records) == 4
    for image, record in zip(images, records, strict=True):
        height, width = image["mask"].shape
        depth = depth_of(image["points"], image["model"].faces, image["K"], height, width)
        assert iou(np.isfinite(depth), load_object_mask(export_source, record)) >= 0.99
        assert set(np.unique(image["mask"])) == {0, 255}
        np.testing.assert_array_equal(image["mask"] > 0, load_object_mask(export_source, record))
        visible = (image["mask_visib"] > 0) & np.isfinite(depth)
        assert visible.sum() > 200
        assert np.quantile(np.abs(image["depth"] - depth)[visible], 0.99) < 1.0  # mm
        hidden = (image["mask"] > 0) & (image["mask_visib"] == 0)
        assert (image["depth"][hidden] > depth[hidden] + 1.0).sum() <= 0.01 * hidden.sum()  # something is in front
        assert image["rgb"].shape == (height, width, 3)
    assert any(((image["mask"] > 0) & (image["mask_visib"] == 0)).sum() > 100 for image in images)


def test_info_counts_pixels_as_the_specification_says_also_beyond_the_picture(exported):
    images = list(read_scene(exported / "train" / "000000"))
    for image in images:
        height, width = image["mask"].shape
        shifted = image["K"] + np.array([[0, 0, width], [0, 0, height], [0, 0, 0]])
        whole = np.isfinite(depth_of(image["points"], image["model"].faces, shifted, 3 * height, 3 * width))
        rows, columns = np.nonzero(whole)
        box = [columns.min() - width, rows.min() - height, np.ptp(columns), np.ptp(rows)]
        info, visible = image["info"], image["mask_visib"] > 0
        np.testing.assert_allclose(info["bbox_obj"], box, atol=1)
        assert info["px_count_all"] == pytest.approx(whole.sum(), rel=0.01)
        assert info["px_count_visib"] == visible.sum()
        assert info["visib_fract"] == pytest.approx(visible.sum() / whole.sum(), rel=0.01)
        assert info["px_count_valid"] == ((image["mask"] > 0) & (image["depth"] > 0)).sum()
        rows, columns = np.nonzero(visible)
        assert info["bbox_visib"] == [columns.min(), rows.min(), np.ptp(columns), np.ptp(rows)]
    last = images[-1]["info"]  # the can leaves the picture on the left
    assert last["bbox_obj"][0] < 0 and last["px_count_all"] > (images[-1]["mask"] > 0).sum()


def test_models_are_millimetres_with_outward_normals_and_true_sizes(exported, export_source):
    infos = json.loads((exported / "models" / "models_info.json").read_text())
    paths = sorted({record["object_path"] for record in read_records(export_source) if record["object_path"]})
    names = json.loads((exported / "models" / "names.json").read_text())
    assert [f"objects/{name}.ply" for name in names.values()] == paths and list(names) == list(infos)
    assert list(infos) == ["1", "2", "3", "4"]
    for (number, info), path in zip(infos.items(), paths, strict=True):
        text = (exported / "models" / f"obj_{int(number):06d}.ply").read_text()
        assert text.startswith("ply\nformat ascii 1.0\n") and "property float nx" in text
        model = trimesh.load(exported / "models" / f"obj_{int(number):06d}.ply", process=False)
        stored = trimesh.load(export_source / path, process=False)
        np.testing.assert_allclose(model.vertices, 1000 * stored.vertices, atol=1e-4)
        np.testing.assert_allclose([info[f"size_{a}"] for a in "xyz"], model.extents, atol=1e-3)
        np.testing.assert_allclose([info[f"min_{a}"] for a in "xyz"], model.bounds[0], atol=1e-3)
        farthest = max(np.linalg.norm(model.vertices - vertex, axis=1).max() for vertex in model.vertices[::7])
        assert info["diameter"] == pytest.approx(farthest, rel=0.01) and info["diameter"] >= farthest - 1e-3
        rows = np.loadtxt(text.splitlines()[text.splitlines().index("end_header") + 1 :][: len(model.vertices)])
        outside = trimesh.Trimesh(rows[:, :3], model.faces, process=False)
        assert (np.einsum("ij,ij->i", rows[:, 3:], outside.vertex_normals) > 0.99).mean() > 0.99
        assert outside.volume > 0


def test_models_have_their_origin_in_the_middle_also_when_the_stored_mesh_has_not(export_source, tmp_path):
    copy = shutil.copytree(export_source, tmp_path / "copy")
    record = next(record for record in read_records(copy) if record["category"] == "mug")
    mesh = trimesh.load(copy / record["object_path"], process=False)
    mesh.vertices += [0.02, -0.01, 0.03]
    mesh.export(copy / record["object_path"])
    pose = np.reshape(record["object_to_camera"], (4, 4))
    pose[:3, 3] -= pose[:3, :3] @ [0.02, -0.01, 0.03]
    write_records(copy, [record | {"object_to_camera": pose.ravel().tolist()}])
    export_folders([copy], "bop", tmp_path / "out")
    (image,) = read_scene(tmp_path / "out" / "train" / "000000")
    np.testing.assert_allclose(image["model"].bounds.mean(axis=0), 0, atol=1e-3)
    drawn = depth_of(image["points"], image["model"].faces, image["K"], 160, 160)
    assert iou(np.isfinite(drawn), image["mask"] > 0) >= 0.99


def test_the_hand_stands_beside_the_scene_and_its_keypoints_project_where_they_are(exported):
    scene = exported / "train" / "000000"
    cameras = json.loads((scene / "scene_camera.json").read_text())
    hands = json.loads((scene / "scene_hand.json").read_text())
    assert [entry["hand"] is not None for entry in hands.values()] == [True, True, False, True]
    assert [entry["hand"] and entry["hand"]["hand_side"] for entry in hands.values()] == [
        "right",
        "left",
        None,
        "right",
    ]
    for image_id, entry in hands.items():
        if entry["hand"] is None:
            continue
        points = np.reshape(entry["hand"]["keypoints_3d"], (21, 3)) @ np.reshape(cameras[image_id]["cam_K"], (3, 3)).T
        there = np.reshape(entry["hand"]["keypoints_2d"], (21, 2))
        assert np.abs(points[:, :2] / points[:, 2:] - there).max() < 0.5
        assert len(entry["hand"]["hand_pose"]) == 45 and len(entry["hand"]["global_orient"]) == 3


def farthest_from_surface(vertices, faces, turn_deg):
    """How far vertices lie from the surface when the model is turned about z, metres."""
    turn = trimesh.transformations.rotation_matrix(np.radians(turn_deg), [0, 0, 1])
    moved = trimesh.transform_points(vertices, turn)[:: max(1, len(vertices) // 150)]
    return trimesh.proximity.closest_point(trimesh.Trimesh(vertices, faces, process=False), moved)[1].max()


@pytest.mark.parametrize("name", ["bowl", "can", "bottle", "mug"])
def test_symmetries_map_the_surface_onto_itself_and_none_is_claimed_that_does_not(name):
    seen = set()
    for seed in range(6):
        mesh = make_object(name, seed)
        claimed = symmetries(mesh.object_id, mesh.vertices)
        seen |= set(claimed) or {"none"}
        quarter = farthest_from_surface(mesh.vertices, mesh.faces, 90)
        if "symmetries_continuous" in claimed:
            assert claimed["symmetries_continuous"] == [{"axis": [0, 0, 1], "offset": [0, 0, 0]}]
            assert max(quarter, farthest_from_surface(mesh.vertices, mesh.faces, 37)) < 0.0025
        else:
            assert quarter > 0.004
        if "symmetries_discrete" in claimed:
            np.testing.assert_allclose(np.reshape(claimed["symmetries_discrete"], (4, 4)), np.diag([-1, -1, 1, 1]))
            assert farthest_from_surface(mesh.vertices, mesh.faces, 180) < 0.0005
    expected = {"mug": {"none"}, "bottle": {"symmetries_continuous", "symmetries_discrete"}}
    assert seen == expected.get(name, {"symmetries_continuous"})


def test_no_symmetry_is_claimed_for_a_mesh_that_only_bears_a_built_in_name():
    assert symmetries("can_0003", make_object("can", 3).vertices * 1.01) == {}
    assert symmetries("soup", make_object("can", 3).vertices) == {}
