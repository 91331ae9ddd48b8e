"""Pictures to latents and back.  image (B,3,H,W) in [-1,1] <-> latents (B,4,H/f,W/f).  Paper: Sec. 3.1.

Tensor names are those of `first_stage_model` in a Stable Diffusion 1.x file (248 tensors at the default size); the
small VAE of the built-in model is the same class.  Architecture: Rombach et al. 2022, "High-Resolution Image Synthesis
with Latent Diffusion Models".
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hoi.network.kernels import Upsample


@dataclass(frozen=True)
class VAEConfig:
    """Sizes; the defaults are Stable Diffusion 1.x.  One latent pixel covers `factor` x `factor` picture pixels."""

    channels: int = 128
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    z_channels: int = 4
    scaling_factor: float = 0.18215  # 1 / standard deviation of the latents over the training pictures
    # With one channel a group (32 groups in a narrow network) a norm takes away every channel's mean: use fewer groups.
    norm_groups: int = 32

    def __post_init__(self) -> None:
        object.__setattr__(self, "channel_mult", tuple(self.channel_mult))  # a list when read from JSON

    @property
    def factor(self) -> int:
        """Picture pixels along one side of a latent pixel: 8 for Stable Diffusion."""
        return 2 ** (len(self.channel_mult) - 1)


@dataclass(frozen=True)
class Posterior:
    """q(z | image), a Gaussian with independent components.  mean, std (B,Z,h,w), both unscaled (see `VAE.scale`)."""

    mean: Tensor
    std: Tensor

    def sample(self, generator: torch.Generator) -> Tensor:
        """One draw (B,Z,h,w), its noise from the generator's device: a CPU generator gives the same draw everywhere."""
        noise = torch.randn(self.mean.shape, generator=generator, device=generator.device, dtype=torch.float32)
        return self.mean + self.std * noise.to(self.mean)

    def kl(self) -> Tensor:
        """KL divergence to the standard normal, nats a picture (B,).  Source: Kingma & Welling 2014, appendix B."""
        return 0.5 * (self.mean**2 + self.std**2 - 1 - 2 * self.std.log()).sum(dim=(1, 2, 3))


class Norm(nn.GroupNorm):
    """A group norm that, where it is `exact`, is so in channels-last too.

    There torch computes the variance on CPUs in one pass, E[x^2] - E[x]^2 in float32: of a map of 128 x 512 x 512 whose
    mean is 30 deviations the result is off by 4e-2.  The encoder's latents, which training keeps, were 4e-5 off for it;
    a decoded picture is by 0.03 of its 255 grey levels, not worth the memory of float64 (docs/speed.md).
    """

    exact = False  # computed in float64

    def forward(self, x: Tensor) -> Tensor:
        """x (B,C,h,w) -> (B,C,h,w)."""
        if not self.exact or x.device.type != "cpu" or x.dtype != torch.float32:
            return super().forward(x)
        return F.group_norm(x.double(), self.num_groups, self.weight.double(), self.bias.double(), self.eps).float()


def _norm(channels: int, groups: int) -> Norm:
    return Norm(groups, channels, eps=1e-6)


def _silu(x: Tensor) -> Tensor:
    """silu of a map that nobody else reads: in its place where no gradient needs it (0.27 GB of decoding 512 px)."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


class ResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1 convolution on x where the width changes."""

    def __init__(self, channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = _norm(channels, groups)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.norm2 = _norm(out_channels, groups)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if channels != out_channels:
            self.nin_shortcut = nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x (B,channels,h,w) -> (B,out_channels,h,w)."""
        h = self.conv1(_silu(self.norm1(x)))
        h = self.conv2(_silu(self.norm2(h)))
        return (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + h


class AttentionBlock(nn.Module):
    """Self-attention over all positions with one head; the projections are 1x1 convolutions as in the file."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = _norm(channels, groups)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x (B,C,h,w) -> (B,C,h,w)."""
        h = self.norm(x)
        q, k, v = (conv(h).flatten(2).transpose(1, 2) for conv in (self.q, self.k, self.v))  # (B,C,h,w) -> (B,hw,C)
        h = F.scaled_dot_product_attention(q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1)).squeeze(1)
        return x + self.proj_out(h.transpose(1, 2).reshape(x.shape))  # (B,hw,C) -> (B,C,h,w)


class Middle(nn.Module):
    """The coarsest level's only place where distant pixels meet: attention between two residual blocks."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.block_1 = ResBlock(channels, channels, groups)
        self.attn_1 = AttentionBlock(channels, groups)
        self.block_2 = ResBlock(channels, channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        """x (B,C,h,w) -> (B,C,h,w)."""
        return self.block_2(self.attn_1(self.block_1(x)))


class Downsample(nn.Module):
    """Half the size by a 3x3 convolution of stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """x (B,C,h,w) -> (B,C,h/2,w/2)."""
        # One pixel on the right and the bottom only: the published weights were trained with this lopsided padding.
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Level(nn.Module):
    """The residual blocks of one resolution and the change to the next one.

    widths   channels before the first block and behind each
    """

    def __init__(self, widths: list[int], groups: int, downsample: bool = False, upsample: bool = False) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResBlock(a, b, groups) for a, b in zip(widths[:-1], widths[1:], strict=True))
        if downsample:
            self.downsample = Downsample(widths[-1])
        if upsample:
            self.upsample = Upsample(widths[-1])

    def forward(self, x: Tensor) -> Tensor:
        """x (B,widths[0],h,w) -> (B,widths[-1],h',w'), of half or twice the size where the level changes it."""
        for block in self.block:
            x = block(x)
        if hasattr(self, "downsample"):
            x = self.downsample(x)
        return self.upsample(x) if hasattr(self, "upsample") else x


class Encoder(nn.Module):
    """Picture to the numbers that `quant_conv` makes a posterior of.  `down.0` is the finest level, used first."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths = [config.channels * m for m in config.channel_mult]
        last, groups = len(widths) - 1, config.norm_groups
        self.conv_in = nn.Conv2d(3, config.channels, 3, padding=1)
        self.down = nn.ModuleList()
        for i, width in enumerate(widths):
            before = widths[i - 1] if i else config.channels
            self.down.append(Level([before] + [width] * config.num_res_blocks, groups, downsample=i < last))
        self.mid = Middle(widths[-1], groups)
        self.norm_out = _norm(widths[-1], groups)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.z_channels, 3, padding=1)  # means, logarithms of variances
        for module in self.modules():
            if isinstance(module, Norm):
                module.exact = True

    def forward(self, image: Tensor) -> Tensor:
        """image (B,3,H,W) -> (B,2Z,H/f,W/f)."""
        h = self.conv_in(image)
        for level in self.down:
            h = level(h)
        return self.conv_out(_silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    """What `post_quant_conv` makes of latents to a picture.  `up.0` is the finest level, used last."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths = [config.channels * m for m in config.channel_mult]
        last, groups = len(widths) - 1, config.norm_groups
        self.conv_in = nn.Conv2d(config.z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], groups)
        self.up = nn.ModuleList()
        for i, width in enumerate(widths):  # finest first, as the file counts them
            before = widths[min(i + 1, last)]  # what the coarser level hands on
            self.up.append(Level([before] + [width] * (config.num_res_blocks + 1), groups, upsample=i > 0))
        self.norm_out = _norm(widths[0], groups)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        """latents (B,Z,h,w) -> image (B,3,h*f,w*f)."""
        h = self.mid(self.conv_in(latents))
        for level in reversed(self.up):
            h = level(h)
        return self.conv_out(_silu(self.norm_out(h)))


class VAE(nn.Module):
    """The autoencoder.  Everything outside this class holds *scaled* latents (about unit variance):

    latents = vae.scale(vae.encode(image).sample(generator))        image = vae.decode(latents)

    `scale` and `decode` are the only two places that touch `config.scaling_factor`.
    """

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.z_channels, 2 * config.z_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.z_channels, config.z_channels, 1)

    def encode(self, image: Tensor) -> Posterior:
        """image (B,3,H,W) in [-1,1], H and W multiples of `config.factor` -> posterior over unscaled latents.

        Raises ValueError for another shape.
        """
        f = self.config.factor
        if image.ndim != 4 or image.shape[1] != 3 or image.shape[2] % f or image.shape[3] % f:
            raise ValueError(f"image is {tuple(image.shape)}, expected (B, 3, H, W) with H and W multiples of {f}")
        mean, log_variance = self.quant_conv(self.encoder(image)).float().chunk(2, dim=1)
        # The published range, a deviation of 3e-7 to 22,000.
        return Posterior(mean, torch.exp(0.5 * log_variance.clamp(-30, 20)))

    def scale(self, latents: Tensor) -> Tensor:
        """Latents of a posterior -> the scaled latents that the U-Net sees (times `scaling_factor`)."""
        return latents * self.config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (B,Z,h,w) -> image (B,3,h*f,w*f), about [-1,1], not clipped."""
        return self._decode_unscaled(latents / self.config.scaling_factor)

    def _decode_unscaled(self, z: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(z))


# Chosen by trial on the miniature.  The averages carry the colour: without them a small network gives rare hues the
# colour of common ones.
AVERAGE_WEIGHT = 3.0
KL_WEIGHT = 1e-6  # only keeps the latents from growing; the order of size of Rombach et al. 2022, appendix G


def vae_loss(vae: VAE, image: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
    """Training loss of the autoencoder, a weighted sum of reconstruction terms and a small KL term.

    image      (B,3,H,W) in [-1,1], H and W multiples of 8
    generator  draws the latents from the posterior
    returns    the loss (scalar, has a gradient) and its unweighted parts (detached): l1, gradient, squared, average, kl

    Without a perceptual network: absolute error for sharpness, absolute error of finite differences for edges, and
    squared errors of the picture and of its 8x8 averages.  The KL is summed over a picture's latents and divided by its
    pixels, so that its weight means the same at every picture size.
    """
    posterior = vae.encode(image)
    error = vae._decode_unscaled(posterior.sample(generator)).float() - image.float()
    parts = {
        "l1": error.abs().mean(),
        "gradient": error.diff(dim=3).abs().mean() + error.diff(dim=2).abs().mean(),
        "squared": error.square().mean(),
        "average": F.avg_pool2d(error, 8).square().mean(),
        "kl": posterior.kl().mean() / (image.shape[2] * image.shape[3]),
    }
    loss = parts["l1"] + parts["gradient"] + parts["squared"]
    loss = loss + AVERAGE_WEIGHT * parts["average"] + KL_WEIGHT * parts["kl"]
    return loss, {name: part.detach() for name, part in parts.items()}
