"""A scored folder: its scores, and the table of several folders."""

from pathlib import Path
from typing import Any

from hoi.data.folder import load_image, read_records
from hoi.data.writer import refresh_card, write_records
from hoi.verify.scores import (
    PCK_THRESHOLD,
    Truth,
    Witnesses,
    load_truth,
    load_witnesses,
    mean_scores,
    score_picture,
    score_records,
)
from hoi.verify.verification_report import write_report
from hoi.verify.verifier import BUILT_IN, load_verifier

TABLE = ("iou_foreground", "iou_hand", "iou_object", "pck", "color_right", "background_right")


def verify_folder(
    folder: Path,
    verifier: Path | None = BUILT_IN,
    keypoints: Path | None = None,
    contacts: Path | None = None,
    pck_threshold: float = PCK_THRESHOLD,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Score every record, replace metadata.jsonl as a whole, write report and data card; returns records and report.

    Until all is scored the folder stays as it was.  Raises ValueError when someone else changed the records meanwhile,
    or when processes have not merged theirs.
    """
    parts, lines = sorted(folder.glob("metadata-*.jsonl")), folder / "metadata.jsonl"
    if parts:
        raise ValueError(f"{folder} has {parts[0].name}: its run is not finished; finish it by the same command first")
    before = lines.stat().st_mtime_ns if lines.is_file() else None
    records = read_records(folder)
    witnesses = load_witnesses(folder, records, verifier, keypoints, contacts)
    found = list(score_records(folder, records, witnesses, pck_threshold))
    records = [record | {"verification": scores} for record, scores in zip(records, found, strict=True)]
    if lines.stat().st_mtime_ns != before:
        raise ValueError(f"{lines} changed while its pictures were verified; nothing was written, verify again")
    write_records(folder, records)
    report = write_report(folder, records, witnesses.names | {"pck_threshold": pck_threshold}, witnesses.drawn)
    refresh_card(folder)
    return records, report


def measure(verifier_path: Path, shaded: Path, generated: Path) -> dict[str, dict[str, float | None]]:
    """Mean scores of shaded pictures (the ceiling), of generated ones of the same records, and of their floor.

    The floor holds every generated picture against the truth of the record before: a picture of wrong conditions.
    Raises ValueError when the two folders do not hold the same captions in the same order.
    """
    verifier = load_verifier(verifier_path)
    records, others = read_records(shaded), read_records(generated)
    if not records or [r["text"] for r in others] != [r["text"] for r in records]:
        raise ValueError(f"{generated} does not hold the captions of {shaded}; make it with sample.py --data {shaded}")
    truths = [load_truth(shaded, record) for record in records]

    def rows(folder: Path, held_against: list[Truth]) -> dict[str, float | None]:
        images = [load_image(folder, record) for record in (records if folder == shaded else others)]
        seen = Witnesses(verifier).look(images)
        scored = zip(images, held_against, seen, strict=True)
        return mean_scores([score_picture(i, t, s, verifier.backgrounds) for i, t, s in scored], TABLE)

    return {
        f"shaded, n = {len(records)}": rows(shaded, truths),
        "generated": rows(generated, truths),
        "other records": rows(generated, truths[-1:] + truths[:-1]),
    }


def as_table(rows: dict[str, dict[str, float | None]]) -> str:
    """Markdown, with each generated figure as a share of the ceiling."""
    ceiling, generated = list(rows.values())[:2]
    share = {name: generated[name] / ceiling[name] if ceiling[name] and generated[name] is not None else None
             for name in TABLE}  # fmt: skip
    lines = ["| pictures | " + " | ".join(TABLE) + " |", "|---|" + "---|" * len(TABLE)]
    for name, row in (rows | {"generated / shaded": share}).items():
        lines.append(f"| {name} | " + " | ".join("-" if row[k] is None else f"{row[k]:.3f}" for k in TABLE) + " |")
    return "\n".join(lines)
