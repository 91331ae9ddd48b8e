"""The toy world's words.  Colour, material, place, noun <-> caption; prompt files -> prompts.  Paper: Sec. 4, figures.

A caption is written from words (`caption_words`), words are found again in any prompt (`words_in`), and whoever samples
gets prompts: from a file, of the paper's figures, with {object} filled in, warned of words that no caption taught.
"""

import re
from functools import lru_cache
from pathlib import Path

import numpy as np

from hoi.common.choices import CATEGORIES
from hoi.common.files import ASSETS
from hoi.toyworld.backgrounds import BACKGROUNDS, CLOTHS, DRAPES, PAINTED_TABLES, SLATS, WALLS
from hoi.toyworld.shading import COLORS

MATERIAL_WORDS = ("metallic", "striped", "wooden", "marble", "gothic-style", "medieval-style")

TEMPLATE_SHARE = 0.6  # prompts at test are the template; the rest keeps other wordings from being foreign

# Nouns that tell a scene when the exact phrase is absent, most telling first; each means the first phrase with it.
_CLUES = (
    "lavender", "bamboo", "nightclub", "cyberpunk", "atlantis", "canyon", "underwater", "rock garden", "moon", "beach",
    "sand", "snow", "mountain", "sea", "grass", *(f"a {color} cloth" for color in DRAPES),
    *(f"{color} cloth" for color in CLOTHS), *(f"{color} wall" for color in (*WALLS, *SLATS, "brick")),
    *(f"{kind} table" for kind in ("wooden", "marble", *PAINTED_TABLES)), "table",
)  # fmt: skip
_ALSO_CALLED = {"sand": "dunes", "mountain": "mountains"}
# A colour or material before one of these is the scenery's: "blue sky", "wooden table".
_SCENERY_NOUNS = "sky|sea|water|cloth|wall|rock|rows|ground|grass|sand|table|light|forest"

PLACEHOLDER = "{object}"
# Looks of the paper's figures in the words that the built-in model was taught.
DEFAULT_PROMPTS = (
    "A hand is grasping a pink {object} on the beach",
    "A hand is grasping a metallic {object} in neon-lit cyberpunk nightclub",
    "A hand is grasping a wooden {object} in the snow",
    "A hand is grasping a blue {object} on the table",
)


def caption_words(
    color: str, material: str, background: str, category: str | None, has_hand: bool,
    generator: np.random.Generator | None = None,
) -> str:
    """Write the sentence for one picture.

    color, material  caption words, "" for none (a plain material has no word)
    background       key of BACKGROUNDS, "" for none
    category         any noun, or None for scenery alone
    has_hand         a hand is grasping it
    generator        None gives the template; otherwise a paraphrase in 40 % of the cases
    """
    if category is None:
        sentences = sentences_in("scenery_sentences.txt")[background]
        return sentences[0 if generator is None else generator.integers(len(sentences))]
    forms = sentences_in("caption_forms.txt")["hand" if has_hand else "object"]
    other = generator is not None and generator.random() > TEMPLATE_SHARE
    form = forms[generator.integers(1, len(forms))] if other else forms[0]
    if not background:
        form = re.sub(r"^{place}, ", "", form).replace(" {place}", "")
    thing = " ".join(filter(None, (color, material, category)))
    text = form.format(thing=f"{'an' if thing[0] in 'aeiou' else 'a'} {thing}", place=background)
    return text if form.startswith("a ") else text[0].upper() + text[1:]  # one form is in small letters on purpose


def words_in(prompt: str) -> dict[str, str | None]:
    """Find the words of the vocabulary in a prompt, longest phrases first.

    returns  {"color", "material", "background", "category"}; None where the prompt names nothing known.
             "grey" counts as gray, "metal" as metallic; colours of scenery ("blue sky") are not the object's.
    """
    # Words between single blanks, so that " can " is not found in "candles".
    text = " " + re.sub(r"[^a-z\-]+", " ", prompt.lower()).replace("grey", "gray").strip() + " "
    background = next((phrase for phrase in sorted(BACKGROUNDS, key=len, reverse=True) if f" {phrase} " in text), None)
    if background:
        text = text.replace(f" {background} ", " | ", 1)  # its colours ("green cloth") are not the object's
    else:
        clue = next((c for c in _CLUES if f" {c} " in text or f" {_ALSO_CALLED.get(c)} " in text), None)
        background = clue and next(phrase for phrase in BACKGROUNDS if f" {clue} " in f" {phrase} ")

    # The first in the text is the object's: what comes after it describes the place.
    def first(words: tuple[str, ...], unless: str = "") -> str | None:
        found = [(hit.start(), word) for word in words if (hit := re.search(rf" {word} {unless}", text))]
        return min(found)[1] if found else None

    unless = rf"(?!(?:{_SCENERY_NOUNS}) )"
    material = first((*MATERIAL_WORDS, "metal"), unless)
    return {
        "color": first(tuple(COLORS), unless),
        "material": "metallic" if material == "metal" else material,
        "background": background,
        "category": first(CATEGORIES),
    }


def read_prompts(path: str | Path) -> list[str]:
    """One prompt a line; empty lines and lines that begin with # are skipped.

    Raises FileNotFoundError, or ValueError when the file holds no prompt or is not UTF-8 text.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no prompts file at {path}")
    try:
        # -sig: Windows editors put a byte order mark before the first prompt.
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}); expected one prompt a line") from error
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise ValueError(f"{path} holds no prompt; expected one a line")
    return prompts


def default_scenery_prompts(preset: str) -> list[str]:
    """Sentences for a background buffer: of the toy world for the built-in model, of this world for the others."""
    return read_prompts(ASSETS / ("toy_scenery_prompts.txt" if preset == "tiny" else "scenery_prompts.txt"))


@lru_cache
def sentences_in(name: str) -> dict[str, list[str]]:
    """Sentences of a file in hoi/assets, by what stands before the colon of their line."""
    lines = (line.partition(": ") for line in read_prompts(ASSETS / name))
    return {kind: told.split(" | ") for kind, _, told in lines}


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
    texts = [*COLORS, *MATERIAL_WORDS, *CATEGORIES, *BACKGROUNDS, "an grey metal"]
    for sentences in (*sentences_in("scenery_sentences.txt").values(), *sentences_in("caption_forms.txt").values()):
        texts += [re.sub("{.*?}", "", sentence) for sentence in sentences]
    return frozenset(word for text in texts for word in _words(text))


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W\d_]+", text.lower())


def untaught_words(prompts: list[str]) -> list[str]:
    """Words of the prompts that no toy-world caption contains, in order of appearance: the tiny model ignores them."""
    words = dict.fromkeys(word for prompt in prompts for word in _words(prompt.replace(PLACEHOLDER, "")))
    return [word for word in words if word not in toy_vocabulary()]
