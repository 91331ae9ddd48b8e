"""Dataset folders -> the layout of another tool: BOP, NOCS, COCO, the CSV of the authors' release, or WebDataset.

    python -m hoi.export --format bop data/toy out/bop      # 6D pose: scenes, masks, models in mm, symmetries
    python -m hoi.export --format nocs data/nocs out/nocs   # category pose, of make_dataset.py --camera nocs folders
    python -m hoi.export --format coco data/toy out/coco    # 21 hand keypoints, boxes, masks
    python -m hoi.export --format csv data/toy out/csv      # the authors' training, test and regularisation CSV
    python -m hoi.export --format webdataset data/toy out/shards   # tar shards, for very many records and object stores
    python -m hoi.export --format folder data/toy data/scans out/both --split train=0.8 val=0.2 --by object

Drawn, generated and real pictures are exported alike.  Records that the format cannot hold are left out and counted by
reason.  The output appears whole at the end or not at all; of webdataset each shard does, and the same command goes on
behind those that are there, also when the folder has grown.
"""

# ruff: noqa: E402
import argparse
import re
from pathlib import Path

from hoi.common.choices import EXPORT_FORMATS, SHARD_FIELDS, SHARD_MB
from hoi.common.command import positive, share

OPTIONS = {"nocs": ("labels", "first_scene"), "webdataset": ("shard_mb", "fields")}  # flags that are a format's own


def parse_split(word: str) -> tuple[str, float]:
    """train=0.8 -> its name and share."""
    name, _, number = word.partition("=")
    if not re.fullmatch(r"\w+", name) or share(number) == 0:
        raise argparse.ArgumentTypeError(f"{word!r} is no NAME=SHARE such as train=0.8")
    return name, share(number)


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; options of another format are refused."""
    parser = argparse.ArgumentParser(
        prog="python -m hoi.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--format", choices=EXPORT_FORMATS, required=True, help="as listed above")
    add("--labels", action="store_true", help="nocs: also write exact poses as pickles of SPD's form, which its "
        "readers otherwise recover from coordinates and depth")  # fmt: skip
    add("--first-scene", type=positive, default=0, metavar="N", help="nocs: number of the first scene, to add to N "
        "scenes of another CAMERA/train (default 0: readers count from 00000)")  # fmt: skip
    add("--shard-mb", type=positive, default=SHARD_MB, metavar="MB",
        help="webdataset: a shard is at most so many millions of bytes (default: %(default)s)")  # fmt: skip
    add("--fields", nargs="+", choices=SHARD_FIELDS, default=(), metavar="NAME", help=f"webdataset: which of "
        f"{', '.join(SHARD_FIELDS)} a record must have beside its json (default: all that any record has)")  # fmt: skip
    add("--split", nargs="+", type=parse_split, default=(), metavar="NAME=SHARE",
        help="write splits to OUT/NAME, e.g. train=0.8 val=0.2, with no view or object on two sides")  # fmt: skip
    add("--by", choices=("view", "object"), default="view", help="what a split keeps together: frames and looks of a "
        "view, or all of an object (default: view)")  # fmt: skip
    add("folders", type=Path, nargs="+", metavar="DIR", help="dataset folders; several become one, numbered on")
    add("out", type=Path, metavar="OUT", help="a new folder")
    args = parser.parse_args(arguments)
    if args.split and (len(dict(args.split)) < len(args.split) or abs(sum(dict(args.split).values()) - 1) > 1e-6):
        parser.error("--split takes different names whose shares sum to 1, e.g. train=0.8 val=0.2")
    for name, flags in OPTIONS.items():
        for flag in flags if name != args.format else ():
            if getattr(args, flag) != parser.get_default(flag):
                parser.error(f"--{flag.replace('_', '-')} is for --format {name}")
    return args


if __name__ == "__main__":
    parse_args()  # --help and mistakes are told before the seconds that these imports take

from hoi.common.command import problems_as_messages
from hoi.export.formats import FORMATS, export_folders, left_out_lines, split_lines


def main(args: argparse.Namespace) -> None:
    """Export, and say how much was written and left out."""
    options = {name: getattr(args, name) for name in OPTIONS.get(args.format, ())}
    written, left_out = export_folders(args.folders, args.format, args.out, options, dict(args.split), args.by)
    print(f"{written.total()} records -> {args.out}{split_lines(written)}{left_out_lines(left_out)}")


def run(arguments: list[str] | None = None) -> None:
    """The command: problems become a message and exit code 1."""
    args = parse_args(arguments)
    left = "whole shards stay, the same command continues" if FORMATS[args.format].grows else "nothing was left behind"
    with problems_as_messages("hoi.export", f"interrupted: {left}"):
        main(args)


if __name__ == "__main__":
    run()
