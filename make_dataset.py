"""Make a dataset folder: object meshes or real pictures in; condition images and full 3D annotation out.

    python make_dataset.py                                          # 100 records of mug, bowl, bottle, can in ./data
    python make_dataset.py --object scans/mug.stl scans/ --count 500 --size 512 --out data/scans
    python make_dataset.py --object mug --frames 12 --count 120 --out data/approach       # ten whole trajectories
    python make_dataset.py --shade --looks 4 --size 128 --framing tight --count 4000 --out data/toy   # with pictures
    python make_dataset.py --dexycb DexYCB --split s0 train --mano MANO_RIGHT.pkl --workers 8 --out data/dexycb
    python make_dataset.py --csv train.csv --normals estimated --out data/hoi4d         # the authors' own format
    python make_dataset.py --check data/toy

It prints what it found in the meshes, a progress bar with the time left, and what to look at (grid.png).  Running the
same command again continues where it stopped; record i depends on --seed and i alone, not on --workers or --count.
The folder's format is described in hoi/data/folder.py.  Paper: Sec. 3.2 (grasp, trajectory, rendering).
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

from tqdm import tqdm

from hoi.common.command import how_made, positive, problems_as_messages
from hoi.common.machine import mapper
from hoi.data.check import check_folder
from hoi.data.scene_maker import SceneMaker, SceneSettings
from hoi.data.writer import DatasetWriter, open_folder, refuse_other_job
from hoi.geometry.camera import CAMERA_FOV_DEG, FRAMINGS
from hoi.geometry.grabnet import load_grabnet
from hoi.geometry.grasp import default_cache
from hoi.geometry.hand import load_hand
from hoi.geometry.objects import CATEGORIES, ObjectMesh, collect_objects, object_card
from hoi.geometry.scene import CONTENTS, GraspedObject, graspable
from hoi.toyworld.words import check_placeholders
from real_pictures import add_real_picture_flags, convert_pictures, wants_real_pictures

LEFT_OUT = "the hand leaves the picture, or hand or object is hidden"


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
    what.add_argument("--hand-side", choices=("right", "left", "random"), default="right",
                      help="left hands are mirrored right ones; random: each scene draws one (default: %(default)s)")
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
                      help="draw pictures in random looks with captions; otherwise conditions only")
    look.add_argument("--looks", type=positive, default=1, metavar="L",
                      help="pictures of each geometry in different looks; they share their condition images")
    look.add_argument("--style", choices=("any", "lab", "scenic"), default="any",
                      help="any look, laboratory tables and walls only, or everything but these")
    look.add_argument("--paraphrase", action=argparse.BooleanOptionalAction, default=True,
                      help="word some captions differently; --no-paraphrase gives the paper's template always")
    look.add_argument("--text", metavar="TEMPLATE",
                      help='text without --shade, {object} is the noun (default: "A hand is grasping a {object}")')


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
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
    add("--check", type=Path, metavar="DIR",
        help="only validate a folder: files, keypoints, masks and depth against a re-render; exits 1 on a problem")
    args = parser.parse_args(arguments)
    args.content = dict(args.content)
    if args.count is None and not wants_real_pictures(args):
        args.count = 100
    args.normals = args.normals or ("estimated" if args.csv else "rendered")
    if problem := contradiction(args):
        parser.error(problem)
    return args


def contradiction(args: argparse.Namespace) -> str | None:
    """What is wrong with a combination of flags, if anything is: a flag that would do nothing is refused."""
    if (args.captions or args.captioner) and not wants_real_pictures(args):
        return "--captions and --captioner are for real pictures: pass --dexycb, --ho3d or --csv as well"
    if not args.dexycb and (args.subjects or args.cameras or args.paint_objects == "all"):
        return "--subjects, --cameras and --paint-objects all are for --dexycb"
    if args.csv and (args.split or args.sequences or args.frame_range != ":"):
        return "--split, --sequences and --frame-range are for --dexycb and --ho3d; a CSV is taken as it is"
    if args.ho3d and len(args.split or ["train"]) != 1:
        return "--split of --ho3d is one word, train or evaluation"
    if args.camera == "nocs" and (args.framing == "tight" or wants_real_pictures(args)):
        return "--camera nocs fixes the intrinsics of all pictures: not with --framing tight or real pictures"
    if args.captions and args.captioner:
        return "choose --captions or --captioner, not both"
    if args.margin < 0:
        return "--margin must not be negative"
    if "scenery" in args.content and not args.shade:
        return "--content scenery has neither hand nor object: it makes sense only with --shade"
    if args.looks > 1 and not args.shade:
        return "--looks needs --shade: without pictures the looks of a geometry would be equal"
    if args.text is not None and args.shade:
        return "--text is for records without --shade, whose pictures are described by the looks that are drawn"
    if (args.style != "any" or not args.paraphrase) and not args.shade:
        return "--style and --no-paraphrase need --shade: nothing is drawn without it"
    if args.start_distance is not None and not 0 <= args.start_distance < float("inf"):
        return f"--start-distance is {args.start_distance:g}, expected metres, 0 or more, e.g. 0.15"
    if args.seed < 0 or args.object_seed < 0:
        return "--seed and --object-seed must not be negative"
    if args.grasp == "grabnet" and not (args.grabnet and args.mano):
        return ("--grasp grabnet needs --grabnet DIR (coarsenet.pt, refinenet.pt, bps.npz) and, because its hands are "
                "MANO's, --mano FILE; their licences forbid shipping them. The default, --grasp builtin, needs neither")
    if args.grabnet and args.grasp != "grabnet":
        return "--grabnet is used only with --grasp grabnet"
    return None


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
            object_card(item.object_mesh) | {"grasps": len(item.right) + len(item.left)} for item in objects
        ],
    }  # fmt: skip


def find_all_grasps(settings: SceneSettings, meshes: list[ObjectMesh], run: Any) -> list[GraspedObject]:
    """Grasps of every object; objects without any are left out, and it is said; an error when none is left."""
    results = list(tqdm(run("grasps_of", range(len(meshes))), "grasps", len(meshes), unit="object"))
    found, notes = [item for item, _ in results], [note for _, lines in results for note in lines]
    good = graspable(found, settings.sides, notes)
    kept = {item.object_mesh.object_id for item in good}
    bad = [item.object_mesh.object_id for item in found if item.object_mesh.object_id not in kept]
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


def main(args: argparse.Namespace) -> None:
    if args.check:
        report = check_folder(args.check, load_hand(args.mano) if args.mano else None)
        print(report)
        sys.exit(0 if report.ok else 1)
    check_placeholders(args.text or "")
    if wants_real_pictures(args):
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
    # Before minutes of search; objects without grasps drop out, so the list of objects is compared after it.
    refuse_other_job(args.out, describe(args, settings, []), ignoring=("objects",))
    per_scene = settings.records_per_scene
    scenes = -(-args.count // per_scene)
    build = partial(SceneMaker, settings, meshes, args.out, args.cache, args.mano, args.grabnet)
    with mapper(args.workers, build) as run:
        print(f"renderer: {next(iter(run('renderer_used', [0])))}")
        writer = open_folder(args.out, describe(args, settings, find_all_grasps(settings, meshes, run)))
        todo = [k for k in range(scenes) if not all(writer.done(i) for i in range(k * per_scene, (k + 1) * per_scene))]
        print(f"{scenes} scenes x {per_scene} records -> {args.out}, {len(writer)} records are there already")
        before = len(writer)
        try:
            make_all(run, writer, todo, per_scene)
        except KeyboardInterrupt:
            sys.exit(f"interrupted: {len(writer)} records are complete; the same command continues")
    tried = max(scenes, -(-writer.end // per_scene)) * per_scene  # an earlier run may have asked for more
    left_out = tried - len(writer)
    writer.description["rejected"] = {LEFT_OUT: left_out} if left_out > 0 else {}
    writer.finish()
    print(f"{len(writer) - before} new records, {len(writer)} in all")
    if left_out > 0:
        print(f"{left_out} records were left out: {LEFT_OUT}")
    print(f"look at {args.out / 'grid.png'}; validate with: python make_dataset.py --check {args.out}")


@problems_as_messages("make_dataset.py", "interrupted before the first record; the same command starts again")
def run(arguments: list[str] | None = None) -> None:
    main(parse_args(arguments))


if __name__ == "__main__":
    run()
