"""Train the paper's model (stage hoi), or the miniature of Stable Diffusion that it starts from (vae, text, base).

    python train.py --stage vae  --data runs/toy/scenic --out runs/toy/vae
    python train.py --stage text --data runs/toy/scenic --out runs/toy/text
    python train.py --stage base --data runs/toy/scenic --base runs/toy/vae/model.safetensors \\
                    --text-encoder-from runs/toy/text/model.safetensors --out runs/toy/base
    python train.py --data data/train --reg-data data/buffer --base sd-v1-4.ckpt --out runs/hoi     # the paper's sizes
    python train.py --stage hoi  --data runs/toy/lab --reg-data runs/toy/buffer \\
                    --base runs/toy/base/model.safetensors --out runs/toy/hoi
    torchrun --nproc-per-node 8 train.py --stage hoi ...       # the paper: 8 GPUs, batch 8 each, 50,000 steps

Prints a progress line; writes OUT/model.safetensors (the weights), OUT/log.jsonl, OUT/loss.png, OUT/preview_*.png and
OUT/state_*.pt; stage text also OUT/clip.safetensors.  To continue after an interruption run the same command again: it
goes on from the newest state, and the result is the same (on a CPU bit for bit) as if nothing had happened.  SIGTERM
and Ctrl-C save a state before they end the run.

The paper's baselines and ablations are switches of stage hoi: --baseline ldm, dreambooth or controlnet (Sec. 4.2),
--conditions skeleton segmentation (Table 4), --reg-mode swap and --trainable encoders (the official code's variants).
"""

# ruff: noqa: E402
import hoi  # noqa: F401 - before torch: says how its threads wait

# isort: split
import argparse

from hoi.common.choices import BASELINES, CONDITION_NAMES, DREAMBOOTH_CAPTION, PRESET_NAMES, REG_MODES

# `hoi` has the paper's values (Sec. 4.1); the others are for training small networks from scratch.
STAGE_DEFAULTS = {
    "vae": {"learning_rate": 1e-3, "batch_size": 32, "steps": 6000, "warmup_steps": 100, "caption_dropout": 0.0},
    "text": {"learning_rate": 1e-3, "batch_size": 128, "steps": 1500, "warmup_steps": 100, "caption_dropout": 0.0},
    "base": {"learning_rate": 1e-3, "batch_size": 32, "steps": 20000, "warmup_steps": 150, "caption_dropout": 0.1},
    "hoi": {"learning_rate": 1e-5, "batch_size": 8, "steps": 50000, "warmup_steps": 0, "caption_dropout": 0.0},
}


def command_line() -> argparse.ArgumentParser:
    """All flags; those of None get their stage's default in parse_args."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--stage", choices=STAGE_DEFAULTS, default="hoi", help="what to train (default hoi: the paper's fine-tuning)")
    add("--data", nargs="+", required=True, metavar="DIR", help="dataset folders with pictures (make_dataset.py)")
    add("--reg-data", nargs="*", default=[], metavar="DIR", help="background buffer, stage hoi (sample.py "
        "--no-conditions)")
    add("--reg-weight", type=float, default=1.0, help="w_r of eq. 3 (default 1, Sec. 3.3)")
    add("--reg-batch-size", type=int, help="background pictures a process and batch (default: --batch-size)")
    add("--reg-mode", choices=REG_MODES, default="sum", help="sum: both terms of eq. 3 in every step (default); "
        "swap, the official code's: a process's whole step is background with probability --reg-prob")
    add("--reg-prob", type=float, help="of --reg-mode swap (default 0.1, as the official example)")
    add("--baseline", choices=BASELINES, help="train a baseline of Sec. 4.2 in place of the method, from a base model. "
        "ldm: the decoder on text alone, the same as --conditions none; dreambooth: the whole U-Net on text alone, "
        f"every caption of --data {DREAMBOOTH_CAPTION!r}, pictures of the trained conditional model as --reg-data, the "
        "prior preservation; controlnet: a ControlNet that sees the three conditions together, all else frozen (stage "
        "hoi)")
    add("--conditions", nargs="+", choices=(*CONDITION_NAMES, "none"), default=list(CONDITION_NAMES), metavar="NAME",
        help="of skeleton, normal, segmentation; encoders of the others are dropped, that is zero for good (Table 4); "
        "none: text alone, the fine-tuned latent diffusion baseline (stage hoi, default all)")
    add("--trainable", choices=("decoder", "encoders"), default="decoder", help="decoder: the U-Net's decoder and the "
        "condition encoders (default, Sec. 3.3); encoders: these alone, as the official --sd_lock (stage hoi)")
    add("--base", metavar="PATH", help="weights to start from; needed by stages base (its VAE) and hoi: a model of "
        "ours, a Stable Diffusion 1.x file (.safetensors, .ckpt) or a diffusers folder")
    add("--adapter", metavar="FILE", help="condition encoders to go on from: the official model_ad_N.pth, or with "
        "--baseline controlnet a ControlNet for the three conditions (stage hoi)")
    add("--vae", metavar="FILE", help="another autoencoder for --base, or the one that its file lacks")
    add("--init-branch", action="append", metavar="NAME=FILE", help="start one condition encoder from a T2I-Adapter "
        "file, e.g. normal=t2iadapter_depth_sd14v1.pth; may be repeated for skeleton (..._openpose_...) and "
        "segmentation (..._seg_...); with --baseline controlnet once, a ControlNet for that image (stage hoi)")
    add("--text-encoder-from", metavar="FILE", help="take the text encoder from this file (stage base)")
    add("--preset", choices=PRESET_NAMES, default="tiny", help="network sizes when there is no --base (default tiny)")
    add("--out", required=True, metavar="DIR", help="folder for weights, state, log and previews")
    add("--steps", type=int, help="optimizer steps (default: hoi 50000 as in Sec. 4.1, others for the tiny preset)")
    add("--batch-size", type=int, help="pictures a process and batch (default: hoi 8, base and vae 32, text 128)")
    add("--accumulate", type=int, default=1, help="batches a process and step, one after the other (default 1); the "
        "same as a --batch-size as many times as large, in less memory")
    add("--learning-rate", type=float, help="peak learning rate (default: hoi 1e-5 as in Sec. 4.1, others 1e-3)")
    add("--warmup-steps", type=int, help="linear warm-up (steps)")
    add("--cosine", action=argparse.BooleanOptionalAction, help="fall to zero by a half cosine (default: all but hoi)")
    add("--weight-decay", type=float, default=0.01, help="AdamW's (default 0.01, as the official code; the paper says "
        "Adam)")
    add("--clip-gradient", type=float, default=0.0, help="largest gradient norm, 0 = no limit (default)")
    add("--caption-dropout", type=float, help="share of captions emptied for guidance (default: base 0.1, hoi 0)")
    add("--condition-dropout", type=float, default=0.0, help="share of pictures that see only one or two conditions, "
        "the others at weight 0 as with sample.py --cond-scale NAME=0 (stage hoi, default 0 as in the paper)")
    add("--ema-decay", type=float, default=0.0, help="average of the weights, e.g. 0.998, 0 = off (default)")
    add("--crop", type=int, default=64, help="crop of stage vae (pixels, default 64; a multiple of 8)")
    add("--gradient-checkpointing", action=argparse.BooleanOptionalAction, default=False, help="less memory, slower")
    add("--seed", type=int, default=0, help="of weights, order and noise (default 0)")
    add("--save-every", type=int, default=500, help="steps between training states (default 500)")
    add("--keep-states", type=int, default=2, help="training states kept, the newest ones (default 2)")
    add("--preview-every", type=int, default=2000, help="steps between preview sheets, 0 = none (default 2000)")
    add("--dtype", choices=("auto", "bf16", "fp32"), default="auto", help="auto: bf16 autocast where the hardware has "
        "it")
    add("--device", help="cpu, cuda, cuda:1, xpu, mps (default: a GPU where there is one, one a process)")
    add("--threads", type=int, default=0, help="CPU threads a process, 0 = torch's choice (default)")
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags, with the stage's defaults filled in; contradictions end the program with a message."""
    parser = command_line()
    args = parser.parse_args(argv)
    for name, value in STAGE_DEFAULTS[args.stage].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.cosine is None:
        args.cosine = args.stage != "hoi"
    if problem := contradiction(args):
        parser.error(problem)
    text_alone = args.baseline in ("ldm", "dreambooth")
    args.conditions = [] if text_alone else [name for name in CONDITION_NAMES if name in args.conditions]
    if args.reg_mode == "swap" and args.reg_prob is None:
        args.reg_prob = 0.1
    return args


def contradiction(args: argparse.Namespace) -> str | None:
    """What is wrong with a combination of flags, if anything is: a flag that would do nothing is refused."""
    none, lists_all = "none" in args.conditions, set(args.conditions) == set(CONDITION_NAMES)
    if not 0 <= args.condition_dropout <= 1:
        return f"--condition-dropout is {args.condition_dropout}, expected 0 to 1"
    if args.condition_dropout and (args.stage != "hoi" or not lists_all):
        return "--condition-dropout belongs to stage hoi with all three --conditions"
    if args.accumulate < 1 or args.keep_states < 1:
        return "--accumulate and --keep-states must be 1 or more"
    if args.stage != "hoi" and (args.reg_mode == "swap" or not lists_all or args.trainable == "encoders"):
        return f"--reg-mode, --conditions and --trainable belong to stage hoi, not to {args.stage}"
    if args.baseline:
        stray = ["stage"] * (args.stage != "hoi") + ["conditions"] * (not lists_all)
        stray += ["trainable"] * (args.trainable != "decoder") + ["condition_dropout"] * bool(args.condition_dropout)
        if args.baseline != "controlnet":
            stray += [name for name in ("adapter", "init_branch") if getattr(args, name)]
        if stray:
            return f"--baseline {args.baseline} leaves nothing for --{stray[0].replace('_', '-')} to choose: drop it"
        if args.baseline == "dreambooth" and not args.reg_data:
            return "--baseline dreambooth needs --reg-data, pictures of the trained conditional model"
        if len(args.init_branch or ()) + bool(args.adapter) > 1:
            return "--baseline controlnet starts from one --init-branch or --adapter: a file is a whole ControlNet"
    if none and (len(args.conditions) > 1 or args.trainable == "encoders" or args.adapter or args.init_branch):
        return "--conditions none leaves no encoder for other --conditions, --trainable, --adapter or --init-branch"
    left_out = set(CONDITION_NAMES) - set(args.conditions)
    if lost := [word for word in args.init_branch or [] if word.partition("=")[0] in left_out]:
        return f"--init-branch {lost[0]} is for an encoder that --conditions leaves out"
    branches = [word.partition("=")[0] for word in args.init_branch or []]
    if twice := {name for name in branches if branches.count(name) > 1}:
        return f"--init-branch names {min(twice)} twice: one encoder starts from one file"
    if args.reg_mode == "sum" and args.reg_prob is not None:
        return "--reg-prob belongs to --reg-mode swap; the sum is weighted by --reg-weight"
    if args.reg_mode == "swap" and (not args.reg_data or args.reg_weight != 1 or args.reg_batch_size):
        return "--reg-mode swap needs --reg-data, and --reg-prob takes the place of --reg-weight and --reg-batch-size"
    if args.reg_prob is not None and not 0 <= args.reg_prob <= 1:
        return f"--reg-prob is {args.reg_prob}, expected 0 to 1"
    if args.stage == "text" and args.accumulate > 1:
        return "--accumulate cannot serve stage text, whose loss compares all pictures of a batch with each other"
    if args.vae and not args.base:
        return "--vae belongs to a --base, whose autoencoder it takes the place of"
    return None


if __name__ == "__main__":
    parse_args()  # --help and mistakes are told before the seconds that these imports take

import contextlib
import functools
import math
import shlex
import signal
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from hoi.common.command import problems_as_messages
from hoi.common.files import encode_png, held_alone, write_whole
from hoi.common.machine import (
    choose_device,
    fast_dtype,
    join_processes,
    keep_freed_memory,
    leave_processes,
    rank_and_world_size,
)
from hoi.common.sheets import contact_sheet
from hoi.network.config import PRESETS
from hoi.network.model import HOIDiffusion
from hoi.network.text import reading_hints
from hoi.toyworld.words import words_in
from hoi.training.data import (
    Batch,
    Share,
    TrainingSet,
    cached,
    each_tensor,
    measured_scaling_factor,
    read_ahead,
    to_device,
)
from hoi.training.run import (
    StopSignals,
    TrainingLog,
    WeightAverage,
    agreed,
    check_same_run,
    gradient_norm,
    load_training_state,
    save_training_state,
    unusable_step,
)
from hoi.training.small_clip import FILE_NAME, save_small_clip
from hoi.training.stages import (
    TEXT_SHRINK,
    BaseStage,
    HoiStage,
    Regularization,
    Stage,
    TextStage,
    VaeStage,
)
from hoi.weights.export import export_own
from hoi.weights.load import init_branch, load_adapter, load_model, source_hash

LOG_EVERY = 10  # steps
# Elsewhere losses are looked at every LOG_EVERY steps and before a state is saved: a GPU stands still until its numbers
# are here.
LOOKED_AT_EVERY_STEP = ("cpu",)
AHEAD = 4  # batches that are read before a GPU asks for them


def set_up(args: argparse.Namespace) -> tuple[int, int, bool]:
    """Threads, device and, under torchrun, the process group.  returns rank, world size, whether to compute in bf16."""
    rank, world_size = rank_and_world_size()
    keep_freed_memory()
    if args.threads:
        torch.set_num_threads(args.threads)
    args.device = choose_device(args.device)
    if args.device.startswith("cuda"):
        torch.cuda.set_device(args.device)
        torch.backends.cudnn.benchmark = True  # all steps are of one shape
        torch.set_float32_matmul_precision("high")  # TF32, as cuDNN's convolutions have it
    join_processes("nccl" if args.device.startswith("cuda") else "gloo", rank, world_size)
    fast = fast_dtype(args.device) == torch.bfloat16
    if args.dtype == "bf16" and not fast and rank == 0:
        print(f"note: --dtype bf16 is several times slower than fp32 on this {args.device}", flush=True)
    return rank, world_size, args.dtype == "bf16" or (args.dtype == "auto" and fast)


def starting_model(args: argparse.Namespace) -> HOIDiffusion:
    """The model that the stage trains, on the CPU in fp32, from --base or fresh from the seed."""
    torch.manual_seed(args.seed)  # fresh weights only; every later number comes from (seed, step)
    if args.base:
        model = load_model(args.base, vae=args.vae)
    elif args.stage in ("vae", "text"):
        model = HOIDiffusion(PRESETS[args.preset](), with_conditions=False)
    else:
        raise SystemExit(f"--stage {args.stage} needs --base FILE: the weights to start from (see --help)")
    if (args.adapter or args.init_branch) and args.stage != "hoi":
        raise ValueError(f"--adapter and --init-branch belong to stage hoi, not to {args.stage}")
    if args.text_encoder_from:
        other = load_model(args.text_encoder_from, preset=model.config.name)
        model.text_encoder.load_state_dict(other.text_encoder.state_dict())
    if args.adapter:
        load_adapter(model, args.adapter)
    controlled = model.unet.control is not None
    if model.condition_encoders is not None and (not args.conditions or (args.baseline == "controlnet") != controlled):
        has, how = "condition encoders", "with --conditions and without --baseline"
        if controlled:
            has, how = "a ControlNet", "with --baseline controlnet"
        raise ValueError(f"{args.adapter or args.base} has {has}: begin with a base model, or train {how}")
    if args.stage == "hoi" and args.conditions and model.condition_encoders is None:
        fresh = "a fresh ControlNet is" if args.baseline else "fresh ones are"
        print(f"the base has no condition encoders: {fresh} added (Sec. {'4.2' if args.baseline else '3.3'})")
        model.add_condition_encoders(controlnet=args.baseline == "controlnet")
    for branch, path in branch_files(args).items():
        init_branch(model, branch, path)
    return model.to(memory_format=torch.channels_last)


def branch_files(args: argparse.Namespace) -> dict[str, str]:
    """--init-branch NAME=FILE ... -> file by name of the condition."""
    pairs = [word.partition("=") for word in args.init_branch or []]
    if unclear := [name for name, _, path in pairs if not path]:
        raise ValueError(f"--init-branch {unclear[0]!r} names no file; write NAME=FILE, e.g. normal=depth.pth")
    return {name: path for name, _, path in pairs}


def build_stage(args: argparse.Namespace, model: HOIDiffusion, share: Share) -> Stage:
    """Freeze what the stage does not train and cache what the frozen autoencoder makes of the pictures."""
    side = model.config.image_size
    pictures = TrainingSet(args.data, side, side, DREAMBOOTH_CAPTION if args.baseline == "dreambooth" else None)
    model.requires_grad_(False)
    if args.stage == "vae":
        model.vae.requires_grad_(True)
        return VaeStage(model, pictures, share, args.seed, args.crop)
    sets = [pictures, TrainingSet(args.reg_data, side, side)] if args.reg_data else [pictures]
    if share.rank == 0:
        for hint in reading_hints(caption for each in sets for caption in each.captions(range(len(each)))):
            print(hint)
    if args.stage == "text":
        model.text_encoder.requires_grad_(True)

        def meaning(text: str) -> tuple:
            return sorted(words_in(text).items(), key=str), "hand" in text.lower()

        return TextStage(model, pictures, share, args.seed, meaning)

    latents = Path(args.out) / "latents"
    data, *buffer = (cached(model, each, latents) for each in sets)
    if args.stage == "base":
        if not model.metadata.get("scaling_factor_measured"):
            model.set_scaling_factor(measured_scaling_factor(data.latents))
        model.unet.requires_grad_(True)
        stage = BaseStage(model, data, share, args.seed, args.caption_dropout)
    else:
        model.freeze_for_fine_tuning(args.conditions, decoder=args.trainable == "decoder")
        if args.baseline == "dreambooth":
            model.unet.requires_grad_(True)
        reg = None
        if buffer:
            size = args.reg_batch_size or args.batch_size
            reg = Regularization(buffer[0], size, args.reg_mode, args.reg_weight, args.reg_prob or 0.0)
        stage = HoiStage(model, data, share, args.seed, args.caption_dropout, reg, args.condition_dropout)
    for part in (model.unet, model.unet.control):
        if part is not None:
            part.gradient_checkpointing = args.gradient_checkpointing
    return stage


def learning_rate_at(step: int, args: argparse.Namespace) -> float:
    """Rising over the warm-up, then constant or, with --cosine, falling to zero at the last step."""
    rate = args.learning_rate * min(1.0, (step + 1) / max(args.warmup_steps, 1))
    return rate * 0.5 * (1 + math.cos(math.pi * step / args.steps)) if args.cosine else rate


def save_weights(args: argparse.Namespace, model: HOIDiffusion, stage: Stage, step: int) -> None:
    """Write OUT/model.safetensors, in its metadata how it came about: command, files it began from, kind of normals."""
    extra = {"scaling_factor_measured": "yes"} if args.stage in ("base", "hoi") else {}
    for name, path in {"base": args.base, "vae": args.vae, "adapter": args.adapter, **branch_files(args)}.items():
        if path:
            extra |= {name: Path(path).name, f"{name}_sha256": source_hash(path)}
    if model.condition_encoders is not None:
        sources = {record.get("normal_source") for _, record in stage.pictures.entries} - {None}
        extra |= {"conditions": ",".join(args.conditions)}
        extra |= {"normal_source": ",".join(sorted(sources))} if sources and "normal" in args.conditions else {}
    if args.stage == "text":  # with the picture tower, which the model has no place for
        save_small_clip(Path(args.out) / FILE_NAME, stage.picture_text, model.config.image_size // TEXT_SHRINK)
    if baseline := args.baseline or ("ldm" if args.stage == "hoi" and not args.conditions else None):
        extra |= {"baseline": baseline}
    extra |= {"step": str(step), "command": shlex.join(["train.py", *sys.argv[1:]])}
    export_own(model, Path(args.out) / "model.safetensors", metadata=extra)


def resume(
    args: argparse.Namespace,
    trained: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    average: WeightAverage,
    world_size: int,
) -> int:
    """Go on from the newest state in --out, if there is one; returns the steps that are done.

    Raises ValueError when the state is of a run with other settings.
    """
    state = load_training_state(args.out)
    if state is None:
        return 0
    check_same_run(Path(args.out), state["args"], vars(args), state["processes"], world_size)
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(state["weights"][name])
    optimizer.load_state_dict(state["optimizer"])
    average.restore(state["average"])
    return state["step"]


def train(args: argparse.Namespace) -> None:
    """Train until --steps, or until a signal; see the top of this file for what is written."""
    rank, world_size, bf16 = set_up(args)
    main_process, out = rank == 0, Path(args.out)
    autocast = functools.partial(torch.autocast, args.device.partition(":")[0], torch.bfloat16, bf16)

    model = starting_model(args).to(args.device)
    out.mkdir(parents=True, exist_ok=True)
    stage = build_stage(args, model, Share(args.batch_size, rank, world_size, args.accumulate)).to(args.device)
    # By their names in the model, which is an attribute of some stages.
    trained = {name.removeprefix("model."): p for name, p in stage.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=args.learning_rate, weight_decay=args.weight_decay, fused=True)
    average = WeightAverage(trained, args.ema_decay)
    start = saved = resume(args, trained, optimizer, average, world_size)
    if start >= args.steps:
        print(f"{out} is finished: {start} steps done; ask for more with --steps")
        return
    # No buffer ever changes: the text encoder's mask is the only one.
    wrapped = stage
    if world_size > 1:
        wrapped = DistributedDataParallel(stage, broadcast_buffers=False, gradient_as_bucket_view=True)
    count = sum(parameter.numel() for parameter in trained.values())
    if main_process:
        log = TrainingLog(out, start)
        print(
            f"stage {args.stage}: {count / 1e6:.1f} M parameters train on {len(stage.pictures)} pictures, "
            f"steps {start} to {args.steps}, batch {args.batch_size} x {args.accumulate} x {world_size}, "
            f"{'bf16 autocast' if bf16 else 'fp32'} on {args.device}"
        )

    def save_state(step: int) -> None:
        if main_process:
            state = {"step": step, "args": vars(args), "processes": world_size, "average": average.values}
            state |= {"weights": {k: v.detach() for k, v in trained.items()}, "optimizer": optimizer.state_dict()}
            save_training_state(out, step, state, args.keep_states)

    numbers = range(args.accumulate)
    places = ((step, number) for step in range(start, args.steps) for number in numbers)

    def read(step: int, number: int) -> Batch:
        batch = stage.batch(step, number)
        return each_tensor(batch, torch.Tensor.pin_memory) if args.device.startswith("cuda") else batch

    batches = read_ahead(read, places, 1 if args.device == "cpu" else AHEAD)
    bar = tqdm(range(start, args.steps), initial=start, total=args.steps, unit="step", disable=not main_process)
    unseen = []  # of steps whose numbers nobody has looked at yet: step, numbers, pictures, learning rate
    with StopSignals() as signals:
        for step in bar:
            learning_rate = learning_rate_at(step, args)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            optimizer.zero_grad(set_to_none=True)
            values: dict[str, list[torch.Tensor]] = {}  # losses of the step's batches
            names: list[list[str]] = []  # and their pictures, for a message
            for number in numbers:
                batch = next(batches)
                names.append(stage.picture_names(batch))
                batch = to_device(batch, args.device)
                last = number == numbers[-1]  # only then are gradients exchanged
                with contextlib.nullcontext() if last or world_size == 1 else wrapped.no_sync():
                    with autocast():
                        loss, terms = wrapped(batch)
                    (loss / args.accumulate).backward()  # outside of autocast, as torch advises
                for name, value in {"loss": loss.detach(), **terms}.items():
                    values.setdefault(name, []).append(value)
            norm = (
                nn.utils.clip_grad_norm_(trained.values(), args.clip_gradient)
                if args.clip_gradient
                else gradient_norm(trained.values())
            )
            done, at_end, leaving = step + 1, step + 1 == args.steps, False
            is_looked_at = done % LOG_EVERY == 0 or done % args.save_every == 0 or at_end
            unseen.append((step, torch.stack([*values["loss"], norm]), names, learning_rate))
            if is_looked_at or args.device in LOOKED_AT_EVERY_STEP:
                rows = torch.stack([each[1] for each in unseen]).tolist()
                bad = [k for k, row in enumerate(rows) if not all(map(math.isfinite, row))]
                leaving, unusable = agreed(signals.received is not None, bool(bad), device=args.device)
                if unusable:  # no weight was touched
                    k = bad[0] if bad else -1
                    (at, _, names, rate), (*losses, norm) = unseen[k], rows[k]
                    raise FloatingPointError(unusable_step(at, losses, norm, names, rate, rank, saved))
                unseen, optimizer.found_inf = [], None
            else:  # the fused optimizer then leaves the weights alone by itself, as under a GradScaler
                optimizer.found_inf = (~unseen[-1][1].isfinite().all()).float()
            optimizer.step()
            average.update(done)
            if main_process and (done % LOG_EVERY == 0 or at_end):
                line = log.append(
                    done, values, args.batch_size * args.accumulate * world_size, learning_rate=learning_rate,
                    gradient_norm=float(norm),
                )  # fmt: skip
                bar.set_postfix(loss=f"{line['loss']:.4f}", per_second=line["pictures_per_second"], refresh=False)
            if main_process and args.preview_every and (done % args.preview_every == 0 or at_end):
                with average.in_place(), autocast():
                    rows = stage.preview()
                if rows:  # stage text has nothing to show
                    sheet = encode_png(np.asarray(contact_sheet(rows)))
                    write_whole(out / f"preview_{done:06d}.png", sheet)
            if done % args.save_every == 0 or at_end:
                if main_process:
                    with average.in_place():
                        save_weights(args, model, stage, done)
                    log.draw()
                save_state(done)  # last: what a state says is done has left its results
                saved = done
            if leaving and not at_end:
                if saved != done:
                    save_state(done)
                leave(signals.received, out, done, main_process)


def leave(received: int | None, out: Path, done: int, main_process: bool) -> None:
    """End the process with the exit status of its signal (another process's, when it got none itself)."""
    number = signal.Signals(received or signal.SIGTERM)
    if main_process:
        print(f"{number.name}: {out} is saved at step {done}; the same command goes on from there", flush=True)
    raise SystemExit(128 + number)


def main() -> None:
    """Train; expected problems end in a line on stderr, not in a traceback."""
    try:
        with problems_as_messages("train.py", "\ninterrupted before the first step; the same command starts again"):
            args = parse_args()
            # Before anything is loaded: two trainings would throw away each other's states.
            alone = held_alone(args.out, "a training") if rank_and_world_size()[0] == 0 else contextlib.nullcontext()
            with alone:
                train(args)
    except FloatingPointError as error:
        raise SystemExit(f"train.py: {error}") from error
    leave_processes()


if __name__ == "__main__":
    main()
