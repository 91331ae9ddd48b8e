"""Dataset folder + name of a format -> the export, whole or absent."""

from collections import Counter
from pathlib import Path

from hoi.common.files import new_folder
from hoi.data.folder import read_records
from hoi.data.writer import card_text, read_card
from hoi.export import bop, coco, nocs, official_csv

FORMATS = {"bop": bop, "nocs": nocs, "coco": coco, "csv": official_csv}
CARD_NAMES = {"bop": "dataset_info.md"}  # README.md elsewhere


def export_folder(
    folder: str | Path, file_format: str, out: str | Path, labels: bool = False
) -> tuple[int, Counter[str]]:
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
            left_out += module.write_export(folder, usable, unfinished, **options)
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
