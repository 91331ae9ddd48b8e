"""The settings of a diffusers folder.  config.json of its parts <-> our `ModelConfig`.

Sizes stand in tables that are read both ways, settings that never differ in _UNET_FIXED and _VAE_FIXED.  On the way in
`read_folder_config` takes the sizes, and then compares all settings with those that we would write of them, so what our
classes cannot be is refused by name; on the way out `folder_config` does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
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


def _size(name: str, value: Any, path: Path) -> Any:
    """A setting that must be a positive number, whole but for the scaling factor.  ValueError otherwise."""
    kinds = (int, float) if name == "scaling_factor" else (int,)
    if type(value) not in kinds or not 0 < value < math.inf:
        raise ValueError(f"{path}: {name} is {value!r}, expected a positive {'whole ' * (len(kinds) == 1)}number")
    return value


def _widths(settings: Mapping[str, Any], path: Path) -> tuple[int, tuple[float, ...]]:
    """The width of the finest level, and every level's as a multiple of it."""
    first, *_ = widths = [_size("block_out_channels", width, path) for width in settings["block_out_channels"]]
    return first, tuple(width // first if width % first == 0 else width / first for width in widths)


def _sizes(settings: Mapping[str, Any], table: Mapping[str, str], path: Path) -> dict[str, Any]:
    """What a table names, under our names.  Raises KeyError for a setting that every folder has."""
    settings = _DEFAULTS | settings
    return {ours: _size(theirs, settings[theirs], path) for theirs, ours in table.items()}


def _unet_from(settings: Mapping[str, Any], path: Path) -> UNetConfig:
    channels, mult = _widths(settings, path)
    heads = settings.get("num_attention_heads") or settings["attention_head_dim"]  # diffusers' misnomer
    up = list(reversed(settings["up_block_types"]))  # from the finest level on
    return UNetConfig(
        model_channels=channels, channel_mult=mult, num_heads=_size("attention_head_dim", heads, path),
        attention_levels=tuple(level for level, block in enumerate(up) if block == _ATTENDING[1]),
        **_sizes(settings, _UNET_SIZES, path),
    )  # fmt: skip


def _terminal_signal(settings: Mapping[str, Any], path: Path) -> float | None:
    """What the signal of a schedule falls to that is spelt out, as in our exports; None: Stable Diffusion's own."""
    if (found := settings.get("trained_betas")) is None:
        return None
    # Nine digits, so that our own 0.01 comes back as 0.01 and not as the square root of a product of 1000 factors.
    signal = round(math.sqrt(np.prod(1 - np.asarray(found, dtype=np.float64))), 9)
    if not np.allclose(found, _noise_betas(NoiseSchedule.stable_diffusion(terminal_signal=signal)), rtol=1e-5):
        raise ValueError(f"{path}: trained_betas are not Stable Diffusion 1.x's, nor those with a lower end")
    return signal


def read_folder_config(folder: Path) -> ModelConfig:
    """The configuration of a diffusers folder of Stable Diffusion 1.x or of an export of ours.

    Raises FileNotFoundError naming a missing part, ValueError naming another family or a setting that does not fit.
    """
    paths = {part: folder / part / "config.json" for part in FOLDER_PARTS} | {"scheduler": folder / SCHEDULER_FILE}
    advice = f"; a diffusers folder needs {', '.join(f'{part}/' for part in FOLDER_PARTS)} and {SCHEDULER_FILE}"
    settings = {part: read_json(path, "configuration", advice) for part, path in paths.items()}
    unet, vae, text, scheduler = settings.values()
    _refuse_other_families(unet, folder)
    with content_expected(folder, "the settings of Stable Diffusion 1.x in each config.json"):
        channels, mult = _widths(vae, paths["vae"])
        vae_config = VAEConfig(channels=channels, channel_mult=mult, **_sizes(vae, _VAE_SIZES, paths["vae"]))
        side = _size("sample_size", unet.get("sample_size") or 64, paths["unet"])  # latents: 512 px
        config = ModelConfig(
            "custom", _unet_from(unet, paths["unet"]), vae_config,
            TextConfig(quick_gelu=text.get("hidden_act", "quick_gelu") == "quick_gelu",
                       **_sizes(text, _TEXT_SIZES, paths["text_encoder"])),
            image_size=side * vae_config.factor, predicts=_PREDICTIONS.get(scheduler.get("prediction_type"), "eps"),
            terminal_signal=_terminal_signal(scheduler, paths["scheduler"]),
        )  # fmt: skip
        # Whatever else it says must be what we would write of these sizes; "linear" is diffusers' default.
        settings["scheduler"] = {"beta_schedule": "linear"} | scheduler
        for part, ours in _network_settings(config).items():
            for name, expected in ours.items():
                if (value := settings[part].get(name, expected)) != expected:
                    told = f"{name} is {value!r}, expected {expected!r} as in Stable Diffusion 1.x"
                    raise ValueError(f"{paths[part]}: {told}")
    for known in (preset() for preset in PRESETS.values()):  # a preset also knows how it is best sampled
        its_vae = replace(known.vae, scaling_factor=vae_config.scaling_factor)  # which is measured after each training
        if (known.unet, its_vae, known.text, known.predicts) == (config.unet, vae_config, config.text, config.predicts):
            return replace(known, vae=vae_config, image_size=config.image_size, terminal_signal=config.terminal_signal)
    return config


# --- out ---


def _sizes_of(part: UNetConfig | VAEConfig | TextConfig, table: Mapping[str, str]) -> Json:
    """What a table names of a part of the model, under diffusers' names."""
    return {theirs: getattr(part, ours) for theirs, ours in table.items()}


def _network_settings(config: ModelConfig) -> dict[str, Json]:
    """What decides the network and its schedule, by part; another value in a folder means another network."""
    unet, vae, text = config.unet, config.vae, config.text
    levels, padded = len(vae.channel_mult), padded_levels(unet)
    blocks = [_ATTENDING if level in unet.attention_levels else _PADDED if level in padded else _PLAIN
              for level in range(len(unet.channel_mult))]  # fmt: skip
    return {
        "unet": {
            **_UNET_FIXED,
            **_sizes_of(unet, _UNET_SIZES),
            "block_out_channels": list(unet.level_widths),
            "down_block_types": [down for down, _ in blocks],
            "up_block_types": [up for _, up in reversed(blocks)],
        },
        "vae": {
            **_VAE_FIXED,
            **_sizes_of(vae, _VAE_SIZES),
            "block_out_channels": [vae.channels * mult for mult in vae.channel_mult],
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
        },
        "text_encoder": {
            **_sizes_of(text, _TEXT_SIZES),
            "hidden_act": "quick_gelu" if text.quick_gelu else "gelu",
            "intermediate_size": 4 * text.width,
            "layer_norm_eps": 1e-5,
        },
        "scheduler": {
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "beta_start": 0.00085,
            "num_train_timesteps": 1000,
            "prediction_type": {ours: theirs for theirs, ours in _PREDICTIONS.items()}[config.predicts],
            "rescale_betas_zero_snr": False,
        },
    }


def _noise_betas(schedule: NoiseSchedule) -> list[float]:
    """The variances of the steps, number by number: (T,)."""
    before = torch.cat([torch.ones(1, dtype=torch.float64), schedule.alphas_cumprod[:-1]])
    return (1 - schedule.alphas_cumprod / before).tolist()


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

    The scheduler is the model's own sampler; a schedule of ours with a lower end is spelt out, number by number.
    Raises ValueError when diffusers' U-Net cannot be of these sizes.
    """
    if config.unet.channel_mult[0] != 1:
        raise ValueError(
            f"the preset {config.name!r} begins {config.unet.model_channels} wide and has a finest level of"
            f" {config.unet.level_widths[0]}; diffusers' U-Net begins as wide as its finest level, so it cannot hold"
            " these weights: export to own, single or official"
        )
    network, trained = _network_settings(config), config.terminal_signal is not None
    return {
        "unet/config.json": network["unet"] | {
            "_class_name": "UNet2DConditionModel", "attention_head_dim": config.unet.num_heads,
            "sample_size": config.image_size // config.vae.factor,
        },
        "vae/config.json": network["vae"] | {"_class_name": "AutoencoderKL", "sample_size": config.image_size},
        "text_encoder/config.json": network["text_encoder"] | {
            "architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "projection_dim": config.text.width,
            # As in Stable Diffusion's own file; its tokenizer pads with the end of text all the same.
            "bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "pad_token_id": 1,
        },
        str(SCHEDULER_FILE): network["scheduler"] | _SAMPLERS[config.sampler] | {
            "trained_betas": _noise_betas(config.noise_schedule()) if trained else None
        },
    }  # fmt: skip
