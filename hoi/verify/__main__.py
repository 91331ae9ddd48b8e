"""Hold every picture of a dataset folder against its own annotation: scores, a report, a selection.

    python -m hoi.verify DIR ...                               # adds `verification` to every record; DIR/verification/
    python -m hoi.verify DIR --keep "iou_hand>90%,pck>60%" --list keep.txt        # or --out DIR2; prints the yield
    python -m hoi.verify DIR --keypoints hamer.json --contacts 100doh.json        # formats: see score --help
    python -m hoi.verify train --data runs/toy/scenic runs/toy/lab --out verifier.safetensors --minutes 20

The built-in verifier knows the toy world; for other pictures train one on real pictures, or bring the keypoints of a
hand estimator.  Nothing is deleted.
"""

# ruff: noqa: E402
import argparse
import sys
from pathlib import Path

from hoi.common.command import file_to_write, positive
from hoi.verify.choices import BUILT_IN_VERIFIER, DEFAULT_SIDE, FORMATS, SCORES

COMMANDS = ("score", "train")
MEANINGS = "Scores, null where there is nothing to hold a picture against:\n\n" + "\n".join(
    f"    {name:33}{meaning}" for name, meaning in SCORES.items()
)


def add_score_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of `score`: what to score with, and what to do with what passes."""
    add = parser.add_argument
    add("folders", metavar="DIR", nargs="+", type=Path, help="dataset folders with pictures, each scored by itself")
    add("--verifier", metavar="FILE", type=Path, help="made by `train` (default: the built-in one)")
    add("--network", action=argparse.BooleanOptionalAction, default=True,
        help="--no-network leaves the verifier out: scores of --keypoints and --contacts alone")  # fmt: skip
    add("--keypoints", metavar="FILE", type=Path, help="hand keypoints of another program (JSON as below)")
    add("--contacts", metavar="FILE", type=Path, help="states of the 100DOH detector (JSON as below)")
    add("--keep", metavar="CONDITIONS", help='choose pictures, such as "iou_hand>90%%,pck>0.9", and print the yield; '
        "90%% of what a perfect picture of the record scores, as the toy world draws it or else as the verifier's file "
        "says; takes the stored scores if all records have some and nothing above is given; a FILE of names, one a "
        "line, as --list and the page of hoi.page write them, is a condition too")  # fmt: skip
    add("--device", help="of the verifier: cpu, cuda, cuda:1, xpu, mps (default: a GPU where there is one)")
    add("--list", metavar="FILE", type=file_to_write, help="with --keep: write the names of what passes")
    add("--out", metavar="DIR2", type=Path, help="with --keep: copy what passes to a dataset folder")


def add_train_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of `train`."""
    add = parser.add_argument
    add("--data", metavar="DIR", nargs="+", type=Path, required=True, help="dataset folders, none of them generated")
    add("--out", metavar="FILE", type=file_to_write, required=True, help="the verifier's file (.safetensors)")
    add("--verifier", metavar="FILE", type=Path, help="go on from this one, with a new optimizer and a new --seed")
    add("--minutes", type=float, default=6.0, help="training time (minutes, default %(default)s)")
    add("--steps", type=positive, metavar="N",
        help="so many steps of 32 pictures, in place of --minutes: the same on every machine")  # fmt: skip
    add("--allow-generated", action=argparse.BooleanOptionalAction, default=False,
        help="learn from generated pictures, too, to measure what they teach of hands (Table 3); such a verifier is no "
        "judge of generated pictures (default: refuse them)")  # fmt: skip
    add("--side", type=int, default=DEFAULT_SIDE,
        help="pixels that pictures are resized to (multiple of 32, default %(default)s)")  # fmt: skip
    add("--seed", type=int, default=0, help="of first weights and batches (default %(default)s)")


def parse_args(words: list[str]) -> argparse.Namespace:
    """Arguments of one of COMMANDS; `score` may be left out.  Ends with argparse's message for what makes no sense."""
    raw = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(prog="python -m hoi.verify", description=__doc__, epilog=MEANINGS, **raw)
    commands = parser.add_subparsers(dest="command", required=True)
    score = "score the pictures of DIR (the word `score` may be left out); its help has the formats of --keypoints, ..."
    add_score_flags(commands.add_parser("score", help=score, epilog=f"{FORMATS.read_text()}\n{MEANINGS}", **raw))
    add_train_flags(commands.add_parser("train", help="train a verifier on shaded or real pictures"))
    # argparse has no default subcommand; a folder named `train` must be given as ./train.
    known = bool(words) and words[0] in (*COMMANDS, "-h", "--help")
    args = parser.parse_args(words if known else ["score", *words])
    if args.command == "score":
        if bool(args.keep) != bool(args.list or args.out):
            needs = "--keep needs --list FILE or --out DIR2 to say what to do with what passes"
            parser.error(f"{needs}, and these need --keep")
        if not (args.network or args.keypoints or args.contacts):
            parser.error("--no-network needs --keypoints FILE or --contacts FILE")
        if len(args.folders) > 1 and (args.keep or args.keypoints or args.contacts):
            parser.error("--keep, --keypoints and --contacts are for one DIR, whose pictures they name; "
                         "python -m hoi.export --format folder makes one of several")  # fmt: skip
    if args.command == "train" and not args.minutes > 0:  # NaN is not, either
        parser.error(f"--minutes is {args.minutes:g}, expected more than 0")
    return args


if __name__ == "__main__":
    parse_args(sys.argv[1:])  # --help and mistakes are told before the seconds that these imports take

from hoi.common.command import problems_as_messages
from hoi.common.machine import choose_device, keep_freed_memory
from hoi.data import folder
from hoi.verify import report
from hoi.verify.training import minutes_passed, steps_passed, train_verifier
from hoi.verify.verifier import load_verifier, save_verifier


def score_command(args: argparse.Namespace, place: Path) -> None:
    """Score a folder, unless its stored scores will do; list or copy what passes."""
    records = folder.read_records(place)
    conditions = report.parse_keep(args.keep, records) if args.keep else []
    lists_alone = all(isinstance(condition, report.Listed) for condition in conditions)
    # Stored scores will do unless something is asked of which they know nothing: choosing needs no network then.
    anew = args.verifier or args.keypoints or args.contacts or not args.network
    stored = bool(records) and all(record.get("verification") for record in records)
    if conditions and (stored or lists_alone) and not anew:
        print(f"stored scores, verifier {records[0]['verification']['verifier']}" if stored else "by list, unscored")
    else:
        verifier = (args.verifier or BUILT_IN_VERIFIER) if args.network else None
        device = choose_device(args.device)
        records, found = report.verify_folder(place, verifier, args.keypoints, args.contacts, device)
        print(report.report_as_markdown(found))
    if conditions:
        print(report.describe_yield(records, conditions))
        if args.list:
            report.write_list(args.list, report.choose(records, conditions))
        if args.out:
            report.copy_records(place, args.out, records, conditions)


def main(args: argparse.Namespace) -> None:
    """Run the chosen command."""
    keep_freed_memory()  # batches come and go: giving their memory back each time costs a third of the speed
    if args.command == "train":
        start = load_verifier(args.verifier) if args.verifier else None
        progress, told = minutes_passed(args.minutes), {"minutes": str(args.minutes)}
        if args.steps:
            progress, told = steps_passed(args.steps), {"steps": str(args.steps)}
        verifier = train_verifier(args.data, progress, args.seed, args.side, start=start,
                                  allow_generated=args.allow_generated)  # fmt: skip
        told |= {"data": ", ".join(map(str, args.data))} | ({"generated": "allowed"} if args.allow_generated else {})
        save_verifier(args.out, verifier, told)
        print(f"wrote {args.out}")
    else:
        for place in args.folders:
            score_command(args, place)


if __name__ == "__main__":
    stopped = "stopped; records change all at once, when every picture is scored"
    with problems_as_messages("python -m hoi.verify", stopped):
        main(parse_args(sys.argv[1:]))
