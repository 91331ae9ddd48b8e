"""Grasps against independent geometry (trimesh with rtree), exact shapes, and the promises of `accepted`."""

from dataclasses import replace

import numpy as np
import pytest
import trimesh
from scipy.spatial.transform import Rotation

from hoi.geometry import grasp_search
from hoi.geometry.contact import DistanceField, closure_effort, crossing_edges, mesh_edges, sample_faces
from hoi.geometry.grasp import CONTACT_DISTANCE, _read_cache, choose_grasps, measure_grasp
from hoi.geometry.grasp_search import Rig, cached_grasps, close_fingers, find_grasps, open_hands, reach_faults
from hoi.geometry.hand import load_hand
from hoi.geometry.objects import ObjectMesh, make_object

# 21 grasps; a bowl costs about three times as much as the others.
COUNTS = {"mug": 7, "bottle": 6, "can": 6, "bowl": 2}


@pytest.fixture(scope="module")
def hand():
    return load_hand()


@pytest.fixture(scope="module")
def found(hand):
    """category -> (object, distance field, grasps)"""
    result = {}
    for category, count in COUNTS.items():
        mesh = make_object(category, 1)
        field = DistanceField(mesh.vertices, mesh.faces)
        tries = 768 if category == "bowl" else 6400  # a search of few tries takes what it finds first
        grasps = find_grasps(mesh, hand, count, np.random.default_rng(0), max_tries=tries, field=field)
        result[category] = mesh, field, grasps
    return result


def object_from(mesh: trimesh.Trimesh, category: str = "can") -> ObjectMesh:
    return ObjectMesh(vertices=np.asarray(mesh.vertices, dtype=float), faces=np.asarray(mesh.faces, dtype=np.int64),
                      object_id="test/one", category=category, source="test", file_to_canonical=np.eye(4),
                      watertight=True, notes=())


def depth_by_trimesh(mesh: ObjectMesh, points: np.ndarray) -> float:
    """Deepest of the points, metres inside any of the object's closed bodies; 0 when all are outside."""
    deepest = 0.0
    for body in trimesh.Trimesh(mesh.vertices, mesh.faces, process=False).split(only_watertight=False):
        low, high = body.bounds
        inside = points[((points > low) & (points < high)).all(axis=1)]
        if len(inside):
            deepest = max(deepest, trimesh.proximity.signed_distance(body, inside).max())
    return deepest


def edges_through_by_trimesh(mesh: ObjectMesh, vertices: np.ndarray, edges: np.ndarray) -> int:
    """Edges with a ray hit before their end."""
    surface = trimesh.Trimesh(mesh.vertices, mesh.faces, process=False)
    start, end = vertices[edges[:, 0]], vertices[edges[:, 1]]
    low, high = mesh.vertices.min(axis=0), mesh.vertices.max(axis=0)
    near = ((np.maximum(start, end) > low) & (np.minimum(start, end) < high)).all(axis=1)
    start, end = start[near], end[near]
    if not len(start):
        return 0
    length = np.linalg.norm(end - start, axis=1)
    points, rays, _ = surface.ray.intersects_location(start, (end - start) / length[:, None], multiple_hits=True)
    return len(np.unique(rays[np.linalg.norm(points - start[rays], axis=1) <= length[rays]]))


def test_every_family_gives_as_many_grasps_as_asked_for(found):
    assert {category: len(grasps) for category, (_, _, grasps) in found.items()} == COUNTS


def test_no_grasp_penetrates_or_crosses_a_wall_measured_by_trimesh(found, hand):
    checked = 0
    for mesh, _, grasps in found.values():
        for grasp in grasps:
            vertices = hand(grasp.hand_params).vertices
            depth_mm = 1000 * depth_by_trimesh(mesh, vertices)
            assert depth_mm <= 2.0
            assert abs(depth_mm - grasp.penetration_mm) < 0.1
            assert grasp.crossing_edges == edges_through_by_trimesh(mesh, vertices, mesh_edges(hand.faces())) == 0
            checked += 1
    assert checked >= 20


def test_thumb_and_another_finger_touch_measured_by_trimesh(found, hand):
    for mesh, _, grasps in found.values():
        surface = trimesh.Trimesh(mesh.vertices, mesh.faces, process=False)
        for grasp in grasps:
            assert grasp.force_closure and grasp.fingers_in_contact[0] and any(grasp.fingers_in_contact[1:])
            vertices = hand(grasp.hand_params).vertices
            distance = np.full(len(vertices), np.inf)
            low, high = surface.bounds
            near = ((vertices > low - 0.01) & (vertices < high + 0.01)).all(axis=1)
            distance[near] = trimesh.proximity.closest_point(surface, vertices[near])[1]
            touching = [bool((distance[hand.finger_of_vertex == f] < CONTACT_DISTANCE).any()) for f in range(5)]
            assert touching == list(grasp.fingers_in_contact)


def test_the_object_does_not_poke_into_the_hand(found, hand):
    """Vertex depths miss a thin rim that enters the hand between two skin points."""
    for _, field, grasps in found.values():
        for grasp in grasps:
            skin = hand(grasp.hand_params)
            flesh = trimesh.Trimesh(skin.vertices, skin.faces, process=False)
            low, high = flesh.bounds
            near = field.samples[((field.samples > low) & (field.samples < high)).all(axis=1)]
            distance, index = trimesh.proximity.ProximityQuery(flesh).vertex(near)
            near = near[distance < 0.008]  # an object point deep in the hand would have crossed its edges
            depth = trimesh.proximity.signed_distance(flesh, near[:: max(1, len(near) // 300)]).max()
            assert 1000 * depth < 1.0


def test_an_arm_from_above_the_table_can_hold_like_this(found, hand):
    for mesh, field, grasps in found.values():
        table = mesh.vertices[:, 2].min()
        for grasp in grasps:
            skin = hand(grasp.hand_params)
            assert skin.vertices[:, 2].min() > table
            # A straight forearm, bent upwards by no more than a wrist can, ends above the table and misses the object.
            knuckles = skin.joints[[1, 4, 7, 10]].mean(axis=0)
            back = (skin.joints[0] - knuckles) / np.linalg.norm(skin.joints[0] - knuckles)
            assert skin.joints[0, 2] + 0.25 * np.sin(np.arcsin(back[2]) + np.deg2rad(35)) > table
            forearm = skin.joints[0] + np.linspace(0.05, 0.25, 9)[:, None] * back
            assert field.signed_distance(forearm).min() > 0.02


def test_a_fifth_of_the_mugs_is_held_by_the_handle_and_a_fifth_of_all_by_two_or_three_fingers(found, hand):
    few = [not any(grasp.fingers_in_contact[3:]) for _, _, grasps in found.values() for grasp in grasps]
    assert 0.2 <= np.mean(few) <= 0.6
    by_handle = []
    mesh, field, grasps = found["mug"]
    radius = mesh.vertices[:, 1].max()  # of the body, whose axis the handle has moved from the middle
    for grasp in grasps:
        skin = hand(grasp.hand_params).vertices
        touching = skin[field.exact(skin)[0] < CONTACT_DISTANCE] - [mesh.vertices[:, 0].min() + radius, 0, 0]
        by_handle.append((np.linalg.norm(touching[:, :2], axis=1) > radius + 0.003).mean() > 0.5)
    assert np.mean(by_handle) >= 0.2


def test_two_fingers_hold_while_the_others_keep_away(hand):
    mesh = make_object("can", 1)
    field = DistanceField(mesh.vertices, mesh.faces)
    grasps = find_grasps(mesh, hand, 8, np.random.default_rng(0), field=field)
    pairs = [grasp for grasp in grasps if sum(grasp.fingers_in_contact) == 2]
    assert pairs and all(grasp.accepted for grasp in pairs)
    for grasp in pairs:
        others = hand(grasp.hand_params).vertices[hand.finger_of_vertex >= 2]
        assert field.exact(others)[0].min() > CONTACT_DISTANCE


def test_rods_are_handles_and_grips_and_neither_walls_nor_wide_bodies():
    grip = trimesh.creation.cylinder(0.016, 0.11).apply_translation([0, 0, -0.09])
    drill = trimesh.util.concatenate([trimesh.creation.box([0.18, 0.07, 0.07]), grip])
    ring = trimesh.creation.torus(0.03, 0.005).apply_translation([0.08, 0, 0])
    pitcher = trimesh.util.concatenate([trimesh.creation.annulus(0.057, 0.06, 0.2), ring])
    for mesh, part in ((drill, lambda p: p[:, 2] < -0.05), (pitcher, lambda p: np.hypot(p[:, 0], p[:, 1]) > 0.066)):
        tree, rods, axes = DistanceField(mesh.vertices, mesh.faces).rods
        true = part(tree.data)
        assert rods[true].mean() > 0.5 and true[rods].mean() > 0.9  # neither end of the grip counts
        if mesh is drill:
            assert np.median(np.abs(axes[rods & true][:, 2])) > 0.95
    for mesh in (trimesh.creation.cylinder(0.035, 0.1), trimesh.creation.annulus(0.037, 0.04, 0.1),
                 trimesh.creation.cylinder(0.2, 0.5, sections=64)):
        assert not DistanceField(mesh.vertices, mesh.faces).rods[1].any()


def test_nearly_the_same_grasp_is_refused(found, hand):
    mesh, field, grasps = found["can"]
    first = grasps[0].hand_params
    near = replace(first, transl=first.transl + [0, 0, 0.015])
    twice = [grasps[0], replace(grasps[0], hand_params=near, score=grasps[0].score - 0.01), *grasps[1:3]]
    chosen = choose_grasps(twice, hand, 4)
    assert len(chosen) == 3 and chosen[0] is twice[0] and all(grasp is not twice[1] for grasp in chosen)


def test_grasps_of_one_object_differ(found, hand):
    for _, _, grasps in found.values():
        joints = np.array([hand(grasp.hand_params).joints.ravel() for grasp in grasps]).reshape(len(grasps), 16, 3)
        apart = np.linalg.norm(joints[:, None] - joints[None], axis=3).mean(axis=2) + np.eye(len(grasps))
        assert apart.min() > 0.015
        assert len({tuple(grasp.hand_params.hand_betas) for grasp in grasps}) == len(grasps)


def test_a_hand_pushed_into_the_wall_is_measured_and_refused(found, hand):
    mesh, field, grasps = found["can"]
    pose = grasps[0].hand_params
    thumb = hand(pose).vertices[hand.finger_of_vertex == 0]
    distance, normals = field.exact(thumb)
    pushed = replace(pose, transl=pose.transl - 0.006 * normals[distance.argmin()])
    measured = measure_grasp(pushed, hand, field)
    vertices = hand(pushed).vertices
    assert measured.penetration_mm > 2 and measured.crossing_edges > 10 and not measured.accepted
    assert abs(measured.penetration_mm - 1000 * depth_by_trimesh(mesh, vertices)) < 0.1
    through = edges_through_by_trimesh(mesh, vertices, mesh_edges(hand.faces()))
    assert abs(measured.crossing_edges - through) <= 0.03 * through  # rays that graze a triangle's edge


def test_a_refused_grasp_says_why_and_an_accepted_one_has_no_fault(found, hand):
    accepted = found["can"][2][0]
    assert accepted.accepted and accepted.faults == ()
    for change, reason in (
        ({"penetration_mm": 2.01}, "goes more than 2 mm into the object"),
        ({"crossing_edges": 1}, "passes through the surface"),
        ({"fingers_in_contact": (False, True, True, True, True)}, "does not touch with the thumb"),
        ({"fingers_in_contact": (True, False, False, False, False)}, "touches with no finger but the thumb"),
        ({"force_closure": False}, "does not hold against every push"),
    ):
        worse = replace(accepted, **change)
        assert worse.faults == (reason,) and not worse.accepted


def test_what_the_search_finds_is_in_reach_and_the_same_from_below_is_not(found, hand):
    for mesh, field, grasps in found.values():
        table = mesh.vertices[:, 2].min()
        for grasp in grasps:
            assert reach_faults(grasp.hand_params, hand, field, table) == ()
    mesh, field, grasps = found["can"]
    over = Rotation.from_rotvec([np.pi, 0, 0])  # the can is its own image upside down, the hand comes from below
    pose = grasps[0].hand_params
    wrist = hand(pose).joints[0]
    below = replace(pose, global_orient=(over * Rotation.from_rotvec(pose.global_orient)).as_rotvec(),
                    transl=pose.transl + over.apply(wrist) - wrist)
    table = -mesh.vertices[:, 2].max()
    assert "comes from where no arm can" in reach_faults(below, hand, field, table)
    assert "goes below the table" in reach_faults(pose, hand, field, wrist[2])
    zero = replace(pose, global_orient=np.zeros(3), transl=np.zeros(3))  # fingers to -x, the forearm to +x
    reach_in = replace(zero, transl=[-0.14, 0, 0] - hand(zero).joints[0])
    assert reach_faults(reach_in, hand, field, -1.0) == ("has its forearm in the object",)


def test_a_finger_through_a_thin_wall_is_seen_although_it_is_hardly_deep():
    wall = trimesh.creation.box([0.1, 0.1, 0.0005])
    finger = trimesh.creation.capsule(height=0.05, radius=0.008, count=[12, 12])
    field = DistanceField(wall.vertices, wall.faces)
    edges = mesh_edges(np.asarray(finger.faces))
    assert crossing_edges(finger.vertices - finger.centroid, edges, field) >= 12
    assert crossing_edges(finger.vertices - finger.centroid + [0, 0, 0.04], edges, field) == 0
    assert -field.exact(np.asarray(finger.vertices - finger.centroid))[0].min() < 0.0003


def test_closing_fingers_stop_at_a_thin_wall(hand):
    """A plate of 0.5 mm before the fingers: whatever the pose, no skin gets behind it."""
    plate = trimesh.creation.box([0.4, 0.0005, 0.4])
    rig, field = Rig(hand), DistanceField(plate.vertices, plate.faces)
    hands = open_hands(hand, 24, np.random.default_rng(0))
    hands.wrist = hands.wrist + [0, 0.07, 0]  # palms face -y
    hands.preshape = hands.preshape * 0.2
    start, _ = rig.pose(hands)
    clear = start[..., 1].min(axis=1) > 0.002
    hands = hands.take(np.flatnonzero(clear))
    touched = close_fingers(hands, rig, field)
    end, _ = rig.pose(hands)
    assert len(end) >= 10 and touched[:, 1:].mean() > 0.9
    assert end[..., 1].min() > 0.00025
    tips = end[:, hand.tip_vertices[1:], 1]  # and they do come close
    assert np.median(tips.min(axis=1)) < 0.015


def test_distances_to_a_box_are_exact():
    half = np.array([0.03, 0.02, 0.05])
    box = trimesh.creation.box(2 * half)
    field = DistanceField(box.vertices, box.faces)
    points = np.random.default_rng(0).uniform(-1.3, 1.3, (4000, 3)) * half
    outside = np.abs(points) - half
    truth = np.linalg.norm(np.maximum(outside, 0), axis=1) + np.minimum(outside.max(axis=1), 0)
    np.testing.assert_allclose(field.exact(points)[0], truth, atol=5e-5)
    close = np.abs(truth) < 0.002
    assert np.abs(field.signed_distance(points) - truth)[close].max() < 0.0008
    assert np.median(np.abs(field.signed_distance(points) - truth)[close]) < 0.0001


def test_off_the_grid_distances_are_lower_bounds():
    ball = trimesh.creation.icosphere(subdivisions=3, radius=0.04)
    field = DistanceField(ball.vertices, ball.faces)
    points = np.random.default_rng(1).normal(size=(500, 3))
    points *= np.random.default_rng(2).uniform(0.08, 0.5, (500, 1)) / np.linalg.norm(points, axis=1, keepdims=True)
    truth = np.linalg.norm(points, axis=1) - 0.04
    ours = field.signed_distance(points)
    assert (ours < truth + 0.0015).all() and (ours > 0.55 * truth).all()


def test_small_holes_do_not_turn_a_scan_inside_out():
    ball = trimesh.creation.icosphere(subdivisions=4, radius=0.04)
    faces = np.delete(ball.faces, [10, 500, 900], axis=0)
    faces[::7] = faces[::7, ::-1]  # and every seventh face is wound the wrong way
    field = DistanceField(ball.vertices, faces)
    points = np.random.default_rng(0).uniform(-0.05, 0.05, (3000, 3))
    truth = np.linalg.norm(points, axis=1) - 0.04
    sure = np.abs(truth) > 0.0005
    for ours in (field.signed_distance(points), field.exact(points)[0]):
        assert ((ours < 0) == (truth < 0))[sure].mean() > 0.998


def test_samples_leave_no_gap_on_slivers():
    triangles = np.array([[[0, 0, 0], [0.1, 0, 0], [0.05, 0.0004, 0]], [[0, 0, 0], [0, 0.002, 0], [0.09, 0, 0.001]]])
    samples, face = sample_faces(triangles, 0.0015)
    weights = np.random.default_rng(0).dirichlet(np.ones(3), 2000)
    for k in range(2):
        gaps = np.linalg.norm((weights @ triangles[k])[:, None] - samples[face == k], axis=2).min(axis=1)
        assert gaps.max() < 0.0015


def test_force_closure_of_contacts_known_by_hand():
    corners = np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]) / np.sqrt(3)
    assert np.isfinite(closure_effort(0.04 * corners, corners))  # four fingers around a ball
    assert closure_effort(0.04 * corners, corners, friction=0.0) == np.inf  # nothing holds a smooth ball's spin
    ring = np.array([[np.cos(a), np.sin(a), 1.0] for a in np.arange(6)]) / np.sqrt(2)
    assert closure_effort(0.04 * ring, ring) == np.inf  # all from above
    pair = np.array([[1.0, 0, 0], [-1.0, 0, 0]])
    assert closure_effort(np.repeat(0.04 * pair, 2, axis=0), np.repeat(pair, 2, axis=0)) == np.inf  # turns about x
    patches = 0.04 * np.repeat(pair, 3, axis=0) + 0.005 * np.tile([[0, 1, 0], [0, -1, 0.5], [0, 0, -1]], (2, 1))
    assert np.isfinite(closure_effort(patches, np.repeat(pair, 3, axis=0)))  # two soft fingertips
    assert closure_effort(0.04 * corners, corners) == pytest.approx(closure_effort(40 * corners, corners), rel=1e-4)


def test_a_mug_of_half_a_million_faces_is_grasped_like_any_other(hand):
    coarse = make_object("mug", 0)
    fine = trimesh.Trimesh(coarse.vertices, coarse.faces, process=False)
    while len(fine.faces) < 400_000:
        fine = fine.subdivide()
    (found,) = find_grasps(object_from(fine, "mug"), hand, 1, np.random.default_rng(0))
    vertices = hand(found.hand_params).vertices
    # The coarse mug is the same surface, small enough for an independent look.
    assert found.accepted and depth_by_trimesh(coarse, vertices) <= 0.002
    assert edges_through_by_trimesh(coarse, vertices, mesh_edges(hand.faces())) == 0


def test_what_no_hand_can_hold_gives_no_grasp(hand):
    globe = trimesh.creation.icosphere(subdivisions=3, radius=0.5)
    assert find_grasps(object_from(globe), hand, 2, np.random.default_rng(0), max_tries=128) == []


def same(a, b) -> bool:
    names = ("global_orient", "hand_pose", "transl", "hand_betas", "hand_side")
    pairs = list(zip(a, b, strict=True))
    poses = all(np.array_equal(getattr(x.hand_params, n), getattr(y.hand_params, n)) for x, y in pairs for n in names)
    return poses and all(replace(x, hand_params=y.hand_params) == y for x, y in pairs)


def test_cached_grasps_are_searched_once_and_come_back_unchanged(hand, tmp_path, monkeypatch):
    mesh = make_object("can", 2)
    first = cached_grasps(mesh, hand, 2, seed=5, cache_dir=tmp_path / "grasps")
    fresh = find_grasps(mesh, hand, 2, np.random.default_rng(5))
    assert len(first) == 2 and same(first, fresh)

    with monkeypatch.context() as patch:
        patch.setattr(grasp_search, "find_grasps", lambda *_: pytest.fail("searched again"))
        assert same(cached_grasps(mesh, hand, 2, seed=5, cache_dir=tmp_path / "grasps"), first)

    asked = []
    monkeypatch.setattr(grasp_search, "find_grasps", lambda *arguments: asked.append(arguments[2]) or first[:1])
    cached_grasps(mesh, hand, 2, seed=6, cache_dir=tmp_path / "grasps")
    cached_grasps(mesh, hand, 3, seed=5, cache_dir=tmp_path / "grasps")
    cached_grasps(replace(mesh, vertices=1.01 * mesh.vertices), hand, 2, seed=5, cache_dir=tmp_path / "grasps")
    assert asked == [2, 3, 2]


def test_a_broken_cache_file_is_replaced(found, hand, tmp_path, monkeypatch):
    mesh, _, grasps = found["mug"]
    monkeypatch.setattr(grasp_search, "find_grasps", lambda *_: grasps)
    cached_grasps(mesh, hand, 7, 0, tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    for damage in (whole[: len(whole) // 2], b"", b"not a zip file"):
        path.write_bytes(damage)
        assert same(cached_grasps(mesh, hand, 7, 0, tmp_path), grasps)
        assert [p.name for p in tmp_path.iterdir()] == [path.name]
        monkeypatch.setattr(grasp_search, "find_grasps", lambda *_: grasps)
    assert same(_read_cache(path)[0], grasps)


def test_a_cache_that_cannot_be_written_is_told_once_with_its_flag_and_the_grasps_come(hand, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setattr(grasp_search, "find_grasps", lambda *_: [])
    with pytest.warns(RuntimeWarning, match="file cannot be written to .*choose another folder with --cache"):
        assert cached_grasps(make_object("can", 2), hand, 2, 0, tmp_path / "file") == []


def test_no_grasps_are_remembered_too(hand, tmp_path, monkeypatch):
    mesh = make_object("can", 2)
    monkeypatch.setattr(grasp_search, "find_grasps", lambda *_: [])
    assert cached_grasps(mesh, hand, 2, 0, tmp_path) == []
    monkeypatch.setattr(grasp_search, "find_grasps", lambda *_: pytest.fail("searched again"))
    assert cached_grasps(mesh, hand, 2, 0, tmp_path) == []
