"""Public weight files, written here by diffusers, transformers or name by name, give the network that they describe."""

import contextlib
import json
import os
import pickle
import runpy
import shutil
import sys
import tempfile
import zipfile
from functools import reduce
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import T2IAdapter
from public_files import (
    CONFIG,
    clip_text_model,
    controlnet,
    diffusers_unet,
    diffusers_vae,
    published_adapter_names,
    published_controlnet_names,
    scheduler,
    single_file_state,
    t2i_adapter,
    write_folder,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import sample
import train
from hoi.common.tensors import WeightFile
from hoi.conditions import Conditions
from hoi.data.folder import read_records
from hoi.data.writer import DatasetWriter, write_pictures
from hoi.network.config import PRESETS
from hoi.network.model import CONDITION_NAMES, HOIDiffusion
from hoi.network.vae import VAE
from hoi.weights.__main__ import main
from hoi.weights.describe import describe_weights
from hoi.weights.export import export_diffusers, export_official, export_own, export_single
from hoi.weights.load import init_branch, load_adapter, load_model, source_hash, whole_model
from hoi.weights.names import controlnet_names, diffusers_controlnet_names

ROOT = Path(__file__).parents[2]
BRANCHES = {"pose_ada": "skeleton", "depth_ada": "normal", "mask_ada": "segmentation"}  # official name -> ours


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("public") / "sd")


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return single_file_state()


@pytest.fixture(scope="module")
def official(tmp_path_factory) -> Path:
    """model_ad_5000.pth: three T2I-Adapters under the official branch names."""
    path = tmp_path_factory.mktemp("official") / "model_ad_5000.pth"
    tensors = {}
    for seed, branch in enumerate(BRANCHES):
        tensors |= published_adapter_names(t2i_adapter(seed).state_dict(), f"{branch}.")
    torch.save(tensors, path)
    return path


@torch.no_grad()
def assert_equals_diffusers(model: HOIDiffusion, tolerance: float = 1e-4) -> None:
    """U-Net, VAE and text encoder against the classes that wrote the files."""
    generator = torch.Generator().manual_seed(0)
    latents, context = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 77, 32, generator=generator)
    image, ids = torch.rand(1, 3, 64, 64, generator=generator) * 2 - 1, torch.randint(49406, (2, 77))
    timesteps = torch.tensor([3, 981])
    expected = diffusers_unet()(latents, timesteps, context).sample
    assert expected.std() > 0.1
    torch.testing.assert_close(model.unet(latents, timesteps, context), expected, atol=tolerance, rtol=0)
    vae = diffusers_vae()
    torch.testing.assert_close(model.vae.encode(image).mean, vae.encode(image).latent_dist.mean, atol=tolerance, rtol=0)
    torch.testing.assert_close(model.vae.decode(latents), vae.decode(latents / 0.18215).sample, atol=1e-3, rtol=1e-4)
    expected = clip_text_model()(ids).last_hidden_state
    torch.testing.assert_close(model.text_encoder(ids), expected, atol=tolerance, rtol=0)


def assert_same_weights(a: HOIDiffusion, b: HOIDiffusion) -> None:
    theirs = b.state_dict()
    assert theirs.keys() == a.state_dict().keys()
    for name, tensor in a.state_dict().items():
        assert torch.equal(tensor, theirs[name]), name


# --- Stable Diffusion: one file ---


def lightning_checkpoint(state: dict[str, Tensor], path: Path) -> None:
    """A training file: tensors one level down, beside a callback's class and numbers in old numpy's spelling."""
    module = type(sys)("pytorch_lightning.callbacks.model_checkpoint")
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": module.__name__})
    parents = ("pytorch_lightning", "pytorch_lightning.callbacks")
    modules = {name: type(sys)(name) for name in parents} | {module.__name__: module}
    sys.modules.update(modules)
    content = {
        "epoch": 3,
        "global_step": 470000,
        "pytorch-lightning_version": "1.4.2",
        "state_dict": state,
        "callbacks": {module.ModelCheckpoint: {"monitor": "val/loss", "best_model_score": np.float64(0.1)}},
        "lr_schedulers": [{"last": np.float32(0.5), "count": np.int64(3)}],
    }
    try:
        torch.save(content, path)
    finally:
        for name in modules:
            del sys.modules[name]
    rewrite_pickle(path, b"numpy._core.multiarray", b"numpy.core.multiarray")


def rewrite_pickle(path: Path, old: bytes, new: bytes) -> None:
    """Put another module's name into the pickle of a torch file (zip), as old numpy would have written it."""
    with zipfile.ZipFile(path) as source:
        entries = {info.filename: source.read(info) for info in source.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as target:
        for name, content in entries.items():
            if name.endswith("data.pkl"):
                # Protocol 2 writes GLOBAL opcodes: c module \n name \n, so lengths need no repair.
                assert b"c" + old + b"\nscalar" in content
                content = content.replace(b"c" + old + b"\n", b"c" + new + b"\n")
            target.writestr(name, content)


def with_extras(state: dict[str, Tensor]) -> dict[str, Tensor]:
    names = "betas alphas_cumprod alphas_cumprod_prev sqrt_alphas_cumprod sqrt_one_minus_alphas_cumprod"
    names += " log_one_minus_alphas_cumprod sqrt_recip_alphas_cumprod sqrt_recipm1_alphas_cumprod posterior_variance"
    names += " posterior_log_variance_clipped posterior_mean_coef1 posterior_mean_coef2"
    extras = {name: torch.zeros(1000) for name in names.split()}
    extras |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(470000)}
    extras["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    return state | extras


def averages(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The U-Net's, zeros, under their names in a full file: all dots are gone, those of the numbers too."""
    prefix = "model.diffusion_model."
    unet = {name: tensor for name, tensor in state.items() if name.startswith(prefix)}
    return {"model_ema." + name[len("model.") :].replace(".", ""): torch.zeros_like(unet[name]) for name in unet}


def test_a_safetensors_file_with_all_its_extras_equals_diffusers(tmp_path, state):
    save_file(with_extras(state), tmp_path / "v1-5-pruned-emaonly.safetensors")
    model = load_model(tmp_path / "v1-5-pruned-emaonly.safetensors", config=CONFIG)
    assert model.condition_encoders is None and not model.training
    assert all(parameter.device.type == "cpu" and parameter.requires_grad for parameter in model.parameters())
    assert_equals_diffusers(model)


def test_every_container_of_the_same_weights_gives_the_same_model(tmp_path, state, folder):
    expected = load_model(folder)
    short = {name.replace(".text_model.", "."): tensor for name, tensor in state.items()}
    torch.save(state, tmp_path / "flat.ckpt")
    torch.save(state, tmp_path / "legacy.ckpt", _use_new_zipfile_serialization=False)
    lightning_checkpoint(with_extras(state), tmp_path / "sd-v1-4.ckpt")
    torch.save(with_extras(short), tmp_path / "model_sd_5000.ckpt")  # as the official training writes it
    save_file(state | averages(state), tmp_path / "v1-5-pruned.safetensors")
    for path in sorted(tmp_path.iterdir()):
        assert_same_weights(load_model(path, config=CONFIG), expected)
    assert load_model(tmp_path / "model_sd_5000.ckpt", config=CONFIG).metadata["step"] == "5000"
    assert "pytorch_lightning" not in sys.modules


def test_half_files_are_converted_tensor_by_tensor_to_the_dtype_asked_for(tmp_path, state):
    save_file({name: tensor.half() for name, tensor in state.items()}, tmp_path / "half.safetensors")
    exact = load_model(tmp_path / "half.safetensors", config=CONFIG)
    name = "unet.middle_block.0.in_layers.2.weight"
    source = "model.diffusion_model." + name[len("unet.") :]
    assert torch.equal(exact.state_dict()[name], state[source].half().float())
    mixed = load_model(tmp_path / "half.safetensors", config=CONFIG, dtype={"unet": torch.bfloat16})
    dtypes = {name: {p.dtype for p in part.parameters()} for name, part in mixed.named_children()}
    assert dtypes == {"unet": {torch.bfloat16}, "vae": {torch.float32}, "text_encoder": {torch.float32}}
    half = load_model(tmp_path / "half.safetensors", config=CONFIG, dtype=torch.float16)
    assert half.text_encoder.attn_mask.dtype == torch.float16


def test_reading_maps_the_file_anew_so_that_its_pages_are_given_back(tmp_path, state, monkeypatch):
    monkeypatch.setattr("hoi.common.tensors.REMAP_BYTES", 1_000_000)
    save_file(state, tmp_path / "sd.safetensors")
    torch.save(state, tmp_path / "sd.ckpt")
    for name in ("sd.safetensors", "sd.ckpt"):
        file, opened = WeightFile(tmp_path / name), []
        monkeypatch.setattr(file, "_open", lambda f=file, o=opened: o.append(1) or WeightFile._open(f))
        assert all(torch.equal(file[key], tensor) for key, tensor in state.items())
        assert len(opened) > 4
        file.unmap()
        opened.clear()
        assert torch.equal(file[key := next(iter(state))], state[key]) and opened


def test_loading_leaves_no_part_of_a_folder_mapped(folder, monkeypatch):
    files: list[WeightFile] = []
    monkeypatch.setattr(WeightFile, "unmap", lambda self: files.append(self))
    load_model(folder)
    assert {"unet", "vae", "text_encoder"} <= {file.path.parent.name for file in files}


# --- Stable Diffusion: a folder ---


def test_a_diffusers_folder_says_its_sizes_and_equals_diffusers(folder):
    model = load_model(folder)
    assert model.config == CONFIG
    assert_equals_diffusers(model)


def test_every_spelling_of_a_folder_gives_the_same_model(tmp_path, folder):
    expected = load_model(folder)
    bins = shutil.copytree(folder, tmp_path / "bins")
    for part, stem in (("unet", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model"), ("text_encoder", "")):
        source = next((bins / part).glob("*.safetensors"))
        torch.save(load_file(source), bins / part / f"{stem or 'pytorch_model'}.bin")
        source.unlink()
    old = shutil.copytree(folder, tmp_path / "old")  # VAE names before diffusers 0.18, text names before transformers 5
    vae = old / "vae" / "diffusion_pytorch_model.safetensors"
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = load_file(vae)
    for new_name, old_name in older.items():
        tensors = {name.replace(f"attentions.0.{new_name}.", f"attentions.0.{old_name}."): t
                   for name, t in tensors.items()}  # fmt: skip
    assert sum("attentions.0.query" in name for name in tensors) == 4
    save_file(tensors, vae)
    text = old / "text_encoder" / "model.safetensors"
    tensors = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in load_file(text).items()}
    save_file(tensors | {"text_model.embeddings.position_ids": torch.arange(77)[None]}, text)
    settings = json.loads((old / "vae" / "config.json").read_text())
    (old / "vae" / "config.json").write_text(json.dumps({k: v for k, v in settings.items() if k != "scaling_factor"}))
    for where in (bins, old):
        assert_same_weights(load_model(where), expected)
    assert source_hash(bins) != source_hash(folder) == source_hash(shutil.copytree(folder, tmp_path / "copy"))


def test_half_precision_variants_are_found_and_the_full_one_is_preferred(tmp_path, folder):
    half = write_folder(tmp_path / "half", variant="fp16")
    assert not list(half.glob("*/diffusion_pytorch_model.safetensors"))
    assert_same_weights(load_model(half), load_model(folder))
    twice = shutil.copytree(folder, tmp_path / "twice")
    full = load_file(twice / "unet" / "diffusion_pytorch_model.safetensors")
    zeros = {name: torch.zeros_like(tensor) for name, tensor in full.items()}
    save_file(zeros, twice / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    assert_same_weights(load_model(twice), load_model(folder))


def test_a_folder_missing_a_part_is_refused_by_that_part(tmp_path, folder):
    for part in ("unet", "vae/config.json", "text_encoder", "scheduler", "vae/diffusion_pytorch_model.safetensors"):
        copy = shutil.copytree(folder, tmp_path / part.replace("/", "_"))
        shutil.rmtree(copy / part) if (copy / part).is_dir() else (copy / part).unlink()
        with pytest.raises(FileNotFoundError, match=part.split("/")[0]):
            load_model(copy)
    with pytest.raises(FileNotFoundError, match=r"holds no weights; expected one of diffusion_pytorch_model"):
        load_model(copy)


def test_a_folder_says_what_its_network_predicts_and_on_which_schedule(tmp_path, folder):
    copy = shutil.copytree(folder, tmp_path / "v")
    scheduler(prediction_type="v_prediction").save_pretrained(copy / "scheduler")
    assert load_model(copy).config.predicts == "v"
    for changes, message in (
        ({"prediction_type": "sample"}, "prediction_type is 'sample', expected 'epsilon'"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr is True, expected False as in Stable Diffusion 1.x"),
        ({"beta_schedule": "linear"}, "beta_schedule is 'linear', expected 'scaled_linear'"),
        ({"beta_end": 0.02}, "beta_end is 0.02, expected 0.012"),
        ({"trained_betas": [1e-3] * 1000}, "expected the settings .*terminal_signal is 0.6063"),
        ({"trained_betas": [6e-3] * 1000}, "trained_betas are not Stable Diffusion 1.x's, nor those with a lower end"),
    ):
        scheduler(**changes).save_pretrained(copy / "scheduler")
        with pytest.raises(ValueError, match=message):
            load_model(copy)


# --- condition encoders ---


@torch.no_grad()
def assert_branch(model: HOIDiffusion, name: str, adapter: T2IAdapter) -> None:
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(5))
    for ours, theirs in zip(model.condition_encoders[name](image), adapter(image), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_official_condition_encoders_equal_diffusers_and_say_that_they_learned_from_midas(tmp_path, folder, official):
    model = load_model(folder, adapter=official, dtype=torch.float32)
    for seed, name in enumerate(BRANCHES.values()):
        assert_branch(model, name, t2i_adapter(seed))
    assert model.metadata["normal_source"] == "midas" and model.metadata["stage"] == "hoi"
    prefixed = {f"adapter.{name}": tensor for name, tensor in torch.load(official).items()}
    torch.save(prefixed, tmp_path / "prefixed.pth")
    other = load_model(folder)
    load_adapter(other, tmp_path / "prefixed.pth")
    assert_same_weights(model, other)


def test_one_branch_starts_from_a_t2i_adapter_in_each_spelling_and_the_others_stay(tmp_path, folder):
    adapter = t2i_adapter(7)
    torch.save(published_adapter_names(adapter.state_dict()), tmp_path / "t2iadapter_depth_sd14v1.pth")
    torch.save(published_adapter_names(adapter.state_dict(), "adapter."), tmp_path / "prefixed.pth")
    adapter.save_pretrained(tmp_path)
    for name in ("t2iadapter_depth_sd14v1.pth", "prefixed.pth", "diffusion_pytorch_model.safetensors"):
        model = load_model(folder)
        model.add_condition_encoders()
        before = {k: v.clone() for k, v in model.condition_encoders.state_dict().items()}
        init_branch(model, "normal", tmp_path / name)
        assert_branch(model, "normal", adapter)
        after = model.condition_encoders.state_dict()
        changed = {key.partition(".")[0] for key in before if not torch.equal(before[key], after[key])}
        assert changed == {"normal"}


def test_adapters_of_other_kinds_are_refused_by_name(tmp_path, folder, official):
    model = load_model(folder)
    model.add_condition_encoders()
    before, metadata = {name: tensor.clone() for name, tensor in model.state_dict().items()}, dict(model.metadata)
    files = {
        # One grey channel in, as those for sketch and canny have.
        r"does not fit: .*conv_in.weight is \(32, 64, 3, 3\), expected \(32, 192, 3, 3\)": published_adapter_names(
            t2i_adapter(1, in_channels=1).state_dict()
        ),
        "is no weight file known here": t2i_adapter(1, kind="light_adapter").state_dict(),  # for colour
        "does not fit: .*missing": T2IAdapter(3, [32, 64], 2, 16, "full_adapter_xl").state_dict(),
        "is .*expected a T2I-Adapter for one condition": torch.load(official),
    }
    for message, tensors in files.items():
        torch.save(dict(tensors), tmp_path / "adapter.pth")
        with pytest.raises(ValueError, match=rf"adapter\.pth {message}"):
            init_branch(model, "normal", tmp_path / "adapter.pth")
    torch.save(published_adapter_names(t2i_adapter(1).state_dict()), tmp_path / "one.pth")
    with pytest.raises(ValueError, match="for one condition, expected .*; train.py --init-branch NAME=FILE starts"):
        load_adapter(model, tmp_path / "one.pth")
    with pytest.raises(ValueError, match="'depth' is no condition; choose from skeleton, normal, segmentation"):
        init_branch(model, "depth", tmp_path / "one.pth")
    incomplete = {k: v for k, v in torch.load(official).items() if not k.startswith("mask_ada.body.7")}
    torch.save(incomplete, tmp_path / "part.pth")
    with pytest.raises(ValueError, match=r"part\.pth does not fit: 108 .* 104 found; 4 missing: mask_ada\.body\.7"):
        load_adapter(model, tmp_path / "part.pth")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.metadata == metadata


@torch.no_grad()
def residuals(model: HOIDiffusion, twin: torch.nn.Module, hint: dict[str, Tensor], seen: list[str]) -> list[float]:
    """How far ours and diffusers' residuals are apart; `seen` are the images that diffusers' is shown."""
    generator = torch.Generator().manual_seed(6)
    latents, context = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 77, 32, generator=generator)
    ours = model.unet.control(latents, torch.tensor([500]), context, model.condition_encoders(hint)[0])
    images = torch.cat([hint[name] for name in seen], dim=1)
    down, middle = twin(latents, torch.tensor([500]), context, images, return_dict=False)
    return [(a - b).abs().max().item() for a, b in zip(ours, [*down, middle], strict=True)]


def test_a_controlnet_is_read_in_every_spelling_and_takes_the_place_of_condition_encoders(
    tmp_path, folder, state, official
):
    twin = controlnet()
    published = published_controlnet_names(twin)
    torch.save({"state_dict": state | published}, tmp_path / "control_sd15_hoi.pth")  # as its training writes it
    save_file(published, tmp_path / "control_v11.safetensors")
    save_file(published_controlnet_names(twin, ""), tmp_path / "bare.safetensors")
    twin.save_pretrained(tmp_path / "controlnet")
    paths = sorted(tmp_path.iterdir())
    of_folder = tmp_path / "controlnet" / "diffusion_pytorch_model.safetensors"
    models = [load_model(folder, adapter=path) for path in (*paths, of_folder)]
    for model in models:
        assert_same_weights(model, models[0])
        assert model.metadata["stage"] == "controlnet"
    other = load_model(folder, adapter=official)
    assert other.metadata["normal_source"] == "midas"
    load_adapter(other, paths[0])
    assert not other.metadata["normal_source"]  # of encoders that are gone
    hint = {name: torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(k))
            for k, name in enumerate(CONDITION_NAMES)}  # fmt: skip
    assert max(residuals(models[0], twin, hint, ["skeleton", "normal", "segmentation"])) < 1e-4
    assert len({source_hash(path) for path in (folder, *paths)}) == len(paths) + 1

    export_own(models[0], tmp_path / "own.safetensors")
    assert_same_weights(load_model(tmp_path / "own.safetensors"), models[0])
    told = describe_weights(tmp_path / "own.safetensors")
    assert "with a ControlNet; use with --checkpoint or --base" in told
    for export in (export_official, export_diffusers):
        with pytest.raises(ValueError, match="a ControlNet, the paper's baseline, is exported to own alone"):
            export(models[0], tmp_path / "exported")
    export_single(models[0], tmp_path / "single.safetensors")
    assert_same_weights(load_model(tmp_path / "single.safetensors"), load_model(folder))
    load_adapter(models[0], official)  # and back
    assert_same_weights(models[0], load_model(folder, adapter=official))


def test_a_controlnet_of_one_image_is_a_start_alone_and_then_says_nothing_of_the_others(tmp_path, folder):
    twin = controlnet(3)
    torch.save(published_controlnet_names(twin), tmp_path / "control_v11p_sd15_normalbae.pth")
    twin.save_pretrained(tmp_path / "normalbae")
    controlnet(9).save_pretrained(tmp_path / "all")
    torch.save(published_adapter_names(t2i_adapter(1).state_dict()), tmp_path / "t2i.pth")
    model = load_model(folder)
    starts = "image, expected .* the three condition images together; train.py --baseline controlnet --init-branch NAME"
    with pytest.raises(ValueError, match=starts):
        load_adapter(model, tmp_path / "control_v11p_sd15_normalbae.pth")
    model.add_condition_encoders(controlnet=True)
    with pytest.raises(ValueError, match="t2i.pth is a T2I-Adapter for one condition, expected a ControlNet"):
        init_branch(model, "normal", tmp_path / "t2i.pth")
    with pytest.raises(ValueError, match="images together, expected a ControlNet for one condition image; --adapter"):
        init_branch(model, "normal", tmp_path / "all")
    hint = {name: torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(k))
            for k, name in enumerate(CONDITION_NAMES)}  # fmt: skip
    for branch, name in (("normal", "control_v11p_sd15_normalbae.pth"), ("segmentation", "normalbae")):
        init_branch(model, branch, tmp_path / name)
        assert max(residuals(model, twin, hint, [branch])) < 1e-4


def test_a_controlnet_file_is_described_with_the_flag_that_takes_it(tmp_path):
    model = HOIDiffusion(PRESETS["tiny"](), controlnet=True)
    state, folder = model.state_dict(), tmp_path / "folder"
    folder.mkdir()
    saved = "diffusion_pytorch_model.safetensors"  # in a folder of its own, as diffusers does
    for path, names, first in (
        (tmp_path / "a.safetensors", controlnet_names(state), "control_model.input_hint_block.0.weight"),
        (folder, diffusers_controlnet_names(state, model.config.unet), "controlnet_cond_embedding.conv_in.weight"),
    ):
        file = path / saved if path.is_dir() else path
        tensors = {theirs: state[ours] for ours, (theirs,) in names.items()}
        save_file(tensors, file)
        assert describe_weights(path) == (
            f"a ControlNet for the three condition images together, complete ({len(names)} tensors), sizes tiny; use "
            f"with --base FILE --adapter {file}"
        )
        save_file(tensors | {first: tensors[first][:, :3].contiguous()}, file)
        told = describe_weights(path)
        assert told.startswith("a ControlNet for one condition image, complete")
        assert told.endswith(f"start from it with train.py --baseline controlnet --init-branch NAME={file}")
        with pytest.raises(ValueError, match=f"{file} is a ControlNet for one condition image, expected a whole model"):
            load_model(file)


# --- what is refused ---


def test_missing_unexpected_and_misshapen_tensors_are_counted_and_named(tmp_path, state):
    wrong = {k: v for k, v in state.items() if not k.startswith("model.diffusion_model.out.2")}
    wrong |= {f"third_party.{i}": torch.zeros(1) for i in range(7)}
    wrong["first_stage_model.quant_conv.weight"] = torch.zeros(8, 8)
    key = "cond_stage_model.transformer.text_model.encoder.layers.1.self_attn.k_proj.weight"  # one of three stacked
    wrong[key] = torch.zeros(64, 32)
    save_file(wrong, tmp_path / "wrong.safetensors")
    with pytest.raises(ValueError) as caught:
        load_model(tmp_path / "wrong.safetensors", config=CONFIG)
    message = str(caught.value)
    assert f"wrong.safetensors does not fit: {len(state)} tensors expected, {len(wrong)} found" in message
    assert "2 missing: model.diffusion_model.out.2.bias, model.diffusion_model.out.2.weight" in message
    assert "7 unexpected: third_party.0" in message and "and 2 more" in message
    assert "2 of another shape: " in message and f"{key} is (64, 32), expected (32, 32)" in message
    assert "first_stage_model.quant_conv.weight is (8, 8), expected (8, 8, 1, 1)" in message


def test_what_only_other_programs_read_is_left_out_by_name_with_a_word(tmp_path, state, folder):
    notes = {"denoiser.sigmas": torch.ones(9), "cond_stage_model.logit_scale": torch.ones(())}
    notes |= {"global_step": torch.ones(()), "cond_stage_model.transformer.text_projection.weight": torch.ones(4, 4)}
    torch.save({f"module.{name}": tensor for name, tensor in (state | notes).items()}, tmp_path / "sd.ckpt")
    with pytest.warns(RuntimeWarning) as said:
        assert_same_weights(load_model(tmp_path / "sd.ckpt", config=CONFIG), load_model(folder))
    assert len(said) == 1 and all(name in str(said[0].message) for name in ("sd.ckpt: left out", *notes))


def test_a_missing_part_is_named_and_a_vae_can_be_given_in_every_spelling(tmp_path, state, folder):
    prefixes = {"VAE": "first_stage_model.", "text encoder": "cond_stage_model."}
    for part, prefix in prefixes.items():
        path = tmp_path / f"no {part}.safetensors"
        save_file({name: tensor for name, tensor in state.items() if not name.startswith(prefix)}, path)
        with pytest.raises(ValueError, match=rf"no {part}\.safetensors has no {part}.*: give "):
            load_model(path, config=CONFIG)
    bare = {name[len(prefixes["VAE"]) :]: tensor for name, tensor in state.items() if name.startswith(prefixes["VAE"])}
    torch.save({"state_dict": bare | {"loss.logvar": torch.ones(())}}, tmp_path / "vae-ft.ckpt")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    modern = {name: tensor.contiguous() for name, tensor in diffusers_vae().state_dict().items()}
    dated = {reduce(lambda text, pair: text.replace(*pair), old.items(), name): modern[name] for name in modern}
    save_file(modern, tmp_path / "diffusion_pytorch_model.safetensors")
    save_file(dated, tmp_path / "old.safetensors")
    save_file(state, tmp_path / "whole.safetensors")
    for name in ("vae-ft.ckpt", "diffusion_pytorch_model.safetensors", "old.safetensors", "whole.safetensors"):
        model = load_model(tmp_path / "no VAE.safetensors", config=CONFIG, vae=tmp_path / name)
        assert_same_weights(model, load_model(folder))
    save_file({name: torch.zeros_like(tensor) for name, tensor in modern.items()}, tmp_path / "zeros.safetensors")
    for base in (folder, tmp_path / "whole.safetensors"):
        vae = load_model(base, config=CONFIG, vae=tmp_path / "zeros.safetensors").vae
        assert not any(tensor.any() for tensor in vae.state_dict().values())
    with pytest.raises(ValueError, match=r"no VAE.* is a lone part of a diffusers folder"):
        save_file(clip_text_model().state_dict(), tmp_path / "no VAE at all.safetensors")
        load_model(folder, vae=tmp_path / "no VAE at all.safetensors")


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "scheduler"])
def test_settings_of_another_type_are_refused_in_a_sentence_that_names_the_file(tmp_path, folder, part):
    path = shutil.copytree(folder, tmp_path / "copy") / part / "config.json"
    path = path if path.exists() else path.with_name("scheduler_config.json")
    settings = json.loads(path.read_text())
    wrong = [settings | {key: value} for key in settings for value in ([], [1])]
    for content in ([], [settings], "text", *wrong):
        path.write_text(json.dumps(content))
        try:
            whole_model(tmp_path / "copy")
        except (ValueError, OSError) as problem:
            assert str(tmp_path / "copy") in str(problem) and "\n" not in str(problem)
        else:
            assert content.keys() == settings.keys()  # of a setting that nobody reads


def test_other_families_are_refused_by_name(tmp_path, state, folder):
    unet = "model.diffusion_model."
    to_k = next(name for name in state if name.endswith("attn2.to_k.weight"))
    families = {
        "Stable Diffusion 2.x file .text width 1024": state | {to_k: torch.zeros(32, 1024)},
        "Stable Diffusion 2.x file": {"cond_stage_model.model.transformer.resblocks.0.ln_1.weight": torch.zeros(4)},
        "Stable Diffusion XL file": state | {"conditioner.embedders.0.transformer.weight": torch.zeros(4)},
        "a LoRA": {"lora_unet_down_blocks_0_attentions_0_proj_in.lora_up.weight": torch.zeros(4, 4)},
        "a LoRA .small": {"unet.down_blocks.0.attentions.0.to_k.lora_A.weight": torch.zeros(4, 4)},
        "an inpainting model: its U-Net takes 9": state | {f"{unet}input_blocks.0.0.weight": torch.zeros(32, 9, 3, 3)},
        "another model: its U-Net takes 8": state | {f"{unet}input_blocks.0.0.weight": torch.zeros(32, 8, 3, 3)},
        "a ControlNet": {"control_model.input_blocks.0.0.weight": torch.zeros(32, 4, 3, 3)},
        "a lone part of a diffusers folder": diffusers_unet().state_dict(),
        "an autoencoder .VAE. alone, expected a whole model": diffusers_vae().state_dict(),
        "a lone part of .*, expected a whole model": clip_text_model().state_dict(),
        "no weight file known here: 1 tensors, the first what": {"what": torch.zeros(1)},
    }
    path = tmp_path / "file.safetensors"
    for message, tensors in families.items():
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
        with pytest.raises(ValueError, match=rf"file\.safetensors is {'' if message[0] != 'S' else 'a '}{message}"):
            load_model(path, config=CONFIG)
    for changes, message in (
        ({"cross_attention_dim": 1024}, "Stable Diffusion 2.x"),
        ({"in_channels": 9}, "an inpainting Stable Diffusion"),
        ({"act_fn": "gelu"}, "act_fn is 'gelu', expected 'silu'"),
    ):
        copy = shutil.copytree(folder, tmp_path / "copy", dirs_exist_ok=True)
        settings = json.loads((folder / "unet" / "config.json").read_text())
        (copy / "unet" / "config.json").write_text(json.dumps(settings | changes))
        with pytest.raises(ValueError, match=message):
            load_model(copy)
    settings = json.loads((folder / "vae" / "config.json").read_text())
    (copy / "unet" / "config.json").write_text((folder / "unet" / "config.json").read_text())
    (copy / "vae" / "config.json").write_text(json.dumps(settings | {"block_out_channels": [32, 48, 64, 64]}))
    with pytest.raises(ValueError, match="copy: expected sizes of which a network can be built"):
        load_model(copy)
    (copy / "text_encoder_2").mkdir()
    with pytest.raises(ValueError, match="is a Stable Diffusion XL folder"):
        load_model(copy)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
def test_weights_that_are_no_numbers_are_refused_by_name(tmp_path, state, value):
    name = "model.diffusion_model.middle_block.0.in_layers.2.weight"
    bad = state[name].clone()
    bad[3, 2, 1, 0] = value
    save_file(state | {name: bad}, tmp_path / "bad.safetensors")
    if value != 1e6:
        small = {k: v.to(torch.float8_e5m2) if v.ndim > 1 else v for k, v in state.items()}
        save_file(small | {name: bad.to(torch.float8_e5m2)}, tmp_path / "fp8.safetensors")
        with pytest.raises(ValueError, match=rf"fp8\.safetensors: {name} holds NaN or infinite values \(in the file\)"):
            load_model(tmp_path / "fp8.safetensors", config=CONFIG)
    cause = "as torch.float16" if value == 1e6 else "in the file"  # 1e6 is a number, but none of float16's
    with pytest.raises(ValueError, match=rf"bad\.safetensors: {name} holds NaN or infinite values \({cause}\)"):
        load_model(tmp_path / "bad.safetensors", config=CONFIG, dtype=torch.float16)


@pytest.mark.parametrize("name", ["sd.safetensors", "sd.ckpt"])
@pytest.mark.parametrize("kept", [0.001, 0.5, 0.999])
def test_truncated_files_are_refused_by_name(tmp_path, state, name, kept):
    path = tmp_path / name
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    os.truncate(path, int(kept * path.stat().st_size))
    with pytest.raises(ValueError, match=rf"{name} is not a readable"):
        load_model(path, config=CONFIG)


@pytest.mark.parametrize("content", [b"", b"solid cube", b"<html>sign in</html>", bytes(range(256))])
def test_a_file_that_is_no_weight_file_gets_no_advice_to_run_it(tmp_path, content):
    path = tmp_path / "sd.ckpt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="neither the zip archive nor the pickle") as error:
        load_model(path)
    assert "weights_only" not in str(error.value)


class Trap:
    """Creates a folder when unpickled by a reader that executes what a file asks for."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_a_checkpoint_cannot_run_code(tmp_path, state):
    sprung = tmp_path / "sprung"
    torch.save({"state_dict": state, "callbacks": Trap(sprung)}, tmp_path / "trap.ckpt")
    (tmp_path / "bare.ckpt").write_bytes(pickle.dumps({"state_dict": Trap(sprung)}, protocol=2))
    for name, message in (("trap.ckpt", "it names code that is not allowed to run: .*mkdir"), ("bare.ckpt", "")):
        with pytest.raises(ValueError, match=rf"{name} is not a readable torch file .*{message}"):
            load_model(tmp_path / name, config=CONFIG)
    assert not sprung.exists()


@contextlib.contextmanager
def an_ordinary_user():
    if os.name != "posix":
        pytest.skip("needs POSIX permissions")
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_file_that_may_not_be_read_says_so():
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o755)
        path = Path(place) / "sd.safetensors"
        path.write_bytes(b"secret")
        path.chmod(0)
        with an_ordinary_user(), pytest.raises(PermissionError, match=r"sd\.safetensors may not be read by this user"):
            load_model(path)


def test_pointers_and_integers_are_not_taken_for_weights(tmp_path, state):
    (tmp_path / "lfs.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(ValueError, match="git lfs pull"):
        load_model(tmp_path / "lfs.safetensors")
    name = "first_stage_model.quant_conv.weight"
    save_file(state | {name: state[name].to(torch.int8)}, tmp_path / "int8.safetensors")
    with pytest.raises(ValueError, match=rf"{name} is torch.int8, expected floating point"):
        load_model(tmp_path / "int8.safetensors", config=CONFIG)


# --- the scripts ---


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Two records of 64 px with rendered normals."""
    folder = tmp_path_factory.mktemp("data")
    writer = DatasetWriter(folder, {"command": "test"})
    for index in range(2):
        pictures = np.random.default_rng(index).integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)
        record = {"text": "a mug", "normal_source": "geometry", "height": 64, "width": 64}
        writer.append(write_pictures(folder, index, record, pictures[0], Conditions(*pictures[1:])))
    writer.finish(grid=False)
    return folder


def sampling(data: Path, out: Path, *words: str | Path) -> None:
    fixed = ["--data", str(data), "--count", "1", "--steps", "2", "--device", "cpu", "--out", str(out)]
    sample.run([*map(str, words), *fixed])


def test_sampling_from_public_weights_records_all_files_and_warns_of_midas_normals(
    tmp_path, folder, official, data, capsys
):
    vae = folder / "vae" / "diffusion_pytorch_model.safetensors"
    sampling(data, tmp_path / "out", "--base", folder, "--adapter", official, "--vae", vae)
    said = capsys.readouterr().out
    assert "warning: the condition encoders learned from normal maps of source 'midas'" in said
    assert "these are of source 'geometry'" in said
    record = read_records(tmp_path / "out")[0]
    assert record["checkpoint"]["name"] == "sd" and record["checkpoint"]["adapter"] == "model_ad_5000.pth"
    assert record["checkpoint"]["sha256"] == source_hash(folder)
    assert record["checkpoint"]["adapter_sha256"] == source_hash(official)
    assert record["checkpoint"]["vae"] == vae.name and record["checkpoint"]["vae_sha256"] == source_hash(vae)
    assert record["normal_source"] == "geometry"


def test_sampling_without_condition_encoders_says_which_flag_is_missing(tmp_path, folder, official, data):
    with pytest.raises(SystemExit, match="base model without condition encoders: give it --adapter, or .* --no-cond"):
        sampling(data, tmp_path / "out", "--base", folder)
    for words, message in (
        (["--adapter", official], "--adapter belongs to a --base"),
        (["--vae", official], "--vae belongs to a --base"),
        (["--base", folder, "--checkpoint", official], "--base and --checkpoint exclude each other"),
    ):
        with pytest.raises(SystemExit, match=message):
            sampling(data, tmp_path / "out", *words)
    with pytest.raises(SystemExit, match="sample.py: .*is condition encoders of the official"):
        sampling(data, tmp_path / "out", "--base", official)
    with pytest.raises(SystemExit, match="at nowhere.*get Stable Diffusion 1.x yourself, under its licence.*built-in"):
        sampling(data, tmp_path / "out", "--base", "nowhere")
    with pytest.raises(SystemExit, match="at nowhere.*get the official HOIDiffusion release's model_ad.*built-in"):
        sampling(data, tmp_path / "out", "--base", folder, "--adapter", "nowhere")
    assert not (tmp_path / "out").exists()


def test_training_starts_branches_from_t2i_adapters_and_says_what_it_began_from(tmp_path, folder, data):
    adapters = {"skeleton": 21, "normal": 22}
    words = []
    for name, seed in adapters.items():
        torch.save(published_adapter_names(t2i_adapter(seed).state_dict()), tmp_path / f"{name}.pth")
        words += ["--init-branch", f"{name}={tmp_path / name}.pth"]
    run = ["--data", str(data), "--base", str(folder), "--out", str(tmp_path / "run"), "--steps", "1", *words]
    settings = ["--batch-size", "1", "--preview-every", "0", "--learning-rate", "0", "--weight-decay", "0"]
    train.train(train.parse_args([*run, *settings, "--device", "cpu", "--dtype", "fp32"]))
    trained = load_model(tmp_path / "run" / "model.safetensors")
    for name, seed in adapters.items():  # a learning rate of 0 leaves them as they came
        assert_branch(trained, name, t2i_adapter(seed))
        assert trained.metadata[f"{name}_sha256"] == source_hash(tmp_path / f"{name}.pth")
    assert trained.metadata["base"] == "sd" and trained.metadata["base_sha256"] == source_hash(folder)
    assert trained.metadata["normal_source"] == "geometry"
    assert_equals_diffusers(trained)
    for wrong, message in (("depth=a.pth", "'depth' is no condition"), ("normal", "'normal' names no file")):
        args = train.parse_args([*run[:4], "--out", str(tmp_path / "no"), "--init-branch", wrong])
        with pytest.raises(ValueError, match=message):
            train.starting_model(args)


def test_a_bad_weight_file_ends_every_script_with_its_message_and_leaves_nothing_behind(
    tmp_path, state, data, monkeypatch, capsys
):
    save_file(state, tmp_path / "cut.safetensors")
    os.truncate(tmp_path / "cut.safetensors", 100_000)
    nine_channels = {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(32, 9, 3, 3)}
    save_file(state | nine_channels, tmp_path / "nine.safetensors")
    torch.save({"state_dict": Trap(tmp_path / "sprung")}, tmp_path / "trap.ckpt")
    messages = {
        "cut.safetensors": "is not a readable safetensors file",
        "nine.safetensors": "an inpainting model: its U-Net takes 9 channels",
        "trap.ckpt": "it names code that is not allowed to run",
    }
    before = set(tmp_path.iterdir())
    for name, message in messages.items():
        weights, out = tmp_path / name, tmp_path / "out"
        with pytest.raises(SystemExit, match=f"^sample.py: .*{name}.*{message}"):
            sampling(data, out, "--base", weights)
        monkeypatch.setattr(sys, "argv", ["train.py", "--data", str(data), "--base", str(weights), "--out", str(out)])
        with pytest.raises(SystemExit, match=f"^train.py: .*{name}.*{message}"):
            train.main()
        assert main([str(weights)]) == 1 and message in capsys.readouterr().err
    assert set(tmp_path.iterdir()) == before


# --- the checker ---


def test_the_checker_says_what_files_are_and_fails_for_what_does_not_fit(tmp_path, folder, state, capsys):
    save_file(state, tmp_path / "small.safetensors")
    assert main([str(folder)]) == 0
    said = capsys.readouterr().out
    assert "a diffusers folder, complete" in said and "without condition encoders; use with --base" in said
    assert main([str(folder), str(tmp_path / "small.safetensors"), str(tmp_path / "absent")]) == 1
    said = capsys.readouterr()
    assert "complete" in said.out and "small.safetensors does not fit: 1130 tensors expected" in said.err
    assert "no weight file at" in said.err


def test_the_checker_knows_parts_of_models_of_either_size(tmp_path, official, capsys):
    widths = {"sd1": ([320, 640, 1280, 1280], 8), "tiny": ([64, 96, 128, 96], 4)}
    for preset, (channels, factor) in widths.items():
        adapter = T2IAdapter(3, channels, 2, factor).state_dict()
        save_file(adapter, tmp_path / "branch.safetensors")
        assert main([str(tmp_path / "branch.safetensors")]) == 0
        said = capsys.readouterr().out
        assert f"for one condition, complete ({len(adapter)} tensors), sizes {preset}; start a branch with" in said
        vae = VAE(PRESETS[preset]().vae).state_dict()
        save_file(vae, tmp_path / "vae.safetensors")
        assert main([str(tmp_path / "vae.safetensors")]) == 0
        expected = f"alone, complete ({len(vae)} tensors), sizes {preset}; use with --base FILE --vae {tmp_path}"
        assert expected in capsys.readouterr().out
    clip = {"logit_scale": torch.zeros(()), "visual.conv1.weight": torch.zeros(8, 3, 4, 4)}
    save_file(clip, tmp_path / "open_clip_model.safetensors")
    assert main([str(tmp_path / "open_clip_model.safetensors")]) == 0
    assert "open_clip's layout (2 tensors); use with python -m hoi.metrics --fake DIR --clip" in capsys.readouterr().out
    with pytest.raises(ValueError, match="is a CLIP model in open_clip's layout, expected a whole model"):
        load_model(tmp_path / "open_clip_model.safetensors")
    assert main([str(official)]) == 1
    assert "model_ad_5000.pth does not fit" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_the_checker_runs_as_a_module(monkeypatch, capsys):
    built_in = ROOT / "hoi" / "assets" / "tiny.safetensors"
    monkeypatch.setattr(sys, "argv", ["weights", str(built_in)])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_module("hoi.weights", run_name="__main__")  # python -m hoi.weights FILE
    with safe_open(built_in, framework="pt") as file:
        count = len(file.keys())
    assert exit_.value.code == 0
    assert f"a model of this project, complete ({count} tensors), sizes tiny, predicts" in capsys.readouterr().out
