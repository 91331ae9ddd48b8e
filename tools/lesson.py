"""The eight pictures of docs/lesson.md, from one mesh to one picture, each by the function that the lesson quotes.

    python tools/lesson.py                    # about a minute; writes runs/lesson/1_grasp.png ... 8_anchor.png
    python tools/lesson.py --out /tmp/lesson --checkpoint runs/toy/hoi --object scans/mug.stl
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from hoi.common.choices import GRASPS  # noqa: E402
from hoi.common.command import default_cache  # noqa: E402
from hoi.common.sheets import contact_sheet  # noqa: E402
from hoi.conditions import draw_conditions  # noqa: E402
from hoi.data.views import ApproachFrames, SceneViews, View  # noqa: E402
from hoi.geometry.contact import DistanceField  # noqa: E402
from hoi.geometry.grasp import CONTACT_DISTANCE  # noqa: E402
from hoi.geometry.hand import HandModel, load_hand  # noqa: E402
from hoi.geometry.objects import ObjectMesh, collect_objects  # noqa: E402
from hoi.geometry.render import Renderer  # noqa: E402
from hoi.geometry.scene import Scene, ViewSettings  # noqa: E402
from hoi.network.model import CONDITION_NAMES, stack_conditions  # noqa: E402
from hoi.network.pipeline import AnchoredUNet, Pipeline, join_features  # noqa: E402
from hoi.network.unet import SpatialTransformer  # noqa: E402
from hoi.weights.load import load_pipeline  # noqa: E402

PROMPT = "A hand is grasping a blue {object} on the beach"
SEED, NOISE, OTHER = 8, 5, 9  # of the scene; of the picture's noise; of the scene whose skeleton is borrowed
TILE = 192  # pixels of a tile on the page
Tiles = tuple[list[np.ndarray], list[str]]  # pictures (H, W, 3) uint8, and a line above each


# --- geometry ---


def grasp(scene: Scene, hand: HandModel, renderer: Renderer) -> Tiles:
    """1. The object, the hand that was found on it, both; and what is measured of them."""
    mesh, skin = scene.object_mesh, hand(scene.hand_params[-1])
    tiles = []
    for parts in ((None, None, mesh.vertices, mesh.faces), (skin.vertices, skin.faces, None, None),
                  (skin.vertices, skin.faces, mesh.vertices, mesh.faces)):  # fmt: skip
        seen = renderer.render(*parts, scene.camera)
        tiles.append(draw_conditions(None, seen.label_map, seen.surface_normals).normal)
    distance = DistanceField(mesh.vertices, mesh.faces).signed_distance(skin.vertices)  # metres, below 0 inside
    touching = int((distance < CONTACT_DISTANCE).sum())
    print(f"{touching} points of the skin touch, the deepest lies {1000 * max(0.0, -distance.min()):.1f} mm inside")
    return tiles, ["object", "hand", "both"]


def approach(frames: ApproachFrames) -> Tiles:
    """2. From above to the grasp."""
    chosen = np.linspace(0, len(frames) - 1, 6).round().astype(int)
    pictures = [frames[k].conditions for k in chosen]
    return [p.segmentation // 2 + p.skeleton // 2 for p in pictures], [f"frame {k}" for k in chosen]


def conditions(view: View) -> Tiles:
    """3. What the network is shown."""
    return [getattr(view.conditions, name) for name in CONDITION_NAMES], list(CONDITION_NAMES)


# --- sampling ---


def picture(
    pipeline: Pipeline, prompt: str, shown: dict[str, Tensor], progress: Callable | None = None, **settings: object
) -> np.ndarray:
    """One picture (H, W, 3) of the conditions in other settings, always from the same noise."""
    chosen = Pipeline(pipeline.model, replace(pipeline.settings, **settings), pipeline.checkpoint)
    noise = torch.Generator().manual_seed(NOISE)
    return chosen.pictures([prompt], chosen.features(shown), [noise], progress)[0]


def denoising(pipeline: Pipeline, prompt: str, shown: dict[str, Tensor]) -> Tiles:
    """4. What the network takes the picture for, x0, after some of its steps."""
    seen: dict[int, np.ndarray] = {}

    def look(step: int, steps: int, x0: Tensor) -> None:
        if step in (1, 2, 4, 8, 16, steps):
            seen[step] = pipeline.decode(x0)[0]

    picture(pipeline, prompt, shown, look)
    return list(seen.values()), [f"x0 after step {step}" for step in seen]


def other_skeleton(pipeline: Pipeline, prompt: str, shown: dict[str, Tensor], other: dict[str, Tensor]) -> Tiles:
    """5. The same noise and text, one condition changed."""
    borrowed = shown | {"skeleton": other["skeleton"]}
    tiles = [picture(pipeline, prompt, shown), picture(pipeline, prompt, borrowed)]
    tiles += [picture(pipeline, prompt, shown, cond_weights=(1.0, 0.0, 1.0)), picture(pipeline, prompt, other)]
    return tiles, ["as it is", "another skeleton", "without normals", "all of the other"]


def weights(pipeline: Pipeline, prompt: str, shown: dict[str, Tensor]) -> Tiles:
    """6. The weight of each condition in the sum of features."""
    chosen = ((1, 1, 1), (0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0.5, 0.5, 0.5))
    tiles = [picture(pipeline, prompt, shown, cond_weights=each) for each in chosen]
    return tiles, ["s, n, m: " + ", ".join(f"{weight:g}" for weight in each) for each in chosen]


def guidance(pipeline: Pipeline, prompt: str, shown: dict[str, Tensor]) -> Tiles:
    """7. How far the text pulls."""
    scales = (0.0, 1.0, 2.0, 4.0)
    return [picture(pipeline, prompt, shown, guidance_scale=w) for w in scales], [f"guidance {w:g}" for w in scales]


def anchor(pipeline: Pipeline, prompt: str, frames: ApproachFrames) -> Tiles:
    """8. Where a point on the hand of the first frame looks in the anchor frame, the grasp, at the last step."""
    views = [frames[len(frames) - 1], frames[len(frames) // 2]]  # the anchor first
    attention = [m for m in pipeline.model.unet.output_blocks.modules() if isinstance(m, SpatialTransformer)][-1]
    attention, looks = attention.transformer_blocks[0].attn1, []

    def note(module: torch.nn.Module, inputs: tuple[Tensor]) -> None:
        query, (key, _) = module.split_heads(module.to_q(inputs[0])), module.keys_values(inputs[0])
        joined = torch.cat([key[1], key[0]], dim=1)  # what the second frame sees: itself, then the anchor
        scores = (query[1] @ joined.transpose(1, 2) * query.shape[3] ** -0.5).softmax(dim=2)  # (heads, N, 2 N)
        looks.append(scores.mean(dim=0)[:, query.shape[2] :])  # (N, N): of each point, over the anchor

    hook = attention.register_forward_pre_hook(note)
    features = join_features([pipeline.features(stack_conditions([v.conditions], *frames.size)) for v in views])
    noise = [torch.Generator().manual_seed(NOISE) for _ in views]
    latents = pipeline.latents(AnchoredUNet(pipeline.model.unet), [prompt] * 2, features, noise, None, *frames.size)
    hook.remove()
    side = int(len(looks[-1]) ** 0.5)
    x, y = np.clip(np.mean(views[1].record["keypoints_2d"], axis=0) * side / frames.size[1], 0, side - 1).astype(int)
    where = looks[-1][y * side + x].float().view(side, side).numpy()
    first, second = pipeline.decode(latents, *frames.size)
    second = second.copy()
    cell = frames.size[0] // side
    second[y * cell : (y + 1) * cell, x * cell : (x + 1) * cell] = (255, 0, 0)  # the point that looks
    heat = np.kron(where / where.max(), np.ones((cell, cell)))[..., None]
    seen = (first * (1 - heat) + np.array([255, 0, 0]) * heat).astype(np.uint8)
    return [second, first, seen], ["a frame, its point", "the anchor", "where it looks"]


# --- all of it ---


def write(out: Path, name: str, tiles: Tiles) -> None:
    """The tiles in a row, as a picture of the lesson."""
    big = [np.asarray(Image.fromarray(tile).resize((TILE, TILE), Image.Resampling.BICUBIC)) for tile in tiles[0]]
    contact_sheet([big], [tiles[1]]).save(out / f"{name}.png", optimize=True)
    print(out / f"{name}.png", flush=True)


def lesson(mesh: ObjectMesh, pipeline: Pipeline, out: Path, cache: Path) -> None:
    """Write the eight pictures into a folder."""
    out.mkdir(parents=True, exist_ok=True)
    hand, renderer, side = load_hand(), Renderer(), pipeline.model.config.image_size
    single = ViewSettings(side, side, framing="tight")
    scene, other = (SceneViews([mesh], hand, single, seed, GRASPS, cache).scene(0) for seed in (SEED, OTHER))
    clip = SceneViews([mesh], hand, replace(single, frames=16), SEED, GRASPS, cache).scene(0)
    view, borrowed, frames = (ApproachFrames(each, hand, renderer) for each in (scene, other, clip))
    prompt = PROMPT.replace("{object}", frames.noun)
    shown, borrowed = (stack_conditions([each[0].conditions], side, side) for each in (view, borrowed))
    write(out, "1_grasp", grasp(scene, hand, renderer))
    write(out, "2_approach", approach(frames))
    write(out, "3_conditions", conditions(view[0]))
    write(out, "4_denoising", denoising(pipeline, prompt, shown))
    write(out, "5_other_skeleton", other_skeleton(pipeline, prompt, shown, borrowed))
    write(out, "6_weights", weights(pipeline, prompt, shown))
    write(out, "7_guidance", guidance(pipeline, prompt, shown))
    write(out, "8_anchor", anchor(pipeline, prompt, frames))


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--object", default="mug", metavar="PATH|NAME", help="a mesh file or a built-in name")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="weights trained here (default: built in)")
    parser.add_argument("--cache", type=Path, default=default_cache(), metavar="DIR", help="of found grasps")
    parser.add_argument("--out", type=Path, default=Path("runs/lesson"), metavar="DIR", help="of the pictures")
    args = parser.parse_args(arguments)
    # fp32: the lesson compares pictures, and looks into the network.
    pipeline = load_pipeline(args.checkpoint, dtype="float32", num_inference_steps=20)
    lesson(collect_objects([args.object])[0], pipeline, args.out, args.cache)


if __name__ == "__main__":
    with torch.no_grad():
        main()
