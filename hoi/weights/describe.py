"""One sentence about any weight file or folder: what it is, whether it fits, and which flag takes it."""

from __future__ import annotations

from pathlib import Path

from hoi.common.tensors import WeightFile
from hoi.geometry.grabnet import FILES, load_grabnet
from hoi.geometry.mano import read_mano
from hoi.network.config import PRESETS
from hoi.weights import load
from hoi.weights.kinds import CLIP, CONTROLNET, IMAGE_CONTROLNET, OFFICIAL_ADAPTER, OWN, T2I_ADAPTER, VAE, kind_of

DIFFUSERS_FOLDER = "a diffusers folder"


def _describe_hands(path: Path) -> str | None:
    """What a file or folder of MANO or GrabNet is; None for anything else.  Raises like their readers."""
    names = {file.name for file in path.iterdir()} if path.is_dir() else {path.name}
    if names & set(FILES):
        folder = path if path.is_dir() else path.parent
        load_grabnet(folder)
        return f"GrabNet ({', '.join(FILES)}), complete; use with make_dataset.py --grasp grabnet --grabnet {folder}"
    if names & {"MANO_RIGHT.pkl", "MANO_LEFT.pkl"} or path.suffix.lower() in (".pkl", ".npz"):
        read_mano(path)
        return f"the MANO hand, complete; use with --mano {path}"
    return None


def _preset(file: WeightFile, kind: str) -> str:
    """The preset whose part a file fits.  If none, raises how it differs from Stable Diffusion's."""
    problems = {}
    for name, preset in PRESETS.items():
        try:
            load.check_part(*load.lone_part(file, kind, preset(), "normal"))
            return name
        except ValueError as problem:
            problems[name] = problem
    raise problems["sd1"]


def _describe_part(file: WeightFile) -> str | None:
    """What a file of one part or of CLIP is; None for a whole model.  Raises when no preset fits."""
    kind = kind_of(file)
    if kind == CLIP:
        return f"{kind} ({len(file)} tensors); use with python -m hoi.metrics --fake DIR --clip NAME {file.path}"
    uses = dict.fromkeys((OFFICIAL_ADAPTER, CONTROLNET), "use with --base FILE --adapter ")
    uses |= {T2I_ADAPTER: "start a branch with --init-branch NAME=", VAE: "use with --base FILE --vae "}
    uses |= {IMAGE_CONTROLNET: "start from it with train.py --baseline controlnet --init-branch NAME="}
    if kind not in uses:
        return None
    return f"{kind}, complete ({len(file)} tensors), sizes {_preset(file, kind)}; {uses[kind]}{file.path}"


def describe_weights(path: str | Path) -> str:
    """What a file or folder is, and what it can be used for.

    Every tensor is compared by name and shape, none is read.  Raises like load_model when it does not fit.
    """
    path = Path(path)
    if hands := _describe_hands(path):
        return hands
    is_lone = not path.is_dir() or any(path.glob("diffusion_pytorch_model*"))  # a part that diffusers saved
    if is_lone and (part := _describe_part(load.lone_file(path))):
        return part
    config, parts, metadata = load.whole_model(path)
    stage = metadata["stage"]
    expected = load.expected_shapes(config, stage)
    for part in parts:
        load.check_part(part, expected)
    count = sum(len(part.file) for part in parts)
    kind = DIFFUSERS_FOLDER if path.is_dir() else kind_of(parts[0].file)
    flag = "--checkpoint or --base" if kind == OWN else "--base"
    others = {"base": "without condition encoders", "controlnet": "with a ControlNet"}
    told = others.get(stage, "with condition encoders")
    told += f", the paper's baseline {metadata['baseline']}" if "baseline" in metadata else ""
    return (
        f"{kind}, complete ({count} tensors), sizes {config.name}, predicts {config.predicts}, {told}; use with"
        f" {flag} {path}"
    )
