"""The denoising U-Net.  latents, timesteps, context, condition features -> eps.  Paper: Sec. 3.1, 3.3, 4.4 (anchor).

From small to large: attention and its transformer, the residual block, a numbered block of these, the half of the U-Net
that a ControlNet copies, the U-Net.  Maps are (B, C, h, w), tokens (B, N, C) with N = h w.  Architecture: Rombach et
al. 2022.  Module names follow the single-file Stable Diffusion 1.x checkpoint, so its weights load by stripping a
prefix; the `nn.Identity` layers keep their numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hoi.network.kernels import Upsample, attend


@dataclass(frozen=True)
class UNetConfig:
    """Sizes of the U-Net; the defaults are Stable Diffusion 1.x."""

    in_channels: int = 4
    out_channels: int = 4
    model_channels: int = 320
    channel_mult: tuple[float, ...] = (1, 2, 4, 4)  # each level's width over model_channels
    num_res_blocks: int = 2  # a level on the way down; one more on the way up
    attention_levels: tuple[int, ...] = (0, 1, 2)  # levels with transformers; the middle block always has one
    num_heads: int = 8
    context_dim: int = 768
    norm_groups: int = 32  # of every group norm; narrow networks need fewer, or a group is a single channel

    def __post_init__(self) -> None:
        # JSON gives lists back; tuples keep the configuration hashable and comparable.
        object.__setattr__(self, "channel_mult", tuple(self.channel_mult))
        object.__setattr__(self, "attention_levels", tuple(self.attention_levels))
        if any(abs(self.model_channels * mult - width) > 1e-6
               for mult, width in zip(self.channel_mult, self.level_widths, strict=True)):  # fmt: skip
            raise ValueError(f"U-Net: {self.model_channels} channels times {self.channel_mult} must be whole numbers")
        for width in self.level_widths:
            if width % self.norm_groups or width % self.num_heads:
                raise ValueError(
                    f"U-Net level width {width} must be a multiple of {self.norm_groups} (norm groups)"
                    f" and {self.num_heads} (heads)"
                )

    @property
    def level_widths(self) -> tuple[int, ...]:
        """Channels of every level, finest first; also the widths of the condition features."""
        return tuple(round(self.model_channels * mult) for mult in self.channel_mult)  # 352 * (480 / 352) is 479.99...

    @property
    def embedding_width(self) -> int:
        """Channels of the time embedding."""
        return 4 * self.model_channels


@dataclass(frozen=True)
class CachedContext:
    """Keys and values of every cross-attention for one text context: they depend on neither step nor latents.

    keys, values   per cross-attention (B, heads, 77, head width), in the order in which the modules are registered
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    def __len__(self) -> int:
        """The batch B, as of the context itself."""
        return len(self.keys[0])


@dataclass(frozen=True)
class Anchor:
    """The video frame that all frames of a batch look at beside themselves (Sec. 4.4).

    index   of the anchor among the frames
    frames  F: a batch is F frames, or under guidance twice F, each half with its own anchor
    """

    index: int
    frames: int

    def joined(self, tokens: Tensor) -> Tensor:
        """Keys or values of each frame followed by its anchor's.  (B, heads, N, d) -> (B, heads, 2 N, d)."""
        halves = tokens.unflatten(0, (-1, self.frames))  # (1 or 2, F, heads, N, d)
        anchor = halves[:, self.index, None].expand_as(halves)
        return torch.cat([halves, anchor], dim=3).flatten(0, 1)


def timestep_embedding(timesteps: Tensor, width: int) -> Tensor:
    """Sinusoids (Vaswani et al. 2017), cosines first as in SD 1.x.  timesteps (B,) -> (B, width) float32."""
    # Wave lengths from 2 pi to nearly 20,000 pi timesteps, evenly in their logarithm.
    half = width // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=timesteps.device) / half)
    angles = timesteps.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def repeat(x: Tensor, batch: int) -> Tensor:
    """x (B', ...) as often as it takes to a batch of B, a multiple of B': 0 1 -> 0 1 0 1."""
    return x if len(x) == batch else x.repeat(batch // len(x), *[1] * (x.ndim - 1))


def tile(feature: Tensor, h: Tensor) -> Tensor:
    """Repeat a condition feature over the batch of h (B, C, h, w): under guidance both halves, uncond and cond, get it.

    Raises ValueError when it does not fit.
    """
    if h.shape[0] % feature.shape[0] or feature.shape[1:] != h.shape[1:]:
        raise ValueError(
            f"a condition feature is {tuple(feature.shape)} where the U-Net has {tuple(h.shape)};"
            " channels, height and width must agree and the batches must be multiples"
        )
    return repeat(feature.to(h.dtype), len(h))


def zero_init(layer: nn.Conv2d) -> nn.Conv2d:
    """Residual branches and the output start at zero, so that training begins from the identity (as in SD 1.x)."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class Attention(nn.Module):
    """Multi-head attention of tokens to themselves, or to the text where a context is given."""

    def __init__(self, width: int, num_heads: int, context_dim: int | None = None) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.cache_index: int | None = None  # place in CachedContext, set by UNet.cache_context
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context_dim or width, width, bias=False)
        self.to_v = nn.Linear(context_dim or width, width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(width, width), nn.Identity())  # SD keeps a dropout at index 1

    def split_heads(self, tokens: Tensor) -> Tensor:
        """Each head's share of the channels, as `attend` wants it."""
        return tokens.unflatten(2, (self.num_heads, -1)).transpose(1, 2)  # (B, N, C) -> (B, heads, N, d)

    def keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """What is looked at: context (B, M, C') -> keys and values, each (B, heads, M, d)."""
        return self.split_heads(self.to_k(context)), self.split_heads(self.to_v(context))

    def forward(
        self, tokens: Tensor, context: Tensor | CachedContext | None = None, anchor: Anchor | None = None
    ) -> Tensor:
        """tokens (B, N, C) -> (B, N, C).

        context   (B, 77, C') or cached; None: self-attention
        anchor    the frame whose keys and values self-attention sees beside its own; None: no video
        """
        if isinstance(context, CachedContext):
            key, value = context.keys[self.cache_index], context.values[self.cache_index]
        else:
            key, value = self.keys_values(tokens if context is None else context)
        if anchor is not None:
            key, value = anchor.joined(key), anchor.joined(value)
        attended = attend(self.split_heads(self.to_q(tokens)), key, value)
        return self.to_out(attended.transpose(1, 2).flatten(2))


class GEGLU(nn.Module):
    """Gated exact GELU: first half value, second half gate.  Source: Shazeer 2020, "GLU Variants"."""

    def __init__(self, width: int, inner_width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * inner_width)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, N, C) -> (B, N, inner_width)."""
        value, gate = self.proj(tokens).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """Each token for itself, four times as wide inside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width))

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, N, C) -> (B, N, C)."""
        return self.net(tokens)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward; each on a normalised residual branch."""

    def __init__(self, width: int, num_heads: int, context_dim: int) -> None:
        super().__init__()
        # In the order of the original trainer's file; forward has another.
        self.attn1 = Attention(width, num_heads)
        self.ff = FeedForward(width)
        self.attn2 = Attention(width, num_heads, context_dim)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, tokens: Tensor, context: Tensor | CachedContext, anchor: Anchor | None = None) -> Tensor:
        """tokens (B', N, C) -> (B, N, C), B the context's batch, a multiple of B'."""
        tokens = tokens + self.attn1(self.norm1(tokens), anchor=anchor)
        tokens = repeat(tokens, len(context))  # the halves of a guided batch are equal until they meet their texts
        tokens = tokens + self.attn2(self.norm2(tokens), context)
        return tokens + self.ff(self.norm3(tokens))


class SpatialTransformer(nn.Module):
    """The pixels of a feature map as tokens of one transformer block, on a residual branch."""

    def __init__(self, width: int, config: UNetConfig) -> None:
        super().__init__()
        # As published: 1e-6 here, torch's 1e-5 in the norms of ResBlock and before the output.
        self.norm = nn.GroupNorm(config.norm_groups, width, eps=1e-6)
        self.proj_in = nn.Conv2d(width, width, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(width, config.num_heads, config.context_dim)])
        self.proj_out = zero_init(nn.Conv2d(width, width, 1))

    def forward(self, x: Tensor, context: Tensor | CachedContext, anchor: Anchor | None = None) -> Tensor:
        """x (B', C, h, w) -> (B, C, h, w), as TransformerBlock does with its tokens."""
        height = x.shape[2]
        tokens = self.proj_in(self.norm(x)).permute(0, 2, 3, 1).flatten(1, 2)  # a view where x is channels-last
        tokens = self.transformer_blocks[0](tokens, context, anchor)
        return repeat(x, len(tokens)) + self.proj_out(tokens.unflatten(1, (height, -1)).permute(0, 3, 1, 2))


class ResBlock(nn.Module):
    """Two 3x3 convolutions with the time embedding added between them, on a residual branch."""

    def __init__(self, width_in: int, width_out: int, config: UNetConfig) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(
            nn.GroupNorm(config.norm_groups, width_in), nn.SiLU(), nn.Conv2d(width_in, width_out, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(config.embedding_width, width_out))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(config.norm_groups, width_out),
            nn.SiLU(),
            nn.Identity(),  # a dropout in SD; the names count it
            zero_init(nn.Conv2d(width_out, width_out, 3, padding=1)),
        )
        self.skip_connection = nn.Identity() if width_in == width_out else nn.Conv2d(width_in, width_out, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x (B', C_in, h, w), embedding (B, 4 C_model), its first B' rows used -> (B', C_out, h, w)."""
        h = self.in_layers(x) + self.emb_layers(embedding[: len(x)])[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)


class Downsample(nn.Module):
    """Half the size by a 3x3 convolution of stride 2."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, h, w) -> (B, C, h / 2, w / 2)."""
        return self.op(x)


class Block(nn.Sequential):
    """One numbered block: its layers in turn, each given what it needs beside the feature map x."""

    def forward(
        self, x: Tensor, embedding: Tensor, context: Tensor | CachedContext, anchor: Anchor | None = None
    ) -> Tensor:
        """x (B', C_in, h, w) -> (B, C_out, h', w'); B' grows to the context's B where the block looks at the text."""
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, embedding)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context, anchor)
            else:
                x = layer(x)
        return x


class UNetEncoder(nn.Module):
    """Time embedding, encoder (input_blocks) and middle_block: what a ControlNet copies.

    gradient_checkpointing  recompute every block in backward: a third more time, far less memory
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        widths, embedding_width = config.level_widths, config.embedding_width
        self.time_embed = nn.Sequential(
            nn.Linear(config.model_channels, embedding_width), nn.SiLU(), nn.Linear(embedding_width, embedding_width)
        )

        # Down: what leaves each block is kept for the way up, so its width is noted.
        width = config.model_channels
        self.input_blocks = nn.ModuleList([Block(nn.Conv2d(config.in_channels, width, 3, padding=1))])
        self.skip_widths = [width]
        self.feature_blocks: list[int] = []  # the last block of each level: 2, 5, 8, 11 for SD
        for level in range(len(widths)):
            for _ in range(config.num_res_blocks):
                self.input_blocks.append(Block(*self._layers(level, width)))
                width = widths[level]
                self.skip_widths.append(width)
            self.feature_blocks.append(len(self.input_blocks) - 1)
            if level < len(widths) - 1:
                self.input_blocks.append(Block(Downsample(width)))
                self.skip_widths.append(width)

        self.middle_block = Block(
            ResBlock(width, width, config),
            SpatialTransformer(width, config),
            ResBlock(width, width, config),
        )

    def _layers(self, level: int, width_in: int) -> list[nn.Module]:
        """A numbered block of a level, as long as it neither halves nor doubles."""
        width = self.config.level_widths[level]
        attends = level in self.config.attention_levels
        return [ResBlock(width_in, width, self.config), *([SpatialTransformer(width, self.config)] if attends else [])]

    def encode(
        self,
        latents: Tensor,
        timesteps: Tensor,
        context: Tensor | CachedContext,
        added: Mapping[int, Tensor],
        anchor: Anchor | None,
    ) -> tuple[list[Tensor], Tensor]:
        """All that comes before the decoder; latents, timesteps and context as of UNet.forward.

        added     maps (B'', C, h', w') by the number of the input block after which they are added
        anchor    what self-attention sees beside its own
        returns   what each input block and, last, the middle block leaves, and the time embedding (B, 4 C_model)
        """
        dtype = self.input_blocks[0][0].weight.dtype
        embedding = self.time_embed(timestep_embedding(timesteps, self.config.model_channels).to(dtype))
        embedding = repeat(embedding, len(context))
        h, kept = latents.to(dtype), []
        for index, block in enumerate(self.input_blocks):
            h = self._run(block, h, embedding, context, anchor)
            if index in added:
                h = h + tile(added[index], h)
            kept.append(h)
        return [*kept, self._run(self.middle_block, h, embedding, context, anchor)], embedding

    def _run(
        self, block: Block, h: Tensor, embedding: Tensor, context: Tensor | CachedContext, anchor: Anchor | None
    ) -> Tensor:
        # The reentrant kind gives weights no gradient where no input has one, as in the first block.
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, h, embedding, context, anchor, use_reentrant=False)
        return block(h, embedding, context, anchor)


class UNet(UNetEncoder):
    """Encoder (input_blocks), middle_block, decoder (output_blocks, out), joined by skip connections.

    control   a controlnet.ControlNet, which then takes the place of features added to the encoder; None: none
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__(config)
        widths, skip_widths, width = config.level_widths, list(self.skip_widths), self.skip_widths[-1]
        # Up: one block more a level, since each takes one kept map, the halving blocks' ones too.
        self.output_blocks = nn.ModuleList()
        for level in reversed(range(len(widths))):
            for index in range(config.num_res_blocks + 1):
                block = self._layers(level, width + skip_widths.pop())
                width = widths[level]
                if level > 0 and index == config.num_res_blocks:
                    block.append(Upsample(width))
                self.output_blocks.append(Block(*block))
        self.out = nn.Sequential(
            nn.GroupNorm(config.norm_groups, width),
            nn.SiLU(),
            zero_init(nn.Conv2d(width, config.out_channels, 3, padding=1)),
        )
        self.control: UNetEncoder | None = None

    def cross_attentions(self) -> list[Attention]:
        """Those that look at the text, a ControlNet's too, in the order of `CachedContext`."""
        return [module.attn2 for module in self.modules() if isinstance(module, TransformerBlock)]

    def decoder_parameters(self) -> list[nn.Parameter]:
        """What the paper fine-tunes (Sec. 3.3): output blocks and output head.

        With the rest frozen, autograd keeps nothing of the blocks before the first condition feature.
        """
        return [*self.output_blocks.parameters(), *self.out.parameters()]

    def cache_context(self, context: Tensor) -> CachedContext:
        """Keys and values of all cross-attentions, once per run of the sampler.  context (B, 77, C)."""
        attentions = self.cross_attentions()
        for index, attention in enumerate(attentions):  # so that each finds its own, through blocks that know nothing
            attention.cache_index = index
        keys, values = zip(*(attention.keys_values(context) for attention in attentions), strict=True)
        return CachedContext(keys, values)

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        context: Tensor | CachedContext,
        cond_features: Sequence[Tensor] | None = None,
        anchor: int | None = None,
    ) -> Tensor:
        """Predict the noise in the latents.

        latents        (B', 4, h, w)  h and w divisible by 2 ** (levels - 1)
        timesteps      (B',)          int, 0 cleanest
        context        (B, 77, C)     text, or what cache_context made of it; B a multiple of B': under guidance, where
                       two texts share their latents, what comes before the first text is computed once
        cond_features  maps (B'', C_k, h / 2^k, w / 2^k), one per level, B' a multiple of B''; feature k is added after
                       the last block of level k, so that main path and skip connection both carry it; None: none.
                       With a ControlNet: the hint and the scale that its HintEncoder gives
        anchor         0 to B' - 1: the latents are frames of a video, and self-attention of each also sees the keys and
                       values of this one (Sec. 4.4); for the anchor itself that changes nothing; None: no video
        returns eps    (B, 4, h, w)   in the dtype of latents
        Raises ValueError when a shape does not fit.
        """
        self._check(latents, timesteps, len(context), cond_features)
        seen = None if anchor is None else Anchor(anchor, len(latents))
        controlled = self.control is not None and cond_features is not None
        added = {} if controlled else dict(zip(self.feature_blocks, cond_features or (), strict=False))
        skips, embedding = self.encode(latents, timesteps, context, added, seen)
        if controlled:
            hint, scale = cond_features
            residuals = self.control(latents, timesteps, context, hint, seen)
            skips = [skip + repeat(scale, len(skip)) * residual
                     for skip, residual in zip(skips, residuals, strict=True)]  # fmt: skip
        h = skips.pop()
        for block in self.output_blocks:
            h = self._run(block, torch.cat([h, repeat(skips.pop(), len(h))], dim=1), embedding, context, seen)
        return self.out(h).to(latents.dtype)

    def _check(self, latents: Tensor, timesteps: Tensor, texts: int, cond_features: Sequence[Tensor] | None) -> None:
        levels, (batch, channels, height, width) = len(self.config.channel_mult), latents.shape
        maps, what = (levels, "one per U-Net level") if self.control is None else (2, "a ControlNet's hint and scale")
        cell = 2 ** (levels - 1)
        if channels != self.config.in_channels or height % cell or width % cell:
            raise ValueError(
                f"latents are {tuple(latents.shape)}; the U-Net expects {self.config.in_channels} channels"
                f" and a height and width divisible by {cell}"
            )
        if timesteps.shape != (batch,):
            raise ValueError(f"timesteps have shape {tuple(timesteps.shape)}, expected ({batch},), one per latent")
        if texts % batch:
            raise ValueError(f"the context has batch {texts}, expected a multiple of the latents' batch {batch}")
        if cond_features is not None and len(cond_features) != maps:
            raise ValueError(f"got {len(cond_features)} condition features, expected {maps}, {what}")
