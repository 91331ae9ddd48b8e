"""Weights that we or others trained.  Files -> `HOIDiffusion`, or a `Pipeline` that makes pictures.  Paper: Sec. 3.3.

The story of a file: kinds.py says what it is; `whole_model` says which parts of the model it and its neighbours hold
(`FilePart`: our names -> theirs); `check_part` compares names and shapes before a tensor is read; `read_parts` reads,
checks and converts one tensor after the other, so that loading takes the memory of the finished model and little more;
`load_model` makes the model, `load_pipeline` readies it for pictures.

Known are our own files, Stable Diffusion 1.x as one file or as a diffusers folder, the official HOIDiffusion release,
T2I-Adapters and ControlNets.  Other families, damaged files and pickles that ask for code are refused by name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from hoi.common.choices import CONDITION_NAMES, DTYPES
from hoi.common.files import ASSETS, content_expected, sha256_of
from hoi.common.machine import choose_device, fast_dtype, keep_freed_memory, return_freed_memory
from hoi.common.tensors import Shapes, WeightFile, check_shapes, is_finite, shapes_of, warn_left_out
from hoi.network.config import ModelConfig, sd1_config
from hoi.network.kernels import pack
from hoi.network.model import HOIDiffusion
from hoi.network.pipeline import Pipeline, SamplingSettings
from hoi.network.text import causal_mask
from hoi.weights import kinds
from hoi.weights import names as layouts
from hoi.weights.diffusers_config import FOLDER_PARTS, SCHEDULER_FILE, read_folder_config

Dtypes = torch.dtype | Mapping[str, torch.dtype]

BUILT_IN_MODEL = ASSETS / "tiny.safetensors"
TORCH_DTYPES = {name: getattr(torch, name) for name in DTYPES}
FORMAT_VERSION = "1"  # of our own files
KEPT_PREFIX = "hoi_"  # of metadata that an export of ours to another layout remembers
ADAPTER_FOLDERS = {name: f"adapter_{name}" for name in CONDITION_NAMES}  # of an export to diffusers
VARIANTS = ("", ".fp16")  # of file names in a diffusers folder, the best first
WHERE = (
    "Public weights are not shipped: get {what} yourself, under its licence (docs/weights.md). Without {flag}"
    " sample.py uses the built-in miniature"
)
PARTS = {
    "unet.": "U-Net: give the file of a whole model",
    "vae.": "VAE (the autoencoder): give one beside it with --vae FILE",
    "text_encoder.": "text encoder: give a file that holds it too, or a diffusers folder",
}
HINT = "condition_encoders.0.weight"  # of a ControlNet: the convolution that the condition images enter by
# What the official condition encoders learned from: normals of a depth that MiDaS estimated, not of rendered geometry.
OFFICIAL_NORMAL_SOURCE = "midas"


# --- which parts of the model it holds: one function a layout ---


@dataclass(frozen=True)
class FilePart:
    """A file and the part of the model that it holds.

    names    our tensor names -> the file's; several are stacked along dimension 0
    extras   names in the file that nobody needs
    zeros    those among them that must hold zeros, lest the file describe another network
    """

    file: WeightFile
    names: layouts.NameMap
    extras: frozenset[str] = frozenset()
    zeros: frozenset[str] = frozenset()


@cache
def expected_shapes(config: ModelConfig, stage: str) -> Shapes:
    """Names and shapes of a model's tensors, without the model.  stage: of its metadata, base, hoi or controlnet."""
    with torch.device("meta"):
        return shapes_of(HOIDiffusion(config, stage != "base", stage == "controlnet").state_dict())


def single_file(file: WeightFile, config: ModelConfig) -> FilePart:
    """A Stable Diffusion file."""
    ours = expected_shapes(config, "base")
    short = any(name.startswith(layouts.SHORT_TEXT_PREFIX + "embeddings.") for name in file)
    names = layouts.single_file_names(ours, config.text, layouts.SHORT_TEXT_PREFIX if short else layouts.TEXT_PREFIX)
    # Full files (v1-5-pruned) hold the U-Net's averages beside its weights: left alone.
    averages = {name for name in file if name.startswith("model_ema.")}
    return FilePart(file, names, frozenset(layouts.SINGLE_FILE_EXTRAS | averages))


def diffusers_folder(folder: Path, config: ModelConfig) -> list[FilePart]:
    """unet, vae and text_encoder, and in an export of ours the condition encoders."""
    ours = list(expected_shapes(config, "hoi"))
    unet, vae, text = (WeightFile(weights_in(folder / part)) for part in FOLDER_PARTS)
    prefix = "text_model." if any(name.startswith("text_model.") for name in text) else ""
    added = frozenset(layouts.padding(config.unet))
    zeros = frozenset(name for name in added & unet.keys() if name.endswith(layouts.LAST_LAYER))
    return [
        FilePart(unet, layouts.diffusers_unet_names(ours, config.unet), added, zeros),
        _diffusers_vae(vae, ours, config),
        FilePart(text, layouts.text_names(config.text, prefix), frozenset({prefix + layouts.POSITION_IDS})),
        *adapter_folders(folder, ours),
    ]


def _diffusers_vae(file: WeightFile, ours: Iterable[str], config: ModelConfig) -> FilePart:
    old_attention = any(name.endswith("attentions.0.query.weight") for name in file)
    return FilePart(file, layouts.diffusers_vae_names(ours, config.vae, old_attention))


def vae_file(file: WeightFile, config: ModelConfig) -> FilePart:
    """The autoencoder of a file: alone, as its trainer or diffusers saved it, or of a Stable Diffusion file.

    Raises ValueError for a file of another kind.
    """
    ours, kind = list(expected_shapes(config, "base")), kinds.kind_of(file)
    if kind not in (kinds.VAE, kinds.SINGLE_FILE):
        raise ValueError(f"{file.path} is {kind}, expected {kinds.VAE}, or {kinds.SINGLE_FILE}")
    if any(name.startswith("encoder.down_blocks.") for name in file):
        return _diffusers_vae(file, ours, config)
    prefix = "" if kind == kinds.VAE else layouts.VAE_PREFIX
    names = {name: (prefix + name.removeprefix("vae."),) for name in ours if name.startswith("vae.")}
    # Its training's loss and averages, and the rest of a Stable Diffusion file.
    extras = {name for name in file if name.startswith(("loss.", "model_ema.")) or not name.startswith(prefix)}
    return FilePart(file, names, frozenset(extras))


def with_vae(parts: list[FilePart], vae: FilePart) -> list[FilePart]:
    """The parts with another autoencoder, theirs left alone."""
    kept = [vae]
    for part in parts:
        names = {ours: theirs for ours, theirs in part.names.items() if not ours.startswith("vae.")}
        own = {name for ours in part.names.keys() - names.keys() for name in part.names[ours]}
        kept += [replace(part, names=names, extras=part.extras | own)] if names else []
    return kept


def adapter_folders(folder: Path, ours: Iterable[str]) -> list[FilePart]:
    """The three T2IAdapter folders of an export; none when there is none."""
    places = {name: folder / place for name, place in ADAPTER_FOLDERS.items()}
    if not any(place.is_dir() for place in places.values()):
        return []
    return [FilePart(WeightFile(weights_in(place)), layouts.diffusers_adapter_names(ours, name))
            for name, place in places.items()]  # fmt: skip


def lone_part(file: WeightFile, kind: str, config: ModelConfig, branch: str) -> tuple[FilePart, Shapes]:
    """The part of a model in a file that holds no more, and the shapes expected of a model.

    kind     of the file; a VAE, a ControlNet, the official model_ad_N.pth, or one condition encoder: of `branch`
    """
    ours = expected_shapes(config, "hoi")
    if kind in (kinds.CONTROLNET, kinds.IMAGE_CONTROLNET):
        return controlnet(file, kind, config)
    if kind == kinds.VAE:
        return vae_file(file, config), ours
    if kind == kinds.OFFICIAL_ADAPTER:
        return FilePart(file, layouts.official_adapter_names(ours)), ours
    by_diffusers = any(name.startswith("body.0.resnets.") for name in file)
    names = layouts.diffusers_adapter_names if by_diffusers else layouts.t2i_adapter_names
    return FilePart(file, names(ours, branch)), ours


def controlnet(file: WeightFile, kind: str, config: ModelConfig) -> tuple[FilePart, Shapes]:
    """A ControlNet in either spelling, and what is expected of it: one that sees one image keeps its 3 channels."""
    expected, prefix = expected_shapes(config, "controlnet"), ""
    if any(name.endswith(kinds.HINT_ENTRIES[1]) for name in file):
        names = layouts.diffusers_controlnet_names(expected, config.unet)
    else:
        prefix = layouts.CONTROL_PREFIX if any(name.startswith(layouts.CONTROL_PREFIX) for name in file) else ""
        names = layouts.controlnet_names(expected, prefix)
    width, _, *window = expected[HINT]
    if kind == kinds.IMAGE_CONTROLNET:
        expected = expected | {HINT: (width, 3, *window)}
    # Its trainer's files hold the Stable Diffusion beside which it learned.
    return FilePart(file, names, frozenset(name for name in file if not name.startswith(prefix))), expected


def lone_file(path: str | Path) -> WeightFile:
    """A file with a piece of a model, or the one in the folder in which diffusers saved it."""
    return WeightFile(weights_in(Path(path)) if Path(path).is_dir() else path)


def weights_in(folder: Path) -> Path:
    """The weight file of one part of a diffusers folder; of several the fullest, .safetensors first.

    Raises FileNotFoundError when there is none.
    """
    is_text = folder.name == "text_encoder"  # by transformers, which has other names for its files
    stems = ("model", "pytorch_model") if is_text else ("diffusion_pytorch_model",) * 2
    candidates = [f"{stem}{variant}{suffix}" for variant in VARIANTS
                  for stem, suffix in zip(stems, (".safetensors", ".bin"), strict=True)]  # fmt: skip
    for name in candidates:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"{folder} holds no weights; expected one of {', '.join(candidates)}")


def _kept_metadata(file: WeightFile) -> dict[str, str]:
    """What an export of ours remembers of the training, in a file of another layout."""
    told = file.metadata.items()
    return {name.removeprefix(KEPT_PREFIX): value for name, value in told if name.startswith(KEPT_PREFIX)}


def _foreign_metadata(path: Path, config: ModelConfig, file: WeightFile, stage: str) -> dict[str, str]:
    """What a file of ours would say of the training, for one that does not."""
    # The official training writes its steps into the name: model_sd_5000.ckpt.
    digits = "".join(character for character in path.stem.partition("model_sd_")[2] if character.isdigit())
    guessed = {
        "preset": config.name,
        "step": digits or "0",
        "command": f"read from {path.name}",
        "scaling_factor_measured": "yes",  # it came with the VAE, so training need not measure it
    }
    return guessed | _kept_metadata(file) | {"stage": stage}


def whole_model(path: Path, config: ModelConfig | None = None) -> tuple[ModelConfig, list[FilePart], dict[str, str]]:
    """Sizes of the model at `path`, the parts that hold it (not yet compared with it), and its metadata.

    config   sizes, for files that do not say them (default: Stable Diffusion 1.x)
    Raises FileNotFoundError or ValueError when there is no whole model but for some part, which `check_part` names.
    """
    if path.is_dir():
        if not (path / "unet").is_dir():
            parts = ", ".join(FOLDER_PARTS)
            raise FileNotFoundError(f"{path} is no diffusers folder: unet/ is missing; expected {parts}")
        with content_expected(path, "sizes of which a network can be built"):
            config = read_folder_config(path)
            parts = diffusers_folder(path, config)
        stage = "base" if len(parts) == len(FOLDER_PARTS) else "hoi"
        return config, parts, _foreign_metadata(path, config, parts[0].file, stage)
    file = WeightFile(path)
    with content_expected(path, "sizes of which a network can be built"):
        if (kind := kinds.kind_of(file)) == kinds.OWN:
            if (version := file.metadata["format_version"]) != FORMAT_VERSION:
                raise ValueError(f"{path} has format version {version}, expected {FORMAT_VERSION}")
            config, stage = ModelConfig.from_json(file.metadata["config"]), file.metadata["stage"]
            names: layouts.NameMap = {name: (name,) for name in expected_shapes(config, stage)}
            return config, [FilePart(file, names)], file.metadata
        if kind != kinds.SINGLE_FILE:
            raise ValueError(f"{path} is {kind}, expected a whole model: a Stable Diffusion 1.x file or folder")
        if config is None:  # an export of ours says its sizes
            kept = _kept_metadata(file)
            config = ModelConfig.from_json(kept["config"]) if "config" in kept else sd1_config()
        parts = [single_file(file, config)]
    return config, parts, _foreign_metadata(path, config, file, "base")


# --- comparing and reading ---


def check_part(part: FilePart, expected: Shapes) -> None:
    """Raise ValueError unless a file has just the tensors that its part of the model needs, and harmless extras.

    expected   as of `expected_shapes`
    Of the extras those that say something to other programs are told in a warning.
    """
    file, wanted = part.file, {}
    for prefix, told in PARTS.items():
        needed = [theirs for ours, theirs in part.names.items() if ours.startswith(prefix)]
        if needed and not any(name in file.shapes for theirs in needed for name in theirs):
            raise ValueError(f"{file.path} has no {told}")
    if unused := [name for name in file if layouts.UNUSED.fullmatch(name)]:
        warn_left_out(file.path, unused)
    for ours, theirs in part.names.items():
        rows, *rest = expected[ours]
        for name in theirs:
            wanted[name] = (rows // len(theirs), *rest)
            is_matrix = len(file.shapes.get(name, ())) == 2
            if is_matrix and ours.startswith("vae.") and ".attn_1." in ours:  # diffusers' 1x1 attention convolutions
                wanted[name] = wanted[name][:2]
    check_shapes(wanted, file.shapes, f"{file.path} does not fit", part.extras.union(unused))
    for name in sorted(part.zeros):
        if file[name].any():
            raise ValueError(
                f"{file.path}: {name} is not zero: this level attends on the way down alone, and our U-Net attends"
                " both ways or not at all"
            )


def read_parts(
    parts: list[FilePart], expected: Shapes, device: str | torch.device, dtype: Dtypes
) -> dict[str, Tensor]:
    """All tensors of the parts under our names, converted one by one.

    expected   as of `expected_shapes`
    Raises ValueError when a file does not fit, or when a value is no number that `dtype` can hold.
    """
    for part in parts:  # all of them first: gigabytes may have to be read before a misfit would show
        check_part(part, expected)
    state: dict[str, Tensor] = {}
    for part in parts:
        for ours, theirs in part.names.items():
            tensors = [part.file[name] for name in theirs]
            tensor = (tensors[0] if len(tensors) == 1 else torch.cat(tensors)).reshape(expected[ours])
            if not tensor.is_floating_point():
                raise ValueError(f"{part.file.path}: {theirs[0]} is {tensor.dtype}, expected floating point weights")
            wanted = dtype if isinstance(dtype, torch.dtype) else dtype.get(ours.partition(".")[0], torch.float32)
            # A copy; convolutions channels-last, which CPUs and GPUs run fastest.
            layout = torch.channels_last if tensor.ndim == 4 else torch.contiguous_format
            state[ours] = tensor.to(device, wanted, copy=True, memory_format=layout)
            if not is_finite(state[ours]):
                # float16 ends at 65,504: beyond, a weight becomes infinite, and every picture NaN.
                cause = f"as {wanted}" if is_finite(tensor.double()) else "in the file"
                raise ValueError(f"{part.file.path}: {theirs[0]} holds NaN or infinite values ({cause})")
        part.file.unmap()
    return state


# --- the model ---


def load_model(
    path: str | Path, adapter: str | Path | None = None, config: ModelConfig | None = None,
    device: str | torch.device = "cpu", dtype: Dtypes = torch.float32, preset: str | None = None,
    vae: str | Path | None = None,
) -> HOIDiffusion:  # fmt: skip
    """A model from any file or folder that holds a whole one, in eval mode.

    path      a model of ours, a Stable Diffusion 1.x file (.safetensors, .ckpt; the official model_sd_N.ckpt too), or
              a diffusers folder of Stable Diffusion 1.x
    adapter   condition encoders: see `load_adapter`; None: those in `path`, if any
    config    sizes, for files that do not say them (default: Stable Diffusion 1.x)
    dtype     of all weights, or by part: {"unet": ..., "vae": ..., "text_encoder": ..., "condition_encoders": ...},
              float32 for parts that are not named
    preset    refuse a model of another one's sizes
    vae       the autoencoder, of this file instead: see `vae_file`
    Raises FileNotFoundError, PermissionError, or ValueError naming file, counts and first offending names; NaN too.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no weight file at {path}. {WHERE.format(what='Stable Diffusion 1.x', flag='--base')}")
    config, parts, metadata = whole_model(path, config)
    if preset is not None and config.name != preset:
        raise ValueError(f"{path} holds the preset {config.name!r}, expected {preset!r}")
    if vae is not None:
        parts = with_vae(parts, vae_file(WeightFile(vae), config))
    model = model_of(config, read_parts(parts, expected_shapes(config, metadata["stage"]), device, dtype))
    model.metadata = metadata
    if adapter is not None:
        load_adapter(model, adapter)
    return model


def model_of(config: ModelConfig, state: Mapping[str, Tensor]) -> HOIDiffusion:
    """A model made of these very tensors, under its own names, in eval mode; no other memory is used.

    Condition encoders are there when the tensors have them.  Raises RuntimeError when names or shapes do not fit.
    """
    with torch.device("meta"):  # neither memory nor random numbers for weights that are replaced at once
        conditioned, controlnet = (any(name.startswith(part) for name in state)
                                   for part in ("condition_encoders.", "unet.control."))  # fmt: skip
        model = HOIDiffusion(config, conditioned, controlnet)
    model.load_state_dict(state, strict=True, assign=True)
    # The mask is no weight: it is in no file.
    like = model.text_encoder.positional_embedding
    model.text_encoder.attn_mask = causal_mask(config.text.context_length).to(like)
    return model.eval()


def load_adapter(model: HOIDiffusion, path: str | Path) -> None:
    """Give a model the condition encoders of the official model_ad_N.pth or of an export's folder, or a ControlNet.

    They take the place of condition encoders that were there.
    Raises like load_model, and leaves the model alone then.
    """
    path = Path(path)
    if not path.exists():
        what = "the official HOIDiffusion release's model_ad_N.pth"
        raise FileNotFoundError(f"no weight file at {path}. {WHERE.format(what=what, flag='--base and --adapter')}")
    expected, metadata = expected_shapes(model.config, "hoi"), {"stage": "hoi"}
    parts = adapter_folders(path, expected) if path.is_dir() else []
    if not parts:
        file = lone_file(path)
        # What a ControlNet's normal maps were, no file says; a model's own encoders, which it replaces, do not matter.
        told = {kinds.OFFICIAL_ADAPTER: {"stage": "hoi", "normal_source": OFFICIAL_NORMAL_SOURCE},
                kinds.CONTROLNET: {"stage": "controlnet", "normal_source": ""}}  # fmt: skip
        if (kind := kinds.kind_of(file)) not in told:
            starts = {kinds.IMAGE_CONTROLNET: "--baseline controlnet ", kinds.T2I_ADAPTER: ""}
            hint = f"; train.py {starts[kind]}--init-branch NAME=FILE starts from it" if kind in starts else ""
            raise ValueError(f"{path} is {kind}, expected {' or '.join(told)}{hint}")
        part, expected = lone_part(file, kind, model.config, "")
        parts, metadata = [part], told[kind]
    _adopt(model, parts, expected)
    model.metadata = model.metadata | metadata


def init_branch(model: HOIDiffusion, branch: str, path: str | Path) -> None:
    """Start one condition encoder from a T2I-Adapter file, in either spelling, for training.

    branch   skeleton, normal or segmentation
    A model without condition encoders gets fresh ones first.  One with a ControlNet starts from a ControlNet of this
    image alone, and says nothing of the other two yet.
    Raises ValueError for another branch or a file of another kind.
    """
    if branch not in CONDITION_NAMES:
        raise ValueError(f"{branch!r} is no condition; choose from {', '.join(CONDITION_NAMES)}")
    file = lone_file(path)
    wanted = kinds.T2I_ADAPTER if model.unet.control is None else kinds.IMAGE_CONTROLNET
    if (kind := kinds.kind_of(file)) != wanted:
        hint = "; --adapter takes it" if kind == kinds.CONTROLNET else ""
        raise ValueError(f"{path} is {kind}, expected {wanted}{hint}")
    part, expected = lone_part(file, kind, model.config, branch)
    _adopt(model, [part], expected, branch)


def _adopt(model: HOIDiffusion, parts: list[FilePart], expected: Shapes, branch: str | None = None) -> None:
    """Give a model the condition encoders of these parts, or their ControlNet; other encoders that it has stay.

    branch   the image of a ControlNet that sees one alone
    They take dtype and device of the U-Net, where condition features go.
    """
    like, controlled = model.unet.out[2].weight, HINT in expected
    read = read_parts(parts, expected, like.device, like.dtype)  # raises before anything is changed
    if controlled and branch is not None:
        before = 3 * CONDITION_NAMES.index(branch)
        read[HINT] = F.pad(read[HINT], (0, 0, 0, 0, before, 6 - before))
    if model.condition_encoders is None or controlled != (model.unet.control is not None):
        model.condition_encoders = model.unet.control = None
        model.add_condition_encoders(controlled)
    model.load_state_dict(model.state_dict() | read, strict=True, assign=True)


def normals_differ(model: HOIDiffusion, sources: Iterable[str | None]) -> str | None:
    """A warning when the model learned from another kind of normal maps than it is to be given, else None.

    sources   `normal_source` of the records ("geometry": rendered), None where a record does not say
    """
    learned = model.metadata.get("normal_source")
    other = sorted({source for source in sources if source} - set((learned or "").split(",")))
    if not learned or not other:
        return None
    return (f"warning: the condition encoders learned from normal maps of source {learned!r}, these are of source "
            f"{', '.join(map(repr, other))}: expect less faithful pictures, or fine-tune with train.py")  # fmt: skip


def source_hash(path: str | Path) -> str:
    """SHA-256 of a weight file, or of names and hashes of the weight and settings files in a folder's parts."""
    path = Path(path)
    if not path.is_dir():
        return sha256_of(path)
    # Only what decides pictures: folders also have previews, safety checkers and the caches of download tools.
    parts = (*FOLDER_PARTS, SCHEDULER_FILE.parent, *ADAPTER_FOLDERS.values())
    there = [part for part in parts if (path / part).is_dir()] or ["."]  # the folder of a ControlNet has no parts
    found = (file for part in there for file in (path / part).glob("*"))
    files = sorted(file for file in found if file.suffix in (".safetensors", ".bin", ".json"))
    lines = [f"{file.relative_to(path).as_posix()} {sha256_of(file)}" for file in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


# --- the model, ready to make pictures ---


def load_pipeline(
    checkpoint: Path | None = None, base: Path | None = None, adapter: Path | None = None, *, vae: Path | None = None,
    with_conditions: bool = True, device: str | None = None, dtype: str = "auto", compiled: bool = False,
    sampler: str | None = None, num_inference_steps: int | None = None, guidance_scale: float | None = None,
    negative_prompt: str | None = None, cond_weights: Mapping[str, float] | None = None, cond_tau: float = 1.0,
) -> Pipeline:  # fmt: skip
    """A model that makes pictures in fixed settings; settings that are None come from its preset.

    checkpoint       a model of ours, or the folder of its training; None, and no base: the built-in model
    base, adapter    public weights instead, and vae: see `load_model`
    with_conditions  refuse a model without condition encoders
    device           see `choose_device`
    dtype            one of DTYPES, or "auto": see `fast_dtype`
    compiled         the U-Net by torch.compile; ValueError on a CPU, for which there are the kernels of hoi.network
    cond_weights     of conditions by name; for those that are not named the weight of "all", or 1
    The others are those of SamplingSettings.
    Raises like `load_model`, and ValueError for files that exclude each other.
    """
    if base is not None and checkpoint is not None:
        raise ValueError("--base and --checkpoint exclude each other: a checkpoint is a whole model")
    beside = {part: file for part, file in (("adapter", adapter), ("vae", vae)) if file is not None}
    if beside and base is None:
        raise ValueError(f"--{next(iter(beside))} belongs to a --base: a checkpoint is a whole model")
    path = base or checkpoint or BUILT_IN_MODEL
    if path == BUILT_IN_MODEL and not path.is_file():
        raise FileNotFoundError(f"no built-in weights at {path}: train them (docs/training.md) or use --checkpoint")
    if base is None and path.is_dir():
        path = path / "model.safetensors"
    device = choose_device(device)
    if compiled and device == "cpu":
        raise ValueError("--compile is for GPUs; on a CPU pictures are made by kernels that it would take out")
    fast = fast_dtype(device)
    # Every GPU is fast in float16.
    if TORCH_DTYPES.get(dtype, fast) not in (fast, torch.float32) and not (device != "cpu" and dtype == "float16"):
        print(f"note: --dtype {dtype} is several times slower here than {fast}, which auto takes", flush=True)
    # Nearly all of the work.  The VAE stays in float32: its decoder overflows in float16 and shows bfloat16's rounding
    # as noise in smooth areas; and the text encoder is small.
    dtypes = dict.fromkeys(("unet", "condition_encoders"), TORCH_DTYPES.get(dtype, fast))
    return_freed_memory()
    model = load_model(path, adapter, device=device, dtype=dtypes, vae=vae).requires_grad_(False)
    if with_conditions and model.condition_encoders is None:
        advice = "give it --adapter" if base else "fine-tune it"
        raise ValueError(
            f"{path} is a base model without condition encoders: {advice}, or use sample.py --no-conditions"
        )
    files = {"name": path.name, "sha256": source_hash(path)}
    for part, file in beside.items():
        files |= {part: file.name, f"{part}_sha256": source_hash(file)}
    preset, named = model.config, dict(cond_weights or {})
    weights = dict.fromkeys(CONDITION_NAMES, named.pop("all", 1.0)) | named
    if model.unet.control is not None:
        model.condition_encoders.scale_of(tuple(weights.values()))  # refused now, not after the search of grasps
    settings = SamplingSettings(
        sampler=sampler or preset.sampler,
        num_inference_steps=num_inference_steps or preset.num_inference_steps,
        guidance_scale=preset.guidance_scale if guidance_scale is None else guidance_scale,
        negative_prompt=preset.negative_prompt if negative_prompt is None else negative_prompt,
        cond_weights=tuple(weights.values()),
        cond_tau=cond_tau,
    )
    if compiled:
        model.unet.compile()
    if preset.image_size < 512:  # beyond it gains no time and costs 1.7 GB (fp32, two pictures of 512 px)
        keep_freed_memory()
    return Pipeline(pack(model), settings, files)
