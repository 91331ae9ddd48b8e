"""Dataset folders + name of a format -> the export, whole or absent; of shards, each."""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

from hoi.common.files import ASSETS, new_folder, short_hash, write_whole
from hoi.data.folder import NUMBER_SHAPES, read_folders
from hoi.data.writer import DatasetWriter, card_text, copy_folder, folder_description, read_card
from hoi.export import bop, coco, nocs, official_csv, webdataset
from hoi.export.folder import lacking


@dataclass(frozen=True)
class Format:
    """The layout of another tool.

    unfit   record -> why it cannot be exported, empty when it can
    write   (dataset folder, fit records, empty folder, its own options) -> how many were left out after all, by reason,
            if any were
    card    name of the page that goes with it: assets/exports/<format>.md, counts, the dataset's own card
    needs   `whole` (fit records of all splits) and `sources` (the folders), if `write` takes these keywords
    grows   `write` itself keeps what is whole and continues it; otherwise the export appears at the end or not at all
    """

    unfit: Callable[[dict[str, Any]], str]
    write: Callable[..., Counter[str] | None]
    card: str = "README.md"
    needs: tuple[str, ...] = ()
    grows: bool = False


def write_folder(folder: Path, records: list[dict[str, Any]], out: Path, sources: Sequence[Path]) -> None:
    """Write records to a dataset folder again: of several folders one, or of a split.  sources: those folders."""
    copy_folder(folder, records, DatasetWriter(out, folder_description("hoi.export", {}, sources=sources)))


FORMATS = {
    "bop": Format(partial(lacking, keys=bop.BOP_KEYS), bop.write_scenes, "dataset_info.md", ("whole",)),  # BOP's name
    "nocs": Format(nocs.unfit_for_nocs, nocs.write_frames),
    "coco": Format(partial(lacking, keys=()), coco.write_annotations, needs=("whole",)),
    "csv": Format(official_csv.unfit_for_csv, official_csv.write_tables),
    "folder": Format(lambda record: "", write_folder, "export.md", ("sources",)),  # beside its own README
    "webdataset": Format(lambda record: "", webdataset.write_shards, needs=("whole",), grows=True),
}


def export_folders(
    folders: Sequence[str | Path], file_format: str, out: str | Path, options: Mapping[str, Any] | None = None,
    shares: Mapping[str, float] | None = None, by: str = "view",
) -> tuple[Counter[str], Counter[str]]:  # fmt: skip
    """Write dataset folders to `out`, which must not exist unless the format grows, in one of FORMATS.

    options     keywords of the format's writer (nocs.write_frames, webdataset.write_shards)
    shares, by  write splits of these names and shares, see split_records, each as an export of its own in out/<name>
    returns     how many records were written, by split ("" for none), and how many were left out by reason
    Raises FileNotFoundError without records, FileExistsError for an existing `out`, ValueError when no record can be
    exported or a file is damaged, which it names; then nothing is left behind but whole shards.
    """
    target, (folder, records) = FORMATS[file_format], read_folders(folders)
    reasons = [target.unfit(record) for record in records]
    fit = [record for record, reason in zip(records, reasons, strict=True) if not reason]
    written, left_out = Counter(), Counter(filter(None, reasons))
    own = {"whole": fit, "sources": [Path(source) for source in folders]}
    own = {name: own[name] for name in target.needs} | dict(options or {})
    with nullcontext(Path(out)) if target.grows else new_folder(out) as unfinished:
        for name, part in (split_records(fit, shares, by) if shares and fit else {"": fit} if fit else {}).items():
            if not target.grows:
                (unfinished / name).mkdir(exist_ok=True)
            refused = target.write(folder, part, unfinished / name, **own) or Counter()
            written[name], left_out = len(part) - refused.total(), left_out + refused
        told = left_out_lines(left_out)
        if not written.total():
            # Here, inside the block: an export without records must not stay.
            raise ValueError(f"{' '.join(map(str, folders))} has no record for {file_format}{told}")
        page = (ASSETS / "exports" / f"{file_format}.md").read_text()
        cards = "\n".join(card_text(read_card(source)) for source in folders)
        content = f"{page}\n\n{written.total()} records{split_lines(written)}{told}\n\n{cards}"
        write_whole(unfinished / target.card, content.encode())
    return written, left_out


def split_records(
    records: list[dict[str, Any]], shares: Mapping[str, float], by: str
) -> dict[str, list[dict[str, Any]]]:
    """Divide records so that no group is on two sides; the same records are always divided alike.

    shares  of the records by name of the split, together 1; met as closely as whole groups allow
    by      "view": frames and looks of one geometry are a group; "object": all of one mesh (without a mesh of one
            category, without either of one view)
    Raises ValueError when a split would be empty.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault(_group_of(record, by), []).append(record)
    parts: dict[str, list[dict[str, Any]]] = {name: [] for name in shares}
    # The large ones first, which are hardest to place; among equals in an order that says nothing.
    for key in sorted(groups, key=lambda key: (-len(groups[key]), short_hash(key))):
        neediest = max(shares, key=lambda name: shares[name] * len(records) - len(parts[name]))
        parts[neediest] += groups[key]
    if empty := [name for name, part in parts.items() if not part]:
        raise ValueError(f"{len(records)} records have {len(groups)} groups by {by}, too few for a split {empty[0]} of "
                         f"{shares[empty[0]]:g}: raise its share, or split by something else")  # fmt: skip
    return {name: sorted(part, key=itemgetter("index")) for name, part in parts.items()}


def _group_of(record: dict[str, Any], by: str) -> str:
    thing = record.get("object_path") or record.get("category")
    scene = record.get("trajectory") if record.get("scene") is None else record["scene"]
    if by == "object" and thing:
        return thing
    if scene is not None:
        return f"scene {scene}"
    numbers = [record.get(key) for key in NUMBER_SHAPES]  # older folders and real pictures do not say their scene
    return json.dumps(numbers) if any(numbers) else f"record {record['index']}"


def split_lines(written: Counter[str]) -> str:
    """A line for each split, with how many records it has; empty without any."""
    return "".join(f"\n  {count} {name}" for name, count in written.items() if name)


def left_out_lines(left_out: Counter[str]) -> str:
    """A line for each reason, with how many records it held back; empty when none was."""
    return "".join(f"\n  {count} left out: {reason}" for reason, count in left_out.most_common())
