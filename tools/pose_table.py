"""Table 3 of the paper beside toy results: collects what tools/replicate_table_3.sh made and prints Markdown.

    python tools/pose_table.py --out runs/table-3 --seeds 0 1 2

Poses: OUT/ROW/SEED/metrics.json of python -m hoi.metrics.  Hands: joints that OUT/hands/ROW/SEED.safetensors finds in
the pictures of OUT/test.  The table goes to the terminal and to OUT/table_3.md.  Only the order of rows compares.
"""

import argparse
import sys
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hoi.common.command import problems_as_messages  # noqa: E402
from hoi.common.files import read_json, write_whole  # noqa: E402
from hoi.common.tensors import WeightFile  # noqa: E402
from hoi.data.folder import read_records  # noqa: E402
from hoi.metrics.poses import IOU_COLUMNS, POSE_COLUMNS  # noqa: E402
from hoi.verify.scores import Estimators, score_records  # noqa: E402
from hoi.verify.verifier import load_verifier  # noqa: E402
from tools.measure_generated import mean_scores  # noqa: E402
from tools.replica_table import cell, over_seeds  # noqa: E402

POSE_ROWS = {
    "plain": "plain renderings", "half-generated": "half of them generated", "judged": "half of them generated, judged",
    "half-shaded": "half of them shaded", "shaded": "shaded (ceiling)",
}  # fmt: skip
HAND_ROWS = {"lab": "laboratory, shaded", "lab-generated": "and scenic, generated", "lab-shaded": "and scenic, shaded"}
JOINTS = {"pck": "PCK@0.2 ↑", "pck_visible": "of visible joints ↑", "keypoint_error_relative": "error / hand ↓"}
PAPER = {  # SPD, DualPoseNet: original -> with generated pictures
    "IoU25": "82.9 → 82.5, 84.1 → 90.9", "IoU50": "75.3 → 71.1, 79.7 → 84.1", "IoU75": "48.6 → 47.0, 60.1 → 65.8",
    "5deg2cm": "17.7 → 21.1, 28.0 → 29.2", "5deg5cm": "19.9 → 23.2, 34.3 → 34.4",
    "10deg2cm": "38.8 → 43.8, 47.8 → 55.0", "10deg5cm": "48.3 → 54.5, 64.2 → 66.6",
}  # fmt: skip


def pose_numbers(path: Path) -> dict[str, float]:
    """Column -> mean AP in percent, of a metrics.json."""
    numbers = read_json(path, "metrics")["numbers"]
    return {item["name"].partition(" mAP")[0]: item["value"] for item in numbers if " mAP, %" in item["name"]}


def joint_numbers(verifier: Path, test: Path) -> dict[str, float]:
    """Mean of JOINTS over the pictures of a folder."""
    rows = list(score_records(test, read_records(test), Estimators(load_verifier(verifier))))
    return mean_scores(rows, tuple(JOINTS))


def table(titles: dict[str, str], rows: dict[str, list[dict[str, float]]]) -> list[str]:
    """Markdown lines; rows: label -> numbers of every seed."""
    lines = [["pictures learned from", *titles.values()], ["---"] * (1 + len(titles))]
    for label, seeds in rows.items():
        lines.append([label, *(cell(over_seeds([numbers[key] for numbers in seeds])) for key in titles)])
    return [f"| {' | '.join(line)} |" for line in lines]


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """Arguments from the command line, or a list."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="of tools/replicate_table_3.sh")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="S", help="of the trainings (default: 0)")
    return parser.parse_args(arguments)


def main(args: argparse.Namespace) -> None:
    """Write and print the table."""
    out, seeds = args.out, args.seeds
    poses = {label: [pose_numbers(out / name / str(seed) / "metrics.json") for seed in seeds]
             for name, label in POSE_ROWS.items()}  # fmt: skip
    hands = {label: [joint_numbers(out / "hands" / name / f"{seed}.safetensors", out / "test") for seed in seeds]
             for name, label in HAND_ROWS.items()}  # fmt: skip
    columns = {column: f"{column} ↑" for column in (*IOU_COLUMNS, *POSE_COLUMNS)}
    kept, used, made = ((out / f"{name}.txt").read_text().count("\n") for name in ("passing", "judged", "all"))
    steps = WeightFile(out / "plain" / str(seeds[0]) / "pose.safetensors").metadata["steps"]
    lines = [
        "**Table 3, does the data help: toy results**", "", "Object poses, mAP in %", "", *table(columns, poses), "",
        "- paper, original → ours, of SPD and of DualPoseNet: "
        + "; ".join(f"{column} {PAPER[column]}" for column in columns),
        "", "A hand estimator's joints", "", *table(JOINTS, hands), "",
        f"- {date.today().isoformat()}; {made} pictures of equal poses to learn from (hands: twice as many where "
        f"something is added), {len(read_records(out / 'test'))} to judge by, {steps} steps each; in brackets least "
        f"and largest of {len(seeds)} seeds",
        f"- the judge, who learned from shaded scenic pictures, passes {kept} of {made} generated ones, of which its "
        f"row has {used}",
    ]  # fmt: skip
    write_whole(out / "table_3.md", ("\n".join(lines) + "\n").encode())
    print("\n".join(lines))


if __name__ == "__main__":
    with problems_as_messages("tools/pose_table.py", "interrupted; the same command begins again"):
        main(parse_args())
