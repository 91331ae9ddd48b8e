"""Distances between feature sets: closed forms, and the same numbers as pytorch-fid and torch-fidelity."""

import numpy as np
import pytest
import torch
from pytorch_fid.fid_score import calculate_frechet_distance
from torch_fidelity.metric_isc import isc_features_to_metric

from hoi.metrics.distances import (
    fit_gaussian,
    frechet,
    inception_score,
    load_statistics,
    save_statistics,
    square_root,
)
from hoi.metrics.intervals import estimate, mean_of, ratio_of


def once(statistic, n: int) -> float:
    return estimate(statistic, n, 0, 0)[0]


def two_sets(n: int = 300, m: int = 260, dimensions: int = 24) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    mix = generator.normal(size=(dimensions, dimensions))
    features = generator.normal(size=(n, dimensions)) @ mix + 0.3
    return features.astype(np.float32), (generator.normal(size=(m, dimensions)) @ mix * 1.1).astype(np.float32)


def exactly(mean: list[float], variances: list[float], rotation: np.ndarray) -> np.ndarray:
    """Six points a dimension whose mean and covariance (divisor N - 1) are exactly these, axes turned."""
    d = len(mean)
    points = np.concatenate([np.eye(d), -np.eye(d)]) * np.sqrt(np.array(variances) * (2 * d - 1) / 2)
    return points @ rotation.T + mean


def test_frechet_distance_of_gaussians_on_common_axes_is_the_closed_form():
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))[0]
    a, b = exactly([1, 2, 3], [4, 1, 0.25], turn), exactly([1, 0, 3.5], [1, 9, 0.25], turn)
    expected = 0 + 4 + 0.25 + (2 - 1) ** 2 + (1 - 3) ** 2 + 0  # squared mean difference, then of the deviations
    assert once(frechet(a, fit_gaussian(b)), len(a)) == pytest.approx(expected, rel=1e-9)
    flat = exactly([1, 0, 3.5], [1, 9, 0], turn)  # of rank 2
    assert once(frechet(a, fit_gaussian(flat)), len(a)) == pytest.approx(expected + 0.25, rel=1e-7)
    assert once(frechet(flat, fit_gaussian(a)), len(a)) == pytest.approx(expected + 0.25, rel=1e-7)


@pytest.mark.filterwarnings("ignore:The `disp` argument")
@pytest.mark.parametrize("n, m", [(300, 260), (40, 30), (12, 300), (300, 12)])
def test_frechet_distance_equals_pytorch_fid_at_full_rank_and_below(n, m):
    fake, real = two_sets(n, m, 32)
    theirs = calculate_frechet_distance(
        fake.mean(0), np.cov(fake, rowvar=False), real.mean(0), np.cov(real, rowvar=False)
    )
    assert once(frechet(fake, fit_gaussian(real)), n) == pytest.approx(theirs, rel=1e-4)


def test_a_set_is_at_distance_zero_from_itself():
    fake, _ = two_sets()
    scale = np.trace(np.cov(fake, rowvar=False))
    assert once(frechet(fake, fit_gaussian(fake)), len(fake)) < 1e-5 * scale


def test_a_draw_counts_like_a_set_with_the_pictures_repeated():
    fake, real = two_sets(20, 30, 6)
    weights = np.random.default_rng(3).multinomial(20, np.full(20, 0.05)).astype(float)
    repeated = np.repeat(fake, weights.astype(int), axis=0)
    reference = fit_gaussian(real)
    drawn = frechet(fake, reference)(weights[None])[0]
    assert drawn == pytest.approx(once(frechet(repeated, reference), 20), rel=1e-9)
    logits = np.log(np.random.default_rng(4).dirichlet(np.ones(10), size=20))
    drawn = inception_score(logits)(weights[None])[0]
    assert drawn == pytest.approx(once(inception_score(np.repeat(logits, weights.astype(int), 0)), 20))


def test_a_frechet_distance_in_blocks_is_that_at_once(monkeypatch):
    fake, real = two_sets(50, 70)
    draws = np.random.default_rng(0).multinomial(50, np.full(50, 0.02), size=3)
    at_once = frechet(fake, fit_gaussian(real))(draws)
    monkeypatch.setattr("hoi.metrics.distances.BLOCK", 16)
    np.testing.assert_allclose(frechet(fake, fit_gaussian(real))(draws), at_once, rtol=1e-6)


@pytest.mark.parametrize("chunk, splits", [(5000, 1), (29, 7)])
def test_the_inception_score_of_chunks_in_order_equals_torch_fidelity(chunk, splits, monkeypatch):
    logits = torch.from_numpy(np.random.default_rng(2).normal(size=(203, 40)) * 2)
    theirs = isc_features_to_metric(logits, splits=splits, shuffle=False)["inception_score_mean"]
    monkeypatch.setattr("hoi.metrics.distances.CHUNK", chunk)
    assert once(inception_score(logits.log_softmax(1).numpy()), 203) == pytest.approx(theirs, rel=1e-9)


def test_the_interval_of_a_mean_is_that_of_the_normal_distribution():
    values = np.random.default_rng(0).normal(5, 2, size=400)
    value, low, high = estimate(mean_of(values), 400, 2000, 0)
    half = 1.96 * values.std() / 20
    assert value == pytest.approx(values.mean())
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.03)
    assert estimate(mean_of(values[:1]), 1, 100, 0)[1] is None
    assert once(ratio_of(np.array([1.0, 3.0]), np.array([1.0, 3.0])), 2) == 1.0


def test_the_interval_of_a_frechet_distance_lies_around_the_number_though_draws_repeat_pictures():
    fake, real = two_sets(40, 400)
    value, low, high = estimate(frechet(fake, fit_gaussian(real)), 40, 200, 0)
    assert low < value < high
    drawn = frechet(fake, fit_gaussian(real))(np.random.default_rng(0).multinomial(40, np.full(40, 0.025), size=200))
    assert drawn.mean() > value * 1.05  # what the shift corrects


def test_one_picture_two_networks_and_a_false_covariance_are_refused():
    fake, real = two_sets()
    with pytest.raises(ValueError, match="measured set has 1 picture; a distance between sets needs at least 2"):
        frechet(fake[:1], fit_gaussian(real))
    with pytest.raises(ValueError, match="reference has 1 picture"):
        fit_gaussian(real[:1])
    with pytest.raises(ValueError, match="24 features a picture, but the reference has 20"):
        frechet(fake, fit_gaussian(real[:, :20]))
    with pytest.raises(ValueError, match="eigenvalues from -1 to 4, expected none below zero"):
        square_root(np.diag([4.0, -1.0]))


def test_statistics_files_are_those_of_pytorch_fid_and_adm(tmp_path):
    fake, real = two_sets()
    mu, sigma = real.mean(0), np.cov(real, rowvar=False)
    np.savez(tmp_path / "theirs.npz", mu=mu, sigma=sigma)
    theirs = load_statistics(tmp_path / "theirs.npz")
    assert theirs.gaussians.keys() == {"pool"} and theirs.made_with == {} and theirs.gaussians["pool"].n is None
    assert once(frechet(fake, theirs.gaussians["pool"]), 300) == pytest.approx(
        once(frechet(fake, fit_gaussian(real)), 300)
    )
    spatial = fit_gaussian(fake)
    ours = tmp_path / "new" / "ours.npz"
    save_statistics(ours, {"pool": fit_gaussian(real), "spatial": spatial}, "tf1", "abc")
    assert list(ours.parent.iterdir()) == [ours]
    with np.load(ours) as arrays:
        np.testing.assert_allclose(arrays["mu"], mu, atol=1e-5)
        np.testing.assert_allclose(arrays["sigma"], sigma, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(arrays["sigma_s"], np.cov(fake, rowvar=False), rtol=1e-4, atol=1e-4)
    back = load_statistics(ours)
    assert (back.gaussians["pool"].n, back.made_with) == (260, {"resize": "tf1", "inception_sha256": "abc"})
    assert once(frechet(real, back.gaussians["spatial"]), 260) == pytest.approx(once(frechet(real, spatial), 260))


@pytest.mark.parametrize("content, message", [
    ({"arr_0": np.zeros((2, 4, 4, 3), np.uint8)}, "has no mu and sigma, the mean and covariance"),
    ({"mu": np.zeros(3), "sigma": np.eye(2)}, r"mu is \(3,\) and sigma \(2, 2\), expected \(D,\) and \(D, D\)"),
    ({"mu": np.zeros(2), "sigma": np.diag([1, np.nan])}, "mu or sigma holds numbers that are not finite"),
    ({"mu": np.zeros(2), "sigma": np.diag([1.0, -1.0])}, "a covariance has eigenvalues from -1 to 1"),
])  # fmt: skip
def test_a_false_statistics_file_is_named(content, message, tmp_path):
    np.savez(tmp_path / "false.npz", **content)
    with pytest.raises(ValueError, match=f"false.npz.*{message}"):
        load_statistics(tmp_path / "false.npz")


def test_a_file_that_is_no_archive_or_is_missing_is_named(tmp_path):
    (tmp_path / "text.npz").write_text("mu")
    (tmp_path / "half.npz").write_bytes(b"PK\x03\x04 and no more")
    for name in ("text", "half"):
        with pytest.raises(ValueError, match=f"{name}.npz is not a readable .npz of arrays"):
            load_statistics(tmp_path / f"{name}.npz")
    with pytest.raises(FileNotFoundError, match="no reference at .*none.npz"):
        load_statistics(tmp_path / "none.npz")


def test_a_gaussian_keeps_its_covariance_in_its_root():
    _, real = two_sets(10, 12, 24)
    np.testing.assert_allclose(fit_gaussian(real).covariance, np.cov(real, rowvar=False), atol=1e-4)
    assert fit_gaussian(real).root.shape == (12, 24)
