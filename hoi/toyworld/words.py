"""The toy world's vocabulary.  Words -> caption and back.  Template and phrases: the paper's, Sec. 4 and figures."""

import re

import numpy as np

from hoi.toyworld.backgrounds import BACKGROUNDS

COLOR_WORDS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white", "black", "brown", "gray")
MATERIAL_WORDS = ("metallic", "striped", "wooden", "marble", "gothic-style", "medieval-style")
CATEGORY_WORDS = ("mug", "bowl", "bottle", "can")

# {thing}: article, adjectives, noun; {place}: background phrase.  The first is the paper's and is drawn most often.
_GRASP_FORMS = (
    "A hand is grasping {thing} {place}",
    "a hand is grasping {thing} {place}",
    "A hand is holding {thing} {place}",
    "{thing} in a hand {place}",
    "{place}, a hand is grasping {thing}",
    "A photo of a hand grasping {thing} {place}.",
)
_OBJECT_FORMS = (
    "{thing} {place}",
    "{thing} {place}.",
    "A photo of {thing} {place}",
    "There is {thing} {place}",
    "{place}, {thing}",
)
_TEMPLATE_SHARE = 0.6

# Nouns that tell a scene when the exact phrase is absent, most telling first.
_CLUES = {
    "lavender": "in a lavender field",
    "bamboo": "in bamboo forest",
    "nightclub": "in neon-lit cyberpunk nightclub",
    "cyberpunk": "in neon-lit cyberpunk nightclub",
    "atlantis": "in the underwater city of atlantis",
    "canyon": "in the grand canyon",
    "underwater": "in the underwater city of atlantis",
    "rock garden": "in a japanese rock garden",
    "moon": "on the moon with night sky",
    "beach": "on the beach",
    "dunes": "in the sand",
    "sand": "in the sand",
    "snow": "in the snow",
    "mountain": "in the mountain",
    "mountains": "in the mountain",
    "sea": "floating in the sea",
    "grass": "on the grass",
    **{f"{color} cloth": f"on a table covered with {color} cloth" for color in ("green", "blue", "red", "white")},
    "white wall": "in front of a white wall",
    "gray wall": "in front of a gray wall",
    "table": "on the table",
}
_SCENERY_NOUNS = "sky|sea|water|cloth|wall|rock|rows|ground|grass|sand|table|light|forest"


def _with_article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def caption_words(
    color: str,
    material: str,
    background: str,
    category: str | None,
    has_hand: bool,
    generator: np.random.Generator | None = None,
) -> str:
    """Write the sentence for one picture.

    color, material  caption words, "" for none (a plain material has no word)
    background       key of BACKGROUNDS, "" for none
    category         any noun, or None for scenery alone
    generator        None gives the template; otherwise a paraphrase in 40 % of the cases
    """
    if category is None:
        sentences = BACKGROUNDS[background].sentences
        return sentences[0 if generator is None else generator.integers(len(sentences))]
    forms = _GRASP_FORMS if has_hand else _OBJECT_FORMS
    other = generator is not None and generator.random() > _TEMPLATE_SHARE
    form = forms[generator.integers(1, len(forms))] if other else forms[0]
    if not background:
        form = re.sub(r"^{place}, ", "", form).replace(" {place}", "")
    text = form.format(thing=_with_article(" ".join(filter(None, (color, material, category)))), place=background)
    return text if form.startswith("a ") else text[0].upper() + text[1:]


def words_in(prompt: str) -> dict[str, str | None]:
    """Find the words of the vocabulary in a prompt, longest phrases first.

    returns  {"color", "material", "background", "category"}; None where the prompt names nothing known.
             "grey" counts as gray, "metal" as metallic; colours of scenery ("blue sky") are not the object's.
    """
    text = " " + re.sub(r"[^a-z\-]+", " ", prompt.lower()).replace("grey", "gray").strip() + " "
    background = next((phrase for phrase in sorted(BACKGROUNDS, key=len, reverse=True) if f" {phrase} " in text), None)
    if background:
        text = text.replace(f" {background} ", " | ", 1)  # its colours ("green cloth") are not the object's
    else:
        background = next((phrase for clue, phrase in _CLUES.items() if f" {clue} " in text), None)

    def first(words: tuple[str, ...], unless: str = "") -> str | None:
        found = [(hit.start(), word) for word in words if (hit := re.search(rf" {word} {unless}", text))]
        return min(found)[1] if found else None

    material = first((*MATERIAL_WORDS, "metal"))
    return {
        "color": first(COLOR_WORDS, rf"(?!(?:{_SCENERY_NOUNS}) )"),
        "material": "metallic" if material == "metal" else material,
        "background": background,
        "category": first(CATEGORY_WORDS),
    }
