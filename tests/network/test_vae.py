"""The autoencoder: equal to diffusers' AutoencoderKL, named as in Stable Diffusion, its loss counted by hand."""

import hashlib
import math

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from torch import Tensor, nn

from hoi.network.vae import VAE, Norm, Posterior, VAEConfig, vae_loss

# sha256 of the sorted lines "name [d0,d1,...]" of the 248 first-stage tensors in a table of Stable Diffusion 1.x files.
SD1_FIRST_STAGE = "240432d78215782456548801f5ad9d65371e87418c0228981c16434327af7890"

TINY = VAEConfig(channels=32, channel_mult=(1, 2, 4), num_res_blocks=1, norm_groups=8)
FOUR_LEVELS = VAEConfig(channels=32, channel_mult=(1, 2, 4, 4), num_res_blocks=2)


def randomized(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every tensor non-trivial (norms and biases too), so that no branch is silently the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in module.named_parameters():
            noise = torch.randn(tensor.shape, generator=generator)
            is_gain = tensor.ndim == 1 and name.endswith("weight")
            tensor.copy_(0.05 * noise if tensor.ndim > 1 else is_gain + 0.3 * noise)
    return module.eval()


def diffusers_twin(vae: VAE) -> AutoencoderKL:
    """The same weights in diffusers, through diffusers' own reader of Stable Diffusion files."""
    config, levels = vae.config, len(vae.config.channel_mult)
    twin = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(config.channels * mult for mult in config.channel_mult),
        layers_per_block=config.num_res_blocks,
        latent_channels=config.z_channels,
        norm_num_groups=config.norm_groups,
    )
    file = {f"first_stage_model.{name}": tensor for name, tensor in vae.state_dict().items()}
    twin.load_state_dict(convert_ldm_vae_checkpoint(file, twin.config))
    return twin.eval()


def picture(batch: int, size: int, seed: int = 1) -> Tensor:
    return torch.rand((batch, 3, size, size), generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_names_and_shapes_are_those_of_stable_diffusion():
    with torch.device("meta"):
        state = VAE(VAEConfig()).state_dict()
    lines = sorted(f"{name} [{','.join(map(str, tensor.shape))}]" for name, tensor in state.items())
    assert len(lines) == 248
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == SD1_FIRST_STAGE


@pytest.mark.parametrize("config", [TINY, FOUR_LEVELS], ids=["tiny", "four levels"])
@torch.no_grad()
def test_both_ways_agree_with_diffusers(config: VAEConfig):
    vae = randomized(VAE(config))
    twin = diffusers_twin(vae)
    image = picture(2, 64)
    posterior, expected = vae.encode(image), twin.encode(image).latent_dist
    assert posterior.mean.std() > 0.05  # the comparison is about something
    torch.testing.assert_close(posterior.mean, expected.mean, atol=1e-4, rtol=0)
    torch.testing.assert_close(posterior.std, expected.std, atol=1e-4, rtol=0)
    z = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(2))
    image, expected = vae.decode(vae.scale(z)), twin.decode(z).sample
    assert image.shape == (2, 3, 64, 64) and image.std() > 0.05
    torch.testing.assert_close(image, expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_norms_of_the_encoder_are_exact_in_channels_last_far_from_zero():
    norm = randomized(Norm(8, 32, eps=1e-6))
    x = 30 + torch.randn((2, 32, 128, 128), generator=torch.Generator().manual_seed(0))
    expected = F.group_norm(x.double(), 8, norm.weight.double(), norm.bias.double(), 1e-6).float()
    norm.exact = True
    torch.testing.assert_close(norm(x.to(memory_format=torch.channels_last)), expected, atol=2e-6, rtol=0)
    norms = {name: module.exact for name, module in VAE(TINY).named_modules() if isinstance(module, Norm)}
    assert len(norms) > 20 and all(exact == name.startswith("encoder.") for name, exact in norms.items())


@pytest.mark.slow
@torch.no_grad()
def test_the_encoder_of_full_size_is_within_2e_5_of_diffusers_in_channels_last():
    vae = randomized(VAE(VAEConfig()))
    image, twin = picture(1, 512), diffusers_twin(vae)
    posterior = vae.to(memory_format=torch.channels_last).encode(image)
    expected = twin.encode(image).latent_dist
    torch.testing.assert_close(posterior.mean, expected.mean, atol=2e-5, rtol=0)
    torch.testing.assert_close(posterior.std, expected.std, atol=2e-5, rtol=0)


@torch.no_grad()
def test_decode_undoes_scale_at_any_scaling_factor():
    z = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    images = []
    for scaling_factor in (1.0, 0.18215):
        vae = randomized(VAE(VAEConfig(16, (1, 2), 1, scaling_factor=scaling_factor, norm_groups=8)))
        assert math.isclose((vae.scale(z).std() / z.std()).item(), scaling_factor, rel_tol=1e-6)
        images.append(vae.decode(vae.scale(z)))
    torch.testing.assert_close(images[0], images[1], atol=1e-5, rtol=0)


def test_posterior_samples_have_its_mean_and_deviation():
    mean, std = torch.tensor([-2.0, 0.5]).view(1, 2, 1, 1), torch.tensor([0.3, 2.0]).view(1, 2, 1, 1)
    posterior = Posterior(mean.expand(1, 2, 200, 200), std.expand(1, 2, 200, 200))
    z = posterior.sample(torch.Generator().manual_seed(0))  # 40,000 draws of each
    torch.testing.assert_close(z.mean(dim=(2, 3)), mean[:, :, 0, 0], atol=0.04, rtol=0)
    torch.testing.assert_close(z.std(dim=(2, 3)), std[:, :, 0, 0], atol=0, rtol=0.02)
    assert torch.equal(z, posterior.sample(torch.Generator().manual_seed(0)))
    assert not torch.equal(z, posterior.sample(torch.Generator().manual_seed(1)))


def test_kl_equals_torch_distributions():
    generator = torch.Generator().manual_seed(0)
    mean, std = torch.randn((3, 4, 5, 5), generator=generator), torch.rand((3, 4, 5, 5), generator=generator) + 0.1
    prior, posterior = torch.distributions.Normal(0, 1), torch.distributions.Normal(mean, std)
    expected = torch.distributions.kl_divergence(posterior, prior).sum(dim=(1, 2, 3))
    torch.testing.assert_close(Posterior(mean, std).kl(), expected)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        # a shift in colour: no edges, all of it in the averages
        (torch.full((1, 3, 16, 16), 0.2), {"l1": 0.2, "gradient": 0.0, "squared": 0.04, "average": 0.04}),
        # a chequerboard: all edges (0.2 in both directions), nothing in the averages
        (
            0.1 * (-1.0) ** (torch.arange(16)[:, None] + torch.arange(16)).expand(1, 3, 16, 16),
            {"l1": 0.1, "gradient": 0.4, "squared": 0.01, "average": 0.0},
        ),
    ],
    ids=["shift", "chequerboard"],
)
def test_loss_parts_equal_hand_counts(error: Tensor, expected: dict[str, float], monkeypatch: pytest.MonkeyPatch):
    vae, image = VAE(TINY), picture(1, 16)
    monkeypatch.setattr(vae, "_decode_unscaled", lambda z: image + error)
    loss, parts = vae_loss(vae, image, torch.Generator().manual_seed(0))
    for name, value in expected.items():
        assert math.isclose(parts[name].item(), value, abs_tol=1e-6), name
    expected_kl = vae.encode(image).kl().sum().item() / 256
    assert math.isclose(parts["kl"].item(), expected_kl, rel_tol=1e-5)
    weights = {"l1": 1.0, "gradient": 1.0, "squared": 1.0, "average": 3.0, "kl": 1e-6}
    total = sum(weights[name] * part.item() for name, part in parts.items())
    assert parts.keys() == weights.keys() and math.isclose(loss.item(), total, rel_tol=1e-5)


def test_training_lowers_the_loss_and_ignores_global_seeds():
    losses = []
    for global_seed in (1, 2):
        vae = randomized(VAE(VAEConfig(16, (1, 2), 1, norm_groups=4))).train()
        optimizer, generator = torch.optim.Adam(vae.parameters(), 3e-3), torch.Generator().manual_seed(0)
        torch.manual_seed(global_seed)
        losses.append([])
        for _ in range(12):
            optimizer.zero_grad()
            loss, _ = vae_loss(vae, picture(2, 16), generator)
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0] == losses[1]
    assert losses[0][-1] < 0.8 * losses[0][0]
    assert all(parameter.grad is not None for parameter in vae.parameters())


def test_a_wrong_shape_says_what_was_expected():
    vae = VAE(TINY)
    with pytest.raises(ValueError, match=r"image is \(1, 3, 30, 32\).*multiples of 4"):
        vae.encode(torch.zeros(1, 3, 30, 32))
