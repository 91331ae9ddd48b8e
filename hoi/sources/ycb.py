"""The 21 YCB objects of DexYCB and HO-3D.  Model folder -> ObjectMesh in the frame that their poses take."""

from functools import lru_cache
from pathlib import Path

import numpy as np

from hoi.geometry.objects import ObjectMesh, read_mesh

# Name of each model and what captions call it; ids run from 1.
YCB = (
    ("002_master_chef_can", "can"), ("003_cracker_box", "cracker box"), ("004_sugar_box", "sugar box"),
    ("005_tomato_soup_can", "soup can"), ("006_mustard_bottle", "mustard bottle"), ("007_tuna_fish_can", "tuna can"),
    ("008_pudding_box", "pudding box"), ("009_gelatin_box", "gelatin box"), ("010_potted_meat_can", "meat can"),
    ("011_banana", "banana"), ("019_pitcher_base", "pitcher"), ("021_bleach_cleanser", "bleach bottle"),
    ("024_bowl", "bowl"), ("025_mug", "mug"), ("035_power_drill", "power drill"), ("036_wood_block", "wood block"),
    ("037_scissors", "scissors"), ("040_large_marker", "marker"), ("051_large_clamp", "clamp"),
    ("052_extra_large_clamp", "large clamp"), ("061_foam_brick", "foam brick"),
)  # fmt: skip
YCB_NOUNS = dict(YCB)


def model_path(models: str | Path, name: str) -> Path:
    """Where a model's mesh is."""
    return Path(models) / name / "textured_simple.obj"


@lru_cache(maxsize=32)
def load_ycb(models: str, name: str) -> ObjectMesh | None:
    """A YCB model in its own frame and metres, as the poses of DexYCB and HO-3D take it; None when it is not there."""
    path = model_path(models, name)
    if not path.is_file():
        return None
    vertices, faces, notes = read_mesh(path)
    extent = float(np.ptp(vertices, axis=0).max())
    if not 0.01 <= extent <= 0.6:
        raise ValueError(f"{path} is {extent:g} units long; expected the YCB model in metres")
    vertices = vertices.astype(np.float32).astype(np.float64)
    return ObjectMesh(vertices, faces, name, YCB_NOUNS.get(name, name), str(path), np.eye(4), False, tuple(notes))
