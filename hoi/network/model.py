"""The paper's network on one screen or two.  latents + text + three condition images -> eps.  Paper: Sec. 3.3, Fig. 3.

Three condition encoders, one per condition image, are summed and enter Stable Diffusion's U-Net, level by level.
`HOIDiffusion.forward` is the f of eq. 1 and 3; `freeze_for_fine_tuning` says which of its weights learn.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hoi.common.choices import CONDITION_NAMES
from hoi.conditions import Conditions
from hoi.network.config import ModelConfig
from hoi.network.controlnet import ControlNet, HintEncoder
from hoi.network.text import TextEncoder
from hoi.network.unet import CachedContext, UNet
from hoi.network.vae import VAE


def stack_conditions(conditions: Sequence[Conditions | None], height: int, width: int) -> dict[str, Tensor]:
    """What the condition encoders take: skeleton, normal, segmentation, each (B, 3, H, W) float32 in [0, 1].

    conditions  of each picture; None is black, for scenery without hand or object (paper Sec. 4.1)
    """
    return to_floats(stack_pictures(conditions, height, width))


def stack_pictures(conditions: Sequence[Conditions | None], height: int, width: int) -> dict[str, Tensor]:
    """The same as the pictures have it, uint8, a quarter of the bytes; channels-last in memory."""
    black = np.zeros((height, width, 3), dtype=np.uint8)
    pictures = {name: np.stack([black if each is None else getattr(each, name) for each in conditions])
                for name in CONDITION_NAMES}  # fmt: skip
    return {name: torch.from_numpy(stacked).movedim(-1, 1) for name, stacked in pictures.items()}


def to_floats(
    pictures: Mapping[str, Tensor], layout: torch.memory_format = torch.contiguous_format
) -> dict[str, Tensor]:
    """Pictures of `stack_pictures`, on any device, as the condition encoders take them; layout: in memory."""
    return {name: stacked.contiguous(memory_format=layout).float() / 255 for name, stacked in pictures.items()}


class ConditionBlock(nn.Module):
    """x + conv1x1(ReLU(conv3x3(x))), after an optional halving (`down`) and change of width."""

    def __init__(self, width_in: int, width_out: int, down: bool) -> None:
        super().__init__()
        self.down = down
        # Names and shapes are T2I-Adapter's and the official release's, so their weights load as they are.
        self.in_conv = nn.Conv2d(width_in, width_out, 1) if width_in != width_out else nn.Identity()
        self.block1 = nn.Conv2d(width_out, width_out, 3, padding=1)
        self.block2 = nn.Conv2d(width_out, width_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, width_in, h, w) -> (B, width_out, h, w), or half the size with `down`."""
        x = self.in_conv(F.avg_pool2d(x, 2) if self.down else x)  # halved by averages, as in the release
        return x + self.block2(F.relu(self.block1(x)))


class ConditionEncoder(nn.Module):
    """One condition image -> one feature map per U-Net level.  A T2I-Adapter (Mou et al. 2023); paper Sec. 3.3.

    widths     channels of the U-Net's levels, finest first
    unshuffle  f, the VAE's factor: f x f pixels become the channels of one latent pixel, so nothing is averaged away
    """

    def __init__(self, widths: Sequence[int], unshuffle: int) -> None:
        super().__init__()
        self.unshuffle = unshuffle
        self.conv_in = nn.Conv2d(3 * unshuffle**2, widths[0], 3, padding=1)  # 192 channels in at SD's size
        self.body = nn.ModuleList()  # two blocks a level, the first of which changes size and width
        for level, width in enumerate(widths):
            self.body.append(ConditionBlock(widths[max(level - 1, 0)], width, down=level > 0))
            self.body.append(ConditionBlock(width, width, down=False))

    def forward(self, image: Tensor) -> list[Tensor]:
        """image (B, 3, H, W) in [0, 1] -> maps (B, widths[k], H / f / 2^k, W / f / 2^k), one per level k."""
        x = self.conv_in(F.pixel_unshuffle(image.to(self.conv_in.weight.dtype), self.unshuffle))
        features = []
        for first, second in zip(self.body[::2], self.body[1::2], strict=True):
            x = second(first(x))
            features.append(x)
        return features


class ConditionEncoders(nn.ModuleDict):
    """The weighted sum of the three encoders, level by level: the paper's way of combining geometry (Sec. 3.3)."""

    def __init__(self, widths: Sequence[int], unshuffle: int) -> None:
        super().__init__({name: ConditionEncoder(widths, unshuffle) for name in CONDITION_NAMES})

    def forward(
        self, conditions: Mapping[str, Tensor], weights: Sequence[float | Tensor] = (1.0, 1.0, 1.0)
    ) -> list[Tensor]:
        """Condition images (B, 3, H, W) in [0, 1], by name -> cond_features, one map per U-Net level.

        weights   of skeleton, normal, segmentation: numbers, or (B, 1, 1, 1) each, one a picture
        Black images, as of the regularisation in eq. 3, do not give zero features: the convolutions have biases.
        """
        features = [self[name](conditions[name]) for name in CONDITION_NAMES]
        return [
            sum(weight * feature for weight, feature in zip(weights, level, strict=True))
            for level in zip(*features, strict=True)  # three lists of four maps -> four levels of three maps
        ]


class HOIDiffusion(nn.Module):
    """U-Net, VAE, text encoder and, unless it is a base model, the three condition encoders.

    condition_encoders  None for a base model: text alone.  Of the ControlNet baseline, whose other part is
                        `unet.control`, the hint's encoder
    metadata            of the file it was loaded from: stage, step, training command, ...; empty for a fresh model
    """

    def __init__(self, config: ModelConfig, with_conditions: bool = True, controlnet: bool = False) -> None:
        super().__init__()
        self.config = config
        self.metadata: dict[str, str] = {}
        self.unet = UNet(config.unet)
        self.vae = VAE(config.vae)
        self.text_encoder = TextEncoder(config.text)
        self.condition_encoders: ConditionEncoders | HintEncoder | None = None
        if with_conditions:
            self.add_condition_encoders(controlnet)

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        context: Tensor | CachedContext,
        conditions: Mapping[str, Tensor] | None = None,
        condition_weights: Sequence[float | Tensor] = (1.0, 1.0, 1.0),
    ) -> Tensor:
        """Eq. 1, eps = f(x_t, t, text), and with conditions the f(x_t, t, [s, m, n]) of Sec. 3.3 and eq. 3.

        latents     (B, 4, h, w)  noisy
        timesteps   (B,)          int, 0 cleanest
        context     (B, 77, C)    of the text encoder
        conditions  skeleton, normal, segmentation by name, each (B, 3, H, W) in [0, 1]; None: text alone
        condition_weights         of the three: see ConditionEncoders
        returns     (B, 4, h, w)  eps (or v: see NoiseSchedule.predicts)
        Raises ValueError when conditions are given to a base model, or a shape does not fit.

        Training calls this; samplers call the two parts, since the features of a picture serve all of its steps.
        """
        if conditions is None:
            return self.unet(latents, timesteps, context)
        if self.condition_encoders is None:
            raise ValueError("this is a base model without condition encoders; see add_condition_encoders")
        return self.unet(latents, timesteps, context, self.condition_encoders(conditions, condition_weights))

    def add_condition_encoders(self, controlnet: bool = False) -> None:
        """Fresh, untrained condition encoders on top of a base model: the start of fine-tuning (Sec. 3.3).

        controlnet   a ControlNet in their place, which starts as a copy of the U-Net and adds nothing yet (Sec. 4.2)
        Raises ValueError when there are some.
        """
        if self.condition_encoders is not None:
            raise ValueError("this model already has condition encoders; adding fresh ones would discard them")
        like, factor = self.unet.out[2].weight, self.config.vae.factor  # same device and dtype
        if controlnet:
            self.unet.control = ControlNet(self.unet).to(like)
            self.condition_encoders = HintEncoder(self.config.unet.model_channels, factor).to(like)
        else:
            self.condition_encoders = ConditionEncoders(self.config.unet.level_widths, factor).to(like)

    def freeze_for_fine_tuning(
        self, conditions: Sequence[str] = CONDITION_NAMES, decoder: bool = True
    ) -> list[nn.Parameter]:
        """Freeze all but the condition encoders and the U-Net's decoder, as in Sec. 3.3; returns what still trains.

        conditions   whose encoders train.  The others are dropped (Table 4's ablation): their weights become zero and
                     stay so, and an encoder of zeros adds nothing to the features, whatever picture it is shown.  None
                     of them, for a model without encoders: text alone, the fine-tuned latent diffusion baseline
        decoder      False: the U-Net stays as it is, only encoders learn
        Of a ControlNet hint encoder and copy train, and nothing else.
        Raises ValueError when conditions are named and there are no encoders.
        """
        if self.condition_encoders is None and conditions:
            raise ValueError("fine-tuning needs condition encoders; call add_condition_encoders first")
        self.requires_grad_(False)
        if self.unet.control is not None:
            trained, encoders = [*self.unet.control.parameters(), *self.condition_encoders.parameters()], {}
        else:
            trained, encoders = self.unet.decoder_parameters() if decoder else [], self.condition_encoders or {}
        for name, encoder in encoders.items():
            if name in conditions:
                trained += encoder.parameters()
            else:
                for parameter in encoder.parameters():
                    parameter.zero_()
        for parameter in trained:
            parameter.requires_grad_(True)
        return trained

    def set_scaling_factor(self, scaling_factor: float) -> None:
        """Adopt the latent scaling measured after the VAE was trained (training/data.py: measured_scaling_factor)."""
        vae_config = dataclasses.replace(self.config.vae, scaling_factor=scaling_factor)
        self.config = dataclasses.replace(self.config, vae=vae_config)
        self.vae.config = vae_config
