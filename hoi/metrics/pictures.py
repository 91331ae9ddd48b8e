"""Numbers of sets of pictures.  Pictures, reference + a network -> FID, sFID, IS, CLIPScore.

Paper: Table 1 and Sec. 4.2, which give neither resize mode nor CLIP model; every number names its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hoi.common.command import first_few
from hoi.metrics import distances
from hoi.metrics.clip import SCORE_PREFIX, SCORE_WEIGHT, Clip, clip_scores
from hoi.metrics.features import Extractor, PictureSet, Run, find_pictures
from hoi.metrics.intervals import Results, mean_of

# Of Inception's features: where a Frechet distance looks, and what stands behind it.
FRECHET_NUMBERS = {
    "FID": ("pool", "the 2048 averaged features"),
    "sFID": ("spatial", "7 channels x 17 x 17 of Mixed_6d.branch1x1"),
}


Reference = PictureSet | distances.Statistics  # what pictures are compared with


def read_reference(paths: Sequence[Path], workers: int, skip_damaged: bool) -> Reference:
    """Pictures of folders, or one file of statistics (.npz).  Raises as find_pictures and load_statistics."""
    if paths[0].suffix == ".npz":
        return distances.load_statistics(paths[0])
    return find_pictures(paths, workers, skip_damaged)


def gaussian_of(reference: Reference, run: Run, extractor: Extractor, name: str) -> distances.Gaussian | None:
    """Of Inception features, "pool" or "spatial"; None where a statistics file lacks them."""
    if isinstance(reference, distances.Statistics):
        return reference.gaussians.get(name)
    return distances.fit_gaussian(run.features(reference, extractor, name))


def add_inception_score(results: Results, run: Run, fake: PictureSet, extractor: Extractor) -> None:
    """Inception Score; extractor: of Inception."""
    log_probabilities = extractor.network.log_probabilities(run.features(fake, extractor))
    results.add(f"IS ({extractor.name})", distances.inception_score(log_probabilities), len(fake), "higher",
                "exp of the mean KL divergence of the classes; ADM's chunks of 5,000 in order")  # fmt: skip


def add_inception_distances(
    results: Results, run: Run, fake: PictureSet, reference: Reference, extractor: Extractor
) -> None:
    """FID and sFID; extractor: of Inception, its name, the resize mode, is put behind each number."""
    # The name of each number says how pictures were resized: FIDs of two resize modes are not comparable.
    for number, (name, what) in FRECHET_NUMBERS.items():
        gaussian = gaussian_of(reference, run, extractor, name)
        if gaussian is None:
            results.note(f"no {number}: {reference.path} lacks mu_s and sigma_s")
            continue
        what = f"{what}, covariance over N - 1, float64"
        number = f"{number} ({extractor.name})"
        _add_distance(results, number, run.features(fake, extractor, name), gaussian, what)


def add_clip_score(results: Results, run: Run, fake: PictureSet, clip: Clip, extractor: Extractor) -> None:
    """CLIPScore; extractor: of the same CLIP.

    Raises ValueError for a plain folder or pictures without a text.
    """
    records = annotated(fake, "CLIPScore (--clip)")
    without = [record["file_name"] for record in records if not record.get("text")]
    if without:
        names = first_few(without, joint="; ")
        raise ValueError(f"{fake.folder}: {len(without)} pictures have no text to score ({names})")
    texts = [record["text"] for record in records]  # the whole caption, scenery and all
    scores = clip_scores(clip, run.features(fake, extractor), texts)
    results.add(f"CLIPScore ({clip.name})", mean_of(scores), len(scores), "higher",
                f"{SCORE_WEIGHT:g} * max(cosine, 0) of picture and '{SCORE_PREFIX}<caption>', mean over pictures")


def add_frechet(results: Results, run: Run, fake: PictureSet, reference: PictureSet, extractor: Extractor) -> None:
    """Frechet distance on features of a network other than Inception."""
    gaussian = distances.fit_gaussian(run.features(reference, extractor))
    what = f"{len(gaussian.mean)} features of {extractor.name}"
    _add_distance(results, f"Frechet distance ({extractor.name})", run.features(fake, extractor), gaussian, what)


def _add_distance(results: Results, number: str, features: np.ndarray, gaussian: distances.Gaussian, what: str) -> None:
    """A Frechet distance.  Covariances of too few pictures are handled exactly, but they do bias it."""
    n, dimensions = len(features), len(gaussian.mean)
    # A reference from a file need not say n; then only the measured set can be found too small.
    of_reference = "" if gaussian.n is None or gaussian.n > dimensions else f" (reference: {gaussian.n})"
    if n <= dimensions or of_reference:
        results.note(f"{n} pictures{of_reference} are few for {dimensions} features: a covariance lacks full rank and "
                     "the Frechet distance is biased upwards; compare it at equal n only")  # fmt: skip
    results.add(number, distances.frechet(features, gaussian), n, "lower", f"squared Frechet distance of {what}")


def annotated(pictures: PictureSet, what: str) -> list[dict]:
    """Records of the pictures.  Raises ValueError for a plain folder, which has none."""
    if pictures.records is None:
        raise ValueError(f"{what} needs annotation, and {pictures.folder} is a plain folder without metadata.jsonl")
    return pictures.records
