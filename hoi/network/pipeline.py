"""From prompts, condition features and noise to pictures: single ones, or the frames of a video.  Paper: Sec. 3.3, 4.4.

A `Pipeline` encodes prompts and conditions (`context`, `features`; once each), lets the sampler turn noise into latents
(`latents`) and decodes them (`decode`); `pictures` is the last two.  `anchored_pictures` makes the frames of a video:
every frame is denoised together with the anchor frame, whose keys and values its self-attentions see beside its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hoi.common.arrays import to_uint8
from hoi.network.model import HOIDiffusion
from hoi.network.samplers import Progress, initial_noise, sample_latents
from hoi.network.text import tokenize
from hoi.network.unet import CachedContext, UNet

MAX_CONTEXTS = 512  # encoded prompts kept; 77 x 768 floats are 0.24 MB
DECODED_PIXELS = 512 * 512  # decoded at once: more take more memory than the U-Net and are no faster
# Of a batch on a GPU.  On a CPU a picture of 512 px more takes 0.2 GB in bf16 (docs/speed.md); here are 1 GB, since no
# GPU was at hand to measure.
BYTES_A_PIXEL, MOST_PIXELS = 4096, 16 * 512 * 512


@dataclass(frozen=True)
class SamplingSettings:
    """How pictures are drawn from the model; the defaults of a preset stand in its ModelConfig.

    sampler       one of samplers.SAMPLERS
    cond_weights  of skeleton, normal, segmentation in the sum of features
    cond_tau      first share of the steps that uses the conditions, in [0, 1]
    """

    sampler: str
    num_inference_steps: int
    guidance_scale: float
    negative_prompt: str = ""
    cond_weights: tuple[float, float, float] = (1.0, 1.0, 1.0)
    cond_tau: float = 1.0


def pictures_at_once(height: int, width: int, free: int) -> int:
    """How many pictures make a batch by default.

    height, width  pixels
    free           bytes of the GPU's memory, see free_device_memory; 0 for a CPU
    """
    if not free:
        # At 512 px two at once save 5 % of the time and cost 0.2 GB (docs/speed.md).
        return 8 if height * width < 512 * 512 else 2
    return max(1, min(free // BYTES_A_PIXEL, MOST_PIXELS) // (height * width))


def picture_generator(seed: int, index: int) -> torch.Generator:
    """Noise of one picture: from (seed, index) alone, on the CPU, so it is the same on any hardware.

    SeedSequence mixes both numbers: seed + index would give neighbouring seeds the same pictures.
    """
    return torch.Generator().manual_seed(int(np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0]))


class Pipeline:
    """A model with fixed settings that turns prompts, condition features and noise into pictures.

    All methods compute on the model's device and keep no gradient.
    """

    def __init__(
        self, model: HOIDiffusion, settings: SamplingSettings, checkpoint: Mapping[str, str] | None = None
    ) -> None:
        """checkpoint: names and hashes of the model's files, which every picture's record repeats."""
        self.model, self.settings, self.checkpoint = model, settings, dict(checkpoint or {})
        self.schedule = model.config.noise_schedule()
        self.device = model.unet.out[2].weight.device
        # One at a time: a prompt's numbers do not depend on those beside it.
        self._encoded = lru_cache(MAX_CONTEXTS)(lambda text: model.text_encoder(tokenize([text]).to(self.device))[0])

    @property
    def dtype(self) -> str:
        """What U-Net and condition encoders compute in, e.g. "bfloat16"."""
        return str(self.model.unet.out[2].weight.dtype).removeprefix("torch.")

    def job(self, seed: int) -> dict[str, Any]:
        """What decides a picture beside its conditions and text: another job must not continue in a folder."""
        job = {"seed": seed, "checkpoint": self.checkpoint["sha256"], "dtype": self.dtype, **asdict(self.settings)}
        return job | {part: self.checkpoint[f"{part}_sha256"] for part in ("adapter", "vae") if part in self.checkpoint}

    def record_entries(self, seed: int) -> dict[str, Any]:
        """What the records of all pictures of a job say of how these were made."""
        settings = asdict(self.settings)
        told = ("sampler", "num_inference_steps", "guidance_scale", "negative_prompt")
        return {"seed": seed, "checkpoint": self.checkpoint} | {name: settings[name] for name in told}

    @torch.no_grad()
    def context(self, prompts: Sequence[str]) -> Tensor:
        """Encoded prompts (B, 77, C); each distinct one is encoded once."""
        return torch.stack([self._encoded(prompt) for prompt in prompts]).to(self.model.unet.out[2].weight.dtype)

    @torch.no_grad()
    def features(self, conditions: Mapping[str, Tensor]) -> list[Tensor]:
        """Condition images (B, 3, H, W) in [0, 1], by name -> features, one map (B, C_k, h / 2^k, w / 2^k) a level.

        Where H or W is no multiple of the model's cell, black is added below and on the right.
        """
        cell = self.model.config.cell
        padded = {name: F.pad(image.to(self.device), (0, -image.shape[3] % cell, 0, -image.shape[2] % cell))
                  for name, image in conditions.items()}  # fmt: skip
        return self.model.condition_encoders(padded, self.settings.cond_weights)

    @torch.no_grad()
    def pictures(
        self,
        prompts: Sequence[str],
        features: list[Tensor] | None,
        generators: Sequence[torch.Generator],
        progress: Progress | None = None,
        height: int | None = None,
        width: int | None = None,
    ) -> np.ndarray:
        """Make one batch.

        prompts     B complete prompts
        features    as `features` makes them, of batch B or 1 (one geometry for all); None for text alone
        generators  B, one a picture: a picture does not depend on its batch
        height, width  pixels, those of the conditions; None: what the model was made for
        returns     (B, H, W, 3) uint8
        """
        latents = self.latents(self.model.unet, prompts, features, generators, progress, height, width)
        return self.decode(latents, height, width)

    def latents(
        self,
        unet: UNet | AnchoredUNet,
        prompts: Sequence[str],
        features: list[Tensor] | None,
        generators: Sequence[torch.Generator],
        progress: Progress | None = None,
        height: int | None = None,
        width: int | None = None,
    ) -> Tensor:
        """What `pictures` decodes, (B, 4, h, w) of whole cells; `unet` is the model's or one that wraps it."""
        settings, config = self.settings, self.model.config
        sides = (-(-(side or config.image_size) // config.cell) * config.cell for side in (height, width))
        latent_height, latent_width = (side // config.vae.factor for side in sides)
        return sample_latents(
            unet,
            self.schedule,
            context=self.context(prompts),
            uncond_context=self.context([settings.negative_prompt]),
            cond_features=features,
            noise=initial_noise(generators, config.unet.in_channels, latent_height, latent_width, self.device),
            sampler=settings.sampler,
            num_inference_steps=settings.num_inference_steps,
            guidance_scale=settings.guidance_scale,
            cond_tau=settings.cond_tau,
            generators=generators,
            progress=progress,
        )

    @torch.no_grad()
    def decode(self, latents: Tensor, height: int | None = None, width: int | None = None) -> np.ndarray:
        """(B, 4, h, w) -> (B, H, W, 3) uint8, cut to height and width.  Raises ValueError for pictures not finite."""
        config = self.model.config
        height, width = height or config.image_size, width or config.image_size
        at_once = max(1, DECODED_PIXELS // (height * width))
        # (B, 3, H, W) in [-1, 1]
        images = torch.cat([self.model.vae.decode(few).float() for few in latents.split(at_once)])
        if not torch.isfinite(images).all():
            raise ValueError("the model made pictures that are not finite; try --dtype float32, or other weights")
        return np.stack([to_uint8(image) for image in images[..., :height, :width].cpu().numpy()])


def join_features(features: Sequence[list[Tensor]]) -> list[Tensor]:
    """Features of B pictures as one batch; of batch 1 when all are the same object (the U-Net repeats them)."""
    if all(each is features[0] for each in features):
        return features[0]
    return [torch.cat(level) for level in zip(*features, strict=True)]


class AnchoredUNet:
    """The U-Net for a batch of video frames whose first is the anchor; samplers see no other difference."""

    def __init__(self, unet: UNet) -> None:
        self.unet, self.cache_context = unet, unet.cache_context

    def __call__(
        self, latents: Tensor, timesteps: Tensor, context: CachedContext, cond_features: Sequence[Tensor] | None
    ) -> Tensor:
        """As UNet.forward."""
        return self.unet(latents, timesteps, context, cond_features, anchor=0)


def anchored_pictures(
    pipeline: Pipeline,
    prompt: str,
    frame_features: Callable[[int], list[Tensor]],
    frame_generator: Callable[[int], torch.Generator],
    frames: Sequence[int],
    anchor: int | None,
    chunk: int,
    progress: Progress | None = None,
    height: int | None = None,
    width: int | None = None,
) -> Iterator[tuple[int, np.ndarray]]:
    """Make frames of a video, `chunk` of them at a time; each chunk is denoised with the anchor in lock step.

    frame_features   frame -> its condition features (batch 1)
    frame_generator  frame -> a new generator of its noise, of equal state for frames that share their noise
    frames           to make: all of the video, or those still missing
    anchor           the frame that all look at; None: every frame on its own
    height, width    of the frames, as in Pipeline.pictures
    yields           (frame, (H, W, 3) uint8), chunk by chunk

    The anchor sees only itself, so its latents are the same in every chunk, and a frame depends on itself and the
    anchor alone: neither on the chunk size nor on which other frames are made.  The price of keeping memory at
    chunk and anchor is the anchor's evaluation in every chunk.
    """
    # The anchor is the first of every batch; a group that asks for its picture has it in front too.
    unet = pipeline.model.unet
    anchored = unet if anchor is None else AnchoredUNet(unet)
    first = [] if anchor is None else [anchor]
    anchor_features = [frame_features(frame) for frame in first]
    for group in _chunks(frames, anchor, chunk):
        others = [frame for frame in group if frame != anchor]
        batch = first + others
        each = anchor_features + [frame_features(frame) for frame in others]
        latents = pipeline.latents(
            anchored if len(batch) > 1 else unet,  # alone, the anchor would look at itself twice: the same result
            [prompt] * len(batch),
            join_features(each),
            [frame_generator(frame) for frame in batch],
            progress,
            height,
            width,
        )
        own = latents[len(batch) - len(group) :]  # the anchor's only when it is in the group
        pictures = pipeline.decode(own, height, width)
        yield from zip(group, pictures, strict=True)


def _chunks(frames: Sequence[int], anchor: int | None, size: int) -> list[list[int]]:
    """Frames in groups of `size`; the anchor, when it is among them, comes on top of the first group."""
    others = [frame for frame in frames if frame != anchor]
    groups = [others[start : start + size] for start in range(0, len(others), size)]
    if anchor in frames:
        groups = [[anchor, *(groups[0] if groups else [])], *groups[1:]]
    return groups
