"""sample.py: a picture depends on (seed, index) alone, says how it was made, and no fault passes for a result."""

import dataclasses
import errno
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image

import sample
from hoi.common.files import sha256_of
from hoi.common.tensors import load_model_file, save_model
from hoi.conditions import Conditions
from hoi.data.check import check_folder
from hoi.data.folder import load_conditions, load_image, load_mesh, read_records
from hoi.geometry import grasp_search
from hoi.network import pipeline
from hoi.network.config import ModelConfig, sd1_config, tiny_config
from hoi.network.model import ConditionEncoders, HOIDiffusion, stack_conditions
from hoi.network.text import TextConfig, TextEncoder, tokenize
from hoi.network.unet import UNetConfig
from hoi.network.vae import VAEConfig
from hoi.toyworld.words import default_scenery_prompts, read_prompts, sentences_in, untaught_words, words_in
from hoi.weights.export import export_own

ROOT = Path(__file__).parent.parent
SMALL = ModelConfig(
    name="small",
    unet=UNetConfig(
        model_channels=16, channel_mult=(1, 1, 2, 2), num_res_blocks=1, attention_levels=(2,), num_heads=2,
        context_dim=16, norm_groups=4,
    ),
    vae=VAEConfig(channels=8, channel_mult=(1, 1, 1), num_res_blocks=1, norm_groups=4),
    text=TextConfig(width=16, heads=2, layers=1),
    image_size=64,
    num_inference_steps=3,
    guidance_scale=3.0,
)  # fmt: skip
TWO_PROMPTS = ["--prompt", "a red {object}", "a blue {object} on the beach"]


def random_model(with_conditions: bool) -> HOIDiffusion:
    """Seeded random weights; the zero-initialised ones are filled, so that text, time and conditions all matter."""
    torch.manual_seed(0)
    model = HOIDiffusion(SMALL, with_conditions=True)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any() and parameter.ndim > 1:
                parameter.normal_(std=0.1)
        model.text_encoder.token_embedding.weight.normal_()
    if not with_conditions:
        model.condition_encoders = None
    return model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "hoi.safetensors"
    export_own(random_model(True), path)
    return path


@pytest.fixture(scope="module")
def base_checkpoint(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "base.safetensors"
    export_own(random_model(False), path)
    return path


@pytest.fixture(scope="module")
def scenes(tmp_path_factory, checkpoint) -> Path:
    """Two views of a can, each with two prompts, from a mesh: four records."""
    folder = tmp_path_factory.mktemp("scenes")
    words = ["--object", "can", *TWO_PROMPTS, "--count", "4", "--grasps-per-object", "1", "--framing", "tight"]
    generated(checkpoint, folder / "out", *words, "--cache", str(folder / "cache"))
    return folder / "out"


def command(checkpoint: Path, out: Path, *words: str) -> list[str]:
    return ["--checkpoint", str(checkpoint), "--out", str(out), "--dtype", "float32", "--device", "cpu", *words]


def generated(checkpoint: Path, out: Path, *words: str) -> list[dict]:
    sample.run(command(checkpoint, out, *words))
    return read_records(out)


def images(folder: Path) -> np.ndarray:
    return np.stack([load_image(folder, record) for record in read_records(folder)]).astype(int)


def failure(capsys, arguments: list[str]) -> str:
    """The message of a command that must fail."""
    with pytest.raises(SystemExit) as exit_:
        sample.run(arguments)
    assert exit_.value.code not in (0, None)
    return f"{exit_.value.code} {capsys.readouterr().err}"


# --- what a stranger types first ---


def test_without_arguments_the_built_in_model_shows_every_object_in_several_looks(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    defaults = sample.parse_args([])
    # Two steps instead of the preset's 20: the pictures are the training's business, not this test's.
    fewer = partial(sample.load_pipeline, num_inference_steps=2)
    monkeypatch.setattr(sample, "load_pipeline", lambda *a, num_inference_steps, **k: fewer(*a, **k))
    sample.run([])
    said, records = capsys.readouterr().out, read_records(tmp_path / "out")
    assert defaults.out == Path("out") and len(records) >= 8
    assert [line for line in said.splitlines() if line.startswith("tiny.safetensors (tiny, stage hoi")]
    assert f"{len(records)} new pictures" in said and "look at out/grid.png" in said and "hint" not in said
    assert "in a browser: python -m hoi.page out" in said
    assert {record["category"] for record in records} == {"mug", "bowl", "bottle", "can"}
    assert len({record["text"].replace(record["category"], "") for record in records}) >= 4
    assert (images(tmp_path / "out").std(axis=(1, 2, 3)) > 10).all()  # none is blank
    with Image.open(tmp_path / "out" / "grid.png") as grid:
        assert min(grid.size) > 128
    report = check_folder(tmp_path / "out")
    assert report.ok and report.rendered == 4, str(report)
    sample.run([])
    assert f"all {len(records)} pictures are in out already: nothing to do" in capsys.readouterr().out


def test_words_that_the_miniature_never_learned_are_told(tmp_path, capsys):
    sample.run(["--no-conditions", "--prompt", "A dragon on the beach", "--steps", "1", "--out", str(tmp_path)])
    assert "hint: the tiny model was never taught the words dragon\n" in capsys.readouterr().out


def test_the_word_that_dreambooth_learned_is_not_told_as_unknown(tmp_path, capsys):
    (model := random_model(False)).config = dataclasses.replace(SMALL, name="tiny")
    export_own(model, tmp_path / "dream.safetensors", metadata={"baseline": "dreambooth"})
    words = ["--no-conditions", "--prompt", "A hand is grasping a sks dragon", "--steps", "1"]
    generated(tmp_path / "dream.safetensors", tmp_path / "out", *words)
    assert "hint: the tiny model was never taught the words dragon\n" in capsys.readouterr().out


def test_the_end_of_a_prompt_that_no_text_encoder_reads_is_told(tmp_path, checkpoint, capsys):
    prompt = "a mug, " * 30 + "on the BEACH"
    words = ["--no-conditions", "--count", "2", "--negative-prompt", "dark, " * 40 + "blurry", "--prompt", prompt]
    generated(checkpoint, tmp_path, *words)
    said = capsys.readouterr().out
    assert said.count("never sees the end") == said.count(', on the beach" of') == said.count(', blurry" of') == 1


# --- the same pictures ---


@pytest.mark.parametrize("words", ["--batch-size 1", "--batch-size 3", "--count 3", "--sampler ddpm --batch-size 3"])
def test_a_picture_does_not_depend_on_its_batch_or_on_how_many_are_made(tmp_path, checkpoint, scenes, words):
    words = words.split()
    reference = ["--sampler", "ddpm"] if "ddpm" in words else []
    generated(checkpoint, tmp_path / "all", "--data", str(scenes), "--batch-size", "4", *reference)
    generated(checkpoint, tmp_path / "out", "--data", str(scenes), *words)
    expected, got = images(tmp_path / "all"), images(tmp_path / "out")
    assert np.abs(got - expected[: len(got)]).max() <= 1
    assert np.abs(expected[0] - expected[1]).max() > 20  # other noise, other text


def test_two_processes_make_the_folder_of_one(tmp_path, checkpoint, scenes):
    words = ["--data", str(scenes), *TWO_PROMPTS, "--count", "5"]
    one = generated(checkpoint, tmp_path / "one", *words)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([sys.executable, str(ROOT / "sample.py"), *command(checkpoint, tmp_path / "two", *words)],
                         env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, cwd=ROOT)
        for rank in range(2)
    ]  # fmt: skip
    assert [process.wait(timeout=300) for process in ranks] == [0, 0]
    assert read_records(tmp_path / "two") == one
    assert [path.name for path in (tmp_path / "two").glob("metadata*")] == ["metadata.jsonl"]
    assert np.abs(images(tmp_path / "two") - images(tmp_path / "one")).max() <= 1


def test_another_seed_makes_another_picture(tmp_path, checkpoint, scenes):
    generated(checkpoint, tmp_path / "a", "--data", str(scenes), "--count", "1")
    generated(checkpoint, tmp_path / "b", "--data", str(scenes), "--count", "1", "--seed", "1")
    assert np.abs(images(tmp_path / "a") - images(tmp_path / "b")).mean() > 5


def test_seed_and_index_do_not_stand_in_for_each_other():
    draws = {
        tuple(torch.randn(4, generator=pipeline.picture_generator(seed, index)).tolist())
        for seed in range(5) for index in range(5)
    }  # fmt: skip
    assert len(draws) == 25


def test_features_are_computed_once_a_view_and_text_once_a_prompt(tmp_path, checkpoint, scenes, monkeypatch):
    calls = {"views": 0, "texts": 0}
    features_of, context_of = ConditionEncoders.forward, TextEncoder.forward

    def count_features(self, conditions, weights):
        calls["views"] += len(conditions["skeleton"])
        return features_of(self, conditions, weights)

    def count_texts(self, token_ids):
        calls["texts"] += len(token_ids)
        return context_of(self, token_ids)

    monkeypatch.setattr(ConditionEncoders, "forward", count_features)
    monkeypatch.setattr(TextEncoder, "forward", count_texts)
    # Ten pictures of two views in three prompts (the same ones for both) and the empty prompt.
    prompts = ["a red can", "a green can", "a blue can"]
    generated(checkpoint, tmp_path, "--data", str(scenes), "--prompt", *prompts, "--count", "10", "--batch-size", "2")
    assert calls == {"views": 2, "texts": 4}


# --- what the flags do ---


def test_every_view_meets_every_prompt_with_its_object_named(scenes):
    records = read_records(scenes)
    texts = ["a red can", "a blue can on the beach"]
    assert [(r["skeleton_file_name"], r["text"]) for r in records] == [
        (f"skeleton/{first:06d}.png", text) for first in (0, 2) for text in texts
    ]
    first, second = (load_conditions(scenes, records[k]).normal for k in (0, 2))
    assert (first != second).any()


def test_a_folder_gives_its_own_texts_and_annotation(tmp_path, checkpoint, scenes):
    source = read_records(scenes)
    records = generated(checkpoint, tmp_path, "--data", str(scenes))
    copied = ("text", "category", "intrinsics", "object_to_camera", "keypoints_2d", "keypoints_3d", "hand_pose",
              "transl", "object_path", "segmentation_file_name", "hand_side", "grasp")  # fmt: skip
    for before, after in zip(source, records, strict=True):
        assert {key: after[key] for key in copied} == {key: before[key] for key in copied}
        assert after["source_index"] == before["index"]
        for name in ("skeleton", "normal", "segmentation"):
            old, new = (getattr(load_conditions(f, r), name) for f, r in ((scenes, before), (tmp_path, after)))
            assert (old == new).all()


def test_several_folders_are_taken_in_turn_and_the_scene_goes_with_the_view(tmp_path, checkpoint, scenes):
    first = generated(checkpoint, tmp_path / "first", "--data", str(scenes))
    second = generated(checkpoint, tmp_path / "second", "--data", str(scenes), str(tmp_path / "first"))
    assert [record["text"] for record in second] == 2 * [record["text"] for record in first]
    assert [record["scene"] for record in second] == 2 * [record["scene"] for record in read_records(scenes)]
    assert len({record["object_path"] for record in second}) == len({record["object_path"] for record in first})
    assert check_folder(tmp_path / "second").ok


def test_the_folder_says_how_the_users_mesh_became_the_stored_one(tmp_path, checkpoint):
    jar = trimesh.creation.cylinder(30, 90)  # millimetres, off centre
    jar.apply_translation([200, 0, 45])
    jar.export(tmp_path / "jar.stl")
    words = ["--object", str(tmp_path / "jar.stl"), "--up", "y", "--count", "1", "--grasps-per-object", "1"]
    (record,) = generated(checkpoint, tmp_path / "first", *words, "--cache", str(tmp_path / "cache"))
    generated(checkpoint, tmp_path / "second", "--data", str(tmp_path / "first"))
    for folder in (tmp_path / "first", tmp_path / "second"):
        (card,) = json.loads((folder / "dataset.json").read_text())["objects"]
        found = trimesh.transform_points(jar.vertices, np.reshape(card["file_to_canonical"], (4, 4)))
        stored, _ = load_mesh(folder, record)
        found, stored = (points[np.lexsort(points.round(6).T)] for points in (found, stored))
        np.testing.assert_allclose(found, stored, atol=1e-6)
        assert card["object_id"] == "jar" and any("taken as millimetres" in note for note in card["notes"])
        assert any("--up z" in note for note in card["notes"])


def test_the_annotation_of_generated_folders_agrees_with_a_re_render(tmp_path, checkpoint, scenes):
    generated(checkpoint, tmp_path / "out", "--data", str(scenes))
    for folder in (scenes, tmp_path / "out"):
        report = check_folder(folder)
        assert report.ok and report.rendered == 2, str(report)


def test_without_conditions_a_fine_tuned_model_is_its_u_net_alone(tmp_path, checkpoint, base_checkpoint):
    words = ["--no-conditions", "--prompt", "Deep snow.", "The moon.", "--count", "3"]
    records = generated(base_checkpoint, tmp_path / "base", *words)
    generated(checkpoint, tmp_path / "hoi", *words)
    assert [record["text"] for record in records] == ["Deep snow.", "The moon.", "Deep snow."]
    assert all(record["skeleton_file_name"] is None and record["intrinsics"] is None for record in records)
    assert (images(tmp_path / "base") == images(tmp_path / "hoi")).all()


def test_cond_tau_0_switches_the_conditions_off_and_weights_change_the_picture(tmp_path, checkpoint, scenes):
    prompts = ["--prompt", "a red can", "--count", "2"]
    generated(checkpoint, tmp_path / "text", "--no-conditions", *prompts)
    runs = {"full": [], "off": ["--cond-tau", "0"], "skeletonless": ["--cond-scale", "skeleton=0", "normal=1"]}
    made = {}
    for name, words in runs.items():
        generated(checkpoint, tmp_path / name, "--data", str(scenes), *prompts, *words)
        made[name] = images(tmp_path / name)
    assert np.abs(made["off"] - images(tmp_path / "text")).max() <= 1
    assert np.abs(made["full"] - made["off"]).max() > 5
    assert np.abs(made["full"] - made["skeletonless"]).max() > 2


def test_guidance_0_ignores_the_prompt_and_listens_to_the_negative_one(tmp_path, checkpoint):
    def picture(name: str, prompt: str, *words: str) -> np.ndarray:
        words = ["--no-conditions", "--prompt", prompt, "--guidance-scale", "0", *words]
        generated(checkpoint, tmp_path / name, *words)
        return images(tmp_path / name)

    red = picture("red", "a red mug")
    assert (red == picture("blue", "a blue mug")).all()
    assert (red != picture("negative", "a red mug", "--negative-prompt", "dark")).any()


def test_sampling_flags_reach_the_record(tmp_path, checkpoint):
    words = "--no-conditions --prompt snow --steps 2 --sampler ddim --guidance-scale 1.5 --seed 7 --negative-prompt fog"
    record = generated(checkpoint, tmp_path, *words.split())[0]
    keys = ("num_inference_steps", "sampler", "guidance_scale", "seed", "negative_prompt")
    assert [record[key] for key in keys] == [2, "ddim", 1.5, 7, "fog"]
    assert record["checkpoint"]["sha256"] == sha256_of(checkpoint)


def test_the_default_negative_prompt_of_sd1_is_the_official_one():
    # 121 characters and 28 tokens were measured on the official test script's default.
    negative_prompt = sd1_config().negative_prompt
    assert len(negative_prompt) == 121 and int((tokenize([negative_prompt]) < 49406).sum()) == 28
    assert tiny_config().negative_prompt == SMALL.negative_prompt == ""


# --- going on ---


def test_a_finished_job_is_a_no_op_and_a_lost_picture_is_made_again(tmp_path, checkpoint, scenes, monkeypatch, capsys):
    words = ["--data", str(scenes)]
    generated(checkpoint, tmp_path, *words)
    before = images(tmp_path)
    (tmp_path / "images" / "000002.png").unlink()
    asked = []
    make = pipeline.Pipeline.pictures

    def noted(self, prompts, *rest):
        asked.append(prompts)
        return make(self, prompts, *rest)

    monkeypatch.setattr(pipeline.Pipeline, "pictures", noted)
    records = generated(checkpoint, tmp_path, *words)
    assert asked == [[records[2]["text"]]] and np.abs(images(tmp_path) - before).max() <= 1
    capsys.readouterr()
    generated(checkpoint, tmp_path, *words)
    assert len(asked) == 1 and "all 4 pictures are in" in capsys.readouterr().out


@pytest.mark.parametrize("fault", ["disk full", "Ctrl-C"])
def test_what_was_finished_before_a_fault_survives_and_the_same_command_continues(
    tmp_path, checkpoint, scenes, monkeypatch, capsys, fault
):
    words = command(checkpoint, tmp_path / "out", "--data", str(scenes), "--batch-size", "1")
    os_replace = os.replace

    def failing(source, target):
        if str(target).endswith("images/000002.png"):
            raise OSError(errno.ENOSPC, "No space left on device") if fault == "disk full" else KeyboardInterrupt
        return os_replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", failing)
        message = failure(capsys, words)
    assert ("the disk is full" if fault == "disk full" else "interrupted") in message
    assert [record["index"] for record in read_records(tmp_path / "out")] == [0, 1]
    assert not list((tmp_path / "out").rglob("*.tmp"))
    sample.run(words)
    generated(checkpoint, tmp_path / "whole", "--data", str(scenes))
    assert np.abs(images(tmp_path / "out") - images(tmp_path / "whole")).max() <= 1


def test_another_job_does_not_continue_in_the_same_folder(tmp_path, checkpoint, capsys):
    generated(checkpoint, tmp_path, "--no-conditions", "--prompt", "snow")
    message = failure(capsys, command(checkpoint, tmp_path, "--no-conditions", "--prompt", "snow", "--steps", "2"))
    assert "another job" in message and "num_inference_steps: 3 there, 2 now" in message


# --- the pictures say how they were made ---


def test_a_png_holds_the_whole_record(tmp_path, checkpoint):
    words = ["--no-conditions", "--prompt", "in a “café” – Grüße", "--negative-prompt", "dark, blurry", "--seed", "3"]
    record = generated(checkpoint, tmp_path, *words)[0]
    with Image.open(tmp_path / record["file_name"]) as picture:
        assert json.loads(picture.text["hoi"]) == record


# --- prompts ---


def test_the_toy_scenery_names_every_background_and_nothing_else():
    from hoi.toyworld.backgrounds import BACKGROUNDS

    prompts, told = default_scenery_prompts("tiny"), sentences_in("scenery_sentences.txt")
    assert list(told) == list(BACKGROUNDS) and {len(sentences) for sentences in told.values()} == {3}
    assert set(prompts) == {one for name, of in told.items() if not BACKGROUNDS[name].lab for one in of}
    assert all(words_in(one)["background"] == name for name, of in told.items() for one in of)
    assert untaught_words(prompts) == []


def test_the_full_size_scenery_is_long_and_without_repeats():
    prompts = default_scenery_prompts("sd1")
    assert len(prompts) == len(set(prompts)) >= 200


def test_words_outside_the_toy_world_are_found():
    prompts = ["A hand is grasping a pink {object} on the beach", "a grey mug with a Dragon, in bamboo forest"]
    assert untaught_words([*prompts, "杯子"]) == ["dragon", "杯子"]


def test_a_misspelt_placeholder_is_named_before_anything_is_made(tmp_path, checkpoint, capsys):
    words = ["--prompt", "a pink {objct}", "--object", "can", "--cache", str(tmp_path / "cache")]
    message = failure(capsys, command(checkpoint, tmp_path / "out", *words))
    assert "{objct}; the only placeholder is {object}" in message and not (tmp_path / "out").exists()


def test_prompt_files_skip_comments_and_empty_lines(tmp_path):
    (tmp_path / "p.txt").write_text("\ufeff# scenery\n\n a beach \nsnow, {object}\n", encoding="utf-8")
    assert read_prompts(tmp_path / "p.txt") == ["a beach", "snow, {object}"]


# --- bad input ---


def broken_copy(scenes: Path, folder: Path, fault: str) -> Path:
    shutil.copytree(scenes, folder)
    target = folder / "normal" / "000002.png"
    if fault == "missing":
        target.unlink()
    elif fault == "truncated":
        target.write_bytes(target.read_bytes()[:200])
    else:
        Image.new("RGB", (32, 32)).save(target)
    return folder


@pytest.mark.parametrize(
    ("fault", "expected"),
    [("missing", "normal/000002.png is missing"), ("truncated", "normal/000002.png is no picture that can"),
     ("another size", r"normal/000002.png is \(32, 32, 3\)")],
)  # fmt: skip
def test_a_faulty_condition_file_is_named(tmp_path, checkpoint, scenes, capsys, fault, expected):
    folder = broken_copy(scenes, tmp_path / "data", fault)
    words = command(checkpoint, tmp_path / "out", "--data", str(folder), "--batch-size", "2")
    assert re.search(expected, failure(capsys, words))
    if fault != "missing":  # found when read: what came before is whole
        assert [record["index"] for record in read_records(tmp_path / "out")] == [0, 1]


def test_pictures_of_any_size_are_those_of_conditions_made_larger_by_black_and_a_note_says_so(
    tmp_path, checkpoint, scenes, capsys
):
    words = ["--object", "can", "--prompt", "a red {object}", "--count", "2", "--grasps-per-object", "1"]
    words += ["--framing", "tight", "--cache", str(scenes.parent / "cache"), "--width", "96", "--height", "40"]
    records = generated(checkpoint, tmp_path / "out", *words)
    assert "note: 96 x 40 px; the model was made for 64 x 64, other sizes may look worse" in capsys.readouterr().out
    assert {(record["width"], record["height"]) for record in records} == {(96, 40)}
    assert check_folder(tmp_path / "out").ok
    generated(checkpoint, tmp_path / "again", "--data", str(tmp_path / "out"))  # the folder brings the size
    np.testing.assert_array_equal(images(tmp_path / "again"), images(tmp_path / "out"))
    # 40 is no multiple of the 32 in which this network takes sides: the same by hand, in 64 rows.
    maker = sample.load_pipeline(checkpoint, None, None, device="cpu", dtype="float32")
    drawn = load_conditions(tmp_path / "out", records[0])
    padded = Conditions(*(np.pad(getattr(drawn, name), ((0, 24), (0, 0), (0, 0)))
                          for name in ("skeleton", "normal", "segmentation")))  # fmt: skip
    features = maker.features(stack_conditions([padded], 64, 96))
    (larger,) = maker.pictures(["a red can"], features, [pipeline.picture_generator(0, 0)], height=64, width=96)
    assert np.abs(larger[:40].astype(int) - images(tmp_path / "out")[0]).max() <= 1
    assert not np.array_equal(larger[24:], images(tmp_path / "out")[0])


def test_text_alone_makes_pictures_of_the_size_that_is_asked_for(tmp_path, base_checkpoint):
    words = ["--no-conditions", "--prompt", "the beach", "--size", "32", "--width", "50"]
    assert generated(base_checkpoint, tmp_path / "out", *words)[0]["width"] == 50
    assert images(tmp_path / "out").shape == (1, 32, 50, 3)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--count 0", "'0' is not a positive whole number"),
        ("--object teapot", "teapot: no such file or folder, and no built-in family"),
        ("--data nowhere", "nowhere has no metadata.jsonl"),
        ("--no-conditions --prompts-file nowhere.txt", "no prompts file at nowhere.txt"),
        ("--no-conditions --prompt {object}", "without conditions there is no object"),
        ("--prompt A hand is grasping a mug", '--prompt "A hand is grasping a mug"'),
        ("--no-conditions --object can", "drop --object"),
        ("--no-conditions --cond-scale all=0.5", "drop --cond-scale"),
        ("--no-conditions --cond-tau 0.5", "drop --cond-tau"),
        ("--scenes some.jsonl --object can", "--object and --scenes exclude each other"),
        ("--camera lens.json", "--camera is for --scenes"),
        ("--data nowhere --width 64", "--data brings the size of its pictures: drop --size, --height and --width"),
        ("--no-conditions --cond-tau 2", "2 does not lie between 0 and 1"),
        ("--cond-scale depth=1", "'depth' is no condition"),
        ("--cond-scale normal=much", "argument --cond-scale: 'much' is not a finite number"),
        ("--no-conditions --prompt snow --steps 5000", "num_inference_steps is 5000"),
        ("--device tpu", "device 'tpu' is not there"),
        ("--checkpoint nowhere.safetensors", "no weight file at nowhere.safetensors"),
    ],
)
def test_bad_flags_are_named(tmp_path, checkpoint, capsys, words, expected):
    assert expected in failure(capsys, command(checkpoint, tmp_path / "out", *words.split()))


def test_missing_built_in_weights_say_what_to_do(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("hoi.weights.load.BUILT_IN_MODEL", tmp_path / "tiny.safetensors")
    message = failure(capsys, ["--out", str(tmp_path / "out"), "--device", "cpu"])
    assert "built-in weights" in message and "--checkpoint" in message


@pytest.mark.parametrize("content", [b"", b"\n# only a comment\n", b"\xff\xfe\x00 not text"])
def test_a_prompts_file_without_prompts_is_an_error(tmp_path, checkpoint, capsys, content):
    (tmp_path / "p.txt").write_bytes(content)
    words = ["--no-conditions", "--prompts-file", str(tmp_path / "p.txt")]
    assert "p.txt" in failure(capsys, command(checkpoint, tmp_path / "out", *words))
    assert not (tmp_path / "out").exists()


def test_a_base_model_refuses_conditions(tmp_path, base_checkpoint, scenes, capsys):
    message = failure(capsys, command(base_checkpoint, tmp_path / "out", "--data", str(scenes)))
    assert "base model without condition encoders" in message


@pytest.mark.parametrize("fault", ["missing", "extra", "another preset", "cut short"])
def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path, checkpoint, capsys, fault):
    state, metadata = load_model_file(checkpoint)
    if fault == "missing":
        del state["unet.out.2.bias"]
    if fault == "extra":
        state["unet.surplus"] = torch.zeros(1)
    if fault == "another preset":
        metadata["config"] = metadata["config"].replace('"model_channels": 16', '"model_channels": 32')
    path = tmp_path / "faulty.safetensors"
    save_model(path, state, metadata)
    if fault == "cut short":
        path.write_bytes(path.read_bytes()[:-1000])
    words = ["--no-conditions", "--prompt", "snow"]
    message = failure(capsys, command(path, tmp_path / "out", *words))
    expected = {"missing": "1 missing: unet.out.2.bias", "extra": "1 unexpected: unet.surplus",
                "another preset": "of another shape", "cut short": "not a readable safetensors file"}  # fmt: skip
    assert "faulty.safetensors" in message and expected[fault] in message
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path, checkpoint, capsys):
    (tmp_path / "file").write_text("not a folder")
    words = ["--no-conditions", "--prompt", "snow"]
    for out in (tmp_path / "file", tmp_path / "file" / "out"):
        message = failure(capsys, command(checkpoint, out, *words))
        assert f"cannot write to {out}" in message and "--out" in message


def test_an_object_without_a_grasp_is_named(tmp_path, checkpoint, capsys, monkeypatch):
    monkeypatch.setattr(grasp_search, "find_grasps", lambda *_: [])
    words = command(checkpoint, tmp_path / "out", "--object", "can", "--cache", str(tmp_path / "cache"))
    assert "no grasp was found for can_0000: is it 1 to 20 cm in size?" in failure(capsys, words)
    assert not (tmp_path / "out" / "images").exists()


def test_saved_steps_are_a_row_of_pictures_that_ends_in_the_picture(scenes, checkpoint, tmp_path):
    records = generated(checkpoint, tmp_path, "--data", str(scenes), "--count", "2", "--steps", "3", "--save-steps")
    for record in records:
        with Image.open(tmp_path / "steps" / f"{record['index']:06d}.png") as strip:
            assert strip.size == (3 * (64 + 2) + 2, 64 + 4)  # a margin of two pixels around each
            last = np.asarray(strip)[2:-2, -64 - 2 : -2]
        # The strip is decoded picture by picture, the pictures together: rounding, a grey level at most.
        assert np.abs(last.astype(int) - load_image(tmp_path, record)).max() <= 1


@pytest.mark.parametrize(("side", "free", "most", "sizes"), [
    (512, 0, None, [2, 2, 1]), (128, 0, None, [5]), (512, 3 << 30, None, [3, 2]), (512, 80 << 30, None, [5]),
    (512, 1, None, [1] * 5), (512, 80 << 30, 4, [4, 1]),
])  # fmt: skip
def test_batches_are_as_large_as_a_gpus_free_memory_or_the_flag_allows(side, free, most, sizes):
    made = list(sample.batches(list(range(5)), lambda _: (side, side), most, free))
    assert [len(batch) for _, batch in made] == sizes and sum([batch for _, batch in made], []) == list(range(5))


def test_compiling_on_a_cpu_is_refused_before_anything_is_loaded(capsys, tmp_path):
    assert "--compile is for GPUs" in failure(capsys, ["--compile", "--device", "cpu", "--out", str(tmp_path)])


def test_a_picture_that_cannot_be_written_stops_the_run_and_the_same_command_goes_on(tmp_path, monkeypatch, checkpoint):
    """The thread that writes behind the device tells of it; what was written before it stays."""
    words = command(checkpoint, tmp_path / "out", "--no-conditions", "--prompt", "a cup", "--count", "3")
    words += ["--batch-size", "1", "--steps", "1"]
    write = sample.write_pictures

    def full(folder, index, *others):
        if index == 1:
            raise OSError("No space left on device")
        return write(folder, index, *others)

    monkeypatch.setattr(sample, "write_pictures", full)
    with pytest.raises(SystemExit, match="No space left"):
        sample.run(words)
    assert sorted(path.name for path in (tmp_path / "out/images").iterdir()) == ["000000.png"]
    monkeypatch.setattr(sample, "write_pictures", write)
    sample.run(words)
    assert [record["index"] for record in read_records(tmp_path / "out")] == [0, 1, 2]
