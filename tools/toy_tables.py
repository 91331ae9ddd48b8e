"""Tables 1, 2, 4 and 5 of the paper, measured in the toy world.  Pictures + true records -> numbers.

The paper measures with networks that know photographs, and they would be blind to drawings of 128 pixels.  Each has a
stand-in that was trained on the toy world's shaded pictures (never on generated ones):

    paper                                        here
    FID by Inception (Tables 1, 4)               Frechet distance on the verifier's features
    CLIPScore by CLIP (Tables 1, 5)              the same score by the small CLIP of `train.py --stage text`
    contact state by 100DOH (Table 2)            the verifier's largest hand and object regions touch
    PCK by FrankMocap's keypoints (Table 2)      PCK by the verifier's keypoints

Overlap of hand and object, and whether colour and background are those of the text, are beside them because they can be
counted exactly here.  No toy number compares with the paper's; the order of the models may.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import ndimage
from torch import Tensor

from hoi.common.arrays import pictures_to_tensor
from hoi.common.files import content_expected, parse_json
from hoi.common.tensors import load_model_file, strict_load
from hoi.data.folder import load_image
from hoi.geometry.render import HAND, OBJECT
from hoi.metrics.clip import Clip, clip_scores
from hoi.metrics.features import Extractor, PictureSet, Run, find_pictures, verifier_extractor
from hoi.metrics.intervals import PERCENT, SHARE, Results, mean_of, mean_of_groups
from hoi.metrics.pictures import add_frechet
from hoi.network.text import TextConfig, TextEncoder, tokenize
from hoi.training.small_clip import FILE_NAME, KIND, PictureText
from hoi.verify.choices import PCK_THRESHOLD
from hoi.verify.scores import Estimators, load_truth
from hoi.verify.verifier import Verifier, load_verifier
from tools.measure_generated import paired_records

NEIGHBOURS = np.ones((3, 3), bool)  # pixels side by side or corner to corner
WORKERS = 2  # processes that read pictures
PICTURES_AT_ONCE = 64  # shown to the small CLIP together: bounds memory, whatever the folder's size
# Names of the numbers, and which of verify/scores.SCORES some of them are, times what.
FRECHET, TOY_CLIP, CONTACT = "Frechet distance (verifier)", "toy CLIPScore", "toy contact, %"
SHUFFLED_CLIP = "toy CLIPScore, other records' captions"
HAND_IOU, OBJECT_IOU, PCK = "hand IoU", "object IoU", f"PCK@{PCK_THRESHOLD:g}"
COLOR, BACKGROUND = "colour word, %", "background word, %"
SCORED = {
    HAND_IOU: ("iou_hand", 1, "the verifier's label map against the conditions'"),
    OBJECT_IOU: ("iou_object", 1, "the verifier's label map against the conditions'"),
    PCK: ("pck", 1, f"joints of the verifier within {PCK_THRESHOLD:g} of the longer side of the true joints' box"),
    COLOR: ("color_right", 100, "captions whose colour is the nearest to the mean colour in the object's true mask"),
    BACKGROUND: ("background_right", 100, "captions whose background is the one that the verifier sees"),
}


@dataclass(frozen=True)
class ToyEstimators:
    """The networks that stand in for the paper's.

    verifier, clip  of the toy world; extractor gives the verifier's features
    reference       shaded pictures that the Frechet distance compares with
    run             where features are kept
    """

    verifier: Verifier
    clip: Clip
    extractor: Extractor
    reference: PictureSet
    run: Run


def load_toy_estimators(verifier_file: Path, clip_file: Path, reference: Path, cache: Path) -> ToyEstimators:
    """The networks of two files and the pictures of the folder `reference`; features are kept in the folder `cache`.

    Raises FileNotFoundError or ValueError, naming the file.
    """
    verifier = load_verifier(verifier_file)
    extractor, pictures = verifier_extractor(verifier, verifier_file), find_pictures(reference, WORKERS)
    run = Run(cache, batch_size=32, workers=WORKERS, device="cpu")
    return ToyEstimators(verifier, load_small_clip(clip_file), extractor, pictures, run)


def load_small_clip(path: str | Path) -> Clip:
    """The small CLIP of `train.py --stage text`, for inference; its preprocess averages to its own size and range.

    Raises FileNotFoundError, or ValueError for a file that is damaged or none of stage text's pairs.
    """
    state, metadata = load_model_file(path)
    if metadata.get("kind") != KIND:
        raise ValueError(f"{path} is no {FILE_NAME} of `train.py --stage text`, which writes one beside its model")
    with content_expected(path, "metadata that says how large its networks and pictures are"):
        sizes, side = parse_json(metadata["sizes"]), int(metadata["side"])
        pair = PictureText(TextEncoder(TextConfig(**sizes["text"])), sizes["embed_dim"], sizes["channels"])
    strict_load(pair, state, path)
    return Clip(KIND, pair.requires_grad_(False).eval(), partial(_averaged, side=side), tokenize)


def _averaged(picture: Image.Image, side: int) -> Tensor:
    """RGB picture -> (3, side, side) in [-1, 1], every pixel the mean of those that it covers, as in the training."""
    image = pictures_to_tensor(np.array(picture))
    return F.adaptive_avg_pool2d(image, side)


@torch.no_grad()
def small_clip_scores(clip: Clip, images: Sequence[np.ndarray], texts: Sequence[str]) -> np.ndarray:
    """2.5 max(cosine, 0) of each picture (H, W, 3) uint8 with its caption: (N,).

    Without CLIPScore's prefix "A photo depicts": this encoder has never met the word.
    """
    batches = [torch.stack([clip.preprocess(Image.fromarray(image)) for image in images[k : k + PICTURES_AT_ONCE]])
               for k in range(0, len(images), PICTURES_AT_ONCE)]  # fmt: skip
    features = torch.cat([clip.model.encode_image(batch) for batch in batches])
    return clip_scores(clip, features.numpy(), texts, prefix="")


def regions_touch(label_map: np.ndarray) -> bool:
    """Whether the largest hand region and the largest object region of (H, W) 0/1/2 have neighbouring pixels.

    A stand-in for the state "portable object" of the 100DOH detector (paper, Table 2).  In a projection things touch
    that are apart in depth, so it is milder; the largest regions, so that a speck beside the other is no contact.
    """
    hand, thing = (_largest_region(label_map == label) for label in (HAND, OBJECT))
    return bool((ndimage.binary_dilation(hand, NEIGHBOURS) & thing).any())


def _largest_region(mask: np.ndarray) -> np.ndarray:
    regions, count = ndimage.label(mask, NEIGHBOURS)
    return mask if count < 2 else regions == 1 + np.bincount(regions.ravel())[1:].argmax()


def measure_pictures(results: Results, folder: Path, shaded: Path, estimators: ToyEstimators) -> None:
    """Add all numbers of a folder's pictures, each held against the record of `shaded` in its place.

    Raises ValueError when the two folders do not hold the same captions in the same order, or none.
    """
    records, others = paired_records(shaded, folder)
    texts = [record["text"] for record in records]
    pictures = find_pictures(folder, WORKERS)
    add_frechet(results, estimators.run, pictures, estimators.reference, estimators.extractor)
    images = [load_image(folder, record) for record in others]
    definition = "2.5 max(cosine, 0) of the small CLIP of stage text"
    for name, told in ((TOY_CLIP, texts), (SHUFFLED_CLIP, texts[1:] + texts[:1])):
        scores = small_clip_scores(estimators.clip, images, told)
        results.add(name, mean_of(scores), len(scores), "higher", definition)
    by_verifier = Estimators(estimators.verifier)
    seen = by_verifier.predict(images)
    found = [by_verifier.score(record["file_name"], image, load_truth(shaded, record), prediction)
             for image, record, prediction in zip(images, records, seen, strict=True)]  # fmt: skip
    for name, (key, factor, definition) in SCORED.items():
        values = np.array([row[key] for row in found if row[key] is not None])
        if len(values):
            bounds = SHARE if factor == 1 else PERCENT
            results.add(name, mean_of(factor * values), len(values), "higher", definition, bounds)
    touching = np.array([regions_touch(prediction.label_map) for prediction in seen])
    add_contact(results, touching, np.array([str(record.get("category")) for record in records]))


def add_contact(results: Results, touching: np.ndarray, categories: np.ndarray) -> None:
    """Share of pictures (N,) bool in which hand and object touch: of each category (N,), and the mean of these."""
    definition = "share of pictures whose largest hand and object regions, as the verifier sees them, touch"
    for name in sorted(set(categories)):
        mine = touching[categories == name]
        results.add(contact_of(name), mean_of(100 * mine), len(mine), "higher", definition, PERCENT)
    mean = mean_of_groups(100 * touching, categories)
    results.add(CONTACT, mean, len(touching), "higher", f"{definition}; mean of categories", PERCENT)


def contact_of(category: str) -> str:
    """Name of the number of one category."""
    return f"toy contact, {category}, %"
