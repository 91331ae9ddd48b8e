"""How steady clips are, and whether their hands stay where they should: the anchor on and off (docs/clips.md).

    python tests/bench_clips.py                       # 4 objects x 3 seeds, built-in model: about 25 minutes on 2 cores
    python tests/bench_clips.py --objects mug --seeds 0 --frames 4
    python tests/bench_clips.py --also "--anchor 0"     # rows more: ideas beside the paper's

Flicker in 8-bit levels (hoi/metrics/flicker.py), less is steadier; IoU of hand and object, as the verifier sees them in
the pictures, with the label maps that the pictures were made from.  Frames without anchor that have noise of their own
are the single pictures that sample.py makes of the same records (tests/test_video.py shows it); the shaded toy world is
what lighting alone causes, and what the verifier can see at best.  Clips are kept in --out; the same command continues.
Each object and seed also gets side_by_side.webp: the anchor on, and single pictures.
"""

import argparse
import contextlib
import os
import re
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
import video
from hoi.common.choices import CATEGORIES
from hoi.common.sheets import encode_animation
from hoi.data.folder import load_image, load_label_map, read_records
from hoi.geometry.hand import HandModel, load_hand
from hoi.geometry.scene import render_picture
from hoi.metrics.flicker import video_flicker
from hoi.toyworld.looks import sample_look, shade_scene
from hoi.verify.verifier import BUILT_IN_VERIFIER, Verifier, load_verifier, predict
from hoi.weights.load import BUILT_IN_MODEL, load_model

ANCHORED, SINGLE, FLOOR = "anchor on, same noise", "anchor off, separate noise", "shaded toy world"
VARIANTS = {
    ANCHORED: "",
    "anchor on, separate noise": "--separate-noise",
    "anchor off, same noise": "--no-anchor",
    SINGLE: "--no-anchor --separate-noise",
}
Measures = dict[str, float]  # one clip: column -> number


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objects", nargs="+", default=list(CATEGORIES)[:4])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--also", nargs="+", default=[], metavar="FLAGS", help="of video.py, each a variant more")
    parser.add_argument("--checkpoint", metavar="FILE", help="default: the built-in weights")
    parser.add_argument("--verifier", type=Path, default=BUILT_IN_VERIFIER, metavar="FILE",
                        help="default: the built-in one")  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("out/clips"), metavar="DIR")
    return parser.parse_args()


def overlaps(seen: np.ndarray, true: np.ndarray) -> Measures:
    """Mean IoU of hand and object in label maps (N, H, W); pictures that should not show the thing do not count."""
    found = {}
    for label, column in ((1, "hand IoU"), (2, "object IoU")):
        shown = (true == label).any(axis=(1, 2))
        a, b = seen[shown] == label, true[shown] == label
        found[column] = float(((a & b).sum(axis=(1, 2)) / (a | b).sum(axis=(1, 2))).mean()) if shown.any() else np.nan
    return found


def folder_of(folder: Path, variant: str) -> Path:
    return folder / re.sub(r"\W+", "_", variant).strip("_")


def write_side_by_side(folder: Path) -> None:
    both = [folder_of(folder, variant) for variant in (ANCHORED, SINGLE)]
    columns = [[load_image(clip, record) for record in read_records(clip)] for clip in both]
    frames = [np.concatenate(row, axis=1) for row in zip(*columns, strict=True)]
    (folder / "side_by_side.webp").write_bytes(encode_animation(frames, 8, "WEBP"))


def measure(
    folder: Path, hand: HandModel, verifier: Verifier, pictures: Sequence[np.ndarray] | None = None
) -> Measures:
    """One clip, or other pictures of its frames."""
    records = read_records(folder)
    pictures = [load_image(folder, record) for record in records] if pictures is None else pictures
    found = video_flicker(folder, hand, pictures)
    seen = np.stack([look.label_map for look in predict(verifier, pictures)])
    return found | overlaps(seen, np.stack([load_label_map(folder, record) for record in records]))


def shaded_pictures(frames: video.ApproachFrames, seed: int) -> list[np.ndarray]:
    """The toy-world clip of the same motion, in one look."""
    look = sample_look(np.random.default_rng(seed))
    pictures = []
    for frame in range(len(frames)):
        large = render_picture(frames.scene, frame, frames.hand, frames.renderer)
        pictures.append(shade_scene(frames.scene, large, look, np.random.default_rng(seed))[0])
    return pictures


def measure_variants(
    folder: Path, words: list[str], variants: dict[str, str], seed: int, verifier: Verifier
) -> dict[str, Measures]:
    """Every variant of one clip, made where it is missing, and its shaded pictures."""
    hand, found = load_hand(), {}
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        for name, flags in variants.items():
            out = folder_of(folder, name)
            video.run([*words, *flags.split(), "--out", str(out)])
            found[name] = measure(out, hand, verifier)
        args = video.parse_args(words)
        frames = video.choose_frames(args, load_model(args.checkpoint or BUILT_IN_MODEL).config)
    write_side_by_side(folder)
    found[FLOOR] = measure(out, hand, verifier, shaded_pictures(frames, seed))
    return found


def table(measured: dict[str, list[Measures]]) -> str:
    """Markdown: the means over clips."""
    columns = list(measured[FLOOR][0])
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for variant, clips in measured.items():
        means = {column: np.nanmean([clip[column] for clip in clips]) for column in columns}
        cells = [f"{mean:.3f}" if "IoU" in column else f"{mean:.1f}" for column, mean in means.items()]
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    return "\n".join(lines)


def verdict(measured: dict[str, list[Measures]]) -> str:
    """The two targets: at most half the flicker of single pictures, a hand IoU at most 0.03 below theirs."""
    lines = []
    for column in measured[FLOOR][0]:
        ours, single = (np.array([clip[column] for clip in measured[name]]) for name in (ANCHORED, SINGLE))
        if column == "hand IoU":
            error = (ours - single).std(ddof=1) / len(ours) ** 0.5 if len(ours) > 1 else np.nan
            lines.append(f"hand IoU minus that of single pictures: {(ours - single).mean():+.3f} +- {error:.3f} "
                         "(standard error over clips), target at least -0.030")  # fmt: skip
        elif "IoU" not in column:
            lines.append(f"flicker of the {column} over that of single pictures: {np.nanmean(ours / single):.2f}, "
                         f"largest {np.nanmax(ours / single):.2f}, target at most 0.50")  # fmt: skip
    return "\n".join(lines)


def main(args: argparse.Namespace) -> None:
    variants, verifier = VARIANTS | {flags: flags for flags in args.also}, load_verifier(args.verifier)
    measured: dict[str, list[Measures]] = {name: [] for name in (*variants, FLOOR)}
    for name in args.objects:
        for seed in args.seeds:
            words = ["--object", name, "--seed", str(seed), "--frames", str(args.frames)]
            words += ["--checkpoint", args.checkpoint] if args.checkpoint else []
            found = measure_variants(args.out / f"{name}_{seed}", words, variants, seed, verifier)
            for variant, measures in found.items():
                measured[variant].append(measures)
                numbers = ", ".join(f"{column} {value:.3g}" for column, value in measures.items())
                print(f"{name} seed {seed}, {variant}: {numbers}", flush=True)
    print(f"\n{date.today()}, {len(measured[FLOOR])} clips of {args.frames} frames\n")
    print(table(measured), "", verdict(measured), sep="\n")


if __name__ == "__main__":
    main(parse_args())
