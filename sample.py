"""Generate pictures of hands grasping objects, each with its 3D annotation: a dataset folder whose pictures are new.

    python sample.py                                          # mug, bowl, bottle, can in several looks -> ./out
    python sample.py --object path/to/mug.stl --prompt "A hand is grasping a pink {object} on the beach" --count 8
    python sample.py --scenes docs/example_scenes.jsonl --out out/mine          # your cameras, poses, grasps
    python sample.py --data data/test --out out/test          # conditions and texts of a folder of make_dataset.py
    python sample.py --data data/test --prompts-file looks.txt --cond-scale normal=0.5 --out out/looks
    python sample.py --base model_sd_5000.ckpt --adapter model_ad_5000.pth      # 512 px, the official release's weights
    python sample.py --no-conditions --checkpoint runs/base/model.safetensors --count 1000 --out data/background_buffer
    torchrun --nproc-per-node 2 sample.py --data data/test    # the same pictures, shared between processes

It prints what it uses, a progress bar, and what to look at (grid.png).  Running the same command again continues where
it stopped; record i depends on --seed and i alone.  Every PNG holds its record (text chunk `hoi`).  Paper: Sec. 3.3, 4.
"""

# ruff: noqa: E402
import hoi  # noqa: F401 - before torch: says how its threads wait

# isort: split
import argparse
from pathlib import Path

from hoi.common.choices import CATEGORIES, DREAMBOOTH_CAPTION, GRASPS
from hoi.common.command import (
    add_mesh_flags,
    add_model_flags,
    add_sampling_flags,
    add_size_flags,
    default_cache,
    not_negative,
    positive,
)
from hoi.geometry.camera import FRAMINGS


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """The flags; those that contradict each other end the script before anything is loaded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    what = parser.add_argument_group("geometry: objects, a folder, or none")
    what.add_argument("--object", nargs="+", metavar="PATH|NAME",
                      help=f"mesh files, folders of meshes, or built-in objects (default: {' '.join(CATEGORIES)})")
    what.add_argument("--data", type=Path, nargs="+", metavar="DIR",
                      help="take conditions and annotation from dataset folders, in this order")
    what.add_argument("--scenes", type=Path, metavar="FILE",
                      help="scenes of your own, JSON objects, one a line: object, camera, hand in metres and pixels "
                      "(docs/data.md)")
    what.add_argument("--camera", type=Path, metavar="FILE",
                      help="for --scenes: the camera of those that have none, JSON: intrinsics, width and height in "
                      "pixels, pose in metres")
    what.add_argument("--conditions", action=argparse.BooleanOptionalAction, default=True,
                      help="--no-conditions samples from text alone: scenery, the background buffer (Sec. 3.3)")
    add_mesh_flags(what.add_argument)
    what.add_argument("--hand-side", choices=("right", "left", "random"), default="right", help="for --object")
    what.add_argument("--framing", choices=FRAMINGS,
                      help="for --object; official: 60 degrees field of view, tight: zoomed in (default: as the "
                      "checkpoint was trained: tight for tiny, official for sd1)")
    add_size_flags(what.add_argument, "those of --data, else what the checkpoint was made for")
    what.add_argument("--grasps-per-object", type=positive, default=GRASPS, metavar="G",
                      help="searched once and cached")
    what.add_argument("--mano", metavar="FILE", help="official MANO_RIGHT.pkl (default: the built-in hand)")
    what.add_argument("--cache", type=Path, default=default_cache(), metavar="DIR",
                      help="found grasps (default: %(default)s)")
    text = parser.add_argument_group("text")
    text.add_argument("--prompt", nargs="+", metavar="TEXT",
                      help="{object} stands for the object's name; every geometry with every prompt (default: a few "
                      "looks of the paper's figures; with --data each record's own text)")
    text.add_argument("--prompts-file", type=Path, metavar="FILE", help="one prompt a line, # begins a comment line")
    add_sampling_flags(parser)
    add("--count", type=positive, metavar="N",
        help="pictures (default: each combination of geometry and prompt once)")
    add("--seed", type=not_negative, default=0, help="of noise, views and grasps (default: %(default)s)")
    add("--out", type=Path, default=Path("out"), metavar="DIR", help="the dataset folder (default: %(default)s)")
    add("--save-steps", action="store_true", help="also write OUT/steps/NUMBER.png: what the network takes the picture "
        "for (x0) after each step, in a row")
    add("--batch-size", type=positive, metavar="B", help="pictures at once (default: on a CPU 8, 2 of 512 px; on a GPU "
        "as its free memory allows, up to 16 of 512 px)")
    add_model_flags(parser)
    args = parser.parse_args(arguments)
    sources = [f"--{name}" for name in ("data", "object", "scenes") if getattr(args, name)]
    if len(sources) > 1:
        parser.error(f"{' and '.join(sources)} exclude each other: each brings its own objects")
    stray = sources + ["--cond-scale"] * bool(args.cond_scale) + ["--cond-tau"] * (args.cond_tau != 1)
    if not args.conditions and stray:
        parser.error(f"--no-conditions samples from text alone: drop {stray[0]}")
    if args.camera and not args.scenes:
        parser.error("--camera is for --scenes")
    if args.data is not None and (args.size or args.height or args.width):
        parser.error("--data brings the size of its pictures: drop --size, --height and --width")
    if args.prompt and args.prompts_file:
        parser.error("--prompt and --prompts-file exclude each other")
    words = [prompt for prompt in args.prompt or [] if prompt.isascii() and len(prompt.split()) == 1]
    if words and len(args.prompt) > 1:
        parser.error(f"--prompt takes {len(args.prompt)} texts here, {words[0]!r} is one: put a sentence in quotes,"
                     f' --prompt "{" ".join(args.prompt)}", and prompts of one word into a --prompts-file')
    return args


if __name__ == "__main__":
    parse_args()  # --help and mistakes are told before the seconds that these imports take

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from hoi.common.command import problems_as_messages
from hoi.common.files import encode_png, sha256_of, short_hash, write_whole
from hoi.common.machine import (
    barrier,
    free_device_memory,
    join_processes,
    leave_processes,
    rank_and_world_size,
)
from hoi.common.sheets import contact_sheet
from hoi.data.scenes import SceneFile
from hoi.data.views import FileViews, FolderViews, Request, SceneViews, content_of, plan
from hoi.data.writer import DatasetWriter, folder_description, write_pictures
from hoi.geometry.hand import load_hand
from hoi.geometry.objects import collect_objects
from hoi.geometry.scene import ViewSettings
from hoi.network.config import ModelConfig
from hoi.network.model import stack_conditions
from hoi.network.pipeline import Pipeline, join_features, picture_generator, pictures_at_once
from hoi.network.text import reading_hints
from hoi.toyworld.words import DEFAULT_PROMPTS, default_scenery_prompts, read_prompts, untaught_words
from hoi.weights.load import load_pipeline, normals_differ

Views = FolderViews | SceneViews | None  # where conditions come from; None: from nowhere, text alone


def picture_size(args: argparse.Namespace, config: ModelConfig) -> tuple[int, int]:
    """Height and width that were asked for, pixels, where no folder says them."""
    return args.height or args.size or config.image_size, args.width or args.size or config.image_size


def choose_views(args: argparse.Namespace, config: ModelConfig) -> Views:
    """Where conditions come from."""
    if not args.conditions:
        return None
    if args.data is not None:
        return FolderViews(*args.data)
    # As the model was trained: pictures in another framing look wrong.
    framing = args.framing or ("tight" if config.name == "tiny" else "official")
    seen = ViewSettings(*picture_size(args, config), args.hand_side, framing)
    hand = load_hand(args.mano)
    if args.scenes is not None:
        scenes = SceneFile(args.scenes, hand, seen, args.seed, args.cache, args.camera, args.mano)
        return FileViews(scenes, hand)
    meshes = collect_objects(args.object or CATEGORIES, category=args.category, units=args.units, up=args.up)
    return SceneViews(meshes, hand, seen, args.seed, args.grasps_per_object, args.cache)


def normal_sources(views: Views) -> set[str | None]:
    """Where the normal maps come from: rendered here, or what the folder's records say."""
    if isinstance(views, FolderViews):
        return {record.get("normal_source") for record in views.records}
    return set() if views is None else {"geometry"}


def choose_prompts(args: argparse.Namespace, config: ModelConfig) -> list[str] | None:
    """Prompts, the object's name not yet filled in; None: every record of the folder with its own text."""
    if args.prompts_file is not None:
        return read_prompts(args.prompts_file)
    if args.prompt:
        if not all(prompt.strip() for prompt in args.prompt):
            raise ValueError("a --prompt is empty; to sample without text use --guidance-scale 0")
        return args.prompt
    if not args.conditions:
        return default_scenery_prompts(config.name)
    return None if args.data is not None else list(DEFAULT_PROMPTS)


def describe(
    args: argparse.Namespace, pipeline: Pipeline, views: Views, prompts: list[str] | None
) -> dict[str, Any]:
    """What goes to dataset.json; "job" decides the pictures, and another job must not continue in the same folder."""
    told = None if prompts is None else short_hash(json.dumps(prompts))
    job = pipeline.job(args.seed) | {"prompts": told, "conditions": args.conditions}
    meshes = None
    if isinstance(views, FolderViews):
        # Folders grow, and cards and scores are added: what was asked for are these three of each record.
        rows = [[record["index"], record["text"], record["keypoints_2d"]] for record in views.records]
        job |= {"data": short_hash(json.dumps(rows)), "data_content": content_of(views.records)}
    elif views is not None:
        meshes = views.meshes
        job["objects"] = [f"{m.object_id} {hashlib.sha256(m.vertices.tobytes()).hexdigest()[:8]}" for m in meshes]
        job |= {"hand_side": args.hand_side, "framing": views.settings.framing, "hand": views.hand.name,
                "grasps_per_object": args.grasps_per_object}  # fmt: skip
        files = {"scenes": args.scenes, "camera": args.camera}
        job |= {name: sha256_of(path)[:16] for name, path in files.items() if path}
        job |= {"hand_content": sha256_of(args.mano)} if args.mano else {}
    size, side = picture_size(args, pipeline.model.config), pipeline.model.config.image_size
    # Older folders, whose pictures are of the model's own size, do not say it: they go on.
    job |= {"size": f"{size[1]} x {size[0]}"} if args.data is None and size != (side, side) else {}
    return folder_description("sample.py", job, args.seed, pipeline.checkpoint, meshes=meshes, sources=args.data or ())


def say(rank: int, *lines: str) -> None:
    """Print lines in the first process alone."""
    if rank == 0 and lines:
        print(*lines, sep="\n", flush=True)


def batches(
    requests: list[Request], size_of: Callable[[Request], tuple[int, int]], most: int | None, free: int
) -> Iterator[tuple[tuple[int, int], list[Request]]]:
    """Requests in order, together as long as their size is the same: (height, width) and at most so many requests.

    most, free  how many, or None, and bytes of a GPU's memory that decide it then
    """
    for (height, width), alike in itertools.groupby(requests, size_of):
        alike = list(alike)
        count = most or pictures_at_once(height, width, free)
        yield from (((height, width), alike[start : start + count]) for start in range(0, len(alike), count))


def prepare_grasps(views: SceneViews, requests: list[Request], rank: int) -> None:
    """Search grasps before the first picture.  Rank 0 first: the others read what it found."""
    if rank > 0:
        barrier()
    needed = sorted({request.view % len(views) for request in requests})
    for k in tqdm(needed, "grasps", unit="object", disable=rank > 0):
        views.prepare(k)
    if rank == 0:
        barrier()


def main(args: argparse.Namespace) -> None:
    """Make the pictures of the job that are missing, this process's share of them batch by batch."""
    rank, world_size = rank_and_world_size()
    if args.threads:
        torch.set_num_threads(args.threads)
    pipeline = load_pipeline(
        args.checkpoint, args.base, args.adapter, vae=args.vae, with_conditions=args.conditions, device=args.device,
        dtype=args.dtype, compiled=args.compile, sampler=args.sampler, num_inference_steps=args.steps,
        guidance_scale=args.guidance_scale, negative_prompt=args.negative_prompt, cond_weights=dict(args.cond_scale),
        cond_tau=args.cond_tau,
    )  # fmt: skip
    config, settings, metadata = pipeline.model.config, pipeline.settings, pipeline.model.metadata
    views, prompts = choose_views(args, config), choose_prompts(args, config)
    requests = plan(views, prompts, args.count)
    # A process that is done waits at the end for the slowest one: hours, where each picture takes minutes.
    join_processes("gloo", rank, world_size, timedelta(days=7))
    writer = DatasetWriter(args.out, describe(args, pipeline, views, prompts), rank, world_size)
    barrier()  # every rank has seen the same finished records
    todo = [request for request in requests if not writer.done(request.index)]

    def size_of(request: Request) -> tuple[int, int]:
        """Height and width of the picture, pixels."""
        return picture_size(args, config) if views is None else views.size(request.view)

    if not todo:
        writer.finish()  # the run that made the last of them may have been ended before it could
        say(rank, f"all {len(requests)} pictures are in {args.out} already: nothing to do")
        return
    for mesh in getattr(views, "meshes", []):
        say(rank, *(f"{mesh.object_id}: {note}" for note in mesh.notes))
    asked = [request.prompt for request in requests]
    say(rank, *reading_hints([*asked, settings.negative_prompt]))
    taught = DREAMBOOTH_CAPTION.split() if metadata.get("baseline") == "dreambooth" else []
    if config.name == "tiny" and (words := [word for word in untaught_words(asked) if word not in taught]):
        say(rank, f"hint: the tiny model was never taught the words {', '.join(words[:8])}")
    baseline = f", baseline {metadata['baseline']}" if "baseline" in metadata else ""
    say(rank, f"{pipeline.checkpoint['name']} ({config.name}, stage {metadata.get('stage')}{baseline}, step "
        f"{metadata.get('step')}), {pipeline.dtype} on {pipeline.device}; {settings.sampler}, "
        f"{settings.num_inference_steps} steps, guidance {settings.guidance_scale:g}",
        f"{len(requests)} pictures -> {args.out}, {len(requests) - len(todo)} are there already")  # fmt: skip
    if note := config.size_note(map(size_of, todo)):
        say(rank, note)
    if warning := normals_differ(pipeline.model, normal_sources(views)):
        say(rank, warning)
    if isinstance(views, SceneViews):
        prepare_grasps(views, todo, rank)
        say(rank, f"conditions drawn by {views.renderer}")
    first_index: dict[int | None, int] = {}  # of each view: the number that its condition files carry
    for request in requests:  # all, not only those to do: a continued job writes to the same names
        first_index.setdefault(request.view, request.index)

    # Neighbours stay in one process: they share a view, whose features are computed once.
    mine = [todo[i] for i in np.array_split(np.arange(len(todo)), world_size)[rank]]
    features, annotation = {}, {}  # by view; only those of the current batch are kept: a view has megabytes of them
    free = free_device_memory(str(pipeline.device))
    bar = tqdm(total=len(mine), unit="picture", disable=rank > 0)

    def write(batch: list[Request], images: np.ndarray, annotation: dict[int | None, dict[str, Any]]) -> None:
        """Files and records of a batch."""
        for request, image in zip(batch, images, strict=True):
            record = annotation.get(request.view, {}) | pipeline.record_entries(args.seed)
            record |= {"text": request.prompt, "source_index": request.source_index}
            writer.append(write_pictures(args.out, request.index, record, image))
            bar.update()

    # A thread writes a batch while the next one is made; when this block ends, however it does, it has.
    with writer, bar, ThreadPoolExecutor(max_workers=1) as pen:
        writing: Future | None = None
        for (height, width), batch in batches(mine, size_of, args.batch_size, free):
            numbers = {request.view for request in batch} - {None}  # None: text alone
            features, annotation = ({k: old[k] for k in old.keys() & numbers} for old in (features, annotation))
            for k in sorted(numbers - features.keys()):
                view = views[k]
                conditions = stack_conditions([view.conditions], height, width)
                features[k] = pipeline.features(conditions)
                annotation[k] = view.write(args.out, first_index[k])
            seen: list[torch.Tensor] = []  # x0 (B, 4, h, w) after each step

            def tell(step: int, steps: int, x0: torch.Tensor, seen: list[torch.Tensor] = seen) -> None:
                bar.set_postfix_str(f"step {step} of {steps}", refresh=False)
                bar.update(0)  # shown when it is time to: see hoi/__init__.py
                if args.save_steps:
                    seen.append(x0)

            images = pipeline.pictures(
                [request.prompt for request in batch],
                join_features([features[request.view] for request in batch]) if args.conditions else None,
                [picture_generator(args.seed, request.index) for request in batch],
                tell,
                height,
                width,
            )
            for k, request in enumerate(batch if args.save_steps else ()):
                # Decoded a picture at a time: all steps of a batch would take much memory.
                strip = contact_sheet([[pipeline.decode(x0[k : k + 1], height, width)[0] for x0 in seen]])
                write_whole(args.out / "steps" / f"{request.index:06d}.png", encode_png(np.asarray(strip)))
            if writing:
                writing.result()  # tells what went wrong
            writing = pen.submit(write, batch, images, annotation)
        if writing:
            writing.result()
    barrier()
    writer.finish()
    say(rank, f"{len(todo)} new pictures, {len(requests)} in all; look at {args.out / 'grid.png'}",
        f"or at all of them in a browser: python -m hoi.page {args.out}")
    if views is not None:
        say(rank, f"validate the annotation with: python make_dataset.py --check {args.out}")


@problems_as_messages("sample.py", "\ninterrupted: finished pictures are complete; the same command continues")
def run(arguments: list[str] | None = None) -> None:
    """The script as a command; None: the command line's arguments."""
    main(parse_args(arguments))
    leave_processes()


if __name__ == "__main__":
    run()
