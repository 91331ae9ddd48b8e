"""Keypoints of FrankMocap, HaMeR and MediaPipe -> the JSON that python -m hoi.verify and python -m hoi.metrics read.

    python tools/convert_keypoints.py frankmocap dumped.json --out keypoints.json
    python tools/convert_keypoints.py hamer dumped.json --out keypoints.json
    python tools/convert_keypoints.py mano dumped.json --out keypoints.json        # any tool, joints in MANO's order
    python tools/convert_keypoints.py mediapipe DIR --model hand_landmarker.task --out keypoints.json

The first three convert what the tool's own Python call returns, dumped as {file_name: value} with its arrays as lists
(json.dump(..., default=lambda array: array.tolist())): their result files are pickles, which are not opened here.

    frankmocap  HandMocap.regress's second result: [{"left_hand": hand or null, "right_hand": hand or null}, ...];
                of a hand pred_joints_img is used: pixels of the picture, wrist and five fingers in OpenPose order
    hamer       one object a hand: pred_keypoints_2d (in its box, -0.5 to 0.5), pred_keypoints_3d (optional, metres),
                box_center, box_size, right (0 or 1): joints in OpenPose order, of a left hand mirrored in x
    mano        one object a hand: keypoints_2d in pixels, 16 MANO joints (wrist, index, middle, little, ring, thumb)
                then five tips from thumb to little; optional scores, hand_side, keypoints_3d
    mediapipe   runs the hand landmarker on every picture of a dataset folder: landmarks in OpenPose order
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hoi.common.arrays import numbers  # noqa: E402
from hoi.common.command import problems_as_messages  # noqa: E402
from hoi.common.files import read_json, write_whole  # noqa: E402
from hoi.conditions import KEYPOINTS  # noqa: E402
from hoi.data.folder import load_image, read_records  # noqa: E402
from hoi.geometry.hand import MANO_TO_OPENPOSE  # noqa: E402

MEDIAPIPE_MODEL = "https://ai.google.dev/edge/mediapipe/solutions/vision/hand_landmarker"
MAX_HANDS = 2  # of a picture: the nearest to the annotated one is scored, and more cost time


def from_frankmocap(people: Any, place: str) -> Iterator[dict[str, Any]]:
    """The value of one picture -> its hands, as the JSON has them.  Raises ValueError naming the place."""
    for number, person in enumerate(_list(people, place)):
        if person and not isinstance(person, dict):
            raise ValueError(f"{place} person {number} is a {type(person).__name__}, expected an object")
        for side in ("left", "right") if person else ():
            hand = person.get(f"{side}_hand")
            if hand:
                where = f"{place} person {number} {side}_hand"
                points = _list(_value(hand, "pred_joints_img", where), f"{where} pred_joints_img")
                points = [_list(point, where)[:2] for point in points]  # the third is a depth in pixels
                yield {"keypoints_2d": numbers(points, (KEYPOINTS, 2), f"{where} pred_joints_img"), "hand_side": side}


def from_hamer(hands: Any, place: str) -> Iterator[dict[str, Any]]:
    """As from_frankmocap.  Source: HaMeR runs left hands as mirrored right ones, in a square box around the hand."""
    for number, hand in enumerate(_list(hands, place)):
        where = f"{place} hand {number}"
        right = float(numbers(_value(hand, "right", where), (), f"{where} right"))
        if right not in (0.0, 1.0):
            raise ValueError(f"{where} right is {right:g}, expected 0 or 1")
        mirror = 2 * right - 1
        points = numbers(_value(hand, "pred_keypoints_2d", where), (KEYPOINTS, 2), f"{where} pred_keypoints_2d")
        size = float(numbers(_value(hand, "box_size", where), (), f"{where} box_size"))
        center = numbers(_value(hand, "box_center", where), (2,), f"{where} box_center")
        entry = {"keypoints_2d": points * [mirror, 1] * size + center, "hand_side": "right" if right else "left"}
        if hand.get("pred_keypoints_3d") is not None:
            points_3d = numbers(hand["pred_keypoints_3d"], (KEYPOINTS, 3), f"{where} pred_keypoints_3d")
            entry["keypoints_3d"] = points_3d * [mirror, 1, 1]
        yield entry


def from_mano(hands: Any, place: str) -> Iterator[dict[str, Any]]:
    """As from_frankmocap: rows in MANO's order with tips -> OpenPose order."""
    order = list(MANO_TO_OPENPOSE)
    for number, hand in enumerate(_list(hands, place)):
        where = f"{place} hand {number}"
        _value(hand, "keypoints_2d", where)
        entry = dict(hand)
        shapes = {"keypoints_2d": (KEYPOINTS, 2), "keypoints_3d": (KEYPOINTS, 3), "scores": (KEYPOINTS,)}
        for name, shape in shapes.items():
            if hand.get(name) is not None:
                entry[name] = numbers(hand[name], shape, f"{where} {name}")[order]
        yield entry


CONVERTERS = {"frankmocap": from_frankmocap, "hamer": from_hamer, "mano": from_mano}


def _list(value: Any, place: str) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{place} is a {type(value).__name__}, expected a list")
    return value


def _value(hand: Any, name: str, place: str) -> Any:
    if not isinstance(hand, dict) or hand.get(name) is None:
        raise ValueError(f"{place} has no {name}")
    return hand[name]


def convert(tool: str, content: Any, path: str | Path) -> dict[str, list[dict[str, Any]]]:
    """{file_name: what the tool returned} -> {file_name: hands}.  Raises ValueError naming file, picture and hand."""
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected {{file_name: what {tool} returned}}")
    return {name: list(CONVERTERS[tool](value, f"{path}: {name}")) for name, value in content.items()}


def run_mediapipe(folder: Path, model: Path) -> dict[str, list[dict[str, Any]]]:
    """Hands of every picture of a dataset folder, at most two each.

    model  hand_landmarker.task
    Raises ValueError when mediapipe is not installed, FileNotFoundError without the model or a picture.
    """
    try:
        import mediapipe
    except ImportError as error:
        raise ValueError("running MediaPipe needs the package mediapipe: pip install mediapipe") from error
    if not model.is_file():
        raise FileNotFoundError(f"no hand landmarker at {model}; hand_landmarker.task is linked from {MEDIAPIPE_MODEL}")
    vision = mediapipe.tasks.vision
    options = vision.HandLandmarkerOptions(
        base_options=mediapipe.tasks.BaseOptions(model_asset_path=str(model)), num_hands=MAX_HANDS
    )
    predictions = {}
    with vision.HandLandmarker.create_from_options(options) as landmarker:
        for record in tqdm(read_records(folder), desc="mediapipe", unit="picture"):
            if record["file_name"] is not None:
                image = np.ascontiguousarray(load_image(folder, record))
                found = landmarker.detect(mediapipe.Image(image_format=mediapipe.ImageFormat.SRGB, data=image))
                predictions[record["file_name"]] = list(_mediapipe_hands(found, *image.shape[:2]))
    return predictions


def _mediapipe_hands(found: Any, height: int, width: int) -> Iterator[dict[str, Any]]:
    """Landmarks are shares of width and height from the picture's edge; pixel centres are at integers here.

    hand_side is what MediaPipe says: versions before 0.10.15 took every picture for a mirror image and swapped left and
    right (mediapipe-samples issue 450).  No score reads it.
    """
    for landmarks, world, handedness in zip(
        found.hand_landmarks, found.hand_world_landmarks, found.handedness, strict=True
    ):
        yield {
            "keypoints_2d": np.array([[mark.x * width - 0.5, mark.y * height - 0.5] for mark in landmarks]),
            "keypoints_3d": np.array([[mark.x, mark.y, mark.z] for mark in world]),
            "scores": np.full(KEYPOINTS, handedness[0].score),
            "hand_side": handedness[0].category_name.lower(),
        }


def write_predictions(path: Path, predictions: dict[str, list[dict[str, Any]]]) -> None:
    """Write what `read_keypoint_predictions` reads."""
    text = json.dumps({"predictions": predictions}, default=lambda array: array.tolist())
    write_whole(path, (text + "\n").encode())


def parse_args() -> argparse.Namespace:
    """Arguments from the command line: the tool, its output or a folder, and the file to write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tools = parser.add_subparsers(dest="tool", required=True)
    for tool in CONVERTERS:
        add = tools.add_parser(tool, help="convert its output").add_argument
        add("source", metavar="FILE", type=Path, help="what the tool's Python call returned, as JSON")
    mediapipe = tools.add_parser("mediapipe", help="run it on a dataset folder")
    mediapipe.add_argument("source", metavar="DIR", type=Path, help="a dataset folder with pictures")
    mediapipe.add_argument("--model", metavar="FILE", type=Path, required=True,
                           help=f"hand_landmarker.task, see {MEDIAPIPE_MODEL}")  # fmt: skip
    for tool in tools.choices.values():
        tool.add_argument("--out", metavar="FILE", type=Path, required=True,
                          help="keypoints for python -m hoi.verify and hoi.metrics")  # fmt: skip
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    """Convert, or run MediaPipe; write the file and say how many hands it has."""
    if args.tool == "mediapipe":
        predictions = run_mediapipe(args.source, args.model)
    else:
        predictions = convert(args.tool, read_json(args.source, "prediction file", kind=object), args.source)
    write_predictions(args.out, predictions)
    hands = sum(map(len, predictions.values()))
    print(f"wrote {args.out}: {hands} hands in {len(predictions)} pictures")


if __name__ == "__main__":
    with problems_as_messages("python tools/convert_keypoints.py", "stopped; nothing was written"):
        main(parse_args())
