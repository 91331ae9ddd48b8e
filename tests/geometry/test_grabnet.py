"""GrabNet: files of the official layout against a second, plain formulation; object preparation; the way back."""

import hashlib
import re
from types import SimpleNamespace

import numpy as np
import pytest
import smplx
import torch
import torch.nn.functional as F
import trimesh
from real_layouts import write_mano
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation

import make_dataset
from hoi.data import scene_maker
from hoi.data.folder import read_records
from hoi.geometry import grabnet as grabnet_module
from hoi.geometry.contact import DistanceField
from hoi.geometry.grabnet import draw_hands, find_grabnet_grasps, load_grabnet, pose_of, prepare_object, rotations_of
from hoi.geometry.grasp_search import find_grasps
from hoi.geometry.hand import BUILTIN_HAND, load_hand
from hoi.geometry.objects import make_object
from hoi.weights.__main__ import main as describe_main

# SHA-256 of the sorted lines "file TAB name TAB shape TAB dtype" of the official files, without what training leaves
# in refinenet.pt, and of these extras; computed from a table made by running the official code.
LAYOUT_HASH = "c9e61a3389d8e02acfb8c38215a889d1e59b152c8195b62ba994bd2fddf7a7d7"
EXTRAS_HASH = "6dd2e12053d37e40dd06142c023d7c137e4bfd5fe047d8e9a8249923f635d5bb"


def norm_layout(name, size):
    tensors = {f"{name}.{part}": (size,) for part in ("weight", "bias", "running_mean", "running_var")}
    return tensors | {f"{name}.num_batches_tracked": ()}


def block_layout(name, size):
    layout = norm_layout(f"{name}.bn1", 256) | norm_layout(f"{name}.bn2", 512)
    for part, (rows, columns) in {"fc1": (256, size), "fc2": (512, 256), "fc3": (512, size)}.items():
        layout |= {f"{name}.{part}.weight": (rows, columns), f"{name}.{part}.bias": (rows,)}
    return layout


def linear_layout(name, size):
    return {f"{name}.weight": (size, 512), f"{name}.bias": (size,)}


LAYOUTS = {
    "coarsenet.pt": norm_layout("enc_bn0", 4096) | norm_layout("enc_bn1", 4108) | block_layout("enc_rb1", 4108)
    | block_layout("enc_rb2", 4620) | linear_layout("enc_mu", 16) | linear_layout("enc_var", 16)
    | norm_layout("dec_bn1", 4096) | block_layout("dec_rb1", 4112) | block_layout("dec_rb2", 4624)
    | linear_layout("dec_pose", 96) | linear_layout("dec_trans", 3),
    "refinenet.pt": norm_layout("bn1", 778) | block_layout("rb1", 877) | block_layout("rb2", 1389)
    | block_layout("rb3", 1389) | linear_layout("out_p", 96) | linear_layout("out_t", 3),
}  # fmt: skip
EXTRAS = {
    "betas": ("B", 10), "global_orient": ("B", 3), "transl": ("B", 3), "hand_pose": ("B", 45),
    "faces_tensor": (1538, 3), "v_template": (778, 3), "shapedirs": (778, 3, 10), "J_regressor": (16, 778),
    "posedirs": (135, 2334), "parents": (16,), "lbs_weights": (778, 16), "hand_mean": (45,), "pose_mean": (48,),
}  # fmt: skip
WHOLE_NUMBERS = ("num_batches_tracked", "faces_tensor", "parents")


def hash_of(file_layouts):
    lines = []
    for file, layout in file_layouts.items():
        for name, shape in layout.items():
            dtype = "int64" if name.endswith(WHOLE_NUMBERS) else "float32"
            lines.append(f"{file}\t{name}\t[{','.join(map(str, shape))}]\t{dtype}")
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def random_state(layout, generator):
    """Weights that keep sizes near 1 through the layers, distances included."""
    state = {}
    for name, shape in layout.items():
        values = generator.standard_normal(shape) / max(1, shape[-1] if len(shape) > 1 else 4) ** 0.5
        if re.search(r"bn\d\.weight", name):
            values = 1 + 0.3 * values
        elif name.endswith("running_var"):
            values = generator.uniform(0.5, 1.5, shape) * (0.01 if name.startswith(("bn1", "dec_bn1")) else 1.0)
        elif name.endswith("num_batches_tracked"):
            values = np.array(1000)
        dtype = torch.int64 if name.endswith(WHOLE_NUMBERS) else torch.float32
        state[name] = torch.tensor(np.asarray(values)).to(dtype)
    state[min(name for name in state if name.endswith(("out_t.weight", "dec_trans.weight")))] *= 0.05  # metres
    return state


def write_grabnet(folder, **changes):
    """coarsenet.pt, refinenet.pt, bps.npz as published, with random content; changes: {"name": tensor} by file."""
    folder.mkdir(exist_ok=True)
    generator = np.random.default_rng(0)
    for file, layout in LAYOUTS.items():
        state = random_state(layout, generator) | changes.get(file[:-3], {})
        torch.save({name: value for name, value in state.items() if value is not None}, folder / file)
    directions = generator.standard_normal((4096, 3))
    directions *= 0.15 * generator.uniform(0, 1, (4096, 1)) ** (1 / 3) / np.linalg.norm(directions, axis=1)[:, None]
    np.savez(folder / "bps.npz", basis=directions)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_grabnet(tmp_path_factory.mktemp("files") / "grabnet")


@pytest.fixture(scope="module")
def networks(folder):
    return load_grabnet(folder)


def collapse_to(count, vertices, faces, keep):
    """Merge the shortest edges until `count` vertices are left; returns (V,) index of the vertex each went into."""
    goes_to, faces = np.arange(len(vertices)), faces.copy()
    for _ in range(len(vertices) - count):
        edges = np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])
        edges = np.unique(np.sort(edges, axis=1), axis=0)
        edges = edges[~np.isin(edges, keep).all(axis=1)]
        for a, b in edges[np.argsort(np.linalg.norm(vertices[edges[:, 0]] - vertices[edges[:, 1]], axis=1))]:
            around = [np.unique(faces[(faces == end).any(axis=1)]) for end in (a, b)]
            if len(np.intersect1d(*around)) == 4:  # both ends and two common neighbours: the surface stays one
                break
        a, b = (b, a) if b in keep else (a, b)
        faces[faces == b] = a
        goes_to[goes_to == b] = a
        faces = faces[(faces[:, 0] != faces[:, 1]) & (faces[:, 1] != faces[:, 2]) & (faces[:, 2] != faces[:, 0])]
    return goes_to, faces


@pytest.fixture(scope="module")
def mano_file(tmp_path_factory):
    """A file of MANO's sizes with a real hand in it: the built-in one with fewer vertices, tips where MANO has them."""
    with np.load(BUILTIN_HAND) as stored:
        hand = {name: stored[name] for name in stored.files}
    tips = hand["tip_vertices"]
    goes_to, faces = collapse_to(778, hand["v_template"].astype(float), hand["f"].astype(np.int64), tips)
    order = [vertex for vertex in np.unique(goes_to) if vertex not in tips]
    for number, tip in sorted(zip((744, 320, 443, 554, 671), tips, strict=True)):
        order.insert(number, tip)
    number_of = np.full(len(goes_to), -1)
    number_of[order] = np.arange(778)
    regressor = np.zeros((16, 778))
    np.add.at(regressor.T, number_of[goes_to], hand["J_regressor"].T)
    generator = np.random.default_rng(1)
    path = tmp_path_factory.mktemp("mano") / "MANO_RIGHT.npz"
    np.savez(path, v_template=hand["v_template"][order], f=number_of[faces], weights=hand["weights"][order],
             shapedirs=np.zeros((778, 3, 10)), posedirs=1e-4 * generator.standard_normal((778, 3, 135)),
             J_regressor=regressor, kintree_table=hand["kintree_table"])  # fmt: skip
    return path


@pytest.fixture(scope="module")
def hand(mano_file):
    return load_hand(mano_file)


@pytest.fixture(scope="module")
def can():
    return make_object("can", 1)


def lines_of(module):
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def test_names_shapes_and_counts_are_those_of_the_official_files(networks):
    assert hash_of(LAYOUTS) == LAYOUT_HASH
    assert hash_of({"refinenet.pt": {f"rhm_train.{name}": shape for name, shape in EXTRAS.items()}}) == EXTRAS_HASH
    ours = {"coarsenet.pt": lines_of(networks.coarse), "refinenet.pt": lines_of(networks.refine)}
    assert hash_of(ours) == LAYOUT_HASH
    count = [sum(p.numel() for p in module.parameters()) for module in (networks.coarse, networks.refine)]
    decoder = sum(p.numel() for name, p in networks.coarse.named_parameters() if name.startswith("dec_"))
    assert count == [14_039_707, 3_261_047] and decoder == 7_036_003


def test_six_numbers_are_two_interleaved_columns_as_scipy_has_them():
    generator = np.random.default_rng(0)
    expected = Rotation.random(5 * 16, random_state=3).as_matrix().reshape(5, 16, 3, 3)
    a, b = expected[..., 0], expected[..., 1]
    interleaved = np.stack([a[..., 0], b[..., 0], a[..., 1], b[..., 1], a[..., 2], b[..., 2]], axis=-1)
    np.testing.assert_array_equal(pose_of(expected), interleaved.reshape(5, 96))
    np.testing.assert_allclose(rotations_of(interleaved.reshape(5, 96)), expected, atol=1e-12)
    # Neither the lengths of the columns nor a share of the first in the second change the rotation.
    skewed = interleaved.copy()
    skewed[..., 1::2] = 0.4 * skewed[..., 1::2] + generator.normal(size=(5, 16, 1)) * skewed[..., 0::2]
    skewed[..., 0::2] *= generator.uniform(0.2, 3, (5, 16, 1))
    np.testing.assert_allclose(rotations_of(skewed.reshape(5, 96)), expected, atol=1e-12)


def plain_norm(state, name, x):
    mean, variance = state[f"{name}.running_mean"], state[f"{name}.running_var"]
    return (x - mean) / (variance + 1e-5).sqrt() * state[f"{name}.weight"] + state[f"{name}.bias"]


def plain_linear(state, name, x):
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def plain_block(state, name, x):
    def leaky(x):
        return torch.where(x > 0, x, 0.2 * x)

    main = leaky(plain_norm(state, f"{name}.bn1", plain_linear(state, f"{name}.fc1", x)))
    main = plain_norm(state, f"{name}.bn2", plain_linear(state, f"{name}.fc2", main))
    return leaky(main + leaky(plain_linear(state, f"{name}.fc3", x)))


def plain_matrices(pose):
    pose = pose.reshape(-1, 16, 6)
    x = F.normalize(pose[..., [0, 2, 4]], dim=-1)
    z = F.normalize(torch.linalg.cross(x, pose[..., [1, 3, 5]]), dim=-1)
    return torch.stack([x, torch.linalg.cross(z, x), z], dim=-1)


def plain_grabnet(folder, mano_file, points, basis, latents):
    """All of it in float64: (778, 3) skin of every hand on the prepared object, after 0, 1, 2 and 3 refinements."""
    coarse, refine = (
        {name: value.double() for name, value in torch.load(folder / file, weights_only=True).items()}
        for file in ("coarsenet.pt", "refinenet.pt")
    )
    with np.load(mano_file) as stored:
        arrays = {name: stored[name].astype(np.int64 if name in ("f", "kintree_table") else float) for name in stored}
    arrays |= {"hands_components": np.eye(45), "hands_mean": np.zeros(45)}
    mano = smplx.MANOLayer(model_path="", data_struct=SimpleNamespace(**arrays), dtype=torch.float64, use_pca=False,
                           flat_hand_mean=True)  # fmt: skip
    points, basis, latents = (torch.tensor(value, dtype=torch.float64) for value in (points, basis, latents))

    def skin(pose, transl):
        turns = plain_matrices(pose)
        return mano(global_orient=turns[:, :1], hand_pose=turns[:, 1:], transl=transl,
                    betas=torch.zeros(len(pose), 10, dtype=torch.float64)).vertices  # fmt: skip

    bps = torch.cdist(basis, points).min(dim=1).values
    x0 = torch.cat([latents, plain_norm(coarse, "dec_bn1", bps).expand(len(latents), -1)], dim=1)
    x2 = plain_block(coarse, "dec_rb2", torch.cat([x0, plain_block(coarse, "dec_rb1", x0)], dim=1))
    pose, transl = plain_linear(coarse, "dec_pose", x2), plain_linear(coarse, "dec_trans", x2)
    stages = [skin(pose, transl)]
    pose = plain_matrices(pose)[..., :2].reshape(-1, 96)
    for _ in range(3):
        distances = torch.cdist(stages[-1], points).min(dim=2).values
        x0 = torch.cat([plain_norm(refine, "bn1", distances), pose, transl], dim=1)
        x = plain_block(refine, "rb1", x0)
        x = plain_block(refine, "rb2", torch.cat([x, x0], dim=1))
        x = plain_block(refine, "rb3", torch.cat([x, x0], dim=1))
        pose, transl = pose + plain_linear(refine, "out_p", x), transl + plain_linear(refine, "out_t", x)
        stages.append(skin(pose, transl))
    return [stage.numpy() for stage in stages]


def test_both_networks_and_three_refinements_equal_a_plain_formulation(folder, networks, mano_file, hand, can):
    generator = np.random.default_rng(5)
    prepared = prepare_object(can.vertices, can.faces, generator)
    latents = generator.standard_normal((4, 16))
    with np.load(folder / "bps.npz") as stored:
        stages = plain_grabnet(folder, mano_file, prepared.points, stored["basis"].astype(np.float32), latents)
    for pose, expected in zip(draw_hands(networks, hand, prepared, latents), stages[3], strict=True):
        np.testing.assert_allclose(from_canonical(prepared, hand(pose).vertices), expected, atol=2e-5)
        assert not pose.hand_betas.any() and pose.hand_side == "right"
    assert all(np.abs(stages[k] - stages[3]).max() > 1e-2 for k in range(3))  # every pass counts


def from_canonical(prepared, points):
    """(..., 3) of the object's canonical frame -> of the prepared object, as PreparedObject promises."""
    return (prepared.scale * points - prepared.offset) @ prepared.rotation.T


def box(size, centre=(0, 0, 0)):
    mesh = trimesh.creation.box(size)
    return np.array(mesh.vertices) + centre, np.array(mesh.faces)


@pytest.mark.parametrize("size, centre, scale", [
    ((0.06, 0.08, 0.1), (0, 0, 0), 1.0),
    ((0.06, 0.08, 0.1), (0.02, -0.03, 0.1), 1.0),
    ((0.4, 0.3, 0.5), (0, 0, 0), 0.08 / np.linalg.norm([0.2, 0.15, 0.25])),
    ((0.06, 0.08, 0.1), (0.4, 0, 0), 0.08 / np.linalg.norm([0.43, 0.04, 0.05])),  # judged before centring
])  # fmt: skip
def test_a_prepared_object_is_centred_turned_and_goes_back_exactly(size, centre, scale):
    vertices, faces = box(size, centre)
    prepared = prepare_object(vertices, faces, np.random.default_rng(7))
    assert prepared.scale == pytest.approx(scale, rel=1e-12)
    angles = np.random.default_rng(7).uniform(0, 2 * np.pi, 3)
    x, y, z = (Rotation.from_rotvec(angle * axis).as_matrix() for angle, axis in zip(angles, np.eye(3), strict=True))
    np.testing.assert_allclose(prepared.rotation, z @ y @ x, atol=1e-12)
    points = np.random.default_rng(8).uniform(-1, 1, (50, 3))
    np.testing.assert_allclose(prepared.to_canonical(from_canonical(prepared, points)), points, atol=1e-9)
    expected = (z @ y @ x @ (scale * (points - centre)).T).T
    np.testing.assert_allclose(from_canonical(prepared, points), expected, atol=1e-12)
    # Every point is a vertex of the subdivided box: each face was halved six times, 8 vertices become 24,578.
    assert prepared.points.shape == (10_000, 3) and len(np.unique(prepared.points, axis=0)) == 10_000
    steps = ((prepared.to_canonical(prepared.points) - centre) / size + 0.5) * 64
    np.testing.assert_allclose(steps, np.round(steps), atol=1e-9)
    assert (np.isin(np.round(steps), (0, 64)).any(axis=1)).all()  # on the surface
    assert np.isin(np.round(steps) % 2, 1).any()  # the sixth halving was needed, a seventh was not made


def test_a_fine_mesh_is_not_subdivided_and_the_points_are_its_own_vertices():
    ball = trimesh.creation.icosphere(subdivisions=6, radius=0.05)
    prepared = prepare_object(np.array(ball.vertices), np.array(ball.faces), np.random.default_rng(0))
    np.testing.assert_allclose(np.linalg.norm(prepared.points, axis=1), 0.05, atol=1e-4)
    distance, vertex = cKDTree(ball.vertices).query(prepared.to_canonical(prepared.points))
    assert distance.max() < 1e-12 and len(np.unique(vertex)) == 10_000


def test_on_an_object_made_smaller_the_hand_keeps_its_size_and_its_nearest_point(networks, hand, folder, mano_file):
    vertices, faces = box((0.4, 0.3, 0.5), (0.01, 0, 0.02))
    prepared = prepare_object(vertices, faces, np.random.default_rng(1))
    latents = np.random.default_rng(2).standard_normal((3, 16))
    assert prepared.scale < 0.3
    with np.load(folder / "bps.npz") as stored:
        skins = plain_grabnet(folder, mano_file, prepared.points, stored["basis"].astype(np.float32), latents)[3]
    for pose, skin in zip(draw_hands(networks, hand, prepared, latents), skins, strict=True):
        ours = hand(pose).vertices
        nearest = cKDTree(prepared.points).query(skin)[0].argmin()
        np.testing.assert_allclose(ours[nearest], prepared.to_canonical(skin[nearest]), atol=1e-4)
        np.testing.assert_allclose((ours - ours[0]) @ prepared.rotation.T, skin - skin[0], atol=4e-5)  # rigid, metric


def same(first, second):
    names = ("global_orient", "hand_pose", "transl")
    return all(np.array_equal(getattr(a, n), getattr(b, n)) for a, b in zip(first, second, strict=True) for n in names)


def test_the_same_seed_gives_the_same_hands_and_another_one_others(networks, hand, can):
    drawn = []
    for seed in (3, 3, 4):
        torch.manual_seed(len(drawn))  # only the generator passed in decides
        np.random.seed(len(drawn))
        generator = np.random.default_rng(seed)
        prepared = prepare_object(can.vertices, can.faces, generator)
        drawn.append(draw_hands(networks, hand, prepared, generator.standard_normal((3, 16))))
    assert same(drawn[0], drawn[1]) and not same(drawn[0], drawn[2])
    assert not same(drawn[0][:1], drawn[0][1:2])


def test_random_weights_give_no_grasp_and_the_note_says_how_many_were_drawn_and_why_not(networks, hand, can):
    field = DistanceField(can.vertices, can.faces)
    grasps, note = find_grabnet_grasps(can, hand, networks, 1, np.random.default_rng(0), max_draws=32, field=field)
    assert grasps == [] and note.startswith("can_0001: GrabNet drew 32 hands, 0 were accepted; of the others ")
    reasons = dict(part.split(" ", 1)[::-1] for part in note.split("of the others ")[1].split(", "))
    assert int(reasons["does not hold against every push"]) > 16
    assert max(map(int, reasons.values())) <= 32


@pytest.fixture(scope="module")
def known(hand, can):
    """A grasp that the built-in search accepts; the hand file has no shapes, so hand_betas change nothing."""
    grasps = find_grasps(can, hand, 1, np.random.default_rng(0), max_tries=128)
    return grasps[0]


def write_one_grasp(folder, grasp, hand, mesh, seed):
    """GrabNet files whose networks always say one good grasp, right for the first turn drawn from this seed."""
    prepared = prepare_object(mesh.vertices, mesh.faces, np.random.default_rng(seed))
    turns = Rotation.from_rotvec(
            np.vstack([grasp.hand_params.global_orient, grasp.hand_params.hand_pose.reshape(15, 3)])
        )
    turns = turns.as_matrix()
    turns[0] = prepared.rotation @ turns[0]
    wrist = hand(grasp.hand_params).joints[0]
    transl = from_canonical(prepared, wrist) - (wrist - grasp.hand_params.transl)
    numbers = turns[:, :, :2].reshape(96) * 1.7  # lengths do not matter
    coarse = {"dec_pose.weight": torch.zeros(96, 512), "dec_pose.bias": torch.tensor(numbers, dtype=torch.float32),
              "dec_trans.weight": torch.zeros(3, 512), "dec_trans.bias": torch.tensor(transl, dtype=torch.float32)}
    refine = {name: torch.zeros(shape) for name, shape in LAYOUTS["refinenet.pt"].items() if name.startswith("out_")}
    return write_grabnet(folder, coarsenet=coarse, refinenet=refine)


def test_a_grasp_drawn_on_the_turned_object_is_accepted_in_the_canonical_frame(hand, can, known, tmp_path):
    grabnet = load_grabnet(write_one_grasp(tmp_path / "grabnet", known, hand, can, seed=11))
    grasps, note = find_grabnet_grasps(can, hand, grabnet, 2, np.random.default_rng(11), max_draws=64)
    assert note == "can_0001: GrabNet drew 16 hands, 16 were accepted" and len(grasps) == 1  # all alike
    expected = hand(known.hand_params).vertices
    for grasp in grasps:
        assert grasp.accepted and grasp.force_closure and grasp.fingers_in_contact == known.fingers_in_contact
        np.testing.assert_allclose(hand(grasp.hand_params).vertices, expected, atol=3e-6)
    # On another turn of the object the same numbers are no grasp.
    _, note = find_grabnet_grasps(can, hand, grabnet, 17, np.random.default_rng(11), max_draws=64)
    assert "drew 64 hands, 16 were accepted; of the others " in note


def test_only_the_training_extras_are_dropped(tmp_path, networks):
    extras = {f"rhm_train.{name}": torch.zeros([256 if size == "B" else size for size in shape])
              for name, shape in EXTRAS.items()}  # fmt: skip
    refine = load_grabnet(write_grabnet(tmp_path / "a", refinenet=extras)).refine
    for name, tensor in networks.refine.state_dict().items():
        assert torch.equal(refine.state_dict()[name], tensor), name
    with pytest.raises(ValueError, match=r"coarsenet.pt does not fit CoarseNet.*1 unexpected: dec_rb3.fc1.weight"):
        load_grabnet(write_grabnet(tmp_path / "a", coarsenet={"dec_rb3.fc1.weight": torch.zeros(2)}))


@pytest.mark.parametrize("file, change, message", [
    ("coarsenet", {"enc_mu.bias": None}, r"coarsenet.pt does not fit CoarseNet.*1 missing: enc_mu.bias"),
    ("refinenet", {"rb1.fc3.weight": torch.zeros(512, 878)}, r"rb1.fc3.weight is \(512, 878\), expected \(512, 877\)"),
    ("refinenet", {"out_t.bias": torch.tensor([0, np.nan, 0])}, "1 tensors contain NaN or infinity, out_t.bias first"),
])  # fmt: skip
def test_a_file_that_does_not_fit_names_the_tensor(file, change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_grabnet(write_grabnet(tmp_path / "bad", **{file: change}))


def test_missing_and_damaged_files_are_named_with_the_default(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="missing: coarsenet.pt, refinenet.pt, bps.npz.*licence.*built-in"):
        load_grabnet(tmp_path)
    for name in ("coarsenet.pt", "refinenet.pt"):
        (tmp_path / name).symlink_to(folder / name)
    with pytest.raises(FileNotFoundError, match=r"missing: bps.npz\. Their licence"):
        load_grabnet(tmp_path)
    np.savez(tmp_path / "bps.npz", basis=np.zeros((1024, 3)))
    with pytest.raises(ValueError, match=r"'basis' of shape \(4096, 3\), it holds {'basis': \(1024, 3\)}"):
        load_grabnet(tmp_path)
    (tmp_path / "bps.npz").write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(ValueError, match="bps.npz is not a readable .npz"):
        load_grabnet(tmp_path)


def test_another_hand_than_manos_is_refused(networks, can):
    with pytest.raises(ValueError, match="GrabNet needs the MANO hand, this is 'builtin'"):
        find_grabnet_grasps(can, load_hand(), networks, 1, np.random.default_rng(0))


SMALL = "--object can --object-seed 1 --object-instances 1 --grasps-per-object 2 --size 64 --count 6 --grasp grabnet"


def command(tmp_path, folder, mano_file):
    return [*SMALL.split(), "--grabnet", str(folder), "--mano", str(mano_file), "--out", str(tmp_path / "out"),
            "--cache", str(tmp_path / "cache")]  # fmt: skip


def test_make_dataset_draws_with_grabnet_and_writes_its_grasps(hand, can, known, mano_file, tmp_path, capsys):
    write_one_grasp(tmp_path / "grabnet", known, hand, can, seed=0)
    make_dataset.run([*command(tmp_path, tmp_path / "grabnet", mano_file), "--hand-side", "random"])
    said = capsys.readouterr().out
    assert re.findall(r"can_0001: GrabNet drew 16 hands, 16 were accepted.*", said) == [
        "can_0001: GrabNet drew 16 hands, 16 were accepted" + side for side in ("", " (left hand)")]  # fmt: skip
    records = read_records(tmp_path / "out")
    assert len(records) == 6 and {record["hand_side"] for record in records} == {"right", "left"}
    for record in records:
        assert record["hand_model"] == "mano" and record["hand_betas"] == [0] * 10 and record["grasp"]["force_closure"]
        sign = np.tile([1, -1, -1], 15) if record["hand_side"] == "left" else 1
        np.testing.assert_allclose(record["hand_pose"], sign * known.hand_params.hand_pose, atol=1e-5)
    assert "GrabNet licence" in (tmp_path / "out" / "dataset.json").read_text()


def test_make_dataset_says_why_grabnet_gave_nothing_and_remembers_it(folder, mano_file, tmp_path, monkeypatch):
    monkeypatch.setattr(scene_maker, "find_grabnet_grasps", lambda *a: find_grabnet_grasps(*a, max_draws=16))
    with pytest.raises(SystemExit, match="no grasp was found for can_0001: is it") as first:
        make_dataset.run(command(tmp_path, folder, mano_file))
    assert re.search(r"\ncan_0001: GrabNet drew 16 hands, 0 were accepted; of the others \d+ ", first.value.code)
    monkeypatch.setattr(grabnet_module, "draw_hands", lambda *_: pytest.fail("drawn again"))
    with pytest.raises(SystemExit) as second:
        make_dataset.run(command(tmp_path, folder, mano_file))
    assert second.value.code == first.value.code


@pytest.mark.parametrize("words, message", [
    ("--grasp grabnet", "needs --grabnet DIR .*--mano FILE; their licences forbid.* --grasp builtin"),
    ("--grasp grabnet --mano x.pkl", "needs --grabnet DIR"),
    ("--grabnet here", "only with --grasp grabnet"),
])  # fmt: skip
def test_incomplete_requests_say_what_is_needed_and_what_the_default_is(words, message, capsys):
    with pytest.raises(SystemExit):
        make_dataset.parse_args(words.split())
    assert re.search(message, " ".join(capsys.readouterr().err.split()))


def test_the_checker_knows_the_files_of_hands_and_names_what_is_missing(tmp_path, capsys):
    write_grabnet(tmp_path / "grabnet")
    _, hands = write_mano(tmp_path)
    assert describe_main([str(tmp_path / "grabnet"), str(tmp_path / "grabnet" / "coarsenet.pt"), str(hands)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert all(f"complete; use with make_dataset.py --grasp grabnet --grabnet {tmp_path}" in line for line in said[:2])
    assert f"the MANO hand, complete; use with --mano {hands}" in said[2]
    (tmp_path / "grabnet" / "bps.npz").unlink()
    assert describe_main([str(tmp_path / "grabnet")]) == 1
    assert "missing: bps.npz" in capsys.readouterr().err
