"""Attention and convolutions by the fastest CPU kernel; plain PyTorch elsewhere, with the same results.

Upper half: trained layers -> the same layers for evaluation only, their weights in the order in which oneDNN reads
them.  PyTorch keeps weights as they are trained and lays them out anew in every call; `pack` does it once.  The
operators are PyTorch's own but private (its compiler emits them), so everything has a plain fall-back.

Lower half: query, key, value -> attended values.  Source: Vaswani et al. 2017, "Attention Is All You Need", eq. 1.
"""

from __future__ import annotations

import functools
import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PackedLinear(nn.Module):
    """An nn.Linear that can only be evaluated."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        # Plain attributes: a packed weight can be neither saved nor trained nor cast.
        self.weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach())
        self.bias = None if layer.bias is None else layer.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """x (..., C_in) -> (..., C_out)."""
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


class PackedConv2d(nn.Module):
    """An nn.Conv2d that can only be evaluated.

    The first picture decides the layout.  Others are right too, but a layout for the wrong size can be slow: one made
    without a size took 1.9 ms where 0.1 would do, for 96 channels of 4x4 pixels.
    """

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        self.placement = (list(layer.padding), list(layer.stride), list(layer.dilation), layer.groups)
        self.weight, self.is_packed = layer.weight.detach(), False
        self.bias = None if layer.bias is None else layer.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C_in, h, w) -> (B, C_out, h', w'), channels-last."""
        if not self.is_packed:
            sizes = (*self.placement, list(x.shape))
            self.weight, self.is_packed = torch.ops.mkldnn._reorder_convolution_weight(self.weight, *sizes), True
        return torch.ops.mkldnn._convolution_pointwise(x, self.weight, self.bias, *self.placement, "none", [], "")


class Upsample(nn.Module):
    """Every pixel four times, then a 3x3 convolution.  Plain; it trains."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, h, w) -> (B, C, 2h, 2w)."""
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class PackedUpsample(nn.Module):
    """An Upsample that can only be evaluated, with 4/9 of the multiplications.

    A 3x3 window over repeated pixels sees only 2x2 different ones; which weights meet on one of them depends on whether
    the window's row and column are even or odd.  So one 2x2 convolution makes four kinds of pixels, which interleave.
    """

    def __init__(self, layer: Upsample) -> None:
        super().__init__()
        conv = layer.conv
        # even and odd (a, b), row and column of the 2x2 window (p, q), of the 3x3 window (r, c)
        sums = torch.tensor([[[1.0, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]])
        weight = torch.einsum("apr,bqc,oirc->aboipq", sums, sums, conv.weight.detach().float())
        kinds = nn.utils.skip_init(nn.Conv2d, conv.in_channels, 4 * conv.out_channels, 2, padding=1)
        kinds.weight.data = weight.flatten(0, 2).to(conv.weight.dtype)
        kinds.bias.data = conv.bias.detach().repeat(4)
        self.kinds = PackedConv2d(kinds)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, h, w) -> (B, C, 2h, 2w), channels-last."""
        batch, _, height, width = x.shape
        kinds = self.kinds(x).unflatten(1, (2, 2, -1))  # (B, 2, 2, C, h + 1, w + 1)
        shape = batch, kinds.shape[3], 2 * height, 2 * width
        result = torch.empty(shape, dtype=x.dtype, memory_format=torch.channels_last)
        for a, b in itertools.product((0, 1), repeat=2):
            result[:, :, a::2, b::2] = kinds[:, a, b, :, a : a + height, b : b + width]
        return result


FORMS = {nn.Linear: PackedLinear, nn.Conv2d: PackedConv2d, Upsample: PackedUpsample}


@functools.cache
def can_pack(dtype: torch.dtype) -> bool:
    """Whether the private operators exist here, take this dtype and compute what the plain ones do."""
    if dtype not in (torch.float32, torch.bfloat16):
        return False
    values = torch.linspace(-1, 1, 16 * 16).to(dtype).view(16, 16)
    linear, conv = nn.Linear(16, 16, bias=False), nn.Conv2d(1, 16, 4, bias=False)
    linear.weight.data, conv.weight.data = values, values.view(16, 1, 4, 4)
    try:
        packed = PackedLinear(linear)(values), PackedConv2d(conv)(values.view(16, 1, 4, 4)).flatten(1)
    except (AttributeError, RuntimeError, TypeError):  # renamed or absent, not for this machine, other arguments
        return False
    return all(torch.allclose(result, F.linear(values, values), rtol=0.02, atol=0.02) for result in packed)


def packed(layer: nn.Module) -> nn.Module:
    """The packed form of one layer, or the layer itself where there is none."""
    form = FORMS.get(type(layer))  # exact types: a subclass may be used by its weight instead of by its forward
    if form is None or not all(p.device.type == "cpu" and can_pack(p.dtype) for p in layer.parameters()):
        return layer
    if form is PackedConv2d and max(layer.kernel_size) == 1:
        return layer  # gains nothing
    return form(layer)


def pack(module: nn.Module) -> nn.Module:
    """Replace the linear layers and convolutions inside a module by packed ones, in place, and return the module.

    Only for evaluation on a CPU, after the last change of dtype: packed weights are in no state_dict and have no
    gradient.  A layer for which there is no packed form (device, dtype, PyTorch's version) stays as it is.
    """
    for name, layer in list(module.named_children()):
        form = packed(layer)
        if form is layer:
            pack(layer)
        else:
            setattr(module, name, form)
    return module


def multiply_transposed(a: Tensor, b: Tensor) -> Tensor:
    """a @ b.T by oneDNN, which beats PyTorch's choice in float32 on some CPUs by two.  (N,K), (M,K) -> (N,M).

    Without gradient.
    """
    if a.device.type == "cpu" and can_pack(a.dtype):
        # Contiguous, because oneDNN computes with a strided second factor a hundred times slower.
        return torch.ops.mkldnn._linear_pointwise(a, b.contiguous(), None, "none", [], "")
    return a @ b.T


# Numbers of scores (queries x keys), measured on CPUs at Stable Diffusion's sizes.
MAX_PLAIN_SCORES = 2**28  # of all heads and pictures: half a GB in bf16, kept until backward
MIN_SLICED_SCORES = 2**18  # of a head: fewer are not worth a loop
SLICE_SCORES = 2**21  # worked on together: 4 MB in bf16, about a core's share of the cache


def plain_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v.  query (B, heads, N, d), key and value (B, heads, M, d) -> (B, heads, N, d)."""
    scores = (query * query.shape[3] ** -0.5) @ key.transpose(2, 3)  # (B, heads, N, M)
    return scores.softmax(dim=3) @ value


def sliced_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """plain_attention without gradient: one head and some queries at a time, so that their scores stay in the cache.

    Half of the time would go into the softmax.  So no maximum is subtracted before the exponential, 2^x for e^x, and
    the sums to divide by come out of the product with the values, to which rows of ones are added.  Should a sum leave
    the range in which that is exact (scores beyond 69, or all below -40), torch's attention takes over.
    """
    width, rows = query.shape[3], max(1, SLICE_SCORES // key.shape[2])
    queries, keys = (query * (math.log2(math.e) * width**-0.5)).contiguous(), key.contiguous()
    values = F.pad(value.transpose(2, 3), (0, 0, 0, 16 - width % 16), value=1.0)  # (B, heads, d + some, M)
    sums = query.new_empty(*query.shape[:3], values.shape[2])
    for head in itertools.product(range(query.shape[0]), range(query.shape[1])):
        for part, result in zip(queries[head].split(rows), sums[head].split(rows), strict=True):
            weights = multiply_transposed(part, keys[head]).exp2_()  # (rows, M)
            result.copy_(multiply_transposed(weights, values[head]))
    totals = sums[..., width : width + 1]
    if not (totals.min() > 2.0**-60 and totals.max() < 2.0**100):
        return F.scaled_dot_product_attention(query, key, value)
    return sums[..., :width] / totals


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The same as plain_attention, by the fastest way.

    On a CPU torch's flash attention reaches a third of the speed of matrix products (over 4096 tokens, 8 heads of 40,
    batch 2: 0.26 s against 0.10 in bf16 and 0.17 in fp32), and with gradient in bf16 needs twice the time of plain
    products (batch 1: 0.45 s against 0.22); so slices where no gradient is wanted, and in bf16 plain products as long
    as the scores can be kept.
    """
    scores = query.shape[2] * key.shape[2]
    if query.device.type == "cpu":
        if scores >= MIN_SLICED_SCORES and not any(x.requires_grad for x in (query, key, value)):
            return sliced_attention(query, key, value)
        if query.shape[:2].numel() * scores <= MAX_PLAIN_SCORES and query.dtype == torch.bfloat16:
            return plain_attention(query, key, value)
    return F.scaled_dot_product_attention(query, key, value)
