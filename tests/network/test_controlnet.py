"""ControlNet against diffusers, alone, in the U-Net, in a sampler and in a video."""

import dataclasses

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel
from fake_networks import SMALL, generators, model_inputs
from public_files import CONFIG, controlnet, diffusers_unet, randomized

from hoi.network.config import sd1_config
from hoi.network.model import CONDITION_NAMES, HOIDiffusion
from hoi.network.pipeline import Pipeline, SamplingSettings, anchored_pictures
from hoi.weights.names import diffusers_controlnet_names, diffusers_unet_names


def controlled_model(config=SMALL) -> HOIDiffusion:
    """Random weights everywhere, also behind the convolutions that start at zero."""
    return randomized(HOIDiffusion(config, controlnet=True), 0)


def hint_of(conditions: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([conditions[name] for name in ("skeleton", "normal", "segmentation")], dim=1)


def latents_by_hand(model: HOIDiffusion, conditions, context, uncond, latents, guidance: float, scale: float):
    """DDIM written out, every part of the network evaluated anew in every step."""
    abar = model.config.noise_schedule().alphas_cumprod
    for timestep in range(853, 0, -142):
        timesteps = torch.full((len(latents),), timestep)
        eps, empty = (model(latents, timesteps, text, conditions, (scale,) * 3) for text in (context, uncond))
        eps = empty + guidance * (eps - empty)
        now, previous = abar[timestep].item(), abar[max(timestep - 142, 0)].item()
        x0 = (latents - (1 - now) ** 0.5 * eps) / now**0.5
        latents = previous**0.5 * x0 + (1 - previous) ** 0.5 * eps
    return latents


@torch.no_grad()
def test_residuals_and_the_unet_that_they_are_added_to_equal_diffusers():
    model, twin, unet = HOIDiffusion(CONFIG, controlnet=True), controlnet(), diffusers_unet()
    names, of_unet = diffusers_controlnet_names(model.state_dict(), CONFIG.unet), model.state_dict()
    theirs = {"control": twin.state_dict(), "unet": unet.state_dict()}
    state = {ours: theirs["control"][name] for ours, (name,) in names.items()}
    state |= {ours: theirs["unet"][name] for ours, (name,) in diffusers_unet_names(of_unet, CONFIG.unet).items()}
    assert len(state) == len(theirs["control"]) + len(theirs["unet"])
    model.load_state_dict(of_unet | state)

    generator = torch.Generator().manual_seed(1)
    latents, context = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 77, 32, generator=generator)
    conditions = {name: torch.rand(2, 3, 64, 64, generator=generator) for name in CONDITION_NAMES}
    timesteps = torch.tensor([3, 981])
    down, middle = twin(latents, timesteps, context, hint_of(conditions), conditioning_scale=0.7, return_dict=False)
    hint, scale = model.condition_encoders(conditions, (0.7, 0.7, 0.7))
    for ours, other in zip(model.unet.control(latents, timesteps, context, hint), [*down, middle], strict=True):
        assert other.std() > 0.05
        torch.testing.assert_close(0.7 * ours, other, atol=1e-4, rtol=0)
    expected = unet(latents, timesteps, context, None, None, None, None, None, down, middle).sample
    found = model(latents, timesteps, context, conditions, (0.7, 0.7, 0.7))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert (found - model(latents, timesteps, context)).abs().max() > 0.1
    # With the texts of guidance beside each other, and their keys and values kept.
    texts = torch.cat([context, context.flip(0)])
    twice = model.unet(latents, timesteps, model.unet.cache_context(texts), [hint, scale])
    torch.testing.assert_close(twice[:2], expected, atol=1e-4, rtol=0)
    alone = model.unet(latents, timesteps, texts[2:], [hint, scale])
    torch.testing.assert_close(twice[2:], alone, atol=1e-4, rtol=0)


def test_names_and_shapes_at_full_size_are_diffusers_for_nine_channels():
    with torch.device("meta"):
        model = HOIDiffusion(sd1_config(), controlnet=True)
        twin = ControlNetModel(conditioning_channels=9, cross_attention_dim=768)
    state = model.state_dict()
    names = diffusers_controlnet_names(state, sd1_config().unet)
    assert {theirs: state[ours].shape for ours, (theirs,) in names.items()} == {
        name: tensor.shape for name, tensor in twin.state_dict().items()
    }
    trained = model.freeze_for_fine_tuning()
    assert sum(p.numel() for p in trained) == sum(p.numel() for p in twin.parameters())
    assert {name.split(".")[0] for name, p in model.unet.named_parameters() if p.requires_grad} == {"control"}


@pytest.mark.parametrize("config", [SMALL, dataclasses.replace(SMALL, predicts="v")], ids=["eps", "v"])
@torch.no_grad()
def test_a_fresh_one_copies_the_encoder_and_changes_nothing_and_so_does_scale_0(config):
    model, inputs = randomized(HOIDiffusion(config, with_conditions=False), 0), model_inputs()
    text_alone = model(**inputs | {"conditions": None})
    model.add_condition_encoders(controlnet=True)
    own = model.unet.state_dict()
    copied = [name for name in own if f"control.{name}" in own]
    assert {name.split(".")[0] for name in copied} == {"time_embed", "input_blocks", "middle_block"}
    assert all(torch.equal(own[name], own[f"control.{name}"]) for name in copied)
    assert torch.equal(model(**inputs), text_alone)
    randomized(model.unet.control, 1)
    assert (model(**inputs) - text_alone).abs().max() > 0.01
    assert torch.equal(model(**inputs, condition_weights=(0.0, 0.0, 0.0)), text_alone)
    with pytest.raises(ValueError, match=r"share one weight, not \(1.0, 0.5, 1.0\): give --cond-scale all=WEIGHT"):
        model(**inputs, condition_weights=(1.0, 0.5, 1.0))


@torch.no_grad()
def test_sampling_equals_a_loop_that_keeps_nothing_between_steps():
    model, inputs = controlled_model(), model_inputs()
    settings = SamplingSettings("ddim", 7, 1.5, "no", (0.6, 0.6, 0.6))
    pipeline = Pipeline(model, settings)
    pipeline.context = lambda prompts: inputs["context"][:1] if prompts == ["no"] else inputs["context"]
    noise = torch.stack([torch.randn(4, 8, 8, generator=generator) for generator in generators(1, 2)])
    uncond = inputs["context"][:1].expand(2, -1, -1)
    expected = latents_by_hand(model, inputs["conditions"], inputs["context"], uncond, noise, 1.5, 0.6)
    found = pipeline.latents(model.unet, ["a", "b"], pipeline.features(inputs["conditions"]), generators(1, 2))
    torch.testing.assert_close(found, expected, atol=1e-3 * expected.std().item(), rtol=0)
    other = pipeline.latents(model.unet, ["a", "b"], None, generators(1, 2))
    assert (other - expected).abs().max() > 0.1 * expected.std()


@torch.no_grad()
def test_a_frame_of_a_video_depends_on_itself_and_the_anchor_alone():
    model, inputs = controlled_model(), model_inputs()
    pipeline = Pipeline(model, SamplingSettings("ddim", 2, 1.5))
    pipeline.context = lambda prompts: inputs["context"][:1].expand(len(prompts), -1, -1)
    pipeline.decode = lambda latents, height, width: latents.numpy()

    def features(frame: int) -> list[torch.Tensor]:
        return pipeline.features({name: image[:1] * frame / 4 for name, image in inputs["conditions"].items()})

    def noise(frame: int) -> torch.Generator:
        return torch.Generator().manual_seed(frame)

    videos = [dict(anchored_pictures(pipeline, "a", features, noise, range(4), anchor, chunk))
              for anchor, chunk in ((1, 4), (1, 1), (None, 4))]  # fmt: skip
    for frame, picture in videos[0].items():
        np.testing.assert_allclose(picture, videos[1][frame], atol=1e-4)
    assert np.abs(videos[0][3] - videos[2][3]).max() > 1e-2
