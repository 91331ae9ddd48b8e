"""Attention and convolutions by the fastest CPU kernel; plain PyTorch elsewhere, with the same results.

Upper half: trained layers -> the same layers for evaluation only, their weights in the order in which oneDNN reads
them.  PyTorch keeps weights as they are trained and lays them out anew in every call; `pack` does it once.  The
operators are PyTorch's own but private (its compiler emits them), so everything has a plain fall-back.  Wide 3x3
convolutions in float32 take a quarter of the multiplications, by Winograd's products, where that is faster: like
attention's ways, it is measured on the first picture.

Lower half: query, key, value -> attended values.  Source: Vaswani et al. 2017, "Attention Is All You Need", eq. 1.

HOI_KERNELS=plain in the environment leaves everything to PyTorch's own layers.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import timeit
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hoi.common.files import read_json, short_hash, user_cache, write_json
from hoi.common.machine import available_memory, processor

PLAIN = os.environ.get("HOI_KERNELS") == "plain"


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
        self.winograd: WinogradConv2d | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C_in, h, w) -> (B, C_out, h', w'), channels-last."""
        if not self.is_packed:
            self.is_packed, plain = True, self.weight
            winograd = WinogradConv2d(plain, self.bias) if suits_winograd(self, x) else None
            sizes = (*self.placement, list(x.shape))
            self.weight = torch.ops.mkldnn._reorder_convolution_weight(plain, *sizes)
            part = x[:1, :, :MEASURED_SIDE, :MEASURED_SIDE]
            if winograd and is_faster(f"Winograd, {[*plain.shape[:2]]}, {[*part.shape[2:]]}", winograd, self, part):
                self.weight, self.winograd = plain, winograd
        if self.winograd is not None:
            whole = x.shape[2] % 4 == x.shape[3] % 4 == 0
            return self.winograd(x) if whole else F.conv2d(x, self.weight, self.bias, padding=1)
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


# Lavin and Gray 2016, F(4x4, 3x3) with the points 0, 1, -1, 2, -2: a tile of 6x6 pixels, the window of 3x3 weights, a
# tile of 4x4 results.
TILE = [[4.0, 0, -5, 0, 1, 0], [0, -4, -4, 1, 1, 0], [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0], [0, 2, -1, -2, 1, 0], [0, 4, 0, -5, 0, 1]]  # fmt: skip
WINDOW = [[1 / 4, 0, 0], [-1 / 6, -1 / 6, -1 / 6], [-1 / 6, 1 / 6, -1 / 6],
          [1 / 24, 1 / 12, 1 / 6], [1 / 24, -1 / 12, 1 / 6], [0, 0, 1]]  # fmt: skip
RESULT = [[1.0, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]]
LEAST_CHANNELS, LEAST_SIDE = 128, 32  # below, turning tiles takes what products save, or the weights too much memory
MEASURED_SIDE = 64  # pixels that show which way is faster: both need as much time a pixel in larger pictures
TILES_AT_ONCE = 256  # 12 MB over 320 channels: they stay in the cache
FREE_MEMORY = 4 << 30  # bytes; all weights of Stable Diffusion's U-Net and VAE that this is for take 1.6 GB


def suits_winograd(conv: PackedConv2d, x: Tensor) -> bool:
    """Whether WinogradConv2d can take the place of a convolution there, may gain by it, and has the memory."""
    is_plain = conv.placement == ([1, 1], [1, 1], [1, 1], 1) and conv.weight.shape[2:] == (3, 3)
    is_large = min(conv.weight.shape[:2]) >= LEAST_CHANNELS and min(x.shape[2:]) >= LEAST_SIDE
    fits = x.dtype == torch.float32 and conv.bias is not None and not any(side % 4 for side in x.shape[2:])
    return is_plain and is_large and fits and available_memory() > FREE_MEMORY


class WinogradConv2d(nn.Module):
    """A 3x3 convolution in float32 by 36 products a tile of 4x4 pixels instead of 144, that can only be evaluated.

    Errors are about 5e-5 of the result's deviation, against 1e-6: fewer multiplications, of larger numbers.
    """

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        window, self.bias = torch.tensor(WINDOW), bias
        self.weight = torch.einsum("ar,bs,ocrs->abco", window, window, weight).flatten(0, 1)  # (36, C_in, C_out)
        self.turn, self.back = (torch.kron(part, part) for part in (torch.tensor(TILE), torch.tensor(RESULT)))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C_in, h, w) -> (B, C_out, h, w), channels-last; h and w multiples of 4."""
        batch, _, height, width = x.shape
        pixels = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))  # (B, h + 2, w + 2, C_in)
        result = x.new_empty(batch, height, width, len(self.bias))
        rows = max(1, 4 * TILES_AT_ONCE // width) * 4  # of pixels
        for k, top in itertools.product(range(batch), range(0, height, rows)):
            part = pixels[k, top : top + rows + 2].unfold(0, 6, 4).unfold(1, 6, 4)  # (r, c, C_in, 6, 6)
            tiles = (self.turn @ part.permute(3, 4, 0, 1, 2).reshape(36, -1)).view(36, -1, x.shape[1])
            made = self.back @ torch.bmm(tiles, self.weight).view(36, -1)  # (16, r c C_out)
            place = result[k, top : top + rows].view(-1, 4, width // 4, 4, len(self.bias))
            place.copy_(made.view(4, 4, *part.shape[:2], -1).permute(2, 0, 3, 1, 4))
        return result.add_(self.bias).permute(0, 3, 1, 2)


FORMS = {nn.Linear: PackedLinear, nn.Conv2d: PackedConv2d, Upsample: PackedUpsample}


@functools.cache
def can_pack(dtype: torch.dtype) -> bool:
    """Whether the private operators exist here, take this dtype and compute what the plain ones do."""
    if PLAIN or dtype not in (torch.float32, torch.bfloat16):
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
    if form is PackedLinear and torch.backends.cpu.get_cpu_capability() == "AVX2":
        return layer  # oneDNN reaches 0.8 to 0.9 of the speed of MKL, which serves plain layers
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


@functools.cache
def measured_here() -> tuple[Path, dict[str, bool]]:
    """The file with what was measured on this kind of processor, in the user's cache, and its content."""
    path = user_cache() / "kernels" / f"{short_hash(processor())}.json"
    try:
        return path, read_json(path, "list of measured kernels")
    except (OSError, ValueError):  # none yet, or damaged
        return path, {}


def is_faster(what: str, ours: Callable[..., Tensor], theirs: Callable[..., Tensor], *values: Tensor) -> bool:
    """Whether ours(*values) takes less time than theirs here, measured once a processor and kind of work (`what`).

    Kept on disk, since a choice made anew in every run could change the last digits of its pictures.
    """
    path, measured = measured_here()
    what = f"{what}, {torch.get_num_threads()} threads"
    if what not in measured:
        seconds = [min(timeit.repeat(lambda run=run: run(*values), number=1, repeat=3)) for run in (ours, theirs)]
        measured[what] = seconds[0] < seconds[1]
        with suppress(OSError):  # measured again next time
            write_json(path, measured)
    return measured[what]


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The same as plain_attention, by the fastest way.

    On many CPUs torch's flash attention reaches a third of the speed of matrix products (over 4096 tokens, 8 heads of
    40, batch 2, Zen 5: 0.26 s against 0.10 in bf16 and 0.17 in fp32), and with gradient in bf16 needs twice the time of
    plain products (batch 1: 0.45 s against 0.22); so slices where no gradient is wanted and they are faster, and in
    bf16 plain products as long as the scores can be kept.
    """
    scores = query.shape[2] * key.shape[2]
    if query.device.type == "cpu" and not PLAIN:
        if scores >= MIN_SLICED_SCORES and not any(x.requires_grad for x in (query, key, value)):
            what = f"slices, {query.dtype}, {[*query.shape[1:]]} by {key.shape[2]}"
            first = query[:1], key[:1], value[:1]
            if is_faster(what, sliced_attention, F.scaled_dot_product_attention, *first):
                return sliced_attention(query, key, value)
        elif query.shape[:2].numel() * scores <= MAX_PLAIN_SCORES and query.dtype == torch.bfloat16:
            return plain_attention(query, key, value)
    return F.scaled_dot_product_attention(query, key, value)
