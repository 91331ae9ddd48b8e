"""The authors' CSV in its original layout, and the ways to normals, read back with known truth."""

import json

import numpy as np
import pytest
import torch._dynamo  # noqa: F401 - transformers loads it; it must come before GL's driver, see FrameConverter
from PIL import Image
from real_layouts import INTRINSICS, SERIALS, draw, project, write_dexycb, write_mano, write_official_csv

import make_dataset
from hoi.conditions import draw_normal, normals_from_inverse_depth
from hoi.data.folder import load_conditions, load_image, read_records
from hoi.sources.frame import Crop, Rejected
from hoi.sources.normals import DepthEstimator, normals_from_depth, read_depth_file, resize_normals
from hoi.sources.official_csv import OfficialCSV, label_map_of
from make_dataset import main, parse_args

HAND, OBJECT = [128, 128, 128], [153, 51, 51]


@pytest.fixture(scope="module")
def dexycb(tmp_path_factory):
    """Four frames of one camera; the second is without a hand."""
    folder = tmp_path_factory.mktemp("dexycb")
    arrays, mano = write_mano(folder)
    return folder / "root", mano, write_dexycb(folder / "root", arrays, 4, ("right",), SERIALS[:1])


def convert(words, out):
    main(parse_args([*map(str, words), "--size", "160", "--out", str(out)]))
    return read_records(out), json.loads((out / "dataset.json").read_text())


def labels_of(folder, record):
    segmentation = load_conditions(folder, record).segmentation
    return (segmentation == HAND).all(axis=-1) + 2 * (segmentation == OBJECT).all(axis=-1)


@pytest.fixture(scope="module")
def tiny_dpt(tmp_path_factory):
    """A randomly initialised DPT in the format of transformers."""
    transformers = pytest.importorskip("transformers")
    import torch

    torch.manual_seed(0)
    config = transformers.DPTConfig(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32, image_size=64, patch_size=16,
        backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8, 8, 8, 8], fusion_hidden_size=8,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("dpt")
    transformers.DPTForDepthEstimation(config).save_pretrained(folder)
    return folder


def test_masks_and_boxes_of_a_csv_are_of_the_photograph_as_its_exif_says_it_was_held(tmp_path):
    """The same frame, once turned by its camera and once by EXIF alone: as the authors' reader, OpenCV, has it."""
    write_official_csv(tmp_path)
    source, photograph = OfficialCSV(tmp_path / "train.csv"), tmp_path / "mask/image.jpg"
    upright = source.read(0)
    with Image.open(photograph) as picture:
        lying, exif = picture.transpose(Image.Transpose.ROTATE_90), Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to see it as it was
    lying.save(photograph, exif=exif, quality=95)
    frame = source.read(0)
    np.testing.assert_array_equal(frame.label_map, upright.label_map)
    assert frame.box == upright.box and np.abs(frame.image.astype(int) - upright.image).mean() < 10


def test_the_csv_gives_what_it_has_and_null_for_the_rest(tiny_dpt, tmp_path):
    labels = write_official_csv(tmp_path / "csv")
    records, description = convert(["--csv", tmp_path / "csv/train.csv", "--depth-model", tiny_dpt], tmp_path / "out")
    assert description["rejected"] == {
        "its box is no box": 1, "OakInk: two people, or a handover": 1, "the picture is missing": 1}
    assert [r["text"] for r in records] == ["A hand is grasping a toy car", "A red car, in a hand"]
    assert [r["category"] for r in records] == ["toy car", None]
    record = records[0]
    unknown = ("intrinsics", "object_to_camera", "object_path", "hand_pose", "transl", "keypoints_3d", "keypoints_2d",
               "depth_file_name", "object_mask_file_name", "hand_side", "contact")  # fmt: skip
    assert all(record[key] is None for key in unknown) and record["normal_source"] == "estimated"
    found = labels_of(tmp_path / "out", record)
    # 350 x 420 pixels in a square of 420, shrunk to 160, 35 black rows above and below.
    square = np.pad(labels[100:450, 50:470], ((35, 35), (0, 0)))
    nearest = ((np.arange(160) + 0.5) * 420 / 160).astype(int)
    assert (found == square[np.ix_(nearest, nearest)]).mean() > 0.995
    image, conditions = load_image(tmp_path / "out", record), load_conditions(tmp_path / "out", record)
    assert not image[:12].any() and image[15].any() and not conditions.normal[found == 0].any()
    assert np.median(conditions.skeleton[found == 1]) == 200
    with Image.open(tmp_path / "csv/mask/image.jpg") as picture:
        whole = np.zeros((420, 420, 3), dtype=np.uint8)
        whole[35:385] = np.asarray(picture)[100:450, 50:470]
    expected = np.asarray(Image.fromarray(whole).resize((160, 160), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(image, expected)


def test_the_estimated_normals_are_the_networks_depth_through_the_papers_recipe(tiny_dpt, tmp_path):
    transformers = pytest.importorskip("transformers")
    import torch

    image = np.random.default_rng(0).integers(0, 255, (160, 160, 3), dtype=np.uint8)
    network = transformers.AutoModelForDepthEstimation.from_pretrained(tiny_dpt).eval()
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 127.5 - 1
    pixels = torch.nn.functional.interpolate(pixels, (64, 64), mode="bicubic")
    expected = network(pixel_values=pixels).predicted_depth[0].detach().numpy()
    np.testing.assert_allclose(DepthEstimator(str(tiny_dpt))(image), expected, atol=1e-5)
    on_meta = DepthEstimator(str(tiny_dpt), "meta")  # no numbers there; they are asked for at the end
    with pytest.raises(NotImplementedError, match="meta"):
        on_meta(image)
    with pytest.raises(ValueError, match="no DPT depth network could be loaded from '.*nowhere'"):
        DepthEstimator(str(tmp_path / "nowhere"))


def test_labels_survive_jpeg_and_end_where_the_binary_mask_ends():
    mask = np.full((2, 3, 3), 128, dtype=np.uint8)
    mask[0], mask[1, 2] = (140, 60, 45), (9, 0, 12)  # colours as JPEG leaves them
    seg = np.array([[255, 250, 3], [255, 0, 255]], dtype=np.uint8)
    assert label_map_of(mask, seg).tolist() == [[2, 2, 0], [1, 0, 0]]


def test_the_regularisation_csv_gives_scenery(tmp_path):
    for k, side in enumerate((64, 64, 50)):
        Image.new("RGB", (64, side), (k, 2, 3)).save(tmp_path / f"{k}.png")
    (tmp_path / "reg.csv").write_text('image,sentence\n0.png,"A beach, at sunset."\n1.png,Snow.\n2.png,Low.\n')
    records, description = convert(["--csv", tmp_path / "reg.csv"], tmp_path / "out")
    assert [r["text"] for r in records] == ["A beach, at sunset.", "Snow."]
    assert description["rejected"] == {"a scenery picture is not square": 1}
    assert all(r["skeleton_file_name"] is None and r["category"] is None for r in records)
    assert (load_image(tmp_path / "out", records[1]) == [1, 2, 3]).all()


def scenery_csv(folder, *names):
    """A CSV of scenery whose pictures are there."""
    folder.mkdir()
    for name in names:
        Image.new("RGB", (64, 64), (1, 2, 3)).save(folder / f"{name}.png")
    (folder / "reg.csv").write_text("image,sentence\n" + "".join(f"{name}.png,A beach.\n" for name in names))
    return folder / "reg.csv"


def test_another_csv_with_as_many_rows_is_another_job_and_the_same_one_elsewhere_is_not(tmp_path):
    first, other = (scenery_csv(tmp_path / name, *names) for name, *names in (("one", "a", "b"), ("two", "a", "c")))
    convert(["--csv", first], tmp_path / "out")
    with pytest.raises(ValueError, match="another job .frames: 'a to b' there, 'a to c' now"):
        convert(["--csv", other], tmp_path / "out")
    first.parent.rename(tmp_path / "moved")
    assert len(convert(["--csv", tmp_path / "moved" / "reg.csv"], tmp_path / "out")[0]) == 2


def test_another_mano_file_of_the_same_name_and_other_depth_files_are_other_jobs(dexycb, tmp_path):
    root, mano, _ = dexycb
    (tmp_path / "other").mkdir()
    other = tmp_path / "other" / mano.name
    other.write_bytes(mano.read_bytes() + b"behind the pickle's end")
    words = ["--dexycb", root, "--normals", "sensor-depth", "--count", "1", "--mano"]
    convert([*words, mano], tmp_path / "out")
    with pytest.raises(ValueError, match="another job .hand: other content"):
        convert([*words, other], tmp_path / "out")
    jobs = []
    for name in ("one", "two"):
        (tmp_path / name / "depth").mkdir(parents=True)
        args = parse_args(["--dexycb", str(root), "--mano", str(mano), "--normals", "depth-files", "--depth-files",
                           str(tmp_path / name / "depth")])  # fmt: skip
        jobs.append(make_dataset.describe_pictures(args, make_dataset.open_source(args))["job"])
    assert [name for name in jobs[0] if jobs[0][name] != jobs[1][name]] == ["depth_files"]


def test_a_frame_whose_file_was_missing_or_damaged_is_tried_again_and_no_other(tmp_path, monkeypatch):
    path = scenery_csv(tmp_path / "source", "a", "b", "c", "d")
    Image.new("RGB", (64, 32)).save(tmp_path / "source" / "c.png")
    good = (tmp_path / "source" / "b.png").read_bytes()
    convert(["--csv", path], tmp_path / "whole")
    (tmp_path / "source" / "b.png").unlink()
    (tmp_path / "source" / "d.png").write_bytes(good[:40])
    reasons = convert(["--csv", path], tmp_path / "out")[1]["rejected"]
    assert reasons == {"the picture is missing": 1, "a scenery picture is not square": 1, "the picture is damaged": 1}
    before = (tmp_path / "out" / "rejected.jsonl").read_bytes()
    convert(["--csv", path], tmp_path / "out")
    assert (tmp_path / "out" / "rejected.jsonl").read_bytes() == before  # the same as before is not said again
    for name in "bd":
        (tmp_path / "source" / f"{name}.png").write_bytes(good)
    read = []
    with monkeypatch.context() as patch:
        patch.setattr(OfficialCSV, "read", lambda self, k, call=OfficialCSV.read: read.append(k) or call(self, k))
        records, description = convert(["--csv", path], tmp_path / "out")
    assert read == [1, 3] and [record["index"] for record in records] == [0, 1, 3]
    assert description["rejected"] == {"a scenery picture is not square": 1}
    for name in ("rejected.jsonl", "metadata.jsonl", "grid.png"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("absolute", ["in the CSV's folder", "elsewhere"])
def test_the_given_folder_of_depth_files_is_read_for_absolute_paths_too(tmp_path, absolute):
    folder = tmp_path / "csv"
    write_official_csv(folder)
    rows = (folder / "train.csv").read_text().replace("mask/", f"{folder}/mask/")
    path = (folder if absolute == "in the CSV's folder" else tmp_path / "far") / "absolute.csv"
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(rows.splitlines()[:2]) + "\n")
    relative = "mask/image" if path.parent == folder else f"{folder}/mask/image".lstrip("/")
    given, beside = tmp_path / "depth" / f"{relative}.npy", folder / "mask" / "image.npy"
    given.parent.mkdir(parents=True)
    slope = np.linspace(100, 900, 420)
    np.save(given, np.tile(slope, (420, 1)))
    np.save(beside, np.tile(slope[:, None], (1, 420)))
    words = ["--csv", path, "--normals", "depth-files", "--depth-files", tmp_path / "depth"]
    (record,), _ = convert(words, tmp_path / "out")
    seen = load_conditions(tmp_path / "out", record)
    expected = draw_normal(resize_normals(normals_from_inverse_depth(np.load(given)), 160), seen.segmentation.any(-1))
    np.testing.assert_array_equal(seen.normal, expected)


@pytest.mark.parametrize(("text", "message"), [
    ("image,skeleton,sentence\n", "has no column top, bottom, left, right, seg, mask"),
    ("picture,words\n", "has no column sentence|has no column image"),
    ("image,sentence\na.png,A hand, a mug\n", "line 2 has another number of cells than the 2.*need quotes"),
])  # fmt: skip
def test_a_csv_that_does_not_fit_is_refused_with_its_line(text, message, tmp_path):
    (tmp_path / "bad.csv").write_text(text)
    with pytest.raises(SystemExit, match=message):
        make_dataset.run(["--csv", str(tmp_path / "bad.csv"), "--out", str(tmp_path / "out")])


def test_the_csv_cannot_render_normals_and_says_what_else_there_is(tmp_path):
    write_official_csv(tmp_path)
    with pytest.raises(SystemExit, match="no 3D annotation to render normals from; choose --normals estimated, depth"):
        make_dataset.run(["--csv", str(tmp_path / "train.csv"), "--normals", "rendered", "--out", str(tmp_path / "o")])


def test_normals_of_a_tilted_plane_with_holes_are_exact():
    rows, columns = np.mgrid[:120, :160]
    rays = np.stack([columns, rows, np.ones_like(rows)], axis=-1) @ np.linalg.inv(INTRINSICS).T
    normal = np.array([0.5, -0.3, -0.8]) / np.linalg.norm([0.5, -0.3, -0.8])
    depth = -0.5 / (rays @ normal)  # of the plane normal . X = -0.5
    holes = np.random.default_rng(0).uniform(size=depth.shape) < 0.3
    label_map = np.zeros(depth.shape, dtype=np.uint8)
    label_map[20:100, 30:130] = 2
    normals = normals_from_depth(np.where(holes, 0, depth), label_map, INTRINSICS)
    np.testing.assert_allclose(normals[label_map == 2], np.tile(normal, (8000, 1)), atol=1e-6)
    assert not normals[label_map == 0].any()


def test_depth_files_in_metres_and_relative_give_their_normals(dexycb, tmp_path):
    root, mano, truth = dexycb
    in_metres, _, of_crop, of_another_size = (tmp_path / "depth" / name for name in truth)
    in_metres.parent.mkdir(parents=True)
    Image.fromarray(np.rint(next(iter(truth.values()))["depth"] * 1000).astype(np.uint16)).save(f"{in_metres}.png")
    relative = np.random.default_rng(0).uniform(100, 900, (160, 160)).cumsum(axis=0)
    np.save(f"{of_crop}.npy", relative)
    np.save(f"{of_another_size}.npy", np.zeros((5, 7)))
    words = ["--dexycb", root, "--cameras", SERIALS[0], "--mano", mano, "--normals"]
    records, description = convert([*words, "depth-files", "--depth-files", tmp_path / "depth"], tmp_path / "out")
    assert [record["index"] for record in records] == [0, 2]
    assert description["rejected"]["the depth file has another size"] == 1
    rendered, _ = convert([*words, "rendered"], tmp_path / "rendered")
    ours, theirs = (load_conditions(tmp_path / folder, records[0]) for folder in ("out", "rendered"))
    held = (theirs.segmentation == OBJECT).all(axis=-1)
    assert np.median(np.abs(ours.normal[held].astype(int) - theirs.normal[held])) < 8
    ours = load_conditions(tmp_path / "out", records[1])
    expected = draw_normal(normals_from_inverse_depth(relative), ours.segmentation.any(axis=-1))
    np.testing.assert_array_equal(ours.normal, expected)
    with pytest.raises(Rejected, match="the depth file is missing"):
        read_depth_file(tmp_path / "depth", "nothing")


def test_crops_move_pictures_labels_points_and_cameras_alike():
    """A dot drawn in the picture is found where points() and intrinsics() put it."""
    picture = np.zeros((480, 640, 3), dtype=np.uint8)
    vertices = np.array([[0.0, 0.0, 0.5], [0.002, 0, 0.5], [0, 0.002, 0.5]]) + [0.02, 0.03, 0]
    labels, _, _ = draw(vertices, np.array([[0, 1, 2], [0, 2, 1]]), [])
    picture[labels == -1] = 255
    crop = Crop(250, 180, 430, 300, 540)
    cut = crop.cut_picture(picture)[..., 0] > 127
    assert (cut == (crop.cut_map((labels == -1).astype(int)) > 0)).mean() > 0.999
    middle = np.argwhere(cut).mean(axis=0)[::-1]
    corners = project(vertices)
    np.testing.assert_allclose(crop.points(corners), project(vertices, crop.intrinsics(INTRINSICS)), atol=1e-9)
    np.testing.assert_allclose(middle, crop.points(corners).mean(axis=0), atol=1.5)
