"""Distances between sets of features.  (N, D) features -> Frechet distance, Inception Score.

Each function returns a statistic (hoi/metrics/intervals.py): the same formula with pictures that count several times;
the reference is fixed.  Everything is float64, in blocks where it would not fit at once.  What a Frechet distance needs
of a reference can be kept in a file, as other tools keep it: .npz with mu, sigma, mu_s, sigma_s.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from hoi.common.files import read_npz, sha256_of, write_whole
from hoi.metrics.intervals import Statistic

BLOCK = 2048  # rows at a time: 34 MB of Inception's features
NOT_PSD = 1e-6  # smallest eigenvalue over the largest that counts as rounding: files may be in float32
CHUNK = 5000  # pictures of one Inception Score, as ADM's tool takes them


@dataclass(frozen=True)
class Gaussian:
    """A normal distribution that stands for a set of features.

    mean  (D,)
    root  (r, D)  the covariance is root' root, divisor N - 1
    n     features that it comes from; None: unknown
    """

    mean: np.ndarray
    root: np.ndarray
    n: int | None = None

    @property
    def covariance(self) -> np.ndarray:
        """(D, D)"""
        return self.root.T @ self.root


def blocks(features: np.ndarray) -> Iterator[np.ndarray]:
    """Rows in float64, BLOCK at a time."""
    for start in range(0, len(features), BLOCK):
        yield features[start : start + BLOCK].astype(np.float64)


def need_two(n: int, of: str) -> None:
    """Raise ValueError for fewer pictures than a distance between sets can work with."""
    if n < 2:
        raise ValueError(f"{of} has {n} picture; a distance between sets needs at least 2, and thousands to mean much")


def fit_gaussian(features: np.ndarray) -> Gaussian:
    """Mean and covariance of (N, D) features; n is N.  Raises ValueError below two rows."""
    n, dimensions = features.shape
    need_two(n, "the reference")
    # In blocks, since float64 of 50,000 pictures is 0.8 GB; the mean first, for a difference of squares loses digits.
    mean = sum(block.sum(axis=0) for block in blocks(features)) / n
    if n <= dimensions:  # the centred features are a root themselves, exact and of the covariance's rank
        return Gaussian(mean, (features - mean) / np.sqrt(n - 1), n)
    covariance = sum((block - mean).T @ (block - mean) for block in blocks(features)) / (n - 1)
    return Gaussian(mean, square_root(covariance), n)


def square_root(covariance: np.ndarray) -> np.ndarray:
    """The symmetric root (D, D) of a covariance of any rank.  Raises ValueError when it has negative eigenvalues."""
    values, vectors = np.linalg.eigh(covariance)
    if values[0] < -NOT_PSD * max(values[-1], 1e-300):
        raise ValueError(
            f"a covariance has eigenvalues from {values[0]:.3g} to {values[-1]:.3g}, expected none below zero; was it "
            "saved in low precision, or is the file damaged?"
        )
    return (vectors * np.sqrt(values.clip(min=0))) @ vectors.T


def frechet(features: np.ndarray, reference: Gaussian) -> Statistic:
    """Squared Frechet distance |m1 - m2|^2 + tr(S1) + tr(S2) - 2 tr((S1 S2)^(1/2)) of features (N, D) to a Gaussian.

    With S1 = A'A and S2 = B'B the last trace is the sum of the singular values of A B': exact for covariances of any
    rank, where the matrix root of S1 S2 is ill-conditioned and other tools add 1e-6 to the diagonal.
    Source: Dowson and Landau 1982; for FID Heusel et al. 2017.
    """
    need_two(len(features), "the measured set")
    if features.shape[1] != len(reference.mean):
        raise ValueError(f"{features.shape[1]} features a picture, but the reference has {len(reference.mean)}")
    rooted = np.concatenate([(block - reference.mean) @ reference.root.T for block in blocks(features)])  # (N, r)
    squares = np.concatenate([((block - reference.mean) ** 2).sum(axis=1) for block in blocks(features)])

    def singular_sum(weights: np.ndarray) -> float:
        n, seen = weights.sum(), np.flatnonzero(weights)
        cross = np.sqrt(weights[seen] / (n - 1))[:, None] * (rooted[seen] - weights @ rooted / n)  # A B'
        # Its singular values are the roots of the eigenvalues of either product; the smaller one is cheaper.
        gram = cross @ cross.T if len(cross) <= cross.shape[1] else cross.T @ cross
        return np.sqrt(np.linalg.eigvalsh(gram).clip(min=0)).sum()

    def statistic(draws: np.ndarray) -> np.ndarray:
        n = draws.sum(axis=1)
        sums = sum(draws[:, k * BLOCK : (k + 1) * BLOCK] @ block for k, block in enumerate(blocks(features)))
        means = sums / n[:, None] - reference.mean  # (R, D)
        traces = (draws @ squares - n * (means**2).sum(axis=1)) / (n - 1) + (reference.root**2).sum()
        bar = tqdm(draws, desc="Frechet distance of draws", disable=len(draws) == 1, leave=False)
        cross_traces = np.array([singular_sum(weights) for weights in bar])
        return ((means**2).sum(axis=1) + traces - 2 * cross_traces).clip(min=0)  # equal sets may round below 0

    return statistic


def inception_score(log_probabilities: np.ndarray) -> Statistic:
    """exp of the mean KL divergence from p(class | picture) to the mean p(class), averaged over consecutive chunks.

    log_probabilities  (N, C)
    Source: Salimans et al. 2016; chunks of CHUNK pictures, the last one shorter, as in ADM's tool.
    """
    probabilities = np.exp(log_probabilities)
    negative_entropy = (probabilities * log_probabilities).sum(axis=1)

    def statistic(draws: np.ndarray) -> np.ndarray:
        scores = []
        for start in range(0, len(probabilities), CHUNK):
            chunk = slice(start, start + CHUNK)
            weights = draws[:, chunk] / np.maximum(draws[:, chunk].sum(axis=1, keepdims=True), 1)
            mean = weights @ probabilities[chunk]
            mean_log = np.log(np.where(mean > 0, mean, 1.0))  # 0 log 0 is 0 here
            score = np.exp(weights @ negative_entropy[chunk] - (mean * mean_log).sum(axis=1))
            scores.append(np.where(weights.any(axis=1), score, np.nan))  # a draw may miss a whole chunk
        return np.nanmean(scores, axis=0)

    return statistic


def save_statistics(path: str | Path, gaussians: dict[str, Gaussian], preprocessing: str, weights: str) -> None:
    """Write mu, sigma and mu_s, sigma_s as ADM's and pytorch-fid's tools read them, with what they were made with.

    gaussians      {"pool": ..., "spatial": ...}
    preprocessing  resize mode        weights  SHA-256 of the Inception file
    """
    pool, spatial = gaussians["pool"], gaussians["spatial"]
    arrays = {"mu": pool.mean, "sigma": pool.covariance, "mu_s": spatial.mean, "sigma_s": spatial.covariance,
              "n": pool.n, "resize": preprocessing, "inception_sha256": weights}  # fmt: skip
    write_whole(path, lambda stream: np.savez(stream, **arrays))


@dataclass(frozen=True)
class Statistics:
    """Of the features of a reference set.

    gaussians  "pool" and, where the file has mu_s and sigma_s, "spatial"; n is None where the file does not say it
    made_with  "resize" and "inception_sha256" where the file says them
    """

    path: Path
    gaussians: dict[str, Gaussian]
    made_with: dict[str, str]

    def described(self) -> dict[str, Any]:
        """What a report says of the reference."""
        of_file = {"file": str(self.path), "sha256": sha256_of(self.path), "n": self.gaussians["pool"].n}
        return of_file | self.made_with

    def check(self, resize: str, weights: str) -> str:
        """Raise ValueError for statistics made in another way; return a note when they do not say how, else "".

        weights  SHA-256 of the Inception file
        """
        for key, ours in (("resize", resize), ("inception_sha256", weights)):
            theirs = self.made_with.get(key, ours)  # other tools' files do not say
            if theirs != ours:
                raise ValueError(f"{self.path} was made with {key} {theirs}, this run has {ours}: not comparable")
        unsaid = f"{self.path} does not say how it was made: the numbers hold only if its preprocessing was {resize}"
        return "" if self.made_with else unsaid


def load_statistics(path: str | Path) -> Statistics:
    """Read a statistics file of ours, of pytorch-fid or of ADM.

    Raises FileNotFoundError or ValueError naming the file: unreadable, without mu and sigma, wrong shapes, not finite,
    a covariance that is none.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no reference at {path}: give a folder of pictures, or an .npz with mu and sigma")
    # The reference batches of ADM hold their pictures too, gigabytes of them as arr_0.
    names = ("mu", "sigma", "mu_s", "sigma_s", "n", "resize", "inception_sha256")
    found = read_npz(path, "reference statistics", names, ("resize", "inception_sha256"))
    if found.get("n", np.zeros(())).shape != ():
        raise ValueError(f"{path}: n is {found['n'].shape}, expected one number, of pictures")
    gaussians, n = {}, int(found["n"]) if "n" in found else None
    for name, mu, sigma in (("pool", "mu", "sigma"), ("spatial", "mu_s", "sigma_s")):
        if mu not in found or sigma not in found:
            continue
        mean, covariance = np.asarray(found[mu], np.float64), np.asarray(found[sigma], np.float64)
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            raise ValueError(f"{path}: {mu} is {mean.shape} and {sigma} {covariance.shape}, expected (D,) and (D, D)")
        if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
            raise ValueError(f"{path}: {mu} or {sigma} holds numbers that are not finite")
        try:
            gaussians[name] = Gaussian(mean, square_root(covariance), n)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    if "pool" not in gaussians:
        raise ValueError(f"{path} has no mu and sigma, the mean and covariance of Inception's features")
    made_with = {key: str(found[key]) for key in ("resize", "inception_sha256") if key in found}
    return Statistics(path, gaussians, made_with)
