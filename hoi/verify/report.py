"""What a folder's scores look like.  Scored records -> report.json, report.md, histograms.png, best_worst.png.

Choosing the pictures whose scores pass.  Scored records + "iou_hand>0.8,pck>0.9" -> a list, or a dataset folder.

A scored folder: its scores, and the table of several folders.
"""

import hashlib
import json
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from hoi.common.files import encode_png, write_json, write_whole
from hoi.common.sheets import contact_sheet, histogram
from hoi.conditions import draw_skeleton
from hoi.data.folder import PICTURE_FOLDERS, load_image, read_description, read_records
from hoi.data.writer import DatasetWriter, refresh_card, write_records
from hoi.verify.scores import (
    PCK_THRESHOLD,
    SCORES,
    Estimators,
    Truth,
    load_estimators,
    load_truth,
    mean_scores,
    score_picture,
    score_records,
)
from hoi.verify.verifier import BUILT_IN_VERIFIER, load_verifier

REPORT_FOLDER = "verification"
PERCENTILES = (5, 25, 50, 75, 95)
# What histograms show, left and right end; what lies beyond is counted at the end.
HISTOGRAMS = {
    "iou_hand": (0, 1), "iou_object": (0, 1), "pck": (0, 1), "confidence": (0, 1),
    "keypoint_error_relative": (0, 0.5), "keypoint_error_relative_visible": (0, 0.5),
    "keypoint_error_relative_hidden": (0, 0.5),
}  # fmt: skip
RANKED_BY = ("iou_hand", "iou_object", "pck")  # best and worst are by the mean of those that a record has
SHEET_COUNT, SHEET_CELL, SHEET_COLUMNS = 16, 192, 8
HAND_TINT, OBJECT_TINT = (64, 255, 64), (255, 64, 64)
SHOWN_PROBLEMS = 20

Observer = Callable[[list[dict[str, Any]], list[np.ndarray]], list[tuple[np.ndarray | None, np.ndarray | None]]]


def summarize(records: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Of each score that any record has: n, mean and percentiles."""
    summary = {}
    for name in SCORES:
        values = [record["verification"][name] for record in records if record["verification"][name] is not None]
        if values:
            percentiles = {
                f"p{p}": float(v) for p, v in zip(PERCENTILES, np.percentile(values, PERCENTILES), strict=True)
            }
            summary[name] = {"n": len(values), "mean": float(np.mean(values)), **percentiles}
    return summary


def report_as_markdown(report: dict[str, Any]) -> str:
    columns = ("n", "mean", *(f"p{p}" for p in PERCENTILES))
    lines = [
        f"# Verification of {report['folder']}", "",
        f"{report['records']} records, {report['scored']} scored. Verifier: {report['verifier']}. "
        f"Keypoints: {report['keypoints']}. PCK threshold: {report['pck_threshold']} of the hand box.", "",
        f"| score | {' | '.join(columns)} |", "|---|" + "---|" * len(columns),
    ]  # fmt: skip
    for name, row in report["scores"].items():
        lines.append(f"| {name} | {row['n']} | " + " | ".join(f"{row[c]:.3f}" for c in columns[1:]) + " |")
    problems = report["problems"]
    if problems:
        lines += ["", f"## {len(problems)} records without scores", ""]
        lines += [f"- {problem}" for problem in problems[:SHOWN_PROBLEMS]]
        lines += ["- ... the others are in report.json"] if len(problems) > SHOWN_PROBLEMS else []
    lines += [
        "",
        f"Best and worst are by the mean of {', '.join(RANKED_BY)}. A score counts the records that have it.",
    ]
    return "\n".join(lines) + "\n"


def histograms(records: list[dict[str, Any]]) -> Image.Image | None:
    """All HISTOGRAMS that have values, two a row; None when there are none."""
    drawn = []
    for name, ends in HISTOGRAMS.items():
        values = [record["verification"][name] for record in records if record["verification"][name] is not None]
        if values:
            drawn.append(np.asarray(histogram(values, name, ends)))
    return contact_sheet([drawn[k : k + 2] for k in range(0, len(drawn), 2)]) if drawn else None


def rank(record: dict[str, Any]) -> float | None:
    values = [record["verification"][name] for name in RANKED_BY if record["verification"][name] is not None]
    return float(np.mean(values)) if values else None


def overlay(image: np.ndarray, label_map: np.ndarray | None, points: np.ndarray | None) -> np.ndarray:
    """The picture, tinted where hand and object are seen, under the skeleton that is seen.  (H, W, 3) uint8."""
    tinted = image.astype(np.float32)
    for label, tint in ((1, HAND_TINT), (2, OBJECT_TINT)) if label_map is not None else ():
        tinted[label_map == label] = 0.6 * tinted[label_map == label] + 0.4 * np.array(tint)
    if points is None:
        return tinted.astype(np.uint8)
    skeleton = draw_skeleton(points, *image.shape[:2]).astype(np.float32)
    weight = skeleton.max(axis=2, keepdims=True) / 255
    return np.clip(tinted * (1 - weight) + skeleton, 0, 255).astype(np.uint8)


def best_and_worst(folder: Path, records: list[dict[str, Any]], look: Observer) -> Image.Image | None:
    """The 16 best pictures above the 16 worst with what is seen in them; None when no record can be ranked.

    look  records and their pictures -> label map and keypoints that are seen in each, or None
    """
    ranked = sorted((record for record in records if rank(record) is not None), key=rank, reverse=True)
    if not ranked:
        return None
    chosen = [*ranked[:SHEET_COUNT], *ranked[-SHEET_COUNT:]]
    images = [load_image(folder, record) for record in chosen]
    drawn = [
        np.asarray(Image.fromarray(overlay(image, *seen)).resize((SHEET_CELL, SHEET_CELL)))
        for image, seen in zip(images, look(chosen, images), strict=True)
    ]
    half = min(SHEET_COUNT, len(ranked))
    titles = ["best"] * half + ["worst"] * half
    labels = [f"{t} {rank(r):.2f}  {Path(r['file_name']).stem}" for t, r in zip(titles, chosen, strict=True)]
    rows = [slice(k, min(k + SHEET_COLUMNS, half)) for k in range(0, half, SHEET_COLUMNS)]
    rows += [slice(half + row.start, half + row.stop) for row in rows]
    return contact_sheet([drawn[row] for row in rows], [labels[row] for row in rows])


def write_report(
    folder: Path,
    records: list[dict[str, Any]],
    about: dict[str, Any],
    look: Observer,
) -> dict[str, Any]:
    """Write folder/verification/ and return what report.json holds.

    about  verifier, keypoints, pck_threshold: how the scores were made
    """
    out = folder / REPORT_FOLDER
    out.mkdir(exist_ok=True)
    problems = [record["verification"]["problem"] for record in records if record["verification"]["problem"]]
    report = {"folder": str(folder), "records": len(records), "scored": len(records) - len(problems), **about}
    report |= {"scores": summarize(records), "problems": problems}
    write_json(out / "report.json", report)
    write_whole(out / "report.md", report_as_markdown(report).encode())
    for name, picture in (("histograms", histograms(records)), ("best_worst", best_and_worst(folder, records, look))):
        if picture is not None:
            write_whole(out / f"{name}.png", encode_png(np.asarray(picture)))
    return report


OPERATORS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
CONDITION = re.compile(r"\s*(\w+)\s*(>=|<=|>|<)\s*(\S+)\s*")


@dataclass(frozen=True)
class Condition:
    """One comparison of a score with a number; str() writes it as it is read."""

    score: str
    sign: str
    limit: float

    def __str__(self) -> str:
        return f"{self.score}{self.sign}{self.limit:g}"

    def passes(self, scores: dict[str, Any] | None) -> bool:
        """A picture without the score does not pass."""
        value = (scores or {}).get(self.score)
        return value is not None and OPERATORS[self.sign](value, self.limit)


def parse_keep(expression: str) -> list[Condition]:
    """Comparisons joined by commas, all of which must hold: "iou_hand>0.8,pck>=0.9".

    Raises ValueError naming the part that is not `score > number` (or >=, <, <=), or the score that does not exist.
    """
    conditions = []
    for part in expression.split(","):
        match = CONDITION.fullmatch(part)
        try:
            name, sign, limit = match[1], match[2], float(match[3])
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"--keep {part.strip()!r} is not score>number (also >=, <, <=), as in iou_hand>0.8"
            ) from error
        if name not in SCORES:
            raise ValueError(f"--keep: there is no score {name!r}; scores are {', '.join(SCORES)}")
        conditions.append(Condition(name, sign, limit))
    return conditions


def choose(records: list[dict[str, Any]], conditions: list[Condition]) -> list[dict[str, Any]]:
    return [record for record in records if all(c.passes(record["verification"]) for c in conditions)]


def describe_yield(records: list[dict[str, Any]], conditions: list[Condition]) -> str:
    """How many records pass all conditions, and each alone."""
    total = len(records)

    def counted(title: str, passing: list[dict[str, Any]]) -> str:
        return f"{title}: {len(passing)} of {total} ({100 * len(passing) / total:.1f} %)"

    alone = [counted(f"  {c} alone", choose(records, [c])) for c in conditions] if len(conditions) > 1 else []
    return "\n".join([counted(f"pass {', '.join(map(str, conditions))}", choose(records, conditions)), *alone])


def write_list(path: Path, records: list[dict[str, Any]]) -> None:
    """One file_name a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "".join(f"{record['file_name']}\n" for record in records).encode())


def copy_records(folder: Path, out: Path, records: list[dict[str, Any]], conditions: list[Condition]) -> None:
    """Copy what passes, with all its files, into a dataset folder of its own, under the same names and indices.

    records  all of the folder, scored
    The same command continues an interrupted copy.  Raises ValueError when `out` holds anything else.
    """
    chosen, keep = choose(records, conditions), ", ".join(map(str, conditions))
    if not chosen:
        raise ValueError(f"nothing passes {keep}, so there is nothing to copy to {out}")
    description = read_description(folder)
    rejected = (description.get("rejected") or {}) | {f"does not pass {keep}": len(records) - len(chosen)}
    digest = hashlib.sha256(json.dumps(chosen).encode()).hexdigest()
    job = {"selected_from": str(folder.resolve()), "keep": keep, "records": digest}
    if out.is_dir() and any(out.iterdir()):
        if read_description(out).get("job") != job:
            raise ValueError(f"{out} holds something else than this selection; choose another folder")
    writer = DatasetWriter(
        out, description | {"rejected": rejected, "selected_job": description.get("job"), "job": job}
    )
    for record in tqdm(chosen, desc="copying", unit="record"):
        if writer.done(record["index"]):
            continue
        for path in filter(None, (record.get(key) for key in (*PICTURE_FOLDERS, "object_path"))):
            if not (out / path).resolve().is_relative_to(out.resolve()):
                raise ValueError(f"record {record['index']} names {path}, which is outside of {folder}")
            if not (out / path).exists():  # several looks share one geometry
                (out / path).parent.mkdir(parents=True, exist_ok=True)
                write_whole(out / path, (folder / path).read_bytes())
        writer.append(record)
    writer.finish()


TABLE = ("iou_foreground", "iou_hand", "iou_object", "pck", "color_right", "background_right")


def verify_folder(
    folder: Path,
    verifier: Path | None = BUILT_IN_VERIFIER,
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
    witnesses = load_estimators(folder, records, verifier, keypoints, contacts)
    found = list(score_records(folder, records, witnesses, pck_threshold))
    records = [record | {"verification": scores} for record, scores in zip(records, found, strict=True)]
    if lines.stat().st_mtime_ns != before:
        raise ValueError(f"{lines} changed while its pictures were verified; nothing was written, verify again")
    write_records(folder, records)
    report = write_report(folder, records, witnesses.names | {"pck_threshold": pck_threshold}, witnesses.drawn)
    refresh_card(folder)
    return records, report


def measure_folders(verifier_path: Path, shaded: Path, generated: Path) -> dict[str, dict[str, float | None]]:
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
        seen = Estimators(verifier).predict(images)
        scored = zip(images, held_against, seen, strict=True)
        return mean_scores([score_picture(i, t, s, verifier.backgrounds) for i, t, s in scored], TABLE)

    return {
        f"shaded, n = {len(records)}": rows(shaded, truths),
        "generated": rows(generated, truths),
        "other records": rows(generated, truths[-1:] + truths[:-1]),
    }


def scores_as_table(rows: dict[str, dict[str, float | None]]) -> str:
    """Markdown, with each generated figure as a share of the ceiling."""
    ceiling, generated = list(rows.values())[:2]
    share = {name: generated[name] / ceiling[name] if ceiling[name] and generated[name] is not None else None
             for name in TABLE}  # fmt: skip
    lines = ["| pictures | " + " | ".join(TABLE) + " |", "|---|" + "---|" * len(TABLE)]
    for name, row in (rows | {"generated / shaded": share}).items():
        lines.append(f"| {name} | " + " | ".join("-" if row[k] is None else f"{row[k]:.3f}" for k in TABLE) + " |")
    return "\n".join(lines)
