"""What the command line of this room needs to explain itself, without the imports of what it starts."""

from hoi.common.files import ASSETS

POSE_FORMATS = ASSETS / "formats" / "poses.txt"
# CLIPScore as published (Hessel et al. 2021), with ViT-B/32.
SCORE_PREFIX, SCORE_WEIGHT = "A photo depicts ", 2.5
# How a picture becomes 299 x 299 in [-1, 1]; each tool has its own way, and their FIDs are not comparable.
RESIZE_MODES = {
    "tf1": "bilinear as in TensorFlow 1 (no half-pixel shift, no antialiasing), (x - 128) / 128: guided-diffusion "
    "(ADM), torch-fidelity",
    "pytorch-fid": "bilinear with half-pixel centres, no antialiasing, x / 127.5 - 1: pytorch-fid",
    "clean": "bicubic with antialiasing in float, clipped, (x - 128) / 128: clean-fid",
}
BOXES = {
    "nocs": "boxes as published by NOCS and inherited by SPD and DualPoseNet, a defect included: extents of the three "
    "coordinates of each corner in place of the extents of eight corners",
    "aabb": "boxes around the corners along the camera's axes",
}
