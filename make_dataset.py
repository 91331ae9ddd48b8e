"""Make a dataset folder: object meshes or real pictures in; condition images and full 3D annotation out.

    python make_dataset.py                                          # 100 records of mug, bowl, bottle, can in ./data
    python make_dataset.py --object scans/mug.stl scans/ --count 500 --size 512 --out data/scans
    python make_dataset.py --object mug --frames 12 --count 120 --out data/approach       # ten whole trajectories
    python make_dataset.py --shade --looks 4 --size 128 --framing tight --count 4000 --out data/toy   # with pictures
    python make_dataset.py --dexycb DexYCB --split s0 train --mano MANO_RIGHT.pkl --workers 8 --out data/dexycb
    python make_dataset.py --csv train.csv --normals estimated --out data/hoi4d         # the authors' own format
    python make_dataset.py --scenes docs/example_scenes.jsonl --shade --out data/mine     # your cameras, poses, grasps
    torchrun --nproc-per-node 2 make_dataset.py --out data/shared   # the same records, shared between processes
    python make_dataset.py --check data/toy

It prints what it found in the meshes, or why frames of a real dataset were rejected, a progress bar with the time left,
and what to look at (grid.png).  Running the same command again continues where it stopped; record i depends on --seed
and i alone, not on --workers or --count.  Paper: Sec. 3.2 (grasp, trajectory, rendering), 4 (training data).
"""

# ruff: noqa: E402
import os

# Before numpy starts its threads: the arrays are small, and threads that wait for each other cost three times the work.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hoi  # noqa: F401 - before torch: says how its threads wait

# isort: split
import argparse
from pathlib import Path

from hoi.common.choices import (
    CATEGORIES,
    CONTENTS,
    DPT_HYBRID,
    DTYPES,
    MARGIN,
    MIN_AREA,
    NORMALS,
    STROKES,
    TINY_SIDE,
)
from hoi.common.command import add_mesh_flags, add_size_flags, default_cache, positive, usable_cpus
from hoi.geometry.camera import CAMERA_FOV_DEG, FRAMINGS


def parse_content(word: str) -> tuple[str, float]:
    """hand_object=0.6 -> its name and share; a name alone has the share 1."""
    name, _, share = word.partition("=")
    if name not in CONTENTS:
        raise argparse.ArgumentTypeError(f"{name!r} is no content; choose from {', '.join(CONTENTS)}")
    try:
        value = float(share or 1)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"share of {name} is {share!r}, expected a positive number, e.g. {name}=0.5")
    return name, value


def parse_range(word: str) -> str:
    """START:STOP:STEP, kept as it was written."""
    try:
        slice_of(word)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{word!r} is no START:STOP:STEP of whole numbers, e.g. 20:60:4") from None
    return word


def slice_of(word: str) -> slice:
    """START:STOP:STEP as Python writes it; a single number is that frame alone."""
    if ":" not in word:
        return slice(int(word), int(word) + 1)
    return slice(*(int(part) if part else None for part in word.split(":")))


def add_object_flags(parser: argparse.ArgumentParser) -> None:
    """Meshes, their size and pose, and whose hands grasp them how."""
    add = parser.add_argument_group("objects and hands").add_argument
    add("--object", nargs="+", metavar="PATH|NAME",
        help=f"mesh files, folders of meshes, or built-in families (default: {' '.join(CATEGORIES)})")
    add("--scenes", type=Path, metavar="FILE",
        help="instead: scenes of your own, JSON objects, one a line: object, camera, hand in metres and pixels "
        "(docs/data.md); --count takes the first N (default: all)")
    add_mesh_flags(add)
    # The defaults are 16 objects with 8 grasps each: a minute of search on one core, once, for a first try.
    add("--object-instances", type=positive, default=4, metavar="K", help="random shapes of each built-in family")
    add("--object-seed", type=int, default=0, metavar="N",
        help="first shape; families use shapes N to N+K-1, so train and held-out sets need not overlap")
    add("--grasps-per-object", type=positive, default=8, metavar="G",
        help="grasps searched for each object; found ones are cached")
    add("--hand-side", choices=("right", "left", "random"), default="right",
        help="left hands are mirrored right ones; random: each scene draws one (default: %(default)s)")
    add("--mano", metavar="FILE", help="official MANO_RIGHT.pkl, which gives both hands (default: the built-in hand)")
    add("--grasp", choices=("builtin", "grabnet"), default="builtin",
        help="builtin: searched without learned weights; grabnet: drawn with GrabNet's, which needs --grabnet and "
        "--mano (default: builtin)")
    add("--grabnet", metavar="DIR", help="folder with coarsenet.pt, refinenet.pt and bps.npz")
    add("--content", nargs="+", type=parse_content, default=[("hand_object", 1.0)], metavar="WHAT=SHARE",
        help="mixture of hand_object, object, hand, scenery; e.g. --content hand_object=0.6 object=0.2 scenery=0.2 "
        "(scenery needs --shade; default: hand_object alone)")


def add_view_flags(parser: argparse.ArgumentParser) -> None:
    """How a scene is looked at, and which moments of the approach."""
    add = parser.add_argument_group("views and frames").add_argument
    add_size_flags(add, f"{TINY_SIDE} and tight, what sample.py takes by default; of real pictures 512")
    add("--official-view", action=argparse.BooleanOptionalAction, default=False,
        help="azimuth 0 to 0.1 degrees as in the official release, instead of 0 to 360")
    add("--framing", choices=FRAMINGS,
        help="official: the whole field of view; tight: zoomed in, the wrist near the border (default: official, or "
        "tight where neither size nor view is given)")
    add("--camera", default="official", metavar="WHICH",
        help="official: 60 degrees field of view; nocs: 45.1 degrees, the middle of a NOCS-CAMERA frame, for python -m "
        "hoi.export --format nocs; or with --scenes a JSON file with the camera of all scenes that have none: "
        "intrinsics, width, height in pixels, pose in metres (default: official)")
    add("--upright", type=float, default=0.5, metavar="SHARE",
        help="share of scenes whose object stands upright; in the others object and hand are turned at random, as in "
        "the paper; objects without a hand always stand. Folders begun before this flag go on with 1 (default: 0.5)")
    add("--frames", type=positive, default=1, metavar="F",
        help="frames of the approach, the last one is the grasp; 1 is the grasp alone (official: 8)")
    add("--start-distance", type=float, metavar="M",
        help="metres from the start of the approach to the grasp (default: paper 0.15, official 0.3)")
    add("--trajectory", choices=("paper", "official"), default="paper",
        help="paper: from vertically above (Sec. 3.2); official: the released code's variant")
    add("--keep-outside", action=argparse.BooleanOptionalAction, default=False,
        help="also write frames whose hand leaves the picture (hand_in_picture is false)")


def add_look_flags(parser: argparse.ArgumentParser) -> None:
    """What is drawn and said of a rendered scene."""
    add = parser.add_argument_group("texts and toy-world pictures").add_argument
    add("--shade", action=argparse.BooleanOptionalAction, default=False,
        help="draw pictures in random looks with captions; otherwise conditions only")
    add("--looks", type=positive, default=1, metavar="L",
        help="pictures of each geometry in different looks; they share their condition images")
    add("--style", choices=("any", "lab", "scenic"), default="any",
        help="any look, laboratory tables and walls only, or everything but these")
    add("--paraphrase", action=argparse.BooleanOptionalAction, default=True,
        help="word some captions differently; --no-paraphrase gives the paper's template always")
    add("--text", metavar="TEMPLATE",
        help='text without --shade, {object} is the noun (default: "A hand is grasping a {object}")')


def add_real_picture_flags(parser: argparse.ArgumentParser) -> None:
    """Which frames of which dataset, and how they become records."""
    real = parser.add_argument_group(
        "real pictures instead of objects", "Frames that give no record are counted by reason in dataset.json and "
        "listed in rejected.jsonl. --size, --text, --mano, --count, --seed, --workers and --out apply too.")
    source = real.add_mutually_exclusive_group()
    source.add_argument("--dexycb", type=Path, metavar="ROOT",
                        help="DexYCB: the folder with 20200709-subject-01 ... and calibration")
    source.add_argument("--csv", type=Path, metavar="FILE",
                        help="CSV of the authors' release (HOI4D, OakInk, ...), or its regularisation CSV")
    add = real.add_argument
    add("--split", nargs="+", metavar="WORD",
        help="of DexYCB: s0, s1, s2 or s3, then train, val or test (default: every frame)")
    add("--subjects", nargs="+", metavar="S", help="numbers from 1, or names, of DexYCB's subjects")
    add("--sequences", nargs="+", metavar="NAME", help="names of sequence folders")
    add("--cameras", nargs="+", metavar="SERIAL", help="serial numbers of DexYCB's cameras")
    add("--frame-range", type=parse_range, default=":", metavar="A:B:STEP",
        help="frames of each sequence, from A up to but without B (default: all)")
    add("--shuffle", action=argparse.BooleanOptionalAction, default=False,
        help="take the frames in an order drawn from --seed, so that --count N is a fair sample")
    add("--models", type=Path, metavar="DIR",
        help="folders of YCB models, <name>/textured_simple.obj (default: ROOT/models)")
    add("--margin", type=int, default=MARGIN, metavar="PX",
        help="of the crop around hand and object, in pixels of the source (default: 50, the authors')")
    add("--min-area", type=positive, default=MIN_AREA, metavar="PX",
        help="reject frames that show fewer pixels of hand or object (default: %(default)s)")
    add("--strokes", choices=STROKES, default="crop",
        help="crop: skeletons drawn at --size, as for rendered scenes; source: drawn in the source's pixels and "
        "enlarged with the picture, as the released code does (default: crop)")
    add("--normals", choices=NORMALS,
        help="rendered: from hand and object meshes; sensor-depth; depth-files: see --depth-files; estimated: from a "
        "depth that a network sees in the crop, as in the paper (default: rendered, for --csv estimated)")
    add("--depth-files", type=Path, metavar="DIR",
        help="DIR/<source_frame>.npy, inverse depth in MiDaS's range, or .png, 16-bit millimetres; of the whole "
        "picture or of the square crop")
    add("--depth-model", default=DPT_HYBRID, metavar="NAME",
        help="DPT network for --normals estimated, by folder or hub name (default: %(default)s)")
    add("--captions", type=Path, metavar="FILE",
        help=".csv or .jsonl of picture and caption, put in place of the template; the pictures are those in images/ "
        "of the finished folder: run the same command again with this flag")
    add("--captioner", metavar="NAME",
        help="describe the crops with a LLaVA network of transformers, by folder or hub name, e.g. "
        "llava-hf/llava-1.5-7b-hf")
    add("--device", help="of --normals estimated and --captioner: cpu, cuda, cuda:1, xpu, mps (default: a GPU where "
        "there is one)")
    add("--dtype", choices=("auto", *DTYPES), default="auto", help="of --captioner (default: what is fast; the depth "
        "network is always in float32: normals are its slopes)")
    add("--batch-size", type=positive, metavar="B", help="pictures that --captioner sees at once (default: 1 on a CPU, "
        "8 on a GPU)")
    add("--threads", type=positive, metavar="T", help="of --normals estimated and --captioner on a CPU (default: all "
        "cores)")


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; a combination of flags that cannot be meant ends with a message, as argparse does it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for add_flags in (add_object_flags, add_view_flags, add_look_flags, add_real_picture_flags):
        add_flags(parser)
    add = parser.add_argument
    add("--count", type=positive, metavar="N",
        help="records, rounded up to whole scenes of --frames x --looks records (default: 100); of real pictures the "
        "first N frames (default: all)")
    add("--seed", type=int, default=0, help="of grasps, views and looks (default: %(default)s)")
    add("--workers", type=positive, default=1, metavar="W", help="processes; the result is the same for any number")
    add("--cache", type=Path, default=default_cache(), metavar="DIR", help="found grasps (default: %(default)s)")
    add("--out", type=Path, default=Path("data"), metavar="DIR", help="the dataset folder (default: %(default)s)")
    add("--check", type=Path, nargs="+", metavar="DIR",
        help="only validate folders: files, keypoints, masks and depth against a re-render; exits 1 on a problem")
    args = parser.parse_args(arguments)
    args.content = dict(args.content)
    # Defaults that depend on what is made: of a real dataset all frames are wanted, of scenes there is no end; and the
    # authors' CSV has no meshes to render normals from.
    if args.count is None and not wants_real_pictures(args) and not args.scenes:
        args.count = 100
    args.camera_file = None
    if args.camera not in CAMERA_FOV_DEG:
        args.camera, args.camera_file = "official", Path(args.camera)
    args.normals = args.normals or ("estimated" if args.csv else "rendered")
    if args.framing is None:  # what is made without further words is for the built-in model, which knows tight framing
        told = args.size or args.height or args.width or args.official_view or args.camera == "nocs"
        args.framing = "official" if told else "tight"
    side = args.size or (512 if wants_real_pictures(args) else TINY_SIDE)
    args.height, args.width = args.height or side, args.width or side
    if problem := contradiction(args):
        parser.error(problem)
    return args


def wants_real_pictures(args: argparse.Namespace) -> bool:
    """Whether the records come from a real dataset instead of object meshes."""
    return bool(args.dexycb or args.csv)


def contradiction(args: argparse.Namespace) -> str | None:
    """What is wrong with a combination of flags, if anything is: a flag that would do nothing is refused."""
    real = wants_real_pictures(args)
    refused = (  # whether it is wrong, and what is told then
        ((args.captions or args.captioner) and not real,
         "--captions and --captioner are for real pictures: pass --dexycb or --csv as well"),
        ((args.device or args.threads) and not (real and (args.captioner or args.normals == "estimated")),
         "--device and --threads are for --normals estimated and --captioner"),
        ((args.dtype != "auto" or args.batch_size) and not args.captioner,
         "--dtype and --batch-size are for --captioner"),
        (not args.dexycb and (args.subjects or args.cameras), "--subjects and --cameras are for --dexycb"),
        (args.csv and (args.split or args.sequences or args.frame_range != ":"),
         "--split, --sequences and --frame-range are for --dexycb; a CSV is taken as it is"),
        (args.scenes and (real or args.object or args.grasp != "builtin" or args.content != {"hand_object": 1.0}),
         "--scenes brings objects and hands: not with --object, --content, --grasp grabnet or real pictures"),
        (args.camera_file and not args.scenes,
         f"--camera is {args.camera_file}, expected {' or '.join(CAMERA_FOV_DEG)}, or with --scenes a file"),
        (args.camera == "nocs" and (args.framing == "tight" or real),
         "--camera nocs fixes the intrinsics of all pictures: not with --framing tight or real pictures"),
        (args.height != args.width and (real or args.camera == "nocs"),
         "real pictures are cut square, and NOCS takes square ones: pass --size alone"),
        (args.captions and args.captioner, "choose --captions or --captioner, not both"),
        (args.margin < 0, "--margin must not be negative"),
        ("scenery" in args.content and not args.shade,
         "--content scenery has neither hand nor object: it makes sense only with --shade"),
        (args.looks > 1 and not args.shade,
         "--looks needs --shade: without pictures the looks of a geometry would be equal"),
        (args.text is not None and args.shade,
         "--text is for records without --shade, whose pictures are described by the looks that are drawn"),
        ((args.style != "any" or not args.paraphrase) and not args.shade,
         "--style and --no-paraphrase need --shade: nothing is drawn without it"),
        (args.start_distance is not None and not 0 <= args.start_distance < float("inf"),
         f"--start-distance is {args.start_distance}, expected metres, 0 or more, e.g. 0.15"),
        (not 0 <= args.upright <= 1, f"--upright is {args.upright}, expected a share from 0 to 1, e.g. 0.5"),
        (args.seed < 0 or args.object_seed < 0, "--seed and --object-seed must not be negative"),
        (args.grasp == "grabnet" and not (args.grabnet and args.mano),
         "--grasp grabnet needs --grabnet DIR (coarsenet.pt, refinenet.pt, bps.npz) and, because its hands are MANO's, "
         "--mano FILE; their licences forbid shipping them. The default, --grasp builtin, needs neither"),
        (args.grabnet and args.grasp != "grabnet", "--grabnet is used only with --grasp grabnet"),
    )  # fmt: skip
    return next((message for is_wrong, message in refused if is_wrong), None)


if __name__ == "__main__":
    parse_args()  # --help and mistakes are told before the seconds that these imports take

import hashlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from hoi.common.command import first_few, problems_as_messages
from hoi.common.files import sha256_of, short_hash
from hoi.common.machine import (
    barrier,
    choose_device,
    fast_dtype,
    join_processes,
    leave_processes,
    mapper,
    rank_and_world_size,
)
from hoi.data.check import check_folder
from hoi.data.folder import read_description
from hoi.data.scene_maker import SceneMaker, SceneSettings
from hoi.data.scenes import SceneFile
from hoi.data.writer import HAND_TERMS, DatasetWriter, folder_description, refuse_other_job
from hoi.geometry.grabnet import load_grabnet
from hoi.geometry.hand import load_hand
from hoi.geometry.objects import ObjectMesh, collect_objects
from hoi.geometry.scene import GraspedObject, ViewSettings, graspable
from hoi.sources.captions import CAPTION_FILE, Captioner, apply_captions, caption_folder, read_captions
from hoi.sources.convert import ConversionSettings, check_needs, convert_source, fit_warning, summary
from hoi.sources.dexycb import DexYCB
from hoi.sources.frame import Source
from hoi.sources.official_csv import OfficialCSV
from hoi.toyworld.words import check_placeholders

LEFT_OUT_OF_FILE = "no further grasp was found, or hand or object is hidden, outside or behind the camera"
# How scenes were before these could be chosen.
OLD_SETTINGS = (("camera", "official"), ("upright", 1.0))
NOT_OF_JOB = ("view", "fov_deg", "intrinsics")  # said by the other entries
LEFT_OUT = "the hand leaves the picture, or hand or object is hidden"  # the only reasons why a scene gives no record


def scene_settings(args: argparse.Namespace) -> SceneSettings:
    """What decides the records of rendered scenes."""
    view = ViewSettings(
        args.height, args.width, args.hand_side, args.framing, args.official_view, CAMERA_FOV_DEG[args.camera],
        args.frames, args.start_distance, args.trajectory, args.upright,
    )  # fmt: skip
    return SceneSettings(
        seed=args.seed, content=args.content, grasps_per_object=args.grasps_per_object, view=view,
        keep_outside=args.keep_outside, shade=args.shade, looks=args.looks, style=args.style,
        paraphrase=args.paraphrase, text=args.text,
    )  # fmt: skip


def describe_scenes(
    args: argparse.Namespace, settings: SceneSettings, objects: list[GraspedObject], scenes: SceneFile | None = None
) -> dict[str, Any]:
    """What goes to dataset.json."""
    meshes = [item.object_mesh for item in objects] if scenes is None else scenes.meshes
    # A mesh file that was edited makes another job; the name alone would not show it.
    digest = [hashlib.sha256(mesh.vertices.tobytes() + mesh.faces.tobytes()).hexdigest()[:8] for mesh in meshes]
    # Without what older folders do not say, and square sizes in their words: they go on.
    job = asdict(settings) | asdict(settings.view) | {"camera": args.camera}
    job = {key: value for key, value in job.items() if (key, value) not in OLD_SETTINGS and key not in NOT_OF_JOB}
    height, width = job.pop("height"), job.pop("width")
    job["size"] = height if height == width else f"{width} x {height}"
    job |= {"hand": Path(args.mano).name if args.mano else "builtin", "rounds": True}  # folders of before drew lots
    job |= {"objects": [f"{mesh.object_id} {of}" for mesh, of in zip(meshes, digest, strict=True)]}
    job |= {"hand_content": sha256_of(args.mano)} if args.mano else {}
    job |= {"grasp": args.grasp, "grabnet": load_grabnet(args.grabnet).digest} if args.grasp != "builtin" else {}
    job |= {"scenes": sha256_of(args.scenes)[:16]} if args.scenes else {}
    job |= {"camera_file": sha256_of(args.camera_file)[:16]} if args.camera_file else {}
    licences = {"hand": HAND_TERMS["mano" if args.mano else "builtin"]}
    description = folder_description("make_dataset.py", job, args.seed, licences=licences, meshes=meshes)
    if args.grasp == "grabnet":
        description["licences"]["grasps"] = "GrabNet licence (non-commercial research)"
    for card, item in zip(description["objects"], objects, strict=False):  # of a scenes file there are none yet
        card["grasps"] = len(item.right) + len(item.left)
    return description


def describe_pictures(args: argparse.Namespace, source: Source) -> dict[str, Any]:
    """What goes to dataset.json; a folder begun with another job is refused instead of mixed."""
    job = {
        "split": args.split, "subjects": args.subjects, "sequences": args.sequences, "cameras": args.cameras,
        "frame_range": args.frame_range, "shuffle": args.shuffle, "size": args.height, "margin": args.margin,
        "paint_objects": "grasped", "normals": args.normals, "strokes": args.strokes,
        "min_area": args.min_area, "text": args.text, "source": source.name, "frames_selected": len(source),
        "hand": Path(args.mano).name if args.mano else None,
    }  # fmt: skip
    # Of paint_objects there is no other choice any more; folders in which all objects were painted do not go on.
    job |= {"seed": args.seed} if args.shuffle else {}
    job |= {"depth_model": args.depth_model} if args.normals == "estimated" else {}
    names = [source.frame_name(k) for k in (0, len(source) - 1)]
    job |= {"frames": f"{names[0]} to {names[1]} {short_hash(source.listing())}"}
    job |= {"depth_files": str(args.depth_files.resolve())} if args.depth_files else {}
    job |= {"hand_content": sha256_of(args.mano)} if args.mano else {}
    licences = {"pictures": f"terms of {source.name}, which stay with every picture"}
    licences |= {"hand": HAND_TERMS["mano"]} if args.mano else {}
    return folder_description("make_dataset.py", job, licences=licences)


@contextmanager
def continued_after(writer: DatasetWriter) -> Iterator[None]:
    """Ctrl-C in this block says how far the folder is, and that the same command goes on from there."""
    try:
        with writer:
            yield
    except KeyboardInterrupt:
        sys.exit(f"interrupted: {len(writer)} records are complete; the same command continues")


def find_all_grasps(settings: SceneSettings, meshes: list[ObjectMesh], run: Any) -> list[GraspedObject]:
    """Grasps of every object; objects without any are left out, and it is said; an error when none is left."""
    results = list(tqdm(run(SceneMaker.grasps_of, range(len(meshes))), "grasps", len(meshes), unit="object"))
    found, notes = [item for item, _ in results], [note for _, lines in results for note in lines]
    good = graspable(found, settings.sides, notes)
    kept = {item.object_mesh.object_id for item in good}
    bad = [item.object_mesh.object_id for item in found if item.object_mesh.object_id not in kept]
    print("\n".join(notes), end="\n" if notes else "")
    if bad:
        print(f"left out, no grasp was found: {', '.join(bad)}")
    return good


def make_scenes(args: argparse.Namespace) -> None:
    """Object meshes -> grasps -> records, scene by scene."""
    if args.mano:  # read here too, so that a bad file is refused before any worker starts
        load_hand(args.mano)
    if args.grasp == "grabnet":
        load_grabnet(args.grabnet)
    shapes = range(args.object_seed, args.object_seed + args.object_instances)
    settings, brought = scene_settings(args), None
    if args.scenes:
        brought = SceneFile(args.scenes, load_hand(args.mano), settings.view, args.seed, args.cache, args.camera_file,
                            args.mano)  # fmt: skip
    meshes = brought.meshes if brought else collect_objects(
        args.object or CATEGORIES, shapes, args.category, args.units, args.up)
    for mesh in meshes:
        print("\n".join(f"{mesh.object_id}: {note}" for note in mesh.notes), end="\n" if mesh.notes else "")
    # Before minutes of search; objects without grasps drop out, so the list of objects is compared after it.
    refuse_other_job(args.out, describe_scenes(args, settings, []), ignoring=("objects",))
    per_scene = args.frames * settings.looks
    # Whole scenes: a trajectory must not end on the way.
    scenes = min(args.count or len(brought), len(brought)) if brought else -(-args.count // per_scene)
    records_of = partial(settings.numbers_of, scenes=brought)
    build = partial(SceneMaker, settings, meshes, args.out, args.cache, args.mano, args.grabnet, brought)
    rank, world_size = rank_and_world_size()
    join_processes("gloo", rank, world_size, timedelta(days=7))  # until the slowest is done
    with mapper(args.workers, build) as run:
        # The first task, so that a renderer that cannot start is told before the search.
        print(f"renderer: {next(iter(run(SceneMaker.renderer_used, [0])))}")
        if rank > 0:
            barrier()
        objects = [] if brought else find_all_grasps(settings, meshes, run)  # those of a file when they are needed
        if rank == 0:
            barrier()  # the others read what it found
        writer = DatasetWriter(args.out, describe_scenes(args, settings, objects, brought), rank, world_size)
        barrier()  # every rank has seen the same finished records
        before, left_out = len(writer), sum((read_description(args.out).get("rejected") or {}).values())
        todo = [k for k in range(scenes) if not all(map(writer.done, records_of(k)))]
        total = records_of(scenes - 1).stop
        print(f"{scenes} scenes, {total} records -> {args.out}, {len(writer)} records are there already")
        faulty: dict[int, str] = {}  # line of the scenes file -> what its grasp has that ours must not have
        mine = np.array_split(todo, world_size)[rank].tolist()
        bar = tqdm(total=sum(len(records_of(k)) for k in mine), unit="record", disable=rank > 0)
        with continued_after(writer), bar:
            # In order of number, whatever worker was first: every run writes the same lines.
            for k, records in zip(mine, run(SceneMaker.make_scene, mine), strict=True):
                for record in records:
                    if not writer.done(record["index"]):
                        writer.append(record)
                    if faults := told_of_grasp(record):
                        faulty[record["scene_line"]] = faults
                bar.update(len(records_of(k)))
    barrier()
    writer.merge()
    # An earlier run may have asked for more.
    ended = writer.end if brought else -(-writer.end // per_scene) * per_scene
    tried = max(total, ended, before + left_out)
    left_out = tried - len(writer)
    why = LEFT_OUT_OF_FILE if brought else LEFT_OUT
    writer.description["rejected"] = {why: left_out} if left_out > 0 else {}
    writer.finish()
    print(f"{len(writer) - before} new records, {len(writer)} in all")
    if left_out > 0:
        print(f"{left_out} records were left out: {why}")
    if faulty:
        told = first_few([f"line {line}: the hand {words}" for line, words in faulty.items()], joint="\n  ")
        told = f"given grasps that ours would be refused for, kept as they are:\n  {told}"
        print(told, file=sys.stderr if rank else None)  # each process tells of its own


def told_of_grasp(record: dict[str, Any]) -> str:
    """What a given hand does that a searched one must not, as the end of "the hand ..."; empty when nothing."""
    told = list((record.get("grasp") or {}).get("faults") or ())
    if (below := record.get("below_support_mm") or 0) > 0:
        told.append(f"or its forearm goes {below:g} mm below the support")
    return ", ".join(told)


def open_source(args: argparse.Namespace) -> Source:
    """The real dataset that was asked for."""
    if args.csv:
        return OfficialCSV(args.csv)
    return DexYCB(
        args.dexycb, args.split, args.subjects, args.sequences, args.cameras, slice_of(args.frame_range), args.mano,
        args.models,
    )  # fmt: skip


def convert_pictures(args: argparse.Namespace) -> None:
    """Photographs of a real dataset -> records."""
    threads = args.threads or usable_cpus()
    # Else one hand at a time: threads only wait for each other.
    torch.set_num_threads(threads if args.normals == "estimated" else 1)
    device = choose_device(args.device)
    source = open_source(args)
    settings = ConversionSettings(args.height, args.margin, args.normals, args.depth_files, args.depth_model, args.mano,
                                  args.strokes, args.text, args.min_area, device)  # fmt: skip
    # What cannot work is refused before hours of work.
    check_needs(source, settings)
    captions = read_captions(args.captions) if args.captions else None
    dtype = fast_dtype(device) if args.dtype == "auto" else args.dtype
    # Before GL starts, see FrameConverter.
    captioner = Captioner(args.captioner, device, str(dtype).removeprefix("torch.")) if args.captioner else None
    order = np.random.default_rng(args.seed).permutation(len(source)) if args.shuffle else np.arange(len(source))
    order = order[: args.count]
    rank, world_size = rank_and_world_size()
    join_processes("gloo", rank, world_size, timedelta(days=7))  # until the slowest is done
    writer = DatasetWriter(args.out, describe_pictures(args, source), rank, world_size)
    print(f"{len(order)} frames of {source.name} -> {args.out}, {len(writer)} records are there already")
    with continued_after(writer):
        rejected = convert_source(source, order, settings, writer, args.workers)
    if rank > 0:
        return
    if captioner:
        torch.set_num_threads(threads)
        caption_folder(args.out, captioner, args.seed, args.batch_size or (1 if device == "cpu" else 8))
        captions = read_captions(args.out / CAPTION_FILE)
    if captions:
        found, without = apply_captions(args.out, captions)
        print(f"{found} records have a caption of {args.captions or CAPTION_FILE}, {without} keep their template")
    findings = summary(args.out)
    writer.description |= {"rejected": rejected, **findings}
    writer.finish()
    told = [f"{len(writer)} records; {sum(rejected.values())} frames rejected"]
    told += [f"  {count} {reason}" for reason, count in rejected.items()]
    told += [f"{name}: {value}" for name, value in findings.items()]
    print("\n".join([*told, *filter(None, [fit_warning(findings)])]))


def main(args: argparse.Namespace) -> None:
    """Check a folder, or make one of real pictures or of object meshes."""
    if args.check:
        hand = load_hand(args.mano) if args.mano else None
        reports = [check_folder(folder, hand) for folder in args.check]
        print(*reports, sep="\n")
        sys.exit(0 if all(report.ok for report in reports) else 1)
    check_placeholders(args.text or "")
    with redirect_stdout(sys.stdout if rank_and_world_size()[0] == 0 else None):  # one process speaks for all
        convert_pictures(args) if wants_real_pictures(args) else make_scenes(args)
        print(f"look at {args.out / 'grid.png'}; validate with: python make_dataset.py --check {args.out}")


@problems_as_messages("make_dataset.py", "interrupted before the first record; the same command starts again")
def run(arguments: list[str] | None = None) -> None:
    """The command: problems become a message and exit code 1."""
    main(parse_args(arguments))
    leave_processes()


if __name__ == "__main__":
    run()
