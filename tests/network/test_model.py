"""The whole network: names of the public files, condition encoders against diffusers, what trains."""

import dataclasses
import hashlib

import pytest
import torch
from diffusers import T2IAdapter
from fake_networks import SMALL, model_inputs, small_model

from hoi.network.config import ModelConfig, sd1_config, tiny_config
from hoi.network.model import ConditionEncoder, HOIDiffusion
from hoi.network.text import TextConfig
from hoi.network.vae import VAEConfig
from hoi.weights.names import official_adapter_names

# SHA-256 of the sorted lines "name d0,d1,..." of public tables of the real files, not of this project's code.
SD1_UNET = "dc00164c142b2f9cc0c942c3823c3dcba1e455dd5d636989cfd8db4a9467c389"  # 686, model.diffusion_model.*
SD1_VAE = "8df3ba683aca07c3281942222377a2a78b857e9361263ad4bb233d7c2c68630d"  # 248, first_stage_model.*
OFFICIAL_ADAPTER = "5357839dd76579a959638da0b9e0f30d0dbfdcdf2a7dddf082d956e929c195b8"  # 114, model_ad_N.pth


def digest(state: dict[str, torch.Tensor]) -> str:
    lines = sorted(f"{name} {','.join(map(str, tensor.shape))}" for name, tensor in state.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def test_names_and_shapes_are_those_of_the_stable_diffusion_and_official_files():
    with torch.device("meta"):
        model = HOIDiffusion(sd1_config())
    unet = {f"model.diffusion_model.{name}": tensor for name, tensor in model.unet.state_dict().items()}
    vae = {f"first_stage_model.{name}": tensor for name, tensor in model.vae.state_dict().items()}
    state = model.state_dict()
    adapter = {theirs: state[ours] for ours, (theirs,) in official_adapter_names(state).items()}
    assert (len(unet), len(vae), len(adapter)) == (686, 248, 114)
    assert digest(unet) == SD1_UNET
    assert digest(vae) == SD1_VAE
    assert digest(adapter) == OFFICIAL_ADAPTER


def test_what_is_fine_tuned_are_the_742_915_844_parameters_of_the_official_code():
    with torch.device("meta"):
        model = HOIDiffusion(sd1_config())
    trained = model.freeze_for_fine_tuning()
    assert sum(parameter.numel() for parameter in trained) == 742_915_844 and len(trained) == 502
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.split(".")[0] + "." + name.split(".")[1] for name in names} == {
        "unet.output_blocks",
        "unet.out",
        "condition_encoders.skeleton",
        "condition_encoders.normal",
        "condition_encoders.segmentation",
    }


def diffusers_adapter(encoder: ConditionEncoder, widths: tuple[int, ...]) -> T2IAdapter:
    twin = T2IAdapter(
        3, list(widths), num_res_blocks=2, downscale_factor=encoder.unshuffle, adapter_type="full_adapter"
    )
    state = {}
    for name, tensor in encoder.state_dict().items():
        if name.startswith("body."):
            _, number, layer, kind = name.split(".")
            level, index = divmod(int(number), 2)
            place = f"body.{level}.in_conv" if layer == "in_conv" else f"body.{level}.resnets.{index}.{layer}"
            name = f"{place}.{kind}"
        state[f"adapter.{name}"] = tensor
    twin.load_state_dict(state, strict=True)
    return twin


@pytest.mark.parametrize(("widths", "unshuffle"), [((32, 64, 128, 128), 8), ((64, 96, 96, 128), 4)])
@torch.no_grad()
def test_a_condition_encoder_equals_diffusers_t2i_adapter(widths, unshuffle):
    torch.manual_seed(0)
    encoder = ConditionEncoder(widths, unshuffle)
    image = torch.rand(2, 3, 64, 128)
    ours, theirs = encoder(image), diffusers_adapter(encoder, widths)(image)
    assert [tuple(feature.shape) for feature in ours] == [
        (2, width, 64 // unshuffle >> level, 128 // unshuffle >> level) for level, width in enumerate(widths)
    ]
    for feature, expected in zip(ours, theirs, strict=True):
        assert expected.std() > 0.02
        torch.testing.assert_close(feature, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_condition_encoders_are_summed_with_their_weights_and_blank_images_still_speak():
    model = small_model()
    images = model_inputs()["conditions"]
    alone = [model.condition_encoders[name](images[name]) for name in ("skeleton", "normal", "segmentation")]
    summed = model.condition_encoders(images, weights=(1.0, 0.5, 0.0))
    for level, feature in enumerate(summed):
        torch.testing.assert_close(feature, alone[0][level] + 0.5 * alone[1][level], atol=1e-6, rtol=0)
    blank = {name: torch.zeros_like(image) for name, image in images.items()}
    assert all(feature.abs().max() > 0 for feature in model.condition_encoders(blank))


@torch.no_grad()
def test_each_condition_reaches_the_prediction_unless_its_weight_is_zero():
    model, inputs = small_model(), model_inputs()
    reference, conditions = model(**inputs), inputs["conditions"]
    text_alone = {name: value for name, value in inputs.items() if name != "conditions"}

    def weighted(conditions: dict[str, torch.Tensor], weights: list[float]) -> torch.Tensor:
        """As a sampler does it."""
        return model.unet(**text_alone, cond_features=model.condition_encoders(conditions, weights))

    for which, name in enumerate(conditions):
        changed = conditions | {name: 1 - conditions[name]}
        assert (model(**text_alone, conditions=changed) - reference).abs().max() > 1e-4
        weights = [float(index != which) for index in range(3)]
        assert torch.equal(weighted(changed, weights), weighted(conditions, weights))
    assert torch.equal(weighted(conditions, [1, 1, 1]), reference)
    assert torch.equal(weighted(conditions, [0, 0, 0]), model(**text_alone))


@pytest.mark.parametrize("config", [SMALL, tiny_config(), sd1_config()], ids=lambda config: config.name)
def test_a_configuration_survives_json(config):
    again = ModelConfig.from_json(config.to_json())
    assert again == config and hash(again) == hash(config)


def test_parts_that_do_not_fit_together_are_refused():
    with pytest.raises(ValueError, match="expects text width 16, the text encoder gives 24"):
        dataclasses.replace(SMALL, text=TextConfig(width=24))
    with pytest.raises(ValueError, match="takes 4 channels, the VAE makes 8"):
        dataclasses.replace(SMALL, vae=VAEConfig(z_channels=8))


def test_the_built_in_model_is_small_enough_to_ship():
    with torch.device("meta"):
        model = HOIDiffusion(tiny_config())
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    assert counts["unet"] + counts["condition_encoders"] <= 16e6
    assert 2 * sum(counts.values()) <= 50e6  # bytes at fp16


@torch.no_grad()
def test_a_base_model_has_no_condition_encoders_until_they_are_asked_for():
    base, inputs = small_model(with_conditions=False), model_inputs()
    assert base.condition_encoders is None
    with pytest.raises(ValueError, match="base model without condition encoders"):
        base(**inputs)
    with pytest.raises(ValueError, match="call add_condition_encoders first"):
        base.freeze_for_fine_tuning()
    before = base(**inputs | {"conditions": None})
    base.add_condition_encoders()
    assert torch.equal(base(**inputs | {"conditions": None}), before)
    assert (base(**inputs) - before).abs().max() > 0
    with pytest.raises(ValueError, match="already has condition encoders"):
        base.add_condition_encoders()
