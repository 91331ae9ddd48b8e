"""Batches for training.  Dataset folders -> pictures, conditions, captions.

What a step sees depends on (seed, step) alone: not on what ran before, on how many processes share the work, or on
whether the run was interrupted.  Each process draws the numbers of the whole batch and keeps its own share.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hoi.conditions import Conditions, blank_conditions
from hoi.data import dataset
from hoi.network.model import stack_conditions

Batch = dict[str, Tensor]

# Of a record all that training asks for: its geometry would take ten times as much memory, in every process.
KEYS = ("index", "file_name", "text", "height", "width", "normal_source", *dataset.CONDITION_KEYS)


@dataclass(frozen=True)
class Share:
    """The part of every step that this process works on: `batch_size * parts` pictures of `total`.

    parts   batches that a process works on one after the other and adds up (gradient accumulation)
    """

    batch_size: int
    rank: int = 0
    world_size: int = 1
    parts: int = 1

    def part(self, index: int) -> Share:
        """One of the parts, as if it were a process of its own: so a step's pictures do not depend on the division."""
        return Share(self.batch_size, self.rank * self.parts + index, self.world_size * self.parts)

    def of(self, whole: Tensor | np.ndarray) -> Tensor | np.ndarray:
        """Cut this process's rows out of a row per picture of the whole step."""
        size = self.batch_size * self.parts
        return whole[self.rank * size : (self.rank + 1) * size]

    @property
    def total(self) -> int:
        return self.batch_size * self.parts * self.world_size


class TrainingSet:
    """All records of one or more dataset folders, read from disk when asked for.

    folders       dataset folders; every record must have a picture
    height, width expected size in pixels
    Raises ValueError when a folder holds no records, one without a picture or one of another size, FileNotFoundError
    when a picture or condition image is missing: before anything is trained, not in the middle of the night.
    """

    def __init__(self, folders: Sequence[str | Path], height: int, width: int):
        self.height, self.width = height, width
        self.entries: list[tuple[Path, dict]] = []
        for folder in map(Path, folders):
            records = dataset.read_records(folder, KEYS)
            if not records:
                raise ValueError(f"{folder} holds no records; make them with make_dataset.py or sample.py")
            listed: dict[str, set[str]] = {}
            for record in records:
                self._check(folder, record, listed)
            self.entries += [(folder, record) for record in records]
        self._readers = ThreadPoolExecutor(max_workers=2)

    def _check(self, folder: Path, record: dict, listed: dict[str, set[str]]) -> None:
        """listed: names in each folder looked into so far, since asking for every file of half a million is slow."""
        if record["file_name"] is None:
            raise ValueError(
                f"{folder} record {record['index']} has no picture, and training needs one: make the folder with "
                "make_dataset.py --shade, from real pictures, or with sample.py"
            )
        size = (record.get("height"), record.get("width"))
        if size != (self.height, self.width):
            raise ValueError(
                f"{folder} record {record['index']}: the picture is {size[1]}x{size[0]} px, the model takes "
                f"{self.width}x{self.height}; make the folder with --size {self.width}"
            )
        for path in filter(None, (record.get(key) for key in ("file_name", *dataset.CONDITION_KEYS))):
            parent, name = os.path.split(path)
            if parent not in listed:
                listed[parent] = set(os.listdir(folder / parent)) if (folder / parent).is_dir() else set()
            if name not in listed[parent]:
                raise FileNotFoundError(
                    f"{folder / path} is missing (record {record['index']}); run the command that made {folder} again"
                )

    def __len__(self) -> int:
        return len(self.entries)

    def captions(self, indices: Sequence[int]) -> list[str]:
        return [self.entries[i][1]["text"] for i in indices]

    def images(self, indices: Sequence[int]) -> Tensor:
        """(B, 3, H, W) in [-1, 1]."""
        pictures = np.stack(list(self._readers.map(self._image, indices)))
        return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1

    def _image(self, index: int) -> np.ndarray:
        folder, record = self.entries[index]
        image = dataset.load_image(folder, record)
        if image.shape != (self.height, self.width, 3):
            expected = (self.height, self.width, 3)
            raise ValueError(f"{folder / record['file_name']} has shape {image.shape}, its record says {expected}")
        return image

    def conditions(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """skeleton, normal, segmentation: each (B, 3, H, W) in [0, 1]; zeros for scenery (paper section 4.1)."""
        return stack_conditions(list(self._readers.map(self._conditions, indices)))

    def _conditions(self, index: int) -> Conditions:
        folder, record = self.entries[index]
        if record.get("segmentation_file_name") is None:
            return blank_conditions(self.height, self.width)
        return dataset.load_conditions(folder, record)

    def fingerprint(self) -> str:
        """Changes when a picture is added, removed or rewritten: names, sizes and times of all picture files."""
        digest = hashlib.sha256()
        for folder, record in self.entries:
            stat = (folder / record["file_name"]).stat()
            digest.update(f"{folder.resolve()}/{record['file_name']} {stat.st_size} {stat.st_mtime_ns}\n".encode())
        return digest.hexdigest()[:16]


def draw_indices(records: int, share: Share, seed: int, step: int) -> np.ndarray:
    """Which records step `step` trains on: a fresh shuffle every epoch, records sharded without overlap.

    returns (batch_size * parts,) indices of this process.  A batch may cross the end of an epoch.
    """
    positions = np.arange(step * share.total, (step + 1) * share.total)
    picked = np.empty(share.total, dtype=np.int64)
    for epoch in np.unique(positions // records):
        inside = positions // records == epoch
        order = np.random.default_rng([seed, int(epoch)]).permutation(records)
        picked[inside] = order[positions[inside] % records]
    return share.of(picked)


def step_generator(seed: int, step: int, purpose: int = 0) -> torch.Generator:
    """The random numbers of one step, the same in every process (each keeps its `Share` of what it draws)."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence([seed, step, purpose]).generate_state(1)[0]))


def read_ahead(make_batch: Callable[[int, int], Batch], places: Iterable[tuple[int, int]]) -> Iterator[Batch]:
    """make_batch(step, part) for every place in turn; the next one is made in a thread while one is used."""
    with ThreadPoolExecutor(max_workers=1) as reader:
        upcoming = None
        for place in places:
            ready, upcoming = upcoming, reader.submit(make_batch, *place)
            if ready is not None:
                yield ready.result()
        if upcoming is not None:
            yield upcoming.result()
