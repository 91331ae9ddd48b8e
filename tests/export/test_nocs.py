"""NOCS export, read back as SPD's and DualPoseNet's loaders read it: file by file, pose from coordinates and depth."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import trimesh
from PIL import Image
from silhouettes import depth_of, iou

from hoi.data.folder import load_object_mask, read_records
from hoi.export import nocs
from hoi.export.formats import export_folder

SYNSETS = {"bottle": (1, "02876657"), "bowl": (2, "02880940"), "can": (4, "02946921"), "mug": (6, "03797390")}
FX, CX, CY = 577.5, 319.5, 239.5


@pytest.fixture(scope="module")
def exported(export_source, tmp_path_factory):
    out = tmp_path_factory.mktemp("nocs") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nocs, "FRAMES_PER_FOLDER", 2)
        written, left_out = export_folder(export_source, "nocs", out, labels=True)
    assert written == 3 and left_out.total() == 3
    assert sum(count for reason, count in left_out.items() if "camera is not that of NOCS" in reason) == 1
    return out


def records_of(export_source):
    records = [record for record in read_records(export_source) if record["object_path"]]
    return [record for record in records if record["intrinsics"][2] == record["intrinsics"][5]]


def frames(out: Path) -> list[Path]:
    """Stems in the order in which SPD lists them: all folders times ten, those that have all five files."""
    folders = sorted((out / "CAMERA" / "train").iterdir())
    assert [folder.name for folder in folders] == [f"{k:05d}" for k in range(len(folders))]
    stems = [folder / f"{k:04d}" for folder in folders for k in range(10)]
    kinds = ("color.png", "coord.png", "depth.png", "mask.png", "meta.txt")
    return [stem for stem in stems if all(Path(f"{stem}_{kind}").exists() for kind in kinds)]


def load(stem: Path):
    """Instance mask, coordinates in [-0.5, 0.5] with z turned back, and depth in metres, as the readers have them."""
    mask = np.array(Image.open(f"{stem}_mask.png"))[:, :, 0]
    coord = np.array(Image.open(f"{stem}_coord.png"))[:, :, :3].astype(np.float32) / 255
    coord[:, :, 2] = 1 - coord[:, :, 2]
    depth = np.array(Image.open(f"{stem}_depth.png"))
    assert mask.shape == coord.shape[:2] == depth.shape == (480, 640) and depth.dtype == np.uint16
    return mask, coord - 0.5, depth / 1000


def similarity(source, target):
    """Scale, rotation and translation that take source (N, 3) nearest to target.  Source: Umeyama 1991."""
    a, b = source - source.mean(0), target - target.mean(0)
    u, s, vt = np.linalg.svd(b.T @ a / len(a))
    sign = np.diag([1, 1, np.sign(np.linalg.det(u @ vt))])
    rotation = u @ sign @ vt
    scale = np.trace(np.diag(s) @ sign) / (a**2).sum(1).mean()
    return scale, rotation, target.mean(0) - scale * rotation @ source.mean(0)


def model_of(out: Path, stem: Path):
    """Vertices as the readers have them (z turned back), the mesh as it is on file, and the row of meta.txt."""
    fields = Path(f"{stem}_meta.txt").read_text().splitlines()[0].split(" ")
    mesh = trimesh.load(out / "obj_models" / "train" / fields[2] / fields[3] / "model.obj", process=False)
    return mesh.vertices * [1, 1, -1], mesh, fields


def test_the_pose_comes_back_from_coordinates_and_depth(exported, export_source):
    stems = frames(exported)
    assert [str(stem.relative_to(exported / "CAMERA")) for stem in stems] == [
        "train/00000/0000", "train/00000/0001", "train/00001/0000"]  # fmt: skip
    assert (exported / "CAMERA" / "train_list.txt").read_text().split() == [
        str(stem.relative_to(exported / "CAMERA")) for stem in stems
    ]
    for stem in stems:
        mask, coord, depth = load(stem)
        rows, columns = np.nonzero((mask == 1) & (depth > 0))
        assert len(rows) >= 64 and mask.max() == 255 and set(np.unique(mask)) == {1, 255}
        z = depth[rows, columns]
        points = np.stack([(columns - CX) * z / FX, (rows - CY) * z / FX, z], axis=1)
        scale, rotation, translation = similarity(coord[rows, columns], points)
        residual = points - (scale * coord[rows, columns] @ rotation.T + translation)
        assert np.abs(residual).max() < 0.003 * scale + 0.001  # 1/255 of the diagonal, and a millimetre
        label = pickle.loads(Path(f"{stem}_label.pkl").read_bytes())
        turn = np.degrees(np.arccos(np.clip((np.trace(rotation.T @ label["rotations"][0]) - 1) / 2, -1, 1)))
        assert turn < 0.5 and np.linalg.norm(translation - label["translations"][0]) < 0.002
        assert scale == pytest.approx(label["scales"][0], rel=0.005)
        assert label["bboxes"].tolist() == [[rows.min(), columns.min(), rows.max() + 1, columns.max() + 1]]
        assert (label["class_ids"][0], label["model_list"][0]) == (int(model_of(exported, stem)[2][1]),
                                                                   model_of(exported, stem)[2][3])  # fmt: skip


def test_models_at_their_labels_give_the_stored_silhouettes(exported, export_source):
    for stem, record in zip(frames(exported), records_of(export_source), strict=True):
        label = pickle.loads(Path(f"{stem}_label.pkl").read_bytes())
        vertices, mesh, fields = model_of(exported, stem)
        points = label["scales"][0] * vertices @ label["rotations"][0].T + label["translations"][0]
        size = record["height"]
        small = np.array([[FX * size / 480, 0, (size - 1) / 2], [0, FX * size / 480, (size - 1) / 2], [0, 0, 1]])
        stored = load_object_mask(export_source, record)
        assert iou(np.isfinite(depth_of(points, mesh.faces, small, size, size)), stored) >= 0.99
        frame = np.array([[FX, 0, CX], [0, FX, CY], [0, 0, 1]])
        drawn = depth_of(points, mesh.faces, frame, 480, 640)
        mask, _, depth = load(stem)
        assert (np.isfinite(drawn)[mask == 1]).mean() > 0.998
        beside = np.ones((480, 640), bool)
        beside[:, 80:560] = False
        assert not (mask[beside] == 1).any() and not depth[beside].any()
        nearer = (
            depth[(mask == 255) & np.isfinite(drawn) & (depth > 0)]
            - drawn[(mask == 255) & np.isfinite(drawn) & (depth > 0)]
        )
        assert np.quantile(nearer, 0.95) < 0.002 if len(nearer) else True  # the hand hides it: it is in front
        assert fields[:3] == ["1", str(SYNSETS[record["category"]][0]), SYNSETS[record["category"]][1]]


def test_models_are_upright_normalised_and_closed_after_turning_z_around(exported):
    for stem in frames(exported):
        vertices, mesh, fields = model_of(exported, stem)
        assert mesh.volume > 0  # faces outward in the file
        size = np.subtract(*np.loadtxt(Path(exported, "obj_models/train", fields[2], fields[3], "bbox.txt")))
        assert np.linalg.norm(size) == pytest.approx(1, abs=1e-5) and (size > 0).all()
        np.testing.assert_allclose(size, mesh.extents, atol=1e-5)
        label = pickle.loads(Path(f"{stem}_label.pkl").read_bytes())
        up_in_camera = label["rotations"][0] @ [0, 1, 0]
        assert up_in_camera[1] < 0  # the camera stands above the horizon and upright: y points down in pictures
        if fields[1] == "6":
            assert vertices[vertices[:, 0] > 0.3 * size[0]][:, 2].std() < 0.3 * vertices[:, 2].std()  # a thin handle
        if fields[1] == "1":
            assert size[1] > 1.5 * max(size[0], size[2])


def test_the_picture_lies_in_the_middle_of_the_frame(exported, export_source):
    for stem, record in zip(frames(exported), records_of(export_source), strict=True):
        color = np.array(Image.open(f"{stem}_color.png"))
        picture = Image.open(export_source / record["file_name"])
        assert color.shape == (480, 640, 3)
        back = np.asarray(Image.fromarray(color[:, 80:560]).resize(picture.size, Image.Resampling.BOX), float)
        assert np.corrcoef(back.ravel(), np.asarray(picture, float).ravel())[0, 1] > 0.95
        assert np.abs(np.diff(color[:, :60].astype(int), axis=1)).mean() < 1  # the sides are blurred


def test_a_folder_made_with_another_camera_is_refused_and_says_what_to_do(export_source, tmp_path):
    records = [record | {"intrinsics": [500.0, *record["intrinsics"][1:]]} for record in records_of(export_source)]
    assert "focal length 192.5 px at a height of 160" in nocs.unfit_for_nocs(records[0])
    assert "make_dataset.py --camera nocs" in nocs.unfit_for_nocs(records[0])
