"""What a weight file is, by the names and shapes of its tensors.  WeightFile -> one of KINDS, or an error.

A file of another family (Stable Diffusion 2.x or XL, LoRA, ...) or with a piece of a model alone is refused
by what it is: its tensors would only be told as missing and unexpected ones, by the hundred.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from hoi.common.command import first_few
from hoi.common.tensors import Shapes, WeightFile
from hoi.weights.names import OFFICIAL_BRANCHES, UNET_PREFIX

OWN = "a model of this project"
SINGLE_FILE = "a Stable Diffusion 1.x file"
OFFICIAL_ADAPTER = "condition encoders of the official HOIDiffusion code (model_ad_N.pth)"
T2I_ADAPTER = "a T2I-Adapter for one condition"
CONTROLNET = "a ControlNet for the three condition images together"
IMAGE_CONTROLNET = "a ControlNet for one condition image"
# The convolution that a ControlNet's images enter by, as published and as diffusers names it.
HINT_ENTRIES = ("input_hint_block.0.weight", "controlnet_cond_embedding.conv_in.weight")
VAE = "an autoencoder (VAE) alone"
CLIP = "a CLIP model in open_clip's layout"
STABLE_DIFFUSION_2 = "a Stable Diffusion 2.x file (text width 1024, many of them v-prediction), expected 1.x"
LONE_PART = "a lone part of a diffusers folder, whose unet/, vae/ and text_encoder/ belong together"

# What a file is by the names in it.  The first row counts whose patterns each fit the beginning of some name.  Foreign
# families come first, for most of them have the names of Stable Diffusion 1.x as well.
FOREIGN_FAMILIES = (
    ("a LoRA (small changes to a model); merge it into a Stable Diffusion 1.x file first, with diffusers",
     r".*(\.lora_|lora_unet_|\.lora\.)"),
    ("a Stable Diffusion XL file, expected 1.x", r"conditioner\.embedders\.|model\.diffusion_model\.label_emb\."),
    ("a transformer model (Stable Diffusion 3 or Flux), expected Stable Diffusion 1.x",
     r"model\.diffusion_model\.joint_blocks\.|(model\.diffusion_model\.)?double_blocks\."),
    (STABLE_DIFFUSION_2, r"cond_stage_model\.model\.transformer\."),
)  # fmt: skip
KINDS = (
    # Before Stable Diffusion, which some of its files hold too.
    (CONTROLNET, r"control_model\.|input_hint_block\.|controlnet_cond_embedding\."),
    (SINGLE_FILE, r"model\.diffusion_model\."),
    (OFFICIAL_ADAPTER, rf"({'|'.join(OFFICIAL_BRANCHES.values())})\."),
    (T2I_ADAPTER, r"conv_in\.weight$", r"body\.0\.(resnets\.0\.)?block1\.weight$"),
    (CLIP, r"logit_scale$", r"visual\."),
    (VAE, r"encoder\.conv_in\.weight$", r"decoder\.conv_in\.weight$"),
    # Last: a whole model has these names too, behind others.
    (LONE_PART, r"down_blocks\.0\.resnets\.0\.conv1\.weight$|.*embeddings\.token_embedding\.weight$"),
)


def _first_row(rows: Iterable[tuple[str, ...]], names: Iterable[str]) -> str | None:
    """The first entry of the first row that fits; None when none does."""
    for kind, *patterns in rows:
        if all(any(re.match(pattern, name) for name in names) for pattern in patterns):
            return kind
    return None


def _foreign_by_shape(shapes: Shapes) -> str | None:
    """Another family with the names of ours, told by how many channels its layers take (dimension 1)."""
    if any(name.endswith("attn2.to_k.weight") and shape[1:] == (1024,) for name, shape in shapes.items()):
        return STABLE_DIFFUSION_2
    channels = shapes.get(UNET_PREFIX + "input_blocks.0.0.weight", (0, 4))[1]
    if channels != 4:
        family = "an inpainting" if channels == 9 else "another"
        return f"{family} model: its U-Net takes {channels} channels, expected 4"
    return None


def kind_of(file: WeightFile) -> str:
    """OWN or one of KINDS.  Raises ValueError naming the family of any other file."""
    if {"format_version", "config", "stage"} <= file.metadata.keys():
        return OWN
    if foreign := _first_row(FOREIGN_FAMILIES, file.shapes) or _foreign_by_shape(file.shapes):
        raise ValueError(f"{file.path} is {foreign}")
    if kind := _first_row(KINDS, file.shapes):
        entries = [shape for name, shape in file.shapes.items() if name.endswith(HINT_ENTRIES)]
        return IMAGE_CONTROLNET if kind == CONTROLNET and entries and entries[0][1:2] == (3,) else kind
    raise ValueError(
        f"{file.path} is no weight file known here: {len(file.shapes)} tensors, the first"
        f" {first_few(sorted(file.shapes)) or 'none'}; expected {SINGLE_FILE}, {T2I_ADAPTER},"
        f" {OFFICIAL_ADAPTER}, or {OWN}"
    )
