"""The page of a folder, in headless Chromium: what it shows, asks for and leaves alone; and how it is written."""

import base64
import io
import json
import os
import shutil
import time
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import trimesh
from browser import Browser
from datasets import load_dataset
from PIL import Image

from hoi.data.folder import array_of, hand_of, load_mesh, read_records
from hoi.data.writer import write_records
from hoi.geometry.camera import transform_points
from hoi.page.__main__ import depth_preview, run, thinned, write_page
from hoi.verify.report import choose, parse_keep

EVIL = 'A <script>window.hacked = 1</script> "mug" </script>\u2028<img src=x onerror="window.hacked = 2">'
READY = "document.querySelectorAll('.score').length > 1"  # the last that the page does


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not shutil.which("chromium"):
        assert "CI" not in os.environ, "chromium is missing: .ci/run installs it"
        pytest.skip("needs chromium: apt install chromium")
    window = Browser(tmp_path_factory.mktemp("browser"))
    yield window
    window.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, export_source) -> Path:
    """Six records with scores from 0 to 1, with and without hand and object; its name needs care in a URL."""
    folder = shutil.copytree(export_source, tmp_path_factory.mktemp("page") / "a #1 & b%20")
    records = read_records(folder)
    for record in records:
        record["verification"] = {"iou_hand": record["index"] / 5, "pck": 0.5 + record["index"] % 2 / 4}
    records[0] |= {"text": EVIL, "grasp": {"score": 1.5, "fingers_in_contact": [True, True, False, False, False]}}
    write_records(folder, records)
    write_page([folder])
    return folder


@pytest.fixture
def page(browser, folder):
    """The folder's page, freshly opened; afterwards nothing went wrong and nothing left the folder."""
    browser.open(folder / "index.html", READY)
    yield browser
    assert browser.problems == []
    home = folder.resolve().as_uri() + "/"
    assert [url for url in browser.requests if not url.startswith((home, "data:image/png", "blob:"))] == []


def tiles(browser: Browser) -> int:
    return browser.run("document.querySelectorAll('.tile').length")


def show(browser: Browser, index: int) -> None:
    browser.run(f"show(shown.findIndex(row => row.index === {index}))")
    browser.wait("[...document.querySelectorAll('.stage img')].every(image => image.complete)")
    browser.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")


def part_of(browser: Browser, selector: str) -> np.ndarray:
    left, top, width, height = map(round, browser.box(selector))
    return browser.screenshot()[top : top + height, left : left + width].astype(int)


def test_all_thumbnails_appear(page):
    page.wait("[...document.querySelectorAll('.tile img')].every(image => image.naturalWidth === 160)")
    assert tiles(page) == 6 and page.run("document.title") == "a #1 & b%20"


def test_a_dragged_histogram_halves_the_thumbnails_and_clearing_brings_them_back(page):
    left, top, width, height = page.box(".bars svg")  # of iou_hand: 0, 0.2 ... 1
    page.drag((left + 0.5 * width, top + height / 2), (left + width + 20, top + height / 2))
    assert page.run("shown.map(row => row.index)") == [3, 4, 5] and tiles(page) == 3
    assert "3 of 6" in page.run("document.getElementById('count').textContent")
    page.run("document.getElementById('clear').click()")
    assert tiles(page) == 6


@pytest.mark.parametrize(
    "field, word, left",
    [("search", "BOTTLE drawn", 1), ("object", "can_0003", 1), ("hand", "left", 1), ("search", "zebra", 0)],
)
def test_text_and_side_choose(page, field, word, left):
    page.run(f"(field => {{ field.value = {word!r}; field.oninput(); }})(document.getElementById({field!r}))")
    assert tiles(page) == left


def test_each_layer_changes_the_picture_and_goes_away_again(page):
    show(page, 0)
    before = part_of(page, ".stage")
    layers = []
    for key in "123456":
        page.press(key)
        layers.append(part_of(page, ".stage"))
        page.press(key)
    assert all(np.abs(one - other).mean() > 0.5 for one, other in combinations([before, *layers], 2))
    np.testing.assert_array_equal(part_of(page, ".stage"), before)


def test_the_space_shows_hand_and_object_and_turns_with_the_mouse(page):
    show(page, 0)
    before = part_of(page, "canvas")
    assert len(np.unique(before.reshape(-1, 3), axis=0)) > 100
    left, top, width, height = page.box("canvas")
    page.drag((left + width / 2, top + height / 2), (left + width / 2 + 80, top + height / 2 + 30))
    page.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    assert np.abs(part_of(page, "canvas") - before).mean() > 1


def test_hand_and_object_lie_where_the_annotation_says(page, folder, hand):
    for record in read_records(folder)[:4]:
        found = page.run("(async () => (await meshesOf(sides[0], await viewOf(sides[0], "
                         f"{record['index']}))).map(mesh => [...mesh.points]))()")  # fmt: skip
        expected = []
        if record["object_path"]:
            expected.append(transform_points(array_of(record, "object_to_camera"), load_mesh(folder, record)[0]))
        if record["transl"]:
            expected.append(hand(hand_of(record)).vertices)
        assert len(found) == len(expected) > 0
        for points, true in zip(found, expected, strict=True):
            np.testing.assert_allclose(np.reshape(points, (-1, 3)), true, atol=1e-5)


def test_a_script_in_a_text_stays_text(page):
    show(page, 0)
    assert page.run("document.querySelector('blockquote').textContent") == EVIL
    assert page.run("typeof window.hacked") == "undefined"
    assert page.run("document.querySelectorAll('#numbers img, #numbers script').length") == 0


def test_keys_alone_mark_records_and_hoi_verify_reads_the_list(page, folder):
    page.press("ArrowRight", "ArrowRight", " ", "Enter")  # the first arrow goes to the first thumbnail
    page.wait("document.querySelector('dialog').open")
    page.press("ArrowRight")
    page.wait("document.getElementById('heading').textContent === 'Record 2'")
    page.press(" ", "Escape")
    page.wait("document.activeElement.ariaLabel?.startsWith('record 2, marked')")
    page.press("ArrowRight", " ", " ", "/")
    page.wait("document.activeElement.id === 'search'")
    assert page.run("document.querySelectorAll('.marked').length") == 2
    page.run("document.getElementById('save').click()")
    list_path, end = page.downloads / "marked.txt", time.monotonic() + 10
    while not list_path.is_file() and time.monotonic() < end:
        time.sleep(0.02)
    records = read_records(folder)
    assert [record["index"] for record in choose(records, parse_keep(str(list_path), records))] == [1, 2]
    page.open(folder / "index.html", READY)
    assert page.run("marked.size") == 2  # the browser remembers


def test_two_folders_stand_side_by_side_by_index(browser, folder, tmp_path):
    other = shutil.copytree(folder, tmp_path / "other")
    write_records(other, read_records(other)[1:4])
    write_page([other, folder])
    browser.open(other / "index.html", READY)
    assert tiles(browser) == 3 and browser.run("document.querySelectorAll('.tile img').length") == 6
    browser.wait("[...document.querySelectorAll('.tile img')].every(image => image.complete && image.naturalWidth)")
    show(browser, 2)
    shown = browser.run("[...document.querySelectorAll('.stage > img:first-child')].map(image => image.src)")
    assert shown == [(place / "images/000002.png").resolve().as_uri() for place in (other, folder)]
    assert browser.problems == []


def test_folders_without_pictures_scores_or_files_are_shown(browser, folder, tmp_path, capsys):
    bare = shutil.copytree(folder, tmp_path / "bare")
    records = read_records(bare)[:3]
    for record in records:
        record |= {"file_name": None, "verification": None, "grasp": None, "penetration_mm": None, "hand_model": "mano"}
    records[1]["normal_file_name"] = "http://example.com/1.png"  # a name like any other, of a file that is not there
    write_records(bare, records)
    run([str(bare)])
    assert "3 records\n  1 files are missing; run the command that made" in capsys.readouterr().out
    browser.open(bare / "index.html", "document.getElementById('order')?.options.length")
    assert tiles(browser) == 3
    show(browser, 0)
    assert "Bones alone: the skin of a mano hand" in browser.run("document.getElementById('sides').textContent")
    assert all(url.startswith((bare.as_uri(), "data:")) for url in browser.requests)
    assert all("ERR_FILE_NOT_FOUND" in problem for problem in browser.problems)


def test_ten_thousand_records_are_quick(browser, folder, tmp_path, record_property):
    many = shutil.copytree(folder, tmp_path / "many")
    record = read_records(many)[4]  # scenery: short lines, for it is the browser that is asked
    lines = [record | {"index": k, "verification": {"iou_hand": k / 9999, "pck": k % 7 / 7}} for k in range(10_000)]
    (many / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    start = time.monotonic()
    write_page([many])
    record_property("seconds to write", time.monotonic() - start)
    start = time.monotonic()
    browser.open(many / "index.html", "document.querySelector('.tile img')?.naturalWidth")
    first = time.monotonic() - start
    browser.wait(READY)
    record_property("seconds to the first thumbnail", first)
    assert browser.run("shown.length") == 10_000 and tiles(browser) == 60 and first < 10
    show(browser, 9_999)
    assert browser.run("document.getElementById('place').textContent") == "10000 of 10000" and not browser.problems


# --- how it is written ---


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def test_a_second_run_changes_nothing_and_a_changed_depth_one_part(folder):
    before = contents(folder)
    write_page([folder])
    assert contents(folder) == before
    depth = next((folder / "depth").iterdir())
    Image.fromarray(np.full((160, 160), 400, np.uint16)).save(depth)
    write_page([folder])
    changed = {Path(path).name for path, content in contents(folder).items() if content != before[path]}
    assert changed == {depth.name, "views-0000.js"}


def test_a_folder_that_is_being_written_shows_what_is_finished_and_says_so(folder, tmp_path, capsys):
    growing = shutil.copytree(folder, tmp_path / "growing")
    lines = (growing / "metadata.jsonl").read_text().splitlines(keepends=True)
    (growing / "metadata.jsonl").unlink()
    (growing / "metadata-00000.jsonl").write_text("".join(lines[:3]) + lines[3][:50])
    run([str(growing)])
    assert "3 records\n  its maker is not done: run the same command again" in capsys.readouterr().out


def test_other_tools_still_read_the_folder(folder):
    assert len(load_dataset("imagefolder", data_dir=str(folder), split="train")) == 6


def test_a_damaged_line_a_damaged_depth_and_a_way_out_of_the_folder_are_named(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    os.truncate(copy / "depth/000001.png", 90)
    with pytest.raises(SystemExit, match=r"hoi.page: .*depth/000001\.png is no picture that can be read"):
        run([str(copy)])
    shutil.move(copy / "images/000001.png", tmp_path / "elsewhere.png")
    (copy / "images/000001.png").symlink_to(tmp_path / "elsewhere.png")
    with pytest.raises(SystemExit, match="file_name 'images/000001.png' leads out of the folder"):
        run([str(copy)])
    (copy / "metadata.jsonl").write_text('{"index": 0, "file_name": "../x.png"}\n')
    with pytest.raises(SystemExit, match="metadata.jsonl line 1: file_name is '../x.png', expected a path inside"):
        run([str(copy)])


def test_a_page_of_someone_else_is_not_replaced(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "index.html").write_text("my own")
    with pytest.raises(SystemExit, match="index.html was not made by hoi.page; move it away"):
        run([str(copy)])
    assert (copy / "index.html").read_text() == "my own"


def test_a_thinned_mesh_keeps_its_shape():
    sphere = trimesh.creation.icosphere(subdivisions=6, radius=0.05)
    vertices, faces = thinned(np.asarray(sphere.vertices), np.asarray(sphere.faces))
    few = trimesh.Trimesh(vertices, faces, process=False)
    assert 2000 < len(vertices) <= 6000 < len(sphere.vertices)
    assert few.is_watertight and few.volume == pytest.approx(sphere.volume, rel=0.01)


def test_depth_previews_are_bright_where_it_is_near_and_black_where_nothing_is():
    depth = np.array([[0, 300, 400, 500]], np.uint16)
    preview = depth_preview(depth)
    with Image.open(io.BytesIO(base64.b64decode(preview["url"].split(",")[1]))) as picture:
        grey = np.asarray(picture)[0]
    assert grey[0] == 0 and grey[1] == 255 > grey[2] > grey[3] > 0
