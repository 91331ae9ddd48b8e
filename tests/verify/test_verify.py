"""python -m hoi.verify and what it is made of: what scores mean, nothing is lost, what passes is chosen as asked."""

import json
import platform
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from datasets import load_dataset
from PIL import Image
from verifier_world import SIDE, draw, make_folder

from hoi.common import files
from hoi.data.check import check_folder
from hoi.data.folder import read_records
from hoi.geometry.render import joints_shown
from hoi.toyworld.backgrounds import BACKGROUNDS
from hoi.toyworld.looks import PALETTE
from hoi.verify import __main__ as verify
from hoi.verify import report as report_module
from hoi.verify import scores as scores_module
from hoi.verify import verifier
from hoi.verify.predictions import HandPrediction
from hoi.verify.scores import SCORES, Estimators, Truth, load_truth
from hoi.verify.verifier import Prediction, Verifier, save_verifier
from tools import measure_generated

WORDS = sorted(BACKGROUNDS)


def truth_of(label_map, points=None, visible=None, text="", **more) -> Truth:
    inside = None if points is None else np.ones(21, bool)
    return Truth(label_map, points, inside if visible is None else visible, inside, text, **more)


def seen_as(label_map, points=None, background="on the beach", tips=()) -> Prediction:
    points = np.zeros((21, 2)) if points is None else points
    return Prediction(label_map, points, np.full(21, 0.75), background, np.zeros(4), np.reshape(tips, (-1, 2)), "")


def score_picture(image, truth, seen, words=(), hands=None) -> dict[str, float | None]:
    keypoints = None if hands is None else {"images/000000.png": hands}
    network = SimpleNamespace(backgrounds=words, materials=())
    return Estimators(network, keypoints).score("images/000000.png", image, truth, seen)


def sphere(side: int) -> np.ndarray:
    """The condition picture of a ball's normals."""
    y, x = (np.mgrid[:side, :side] - (side - 1) / 2) / (0.75 * side)
    return np.rint((1 - np.stack([x, y, -np.sqrt(1 - x**2 - y**2)], axis=-1)) * 127.5).astype(np.uint8)


def two_halves(left: int, right: int) -> np.ndarray:
    label_map = np.zeros((SIDE, SIDE), np.uint8)
    label_map[:, : SIDE // 2], label_map[:, SIDE // 2 :] = left, right
    return label_map


def test_perfect_predictions_have_perfect_scores():
    image, label_map, points = draw(np.random.default_rng(0))
    image[label_map == 2] = np.rint(255 * np.asarray(PALETTE["blue"]))
    truth = truth_of(
        label_map, points, np.arange(21) < 12, "A hand is grasping a blue mug on the beach", tips=points[:3]
    )
    scores = score_picture(image, truth, seen_as(label_map, points, tips=points[2::-1]), WORDS)
    for unsaid in ("shading_hand", "shading_object", "material_right"):  # no normals, no material word
        assert scores.pop(unsaid) is None
    assert (
        set(scores) | {"shading_hand", "shading_object", "material_right"} == set(SCORES)
        and scores.pop("contact_seen") is None
    )
    errors = {name for name in SCORES if name.startswith("keypoint_error")}
    assert {name: scores.pop(name) for name in errors} == dict.fromkeys(errors, 0)
    assert (scores.pop("joints_visible"), scores.pop("joints_hidden"), scores.pop("confidence")) == (12, 9, 0.75)
    assert scores == dict.fromkeys(scores, 1.0)


def test_regions_counted_by_hand():
    shown = two_halves(1, 0)
    shown[:, : 3 * SIDE // 4] = 1  # the hand covers three quarters in place of the left half
    image = np.zeros((SIDE, SIDE, 3), np.uint8)
    scores = score_picture(image, truth_of(two_halves(1, 0)), seen_as(shown))
    assert scores["iou_hand"] == scores["iou_foreground"] == pytest.approx(2 / 3, abs=1e-6)
    assert scores["iou_object"] is None and scores["pck"] is None  # there is nothing to hold them against
    with pytest.raises(ValueError, match=r"the picture is \(8, 32\), its segmentation \(32, 32\)"):
        score_picture(image[:8], truth_of(two_halves(1, 0)), seen_as(shown))


@pytest.mark.parametrize("named, right", [("green", 1.0), ("red", 0.0)])
def test_words_are_right_when_the_picture_has_what_the_caption_names(named, right):
    label_map, image = two_halves(0, 2), np.zeros((SIDE, SIDE, 3), np.uint8)
    image[label_map == 2] = np.rint(255 * np.asarray(PALETTE["green"]))
    truth = truth_of(label_map, text=f"A hand is grasping a {named} mug in the snow")
    scores = score_picture(image, truth, seen_as(label_map, background="on the beach"), WORDS)
    assert scores["color_right"] == right and scores["background_right"] == 0.0


def test_a_brownish_red_is_neither_and_stripes_count_as_the_world_draws_them():
    label_map, image = two_halves(0, 2), np.full((SIDE, SIDE, 3), 128, np.uint8)
    between = (np.asarray(PALETTE["brown"]) + PALETTE["red"]) / 2
    striped = 0.8 * np.asarray(PALETTE["blue"]) + 0.2 * np.asarray(scores_module.CREAM)
    for color, material, word in (
        (PALETTE["brown"], None, "brown"), (between, None, None), (PALETTE["red"], None, "red"),
        (striped, "striped", "blue"), ((1, 0, 1), None, None),
    ):  # fmt: skip
        image[label_map == 2] = np.rint(255 * np.asarray(color))
        assert scores_module.color_seen(image, label_map, material) == word


def test_luminance_is_explained_where_it_follows_the_normals_and_not_where_it_is_flat_or_noise():
    normal, mask, generator = sphere(SIDE), np.ones((SIDE, SIDE), bool), np.random.default_rng(0)
    n = 1 - normal / 127.5
    lamp = np.array([0.3, -0.6, -0.74])
    lit = np.rint(60 + 120 * np.clip(n @ lamp, 0, None))[..., None].repeat(3, 2).astype(np.uint8)
    noise = generator.integers(0, 255, lit.shape).astype(np.uint8)
    assert scores_module.luminance_explained(lit, normal, mask) > 0.97
    assert scores_module.luminance_explained(noise, normal, mask) < 0.05
    assert scores_module.luminance_explained(np.full_like(lit, 99), normal, mask) == 0.0
    assert scores_module.luminance_explained(lit, normal, np.arange(SIDE**2).reshape(SIDE, SIDE) < 99) is None
    truth = truth_of(two_halves(1, 2), text="a striped mug", normal=normal)
    assert scores_module.shading_scores(lit, truth).keys() == {"shading_hand"}  # stripes are no light


def test_a_lost_an_added_and_a_fused_fingertip_cost_what_they_should():
    points = np.zeros((21, 2))
    points[20] = [0.0, 100.0]  # the hand box is 100 pixels, so that tips 10 apart are no match
    tips = np.array([[0.0, 0.0], [20.0, 0.0], [40.0, 0.0]])
    truth = truth_of(None, points, tips=tips)
    none = np.zeros((0, 2))
    for seen, expected in (
        (tips[::-1] + 3, 1), (tips[:2], 4 / 5), (np.concatenate([tips, [[70.0, 0.0]]]), 6 / 7), (none, 0),
        (np.array([[10.0, 0.0], [40.0, 0.0]]), 2 / 5), (np.array([[1.0, 0.0], [2.0, 0.0], [20.0, 0.0]]), 4 / 6),
    ):  # fmt: skip
        assert scores_module.tip_score(seen, truth)["fingertips"] == pytest.approx(expected)
    assert scores_module.tip_score(none, truth_of(None, points, tips=none)) == {"fingertips": 1.0}
    assert scores_module.tip_score(none, truth_of(None)) == {}  # nobody says where they are


def test_keypoint_errors_worked_out_by_hand():
    points = np.zeros((21, 2))
    points[20] = [10.0, 30.0]  # the hand box is 10 by 30
    visible = np.arange(21) < 14
    guess = points + np.where(visible[:, None], [3.0, 4.0], [0.0, 9.0])  # 5 pixels off, hidden joints 9
    truth = truth_of(None, points, visible)
    scores = score_picture(np.zeros((64, 64, 3), np.uint8), truth, seen_as(None, guess))
    assert (scores["keypoint_error_px_visible"], scores["keypoint_error_px_hidden"]) == (5, 9)
    assert scores["keypoint_error_px"] == pytest.approx((14 * 5 + 7 * 9) / 21, abs=1e-6)
    assert scores["keypoint_error_relative_hidden"] == 0.3
    assert (scores["pck_visible"], scores["pck_hidden"]) == (1, 0)  # 6 pixels are a fifth of the box
    assert scores["pck"] == pytest.approx(14 / 21, abs=1e-6)
    with pytest.raises(ValueError, match="keypoints_2d lie in one point"):  # an error over 0 would be no number
        score_picture(np.zeros((64, 64, 3), np.uint8), truth_of(None, np.ones((21, 2))), seen_as(None, guess))


def test_another_programs_closest_hand_counts_and_a_hand_that_it_misses_is_all_wrong():
    image, label_map, points = draw(np.random.default_rng(1))
    truth = truth_of(label_map, points)
    hands = [HandPrediction(points + 9), HandPrediction(points + [1, 0], scores=np.full(21, 0.5))]
    found = score_picture(image, truth, seen_as(label_map), WORDS, hands)
    assert (found["keypoint_error_px"], found["confidence"], found["detected"]) == (1, 0.5, 1)
    missed = score_picture(image, truth, seen_as(label_map), WORDS, [])
    assert (missed["pck"], missed["keypoint_error_px"], missed["detected"], missed["iou_hand"]) == (0, None, 0, 1)


def test_a_joint_shows_where_the_hand_is_seen_with_no_more_than_flesh_before_it():
    label_map, depth = two_halves(1, 2), np.full((SIDE, SIDE), 0.5)
    points = np.tile([5.0, 5.0], (21, 1))
    points[1] = [SIDE // 2, 5]  # on the object, beside the hand: an outline
    points[2] = [SIDE // 2 + 1, 5]
    points[3] = [-5.0, 5.0]
    z = np.full(21, 0.51)
    z[4] = 0.53  # 30 mm behind what is seen
    expected = np.ones(21, bool)
    expected[[2, 3]] = False
    np.testing.assert_array_equal(joints_shown(points, label_map), expected)
    expected[4] = False
    np.testing.assert_array_equal(joints_shown(points, label_map, depth, z), expected)


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "data", 20)


@pytest.fixture
def verifier_file(tmp_path):
    save_verifier(tmp_path / "v.safetensors", Verifier(WORDS, side=SIDE))
    return tmp_path / "v.safetensors"


def without_scores(records: list[dict]) -> list[dict]:
    return [{key: value for key, value in record.items() if key != "verification"} for record in records]


def test_scores_are_added_to_the_records_and_replaced_by_the_next_run(folder, verifier_file):
    before = read_records(folder)
    records, report = report_module.verify_folder(folder, verifier_file)
    assert read_records(folder) == records and without_scores(records) == without_scores(before)
    assert all(record["verification"]["iou_hand"] is not None for record in records)
    assert report["scores"]["pck"]["n"] == 20 and not report["problems"]
    assert {path.name for path in (folder / "verification").iterdir()} == {"report.json", "report.md"}
    report = (folder / "verification/report.md").read_text()
    assert f"v.safetensors {files.sha256_of(verifier_file)[:12]}" in report
    save_verifier(verifier_file, Verifier(WORDS, side=SIDE), {"note": "another"})
    again, _ = report_module.verify_folder(folder, verifier_file)
    of_another = f"v.safetensors {files.sha256_of(verifier_file)[:12]}"
    assert {record["verification"]["verifier"] for record in again} == {of_another} and of_another not in report
    assert json.loads((folder / "dataset.json").read_text())["verification"]["scores"]["pck"]["n"] == 20
    assert len(load_dataset("imagefolder", data_dir=str(folder), split="train", cache_dir=folder / "cache")) == 20


def test_an_interrupted_run_and_a_full_disk_change_nothing(folder, verifier_file, monkeypatch):
    content = (folder / "metadata.jsonl").read_bytes()

    def stop_at_the_last(truth_folder, record):
        if record["index"] == 19:
            raise KeyboardInterrupt
        return load(truth_folder, record)

    load = load_truth
    monkeypatch.setattr(scores_module, "load_truth", stop_at_the_last)
    with pytest.raises(KeyboardInterrupt):
        report_module.verify_folder(folder, verifier_file)
    monkeypatch.setattr(scores_module, "load_truth", load)
    assert (folder / "metadata.jsonl").read_bytes() == content

    def full(*paths):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="the disk is full"):
        report_module.verify_folder(folder, verifier_file)
    assert (folder / "metadata.jsonl").read_bytes() == content
    assert not [path for path in folder.rglob("*.tmp")]


def test_a_verification_that_is_ended_before_its_report_leaves_no_scores(folder, verifier_file, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(report_module, "report_as_markdown", killed)
        report_module.verify_folder(folder, verifier_file)
    assert not any(record.get("verification") for record in read_records(folder))


def killed(*_) -> None:
    raise KeyboardInterrupt


def test_records_that_someone_adds_meanwhile_are_not_lost(folder, verifier_file, monkeypatch):
    lines = folder / "metadata.jsonl"

    def append_one(path):
        with open(lines, "a") as stream:
            stream.write(lines.read_text().splitlines()[0].replace('"index": 0', '"index": 20') + "\n")
        return load(path)

    load = verifier.load_verifier
    monkeypatch.setattr(scores_module, "load_verifier", append_one)
    with pytest.raises(ValueError, match="changed while its pictures were verified; nothing was written"):
        report_module.verify_folder(folder, verifier_file)
    assert len(read_records(folder)) == 21
    (folder / "metadata-00001.jsonl").write_text("")
    with pytest.raises(ValueError, match="metadata-00001.jsonl: its run is not finished"):
        report_module.verify_folder(folder, verifier_file)


def test_damaged_pictures_are_named_and_counted_and_the_others_scored(folder, verifier_file):
    (folder / "images/000003.png").write_bytes(b"no picture")
    (folder / "segmentation/000007.png").unlink()
    Image.new("RGB", (16, 16)).save(folder / "images/000009.png")
    Image.new("RGBA", (SIDE, SIDE)).save(folder / "images/000011.png")
    records, report = report_module.verify_folder(folder, verifier_file)
    assert report["scored"] == 16 and len(report["problems"]) == 4
    for index, message in (
        (3, "000003.png is no picture that can be read"),
        (7, "segmentation/000007.png is missing"),
        (9, "is (16, 16, 3) uint8, expected (32, 32, 3)"),
        (11, "is (32, 32, 4) uint8, expected (32, 32, 3)"),
    ):
        verification = records[index]["verification"]
        assert message in verification["problem"] and {verification[name] for name in SCORES} == {None}
    assert "4 records without scores" in (folder / "verification/report.md").read_text()


def test_folders_without_pictures_are_refused(tmp_path, verifier_file):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/metadata.jsonl").write_text("")
    with pytest.raises(ValueError, match="empty holds no records"):
        report_module.verify_folder(tmp_path / "empty", verifier_file)
    make_folder(tmp_path / "conditions", 2)
    lines = (tmp_path / "conditions/metadata.jsonl").read_text()
    (tmp_path / "conditions/metadata.jsonl").write_text(lines.replace('"images/00000', 'null, "was": "'))
    with pytest.raises(ValueError, match="conditions has no pictures: its records are conditions only; sample.py"):
        report_module.verify_folder(tmp_path / "conditions", verifier_file)


def test_one_picture_is_enough(tmp_path, verifier_file):
    _, report = report_module.verify_folder(make_folder(tmp_path / "one", 1), verifier_file)
    assert report["scores"]["iou_hand"]["n"] == 1


def test_predictions_by_file_stand_in_for_the_network(folder, tmp_path, capsys):
    records = read_records(folder)
    points = {r["file_name"]: [{"keypoints_2d": np.reshape(r["keypoints_2d"], (21, 2)).tolist()}] for r in records}
    points[records[0]["file_name"]] = []
    states = {r["file_name"]: [{"box": [0, 0, 9, 9], "score": 0.9, "state": 3 + r["index"] % 2}] for r in records}
    for name, content in (("k.json", points), ("c.json", states)):
        (tmp_path / name).write_text(json.dumps({"predictions": content}))
    words = ["--no-network", "--keypoints", str(tmp_path / "k.json"), "--contacts", str(tmp_path / "c.json")]
    chosen = [str(folder), *words, "--keep", "pck>0.9,contact_seen>0", "--list", str(tmp_path / "new/keep.txt")]
    verify.main(verify.parse_args(chosen))
    printed = capsys.readouterr().out
    assert "pass pck>0.9, contact_seen>0: 9 of 20 (45.0 %)" in printed and "pck>0.9 alone: 19 of 20" in printed
    assert (tmp_path / "new/keep.txt").read_text().split() == [f"images/{k:06d}.png" for k in range(2, 20, 2)]
    assert read_records(folder)[1]["verification"]["iou_hand"] is None
    del points["images/000004.png"]
    (tmp_path / "k.json").write_text(json.dumps({"predictions": points}))
    with pytest.raises(ValueError, match="1 pictures of the dataset have no entry .images/000004.png."):
        verify.main(verify.parse_args(chosen))


def test_what_passes_is_copied_as_a_valid_folder_by_the_stored_scores(folder, tmp_path, verifier_file, monkeypatch):
    report_module.verify_folder(folder, verifier_file)
    records = read_records(folder)
    limit = float(np.median([record["verification"]["iou_hand"] for record in records]))
    expected = [r for r in records if r["verification"]["iou_hand"] > limit]
    monkeypatch.setattr(verify, "BUILT_IN_VERIFIER", tmp_path / "absent")  # stored scores need no verifier
    words = [str(folder), "--keep", f"iou_hand>{limit}", "--out", str(tmp_path / "kept")]
    (tmp_path / "kept").mkdir()
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    (tmp_path / f"kept/.dataset.json.{ended.pid}@{platform.node()}.tmp").write_text("{")  # a copy that was killed began
    for _ in range(2):  # the second run finds all done
        verify.main(verify.parse_args(words))
    assert 0 < len(expected) < 20 and read_records(tmp_path / "kept") == expected
    problems = [p for p in check_folder(tmp_path / "kept").problems if "skeleton" not in p]
    assert not problems  # these skeletons are black; files, sizes and counts are what is meant
    assert len(read_records(folder)) == 20 and not list(tmp_path.glob("kept/**/*.tmp"))
    card = json.loads((tmp_path / "kept/dataset.json").read_text())
    assert card["yield"]["accepted"] == len(expected) and card["yield"]["rejected"] == 20 - len(expected)
    with pytest.raises(ValueError, match="kept holds something else than this selection"):
        verify.main(verify.parse_args([*words[:2], "iou_hand>=0", *words[3:]]))
    with pytest.raises(ValueError, match="nothing passes"):
        verify.main(verify.parse_args([*words[:2], "iou_hand>1", *words[3:]]))


def test_without_the_built_in_verifier_the_message_says_how_to_train_one(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(verify, "BUILT_IN_VERIFIER", tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="train one with .python -m hoi.verify train --data .* --verifier FILE"):
        verify.main(verify.parse_args([str(folder)]))


def test_conditions_are_comparisons_and_a_missing_score_does_not_pass():
    conditions = report_module.parse_keep(" iou_hand >0.8,pck>=0.9 ,keypoint_error_px<4e0")
    assert [str(c) for c in conditions] == ["iou_hand>0.8", "pck>=0.9", "keypoint_error_px<4"]
    good = {"iou_hand": 0.81, "pck": 0.9, "keypoint_error_px": 3.9}
    for scores, passes in (
        (good, 1), (good | {"iou_hand": 0.8}, 0), (good | {"pck": 0.89}, 0), (good | {"keypoint_error_px": None}, 0)
    ):  # fmt: skip
        assert len(report_module.choose([{"verification": scores}], conditions)) == passes
    assert not report_module.choose([{"verification": None}], conditions)


def test_a_cut_in_percent_is_of_what_a_perfect_picture_of_the_same_record_scores():
    conditions = report_module.parse_keep("iou_hand>90%, pck >= 50 %")
    assert [str(c) for c in conditions] == ["iou_hand>90%", "pck>=50%"]
    near, far = {"iou_hand": 0.73, "pck": 0.4}, {"iou_hand": 0.71, "pck": 0.4}
    perfect = {"iou_hand": 0.8, "pck": 0.8}
    records = [{"verification": scores | {"perfect": perfect}} for scores in (near, far)]
    records.append({"verification": near | {"perfect": None}})
    assert report_module.choose(records, conditions) == records[:1]
    with pytest.raises(ValueError, match="no record says what a perfect picture scores; score the folder again"):
        report_module.choose(records[2:], conditions)
    with pytest.raises(ValueError, match="keypoint_error_px has no percent of a perfect picture's; iou_hand, .* have"):
        report_module.parse_keep("keypoint_error_px<90%")


@pytest.mark.parametrize(
    "text", ["", "pck", "pck>", "pck=>0.5", "pck>high", "pck>0.5,", "0.5<pck", "pck>1 or 1", "pck>%"]
)
def test_anything_but_a_comparison_is_refused(text):
    with pytest.raises(ValueError, match="is not score>number"):
        report_module.parse_keep(text)


def test_a_list_of_pictures_chooses_them_without_scores_or_with(folder, tmp_path, verifier_file, monkeypatch):
    marked = tmp_path / "marked.txt"
    marked.write_text("images/000004.png\nimages/000001.png\n")
    monkeypatch.setattr(verify, "BUILT_IN_VERIFIER", tmp_path / "absent")  # a list alone needs no scores
    verify.main(verify.parse_args([str(folder), "--keep", str(marked), "--out", str(tmp_path / "kept")]))
    assert [record["index"] for record in read_records(tmp_path / "kept")] == [1, 4]
    report_module.verify_folder(folder, verifier_file)
    keep = ["--keep", f"iou_hand>2,{marked}", "--list", str(tmp_path / "both.txt")]
    verify.main(verify.parse_args([str(folder), *keep]))
    assert (tmp_path / "both.txt").read_text() == ""
    marked.write_text("images/000001.png\nimages/000099.png\n")
    with pytest.raises(ValueError, match=r"marked\.txt line 2: 'images/000099\.png' is no picture of this folder"):
        verify.main(verify.parse_args([str(folder), *keep]))


def test_several_folders_are_scored_each_by_itself(monkeypatch, tmp_path, verifier_file):
    folders = [make_folder(tmp_path / name, 2, 1) for name in ("a", "b")]
    verify.main(verify.parse_args([*map(str, folders), "--verifier", str(verifier_file)]))
    for folder in folders:
        assert all(record["verification"] for record in read_records(folder)) and (folder / "verification").is_dir()


def test_an_unknown_score_is_refused_with_the_names_that_there_are():
    with pytest.raises(ValueError, match="no score '__import__'; scores are iou_hand, .*pck"):
        report_module.parse_keep("__import__>0")


def test_keep_says_what_to_do_with_what_passes(capsys):
    for words in (["d", "--keep", "pck>0"], ["d", "--list", "f"], ["d", "--no-network"], []):
        with pytest.raises(SystemExit):
            verify.parse_args(words)
    assert "--keep needs --list FILE or --out DIR2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("d e --keep pck>0 --list f", "are for one DIR, whose pictures they name"),
        ("train --data d --out f --minutes 0", "--minutes is 0, expected more than 0"),  # not a file of random weights
        ("train --data d --out f --minutes nan", "--minutes is nan"),
    ],
)
def test_what_cannot_be_meant_is_refused(words, message, capsys):
    with pytest.raises(SystemExit):
        verify.parse_args(words.split())
    assert message in capsys.readouterr().err


def test_generated_pictures_are_measured_between_ceiling_and_floor(tmp_path, verifier_file):
    shaded = make_folder(tmp_path / "shaded", 6, seed=1)
    made = {"checkpoint": {"name": "x", "sha256": "0"}}
    generated, others = (make_folder(tmp_path / name, 6, seed=1, **made) for name in ("generated", "others"))
    rows = measure_generated.measure_folders(verifier_file, shaded, [generated, others])
    ceiling, floor, same, same_floor = list(rows.values())[:4]
    assert ceiling == same == rows["others"] != floor == same_floor  # the same pictures, the same truth
    table = measure_generated.scores_as_table(rows)
    assert "| generated / shaded | 1.000 |" in table and "| others / generated | 1.000 |" in table
    make_folder(tmp_path / "other", 6, text="A hand is grasping a red can")
    with pytest.raises(ValueError, match="does not hold the captions"):
        measure_generated.measure_folders(verifier_file, shaded, [tmp_path / "other"])
