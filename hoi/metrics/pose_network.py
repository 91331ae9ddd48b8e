"""A small category-level pose network, to compare training pictures by: crop -> coordinates -> pose.  Paper: Table 3.

    python -m hoi.metrics.pose_network train --data DIR ... --out pose.safetensors --steps 600
    python -m hoi.metrics.pose_network predict --data DIR ... --network pose.safetensors --out poses.json
    python -m hoi.metrics --fake DIR ... --poses poses.json

As in NOCS (Wang et al. 2019) every pixel of a crop is told whether it shows the object, and where on the normalised
model it lies; with the depth of the records a similarity then gives pose and size.  Category and box of the object are
those of the record, as if a perfect detector had found it, so that pictures are compared and not detectors.
"""

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from hoi.common import tensors
from hoi.common.arrays import box_of, pictures_to_tensor
from hoi.common.command import file_to_write, not_negative, positive, problems_as_messages
from hoi.common.files import write_whole
from hoi.common.machine import keep_freed_memory
from hoi.data.folder import array_of, load_depth, load_image, load_label_map, read_folders
from hoi.export.folder import lacking
from hoi.export.nocs import MIN_PIXELS, NOCS_KEYS
from hoi.geometry.camera import transform_points, unproject
from hoi.geometry.render import OBJECT
from hoi.metrics.hands import umeyama
from hoi.metrics.poses import CLASS_NAMES, SYMMETRIC, true_objects
from hoi.training.data import read_ahead, step_generator
from hoi.verify.training import steps_passed, train_network
from hoi.verify.verifier import CELL, Hourglass

SIDE = 64  # pixels of a crop
CHANNELS = (32, 48, 64, 96)  # of each level: half a million weights
MARGIN = 1.2  # side of the crop over the longer side of the box
MAX_SHIFT, MAX_ZOOM = 0.1, 0.15  # of the crop's side, in training: detections are not exact
BEND, COORDINATE_WEIGHT = 0.1, 10.0  # where the loss of coordinates turns from square to straight, as published
KEPT_BYTES = 2 << 30  # of pictures in memory; beyond that they are read again
# Fits of a pose, each without points farther than FAR times the median error, and NEAR metres, which depth is told to.
ROUNDS, FAR, NEAR = 5, 2.0, 0.001
SMALLEST = 0.01  # metres, diagonal: what is found smaller is no object that a hand grasps


@dataclass(frozen=True)
class View:
    """An object in a picture.

    image           (H, W, 3) uint8
    depth           (H, W) metres, 0 = unknown
    visible         (H, W) bool, the object's pixels
    intrinsics      (3, 3) pixels
    class_id        index into poses.CLASS_NAMES
    model_to_camera (4, 4) [sR|t], see hoi/metrics/poses.py
    """

    image: np.ndarray
    depth: np.ndarray
    visible: np.ndarray
    intrinsics: np.ndarray
    class_id: int
    model_to_camera: np.ndarray

    def square(self) -> tuple[float, float, float]:
        """Left, top (outer edges, so that pixel k reaches from k to k + 1) and side of the object's crop."""
        left, top, right, bottom = box_of(self.visible)
        side = MARGIN * max(right - left, bottom - top)
        return (left + right - side) / 2, (top + bottom - side) / 2, side

    def crop(self, left: float, top: float, side: float, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A square of the picture, in size x size pixels; black beyond the border.

        returns  image (size, size, 3) uint8; points (size, size, 3) metres in the camera frame, of the nearest pixel
                 each, 0 where nothing is known; visible (size, size) bool
        """
        step = side / size
        affine = (step, 0, left, 0, step, top)
        image = Image.fromarray(self.image).transform((size, size), Image.Transform.AFFINE, affine, Image.BILINEAR)
        at = (np.arange(size) + 0.5) * step
        columns, rows = np.meshgrid(np.floor(left + at).astype(int), np.floor(top + at).astype(int))
        height, width = self.depth.shape
        inside = (columns >= 0) & (columns < width) & (rows >= 0) & (rows < height)
        near = rows.clip(0, height - 1), columns.clip(0, width - 1)
        points = unproject(columns, rows, self.depth[near] * inside, self.intrinsics)
        return np.array(image), points, self.visible[near] & inside


def read_view(folder: Path, record: dict[str, Any], models: dict[str, Any]) -> View | str:
    """The view of a record, or why it cannot be learned from or predicted.

    models  read so far, see poses.true_objects
    """
    if record.get("category") not in CLASS_NAMES[1:]:
        return f"their category is none of NOCS's ({', '.join(CLASS_NAMES[1:])})"
    if record.get("object_frame") == "file":
        return "their meshes stand in their own frames (--scenes), and a category needs all in one"
    if absent := lacking(record, NOCS_KEYS):
        return absent
    visible, true = load_label_map(folder, record) == OBJECT, true_objects(folder, record, models)
    if visible.sum() < MIN_PIXELS:
        return f"less than {MIN_PIXELS} pixels of their objects are visible"
    image, depth = load_image(folder, record), load_depth(folder, record)
    return View(image, depth, visible, array_of(record, "intrinsics"), int(true.class_ids[0]), true.poses[0])


class PoseNetwork(Hourglass):
    """A U-Net of half a million weights with a mask and coordinates for every class of NOCS; side: a multiple of 16."""

    def __init__(self, side: int = SIDE) -> None:
        super().__init__(CHANNELS)
        self.side = side
        self.head = nn.Conv2d(CHANNELS[0], 4 * len(CLASS_NAMES) * CELL**2, 1)

    def forward(self, image: Tensor, class_ids: Tensor) -> tuple[Tensor, Tensor]:
        """image (B, 3, S, S) in [-1, 1], class_ids (B,) -> mask (B, S, S) logits, coordinates (B, 3, S, S)."""
        x, _ = self.down_and_up(image)
        every = F.pixel_shuffle(self.head(x), CELL).unflatten(1, (len(CLASS_NAMES), 4))
        chosen = every[torch.arange(len(image)), class_ids].float()  # (B, 4, S, S)
        return chosen[:, 0], chosen[:, 1:]


def turned_to_fit(target: Tensor, coordinates: Tensor, seen: Tensor) -> Tensor:
    """target (B, 3, S, S) turned about y by the angle that brings it nearest to coordinates, over seen (B, S, S) bool.

    NOCS tries six angles and takes the least loss; the least squares of all angles is as short.
    """
    (x, y, z), (u, _, w) = target.unbind(1), coordinates.detach().unbind(1)
    # A turn takes (x, z) to (c x + s z, c z - s x); its product with (u, w) is largest at this angle.
    angle = torch.atan2(((z * u - x * w) * seen).sum((1, 2)), ((x * u + z * w) * seen).sum((1, 2)))[:, None, None]
    c, s = angle.cos(), angle.sin()
    return torch.stack([c * x + s * z, y, c * z - s * x], dim=1)


def pose_loss(mask: Tensor, coordinates: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Cross-entropy of the mask and a smooth L1 of the coordinates, of symmetric classes that of the best turn about y.

    mask (B, S, S), coordinates (B, 3, S, S) as of PoseNetwork; batch as of `read_batch`
    """
    seen, target = batch["seen"], batch["target"]
    symmetric = torch.tensor([name in SYMMETRIC for name in CLASS_NAMES])[batch["class_id"], None, None, None]
    target = torch.where(symmetric, turned_to_fit(target, coordinates, seen), target)
    each = F.smooth_l1_loss(coordinates, target, reduction="none", beta=BEND).mean(1)
    missed = (each * seen).sum() / seen.sum().clamp_min(1)
    return F.binary_cross_entropy_with_logits(mask, batch["visible"].float()) + COORDINATE_WEIGHT * missed


def read_batch(views: Sequence[View], seeds: Sequence[int], size: int) -> dict[str, Tensor]:
    """Crops of views, each moved, zoomed and tinted a little as its seed decides.

    returns  image (B, 3, S, S) in [-1, 1] or a little beyond, class_id (B,), visible and seen (B, S, S) bool, the
             latter where depth is known, too; target (B, 3, S, S), the coordinates there
    """
    rows = []
    for view, seed in zip(views, seeds, strict=True):
        generator = np.random.default_rng(seed)
        left, top, side = view.square()
        shift, zoom = generator.uniform(-MAX_SHIFT, MAX_SHIFT, 2), generator.uniform(-MAX_ZOOM, MAX_ZOOM)
        left, top = np.array([left, top]) + (shift - zoom / 2) * side
        image, points, visible = view.crop(left, top, side * (1 + zoom), size)
        target = transform_points(np.linalg.inv(view.model_to_camera), points).astype(np.float32)
        # As the verifier's: drawn, generated and real pictures differ in fine texture and in tint.
        gain, noise = 1 + 0.1 * generator.standard_normal((3, 1, 1)), generator.standard_normal((3, size, size))
        picture = pictures_to_tensor(image) * torch.tensor(gain).float() + 0.04 * torch.tensor(noise).float()
        rows.append((picture, torch.tensor(view.class_id), torch.tensor(visible),
                     torch.tensor(visible & (points[..., 2] > 0)), torch.tensor(target).movedim(-1, 0)))  # fmt: skip
    names = ("image", "class_id", "visible", "seen", "target")
    return dict(zip(names, map(torch.stack, zip(*rows, strict=True)), strict=True))


def train_pose_network(
    folders: Sequence[Path], steps: int, seed: int, side: int = SIDE, batch_size: int = 32
) -> tuple[PoseNetwork, Counter[str]]:
    """Train on the pictures of dataset folders, of whatever make.

    seed     of first weights and batches; neither threads nor processes matter beyond rounding
    returns  the network, for inference, and how many records taught nothing, by reason
    Raises ValueError when no record can be learned from, and as load_picture does.
    """
    folder, records = read_folders(folders)
    kept = lru_cache(KEPT_BYTES // (8 * records[0]["height"] * records[0]["width"]) if records else 1)
    models = {}
    read = kept(lambda k: read_view(folder, records[k], models))
    reasons = [view if isinstance(view := read(k), str) else "" for k in range(len(records))]
    left_out, fit = Counter(filter(None, reasons)), [k for k, reason in enumerate(reasons) if not reason]
    if not fit:
        why = "; ".join(f"{count} records left out: {reason}" for reason, count in left_out.items()) or "no records"
        raise ValueError(f"{', '.join(map(str, folders))}: nothing to learn poses from; {why}")
    with torch.random.fork_rng():  # fresh weights come from torch's global generator, which is put back
        torch.manual_seed(seed)
        network = PoseNetwork(side).to(memory_format=torch.channels_last)

    def batch_of(step: int, _: int) -> dict[str, Tensor]:
        generator = step_generator(seed, step)
        picked = torch.randint(len(fit), (batch_size,), generator=generator).tolist()
        seeds = torch.randint(2**62, (batch_size,), generator=generator).tolist()
        return read_batch([read(fit[k]) for k in picked], seeds, side)

    batches = read_ahead(batch_of, ((step, 0) for step in range(steps)))
    train_network(network, batches, steps_passed(steps), lambda said, batch: pose_loss(*said, batch), ["class_id"])
    return network.eval(), left_out


def fit_pose(coordinates: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray, float] | None:
    """Pose and size from coordinates (N, 3) on the model and points (N, 3), metres, in the camera frame.

    returns  model_to_camera (4, 4) [sR|t]; size (3,) of the model's box; the share of the points that it is fitted to.
             None where they fix no pose
    Points that lie far off (a finger's depth taken for the mug's) are left out, round by round, where NOCS draws at
    random.  The box lies around the origin, so its sides are twice the largest coordinates, as published.
    """
    near = np.ones(len(points), bool)
    for _ in range(ROUNDS):
        try:
            scale, rotation, translation = umeyama(coordinates[near], points[near])
        except ValueError:  # all on a line, or of one coordinate
            return None
        error = np.linalg.norm(points - scale * coordinates @ rotation.T - translation, axis=1)
        near = error <= max(FAR * np.median(error), NEAR)
    if scale < SMALLEST:
        return None
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = scale * rotation, translation
    return pose, 2 * np.abs(coordinates[near]).max(axis=0), float(near.mean())


@torch.no_grad()
def predict_pose(network: PoseNetwork, view: View) -> list[dict[str, Any]]:
    """What the network finds in a view: one object in the form of POSE_FORMAT, or none."""
    image, points, _ = view.crop(*view.square(), network.side)
    mask, coordinates = network(pictures_to_tensor(image)[None], torch.tensor([view.class_id]))
    chance = mask[0].sigmoid().double().numpy()
    found = (chance > 0.5) & (points[..., 2] > 0)
    fitted = fit_pose(coordinates[0].movedim(0, -1).double().numpy()[found], points[found]) if found.any() else None
    if fitted is None:
        return []
    pose, size, share = fitted
    said = {"category": CLASS_NAMES[view.class_id], "score": float(chance[found].mean() * share)}
    return [said | {"model_to_camera": pose.tolist(), "size": size.tolist()}]


def predictions_of(network: PoseNetwork, folders: Sequence[Path]) -> tuple[dict[str, list], Counter[str]]:
    """file_name of every picture -> its objects, [] where it has no view; names as hoi.metrics has them.

    returns  also how many pictures have no view, by reason
    """
    folder, records = read_folders(folders)
    models, found, left_out = {}, {}, Counter()
    for record in tqdm(records, "poses", unit="picture"):
        if record["file_name"] is not None:
            view = read_view(folder, record, models)
            left_out.update({view} if isinstance(view, str) else ())
            found[record["file_name"]] = [] if isinstance(view, str) else predict_pose(network, view)
    return found, left_out


def save_pose_network(path: Path, network: PoseNetwork, more: dict[str, str] | None = None) -> None:
    """Write the weights in half precision; `more` are further strings for the file's metadata."""
    state = {name: tensor.half() for name, tensor in network.state_dict().items()}
    tensors.save_model(path, state, {"kind": "pose network", "side": str(network.side)} | (more or {}))


def load_pose_network(path: Path) -> PoseNetwork:
    """The network of a file that save_pose_network wrote, for inference.  Raises FileNotFoundError or ValueError."""
    state, metadata = tensors.load_model_file(path)
    if metadata.get("kind") != "pose network":
        raise ValueError(f"{path} is no pose network; make one with `python -m hoi.metrics.pose_network train`")
    network = PoseNetwork(int(metadata["side"]))
    tensors.strict_load(network, state, path)
    return network.eval()


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line, or a list."""
    parser = argparse.ArgumentParser(prog="python -m hoi.metrics.pose_network", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train on dataset folders with pictures, drawn, generated or real")
    predict = commands.add_parser("predict", help="find the objects, for python -m hoi.metrics --poses")
    for command in (train, predict):
        command.add_argument("--data", type=Path, nargs="+", required=True, metavar="DIR", help="dataset folders")
        command.add_argument("--out", type=file_to_write, required=True, metavar="FILE", help="network or JSON file")
    train.add_argument("--steps", type=positive, default=600, help="of 32 crops each (default %(default)s)")
    train.add_argument("--seed", type=not_negative, default=0, help="of weights and batches (default %(default)s)")
    predict.add_argument("--network", type=Path, required=True, metavar="FILE", help="made by train")
    return parser.parse_args(arguments)


def main(args: argparse.Namespace) -> None:
    """Train, or predict."""
    keep_freed_memory()
    if args.command == "train":
        network, left_out = train_pose_network(args.data, args.steps, args.seed)
        told = {"data": ", ".join(map(str, args.data)), "steps": str(args.steps), "seed": str(args.seed)}
        save_pose_network(args.out, network, told)
    else:
        found, left_out = predictions_of(load_pose_network(args.network), args.data)
        write_whole(args.out, json.dumps({"predictions": found}).encode())
        print(f"{sum(map(bool, found.values()))} objects found in {len(found)} pictures")
    for reason, count in left_out.items():
        print(f"{count} records left out: {reason}")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    with problems_as_messages("python -m hoi.metrics.pose_network", "interrupted; the same command begins again"):
        main(parse_args())
