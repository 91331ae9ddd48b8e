"""Clips.  Condition features of frames, a prompt, noise -> pictures of one look -> clip files.  Paper: Sec. 4.4.

Every frame is denoised together with the anchor frame, whose keys and values its self-attentions see beside its own.
"""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, features
from torch import Tensor, nn

from hoi.common.sheets import contact_sheet
from hoi.conditions import Conditions
from hoi.data.dataset_writer import write_atomically
from hoi.network.pictures import PictureMaker, join_features
from hoi.network.samplers import Progress
from hoi.network.unet import PARTS, CachedContext, UNet

MP4_HINT = "no clip.mp4: it needs PyAV (pip install av)"
WEBP_HINT = "no clip.webp: this Pillow is built without WebP, so clip.gif is written (pip install -U pillow)"


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


# --- files ---


def encode_animation(pictures: Sequence[np.ndarray], fps: int, kind: str) -> bytes:
    """(H, W, 3) uint8 pictures -> an endless animation; kind "WEBP" or "GIF" (256 colours, hundredths of a second)."""
    first, *rest = [Image.fromarray(picture) for picture in pictures]
    stream = io.BytesIO()
    quality = {"quality": 90, "method": 4} if kind == "WEBP" else {}
    first.save(stream, kind, save_all=True, append_images=rest, duration=round(1000 / fps), loop=0, **quality)
    return stream.getvalue()


def encode_mp4(pictures: Sequence[np.ndarray], fps: int) -> bytes:
    """(H, W, 3) uint8 pictures of even height and width -> H.264 by PyAV (must be installed)."""
    import av

    stream = io.BytesIO()
    height, width, _ = pictures[0].shape
    with av.open(stream, "w", format="mp4") as container:
        video = container.add_stream("libx264", rate=fps)
        video.height, video.width, video.pix_fmt = height, width, "yuv420p"  # the format that every player knows
        video.options = {"crf": "16"}
        for picture in pictures:
            container.mux(video.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")))
        container.mux(video.encode())
    return stream.getvalue()


def write_clip(
    folder: Path, pictures: Sequence[np.ndarray], fps: int, gif: bool = False
) -> tuple[list[str], list[str]]:
    """Write clip.webp, clip.mp4 where PyAV is installed, and clip.gif if wanted or if there is no WebP.

    returns  names of the files, and what to tell about those that could not be written
    """
    files, notes = {}, []
    if features.check("webp"):
        files["clip.webp"] = encode_animation(pictures, fps, "WEBP")
    else:
        notes.append(WEBP_HINT)
    if importlib.util.find_spec("av"):
        files["clip.mp4"] = encode_mp4(pictures, fps)
    else:
        notes.append(MP4_HINT)
    if gif or "clip.webp" not in files:
        files["clip.gif"] = encode_animation(pictures, fps, "GIF")
    for name, content in files.items():
        write_atomically(folder / name, content)
    return list(files), notes


def strip(
    conditions: Sequence[Conditions], pictures: Sequence[np.ndarray], most: int = 16, cell: int = 128
) -> Image.Image:
    """Skeleton, normal and segmentation above the picture, a column a frame; of long clips `most` frames, evenly."""
    chosen = np.unique(np.linspace(0, len(pictures) - 1, most).round().astype(int))
    rows = [[getattr(conditions[i], name) for i in chosen] for name in ("skeleton", "normal", "segmentation")]
    rows.append([pictures[i] for i in chosen])
    return contact_sheet([[np.asarray(Image.fromarray(image).resize((cell, cell))) for image in row] for row in rows])
