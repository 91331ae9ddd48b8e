"""Generate pictures of hands grasping objects, each with its 3D annotation: a dataset folder whose pictures are new.

    python sample.py                                          # mug, bowl, bottle, can in several looks -> ./out
    python sample.py --object path/to/mug.stl --prompt "A hand is grasping a pink {object} on the beach" --count 8
    python sample.py --data data/test --out out/test          # conditions and texts of a folder of make_dataset.py
    python sample.py --data data/test --prompts-file looks.txt --cond-scale normal=0.5 --out out/looks
    python sample.py --base model_sd_5000.ckpt --adapter model_ad_5000.pth      # 512 px, the official release's weights
    python sample.py --no-conditions --checkpoint runs/base/model.safetensors --count 1000 --out data/background_buffer
    torchrun --nproc-per-node 2 sample.py --data data/test    # the same pictures, shared between processes

It prints what it uses, a progress bar, and what to look at (grid.png).  Running the same command again continues where
it stopped; record i depends on --seed and i alone.  Every PNG carries its prompt and parameters.  Paper: Sec. 3.3, 4.
"""

import argparse
import hashlib
import json
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from hoi.common.command import how_made, positive, problems_as_messages
from hoi.common.files import ASSETS
from hoi.common.machine import check_device, has_fast_bf16, keep_freed_memory
from hoi.data.folder import RECORD_KEYS, read_description
from hoi.data.views import FolderViews, Request, SceneViews, plan
from hoi.data.writer import DatasetWriter, complete_record, open_folder, png_text, write_pictures
from hoi.geometry.camera import FRAMINGS
from hoi.geometry.hand import load_hand
from hoi.geometry.objects import CATEGORIES, collect_objects, object_card
from hoi.geometry.scene import ViewSettings
from hoi.network.kernels import pack
from hoi.network.model import CONDITION_NAMES, HOIDiffusion, stack_conditions
from hoi.network.pipeline import Pipeline, SamplingSettings, join_features, set_precision
from hoi.network.samplers import SAMPLERS
from hoi.toyworld.words import (
    DEFAULT_PROMPTS,
    default_negative_prompt,
    default_scenery_prompts,
    read_prompts,
    untaught_words,
)
from hoi.weights import load
from hoi.weights.load import normals_differ, source_hash

BUILT_IN = ASSETS / "tiny.safetensors"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "hoidiffusion" / "grasps"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def parse_weight(word: str) -> tuple[str, float]:
    name, _, value = word.partition("=")
    if name not in CONDITION_NAMES:
        raise argparse.ArgumentTypeError(f"{name!r} is no condition; choose from {', '.join(CONDITION_NAMES)}")
    try:
        weight = float(value)
    except ValueError:
        weight = float("nan")
    if not np.isfinite(weight):
        raise argparse.ArgumentTypeError(f"weight of {name} is {value!r}, expected a number, e.g. {name}=0.5")
    return name, weight


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    how = parser.add_argument_group("sampling (defaults: of the checkpoint's preset)")
    how.add_argument("--sampler", choices=SAMPLERS, help="dpm++: second-order multistep; ddim; ddpm: eq. 2")
    how.add_argument("--steps", type=positive, metavar="N", help="tiny and sd1: 20 with dpm++; the paper: 50 with ddim")
    how.add_argument("--guidance-scale", type=float, metavar="W",
                     help="0 ignores the text, 1 means no guidance (sd1: 7.5)")
    how.add_argument("--cond-scale", nargs="+", type=parse_weight, default=[], metavar="NAME=WEIGHT",
                     help=f"weights of the conditions {', '.join(CONDITION_NAMES)} (1 each, Sec. 3.3)")
    how.add_argument("--cond-tau", type=float, default=1.0, metavar="TAU",
                     help="share of the steps, from the noisiest on, that sees the conditions, 0 to 1")
    how.add_argument("--negative-prompt", metavar="TEXT",
                     help="unconditional text of guidance (default: the official stock list for sd1, empty for tiny)")


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--checkpoint", type=Path, metavar="FILE", help="weights trained here (default: the built-in ones)")
    add("--base", type=Path, metavar="PATH", help="instead: a Stable Diffusion 1.x file (.safetensors, .ckpt) or a "
        "diffusers folder, or an export of tools/export_weights.py")
    add("--adapter", type=Path, metavar="FILE", help="condition encoders for --base: the official model_ad_N.pth")
    add("--device", help="cpu, cuda, cuda:1 (default: cuda where there is one)")
    add("--dtype", choices=("auto", *DTYPES), default="auto",
        help="of U-Net and condition encoders (default: bfloat16 where the hardware has it, else float32)")
    add("--threads", type=positive, metavar="T", help="of torch on the CPU (default: torch's own choice)")


def check_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with a message where the flags of sampling and model contradict each other."""
    if args.base and args.checkpoint:
        parser.error("--base and --checkpoint exclude each other: a checkpoint is a whole model")
    if args.adapter and not args.base:
        parser.error("--adapter belongs to a --base: a checkpoint has its own condition encoders")
    if args.seed < 0 or not 0 <= args.cond_tau <= 1:
        parser.error("--seed must not be negative, --cond-tau lies between 0 and 1")
    if args.guidance_scale is not None and not np.isfinite(args.guidance_scale):
        parser.error("--guidance-scale must be a finite number")


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    what = parser.add_argument_group("geometry: objects, a folder, or none")
    what.add_argument("--object", nargs="+", metavar="PATH|NAME",
                      help=f"mesh files, folders of meshes, or built-in objects (default: {' '.join(CATEGORIES)})")
    what.add_argument("--data", type=Path, metavar="DIR", help="take conditions and annotation from a dataset folder")
    what.add_argument("--conditions", action=argparse.BooleanOptionalAction, default=True,
                      help="--no-conditions samples from text alone: scenery, the background buffer (Sec. 3.3)")
    what.add_argument("--category", help="what mesh files show (default: guessed from the file's name)")
    what.add_argument("--units", help="unit of mesh files: m, dm, cm, mm, in (default: guessed, and said)")
    what.add_argument("--hand-side", choices=("right", "left", "random"), default="right", help="for --object")
    what.add_argument("--framing", choices=FRAMINGS,
                      help="for --object; official: 60 degrees field of view, tight: zoomed in (default: as the "
                      "checkpoint was trained: tight for tiny, official for sd1)")
    what.add_argument("--grasps-per-object", type=positive, default=3, metavar="G", help="searched once and cached")
    what.add_argument("--mano", metavar="FILE", help="official MANO_RIGHT.pkl (default: the built-in hand)")
    what.add_argument("--cache", type=Path, default=CACHE, metavar="DIR", help="found grasps (default: %(default)s)")
    text = parser.add_argument_group("text")
    text.add_argument("--prompt", nargs="+", metavar="TEXT",
                      help="{object} stands for the object's name; every geometry with every prompt (default: a few "
                      "looks of the paper's figures; with --data each record's own text)")
    text.add_argument("--prompts-file", type=Path, metavar="FILE", help="one prompt a line, # begins a comment line")
    add_sampling_flags(parser)
    add("--count", type=positive, metavar="N", help="pictures (default: each combination of geometry and prompt once)")
    add("--seed", type=int, default=0, help="of noise, views and grasps (default: %(default)s)")
    add("--out", type=Path, default=Path("out"), metavar="DIR", help="the dataset folder (default: %(default)s)")
    add("--batch-size", type=positive, metavar="B", help="pictures at once (default: 8; 2 for 512 px on a CPU or GPU)")
    add_model_flags(parser)
    args = parser.parse_args(arguments)
    if args.data is not None and args.object:
        parser.error("--data and --object exclude each other: the folder has its own objects")
    if not args.conditions and (args.data is not None or args.object):
        parser.error("--no-conditions samples from text alone: drop --data or --object")
    if args.prompt and args.prompts_file:
        parser.error("--prompt and --prompts-file exclude each other")
    check_flags(parser, args)
    return args


def picture_generator(seed: int, index: int) -> torch.Generator:
    """Noise of one picture: from (seed, index) alone, on the CPU, so it is the same on any hardware."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0]))


def choose_device(args: argparse.Namespace, rank: int) -> str:
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    return f"cuda:{rank % torch.cuda.device_count()}" if device == "cuda" and "LOCAL_RANK" in os.environ else device


def load_model(args: argparse.Namespace, device: str) -> tuple[HOIDiffusion, dict[str, str], str]:
    """The model, name and hash of its files, and the dtype's name that U-Net and condition encoders compute in."""
    dtype = args.dtype
    if dtype == "auto":
        dtype = "bfloat16" if has_fast_bf16(device) else "float32"
    path = args.base or args.checkpoint or BUILT_IN
    if path == BUILT_IN and not path.is_file():
        raise FileNotFoundError(f"no built-in weights at {path}: train them (docs/training.md) or use --checkpoint")
    if args.base:
        dtypes = dict.fromkeys(("unet", "condition_encoders"), DTYPES[dtype])
        model = load.load_model(path, args.adapter, device=device, dtype=dtypes)
    else:
        path = path / "model.safetensors" if path.is_dir() else path
        model = load.load_model(path, device=device)
    if args.conditions and model.condition_encoders is None:
        adapter = "give it --adapter," if args.base else "fine-tune it,"
        raise ValueError(f"{path} is a base model without condition encoders: {adapter} or add --no-conditions")
    files = {"name": path.name, "sha256": source_hash(path)}
    if args.adapter:
        files |= {"adapter": args.adapter.name, "adapter_sha256": source_hash(args.adapter)}
    return pack(set_precision(model.requires_grad_(False), DTYPES[dtype])), files, dtype


def sampling_settings(args: argparse.Namespace, model: HOIDiffusion) -> SamplingSettings:
    """What the flags leave open comes from the preset."""
    config, weights = model.config, dict.fromkeys(CONDITION_NAMES, 1.0) | dict(args.cond_scale)
    negative = args.negative_prompt
    return SamplingSettings(
        sampler=args.sampler or config.sampler,
        num_inference_steps=args.steps or config.num_inference_steps,
        guidance_scale=config.guidance_scale if args.guidance_scale is None else args.guidance_scale,
        negative_prompt=default_negative_prompt(config.name) if negative is None else negative,
        cond_weights=tuple(weights[name] for name in CONDITION_NAMES),
        cond_tau=args.cond_tau,
    )


def choose_geometries(args: argparse.Namespace, model: HOIDiffusion) -> FolderViews | SceneViews | None:
    size = model.config.image_size
    if not args.conditions:
        return None
    if args.data is not None:
        return FolderViews(args.data, size)
    meshes = collect_objects(args.object or CATEGORIES, category=args.category, units=args.units)
    framing = args.framing or ("tight" if model.config.name == "tiny" else "official")
    view = ViewSettings(size, size, args.hand_side, framing)
    return SceneViews(meshes, load_hand(args.mano), view, args.seed, args.grasps_per_object, args.cache)


def normal_sources(geometries: FolderViews | SceneViews | None) -> set[str | None]:
    """Where the normal maps come from: rendered here, or what the folder's records say."""
    if isinstance(geometries, FolderViews):
        return {record.get("normal_source") for record in geometries.records}
    return set() if geometries is None else {"geometry"}


def choose_prompts(args: argparse.Namespace, model: HOIDiffusion) -> list[str] | None:
    """None: every record of the folder with its own text."""
    if args.prompts_file is not None:
        return read_prompts(args.prompts_file)
    if args.prompt:
        if not all(prompt.strip() for prompt in args.prompt):
            raise ValueError("a --prompt is empty; to sample without text use --guidance-scale 0")
        return args.prompt
    if not args.conditions:
        return default_scenery_prompts(model.config.name)
    return None if args.data is not None else list(DEFAULT_PROMPTS)


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def sampling_job(seed: int, checkpoint: dict[str, str], dtype: str, settings: SamplingSettings) -> dict[str, Any]:
    """What decides a picture beside its geometry, here and in video.py: another job must not continue in a folder."""
    job = {"seed": seed, "checkpoint": checkpoint["sha256"], "dtype": dtype, **vars(settings)}
    return job | ({"adapter": checkpoint["adapter_sha256"]} if "adapter" in checkpoint else {})


def describe(args, settings, checkpoint, dtype, geometries, prompts) -> dict[str, Any]:
    """What goes to dataset.json; "job" decides the pictures, and another job must not continue in the same folder."""
    job = sampling_job(args.seed, checkpoint, dtype, settings)
    job |= {"prompts": None if prompts is None else digest(prompts), "conditions": args.conditions}
    licences: dict[str, Any] = {"weights": f"those of {checkpoint['name']}"}
    objects: list[dict[str, Any]] = []
    if isinstance(geometries, FolderViews):
        rows = [[record["index"], record["text"], record["keypoints_2d"]] for record in geometries.records]
        job["data"] = digest(rows)
        source = read_description(args.data)
        licences["data"], objects = source.get("licences"), source.get("objects") or []
    elif geometries is not None:
        meshes = geometries.meshes
        job["objects"] = [f"{m.object_id} {hashlib.sha256(m.vertices.tobytes()).hexdigest()[:8]}" for m in meshes]
        job |= {"hand_side": args.hand_side, "framing": geometries.settings.framing, "hand": geometries.hand.name,
                "grasps_per_object": geometries.grasps_per_object}  # fmt: skip
        licences["objects"] = sorted({mesh.source for mesh in meshes})
        objects = [object_card(mesh) for mesh in meshes]
    return {
        **how_made("sample.py"),
        "seed": args.seed,
        "checkpoint": checkpoint,
        "licences": licences,
        "job": job,
        "objects": objects,
    }


def say(rank: int, *lines: str) -> None:
    if rank == 0:
        print(*lines, sep="\n", flush=True)


def prepare_grasps(geometries, requests: list[Request], rank: int) -> None:
    """Search grasps before the first picture.  Rank 0 first: the others read what it found."""
    if isinstance(geometries, SceneViews):
        if rank > 0:
            barrier()
        needed = sorted({request.geometry % len(geometries) for request in requests})
        for k in tqdm(needed, "grasps", unit="object", disable=rank > 0):
            geometries.prepare(k)
        if rank == 0:
            barrier()


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def make_pictures(
    args: argparse.Namespace,
    writer: DatasetWriter,
    maker: Pipeline,
    geometries: FolderViews | SceneViews | None,
    requests: list[Request],
    first_index: dict[int | None, int],
    common: dict[str, Any],
    quiet: bool,
) -> None:
    """Make the requests batch by batch and write each picture as it is finished.

    first_index  of each geometry: the number that its condition files carry
    common       what all records say
    """
    features, annotation = {}, {}  # by geometry; only those of the current batch are kept
    batch_size = args.batch_size or (8 if common["height"] < 512 else 2)
    with tqdm(total=len(requests), unit="picture", disable=quiet) as bar:
        for start in range(0, len(requests), batch_size):
            batch = requests[start : start + batch_size]
            numbers = {request.geometry for request in batch} - {None}
            features, annotation = ({k: old[k] for k in old.keys() & numbers} for old in (features, annotation))
            for k in sorted(numbers - features.keys()):
                geometry = geometries[k]
                conditions = geometry.conditions_or_blank(common["height"], common["width"])
                features[k] = maker.features(stack_conditions([conditions]))
                annotation[k] = geometry.write(args.out, first_index[k])
            images = maker.pictures(
                [request.prompt for request in batch],
                join_features([features[request.geometry] for request in batch]) if args.conditions else None,
                [picture_generator(args.seed, request.index) for request in batch],
                lambda step, steps: bar.set_postfix_str(f"step {step} of {steps}"),
            )
            for request, image in zip(batch, images, strict=True):
                record = annotation.get(request.geometry, {}) | common | {"text": request.prompt}
                record |= {"file_name": f"images/{request.index:06d}.png", "source_index": request.source_index}
                record = complete_record(request.index, record)
                writer.append(write_pictures(args.out, request.index, record, image, png_text=png_text(record)))
                bar.update()


def main(args: argparse.Namespace) -> None:
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if args.threads:
        torch.set_num_threads(args.threads)
    keep_freed_memory()
    device = choose_device(args, rank)
    model, checkpoint, dtype = load_model(args, device)
    config, settings = model.config, sampling_settings(args, model)
    geometries, prompts = choose_geometries(args, model), choose_prompts(args, model)
    requests = plan(geometries, prompts, args.count)
    if world_size > 1:
        dist.init_process_group("gloo", timeout=timedelta(days=7))
    description = describe(args, settings, checkpoint, dtype, geometries, prompts)
    writer = open_folder(args.out, description, rank, world_size)
    barrier()  # every rank has seen the same finished records
    todo = [request for request in requests if not writer.done(request.index)]
    if not todo:
        say(rank, f"all {len(requests)} pictures are in {args.out} already: nothing to do")
        return
    for mesh in getattr(geometries, "meshes", []):
        say(rank, *(f"{mesh.object_id}: {note}" for note in mesh.notes))
    if config.name == "tiny" and (words := untaught_words([request.prompt for request in requests])):
        say(rank, f"hint: the tiny model was never taught the words {', '.join(words[:8])}")
    trained = f"{config.name}, stage {model.metadata.get('stage')}, step {model.metadata.get('step')}"
    say(rank, f"{checkpoint['name']} ({trained}), {dtype} on {device}; {settings.sampler}, "
        f"{settings.num_inference_steps} steps, guidance {settings.guidance_scale:g}",
        f"{len(requests)} pictures of {config.image_size} px -> {args.out}, "
        f"{len(requests) - len(todo)} are there already")  # fmt: skip
    if warning := normals_differ(model, normal_sources(geometries)):
        say(rank, warning)
    prepare_grasps(geometries, todo, rank)
    if isinstance(geometries, SceneViews):
        say(rank, f"conditions drawn by {geometries.renderer_used()}")
    first_index: dict[int | None, int] = {}
    for request in requests:
        first_index.setdefault(request.geometry, request.index)
    common = {key: value for key, value in vars(settings).items() if key in RECORD_KEYS}
    common |= {"seed": args.seed, "checkpoint": checkpoint, "height": config.image_size, "width": config.image_size}
    mine = [todo[i] for i in np.array_split(np.arange(len(todo)), world_size)[rank]]
    make_pictures(args, writer, Pipeline(model, settings), geometries, mine, first_index, common, quiet=rank > 0)
    barrier()
    writer.finish()
    say(rank, f"{len(todo)} new pictures, {len(requests)} in all; look at {args.out / 'grid.png'}")
    if geometries is not None:
        say(rank, f"validate the annotation with: python make_dataset.py --check {args.out}")


@problems_as_messages("sample.py", "\ninterrupted: finished pictures are complete; the same command continues")
def run(arguments: list[str] | None = None) -> None:
    try:
        main(parse_args(arguments))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    run()
