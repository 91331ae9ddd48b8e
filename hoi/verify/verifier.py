"""A small network that looks at pictures.  Picture -> label map, hand keypoints, fingertips, background, material.

Pictures of any size are resized to the network's own square (128 px unless trained for another; its file says which),
and what it finds there is brought back to the picture's pixels.  hoi/verify/training.py trains it.

In order: the network, how its heat maps become points, how a picture becomes its input and its outputs a Prediction,
and its file.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from hoi.common import tensors
from hoi.common.arrays import pictures_to_tensor, resized_points
from hoi.common.files import content_expected, parse_json
from hoi.conditions import KEYPOINTS
from hoi.verify.choices import BUILT_IN_VERIFIER, DEFAULT_SIDE

LABELS = ("background", "hand", "object")
CELL = 2  # pixels; heat maps have one value a cell
CHANNELS = (32, 48, 64, 96, 128)  # of each level: a million weights, 2 MB in half precision, small enough to ship
PEAK_RADIUS = 3  # cells; a training target has 96 % of its heat this close to its peak
TIP_RADIUS, TIP_LIMIT = 2, 0.4  # cells in which one fingertip is found once; how sure a fingertip must be, 0 to 1
TRAIN_COMMAND = "python -m hoi.verify train --data DIR ... --out FILE"


def block(channels_in: int, channels_out: int, stride: int = 1) -> nn.Sequential:
    """Two 3x3 convolutions with group norm; the first may halve the size."""
    # Group norm: a picture is seen alike in any batch, alone too, as batch norm would not have it.
    layers: list[nn.Module] = []
    for width, step in ((channels_in, stride), (channels_out, 1)):
        layers += [nn.Conv2d(width, channels_out, 3, step, 1), nn.GroupNorm(8, channels_out), nn.SiLU()]
    return nn.Sequential(*layers)


@dataclass(frozen=True)
class Outputs:
    """What the network says of B pictures of S x S pixels.

    labels      (B, 3, S, S)        logits of background, hand, object
    heat        (B, 21, S/2, S/2)   logits of where each keypoint is, one softmax over all cells
    background  (B, K)              logits of the background words
    features    (B, C)              what the deepest two levels see, averaged over the picture
    tips        (B, 1, S/2, S/2)    logits of whether a fingertip, of any finger, is seen there
    material    (B, M)              logits of the object's material words
    """

    labels: Tensor
    heat: Tensor
    background: Tensor
    features: Tensor
    tips: Tensor
    material: Tensor


class Hourglass(nn.Module):
    """A U-Net without a head (Ronneberger et al. 2015); channels: of each level, the finest first."""

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        # Cells of 2x2 pixels become channels and come apart again at the end: a third of the work at full resolution.
        self.stem = block(3 * CELL**2, channels[0])
        pairs = list(zip(channels[:-1], channels[1:], strict=True))
        self.down = nn.ModuleList(block(a, b, stride=2) for a, b in pairs)
        self.up = nn.ModuleList(block(b + a, a) for a, b in reversed(pairs))

    def down_and_up(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        """image (B, 3, S, S) -> what it becomes (B, channels[0], S/2, S/2); the levels on the way down."""
        levels = [self.stem(F.pixel_unshuffle(image, CELL))]  # (B, 32, S/2, S/2), each level half of the one before
        for down in self.down:
            levels.append(down(levels[-1]))
        x = levels[-1]
        for up, level in zip(self.up, levels[-2::-1], strict=True):
            x = up(torch.cat([F.interpolate(x, scale_factor=2.0), level], dim=1))
        return x, levels


class Verifier(Hourglass):
    """A U-Net of about a million weights with five heads.

    backgrounds  the K words that it tells apart
    side         S, a multiple of 32
    reached      attribute: what perfect pictures score by it, see training.score_reached; empty where nobody measured
    materials    the M words that it tells apart, "" for paint
    Raises ValueError for another side.
    """

    def __init__(
        self, backgrounds: Sequence[str], side: int = DEFAULT_SIDE, channels: Sequence[int] = CHANNELS,
        materials: Sequence[str] = ("",),
    ) -> None:  # fmt: skip
        super().__init__(channels)
        multiple = CELL * 2 ** (len(channels) - 1)
        if side < multiple or side % multiple:
            raise ValueError(f"the verifier's side is {side} pixels; it must be a multiple of {multiple}")
        self.backgrounds, self.side, self.materials = tuple(backgrounds), side, tuple(materials)
        self.reached: dict[str, float] = {}
        self.labels = nn.Conv2d(channels[0], len(LABELS) * CELL**2, 1)
        self.heat = nn.Conv2d(channels[0], KEYPOINTS, 1)
        self.background = nn.Linear(channels[-1] + channels[-2], len(self.backgrounds))
        self.tips = nn.Conv2d(channels[0], 1, 1)
        self.material = nn.Linear(channels[-1] + channels[-2] + channels[0], len(self.materials))

    def forward(self, image: Tensor) -> Outputs:
        """image (B, 3, S, S) in [-1, 1] -> what is seen in it."""
        x, levels = self.down_and_up(image)
        features = torch.cat([level.mean((2, 3)) for level in levels[-2:]], dim=1)
        labels = F.pixel_shuffle(self.labels(x), CELL)
        # What a thing is made of shows on itself: fine features are averaged where the object is seen.
        thing = F.avg_pool2d(labels.detach().softmax(1)[:, LABELS.index("object"), None], CELL)
        fine = (x * thing).sum((2, 3)) / thing.sum((2, 3)).clamp_min(1)
        material = self.material(torch.cat([features, fine], dim=1))
        return Outputs(labels, self.heat(x), self.background(features), features, self.tips(x), material)


def cells_to_pixels(cells: Tensor) -> Tensor:
    """Centre of cell k -> pixel; pixel centres at integers."""
    return cells * CELL + (CELL - 1) / 2


def pixels_to_cells(pixels: Tensor) -> Tensor:
    """The inverse: a pixel, of any fraction -> where it lies between the centres of cells."""
    return (pixels - (CELL - 1) / 2) / CELL


def decode_heat(heat: Tensor) -> tuple[Tensor, Tensor]:
    """Where each keypoint is, between the cells, and how sure that is.

    heat     (B, 21, h, w)  logits
    returns  points (B, 21, 2) in cells, x first; confidence (B, 21): the share of the heat near its peak, 0 to 1
    A parabola through the logits of the peak and its neighbours, exact for a Gaussian; a peak at the border stays.
    """
    height, width = heat.shape[2:]
    peak = heat.flatten(2).argmax(2)  # (B, 21)
    y, x = peak // width, peak % width

    def at(y: Tensor, x: Tensor) -> Tensor:
        return heat.flatten(2).gather(2, (y.clamp(0, height - 1) * width + x.clamp(0, width - 1))[..., None])[..., 0]

    def offset(before: Tensor, here: Tensor, after: Tensor, inside: Tensor) -> Tensor:
        bend = 2 * here - before - after
        return torch.where(inside & (bend > 0), (after - before) / (2 * bend.clamp_min(1e-12)), 0.0).clamp(-0.5, 0.5)

    here = at(y, x)
    dx = offset(at(y, x - 1), here, at(y, x + 1), (x > 0) & (x < width - 1))
    dy = offset(at(y - 1, x), here, at(y + 1, x), (y > 0) & (y < height - 1))
    # Heat around the peak, not the peak's height: that depends on where between four cells the joint lies.
    around = 2 * PEAK_RADIUS + 1
    share = F.avg_pool2d(heat.flatten(2).softmax(2).view_as(heat), around, 1, PEAK_RADIUS, divisor_override=1)
    confidence = share.flatten(2).gather(2, peak[..., None])[..., 0]
    return torch.stack([x + dx, y + dy], dim=2), confidence.clamp(0, 1)


def decode_tips(tips: Tensor) -> list[Tensor]:
    """Where fingertips are seen: logits (B, 1, h, w) -> of each picture its N fingertips (N, 2), cells, x first."""
    sure = tips[:, 0].sigmoid()
    highest = F.max_pool2d(sure[:, None], 2 * TIP_RADIUS + 1, 1, TIP_RADIUS)[:, 0]
    return [each.nonzero().flip(1) for each in (sure == highest) & (sure > TIP_LIMIT)]


def resized(image: np.ndarray, side: int) -> np.ndarray:
    """(H, W, 3) uint8 -> (side, side, 3) uint8, stretched to the square, averaged where it shrinks."""
    if image.shape[:2] == (side, side):
        return image
    return np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR))


@dataclass(frozen=True)
class Prediction:
    """What the verifier sees in one picture of H x W pixels.

    label_map     (H, W)   0 background, 1 hand, 2 object
    keypoints_2d  (21, 2)  pixels
    confidence    (21,)    0 to 1
    background    the likeliest background word
    features      (C,)     for comparing sets of pictures
    tips          (N, 2)   pixels, each fingertip that can be seen
    material      the likeliest material word, "" for paint
    """

    label_map: np.ndarray
    keypoints_2d: np.ndarray
    confidence: np.ndarray
    background: str
    features: np.ndarray
    tips: np.ndarray
    material: str


@torch.no_grad()
def predict(verifier: Verifier, images: Sequence[np.ndarray]) -> list[Prediction]:
    """What is seen in each of a batch of pictures (H, W, 3) uint8 of any sizes."""
    side = verifier.side
    pictures = pictures_to_tensor(np.stack([resized(image, side) for image in images]))
    found = vars(verifier(pictures.to(next(verifier.parameters()).device)))
    outputs = Outputs(**{name: each.cpu() for name, each in found.items()})
    cells, confidence = decode_heat(outputs.heat)
    points = cells_to_pixels(cells).double().numpy()
    tips = [cells_to_pixels(each).double().numpy() for each in decode_tips(outputs.tips)]
    predictions = []
    for k, image in enumerate(images):
        labels, size = outputs.labels[k : k + 1], image.shape[:2]
        if size != (side, side):
            labels = F.interpolate(labels, size=size, mode="bilinear", antialias=True)  # logits: edges stay smooth
        predictions.append(
            Prediction(
                label_map=labels[0].argmax(0).to(torch.uint8).numpy(),
                keypoints_2d=resized_points(points[k], (side, side), size),
                confidence=confidence[k].double().numpy(),
                background=verifier.backgrounds[int(outputs.background[k].argmax())],
                features=outputs.features[k].numpy(),
                tips=resized_points(tips[k], (side, side), size),
                material=verifier.materials[int(outputs.material[k].argmax())],
            )
        )
    return predictions


def save_verifier(path: Path, verifier: Verifier, more: dict[str, str] | None = None) -> None:
    """Write the weights in half precision (2 MB); `more` are further strings for the file's metadata."""
    metadata = {"kind": "verifier", "side": str(verifier.side), "backgrounds": json.dumps(verifier.backgrounds)}
    metadata |= {"materials": json.dumps(verifier.materials), "reached": json.dumps(verifier.reached)}
    state = {name: tensor.half() for name, tensor in verifier.state_dict().items()}
    tensors.save_model(path, state, metadata | (more or {}))


def load_verifier(path: Path = BUILT_IN_VERIFIER) -> Verifier:
    """The network of a file that save_verifier wrote, for inference.

    Raises FileNotFoundError or ValueError; both say how to get a verifier.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"no verifier at {path}; train one with `{TRAIN_COMMAND}` and give it as --verifier FILE"
        )
    state, metadata = tensors.load_model_file(path)
    if metadata.get("kind") != "verifier":
        raise ValueError(f"{path} is no verifier; train one with `{TRAIN_COMMAND}`")
    with content_expected(path, "metadata that says backgrounds, materials and side"):
        told = {key: parse_json(metadata[key]) for key in ("backgrounds", "materials", "reached")}
        verifier = Verifier(told["backgrounds"], int(metadata["side"]), materials=told["materials"])
        verifier.reached = told["reached"]
    tensors.strict_load(verifier, state, path)
    return verifier.eval()
