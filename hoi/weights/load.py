"""What a weight file is, by the names and shapes of its tensors.  WeightFile -> kind, or an error naming the family.

Which tensor of which file is which of ours, and reading them.  WeightFiles -> checked tensors under our names.

Names and shapes are held against ours before a tensor is read; then tensors are read, checked and converted one by one,
so that loading takes the memory of the finished model and little more.

Weights that others trained.  Stable Diffusion 1.x, official HOIDiffusion, T2I-Adapter -> our network.  Sec. 3.3.

    python -m hoi.weights FILE ...       # what each file is, whether it fits, what is missing

Other families, damaged files and pickles that ask for code are refused by name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from hoi.common.files import sha256_of
from hoi.common.tensors import WeightFile, is_finite, shown
from hoi.network.config import ModelConfig, sd1_config
from hoi.network.model import CONDITION_NAMES, HOIDiffusion
from hoi.network.text import causal_mask
from hoi.weights.diffusers_config import FOLDER_PARTS, SCHEDULER_FILE, read_folder_config
from hoi.weights.names import (
    LAST_LAYER,
    OFFICIAL_BRANCHES,
    POSITION_IDS,
    SHORT_TEXT_PREFIX,
    SINGLE_FILE_EXTRAS,
    TEXT_PREFIX,
    UNET_PREFIX,
    VAE_PREFIX,
    NameMap,
    diffusers_adapter_names,
    diffusers_unet_names,
    diffusers_vae_names,
    ema_name,
    official_adapter_names,
    padding,
    single_file_names,
    t2i_adapter_names,
    text_names,
)

Shapes = Mapping[str, tuple[int, ...]]

FORMAT_VERSION = "1"  # of our own files
OWN = "a model of this project"
SINGLE_FILE = "a Stable Diffusion 1.x file"
EMA_ONLY = "a Stable Diffusion 1.x file with averaged (EMA) U-Net weights only"
OFFICIAL_ADAPTER = "condition encoders of the official HOIDiffusion code (model_ad_N.pth)"
T2I_ADAPTER = "a T2I-Adapter for one condition"
DIFFUSERS_T2I_ADAPTER = "a T2I-Adapter for one condition, saved by diffusers"
CLIP = "a CLIP model in open_clip's layout"


def kind_of(file: WeightFile) -> str:
    """One of the constants above.  Raises ValueError naming the family of any other file."""
    if {"format_version", "config", "stage"} <= file.metadata.keys():
        return OWN
    shapes = {name.removeprefix("adapter."): shape for name, shape in file.shapes.items()}
    if foreign := _foreign_family(file.shapes) or _foreign_adapter(shapes):
        raise ValueError(f"{file.path} is {foreign}")
    if any(name.startswith(UNET_PREFIX) for name in shapes):
        return SINGLE_FILE
    if any(name.startswith("model_ema.diffusion_model") for name in shapes):
        return EMA_ONLY
    if {name.partition(".")[0] for name in shapes} & OFFICIAL_BRANCHES.keys():
        return OFFICIAL_ADAPTER
    if "conv_in.weight" in shapes and "body.0.resnets.0.block1.weight" in shapes:
        return DIFFUSERS_T2I_ADAPTER
    if "conv_in.weight" in shapes and "body.0.block1.weight" in shapes:
        return T2I_ADAPTER
    if "logit_scale" in shapes and any(name.startswith("visual.") for name in shapes):
        return CLIP
    raise ValueError(
        f"{file.path} is no weight file known here: {len(shapes)} tensors, the first {shown(shapes) or 'none'};"
        f" expected {SINGLE_FILE}, {T2I_ADAPTER}, {OFFICIAL_ADAPTER}, or {OWN}"
    )


def _foreign_family(shapes: Shapes) -> str | None:
    """Models that are not Stable Diffusion 1.x, or only a piece of one; None for what may be one."""

    def has(*beginnings: str) -> bool:
        return any(name.startswith(beginnings) for name in shapes)

    if any(".lora_" in name or "lora_unet_" in name or ".lora." in name for name in shapes):
        return "a LoRA (small changes to a model); merge it into a Stable Diffusion 1.x file first, with diffusers"
    if has("conditioner.embedders.", UNET_PREFIX + "label_emb."):
        return "a Stable Diffusion XL file, expected 1.x"
    if has("control_model.", "controlnet_cond_embedding."):
        return "a ControlNet, which this network has no place for"
    if has("model.diffusion_model.joint_blocks.", "model.diffusion_model.double_blocks.", "double_blocks."):
        return "a transformer model (Stable Diffusion 3 or Flux), expected Stable Diffusion 1.x"
    context = next((shape[1] for name, shape in shapes.items() if _is_text_key(name) and len(shape) == 2), None)
    if context == 1024 or has("cond_stage_model.model.transformer."):
        return "a Stable Diffusion 2.x file (text width 1024, many of them v-prediction), expected 1.x"
    if "v_pred" in shapes:
        return "marked as v-prediction, with an unknown schedule; take its diffusers folder, which says how it was made"
    channels = shapes.get(UNET_PREFIX + "input_blocks.0.0.weight", (0, 4))[1]
    if channels != 4:
        names = {9: "an inpainting", 8: "a picture-editing", 5: "a depth-guided"}
        return f"{names.get(channels, 'another')} model: its U-Net takes {channels} channels, expected 4"
    return _lone_part(shapes)


def _is_text_key(name: str) -> bool:
    return name.endswith("attn2.to_k.weight")


def _lone_part(shapes: Shapes) -> str | None:
    whole = "expected the file or folder of a whole model"
    if "down_blocks.0.resnets.0.conv1.weight" in shapes:
        return f"the U-Net of a diffusers folder alone; {whole}: give the folder that holds unet/"
    if not any(name.startswith((UNET_PREFIX, VAE_PREFIX, "model_ema.")) for name in shapes):
        if "encoder.conv_in.weight" in shapes and "decoder.conv_in.weight" in shapes:
            return f"an autoencoder (VAE) alone; {whole}"
        if any(name.endswith("embeddings.token_embedding.weight") for name in shapes):
            return f"a CLIP text encoder alone; {whole}"
    return None


def _foreign_adapter(shapes: Shapes) -> str | None:
    """T2I-Adapters that fit none of the three branches.  shapes: without a leading `adapter.`"""
    if any(".out_conv." in name for name in shapes) and any(name.startswith("body.") for name in shapes):
        return "a T2I-Adapter for colour, a smaller network than the condition encoders"
    if "style_embedding" in shapes or any(name.startswith("transformer_layes.") for name in shapes):
        return "a T2I-Adapter for style, a transformer over CLIP's picture tokens, unlike the condition encoders"
    if "conv_in.weight" not in shapes or not any(name.startswith("body.") for name in shapes):
        return None
    channels = shapes["conv_in.weight"][1]
    if channels in (64, 256):
        family = "sketch or canny" if channels == 64 else "Stable Diffusion XL's sketch or canny"
        return f"a T2I-Adapter for {family}: one grey channel in, where the condition encoders take three"
    if channels == 768:
        return "a T2I-Adapter for Stable Diffusion XL (16 x 16 pixels a cell), expected one for 1.x"
    return None


ADAPTER_FOLDERS = {name: f"adapter_{name}" for name in CONDITION_NAMES}  # of an export of ours
VARIANTS = ("", ".fp16", ".non_ema")  # of file names in a diffusers folder, the best first

Dtypes = torch.dtype | Mapping[str, torch.dtype]


@dataclass(frozen=True)
class FilePart:
    """A file and the part of the model that it holds.

    sources   our tensor names -> its names; several are stacked along dimension 0
    extras    names in the file that nobody needs
    zeros     those among them that must hold zeros, lest the file describe another network
    """

    file: WeightFile
    sources: NameMap
    extras: frozenset[str] = frozenset()
    zeros: frozenset[str] = frozenset()


def expected_shapes(config: ModelConfig, with_conditions: bool) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model's tensors, without the model."""
    with torch.device("meta"):
        model = HOIDiffusion(config, with_conditions)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


# --- one function a layout ---


def single_file(file: WeightFile, config: ModelConfig, ema_only: bool) -> FilePart:
    ours = expected_shapes(config, with_conditions=False)
    short = any(name.startswith(SHORT_TEXT_PREFIX + "embeddings.") for name in file)
    prefix = SHORT_TEXT_PREFIX if short else TEXT_PREFIX
    sources = single_file_names(ours, config.text, prefix)
    averages = {name: (ema_name(theirs),) for name, (theirs, *_) in sources.items() if name.startswith("unet.")}
    extras = SINGLE_FILE_EXTRAS | {theirs for (theirs,) in averages.values()}
    if ema_only:
        sources |= averages
    return FilePart(file, sources, frozenset(extras))


def diffusers_folder(folder: Path, config: ModelConfig) -> list[FilePart]:
    ours = list(expected_shapes(config, with_conditions=True))
    unet, vae, text = (WeightFile(weights_in(folder / part, part == "text_encoder")) for part in FOLDER_PARTS)
    old_attention = any(name.endswith("attentions.0.query.weight") for name in vae)
    prefix = "text_model." if any(name.startswith("text_model.") for name in text) else ""
    text_sources = {name: tuple(prefix + k for k in keys) for name, keys in text_names(config.text).items()}
    added = frozenset(padding(config.unet))
    zeros = frozenset(name for name in added & unet.keys() if name.endswith(LAST_LAYER))
    return [
        FilePart(unet, diffusers_unet_names(ours, config.unet), added, zeros),
        FilePart(vae, diffusers_vae_names(ours, config.vae, old_attention)),
        FilePart(text, text_sources, frozenset({prefix + POSITION_IDS})),
        *adapter_folders(folder, ours),
    ]


def adapter_folders(folder: Path, ours: list[str]) -> list[FilePart]:
    """The three T2IAdapter folders of an export; none when there is none."""
    places = {name: folder / place for name, place in ADAPTER_FOLDERS.items()}
    if not any(place.is_dir() for place in places.values()):
        return []
    files = {name: WeightFile(weights_in(place, is_text=False)) for name, place in places.items()}
    return [t2i_adapter(file, ours, name, saved_by_diffusers=True) for name, file in files.items()]


def official_adapter(file: WeightFile, ours: list[str]) -> FilePart:
    return _with_prefix(FilePart(file, official_adapter_names(ours)))


def t2i_adapter(file: WeightFile, ours: list[str], branch: str, saved_by_diffusers: bool) -> FilePart:
    names = diffusers_adapter_names if saved_by_diffusers else t2i_adapter_names
    sources = names(ours, branch)
    return FilePart(file, sources) if saved_by_diffusers else _with_prefix(FilePart(file, sources))


def _with_prefix(piece: FilePart) -> FilePart:
    """Some releases put `adapter.` in front of every name."""
    if not any(name.startswith("adapter.") for name in piece.file):
        return piece
    return replace(piece, sources={ours: (f"adapter.{theirs}",) for ours, (theirs,) in piece.sources.items()})


def weights_in(folder: Path, is_text: bool) -> Path:
    """The weight file of one part of a diffusers folder; of several the fullest, .safetensors first."""
    stems = (
        {".safetensors": "model", ".bin": "pytorch_model"}
        if is_text
        else {suffix: "diffusion_pytorch_model" for suffix in (".safetensors", ".bin")}
    )
    candidates = [f"{stem}{variant}{suffix}" for variant in VARIANTS for suffix, stem in stems.items()]
    for name in candidates:
        if (folder / name).is_file():
            return folder / name
    if list(folder.glob("*.index.json")):
        raise ValueError(f"{folder} holds weights in several shards; save them as one file")
    raise FileNotFoundError(f"{folder} holds no weights; expected one of {', '.join(candidates)}")


# --- comparing and reading ---


def check_part(piece: FilePart, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ValueError unless a file has just the tensors that its part of the model needs, and harmless extras."""
    file, wanted = piece.file, {name for names in piece.sources.values() for name in names}
    missing, unexpected = wanted - file.shapes.keys(), file.shapes.keys() - wanted - piece.extras
    other = []
    for ours, theirs in piece.sources.items():
        rows, *rest = expected[ours]
        shape = (rows // len(theirs), *rest)
        other += [
            f"{name} is {file.shapes[name]}, expected {shape}"
            for name in theirs
            if name in file.shapes and not _same_shape(file.shapes[name], shape, ours)
        ]
    problems = [f"{len(missing)} missing: {shown(missing)}"] if missing else []
    problems += [f"{len(unexpected)} unexpected: {shown(unexpected)}"] if unexpected else []
    problems += [f"{len(other)} of another shape: {shown(other)}"] if other else []
    if problems:
        raise ValueError(
            f"{file.path} does not fit: {len(wanted)} tensors expected, {len(file)} found; " + "; ".join(problems)
        )
    for name in sorted(piece.zeros):
        if file[name].any():
            raise ValueError(
                f"{file.path}: {name} is not zero: this level attends on the way down alone, and our U-Net attends"
                " both ways or not at all"
            )


def _same_shape(shape: tuple[int, ...], expected: tuple[int, ...], ours: str) -> bool:
    """diffusers holds the VAE's 1x1 attention convolutions as matrices; nothing else may differ."""
    return shape == expected or (ours.startswith("vae.") and ".attn_1." in ours and (*shape, 1, 1) == expected)


def read_parts(
    pieces: list[FilePart], config: ModelConfig, device: str | torch.device, dtype: Dtypes
) -> dict[str, Tensor]:
    """All tensors of the pieces under our names, converted one by one.

    Raises ValueError when a piece does not fit, or when a value is no number that `dtype` can hold.
    """
    expected = expected_shapes(config, with_conditions=True)
    for piece in pieces:
        check_part(piece, expected)
    state: dict[str, Tensor] = {}
    for piece in pieces:
        for ours, theirs in piece.sources.items():
            parts = [piece.file[name] for name in theirs]
            tensor = (parts[0] if len(parts) == 1 else torch.cat(parts)).reshape(expected[ours])
            if not tensor.is_floating_point():
                raise ValueError(f"{piece.file.path}: {theirs[0]} is {tensor.dtype}, expected floating point weights")
            wanted = dtype if isinstance(dtype, torch.dtype) else dtype.get(ours.partition(".")[0], torch.float32)
            state[ours] = prepared(tensor, device, wanted)
            if not is_finite(state[ours]):
                cause = f"as {wanted}" if is_finite(tensor) else "in the file"
                raise ValueError(f"{piece.file.path}: {theirs[0]} holds NaN or infinite values ({cause})")
        piece.file.unmap()
    return state


def prepared(tensor: Tensor, device: str | torch.device, dtype: torch.dtype) -> Tensor:
    """A copy of a weight as the model wants it: convolutions channels-last, which CPUs and GPUs run fastest."""
    layout = torch.channels_last if tensor.ndim == 4 else torch.contiguous_format
    return tensor.to(device, dtype if tensor.is_floating_point() else None, copy=True, memory_format=layout)


WHERE = (
    "Public weights are not shipped: get {what} yourself, under its licence (docs/weights.md). Without {flag}"
    " sample.py uses the built-in miniature"
)
# What the official condition encoders learned from: normals of a depth that MiDaS estimated, not of rendered geometry.
OFFICIAL_NORMAL_SOURCE = "midas"


# --- loading ---


def load_model(
    path: str | Path,
    adapter: str | Path | None = None,
    config: ModelConfig | None = None,
    device: str | torch.device = "cpu",
    dtype: Dtypes = torch.float32,
    preset: str | None = None,
) -> HOIDiffusion:
    """A model from any file or folder that holds a whole one, in eval mode.

    path      a model of ours, a Stable Diffusion 1.x file (.safetensors, .ckpt; the official model_sd_N.ckpt too), or
              a diffusers folder of Stable Diffusion 1.x
    adapter   condition encoders: see `load_adapter`; None: those in `path`, if any
    config    sizes, for files that do not say them (default: Stable Diffusion 1.x)
    dtype     of all weights, or by part: {"unet": ..., "vae": ..., "text_encoder": ..., "condition_encoders": ...},
              float32 for parts that are not named
    preset    refuse a model of another one's sizes
    Raises FileNotFoundError, PermissionError, or ValueError naming file, counts and first offending names; NaN too.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no weight file at {path}. {WHERE.format(what='Stable Diffusion 1.x', flag='--base')}")
    config, pieces, metadata = whole_model(path, config)
    if preset is not None and config.name != preset:
        raise ValueError(f"{path} holds the preset {config.name!r}, expected {preset!r}")
    model = model_of(config, read_parts(pieces, config, device, dtype))
    model.metadata = metadata
    if adapter is not None:
        load_adapter(model, adapter)
    return model


def model_of(config: ModelConfig, state: Mapping[str, Tensor]) -> HOIDiffusion:
    """A model made of these very tensors, under its own names, in eval mode; no other memory is used.

    Condition encoders are there when the tensors have them.  Raises RuntimeError when names or shapes do not fit.
    """
    with torch.device("meta"):
        model = HOIDiffusion(config, with_conditions=any(name.startswith("condition_encoders.") for name in state))
    model.load_state_dict(state, strict=True, assign=True)
    # The mask is no weight: it is in no file.
    like = model.text_encoder.positional_embedding
    model.text_encoder.attn_mask = causal_mask(config.text.context_length).to(like)
    return model.eval()


def load_adapter(model: HOIDiffusion, path: str | Path) -> None:
    """Give a model the condition encoders of a file: the official model_ad_N.pth, or the folder of an export.

    They take dtype and device of the U-Net, and the place of condition encoders that were there.
    Raises like load_model, and leaves the model alone then.
    """
    path = Path(path)
    if not path.exists():
        what = "the official HOIDiffusion release's model_ad_N.pth"
        raise FileNotFoundError(f"no weight file at {path}. {WHERE.format(what=what, flag='--base and --adapter')}")
    ours, metadata = list(expected_shapes(model.config, with_conditions=True)), {"stage": "hoi"}
    if path.is_dir():
        pieces = adapter_folders(path, ours)
        if not pieces:
            raise FileNotFoundError(f"{path} has no {', '.join(ADAPTER_FOLDERS.values())}")
    else:
        file = WeightFile(path)
        if (kind := kind_of(file)) != OFFICIAL_ADAPTER:
            hint = "; --init-branch takes it" if kind in (T2I_ADAPTER, DIFFUSERS_T2I_ADAPTER) else ""
            raise ValueError(f"{path} is {kind}, expected {OFFICIAL_ADAPTER}{hint}")
        pieces = [official_adapter(file, ours)]
        metadata["normal_source"] = OFFICIAL_NORMAL_SOURCE
    like = model.unet.out[2].weight
    state = read_parts(pieces, model.config, like.device, like.dtype)
    if model.condition_encoders is None:
        model.add_condition_encoders()
    model.condition_encoders.load_state_dict(
        {name.removeprefix("condition_encoders."): tensor for name, tensor in state.items()}, strict=True, assign=True
    )
    model.metadata = model.metadata | metadata


def init_branch(model: HOIDiffusion, branch: str, path: str | Path) -> None:
    """Start one condition encoder from a T2I-Adapter file, in either spelling, for training.

    branch   skeleton, normal or segmentation
    """
    if branch not in CONDITION_NAMES:
        raise ValueError(f"{branch!r} is no condition; choose from {', '.join(CONDITION_NAMES)}")
    if model.condition_encoders is None:
        raise ValueError("a branch needs condition encoders; call add_condition_encoders first")
    file = WeightFile(path)
    kind, ours = kind_of(file), list(expected_shapes(model.config, with_conditions=True))
    if kind not in (T2I_ADAPTER, DIFFUSERS_T2I_ADAPTER):
        raise ValueError(f"{path} is {kind}, expected {T2I_ADAPTER}")
    piece = t2i_adapter(file, ours, branch, saved_by_diffusers=kind == DIFFUSERS_T2I_ADAPTER)
    like = model.unet.out[2].weight
    state = read_parts([piece], model.config, like.device, like.dtype)
    prefix = f"condition_encoders.{branch}."
    encoder = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    model.condition_encoders[branch].load_state_dict(encoder, strict=True)


def normals_differ(model: HOIDiffusion, sources: Iterable[str | None]) -> str | None:
    """A warning when the model learned from another kind of normal maps than it is to be given, else None.

    sources   `normal_source` of the records ("geometry": rendered), None where a record does not say
    """
    learned = model.metadata.get("normal_source")
    other = sorted({source for source in sources if source} - set((learned or "").split(",")))
    if not learned or not other:
        return None
    hint = " (as in the official release; ignore this if the file is an export trained on others)"
    return (
        f"warning: the condition encoders learned from normal maps of source {learned!r}"
        f"{hint if learned == OFFICIAL_NORMAL_SOURCE else ''}, these are of source {', '.join(map(repr, other))}:"
        " expect less faithful pictures, or fine-tune with train.py"
    )


def source_hash(path: str | Path) -> str:
    """SHA-256 of a weight file, or of names and hashes of the weight and settings files in a folder's parts."""
    path = Path(path)
    if not path.is_dir():
        return sha256_of(path)
    parts = (*FOLDER_PARTS, SCHEDULER_FILE.parent, *ADAPTER_FOLDERS.values())
    found = (file for part in parts for file in (path / part).glob("*"))
    files = sorted(file for file in found if file.suffix in (".safetensors", ".bin", ".json"))
    lines = [f"{file.relative_to(path).as_posix()} {sha256_of(file)}" for file in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


# --- what is this file? ---


def whole_model(path: Path, config: ModelConfig | None = None) -> tuple[ModelConfig, list[FilePart], dict[str, str]]:
    """Sizes of the model at `path`, the pieces that hold it (not yet compared with it), and its metadata."""
    if path.is_dir():
        if not (path / "unet").is_dir():
            parts = ", ".join(FOLDER_PARTS)
            raise FileNotFoundError(f"{path} is no diffusers folder: unet/ is missing; expected {parts}")
        config = read_folder_config(path)
        pieces = diffusers_folder(path, config)
        stage = "base" if len(pieces) == len(FOLDER_PARTS) else "hoi"
        return config, pieces, _metadata(config, stage, path) | _kept_metadata(pieces[0].file) | {"stage": stage}
    file = WeightFile(path)
    if (kind := kind_of(file)) == OWN:
        config = own_config(file)
        names: NameMap = {name: (name,) for name in expected_shapes(config, file.metadata["stage"] != "base")}
        return config, [FilePart(file, names)], file.metadata
    if kind not in (SINGLE_FILE, EMA_ONLY):
        raise ValueError(f"{path} is {kind}, expected a whole model: a Stable Diffusion 1.x file or folder")
    kept = _kept_metadata(file)
    if config is None:  # an export of ours says its sizes
        config = ModelConfig.from_json(kept["config"]) if "config" in kept else sd1_config()
    metadata = _metadata(config, "base", path) | kept | {"stage": "base"}
    return config, [single_file(file, config, ema_only=kind == EMA_ONLY)], metadata


def own_config(file: WeightFile) -> ModelConfig:
    """The configuration in a model file of this project.  Raises ValueError for another version, or when unreadable."""
    if (version := file.metadata["format_version"]) != FORMAT_VERSION:
        raise ValueError(f"{file.path} has format version {version}, expected {FORMAT_VERSION}")
    try:
        return ModelConfig.from_json(file.metadata["config"])
    except ValueError as error:
        raise ValueError(f"{file.path}: {error}") from error


def _kept_metadata(file: WeightFile) -> dict[str, str]:
    """What an export of ours remembers of the training, in a file of another layout."""
    return {name.removeprefix("hoi_"): value for name, value in file.metadata.items() if name.startswith("hoi_")}


def _metadata(config: ModelConfig, stage: str, path: Path) -> dict[str, str]:
    digits = "".join(character for character in path.stem.partition("model_sd_")[2] if character.isdigit())
    return {
        "preset": config.name,
        "stage": stage,
        "step": digits or "0",
        "command": f"read from {path.name}",
        "scaling_factor_measured": "yes",  # it came with the VAE
    }
