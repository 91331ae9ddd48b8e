"""Noise schedule, losses, guidance.  latents (B,4,h,w), noise, context, cond_features -> loss, eps.  Paper: eq. 1 to 3.

From top to bottom: the schedule, noising, eq. 2; the losses of training, up to eq. 3; guidance.  Eq. 1 is the network
itself, `HOIDiffusion.forward`; whole runs of eq. 2 are in samplers.py.  The paper's alpha-bar_t (here abar_t) is
`alphas_cumprod[t]`; its alpha_t is the ratio of two neighbours.

A network may predict the velocity v = sqrt(abar) eps - sqrt(1 - abar) x_0 in place of eps (`NoiseSchedule.predicts`):
only its training target and one conversion before the samplers differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hoi.network.unet import CachedContext, UNet

PREDICTIONS = ("eps", "v")


@dataclass(frozen=True)
class NoiseSchedule:
    """How much signal is left after t noising steps, and which target the network was trained towards.

    alphas_cumprod   (T,) float64, falling; index 0 is the cleanest
    predicts         "eps" as in the paper, or "v", the velocity of Salimans & Ho 2022 (Sec. 4): where nearly all is
                     noise, eps says nothing about the picture and v is the picture, so words and conditions act early
    """

    alphas_cumprod: Tensor
    predicts: str = "eps"

    def __post_init__(self) -> None:
        if self.predicts not in PREDICTIONS:
            raise ValueError(f"a network predicts {' or '.join(PREDICTIONS)}, got {self.predicts!r}")

    @classmethod
    def stable_diffusion(cls, predicts: str = "eps", terminal_signal: float | None = None) -> NoiseSchedule:
        """Variances linear in their square root from 0.00085 to 0.012, computed in float64 as in the published code.

        terminal_signal   what sqrt(alphas_cumprod) falls to, in (0, 0.068); None leaves Stable Diffusion's 0.068
        In 1000 steps alphas_cumprod runs from 0.99915 to 0.0046601.

        At 0.068 the noisiest training picture still shows its mean colours (averaged over many latent pixels, signal
        outweighs noise), but sampling starts from pure noise: the network reads a colour that nobody meant.  A lower
        end, reached by shifting and scaling sqrt(alphas_cumprod), closes the gap.  Source: Lin et al. 2024, algorithm
        1, there with 0, where eps would be undefined.
        """
        # In float32 the product of 1000 factors would be off by 1e-6 of itself, and not equal to the published numbers.
        noise_betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        signal = (1 - noise_betas).cumprod(dim=0).sqrt()
        if terminal_signal is not None:
            first, last = signal[0].item(), signal[-1].item()
            if not 0 < terminal_signal < last:
                raise ValueError(f"terminal_signal is {terminal_signal}, expected above 0 and below {last:.3f}")
            signal = first - (first - signal) * (first - terminal_signal) / (first - last)
        return cls(signal.square(), predicts)

    @property
    def num_timesteps(self) -> int:
        """T, 1000 for Stable Diffusion: timesteps run from 0, the cleanest, to T - 1."""
        return len(self.alphas_cumprod)

    def signal_and_noise(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(abar_t) and sqrt(1 - abar_t), each (B,1,1,1), on the device and in the dtype of `like`.

        timesteps   (B,) int
        """
        # Tables go to the timesteps: a GPU that is asked for its timesteps stands still.  float64 until then.
        signal, noise = self.alphas_cumprod.sqrt().to(like), (1 - self.alphas_cumprod).sqrt().to(like)
        return signal[timesteps].view(-1, 1, 1, 1), noise[timesteps].view(-1, 1, 1, 1)  # (B,) -> (B,1,1,1)

    def at(self, timestep: int) -> float:
        """alphas_cumprod[timestep] as a float; before the first step (timestep < 0) nothing is noise: 1."""
        return self.alphas_cumprod[timestep].item() if timestep >= 0 else 1.0


def add_noise(schedule: NoiseSchedule, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """A draw of q(x_t | x_0) = N(sqrt(abar_t) x_0, (1 - abar_t) I).

    latents, noise (B,4,h,w); timesteps (B,) int -> noisy latents (B,4,h,w).  Source: paper Sec. 3.1.
    """
    signal, spread = schedule.signal_and_noise(timesteps, latents)
    return signal * latents + spread * noise


def training_target(schedule: NoiseSchedule, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """What the network has to find: the noise eps, or v = sqrt(abar_t) eps - sqrt(1 - abar_t) x_0.

    latents, noise (B,4,h,w); timesteps (B,) int -> (B,4,h,w).
    """
    if schedule.predicts == "eps":
        return noise
    signal, spread = schedule.signal_and_noise(timesteps, latents)
    return signal * noise - spread * latents


def eps_from_output(schedule: NoiseSchedule, latents: Tensor, output: Tensor, timestep: int) -> Tensor:
    """The noise that the network's output stands for at noisy latents: eps = sqrt(abar) v + sqrt(1 - abar) x_t."""
    if schedule.predicts == "eps":
        return output
    alpha_cumprod = schedule.at(timestep)
    return math.sqrt(alpha_cumprod) * output + math.sqrt(1 - alpha_cumprod) * latents


def predict_x0(latents: Tensor, eps: Tensor, alpha_cumprod: float) -> Tensor:
    """The clean latents that eps stands for: q(x_t | x_0) solved for x_0.  (B,4,h,w) each."""
    return (latents - math.sqrt(1 - alpha_cumprod) * eps) / math.sqrt(alpha_cumprod)


def ddpm_step(
    schedule: NoiseSchedule,
    latents: Tensor,
    eps: Tensor,
    timestep: int,
    previous_timestep: int,
    noise: Tensor | None,
) -> Tensor:
    """Eq. 2: x_{t-1} = (x_t - (1 - alpha_t) / sqrt(1 - abar_t) eps_t) / sqrt(alpha_t) + sigma_t z.

    latents, eps       (B,4,h,w) at `timestep`
    previous_timestep  the one to go to, timestep - 1 in the paper; a smaller one skips steps, then
                       alpha_t = abar_t / abar_previous; negative means clean
    noise              z (B,4,h,w), standard normal; None for z = 0, as in the last step
    returns            (B,4,h,w)

    The paper leaves sigma_t open.  Here sigma_t^2 is the variance of q(x_{t-1} | x_t, x_0), as in latent diffusion:
    (1 - abar_{t-1}) / (1 - abar_t) (1 - alpha_t).
    """
    now, previous = schedule.at(timestep), schedule.at(previous_timestep)
    alpha = now / previous  # of all steps that are skipped at once
    mean = (latents - (1 - alpha) / math.sqrt(1 - now) * eps) / math.sqrt(alpha)
    if noise is None:
        return mean
    return mean + math.sqrt(1 - alpha) * math.sqrt((1 - previous) / (1 - now)) * noise


# --- training ---


def draw_training_noise(
    schedule: NoiseSchedule, shape: Sequence[int], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Timesteps (B,), uniform over the schedule, and standard normal noise of latents' shape (B,4,h,w)."""
    timesteps = torch.randint(schedule.num_timesteps, (shape[0],), generator=generator, device=generator.device)
    return timesteps, torch.randn(shape, generator=generator, device=generator.device)


@dataclass(frozen=True)
class TrainingBatch:
    """What one term of the loss is computed from; all tensors on one device.

    latents     (B,4,h,w)  clean, scaled
    context     (B,77,C)
    timesteps   (B,) int
    noise       (B,4,h,w)  the eps that the network has to find
    conditions  skeleton, normal, segmentation by name, each (B,3,H,W) in [0,1]; None: text alone
    """

    latents: Tensor
    context: Tensor
    timesteps: Tensor
    noise: Tensor
    conditions: Mapping[str, Tensor] | None = None


# (noisy latents, timesteps, context, conditions or None) -> eps: `HOIDiffusion`
Network = Callable[[Tensor, Tensor, Tensor, Mapping[str, Tensor] | None], Tensor]


def squared_errors(network: Network, schedule: NoiseSchedule, batch: TrainingBatch) -> Tensor:
    """(eps - f(sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps, t, conditions))^2, (B,4,h,w) float32.  (Or of v.)"""
    noisy = add_noise(schedule, batch.latents, batch.noise, batch.timesteps)
    target = training_target(schedule, batch.latents, batch.noise, batch.timesteps)
    # Under autocast the output is bf16, whose three digits are too few for squares and their sums.
    return (network(noisy, batch.timesteps, batch.context, batch.conditions).float() - target.float()).square()


def eps_loss(network: Network, schedule: NoiseSchedule, batch: TrainingBatch) -> Tensor:
    """|| eps - f(x_t, t) ||^2, averaged over the batch: plain training or, with conditions, one term of eq. 3.

    returns a scalar.  Source: paper Sec. 3.1, below eq. 2.
    """
    return squared_errors(network, schedule, batch).mean()


def hoi_loss(
    network: Network,
    schedule: NoiseSchedule,
    hoi: TrainingBatch,
    regularization: TrainingBatch,
    reg_weight: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Eq. 3: || eps - f(x_t, t, conditions) ||^2 + w_r || eps_r - f(xr_t, t, blank) ||^2, each term a mean.

    hoi             B pictures of hands and objects, with their conditions
    regularization  B' pictures of the background buffer (x_r, eps_r), with all-zero conditions; of text alone, neither
                    has any
    reg_weight      w_r, 1 in the paper
    returns         the loss (scalar, has a gradient) and its terms (detached), "hoi" and "reg", the latter without w_r

    Blank conditions pass through the encoders like any others: their features are not zero, and the encoders learn from
    this term too.  Both terms share one evaluation of the network: one forward for DDP.
    """
    error = squared_errors(network, schedule, join_batches(hoi, regularization))
    error = error.flatten(1).mean(dim=1)  # of each picture, (B + B',): each term averages over its own
    hoi_term, reg_term = error[: len(hoi.latents)].mean(), error[len(hoi.latents) :].mean()
    return hoi_term + reg_weight * reg_term, {"hoi": hoi_term.detach(), "reg": reg_term.detach()}


def join_batches(first: TrainingBatch, second: TrainingBatch) -> TrainingBatch:
    """One batch after the other, (B + B', ...); both have conditions, or neither."""
    names = ("latents", "context", "timesteps", "noise")
    joined = {name: torch.cat([getattr(first, name), getattr(second, name)]) for name in names}
    conditions = {name: torch.cat([image, second.conditions[name]]) for name, image in (first.conditions or {}).items()}
    return TrainingBatch(**joined, conditions=conditions or None)


# --- guidance ---


def join_guidance(
    unet: UNet, context: Tensor, uncond_context: Tensor | None, guidance_scale: float
) -> CachedContext:
    """The texts that a sampling run is guided by, joined and turned into the U-Net's keys and values once.

    context         (B,77,C), a text for each of B pictures
    uncond_context  (B,77,C) or (1,77,C), the empty or the negative prompt; may be None at scale 1
    returns         of batch 2B, unconditional half first; at scales 0 and 1, where a half has no share, B of the other
    """
    if guidance_scale != 1.0:  # at 1 the unconditional half cancels out
        uncond_context = uncond_context.expand_as(context).to(context)
        context = uncond_context if guidance_scale == 0.0 else torch.cat([uncond_context, context])
    return unet.cache_context(context)


def guided_eps(
    unet: UNet,
    latents: Tensor,
    timesteps: Tensor,
    context: CachedContext,
    guidance_scale: float,
    cond_features: Sequence[Tensor] | None,
) -> Tensor:
    """Classifier-free guidance, eps_u + guidance_scale (eps_c - eps_u), on all latent channels, in one evaluation.

    latents        (B,4,h,w)
    timesteps      (B,) int
    context        from `join_guidance` at the same scale
    cond_features  four maps of batch B or 1 (one geometry for all), for both halves; None for text alone
    returns        (B,4,h,w)

    The same mix of velocities is a velocity: they are linear in eps.  Source: Ho & Salimans 2022.
    """
    # A picture with two texts: the U-Net computes what comes before the first text once, and repeats the features.
    eps = unet(latents, timesteps, context, cond_features)
    if len(eps) == len(latents):
        return eps
    uncond_eps, cond_eps = eps.chunk(2)  # (2B,4,h,w) -> 2 x (B,4,h,w)
    return uncond_eps + guidance_scale * (cond_eps - uncond_eps)
