"""Train the paper's model (stage hoi), or the miniature of Stable Diffusion that it starts from (vae, text, base).

    python train.py --stage vae  --data runs/toy/any --out runs/toy/vae
    python train.py --stage text --data runs/toy/any --out runs/toy/text
    python train.py --stage base --data runs/toy/any --base runs/toy/vae/model.safetensors \\
                    --text-encoder-from runs/toy/text/model.safetensors --out runs/toy/base
    python train.py --data data/train --reg-data data/buffer --base sd-v1-4.ckpt --out runs/hoi     # the paper's sizes
    python train.py --stage hoi  --data runs/toy/lab --reg-data runs/toy/buffer \\
                    --base runs/toy/base/model.safetensors --out runs/toy/hoi
    torchrun --nproc-per-node 8 train.py --stage hoi ...       # the paper: 8 GPUs, batch 8 each, 50,000 steps

Prints a progress line; writes OUT/model.safetensors (the weights), OUT/log.jsonl, OUT/loss.png, OUT/preview_*.png and
OUT/state_*.pt.  To continue after an interruption run the same command again: it goes on from the newest state, and the
result is the same, bit for bit, as if nothing had happened.
"""

import argparse
import contextlib
import json
import math
import os
import shlex
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from hoi import checkpoint, stages
from hoi.batches import Share, TrainingSet
from hoi.hardware import has_fast_bf16, keep_freed_memory
from hoi.model import PRESETS, HOIDiffusion
from hoi.public_weights import init_branch, load_adapter, load_model, source_hash
from hoi.sheets import curve, smooth
from hoi.words import words_in

EMA_EVERY = 4  # steps; the average moves slowly enough
LOG_EVERY = 10  # steps
# `hoi` has the paper's values (Sec. 4.1); the others are for training small networks from scratch.
STAGE_DEFAULTS = {
    "vae": {"learning_rate": 1e-3, "batch_size": 32, "steps": 6000, "warmup_steps": 100, "caption_dropout": 0.0},
    "text": {"learning_rate": 1e-3, "batch_size": 128, "steps": 1500, "warmup_steps": 100, "caption_dropout": 0.0},
    "base": {"learning_rate": 1e-3, "batch_size": 32, "steps": 20000, "warmup_steps": 150, "caption_dropout": 0.1},
    "hoi": {"learning_rate": 1e-5, "batch_size": 8, "steps": 50000, "warmup_steps": 0, "caption_dropout": 0.0},
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--stage", choices=STAGE_DEFAULTS, default="hoi", help="what to train (default hoi: the paper's fine-tuning)")
    add("--data", nargs="+", required=True, metavar="DIR", help="dataset folders with pictures (make_dataset.py)")
    add(
        "--reg-data",
        nargs="*",
        default=[],
        metavar="DIR",
        help="background buffer, stage hoi (sample.py --no-conditions)",
    )
    add("--reg-weight", type=float, default=1.0, help="w_r of eq. 3 (default 1, Sec. 3.3)")
    add("--reg-batch-size", type=int, help="background pictures a process and step (default: --batch-size)")
    add("--base", metavar="PATH", help="weights to start from; needed by stages base (its VAE) and hoi: a model of "
        "ours, a Stable Diffusion 1.x file (.safetensors, .ckpt) or a diffusers folder")
    add("--adapter", metavar="FILE", help="condition encoders to go on from: the official model_ad_N.pth (stage hoi)")
    add(
        "--init-branch",
        action="append",
        metavar="NAME=FILE",
        help="start one condition encoder from a T2I-Adapter file, e.g. normal=t2iadapter_depth_sd14v1.pth; may be"
        " repeated for skeleton (..._openpose_...) and segmentation (..._seg_...) (stage hoi)",
    )
    add("--text-encoder-from", metavar="FILE", help="take the text encoder from this file (stage base)")
    add("--preset", choices=PRESETS, default="tiny", help="network sizes when there is no --base (default tiny)")
    add("--out", required=True, metavar="DIR", help="folder for weights, state, log and previews")
    add("--steps", type=int, help="optimizer steps (default: hoi 50000 as in Sec. 4.1, others for the tiny preset)")
    add("--batch-size", type=int, help="pictures a process and step (default: hoi 8, base and vae 32, text 128)")
    add("--learning-rate", type=float, help="peak learning rate (default: hoi 1e-5 as in Sec. 4.1, others 1e-3)")
    add("--warmup-steps", type=int, help="linear warm-up (steps)")
    add("--cosine", action=argparse.BooleanOptionalAction, help="fall to zero by a half cosine (default: all but hoi)")
    add(
        "--weight-decay",
        type=float,
        default=0.01,
        help="AdamW's (default 0.01, as the official code; the paper says Adam)",
    )
    add("--clip-gradient", type=float, default=0.0, help="largest gradient norm, 0 = no limit (default)")
    add("--caption-dropout", type=float, help="share of captions emptied for guidance (default: base 0.1, hoi 0)")
    add("--ema-decay", type=float, default=0.0, help="average of the weights, e.g. 0.998, 0 = off (default)")
    add("--crop", type=int, default=64, help="crop of stage vae (pixels, default 64; a multiple of 8)")
    add("--gradient-checkpointing", action=argparse.BooleanOptionalAction, default=False, help="less memory, slower")
    add("--seed", type=int, default=0, help="of weights, order and noise (default 0)")
    add("--save-every", type=int, default=500, help="steps between training states (default 500)")
    add("--preview-every", type=int, default=2000, help="steps between preview sheets, 0 = none (default 2000)")
    add(
        "--dtype",
        choices=("auto", "bf16", "fp32"),
        default="auto",
        help="auto: bf16 autocast where the hardware has it",
    )
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda (default: what is there)")
    add("--threads", type=int, default=0, help="CPU threads a process, 0 = torch's choice (default)")
    args = parser.parse_args(argv)
    for name, value in STAGE_DEFAULTS[args.stage].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.cosine is None:
        args.cosine = args.stage != "hoi"
    return args


def starting_model(args: argparse.Namespace) -> HOIDiffusion:
    """The model that the stage trains, on the CPU in fp32, from --base or fresh from the seed."""
    torch.manual_seed(args.seed)  # fresh weights only; every later number comes from (seed, step)
    if args.base:
        model = load_model(args.base)
    elif args.stage in ("vae", "text"):
        model = HOIDiffusion(PRESETS[args.preset](), with_conditions=False)
    else:
        raise SystemExit(f"--stage {args.stage} needs --base FILE: the weights to start from (see --help)")
    if (args.adapter or args.init_branch) and args.stage != "hoi":
        raise ValueError(f"--adapter and --init-branch belong to stage hoi, not to {args.stage}")
    if args.text_encoder_from:
        other = HOIDiffusion.from_file(args.text_encoder_from, preset=model.config.name)
        model.text_encoder.load_state_dict(other.text_encoder.state_dict())
    if args.adapter:
        load_adapter(model, args.adapter)
    if args.stage == "hoi" and model.condition_encoders is None:
        print("the base has no condition encoders: fresh ones are added (Sec. 3.3)")
        model.add_condition_encoders()
    for branch, path in branch_files(args).items():
        init_branch(model, branch, path)
    return model.to(memory_format=torch.channels_last)


def branch_files(args: argparse.Namespace) -> dict[str, str]:
    """--init-branch NAME=FILE ... -> file by name of the condition."""
    pairs = [word.partition("=") for word in args.init_branch or []]
    if unclear := [name for name, _, path in pairs if not path]:
        raise ValueError(f"--init-branch {unclear[0]!r} names no file; write NAME=FILE, e.g. normal=depth.pth")
    return {name: path for name, _, path in pairs}


def build_stage(args: argparse.Namespace, model: HOIDiffusion, share: Share, main_process: bool) -> nn.Module:
    """Freeze what the stage does not train and cache the latents that frozen encoders make."""
    side = model.config.image_size
    pictures = TrainingSet(args.data, side, side)
    model.requires_grad_(False)
    if args.stage == "vae":
        model.vae.requires_grad_(True)
        return stages.VaeStage(model, pictures, share, args.seed, args.crop)
    if args.stage == "text":
        model.text_encoder.requires_grad_(True)
        def meaning(text: str) -> tuple:
            return sorted(words_in(text).items(), key=str), "hand" in text.lower()

        return stages.TextStage(model, pictures, share, args.seed, meaning)

    key = source_hash(args.base)[:16]
    regularization = TrainingSet(args.reg_data, side, side) if args.reg_data else None
    folder = Path(args.out) / "latents"
    if main_process:
        stages.cached(model, pictures, folder, key)
        if regularization:
            stages.cached(model, regularization, folder, key)
    if dist.is_initialized():
        dist.barrier()
    latents = stages.cached(model, pictures, folder, key)
    if args.stage == "base":
        if not model.metadata.get("scaling_factor_measured"):
            model.set_scaling_factor(stages.measured_scaling_factor(latents))
        model.unet.requires_grad_(True)
        stage = stages.BaseStage(model, pictures, latents, share, args.seed, args.caption_dropout)
    else:
        model.freeze_for_fine_tuning()
        reg_latents = stages.cached(model, regularization, folder, key) if regularization else None
        stage = stages.HoiStage(
            model,
            pictures,
            latents,
            regularization,
            reg_latents,
            share,
            args.seed,
            args.caption_dropout,
            args.reg_weight,
            args.reg_batch_size or args.batch_size,
        )
    model.unet.gradient_checkpointing = args.gradient_checkpointing
    return stage


def learning_rate_at(step: int, args: argparse.Namespace) -> float:
    rate = args.learning_rate * min(1.0, (step + 1) / max(args.warmup_steps, 1))
    return rate * 0.5 * (1 + math.cos(math.pi * step / args.steps)) if args.cosine else rate


@contextlib.contextmanager
def averaged_weights(trained: dict[str, nn.Parameter], average: dict[str, torch.Tensor]):
    """Within this block the model carries the moving average of its weights, if there is one."""
    own = {name: parameter.detach().clone() for name, parameter in trained.items()} if average else {}
    for name, value in average.items():
        trained[name].data.copy_(value)
    try:
        yield
    finally:
        for name, value in own.items():
            trained[name].data.copy_(value)


def export(args: argparse.Namespace, model: HOIDiffusion, stage: nn.Module, step: int) -> None:
    """The weights, and in their metadata how they came about: command, files that they began from, kind of normals."""
    kind = "base" if model.condition_encoders is None else "hoi"
    extra = {"scaling_factor_measured": "yes"} if args.stage in ("base", "hoi") else {}
    for name, path in {"base": args.base, "adapter": args.adapter, **branch_files(args)}.items():
        if path:
            extra |= {name: Path(path).name, f"{name}_sha256": source_hash(path)}
    if kind == "hoi":
        sources = {record.get("normal_source") for _, record in stage.pictures.entries} - {None}
        extra |= {"normal_source": ",".join(sorted(sources))} if sources else {}
    model.save(Path(args.out) / "model.safetensors", step, kind, shlex.join(["train.py", *sys.argv[1:]]), **extra)


def write_curves(out: Path) -> None:
    path = out / "log.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    if not lines:
        return
    names = sorted({k for line in lines for k in line} - {"step", "learning_rate", "pictures_per_second"})
    series = {name: smooth([(line["step"], line[name]) for line in lines if name in line], 10) for name in names}
    curve(series, f"{out.name}: step {lines[-1]['step']}").save(out / "loss.png")


def train(args: argparse.Namespace) -> None:
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    main_process, out = rank == 0, Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    keep_freed_memory()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.device.startswith("cuda"):
        args.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(args.device)
    if world_size > 1:
        dist.init_process_group("nccl" if args.device.startswith("cuda") else "gloo")
    bf16 = args.dtype == "bf16" or (args.dtype == "auto" and has_fast_bf16(args.device))

    model = starting_model(args).to(args.device)
    stage = build_stage(args, model, Share(args.batch_size, rank, world_size), main_process).to(args.device)
    trained = {name: parameter for name, parameter in stage.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=args.learning_rate, weight_decay=args.weight_decay, fused=True)
    average = {name: parameter.detach().clone() for name, parameter in trained.items()} if args.ema_decay else {}

    start = 0
    if (state := checkpoint.load_training_state(out)) is not None:
        start = state["step"]
        check_same_run(state["args"], args)
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(state["weights"][name])
        optimizer.load_state_dict(state["optimizer"])
        average = {name: value.to(args.device) for name, value in state["average"].items()}
        truncate_log(out / "log.jsonl", start)
    if start >= args.steps:
        print(f"{out} is finished: {start} steps done; ask for more with --steps")
        return
    wrapped = DistributedDataParallel(stage) if world_size > 1 else stage
    count = sum(parameter.numel() for parameter in trained.values())
    if main_process:
        print(
            f"stage {args.stage}: {count / 1e6:.1f} M parameters train on {len(stage.pictures)} pictures, "
            f"steps {start} to {args.steps}, batch {args.batch_size} x {world_size}, "
            f"{'bf16 autocast' if bf16 else 'fp32'} on {args.device}"
        )

    def save(step: int) -> None:
        if not main_process:
            return
        state = {"step": step, "args": vars(args), "weights": {k: v.detach() for k, v in trained.items()}}
        checkpoint.save_training_state(out, step, state | {"average": average, "optimizer": optimizer.state_dict()})
        with averaged_weights(trained, average):
            export(args, model, stage, step)
        write_curves(out)

    reader = ThreadPoolExecutor(max_workers=1)  # the next batch is read while this one is computed
    upcoming = reader.submit(stage.batch, start)
    bar = tqdm(range(start, args.steps), initial=start, total=args.steps, unit="step", disable=not main_process)
    logged, logged_at = start, time.time()
    for step in bar:
        batch = {name: value.to(args.device) for name, value in upcoming.result().items()}
        upcoming = reader.submit(stage.batch, step + 1)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, args)
        with torch.autocast(args.device.partition(":")[0], dtype=torch.bfloat16, enabled=bf16):
            loss, parts = wrapped(batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if args.clip_gradient:
            nn.utils.clip_grad_norm_(trained.values(), args.clip_gradient)
        optimizer.step()
        done = step + 1
        if average and done % EMA_EVERY == 0:
            decay = min(args.ema_decay**EMA_EVERY, done / (done + 10 * EMA_EVERY))  # a short memory at first
            torch._foreach_lerp_(list(average.values()), [p.detach() for p in trained.values()], 1 - decay)
        if not math.isfinite(loss.item()):
            raise FloatingPointError(
                f"step {step}: the loss is {loss.item()}; go on from the last state with a lower rate"
            )
        if main_process and (done % LOG_EVERY == 0 or done == args.steps):
            speed = (done - logged) * args.batch_size * world_size / (time.time() - logged_at)
            logged, logged_at = done, time.time()
            line = {"step": done, "loss": loss.item(), **{k: v.item() for k, v in parts.items()}}
            line |= {"learning_rate": optimizer.param_groups[0]["lr"], "pictures_per_second": round(speed, 1)}
            with open(out / "log.jsonl", "a") as log:
                log.write(json.dumps(line) + "\n")
            bar.set_postfix(loss=f"{loss.item():.4f}", per_second=f"{speed:.0f}")
        if done % args.save_every == 0 or done == args.steps:
            save(done)
        if main_process and args.preview_every and (done % args.preview_every == 0 or done == args.steps):
            with averaged_weights(trained, average), torch.autocast(args.device[:4].rstrip(":"), torch.bfloat16, bf16):
                stages.save_preview(stage, out / f"preview_{done:06d}.png")
                if measured := stage.measure():
                    tqdm.write(f"step {done}: {measured}")
            logged, logged_at = done, time.time()
    reader.shutdown()
    if main_process:
        print(f"wrote {out / 'model.safetensors'}; look at {out}/loss.png and {out}/preview_{args.steps:06d}.png")


def check_same_run(before: dict, args: argparse.Namespace) -> None:
    """A resumed run must be the run that was interrupted; only its length and housekeeping may change."""
    free = {"steps", "save_every", "preview_every", "threads", "device", "dtype", "out"}
    changed = [k for k, v in vars(args).items() if k not in free and before.get(k) != v]
    if changed:
        details = ", ".join(f"--{k.replace('_', '-')} was {before.get(k)}, is {getattr(args, k)}" for k in changed)
        raise SystemExit(f"{args.out} holds a run with other settings ({details}); use them again or another --out")


def truncate_log(path: Path, step: int) -> None:
    """Drop lines of steps that the interrupted run did after its last state; they are done again."""
    if path.exists():
        whole = [line for line in path.read_text().splitlines() if line.endswith("}")]
        kept = "".join(f"{line}\n" for line in whole if json.loads(line)["step"] <= step)
        checkpoint.write_atomically(path, lambda temporary: temporary.write_text(kept))


def main() -> None:
    try:
        train(parse_args())
    except (ValueError, OSError, FloatingPointError) as error:
        raise SystemExit(f"train.py: {error}") from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
