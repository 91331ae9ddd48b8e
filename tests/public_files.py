"""Small files laid out as the public ones, written with diffusers and transformers; shared by two test modules."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, ControlNetModel, DDIMScheduler, T2IAdapter, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_controlnet_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from hoi.network.config import ModelConfig
from hoi.network.model import HOIDiffusion
from hoi.network.text import TextConfig
from hoi.network.unet import UNet, UNetConfig
from hoi.network.vae import VAE, VAEConfig
from hoi.weights.names import controlnet_names

WIDTHS = (32, 64, 64, 64)
CONFIG = ModelConfig(
    name="custom",
    unet=UNetConfig(model_channels=32, channel_mult=(1, 2, 2, 2), num_res_blocks=1, num_heads=4, context_dim=32),
    vae=VAEConfig(channels=32, channel_mult=(1, 1, 2, 2), num_res_blocks=1),
    text=TextConfig(width=32, heads=4, layers=2, vocab_size=49408),
    image_size=64,
)


def randomized(module: nn.Module, seed: int) -> nn.Module:
    """Random values everywhere, zero-initialised layers and norms included, so that no path hides."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(0.1 * noise + float(name.endswith("weight")))
    return module.eval()


def diffusers_unet(**changes) -> UNet2DConditionModel:
    down = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    settings = {
        "block_out_channels": WIDTHS,
        "layers_per_block": 1,
        "down_block_types": down,
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        "cross_attention_dim": 32,
        "attention_head_dim": 4,
        "sample_size": 8,
    }
    return randomized(UNet2DConditionModel(**settings | changes), 1)


def diffusers_vae() -> AutoencoderKL:
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 32, 64, 64),
        layers_per_block=1,
        latent_channels=4,
        sample_size=64,
    )
    return randomized(vae, 2)


def clip_text_model() -> CLIPTextModel:
    sizes = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return randomized(CLIPTextModel(CLIPTextConfig(vocab_size=49408, hidden_act="quick_gelu", **sizes)), 3)


def t2i_adapter(seed: int, in_channels: int = 3, kind: str = "full_adapter") -> T2IAdapter:
    return randomized(T2IAdapter(in_channels, list(WIDTHS), 2, 8, kind), seed)


def controlnet(channels: int = 9, **changes) -> ControlNetModel:
    """For the U-Net above; channels: of the hint, three a condition image."""
    sizes = {"block_out_channels": WIDTHS, "layers_per_block": 1, "cross_attention_dim": 32, "attention_head_dim": 4}
    return randomized(ControlNetModel(conditioning_channels=channels, **sizes | changes), 4)


def scheduler(**changes) -> DDIMScheduler:
    settings = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}
    return DDIMScheduler(**settings | {"steps_offset": 1, "set_alpha_to_one": False} | changes)


def write_folder(folder: Path, variant: str | None = None) -> Path:
    """A diffusers folder of Stable Diffusion 1.x, smaller."""
    diffusers_unet().save_pretrained(folder / "unet", variant=variant)
    diffusers_vae().save_pretrained(folder / "vae", variant=variant)
    clip_text_model().save_pretrained(folder / "text_encoder", variant=variant)
    scheduler().save_pretrained(folder / "scheduler")
    return folder


def published_adapter_names(state: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """diffusers' T2IAdapter names -> those of the published files, where blocks are counted through all levels."""
    renamed = {}
    for name, tensor in state.items():
        steps = name.removeprefix("adapter.").split(".")
        if steps[0] == "body" and steps[2] == "resnets":
            steps[1:4] = [str(2 * int(steps[1]) + int(steps[3]))]
        elif steps[0] == "body":
            steps[1] = str(2 * int(steps[1]))
        renamed[prefix + ".".join(steps)] = tensor
    return renamed


def single_file_state(text_prefix: str = "cond_stage_model.transformer.text_model.") -> dict[str, Tensor]:
    """The models of `write_folder` under the names of a Stable Diffusion file.

    diffusers' own converters, fed with numbered tensors, tell which name becomes which.  That the names given to them
    are the published ones is held by hashes in network/test_model.py and weights/test_names.py.
    """
    with torch.device("meta"):
        unet_names = {f"model.diffusion_model.{k}": v for k, v in UNet(CONFIG.unet).state_dict().items()}
        vae_names = {f"first_stage_model.{k}": v for k, v in VAE(CONFIG.vae).state_dict().items()}
    unet, vae, state = diffusers_unet(), diffusers_vae(), {}
    for names, twin, convert in (
        (unet_names, unet, convert_ldm_unet_checkpoint),
        (vae_names, vae, convert_ldm_vae_checkpoint),
    ):
        numbered = {name: torch.full(t.shape, float(i)) for i, (name, t) in enumerate(names.items())}
        order, tensors = list(names), twin.state_dict()
        for theirs, number in convert(dict(numbered), twin.config).items():
            ours = order[int(number.flatten()[0])]
            state[ours] = tensors[theirs].reshape(names[ours].shape)
    assert len(state) == len(unet_names) + len(vae_names)
    text = {name.removeprefix("text_model."): tensor for name, tensor in clip_text_model().state_dict().items()}
    return state | {text_prefix + name: tensor for name, tensor in text.items()}


def published_controlnet_names(twin: ControlNetModel, prefix: str = "control_model.") -> dict[str, Tensor]:
    """A diffusers ControlNet under the published names, which its own converter, fed with numbers, tells apart."""
    with torch.device("meta"):
        names = controlnet_names(HOIDiffusion(CONFIG, controlnet=True).state_dict())
    order = [theirs for (theirs,) in names.values()]
    numbered = {name: torch.full((1,), float(i)) for i, name in enumerate(order)}
    converted, tensors = convert_controlnet_checkpoint(numbered, twin.config), twin.state_dict()
    assert converted.keys() == tensors.keys() and len(converted) == len(order)
    published = {order[int(number)]: tensors[theirs] for theirs, number in converted.items()}
    return {prefix + name.removeprefix("control_model."): tensor for name, tensor in published.items()}
