"""Count faults by eye without knowing whose picture it is: numbered sheets, and later what the counts say.

    python tools/blind_sheets.py make --list docs/by_eye.txt --out sheets --seed 1 truth=SHADED old=DIR new=DIR
    python tools/blind_sheets.py count --key sheets/key.json counts_a.csv counts_b.csv

`make` shuffles the listed records' pictures of all folders into sheets of numbered pictures, each beside its normals,
and writes key.json, which a counter does not open, and counts.csv with a row a picture: `number,part,fingers`.  part
is 1 where the handle, lid or ring that the normals show is kept; fingers is 1 where fingers are fused or missing.
`count` prints each counter's sums by folder, and how often two counters agree.  The list has one record's index a line.
"""

import argparse
import csv
import sys
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from hoi.common.command import problems_as_messages  # noqa: E402
from hoi.common.files import read_json, write_json  # noqa: E402
from hoi.common.sheets import contact_sheet  # noqa: E402
from hoi.data.folder import load_image, load_picture, read_records  # noqa: E402

COLUMNS = ("part", "fingers")
SIDE, PER_ROW, ROWS = 256, 3, 4  # pixels of a picture as shown; pictures with their normals in a row; rows of a sheet


def make_sheets(indices: list[int], folders: dict[str, Path], out: Path, seed: int) -> None:
    """Sheets, the key (number -> folder, index) and an empty table to fill in."""
    shown = [(name, index) for name in folders for index in indices]
    shown = [shown[k] for k in np.random.default_rng(seed).permutation(len(shown))]
    records = {name: {record["index"]: record for record in read_records(path)} for name, path in folders.items()}
    out.mkdir(parents=True, exist_ok=True)
    for first in range(0, len(shown), PER_ROW * ROWS):
        tiles, labels = [], []
        for number, (name, index) in list(enumerate(shown))[first : first + PER_ROW * ROWS]:
            record = records[name][index]
            pictures = (load_picture(folders[name], record, "normal_file_name"), load_image(folders[name], record))
            tiles += [np.asarray(Image.fromarray(picture).resize((SIDE, SIDE))) for picture in pictures]
            labels += [f"{number}", f"{number}"]
        rows = range(0, len(tiles), 2 * PER_ROW)
        sheet = contact_sheet(*([of[k : k + 2 * PER_ROW] for k in rows] for of in (tiles, labels)))
        sheet.save(out / f"sheet_{first // (PER_ROW * ROWS):02d}.png")
    write_json(out / "key.json", shown)
    lines = [f"number,{','.join(COLUMNS)}", *(f"{number},," for number in range(len(shown)))]
    (out / "counts.csv").write_text("\n".join(lines) + "\n")


def read_counts(path: Path, expected: int) -> np.ndarray:
    """(N, 2) of 0 and 1, in order of number.  Raises ValueError naming the line of anything else."""
    with open(path, newline="") as stream:
        rows = sorted(csv.DictReader(stream), key=lambda row: int(row["number"]))
    if [int(row["number"]) for row in rows] != list(range(expected)):
        raise ValueError(f"{path} has {len(rows)} rows, expected the numbers 0 to {expected - 1}, each once")
    for row in rows:
        if any(row[column] not in ("0", "1") for column in COLUMNS):
            raise ValueError(f"{path} number {row['number']}: {row}, expected 0 or 1 in {', '.join(COLUMNS)}")
    return np.array([[int(row[column]) for column in COLUMNS] for row in rows])


def tell(key: list[list], paths: list[Path]) -> None:
    """Sums by counter and folder, and agreement of each two counters."""
    names, counts = np.array([name for name, _ in key]), [read_counts(path, len(key)) for path in paths]
    print(f"| counter | pictures | n | {' | '.join(COLUMNS)} |\n|---|---|---|---|---|")
    for path, table in zip(paths, counts, strict=True):
        for name in dict.fromkeys(sorted(names)):
            part, fingers = table[names == name].sum(axis=0)
            print(f"| {path.stem} | {name} | {(names == name).sum()} | {part} | {fingers} |")
    for path, table in zip(paths[1:], counts[1:], strict=True):
        same = " | ".join(f"{share:.3f}" for share in (table == counts[0]).mean(axis=0))
        print(f"| {path.stem} agrees with {paths[0].stem} | all | {len(key)} | {same} |")


@problems_as_messages("blind_sheets.py", "stopped")
def main() -> None:
    """As the docstring says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    make, count = commands.add_parser("make"), commands.add_parser("count")
    make.add_argument("--list", type=Path, required=True)
    make.add_argument("--out", type=Path, required=True)
    make.add_argument("--seed", type=int, default=0)
    make.add_argument("folders", nargs="+", metavar="NAME=DIR")
    count.add_argument("--key", type=Path, required=True)
    count.add_argument("counts", nargs="+", type=Path)
    args = parser.parse_args()
    if args.command == "count":
        return tell(read_json(args.key, "key", "", kind=list), args.counts)
    lines = [line.split("#")[0].strip() for line in args.list.read_text().splitlines()]
    folders = {name: Path(path) for name, _, path in (word.partition("=") for word in args.folders)}
    make_sheets([int(line) for line in lines if line], folders, args.out, args.seed)


if __name__ == "__main__":
    main()
