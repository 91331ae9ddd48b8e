"""Scenery of the paper's figures, painted.  Generator + size -> picture (H, W, 3) float32 in about [0, 1].

First the brushes (noise, colour ramps, layers, perspective), then one painter for each phrase of the figures.

A painter gets the row of its horizon, a share of the picture, from the camera's pitch.  It draws the two or three large
shapes and the colours by which its place is known at 128 pixels, with hues and weather drawn anew each time, so that a
word and not one picture is learned.  All lengths are shares of the picture, so that a place looks the same at every
size; all colours are display values.  The painters' numbers were set by eye, far enough apart that the nearest mean of
block colours tells most new draws (tests/toyworld); changing one changes the pictures that the built-in weights were
trained on.
"""

from functools import lru_cache

import numpy as np

from hoi.common.arrays import step

Color = str | tuple | np.ndarray  # "ffcc00", or three numbers in [0, 1], or a picture of colours
NEON = ("ff1f9e", "1ae6ff", "9e33ff", "3366ff", "40ff8c")


@lru_cache(maxsize=256)  # a few sizes, each with some dozens of cell counts
def _lattice(size: int, cells: int) -> np.ndarray:
    """Matrix (size, cells) that spreads periodic lattice values over `size` samples with smoothstep weights."""
    position = (np.arange(size) + 0.5) * cells / size
    left = np.floor(position).astype(int)
    weight = step(0, 1, position - left)
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
        amplitude, cells_y, cells_x = amplitude * 0.55, cells_y * 2, cells_x * 2  # 0.5 looks soft, 0.6 grainy
    total /= norm
    # A sum of octaves crowds around its mean; every octave more stretches it back towards the whole of [0, 1].
    return np.clip((total - 0.5) * (1 + 0.25 * (octaves - 1)) + 0.5, 0, 1)


def ridge(generator: np.random.Generator, width: int, cells: int, octaves: int) -> np.ndarray:
    """A random skyline (W,) in [0, 1]."""
    return noise(generator, 1, width, 1, cells, octaves)[0]


def rgb(color: Color) -> np.ndarray:
    """Colour as float32; a hexadecimal string becomes (3,)."""
    if isinstance(color, str):
        return np.array([int(color[i : i + 2], 16) / 255 for i in (0, 2, 4)], np.float32)
    return np.asarray(color, np.float32)


def between(generator: np.random.Generator, low: Color, high: Color) -> np.ndarray:
    """A colour (3,) on the segment between two, so that hue and brightness vary together."""
    return rgb(low) + (rgb(high) - rgb(low)) * np.float32(generator.random())


def ramp(t: np.ndarray, *colors: Color) -> np.ndarray:
    """t (...,) in [0, 1] -> (..., 3), linear through equally spaced colours, by table."""
    stops = np.linspace(0, 255, len(colors))
    channels = np.stack([rgb(color) for color in colors], 1)
    table = np.stack([np.interp(np.arange(256), stops, channel) for channel in channels], 1).astype(np.float32)
    return table[(np.clip(t, 0, 1) * 255).astype(np.uint8)]


def over(image: np.ndarray, alpha: np.ndarray, color: Color) -> None:
    """Paint colour over the image in place; alpha (H, W) or broadcastable."""
    image += alpha[..., None] * (rgb(color) - image)


def haze(layer: np.ndarray, share: float, color: Color) -> None:
    """Mix a whole layer with the air's colour in place: what is farther away is paler."""
    over(layer, np.full((1, 1), share, np.float32), color)


def picture_grid(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """y (H, 1) and x (1, W) in (0, 1)."""
    y, x = ((np.arange(size, dtype=np.float32) + 0.5) / size for size in (height, width))
    return y[:, None], x[None]


def ground_grid(height: int, width: int, horizon: float) -> tuple[slice, np.ndarray, np.ndarray, np.ndarray]:
    """Rows below the horizon, their nearness d (R, 1) in (0, 1], and ground coordinates u (R, W), v (R, 1)."""
    y, x = picture_grid(height, width)
    first = int(horizon * height)
    d = (y[first:] - horizon + 0.5 / height) / (1 - horizon) + 0.02  # never 0: the horizon is not infinitely far
    return slice(first, height), np.minimum(d, 1), (x - 0.5) / d, 1 / d


def sample(texture: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Nearest lookup in a periodic texture; one unit is one tile."""
    rows = np.mod(v * texture.shape[0], texture.shape[0]).astype(np.int32)
    columns = np.mod(u * texture.shape[1], texture.shape[1]).astype(np.int32)
    # In float32 mod may give the modulus itself, one row or column too far.
    return texture[np.minimum(rows, texture.shape[0] - 1), np.minimum(columns, texture.shape[1] - 1)]


def paint_sky(
    generator: np.random.Generator, height: int, width: int, horizon: float, top: Color, bottom: Color, clouds: float
) -> np.ndarray:
    """Gradient down to the horizon with flat-bottomed clouds; clouds = 0 none, 1 many."""
    y, _ = picture_grid(height, width)
    image = ramp(np.broadcast_to(y / max(horizon, 0.1), (height, width)), top, bottom)
    if clouds > 0:
        cover = noise(generator, height, width, 5, 3, 4)  # wider than high
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
    first = int(top * height) + reach
    rows = generator.integers(first, max(int(bottom * height) - reach, first + 1), count)
    columns = generator.integers(reach, width - reach, count)
    for row, column, strength in zip(rows, columns, generator.uniform(0.3, 1, count), strict=True):
        patch = image[row - reach : row + reach + 1, column - reach : column + reach + 1]
        patch += strength * kernel[: len(patch)] * (rgb(color) - patch)


def beach(generator: np.random.Generator, height: int, width: int, horizon: float) -> np.ndarray:
    """Sky, sea with foam, a slanting shore and dry sand; every fifth at sunset.  "on the beach", main figures."""
    y, x = picture_grid(height, width)
    shore = horizon + generator.uniform(0.2, 0.28)
    sunset = generator.random() < 0.2
    top, bottom = ("5c61a8", "fcb880") if sunset else (between(generator, "3380e6", "66a8f5"), "d1edfc")
    image = paint_sky(generator, height, width, horizon, top, bottom, generator.uniform(0.2, 1))
    depth = np.clip((y - horizon) / (shore - horizon), 0, 1)
    waves = noise(generator, height, width, 48, 5, 2)  # long crests along the shore
    sea = ramp(depth + 0.25 * (waves - 0.5), "054c8c", "0d80a8", "4cc7c2")  # deep blue to shallow green
    over(sea, step(0.68, 0.78, waves) * depth, "e6f7f7")
    image = np.where((y > horizon)[..., None], sea, image)
    line = shore + generator.uniform(-0.1, 0.1) * (x - 0.5) + 0.05 * (ridge(generator, width, 3, 3) - 0.5)[None]
    grain = noise(generator, height, width, 6, 4, 3) * 0.5 + noise(generator, height, width, 128, 128) * 0.5
    sand = ramp(0.6 * grain + 0.5 * step(0.0, 0.12, y - line) - 0.1, "9e8057", "e0c791", "f7e6b8")  # wet, then dry
    image = np.where((y > line)[..., None], sand, image)
    over(image, np.exp(-(((y - line) / 0.012) ** 2)) * (0.6 + 0.4 * waves), "ffffff")  # surf on the line
    return image * np.float32([1.0, 0.9, 0.82]) if sunset else image


def grass(generator: np.random.Generator, height: int, width: int, horizon: float) -> np.ndarray:
    """Three layers of leaning blades, at times with flowers or a strip of sky.  "on the grass", main figures."""
    y, _ = picture_grid(height, width)
    rows, columns = np.arange(height)[:, None], np.arange(width)[None]
    blades = np.zeros((height, width), np.float32)
    for lean, cells_y, cells_x in ((0.35, 14, 70), (-0.3, 18, 90), (0.05, 26, 120)):
        texture = noise(generator, height, width, cells_y, cells_x)
        blades = np.maximum(blades, texture[rows, (columns + (lean * rows).astype(int)) % width])  # sheared noise
    patches = noise(generator, height, width, 4, 4, 2)
    tone = generator.uniform(-0.06, 0.06)
    light = 1.5 * (blades - 0.62) + 0.5 + 0.35 * (patches - 0.5) + tone + 0.15 * (0.5 - y)
    image = ramp(light, "0d330a", "2e7014", "66a829", "add657")
    if generator.random() < 0.4:
        color = ("fffff2", "ffe040", "fabfd9")[generator.integers(3)]  # daisies, buttercups, clover
        dots(image, generator, int(generator.integers(8, 30)), 0.1, 0.98, color, 0.008)
    if horizon > 0.04:
        sky = paint_sky(generator, height, width, horizon, "73b2f2", "d9f0fa", 0.5)
        edge = horizon + 0.03 * (noise(generator, 1, width, 1, 90) - 0.5)  # tips of blades against the sky
        image = np.where((y < edge)[..., None], sky, image)
    return image


def snow(generator: np.random.Generator, height: int, width: int, horizon: float) -> np.ndarray:
    """Two rows of firs behind a snowfield while it snows.  "in the snow", main figures and appendix."""
    y, x = picture_grid(height, width)
    top = between(generator, "8ca8cc", "b8cce6")
    image = paint_sky(generator, height, width, horizon, top, "dee8f5", 0.3)
    for layer, shade in enumerate(("9eb5cc", "57738a")):  # the nearer row is darker, taller and has fewer trees
        base, count = horizon + 0.02 + 0.02 * layer, 16 - 6 * layer
        centers, sizes = generator.random(count), generator.uniform(0.08, 0.17, count) * (1 + 0.5 * layer)
        for center, size in zip(centers, sizes, strict=True):
            left, right = max(int((center - 0.5 * size) * width), 0), int((center + 0.5 * size) * width) + 2
            up = (base - y) / size
            branch = np.mod(-up * 5, 1)  # five tiers, each snowed over at its top
            alpha = (np.abs(x[:, left:right] - center) / size < 0.42 * (1 - up) * (0.55 + 0.45 * branch)) & (up > 0)
            over(image[:, left:right], alpha.astype(np.float32), rgb(shade) + 0.35 * (branch < 0.35)[..., None])
    mounds = horizon + 0.05 * (ridge(generator, width, 3, 2) - 0.5)[None]
    relief = noise(generator, height, width, 5, 2, 3)
    slope = np.roll(relief, 3, 1) - relief  # the side away from the sun is blue
    field = ramp(0.62 + 5 * slope + 0.15 * (relief - 0.5), "99b2db", "d6e6f7", "ffffff")
    image = np.where((y > mounds)[..., None], field, image)
    dots(image, generator, int(generator.integers(40, 120)), 0, 1, "ffffff", 0.006)
    dots(image, generator, int(generator.integers(5, 15)), 0, 1, "ffffff", 0.014)
    return image


def moon(generator: np.random.Generator, height: int, width: int, horizon: float) -> np.ndarray:
    """Craters on grey ground below stars and the earth.  "on the moon with night sky", main figures."""
    y, x = picture_grid(height, width)
    image = ramp(np.broadcast_to(y / horizon, (height, width)), "03030d", between(generator, "08081a", "141233"))
    over(image, 0.25 * step(0.55, 0.8, noise(generator, height, width, 4, 3, 3)), "40386b")  # a milky way
    dots(image, generator, int(generator.integers(60, 130)), 0, 1, "ffffff", 0.002)
    cy, cx, radius = generator.uniform(0.1, 0.26), generator.uniform(0.12, 0.88), generator.uniform(0.09, 0.14)
    disc, r = soft_disc(height, width, cy, cx, radius)
    # Lit from the upper left, never quite black on the other side.
    lit = np.clip(1.15 - np.hypot(y - cy + 0.5 * radius, x - cx + 0.5 * radius) / (1.7 * radius), 0.06, 1)
    land = step(0.5, 0.56, noise(generator, height, width, 14, 14, 3))
    cloud = step(0.58, 0.7, noise(generator, height, width, 22, 12, 2))
    earth = ramp(0.4 * land, "1a59d9", "338c4c", "998c4c")
    over(earth, cloud, "ffffff")
    over(image, 0.4 * np.exp(-np.maximum(r - 1, 0) * 6), "4c80e6")  # its air glows around it
    over(image, disc, earth * lit[..., None])
    rows, d, u, v = ground_grid(height, width, horizon)
    relief = 0.6 * noise(generator, height, width, 6, 6, 4)
    craters = zip(generator.random(18), generator.random(18), generator.uniform(0.05, 0.14, 18), strict=True)
    for row, column, size in craters:
        # Only the pixels within two radii; in the periodic texture they may wrap around its border.
        reach_y, reach_x = (np.arange(-int(2 * size * side), int(2 * size * side) + 1) for side in (height, width))
        q = np.hypot(reach_y[:, None] / height, reach_x[None] / width) / size
        crater = size * 5 * (np.exp(-(((q - 1) / 0.22) ** 2)) - 1.2 * np.clip(1 - q * q, 0, 1))  # rim, bowl
        relief[np.ix_((int(row * height) + reach_y) % height, (int(column * width) + reach_x) % width)] += crater
    slope = (relief - np.roll(relief, 2, 1)) + 0.5 * (relief - np.roll(relief, 2, 0))
    ground = sample(0.5 + 2.2 * slope + 0.25 * (relief - 0.5), 0.24 * u, 0.26 * v + generator.random())
    # Far ground keeps a third of its contrast: squeezed craters would look like noise.
    image[rows] = ramp(0.5 + (ground - 0.5) * (0.35 + 0.65 * d) + 0.12 * (d - 0.5), "1f1f21", "808082", "d9d6d1")
    return image


def mountain(generator: np.random.Generator, height: int, width: int, horizon: float) -> np.ndarray:
    """Two snowy ranges and wooded hills, each paler the farther, above a forest.  "in the mountain", main figures."""
    y, x = picture_grid(height, width)
    top, bottom = between(generator, "4c8ce0", "80b2ed"), "e0edf5"
    if generator.random() < 0.3:
        top, bottom = "6673bf", "fad1b8"  # morning
    image = paint_sky(generator, height, width, horizon, top, bottom, generator.uniform(0.2, 0.9))
    for layer, (count, summit, far) in enumerate(((4, 0.14, 0.5), (3, 0.26, 0.2), (4, 0.5, 0.0))):
        center = (np.arange(count) + generator.uniform(0.1, 0.9, count)) / count
        peak = summit + horizon - 0.55 + generator.uniform(-0.04, 0.14, count)
        slope = generator.uniform(0.75, 1.25, count) * (1.0 if layer < 2 else 0.6)
        rough = noise(generator, height, width, 9, 9, 4) - 0.5
        bent = x + 0.16 * rough
        heights = peak + slope * np.abs(x[..., None] - center)
        nearest = np.argmin(heights[0], 1)  # whose flank is seen in each column
        crest = heights[0].min(1)[None] + 0.05 * (ridge(generator, width, 12, 3) - 0.5)[None]
        side = step(-0.015, 0.015, bent - center[nearest][None] - 0.1 * (y - crest))
        light = 0.8 - 0.5 * (side - 0.15) * np.exp(-4 * np.maximum(y - crest, 0)) + 0.55 * rough
        rock = ramp(light, *(("0a1f14", "214c29", "47703d") if layer == 2 else ("293352", "5c6380", "999499")))
        if layer < 2:
            line = 0.17 - 0.05 * layer + 0.3 * rough  # how far the snow comes down
            over(rock, step(0.02, -0.02, y - crest - line), ramp(light, "99b2e0", "f7faff"))
        haze(rock, far, bottom)
        over(image, step(0, 0.006, y - crest), rock)
    treetops = 0.05 * np.abs(np.mod(x * 22, 1) - 0.5)
    edge = horizon + generator.uniform(0.24, 0.32) + 0.04 * (ridge(generator, width, 4, 2) - 0.5)[None] + treetops
    forest = ramp(noise(generator, height, width, 30, 60, 2), "05140d", "12301a", "244c21")
    return np.where((y > edge)[..., None], forest, image)


def sea(generator: np.random.Generator, height: int, width: int, horizon: float) -> np.ndarray:
    """Open water with swell, chop and foam below a high horizon.  "floating in the sea", appendix."""
    top, bottom = (between(generator, "5294e6", "99b8d1"), between(generator, "bfdef5", "ede6d9"))
    image = paint_sky(generator, height, width, horizon, top, bottom, generator.uniform(0.1, 0.9))
    rows, d, u, v = ground_grid(height, width, horizon)
    swell, chop = noise(generator, height, width, 9, 14, 2), noise(generator, height, width, 24, 30, 3)
    near = np.log(v) * -0.8  # not v: true perspective would pack far waves into noise
    wave = sample(swell, 0.25 * u, near) * 0.6 + sample(chop, 0.2 * u + 0.3, 1.2 * near) * 0.4
    light = 0.42 + 2.0 * (wave - 0.5) * np.minimum(1, 0.4 + d) + 0.25 * (1 - d) ** 2  # brighter towards the sky
    deep = between(generator, "001a47", "03294c")
    image[rows] = ramp(light, deep, "08427a", "1a709e", "66b2cc")
    over(image[rows], step(0.66, 0.74, wave) * 0.9, "f0faff")
    return image


def sand(generator: np.random.Generator, height: int, width: int, horizon: float) -> np.ndarray:
    """Four lines of rippled dunes with a lit and a shaded flank, no cloud.  "in the sand", appendix."""
    y, _ = picture_grid(height, width)
    top, bottom = between(generator, "6199d9", "d9ad8c"), "fae6bd"
    image = paint_sky(generator, height, width, horizon, top, bottom, 0.0)
    for layer in range(4):  # far to near: each lower, steeper, more rippled, less pale
        hills = (0.5 - ridge(generator, width, 2 + layer % 2, 1))[None]
        crest = horizon + 0.14 * layer + 0.3 * hills * (0.4 + 0.25 * layer)
        side = step(-0.004, 0.004, np.roll(crest, 3) - crest)
        below = np.clip(y - crest, 0, 1)
        ripple = np.sin(2 * np.pi * (below * (34 - 5 * layer) + 1.6 * noise(generator, height, width, 3, 6, 2)))
        # One flank looks to the sun, the other lies in the shade.
        light = 0.36 + 0.45 * side * np.exp(-below * 5) + 0.1 * ripple * (0.3 + 0.25 * layer)
        light = light - 0.4 * np.exp(-below * 8) * (1 - side)
        dune = ramp(light + 0.04 * layer, "8c4c1f", "d68f42", "f5c270", "ffe6a8")
        haze(dune, 0.3 - 0.1 * layer, bottom)
        image = np.where((y > crest)[..., None], dune, image)
    return image


def lavender(generator: np.random.Generator, height: int, width: int, horizon: float) -> np.ndarray:
    """Purple rows that run to hills, by day or in the evening.  "in a lavender field", appendix."""
    y, x = picture_grid(height, width)
    sky = ("6ba1ed", "d9e6fa") if generator.random() < 0.5 else ("8073bf", "fccc9e")
    image = paint_sky(generator, height, width, horizon, *sky, generator.uniform(0.1, 0.8))
    hills = horizon - 0.02 - 0.08 * ridge(generator, width, 3, 3)[None]
    over(image, (y > hills).astype(np.float32), between(generator, "4c6b5c", "6b6b8f"))
    rows, d, u, v = ground_grid(height, width, horizon)
    phase = (u + generator.uniform(-0.6, 0.6) * v) * generator.uniform(4.5, 7) * 0.55 + generator.random()
    row = 0.5 + 0.5 * np.cos(2 * np.pi * phase)
    flowers = noise(generator, height, width, 60, 90, 2)[rows]
    purple = ramp(0.55 * flowers + 0.5 * row - 0.1, "331457", "7338b2", "a86be6", "d9adfa")
    soil = ramp(flowers, "1f3314", "4c6b29")
    field = soil + step(0.16, 0.4, row + 0.25 * (flowers - 0.5))[..., None] * (purple - soil)
    over(field, step(0.22, 0.04, d) * np.ones_like(u), "8052b8")  # far rows run together, or they would alias
    image[rows] = field
    return image


def bamboo(generator: np.random.Generator, height: int, width: int, horizon: float) -> np.ndarray:
    """Jointed stems in three depths before a glow, leaves at the top.  "in bamboo forest", appendix."""
    y, x = picture_grid(height, width)
    mist = noise(generator, height, width, 5, 4, 3)
    glow = np.exp(-(((x - generator.uniform(0.3, 0.7)) / 0.35) ** 2)) * np.exp(-(((y - 0.35) / 0.5) ** 2))
    image = ramp(0.2 + 0.3 * (mist - 0.5) + 0.7 * glow, "081f0d", "1a471a", "61943d", "d6eda8")
    for count, thickness, dim in ((9, 0.012, 0.45), (5, 0.021, 0.72), (3, 0.036, 1.0)):
        for center in (np.arange(count) + generator.uniform(0.1, 0.9, count)) / count:
            tilt, half = generator.uniform(-0.05, 0.05), thickness * generator.uniform(0.8, 1.2)
            left = max(int((center - abs(tilt) - 2 * half) * width), 0)
            right = min(int((center + abs(tilt) + 2 * half) * width) + 1, width)
            across = (x[:, left:right] - center - tilt * (y - 0.5)) / half
            joint = np.mod(y / (thickness * generator.uniform(6, 9)) + generator.random(), 1)
            ring = np.maximum(step(0.06, 0.0, joint), step(0.94, 1.0, joint))  # darker and a little thicker
            light = np.clip(0.75 - 0.45 * (across + 0.25) ** 2, 0, 1) * dim + 0.15 * (joint - 0.5) * dim
            stalk = ramp(light * (1 - 0.45 * ring), "081a05", "42731f", "94bd47", "d9eb80")
            over(image[:, left:right], np.clip((1 + 0.12 * ring - np.abs(across)) * half * width + 0.5, 0, 1), stalk)
    rows, columns = np.arange(height)[:, None], np.arange(width)[None]
    leaves = noise(generator, height, width, 26, 14)[(rows + columns // 2) % height, columns]  # they hang aslant
    over(image, step(0.7, 0.76, leaves) * step(0.6, 0.1, y) * 0.8, ramp(leaves, "1a400d", "80b838"))
    return image


def nightclub(generator: np.random.Generator, height: int, width: int, horizon: float) -> np.ndarray:
    """Beams, neon tubes and their mirror image in a tiled floor.  "in neon-lit cyberpunk nightclub", appendix."""
    y, x = picture_grid(height, width)
    neon = [rgb(color) for color in NEON]
    smoke = noise(generator, height, width, 4, 4, 3)
    image = ramp(smoke * (1.15 - y), "080314", "240a42", "4c146b")
    for _ in range(generator.integers(3, 6)):  # beams fan out from the ceiling
        apex, angle = generator.random(), generator.uniform(-0.9, 0.9)
        across = np.abs(x - apex - angle * y) / (0.02 + 0.16 * y)
        image += (np.clip(1 - across, 0, 1) * np.exp(-1.6 * y) * 0.55)[..., None] * neon[generator.integers(5)]
    for _ in range(generator.integers(4, 8)):  # tubes, upright or level, in their own glow
        color, cx, cy = neon[generator.integers(5)], generator.random(), generator.uniform(0.08, horizon - 0.12)
        upright = generator.random() < 0.6
        long, wide = (generator.uniform(0.08, 0.24), 0.0) if upright else (0.0, generator.uniform(0.06, 0.2))
        off = np.hypot(np.maximum(np.abs(y - cy) - long, 0), np.maximum(np.abs(x - cx) - wide, 0))
        image += (0.55 * np.exp(-off * 22))[..., None] * color
        over(image, step(0.013, 0.006, off), 0.45 + 0.55 * color)
    first = int(horizon * height)
    mirrored = image[np.clip(2 * first - 1 - np.arange(first, height), 0, None)]
    tiles = ((np.abs(np.mod((x - 0.5) / (y[first:] - horizon + 0.12) * 0.7, 1) - 0.5) < 0.46) * 0.75 + 0.1)[..., None]
    image[first:] = (0.6 * np.roll(mirrored, 1, 1) + 0.2 * mirrored) * tiles + np.float32([0.05, 0.015, 0.1])
    return np.minimum(image, 1)


def canyon(generator: np.random.Generator, height: int, width: int, horizon: float) -> np.ndarray:
    """Four steps of layered red rock on both sides of a gap.  "in the grand canyon", appendix."""
    y, x = picture_grid(height, width)
    top = between(generator, "387ad9", "6699e0")
    image = paint_sky(generator, height, width, horizon, top, "e6e6e0", generator.uniform(0, 0.8))
    strata = noise(generator, 2 * height, 1, 34, 1, 3)[:, 0]  # the same layers run through all walls
    gap = generator.uniform(0.35, 0.65)
    for layer in range(4):
        t = layer / 3
        plateau = ridge(generator, width, 3 + layer % 2, 2) * 3.2
        mesa = (np.floor(plateau) + step(0.75, 1.0, np.mod(plateau, 1))) / 3  # flat tops, steep sides
        open_middle = np.exp(-(((x - gap) / 0.24) ** 2))
        crest = horizon - 0.12 + 0.12 * layer - 0.16 * (mesa - 0.5)[None] + t * (0.3 * open_middle - 0.16)
        crest = crest + 0.008 * (ridge(generator, width, 40, 2) - 0.5)[None]
        gully = noise(generator, height, width, 3, 9, 3)
        # Rain has cut into the walls, which bends the layers; darker and brighter from top to bottom alone, it would
        # make a tartan of them.
        wobble = 0.09 * gully + 0.1 * layer + 0.1 * (x - gap) ** 2
        band = strata[np.clip(((y + wobble) * height * 1.3).astype(int), 0, 2 * height - 1)]
        sun = 0.25 * np.exp(-np.maximum(y - crest, 0) * 14)  # on the rim
        light = 0.46 + 1.5 * (band - 0.5) + 0.5 * (gully - 0.5) + sun
        rock = ramp(light, "571f12", "a84a26", "db8047", "f7c78f")
        haze(rock, 0.45 * (1 - t), "c7adbd")
        over(image, step(0, 0.006, y - crest), rock)
    return image


def rock_garden(generator: np.random.Generator, height: int, width: int, horizon: float) -> np.ndarray:
    """Mossy stones in raked gravel before a hedge, some with a wooden kerb.  "in a japanese rock garden", appendix."""
    y, x = picture_grid(height, width)
    centers = zip(generator.uniform(0.3, 0.92, 4), (np.arange(4) + generator.uniform(0.15, 0.85, 4)) / 4, strict=True)
    rocks = [(cy, cx, generator.uniform(0.07, 0.13) * (0.4 + 0.7 * cy)) for cy, cx in centers]  # nearer is larger
    far = np.min([np.hypot((y - cy) * 1.7, x - cx) - size for cy, cx, size in rocks], axis=0)
    straight = (y + 0.04 * np.sin(4 * x + generator.random() * 6)) * generator.uniform(22, 28)
    lines = np.where(far < 0.11, far * 34, straight)  # the rake goes in rings around the stones
    rake = 0.5 + 0.5 * np.cos(2 * np.pi * lines)
    grain = noise(generator, height, width, 128, 128)
    image = ramp(0.25 + 0.42 * rake + 0.3 * grain, "807a70", "c2bdb0", "f0ede6")
    hedge = ramp(noise(generator, height, width, 50, 50, 2), "081f0a", "24521a", "618029")
    if generator.random() < 0.5:
        over(hedge, ((y > horizon - 0.05) & (y < horizon)).astype(np.float32) * np.ones_like(x), "6b472e")
    image = np.where((y < horizon)[..., None], hedge, image)
    lump = noise(generator, height, width, 16, 16, 3)
    for cy, cx, size in sorted(rocks):  # from the back to the front
        shape = np.hypot((y - cy + 0.35 * size) / (0.8 * size), (x - cx) / (1.1 * size)) + 0.5 * (lump - 0.5)
        shape = np.where(y > cy + 0.3 * size, 9, shape)  # cut off flat where it stands in the gravel
        over(image, 0.5 * np.exp(-((np.hypot((y - cy - 0.3 * size) * 2.5, x - cx - 0.2 * size) / size) ** 2)), "333333")
        light = 0.85 - 0.5 * shape + 1.0 * (lump - 0.5) - 0.25 * (y - cy) / size - 0.15 * (x - cx) / size
        stone = ramp(light, "171a1a", "525454", "9e9e99")
        over(stone, step(0.55, 0.7, lump) * (y < cy), "426624")
        over(image, step(1.0, 0.95, shape), stone)
    return image


def atlantis(generator: np.random.Generator, height: int, width: int, horizon: float) -> np.ndarray:
    """Fluted columns and domes under sunbeams and bubbles.  "in the underwater city of atlantis", appendix."""
    y, x = picture_grid(height, width)
    image = ramp(np.broadcast_to(y, (height, width)) * 1.1, "73e0e0", "148ca8", "054c73", "052e4c")
    source, rays = generator.uniform(0.2, 0.8), noise(generator, 1, 256, 1, 24, 2)[0]
    angle = np.arctan2(x - source, y + 0.35) / 1.6 + 0.5  # around a point above the picture
    image += (step(0.5, 0.8, rays[(np.clip(angle, 0, 1) * 255).astype(int)]) * np.exp(-1.8 * y) * 0.4)[..., None]
    for layer, tone in enumerate((rgb("1a758c"), rgb("08425c"))):
        for center in (np.arange(5) + generator.uniform(0.2, 0.8, 5)) / 5:
            half, top = generator.uniform(0.02, 0.032) * (1 + 0.6 * layer), generator.uniform(0.3, 0.62)
            across = (x - center) / half
            shaft = (np.abs(across) < 1) & (y > top) & (y < horizon + 0.06)
            cap = (np.abs(across) < 1.6) & (np.abs(y - top) < 0.02)
            flute = 0.75 + 0.25 * np.cos(across * 9) + 0.25 * np.sign(-across)  # grooves; the left half is lit
            over(image, (shaft | cap).astype(np.float32) * 0.9, tone * (0.7 + 0.5 * flute[..., None]) + 0.05)
        if generator.random() < 0.7:
            dome, _ = soft_disc(height, width, 0.62, generator.random(), generator.uniform(0.1, 0.17))
            over(image, dome * (y < 0.62) * 0.85, tone * 1.15)
    ground = horizon + 0.05 * (ridge(generator, width, 4, 2) - 0.5)[None]
    bed = ramp(noise(generator, height, width, 30, 8, 3) - 0.3 * (y - horizon), "0d4c5c", "4c998f", "a6d1b2")
    over(image, step(0, 0.01, y - ground), bed)
    dots(image, generator, int(generator.integers(20, 50)), 0, 1, "ccf7ff", 0.007)
    return np.minimum(image, 1)
