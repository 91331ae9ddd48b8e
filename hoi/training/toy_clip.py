"""The small CLIP of stage text as a file.  Its weights <-> clip.safetensors -> scores of pictures against captions.

CLIP knows nothing of the toy world, and this one nothing else: in its tables (Sec. 5) it stands in for CLIPScore.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from hoi.common.tensors import save_model
from hoi.training.small_clip import PictureText

KIND = "toy-clip"
FILE_NAME = "clip.safetensors"


def save_toy_clip(path: str | Path, pair: PictureText, side: int) -> None:
    """Write both towers in half precision; side is the size of the pictures that it was trained on, pixels."""
    sizes = {"text": asdict(pair.text_encoder.config), "embed_dim": pair.text_projection.out_features,
             "channels": pair.picture_encoder[0].out_channels}  # fmt: skip
    state = {name: tensor.half() for name, tensor in pair.state_dict().items()}
    save_model(path, state, {"kind": KIND, "side": str(side), "sizes": json.dumps(sizes)})
