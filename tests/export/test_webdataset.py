"""Shards: read back by webdataset and by datasets, of the stated size, continued where they ended."""

import io
import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from hoi.data.folder import load_mesh, load_picture, read_records
from hoi.data.writer import write_records
from hoi.export import webdataset as shards
from hoi.export.__main__ import run
from hoi.export.formats import export_folders

ALL = ["image", "skeleton", "segmentation", "normal", "depth", "object_mask"]


def read_with_webdataset(out):
    """Every sample of the shards, in order, pictures as pixels."""
    import webdataset

    def pixels(data):
        return np.array(Image.open(io.BytesIO(data)))

    urls = [str(path) for path in sorted(out.glob("*.tar"))]
    stream = webdataset.WebDataset(urls, shardshuffle=False).decode(webdataset.handle_extension("png", pixels))
    return list(stream)


def test_webdataset_reads_back_pixels_and_annotation(export_source, tmp_path):
    out = tmp_path / "out"
    written, left_out = export_folders([export_source], "webdataset", out)
    records = [record for record in read_records(export_source) if record["object_mask_file_name"]]
    samples = read_with_webdataset(out)
    assert written.total() == len(samples) == len(records) and left_out.total() == 6 - len(samples)
    for sample, record in zip(samples, records, strict=True):
        assert sample["__key__"] == f"{record['index']:06d}"
        assert sorted(key for key in sample if key[0] != "_") == sorted(["json", *(f"{name}.png" for name in ALL)])
        for name in ALL:
            key = "file_name" if name == "image" else f"{name}_file_name"
            np.testing.assert_array_equal(sample[f"{name}.png"], load_picture(export_source, record, key))
        assert sample["depth.png"].dtype == np.uint16
        assert sample["json"] == {key: value for key, value in record.items() if "file_name" not in key}
        np.testing.assert_array_equal(load_mesh(out, sample["json"])[0], load_mesh(export_source, record)[0])


def test_datasets_reads_them_back(export_source, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # read when the package is imported
    import datasets

    run(["--format", "webdataset", str(export_source), str(tmp_path / "out"), "--fields", "image"])
    files = str(tmp_path / "out" / "*.tar")
    table = datasets.load_dataset("webdataset", data_files=files, cache_dir=str(tmp_path / "cache"))["train"]
    records = read_records(export_source)
    assert len(table) == len(records) == 6  # with --fields image scenery and a hand alone are in
    for row, record in zip(table, records, strict=True):
        np.testing.assert_array_equal(np.array(row["image.png"]), load_picture(export_source, record, "file_name"))
        assert row["json"]["text"] == record["text"] and row["json"]["intrinsics"] == record["intrinsics"]


@pytest.fixture
def many(export_source, tmp_path):
    """A folder of thirty records: three geometries in ten looks."""
    folder = shutil.copytree(export_source, tmp_path / "many")
    whole = [record for record in read_records(folder) if record["object_mask_file_name"]][:3]
    write_records(folder, [whole[k // 10] | {"index": k} for k in range(30)])
    return folder


def content_of(out):
    return {path.relative_to(out).as_posix(): (path.read_bytes(), path.stat().st_mtime_ns)
            for path in out.rglob("*") if path.is_file()}  # fmt: skip


def test_a_shard_has_at_most_the_stated_size_and_the_next_record_would_not_fit(many, tmp_path):
    export_folders([many], "webdataset", tmp_path / "out", {"shard_mb": 1})
    sizes = [path.stat().st_size for path in sorted((tmp_path / "out").glob("*.tar"))]
    a_record = max(sizes) / max(json.loads(line)["records"] for line in open(tmp_path / "out" / "shards.jsonl"))
    assert len(sizes) > 2 and max(sizes) <= 10**6 and min(sizes[:-1]) > 10**6 - 1.2 * a_record
    assert [sample["__key__"] for sample in read_with_webdataset(tmp_path / "out")] == [f"{k:06d}" for k in range(30)]


def test_a_stopped_export_continues_to_the_same_bytes_and_a_finished_one_keeps_every_byte(many, tmp_path, monkeypatch):
    out, whole = tmp_path / "out", tmp_path / "whole"
    words = ["--format", "webdataset", "--shard-mb", "1", str(many)]
    run([*words, str(whole)])
    checked, calls = shards.load_picture, []

    def stopped(*arguments):
        calls.append(arguments)
        if len(calls) > 100:  # in the second shard
            raise KeyboardInterrupt
        return checked(*arguments)

    monkeypatch.setattr(shards, "load_picture", stopped)
    with pytest.raises(SystemExit, match="whole shards stay, the same command continues"):
        run([*words, str(out)])
    assert [path.name for path in out.glob("*.tar")] == ["shard-000000.tar"] and not list(out.glob(".*"))
    monkeypatch.setattr(shards, "load_picture", checked)
    run([*words, str(out)])
    before = content_of(out)
    assert {name: data for name, (data, _) in before.items()} == {n: data for n, (data, _) in content_of(whole).items()}
    run([*words, str(out)])
    assert content_of(out) == before


def test_a_folder_that_has_grown_adds_shards_and_one_that_was_changed_is_refused(many, tmp_path):
    out, records = tmp_path / "out", read_records(many)
    write_records(many, records[:20])
    export_folders([many], "webdataset", out, {"shard_mb": 1})
    before = content_of(out)
    write_records(many, records)
    export_folders([many], "webdataset", out, {"shard_mb": 1})
    kept = {name for name, state in content_of(out).items() if before.get(name) == state}
    assert kept >= {name for name in before if name.endswith((".tar", ".ply"))}
    assert [sample["__key__"] for sample in read_with_webdataset(out)] == [f"{k:06d}" for k in range(30)]
    write_records(many, [records[0] | {"text": "another"}, *records[1:]])
    with pytest.raises(ValueError, match=r"shard-000000\.tar was made of other records"):
        export_folders([many], "webdataset", out, {"shard_mb": 1})


def test_shards_are_not_put_among_other_files_and_a_damaged_picture_is_named(many, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(FileExistsError, match="other holds something else than shards"):
        export_folders([many], "webdataset", tmp_path / "other")
    os.truncate(many / read_records(many)[29]["file_name"], 900)
    with pytest.raises(ValueError, match=r"images/00000\d\.png is no picture that can be read"):
        export_folders([many], "webdataset", tmp_path / "out", {"shard_mb": 1})
    assert {path.suffix for path in (tmp_path / "out").rglob("*") if path.is_file()} <= {".tar", ".ply", ".jsonl"}
