"""Weights that others trained.  Stable Diffusion 1.x, official HOIDiffusion, T2I-Adapter -> our network.  Sec. 3.3.

    python -m hoi.weights FILE ...       # what each file is, whether it fits, what is missing

Other families, damaged files and pickles that ask for code are refused by name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import torch

from hoi.common.files import sha256_of
from hoi.common.tensors import WeightFile
from hoi.network.config import ModelConfig, sd1_config
from hoi.network.model import CONDITION_NAMES, HOIDiffusion, own_config
from hoi.weights.diffusers_config import PARTS, SCHEDULER_FILE, read_folder_config
from hoi.weights.names import Sources
from hoi.weights.weight_kinds import (
    DIFFUSERS_T2I_ADAPTER,
    EMA_ONLY,
    OFFICIAL_ADAPTER,
    OWN,
    SINGLE_FILE,
    T2I_ADAPTER,
    kind_of,
)
from hoi.weights.weight_pieces import (
    ADAPTER_FOLDERS,
    Dtypes,
    Piece,
    adapter_folders,
    diffusers_folder,
    expected_shapes,
    official_adapter,
    read_pieces,
    single_file,
    t2i_adapter,
)

WHERE = (
    "Public weights are not shipped: get {what} yourself, under its licence (README, Your own weights). Without {flag}"
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
) -> HOIDiffusion:
    """A model from any file or folder that holds a whole one, in eval mode.

    path      a model of ours, a Stable Diffusion 1.x file (.safetensors, .ckpt; the official model_sd_N.ckpt too), or
              a diffusers folder of Stable Diffusion 1.x
    adapter   condition encoders: see `load_adapter`; None: those in `path`, if any
    config    sizes, for files that do not say them (default: Stable Diffusion 1.x)
    dtype     of all weights, or by part: {"unet": ..., "vae": ..., "text_encoder": ..., "condition_encoders": ...},
              float32 for parts that are not named
    Raises FileNotFoundError, PermissionError, or ValueError naming file, counts and first offending names; NaN too.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no weight file at {path}. {WHERE.format(what='Stable Diffusion 1.x', flag='--base')}")
    config, pieces, metadata = whole_model(path, config)
    state = read_pieces(pieces, config, device, dtype)
    model = HOIDiffusion.from_tensors(config, state)
    model.metadata = metadata
    if adapter is not None:
        load_adapter(model, adapter)
    return model


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
    state = read_pieces(pieces, model.config, like.device, like.dtype)
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
    state = read_pieces([piece], model.config, like.device, like.dtype)
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
    parts = (*PARTS, SCHEDULER_FILE.parent, *ADAPTER_FOLDERS.values())
    found = (file for part in parts for file in (path / part).glob("*"))
    files = sorted(file for file in found if file.suffix in (".safetensors", ".bin", ".json"))
    lines = [f"{file.relative_to(path).as_posix()} {sha256_of(file)}" for file in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


# --- what is this file? ---


def whole_model(path: Path, config: ModelConfig | None = None) -> tuple[ModelConfig, list[Piece], dict[str, str]]:
    """Sizes of the model at `path`, the pieces that hold it (not yet compared with it), and its metadata."""
    if path.is_dir():
        if not (path / "unet").is_dir():
            raise FileNotFoundError(f"{path} is no diffusers folder: unet/ is missing; expected {', '.join(PARTS)}")
        config = read_folder_config(path)
        pieces = diffusers_folder(path, config)
        stage = "base" if len(pieces) == len(PARTS) else "hoi"
        return config, pieces, _metadata(config, stage, path) | _kept_metadata(pieces[0].file) | {"stage": stage}
    file = WeightFile(path)
    if (kind := kind_of(file)) == OWN:
        config = own_config(file)
        names: Sources = {name: (name,) for name in expected_shapes(config, file.metadata["stage"] != "base")}
        return config, [Piece(file, names)], file.metadata
    if kind not in (SINGLE_FILE, EMA_ONLY):
        raise ValueError(f"{path} is {kind}, expected a whole model: a Stable Diffusion 1.x file or folder")
    kept = _kept_metadata(file)
    if config is None:  # an export of ours says its sizes
        config = ModelConfig.from_json(kept["config"]) if "config" in kept else sd1_config()
    metadata = _metadata(config, "base", path) | kept | {"stage": "base"}
    return config, [single_file(file, config, ema_only=kind == EMA_ONLY)], metadata


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
