"""Who looks at the pictures, and what scores follow.  Records + network or prediction files -> `verification` dicts."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from hoi.common.files import sha256_of
from hoi.verify.estimators import (
    PORTABLE_OBJECT,
    ContactPrediction,
    HandPrediction,
    check_covers,
    closest_hand,
    contact_state,
    read_contact_predictions,
    read_keypoint_predictions,
)
from hoi.verify.scores import load_rgb, true_keypoints
from hoi.verify.verification import SCORES, Truth, load_truth, score_picture
from hoi.verify.verifier import Seen, Verifier, load_verifier, look_at

BATCH = 16


@dataclass(frozen=True)
class Witnesses:
    """Who says what the pictures show.

    verifier   the network, or None
    keypoints  predictions of another program by file_name, scored in place of the network's; or None
    contacts   of the contact detector; or None
    names      what the records and the report call them
    """

    verifier: Verifier | None
    keypoints: dict[str, list[HandPrediction]] | None = None
    contacts: dict[str, list[ContactPrediction]] | None = None
    names: dict[str, str] = field(default_factory=lambda: {"verifier": "none", "keypoints": "none"})

    def look(self, images: list[np.ndarray]) -> list[Seen | None]:
        """What the verifier sees in each picture (H, W, 3) uint8."""
        if self.verifier is None:
            return [None] * len(images)
        return [seen for k in range(0, len(images), BATCH) for seen in look_at(self.verifier, images[k : k + BATCH])]

    def drawn(self, records: list[dict[str, Any]], images: list[np.ndarray]) -> list[tuple[Any, Any]]:
        """Of each record what was scored: label map (H, W) or None, keypoints (21, 2) or None."""
        pairs = [(None, None) if seen is None else (seen.label_map, seen.keypoints_2d) for seen in self.look(images)]
        if self.keypoints is None:
            return pairs
        true = [true_keypoints(record) for record in records]
        hands = [None if t is None else closest_hand(self.keypoints[r["file_name"]], t)
                 for r, t in zip(records, true, strict=True)]  # fmt: skip
        return [(m, None if hand is None else hand.keypoints_2d) for (m, _), hand in zip(pairs, hands, strict=True)]


def load_witnesses(
    folder: Path, records: list[dict[str, Any]], verifier: Path | None, keypoints: Path | None, contacts: Path | None
) -> Witnesses:
    """Raises FileNotFoundError or ValueError when a file is absent, damaged, or of other pictures than the folder's."""
    pictures = [record["file_name"] for record in records if record["file_name"] is not None]
    if not pictures:
        what = "no records" if not records else f"{len(records)} records, none of them with a picture"
        raise ValueError(f"{folder} has {what}; sample.py --data DIR makes pictures from conditions")
    network = None if verifier is None else load_verifier(verifier)
    hands = None if keypoints is None else read_keypoint_predictions(keypoints)
    states = None if contacts is None else read_contact_predictions(contacts)
    for path, predictions in ((keypoints, hands), (contacts, states)):
        if predictions is not None:
            check_covers(predictions, pictures, path)
    name = "none" if verifier is None else f"{verifier.name} {sha256_of(verifier)[:12]}"
    return Witnesses(network, hands, states, {"verifier": name, "keypoints": name if hands is None else keypoints.name})


def read_picture(folder: Path, record: dict[str, Any]) -> tuple[np.ndarray, Truth] | str:
    """Picture and truth, or what is wrong with them."""
    try:
        return load_rgb(folder, record), load_truth(folder, record)
    except (ValueError, OSError) as error:
        return str(error)


def score_records(
    folder: Path, records: list[dict[str, Any]], witnesses: Witnesses, pck_threshold: float
) -> Iterator[dict[str, Any]]:
    """`verification` of every record in turn: SCORES, how they were made, and `problem`, None or why there are none."""
    about = witnesses.names | {"pck_threshold": pck_threshold}
    with ThreadPoolExecutor(max_workers=2) as readers:
        for start in tqdm(range(0, len(records), BATCH), desc="verifying", unit="batch"):
            chunk = records[start : start + BATCH]
            read = list(readers.map(lambda record: read_picture(folder, record), chunk))
            sound = [k for k, each in enumerate(read) if not isinstance(each, str)]
            seen = dict(zip(sound, witnesses.look([read[k][0] for k in sound]), strict=True))
            for k, record in enumerate(chunk):
                scores, problem = dict.fromkeys(SCORES), read[k] if k not in seen else None
                if problem is None:
                    try:
                        scores = _scores(record["file_name"], *read[k], seen[k], witnesses, pck_threshold)
                    except ValueError as error:
                        problem = f"{record['file_name']}: {error}"
                yield scores | about | {"problem": problem}


def _scores(
    name: str, image: np.ndarray, truth: Truth, seen: Seen | None, witnesses: Witnesses, pck_threshold: float
) -> dict[str, float | None]:
    backgrounds = () if witnesses.verifier is None else witnesses.verifier.backgrounds
    hands = None if witnesses.keypoints is None else witnesses.keypoints[name]
    scores = score_picture(image, truth, seen, backgrounds, hands, pck_threshold)
    if witnesses.contacts is not None:
        scores["contact_seen"] = float(contact_state(witnesses.contacts[name]) == PORTABLE_OBJECT)
    return scores
