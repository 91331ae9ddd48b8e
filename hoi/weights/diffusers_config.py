"""The settings of a diffusers folder.  config.json of its parts <-> our `ModelConfig`.

Sizes stand in tables that are read both ways, settings that never differ in _UNET_FIXED and _VAE_FIXED.  What our
classes cannot be is refused by name: on the way in by `read_folder_config`, on the way out by `folder_config`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from hoi.common.files import content_expected, read_json
from hoi.network.config import PRESETS, ModelConfig
from hoi.network.diffusion import NoiseSchedule
from hoi.network.text import BOS_ID, EOS_ID, TextConfig
from hoi.network.unet import UNetConfig
from hoi.network.vae import VAEConfig
from hoi.weights.names import padded_levels

Json = dict[str, Any]
FOLDER_PARTS = ("unet", "vae", "text_encoder")
SCHEDULER_FILE = Path("scheduler") / "scheduler_config.json"

# Settings with one value in every Stable Diffusion 1.x; a file that says otherwise is another network.
_UNET_FIXED = {
    "flip_sin_to_cos": True, "freq_shift": 0, "act_fn": "silu", "mid_block_scale_factor": 1, "downsample_padding": 1,
    "norm_eps": 1e-5, "mid_block_type": "UNetMidBlock2DCrossAttn", "transformer_layers_per_block": 1,
    "dual_cross_attention": False, "use_linear_projection": False, "only_cross_attention": False,
    "class_embed_type": None, "addition_embed_type": None, "encoder_hid_dim": None, "num_class_embeds": None,
    "resnet_time_scale_shift": "default", "time_embedding_type": "positional", "conv_in_kernel": 3,
    "conv_out_kernel": 3, "center_input_sample": False,
}  # fmt: skip
_VAE_FIXED = {
    "act_fn": "silu", "in_channels": 3, "out_channels": 3, "shift_factor": None, "latents_mean": None,
    "use_quant_conv": True, "use_post_quant_conv": True, "mid_block_add_attention": True,
}  # fmt: skip
# Theirs -> ours, where both mean the same.
_UNET_SIZES = {
    "in_channels": "in_channels", "out_channels": "out_channels", "layers_per_block": "num_res_blocks",
    "cross_attention_dim": "context_dim", "norm_num_groups": "norm_groups",
}  # fmt: skip
_VAE_SIZES = {
    "layers_per_block": "num_res_blocks", "latent_channels": "z_channels", "scaling_factor": "scaling_factor",
    "norm_num_groups": "norm_groups",
}  # fmt: skip
_TEXT_SIZES = {
    "hidden_size": "width", "num_attention_heads": "heads", "num_hidden_layers": "layers",
    "max_position_embeddings": "context_length", "vocab_size": "vocab_size",
}  # fmt: skip
# What the first folders do not say, because it was the only value then.
_DEFAULTS = {"norm_num_groups": 32, "scaling_factor": 0.18215, "max_position_embeddings": 77}
# The blocks of a level, downwards and upwards: without attention, with attention, padded (see names.py).
_PLAIN, _ATTENDING = ("DownBlock2D", "UpBlock2D"), ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D")
_PADDED = ("CrossAttnDownBlock2D", "UpBlock2D")
_ACTIVATIONS = {"quick_gelu": True, "gelu": False}
_PREDICTIONS = {"epsilon": "eps", "v_prediction": "v"}
# Our samplers in diffusers' words; its defaults space the timesteps of the first otherwise.
_SAMPLERS = {
    "dpm++": {
        "_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver++", "solver_order": 2,
        "solver_type": "midpoint", "final_sigmas_type": "zero", "timestep_spacing": "linspace",
    },
    "ddim": {
        "_class_name": "DDIMScheduler", "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1,
        "timestep_spacing": "leading",
    },
    "ddpm": {
        "_class_name": "DDPMScheduler", "clip_sample": False, "variance_type": "fixed_small",
        "timestep_spacing": "leading",
    },
}  # fmt: skip


# --- in ---


def _refuse_other_families(unet: Mapping[str, Any], folder: Path) -> None:
    width, linear = unet.get("cross_attention_dim"), unet.get("use_linear_projection")
    second_text = folder / "text_encoder_2"
    families = {
        "a Stable Diffusion XL folder": unet.get("addition_embed_type") == "text_time" or second_text.is_dir(),
        f"Stable Diffusion 2.x (text width {width}, linear projections)": width == 1024 or linear,
        "an inpainting Stable Diffusion (9 input channels)": unet.get("in_channels") == 9,
    }
    for family, is_it in families.items():
        if is_it:
            raise ValueError(f"{folder} is {family}, expected Stable Diffusion 1.x")


def _check_fixed(settings: Mapping[str, Any], fixed: Mapping[str, Any], path: Path) -> None:
    for name, expected in fixed.items():
        if (value := settings.get(name, expected)) != expected:
            raise ValueError(f"{path}: {name} is {value!r}, expected {expected!r} as in Stable Diffusion 1.x")


def _size(name: str, value: Any, path: Path) -> Any:
    """A setting that must be a positive number, whole but for the scaling factor.  ValueError otherwise."""
    kinds = (int, float) if name == "scaling_factor" else (int,)
    if type(value) not in kinds or not 0 < value < math.inf:
        raise ValueError(f"{path}: {name} is {value!r}, expected a positive {'whole ' * (len(kinds) == 1)}number")
    return value


def _widths(settings: Mapping[str, Any], path: Path) -> tuple[int, tuple[float, ...]]:
    """The width of the finest level, and every level's as a multiple of it."""
    widths = settings["block_out_channels"]
    if not isinstance(widths, list) or not widths:
        raise ValueError(f"{path}: block_out_channels is {widths!r}, expected a list of widths, one a level")
    first, *_ = [_size("block_out_channels", width, path) for width in widths]
    return first, tuple(width // first if width % first == 0 else width / first for width in widths)


def _sizes(settings: Mapping[str, Any], table: Mapping[str, str], path: Path) -> dict[str, Any]:
    """What a table names, under our names.  Raises KeyError for a setting that every folder has."""
    settings = _DEFAULTS | settings
    return {ours: _size(theirs, settings[theirs], path) for theirs, ours in table.items()}


def _unet_from(settings: Mapping[str, Any], path: Path) -> UNetConfig:
    _check_fixed(settings, _UNET_FIXED, path)
    channels, mult = _widths(settings, path)
    heads = settings.get("num_attention_heads") or settings["attention_head_dim"]  # diffusers' misnomer
    if type(heads) is not int or heads < 1:
        raise ValueError(f"{path}: attention_head_dim is {heads}, expected one number of heads for all levels")
    levels = _attention_levels(settings["down_block_types"], settings["up_block_types"], path)
    return UNetConfig(
        model_channels=channels, channel_mult=mult, attention_levels=levels, num_heads=heads,
        **_sizes(settings, _UNET_SIZES, path),
    )  # fmt: skip


def _attention_levels(down: list[str], up: list[str], path: Path) -> tuple[int, ...]:
    """Levels whose blocks attend, 0 the finest, where the list of the way up ends."""
    levels = list(zip(down, reversed(up), strict=False))
    if len(down) != len(up) or not set(levels) <= {_PLAIN, _ATTENDING, _PADDED}:
        raise ValueError(f"{path}: up_block_types {up} do not mirror down_block_types {down}, or some are unknown")
    return tuple(level for level, blocks in enumerate(levels) if blocks == _ATTENDING)


def _vae_from(settings: Mapping[str, Any], path: Path) -> VAEConfig:
    _check_fixed(settings, _VAE_FIXED, path)
    channels, mult = _widths(settings, path)
    widths = settings["block_out_channels"]
    if any(width % channels for width in widths):
        raise ValueError(f"{path}: block_out_channels are {widths}, expected multiples of the first")
    return VAEConfig(channels=channels, channel_mult=mult, **_sizes(settings, _VAE_SIZES, path))


def _text_from(settings: Mapping[str, Any], path: Path) -> TextConfig:
    _check_fixed(settings, {"layer_norm_eps": 1e-5, "intermediate_size": 4 * settings["hidden_size"]}, path)
    if (activation := settings.get("hidden_act", "quick_gelu")) not in _ACTIVATIONS:
        raise ValueError(f"{path}: hidden_act is {activation!r}, expected {' or '.join(_ACTIVATIONS)}")
    return TextConfig(quick_gelu=_ACTIVATIONS[activation], **_sizes(settings, _TEXT_SIZES, path))


def _schedule_from(settings: Mapping[str, Any], path: Path) -> tuple[str, float | None]:
    """What the network predicts, and the terminal signal of its schedule (None: Stable Diffusion's own)."""
    kind = settings.get("prediction_type", "epsilon")
    if kind not in _PREDICTIONS:
        raise ValueError(f"{path}: prediction_type is {kind!r}, expected {' or '.join(_PREDICTIONS)}")
    steps = _size("num_train_timesteps", settings.get("num_train_timesteps", 1000), path)
    if (noise_betas := settings.get("trained_betas")) is None:
        # Without trained_betas, which our exports have; "linear" is what diffusers takes where nothing is said.
        fixed = {"beta_schedule": "scaled_linear", "rescale_betas_zero_snr": False}
        _check_fixed({"beta_schedule": "linear"} | settings, fixed, path)
        start, end = settings["beta_start"], settings["beta_end"]
        noise_betas = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2
    alphas_cumprod = (1 - torch.as_tensor(noise_betas, dtype=torch.float64)).flatten().cumprod(dim=0)
    if not len(alphas_cumprod) or not (0 < alphas_cumprod[-1] < 1):
        raise ValueError(f"{path}: its betas make no noise schedule; expected numbers between 0 and 1")
    # Nine digits, so that our own 0.01 comes back as 0.01 and not as the square root of a product of 1000 factors.
    terminal = round(math.sqrt(alphas_cumprod[-1].item()), 9)
    for terminal_signal in (None, terminal):
        try:
            expected = NoiseSchedule.stable_diffusion(terminal_signal=terminal_signal).alphas_cumprod
        except ValueError:
            continue
        # A schedule computed in float32 is off by 9e-7 (measured); any other one by far more than 1e-5.
        if len(expected) == len(alphas_cumprod) and torch.allclose(alphas_cumprod, expected, rtol=1e-5, atol=1e-9):
            return _PREDICTIONS[kind], terminal_signal
    raise ValueError(
        f"{path}: the noise schedule ({len(alphas_cumprod)} steps, signal {terminal:.4f} at the end) is not"
        " Stable Diffusion 1.x's (1000 steps, 0.0683), nor that one with a lower end"
    )


def read_folder_config(folder: Path) -> ModelConfig:
    """The configuration of a diffusers folder of Stable Diffusion 1.x or of an export of ours.

    Raises FileNotFoundError naming a missing part, ValueError naming another family or a setting that does not fit.
    """
    paths = {part: folder / part / "config.json" for part in FOLDER_PARTS} | {"scheduler": folder / SCHEDULER_FILE}
    advice = f"; a diffusers folder needs {', '.join(f'{part}/' for part in FOLDER_PARTS)} and {SCHEDULER_FILE}"
    settings = {part: read_json(path, "configuration", advice) for part, path in paths.items()}
    _refuse_other_families(settings["unet"], folder)
    with content_expected(folder, "the settings of Stable Diffusion 1.x in each config.json"):
        unet, vae = _unet_from(settings["unet"], paths["unet"]), _vae_from(settings["vae"], paths["vae"])
        text = _text_from(settings["text_encoder"], paths["text_encoder"])
        predicts, terminal_signal = _schedule_from(settings["scheduler"], paths["scheduler"])
        side = _size("sample_size", settings["unet"].get("sample_size") or 64, paths["unet"])
        config = ModelConfig("custom", unet, vae, text, side * vae.factor, predicts=predicts,  # 64 latents: 512 px
                             terminal_signal=terminal_signal)  # fmt: skip
    for known in (preset() for preset in PRESETS.values()):  # a preset also knows how it is best sampled
        its_vae = replace(known.vae, scaling_factor=vae.scaling_factor)  # which is measured after each training
        if (known.unet, its_vae, known.text, known.predicts) == (unet, vae, text, predicts):
            return replace(known, vae=vae, image_size=config.image_size, terminal_signal=terminal_signal)
    return config


# --- out ---


def _sizes_of(part: UNetConfig | VAEConfig | TextConfig, table: Mapping[str, str]) -> Json:
    """What a table names of a part of the model, under diffusers' names."""
    return {theirs: getattr(part, ours) for theirs, ours in table.items()}


def _unet_settings(config: ModelConfig) -> Json:
    unet = config.unet
    if unet.channel_mult[0] != 1:
        raise ValueError(
            f"the preset {config.name!r} begins {unet.model_channels} wide and has a finest level of"
            f" {unet.level_widths[0]}; diffusers' U-Net begins as wide as its finest level, so it cannot hold these"
            " weights: export to own, single or official"
        )
    blocks = [_ATTENDING if level in unet.attention_levels else _PADDED if level in padded_levels(unet) else _PLAIN
              for level in range(len(unet.channel_mult))]  # fmt: skip
    return {
        "_class_name": "UNet2DConditionModel",
        **_UNET_FIXED,
        **_sizes_of(unet, _UNET_SIZES),
        "attention_head_dim": unet.num_heads,
        "block_out_channels": list(unet.level_widths),
        "down_block_types": [down for down, _ in blocks],
        "sample_size": config.image_size // config.vae.factor,
        "up_block_types": [up for _, up in reversed(blocks)],
    }


def _vae_settings(config: ModelConfig) -> Json:
    vae, levels = config.vae, len(config.vae.channel_mult)
    return {
        "_class_name": "AutoencoderKL",
        **_VAE_FIXED,
        **_sizes_of(vae, _VAE_SIZES),
        "block_out_channels": [vae.channels * mult for mult in vae.channel_mult],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "sample_size": config.image_size,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }


def _text_settings(text: TextConfig) -> Json:
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "pad_token_id": 1,  # as in Stable Diffusion's own file; its tokenizer pads with the end of text all the same
        **_sizes_of(text, _TEXT_SIZES),
        "hidden_act": "quick_gelu" if text.quick_gelu else "gelu",
        "intermediate_size": 4 * text.width,
        "layer_norm_eps": 1e-5,
        "projection_dim": text.width,
    }


def _scheduler_settings(config: ModelConfig) -> Json:
    """The model's own sampler; a schedule of ours with a lower end is spelt out, number by number."""
    settings: Json = {
        **_SAMPLERS[config.sampler],
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "num_train_timesteps": 1000,
        "prediction_type": {ours: theirs for theirs, ours in _PREDICTIONS.items()}[config.predicts],
        "trained_betas": None,
    }
    if config.terminal_signal is not None:
        alphas_cumprod = config.noise_schedule().alphas_cumprod
        before = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]])
        settings["trained_betas"] = (1 - alphas_cumprod / before).tolist()
    return settings


def adapter_config(config: ModelConfig) -> Json:
    """config.json of one T2IAdapter."""
    return {
        "_class_name": "T2IAdapter",
        "adapter_type": "full_adapter",
        "channels": list(config.unet.level_widths),
        "downscale_factor": config.vae.factor,
        "in_channels": 3,
        "num_res_blocks": 2,
    }


def folder_config(config: ModelConfig) -> dict[str, Json]:
    """config.json of every part and the scheduler's, by path inside the folder.

    Raises ValueError when diffusers' U-Net cannot be of these sizes.
    """
    return {
        "unet/config.json": _unet_settings(config),
        "vae/config.json": _vae_settings(config),
        "text_encoder/config.json": _text_settings(config.text),
        str(SCHEDULER_FILE): _scheduler_settings(config),
    }
