"""Schedule, equations 1 to 3, guidance: against diffusers, hand counts, and numbers worked out beside the code."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from fake_networks import (
    SCHEDULE,
    STABLE_DIFFUSION,
    VELOCITY,
    FakeUNet,
    generators,
    model_inputs,
    normal,
    small_inputs,
    small_model,
    small_unet,
)
from rounding import rounding, unet_operations
from torch import Tensor, nn

from hoi.network.diffusion import (
    NoiseSchedule,
    TrainingBatch,
    add_noise,
    ddpm_step,
    draw_training_noise,
    eps_from_output,
    eps_loss,
    guided_eps,
    hoi_loss,
    join_guidance,
    training_target,
)
from hoi.network.model import CONDITION_NAMES

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
    timesteps, noise = draw_training_noise(SCHEDULE, (20000, 1, 1, 1), generators(0)[0])
    assert timesteps.min() == 0 and timesteps.max() == 999
    counts = torch.bincount(timesteps // 100, minlength=10)
    assert (counts - 2000).abs().max() < 200  # 4.7 standard deviations
    assert abs(noise.mean()) < 0.03 and abs(noise.std() - 1) < 0.03


# --- eq. 2 ---


def test_ddpm_step_is_equation_2():
    x, eps, z, t = normal(1, 4, 2, 2), normal(1, 4, 2, 2, seed=1), normal(1, 4, 2, 2, seed=2), 300
    alpha_bar, alpha_bar_before = SCHEDULE.at(t), SCHEDULE.at(t - 1)
    alpha = alpha_bar / alpha_bar_before
    beta = (math.sqrt(0.00085) + t / 999 * (math.sqrt(0.012) - math.sqrt(0.00085))) ** 2
    assert math.isclose(alpha, 1 - beta, rel_tol=1e-12)
    sigma = math.sqrt(beta * (1 - alpha_bar_before) / (1 - alpha_bar))
    mean = (x - (1 - alpha) / math.sqrt(1 - alpha_bar) * eps) / math.sqrt(alpha)
    torch.testing.assert_close(ddpm_step(SCHEDULE, x, eps, t, t - 1, z), mean + sigma * z)
    torch.testing.assert_close(ddpm_step(SCHEDULE, x, eps, t, t - 1, None), mean)


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


# --- eq. 3 ---


class FakeNetwork(nn.Module):
    """eps = gain * noisy + an "encoder" of the conditions with a bias, as the real encoders have one."""

    def __init__(self) -> None:
        super().__init__()
        self.gain, self.bias = nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.tensor(0.25))
        self.seen: list[dict[str, Tensor] | None] = []

    def forward(
        self, noisy: Tensor, timesteps: Tensor, context: Tensor, conditions: dict[str, Tensor] | None
    ) -> Tensor:
        self.seen.append(conditions)
        eps = self.gain * noisy + context.mean(dim=(1, 2)).view(-1, 1, 1, 1) + timesteps.view(-1, 1, 1, 1) / 1000
        return (
            eps
            if conditions is None
            else eps + sum(c.mean(dim=(1, 2, 3)).view(-1, 1, 1, 1) for c in conditions.values()) + self.bias
        )


def batch(count: int, seed: int, conditions: str | None) -> TrainingBatch:
    """conditions: "drawn", "black" or None."""
    images = {name: normal(count, 3, 16, 16, seed=seed + i).abs() for i, name in enumerate(CONDITION_NAMES)}
    if conditions == "black":
        images = {name: torch.zeros_like(image) for name, image in images.items()}
    return TrainingBatch(
        latents=normal(count, 4, 4, 4, seed=seed),
        context=normal(count, 77, 2, seed=seed + 1),
        timesteps=torch.tensor([10, 500, 900][:count]),
        noise=normal(count, 4, 4, 4, seed=seed + 2),
        conditions=images if conditions else None,
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
    hoi, reg, network = batch(3, 10, "drawn"), batch(2, 20, "black"), FakeNetwork()
    loss, parts = hoi_loss(network, SCHEDULE, hoi, reg, reg_weight=0.7)
    means = [sum(image[i].mean().item() for image in hoi.conditions.values()) for i in range(3)]
    hoi_term = sum(squared_error_by_hand(hoi, i, means[i]) for i in range(3)) / 3
    reg_term = sum(squared_error_by_hand(reg, i, 0.0) for i in range(2)) / 2
    assert math.isclose(parts["hoi"].item(), hoi_term, rel_tol=1e-5)
    assert math.isclose(parts["reg"].item(), reg_term, rel_tol=1e-5)
    assert math.isclose(loss.item(), hoi_term + 0.7 * reg_term, rel_tol=1e-5)
    assert math.isclose(eps_loss(network, SCHEDULE, hoi).item(), hoi_term, rel_tol=1e-5)


def test_regularization_shows_the_encoders_three_black_pictures_and_trains_them():
    hoi, reg, network = batch(3, 10, "drawn"), batch(2, 20, "black"), FakeNetwork()
    with_reg, _ = hoi_loss(network, SCHEDULE, hoi, reg)
    (conditions,) = network.seen  # one evaluation for both terms
    for name, given in hoi.conditions.items():
        assert torch.equal(conditions[name][:3], given)
        assert conditions[name].shape[0] == 5 and not conditions[name][3:].any()
    without = eps_loss(network, SCHEDULE, hoi)
    (gradient,) = torch.autograd.grad(with_reg - without, network.bias)
    assert gradient.abs() > 0.01


def test_loss_without_conditions_gives_the_network_none():
    example, network = batch(3, 10, None), FakeNetwork()
    expected = sum(squared_error_by_hand(example, i, None) for i in range(3)) / 3
    assert math.isclose(eps_loss(network, SCHEDULE, example).item(), expected, rel_tol=1e-5)
    assert network.seen == [None]


def test_losses_of_a_network_that_predicts_v_are_its_squared_velocity_error():
    hoi, reg, network = batch(3, 10, "drawn"), batch(2, 20, "black"), FakeNetwork()

    def error(example: TrainingBatch) -> Tensor:
        signal = torch.tensor([math.sqrt(VELOCITY.at(int(t))) for t in example.timesteps]).view(-1, 1, 1, 1)
        spread = (1 - signal**2).sqrt()
        noisy = signal * example.latents + spread * example.noise
        velocity = signal * example.noise - spread * example.latents
        output = network(noisy, example.timesteps, example.context, example.conditions)
        return (output - velocity).square().mean()

    loss, parts = hoi_loss(network, VELOCITY, hoi, reg, reg_weight=0.7)
    torch.testing.assert_close(parts["hoi"], error(hoi).detach(), atol=1e-5, rtol=0)
    torch.testing.assert_close(loss, error(hoi) + 0.7 * error(reg), atol=1e-5, rtol=0)
    for example in (hoi, batch(3, 10, None)):
        torch.testing.assert_close(eps_loss(network, VELOCITY, example), error(example), atol=1e-5, rtol=0)


@pytest.mark.parametrize("count", [2, 1], ids=["both terms", "one term"])
def test_loss_and_gradients_are_bit_for_bit_those_of_the_parts_called_by_hand(count):
    """Eq. 3's f is HOIDiffusion.forward: encoders and U-Net called one by one give the same bits."""
    model = small_model().train()
    trained = model.freeze_for_fine_tuning()
    hoi, reg = (TrainingBatch(**model_inputs(seed), noise=normal(2, 4, 8, 8, seed=seed)) for seed in (1, 2))
    reg = dataclasses.replace(reg, conditions={name: torch.zeros(2, 3, 32, 32) for name in CONDITION_NAMES})
    loss = hoi_loss(model, SCHEDULE, hoi, reg, 0.7)[0] if count == 2 else eps_loss(model, SCHEDULE, hoi)
    found = torch.autograd.grad(loss, trained)

    both = [hoi, reg][:count]
    latents, noise, timesteps, context = (
        torch.cat([getattr(each, name) for each in both]) for name in ("latents", "noise", "timesteps", "context")
    )
    abar = SCHEDULE.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    noisy = abar.sqrt().float() * latents + (1 - abar).sqrt().float() * noise
    encoded = [model.condition_encoders[name](torch.cat([each.conditions[name] for each in both]))
               for name in ("skeleton", "normal", "segmentation")]  # fmt: skip
    features = [skeleton + normals + segmentation for skeleton, normals, segmentation in zip(*encoded, strict=True)]
    error = (model.unet(noisy, timesteps, context, features) - noise).square()
    expected = error.mean()
    if count == 2:
        a_picture = error.flatten(1).mean(dim=1)
        expected = a_picture[:2].mean() + 0.7 * a_picture[2:].mean()
    assert torch.equal(loss, expected) and len(trained) > 50
    for gradient, other in zip(found, torch.autograd.grad(expected, trained), strict=True):
        assert torch.equal(gradient, other)


# --- guidance ---


@torch.no_grad()
def test_guidance_mixes_both_branches_on_all_four_channels():
    unet, (context, uncond_context, latents, features) = small_unet(), small_inputs(2)
    timesteps = torch.tensor([700, 700])
    cond = unet(latents, timesteps, context, features)
    uncond = unet(latents, timesteps, uncond_context.expand(2, -1, -1), features)
    gap = (cond - uncond).abs().amax(dim=(0, 2, 3))
    assert gap.min() > 0.01  # text matters in every channel, or the test would show nothing
    one_pass = rounding(torch.stack([uncond, cond]), unet_operations(unet))
    for guidance_scale in (0.0, 0.999, 1.0, 1.001, 7.5):
        texts = join_guidance(unet, context, uncond_context, guidance_scale)
        eps = guided_eps(unet, latents, timesteps, texts, guidance_scale, features)
        expected = uncond + guidance_scale * (cond - uncond)
        # Both branches in one batch round otherwise than alone, and guidance multiplies what each is off by.
        tolerance = (abs(1 - guidance_scale) + guidance_scale) * one_pass
        assert guidance_scale == 1 or 10 * tolerance < abs(guidance_scale - 1) * gap.min()  # a slip would show
        torch.testing.assert_close(eps, expected, atol=tolerance, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize(("guidance_scale", "evaluated"), [(0.0, 2), (1.0, 2), (7.5, 4)])
def test_guidance_is_one_evaluation_and_only_of_what_it_needs(guidance_scale: float, evaluated: int):
    unet, latents, context = FakeUNet(), normal(2, 4, 8, 8), normal(2, 77, 3)
    texts = join_guidance(unet, context, None if guidance_scale == 1 else torch.zeros(1, 77, 3), guidance_scale)
    guided_eps(unet, latents, torch.tensor([5, 5]), texts, guidance_scale, None)
    assert unet.calls == [(evaluated, False)]
