"""The part of make_dataset.py for real pictures: its flags, and the way from a public dataset to a dataset folder.

    python make_dataset.py --dexycb DexYCB --split s0 train --mano MANO_RIGHT.pkl --workers 8 --out data/dexycb
    python make_dataset.py --ho3d HO3D --models YCB_models --mano MANO_RIGHT.pkl --out data/ho3d
    python make_dataset.py --csv train.csv --normals estimated --out data/hoi4d         # the authors' own format

It prints a progress bar, how many frames were rejected and why, and how well the records fit their own annotation.
What happens to a frame is in hoi/sources/convert.py.  Paper: Sec. 4 (training data).
"""

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hoi.common.command import how_made, positive
from hoi.common.machine import mapper
from hoi.data.folder import read_records
from hoi.data.writer import open_folder
from hoi.sources.captions import CAPTION_FILE, Captioner, apply_captions, caption_folder, read_captions
from hoi.sources.convert import (
    MARGIN,
    MIN_AREA,
    NORMALS,
    STROKES,
    FrameConverter,
    check_needs,
    convert_frames,
    fit_warning,
    summary,
)
from hoi.sources.dexycb import DexYCB
from hoi.sources.frame import RejectionLog, Source
from hoi.sources.ho3d import HO3D
from hoi.sources.normals import DPT_HYBRID
from hoi.sources.official_csv import OfficialCSV

# What decides the records; a folder begun with other values is refused instead of mixed.
PICTURE_JOB_FLAGS = (
    "split", "subjects", "sequences", "cameras", "frame_range", "shuffle", "size", "margin", "paint_objects", "normals",
    "strokes", "min_area", "text",
)  # fmt: skip


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


def add_real_picture_flags(parser: argparse.ArgumentParser) -> None:
    real = parser.add_argument_group(
        "real pictures instead of objects", "Frames that give no record are counted by reason in dataset.json and "
        "listed in rejected.jsonl. --size, --text, --mano, --count, --seed, --workers and --out apply too.")
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
                      help="take the frames in an order drawn from --seed, so that --count N is a fair sample")
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


def wants_real_pictures(args: argparse.Namespace) -> bool:
    """Whether the records come from a real dataset instead of object meshes."""
    return bool(args.dexycb or args.ho3d or args.csv)


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
    order = order[: args.count]
    writer, log = open_folder(args.out, describe_pictures(args, source)), RejectionLog(args.out)
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
