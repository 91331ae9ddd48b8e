"""Measure pictures, as the paper does in Sec. 4.  The table is printed and written to metrics.md and metrics.json.

    python -m hoi.metrics --real DIR --fake DIR --inception FILE          FID, sFID, IS
    python -m hoi.metrics --real DIR --save-statistics real.npz --inception FILE    the reference once, for later
    python -m hoi.metrics --real real.npz --fake DIR --inception FILE
    python -m hoi.metrics --fake DIR --clip ViT-B-32-quickgelu FILE       CLIPScore; with --real a Frechet distance, too
    python -m hoi.metrics --real DIR --fake DIR --verifier                a Frechet distance for the toy world
    python -m hoi.metrics --fake DIR --keypoints FILE --contact FILE      PCK, MPJPE, contact recall
    python -m hoi.metrics --fake DIR --poses FILE                         3D IoU and degree-centimetre mAP
    python -m hoi.metrics --videos DIR DIR ...                            flicker

DIR is a dataset folder or any folder of pictures.  The formats of predictions are at the end.
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from hoi.common.command import file_to_write, not_negative, positive, share, usable_cpus
from hoi.metrics.choices import BOXES, POSE_FORMAT
from hoi.verify.choices import BUILT_IN_VERIFIER, FORMATS

WEIGHTS = ("inception", "clip", "verifier")  # flags
PREDICTIONS = ("keypoints", "contact", "poses")
DETAILS = {"pck_thresholds": "keypoints", "boxes": "poses", "mano": "videos"}  # each says how another flag is meant


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """Arguments from the command line or a list; ends with argparse's message for flags that would go unread."""
    parser = argparse.ArgumentParser(
        prog="python -m hoi.metrics", description=__doc__, epilog=f"{FORMATS.read_text()}\n{POSE_FORMAT.read_text()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--real", type=Path, nargs="+", metavar="DIR",
        help="reference: folders, or an .npz with mu, sigma (and mu_s, sigma_s)")  # fmt: skip
    add("--fake", type=Path, nargs="+", metavar="DIR", help="pictures to measure; predictions name those of several "
        "folders from the folder above them: a/images/000000.png")  # fmt: skip
    add("--out", type=Path, default=Path("metrics"), metavar="DIR",
        help="for metrics.md and metrics.json (%(default)s)")  # fmt: skip
    add("--features", type=Path, metavar="DIR", help="where features are kept (default: OUT/.features)")
    add = parser.add_argument_group("Inception").add_argument
    add("--inception", type=Path, metavar="FILE", help="pt_inception-2015-12-05-6726825d.pth")
    add("--save-statistics", type=file_to_write, metavar="FILE", help="write mu, sigma, mu_s, sigma_s of --real (.npz)")
    add = parser.add_argument_group("other networks").add_argument
    add("--clip", nargs=2, metavar=("MODEL", "FILE"), help="open_clip model and weights: CLIPScore, Frechet distance")
    add("--verifier", type=Path, nargs="?", const=BUILT_IN_VERIFIER, metavar="FILE",
        help="of python -m hoi.verify train; without FILE the built-in one: Frechet distance")  # fmt: skip
    add = parser.add_argument_group("predictions and videos").add_argument
    add("--keypoints", type=Path, metavar="FILE", help="predicted hand keypoints of --fake: PCK, MPJPE")
    add("--pck-thresholds", type=share, nargs="+", default=[0.05, 0.1, 0.2], metavar="T",
        help="shares of the longer side of the joints' box (%(default)s)")  # fmt: skip
    add("--contact", type=Path, metavar="FILE", help="predicted contact states of --fake: contact recall")
    add("--poses", type=Path, metavar="FILE", help="predicted object poses: 3D IoU and degree-centimetre mAP")
    add("--boxes", choices=BOXES, default="nocs", help="; ".join(f"{name}: {what}" for name, what in BOXES.items()))
    add("--videos", type=Path, nargs="+", metavar="DIR", help="folders of video.py: flicker")
    add("--mano", metavar="FILE", help="official MANO_RIGHT.pkl, for videos made with it")
    add = parser.add_argument_group("how").add_argument
    # A draw of FID takes 0.03 s at 1,000 pictures and 0.9 s at 5,000 on two cores (Zen 5), so 200 take 3 minutes.
    add("--bootstrap", type=not_negative, default=200, metavar="N", help="draws of intervals, 0: none (%(default)s)")
    add("--seed", type=not_negative, default=0, help="of the draws")
    add("--skip-damaged", action="store_true", help="measure without damaged pictures, counted in the report")
    add("--batch-size", type=positive, default=32, metavar="B", help="pictures seen at once (%(default)s)")
    add("--workers", type=not_negative, default=min(usable_cpus(), 8), help="read pictures (processes, %(default)s)")
    add("--device", help="cpu, cuda, cuda:1, xpu, mps (default: a GPU where there is one)")
    args = parser.parse_args(arguments)
    _check_flags(parser, args)
    return args


def _check_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse flags that would go unread: the first row whose condition holds is told."""
    statistics, file_given = args.save_statistics, args.real is not None and args.real[0].suffix == ".npz"
    folder_given = args.real is not None and not file_given
    rows: list[tuple[Any, str]] = [
        (args.fake is None and not (args.videos or statistics),
         "nothing to measure: give --fake DIR or --videos DIR ..."),
        *((args.fake is None and getattr(args, flag) and not (flag == "inception" and statistics),
           f"--{flag} needs the pictures to measure: --fake DIR") for flag in (*WEIGHTS, *PREDICTIONS)),
        (statistics and statistics.suffix != ".npz",
         f"--save-statistics {statistics}: the name must end in .npz, as --real tells it by that"),
        (statistics and not (args.inception and folder_given),
         "--save-statistics needs --inception FILE and --real DIR"),
        (file_given and len(args.real) > 1, "--real takes folders or one .npz, not both"),
        (args.real and not any(getattr(args, flag) for flag in WEIGHTS),
         "--real needs a network to compare by: --inception, --clip or --verifier"),
        (file_given and not args.inception,
         "a statistics file is of Inception's features: --real FILE.npz needs --inception FILE"),
        (args.verifier and not folder_given,
         "a Frechet distance of --verifier needs pictures as the reference: --real DIR"),
        *((getattr(args, detail) != parser.get_default(detail) and not getattr(args, flag),
           f"--{detail.replace('_', '-')} says how --{flag} is measured, which was not given")
          for detail, flag in DETAILS.items()),
    ]  # fmt: skip
    # argparse knows no flags that need each other, and a flag that does nothing looks as if it had done something.
    for wrong, message in rows:
        if wrong:
            parser.error(message)


if __name__ == "__main__":
    parse_args()  # --help and mistakes are told before the seconds that these imports take

import json
import platform
import shlex
import sys
from importlib.metadata import version

from hoi.common.command import first_few, problems_as_messages
from hoi.common.files import sha256_of, write_whole
from hoi.common.machine import choose_device
from hoi.metrics import features, pictures
from hoi.metrics.clip import load_clip
from hoi.metrics.distances import Statistics, save_statistics
from hoi.metrics.flicker import add_flicker
from hoi.metrics.hands import add_contact_numbers, add_keypoint_numbers
from hoi.metrics.inception import load_inception
from hoi.metrics.intervals import Results, as_table
from hoi.metrics.poses import add_pose_numbers, read_poses
from hoi.verify.predictions import check_covers, read_contact_states, read_keypoint_predictions
from hoi.verify.verifier import load_verifier

PACKAGES = ("torch", "torchvision", "numpy", "pillow", "open_clip_torch")  # that decide numbers


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that was asked for, as one report.

    Raises FileNotFoundError or ValueError naming the folder, the file, or the device that is not there.
    """
    args.device = choose_device(args.device)  # before any file is hashed
    results = Results(args.bootstrap, args.seed)
    fake = None if args.fake is None else features.find_pictures(args.fake, args.workers, args.skip_damaged)
    reference = None if args.real is None else pictures.read_reference(args.real, args.workers, args.skip_damaged)
    for found in (fake, reference):
        if isinstance(found, features.PictureSet) and found.damaged:
            results.note(f"{found.folder}: {len(found.damaged)} pictures were left out, damaged or of a kind "
                         f"that is not read: {first_few(found.damaged, joint='; ')}")  # fmt: skip
    extractors = _measure_features(args, results, fake, reference)
    by_class = _measure_predictions(args, results, fake)
    if args.videos:
        add_flicker(results, args.videos, args.mano)
    files = {name: getattr(args, name) for name in (*WEIGHTS, *PREDICTIONS)}
    # Of a model's name and its file only the file.
    files = {name: file[-1] if isinstance(file, list) else file for name, file in files.items() if file is not None}
    return {
        "command": shlex.join(["python", "-m", "hoi.metrics", *sys.argv[1:]]),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "measured": None if fake is None else fake.described(),
        "reference": None if reference is None else reference.described(),
        "preprocessing": {extractor.name: extractor.preprocessing for extractor in extractors},
        "files": {name: {"file": str(file), "sha256": sha256_of(file)} for name, file in files.items()},
        "interval": results.interval(),
        "numbers": [item.as_json() for item in results.measurements],
        "average_precision_by_class": by_class,
        "notes": results.notes,
        "table": as_table(results.measurements),
    }


def _measure_features(
    args: argparse.Namespace, results: Results, fake: features.PictureSet | None, reference: pictures.Reference | None
) -> list[features.Extractor]:
    """Numbers of every network that was given; returns what looked at the pictures."""
    # Hidden, so that an --out inside a folder of pictures adds nothing to it.
    run = features.Run(args.features or args.out / ".features", args.batch_size, args.workers, args.device)
    extractors = []
    if args.inception:
        inception = load_inception(args.inception).to(args.device)
        extractors.append(features.inception_extractor(inception, args.inception))
        how = extractors[0].name, sha256_of(args.inception)
        # A reference made in another way is refused before any picture is looked at.
        if isinstance(reference, Statistics) and (note := reference.check(*how)):
            results.note(note)
        if args.save_statistics:
            gaussians = {key: pictures.gaussian_of(reference, run, extractors[0], key) for key in ("pool", "spatial")}
            save_statistics(args.save_statistics, gaussians, *how)
            results.note(f"the reference's statistics are in {args.save_statistics}")
        if fake is not None:
            pictures.add_inception_score(results, run, fake, extractors[0])
        if fake is not None and reference is not None:
            pictures.add_inception_distances(results, run, fake, reference, extractors[0])
    if args.clip:
        clip = load_clip(*args.clip)
        clip.model.to(args.device)
        extractors.append(features.clip_extractor(clip, args.clip[1]))
        pictures.add_clip_score(results, run, fake, clip, extractors[-1])
    if args.verifier:
        extractors.append(features.verifier_extractor(load_verifier(args.verifier).to(args.device), args.verifier))
    if isinstance(reference, features.PictureSet):
        for extractor in extractors[1:] if args.inception else extractors:
            pictures.add_frechet(results, run, fake, reference, extractor)
    return extractors


def _measure_predictions(args: argparse.Namespace, results: Results, fake: features.PictureSet | None) -> dict | None:
    """Numbers of predictions by file, and contact by geometry, which needs none; average precision by class."""
    contact = None
    if args.keypoints:
        predictions = read_keypoint_predictions(args.keypoints)
        check_covers(predictions, pictures.annotated(fake, "--keypoints"), args.keypoints, fake.damaged)
        add_keypoint_numbers(results, fake.records, predictions, args.pck_thresholds)
    if args.contact:
        contact = read_contact_states(args.contact)
        check_covers(contact, pictures.annotated(fake, "--contact"), args.contact, fake.damaged)
    if fake is not None and fake.records is not None:  # contact by geometry stands in the records
        add_contact_numbers(results, fake.records, contact)
    if not args.poses:
        return None
    true, predicted = read_poses(args.poses, fake.folder, pictures.annotated(fake, "--poses"), list(fake.damaged))
    return add_pose_numbers(results, true, predicted, args.boxes)


def as_markdown(report: dict[str, Any]) -> str:
    """The table of a report (as `measure` returns it) with what is needed to compare it."""
    lines = [report["table"], ""]
    for title in ("measured", "reference"):
        entries = {key: value for key, value in (report[title] or {}).items() if value}
        if entries:
            lines.append(f"- {title}: " + ", ".join(f"{key} {value}" for key, value in entries.items()))
    lines += [f"- preprocessing ({name}): {how}" for name, how in report["preprocessing"].items()]
    lines += [f"- {name}: {of['file']}, SHA-256 {of['sha256'][:16]}" for name, of in report["files"].items()]
    lines += [f"- note: {note}" for note in report["notes"]]
    if report["interval"]["resamples"]:
        lines.append(f"- {report['interval']['explanation']}; {report['interval']['resamples']} draws")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    """Measure, write metrics.md and metrics.json, print the table."""
    args = parse_args(arguments)
    with problems_as_messages("hoi.metrics", "interrupted; finished features are kept, run the same command again"):
        report = measure(args)
        text = as_markdown(report)
        write_whole(args.out / "metrics.md", text.encode())
        numbers = json.dumps(report, indent=1, allow_nan=False) + "\n"  # NaN is no JSON; as_json wrote null
        write_whole(args.out / "metrics.json", numbers.encode())
    print(text)
    print(f"written: {args.out}/metrics.md, metrics.json; features are in {args.features or args.out / '.features'}")


if __name__ == "__main__":
    main()
