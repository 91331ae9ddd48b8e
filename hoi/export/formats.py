"""Dataset folder + name of a format -> the export, whole or absent; of shards, each."""

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hoi.common.files import ASSETS, new_folder, write_whole
from hoi.data.folder import read_records
from hoi.data.writer import card_text, read_card
from hoi.export import bop, coco, nocs, official_csv, webdataset
from hoi.export.folder import lacking


@dataclass(frozen=True)
class Format:
    """The layout of another tool.

    unfit   record -> why it cannot be exported, empty when it can
    write   (dataset folder, fit records, empty folder, its own options) -> how many were left out after all, by reason,
            if any were
    card    name of the page that goes with it: assets/exports/<format>.md, counts, the dataset's own card
    grows   `write` itself keeps what is whole and continues it; otherwise the export appears at the end or not at all
    """

    unfit: Callable[[dict[str, Any]], str]
    write: Callable[..., Counter[str] | None]
    card: str = "README.md"
    grows: bool = False


FORMATS = {
    "bop": Format(partial(lacking, keys=bop.BOP_KEYS), bop.write_scenes, "dataset_info.md"),  # BOP's name
    "nocs": Format(nocs.unfit_for_nocs, nocs.write_frames),
    "coco": Format(partial(lacking, keys=()), coco.write_annotations),
    "csv": Format(official_csv.unfit_for_csv, official_csv.write_tables),
    "webdataset": Format(lambda record: "", webdataset.write_shards, grows=True),
}


def export_folder(
    folder: str | Path, file_format: str, out: str | Path, options: Mapping[str, Any] | None = None
) -> tuple[int, Counter[str]]:
    """Write a dataset folder to `out`, which must not exist unless the format grows, in one of FORMATS.

    options  keywords of the format's writer (nocs.write_frames, webdataset.write_shards)
    returns  how many records were written, and how many were left out by reason
    Raises FileNotFoundError without records, FileExistsError for an existing `out`, ValueError when no record can be
    exported or a file is damaged, which it names; then nothing is left behind but whole shards.
    """
    folder, target = Path(folder), FORMATS[file_format]
    records = read_records(folder)
    reasons = [target.unfit(record) for record in records]
    fit = [record for record, reason in zip(records, reasons, strict=True) if not reason]
    left_out = Counter(reason for reason in reasons if reason)
    with nullcontext(Path(out)) if target.grows else new_folder(out) as unfinished:
        if fit:
            left_out += target.write(folder, fit, unfinished, **(options or {})) or {}
        written = len(records) - left_out.total()
        if not written:
            # Here, inside the block: an export without records must not stay.
            raise ValueError(f"{folder} has no record for {file_format}{left_out_lines(left_out)}")
        card = card_text(read_card(folder, records))
        page = (ASSETS / "exports" / f"{file_format}.md").read_text()
        content = f"{page}\n\n{written} records{left_out_lines(left_out)}\n\n{card}"
        write_whole(unfinished / target.card, content.encode())
    return written, left_out


def left_out_lines(left_out: Counter[str]) -> str:
    """A line for each reason, with how many records it held back; empty when none was."""
    return "".join(f"\n  {count} left out: {reason}" for reason, count in left_out.most_common())
