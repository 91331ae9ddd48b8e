"""Time and memory of sample.py with random weights, and where one evaluation of the U-Net spends its time.

    python tests/bench_sampling.py                    # Stable Diffusion's sizes, 512 px: five minutes on two cores
    python tests/bench_sampling.py --steps 6 --batch-sizes 1
    python tests/bench_sampling.py --preset tiny      # the built-in sizes

Writes a Stable Diffusion file and condition encoders in fp16 (2.3 GB, deleted again), then runs

    python sample.py --base sd.safetensors --adapter model_ad_1.pth --object mug --count 2 --batch-size B --steps S

in a process of its own for each batch size and prints a Markdown table: seconds from start to end, median seconds of a
step (one guided evaluation of the batch), seconds of decoding one batch, and peak resident memory (Linux).  The second
table is one guided evaluation for one picture: with PyTorch's own layers and attention, and as sample.py runs it.
"""

import argparse
import json
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from bench_unet import peak_gigabytes, random_weights  # noqa: E402

from hoi.common.machine import fast_dtype, keep_freed_memory  # noqa: E402
from hoi.network import unet as unet_module  # noqa: E402
from hoi.network.config import PRESETS, ModelConfig  # noqa: E402
from hoi.network.kernels import PackedConv2d, PackedLinear, pack  # noqa: E402
from hoi.network.model import HOIDiffusion  # noqa: E402
from hoi.network.unet import UNet  # noqa: E402
from hoi.network.vae import VAE  # noqa: E402
from hoi.weights.export import export_single  # noqa: E402
from hoi.weights.names import official_adapter_names  # noqa: E402

BASE, ADAPTER = "sd.safetensors", "model_ad_1.pth"
WHOLE = "everything"
LABELS = {nn.Linear: "linear layers", nn.Conv2d: "convolutions"}
LABELS |= {PackedLinear: LABELS[nn.Linear], PackedConv2d: LABELS[nn.Conv2d]}


@torch.no_grad()
def write_files(config: ModelConfig, folder: Path) -> None:
    """A Stable Diffusion file and the official adapter file, random, in half precision."""
    with torch.device("meta"):
        model = HOIDiffusion(config).half()
    model = random_weights(model.to_empty(device="cpu"))
    export_single(model, folder / BASE, half=True)
    state = model.state_dict()
    torch.save({theirs: state[ours] for ours, (theirs,) in official_adapter_names(state).items()}, folder / ADAPTER)


# --- sample.py as it is ---


def clocked(function: Callable, seconds: list[float]) -> Callable:
    def call(*inputs: Any, **named: Any) -> Any:
        begin = time.perf_counter()
        result = function(*inputs, **named)
        seconds.append(time.perf_counter() - begin)
        return result

    return call


def sample(words: list[str]) -> dict[str, float]:
    """Run sample.py in this process, with a clock at the U-Net and at the decoder."""
    steps, decodings = [], []
    UNet.forward, VAE.decode = clocked(UNet.forward, steps), clocked(VAE.decode, decodings)
    sys.argv = ["sample.py", *words]
    runpy.run_path(str(ROOT / "sample.py"), run_name="__main__")
    times = {"step": statistics.median(steps), "decode": statistics.median(decodings)}
    return times | {"gigabytes": peak_gigabytes()}


# --- where the time goes ---


def named(function: Callable, name: Callable[..., str]) -> Callable:
    """The function, with every call under a name of its own in the profile."""

    def call(*inputs: Any) -> Any:
        with record_function(name(*inputs)):
            return function(*inputs)

    return call


def attention_name(query: Tensor, key: Tensor, value: Tensor) -> str:
    tokens = query.shape[2]
    return f"attention over {tokens} tokens" if key.shape[2] == tokens else "attention to the text"


def profiled(unet: UNet, attend: Callable, *inputs: Any) -> dict[str, float]:
    """Seconds by kind of layer; layers inside one another are none of these kinds."""
    unet_module.attend = named(attend, attention_name)  # where the U-Net's layers look it up
    for module in unet.modules():
        if (label := LABELS.get(type(module))) is not None:
            module.forward = named(module.forward, lambda *_, label=label: label)
    unet(*inputs)  # warms up
    with profile(activities=[ProfilerActivity.CPU]) as trace, record_function(WHOLE):
        unet(*inputs)
    kinds = {WHOLE, *LABELS.values()}
    found = {event.key: event.cpu_time_total / 1e6 for event in trace.key_averages()
             if event.key in kinds or event.key.startswith("attention ")}  # fmt: skip
    rest = found[WHOLE] - sum(seconds for kind, seconds in found.items() if kind != WHOLE)
    return found | {"norms, activations, sums": rest}


@torch.no_grad()
def profile_unet(config: ModelConfig) -> dict[str, dict[str, float]]:
    """One guided evaluation for one picture: PyTorch's layers, then ours."""
    keep_freed_memory()
    dtype, side = fast_dtype("cpu"), config.image_size // config.vae.factor
    with torch.device("meta"):
        unet = UNet(config.unet).to(dtype)
    unet = random_weights(unet.to_empty(device="cpu")).to(memory_format=torch.channels_last)
    latents, timesteps = torch.randn(1, 4, side, side), torch.tensor([500])
    context = torch.randn(2, 77, config.unet.context_dim, dtype=dtype)
    widths = config.unet.level_widths
    features = [torch.randn(1, width, side >> k, side >> k, dtype=dtype) for k, width in enumerate(widths)]
    both = latents.repeat(2, 1, 1, 1), timesteps.repeat(2), context, features
    ours = unet_module.attend
    plain = profiled(unet, F.scaled_dot_product_attention, *both)
    for module in unet.modules():
        module.__dict__.pop("forward", None)  # the names
    return {
        "plain": plain,
        "ours": profiled(pack(unet), ours, latents, timesteps, unet.cache_context(context), features),
    }


# --- the tables ---


def in_own_process(*words: str | Path) -> Any:
    """This script with an internal flag; its last line is the result."""
    command = [sys.executable, __file__, *map(str, words)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def print_sampling(args: argparse.Namespace, folder: Path) -> None:
    print(
        f"| {args.count} pictures, {args.steps} steps | seconds in all | a step | decoding | peak memory |\n"
        "|---|---|---|---|---|"
    )
    fixed = ["--base", folder / BASE, "--adapter", folder / ADAPTER, "--object", "mug", "--cache", folder / "grasps"]
    for size in args.batch_sizes:
        words = [*fixed, "--count", args.count, "--batch-size", size, "--steps", args.steps]
        words += ["--out", folder / f"out{size}"]
        begin = time.perf_counter()
        found = in_own_process("--sample", *words)
        seconds = time.perf_counter() - begin
        cells = [f"{seconds:.1f}", f"{found['step']:.3f} s", f"{found['decode']:.2f} s", f"{found['gigabytes']:.2f} GB"]
        print(f"| batch size {size} | {' | '.join(cells)} |", flush=True)


def print_profile(preset: str) -> None:
    found = in_own_process("--profile", "--preset", preset)
    print("\n| one guided evaluation | PyTorch's layers | as sampled |\n|---|---|---|")
    for kind in sorted(found["plain"], key=found["plain"].get, reverse=True):
        cells = [f"{1000 * times[kind]:.0f} ms ({times[kind] / times[WHOLE]:.0%})" for times in found.values()]
        print(f"| {kind} | {' | '.join(cells)} |")


def main(args: argparse.Namespace) -> None:
    config = PRESETS[args.preset]()
    if args.write:
        write_files(config, args.write)
        print("null")
    elif args.profile:
        print(json.dumps(profile_unet(config)))
    else:
        print(f"{args.preset}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            in_own_process("--write", folder, "--preset", args.preset)  # so that this process stays small
            print_sampling(args, Path(folder))
        print_profile(args.preset)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--sample"]:  # internal: everything behind it is sample.py's
        print(json.dumps(sample(sys.argv[2:])))
        sys.exit()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="sd1", help="sizes of the networks (default: %(default)s)")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 2], metavar="B")
    parser.add_argument("--count", type=int, default=2, metavar="N", help="pictures a run (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, metavar="S", help="of the sampler (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="where to write (default: the system's temporary folder)")
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--profile", action="store_true", help=argparse.SUPPRESS)
    main(parser.parse_args())
