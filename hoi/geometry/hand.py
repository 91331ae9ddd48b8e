"""Hand model.  Pose and shape parameters -> skin mesh, 16 joints, 21 keypoints.  Paper: Sec. 3.1 (MANO, Romero 2017).

The official MANO file is used when the user has one; otherwise a built-in hand of the same form (hoi/assets/hand).
Both run through smplx: load_hand -> HandModel, HandModel(HandParams) -> HandMesh.  The left hand is the right one
mirrored in x = 0: one file serves both sides.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import smplx
import torch
from scipy.spatial.transform import Rotation

from hoi.common.files import ASSETS, read_npz
from hoi.geometry.camera import transform_points
from hoi.geometry.mano import MANO_SHAPES, MIRROR, check_hand_side, mirror_rotations, read_mano

# OpenPose's order is wrist, then thumb, index, middle, ring, little, each from base to tip.  Each entry says which of
# MANO's 16 joints (wrist, index, middle, little, ring, thumb) plus five tips (thumb to little) stands there.
MANO_TO_OPENPOSE = (0, 13, 14, 15, 16, 1, 2, 3, 17, 4, 5, 6, 18, 10, 11, 12, 19, 7, 8, 9, 20)
TIP_KEYPOINTS = (4, 8, 12, 16, 20)  # places of the five tips in OpenPose's order
FINGER_NAMES = ("thumb", "index", "middle", "ring", "little")
FINGER_JOINTS = ((13, 14, 15), (1, 2, 3), (4, 5, 6), (10, 11, 12), (7, 8, 9))  # by FINGER_NAMES, base to tip
JOINT_ROWS = np.array(FINGER_JOINTS) - 1  # (5, 3) rows of the (15, 3) finger pose, by FINGER_NAMES
MANO_TIP_VERTICES = (744, 320, 443, 554, 671)  # by FINGER_NAMES; smplx's table, other projects use other ones
BUILTIN_HAND = ASSETS / "hand" / "builtin_hand.npz"
# Axes in the frame (along the bone, towards the back of the hand, their cross product), see joint_axes.  A thumb bends
# across the palm, not towards it; its two rows are measured on the built-in hand, whose rig states its axes.
FINGER_FLEXION = np.array([0.0, 0.0, -1.0])
THUMB_FLEXION = np.array([0.0, -0.98, -0.20])
THUMB_ABDUCTION = np.array([0.0, 0.04, -1.0])
CHUNK = 256  # hands per forward pass: bounds memory at about 50 MB
PARAM_SIZES = {"global_orient": 3, "hand_pose": 45, "transl": 3, "hand_betas": 10}  # fields of HandParams


@dataclass(frozen=True)
class HandParams:
    """One hand's parameters, float64, MANO's convention with flat mean: zeros are the flat hand.

    global_orient  (3,)   axis-angle of the wrist, radians
    hand_pose      (45,)  axis-angle of the 15 finger joints in MANO's order, radians
    transl         (3,)   metres, added to the posed hand (not the wrist's position)
    hand_betas     (10,)  shape; built-in hand: overall size, finger length, thickness, then unused
    hand_side      "right" or "left"
    Raises ValueError for a wrong shape, a NaN or another side.
    """

    global_orient: np.ndarray
    hand_pose: np.ndarray
    transl: np.ndarray
    hand_betas: np.ndarray
    hand_side: str = "right"

    def __post_init__(self) -> None:
        for name, size in PARAM_SIZES.items():
            value = np.array(getattr(self, name), dtype=np.float64)
            if value.shape != (size,):
                raise ValueError(f"HandParams.{name} has shape {value.shape}, expected ({size},)")
            if not np.isfinite(value).all():
                raise ValueError(f"HandParams.{name} contains NaN or infinity: {value}")
            object.__setattr__(self, name, value)
        check_hand_side(self.hand_side)


@dataclass(frozen=True)
class HandMesh:
    """A posed hand, metres, float64.

    vertices (V, 3); faces (F, 3) int64, outward; joints (16, 3) MANO order; keypoints_3d (21, 3) OpenPose order
    """

    vertices: np.ndarray
    faces: np.ndarray
    joints: np.ndarray
    keypoints_3d: np.ndarray


def stack_params(hand_params: Sequence[HandParams]) -> dict[str, np.ndarray]:
    """Parameters of B hands of one side, as HandModel.pose_batch takes them: (B, 3), (B, 45), (B, 3), (B, 10)."""
    return {name: np.array([getattr(hand, name) for hand in hand_params]).reshape(-1, size)
            for name, size in PARAM_SIZES.items()}  # fmt: skip


def rotation_matrices(axis_angle: np.ndarray) -> np.ndarray:
    """(..., 3) radians -> (..., 3, 3).  Rodrigues' formula; scipy's Rotation is slower for many small arrays."""
    angle = np.linalg.norm(axis_angle, axis=-1)[..., None, None]
    x, y, z = np.moveaxis(axis_angle, -1, 0)
    zero = np.zeros_like(x)
    skew = np.stack([zero, -z, y, z, zero, -x, -y, x, zero], axis=-1).reshape(*x.shape, 3, 3)
    # sin(a) / a and (1 - cos(a)) / a^2, written so that a = 0 needs no special case.
    sine = np.sinc(angle / np.pi)
    cosine = 0.5 * np.sinc(angle / (2 * np.pi)) ** 2
    return np.eye(3) + sine * skew + cosine * (skew @ skew)


def joint_axes(joints: np.ndarray, tips: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where a hand's rig does not state them: the axes about which the fingers bend, from geometry alone.

    joints (16, 3), tips (5, 3)  right hand at rest, metres; tips by FINGER_NAMES
    returns  flexion_axes (15, 3) and thumb_abduction_axis (3,), unit, as in HandModel
    """
    back = np.cross(joints[7] - joints[0], joints[1] - joints[0])  # little and index knuckle, from the wrist
    flexion, abduction = np.zeros((15, 3)), np.zeros(3)
    for chain, tip in zip(FINGER_JOINTS, tips, strict=True):
        points = np.vstack([joints[list(chain)], tip])
        for joint, bone in zip(chain, np.diff(points, axis=0), strict=True):
            along = bone / np.linalg.norm(bone)
            # The part of the back's direction across the bone: a finger bends in the plane of the two.
            upward = back - along * (back @ along)
            upward = upward / np.linalg.norm(upward)
            frame = np.stack([along, upward, np.cross(along, upward)])
            axis = (THUMB_FLEXION if chain == FINGER_JOINTS[0] else FINGER_FLEXION) @ frame
            flexion[joint - 1] = axis / np.linalg.norm(axis)
            if joint == 13:
                abduction = THUMB_ABDUCTION @ frame / np.linalg.norm(THUMB_ABDUCTION)
    return flexion, abduction


def _smplx_model(arrays: Mapping[str, np.ndarray]) -> smplx.MANO:
    """smplx's module for a right hand; it reads exactly these nine fields.  PCA is off and the mean pose zero."""
    fields = {name: np.asarray(arrays[name]) for name in MANO_SHAPES}
    fields |= {name: fields[name].astype(np.int64) for name in ("f", "kintree_table")}
    fields |= {"hands_components": np.eye(45), "hands_mean": np.zeros(45)}
    with contextlib.redirect_stdout(io.StringIO()):  # it prints that ten shape coefficients are few
        model = smplx.MANO(
            model_path="", data_struct=smplx.utils.Struct(**fields), use_pca=False, flat_hand_mean=True, is_rhand=True
        )
    return model.requires_grad_(False).eval()


class HandModel:
    """A MANO-form hand: linear blend skinning with shape and pose blend shapes, run by smplx.

    Made of
    arrays        v_template, f, weights, shapedirs, J_regressor, posedirs, kintree_table as in the MANO file
    name          "builtin" or "mano"
    tip_vertices  five skin vertices that stand for the fingertips, by FINGER_NAMES
    axes          flexion_axes and thumb_abduction_axis where the rig states them; None: from joint_axes

    Knows
    weights              (V, 16)  skinning weights
    finger_of_vertex     (V,)     int8, of the strongest joint: -1 palm and wrist, else index into FINGER_NAMES
    parents              (16,)    parent joint, -1 for the wrist
    flexion_axes         (15, 3)  unit; joint k + 1 bends towards the palm by a positive turn about row k.  In MANO's
                                  zero-pose frame, so hand_pose[3k:3k+3] = angle * axis; right hand (left: x, -y, -z)
    thumb_abduction_axis (3,)     the same for joint 13: a positive turn brings the thumb in front of the palm
    """

    def __init__(
        self, arrays: Mapping[str, np.ndarray], name: str, tip_vertices: Sequence[int],
        axes: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> None:
        self.name = name
        self.tip_vertices = np.asarray(tip_vertices, dtype=np.int64)
        self.weights = np.asarray(arrays["weights"], dtype=np.float64)
        self.parents = np.array([-1, *(int(parent) for parent in arrays["kintree_table"][0][1:])])
        self._faces = np.asarray(arrays["f"]).astype(np.int64)
        finger_of_joint = np.full(16, -1, dtype=np.int8)
        finger_of_joint[np.array(FINGER_JOINTS)] = np.arange(5)[:, None]
        self.finger_of_vertex = finger_of_joint[self.weights.argmax(axis=1)]
        self._model = _smplx_model(arrays)
        template = np.asarray(arrays["v_template"])
        axes = axes or joint_axes(np.asarray(arrays["J_regressor"]) @ template, template[self.tip_vertices])
        self.flexion_axes, self.thumb_abduction_axis = (np.asarray(each, dtype=np.float64) for each in axes)

    def faces(self, hand_side: str = "right") -> np.ndarray:
        """(F, 3) int64, counter-clockwise seen from outside for that side, "right" or "left"."""
        return self._faces if hand_side == "right" else self._faces[:, ::-1].copy()

    def __call__(self, hand_params: HandParams) -> HandMesh:
        """Pose one hand: its skin, joints and keypoints in the frame of its parameters, metres."""
        side = hand_params.hand_side
        vertices, joints, keypoints_3d = self.pose_batch(**stack_params([hand_params]), hand_side=side)
        return HandMesh(vertices[0], self.faces(side), joints[0], keypoints_3d[0])

    @torch.no_grad()
    def pose_batch(
        self, global_orient: np.ndarray, hand_pose: np.ndarray, transl: np.ndarray, hand_betas: np.ndarray,
        hand_side: str = "right",
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Pose B hands of one side, without their faces.

        global_orient (B, 3), hand_pose (B, 45), transl (B, 3), hand_betas (10,) or (B, 10): as in HandParams
        returns  vertices (B, V, 3), joints (B, 16, 3), keypoints_3d (B, 21, 3), metres, float64 (computed in float32)
        """
        count = len(global_orient)
        if np.shape(hand_betas) == (10,):  # smplx does not broadcast shapes over a batch
            hand_betas = np.broadcast_to(hand_betas, (count, 10))
        if hand_side == "left":
            global_orient, hand_pose = mirror_rotations(global_orient), mirror_rotations(hand_pose)
            transl = transl * MIRROR
        vertices, joints = np.empty((count, len(self.weights), 3)), np.empty((count, 16, 3))
        given = {"betas": hand_betas, "global_orient": global_orient, "hand_pose": hand_pose}
        for start in range(0, count, CHUNK):
            part = slice(start, start + CHUNK)
            output = self._model(**{name: torch.tensor(of[part], dtype=torch.float32) for name, of in given.items()})
            vertices[part], joints[part] = output.vertices.numpy(), output.joints.numpy()
        # The translation is added in float64: hands far from the origin keep their shape.
        vertices += transl[:, None]
        joints += transl[:, None]
        if hand_side == "left":
            vertices, joints = vertices * MIRROR, joints * MIRROR
        native = np.concatenate([joints, vertices[:, self.tip_vertices]], axis=1)
        return vertices, joints, native[:, list(MANO_TO_OPENPOSE)]


def load_hand(mano_path: str | Path | None = None) -> HandModel:
    """The user's MANO hand, or the built-in one.

    mano_path  MANO_RIGHT.pkl, an .npz of the same arrays, or the folder that holds it; None: built-in.  Either gives
               both sides.
    Fingertips of the built-in hand are the skin vertices nearest to its tip joints; those of MANO are smplx's table.
    Raises FileNotFoundError, or ValueError when the file is not a MANO hand (no code in it is ever executed).
    """
    if mano_path is not None:
        return HandModel(read_mano(mano_path), "mano", MANO_TIP_VERTICES)
    arrays = read_npz(BUILTIN_HAND, "built-in hand")
    # The built-in hand has no pose blend shapes and three shape directions; smplx wants all of MANO's.
    vertex_count, _, known = arrays["shapedirs"].shape
    arrays["posedirs"] = np.zeros((vertex_count, 3, 135))
    arrays["shapedirs"] = np.concatenate([arrays["shapedirs"], np.zeros((vertex_count, 3, 10 - known))], axis=2)
    axes = arrays["flexion_axes"], arrays["thumb_abduction_axis"]
    return HandModel(arrays, "builtin", arrays["tip_vertices"], axes)


def pca_to_hand_pose(coefficients: np.ndarray, hands_components: np.ndarray, hands_mean: np.ndarray) -> np.ndarray:
    """Finger poses given as PCA coefficients with a mean (DexYCB, MANO's own default) -> ours, with flat mean.

    coefficients      (..., K)  of the first K axes, K from 1 to 45
    hands_components  (45, 45)  an axis in each row
    hands_mean        (45,)     radians; both from read_pca, for the side that the coefficients belong to
    returns           (..., 45) axis-angle, radians, HandParams.hand_pose of that side
    Not to be left to smplx: with num_pca_comps=45, DexYCB's number, it takes the coefficients for angles.
    Global orientation, translation and shape of such poses mean the same as in HandParams.
    """
    return hands_mean + coefficients @ hands_components[: coefficients.shape[-1]]


def mirrored_hand(hand_params: HandParams) -> HandParams:
    """The other hand doing the same, mirrored in the plane x = 0 of the frame that the pose is expressed in.

    Applying it twice gives the pose back.  Shape coefficients do not change sides.
    """
    return replace(
        hand_params, global_orient=mirror_rotations(hand_params.global_orient),
        hand_pose=mirror_rotations(hand_params.hand_pose), transl=hand_params.transl * MIRROR,
        hand_side="left" if hand_params.hand_side == "right" else "right",
    )  # fmt: skip


def hand_in_camera(hand_params: HandParams, hand: HandModel, world_to_camera: np.ndarray) -> HandParams:
    """The same hand with parameters that give camera coordinates directly.

    world_to_camera  (4, 4) rigid
    The model turns about its wrist joint w0, not about the origin: with joint 0 at w0 + transl, the new translation is
    R (w0 + transl) + t - w0.
    """
    wrist = hand(hand_params).joints[0]
    rotation = Rotation.from_matrix(world_to_camera[:3, :3]) * Rotation.from_rotvec(hand_params.global_orient)
    transl = transform_points(world_to_camera, wrist) - (wrist - hand_params.transl)
    return replace(hand_params, global_orient=rotation.as_rotvec(), transl=transl)
