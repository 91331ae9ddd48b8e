"""Backgrounds of the toy world.  Phrase ("on the beach") + generator -> picture (H, W, 3) float32 in [0, 1].

They stand in for the photographs behind Stable Diffusion and for the paper's laboratory recordings; the phrases are
those of the paper's figures.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from hoi.common.arrays import step
from hoi.toyworld import scenery
from hoi.toyworld.scenery import Color, between, noise, over, picture_grid, ramp, rgb, sample

Painter = Callable[[np.random.Generator, int, int], np.ndarray]


@dataclass(frozen=True)
class Background:
    """One kind: its painter, sentences for it alone, whether it is laboratory, whether there is a table below."""

    paint: Painter
    sentences: tuple[str, ...]
    lab: bool = False
    table: bool = False


def _wall(color: Color, generator: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A plain wall lit from above, at times with a skirting: what DexYCB's and HOI4D's rooms come down to."""
    y, x = picture_grid(height, width)
    light = 1 - 0.3 * ((x - generator.random()) ** 2 + (y - generator.uniform(0, 0.6)) ** 2)  # a lamp's soft spot
    light = light + 0.03 * (noise(generator, height, width, 4, 4, 2) - 0.5)  # stains
    light = light + 0.03 * (noise(generator, height, width, 128, 128) - 0.5)  # plaster
    image = light[..., None] * rgb(color) * generator.uniform(0.95, 1.04)
    if generator.random() < 0.35:
        edge = generator.uniform(0.8, 0.92)
        skirting = np.where(y > edge, 0.8, np.where(np.abs(y - edge) < 0.006, 0.62, 1.0))
        image *= skirting[..., None].astype(np.float32)
    return np.clip(image, 0, 1)


def _back_wall(generator: np.random.Generator, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """A pale wall and the table's edge (1, W) in front of it, slightly tilted."""
    _, x = picture_grid(height, width)
    color = between(generator, "b8b2ab", "e0e0de")
    edge = generator.uniform(0.12, 0.34) + generator.uniform(-0.12, 0.12) * (x - 0.5)  # high up: cameras look down
    return _wall(color, generator, height, width), edge


def _table(generator: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Planks with grain that run away from the camera: "on the table" gives the paper's laboratory-like pictures."""
    y, x = picture_grid(height, width)
    image, edge = _back_wall(generator, height, width)
    grain = noise(generator, height, width, 5, 40, 3)
    rings = 0.5 + 0.5 * np.sin(2 * np.pi * (3 * noise(generator, height, width, 2, 5, 2) + 9 * x))
    board = np.mod(sample(grain, 0.5 * x + 0 * y, y) * 0.6 + rings * 0.25, 1)
    plank = np.mod((x - 0.5) / (0.55 + 0.7 * y) * generator.uniform(2.5, 4), 1)  # seams meet above the picture
    dark, bright = (between(generator, "5c361f", "805733"), between(generator, "a87347", "d1a370"))
    seams = 1 - 0.4 * step(0.03, 0.0, plank)
    wood = ramp(board + 0.15, dark, bright) * seams[..., None] * (0.85 + 0.2 * y)[..., None]
    over(image, step(0, 0.01, y - edge), wood)
    return image * (1 - 0.25 * np.exp(-(((y - edge) / 0.012) ** 2)))[..., None]  # the edge is dark


def _cloth(color: Color, generator: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A table under a creased, woven cloth: "on a table covered with green cloth" is the paper's LLaVA caption."""
    y, x = picture_grid(height, width)
    image, edge = _back_wall(generator, height, width)
    turn = generator.uniform(0, np.pi)
    folds = noise(generator, height, width, 2, 2)
    crease = np.sin(2 * np.pi * (generator.uniform(1.5, 3.5) * (np.cos(turn) * x + np.sin(turn) * y) + 0.8 * folds))
    weave = noise(generator, height, width, 128, 128)  # one cell a pixel at 128 px
    light = 0.92 + 0.1 * crease * folds + 0.16 * (weave - 0.5) + 0.1 * (y - 0.5) + generator.uniform(-0.06, 0.06)
    over(image, step(0, 0.01, y - edge), np.clip(light[..., None] * rgb(color), 0, 1))
    return image * (1 - 0.2 * np.exp(-(((y - edge - 0.005) / 0.012) ** 2)))[..., None]


# Green is of the paper's caption, the other colours and the walls are a choice of this project.
CLOTHS = {"green": "216b45", "blue": "2b4c99", "red": "9e2124", "white": "e6e3de"}
WALLS = {"white": "f2f2f0", "gray": "8f9194"}
# Sentences teach scenery alone.  Each holds a clue by which words_in finds its kind, and none that means another.
BACKGROUNDS: dict[str, Background] = {
    "on the beach": Background(scenery.beach, (
        "A quiet beach with blue sky.", "Waves roll onto a sandy beach.", "An empty beach by the water.")),
    "on the grass": Background(scenery.grass, (
        "Fresh grass on a summer lawn.", "A meadow of tall grass.", "Green grass seen from close up.")),
    "in the snow": Background(scenery.snow, (
        "Deep snow under a pale winter sky.", "Snow falls on a field and its pine trees.",
        "A winter day with fresh snow.")),
    "on the moon with night sky": Background(scenery.moon, (
        "The moon with craters and a night sky.", "Stars over the gray ground of the moon.",
        "A view of the earth from the moon.")),
    "in the mountain": Background(scenery.mountain, (
        "A mountain range with snowy peaks.", "High mountains above a dark forest.", "Mountains in the morning haze.")),
    "floating in the sea": Background(scenery.sea, (
        "The open sea with rolling waves.", "Foam on a dark blue sea.", "A windy sea below the clouds.")),
    "in the sand": Background(scenery.sand, (
        "Sand dunes in a wide desert.", "Golden sand shaped by the wind.", "Ripples on dunes of desert sand.")),
    "in a lavender field": Background(scenery.lavender, (
        "A lavender field in bloom.", "Purple rows of lavender reach the hills.", "Lavender in the evening light.")),
    "in bamboo forest": Background(scenery.bamboo, (
        "A bamboo forest with soft light.", "Tall bamboo stems and leaves.", "A path of shade among bamboo.")),
    "in neon-lit cyberpunk nightclub": Background(scenery.nightclub, (
        "A cyberpunk nightclub full of neon light.", "Neon tubes glow in a dark nightclub.",
        "Beams of light cross a nightclub.")),
    "in the grand canyon": Background(scenery.canyon, (
        "The grand canyon in the sun.", "Layers of red rock in the grand canyon.",
        "Steep canyon walls below the sky.")),
    "in a japanese rock garden": Background(scenery.rock_garden, (
        "A japanese rock garden with raked gravel.", "Stones and gravel in a rock garden.",
        "A rock garden in front of a hedge.")),
    "in the underwater city of atlantis": Background(scenery.atlantis, (
        "The underwater city of atlantis.", "Columns of sunken atlantis below the water.",
        "Light falls into an underwater city.")),
    "on the table": Background(_table, (
        "A bare wooden table.", "An empty table by a wall.", "A table made of planks."), lab=True, table=True),
    **{f"on a table covered with {color} cloth": Background(partial(_cloth, shade), (
        f"A table covered with {color} cloth.", f"An empty table with {color} cloth.", f"Folds in {color} cloth."),
        lab=True, table=True) for color, shade in CLOTHS.items()},
    **{f"in front of a {color} wall": Background(partial(_wall, shade), (
        f"A plain {color} wall.", f"An empty {color} wall.", f"A bare {color} wall in a room."),
        lab=True) for color, shade in WALLS.items()},
}  # fmt: skip


def paint_background(name: str, generator: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Paint one draw of a kind of scenery.

    name     key of BACKGROUNDS
    returns  (H, W, 3) float32 in [0, 1], display values
    Raises ValueError for an unknown name.  About 15 ms at 256 px.
    """
    if name not in BACKGROUNDS:
        raise ValueError(f"background {name!r} is unknown; choose one of: {', '.join(BACKGROUNDS)}")
    image = np.asarray(BACKGROUNDS[name].paint(generator, height, width), np.float32)
    # Another exposure and white balance for each draw, as between photographs.
    image = image * np.float32(generator.uniform(0.94, 1.04)) * generator.uniform(0.97, 1.03, 3).astype(np.float32)
    return np.clip(image, 0, 1)
