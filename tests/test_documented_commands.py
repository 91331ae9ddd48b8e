"""Every command that a page or a script's docstring shows is started for real: it works, or names the file it lacks.

A start ends in one of three ways: the command finishes, it refuses with one sentence that names something which the
reader has yet to bring, or it is still at work when its time is up and stops when told.  Nothing else will do: no
traceback, no complaint about flags.
"""

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import make_dataset
import sample
import train
import video

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
SECONDS = 45  # for a start; what computes by then has everything it needs
START = re.compile(r"(?:\w+=\S+ )*(?:time |/usr/bin/time -v )?((?:python|torchrun|bash)\s.*)")
# What this machine cannot be: a missing file, for one, is still missing after three restarts.
HERE = {
    "HOST:29400": "127.0.0.1:0", "--nnodes 2": "--nnodes 1", "--nproc-per-node 8": "--nproc-per-node 2",
    "--max-restarts 3": "--max-restarts 0",
}  # fmt: skip
# One a script, the quickest to end; all others are started by `pytest -m slow`.
QUICK = (
    "python sample.py --checkpoint runs/hoi/model.safetensors",
    "python video.py --trajectory data/approach",
    "python make_dataset.py --dexycb DexYCB --split s0 train --mano MANO_RIGHT.pkl --workers 8",
    "python train.py --data data/dexycb",
    "python -m hoi.verify out --keep",
    "python -m hoi.metrics --real DIR --fake DIR --inception",
    "python -m hoi.export --format bop",
    "python -m hoi.page out",
    "python -m hoi.weights FILE",
    "python tools/export_weights.py",
    "torchrun --nproc-per-node 8 sample.py --no-conditions",
    "torchrun --standalone --nproc-per-node 8 --max-restarts 3 train.py --data",
)


def documented() -> list[str]:
    """Every command of the pages and of the scripts' docstrings, as it stands there; outlines ("...") are left out."""
    lines = []
    for page in PAGES:
        text = page.read_text()
        lines += [line for block in re.findall(r"```\w*\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
        lines += re.findall(r"`([^`\n]+)`", re.sub(r"```\w*\n.*?```", "", text, flags=re.DOTALL))
    for script in (sample, video, make_dataset, train):
        lines += re.sub(r"\\\n\s*", "", script.__doc__).splitlines()
    parts = [part.strip() for line in lines for part in line.partition("  #")[0].split("&&")]
    commands = [match.group(1) for part in parts if (match := START.fullmatch(part))]
    return sorted({command for command in commands if " ..." not in command and re.search(r"\.(py|sh)|-m ", command)})


def start(command: str, folder: Path) -> tuple[int | None, str]:
    """Run a command in a folder that looks like a fresh checkout; its exit status (None: stopped by us) and output."""
    for entry in ROOT.iterdir():
        if not entry.name.startswith(".") and entry.name not in ("out", "runs", "data", "cache"):
            (folder / entry.name).symlink_to(entry)
    for there, here in HERE.items():
        command = command.replace(there, here)
    program, *words = shlex.split(command)
    programs = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run"]}
    environment = os.environ | {"XDG_CACHE_HOME": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # recipes call python
    process = subprocess.Popen(
        [*programs.get(program, [program]), *words], cwd=folder, env=environment, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        output = process.communicate(timeout=SECONDS)[0]
        return process.returncode, output
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGINT)
        output = process.communicate(timeout=SECONDS)[0]
        return None, output
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def lacking(command: str, folder: Path) -> list[str]:
    """Words of a command that could name files, and name none: what the reader has yet to bring."""
    words = shlex.split(command)[1:]
    return [word for word in words if re.fullmatch(r"[\w./-]*\w/?", word) and not (folder / word).exists()]


def check_start(command: str, folder: Path) -> None:
    wanted = lacking(command, folder)
    status, output = start(command, folder)
    ours = re.split(r"\n.*torch/distributed/elastic", output)[0]  # torchrun tells of a failed process by a traceback
    if status is None:  # our Ctrl-C may strike while Python itself is starting, before a script can hear it
        ours = re.sub(r"Traceback(?s:.*?)\nKeyboardInterrupt\n", "", ours)
    assert "Traceback" not in ours and ("usage:" not in output or "--help" in command), output
    if status not in (0, None):
        told = [line for line in ours.splitlines() if any(word in line for word in wanted)]
        assert told, f"{command!r} ends with {status} and names nothing of {wanted}:\n{output}"


def test_the_pages_show_many_commands_and_the_quick_ones_are_among_them():
    commands = documented()
    assert len(commands) >= 50
    assert [quick for quick in QUICK if not any(command.startswith(quick) for command in commands)] == []


@pytest.mark.parametrize("quick", QUICK)
def test_a_documented_command_of_each_script_starts(quick, tmp_path):
    check_start(next(command for command in documented() if command.startswith(quick)), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("command", documented())
def test_every_documented_command_starts(command, tmp_path):
    check_start(command, tmp_path)
