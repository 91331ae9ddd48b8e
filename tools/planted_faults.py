"""Does the verifier notice?  Faults painted into shaded pictures, and what they score before and after.

    python tools/planted_faults.py SHADED [--verifier FILE] [--keep CONDITIONS] [--sheets DIR] [--count N]

A row a fault: mean scores, and the share that the cut keeps, of the pictures into which it could be painted; the first
row is the same pictures untouched.  --sheets writes kept.png and rejected.png, with the faults named.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from scipy import ndimage

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from hoi.common.command import problems_as_messages  # noqa: E402
from hoi.common.sheets import contact_sheet  # noqa: E402
from hoi.data.folder import load_image, read_records  # noqa: E402
from hoi.geometry.render import HAND, OBJECT  # noqa: E402
from hoi.verify.faults import FAULTS, Fingers, filled_from_around  # noqa: E402
from hoi.verify.perfect import perfect_scores  # noqa: E402
from hoi.verify.report import RECOMMENDED, choose, parse_keep  # noqa: E402
from hoi.verify.scores import Estimators, Truth, load_truth  # noqa: E402
from hoi.verify.verifier import BUILT_IN_VERIFIER, load_verifier  # noqa: E402
from tools.measure_generated import mean_scores  # noqa: E402

SHOWN = ("iou_hand", "iou_object", "pck", "fingertips", "shading_hand", "color_right")
SHIFT, BLUR = 5, 1.5  # pixels


def fingers_of(image: np.ndarray, truth: Truth) -> Fingers:
    """The picture with the fingertips that it shows; none is added yet."""
    tips = np.pad(truth.tips, ((0, 1), (0, 0)), constant_values=np.nan)
    return Fingers(image, truth.label_map, truth.keypoints_2d, tips)


def with_hand_of(picture: Fingers, other: Fingers) -> np.ndarray:
    """The hand painted over by what is around it, and another picture's hand pasted in its own place."""
    empty = filled_from_around(picture, picture.labels == HAND).image
    return np.where((other.labels == HAND)[..., None], other.image, empty)


def faulty(picture: Fingers, other: Fingers, generator: np.random.Generator) -> dict[str, np.ndarray]:
    """The picture with each fault that can be painted into it."""
    painted = {name: paint(picture, generator) for name, paint in FAULTS.items()}
    image, hand, thing = picture.image, picture.labels == HAND, (picture.labels == OBJECT)[..., None]
    shifted = np.roll(image, SHIFT, axis=1)
    shifted[:, :SHIFT] = image[:, :1]
    return {f"fingertip {name}": found.image for name, found in painted.items() if found is not None} | {
        f"shifted {SHIFT} px": shifted,
        "mirrored": image[:, ::-1].copy(),
        "another record's hand": with_hand_of(picture, other),
        "colour swapped": np.where(thing, image[..., [1, 2, 0]], image),
        f"blurred, {BLUR} px": ndimage.gaussian_filter(image, (BLUR, BLUR, 0)),
        "flat hand": np.where(hand[..., None], image[hand].mean(axis=0).astype(np.uint8), image),
    }


def try_faults(folder: Path, verifier: Path, keep: str, count: int) -> dict[str, list[tuple[np.ndarray, dict]]]:
    """Pictures with their `verification`, by fault; "none" first."""
    records, generator = read_records(folder)[:count], np.random.default_rng(0)
    estimators = Estimators(load_verifier(verifier))
    truths = [load_truth(folder, record) for record in records]
    images = [load_image(folder, record) for record in records]
    pictures = list(map(fingers_of, images, truths))
    perfect = perfect_scores(folder, records, estimators)
    found: dict[str, list] = {"none": []}
    for k, (picture, truth, best) in enumerate(zip(pictures, truths, perfect, strict=True)):
        versions = {"none": picture.image} | faulty(picture, pictures[k - 1], generator)
        predictions = estimators.predict(list(versions.values()))
        for (name, image), seen in zip(versions.items(), predictions, strict=True):
            scores = estimators.score("", image, truth, seen) | {"perfect": best}
            found.setdefault(name, []).append((image, scores))
    return found


@problems_as_messages("planted_faults.py", "stopped")
def main() -> None:
    """Print the table; write the sheets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--verifier", type=Path, default=BUILT_IN_VERIFIER)
    parser.add_argument("--keep", default=RECOMMENDED, help="as of python -m hoi.verify (default: %(default)s)")
    parser.add_argument("--count", type=int, default=208)
    parser.add_argument("--sheets", type=Path)
    args = parser.parse_args()
    found, conditions = try_faults(args.folder, args.verifier, args.keep, args.count), parse_keep(args.keep)
    print(f"| fault | n | {' | '.join(SHOWN)} | kept |\n|{'---|' * (len(SHOWN) + 3)}")
    kept, rejected = [], []
    for name, pictures in found.items():
        passing = [bool(choose([{"verification": scores}], conditions)) for _, scores in pictures]
        means = mean_scores([scores for _, scores in pictures], SHOWN)
        cells = ["-" if value is None else f"{value:.3f}" for value in means.values()]
        print(f"| {name} | {len(pictures)} | {' | '.join(cells)} | {np.mean(passing):.3f} |")
        for (image, _), passes in zip(pictures, passing, strict=True):
            (kept if passes else rejected).append((name, image))
    if args.sheets:
        args.sheets.mkdir(parents=True, exist_ok=True)
        for title, pictures in (("kept", kept), ("rejected", rejected)):
            chosen = [pictures[k] for k in np.linspace(0, len(pictures) - 1, 32).astype(int)]
            rows = [chosen[k : k + 8] for k in range(0, 32, 8)]
            labels = [[name for name, _ in row] for row in rows]
            contact_sheet([[image for _, image in row] for row in rows], labels).save(args.sheets / f"{title}.png")


if __name__ == "__main__":
    main()
