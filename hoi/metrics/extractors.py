"""Networks that look at pictures for metrics.  Weight files -> extractors for hoi/metrics/features.py."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hoi.common.files import sha256_of
from hoi.common.tensors import load_model_file, strict_load
from hoi.metrics.clip_score import Clip
from hoi.metrics.features import Extractor
from hoi.metrics.inception import RESIZE_MODES, Inception, prepare
from hoi.verify.verifier import Verifier, resized, to_input


def cache_key(kind: str, file: str | Path) -> str:
    """Names the cache of a network: its kind with the preprocessing, and the hash of its weights."""
    return f"{kind}-{sha256_of(file)[:16]}".replace("/", "-")


def inception_extractor(inception: Inception, file: str | Path, resize: str) -> Extractor:
    """resize  one of inception.RESIZE_MODES"""
    kind, words = f"inception-{resize}", f"299 x 299, {RESIZE_MODES[resize]}"
    return Extractor(resize, cache_key(kind, file), words, partial(prepare, resize=resize), inception)


def clip_extractor(clip: Clip, file: str | Path) -> Extractor:
    """Image features, not normalised."""
    words = "shorter side to the model's size (bicubic), centre crop, CLIP's mean and deviation"

    def network(images: Tensor) -> dict[str, Tensor]:
        return {"pool": clip.model.encode_image(images)}

    return Extractor(clip.name, cache_key(f"clip-{clip.name}", file), words, clip.preprocess, network)


def timm_extractor(name: str, file: str | Path, device: str) -> Extractor:
    """Features before the classifier of a timm model, DINOv2 for instance, with its own preprocessing.

    Raises ValueError for a name that timm does not know or a file that does not fit, FileNotFoundError.
    """
    import timm  # takes seconds

    if not timm.is_model(name):
        raise ValueError(f"timm has no model {name!r}; timm.list_models('*dino*') shows some of those it has")
    state, _ = load_model_file(file)
    with torch.random.fork_rng(devices=[]):  # the random start is overwritten
        model = timm.create_model(name, pretrained=False)
    strict_load(model, state, f"{file} (read as {name})")
    model = model.requires_grad_(False).eval().to(device)
    config = timm.data.resolve_model_data_config(model)

    def network(images: Tensor) -> dict[str, Tensor]:
        return {"pool": model.forward_head(model.forward_features(images), pre_logits=True)}

    transform = timm.data.create_transform(**config, is_training=False)
    return Extractor(name, cache_key(f"timm-{name}", file), f"timm's for {name}: {config}", transform, network)


def verifier_extractor(verifier: Verifier, file: str | Path) -> Extractor:
    """What the verifier's deepest levels see: for the toy world, which Inception never saw."""
    side = verifier.side

    def network(images: Tensor) -> dict[str, Tensor]:
        return {"pool": verifier(images).features}

    prepare_for_it = partial(_for_verifier, side=side)
    return Extractor("verifier", cache_key("verifier", file), f"stretched to {side} x {side}", prepare_for_it, network)


def _for_verifier(picture: Image.Image, side: int) -> Tensor:
    return to_input(resized(np.asarray(picture), side)[None].copy())[0]
