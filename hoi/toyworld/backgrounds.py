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
from hoi.toyworld.scenery import Color, between, ground_grid, noise, over, picture_grid, ramp, rgb, sample

Painter = Callable[[np.random.Generator, int, int, float], np.ndarray]
# Horizons, see Background: of what stands upright and fills the picture, of tables here and there.
NO_GROUND, LABORATORY, KITCHEN = (0.0, 0.0), (0.1, 0.36), (0.06, 0.34)


@dataclass(frozen=True)
class Background:
    """One kind and its painter.

    horizon  rows where its ground begins, shares of the picture: for a camera that looks steeply down, and for one that
             looks level.  True perspective would show sand alone from most cameras, which no beach is told by
    lab      whether it is laboratory, which fine-tuning alone shows
    share    how often it is drawn beside the others
    """

    paint: Painter
    horizon: tuple[float, float]
    lab: bool = False
    share: float = 1.0

    def horizon_row(self, steepness: float) -> float:
        """Where the ground begins for a camera of this steepness, see Camera.steepness."""
        steep, level = self.horizon
        return level + (steep - level) * steepness


def _wall(color: Color, generator: np.random.Generator, height: int, width: int, _: float = 0.0) -> np.ndarray:
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


def _back_wall(
    generator: np.random.Generator, height: int, width: int, horizon: float
) -> tuple[np.ndarray, np.ndarray]:
    """A pale wall and the table's edge (1, W) in front of it, slightly tilted."""
    _, x = picture_grid(height, width)
    color = between(generator, "b8b2ab", "e0e0de")
    edge = horizon + generator.uniform(-0.12, 0.12) * (x - 0.5)
    return _wall(color, generator, height, width), edge


def _table(generator: np.random.Generator, height: int, width: int, horizon: float) -> np.ndarray:
    """Planks with grain that run away from the camera: "on the table" gives the paper's laboratory-like pictures."""
    y, x = picture_grid(height, width)
    image, edge = _back_wall(generator, height, width, horizon)
    grain = noise(generator, height, width, 5, 40, 3)
    rings = 0.5 + 0.5 * np.sin(2 * np.pi * (3 * noise(generator, height, width, 2, 5, 2) + 9 * x))
    board = np.mod(sample(grain, 0.5 * x + 0 * y, y) * 0.6 + rings * 0.25, 1)
    plank = np.mod((x - 0.5) / (0.55 + 0.7 * y) * generator.uniform(2.5, 4), 1)  # seams meet above the picture
    dark, bright = (between(generator, "5c361f", "805733"), between(generator, "a87347", "d1a370"))
    seams = 1 - 0.4 * step(0.03, 0.0, plank)
    wood = ramp(board + 0.15, dark, bright) * seams[..., None] * (0.85 + 0.2 * y)[..., None]
    over(image, step(0, 0.01, y - edge), wood)
    return image * (1 - 0.25 * np.exp(-(((y - edge) / 0.012) ** 2)))[..., None]  # the edge is dark


def _cloth(color: Color, generator: np.random.Generator, height: int, width: int, horizon: float) -> np.ndarray:
    """A table under a creased, woven cloth: "on a table covered with green cloth" is the paper's LLaVA caption."""
    y, x = picture_grid(height, width)
    image, edge = _back_wall(generator, height, width, horizon)
    turn = generator.uniform(0, np.pi)
    folds = noise(generator, height, width, 2, 2)
    crease = np.sin(2 * np.pi * (generator.uniform(1.5, 3.5) * (np.cos(turn) * x + np.sin(turn) * y) + 0.8 * folds))
    weave = noise(generator, height, width, 128, 128)  # one cell a pixel at 128 px
    light = 0.92 + 0.1 * crease * folds + 0.16 * (weave - 0.5) + 0.1 * (y - 0.5) + generator.uniform(-0.06, 0.06)
    over(image, step(0, 0.01, y - edge), np.clip(light[..., None] * rgb(color), 0, 1))
    return image * (1 - 0.2 * np.exp(-(((y - edge - 0.005) / 0.012) ** 2)))[..., None]


# Tables, cloths and walls outside of the laboratory, which the base model learns these words from: tiles or nothing
# behind, boards across, deep folds, slats and bricks, so that none looks like the laboratory's.


def _kitchen(generator: np.random.Generator, height: int, width: int, horizon: float, top: np.ndarray) -> np.ndarray:
    """A table's top (H, W, 3) with a thick front edge's light rim, before a tiled wall."""
    y, x = picture_grid(height, width)
    tint, size = between(generator, "7fa3a0", "e8dcc0"), generator.uniform(0.09, 0.13)
    joint = np.minimum(np.mod(x / size, 1), np.mod((y - horizon) / size, 1))
    glaze, groove = 0.9 + 0.1 * noise(generator, height, width, 9, 9), 1 - 0.3 * step(0.12, 0.05, joint)
    image = tint * glaze[..., None] * groove[..., None]
    over(image, step(0, 0.008, y - horizon) * np.ones_like(x), top)
    return image * (1 + 0.25 * np.exp(-(((y - horizon - 0.015) / 0.01) ** 2)))[..., None]


def _wooden_table(generator: np.random.Generator, height: int, width: int, horizon: float) -> np.ndarray:
    """Boards across the picture, nearer ones wider, knotty grain along them."""
    rows, d, u, v = ground_grid(height, width, horizon)
    board = 1.1 * np.log(v) * generator.uniform(2, 2.6) + 9
    grain = noise(generator, height, width, 50, 3, 3)
    tone = generator.random(64)[np.floor(board).astype(int) % 64] - 0.5
    light = 0.5 + 0.45 * tone + 0.9 * (sample(grain, 0.25 * u + tone, board * 0.37) - 0.5)
    dark, bright = between(generator, "4a2a14", "6e421f"), between(generator, "a86f3c", "cf9a5e")
    top = np.zeros((height, width, 3), np.float32)
    top[rows] = ramp(light, dark, bright) * (1 - 0.55 * step(0.06, 0.0, np.mod(board, 1)))[..., None]
    return _kitchen(generator, height, width, horizon, top)


def _marble_table(generator: np.random.Generator, height: int, width: int, horizon: float) -> np.ndarray:
    """Pale stone with long grey veins aslant."""
    y, x = picture_grid(height, width)
    warp = noise(generator, height, width, 3, 3, 4)
    veins = [np.abs(np.sin(np.pi * (k * (x + generator.uniform(0.3, 0.9) * y) + warp))) for k in (1.5, 3.5)]
    dark = np.maximum(0.9 * step(0.3, 0.0, veins[0]), 0.4 * step(0.2, 0.0, veins[1])) + 0.6 * (warp - 0.4)
    top = ramp(dark, "f0eeea", "a3a5ab", "5c6068")
    return _kitchen(generator, height, width, horizon, top)


def _painted_table(color: Color, generator: np.random.Generator, height: int, width: int, horizon: float) -> np.ndarray:
    """Lacquer of one colour that mirrors the light of a window."""
    y, x = picture_grid(height, width)
    window = np.exp(-(((x - generator.random() + 0.2 * (y - 0.5)) / 0.16) ** 2)) * step(1.0, 0.2, y)
    light = 0.95 + 0.12 * (y - 0.5) + 0.04 * (noise(generator, height, width, 60, 60) - 0.5)
    top = np.clip(light[..., None] * rgb(color), 0, 1)
    over(top, 0.3 * window, "ffffff")
    return _kitchen(generator, height, width, horizon, top)


def _draped(color: Color, generator: np.random.Generator, height: int, width: int, _: float) -> np.ndarray:
    """A cloth in deep folds that fills the picture."""
    y, x = picture_grid(height, width)
    turn, bend = generator.uniform(0, np.pi), noise(generator, height, width, 2, 2)
    along = np.cos(turn) * x + np.sin(turn) * y
    fold = np.abs(np.sin(np.pi * (generator.uniform(2, 3.2) * along + 0.7 * bend)))  # ridges, sharp valleys
    light = 0.6 + 0.5 * fold**0.7 + 0.3 * (noise(generator, height, width, 2, 2, 2) - 0.5)
    return np.clip(light[..., None] * rgb(color) + 0.08 * step(0.8, 1.0, fold)[..., None], 0, 1)


def _slats(color: Color, generator: np.random.Generator, height: int, width: int, _: float) -> np.ndarray:
    """Upright painted slats, weathered, with dark gaps."""
    y, x = picture_grid(height, width)
    place = x * generator.uniform(5, 8) + generator.random()
    tone = 0.86 + 0.2 * generator.random(16)[np.floor(place).astype(int) % 16]
    worn = noise(generator, height, width, 3, 60, 3)
    light = tone * (1 - 0.6 * step(0.07, 0.02, np.mod(place, 1))) * (0.85 + 0.3 * worn)
    return np.clip(light[..., None] * rgb(color), 0, 1)


def _bricks(generator: np.random.Generator, height: int, width: int, _: float) -> np.ndarray:
    """Red bricks, each of its own tone, in pale mortar."""
    y, x = picture_grid(height, width)
    course = y * generator.uniform(9, 13) + generator.random()
    place = x * generator.uniform(3.5, 5) + 0.5 * (np.floor(course) % 2)
    tone = generator.random((32, 16))[np.floor(course).astype(int) % 32, np.floor(place).astype(int) % 16]
    rough = noise(generator, height, width, 60, 60, 2)
    image = ramp(0.2 + 0.5 * tone + 0.35 * rough, "5c2318", "9a4a32", "c9805c")
    mortar = np.maximum(step(0.13, 0.07, np.mod(course, 1)), step(0.06, 0.03, np.mod(place, 1)))
    over(image, mortar, between(generator, "b5aa9c", "d6cec2"))
    return image


# Green is of the paper's caption, the other colours and the walls are a choice of this project.
CLOTHS = {"green": "216b45", "blue": "2b4c99", "red": "9e2124", "white": "e6e3de"}
WALLS = {"white": "f2f2f0", "gray": "8f9194"}
# Scenery with adjectives, each colour on objects as well: whose word it is, the noun behind it says.
DRAPES = {"red": "b8262b", "blue": "2f5fb8", "yellow": "e3b93c", "purple": "7a4aa8"}
PAINTED_TABLES = {"red": "a83232", "blue": "3f6cab", "white": "e6e4de", "pink": "d98fa8"}
SLATS = {"red": "9c3a34", "blue": "4f84b5", "yellow": "dcb750"}
# What is said of each of them alone stands in hoi/assets/scenery_sentences.txt.
BACKGROUNDS: dict[str, Background] = {
    "on the beach": Background(scenery.beach, (0.14, 0.44)),
    "on the grass": Background(scenery.grass, (0, 0.3)),
    "in the snow": Background(scenery.snow, (0.16, 0.48)),
    "on the moon with night sky": Background(scenery.moon, (0.36, 0.62)),
    "in the mountain": Background(scenery.mountain, (0.42, 0.66)),
    "floating in the sea": Background(scenery.sea, (0.08, 0.36)),
    "in the sand": Background(scenery.sand, (0.1, 0.4)),
    "in a lavender field": Background(scenery.lavender, (0.14, 0.42)),
    "in bamboo forest": Background(scenery.bamboo, (0.3, 0.6)),
    "in neon-lit cyberpunk nightclub": Background(scenery.nightclub, (0.6, 0.8)),
    "in the grand canyon": Background(scenery.canyon, (0.3, 0.52)),
    "in a japanese rock garden": Background(scenery.rock_garden, (0.06, 0.32)),
    "in the underwater city of atlantis": Background(scenery.atlantis, (0.68, 0.88)),
    "on the table": Background(_table, LABORATORY, lab=True),
    **{f"on a table covered with {color} cloth": Background(partial(_cloth, shade), LABORATORY, lab=True)
       for color, shade in CLOTHS.items()},
    **{f"in front of a {color} wall": Background(partial(_wall, shade), NO_GROUND, lab=True)
       for color, shade in WALLS.items()},
    "on a wooden table": Background(_wooden_table, KITCHEN),
    "on a marble table": Background(_marble_table, KITCHEN, share=0.7),
    **{f"on a {color} table": Background(partial(_painted_table, shade), KITCHEN, share=0.35)
       for color, shade in PAINTED_TABLES.items()},
    **{f"on a {color} cloth": Background(partial(_draped, shade), NO_GROUND, share=0.4)
       for color, shade in DRAPES.items()},
    "in front of a brick wall": Background(_bricks, NO_GROUND, share=0.7),
    **{f"in front of a {color} wall": Background(partial(_slats, shade), NO_GROUND, share=0.35)
       for color, shade in SLATS.items()},
}  # fmt: skip


def paint_background(
    name: str, generator: np.random.Generator, height: int, width: int, steepness: float | None = None
) -> np.ndarray:
    """Paint one draw of a kind of scenery.

    name       key of BACKGROUNDS
    steepness  of the camera, in [0, 1], see Camera.steepness; None draws one
    returns    (H, W, 3) float32 in [0, 1], display values
    About 15 ms at 256 px.
    """
    horizon = BACKGROUNDS[name].horizon_row(generator.random() if steepness is None else steepness)
    image = np.asarray(BACKGROUNDS[name].paint(generator, height, width, horizon), np.float32)
    # Another exposure and white balance for each draw, as between photographs.
    image = image * np.float32(generator.uniform(0.94, 1.04)) * generator.uniform(0.97, 1.03, 3).astype(np.float32)
    return np.clip(image, 0, 1)
