"""How public weight files name their tensors.  Our names -> the names in a file of each layout.

Ours are those of `HOIDiffusion.state_dict()`: `unet.`, `vae.`, `text_encoder.`, `condition_encoders.NAME.` and, behind
these, mostly the names of a single Stable Diffusion 1.x file; of a ControlNet `unet.control.` and, the hint's encoder,
`condition_encoders.NUMBER.`.  There is one function a layout.  It returns, for each of
our names that the layout has, the names in the file whose tensors, stacked along dimension 0, are ours: one, but three
for the text encoder's query, key and value, which open_clip's transformer holds as one.  Loading and exporting both
go by these maps.

At the end: attention that does nothing, for levels where diffusers' U-Net must attend and ours does not.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from torch import Tensor

from hoi.network.text import TextConfig
from hoi.network.unet import SpatialTransformer, UNetConfig
from hoi.network.vae import VAEConfig

NameMap = dict[str, tuple[str, ...]]

# Of a single file; the original trainer's modules give their names.
UNET_PREFIX, VAE_PREFIX = "model.diffusion_model.", "first_stage_model."
TEXT_PREFIX = "cond_stage_model.transformer.text_model."
SHORT_TEXT_PREFIX = "cond_stage_model.transformer."  # some re-saves, and the official HOIDiffusion training
CONTROL_PREFIX = "control_model."
ADAPTER_PREFIX = "adapter."

# Computed from the noise schedule, saved by the original trainer, needed by nobody who has the schedule.
SCHEDULE_BUFFERS = (
    "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance",
    "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2",
)  # fmt: skip
POSITION_IDS = "embeddings.position_ids"  # 0 to 76, saved by transformers before 4.31
SINGLE_FILE_EXTRAS = {
    *SCHEDULE_BUFFERS, "logvar", TEXT_PREFIX + POSITION_IDS, SHORT_TEXT_PREFIX + POSITION_IDS,
}  # fmt: skip
# Of CLIP's scores, of other programs' samplers and of trainers: in some files, whatever the layout; never read here.
UNUSED = re.compile(r"(.*\.)?(logit_scale|text_projection(\.weight)?|denoiser\.(log_)?sigmas|global_step)")

# Inside the blocks: ours (and the single file's) -> diffusers'.
_UNET_RESNET = {
    "in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2", "out_layers.3": "conv2", "skip_connection": "conv_shortcut",
}  # fmt: skip
_VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_OLD_VAE_ATTENTION = {"norm": "group_norm", "q": "query", "k": "key", "v": "value", "proj_out": "proj_attn"}
# open_clip's text transformer, as ours -> transformers' CLIP.
_TEXT_OUTER = {
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight", "ln_final.bias": "final_layer_norm.bias",
}  # fmt: skip
_TEXT_LAYER = {
    "ln_1": "layer_norm1", "attn.out_proj": "self_attn.out_proj", "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
}  # fmt: skip
# The official release's names of the branches: its "depth" branch sees a normal map (paper Sec. 3.3).
OFFICIAL_BRANCHES = {"skeleton": "pose_ada", "normal": "depth_ada", "segmentation": "mask_ada"}


def _of_part(ours: Iterable[str], part: str) -> list[str]:
    """The names of one part of the model, without the part's; a ControlNet is none of the U-Net."""
    return [name.removeprefix(f"{part}.") for name in ours
            if name.startswith(f"{part}.") and not name.startswith("unet.control.")]  # fmt: skip


def _moved(name: str, places: dict[str, str], inside: dict[str, str]) -> str:
    """Replace the longest known beginning by its place, and what follows by its name inside such a block."""
    steps = name.split(".")
    for cut in range(len(steps), 0, -1):
        if (here := ".".join(steps[:cut])) in places:
            tail = ".".join(steps[cut:-1])
            return ".".join(part for part in (places[here], inside.get(tail, tail), steps[-1]) if part)
    return name


def single_file_names(ours: Iterable[str], text: TextConfig, text_prefix: str = TEXT_PREFIX) -> NameMap:
    """A .ckpt or .safetensors of Stable Diffusion 1.x, which has no place for condition encoders."""
    names: NameMap = {}
    for part, prefix in (("unet", UNET_PREFIX), ("vae", VAE_PREFIX)):
        names |= {f"{part}.{name}": (prefix + name,) for name in _of_part(ours, part)}
    return names | text_names(text, text_prefix)


def text_names(text: TextConfig, prefix: str) -> NameMap:
    """transformers' CLIPTextModel.

    prefix   "" as version 5 writes it, `text_model.` before; in single files TEXT_PREFIX or SHORT_TEXT_PREFIX
    """
    names = {f"text_encoder.{ours}": (prefix + theirs,) for ours, theirs in _TEXT_OUTER.items()}
    for layer in range(text.layers):
        here, there = f"text_encoder.transformer.resblocks.{layer}", f"{prefix}encoder.layers.{layer}"
        for kind in ("weight", "bias"):
            names[f"{here}.attn.in_proj_{kind}"] = tuple(f"{there}.self_attn.{p}_proj.{kind}" for p in "qkv")
            for ours, theirs in _TEXT_LAYER.items():
                names[f"{here}.{ours}.{kind}"] = (f"{there}.{theirs}.{kind}",)
    return names


def official_adapter_names(ours: Iterable[str]) -> NameMap:
    """model_ad_N.pth of the official HOIDiffusion code."""
    names: NameMap = {}
    for name in _of_part(ours, "condition_encoders"):
        branch, _, rest = name.partition(".")
        names[f"condition_encoders.{name}"] = (f"{OFFICIAL_BRANCHES[branch]}.{rest}",)
    return names


def t2i_adapter_names(ours: Iterable[str], branch: str) -> NameMap:
    """A T2I-Adapter of Mou et al. 2023, one condition: its names are those of our branch `branch`."""
    prefix = f"condition_encoders.{branch}"
    return {f"{prefix}.{name}": (name,) for name in _of_part(ours, prefix)}


def diffusers_adapter_names(ours: Iterable[str], branch: str) -> NameMap:
    """diffusers' T2IAdapter: two blocks a level, counted within their level; all behind ADAPTER_PREFIX in its files."""
    names: NameMap = {}
    for name, (bare,) in t2i_adapter_names(ours, branch).items():
        if bare.startswith("body."):
            _, number, layer, kind = bare.split(".")
            level, index = divmod(int(number), 2)
            inside = layer if layer == "in_conv" else f"resnets.{index}.{layer}"
            bare = f"body.{level}.{inside}.{kind}"
        names[name] = (bare,)
    return names


def controlnet_names(ours: Iterable[str], prefix: str = CONTROL_PREFIX) -> NameMap:
    """A ControlNet as Zhang et al. 2023 published it, the U-Net's names inside; some files have no prefix."""
    places = {"unet.control.": prefix, "condition_encoders.": f"{prefix}input_hint_block."}
    return {name: (there + name.removeprefix(here),)
            for name in ours for here, there in places.items() if name.startswith(here)}  # fmt: skip


def diffusers_controlnet_names(ours: Iterable[str], config: UNetConfig) -> NameMap:
    """diffusers' ControlNetModel, which tells the first and the last convolution of the hint from those between."""
    published = controlnet_names(ours, "")
    convs = sum(name.startswith("condition_encoders.") for name in published) // 2  # weight and bias
    hint = ["conv_in", *(f"blocks.{k}" for k in range(convs - 2)), "conv_out"]
    places = _unet_places(config) | {"middle_block_out.0": "controlnet_mid_block"}
    places |= {f"input_hint_block.{2 * k}": f"controlnet_cond_embedding.{place}" for k, place in enumerate(hint)}
    places |= {f"zero_convs.{k}.0": f"controlnet_down_blocks.{k}"
               for k in range(len(config.channel_mult) * (config.num_res_blocks + 1))}  # fmt: skip
    return {name: (_moved(theirs, places, _UNET_RESNET),) for name, (theirs,) in published.items()}


def diffusers_unet_names(ours: Iterable[str], config: UNetConfig) -> NameMap:
    """diffusers' UNet2DConditionModel."""
    places = _unet_places(config)  # blocks that a config does not have stand here too; no name begins with them
    return {f"unet.{name}": (_moved(name, places, _UNET_RESNET),) for name in _of_part(ours, "unet")}


def _unet_places(config: UNetConfig) -> dict[str, str]:
    """Our numbered blocks -> where they stand in diffusers, which counts levels and the blocks within each."""
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
            attends = level in config.attention_levels  # then the upsampling stands behind the attention, as number 2
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


# --- attention that does nothing ---

# diffusers adds condition features to the main path and to the skip connection, as the paper does, only in a down block
# with attention (or in the last level).  A level of ours without attention therefore gets a transformer there whose
# last layer, LAST_LAYER, is zero: it adds nothing, to the bit.
LAST_LAYER = (".proj_out.weight", ".proj_out.bias")


def padded_levels(config: UNetConfig) -> tuple[int, ...]:
    """Levels that attend in our exports to diffusers, on the way down only, and not in our U-Net; 0 is the finest."""
    return tuple(level for level in range(len(config.channel_mult) - 1) if level not in config.attention_levels)


def padding(config: UNetConfig, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The padded levels' tensors under diffusers' names: norms scale by one, everything else is zero.

    The last layers alone must be zero; the rest is what diffusers' own layers start with, as far as it is not random.
    """
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
