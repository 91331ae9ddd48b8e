"""Speed and quality of the geometry: grasps found, records written.

    python tests/bench_geometry.py grasps                        # three shapes a family, 8 grasps each
    python tests/bench_geometry.py grasps --object scans/mug.stl # a mesh of your own
    python tests/bench_geometry.py records                       # make_dataset.py at 256 and 512 px

`grasps` prints CPU seconds a grasp (distance field included) with the deepest penetration, ours and as trimesh measures
it.  `records` runs make_dataset.py as a user does, with cached grasps, and prints records a wall-clock second: be alone
on the machine.  Nothing is asserted: speed is shown, not tested.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from hoi.geometry.contact import DistanceField  # noqa: E402
from hoi.geometry.grasp_search import find_grasps  # noqa: E402
from hoi.geometry.hand import load_hand  # noqa: E402
from hoi.geometry.objects import CATEGORIES, ObjectMesh, load_object, make_object  # noqa: E402


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("grasps", "records"))
    parser.add_argument("--object", type=Path, nargs="*", default=[], help="mesh files instead of the families")
    parser.add_argument("--grasps", type=int, default=8, help="grasps an object (default 8)")
    parser.add_argument("--count", type=int, default=300, help="records a measurement (default 300)")
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2], help="processes (default 1 and 2)")
    return parser.parse_args()


def depth_by_trimesh(mesh: ObjectMesh, points: np.ndarray) -> float:
    """Metres of the deepest of points (N, 3) inside the mesh, 0 if none is, by another library."""
    import trimesh

    surface = trimesh.Trimesh(mesh.vertices, mesh.faces, process=False)
    near = points[((points > surface.bounds[0]) & (points < surface.bounds[1])).all(axis=1)]
    inside = near[surface.contains(near)] if len(near) else near
    return float(trimesh.proximity.closest_point(surface, inside)[1].max()) if len(inside) else 0.0


def grasps(args: argparse.Namespace) -> None:
    hand = load_hand()
    if args.object:
        families = {path.name: [load_object(path)] for path in args.object}
    else:
        families = {category: [make_object(category, seed) for seed in range(3)] for category in CATEGORIES}
    print("| object | grasps | CPU seconds a grasp, median (slowest) | penetration, ours / trimesh (mm) | edges |")
    print("|---|---|---|---|---|")
    for name, meshes in families.items():
        seconds, ours, theirs, edges, found = [], 0.0, 0.0, 0, 0
        for number, mesh in enumerate(meshes):
            begin = time.process_time()
            field = DistanceField(mesh.vertices, mesh.faces)
            chosen = find_grasps(mesh, hand, args.grasps, np.random.default_rng(number), field=field)
            seconds.append((time.process_time() - begin) / max(len(chosen), 1))
            found += len(chosen)
            for grasp in chosen:
                ours, edges = max(ours, grasp.penetration_mm), max(edges, grasp.crossing_edges)
                theirs = max(theirs, 1000 * depth_by_trimesh(mesh, hand(grasp.hand_params).vertices))
        print(f"| {name} | {found} | {statistics.median(seconds):.2f} ({max(seconds):.2f}) "
              f"| {ours:.2f} / {theirs:.2f} | {edges} |", flush=True)


def records(args: argparse.Namespace) -> None:
    """Each rate comes from the difference of a long and a short run: starting Python and loading objects drop out."""
    print("| picture | processes | records a second |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:

        def seconds(size: int, workers: int, num: int, name: str) -> float:
            begin = time.perf_counter()
            command = [sys.executable, "make_dataset.py", "--cache", f"{folder}/cache", "--out", f"{folder}/{name}"]
            command += ["--size", str(size), "--workers", str(workers), "--count", str(num)]
            subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            return time.perf_counter() - begin

        seconds(64, 1, args.count, "find_grasps")
        for size in (256, 512):
            for workers in args.workers:
                few = 4 * workers
                short = seconds(size, workers, few, f"{size}-{workers}-short")
                rate = args.count / (seconds(size, workers, args.count + few, f"{size}-{workers}-long") - short)
                print(f"| {size} px | {workers} | {rate:.1f} |", flush=True)


if __name__ == "__main__":
    arguments = parse_args()
    grasps(arguments) if arguments.what == "grasps" else records(arguments)
