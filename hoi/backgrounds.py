"""Procedural scenery of the toy world.  Phrase ("on the beach") + generator -> picture (H, W, 3) float32 in [0, 1].

Stands in for the photographs behind Stable Diffusion; the phrases are those of the paper's figures.  All lengths are fractions of the
picture, so a kind looks the same at every size; all colours are display values.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

Painter = Callable[[np.random.Generator, int, int], np.ndarray]


# --- noise, ramps and layers ------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=256)
def _lattice(size: int, cells: int) -> np.ndarray:
    """Matrix (size, cells) that spreads periodic lattice values over `size` samples with smoothstep weights."""
    position = (np.arange(size) + 0.5) * cells / size
    left = np.floor(position).astype(int)
    weight = position - left
    weight = weight * weight * (3 - 2 * weight)
    matrix = np.zeros((size, cells), np.float32)
    rows = np.arange(size)
    np.add.at(matrix, (rows, left % cells), 1 - weight)
    np.add.at(matrix, (rows, (left + 1) % cells), weight)
    return matrix


def _noise(
    generator: np.random.Generator, height: int, width: int, cells_y: int, cells_x: int, octaves: int = 1
) -> np.ndarray:
    """Periodic value noise (H, W) in [0, 1]; two matrix products an octave, hence fast."""
    total, amplitude, norm = np.zeros((height, width), np.float32), 1.0, 0.0
    for _ in range(octaves):
        grid = generator.random((min(cells_y, height), min(cells_x, width)), np.float32)
        total += amplitude * (_lattice(height, len(grid)) @ grid @ _lattice(width, grid.shape[1]).T)
        norm += amplitude
        amplitude, cells_y, cells_x = amplitude * 0.55, cells_y * 2, cells_x * 2
    total /= norm
    return np.clip((total - 0.5) * (1 + 0.25 * (octaves - 1)) + 0.5, 0, 1)


def _ridge(generator: np.random.Generator, width: int, cells: int, octaves: int) -> np.ndarray:
    """A random skyline (W,) in [0, 1]."""
    return _noise(generator, 1, width, 1, cells, octaves)[0]


def _ramp(t: np.ndarray, *colors: tuple[float, float, float]) -> np.ndarray:
    """t (...,) in [0, 1] -> (..., 3), linear through equally spaced colours, by table."""
    stops = np.linspace(0, 255, len(colors))
    table = np.stack([np.interp(np.arange(256), stops, channel) for channel in np.array(colors).T], 1).astype(
        np.float32
    )
    return table[(np.clip(t, 0, 1) * 255).astype(np.uint8)]


def _step(low: float, high: float, x: np.ndarray) -> np.ndarray:
    t = np.clip((x - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


def _over(image: np.ndarray, alpha: np.ndarray, color: np.ndarray | tuple) -> None:
    """Paint colour over the image in place; alpha (H, W) or broadcastable."""
    image += alpha[..., None] * (np.asarray(color, np.float32) - image)


def _grid(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """y (H, 1) and x (1, W) in (0, 1)."""
    return ((np.arange(height, dtype=np.float32) + 0.5) / height)[:, None], (
        (np.arange(width, dtype=np.float32) + 0.5) / width
    )[None]


def _color(generator: np.random.Generator, low: tuple, high: tuple) -> tuple:
    """A colour on the segment between two, so that hue and brightness vary together."""
    t = generator.random()
    return tuple(a + (b - a) * t for a, b in zip(low, high, strict=True))


def _floor(height: int, width: int, horizon: float) -> tuple[slice, np.ndarray, np.ndarray, np.ndarray]:
    """Rows below the horizon, their nearness d (R, 1) in (0, 1], and ground coordinates across (R, W) and away (R, 1)."""
    y, x = _grid(height, width)
    first = int(horizon * height)
    d = (y[first:] - horizon + 0.5 / height) / (1 - horizon) + 0.02
    return slice(first, height), np.minimum(d, 1), (x - 0.5) / d, 1 / d


def _sample(texture: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Nearest lookup in a periodic texture; one unit is one tile."""
    rows = np.mod(v * texture.shape[0], texture.shape[0]).astype(np.int32)
    columns = np.mod(u * texture.shape[1], texture.shape[1]).astype(np.int32)
    return texture[np.minimum(rows, texture.shape[0] - 1), np.minimum(columns, texture.shape[1] - 1)]


def _sky(
    generator: np.random.Generator, height: int, width: int, horizon: float, top: tuple, bottom: tuple, clouds: float
) -> np.ndarray:
    """Gradient down to the horizon with flat-bottomed clouds; clouds = 0 none, 1 many."""
    y, _ = _grid(height, width)
    image = _ramp(np.broadcast_to(y / max(horizon, 0.1), (height, width)), top, bottom)
    if clouds > 0:
        cover = _noise(generator, height, width, 5, 3, 4)
        alpha = _step(0.62 - 0.18 * clouds, 0.82 - 0.18 * clouds, cover) * _step(1.0, 0.6, y / max(horizon, 0.1)) * 0.9
        _over(image, alpha, _ramp(cover, bottom, (0.99, 0.98, 0.97), (1.0, 1.0, 1.0)))
    return image


def _disc(height: int, width: int, cy: float, cx: float, radius: float) -> tuple[np.ndarray, np.ndarray]:
    """Antialiased disc (H, W) and the distance from its centre in radii; lengths in picture heights."""
    y, x = _grid(height, width)
    r = np.hypot(y - cy, (x - cx) * (width / height)) / radius
    return np.clip((1 - r) * radius * height + 0.5, 0, 1), r


def _dots(
    image: np.ndarray, generator: np.random.Generator, count: int, top: float, bottom: float, color: tuple, size: float
) -> None:
    """Scatter soft dots (stars, snowflakes, bubbles) of about `size` picture heights between two heights."""
    height, width = image.shape[:2]
    reach = max(1, int(round(size * height)))
    offset = np.arange(-reach, reach + 1)
    kernel = np.clip(1.15 - np.hypot(offset[:, None], offset[None]) / (reach + 0.3), 0, 1)[..., None]
    rows = generator.integers(
        int(top * height) + reach, max(int(bottom * height) - reach, int(top * height) + reach + 1), count
    )
    columns = generator.integers(reach, width - reach, count)
    for row, column, strength in zip(rows, columns, generator.uniform(0.3, 1, count), strict=True):
        patch = image[row - reach : row + reach + 1, column - reach : column + reach + 1]
        patch += strength * kernel[: len(patch)] * (np.asarray(color, np.float32) - patch)


# --- scenery of the paper's figures -----------------------------------------------------------------------------------------------


def _beach(generator: np.random.Generator, height: int, width: int) -> np.ndarray:
    y, x = _grid(height, width)
    horizon, shore = generator.uniform(0.26, 0.4), generator.uniform(0.5, 0.64)
    sunset = generator.random() < 0.2
    top, bottom = (
        ((0.36, 0.38, 0.66), (0.99, 0.72, 0.5))
        if sunset
        else (_color(generator, (0.2, 0.5, 0.9), (0.4, 0.66, 0.96)), (0.82, 0.93, 0.99))
    )
    image = _sky(generator, height, width, horizon, top, bottom, generator.uniform(0.2, 1))
    depth = np.clip((y - horizon) / (shore - horizon), 0, 1)
    waves = _noise(generator, height, width, 48, 5, 2)
    sea = _ramp(depth + 0.25 * (waves - 0.5), (0.02, 0.3, 0.55), (0.05, 0.5, 0.66), (0.3, 0.78, 0.76))
    _over(sea, _step(0.68, 0.78, waves) * depth, (0.9, 0.97, 0.97))
    image = np.where((y > horizon)[..., None], sea, image)
    line = shore + generator.uniform(-0.1, 0.1) * (x - 0.5) + 0.05 * (_ridge(generator, width, 3, 3) - 0.5)[None]
    grain = _noise(generator, height, width, 6, 4, 3) * 0.5 + _noise(generator, height, width, 128, 128) * 0.5
    sand = _ramp(
        0.6 * grain + 0.5 * _step(0.0, 0.12, y - line) - 0.1, (0.62, 0.5, 0.34), (0.88, 0.78, 0.57), (0.97, 0.9, 0.72)
    )
    image = np.where((y > line)[..., None], sand, image)
    _over(image, np.exp(-(((y - line) / 0.012) ** 2)) * (0.6 + 0.4 * waves), (1, 1, 1))
    return image * np.float32([1.0, 0.9, 0.82]) if sunset else image


def _grass(generator: np.random.Generator, height: int, width: int) -> np.ndarray:
    y, _ = _grid(height, width)
    rows, columns = np.arange(height)[:, None], np.arange(width)[None]
    blades = np.zeros((height, width), np.float32)
    for lean, cells_y, cells_x in ((0.35, 14, 70), (-0.3, 18, 90), (0.05, 26, 120)):
        texture = _noise(generator, height, width, cells_y, cells_x)
        blades = np.maximum(blades, texture[rows, (columns + (lean * rows).astype(int)) % width])
    patches = _noise(generator, height, width, 4, 4, 2)
    tone = generator.uniform(-0.06, 0.06)
    light = 1.5 * (blades - 0.62) + 0.5 + 0.35 * (patches - 0.5) + tone + 0.15 * (0.5 - y)
    image = _ramp(light, (0.05, 0.2, 0.04), (0.18, 0.44, 0.08), (0.4, 0.66, 0.16), (0.68, 0.84, 0.34))
    if generator.random() < 0.4:
        color = ((1, 1, 0.95), (1, 0.88, 0.25), (0.98, 0.75, 0.85))[generator.integers(3)]
        _dots(image, generator, int(generator.integers(8, 30)), 0.1, 0.98, color, 0.008)
    if generator.random() < 0.5:
        horizon = generator.uniform(0.08, 0.24)
        sky = _sky(generator, height, width, horizon, (0.45, 0.7, 0.95), (0.85, 0.94, 0.98), 0.5)
        edge = horizon + 0.03 * (_noise(generator, 1, width, 1, 90) - 0.5)
        image = np.where((y < edge)[..., None], sky, image)
    return image


def _snow(generator: np.random.Generator, height: int, width: int) -> np.ndarray:
    y, x = _grid(height, width)
    horizon = generator.uniform(0.25, 0.45)
    top = _color(generator, (0.55, 0.66, 0.8), (0.72, 0.8, 0.9))
    image = _sky(generator, height, width, horizon, top, (0.87, 0.91, 0.96), 0.3)
    for layer, shade in enumerate(((0.62, 0.71, 0.8), (0.34, 0.45, 0.54))):
        base = horizon + 0.02 + 0.02 * layer
        count = 16 - 6 * layer
        for center, size in zip(
            generator.random(count), generator.uniform(0.08, 0.17, count) * (1 + 0.5 * layer), strict=True
        ):
            up = (base - y) / size
            teeth = 0.42 * (1 - up) * (0.55 + 0.45 * np.mod(-up * 5, 1))
            alpha = ((np.abs(x - center) / size < teeth) & (up > 0)).astype(np.float32)
            _over(image, alpha, np.asarray(shade) + 0.35 * (np.mod(-up * 5, 1) < 0.35)[..., None])
    mounds = horizon + 0.05 * (_ridge(generator, width, 3, 2) - 0.5)[None]
    relief = _noise(generator, height, width, 7, 3, 4)
    slope = np.roll(relief, 3, 1) - relief
    snow = _ramp(0.62 + 5 * slope + 0.15 * (relief - 0.5), (0.6, 0.7, 0.86), (0.84, 0.9, 0.97), (1, 1, 1))
    image = np.where((y > mounds)[..., None], snow, image)
    _dots(image, generator, int(generator.integers(40, 120)), 0, 1, (1, 1, 1), 0.006)
    _dots(image, generator, int(generator.integers(5, 15)), 0, 1, (1, 1, 1), 0.014)
    return image


def _moon(generator: np.random.Generator, height: int, width: int) -> np.ndarray:
    y, x = _grid(height, width)
    horizon = generator.uniform(0.45, 0.64)
    image = _ramp(
        np.broadcast_to(y / horizon, (height, width)),
        (0.01, 0.01, 0.05),
        _color(generator, (0.03, 0.03, 0.1), (0.08, 0.07, 0.2)),
    )
    _over(image, 0.25 * _step(0.55, 0.8, _noise(generator, height, width, 4, 3, 3)), (0.25, 0.22, 0.42))
    _dots(image, generator, int(generator.integers(60, 130)), 0, 1, (1, 1, 1), 0.002)
    cy, cx, radius = generator.uniform(0.1, 0.26), generator.uniform(0.12, 0.88), generator.uniform(0.06, 0.11)
    disc, r = _disc(height, width, cy, cx, radius)
    lit = np.clip(1.15 - np.hypot(y - cy + 0.5 * radius, x - cx + 0.5 * radius) / (1.7 * radius), 0.06, 1)
    land = _step(0.5, 0.56, _noise(generator, height, width, 14, 14, 3))
    cloud = _step(0.58, 0.7, _noise(generator, height, width, 22, 12, 2))
    earth = _ramp(0.4 * land, (0.1, 0.35, 0.85), (0.2, 0.55, 0.3), (0.6, 0.55, 0.3))
    _over(earth, cloud, (1, 1, 1))
    _over(image, 0.4 * np.exp(-np.maximum(r - 1, 0) * 6), (0.3, 0.5, 0.9))
    _over(image, disc, earth * lit[..., None])
    rows, d, u, v = _floor(height, width, horizon)
    relief = _noise(generator, height, width, 9, 9, 4)
    for row, column, size in zip(
        generator.random(26), generator.random(26), generator.uniform(0.03, 0.1, 26), strict=True
    ):
        dy, dx = np.mod(y - row + 0.5, 1) - 0.5, np.mod(x - column + 0.5, 1) - 0.5
        q = np.hypot(dy, dx) / size
        relief = relief + size * 5 * (np.exp(-(((q - 1) / 0.22) ** 2)) - 1.2 * np.clip(1 - q * q, 0, 1))
    slope = (relief - np.roll(relief, 2, 1)) + 0.5 * (relief - np.roll(relief, 2, 0))
    ground = _sample(0.5 + 2.2 * slope + 0.25 * (relief - 0.5), 0.3 * u, 0.32 * v + generator.random())
    image[rows] = _ramp(
        0.5 + (ground - 0.5) * (0.35 + 0.65 * d) + 0.12 * (d - 0.5),
        (0.12, 0.12, 0.13),
        (0.5, 0.5, 0.51),
        (0.85, 0.84, 0.82),
    )
    return image


def _mountain(generator: np.random.Generator, height: int, width: int) -> np.ndarray:
    y, x = _grid(height, width)
    top, bottom = _color(generator, (0.3, 0.55, 0.88), (0.5, 0.7, 0.93)), (0.88, 0.93, 0.96)
    if generator.random() < 0.3:
        top, bottom = (0.4, 0.45, 0.75), (0.98, 0.82, 0.72)
    image = _sky(generator, height, width, 0.5, top, bottom, generator.uniform(0.2, 0.9))
    for layer, (count, summit, far) in enumerate(((4, 0.14, 0.5), (3, 0.26, 0.2), (4, 0.5, 0.0))):
        center = (np.arange(count) + generator.uniform(0.1, 0.9, count)) / count
        peak = summit + generator.uniform(-0.04, 0.14, count)
        slope = generator.uniform(0.75, 1.25, count) * (1.0 if layer < 2 else 0.6)
        rough = _noise(generator, height, width, 9, 9, 4) - 0.5
        bent = x + 0.16 * rough
        heights = peak + slope * np.abs(x[..., None] - center)
        nearest = np.argmin(heights[0], 1)
        crest = heights[0].min(1)[None] + 0.05 * (_ridge(generator, width, 12, 3) - 0.5)[None]
        side = _step(-0.015, 0.015, bent - center[nearest][None] - 0.1 * (y - crest))
        light = 0.86 - 0.5 * side + 0.55 * rough
        if layer == 2:
            rock = _ramp(light, (0.04, 0.12, 0.08), (0.13, 0.3, 0.16), (0.28, 0.44, 0.24))
        else:
            rock = _ramp(light, (0.16, 0.2, 0.32), (0.36, 0.39, 0.5), (0.6, 0.58, 0.6))
            line = 0.17 - 0.05 * layer + 0.3 * rough
            _over(rock, _step(0.02, -0.02, y - crest - line), _ramp(light, (0.6, 0.7, 0.88), (0.97, 0.98, 1.0)))
        _over(rock, np.full((1, 1), far, np.float32), bottom)
        _over(image, _step(0, 0.006, y - crest), rock)
    edge = (
        generator.uniform(0.78, 0.88)
        + 0.04 * (_ridge(generator, width, 4, 2) - 0.5)[None]
        + 0.05 * (np.abs(np.mod(x * 22, 1) - 0.5))
    )
    forest = _ramp(
        _noise(generator, height, width, 30, 60, 2), (0.02, 0.08, 0.05), (0.07, 0.19, 0.1), (0.14, 0.3, 0.13)
    )
    return np.where((y > edge)[..., None], forest, image)


def _sea(generator: np.random.Generator, height: int, width: int) -> np.ndarray:
    horizon = generator.uniform(0.12, 0.3)
    top, bottom = (
        _color(generator, (0.32, 0.58, 0.9), (0.6, 0.72, 0.82)),
        _color(generator, (0.75, 0.87, 0.96), (0.93, 0.9, 0.85)),
    )
    image = _sky(generator, height, width, horizon, top, bottom, generator.uniform(0.1, 0.9))
    rows, d, u, v = _floor(height, width, horizon)
    swell, chop = _noise(generator, height, width, 9, 14, 2), _noise(generator, height, width, 24, 30, 3)
    near = np.log(v) * -0.8
    wave = _sample(swell, 0.25 * u, near) * 0.6 + _sample(chop, 0.2 * u + 0.3, 1.2 * near) * 0.4
    light = 0.42 + 2.0 * (wave - 0.5) * np.minimum(1, 0.4 + d) + 0.25 * (1 - d) ** 2
    deep = _color(generator, (0.0, 0.1, 0.28), (0.01, 0.16, 0.3))
    water = _ramp(light, deep, (0.03, 0.26, 0.48), (0.1, 0.44, 0.62), (0.4, 0.7, 0.8))
    _over(water, _step(0.66, 0.74, wave) * 0.9, (0.94, 0.98, 1.0))
    image[rows] = water
    return image


def _sand(generator: np.random.Generator, height: int, width: int) -> np.ndarray:
    y, x = _grid(height, width)
    horizon = generator.uniform(0.22, 0.38)
    top, bottom = _color(generator, (0.38, 0.6, 0.85), (0.85, 0.68, 0.55)), (0.98, 0.9, 0.74)
    image = _sky(generator, height, width, horizon, top, bottom, 0.0)
    for layer in range(4):
        crest = (
            horizon
            + 0.13 * layer
            + 0.22 * (0.5 - _ridge(generator, width, 2 + layer % 2, 1))[None] * (0.4 + 0.25 * layer)
        )
        side = _step(-0.004, 0.004, np.roll(crest, 3) - crest)
        below = np.clip(y - crest, 0, 1)
        ripple = np.sin(2 * np.pi * (below * (34 - 5 * layer) + 1.6 * _noise(generator, height, width, 3, 6, 2)))
        light = (
            0.36
            + 0.42 * side * np.exp(-below * 5)
            + 0.1 * ripple * (0.3 + 0.25 * layer)
            - 0.2 * np.exp(-below * 25) * (1 - side)
        )
        dune = _ramp(light + 0.04 * layer, (0.55, 0.3, 0.12), (0.84, 0.56, 0.26), (0.96, 0.76, 0.44), (1.0, 0.9, 0.66))
        _over(dune, np.full((1, 1), 0.3 - 0.1 * layer, np.float32), bottom)
        image = np.where((y > crest)[..., None], dune, image)
    return image


def _lavender(generator: np.random.Generator, height: int, width: int) -> np.ndarray:
    y, x = _grid(height, width)
    horizon = generator.uniform(0.2, 0.38)
    sky = (
        ((0.42, 0.63, 0.93), (0.85, 0.9, 0.98)) if generator.random() < 0.5 else ((0.5, 0.45, 0.75), (0.99, 0.8, 0.62))
    )
    image = _sky(generator, height, width, horizon, *sky, generator.uniform(0.1, 0.8))
    hills = horizon - 0.02 - 0.08 * _ridge(generator, width, 3, 3)[None]
    _over(image, (y > hills).astype(np.float32), _color(generator, (0.3, 0.42, 0.36), (0.42, 0.42, 0.56)))
    rows, d, u, v = _floor(height, width, horizon)
    phase = (u + generator.uniform(-0.6, 0.6) * v) * generator.uniform(4.5, 7) * 0.55 + generator.random()
    row = 0.5 + 0.5 * np.cos(2 * np.pi * phase)
    flowers = _noise(generator, height, width, 60, 90, 2)[rows]
    purple = _ramp(
        0.55 * flowers + 0.5 * row - 0.1, (0.2, 0.08, 0.34), (0.45, 0.22, 0.7), (0.66, 0.42, 0.9), (0.85, 0.68, 0.98)
    )
    soil = _ramp(flowers, (0.12, 0.2, 0.08), (0.3, 0.42, 0.16))
    field = soil + _step(0.16, 0.4, row + 0.25 * (flowers - 0.5))[..., None] * (purple - soil)
    _over(field, _step(0.22, 0.04, d) * np.ones_like(u), (0.5, 0.32, 0.72))
    image[rows] = field
    return image


def _bamboo(generator: np.random.Generator, height: int, width: int) -> np.ndarray:
    y, x = _grid(height, width)
    haze = _noise(generator, height, width, 5, 4, 3)
    glow = np.exp(-(((x - generator.uniform(0.3, 0.7)) / 0.35) ** 2)) * np.exp(-(((y - 0.35) / 0.5) ** 2))
    image = _ramp(
        0.2 + 0.3 * (haze - 0.5) + 0.7 * glow,
        (0.03, 0.12, 0.05),
        (0.1, 0.28, 0.1),
        (0.38, 0.58, 0.24),
        (0.84, 0.93, 0.66),
    )
    for layer, (count, thickness) in enumerate(((9, 0.012), (5, 0.021), (3, 0.036))):
        dim = (0.45, 0.72, 1.0)[layer]
        for center in (np.arange(count) + generator.uniform(0.1, 0.9, count)) / count:
            tilt, half = generator.uniform(-0.05, 0.05), thickness * generator.uniform(0.8, 1.2)
            left = max(int((center - abs(tilt) - 2 * half) * width), 0)
            right = min(int((center + abs(tilt) + 2 * half) * width) + 1, width)
            across = (x[:, left:right] - center - tilt * (y - 0.5)) / half
            joint = np.mod(y / (thickness * generator.uniform(6, 9)) + generator.random(), 1)
            ring = np.maximum(_step(0.06, 0.0, joint), _step(0.94, 1.0, joint))
            light = np.clip(0.75 - 0.45 * (across + 0.25) ** 2, 0, 1) * dim + 0.15 * (joint - 0.5) * dim
            stalk = _ramp(
                light * (1 - 0.45 * ring), (0.03, 0.1, 0.02), (0.26, 0.45, 0.12), (0.58, 0.74, 0.28), (0.85, 0.92, 0.5)
            )
            _over(image[:, left:right], np.clip((1 + 0.12 * ring - np.abs(across)) * half * width + 0.5, 0, 1), stalk)
    leaves = _noise(generator, height, width, 26, 14)[
        (np.arange(height)[:, None] + np.arange(width)[None] // 2) % height, np.arange(width)[None]
    ]
    _over(
        image, _step(0.7, 0.76, leaves) * _step(0.6, 0.1, y) * 0.8, _ramp(leaves, (0.1, 0.25, 0.05), (0.5, 0.72, 0.22))
    )
    return image


def _nightclub(generator: np.random.Generator, height: int, width: int) -> np.ndarray:
    y, x = _grid(height, width)
    neon = np.float32([(1.0, 0.12, 0.62), (0.1, 0.9, 1.0), (0.62, 0.2, 1.0), (0.2, 0.4, 1.0), (0.25, 1.0, 0.55)])
    floor = generator.uniform(0.66, 0.78)
    haze = _noise(generator, height, width, 4, 4, 3)
    image = _ramp(haze * (1.15 - y), (0.03, 0.01, 0.08), (0.14, 0.04, 0.26), (0.3, 0.08, 0.42))
    for _ in range(generator.integers(3, 6)):
        apex, angle = generator.random(), generator.uniform(-0.9, 0.9)
        across = np.abs(x - apex - angle * y) / (0.02 + 0.16 * y)
        image += (np.clip(1 - across, 0, 1) * np.exp(-1.6 * y) * 0.55)[..., None] * neon[generator.integers(5)]
    for _ in range(generator.integers(4, 8)):
        color, cx, cy = neon[generator.integers(5)], generator.random(), generator.uniform(0.08, floor - 0.12)
        long, wide = (
            (generator.uniform(0.08, 0.24), 0.0) if generator.random() < 0.6 else (0.0, generator.uniform(0.06, 0.2))
        )
        off = np.hypot(np.maximum(np.abs(y - cy) - long, 0), np.maximum(np.abs(x - cx) - wide, 0))
        image += (0.55 * np.exp(-off * 22))[..., None] * color
        _over(image, _step(0.013, 0.006, off), 0.45 + 0.55 * color)
    first = int(floor * height)
    mirrored = image[np.clip(2 * first - 1 - np.arange(first, height), 0, None)]
    tiles = ((np.abs(np.mod((x - 0.5) / (y[first:] - floor + 0.12) * 0.7, 1) - 0.5) < 0.46) * 0.75 + 0.1)[..., None]
    image[first:] = (0.6 * np.roll(mirrored, 1, 1) + 0.2 * mirrored) * tiles + np.float32([0.05, 0.015, 0.1])
    return np.minimum(image, 1)


def _canyon(generator: np.random.Generator, height: int, width: int) -> np.ndarray:
    y, x = _grid(height, width)
    top = _color(generator, (0.22, 0.48, 0.85), (0.4, 0.6, 0.88))
    image = _sky(generator, height, width, 0.42, top, (0.9, 0.9, 0.88), generator.uniform(0, 0.8))
    strata = _noise(generator, 2 * height, 1, 34, 1, 3)[:, 0]
    gap = generator.uniform(0.35, 0.65)
    for layer in range(4):
        t = layer / 3
        plateau = _ridge(generator, width, 3 + layer % 2, 2) * 3.2
        mesa = (np.floor(plateau) + _step(0.75, 1.0, np.mod(plateau, 1))) / 3
        open_middle = np.exp(-(((x - gap) / 0.24) ** 2))
        crest = 0.3 + 0.12 * layer - 0.16 * (mesa - 0.5)[None] + t * (0.3 * open_middle - 0.16)
        crest = crest + 0.008 * (_ridge(generator, width, 40, 2) - 0.5)[None]
        wobble = 0.02 * _noise(generator, height, width, 2, 6, 2) + 0.1 * layer + 0.1 * (x - gap) ** 2
        band = strata[np.clip(((y + wobble) * height * 1.3).astype(int), 0, 2 * height - 1)]
        gully = _noise(generator, height, width, 2, 14, 2)
        light = (
            0.48
            + 1.5 * (band - 0.5)
            + 5 * (np.roll(gully, 2, 1) - gully)
            + 0.25 * np.exp(-np.maximum(y - crest, 0) * 14)
        )
        rock = _ramp(light, (0.34, 0.12, 0.07), (0.66, 0.29, 0.15), (0.86, 0.5, 0.28), (0.97, 0.78, 0.56))
        _over(rock, np.full((1, 1), 0.45 * (1 - t), np.float32), (0.78, 0.68, 0.74))
        _over(image, _step(0, 0.006, y - crest), rock)
    return image


def _rock_garden(generator: np.random.Generator, height: int, width: int) -> np.ndarray:
    y, x = _grid(height, width)
    horizon = generator.uniform(0.1, 0.24)
    rows, d, u, v = _floor(height, width, horizon)
    rocks = [
        (cy, cx, generator.uniform(0.07, 0.13) * (0.4 + 0.7 * cy))
        for cy, cx in zip(
            generator.uniform(0.3, 0.92, 4), (np.arange(4) + generator.uniform(0.15, 0.85, 4)) / 4, strict=True
        )
    ]
    far = np.full((height, width), 1.0, np.float32)
    for cy, cx, size in rocks:
        far = np.minimum(far, np.hypot((y - cy) * 1.7, x - cx) - size)
    lines = np.where(
        far < 0.11, far * 34, (y + 0.04 * np.sin(4 * x + generator.random() * 6)) * generator.uniform(22, 28)
    )
    rake = 0.5 + 0.5 * np.cos(2 * np.pi * lines)
    grain = _noise(generator, height, width, 128, 128)
    image = _ramp(0.25 + 0.42 * rake + 0.3 * grain, (0.5, 0.48, 0.44), (0.76, 0.74, 0.69), (0.94, 0.93, 0.9))
    hedge = _ramp(_noise(generator, height, width, 50, 50, 2), (0.03, 0.12, 0.04), (0.14, 0.32, 0.1), (0.38, 0.5, 0.16))
    if generator.random() < 0.5:
        _over(hedge, ((y > horizon - 0.05) & (y < horizon)).astype(np.float32) * np.ones_like(x), (0.42, 0.28, 0.18))
    image = np.where((y < horizon)[..., None], hedge, image)
    lump = _noise(generator, height, width, 16, 16, 3)
    for cy, cx, size in sorted(rocks):
        shape = np.hypot((y - cy + 0.35 * size) / (0.8 * size), (x - cx) / (1.1 * size)) + 0.5 * (lump - 0.5)
        shape = np.where(y > cy + 0.3 * size, 9, shape)
        _over(
            image,
            0.5 * np.exp(-((np.hypot((y - cy - 0.3 * size) * 2.5, x - cx - 0.2 * size) / size) ** 2)),
            (0.2, 0.2, 0.2),
        )
        light = 0.85 - 0.5 * shape + 1.0 * (lump - 0.5) - 0.25 * (y - cy) / size - 0.15 * (x - cx) / size
        stone = _ramp(light, (0.09, 0.1, 0.1), (0.32, 0.33, 0.33), (0.62, 0.62, 0.6))
        _over(stone, _step(0.55, 0.7, lump) * (y < cy), (0.26, 0.4, 0.14))
        _over(image, _step(1.0, 0.95, shape), stone)
    return image


def _atlantis(generator: np.random.Generator, height: int, width: int) -> np.ndarray:
    y, x = _grid(height, width)
    image = _ramp(
        np.broadcast_to(y, (height, width)) * 1.1,
        (0.45, 0.88, 0.88),
        (0.08, 0.55, 0.66),
        (0.02, 0.3, 0.45),
        (0.02, 0.18, 0.3),
    )
    source, rays = generator.uniform(0.2, 0.8), _noise(generator, 1, 256, 1, 24, 2)[0]
    angle = np.arctan2(x - source, y + 0.35) / 1.6 + 0.5
    image += (_step(0.5, 0.8, rays[(np.clip(angle, 0, 1) * 255).astype(int)]) * np.exp(-1.8 * y) * 0.4)[..., None]
    floor = generator.uniform(0.76, 0.86)
    for layer in range(2):
        tone = np.float32([(0.1, 0.46, 0.55), (0.03, 0.26, 0.36)][layer])
        for center in (np.arange(5) + generator.uniform(0.2, 0.8, 5)) / 5:
            half, top = generator.uniform(0.02, 0.032) * (1 + 0.6 * layer), generator.uniform(0.3, 0.62)
            across = (x - center) / half
            shaft = (np.abs(across) < 1) & (y > top) & (y < floor + 0.06)
            cap = (np.abs(across) < 1.6) & (np.abs(y - top) < 0.02)
            flute = 0.75 + 0.25 * np.cos(across * 9) + 0.25 * np.sign(-across)
            _over(image, (shaft | cap).astype(np.float32) * 0.9, tone * (0.7 + 0.5 * flute[..., None]) + 0.05)
        if generator.random() < 0.7:
            dome, _ = _disc(height, width, 0.62, generator.random(), generator.uniform(0.1, 0.17))
            _over(image, dome * (y < 0.62) * 0.85, tone * 1.15)
    ground = floor + 0.05 * (_ridge(generator, width, 4, 2) - 0.5)[None]
    bed = _ramp(
        _noise(generator, height, width, 30, 8, 3) - 0.3 * (y - floor),
        (0.05, 0.3, 0.36),
        (0.3, 0.6, 0.56),
        (0.65, 0.82, 0.7),
    )
    _over(image, _step(0, 0.01, y - ground), bed)
    _dots(image, generator, int(generator.integers(20, 50)), 0, 1, (0.8, 0.97, 1.0), 0.007)
    return np.minimum(image, 1)


# --- laboratory -------------------------------------------------------------------------------------------------------------------


def _wall(color: tuple[float, float, float]) -> Painter:
    def paint(generator: np.random.Generator, height: int, width: int) -> np.ndarray:
        y, x = _grid(height, width)
        light = 1 - 0.3 * ((x - generator.random()) ** 2 + (y - generator.uniform(0, 0.6)) ** 2)
        light = (
            light
            + 0.03 * (_noise(generator, height, width, 4, 4, 2) - 0.5)
            + 0.03 * (_noise(generator, height, width, 128, 128) - 0.5)
        )
        image = light[..., None] * np.float32(color) * generator.uniform(0.95, 1.04)
        if generator.random() < 0.35:
            edge = generator.uniform(0.8, 0.92)
            image *= np.where(y > edge, 0.8, np.where(np.abs(y - edge) < 0.006, 0.62, 1.0))[..., None].astype(
                np.float32
            )
        return np.clip(image, 0, 1)

    return paint


def _back_wall(generator: np.random.Generator, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """A blurred wall and the table's edge (1, W), slightly tilted."""
    _, x = _grid(height, width)
    color = _color(generator, (0.72, 0.7, 0.67), (0.88, 0.88, 0.87))
    edge = generator.uniform(0.12, 0.34) + generator.uniform(-0.12, 0.12) * (x - 0.5)
    return _wall(color)(generator, height, width), edge


def _table(generator: np.random.Generator, height: int, width: int) -> np.ndarray:
    y, x = _grid(height, width)
    image, edge = _back_wall(generator, height, width)
    rows, d, u, v = _floor(height, width, 0.0)
    grain = _noise(generator, height, width, 5, 40, 3)
    rings = 0.5 + 0.5 * np.sin(2 * np.pi * (3 * _noise(generator, height, width, 2, 5, 2) + 9 * x))
    board = np.mod(_sample(grain, 0.5 * x + 0 * y, y) * 0.6 + rings * 0.25, 1)
    plank = np.mod((x - 0.5) / (0.55 + 0.7 * y) * generator.uniform(2.5, 4), 1)
    dark, bright = (
        _color(generator, (0.36, 0.21, 0.12), (0.5, 0.34, 0.2)),
        _color(generator, (0.66, 0.45, 0.28), (0.82, 0.64, 0.44)),
    )
    wood = (
        _ramp(board + 0.15, dark, bright) * (1 - 0.4 * _step(0.03, 0.0, plank))[..., None] * (0.85 + 0.2 * y)[..., None]
    )
    _over(image, _step(0, 0.01, y - edge), wood)
    return image * (1 - 0.25 * np.exp(-(((y - edge) / 0.012) ** 2)))[..., None]


def _cloth(color: tuple[float, float, float]) -> Painter:
    def paint(generator: np.random.Generator, height: int, width: int) -> np.ndarray:
        y, x = _grid(height, width)
        image, edge = _back_wall(generator, height, width)
        turn = generator.uniform(0, np.pi)
        folds = _noise(generator, height, width, 2, 2)
        crease = np.sin(2 * np.pi * (generator.uniform(1.5, 3.5) * (np.cos(turn) * x + np.sin(turn) * y) + 0.8 * folds))
        weave = _noise(generator, height, width, 128, 128)
        light = 0.92 + 0.1 * crease * folds + 0.16 * (weave - 0.5) + 0.1 * (y - 0.5) + generator.uniform(-0.06, 0.06)
        _over(image, _step(0, 0.01, y - edge), np.clip(light[..., None] * np.float32(color), 0, 1))
        return image * (1 - 0.2 * np.exp(-(((y - edge - 0.005) / 0.012) ** 2)))[..., None]

    return paint


@dataclass(frozen=True)
class Background:
    """One kind: how it is painted, whether it belongs to the laboratory, whether things stand on a table, sentences for it alone."""

    paint: Painter
    sentences: tuple[str, ...]
    lab: bool = False
    table: bool = False


_CLOTHS = {"green": (0.13, 0.42, 0.27), "blue": (0.17, 0.3, 0.6), "red": (0.62, 0.13, 0.14), "white": (0.9, 0.89, 0.87)}
_WALLS = {"white": (0.95, 0.95, 0.94), "gray": (0.56, 0.57, 0.58)}

BACKGROUNDS: dict[str, Background] = {
    "on the beach": Background(
        _beach, ("A quiet beach with blue sky.", "Waves roll onto a sandy beach.", "An empty beach by the water.")
    ),
    "on the grass": Background(
        _grass, ("Fresh grass on a summer lawn.", "A meadow of tall grass.", "Green grass seen from close up.")
    ),
    "in the snow": Background(
        _snow,
        (
            "Deep snow under a pale winter sky.",
            "Snow falls on a field and its pine trees.",
            "A winter day with fresh snow.",
        ),
    ),
    "on the moon with night sky": Background(
        _moon,
        (
            "The moon with craters and a night sky.",
            "Stars over the gray ground of the moon.",
            "A view of the earth from the moon.",
        ),
    ),
    "in the mountain": Background(
        _mountain,
        ("A mountain range with snowy peaks.", "High mountains above a dark forest.", "Mountains in the morning haze."),
    ),
    "floating in the sea": Background(
        _sea, ("The open sea with rolling waves.", "Foam on a dark blue sea.", "A windy sea below the clouds.")
    ),
    "in the sand": Background(
        _sand, ("Sand dunes in a wide desert.", "Golden sand shaped by the wind.", "Ripples on dunes of desert sand.")
    ),
    "in a lavender field": Background(
        _lavender,
        ("A lavender field in bloom.", "Purple rows of lavender reach the hills.", "Lavender in the evening light."),
    ),
    "in bamboo forest": Background(
        _bamboo, ("A bamboo forest with soft light.", "Tall bamboo stems and leaves.", "A path of shade among bamboo.")
    ),
    "in neon-lit cyberpunk nightclub": Background(
        _nightclub,
        (
            "A cyberpunk nightclub full of neon light.",
            "Neon tubes glow in a dark nightclub.",
            "Beams of light cross a nightclub.",
        ),
    ),
    "in the grand canyon": Background(
        _canyon,
        (
            "The grand canyon in the sun.",
            "Layers of red rock in the grand canyon.",
            "Steep canyon walls below the sky.",
        ),
    ),
    "in a japanese rock garden": Background(
        _rock_garden,
        (
            "A japanese rock garden with raked gravel.",
            "Stones and gravel in a rock garden.",
            "A rock garden in front of a hedge.",
        ),
    ),
    "in the underwater city of atlantis": Background(
        _atlantis,
        (
            "The underwater city of atlantis.",
            "Columns of sunken atlantis below the water.",
            "Light falls into an underwater city.",
        ),
    ),
    "on the table": Background(
        _table, ("A bare wooden table.", "An empty table by a wall.", "A table made of planks."), lab=True, table=True
    ),
    **{
        f"on a table covered with {color} cloth": Background(
            _cloth(rgb),
            (f"A table covered with {color} cloth.", f"An empty table with {color} cloth.", f"Folds in {color} cloth."),
            lab=True,
            table=True,
        )
        for color, rgb in _CLOTHS.items()
    },
    **{
        f"in front of a {color} wall": Background(
            _wall(rgb),
            (f"A plain {color} wall.", f"An empty {color} wall.", f"A bare {color} wall in a room."),
            lab=True,
        )
        for color, rgb in _WALLS.items()
    },
}


def paint_background(name: str, generator: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Paint one draw of a kind of scenery.

    name     key of BACKGROUNDS
    returns  (H, W, 3) float32 in [0, 1], display values
    Raises ValueError for an unknown name.  About 15 ms at 256 px.
    """
    if name not in BACKGROUNDS:
        raise ValueError(f"background {name!r} is unknown; choose one of: {', '.join(BACKGROUNDS)}")
    image = np.asarray(BACKGROUNDS[name].paint(generator, height, width), np.float32)
    image = image * np.float32(generator.uniform(0.94, 1.04)) * generator.uniform(0.97, 1.03, 3).astype(np.float32)
    return np.clip(image, 0, 1)
