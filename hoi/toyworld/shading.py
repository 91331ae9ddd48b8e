"""Surfaces of the toy world.  Points and normals of visible pixels -> albedo and gloss.  Display values in [0, 1].

Deferred shading of one G-buffer.  Depth, labels, normals + materials + light -> colours of the visible pixels.

One lamp, ambient light from above and below, contact shadows and ambient occlusion from the depth picture alone, so
that fingers stay readable against each other at 128 px.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hoi.common.arrays import box_of, step
from hoi.geometry.camera import Camera
from hoi.geometry.render import GBuffer

# Albedos of the colour words, far apart on purpose; appearance.PALETTE holds what they look like once lit.
COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0.78, 0.08, 0.10),
    "orange": (0.95, 0.38, 0.03),
    "yellow": (0.94, 0.82, 0.10),
    "green": (0.10, 0.52, 0.17),
    "blue": (0.10, 0.24, 0.78),
    "purple": (0.45, 0.14, 0.61),
    "pink": (0.95, 0.47, 0.66),
    "white": (0.90, 0.90, 0.89),
    "black": (0.08, 0.08, 0.09),
    "brown": (0.38, 0.20, 0.09),
    "gray": (0.43, 0.43, 0.44),
}
# Second colour of striped things: cream, or tinted where cream would move the mean to another word.
_CREAM = (0.96, 0.93, 0.88)
_STRIPES = {
    "black": (0.42, 0.42, 0.44),
    "white": (0.70, 0.73, 0.80),
    "gray": (0.66, 0.66, 0.67),
    "brown": (0.72, 0.50, 0.28),
    "pink": (0.80, 0.22, 0.46),
    "orange": (0.98, 0.72, 0.45),
    "green": (0.56, 0.90, 0.50),
}
_SKIN = np.float32(
    [
        (0.94, 0.76, 0.66),
        (0.88, 0.67, 0.55),
        (0.80, 0.57, 0.43),
        (0.66, 0.44, 0.32),
        (0.50, 0.33, 0.23),
        (0.38, 0.25, 0.18),
    ]
)


@dataclass(frozen=True)
class Surface:
    """Per-pixel material of N pixels: albedo (N, 3); highlights, mirror share, light.

    wrap  how far lamp light reaches past the terminator, per channel;  rim  brightness added at grazing angles
    """

    albedo: np.ndarray
    specular: float | np.ndarray = 0.15
    sharpness: float = 24.0
    mirror: float | np.ndarray = 0.0
    wrap: tuple[float, float, float] = (0.3, 0.3, 0.3)
    rim: float = -0.25


def _turbulence(points: np.ndarray, frequency: float, pattern: tuple[float, ...]) -> np.ndarray:
    """Smooth solid noise (N,) in about [-1, 1]: six sine waves, directions and phases made of the pattern."""
    k = np.arange(6)
    phase = 2 * np.pi * np.mod(np.asarray(pattern)[k % len(pattern)] * (k + 1) + 0.37 * k, 1)
    directions = (
        np.stack([np.cos(2.4 * k + phase), np.sin(2.4 * k + phase), np.cos(3.1 * k + 1)], 1) * (0.7 + 0.35 * k)[:, None]
    )
    waves = np.sin(points @ (directions.T * frequency).astype(np.float32) + phase.astype(np.float32))
    return waves @ np.float32([0.3, 0.25, 0.2, 0.15, 0.1, 0.1])


def _mix(a: np.ndarray | tuple, b: np.ndarray | tuple, t: np.ndarray) -> np.ndarray:
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    return a + (b - a) * t[:, None]


def _striped(points: np.ndarray, color: str, pattern: tuple[float, ...]) -> Surface:
    """Bands around the axis, along it, or winding; about 27 % of the surface in the second colour."""
    turns = np.arctan2(points[:, 1], points[:, 0]) / (2 * np.pi)
    period = 0.024 + 0.014 * pattern[1]
    kind = int(pattern[0] * 3)
    t = (points[:, 2] / period, turns * (6 + int(pattern[1] * 4)), points[:, 2] / period + 2 * turns)[kind] + pattern[2]
    band = np.abs(np.mod(t, 1) - 0.5) * 2
    return Surface(_mix(COLORS[color], _STRIPES.get(color, _CREAM), step(0.68, 0.78, band)), 0.2, 30.0)


def _wooden(points: np.ndarray, pattern: tuple[float, ...]) -> Surface:
    bend = 0.006 * _turbulence(points, 28.0, pattern)
    radius = (
        np.hypot(
            points[:, 0] + 0.05 * (pattern[0] - 0.5) + 0.25 * points[:, 2] * (pattern[1] - 0.5), points[:, 1] + 0.08
        )
        + bend
    )
    ring = np.mod(radius / 0.011, 1)
    grain = 0.5 + 0.5 * np.sin(points[:, 0] * 900 + 700 * bend + np.sin(points[:, 1] * 800))
    t = step(0.1, 0.9, ring) * (1 - step(0.93, 1.0, ring)) * 0.8 + 0.2 * grain
    light, dark = _mix((0.80, 0.56, 0.33), (0.62, 0.37, 0.2), np.float32([pattern[3]]))[0], (0.36, 0.19, 0.09)
    return Surface(_mix(light, dark, t), 0.1, 16.0)


def _marble(points: np.ndarray, pattern: tuple[float, ...]) -> Surface:
    warp = _turbulence(points, 45.0, pattern)
    vein = np.abs(np.sin(points @ np.float32([38, 22, 50]) + 3.2 * warp + 6 * pattern[0]))
    fine = np.abs(np.sin(points @ np.float32([-60, 75, 34]) + 4.0 * warp + 6 * pattern[1]))
    dark = np.maximum(0.85 * step(0.2, 0.0, vein), 0.45 * step(0.12, 0.0, fine)) + 0.12 * (warp + 1) / 2
    return Surface(_mix((0.94, 0.93, 0.91), (0.30, 0.32, 0.37), np.minimum(dark, 1)), 0.4, 50.0, 0.08)


def _gothic(points: np.ndarray, pattern: tuple[float, ...]) -> Surface:
    """Dark iron with a tracery of gilded pointed arches."""
    turns = np.arctan2(points[:, 1], points[:, 0]) / (2 * np.pi) * 8 + pattern[0]
    u, v = np.abs(np.mod(turns, 1) - 0.5) * 2, np.mod(points[:, 2] / 0.045 + pattern[1], 1)
    arch = np.minimum(np.abs(u - np.clip(1.25 - v, 0, 1) ** 0.6), np.minimum(v, 1 - v) * 1.6)
    line = step(0.17, 0.08, arch)
    return Surface(_mix((0.13, 0.12, 0.15), (0.72, 0.55, 0.22), line), 0.25 + 0.3 * line, 30.0, 0.1 + 0.2 * line)


def _medieval(points: np.ndarray, pattern: tuple[float, ...]) -> Surface:
    """Oak staves held by iron hoops."""
    wood = _wooden(points, pattern).albedo * np.float32([0.78, 0.74, 0.72])
    turns = np.mod(np.arctan2(points[:, 1], points[:, 0]) / (2 * np.pi) * 12 + pattern[0], 1)
    wood *= 1 - 0.6 * step(0.12, 0.03, np.minimum(turns, 1 - turns))[:, None]
    hoop = step(0.30, 0.24, np.abs(np.mod(points[:, 2] / 0.05 + pattern[1], 1) - 0.5) * 2)
    return Surface(_mix(wood, (0.30, 0.31, 0.34), hoop), 0.08 + 0.45 * hoop, 22.0, 0.25 * hoop)


def object_surface(points: np.ndarray, color: str, material: str, pattern: tuple[float, ...]) -> Surface:
    """Material at points of the object.

    points    (N, 3)  metres, canonical object frame (patterns are solid, so they stay on the object in a clip)
    color     key of COLORS, "" where the material has its own
    material  key of appearance.MATERIALS
    pattern   at least four numbers in [0, 1) that place and turn the pattern
    """
    if material == "striped":
        return _striped(points, color, pattern)
    special = {"wooden": _wooden, "marble": _marble, "gothic-style": _gothic, "medieval-style": _medieval}
    if material in special:
        return special[material](points, pattern)
    base = np.float32(COLORS[color] if color else (0.60, 0.61, 0.64))
    albedo = np.broadcast_to(base, points.shape)
    if material == "metallic":
        return Surface(albedo, 0.5, 60.0, 0.85)
    return Surface(albedo, 0.7, 55.0, 0.06) if material == "glossy" else Surface(albedo, 0.12, 14.0)


def skin_surface(points: np.ndarray, tone: float, warmth: float, pattern: tuple[float, ...]) -> Surface:
    """Skin with faint blotches.  tone 0 light ... 1 dark; warmth in [-1, 1] shifts towards red."""
    position = tone * (len(_SKIN) - 1)
    base = np.stack([np.interp(position, np.arange(len(_SKIN)), channel) for channel in _SKIN.T])
    base = base * (1 + warmth * np.array([0.03, -0.02, -0.04]))
    blotch = _turbulence(points, 60.0, pattern)[:, None] * np.float32([0.015, 0.035, 0.03])
    return Surface(base.astype(np.float32) * (1 - blotch), 0.10 + 0.08 * tone, 12.0, wrap=(0.5, 0.32, 0.26), rim=0.12)


NOTHING = 10.0  # metres: depth where there is neither hand nor object
BORDER = 16  # pixels kept around the foreground's bounding box
# Brightness that a mirror sees, by height of the reflected ray (-1 down): floor, dark horizon, window, ceiling.
_CHROME = ((-1, -0.35, -0.05, 0.04, 0.3, 0.62, 1), (0.75, 0.5, 0.22, 1.45, 1.15, 0.72, 1.25))
_AROUND = ((0, 1), (0, -1), (1, 0), (-1, 0), (0.7, 0.7), (0.7, -0.7), (-0.7, 0.7), (-0.7, -0.7))


@dataclass(frozen=True)
class Light:
    """direction (3,) unit, camera frame, towards the lamp; key_strength in [0, 1]; tints (3,) of ambient light."""

    direction: np.ndarray
    key_strength: float
    exposure: float
    above: np.ndarray
    below: np.ndarray


@dataclass(frozen=True)
class VisiblePart:
    """The N visible pixels of hand (label 1) or object (2).

    rows, columns  (N,)    pixels of the whole picture
    canonical      (N, 3)  surface points, canonical object frame, metres
    normals, views (N, 3)  unit, camera frame; views point to the camera
    openness       (N,)    how much ambient light arrives;  lamp (N,) how much lamp light is not blocked
    """

    label: int
    rows: np.ndarray
    columns: np.ndarray
    canonical: np.ndarray
    normals: np.ndarray
    views: np.ndarray
    openness: np.ndarray
    lamp: np.ndarray


def visible_parts(gbuffer: GBuffer, camera: Camera, light_direction: np.ndarray) -> dict[int, VisiblePart]:
    """Everything shading needs to know about geometry, for the foreground pixels alone; label -> Part."""
    filled = gbuffer.label_map > 0
    left, top, right, bottom = box_of(filled)
    top, left = max(top - BORDER, 0), max(left - BORDER, 0)
    box = (slice(top, bottom + BORDER), slice(left, right + BORDER))
    labels, normals = gbuffer.label_map[box], gbuffer.surface_normals[box].astype(np.float32)
    depth = np.where(labels > 0, gbuffer.depth[box], NOTHING).astype(np.float32)
    (fx, _, cx), (_, fy, cy) = camera.intrinsics[:2].tolist()
    cx, cy = cx - float(left), cy - float(top)
    open_box = _openness(depth, normals, fy, camera.height)
    rotation, translation = camera.world_to_camera[:3, :3], camera.world_to_camera[:3, 3]
    parts = {}
    for label in (1, 2):
        rows, columns = np.nonzero(labels == label)
        if not len(rows):
            continue
        z = depth[rows, columns]
        points = np.stack([(columns - cx) / fx * z, (rows - cy) / fy * z, z], 1).astype(np.float32)
        views = -points / np.linalg.norm(points, axis=1, keepdims=True)
        canonical = (points - translation.astype(np.float32)) @ rotation.astype(np.float32)
        lamp = _unblocked(depth, points, light_direction, (fx, fy, cx, cy))
        openness = open_box[rows, columns]
        here = normals[rows, columns]
        parts[label] = VisiblePart(label, rows + top, columns + left, canonical, here, views, openness, lamp)
    return parts


def _openness(depth: np.ndarray, normals: np.ndarray, focal: float, height: int) -> np.ndarray:
    """How freely light reaches each pixel (H, W) in [0.2, 1.1]: contacts, gaps between fingers and creases are dark.

    Screen-space ambient occlusion at 4 and 14 mm (a neighbour nearer to the camera hides light unless it is far in
    front), plus the divergence of normals, which is negative in creases.  Source: Mittring 2007, simplified.
    """
    middle = float(np.median(depth[depth < NOTHING]))
    hidden = np.zeros_like(depth)
    for radius_m, weight in ((0.004, 0.8), (0.014, 0.9)):
        radius = max(1, round(radius_m * focal / middle))
        padded = np.pad(depth, radius, mode="edge")
        for down, right in _AROUND:
            row, column = radius + round(down * radius), radius + round(right * radius)
            rise = (depth - padded[row : row + depth.shape[0], column : column + depth.shape[1]]) * (1 / radius_m)
            hidden += (weight / 8) * np.clip(rise - 0.2, 0, 1.4) * (rise < 16)
    bend = np.zeros_like(depth)
    bend[:, 1:-1] += normals[:, 2:, 0] - normals[:, :-2, 0]
    bend[1:-1] += normals[2:, :, 1] - normals[:-2, :, 1]
    return np.clip(1 - hidden, 0.3, 1) * (1 + np.clip(0.22 * height / 256 * bend, -0.22, 0.08))


def _unblocked(depth: np.ndarray, points: np.ndarray, direction: np.ndarray, lens: tuple) -> np.ndarray:
    """Share (N,) of lamp light that nothing blocks up to 42 mm towards the lamp, by marching in the depth picture."""
    fx, fy, cx, cy = lens
    blocked = np.zeros(len(points), np.float32)
    for distance in (0.006, 0.012, 0.020, 0.030, 0.042):
        probe = points + distance * direction
        column = np.clip((probe[:, 0] / probe[:, 2] * fx + cx + 0.5).astype(np.int32), 0, depth.shape[1] - 1)
        row = np.clip((probe[:, 1] / probe[:, 2] * fy + cy + 0.5).astype(np.int32), 0, depth.shape[0] - 1)
        gap = probe[:, 2] - depth[row, column]
        blocked = np.maximum(blocked, np.clip((gap - 0.003) / 0.004, 0, 1) * (gap < 0.06) * (1.1 - 12 * distance))
    return 1 - blocked


def ambience(background: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tints (3,) of the light from above and from below: mean colours of the scenery's halves, mostly desaturated."""
    half = len(background) // 2
    tints = []
    for part in (background[:half:8, ::8], background[half::8, ::8]):
        mean = part.mean((0, 1)) + 0.15
        tints.append((0.72 + 0.28 * mean / mean.mean()).astype(np.float32))
    return tints[0], tints[1]


def lit(part: VisiblePart, surface: Surface, light: Light) -> np.ndarray:
    """Colours (N, 3) of one part, display values.

    Exposure is set by the part itself, so a named colour keeps its mean in any light: once for the light that arrives,
    once more for what highlights and the film's shoulder take away.
    """
    reflected = 2 * (part.normals * part.views).sum(1, keepdims=True) * part.normals - part.views
    irradiance = _irradiance(part, surface, light)
    if np.any(surface.mirror):
        heights = -reflected[:, 1] + 0.15 * reflected[:, 0]
        windows = np.clip(0.5 + 1.6 * np.sin(3 * np.arctan2(reflected[:, 0], -reflected[:, 2]) + 0.8), 0, 1)
        chrome = np.interp(heights, *_CHROME).astype(np.float32) * (0.35 + 0.95 * windows)
        chrome = (chrome * (0.35 + 0.65 * part.openness))[:, None]
        seen = np.where(reflected[:, 1:2] < 0, light.above, light.below)
        mirror = np.broadcast_to(np.float32(surface.mirror), heights.shape)[:, None]
        irradiance = irradiance * (1 - mirror) + mirror * chrome * seen
    irradiance *= light.exposure / max(float(irradiance.mean()), 1e-3)
    edge = (1 - np.clip((part.normals * part.views).sum(1, keepdims=True), 0, 1)) ** 3
    irradiance *= 1 + surface.rim * edge * light.above
    shine = np.clip(reflected @ light.direction, 0, 1) ** surface.sharpness * part.lamp * surface.specular
    colors = _film(surface.albedo * irradiance + shine[:, None])
    target = light.exposure * float(surface.albedo.mean(0).max())
    gain = np.float32(np.clip(target / max(float(colors.mean(0).max()), 1e-3), 0.8, 1.4))
    return _film(surface.albedo * irradiance * gain + shine[:, None])


def _irradiance(part: VisiblePart, surface: Surface, light: Light) -> np.ndarray:
    """Light (N, 3) on a dull surface: wrapped lamp light (red wraps furthest under skin) and ambient light."""
    wrap = np.float32(surface.wrap)
    lamp = np.clip(((part.normals @ light.direction)[:, None] + wrap) / (1 + wrap), 0, None)
    lamp = lamp * ((0.35 + 0.65 * part.lamp) * (0.4 + 0.6 * part.openness))[:, None]
    upward = 0.5 - 0.5 * part.normals[:, 1:2]
    ambient = (0.55 + 0.45 * upward) * (light.below + (light.above - light.below) * upward) * part.openness[:, None]
    return 1.6 * light.key_strength * lamp + 1.25 * (1 - light.key_strength) * ambient


def _film(colors: np.ndarray) -> np.ndarray:
    """A film's soft shoulder above 0.8 instead of a hard clip, so that bright things keep their form."""
    return np.where(colors > 0.8, 1 - 0.2 * np.exp((0.8 - colors) / 0.2), colors)


def drop_shadow(image: np.ndarray, mask: np.ndarray) -> None:
    """A soft dark blob below what is above a table, in place; blurred at a 32nd of the picture's height."""
    stride = max(1, len(mask) // 32)
    coarse = mask[::stride, ::stride].astype(np.float32)
    height, width = coarse.shape
    y, x = np.arange(height), np.arange(width)
    blur_y = np.exp(-0.5 * ((y[:, None] - y[None] - 0.055 * height) / (0.035 * height)) ** 2).astype(np.float32)
    blur_x = np.exp(-0.5 * ((x[:, None] - x[None] - 0.02 * width) / (0.05 * width)) ** 2).astype(np.float32)
    soft = (blur_y / blur_y.sum(1).mean()) @ coarse @ (blur_x / blur_x.sum(1).mean()).T
    spread_y, spread_x = (_stretch(size, count) for size, count in zip(image.shape[:2], coarse.shape, strict=True))
    image *= (1 - 0.55 * np.clip(spread_y @ soft @ spread_x.T, 0, 1))[..., None]


def _stretch(size: int, count: int) -> np.ndarray:
    """Matrix (size, count) of linear interpolation from count samples to size."""
    position = np.linspace(0, count - 1, size)
    return np.clip(1 - np.abs(position[:, None] - np.arange(count)[None]), 0, 1).astype(np.float32)
