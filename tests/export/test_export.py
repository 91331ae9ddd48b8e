"""The export command: whole or absent, faults named, nothing left out in silence.  The folder itself in `datasets`."""

import errno
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from hoi.common.files import ASSETS
from hoi.data.folder import load_picture, read_records
from hoi.data.writer import write_records
from hoi.export import folder, formats
from hoi.export.__main__ import run
from hoi.export.formats import FORMATS, export_folder


@pytest.fixture
def copy(export_source, tmp_path):
    return shutil.copytree(export_source, tmp_path / "copy")


@pytest.mark.parametrize("name", FORMATS)
def test_a_fault_on_the_way_leaves_nothing_behind_and_names_the_file(copy, tmp_path, name):
    os.truncate(copy / "images" / "000002.png", 900)
    with pytest.raises(ValueError, match=r"images/000002\.png is damaged"):
        export_folder(copy, name, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy"]


@pytest.mark.parametrize("name", FORMATS)
def test_a_number_that_is_none_is_refused_before_anything_is_written(copy, tmp_path, name):
    text = (copy / "metadata.jsonl").read_text()
    (copy / "metadata.jsonl").write_text(re.sub(r'"transl": \[[^,]+', '"transl": [NaN', text, count=1))
    with pytest.raises(ValueError, match=r"copy/metadata\.jsonl line 1: transl .*expected 3"):
        export_folder(copy, name, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy"]


def test_a_full_disk_says_so_and_leaves_nothing_behind(export_source, tmp_path, monkeypatch):
    def full(source, target):
        Path(target).write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(folder.shutil, "copyfile", full)
    with pytest.raises(SystemExit, match="disk is full; the unfinished export was removed"):
        run(["--format", "coco", str(export_source), str(tmp_path / "out")])
    assert not list(tmp_path.iterdir())


def test_an_interruption_leaves_nothing_behind(export_source, tmp_path, monkeypatch):
    monkeypatch.setattr(formats.bop, "write_models", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(SystemExit, match="interrupted: nothing was left behind"):
        run(["--format", "bop", str(export_source), str(tmp_path / "out")])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words, message",
    [
        ("--format bop SOURCE .", r"hoi.export: . exists already; choose another folder"),
        ("--format bop nowhere OUT", "nowhere has no metadata.jsonl: it is no dataset folder"),
        ("--format coco --labels SOURCE OUT", "--labels is for --format nocs"),
        ("--format kitti SOURCE OUT", "invalid choice"),
        ("--format nocs WIDE OUT", "no record for nocs\n.* camera is not that of NOCS .*make_dataset.py --camera nocs"),
        ("--format coco BLANK OUT", "no record for coco\n  6 left out: they have no picture: make_dataset.py --shade"),
        ("--format csv EMPTY OUT", "no record for csv"),
    ],
)
def test_a_bad_request_gets_a_message_and_leaves_nothing_behind(export_source, tmp_path, words, message, capsys):
    changes = {
        "WIDE": lambda record: record | {"intrinsics": record["intrinsics"] and [300.0, *record["intrinsics"][1:]]},
        "BLANK": lambda record: record | {"file_name": None},
        "EMPTY": lambda record: None,
    }
    places = {"SOURCE": export_source, "OUT": tmp_path / "out"}
    for name, change in changes.items():
        if name in words:
            places[name] = shutil.copytree(export_source, tmp_path / name)
            write_records(places[name], [new for old in read_records(export_source) if (new := change(old))])
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SystemExit) as exit_status:
        run([str(places.get(word, word)) for word in words.split()])
    text = f"{exit_status.value.code}\n{capsys.readouterr().err}"
    assert exit_status.value.code != 0 and re.search(message, text, re.DOTALL), text
    assert sorted(tmp_path.iterdir()) == before


def test_what_is_left_out_is_counted_by_reason_and_the_card_goes_with_the_export(export_source, tmp_path, capsys):
    run(["--format", "bop", str(export_source), str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert "4 records -> " in said and "1 left out: they have no object_mask_file_name, object_path" in said
    card = (tmp_path / "out" / "dataset_info.md").read_text()
    assert "4 records" in card and "left out" in card and "MIT" in card and "millimetres" in card


@pytest.mark.parametrize(
    "name, words",
    [
        ("bop", ["dataset_params.py", "models_eval", "test_targets_bop19.json", "collection of single pictures",
                 "BlenderProc's loader of BOP scenes"]),
        ("coco", ["kpt_oks_sigmas", "v is 0 outside the picture"]),
        ("csv", ["Paths are relative to this folder", "512 px alone"]),
        ("nocs", ["shape_data.py", "training_data_prepare.py", "--first-scene N", "mug_meta.pkl"]),
    ],
)  # fmt: skip
def test_an_export_begins_with_its_formats_page_which_is_written_for_its_reader(
    export_source, tmp_path, name, words
):
    page = (ASSETS / "exports" / f"{name}.md").read_text()
    assert page.startswith("# ") and "Records ->" not in page and "hoi/" not in page and "hoi." not in page
    assert [word for word in words if word not in " ".join(page.split())] == []
    if name != "nocs":  # it takes ten pictures: test_nocs.py
        export_folder(export_source, name, tmp_path / "out")
        assert (tmp_path / "out" / FORMATS[name].card).read_text().startswith(page)


def test_the_dataset_folder_itself_opens_in_datasets(export_source, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # read when the package is imported
    import datasets

    table = datasets.load_dataset("imagefolder", data_dir=str(export_source), cache_dir=str(tmp_path))["train"]
    records = [record for record in read_records(export_source) if record["depth_file_name"]]
    rows = {row["index"]: row for row in table}
    assert len(table) == 6
    for record in records:
        row = rows[record["index"]]
        np.testing.assert_array_equal(np.array(row["image"]), load_picture(export_source, record, "file_name"))
        np.testing.assert_array_equal(np.array(row["depth"]), load_picture(export_source, record, "depth_file_name"))
        assert row["text"] == record["text"] and row["intrinsics"] == record["intrinsics"]
