"""Judge pictures by a small network that never saw a generated one.  Pictures -> label maps, words, scores.

The judge learns from shaded pictures, whose label maps and captions are exact.  Its score on shaded pictures of the
same records is the ceiling of what generated pictures can reach; against other records' label maps it is the floor.

    python -m hoi.verify train --data runs/toy/any --out runs/toy/judge.safetensors --minutes 6
    python -m hoi.verify measure --judge runs/toy/judge.safetensors --shaded runs/eval/shaded \\
                                 --generated runs/eval/generated
"""

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from hoi import checkpoint, dataset
from hoi.appearance import nearest_color
from hoi.backgrounds import BACKGROUNDS
from hoi.conditions import SEGMENTATION_COLORS
from hoi.hardware import has_fast_bf16, keep_freed_memory
from hoi.words import words_in

LABELS = ("background", "hand", "object")
CELL = 2  # pixels


def block(channels_in: int, channels_out: int, stride: int = 1) -> nn.Sequential:
    """Two 3x3 convolutions with group norm; the first may halve the size."""
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, stride, 1),
        nn.GroupNorm(8, channels_out),
        nn.SiLU(),
        nn.Conv2d(channels_out, channels_out, 3, 1, 1),
        nn.GroupNorm(8, channels_out),
        nn.SiLU(),
    )


class Judge(nn.Module):
    """Picture (B, 3, H, W) in [-1, 1], sides multiples of 16 -> label logits (B, 3, H, W), background logits (B, K)."""

    def __init__(self, backgrounds: int, channels: tuple[int, ...] = (32, 48, 96, 128)):
        super().__init__()
        # Cells of 2x2 pixels become channels and come apart again at the end: a third of the work at full resolution.
        self.stem = block(3 * CELL**2, channels[0])
        pairs = list(zip(channels[:-1], channels[1:], strict=True))
        self.down = nn.ModuleList(block(a, b, stride=2) for a, b in pairs)
        self.up = nn.ModuleList(block(b + a, a) for a, b in reversed(pairs))
        self.labels = nn.Conv2d(channels[0], len(LABELS) * CELL**2, 1)
        self.background = nn.Linear(channels[-1] + channels[-2], backgrounds)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        features = [self.stem(F.pixel_unshuffle(image, CELL))]
        for down in self.down:
            features.append(down(features[-1]))
        pooled = torch.cat([f.mean((2, 3)) for f in features[-2:]], dim=1)
        x = features.pop()
        for up in self.up:
            skip = features.pop()
            x = up(torch.cat([F.interpolate(x, scale_factor=2.0), skip], dim=1))
        return F.pixel_shuffle(self.labels(x), CELL), self.background(pooled)


@dataclass(frozen=True)
class Scores:
    """Means over records (every record counts once); IoU in [0, 1], None where no record has the word."""

    records: int
    iou_foreground: float
    iou_hand: float
    iou_object: float
    color_right: float | None
    background_right: float | None


def intersection_over_union(predicted: np.ndarray, true: np.ndarray) -> float:
    """Of two boolean masks; 1 when both are empty."""
    union = np.logical_or(predicted, true).sum()
    return 1.0 if union == 0 else float(np.logical_and(predicted, true).sum() / union)


def label_map_of(segmentation: np.ndarray) -> np.ndarray:
    """The label map (H, W) 0/1/2 of a segmentation picture (H, W, 3): the label of the nearest colour."""
    distance = np.abs(segmentation[:, :, None].astype(np.int16) - SEGMENTATION_COLORS).sum(axis=3)
    return distance.argmin(axis=2).astype(np.uint8)


@torch.no_grad()
def predict(judge: Judge, images: np.ndarray, batch_size: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """images (N, H, W, 3) uint8 -> label maps (N, H, W) and background class indices (N,)."""
    maps, words = [], []
    for start in range(0, len(images), batch_size):
        batch = torch.from_numpy(images[start : start + batch_size]).permute(0, 3, 1, 2).float() / 127.5 - 1
        labels, background = judge(batch)
        maps.append(labels.argmax(1).numpy())
        words.append(background.argmax(1).numpy())
    return np.concatenate(maps), np.concatenate(words)


def score(
    judge: Judge, names: list[str], images: np.ndarray, label_maps: np.ndarray, captions: list[str]
) -> tuple[Scores, list[dict]]:
    """Score pictures against the label maps and captions that they should show.

    images (N, H, W, 3) uint8; label_maps (N, H, W) 0/1/2; captions: N sentences
    returns the means and one dict per picture
    """
    predicted, background = predict(judge, images)
    rows = []
    for image, seen, true, word, caption in zip(images, predicted, label_maps, background, captions, strict=True):
        words = words_in(caption)
        row = {
            "iou_foreground": intersection_over_union(seen > 0, true > 0),
            "iou_hand": intersection_over_union(seen == 1, true == 1),
            "iou_object": intersection_over_union(seen == 2, true == 2),
            "color_right": None,
            "background_right": None,
        }
        if words.get("color") is not None and (true == 2).any():
            row["color_right"] = float(nearest_color(image[true == 2].mean(axis=0) / 255) == words["color"])
        if words.get("background") in names:
            row["background_right"] = float(names[word] == words["background"])
        rows.append(row)
    means = {}
    for key in rows[0]:
        values = [row[key] for row in rows if row[key] is not None]
        means[key] = float(np.mean(values)) if values else None
    return Scores(records=len(rows), **means), rows


def load_pictures(folder: Path) -> tuple[np.ndarray, np.ndarray, list[dict]]:
    """All pictures (N, H, W, 3) uint8, label maps (N, H, W) and records of a dataset folder."""
    records = dataset.read_records(folder)
    if not records:
        raise ValueError(f"{folder} holds no records")
    images = np.stack([dataset.load_image(folder, record) for record in records])
    maps = []
    for record, image in zip(records, images, strict=True):
        if record.get("segmentation_file_name") is None:
            maps.append(np.zeros(image.shape[:2], np.uint8))
        else:
            maps.append(label_map_of(dataset.load_conditions(folder, record).segmentation))
    return images, np.stack(maps), records


def train_judge(folders: list[Path], minutes: float, seed: int, batch_size: int = 32) -> tuple[Judge, list[str]]:
    """Train on shaded pictures only; refuses folders whose records say that a network made them."""
    sets = [load_pictures(folder) for folder in folders]
    records = [record for _, _, part in sets for record in part]
    generated = [record["file_name"] for record in records if record.get("checkpoint") is not None]
    if generated:
        raise ValueError(
            f"{len(generated)} pictures (first {generated[0]}) are generated; the judge learns from shaded ones"
        )
    images, maps = np.concatenate([s[0] for s in sets]), np.concatenate([s[1] for s in sets])
    names = sorted(BACKGROUNDS)
    classes = torch.tensor(
        [names.index(word) if (word := words_in(r["text"]).get("background")) in names else -1 for r in records]
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():  # fresh weights come from torch's global generator, which is put back
        torch.manual_seed(seed)
        judge = Judge(len(names)).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=1e-3)
    bf16 = has_fast_bf16("cpu")
    end, begin, steps = time.time() + 60 * minutes, time.time(), 0
    with tqdm(total=round(60 * minutes), unit="s", desc="training the judge") as bar:
        while (now := time.time()) < end:
            for group in optimizer.param_groups:
                group["lr"] = 2e-3 * max(0.02, 1 - (now - begin) / (end - begin)) * min(1.0, (steps + 1) / 50)
            picked = torch.randint(len(images), (batch_size,), generator=generator)
            image = torch.from_numpy(images[picked.numpy()]).permute(0, 3, 1, 2).float() / 127.5 - 1
            # Generated pictures differ from shaded ones in fine texture; a little noise and gain keeps the judge from
            # leaning on it.
            gain = 1 + 0.1 * torch.randn(batch_size, 3, 1, 1, generator=generator)
            image = image * gain + 0.04 * torch.randn(image.shape, generator=generator)
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                labels, background = judge(image)
            labels, background = labels.float(), background.float()
            loss = F.cross_entropy(labels, torch.from_numpy(maps[picked.numpy()]).long())
            if (classes[picked] >= 0).any():
                loss = loss + 0.2 * F.cross_entropy(background, classes[picked], ignore_index=-1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            steps += 1
            bar.update(round(time.time() - begin) - bar.n)
            bar.set_postfix(loss=f"{loss.item():.3f}", steps=steps)
    return judge.eval(), names


def save_judge(path: Path, judge: Judge, names: list[str]) -> None:
    checkpoint.save_model(path, judge.state_dict(), {"kind": "judge", "backgrounds": json.dumps(names)})


def load_judge(path: Path) -> tuple[Judge, list[str]]:
    state, metadata = checkpoint.load_model_file(path)
    if metadata.get("kind") != "judge":
        raise ValueError(f"{path} is not a judge; make one with python -m hoi.verify train")
    names = json.loads(metadata["backgrounds"])
    judge = Judge(len(names))
    checkpoint.strict_load(judge, state, str(path))
    return judge.eval(), names


def measure(judge_path: Path, shaded: Path, generated: Path) -> dict[str, Scores]:
    """Ceiling (shaded pictures), the generated pictures of the same records, and their floor.

    The floor holds every generated picture against the label map of the next record: a picture that was made from the
    wrong conditions.  Raises ValueError when the two folders do not hold the same captions in the same order.
    """
    judge, names = load_judge(judge_path)
    true_images, label_maps, records = load_pictures(shaded)
    images, _, generated_records = load_pictures(generated)
    captions = [record["text"] for record in records]
    if [record["text"] for record in generated_records] != captions:
        raise ValueError(f"{generated} does not hold the captions of {shaded}; make it with sample.py --data {shaded}")
    return {
        "shaded": score(judge, names, true_images, label_maps, captions)[0],
        "generated": score(judge, names, images, label_maps, captions)[0],
        "shuffled": score(judge, names, images, np.roll(label_maps, 1, axis=0), captions[-1:] + captions[:-1])[0],
    }


def as_table(rows: dict[str, Scores]) -> str:
    """Markdown, with each generated figure as a share of the ceiling."""
    keys = ("iou_foreground", "iou_hand", "iou_object", "color_right", "background_right")
    show = {name: [getattr(scores, key) for key in keys] for name, scores in rows.items()}
    lines = ["| pictures | n | " + " | ".join(keys) + " |", "|---|---|" + "---|" * len(keys)]
    for name, values in show.items():
        cells = ["-" if v is None else f"{v:.3f}" for v in values]
        lines.append(f"| {name} | {rows[name].records} | " + " | ".join(cells) + " |")
    ratios = [
        "-" if not a or b is None else f"{b / a:.3f}" for a, b in zip(show["shaded"], show["generated"], strict=True)
    ]
    lines.append("| generated / shaded | | " + " | ".join(ratios) + " |")
    return "\n".join(lines)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m hoi.verify", description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train the judge on shaded pictures (minutes on two cores)")
    train.add_argument("--data", nargs="+", type=Path, required=True, help="dataset folders with shaded pictures")
    train.add_argument("--out", type=Path, required=True, help="the judge's file (.safetensors)")
    train.add_argument("--minutes", type=float, default=6.0, help="training time (minutes, default 6)")
    train.add_argument("--seed", type=int, default=0)
    test = commands.add_parser("measure", help="score generated pictures beside shaded ones of the same records")
    test.add_argument("--judge", type=Path, required=True, help="file that `train` wrote")
    test.add_argument("--shaded", type=Path, required=True, help="dataset folder with shaded pictures, not trained on")
    test.add_argument("--generated", type=Path, required=True, help="sample.py --data SHADED --out GENERATED")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    keep_freed_memory()
    if args.command == "train":
        save_judge(args.out, *train_judge(args.data, args.minutes, args.seed))
        print(f"wrote {args.out}")
    else:
        print(as_table(measure(args.judge, args.shaded, args.generated)))


if __name__ == "__main__":
    main(parse_args())
