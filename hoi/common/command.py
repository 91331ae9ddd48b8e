"""What command lines share: types of arguments, how a folder was made, and problems told in a line."""

import argparse
import math
import platform
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch


def positive(word: str) -> int:
    """An argument that is a whole number from 1 on.  As the other types here, argparse tells the user otherwise."""
    if not word.isdigit() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word!r} is not a positive whole number")
    return int(word)


def not_negative(word: str) -> int:
    """An argument that is a whole number from 0 on."""
    if not word.isdigit():
        raise argparse.ArgumentTypeError(f"{word!r} must not be negative: expected a whole number from 0 on")
    return int(word)


def finite(word: str) -> float:
    """An argument that is a number, neither infinite nor NaN."""
    try:
        number = float(word)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{word!r} is not a finite number")
    return number


def add_size_flags(add: Callable[..., Any], default: str) -> None:
    """Flags on the size of pictures, by an argparse parser's or group's add_argument.

    default  what it is otherwise, for the help
    """
    add("--size", type=positive, metavar="PX", help=f"height and width of the pictures, pixels (default: {default})")
    add("--height", type=positive, metavar="PX", help="height alone, pixels (default: --size)")
    add("--width", type=positive, metavar="PX", help="width alone, pixels (default: --size)")


def share(word: str) -> float:
    """An argument that lies between 0 and 1."""
    if not 0 <= finite(word) <= 1:
        raise argparse.ArgumentTypeError(f"{word} does not lie between 0 and 1")
    return float(word)


def how_made(script: str) -> dict[str, Any]:
    """Entries of dataset.json that say what made the folder: made_by, command, versions.

    script  name of the program; the command is the one that runs now
    """
    return {
        "made_by": script,
        "command": shlex.join(["python", *sys.argv]),
        "versions": {
            "python": platform.python_version(),
            "numpy": np.__version__,
            "torch": torch.__version__,
            "commit": project_commit(),
        },
    }


def project_commit() -> str | None:
    """This project's git commit, "-dirty" behind it when files were changed since; None outside a checkout."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():  # an installed copy must not name the checkout that it happens to lie in
        return None
    # Without locks: a git that the user runs meanwhile must not fail.  Without tags: the hash alone is unambiguous.
    words = ["git", "--no-optional-locks", "-C", root, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def first_few(items: Iterable[str], most: int = 5, joint: str = ", ") -> str:
    """The first few of many and how many more, for a message: "a, b, c and 4 more"."""
    items = list(items)
    more = f"{joint.strip(', ')} and {len(items) - most} more" if len(items) > most else ""
    return joint.join(items[:most]) + more


@contextmanager
def problems_as_messages(script: str, interrupted: str) -> Iterator[None]:
    """Within this block or function what users can cause becomes a message and exit code 1; bugs keep their traceback.

    script       name that stands before the message of a ValueError or OSError
    interrupted  the message after Ctrl-C; `kill` (SIGTERM) is as orderly a stop
    """
    # As Ctrl-C does, `kill` then raises KeyboardInterrupt where the program is, so that everything is closed in order.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except (ValueError, OSError) as problem:
        raise SystemExit(f"{script}: {problem}") from problem
    except (MemoryError, torch.OutOfMemoryError) as problem:
        why = f" ({str(problem).splitlines()[0]})" if str(problem) else ""
        raise SystemExit(f"{script}: out of memory{why}; smaller batches or fewer --workers need less") from problem
    except KeyboardInterrupt:
        raise SystemExit(interrupted) from None  # a text as the code of SystemExit is printed, and the code is 1
    finally:
        signal.signal(signal.SIGTERM, before)
