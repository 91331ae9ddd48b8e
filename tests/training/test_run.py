"""hoi/training/run.py and train.py under fire: killed, stopped and poisoned runs, damaged states."""

import json
import multiprocessing as mp
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from training_world import assert_same, hoi_args, make_world

import train
from hoi.common import tensors
from hoi.training import data as training_data
from hoi.training import run as training_run
from hoi.training import stages
from hoi.training.run import gradient_norm

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def children():
    """Processes forked from a server that has imported everything: a new one starts in milliseconds."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["train", "training_world", "test_interruption"])
    return context


def run(world: Path, out: Path, *more: str) -> None:
    train.train(hoi_args(world, out, *more))


def weights(out: Path) -> dict[str, torch.Tensor]:
    return tensors.load_model_file(out / "model.safetensors")[0]


def assert_same_end(a: Path, b: Path) -> None:
    """The same weights, averages, optimizer and log, bit for bit."""
    states = [training_run.load_training_state(out) for out in (a, b)]
    for state in states:
        state["args"] = {}
    assert_same(*states)
    assert_same(weights(a), weights(b))
    logs = [[json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()] for out in (a, b)]
    for line in sum(logs, []):
        del line["pictures_per_second"]
    assert logs[0] == logs[1]


def survive_kills(children, world: Path, folder: Path, wanted: int, seed: int) -> None:
    """Runs that are killed at random moments, `wanted` times in all, must end as the run that nobody disturbs."""
    more = ["--steps", "40", "--save-every", "4", "--keep-states", "3"]
    whole = children.Process(target=run, args=(world, folder / "whole", *more))
    whole.start()
    whole.join(60)
    assert whole.exitcode == 0
    # The run that is measured comes second: the first one of all also starts the server.
    shutil.copytree(folder / "whole" / "latents", folder / "timed" / "latents")
    begin = time.monotonic()
    timed = children.Process(target=run, args=(world, folder / "timed", *more))
    timed.start()
    timed.join(60)
    duration, moments = time.monotonic() - begin, random.Random(seed)
    assert timed.exitcode == 0
    kills = runs = 0
    while kills < wanted:
        out = folder / f"killed{runs}"
        runs += 1
        ended = False
        while not ended:
            child = children.Process(target=run, args=(world, out, *more))
            child.start()
            if kills < wanted:
                child.join(moments.uniform(0, 0.6 * duration))
                kills += child.is_alive()
                child.kill()
            child.join(60)
            assert child.exitcode in (0, -signal.SIGKILL)
            ended = child.exitcode == 0
        assert_same_end(folder / "whole", out)
        assert not list(out.glob(".state_*")), "half written states are left"


def test_five_kills_at_random_moments_change_no_bit_of_the_result(children, world, tmp_path):
    survive_kills(children, world, tmp_path, wanted=5, seed=0)


@pytest.mark.slow
def test_thirty_kills_at_random_moments_change_no_bit_of_the_result(children, world, tmp_path):
    survive_kills(children, world, tmp_path, wanted=30, seed=1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_saves_the_step_it_is_at_and_goes_on_to_the_same_end(children, world, tmp_path, number):
    more = ["--steps", "40", "--save-every", "1000"]
    out = tmp_path / "stopped"
    child = children.Process(target=run, args=(world, out, *more))
    child.start()
    deadline = time.monotonic() + 30
    while not (out / "log.jsonl").exists() and time.monotonic() < deadline:  # its first line is written at step 10
        time.sleep(0.005)
    os.kill(child.pid, number)
    child.join(30)
    assert child.exitcode == 128 + number
    state = training_run.load_training_state(out)
    assert 10 <= state["step"] < 40
    assert not (out / "model.safetensors").exists()
    run(world, out, *more)
    run(world, tmp_path / "whole", *more)
    assert_same_end(tmp_path / "whole", out)


def test_when_a_state_is_written_the_weights_and_log_of_its_step_are_there_already(world, tmp_path, monkeypatch):
    write, seen = train.save_training_state, []

    def look_first(folder, step, *rest):
        seen.append((step, tensors.load_model_file(tmp_path / "run" / "model.safetensors")[1]["step"]))
        return write(folder, step, *rest)

    monkeypatch.setattr(train, "save_training_state", look_first)
    run(world, tmp_path / "run")
    assert seen == [(2, "2"), (4, "4")]


def test_a_truncated_state_is_skipped_with_a_warning_in_favour_of_the_one_before(world, tmp_path):
    run(world, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    newest = tmp_path / "cut" / "state_000000004.pt"
    newest.write_bytes(newest.read_bytes()[:-2000])
    (tmp_path / "cut" / "model.safetensors").unlink()
    with pytest.warns(RuntimeWarning, match=r"skipping a damaged training state.*state_000000004\.pt"):
        run(world, tmp_path / "cut")
    assert_same_end(tmp_path / "whole", tmp_path / "cut")


def test_a_folder_of_damaged_states_only_is_refused_rather_than_begun_anew(tmp_path):
    (tmp_path / "state_000000004.pt").write_bytes(b"PK\x03\x04 cut")
    with pytest.warns(RuntimeWarning), pytest.raises(ValueError, match=r"delete state_\*\.pt to begin anew"):
        training_run.load_training_state(tmp_path)


def test_saving_keeps_the_newest_states_and_drops_those_of_an_abandoned_future(tmp_path):
    for step in (10, 20, 30, 40):
        training_run.save_training_state(tmp_path, step, {"step": step}, keep=3)
    assert [path.name[-6:-3] for path in training_run.training_states(tmp_path)] == ["020", "030", "040"]
    (tmp_path / f".state_000000050.pt.{os.getpid()}@{platform.node()}.tmp").write_bytes(b"half")
    training_run.save_training_state(tmp_path, 32, {"step": 32}, keep=2)  # resumed from 30: 40 was damaged
    assert sorted(os.listdir(tmp_path)) == ["state_000000030.pt", "state_000000032.pt"]


def test_a_poisoned_picture_stops_the_run_by_name_before_any_weight_moves(world, tmp_path):
    out = tmp_path / "run"
    more = ["--batch-size", "1", "--reg-batch-size", "2", "--save-every", "1", "--steps"]
    run(world, out, *more, "2")
    indices = [int(training_data.draw_indices(10, training_data.Share(1), 0, step)[0]) for step in range(4)]
    poisoned = indices[3]  # step 4; a shuffle of ten, so no step before sees it
    for path in (out / "latents").glob("latents-*/00000.npy"):
        values = np.load(path)
        if len(values) == 10:
            values[poisoned, 0, 1, 5, 5] = np.nan
            np.save(path, values)
    expected = rf"step 4: loss nan.*learning rate 0\.001.*images/00000{poisoned}\.png.*last state is of step 3"
    with pytest.raises(FloatingPointError, match=expected) as error:
        run(world, out, *more, "4")
    assert str(error.value).count(".png") == 3  # this step's one picture and two of the buffer
    assert training_run.load_training_state(out)["step"] == 3


def test_where_numbers_are_looked_at_later_a_poisoned_step_is_named_and_leaves_the_weights_alone(
    world, tmp_path, monkeypatch
):
    """As on a GPU: losses stay there until the log, a state or the end asks for them."""
    forward, seen, held = stages.HoiStage.forward, [], {}

    def poisoned(self, batch):
        loss, parts = forward(self, batch)
        held.update(self.model.named_parameters())
        seen.append(self.picture_names(batch))
        return (loss * float("nan") if len(seen) == 3 else loss), parts

    monkeypatch.setattr(train, "LOOKED_AT_EVERY_STEP", ())
    monkeypatch.setattr(stages.HoiStage, "forward", poisoned)
    with pytest.raises(FloatingPointError, match="step 3: loss nan.*last state is of step 0") as error:
        run(world, tmp_path / "run", "--steps", "7", "--save-every", "100", "--ema-decay", "0")
    assert len(seen) == 7 and ", ".join(seen[2]) in str(error.value)
    assert all(value.isfinite().all() for value in held.values())


class Asked(TorchDispatchMode):
    """Counts what Python asks a tensor for: .item(), float(), if.  A GPU would have to end its work first."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("every_step", [True, False])
def test_where_numbers_are_looked_at_later_no_step_waits_for_one_and_the_result_is_the_same(
    world, tmp_path, monkeypatch, every_step
):
    monkeypatch.setattr(train, "LOOKED_AT_EVERY_STEP", ("cpu",) if every_step else ())
    lists, asked = torch.Tensor.tolist, []

    def listed(tensor):
        asked.append(tensor.is_floating_point())  # pictures' numbers are no floats
        return lists(tensor)

    monkeypatch.setattr(torch.Tensor, "tolist", listed)
    counts = []
    for steps in ("3", "6"):
        asked.clear()
        with Asked() as mode:
            run(world, tmp_path / steps, "--steps", steps, "--save-every", "100")
        counts.append(mode.count + sum(asked))
    assert counts[1] - counts[0] == (3 if every_step else 0)
    plain = training_run.load_training_state(tmp_path / "6")["weights"]
    monkeypatch.setattr(train, "LOOKED_AT_EVERY_STEP", ("cpu",))
    run(world, tmp_path / "plain", "--steps", "6", "--save-every", "100")
    again = training_run.load_training_state(tmp_path / "plain")["weights"]
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def test_conditions_stay_bytes_until_the_loss_is_computed(world, tmp_path, monkeypatch):
    forward, kinds = stages.HoiStage.forward, []

    def watched(self, batch):
        kinds.extend((image.dtype, image.is_contiguous(memory_format=torch.channels_last))
                     for image in batch["hoi"]["conditions"].values())  # fmt: skip
        return forward(self, batch)

    monkeypatch.setattr(stages.HoiStage, "forward", watched)
    run(world, tmp_path / "run", "--steps", "1")
    assert kinds == 3 * [(torch.uint8, True)]


def test_an_infinite_gradient_of_a_finite_loss_stops_the_run_with_its_weights_as_saved(world, tmp_path, monkeypatch):
    forward, calls, held = stages.HoiStage.forward, [], {}

    def steep(self, batch):
        loss, parts = forward(self, batch)
        calls.append(batch)
        held.update(self.model.named_parameters())
        weight = self.model.unet.out[2].bias[0]
        return (loss + (weight - weight.detach()).sqrt() if len(calls) == 3 else loss), parts

    monkeypatch.setattr(stages.HoiStage, "forward", steep)
    with pytest.raises(FloatingPointError, match=r"step 3: loss \d.*gradient norm (inf|nan)"):
        run(world, tmp_path / "run")
    saved = training_run.load_training_state(tmp_path / "run")
    assert saved["step"] == 2
    for name, value in saved["weights"].items():
        assert torch.equal(held[name], value), name


def test_the_gradient_norm_is_that_of_all_numbers_together():
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.zeros(n)) for n in (3, 5, 2)]
    for parameter in parameters[:2]:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    every = np.concatenate([parameter.grad.numpy() for parameter in parameters[:2]])
    assert float(gradient_norm(parameters)) == pytest.approx(np.linalg.norm(every), rel=1e-6)


def worker_of(launcher: subprocess.Popen, rank: int) -> int | None:
    """Process id of a launcher's worker, by the rank in its environment."""
    listed = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    for pid in map(int, listed):
        try:
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:  # it has ended meanwhile
            continue
        if f"RANK={rank}".encode() in environment:
            return pid
    return None


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_worker_killed_under_torchrun_is_restarted_and_no_step_is_lost_or_repeated(world, tmp_path):
    def command(out: Path) -> list[str]:
        flags = (
            f"--data {world}/data --reg-data {world}/buffer --base {world}/base.safetensors --out {out} --steps 60"
            f" --batch-size 2 --save-every 7 --preview-every 0 --dtype fp32 --device cpu --threads 1 --ema-decay 0.9"
            f" --learning-rate 1e-3"
        ).split()
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        return [*launcher, "--max-restarts", "3", "train.py", *flags]

    subprocess.run(command(tmp_path / "whole"), cwd=ROOT, check=True, timeout=200, capture_output=True)
    out = command(tmp_path / "killed")
    launcher = subprocess.Popen(out, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    killed = set()
    deadline = time.monotonic() + 200
    try:
        for rank, wanted in ((1, 7), (0, 21)):
            while time.monotonic() < deadline and launcher.poll() is None:
                states = training_run.training_states(tmp_path / "killed")
                pid = worker_of(launcher, rank)
                if pid is not None and pid not in killed and states and int(states[-1].stem[-9:]) >= wanted:
                    os.kill(pid, signal.SIGKILL)
                    killed.add(pid)
                    break
                time.sleep(0.002)
        output = launcher.communicate(timeout=200)[0].decode()
    finally:
        launcher.terminate()
    assert launcher.returncode == 0 and len(killed) == 2, output[-3000:]
    assert output.count("parameters train on") == 3, output[-3000:]
    assert_same_end(tmp_path / "whole", tmp_path / "killed")
