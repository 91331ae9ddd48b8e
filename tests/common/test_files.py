"""Files are whole or absent, and damaged ones are told in a sentence that names them; nothing in them is run."""

import errno
import hashlib
import io
import os
import pickle
import random
import shutil
from collections import namedtuple

import numpy as np
import pytest

from hoi.common import files
from hoi.geometry.mano import read_mano
from hoi.metrics.distances import load_statistics


@pytest.mark.parametrize("small", [True, False])
def test_an_error_in_the_middle_of_a_write_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch, small):
    path = tmp_path / "folder" / "file"
    files.write_whole(path, b"old")

    def full(source, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="the disk is full; what was finished is safe"):
        files.write_whole(path, b"new" if small else lambda stream: stream.write(b"new"))
    assert path.read_bytes() == b"old" and os.listdir(path.parent) == ["file"]


def test_a_full_disk_is_told_also_where_a_library_does_not_say_why_it_could_not_write(tmp_path, monkeypatch):
    def fail(stream):
        raise RuntimeError("unexpected pos 704 vs 598")  # as torch.save says it

    with pytest.raises(RuntimeError, match="unexpected pos"):
        files.write_whole(tmp_path / "file", fail)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("usage", "free")(4096))
    with pytest.raises(OSError, match="the disk is full"):
        files.write_whole(tmp_path / "file", fail)
    assert not list(tmp_path.iterdir())


def test_what_a_killed_writer_left_of_a_big_file_is_replaced_and_other_writers_of_a_small_one_are_left_alone(tmp_path):
    for name in (".file.tmp", ".file.1.tmp"):
        (tmp_path / name).write_bytes(b"half")
    files.write_whole(tmp_path / "file", lambda stream: stream.write(b"whole"))
    assert sorted(os.listdir(tmp_path)) == [".file.1.tmp", "file"]
    files.write_whole(tmp_path / "file", b"small")
    assert sorted(os.listdir(tmp_path)) == [".file.1.tmp", "file"] and (tmp_path / "file").read_bytes() == b"small"


def test_sha256_is_that_of_the_content_also_after_the_file_changed(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1
    assert files.sha256_of(path) == abc
    path.write_bytes(b"abd")
    os.utime(path, ns=(0, 0))  # another time, the same size
    assert files.sha256_of(path) == hashlib.sha256(b"abd").hexdigest()


# --- JSON ---


def test_json_that_cannot_be_used_is_told_with_what_to_do(tmp_path):
    faults = {"": "the settings .*a.json is missing", "{": "a.json is not JSON", "[1]": "a.json holds a list"}
    for content, message in faults.items():
        if content:
            (tmp_path / "a.json").write_text(content)
        with pytest.raises((FileNotFoundError, ValueError), match=f"{message}.*; make them"):
            files.read_json(tmp_path / "a.json", "settings", "; make them")
    assert files.read_json(tmp_path / "a.json", "list", kind=object) == [1]


def test_a_line_that_was_cut_is_absent_for_readers_and_removed_for_the_next_line(tmp_path):
    lines = files.JsonLines(tmp_path / "log.jsonl")
    assert list(lines) == [] and not lines.path.exists()
    lines.append({"a": 1})
    with open(lines.path, "a") as stream:
        stream.write('{"a": 2')
    assert list(lines) == [{"a": 1}] and lines.path.read_text().endswith('{"a": 2')
    again = files.JsonLines(lines.path)
    again.append({"a": 3})
    assert lines.path.read_text() == '{"a": 1}\n{"a": 3}\n'
    with pytest.raises(ValueError, match="not JSON compliant"):
        again.append({"a": float("nan")}, allow_nan=False)
    with open(lines.path, "a") as stream:
        stream.write("oops\n")
    with pytest.raises(ValueError, match="log.jsonl line 3 is not JSON"):
        list(again)


# --- arrays and pickles ---


@pytest.mark.parametrize("read", [load_statistics, read_mano])
def test_an_empty_file_is_told_by_every_reader_of_npz(tmp_path, read):
    (tmp_path / "empty.npz").write_bytes(b"")
    with pytest.raises(ValueError, match="empty.npz is not a readable .npz of arrays"):
        read(tmp_path / "empty.npz")


def damaged(content: bytes, generator: random.Random) -> bytes:
    if generator.random() < 0.3:
        return content[: generator.randrange(len(content))]
    changed = bytearray(content)
    for _ in range(generator.choice([1, 3])):
        changed[generator.randrange(len(changed))] = generator.randrange(256)
    return bytes(changed)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_whatever_is_damaged_in_an_npz_is_told_in_one_sentence(tmp_path, save):
    generator, stream, told = random.Random(0), io.BytesIO(), 0
    save(stream, a=np.arange(30.0), b=np.array("note"), c=np.zeros((3, 4), dtype=bool))
    path = tmp_path / "file.npz"
    for _ in range(200):
        path.write_bytes(damaged(stream.getvalue(), generator))
        try:
            files.read_npz(path, "set of points")
        except ValueError as error:
            told += str(error).startswith(f"{path} is not a readable .npz of arrays (")
    assert told > 100


def test_an_npz_gives_the_names_that_were_asked_for_and_refuses_objects_and_other_files(tmp_path):
    path = tmp_path / "file.npz"
    np.savez(path, a=np.arange(3), b=np.array([{}], dtype=object))
    assert list(files.read_npz(path, "thing", ["a", "absent"])) == ["a"]
    with pytest.raises(ValueError, match="so it is no thing"):
        files.read_npz(path, "thing")
    with open(path, "wb") as stream:
        np.save(stream, np.arange(3))
    with pytest.raises(ValueError, match="so it is no thing"):
        files.read_npz(path, "thing")


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_arrays_come_out_of_a_pickle_and_nothing_else_does(tmp_path, protocol):
    path = tmp_path / "file.pkl"
    content = {"array": np.arange(6.0).reshape(2, 3), "number": np.float64(3), "text": "x"}
    path.write_bytes(pickle.dumps(content, protocol))
    found = files.restricted_load(path, files.array_globals(), "an annotation")
    np.testing.assert_equal(found, content)
    for bad in (pickle.dumps(random.Random, protocol), b"", pickle.dumps(content, protocol)[:-5]):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match="file.pkl cannot be read as an annotation: .*Nothing in it was run"):
            files.restricted_load(path, files.array_globals(), "an annotation")
