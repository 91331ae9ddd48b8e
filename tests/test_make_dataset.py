"""make_dataset.py: equal records in any order, by any number of workers, after any interruption; faults are named."""

import errno
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image

import make_dataset
from hoi.common import files
from hoi.common.files import ASSETS
from hoi.conditions import draw_skeleton
from hoi.data import writer
from hoi.data.check import check_folder
from hoi.data.folder import load_conditions, load_image, read_records
from hoi.data.scene_maker import SceneMaker
from hoi.export import nocs
from hoi.geometry.objects import collect_objects
from make_dataset import main, parse_args

ROOT = Path(__file__).parent.parent
SMALL = "--object can --object-instances 1 --grasps-per-object 2 --size 64"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def arguments(words: str, out: Path, cache: Path) -> list[str]:
    return [*SMALL.split(), *words.split(), "--out", str(out), "--cache", str(cache)]


def make(words: str, out: Path, cache: Path) -> list[dict]:
    main(parse_args(arguments(words, out, cache)))
    return read_records(out)


# make_dataset.py that presses Ctrl-C, for its workers too, when record 12 is complete.  Whoever watches the folder from
# outside and signals then comes too late on a busy machine: all records are there.
INTERRUPTED_COMMAND = """
import os, signal, make_dataset
from hoi.data.writer import DatasetWriter

def append(self, record, append=DatasetWriter.append):
    append(self, record)
    if len(self) == 12:
        os.killpg(0, signal.SIGINT)

DatasetWriter.append = append
make_dataset.run()
"""


def contents(folder: Path) -> dict[str, bytes]:
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if name != "dataset.json"}  # holds the command


@pytest.fixture(scope="module")
def sixty(tmp_path_factory, cache):
    """Sixty records made in one go by one process."""
    folder = tmp_path_factory.mktemp("sixty")
    make("--count 60", folder, cache)
    return folder


PAGE = (ASSETS / "dataset.md").read_text()


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL), ids=["torch", "datasets"])
def test_the_ways_to_load_a_folder_that_its_page_shows_run_in_it(code, tmp_path, cache, monkeypatch):
    records = make("--count 3 --shade", tmp_path / "data", cache)
    assert (tmp_path / "data" / "README.md").read_text() == PAGE
    monkeypatch.chdir(tmp_path / "data")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    scope = {"__name__": "snippet"}
    exec(code, scope)
    batch, points = scope["batch"], scope["batch"]["keypoints_3d"].view(2, 21, 3)
    seen = points @ batch["intrinsics"].view(2, 3, 3).mT  # as the page explains the numbers
    pixels = batch["keypoints_2d"].view(2, 21, 2)
    torch.testing.assert_close(seen[..., :2] / seen[..., 2:], pixels.to(seen), atol=1e-3, rtol=0)
    assert batch["text"] == [record["text"] for record in records[:2]]


def test_the_page_of_a_folder_stays_as_its_owner_leaves_it_and_its_terms_stand_in_the_docs(sixty, tmp_path, cache):
    terms = [line for line in PAGE.splitlines() if line.startswith("- **")]
    assert len(terms) >= 6 and set(terms) <= set((ROOT / "docs" / "data.md").read_text().splitlines())
    make("--count 1", tmp_path, cache)
    (tmp_path / "README.md").write_text("mine")
    make("--count 2", tmp_path, cache)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_two_workers_an_interruption_and_one_worker_make_the_same_folder_as_one_run(sixty, tmp_path, cache):
    command = [sys.executable, "-c", INTERRUPTED_COMMAND, *arguments("--count 60 --workers 2", tmp_path / "out", cache)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600,
                          start_new_session=True)  # fmt: skip
    assert done.returncode == 1 and "interrupted: 12 records are complete; the same" in done.stdout, done.stdout
    assert "Traceback" not in done.stdout, done.stdout
    assert len(read_records(tmp_path / "out")) == 12
    make("--count 60", tmp_path / "out", cache)
    different = [name for name, content in contents(sixty).items() if contents(tmp_path / "out").get(name) != content]
    assert not different and contents(tmp_path / "out").keys() == contents(sixty).keys()


def test_a_longer_run_extends_a_shorter_one(sixty, tmp_path, cache, capsys):
    make("--count 7", tmp_path / "out", cache)
    assert [record["index"] for record in read_records(tmp_path / "out")] == list(range(7))
    make("--count 60", tmp_path / "out", cache)
    assert contents(tmp_path / "out") == contents(sixty)
    capsys.readouterr()
    make("--count 60", tmp_path / "out", cache)
    assert "0 new records, 60 in all" in capsys.readouterr().out


def test_another_seed_gives_other_records_and_is_refused_in_the_same_folder(sixty, tmp_path, cache):
    records = make("--count 2 --seed 1", tmp_path / "out", cache)
    assert records[0]["object_to_camera"] != read_records(sixty)[0]["object_to_camera"]
    with pytest.raises(ValueError, match="seed: 1 there, 2 now"):
        make("--count 2 --seed 2", tmp_path / "out", cache)


def test_another_job_is_refused_before_any_grasp_is_searched(tmp_path, cache, monkeypatch):
    make("--count 1", tmp_path / "out", cache)
    monkeypatch.setattr(SceneMaker, "grasps_of", lambda *_: pytest.fail("searched"))
    with pytest.raises(ValueError, match="size: 64 there, 48 now"):
        make("--count 1 --size 48", tmp_path / "out", cache)


def test_a_folder_that_cannot_be_written_is_told_with_a_way_out(tmp_path, cache):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OSError, match="cannot write to .*file/out .*choose another folder with --out"):
        make("--count 1", tmp_path / "file" / "out", cache)


def test_check_accepts_what_was_made_and_refuses_a_changed_number(sixty, tmp_path, cache, capsys):
    make("--count 3 --hand-side random", tmp_path / "out", cache)
    check = ["--check", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as exit_status:
        main(parse_args(check))
    assert exit_status.value.code == 0 and "3 geometries rendered again" in capsys.readouterr().out
    records = read_records(tmp_path / "out")
    records[1]["transl"][0] += 0.001
    writer.write_records(tmp_path / "out", records)
    with pytest.raises(SystemExit) as exit_status:
        main(parse_args(check))
    assert exit_status.value.code == 1 and "PROBLEM: record 1: hand parameters" in capsys.readouterr().out


def test_wide_pictures_keep_square_pixels_and_tight_framing_shows_every_keypoint(tmp_path, cache):
    for framing in ("official", "tight"):
        records = make(f"--count 4 --width 96 --height 40 --framing {framing}", tmp_path / framing, cache)
        for record in records:
            fx, _, _, _, fy, *_ = record["intrinsics"]
            xy = np.reshape(record["keypoints_2d"], (21, 2))
            assert fx == pytest.approx(fy) and load_conditions(tmp_path / framing, record).normal.shape == (40, 96, 3)
            assert (xy >= 0).all() and (xy <= [95, 39]).all()
    assert json.loads((tmp_path / "tight" / "dataset.json").read_text())["job"]["size"] == "96 x 40"
    assert make_dataset.check_folder(tmp_path / "tight").ok


def test_without_a_size_the_default_model_takes_what_is_made(tmp_path):
    args, real = parse_args(["--out", str(tmp_path)]), parse_args(["--dexycb", str(tmp_path)])
    assert (args.height, args.width, args.framing) == (128, 128, "tight") and (real.height, real.width) == (512, 512)
    assert parse_args(["--size", "128"]).framing == parse_args(["--official-view"]).framing == "official"


def test_official_view_looks_from_in_front_and_default_views_from_all_around(sixty, tmp_path, cache):
    def azimuths(records):
        poses = [np.linalg.inv(np.reshape(record["object_to_camera"], (4, 4))) for record in records]
        return np.degrees([np.arctan2(pose[1, 3], pose[0, 3]) for pose in poses])

    front = azimuths(make("--count 5 --official-view --upright 1", tmp_path, cache))
    assert front.min() >= 0 and front.max() <= 0.1
    assert np.ptp(azimuths(read_records(sixty))) > 300


def test_objects_are_turned_at_random_and_folders_begun_before_go_on_upright(sixty, tmp_path, cache):
    def upright(records):  # the object's z axis neither leans to the right nor hangs down in the picture
        axes = np.array([np.reshape(record["object_to_camera"], (4, 4))[:3, 2] for record in records])
        return (np.abs(axes[:, 0]) < 1e-6) & (axes[:, 1] < 0)

    assert 20 <= upright(read_records(sixty)).sum() <= 40 and check_folder(sixty).ok
    assert json.loads((sixty / "dataset.json").read_text())["job"]["upright"] == 0.5
    assert upright(make("--count 8 --upright 1", tmp_path, cache)).all()
    assert "upright" not in json.loads((tmp_path / "dataset.json").read_text())["job"]
    with pytest.raises(ValueError, match="upright: .* there, 0.5 now"):
        make("--count 12", tmp_path, cache)


def test_the_camera_of_nocs_is_what_its_exporter_takes_and_older_folders_do_not_know_of_it(sixty, tmp_path, cache):
    records = make("--count 2 --shade --camera nocs", tmp_path, cache)
    assert len(records) == 2 and not any(nocs.unfit_for_nocs(record) for record in records)
    assert records[0]["intrinsics"][0] == pytest.approx(577.5 * 64 / 480)
    jobs = [json.loads((folder / "dataset.json").read_text())["job"] for folder in (tmp_path, sixty)]
    assert jobs[0]["camera"] == "nocs" and "camera" not in jobs[1]


def test_trajectories_end_in_the_grasp_and_frames_that_leave_the_picture_are_left_out(tmp_path, cache):
    kept = make("--count 24 --frames 6 --start-distance 0.3", tmp_path / "kept", cache)
    everything = make("--count 24 --frames 6 --start-distance 0.3 --keep-outside", tmp_path / "all", cache)
    outside = [record["index"] for record in everything if not record["hand_in_picture"]]
    assert outside and {record["index"] for record in kept} == {r["index"] for r in everything} - set(outside)
    make("--count 6 --frames 6 --start-distance 0.3", tmp_path / "kept", cache)  # what is there counts on
    card = json.loads((tmp_path / "kept" / "dataset.json").read_text())
    assert card["yield"]["rejected"] == len(outside) and card["yield"]["accepted"] == len(kept)
    for record in everything:
        assert record["index"] == 6 * record["trajectory"] + record["frame"]
        assert record["scene"] == record["trajectory"]
        xy = np.reshape(record["keypoints_2d"], (21, 2))
        assert record["hand_in_picture"] == bool((xy >= 0).all() and (xy <= 63).all())
        if record["frame"] == 5:
            assert record["contact"] and record["grasp"]["force_closure"] and record["penetration_mm"] <= 2
        if record["frame"] == 0:
            assert record["contact"] is False and record["penetration_mm"] == 0


def test_shaded_looks_share_a_view_and_differ_in_picture_and_text(tmp_path, cache):
    words = "--count 16 --looks 2 --shade --framing tight --content hand_object=0.5 object=0.25 scenery=0.25"
    records = make(words, tmp_path, cache)
    assert len(records) == 16
    for first, second in zip(records[::2], records[1::2], strict=True):
        assert first["skeleton_file_name"] == second["skeleton_file_name"] and first["transl"] == second["transl"]
        assert first["look"] != second["look"]
        difference = load_image(tmp_path, first).astype(int) - load_image(tmp_path, second)
        assert np.abs(difference).mean() > 5
        assert first["look"]["object_color"] in first["text"] or first["category"] is None
    rules = {record["skeleton_rule"] for record in records if record["transl"] is not None}
    assert rules == {"all"} and check_folder(tmp_path).ok, "a tight framing draws all bones, and says so"
    # Before there was the key, folders had skeletons by the release's rule; they stay valid, and only they.
    lines = [json.dumps({k: v for k, v in r.items() if k != "skeleton_rule"}) for r in records]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    assert "skeleton differs" in "".join(check_folder(tmp_path).problems)
    for record in {r["skeleton_file_name"]: r for r in records if r["transl"] is not None}.values():
        points = np.reshape(record["keypoints_2d"], (21, 2))
        Image.fromarray(draw_skeleton(points, 64, 64)).save(tmp_path / record["skeleton_file_name"])
    assert check_folder(tmp_path).ok
    scenery = [record for record in records if record["transl"] is None and record["object_path"] is None]
    assert scenery and all(record["skeleton_file_name"] is None for record in scenery)
    assert load_conditions(tmp_path, scenery[0]) is None


def test_the_folder_says_how_it_was_made(sixty):
    description = json.loads((sixty / "dataset.json").read_text())
    assert description["counts"] == {"records": 60, "pictures": 0} and description["format_version"] == 1
    assert description["job"]["size"] == 64 and description["job"]["objects"][0].startswith("can_0000 ")
    assert description["objects"][0]["grasps"] == 2 and len(description["objects"][0]["file_to_canonical"]) == 16
    assert "MIT" in description["licences"]["hand"]


def test_every_bad_object_is_named_before_anything_is_made(tmp_path, cache):
    good, broken, flat, empty = (tmp_path / name for name in ("good.stl", "broken.obj", "flat.stl", "empty"))
    trimesh.creation.cylinder(0.03, 0.1).export(good)
    broken.write_text("v 0 nan 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n")
    trimesh.Trimesh([[0, 0, 0], [1, 0, 0], [0, 1, 0]], [[0, 1, 2]]).export(flat)
    empty.mkdir()
    words = ["--object", *map(str, (good, broken, flat, empty)), "teapot", "--out", str(tmp_path / "out")]
    with pytest.raises(ValueError, match="4 object.s. cannot be used") as failure:
        main(parse_args(words))
    for name in ("broken.obj", "flat.stl", "empty", "teapot: no such file or folder, and no built-in family (mug"):
        assert name in str(failure.value)
    assert "good.stl" not in str(failure.value) and not (tmp_path / "out").exists()


def test_files_of_one_name_are_kept_apart(tmp_path):
    for number, radius in enumerate((0.03, 0.04)):
        (tmp_path / str(number)).mkdir()
        trimesh.creation.cylinder(radius, 0.1).export(tmp_path / str(number) / "jar.stl")
    meshes = collect_objects([str(tmp_path)], category="jar")
    assert [mesh.object_id for mesh in meshes] == ["jar", "jar_2"] and meshes[0].category == "jar"


@pytest.mark.parametrize(
    "words, message",
    [
        ("--object nothing.obj", "make_dataset.py: 1 object.s. cannot be used.*\n.*nothing.obj: no such file"),
        ("--object can --mano nowhere.pkl", "make_dataset.py: .*nowhere.pkl"),
        ("--check nowhere", "nowhere has no metadata.jsonl: it is no dataset folder"),
        ("--content scenery", "only with --shade"),
        ("--content hand_objects", "'hand_objects' is no content; choose from hand_object, object, hand, scenery"),
        ("--content object=-1", "share of object is '-1', expected a positive number"),
        ("--count 0", "'0' is not a positive whole number"),
        ("--looks 2", "--looks needs --shade"),
        ("--style lab", "--style and --no-paraphrase need --shade"),
        ("--shade --text mug", "--text is for records without --shade"),
        ("--frames 3 --start-distance -0.1", "--start-distance is -0.1, expected metres, 0 or more"),
        ("--upright 1.5", "--upright is 1.5, expected a share from 0 to 1"),
        ("--seed -1", "--seed and --object-seed must not be negative"),
        ("--camera nocs --framing tight", "--camera nocs fixes the intrinsics of all pictures"),
        ("--text {objct}", "make_dataset.py: .*{objct}; the only placeholder is {object}"),
        ("--scenes nowhere.jsonl", "no scenes file at nowhere.jsonl"),
        ("--scenes some.jsonl --object mug", "--scenes brings objects and hands: not with --object"),
        ("--camera lens.json", "--camera is lens.json, expected official or nocs, or with --scenes a file"),
        ("--csv train.csv --width 640", "real pictures are cut square"),
        ("--csv train.csv --text {objct}", "make_dataset.py: .*{objct}; the only placeholder is {object}"),
    ],
)
def test_a_bad_request_gets_a_message_and_a_failing_exit_code(tmp_path, words, message, capsys):
    arguments = [*words.split(), "--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]
    with pytest.raises(SystemExit) as exit_status:
        make_dataset.run(arguments)
    said = capsys.readouterr()
    text = f"{exit_status.value.code}\n{said.out}{said.err}"
    assert exit_status.value.code not in (0, None) and re.search(message, text), text
    assert not (tmp_path / "out").exists()


def test_a_full_disk_stops_with_a_message_and_keeps_finished_records(tmp_path, cache, monkeypatch):
    written = 0

    def full_after_forty_files(path, mode):
        nonlocal written
        written += 1
        if written > 40:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return open(path, mode)

    with monkeypatch.context() as patch:
        for module in (files, writer):
            patch.setattr(module, "open", full_after_forty_files, raising=False)
        with pytest.raises(SystemExit, match="the disk is full; what was finished is safe"):
            make_dataset.run(arguments("--count 20", tmp_path / "out", cache))
    finished = len(read_records(tmp_path / "out"))
    assert 0 < finished < 20
    assert len(make("--count 20", tmp_path / "out", cache)) == 20


def test_a_fault_while_scenes_are_made_reaches_the_user(tmp_path, cache, monkeypatch):
    def fail(self, number):
        raise ValueError(f"scene {number} is broken")

    monkeypatch.setattr(SceneMaker, "make_scene", fail)
    with pytest.raises(SystemExit, match="make_dataset.py: scene 0 is broken"):
        make_dataset.run(arguments("--count 2", tmp_path / "out", cache))


def shown(records: list[dict]) -> list[int]:
    """How often each object is in them."""
    return sorted(Counter(record["object_path"] for record in records).values())


def test_objects_take_turns_and_a_folder_that_drew_lots_is_another_job(tmp_path, cache):
    words = "--object mug bowl bottle --object-instances 2 --content object --object-seed 3 --count"
    records = make(f"{words} 18", tmp_path / "all", cache)
    assert shown(records) == [3] * 6 and shown(records[:6]) == shown(records[6:12]) == [1] * 6
    orders = [[record["object_path"] for record in records[k : k + 6]] for k in (0, 6, 12)]
    assert orders[0] != orders[1] != orders[2]
    make(f"{words} 7", tmp_path / "parts", cache)
    assert make(f"{words} 18", tmp_path / "parts", cache) == records
    old = tmp_path / "old"
    make(f"{words} 2", old, cache)
    card = json.loads((old / "dataset.json").read_text())
    del card["job"]["rounds"]
    (old / "dataset.json").write_text(json.dumps(card))
    with pytest.raises(ValueError, match="rounds: None there, True now"):
        make(f"{words} 18", old, cache)
