"""Speed of the full-size U-Net (random weights) beside diffusers' in the same process, as a ratio.

    python tests/bench_unet.py                     # one guided evaluation at 512 px, bf16 where the hardware has it
    python tests/bench_unet.py --repeats 5 --dtype float32

Prints seconds (minimum over the repeats; the two take turns, so a change of the machine's load meets both) and ours
divided by theirs.  Nothing is asserted: speed is shown, not tested.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from hoi.hardware import has_fast_bf16, keep_freed_memory  # noqa: E402
from hoi.unet import UNet, UNetConfig  # noqa: E402


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="timed evaluations of each (default 3)")
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float32"), default="auto")
    parser.add_argument("--side", type=int, default=64, help="latent pixels (default 64: pictures of 512 px)")
    return parser.parse_args()


@torch.no_grad()
def main(args: argparse.Namespace) -> None:
    from diffusers import UNet2DConditionModel

    keep_freed_memory()
    dtype = torch.bfloat16 if args.dtype == "auto" and has_fast_bf16("cpu") else torch.float32
    dtype = dtype if args.dtype == "auto" else getattr(torch, args.dtype)
    ours = UNet(UNetConfig()).eval().to(dtype=dtype, memory_format=torch.channels_last)
    theirs = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8).eval()
    theirs = theirs.to(dtype=dtype, memory_format=torch.channels_last)
    latents = torch.randn(2, 4, args.side, args.side, dtype=dtype).to(memory_format=torch.channels_last)
    context = torch.randn(2, 77, 768, dtype=dtype)
    widths = (320, 640, 1280, 1280)
    features = [torch.randn(2, w, args.side >> k, args.side >> k, dtype=dtype) for k, w in enumerate(widths)]
    timesteps, cached = torch.tensor([500, 500]), ours.cache_context(context)
    runs = {
        "ours": lambda: ours(latents, timesteps, cached, features),
        "diffusers": lambda: theirs(
            latents, timesteps, context, down_intrablock_additional_residuals=[f.clone() for f in features]
        ),
    }
    seconds = {name: [] for name in runs}
    for repeat in range(args.repeats + 1):
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            if repeat:  # the first call of each warms up
                seconds[name].append(time.perf_counter() - begin)
    best = {name: min(values) for name, values in seconds.items()}
    print(f"guided evaluation, batch 2, {8 * args.side} px, {dtype}, {torch.get_num_threads()} threads")
    ratio = best["ours"] / best["diffusers"]
    print(f"ours {best['ours']:.2f} s, diffusers {best['diffusers']:.2f} s, ratio {ratio:.2f}")


if __name__ == "__main__":
    main(parse_args())
