"""What the command line of this room needs to explain itself, without the imports of what it starts."""

from hoi.common.files import ASSETS

FORMATS = ASSETS / "formats" / "predictions.txt"
BUILT_IN_VERIFIER = ASSETS / "verifier.safetensors"
DEFAULT_SIDE = 128  # pixels that the network sees: as many as the built-in model draws
PCK_THRESHOLD = 0.2  # of the hand box, the usual choice for hands in pictures (MMPose)
TIP_DISTANCE = 0.1  # of the hand box: about a finger's thickness, so that a tip is not matched with its neighbour
GROUPS = {"": "", "_visible": "the same of joints that can be seen", "_hidden": "the same of joints that are covered"}
# Scores of joints, each over the joints of every group.
OF_JOINTS = {
    "keypoint_error_px": "mean distance of the joints in the picture, pixels",
    "keypoint_error_relative": "mean distance over the longer side of the box around the 21 true joints",
    "pck": f"share of joints closer than {PCK_THRESHOLD:g} times that side",
}
# Every score in the order of the records, and what it means; python -m hoi.verify --help prints this.
SCORES = {
    "iou_hand": "overlap of the hand that is seen with the true one, intersection over union",
    "iou_object": "the same of the object",
    "iou_foreground": "the same of both together",
    "shading_hand": "share of the hand's luminance that its normals explain: R^2 of nine spherical harmonics, 0 to 1",
    "shading_object": "the same of an object without material word: patterns and mirrors are not light",
    "color_right": "1 when the mean colour of the object's true pixels is the text's, under the place's light, else 0",
    "material_right": "1 when the object's material is the text's, of texts that name one, else 0",
    "background_right": "1 when the background is the text's, else 0",
    **{name + group: same or meaning for name, meaning in OF_JOINTS.items() for group, same in GROUPS.items()},
    "fingertips": f"fingertips that are seen against those that can be, {TIP_DISTANCE:g} of that side apart: F1",
    "joints_visible": "how many joints can be seen",
    "joints_hidden": "how many joints something covers; those outside the picture are not scored at all",
    "confidence": "mean over the scored joints, 0 to 1",
    "detected": "0 when another program (--keypoints) found no hand: its pck is 0, its errors are null",
    "contact_seen": "1 when the detector (--contacts) says that the hand holds something, else 0",
}
