"""Say what weight files are, whether they are complete, and which flag takes them.

    python -m hoi.weights sd-v1-4.ckpt model_ad_5000.pth runs/hoi/model.safetensors
    python -m hoi.weights stable-diffusion-v1-5/              # a folder of diffusers
    python -m hoi.weights MANO_RIGHT.pkl grabnet/             # a hand model; coarsenet.pt, refinenet.pt and bps.npz

It prints a sentence a file: its kind, the number of its tensors, the sizes that it fits, and how to use it.  The names
and shapes of all tensors are compared, and no code of a file is run.  Other families (Stable Diffusion 2.x or XL, LoRA,
inpainting, ...), incomplete and damaged files are refused by what is wrong with them; then the exit status
is 1.  Where to get weights: docs/weights.md.
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import sys


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m hoi.weights", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="a weight file, or a folder of diffusers or GrabNet")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    parse_args()  # --help and mistakes are told before the seconds that these imports take

from hoi.weights.describe import describe_weights


def main(arguments: list[str] | None = None) -> int:
    """Print a sentence for every file; 1 when one of them was refused, else 0."""
    failed = 0
    for path in parse_args(arguments).files:
        try:
            print(f"{path}: {describe_weights(path)}")
        except (ValueError, OSError) as problem:
            failed = 1
            print(problem, file=sys.stderr)
    return failed


if __name__ == "__main__":
    sys.exit(main())
