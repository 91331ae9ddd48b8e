"""DexYCB in its original layout, rendered here so that the truth is known, read back as a dataset folder."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from real_layouts import INTRINSICS, SERIALS, SUBJECTS, project, write_dexycb, write_mano

import make_dataset
from hoi.data.check import check_folder
from hoi.data.folder import load_conditions, load_depth, load_image, load_object_mask, read_records
from hoi.geometry.hand import HandParams, load_hand
from hoi.sources.dexycb import SPLITS, DexYCB, read_yaml
from hoi.sources.frame import Rejected
from make_dataset import main, parse_args

HAND, OBJECT = [128, 128, 128], [153, 51, 51]
JOINTS = [k for k in range(21) if k % 4 or k == 0]  # not the fingertips


@pytest.fixture(scope="module")
def dexycb(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dexycb")
    arrays, mano = write_mano(folder)
    truth = write_dexycb(folder / "root", arrays)
    return folder / "root", mano, truth


def arguments(dexycb, out, words="", mano=True):
    root, path, _ = dexycb
    hand = ["--mano", str(path)] if mano else []
    fixed = ["--dexycb", str(root), *hand, "--size", "160", "--out", str(out), "--cameras", *SERIALS[:2]]
    return fixed + words.split()


def convert(dexycb, out, words="", mano=True):
    main(parse_args(arguments(dexycb, out, words, mano)))
    return read_records(out)


@pytest.fixture(scope="module")
def converted(dexycb, tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted")
    return folder, convert(dexycb, folder)


def hand_pose(record):
    return HandParams(*(np.array(record[key]) for key in ("global_orient", "hand_pose", "transl", "hand_betas")),
                    record["hand_side"])  # fmt: skip


def test_a_record_rendered_from_its_own_annotation_overlaps_the_source(converted, capsys):
    folder, records = converted
    mean = json.loads((folder / "dataset.json").read_text())["mean_rerender_iou"]
    with capsys.disabled():
        print(f"\nDexYCB layout, {len(records)} records at 160 px: mean IoU of a re-render with the source {mean}")
    assert mean["hand"] > 0.95 and mean["object"] > 0.95
    assert min(min(record["rerender_iou"].values()) for record in records) > 0.93


def test_hands_of_both_sides_keep_their_skin_to_a_hundredth_of_a_millimetre(dexycb, converted):
    _, mano, truth = dexycb
    hand = load_hand(mano)
    sides = set()
    for record in converted[1]:
        true = truth[record["source_frame"]]
        mesh = hand(hand_pose(record))
        skin = np.unique(mesh.faces)  # the other vertices of the small test hand carry nothing
        np.testing.assert_allclose(mesh.vertices[skin], true["vertices"][skin], atol=1e-5)
        np.testing.assert_allclose(record["hand_pose"], true["fingers"], atol=1e-6)
        np.testing.assert_allclose(record["transl"], true["pose_m"][48:], atol=1e-7)
        assert record["hand_side"] == true["side"] and record["hand_fit_mm"] < 0.01
        sides.add(record["hand_side"])
    assert sides == {"right", "left"}


def test_source_keypoints_are_kept_and_named_and_everything_moves_to_the_crop(dexycb, converted):
    _, mano, truth = dexycb
    for record in converted[1]:
        true = truth[record["source_frame"]]
        keypoints_3d = np.reshape(record["keypoints_3d"], (21, 3))
        np.testing.assert_allclose(keypoints_3d, true["joint_3d"], atol=1e-9)
        assert record["keypoint_convention"] == "openpose21, fingertips of manopth"
        assert np.abs(load_hand(mano)(hand_pose(record)).keypoints_3d - keypoints_3d)[JOINTS].max() < 1e-5
        left, top, right, bottom = record["crop_box"]
        side = max(right - left, bottom - top)
        corner = np.array([left - (side - right + left) // 2, top - (side - bottom + top) // 2])
        moved = (true["joint_2d"] + 0.5 - corner) * 160 / side - 0.5
        np.testing.assert_allclose(np.reshape(record["keypoints_2d"], (21, 2)), moved, atol=1e-4)
        again = project(keypoints_3d, np.reshape(record["intrinsics"], (3, 3)))
        np.testing.assert_allclose(again, moved, atol=1e-3)
        rows, columns = np.nonzero(np.isin(true["seg"], (14, 255)))
        assert (left, right) == (max(columns.min() - 50, 0), min(columns.max() + 51, 640))
        assert (top, bottom) == (max(rows.min() - 50, 0), min(rows.max() + 51, 480))


def test_the_pictures_of_a_record_show_the_same_pixels_of_the_source(dexycb, converted):
    folder, records = converted
    for record in records:
        true = dexycb[2][record["source_frame"]]
        conditions, image = load_conditions(folder, record), load_image(folder, record).astype(int)
        hand, held = ((conditions.segmentation == color).all(axis=-1) for color in (HAND, OBJECT))
        assert (conditions.segmentation[~hand & ~held] == 0).all()
        inner = image[held & ~_grown(~held)]
        assert np.abs(np.median(inner, axis=0) - [200, 30, 30]).max() < 6
        assert np.abs(np.median(image[hand & ~_grown(~hand)], axis=0) - [190, 150, 130]).max() < 6
        left, top, right, bottom = record["crop_box"]
        side = max(right - left, bottom - top)
        # Areas: the crop shows the source's pixels, each (160 / side) squared as large.
        box = true["seg"][top:bottom, left:right]
        seen = np.array([(box == label).sum() for label in (255, 14)]) * (160 / side) ** 2
        np.testing.assert_allclose([hand.sum(), held.sum()], seen, rtol=0.03)
        depth = load_depth(folder, record)
        distance = true["object"][0][:, 2]
        assert distance.min() - 0.001 <= np.median(depth[held]) <= distance.max()
        mask = load_object_mask(folder, record)
        assert mask[held & ~_grown(~held)].all() and record["object_path"] == "objects/025_mug.ply"
        np.testing.assert_allclose(np.reshape(record["object_to_camera"], (4, 4))[:3], true["pose_y"], atol=1e-7)
        assert record["text"] == "A hand is grasping a mug" and record["category"] == "mug"
        assert record["contact"] is None and record["normal_source"] == "rendered"


def _grown(mask, by=4):
    from scipy.ndimage import binary_dilation

    return binary_dilation(mask, iterations=by)


def test_a_wrong_pose_space_is_noticed(dexycb, converted, tmp_path, capsys):
    _, mano, truth = dexycb
    with np.load(mano) as stored:
        np.savez(tmp_path / "other.npz", **{**stored, "hands_mean": -3 * stored["hands_mean"]})
    convert((dexycb[0], tmp_path / "other.npz", truth), tmp_path / "out", "--count 1")
    assert "WARNING: posed joints lie off the source's own, right hands" in capsys.readouterr().out
    convert(dexycb, converted[0])
    assert "WARNING" not in capsys.readouterr().out


def test_frames_without_a_hand_are_counted_with_their_reason(dexycb, converted):
    folder, records = converted
    truth = dexycb[2]
    description = json.loads((folder / "dataset.json").read_text())
    assert description["rejected"] == {"the source has no hand in it": sum(not t["has_hand"] for t in truth.values())}
    assert description["counts"]["records"] == len(records) == sum(t["has_hand"] for t in truth.values())
    lines = [json.loads(line) for line in (folder / "rejected.jsonl").read_text().splitlines()]
    assert {line["index"] for line in lines} | {r["index"] for r in records} == set(range(len(truth)))


def test_a_hand_without_a_pose_is_another_reason_than_no_hand(dexycb, tmp_path):
    shutil.copytree(dexycb[0], tmp_path / "root")
    source = DexYCB(tmp_path / "root", cameras=SERIALS[:2])
    for number, name in enumerate(map(source.frame_name, range(len(source)))):
        *folders, frame = name.split("/")
        path = (tmp_path / "root").joinpath(*folders) / f"labels_{frame}.npz"
        with np.load(path) as stored:
            np.savez(path, **{**stored, "pose_m": np.zeros((1, 51), np.float32)})
        reason = "no pose of the hand in it" if dexycb[2][name]["has_hand"] else "no hand in it"
        with pytest.raises(Rejected, match=f"^the source has {reason}"):
            source.read(number)


def test_the_folder_passes_its_own_check(dexycb, converted):
    report = check_folder(converted[0], load_hand(dexycb[1]))
    assert report.ok, report


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*")
            if path.is_file() and path.name != "dataset.json"}  # fmt: skip


def test_two_workers_and_an_interrupted_run_write_the_same_folder(dexycb, converted, tmp_path):
    convert(dexycb, tmp_path, "--count 3")
    lines = tmp_path / "metadata.jsonl"
    lines.write_bytes(lines.read_bytes()[:-40])  # as a crash leaves it
    command = [sys.executable, "make_dataset.py", *arguments(dexycb, tmp_path, "--workers 2")]
    subprocess.run(command, cwd=Path(make_dataset.__file__).parent, check=True, timeout=600, capture_output=True)
    assert contents(tmp_path) == contents(converted[0])


def test_without_a_mano_file_the_labels_of_the_source_still_give_records(dexycb, converted, tmp_path):
    with pytest.raises(ValueError, match=r"(?s)DexYCB's hands are MANO's: pass --mano FILE, or choose --normals "
                       r"sensor-depth.*MANO_RIGHT.pkl.*licence forbids"):  # fmt: skip
        convert(dexycb, tmp_path / "refused", mano=False)
    records = convert(dexycb, tmp_path / "out", "--normals sensor-depth", mano=False)
    for record, other in zip(records, converted[1], strict=True):
        assert record["hand_pose"] is record["transl"] is record["hand_model"] is None
        assert record["keypoints_2d"] == other["keypoints_2d"] and record["hand_side"] == other["hand_side"]
        ours, theirs = (load_conditions(folder, r) for folder, r in ((tmp_path / "out", record), (converted[0], other)))
        np.testing.assert_array_equal(ours.segmentation, theirs.segmentation)
        np.testing.assert_array_equal(ours.skeleton, theirs.skeleton)
        # Normals of the sensor's depth, away from edges, against those of the meshes.
        held = (theirs.segmentation == OBJECT).all(axis=-1)
        inside = held & ~_grown(~held, 8) & (theirs.normal > 0).any(axis=-1)
        if inside.any():
            difference = np.abs(ours.normal[inside].astype(int) - theirs.normal[inside]).max(axis=-1)
            assert np.median(difference) < 12  # grey levels; 12 is 5 degrees


def test_strokes_of_the_source_are_enlarged_with_the_picture(dexycb, converted, tmp_path):
    records = convert(dexycb, tmp_path, "--strokes source --count 1")
    coarse, fine = (load_conditions(folder, r).skeleton for folder, r in ((tmp_path, records[0]),
                                                                         (converted[0], converted[1][0])))  # fmt: skip
    assert (coarse.any(axis=-1) & fine.any(axis=-1)).sum() > 0.6 * fine.any(axis=-1).sum()
    assert not np.array_equal(coarse, fine)
    assert check_folder(tmp_path, load_hand(dexycb[1])).ok


def test_subsets_are_what_they_say_and_shuffling_is_a_sample(dexycb):
    root, _, truth = dexycb
    names = list(truth)
    assert [DexYCB(root, cameras=[SERIALS[1]]).read(k).name for k in range(2)] == names[2:4]
    assert len(DexYCB(root, subjects=["2"])) == len(DexYCB(root, subjects=[SUBJECTS[1]])) == 16
    assert len(DexYCB(root, frames=slice(1, None))) == 16 and len(DexYCB(root, sequences=["20200813_141754"])) == 16
    with pytest.raises(ValueError, match="no subject 7; there are"):
        DexYCB(root, subjects=["7"])
    with pytest.raises(ValueError, match="no camera 1234; there are 836212060125"):
        DexYCB(root, cameras=["1234"])
    with pytest.raises(ValueError, match="no sequence x among"):
        DexYCB(root, sequences=["x"])
    with pytest.raises(ValueError, match="no split 's4 train'"):
        DexYCB(root, split=("s4", "train"))
    with pytest.raises(ValueError, match="has 1 sequences; a split goes by their place among all 100"):
        DexYCB(root, split=("s0", "train"))


def test_splits_have_the_published_numbers(tmp_path):
    (tmp_path / "calibration").mkdir()
    meta = (f"mano_calib: [a]\nmano_sides: [right]\nnum_frames: 1\nserials: {list(SERIALS)}\nycb_grasp_ind: 0\n"
            "ycb_ids: [1]\n")  # fmt: skip
    for subject in ("20200709-subject-01", "20200928-subject-07"):
        for k in range(100):
            folder = tmp_path / subject / f"20200709_{k:06d}"
            folder.mkdir(parents=True)
            (folder / "meta.yml").write_text(meta)
    # Frames of subjects 1 and 7: sequences x cameras.
    expected = {"s0 train": 160 * 8, "s0 val": 20 * 8, "s0 test": 20 * 8, "s1 train": 100 * 8, "s1 val": 100 * 8,
                "s1 test": 0, "s2 train": 200 * 6, "s2 val": 200, "s2 test": 200, "s3 train": 150 * 8,
                "s3 val": 20 * 8, "s3 test": 30 * 8}  # fmt: skip
    chosen = {"s0 train": DexYCB(tmp_path, ("s0", "train")), "s3 val": DexYCB(tmp_path, ("s3", "val")),
              "s2 test": DexYCB(tmp_path, ("s2", "test"))}  # fmt: skip
    for name, source in chosen.items():
        assert len(source) == expected[name], name
    takes = {int(s.folder.name[-6:]) % 5 for s in chosen["s0 train"].recordings}
    objects = {int(s.folder.name[-6:]) // 5 for s in chosen["s3 val"].recordings}
    assert takes == {0, 1, 2, 3} and objects == {3, 19} and set(chosen["s2 test"].rows[:, 1]) == {7}
    for (setup, part), (subjects, cameras, objects, takes) in SPLITS.items():
        count = sum(subject in subjects for subject in (1, 7)) * len(cameras) * len(objects) * len(takes)
        assert count == expected[f"{setup} {part}"], (setup, part)


def test_calibration_with_python_tuples_reads_as_pyyaml_reads_it_and_runs_nothing(dexycb, tmp_path):
    yaml = pytest.importorskip("yaml")
    path = dexycb[0] / "calibration/extrinsics_20200702_151821/extrinsics.yml"
    assert read_yaml(path)["extrinsics"].keys() == yaml.unsafe_load(path.read_text())["extrinsics"].keys()
    for serial, numbers in yaml.unsafe_load(path.read_text())["extrinsics"].items():
        assert list(read_yaml(path)["extrinsics"][serial]) == list(numbers)
    bad = tmp_path / "bad.yml"
    bad.write_text(f"betas: !!python/object/apply:os.system ['touch {tmp_path / 'ran'}']\n")
    with pytest.raises(ValueError, match="cannot be read as plain YAML"):
        read_yaml(bad)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(("change", "message"), [
    ({"ycb_ids": "[22]", "ycb_grasp_ind": "0"}, "meta.yml: expected num_frames, ycb_ids from 1 to 21"),
    ({"mano_sides": "[both]"}, "meta.yml: expected num_frames"),
    ({"num_frames": None}, "meta.yml: expected num_frames"),
])  # fmt: skip
def test_a_bad_meta_file_is_named(change, message, tmp_path):
    values = {"mano_calib": "[a]", "mano_sides": "[right]", "num_frames": "1", "ycb_grasp_ind": "0", "ycb_ids": "[1]"}
    values |= change
    (tmp_path / "calibration").mkdir()
    (tmp_path / SUBJECTS[0] / "s").mkdir(parents=True)
    meta = tmp_path / SUBJECTS[0] / "s" / "meta.yml"
    meta.write_text("".join(f"{key}: {value}\n" for key, value in values.items() if value is not None))
    with pytest.raises(ValueError, match=message):
        DexYCB(tmp_path)


def test_damaged_files_reject_their_frame_only(dexycb, tmp_path):
    root, mano, truth = dexycb
    copy = tmp_path / "root"
    shutil.copytree(root, copy)
    folder = copy / SUBJECTS[0] / f"{SUBJECTS[0][:8]}_141754" / SERIALS[1]
    (folder / "labels_000000.npz").write_bytes(b"no zip file")
    (folder / "color_000001.jpg").write_bytes(b"")
    other = copy / SUBJECTS[1] / f"{SUBJECTS[1][:8]}_141754" / SERIALS[1]
    folders = [copy / subject / f"{subject[:8]}_141754" / SERIALS[0] for subject in SUBJECTS]
    saturated, small = (path / "aligned_depth_to_color_000000.png" for path in folders)
    Image.fromarray(np.full((480, 640), 65535, dtype=np.uint16)).save(saturated)
    Image.fromarray(np.full((48, 64), 700, dtype=np.uint16)).save(small)
    (other / "color_000000.jpg").unlink()
    Image.new("RGB", (100, 80)).save(other / "color_000001.jpg")
    records = convert((copy, mano, truth), tmp_path / "out", "--shuffle")
    reasons = json.loads((tmp_path / "out/dataset.json").read_text())["rejected"]
    faults = ("the label file is damaged", "the picture is damaged", "the picture is missing",
              "the picture has another size", "the depth file has another size")  # fmt: skip
    assert reasons == {"the source has no hand in it": 2, **dict.fromkeys(faults, 1)}
    assert [record["source_frame"] for record in records] == [f"{SUBJECTS[0]}/20200709_141754/{SERIALS[0]}/000000"]
    shuffled = np.array(list(truth))[np.random.default_rng(0).permutation(8)]
    assert shuffled[records[0]["index"]] == records[0]["source_frame"]
    assert not load_depth(tmp_path / "out", records[0]).any()  # 65535 is a sensor without an answer


@pytest.mark.parametrize(("words", "message"), [
    ("--dexycb nowhere --normals sensor-depth", "nowhere has no folder calibration: it is not the root of DexYCB"),
    ("--normals depth-files --dexycb {root}", "needs --depth-files DIR"),
    ("--captions x.csv", "for real pictures"),
    ("--dexycb {root} --csv x.csv", "not allowed with argument"),
    ("--csv x.csv --subjects 1", "are for --dexycb"),
    ("--dexycb {root} --frame-range a:b", "no START:STOP:STEP"),
    ("--dexycb {root} --mano {mano} --models nowhere", "1 object models are missing, the first is nowhere/025_mug"),
])  # fmt: skip
def test_a_bad_request_gets_a_message_and_a_failing_exit_code(words, message, dexycb, tmp_path, capsys):
    words = words.format(root=dexycb[0], mano=dexycb[1])
    with pytest.raises(SystemExit) as exit_status:
        make_dataset.run([*words.split(), "--out", str(tmp_path / "out")])
    said = capsys.readouterr()
    assert re.search(message, f"{exit_status.value.code}\n{said.err}"), said.err
    assert exit_status.value.code not in (0, None) and not (tmp_path / "out").exists()


def test_the_source_intrinsics_are_read(dexycb):
    np.testing.assert_array_equal(DexYCB(dexycb[0]).read(0).intrinsics, INTRINSICS)
