"""Write trained weights in a format that other tools open.

    python tools/export_weights.py runs/hoi/model.safetensors --format diffusers --out exported      # a new folder
    python tools/export_weights.py runs/hoi/model.safetensors --format official --out exported       # two files
    python tools/export_weights.py runs/hoi/model.safetensors --format single --half --out sd.safetensors
    python tools/export_weights.py sd-v1-4.ckpt --adapter model_ad_5000.pth --format own --out hoi.safetensors

Reads whatever train.py --base reads; prints what it wrote.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hoi.network.config import PRESETS  # noqa: E402
from hoi.weights.export import FORMATS, export_diffusers, export_official, export_own, export_single  # noqa: E402
from hoi.weights.load import load_model, source_hash  # noqa: E402


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="weights: a model of ours, a Stable Diffusion 1.x file or folder")
    parser.add_argument("--adapter", metavar="FILE", help="condition encoders to add (model_ad_N.pth)")
    parser.add_argument("--format", choices=FORMATS, required=True)
    parser.add_argument("--out", required=True, metavar="PATH", help="a file (own, single) or folder")
    parser.add_argument("--half", action=argparse.BooleanOptionalAction, default=False, help="float16, half the size")
    parser.add_argument("--preset", choices=PRESETS, help="sizes of a file that does not say them (default sd1)")
    return parser.parse_args(arguments)


def main(args: argparse.Namespace) -> None:
    config = PRESETS[args.preset]() if args.preset else None
    model = load_model(args.model, args.adapter, config)
    model.metadata = {"source": Path(args.model).name, "source_sha256": source_hash(args.model)} | model.metadata
    if args.format != "own" and args.format != "diffusers" and model.config.predicts != "eps":
        print("note: this model predicts v; tools that read this format assume eps unless told otherwise")
    if args.format == "official":
        for path in export_official(model, args.out, args.half):
            print(f"wrote {path}")
        return
    write = {"own": export_own, "single": export_single, "diffusers": export_diffusers}[args.format]
    write(model, args.out, args.half)
    print(f"wrote {args.out}")
    if args.format == "single" and model.condition_encoders is not None:
        print("without the condition encoders, which this format has no place for (see --format official)")


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ValueError, OSError) as problem:
        sys.exit(f"export_weights.py: {problem}")
