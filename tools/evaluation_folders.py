"""Folders made of shaded ones, to measure or to train with: other words, other conditions, or no hand at all.

    python tools/evaluation_folders.py materials SHADED OUT     # metallic, striped, marble beside each colour, drawn
    python tools/evaluation_folders.py table SHADED OUT         # each colour on a wooden table, drawn
    python tools/evaluation_folders.py skeletons SHADED OUT     # each record's text with the next record's conditions
    python tools/evaluation_folders.py normals SHADED OUT       # normals as a depth estimator would see them (Table 4)
    python tools/evaluation_folders.py plain SHADED OUT         # the object alone, flat colour on flat colour (Table 3)

Of the first two the pictures are drawn anew (hoi/verify/perfect.py), so that each word has its ceiling.  In the third
"other records" of tools/measure_generated.py are the records' own conditions: the skeleton that was not shown.  Record
k of OUT is the k-th of SHADED.
"""

import argparse
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
from scipy.ndimage import gaussian_filter

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from hoi.common.command import problems_as_messages  # noqa: E402
from hoi.conditions import draw_conditions, draw_normal, normals_from_inverse_depth, scale_inverse_depth  # noqa: E402
from hoi.data.folder import camera_of, load_image, load_mesh, read_records  # noqa: E402
from hoi.data.views import FolderViews, View  # noqa: E402
from hoi.data.writer import DatasetWriter, folder_description, write_pictures  # noqa: E402
from hoi.export.folder import HAND_KEYS  # noqa: E402
from hoi.geometry.render import Renderer  # noqa: E402
from hoi.toyworld.backgrounds import BACKGROUNDS  # noqa: E402
from hoi.toyworld.looks import PALETTE, sample_look, shade  # noqa: E402
from hoi.toyworld.words import words_in  # noqa: E402
from hoi.verify.perfect import draw_perfect  # noqa: E402
from hoi.verify.scores import load_truth  # noqa: E402

MATERIALS = ("metallic", "striped", "marble")
KINDS = ("materials", "table", "skeletons", "normals", "plain")
# What MiDaS loses: its finest details are some 8 pixels of 512, and depth pictures are kept in 256 levels.
BLUR, LEVELS = 0.015, 255  # share of the side, standard deviation; steps from nothing to the nearest
WOODEN_TABLE = next(name for name in ("on a wooden table", "on the table") if name in BACKGROUNDS)


def words_of(kind: str, k: int, text: str) -> tuple[dict[str, str | None], str]:
    """Words of picture k, and how its caption names the place."""
    color, place = list(PALETTE)[k % len(PALETTE)], words_in(text)["background"]
    if kind == "materials":
        return {"color": color, "material": MATERIALS[k // len(PALETTE) % len(MATERIALS)], "background": place}, place
    return {"color": color, "material": None, "background": WOODEN_TABLE}, "on a wooden table"


def estimated_normals(view: View) -> np.ndarray:
    """The view's normal picture as if its depth had been estimated: (H, W, 3) uint8.

    Blurred and in levels, then by the paper's recipe; near the object's distance slopes are true.
    """
    focal, seen = view.record["intrinsics"][0], view.depth > 0
    inverse = gaussian_filter(scale_inverse_depth(view.depth, 2 * np.pi * focal / 8), BLUR * len(view.depth))
    step = inverse.max() / LEVELS
    return draw_normal(normals_from_inverse_depth(np.rint(inverse / step) * step), seen)


renderer = cache(Renderer)  # started when first needed


def drawn_plain(shaded: Path, record: dict, view: View, generator: np.random.Generator) -> tuple[View, np.ndarray]:
    """The record's object alone, painted in one colour before another: what a renderer without looks gives."""
    camera, mesh = camera_of(record), load_mesh(shaded, record)
    seen, large = (renderer().render(None, None, *mesh, each) for each in (camera, camera.scaled(2)))
    color = list(PALETTE)[generator.integers(len(PALETTE))]
    look = replace(sample_look(generator, "lab"), material="plain", object_color=color)
    wall = np.full((*large.depth.shape, 3), generator.uniform(0.2, 0.9), np.float32)
    image = shade(large, camera.scaled(2), look, generator, reduce=2, background=wall)
    without = view.record | dict.fromkeys((*HAND_KEYS, "hand_in_picture", "grasp"))
    conditions = draw_conditions(None, seen.label_map, seen.surface_normals)
    return View(without, conditions, seen.depth, seen.object_mask, view.mesh), image


def make_folder(kind: str, shaded: Path, out: Path) -> None:
    """Write the folder; the same command continues."""
    records = read_records(shaded)
    views = FolderViews(shaded)
    job = {"kind": kind, "of": str(shaded.resolve()), "records": len(records)}
    writer = DatasetWriter(out, folder_description("evaluation_folders.py", job, 0, None, sources=[shaded]))
    for k, record in enumerate(records):
        if writer.done(k):
            continue
        number = (k + 1) % len(records) if kind == "skeletons" else k
        view, text, generator = views[views.numbers[number]], record["text"], np.random.default_rng([k, len(kind)])
        if kind == "plain":
            view, image = drawn_plain(shaded, record, view, generator)
        elif kind in ("skeletons", "normals"):
            image = load_image(shaded, records[number])
        else:
            words, place = words_of(kind, k, text)
            image = draw_perfect(shaded, record, load_truth(shaded, record), generator, **words)
            thing = " ".join(filter(None, (words["color"], words["material"], record["category"].replace("_", " "))))
            text = f"A hand is grasping {'an' if thing[0] in 'aeiou' else 'a'} {thing} {place}"
        if kind == "normals":
            conditions = replace(view.conditions, normal=estimated_normals(view))
            view = replace(view, record=view.record | {"normal_source": "estimated-like"}, conditions=conditions)
        writer.append(write_pictures(out, k, view.write(out, k) | {"text": text}, image))
    writer.finish()


@problems_as_messages("evaluation_folders.py", "\ninterrupted: the same command continues")
def main() -> None:
    """As the docstring says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("shaded", type=Path, help="a folder of make_dataset.py --shade")
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    make_folder(args.kind, args.shaded, args.out)


if __name__ == "__main__":
    main()
