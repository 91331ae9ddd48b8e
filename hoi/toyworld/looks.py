"""The toy world's looks.  Scene + GBuffer + Look -> picture (H, W, 3) uint8, and its caption.

Geometry is rendered once and shaded many times: materials, light and scenery cost a few milliseconds each.  A look is
drawn at random, put into words by the paper's template, and painted: scenery first, hand and object over it.  Phrases
and styles are those of the paper's figures (Sec. 4 and appendix).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hoi.geometry.arm import SLEEVE
from hoi.geometry.camera import Camera
from hoi.geometry.render import HAND, GBuffer
from hoi.geometry.scene import Scene, noun
from hoi.toyworld import shading
from hoi.toyworld.backgrounds import BACKGROUNDS, paint_background
from hoi.toyworld.words import caption_words

# Mean colours inside the object mask, measured on 933 shaded pictures: light and film move them from the albedo.  A
# picture's colour word is told by these: with them, and highlights that roll off, right in 99.7 %.
PALETTE: dict[str, tuple[float, float, float]] = {
    "red": (0.73, 0.14, 0.16), "orange": (0.83, 0.47, 0.07), "yellow": (0.81, 0.77, 0.15), "green": (0.14, 0.53, 0.21),
    "blue": (0.16, 0.30, 0.73), "purple": (0.50, 0.21, 0.61), "pink": (0.82, 0.54, 0.68), "white": (0.78, 0.77, 0.77),
    "black": (0.11, 0.11, 0.12), "brown": (0.40, 0.23, 0.11), "gray": (0.44, 0.44, 0.44),
}  # fmt: skip

# name -> (caption word, share of the looks, share of these that also has a colour word).  Most looks are paint,
# since colours take longest to be learned; metal, stripes and marble come with and without a colour word, wood and the
# two styles have colours of their own.
MATERIALS: dict[str, tuple[str, float, float]] = {
    "plain": ("", 0.28, 1.0), "glossy": ("", 0.19, 1.0), "metallic": ("metallic", 0.13, 0.75),
    "striped": ("striped", 0.13, 0.75), "wooden": ("wooden", 0.08, 0.0), "marble": ("marble", 0.13, 0.75),
    "gothic-style": ("gothic-style", 0.03, 0.0), "medieval-style": ("medieval-style", 0.03, 0.0),
}  # fmt: skip


@dataclass(frozen=True)
class Look:
    """Everything about a picture that is not geometry; plain values, so it can be written into a record.

    object_color     key of shading.COLORS, "" where the material has its own
    material         key of MATERIALS
    background       key of BACKGROUNDS
    skin_tone        0 light ... 1 dark;  skin_warmth in [-1, 1]
    light_direction  (3,) unit, camera frame, points to the lamp (y < 0: above)
    key_strength     share of the lamp in the light, the rest is sky and ground
    exposure         mean brightness of lit hand and object relative to their colours
    pattern          six numbers in [0, 1) that place stripes, grain and veins
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
    lab = style == "lab" or (style == "any" and generator.random() < 0.2)  # its 7 kinds differ little
    names = [name for name, background in BACKGROUNDS.items() if background.lab == lab]
    shares = np.array([share for _, share, _ in MATERIALS.values()])
    weights = np.array([BACKGROUNDS[name].share for name in names])
    material = list(MATERIALS)[generator.choice(len(MATERIALS), p=shares / shares.sum())]
    colored = generator.random() < MATERIALS[material][2]
    # Radians: never from behind the object, 20 to 63 degrees above, so that a shadow falls on what the camera sees.
    azimuth, height = generator.uniform(-1.9, 1.9), generator.uniform(0.35, 1.1)
    light = np.array([np.sin(azimuth) * np.cos(height), -np.sin(height), -np.cos(azimuth) * np.cos(height)])
    return Look(
        object_color=list(shading.COLORS)[generator.integers(len(shading.COLORS))] if colored else "",
        material=material,
        background=names[generator.choice(len(names), p=weights / weights.sum())],
        skin_tone=float(generator.beta(1.1, 1.5)),  # all tones, the light half a little more often
        skin_warmth=float(generator.uniform(-1, 1)),
        light_direction=tuple(float(v) for v in light),
        key_strength=float(generator.uniform(0.35, 0.5) if lab else generator.uniform(0.45, 0.7)),  # lamps or sun
        exposure=float(generator.uniform(0.94, 1.06)),
        pattern=tuple(float(v) for v in generator.random(6)),
    )


def caption(look: Look, category: str | None, has_hand: bool, generator: np.random.Generator | None = None) -> str:
    """The sentence for a picture of this look.

    category   any noun; None gives a sentence about the scenery alone, or about a hand alone when has_hand
    generator  None gives the paper's template, otherwise paraphrases are mixed in
    """
    if category is None and has_hand:  # colour and material describe an object, which is not there
        return caption_words("", "", look.background, "hand", False, generator)
    return caption_words(look.object_color, MATERIALS[look.material][0], look.background, category, has_hand, generator)


def reduce_image(image: np.ndarray, factor: int) -> np.ndarray:
    """Area-average a picture (H, W, ...) by a whole factor that divides both sides, same dtype."""
    if factor == 1:
        return image
    height, width = image.shape[:2]
    blocks = image.reshape(height // factor, factor, width // factor, factor, *image.shape[2:])
    mean = blocks.mean((1, 3), dtype=np.float32)
    return (mean + 0.5).astype(np.uint8) if image.dtype == np.uint8 else mean.astype(image.dtype)


def shade(
    gbuffer: GBuffer, camera: Camera, look: Look, generator: np.random.Generator, reduce: int = 1,
    background: np.ndarray | None = None, support: float | None = None,
) -> np.ndarray:
    """Picture of one G-buffer in one look.

    generator   draws the scenery; the foreground depends on look and geometry (and on the scenery's tint) only
    camera      of the G-buffer's size
    reduce      area-average the result by this factor, which antialiases silhouettes
    background  (H, W, 3) float32 in [0, 1] instead of a fresh draw of look.background, e.g. from a bank
    support     height of a plane below the object that the shadow falls on, see Scene; None: the scenery's ground
    returns     (H/reduce, W/reduce, 3) uint8
    """
    if background is None:
        background = paint_background(look.background, generator, camera.height, camera.width, camera.steepness)
    image = np.array(background, np.float32)
    mask = gbuffer.label_map > 0
    if mask.any():  # a view may show nothing of either
        above, below = shading.ambience(image)
        if support is None:
            shading.drop_shadow(image, mask, BACKGROUNDS[look.background].horizon_row(camera.steepness))
        else:
            shading.fall_on_plane(image, gbuffer, camera, np.asarray(look.light_direction), support)
        light = shading.Light(np.float32(look.light_direction), look.key_strength, look.exposure, above, below)
        for label, part in shading.visible_parts(gbuffer, camera, light.direction).items():
            if label == SLEEVE:
                surface = shading.sleeve_surface(part.canonical, look.pattern)
            elif label == HAND:
                surface = shading.skin_surface(part.canonical, look.skin_tone, look.skin_warmth, look.pattern)
            else:
                surface = shading.object_surface(part.canonical, look.object_color, look.material, look.pattern)
            image[part.rows, part.columns] = shading.lit(part, surface, light)
    return reduce_image(_as_uint8(image), reduce)


def _as_uint8(image: np.ndarray) -> np.ndarray:
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)


def shade_scene(
    scene: Scene, gbuffer: GBuffer | None, look: Look, generator: np.random.Generator, factor: int = 2,
    paraphrase: bool = False,
) -> tuple[np.ndarray, str]:
    """Toy-world picture of a scene's frame, and its caption.

    gbuffer     of `factor` times the picture's size (`render_picture`); None for scenery
    paraphrase  word some captions differently; otherwise all follow the paper's template
    returns     (H, W, 3) uint8, averaged over factor x factor pixels, and the caption
    """
    camera = scene.camera.scaled(factor)
    if scene.content == "scenery":
        background = paint_background(look.background, generator, camera.height, camera.width, camera.steepness)
        picture = _as_uint8(reduce_image(background, factor))
    else:
        picture = shade(gbuffer, camera, look, generator, reduce=factor, support=scene.support)
    category = None if scene.object_mesh is None else noun(scene.object_mesh)
    return picture, caption(look, category, scene.grasp is not None, generator if paraphrase else None)
