"""The Inception network: the same features as pytorch-fid and torch-fidelity from the same random weights."""

import hashlib
import json
import os
import shutil
import signal

import numpy as np
import pytest
import pytorch_fid.inception
import torch
import torchvision
from PIL import Image
from pytorch_fid.fid_score import calculate_frechet_distance
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_isc import isc_features_to_metric

from hoi.metrics import __main__ as metrics
from hoi.metrics.distances import fit_gaussian, frechet
from hoi.metrics.features import Extractor, PictureSet, Run, find_pictures, kept_features
from hoi.metrics.inception import load_inception, prepare

PICTURES = 6


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A weight file as published: torchvision's names and shapes with 1008 classes, without batch-norm counters."""
    network = torchvision.models.inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False)
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, tensor in network.state_dict().items():
        if name.endswith("running_var"):
            state[name] = torch.rand(tensor.shape, generator=generator) + 0.5
        elif tensor.dim() == 1:  # batch norm's weight and bias, running mean, the classifier's bias
            centre = 1.0 if name.endswith("bn.weight") else 0.0
            state[name] = centre + 0.1 * torch.randn(tensor.shape, generator=generator)
        elif tensor.dim() > 1:  # of a size that keeps the signal's strength from layer to layer
            gain = (2 / tensor[0].numel()) ** 0.5
            state[name] = gain * torch.randn(tensor.shape, generator=generator)
    path = tmp_path_factory.mktemp("inception") / "pt_inception-2015-12-05-6726825d.pth"
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of pictures larger than the network's 299 pixels, of soft blobs with fine noise."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for i in range(PICTURES):
        blobs = Image.fromarray(generator.integers(0, 256, (5, 6, 3), dtype=np.uint8)).resize((380, 330), 3)
        noisy = np.asarray(blobs) + generator.normal(0, 20, (330, 380, 3))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def ours(weights):
    return load_inception(weights)


@pytest.fixture(scope="module")
def of_pytorch_fid(weights, pictures):
    """pytorch-fid's network and its features (N, 2048)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pytorch_fid.inception, "load_state_dict_from_url", lambda *a, **k: torch.load(weights))
        network = pytorch_fid.inception.InceptionV3([3]).eval()
    with torch.no_grad():
        return network, network(prepared(sorted(pictures.iterdir())))[0].flatten(1).numpy()


def prepared(paths) -> torch.Tensor:
    """Pictures as pytorch-fid's network takes them, resized our way: it has nothing left to resize."""
    return torch.stack([(prepare(Image.open(path)) + 1) / 2 for path in paths])


@pytest.fixture(scope="module")
def read(ours, pictures, tmp_path_factory):
    """Our features, through the cache that hoi.metrics uses."""
    folder = tmp_path_factory.mktemp("cache")

    def features(name: str) -> np.ndarray:
        found = find_pictures(pictures, 2)
        return Run(folder, 5, 0, "cpu").features(found, Extractor("Inception", "tf1", "", prepare, ours), name)

    return features


@pytest.mark.filterwarnings("ignore:The `disp` argument")
def test_features_and_fid_equal_pytorch_fid(read, of_pytorch_fid):
    theirs, mine = of_pytorch_fid[1], read("pool")
    assert np.abs(mine - theirs).max() < 1e-4 * np.abs(theirs).max()
    assert np.std(theirs, axis=0).mean() > 0.01 * theirs.mean()  # the random network tells pictures apart
    half = PICTURES // 2

    def their_fid(a: np.ndarray, b: np.ndarray) -> float:
        few = np.linalg.svd(theirs - theirs.mean(0), full_matrices=False)[2]  # without the null space: 2048 is slow
        a, b = a @ few.T, b @ few.T
        return calculate_frechet_distance(a.mean(0), np.cov(a, rowvar=False), b.mean(0), np.cov(b, rowvar=False))

    fid = frechet(mine[half:], fit_gaussian(mine[:half]))(np.ones((1, half)))[0]
    assert fid == pytest.approx(their_fid(theirs[half:], theirs[:half]), rel=1e-3)


def test_tf1_features_and_logits_without_bias_equal_torch_fidelity(read, weights, ours, pictures):
    theirs = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], str(weights))
    images = torch.stack([torch.from_numpy(np.array(Image.open(path))) for path in sorted(pictures.iterdir())])
    with torch.no_grad():
        pool, unbiased = theirs(images.permute(0, 3, 1, 2))
    mine = read("pool")
    assert np.abs(mine - pool.numpy()).max() < 1e-4 * pool.abs().max()
    expected = unbiased.double().log_softmax(1).numpy()
    np.testing.assert_allclose(ours.log_probabilities(mine), expected, rtol=1e-3, atol=1e-3)


def test_spatial_features_are_seven_channels_of_mixed_6d_branch1x1(ours, of_pytorch_fid, read, pictures):
    seen = []
    block = of_pytorch_fid[0].blocks[2][6]  # Mixed_6d
    handle = block.branch1x1.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        of_pytorch_fid[0](prepared([pictures / "3.png"]))
    handle.remove()
    assert seen[0].shape == (1, 192, 17, 17)
    mine = read("spatial")
    assert mine.shape == (PICTURES, 2023)
    expected = seen[0][0, :7].flatten().numpy()
    assert np.abs(mine[3] - expected).max() < 1e-4 * expected.max()


def test_another_network_a_missing_file_and_another_class_count_are_named(weights, tmp_path):
    with pytest.raises(FileNotFoundError, match="no Inception weights at .*none.pth.*pytorch-fid publishes"):
        load_inception(tmp_path / "none.pth")
    state = torch.load(weights)
    torch.save({**state, "fc.weight": torch.zeros(1000, 2048)}, tmp_path / "torchvision.pth")
    with pytest.raises(ValueError, match=r"torchvision.pth .*Inception network of FID.*fc.weight is \(1000, 2048\)"):
        load_inception(tmp_path / "torchvision.pth")


@pytest.mark.filterwarnings("ignore:The `disp` argument")
def test_the_command_gives_the_numbers_of_the_features_and_its_statistics_file_the_same(
    read, weights, ours, pictures, tmp_path
):
    """Four of the pictures in a mirror against all; the statistics file without sFID's part, which is slow."""
    for path in sorted(pictures.iterdir())[:4]:
        (tmp_path / "fake").mkdir(exist_ok=True)
        Image.open(path).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / "fake" / path.name)
    common = ["--inception", weights, "--features", tmp_path / "cache", "--workers", 0]
    statistics = tmp_path / "real.npz"

    def run(name: str, *more) -> dict[str, dict]:
        metrics.main([*map(str, (*common, "--fake", tmp_path / "fake", "--out", tmp_path / name, *more))])
        return {
            number["name"]: number for number in json.loads((tmp_path / name / "metrics.json").read_text())["numbers"]
        }

    from_pictures = run("a", "--real", pictures, "--save-statistics", statistics)
    with np.load(statistics) as arrays:
        np.savez(statistics, **{name: arrays[name] for name in arrays.files if not name.endswith("_s")})
    from_file = run("b", "--real", statistics)
    cache, mirrored = next((tmp_path / "cache").iterdir()), find_pictures(tmp_path / "fake", 2)
    assert cache.name.startswith("inception-tf1-")
    for number, name in (("FID", "pool"), ("sFID", "spatial")):
        fake, real = kept(cache, name, mirrored), read(name)
        basis = np.linalg.svd(np.concatenate([fake, real]).astype(float), full_matrices=False)[2]
        theirs = calculate_frechet_distance(*(f(x @ basis.T) for x in (fake, real) for f in (mean, covariance)))
        for numbers in (from_pictures, from_file) if name == "pool" else (from_pictures,):
            measured = numbers[f"{number} (tf1)"]
            assert measured["value"] == pytest.approx(theirs, rel=1e-3)
            assert measured["low"] < measured["value"] < measured["high"]
    logits = torch.from_numpy(kept(cache, "pool", mirrored)) @ ours.network.fc.weight.T
    expected = isc_features_to_metric(logits, 1)["inception_score_mean"]
    assert from_pictures["IS (tf1)"]["value"] == pytest.approx(expected, rel=1e-4)
    assert len(from_pictures) == 3 and len(from_file) == 2  # sFID needs pictures or sigma_s
    with np.load(statistics) as arrays:
        np.savez(statistics, **{**arrays, "resize": "clean"})
    with pytest.raises(SystemExit, match="real.npz was made with resize clean, this run has tf1"):
        run("c", "--real", statistics)


def kept(cache, name: str, found: PictureSet) -> np.ndarray:
    rows = kept_features(cache, name, found.hashes)
    return np.stack([rows[digest] for digest in found.hashes])


def mean(features: np.ndarray) -> np.ndarray:
    return features.mean(axis=0)


def covariance(features: np.ndarray) -> np.ndarray:
    return np.cov(features, rowvar=False)


# --- the cache, with a network of one line ---


def picture_folder(folder, count: int, seed: int = 0):
    folder.mkdir(exist_ok=True)
    generator = np.random.default_rng(seed)
    for i in range(count):
        Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{i:03d}.png")
    return folder


def mean_colour(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float()


class Counting:
    """Mean colours as features; counts the pictures that it saw."""

    def __init__(self) -> None:
        self.seen = 0

    def __call__(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        self.seen += len(images)
        return {"pool": images.mean((2, 3))}


def colours(found: PictureSet, network, cache, workers: int = 0) -> np.ndarray:
    extractor = Extractor("mean colour", "colour", "none", mean_colour, network)
    return Run(cache, 4, workers, "cpu").features(found, extractor)


def test_a_cache_that_cannot_be_written_is_told_with_its_flag_and_the_features_come(tmp_path, monkeypatch):
    monkeypatch.setattr("hoi.metrics.features.ROWS_PER_FILE", 4)
    found = find_pictures(picture_folder(tmp_path / "a", 10), 2)
    (tmp_path / "file").write_text("no folder")
    with pytest.warns(RuntimeWarning, match="file/colour cannot be written to .*choose another with --features"):
        seen = colours(found, Counting(), tmp_path / "file")
    np.testing.assert_array_equal(seen, colours(found, Counting(), tmp_path / "cache"))


def killed(picture: Image.Image) -> torch.Tensor:
    """As a process that runs out of memory ends."""
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_reader_is_told_in_a_sentence(tmp_path):
    found = find_pictures(picture_folder(tmp_path / "a", 10), 2)
    extractor = Extractor("mean colour", "colour", "none", killed, Counting())
    with pytest.raises(OSError, match="a process that reads pictures ended: .*--workers 0 needs none"):
        Run(tmp_path / "cache", 4, 1, "cpu").features(found, extractor)


def test_a_picture_is_seen_once_by_its_content_and_a_damaged_part_of_the_cache_is_made_again(tmp_path, monkeypatch):
    monkeypatch.setattr("hoi.metrics.features.ROWS_PER_FILE", 4)
    folder, network = picture_folder(tmp_path / "a", 10), Counting()
    found = find_pictures(folder, 2)
    expected = np.stack([np.asarray(Image.open(path)).mean((0, 1)) for path in sorted(folder.iterdir())])
    for workers in (1, 0):  # first computed in a worker process, then read
        np.testing.assert_allclose(colours(found, network, tmp_path / "cache", workers), expected, rtol=1e-6)
    assert network.seen == 10
    (folder / "000.png").rename(folder / "zzz.png")  # another name and place in the order, the same picture
    picture_folder(tmp_path / "b", 1, seed=9)
    (tmp_path / "b" / "000.png").rename(folder / "aaa.png")
    moved = colours(find_pictures(folder, 2), network, tmp_path / "cache")
    np.testing.assert_allclose(moved[[10, *range(9)]], expected, rtol=1e-6)
    assert network.seen == 11
    part = sorted((tmp_path / "cache" / "colour").iterdir())[0]
    lost = len(np.load(part)["hashes"])
    part.write_bytes(part.read_bytes()[:50])
    found = find_pictures(folder, 2)
    colours(found, network, tmp_path / "cache")
    assert network.seen == 11 + lost
    assert kept_features(tmp_path / "cache" / "colour", "pool", found.hashes).keys() == set(found.hashes)


def test_an_interrupted_run_keeps_what_it_finished(tmp_path, monkeypatch):
    monkeypatch.setattr("hoi.metrics.features.ROWS_PER_FILE", 4)
    found = find_pictures(picture_folder(tmp_path / "a", 12), 1)

    class Stops(Counting):
        def __call__(self, images):
            if self.seen == 8:
                raise KeyboardInterrupt
            return super().__call__(images)

    with pytest.raises(KeyboardInterrupt):
        colours(found, Stops(), tmp_path / "cache")
    after = Counting()
    assert len(colours(found, after, tmp_path / "cache")) == 12
    assert after.seen == 4


def test_damaged_pictures_are_named_and_counted_and_left_out_only_on_request(tmp_path):
    folder = picture_folder(tmp_path / "a", 4)
    (folder / "001.png").write_bytes((folder / "001.png").read_bytes()[:100])
    (folder / "002.png").write_text("not a picture")
    Image.fromarray(np.zeros((8, 8), dtype=np.uint16)).save(folder / "depth.png")
    with pytest.raises(ValueError, match=r"3 of 5 pictures are damaged or missing: 001.png \(.*002.png \(.*depth.png"):
        find_pictures(folder, 2)
    found = find_pictures(folder, 2, skip_damaged=True)
    assert [path.name for path in found.paths] == ["000.png", "003.png"]
    assert sorted(found.damaged) == ["001.png", "002.png", "depth.png"]
    whole = hashlib.sha256("\n".join(sorted(found.hashes)).encode()).hexdigest()
    assert found.digest() == whole


def test_linked_folders_of_pictures_are_followed_once_and_other_kinds_are_named(tmp_path):
    folder = picture_folder(tmp_path / "a", 2)
    (folder / "linked").symlink_to(picture_folder(tmp_path / "b", 3))
    (tmp_path / "b" / "back").symlink_to(tmp_path / "b")
    shutil.copy(folder / "000.png", folder / "photo.JFIF")
    (folder / "phone.HEIC").write_bytes(b"")
    found = find_pictures(folder, 1)
    assert len(found) == 6 and found.described()["left_out"].keys() == {"phone.HEIC"}
    (tmp_path / "c").mkdir()
    shutil.copy(folder / "phone.HEIC", tmp_path / "c")
    with pytest.raises(ValueError, match="no pictures of a kind that is read, only phone.HEIC; expected .bmp"):
        find_pictures(tmp_path / "c", 1)


def test_empty_folders_and_features_that_are_not_finite_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty has no pictures"):
        find_pictures(tmp_path / "empty", 1)
    (tmp_path / "empty" / "metadata.jsonl").write_text('{"file_name": null, "index": 0}\n')
    with pytest.raises(ValueError, match="empty has no pictures: its records are conditions only"):
        find_pictures(tmp_path / "empty", 1)
    with pytest.raises(FileNotFoundError, match="there is no folder .*none"):
        find_pictures(tmp_path / "none", 1)
    found = find_pictures(picture_folder(tmp_path / "a", 3), 1)
    (tmp_path / "a" / "metadata.jsonl").write_text("")
    with pytest.raises(ValueError, match=f"{tmp_path.name} holds dataset folders; name one of them, such as "):
        find_pictures(tmp_path, 1)

    def breaks(images):
        return {"pool": torch.tensor([[1.0], [float("nan")], [2.0]])}

    with pytest.raises(ValueError, match="mean colour gives features that are not finite for 001.png"):
        colours(found, breaks, tmp_path / "cache")


def test_loading_leaves_the_callers_random_numbers_alone(weights):
    before = torch.get_rng_state()
    load_inception(weights)
    assert torch.equal(torch.get_rng_state(), before)
