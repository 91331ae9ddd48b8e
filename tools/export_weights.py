"""Write trained weights in a format that other tools open, or as the built-in model of this repository.

    python tools/export_weights.py runs/hoi/model.safetensors --format diffusers --out exported      # a new folder
    python tools/export_weights.py runs/hoi/model.safetensors --format official --out exported       # two files
    python tools/export_weights.py runs/hoi/model.safetensors --format single --half --out sd.safetensors
    python tools/export_weights.py sd-v1-4.ckpt --adapter model_ad_5000.pth --format own --out hoi.safetensors
    python tools/export_weights.py runs/toy/hoi/model.safetensors --format built-in --out hoi/assets/tiny.safetensors

Reads whatever train.py --base reads; prints what it wrote.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hoi.common.files import sha256_of  # noqa: E402
from hoi.network.config import PRESETS  # noqa: E402
from hoi.weights.export import WEIGHT_FORMATS, export_built_in  # noqa: E402
from hoi.weights.load import load_model, source_hash  # noqa: E402

BUILT_IN = "built-in"


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """The flags, one format among them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", help="weights: a model of ours, a Stable Diffusion 1.x file or folder")
    add("--adapter", metavar="FILE", help="condition encoders to add (model_ad_N.pth)")
    add("--format", choices=(*WEIGHT_FORMATS, BUILT_IN), required=True,
        help="own: a file of this project; official: model_ad_N.pth and model_sd_N.ckpt; single: a Stable Diffusion "
        "file without condition encoders; diffusers: a folder; built-in: a tiny model as the repository carries it")
    add("--out", required=True, metavar="PATH", help="a file (own, single, built-in) or folder (official, diffusers)")
    add("--half", action=argparse.BooleanOptionalAction, default=False, help="float16, half the size; built-in always")
    add("--preset", choices=PRESETS, help="sizes of a file that does not say them (default sd1)")
    return parser.parse_args(arguments)


def main(args: argparse.Namespace) -> None:
    """Load any weights, write them in the format asked for, and say what the format cannot hold."""
    if args.format == BUILT_IN:
        for path in export_built_in(load_model(args.model, args.adapter, preset="tiny"), args.out):
            print(f"wrote {path}: {path.stat().st_size / 1e6:.1f} MB, SHA-256 {sha256_of(path)}")
        return
    model = load_model(args.model, args.adapter, PRESETS[args.preset]() if args.preset else None)
    model.metadata = {"source": Path(args.model).name, "source_sha256": source_hash(args.model)} | model.metadata
    if args.format in ("official", "single") and model.config.predicts != "eps":
        print("note: this model predicts v; tools that read this format assume eps unless told otherwise")
    for path in WEIGHT_FORMATS[args.format](model, args.out, args.half):
        print(f"wrote {path}")
    if args.format == "official":
        print("note: ComfyUI and web UIs do not recognise model_ad_N.pth; --format diffusers writes adapter_* folders "
              "whose files they take as T2I-Adapters")  # fmt: skip
    if args.format == "single" and model.unet.control is not None:
        print("without the ControlNet, which this format has no place for: the base model that it was trained beside")
    elif args.format == "single" and model.condition_encoders is not None:
        print("without the condition encoders, which this format has no place for "
              "(--format diffusers writes them as T2I-Adapters)")  # fmt: skip


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ValueError, OSError) as problem:
        sys.exit(f"export_weights.py: {problem}")
