"""The toy replica of the paper's tables: what is measured, how tables are laid out, which commands make the models."""

import os
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import verifier_world

import sample
import train
from hoi.data import folder as folder_module
from hoi.geometry.render import HAND, OBJECT
from hoi.metrics.intervals import Results
from hoi.network.text import TextConfig, TextEncoder
from hoi.toyworld.backgrounds import BACKGROUNDS
from hoi.training.small_clip import PictureText, save_small_clip
from hoi.verify.verifier import Verifier, save_verifier
from tools import measure_generated, replica_table, toy_tables
from tools.toy_tables import load_small_clip, small_clip_scores

ROOT = Path(__file__).parents[2]


def label_map(**corners: tuple[int, int, int, int, int]) -> np.ndarray:
    """Rectangles (label, top, bottom, left, right) on 20 x 20 pixels of background."""
    drawn = np.zeros((20, 20), np.uint8)
    for label, top, bottom, left, right in corners.values():
        drawn[top:bottom, left:right] = label
    return drawn


@pytest.mark.parametrize(
    ("drawn", "touch"),
    [
        (label_map(hand=(HAND, 2, 8, 2, 8), beside=(OBJECT, 2, 8, 8, 12)), True),
        (label_map(hand=(HAND, 2, 8, 2, 8), corner=(OBJECT, 8, 12, 8, 12)), True),
        (label_map(hand=(HAND, 2, 8, 2, 8), apart=(OBJECT, 2, 8, 9, 12)), False),
        (label_map(hand=(HAND, 2, 8, 2, 8), apart=(OBJECT, 2, 8, 12, 18), speck=(OBJECT, 2, 3, 8, 9)), False),
        (label_map(hand=(HAND, 2, 8, 2, 8)), False),
        (label_map(), False),
    ],
)
def test_regions_touch_when_the_largest_ones_have_neighbouring_pixels(drawn, touch):
    assert toy_tables.regions_touch(drawn) is touch


def test_contact_counts_categories_alike():
    results = Results(resamples=20, seed=0)
    categories = np.array(["mug", "mug", "can", "can", "can"])
    toy_tables.add_contact(results, np.array([True, False, True, True, True]), categories)
    values = {item.name: (item.value, item.n) for item in results.measurements}
    assert values == {"toy contact, can, %": (100, 3), "toy contact, mug, %": (50, 2), "toy contact, %": (75, 5)}


def test_intervals_of_shares_end_at_100_percent():
    results = Results(resamples=20, seed=5)  # 90 %, whose shifted percentiles end at 100.5
    toy_tables.add_contact(results, np.arange(10) > 0, np.array(["mug"] * 10))
    assert [item.high for item in results.measurements] == [100, 100]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Shaded pictures, a model's pictures of the same records, a reference, and networks with random weights."""
    root = tmp_path_factory.mktemp("replica")
    for name, seed in (("shaded", 0), ("reference", 2)):
        verifier_world.make_folder(root / name, 12, seed, category="mug")
    for name, steps in (("none", 7), ("all", 9)):
        verifier_world.make_folder(root / name / "pictures", 12, seed=steps)
        replica_table.write_whole(root / name / "model.safetensors", model_file(steps))
    torch.manual_seed(0)  # only the weights
    save_verifier(root / "verifier.safetensors", Verifier(sorted(BACKGROUNDS), verifier_world.SIDE))
    pair = PictureText(TextEncoder(TextConfig(width=16, heads=2, layers=1)), embed_dim=8, channels=8)
    save_small_clip(root / "clip.safetensors", pair, side=16)
    return root


def model_file(steps: int) -> bytes:
    header = f'{{"__metadata__":{{"step":"{steps}"}}}}'.encode()
    return len(header).to_bytes(8, "little") + header


def estimators_of(world: Path, reference: str) -> toy_tables.ToyEstimators:
    files = world / "verifier.safetensors", world / "clip.safetensors"
    return toy_tables.load_toy_estimators(*files, world / reference, world / "features")


def measured(world: Path, folder: str, reference: str) -> dict[str, float]:
    results = Results(resamples=0, seed=0)
    toy_tables.measure_pictures(results, world / folder, world / "shaded", estimators_of(world, reference))
    return {item.name: item.value for item in results.measurements}


def test_numbers_are_those_of_the_verifier_and_the_small_clip(world):
    numbers = measured(world, "all/pictures", "reference")
    rows = measure_generated.measure_folders(world / "verifier.safetensors", world / "shaded", [world / "all/pictures"])
    expected = rows["pictures"]
    for name in (toy_tables.HAND_IOU, toy_tables.OBJECT_IOU, toy_tables.PCK, toy_tables.COLOR, toy_tables.BACKGROUND):
        key, factor, _ = toy_tables.SCORED[name]
        assert numbers[name] == pytest.approx(factor * expected[key], abs=1e-5), name
    assert 0 < numbers[toy_tables.PCK] < 1
    records = folder_module.read_records(world / "all/pictures")
    images = [folder_module.load_image(world / "all/pictures", record) for record in records]
    scores = small_clip_scores(load_small_clip(world / "clip.safetensors"), images, [r["text"] for r in records])
    assert numbers[toy_tables.TOY_CLIP] == pytest.approx(scores.mean())
    assert measured(world, "shaded", "shaded")[toy_tables.FRECHET] == pytest.approx(0, abs=1e-6)
    assert numbers[toy_tables.FRECHET] > 1e-4


def test_pictures_of_other_captions_are_refused(world, tmp_path):
    other = verifier_world.make_folder(tmp_path / "other", 12, text="A hand is grasping a red mug on the beach")
    with pytest.raises(ValueError, match=r"other \(12 records\) does not hold the captions of .*shaded \(12\)"):
        toy_tables.measure_pictures(Results(0, 0), other, world / "shaded", estimators_of(world, "reference"))


def test_the_tool_measures_every_row_and_prints_the_table(world, capsys):
    flags = "--tables 2 --shaded {0}/shaded --reference {0}/reference --clip {0}/clip.safetensors --out {0}"
    arguments = [*flags.format(world).split(), "--verifier", str(world / "verifier.safetensors")]
    replica_table.main(replica_table.parse_args(arguments))
    printed = capsys.readouterr().out
    assert (world / "table_2.md").read_text() == printed.removesuffix("\n")
    rows = {line.split(" | ")[0].strip("| "): line.split(" | ")[1:] for line in printed.splitlines() if "|" in line}
    assert rows["LDM"][0] == "79.12" and rows["LDM"][-2] == "0.15" and rows["HOIDiffusion"][-2] == "0.85"
    assert rows["LDM"][3] == "-"  # no bowl among the records
    pck = measured(world, "none/pictures", "reference")[toy_tables.PCK]
    assert rows["LDM"][-1].startswith(f"{pck:.4g} (")
    assert "fine-tunes of 7 and 9 steps" in printed and "not equally long: do not compare" in printed


def made_up(value: float, spread: float, steps: int | None = 600) -> dict:
    number = {"value": value, "low": value - spread, "high": value + spread, "n": 208, "definition": "d"}
    numbers = [{"name": name, **number} for name in (toy_tables.FRECHET, toy_tables.TOY_CLIP)]
    return {"steps": steps, "numbers": numbers, "sha256": {"verifier": "ab" * 32}, "date": "2030-01-01",
            "interval": {"resamples": 200}, "reference": {"n": 2000}}  # fmt: skip


def test_tables_stand_beside_the_papers_numbers_and_name_pairs_in_another_order():
    distances = {"none": 9.0, "no-normal": 4.0, "no-skeleton": 8.0, "no-segmentation": 3.5, "all": 3.5}
    reports = {name: made_up(value, 0.4) for name, value in distances.items()} | {"shaded": made_up(1.0, 0.1, None)}
    lines = replica_table.as_markdown(replica_table.TABLES["4"], reports).splitlines()
    assert lines[2].startswith("| method | paper: FID (1k) ↓ | toy: Frechet distance ↓ | toy: hand IoU ↑ |")
    assert "| LDM (finetuned) | 86.12 | 9 (8.6 .. 9.4) | - | - | - |" in lines
    assert "| HOIDiffusion | 77.64 | 3.5 (3.1 .. 3.9) | - | - | - |" in lines
    assert "| (shaded pictures) | - | 1 (0.9 .. 1.1) | - | - | - |" in lines
    assert [line.partition("not the paper's for ")[2] for line in lines if "order of" in line] == [
        "w/o estimated normal maps and w/o hand keypoint projection (intervals apart)",
        "w/o hand-object segmentation and HOIDiffusion (intervals overlap)",
    ]
    reports["no-regularization"] = made_up(2.0, 0.1)
    assert "- order of CLIPScore stand-in: as in the paper" in replica_table.as_markdown(
        replica_table.TABLES["5"], reports
    )


@pytest.fixture(scope="module")
def commands(tmp_path_factory) -> list[list[str]]:
    """What tools/replicate_tables.sh all runs: the words of each python command."""
    root = tmp_path_factory.mktemp("script")
    for name in ("base/model.safetensors", "lab/metadata.jsonl", "buffer/metadata.jsonl", "text/clip.safetensors"):
        (root / "toy" / name).parent.mkdir(parents=True)
        (root / "toy" / name).touch()
    (root / "bin").mkdir()
    (root / "bin" / "python").write_text(f'#!/bin/bash\nprintf " %q" "$@" >> {root}/log; echo >> {root}/log\n')
    (root / "bin" / "python").chmod(0o755)
    (root / "verifier").touch()
    settings = {"TOY": root / "toy", "OUT": root / "out", "EVALUATION": root / "evaluation", "STEPS": "5"}
    settings["VERIFIER"] = root / "verifier"
    environment = os.environ | {name: str(value) for name, value in settings.items()}
    environment["PATH"] = f"{root / 'bin'}:{os.environ['PATH']}"
    subprocess.run(["bash", ROOT / "tools" / "replicate_tables.sh", "all"], env=environment, check=True)
    return [shlex.split(line) for line in (root / "log").read_text().splitlines() if "$'" not in line]


def test_fine_tunes_differ_in_conditions_and_regularization_alone(commands):
    runs = {Path(args.out).name: vars(args) for args in
            (train.parse_args(words[1:]) for words in commands if words[0] == "train.py")}  # fmt: skip
    left_out = {"all": [], "no-normal": ["normal"], "no-skeleton": ["skeleton"], "no-segmentation": ["segmentation"],
                "none": ["skeleton", "normal", "segmentation"], "no-regularization": []}  # fmt: skip
    assert runs.keys() == left_out.keys()
    for name, args in runs.items():
        others = {key for key in args if args[key] != runs["all"][key]}
        assert others <= {"out", "conditions", "reg_data", "reg_batch_size"}, name
        kept = [c for c in ("skeleton", "normal", "segmentation") if c not in left_out[name]]
        assert args["conditions"] == kept and bool(args["reg_data"]) == (name != "no-regularization")
        assert args["steps"] == 5 and (Path(args["out"]) / "latents").resolve().name == "latents"


def test_every_fine_tune_is_sampled_on_the_same_captions_and_measured(commands):
    sampled = {words[words.index("--out") + 1]: sample.parse_args(words[1:]) for words in commands
               if words[0] == "sample.py"}  # fmt: skip
    assert len(sampled) == 6
    for out, args in sampled.items():
        assert Path(out).name == "pictures" and args.checkpoint == Path(out).parent / "model.safetensors"
        if Path(out).parent.name == "none":
            assert args.prompts_file.name == "captions.txt" and not args.conditions
        else:
            assert [folder.name for folder in args.data] == ["shaded"]
    words = commands[-1]
    assert words[0] == "tools/replica_table.py"
    args = replica_table.parse_args(words[1:])
    rows = {name for key in args.tables for name in replica_table.TABLES[key].rows}
    assert rows == {Path(out).parent.name for out in sampled}
    assert (args.shaded.name, args.verifier.name) == ("shaded", "verifier")
