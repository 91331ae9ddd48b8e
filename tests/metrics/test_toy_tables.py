"""The toy replica of the paper's tables: what is measured, how tables are laid out, which commands make the models."""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import verifier_world
from PIL import Image

import make_dataset
import sample
import train
from hoi.data import folder as folder_module
from hoi.geometry.render import HAND, OBJECT
from hoi.metrics import __main__ as metrics
from hoi.metrics import pose_network
from hoi.metrics.intervals import Results
from hoi.network.text import TextConfig, TextEncoder
from hoi.toyworld.backgrounds import BACKGROUNDS
from hoi.training.small_clip import PictureText, save_small_clip
from hoi.verify import __main__ as verify
from hoi.verify.verifier import Verifier, save_verifier
from tools import measure_generated, pose_table, replica_table, toy_tables
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
    for name, seed in (("evaluation/scenic", 0), ("evaluation/lab", 1), ("reference", 2)):
        verifier_world.make_folder(root / name, 12, seed, category="mug")
    for number, name in enumerate(replica_table.BASELINES):
        for seed in (0, 1):
            for place in replica_table.PLACES:
                verifier_world.make_folder(root / name / str(seed) / place, 12, seed=7 + number + seed)
            replica_table.write_whole(root / name / str(seed) / "model.safetensors", model_file(7 + 2 * seed))
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
    shaded = world / "evaluation/scenic"
    toy_tables.measure_pictures(results, world / folder, shaded, estimators_of(world, reference))
    return {item.name: item.value for item in results.measurements}


def test_numbers_are_those_of_the_verifier_and_the_small_clip(world):
    numbers, shaded, folder = measured(world, "all/0/scenic", "reference"), world / "evaluation/scenic", "all/0/scenic"
    rows = measure_generated.measure_folders(world / "verifier.safetensors", shaded, [world / folder])
    expected = rows["scenic"]
    for name in (toy_tables.HAND_IOU, toy_tables.OBJECT_IOU, toy_tables.PCK, toy_tables.COLOR, toy_tables.BACKGROUND):
        key, factor, _ = toy_tables.SCORED[name]
        assert numbers[name] == pytest.approx(factor * expected[key], abs=1e-5), name
    assert 0 < numbers[toy_tables.PCK] < 1
    records = folder_module.read_records(world / folder)
    images = [folder_module.load_image(world / folder, record) for record in records]
    scores = small_clip_scores(load_small_clip(world / "clip.safetensors"), images, [r["text"] for r in records])
    assert numbers[toy_tables.TOY_CLIP] == pytest.approx(scores.mean())
    same = measured(world, "evaluation/scenic", "evaluation/scenic")
    assert same[toy_tables.FRECHET] == pytest.approx(0, abs=1e-6)
    assert numbers[toy_tables.FRECHET] > 1e-4


def test_pictures_of_other_captions_are_refused(world, tmp_path):
    other = verifier_world.make_folder(tmp_path / "other", 12, text="A hand is grasping a red mug on the beach")
    shaded, estimators = world / "evaluation/scenic", estimators_of(world, "reference")
    with pytest.raises(ValueError, match=r"other \(12 records\) does not hold the captions of .*scenic \(12\)"):
        toy_tables.measure_pictures(Results(0, 0), other, shaded, estimators)
    token = verifier_world.make_folder(tmp_path / "token", 12, text=verifier_world.TEXT.replace(" a ", " a sks "))
    assert measure_generated.paired_records(shaded, token)  # DreamBooth's


def test_the_tool_measures_every_row_and_prints_the_table_and_a_sheet(world, capsys):
    flags = "--tables 2 --seeds 0 1 --evaluation {0}/evaluation --reference {0}/reference --clip {0}/clip.safetensors"
    arguments = [*flags.format(world).split(), "--out", str(world), "--verifier", str(world / "verifier.safetensors")]
    replica_table.main(replica_table.parse_args(arguments))
    printed = capsys.readouterr().out
    assert printed.startswith((world / "table_2.md").read_text())
    rows = {line.split(" | ")[0].strip("| "): line.split(" | ")[1:] for line in printed.splitlines() if "|" in line}
    assert rows["LDM"][0] == "79.12" and rows["LDM"][-2] == "0.15" and rows["HOIDiffusion"][-2] == "0.85"
    assert rows["LDM"][3] == "-"  # no bowl among the records
    pck = [measured(world, f"none/{seed}/scenic", "reference")[toy_tables.PCK] for seed in (0, 1)]
    assert rows["LDM"][-1].strip(" |") == f"{np.mean(pck):.4g} ({min(pck):.4g} .. {max(pck):.4g})"
    assert "fine-tunes of 7 and 9 steps" in printed and "not equally long: do not compare" in printed
    assert "least and largest of 2 seeds" in printed
    side = verifier_world.SIDE
    assert Image.open(world / "sheet.png").size[0] == pytest.approx(8 * side, abs=30)  # five rows of eight pictures
    assert Image.open(world / "sheet.png").size[1] > 5 * side


def made_up(value: float, spread: float, steps: int | None = 600) -> dict:
    number = {"value": value, "low": value - spread, "high": value + spread, "n": 208, "definition": "d"}
    numbers = [{"name": name, **number} for name in (toy_tables.FRECHET, toy_tables.TOY_CLIP)]
    return {"steps": steps, "numbers": dict.fromkeys(replica_table.PLACES, numbers), "sha256": {"verifier": "ab" * 32},
            "date": "2030-01-01", "interval": {"resamples": 200}, "reference": {"n": 2000}}  # fmt: skip


def test_tables_stand_beside_the_papers_numbers_and_name_pairs_in_another_order():
    distances = {"none": 9.0, "no-normal": 4.0, "no-skeleton": 8.0, "no-segmentation": 3.5, "all": 3.5}
    reports = {name: [made_up(value, 0.4)] for name, value in distances.items()} | {"shaded": [made_up(1.0, 0.1, None)]}
    lines = replica_table.as_markdown(replica_table.TABLES["4"], reports).splitlines()
    assert lines[2].startswith("| method | paper: FID (1k) ↓ | toy: Frechet distance ↓ | toy: hand IoU ↑ |")
    assert "| LDM (finetuned) | 86.12 | 9 (8.6 .. 9.4) | - | - | - |" in lines
    assert "| HOIDiffusion | 77.64 | 3.5 (3.1 .. 3.9) | - | - | - |" in lines
    assert "| (shaded pictures) | - | 1 (0.9 .. 1.1) | - | - | - |" in lines
    assert [line.partition("not the paper's for ")[2] for line in lines if "order of" in line] == [
        "w/o estimated normal maps and w/o hand keypoint projection (ranges apart)",
        "w/o hand-object segmentation and HOIDiffusion (ranges overlap)",
    ]
    reports["no-regularization"] = [made_up(2.0, 0.1)]
    table_5 = replica_table.TABLES["5"]
    assert "- order of CLIPScore stand-in: as in the paper" in replica_table.as_markdown(table_5, reports)
    table_2 = replica_table.TABLES["2"]  # where the paper has 79.12 % of mugs for two rows
    (mug,) = (column for column in table_2.columns if column.title == "mug, %")
    numbers = {name: made_up(value, 0.4) for name, value in
               zip(table_2.rows, (60.0, 50.0, 70.0, 90.0), strict=True)}  # fmt: skip
    for report in numbers.values():
        report["numbers"]["scenic"][0]["name"] = mug.number
    assert not replica_table.other_order(table_2, mug, {name: [report] for name, report in numbers.items()})
    # Of three seeds: the mean, the least and the largest.
    reports["all"] = [made_up(value, 0.4) for value in (3.0, 5.0, 4.0)]
    assert "| HOIDiffusion | 0.79 | 4 (3 .. 5) | - | - |" in replica_table.as_markdown(table_5, reports)


def test_a_score_that_does_not_tell_captions_apart_is_called_saturated():
    ceiling = made_up(2.1, 0.1, None)
    for other, said in ((1.0, False), (2.0, True)):
        number = {"name": toy_tables.SHUFFLED_CLIP, "value": other, "low": other - 0.1, "high": other + 0.1}
        numbers = {"scenic": [*ceiling["numbers"]["scenic"], number]}
        assert bool(replica_table.saturated(ceiling | {"numbers": numbers}, "scenic")) == said


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
    settings |= {"VERIFIER": root / "verifier", "SEEDS": "0 4"}
    (root / "out" / "table-3").mkdir(parents=True)
    (root / "out" / "table-3" / "passing.txt").write_text("images/000001.png\n")
    environment = os.environ | {name: str(value) for name, value in settings.items()}
    environment["PATH"] = f"{root / 'bin'}:{os.environ['PATH']}"
    subprocess.run(["bash", ROOT / "tools" / "replicate_tables.sh", "all"], env=environment, check=True)
    return [shlex.split(line) for line in (root / "log").read_text().splitlines() if "$'" not in line]


@pytest.mark.skipif("--baseline" not in (ROOT / "train.py").read_text(), reason="train.py has no --baseline yet")
def test_fine_tunes_differ_in_conditions_regularization_data_and_seed_alone(commands):
    runs = {tuple(Path(args.out).parts[-2:]): vars(args) for args in
            (train.parse_args(words[1:]) for words in commands if words[0] == "train.py")}  # fmt: skip
    left_out = {"all": [], "no-normal": ["normal"], "no-skeleton": ["skeleton"], "no-segmentation": ["segmentation"],
                "none": ["skeleton", "normal", "segmentation"], "no-regularization": [], "controlnet": [],
                "dreambooth": ["skeleton", "normal", "segmentation"], "estimated": [],
                "estimated-no-skeleton": ["skeleton"], "estimated-no-segmentation": ["segmentation"]}  # fmt: skip
    assert runs.keys() == {(name, seed) for name in left_out for seed in ("0", "4")}
    for (name, seed), args in runs.items():
        others = {key for key in args if args[key] != runs["all", seed][key]}
        assert others <= {"out", "conditions", "reg_data", "reg_batch_size", "baseline", "data"}, name
        kept = [c for c in ("skeleton", "normal", "segmentation") if c not in left_out[name]]
        assert args["conditions"] == kept
        assert bool(args["reg_data"]) == (name not in ("no-regularization", "controlnet"))
        assert args["steps"] == 5 and (Path(args["out"]) / "latents").resolve().name == "latents"
        assert args["seed"] == int(seed) and ("estimated" in args["data"][0]) == name.startswith("estimated")
        if name == "dreambooth":  # made before
            assert args["reg_data"][0].endswith(f"all/{seed}/prior")


def test_nothing_that_rows_are_measured_by_is_learned_from(commands):
    """Neither the records themselves nor a model's pictures of them, and all of other shapes."""
    shapes = {args.out.parts[-2:]: args.object_seed for args in
              (make_dataset.parse_args(words[1:]) for words in commands if words[0] == "make_dataset.py")}  # fmt: skip
    source = {args.out: folder for args in (sample.parse_args(words[1:]) for words in commands
                                            if words[0] == "sample.py") for folder in args.data or ()}  # fmt: skip
    learned = {source.get(Path(folder), Path(folder)) for args in
               (train.parse_args(words[1:]) for words in commands if words[0] == "train.py")
               for folder in (*args.data, *(args.reg_data or ()))}  # fmt: skip
    assert {folder.parts[-2:] for folder in learned} == {
        ("toy", "lab"), ("toy", "buffer"), ("estimated", "train"), ("out", "prior")
    }  # fmt: skip
    of = {shapes.pop(place) for place in (("out", "prior"), ("table-3", "shaded"), ("table-3", "lab"))}
    assert of == {100} and not of & set(shapes.values())


def test_every_fine_tune_is_sampled_on_the_same_captions_and_measured(commands):
    sampled = {words[words.index("--out") + 1]: sample.parse_args(words[1:]) for words in commands
               if words[0] == "sample.py"}  # fmt: skip
    for other in [out for out in sampled if out.endswith(("generated", "prior"))]:  # of Table 3, and DreamBooth's
        del sampled[other]
    assert len(sampled) == 11 * 2 * 2
    for out, args in sampled.items():
        name, seed, place = Path(out).parts[-3:]
        assert args.checkpoint == Path(out).parent / "model.safetensors" and args.seed == int(seed)
        if name in ("none", "dreambooth"):
            token = "-sks" * (name == "dreambooth")
            assert args.prompts_file.name == f"captions-{place}{token}.txt" and not args.conditions
        else:
            assert [folder.name for folder in args.data] == [place]
            assert (args.data[0].parent.name == "estimated") == name.startswith("estimated")
    words = next(words for words in commands if words[0] == "tools/replica_table.py")
    args = replica_table.parse_args(words[1:])
    rows = {name for key in args.tables for name in replica_table.TABLES[key].rows}
    assert rows == {Path(out).parts[-3] for out in sampled} and args.seeds == [0, 4]
    assert (args.evaluation.name, args.verifier.name) == ("evaluation", "verifier")


def test_table_3_trains_every_row_alike_and_judges_it_by_the_same_pictures(commands):
    def runs(module: str, parse, word: str = "") -> list:
        return [parse(words[2:]) for words in commands if words[:2] == ["-m", module] and (not word or word in words)]

    trained = runs("hoi.metrics.pose_network", pose_network.parse_args, "train")
    assert {tuple(args.out.parts[-3:-1]) for args in trained} == {
        (row, s) for row in pose_table.POSE_ROWS for s in "04"
    }
    assert {args.steps for args in trained} == {5} and all(args.seed == int(args.out.parts[-2]) for args in trained)
    data = {args.out.parts[-3]: [folder.name for folder in args.data] for args in trained}
    assert data == {"plain": ["plain"], "half-generated": ["half-generated", "half-plain"], "shaded": ["shaded"],
                    "judged": ["judged", "beside-judged"], "half-shaded": ["half-shaded", "half-plain"]}  # fmt: skip
    assert {args.data[0].name for args in runs("hoi.metrics.pose_network", pose_network.parse_args, "predict")} == {
        "test"
    }
    assert len(runs("hoi.metrics", metrics.parse_args)) == 2 * len(data)
    hands = runs("hoi.verify", verify.parse_args, "train")
    assert {args.out.parent.name for args in hands} == set(pose_table.HAND_ROWS)
    assert all(args.steps == 5 and args.data[0].name == "lab" for args in hands)
    assert commands[-1][0] == "tools/pose_table.py" and pose_table.parse_args(commands[-1][1:]).seeds == [0, 4]


def test_table_3_has_the_mean_and_the_ends_of_its_seeds(tmp_path, world, capsys):
    for row, shift in zip(pose_table.POSE_ROWS, range(5), strict=True):
        for seed in (0, 1):
            numbers = [{"name": f"{column} mAP, % (aabb)", "value": 10.0 * seed + shift}
                       for column in (*pose_table.IOU_COLUMNS, *pose_table.POSE_COLUMNS)]  # fmt: skip
            replica_table.write_json(tmp_path / row / str(seed) / "metrics.json", {"numbers": numbers})
    pose_network.save_pose_network(
        tmp_path / "plain/0/pose.safetensors", pose_network.PoseNetwork(16), {"steps": "600"}
    )
    for row in pose_table.HAND_ROWS:
        for seed in (0, 1):
            (tmp_path / "hands" / row).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(world / "verifier.safetensors", tmp_path / f"hands/{row}/{seed}.safetensors")
    shutil.copytree(world / "evaluation/scenic", tmp_path / "test")
    (tmp_path / "passing.txt").write_text("a\nb\n")
    (tmp_path / "judged.txt").write_text("a\n")
    (tmp_path / "all.txt").write_text("a\nb\nc\n")
    pose_table.main(pose_table.parse_args(["--out", str(tmp_path), "--seeds", "0", "1"]))
    printed = capsys.readouterr().out
    assert "| half of them generated, judged |" + " 7 (2 .. 12) |" * 7 in printed
    assert "600 steps each" in printed and "passes 2 of 3 generated ones, of which its row has 1" in printed
    pck = measured(world, "evaluation/scenic", "reference")[toy_tables.PCK]
    assert f"| and scenic, generated | {pck:.4g} ({pck:.4g} .. {pck:.4g}) |" in printed
