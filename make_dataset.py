"""Make a dataset folder: object meshes or real pictures in; condition images and full 3D annotation out.

    python make_dataset.py                                          # 100 records of mug, bowl, bottle, can in ./data
    python make_dataset.py --object scans/mug.stl scans/ --num 500 --size 512 --out data/scans
    python make_dataset.py --object mug --frames 12 --num 120 --out data/approach       # ten whole trajectories
    python make_dataset.py --shade --looks 4 --size 128 --framing tight --num 4000 --out data/toy   # with pictures
    python make_dataset.py --dexycb DexYCB --split s0 train --mano MANO_RIGHT.pkl --workers 8 --out data/dexycb
    python make_dataset.py --csv train.csv --normals estimated --out data/hoi4d         # the authors' own format
    python make_dataset.py --check data/toy

It prints what it found in the meshes, a progress bar with the time left, and what to look at (grid.png).  Running the
same command again continues where it stopped; record i depends on --seed and i alone, not on --workers or --num.
The folder's format is described in hoi/dataset.py.  Paper: Sec. 3.2 (grasp, trajectory, rendering).
"""

# ruff: noqa: E402
import os

# Before numpy starts its threads: the arrays are small, and threads that wait for each other cost three times the work.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import hashlib
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from hoi.camera import CAMERA_FOV_DEG
from hoi.captions import CAPTION_FILE, Captioner, apply_captions, caption_folder, read_captions
from hoi.check import check_folder
from hoi.command import how_made, positive, told_problems
from hoi.dataset import read_records
from hoi.dataset_writer import DatasetWriter
from hoi.depth_normals import DPT_HYBRID
from hoi.dexycb import DexYCB
from hoi.frame_converter import MARGIN, MIN_AREA, STROKES, FrameConverter, convert_frames
from hoi.framing import FRAMINGS
from hoi.grabnet import load_grabnet
from hoi.hand import load_hand
from hoi.ho3d import HO3D
from hoi.objects import CATEGORIES, ObjectMesh, collect_objects
from hoi.official_csv import OfficialCSV
from hoi.scene import CONTENTS, GraspedObject
from hoi.scene_maker import SceneMaker, SceneSettings
from hoi.sources import NORMALS, RejectionLog, Source, check_needs, fit_warning, summary
from hoi.workers import mapper

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "hoidiffusion" / "grasps"
# What decides the records; a folder begun with other values is refused instead of mixed.
PICTURE_JOB_FLAGS = (
    "split", "subjects", "sequences", "cameras", "frame_range", "shuffle", "size", "margin", "paint_objects", "normals",
    "strokes", "min_area", "text",
)  # fmt: skip
LEFT_OUT = "the hand leaves the picture, or hand or object is hidden"


def parse_range(word: str) -> str:
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


def parse_content(word: str) -> tuple[str, float]:
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


def add_object_flags(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("objects and hands")
    what.add_argument("--object", nargs="+", default=list(CATEGORIES), metavar="PATH|NAME",
                      help="mesh files, folders of meshes, or built-in families (default: %(default)s)")
    what.add_argument("--category", help="what mesh files show, used in texts (default: guessed from the file's name)")
    what.add_argument("--units", help="unit of mesh files: m, dm, cm, mm, in, or metres per unit as a number (default: "
                      "guessed from their size, and said)")
    what.add_argument("--up", choices=("y", "z"), help="vertical axis of mesh files (default: y for glTF, else z)")
    what.add_argument("--object-instances", type=positive, default=4, metavar="K",
                      help="random shapes of each built-in family")
    what.add_argument("--object-seed", type=int, default=0, metavar="N",
                      help="first shape; families use shapes N to N+K-1, so train and held-out sets need not overlap")
    what.add_argument("--grasps-per-object", type=positive, default=8, metavar="G",
                      help="grasps searched for each object; found ones are cached")
    what.add_argument("--hand-side", choices=("right", "left", "random"), default="right")
    what.add_argument("--mano", metavar="FILE", help="official MANO_RIGHT.pkl or MANO_LEFT.pkl, each gives both hands "
                      "(default: the built-in hand)")
    what.add_argument("--grasp", choices=("builtin", "grabnet"), default="builtin",
                      help="builtin: searched without learned weights; grabnet: drawn with GrabNet's, which needs "
                      "--grabnet and --mano (default: builtin)")
    what.add_argument("--grabnet", metavar="DIR", help="folder with coarsenet.pt, refinenet.pt and bps.npz")
    what.add_argument("--content", nargs="+", type=parse_content, default=[("hand_object", 1.0)], metavar="WHAT=SHARE",
                      help="mixture of hand_object, object, hand, scenery; e.g. --content hand_object=0.6 object=0.2 "
                      "scenery=0.2 (scenery needs --shade; default: hand_object alone)")


def add_view_flags(parser: argparse.ArgumentParser) -> None:
    view = parser.add_argument_group("views and frames")
    view.add_argument("--size", type=positive, default=512, metavar="PX",
                      help="height and width in pixels (default: 512, the paper's)")
    view.add_argument("--official-view", action=argparse.BooleanOptionalAction, default=False,
                      help="azimuth 0 to 0.1 degrees as in the official release, instead of 0 to 360")
    view.add_argument("--framing", choices=FRAMINGS, default="official",
                      help="official: the whole field of view; tight: zoomed in, the wrist near the border")
    view.add_argument("--camera", choices=tuple(CAMERA_FOV_DEG), default="official",
                      help="official: 60 degrees field of view; nocs: 45.1 degrees, the middle of a NOCS-CAMERA frame, "
                      "for python -m hoi.export --format nocs (default: official)")
    view.add_argument("--frames", type=positive, default=1, metavar="F",
                      help="frames of the approach, the last one is the grasp; 1 is the grasp alone (official: 8)")
    view.add_argument("--start-distance", type=float, metavar="M",
                      help="metres from the start of the approach to the grasp (default: paper 0.15, official 0.3)")
    view.add_argument("--trajectory", choices=("paper", "official"), default="paper",
                      help="paper: from vertically above (Sec. 3.2); official: the released code's variant")
    view.add_argument("--keep-outside", action=argparse.BooleanOptionalAction, default=False,
                      help="also write frames whose hand leaves the picture (hand_in_picture is false)")


def add_look_flags(parser: argparse.ArgumentParser) -> None:
    look = parser.add_argument_group("texts and toy-world pictures")
    look.add_argument("--shade", action=argparse.BooleanOptionalAction, default=False,
                      help="draw pictures in random looks with captions (hoi/appearance.py); otherwise conditions only")
    look.add_argument("--looks", type=positive, default=1, metavar="L",
                      help="pictures of each geometry in different looks; they share their condition images")
    look.add_argument("--style", choices=("any", "lab", "scenic"), default="any",
                      help="any look, laboratory tables and walls only, or everything but these")
    look.add_argument("--paraphrase", action=argparse.BooleanOptionalAction, default=True,
                      help="word some captions differently; --no-paraphrase gives the paper's template always")
    look.add_argument("--text", metavar="TEMPLATE",
                      help='text without --shade, {object} is the noun (default: "A hand is grasping a {object}")')


def add_real_picture_flags(parser: argparse.ArgumentParser) -> None:
    real = parser.add_argument_group(
        "real pictures instead of objects", "Frames that give no record are counted by reason in dataset.json and "
        "listed in rejected.jsonl. --size, --text, --mano, --num, --seed, --workers and --out apply too.")
    source = real.add_mutually_exclusive_group()
    source.add_argument("--dexycb", type=Path, metavar="ROOT",
                        help="DexYCB: the folder with 20200709-subject-01 ... and calibration")
    source.add_argument("--ho3d", type=Path, metavar="ROOT", help="HO-3D v2 or v3: the folder with train and train.txt")
    source.add_argument("--csv", type=Path, metavar="FILE",
                        help="CSV of the authors' release (HOI4D, OakInk, ...), or its regularisation CSV")
    real.add_argument("--split", nargs="+", metavar="WORD",
                      help="of DexYCB: s0, s1, s2 or s3, then train, val or test (default: every frame); of HO-3D: "
                      "train (default) or evaluation")
    real.add_argument("--subjects", nargs="+", metavar="S", help="numbers from 1, or names, of DexYCB's subjects")
    real.add_argument("--sequences", nargs="+", metavar="NAME", help="names of sequence folders")
    real.add_argument("--cameras", nargs="+", metavar="SERIAL", help="serial numbers of DexYCB's cameras")
    real.add_argument("--frame-range", type=parse_range, default=":", metavar="A:B:STEP",
                      help="frames of each sequence, from A up to but without B (default: all)")
    real.add_argument("--shuffle", action=argparse.BooleanOptionalAction, default=False,
                      help="take the frames in an order drawn from --seed, so that --num N is a fair sample")
    real.add_argument("--models", type=Path, metavar="DIR",
                      help="folders of YCB models, <name>/textured_simple.obj (default: ROOT/models)")
    real.add_argument("--paint-objects", choices=("grasped", "all"), default="grasped",
                      help="which objects the segmentation shows (default: grasped)")
    real.add_argument("--margin", type=int, default=MARGIN, metavar="PX",
                      help="of the crop around hand and object, in pixels of the source (default: 50, the authors')")
    real.add_argument("--min-area", type=positive, default=MIN_AREA, metavar="PX",
                      help="reject frames that show fewer pixels of hand or object (default: %(default)s)")
    real.add_argument("--strokes", choices=STROKES, default="crop",
                      help="crop: skeletons drawn at --size, as for rendered scenes; source: drawn in the source's "
                      "pixels and enlarged with the picture, as the released code does (default: crop)")
    real.add_argument("--normals", choices=NORMALS,
                      help="rendered: from hand and object meshes; sensor-depth; depth-files: see --depth-files; "
                      "estimated: from a depth that a network sees in the crop, as in the paper (default: rendered, "
                      "for --csv estimated)")
    real.add_argument("--depth-files", type=Path, metavar="DIR",
                      help="DIR/<source_frame>.npy, inverse depth in MiDaS's range, or .png, 16-bit millimetres; of "
                      "the whole picture or of the square crop")
    real.add_argument("--depth-model", default=DPT_HYBRID, metavar="NAME",
                      help="DPT network for --normals estimated, by folder or hub name (default: %(default)s)")
    real.add_argument("--captions", type=Path, metavar="FILE",
                      help=".csv or .jsonl of picture and caption, put in place of the template; the pictures are "
                      "those in images/ of the finished folder: run the same command again with this flag")
    real.add_argument("--captioner", metavar="NAME",
                      help="describe the crops with a LLaVA network of transformers, by folder or hub name, e.g. "
                      "llava-hf/llava-1.5-7b-hf")


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for add_flags in (add_object_flags, add_view_flags, add_look_flags, add_real_picture_flags):
        add_flags(parser)
    add = parser.add_argument
    add("--num", type=positive, metavar="N",
        help="records, rounded up to whole scenes of --frames x --looks records (default: 100); of real pictures the "
        "first N frames (default: all)")
    add("--seed", type=int, default=0)
    add("--workers", type=positive, default=1, metavar="W", help="processes; the result is the same for any number")
    add("--cache", type=Path, default=CACHE, metavar="DIR", help="where found grasps are kept (default: %(default)s)")
    add("--out", type=Path, default=Path("data"), metavar="DIR", help="the dataset folder (default: %(default)s)")
    add("--check", type=Path, metavar="DIR",
        help="only validate a folder: files, keypoints, masks and depth against a re-render; exits 1 on a problem")
    args = parser.parse_args(arguments)
    args.content = dict(args.content)
    if args.num is None and not real_pictures(args):
        args.num = 100
    args.normals = args.normals or ("estimated" if args.csv else "rendered")
    if problem := contradiction(args):
        parser.error(problem)
    return args


def contradiction(args: argparse.Namespace) -> str | None:
    """What is wrong with a combination of flags, if anything is: a flag that would do nothing is refused."""
    if (args.captions or args.captioner) and not real_pictures(args):
        return "--captions and --captioner are for real pictures: pass --dexycb, --ho3d or --csv as well"
    if not args.dexycb and (args.subjects or args.cameras or args.paint_objects == "all"):
        return "--subjects, --cameras and --paint-objects all are for --dexycb"
    if args.csv and (args.split or args.sequences or args.frame_range != ":"):
        return "--split, --sequences and --frame-range are for --dexycb and --ho3d; a CSV is taken as it is"
    if args.ho3d and len(args.split or ["train"]) != 1:
        return "--split of --ho3d is one word, train or evaluation"
    if args.camera == "nocs" and (args.framing == "tight" or real_pictures(args)):
        return "--camera nocs fixes the intrinsics of all pictures: not with --framing tight or real pictures"
    if args.captions and args.captioner:
        return "choose --captions or --captioner, not both"
    if args.margin < 0:
        return "--margin must not be negative"
    if "scenery" in args.content and not args.shade:
        return "--content scenery has neither hand nor object: it makes sense only with --shade"
    if args.looks > 1 and not args.shade:
        return "--looks needs --shade: without pictures the looks of a geometry would be equal"
    if args.seed < 0 or args.object_seed < 0:
        return "--seed and --object-seed must not be negative"
    if args.grasp == "grabnet" and not (args.grabnet and args.mano):
        return ("--grasp grabnet needs --grabnet DIR (coarsenet.pt, refinenet.pt, bps.npz) and, because its hands are "
                "MANO's, --mano FILE; their licences forbid shipping them. The default, --grasp builtin, needs neither")
    if args.grabnet and args.grasp != "grabnet":
        return "--grabnet is used only with --grasp grabnet"
    return None


def real_pictures(args: argparse.Namespace) -> bool:
    """Whether the records come from a real dataset instead of object meshes."""
    return bool(args.dexycb or args.ho3d or args.csv)


def scene_settings(args: argparse.Namespace) -> SceneSettings:
    return SceneSettings(
        seed=args.seed, content=args.content, hand_side=args.hand_side, grasps_per_object=args.grasps_per_object,
        size=args.size, framing=args.framing, official_view=args.official_view, frames=args.frames,
        start_distance=args.start_distance, trajectory=args.trajectory, keep_outside=args.keep_outside,
        shade=args.shade, looks=args.looks, style=args.style, paraphrase=args.paraphrase, text=args.text,
        camera=args.camera,
    )  # fmt: skip


def describe(args: argparse.Namespace, settings: SceneSettings, objects: list[GraspedObject]) -> dict[str, Any]:
    """What goes to dataset.json."""
    meshes = [item.object_mesh for item in objects]
    digest = [hashlib.sha256(mesh.vertices.tobytes() + mesh.faces.tobytes()).hexdigest()[:8] for mesh in meshes]
    hand = Path(args.mano).name if args.mano else "builtin"
    return {
        **how_made("make_dataset.py"),
        "seed": args.seed,
        "licences": {
            "hand": "MANO licence (non-commercial research)" if args.mano else "built-in hand: MIT, see hoi/assets",
            "objects": sorted({mesh.source for mesh in meshes}),
        }
        | ({"grasps": "GrabNet licence (non-commercial research)"} if args.grasp == "grabnet" else {}),
        # Without what older folders do not say: they go on.
        "job": {key: value for key, value in asdict(settings).items() if (key, value) != ("camera", "official")}
        | {"hand": hand, "objects": [f"{m.object_id} {d}" for m, d in zip(meshes, digest, strict=True)]}
        | ({"grasp": args.grasp} if args.grasp != "builtin" else {}),  # folders from before this flag go on
        "objects": [
            {"object_id": item.object_mesh.object_id, "category": item.object_mesh.category,
             "source": item.object_mesh.source,
             "file_to_canonical": item.object_mesh.file_to_canonical.ravel().tolist(),
             "watertight": item.object_mesh.watertight, "notes": list(item.object_mesh.notes),
             "grasps": len(item.right) + len(item.left)}
            for item in objects
        ],
    }  # fmt: skip


def find_all_grasps(settings: SceneSettings, meshes: list[ObjectMesh], run: Any) -> list[GraspedObject]:
    """Grasps of every object; objects without any are left out, and it is said; an error when none is left."""
    results = list(tqdm(run("grasps_of", range(len(meshes))), "grasps", len(meshes), unit="object"))
    found, notes = [item for item, _ in results], [note for _, lines in results for note in lines]
    good = settings.graspable(found)
    bad = [item.object_mesh.object_id for item in found if not settings.graspable([item])]
    if not good:
        message = f"no grasp was found for any object ({', '.join(bad)}): are they 1 to 20 cm in size?"
        raise ValueError("\n".join([message, *notes]))
    print("\n".join(notes), end="\n" if notes else "")
    if bad:
        print(f"left out, no grasp was found: {', '.join(bad)}")
    return good


def make_all(run: Any, writer: DatasetWriter, todo: list[int], per_scene: int) -> None:
    """Make scenes and append their records in order, so that every run writes the same lines."""
    with tqdm(total=len(todo) * per_scene, unit="record") as progress:
        for records in run("make_scene", todo):
            for record in records:
                if not writer.done(record["index"]):
                    writer.append(record)
            progress.update(per_scene)


def open_source(args: argparse.Namespace) -> Source:
    if args.csv:
        return OfficialCSV(args.csv)
    frames = slice_of(args.frame_range)
    if args.ho3d:
        return HO3D(args.ho3d, args.split and args.split[0], args.sequences, frames, args.mano, args.models)
    return DexYCB(
        args.dexycb, args.split, args.subjects, args.sequences, args.cameras, frames, args.mano, args.models,
        args.paint_objects == "all",
    )  # fmt: skip


def describe_pictures(args: argparse.Namespace, source: Source) -> dict[str, Any]:
    """What goes to dataset.json."""
    job = {flag: getattr(args, flag) for flag in PICTURE_JOB_FLAGS}
    job |= {"source": source.name, "frames_selected": len(source), "hand": Path(args.mano).name if args.mano else None}
    job |= {"seed": args.seed} if args.shuffle else {}
    job |= {"depth_model": args.depth_model} if args.normals == "estimated" else {}
    return {
        **how_made("make_dataset.py"),
        "licences": {"pictures": f"terms of {source.name}, which stay with every picture"}
        | ({"hand": "MANO licence (non-commercial research)"} if args.mano else {}),
        "job": job,
    }


def caption_pictures(args: argparse.Namespace, captioner: Captioner | None) -> None:
    """Replace the template captions by a file's or a network's."""
    if captioner:
        caption_folder(args.out, captioner, args.seed)
    path = args.captions or args.out / CAPTION_FILE
    found, without = apply_captions(args.out, read_captions(path))
    print(f"{found} records have a caption of {path}, {without} keep their template")


def convert_pictures(args: argparse.Namespace) -> None:
    """Photographs of a real dataset -> records."""
    if args.normals != "estimated":
        torch.set_num_threads(1)  # one hand at a time: threads only wait for each other
    source = open_source(args)
    check_needs(source, args.normals, args.mano, args.depth_files)
    if args.captions:
        read_captions(args.captions)  # what cannot be read is refused before hours of work
    captioner = Captioner(args.captioner) if args.captioner else None  # before GL starts, see FrameConverter
    if not len(source):
        raise ValueError(f"no frame of {source.name} fits the selection")
    order = np.random.default_rng(args.seed).permutation(len(source)) if args.shuffle else np.arange(len(source))
    order = order[: args.num]
    writer, log = DatasetWriter(args.out, describe_pictures(args, source)), RejectionLog(args.out)
    todo = [k for k in range(len(order)) if not writer.done(k) and k not in log.reasons]
    print(f"{len(order)} frames of {source.name} -> {args.out}, {len(order) - len(todo)} were seen already")
    build = partial(
        FrameConverter, source, args.out, args.size, args.margin, args.normals, args.depth_files, args.depth_model,
        args.mano, args.strokes, args.text, args.min_area, order,
    )  # fmt: skip
    try:
        with mapper(args.workers, build) as run:
            convert_frames(run, writer, log, todo)
    except KeyboardInterrupt:
        sys.exit(f"interrupted: {len(writer)} records are complete; the same command continues")
    told = "".join(f"\n  {count} {reason}" for reason, count in log.counts().items())
    if not len(writer):
        raise ValueError(f"no frame gave a record:{told}")
    if args.captions or args.captioner:
        caption_pictures(args, captioner)
    findings = summary(read_records(args.out))
    writer.description |= {"rejected": log.counts(), **findings}
    writer.finish()
    print(f"{len(writer)} records; {len(log.reasons)} frames rejected{told}")
    print("".join(f"{name}: {value}\n" for name, value in findings.items()), end="")
    print(fit_warning(findings), end="\n" if fit_warning(findings) else "")
    print(f"look at {args.out / 'grid.png'}; validate with: python make_dataset.py --check {args.out}")


def main(args: argparse.Namespace) -> None:
    if args.check:
        report = check_folder(args.check, load_hand(args.mano) if args.mano else None)
        print(report)
        sys.exit(0 if report.ok else 1)
    if real_pictures(args):
        return convert_pictures(args)
    if args.mano:  # read here too, so that a bad file is refused before any worker starts
        notes = load_hand(args.mano).notes
        print("\n".join(notes), end="\n" if notes else "")
    if args.grasp == "grabnet":
        load_grabnet(args.grabnet)
    shapes = range(args.object_seed, args.object_seed + args.object_instances)
    meshes = collect_objects(args.object, shapes, args.category, args.units, args.up)
    for mesh in meshes:
        print("\n".join(f"{mesh.object_id}: {note}" for note in mesh.notes), end="\n" if mesh.notes else "")
    settings = scene_settings(args)
    per_scene = settings.records_per_scene
    scenes = -(-args.num // per_scene)
    build = partial(SceneMaker, settings, meshes, args.out, args.cache, args.mano, args.grabnet)
    with mapper(args.workers, build) as run:
        print(f"renderer: {next(iter(run('renderer_used', [0])))}")
        writer = DatasetWriter(args.out, describe(args, settings, find_all_grasps(settings, meshes, run)))
        todo = [k for k in range(scenes) if not all(writer.done(i) for i in range(k * per_scene, (k + 1) * per_scene))]
        print(f"{scenes} scenes x {per_scene} records -> {args.out}, {len(writer)} records are there already")
        before = len(writer)
        try:
            make_all(run, writer, todo, per_scene)
        except KeyboardInterrupt:
            sys.exit(f"interrupted: {len(writer)} records are complete; the same command continues")
    left_out = scenes * per_scene - len(writer)
    writer.description["rejected"] = {LEFT_OUT: left_out} if left_out > 0 else {}
    writer.finish()
    print(f"{len(writer) - before} new records, {len(writer)} in all")
    if left_out > 0:
        print(f"{left_out} records were left out: {LEFT_OUT}")
    print(f"look at {args.out / 'grid.png'}; validate with: python make_dataset.py --check {args.out}")


@told_problems("make_dataset.py", "interrupted before the first record; the same command starts again")
def run(arguments: list[str] | None = None) -> None:
    main(parse_args(arguments))


if __name__ == "__main__":
    run()
