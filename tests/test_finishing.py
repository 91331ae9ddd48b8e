"""Finishing is repeatable: what is ended after the last record becomes the whole folder, and that keeps every byte."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from training_world import small_model

import make_dataset
import sample
import video
from hoi.data.folder import read_records
from hoi.data.writer import DatasetWriter, refresh_card, write_pictures
from hoi.weights.export import export_own

JOBS = {
    "sample": (sample, "--checkpoint {root}/hoi.safetensors --no-conditions --count 3 --dtype float32 --device cpu"),
    "video": (video, "--checkpoint {root}/hoi.safetensors --object can --frames 2 --framing tight --dtype float32 "
              "--device cpu --cache {root}/cache"),
    "scenes": (make_dataset, "--object can --object-instances 1 --grasps-per-object 1 --size 32 --count 3 "
               "--cache {root}/cache"),
    "real pictures": (make_dataset, "--csv {root}/reg.csv --size 32"),
}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finishing")
    export_own(small_model(with_conditions=True), folder / "hoi.safetensors")
    for k, side in enumerate((64, 50, 64)):
        Image.new("RGB", (64, side), (k, 2, 3)).save(folder / f"{k}.png")
    (folder / "reg.csv").write_text("image,sentence\n0.png,A beach.\n1.png,Low.\n2.png,Snow.\n")
    return folder


def run(job: str, root: Path, out: Path, *more: str) -> None:
    script, words = JOBS[job]
    script.run([*words.format(root=root).split(), "--out", str(out), *more])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def killed(self, grid: bool = True) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("job", JOBS)
def test_a_job_that_was_ended_after_its_last_record_ends_as_one_that_was_not(job, root, tmp_path, monkeypatch):
    run(job, root, tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(DatasetWriter, "finish", killed)
        run(job, root, tmp_path / "ended")
    assert not (tmp_path / "ended" / "grid.png").exists()
    run(job, root, tmp_path / "ended")
    whole, ended = contents(tmp_path / "whole"), contents(tmp_path / "ended")
    cards = [json.loads(each.pop("dataset.json")) for each in (whole, ended)]
    assert whole == ended and "grid.png" in whole
    cards[0]["command"] = cards[1]["command"]  # the names of the two folders
    assert cards[0] == cards[1] and cards[0]["counts"]["records"] >= 2


@pytest.mark.parametrize("job", JOBS)
def test_the_same_command_again_changes_no_byte_of_a_complete_and_verified_folder(job, root, tmp_path):
    run(job, root, tmp_path)
    (tmp_path / "verification").mkdir()
    (tmp_path / "verification" / "report.json").write_text('{"scores": {}}')
    refresh_card(tmp_path)
    path = tmp_path / "dataset.json"
    path.write_text(path.read_text().replace('"commit": ', '"commit": "of another day", "was": '))
    before = contents(tmp_path)
    card = json.loads(before["dataset.json"])
    assert {"counts", "sources", "weights", "yield", "verification"} <= card.keys() and card["verification"]
    run(job, root, tmp_path)
    assert contents(tmp_path) == before
    if job in ("sample", "scenes", "real pictures"):
        run(job, root, tmp_path, "--count", "1")  # fewer is nothing to do as well
        assert contents(tmp_path) == before


def test_lines_of_ranks_that_were_ended_before_the_merge_are_merged_by_the_next_run(root, tmp_path):
    run("sample", root, tmp_path / "whole")
    run("sample", root, tmp_path / "ranks")
    lines = (tmp_path / "ranks/metadata.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "ranks/metadata.jsonl").unlink()
    for rank in range(2):
        (tmp_path / f"ranks/metadata-{rank:05d}.jsonl").write_text("".join(lines[rank::2]))
    run("sample", root, tmp_path / "ranks")
    assert {name for name in contents(tmp_path / "ranks") if "metadata" in name} == {"metadata.jsonl"}
    assert read_records(tmp_path / "ranks") == read_records(tmp_path / "whole")


def test_a_folder_that_grows_is_unfinished_until_it_is_counted_again(tmp_path):
    def picture(writer: DatasetWriter, index: int) -> None:
        writer.append(write_pictures(tmp_path, index, {"text": "x"}, np.zeros((8, 8, 3), np.uint8)))

    writer = DatasetWriter(tmp_path, {"job": {}})
    picture(writer, 0)
    writer.finish()
    again = DatasetWriter(tmp_path, {"job": {}})
    assert json.loads((tmp_path / "dataset.json").read_text())["counts"]["records"] == 1
    picture(again, 1)
    assert "counts" not in json.loads((tmp_path / "dataset.json").read_text())
    again.finish()
    assert json.loads((tmp_path / "dataset.json").read_text())["counts"]["records"] == 2
