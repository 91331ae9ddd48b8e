"""Tables 4, 5 and 2 of the paper beside toy results: measures what tools/replicate_tables.sh made and prints Markdown.

    python tools/replica_table.py --tables 4 5 2 --shaded runs/evaluation/shaded --reference runs/replica/reference \\
                                  --clip runs/toy/text/clip.safetensors --out runs/replica

For each fine-tuned model it reads OUT/NAME/pictures and writes OUT/NAME/numbers.json; every table goes to the terminal
and to OUT/table_N.md.  No paper number compares with the toy number beside it: the order of the rows may.
"""

import argparse
import itertools
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hoi.common.command import problems_as_messages, project_commit  # noqa: E402
from hoi.common.files import sha256_of, write_json, write_whole  # noqa: E402
from hoi.common.tensors import WeightFile  # noqa: E402
from hoi.metrics.intervals import Results, four_digits  # noqa: E402
from hoi.verify.verifier import BUILT_IN_VERIFIER  # noqa: E402
from tools import toy_tables  # noqa: E402

RESAMPLES, SEED = 200, 0
CEILING = "shaded"  # the pictures that the records were shaded with: what the networks say of perfect ones
Report = dict[str, Any]


@dataclass(frozen=True)
class Column:
    """A toy number, its short name, and what the paper has in its place: values by row, in the order of the rows."""

    number: str
    title: str
    paper_title: str = ""
    paper: tuple[float, ...] = ()


@dataclass(frozen=True)
class Table:
    """rows  name of the fine-tuned model -> the paper's name of it"""

    title: str
    rows: dict[str, str]
    columns: tuple[Column, ...]


TABLES = {
    "4": Table(
        "Table 4, ablation of the structural conditions",
        {"none": "LDM (finetuned)", "no-normal": "w/o estimated normal maps",
         "no-skeleton": "w/o hand keypoint projection", "no-segmentation": "w/o hand-object segmentation",
         "all": "HOIDiffusion"},
        (Column(toy_tables.FRECHET, "Frechet distance", "FID (1k)", (86.12, 82.40, 81.93, 78.57, 77.64)),
         Column(toy_tables.HAND_IOU, "hand IoU"),
          Column(toy_tables.OBJECT_IOU, "object IoU"), Column(toy_tables.PCK, "PCK")),
    ),
    "5": Table(
        "Table 5, appearance regularisation",
        {"no-regularization": "w/o regularization", "all": "HOIDiffusion"},
        (Column(toy_tables.TOY_CLIP, "CLIPScore stand-in", "CLIPScore", (0.66, 0.79)),
         Column(toy_tables.COLOR, "colour word, %"), Column(toy_tables.BACKGROUND, "background word, %")),
    ),
    "2": Table(
        "Table 2, hand contact and keypoints",
        {"none": "LDM", "all": "HOIDiffusion"},
        (Column(toy_tables.contact_of("mug"), "mug, %", "mug, %", (79.12, 92.31)),
         Column(toy_tables.contact_of("bowl"), "bowl, %", "bowl, %", (78.89, 97.78)),
         Column(toy_tables.contact_of("bottle"), "bottle, %", "bottle, %", (73.00, 94.00)),
         Column(toy_tables.contact_of("can"), "can, %", "can, %", (60.64, 97.87)),
         Column(toy_tables.CONTACT, "contact, mean, %", "contact recall, mean, %", (72.91, 95.49)),
         Column(toy_tables.PCK, "PCK", "PCK", (0.15, 0.85))),
    ),
}  # fmt: skip


def measured(name: str, args: argparse.Namespace, estimators: toy_tables.ToyEstimators) -> Report:
    """All numbers of one model's pictures, or of the shaded ones; written to OUT/NAME/numbers.json."""
    results, folder = Results(RESAMPLES, SEED), args.out / name
    pictures, files, steps = folder / "pictures", {"verifier": args.verifier, "clip": args.clip}, None
    if name == CEILING:
        pictures = args.shaded
        folder.mkdir(exist_ok=True)
    else:
        files["model"] = folder / "model.safetensors"
        steps = int(WeightFile(files["model"]).metadata["step"])
    toy_tables.measure_pictures(results, pictures, args.shaded, estimators)
    report = {
        "pictures": str(pictures),
        "reference": {"folder": str(args.reference), "n": len(estimators.reference.pictures)},
        "steps": steps,
        "sha256": {kind: sha256_of(path) for kind, path in files.items()},
        "commit": project_commit(),
        "date": date.today().isoformat(),
        "interval": results.interval(),
        "numbers": [item.as_json() for item in results.measurements],
        "notes": results.notes,
    }
    write_json(folder / "numbers.json", report)
    return report


def number_of(report: Report, name: str) -> dict[str, Any] | None:
    """One number of a report by its name; None when it was not measured, a category without records for instance."""
    return next((number for number in report["numbers"] if number["name"] == name), None)


def cell(number: dict[str, Any] | None) -> str:
    """The value with its interval in brackets; - for none."""
    if number is None or number["value"] is None:
        return "-"
    interval = "" if number["low"] is None else f" ({four_digits(number['low'])} .. {four_digits(number['high'])})"
    return four_digits(number["value"]) + interval


def as_markdown(table: Table, reports: Mapping[str, Report]) -> str:
    """The table in the paper's shape, then how to read it and where its order differs from the paper's."""
    heads, rows = ["method"], {name: [label] for name, label in (table.rows | {CEILING: "(shaded pictures)"}).items()}
    for column in table.columns:
        arrow = "↓" if column.number == toy_tables.FRECHET else "↑"
        if column.paper:
            heads.append(f"paper: {column.paper_title} {arrow}")
            for row, value in itertools.zip_longest(rows.values(), column.paper):
                row.append("-" if value is None else f"{value:.2f}")
        heads.append(f"toy: {column.title} {arrow}")
        for name, row in rows.items():
            row.append(cell(number_of(reports[name], column.number)))
    lines = [f"**{table.title}: toy results**", "", *("| " + " | ".join(row) + " |" for row in [heads, *rows.values()])]
    lines.insert(3, "|---|" + "---:|" * (len(heads) - 1))
    return "\n".join([*lines, "", *explained(table, reports)]) + "\n"


def explained(table: Table, reports: Mapping[str, Report]) -> list[str]:
    """What stands in for what, of how many pictures and steps, and where the order differs from the paper's."""
    ceiling, steps = reports[CEILING], sorted({reports[name]["steps"] for name in table.rows})
    meant: dict[str, list[str]] = {}  # what the columns are, those of one definition together
    for column in table.columns:
        if number := number_of(ceiling, column.number):
            to = f" to {ceiling['reference']['n']} shaded pictures" if column.number == toy_tables.FRECHET else ""
            meant.setdefault(number["definition"] + to, []).append(f"{column.title} (n = {number['n']})")
    lines = [f"- toy {', '.join(titles)}: {definition}" for definition, titles in meant.items()]
    lines.append(
        f"- {ceiling['date']}; fine-tunes of {' and '.join(map(str, steps))} steps; in brackets 95 % bootstrap "
        f"intervals of {ceiling['interval']['resamples']} draws"
    )
    lines.append("- files: " + ", ".join(f"{name} {digest[:12]}" for name, digest in ceiling["sha256"].items()))
    if len(steps) > 1:
        lines.append("- **the fine-tunes are not equally long: do not compare them**")
    for column in table.columns:
        if column.paper:
            differing = other_order(table, column, reports) or ["as in the paper"]
            lines += [f"- order of {column.title}: {each}" for each in differing]
    return lines


def other_order(table: Table, column: Column, reports: Mapping[str, Report]) -> list[str]:
    """Pairs of rows that the toy numbers put the other way round or find equal; whether their intervals overlap."""
    found = []
    paper = dict(zip(table.rows, column.paper, strict=True))
    for one, other in itertools.combinations(table.rows, 2):
        a, b = (number_of(reports[name], column.number) for name in (one, other))
        if a and b and (paper[one] - paper[other]) * (a["value"] - b["value"]) <= 0:
            apart = None not in (a["low"], b["low"]) and (a["low"] > b["high"] or b["low"] > a["high"])
            how = "intervals apart" if apart else "intervals overlap"
            found.append(f"not the paper's for {table.rows[one]} and {table.rows[other]} ({how})")
    return found


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """Arguments from the command line, or a list."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    add("--shaded", type=Path, required=True, metavar="DIR", help="held-out records that the pictures were made from")
    add("--reference", type=Path, required=True, metavar="DIR", help="shaded pictures for the Frechet distance")
    add("--clip", type=Path, required=True, metavar="FILE", help="clip.safetensors of train.py --stage text")
    add("--verifier", type=Path, default=BUILT_IN_VERIFIER, metavar="FILE",
        help="of python -m hoi.verify train (default: the built-in one)")  # fmt: skip
    add("--out", type=Path, required=True, metavar="DIR", help="holds NAME/pictures of each fine-tuned model")
    return parser.parse_args(arguments)


def main(args: argparse.Namespace) -> None:
    """Measure every model that the tables need once, then write and print the tables."""
    estimators = toy_tables.load_toy_estimators(args.verifier, args.clip, args.reference, args.out / "features")
    names = dict.fromkeys(name for key in args.tables for name in TABLES[key].rows)
    reports = {name: measured(name, args, estimators) for name in [*names, CEILING]}
    for key in args.tables:
        text = as_markdown(TABLES[key], reports)
        write_whole(args.out / f"table_{key}.md", text.encode())
        print(text)


if __name__ == "__main__":
    with problems_as_messages("tools/replica_table.py", "interrupted; the same command begins again"):
        main(parse_args())
