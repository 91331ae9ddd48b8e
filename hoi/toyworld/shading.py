"""Materials and light of the toy world.  G-buffer + camera + light -> colours of the visible pixels.

In order: what a surface is made of (paint, metal, wood, marble, skin), which pixels show it and how much light reaches
them, and what they look like in the light of one lamp, a sky and a ground.  Patterns are solid, given by the
point in the object's own frame, so they stay on the object while it moves.  Contact shadows and ambient occlusion come
from the depth picture alone and keep fingers readable against each other at 128 px.

All of it works on display values in [0, 1], not on linear light: cheap, and a named colour keeps its mean.  Where no
reason stands beside a number it was set by eye, with two checks: the mean colour inside the object's mask is nearest to
its own word in 99 % of pictures, and metal, wood and marble are told apart at 128 px.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

from hoi.common.arrays import box_of, step
from hoi.geometry.arm import SLEEVE
from hoi.geometry.camera import Camera, project, transform_points, unproject
from hoi.geometry.render import HAND, OBJECT, GBuffer

# Albedos of the colour words, far apart on purpose; looks.PALETTE holds what they look like once lit.
COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0.78, 0.08, 0.10), "orange": (0.95, 0.38, 0.03), "yellow": (0.94, 0.82, 0.10), "green": (0.10, 0.52, 0.17),
    "blue": (0.10, 0.24, 0.78), "purple": (0.45, 0.14, 0.61), "pink": (0.95, 0.47, 0.66), "white": (0.90, 0.90, 0.89),
    "black": (0.08, 0.08, 0.09), "brown": (0.38, 0.20, 0.09), "gray": (0.43, 0.43, 0.44),
}  # fmt: skip
STEEL = (0.60, 0.61, 0.64)  # of metal without a colour word
# Second colour of striped things: cream, or tinted where cream would move the mean to another word.
CREAM = (0.96, 0.93, 0.88)
CHARCOAL = (0.20, 0.20, 0.23)
STRIPES = {
    "black": (0.42, 0.42, 0.44), "white": (0.70, 0.73, 0.80), "gray": (0.66, 0.66, 0.67), "brown": (0.72, 0.50, 0.28),
    "pink": (0.80, 0.22, 0.46), "orange": (0.98, 0.72, 0.45), "green": (0.56, 0.90, 0.50),
}  # fmt: skip
# Six tones from light to dark; tones between them are mixed.
SKIN = np.float32([(0.94, 0.76, 0.66), (0.88, 0.67, 0.55), (0.80, 0.57, 0.43),
                   (0.66, 0.44, 0.32), (0.50, 0.33, 0.23), (0.38, 0.25, 0.18)])  # fmt: skip
# Quiet colours, which no word names: white, navy, grey, sand, bottle green, black.
SLEEVES = ((0.86, 0.86, 0.85), (0.13, 0.17, 0.30), (0.48, 0.49, 0.52),
           (0.62, 0.55, 0.45), (0.16, 0.27, 0.22), (0.10, 0.10, 0.11))  # fmt: skip
# Brightness that a mirror sees, by height of the reflected ray (-1 down): floor, dark horizon, window, ceiling.  The
# sharp step at the horizon is what reads as metal; a smooth sky would look like grey paint.
CHROME = ((-1, -0.35, -0.05, 0.04, 0.3, 0.62, 1), (0.75, 0.5, 0.22, 1.45, 1.15, 0.72, 1.25))

NOTHING = 10.0  # metres: depth where there is neither hand nor object, farther than any scene
BORDER = 16  # pixels kept around the foreground's bounding box: as far as occlusion looks at 512 px
AROUND = ((0, 1), (0, -1), (1, 0), (-1, 0), (0.7, 0.7), (0.7, -0.7), (-0.7, 0.7), (-0.7, -0.7))  # on a unit circle
OCCLUSION = ((0.004, 0.8), (0.014, 0.9))  # radius in metres and weight: creases between fingers; a finger's thickness
SHADOW_STEPS = (0.006, 0.012, 0.020, 0.030, 0.042)  # metres towards the lamp: up to two fingers


@dataclass(frozen=True)
class Surface:
    """Per-pixel material of N pixels; single numbers hold for all of them.

    albedo     (N, 3)  share of the light that a dull surface gives back, display values
    specular   strength of the lamp's highlight;  sharpness  its exponent (Phong's): larger is smaller
    mirror     share of the light that is a mirror image of the room
    wrap       how far lamp light reaches past the terminator, per channel
    rim        brightness added at grazing angles; below 0 it darkens outlines, which sets things off
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
    # Steps of 2.4 radians, about the golden angle, so that no two waves run along each other; later ones are finer.
    directions = np.stack([np.cos(2.4 * k + phase), np.sin(2.4 * k + phase), np.cos(3.1 * k + 1)], 1)
    directions = directions * (0.7 + 0.35 * k)[:, None]
    waves = np.sin(points @ (directions.T * frequency).astype(np.float32) + phase.astype(np.float32))
    return waves @ np.float32([0.3, 0.25, 0.2, 0.15, 0.1, 0.1])


def _mix(a: np.ndarray | tuple, b: np.ndarray | tuple, t: np.ndarray) -> np.ndarray:
    """From colour a to colour b (3,) or (N, 3) by t (N,)."""
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    return a + (b - a) * t[:, None]


def _turns(points: np.ndarray) -> np.ndarray:
    """Angle (N,) around the object's axis, which is z, in turns."""
    return np.arctan2(points[:, 1], points[:, 0]) / (2 * np.pi)


def _striped(points: np.ndarray, color: str, pattern: tuple[float, ...]) -> Surface:
    """Bands around the axis, along it, or winding; about 27 % of the surface in the second colour."""
    turns, period = _turns(points), 0.024 + 0.014 * pattern[1]  # metres: three to four bands on a mug
    kind = int(pattern[0] * 3)
    t = (points[:, 2] / period, turns * (6 + int(pattern[1] * 4)), points[:, 2] / period + 2 * turns)[kind] + pattern[2]
    band = np.abs(np.mod(t, 1) - 0.5) * 2
    if not color:  # half charcoal, half cream
        return Surface(_mix(CHARCOAL, CREAM, step(0.45, 0.55, band)), 0.2, 30.0)
    return Surface(_mix(COLORS[color], STRIPES.get(color, CREAM), step(0.68, 0.78, band)), 0.2, 30.0)


def _wooden(points: np.ndarray, pattern: tuple[float, ...]) -> Surface:
    """Turned wood: rings 11 mm apart around a core outside the object, slightly bent and tilted, with fine grain."""
    bend = 0.006 * _turbulence(points, 28.0, pattern)
    across = points[:, 0] + 0.05 * (pattern[0] - 0.5) + 0.25 * points[:, 2] * (pattern[1] - 0.5)
    radius = np.hypot(across, points[:, 1] + 0.08) + bend
    ring = np.mod(radius / 0.011, 1)
    grain = 0.5 + 0.5 * np.sin(points[:, 0] * 900 + 700 * bend + np.sin(points[:, 1] * 800))
    t = step(0.1, 0.9, ring) * (1 - step(0.93, 1.0, ring)) * 0.8 + 0.2 * grain  # slowly dark, quickly light again
    light, dark = _mix((0.80, 0.56, 0.33), (0.62, 0.37, 0.2), np.float32([pattern[3]]))[0], (0.36, 0.19, 0.09)
    return Surface(_mix(light, dark, t), 0.1, 16.0)


def _marble(points: np.ndarray, color: str, pattern: tuple[float, ...]) -> Surface:
    """White or coloured stone with wide and fine veins: zero lines of two plane waves, bent by noise."""
    warp = _turbulence(points, 45.0, pattern)
    vein = np.abs(np.sin(points @ np.float32([38, 22, 50]) + 3.2 * warp + 6 * pattern[0]))
    fine = np.abs(np.sin(points @ np.float32([-60, 75, 34]) + 4.0 * warp + 6 * pattern[1]))
    share = np.maximum(0.85 * step(0.2, 0.0, vein), 0.45 * step(0.12, 0.0, fine)) + 0.12 * (warp + 1) / 2
    stone = np.float32(COLORS[color] if color else (0.94, 0.93, 0.91))
    veins = np.float32((0.30, 0.32, 0.37))
    if stone.mean() < 0.55:  # grey would not show: the stone's own hue, nearly white
        veins = stone + 0.75 * (1 - stone)
    return Surface(_mix(stone, veins, np.minimum(share, 1)), 0.4, 50.0, 0.08)


def _gothic(points: np.ndarray, pattern: tuple[float, ...]) -> Surface:
    """Dark iron with a tracery of gilded pointed arches, eight around and one each 45 mm."""
    turns = _turns(points) * 8 + pattern[0]
    u, v = np.abs(np.mod(turns, 1) - 0.5) * 2, np.mod(points[:, 2] / 0.045 + pattern[1], 1)
    arch = np.minimum(np.abs(u - np.clip(1.25 - v, 0, 1) ** 0.6), np.minimum(v, 1 - v) * 1.6)
    line = step(0.17, 0.08, arch)
    return Surface(_mix((0.13, 0.12, 0.15), (0.72, 0.55, 0.22), line), 0.25 + 0.3 * line, 30.0, 0.1 + 0.2 * line)


def _medieval(points: np.ndarray, pattern: tuple[float, ...]) -> Surface:
    """Twelve oak staves held by iron hoops each 50 mm."""
    wood = _wooden(points, pattern).albedo * np.float32([0.78, 0.74, 0.72])  # darker and greyer than new wood
    turns = np.mod(_turns(points) * 12 + pattern[0], 1)
    wood *= 1 - 0.6 * step(0.12, 0.03, np.minimum(turns, 1 - turns))[:, None]
    hoop = step(0.30, 0.24, np.abs(np.mod(points[:, 2] / 0.05 + pattern[1], 1) - 0.5) * 2)
    return Surface(_mix(wood, (0.30, 0.31, 0.34), hoop), 0.08 + 0.45 * hoop, 22.0, 0.25 * hoop)


def object_surface(points: np.ndarray, color: str, material: str, pattern: tuple[float, ...]) -> Surface:
    """Material at points of the object.

    points    (N, 3)  metres, canonical object frame
    color     key of COLORS, "" where the material has its own
    material  key of looks.MATERIALS
    pattern   at least four numbers in [0, 1) that place and turn the pattern
    """
    if material in (colored := {"striped": _striped, "marble": _marble}):
        return colored[material](points, color, pattern)
    if material in (special := {"wooden": _wooden, "gothic-style": _gothic, "medieval-style": _medieval}):
        return special[material](points, pattern)
    albedo = np.broadcast_to(np.float32(COLORS[color] if color else STEEL), points.shape)
    if material == "metallic":
        return Surface(albedo, 0.5, 60.0, 0.85)
    return Surface(albedo, 0.7, 55.0, 0.06) if material == "glossy" else Surface(albedo, 0.12, 14.0)


def skin_surface(points: np.ndarray, tone: float, warmth: float, pattern: tuple[float, ...]) -> Surface:
    """Skin with faint blotches.

    points   (N, 3)  metres, canonical object frame
    tone     0 light ... 1 dark;  warmth in [-1, 1] shifts towards red
    pattern  as in object_surface
    """
    position = tone * (len(SKIN) - 1)
    base = np.stack([np.interp(position, np.arange(len(SKIN)), channel) for channel in SKIN.T])
    base = base * (1 + warmth * np.array([0.03, -0.02, -0.04]))
    blotch = _turbulence(points, 60.0, pattern)[:, None] * np.float32([0.015, 0.035, 0.03])  # blood: red varies least
    # Light goes through skin, red the farthest: it wraps past the terminator and lights the rim from behind.
    return Surface(base.astype(np.float32) * (1 - blotch), 0.10 + 0.08 * tone, 12.0, wrap=(0.5, 0.32, 0.26), rim=0.12)


def sleeve_surface(points: np.ndarray, pattern: tuple[float, ...]) -> Surface:
    """Plain cloth, woven and creased; arguments as in object_surface."""
    color = np.float32(SLEEVES[int(pattern[4] * len(SLEEVES))])
    crease = _turbulence(points, 90.0, pattern)[:, None]
    return Surface(color * (1 + 0.10 * crease), 0.05, 10.0)


@dataclass(frozen=True)
class Light:
    """The light of one picture.

    direction     (3,) unit, camera frame, towards the lamp
    key_strength  share of the lamp in the light, in [0, 1]; the rest is ambient
    exposure      mean brightness of a lit part relative to its albedo
    above, below  (3,)  tints of ambient light from the sky and from the ground
    """

    direction: np.ndarray
    key_strength: float
    exposure: float
    above: np.ndarray
    below: np.ndarray


def ambience(background: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tints (3,) of the light from above and from below: mean colours of the scenery's halves, mostly desaturated.

    background  (H, W, 3) float32 in [0, 1]
    """
    half = len(background) // 2
    halves = background[:half:8, ::8], background[half::8, ::8]  # every 64th pixel is enough for a mean
    above, below = (part.mean((0, 1)) + 0.15 for part in halves)  # or night scenery would tint by what little it has
    # 28 % of the hue: more, and a white mug on the grass is measured as a green one.
    return tuple((0.72 + 0.28 * mean / mean.mean()).astype(np.float32) for mean in (above, below))


@dataclass(frozen=True)
class VisiblePart:
    """The N visible pixels of hand, object or sleeve.

    rows, columns  (N,)    pixels of the whole picture
    canonical      (N, 3)  surface points, canonical object frame, metres
    normals, views (N, 3)  unit, camera frame; views point to the camera
    openness       (N,)    how much ambient light arrives;  lamp (N,) how much lamp light is not blocked
    """

    rows: np.ndarray
    columns: np.ndarray
    canonical: np.ndarray
    normals: np.ndarray
    views: np.ndarray
    openness: np.ndarray
    lamp: np.ndarray


def visible_parts(gbuffer: GBuffer, camera: Camera, light_direction: np.ndarray) -> dict[int, VisiblePart]:
    """Everything shading needs to know about geometry, for the foreground pixels alone.

    light_direction  (3,) unit, camera frame, towards the lamp
    returns          HAND, OBJECT and SLEEVE, as far as they are seen -> VisiblePart
    """
    filled = gbuffer.label_map > 0
    left, top, right, bottom = box_of(filled)
    top, left = max(top - BORDER, 0), max(left - BORDER, 0)
    box = (slice(top, bottom + BORDER), slice(left, right + BORDER))
    labels, normals = gbuffer.label_map[box], gbuffer.surface_normals[box].astype(np.float32)
    depth = np.where(labels > 0, gbuffer.depth[box], NOTHING).astype(np.float32)
    (fx, _, cx), (_, fy, cy) = camera.intrinsics[:2].tolist()
    cx, cy = cx - float(left), cy - float(top)  # of the box
    openness = _openness(depth, normals, fy, camera.height)
    rotation, translation = camera.world_to_camera[:3, :3], camera.world_to_camera[:3, 3]
    parts = {}
    for label in (HAND, OBJECT, SLEEVE):
        rows, columns = np.nonzero(labels == label)
        if not len(rows):
            continue
        z = depth[rows, columns]
        points = np.stack([(columns - cx) / fx * z, (rows - cy) / fy * z, z], 1).astype(np.float32)
        parts[label] = VisiblePart(
            rows + top, columns + left,
            canonical=(points - translation.astype(np.float32)) @ rotation.astype(np.float32),
            normals=normals[rows, columns], openness=openness[rows, columns],
            views=-points / np.linalg.norm(points, axis=1, keepdims=True),
            lamp=_unblocked(depth, points, light_direction, (fx, fy, cx, cy)),
        )  # fmt: skip
    return parts


def _openness(depth: np.ndarray, normals: np.ndarray, focal: float, height: int) -> np.ndarray:
    """How freely light reaches each pixel (H, W) in [0.2, 1.1]: contacts, gaps between fingers and creases are dark.

    Screen-space ambient occlusion (a neighbour nearer to the camera hides light unless it is far in front), plus the
    divergence of normals, which is negative in creases.  Source: Mittring 2007, simplified.
    """
    middle = float(np.median(depth[depth < NOTHING]))
    hidden = np.zeros_like(depth)
    for radius_m, weight in OCCLUSION:
        radius = max(1, round(radius_m * focal / middle))
        padded = np.pad(depth, radius, mode="edge")
        for down, right in AROUND:
            row, column = radius + round(down * radius), radius + round(right * radius)
            rise = (depth - padded[row : row + depth.shape[0], column : column + depth.shape[1]]) * (1 / radius_m)
            # A slope of 0.2 is curvature, not occlusion; beyond 16 radii it is something else, far in front.
            hidden += (weight / 8) * np.clip(rise - 0.2, 0, 1.4) * (rise < 16)
    bend = np.zeros_like(depth)
    bend[:, 1:-1] += normals[:, 2:, 0] - normals[:, :-2, 0]
    bend[1:-1] += normals[2:, :, 1] - normals[:-2, :, 1]
    # Normals turn less from pixel to pixel in a larger picture: the same crease is as dark at every size.
    return np.clip(1 - hidden, 0.3, 1) * (1 + np.clip(0.22 * height / 256 * bend, -0.22, 0.08))


def _unblocked(depth: np.ndarray, points: np.ndarray, direction: np.ndarray, lens: tuple) -> np.ndarray:
    """Share (N,) of lamp light that nothing blocks up to 42 mm towards the lamp, by marching in the depth picture."""
    fx, fy, cx, cy = lens
    blocked = np.zeros(len(points), np.float32)
    for distance in SHADOW_STEPS:
        probe = points + distance * direction
        column = np.clip((probe[:, 0] / probe[:, 2] * fx + cx + 0.5).astype(np.int32), 0, depth.shape[1] - 1)
        row = np.clip((probe[:, 1] / probe[:, 2] * fy + cy + 0.5).astype(np.int32), 0, depth.shape[0] - 1)
        gap = probe[:, 2] - depth[row, column]
        # 3 mm: the surface itself; 60 mm: light passes behind what stands so far in front.  Far blockers shade softly.
        blocked = np.maximum(blocked, np.clip((gap - 0.003) / 0.004, 0, 1) * (gap < 0.06) * (1.1 - 12 * distance))
    return 1 - blocked


def lit(part: VisiblePart, surface: Surface, light: Light) -> np.ndarray:
    """Colours (N, 3) of one part, display values.

    Exposure is set by the part itself, so a named colour keeps its mean in any light: once for the light that arrives,
    once more for what highlights and the film's shoulder take away.
    """
    facing = (part.normals * part.views).sum(1, keepdims=True)  # cosine
    reflected = 2 * facing * part.normals - part.views
    irradiance = _irradiance(part, surface, light)
    if np.any(surface.mirror):
        mirror = np.broadcast_to(np.float32(surface.mirror), len(reflected))[:, None]
        irradiance = irradiance * (1 - mirror) + _mirrored(part, mirror, reflected, light)
    irradiance *= light.exposure / max(float(irradiance.mean()), 1e-3)
    edge = (1 - np.clip(facing, 0, 1)) ** 3
    irradiance *= 1 + surface.rim * edge * light.above
    shine = np.clip(reflected @ light.direction, 0, 1) ** surface.sharpness * part.lamp * surface.specular
    colors = _film(surface.albedo * irradiance + shine[:, None])
    target = light.exposure * float(surface.albedo.mean(0).max())
    # Within limits: a metal's mean should rise over its paint's a little, and a dark thing not be lit to grey.
    gain = np.float32(np.clip(target / max(float(colors.mean(0).max()), 1e-3), 0.8, 1.4))
    return _film(surface.albedo * irradiance * gain + shine[:, None])


def _irradiance(part: VisiblePart, surface: Surface, light: Light) -> np.ndarray:
    """Light (N, 3) on a dull surface: wrapped lamp light (red wraps furthest under skin) and ambient light."""
    wrap = np.float32(surface.wrap)
    lamp = np.clip(((part.normals @ light.direction)[:, None] + wrap) / (1 + wrap), 0, None)
    # A third of the lamp arrives in shadow, too, and 40 % in the deepest gap: light from the rest of the room.
    lamp = lamp * ((0.35 + 0.65 * part.lamp) * (0.4 + 0.6 * part.openness))[:, None]
    upward = 0.5 - 0.5 * part.normals[:, 1:2]  # y points down
    ambient = (0.55 + 0.45 * upward) * (light.below + (light.above - light.below) * upward) * part.openness[:, None]
    return 1.6 * light.key_strength * lamp + 1.25 * (1 - light.key_strength) * ambient


def _mirrored(part: VisiblePart, mirror: np.ndarray, reflected: np.ndarray, light: Light) -> np.ndarray:
    """Light (N, 3) of a room with a bright band of windows, tinted by the place.

    mirror (N, 1) share that is mirrored;  reflected (N, 3) directions, camera frame
    """
    heights = -reflected[:, 1] + 0.15 * reflected[:, 0]  # the band is tilted a little, as by a camera's roll
    windows = np.clip(0.5 + 1.6 * np.sin(3 * np.arctan2(reflected[:, 0], -reflected[:, 2]) + 0.8), 0, 1)  # three
    chrome = np.interp(heights, *CHROME).astype(np.float32) * (0.35 + 0.95 * windows)
    chrome = (chrome * (0.35 + 0.65 * part.openness))[:, None]
    return mirror * chrome * np.where(reflected[:, 1:2] < 0, light.above, light.below)


def _film(colors: np.ndarray) -> np.ndarray:
    """A film's soft shoulder above 0.8 instead of cutting at 1, so that bright things keep their form."""
    return np.where(colors > 0.8, 1 - 0.2 * np.exp((0.8 - colors) / 0.2), colors)


def drop_shadow(image: np.ndarray, mask: np.ndarray, horizon: float) -> None:
    """A soft dark blob below what is above the ground, in place; blurred at a 32nd of the picture's height.

    image (H, W, 3) in [0, 1]; mask (H, W) bool, the foreground; horizon: share of the picture where the ground begins
    """
    stride = max(1, len(mask) // 32)
    coarse = mask[::stride, ::stride].astype(np.float32)
    # Moved down by 5.5 % of the picture and a little aside, and wider than high, as under a lamp above.
    blur_y, blur_x = _blur(coarse.shape[0], 0.055, 0.035), _blur(coarse.shape[1], 0.02, 0.05)
    spread_y, spread_x = (_stretch(size, count) for size, count in zip(image.shape[:2], coarse.shape, strict=True))
    soft = spread_y @ (blur_y @ coarse @ blur_x.T) @ spread_x.T
    rows = (np.arange(len(mask)) + 0.5) / len(mask)
    ground = step(horizon - 0.02, horizon + 0.1, rows) if horizon > 0 else np.ones(1)
    image *= (1 - 0.6 * np.clip(soft, 0, 1) * ground[:, None])[..., None]  # the sky takes no shadow


def fall_on_plane(image: np.ndarray, gbuffer: GBuffer, camera: Camera, direction: np.ndarray, height: float) -> None:
    """The shadow of what is seen on a level plane, in place, soft as drop_shadow's.

    direction (3,) unit, camera frame, towards the lamp; height of the plane, metres along z of the camera's world
    """
    rows, columns = np.nonzero(gbuffer.label_map > 0)
    points = unproject(columns, rows, gbuffer.depth[rows, columns], camera.intrinsics)
    points = transform_points(np.linalg.inv(camera.world_to_camera), points)
    towards = camera.world_to_camera[:3, :3].T @ direction
    towards = np.append(towards[:2] / max(towards[2], 0.3), 1.0)  # lower than 17 degrees it would leave the picture
    on_plane = points - np.maximum(points[:, 2:] - height, 0) * towards
    pixels = project(transform_points(camera.world_to_camera, on_plane), camera.intrinsics)
    inside = ((pixels > -0.5) & (pixels < np.array(image.shape[1::-1]) - 0.5)).all(axis=1)
    column, row = np.rint(pixels[inside]).astype(int).T
    shadow = np.zeros(image.shape[:2], np.uint8)
    shadow[row, column] = 255
    soft = Image.fromarray(shadow).filter(ImageFilter.MaxFilter(5)).filter(ImageFilter.GaussianBlur(len(image) / 128))
    image *= (1 - 0.6 / 255 * np.asarray(soft, np.float32))[..., None]


def _blur(count: int, shift: float, spread: float) -> np.ndarray:
    """Matrix (count, count) that moves and blurs samples by shares of their number."""
    k = np.arange(count)
    matrix = np.exp(-0.5 * ((k[:, None] - k[None] - shift * count) / (spread * count)) ** 2).astype(np.float32)
    return matrix / matrix.sum(1).mean()


def _stretch(size: int, count: int) -> np.ndarray:
    """Matrix (size, count) of linear interpolation from count samples to size."""
    position = np.linspace(0, count - 1, size)
    return np.clip(1 - np.abs(position[:, None] - np.arange(count)[None]), 0, 1).astype(np.float32)
