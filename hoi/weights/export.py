"""Trained weights in the formats that other tools open.  Our network -> official, Stable Diffusion, diffusers files.

Every file is written whole or not at all; reading it back with `load_model` gives the same bits.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from open_clip import SimpleTokenizer
from torch import Tensor

from hoi.common.files import write_atomically
from hoi.common.tensors import save_model
from hoi.network.config import ModelConfig
from hoi.network.model import CONDITION_NAMES, HOIDiffusion
from hoi.weights.diffusers_config import adapter_config, folder_config
from hoi.weights.load import ADAPTER_FOLDERS, FORMAT_VERSION
from hoi.weights.names import (
    SCHEDULE_BUFFERS,
    SHORT_TEXT_PREFIX,
    TEXT_PREFIX,
    NameMap,
    diffusers_adapter_names,
    diffusers_unet_names,
    diffusers_vae_names,
    official_adapter_names,
    padding,
    single_file_names,
    text_names,
)

FORMATS = ("own", "official", "single", "diffusers")
MODEL_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "feature_extractor": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
SNIPPET = """# {name}

Stable Diffusion weights fine-tuned for pictures of hands and objects, and three T2I-Adapters that they were trained
with: skeleton, normal map, segmentation.  Trained for {step} steps; prediction type {prediction}.

```python
import torch
from diffusers import MultiAdapter, StableDiffusionAdapterPipeline, T2IAdapter
from PIL import Image

adapters = [T2IAdapter.from_pretrained(f"adapter_{{name}}") for name in ("skeleton", "normal", "segmentation")]
pipeline = StableDiffusionAdapterPipeline.from_pretrained(".", adapter=MultiAdapter(adapters))
pictures = [Image.open(f"{{name}}.png").convert("RGB") for name in ("skeleton", "normal", "segmentation")]  # {size} px
image = pipeline(
    "A hand is grasping a mug on the beach",
    image=pictures,
    height={size},
    width={size},
    num_inference_steps=50,
    guidance_scale={guidance:g},
    adapter_conditioning_scale=[1.0, 1.0, 1.0],
    generator=torch.Generator().manual_seed(0),
).images[0]
```

`adapter_conditioning_scale=[1.0, 1.0, 1.0]` matters: the three features are summed, each with weight 1, as in training.
MultiAdapter called without weights takes 1/3 each, which gives other pictures without any warning.
"""


def export_own(
    model: HOIDiffusion, path: str | Path, half: bool = False, metadata: Mapping[str, str] | None = None
) -> None:
    """One safetensors file of this project: all tensors, and the metadata from which load_model rebuilds the model.

    half      floats as fp16, not fp32
    metadata  how it was trained: "step", "command" and whatever else; None: what the model was loaded with
    """
    trained = {"step": "0", "command": ""} | (model.metadata if metadata is None else dict(metadata))
    stage = "base" if model.condition_encoders is None else "hoi"
    what = {"format_version": FORMAT_VERSION, "preset": model.config.name, "config": model.config.to_json()}
    save_model(path, _state(model, half), trained | what | {"stage": stage})


def export_single(model: HOIDiffusion, path: str | Path, half: bool = False) -> None:
    """U-Net, VAE and text encoder as one Stable Diffusion safetensors file; the condition encoders have no place in it.

    The sizes stand in the metadata (`hoi_config`), for reading it back.
    """
    metadata = _kept_metadata(model) | {"hoi_config": model.config.to_json()}
    metadata |= {"prediction_type": _prediction(model.config)}
    save_model(path, _single_file_state(model, TEXT_PREFIX, half), metadata)


def export_official(model: HOIDiffusion, folder: str | Path, half: bool = False) -> tuple[Path, Path]:
    """model_ad_N.pth and model_sd_N.ckpt as the official code's training writes them, N the steps.

    The official code knows eps prediction on Stable Diffusion's own schedule only; other models keep their weights, but
    it cannot sample them.
    """
    state = _state(model, half)
    if model.condition_encoders is None:
        raise ValueError("the official layout needs condition encoders, and this is a base model: export to single")
    step, folder = model.metadata.get("step", "0"), Path(folder)
    adapter, base = folder / f"model_ad_{step}.pth", folder / f"model_sd_{step}.ckpt"
    tensors = _renamed(state, official_adapter_names(state))
    write_atomically(adapter, lambda temporary: torch.save(tensors, temporary))
    whole = _single_file_state(model, SHORT_TEXT_PREFIX, half)
    write_atomically(base, lambda temporary: torch.save(whole, temporary))
    return adapter, base


def export_diffusers(model: HOIDiffusion, folder: str | Path, half: bool = False) -> None:
    """A diffusers folder: unet, vae, text_encoder, tokenizer, scheduler, a T2IAdapter a condition, and how to use them.

    Raises FileExistsError when the folder is there, ValueError when diffusers' classes cannot hold these sizes.
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} exists already; name a folder that does not")
    texts = {path: _json(settings) for path, settings in folder_config(model.config).items()}
    texts |= {"model_index.json": _json(MODEL_INDEX), "README.md": _readme(model, folder.name), **_tokenizer_files()}
    state, metadata = _state(model, half), _kept_metadata(model)
    unet = diffusers_unet_names(state, model.config.unet)
    vae = diffusers_vae_names(state, model.config.vae)
    text = {ours: tuple(f"text_model.{key}" for key in keys)
            for ours, keys in text_names(model.config.text).items()}  # fmt: skip
    parts = {"unet/diffusion_pytorch_model": unet, "vae/diffusion_pytorch_model": vae, "text_encoder/model": text}
    if model.condition_encoders is not None:
        for name in CONDITION_NAMES:
            parts[f"{ADAPTER_FOLDERS[name]}/diffusion_pytorch_model"] = diffusers_adapter_names(state, name)
            texts[f"{ADAPTER_FOLDERS[name]}/config.json"] = _json(adapter_config(model.config))
    unfinished = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        for path, text in texts.items():
            (unfinished / path).parent.mkdir(parents=True, exist_ok=True)
            (unfinished / path).write_text(text, encoding="utf-8")
        for path, sources in parts.items():
            tensors = {name: _matrix(name, tensor) for name, tensor in _renamed(state, sources).items()}
            if sources is unet:
                tensors |= padding(model.config.unet, torch.float16 if half else torch.float32)
            save_model(unfinished / f"{path}.safetensors", tensors, metadata)
        os.replace(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def schedule_buffers(config: ModelConfig) -> dict[str, Tensor]:
    """The twelve float32 vectors (T,) that the original trainer keeps beside the weights, for the model's schedule.

    Source: Ho et al. 2020, Sec. 2 and eq. 7; the variance is that of q(x_{t-1} | x_t, x_0).
    """
    abar = config.noise_schedule().alphas_cumprod
    before = torch.cat([torch.ones(1, dtype=abar.dtype), abar[:-1]])
    alphas, noise_betas = abar / before, 1 - abar / before
    variance = noise_betas * (1 - before) / (1 - abar)
    values = (
        noise_betas, abar, before, abar.sqrt(), (1 - abar).sqrt(), (1 - abar).log(), (1 / abar).sqrt(),
        (1 / abar - 1).sqrt(), variance, variance.clamp(min=1e-20).log(), noise_betas * before.sqrt() / (1 - abar),
        (1 - before) * alphas.sqrt() / (1 - abar),
    )  # fmt: skip
    return {name: value.float() for name, value in zip(SCHEDULE_BUFFERS, values, strict=True)}


def _kept_metadata(model: HOIDiffusion) -> dict[str, str]:
    """How the model was trained, for a file of another layout; "format" is what transformers asks for."""
    return {"format": "pt"} | {f"hoi_{name}": value for name, value in model.metadata.items() if name != "config"}


def _state(model: HOIDiffusion, half: bool) -> dict[str, Tensor]:
    dtype = torch.float16 if half else torch.float32
    return {name: tensor.detach().to("cpu", dtype) for name, tensor in model.state_dict().items()}


def _renamed(state: Mapping[str, Tensor], sources: NameMap) -> dict[str, Tensor]:
    """Our tensors under the names of a layout; the text encoder's stacked ones are cut apart."""
    parts = ((names, state[ours].chunk(len(names))) for ours, names in sources.items())
    return {name: part.clone(memory_format=torch.contiguous_format)
            for names, pieces in parts for name, part in zip(names, pieces, strict=True)}  # fmt: skip


def _single_file_state(model: HOIDiffusion, text_prefix: str, half: bool) -> dict[str, Tensor]:
    state = _state(model, half)
    names = single_file_names(state, model.config.text, text_prefix)
    return schedule_buffers(model.config) | _renamed(state, names)


def _matrix(name: str, tensor: Tensor) -> Tensor:
    """diffusers holds the VAE's 1x1 attention convolutions as matrices."""
    is_vae_attention = name.startswith(("encoder.mid_block.attentions", "decoder.mid_block.attentions"))
    return tensor[:, :, 0, 0].contiguous() if is_vae_attention and tensor.ndim == 4 else tensor


def _prediction(config: ModelConfig) -> str:
    return {"eps": "epsilon", "v": "v_prediction"}[config.predicts]


def _readme(model: HOIDiffusion, name: str) -> str:
    config = model.config
    return SNIPPET.format(
        name=name,
        step=model.metadata.get("step", "an unknown number of"),
        prediction=_prediction(config),
        size=config.image_size,
        guidance=config.guidance_scale,
    )


def _tokenizer_files() -> dict[str, str]:
    """CLIP's vocabulary as transformers wants it; open_clip spells the two special tokens otherwise."""
    tokenizer, special = SimpleTokenizer(), {49406: "<|startoftext|>", 49407: "<|endoftext|>"}
    vocabulary = {special.get(number, word): number for word, number in tokenizer.encoder.items()}
    merges = sorted(tokenizer.bpe_ranks, key=tokenizer.bpe_ranks.get)
    start, end = special.values()
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "bos_token": start,
        "eos_token": end,
        "pad_token": end,
        "unk_token": end,
        "do_lower_case": True,
        "add_prefix_space": False,
    }
    return {
        "tokenizer/vocab.json": json.dumps(vocabulary, ensure_ascii=False),
        "tokenizer/merges.txt": "\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges)]) + "\n",
        "tokenizer/tokenizer_config.json": _json(settings),
    }


def _json(settings: Mapping[str, object]) -> str:
    return json.dumps(settings, indent=2) + "\n"
