"""Tables 1, 2, 4 and 5 of the paper beside toy results: measures what tools/replicate_tables.sh made, prints Markdown.

    python tools/replica_table.py --tables 1 2 4 4e 5 --seeds 0 1 2 --evaluation runs/evaluation \\
        --reference runs/replica/reference --clip runs/toy/text/clip.safetensors --out runs/replica

For each fine-tuned model it reads OUT/NAME/SEED/lab and scenic, and writes OUT/NAME/SEED/numbers.json; every table goes
to the terminal and to OUT/table_N.md, eight pictures of every row to OUT/sheet.png.  No paper number compares with the
toy number beside it: the order of the rows may.
"""

import argparse
import itertools
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hoi.common.command import problems_as_messages, project_commit  # noqa: E402
from hoi.common.files import encode_png, sha256_of, write_json, write_whole  # noqa: E402
from hoi.common.sheets import contact_sheet  # noqa: E402
from hoi.common.tensors import WeightFile  # noqa: E402
from hoi.data.folder import load_image, read_records  # noqa: E402
from hoi.metrics.intervals import Results, four_digits  # noqa: E402
from hoi.verify.verifier import BUILT_IN_VERIFIER  # noqa: E402
from tools import toy_tables  # noqa: E402

RESAMPLES, SEED = 200, 0
CEILING = "shaded"  # the pictures that the records were shaded with: what the networks say of perfect ones
PLACES = ("lab", "scenic")  # the two sets of records, by their looks
SHEET = 8  # conditions that the sheet shows
Report = dict[str, Any]  # of one model: what it is, and `numbers` by place
Reports = Mapping[str, list[Report]]  # of every row, one a seed


@dataclass(frozen=True)
class Column:
    """A toy number, its short name, and what the paper has in its place: values by row, in the order of the rows.

    place  which records it is over.  Frechet distances are to laboratory pictures, as the paper's are to DexYCB
    """

    number: str
    title: str
    paper_title: str = ""
    paper: tuple[float, ...] = ()
    place: str = "scenic"


@dataclass(frozen=True)
class Table:
    """rows  name of the fine-tuned model -> the paper's name of it"""

    title: str
    rows: dict[str, str]
    columns: tuple[Column, ...]


BASELINES = {"none": "LDM", "dreambooth": "DreamBooth", "controlnet": "ControlNet", "all": "HOIDiffusion"}
ABLATED = (
    Column(toy_tables.FRECHET, "Frechet distance", "FID (1k)", (86.12, 82.40, 81.93, 78.57, 77.64), "lab"),
    Column(toy_tables.HAND_IOU, "hand IoU"), Column(toy_tables.OBJECT_IOU, "object IoU"),
    Column(toy_tables.PCK, "PCK"),
)  # fmt: skip
WORDS = (Column(toy_tables.COLOR, "colour word, %"), Column(toy_tables.BACKGROUND, "background word, %"))

TABLES = {
    "1": Table(
        "Table 1, picture quality and words",
        BASELINES,
        (Column(toy_tables.FRECHET, "Frechet distance", "FID", (63.71, 134.40, 87.99, 55.22), "lab"),
         Column(toy_tables.TOY_CLIP, "CLIPScore stand-in", "CLIPScore", (0.68, 0.75, 0.77, 0.78)), *WORDS),
    ),
    "2": Table(
        "Table 2, hand contact and keypoints",
        BASELINES,
        (Column(toy_tables.contact_of("mug"), "mug, %", "mug, %", (79.12, 79.12, 86.00, 92.31)),
         Column(toy_tables.contact_of("bowl"), "bowl, %", "bowl, %", (78.89, 62.22, 91.40, 97.78)),
         Column(toy_tables.contact_of("bottle"), "bottle, %", "bottle, %", (73.00, 78.00, 89.00, 94.00)),
         Column(toy_tables.contact_of("can"), "can, %", "can, %", (60.64, 75.53, 93.00, 97.87)),
         Column(toy_tables.CONTACT, "contact, mean, %", "contact recall, mean, %", (72.91, 73.72, 89.85, 95.49)),
         Column(toy_tables.PCK, "PCK", "PCK", (0.15, 0.10, 0.67, 0.85))),
    ),
    "4": Table(
        "Table 4, ablation of the structural conditions",
        {"none": "LDM (finetuned)", "no-normal": "w/o estimated normal maps",
         "no-skeleton": "w/o hand keypoint projection", "no-segmentation": "w/o hand-object segmentation",
         "all": "HOIDiffusion"},
        ABLATED,
    ),
    "4e": Table(
        "Table 4 with normals as an estimator sees them",
        {"none": "LDM (finetuned)", "no-normal": "w/o estimated normal maps",
         "estimated-no-skeleton": "w/o hand keypoint projection",
         "estimated-no-segmentation": "w/o hand-object segmentation", "estimated": "HOIDiffusion"},
        ABLATED,
    ),
    "5": Table(
        "Table 5, appearance regularisation",
        {"no-regularization": "w/o regularization", "all": "HOIDiffusion"},
        (Column(toy_tables.TOY_CLIP, "CLIPScore stand-in", "CLIPScore", (0.66, 0.79)), *WORDS),
    ),
}  # fmt: skip


def measured(name: str, seed: int, args: argparse.Namespace, estimators: toy_tables.ToyEstimators) -> Report:
    """All numbers of one model's pictures, or of the shaded ones; written to OUT/NAME/SEED/numbers.json."""
    folder = args.out / name / str(seed)
    files, steps = {"verifier": args.verifier, "clip": args.clip}, None
    if name != CEILING:
        files["model"] = folder / "model.safetensors"
        steps = int(WeightFile(files["model"]).metadata["step"])
    numbers = {}
    for place in PLACES:
        results = Results(RESAMPLES, SEED)
        toy_tables.measure_pictures(results, pictures_of(name, seed, place, args), args.evaluation / place, estimators)
        numbers[place] = [item.as_json() for item in results.measurements]
    report = {
        "reference": {"folder": str(args.reference), "n": len(estimators.reference)},
        "steps": steps,
        "sha256": {kind: sha256_of(path) for kind, path in files.items()},
        "commit": project_commit(),
        "date": date.today().isoformat(),
        "interval": results.interval(),
        "numbers": numbers,
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "numbers.json", report)
    return report


def pictures_of(name: str, seed: int, place: str, args: argparse.Namespace) -> Path:
    """The folder of a row's pictures."""
    return args.evaluation / place if name == CEILING else args.out / name / str(seed) / place


def number_of(report: Report, number: str, place: str) -> dict[str, Any] | None:
    """One number of a report by its name; None when it was not measured, a category without records for instance."""
    return next((item for item in report["numbers"][place] if item["name"] == number), None)


def value_of(reports: list[Report], column: Column) -> tuple[float, float | None, float | None] | None:
    """Mean over the seeds with the least and the largest; of one seed its bootstrap interval; None for no number."""
    found = [number_of(report, column.number, column.place) for report in reports]
    if any(item is None or item["value"] is None for item in found):
        return None
    if len(found) == 1:
        return tuple(found[0][key] for key in ("value", "low", "high"))
    return over_seeds([item["value"] for item in found])


def over_seeds(values: list[float]) -> tuple[float, float, float]:
    """Mean, least and largest."""
    return float(np.mean(values)), min(values), max(values)


def cell(value: tuple[float, float | None, float | None] | None) -> str:
    """The value with its ends in brackets; - for none."""
    if value is None:
        return "-"
    interval = "" if value[1] is None else f" ({four_digits(value[1])} .. {four_digits(value[2])})"
    return four_digits(value[0]) + interval


def as_markdown(table: Table, reports: Reports) -> str:
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
            row.append(cell(value_of(reports[name], column)))
    lines = [f"**{table.title}: toy results**", "", *("| " + " | ".join(row) + " |" for row in [heads, *rows.values()])]
    lines.insert(3, "|---|" + "---:|" * (len(heads) - 1))
    return "\n".join([*lines, "", *explained(table, reports)]) + "\n"


def explained(table: Table, reports: Reports) -> list[str]:
    """What stands in for what, of how many pictures, seeds and steps, and where the order differs from the paper's."""
    (ceiling,), runs = reports[CEILING], [report for name in table.rows for report in reports[name]]
    steps, seeds = sorted({report["steps"] for report in runs}), {len(reports[name]) for name in table.rows}
    meant: dict[str, list[str]] = {}  # what the columns are, those of one definition together
    for column in table.columns:
        if number := number_of(ceiling, column.number, column.place):
            to = f" to {ceiling['reference']['n']} shaded pictures" if column.number == toy_tables.FRECHET else ""
            title = f"{column.title} (n = {number['n']}, {column.place})"
            meant.setdefault(number["definition"] + to, []).append(title)
    lines = [f"- toy {', '.join(titles)}: {definition}" for definition, titles in meant.items()]
    between = f"least and largest of {max(seeds)} seeds" if max(seeds) > 1 else (
        f"95 % bootstrap intervals of {ceiling['interval']['resamples']} draws")  # fmt: skip
    lines.append(f"- {ceiling['date']}; fine-tunes of {' and '.join(map(str, steps))} steps; in brackets {between}")
    lines.append("- files: " + ", ".join(f"{name} {digest[:12]}" for name, digest in ceiling["sha256"].items()))
    if len(steps) > 1:
        lines.append("- **the fine-tunes are not equally long: do not compare them**")
    for column in table.columns:
        if column.number == toy_tables.TOY_CLIP and (note := saturated(ceiling, column.place)):
            lines.append(note)
        elif column.paper:
            differing = other_order(table, column, reports) or ["as in the paper"]
            lines += [f"- order of {column.title}: {each}" for each in differing]
    return lines


def saturated(ceiling: Report, place: str) -> str:
    """What to say where the stand-in for CLIPScore tells true captions of shaded pictures hardly from others."""
    true, other = (number_of(ceiling, name, place) for name in (toy_tables.TOY_CLIP, toy_tables.SHUFFLED_CLIP))
    if true is None or other is None or None in (true["low"], other["high"]) or true["low"] > other["high"]:
        return ""
    return (
        f"- the CLIPScore stand-in is saturated: shaded pictures have {four_digits(true['value'])} with their own "
        f"captions and {four_digits(other['value'])} with others'; compare the words instead"
    )


def other_order(table: Table, column: Column, reports: Reports) -> list[str]:
    """Pairs of rows that the toy numbers put the other way round or find equal; whether their ranges overlap.

    Rows of which the paper has equal numbers (mugs of LDM and DreamBooth) have no order to differ from.
    """
    found = []
    paper = dict(zip(table.rows, column.paper, strict=True))
    for one, other in itertools.combinations(table.rows, 2):
        a, b = (value_of(reports[name], column) for name in (one, other))
        if a and b and paper[one] != paper[other] and (paper[one] - paper[other]) * (a[0] - b[0]) <= 0:
            apart = None not in (a[1], b[1]) and (a[1] > b[2] or b[1] > a[2])
            how = "ranges apart" if apart else "ranges overlap"
            found.append(f"not the paper's for {table.rows[one]} and {table.rows[other]} ({how})")
    return found


def sheet_of(names: list[str], args: argparse.Namespace) -> bytes:
    """PNG: a row of pictures a model, those of the first seed, all of the same SHEET conditions."""
    rows = []
    for name in names:
        folder = pictures_of(name, args.seeds[0], "scenic", args)
        records = read_records(folder)
        chosen = np.linspace(0, len(records) - 1, min(SHEET, len(records))).astype(int)
        rows.append([load_image(folder, records[k]) for k in chosen])
    return encode_png(np.asarray(contact_sheet(rows, [[name] + [""] * (len(rows[0]) - 1) for name in names])))


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """Arguments from the command line, or a list."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    add("--seeds", nargs="+", type=int, default=[0], metavar="S", help="of the fine-tunes (default: 0)")
    add("--evaluation", type=Path, required=True, metavar="DIR",
        help="DIR/lab and DIR/scenic: held-out records that the pictures were made from")  # fmt: skip
    add("--reference", type=Path, required=True, metavar="DIR", help="shaded pictures for the Frechet distance")
    add("--clip", type=Path, required=True, metavar="FILE", help="clip.safetensors of train.py --stage text")
    add("--verifier", type=Path, default=BUILT_IN_VERIFIER, metavar="FILE",
        help="of python -m hoi.verify train (default: the built-in one)")  # fmt: skip
    add("--out", type=Path, required=True, metavar="DIR", help="holds NAME/SEED of each fine-tuned model")
    return parser.parse_args(arguments)


def main(args: argparse.Namespace) -> None:
    """Measure every model that the tables need once, then write and print the tables, and the sheet."""
    estimators = toy_tables.load_toy_estimators(args.verifier, args.clip, args.reference, args.out / "features")
    names = list(dict.fromkeys(name for key in args.tables for name in TABLES[key].rows))
    reports = {name: [measured(name, seed, args, estimators) for seed in args.seeds] for name in names}
    reports[CEILING] = [measured(CEILING, 0, args, estimators)]
    for key in args.tables:
        text = as_markdown(TABLES[key], reports)
        write_whole(args.out / f"table_{key}.md", text.encode())
        print(text)
    write_whole(args.out / "sheet.png", sheet_of([CEILING, *names], args))
    print(f"rows of sheet.png: {', '.join([CEILING, *names])}")


if __name__ == "__main__":
    with problems_as_messages("tools/replica_table.py", "interrupted; the same command begins again"):
        main(parse_args())
