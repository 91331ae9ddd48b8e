"""Every command that writes may be killed at any moment: run again, it ends as one that nobody disturbed, file by file.

Killed just before a file operation of every kind and place (an audit hook counts them), and at random times.
"""

import hashlib
import json
import random
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from training_world import make_world, small_model
from verifier_world import make_folder

import make_dataset
from hoi.data.folder import read_records
from hoi.data.writer import write_records
from hoi.verify.verifier import Verifier, save_verifier
from hoi.weights.export import export_own

# Each runs in a folder of its own, in which THERE_BEFORE lies already; {root} has what they read.
SCENES = ("make_dataset.py --object can --object-instances 1 --grasps-per-object 1 --size 32 --cache {root}/cache "
          "--out out")  # fmt: skip
MODEL = "--checkpoint {root}/hoi.safetensors --steps 2 --dtype float32 --device cpu --threads 1 --out out"
TRAIN = ("train.py --data {root}/world/data --base {root}/world/base.safetensors --out out --steps 4 --batch-size 3 "
         "--save-every 2 --preview-every 2 --dtype fp32 --device cpu --threads 1")  # fmt: skip
JOBS = {
    "sample": f"sample.py --data {{root}}/scenes --count 4 --batch-size 2 {MODEL}",
    "sample, text alone": f"sample.py --no-conditions --count 3 {MODEL}",
    "video": f"video.py --trajectory {{root}}/scenes --gif {MODEL}",
    "make_dataset, scenes": f"{SCENES} --shade --count 3",
    "make_dataset, pictures": "make_dataset.py --csv {root}/reg.csv --size 32 --out out",
    "train hoi": f"{TRAIN} --stage hoi --reg-data {{root}}/world/buffer --ema-decay 0.9",
    "train vae": f"{TRAIN} --stage vae --crop 16",
    "train text": f"{TRAIN} --stage text",
    "verify": "hoi.verify out --verifier {root}/verifier.safetensors",
    "verify, choose": "hoi.verify out --keep iou_hand>=0 --list keep.txt --out kept",
    "export bop": "hoi.export --format bop {export_source} out",
    "export nocs": "hoi.export --format nocs --labels {root}/scene_of_nocs out",
    "export coco": "hoi.export --format coco {export_source} out",
    "export csv": "hoi.export --format csv {export_source} out",
    "export folder": "hoi.export --format folder {export_source} out",
    "export webdataset": "hoi.export --format webdataset --shard-mb 1 {export_source} out",
    "metrics": "hoi.metrics --fake {root}/hands --real {root}/other --verifier {root}/verifier.safetensors "
               "--bootstrap 3 --workers 0 --out out",
    "metrics, statistics": "hoi.metrics --real {root}/other --inception {root}/verifier.safetensors --workers 0 "
                           "--save-statistics real.npz --out out",
    "convert_keypoints": "tools/convert_keypoints.py mano {root}/dumped.json --out keypoints.json",
    "export_weights": "tools/export_weights.py {root}/hoi.safetensors --format own --out own.safetensors",
    "export_weights, diffusers": "tools/export_weights.py {root}/hoi.safetensors --format diffusers --out out",
}  # fmt: skip
THERE_BEFORE = {"verify": "hands", "verify, choose": "hands"}
QUICK = ("sample", "make_dataset, scenes", "train hoi", "verify, choose", "export coco", "metrics", "convert_keypoints")


@pytest.fixture(scope="module")
def root(tmp_path_factory, export_source) -> Path:
    """What the jobs read."""
    folder = tmp_path_factory.mktemp("killing")
    export_own(small_model(with_conditions=True), folder / "hoi.safetensors")
    words = SCENES.format(root=folder).split()[1:-1]
    make_dataset.run([*words, str(folder / "scenes"), "--frames", "3", "--count", "3"])
    for k, side in enumerate((64, 50, 64)):
        Image.new("RGB", (64, side), (k, 2, 3)).save(folder / f"{k}.png")
    (folder / "reg.csv").write_text("image,sentence\n0.png,A beach.\n1.png,Low.\n2.png,Snow.\n3.png,Missing.\n")
    make_world(folder / "world")
    shutil.copytree(export_source, folder / "scene_of_nocs")
    write_records(folder / "scene_of_nocs", [read_records(export_source)[0] | {"index": k} for k in range(10)])
    for seed, name in enumerate(("hands", "other")):
        make_folder(folder / name, 6, seed)
    save_verifier(folder / "verifier.safetensors", Verifier(["beach", "snow"], side=32))
    hands = [{"keypoints_2d": np.random.default_rng(k).uniform(0, 32, (21, 2)).tolist()} for k in range(3)]
    (folder / "dumped.json").write_text(json.dumps({f"images/{k:06d}.png": [hand] for k, hand in enumerate(hands)}))
    return folder


class Server:
    """killing_server.py, asked to be a job."""

    def __init__(self) -> None:
        words = [sys.executable, str(Path(__file__).parent / "killing_server.py")]
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, words: list[str], folder: Path, kill_at: int = 0, seconds: float = 0.0) -> tuple[int, float]:
        """Exit status (-9: killed) and seconds; killed before an operation of that number, or after so many seconds."""
        job = {"words": words, "folder": str(folder), "kill_at": kill_at, "seconds": seconds}
        print(json.dumps(job), file=self.process.stdin, flush=True)
        answer = json.loads(self.process.stdout.readline())
        return answer["status"], answer["seconds"]


@pytest.fixture(scope="module")
def server():
    server = Server()
    yield server
    server.process.kill()
    server.process.wait()


def contents(home: Path) -> dict[str, bytes | str]:
    """All that a job left, hidden files and empty folders too; without what a clock wrote, a training's speed."""
    found = {str(path.relative_to(home)): path.read_bytes() if path.is_file() else b"" for path in home.rglob("*")}
    for name in found:
        if name.endswith(".pt"):  # pickle writes a text twice or refers back, by where it came from
            found[name] = told(torch.load(home / name, weights_only=True))
    if "out/log.jsonl" in found:
        found["out/log.jsonl"] = re.sub(rb'"pictures_per_second": [0-9.]+', b"", found["out/log.jsonl"])
    return found


def told(value) -> str:
    """A training state, every bit of it."""
    if isinstance(value, dict):
        return str({key: told(item) for key, item in value.items()})
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {tuple(value.shape)} {hashlib.sha256(value.numpy().tobytes()).hexdigest()}"
    return repr(value)


class Whole:
    """A job that nobody disturbs: what it leaves, in how many seconds, by how many file operations."""

    def __init__(self, server: Server, job: str, words: list[str], root: Path, home: Path) -> None:
        self.job, self.words, self.root, self.home, self.server = job, words, root, home, server
        status, self.seconds = server.run(words, self.new_home())
        assert status == 0, Path(f"{home}.log").read_text()
        self.operations = int(Path(f"{home}.count").read_text())
        self.contents = contents(home)

    def new_home(self) -> Path:
        """Where the job runs, as it is before; the same place each time, for some files tell of it."""
        shutil.rmtree(self.home, ignore_errors=True)
        Path(f"{self.home}.log").unlink(missing_ok=True)
        self.home.mkdir(parents=True)
        if self.job in THERE_BEFORE:
            shutil.copytree(self.root / THERE_BEFORE[self.job], self.home / "out")
        return self.home

    def survives(self, *kills: dict[str, float]) -> int:
        """Assert that a run killed as `kills` say, one after the other, ends as this one; how many did strike."""
        home, struck = self.new_home(), 0
        for kill in (*kills, {}):
            status = self.server.run(self.words, home, **kill)[0]
            if status != -signal.SIGKILL:
                break
            struck += 1
        log, found = Path(f"{home}.log").read_text(), contents(home)
        # An export that was killed when all was done is not made twice, and says so.
        assert status == 0 or (struck and "exists already" in log), f"{self.job} {kills}: {log}"
        assert sorted(found) == sorted(self.contents), f"{self.job} {kills}"
        different = [name for name in found if found[name] != self.contents[name]]
        assert not different, f"{self.job} {kills}"
        return struck


@pytest.fixture(scope="module")
def whole_of(server, root, export_source, tmp_path_factory):
    """A job's name -> the job that nobody disturbs, run once."""
    made: dict[str, Whole] = {}

    def of(job: str) -> Whole:
        if job not in made:
            words = [word.format(root=root, export_source=export_source) for word in JOBS[job].split()]
            made[job] = Whole(server, job, words, root, tmp_path_factory.mktemp("whole") / "home")
        return made[job]

    return of


@pytest.mark.parametrize("job", QUICK)
def test_a_job_that_is_killed_ends_by_the_same_command_as_one_that_was_not(job, whole_of):
    whole = whole_of(job)
    assert whole.operations >= 5
    draw = random.Random(job)
    assert whole.survives({"kill_at": draw.randint(1, whole.operations)}) == 1


KILLED_JOBS = 200


@pytest.mark.slow
def test_two_hundred_killed_jobs_of_all_commands_end_as_those_that_were_not(whole_of, capsys):
    draw, struck, faults = random.Random(0), Counter(), []
    for case in range(KILLED_JOBS):
        job = list(JOBS)[case % len(JOBS)]
        whole, turn = whole_of(job), case // len(JOBS)
        turns = -(-KILLED_JOBS // len(JOBS))
        # Two of three at an operation, the whole course of the job in even strides; the third at a random time.  Half
        # of them once more on their way to the end.
        place = 1 + int((turn + draw.random()) / turns * whole.operations)
        kills = [{"seconds": draw.uniform(0, whole.seconds)} if turn % 3 == 2 else {"kill_at": place}]
        kills += [{"kill_at": draw.randint(1, whole.operations)}] if draw.random() < 0.5 else []
        try:
            struck[job] += whole.survives(*kills)
        except AssertionError as fault:
            faults.append(str(fault))
    with capsys.disabled():
        print(f"\n{KILLED_JOBS} jobs, {struck.total()} kills: {dict(struck)}")
    assert not faults, "\n".join(faults)
    assert struck.total() >= KILLED_JOBS * 0.8
