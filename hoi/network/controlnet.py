"""ControlNet, the paper's strongest baseline.  latents, text, three condition images -> residuals.  Paper: Sec. 4.2.

Zhang et al. 2023: a trainable copy of the U-Net's encoder and middle block sees the conditions; all that it leaves goes
through convolutions that start at zero and is added to what the frozen original leaves.  As the paper has it, "with
same multiple condition input": the three images together, 9 channels, are its hint.

The copy depends on latents and timestep and is `UNet.control`; the hint does not, so its encoder stands where the
condition encoders stand, and what it gives is made once a geometry.  Names are those of the published single file.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from hoi.common.choices import CONDITION_NAMES
from hoi.network.unet import Anchor, CachedContext, UNet, UNetEncoder, zero_init

HINT_WIDTHS = (16, 32, 96, 256)  # from one to the next the size is halved: thrice for Stable Diffusion's VAE


class HintEncoder(nn.Sequential):
    """The condition images at the size of the latents, by convolutions: eight of them for a factor of 8.

    width    of the U-Net's first feature map
    factor   the VAE's, 2, 4 or 8
    """

    def __init__(self, width: int, factor: int) -> None:
        widths = HINT_WIDTHS[: factor.bit_length()]
        layers = [nn.Conv2d(3 * len(CONDITION_NAMES), widths[0], 3, padding=1)]
        for finer, coarser in itertools.pairwise(widths):
            layers += [nn.Conv2d(finer, finer, 3, padding=1), nn.Conv2d(finer, coarser, 3, stride=2, padding=1)]
        activated = [each for layer in layers for each in (layer, nn.SiLU())]
        super().__init__(*activated, zero_init(nn.Conv2d(widths[-1], width, 3, padding=1)))

    def forward(
        self, conditions: Mapping[str, Tensor], weights: Sequence[float | Tensor] = (1.0, 1.0, 1.0)
    ) -> list[Tensor]:
        """Condition images (B, 3, H, W) in [0, 1], by name -> hint (B, C, H / f, W / f) and scale (B, 1, 1, 1).

        weights   of the conditions, equal: the scale of the ControlNet's residuals
        Raises ValueError as `scale_of` does.
        """
        images = torch.cat([conditions[name] for name in CONDITION_NAMES], dim=1)  # (B, 9, H, W)
        hint = super().forward(images.to(self[0].weight.dtype))
        return [hint, hint.new_full((len(hint), 1, 1, 1), self.scale_of(weights))]

    @staticmethod
    def scale_of(weights: Sequence[float | Tensor]) -> float:
        """The one weight of all conditions.  Raises ValueError when they differ: they enter together."""
        if len(set(weights)) != 1:
            raise ValueError(f"a ControlNet sees the conditions together, so they share one weight, not {weights}: "
                             "give --cond-scale all=WEIGHT")  # fmt: skip
        return weights[0]


class ControlNet(UNetEncoder):
    """The copy of a U-Net's encoder and middle block, behind each block a 1x1 convolution that starts at zero."""

    def __init__(self, unet: UNet) -> None:
        super().__init__(unet.config)
        original = unet.state_dict()
        self.load_state_dict({name: original[name] for name in self.state_dict()})
        self.zero_convs = nn.ModuleList([_zero_conv(width) for width in self.skip_widths])
        self.middle_block_out = _zero_conv(self.skip_widths[-1])

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        context: Tensor | CachedContext,
        hint: Tensor,
        anchor: Anchor | None = None,
    ) -> list[Tensor]:
        """What is added to each skip connection and, last, to the middle block's result, in the shapes of these.

        hint      (B'', C, h, w), B' a multiple of B''; the others are those of UNetEncoder.encode
        """
        kept, _ = self.encode(latents, timesteps, context, {0: hint}, anchor)
        return [conv(each) for conv, each in zip([*self.zero_convs, self.middle_block_out], kept, strict=True)]


def _zero_conv(width: int) -> nn.Sequential:
    return nn.Sequential(zero_init(nn.Conv2d(width, width, 1)))  # a sequence of one, as its published name has it
