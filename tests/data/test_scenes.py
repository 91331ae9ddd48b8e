"""Scenes that people bring: their camera, pose and grasp hold to half a pixel, and what cannot be meant is refused."""

import io
import json
import pickle
import re
import resource
from pathlib import Path

import numpy as np
import pytest
import real_layouts
import trimesh
from PIL import Image, ImageDraw
from scipy.spatial.transform import Rotation

import make_dataset
import video
from hoi.data.folder import load_mesh, read_records
from hoi.data.scenes import SceneFile
from hoi.export import __main__ as export
from hoi.geometry.camera import Camera, look_at, make_intrinsics, project, transform_points
from hoi.geometry.hand import MANO_TO_OPENPOSE, HandModel, HandParams, load_hand, mirrored_hand, pca_to_hand_pose
from hoi.geometry.mano import read_pca
from hoi.geometry.objects import load_object, make_object
from hoi.geometry.scene import Scene, ViewSettings, grasp_object, mirror_mesh
from hoi.network.config import tiny_config
from hoi.toyworld.shading import fall_on_plane

ROOT = Path(__file__).parent.parent.parent
K = {"fx": 615.3, "fy": 615.1, "cx": 321.7, "cy": 238.9}  # of a RealSense at 640 x 480
VIEW = ViewSettings(96, 96)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory, hand) -> Path:
    """A folder with jar.glb, in millimetres, y up, away from its origin, and the joints of a grasp of it, in metres."""
    folder = tmp_path_factory.mktemp("workshop")
    jar = trimesh.creation.cylinder(32, 110, sections=40)
    jar.apply_transform(trimesh.transformations.rotation_matrix(-np.pi / 2, [1, 0, 0]))
    knob = trimesh.creation.box([14, 20, 30], trimesh.transformations.translation_matrix([40, 10, 0]))
    body = trimesh.util.concatenate([jar, knob])
    body.apply_translation([120, 300, -45])
    body.export(folder / "jar.glb")
    mesh = load_object(folder / "jar.glb", units="mm")
    to_file = np.linalg.inv(mesh.file_to_canonical)
    to_file[:3] /= 1000  # the file's axes and origin, in metres
    grasp = grasp_object(mesh, hand, 1, 0, folder / "cache", ("right",)).right[0]
    joints = transform_points(to_file, hand(grasp.hand_params).keypoints_3d)
    left = grasp_object(mirror_mesh(mesh), hand, 1, 0, folder / "cache", ("right",)).right[0]
    left_joints = transform_points(to_file, hand(mirrored_hand(left.hand_params)).keypoints_3d)
    (folder / "joints.json").write_text(json.dumps([joints.round(4).tolist(), left_joints.round(4).tolist()]))
    return folder


def pose_of_camera() -> np.ndarray:
    """Of the jar's file frame in metres: y is up."""
    return look_at(np.array([0.42, 0.48, 0.30]), np.array([0.12, 0.31, -0.04]), np.array([0.0, 1.0, 0.0]))


def line(workshop: Path, **more) -> dict:
    """A whole line; a value None leaves a key out."""
    joints, _ = json.loads((workshop / "joints.json").read_text())
    spec = {
        "object": "jar.glb", "units": "mm",
        "camera": {"intrinsics": K, "width": 640, "height": 480, "object_to_camera": pose_of_camera().tolist()},
        "hand": {"joints": joints, "order": "openpose", "side": "right"},
    } | more  # fmt: skip
    return {key: value for key, value in spec.items() if value is not None}


def changed(spec: dict, **more) -> dict:
    return {key: value for key, value in (spec | more).items() if value is not None}


def write(workshop: Path, name: str, *lines: dict) -> Path:
    path = workshop / name
    path.write_text("".join(json.dumps(one) + "\n" for one in lines))
    return path


def scene_of(workshop: Path, hand: HandModel, renderer, one: dict) -> Scene:
    return scenes_of(workshop, hand, one).scene(0, hand, renderer)


def scenes_of(workshop: Path, hand: HandModel, *lines: dict) -> SceneFile:
    return SceneFile(write(workshop, "some.jsonl", *lines), hand, VIEW, 0, workshop / "cache")


def pixels_of(points: np.ndarray, pose: np.ndarray, k: dict) -> np.ndarray:
    """(N, 3) -> (N, 2), written out here: this file's own projection."""
    x, y, z = (points @ np.asarray(pose)[:3, :3].T + np.asarray(pose)[:3, 3]).T
    return np.stack([k["fx"] * x / z + k["cx"], k["fy"] * y / z + k["cy"]], axis=1)


def silhouette(pixels: np.ndarray, faces: np.ndarray, width: int, height: int) -> np.ndarray:
    """Pixels whose centre a face covers, by polygons on a canvas eight times as large."""
    canvas = Image.new("1", (8 * width, 8 * height))
    draw = ImageDraw.Draw(canvas)
    for face in faces:
        draw.polygon([tuple(8 * pixels[corner] + 3.5) for corner in face], fill=1)
    return np.asarray(canvas)[4::8, 4::8]


def test_a_realsense_scene_of_a_glb_in_millimetres_reprojects_from_its_exports_onto_its_picture(workshop, tmp_path):
    path = write(workshop, "realsense.jsonl", line(workshop))
    words = ["--scenes", path, "--shade", "--out", tmp_path / "made", "--cache", workshop / "cache"]
    make_dataset.run([*map(str, words)])
    assert make_dataset.check_folder(tmp_path / "made").ok
    for name in ("bop", "coco"):
        export.run(["--format", name, str(tmp_path / "made"), str(tmp_path / name)])
    # From here on only the scenes file, the user's mesh and the exports.
    spec = json.loads(path.read_text())
    k, given = spec["camera"]["intrinsics"], np.array(spec["camera"]["object_to_camera"])
    mesh = trimesh.load(workshop / spec["object"], force="mesh")
    wanted = pixels_of(mesh.vertices / 1000, given, k)
    scene = tmp_path / "bop" / "train" / "000000"
    truth = json.loads((scene / "scene_gt.json").read_text())["0"][0]
    camera = json.loads((scene / "scene_camera.json").read_text())["0"]
    assert np.reshape(camera["cam_K"], (3, 3))[[0, 1, 0, 1], [0, 1, 2, 2]] == pytest.approx([*k.values()])
    pose = np.column_stack([np.reshape(truth["cam_R_m2c"], (3, 3)), truth["cam_t_m2c"]])
    assert np.abs(pixels_of(mesh.vertices, pose, k) - wanted).max() < 0.01
    annotations = json.loads((tmp_path / "coco" / "annotations.json").read_text())["annotations"]
    person, thing = sorted(annotations, key=lambda one: one["category_id"])
    pose = np.reshape(thing["object_to_camera"], (4, 4))
    assert np.abs(pixels_of(mesh.vertices / 1000, pose, k) - wanted).max() < 0.01
    with Image.open(scene / "mask" / "000000_000000.png") as picture:
        mask = np.asarray(picture) > 0
    assert mask.shape == (480, 640)
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    edges = [columns[0] - 0.5, rows[0] - 0.5, columns[-1] + 0.5, rows[-1] + 0.5]  # of the mask's outermost pixels
    assert np.abs(np.concatenate([wanted.min(axis=0), wanted.max(axis=0)]) - edges).max() <= 0.51
    drawn = silhouette(wanted, mesh.faces, 640, 480)
    assert (drawn & mask).sum() / (drawn | mask).sum() > 0.995
    joints = pixels_of(np.array(spec["hand"]["joints"]), given, k)
    keypoints = np.reshape(person["keypoints"], (21, 3))
    seen = keypoints[:, 2] > 0
    assert seen.sum() > 15 and np.abs(keypoints[seen, :2] - joints[seen]).max() < 1


def test_records_keep_the_users_frame_and_tell_how_the_grasp_measures(workshop, tmp_path):
    deep = np.array(line(workshop)["hand"]["joints"]) + [0, 0, 0.02]
    lines = [line(workshop), line(workshop, hand={"joints": deep.tolist(), "order": "mediapipe", "side": "right"})]
    path = write(workshop, "deep.jsonl", *lines)
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdout", out)
        words = ["--scenes", path, "--out", tmp_path, "--cache", workshop / "cache"]
        make_dataset.run([*map(str, words)])
    good, bad = read_records(tmp_path)
    np.testing.assert_allclose(np.reshape(good["object_to_camera"], (4, 4)), pose_of_camera(), atol=1e-6)
    vertices, _ = load_mesh(tmp_path, good)
    file = trimesh.load(workshop / "jar.glb", force="mesh")
    np.testing.assert_allclose(vertices.min(axis=0), file.vertices.min(axis=0) / 1000, atol=1e-6)
    assert max(good["joint_residual_mm"]) < 1 and len(good["joint_residual_mm"]) == 21
    assert good["contact"] and good["grasp"]["force_closure"] and good["penetration_mm"] < 1
    assert bad["penetration_mm"] > 5 and "goes more than 2 mm into the object" in bad["grasp"]["faults"]
    assert "kept as they are" in out.getvalue() and "line 2: the hand goes more than 2 mm" in out.getvalue()


def test_the_same_scene_in_other_words_is_the_same(workshop, hand, renderer):
    pose, joints = pose_of_camera(), np.array(line(workshop)["hand"]["joints"])
    camera = line(workshop)["camera"]
    world = np.eye(4)
    world[:3, :3], world[:3, 3] = Rotation.from_rotvec([0.2, 0.9, -1.3]).as_matrix(), [1, 2, 3]
    mano = np.empty((21, 3))
    mano[list(MANO_TO_OPENPOSE)] = joints
    told = {"order": "openpose", "side": "right"}
    first = scene_of(workshop, hand, renderer, line(workshop))
    others = [
        line(workshop, camera=camera | {"object_to_camera": (np.diag([1, -1, -1, 1.0]) @ pose).tolist(),
                                        "convention": "opengl"},
             hand=told | {"joints": transform_points(pose, joints).tolist(), "frame": "camera"}),
        line(workshop, camera=changed(camera, object_to_camera=None, world_to_camera=pose.ravel().tolist()),
             hand=told | {"joints": mano.tolist(), "order": "mano"}),
        line(workshop, object_to_world=world.tolist(), hand=told | {"joints": joints.tolist(), "frame": "object"}),
        line(workshop, object_to_world=world.tolist(),
             camera=changed(camera, object_to_camera=None, world_to_camera=(pose @ np.linalg.inv(world)).tolist()),
             hand=told | {"joints": transform_points(world, joints).tolist()}),
    ]  # fmt: skip
    for other in others:
        scene = scene_of(workshop, hand, renderer, other)
        np.testing.assert_allclose(scene.camera.world_to_camera, first.camera.world_to_camera, atol=1e-9)
        points = hand(scene.hand_params[-1]).keypoints_3d
        np.testing.assert_allclose(points, hand(first.hand_params[-1]).keypoints_3d, atol=2e-4)


def test_a_left_hand_is_fitted_and_measured_as_a_left_hand(workshop, hand, renderer):
    _, joints = json.loads((workshop / "joints.json").read_text())
    spec = line(workshop, hand={"joints": joints, "order": "openpose", "side": "left"})
    scene = scene_of(workshop, hand, renderer, spec)
    assert scene.hand_params[-1].hand_side == "left" and scene.grasp.force_closure
    assert scene.grasp.penetration_mm < 1 and max(scene.entries[-1]["joint_residual_mm"]) < 1


def test_a_lens_alone_gets_views_that_show_hand_and_object(workshop, hand, renderer):
    lens = {"intrinsics": [[1400, 0, 320], [0, 1400, 240], [0, 0, 1]], "width": 640, "height": 480}
    scenes = scenes_of(workshop, hand, line(workshop, camera=lens, hand=None, grasps=2))
    scenes = pickle.loads(pickle.dumps(scenes))  # as every worker process gets it
    assert len(scenes) == 2 and scenes.sizes == [(480, 640)] * 2
    for number in range(2):
        scene = scenes.scene(number, hand, renderer)
        share = [(scene.last_gbuffer.label_map == label).mean() for label in (1, 2)]
        assert scene.camera.intrinsics[0, 0] == 1400 and min(share) > 0.015
    assert not np.array_equal(scene.hand_params[0].transl, scenes.scene(0, hand, renderer).hand_params[0].transl)


def test_a_trajectory_is_shown_as_given_and_an_approach_begins_where_it_is_told(workshop, hand, renderer, tmp_path):
    joints = np.array(line(workshop)["hand"]["joints"])
    told = {"order": "openpose", "side": "right"}
    away = [told | {"joints": (joints + [0, 0.13 * k, 0.02 * k]).tolist()} for k in (2, 1, 0)]
    start = (joints[0] + [0.02, 0.2, 0.1]).tolist()
    lines = line(workshop, hand=None, trajectory=away), line(workshop, start=start)
    path = write(workshop, "paths.jsonl", *lines)
    words = ["--scenes", path, "--frames", "4", "--out", tmp_path, "--cache", workshop / "cache"]
    make_dataset.run([*map(str, words)])
    records = read_records(tmp_path)
    assert [(r["trajectory"], r["frame"]) for r in records] == [(0, 0), (0, 1), (0, 2), *((1, k) for k in range(4))]
    to_mesh = np.linalg.inv(pose_of_camera())
    wrists = [transform_points(to_mesh, np.reshape(r["keypoints_3d"], (21, 3))[0]) for r in records]
    np.testing.assert_allclose(wrists[:3], [one["joints"][0] for one in away], atol=1e-3)
    np.testing.assert_allclose(wrists[3], start, atol=1e-5)
    assert [r["contact"] for r in records[:3]] == [False, False, True]
    args = video.parse_args(["--scenes", str(path), "--scene", "0", "--cache", str(workshop / "cache")])
    frames = video.choose_frames(args, tiny_config())
    assert len(frames) == 3 and frames.size == (480, 640) and not frames.bent


def test_searched_hands_stay_above_a_support_and_of_a_given_one_it_is_told(workshop, hand, renderer):
    mesh = load_object(workshop / "jar.glb", units="mm")
    # The jar lies on its side: what is up for the file is level.
    floor = {"point": [0.12, 0.3, -0.045 - 0.0321], "normal": [0, 0, 1]}
    scene = scene_of(workshop, hand, renderer, line(workshop, hand=None, support=floor))
    height = transform_points(np.linalg.inv(scene.file_to_world), hand(scene.hand_params[-1]).vertices)[:, 2]
    assert height.min() > -0.0771 and scene.entries[-1]["below_support_mm"] == 0
    joints = np.array(line(workshop)["hand"]["joints"])
    lowest = joints[:, 1].min()
    above = {"point": [0, min(lowest + 0.01, 0.2449), 0], "normal": [0, 1, 0]}
    moved = joints + [0, above["point"][1] - lowest - 0.01, 0]  # a joint 10 mm below it
    scene = scene_of(workshop, hand, renderer, line(
        workshop, support=above, hand={"joints": moved.tolist(), "order": "openpose", "side": "right"}))  # fmt: skip
    assert scene.entries[-1]["below_support_mm"] > 9
    assert mesh.vertices.shape == scene.object_mesh.vertices.shape


CAMERA = {"intrinsics": K, "width": 640, "height": 480}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objekt": 1}, "line 2 has unknown keys objekt; it may have object, units"),
        ({"object": None}, "line 2 has no object"),
        ({"object": "other.glb"}, "line 2 object: .*other.glb: no such file"),
        ({"camera": {"intrinsics": K, "width": 640}}, "line 2 camera has no height"),
        ({"camera": CAMERA | {"fov": 60}}, "line 2 camera has unknown keys fov"),
        ({"camera": CAMERA | {"intrinsics": {"fx": 1, "fy": 1, "cx": 1}}}, "camera intrinsics has no cy"),
        ({"camera": CAMERA | {"width": 1280, "height": 720}}, "those of pictures of another size"),
        ({"camera": CAMERA | {"object_to_camera": np.diag([1, 1, -1, 1]).tolist()}}, "is left-handed"),
        ({"camera": CAMERA | {"object_to_camera": np.diag([2, 2, 2, 1]).tolist()}}, "scales by 2, expected a rotation"),
        ({"camera": CAMERA | {"object_to_camera": np.diag([-1.0, 1, -1, 1]).tolist()}}, "camera looks away: no point"),
        ({"camera": CAMERA | {"convention": "blender"}}, "convention is 'blender', expected one of opencv, opengl"),
        ({"hand": {"joints": [[0, 0]] * 21, "order": "mano", "side": "right"}}, r"hand joints is \(21, 2\), expected"),
        ({"hand": {"joints": "mm", "order": "openpose", "side": "right"}}, "joints are in millimetres, as it seems"),
        ({"hand": {"joints": "same", "order": "mano", "side": "right"}}, "their bones are those of a hand in openpose"),
        ({"hand": {"joints": "same", "side": "right"}}, "line 2 hand has no order"),
        ({"hand": {"joints": "same", "order": "openpose"}}, "hand side is None, expected one of right, left"),
        ({"hand": {"global_orient": [0, 0, 0], "transl": [0, 0, 0], "side": "left"}}, "needs hand_pose .* or pca"),
        ({"hand": {"global_orient": [0, 0, 0], "transl": [0, 0, 0], "side": "left", "pca": [1],
                   "flat_hand_mean": False}}, "only MANO's own file explains: pass --mano"),
        ({"hand": {"global_orient": [0, 0, 0], "transl": [0, 0, 0], "side": "left", "pca": [[1]]}},
         r"hand pca is \(1, 1\), expected \(1,\)"),
        ({"grasps": 2}, "line 2 has hand and grasps; give one"),
        ({"support": {"point": [0, 0.4, 0], "normal": [0, 1, 0]}}, "the mesh reaches .* mm below its support"),
        ({"support": {"point": [0, 0.4, 0], "normal": [0, 0, 0]}}, "support normal is .* expected a direction"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused_by_line_and_key(workshop, hand, change, message):
    joints = np.array(line(workshop)["hand"]["joints"])
    given = (change.get("hand") or {}).get("joints")
    if isinstance(given, str):
        change = {"hand": change["hand"] | {"joints": ((1000 if given == "mm" else 1) * joints).tolist()}}
    with pytest.raises((ValueError, FileNotFoundError), match=re.compile(message, re.DOTALL)):
        scenes_of(workshop, hand, line(workshop), line(workshop, **change))


def test_joints_that_our_hand_cannot_have_are_refused(workshop, hand, renderer):
    right, left = json.loads((workshop / "joints.json").read_text())
    long = [*right[:8], [x + 0.03 for x in right[8]], *right[9:]]  # the tip of the index finger, 52 mm away
    for joints, message in ((left, "a right hand would bend its fingers backwards"), (long, "our hand misses joint 8")):
        spec = line(workshop, hand={"joints": joints, "order": "openpose", "side": "right"})
        with pytest.raises(ValueError, match=f"some.jsonl line 1: {message}"):
            scene_of(workshop, hand, renderer, spec)


def test_the_documented_example_runs_and_ends_the_same_when_run_again(tmp_path, workshop, capsys):
    words = ["--scenes", str(ROOT / "docs" / "example_scenes.jsonl"), "--out", str(tmp_path / "out")]
    words += ["--cache", str(workshop / "cache")]
    make_dataset.run(words)
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    make_dataset.run(words)
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before
    assert len(read_records(tmp_path / "out")) == 4 and make_dataset.check_folder(tmp_path / "out").ok
    with pytest.raises(SystemExit, match="scenes: other content|records of another job"):
        other = write(workshop, "other.jsonl", line(workshop))
        make_dataset.run(["--scenes", str(other), *words[2:]])


@pytest.mark.slow
def test_a_hundred_thousand_lines_are_streamed(workshop, hand):
    text = json.dumps(line(workshop)) + "\n"
    path = workshop / "many.jsonl"
    with open(path, "w") as stream:
        for _ in range(100_000):
            stream.write(text)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    scenes = SceneFile(path, hand, VIEW, 0, workshop / "cache")
    assert len(scenes) == 100_000 and scenes.line(99_999, hand).where.endswith("line 100000")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kilobytes
    path.unlink()


def test_shadows_fall_on_the_support_where_the_lamp_throws_them(renderer):
    can = make_object("can", 0)
    pose = look_at(np.array([0.5, 0.0, 0.4]), np.array([0.0, 0.0, -0.1]), np.array([0.0, 0.0, 1.0]))
    camera = Camera(make_intrinsics(240, 320), pose, 240, 320)
    gbuffer = renderer.render(None, None, can.vertices, can.faces, camera)
    for lamp in ([0, 0, 1.0], [0, 0.6, 0.8]):  # above, and 37 degrees aside
        image = np.ones((240, 320, 3), np.float32)
        fall_on_plane(image, gbuffer, camera, pose[:3, :3] @ lamp, -0.15)
        under = np.array([0.0, -0.15 * lamp[1] / lamp[2], -0.15])
        (x, y), (far_x, far_y) = project(transform_points(pose, np.stack([under, under + [0, 0.12, 0]])),
                                         camera.intrinsics).round().astype(int)  # fmt: skip
        assert image[y, x, 0] < 0.5 and image[far_y, far_x, 0] > 0.98


def test_mano_parameters_are_read_with_and_without_the_mean_pose(workshop, tmp_path):
    _, path = real_layouts.write_mano(tmp_path)
    hand = load_hand(path)
    components, mean = read_pca(path, "right")
    told = {"side": "right", "global_orient": [0.1, 0.2, 0.3], "transl": [0.1, 0.35, 0.0], "betas": [0.5] + [0.0] * 9}
    pose = pca_to_hand_pose(np.array([0.3, -0.2]), components, mean)
    words = [{"hand_pose": pose.tolist()}, {"hand_pose": (pose - mean).tolist(), "flat_hand_mean": False},
             {"pca": [0.3, -0.2], "flat_hand_mean": False}]  # fmt: skip
    lines = write(workshop, "mano.jsonl", *(line(workshop, hand=told | more) for more in words))
    scenes = SceneFile(lines, hand, VIEW, 0, workshop / "cache", mano_path=path)
    wanted = hand(HandParams(told["global_orient"], pose, told["transl"], told["betas"])).keypoints_3d
    for number in range(3):
        read = scenes.line(number, hand)
        posed, off = scenes._posed(read.hands[0], "", hand, {"world": read.to_canonical})
        points = transform_points(np.linalg.inv(read.to_canonical), hand(posed).keypoints_3d)
        np.testing.assert_allclose(points, wanted, atol=1e-5)
        assert off is None
