"""Mesh files as other programs write them: right sizes and volumes, or refused with what is wrong and what to do.

tests/cases/mesh holds small files of such programs; the rest is written here by trimesh or by hand from the formats'
definitions.
"""

import base64
import json
import shutil
import struct
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import trimesh

from hoi.geometry.mesh_files import _cut_ears, _notched, read_mesh
from hoi.geometry.objects import collect_objects, find_objects, guess_category, load_object

CASES = Path(__file__).parents[1] / "cases" / "mesh"
CUP = ((70, 70, 100), 295.4, 380.5)  # box in mm, area in cm2, volume in cm3


def measures(mesh):
    surface = trimesh.Trimesh(mesh.vertices, mesh.faces, process=False)
    return np.rint(1e3 * np.ptp(mesh.vertices, axis=0)).astype(int).tolist(), 1e4 * surface.area, 1e6 * surface.volume


@pytest.mark.parametrize(("name", "box", "area", "volume"), [
    ("concave_ngon.obj", (80, 80, 30), 195.3, 120.0),  # two notched caps of 40.0 and the sides
    ("blender_mixed.ply", (50, 60, 100), 280.0, 300.0),  # triangles and quads
    ("tristrips.ply", (100, 100, 100), 236.6, 166.7),
    ("dups.obj", *CUP), ("glued.off", *CUP), ("latin1.obj", *CUP), ("multi_mat.obj", *CUP), ("offset_utm.obj", *CUP),
    ("solid_header.stl", *CUP), ("ngon_cup.obj", (70, 70, 100), 290.9, 367.5),
    ("quads_le.ply", (50, 60, 100), 280.0, 300.0),
    ("nested_mirror.glb", (99, 100, 70), 325.3, 385.9), ("strip.glb", (100, 100, 100), 236.6, 166.7),
])  # fmt: skip
def test_files_of_other_programs_have_their_right_sizes(name, box, area, volume):
    mesh = load_object(CASES / name)
    found = measures(mesh)
    assert mesh.watertight and found[0] == list(box)
    np.testing.assert_allclose(found[1:], (area, volume), rtol=1e-3)


def test_a_format_with_words_of_its_own_for_unit_and_axis_is_refused_with_what_to_do(tmp_path):
    (tmp_path / "cup.STEP").write_text("ISO-10303-21;")
    for path in (CASES / "cup_cm.dae", CASES / "cup_inch.3mf", tmp_path / "cup.STEP"):
        with pytest.raises(ValueError, match=f"{path.name} cannot be .* is not read here; convert it to one of .obj"):
            load_object(path)


def test_a_shape_lost_in_float32_is_told_as_that():
    with pytest.raises(ValueError, match="5.4e.06 units from the origin, where float32 .* 0.5 apart.* Move it to the"):
        load_object(CASES / "offset_utm.ply")
    with pytest.raises(ValueError, match="no triangles"):
        load_object(CASES / "cloud.ply")


# --- faces with notches ---


def test_cut_ears_cover_a_polygon_once_whatever_its_plane():
    generator = np.random.default_rng(0)
    for n in (5, 9, 30):
        angle = np.sort(generator.uniform(0, 2 * np.pi, n)) + np.arange(n) * 1e-3
        star = np.stack([np.cos(angle), np.sin(angle), 0 * angle], axis=1) * generator.uniform(0.2, 1, n)[:, None]
        area = 0.5 * np.cross(star, np.roll(star, -1, axis=0)).sum(axis=0)[2]
        for turn in (np.eye(3), trimesh.transformations.random_rotation_matrix(generator.uniform(size=3))[:3, :3]):
            faces = trimesh.Trimesh(star @ turn.T, _cut_ears(star @ turn.T), process=False)
            normals = np.cross(*np.moveaxis(faces.triangles[:, 1:] - faces.triangles[:, :1], 1, 0)) @ turn[:, 2] / 2
            np.testing.assert_allclose([normals.sum(), np.abs(normals).sum()], area, rtol=1e-9)
    # A square ring whose inner and outer border are joined by a bridge, passed twice.
    ring = np.array([(0, 0), (4, 0), (4, 4), (0, 4), (0, 0), (1, 1), (1, 3), (3, 3), (3, 1), (1, 1.0)])
    ring = np.c_[ring, np.zeros(len(ring))]
    assert abs(trimesh.Trimesh(ring, _cut_ears(ring), process=False).area - 12) < 1e-9
    assert not _notched(np.array([[(0, 0, 0), (1, 0, 0), (1, 1, 0), (0.5, 1, 0), (0, 1, 0)]], dtype=float)).any()


ARROW = [(0, 0, 0), (0.1, 0, 0), (0.02, 0.02, 0), (0, 0.1, 0)]  # a dart, whose third corner is the notch
TOP = [(x, y, 0.05) for x, y, _ in ARROW]
QUADS = [(3, 2, 1, 0), (4, 5, 6, 7), (0, 1, 5, 4), (1, 2, 6, 5), (2, 3, 7, 6), (3, 0, 4, 7)]


@pytest.mark.parametrize("shift", range(4))
@pytest.mark.parametrize("suffix", ["obj", "off", "ply"])
def test_a_notched_quad_is_filled_right_in_every_format(suffix, shift, tmp_path):
    faces = [tuple(np.roll(quad, shift)) for quad in QUADS]
    vertices = "".join(f"{{}}{x} {y} {z}\n" for x, y, z in ARROW + TOP)
    text = {
        "obj": vertices.format(*["v "] * 8)
               + "".join("f " + " ".join(f"{c + 1}" for c in face) + "\n" for face in faces),
        "off": "OFF\n8 6 0\n" + vertices.format(*[""] * 8),
        "ply": "ply\nformat ascii 1.0\nelement vertex 8\nproperty float x\nproperty float y\nproperty float z\n"
               "element face 6\nproperty list uchar int vertex_index\nend_header\n" + vertices.format(*[""] * 8),
    }[suffix]  # fmt: skip
    text += "" if suffix == "obj" else "".join("4 " + " ".join(map(str, face)) + "\n" for face in faces)
    (tmp_path / f"dart.{suffix}").write_text(text)
    _, area, volume = measures(load_object(tmp_path / f"dart.{suffix}"))
    cap = 0.1 * 0.02  # of the dart: two triangles of 0.1 x 0.02 / 2
    sides = 0.05 * (0.2 + 2 * np.hypot(0.08, 0.02))
    np.testing.assert_allclose((area, volume), (1e4 * (2 * cap + sides), 1e6 * cap * 0.05), rtol=1e-6)


def test_corners_of_an_obj_that_count_backwards_are_those_written_so_far(tmp_path):
    boxes = [trimesh.creation.box([0.05] * 3).apply_translation([0.1 * k, 0, 0]) for k in range(2)]
    text = ""
    for box in boxes:
        text += "".join(f"v {x} {y} {z}\n" for x, y, z in box.vertices)
        text += "".join("f " + " ".join(str(c - 8) for c in face) + "\n" for face in box.faces)
    (tmp_path / "two.obj").write_text(text)
    assert measures(load_object(tmp_path / "two.obj"))[0] == [150, 50, 50]
    np.testing.assert_allclose(measures(load_object(tmp_path / "two.obj"))[2], 250, rtol=1e-6)


# --- PLY ---


def ply_of(layout, count_type="u1", index_type="i4"):
    """A tetrahedron in binary with a colour after each face, an element of its own in front, and double coordinates."""
    order = {"binary_little_endian": "<", "binary_big_endian": ">"}[layout]
    names = {"u1": "uchar", "i4": "int", "u2": "ushort"}
    head = (
        f"ply\nformat {layout} 1.0\ncomment written by a test\nelement light 2\nproperty uchar kind\n"
        "property list uchar float at\nelement vertex 4\nproperty double x\nproperty double y\nproperty double z\n"
        f"element face 4\nproperty list {names[count_type]} {names[index_type]} vertex_indices\nproperty uchar red\n"
        "end_header\n"
    )
    body = struct.pack(order + "BBf", 1, 1, 0.5) + struct.pack(order + "BBff", 2, 2, 0.5, 0.6)
    body += np.array([(0, 0, 0), (0.1, 0, 0), (0, 0.1, 0), (0, 0, 0.1)], dtype=f"{order}f8").tobytes()
    for face in ((0, 2, 1), (0, 1, 3), (0, 3, 2), (1, 2, 3)):
        body += np.array(3, order + count_type).tobytes() + np.array(face, order + index_type).tobytes() + b"\xff"
    return head.encode() + body


@pytest.mark.parametrize("layout", ["binary_little_endian", "binary_big_endian"])
def test_binary_ply_of_both_orders_with_elements_in_between(layout, tmp_path):
    for counts in (("u1", "i4"), ("u2", "u2")):
        (tmp_path / "corner.ply").write_bytes(ply_of(layout, *counts))
        mesh = load_object(tmp_path / "corner.ply")
        assert mesh.watertight and abs(measures(mesh)[2] - 1e6 * 0.1**3 / 6) < 1e-3


def test_a_ply_that_ends_early_or_promises_the_moon_is_refused_at_once(tmp_path):
    whole = ply_of("binary_little_endian")
    changes = {b"vertex 4": b"vertex 4000000000", b"face 4": b"face 9", b"double x": b"decimal x", b"binary_": b""}
    for content in (whole[:-9], b"ply\n", *(whole.replace(*change) for change in changes.items())):
        (tmp_path / "cut.ply").write_bytes(content)
        with pytest.raises(ValueError, match="cut.ply cannot be read as a .ply file"):
            load_object(tmp_path / "cut.ply")


# --- glTF ---


def gltf(tmp_path, **changes):
    """A tetrahedron of 0.1 m as .gltf with its buffer in the file; `changes` replace entries of its JSON."""
    points = np.array([(0, 0, 0), (0.1, 0, 0), (0, 0.1, 0), (0, 0, 0.1)], dtype="<f4")
    faces = np.array([(0, 2, 1), (0, 1, 3), (0, 3, 2), (1, 2, 3)], dtype="<u2")
    data = points.tobytes() + faces.tobytes() + np.array([3], "<u2").tobytes() + bytes(2)
    data += np.array([0, 0, 0.2], "<f4").tobytes()
    tree = {
        "asset": {"version": "2.0"}, "scenes": [{"nodes": [0]}], "nodes": [{"mesh": 0}],
        "meshes": [{"primitives": [{"attributes": {"POSITION": 0}, "indices": 1}]}],
        "accessors": [{"bufferView": 0, "componentType": 5126, "count": 4, "type": "VEC3"},
                      {"bufferView": 1, "componentType": 5123, "count": 12, "type": "SCALAR"}],
        "bufferViews": [{"buffer": 0, "byteOffset": start, "byteLength": length}
                        for start, length in ((0, 48), (48, 24), (72, 2), (76, 12))],
        "buffers": [{"byteLength": len(data),
                     "uri": "data:application/octet-stream;base64," + base64.b64encode(data).decode()}],
    }  # fmt: skip
    path = tmp_path / "corner.gltf"
    path.write_text(json.dumps(tree | changes))
    return path


@pytest.mark.parametrize("name", ["KHR_draco_mesh_compression", "EXT_meshopt_compression", "EXT_mesh_gpu_instancing",
                                  "KHR_mesh_quantization"])
def test_a_required_extension_that_changes_shapes_is_refused_by_its_name(name, tmp_path):
    with pytest.raises(ValueError, match=f"extension {name}, which is not read here: export it without"):
        load_object(gltf(tmp_path, extensionsRequired=["KHR_materials_unlit", name]))
    assert load_object(gltf(tmp_path, extensionsRequired=["KHR_materials_unlit", "KHR_texture_transform"])).watertight
    with pytest.raises(ValueError, match="extension KHR_draco_mesh_compression, which is not read here: export it"):
        load_object(CASES / "draco_like.glb")
    for file in ("quant_norm.glb", "quant_int.glb"):
        with pytest.raises(ValueError, match="extension KHR_mesh_quantization, which is not read here: export it"):
            load_object(CASES / file)


def test_gltf_is_in_metres_without_a_word_and_a_file_in_millimetres_is_refused_with_the_flag(tmp_path):
    mesh = load_object(CASES / "nested_mirror.glb")
    assert not any(word in note for note in mesh.notes for word in ("metres", "unit", "Unit"))
    path = tmp_path / "mm.glb"
    trimesh.creation.box([50, 60, 70]).export(path)
    with pytest.raises(ValueError, match="70 m long .70 units, the file's unit is 1 m.*Pass --units mm"):
        load_object(path)
    assert measures(load_object(path, units="mm"))[0] == [50, 70, 60]


POSITIONS = {"bufferView": 0, "componentType": 5126, "count": 4, "type": "VEC3"}
CORNERS = {"bufferView": 1, "componentType": 5123, "count": 12, "type": "SCALAR"}
SPARSE = {"sparse": {"count": 1, "indices": {"bufferView": 2, "componentType": 5123}, "values": {"bufferView": 3}}}


@pytest.mark.parametrize(("changes", "message"), [
    ({"accessors": [POSITIONS | SPARSE, CORNERS]}, "positions are sparse or have no data: export it without"),
    ({"accessors": [POSITIONS, CORNERS | SPARSE]}, "positions are sparse or have no data"),
    ({"accessors": [{"componentType": 5126, "count": 4, "type": "VEC3"}, CORNERS]}, "have no data"),
    ({"accessors": [POSITIONS | {"normalized": True}, CORNERS]}, "positions are quantized"),
    ({"accessors": [POSITIONS | {"componentType": 5122}, CORNERS]}, "positions are quantized"),
    *(({"meshes": [{"primitives": [{"attributes": {"POSITION": 0}, "indices": 1, "mode": mode}]}]},
       "fans or joined lines, which are not read here: export triangles") for mode in (2, 3, 6)),
    ({"nodes": [{"mesh": 0, "camera": 0}], "cameras": [{"type": "perspective", "perspective": {}}]}, "a camera with"),
    ({"asset": {"version": "1.0"}}, "not glTF 2"), ({"nodes": [{"mesh": 0, "children": [0]}]}, "in its tree twice"),
    ({"buffers": []}, "cannot be read"), ({"buffers": [{"byteLength": 9, "uri": "gone.bin"}]}, "gone.bin"),
    ({"buffers": [{"byteLength": 9, "uri": "../outside.bin"}]}, "outside.bin' is no file beside it"),
    ({"scenes": []}, "cannot be read"),
    ({"meshes": [{"primitives": [{"attributes": {"POSITION": 0}, "mode": 1}]}]}, "no triangles"),
])  # fmt: skip
def test_a_gltf_that_trimesh_would_read_wrong_or_not_at_all_is_refused(changes, message, tmp_path):
    (tmp_path / "outside.bin").write_bytes(bytes(99))
    (tmp_path / "files").mkdir()
    with pytest.raises(ValueError, match=message):
        load_object(gltf(tmp_path / "files", **changes))


def test_buffers_of_a_gltf_are_read_from_files_beside_it_also_with_blanks_in_their_names(tmp_path):
    tree = json.loads(gltf(tmp_path).read_text())
    (tmp_path / "the data.bin").write_bytes(base64.b64decode(tree["buffers"][0]["uri"].partition(",")[2]))
    mesh = load_object(gltf(tmp_path, buffers=[tree["buffers"][0] | {"uri": "the%20data.bin"}]))
    assert mesh.watertight and measures(mesh)[0] == [100, 100, 100]


# --- axes, names, folders ---


def test_an_obj_says_that_blender_writes_y_up_and_a_z_up_gltf_names_the_flag(tmp_path):
    (tmp_path / "cup.obj").write_text(trimesh.creation.cylinder(0.035, 0.1).export(file_type="obj"))
    assert any("Blender writes it with y up: pass --up y" in note for note in load_object(tmp_path / "cup.obj").notes)
    assert not any("Blender" in note for note in load_object(tmp_path / "cup.obj", up="z").notes)
    trimesh.creation.cylinder(0.035, 0.12).export(tmp_path / "zup.glb")
    assert any("--up z" in note for note in load_object(tmp_path / "zup.glb").notes)


@pytest.mark.parametrize(("path", "noun"), [
    ("café_mug.stl", "café mug"), (unicodedata.normalize("NFD", "café_mug.stl"), "café mug"), ("杯子.stl", "杯子"),
    ("杯.stl", "杯"), ("แก้วน้ำ.obj", "แก้วน้ำ"), ("प्याला_2.obj", "प्याला"), ("kupa_żółta.stl", "kupa żółta"),
    ("mug_inches.stl", "mug"), ("mug v2 final.stl", "mug"), ("Кружка.ply", "кружка"), ("ÉtéMug.ply", "été mug"),
])  # fmt: skip
def test_a_noun_is_in_any_script_and_no_unit_or_version(path, noun):
    assert guess_category(Path("/srv") / path) == noun


@pytest.mark.parametrize("path", [
    "/home/alice/model.obj", "/Users/alice/mesh.stl", "/home/alice/Downloads/model.obj", "/data/Downloads/model.obj",
    "/media/alice/scan.ply", "/home/alice/Téléchargements/final.stl", "/home/alice/下载/v2.stl",
])  # fmt: skip
def test_no_noun_or_file_name_tells_who_made_it(path):
    assert guess_category(Path(path)) == "object"
    assert "alice" not in guess_category(Path.home() / "model.obj") + guess_category(Path(path))


def test_a_home_directory_anywhere_is_no_noun(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "people" / "alice"))
    assert guess_category(tmp_path / "people" / "alice" / "model.obj") == "object"
    assert guess_category(tmp_path / "people" / "alice" / "mugs" / "model.obj") == "mugs"


def test_objects_of_one_name_get_ids_of_their_own_also_where_one_looks_numbered_or_differs_in_case(tmp_path):
    for name in ("a/jar.stl", "b/jar.stl", "c/jar_2.stl", "d/Jar.stl", "e/test.stl", "f/train_car.stl"):
        (tmp_path / name).parent.mkdir()
        shutil.copy(CASES / "solid_header.stl", tmp_path / name)
    ids = [mesh.object_id for mesh in collect_objects([str(tmp_path)], category="jar")]
    assert len({name.lower() for name in ids}) == 6 and ids[0] == "jar" and ids[-1] == "objtrain_car"


def test_every_mesh_file_may_have_its_own_category(tmp_path):
    for name in ("a.stl", "b.stl"):
        shutil.copy(CASES / "solid_header.stl", tmp_path / name)
    words = [str(tmp_path / "b.stl"), "can", str(tmp_path / "a.stl")]
    assert [m.category for m in collect_objects(words, category=["pink mug", "jar"])] == ["pink mug", "can", "jar"]
    assert [m.category for m in collect_objects(words, category=["jar"])] == ["jar", "can", "jar"]
    with pytest.raises(ValueError, match="3 nouns .pink, mug, jar. for 2 mesh files .*b.stl.*a.stl"):
        collect_objects(words, category=["pink", "mug", "jar"])


def test_linked_folders_are_searched_once_and_other_kinds_are_named(tmp_path):
    scans = tmp_path / "scans"
    (tmp_path / "elsewhere").mkdir()
    scans.mkdir()
    shutil.copy(CASES / "solid_header.stl", tmp_path / "elsewhere" / "mug.stl")
    (scans / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "elsewhere")
    (scans / "._mug.stl").write_bytes(b"of macOS")
    (scans / "lamp.STEP").write_bytes(b"")
    (scans / "sofa.blend").write_bytes(b"")
    assert find_objects(scans) == [scans / "linked" / "mug.stl"]
    (mesh,) = collect_objects([str(scans)])
    assert any("lamp.STEP, sofa.blend" in note for note in mesh.notes)
    (scans / "linked").unlink()
    with pytest.raises(ValueError, match="holds no mesh; .*lamp.STEP, sofa.blend.*convert"):
        find_objects(scans)


def test_small_files_that_would_unfold_to_giants_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("hoi.geometry.mesh_files.MOST_UNPACKED", 1000)
    often = [POSITIONS, {"bufferView": 0, "componentType": 5121, "count": 48, "type": "SCALAR"}]
    nodes = {"nodes": [{"mesh": 0}] * 300, "scenes": [{"nodes": list(range(300))}]}
    views = [{"buffer": 0, "byteLength": 88}] * 300
    many = [POSITIONS, CORNERS, POSITIONS | {"count": 10**6}]
    for changes in ({"accessors": often, **nodes}, {"accessors": many}, {"bufferViews": views}):
        with pytest.raises(ValueError, match="unfolds to .* simplify it"):
            load_object(gltf(tmp_path, **changes))
    (tmp_path / "mug.zip").write_bytes(b"")
    with pytest.raises(ValueError, match="archive; unpack it"):
        load_object(tmp_path / "mug.zip")


def test_a_spiral_of_a_thousand_corners_is_cut_to_its_area(tmp_path):
    """From its first corner on most are no ears: searched from there each time, it took minutes."""
    turns = np.linspace(0, 20 * np.pi, 500)
    inner, outer = (np.stack([(turns + gap) * np.cos(turns), (turns + gap) * np.sin(turns)], axis=1) for gap in (4, 5))
    corners = np.concatenate([outer, inner[::-1]])
    x, y = corners.T
    area = abs(np.sum(x * np.roll(y, -1) - y * np.roll(x, -1))) / 2
    lines = [f"v {a} {b} 0" for a, b in corners] + ["v 0 0 9", "f " + " ".join(map(str, range(1, 1001))), "f 1 2 1001"]
    (tmp_path / "spiral.obj").write_text("\n".join(lines))
    mesh = read_mesh(tmp_path / "spiral.obj")
    triangles = mesh.vertices[mesh.faces[(mesh.vertices[mesh.faces][..., 2] == 0).all(axis=1)]]
    sizes = np.linalg.norm(np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0]), axis=1) / 2
    assert len(triangles) == 998 and sizes.sum() == pytest.approx(area)


def test_a_list_of_two_and_a_half_corners_is_refused(tmp_path):
    head = "ply\nformat ascii 1.0\nelement vertex 1\nproperty float x\nproperty float y\nproperty float z\n"
    rows = "element face 1\nproperty list uchar int vertex_indices\nend_header\n0 0 0\n2.5 0 0 0\n"
    (tmp_path / "half.ply").write_text(head + rows)
    with pytest.raises(ValueError, match="no whole number of entries"):
        read_mesh(tmp_path / "half.ply")
