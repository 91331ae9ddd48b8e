"""Speed and memory of the full-size networks beside diffusers and transformers: same weights, dtype and memory format.

    python tests/bench_unet.py                                # every part, about five minutes on two cores
    python tests/bench_unet.py --parts unet-bf16 text         # some of them; no part takes more than 90 s

Prints a line a part: seconds of ours and theirs (minimum over the repeats; the two take turns in one process, so a
change of the machine's load meets both), how many times faster ours is, peak memory of one evaluation (resident, each
in a process of its own, Python and its libraries included: about 0.5 GB), and the largest difference between the two
results in standard deviations of theirs.  The last column is how many times faster than theirs a program would be that
did their multiplications (counted by torch) at the rate of a square matrix product, measured between the repeats: more
needs fewer multiplications.  Below the table stands what hoi/network/kernels.py chose here.  Weights are random.
Nothing is asserted: speed is shown, not tested.

The U-Net's part is one guided evaluation at 512 px as sampling does it: condition features and text keys and values are
there already, and both halves share their latents.
"""

import argparse
import copy
import functools
import gc
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

TESTS = Path(__file__).parent
sys.path[:0] = [str(TESTS.parent), str(TESTS), str(TESTS / "network")]  # twins in diffusers come from the tests

from hoi.common.machine import keep_freed_memory  # noqa: E402
from hoi.network import kernels  # noqa: E402
from hoi.network.config import tiny_config  # noqa: E402
from hoi.network.kernels import PackedConv2d, PackedLinear, WinogradConv2d, is_faster, pack  # noqa: E402
from hoi.network.model import CONDITION_NAMES, ConditionEncoders  # noqa: E402
from hoi.network.text import TextConfig, TextEncoder  # noqa: E402
from hoi.network.unet import UNet, UNetConfig  # noqa: E402
from hoi.network.vae import VAE, Norm, VAEConfig  # noqa: E402

BF16, FP32 = torch.bfloat16, torch.float32
LAYERS = (nn.Linear, nn.Conv2d, PackedLinear, PackedConv2d)
PEAK_SIDE = 2048  # of the product that shows the machine's peak
Pair = tuple[dict[str, nn.Module], dict[str, Callable[[nn.Module], Tensor]]]  # under "ours" and "theirs": module, call


def random_weights(module: nn.Module) -> nn.Module:
    """Cheap noise of a fitting size everywhere: one draw, cut to length, serves all tensors."""
    noise = torch.randn(2**20 + 7)
    for name, parameter in module.named_parameters():
        values = noise.repeat(parameter.numel() // len(noise) + 1)[: parameter.numel()].view_as(parameter)
        gain = float(parameter.ndim == 1 and name.endswith("weight"))
        parameter.copy_(values * (0.1 if parameter.ndim == 1 else parameter[0].numel() ** -0.5) + gain)
    return module.eval()


def prepared(ours: nn.Module, theirs: nn.Module, dtype: torch.dtype) -> dict[str, nn.Module]:
    modules = {"ours": ours, "theirs": theirs}
    for module in modules.values():
        module.to(dtype=dtype, memory_format=torch.channels_last).eval().requires_grad_(False)
    pack(ours)
    return modules


def unet_pair(dtype: torch.dtype) -> Pair:
    from test_unet import diffusers_twin

    config, side = UNetConfig(), 64
    ours = random_weights(UNet(config))
    modules = prepared(ours, diffusers_twin(ours), dtype)
    latents, timesteps = torch.randn(1, 4, side, side, dtype=dtype), torch.tensor([500])
    context = torch.randn(2, 77, config.context_dim, dtype=dtype)
    features = [torch.randn(1, w, side >> k, side >> k, dtype=dtype) for k, w in enumerate(config.level_widths)]
    cached = ours.cache_context(context)
    both = [feature.repeat(2, 1, 1, 1).to(memory_format=torch.channels_last) for feature in features]
    latents_twice = latents.repeat(2, 1, 1, 1).to(memory_format=torch.channels_last)

    def call_theirs(unet: nn.Module) -> Tensor:
        residuals = [feature.clone() for feature in both]  # diffusers empties the list
        return unet(latents_twice, timesteps.repeat(2), context, down_intrablock_additional_residuals=residuals).sample

    return modules, {"ours": lambda unet: unet(latents, timesteps, cached, features), "theirs": call_theirs}


def tiny_pair(dtype: torch.dtype) -> Pair:
    """The built-in model's U-Net, as sampled, beside itself without packed weights and shared latents."""
    config = tiny_config().unet
    ours = random_weights(UNet(config))
    modules = prepared(ours, copy.deepcopy(ours), dtype)
    latents, timesteps = torch.randn(4, 4, 32, 32), torch.randint(0, 1000, (4,))
    context = torch.randn(8, 77, config.context_dim, dtype=dtype)
    cached = {side: unet.cache_context(context) for side, unet in modules.items()}
    features = [torch.randn(4, w, 32 >> k, 32 >> k, dtype=dtype) for k, w in enumerate(config.level_widths)]
    calls = {
        "ours": lambda unet: unet(latents, timesteps, cached["ours"], features),
        "theirs": lambda unet: unet(latents.repeat(2, 1, 1, 1), timesteps.repeat(2), cached["theirs"], features),
    }
    return modules, calls


def conditions_pair(dtype: torch.dtype) -> Pair:
    from test_model import diffusers_adapter

    widths = UNetConfig().level_widths
    ours = random_weights(ConditionEncoders(widths, unshuffle=8))
    theirs = nn.ModuleList([diffusers_adapter(encoder, widths) for encoder in ours.values()])
    images = {name: torch.rand(1, 3, 512, 512) for name in CONDITION_NAMES}

    def call_theirs(adapters: nn.ModuleList) -> Tensor:
        maps = [adapter(image.to(dtype)) for adapter, image in zip(adapters, images.values(), strict=True)]
        return [sum(level) for level in zip(*maps, strict=True)][-1]

    return prepared(ours, theirs, dtype), {"ours": lambda encoders: encoders(images)[-1], "theirs": call_theirs}


def decode_pair(dtype: torch.dtype) -> Pair:
    from test_vae import diffusers_twin

    ours = random_weights(VAE(VAEConfig()))
    latents = torch.randn(1, 4, 64, 64, dtype=dtype)
    calls = {
        "ours": lambda vae: vae.decode(latents),
        "theirs": lambda vae: vae.decode(latents / ours.config.scaling_factor).sample,
    }
    return prepared(ours, diffusers_twin(ours), dtype), calls


def norms_pair(network: str) -> Pair:
    """A network with the exact norms of our encoder beside itself with PyTorch's."""
    ours = random_weights(UNet(UNetConfig()) if network == "unet" else VAE(VAEConfig()))
    modules = prepared(ours, copy.deepcopy(ours), FP32)
    for side, whole in modules.items():
        for module in whole.modules():
            if isinstance(module, nn.GroupNorm):
                module.__class__, module.exact = Norm, side == "ours"
    pack(modules["theirs"])
    latents, image = torch.randn(1, 4, 64, 64), torch.rand(1, 3, 512, 512) * 2 - 1
    context = torch.randn(1, 77, 768)
    calls = {
        "encode": lambda vae: vae.encode(image).mean,
        "decode": lambda vae: vae.decode(latents),
        "unet": lambda unet: unet(latents, torch.tensor([500]), context),
    }
    return modules, dict.fromkeys(("ours", "theirs"), calls[network])


def text_pair(dtype: torch.dtype) -> Pair:
    from fake_networks import text_weights
    from test_text import clip_twin

    config = TextConfig()
    theirs, ours = random_weights(clip_twin(config)), TextEncoder(config)
    ours.load_state_dict(text_weights(theirs, config))
    ids = torch.randint(0, 49000, (2, 77))
    calls = {"ours": lambda encoder: encoder(ids), "theirs": lambda encoder: encoder(ids).last_hidden_state}
    return prepared(ours, theirs, dtype), calls


PARTS: dict[str, tuple[str, Callable[[], Pair]]] = {
    "unet-bf16": ("U-Net, guided, 512 px, bf16", functools.partial(unet_pair, BF16)),
    "unet-fp32": ("U-Net, guided, 512 px, fp32", functools.partial(unet_pair, FP32)),
    "conditions-bf16": ("three condition encoders, bf16", functools.partial(conditions_pair, BF16)),
    "conditions-fp32": ("three condition encoders, fp32", functools.partial(conditions_pair, FP32)),
    "decode-bf16": ("VAE decode, bf16", functools.partial(decode_pair, BF16)),
    "decode-fp32": ("VAE decode, fp32", functools.partial(decode_pair, FP32)),
    "norms-encode": ("VAE encode, fp32, exact norms beside PyTorch's", functools.partial(norms_pair, "encode")),
    "norms-decode": ("VAE decode, fp32, exact norms beside PyTorch's", functools.partial(norms_pair, "decode")),
    "norms-unet": ("U-Net, fp32, exact norms beside PyTorch's", functools.partial(norms_pair, "unet")),
    "text-bf16": ("text encoder, 2 prompts, bf16", functools.partial(text_pair, BF16)),
    "text-fp32": ("text encoder, 2 prompts, fp32", functools.partial(text_pair, FP32)),
    "tiny-bf16": ("tiny U-Net, 4 guided, bf16, beside unpacked", functools.partial(tiny_pair, BF16)),
    "tiny-fp32": ("tiny U-Net, 4 guided, fp32, beside unpacked", functools.partial(tiny_pair, FP32)),
}


def peak_gigabytes() -> float:
    """The most resident memory since the last reset, in 10^9 bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e9


def chosen_kernels(module: nn.Module, measured: dict[str, bool]) -> str:
    """How many layers are computed by what, and what was measured: whether slices or Winograd's products are faster."""
    winograd = sum(isinstance(layer, WinogradConv2d) for layer in module.modules())
    counts = Counter(type(layer).__name__ for layer in module.modules() if isinstance(layer, LAYERS))
    counts["PackedConv2d"] -= winograd
    layers = [f"{count} {name}" for name, count in {**counts, "WinogradConv2d": winograd}.items() if count]
    return "; ".join([*layers, *(f"{what}: {'yes' if found else 'no'}" for what, found in measured.items())])


@torch.no_grad()
def measure(part: str, side: str, repeats: int) -> dict[str, Any]:
    """side "both": seconds and difference; "ours" or "theirs": peak memory of one evaluation."""
    nn.Linear.reset_parameters = nn.Conv2d.reset_parameters = lambda self: None  # drawing them would take a minute
    modules, calls = PARTS[part][1]()
    if side != "both":
        del modules["theirs" if side == "ours" else "ours"]
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak of building the two
        calls[side](modules[side])
        return {f"{side}_gigabytes": peak_gigabytes()}
    keep_freed_memory()
    measured: dict[str, bool] = {}

    def noted(what: str, *how: Any) -> bool:
        measured[what] = is_faster(what, *how)
        return measured[what]

    kernels.is_faster = noted
    results = {"ours": calls["ours"](modules["ours"])}  # warms up, too
    kernels.is_faster = is_faster
    with FlopCounterMode(display=False) as counted:
        results["theirs"] = calls["theirs"](modules["theirs"])
    square = torch.randn(PEAK_SIDE, PEAK_SIDE).to(results["theirs"].dtype)
    modules, calls = modules | {"product": square}, calls | {"product": lambda square: square @ square}
    difference = (results["ours"] - results["theirs"]).abs().max() / results["theirs"].std()
    seconds = {name: [] for name in calls}
    rounds = 0
    while rounds < repeats or (sum(seconds["ours"]) < 1 and rounds < 50):
        rounds += 1
        for name, call in calls.items():
            begin = time.perf_counter()
            call(modules[name])
            seconds[name].append(time.perf_counter() - begin)
    found = {name: min(values) for name, values in seconds.items()}
    at_peak = counted.get_total_flops() * found["product"] / (2 * PEAK_SIDE**3)  # seconds
    found |= {"difference": difference.item(), "at_peak": found["theirs"] / at_peak}
    return found | {"kernels": chosen_kernels(modules["ours"], measured)}


def main(args: argparse.Namespace) -> None:
    if args.side:
        print(json.dumps(measure(args.parts[0], args.side, args.repeats)))
        return
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    print(
        "| part | ours s | theirs s | times faster | ours GB | theirs GB | difference | times faster at the peak |\n"
        "|---|---|---|---|---|---|---|---|"
    )
    choices = []
    for part in args.parts:
        found: dict[str, Any] = {}
        for side in ("both", "ours", "theirs")[: 3 if args.memory else 1]:
            command = [sys.executable, __file__, "--parts", part, "--side", side, "--repeats", str(args.repeats)]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            found |= json.loads(output.splitlines()[-1])
        memory = [f"{found[name]:.2f}" if name in found else "" for name in ("ours_gigabytes", "theirs_gigabytes")]
        cells = [PARTS[part][0], f"{found['ours']:.3f}", f"{found['theirs']:.3f}",
                 f"{found['theirs'] / found['ours']:.2f}", *memory, f"{found['difference']:.1e}",
                 f"{found['at_peak']:.2f}"]  # fmt: skip
        print(f"| {' | '.join(cells)} |", flush=True)
        choices.append(f"{PARTS[part][0]}: {found['kernels']}")
    print("", *choices, sep="\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure (default all)")
    parser.add_argument("--repeats", type=int, default=3, help="timed evaluations of each at least (default 3)")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="measure memory, too")
    parser.add_argument("--side", choices=("both", "ours", "theirs"), help="internal: one measurement in this process")
    main(parser.parse_args())
