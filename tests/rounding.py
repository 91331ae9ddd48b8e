"""How far apart rounding alone may leave two right results of one computation, from their dtype and size."""

import torch

UNET_OPERATIONS = 250  # of a small U-Net in these tests: 25 blocks in a row, about ten operations in each


def rounding(expected: torch.Tensor, operations: int) -> float:
    """The largest difference that another processor, batch size or order of summation may make.

    expected    any shape; its dtype says how far apart two neighbouring numbers are
    operations  layers and sums in a row between the inputs and the result
    returns     an absolute tolerance: each operation may move a value by one last place of the largest one
    """
    return operations * torch.finfo(expected.dtype).eps * expected.abs().max().item()
