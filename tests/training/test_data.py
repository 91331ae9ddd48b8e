"""hoi/training/data.py: what cannot be trained on is found before training, by name."""

import shutil
from pathlib import Path

import pytest
from PIL import Image
from training_world import SIDE, hoi_args, make_folder, make_world

import train
from hoi.data.folder import read_records
from hoi.data.writer import write_records
from hoi.training.data import TrainingSet


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return make_folder(tmp_path_factory.mktemp("made") / "data", 4, with_conditions=True)


@pytest.fixture
def folder(made, tmp_path) -> Path:
    return shutil.copytree(made, tmp_path / "data")


def change(folder: Path, **values) -> None:
    records = read_records(folder)
    records[2] |= values
    write_records(folder, records)


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        (
            lambda f: (f / "images/000002.png").unlink(),
            FileNotFoundError,
            "images/000002.png is missing .record 2.; run",
        ),
        (lambda f: shutil.rmtree(f / "normal"), FileNotFoundError, "normal/000000.png is missing .record 0.; run"),
        (lambda f: change(f, file_name=None), ValueError, "record 2 has no picture: .*make_dataset.py --shade"),
        (lambda f: change(f, width=64), ValueError, "record 2 is 64 x 32 px, the model takes 32 x 32"),
        (lambda f: change(f, normal_file_name=None), ValueError, "record 2 has no normal_file_name; the condition"),
        (lambda f: write_records(f, []), ValueError, "data holds no records; make them"),
    ],
    ids=["no picture", "no condition", "conditions only", "another size", "two conditions", "empty"],
)
def test_a_folder_that_cannot_be_trained_on_is_refused_at_once(folder, fault, error, message):
    fault(folder)
    with pytest.raises(error, match=message):
        TrainingSet([folder], SIDE, SIDE)


def test_a_training_set_keeps_nothing_of_the_geometry(folder):
    """Of half a million records it would take gigabytes, in every process."""
    change(folder, keypoints_3d=[0.5] * 63, normal_source="geometry")
    (_, other), (_, record) = TrainingSet([folder], SIDE, SIDE).entries[1:3]
    assert "keypoints_3d" in read_records(folder)[2] and "keypoints_3d" not in record
    assert record["normal_source"] == "geometry" and (record["index"], other["index"]) == (2, 1)


def test_a_damaged_picture_or_one_that_its_record_belies_is_named_when_it_is_read(folder):
    path = folder / "images" / "000002.png"
    path.write_bytes(path.read_bytes()[:300])
    pictures = TrainingSet([folder], SIDE, SIDE)
    with pytest.raises(ValueError, match="images/000002.png is no picture that can be read"):
        pictures.images([0, 2])
    Image.new("RGB", (16, 32)).save(path)
    with pytest.raises(ValueError, match=r"images/000002.png is \(32, 16, 3\) uint8, expected \(32, 32, 3\)"):
        pictures.images([0, 2])
    assert len(pictures.images([0, 1])) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--data {0}/nowhere", "train.py: .*nowhere has no metadata.jsonl"),
        ("--reg-data {0}/nowhere", "train.py: .*nowhere has no metadata.jsonl"),
        ("--base {0}/nowhere.safetensors", "train.py: no weight file at .*nowhere.safetensors"),
        ("--base {0}/data/metadata.jsonl", "train.py: .*metadata.jsonl is not"),
    ],
)
def test_what_is_missing_is_told_in_one_message_and_a_failing_exit_code(tmp_path, monkeypatch, words, message):
    make_world(tmp_path)
    args = hoi_args(tmp_path, tmp_path / "run", *words.format(tmp_path).split())
    monkeypatch.setattr(train, "parse_args", lambda: args)
    with pytest.raises(SystemExit, match=message):
        train.main()
    assert not list((tmp_path / "run").glob("state_*"))
