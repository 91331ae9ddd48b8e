"""Score generated pictures beside shaded ones of the same records: the ceiling, the floor, and the shares of the first.

    python tools/measure_generated.py --shaded runs/eval/shaded --generated runs/eval/generated [--verifier FILE]

Prints the table of docs/training.md: mean scores (hoi/verify/scores.py) of pictures whose conditions are the same.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from hoi.common.command import problems_as_messages  # noqa: E402
from hoi.common.machine import keep_freed_memory  # noqa: E402
from hoi.data.folder import load_image, read_records  # noqa: E402
from hoi.verify.scores import Estimators, load_truth  # noqa: E402
from hoi.verify.verifier import BUILT_IN_VERIFIER, load_verifier  # noqa: E402

# Scores of the table.
TABLE = ("iou_foreground", "iou_hand", "iou_object", "pck", "fingertips", "shading_hand", "shading_object",
         "color_right", "material_right", "background_right")  # fmt: skip


def mean_scores(rows: Sequence[dict[str, float | None]], names: Sequence[str]) -> dict[str, float | None]:
    """Mean of each score over the rows that have it; None where none has."""
    values = {name: [row[name] for row in rows if row[name] is not None] for name in names}
    return {name: float(np.mean(numbers)) if numbers else None for name, numbers in values.items()}


def paired_records(shaded: Path, generated: Path) -> tuple[list[dict], list[dict]]:
    """Records of shaded pictures, and of generated ones of the same conditions.

    DreamBooth's captions have one word more (train.py --baseline dreambooth), and are taken for those without.
    Raises ValueError when the two folders do not hold the same captions in the same order, or none.
    """
    records, others = read_records(shaded), read_records(generated)
    told, asked = ([re.sub(r"\ban? (sks )?", "", record["text"]) for record in some] for some in (others, records))
    if not records or told != asked:
        other = f"{generated} ({len(others)} records) does not hold the captions of {shaded} ({len(records)})"
        raise ValueError(f"{other}; make it with sample.py --data {shaded}")
    return records, others


def measure_folders(verifier_path: Path, shaded: Path, generated: Sequence[Path]) -> dict[str, dict[str, float | None]]:
    """Mean scores of shaded pictures (the ceiling) and of folders of generated ones of the same records, by row.

    The floor, "other records", holds every picture against the truth of the record before: a picture of wrong
    conditions.  Shares are of the ceiling; those of a second folder and any more, of the first.
    Raises as paired_records.
    """
    estimators = Estimators(load_verifier(verifier_path))
    pairs = [paired_records(shaded, folder) for folder in generated]
    records = pairs[0][0]
    truths = [load_truth(shaded, record) for record in records]

    def means(folder: Path, of: list[dict]) -> list[dict[str, float | None]]:
        images = [load_image(folder, record) for record in of]
        names, seen = [record["file_name"] for record in of], estimators.predict(images)
        return [mean_scores(list(map(estimators.score, names, images, held_against, seen)), TABLE)
                for held_against in (truths, truths[-1:] + truths[:-1])]  # fmt: skip

    base = f"shaded, n = {len(records)}"
    rows = dict(zip((base, "shaded, other records"), means(shaded, records), strict=True))
    for folder, (_, others) in zip(generated, pairs, strict=True):
        name, best = folder.name, rows[base]
        rows[name], rows[f"{name}, other records"] = means(folder, others)
        rows[f"{name} / {base.partition(',')[0]}"] = {
            key: value / best[key] if best[key] and value is not None else None for key, value in rows[name].items()
        }
        base = generated[0].name
    return rows


def scores_as_table(rows: dict[str, dict[str, float | None]]) -> str:
    """Markdown; rows as measure_folders gives them."""
    cells = [[name, *("-" if row[key] is None else f"{row[key]:.3f}" for key in TABLE)] for name, row in rows.items()]
    lines = [f"| {' | '.join(row)} |" for row in (["pictures", *TABLE], *cells)]
    return "\n".join([lines[0], "|" + "---|" * (1 + len(TABLE)), *lines[1:]])


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """Arguments from the command line, or a list."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--verifier", metavar="FILE", type=Path, default=BUILT_IN_VERIFIER,
        help="of python -m hoi.verify train (default: the built-in one)")  # fmt: skip
    add("--shaded", metavar="DIR", type=Path, required=True, help="folder of shaded pictures, not trained on")
    add("--generated", metavar="DIR", type=Path, nargs="+", required=True,
        help="sample.py --data SHADED --out GENERATED; more folders are shown as shares of the first")  # fmt: skip
    return parser.parse_args(arguments)


@problems_as_messages("measure_generated.py", "stopped")
def main() -> None:
    """Print the table."""
    args = parse_args()
    keep_freed_memory()  # batches come and go: giving their memory back each time costs a third of the speed
    print(scores_as_table(measure_folders(args.verifier, args.shaded, args.generated)))


if __name__ == "__main__":
    main()
