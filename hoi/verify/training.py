"""Training the verifier.  Dataset folders with shaded or real pictures -> Verifier.  Never generated pictures.

A verifier that learned from generated pictures would find their faults normal; faults of fingers are painted into
half of the pictures instead (faults.py).  Only to measure what generated ones teach (Table 3) they may be allowed.
Each record teaches what it has: without keypoints the label map alone, without a known background word no word.  A
step reads a batch, moves it about, and compares what the network says with label maps, heat maps, fingertips and words.
"""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from hoi.common.arrays import pictures_to_tensor, resized_points
from hoi.common.machine import fast_dtype
from hoi.conditions import KEYPOINTS
from hoi.data.folder import load_image, read_records, require
from hoi.geometry.render import HAND, OBJECT
from hoi.toyworld.backgrounds import BACKGROUNDS
from hoi.toyworld.words import MATERIAL_WORDS, words_in
from hoi.training.data import read_ahead, step_generator
from hoi.verify.faults import MOST_TIPS, Fingers, with_fault
from hoi.verify.scores import RELATIVE, Estimators, load_truth, score_records
from hoi.verify.verifier import Outputs, Verifier, pixels_to_cells, resized

VerifierBatch = dict[str, Tensor]

UNKNOWN = 255  # in a label map: nobody said
SPREAD = 1.5  # cells, standard deviation of a heat map's target: 3 pixels, about a third of a finger at 128 px
# Found by trial for trainings of minutes: the rate falls from its peak to a fiftieth, after steps in which Adam's
# averages are still empty.
LEARNING_RATE, WARM_UP = 2e-3, 30
MAX_SHIFT, MAX_ZOOM = 0.08, 0.15  # of the picture's side: little, so that hand and object stay in it
FAULT_SHARE = 0.5  # of the pictures of hands get a fault of fingers painted in
TIP_SPREAD, TIP_WEIGHT = 1.2, 0.1  # cells; fingertips are nearer to each other than a finger's joints
TIP_BIAS = -2.2  # fingertips are rare: begin with a chance of 0.1 everywhere (Zhou et al. 2019)
HELD_OUT, REACHED_PERCENT = 20, 5  # one record of so many is never trained on; percent of these that may score less
WORD_WEIGHT = HEAT_WEIGHT = 0.2  # 4.7 nats of heat, 3.0 of words beside 1.1 of label maps at the start
CACHE_BYTES = 2 << 30  # pictures kept in memory; beyond that they are read again


class VerifierTrainingSet:
    """The pictures of dataset folders with what they show, at the verifier's size, read when they are asked for.

    side             pixels; pictures become side x side, kept in memory up to CACHE_BYTES
    allow_generated  to measure what generated pictures teach, not to judge any
    Raises ValueError when a folder has no records, a record has no picture, or a network made one.
    """

    def __init__(self, folders: Sequence[Path], side: int, allow_generated: bool = False) -> None:
        self.side, self.entries = side, []
        for folder in map(Path, folders):
            records = read_records(folder)
            generated = [record["file_name"] for record in records if record.get("checkpoint") is not None]
            if generated and not allow_generated:
                problem = f"{len(generated)} pictures (first {generated[0]}) are generated"
                raise ValueError(f"{folder}: {problem}; the verifier learns from shaded or real ones")
            require(folder, records, pictures=True)
            self.entries += [(folder, record) for record in records]
        # Every twentieth, 400 at most, is kept to say what perfect pictures score (`score_reached`).
        self.held_out = self.entries[HELD_OUT - 1 :: HELD_OUT][:400]
        del self.entries[HELD_OUT - 1 :: HELD_OUT]
        self.backgrounds, self.materials = sorted(BACKGROUNDS), ["", *MATERIAL_WORDS]
        # Three bytes of colour and a label a pixel.
        self._kept_example = lru_cache(CACHE_BYTES // (4 * side**2))(self._example)
        self._readers = ThreadPoolExecutor(max_workers=2)

    def _example(self, index: int) -> tuple[Fingers, int, int]:
        """The picture at S x S pixels with what it shows, background and material class, each -1 where nobody said."""
        folder, record = self.entries[index]
        image, truth = load_image(folder, record), load_truth(folder, record)
        label_map = np.full(image.shape[:2], UNKNOWN, np.uint8) if truth.label_map is None else truth.label_map
        points = np.full((KEYPOINTS + MOST_TIPS, 2), np.nan)
        if truth.keypoints_2d is not None:
            points[:-1] = np.concatenate([truth.keypoints_2d, truth.tips])
        points = resized_points(points, image.shape[:2], (self.side, self.side)).astype(np.float32)
        labels = np.asarray(Image.fromarray(label_map).resize((self.side, self.side), Image.Resampling.NEAREST))
        words = words_in(truth.text)
        word, material = words["background"], words["material"] or ""
        background = self.backgrounds.index(word) if word in self.backgrounds else -1
        # A caption without a material word means paint where the toy world drew the picture; elsewhere it says nothing.
        told = (material or record.get("look")) and (label_map == OBJECT).any()
        picture = Fingers(resized(image, self.side), labels, points[:KEYPOINTS], points[KEYPOINTS:])
        return picture, background, self.materials.index(material) if told else -1

    def read(self, indices: Sequence[int], seeds: Sequence[int]) -> VerifierBatch:
        """Pictures, FAULT_SHARE of those of hands with a fault that the seeds decide.

        returns  image (B, 3, S, S) in [-1, 1], labels (B, S, S), points (B, 21 + 6, 2) in pixels: joints, then
                 fingertips that are seen; background (B,), material (B,)
        """

        def example(index: int, seed: int) -> tuple[Fingers, int, int]:
            (picture, *words), generator = self._kept_example(index), np.random.default_rng(seed)
            return with_fault(picture, generator) if generator.random() < FAULT_SHARE else picture, *words

        pictures, background, material = zip(*self._readers.map(example, indices, seeds), strict=True)
        return {
            "image": pictures_to_tensor(np.stack([picture.image for picture in pictures])),
            "labels": torch.from_numpy(np.stack([picture.labels for picture in pictures])),
            "points": torch.from_numpy(np.stack([np.concatenate([p.points, p.tips]) for p in pictures])),
            "background": torch.tensor(background),
            "material": torch.tensor(material),
        }


def augment(batch: VerifierBatch, generator: torch.Generator) -> VerifierBatch:
    """Moved pictures with noise and other gains.

    Generated pictures differ from shaded ones in fine texture; noise and gain keep the network from using it.
    """
    moved = move(batch["image"], batch["labels"], batch["points"], generator)
    gain = 1 + 0.1 * torch.randn(len(moved["image"]), 3, 1, 1, generator=generator)
    noise = 0.04 * torch.randn(moved["image"].shape, generator=generator)
    return batch | moved | {"image": moved["image"] * gain + noise}


def move(image: Tensor, labels: Tensor, points: Tensor, generator: torch.Generator) -> VerifierBatch:
    """Mirror half of the pictures; shift and zoom all a little, with their labels and points.

    image (B, 3, S, S), labels (B, S, S) uint8, points (B, 21, 2) pixels -> the same, by name; what comes in from beyond
    the border repeats the border.  A mirrored right hand is a left hand: its thumb stays the thumb.
    """
    count, side = len(image), image.shape[-1]
    zoom = 1 + MAX_ZOOM * (2 * torch.rand(count, generator=generator) - 1)
    shift = 2 * MAX_SHIFT * (2 * torch.rand(count, 2, generator=generator) - 1)  # the picture spans -1 to 1
    mirror = 1 - 2 * (torch.rand(count, generator=generator) < 0.5).float()
    new_to_old = torch.zeros(count, 2, 3)
    new_to_old[:, 0, 0], new_to_old[:, 1, 1], new_to_old[:, :, 2] = zoom * mirror, zoom, shift
    grid = F.affine_grid(new_to_old, [count, 1, side, side], align_corners=False)
    new_image = F.grid_sample(image, grid, "bilinear", "border", align_corners=False)
    new_labels = F.grid_sample(labels[:, None].float(), grid, "nearest", "border", align_corners=False)
    old = (points + 0.5) * (2 / side) - 1
    new = (old - shift[:, None]) / torch.stack([zoom * mirror, zoom], dim=1)[:, None]
    return {"image": new_image, "labels": new_labels[:, 0].to(torch.uint8), "points": (new + 1) * (side / 2) - 0.5}


def gaussians(cells: Tensor, height: int, width: int, spread: float) -> tuple[Tensor, Tensor]:
    """A bump around each of cells (B, N, 2), 1 at most: (B, N, height, width); and whether it is inside (B, N)."""
    x, y = (
        torch.exp(-((torch.arange(size) - cells[..., axis, None]) ** 2) / (2 * spread**2))
        for axis, size in ((0, width), (1, height))
    )
    inside = ((cells > -0.5) & (cells < torch.tensor([width - 0.5, height - 0.5]))).all(2)  # NaN is outside
    return y[..., :, None] * x[..., None, :], inside


def tip_loss(logits: Tensor, tips: Tensor) -> Tensor:
    """Focal loss of a map of fingertips.

    logits  (B, 1, h, w);  tips (B, N, 2) pixels, NaN where there is none
    Cells beside a tip count less the nearer they are.  Source: Zhou et al. 2019, "Objects as points", Eq. 1.
    """
    bumps, inside = gaussians(pixels_to_cells(tips).round(), *logits.shape[2:], TIP_SPREAD)
    target = torch.where(inside[..., None, None], bumps, 0.0).amax(1)
    logits = logits[:, 0].float()
    chance = logits.sigmoid()
    here = (1 - chance) ** 2 * F.logsigmoid(logits)
    elsewhere = (1 - target) ** 4 * chance**2 * F.logsigmoid(-logits)
    return -torch.where(target == 1, here, elsewhere).sum() / inside.sum().clamp_min(1)


def heat_targets(points: Tensor, labels: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """What the heat maps should be.

    points   (B, 21, 2) pixels or NaN; labels (B, S, S)
    returns  targets (B, 21, h, w), each sums to 1: a Gaussian, or level where the picture has no hand; known (B, 21)
             False for a keypoint outside the picture, or that nobody annotated on a hand that is there
    """
    gaussian, inside = gaussians(pixels_to_cells(points), height, width, SPREAD)
    gaussian = gaussian / gaussian.sum((2, 3), keepdim=True)
    handless = ~((labels == HAND) | (labels == UNKNOWN)).flatten(1).any(1) & points.isnan().flatten(1).all(1)
    level = torch.full_like(gaussian, 1 / (height * width))
    return torch.where(inside[..., None, None], gaussian, level), inside | handless[:, None]


def verifier_loss(outputs: Outputs, batch: VerifierBatch) -> Tensor:
    """What outputs miss, summed; what nobody said counts nothing.

    Cross-entropy of label maps and words, Kullback-Leibler divergence of heat maps, focal loss of fingertips.
    """
    loss = outputs.labels.sum() * 0.0  # a batch that teaches nothing still has gradients, all 0
    labels, joints, tips = batch["labels"].long(), *batch["points"].tensor_split([KEYPOINTS], dim=1)
    if (labels != UNKNOWN).any():
        loss = loss + F.cross_entropy(outputs.labels.float(), labels, ignore_index=UNKNOWN)
    for name in ("background", "material"):
        if (batch[name] >= 0).any():
            loss = loss + WORD_WEIGHT * F.cross_entropy(getattr(outputs, name).float(), batch[name], ignore_index=-1)
    annotated = ~joints.isnan().flatten(1).all(1) | ~(labels == HAND).flatten(1).any(1)
    fingers = annotated & (labels != UNKNOWN).flatten(1).any(1)  # without a label map nobody knows which tips show
    if fingers.any():
        loss = loss + TIP_WEIGHT * tip_loss(outputs.tips[fingers], tips[fingers])
    targets, known = heat_targets(joints, batch["labels"], *outputs.heat.shape[2:])
    if known.any():
        heat = outputs.heat.float()[known].flatten(1).log_softmax(1)
        loss = loss + HEAT_WEIGHT * F.kl_div(heat, targets[known].flatten(1), reduction="batchmean")
    return loss


def train_network(
    network: nn.Module, batches: Iterable[dict[str, Tensor]], progress: Iterable[float],
    loss_of: Callable[[Any, dict[str, Tensor]], Tensor], others: Sequence[str] = (),
) -> None:  # fmt: skip
    """One step of AdamW for each entry of `progress`, the share of the training that has passed.

    loss_of  what the network says, batch -> loss
    others   of a batch, what the network takes beside its "image"
    Raises ValueError when the loss is not finite.
    """
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=1e-3)
    bf16 = fast_dtype("cpu") == torch.bfloat16
    for step, (share, batch) in enumerate(zip(progress, batches, strict=False)):
        # By the share of time that has passed, not by steps: how many there will be is known at the end.
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * max(0.02, 1 - share) * min(1.0, (step + 1) / WARM_UP)
        image = batch["image"].contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            outputs = network(image, *(batch[name] for name in others))
        loss = loss_of(outputs, batch)
        if not torch.isfinite(loss):
            raise ValueError("the loss is not finite; are the pictures and keypoints of these folders sound?")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)  # one odd batch must not undo minutes
        optimizer.step()


def train_verifier(
    folders: Sequence[Path], progress: Iterable[float], seed: int, side: int, batch_size: int = 32,
    start: Verifier | None = None, allow_generated: bool = False,
) -> Verifier:  # fmt: skip
    """Train one step for each entry of `progress`, the share of the training that has passed (`minutes_passed`).

    folders   dataset folders of shaded or real pictures;  side  pixels that the network sees
    start     a trained one to go on from, of the same side and words
    returns   the trained verifier, for inference
    Takes up to 2 GB of memory for pictures.  Raises ValueError as VerifierTrainingSet does, for generated pictures for
    instance, when `start` has another side or other words, and when the loss is not finite.
    """
    training_set = VerifierTrainingSet(folders, side, allow_generated)
    with torch.random.fork_rng():  # fresh weights come from torch's global generator, which is put back
        torch.manual_seed(seed)
        verifier = Verifier(training_set.backgrounds, side, materials=training_set.materials)
    torch.nn.init.constant_(verifier.tips.bias, TIP_BIAS)
    if start is not None:
        if (start.side, start.backgrounds, start.materials) != (side, verifier.backgrounds, verifier.materials):
            raise ValueError(f"the verifier to go on from sees {start.side} pixels, or other words than these pictures")
        verifier.load_state_dict(start.state_dict())
    verifier = verifier.to(memory_format=torch.channels_last)

    def read(step: int, _: int) -> VerifierBatch:
        generator = step_generator(seed, step)
        picked = torch.randint(len(training_set.entries), (batch_size,), generator=generator)
        return training_set.read(picked.tolist(), torch.randint(2**62, (batch_size,), generator=generator).tolist())

    # Only reading runs ahead: a second thread of torch operations would take the cores from the first.
    batches = read_ahead(read, ((step, 0) for step in itertools.count()))
    moved = (augment(batch, step_generator(seed, step, purpose=1)) for step, batch in enumerate(batches))
    train_network(verifier, moved, progress, verifier_loss)
    verifier.reached = score_reached(verifier.eval(), training_set.held_out)
    return verifier


def score_reached(verifier: Verifier, entries: Sequence[tuple[Path, dict]]) -> dict[str, float]:
    """Scores that all but REACHED_PERCENT of perfect pictures reach: shaded or real ones that no step has seen.

    entries  folder and record of each
    """
    rows = [row for folder, some in itertools.groupby(entries, key=lambda entry: entry[0])
            for row in score_records(folder, [record for _, record in some], Estimators(verifier))]  # fmt: skip
    values = {name: [row[name] for row in rows if row[name] is not None] for name in RELATIVE}
    return {name: round(float(np.percentile(found, REACHED_PERCENT)), 6) for name, found in values.items() if found}


def steps_passed(steps: int) -> Iterator[float]:
    """The share of so many steps that has passed, under a progress bar."""
    return (step / steps for step in tqdm(range(steps), "training", unit="step"))


def minutes_passed(minutes: float) -> Iterator[float]:
    """The share of so many minutes that has passed, until it is 1, under a progress bar."""
    begin, steps = time.monotonic(), 0
    with tqdm(total=round(60 * minutes), unit="s", desc="training") as bar:
        while (passed := time.monotonic() - begin) < 60 * minutes:
            bar.set_postfix(steps=steps, refresh=False)
            bar.update(round(passed) - bar.n)
            yield passed / (60 * minutes)
            steps += 1
