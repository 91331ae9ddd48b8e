"""Attention that does nothing, for levels where diffusers' U-Net needs one and ours has none.  UNetConfig -> tensors.

diffusers adds condition features to the main path and the skip connection, as the paper does, only in a down block with
attention (or in the last level).  A level without gets a transformer whose last layer is zero: x + 0, to the bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hoi.network.unet import SpatialTransformer, UNetConfig

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
