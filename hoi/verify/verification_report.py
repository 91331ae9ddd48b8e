"""What a folder's scores look like.  Scored records -> report.json, report.md, histograms.png, best_worst.png."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hoi.common.files import encode_png, write_bytes_atomically
from hoi.common.sheets import contact_sheet, histogram
from hoi.conditions import draw_skeleton
from hoi.data.folder import load_image
from hoi.verify.scores import SCORES

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

Look = Callable[[list[dict[str, Any]], list[np.ndarray]], list[tuple[np.ndarray | None, np.ndarray | None]]]


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


def as_markdown(report: dict[str, Any]) -> str:
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


def best_and_worst(folder: Path, records: list[dict[str, Any]], look: Look) -> Image.Image | None:
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
    look: Look,
) -> dict[str, Any]:
    """Write folder/verification/ and return what report.json holds.

    about  verifier, keypoints, pck_threshold: how the scores were made
    """
    out = folder / REPORT_FOLDER
    out.mkdir(exist_ok=True)
    problems = [record["verification"]["problem"] for record in records if record["verification"]["problem"]]
    report = {"folder": str(folder), "records": len(records), "scored": len(records) - len(problems), **about}
    report |= {"scores": summarize(records), "problems": problems}
    write_bytes_atomically(out / "report.json", (json.dumps(report, indent=1) + "\n").encode())
    write_bytes_atomically(out / "report.md", as_markdown(report).encode())
    for name, picture in (("histograms", histograms(records)), ("best_worst", best_and_worst(folder, records, look))):
        if picture is not None:
            write_bytes_atomically(out / f"{name}.png", encode_png(np.asarray(picture)))
    return report
