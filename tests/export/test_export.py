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
from hoi.data.check import check_folder
from hoi.data.folder import load_image, load_mesh, load_picture, read_records
from hoi.data.views import FolderViews
from hoi.data.writer import DatasetWriter, write_pictures, write_records
from hoi.export import folder, formats
from hoi.export.__main__ import run
from hoi.export.formats import FORMATS, export_folders, split_records


@pytest.fixture
def copy(export_source, tmp_path):
    return shutil.copytree(export_source, tmp_path / "copy")


@pytest.mark.parametrize("name", [name for name, target in FORMATS.items() if not target.grows])
def test_a_fault_on_the_way_leaves_nothing_behind_and_names_the_file(copy, tmp_path, name):
    os.truncate(copy / "images" / "000002.png", 900)
    with pytest.raises(ValueError, match=r"images/000002\.png is no picture that can be read"):
        export_folders([copy], name, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy"]


@pytest.mark.parametrize("name", FORMATS)
def test_a_number_that_is_none_is_refused_before_anything_is_written(copy, tmp_path, name):
    text = (copy / "metadata.jsonl").read_text()
    (copy / "metadata.jsonl").write_text(re.sub(r'"transl": \[[^,]+', '"transl": [NaN', text, count=1))
    with pytest.raises(ValueError, match=r"copy/metadata\.jsonl line 1: transl .*expected 3"):
        export_folders([copy], name, tmp_path / "out")
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
        ("--format coco --shard-mb 5 SOURCE OUT", "--shard-mb is for --format webdataset"),
        ("--format webdataset --shard-mb 5 EMPTY OUT", "no record for webdataset"),
        ("--format coco SOURCE OUT --split train=0.8 val=0.1", "shares sum to 1"),
        ("--format coco SOURCE OUT --split train=0.98 val=0.02", "6 records have 6 groups by view, too few for"),
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
        export_folders([export_source], name, tmp_path / "out")
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
    export_folders([two_jars], "csv", tmp_path / "csv")
    with open(tmp_path / "csv" / "test.csv", newline="") as stream:
        assert [(tmp_path / "csv" / row["objpath"]).read_bytes() for row in csv.DictReader(stream)] == meshes
    write_records(two_jars, [records[k % 2] | {"index": k} for k in range(10)])  # NOCS takes whole tens
    export_folders([two_jars], "nocs", tmp_path / "nocs")
    models = {path.read_bytes() for path in (tmp_path / "nocs").rglob("model.obj")}
    assert len(models) == 2
    export_folders([two_jars], "bop", tmp_path / "bop")
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


def test_an_object_of_a_folder_is_read_as_the_ply_that_was_written_and_as_nothing_else(export_source, tmp_path):
    folder = tmp_path / "folder"
    shutil.copytree(export_source, folder)
    record = read_records(folder)[0]
    for name in ("mug.svg", "mug.xaml", "mug.json", "mug.ply.bz2", "mug.zip", "mug", "mug.obj"):
        shutil.copy(folder / record["object_path"], folder / "objects" / name)
        with pytest.raises(ValueError, match=f"{name} .object_path of record 0. is no .ply, as which"):
            load_mesh(folder, record | {"object_path": f"objects/{name}"})
    shutil.copy(folder / record["object_path"], folder / "objects" / "mug.PLY")
    np.testing.assert_array_equal(load_mesh(folder, record | {"object_path": "objects/mug.PLY"})[0],
                                  load_mesh(folder, record)[0])  # fmt: skip


@pytest.fixture
def many_views(export_source, tmp_path):
    """Six objects in six scenes of three looks, told by the pictures of the fixture's first record."""
    folder = shutil.copytree(export_source, tmp_path / "many_views")
    record = read_records(folder)[0]
    for k in range(6):
        (folder / "objects" / f"cup_{k}.ply").write_bytes((folder / record["object_path"]).read_bytes())
    records = [record | {"index": i, "scene": i // 3, "object_path": f"objects/cup_{i // 9}.ply"} for i in range(54)]
    write_records(folder, records)
    return folder


@pytest.mark.parametrize("by, key", [("object", "object_path"), ("view", "scene")])
def test_no_object_or_view_is_on_two_sides_of_a_split_and_shares_are_met(many_views, tmp_path, by, key, capsys):
    words = ["--format", "folder", "--split", "train=0.5", "val=0.17", "test=0.33", "--by", by]
    run([*words, str(many_views), str(tmp_path / "out")])
    sides = {name: read_records(tmp_path / "out" / name) for name in ("train", "val", "test")}
    assert {name: len(records) for name, records in sides.items()} == {"train": 27, "val": 9, "test": 18}
    assert "54 records" in capsys.readouterr().out
    groups = [{record[key] for record in records} for records in sides.values()]
    assert sum(map(len, groups)) == len(set.union(*groups)) == (6 if by == "object" else 18)
    assert check_folder(tmp_path / "out" / "val").ok


def test_records_that_do_not_say_their_scene_are_kept_together_by_their_geometry(many_views):
    records = read_records(many_views)
    moved = [{key: value for key, value in record.items() if key != "scene"} for record in records]
    moved = [record | {"transl": [record["index"] // 3, 0, 0]} for record in moved]
    for part in split_records(moved, {"train": 0.7, "val": 0.3}, "view").values():
        assert len(part) == 3 * len({record["index"] // 3 for record in part})


def test_categories_and_models_have_the_same_numbers_in_every_split(export_source, tmp_path):
    for name in ("coco", "bop"):
        words = ["--format", name, "--split", "a=0.5", "b=0.5", "--by", "object"]
        run([*words, str(export_source), str(tmp_path / name)])
    numbers = [json.loads((tmp_path / "coco" / side / "annotations.json").read_text())["categories"] for side in "ab"]
    assert numbers[0] == numbers[1] and len(numbers[0]) > 3
    infos = [(tmp_path / "bop" / side / "models" / "names.json").read_text() for side in "ab"]
    assert infos[0] == infos[1]


def test_several_folders_are_exported_as_one_and_equal_meshes_are_one(export_source, tmp_path):
    other = shutil.copytree(export_source, tmp_path / "test")  # a name that `datasets` would take for a split
    export_folders([export_source, other], "folder", tmp_path / "both")
    both, records = read_records(tmp_path / "both"), read_records(export_source)
    assert [record["text"] for record in both] == 2 * [record["text"] for record in records]
    assert len({record["object_path"] for record in both}) == len({record["object_path"] for record in records})
    for record, source in zip(both, 2 * records, strict=True):
        np.testing.assert_array_equal(load_image(tmp_path / "both", record), load_image(export_source, source))
    assert not any(re.search(r"(^|/)test/", record["file_name"]) for record in both)
    views = FolderViews(export_source, other)
    assert len(views) == 2 * len(FolderViews(export_source)) - 1  # scenery without conditions is one view
    again = views.numbers[len(records) + 1]
    assert again != 1
    np.testing.assert_array_equal(views[1].conditions.normal, views[again].conditions.normal)
    (other / read_records(other)[0]["file_name"]).unlink()
    (other / read_records(other)[0]["file_name"]).symlink_to(export_source / "dataset.json")
    with pytest.raises(ValueError, match="leads out of the folder"):
        FolderViews(export_source, other)
