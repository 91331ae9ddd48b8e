"""Noise schedule, losses, guidance.  latents (B,4,h,w), noise, context, cond_features -> loss, eps.  Paper: eq. 1 to 3.

Reading order: `NoiseSchedule`, `add_noise`, `predict_eps` (eq. 1), `ddpm_step` (eq. 2), `hoi_loss` (eq. 3),
`guided_eps`; then `hoi/network/samplers.py`.  The paper's alpha-bar_t (here abar_t) is `alphas_cumprod[t]`; its alpha_t
is the ratio of two neighbours.

A network may predict the velocity v = sqrt(abar) eps - sqrt(1 - abar) x_0 in place of eps (`NoiseSchedule.predicts`):
only its training target and one conversion before the samplers differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

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
    def stable_diffusion(
        cls, num_timesteps: int = 1000, predicts: str = "eps", terminal_signal: float | None = None
    ) -> NoiseSchedule:
        """Variances linear in their square root from 0.00085 to 0.012, computed in float64 as in the published code.

        terminal_signal   what sqrt(alphas_cumprod) falls to, in (0, 0.068); None leaves Stable Diffusion's 0.068
        At 1000 steps alphas_cumprod runs from 0.99915 to 0.0046601.

        At 0.068 the noisiest training picture still shows its mean colours (averaged over many latent pixels, signal
        outweighs noise), but sampling starts from pure noise: the network reads a colour that nobody meant.  A lower
        end, reached by shifting and scaling sqrt(alphas_cumprod), closes the gap.  Source: Lin et al. 2024, algorithm
        1, there with 0, where eps would be undefined.
        """
        noise_betas = torch.linspace(0.00085**0.5, 0.012**0.5, num_timesteps, dtype=torch.float64) ** 2
        signal = (1 - noise_betas).cumprod(dim=0).sqrt()
        if terminal_signal is not None:
            first, last = signal[0].item(), signal[-1].item()
            if not 0 < terminal_signal < last:
                raise ValueError(f"terminal_signal is {terminal_signal}, expected above 0 and below {last:.3f}")
            signal = first - (first - signal) * (first - terminal_signal) / (first - last)
        return cls(signal.square(), predicts)

    @property
    def num_timesteps(self) -> int:
        return len(self.alphas_cumprod)

    def at(self, timestep: int) -> float:
        """alphas_cumprod[timestep] as a float; before the first step (timestep < 0) nothing is noise: 1."""
        return self.alphas_cumprod[timestep].item() if timestep >= 0 else 1.0


def add_noise(schedule: NoiseSchedule, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """A draw of q(x_t | x_0) = N(sqrt(abar_t) x_0, (1 - abar_t) I).

    latents, noise (B,4,h,w); timesteps (B,) int -> noisy latents (B,4,h,w).  Source: paper Sec. 3.1.
    """
    alphas_cumprod = schedule.alphas_cumprod[timesteps.cpu()].view(-1, 1, 1, 1)  # (B,) -> (B,1,1,1), float64
    return alphas_cumprod.sqrt().to(latents) * latents + (1 - alphas_cumprod).sqrt().to(latents) * noise


def draw_training_noise(schedule: NoiseSchedule, latents: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Timesteps (B,), uniform over the schedule, and standard normal noise like latents, both from `generator`."""
    timesteps = torch.randint(schedule.num_timesteps, (len(latents),), generator=generator, device=generator.device)
    noise = torch.randn(latents.shape, generator=generator, device=generator.device)
    return timesteps.to(latents.device), noise.to(latents)


def predict_eps(
    unet: nn.Module, latents: Tensor, timesteps: Tensor, context: Tensor, cond_features: Sequence[Tensor] | None
) -> Tensor:
    """Eq. 1: eps_t = f(x_t, t); with conditions f(x_t, t, [s, m, n]) (Sec. 3.3).  (v, for a network that predicts v.)

    latents (B,4,h,w), timesteps (B,), context (B,77,C) or cached (2B under guidance), cond_features four maps or None
    -> eps (B,4,h,w), one per text.
    """
    return unet(latents, timesteps, context, cond_features)


def training_target(schedule: NoiseSchedule, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """What the network has to find: the noise eps, or v = sqrt(abar_t) eps - sqrt(1 - abar_t) x_0.

    latents, noise (B,4,h,w); timesteps (B,) int -> (B,4,h,w).
    """
    if schedule.predicts == "eps":
        return noise
    alphas_cumprod = schedule.alphas_cumprod[timesteps.cpu()].view(-1, 1, 1, 1)  # (B,) -> (B,1,1,1), float64
    return alphas_cumprod.sqrt().to(noise) * noise - (1 - alphas_cumprod).sqrt().to(latents) * latents


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
    variance: str = "small",
) -> Tensor:
    """Eq. 2: x_{t-1} = (x_t - (1 - alpha_t) / sqrt(1 - abar_t) eps_t) / sqrt(alpha_t) + sigma_t z.

    latents, eps       (B,4,h,w) at `timestep`
    previous_timestep  the one to go to, timestep - 1 in the paper; a smaller one skips steps, then
                       alpha_t = abar_t / abar_previous; negative means clean
    noise              z (B,4,h,w), standard normal; None for z = 0, as in the last step
    variance           sigma_t^2, which the paper leaves open: "small" is the variance of q(x_{t-1} | x_t, x_0), that is
                       (1 - abar_{t-1}) / (1 - abar_t) (1 - alpha_t), as in latent diffusion; "large" is 1 - alpha_t
    returns            (B,4,h,w)
    """
    if variance not in ("small", "large"):
        raise ValueError(f'variance is {variance!r}, expected "small" or "large"')
    now, previous = schedule.at(timestep), schedule.at(previous_timestep)
    alpha = now / previous
    mean = (latents - (1 - alpha) / math.sqrt(1 - now) * eps) / math.sqrt(alpha)
    if noise is None:
        return mean
    sigma = math.sqrt(1 - alpha)
    return mean + (sigma * math.sqrt((1 - previous) / (1 - now)) if variance == "small" else sigma) * noise


# --- training ---


@dataclass(frozen=True)
class TrainingBatch:
    """What one term of the loss is computed from; all tensors on one device.

    latents     (B,4,h,w)  clean, scaled
    context     (B,77,C)
    timesteps   (B,) int
    noise       (B,4,h,w)  the eps that the network has to find
    conditions  skeleton, normal, segmentation, each (B,3,H,W) in [0,1]; None where the loss uses none or blank ones
    """

    latents: Tensor
    context: Tensor
    timesteps: Tensor
    noise: Tensor
    conditions: tuple[Tensor, Tensor, Tensor] | None = None


# (noisy latents, timesteps, context, conditions or None) -> eps: `HOIDiffusion`, or DDP around it
Network = Callable[..., Tensor]


def eps_loss(network: Network, schedule: NoiseSchedule, batch: TrainingBatch) -> Tensor:
    """|| eps - f(sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps, t) ||^2, averaged: training without conditions.  (Or v.)

    returns a scalar.  Source: paper Sec. 3.1, below eq. 2.
    """
    noisy = add_noise(schedule, batch.latents, batch.noise, batch.timesteps)
    target = training_target(schedule, batch.latents, batch.noise, batch.timesteps)
    return (network(noisy, batch.timesteps, batch.context, None).float() - target.float()).square().mean()


def hoi_loss(
    network: Network,
    schedule: NoiseSchedule,
    hoi: TrainingBatch,
    regularization: TrainingBatch | None = None,
    reg_weight: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Eq. 3: || eps - f(x_t, t, conditions) ||^2 + w_r || eps_r - f(xr_t, t, blank) ||^2, each term a mean.

    hoi             pictures of hands and objects, with their conditions
    regularization  B' pictures of the background buffer (x_r, eps_r), their `conditions` unused; None: no such term
    reg_weight      w_r, 1 in the paper
    returns         the loss and its parts (detached): "hoi" and, if there, "reg"
    Raises ValueError when `hoi` has no conditions.

    Blank conditions are all-zero pictures that pass through the encoders like any others: their features are not zero,
    and the encoders learn from this term too.  Both terms share one evaluation of the network: one forward for DDP.
    """
    if hoi.conditions is None:
        raise ValueError("the hand-object batch of eq. 3 has no conditions; without conditions use eps_loss")
    if regularization is None:
        noisy = add_noise(schedule, hoi.latents, hoi.noise, hoi.timesteps)
        target = training_target(schedule, hoi.latents, hoi.noise, hoi.timesteps)
        loss = (network(noisy, hoi.timesteps, hoi.context, hoi.conditions).float() - target.float()).square().mean()
        return loss, {"hoi": loss.detach()}
    both = join_batches(hoi, blank(regularization, hoi.conditions))
    noisy = add_noise(schedule, both.latents, both.noise, both.timesteps)
    target = training_target(schedule, both.latents, both.noise, both.timesteps)
    output = network(noisy, both.timesteps, both.context, both.conditions)
    error = (output.float() - target.float()).square().flatten(1).mean(dim=1)  # (B + B',)
    hoi_term, reg_term = error[: len(hoi.latents)].mean(), error[len(hoi.latents) :].mean()
    return hoi_term + reg_weight * reg_term, {"hoi": hoi_term.detach(), "reg": reg_term.detach()}


def blank(batch: TrainingBatch, like: Sequence[Tensor]) -> TrainingBatch:
    """The batch with all-zero condition images of the size of `like` (each (_,3,H,W))."""
    count = len(batch.latents)
    return replace(batch, conditions=tuple(image.new_zeros((count, *image.shape[1:])) for image in like))


def join_batches(first: TrainingBatch, second: TrainingBatch) -> TrainingBatch:
    """One batch after the other, (B + B', ...); both have conditions."""
    conditions = tuple(torch.cat(pair) for pair in zip(first.conditions, second.conditions, strict=True))
    names = ("latents", "context", "timesteps", "noise")
    joined = {name: torch.cat([getattr(first, name), getattr(second, name)]) for name in names}
    return TrainingBatch(**joined, conditions=conditions)


# --- guidance ---


@dataclass(frozen=True)
class Guidance:
    """Text of a sampling run, joined once.

    context   [unconditional half, conditional half] (2B,77,C) or cached; at scale 0 and 1 the one half needed (B,77,C)
    """

    context: Tensor
    guidance_scale: float

    @property
    def halves(self) -> int:
        return 1 if self.guidance_scale in (0.0, 1.0) else 2


def join_guidance(unet: nn.Module, context: Tensor, uncond_context: Tensor | None, guidance_scale: float) -> Guidance:
    """Prepare classifier-free guidance for a batch of B pictures.

    context         (B,77,C)
    uncond_context  (B,77,C) or (1,77,C), the empty or the negative prompt; may be None at scale 1
    returns         a Guidance whose context is replaced by its keys and values where the U-Net offers `cache_context`
    Raises ValueError when the unconditional context is missing or has another batch or length.
    """
    if guidance_scale != 1.0:
        if uncond_context is None:
            raise ValueError(
                f"guidance_scale {guidance_scale} needs uncond_context (the encoded empty or negative prompt)"
            )
        if uncond_context.shape[1:] != context.shape[1:] or len(uncond_context) not in (1, len(context)):
            raise ValueError(
                f"uncond_context is {tuple(uncond_context.shape)}, expected {tuple(context.shape)} or batch 1"
            )
        uncond_context = uncond_context.expand_as(context).to(context)
        # (B,77,C), or (2B,77,C) for both halves
        context = uncond_context if guidance_scale == 0.0 else torch.cat([uncond_context, context])
    return Guidance(unet.cache_context(context) if hasattr(unet, "cache_context") else context, guidance_scale)


def guided_eps(
    unet: nn.Module, latents: Tensor, timesteps: Tensor, guidance: Guidance, cond_features: Sequence[Tensor] | None
) -> Tensor:
    """Classifier-free guidance, eps_u + guidance_scale (eps_c - eps_u), on all latent channels, in one evaluation.

    latents (B,4,h,w), timesteps (B,); cond_features four maps of batch B or 1 (one geometry for all) for both halves,
    or None.  Scale 1 evaluates the conditional half alone, scale 0 the unconditional.  The same mix of velocities is a
    velocity: they are linear in eps.  Source: Ho & Salimans 2022.
    """
    if guidance.halves == 1:
        return predict_eps(unet, latents, timesteps, guidance.context, cond_features)
    # One picture with two texts: the U-Net computes what comes before the first text once, and repeats the features.
    eps = predict_eps(unet, latents, timesteps, guidance.context, cond_features)
    uncond_eps, cond_eps = eps.chunk(2)  # (2B,4,h,w) -> 2 x (B,4,h,w)
    return uncond_eps + guidance.guidance_scale * (cond_eps - uncond_eps)
