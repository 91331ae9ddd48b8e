"""Statistics of a reference set on disk.  Gaussians of features <-> .npz with mu, sigma, mu_s, sigma_s."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from hoi.common.files import write_atomically
from hoi.metrics.distances import Gaussian, square_root


def save_statistics(path: str | Path, gaussians: dict[str, Gaussian], preprocessing: str, weights: str) -> None:
    """Write mu, sigma and mu_s, sigma_s as ADM's and pytorch-fid's tools read them, with what they were made with.

    gaussians      {"pool": ..., "spatial": ...}
    preprocessing  resize mode        weights  SHA-256 of the Inception file
    """
    pool, spatial = gaussians["pool"], gaussians["spatial"]

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as stream:  # given a name, numpy would append .npz to it
            np.savez(stream, mu=pool.mean, sigma=pool.covariance, mu_s=spatial.mean, sigma_s=spatial.covariance,
                     n=pool.n, resize=preprocessing, inception_sha256=weights)  # fmt: skip

    write_atomically(path, write)


@dataclass(frozen=True)
class Statistics:
    """Of the features of a reference set.

    moments    "pool" and, where the file has mu_s and sigma_s, "spatial": mean (D,) and covariance (D, D)
    n          pictures, None: not said
    made_with  "resize" and "inception_sha256" where the file says them
    """

    path: Path
    moments: dict[str, tuple[np.ndarray, np.ndarray]]
    n: int | None
    made_with: dict[str, str]

    def gaussian(self, name: str) -> Gaussian | None:
        """None for features that the file lacks.  Raises ValueError for a covariance that is none."""
        if name not in self.moments:
            return None
        mean, covariance = self.moments[name]
        try:
            return Gaussian(mean, square_root(covariance), self.n)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from error


def load_statistics(path: str | Path) -> Statistics:
    """Read a statistics file of ours, of pytorch-fid or of ADM.

    Raises FileNotFoundError or ValueError naming the file: unreadable, without mu and sigma, wrong shapes, not finite.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no reference at {path}: give a folder of pictures, or an .npz with mu and sigma")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in arrays.files if name != "arr_0"}  # arr_0: ADM's pictures
    except (ValueError, OSError, TypeError, BadZipFile) as error:
        raise ValueError(f"{path} is not a readable .npz of arrays: {error}") from error
    moments = {}
    for name, mu, sigma in (("pool", "mu", "sigma"), ("spatial", "mu_s", "sigma_s")):
        if mu not in found or sigma not in found:
            continue
        mean, covariance = np.asarray(found[mu], np.float64), np.asarray(found[sigma], np.float64)
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            raise ValueError(f"{path}: {mu} is {mean.shape} and {sigma} {covariance.shape}, expected (D,) and (D, D)")
        if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
            raise ValueError(f"{path}: {mu} or {sigma} holds numbers that are not finite")
        moments[name] = mean, covariance
    if "pool" not in moments:
        raise ValueError(f"{path} has no mu and sigma; it holds {', '.join(sorted(found)) or 'at most pictures'}")
    made_with = {key: str(found[key]) for key in ("resize", "inception_sha256") if key in found}
    return Statistics(path, moments, int(found["n"]) if "n" in found else None, made_with)
