"""What a perfect picture of a record scores.  Record + words -> the toy world's own picture of its conditions.

A hand behind an object, or a small one, scores less than 1 however well it is drawn; what may be asked of a picture is
therefore told by a perfect one of the same record.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from hoi.data.folder import camera_of, load_depth
from hoi.geometry.render import OBJECT, GBuffer
from hoi.toyworld.backgrounds import BACKGROUNDS
from hoi.toyworld.looks import sample_look, shade
from hoi.toyworld.words import words_in
from hoi.verify.scores import RELATIVE, Estimators, Truth, load_truth


def can_draw(record: dict[str, Any], truth: Truth) -> bool:
    """Whether the toy world can draw it: geometry is known, and the caption names a place of the toy world."""
    known = truth.normal is not None and (truth.label_map > 0).any() and record.get("intrinsics") is not None
    return known and record.get("depth_file_name") is not None and words_in(truth.text)["background"] in BACKGROUNDS


def draw_perfect(
    folder: Path, record: dict[str, Any], truth: Truth, generator: np.random.Generator, **words: str
) -> np.ndarray:
    """Shade a record's label map, normals and depth, as its files have them, in its words and in light of its own.

    record   one that can be drawn (`can_draw`)
    words    color, material, background in place of the caption's
    returns  (H, W, 3) uint8; no arm goes on beyond the wrist, and edges are those of the label map
    """
    words = words_in(truth.text) | words
    color = words["color"] or ("white" if words["material"] == "striped" else "")  # stripes have some colour
    look = replace(sample_look(generator), object_color=color, material=words["material"] or "plain",
                   background=words["background"])  # fmt: skip
    normals = 1 - truth.normal / 127.5
    normals /= np.maximum(np.linalg.norm(normals, axis=2, keepdims=True), 1e-6)
    normals[truth.label_map == 0] = 0
    gbuffer = GBuffer(load_depth(folder, record), truth.label_map, normals, truth.label_map == OBJECT)
    return shade(gbuffer, camera_of(record), look, generator)


def perfect_scores(
    folder: Path, records: list[dict[str, Any]], estimators: Estimators
) -> Iterator[dict[str, float] | None]:
    """Of each record in turn: what a perfect picture of it scores, of RELATIVE; None where nobody can say.

    Drawn anew where the toy world can; else what the verifier's file says of pictures that it was not trained on.
    """
    network = replace(estimators, keypoints=None, contacts=None)
    for record in tqdm(records, desc="perfect pictures", unit="record"):
        best = None if network.verifier is None else dict(network.verifier.reached)
        try:
            truth = load_truth(folder, record)
            if network.verifier is not None and can_draw(record, truth):
                image = draw_perfect(folder, record, truth, np.random.default_rng(record["index"]))
                scores = network.score("", image, truth, *network.predict([image]))
                best = {name: scores[name] for name in RELATIVE if scores[name] is not None}
        except (ValueError, OSError):
            pass  # told as the record's problem already
        if best and estimators.keypoints is not None:  # another program's joints: the verifier's say nothing of them
            best = {name: value for name, value in best.items() if name not in ("pck", "pck_visible", "confidence")}
        yield best or None
