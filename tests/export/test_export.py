"""The export command: whole or absent, faults named, nothing left out in silence.  The folder itself in `datasets`."""

import csv
import errno
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from hoi.common.files import ASSETS
from hoi.data.folder import load_image, load_mesh, load_picture, read_records
from hoi.data.views import FolderViews
from hoi.data.writer import DatasetWriter, write_pictures, write_records
from hoi.export import folder, formats
from hoi.export.__main__ import run
from hoi.export.formats import FORMATS, export_folder


@pytest.fixture
def copy(export_source, tmp_path):
    return shutil.copytree(export_source, tmp_path / "copy")


@pytest.mark.parametrize("name", [name for name, target in FORMATS.items() if not target.grows])
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
        ("--format coco --shard-mb 5 SOURCE OUT", "--fields and --shard-mb are for --format webdataset"),
        ("--format webdataset --shard-mb 5 EMPTY OUT", "no record for webdataset"),
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
        ("webdataset", ["A key ends at the first dot", "handle_extension", "shards.jsonl"]),
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


@pytest.fixture
def two_jars(export_source, tmp_path):
    """A folder from elsewhere: its mug and its bowl are two mugs called jar.ply, in sub-folders of their own."""
    folder = tmp_path / "two_jars"
    shutil.copytree(export_source, folder)
    records = read_records(folder)[:2]
    for record, place in zip(records, ("a", "b"), strict=True):
        (folder / "objects" / place).mkdir()
        os.rename(folder / record["object_path"], folder / "objects" / place / "jar.ply")
        record |= {"object_path": f"objects/{place}/jar.ply", "category": "mug"}
    write_records(folder, records)
    return folder


def test_two_meshes_of_one_file_name_never_share_a_file(two_jars, tmp_path):
    records = read_records(two_jars)
    meshes = [(two_jars / record["object_path"]).read_bytes() for record in records]
    assert meshes[0] != meshes[1]
    views = FolderViews(two_jars)
    copies = [views[number].write(tmp_path / "copy", number) for number in range(2)]  # what sample.py --data does
    assert [(tmp_path / "copy" / copied["object_path"]).read_bytes() for copied in copies] == meshes
    export_folder(two_jars, "csv", tmp_path / "csv")
    with open(tmp_path / "csv" / "test.csv", newline="") as stream:
        assert [(tmp_path / "csv" / row["objpath"]).read_bytes() for row in csv.DictReader(stream)] == meshes
    write_records(two_jars, [records[k % 2] | {"index": k} for k in range(10)])  # NOCS takes whole tens
    export_folder(two_jars, "nocs", tmp_path / "nocs")
    models = {path.read_bytes() for path in (tmp_path / "nocs").rglob("model.obj")}
    assert len(models) == 2
    export_folder(two_jars, "bop", tmp_path / "bop")
    assert len(set(json.loads(next((tmp_path / "bop").rglob("names.json")).read_text()).values())) == 2


def test_a_mesh_called_like_a_split_hides_no_record_from_datasets(export_source, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets

    source, copy = tmp_path / "source", tmp_path / "copy"
    shutil.copytree(export_source, source)
    records = [record for record in read_records(source) if record["object_path"]]
    names = ("test.ply", "toy_train.ply", "val-1.ply")
    for record, name in zip(records, names, strict=False):
        shutil.copy(source / record["object_path"], source / "objects" / name)
        record["object_path"] = f"objects/{name}"
    write_records(source, records)
    views, writer = FolderViews(source), DatasetWriter(copy, {})
    for number, record in enumerate(records[: len(names)]):
        written = views[number].write(copy, number)
        assert (copy / written["object_path"]).read_bytes() == (source / record["object_path"]).read_bytes()
        writer.append(write_pictures(copy, number, written, load_image(source, record)))
    writer.finish()
    table = datasets.load_dataset("imagefolder", data_dir=str(copy), cache_dir=str(tmp_path / "cache"))
    assert list(table) == ["train"] and len(table["train"]) == len(names)


def test_an_object_of_a_folder_is_read_by_the_suffixes_of_meshes_alone(export_source, tmp_path):
    folder = tmp_path / "folder"
    shutil.copytree(export_source, folder)
    record = read_records(folder)[0]
    for name in ("mug.svg", "mug.xaml", "mug.json", "mug.ply.bz2", "mug.zip", "mug"):
        shutil.copy(folder / record["object_path"], folder / "objects" / name)
        with pytest.raises(ValueError, match=f"{name} .object_path of record 0. is no mesh file: expected one of .obj"):
            load_mesh(folder, record | {"object_path": f"objects/{name}"})
    shutil.copy(folder / record["object_path"], folder / "objects" / "mug.PLY")
    np.testing.assert_array_equal(load_mesh(folder, record | {"object_path": "objects/mug.PLY"})[0],
                                  load_mesh(folder, record)[0])  # fmt: skip
