"""Sampling and a training step on a GPU beside diffusers: same weights, dtype and steps, in the same run.

    python tests/bench_gpu.py                                # full size, at most 8 minutes on one GPU
    python tests/bench_gpu.py --size small --device cpu      # to see that it works

Prints Markdown tables.  Sampling: seconds a picture of 512 px, text, conditions and decoding included, 20 steps of DDIM
at guidance 7.5; ours, and StableDiffusionAdapterPipeline with a MultiAdapter of three; batch 1, 8, 16; float16 and
bfloat16 (our decoder in float32, as sampling has it; theirs in the pipeline's dtype, as it has it); eager and compiled,
where both compile the U-Net.  The share of the matrix peak is that of the U-Net's work (counted by torch, two halves of
guidance each) in the time of a whole picture; the peak is measured first, by a square product in that dtype.
Training: seconds of the paper's step at batch 8 in bf16 autocast as tests/bench_train.py has it: ours, and diffusers'
with gradients of the whole U-Net.

Weights are random, times the minimum of the repeats.  Configurations that the time limit or the memory leaves out are
named.  Nothing is asserted: speed is shown, not tested.
"""

import argparse
import copy
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

TESTS = Path(__file__).parent
sys.path[:0] = [str(TESTS.parent), str(TESTS), str(TESTS / "network")]  # twins in diffusers come from the tests

import bench_train  # noqa: E402
from bench_unet import random_weights  # noqa: E402

from hoi.common.machine import choose_device  # noqa: E402
from hoi.network.config import ModelConfig, sd1_config  # noqa: E402
from hoi.network.model import CONDITION_NAMES, HOIDiffusion  # noqa: E402
from hoi.network.pipeline import Pipeline, SamplingSettings  # noqa: E402
from hoi.network.text import TextConfig  # noqa: E402
from hoi.network.unet import UNetConfig  # noqa: E402
from hoi.network.vae import VAEConfig  # noqa: E402

STEPS, GUIDANCE, PROMPT = 20, 7.5, "A hand is grasping a red mug on a wooden table"


def small_config() -> ModelConfig:
    """A model of Stable Diffusion's kind that a CPU samples in seconds."""
    return ModelConfig(
        name="sd1", unet=UNetConfig(model_channels=32, channel_mult=(1, 2, 2, 3), num_heads=4, context_dim=64),
        vae=VAEConfig(channels=32, channel_mult=(1, 1, 1, 1), num_res_blocks=1), text=TextConfig(64, 4, 2),
        image_size=128,
    )  # fmt: skip


def seconds_of(call: Callable[[], object], device: str, repeats: int) -> float:
    """The least of so many, after one that warms up."""
    wait = getattr(torch, device.partition(":")[0]).synchronize
    seconds = []
    for _ in range(repeats + 1):
        wait()
        begin = time.perf_counter()
        call()
        wait()
        seconds.append(time.perf_counter() - begin)
    return min(seconds[1:])


def matrix_peak(dtype: torch.dtype, device: str, side: int) -> float:
    """Operations a second of a square matrix product."""
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / seconds_of(lambda: a @ b, device, 10)


@torch.no_grad()
def random_model(config: ModelConfig) -> HOIDiffusion:
    nn.Linear.reset_parameters = nn.Conv2d.reset_parameters = lambda self: None  # drawing them would take a minute
    return random_weights(HOIDiffusion(config)).to(memory_format=torch.channels_last).requires_grad_(False)


def diffusers_pipeline(model: HOIDiffusion, dtype: torch.dtype, device: str) -> Callable[[int, torch.Tensor], object]:
    """(batch, conditions (3, B, 3, H, W)) -> pictures, by diffusers' own pipeline with copies of our weights."""
    from diffusers import DDIMScheduler, MultiAdapter, StableDiffusionAdapterPipeline, logging
    from test_model import diffusers_adapter
    from test_text import clip_twin
    from test_unet import diffusers_twin as unet_twin
    from test_vae import diffusers_twin as vae_twin

    logging.set_verbosity_error()
    widths = model.config.unet.level_widths
    pipe = StableDiffusionAdapterPipeline(
        vae=vae_twin(model.vae), text_encoder=clip_twin(model.config.text), tokenizer=None, unet=unet_twin(model.unet),
        adapter=MultiAdapter([diffusers_adapter(each, widths) for each in model.condition_encoders.values()]),
        scheduler=DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
                                set_alpha_to_one=False, steps_offset=1),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.to(device, dtype)
    pipe.unet.to(memory_format=torch.channels_last)
    pipe.set_progress_bar_config(disable=True)

    def make(batch: int, images: torch.Tensor) -> object:
        # The text by its encoder, as ours; the tokens are whatever they are.
        ids = torch.arange(77, device=device)[None].repeat(2, 1)
        negative, positive = pipe.text_encoder(ids).last_hidden_state.split(1)
        return pipe(
            prompt_embeds=positive.repeat(batch, 1, 1), negative_prompt_embeds=negative.repeat(batch, 1, 1),
            image=list(images.to(device, dtype)), num_inference_steps=STEPS,
            guidance_scale=GUIDANCE, adapter_conditioning_scale=[1.0] * 3, output_type="np",
        )  # fmt: skip

    make.unet = pipe.unet
    return make


def our_pipeline(model: HOIDiffusion, dtype: torch.dtype, device: str) -> Callable[[int, torch.Tensor], object]:
    """The same by ours, as sample.py has it."""
    model = copy.deepcopy(model).to(device)
    for part in (model.unet, model.condition_encoders):
        part.to(dtype)
    pipeline = Pipeline(model, SamplingSettings("ddim", STEPS, GUIDANCE))

    def make(batch: int, images: torch.Tensor) -> object:
        features = pipeline.features(dict(zip(CONDITION_NAMES, images, strict=True)))
        return pipeline.pictures([PROMPT] * batch, features, [torch.Generator().manual_seed(k) for k in range(batch)])

    make.unet = model.unet
    return make


@torch.no_grad()
def guided_flops(model: HOIDiffusion) -> int:
    """Operations of one guided evaluation for one picture, as diffusers does it: both halves whole; counted on meta."""
    config, side = model.config, model.config.image_size // model.config.vae.factor
    unet = copy.deepcopy(model.unet).to("meta")
    latents = torch.empty(2, 4, side, side, device="meta")
    context = torch.empty(2, 77, config.text.width, device="meta")
    with FlopCounterMode(display=False) as counted:
        unet(latents, torch.empty(2, dtype=torch.long, device="meta"), context)
    return counted.get_total_flops()


def print_sampling(args: argparse.Namespace, device: str, until: float) -> None:
    model = random_model(sd1_config() if args.size == "full" else small_config())
    side = model.config.image_size
    flops = STEPS * guided_flops(model)
    print("\n| sampling | batch | ours, s a picture | diffusers | times faster | ours of the matrix peak |\n"
          "|---|---|---|---|---|---|")  # fmt: skip
    for dtype in args.dtypes:
        peak = matrix_peak(dtype, device, 8192 if args.size == "full" else 512)
        name = str(dtype).removeprefix("torch.")
        makers = [build(model, dtype, device) for build in (our_pipeline, diffusers_pipeline)]
        for way in args.ways:
            if way == "compiled":
                for make in makers:
                    make.unet.compile()
            for batch in args.batch_sizes:
                if time.monotonic() > until:
                    print(f"| {name} {way} | {batch} | left out: --minutes are over | | | |", flush=True)
                    continue
                images = torch.rand(3, batch, 3, side, side)  # every picture has a view of its own
                try:
                    ours, theirs = (
                        seconds_of(lambda make=make: make(batch, images), device, args.repeats) / batch  # noqa: B023
                        for make in makers
                    )
                except torch.OutOfMemoryError:
                    print(f"| {name} {way} | {batch} | left out: memory | | | |", flush=True)
                    continue
                cells = [f"{ours:.3f}", f"{theirs:.3f}", f"{theirs / ours:.2f}", f"{flops / ours / peak:.0%}"]
                print(f"| {name} {way} | {batch} | {' | '.join(cells)} |", flush=True)
        print(f"| matrix peak in {name} | | {peak / 1e12:.3g} T operations a second | | | |", flush=True)


def training_seconds(way: str, args: argparse.Namespace, device: str) -> float:
    """Of one step at the batch size, after one that allocates."""
    trained, loss = bench_train.make_step(way, args.size, False, args.train_batch_size, device)
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.partition(":")[0], torch.bfloat16):
            value = loss()
        value.backward()
        optimizer.step()

    return seconds_of(step, device, args.repeats)


def main(args: argparse.Namespace) -> None:
    until = time.monotonic() + 60 * args.minutes
    device = choose_device(args.device)
    if device == "cpu" and args.device != "cpu":
        raise SystemExit("bench_gpu.py: no GPU is here; to see that it works: --size small --device cpu")
    card = torch.cuda.get_device_name(device) if device.startswith("cuda") else device
    print(f"{card}, torch {torch.__version__}, size {args.size}, {STEPS} steps, minimum of {args.repeats}")
    torch.backends.cudnn.benchmark = True
    print(f"\n| training step, batch {args.train_batch_size}, bf16 autocast | seconds | times ours |\n|---|---|---|")
    base = None
    for way in ("ours", "plain"):
        seconds = training_seconds(way, args, device)
        base = base or seconds
        print(f"| {way} | {seconds:.3f} | {seconds / base:.2f} |", flush=True)
    print_sampling(args, device, until)


def named_dtype(word: str) -> torch.dtype:
    return getattr(torch, word)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--size", choices=("full", "small"), default="full", help="of the networks (default: %(default)s)")
    add("--device", help="default: the first GPU")
    add("--dtypes", nargs="+", type=named_dtype, default=[torch.bfloat16, torch.float16], metavar="D")
    add("--ways", nargs="+", choices=("eager", "compiled"), default=["eager", "compiled"])
    add("--batch-sizes", nargs="+", type=int, default=[1, 8, 16], metavar="B")
    add("--train-batch-size", type=int, default=8, metavar="B")
    add("--repeats", type=int, default=1, help="timed runs of each after one that warms up (default: %(default)s)")
    add("--minutes", type=float, default=6.5, help="no configuration begins later (default: %(default)s)")
    main(parser.parse_args())
