"""Features of many pictures.  Folder of pictures + a network -> (N, D) float32, streamed, cached by file hash.

In order: the pictures of a folder, read and hashed; networks with the preprocessing that belongs to each (Inception,
CLIP, the verifier); and their features, extracted a batch at a time by worker processes.  Features are kept in a
folder, one sub-folder a network and preprocessing, in parts of some hundred pictures: an interrupted run goes on, a
picture that was seen is not seen again.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from hoi.common.arrays import pictures_to_tensor
from hoi.common.command import first_few
from hoi.common.files import files_under, read_npz, read_picture, sha256_of, short_hash, write_whole
from hoi.data.folder import path_of, pictured, read_folders
from hoi.metrics.clip import Clip
from hoi.metrics.inception import Inception, prepare
from hoi.verify.verifier import Verifier, resized

SUFFIXES = {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"}
OTHER_SUFFIXES = {".gif", ".jp2", ".jxl", ".avif", ".heic", ".heif", ".tga", ".exr", ".hdr", ".dng", ".psd"}
ROWS_PER_FILE = 512  # pictures in one file of the cache: 8 MB of Inception's, at most so many are looked at again


@dataclass(frozen=True)
class PictureSet:
    """Pictures to measure, in order.

    folder   they come from
    paths    of the files
    records  of a dataset folder, one a picture; None for a plain folder
    hashes   SHA-256 of each file
    damaged  what was left out, with the reason of each: damage, or a kind that is not read
    """

    folder: Path
    paths: list[Path]
    records: list[dict[str, Any]] | None
    hashes: list[str]
    damaged: dict[str, str]

    def __len__(self) -> int:
        return len(self.paths)

    def digest(self) -> str:
        """One SHA-256 for the whole set, independent of order and names."""
        return hashlib.sha256("\n".join(sorted(self.hashes)).encode()).hexdigest()

    def described(self) -> dict[str, Any]:
        """What a report says of the set."""
        digest = self.digest()
        return {"folder": str(self.folder), "n": len(self), "sha256_of_the_set": digest, "left_out": self.damaged}


def _listed(folders: Sequence[Path]) -> tuple[Path, list[Path], list[dict[str, Any]] | None, list[Path]]:
    """The folder of it all, files of the pictures, records if all are dataset folders, and pictures of kinds not read.

    Raises as find_pictures.
    """
    if missing := [folder for folder in folders if not folder.is_dir()]:
        raise FileNotFoundError(f"there is no folder {missing[0]}")
    if all(any(folder.glob("metadata*.jsonl")) for folder in folders):  # by records: they hold condition images, too
        home, records = read_folders(folders)
        records = pictured(home, records)
        return home, [path_of(home, record, "file_name") for record in records], records, []
    folders = folders if len(folders) == 1 else [folder.absolute() for folder in folders]
    files = [path for folder in folders for path in files_under(folder)]
    inner = next((path for path in files if path.match("metadata*.jsonl")), None)
    if inner is not None:  # its condition images would count as pictures
        named = " ".join(map(str, folders))
        raise ValueError(f"{named} holds dataset folders; name one of them, such as {inner.parent}, or several alone")
    found, others = ([path for path in files if path.suffix.lower() in kinds] for kinds in (SUFFIXES, OTHER_SUFFIXES))
    return Path(os.path.commonpath(folders)), found, None, others


def _inspect(path: Path) -> tuple[str, str]:
    """SHA-256 of a picture file and an empty string, or an empty string and what is wrong with it."""
    try:
        read_picture(path, "RGB")
        return hashlib.sha256(path.read_bytes()).hexdigest(), ""
    except (ValueError, OSError) as error:
        return "", str(error).removeprefix(f"{path} ")


def find_pictures(folders: str | Path | Sequence[Path], workers: int, skip_damaged: bool = False) -> PictureSet:
    """The pictures of a dataset folder (its metadata.jsonl names them) or of a plain one, sub-folders and links too.

    folders       one, or several whose pictures are one set and named from the folder above them all
    workers       threads that read and hash the files; every picture is decoded once, so that damage shows first
    skip_damaged  leave damaged pictures out and say so in `damaged`, instead of the ValueError that names them
    Raises FileNotFoundError without a folder, ValueError when it has no picture or none is whole.
    """
    folders = [Path(folders)] if isinstance(folders, (str, Path)) else folders
    folder, paths, records, others = _listed(folders)
    if not paths:
        names = f" of a kind that is read, only {first_few(path.name for path in others)}" if others else ""
        raise ValueError(f"{folder} has no pictures{names}; expected {', '.join(sorted(SUFFIXES))}")
    # Threads will do here: decoding and hashing leave Python's lock free.
    with ThreadPoolExecutor(max(workers, 1)) as pool:
        inspected = list(tqdm(pool.map(_inspect, paths), total=len(paths), desc=f"hashing {folder.name}", leave=False))
    good = [k for k, (digest, _) in enumerate(inspected) if digest]
    damaged = {str(path.relative_to(folder)): why for path, (_, why) in zip(paths, inspected, strict=True) if why}
    if damaged and not (skip_damaged and good):
        named = first_few([f"{name} ({why})" for name, why in damaged.items()], joint="; ")
        advice = "Make them again, or measure without them: --skip-damaged"
        raise ValueError(f"{folder}: {len(damaged)} of {len(paths)} pictures are damaged or missing: {named}. "
                         + ("Nothing is left to measure" if skip_damaged else advice))  # fmt: skip
    damaged |= {str(path.relative_to(folder)): "its kind is not read: convert it to .png" for path in others}
    kept = None if records is None else [records[k] for k in good]
    return PictureSet(folder, [paths[k] for k in good], kept, [inspected[k][0] for k in good], damaged)


@dataclass(frozen=True)
class Extractor:
    """A network with the preprocessing that belongs to it.

    name           for people: it is printed beside each number
    key            name of its sub-folder of the cache; must change when weights or preprocessing do
    preprocessing  in words
    prepare        RGB picture -> (3, H, W); it is sent to worker processes: a function of a module or a partial
    network        (B, 3, H, W) -> {name: (B, D)}
    """

    name: str
    key: str
    preprocessing: str
    prepare: Callable[[Image.Image], Tensor]
    network: Callable[[Tensor], dict[str, Tensor]] | nn.Module


def cache_key(kind: str, file: str | Path) -> str:
    """Names the cache of a network: its kind with the preprocessing, and the hash of its weights."""
    # "upright": pictures are turned as EXIF says; caches of before hold others by the same hash.
    return f"{kind}-upright-{sha256_of(file)[:16]}".replace("/", "-")  # names of models may have a slash


def inception_extractor(inception: Inception, file: str | Path) -> Extractor:
    """Inception's features, "pool" and "spatial".

    Its name is the way of resizing: each tool has its own, and numbers of two are not comparable.
    """
    words = "299 x 299, bilinear as in TensorFlow 1 (no half-pixel shift, no antialiasing), (x - 128) / 128: "
    words += "guided-diffusion (ADM), torch-fidelity"
    return Extractor("tf1", cache_key("inception-tf1", file), words, prepare, inception)


def clip_extractor(clip: Clip, file: str | Path) -> Extractor:
    """Image features of a CLIP model, not normalised: a Frechet distance looks at their lengths, too."""
    words = "shorter side to the model's size (bicubic), centre crop, CLIP's mean and deviation"
    return Extractor(clip.name, cache_key(f"clip-{clip.name}", file), words, clip.preprocess,
                     lambda images: {"pool": clip.model.encode_image(images)})  # fmt: skip


def verifier_extractor(verifier: Verifier, file: str | Path) -> Extractor:
    """What the verifier's deepest levels see: for the toy world, which Inception never saw."""
    words = f"stretched to {verifier.side} x {verifier.side}"
    return Extractor("verifier", cache_key("verifier", file), words, partial(_for_verifier, side=verifier.side),
                     lambda images: {"pool": verifier(images).features})  # fmt: skip


def _for_verifier(picture: Image.Image, side: int) -> Tensor:
    return pictures_to_tensor(resized(np.asarray(picture), side)[None].copy())[0]


def _read_batch(paths: Sequence[Path], prepare: Callable[[Image.Image], Tensor]) -> Tensor:
    """What worker processes do: pictures made ready for one network, (B, 3, H, W)."""
    return torch.stack([prepare(Image.fromarray(read_picture(path, "RGB"))) for path in paths])


def kept_features(folder: Path, name: str, hashes: Collection[str]) -> dict[str, np.ndarray]:
    """Features (D,) of the pictures of these hashes, as far as the parts in a folder hold them; by hash.

    folder  of one network and preprocessing alone: parts of hashes with the features of each, {name: (N, D)}
    A damaged part is removed, so that it is made again.
    """
    rows = {}
    for part in sorted(folder.glob("*.npz")):
        try:
            stored = read_npz(part, "part of a cache", ["hashes", name], ["hashes"])
            of_part = zip(stored["hashes"].ravel().tolist(), np.atleast_2d(stored[name]), strict=True)
            rows |= {digest: row for digest, row in of_part if digest in hashes}
        except (ValueError, KeyError):
            with suppress(OSError):  # which the next writer replaces
                part.unlink()  # of a full disk, or of a copy that was broken off
    return rows


def keep_features(folder: Path, hashes: list[str], features: dict[str, np.ndarray]) -> None:
    """Write a part: features {name: (N, D)} of N pictures by their hashes; where that fails, a warning says so."""
    try:
        part = folder / f"{short_hash(''.join(hashes))}.npz"
        write_whole(part, partial(np.savez, hashes=np.array(hashes), **features))
    except OSError as error:
        why = f"{folder} cannot be written to ({error.strerror or error}); choose another with --features"
        warnings.warn(f"features are not kept for the next time: {why}", RuntimeWarning, stacklevel=2)


@dataclass(frozen=True)
class Run:
    """How features are computed and where they are kept.

    cache       folder of all caches;  device  where the networks are, "cpu" or "cuda"
    batch_size  pictures seen at once;  workers  processes that read them, 0: this one
    """

    cache: Path
    batch_size: int
    workers: int
    device: str

    @torch.no_grad()
    def features(self, pictures: PictureSet, extractor: Extractor, name: str = "pool") -> np.ndarray:
        """(N, D) float32, one row a picture; what the cache lacks is computed, with a progress bar.

        Raises ValueError naming the pictures whose features are not finite.
        """
        folder = self.cache / extractor.key
        rows = kept_features(folder, name, set(pictures.hashes))
        # By hash, so that equal files are looked at once.
        of_all = zip(pictures.hashes, pictures.paths, strict=True)
        new = {digest: path for digest, path in of_all if digest not in rows}
        hashes, paths = list(new), list(new.values())
        # No more workers than there are batches: a few new pictures are read sooner than many processes start.
        loader = DataLoader(paths, self.batch_size, collate_fn=partial(_read_batch, prepare=extractor.prepare),
                            num_workers=min(self.workers, len(new) // self.batch_size + 1))  # fmt: skip
        pending: list[dict[str, np.ndarray]] = []
        done = stored = 0
        title = f"{extractor.name}, {pictures.folder.name}"
        with tqdm(total=len(new), desc=title, disable=not new, leave=False) as bar:
            for images in _batches(loader) if new else []:
                features = extractor.network(images.to(self.device))
                batch = {name: values.float().cpu().numpy() for name, values in features.items()}
                _refuse_not_finite(batch, paths[done : done + len(images)], extractor.name)
                pending.append(batch)
                done += len(images)
                bar.update(len(images))
                if done - stored >= ROWS_PER_FILE or done == len(new):
                    joined = {name: np.concatenate([batch[name] for batch in pending]) for name in pending[0]}
                    keep_features(folder, hashes[stored:done], joined)
                    rows |= dict(zip(hashes[stored:done], joined[name], strict=True))
                    pending, stored = [], done
        return np.stack([rows[digest] for digest in pictures.hashes])


def _batches(loader: DataLoader) -> Iterator[Tensor]:
    """The loader's batches.  Raises ChildProcessError when one of its processes ended."""
    try:
        yield from loader
    except RuntimeError as error:  # torch has no kind of its own for it
        if "DataLoader worker" not in str(error):
            raise
        why = "killed, out of memory, or with too little shared memory (/dev/shm, 64 MB in containers)"
        raise ChildProcessError(f"a process that reads pictures ended: {why}; --workers 0 needs none") from error


def _refuse_not_finite(batch: dict[str, np.ndarray], paths: Sequence[Path], name: str) -> None:
    """Raise ValueError naming the pictures: kept, such features would make every distance NaN."""
    finite = np.all([np.isfinite(values).all(axis=1) for values in batch.values()], axis=0)
    if not finite.all():
        bad = [path.name for path, good in zip(paths, finite, strict=True) if not good]
        named = first_few(bad, joint="; ")
        raise ValueError(f"{name} gives features that are not finite for {named}; are the weights whole?")
