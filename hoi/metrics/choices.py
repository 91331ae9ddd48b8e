"""What the command line of this room needs to explain itself, without the imports of what it starts."""

from hoi.common.files import ASSETS

POSE_FORMAT = ASSETS / "formats" / "poses.txt"
BOXES = {
    "nocs": "boxes as published by NOCS and inherited by SPD and DualPoseNet, a defect included: extents of the three "
    "coordinates of each corner in place of the extents of eight corners",
    "aabb": "boxes around the corners along the camera's axes",
}
