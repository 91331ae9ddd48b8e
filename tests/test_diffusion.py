"""Schedule, equations 1 to 3, guidance, samplers: against diffusers, hand counts, and data whose answer is known."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from torch import Tensor, nn

from hoi.diffusion import (
    NoiseSchedule,
    TrainingBatch,
    add_noise,
    ddpm_step,
    draw_training_noise,
    eps_from_output,
    eps_loss,
    guided_eps,
    hoi_loss,
    initial_noise,
    join_guidance,
    leading_timesteps,
    linspace_timesteps,
    sample_ddim,
    sample_ddpm,
    sample_dpm_solver,
    sample_latents,
    steps_with_conditions,
    training_target,
)
from hoi.unet import UNet, UNetConfig

SCHEDULE = NoiseSchedule.stable_diffusion()
VELOCITY = NoiseSchedule.stable_diffusion(predicts="v", terminal_signal=0.01)  # of the built-in model
STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class FakeUNet(nn.Module):
    """Bounded, nonlinear, different in every channel; depends on latents, time, context and features."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = 0.3 * normal(4, 4, 3, 3, seed=7)
        self.calls: list[tuple[int, bool]] = []  # batch and whether there were features

    def forward(
        self, latents: Tensor, timesteps: Tensor, context: Tensor, cond_features: list[Tensor] | None
    ) -> Tensor:
        self.calls.append((len(latents), cond_features is not None))
        phase = timesteps.view(-1, 1, 1, 1) / 300 + torch.tensor([0.0, 0.5, 1.0, 1.5]).view(1, 4, 1, 1)
        mixed = nn.functional.conv2d(latents, self.weight, padding=1) + context.mean(dim=(1, 2)).view(-1, 1, 1, 1)
        if cond_features is not None:
            repeats = len(latents) // len(cond_features[0])
            mixed = mixed + cond_features[0].repeat(repeats, 1, 1, 1)
        return torch.sin(mixed + phase) + 0.5 * latents


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


# --- schedule and noising ---


def test_schedule_has_the_values_of_stable_diffusion():
    assert math.isclose(SCHEDULE.at(0), 0.99915, abs_tol=1e-7)
    assert math.isclose(SCHEDULE.at(999), 0.0046601, abs_tol=5e-8)
    assert SCHEDULE.at(-1) == 1.0
    product = 1.0
    for t in range(501):  # the definition, one factor at a time
        product *= 1 - (math.sqrt(0.00085) + t / 999 * (math.sqrt(0.012) - math.sqrt(0.00085))) ** 2
    assert math.isclose(SCHEDULE.at(500), product, rel_tol=1e-12)


def test_noising_equals_diffusers_and_keeps_unit_variance():
    latents, noise, timesteps = normal(3, 4, 64, 64), normal(3, 4, 64, 64, seed=1), torch.tensor([0, 400, 999])
    noisy = add_noise(SCHEDULE, latents, noise, timesteps)
    expected = DDPMScheduler(**STABLE_DIFFUSION).add_noise(latents, noise, timesteps)
    torch.testing.assert_close(noisy, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(noisy.std(dim=(1, 2, 3)), torch.ones(3), atol=0.02, rtol=0)


def test_training_noise_covers_all_timesteps_evenly():
    timesteps, noise = draw_training_noise(SCHEDULE, torch.zeros(20000, 1, 1, 1), generators(0)[0])
    assert timesteps.min() == 0 and timesteps.max() == 999
    counts = torch.bincount(timesteps // 100, minlength=10)
    assert (counts - 2000).abs().max() < 200  # 4.7 standard deviations
    assert abs(noise.mean()) < 0.03 and abs(noise.std() - 1) < 0.03


# --- eq. 2 and the samplers ---


def test_ddpm_step_is_equation_2():
    x, eps, z, t = normal(1, 4, 2, 2), normal(1, 4, 2, 2, seed=1), normal(1, 4, 2, 2, seed=2), 300
    alpha_bar, alpha_bar_before = SCHEDULE.at(t), SCHEDULE.at(t - 1)
    alpha = alpha_bar / alpha_bar_before
    beta = (math.sqrt(0.00085) + t / 999 * (math.sqrt(0.012) - math.sqrt(0.00085))) ** 2
    assert math.isclose(alpha, 1 - beta, rel_tol=1e-12)
    for variance, sigma in (
        ("large", math.sqrt(beta)),
        ("small", math.sqrt(beta * (1 - alpha_bar_before) / (1 - alpha_bar))),
    ):
        expected = (x - (1 - alpha) / math.sqrt(1 - alpha_bar) * eps) / math.sqrt(alpha) + sigma * z
        torch.testing.assert_close(ddpm_step(SCHEDULE, x, eps, t, t - 1, z, variance), expected)
    with pytest.raises(ValueError, match="variance is 'huge'"):
        ddpm_step(SCHEDULE, x, eps, t, t - 1, z, "huge")


@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize("num_inference_steps", [20, 100])
def test_ddpm_trajectory_equals_diffusers(variance: str, num_inference_steps: int):
    noise, seen = normal(1, 4, 8, 8), []
    latents = sample_ddpm(fake_predictor(seen), SCHEDULE, noise, num_inference_steps, generators(3), variance)
    scheduler = DDPMScheduler(**STABLE_DIFFUSION, variance_type=f"fixed_{variance}", clip_sample=False)
    expected = diffusers_trajectory(scheduler, noise, num_inference_steps, generator=generators(3)[0])
    torch.testing.assert_close(torch.stack([*seen, latents]), torch.stack(expected), atol=1e-4, rtol=0)


@pytest.mark.parametrize("num_inference_steps", [1, 2, 10, 50])
def test_ddim_trajectory_equals_diffusers(num_inference_steps: int):
    noise, seen = normal(2, 4, 8, 8), []
    latents = sample_ddim(fake_predictor(seen), SCHEDULE, noise, num_inference_steps)
    scheduler = DDIMScheduler(**STABLE_DIFFUSION, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    expected = diffusers_trajectory(scheduler, noise, num_inference_steps)
    torch.testing.assert_close(torch.stack([*seen, latents]), torch.stack(expected), atol=1e-4, rtol=0)


def test_noisy_ddim_equals_diffusers():
    noise, seen = normal(1, 4, 8, 8), []
    latents = sample_ddim(fake_predictor(seen), SCHEDULE, noise, 20, eta=0.7, generators=generators(5))
    scheduler = DDIMScheduler(**STABLE_DIFFUSION, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    expected = diffusers_trajectory(scheduler, noise, 20, eta=0.7, generator=generators(5)[0])
    torch.testing.assert_close(torch.stack([*seen, latents]), torch.stack(expected), atol=1e-4, rtol=0)


@pytest.mark.parametrize("num_inference_steps", [1, 2, 10, 14, 15, 20, 50])
def test_dpm_solver_trajectory_equals_diffusers(num_inference_steps: int):
    noise, seen = normal(2, 4, 8, 8), []
    latents = sample_dpm_solver(fake_predictor(seen), SCHEDULE, noise, num_inference_steps)
    scheduler = DPMSolverMultistepScheduler(
        **STABLE_DIFFUSION, algorithm_type="dpmsolver++", solver_order=2, solver_type="midpoint", lower_order_final=True
    )
    expected = diffusers_trajectory(scheduler, noise, num_inference_steps)
    torch.testing.assert_close(torch.stack([*seen, latents]), torch.stack(expected), atol=1e-4, rtol=0)


def test_timesteps_are_those_of_stable_diffusion():
    assert leading_timesteps(50, offset=1) == list(range(981, 0, -20))
    assert leading_timesteps(1000, offset=1) == list(range(999, -1, -1))  # no room for the offset
    assert linspace_timesteps(20)[:3] == [999, 949, 899] and linspace_timesteps(20)[-1] == 50


@pytest.mark.parametrize("sampler", ["dpm++", "ddim", "ddim eta 1", "ddpm"])
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
        "ddim eta 1": lambda: sample_ddim(predict, SCHEDULE, noise, 200, 1.0, own),
        "ddpm": lambda: sample_ddpm(predict, SCHEDULE, noise, 1000, own),
    }[sampler]()
    assert abs(latents.mean() - mean) < 0.03
    assert abs(latents.std() - deviation) < 0.03


# --- networks that predict v, and a schedule that ends in noise ---


def test_terminal_signal_moves_only_the_noisy_end_as_published():
    assert math.isclose(VELOCITY.at(999), 0.01**2, rel_tol=1e-9) and math.isclose(VELOCITY.at(0), SCHEDULE.at(0))
    almost_zero = NoiseSchedule.stable_diffusion(terminal_signal=1e-7).alphas_cumprod
    published = DDIMScheduler(**STABLE_DIFFUSION, rescale_betas_zero_snr=True).alphas_cumprod
    torch.testing.assert_close(almost_zero.float(), published, atol=2e-6, rtol=0)
    with pytest.raises(ValueError, match="terminal_signal is 0.1, expected above 0 and below 0.068"):
        NoiseSchedule.stable_diffusion(terminal_signal=0.1)
    with pytest.raises(ValueError, match="predicts eps or v, got 'x0'"):
        NoiseSchedule.stable_diffusion(predicts="x0")


def test_velocity_equals_diffusers_and_gives_the_noise_back():
    latents, noise, timesteps = normal(3, 4, 8, 8), normal(3, 4, 8, 8, seed=1), torch.tensor([0, 400, 999])
    plain_end = NoiseSchedule.stable_diffusion(predicts="v")
    target = training_target(plain_end, latents, noise, timesteps)
    expected = DDPMScheduler(**STABLE_DIFFUSION).get_velocity(latents, noise, timesteps)
    torch.testing.assert_close(target, expected, atol=1e-5, rtol=0)
    noisy = add_noise(plain_end, latents, noise, timesteps)
    for i, timestep in enumerate(timesteps.tolist()):
        eps = eps_from_output(plain_end, noisy[i : i + 1], target[i : i + 1], timestep)
        torch.testing.assert_close(eps, noise[i : i + 1], atol=1e-5, rtol=0)


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


# --- eq. 3 ---


class FakeNetwork(nn.Module):
    """eps = gain * noisy + an "encoder" of the conditions with a bias, as the real encoders have one."""

    def __init__(self) -> None:
        super().__init__()
        self.gain, self.bias = nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.tensor(0.25))
        self.seen: list[tuple[Tensor, ...] | None] = []

    def forward(
        self, noisy: Tensor, timesteps: Tensor, context: Tensor, conditions: tuple[Tensor, ...] | None
    ) -> Tensor:
        self.seen.append(conditions)
        eps = self.gain * noisy + context.mean(dim=(1, 2)).view(-1, 1, 1, 1) + timesteps.view(-1, 1, 1, 1) / 1000
        return (
            eps
            if conditions is None
            else eps + sum(c.mean(dim=(1, 2, 3)).view(-1, 1, 1, 1) for c in conditions) + self.bias
        )


def batch(count: int, seed: int, with_conditions: bool) -> TrainingBatch:
    conditions = tuple(normal(count, 3, 16, 16, seed=seed + i).abs() for i in range(3))
    return TrainingBatch(
        latents=normal(count, 4, 4, 4, seed=seed),
        context=normal(count, 77, 2, seed=seed + 1),
        timesteps=torch.tensor([10, 500, 900][:count]),
        noise=normal(count, 4, 4, 4, seed=seed + 2),
        conditions=conditions if with_conditions else None,
    )


def squared_error_by_hand(example: TrainingBatch, index: int, condition_mean: float | None) -> float:
    """The mean squared error of one picture under FakeNetwork, in plain numbers."""
    alpha_bar, t = SCHEDULE.at(int(example.timesteps[index])), int(example.timesteps[index])
    x, eps = example.latents[index].double().numpy(), example.noise[index].double().numpy()
    predicted = (
        0.5 * (np.sqrt(alpha_bar) * x + np.sqrt(1 - alpha_bar) * eps) + example.context[index].mean().item() + t / 1000
    )
    if condition_mean is not None:
        predicted = predicted + condition_mean + 0.25
    return float(((predicted - eps) ** 2).mean())


def test_loss_is_equation_3():
    hoi, reg, network = batch(3, 10, True), batch(2, 20, False), FakeNetwork()
    loss, parts = hoi_loss(network, SCHEDULE, hoi, reg, reg_weight=0.7)
    hoi_term = sum(squared_error_by_hand(hoi, i, sum(c[i].mean().item() for c in hoi.conditions)) for i in range(3)) / 3
    reg_term = sum(squared_error_by_hand(reg, i, 0.0) for i in range(2)) / 2
    assert math.isclose(parts["hoi"].item(), hoi_term, rel_tol=1e-5)
    assert math.isclose(parts["reg"].item(), reg_term, rel_tol=1e-5)
    assert math.isclose(loss.item(), hoi_term + 0.7 * reg_term, rel_tol=1e-5)
    alone, parts = hoi_loss(network, SCHEDULE, hoi)
    assert math.isclose(alone.item(), hoi_term, rel_tol=1e-5) and parts.keys() == {"hoi"}


def test_regularization_shows_the_encoders_three_black_pictures_and_trains_them():
    hoi, reg, network = batch(3, 10, True), batch(2, 20, True), FakeNetwork()
    with_reg, _ = hoi_loss(network, SCHEDULE, hoi, reg)
    (conditions,) = network.seen  # one evaluation for both terms
    for image, given in zip(conditions, hoi.conditions, strict=True):
        assert torch.equal(image[:3], given)
        assert image.shape[0] == 5 and not image[3:].any()
    without, _ = hoi_loss(network, SCHEDULE, hoi)
    (gradient,) = torch.autograd.grad(with_reg - without, network.bias)
    assert gradient.abs() > 0.01


def test_loss_without_conditions_gives_the_network_none():
    example, network = batch(3, 10, True), FakeNetwork()
    expected = sum(squared_error_by_hand(example, i, None) for i in range(3)) / 3
    assert math.isclose(eps_loss(network, SCHEDULE, example).item(), expected, rel_tol=1e-5)
    assert network.seen == [None]


def test_losses_of_a_network_that_predicts_v_are_its_squared_velocity_error():
    hoi, reg, network = batch(3, 10, True), batch(2, 20, False), FakeNetwork()

    def error(example: TrainingBatch, conditions: tuple[Tensor, ...] | None) -> Tensor:
        signal = torch.tensor([math.sqrt(VELOCITY.at(int(t))) for t in example.timesteps]).view(-1, 1, 1, 1)
        spread = (1 - signal**2).sqrt()
        noisy = signal * example.latents + spread * example.noise
        velocity = signal * example.noise - spread * example.latents
        output = network(noisy, example.timesteps, example.context, conditions)
        return (output - velocity).square().mean()

    blank = tuple(torch.zeros(2, 3, 16, 16) for _ in range(3))
    loss, parts = hoi_loss(network, VELOCITY, hoi, reg, reg_weight=0.7)
    torch.testing.assert_close(parts["hoi"], error(hoi, hoi.conditions).detach(), atol=1e-5, rtol=0)
    torch.testing.assert_close(loss, error(hoi, hoi.conditions) + 0.7 * error(reg, blank), atol=1e-5, rtol=0)
    torch.testing.assert_close(hoi_loss(network, VELOCITY, hoi)[0], error(hoi, hoi.conditions), atol=1e-5, rtol=0)
    torch.testing.assert_close(eps_loss(network, VELOCITY, hoi), error(hoi, None), atol=1e-5, rtol=0)


def test_equation_3_needs_conditions():
    with pytest.raises(ValueError, match="hand-object batch of eq. 3 has no conditions"):
        hoi_loss(FakeNetwork(), SCHEDULE, batch(1, 0, False))


# --- guidance ---


def small_unet() -> UNet:
    """A real U-Net with every parameter drawn, so that text and features reach the output."""
    unet = UNet(
        UNetConfig(
            model_channels=32,
            channel_mult=(1, 2),
            num_res_blocks=1,
            attention_levels=(0, 1),
            num_heads=4,
            context_dim=16,
        )
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in unet.named_parameters():
            is_gain = tensor.ndim == 1 and name.endswith("weight")
            spread = 0.1 if tensor.ndim == 1 else tensor[0].numel() ** -0.5
            tensor.copy_(is_gain + spread * torch.randn(tensor.shape, generator=generator))
    return unet.eval()


def small_inputs(count: int) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """context, uncond_context, latents, cond_features for small_unet."""
    features = [normal(count, 32, 8, 8, seed=4), normal(count, 64, 4, 4, seed=5)]
    return normal(count, 77, 16, seed=1), normal(1, 77, 16, seed=2), normal(count, 4, 8, 8, seed=3), features


@torch.no_grad()
def test_guidance_mixes_both_branches_on_all_four_channels():
    unet, (context, uncond_context, latents, features) = small_unet(), small_inputs(2)
    timesteps = torch.tensor([700, 700])
    cond = unet(latents, timesteps, context, features)
    uncond = unet(latents, timesteps, uncond_context.expand(2, -1, -1), features)
    gap = (cond - uncond).abs().amax(dim=(0, 2, 3))
    assert gap.min() > 0.01  # text matters in every channel, or the test would show nothing
    for guidance_scale in (0.0, 0.999, 1.0, 1.001, 7.5):
        guidance = join_guidance(unet, context, uncond_context, guidance_scale)
        eps = guided_eps(unet, latents, timesteps, guidance, features)
        torch.testing.assert_close(eps, uncond + guidance_scale * (cond - uncond), atol=5e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize(("guidance_scale", "evaluated"), [(0.0, 2), (1.0, 2), (7.5, 4)])
def test_guidance_is_one_evaluation_and_only_of_what_it_needs(guidance_scale: float, evaluated: int):
    unet, latents, context = FakeUNet(), normal(2, 4, 8, 8), normal(2, 77, 3)
    guidance = join_guidance(unet, context, None if guidance_scale == 1 else torch.zeros(1, 77, 3), guidance_scale)
    guided_eps(unet, latents, torch.tensor([5, 5]), guidance, None)
    assert unet.calls == [(evaluated, False)]


def test_guidance_says_what_is_wrong_with_the_unconditional_context():
    unet, context = FakeUNet(), torch.zeros(2, 77, 3)
    with pytest.raises(ValueError, match="guidance_scale 2.0 needs uncond_context"):
        join_guidance(unet, context, None, 2.0)
    with pytest.raises(ValueError, match=r"uncond_context is \(3, 77, 3\), expected \(2, 77, 3\) or batch 1"):
        join_guidance(unet, context, torch.zeros(3, 77, 3), 2.0)


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
            0.5,
            own,
        )

    together, alone = run([0, 1, 2], [11, 12, 13]), run([1], [12])
    assert together.std() > 0.1
    torch.testing.assert_close(together[1:2], alone, atol=1e-4, rtol=1e-4)
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
    calls, told = [], []
    for attention in unet.cross_attentions():
        attention.to_k.register_forward_hook(lambda *_: calls.append(1))
    sample_latents(
        unet, SCHEDULE, context, uncond_context, features, noise, "dpm++", 4, progress=lambda *done: told.append(done)
    )
    assert len(calls) == len(unet.cross_attentions())
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sampler": "euler"}, r"unknown sampler 'euler', expected one of dpm\+\+, ddim, ddpm"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0, expected 1 to 999"),
        ({"sampler": "ddim", "num_inference_steps": 600}, "600 steps of stride 1 leave out the noisiest of 1000"),
        ({"sampler": "ddpm"}, "one generator a picture: expected 2, got 0"),
        ({"sampler": "ddim", "eta": 1.0}, "one generator a picture: expected 2, got none"),
        ({"cond_tau": 1.5}, "cond_tau is 1.5"),
        ({"context": torch.zeros(3, 77, 3)}, "context has batch 3 but noise has 2"),
    ],
)
def test_wrong_requests_say_what_was_expected(arguments: dict, message: str):
    request = {"context": torch.zeros(2, 77, 3), "noise": torch.zeros(2, 4, 8, 8), "guidance_scale": 1.0, **arguments}
    with pytest.raises(ValueError, match=message):
        sample_latents(FakeUNet(), SCHEDULE, uncond_context=None, cond_features=None, **request)
