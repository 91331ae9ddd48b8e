"""Surfaces of the toy world.  Points and normals of visible pixels -> albedo and gloss.  Display values in [0, 1]."""

from dataclasses import dataclass

import numpy as np

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


def _step(low: float, high: float, x: np.ndarray) -> np.ndarray:
    t = np.clip((x - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


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
    return Surface(_mix(COLORS[color], _STRIPES.get(color, _CREAM), _step(0.68, 0.78, band)), 0.2, 30.0)


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
    t = _step(0.1, 0.9, ring) * (1 - _step(0.93, 1.0, ring)) * 0.8 + 0.2 * grain
    light, dark = _mix((0.80, 0.56, 0.33), (0.62, 0.37, 0.2), np.float32([pattern[3]]))[0], (0.36, 0.19, 0.09)
    return Surface(_mix(light, dark, t), 0.1, 16.0)


def _marble(points: np.ndarray, pattern: tuple[float, ...]) -> Surface:
    warp = _turbulence(points, 45.0, pattern)
    vein = np.abs(np.sin(points @ np.float32([38, 22, 50]) + 3.2 * warp + 6 * pattern[0]))
    fine = np.abs(np.sin(points @ np.float32([-60, 75, 34]) + 4.0 * warp + 6 * pattern[1]))
    dark = np.maximum(0.85 * _step(0.2, 0.0, vein), 0.45 * _step(0.12, 0.0, fine)) + 0.12 * (warp + 1) / 2
    return Surface(_mix((0.94, 0.93, 0.91), (0.30, 0.32, 0.37), np.minimum(dark, 1)), 0.4, 50.0, 0.08)


def _gothic(points: np.ndarray, pattern: tuple[float, ...]) -> Surface:
    """Dark iron with a tracery of gilded pointed arches."""
    turns = np.arctan2(points[:, 1], points[:, 0]) / (2 * np.pi) * 8 + pattern[0]
    u, v = np.abs(np.mod(turns, 1) - 0.5) * 2, np.mod(points[:, 2] / 0.045 + pattern[1], 1)
    arch = np.minimum(np.abs(u - np.clip(1.25 - v, 0, 1) ** 0.6), np.minimum(v, 1 - v) * 1.6)
    line = _step(0.17, 0.08, arch)
    return Surface(_mix((0.13, 0.12, 0.15), (0.72, 0.55, 0.22), line), 0.25 + 0.3 * line, 30.0, 0.1 + 0.2 * line)


def _medieval(points: np.ndarray, pattern: tuple[float, ...]) -> Surface:
    """Oak staves held by iron hoops."""
    wood = _wooden(points, pattern).albedo * np.float32([0.78, 0.74, 0.72])
    turns = np.mod(np.arctan2(points[:, 1], points[:, 0]) / (2 * np.pi) * 12 + pattern[0], 1)
    wood *= 1 - 0.6 * _step(0.12, 0.03, np.minimum(turns, 1 - turns))[:, None]
    hoop = _step(0.30, 0.24, np.abs(np.mod(points[:, 2] / 0.05 + pattern[1], 1) - 0.5) * 2)
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
