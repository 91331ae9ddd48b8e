"""Trained weights as files: our own, and those that other tools open.  HOIDiffusion -> files.

Every format has one function, and WEIGHT_FORMATS at the end names them all.  Tensors are cut apart and renamed by the
maps of names.py; how the model was trained goes along wherever a format can say it.  Files and folders are written
whole or not at all, and `load_model` reads them back to the same bits.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from hoi.common.files import ASSETS, new_folder, write_whole
from hoi.common.tensors import save_model
from hoi.network.config import ModelConfig, tiny_config
from hoi.network.model import HOIDiffusion
from hoi.network.text import BOS_ID, CONTEXT_LENGTH, EOS_ID, clip_tokenizer
from hoi.weights import names as layouts
from hoi.weights.diffusers_config import SCHEDULER_FILE, adapter_config, folder_config
from hoi.weights.load import ADAPTER_FOLDERS, FORMAT_VERSION, KEPT_PREFIX

# What diffusers' pipeline looks for first: the class of each part.  There is no safety checker to load.
MODEL_INDEX = {
    "_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"], "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"], "feature_extractor": [None, None],
    "safety_checker": [None, None], "requires_safety_checker": False,
}  # fmt: skip


def _trained_state(model: HOIDiffusion, half: bool) -> dict[str, Tensor]:
    """Every weight on the CPU, in float16 or float32."""
    dtype = torch.float16 if half else torch.float32
    return {name: tensor.detach().to("cpu", dtype) for name, tensor in model.state_dict().items()}


def _renamed(state: Mapping[str, Tensor], names: layouts.NameMap) -> dict[str, Tensor]:
    """Our tensors under the names of a layout; the text encoder's stacked ones are cut apart."""
    cut = ((theirs, state[ours].chunk(len(theirs))) for ours, theirs in names.items())
    # Copies: safetensors refuses tensors that share memory, and files hold plain rows, not channels-last.
    return {name: tensor.clone(memory_format=torch.contiguous_format)
            for theirs, tensors in cut for name, tensor in zip(theirs, tensors, strict=True)}  # fmt: skip


def _metadata_to_keep(model: HOIDiffusion) -> dict[str, str]:
    """How the model was trained, for a file of another layout; "format" is what transformers asks for."""
    # A single file has no ControlNet: what is left is no baseline.
    dropped = ("config",) if model.unet.control is None else ("config", "baseline")
    kept = {KEPT_PREFIX + name: value for name, value in model.metadata.items() if name not in dropped}
    return {"format": "pt"} | kept


def _refuse_controlnet(model: HOIDiffusion) -> None:
    if model.unet.control is not None:
        raise ValueError("a ControlNet, the paper's baseline, is exported to own alone (single: without it)")


def _prediction_type(config: ModelConfig) -> str:
    """What the U-Net predicts, in diffusers' word."""
    return {"eps": "epsilon", "v": "v_prediction"}[config.predicts]


# --- our own file ---


def export_own(
    model: HOIDiffusion, path: str | Path, half: bool = False, metadata: Mapping[str, str] | None = None
) -> list[Path]:
    """One safetensors file of this project: all tensors, and the metadata from which load_model rebuilds the model.

    half      floats as fp16, not fp32
    metadata  how it was trained: "step", "command" and whatever else; None: what the model was loaded with
    returns   what was written, as all exports do
    """
    trained = {"step": "0", "command": ""} | (model.metadata if metadata is None else dict(metadata))
    stage = "base" if model.condition_encoders is None else "hoi" if model.unet.control is None else "controlnet"
    what = {"format_version": FORMAT_VERSION, "preset": model.config.name, "config": model.config.to_json()}
    save_model(path, _trained_state(model, half), trained | what | {"stage": stage})
    return [Path(path)]


def export_built_in(model: HOIDiffusion, path: str | Path) -> list[Path]:
    """The miniature as the repository carries it: our own file in fp16, with the sampling defaults of the preset.

    These defaults are measured after the training, so the training's own file does not know them yet.
    """
    measured = tiny_config()
    model.config = replace(model.config, sampler=measured.sampler, guidance_scale=measured.guidance_scale,
                           num_inference_steps=measured.num_inference_steps)  # fmt: skip
    return export_own(model, path, half=True)


# --- Stable Diffusion's single file, and the official release's two ---


def _single_file_state(model: HOIDiffusion, text_prefix: str, half: bool) -> dict[str, Tensor]:
    """Without the trainer's vectors of the noise schedule, which every reader computes."""
    state = _trained_state(model, half)
    return _renamed(state, layouts.single_file_names(state, model.config.text, text_prefix))


def export_single(model: HOIDiffusion, path: str | Path, half: bool = False) -> list[Path]:
    """U-Net, VAE and text encoder as one Stable Diffusion safetensors file; condition encoders have no place in it.

    The sizes stand in the metadata (`hoi_config`), for reading it back.
    """
    metadata = _metadata_to_keep(model) | {f"{KEPT_PREFIX}config": model.config.to_json()}
    metadata |= {"prediction_type": _prediction_type(model.config)}
    save_model(path, _single_file_state(model, layouts.TEXT_PREFIX, half), metadata)
    return [Path(path)]


def export_official(model: HOIDiffusion, folder: str | Path, half: bool = False) -> list[Path]:
    """model_ad_N.pth and model_sd_N.ckpt as the official code's training writes them, N the steps.

    The official code knows eps prediction on Stable Diffusion's own schedule only; other models keep their weights, but
    it cannot sample them.
    Raises ValueError for a base model, which has no condition encoders, and for a ControlNet.
    """
    if model.condition_encoders is None:
        raise ValueError("the official layout needs condition encoders, and this is a base model: export to single")
    _refuse_controlnet(model)
    step, state = model.metadata.get("step", "0"), _trained_state(model, half)
    files = {
        Path(folder) / f"model_ad_{step}.pth": _renamed(state, layouts.official_adapter_names(state)),
        Path(folder) / f"model_sd_{step}.ckpt": _single_file_state(model, layouts.SHORT_TEXT_PREFIX, half),
    }
    for path, tensors in files.items():
        write_whole(path, lambda stream, tensors=tensors: torch.save(tensors, stream))
    return list(files)


# --- a folder of diffusers ---


def export_diffusers(model: HOIDiffusion, folder: str | Path, half: bool = False) -> list[Path]:
    """A diffusers folder: unet, vae, text_encoder, tokenizer, scheduler, a T2IAdapter a condition, and how to use them.

    Raises FileExistsError when the folder is there, ValueError when diffusers' classes cannot hold these sizes, and for
    a ControlNet.
    """
    _refuse_controlnet(model)
    folder, config = Path(folder), model.config
    settings = folder_config(config)
    index = MODEL_INDEX | {"scheduler": ["diffusers", settings[str(SCHEDULER_FILE)]["_class_name"]]}
    texts = {path: _json_text(content) for path, content in (settings | {"model_index.json": index}).items()}
    texts["README.md"] = _readme(model, folder.name)
    texts |= _tokenizer_files()
    state, metadata = _trained_state(model, half), _metadata_to_keep(model)
    names = {
        "unet": layouts.diffusers_unet_names(state, config.unet),
        "vae": layouts.diffusers_vae_names(state, config.vae),
        "text_encoder": layouts.text_names(config.text, "text_model."),
    }
    if model.condition_encoders is not None:
        for name, place in ADAPTER_FOLDERS.items():
            bare = layouts.diffusers_adapter_names(state, name).items()
            names[place] = {ours: (layouts.ADAPTER_PREFIX + theirs,) for ours, (theirs,) in bare}
            texts[f"{place}/config.json"] = _json_text(adapter_config(config))
    with new_folder(folder) as unfinished:
        for path, text in texts.items():
            (unfinished / path).parent.mkdir(parents=True, exist_ok=True)
            (unfinished / path).write_text(text, encoding="utf-8")
        for part, part_names in names.items():  # renamed one after the other: each is a copy in memory
            tensors = _renamed(state, part_names)
            if part == "unet":
                tensors |= layouts.padding(config.unet, torch.float16 if half else torch.float32)
            if part == "vae":
                tensors = _attention_as_matrices(tensors)
            stem = "model" if part == "text_encoder" else "diffusion_pytorch_model"
            save_model(unfinished / part / f"{stem}.safetensors", tensors, metadata)
    return [folder]


def _attention_as_matrices(vae: dict[str, Tensor]) -> dict[str, Tensor]:
    """diffusers holds the VAE's 1x1 attention convolutions as linear layers: (C, C, 1, 1) -> (C, C)."""
    beginnings = ("encoder.mid_block.attentions", "decoder.mid_block.attentions")
    return {name: tensor[:, :, 0, 0].contiguous() if name.startswith(beginnings) and tensor.ndim == 4 else tensor
            for name, tensor in vae.items()}  # fmt: skip


def _readme(model: HOIDiffusion, name: str) -> str:
    """What the folder is and how to use it; name: the folder's."""
    step, prediction = model.metadata.get("step", "an unknown number of"), _prediction_type(model.config)
    text = (ASSETS / "exports" / "diffusers.md").read_text()
    return text.format(name=name, step=step, prediction=prediction, config=model.config)


def _tokenizer_files() -> dict[str, str]:
    """CLIP's vocabulary as transformers wants it; open_clip spells the two special tokens otherwise."""
    tokenizer, special = clip_tokenizer(), {BOS_ID: "<|startoftext|>", EOS_ID: "<|endoftext|>"}
    vocabulary = {special.get(number, word): number for word, number in tokenizer.encoder.items()}
    merges = sorted(tokenizer.bpe_ranks, key=tokenizer.bpe_ranks.get)
    settings = {
        "tokenizer_class": "CLIPTokenizer", "model_max_length": CONTEXT_LENGTH, "do_lower_case": True,
        "add_prefix_space": False, "bos_token": special[BOS_ID],
        **dict.fromkeys(("eos_token", "pad_token", "unk_token"), special[EOS_ID]),
    }  # fmt: skip
    return {
        "tokenizer/vocab.json": json.dumps(vocabulary, ensure_ascii=False),
        "tokenizer/merges.txt": "\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges)]) + "\n",
        "tokenizer/tokenizer_config.json": _json_text(settings),
    }


def _json_text(settings: Mapping[str, object]) -> str:
    return json.dumps(settings, indent=2, sort_keys=True) + "\n"


# What tools/export_weights.py can write: (model, path, half) -> the files or the folder written.
WEIGHT_FORMATS: dict[str, Callable[[HOIDiffusion, str | Path, bool], list[Path]]] = {
    "own": export_own, "official": export_official, "single": export_single, "diffusers": export_diffusers,
}  # fmt: skip
