"""How fast real pictures become records.

    python tests/bench_sources.py             # DexYCB layout, 512 px, one process, one thread

It writes a small dataset in DexYCB's layout (noisy pictures, so that PNG has work; meshes of 16k faces), converts it
and prints records a second of process CPU time and of wall time, for each way to normals that needs no network.
"""

# ruff: noqa: E402
import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import trimesh
from PIL import Image

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from real_layouts import SERIALS, write_dexycb, write_mano

from hoi.sources.convert import ConversionSettings, FrameConverter
from hoi.sources.dexycb import DexYCB


def add_noise(root: Path, level: float) -> None:
    """Normal noise of `level` grey levels: the crops' PNG then costs what a photograph's does, or more."""
    generator = np.random.default_rng(0)
    for path in sorted(root.rglob("color_*.jpg")):
        with Image.open(path) as picture:
            pixels = np.asarray(picture) + generator.normal(size=(480, 640, 3)) * level
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(path, quality=95)


def densify(root: Path, faces: int) -> None:
    """Object meshes as fine as scanned ones."""
    for path in root.rglob("textured_simple.obj"):
        mesh = trimesh.load(path, force="mesh")
        while len(mesh.faces) < faces:
            mesh = mesh.subdivide()
        mesh.export(path)


def measure(root: Path, mano: Path, out: Path, normals: str, repeats: int) -> str:
    source = DexYCB(root, cameras=SERIALS[:2], mano_path=mano)
    settings = ConversionSettings(normals=normals, mano_path=mano)
    converter = FrameConverter(source, np.arange(len(source)), settings, out)
    results = [converter.convert(index) for index in range(len(source))]  # files, meshes and GL warm
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(repeats):
        results = [converter.convert(index) for index in range(len(source))]
    count = repeats * sum("rejected" not in result for result in results)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    renderer = converter.renderer.backend
    return f"{normals:14s} {count} records: {count / cpu:.1f} a CPU second, {count / wall:.1f} a second ({renderer})"


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        arrays, mano = write_mano(Path(folder))
        root = Path(folder) / "root"
        write_dexycb(root, arrays, frames=args.frames)
        if args.noise:  # photographs are rougher than flat colours
            add_noise(root, args.noise)
        densify(root, 16_000)
        for normals in ("rendered", "sensor-depth"):
            print(measure(root, mano, Path(folder) / normals, normals, args.repeats))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=3, help="of each of two sequences and two cameras")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--noise", type=float, default=8.0, metavar="GREY", help="standard deviation in grey levels")
    main(parser.parse_args())
