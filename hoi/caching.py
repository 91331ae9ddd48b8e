"""What frozen encoders make of the data, once, on disk.  model + TrainingSet -> latents, text.  Paper: Sec. 3.1, 3.3.

Pictures are kept as mean and deviation of their posterior, so every step draws its latents anew, as the paper does.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from hoi.batches import TrainingSet
from hoi.model import HOIDiffusion
from hoi.text import tokenize


class LatentCache:
    """Posterior mean and deviation of every picture, kept on disk: the encoder is frozen, the draw is not.

    Source: paper section 3.1 trains on samples of q(z | x); keeping mean and std instead of one draw changes nothing.
    """

    def __init__(self, path: Path):
        self.values = np.load(path, mmap_mode="r")  # (N, 2, C, h, w) float32

    def sample(self, indices: np.ndarray, noise: Tensor, scaling_factor: float) -> Tensor:
        """Scaled latents (B, C, h, w); `noise` is standard normal of that shape."""
        mean, std = torch.from_numpy(self.values[indices]).unbind(1)
        return scaling_factor * (mean + std * noise)


def cache_latents(
    pictures: TrainingSet,
    encode: Callable[[Tensor], tuple[Tensor, Tensor]],
    key: str,
    folder: Path,
    batch_size: int = 32,
) -> LatentCache:
    """Encode every picture once, or open what an earlier run encoded.

    encode  images (B, 3, H, W) -> unscaled posterior mean and std, each (B, C, h, w)
    key     changes with the encoder's weights (their hash)
    folder  where the arrays live; written under a temporary name and renamed when whole
    """
    path = folder / f"latents-{key}-{pictures.fingerprint()}.npy"

    def encoded(start: int, end: int) -> Tensor:
        return torch.stack(encode(pictures.images(range(start, end))), dim=1)

    fill_array(path, len(pictures), encoded, batch_size, "encoding pictures once")
    return LatentCache(path)


class TextCache:
    """What the frozen text encoder says to every distinct caption, kept on disk.

    captions   distinct, in the order of the rows
    """

    def __init__(self, path: Path, captions: Sequence[str]):
        self.values = np.load(path, mmap_mode="r")  # (N, 77, C) float32
        self._rows = {caption: row for row, caption in enumerate(captions)}

    def context(self, captions: Sequence[str]) -> Tensor:
        """(B, 77, C)."""
        return torch.from_numpy(self.values[[self._rows[caption] for caption in captions]])


def cache_text(
    captions: Iterable[str], encode: Callable[[list[str]], Tensor], key: str, folder: Path, batch_size: int = 64
) -> TextCache:
    """Encode every distinct caption, and the empty one, once, or open what an earlier run encoded.

    encode  captions -> context (B, 77, C)
    key     changes with the encoder's weights and precision
    At Stable Diffusion's size a caption takes 0.24 MB.
    """
    distinct = sorted({"", *captions})
    digest = hashlib.sha256("\0".join(distinct).encode()).hexdigest()[:16]
    path = folder / f"text-{key}-{digest}.npy"
    fill_array(path, len(distinct), lambda a, b: encode(distinct[a:b]), batch_size, "encoding captions once")
    return TextCache(path, distinct)


def fill_array(path: Path, count: int, rows: Callable[[int, int], Tensor], batch_size: int, title: str) -> None:
    """Write a float32 .npy of `count` rows, made by rows(start, end), unless it is there; complete or not at all."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f"{path.name}.*.partial"):  # of a killed process
        left.unlink()
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    array = None
    for start in tqdm(range(0, count, batch_size), desc=title, unit="batch"):
        made = rows(start, min(start + batch_size, count)).float().cpu().numpy()
        if array is None:
            array = np.lib.format.open_memmap(partial, "w+", np.float32, (count, *made.shape[1:]))
        array[start : start + len(made)] = made
    array.flush()
    os.replace(partial, path)


@dataclass(frozen=True)
class EncodedData:
    """Pictures, and what frozen encoders made of them; without cached text the text encoder runs every step."""

    pictures: TrainingSet
    latents: LatentCache
    text: TextCache | None = None


def encode_for_cache(model: HOIDiffusion) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """The frozen encoder as `cache_latents` wants it: images -> unscaled posterior mean and std, in fp32."""
    device = next(model.vae.parameters()).device

    @torch.no_grad()
    def encode(images: Tensor) -> tuple[Tensor, Tensor]:
        posterior = model.vae.encode(images.to(device))
        return posterior.mean, posterior.std

    return encode


def cached(
    model: HOIDiffusion, pictures: TrainingSet, folder: Path, key: str, text_key: str = "", text_bf16: bool = False
) -> EncodedData:
    """The pictures with their latents under this model's encoder, and their captions' context if there is a `text_key`.

    key, text_key   name the weights of the autoencoder and the text encoder
    text_bf16       encode text under bf16 autocast, as training without the cache would
    """
    latents = cache_latents(pictures, encode_for_cache(model), key, folder)
    if not text_key:
        return EncodedData(pictures, latents)
    device = next(model.text_encoder.parameters()).device

    @torch.no_grad()
    def encode(captions: list[str]) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=text_bf16):
            return model.text_encoder(tokenize(captions).to(device))

    captions = pictures.captions(range(len(pictures)))
    text_key += "-bf16" if text_bf16 else ""
    return EncodedData(pictures, latents, cache_text(captions, encode, text_key, folder))


def measured_scaling_factor(latents: LatentCache) -> float:
    """1 / standard deviation of all cached posterior means: the VAE's `scaling_factor` once it is trained."""
    return float(1 / np.std(latents.values[:, 0], dtype=np.float64))
