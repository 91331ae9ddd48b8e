"""The small CLIP as a scorer of pictures and texts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from hoi.common.tensors import load_model_file, strict_load
from hoi.metrics.clip_score import Clip, clip_scores
from hoi.network.text import TextConfig, TextEncoder, tokenize
from hoi.training.small_clip import FILE_NAME, KIND, PictureText

BATCH = 64


def load_toy_clip(path: str | Path) -> Clip:
    """Raises FileNotFoundError, or ValueError for a file that is damaged or none of stage text's pairs."""
    state, metadata = load_model_file(path)
    if metadata.get("kind") != KIND:
        raise ValueError(f"{path} is no {FILE_NAME} of `train.py --stage text`, which writes one beside its model")
    sizes = json.loads(metadata["sizes"])
    pair = PictureText(TextEncoder(TextConfig(**sizes["text"])), sizes["embed_dim"], sizes["channels"])
    strict_load(pair, state, path)
    return Clip(KIND, pair.requires_grad_(False).eval(), partial(_averaged, side=int(metadata["side"])), tokenize)


def _averaged(picture: Image.Image, side: int) -> Tensor:
    """RGB picture -> (3, side, side) in [-1, 1], every pixel the mean of those that it covers, as in the training."""
    image = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1
    return F.adaptive_avg_pool2d(image, side)


@torch.no_grad()
def toy_clip_scores(clip: Clip, images: Sequence[np.ndarray], texts: Sequence[str]) -> np.ndarray:
    """2.5 max(cosine, 0) of each picture (H, W, 3) uint8 with its caption: (N,).

    Without CLIPScore's prefix "A photo depicts": this encoder has never met the word.
    """
    batches = [torch.stack([clip.preprocess(Image.fromarray(image)) for image in images[k : k + BATCH]])
               for k in range(0, len(images), BATCH)]  # fmt: skip
    features = torch.cat([clip.model.encode_image(batch) for batch in batches])
    return clip_scores(clip, features.numpy(), texts, prefix="")
