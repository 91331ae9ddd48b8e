"""What a weight file is, by the names and shapes of its tensors.  WeightFile -> kind, or an error naming the family."""

from __future__ import annotations

from collections.abc import Mapping

from hoi.common.tensors import WeightFile, shown
from hoi.weights.names import OFFICIAL_BRANCHES, UNET_PREFIX, VAE_PREFIX

Shapes = Mapping[str, tuple[int, ...]]

OWN = "a model of this project"
SINGLE_FILE = "a Stable Diffusion 1.x file"
EMA_ONLY = "a Stable Diffusion 1.x file with averaged (EMA) U-Net weights only"
OFFICIAL_ADAPTER = "condition encoders of the official HOIDiffusion code (model_ad_N.pth)"
T2I_ADAPTER = "a T2I-Adapter for one condition"
DIFFUSERS_T2I_ADAPTER = "a T2I-Adapter for one condition, saved by diffusers"
CLIP = "a CLIP model in open_clip's layout"


def kind_of(file: WeightFile) -> str:
    """One of the constants above.  Raises ValueError naming the family of any other file."""
    if {"format_version", "config", "stage"} <= file.metadata.keys():
        return OWN
    shapes = {name.removeprefix("adapter."): shape for name, shape in file.shapes.items()}
    if foreign := _foreign_family(file.shapes) or _foreign_adapter(shapes):
        raise ValueError(f"{file.path} is {foreign}")
    if any(name.startswith(UNET_PREFIX) for name in shapes):
        return SINGLE_FILE
    if any(name.startswith("model_ema.diffusion_model") for name in shapes):
        return EMA_ONLY
    if {name.partition(".")[0] for name in shapes} & OFFICIAL_BRANCHES.keys():
        return OFFICIAL_ADAPTER
    if "conv_in.weight" in shapes and "body.0.resnets.0.block1.weight" in shapes:
        return DIFFUSERS_T2I_ADAPTER
    if "conv_in.weight" in shapes and "body.0.block1.weight" in shapes:
        return T2I_ADAPTER
    if "logit_scale" in shapes and any(name.startswith("visual.") for name in shapes):
        return CLIP
    raise ValueError(
        f"{file.path} is no weight file known here: {len(shapes)} tensors, the first {shown(shapes) or 'none'};"
        f" expected {SINGLE_FILE}, {T2I_ADAPTER}, {OFFICIAL_ADAPTER}, or {OWN}"
    )


def _foreign_family(shapes: Shapes) -> str | None:
    """Models that are not Stable Diffusion 1.x, or only a piece of one; None for what may be one."""

    def has(*beginnings: str) -> bool:
        return any(name.startswith(beginnings) for name in shapes)

    if any(".lora_" in name or "lora_unet_" in name or ".lora." in name for name in shapes):
        return "a LoRA (small changes to a model); merge it into a Stable Diffusion 1.x file first, with diffusers"
    if has("conditioner.embedders.", UNET_PREFIX + "label_emb."):
        return "a Stable Diffusion XL file, expected 1.x"
    if has("control_model.", "controlnet_cond_embedding."):
        return "a ControlNet, which this network has no place for"
    if has("model.diffusion_model.joint_blocks.", "model.diffusion_model.double_blocks.", "double_blocks."):
        return "a transformer model (Stable Diffusion 3 or Flux), expected Stable Diffusion 1.x"
    context = next((shape[1] for name, shape in shapes.items() if _is_text_key(name) and len(shape) == 2), None)
    if context == 1024 or has("cond_stage_model.model.transformer."):
        return "a Stable Diffusion 2.x file (text width 1024, many of them v-prediction), expected 1.x"
    if "v_pred" in shapes:
        return "marked as v-prediction, with an unknown schedule; take its diffusers folder, which says how it was made"
    channels = shapes.get(UNET_PREFIX + "input_blocks.0.0.weight", (0, 4))[1]
    if channels != 4:
        names = {9: "an inpainting", 8: "a picture-editing", 5: "a depth-guided"}
        return f"{names.get(channels, 'another')} model: its U-Net takes {channels} channels, expected 4"
    return _lone_part(shapes)


def _is_text_key(name: str) -> bool:
    return name.endswith("attn2.to_k.weight")


def _lone_part(shapes: Shapes) -> str | None:
    whole = "expected the file or folder of a whole model"
    if "down_blocks.0.resnets.0.conv1.weight" in shapes:
        return f"the U-Net of a diffusers folder alone; {whole}: give the folder that holds unet/"
    if not any(name.startswith((UNET_PREFIX, VAE_PREFIX, "model_ema.")) for name in shapes):
        if "encoder.conv_in.weight" in shapes and "decoder.conv_in.weight" in shapes:
            return f"an autoencoder (VAE) alone; {whole}"
        if any(name.endswith("embeddings.token_embedding.weight") for name in shapes):
            return f"a CLIP text encoder alone; {whole}"
    return None


def _foreign_adapter(shapes: Shapes) -> str | None:
    """T2I-Adapters that fit none of the three branches.  shapes: without a leading `adapter.`"""
    if any(".out_conv." in name for name in shapes) and any(name.startswith("body.") for name in shapes):
        return "a T2I-Adapter for colour, a smaller network than the condition encoders"
    if "style_embedding" in shapes or any(name.startswith("transformer_layes.") for name in shapes):
        return "a T2I-Adapter for style, a transformer over CLIP's picture tokens, unlike the condition encoders"
    if "conv_in.weight" not in shapes or not any(name.startswith("body.") for name in shapes):
        return None
    channels = shapes["conv_in.weight"][1]
    if channels in (64, 256):
        family = "sketch or canny" if channels == 64 else "Stable Diffusion XL's sketch or canny"
        return f"a T2I-Adapter for {family}: one grey channel in, where the condition encoders take three"
    if channels == 768:
        return "a T2I-Adapter for Stable Diffusion XL (16 x 16 pixels a cell), expected one for 1.x"
    return None
