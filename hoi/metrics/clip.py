"""CLIP for scoring pictures against texts.  Weight file -> Clip; pictures + captions -> CLIPScore.  Paper: Sec. 4.2.

Any model of open_clip from a file; tools/toy_tables.py fills the same dataclass with the small CLIP of the toy world,
which CLIP has never seen.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from hoi.common.tensors import load_model_file, strict_load

# What OpenAI's state dicts hold beside tensors of the model.
OPENAI_EXTRAS = ("input_resolution", "context_length", "vocab_size")
# CLIPScore as published (Hessel et al. 2021), with ViT-B/32.
SCORE_PREFIX, SCORE_WEIGHT = "A photo depicts ", 2.5
TEXTS_AT_ONCE = 256  # encoded together: bounds memory, whatever the folder's size


@dataclass(frozen=True)
class Clip:
    """A CLIP model for inference, in float32.

    model       encode_image and encode_text give one row a picture or text
    preprocess  RGB picture -> (3, H, W): shorter side to the model's size (bicubic), centre crop, CLIP's mean and
                standard deviation (those of OpenAI's and LAION's models)
    tokenizer   texts -> (B, 77) token ids
    """

    name: str
    model: nn.Module
    preprocess: Callable[[Image.Image], Tensor]
    tokenizer: Callable[[list[str]], Tensor]


def _random_model(name: str) -> nn.Module:
    """The model to be filled; the caller's random numbers stay as they are, and no log warns of its random start."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with torch.random.fork_rng(devices=[]):
            return open_clip.create_model(name, pretrained=None)
    finally:
        logging.disable(before)


def _read(name: str, path: Path) -> dict[str, Tensor]:
    """Tensors of a weight file by the names that open_clip has for them."""
    if not path.is_file():
        raise FileNotFoundError(
            f"no CLIP weights at {path}. {name} in open_clip's format (such as open_clip_model.safetensors) is needed "
            "for CLIP scores and too large to ship; the built-in verifier, python -m hoi.verify, needs no file"
        )
    try:
        state = load_model_file(path)[0]
    except ValueError as error:
        if "TorchScript" not in str(error):  # OpenAI's own files are the first that come to mind
            raise
        raise ValueError(
            f"{path} is a TorchScript archive, as OpenAI published CLIP: it holds code. Give the same weights in "
            "open_clip's format, such as open_clip_model.safetensors"
        ) from error
    return {key.removeprefix("module."): value for key, value in state.items() if key not in OPENAI_EXTRAS}


def load_clip(name: str, file: str | Path) -> Clip:
    """Read a CLIP model from a file; nothing is downloaded and no code from the file runs.

    name  of open_clip.list_models().  OpenAI's weights belong to the names that end in -quickgelu; the plain names
          take the same file without complaint and score a little wrong.
    file  open_clip's format: .safetensors, or a torch file of tensors, a training checkpoint included
    Raises FileNotFoundError; ValueError for an unknown name, a model whose text part open_clip would download, or a
    file that is unreadable or holds another model.
    """
    config = open_clip.get_model_config(name) if name in open_clip.list_models() else None
    if config is None:
        near = difflib.get_close_matches(name, open_clip.list_models(), 3, 0.3)
        raise ValueError(f"open_clip has no model {name!r}; similar names: {', '.join(near) or 'none'}")
    if "hf_model_name" in config["text_cfg"]:  # open_clip would ask the network for it, weights given or not
        raise ValueError(f"the text part of {name} comes from the Hugging Face hub, so it cannot be made without one")
    state = _read(name, Path(file))
    model = _random_model(name)
    if "logit_scale" in state:  # a number or a list of one, by age of the file
        state["logit_scale"] = state["logit_scale"].reshape(model.logit_scale.shape)
    strict_load(model, state, f"{file} (read as {name})")
    preprocess = open_clip.image_transform(model.visual.image_size, is_train=False)
    return Clip(name, model.requires_grad_(False).eval(), preprocess, open_clip.get_tokenizer(name))


@torch.no_grad()
def clip_scores(
    clip: Clip, image_features: np.ndarray, texts: Sequence[str], prefix: str = SCORE_PREFIX
) -> np.ndarray:
    """CLIPScore of each picture with its text: SCORE_WEIGHT * max(cosine, 0), (N,).

    image_features  (N, D) as encode_image gives them
    texts           N captions; the prefix is put before each, and the tokenizer cuts at 77 tokens
    Source: Hessel et al. 2021, eq. 1.
    """
    device = next(clip.model.parameters()).device
    distinct = list(dict.fromkeys(texts))  # many pictures share a caption
    encoded = []
    for i in range(0, len(distinct), TEXTS_AT_ONCE):
        tokens = clip.tokenizer([prefix + text for text in distinct[i : i + TEXTS_AT_ONCE]])
        encoded.append(clip.model.encode_text(tokens.to(device)))
    rows = dict(zip(distinct, F.normalize(torch.cat(encoded).double().cpu(), dim=-1), strict=True))
    images = F.normalize(torch.from_numpy(image_features).double(), dim=-1)
    cosines = (images * torch.stack([rows[text] for text in texts])).sum(dim=-1)
    return SCORE_WEIGHT * cosines.clamp(min=0).numpy()
