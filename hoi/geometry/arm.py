"""A forearm behind the hand, for pictures alone.  HandMesh -> mesh, and into a G-buffer.

Photographs show an arm, the hand models end at the wrist, and so do the labels of DexYCB.  The arm is seen where there
is neither hand nor object, and as skin over the cap that closes the hand's mesh behind the wrist: a picture shows a
hand and an object wherever its condition images do.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from hoi.common.arrays import box_centre
from hoi.geometry.camera import Camera, arm_direction, transform_points, unproject
from hoi.geometry.hand import HandMesh
from hoi.geometry.render import HAND, GBuffer, Renderer

SLEEVE = 3  # label in the G-buffers of pictures; conditions know hand and object only
CAP = 0.012  # metres before the end of the hand's mesh, where it curves to its cap
SLEEVE_START = 0.045  # metres behind the wrist
LENGTH = 1.2  # metres, longer than an arm: one that points away shall leave the picture as well
# Metres behind the wrist and width there, of the wrist's: it grows towards the elbow, the sleeve is wider than the arm.
PROFILE = ((-0.016, 0.96), (0.0, 1.0), (SLEEVE_START, 0.99), (SLEEVE_START, 1.2), (0.25, 1.7), (LENGTH, 2.2))
SIDES = 28


def forearm(hand_mesh: HandMesh, length: float = LENGTH) -> tuple[np.ndarray, np.ndarray]:
    """Elliptic tube that goes on from the rim of the hand's mesh: vertices (V, 3) metres, faces (F, 3) outward."""
    keypoints, wrist = hand_mesh.keypoints_3d, hand_mesh.keypoints_3d[0]
    along = arm_direction(keypoints)
    across = keypoints[5] - keypoints[17]
    across = across - along * (across @ along)
    across = across / np.linalg.norm(across)
    axes = np.stack([across, np.cross(along, across)])
    depth = hand_mesh.vertices @ along
    rim = hand_mesh.vertices[np.argsort(depth)[-40:]] - wrist
    flat = rim @ axes.T
    center, half = wrist + box_centre(flat) @ axes + along * (rim @ along).max(), np.ptp(flat, axis=0) / 2
    turn = 2 * np.pi * np.arange(SIDES) / SIDES
    ring = np.stack([np.cos(turn), np.sin(turn)], axis=1) * half @ axes
    rings = [center + min(t, length) * along + width * ring for t, width in PROFILE]
    here = np.arange(SIDES * (len(PROFILE) - 1)).reshape(-1, SIDES)
    beside, up = np.roll(here, -1, axis=1), here + SIDES
    faces = np.stack([here, beside, up, beside, beside + SIDES, up], axis=-1).reshape(-1, 3)
    return np.concatenate(rings), faces


def add_arm(gbuffer: GBuffer, hand_mesh: HandMesh, camera: Camera, renderer: Renderer) -> GBuffer:
    """The G-buffer with an arm (labels HAND, and SLEEVE from 45 mm behind the wrist) where there was nothing."""
    along = arm_direction(hand_mesh.keypoints_3d)
    wrist_depth = transform_points(camera.world_to_camera, hand_mesh.keypoints_3d[0])[2]
    towards = -camera.world_to_camera[2, :3] @ along
    # An arm that reached the camera's own plane would have no picture: it ends 5 cm before.
    length = min(LENGTH, (wrist_depth - 0.05) / towards) if towards > 0 else LENGTH
    vertices, faces = forearm(hand_mesh, max(length, 0.0))
    arm = renderer.render(vertices, faces, None, None, camera)
    end = (hand_mesh.vertices @ along).max()

    def beyond(depth: np.ndarray) -> np.ndarray:
        """How far behind the end of the hand's mesh lies what is seen in each pixel (H, W), metres."""
        y, x = np.indices(depth.shape)
        points = unproject(x, y, depth, camera.intrinsics)
        return transform_points(np.linalg.inv(camera.world_to_camera), points) @ along - end

    nothing, skin = gbuffer.label_map == 0, gbuffer.label_map == HAND
    cap = skin & (arm.depth < gbuffer.depth) & (beyond(gbuffer.depth) > -CAP)
    drawn = (arm.label_map > 0) & (nothing | cap)
    labels = np.where(nothing & (beyond(arm.depth) > SLEEVE_START + 1e-4), SLEEVE, HAND).astype(np.uint8)
    return replace(
        gbuffer,
        depth=np.where(drawn, arm.depth, gbuffer.depth),
        label_map=np.where(drawn, labels, gbuffer.label_map),
        surface_normals=np.where(drawn[..., None], arm.surface_normals, gbuffer.surface_normals),
    )
