"""Prompts.  Prompt files, the {object} placeholder, preset defaults -> list[str].  Paper: Sec. 4 and its figures."""

import re
from functools import lru_cache
from pathlib import Path

import numpy as np

from hoi.toyworld.backgrounds import BACKGROUNDS
from hoi.toyworld.words import CATEGORY_WORDS, COLOR_WORDS, MATERIAL_WORDS, caption_words

ASSETS = Path(__file__).parents[1] / "assets"
PLACEHOLDER = "{object}"

# Looks of the paper's figures in the words that the built-in model was taught.
DEFAULT_PROMPTS = (
    "A hand is grasping a pink {object} on the beach",
    "A hand is grasping a metallic {object} in neon-lit cyberpunk nightclub",
    "A hand is grasping a wooden {object} in the snow",
    "A hand is grasping a blue {object} on the table",
)
# What the official test script passes unless told otherwise (paper: not mentioned).
STOCK_NEGATIVE_PROMPT = (
    "longbody, lowres, bad anatomy, bad hands, missing fingers, extra digit, fewer digits, cropped, worst quality, "
    "low quality"
)
# The built-in model has seen no caption about quality: there the empty prompt is the better unconditional text.
NEGATIVE_PROMPTS = {"sd1": STOCK_NEGATIVE_PROMPT}
SCENERY_FILES = {"tiny": ASSETS / "toy_scenery_prompts.txt"}  # other presets: scenery_prompts.txt


def read_prompts(path: str | Path) -> list[str]:
    """One prompt a line; empty lines and lines that begin with # are skipped.

    Raises FileNotFoundError, or ValueError when the file holds no prompt or is not UTF-8 text.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no prompts file at {path}")
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}); expected one prompt a line") from error
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise ValueError(f"{path} holds no prompt; expected one a line")
    return prompts


def default_negative_prompt(preset: str) -> str:
    return NEGATIVE_PROMPTS.get(preset, "")


def default_scenery_prompts(preset: str) -> list[str]:
    """Sentences for a background buffer: of the toy world for the built-in model, of this world for the others."""
    return read_prompts(SCENERY_FILES.get(preset, ASSETS / "scenery_prompts.txt"))


def check_placeholders(prompt: str) -> None:
    """Raise ValueError when the prompt has another placeholder than {object}, a misspelt one for instance."""
    if unknown := [word for word in re.findall(r"\{[^{}]*\}", prompt) if word != PLACEHOLDER]:
        raise ValueError(f"the prompt {prompt!r} has {unknown[0]}; the only placeholder is {PLACEHOLDER}")


def fill(prompt: str, noun: str | None) -> str:
    """Put the object's noun where the prompt says {object}.

    Raises ValueError when there is a placeholder and no object to name, or another one.
    """
    check_placeholders(prompt)
    if PLACEHOLDER in prompt and noun is None:
        raise ValueError(f"the prompt {prompt!r} asks for {PLACEHOLDER}, but without conditions there is no object")
    return prompt.replace(PLACEHOLDER, noun or "")


@lru_cache(maxsize=1)
def toy_vocabulary() -> frozenset[str]:
    """Every word in captions of the toy world."""
    texts = [*COLOR_WORDS, *MATERIAL_WORDS, *CATEGORY_WORDS, "a an grey metal"]
    for phrase, background in BACKGROUNDS.items():
        texts += [phrase, *background.sentences]
    for draw in range(200):  # enough to see every form of a sentence
        generator = np.random.default_rng(draw)
        texts += [caption_words("", "", "on the beach", "mug", has_hand, generator) for has_hand in (True, False)]
    return frozenset(word for text in texts for word in _words(text))


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def untaught_words(prompts: list[str]) -> list[str]:
    """Words of the prompts that no toy-world caption contains, in order of appearance: the tiny model ignores them."""
    words = dict.fromkeys(word for prompt in prompts for word in _words(prompt.replace(PLACEHOLDER, "")))
    return [word for word in words if word not in toy_vocabulary()]
