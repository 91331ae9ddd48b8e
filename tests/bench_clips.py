"""How steady clips are: the anchor on and off, beside the shaded toy world.  Prints the README's table.

    python tests/bench_clips.py                       # 4 objects x 3 seeds, built-in model: about 25 minutes on 2 cores
    python tests/bench_clips.py --objects mug --seeds 0 --frames 4

Flicker in 8-bit levels, hoi/flicker.py; clips are kept in --out, and the same command continues.
"""

import argparse
import contextlib
import os
import sys
from datetime import date
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
import video
from hoi.appearance import sample_look
from hoi.flicker import Flicker, clip_flicker
from hoi.hand import load_hand
from hoi.objects import CATEGORIES
from hoi.scene import render_scene, shade_scene
from sample import load_model

VARIANTS = {
    "anchor on, same noise": [],
    "anchor on, separate noise": ["--separate-noise"],
    "anchor off, same noise": ["--no-anchor"],
    "anchor off, separate noise": ["--no-anchor", "--separate-noise"],
}
FLOOR = "shaded toy world"


def shaded_pictures(frames, seed: int) -> list[np.ndarray]:
    """The toy-world clip of the same motion, in one look."""
    look = sample_look(np.random.default_rng(seed))
    pictures = []
    for frame in range(len(frames)):
        large = render_scene(frames.scene, frame, frames.hand, frames.renderer, factor=2)
        pictures.append(shade_scene(frames.scene, large, look, np.random.default_rng(seed))[0])
    return pictures


def measure_clip(folder: Path, words: list[str], seed: int) -> dict[str, Flicker]:
    """Every variant of one clip, and the floor that lighting alone causes."""
    hand, found = load_hand(), {}
    for name, flags in VARIANTS.items():
        out = folder / name.replace(", ", "_").replace(" ", "_")
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            video.run([*words, *flags, "--out", str(out)])
        found[name] = clip_flicker(out, hand)
    args = video.parse_args(words)
    frames = video.choose_frames(args, load_model(args, "cpu")[0])
    found[FLOOR] = clip_flicker(out, hand, shaded_pictures(frames, seed))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objects", nargs="+", default=list(CATEGORIES)[:4])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--checkpoint", metavar="FILE", help="default: the built-in weights")
    parser.add_argument("--out", type=Path, default=Path("out/clips"), metavar="DIR")
    options = parser.parse_args()
    measured: dict[str, list[Flicker]] = {name: [] for name in (*VARIANTS, FLOOR)}
    for name in options.objects:
        for seed in options.seeds:
            words = ["--object", name, "--seed", str(seed), "--frames", str(options.frames)]
            words += ["--checkpoint", options.checkpoint] if options.checkpoint else []
            for variant, flicker in measure_clip(options.out / f"{name}_{seed}", words, seed).items():
                measured[variant].append(flicker)
                print(f"{name} seed {seed}, {variant}: {flicker}", flush=True)
    clips = len(options.objects) * len(options.seeds)
    print(f"\n{date.today()}, {clips} clips of {options.frames} frames\n")
    print("| | hand | object | background |\n|---|---|---|---|")
    for variant, values in measured.items():
        means = [np.nanmean([getattr(value, part) for value in values]) for part in ("hand", "object", "background")]
        print(f"| {variant} | " + " | ".join(f"{mean:.1f}" for mean in means) + " |")


if __name__ == "__main__":
    main()
