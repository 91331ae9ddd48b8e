"""The camera against pyrender's projection matrix, against an actual resize, and against its own promises."""

import numpy as np
from PIL import Image
from pyrender import PerspectiveCamera

from hoi.geometry.camera import (
    CAMERA_FOV_DEG,
    crop_intrinsics,
    look_at,
    make_intrinsics,
    project,
    sample_camera,
    transform_points,
)


def test_the_official_picture_has_focal_length_443_and_its_centre_between_pixels():
    np.testing.assert_allclose(
        make_intrinsics(512, 512), [[443.405, 0, 255.5], [0, 443.405, 255.5], [0, 0, 1]], atol=5e-4
    )


def test_projection_agrees_with_the_matrix_that_pyrender_gives_to_opengl():
    height, width = 240, 320
    points = np.random.default_rng(0).uniform([-0.2, -0.2, 0.3], [0.2, 0.2, 0.6], (50, 3))
    clip = PerspectiveCamera(yfov=np.radians(50.0)).get_projection_matrix(width, height) @ np.concatenate(
        [points * [1, -1, -1], np.ones((50, 1))], axis=1).T
    device = (clip[:2] / clip[3]).T  # -1 and 1 are the picture's borders, half a pixel outside the outer centres
    expected = np.stack([(device[:, 0] + 1) / 2 * width - 0.5, (1 - device[:, 1]) / 2 * height - 0.5], axis=1)
    np.testing.assert_allclose(project(points, make_intrinsics(height, width, 50.0)), expected, atol=1e-9)


def test_what_the_camera_looks_at_is_in_the_middle_and_up_is_up():
    position, target = np.array([0.3, -0.2, 0.25]), np.array([0.02, 0.01, -0.03])
    world_to_camera = look_at(position, target, np.array([0.0, 0.0, 1.0]))
    intrinsics = make_intrinsics(100, 140)
    seen = project(transform_points(world_to_camera, np.stack([target, target + [0, 0, 0.02]])), intrinsics)
    np.testing.assert_allclose(seen[0], [69.5, 49.5], atol=1e-9)
    assert seen[1, 1] < 49.4 and abs(seen[1, 0] - 69.5) < 1e-9
    np.testing.assert_allclose(np.linalg.det(world_to_camera[:3, :3]), 1.0)  # no mirror image
    np.testing.assert_allclose(transform_points(world_to_camera, target)[2], np.linalg.norm(target - position))


def test_points_behind_the_camera_have_no_pixel():
    pixels = project(np.array([[0.1, 0.1, -0.5], [0.1, 0.1, 0.5]]), make_intrinsics(64, 64))
    assert np.isnan(pixels[0]).all() and np.isfinite(pixels[1]).all()


def test_cropped_intrinsics_follow_the_pixels_of_a_real_resize():
    old = make_intrinsics(200, 300)
    left, top, crop_height, crop_width = 40, 20, 120, 160
    new = crop_intrinsics(old, left, top, crop_height, crop_width, 60, 40)
    columns = Image.fromarray(np.tile(np.arange(300, dtype=np.float32), (200, 1)))
    rows = Image.fromarray(np.tile(np.arange(200, dtype=np.float32)[:, None], (1, 300)))
    box = (left, top, left + crop_width, top + crop_height)
    # Every pixel of the ramps holds its own coordinate, so the small pictures hold those of the large one.
    old_u = np.asarray(columns.resize((40, 60), Image.Resampling.BOX, box=box))
    old_v = np.asarray(rows.resize((40, 60), Image.Resampling.BOX, box=box))
    ray = np.linalg.inv(new) @ [7.0, 11.0, 1.0]
    np.testing.assert_allclose(project(ray, old), [old_u[11, 7], old_v[11, 7]], atol=1e-4)


def test_sampled_views_keep_the_official_ranges_and_go_all_around():
    generator = np.random.default_rng(1)
    cameras = [sample_camera(generator, 64, 64) for _ in range(400)]
    positions = np.array([camera.position for camera in cameras])
    distance = np.linalg.norm(positions, axis=1)
    elevation = np.degrees(np.arcsin(positions[:, 2] / distance))
    azimuth = np.degrees(np.arctan2(positions[:, 1], positions[:, 0])) % 360
    assert 0.35 <= distance.min() < 0.355 and 0.445 < distance.max() <= 0.45
    assert 5.0 <= elevation.min() < 6.0 and 59.0 < elevation.max() <= 60.0
    assert (np.histogram(azimuth, 8, (0, 360))[0] > 25).all()
    centre = np.array([transform_points(camera.world_to_camera, np.zeros(3)) for camera in cameras])
    off_axis = np.linalg.norm(centre[:, :2], axis=1)  # the axis meets a sphere of 5 cm about the origin
    assert 0.04 < off_axis.max() <= 0.05 + 1e-12
    official = np.array([sample_camera(generator, 64, 64, official=True).position for _ in range(400)])
    azimuth, distance = np.degrees(np.arctan2(official[:, 1], official[:, 0])), np.linalg.norm(official, axis=1)
    elevation = np.degrees(np.arcsin(official[:, 2] / distance))
    assert 0.0 <= azimuth.min() < 0.005 and 0.095 < azimuth.max() <= 0.1
    assert 0.35 <= distance.min() < 0.355 and 0.445 < distance.max() <= 0.45
    assert 5.0 <= elevation.min() < 6.0 and 59.0 < elevation.max() <= 60.0


def test_the_same_generator_state_gives_the_same_view():
    first, second = (sample_camera(np.random.default_rng(7), 64, 64) for _ in range(2))
    assert np.array_equal(first.world_to_camera, second.world_to_camera)


def test_the_nocs_camera_is_the_middle_square_of_a_nocs_frame():
    """Frames of 640x480 px, focal length 577.5, principal point (319.5, 239.5); a picture of 512 px shows 480 of it."""
    frame = np.array([[577.5, 0, 319.5], [0, 577.5, 239.5], [0, 0, 1]])
    camera = sample_camera(np.random.default_rng(0), 512, 512, fov_deg=CAMERA_FOV_DEG["nocs"])
    np.testing.assert_allclose(camera.intrinsics, crop_intrinsics(frame, 80, 0, 480, 480, 512, 512), atol=1e-9)
    np.testing.assert_allclose(camera.intrinsics[:2].ravel(), [616, 0, 255.5, 0, 616, 255.5], atol=1e-9)
