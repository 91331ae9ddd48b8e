"""The hand against a plain numpy formulation of MANO, and the reader against files of the official structure."""

import os
import pickle
import sys
import types

import numpy as np
import pytest
import smplx
import torch
import trimesh
from real_layouts import PARENTS, mano_in_numpy
from scipy.spatial.transform import Rotation

from hoi.geometry.hand import (
    BUILTIN_HAND,
    FINGER_JOINTS,
    HandParams,
    joint_axes,
    load_hand,
    mirrored_hand,
    pca_to_hand_pose,
)
from hoi.geometry.mano import read_mano, read_pca


@pytest.fixture(scope="module")
def hand():
    return load_hand()


def make_pose(hand_pose=None, hand_betas=None, **others):
    values = {"global_orient": np.zeros(3), "transl": np.zeros(3), **others}
    fingers = np.zeros(45) if hand_pose is None else np.asarray(hand_pose).reshape(45)
    return HandParams(hand_pose=fingers, hand_betas=np.zeros(10) if hand_betas is None else hand_betas, **values)


def random_pose(seed, **others):
    generator = np.random.default_rng(seed)
    return make_pose(generator.normal(size=45) * 0.4, generator.normal(size=10), global_orient=generator.normal(size=3),
                     transl=generator.normal(size=3) * 0.3, **others)


@pytest.fixture(scope="module")
def official():
    """Random arrays with MANO's sizes; fingers towards -x, as on the right hand."""
    generator = np.random.default_rng(3)
    vertices = generator.uniform(-0.1, 0.1, (778, 3))
    vertices = vertices[np.argsort(-vertices[:, 0])]
    regressor = np.zeros((16, 778))
    regressor[0, :30] = 1 / 30
    for joint in range(1, 16):
        regressor[joint, generator.choice(np.arange(400, 778), 40, replace=False)] = 1 / 40
    weights = generator.uniform(size=(778, 16)) ** 6
    tree = np.array([[4294967295, *PARENTS[1:]], range(16)], dtype=np.int64)
    return {
        "v_template": vertices, "f": generator.integers(0, 778, (1538, 3)).astype(np.uint32),
        "shapedirs": generator.normal(size=(778, 3, 10)) * 3e-3,
        "posedirs": generator.normal(size=(778, 3, 135)) * 1e-3,
        "J_regressor": regressor, "weights": weights / weights.sum(axis=1, keepdims=True), "kintree_table": tree,
        "hands_components": np.linalg.qr(generator.normal(size=(45, 45)))[0],
        "hands_mean": generator.normal(size=45) * 0.2,
    }


class Stateful:
    """Base of the stand-ins for chumpy's and SciPy's classes: pickles as (class, state), like the real ones."""

    def __init__(self, **state):
        self.__dict__.update(state)


def write_official_pickle(path, arrays, monkeypatch, **changes):
    """The structure of MANO_RIGHT.pkl: protocol 2, shapes as a chumpy selection of 20, a sparse regressor."""
    classes = {}
    for module, name in (("chumpy.ch", "Ch"), ("chumpy.reordering", "Select"), ("scipy.sparse.csc", "csc_matrix")):
        classes[name] = type(name, (Stateful,), {"__module__": module})
        fake = types.ModuleType(module)
        setattr(fake, name, classes[name])
        monkeypatch.setitem(sys.modules, module, fake)
    monkeypatch.setitem(sys.modules, "chumpy", types.ModuleType("chumpy"))
    all_shapes = np.concatenate([arrays["shapedirs"], np.full((778, 3, 10), 9.0)], axis=2)
    wanted = np.arange(all_shapes.size).reshape(all_shapes.shape)[:, :, :10].ravel()
    columns, rows = np.nonzero(arrays["J_regressor"].T)
    fields = {
        **arrays,
        "shapedirs": classes["Select"](
            a=classes["Ch"](x=all_shapes, _depends_on_deps=set()), idxs=wanted, preferred_shape=(778, 3, 10)
        ),
        "J_regressor": classes["csc_matrix"](
            _shape=(16, 778), data=arrays["J_regressor"][rows, columns], indices=rows.astype(np.int32), maxprint=50,
            indptr=np.searchsorted(columns, np.arange(779)).astype(np.int32),
        ),
        "hands_coeffs": np.zeros((1554, 45)), "J": np.zeros((16, 3)), "bs_style": "lbs", "bs_type": "lrotmin",
    }
    fields.update(changes)
    path.write_bytes(pickle.dumps({key: value for key, value in fields.items() if value is not None}, protocol=2))
    monkeypatch.undo()
    return path


def test_the_official_structure_is_read_without_chumpy_and_every_array_comes_back(official, tmp_path, monkeypatch):
    path = write_official_pickle(tmp_path / "MANO_RIGHT.pkl", official, monkeypatch)
    assert "chumpy" not in sys.modules
    arrays = read_mano(tmp_path)
    for name, value in official.items():
        if name != "kintree_table":
            np.testing.assert_array_equal(arrays[name], value, err_msg=name)
    assert arrays["kintree_table"][0].tolist() == list(PARENTS)
    assert b"chumpy.reordering" in path.read_bytes() and b"scipy.sparse.csc" in path.read_bytes()


@pytest.mark.parametrize("call", [(os.system, "touch {marker}"), (eval, "open('{marker}', 'w')"), (exec, "raise 1")])
def test_a_pickle_that_names_a_function_is_refused_and_nothing_runs(call, official, tmp_path, monkeypatch):
    marker = tmp_path / "ran"

    class Malicious:
        def __reduce__(self):
            return call[0], (call[1].format(marker=marker),)

    path = write_official_pickle(tmp_path / "MANO_RIGHT.pkl", official, monkeypatch, bs_style=Malicious())
    with pytest.raises(ValueError, match=rf"names \w+\.{call[0].__name__}.*Nothing in it was run"):
        read_mano(path)
    assert not marker.exists()


@pytest.mark.parametrize(("change", "message"), [
    ({"weights": None}, "has no weights"),
    ({"posedirs": np.zeros((778, 3, 9))}, r"posedirs has shape \(778, 3, 9\), expected \(778, 3, 135\)"),
    ({"v_template": np.full((778, 3), np.nan)}, "v_template contains NaN"),
    ({"f": np.full((1538, 3), 778)}, "names vertex 778"),
])
def test_a_damaged_mano_file_says_which_array_is_wrong(change, message, official, tmp_path, monkeypatch):
    path = write_official_pickle(tmp_path / "MANO_RIGHT.pkl", official, monkeypatch, **change)
    with pytest.raises(ValueError, match=message):
        read_mano(path)


def test_a_missing_file_and_a_cut_one_are_refused_with_what_to_do(official, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="mano.is.tue.mpg.de.*licence forbids.*built-in hand is used"):
        load_hand(tmp_path / "MANO_RIGHT.pkl")
    path = write_official_pickle(tmp_path / "cut.pkl", official, monkeypatch)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match="cannot be read as a MANO pickle"):
        read_mano(path)


def left_of(right):
    """A left hand as a model of its own: the mirrored template; what the other arrays must be follows from that."""
    point, turn = np.array([-1.0, 1.0, 1.0]), np.tile([1.0, -1.0, -1.0], 15)
    left = {**right, "v_template": right["v_template"] * point, "f": right["f"][:, ::-1]}
    left["shapedirs"] = right["shapedirs"] * point[:, None]
    # Offsets of the left hand in pose (t1 ... t15) mirror those of the right hand in the mirrored pose.
    matrix = right["posedirs"].reshape(778, 3, 15, 3, 3)
    left["posedirs"] = np.einsum("i,a,b,vikab->vikab", point, point, point, matrix).reshape(778, 3, 135)
    left["hands_components"], left["hands_mean"] = right["hands_components"] * turn, right["hands_mean"] * turn
    return left


def as_published(left):
    """MANO_LEFT.pkl has the x of the shape directions as on the right hand."""
    return {**left, "shapedirs": left["shapedirs"] * np.array([-1.0, 1.0, 1.0])[:, None]}


def smplx_mano(arrays, **options):
    options = {"use_pca": False, "flat_hand_mean": True, **options}
    fields = {**arrays, "f": arrays["f"].astype(np.int64)}
    return smplx.MANO(model_path="", data_struct=smplx.utils.Struct(**fields), **options)


def tensors(**arrays):
    return {name: torch.tensor(np.asarray(value)[None], dtype=torch.float32) for name, value in arrays.items()}


@pytest.mark.parametrize("container", ["MANO_LEFT.pkl", "left.npz"])
def test_a_left_file_alone_is_refused_with_the_one_to_give(container, official, tmp_path, monkeypatch):
    if container.endswith("npz"):
        np.savez(tmp_path / container, **as_published(left_of(official)))
    else:
        write_official_pickle(tmp_path / container, as_published(left_of(official)), monkeypatch)
    for place in (tmp_path / container, tmp_path)[: 1 + container.endswith("pkl")]:
        with pytest.raises(ValueError, match=f"{container} is a left hand, .*give MANO_RIGHT.pkl"):
            load_hand(place)


def test_a_folder_with_both_files_uses_the_right_one_for_the_hand_and_each_for_its_own_pose_space(
    official, tmp_path, monkeypatch
):
    left = left_of(official)
    left["hands_components"], left["hands_mean"] = np.eye(45)[::-1], np.full(45, 0.3)
    write_official_pickle(tmp_path / "MANO_LEFT.pkl", as_published(left), monkeypatch)
    np.testing.assert_array_equal(  # alone, it serves the right side mirrored
        read_pca(tmp_path, "right")[1].reshape(15, 3), np.tile([0.3, -0.3, -0.3], (15, 1))
    )
    path = write_official_pickle(tmp_path / "MANO_RIGHT.pkl", official, monkeypatch)
    np.testing.assert_array_equal(load_hand(tmp_path)(make_pose()).vertices, load_hand(path)(make_pose()).vertices)
    for place in (tmp_path, path):
        for hand_side, arrays in (("right", official), ("left", left)):
            components, mean = read_pca(place, hand_side)
            np.testing.assert_array_equal(components, arrays["hands_components"])
            np.testing.assert_array_equal(mean, arrays["hands_mean"])


@pytest.mark.parametrize("hand_side", ["right", "left"])
@pytest.mark.parametrize("count", [6, 15, 44, 45])
def test_pca_coefficients_with_mean_become_the_pose_that_smplx_makes_of_them(count, hand_side, official, tmp_path):
    np.savez(tmp_path / "mano.npz", **official)
    generator = np.random.default_rng(count)
    coefficients, others = generator.normal(size=count), random_pose(4, hand_side=hand_side)
    pose = make_pose(pca_to_hand_pose(coefficients, *read_pca(tmp_path / "mano.npz", hand_side)), others.hand_betas,
                     global_orient=others.global_orient, transl=others.transl, hand_side=hand_side)
    arrays = official if hand_side == "right" else left_of(official)
    model = smplx_mano(arrays, use_pca=True, num_pca_comps=count, flat_hand_mean=False)
    assert model.use_pca == (count != 45)
    if count == 45:  # smplx switches PCA off at this number; switched on by hand, it is what DexYCB's poses mean
        model.use_pca = True
        model.hand_components = torch.tensor(arrays["hands_components"], dtype=torch.float32)
    output = model(**tensors(betas=pose.hand_betas, global_orient=pose.global_orient, hand_pose=coefficients,
                             transl=pose.transl), return_full_pose=True)
    np.testing.assert_allclose(output.full_pose[0, 3:].numpy(), pose.hand_pose, atol=2e-6)
    mesh = load_hand(tmp_path / "mano.npz")(pose)
    np.testing.assert_allclose(mesh.vertices, output.vertices[0].numpy(), atol=3e-6)
    np.testing.assert_allclose(mesh.joints, output.joints[0].numpy(), atol=3e-6)


def test_zero_coefficients_are_the_mean_pose_and_one_is_its_axis(official):
    components, mean = official["hands_components"], official["hands_mean"]
    poses = pca_to_hand_pose(np.vstack([np.zeros(45), np.eye(45)]), components, mean)
    np.testing.assert_array_equal(poses[0], mean)
    np.testing.assert_allclose(poses[1:] - mean, components, atol=1e-15)


def test_wrong_pose_spaces_are_named(official, tmp_path):
    np.savez(tmp_path / "mano.npz", **{key: value for key, value in official.items() if key != "hands_mean"})
    with pytest.raises(ValueError, match="mano.npz has no hands_mean: PCA coefficients need both"):
        read_pca(tmp_path / "mano.npz", "left")
    with pytest.raises(ValueError, match="hand_side is 'both'"):
        read_pca(tmp_path / "mano.npz", "both")


@pytest.mark.parametrize("hand_side", ["right", "left"])
def test_a_mano_file_gives_manos_own_formula_on_both_sides(hand_side, official, tmp_path, monkeypatch, capsys):
    np.savez(tmp_path / "mano.npz", **official)
    from_npz = load_hand(tmp_path / "mano.npz")
    from_pickle = load_hand(write_official_pickle(tmp_path / "MANO_RIGHT.pkl", official, monkeypatch))
    pose = random_pose(5, hand_side=hand_side)
    mesh = from_pickle(pose)
    np.testing.assert_array_equal(mesh.vertices, from_npz(pose).vertices)
    arrays = dict(official)
    if hand_side == "left":  # pose blend shapes answer to the mirrored rotations
        signs = np.outer([-1, 1, 1], [-1, 1, 1]).ravel()
        arrays["posedirs"] = official["posedirs"] * np.tile(signs, 15)
    vertices, joints = mano_in_numpy(arrays, pose, mirror=hand_side == "left")
    np.testing.assert_allclose(mesh.vertices, vertices, atol=2e-6)
    np.testing.assert_allclose(mesh.joints, joints, atol=2e-6)
    assert from_pickle.name == "mano"
    assert capsys.readouterr().out == ""  # smplx's remarks are not the user's business


def test_stock_fingertips_of_mano_end_the_fingers(official, tmp_path):
    np.savez(tmp_path / "mano.npz", **official)
    mesh = load_hand(tmp_path / "mano.npz")(random_pose(1))
    np.testing.assert_array_equal(mesh.keypoints_3d[[4, 8, 12, 16, 20]], mesh.vertices[[744, 320, 443, 554, 671]])
    np.testing.assert_array_equal(mesh.keypoints_3d[[0, 1, 5, 9, 13, 17]], mesh.joints[[0, 13, 1, 4, 10, 7]])


@pytest.mark.parametrize("hand_side", ["right", "left"])
def test_the_builtin_hand_obeys_the_same_formula(hand, hand_side):
    with np.load(BUILTIN_HAND) as arrays:
        arrays = {key: arrays[key].astype(np.float64) for key in arrays.files}
    pose = random_pose(2, hand_side=hand_side)
    vertices, joints = mano_in_numpy(arrays, pose, mirror=hand_side == "left")
    np.testing.assert_allclose(hand(pose).vertices, vertices, atol=2e-6)
    np.testing.assert_allclose(hand(pose).joints, joints, atol=2e-6)


def test_a_batch_equals_its_members_beyond_one_chunk(hand):
    poses = [random_pose(seed) for seed in range(300)]
    names = ("global_orient", "hand_pose", "transl", "hand_betas")
    vertices, _, keypoints_3d = hand.pose_batch(*(np.stack([getattr(pose, name) for pose in poses]) for name in names))
    for k in (0, 255, 256, 299):
        mesh = hand(poses[k])
        np.testing.assert_allclose(vertices[k], mesh.vertices, atol=1e-6)
        np.testing.assert_allclose(keypoints_3d[k], mesh.keypoints_3d, atol=1e-6)
    shared = hand.pose_batch(np.zeros((7, 3)), np.zeros((7, 45)), np.zeros((7, 3)), poses[0].hand_betas)[1]
    np.testing.assert_allclose(shared[6], hand(make_pose(hand_betas=poses[0].hand_betas)).joints, atol=1e-6)


def test_the_skin_is_closed_outward_and_without_double_vertices_on_both_sides(hand):
    for hand_side in ("right", "left"):
        mesh = hand(make_pose(hand_side=hand_side))
        skin = trimesh.Trimesh(mesh.vertices, mesh.faces, process=False)
        assert skin.is_watertight and skin.is_winding_consistent and skin.euler_number == 2
        assert 330e-6 < skin.volume < 350e-6  # a third of a litre
    assert len(np.unique(mesh.vertices.round(7), axis=0)) == len(mesh.vertices) == 1159


def test_sizes_are_those_of_the_source_hand(hand):
    joints = hand(make_pose()).joints
    knuckles = 1e3 * np.linalg.norm(joints[[1, 4, 7, 10]] - joints[0], axis=1)
    np.testing.assert_allclose(knuckles, [91.9, 91.7, 82.9, 86.7], atol=0.1)


def test_keypoints_run_along_each_finger_from_thumb_to_little(hand):
    keypoints = hand(make_pose()).keypoints_3d
    fingers = keypoints[1:].reshape(5, 4, 3)
    along = np.linalg.norm(fingers - keypoints[0], axis=2)
    assert (np.diff(along, axis=1) > 0.005).all()
    assert (np.diff(fingers[:, 3, 2]) < -0.01).all()  # thumb at +z, little finger at -z
    assert (fingers[1:, 3, 0] < fingers[1:, 0, 0] - 0.05).all()  # fingers point to -x


def test_every_finger_owns_its_tip_and_nobody_the_wrist(hand):
    mesh = hand(make_pose())
    for finger, tip in enumerate(mesh.keypoints_3d[[4, 8, 12, 16, 20]]):
        near = np.linalg.norm(mesh.vertices - tip, axis=1) < 0.01
        assert (hand.finger_of_vertex[near] == finger).all()
    assert (hand.finger_of_vertex[mesh.vertices[:, 0] > mesh.joints[0, 0] + 0.005] == -1).all()
    assert set(hand.finger_of_vertex) == {-1, 0, 1, 2, 3, 4} and hand.finger_of_vertex.dtype == np.int8


def test_translation_moves_everything_by_the_same_vector_and_orientation_turns_about_the_wrist(hand):
    pose = random_pose(8)
    moved = make_pose(pose.hand_pose, pose.hand_betas, global_orient=pose.global_orient, transl=pose.transl + [1, 2, 3])
    np.testing.assert_allclose(hand(moved).vertices, hand(pose).vertices + [1, 2, 3], atol=1e-12)
    turned = hand(make_pose(global_orient=np.array([0.3, -0.8, 0.4])))
    rest = hand(make_pose())
    wrist = rest.joints[0]
    np.testing.assert_allclose(turned.joints[0], wrist, atol=1e-7)
    rotation = Rotation.from_rotvec([0.3, -0.8, 0.4])
    np.testing.assert_allclose(turned.vertices, rotation.apply(rest.vertices - wrist) + wrist, atol=1e-6)


def test_the_left_hand_is_the_mirror_image_and_mirroring_twice_is_nothing(hand):
    right = random_pose(11)
    left = mirrored_hand(right)
    assert left.hand_side == "left"
    for name in ("vertices", "joints", "keypoints_3d"):
        expected = getattr(hand(right), name) * [-1, 1, 1]
        np.testing.assert_allclose(getattr(hand(left), name), expected, atol=1e-12)
    np.testing.assert_array_equal(hand(left).faces, hand(right).faces[:, ::-1])
    back = mirrored_hand(left)
    assert back.hand_side == "right" and np.array_equal(back.hand_pose, right.hand_pose)
    assert np.array_equal(back.global_orient, right.global_orient) and np.array_equal(back.transl, right.transl)


def bend(hand, joint, axis, angle=0.5):
    hand_pose = np.zeros((15, 3))
    hand_pose[joint - 1] = angle * axis
    return hand(make_pose(hand_pose)).keypoints_3d - hand(make_pose()).keypoints_3d


def test_a_turn_about_any_flexion_axis_brings_the_fingertip_to_the_palm_side(hand):
    for finger, chain in enumerate(FINGER_JOINTS):
        for joint in chain:
            shift = bend(hand, joint, hand.flexion_axes[joint - 1])[4 * finger + 4]
            if finger == 0:  # the thumb bends across the palm, towards the little finger
                assert shift[2] < -0.4 * np.linalg.norm(shift)
            else:
                assert shift[1] < -0.7 * np.linalg.norm(shift) and np.linalg.norm(shift) > 0.005
    opposed = bend(hand, 13, hand.thumb_abduction_axis)[4]
    assert opposed[1] < -0.7 * np.linalg.norm(opposed)  # in front of the palm


def test_axes_found_from_geometry_alone_are_near_those_of_the_rig(hand):
    rest = hand(make_pose())
    flexion, abduction = joint_axes(rest.joints, rest.keypoints_3d[[4, 8, 12, 16, 20]])
    degrees = np.degrees(np.arccos(np.clip((flexion * hand.flexion_axes).sum(axis=1), -1, 1)))
    assert degrees.max() < 12.0 and np.median(degrees) < 7.0
    assert abduction @ hand.thumb_abduction_axis > np.cos(np.radians(1.0))


def bone_lengths(joints):
    return np.linalg.norm(joints[1:] - joints[[*PARENTS[1:]]], axis=1)


def test_shape_coefficients_mean_size_finger_length_and_thickness(hand):
    rest = hand(make_pose())
    size, length, thickness, unused = (hand(make_pose(hand_betas=2.0 * np.eye(10)[k])) for k in range(4))
    bones = bone_lengths(rest.joints)
    fingers = np.array([PARENTS[k] != 0 for k in range(1, 16)])
    np.testing.assert_allclose(bone_lengths(size.joints) / bones, 1.10, atol=1e-3)
    np.testing.assert_allclose(bone_lengths(length.joints)[fingers] / bones[fingers], 1.12, atol=0.01)
    np.testing.assert_allclose(bone_lengths(length.joints)[~fingers], bones[~fingers], atol=5e-4)
    np.testing.assert_allclose(thickness.joints, rest.joints, atol=1e-3)
    volume = [trimesh.Trimesh(m.vertices, m.faces, process=False).volume for m in (rest, size, length, thickness)]
    np.testing.assert_allclose(volume[1] / volume[0], 1.1**3, atol=2e-3)
    assert 1.02 < volume[2] / volume[0] < 1.08 and 1.05 < volume[3] / volume[0] < 1.25
    np.testing.assert_array_equal(unused.vertices, rest.vertices)


def test_wrong_parameters_are_named():
    with pytest.raises(ValueError, match=r"hand_pose has shape \(15, 3\), expected \(45,\)"):
        HandParams(np.zeros(3), np.zeros((15, 3)), np.zeros(3), np.zeros(10))
    with pytest.raises(ValueError, match="transl contains NaN"):
        make_pose(transl=np.array([0.0, np.nan, 0.0]))
    with pytest.raises(ValueError, match="'both', expected 'right' or 'left'"):
        make_pose(hand_side="both")
