"""Sizes and sampling defaults of the network: `sd1`, the paper's, and `tiny`, the built-in miniature's."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass

from hoi.common.choices import PRESET_NAMES, TINY_SIDE
from hoi.common.command import first_few
from hoi.common.files import parse_json
from hoi.network.diffusion import NoiseSchedule
from hoi.network.text import TextConfig
from hoi.network.unet import UNetConfig
from hoi.network.vae import VAEConfig

# What the official test script passes unless told otherwise (paper: not mentioned).
STOCK_NEGATIVE_PROMPT = (
    "longbody, lowres, bad anatomy, bad hands, missing fingers, extra digit, fewer digits, cropped, worst quality, "
    "low quality"
)


@dataclass(frozen=True)
class ModelConfig:
    """Everything needed to build the network, and how it is best sampled.

    predicts, terminal_signal   what the U-Net was trained towards: see NoiseSchedule
    Raises ValueError when the parts do not fit together.
    """

    name: str
    unet: UNetConfig
    vae: VAEConfig
    text: TextConfig
    image_size: int  # pixels, the side of the pictures it was made for
    sampler: str = "dpm++"
    num_inference_steps: int = 20
    guidance_scale: float = 7.5
    predicts: str = "eps"
    terminal_signal: float | None = None

    def __post_init__(self) -> None:
        if self.unet.context_dim != self.text.width:
            raise ValueError(
                f"the U-Net expects text width {self.unet.context_dim}, the text encoder gives {self.text.width}"
            )
        if self.unet.in_channels != self.vae.z_channels:
            raise ValueError(f"the U-Net takes {self.unet.in_channels} channels, the VAE makes {self.vae.z_channels}")

    def noise_schedule(self) -> NoiseSchedule:
        """Stable Diffusion's 1000 steps, with this model's target and noisiest end."""
        return NoiseSchedule.stable_diffusion(predicts=self.predicts, terminal_signal=self.terminal_signal)

    @property
    def cell(self) -> int:
        """Pixels in whose multiples the sides of pictures go through the network: 64 for sd1, 32 for tiny."""
        return self.vae.factor * 2 ** (len(self.unet.channel_mult) - 1)

    def size_note(self, sizes: Iterable[tuple[int, int]]) -> str:
        """A sentence on sizes (height, width), pixels, that the model was not made for; empty when there are none."""
        others = sorted({size for size in sizes if size != (self.image_size, self.image_size)})
        if not others:
            return ""
        told = first_few([f"{width} x {height}" for height, width in others])
        cut = any(side % self.cell for size in others for side in size)
        return (f"note: {told} px; the model was made for {self.image_size} x {self.image_size}, other sizes may look "
                f"worse{f' (made in multiples of {self.cell} and cut)' if cut else ''}")  # fmt: skip

    @property
    def negative_prompt(self) -> str:
        """What the unconditional pass reads by default.  The miniature has seen no caption about quality: nothing."""
        return STOCK_NEGATIVE_PROMPT if self.name == "sd1" else ""

    def to_json(self) -> str:
        """As it stands in the metadata of a weight file; `from_json` reads it back."""
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def from_json(text: str) -> ModelConfig:
        """Raises ValueError when the text does not describe a configuration of this version."""
        try:
            fields = parse_json(text)
            parts = {"unet": UNetConfig, "vae": VAEConfig, "text": TextConfig}
            return ModelConfig(**fields | {name: part(**fields[name]) for name, part in parts.items()})
        except (KeyError, TypeError, ArithmeticError, ValueError) as error:
            raise ValueError(f"not a model configuration ({type(error).__name__}: {error}): {text[:200]}") from error


def sd1_config() -> ModelConfig:
    """The paper's sizes: Stable Diffusion 1.x at 512 px."""
    return ModelConfig("sd1", UNetConfig(), VAEConfig(), TextConfig(), image_size=512)


def tiny_config() -> ModelConfig:
    """The built-in model: the same classes, small enough to train and sample on two CPU cores."""
    return ModelConfig(
        name="tiny",
        unet=UNetConfig(
            model_channels=64,  # wide at the finest level already, where fingers are
            channel_mult=(1, 1.5, 2, 1.5),
            attention_levels=(1, 2, 3),  # attention over the 1024 latents of the finest level would halve the speed
            num_heads=4,
            context_dim=128,
            norm_groups=8,
        ),
        vae=VAEConfig(channels=32, channel_mult=(1, 2, 4), num_res_blocks=1, norm_groups=8),
        text=TextConfig(width=128, heads=4, layers=3, quick_gelu=False),
        image_size=TINY_SIDE,
        num_inference_steps=10,  # as good as 20, measured like the next: docs/training.md
        guidance_scale=2.0,  # measured: see the table over guidance scales in docs/training.md
        predicts="v",  # trained from nothing, words and conditions act sooner than with eps: docs/training.md
        terminal_signal=0.01,  # so that a picture's mean colour is not read out of the noise: see NoiseSchedule
    )


PRESETS = dict(zip(PRESET_NAMES, (sd1_config, tiny_config), strict=True))
