"""What a training step sees.  Dataset folders + model -> batches of pictures, conditions, text and encoded latents.

What a step sees depends on (seed, step) alone: not on what ran before, on how many processes share the work, or on
whether the run was interrupted.  Each process draws the numbers of the whole step and keeps its own `Share`.

What the frozen autoencoder makes of the pictures is made once and kept on disk (`cached`): mean and deviation of their
posterior, so that every step draws its latents anew as the paper does (Sec. 3.1).
Under torchrun the processes share the encoding; an interrupted one goes on with the files that are not there yet.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from hoi.common.arrays import pictures_to_tensor
from hoi.common.files import read_npy, write_whole
from hoi.common.machine import barrier
from hoi.common.tensors import weights_hash
from hoi.data.folder import CONDITION_KEYS, load_conditions, load_image, path_of, read_records, require
from hoi.network.model import HOIDiffusion, stack_pictures

# Of a record all that training asks for: its geometry would take ten times as much memory, in every process.
KEYS = ("index", "file_name", "text", "category", "height", "width", "normal_source", *CONDITION_KEYS)
ROWS = 256  # of one cached file: of 512 px pictures 34 MB
PIXELS = 2**19  # encoded at once: 32 pictures of 128 px, 2 of 512 px
OPEN = 256  # files kept open; a process may often have 1024, and half a million pictures are in twice as many

# What a step sees, tensors by name; "conditions" holds more of them by name, and stage hoi has a batch a term of eq. 3.
# The stages say what is in theirs.
Batch = dict[str, "Tensor | Batch"]


def each_tensor(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    """The batch with `change` of all its tensors."""
    return {name: each_tensor(value, change) if isinstance(value, dict) else change(value)
            for name, value in batch.items()}  # fmt: skip


def to_device(batch: Batch, device: str) -> Batch:
    """The batch with all its tensors on a device; nobody waits for a copy from pinned memory."""
    return each_tensor(batch, lambda value: value.to(device, non_blocking=value.is_pinned()))


@dataclass(frozen=True)
class Share:
    """The part of every step that this process works on: `batch_size * batches` pictures of `total`.

    batches   that a process works on one after the other and adds up (gradient accumulation)
    """

    batch_size: int
    rank: int = 0
    world_size: int = 1
    batches: int = 1

    @property
    def total(self) -> int:
        """Pictures of a step in all processes."""
        return self.batch_size * self.batches * self.world_size

    def of_batch(self, number: int) -> Share:
        """One of the batches, as if of a process of its own: so a step's pictures do not depend on the division."""
        return Share(self.batch_size, self.rank * self.batches + number, self.world_size * self.batches)

    def of(self, whole: Tensor | np.ndarray) -> Tensor | np.ndarray:
        """Cut this process's rows out of a row per picture of the whole step."""
        size = self.batch_size * self.batches
        return whole[self.rank * size : (self.rank + 1) * size]


def draw_indices(records: int, share: Share, seed: int, step: int) -> np.ndarray:
    """Which records step `step` trains on: a fresh shuffle every epoch, records sharded without overlap.

    returns (batch_size * batches,) indices of this process.  A batch may cross the end of an epoch.
    """
    # All steps of all epochs on one line of positions; each epoch's stretch of it is a shuffle of its own.
    positions = np.arange(step * share.total, (step + 1) * share.total)
    picked = np.empty(share.total, dtype=np.int64)
    for epoch in np.unique(positions // records):
        inside = positions // records == epoch
        order = np.random.default_rng([seed, int(epoch)]).permutation(records)
        picked[inside] = order[positions[inside] % records]
    return share.of(picked)


def step_generator(seed: int, step: int, purpose: int = 0) -> torch.Generator:
    """The random numbers of one step, the same in every process (each keeps its `Share` of what it draws)."""
    # SeedSequence mixes the three; seed + step would give a later step of one run what an earlier of the next had.
    return torch.Generator().manual_seed(int(np.random.SeedSequence([seed, step, purpose]).generate_state(1)[0]))


class TrainingSet:
    """All records of one or more dataset folders, read from disk when asked for.

    folders        dataset folders; every record must have a picture
    height, width  expected size in pixels
    caption        in place of every picture's own text, e.g. DREAMBOOTH_CAPTION; {category} stands for the object's
    entries        (folder, record) of every picture
    Raises ValueError when a folder holds no records, one without a picture or one of another size, FileNotFoundError
    when a picture or condition image is missing: before anything is trained, not in the middle of the night.
    """

    def __init__(self, folders: Sequence[str | Path], height: int, width: int, caption: str | None = None):
        self.height, self.width, self.caption = height, width, caption
        self.entries: list[tuple[Path, dict]] = []
        for folder in map(Path, folders):
            records = read_records(folder, KEYS)
            require(folder, records, ("file_name", *CONDITION_KEYS), (height, width), pictures=True)
            self.entries += [(folder, record) for record in records]
        self._readers = ThreadPoolExecutor(max_workers=2)  # decoding PNG lets other threads run

    def __len__(self) -> int:
        return len(self.entries)

    def names(self, indices: Sequence[int]) -> list[str]:
        """Paths of the picture files."""
        return [str(folder / record["file_name"]) for folder, record in (self.entries[i] for i in indices)]

    def captions(self, indices: Sequence[int]) -> list[str]:
        """The text of each picture; an object without a category is an "object" to `caption`."""
        records = [self.entries[i][1] for i in indices]
        if self.caption is None:
            return [record["text"] for record in records]
        return [self.caption.format(category=record["category"] or "object") for record in records]

    def images(self, indices: Sequence[int]) -> Tensor:
        """(B, 3, H, W) in [-1, 1]."""
        pictures = np.stack(list(self._readers.map(lambda index: load_image(*self.entries[index]), indices)))
        return pictures_to_tensor(pictures)

    def conditions(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """skeleton, normal, segmentation: each (B, 3, H, W) uint8; zeros for scenery (paper section 4.1)."""
        read = self._readers.map(lambda index: load_conditions(*self.entries[index]), indices)
        return stack_pictures(list(read), self.height, self.width)

    def fingerprint(self) -> str:
        """Changes when a picture is added, removed or rewritten: names, sizes and times of all picture files."""
        digest = hashlib.sha256()
        for folder, record in self.entries:
            stat = path_of(folder, record, "file_name").stat()  # not the bytes: half a million take long to read
            digest.update(f"{folder.resolve()}/{record['file_name']} {stat.st_size} {stat.st_mtime_ns}\n".encode())
        return digest.hexdigest()[:16]


def read_ahead(
    make_batch: Callable[[int, int], Batch], places: Iterable[tuple[int, int]], ahead: int = 1
) -> Iterator[Batch]:
    """make_batch(step, number) for every place in turn; so many more are made in a thread while one is used."""
    upcoming, reader = deque(), ThreadPoolExecutor(max_workers=1)  # one thread: batches come in order
    try:
        for place in places:
            upcoming.append(reader.submit(make_batch, *place))
            if len(upcoming) > ahead:
                yield upcoming.popleft().result()
        while upcoming:
            yield upcoming.popleft().result()
    finally:
        reader.shutdown(cancel_futures=True)


class RowsOnDisk:
    """Arrays of one shape, float32, in files of ROWS of them; read when asked for.

    folder  holds 00000.npy, 00001.npy ...
    count   rows in all
    Raises FileNotFoundError when a file is missing, ValueError when there are more or fewer rows.
    """

    def __init__(self, folder: Path, count: int):
        paths = [file_of(folder, k) for k in range(-(-count // ROWS))]
        if missing := [path for path in paths if not path.exists()]:
            raise FileNotFoundError(f"{missing[0]} is missing; with several machines --out must be on a shared disk")
        self.paths, self.count = paths, count
        self._open = lru_cache(OPEN)(partial(read_npy, what="part of a cache; delete its folder, it is made again"))
        if (found := sum(len(self._open(path)) for path in paths)) != count:
            raise ValueError(f"{folder} holds {found} rows, expected {count}: delete the folder, it is made again")
        self.shape = self._open(paths[0]).shape[1:]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, indices: Sequence[int]) -> np.ndarray:
        """(B,) row numbers -> (B, *shape)."""
        # Copies: a view would keep its file open.
        return np.stack([self._open(self.paths[i // ROWS])[i % ROWS].copy() for i in indices])


def file_of(folder: Path, number: int) -> Path:
    """The file of rows number * ROWS and on."""
    return folder / f"{number:05d}.npy"


def write_rows(folder: Path, count: int, rows: Callable[[int, int], Tensor], batch_size: int) -> RowsOnDisk:
    """Make the files that are not there yet, of several processes each its share; they wait for each other.

    rows   (start, end) -> (end - start, ...); it is asked for the same batches however many processes there are, so
           the result is the same in every bit
    """
    rank, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    mine = range(-(-count // ROWS))[rank::processes]  # numbers of files, of as many as it takes
    todo = [range(k * ROWS, min((k + 1) * ROWS, count)) for k in mine if not file_of(folder, k).exists()]
    with tqdm(total=sum(map(len, todo)), desc="encoding pictures once", disable=rank > 0 or not todo) as progress:
        for part in todo:
            made = []
            for start in part[::batch_size]:
                made.append(rows(start, min(start + batch_size, part.stop)).float().cpu())
                progress.update(len(made[-1]))
            values = torch.cat(made).numpy()
            write_whole(file_of(folder, part.start // ROWS), partial(np.save, arr=values))
    barrier()
    return RowsOnDisk(folder, count)


@dataclass(frozen=True)
class EncodedData:
    """Pictures, and posterior mean and deviation of each: the encoder is frozen, the draw is not.

    latents  (N, 2, C, h, w), unscaled
    Source: paper section 3.1 trains on samples of q(z | x); keeping mean and std instead of one draw changes nothing.
    """

    pictures: TrainingSet
    latents: RowsOnDisk

    def sample(self, indices: np.ndarray, noise: Tensor, scaling_factor: float) -> Tensor:
        """Scaled latents (B, C, h, w); `noise` is standard normal of that shape."""
        mean, std = torch.from_numpy(self.latents[indices]).unbind(1)
        return scaling_factor * (mean + std * noise)


def cached(model: HOIDiffusion, pictures: TrainingSet, folder: Path) -> EncodedData:
    """Encode every picture once in fp32, or open what an earlier run with the same autoencoder encoded."""
    device = next(model.vae.parameters()).device

    @torch.no_grad()
    def encode(start: int, end: int) -> Tensor:
        posterior = model.vae.encode(pictures.images(range(start, end)).to(device))
        return torch.stack([posterior.mean, posterior.std], dim=1)

    # Whatever changes the latents is part of the name: an autoencoder or a folder that changed gets files of its own.
    name = f"latents-{weights_hash(model.vae)[:16]}-{pictures.fingerprint()}"
    batch_size = max(1, PIXELS // (pictures.height * pictures.width))
    return EncodedData(pictures, write_rows(folder / name, len(pictures), encode, batch_size))


def measured_scaling_factor(latents: RowsOnDisk) -> float:
    """1 / standard deviation of all cached posterior means: the VAE's `scaling_factor` once it is trained."""
    sums = np.zeros(3)  # file by file, in float64: all latents together may not fit into memory
    for path in latents.paths:
        means = read_npy(path, "part of a cache")[:, 0].astype(np.float64)
        sums += means.size, means.sum(), np.square(means).sum()
    count, total, squares = sums
    return float(1 / np.sqrt(squares / count - (total / count) ** 2))
