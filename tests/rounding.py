"""How far apart rounding alone may leave two right results of one computation, from their dtype and size."""

import torch

from hoi.network.unet import UNet


def rounding(expected: torch.Tensor, operations: int, dtype: torch.dtype = torch.float32) -> float:
    """The largest difference that another processor, batch size or order of summation may make.

    expected    any shape
    operations  layers and sums in a row between the inputs and the result
    dtype       what was computed in; it says how far apart two neighbouring numbers are
    returns     an absolute tolerance: each operation may move a value by one last place of the largest one
    """
    return operations * torch.finfo(dtype).eps * expected.abs().max().item()


def unet_operations(unet: UNet) -> int:
    """About ten operations in a row for each of the U-Net's blocks."""
    return 10 * (len(unet.input_blocks) + 1 + len(unet.output_blocks))
