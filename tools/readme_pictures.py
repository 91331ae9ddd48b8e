"""The README's pictures, made with the built-in weights: one strip and two contact sheets, in docs/.

    python tools/readme_pictures.py [CHECKPOINT]

strip.png       for four objects: skeleton, normal, segmentation, and the picture made from them
one_shape.png   one geometry under eight texts, for three geometries
one_look.png    eight geometries under one text, for three texts
"""

import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from hoi.common.sheets import contact_sheet  # noqa: E402
from hoi.data import folder  # noqa: E402

LOOKS = (
    "A hand is grasping a pink {object} on the beach",
    "A hand is grasping a blue metallic {object} in the snow",
    "A hand is grasping a wooden {object} on the grass",
    "A hand is grasping a yellow {object} in a lavender field",
    "A hand is grasping a red striped {object} floating in the sea",
    "A hand is grasping a white {object} in the grand canyon",
    "A hand is grasping a green {object} in neon-lit cyberpunk nightclub",
    "A hand is grasping an orange {object} on the table",
)


def sample(out: Path, *flags: str) -> tuple[list[dict], list[np.ndarray]]:
    """Run sample.py; records and pictures in the order of their index."""
    subprocess.run([sys.executable, "sample.py", "--out", str(out), *flags], cwd=ROOT, check=True)
    records = sorted(folder.read_records(out), key=lambda record: record["index"])
    return records, [folder.load_image(out, record) for record in records]


def main() -> None:
    """Make the pictures and say how large they are."""
    weights = ["--checkpoint", sys.argv[1]] if len(sys.argv) > 1 else []
    runs, docs = ROOT / "runs" / "readme", ROOT / "docs"
    docs.mkdir(exist_ok=True)
    out = runs / "one_shape"
    records, pictures = sample(out, "--object", "mug", "bottle", "can", "--prompt", *LOOKS, "--seed", "3", *weights)
    rows = []
    for first in range(0, len(pictures), len(LOOKS)):
        segmentation = folder.load_conditions(out, records[first]).segmentation
        rows.append([segmentation, *pictures[first : first + len(LOOKS)]])
    contact_sheet(rows).save(docs / "one_shape.png", optimize=True)

    out, rows = runs / "one_look", []
    chosen = (LOOKS[1], LOOKS[3], LOOKS[0])
    for k, prompt in enumerate(chosen):
        records, pictures = sample(Path(f"{out}_{k}"), "--prompt", prompt, "--count", "8", "--seed", "5", *weights)
        rows.append(pictures)
    shapes = [folder.load_conditions(Path(f"{out}_{k}"), record).segmentation for record in records]
    contact_sheet([shapes, *rows]).save(docs / "one_look.png", optimize=True)

    out = runs / "strip"
    records, pictures = sample(out, "--seed", "1", *weights)
    tiles = []
    for record, picture in list(zip(records, pictures, strict=True))[::5][:4]:  # another object and another look each
        conditions = folder.load_conditions(out, record)
        tiles += [conditions.skeleton, conditions.normal, conditions.segmentation, picture]
    contact_sheet([tiles[:8], tiles[8:]]).save(docs / "strip.png", optimize=True)
    for path in sorted(docs.glob("*.png")):
        print(path.relative_to(ROOT), Image.open(path).size, f"{path.stat().st_size // 1000} kB")


if __name__ == "__main__":
    main()
