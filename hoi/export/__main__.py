"""Dataset folder -> the layout of another tool: BOP, NOCS, COCO, or the CSV of the authors' release.

    python -m hoi.export --format bop data/toy out/bop      # 6D pose: scenes, masks, models in mm, symmetries
    python -m hoi.export --format nocs data/nocs out/nocs   # category pose, of make_dataset.py --camera nocs folders
    python -m hoi.export --format coco data/toy out/coco    # 21 hand keypoints, boxes, masks
    python -m hoi.export --format csv data/toy out/csv      # the authors' training, test and regularisation CSV

Drawn, generated and real pictures are exported alike.  Records that the format cannot hold are left out and counted by
reason.  The output appears whole at the end or not at all.
"""

import argparse
from collections import Counter
from pathlib import Path

from hoi.common.command import told_problems
from hoi.data.data_card import card_text
from hoi.data.dataset import read_records
from hoi.data.dataset_writer import read_card
from hoi.export import bop, coco, csv_export, nocs
from hoi.export.export_folder import new_folder

FORMATS = {"bop": bop, "nocs": nocs, "coco": coco, "csv": csv_export}
CARD_NAMES = {"bop": "dataset_info.md"}  # README.md elsewhere


def export(folder: str | Path, file_format: str, out: str | Path, labels: bool = False) -> tuple[int, Counter[str]]:
    """Write a dataset folder to `out`, which must not exist, in one of FORMATS.

    labels   NOCS alone: exact poses as pickles of SPD's form
    returns  how many records were written, and how many were left out by reason
    Raises FileNotFoundError without records, FileExistsError for an existing `out`, ValueError when no record can be
    exported or a file is damaged, which it names; then nothing is left behind.
    """
    folder, module = Path(folder), FORMATS[file_format]
    records = read_records(folder)
    reasons = [module.lacks(record) for record in records]
    usable = [record for record, reason in zip(records, reasons, strict=True) if not reason]
    left_out = Counter(reason for reason in reasons if reason)
    with new_folder(out) as unfinished:
        if usable:
            options = {"labels": labels} if module is nocs else {}
            left_out += module.export(folder, usable, unfinished, **options)
        written = len(records) - left_out.total()
        if not written:
            raise ValueError(f"{folder} has no record for {file_format}{told(left_out)}")
        card = card_text(read_card(folder, records))
        notes = f"{module.__doc__}\n\n{written} records{told(left_out)}\n\n{card}"
        (unfinished / CARD_NAMES.get(file_format, "README.md")).write_text(notes)
    return written, left_out


def told(left_out: Counter[str]) -> str:
    """Lines that say what was left out and why."""
    return "".join(f"\n  {count} left out: {reason}" for reason, count in left_out.most_common())


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m hoi.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--format", choices=tuple(FORMATS), required=True, help="as listed above")
    parser.add_argument("--labels", action="store_true", help="NOCS: also write exact poses as pickles of SPD's form, "
                        "which its readers otherwise recover from coordinates and depth")  # fmt: skip
    parser.add_argument("folder", type=Path, metavar="DIR", help="a dataset folder with pictures")
    parser.add_argument("out", type=Path, metavar="OUT", help="a new folder")
    args = parser.parse_args(arguments)
    if args.labels and args.format != "nocs":
        parser.error("--labels is for --format nocs; the other formats hold exact poses anyway")
    return args


def main(args: argparse.Namespace) -> None:
    written, left_out = export(args.folder, args.format, args.out, args.labels)
    print(f"{written} records -> {args.out}{told(left_out)}")


def run(arguments: list[str] | None = None) -> None:
    """The command: problems become a message and exit code 1."""
    args = parse_args(arguments)
    with told_problems("hoi.export", "interrupted: nothing was left behind"):
        main(args)


if __name__ == "__main__":
    run()
