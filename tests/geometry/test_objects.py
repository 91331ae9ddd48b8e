"""Built-in families and mesh loading against trimesh, and the messages for meshes that cannot be used."""

import errno
import os
import time
from pathlib import Path

import numpy as np
import pytest
import trimesh

from hoi.geometry.objects import CATEGORIES, find_objects, guess_category, load_object, make_object, save_object

SEEDS = range(25)


def as_trimesh(mesh):
    return trimesh.Trimesh(mesh.vertices, mesh.faces, process=False)


@pytest.fixture(scope="module")
def families():
    return {category: [make_object(category, seed) for seed in SEEDS] for category in CATEGORIES}


def bodies(mesh):
    """Closed parts, the largest first."""
    return sorted(as_trimesh(mesh).split(only_watertight=False), key=lambda part: -part.area)


def test_every_body_of_every_family_is_closed_and_faces_outward(families):
    for mesh in (mesh for meshes in families.values() for mesh in meshes):
        assert mesh.watertight and as_trimesh(mesh).is_watertight, mesh.object_id
        assert as_trimesh(mesh).is_winding_consistent, mesh.object_id
        assert as_trimesh(mesh).area_faces.min() > 1e-9, mesh.object_id  # no slivers: normals exist
        assert 2000 <= len(mesh.faces) <= 9500, mesh.object_id
    for category in CATEGORIES:
        for mesh in families[category][:4]:
            assert all(part.volume > 0 for part in bodies(mesh)), mesh.object_id


def test_sizes_are_those_of_real_things(families):
    limits = {  # millimetres: height and width (y: without a handle)
        "mug": ((80, 110), (66, 96)), "bowl": ((42, 90), (120, 180)), "bottle": ((160, 240), (32, 80)),
        "can": ((80, 130), (50, 82)),
    }
    for category, (height, width) in limits.items():
        for mesh in families[category]:
            extent = 1e3 * np.ptp(mesh.vertices, axis=0)
            assert height[0] <= extent[2] <= height[1] and width[0] <= extent[1] <= width[1], (mesh.object_id, extent)
            np.testing.assert_allclose(mesh.vertices.min(axis=0), -mesh.vertices.max(axis=0), atol=1e-7)


def test_mugs_and_bowls_are_hollow_with_walls_of_a_potter(families):
    for category, walls in (("mug", (2.2, 5.5)), ("bowl", (2.2, 6.5))):
        for mesh in families[category][:12]:
            body = bodies(mesh)[0]
            axis = body.bounds.mean(axis=0)[:2]
            high = 0.25 * np.ptp(body.vertices[:, 2])  # a quarter of the height above the middle
            origins = np.array([[*axis, body.bounds.mean(axis=0)[2] + high]] * 5)
            angle = np.linspace(0.3, 5.5, 5)
            directions = np.stack([np.cos(angle), np.sin(angle), 0 * angle], axis=1)
            places, rays, _ = body.ray.intersects_location(origins, directions)
            for ray in range(5):
                radii = np.sort(np.linalg.norm(places[rays == ray][:, :2] - axis, axis=1))
                assert len(radii) == 2 and walls[0] < 1e3 * (radii[1] - radii[0]) < walls[1], (mesh.object_id, radii)
            assert body.volume < 0.45 * body.convex_hull.volume


def test_a_mugs_handle_is_towards_x_outside_the_cup_and_leaves_room_for_fingers(families):
    for mesh in families["mug"]:
        body, handle = bodies(mesh)
        assert handle.centroid[0] > 0.03 and abs(handle.centroid[1]) < 1e-4
        radius = np.hypot(*(handle.vertices - body.centroid * [1, 0, 0])[:, :2].T)
        loose = ~body.contains(handle.vertices)
        # What is not buried in the wall lies outside the cup, none inside it: it is farther out than the wall there.
        wall = np.array([np.hypot(*(body.vertices[np.abs(body.vertices[:, 2] - z) < 4e-3] - body.centroid * [1, 0, 0])
                                  [:, :2].T).max() for z in handle.vertices[loose][:, 2]])
        assert (radius[loose] > wall - 4.5e-3).all() and (~loose).sum() >= 30, mesh.object_id
        middle = np.abs(handle.vertices[:, 2] - handle.bounds.mean(axis=0)[2]) < 6e-3
        side = np.abs(body.vertices[:, 2] - handle.bounds.mean(axis=0)[2]) < 8e-3
        assert handle.vertices[middle, 0].min() - body.vertices[side, 0].max() > 0.015, mesh.object_id


def test_the_same_seed_is_the_same_object_and_other_seeds_are_others(families):
    for category in CATEGORIES:
        again = make_object(category, 3)
        assert np.array_equal(again.vertices, families[category][3].vertices) and again.object_id == f"{category}_0003"
        sizes = {tuple(np.ptp(mesh.vertices, axis=0)) for mesh in families[category]}
        assert len(sizes) == len(SEEDS)


def test_a_saved_object_comes_back_exactly_and_trimesh_reads_it(families, tmp_path):
    for category in CATEGORIES:
        mesh = families[category][0]
        save_object(mesh, tmp_path / f"{mesh.object_id}.ply")
        back = load_object(tmp_path / f"{mesh.object_id}.ply")
        assert np.array_equal(back.vertices, mesh.vertices) and np.array_equal(back.faces, mesh.faces)
        assert back.object_id == mesh.object_id and back.category == category and back.watertight
        assert np.array_equal(back.file_to_canonical, np.eye(4))
        loaded = trimesh.load(tmp_path / f"{mesh.object_id}.ply", process=False)
        assert np.array_equal(loaded.faces, mesh.faces) and np.array_equal(loaded.vertices, mesh.vertices)
    assert len(list(tmp_path.iterdir())) == 4  # no unfinished files


@pytest.fixture
def cup():
    """A lopsided closed thing, 90 x 60 x 40 mm, in metres, off centre."""
    mesh = trimesh.creation.icosphere(2)
    mesh.vertices[mesh.vertices[:, 0] > 0.5, 2] += 0.3
    mesh.vertices *= np.array([0.09, 0.06, 0.04]) / np.ptp(mesh.vertices, axis=0)
    mesh.vertices += [0.2, -0.1, 0.3]
    return mesh


@pytest.mark.parametrize(("factor", "units", "said"), [
    (1.0, None, "Taken as metres"), (1000.0, None, "90 units long cannot be metres, so it was taken as millimetres"),
    (100.0, None, "taken as centimetres"), (100 / 2.54, "in", "inches"), (100.0, "cm", "Units as given: centimetres"),
    (1 / 0.07, 0.07, "0.07 m each"), (10.0, "dm", "decimetres"),
])
def test_units_are_recognised_or_obeyed_and_always_said(factor, units, said, cup, tmp_path):
    cup.copy().apply_scale(factor).export(tmp_path / "cup.ply")
    mesh = load_object(tmp_path / "cup.ply", units=units)
    np.testing.assert_allclose(np.ptp(mesh.vertices, axis=0), [0.09, 0.06, 0.04], atol=1e-7)
    assert any(said in note for note in mesh.notes), mesh.notes
    assert any("Moved the centre" in note for note in mesh.notes)
    file_vertices = np.c_[cup.vertices * factor, np.ones(len(cup.vertices))]
    canonical = (file_vertices @ mesh.file_to_canonical.T)[:, :3]
    np.testing.assert_allclose(canonical, mesh.vertices, atol=1e-7)
    np.testing.assert_allclose(mesh.vertices.min(axis=0), -mesh.vertices.max(axis=0), atol=1e-7)


@pytest.mark.parametrize("suffix", ["obj", "ply", "stl", "glb", "off"])
def test_every_format_gives_the_same_closed_object(suffix, cup, tmp_path):
    cup.export(tmp_path / f"cup.{suffix}")
    mesh = load_object(tmp_path / f"cup.{suffix}", up="z")
    assert mesh.watertight and len(mesh.vertices) == len(cup.vertices)
    np.testing.assert_allclose(as_trimesh(mesh).volume, cup.volume, rtol=1e-4)
    np.testing.assert_allclose(np.sort(mesh.vertices[:, 0]), np.sort(cup.vertices[:, 0] - 0.2), atol=1e-3)


def test_gltf_is_y_up_by_definition_and_others_by_request(cup, tmp_path):
    cup.export(tmp_path / "cup.glb")
    cup.export(tmp_path / "cup.ply")
    from_gltf, from_ply = load_object(tmp_path / "cup.glb"), load_object(tmp_path / "cup.ply", up="y")
    np.testing.assert_allclose(from_gltf.vertices, from_ply.vertices, atol=1e-7)
    np.testing.assert_allclose(np.ptp(from_ply.vertices, axis=0), [0.09, 0.04, 0.06], atol=1e-7)
    assert any("y axis is up" in note for note in from_gltf.notes)
    np.testing.assert_allclose(np.linalg.det(from_ply.file_to_canonical[:3, :3]), 1.0)  # turned, not mirrored
    np.testing.assert_allclose(from_ply.file_to_canonical[2, :3], [0, 1, 0])


def test_parts_of_a_scene_keep_their_places_and_mirrored_ones_their_outside(cup, tmp_path):
    scene = trimesh.Scene()
    mirrored = np.diag([-1.0, 1.0, 1.0, 1.0])
    mirrored[0, 3] = 0.3
    scene.add_geometry(cup, node_name="first")
    scene.add_geometry(cup, node_name="second", transform=mirrored)
    scene.export(tmp_path / "pair.glb")
    mesh = load_object(tmp_path / "pair.glb", up="z")
    assert any("Joined 2 parts" in note for note in mesh.notes)
    np.testing.assert_allclose(as_trimesh(mesh).volume, 2 * cup.volume, rtol=1e-5)
    np.testing.assert_allclose(np.ptp(mesh.vertices, axis=0), np.ptp(scene.to_geometry().vertices, axis=0), atol=1e-6)


def test_a_textured_mesh_is_closed_again_along_its_seams_without_its_picture(tmp_path):
    box = [(x, y, z) for x in (0, 0.1) for y in (0, 0.08) for z in (0, 0.06)]
    lines = ["mtllib not_there.mtl", "usemtl paint", *(f"v {x} {y} {z}" for x, y, z in box)]
    lines += [f"vt {u / 30} {1 - u / 30}" for u in range(24)]
    quads = [(1, 2, 4, 3), (5, 7, 8, 6), (1, 5, 6, 2), (3, 4, 8, 7), (1, 3, 7, 5), (2, 6, 8, 4)]
    lines += ["f " + " ".join(f"{v}/{4 * k + i + 1}" for i, v in enumerate(quad)) for k, quad in enumerate(quads)]
    (tmp_path / "box.obj").write_text("\n".join(lines))
    mesh = load_object(tmp_path / "box.obj")
    assert mesh.watertight and len(mesh.vertices) == 8 and len(mesh.faces) == 12
    np.testing.assert_allclose(as_trimesh(mesh).volume, 0.1 * 0.08 * 0.06, rtol=1e-5)


def test_turned_duplicate_and_empty_faces_are_mended_and_said(cup, tmp_path):
    faces = cup.faces.copy()
    faces[[4, 50, 51]] = faces[[4, 50, 51], ::-1]
    faces = np.vstack([faces, faces[7], [3, 3, 9]])
    trimesh.Trimesh(cup.vertices, faces, process=False).export(tmp_path / "cup.ply")
    mesh = load_object(tmp_path / "cup.ply")
    assert mesh.watertight and as_trimesh(mesh).is_winding_consistent and len(mesh.faces) == len(cup.faces)
    np.testing.assert_allclose(as_trimesh(mesh).volume, cup.volume, rtol=1e-5)
    for said in ("Turned 3 faces", "Removed 1 duplicate", "Removed 1 faces without area"):
        assert any(said in note for note in mesh.notes), mesh.notes


def test_an_inside_out_mesh_is_turned_but_a_closed_cavity_stays_one(cup, tmp_path):
    inverted = cup.copy()
    inverted.invert()
    inverted.export(tmp_path / "cup.off")
    mesh = load_object(tmp_path / "cup.off")
    assert as_trimesh(mesh).volume > 0 and any("inside out" in note for note in mesh.notes)
    cavity = inverted.copy()
    cavity.vertices = (cavity.vertices - cavity.centroid) * 0.5 + cavity.centroid
    trimesh.util.concatenate([cup, cavity]).export(tmp_path / "shell.ply")
    np.testing.assert_allclose(as_trimesh(load_object(tmp_path / "shell.ply")).volume, cup.volume * 0.875, rtol=1e-5)


def test_stray_fins_of_a_scan_do_not_leave_it_open(cup, tmp_path):
    a, b, c = cup.faces[0]
    fin = [[a, b, len(cup.vertices)], [b, a, len(cup.vertices)]]
    vertices = np.vstack([cup.vertices, cup.vertices[c] + [0, 0, 0.002]])
    trimesh.Trimesh(vertices, np.vstack([cup.faces, fin]), process=False).export(tmp_path / "scan.ply")
    mesh = load_object(tmp_path / "scan.ply")
    assert mesh.watertight and len(mesh.faces) == len(cup.faces)


def test_open_and_non_manifold_meshes_are_used_with_a_warning(cup, tmp_path):
    trimesh.Trimesh(cup.vertices, cup.faces[1:], process=False).export(tmp_path / "open.ply")
    mesh = load_object(tmp_path / "open.ply")
    assert not mesh.watertight and any("open (3 boundary edges)" in note for note in mesh.notes)
    faces = np.vstack([cup.faces, [*cup.faces[0][:2], cup.faces[200][0]]])
    trimesh.Trimesh(cup.vertices, faces, process=False).export(tmp_path / "fin.ply")
    mesh = load_object(tmp_path / "fin.ply")
    assert not mesh.watertight and any("non-manifold" in note for note in mesh.notes)


OBJ_TETRAHEDRON = "v 0 0 {z}\nv 0 {s} 0\nv {s} 0 0\nv {s} {s} {s}\nf 1 2 3\nf 1 2 4\nf 1 3 4\nf 2 3 4\n"


@pytest.mark.parametrize(("name", "content", "message"), [
    ("empty.obj", "", "has no triangles"), ("empty.stl", "", "has no triangles"),
    ("words.ply", "not a mesh", "cannot be read as a .ply"), ("words.glb", "not a mesh", "cannot be read as a .glb"),
    ("text.docx", "a", "cannot be read as a .docx.*; convert it to one of .obj, .ply"),
    ("points.obj", "v 0 0 0\nv 1 0 0\nv 0 1 0\n", "has no triangles"),
    ("nan.obj", OBJ_TETRAHEDRON.format(s=0.1, z="nan"), "1 of 4 vertices have NaN or infinite coordinates"),
    ("inf.obj", OBJ_TETRAHEDRON.format(s=0.1, z="inf"), "1 of 4 vertices have NaN or infinite coordinates"),
    ("flat.obj", "v 0 0 0\nv 0 .1 0\nv .1 0 0\nv .1 .1 0\nf 1 2 3\nf 2 4 3\n", "flat: its box is 0.1 x 0.1 x 0 units"),
    ("index.off", "OFF\n3 1 0\n0 0 0\n0 1 0\n1 0 1\n3 0 1 7\n", "index.off"),
    ("huge.obj", OBJ_TETRAHEDRON.format(s=1.4, z=0), "1.4 m long .* Pass --units dm or cm or in"),
    ("tiny.obj", OBJ_TETRAHEDRON.format(s=0.004, z=0), "0.004 m long .* such as --units 30"),
    ("vast.obj", OBJ_TETRAHEDRON.format(s=3000, z=0), "3 m long"),
])
def test_a_mesh_that_cannot_be_used_is_refused_with_its_reason(name, content, message, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        load_object(tmp_path / name)


def test_wrong_arguments_and_places_are_named(cup, tmp_path):
    cup.export(tmp_path / "cup.ply")
    with pytest.raises(ValueError, match="units is 'furlong', expected one of m, dm, cm, mm, in"):
        load_object(tmp_path / "cup.ply", units="furlong")
    with pytest.raises(ValueError, match="up is 'x'"):
        load_object(tmp_path / "cup.ply", up="x")
    with pytest.raises(FileNotFoundError, match="nothing.stl does not exist"):
        load_object(tmp_path / "nothing.stl")
    with pytest.raises(FileNotFoundError, match="It is a folder"):
        load_object(tmp_path)
    with pytest.raises(FileNotFoundError, match="no_folder"):
        find_objects(tmp_path / "no_folder")
    (tmp_path / "bare").mkdir()
    with pytest.raises(ValueError, match="holds no mesh"):
        find_objects(tmp_path / "bare")


def test_a_truncated_file_is_refused(cup, tmp_path):
    for suffix in ("ply", "stl", "glb"):
        path = tmp_path / f"cup.{suffix}"
        cup.export(path)
        path.write_bytes(path.read_bytes()[:700])
        with pytest.raises(ValueError, match=f"cup.{suffix}"):
            load_object(path)


def test_a_full_disk_leaves_no_part_of_a_saved_mesh(families, tmp_path, monkeypatch):
    def full(source, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="the disk is full; what was finished is safe"):
        save_object(families["can"][0], tmp_path / "can.ply")
    assert not list(tmp_path.iterdir())


def test_folders_are_searched_in_order_of_path(cup, tmp_path):
    for name in ("b/bowl.stl", "a/can.PLY", "a/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert [p.relative_to(tmp_path) for p in find_objects(tmp_path)] == [Path("a/can.PLY"), Path("b/bowl.stl")]
    assert find_objects(tmp_path / "b" / "bowl.stl") == [tmp_path / "b" / "bowl.stl"]


@pytest.mark.parametrize(("path", "noun"), [
    ("025_mug.stl", "mug"), ("006_mustard_bottle.stl", "mustard bottle"), ("CoffeeMug_v2.obj", "coffee mug"),
    ("ycb/025_mug/google_16k/textured.obj", "mug"), ("bowl (3).ply", "bowl"), ("can12.glb", "can"),
    ("scans/1a04e3eab45ca15dd86060f189eb133b/model.obj", "object"),
])
def test_the_category_is_the_noun_in_the_name(path, noun):
    assert guess_category(Path("/data/models") / path) == noun


def test_the_guessed_category_is_said_and_a_given_one_taken(cup, tmp_path):
    cup.export(tmp_path / "012_blue_cup.ply")
    guessed = load_object(tmp_path / "012_blue_cup.ply")
    assert guessed.category == "blue cup" and guessed.object_id == "012_blue_cup"
    assert any("Called 'blue cup'" in note for note in guessed.notes)
    assert load_object(tmp_path / "012_blue_cup.ply", category="teacup").category == "teacup"


def test_half_a_million_faces_load_in_seconds(tmp_path):
    sphere = trimesh.creation.icosphere(6, 40.0)
    many = trimesh.util.concatenate([sphere.copy().apply_translation([0, 0, 90.0 * k]) for k in range(6)])
    many.export(tmp_path / "beads.stl")
    start = time.process_time()
    mesh = load_object(tmp_path / "beads.stl")
    assert time.process_time() - start < 10.0 and mesh.watertight and len(mesh.faces) == len(many.faces) > 490_000
