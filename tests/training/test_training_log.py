"""What a training run leaves to look at: a log, a loss curve and preview sheets, without a trace in the weights."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from training_world import assert_same, hoi_args, make_world

import train
from hoi.training import run as training_run


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same training with previews, with previews after an interruption, and without."""
    root = tmp_path_factory.mktemp("runs")
    world = make_world(root)
    train.train(hoi_args(world, root / "plain"))
    train.train(hoi_args(world, root / "shown", "--preview-every", "2"))
    train.train(hoi_args(world, root / "resumed", "--preview-every", "2"))
    for name in ("state_000000004.pt", "preview_000004.png"):  # as if killed after step 2
        (root / "resumed" / name).unlink()
    train.train(hoi_args(world, root / "resumed", "--preview-every", "2"))
    return root


def pixels(path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture).astype(int)


def test_previews_and_loss_curve_are_drawn_when_asked_for(runs):
    assert sorted(path.name for path in (runs / "shown").glob("*.png")) == [
        "loss.png", "preview_000002.png", "preview_000004.png"]  # fmt: skip
    assert [path.name for path in (runs / "plain").glob("*.png")] == ["loss.png"]
    sheets = [pixels(runs / "shown" / f"preview_00000{step}.png") for step in (2, 4)]
    assert sheets[0].shape == sheets[1].shape and sheets[0].std() > 10
    assert np.abs(sheets[0] - sheets[1]).max() > 0  # the network has moved


def test_a_preview_is_the_same_after_an_interruption(runs):
    np.testing.assert_array_equal(*(pixels(runs / name / "preview_000004.png") for name in ("shown", "resumed")))


def test_drawing_previews_changes_no_bit_of_the_weights(runs):
    plain, shown = (training_run.load_training_state(runs / name) for name in ("plain", "shown"))
    for key in ("weights", "average", "optimizer"):
        assert_same(plain[key], shown[key])


def test_the_log_is_one_json_object_a_line_with_the_terms_of_the_loss(runs):
    (line,) = (runs / "shown" / "log.jsonl").read_text().splitlines()
    entry = json.loads(line)
    assert entry["step"] == 4 and entry["loss"] == pytest.approx(entry["hoi"] + entry["reg"], rel=1e-5)
    assert entry["gradient_norm"] > 0 and entry["learning_rate"] == pytest.approx(1e-3)


@pytest.mark.parametrize("clock", [lambda: 5.0, iter([5.0, 3.0]).__next__], ids=["stands still", "jumps back"])
def test_a_clock_that_is_of_no_use_stops_no_training(tmp_path, monkeypatch, clock):
    for name in ("time", "monotonic"):
        monkeypatch.setattr(training_run.time, name, clock)
    log = training_run.TrainingLog(tmp_path, 0)
    assert log.append(10, {"loss": [torch.tensor(1.0)]}, 8)["pictures_per_second"] == 0.0
