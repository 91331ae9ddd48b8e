"""Exports open in other tools with the same result, and read back give the same bits."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    MultiAdapter,
    StableDiffusionAdapterPipeline,
    T2IAdapter,
    UNet2DConditionModel,
)
from PIL import Image
from public_files import CONFIG, randomized, write_folder
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTokenizer

from hoi.network.config import tiny_config
from hoi.network.model import CONDITION_NAMES, HOIDiffusion
from hoi.network.samplers import leading_timesteps, linspace_timesteps, sample_latents
from hoi.network.text import tokenize
from hoi.weights.diffusers_config import SCHEDULER_FILE, folder_config, read_folder_config
from hoi.weights.export import export_diffusers, export_official, export_own, export_single
from hoi.weights.load import load_model

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import export_weights  # noqa: E402

NAMES = ("skeleton", "normal", "segmentation")
V_CONFIG = replace(CONFIG, predicts="v", terminal_signal=0.01)
CONFIGS = {"eps": CONFIG, "v": V_CONFIG, "tiny": tiny_config()}  # tiny: no attention on its finest level


def trained_model(config=CONFIG) -> HOIDiffusion:
    model = randomized(HOIDiffusion(config), seed=11)
    model.metadata = {
        "preset": config.name, "stage": "hoi", "step": "1200", "command": "train.py --data x", "base_sha256": "ab12",
    }  # fmt: skip
    return model


def assert_same(loaded: HOIDiffusion, model: HOIDiffusion) -> None:
    ours = {k: v for k, v in model.state_dict().items() if loaded.condition_encoders or "condition_encoders" not in k}
    theirs = loaded.state_dict()
    assert theirs.keys() == ours.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


# --- the proof: diffusers, given the exported folder, makes our latents ---


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> dict[str, Path]:
    """A folder by name of the configuration."""
    place = tmp_path_factory.mktemp("exported")
    for name, config in CONFIGS.items():
        export_diffusers(trained_model(config), place / name)
    return {name: place / name for name in CONFIGS}


def our_latents(model: HOIDiffusion, prompts, negative, conditions, noise, **settings) -> torch.Tensor:
    return sample_latents(
        model.unet,
        model.config.noise_schedule(),
        context=model.text_encoder(tokenize(prompts)),
        uncond_context=model.text_encoder(tokenize([negative])),
        cond_features=model.condition_encoders(dict(zip(CONDITION_NAMES, conditions, strict=True))),
        noise=noise,
        **settings,
    )


@pytest.mark.parametrize("sampler", ["as exported", "ddim"])
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_the_exported_folder_makes_our_latents_in_diffusers(exported, name, sampler):
    folder, config = exported[name], CONFIGS[name]
    model = trained_model(config)
    adapters = [T2IAdapter.from_pretrained(folder / f"adapter_{name}") for name in NAMES]
    pipeline = StableDiffusionAdapterPipeline.from_pretrained(folder, adapter=MultiAdapter(adapters))
    pipeline.set_progress_bar_config(disable=True)
    if sampler == "ddim":  # as the README says
        pipeline.scheduler = eval((folder / "README.md").read_text().split("```python\n")[2].split("```")[0])
    generator = torch.Generator().manual_seed(3)
    side = 64 // config.vae.factor
    noise = torch.randn(2, 4, side, side, generator=generator)
    conditions = [torch.rand(1, 3, 64, 64, generator=generator) for _ in NAMES]
    prompts, negative = ["a hand grasping a mug", "a red bottle on the beach"], "blurry"
    settings = {"num_inference_steps": 10, "guidance_scale": 4.0}
    own = {"output_type": "latent", "latents": noise, "height": 64, "width": 64, "negative_prompt": [negative] * 2}

    def diffusers_latents(**weights) -> torch.Tensor:
        images = [image.repeat(2, 1, 1, 1) for image in conditions]
        return pipeline(prompts, image=images, **weights, **settings, **own).images

    ours = our_latents(model, prompts, negative, conditions, noise, **settings,
                       sampler=config.sampler if sampler == "as exported" else sampler)  # fmt: skip
    theirs = diffusers_latents(adapter_conditioning_scale=[1.0, 1.0, 1.0])
    assert ours.std() > 0.5
    assert (ours - theirs).abs().max() < 1e-3
    for weights in ({}, {"adapter_conditioning_scale": 1.0}):
        with pytest.raises(TypeError):
            diffusers_latents(**weights)
    alone = pipeline.adapter(conditions)
    for ours_third, whole in zip(alone, pipeline.adapter(conditions, [1.0, 1.0, 1.0]), strict=True):
        torch.testing.assert_close(3 * ours_third, whole)
    torch.testing.assert_close(
        pipeline.vae.decode(theirs / config.vae.scaling_factor).sample, model.vae.decode(theirs), atol=1e-3, rtol=1e-4
    )


@pytest.mark.parametrize("sampler", ["dpm++", "ddim"])
@torch.no_grad()
def test_the_snippet_in_the_readme_makes_our_default_picture(tmp_path, monkeypatch, sampler):
    config = replace(CONFIG, sampler=sampler, num_inference_steps=7, guidance_scale=3.5)
    model = trained_model(config)
    export_diffusers(model, tmp_path / "folder")
    monkeypatch.chdir(tmp_path / "folder")
    generator, size = np.random.default_rng(0), config.image_size
    pictures = [generator.integers(0, 256, (size, size, 3), dtype=np.uint8) for _ in NAMES]
    for name, picture in zip(NAMES, pictures, strict=True):
        Image.fromarray(picture).save(f"{name}.png")
    text, scope = Path("README.md").read_text(), {}
    exec(text.split("```python\n")[1].split("```")[0], scope)
    side = size // config.vae.factor
    latents = our_latents(
        model, ["A hand is grasping a mug on the beach"], config.negative_prompt,
        [torch.tensor(picture).permute(2, 0, 1)[None] / 255 for picture in pictures],
        torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(0)),
        sampler=sampler, num_inference_steps=7, guidance_scale=3.5,
    )  # fmt: skip
    ours = (127.5 * (model.vae.decode(latents).clamp(-1, 1) + 1))[0].permute(1, 2, 0)
    off = np.abs(np.asarray(scope["image"], float) - ours.numpy())
    assert ours.std() > 20 and off.max() < 1
    assert "ends in a TypeError" in text and "ComfyUI and web UIs take `adapter_*/" in text
    for part in ("skeleton", "normal", "segmentation"):  # as the README says; full T2I-Adapters in diffusers' names
        names = load_file(f"adapter_{part}/diffusion_pytorch_model.safetensors").keys()
        assert "adapter.body.0.resnets.0.block1.weight" in names and "adapter.conv_in.weight" in names


@pytest.mark.parametrize("sampler", ["dpm++", "ddim", "ddpm"])
def test_the_written_scheduler_takes_our_timesteps(tmp_path, sampler):
    config = replace(CONFIG, sampler=sampler)
    kinds = {"dpm++": DPMSolverMultistepScheduler, "ddim": DDIMScheduler, "ddpm": DDPMScheduler}
    (tmp_path / "scheduler_config.json").write_text(json.dumps(folder_config(config)[str(SCHEDULER_FILE)]))
    scheduler = kinds[sampler].from_pretrained(tmp_path)
    scheduler.set_timesteps(20)
    expected = {"dpm++": linspace_timesteps(20), "ddim": leading_timesteps(20, offset=1), "ddpm": leading_timesteps(20)}
    assert scheduler.timesteps.tolist() == expected[sampler]


def test_the_exported_tokenizer_gives_our_ids(exported):
    tokenizer = CLIPTokenizer.from_pretrained(exported["eps"] / "tokenizer")
    prompts = ["", "A hand is grasping a PINK mug, on the beach!", "word " * 100, "naïve café 3.5 it's"]
    ids = tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    assert torch.equal(ids, tokenize(prompts))


@pytest.mark.parametrize(("predicts", "theirs"), [("eps", "epsilon"), ("v", "v_prediction")])
def test_the_written_scheduler_has_our_schedule_and_prediction(exported, predicts, theirs):
    scheduler, config = DDIMScheduler.from_pretrained(exported[predicts] / "scheduler"), CONFIGS[predicts]
    assert scheduler.config.prediction_type == theirs
    expected = config.noise_schedule().alphas_cumprod
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), expected, rtol=1e-4, atol=1e-8)
    again = read_folder_config(exported[predicts])
    assert (again.predicts, again.terminal_signal) == (config.predicts, config.terminal_signal)


@pytest.mark.parametrize("name", ["eps", "tiny"])
@pytest.mark.parametrize(
    ("kind", "part"), [(UNet2DConditionModel, "unet"), (AutoencoderKL, "vae"), (CLIPTextModel, "text_encoder")]
)
def test_every_part_of_the_folder_opens_with_no_tensor_left_over(exported, kind, part, name):
    _, info = kind.from_pretrained(exported[name] / part, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))


# --- there and back ---


@pytest.mark.parametrize("half", [False, True], ids=["float32", "float16"])
def test_every_format_read_back_gives_the_same_bits(tmp_path, half):
    model = trained_model(V_CONFIG)
    if half:
        model = model.half().float()
    export_own(model, tmp_path / "own.safetensors", half)
    export_single(model, tmp_path / "single.safetensors", half)
    export_diffusers(model, tmp_path / "folder", half)
    adapter, base = export_official(model, tmp_path / "official", half)
    assert (adapter.name, base.name) == ("model_ad_1200.pth", "model_sd_1200.ckpt")
    for path in ("own.safetensors", "folder"):
        loaded = load_model(tmp_path / path)
        assert_same(loaded, model)
        assert model.metadata.items() <= loaded.metadata.items()
        assert replace(loaded.config, name=V_CONFIG.name) == V_CONFIG
    single = load_model(tmp_path / "single.safetensors")
    assert single.config == V_CONFIG and single.metadata["command"] == "train.py --data x"
    assert_same(single, model)
    assert_same(load_model(base, adapter, config=V_CONFIG), model)
    with safe_open(tmp_path / "own.safetensors", framework="pt") as file:
        metadata = file.metadata()
    expected = {"preset": "custom", "step": "1200", "command": "train.py --data x", "base_sha256": "ab12"}
    assert expected.items() <= metadata.items() and json.loads(metadata["config"])["unet"]["model_channels"] == 32


def test_the_official_layout_has_the_official_names(tmp_path):
    model = trained_model()
    adapter, base = (torch.load(path) for path in export_official(model, tmp_path))
    assert {name.partition(".")[0] for name in adapter} == {"pose_ada", "depth_ada", "mask_ada"}
    assert torch.equal(adapter["depth_ada.conv_in.bias"], model.condition_encoders["normal"].conv_in.bias)
    assert "cond_stage_model.transformer.embeddings.token_embedding.weight" in base
    assert not any("text_model" in name for name in base)
    assert len(base) > 300
    assert all(tensor.dtype == torch.float32 for tensor in base.values())


def test_attention_added_for_diffusers_is_dropped_again_and_the_preset_is_known(exported):
    loaded = load_model(exported["tiny"])
    assert_same(loaded, trained_model(CONFIGS["tiny"]))
    assert loaded.config == tiny_config()
    blocks = json.loads((exported["tiny"] / "unet" / "config.json").read_text())
    assert blocks["down_block_types"] == ["CrossAttnDownBlock2D"] * 4
    assert blocks["up_block_types"] == ["CrossAttnUpBlock2D"] * 3 + ["UpBlock2D"]


def test_attention_on_the_way_down_alone_is_refused_when_it_does_something(exported, tmp_path):
    folder = shutil.copytree(exported["tiny"], tmp_path / "trained_on")
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["down_blocks.0.attentions.1.proj_out.bias"][3] = 1e-3
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"down_blocks\.0\.attentions\.1\.proj_out\.bias is not zero: this level"):
        load_model(folder)
    settings = json.loads((folder / "unet" / "config.json").read_text())
    settings["down_block_types"][1] = "DownBlock2D"
    (folder / "unet" / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="down_block_types is .*, expected .'CrossAttnDownBlock2D'"):
        load_model(folder)


def test_the_built_in_model_is_half_and_has_the_sampling_defaults_measured_after_its_training(
    tmp_path, capsys
):
    model, target = trained_model(replace(tiny_config(), guidance_scale=9.0, sampler="ddpm")), tmp_path / "tiny"
    export_own(model, tmp_path / "model.safetensors")
    words = [str(tmp_path / "model.safetensors"), "--format", "built-in", "--out", f"{target}.safetensors"]
    export_weights.main(export_weights.parse_args(words))
    assert f"wrote {target}.safetensors: " in capsys.readouterr().out
    loaded = load_model(f"{target}.safetensors")
    assert loaded.config == tiny_config() and loaded.metadata.keys() == load_model(words[0]).metadata.keys()
    assert_same(loaded, model.half().float())


# --- what has no place in a format ---


def test_a_network_that_diffusers_cannot_hold_is_refused_and_nothing_is_left(tmp_path):
    unet = replace(CONFIG.unet, model_channels=32, channel_mult=(2, 2, 2, 2))  # as the miniature was at first
    with torch.device("meta"):
        wider = HOIDiffusion(replace(CONFIG, unet=unet))
    with pytest.raises(ValueError, match="begins 32 wide and has a finest level of 64; .* export to own"):
        export_diffusers(wider, tmp_path / "wider")
    (tmp_path / "there").mkdir()
    with pytest.raises(FileExistsError, match="there exists already"):
        export_diffusers(trained_model(), tmp_path / "there")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_an_interrupted_export_leaves_no_folder(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("hoi.weights.export.save_model", fail)
    with pytest.raises(OSError, match="no space left"):
        export_diffusers(trained_model(), tmp_path / "exported")
    assert not list(tmp_path.iterdir())


def test_the_command_exports_what_it_reads(tmp_path, capsys):
    folder, target = write_folder(tmp_path / "sd"), tmp_path / "sd.safetensors"
    export_weights.main(export_weights.parse_args([str(folder), "--format", "single", "--out", str(target)]))
    assert f"wrote {target}" in capsys.readouterr().out
    assert_same(load_model(target), load_model(folder))
    unet = UNet2DConditionModel.from_pretrained(folder / "unet").state_dict()
    single = load_file(target)
    assert torch.equal(single["model.diffusion_model.input_blocks.0.0.bias"], unet["conv_in.bias"])
    export_own(trained_model(), tmp_path / "own.safetensors")
    words = [str(tmp_path / "own.safetensors"), "--format"]
    export_weights.main(export_weights.parse_args([*words, "official", "--out", str(tmp_path / "official")]))
    assert "ComfyUI and web UIs do not recognise model_ad_N.pth; --format diffusers" in capsys.readouterr().out
    export_weights.main(export_weights.parse_args([*words, "single", "--out", str(tmp_path / "single.safetensors")]))
    assert "--format diffusers writes them as T2I-Adapters" in capsys.readouterr().out
    export_own(HOIDiffusion(CONFIG, controlnet=True), words[0], metadata={"baseline": "controlnet"})
    export_weights.main(export_weights.parse_args([*words, "single", "--out", str(tmp_path / "single.safetensors")]))
    assert "without the ControlNet" in (said := capsys.readouterr().out) and "T2I-Adapters" not in said
    assert "baseline" not in load_model(tmp_path / "single.safetensors").metadata
    with pytest.raises(ValueError, match="the official layout needs condition encoders"):
        export_weights.main(export_weights.parse_args([str(folder), "--format", "official", "--out", f"{target}s"]))
    assert not Path(f"{target}s").exists()
