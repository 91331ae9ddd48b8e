"""The small CLIP that stage text trains: a picture and a text tower that meet.  pictures, captions -> vectors, loss.

Its text tower becomes the miniature's text encoder.  Both towers, kept as clip.safetensors, stand in for CLIPScore in
the toy world's tables (Sec. 5; tools/toy_tables.py): CLIP knows nothing of that world, and this one nothing else.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hoi.common.tensors import save_model
from hoi.network.text import TextEncoder

KIND = "toy-clip"  # in the file's metadata
FILE_NAME = "clip.safetensors"


class PictureText(nn.Module):
    """A small CLIP around a `TextEncoder`, trained so that captions find their pictures; a model keeps the encoder.

    The U-Net learns what words mean far sooner from such an encoder than through the noise prediction loss alone.
    """

    def __init__(self, text_encoder: TextEncoder, embed_dim: int = 128, channels: int = 32) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.text_projection = nn.Linear(text_encoder.config.width, embed_dim, bias=False)
        layers: list[nn.Module] = []
        widths = [3, channels, 2 * channels, 4 * channels, 4 * channels, 4 * channels]
        for before, after in zip(widths[:-1], widths[1:], strict=True):  # each halves the picture: 64 -> 2 pixels
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(8, after), nn.SiLU()]
        self.picture_encoder = nn.Sequential(*layers)
        # Averaging over the whole picture would forget where a colour is: a grid of at most 4x4 keeps object and
        # background apart.  (Of the miniature's 64 pixels 2x2 are left, each there four times.)
        self.picture_projection = nn.Linear(widths[-1] * 16, embed_dim, bias=False)
        self.log_temperature = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # CLIP's start

    def encode_image(self, image: Tensor) -> Tensor:
        """image (B,3,H,W) in [-1,1] -> (B,E), not normalised."""
        picture = F.adaptive_avg_pool2d(self.picture_encoder(image), 4).flatten(1)  # (B,C,h,w) -> (B,16C)
        return self.picture_projection(picture)

    def encode_text(self, token_ids: Tensor) -> Tensor:
        """token_ids (B,77) -> (B,E), not normalised."""
        return self.text_projection(self.text_encoder.pooled(self.text_encoder(token_ids), token_ids))

    def forward(self, image: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """image (B,3,H,W) in [-1,1] and its captions' token_ids (B,77) -> two (B,E), rows of unit length."""
        return F.normalize(self.encode_image(image), dim=1), F.normalize(self.encode_text(token_ids), dim=1)


def small_clip_loss(picture_vectors: Tensor, text_vectors: Tensor, log_temperature: Tensor, groups: Tensor) -> Tensor:
    """Symmetric contrastive loss in which every caption with the same words is a right answer.

    picture_vectors, text_vectors  (B,E) unit vectors, row i of both belong together
    log_temperature                scalar, logarithm of the factor on the cosines (held below 100)
    groups                         (B,) int, equal for captions with the same words
    returns                        scalar: cross-entropy to equal shares for the right answers, mean of both directions
    Source: Radford et al. 2021, figure 3; the shared targets are ours: in a small world captions repeat within a batch.
    """
    cosines = picture_vectors.float() @ text_vectors.float().T  # (B pictures, B captions)
    logits = log_temperature.exp().clamp(max=100) * cosines
    same = (groups[:, None] == groups[None, :]).to(logits)
    targets = same / same.sum(dim=1, keepdim=True)
    return 0.5 * (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets))


def save_small_clip(path: str | Path, pair: PictureText, side: int) -> None:
    """Write both towers in half precision.

    side   of the pictures that it was trained on, pixels
    """
    sizes = {"text": asdict(pair.text_encoder.config), "embed_dim": pair.text_projection.out_features,
             "channels": pair.picture_encoder[0].out_channels}  # fmt: skip
    state = {name: tensor.half() for name, tensor in pair.state_dict().items()}
    save_model(path, state, {"kind": KIND, "side": str(side), "sizes": json.dumps(sizes)})
