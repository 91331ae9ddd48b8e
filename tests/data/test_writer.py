"""The data card says where records come from and under whose terms, and counts what was kept."""

import json
import os
import platform
import re
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from hoi.common import files
from hoi.common.command import how_made
from hoi.common.files import JsonLines
from hoi.conditions import Conditions
from hoi.data.check import check_folder
from hoi.data.folder import FILE_KEYS, read_records
from hoi.data.writer import (
    DatasetWriter,
    card_text,
    count,
    data_card,
    folder_description,
    read_card,
    refresh_card,
    write_pictures,
)
from hoi.geometry.objects import make_object, object_card

WEIGHTS = {"name": "sd.safetensors", "sha256": "ab" * 32, "adapter": "ad.pth", "adapter_sha256": "cd" * 32}


def record(**more):
    return {"index": 0, "file_name": "images/000000.png", "source": "rendered", "category": "mug"} | more


@pytest.fixture
def folder(tmp_path):
    """Three scenery pictures, nothing else."""
    description = {"rejected": {"blurred": 2, "too dark": 1}, "licences": {"pictures": "terms of Somebody"}}
    writer = DatasetWriter(tmp_path, description)
    for index in range(3):
        writer.append(write_pictures(tmp_path, index, {"text": "x"}, np.zeros((8, 8, 3), np.uint8)))
    writer.finish(grid=False)
    return tmp_path


def test_labels_made_with_mano_say_so_whatever_the_maker_wrote(tmp_path):
    records = [record(hand_model="mano"), record(hand_model="builtin"), record(hand_model=None)]
    card = data_card(tmp_path, count(records), {"licences": {"weights": "those of x"}})
    assert "MANO licence (non-commercial research)" in card["licences"]["hand"] and "MIT" in card["licences"]["hand"]
    assert card["licences"]["weights"] == "those of x"
    assert card["sources"]["hands"] == {"mano": 1, "builtin": 1}
    assert "hand" not in data_card(tmp_path, count([record(hand_model=None)]), {})["licences"]


def test_a_description_names_maker_weights_objects_and_the_folder_that_it_continues(folder):
    mesh = make_object("mug", 0)
    made = folder_description("a.py", {"n": 1}, 3, {"name": "x.safetensors"}, {"hand": "ours"}, [mesh])
    assert [*made] == ["made_by", "command", "versions", "seed", "checkpoint", "licences", "job", "objects"]
    assert made["licences"] == {"hand": "ours", "weights": "those of x.safetensors", "objects": ["built-in family"]}
    assert made["objects"] == [object_card(mesh)] and made["job"] == {"n": 1}
    (folder / "dataset.json").write_text('{"licences": {"pictures": "terms"}, "objects": [{"object_id": 1}]}')
    again = folder_description("a.py", {}, checkpoint={"name": "x"}, sources=[folder])
    assert again["licences"]["data"] == {"pictures": "terms"} and again["objects"] == [{"object_id": 1}]
    assert "objects" not in folder_description("a.py", {}) and folder_description("a.py", {})["licences"] == {}


def test_objects_of_the_user_are_as_given_and_built_in_ones_are_ours(tmp_path):
    given = {"licences": {"objects": ["built-in family", "scans/a.stl"]}}
    licences = data_card(tmp_path, count([record()]), given)["licences"]
    assert licences["objects"] == {
        "built-in family": "MIT, made by this project",
        "scans/a.stl": "as given by the user",
    }
    again = data_card(tmp_path, count([record()]), {"licences": licences})
    assert again["licences"] == licences


def test_weights_are_listed_once_with_their_hashes_and_pictures_counted_by_kind(tmp_path):
    records = [record(checkpoint=WEIGHTS), record(checkpoint=WEIGHTS), record(), record(file_name=None)]
    card = data_card(tmp_path, count(records), {})
    assert card["weights"] == [WEIGHTS]
    assert card["sources"]["pictures"] == {"generated": 2, "drawn or photographed": 1}
    assert card["counts"] == {"records": 4, "pictures": 3}


def test_the_finished_folder_holds_its_card_and_passes_the_check(folder):
    card = json.loads((folder / "dataset.json").read_text())
    assert card["yield"] == {"accepted": 3, "rejected": 3, "reasons": {"blurred": 2, "too dark": 1}}
    assert card["licences"]["pictures"] == "terms of Somebody" and card["verification"] is None
    assert check_folder(folder).ok, str(check_folder(folder))


def test_a_later_verification_enters_the_card_on_refresh_and_nothing_else_changes(folder):
    before = json.loads((folder / "dataset.json").read_text())
    (folder / "verification").mkdir()
    report = {"verifier": "judge.safetensors", "scores": {"iou_hand": {"mean": 0.9}}, "problems": ["a", "b"]}
    (folder / "verification" / "report.json").write_text(json.dumps(report))
    refresh_card(folder)
    after = json.loads((folder / "dataset.json").read_text())
    assert after == before | {"verification": report | {"problems": 2}}
    assert "iou_hand" in card_text(after) and "judge.safetensors" in card_text(after)


def test_a_folder_from_before_the_card_gets_one_when_read(folder):
    (folder / "dataset.json").write_text('{"format_version": 1, "seed": 3}')
    card = read_card(folder)
    assert card["seed"] == 3 and card["counts"]["records"] == 3 and card["yield"]["accepted"] == 3
    assert check_folder(folder).ok
    (folder / "dataset.json").unlink()
    assert read_card(folder)["counts"]["records"] == 3


def test_the_commit_is_gits_own():
    commit = how_made("x.py")["versions"]["commit"]
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    if head.returncode:
        assert commit is None
    else:
        assert re.fullmatch(rf"{head.stdout.strip()}(-dirty)?", commit)


# --- killed processes and power cuts ---


def pictures(folder: Path, index: int) -> dict:
    drawn = np.full((8, 8, 3), index, np.uint8)
    return write_pictures(folder, index, {"text": "x"}, drawn, Conditions(drawn, drawn, drawn))


@pytest.mark.skipif(os.name == "nt", reason="Windows syncs nothing that was opened for reading")
def test_a_line_is_written_when_the_disk_keeps_what_it_names_and_many_lines_wait_for_the_disk_together(
    tmp_path, monkeypatch
):
    kept, waits, append = set(), [], JsonLines.append

    def slow_disk(path: Path) -> None:
        time.sleep(0.02)
        kept.add(str(path.relative_to(tmp_path)))

    monkeypatch.setattr(files, "_sync", slow_disk)
    make_lasting = files.make_lasting
    monkeypatch.setattr(files, "make_lasting", lambda paths: waits.append(make_lasting(paths)))

    def line_of(self, record, **more):
        named = {record[key] for key in FILE_KEYS if record[key]}
        assert len(named) == 4 and named | {str(Path(name).parent) for name in named} <= kept
        append(self, record, **more)

    monkeypatch.setattr(JsonLines, "append", line_of)
    with pytest.raises(KeyboardInterrupt), DatasetWriter(tmp_path, {}) as writer:
        for index in range(30):
            writer.append(pictures(tmp_path, index))
        raise KeyboardInterrupt
    assert len(read_records(tmp_path)) == 30 and len(waits) < 15


def test_the_first_process_of_a_job_removes_what_killed_ones_left_and_nothing_of_others(tmp_path):
    with DatasetWriter(tmp_path, {}) as writer:
        writer.append(pictures(tmp_path, 0))
    child = subprocess.Popen(["true"])
    child.wait()
    (tmp_path / "objects").mkdir()
    here = platform.node()
    left = [f"objects/.can_0000.ply.{child.pid}@{here}.tmp", f"images/.000000.png.{child.pid}@{here}.tmp"]
    living = [f"objects/.can_0000.ply.{os.getppid()}@{here}.tmp", f"normal/.000000.png.{child.pid}@elsewhere.tmp"]
    for name in (*left, *living):
        (tmp_path / name).write_bytes(b"half")

    def there() -> list[str]:
        return [name for name in (*left, *living) if (tmp_path / name).exists()]

    DatasetWriter(tmp_path, {}, rank=1, world_size=2)
    assert there() == left + living  # process 0 does it, before any other writes
    DatasetWriter(tmp_path, {}, rank=0, world_size=2)
    assert there() == living
