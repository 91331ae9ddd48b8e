"""Softmax attention, by whichever kernel is fastest.  query, key, value -> attended values.

Source: Vaswani et al. 2017, "Attention Is All You Need", eq. 1.
"""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from hoi.network.packing import multiply_transposed

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
