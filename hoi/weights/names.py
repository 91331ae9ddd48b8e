"""How public weight files name their tensors.  Our tensor names -> the names in a file of each layout.

Ours are those of `HOIDiffusion.state_dict()`: `unet.`, `vae.`, `text_encoder.`, `condition_encoders.NAME.` and, behind
these, mostly the names of a single Stable Diffusion 1.x file.  Every function returns, for our names, the names in the
file whose tensors, stacked along dimension 0, are ours (several only for the text encoder's query, key and value).

Attention that does nothing, for levels where diffusers' U-Net needs one and ours has none.  UNetConfig -> tensors.

diffusers adds condition features to the main path and the skip connection, as the paper does, only in a down block with
attention (or in the last level).  A level without gets a transformer whose last layer is zero: x + 0, to the bit.

Our tensor names <-> those of public layouts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from hoi.network.text import TextConfig, TextEncoder
from hoi.network.unet import SpatialTransformer, UNetConfig
from hoi.network.vae import VAEConfig

NameMap = dict[str, tuple[str, ...]]

UNET_PREFIX, VAE_PREFIX = "model.diffusion_model.", "first_stage_model."
TEXT_PREFIX = "cond_stage_model.transformer.text_model."
SHORT_TEXT_PREFIX = "cond_stage_model.transformer."  # some re-saves, and the official HOIDiffusion training

# Computed from the noise schedule, saved by the original trainer, needed by nobody who has the schedule.
SCHEDULE_BUFFERS = (
    "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance",
    "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2",
)  # fmt: skip
POSITION_IDS = "embeddings.position_ids"  # 0 to 76, saved by transformers before 4.31
SINGLE_FILE_EXTRAS = {
    *SCHEDULE_BUFFERS, "logvar", "model_ema.decay", "model_ema.num_updates",
    TEXT_PREFIX + POSITION_IDS, SHORT_TEXT_PREFIX + POSITION_IDS,
}  # fmt: skip

# Inside the blocks: ours (and the single file's) -> diffusers'.
_UNET_RESNET = {
    "in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2", "out_layers.3": "conv2", "skip_connection": "conv_shortcut",
}  # fmt: skip
_VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_OLD_VAE_ATTENTION = {"norm": "group_norm", "q": "query", "k": "key", "v": "value", "proj_out": "proj_attn"}


def single_file_names(ours: Iterable[str], text: TextConfig, text_prefix: str = TEXT_PREFIX) -> NameMap:
    """A .ckpt or .safetensors of Stable Diffusion 1.x (for condition encoders: of no such file)."""
    names: NameMap = {}
    for name in ours:
        part, _, rest = name.partition(".")
        if part in ("unet", "vae"):
            names[name] = ((UNET_PREFIX if part == "unet" else VAE_PREFIX) + rest,)
    return names | {name: tuple(text_prefix + key for key in keys) for name, keys in text_names(text).items()}


def text_names(text: TextConfig) -> NameMap:
    """transformers' CLIPTextModel, as version 5 writes it; before, and elsewhere, `text_model.` stands in front."""
    return {f"text_encoder.{name}": keys for name, keys in hf_names(text).items()}


def ema_name(single_file_name: str) -> str:
    """The moving average of a U-Net tensor in a single file: all its dots are gone, those of the numbers too."""
    return "model_ema." + single_file_name.removeprefix("model.").replace(".", "")


def official_adapter_names(ours: Iterable[str]) -> NameMap:
    """model_ad_N.pth of the official HOIDiffusion code."""
    bare = [name.removeprefix("condition_encoders.") for name in ours if name.startswith("condition_encoders.")]
    theirs = to_official_adapter_names({name: name for name in bare})
    return {f"condition_encoders.{bare}": (name,) for name, bare in theirs.items()}


def t2i_adapter_names(ours: Iterable[str], branch: str) -> NameMap:
    """A T2I-Adapter of Mou et al. 2023 for one condition: the names of one of our branches."""
    prefix = f"condition_encoders.{branch}."
    return {name: (name.removeprefix(prefix),) for name in ours if name.startswith(prefix)}


def diffusers_adapter_names(ours: Iterable[str], branch: str) -> NameMap:
    """diffusers' T2IAdapter: the eight blocks are counted by level."""
    names: NameMap = {}
    for name, (bare,) in t2i_adapter_names(ours, branch).items():
        if bare.startswith("body."):
            _, number, layer, kind = bare.split(".")
            level, index = divmod(int(number), 2)
            inside = layer if layer == "in_conv" else f"resnets.{index}.{layer}"
            bare = f"body.{level}.{inside}.{kind}"
        names[name] = (f"adapter.{bare}",)
    return names


def diffusers_unet_names(ours: Iterable[str], config: UNetConfig) -> NameMap:
    """diffusers' UNet2DConditionModel."""
    places = _unet_places(config)
    return {f"unet.{name}": (_moved(name, places, _UNET_RESNET),) for name in _of_part(ours, "unet")}


def _unet_places(config: UNetConfig) -> dict[str, str]:
    """Where every numbered block of ours stands in diffusers."""
    places = {
        "time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2",
        "input_blocks.0.0": "conv_in", "out.0": "conv_norm_out", "out.2": "conv_out",
        "middle_block.0": "mid_block.resnets.0", "middle_block.1": "mid_block.attentions.0",
        "middle_block.2": "mid_block.resnets.1",
    }  # fmt: skip
    levels, count = len(config.channel_mult), config.num_res_blocks
    for level in range(levels):
        first = 1 + level * (count + 1)  # every level but the last ends in a block that halves the size
        for layer in range(count):
            places[f"input_blocks.{first + layer}.0"] = f"down_blocks.{level}.resnets.{layer}"
            places[f"input_blocks.{first + layer}.1"] = f"down_blocks.{level}.attentions.{layer}"
        places[f"input_blocks.{first + count}.0.op"] = f"down_blocks.{level}.downsamplers.0.conv"
        for layer in range(count + 1):  # upwards diffusers counts the coarsest level as 0
            block = f"output_blocks.{(levels - 1 - level) * (count + 1) + layer}"
            there = f"up_blocks.{levels - 1 - level}"
            attends = level in config.attention_levels
            places[f"{block}.0"] = f"{there}.resnets.{layer}"
            if attends:
                places[f"{block}.1"] = f"{there}.attentions.{layer}"
            places[f"{block}.{2 if attends else 1}.conv"] = f"{there}.upsamplers.0.conv"
    return places


def diffusers_vae_names(ours: Iterable[str], config: VAEConfig, old_attention: bool = False) -> NameMap:
    """diffusers' AutoencoderKL.  old_attention: query, key, value, proj_attn, as before version 0.18."""
    places, last = {}, len(config.channel_mult) - 1
    for side in ("encoder", "decoder"):
        places |= {
            f"{side}.norm_out": f"{side}.conv_norm_out",
            f"{side}.mid.block_1": f"{side}.mid_block.resnets.0",
            f"{side}.mid.attn_1": f"{side}.mid_block.attentions.0",
            f"{side}.mid.block_2": f"{side}.mid_block.resnets.1",
        }
    for level in range(last + 1):
        down, up = f"encoder.down_blocks.{level}", f"decoder.up_blocks.{last - level}"
        places[f"encoder.down.{level}.downsample.conv"] = f"{down}.downsamplers.0.conv"
        places[f"decoder.up.{level}.upsample.conv"] = f"{up}.upsamplers.0.conv"
        for layer in range(config.num_res_blocks + 1):
            places[f"encoder.down.{level}.block.{layer}"] = f"{down}.resnets.{layer}"
            places[f"decoder.up.{level}.block.{layer}"] = f"{up}.resnets.{layer}"
    attention = _OLD_VAE_ATTENTION if old_attention else _VAE_ATTENTION
    names: NameMap = {}
    for name in _of_part(ours, "vae"):
        inside = attention if ".attn_1." in name else {"nin_shortcut": "conv_shortcut"}
        names[f"vae.{name}"] = (_moved(name, places, inside),)
    return names


def _of_part(ours: Iterable[str], part: str) -> list[str]:
    return [name.removeprefix(f"{part}.") for name in ours if name.startswith(f"{part}.")]


def _moved(name: str, places: dict[str, str], inside: dict[str, str]) -> str:
    """Replace the longest known beginning by its place, and what follows by its name inside such a block."""
    steps = name.split(".")
    for cut in range(len(steps), 0, -1):
        if (here := ".".join(steps[:cut])) in places:
            tail = ".".join(steps[cut:-1])
            return ".".join(part for part in (places[here], inside.get(tail, tail), steps[-1]) if part)
    return name


LAST_LAYER = (".proj_out.weight", ".proj_out.bias")


def padded_levels(config: UNetConfig) -> tuple[int, ...]:
    """Levels that attend in diffusers, on the way down only, and not in ours."""
    return tuple(level for level in range(len(config.channel_mult) - 1) if level not in config.attention_levels)


def padding(config: UNetConfig, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The padded levels' tensors under diffusers' names: norms scale by one, everything else is zero."""
    tensors = {}
    for level in padded_levels(config):
        with torch.device("meta"):
            shapes = SpatialTransformer(config.level_widths[level], config).state_dict()
        for layer in range(config.num_res_blocks):
            for name, empty in shapes.items():
                is_gain = name.endswith("weight") and "norm" in name.split(".")[-2]
                fill = torch.ones if is_gain else torch.zeros
                tensors[f"down_blocks.{level}.attentions.{layer}.{name}"] = fill(empty.shape, dtype=dtype)
    return tensors


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
