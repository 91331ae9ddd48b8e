"""Memory of a full-size clip over the chunk size: video.py with random sd1 weights, bf16 where the hardware has it.

    python tests/bench_clip_memory.py                       # 16 frames at 512 px, chunks of 1, 2 and 4 frames, 1 step
    python tests/bench_clip_memory.py --preset tiny --frames 4
    python tests/bench_clip_memory.py --folder /scratch     # 2.3 GB of weights are written there, and deleted

Every chunk size runs in a process of its own, whose peak resident memory the system counts: Python, libraries and
renderer included.  The number of steps and frames changes the time, not the memory.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

from bench_sampling import ADAPTER, BASE, write_files  # noqa: E402
from bench_unet import peak_gigabytes  # noqa: E402

import video  # noqa: E402
from hoi.network.config import PRESETS  # noqa: E402


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", nargs="+", type=int, default=[1, 2, 4], metavar="F")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--preset", choices=PRESETS, default="sd1")
    parser.add_argument("--folder", type=Path, help="where to write (default: the system's temporary folder)")
    parser.add_argument("--clip", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)  # one measurement: video.py's words
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    if args.clip:
        video.run(args.clip)
        print(f"{peak_gigabytes():.2f}")
        return
    print(f"{date.today()}, {args.preset}, {args.frames} frames, {torch.get_num_threads()} threads\n")
    print("| frames at once | peak memory, GB | seconds |\n|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        folder = Path(folder)
        write_files(PRESETS[args.preset](), folder)
        for chunk in args.chunks:
            words = ["--base", folder / BASE, "--adapter", folder / ADAPTER, "--out", folder / f"clip_{chunk}"]
            words += ["--frames", args.frames, "--steps", args.steps, "--chunk", chunk]
            begin = time.perf_counter()
            command = [sys.executable, __file__, "--clip", *map(str, words)]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            print(f"| {chunk} + anchor | {output.splitlines()[-1]} | {time.perf_counter() - begin:.0f} |", flush=True)


if __name__ == "__main__":
    main(parse_args())
