"""python -m hoi.metrics: the whole way from folders and files to the table, each number against a plain computation."""

import json
import shutil
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import trimesh
from PIL import Image
from safetensors.torch import save_file

from hoi.metrics import __main__ as metrics
from hoi.metrics import flicker
from hoi.metrics.features import find_pictures
from hoi.metrics.poses import true_objects
from hoi.verify.verifier import Verifier, save_verifier

TINY_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
TEXTS = ["a red mug on the beach", "a green bowl", "a blue can " + "with many words " * 40]


def draw(path: Path, seed: int) -> None:
    """Soft blobs of a seed of their own, 40 x 48 pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    blobs = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    Image.fromarray(blobs).resize((48, 40), Image.Resampling.BICUBIC).save(path)


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A plain folder, with a sub-folder."""
    folder = tmp_path_factory.mktemp("real")
    for i in range(40):
        draw(folder / ("more" if i % 2 else "") / f"{i}.png", 100 + i)
    return folder


@pytest.fixture(scope="module")
def fake(tmp_path_factory):
    """A dataset folder of 30 pictures, written by hand; record 30 is conditions only."""
    folder = tmp_path_factory.mktemp("fake")
    grid = np.stack([np.linspace(4, 44, 21), np.tile([5, 15, 25], 7)], axis=1)
    lines = []
    for i in range(31):
        name = f"images/{i:06d}.png" if i < 30 else None
        if name:
            draw(folder / name, i)
        lines.append({"file_name": name, "index": i, "text": TEXTS[i % 3], "category": ["mug", "can"][i % 2],
                      "contact": i % 5 > 0, "keypoints_2d": grid.ravel().tolist(), "keypoints_3d": None})  # fmt: skip
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def run(out: Path, *arguments) -> dict:
    metrics.main([*map(str, arguments), "--out", str(out), "--workers", "0"])
    return json.loads((out / "metrics.json").read_text())


def test_several_folders_are_one_set_whose_pictures_are_named_from_above(real, fake, tmp_path):
    copy = shutil.copytree(fake, tmp_path / "copy")
    both = find_pictures([fake, copy], 1)
    assert len(both) == 60 and [r["text"] for r in both.records] == 2 * [r["text"] for r in both.records[:30]]
    assert [both.folder / record["file_name"] for record in both.records] == both.paths
    assert both.paths[30:] == [copy.resolve() / f"images/{k:06d}.png" for k in range(30)]
    plain = find_pictures([real, fake / "images"], 1)
    assert len(plain) == 70 and plain.records is None
    assert plain.digest() == find_pictures([fake / "images", real], 1).digest() != find_pictures(real, 1).digest()
    with pytest.raises(ValueError, match="holds dataset folders; name one of them, such as .*, or several alone"):
        find_pictures([real, fake], 1)


def by_name(report: dict) -> dict[str, dict]:
    return {number["name"]: number for number in report["numbers"]}


def covariances_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Frechet distance by eigenvalues of the product of covariances, as the definition has it."""
    s1, s2 = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    roots = np.sqrt(np.linalg.eigvals(s1 @ s2).astype(complex)).real.sum()
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s1) + np.trace(s2) - 2 * roots


@pytest.fixture(scope="module")
def clip_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    (folder / "tiny-scorer.json").write_text(json.dumps(TINY_CLIP))
    open_clip.add_model_config(folder)
    torch.manual_seed(0)
    model = open_clip.create_model("tiny-scorer", pretrained=None).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, folder / "clip.safetensors")
    return folder / "clip.safetensors", model


def test_clip_score_is_the_weighted_cosine_of_open_clip(clip_file, real, fake, tmp_path):
    path, model = clip_file
    report = run(tmp_path, "--fake", fake, "--real", real, "--clip", "tiny-scorer", path)
    preprocess, tokenizer = open_clip.image_transform(32, is_train=False), open_clip.get_tokenizer("tiny-scorer")

    def encoded(paths) -> torch.Tensor:
        pictures = torch.stack([preprocess(Image.open(path).convert("RGB")) for path in paths])
        with torch.no_grad():
            return model.encode_image(pictures).double()

    images = encoded(sorted((fake / "images").iterdir()))
    with torch.no_grad():
        read = model.encode_text(tokenizer(["A photo depicts " + TEXTS[i % 3] for i in range(30)])).double()
    scores = 2.5 * torch.cosine_similarity(images, read).clamp(min=0)
    measured = by_name(report)["CLIPScore (tiny-scorer)"]
    assert measured["value"] == pytest.approx(scores.mean().item(), rel=1e-4)
    assert measured["n"] == 30
    half = 1.96 * scores.std(correction=0).item() / 30**0.5
    assert measured["high"] - measured["low"] == pytest.approx(2 * half, rel=0.25)
    distance = covariances_distance(images.numpy(), encoded(real.rglob("*.png")).numpy())
    assert by_name(report)["Frechet distance (tiny-scorer)"]["value"] == pytest.approx(distance, rel=1e-3)
    assert report["files"]["clip"]["file"] == str(path) and len(report["files"]["clip"]["sha256"]) == 64


def test_frechet_distance_on_the_verifier(real, fake, tmp_path):
    torch.manual_seed(1)
    verifier = Verifier(["beach", "snow"], side=32).eval()
    save_verifier(tmp_path / "verifier.safetensors", verifier)
    verifier.half().float()  # the file is in half precision
    words = ("--fake", fake, "--real", real, "--verifier", tmp_path / "verifier.safetensors")
    measured = by_name(run(tmp_path / "out", *words))["Frechet distance (verifier)"]

    def encode(picture: Image.Image) -> np.ndarray:
        pixels = np.array(picture.convert("RGB").resize((32, 32), Image.Resampling.BILINEAR))
        with torch.no_grad():
            features = verifier(torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1).features[0]
        return features.double().numpy()

    sets = [np.stack([encode(Image.open(path)) for path in folder.rglob("*.png")]) for folder in (fake, real)]
    assert measured["value"] == pytest.approx(covariances_distance(*sets), rel=1e-3, abs=1e-8)
    assert measured["low"] < measured["value"] < measured["high"]


def predictions(fake: Path, entry) -> str:
    names = [f"images/{i:06d}.png" for i in range(30)]
    return json.dumps({"predictions": {name: [entry(i)] for i, name in enumerate(names)}})


def test_predictions_by_file_give_pck_contact_and_intervals_and_the_report_says_how(fake, tmp_path, capsys):
    grid = np.stack([np.linspace(4, 44, 21), np.tile([5, 15, 25], 7)], axis=1)
    (tmp_path / "hands.json").write_text(
        predictions(fake, lambda i: {"keypoints_2d": (grid + [0, 6 if i < 10 else 0]).tolist()})  # 0.15 of 40 pixels
    )
    contact = {"box": [0, 0, 9, 9], "score": 0.9}
    (tmp_path / "contact.json").write_text(predictions(fake, lambda i: contact | {"state": 3 if i % 2 else 0}))
    report = run(tmp_path / "out", "--fake", fake, "--keypoints", tmp_path / "hands.json", "--contact",
                 tmp_path / "contact.json", "--pck-thresholds", 0.1, 0.2, "--bootstrap", 500)  # fmt: skip
    numbers = by_name(report)
    assert numbers["PCK@0.1"]["value"] == pytest.approx(2 / 3)
    assert [numbers["PCK@0.2"][key] for key in ("value", "low", "high")] == [1, 1, 1]
    assert numbers["contact by geometry, %"]["high"] < 100
    half = 1.96 * np.sqrt(2 / 9 / 30)
    assert numbers["PCK@0.1"]["low"] == pytest.approx(2 / 3 - half, abs=0.05)
    assert numbers["contact recall, %"]["n"] == 24  # records 0, 5, 10 ... do not touch
    assert numbers["contact recall, %"]["value"] == pytest.approx(50)
    assert numbers["contact recall, mean of categories, %"]["value"] == pytest.approx(50)
    assert numbers["contact by geometry, %"]["value"] == pytest.approx(80)
    assert report["measured"]["n"] == 30 and report["interval"]["resamples"] == 500
    printed = capsys.readouterr().out
    table = (tmp_path / "out" / "metrics.md").read_text()
    assert table in printed and "| PCK@0.1 " in table and "drawn anew with replacement" in table
    assert f"features are in {tmp_path / 'out' / '.features'}" in printed


def test_flicker_is_the_mean_over_videos(tmp_path, monkeypatch):
    parts, moving_camera = flicker.PARTS, float("nan")
    flickers = {
        "a": dict(zip(parts, (4.0, 2.0, 1.0), strict=True)),
        "b": dict(zip(parts, (6.0, 3.0, moving_camera), strict=True)),
    }
    monkeypatch.setattr(flicker, "video_flicker", lambda folder, hand: flickers[folder.name])
    report = run(tmp_path / "out", "--videos", tmp_path / "a", tmp_path / "b")
    numbers = by_name(report)
    assert [numbers[f"flicker of the {part}, levels"]["value"] for part in ("hand", "object", "background")] == [
        5,
        2.5,
        1,
    ]
    assert [numbers[f"flicker of the {part}, levels"]["n"] for part in ("hand", "background")] == [2, 1]
    assert report["measured"] is None


def test_poses_come_with_the_ap_of_each_class(tmp_path):
    folder = tmp_path / "one"
    draw(folder / "images/000000.png", 0)
    (folder / "objects").mkdir()
    trimesh.creation.box([0.3, 0.2, 0.6]).export(folder / "objects/mug.ply")
    to_camera = np.eye(4)
    to_camera[2, 3] = 1
    record = {"file_name": "images/000000.png", "index": 0, "category": "mug", "object_path": "objects/mug.ply",
              "object_to_camera": to_camera.ravel().tolist()}  # fmt: skip
    (folder / "metadata.jsonl").write_text(json.dumps(record) + "\n")
    true = true_objects(folder, record, {})
    found = {"category": "mug", "score": 0.7, "model_to_camera": true.poses[0].tolist(), "size": true.sizes[0].tolist()}
    (tmp_path / "poses.json").write_text(json.dumps({"predictions": {"images/000000.png": [found]}}))
    words = ("--fake", folder, "--poses", tmp_path / "poses.json", "--boxes", "aabb")
    report = run(tmp_path / "out", *words)
    assert by_name(report)["5deg2cm mAP, % (aabb)"]["value"] == 100
    assert report["average_precision_by_class"]["IoU75"] == {"mug": 100}
    assert len(report["files"]["poses"]["sha256"]) == 64


def test_a_second_run_reads_the_cache_that_the_first_one_wrote(clip_file, fake, tmp_path, monkeypatch):
    arguments = ("--fake", fake, "--clip", "tiny-scorer", clip_file[0], "--features", tmp_path / "cache")
    first = run(tmp_path / "a", *arguments)

    def never(*_):
        raise AssertionError("a picture was looked at again")

    monkeypatch.setattr("hoi.metrics.features._read_batch", never)
    second = run(tmp_path / "b", *arguments)
    assert first["numbers"] == second["numbers"]
    assert first["measured"] == second["measured"]


def test_a_device_that_is_not_there_is_told(real, fake, tmp_path):
    with pytest.raises(SystemExit, match="hoi.metrics: device 'cuba' is not there; expected cpu"):
        run(tmp_path, "--fake", fake, "--real", real, "--verifier", "f", "--device", "cuba")


def test_damage_is_refused_or_counted_and_plain_folders_have_no_texts(clip_file, real, tmp_path):
    for i in range(5):
        draw(tmp_path / "fake" / f"{i}.png", i)
    (tmp_path / "fake" / "2.png").write_bytes(b"\x89PNG broken")
    verifier = tmp_path / "verifier.safetensors"
    save_verifier(verifier, Verifier(["beach"], side=32))
    arguments = ("--fake", tmp_path / "fake", "--real", real, "--verifier", verifier)
    with pytest.raises(SystemExit, match=r"fake: 1 of 5 pictures are damaged or missing: 2.png .*--skip-damaged"):
        run(tmp_path / "out", *arguments)
    report = run(tmp_path / "out", *arguments, "--skip-damaged")
    assert report["measured"]["n"] == 4 and list(report["measured"]["left_out"]) == ["2.png"]
    assert any("1 pictures were left out" in note and "2.png" in note for note in report["notes"])
    assert any("lacks full rank and the Frechet distance is biased upwards" in note for note in report["notes"])
    with pytest.raises(SystemExit, match="CLIPScore .* needs annotation, and .*fake is a plain folder"):
        run(tmp_path / "out", "--fake", tmp_path / "fake", "--skip-damaged", "--clip", "tiny-scorer", clip_file[0])
    (tmp_path / "one").mkdir()
    draw(tmp_path / "one" / "0.png", 0)
    with pytest.raises(SystemExit, match="measured set has 1 picture; a distance between sets needs at least 2"):
        run(tmp_path / "out", "--fake", tmp_path / "one", "--real", real, "--verifier", verifier)
    with pytest.raises(SystemExit, match="reference has 1 picture"):
        run(tmp_path / "out", "--fake", real, "--real", tmp_path / "one", "--verifier", verifier)


def test_predictions_of_other_pictures_or_too_few_are_refused(fake, tmp_path):
    path = tmp_path / "hands.json"
    path.write_text('{"predictions": {"images/000000.png": []}}')
    with pytest.raises(SystemExit, match="hands.json: 29 pictures of the dataset have no entry .images/000001.png"):
        run(tmp_path / "out", "--fake", fake, "--keypoints", path)
    content = json.loads(predictions(fake, lambda i: {"box": [0, 0, 1, 1], "score": 1, "state": 3}))
    content["predictions"]["images/999999.png"] = []
    path.write_text(json.dumps(content))
    with pytest.raises(SystemExit, match="hands.json: 1 pictures are not in the dataset .images/999999.png"):
        run(tmp_path / "out", "--fake", fake, "--contact", path)


@pytest.mark.parametrize("arguments, message", [
    (["--real", "a"], "nothing to measure"),
    (["--clip", "ViT-B-32", "f"], "nothing to measure"),
    (["--fake", "a", "--real", "b"], "--real needs a network to compare by"),
    (["--fake", "a", "--real", "b.npz", "--clip", "M", "f"], "statistics file is of Inception's features"),
    (["--fake", "a", "--verifier", "f"], "needs pictures as the reference: --real DIR"),
    (["--fake", "a", "--save-statistics", "f.npz"], "--save-statistics needs --inception FILE and --real DIR"),
    (["--real", "a", "--inception", "f", "--save-statistics", "f"], "the name must end in .npz"),
    (["--videos", "a", "--keypoints", "f"], "--keypoints needs the pictures to measure: --fake DIR"),
    (["--videos", "a", "--poses", "f"], "--poses needs the pictures to measure: --fake DIR"),
    (["--fake", "a", "--boxes", "aabb"], "--boxes says how --poses is measured, which was not given"),
    (["--fake", "a", "--pck-thresholds", "0.3"], "--pck-thresholds says how --keypoints is measured"),
    (["--fake", "a", "--pck-thresholds", "nan"], "argument --pck-thresholds: 'nan' is not a finite number"),
    (["--fake", "a", "--bootstrap", "-1"], "argument --bootstrap: '-1' must not be negative"),
])  # fmt: skip
def test_flags_that_would_go_unread_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        metrics.parse_args(arguments)
    assert message in capsys.readouterr().err
