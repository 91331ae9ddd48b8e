"""Speed and memory of the paper's training step beside the same step written plainly with diffusers.

    python tests/bench_train.py                  # full size: 512 px, batch 1; some minutes, up to 20 GB
    python tests/bench_train.py --size small     # to see that it works

Prints seconds a step (minimum over the repeats) and peak memory (resident, Python included) of three ways, each in a
process of its own, one after the other, and how many times slower and larger the other two are than ours:

    ours     eps_loss on our U-Net and condition encoders, frozen and trained parts as freeze_for_fine_tuning has them
    frozen   diffusers' UNet2DConditionModel and three T2IAdapters, the same parts frozen
    plain    the same, but as the official code does: gradients of the whole U-Net, of which the decoder's are used

All compute in bf16 autocast where the processor is fast in it, else in fp32, as train.py does.  To see how another kind
of processor does: ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 python tests/bench_train.py

Every way has fp32 weights in channels-last, cached latents and text (no autoencoder, no text encoder), one hand-object
picture without a regularisation term, and fused AdamW on the 743 M trained parameters.  Weights are random.  Before
that, a small model shows that the three compute the same loss and gradients.  Nothing else is asserted.  Of the memory
13.3 GB are the same for all: fp32 weights (4.4), gradients (3.0) and AdamW's state (5.9) of what trains.
"""

import argparse
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TESTS = Path(__file__).parent
sys.path[:0] = [str(TESTS.parent), str(TESTS), str(TESTS / "network")]  # twins in diffusers come from the tests

from bench_unet import peak_gigabytes, random_weights  # noqa: E402

from hoi.common.machine import fast_dtype, keep_freed_memory  # noqa: E402
from hoi.network.diffusion import NoiseSchedule, TrainingBatch, eps_loss  # noqa: E402
from hoi.network.model import CONDITION_NAMES, ConditionEncoders  # noqa: E402
from hoi.network.unet import UNet, UNetConfig  # noqa: E402

SIZES = {
    "full": (UNetConfig(), 64),
    "small": (UNetConfig(model_channels=32, channel_mult=(1, 2, 2, 3), num_heads=4, context_dim=24), 16),
}
WAYS = ("ours", "frozen", "plain")
Step = tuple[list[nn.Parameter], Callable[[], Tensor]]  # what trains; the loss of the step


def networks(size: str) -> tuple[UNet, ConditionEncoders]:
    config, _ = SIZES[size]
    torch.manual_seed(0)
    with torch.no_grad():
        return random_weights(UNet(config)), random_weights(ConditionEncoders(config.level_widths, unshuffle=8))


def random_batch(size: str, count: int = 1) -> TrainingBatch:
    config, side = SIZES[size]
    generator = torch.Generator().manual_seed(0)
    return TrainingBatch(
        latents=torch.randn(count, 4, side, side, generator=generator),
        context=torch.randn(count, 77, config.context_dim, generator=generator),
        timesteps=torch.full((count,), 500),
        noise=torch.randn(count, 4, side, side, generator=generator),
        conditions={name: torch.rand(count, 3, 8 * side, 8 * side, generator=generator) for name in CONDITION_NAMES},
    )


def ours(unet: UNet, encoders: ConditionEncoders, batch: TrainingBatch, checkpointing: bool) -> Step:
    unet.requires_grad_(False)
    trained = [*encoders.parameters(), *unet.decoder_parameters()]
    for parameter in trained:
        parameter.requires_grad_(True)
    unet.gradient_checkpointing = checkpointing
    schedule = NoiseSchedule.stable_diffusion()

    def network(latents: Tensor, timesteps: Tensor, context: Tensor, conditions: dict[str, Tensor]) -> Tensor:
        return unet(latents, timesteps, context, encoders(conditions))

    return trained, lambda: eps_loss(network, schedule, batch)


def theirs(unet: UNet, encoders: ConditionEncoders, batch: TrainingBatch, checkpointing: bool, freeze: bool) -> Step:
    """The step as one writes it with diffusers, on copies of the weights; the originals may be dropped afterwards."""
    from diffusers import DDPMScheduler
    from test_model import diffusers_adapter
    from test_unet import diffusers_twin

    adapters = nn.ModuleList([diffusers_adapter(each, unet.config.level_widths) for each in encoders.values()])
    twin = diffusers_twin(unet).train()
    for module in (twin, adapters):
        module.to(batch.latents.device, memory_format=torch.channels_last)
    twin.requires_grad_(not freeze)
    decoder = [p for part in (twin.up_blocks, twin.conv_norm_out, twin.conv_out) for p in part.parameters()]
    for parameter in decoder:
        parameter.requires_grad_(True)
    if checkpointing:
        twin.enable_gradient_checkpointing()
    schedule = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")

    def loss() -> Tensor:
        noisy = schedule.add_noise(batch.latents, batch.noise, batch.timesteps)
        maps = [adapter(image) for adapter, image in zip(adapters, batch.conditions.values(), strict=True)]
        features = [sum(level) for level in zip(*maps, strict=True)]
        output = twin(noisy, batch.timesteps, batch.context, down_intrablock_additional_residuals=features).sample
        return F.mse_loss(output.float(), batch.noise)

    return [*adapters.parameters(), *decoder], loss


def make_step(way: str, size: str, checkpointing: bool, count: int = 1, device: str = "cpu") -> Step:
    """One of WAYS over a batch of `count` on a device (tests/bench_gpu.py)."""
    nn.Linear.reset_parameters = nn.Conv2d.reset_parameters = lambda self: None  # drawing them would take a minute
    unet, encoders = (module.to(device) for module in networks(size))
    drawn = dict(vars(random_batch(size, count)))
    conditions = {name: image.to(device) for name, image in drawn.pop("conditions").items()}
    batch = TrainingBatch(**{name: value.to(device) for name, value in drawn.items()}, conditions=conditions)
    if way == "ours":
        for module in (unet, encoders):
            module.to(memory_format=torch.channels_last)
        return ours(unet, encoders, batch, checkpointing)
    return theirs(unet, encoders, batch, checkpointing, freeze=way == "frozen")


def measure(way: str, size: str, repeats: int, checkpointing: bool) -> dict[str, float]:
    trained, loss = make_step(way, size, checkpointing)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of building
    if way == "ours":
        keep_freed_memory()  # as train.py does
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    seconds = []
    for _ in range(repeats + 1):  # the first one also allocates gradients and optimizer state
        begin = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=fast_dtype("cpu") == torch.bfloat16):
            value = loss()
        value.backward()
        optimizer.step()
        seconds.append(time.perf_counter() - begin)
    return {"seconds": min(seconds[1:]), "gigabytes": peak_gigabytes(), "trained": sum(p.numel() for p in trained)}


def largest_difference() -> float:
    """Of loss and gradient norms between the three ways on one small model in fp32, in parts of the largest."""
    found = []
    for way in WAYS:
        trained, loss = make_step(way, "small", checkpointing=False)
        value = loss()
        value.backward()
        norms = sorted(parameter.grad.norm().item() for parameter in trained)
        found.append(torch.tensor([value.item(), *norms]))
    return max(((other - found[0]).abs().max() / found[0].abs().max()).item() for other in found[1:])


def main(args: argparse.Namespace) -> None:
    if args.way:
        result = (
            largest_difference()
            if args.way == "same"
            else measure(args.way, args.size, args.repeats, args.gradient_checkpointing)
        )
        print(json.dumps(result))
        return

    def run(way: str) -> dict[str, float] | float | None:
        command = [sys.executable, __file__, "--way", way, "--size", args.size, "--repeats", str(args.repeats)]
        command += ["--gradient-checkpointing"] if args.gradient_checkpointing else []
        ended = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        return None if ended.returncode else json.loads(ended.stdout.splitlines()[-1])

    dtype = "bf16 autocast" if fast_dtype("cpu") == torch.bfloat16 else "fp32"
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, size {args.size}, batch 1, {dtype}")
    difference = run("same")
    if difference is None:
        raise SystemExit("the three ways could not be compared, see above")
    print(f"loss and gradient norms of a small model differ by up to {difference:.1e} of the largest")
    print("| way | s a step | GB | times slower than ours | times larger |\n|---|---|---|---|---|")
    found: dict[str, dict[str, float]] = {}
    for way in args.ways:
        result = run(way)
        if result is None:
            print(f"| {way} | did not end, perhaps for want of memory |", flush=True)
            continue
        found[way] = result
        base = found.get("ours", result)
        ratios = [f"{found[way][key] / base[key]:.2f}" for key in ("seconds", "gigabytes")]
        cells = [way, f"{found[way]['seconds']:.2f}", f"{found[way]['gigabytes']:.2f}", *ratios]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="full", help="sizes of the networks (default full)")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="what to measure (default all)")
    parser.add_argument("--repeats", type=int, default=3, help="timed steps after the first (default 3)")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="in all ways: less memory, slower")
    parser.add_argument("--way", choices=(*WAYS, "same"), help="internal: one measurement in this process")
    main(parser.parse_args())
