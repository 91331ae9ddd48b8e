"""Say what weight files are.

    python -m hoi.weights FILE ...       # what each file is, whether it fits, what is missing
"""

from __future__ import annotations

import argparse
import sys

from hoi.weights.describe import describe


def main(arguments: list[str] | None = None) -> int:
    prog = "python -m hoi.weights"
    parser = argparse.ArgumentParser(prog=prog, description="Say what weight files are.")
    parser.add_argument("files", nargs="+", metavar="FILE", help="weight files, or folders of diffusers")
    failed = 0
    for path in parser.parse_args(arguments).files:
        try:
            print(f"{path}: {describe(path)}")
        except (ValueError, OSError) as problem:
            failed = 1
            print(problem, file=sys.stderr)
    return failed


if __name__ == "__main__":
    sys.exit(main())
