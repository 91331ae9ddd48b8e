"""Scenes: the annotation is the geometry, framings keep their promises, all randomness comes from the generator."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.spatial import cKDTree

from hoi.geometry.camera import WRIST_MARGIN, project, sample_camera, transform_points
from hoi.geometry.grasp import Grasp
from hoi.geometry.hand import HandParams, hand_in_camera
from hoi.geometry.objects import make_object
from hoi.geometry.render import Renderer
from hoi.geometry.scene import (
    MIN_VISIBLE,
    GraspedObject,
    ViewSettings,
    annotate,
    compose_scene,
    mirror_mesh,
    plain_text,
    render_scene,
)
from hoi.toyworld.looks import sample_look, shade_scene

SIZE = 128


@pytest.fixture(scope="module")
def objects():
    """A can beside an open hand; no search, since only the composition is tested."""
    pose = HandParams(np.array([0.1, 0.2, -0.4]), np.full(45, 0.1), np.array([0.14, 0.02, 0.06]), np.zeros(10))
    grasp = Grasp(pose, 0.2, 0, (True, True, True, False, False), True, 1.0)
    return [GraspedObject(make_object("can", 0), (grasp,), (grasp,))]


def compose(objects, hand, renderer, seed, content="hand_object", **options):
    settings = ViewSettings(SIZE, SIZE, **options)
    return compose_scene(objects, hand, renderer, np.random.default_rng(seed), settings, content)


@pytest.mark.parametrize("side", ["right", "left"])
def test_parameters_in_the_camera_frame_give_the_same_hand_seen_from_the_camera(hand, side):
    rng = np.random.default_rng(3)
    pose = HandParams(rng.normal(size=3), 0.2 * rng.normal(size=45), rng.normal(size=3), rng.normal(size=10), side)
    world_to_camera = sample_camera(rng, SIZE, SIZE).world_to_camera
    seen = transform_points(world_to_camera, hand(pose).vertices)
    np.testing.assert_allclose(hand(hand_in_camera(pose, hand, world_to_camera)).vertices, seen, atol=2e-6)


def test_a_left_hand_is_as_far_from_the_object_as_the_right_hand_from_its_mirror_image(objects, hand, renderer):
    scene = compose(objects, hand, renderer, 0, hand_side="left")
    assert scene.hand_params[0].hand_side == "left"
    left = cKDTree(scene.object_mesh.vertices).query(hand(scene.hand_params[0]).vertices)[0]
    right = cKDTree(mirror_mesh(scene.object_mesh).vertices).query(hand(scene.grasp.hand_params).vertices)[0]
    np.testing.assert_allclose(np.sort(left), np.sort(right), atol=1e-7)


def test_a_mirrored_mesh_still_faces_outward():
    mesh = mirror_mesh(make_object("mug", 1))
    corners = mesh.vertices[mesh.faces]
    assert np.einsum("ni,ni->n", corners[:, 0], np.cross(corners[:, 1], corners[:, 2])).sum() / 6 > 1e-5  # its volume


def test_tight_framing_zooms_in_keeps_everything_and_puts_the_wrist_at_the_border(objects, hand, renderer):
    at_border = 0
    for seed in range(12):
        scene = compose(objects, hand, renderer, seed, framing="tight")
        keypoints = annotate(scene, 0, hand)["keypoints_2d"]
        outline = project(
            transform_points(scene.camera.world_to_camera, scene.object_mesh.vertices), scene.camera.intrinsics
        )
        both = np.concatenate([keypoints, outline])
        assert both.min() >= -0.5 and both.max() <= SIZE - 0.5
        assert np.ptp(both, axis=0).max() > 0.7 * SIZE
        border = min(keypoints[0].min(), (SIZE - 1 - keypoints[0]).min())
        at_border += border < 2 * WRIST_MARGIN * SIZE
    assert at_border >= 8, f"the wrist is at the border in {at_border} of 12 views"


@pytest.mark.parametrize("framing", ["official", "tight"])
def test_hand_and_object_can_both_be_seen(objects, hand, renderer, framing):
    for seed in range(8):
        scene = compose(objects, hand, renderer, seed, framing=framing)
        share = np.bincount(render_scene(scene, 0, hand, renderer).label_map.ravel(), minlength=3) / SIZE**2
        assert share[1:].min() >= MIN_VISIBLE[framing]


# Pixels of background, hand, object, and mean depth (m) of what is seen: of the numpy renderer, measured at c2e1649,
# before scenes kept the render that chose their camera.
VIEWS = [
    (0, {}, [14832, 957, 595], 0.36843207),  # anew: an arm that points to the camera is passed over
    (1, {"content": "object", "framing": "tight"}, [10463, 0, 5921], 0.36793060),
    (2, {"frames": 3, "hand_side": "left"}, [14971, 839, 574], 0.40292983),
]


@pytest.mark.parametrize(("seed", "options", "pixels", "depth"), VIEWS)
def test_a_scene_keeps_its_last_frame_as_a_fresh_render_would_draw_it(objects, hand, seed, options, pixels, depth):
    renderer = Renderer("numpy")
    scene = compose(objects, hand, renderer, seed, **options)
    last = scene.frames - 1
    kept, fresh = (render_scene(s, last, hand, renderer) for s in (scene, replace(scene, last_gbuffer=None)))
    assert kept is scene.last_gbuffer and fresh is not kept
    for name in ("label_map", "depth", "surface_normals", "object_mask"):
        np.testing.assert_array_equal(getattr(kept, name), getattr(fresh, name))
    np.testing.assert_allclose(np.bincount(kept.label_map.ravel(), minlength=3), pixels, atol=2)
    assert kept.depth[kept.depth > 0].mean(dtype=float) == pytest.approx(depth, rel=1e-4)
    assert render_scene(scene, last, hand, renderer, factor=2).depth.shape == (2 * SIZE, 2 * SIZE)
    if last:
        assert (render_scene(scene, 0, hand, renderer).label_map != kept.label_map).any()


def test_an_enlarged_camera_sees_the_same_points_twice_as_far_apart():
    camera = sample_camera(np.random.default_rng(0), SIZE, SIZE)
    points = np.random.default_rng(1).uniform(-0.1, 0.1, (20, 3)) + [0, 0, 0.5]
    once, twice = project(points, camera.intrinsics), project(points, camera.scaled(2).intrinsics)
    np.testing.assert_allclose(twice + 0.5, 2 * (once + 0.5), atol=1e-9)  # pixel areas double, centres are at integers


def test_shaded_pictures_lie_over_their_label_maps(objects, hand, renderer):
    scene = compose(objects, hand, renderer, 1, content="object", framing="tight")
    large = render_scene(scene, 0, hand, renderer, factor=2)
    labels = render_scene(scene, 0, hand, renderer).label_map
    look = sample_look(np.random.default_rng(0), style="lab")
    look = replace(look, object_color="red", material="plain", background="in front of a gray wall")
    image, text = shade_scene(scene, large, look, np.random.default_rng(2))
    red = image[..., 0] > 1.5 * image[..., 1:].max(axis=-1)  # in shadow too; gray is never
    overlap = (red & (labels == 2)).sum() / (red | (labels == 2)).sum()
    assert overlap > 0.95, overlap
    assert "red can" in text and "hand" not in text


def test_the_approach_is_annotated_frame_by_frame(objects, hand, renderer):
    scene = compose(objects, hand, renderer, 5, frames=4)
    records = [annotate(scene, frame, hand) for frame in range(4)]
    heights = [(np.linalg.inv(scene.camera.world_to_camera) @ [*r["keypoints_3d"][0], 1])[2] for r in records]
    assert heights[0] == pytest.approx(heights[-1] + 0.15, abs=0.01)  # from vertically above, canonical z
    assert records[-1]["contact"] is True and records[-1]["penetration_mm"] == 0.2
    assert "contact" not in records[0]  # not measured without a distance field, so not claimed


@pytest.mark.parametrize("options", [{}, {"hand_side": "left", "framing": "tight"}, {"frames": 3}])
def test_a_turned_object_keeps_its_hand_and_the_camera_keeps_its_horizon(objects, hand, renderer, options):
    turned = [compose(objects, hand, renderer, seed, upright=0.0, **options) for seed in range(10)]
    upright = compose(objects, hand, renderer, 0, **options)
    ups = np.array([scene.up for scene in turned])
    assert np.linalg.norm(ups.mean(axis=0)) < (0.6 if "frames" not in options else 0.9) and np.ptp(ups[:, 2]) > 0.5
    for scene in turned:
        # In the object's own frame nothing has changed, and the camera is upright and above: up is up in the picture.
        mirrored = scene.hand_params[-1].hand_side == "left"
        assert np.array_equal(hand(scene.hand_params[-1]).vertices, hand(upright.hand_params[-1]).vertices) or mirrored
        right, down, forward = scene.camera.world_to_camera[:3, :3] @ scene.up
        assert abs(right) < 1e-9 and down < -0.4 and -0.95 < forward < 0
        assert np.linalg.norm(scene.camera.position) == pytest.approx(0.4, abs=0.051)
        record = annotate(scene, scene.frames - 1, hand)
        seen = transform_points(record["object_to_camera"], hand(scene.hand_params[-1]).keypoints_3d)
        np.testing.assert_allclose(record["keypoints_3d"], seen, atol=1e-6)
        if scene.frames > 1:  # comes from above, wherever that is
            first, last = (hand(scene.hand_params[k]).joints[0] for k in (0, -1))
            np.testing.assert_allclose(first - last, 0.15 * scene.up, atol=0.01)
            assert last @ scene.up > 0.49 * np.linalg.norm(last)


def test_the_share_of_upright_objects_is_as_asked_and_what_nothing_holds_stands(objects, hand, renderer):
    scenes = [compose(objects, hand, renderer, seed, upright=0.5) for seed in range(24)]
    assert 7 <= sum(scene.up[2] == 1 for scene in scenes) <= 17
    assert compose(objects, hand, renderer, 0, "object", upright=0.0).up.tolist() == [0, 0, 1]


def test_scenes_without_something_do_not_claim_it(objects, hand, renderer):
    hand_alone = annotate(compose(objects, hand, renderer, 0, content="hand"), 0, hand)
    assert "object_to_camera" not in hand_alone and "contact" not in hand_alone and "keypoints_2d" in hand_alone
    object_alone = annotate(compose(objects, hand, renderer, 0, content="object"), 0, hand)
    assert "keypoints_2d" not in object_alone and object_alone["category"] == "can"
    scenery = annotate(compose(objects, hand, renderer, 0, content="scenery"), 0, hand)
    assert set(scenery) == {"height", "width", "source", "skeleton_rule"}


def test_text_templates_take_the_noun(objects, hand, renderer):
    scene = compose(objects, hand, renderer, 0)
    assert plain_text(scene) == "A hand is grasping a can"
    assert plain_text(scene, "a pink {object} in the snow") == "a pink can in the snow"


def test_objects_without_grasps_are_refused(objects, hand, renderer):
    with pytest.raises(ValueError, match="none of the 1 objects has a grasp for the left hand"):
        compose([GraspedObject(objects[0].object_mesh, objects[0].right)], hand, renderer, 0, hand_side="left")
