"""Write a trained model as the built-in one: the same weights in fp16, with the metadata that says how they were made.

    python tools/export_tiny.py runs/toy/hoi/model.safetensors hoi/assets/tiny.safetensors
"""

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hoi.common.files import sha256_of  # noqa: E402
from hoi.network.config import PRESETS  # noqa: E402
from hoi.weights.export import export_own  # noqa: E402
from hoi.weights.load import load_model  # noqa: E402

MOST_MB = 50


def main(source: str, target: str) -> None:
    model = load_model(source, preset="tiny")
    measured = PRESETS["tiny"]()
    # Sampling defaults are measured after the training, so they come from the preset and not from the training file.
    model.config = replace(
        model.config,
        sampler=measured.sampler,
        num_inference_steps=measured.num_inference_steps,
        guidance_scale=measured.guidance_scale,
    )
    export_own(model, target, half=True)
    size = Path(target).stat().st_size / 1e6
    if size > MOST_MB:
        raise SystemExit(f"{target} has {size:.1f} MB, more than the {MOST_MB} MB that the repository carries")
    print(f"{target}: {size:.1f} MB, SHA-256 {sha256_of(target)}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    main(*sys.argv[1:])
