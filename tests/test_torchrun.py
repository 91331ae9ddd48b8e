"""torchrun: every documented line starts, and several processes make one folder and one training run."""

import argparse
import json
import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from torch.distributed.run import get_args_parser
from training_world import make_world

import make_dataset
import sample
import train
from hoi.data.folder import read_records

ROOT = Path(__file__).parent.parent
SCRIPTS = {"sample.py": sample, "train.py": train, "make_dataset.py": make_dataset}


def documented_lines() -> list[list[str]]:
    """The words after `torchrun`, up to the end of the command, of every line that pages and docstrings show."""
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *ROOT.glob("*.py"), *(ROOT / "hoi").rglob("*.py")]
    text = "\n".join(page.read_text() for page in pages)
    return [shlex.split(line, comments=True) for line in re.findall(r"torchrun (--[a-z][^`\n]+)", text)]


def test_torchrun_and_the_script_accept_every_documented_line():
    lines = documented_lines()
    assert len(lines) >= 6
    for words in lines:
        launch = get_args_parser().parse_args(words)
        assert launch.training_script in SCRIPTS, words
        if "..." not in launch.training_script_args:
            SCRIPTS[launch.training_script].parse_args(launch.training_script_args)


@pytest.mark.parametrize("script", SCRIPTS)
def test_torchrun_takes_no_flag_of_a_script_for_an_abbreviation_of_its_own(script, monkeypatch):
    """argparse refuses a word that begins several of torchrun's flags, also behind the script's name."""
    parsers = []
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(argparse.ArgumentParser, "parse_args", lambda self, *_: parsers.append(self) or sys.exit())
        SCRIPTS[script].parse_args()
    flags = [flag for action in parsers[0]._actions for flag in action.option_strings]
    assert len(flags) > 20
    for flag in flags:
        assert get_args_parser().parse_args([script, flag]).training_script_args == [flag]


def torchrun(*words: str) -> None:
    """Two processes on this machine, until they end."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launcher, *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def test_two_processes_sample_without_conditions_and_train(tmp_path):
    world = make_world(tmp_path)
    words = f"--no-conditions --checkpoint {world}/base.safetensors --count 3 --steps 2 --device cpu --threads 1"
    torchrun("sample.py", *words.split(), "--dtype", "float32", "--out", str(tmp_path / "made"))
    records = read_records(tmp_path / "made")
    assert [record["index"] for record in records] == [0, 1, 2]
    words = f"--data {world}/data --reg-data {tmp_path}/made --base {world}/base.safetensors --out {tmp_path}/run"
    torchrun("train.py", *words.split(), *"--steps 2 --batch-size 2 --dtype fp32 --device cpu --threads 1".split())
    assert (tmp_path / "run" / "model.safetensors").is_file()


def two_nodes(port: int, *words: str) -> None:
    """A launcher at each of two addresses of this machine, a process each, until they end."""
    launch = f"--nnodes 2 --nproc-per-node 1 --rdzv-backend c10d --rdzv-id two --rdzv-endpoint 127.0.0.1:{port}"
    nodes = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *launch.split(), "--local-addr", f"127.0.0.{k}", *words],
            cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True,
        )
        for k in (1, 2)
    ]  # fmt: skip
    said = [node.communicate(timeout=300)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert sum(words[-1] in text for text in said) == 1  # one process speaks for all


def contents(folder: Path) -> dict[str, bytes]:
    """All files but dataset.json, which holds the command."""
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if name != "dataset.json"}


@pytest.mark.slow
def test_two_nodes_on_one_disk_make_the_folders_of_a_single_process(tmp_path):
    world = make_world(tmp_path)
    for k, side in enumerate((64, 50, 64, 64)):
        Image.new("RGB", (64, side), (k, 2, 3)).save(tmp_path / f"{k}.png")
    (tmp_path / "reg.csv").write_text("image,sentence\n0.png,A beach.\n1.png,Low.\n2.png,Snow.\n4.png,No.\n3.png,So.\n")
    jobs = {
        "sample.py": f"--no-conditions --checkpoint {world}/base.safetensors --count 3 --steps 2 --device cpu "
                     "--threads 1 --dtype float32",
        "make_dataset.py": "--object can --object-instances 1 --grasps-per-object 1 --size 32 --count 5 "
                           f"--cache {tmp_path}/cache",
        "make_dataset.py --csv": f"--csv {tmp_path}/reg.csv --size 32",
    }  # fmt: skip
    for k, (job, words) in enumerate(jobs.items()):
        script, alone, shared = job.split()[0], tmp_path / f"alone{k}", tmp_path / f"shared{k}"
        SCRIPTS[script].run([*words.split(), "--out", str(alone)])
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
        for _ in range(2):  # again: nothing to do
            two_nodes(port, script, *words.split(), "--out", str(shared))
            assert contents(shared) == contents(alone)
        cards = [json.loads((folder / "dataset.json").read_text()) for folder in (alone, shared)]
        assert cards[0] | {"command": ""} == cards[1] | {"command": ""}
