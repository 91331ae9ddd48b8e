"""The toy world's looks: deferred shading of one G-buffer.  GBuffer + Camera + Look -> picture (H, W, 3) uint8, and its caption.

Geometry is rendered once and shaded many times: materials, light and scenery cost a few milliseconds each.  The looks and phrases are
those of the paper's figures (Sec. 4 and appendix).  Shading works on display values; that is cheap and keeps a named colour's mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hoi.backgrounds import BACKGROUNDS, paint_background
from hoi.camera import Camera
from hoi.materials import COLORS, Surface, object_surface, skin_surface
from hoi.words import caption_words, words_in

if TYPE_CHECKING:
    from hoi.render import GBuffer

__all__ = [
    "BACKGROUNDS",
    "COLORS",
    "MATERIALS",
    "PALETTE",
    "Look",
    "caption",
    "nearest_color",
    "paint_background",
    "reduce_image",
    "sample_look",
    "shade",
    "words_in",
]

# Mean colours inside the object mask, measured on 1100 shaded pictures: light, highlights and film move them from the albedo.
PALETTE: dict[str, tuple[float, float, float]] = {
    "red": (0.75, 0.13, 0.15),
    "orange": (0.83, 0.52, 0.10),
    "yellow": (0.83, 0.79, 0.18),
    "green": (0.13, 0.54, 0.20),
    "blue": (0.15, 0.30, 0.75),
    "purple": (0.48, 0.18, 0.62),
    "pink": (0.83, 0.55, 0.70),
    "white": (0.79, 0.79, 0.79),
    "black": (0.11, 0.11, 0.12),
    "brown": (0.40, 0.23, 0.12),
    "gray": (0.44, 0.44, 0.45),
}

# name -> (caption word, share of the looks, share of these that also has a colour word)
MATERIALS: dict[str, tuple[str, float, float]] = {
    "plain": ("", 0.34, 1.0),
    "glossy": ("", 0.22, 1.0),
    "metallic": ("metallic", 0.13, 0.6),
    "striped": ("striped", 0.1, 1.0),
    "wooden": ("wooden", 0.08, 0.0),
    "marble": ("marble", 0.07, 0.0),
    "gothic-style": ("gothic-style", 0.03, 0.0),
    "medieval-style": ("medieval-style", 0.03, 0.0),
}
_CHROME = (np.float32([-1, -0.35, -0.05, 0.04, 0.3, 0.62, 1]), np.float32([0.75, 0.5, 0.22, 1.45, 1.15, 0.72, 1.25]))


@dataclass(frozen=True)
class Look:
    """Everything about a picture that is not geometry; plain values, so it can be written into a record.

    object_color     key of COLORS, "" where the material has its own
    material         key of MATERIALS
    background       key of BACKGROUNDS
    skin_tone        0 light ... 1 dark;  skin_warmth in [-1, 1]
    light_direction  (3,) unit, camera frame, points to the lamp (y < 0: above)
    key_strength     share of the lamp in the light, the rest is sky and ground
    exposure         mean brightness of the lit object relative to its colour
    pattern          numbers in [0, 1) that place stripes, grain and veins
    """

    object_color: str
    material: str
    background: str
    skin_tone: float
    skin_warmth: float
    light_direction: tuple[float, float, float]
    key_strength: float
    exposure: float
    pattern: tuple[float, ...]


def sample_look(generator: np.random.Generator, style: str = "any") -> Look:
    """Draw a look.

    style  "any": all scenery and materials; "lab": laboratory backgrounds and soft light (the paper's real recordings);
           "scenic": everything but the laboratory
    """
    if style not in ("any", "lab", "scenic"):
        raise ValueError(f"style {style!r} is unknown; choose any, lab or scenic")
    lab = style == "lab" or (style == "any" and generator.random() < 0.2)
    names = [name for name, background in BACKGROUNDS.items() if background.lab == lab]
    shares = np.array([share for _, share, _ in MATERIALS.values()])
    material = list(MATERIALS)[generator.choice(len(MATERIALS), p=shares / shares.sum())]
    colored = generator.random() < MATERIALS[material][2]
    azimuth, height = generator.uniform(-1.9, 1.9), generator.uniform(0.35, 1.1)
    light = np.array([np.sin(azimuth) * np.cos(height), -np.sin(height), -np.cos(azimuth) * np.cos(height)])
    return Look(
        object_color=list(COLORS)[generator.integers(len(COLORS))] if colored else "",
        material=material,
        background=names[generator.integers(len(names))],
        skin_tone=float(generator.beta(1.1, 1.5)),
        skin_warmth=float(generator.uniform(-1, 1)),
        light_direction=tuple(float(v) for v in light),
        key_strength=float(generator.uniform(0.35, 0.5) if lab else generator.uniform(0.45, 0.7)),
        exposure=float(generator.uniform(0.94, 1.06)),
        pattern=tuple(float(v) for v in generator.random(6)),
    )


def caption(
    look: Look,
    category: str | None,
    has_hand: bool,
    generator: np.random.Generator | None = None,
    with_adjectives: bool = True,
    with_background: bool = True,
) -> str:
    """The sentence for a picture of this look.

    category   any noun; None gives a sentence about the scenery alone, or about a hand alone when has_hand
    generator  None gives the paper's template, otherwise paraphrases are mixed in
    """
    if category is None and has_hand:
        category, has_hand, with_adjectives = "hand", False, False
    color, material = (look.object_color, MATERIALS[look.material][0]) if with_adjectives else ("", "")
    background = look.background if with_background or category is None else ""
    return caption_words(color, material, background, category, has_hand, generator)


def nearest_color(color: np.ndarray) -> str:
    """Word of the palette colour nearest to a mean colour (3,) in [0, 1]."""
    return min(PALETTE, key=lambda name: float(np.sum((np.asarray(color) - PALETTE[name]) ** 2)))


def reduce_image(image: np.ndarray, factor: int) -> np.ndarray:
    """Area-average a picture (H, W, ...) by a whole factor; keeps the dtype.  Raises ValueError when it does not divide."""
    height, width = image.shape[:2]
    if height % factor or width % factor:
        raise ValueError(f"picture of {height} x {width} cannot be reduced {factor} times; choose a divisor of both")
    mean = image.reshape(height // factor, factor, width // factor, factor, *image.shape[2:]).mean(
        (1, 3), dtype=np.float32
    )
    return (mean + 0.5).astype(np.uint8) if image.dtype == np.uint8 else mean.astype(image.dtype)


# --- light ------------------------------------------------------------------------------------------------------------------------


def _shifted(array: np.ndarray, down: int, right: int) -> np.ndarray:
    """array[y + down, x + right] with the border repeated."""
    height, width = array.shape[:2]
    rows, columns = np.clip(np.arange(height) + down, 0, height - 1), np.clip(np.arange(width) + right, 0, width - 1)
    return array[rows][:, columns]


def _openness(depth: np.ndarray, normals: np.ndarray, focal: float) -> np.ndarray:
    """How freely light reaches each pixel (H, W) in [0.3, 1.1]: contacts, gaps between fingers and creases are dark.

    Screen-space ambient occlusion at 4 and 14 mm (a neighbour nearer to the camera hides light unless it is far in front),
    plus the divergence of normals, which is negative in creases.
    """
    middle = float(np.median(depth[depth < 9])) if (depth < 9).any() else 1.0
    hidden = np.zeros_like(depth)
    for radius_m, weight in ((0.004, 0.5), (0.014, 0.5)):
        radius = max(1, int(round(radius_m * focal / middle)))
        side = max(1, int(round(0.7 * radius)))
        for down, right in (
            (0, radius),
            (0, -radius),
            (radius, 0),
            (-radius, 0),
            (side, side),
            (side, -side),
            (-side, side),
            (-side, -side),
        ):
            rise = (depth - _shifted(depth, down, right)) * (1 / radius_m)
            hidden += (weight / 8) * np.clip(rise - 0.35, 0, 1.4) * (rise < 16)
    bend = (_shifted(normals[..., 0], 0, 1) - _shifted(normals[..., 0], 0, -1)) + (
        _shifted(normals[..., 1], 1, 0) - _shifted(normals[..., 1], -1, 0)
    )
    return np.clip(1 - 1.0 * hidden, 0.3, 1) * (1 + np.clip(0.22 * bend, -0.22, 0.08))


def _shadow(
    depth: np.ndarray, rows: np.ndarray, columns: np.ndarray, points: np.ndarray, light: np.ndarray, camera_row: tuple
) -> np.ndarray:
    """Share of lamp light (N,) that nothing between 5 and 40 mm towards the lamp blocks, by marching in the depth picture."""
    fx, fy, cx, cy = camera_row
    blocked = np.zeros(len(points), np.float32)
    for distance in (0.006, 0.012, 0.020, 0.030, 0.042):
        probe = points + distance * light
        column = np.clip((probe[:, 0] / probe[:, 2] * fx + cx + 0.5).astype(np.int32), 0, depth.shape[1] - 1)
        row = np.clip((probe[:, 1] / probe[:, 2] * fy + cy + 0.5).astype(np.int32), 0, depth.shape[0] - 1)
        gap = probe[:, 2] - depth[row, column]
        blocked = np.maximum(blocked, np.clip((gap - 0.003) / 0.004, 0, 1) * (gap < 0.06) * (1.1 - 12 * distance))
    return 1 - blocked


def _ambience(background: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tints (3,) of the light from above and from below: mean colours of the scenery's halves, mostly desaturated."""
    half = len(background) // 2
    tints = []
    for part in (background[:half:8, ::8], background[half::8, ::8]):
        mean = part.mean((0, 1)) + 0.15
        tints.append((0.72 + 0.28 * mean / mean.mean()).astype(np.float32))
    return tints[0], tints[1]


def _lit(
    surface: Surface,
    normals: np.ndarray,
    views: np.ndarray,
    light: np.ndarray,
    shadow: np.ndarray,
    openness: np.ndarray,
    look: Look,
    tints: tuple[np.ndarray, np.ndarray],
    wrap: tuple[float, float, float],
    rim: float,
) -> np.ndarray:
    """Colours (N, 3) of one part.  Exposure is set by the part itself, so a named colour keeps its mean in any light."""
    facing = normals @ light
    diffuse = np.clip((facing[:, None] + np.float32(wrap)) / (1 + np.float32(wrap)), 0, None)
    upward = 0.5 - 0.5 * normals[:, 1:2]
    ambient = (0.55 + 0.45 * upward) * (tints[1] + (tints[0] - tints[1]) * upward) * openness[:, None]
    irradiance = (
        1.6 * look.key_strength * diffuse * (0.45 + 0.55 * shadow * openness)[:, None]
        + (1 - look.key_strength) * ambient * 1.25
    )
    reflected = 2 * (normals * views).sum(1, keepdims=True) * normals - views
    if np.any(surface.mirror):
        chrome = np.interp(-reflected[:, 1] + 0.25 * reflected[:, 0] * look.pattern[5], *_CHROME).astype(np.float32)
        sky = np.where(reflected[:, 1:2] < 0, tints[0], tints[1])
        mirror = np.broadcast_to(np.float32(surface.mirror), facing.shape)[:, None]
        irradiance = irradiance * (1 - mirror) + mirror * chrome[:, None] * sky * (0.35 + 0.65 * openness[:, None])
    irradiance *= look.exposure / max(float(irradiance.mean()), 1e-3)
    shine = np.clip(reflected @ light, 0, 1) ** surface.sharpness * shadow * surface.specular
    edge = (1 - np.clip((normals * views).sum(1), 0, 1)) ** 3
    irradiance *= 1 + (rim * tints[0] if rim else -0.25) * edge[:, None]
    colors = _film(surface.albedo * irradiance + shine[:, None])
    gain = np.clip(look.exposure * surface.albedo.mean(0).max() / max(float(colors.mean(0).max()), 1e-3), 0.8, 1.4)
    return _film(surface.albedo * irradiance * gain + shine[:, None])


def _film(colors: np.ndarray) -> np.ndarray:
    """A film's soft shoulder above 0.8 instead of a hard clip, so that bright things keep their form."""
    return np.where(colors > 0.8, 1 - 0.2 * np.exp((0.8 - colors) / 0.2), colors)


def _ground_shadow(image: np.ndarray, mask: np.ndarray) -> None:
    """A soft dark blob below what stands on a table, in place."""
    coarse = mask[::8, ::8].astype(np.float32)
    height, width = coarse.shape
    y, x = np.arange(height), np.arange(width)
    blur_y = np.exp(-0.5 * ((y[:, None] - y[None] - 0.055 * height) / (0.035 * height)) ** 2).astype(np.float32)
    blur_x = np.exp(-0.5 * ((x[:, None] - x[None] - 0.02 * width) / (0.05 * width)) ** 2).astype(np.float32)
    soft = (blur_y / blur_y.sum(1).mean()) @ coarse @ (blur_x / blur_x.sum(1).mean()).T
    rows = np.linspace(0, height - 1, image.shape[0])
    columns = np.linspace(0, width - 1, image.shape[1])
    image *= (1 - 0.55 * np.clip(_bilinear(soft, rows, columns), 0, 1))[..., None]


def _bilinear(array: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Stretch (h, w) to (len(rows), len(columns))."""

    def blend(array: np.ndarray, at: np.ndarray) -> np.ndarray:
        low = np.minimum(at.astype(int), len(array) - 2)
        weight = (at - low).astype(np.float32)[:, None]
        return array[low] * (1 - weight) + array[low + 1] * weight

    return blend(blend(array, rows).T, columns).T


def shade(
    gbuffer: GBuffer,
    camera: Camera,
    look: Look,
    generator: np.random.Generator,
    reduce: int = 1,
    background: np.ndarray | None = None,
) -> np.ndarray:
    """Picture of one G-buffer in one look.

    generator   draws the scenery; the foreground depends on look and geometry (and on the scenery's tint) only
    reduce      area-average the result by this factor, which antialiases silhouettes
    background  (H, W, 3) float32 in [0, 1] instead of a fresh draw of look.background, e.g. from a bank
    returns     (H/reduce, W/reduce, 3) uint8
    Raises ValueError when the sizes of G-buffer, camera and background disagree.
    """
    height, width = gbuffer.label_map.shape
    if (camera.height, camera.width) != (height, width):
        raise ValueError(
            f"camera is {camera.height} x {camera.width}, G-buffer {height} x {width}: render with this camera"
        )
    image = (
        paint_background(look.background, generator, height, width)
        if background is None
        else np.array(background, np.float32)
    )
    if image.shape != (height, width, 3):
        raise ValueError(f"background has shape {image.shape}, expected {(height, width, 3)}")
    mask = gbuffer.label_map > 0
    if mask.any():
        tints = _ambience(image)
        if BACKGROUNDS[look.background].table:
            _ground_shadow(image, mask)
        _shade_foreground(image, gbuffer, camera, look, tints)
    image = (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)
    return image if reduce == 1 else reduce_image(image, reduce)


def _shade_foreground(
    image: np.ndarray, gbuffer: GBuffer, camera: Camera, look: Look, tints: tuple[np.ndarray, np.ndarray]
) -> None:
    rows_any, columns_any = (
        np.flatnonzero((gbuffer.label_map > 0).any(1)),
        np.flatnonzero((gbuffer.label_map > 0).any(0)),
    )
    top, left = max(rows_any[0] - 16, 0), max(columns_any[0] - 16, 0)
    box = (slice(top, rows_any[-1] + 17), slice(left, columns_any[-1] + 17))
    labels, normals = gbuffer.label_map[box], gbuffer.surface_normals[box].astype(np.float32)
    depth = np.where(labels > 0, gbuffer.depth[box], 10).astype(np.float32)
    fx, fy = camera.intrinsics[0, 0], camera.intrinsics[1, 1]
    cx, cy = camera.intrinsics[0, 2] - left, camera.intrinsics[1, 2] - top
    open_box = _openness(depth, normals, fy)
    rotation, translation = (
        camera.world_to_camera[:3, :3].astype(np.float32),
        camera.world_to_camera[:3, 3].astype(np.float32),
    )
    light = np.float32(look.light_direction)
    for label in (1, 2):
        rows, columns = np.nonzero(labels == label)
        if not len(rows):
            continue
        z = depth[rows, columns]
        points = np.stack([(columns - cx) / fx * z, (rows - cy) / fy * z, z], 1).astype(np.float32)
        views = -points / np.linalg.norm(points, axis=1, keepdims=True)
        shadow = _shadow(depth, rows, columns, points, light, (fx, fy, cx, cy))
        canonical = (points - translation) @ rotation
        if label == 1:
            surface, wrap, rim = (
                skin_surface(canonical, look.skin_tone, look.skin_warmth, look.pattern),
                (0.5, 0.32, 0.26),
                0.12,
            )
        else:
            surface, wrap, rim = (
                object_surface(canonical, look.object_color, look.material, look.pattern),
                (0.3, 0.3, 0.3),
                0.0,
            )
        image[rows + top, columns + left] = _lit(
            surface, normals[rows, columns], views, light, shadow, open_box[rows, columns], look, tints, wrap, rim
        )
