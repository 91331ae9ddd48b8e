"""Samplers: noise (B,4,h,w), context, cond_features -> latents, in one call.  Paper: Sec. 3.1, eq. 2.

First the noise, then three samplers, each with nothing but a predictor of eps, at last the whole run, `sample_latents`.
ddpm is the paper's eq. 2, made for all steps of the schedule; ddim is used with about 50, dpm++ with about 20.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from hoi.common.choices import SAMPLERS
from hoi.network.diffusion import NoiseSchedule, ddpm_step, eps_from_output, guided_eps, join_guidance, predict_x0
from hoi.network.unet import UNet

# All that a sampler knows of the network: (latents (B,4,h,w), timestep, step) -> eps; step 0 is the noisiest.
Predictor = Callable[[Tensor, int, int], Tensor]
# (steps done, steps in all, x0 (B,4,h,w) as the network sees it now), called after every evaluation of the network
Progress = Callable[[int, int, Tensor], None]


# --- noise, one generator a picture: a picture does not depend on which others share its batch ---


def initial_noise(
    generators: Sequence[torch.Generator], channels: int, height: int, width: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Standard normal noise (B,channels,height,width), picture i from generators[i]; sizes in latent pixels.

    Drawn on the generator's device, so that CPU generators give the same picture on any hardware.
    """
    noise = [torch.randn((channels, height, width), generator=g, device=g.device) for g in generators]
    return torch.stack(noise).to(device)


# --- samplers: noise -> latents, with nothing but a predictor of eps ---


def leading_timesteps(num_inference_steps: int, num_timesteps: int = 1000, offset: int = 0) -> list[int]:
    """Every k-th timestep, k = num_timesteps // num_inference_steps: for 50 steps 980, 960, ..., 0, plus `offset`.

    Raises ValueError when rounding k down would leave out the noisy end: 600 steps would start at 599.
    """
    _check_steps(num_inference_steps, num_timesteps)
    stride = num_timesteps // num_inference_steps
    # Down to 900 of 1000 a picture is nearly all noise (signal 0.12, at the end 0.07; at 599 0.40): pure noise will do.
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
) -> Tensor:
    """The paper's sampler, eq. 2 in every step; with fewer steps than the schedule has, it takes every k-th down to 0.

    noise (B,4,h,w) -> latents (B,4,h,w).  Source: paper eq. 2; Ho et al. 2020, algorithm 2.
    """
    assert len(generators) == len(noise), "ddpm needs one generator a picture"
    latents, timesteps = noise, leading_timesteps(num_inference_steps, schedule.num_timesteps)
    for step, timestep in enumerate(timesteps):
        last = step == len(timesteps) - 1
        eps = predict(latents, timestep, step)
        previous = -1 if last else timesteps[step + 1]
        fresh_noise = None if last else initial_noise(generators, *noise.shape[1:], device=noise.device).to(noise.dtype)
        latents = ddpm_step(schedule, latents, eps, timestep, previous, fresh_noise)
    return latents


def sample_ddim(predict: Predictor, schedule: NoiseSchedule, noise: Tensor, num_inference_steps: int) -> Tensor:
    """DDIM with Stable Diffusion's timesteps: 981, 961, ..., 1 for 50 steps.

    noise (B,4,h,w) -> latents (B,4,h,w), deterministic (eta = 0).  The last step goes to alphas_cumprod[0], not to 1,
    as it was published.  Source: Song et al. 2021, eq. 12.
    """
    latents, timesteps = noise, leading_timesteps(num_inference_steps, schedule.num_timesteps, offset=1)
    for step, timestep in enumerate(timesteps):
        eps = predict(latents, timestep, step)
        now, previous = schedule.at(timestep), schedule.at(timesteps[step + 1] if step + 1 < len(timesteps) else 0)
        latents = math.sqrt(previous) * predict_x0(latents, eps, now) + math.sqrt(1 - previous) * eps
    return latents


def linspace_timesteps(num_inference_steps: int, num_timesteps: int = 1000) -> list[int]:
    """Timesteps evenly from the noisiest towards 0, which is left out: 999, 949, ..., 50 for 20 steps."""
    _check_steps(num_inference_steps, num_timesteps - 1)
    return [int(t) for t in np.linspace(0, num_timesteps - 1, num_inference_steps + 1).round()[:0:-1]]


def sample_dpm_solver(predict: Predictor, schedule: NoiseSchedule, noise: Tensor, num_inference_steps: int) -> Tensor:
    """DPM-Solver++(2M): second order, multistep, deterministic; one evaluation a step, about 20 steps are enough.

    noise (B,4,h,w) -> latents (B,4,h,w).  Timesteps are evenly spaced from 999 (`linspace_timesteps`); the first step,
    which has no predecessor, and the last, which goes to zero noise, are of first order.  alpha = sqrt(abar),
    sigma = sqrt(1 - abar), lambda = log(alpha / sigma).  Source: Lu et al. 2022, "DPM-Solver++", algorithm 2.
    """
    timesteps = linspace_timesteps(num_inference_steps, schedule.num_timesteps)
    lambdas = [0.5 * math.log(schedule.at(t) / (1 - schedule.at(t))) for t in timesteps]
    latents, x0_before = noise, noise  # there is no x0 before the first step, and none is used
    for step, timestep in enumerate(timesteps):
        x0 = predict_x0(latents, predict(latents, timestep, step), schedule.at(timestep))
        if step == len(timesteps) - 1:
            latents = x0  # the limit sigma -> 0 of the update below with D = x0
        else:
            next_alpha, sigma = math.sqrt(schedule.at(timesteps[step + 1])), math.sqrt(1 - schedule.at(timestep))
            next_sigma = math.sqrt(1 - next_alpha**2)
            h = lambdas[step + 1] - lambdas[step]
            direction = x0  # D of the paper: x0 now, or where its last change leads half a step on
            if step > 0:
                r = (lambdas[step] - lambdas[step - 1]) / h
                direction = x0 + (x0 - x0_before) / (2 * r)
            latents = next_sigma / sigma * latents - next_alpha * math.expm1(-h) * direction
        x0_before = x0
    return latents


# --- the whole run ---


def steps_with_conditions(num_inference_steps: int, cond_tau: float) -> int:
    """How many of the first (noisiest) steps use the conditions; the last int((1 - tau) N) go without.

    As in the official code, whose int() cuts a float: tau 0.9 of 50 steps gives 46, not 45.
    """
    return num_inference_steps - int((1 - cond_tau) * num_inference_steps)


@torch.no_grad()
def sample_latents(
    unet: UNet,
    schedule: NoiseSchedule,
    context: Tensor,
    uncond_context: Tensor | None,
    cond_features: Sequence[Tensor] | None,
    noise: Tensor,
    sampler: str = "dpm++",
    num_inference_steps: int = 20,
    guidance_scale: float = 7.5,
    cond_tau: float = 1.0,
    generators: Sequence[torch.Generator] = (),
    progress: Progress | None = None,
) -> Tensor:
    """From noise to latents with guidance and conditions: everything between the encoders and `vae.decode`.

    context         (B,77,C)                   encoded prompts
    uncond_context  (B,77,C), (1,77,C), None   encoded negative or empty prompt; None only at guidance_scale 1
    cond_features   four maps (B or 1, ...)    computed once a geometry; None samples from text alone
    noise           (B,4,h,w)                  from `initial_noise`
    sampler         "dpm++", "ddim" or "ddpm"
    cond_tau        in [0,1], the first share of the steps that uses the conditions, see `steps_with_conditions`
    generators      one a picture, for the noise that ddpm adds in every step; the others add none
    returns         (B,4,h,w) scaled latents, float32
    Raises ValueError for an unknown sampler, steps out of range, a batch that does not fit.

    The arithmetic of the steps is float32 whatever the network computes in.
    """
    if len(context) != len(noise):
        raise ValueError(f"context has batch {len(context)} but noise has {len(noise)}")
    texts = join_guidance(unet, context, uncond_context, guidance_scale)
    conditioned = steps_with_conditions(num_inference_steps, cond_tau)

    def predict(latents: Tensor, timestep: int, step: int) -> Tensor:
        timesteps = torch.full((len(latents),), timestep, device=latents.device, dtype=torch.long)
        features = cond_features if step < conditioned else None
        output = guided_eps(unet, latents, timesteps, texts, guidance_scale, features).float()
        eps = eps_from_output(schedule, latents, output, timestep)
        if progress:
            progress(step + 1, num_inference_steps, predict_x0(latents, eps, schedule.at(timestep)))
        return eps

    noise = noise.float()  # the samplers add and subtract numbers of like size, step after step
    if sampler == "dpm++":
        return sample_dpm_solver(predict, schedule, noise, num_inference_steps)
    if sampler == "ddim":
        return sample_ddim(predict, schedule, noise, num_inference_steps)
    if sampler == "ddpm":
        return sample_ddpm(predict, schedule, noise, num_inference_steps, generators)
    raise ValueError(f"unknown sampler {sampler!r}, expected one of {', '.join(SAMPLERS)}")
