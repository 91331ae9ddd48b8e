"""NOCS export, read back as SPD's and DualPoseNet's preparations and loaders read it.

What these do is formulated here anew, from their public code: which files they list, which they drop, how they find
poses, how SPD moves mugs.
"""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import trimesh
from PIL import Image
from silhouettes import depth_of, iou

from hoi.common.files import ASSETS
from hoi.data.folder import load_object_mask, read_records
from hoi.data.writer import DatasetWriter, write_object, write_pictures
from hoi.export import nocs
from hoi.export.__main__ import run
from hoi.export.formats import export_folders
from hoi.geometry.grasp import Grasp
from hoi.geometry.hand import HandParams
from hoi.geometry.objects import make_object
from hoi.geometry.scene import GraspedObject, ViewSettings, annotate, compose_scene, pictures_of

SYNSETS = {"bottle": (1, "02876657"), "bowl": (2, "02880940"), "can": (4, "02946921"), "mug": (6, "03797390")}
ALL_SYNSETS = ("02876657", "02880940", "02942699", "02946921", "03642806", "03797390")
FX, CX, CY = 577.5, 319.5, 239.5
FILES = ("color.png", "coord.png", "depth.png", "mask.png", "meta.txt")
MUG = 6


@pytest.fixture(scope="module")
def source(tmp_path_factory, hand, renderer) -> Path:
    """A dataset folder for NOCS: twelve pictures of three mugs, bottles, bowls and cans each, some in a hand."""
    folder = tmp_path_factory.mktemp("nocs_source")
    pose = HandParams(np.array([0.2, 0.4, -0.3]), np.full(45, 0.12), np.array([0.12, 0.03, 0.05]), np.zeros(10))
    grasp = Grasp(pose, 0.5, 0, (True, True, True, False, False), True, 1.0)
    fov_deg = float(np.degrees(2 * np.arctan(240 / FX)))
    writer = DatasetWriter(folder, {})
    for index in range(12):
        mesh = make_object(("mug", "bottle", "bowl", "can")[index % 4], index // 4)
        generator = np.random.default_rng([7, index])
        settings, content = ViewSettings(160, 160, fov_deg=fov_deg), "hand_object" if index < 6 else "object"
        graspable = [GraspedObject(mesh, (grasp,), (grasp,))]
        scene = compose_scene(graspable, hand, renderer, generator, settings, content)
        record = annotate(scene, 0, hand) | {"text": f"a {mesh.category}", "object_path": write_object(folder, mesh)}
        picture = generator.integers(0, 255, (160, 160, 3), dtype=np.uint8)
        writer.append(write_pictures(folder, index, record, picture, **pictures_of(scene, 0, record, hand, renderer)))
    writer.finish(grid=False)
    return folder


@pytest.fixture(scope="module")
def exported(source, tmp_path_factory):
    """The export as it is: ten of the twelve pictures."""
    out = tmp_path_factory.mktemp("nocs") / "out"
    written, left_out = export_folders([source], "nocs", out, {"labels": True})
    assert written.total() == 10 and list(left_out.values()) == [2]
    return out


def records_of(source):
    return read_records(source)[:10]


# --- the tools, as their public code works ---


def listed(data: Path, camera: str, subset: str = "train") -> list[Path]:
    """Stems that a preparation goes through: for as many folders as there are ten numbers each, from 00000 on."""
    place = data / camera / subset
    count = sum((place / name).is_dir() for name in os.listdir(place))
    return [place / f"{i // 10:05d}" / f"{i % 10:04d}" for i in range(10 * count)]


def instance_of(data: Path, stem: Path) -> tuple | None:
    """(class, model id, size by bbox.txt, scale, rotation, translation in metres) as both preparations find them.

    None where they drop the frame.
    """
    if not all(Path(f"{stem}_{kind}").exists() for kind in FILES):
        return None
    mask, coord, depth = load(stem)
    assert mask.max() == 255
    (line,) = Path(f"{stem}_meta.txt").read_text().splitlines()
    number, class_id, synset, model = line.strip().split(" ")
    assert class_id != "0"
    inside = mask == int(number)
    rows, columns = np.nonzero(inside)
    if np.ptp(columns) + 1 > 600 or np.ptp(rows) + 1 > 440 or (inside & (depth > 0)).sum() < 64:
        return None
    corners = np.loadtxt(data / "obj_models" / "train" / synset / model / "bbox.txt")
    rows, columns = np.nonzero(inside & (depth > 0))
    return int(class_id), model, corners[0] - corners[1], *similarity(coord[rows, columns], back_projected(stem))


def dualposenet_prepares(data: Path) -> list[tuple]:
    """What its pickle would hold: instances are gathered, and written when the last listed frame is reached."""
    for subset in ("train", "val"):
        listed(data, "camera", subset)
    for subset in ("train", "test"):
        os.listdir(data / "real" / subset)
    pickled, gathered, stems = [], [], listed(data, "camera")
    for k, stem in enumerate(stems):
        if (found := instance_of(data, stem)) is None:
            continue
        gathered.append(found)
        if k == len(stems) - 1:
            pickled = gathered
    return pickled


def spd_shapes(data: Path) -> tuple[dict, dict]:
    """camera_train and mug_meta as SPD makes them of all six classes of both halves; with other random numbers."""
    generator, models, meta = np.random.default_rng(99), {}, {}
    for subset in ("train", "val"):
        for synset in ALL_SYNSETS:
            for instance in sorted(os.listdir(data / "obj_models" / subset / synset)):
                text = (data / "obj_models" / subset / synset / instance / "model.obj").read_text()
                lines = [line.split() for line in text.splitlines()]
                vertices = np.array([line[1:] for line in lines if line[0] == "v"], float)
                corners = vertices[np.array([line[1:] for line in lines if line[0] == "f"], int) - 1]
                area = np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1)
                a, b, c = np.moveaxis(corners[generator.choice(len(area), 3072, p=area / area.sum())], 1, 0)
                r1, r2 = np.sqrt(generator.random((3072, 1))), generator.random((3072, 1))
                cloud = (1 - r1) * a + r1 * (1 - r2) * b + r1 * r2 * c
                kept, gap = [], np.full(3072, np.inf)
                for _ in range(1024):
                    kept.append(int(gap.argmax()) if kept else 0)
                    gap = np.minimum(gap, np.linalg.norm(cloud - cloud[kept[-1]], axis=1))
                points = cloud[kept] * [1, 1, -1]
                if synset == "03797390":
                    nearest, farthest = points[:, 2].min(), points[:, 2].max()
                    shift = np.array([(nearest - farthest) / 2 - points[:, 0].min(), 0, 0])
                    scale = 1 / np.linalg.norm(2 * np.abs(points + shift).max(axis=0))
                    points, meta[instance] = scale * (points + shift), [shift, scale]
                models[instance] = points
    return models, meta


def pickled(path: Path):
    return pickle.loads(path.read_bytes())


def load(stem: Path):
    """Instance mask, coordinates in [-0.5, 0.5] with z turned back, and depth in metres, as the readers have them."""
    mask = np.array(Image.open(f"{stem}_mask.png"))[:, :, 0]
    coord = np.array(Image.open(f"{stem}_coord.png"))[:, :, :3].astype(np.float32) / 255
    coord[:, :, 2] = 1 - coord[:, :, 2]
    depth = np.array(Image.open(f"{stem}_depth.png"))
    assert mask.shape == coord.shape[:2] == depth.shape == (480, 640) and depth.dtype == np.uint16
    return mask, coord - 0.5, depth / 1000


def back_projected(stem: Path) -> np.ndarray:
    """(N, 3) metres of the instance's pixels with depth."""
    mask, _, depth = load(stem)
    rows, columns = np.nonzero((mask == 1) & (depth > 0))
    z = depth[rows, columns]
    return np.stack([(columns - CX) * z / FX, (rows - CY) * z / FX, z], axis=1)


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


# --- preparations ---


def test_dualposenet_prepares_the_export_as_it_is_and_gets_every_frame(exported, source):
    prepared = dualposenet_prepares(exported)
    assert [found[1] for found in prepared] == [Path(r["object_path"]).stem for r in records_of(source)]
    for found, record in zip(prepared, records_of(source), strict=True):
        class_id, _, size, scale, rotation, translation = found
        assert class_id == SYNSETS[record["category"]][0]
        mesh = trimesh.load(source / record["object_path"], process=False)
        np.testing.assert_allclose(scale * size, mesh.extents[[0, 2, 1]], rtol=0.01)  # y is up there, z here
        pose = np.reshape(record["object_to_camera"], (4, 4))
        centre = pose[:3, :3] @ mesh.bounds.mean(axis=0) + pose[:3, 3]
        assert np.linalg.norm(translation - centre) < 0.002
        assert np.degrees(np.arccos(rotation[:, 1] @ pose[:3, 2])) < 0.5


def test_spd_lists_all_that_it_wants_and_its_shapes_agree_with_the_written_ones(exported):
    assert (exported / "README.md").read_text().startswith((ASSETS / "exports" / "nocs.md").read_text())
    assert listed(exported, "CAMERA", "val") == []
    assert all(not os.listdir(exported / "Real" / subset) for subset in ("train", "test"))
    models, meta = spd_shapes(exported)
    written, mugs = (pickled(exported / "obj_models" / f"{name}.pkl") for name in ("camera_train", "mug_meta"))
    assert written.keys() == models.keys() and mugs.keys() == meta.keys() and len(mugs) == 3 and len(written) == 12
    for name, points in written.items():
        assert points.shape == (1024, 3)
        gaps = np.linalg.norm(points[:, None] - models[name], axis=2).min(axis=1)
        assert gaps.max() < 0.06 and np.median(gaps) < 0.02  # both cover the surface evenly
        assert np.linalg.norm(2 * np.abs(points).max(axis=0)) == pytest.approx(1, abs=1e-9 if name in mugs else 0.02)
    for name, (shift, scale) in meta.items():  # other random points: a fraction of a millimetre on a mug of 0.15 m
        np.testing.assert_allclose(mugs[name][0], shift, atol=0.004)
        assert mugs[name][1] == pytest.approx(scale, rel=0.01)


def test_labels_are_those_of_spd_within_a_millimetre(exported, source):
    mugs = pickled(exported / "obj_models" / "mug_meta.pkl")
    stems = [stem for stem in listed(exported, "CAMERA") if instance_of(exported, stem)]
    assert [str(stem.relative_to(exported / "CAMERA")) for stem in stems] == (
        exported / "CAMERA" / "train_list.txt").read_text().split()  # fmt: skip
    classes = set()
    for stem in stems:
        class_id, model, _, scale, rotation, translation = instance_of(exported, stem)
        shift, factor = mugs[model] if class_id == MUG else (np.zeros(3), 1.0)
        translation, scale = translation - scale * rotation @ shift, scale / factor
        label = pickled(Path(f"{stem}_label.pkl"))
        assert (label["class_ids"], label["model_list"], label["instance_ids"]) == ([class_id], [model], [1])
        turn = np.degrees(np.arccos(np.clip((np.trace(rotation.T @ label["rotations"][0]) - 1) / 2, -1, 1)))
        assert turn < 0.5 and np.linalg.norm(translation - label["translations"][0]) < 0.001
        assert scale == pytest.approx(label["scales"][0], rel=0.002)
        rows, columns = np.nonzero(load(stem)[0] == 1)
        assert label["bboxes"].tolist() == [[rows.min(), columns.min(), rows.max() + 1, columns.max() + 1]]
        # As its dataset class reads them: the label takes moved coordinates to the points that the depth shows.
        mask, coord, depth = load(stem)
        coordinates = factor * (coord[(mask == 1) & (depth > 0)] + shift)
        there = label["scales"][0] * coordinates @ label["rotations"][0].T + label["translations"][0]
        off = np.linalg.norm(there - back_projected(stem), axis=1)
        assert np.median(off) < 0.001 and off.max() < 0.003
        classes.add(class_id)
    assert classes == {1, 2, 4, MUG}


def test_a_mug_is_moved_so_that_its_body_stands_on_the_axis(exported, source):
    for record in records_of(source):
        if record["category"] != "mug":
            continue
        name = Path(record["object_path"]).stem
        shift, scale = pickled(exported / "obj_models" / "mug_meta.pkl")[name]
        mesh = trimesh.load(source / record["object_path"], process=False)
        radius, diagonal = mesh.extents[1] / 2, np.linalg.norm(mesh.extents)
        axis = mesh.bounds[0, 0] + radius  # along x, where the handle is
        assert 0.008 < mesh.bounds[:, 0].mean() - axis < 0.03
        assert diagonal * shift[0] == pytest.approx(mesh.bounds[:, 0].mean() - axis, abs=0.001)
        reach = 2 * np.array([mesh.bounds[1, 0] - axis, mesh.extents[2] / 2, radius])
        assert diagonal / scale == pytest.approx(np.linalg.norm(reach), rel=0.01)


def test_a_whole_number_of_scenes_can_stand_beside_others(source, tmp_path, capsys):
    words = ["--format", "nocs", str(source)]
    run([*words, str(tmp_path / "beside"), "--first-scene", "27500"])
    said = capsys.readouterr().out
    assert "10 records -> " in said and "2 left out: they do not fill a scene of 10" in said
    assert os.listdir(tmp_path / "beside/CAMERA/train") == ["27500"]
    assert not (tmp_path / "beside/obj_models/mug_meta.pkl").exists()
    for stem in ("color.png", "meta.txt"):
        assert len(list((tmp_path / "beside/CAMERA/train/27500").glob(f"*_{stem}"))) == 10


def test_too_few_records_for_a_scene_are_refused_and_counted(export_source, tmp_path):
    with pytest.raises(ValueError, match="no record for nocs(\n.*)*\n  3 left out: they do not fill a scene of 10"):
        export_folders([export_source], "nocs", tmp_path / "out")
    assert not list(tmp_path.iterdir())


# --- pictures, poses, models ---


def test_models_at_their_labels_give_the_stored_silhouettes(exported, source):
    for stem, record in zip(listed(exported, "CAMERA")[:4], records_of(source)[:4], strict=True):  # one a class
        label = pickled(Path(f"{stem}_label.pkl"))
        vertices, mesh, fields = model_of(exported, stem)
        shift, factor = pickled(exported / "obj_models/mug_meta.pkl").get(fields[3], [0, 1])
        moved = factor * (vertices + shift)
        points = label["scales"][0] * moved @ label["rotations"][0].T + label["translations"][0]
        size = record["height"]
        small = np.array([[FX * size / 480, 0, (size - 1) / 2], [0, FX * size / 480, (size - 1) / 2], [0, 0, 1]])
        stored = load_object_mask(source, record)
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
    for stem in listed(exported, "CAMERA"):
        vertices, mesh, fields = model_of(exported, stem)
        assert mesh.volume > 0  # faces outward in the file
        size = np.subtract(*np.loadtxt(Path(exported, "obj_models/train", fields[2], fields[3], "bbox.txt")))
        assert np.linalg.norm(size) == pytest.approx(1, abs=1e-5) and (size > 0).all()
        np.testing.assert_allclose(size, mesh.extents, atol=1e-5)
        label = pickled(Path(f"{stem}_label.pkl"))
        up_in_camera = label["rotations"][0] @ [0, 1, 0]
        assert up_in_camera[1] < 0  # the camera stands above the horizon and upright: y points down in pictures
        if fields[1] == "6":
            assert vertices[vertices[:, 0] > 0.3 * size[0]][:, 2].std() < 0.3 * vertices[:, 2].std()  # a thin handle
        if fields[1] == "1":
            assert size[1] > 1.5 * max(size[0], size[2])


def test_the_picture_lies_in_the_middle_of_the_frame(exported, source):
    for stem, record in zip(listed(exported, "CAMERA"), records_of(source), strict=True):
        color = np.array(Image.open(f"{stem}_color.png"))
        picture = Image.open(source / record["file_name"])
        assert color.shape == (480, 640, 3)
        back = np.asarray(Image.fromarray(color[:, 80:560]).resize(picture.size, Image.Resampling.BOX), float)
        assert np.corrcoef(back.ravel(), np.asarray(picture, float).ravel())[0, 1] > 0.95
        assert np.abs(np.diff(color[:, :60].astype(int), axis=1)).mean() < 1  # the sides are blurred


def test_a_folder_made_with_another_camera_is_refused_and_says_what_to_do(source):
    records = [record | {"intrinsics": [500.0, *record["intrinsics"][1:]]} for record in records_of(source)]
    assert "focal length 192.5 px at a height of 160" in nocs.unfit_for_nocs(records[0])
    assert "make_dataset.py --camera nocs" in nocs.unfit_for_nocs(records[0])
