"""video.py: the anchor changes what it should and nothing else, and a clip is an annotated dataset folder."""

import errno
import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image
from test_sample import random_model

import sample
import video
from hoi.common.sheets import encode_mp4, write_video
from hoi.data.check import check_folder
from hoi.data.folder import load_image, load_mesh, read_records
from hoi.network.pipeline import Pipeline
from hoi.weights.export import export_own

FRAMES = 4


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "hoi.safetensors"
    model = random_model(True)
    with torch.no_grad():  # attention that matters: untrained, it is nearly the mean of all tokens
        for name, parameter in model.unet.named_parameters():
            if ".attn1." in name and parameter.ndim > 1:
                parameter *= 5
    export_own(model, path)
    return path


@pytest.fixture(scope="module")
def clip(tmp_path_factory, checkpoint) -> Path:
    """A hand reaches for a can in four frames; frame 2 is the anchor."""
    folder = tmp_path_factory.mktemp("clips")
    words = ["--object", "can", "--framing", "tight", "--frames", str(FRAMES), "--gif"]
    video.run(command(checkpoint, folder / "clip", *words, "--cache", str(folder / "cache")))
    return folder / "clip"


def command(checkpoint: Path, out: Path, *words: str) -> list[str]:
    return ["--checkpoint", str(checkpoint), "--out", str(out), "--dtype", "float32", "--device", "cpu", *words]


def images(folder: Path) -> np.ndarray:
    return np.stack([load_image(folder, record) for record in read_records(folder)]).astype(int)


def again(clip: Path, checkpoint: Path, out: Path, *words: str) -> np.ndarray:
    """The frames of `clip` made once more with other flags."""
    video.run(command(checkpoint, out, "--trajectory", str(clip), *words))
    return images(out)


def single_record(clip: Path, frame: int, folder: Path) -> Path:
    """A folder with one frame of the clip as its record 0."""
    shutil.copytree(clip, folder)
    record = json.loads((clip / "metadata.jsonl").read_text().splitlines()[frame]) | {"index": 0}
    (folder / "metadata.jsonl").write_text(json.dumps(record) + "\n")
    return folder


def failure(capsys, arguments: list[str]) -> str:
    with pytest.raises(SystemExit) as exit_:
        video.run(arguments)
    assert exit_.value.code not in (0, None)
    return f"{exit_.value.code} {capsys.readouterr().err}"


# --- exactness ---


def test_a_clip_of_one_frame_is_the_picture_of_sample_py(tmp_path, checkpoint, clip, capsys):
    record = single_record(clip, 3, tmp_path / "record")
    sample.run(command(checkpoint, tmp_path / "picture", "--data", str(record), "--seed", "5"))
    frames = again(record, checkpoint, tmp_path / "one", "--seed", "5")
    assert (frames == images(tmp_path / "picture")).all() and frames.std() > 5
    assert "hint: one frame is a single picture; --frames 16 makes a video" in capsys.readouterr().out


def test_the_anchor_frame_is_the_picture_it_would_have_been_alone(tmp_path, checkpoint, clip):
    record = single_record(clip, 2, tmp_path / "record")
    sample.run(command(checkpoint, tmp_path / "picture", "--data", str(record)))
    assert np.abs(images(clip)[2] - images(tmp_path / "picture")[0]).max() <= 1


@pytest.mark.parametrize(("chunk", "words"), [(1, ""), (2, ""), (1, "--sampler ddpm"), (1, "--anchor 3")])
def test_the_chunk_size_does_not_matter(tmp_path, checkpoint, clip, chunk, words):
    whole = images(clip)
    if words:
        one_anchor, whole = whole, again(clip, checkpoint, tmp_path / "whole", *words.split())
        assert np.abs(whole - one_anchor)[1].max() > 3  # the words do something
    assert np.abs(again(clip, checkpoint, tmp_path / "out", "--chunk", str(chunk), *words.split()) - whole).max() <= 1


def test_without_anchor_the_frames_are_independent_pictures(tmp_path, checkpoint, clip):
    sample.run(command(checkpoint, tmp_path / "pictures", "--data", str(clip)))
    alone = images(tmp_path / "pictures")
    separate = again(clip, checkpoint, tmp_path / "separate", "--no-anchor", "--separate-noise", "--chunk", "3")
    assert np.abs(separate - alone).max() <= 1
    same = again(clip, checkpoint, tmp_path / "same", "--no-anchor")
    assert np.abs(same[0] - alone[0]).max() <= 1  # they share the noise of record 0
    assert np.abs(same - images(clip))[[0, 1, 3]].max(axis=(1, 2, 3)).min() > 3  # the anchor had changed these
    anchored = again(clip, checkpoint, tmp_path / "anchored", "--anchor", "0", "--separate-noise")
    assert np.abs(anchored[0] - alone[0]).max() <= 1 and np.abs(anchored[1] - alone[1]).max() > 3


@pytest.fixture
def batches(monkeypatch) -> list[int]:
    """How many frames are denoised together, batch by batch."""
    sizes, latents = [], Pipeline.latents

    def noted(self, unet, prompts, *rest):
        sizes.append(len(prompts))
        return latents(self, unet, prompts, *rest)

    monkeypatch.setattr(Pipeline, "latents", noted)
    return sizes


def test_chunk_and_anchor_are_all_that_is_denoised_together(tmp_path, checkpoint, clip, batches):
    words = ["--steps", "1", "--trajectory", str(clip), "--chunk", "1"]
    video.run(command(checkpoint, tmp_path / "one", *words))
    video.run(command(checkpoint, tmp_path / "off", *words, "--no-anchor"))
    assert batches == [2, 2, 2, 1, 1, 1, 1]


def test_frames_made_later_see_the_same_anchor(tmp_path, checkpoint, clip, batches):
    shutil.copytree(clip, tmp_path / "out")
    for frame in (0, 3):
        (tmp_path / "out" / "images" / f"00000{frame}.png").unlink()
    words = ["--object", "can", "--framing", "tight", "--frames", str(FRAMES), "--cache", str(clip.parent / "cache")]
    video.run(command(checkpoint, tmp_path / "out", *words))
    assert batches == [3]  # two frames and the anchor
    assert np.abs(images(tmp_path / "out") - images(clip)).max() <= 1
    video.run(command(checkpoint, tmp_path / "out", *words))
    assert batches == [3]


def test_frames_finished_before_the_disk_was_full_are_kept(tmp_path, checkpoint, clip, monkeypatch, capsys):
    words = command(checkpoint, tmp_path / "out", "--trajectory", str(clip), "--chunk", "1")
    replace = os.replace

    def failing(source, target):
        if str(target).endswith("images/000001.png"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", failing)
        assert "the disk is full" in failure(capsys, words)
    assert [record["frame"] for record in read_records(tmp_path / "out")] == [0, 2]  # the anchor comes with the first
    video.run(words)
    assert np.abs(images(tmp_path / "out") - images(clip)).max() <= 1


# --- the folder ---


def test_every_frame_has_its_annotation_and_its_time(clip):
    records = read_records(clip)
    assert [(r["trajectory"], r["frame"], r["timestamp"]) for r in records] == [
        (0, frame, frame / 8) for frame in range(FRAMES)
    ]
    heights = [-np.dot(r["object_to_camera"][8:11], [0, 0, 1]) for r in records]
    assert len(set(heights)) == 1  # one camera
    wrists = np.array([r["keypoints_3d"][:3] for r in records])
    steps = np.linalg.norm(np.diff(wrists, axis=0), axis=1)
    np.testing.assert_allclose(steps, 0.06 / (FRAMES - 1), atol=1e-6)  # metres
    assert records[-1]["contact"] and all(r["penetration_mm"] is not None for r in records)
    report = check_folder(clip)
    assert report.ok and report.rendered == FRAMES, str(report)


def test_the_folder_says_how_the_users_mesh_became_the_stored_one(tmp_path, checkpoint):
    jar = trimesh.creation.cylinder(30, 90)  # millimetres, off centre
    jar.apply_translation([200, 0, 45])
    jar.export(tmp_path / "jar.stl")
    words = ["--object", str(tmp_path / "jar.stl"), "--up", "y", "--framing", "tight", "--frames", "2", "--steps", "1"]
    video.run(command(checkpoint, tmp_path / "first", *words, "--cache", str(tmp_path / "cache")))
    again(tmp_path / "first", checkpoint, tmp_path / "second", "--steps", "1")
    for folder in (tmp_path / "first", tmp_path / "second"):
        description = json.loads((folder / "dataset.json").read_text())
        (card,) = description["objects"]
        found = trimesh.transform_points(jar.vertices, np.reshape(card["file_to_canonical"], (4, 4)))
        stored, _ = load_mesh(folder, read_records(folder)[0])
        found, stored = (points[np.lexsort(points.round(6).T)] for points in (found, stored))
        np.testing.assert_allclose(found, stored, atol=1e-6)
        assert card["object_id"] == "jar" and any("taken as millimetres" in note for note in card["notes"])
        assert any("--up z" in note for note in card["notes"])
    assert str(tmp_path / "jar.stl") in description["licences"]["data"]["objects"]


def test_held_frames_repeat_the_grasp(tmp_path, checkpoint, clip):
    words = ["--object", "can", "--framing", "tight", "--frames", "2", "--hold", "2", "--cache",
             str(clip.parent / "cache"), "--steps", "1", "--fps", "4", "--start-distance", "0.1"]  # fmt: skip
    video.run(command(checkpoint, tmp_path / "out", *words))
    records = read_records(tmp_path / "out")
    assert [r["timestamp"] for r in records] == [0, 0.25, 0.5, 0.75]
    assert records[1]["keypoints_3d"] == records[2]["keypoints_3d"] == records[3]["keypoints_3d"]
    wrists = np.array([record["keypoints_3d"][:3] for record in records[:2]])
    assert np.linalg.norm(wrists[1] - wrists[0]) == pytest.approx(0.1, abs=1e-6)  # metres


@pytest.mark.parametrize("name", ["clip.webp", "clip.gif"])
def test_the_clip_files_show_the_frames_at_their_times(clip, name):
    with Image.open(clip / name) as animation:
        assert (animation.n_frames, animation.size) == (FRAMES, (64, 64))
        for frame, expected in enumerate(images(clip)):
            animation.seek(frame)
            shown = np.asarray(animation.convert("RGB")).astype(int)
            assert abs(animation.info["duration"] - 125) <= 5  # GIF counts hundredths of a second
            assert np.abs(shown - expected).mean() < 16  # both lose some colour


def test_an_mp4_shows_the_frames():
    av = pytest.importorskip("av")
    frames = [np.full((64, 64, 3), level, dtype=np.uint8) for level in (40, 120, 200)]
    with av.open(io.BytesIO(encode_mp4(frames, 8))) as container:
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert container.streams.video[0].average_rate == 8
    assert [int(round(frame.mean(), -1)) for frame in decoded] == [40, 120, 200]


def test_a_missing_encoder_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("hoi.common.sheets.importlib.util.find_spec", lambda name: None)
    files, notes = write_video(tmp_path, [np.zeros((8, 8, 3), np.uint8), np.ones((8, 8, 3), np.uint8)], 8)
    assert files == ["clip.webp"] and "pip install av" in notes[0]


def test_the_strip_has_conditions_above_pictures(clip):
    strip = np.asarray(Image.open(clip / "strip.png"))
    assert strip.shape == (4 * 130 + 2, FRAMES * 130 + 2, 3)
    last = load_image(clip, read_records(clip)[-1])
    shown = strip[392:520, -130:-2].astype(int)
    assert np.abs(shown[::2, ::2] - last).mean() < 10  # twice the size
    normal = np.asarray(Image.open(clip / "normal" / "000003.png")).astype(int)
    assert np.abs(strip[132:260, -130:-2][::2, ::2] - normal).mean() < 10


# --- bad input ---


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--trajectory {clip} --anchor 4", "--anchor 4 is not in the video; it has frames 0 to 3"),
        ("--trajectory {clip} --trajectory-number 7", "has no trajectory 7; it has 0"),
        ("--trajectory {clip} --hold 2", "--trajectory brings its own frames"),
        ("--scenes some.jsonl --object can", "--scenes brings its own object"),
        ("--trajectory {clip} --size 64", "--trajectory brings its own frames"),
        ("--anchor 1 --no-anchor", "--anchor and --no-anchor exclude each other"),
        ("--frames 0", "'0' is not a positive whole number"),
        ("--start-distance -1", "--start-distance lies between 0 and 1"),
        ("--hold -1", "must not be negative"),
        ("--prompt  ", "--prompt"),
    ],
)
def test_flags_that_make_no_clip_are_refused(tmp_path, checkpoint, clip, capsys, words, message):
    words = [word.format(clip=clip) for word in words.split()]
    assert message in failure(capsys, command(checkpoint, tmp_path / "out", *words))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"object_path": "objects/other.ply"}, "show one object, these show objects/can"),
        ({"height": 32, "width": 32}, "frames of one clip have one size, these have (height, width)"),
        (dict.fromkeys(f"{name}_file_name" for name in ("skeleton", "normal", "segmentation")), "no condition images"),
        ({"trajectory": None}, "holds no trajectory; make one with: python make_dataset.py"),
    ],
)
def test_frames_that_do_not_belong_together_are_refused(tmp_path, checkpoint, clip, capsys, change, message):
    folder = tmp_path / "data"
    shutil.copytree(clip, folder)
    (folder / "objects" / "other.ply").write_text("")
    records = [json.loads(line) for line in (clip / "metadata.jsonl").read_text().splitlines()]
    changed = records if "trajectory" in change else records[1:2]
    for record in changed:
        record |= change
    (folder / "metadata.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert message in failure(capsys, command(checkpoint, tmp_path / "out", "--trajectory", str(folder)))


def test_a_folder_that_cannot_be_made_is_told(checkpoint, clip, capsys):
    message = failure(capsys, command(checkpoint, checkpoint / "below_a_file", "--trajectory", str(clip)))
    assert "cannot write to" in message and "choose another folder with --out" in message


def test_another_clip_does_not_continue_in_the_folder(checkpoint, clip, capsys):
    words = command(checkpoint, clip, "--object", "can", "--framing", "tight", "--cache", str(clip.parent / "cache"))
    message = failure(capsys, [*words, "--frames", str(FRAMES), "--anchor", "0"])
    assert "anchor: 2 there, 0 now" in message
