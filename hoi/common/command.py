"""What command lines share: types of arguments, how a folder was made, and problems told in a line."""

import argparse
import math
import os
import platform
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hoi.common.choices import CONDITION_NAMES, DTYPES, SAMPLERS
from hoi.common.files import user_cache


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


def share(word: str) -> float:
    """An argument that lies between 0 and 1."""
    if not 0 <= finite(word) <= 1:
        raise argparse.ArgumentTypeError(f"{word} does not lie between 0 and 1")
    return float(word)


def condition_weight(word: str) -> tuple[str, float]:
    """The argument NAME=WEIGHT of --cond-scale."""
    name, _, weight = word.partition("=")
    if name not in (*CONDITION_NAMES, "all"):
        raise argparse.ArgumentTypeError(f"{name!r} is no condition; choose from {', '.join(CONDITION_NAMES)}, all")
    return name, finite(weight)


def file_to_write(word: str) -> Path:
    """An argument that is no folder: told before the work, not after it."""
    if Path(word).is_dir():
        raise argparse.ArgumentTypeError(f"{word} is a folder, expected a file to write")
    return Path(word)


def add_size_flags(add: Callable[..., Any], default: str) -> None:
    """Flags on the size of pictures, by an argparse parser's or group's add_argument.

    default  what it is otherwise, for the help
    """
    add("--size", type=positive, metavar="PX", help=f"height and width of the pictures, pixels (default: {default})")
    add("--height", type=positive, metavar="PX", help="height alone, pixels (default: --size)")
    add("--width", type=positive, metavar="PX", help="width alone, pixels (default: --size)")


def add_mesh_flags(add: Callable[..., Any]) -> None:
    """Flags on what mesh files hold, by an argparse parser's or group's add_argument; see collect_objects."""
    add("--category", nargs="+", metavar="NOUN",
        help="what mesh files show, used in texts: one noun for all, or one for each in order (default: from the "
        "file's or its folder's name)")
    add("--units", help="unit of mesh files: m, dm, cm, mm, in, or metres per unit as a number (default: what the "
        "file states, else guessed from its size, and said)")
    add("--up", choices=("y", "z"), help="vertical axis of mesh files (default: what the file states, else z)")


def default_cache() -> Path:
    """Where found grasps are kept unless the user says otherwise."""
    return user_cache() / "grasps"


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that make SamplingSettings; what is not given (None) comes from the model's preset."""
    add = parser.add_argument_group("sampling (defaults: of the checkpoint's preset)").add_argument
    add("--sampler", choices=SAMPLERS, help="dpm++: second-order multistep; ddim; ddpm: eq. 2")
    add("--steps", type=positive, metavar="N", help="with dpm++ tiny: 10, sd1: 20; the paper: 50 with ddim")
    add("--guidance-scale", type=finite, metavar="W", help="0 ignores the text, 1 means no guidance (sd1: 7.5)")
    add("--cond-scale", nargs="+", type=condition_weight, default=[], metavar="NAME=WEIGHT",
        help=f"weights of the conditions {', '.join(CONDITION_NAMES)}, or of all (1 each, Sec. 3.3); a ControlNet's "
        "share one")
    add("--cond-tau", type=share, default=1.0, metavar="TAU",
        help="share of the steps, from the noisiest on, that sees the conditions, 0 to 1")
    add("--negative-prompt", metavar="TEXT",
        help="unconditional text of guidance (default: the official stock list for sd1, empty for tiny)")


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that say which model `load_pipeline` takes, and where and how it computes."""
    add = parser.add_argument
    add("--checkpoint", type=Path, metavar="FILE", help="weights trained here (default: the built-in ones)")
    add("--base", type=Path, metavar="PATH", help="instead: a Stable Diffusion 1.x file (.safetensors, .ckpt) or a "
        "diffusers folder, or an export of tools/export_weights.py")
    add("--adapter", type=Path, metavar="FILE", help="condition encoders for --base: the official model_ad_N.pth, or a "
        "ControlNet for the three condition images")
    add("--vae", type=Path, metavar="FILE", help="another autoencoder for --base, or the one that its file lacks")
    add("--device", help="cpu, cuda, cuda:1, xpu, mps (default: a GPU where there is one)")
    add("--dtype", choices=("auto", *DTYPES), default="auto",
        help="of U-Net and condition encoders (default: bfloat16 where the hardware has it, float16 on GPUs without, "
        "float32 on CPUs without)")
    add("--compile", action="store_true", help="the U-Net by torch.compile, for GPUs: the first steps take a minute or "
        "more")
    add("--threads", type=positive, metavar="T", help="of torch on the CPU (default: torch's own choice)")


def usable_cpus() -> int:
    """Cores that this process may use, where the system says so: in a container fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def how_made(script: str) -> dict[str, Any]:
    """Entries of dataset.json that say what made the folder: made_by, command, versions.

    script  name of the program; the command is the one that runs now
    """
    return {
        "made_by": script,
        "command": shlex.join(["python", *sys.argv]),
        "versions": {
            "python": platform.python_version(),
            "numpy": version("numpy"),
            "torch": version("torch"),
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
    import torch  # here, not above: see hoi.common.choices

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
