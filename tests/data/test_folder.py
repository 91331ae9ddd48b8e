"""The dataset folder: what is written comes back, is complete or absent, and agrees with a render of its annotation."""

import errno
import json
import os
import re
import shutil

import numpy as np
import pytest
import trimesh
from PIL import Image

from hoi.common import files
from hoi.conditions import SEGMENTATION_COLORS, Conditions
from hoi.data import folder as dataset
from hoi.data import writer as writer_module
from hoi.data.check import check_folder
from hoi.data.folder import (
    PICTURE_FOLDERS,
    RECORD_KEYS,
    FolderFiles,
    file_of,
    load_conditions,
    load_depth,
    load_image,
    load_mesh,
    load_object_mask,
    read_records,
)
from hoi.data.views import FolderViews
from hoi.data.writer import DatasetWriter, refuse_other_job, write_object, write_pictures, write_records
from hoi.export.folder import copy_picture
from hoi.export.official_csv import write_tables
from hoi.geometry.grasp import Grasp
from hoi.geometry.hand import HandParams
from hoi.geometry.objects import make_object
from hoi.geometry.scene import GraspedObject, ViewSettings, annotate, compose_scene, pictures_of
from hoi.verify.report import copy_records, parse_keep
from hoi.verify.scores import SCORES

SIZE = 96


@pytest.fixture(scope="module")
def rendered(tmp_path_factory, hand, renderer):
    """A folder of four rendered records: a right hand, a left hand, an object alone, a hand alone."""
    folder = tmp_path_factory.mktemp("rendered")
    mug = make_object("mug", 3)
    hand_betas = np.array([0.5] + [0.0] * 9)
    pose = HandParams(np.array([0.2, 0.4, -0.3]), np.full(45, 0.12), np.array([0.12, 0.03, 0.05]), hand_betas)
    grasp = Grasp(pose, 0.5, 0, (True, True, True, False, False), True, 1.0)
    objects = [GraspedObject(mug, (grasp,), (grasp,))]
    writer = DatasetWriter(folder, {"seed": 0})
    for index, (content, side) in enumerate(
        [("hand_object", "right"), ("hand_object", "left"), ("object", "right"), ("hand", "right")]
    ):
        generator = np.random.default_rng([7, index])
        framing = "tight" if index == 1 else "official"
        settings = ViewSettings(SIZE, SIZE, side, framing)
        scene = compose_scene(objects, hand, renderer, generator, settings, content)
        record = annotate(scene, 0, hand) | {"text": content}
        if content != "hand":
            record["object_path"] = write_object(folder, mug)
        write(writer, index, record, **pictures_of(scene, 0, record, hand, renderer))
    writer.finish()
    return folder


@pytest.fixture
def copy(rendered, tmp_path):
    return shutil.copytree(rendered, tmp_path / "copy")


def pictures(value: int = 10) -> dict:
    """Every picture of a record, 8 rows by 12 columns."""
    image = np.full((8, 12, 3), value, dtype=np.uint8)
    depth = np.linspace(0, 1.2345, 96, dtype=np.float32).reshape(8, 12)
    conditions = Conditions(image + 1, image + 2, image + 3)
    return {"image": image, "conditions": conditions, "depth": depth, "object_mask": depth > 0.5}


def write(writer: DatasetWriter, index: int, record: dict, **pictures) -> dict:
    """Write one record whole, as the scripts do."""
    full = write_pictures(writer.folder, index, record, **pictures)
    writer.append(full)
    writer.flush()
    return full


def edit(folder, index: int, **changes) -> None:
    records = read_records(folder)
    records[index] |= changes
    write_records(folder, records)


def files_of(folder) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_every_picture_comes_back_as_it_was_written(tmp_path):
    writer, given = DatasetWriter(tmp_path, {}), pictures()
    record = write(writer, 5, {"text": "a can"}, **given)
    assert [record] == read_records(tmp_path)
    np.testing.assert_array_equal(load_image(tmp_path, record), given["image"])
    for name in ("skeleton", "normal", "segmentation"):
        loaded = getattr(load_conditions(tmp_path, record), name)
        np.testing.assert_array_equal(loaded, getattr(given["conditions"], name))
    assert np.abs(load_depth(tmp_path, record) - given["depth"]).max() <= 0.000501  # half a millimetre
    np.testing.assert_array_equal(load_object_mask(tmp_path, record), given["object_mask"])
    assert (record["height"], record["width"], record["file_name"]) == (8, 12, "images/000005.png")


def test_file_name_is_the_first_key_and_unknown_values_are_null(tmp_path):
    write(DatasetWriter(tmp_path, {}), 0, {"text": "x", "extra": 1}, conditions=pictures()["conditions"])
    line = (tmp_path / "metadata.jsonl").read_text()
    assert line.startswith('{"file_name": null, ') and line.endswith("}\n")
    record = json.loads(line)
    assert record["category"] is None and record["keypoints_3d"] is None and record["extra"] == 1
    assert set(RECORD_KEYS) <= set(record)


def test_records_of_scenery_have_no_conditions(tmp_path):
    record = write(DatasetWriter(tmp_path, {}), 0, {"text": "a beach"}, image=pictures()["image"])
    assert load_conditions(tmp_path, record) is None


def test_looks_of_one_view_share_its_condition_files(tmp_path):
    writer = DatasetWriter(tmp_path, {})
    first = write(writer, 0, {"text": "red"}, **pictures(10))
    shared = {key: first[key] for key in PICTURE_FOLDERS if key != "file_name"}
    second = write(writer, 1, {"text": "blue"} | shared, image=pictures(99)["image"])
    assert second["file_name"] == "images/000001.png" and not (tmp_path / "skeleton/000001.png").exists()
    np.testing.assert_array_equal(load_conditions(tmp_path, second).normal, pictures(10)["conditions"].normal)


def test_text_chunks_are_in_the_picture(tmp_path):
    made = {"text": "A hand is grasping a 茶碗", "checkpoint": {"name": "tiny", "sha256": "ab" * 32}, "seed": 3}
    writer = DatasetWriter(tmp_path, {})
    generated, drawn = write(writer, 0, made, **pictures()), write(writer, 1, {"text": "x"}, **pictures())
    with Image.open(tmp_path / generated["file_name"]) as image:
        assert json.loads(image.text["hoi"])["text"] == "A hand is grasping a 茶碗"
        assert json.loads(image.text["hoi"]) == generated
    with Image.open(tmp_path / drawn["file_name"]) as image:
        assert image.text == {}


@pytest.mark.parametrize("whole", [True, False], ids=["no newline yet", "half a line"])
def test_a_line_cut_short_is_an_absent_record_and_the_next_is_written_whole(tmp_path, whole):
    writer = DatasetWriter(tmp_path, {"job": {"a": 1}})
    for index in range(3):
        write(writer, index, {"text": "x"}, **pictures())
    path = tmp_path / "metadata.jsonl"
    content = path.read_bytes()
    path.write_bytes(content[:-1] if whole else content[:-100])
    assert [record["index"] for record in read_records(tmp_path)] == [0, 1]
    again = DatasetWriter(tmp_path, {"job": {"a": 1}})
    assert [again.done(index) for index in range(3)] == [True, True, False]
    write(again, 2, {"text": "x"}, **pictures())
    assert path.read_bytes() == content


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    writer = DatasetWriter(tmp_path, {})
    write(writer, 0, {}, **pictures())
    with open(tmp_path / "metadata.jsonl", "a") as stream:
        stream.write("{broken\n")
    with pytest.raises(ValueError, match=r"metadata.jsonl line 2 is not JSON"):
        read_records(tmp_path)


WRONG = {
    "nan": ("penetration_mm", float("nan"), "penetration_mm is nan, expected finite numbers"),
    "infinite": ("keypoints_2d", [float("inf")] * 42, "keypoints_2d has 42 numbers, expected 42, all finite"),
    "too few": ("hand_pose", [0.0] * 44, "hand_pose has 44 numbers, expected 45"),
    "words among numbers": ("transl", ["a", 0, 0], r"transl is \['a', 0, 0\], expected 3, all finite"),
    "no list": ("intrinsics", 3, "intrinsics is 3, expected 9"),
    "true among numbers": ("transl", [True, 0, 0], r"transl is \[True, 0, 0\], expected 3, all finite"),
    "hundreds of digits": ("transl", [10**400, 0, 0], "transl is .*, expected 3"),
    "number for text": ("text", 5, "text is 5, expected text"),
    "text for number": ("height", "8", "height is '8', expected a whole number"),
    "true for number": ("index", True, "index is True, expected a whole number"),
    "number for true": ("contact", 1, "contact is 1, expected true or false"),
    "list for object": ("checkpoint", [1], r"checkpoint is \[1\], expected an object"),
    "nan deep inside": ("anything", {"a": [1, {"b": float("nan")}]}, "anything is .*, expected finite numbers"),
    "absolute": ("object_path", "/etc/hostname", "object_path is '/etc/hostname', expected a path inside the folder"),
    "upwards": ("file_name", "images/../../secret.png", "file_name is .*, expected a path inside the folder"),
    "list for path": ("normal_file_name", ["a"], r"normal_file_name is \['a'\], expected text"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_record_is_told_by_folder_line_and_key_wherever_it_is_read(tmp_path, name):
    key, value, message = WRONG[name]
    writer = DatasetWriter(tmp_path, {"job": {}})
    for index in range(2):
        write(writer, index, {"text": "x"}, **pictures())
    writer.finish()
    lines = (tmp_path / "metadata.jsonl").read_text().splitlines()
    (tmp_path / "metadata.jsonl").write_text(f"{lines[0]}\n{json.dumps(json.loads(lines[1]) | {key: value})}\n")
    with pytest.raises(ValueError, match=f"{tmp_path}/metadata.jsonl line 2: {message}"):
        read_records(tmp_path)
    assert re.search(f"line 2: {message}", check_folder(tmp_path).problems[0])


@pytest.mark.parametrize("key", ["object_path", "normal_file_name"])
def test_a_link_out_of_the_folder_is_refused_by_every_reader_and_one_inside_is_not(rendered, tmp_path, key):
    folder = shutil.copytree(rendered, tmp_path / "in")
    record = read_records(folder)[0]
    path, private = folder / record[key], tmp_path / "private"
    path.rename(folder / "moved")
    path.symlink_to(folder / "moved")
    assert file_of(folder, record, key).read_bytes() == (rendered / record[key]).read_bytes()
    (folder / "moved").rename(private)
    path.unlink()
    path.symlink_to(private)
    (tmp_path / "out").mkdir()
    scored = [record | {"verification": dict.fromkeys(SCORES) | {"pck": 1.0}}]
    pictured = record | {"file_name": record["skeleton_file_name"]}
    readers = [lambda: FolderViews(folder)[0], lambda: copy_records(folder, tmp_path / "kept", scored, keep)]
    keep = parse_keep("pck>0.5")
    if key == "object_path":
        readers += [lambda: load_mesh(folder, record), lambda: write_tables(folder, [pictured], tmp_path / "out")]
    else:
        readers += [lambda: load_conditions(folder, record), lambda: copy_picture(folder, record, key, tmp_path / "a")]
    for read in readers:
        with pytest.raises(ValueError, match=f"record 0 of {folder}: {key} .* leads out of the folder to {private}"):
            read()
    written = [path for name in ("out", "kept", "a") for path in (tmp_path / name).rglob("*") if path.is_file()]
    assert private.read_bytes() not in [path.read_bytes() for path in written]


def test_a_record_that_lost_a_file_is_made_again(tmp_path):
    writer = DatasetWriter(tmp_path, {})
    for index in range(2):
        write(writer, index, {}, **pictures())
    (tmp_path / "normal/000000.png").unlink()
    again = DatasetWriter(tmp_path, {})
    assert not again.done(0) and again.done(1)
    write(again, 0, {"text": "new"}, **pictures())
    again.finish(grid=False)
    assert [record["text"] for record in read_records(tmp_path)] == ["new", None]


def test_ranks_merge_to_what_one_process_writes(tmp_path):
    alone = DatasetWriter(tmp_path / "one", {})
    ranks = [DatasetWriter(tmp_path / "two", {}, rank, 2) for rank in range(2)]
    for index in range(5):
        write(alone, index, {"text": str(index)}, **pictures(index))
    for index in (4, 1, 3, 0, 2):
        write(ranks[index % 2], index, {"text": str(index)}, **pictures(index))
    assert [record["index"] for record in read_records(tmp_path / "two")] == [0, 1, 2, 3, 4]  # before merging too
    alone.finish()
    ranks[1].finish()
    ranks[0].finish()
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    for name in files_of(tmp_path / "one"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


ODD = ['"', '\\"', '", "intrinsics": [1, 2]', '"intrinsics": [', "]}", "\\"]


@pytest.mark.parametrize("keys", [("index", "text", "object_path"), ("index", "source"), ("index", "transl")])
def test_a_line_read_for_some_keys_says_what_the_whole_line_says(tmp_path, rendered, keys):
    record = read_records(rendered)[0]
    whole = [record | {"index": k, "text": odd, "source": odd, "look": {"intrinsics": [1], odd: [[2]]}}
             for k, odd in enumerate(ODD)]  # fmt: skip
    whole += [dict(sorted(record.items())) | {"index": len(ODD)}, dict(reversed(record.items())) | {"index": 7}]
    write_records(tmp_path, whole)
    wanted = [{key: old[key] for key in keys} for old in whole]
    assert read_records(tmp_path, keys) == wanted


def test_files_are_missing_by_their_exact_names(tmp_path):
    names = ["000001.png", "0000002.png", "3.png", "000004.PNG", "1000005.png", "10000006.png", "²00007.png"]
    (tmp_path / "a").mkdir()
    for name in names:
        (tmp_path / "a" / name).touch()
    asked = [*names, "1.png", "0000001.png", "000002.png", "000003.png", "000004.png", "000005.png", "999999.png"]
    asked = {name: f"a/{name}" for name in asked} | {"elsewhere": "b/000001.png"}
    missing = FolderFiles(tmp_path).missing(asked, asked)
    assert missing == [path for name, path in asked.items() if name not in names]


def card_of(folder) -> dict:
    return {key: value for key, value in json.loads((folder / "dataset.json").read_text()).items() if key != "command"}


def test_a_folder_that_grew_in_disorder_ends_as_one_that_was_made_at_once(tmp_path):
    def made(folder, *runs):
        for run in runs:
            writer = DatasetWriter(folder, {})
            for index in run:
                weights = {"name": f"{index % 2}.safetensors", "sha256": "ab" * 32}
                more = {"text": str(index), "category": "mugs"[index % 3 :], "source": "x", "checkpoint": weights}
                if not writer.done(index):
                    write(writer, index, more, **pictures(index))
            writer.finish()
        return {name: (folder / name).read_bytes() for name in files_of(folder) - {"dataset.json"}}

    once = made(tmp_path / "once", range(12))
    for name, runs in {"grown": [range(5), range(12)], "mixed": [[5, 0, 3], [11, 9, *range(12)], []]}.items():
        assert made(tmp_path / name, *runs) == once
        assert card_of(tmp_path / name) == card_of(tmp_path / "once")
    (tmp_path / "grown/normal/000002.png").unlink()
    assert made(tmp_path / "grown", [0], [2]) == once  # its line is there twice in between
    assert card_of(tmp_path / "grown") == card_of(tmp_path / "once")


def test_a_finished_folder_is_read_at_its_end_only_when_its_lines_are_newer_than_its_counts(tmp_path, monkeypatch):
    writer = DatasetWriter(tmp_path, {})
    for index in range(3):
        write(writer, index, {"category": "mug"}, **pictures())
    writer.finish()
    with monkeypatch.context() as patch:
        again = DatasetWriter(tmp_path, {})
        patch.setattr(dataset, "each_record", None)
        again.finish()
    path = tmp_path / "metadata.jsonl"
    path.write_text(path.read_text().replace('"mug"', '"cup"'))
    DatasetWriter(tmp_path, {}).finish()
    assert card_of(tmp_path)["sources"]["categories"] == {"cup": 3}


@pytest.mark.parametrize("when", ["before", "after"])
def test_ranks_that_open_one_fresh_folder_at_once_are_both_taken(tmp_path, monkeypatch, when):
    """Rank 0 writes dataset.json just while rank 1 looks whether the folder is one of ours."""
    description, read, opened = {"job": {"a": 1}}, dataset.read_description, []

    def read_while_rank_0_opens(path):
        def rank_0_opens():
            if not opened:
                opened.append(True)
                DatasetWriter(tmp_path, description, 0, 2)

        before = rank_0_opens() if when == "before" else None
        there = read(path)
        return there if before or when == "before" else (rank_0_opens(), there)[1]

    with monkeypatch.context() as patch:
        patch.setattr(dataset, "read_description", read_while_rank_0_opens)
        DatasetWriter(tmp_path, description, 1, 2)
    assert opened


def test_another_job_in_the_same_folder_is_refused(tmp_path):
    DatasetWriter(tmp_path, {"job": {"seed": 1, "size": [2, 3]}})
    DatasetWriter(tmp_path, {"job": {"seed": 1, "size": (2, 3)}})
    with pytest.raises(ValueError, match="another job .*seed: 1 there, 2 now"):
        DatasetWriter(tmp_path, {"job": {"seed": 2, "size": (2, 3)}})
    refuse_other_job(tmp_path, {"job": {"seed": 2, "size": (2, 3)}}, ignoring=("seed",))


def test_the_refusal_is_short_and_says_how_to_go_on(tmp_path):
    made = {"made_by": "sample.py", "command": "python sample.py --count 8"}
    DatasetWriter(tmp_path, made | {"job": {name: "x" * 500 for name in "abcdef"}})
    with pytest.raises(ValueError) as refusal:
        DatasetWriter(tmp_path, made | {"job": {}})
    said = str(refusal.value)
    assert "a: 'xxx" in said and "d: 'xxx" in said and "e: " not in said and "and 2 more" in said and len(said) < 600
    assert said.endswith(
        "choose another folder with --out, or continue it with its own command (a larger --count adds more): python "
        "sample.py --count 8"
    )
    with pytest.raises(
        ValueError, match="sample.py made it, this is make_dataset.py.*python sample.py --count 8"
    ) as refusal:
        DatasetWriter(tmp_path, {"made_by": "make_dataset.py", "job": {"seed": 0}})
    assert "xxx" not in str(refusal.value)


def test_the_refusal_tells_words_where_hashes_differ(tmp_path):
    there = {"prompts": "0123456789abcdef", "objects": ["mug 0a1b2c3d", "can 00aa11bb"], "seed": 12345678}
    now = {"prompts": "f123456789abcdef", "objects": ["mug 0a1b2c3d", "bowl 00aa11bb"], "seed": 87654321}
    DatasetWriter(tmp_path, {"job": there})
    with pytest.raises(ValueError) as refusal:
        DatasetWriter(tmp_path, {"job": now})
    said = str(refusal.value)
    assert "objects: ['mug', 'can'] there, ['mug', 'bowl'] now; prompts: other content" in said
    assert "seed: 12345678 there, 87654321 now" in said and "0a1b2c3d" not in said and "abcdef" not in said


@pytest.mark.parametrize("name", ["images/000000.png", "objects/can_0000.ply", "grid.png", "clip.mp4", "dataset.json"])
def test_a_folder_of_other_origin_is_refused_and_keeps_its_files(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text('{"mine": 1}')
    with pytest.raises(ValueError, match=f"{tmp_path} is no dataset folder but has {name}.*another folder with --out"):
        DatasetWriter(tmp_path, {"job": {"seed": 1}})
    assert files_of(tmp_path) == {name} and (tmp_path / name).read_text() == '{"mine": 1}'


def test_a_folder_with_files_that_no_script_writes_is_taken(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "log.txt").write_text("2026-01-01 started")
    write(DatasetWriter(tmp_path, {}), 0, {}, **pictures())
    (tmp_path / "dataset.json").unlink()  # what the message about a damaged one says to do
    assert DatasetWriter(tmp_path, {}).done(0)


@pytest.mark.parametrize(("content", "message"), [('{"job": {"se', "is not JSON"), ("[1]", "holds a list, expected")])
def test_a_damaged_description_is_named(tmp_path, content, message):
    DatasetWriter(tmp_path, {"job": {"seed": 1}})
    (tmp_path / "dataset.json").write_text(content)
    with pytest.raises(ValueError, match=rf"{re.escape(str(tmp_path))}/dataset.json {message}.*delete it"):
        DatasetWriter(tmp_path, {"job": {"seed": 1}})


@pytest.mark.parametrize(
    "change, message",
    [
        ({"image": np.zeros((8, 12), np.uint8)}, r"images is \(8, 12\) uint8, expected \(H, W, 3\) uint8"),
        ({"image": np.zeros((9, 12, 3), np.uint8)}, r"differ in size .*\(8, 12\), \(9, 12\)"),
        ({"depth": np.full((8, 12), 70.0)}, "16-bit mm"),
        ({"depth": np.full((8, 12), np.nan)}, "finite metres"),
        ({"object_mask": np.zeros((8, 12), np.uint8)}, r"object_mask is \(8, 12\) uint8, expected \(H, W\) bool"),
        ({"record": {"keypoints_2d": np.zeros((20, 2))}}, "record 3: keypoints_2d has 40 numbers, expected 42"),
        ({"record": {"transl": [0, 0, np.inf]}}, "transl has 3 numbers, expected 3, all finite"),
    ],
)
def test_wrong_shapes_are_named_and_nothing_is_written(tmp_path, change, message):
    writer = DatasetWriter(tmp_path, {})
    before = files_of(tmp_path)
    with pytest.raises(ValueError, match=message):
        write(writer, 3, **({"record": {}} | pictures() | change))
    assert files_of(tmp_path) == before


class FullDisk:
    """Stands for `open`: files have room for `bytes_left` bytes in all."""

    def __init__(self, bytes_left: int) -> None:
        self.bytes_left = bytes_left

    def __call__(self, path, mode):
        stream = open(path, mode)
        write = stream.write

        def limited(content):
            write(content[: self.bytes_left])
            stream.flush()
            self.bytes_left -= len(content)
            if self.bytes_left < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        class Limited:
            tell, flush = stream.tell, stream.flush
            write = staticmethod(limited)

            def __enter__(self):
                return self

            def __exit__(self, *unused):
                stream.close()

        return Limited()


def test_a_full_disk_leaves_no_half_record_wherever_it_strikes(tmp_path, monkeypatch):
    write(DatasetWriter(tmp_path / "free", {}), 0, {"text": "x"}, **pictures())
    needed = sum((tmp_path / "free" / name).stat().st_size for name in files_of(tmp_path / "free") - {"dataset.json"})
    for room in range(0, needed, 61):
        folder = tmp_path / str(room)
        writer = DatasetWriter(folder, {})
        with monkeypatch.context() as patch:
            limited = FullDisk(room)
            for module in (files, writer_module):
                patch.setattr(module, "open", limited, raising=False)
            with pytest.raises(OSError, match="disk is full; what was finished is safe"):
                write(writer, 0, {"text": "x"}, **pictures())
        assert not any(name.endswith(".tmp") for name in files_of(folder))
        assert not any(folder.glob("metadata*.jsonl")) or read_records(folder) == []
        for path in folder.rglob("*.png"):
            Image.open(path).load()  # what has its name is whole
        write(writer, 0, {"text": "x"}, **pictures())
        assert [record["text"] for record in read_records(folder)] == ["x"]


def test_a_folder_rendered_again_from_its_annotation_reproduces_itself(rendered):
    report = check_folder(rendered)
    assert report.ok, str(report)
    assert (report.records, report.rendered) == (4, 4)
    assert (rendered / "grid.png").exists()


def test_pixels_are_where_rays_through_the_annotation_hit(rendered, hand):
    """Segmentation and depth against trimesh's ray casting of the stored mesh, pose and hand parameters."""
    record = read_records(rendered)[0]
    vertices, faces = load_mesh(rendered, record)
    pose = np.reshape(record["object_to_camera"], (4, 4))
    keys = ("global_orient", "hand_pose", "transl", "hand_betas")
    posed = hand(HandParams(*(np.array(record[key]) for key in keys), record["hand_side"]))
    meshes = [trimesh.Trimesh(posed.vertices, posed.faces, process=False),
              trimesh.Trimesh(vertices @ pose[:3, :3].T + pose[:3, 3], faces, process=False)]  # fmt: skip
    rows, columns = (np.random.default_rng(0).permutation(np.argwhere(np.ones((SIZE, SIZE))))[:1500]).T
    intrinsics = np.reshape(record["intrinsics"], (3, 3))
    rays = np.stack([columns, rows, np.ones_like(rows)], axis=1) @ np.linalg.inv(intrinsics).T
    depth = np.full((2, len(rays)), np.inf)
    for k, mesh in enumerate(meshes):
        points, ray, _ = mesh.ray.intersects_location(np.zeros_like(rays), rays)
        np.minimum.at(depth[k], ray, points[:, 2])
    labels = np.where(np.isinf(depth).all(axis=0), 0, depth.argmin(axis=0) + 1)
    drawn = load_conditions(rendered, record).segmentation[rows, columns]
    assert min(np.bincount(labels)) > 10  # background, hand and object are all there
    assert (drawn == SEGMENTATION_COLORS[labels]).all(axis=1).mean() > 0.998
    agree = (drawn == SEGMENTATION_COLORS[labels]).all(axis=1) & (labels > 0)
    difference = load_depth(rendered, record)[rows, columns][agree] - depth.min(axis=0)[agree]
    assert np.quantile(np.abs(difference), 0.99) < 0.0006
    amodal = load_object_mask(rendered, record)[rows, columns]
    assert (amodal == np.isfinite(depth[1])).mean() > 0.998


def repaint(folder, name: str, change) -> None:
    pixels = np.array(Image.open(folder / name))
    Image.fromarray(change(pixels)).save(folder / name)


def one_pixel(pixels: np.ndarray) -> np.ndarray:
    pixels[40, 40] = (1, 2, 3)
    return pixels


def nudge(folder, key: str, position: int, amount: float) -> None:
    numbers = read_records(folder)[0][key]
    numbers[position] += amount
    edit(folder, 0, **{key: numbers})


def scale_mesh(folder) -> None:
    path = folder / read_records(folder)[0]["object_path"]
    mesh = trimesh.load(path, process=False)
    mesh.vertices *= 1.03
    mesh.export(path)


CORRUPTIONS = {
    "keypoint in the picture": (lambda f: nudge(f, "keypoints_2d", 8, 2.0), "not the projection"),
    "keypoint in space": (lambda f: nudge(f, "keypoints_3d", 8, 0.002), "not the projection|mm from keypoints_3d"),
    "transl": (lambda f: nudge(f, "transl", 2, 0.002), "2.00 mm from keypoints_3d"),
    "finger": (lambda f: nudge(f, "hand_pose", 2, 0.05), "mm from keypoints_3d"),
    "camera": (lambda f: nudge(f, "intrinsics", 2, 1.0), "not the projection"),
    "object pose": (lambda f: nudge(f, "object_to_camera", 3, 0.004), "differs from a re-render"),
    "mesh": (scale_mesh, "differs from a re-render"),
    "mesh file cut short": (lambda f: os.truncate(f / "objects/mug_0003.ply", 3000), "damaged"),
    "mesh gone": (lambda f: (f / "objects/mug_0003.ply").unlink(), "mug_0003.ply is missing"),
    "colour": (lambda f: repaint(f, "segmentation/000000.png", one_pixel), r"colour .* \[1, 2, 3\] at row 40"),
    "skeleton": (lambda f: repaint(f, "skeleton/000000.png", one_pixel), "skeleton differs in 1 pixels"),
    "normal": (lambda f: repaint(f, "normal/000000.png", lambda p: p[:, ::-1]), "normal differs"),
    "depth": (lambda f: repaint(f, "depth/000000.png", lambda p: p + np.uint16(2)), "depth differs"),
    "object mask": (lambda f: repaint(f, "object_mask/000000.png", lambda p: np.roll(p, 3, 0)), "object_mask differs"),
    "size": (lambda f: repaint(f, "depth/000000.png", lambda p: p[:-1]), r"000000.png is \(95, 96\) uint16, expected"),
    "picture gone": (lambda f: (f / "normal/000001.png").unlink(), "record 1: normal/000001.png is missing"),
    "picture cut short": (lambda f: os.truncate(f / "skeleton/000002.png", 60), "000002.png is no picture that can"),
    "numbers lost": (lambda f: edit(f, 0, hand_pose=[0.0] * 44), "hand_pose has 44 numbers, expected 45"),
    "line lost": (lambda f: write_records(f, read_records(f)[:-1]), "counts 4 records, the metadata holds 3"),
    "metadata gone": (lambda f: (f / "metadata.jsonl").unlink(), "no metadata.jsonl"),
    "description gone": (lambda f: (f / "dataset.json").unlink(), "dataset.json is missing"),
}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_check_finds(copy, renderer, hand, name):
    corrupt, message = CORRUPTIONS[name]
    corrupt(copy)
    report = check_folder(copy, hand, renderer)
    assert not report.ok
    assert re.search(message, "\n".join(report.problems)), str(report)


def test_looks_that_share_conditions_must_agree_in_their_annotation(copy, renderer, hand):
    records = read_records(copy)
    records.append(records[0] | {"index": 9, "transl": [0.0, 0.0, 0.5]})
    write_records(copy, records)
    (copy / "dataset.json").write_text("{}")
    report = check_folder(copy, hand, renderer)
    assert report.problems == ["record 9: transl differs from record 0, which has the same condition images"]
