"""What real datasets have in common, what converting them needs, and what became of their frames.

A source is a sequence of frames; DexYCB, HO3D and OfficialCSV are such.  hoi/sources/frame_converter.py makes records
of them.
"""

from pathlib import Path
from typing import Any

import numpy as np

from hoi.geometry.mano import WHERE
from hoi.sources.frame import Source

NORMALS = ("rendered", "sensor-depth", "depth-files", "estimated")
FIT_LIMIT_MM = 2.0  # rounding gives a thousandth of it
MANO_FILE = WHERE.split(" Without")[0]


def check_needs(
    source: Source, normals: str, mano_path: str | Path | None, depth_files: str | Path | None = None
) -> None:
    """Raise ValueError when what was chosen needs something that is not there."""
    if normals not in NORMALS:
        raise ValueError(f"normals is {normals!r}, expected one of {', '.join(NORMALS)}")
    if normals == "rendered" and not source.has_geometry:
        raise ValueError(f"{source.name} has no 3D annotation to render normals from; choose --normals estimated, "
                         "depth-files or sensor-depth")  # fmt: skip
    if mano_path is None and source.has_geometry and not source.has_labels:
        raise ValueError(
            f"{source.name} has no segmentation files, so hand and object are rendered from its annotation, and its "
            f"hands are MANO's: pass --mano FILE. {MANO_FILE} There is no way around it; DexYCB can be read without one"
        )
    if mano_path is None and normals == "rendered":
        raise ValueError(
            f"--normals rendered draws the hand's surface, and {source.name}'s hands are MANO's: pass --mano FILE, or "
            f"choose --normals sensor-depth, depth-files or estimated, which need no MANO file. {MANO_FILE}"
        )
    missing = source.missing_models() if normals == "rendered" or not source.has_labels else []
    if missing:
        raise ValueError(
            f"{len(missing)} object models are missing, the first is {missing[0]}; they come with DexYCB in its folder "
            f"models: pass --models DIR{', or choose other --normals' if source.has_labels else ''}"
        )
    if (normals == "depth-files") != (depth_files is not None):
        raise ValueError("--normals depth-files needs --depth-files DIR, and only it does")
    if depth_files is not None and not Path(depth_files).is_dir():
        raise FileNotFoundError(f"--depth-files {depth_files} is no folder")


def summary(records: list[dict[str, Any]]) -> dict[str, Any]:
    """How well records agree with their own annotation: mean IoU of a re-render with the source's segmentation, and how
    far the posed hand's joints lie from the source's, for each side.  Empty where nothing could be measured.
    """
    overlaps = [record["rerender_iou"] for record in records if record.get("rerender_iou")]
    result: dict[str, Any] = {}
    if overlaps:
        result["mean_rerender_iou"] = {
            name: round(float(np.mean([each[name] for each in overlaps])), 4) for name in ("hand", "object")
        }
    for side in ("right", "left"):
        fits = [record["hand_fit_mm"] for record in records
                if record.get("hand_fit_mm") is not None and record["hand_side"] == side]  # fmt: skip
        if fits:
            result[f"hand_fit_mm_{side}"] = {"median": round(float(np.median(fits)), 3), "max": max(fits)}
    return result


def fit_warning(findings: dict[str, Any]) -> str:
    """A sentence when posed hands miss the source's joints, empty otherwise.

    findings  of summary()
    A wrong MANO file shows itself here, and so does a left pose space that is not the mirror image of the right one.
    """
    far = {side: findings[f"hand_fit_mm_{side}"]["median"] for side in ("right", "left")
           if findings.get(f"hand_fit_mm_{side}", {}).get("median", 0.0) > FIT_LIMIT_MM}  # fmt: skip
    if not far:
        return ""
    told = " and ".join(f"{side} hands {value:g} mm" for side, value in far.items())
    return (f"WARNING: posed joints lie off the source's own, {told} (median of the farthest joint): is the MANO file "
            "the official one, with MANO_LEFT.pkl beside MANO_RIGHT.pkl for left hands?")  # fmt: skip
