"""What other programs say of the pictures.  JSON -> hand keypoints and contact states by picture.  Paper: Sec. 4.2.

choices.FORMATS says what the files hold, and --help shows it; the readers take it exactly or name file, picture and
hand of what is wrong.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from hoi.common.arrays import numbers
from hoi.common.command import first_few
from hoi.common.files import read_json
from hoi.conditions import KEYPOINTS

CONTACT_STATES = ("no contact", "self", "another person", "portable object", "stationary object")
PORTABLE_OBJECT = 3  # the one state that counts as contact in the evaluation that the paper follows
NO_HAND = -1  # in place of a state
MIN_SCORE = 0.5  # the detector's own threshold
HOW_MADE = "; python tools/convert_keypoints.py --help says how to make one"

T = TypeVar("T")


@dataclass(frozen=True)
class HandPrediction:
    """One hand that a program found.

    keypoints_2d  (21, 2)  pixels, OpenPose order
    scores        (21,)    confidence of each point, or None
    hand_side     "left", "right" or None
    keypoints_3d  (21, 3)  metres, any origin, or None
    """

    keypoints_2d: np.ndarray
    scores: np.ndarray | None = None
    hand_side: str | None = None
    keypoints_3d: np.ndarray | None = None


def _known_keys(entry: Any, required: set[str], optional: set[str], place: str) -> dict[str, Any]:
    """The entry without nulls, if it is an object of these keys: a misspelt optional key would go unread.

    Of both kinds a hand_side is held to its two words.
    """
    if not isinstance(entry, dict) or not required <= entry.keys() <= required | optional:
        got = sorted(entry) if isinstance(entry, dict) else type(entry).__name__
        raise ValueError(f"{place} is {got}; expected an object with {sorted(required)}, optional {sorted(optional)}")
    if (side := entry.get("hand_side")) not in ("left", "right", None):
        raise ValueError(f'{place} hand_side is {side!r}, expected "left", "right" or null')
    return {key: value for key, value in entry.items() if value is not None or key in required}


def _hand(entry: Any, place: str) -> HandPrediction:
    entry = _known_keys(entry, {"keypoints_2d"}, {"scores", "hand_side", "keypoints_3d"}, place)
    shapes = {"keypoints_2d": (KEYPOINTS, 2), "scores": (KEYPOINTS,), "keypoints_3d": (KEYPOINTS, 3)}
    arrays = {key: numbers(entry[key], shape, f"{place} {key}") for key, shape in shapes.items() if key in entry}
    return HandPrediction(**arrays, hand_side=entry.get("hand_side"))


def _contact(entry: Any, place: str) -> tuple[float, int]:
    """Score and state of one hand of the contact detector; the state indexes CONTACT_STATES."""
    # The detector gives an offset to the object, too; it may stay in the file, nobody reads it.
    entry = _known_keys(entry, {"box", "score", "state"}, {"hand_side", "offset"}, place)
    state = entry["state"]
    if type(state) is not int or not 0 <= state < len(CONTACT_STATES):  # isinstance would take True for 1
        raise ValueError(f"{place} state is {state!r}, expected 0 to {len(CONTACT_STATES) - 1}")
    numbers(entry["box"], (4,), f"{place} box")
    return float(numbers(entry["score"], (), f"{place} score")), state


def _read(path: str | Path, make: Callable[[Any, str], T]) -> dict[str, list[T]]:
    content = read_json(path, "prediction file", HOW_MADE, kind=object)
    pictures = content.get("predictions") if isinstance(content, dict) else None
    if not isinstance(pictures, dict):
        raise ValueError(f'{path}: expected {{"predictions": {{file_name: [hand, ...]}}}}')
    predictions = {}
    for name, hands in pictures.items():
        if not isinstance(hands, list):
            raise ValueError(f"{path}: {name} is a {type(hands).__name__}, expected a list with one entry a hand")
        predictions[name] = [make(hand, f"{path}: {name} hand {number}") for number, hand in enumerate(hands)]
    return predictions


def read_keypoint_predictions(path: str | Path) -> dict[str, list[HandPrediction]]:
    """Hands by file_name, from the first format of FORMATS.

    Raises FileNotFoundError, or ValueError naming file, picture and hand: no JSON, unknown keys, another number of
    points, numbers that are not finite, another hand side.
    """
    return _read(path, _hand)


def read_contact_states(path: str | Path) -> dict[str, int]:
    """State of the surest hand by file_name, from the second; NO_HAND when no hand reaches MIN_SCORE.

    PORTABLE_OBJECT counts as contact, everything else does not, a missing hand included.
    Source: the evaluation published with Affordance Diffusion takes the first hand; the detector sorts by score.
    Raises as read_keypoint_predictions.
    """
    states = {}
    for name, hands in _read(path, _contact).items():
        score, state = max(hands, key=lambda hand: hand[0], default=(0.0, NO_HAND))
        states[name] = state if score >= MIN_SCORE else NO_HAND
    return states


def check_covers(
    predictions: Mapping[str, Any], records: Iterable[dict[str, Any]], path: str | Path, others: Iterable[str] = ()
) -> None:
    """Raise ValueError unless the predictions are of exactly the pictures of these records.

    others  file names that may have predictions, too: pictures left out as damaged
    A picture without an entry is refused, too: [] says that a program looked and found nothing, absence does not.
    """
    names = {record["file_name"] for record in records}
    # Both ways round: a file of another folder often shares some names.
    for title, odd, advice in (
        ("pictures are not in the dataset", predictions.keys() - names - set(others), "are they of another folder?"),
        ("pictures of the dataset have no entry", names - predictions.keys(), "write [] where no hand was found"),
    ):
        if odd:
            raise ValueError(f"{path}: {len(odd)} {title} ({first_few(sorted(odd), most=3)}); {advice}")


def closest_hand(hands: list[HandPrediction], keypoints_2d: np.ndarray) -> HandPrediction | None:
    """The hand whose points lie nearest to (21, 2) target pixels on average; None when there is no hand.

    Of several people's hands one is annotated, and finding the others is no mistake; hand_side is not asked, since
    estimators swap the sides of hands that they place well (MediaPipe took every picture for a mirror image).
    """
    return min(hands, key=lambda hand: np.linalg.norm(hand.keypoints_2d - keypoints_2d, axis=1).mean(), default=None)
