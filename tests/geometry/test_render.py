"""Rendering against ray casting, analytic spheres, planes and boxes, and one backend against the other."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import trimesh

from hoi.geometry.camera import Camera, look_at, make_intrinsics
from hoi.geometry.hand import HandParams
from hoi.geometry.objects import make_object
from hoi.geometry.raster import FAR, NEAR, start_pyrender
from hoi.geometry.render import HAND, OBJECT, Renderer, crease_normals

UP = np.array([0.0, 0.0, 1.0])


def pyrender_or_skip() -> Renderer:
    """Where CI is set, a missing GL is a failure: the comparison of the backends must not vanish silently."""
    renderer = Renderer()
    if renderer.backend != "pyrender":
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"needs pyrender's GL: {renderer.reason}")
    return renderer


@pytest.fixture(params=["numpy", "pyrender"])
def renderer(request: pytest.FixtureRequest) -> Renderer:
    return Renderer("numpy") if request.param == "numpy" else pyrender_or_skip()


def camera_at(position: list[float], size: int = 128, target: tuple[float, ...] = (0.0, 0.0, 0.0)) -> Camera:
    world_to_camera = look_at(np.array(position), np.array(target), UP)
    return Camera(make_intrinsics(size, size), world_to_camera, size, size)


def arrays(mesh: trimesh.Trimesh) -> tuple[np.ndarray, np.ndarray]:
    return np.asarray(mesh.vertices, dtype=np.float64), np.asarray(mesh.faces, dtype=np.int64)


def sphere(radius: float = 0.05, center: tuple[float, ...] = (0, 0, 0), subdivisions: int = 4) -> trimesh.Trimesh:
    mesh = trimesh.creation.icosphere(subdivisions=subdivisions, radius=radius)
    mesh.apply_translation(center)
    return mesh


def cup() -> trimesh.Trimesh:
    """A thin-walled open cup with 2 mm walls."""
    outline = [[0, -0.05], [0.035, -0.05], [0.04, 0.05], [0.038, 0.05], [0.033, -0.048], [0, -0.048]]
    return trimesh.creation.revolve(outline, sections=64)


def rays(camera: Camera) -> np.ndarray:
    """Camera-frame ray of each pixel with z = 1: (H, W, 3)."""
    v, u = np.mgrid[: camera.height, : camera.width].astype(float)
    return np.stack([u, v, np.ones_like(u)], axis=-1) @ np.linalg.inv(camera.intrinsics).T


def sphere_depth(camera: Camera, center: np.ndarray, radius: float) -> np.ndarray:
    """Analytic depth of a sphere, 0 where the ray misses."""
    center = camera.world_to_camera[:3, :3] @ center + camera.world_to_camera[:3, 3]
    ray = rays(camera)
    along, square = ray @ center, (ray**2).sum(-1)
    root = along**2 - square * (center @ center - radius**2)
    return np.where(root > 0, (along - np.sqrt(np.maximum(root, 0))) / square, 0.0)


SCENES = {
    "two spheres": (sphere(0.03, (0.04, 0.03, 0.0)), sphere(), [0.4, 0.1, 0.2]),
    "capsule in a thin-walled cup": (trimesh.creation.capsule(height=0.1, radius=0.015), cup(), [0.3, 0.05, 0.3]),
    "long thin faces": (
        sphere(0.03, (0.04, 0.0, 0.0)),
        trimesh.creation.cylinder(0.04, 0.1, sections=400),
        [0.3, 0.2, 0.1],
    ),
    "a few large faces": (
        sphere(0.03, (0.05, 0.0, 0.0)),
        trimesh.creation.box(extents=[0.05, 0.1, 0.12]),
        [0.3, 0.2, 0.2],
    ),
    "faces that pass behind the camera": (
        sphere(0.03),
        trimesh.creation.box(extents=[1.0, 1.0, 0.02]),
        [0.3, 0.05, 0.1],
    ),
}


@pytest.fixture(scope="module", autouse=True)
def real_hand(hand) -> None:
    """The built-in hand around a mug of the built-in family joins the scenes: what the project renders all day."""
    pose = HandParams(np.array([0.2, 0.4, -0.3]), np.full(45, 0.12), np.array([0.12, 0.03, 0.05]), np.zeros(10))
    skin, mug = hand(pose), make_object("mug", 3)
    SCENES["a hand and a mug"] = (trimesh.Trimesh(skin.vertices, skin.faces, process=False),
                                  trimesh.Trimesh(mug.vertices, mug.faces, process=False), [0.3, 0.1, 0.2])  # fmt: skip


@pytest.mark.parametrize("name", [*SCENES, "a hand and a mug"])
@pytest.mark.parametrize("size", [256, 512])
def test_pyrender_and_numpy_agree_to_one_pixel_and_a_hundredth_of_a_millimetre(name: str, size: int) -> None:
    gl, numpy = pyrender_or_skip(), Renderer("numpy")
    hand, object_mesh, position = SCENES[name]
    camera = camera_at(position, size)
    seen = [each.render(*arrays(hand), *arrays(object_mesh), camera) for each in (gl, numpy)]
    same = seen[0].label_map == seen[1].label_map
    assert (seen[1].label_map == HAND).any() and (seen[1].label_map == OBJECT).any()
    # GL rounds corners to 1/256 pixel: a pixel centre that near a silhouette may fall on its other side.
    few = max(1, 1e-5 * size * size)
    assert (~same).sum() <= few and (seen[0].object_mask != seen[1].object_mask).sum() <= few
    for row, column in np.argwhere(~same):
        around = seen[1].label_map[max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2]
        assert seen[0].label_map[row, column] in around
    assert np.abs(seen[0].depth - seen[1].depth)[same].max() < 1e-5
    cosine = (seen[0].surface_normals * seen[1].surface_normals).sum(-1)[same & (seen[0].label_map > 0)]
    assert np.degrees(np.arccos(np.clip(cosine, -1, 1))).max() < 0.1


@pytest.mark.parametrize("name", ["two spheres", "capsule in a thin-walled cup", "a few large faces"])
def test_labels_and_depth_equal_ray_casting(renderer: Renderer, name: str) -> None:
    hand, object_mesh, position = SCENES[name]
    camera = camera_at(position, 64)
    gbuffer = renderer.render(*arrays(hand), *arrays(object_mesh), camera)
    both = trimesh.util.concatenate([hand, object_mesh])
    directions = rays(camera).reshape(-1, 3) @ camera.world_to_camera[:3, :3]
    hits, ray, face = both.ray.intersects_location(
        np.tile(camera.position, (len(directions), 1)), directions, multiple_hits=False
    )
    depth = np.zeros(len(directions))
    depth[ray] = (camera.world_to_camera[2, :3] @ hits.T) + camera.world_to_camera[2, 3]
    labels = np.zeros(len(directions), dtype=int)
    labels[ray] = np.where(face < len(hand.faces), HAND, OBJECT)
    same = labels == gbuffer.label_map.ravel()
    assert (~same).sum() <= 1
    assert np.abs(depth - gbuffer.depth.ravel())[same].max() < 1e-6


def test_normals_of_a_sphere_are_its_radii(renderer: Renderer) -> None:
    camera = camera_at([0.35, 0.1, 0.2])
    gbuffer = renderer.render(None, None, *arrays(sphere(0.05)), camera)
    center = camera.world_to_camera[:3, 3]
    expected = rays(camera) * gbuffer.depth[..., None] - center
    expected /= np.linalg.norm(expected, axis=-1, keepdims=True)
    seen = gbuffer.label_map == OBJECT
    angles = np.degrees(np.arccos(np.clip((gbuffer.surface_normals * expected).sum(-1)[seen], -1, 1)))
    assert np.median(angles) < 0.3 and angles.max() < 2.0
    np.testing.assert_allclose(np.linalg.norm(gbuffer.surface_normals[seen], axis=-1), 1.0, atol=1e-5)
    assert not gbuffer.surface_normals[~seen].any()


def test_a_mesh_finer_than_the_pixels_has_the_depth_of_its_sphere(renderer: Renderer) -> None:
    camera = camera_at([0.3, 0.1, 0.2])
    fine = sphere(0.06, subdivisions=7)
    assert len(fine.faces) > 300_000
    gbuffer = renderer.render(None, None, *arrays(fine), camera)
    expected = sphere_depth(camera, np.zeros(3), 0.06)
    both = (gbuffer.depth > 0) & (expected > 0)
    assert ((gbuffer.depth > 0) != (expected > 0)).sum() <= 2
    assert np.median(np.abs(gbuffer.depth - expected)[both]) < 2e-6


def test_pixel_centres_are_at_integers(renderer: Renderer) -> None:
    camera = Camera(make_intrinsics(24, 32), np.eye(4), 24, 32)
    left, right, top, bottom = 9.5, 20.5, 4.5, 12.5
    pixels = np.array([[left, top, 1], [right, top, 1], [right, bottom, 1], [left, bottom, 1]])
    quad = 0.7 * pixels @ np.linalg.inv(camera.intrinsics).T
    gbuffer = renderer.render(None, None, quad, np.array([[0, 1, 2], [0, 2, 3]]), camera)
    expected = np.zeros((24, 32), dtype=bool)
    expected[5:13, 10:21] = True
    np.testing.assert_array_equal(gbuffer.object_mask, expected)
    np.testing.assert_allclose(gbuffer.depth[expected], 0.7, atol=1e-6)


def test_a_floor_under_and_behind_the_camera_is_seen_up_to_the_horizon(renderer: Renderer) -> None:
    position = np.array([0.0, 0.0, 0.2])
    camera = camera_at([0.0, 0.0, 0.2], target=(0.0, 1.0, 0.1))
    floor = np.array([[-50.0, -50, 0], [50, -50, 0], [50, 50, 0], [-50, 50, 0]])
    gbuffer = renderer.render(None, None, floor, np.array([[0, 1, 2], [0, 2, 3]]), camera)
    down = (rays(camera) @ camera.world_to_camera[:3, :3])[..., 2]
    with np.errstate(divide="ignore"):
        expected = -position[2] / down
    clear = (down < 0) & (expected < 40)
    np.testing.assert_allclose(gbuffer.depth[clear], expected[clear], rtol=1e-5)
    assert clear.sum() > 4000 and not gbuffer.object_mask[down >= 0].any()
    upward = camera.world_to_camera[:3, :3] @ UP
    np.testing.assert_allclose(gbuffer.surface_normals[clear] @ upward, 1.0, atol=1e-5)


def test_nothing_nearer_than_the_near_plane_or_beyond_the_far_one_is_seen(renderer: Renderer) -> None:
    camera = Camera(make_intrinsics(64, 64), np.eye(4), 64, 64)
    slanted = np.array([[-0.001, -0.001, 0.002], [0.001, -0.001, 0.002], [0.3, 0.05, 0.5], [-0.3, 0.05, 0.5]])
    faces = np.array([[0, 1, 2], [0, 2, 3]])
    gbuffer = renderer.render(None, None, slanted, faces, camera)
    normal = np.cross(slanted[1] - slanted[0], slanted[2] - slanted[0])
    depth = normal @ slanted[0] / (rays(camera) @ normal)  # of the plane that holds both faces
    upper, lower = np.flatnonzero(gbuffer.object_mask[:, 32])[[0, -1]]
    assert depth[upper, 32] >= NEAR > depth[upper - 1, 32] > 0.002 and depth[lower, 32] > 0.3
    np.testing.assert_allclose(gbuffer.depth[upper : lower + 1, 32], depth[upper : lower + 1, 32], atol=1e-6)
    wall = np.array([[-900.0, -900, 0], [900, -900, 0], [900, 900, 0], [-900, 900, 0]])
    assert renderer.render(None, None, wall + [0, 0, FAR - 1], faces, camera).object_mask.all()
    assert not renderer.render(None, None, wall + [0, 0, FAR + 1], faces, camera).object_mask.any()
    tilted = wall + [0, 0, FAR - 1] + wall[:, :1] * [0, 0, 1]  # comes near on the left, too far on the right
    mask = renderer.render(None, None, tilted, faces, camera).object_mask
    assert mask[:, 0].all() and not mask[:, -1].any()


@pytest.mark.parametrize("seed", range(8))
def test_a_face_seen_exactly_from_the_side_hides_nothing_in_front_of_it(seed: int) -> None:
    position = np.random.default_rng(seed).normal(size=3)
    camera = camera_at(position.tolist(), 33)  # odd: the face lies on the middle column of pixel centres
    side = np.array([[0, -0.05, 0.3], [0, 0.05, 0.3], [0, 0.05, 0.4], [0, -0.05, 0.4]])
    front = np.array([[-1.0, -1, 0.2], [1, -1, 0.2], [1, 1, 0.2], [-1, 1, 0.2]])
    to_world = np.linalg.inv(camera.world_to_camera)
    vertices = np.concatenate([front, side]) @ to_world[:3, :3].T + to_world[:3, 3]
    faces = np.array([[0, 1, 2], [0, 2, 3], [4, 5, 6], [4, 6, 7]])
    gbuffer = Renderer("numpy").render(None, None, vertices, faces, camera)
    np.testing.assert_allclose(gbuffer.depth, 0.2, atol=1e-6)


def test_folded_edges_stay_sharp_and_flat_ones_are_smooth(renderer: Renderer) -> None:
    camera = camera_at([0.3, 0.1, 0.3], 256)
    can = trimesh.creation.cylinder(radius=0.04, height=0.08, sections=64)
    gbuffer = renderer.render(None, None, *arrays(can), camera)
    seen = gbuffer.object_mask
    normals = gbuffer.surface_normals[seen] @ camera.world_to_camera[:3, :3]  # to the can's own frame
    points = rays(camera)[seen] * gbuffer.depth[seen][:, None] - camera.world_to_camera[:3, 3]
    points = points @ camera.world_to_camera[:3, :3]
    top = points[:, 2] > 0.04 - 1e-6
    assert top.sum() > 900 and (~top).sum() > 900
    np.testing.assert_allclose(normals[top], np.tile(UP, (top.sum(), 1)), atol=1e-6)
    radii = points[~top] * [1, 1, 0] / np.linalg.norm(points[~top][:, :2], axis=1, keepdims=True)
    angles = np.degrees(np.arccos(np.clip((normals[~top] * radii).sum(1), -1, 1)))
    assert angles.max() < 0.2  # flat sides would be off by up to 360 / 64 / 2 = 2.8 degrees


def test_seams_of_doubled_vertices_do_not_show() -> None:
    vertices, faces = arrays(sphere(subdivisions=3))
    torn = vertices[faces].reshape(-1, 3), np.arange(faces.size).reshape(-1, 3)
    np.testing.assert_allclose(crease_normals(*torn), crease_normals(vertices, faces), atol=1e-12)


def test_an_open_surface_seen_from_behind_faces_the_camera(renderer: Renderer) -> None:
    camera = Camera(make_intrinsics(32, 32), np.eye(4), 32, 32)
    triangle = np.array([[-0.1, -0.1, 0.5], [0.1, -0.1, 0.5], [0.0, 0.1, 0.5]])
    for winding in ([[0, 1, 2]], [[0, 2, 1]]):
        gbuffer = renderer.render(None, None, triangle, np.array(winding), camera)
        assert gbuffer.object_mask.sum() > 50
        np.testing.assert_allclose(
            gbuffer.surface_normals[gbuffer.object_mask], [[0, 0, -1]] * gbuffer.object_mask.sum()
        )


def test_the_object_mask_ignores_the_hand(renderer: Renderer) -> None:
    camera = camera_at([0.4, 0.0, 0.1])
    in_front, behind = sphere(0.03, (0.1, 0.0, 0.0)), sphere(0.03, (-0.1, 0.0, 0.0))
    alone = renderer.render(None, None, *arrays(sphere()), camera)
    covered = renderer.render(*arrays(in_front), *arrays(sphere()), camera)
    hidden = renderer.render(*arrays(behind), *arrays(sphere()), camera)
    for gbuffer in (covered, hidden):
        np.testing.assert_array_equal(gbuffer.object_mask, alone.object_mask)
        assert gbuffer.object_mask[gbuffer.label_map == OBJECT].all()
    assert (covered.object_mask & (covered.label_map == HAND)).sum() > 200
    np.testing.assert_array_equal(hidden.label_map, alone.label_map)
    assert (covered.depth[covered.label_map == HAND] < 0.4).all()


def test_a_moved_hand_is_drawn_anew_and_a_moved_camera_turns_the_normals(renderer: Renderer) -> None:
    first, second = camera_at([0.4, 0.0, 0.1]), camera_at([0.0, 0.4, 0.1])
    vertices, faces = arrays(sphere(0.03))
    start = renderer.render(vertices, faces, None, None, first)
    moved = renderer.render(vertices + [0.0, 0.05, 0.0], faces, None, None, first)
    shift = np.argwhere(moved.label_map == HAND).mean(0) - np.argwhere(start.label_map == HAND).mean(0)
    assert shift[1] > 10 and abs(shift[0]) < 1  # +y is to the right of this camera
    around = renderer.render(None, None, vertices, faces, second)
    np.testing.assert_allclose(around.surface_normals.sum((0, 1))[:2], 0, atol=30)
    assert around.surface_normals[around.object_mask][:, 2].max() < 0.2


def test_an_empty_scene_is_all_background(renderer: Renderer) -> None:
    gbuffer = renderer.render(None, None, None, None, camera_at([0.4, 0.0, 0.1], 16))
    assert not gbuffer.depth.any() and not gbuffer.label_map.any() and not gbuffer.object_mask.any()


def run_python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_without_gl_numpy_draws_and_says_why() -> None:
    code = "from hoi.geometry.render import Renderer; r = Renderer(); print(r.backend, '|', r.reason)"
    backend, reason = run_python(code, PYOPENGL_PLATFORM="nothing").split(" | ")
    assert backend == "numpy" and reason.startswith("pyrender: ")


def test_a_forked_worker_draws_with_numpy_instead_of_hanging() -> None:
    if not hasattr(os, "fork") or isinstance(start_pyrender(), str):
        pyrender_or_skip()
    code = """
import multiprocessing
from hoi.geometry.render import Renderer
def backend(_):
    return Renderer().backend
print(backend(0), *multiprocessing.get_context("fork").Pool(1).map_async(backend, [0]).get(60))
"""
    assert run_python(code) == "pyrender numpy"


def test_torchs_compiler_can_be_imported_after_gl():
    pyrender_or_skip()
    code = (
        "import numpy as np\nfrom hoi.geometry.camera import Camera, make_intrinsics\n"
        "from hoi.geometry.render import Renderer\n"
        "camera = Camera(make_intrinsics(8, 8, 60), np.eye(4), 8, 8)\n"
        "triangle = np.array([[0.0, 0, 1], [1, 0, 1], [0, 1, 1]]), np.array([[0, 1, 2]])\n"
        "Renderer().render(None, None, *triangle, camera)\n"
        "import torch._dynamo, torch.utils._triton\ntorch.utils._triton.has_triton()"
    )
    root = Path(__file__).parents[2]
    ended = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr  # a crash of LLVM before
