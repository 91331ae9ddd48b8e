"""Which tensor of which file is which of ours, and reading them.  WeightFiles -> checked tensors under our names.

Names and shapes are held against ours before a tensor is read; then tensors are read, checked and converted one by one,
so that loading takes the memory of the finished model and little more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from hoi.common.tensors import WeightFile, is_finite, shown
from hoi.network.config import ModelConfig
from hoi.network.model import CONDITION_NAMES, HOIDiffusion, prepared
from hoi.weights.diffusers_config import PARTS
from hoi.weights.names import (
    LAST_LAYER,
    POSITION_IDS,
    SHORT_TEXT_PREFIX,
    SINGLE_FILE_EXTRAS,
    TEXT_PREFIX,
    Sources,
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

ADAPTER_FOLDERS = {name: f"adapter_{name}" for name in CONDITION_NAMES}  # of an export of ours
VARIANTS = ("", ".fp16", ".non_ema")  # of file names in a diffusers folder, the best first

Dtypes = torch.dtype | Mapping[str, torch.dtype]


@dataclass(frozen=True)
class Piece:
    """A file and the part of the model that it holds.

    sources   our tensor names -> its names; several are stacked along dimension 0
    extras    names in the file that nobody needs
    zeros     those among them that must hold zeros, lest the file describe another network
    """

    file: WeightFile
    sources: Sources
    extras: frozenset[str] = frozenset()
    zeros: frozenset[str] = frozenset()


def expected_shapes(config: ModelConfig, with_conditions: bool) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model's tensors, without the model."""
    with torch.device("meta"):
        model = HOIDiffusion(config, with_conditions)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


# --- one function a layout ---


def single_file(file: WeightFile, config: ModelConfig, ema_only: bool) -> Piece:
    ours = expected_shapes(config, with_conditions=False)
    short = any(name.startswith(SHORT_TEXT_PREFIX + "embeddings.") for name in file)
    prefix = SHORT_TEXT_PREFIX if short else TEXT_PREFIX
    sources = single_file_names(ours, config.text, prefix)
    averages = {name: (ema_name(theirs),) for name, (theirs, *_) in sources.items() if name.startswith("unet.")}
    extras = SINGLE_FILE_EXTRAS | {theirs for (theirs,) in averages.values()}
    if ema_only:
        sources |= averages
    return Piece(file, sources, frozenset(extras))


def diffusers_folder(folder: Path, config: ModelConfig) -> list[Piece]:
    ours = list(expected_shapes(config, with_conditions=True))
    unet, vae, text = (WeightFile(weights_in(folder / part, part == "text_encoder")) for part in PARTS)
    old_attention = any(name.endswith("attentions.0.query.weight") for name in vae)
    prefix = "text_model." if any(name.startswith("text_model.") for name in text) else ""
    text_sources = {name: tuple(prefix + k for k in keys) for name, keys in text_names(config.text).items()}
    added = frozenset(padding(config.unet))
    zeros = frozenset(name for name in added & unet.keys() if name.endswith(LAST_LAYER))
    return [
        Piece(unet, diffusers_unet_names(ours, config.unet), added, zeros),
        Piece(vae, diffusers_vae_names(ours, config.vae, old_attention)),
        Piece(text, text_sources, frozenset({prefix + POSITION_IDS})),
        *adapter_folders(folder, ours),
    ]


def adapter_folders(folder: Path, ours: list[str]) -> list[Piece]:
    """The three T2IAdapter folders of an export; none when there is none."""
    places = {name: folder / place for name, place in ADAPTER_FOLDERS.items()}
    if not any(place.is_dir() for place in places.values()):
        return []
    files = {name: WeightFile(weights_in(place, is_text=False)) for name, place in places.items()}
    return [t2i_adapter(file, ours, name, saved_by_diffusers=True) for name, file in files.items()]


def official_adapter(file: WeightFile, ours: list[str]) -> Piece:
    return _with_prefix(Piece(file, official_adapter_names(ours)))


def t2i_adapter(file: WeightFile, ours: list[str], branch: str, saved_by_diffusers: bool) -> Piece:
    names = diffusers_adapter_names if saved_by_diffusers else t2i_adapter_names
    sources = names(ours, branch)
    return Piece(file, sources) if saved_by_diffusers else _with_prefix(Piece(file, sources))


def _with_prefix(piece: Piece) -> Piece:
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


def check_piece(piece: Piece, expected: Mapping[str, tuple[int, ...]]) -> None:
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


def read_pieces(
    pieces: list[Piece], config: ModelConfig, device: str | torch.device, dtype: Dtypes
) -> dict[str, Tensor]:
    """All tensors of the pieces under our names, converted one by one.

    Raises ValueError when a piece does not fit, or when a value is no number that `dtype` can hold.
    """
    expected = expected_shapes(config, with_conditions=True)
    for piece in pieces:
        check_piece(piece, expected)
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
