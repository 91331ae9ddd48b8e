"""Small networks and numbers that the tests of diffusion and samplers share."""

import torch
from torch import Tensor, nn

from hoi.network.config import ModelConfig
from hoi.network.diffusion import NoiseSchedule
from hoi.network.model import CONDITION_NAMES, HOIDiffusion
from hoi.network.text import TextConfig
from hoi.network.unet import UNet, UNetConfig
from hoi.network.vae import VAEConfig
from hoi.weights.names import text_names

SCHEDULE = NoiseSchedule.stable_diffusion()
VELOCITY = NoiseSchedule.stable_diffusion(predicts="v", terminal_signal=0.01)  # of the built-in model
STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class FakeUNet(nn.Module):
    """Bounded, nonlinear, different in every channel; depends on latents, time, context and features."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = 0.3 * normal(4, 4, 3, 3, seed=7)
        self.calls: list[tuple[int, bool]] = []  # batch and whether there were features

    def cache_context(self, context: Tensor) -> Tensor:
        return context

    def forward(
        self, latents: Tensor, timesteps: Tensor, context: Tensor, cond_features: list[Tensor] | None
    ) -> Tensor:
        self.calls.append((len(context), cond_features is not None))
        latents, timesteps = (x.repeat(len(context) // len(x), *[1] * (x.ndim - 1)) for x in (latents, timesteps))
        phase = timesteps.view(-1, 1, 1, 1) / 300 + torch.tensor([0.0, 0.5, 1.0, 1.5]).view(1, 4, 1, 1)
        mixed = nn.functional.conv2d(latents, self.weight, padding=1) + context.mean(dim=(1, 2)).view(-1, 1, 1, 1)
        if cond_features is not None:
            repeats = len(latents) // len(cond_features[0])
            mixed = mixed + cond_features[0].repeat(repeats, 1, 1, 1)
        return torch.sin(mixed + phase) + 0.5 * latents


def small_unet() -> UNet:
    """A real U-Net with every parameter drawn, so that text and features reach the output."""
    unet = UNet(
        UNetConfig(
            model_channels=32,
            channel_mult=(1, 2),
            num_res_blocks=1,
            attention_levels=(0, 1),
            num_heads=4,
            context_dim=16,
        )
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in unet.named_parameters():
            is_gain = tensor.ndim == 1 and name.endswith("weight")
            spread = 0.1 if tensor.ndim == 1 else tensor[0].numel() ** -0.5
            tensor.copy_(is_gain + spread * torch.randn(tensor.shape, generator=generator))
    return unet.eval()


def small_inputs(count: int) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """context, uncond_context, latents, cond_features for small_unet."""
    features = [normal(count, 32, 8, 8, seed=4), normal(count, 64, 4, 4, seed=5)]
    return normal(count, 77, 16, seed=1), normal(1, 77, 16, seed=2), normal(count, 4, 8, 8, seed=3), features


SMALL = ModelConfig(
    name="small",
    unet=UNetConfig(model_channels=32, channel_mult=(1, 2, 3, 3), num_res_blocks=1, num_heads=2, context_dim=16),
    vae=VAEConfig(channels=32, channel_mult=(1, 1, 2), num_res_blocks=1),
    text=TextConfig(width=16, heads=2, layers=1, vocab_size=100),
    image_size=32,
    sampler="ddim",
    num_inference_steps=7,
    guidance_scale=1.5,
)


def small_model(seed: int = 0, with_conditions: bool = True) -> HOIDiffusion:
    """Random weights everywhere, the zero-initialised ones included."""
    model = HOIDiffusion(SMALL, with_conditions=with_conditions)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def model_inputs(seed: int = 1) -> dict:
    """What `HOIDiffusion.forward` takes, for small_model."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "latents": torch.randn(2, 4, 8, 8, generator=generator),
        "timesteps": torch.tensor([10, 900]),
        "context": torch.randn(2, 77, 16, generator=generator),
        "conditions": {name: torch.rand(2, 3, 32, 32, generator=generator) for name in CONDITION_NAMES},
    }


def text_weights(twin: nn.Module, config: TextConfig) -> dict[str, Tensor]:
    """The tensors of transformers' CLIP text model as those of a `TextEncoder`."""
    state = {name.removeprefix("text_model."): tensor for name, tensor in twin.state_dict().items()}
    names = text_names(config, "")
    return {ours.removeprefix("text_encoder."): torch.cat([state[name] for name in theirs])
            for ours, theirs in names.items()}  # fmt: skip
