"""Files are whole or absent, and damaged ones are told in a sentence that names them; nothing in them is run."""

import errno
import hashlib
import io
import os
import pickle
import platform
import random
import shutil
import struct
import subprocess
import tracemalloc
import zipfile
import zlib
from collections import namedtuple
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.lib import format as npy
from PIL import ExifTags, Image

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


def a_process_that_ended() -> int:
    child = subprocess.Popen(["true"])
    child.wait()
    return child.pid


@pytest.mark.parametrize("content", [b"whole", lambda stream: stream.write(b"whole")])
def test_what_killed_writers_left_is_removed_by_the_next_and_that_of_others_stays(tmp_path, content):
    ended, here = a_process_that_ended(), platform.node()
    left = [f".file.{ended}@{here}.tmp", f".file.{os.getpid()}@{here}.tmp"]
    stays = [f".file.{os.getppid()}@{here}.tmp", f".file.{ended}@elsewhere.tmp"]
    stays += [f".file.png.{ended}@{here}.tmp", f".other.{ended}@{here}.tmp", ".file.tmp", ".file"]  # not of this file
    for name in (*left, *stays):
        (tmp_path / name).write_bytes(b"half")
    files.write_whole(tmp_path / "file", content)
    assert sorted(os.listdir(tmp_path)) == sorted(["file", *stays]) and (tmp_path / "file").read_bytes() == b"whole"


def test_what_killed_exports_left_is_removed_by_the_next_of_the_same_name(tmp_path):
    ended, here = a_process_that_ended(), platform.node()
    stays = [f".out.{os.getppid()}@{here}.tmp", f".out.{ended}@elsewhere.tmp", f".out2.{ended}@{here}.tmp"]
    for name in (f".out.{ended}@{here}.tmp", *stays):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").write_bytes(b"")
    with files.new_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("b")
    assert sorted(os.listdir(tmp_path)) == sorted(["out", *stays])


def calls_of_the_disk(monkeypatch) -> list[tuple[str, str]]:
    """What is synced and renamed from now on, in order, by the names of the files."""
    calls, names = [], {}

    def note(kind, call, name_of):
        def noted(first, *rest, **more):
            result = call(first, *rest, **more)
            if kind == "open":
                names[result] = Path(os.fsdecode(first)).name
            else:
                calls.append((kind, name_of(first, *rest)))
            return result

        return noted

    monkeypatch.setattr(os, "open", note("open", os.open, None))
    monkeypatch.setattr(os, "fsync", note("sync", os.fsync, lambda descriptor: names[descriptor]))
    monkeypatch.setattr(os, "replace", note("rename", os.replace, lambda source, target: Path(target).name))
    monkeypatch.setattr(os, "rename", note("rename", os.rename, lambda source, target: Path(target).name))
    return calls


def test_a_file_and_a_folder_are_on_the_disk_before_their_name_says_so(tmp_path, monkeypatch):
    home = tmp_path.name
    calls = calls_of_the_disk(monkeypatch)
    files.write_whole(tmp_path / "file", lambda stream: stream.write(b"whole"))
    own = f".file.{os.getpid()}@{platform.node()}.tmp"
    assert calls == [("sync", own), ("rename", "file"), ("sync", home)]
    calls.clear()
    files.write_whole(tmp_path / "small", b"small")
    assert [kind for kind, _ in calls] == ["sync", "rename", "sync"]
    calls.clear()
    with files.new_folder(tmp_path / "out") as folder:
        for name in ("a", "b"):
            (folder / name).write_text(name)
    assert set(calls[:3]) == {("sync", "a"), ("sync", "b"), ("sync", folder.name)}
    assert calls[3:] == [("rename", "out"), ("sync", home)]


def test_sha256_is_that_of_the_content_also_after_the_file_changed(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1
    assert files.sha256_of(path) == abc
    path.write_bytes(b"abd")
    os.utime(path, ns=(0, 0))  # another time, the same size
    assert files.sha256_of(path) == hashlib.sha256(b"abd").hexdigest()


# --- pictures ---


def save_turned(path, pixels, orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    Image.fromarray(pixels).save(path, exif=exif, quality=95)


@pytest.mark.parametrize("orientation", range(10))  # 0 and 9 mean nothing
def test_photographs_are_turned_as_opencv_the_authors_reader_turns_them(tmp_path, orientation):
    columns, rows = np.meshgrid(np.arange(48), np.arange(32))
    pixels = np.stack([5 * columns, 7 * rows, 100 + columns], axis=-1).astype(np.uint8)
    save_turned(tmp_path / "photo.jpg", pixels, orientation)
    read = files.read_picture(tmp_path / "photo.jpg", "RGB")
    theirs = cv2.imread(str(tmp_path / "photo.jpg"))[..., ::-1]
    assert read.shape == theirs.shape and np.abs(read.astype(int) - theirs).max() <= 3  # two JPEG decoders
    assert (read.shape == (48, 32, 3)) == (5 <= orientation <= 8)


def png_bomb(width, height):
    """A kilobyte that unpacks to one black picture of any size."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(bytes(1000))),
              (b"IEND", b"")]  # fmt: skip
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def test_what_is_no_picture_of_a_usual_size_is_told_by_name(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(np.full((4, 4), 1000, dtype=np.uint16)).save(path)
    assert files.read_picture(path).dtype == np.uint16
    whole = path.read_bytes()
    for content, mode, reason in (
        (whole, "RGB", "it has I;16 pixels: a depth map or the like"), (whole[:50], None, "truncated"),
        (png_bomb(8000, 8000), None, "it has 8000 x 8000 pixels, more than 40 million: make it smaller"),
        (png_bomb(30000, 30000), None, "exceeds limit"), (b"%!PS-Adobe-3.0 EPSF-3.0\n", None, "cannot identify"),
    ):  # fmt: skip
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"a.png is no picture that can be read: .*{reason}"):
            files.read_picture(path, mode)
    with pytest.raises(ValueError, match="b.png is no picture that can be read: .*No such file"):
        files.read_picture(tmp_path / "b.png")


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


@pytest.mark.parametrize("deep", ["[" * 100_000, "[" * 500 + "]" * 500, '{"a":' * 200 + "1" + "}" * 200])
def test_json_in_json_in_json_is_told_wherever_it_stands(tmp_path, deep):
    (tmp_path / "a.json").write_text(deep)
    with pytest.raises(ValueError, match="a.json is not JSON .*(nested too deeply|Expecting value)"):
        files.read_json(tmp_path / "a.json", "thing")
    (tmp_path / "a.jsonl").write_text(f'{{"a": 1}}\n{deep}\n')
    with pytest.raises(ValueError, match="a.jsonl line 2 is not JSON"):
        list(files.read_json_lines(tmp_path / "a.jsonl"))
    (tmp_path / "a.json").write_text("[" * 90 + "]" * 90 + " " * 1000)
    files.read_json(tmp_path / "a.json", "thing", kind=list)


def test_lines_without_what_is_read_of_them_are_told(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"step": 1}\n{"step": "2"}\n')
    with pytest.raises(ValueError, match="a.jsonl line 2 .*lacks step.*delete the line"):
        list(files.JsonLines(tmp_path / "a.jsonl", step=int))


def test_a_csv_that_is_none_is_told_by_its_line(tmp_path):
    (tmp_path / "a.csv").write_text('a,b\n1,"' + "x" * 200_000)
    with pytest.raises(ValueError, match="a.csv line 2 is not CSV .*is a quote missing"):
        list(files.read_csv(tmp_path / "a.csv"))
    (tmp_path / "a.csv").write_bytes(b"a,b\n\xff,1\n")
    with pytest.raises(ValueError, match="a.csv is not UTF-8 text"):
        list(files.read_csv(tmp_path / "a.csv"))


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
            files.read_npz(path, "set of points", words=["b"])
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


def header_that_asks_for(shape):
    stream = io.BytesIO()
    npy.write_array_header_1_0(stream, {"descr": "<f8", "fortran_order": False, "shape": shape})
    return stream.getvalue() + bytes(80)


def test_arrays_that_ask_for_more_than_is_there_are_refused_before_memory_is_taken(tmp_path):
    path, big = tmp_path / "a.npz", tmp_path / "b.npy"
    big.write_bytes(header_that_asks_for((1000, 5_000_000)))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("asks.npy", big.read_bytes())
        archive.writestr("zeros.npy", bytes(files.MOST_UNPACKED + 1))
    with zipfile.ZipFile(tmp_path / "c.npz", "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("a.npy", big.read_bytes())
    tracemalloc.start()
    for read, reason in (
        (lambda: files.read_npz(path, "thing", ["asks"]), "its header asks for 40000000000 bytes, and there are 80"),
        (lambda: files.read_npz(path, "thing", ["zeros"]), "its .* bytes unpack to 134217729"),
        (lambda: files.read_npz(tmp_path / "c.npz", "thing"), "another method than zip's own"),
        (lambda: files.read_npy(big, "thing"), "its header asks for 40000000000 bytes, and there are 80"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"{reason}.*, so it is no thing"):
            read()
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()
    np.save(big, np.arange(6.0).reshape(2, 3))
    np.testing.assert_array_equal(files.read_npy(big, "thing"), np.arange(6.0).reshape(2, 3))
    np.save(big, np.array(["text"]))
    with pytest.raises(ValueError, match="b.npy is not a readable .npy of numbers .*it holds <U4 values"):
        files.read_npy(big, "thing")


@pytest.mark.parametrize("content, reason", [
    (b"Nr\xff\xff\xff\x7f.", None),  # C's unpickler takes 32 GB for this memo
    (b"\x96" + (1 << 40).to_bytes(8, "little") + b".", "150"),
    (b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(VS2000000000\ntRtR.", "a number without a value"),
    (b"cnumpy\nndarray\n(I10000000000\ntR.", "not callable"),
    (b"}(" + b")" + b"\x85" * 1_000_000 + b"Nu.", "more than 10000 tuples"),  # ends the process where it is hashed
])  # fmt: skip
def test_a_pickle_of_a_few_bytes_cannot_ask_for_gigabytes(tmp_path, content, reason):
    path = tmp_path / "a.pkl"
    path.write_bytes(content)
    tracemalloc.start()
    if reason is None:
        assert files.restricted_load(path, {}, "a thing") is None
    else:
        with pytest.raises(ValueError, match=f"a.pkl cannot be read as a thing: .*{reason}"):
            files.restricted_load(path, files.array_globals(), "a thing")
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()


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
