"""A scene with a look: drawn, shaded, captioned."""

import numpy as np

from hoi.geometry.camera import scale_camera
from hoi.geometry.render import GBuffer
from hoi.geometry.scene import Scene, noun
from hoi.toyworld.appearance import Look, caption, reduce_image, shade
from hoi.toyworld.backgrounds import paint_background


def shade_scene(
    scene: Scene,
    gbuffer: GBuffer | None,
    look: Look,
    generator: np.random.Generator,
    factor: int = 2,
    paraphrase: bool = False,
) -> tuple[np.ndarray, str]:
    """Toy-world picture of a frame and its caption.

    gbuffer     of `factor` times the picture's size (`render_scene(..., factor=factor)`); None for scenery
    paraphrase  word some captions differently; otherwise all follow the paper's template
    returns     (H, W, 3) uint8, averaged over factor x factor pixels, and the caption
    """
    camera = scale_camera(scene.camera, factor)
    if scene.content == "scenery":
        background = reduce_image(paint_background(look.background, generator, camera.height, camera.width), factor)
        picture = (np.clip(background, 0, 1) * 255 + 0.5).astype(np.uint8)
    else:
        picture = shade(gbuffer, camera, look, generator, reduce=factor)
    words = generator if paraphrase else None
    if scene.content == "hand":  # the words of a look describe an object, which is not there
        return picture, caption(look, "hand", False, words, with_adjectives=False)
    category = None if scene.object_mesh is None else noun(scene.object_mesh)
    return picture, caption(look, category, scene.grasp is not None, words)
