"""Our tensor names <-> those of public layouts."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hoi.network.text import TextConfig, TextEncoder

# The three branches under the official release's names: its "depth" branch sees a normal map (paper Sec. 3.3).
OFFICIAL_BRANCHES = {"pose_ada": "skeleton", "depth_ada": "normal", "mask_ada": "segmentation"}


def from_official_adapter_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names of the official model_ad_N.pth (pose_ada, depth_ada, mask_ada) -> ours (skeleton, normal, segmentation)."""
    return {rename(name.removeprefix("adapter."), OFFICIAL_BRANCHES): tensor for name, tensor in state.items()}


def to_official_adapter_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our condition encoder names -> those of the official model_ad_N.pth."""
    official = {ours: theirs for theirs, ours in OFFICIAL_BRANCHES.items()}
    return {rename(name, official): tensor for name, tensor in state.items()}


def rename(name: str, branches: Mapping[str, str]) -> str:
    branch, _, rest = name.partition(".")
    return f"{branches.get(branch, branch)}.{rest}"


# --- weights under the names of transformers' CLIPTextModel, as in a Stable Diffusion file ---

_HF_PREFIXES = ("cond_stage_model.transformer.text_model.", "cond_stage_model.transformer.", "text_model.")
_HF_OUTER = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
_HF_LAYER = {
    "layer_norm1": "ln_1",
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def hf_names(config: TextConfig) -> dict[str, tuple[str, ...]]:
    """open_clip name -> the HF tensors (without prefix) that are stacked along dimension 0 to make it."""
    names = {ours: (theirs,) for theirs, ours in _HF_OUTER.items()}
    for i in range(config.layers):
        here, there = f"transformer.resblocks.{i}.", f"encoder.layers.{i}."
        for kind in ("weight", "bias"):
            names[f"{here}attn.in_proj_{kind}"] = tuple(f"{there}self_attn.{p}_proj.{kind}" for p in "qkv")
            names.update({f"{here}{ours}.{kind}": (f"{there}{theirs}.{kind}",) for theirs, ours in _HF_LAYER.items()})
    return names


def open_clip_from_hf(hf_state: Mapping[str, Tensor], config: TextConfig) -> dict[str, Tensor]:
    """The text tower of a Stable Diffusion file or a transformers folder -> tensors of a `TextEncoder` (196 -> 148).

    Keys may carry `cond_stage_model.transformer.`, `text_model.`, both or neither; `position_ids` is ignored.
    Raises ValueError naming missing, unexpected or wrongly shaped tensors.
    """
    state: dict[str, Tensor] = {}
    for key, tensor in hf_state.items():
        prefix = next((p for p in _HF_PREFIXES if key.startswith(p)), "")
        if not key.endswith("embeddings.position_ids"):
            state[key.removeprefix(prefix)] = tensor
    names = hf_names(config)
    wanted = {key for keys in names.values() for key in keys}
    missing, unexpected = sorted(wanted - state.keys()), sorted(state.keys() - wanted)
    if missing or unexpected:
        raise ValueError(
            f"text encoder: expected the {len(wanted)} tensors of a CLIP text model with {config.layers} layers; "
            f"{len(missing)} are missing (first: {missing[:3]}), {len(unexpected)} unexpected (first: {unexpected[:3]})"
        )
    with torch.device("meta"):
        shapes = {key: tensor.shape for key, tensor in TextEncoder(config).state_dict().items()}
    for ours, keys in names.items():
        rows, *rest = shapes[ours]
        for key in keys:
            if list(state[key].shape) != [rows // len(keys), *rest]:
                expected = (rows // len(keys), *rest)
                raise ValueError(f"text encoder: {key} is {tuple(state[key].shape)}, expected {expected}")
    return {ours: torch.cat([state[key] for key in keys]) for ours, keys in names.items()}


def hf_from_open_clip(state: Mapping[str, Tensor], config: TextConfig) -> dict[str, Tensor]:
    """The reverse of `open_clip_from_hf`; the names start with `text_model.`."""
    hf_state: dict[str, Tensor] = {}
    for ours, keys in hf_names(config).items():
        hf_state.update(
            {f"text_model.{key}": part.clone() for key, part in zip(keys, state[ours].chunk(len(keys)), strict=True)}
        )
    return hf_state
