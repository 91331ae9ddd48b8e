"""Folders that tools/evaluate_tiny.sh measures besides shaded ones: the same conditions under other words or skeletons.

    python tools/evaluation_folders.py materials SHADED OUT     # metallic, striped, marble beside each colour, drawn
    python tools/evaluation_folders.py table SHADED OUT         # each colour on a wooden table, drawn
    python tools/evaluation_folders.py skeletons SHADED OUT     # each record's text with the next record's conditions

Of the first two the pictures are drawn anew (hoi/verify/perfect.py), so that each word has its ceiling.  In the third
"other records" of tools/measure_generated.py are the records' own conditions: the skeleton that was not shown.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from hoi.common.command import problems_as_messages  # noqa: E402
from hoi.data.folder import load_image, read_records  # noqa: E402
from hoi.data.views import FolderViews  # noqa: E402
from hoi.data.writer import DatasetWriter, folder_description, write_pictures  # noqa: E402
from hoi.toyworld.backgrounds import BACKGROUNDS  # noqa: E402
from hoi.toyworld.looks import PALETTE  # noqa: E402
from hoi.toyworld.words import words_in  # noqa: E402
from hoi.verify.perfect import draw_perfect  # noqa: E402
from hoi.verify.scores import load_truth  # noqa: E402

MATERIALS = ("metallic", "striped", "marble")
WOODEN_TABLE = next(name for name in ("on a wooden table", "on the table") if name in BACKGROUNDS)


def words_of(kind: str, k: int, text: str) -> tuple[dict[str, str | None], str]:
    """Words of picture k, and how its caption names the place."""
    color, place = list(PALETTE)[k % len(PALETTE)], words_in(text)["background"]
    if kind == "materials":
        return {"color": color, "material": MATERIALS[k // len(PALETTE) % len(MATERIALS)], "background": place}, place
    return {"color": color, "material": None, "background": WOODEN_TABLE}, "on a wooden table"


def make_folder(kind: str, shaded: Path, out: Path) -> None:
    """Write the folder; the same command continues."""
    records = read_records(shaded)
    views = FolderViews(shaded)
    job = {"kind": kind, "of": str(shaded.resolve()), "records": len(records)}
    writer = DatasetWriter(out, folder_description("evaluation_folders.py", job, 0, None, sources=[shaded]))
    for k, record in enumerate(records):
        if writer.done(k):
            continue
        if kind == "skeletons":
            number = (k + 1) % len(records)
            text, image = record["text"], load_image(shaded, records[number])
        else:
            number, generator = k, np.random.default_rng([k, len(kind)])
            words, place = words_of(kind, k, record["text"])
            image = draw_perfect(shaded, record, load_truth(shaded, record), generator, **words)
            thing = " ".join(filter(None, (words["color"], words["material"], record["category"].replace("_", " "))))
            text = f"A hand is grasping {'an' if thing[0] in 'aeiou' else 'a'} {thing} {place}"
        full = views[views.numbers[number]].write(out, k)
        writer.append(write_pictures(out, k, full | {"text": text}, image))
    writer.finish()


@problems_as_messages("evaluation_folders.py", "\ninterrupted: the same command continues")
def main() -> None:
    """As the docstring says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("materials", "table", "skeletons"))
    parser.add_argument("shaded", type=Path, help="a folder of make_dataset.py --shade")
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    make_folder(args.kind, args.shaded, args.out)


if __name__ == "__main__":
    main()
