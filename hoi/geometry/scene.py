"""Scenes: grasped objects + camera -> annotation and pictures of each frame.  Paper: Sec. 3.2.

make_dataset.py writes scenes to disk, sample.py and video.py make them on the fly; all go through here: grasp_object ->
compose_scene -> annotate -> pictures_of.  Everything random comes from the generator passed in, so a scene depends on
nothing but that generator and the list of objects.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.linalg import block_diag
from scipy.spatial.transform import Rotation

from hoi.conditions import KEYPOINTS, draw_conditions
from hoi.geometry.arm import add_arm
from hoi.geometry.camera import OFFICIAL_FOV_DEG, Camera, candidate_cameras, inside_picture, project, sample_camera
from hoi.geometry.contact import DistanceField
from hoi.geometry.grasp import CONTACT_DISTANCE, Grasp
from hoi.geometry.grasp_search import cached_grasps
from hoi.geometry.hand import HandMesh, HandModel, HandParams, hand_in_camera, mirrored_hand
from hoi.geometry.mano import MIRROR
from hoi.geometry.objects import ObjectMesh
from hoi.geometry.render import HAND, OBJECT, GBuffer, Renderer
from hoi.geometry.trajectory import approach

SKELETON_RULES = {"official": "official", "tight": "all"}  # in tight framings palms are longer than the release draws
# Share of the picture's pixels that the hand and the object must each have, or the view is rejected.  Official views
# have 2.8 % object and 4.5 % hand in the median; 14 % of them fail.
MIN_VISIBLE = {"official": 0.015, "tight": 0.05}
# Tried one after the other until a camera sees hand and object.  For single frames of built-in objects the first grasp
# does (1.2 renders a view); the others are for what a hand hides and for approaches in tight framing.
GRASPS_PER_SCENE = 4
PLAIN_TEXTS = {"hand_object": "A hand is grasping a {object}", "object": "A {object}", "hand": "A hand"}


@dataclass(frozen=True)
class GraspedObject:
    """An object with the grasps found on it, each a right hand in the canonical frame.

    left: right-hand grasps of the object mirrored in x = 0; mirrored back they are left hands on the object itself.
    """

    object_mesh: ObjectMesh
    right: tuple[Grasp, ...] = ()
    left: tuple[Grasp, ...] = ()

    def grasps(self, hand_side: str) -> tuple[Grasp, ...]:
        """Those for the "right" or the "left" hand; both are right hands still, see above."""
        return self.right if hand_side == "right" else self.left


@dataclass(frozen=True)
class ViewSettings:
    """How scenes are seen, whatever is in them.

    height, width   pixels
    hand_side       "right", "left" or "random"
    framing         "official": the whole field of view; "tight": zoomed in, the wrist near the border
    official_view   azimuth as in the official release instead of all around
    fov_deg         vertical field of view before a tight framing zooms in, degrees
    frames          1 is the grasp alone, more are the approach to it
    upright         share of scenes whose object stands upright; the others turn object and hand at random
    intrinsics      (3, 3) of a camera that is given, instead of fov_deg and framing
    start_distance, trajectory  of the approach, see hoi/geometry/trajectory.py: approach
    """

    height: int
    width: int
    hand_side: str = "right"
    framing: str = "official"
    official_view: bool = False
    fov_deg: float = OFFICIAL_FOV_DEG
    frames: int = 1
    start_distance: float | None = None
    trajectory: str = "paper"
    upright: float = 1.0
    intrinsics: np.ndarray | None = None

    @property
    def sides(self) -> tuple[str, ...]:
        """Hands for which grasps are needed."""
        return ("right", "left") if self.hand_side == "random" else (self.hand_side,)


@dataclass(frozen=True)
class Scene:
    """Geometry of one or more frames seen by one camera.

    content       one of hoi.common.choices.CONTENTS
    camera        world = canonical object frame
    object_mesh   None without an object
    grasp         the grasp that hand_params end in; None without a hand
    hand_params   one for each frame, canonical object frame; empty without a hand
    skeleton_rule which bones are drawn, see hoi/conditions.py: draw_skeleton; the release's by default
    file_mesh     the object as it is written, in the frame of the user's own file; None: as it is here
    file_to_world (4, 4) rigid: from that frame to the canonical one
    entries       of each frame: what else its record says; empty for scenes that nobody brought
    support       height (z) of a level plane below the object that was brought, metres; None: there is none
    keep_outside  whether frames count whose hand leaves the picture: hand or camera were given
    last_gbuffer  render of the last frame, made when the camera was chosen; None: not rendered yet
    """

    content: str
    camera: Camera
    object_mesh: ObjectMesh | None = None
    grasp: Grasp | None = None
    hand_params: tuple[HandParams, ...] = ()
    skeleton_rule: str = "official"
    last_gbuffer: GBuffer | None = field(default=None, repr=False, compare=False)
    file_mesh: ObjectMesh | None = None
    file_to_world: np.ndarray = field(default_factory=lambda: np.eye(4), compare=False)
    entries: tuple[dict[str, Any], ...] = ()
    keep_outside: bool = False
    support: float | None = None

    @property
    def up(self) -> np.ndarray:
        """(3,) unit: where up is in the object's frame; z but for an object turned at random."""
        return np.array(self.camera.up)

    @property
    def written_mesh(self) -> ObjectMesh | None:
        """The object in the frame that records refer to."""
        return self.file_mesh or self.object_mesh

    @property
    def frames(self) -> int:
        """How many, at least 1: a scene without a hand is one frame."""
        return max(1, len(self.hand_params))


def mirror_mesh(object_mesh: ObjectMesh) -> ObjectMesh:
    """The object mirrored in x = 0, faces still outward."""
    return replace(object_mesh, vertices=object_mesh.vertices * MIRROR, faces=object_mesh.faces[:, ::-1].copy())


def grasp_object(
    object_mesh: ObjectMesh, hand: HandModel, count: int, seed: int, cache_dir: str | Path, hand_sides: Sequence[str]
) -> GraspedObject:
    """Find up to `count` grasps for each wanted side ("right", "left"), or read them from the cache folder."""
    meshes = {"right": object_mesh, "left": mirror_mesh(object_mesh)}
    found = {side: tuple(cached_grasps(meshes[side], hand, count, seed, cache_dir)) for side in hand_sides}
    return GraspedObject(object_mesh, **found)


def graspable(
    objects: Sequence[GraspedObject], hand_sides: Sequence[str], notes: Sequence[str] = ()
) -> list[GraspedObject]:
    """Those with a grasp for every wanted side.  Raises ValueError, with the notes below it, when there is none."""
    found = [item for item in objects if all(item.grasps(side) for side in hand_sides)]
    if not found:
        names = ", ".join(item.object_mesh.object_id for item in objects)
        raise ValueError("\n".join([f"no grasp was found for {names}: is it 1 to 20 cm in size?", *notes]))
    return found


def compose_scene(
    objects: Sequence[GraspedObject], hand: HandModel, renderer: Renderer, generator: np.random.Generator,
    settings: ViewSettings, content: str = "hand_object", cameras: Sequence[Camera] = (),
    poses: Sequence[HandParams] = (),
) -> Scene | None:
    """Choose object, grasp and a camera that sees both.

    content  one of hoi.common.choices.CONTENTS
    cameras  given ones, of which the first that shows enough is taken, else the best; empty: candidates drawn here
    poses    the hand in every frame, where they are given; empty: the approach to the grasp
    returns  the Scene, its last frame rendered (but for scenery); None when no camera sees hand or object at all
    Raises ValueError when no object has a grasp for the hand's side.
    Views that show less than MIN_VISIBLE of hand or object are passed over; if all do, the best of them is taken.
    """
    if content == "scenery":
        return Scene(content, sample_camera(generator, settings.height, settings.width, settings.official_view))
    side = ("right", "left")[generator.integers(2)] if settings.hand_side == "random" else settings.hand_side
    usable = [item for item in objects if content == "object" or item.grasps(side)]
    if not usable:
        raise ValueError(f"none of the {len(objects)} objects has a grasp for the {side} hand")
    item = usable[generator.integers(len(usable))]
    object_mesh = None if content == "hand" else item.object_mesh
    # Nothing holds an object without a hand, so it stands.
    upright = settings.upright >= 1 or content == "object" or generator.random() < settings.upright
    best, best_share = None, -1.0 if cameras else 0.0
    for _ in range(1 if content == "object" or cameras else GRASPS_PER_SCENE):
        turn, grasp, hands, keypoints = np.eye(3), None, (), np.zeros((0, KEYPOINTS, 3))
        if content != "object":
            grasp = item.grasps(side)[generator.integers(len(item.grasps(side)))]
            if not upright:
                wrist = hand(grasp.hand_params).joints[0] * (MIRROR if side == "left" else 1)
                turn = _random_turn(generator, wrist if settings.frames > 1 else None)
            hands = tuple(poses) or frame_poses(grasp, side, settings, turn[2])
            keypoints = np.stack([hand(pose).keypoints_3d for pose in hands])
        points = np.zeros((0, 3)) if object_mesh is None else object_mesh.vertices
        for camera in cameras or candidate_cameras(
            generator, settings.height, settings.width, settings.official_view, settings.framing, points @ turn.T,
            keypoints @ turn.T, settings.fov_deg, settings.intrinsics,
        ):  # fmt: skip
            up = tuple(turn[2].tolist())
            camera = replace(camera, world_to_camera=camera.world_to_camera @ block_diag(turn, 1.0), up=up)
            # The last frame is the grasp: what is hidden there is hidden in the picture that counts.
            scene = Scene(content, camera, object_mesh, grasp, hands, SKELETON_RULES[settings.framing])
            scene = replace(scene, last_gbuffer=render_scene(scene, scene.frames - 1, hand, renderer))
            share = _visible_share(scene)
            if share >= MIN_VISIBLE[settings.framing]:
                return scene
            if share > best_share:
                best, best_share = scene, share
    return best


def _random_turn(generator: np.random.Generator, wrist: np.ndarray | None) -> np.ndarray:
    """(3, 3) from the object's frame to one whose z is up, any as likely as another.

    wrist  (3,) metres, of a hand that will come from above: then up is within 60 degrees of its direction
    """
    while True:
        turn = Rotation.random(random_state=generator).as_matrix()
        if wrist is None or turn[2] @ wrist >= 0.5 * np.linalg.norm(wrist):
            return turn


def frame_poses(
    grasp: Grasp, hand_side: str, settings: ViewSettings, up: np.ndarray, start: HandParams | None = None
) -> tuple[HandParams, ...]:
    """The hand in every frame, the grasp last; a left one is the mirror image of the right one that was found.

    up     (3,) unit, in the object's frame
    start  where the approach begins, as a right hand like the grasp's; None: see approach
    """
    poses = [grasp.hand_params]
    if settings.frames > 1:
        up = up * MIRROR if hand_side == "left" else up
        poses = approach(grasp, settings.frames, settings.start_distance, settings.trajectory, up, start)
    return tuple(mirrored_hand(pose) if hand_side == "left" else pose for pose in poses)


def _visible_share(scene: Scene) -> float:
    """The smaller of the hand's and the object's share of the picture in the last frame, which is rendered."""
    label_map = scene.last_gbuffer.label_map
    wanted = [label for label, present in ((HAND, scene.grasp), (OBJECT, scene.object_mesh)) if present is not None]
    return min(float((label_map == label).mean()) for label in wanted)


def render_scene(scene: Scene, frame: int, hand: HandModel, renderer: Renderer, factor: int = 1) -> GBuffer:
    """G-buffer of one frame, `factor` times as large as the camera's picture; the scene's own where it has it."""
    if scene.last_gbuffer is not None and frame == scene.frames - 1 and factor == 1:
        return scene.last_gbuffer
    camera = scene.camera if factor == 1 else scene.camera.scaled(factor)
    hand_mesh = hand(scene.hand_params[frame]) if scene.hand_params else None
    return renderer.render(*_arrays(hand_mesh), *_arrays(scene.object_mesh), camera)


def render_picture(scene: Scene, frame: int, hand: HandModel, renderer: Renderer, factor: int = 2) -> GBuffer:
    """G-buffer to shade: that of render_scene with an arm behind the hand."""
    gbuffer = render_scene(scene, frame, hand, renderer, factor)
    if not scene.hand_params:
        return gbuffer
    return add_arm(gbuffer, hand(scene.hand_params[frame]), scene.camera.scaled(factor), renderer)


def _arrays(mesh: HandMesh | ObjectMesh | None) -> tuple[np.ndarray, np.ndarray] | tuple[None, None]:
    """Vertices and faces as Renderer.render takes them."""
    return (None, None) if mesh is None else (mesh.vertices, mesh.faces)


def noun(object_mesh: ObjectMesh) -> str:
    """What a caption calls the object: its category, or its file's name as words."""
    return (object_mesh.category or object_mesh.object_id).replace("_", " ").strip()


def annotate(scene: Scene, frame: int, hand: HandModel, field: DistanceField | None = None) -> dict[str, Any]:
    """Ground truth of one frame under the record keys of hoi/data/folder.py; null where the scene does not have it.

    field  distance to scene.object_mesh; measures contact in frames before the grasp (null without it)
    Hand parameters and keypoints_3d are in the camera frame.  `contact` means skin within 2.5 mm of the surface.
    """
    camera, mesh = scene.camera, scene.object_mesh
    record: dict[str, Any] = {"height": camera.height, "width": camera.width, "source": "rendered",
                              "skeleton_rule": None}
    if scene.content != "scenery":
        record |= {"intrinsics": camera.intrinsics, "normal_source": "geometry"}
    if mesh is not None:
        record |= {"category": mesh.category or None, "object_to_camera": camera.world_to_camera @ scene.file_to_world}
    if scene.entries:
        record |= scene.entries[frame]
    if scene.grasp is None:
        return record
    # Keypoints come from the parameters that are written, so that a record agrees with itself.
    pose = hand_in_camera(scene.hand_params[frame], hand, camera.world_to_camera)
    keypoints_3d = hand(pose).keypoints_3d
    keypoints_2d = project(keypoints_3d, camera.intrinsics)
    record |= {
        "hand_side": pose.hand_side, "hand_model": hand.name, "hand_betas": pose.hand_betas,
        "global_orient": pose.global_orient, "hand_pose": pose.hand_pose, "transl": pose.transl,
        "keypoints_3d": keypoints_3d, "keypoints_2d": keypoints_2d, "keypoint_convention": "openpose21",
        "hand_in_picture": bool(inside_picture(keypoints_2d, camera.height, camera.width)),
        "skeleton_rule": scene.skeleton_rule,
    }  # fmt: skip
    if mesh is not None:
        record |= _contact_of(scene, frame, hand, field)
    return record


def _contact_of(scene: Scene, frame: int, hand: HandModel, field: DistanceField | None) -> dict[str, Any]:
    """Contact and penetration of one frame with hand and object, as record keys; empty where nothing measures it."""
    grasp = scene.grasp
    if frame == scene.frames - 1:  # the grasp itself, measured when it was found
        quality = {
            "crossing_edges": int(grasp.crossing_edges),
            "fingers_in_contact": [bool(touches) for touches in grasp.fingers_in_contact],
            "force_closure": bool(grasp.force_closure), "score": round(float(grasp.score), 6),
        }  # fmt: skip
        if scene.entries:  # of a grasp that was brought it is only told what ours must not have
            quality["faults"] = list(grasp.faults)
        depth_mm = round(float(grasp.penetration_mm), 4)
        return {"contact": any(grasp.fingers_in_contact), "penetration_mm": depth_mm, "grasp": quality}
    if field is None:
        return {}
    nearest = float(field.signed_distance(hand(scene.hand_params[frame]).vertices).min())
    return {"contact": nearest < CONTACT_DISTANCE, "penetration_mm": round(1000 * max(0.0, -nearest), 4)}


def pictures_of(
    scene: Scene, frame: int, record: dict[str, Any], hand: HandModel, renderer: Renderer
) -> dict[str, Any]:
    """What is drawn of an annotated frame, under the names that the writer of dataset folders takes.

    record   from annotate, its keypoints finite
    returns  conditions, depth (H, W) metres and, with an object, its amodal object_mask (H, W) bool; empty for scenery
    """
    if scene.content == "scenery":
        return {}
    gbuffer = render_scene(scene, frame, hand, renderer)
    conditions = draw_conditions(
        record.get("keypoints_2d"), gbuffer.label_map, gbuffer.surface_normals, scene.skeleton_rule
    )
    pictures = {"conditions": conditions, "depth": gbuffer.depth}
    return pictures if scene.object_mesh is None else pictures | {"object_mask": gbuffer.object_mask}


def plain_text(scene: Scene, template: str | None = None) -> str:
    """Caption without a look: the paper's "A hand is grasping a {object}", or the given template."""
    text = template or PLAIN_TEXTS[scene.content]
    return text.replace("{object}", noun(scene.object_mesh) if scene.object_mesh is not None else "object")
