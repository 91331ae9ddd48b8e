"""Make a dataset folder: object meshes in; grasps, views, condition images and full 3D annotation out.

    python make_dataset.py                                          # 100 records of mug, bowl, bottle, can in ./data
    python make_dataset.py --object scans/mug.stl scans/ --num 500 --size 512 --out data/scans
    python make_dataset.py --object mug --frames 12 --num 120 --out data/approach       # ten whole trajectories
    python make_dataset.py --shade --looks 4 --size 128 --framing tight --num 4000 --out data/toy   # with pictures
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
import platform
import shlex
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from hoi.appearance import sample_look
from hoi.check import check_folder
from hoi.command import positive, told_problems
from hoi.dataset import PICTURE_FOLDERS
from hoi.dataset_writer import DatasetWriter, write_object, write_pictures
from hoi.framing import FRAMINGS
from hoi.grabnet import find_grabnet_grasps, load_grabnet
from hoi.grasp import DistanceField, remembered
from hoi.hand import load_hand
from hoi.objects import CATEGORIES, ObjectMesh, collect_objects
from hoi.render import Renderer
from hoi.scene import (
    CONTENTS,
    GraspedObject,
    annotate,
    compose_scene,
    grasp_object,
    mirror_mesh,
    plain_text,
    render_scene,
    scene_conditions,
    shade_scene,
)

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "hoidiffusion" / "grasps"
# What decides the records; a folder begun with other values is refused instead of mixed.
JOB_FLAGS = (
    "frames", "start_distance", "trajectory", "size", "official_view", "framing", "hand_side", "seed", "content",
    "grasps_per_object", "shade", "looks", "style", "paraphrase", "text", "keep_outside",
)  # fmt: skip


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


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
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
    view = parser.add_argument_group("views and frames")
    view.add_argument("--size", type=positive, default=512, metavar="PX",
                      help="height and width in pixels (default: 512, the paper's)")
    view.add_argument("--official-view", action=argparse.BooleanOptionalAction, default=False,
                      help="azimuth 0 to 0.1 degrees as in the official release, instead of 0 to 360")
    view.add_argument("--framing", choices=FRAMINGS, default="official",
                      help="official: 60 degrees field of view; tight: zoomed in, the wrist near the border")
    view.add_argument("--frames", type=positive, default=1, metavar="F",
                      help="frames of the approach, the last one is the grasp; 1 is the grasp alone (official: 8)")
    view.add_argument("--start-distance", type=float, metavar="M",
                      help="metres from the start of the approach to the grasp (default: paper 0.15, official 0.3)")
    view.add_argument("--trajectory", choices=("paper", "official"), default="paper",
                      help="paper: from vertically above (Sec. 3.2); official: the released code's variant")
    view.add_argument("--keep-outside", action=argparse.BooleanOptionalAction, default=False,
                      help="also write frames whose hand leaves the picture (hand_in_picture is false)")
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
    add("--num", type=positive, default=100, metavar="N",
        help="records, rounded up to whole scenes of --frames x --looks records")
    add("--seed", type=int, default=0)
    add("--workers", type=positive, default=1, metavar="W", help="processes; the result is the same for any number")
    add("--cache", type=Path, default=CACHE, metavar="DIR", help="where found grasps are kept (default: %(default)s)")
    add("--out", type=Path, default=Path("data"), metavar="DIR", help="the dataset folder (default: %(default)s)")
    add("--check", type=Path, metavar="DIR",
        help="only validate a folder: files, keypoints, masks and depth against a re-render; exits 1 on a problem")
    args = parser.parse_args(arguments)
    args.content = dict(args.content)
    if "scenery" in args.content and not args.shade:
        parser.error("--content scenery has neither hand nor object: it makes sense only with --shade")
    if args.looks > 1 and not args.shade:
        parser.error("--looks needs --shade: without pictures the looks of a geometry would be equal")
    if args.seed < 0 or args.object_seed < 0:
        parser.error("--seed and --object-seed must not be negative")
    if args.grasp == "grabnet" and not (args.grabnet and args.mano):
        parser.error("--grasp grabnet needs --grabnet DIR (coarsenet.pt, refinenet.pt, bps.npz) and, because its hands "
                     "are MANO's, --mano FILE; their licences forbid shipping them. The default, --grasp builtin, "
                     "needs neither")
    if args.grabnet and args.grasp != "grabnet":
        parser.error("--grabnet is used only with --grasp grabnet")
    return args


def sides(args: argparse.Namespace) -> tuple[str, ...]:
    """Hands for which grasps are needed."""
    if {"hand_object", "hand"}.isdisjoint(args.content):
        return ()
    return ("right", "left") if args.hand_side == "random" else (args.hand_side,)


def graspable(args: argparse.Namespace, objects: list[GraspedObject]) -> list[GraspedObject]:
    """Those with a grasp for every wanted side."""
    return [item for item in objects if all(item.grasps(side) for side in sides(args))]


class SceneMaker:
    """Everything one process needs to make scenes; built once per process, grasps read when first needed."""

    def __init__(self, args: argparse.Namespace, meshes: list[ObjectMesh]) -> None:
        torch.set_num_threads(1)
        self.args, self.meshes = args, meshes
        self.hand = load_hand(args.mano)
        self.grabnet = load_grabnet(args.grabnet) if args.grasp == "grabnet" else None
        self.renderer: Renderer | None = None
        self.objects: list[GraspedObject] | None = None
        self.fields: dict[str, DistanceField] = {}

    def grasps_of(self, k: int) -> tuple[GraspedObject, list[str]]:
        """Search object k's grasps or read them from the cache (same result); and what to tell about the search."""
        args, mesh = self.args, self.meshes[k]
        if self.grabnet is None:
            return grasp_object(mesh, self.hand, args.grasps_per_object, args.seed, args.cache, sides(args)), []
        found, notes = {}, []
        for side in sides(args):
            target = mesh if side == "right" else mirror_mesh(mesh)
            grasps, note = remembered(
                lambda generator, target=target: find_grabnet_grasps(
                    target, self.hand, self.grabnet, args.grasps_per_object, generator),
                target, self.hand, args.grasps_per_object, args.seed, args.cache, f"grabnet {self.grabnet.digest}",
            )  # fmt: skip
            found[side] = tuple(grasps)
            notes.append(note if side == "right" else f"{note} (left hand)")
        return GraspedObject(mesh, **found), notes

    def renderer_used(self, _: int) -> str:
        """What draws here, and why; the first task given to the pool."""
        self.renderer = self.renderer or Renderer()
        return str(self.renderer)

    def make_scene(self, number: int) -> list[dict[str, Any]]:
        """Write the pictures of one scene; returns its complete records."""
        args = self.args
        if self.objects is None:
            self.objects = graspable(args, [self.grasps_of(k)[0] for k in range(len(self.meshes))])
            self.renderer = self.renderer or Renderer()
        generator = np.random.default_rng([args.seed, number])
        shares = np.array(list(args.content.values()))
        content = list(args.content)[generator.choice(len(shares), p=shares / shares.sum())]
        scene = compose_scene(
            self.objects, self.hand, self.renderer, generator, args.size, args.size, content, args.hand_side,
            args.framing, args.official_view, args.frames, args.start_distance, args.trajectory,
        )  # fmt: skip
        if scene is None:
            return []
        records: list[dict[str, Any]] = []
        for frame in range(scene.frames):
            records += self.make_frame(scene, number, frame)
        return records

    def make_frame(self, scene, number: int, frame: int) -> list[dict[str, Any]]:
        args = self.args
        record = annotate(scene, frame, self.hand, self.field(scene))
        drawable = record.get("keypoints_2d") is None or np.isfinite(record["keypoints_2d"]).all()
        if not drawable or (record.get("hand_in_picture") is False and not args.keep_outside):
            return []
        if args.frames > 1:
            record |= {"trajectory": number, "frame": frame}
        pictures: dict[str, Any] = {}
        if scene.content != "scenery":
            gbuffer = render_scene(scene, frame, self.hand, self.renderer)
            pictures = {"conditions": scene_conditions(gbuffer, record), "depth": gbuffer.depth}
            if scene.object_mesh is not None:
                pictures["object_mask"] = gbuffer.object_mask
                record["object_path"] = write_object(args.out, scene.object_mesh)
        large = render_scene(scene, frame, self.hand, self.renderer, factor=2) if pictures and args.shade else None
        records = []
        for look_number in range(args.looks):
            image = None
            if args.shade:
                generator = np.random.default_rng([args.seed, number, frame, look_number])
                look = sample_look(generator, style=args.style)
                image, record["text"] = shade_scene(scene, large, look, generator, paraphrase=args.paraphrase)
                record["look"] = {key: np.asarray(value).tolist() for key, value in asdict(look).items()}
            else:
                record["text"] = plain_text(scene, args.text)
            index = (number * args.frames + frame) * args.looks + look_number
            records.append(write_pictures(args.out, index, record, image, **pictures))
            # The other looks of this geometry point at the same condition files.
            record |= {key: records[0][key] for key in PICTURE_FOLDERS if key != "file_name"}
            pictures = {}
        return records

    def field(self, scene) -> DistanceField | None:
        """Distance to the object, needed only for the contact of frames before the grasp; built once per object."""
        if self.args.frames == 1 or scene.object_mesh is None or scene.grasp is None:
            return None
        mesh = scene.object_mesh
        if mesh.object_id not in self.fields:
            self.fields[mesh.object_id] = DistanceField(mesh.vertices, mesh.faces)
        return self.fields[mesh.object_id]


_maker: SceneMaker | None = None  # one in each worker process


def start_worker(args: argparse.Namespace, meshes: list[ObjectMesh]) -> None:
    global _maker
    _maker = SceneMaker(args, meshes)


def call_worker(method: str, argument: int) -> Any:
    return getattr(_maker, method)(argument)


@contextmanager
def mapper(args: argparse.Namespace, meshes: list[ObjectMesh]) -> Iterator[Any]:
    """Yields map(method name, numbers) -> results in order, run here or in worker processes."""
    if args.workers == 1:
        maker = SceneMaker(args, meshes)
        yield lambda method, numbers: map(getattr(maker, method), numbers)
        return
    # Spawn: a forked process would share the parent's GL context and thread pools.
    pool = ProcessPoolExecutor(args.workers, get_context("spawn"), start_worker, (args, meshes))

    def run(method: str, numbers: Any) -> Iterator[Any]:
        # Processes that start here inherit the deaf ear: Ctrl-C reaches the whole group, the parent ends the workers.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            return pool.map(call_worker, [method] * len(numbers), numbers)
        finally:
            signal.signal(signal.SIGINT, before)

    try:
        yield run
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def describe(args: argparse.Namespace, objects: list[GraspedObject]) -> dict[str, Any]:
    """What goes to dataset.json."""
    meshes = [item.object_mesh for item in objects]
    digest = [hashlib.sha256(mesh.vertices.tobytes() + mesh.faces.tobytes()).hexdigest()[:8] for mesh in meshes]
    hand = Path(args.mano).name if args.mano else "builtin"
    return {
        "made_by": "make_dataset.py",
        "command": shlex.join(["python", *sys.argv]),
        "seed": args.seed,
        "versions": {"python": platform.python_version(), "numpy": np.__version__, "torch": torch.__version__},
        "licences": {
            "hand": "MANO licence (non-commercial research)" if args.mano else "built-in hand: MIT, see hoi/assets",
            "objects": sorted({mesh.source for mesh in meshes}),
        }
        | ({"grasps": "GrabNet licence (non-commercial research)"} if args.grasp == "grabnet" else {}),
        "job": {flag: getattr(args, flag) for flag in JOB_FLAGS}
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


def find_all_grasps(args: argparse.Namespace, meshes: list[ObjectMesh], run: Any) -> list[GraspedObject]:
    """Grasps of every object; objects without any are left out, and it is said; an error when none is left."""
    results = list(tqdm(run("grasps_of", range(len(meshes))), "grasps", len(meshes), unit="object"))
    found, notes = [item for item, _ in results], [note for _, lines in results for note in lines]
    good = graspable(args, found)
    bad = [item.object_mesh.object_id for item in found if not graspable(args, [item])]
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


def main(args: argparse.Namespace) -> None:
    if args.check:
        report = check_folder(args.check, load_hand(args.mano) if args.mano else None)
        print(report)
        sys.exit(0 if report.ok else 1)
    if args.mano:  # read here too, so that a bad file is refused before any worker starts
        notes = load_hand(args.mano).notes
        print("\n".join(notes), end="\n" if notes else "")
    if args.grasp == "grabnet":
        load_grabnet(args.grabnet)
    shapes = range(args.object_seed, args.object_seed + args.object_instances)
    meshes = collect_objects(args.object, shapes, args.category, args.units, args.up)
    for mesh in meshes:
        print("\n".join(f"{mesh.object_id}: {note}" for note in mesh.notes), end="\n" if mesh.notes else "")
    per_scene = args.frames * args.looks
    scenes = -(-args.num // per_scene)
    with mapper(args, meshes) as run:
        print(f"renderer: {next(iter(run('renderer_used', [0])))}")
        writer = DatasetWriter(args.out, describe(args, find_all_grasps(args, meshes, run)))
        todo = [k for k in range(scenes) if not all(writer.done(i) for i in range(k * per_scene, (k + 1) * per_scene))]
        print(f"{scenes} scenes x {per_scene} records -> {args.out}, {len(writer)} records are there already")
        before = len(writer)
        try:
            make_all(run, writer, todo, per_scene)
        except KeyboardInterrupt:
            sys.exit(f"interrupted: {len(writer)} records are complete; the same command continues")
    writer.finish()
    left_out = scenes * per_scene - len(writer)
    print(f"{len(writer) - before} new records, {len(writer)} in all")
    if left_out > 0:
        print(f"{left_out} records were left out: the hand leaves the picture, or hand or object is hidden")
    print(f"look at {args.out / 'grid.png'}; validate with: python make_dataset.py --check {args.out}")


def run(arguments: list[str] | None = None) -> None:
    """The command: problems become a message and exit code 1."""
    args = parse_args(arguments)
    with told_problems("make_dataset.py", "interrupted before the first record; the same command starts again"):
        main(args)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # an orderly stop for `kill` too
    run()
