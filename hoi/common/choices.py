"""What command lines let choose from, and their defaults: names and numbers alone.

They stand here, not where they are used, so that --help and mistakes are told without the seconds that importing torch
and trimesh takes.
"""

from __future__ import annotations

# Geometry.
CATEGORIES = ("mug", "bowl", "bottle", "can")  # families of built-in objects
CONTENTS = ("hand_object", "object", "hand", "scenery")  # of a scene
GRASPS = 3  # searched for each object by default, by sample.py and video.py alike: they read one cache

# Network and training.
CONDITION_NAMES = ("skeleton", "normal", "segmentation")
SAMPLERS = ("dpm++", "ddim", "ddpm")
PRESET_NAMES = ("sd1", "tiny")
TINY_SIDE = 128  # pixels, the side of the pictures that the built-in model was made for
DTYPES = ("float32", "bfloat16", "float16")
REG_MODES = ("sum", "swap")
BASELINES = ("ldm", "dreambooth", "controlnet")  # of Sec. 4.2
# DreamBooth (Ruiz et al. 2023) says "a [V] dog": a rare word, then the kind.  As the paper's Sec. 4.2 modifies it, one
# word for all categories, so it comes to stand for what all pictures share.  "sks" is one token of CLIP's.
DREAMBOOTH_CAPTION = "A hand is grasping a sks {category}"

# Real pictures.
NORMALS = ("rendered", "sensor-depth", "depth-files", "estimated")
STROKES = ("crop", "source")
MARGIN = 50  # pixels of the whole picture around hand and object, the authors' number
MIN_AREA = 200  # pixels that hand and object must each have: 14 x 14 say little of a pose
DPT_HYBRID = "Intel/dpt-hybrid-midas"  # the depth network of the paper's code in the format of transformers

# Export.
EXPORT_FORMATS = ("bop", "nocs", "coco", "csv", "folder", "webdataset")
SHARD_FIELDS = ("image", "skeleton", "segmentation", "normal", "depth", "object_mask")  # of a WebDataset's members
SHARD_MB = 500  # millions of bytes: some thousand records of 128 px, and no more files than a store lists at once
