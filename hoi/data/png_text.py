"""What a generated picture says about itself.  record -> PNG text chunks, in the form web UIs read and as JSON."""

import json
from typing import Any

# Our sampler names -> those that web UIs list.
SAMPLER_NAMES = {"dpm++": "DPM++ 2M", "ddim": "DDIM", "ddpm": "DDPM"}


def quoted(value: object) -> str:
    """A value of the parameter line; quoted where it would otherwise end early."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ',:\n"') else text


def webui_parameters(record: dict[str, Any]) -> str:
    """The text that Stable Diffusion web UIs write under `parameters` and read back: prompt, negative prompt, settings.

    record  a generated record (hoi/data/folder.py) with height and width
    The hash is the first ten digits of the weight file's SHA-256, as there.
    """
    settings = {
        "Steps": record["num_inference_steps"],
        "Sampler": SAMPLER_NAMES.get(record["sampler"], record["sampler"]),
        "CFG scale": record["guidance_scale"],
        "Seed": record["seed"],
        "Size": f"{record['width']}x{record['height']}",
        "Model hash": record["checkpoint"]["sha256"][:10],
        "Model": record["checkpoint"]["name"],
        "Picture index": record["index"],  # the noise comes from seed and index
    }
    lines = [record["text"]]
    if record["negative_prompt"]:
        lines.append(f"Negative prompt: {record['negative_prompt']}")
    lines.append(", ".join(f"{key}: {quoted(value)}" for key, value in settings.items()))
    return "\n".join(lines)


def png_text(record: dict[str, Any]) -> dict[str, str]:
    """Text chunks of a generated picture: `parameters` for web UIs, `hoi` with the whole record as JSON."""
    return {"parameters": webui_parameters(record), "hoi": json.dumps(record, allow_nan=False)}
