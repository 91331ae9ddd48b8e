"""Samplers and the whole run: against diffusers, and data whose answer is known."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from fake_networks import SCHEDULE, STABLE_DIFFUSION, VELOCITY, FakeUNet, generators, normal, small_inputs, small_unet
from rounding import rounding, unet_operations
from torch import Tensor

from hoi.network.diffusion import NoiseSchedule
from hoi.network.samplers import (
    initial_noise,
    leading_timesteps,
    linspace_timesteps,
    sample_ddim,
    sample_ddpm,
    sample_dpm_solver,
    sample_latents,
    steps_with_conditions,
)


def fake_predictor(seen: list[Tensor]):
    """A predictor that notes every latents it is asked about: the trajectory."""
    unet, context = FakeUNet(), torch.zeros(1, 77, 1)

    def predict(latents: Tensor, timestep: int, step: int) -> Tensor:
        assert step == len(seen)
        seen.append(latents)
        return unet(latents, torch.full((len(latents),), timestep), context.expand(len(latents), -1, -1), None)

    return predict


def diffusers_trajectory(scheduler, noise: Tensor, num_inference_steps: int, **step_arguments) -> list[Tensor]:
    scheduler.set_timesteps(num_inference_steps)
    seen: list[Tensor] = []
    predict, latents = fake_predictor(seen), noise
    for step, timestep in enumerate(scheduler.timesteps.tolist()):
        latents = scheduler.step(predict(latents, timestep, step), timestep, latents, **step_arguments).prev_sample
    return [*seen, latents]


def assert_same_trajectory(ours: list[Tensor], expected: list[Tensor]) -> None:
    """Every step adds its rounding: the fake network's and the sampler's fifteen operations or so."""
    steps, expected = len(expected) - 1, torch.stack(expected)
    torch.testing.assert_close(torch.stack(ours), expected, atol=rounding(expected, 15 * steps), rtol=0)


# --- samplers ---


@pytest.mark.parametrize("num_inference_steps", [20, 100])
def test_ddpm_trajectory_equals_diffusers(num_inference_steps: int):
    noise, seen = normal(1, 4, 8, 8), []
    latents = sample_ddpm(fake_predictor(seen), SCHEDULE, noise, num_inference_steps, generators(3))
    scheduler = DDPMScheduler(**STABLE_DIFFUSION, variance_type="fixed_small", clip_sample=False)
    expected = diffusers_trajectory(scheduler, noise, num_inference_steps, generator=generators(3)[0])
    assert_same_trajectory([*seen, latents], expected)


@pytest.mark.parametrize("num_inference_steps", [1, 2, 10, 50])
def test_ddim_trajectory_equals_diffusers(num_inference_steps: int):
    noise, seen = normal(2, 4, 8, 8), []
    latents = sample_ddim(fake_predictor(seen), SCHEDULE, noise, num_inference_steps)
    scheduler = DDIMScheduler(**STABLE_DIFFUSION, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    expected = diffusers_trajectory(scheduler, noise, num_inference_steps)
    assert_same_trajectory([*seen, latents], expected)


@pytest.mark.parametrize("num_inference_steps", [1, 2, 10, 14, 15, 20, 50])
def test_dpm_solver_trajectory_equals_diffusers(num_inference_steps: int):
    noise, seen = normal(2, 4, 8, 8), []
    latents = sample_dpm_solver(fake_predictor(seen), SCHEDULE, noise, num_inference_steps)
    scheduler = DPMSolverMultistepScheduler(
        **STABLE_DIFFUSION, algorithm_type="dpmsolver++", solver_order=2, solver_type="midpoint", lower_order_final=True
    )
    expected = diffusers_trajectory(scheduler, noise, num_inference_steps)
    assert_same_trajectory([*seen, latents], expected)


def test_timesteps_are_those_of_stable_diffusion():
    assert leading_timesteps(50, offset=1) == list(range(981, 0, -20))
    assert leading_timesteps(1000, offset=1) == list(range(999, -1, -1))  # no room for the offset
    assert linspace_timesteps(20)[:3] == [999, 949, 899] and linspace_timesteps(20)[-1] == 50


@pytest.mark.parametrize("sampler", ["dpm++", "ddim", "ddpm"])
def test_samplers_turn_noise_into_the_data_they_were_given(sampler: str):
    """Data N(1.5, 0.5^2): its best eps is known in closed form, so samples must have this mean and deviation."""
    mean, deviation = 1.5, 0.5

    def predict(latents: Tensor, timestep: int, step: int) -> Tensor:
        alpha_bar = SCHEDULE.at(timestep)
        distance = latents - math.sqrt(alpha_bar) * mean
        return math.sqrt(1 - alpha_bar) * distance / (alpha_bar * deviation**2 + 1 - alpha_bar)

    # The schedule ends with a little signal left: start where the data ends up at 999, not at mean 0.
    last = SCHEDULE.at(999)
    noise = (
        initial_noise(generators(0, 1), 4, 64, 64) * math.sqrt(last * deviation**2 + 1 - last) + math.sqrt(last) * mean
    )
    own = generators(2, 3)
    latents = {
        "dpm++": lambda: sample_dpm_solver(predict, SCHEDULE, noise, 50),
        "ddim": lambda: sample_ddim(predict, SCHEDULE, noise, 100),
        "ddpm": lambda: sample_ddpm(predict, SCHEDULE, noise, 1000, own),
    }[sampler]()
    assert abs(latents.mean() - mean) < 0.03
    assert abs(latents.std() - deviation) < 0.03


# --- networks that predict v, and a schedule that ends in noise ---


@pytest.mark.parametrize("sampler", ["dpm++", "ddim", "ddpm"])
def test_a_network_that_predicts_v_is_sampled_as_in_diffusers(sampler: str):
    noise, unet = normal(2, 4, 8, 8), FakeUNet()
    latents = sample_latents(
        unet, VELOCITY, torch.zeros(2, 77, 1), None, None, noise, sampler, 20, 1.0, generators=generators(3, 4)
    )
    alphas_cumprod = VELOCITY.alphas_cumprod
    ratios = torch.cat([alphas_cumprod[:1], alphas_cumprod[1:] / alphas_cumprod[:-1]])
    same = {"trained_betas": (1 - ratios).numpy(), "prediction_type": "v_prediction"}
    if sampler == "dpm++":
        scheduler = DPMSolverMultistepScheduler(**same, algorithm_type="dpmsolver++", lower_order_final=True)
    elif sampler == "ddim":
        scheduler = DDIMScheduler(**same, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    else:
        scheduler = DDPMScheduler(**same, variance_type="fixed_small", clip_sample=False)
    for i in range(2):  # one by one, since diffusers' ddpm draws the noise of a batch from one generator
        own = {"generator": generators(3 + i)[0]} if sampler == "ddpm" else {}
        expected = diffusers_trajectory(scheduler, noise[i : i + 1], 20, **own)[-1]
        torch.testing.assert_close(latents[i : i + 1], expected, atol=2e-4, rtol=0)


def test_pure_noise_reaches_the_data_only_where_the_schedule_ends_in_noise():
    """Data N(1.5, 0.1^2): Stable Diffusion's schedule cannot leave the noise's mean of 0 behind."""
    mean, deviation, means = 1.5, 0.1, {}
    schedules = {"plain": SCHEDULE, "ends in noise": NoiseSchedule.stable_diffusion(terminal_signal=0.01)}
    for name, schedule in schedules.items():

        def predict(latents: Tensor, timestep: int, step: int, schedule: NoiseSchedule = schedule) -> Tensor:
            alpha_bar = schedule.at(timestep)
            distance = latents.double() - math.sqrt(alpha_bar) * mean
            return math.sqrt(1 - alpha_bar) * distance / (alpha_bar * deviation**2 + 1 - alpha_bar)

        # What a network does with the mean over a picture, where noise averages out: one pixel of small noise.
        means[name] = sample_dpm_solver(predict, schedule, torch.zeros(1, 4, 1, 1).double(), 20).mean().item()
    assert abs(means["ends in noise"] - mean) < 0.25 * abs(means["plain"] - mean)


# --- the whole run ---


@pytest.mark.parametrize(("cond_tau", "steps"), [(1.0, 50), (0.9, 46), (0.8, 41), (0.5, 25), (0.4, 20), (0.0, 0)])
def test_tau_uses_the_conditions_in_as_many_steps_as_the_official_code(cond_tau: float, steps: int):
    assert steps_with_conditions(50, cond_tau) == steps


def test_conditions_act_in_the_noisiest_steps():
    unet, noise = FakeUNet(), normal(1, 4, 8, 8)
    sample_latents(
        unet, SCHEDULE, torch.zeros(1, 77, 3), None, [torch.ones(1, 4, 8, 8)], noise, "ddim", 4, 1.0, cond_tau=0.5
    )
    assert [has_features for _, has_features in unet.calls] == [True, True, False, False]


@pytest.mark.parametrize("sampler", ["dpm++", "ddim", "ddpm"])
def test_a_picture_does_not_depend_on_its_batch(sampler: str):
    unet, (context, uncond_context, _, features) = small_unet(), small_inputs(3)

    def run(rows: list[int], seeds: list[int]) -> Tensor:
        own = generators(*seeds)
        noise = initial_noise(own, 4, 8, 8)
        return sample_latents(
            unet,
            SCHEDULE,
            context[rows],
            uncond_context,
            [f[rows] for f in features],
            noise,
            sampler,
            5,
            3.0,
            1.0,
            own,
        )

    together, alone = run([0, 1, 2], [11, 12, 13]), run([1], [12])
    assert together.std() > 0.1
    # Not bit for bit: another batch size means other matrix kernels, in each of the five evaluations in a row.
    torch.testing.assert_close(together[1:2], alone, atol=rounding(alone, 5 * unet_operations(unet)), rtol=0)
    assert (together[0] - together[1]).abs().max() > 0.1
    assert torch.equal(initial_noise(generators(11, 12), 4, 8, 8)[1:], initial_noise(generators(12), 4, 8, 8))


def test_one_geometry_serves_a_whole_batch():
    unet, (context, uncond_context, noise, features) = small_unet(), small_inputs(2)
    shared = [f[:1] for f in features]
    repeated = [f.repeat(2, 1, 1, 1) for f in shared]
    one, many = (
        sample_latents(unet, SCHEDULE, context, uncond_context, f, noise, "dpm++", 3, 3.0) for f in (shared, repeated)
    )
    torch.testing.assert_close(one, many, atol=1e-5, rtol=0)


def test_text_keys_are_computed_once_a_run_and_progress_is_told():
    unet, (context, uncond_context, noise, features) = small_unet(), small_inputs(2)
    calls, told, seen = [], [], []

    def note(step: int, steps: int, x0: torch.Tensor) -> None:
        told.append((step, steps))
        seen.append(x0)

    for attention in unet.cross_attentions():
        attention.to_k.register_forward_hook(lambda *_: calls.append(1))
    latents = sample_latents(unet, SCHEDULE, context, uncond_context, features, noise, "dpm++", 4, progress=note)
    assert len(calls) == len(unet.cross_attentions())
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert torch.equal(seen[-1], latents) and not torch.equal(seen[0], latents)  # dpm++ ends in the last x0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sampler": "euler"}, r"unknown sampler 'euler', expected one of dpm\+\+, ddim, ddpm"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0, expected 1 to 999"),
        ({"sampler": "ddim", "num_inference_steps": 600}, "600 steps of stride 1 leave out the noisiest of 1000"),
        ({"context": torch.zeros(3, 77, 3)}, "context has batch 3 but noise has 2"),
    ],
)
def test_wrong_requests_say_what_was_expected(arguments: dict, message: str):
    request = {"context": torch.zeros(2, 77, 3), "noise": torch.zeros(2, 4, 8, 8), "guidance_scale": 1.0, **arguments}
    with pytest.raises(ValueError, match=message):
        sample_latents(FakeUNet(), SCHEDULE, uncond_context=None, cond_features=None, **request)
