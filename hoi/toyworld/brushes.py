"""Brushes for procedural scenery: noise, colour ramps, layers, perspective.  Generator -> float32 (H, W), (H, W, 3).

All lengths are fractions of the picture, so a picture looks the same at every size; all colours are display values.
"""

from functools import lru_cache

import numpy as np

Color = str | tuple | np.ndarray  # "ffcc00", or three numbers in [0, 1], or a picture of colours


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


def noise(
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


def ridge(generator: np.random.Generator, width: int, cells: int, octaves: int) -> np.ndarray:
    """A random skyline (W,) in [0, 1]."""
    return noise(generator, 1, width, 1, cells, octaves)[0]


def rgb(color: Color) -> np.ndarray:
    """Colour as float32; a hexadecimal string becomes (3,)."""
    if isinstance(color, str):
        return np.array([int(color[i : i + 2], 16) / 255 for i in (0, 2, 4)], np.float32)
    return np.asarray(color, np.float32)


def ramp(t: np.ndarray, *colors: Color) -> np.ndarray:
    """t (...,) in [0, 1] -> (..., 3), linear through equally spaced colours, by table."""
    stops = np.linspace(0, 255, len(colors))
    channels = np.stack([rgb(color) for color in colors], 1)
    table = np.stack([np.interp(np.arange(256), stops, channel) for channel in channels], 1).astype(np.float32)
    return table[(np.clip(t, 0, 1) * 255).astype(np.uint8)]


def step(low: float, high: float, x: np.ndarray) -> np.ndarray:
    """Smooth step from 0 at low to 1 at high (low may be the larger)."""
    t = np.clip((x - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


def over(image: np.ndarray, alpha: np.ndarray, color: Color) -> None:
    """Paint colour over the image in place; alpha (H, W) or broadcastable."""
    image += alpha[..., None] * (rgb(color) - image)


def picture_grid(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """y (H, 1) and x (1, W) in (0, 1)."""
    return ((np.arange(height, dtype=np.float32) + 0.5) / height)[:, None], (
        (np.arange(width, dtype=np.float32) + 0.5) / width
    )[None]


def between(generator: np.random.Generator, low: Color, high: Color) -> np.ndarray:
    """A colour (3,) on the segment between two, so that hue and brightness vary together."""
    return rgb(low) + (rgb(high) - rgb(low)) * np.float32(generator.random())


def ground_grid(height: int, width: int, horizon: float) -> tuple[slice, np.ndarray, np.ndarray, np.ndarray]:
    """Rows below the horizon, their nearness d (R, 1) in (0, 1], and ground coordinates u (R, W), v (R, 1)."""
    y, x = picture_grid(height, width)
    first = int(horizon * height)
    d = (y[first:] - horizon + 0.5 / height) / (1 - horizon) + 0.02
    return slice(first, height), np.minimum(d, 1), (x - 0.5) / d, 1 / d


def sample(texture: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Nearest lookup in a periodic texture; one unit is one tile."""
    rows = np.mod(v * texture.shape[0], texture.shape[0]).astype(np.int32)
    columns = np.mod(u * texture.shape[1], texture.shape[1]).astype(np.int32)
    return texture[np.minimum(rows, texture.shape[0] - 1), np.minimum(columns, texture.shape[1] - 1)]


def paint_sky(
    generator: np.random.Generator, height: int, width: int, horizon: float, top: Color, bottom: Color, clouds: float
) -> np.ndarray:
    """Gradient down to the horizon with flat-bottomed clouds; clouds = 0 none, 1 many."""
    y, _ = picture_grid(height, width)
    image = ramp(np.broadcast_to(y / max(horizon, 0.1), (height, width)), top, bottom)
    if clouds > 0:
        cover = noise(generator, height, width, 5, 3, 4)
        alpha = step(0.62 - 0.18 * clouds, 0.82 - 0.18 * clouds, cover) * step(1.0, 0.6, y / max(horizon, 0.1)) * 0.9
        over(image, alpha, ramp(cover, bottom, "fcfaf7", "ffffff"))
    return image


def soft_disc(height: int, width: int, cy: float, cx: float, radius: float) -> tuple[np.ndarray, np.ndarray]:
    """Antialiased disc (H, W) and the distance from its centre in radii; lengths in picture heights."""
    y, x = picture_grid(height, width)
    r = np.hypot(y - cy, (x - cx) * (width / height)) / radius
    return np.clip((1 - r) * radius * height + 0.5, 0, 1), r


def dots(
    image: np.ndarray, generator: np.random.Generator, count: int, top: float, bottom: float, color: Color, size: float
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
        patch += strength * kernel[: len(patch)] * (rgb(color) - patch)
