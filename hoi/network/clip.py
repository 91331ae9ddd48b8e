"""Clips.  Condition features of frames, a prompt, noise -> pictures of one look -> clip files.  Paper: Sec. 4.4.

Every frame is denoised together with the anchor frame, whose keys and values its self-attentions see beside its own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from hoi.network.pictures import PictureMaker, join_features
from hoi.network.samplers import Progress
from hoi.network.unet import PARTS, CachedContext, UNet


class AnchoredUNet(nn.Module):
    """The U-Net for a batch whose first item is the anchor; for the rest as the U-Net itself."""

    def __init__(self, unet: UNet, anchor_in: Collection[str] = PARTS) -> None:
        super().__init__()
        self.unet, self.anchor_in = unet, tuple(anchor_in)

    def cache_context(self, context: Tensor) -> CachedContext:
        return self.unet.cache_context(context)

    def forward(self, latents: Tensor, timesteps: Tensor, context, cond_features: Sequence[Tensor] | None) -> Tensor:
        return self.unet(latents, timesteps, context, cond_features, 0, self.anchor_in)


def clip_pictures(
    maker: PictureMaker,
    prompt: str,
    frame_features: Callable[[int], list[Tensor]],
    frame_generator: Callable[[int], torch.Generator],
    frames: Sequence[int],
    anchor: int | None,
    chunk: int,
    anchor_in: Collection[str] = PARTS,
    progress: Progress | None = None,
) -> Iterator[tuple[int, np.ndarray]]:
    """Make frames of a clip, `chunk` of them at a time; each chunk is denoised with the anchor in lock step.

    frame_features   frame -> its condition features (batch 1)
    frame_generator  frame -> a new generator of its noise, of equal state for frames that share their noise
    frames           to make: all of the clip, or those still missing
    anchor           the frame that all look at; None: every frame on its own
    anchor_in        parts of the U-Net whose self-attentions see the anchor; the paper: all
    yields           (frame, (H, W, 3) uint8), chunk by chunk

    The anchor sees only itself, so its latents are the same in every chunk, and a frame depends on itself and the
    anchor alone: neither on the chunk size nor on which other frames are made.  The price of keeping memory at
    chunk and anchor is the anchor's evaluation in every chunk.
    """
    unet = maker.model.unet
    anchored = unet if anchor is None else AnchoredUNet(unet, anchor_in).eval()
    first = [] if anchor is None else [anchor]
    anchor_features = [frame_features(frame) for frame in first]
    for group in _chunks(frames, anchor, chunk):
        others = [frame for frame in group if frame != anchor]
        batch = first + others
        each = anchor_features + [frame_features(frame) for frame in others]
        latents = maker.latents(
            anchored if len(batch) > 1 else unet,
            [prompt] * len(batch),
            join_features(each),
            [frame_generator(frame) for frame in batch],
            progress,
        )
        pictures = maker.decode(latents[len(batch) - len(group) :])  # the anchor's only when it is in the group
        yield from zip(group, pictures, strict=True)


def _chunks(frames: Sequence[int], anchor: int | None, size: int) -> list[list[int]]:
    """Frames in groups of `size`; the anchor, when it is among them, comes on top of the first group."""
    if size < 1:
        raise ValueError(f"chunk is {size}, expected at least 1 frame at a time")
    others = [frame for frame in frames if frame != anchor]
    groups = [others[start : start + size] for start in range(0, len(others), size)]
    if anchor in frames:
        groups = [[anchor, *(groups[0] if groups else [])], *groups[1:]]
    return groups
