"""Noise schedule, losses, guidance, samplers.  noise (B,4,h,w), context, cond_features -> latents.  Paper: eq. 1 to 3.

Reading order: `NoiseSchedule`, `add_noise`, `predict_eps` (eq. 1), `ddpm_step` (eq. 2), `hoi_loss` (eq. 3),
`guided_eps`, the three samplers, `sample_latents`.  The paper's alpha-bar_t (here abar_t) is `alphas_cumprod[t]`; its
alpha_t is the ratio of two neighbours.

A network may predict the velocity v = sqrt(abar) eps - sqrt(1 - abar) x_0 in place of eps (`NoiseSchedule.predicts`):
only its training target and one conversion before the samplers differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

SAMPLERS = ("dpm++", "ddim", "ddpm")
PREDICTIONS = ("eps", "v")

# All that a sampler knows of the network: (latents (B,4,h,w), timestep, step) -> eps; step 0 is the noisiest.
Predictor = Callable[[Tensor, int, int], Tensor]
Progress = Callable[[int, int], None]  # (steps done, steps in all), called after every step


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

    latents (B,4,h,w), timesteps (B,), context (B,77,C) or cached, cond_features four maps or None -> eps (B,4,h,w).
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
    # The U-Net repeats the features over its batch, so that both halves get them.
    eps = predict_eps(
        unet, torch.cat([latents, latents]), torch.cat([timesteps, timesteps]), guidance.context, cond_features
    )
    uncond_eps, cond_eps = eps.chunk(2)  # (2B,4,h,w) -> 2 x (B,4,h,w)
    return uncond_eps + guidance.guidance_scale * (cond_eps - uncond_eps)


def steps_with_conditions(num_inference_steps: int, cond_tau: float) -> int:
    """How many of the first (noisiest) steps use the conditions; the last int((1 - tau) N) go without.

    As in the official code, whose int() cuts a float: tau 0.9 of 50 steps gives 46, not 45.
    """
    if not 0.0 <= cond_tau <= 1.0:
        raise ValueError(f"cond_tau is {cond_tau}, expected 0 (never) to 1 (in all steps)")
    return num_inference_steps - int((1 - cond_tau) * num_inference_steps)


# --- noise, one generator a picture: a picture does not depend on which others share its batch ---


def initial_noise(
    generators: Sequence[torch.Generator], channels: int, height: int, width: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Standard normal noise (B,channels,height,width), picture i from generators[i]; sizes in latent pixels.

    Drawn on the generator's device, so that CPU generators give the same picture on any hardware.
    """
    noise = [torch.randn((channels, height, width), generator=g, device=g.device) for g in generators]
    return torch.stack(noise).to(device)


def _noise_like(latents: Tensor, generators: Sequence[torch.Generator] | None) -> Tensor:
    if generators is None or len(generators) != len(latents):
        got = "none" if generators is None else str(len(generators))
        raise ValueError(f"a stochastic sampler needs one generator a picture: expected {len(latents)}, got {got}")
    return initial_noise(generators, *latents.shape[1:], device=latents.device).to(latents.dtype)


# --- samplers: noise -> latents, with nothing but a predictor of eps ---


def leading_timesteps(num_inference_steps: int, num_timesteps: int = 1000, offset: int = 0) -> list[int]:
    """Every k-th timestep, k = num_timesteps // num_inference_steps: for 50 steps 980, 960, ..., 0, plus `offset`.

    Raises ValueError when rounding k down would leave out the noisy end: 600 steps would start at 599.
    """
    _check_steps(num_inference_steps, num_timesteps)
    stride = num_timesteps // num_inference_steps
    if num_inference_steps * stride < 0.9 * num_timesteps:
        raise ValueError(
            f"{num_inference_steps} steps of stride {stride} leave out the noisiest of {num_timesteps};"
            " take a divisor of it, or the sampler dpm++"
        )
    if (num_inference_steps - 1) * stride + offset >= num_timesteps:
        offset = 0  # all steps are used: there is nowhere to shift them to
    return [step * stride + offset for step in reversed(range(num_inference_steps))]


def _check_steps(num_inference_steps: int, most: int) -> None:
    if not 1 <= num_inference_steps <= most:
        raise ValueError(f"num_inference_steps is {num_inference_steps}, expected 1 to {most}")


def sample_ddpm(
    predict: Predictor,
    schedule: NoiseSchedule,
    noise: Tensor,
    num_inference_steps: int,
    generators: Sequence[torch.Generator],
    variance: str = "small",
    progress: Progress | None = None,
) -> Tensor:
    """The paper's sampler, eq. 2 in every step; with fewer steps than the schedule has, it takes every k-th down to 0.

    noise (B,4,h,w) -> latents (B,4,h,w).  Source: paper eq. 2; Ho et al. 2020, algorithm 2.
    """
    latents, timesteps = noise, leading_timesteps(num_inference_steps, schedule.num_timesteps)
    for step, timestep in enumerate(timesteps):
        last = step == len(timesteps) - 1
        eps = predict(latents, timestep, step)
        previous = -1 if last else timesteps[step + 1]
        latents = ddpm_step(
            schedule, latents, eps, timestep, previous, None if last else _noise_like(latents, generators), variance
        )
        if progress:
            progress(step + 1, len(timesteps))
    return latents


def sample_ddim(
    predict: Predictor,
    schedule: NoiseSchedule,
    noise: Tensor,
    num_inference_steps: int,
    eta: float = 0.0,
    generators: Sequence[torch.Generator] | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """DDIM with Stable Diffusion's timesteps: 981, 961, ..., 1 for 50 steps.

    noise (B,4,h,w) -> latents (B,4,h,w); eta 0 is deterministic, eta 1 as noisy as eq. 2 and then needs `generators`.
    The last step goes to alphas_cumprod[0], not to 1, as it was published.  Source: Song et al. 2021, eq. 12, 16.
    """
    latents, timesteps = noise, leading_timesteps(num_inference_steps, schedule.num_timesteps, offset=1)
    for step, timestep in enumerate(timesteps):
        eps = predict(latents, timestep, step)
        now, previous = schedule.at(timestep), schedule.at(timesteps[step + 1] if step + 1 < len(timesteps) else 0)
        sigma = eta * math.sqrt((1 - previous) / (1 - now) * (1 - now / previous))
        latents = math.sqrt(previous) * predict_x0(latents, eps, now) + math.sqrt(1 - previous - sigma**2) * eps
        if sigma:
            latents = latents + sigma * _noise_like(latents, generators)
        if progress:
            progress(step + 1, len(timesteps))
    return latents


def linspace_timesteps(num_inference_steps: int, num_timesteps: int = 1000) -> list[int]:
    """Timesteps evenly from the noisiest towards 0, which is left out: 999, 949, ..., 50 for 20 steps."""
    _check_steps(num_inference_steps, num_timesteps - 1)
    return [int(t) for t in np.linspace(0, num_timesteps - 1, num_inference_steps + 1).round()[:0:-1]]


def sample_dpm_solver(
    predict: Predictor,
    schedule: NoiseSchedule,
    noise: Tensor,
    num_inference_steps: int,
    progress: Progress | None = None,
) -> Tensor:
    """DPM-Solver++(2M): second order, multistep, deterministic; one evaluation a step, about 20 steps are enough.

    noise (B,4,h,w) -> latents (B,4,h,w).  Timesteps are evenly spaced from 999 (`linspace_timesteps`); the first step,
    which has no predecessor, and the last, which goes to zero noise, are of first order.  alpha = sqrt(abar),
    sigma = sqrt(1 - abar), lambda = log(alpha / sigma).  Source: Lu et al. 2022, "DPM-Solver++", algorithm 2.
    """
    timesteps = linspace_timesteps(num_inference_steps, schedule.num_timesteps)
    lambdas = [0.5 * math.log(schedule.at(t) / (1 - schedule.at(t))) for t in timesteps]
    latents, x0_before = noise, noise
    for step, timestep in enumerate(timesteps):
        x0 = predict_x0(latents, predict(latents, timestep, step), schedule.at(timestep))
        if step == len(timesteps) - 1:
            latents = x0  # the limit sigma -> 0 of the update below with D = x0
        else:
            next_alpha, sigma = math.sqrt(schedule.at(timesteps[step + 1])), math.sqrt(1 - schedule.at(timestep))
            next_sigma = math.sqrt(1 - next_alpha**2)
            h = lambdas[step + 1] - lambdas[step]
            direction = x0
            if step > 0:
                r = (lambdas[step] - lambdas[step - 1]) / h
                direction = x0 + (x0 - x0_before) / (2 * r)
            latents = next_sigma / sigma * latents - next_alpha * math.expm1(-h) * direction
        x0_before = x0
        if progress:
            progress(step + 1, len(timesteps))
    return latents


@torch.no_grad()
def sample_latents(
    unet: nn.Module,
    schedule: NoiseSchedule,
    context: Tensor,
    uncond_context: Tensor | None,
    cond_features: Sequence[Tensor] | None,
    noise: Tensor,
    sampler: str = "dpm++",
    num_inference_steps: int = 20,
    guidance_scale: float = 7.5,
    cond_tau: float = 1.0,
    eta: float = 0.0,
    generators: Sequence[torch.Generator] | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """From noise to latents with guidance and conditions: everything between the encoders and `vae.decode`.

    context         (B,77,C)                   encoded prompts
    uncond_context  (B,77,C), (1,77,C), None   encoded negative or empty prompt; None only at guidance_scale 1
    cond_features   four maps (B or 1, ...)    computed once a geometry; None samples from text alone
    noise           (B,4,h,w)                  from `initial_noise`
    sampler         "dpm++", "ddim" or "ddpm"
    cond_tau        in [0,1], the first share of the steps that uses the conditions, see `steps_with_conditions`
    eta             in [0,1], ddim's noise
    generators      one a picture; needed by ddpm and by ddim with eta > 0
    returns         (B,4,h,w) scaled latents, float32
    Raises ValueError for an unknown sampler, steps out of range, a batch that does not fit.

    The arithmetic of the steps is float32 whatever the network computes in.
    """
    if len(context) != len(noise):
        raise ValueError(f"context has batch {len(context)} but noise has {len(noise)}")
    guidance = join_guidance(unet, context, uncond_context, guidance_scale)
    conditioned = steps_with_conditions(num_inference_steps, cond_tau)

    def predict(latents: Tensor, timestep: int, step: int) -> Tensor:
        timesteps = torch.full((len(latents),), timestep, device=latents.device, dtype=torch.long)
        features = cond_features if step < conditioned else None
        output = guided_eps(unet, latents, timesteps, guidance, features).float()
        return eps_from_output(schedule, latents, output, timestep)

    noise = noise.float()
    if sampler == "dpm++":
        return sample_dpm_solver(predict, schedule, noise, num_inference_steps, progress)
    if sampler == "ddim":
        return sample_ddim(predict, schedule, noise, num_inference_steps, eta, generators, progress)
    if sampler == "ddpm":
        return sample_ddpm(predict, schedule, noise, num_inference_steps, generators or (), progress=progress)
    raise ValueError(f"unknown sampler {sampler!r}, expected one of {', '.join(SAMPLERS)}")
