"""What the scripts share as commands: a type of argument, and problems told in one line, without a traceback."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager


def positive(word: str) -> int:
    """An argument that is a whole number from 1 on; argparse says so otherwise."""
    if not word.isdigit() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word!r} is not a positive whole number")
    return int(word)


@contextmanager
def told_problems(script: str, interrupted: str) -> Iterator[None]:
    """Within this block what users can cause becomes a message and exit code 1; bugs keep their traceback.

    script       name that stands before the message of a ValueError or OSError
    interrupted  the message after Ctrl-C
    """
    try:
        yield
    except (ValueError, OSError) as problem:
        raise SystemExit(f"{script}: {problem}") from problem
    except KeyboardInterrupt:
        raise SystemExit(interrupted) from None
