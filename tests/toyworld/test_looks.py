"""The toy world's words mean what its pictures show."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from hoi.geometry.camera import Camera, look_at, make_intrinsics
from hoi.geometry.render import GBuffer
from hoi.toyworld.backgrounds import BACKGROUNDS, paint_background
from hoi.toyworld.looks import MATERIALS, PALETTE, caption, reduce_image, sample_look, shade
from hoi.toyworld.shading import COLORS
from hoi.toyworld.words import caption_words, words_in

CATEGORIES = ("mug", "bowl", "bottle", "can")


def balls(
    size: int = 128, hand: bool = True, hand_at: tuple = (-0.05, 0.02, 0.25), hand_radius: float = 0.035
) -> tuple[GBuffer, Camera]:
    """An analytic G-buffer: a ball as object, and a smaller ball in front of its left side as hand."""
    world_to_camera = look_at(np.array([0.0, -0.3, 0.1]), np.zeros(3), np.array([0, 0, 1.0]))
    camera = Camera(make_intrinsics(size, size), world_to_camera, size, size)
    rows, columns = np.mgrid[:size, :size]
    pixels = np.stack([columns, rows, np.ones_like(rows)], -1)
    rays = pixels @ np.linalg.inv(camera.intrinsics).T
    depth, labels = np.full((size, size), np.inf), np.zeros((size, size), np.uint8)
    normals, object_mask = np.zeros((size, size, 3)), None
    for label, center, radius in ((2, (0.0, 0.0, 0.316), 0.08), (1, hand_at, hand_radius)):
        if label == 1 and not hand:
            continue
        a, b, c = (rays**2).sum(-1), rays @ np.array(center), np.dot(center, center) - radius**2
        inside = b**2 > a * c
        z = np.where(inside, (b - np.sqrt(np.maximum(b**2 - a * c, 0))) / a, np.inf)
        object_mask = inside if label == 2 else object_mask
        nearer = z < depth
        depth[nearer], labels[nearer] = z[nearer], label
        normals[nearer] = ((rays * z[..., None])[nearer] - center) / radius
    depth[np.isinf(depth)] = 0
    return GBuffer(depth.astype(np.float32), labels, normals.astype(np.float32), object_mask), camera


@pytest.fixture(scope="module")
def bank() -> dict[str, list[np.ndarray]]:
    generator = np.random.default_rng(11)
    return {name: [paint_background(name, generator, 128, 128) for _ in range(8)] for name in BACKGROUNDS}


def test_every_caption_gives_its_words_back() -> None:
    generator = np.random.default_rng(0)
    look = sample_look(generator)
    forms = set()
    for color, material, name, category, hand in itertools.product(
            ("", *COLORS), MATERIALS, BACKGROUNDS, CATEGORIES, (True, False)):
        look = replace(look, object_color=color, material=material, background=name)
        expected = {"color": color or None, "material": MATERIALS[material][0] or None, "background": name,
                    "category": category}
        for source in (None, generator):
            text = caption(look, category, hand, source)
            forms.add(text.replace(name, "").split(category)[0][:14])
            assert words_in(text) == expected, text
    assert len(forms) > 20, "paraphrases are missing"


def test_the_template_is_the_papers() -> None:
    look = replace(sample_look(np.random.default_rng(0)), object_color="orange", material="metallic",
                   background="on the beach")
    assert caption(look, "mug", True) == "A hand is grasping an orange metallic mug on the beach"
    assert caption(look, "lotion pump", False) == "An orange metallic lotion pump on the beach"
    assert caption_words("", "", "", "mug", True) == "A hand is grasping a mug"
    assert caption(look, None, True) == "A hand on the beach"


@pytest.mark.parametrize("name", BACKGROUNDS)
def test_every_scenery_sentence_names_its_background_and_nothing_else(name: str) -> None:
    look = replace(sample_look(np.random.default_rng(0)), background=name)
    for seed in range(12):
        text = caption(look, None, False, np.random.default_rng(seed))
        words = words_in(text)
        assert words["background"] == name, text
        assert words["color"] is None and words["category"] is None, text


def test_foreign_prompts_are_understood() -> None:
    found = words_in("A photo of a GREY metal teapot, on a table covered with green cloth.")
    assert found == {"color": "gray", "material": "metallic", "background": "on a table covered with green cloth",
                     "category": None}
    assert words_in("a pink mug on a rainy street") == {"color": "pink", "material": None, "background": None,
                                                       "category": "mug"}
    assert words_in("a thousand candles")["category"] is None


def test_a_shaded_object_has_the_colour_of_its_word(bank: dict) -> None:
    generator = np.random.default_rng(1)
    scenes = [balls(), balls(hand=False)]
    hits = {color: [] for color in COLORS}
    for index in range(700):
        look = sample_look(generator)
        if not look.object_color:
            continue
        gbuffer, camera = scenes[index % 2]
        picture = shade(gbuffer, camera, look, generator, background=bank[look.background][index % 8])
        mean = picture[gbuffer.label_map == 2].mean(0) / 255
        found = min(PALETTE, key=lambda name: np.sum((mean - PALETTE[name]) ** 2))
        hits[look.object_color].append(found == look.object_color)
    right = np.concatenate(list(hits.values()))
    assert len(right) > 450
    assert right.mean() >= 0.97, {color: np.mean(found) for color, found in hits.items()}
    assert min(np.mean(found) for found in hits.values()) >= 0.9


def test_palette_colours_are_far_apart() -> None:
    gaps = [np.linalg.norm(np.subtract(PALETTE[a], PALETTE[b])) for a, b in itertools.combinations(PALETTE, 2)]
    assert min(gaps) > 0.25


def test_equal_generators_give_equal_pictures_and_others_do_not() -> None:
    gbuffer, camera = balls()
    pictures = [shade(gbuffer, camera, sample_look(generator), generator)
                for generator in (np.random.default_rng(seed) for seed in (5, 5, 6))]
    assert np.array_equal(pictures[0], pictures[1])
    assert np.abs(pictures[0].astype(int) - pictures[2]).mean() > 5


def test_the_foregrounds_look_leaves_the_background_alone() -> None:
    gbuffer, camera = balls()
    look = sample_look(np.random.default_rng(3), "scenic")
    outside = gbuffer.label_map == 0
    pictures = [
        shade(gbuffer, camera, replace(look, object_color=color, material="glossy", skin_tone=tone),
              np.random.default_rng(4))
        for color, tone in itertools.product(("red", "black"), (0.0, 1.0))
    ]  # fmt: skip
    assert all(np.array_equal(picture[outside], pictures[0][outside]) for picture in pictures)


@pytest.mark.parametrize("name", ["on the beach", "on the moon with night sky", "on a red cloth", "in the sand"])
def test_things_throw_a_shadow_on_the_ground_and_none_on_the_sky(name: str) -> None:
    gbuffer, camera = balls(hand=False)
    look, outside = replace(sample_look(np.random.default_rng(3)), background=name), gbuffer.label_map == 0
    scenery = 255 * paint_background(name, np.random.default_rng(4), 128, 128, camera.steepness).mean(-1)
    picture = shade(gbuffer, camera, look, np.random.default_rng(4)).mean(-1)
    horizon = int(128 * BACKGROUNDS[name].horizon_row(camera.steepness))
    assert np.abs(picture - scenery)[: max(horizon - 3, 0)][outside[: max(horizon - 3, 0)]].max(initial=0) < 1
    below = slice(gbuffer.label_map.any(1).nonzero()[0].max() + 1, None)
    assert picture[below, 54:74].mean() < 0.92 * scenery[below, 54:74].mean()


def test_the_horizon_sinks_when_the_camera_looks_up() -> None:
    for name, background in BACKGROUNDS.items():
        rows = [background.horizon_row(steepness) for steepness in (0.0, 0.5, 1.0)]
        assert rows == sorted(rows, reverse=True), name
        assert rows[0] > rows[2] or rows == [0, 0, 0], name
    skies = [paint_background("in the sand", np.random.default_rng(0), 128, 128, s)[..., 2].mean() for s in (0.0, 1.0)]
    assert skies[0] > skies[1], "there is more sky, which is bluer than sand, when the camera looks level"


def test_the_base_sees_tables_cloths_and_walls_and_none_of_the_laboratory() -> None:
    generator = np.random.default_rng(0)
    seen = {sample_look(generator, "scenic").background for _ in range(1500)}
    assert seen == {name for name, background in BACKGROUNDS.items() if not background.lab}
    assert {"on a wooden table", "on a red cloth", "in front of a brick wall"} <= seen


def test_adjectives_of_the_scenery_are_not_the_objects() -> None:
    for prompt, color, material in (
        ("A hand is grasping a blue mug on a wooden table", "blue", None),
        ("A hand is grasping a wooden mug on a red cloth", None, "wooden"),
        ("A hand is grasping a green marble mug on a marble table", "green", "marble"),
        ("On a marble table, a yellow striped mug", "yellow", "striped"),
        ("a wooden table", None, None),
    ):
        found = words_in(prompt)
        assert (found["color"], found["material"]) == (color, material), prompt
        assert found["background"] is not None


@pytest.mark.parametrize("material", ["metallic", "striped", "marble"])
def test_these_materials_come_with_and_without_a_colour_word(material: str) -> None:
    generator = np.random.default_rng(0)
    looks = [look for look in (sample_look(generator) for _ in range(3000)) if look.material == material]
    assert 0.10 < len(looks) / 3000 < 0.16
    assert 0.15 < np.mean([not look.object_color for look in looks]) < 0.35
    assert {look.object_color for look in looks} == {"", *COLORS}


def test_hand_and_object_do_not_see_each_others_material() -> None:
    gbuffer, camera = balls()
    look = replace(sample_look(np.random.default_rng(3)), object_color="red", material="plain", skin_tone=0.1)
    first = shade(gbuffer, camera, look, np.random.default_rng(4))
    other_object = shade(gbuffer, camera, replace(look, object_color="", material="marble"), np.random.default_rng(4))
    other_skin = shade(gbuffer, camera, replace(look, skin_tone=0.9), np.random.default_rng(4))
    hand, thing = gbuffer.label_map == 1, gbuffer.label_map == 2
    assert np.array_equal(first[hand], other_object[hand]) and np.array_equal(first[thing], other_skin[thing])
    assert np.abs(first[thing].astype(int) - other_object[thing]).mean() > 30
    assert np.abs(first[hand].astype(int) - other_skin[hand]).mean() > 30


def test_the_object_is_darker_beside_the_hand_that_touches_it() -> None:
    """Contact darkening makes fingers readable: the same object pixels are brighter when there is no hand."""
    (with_hand, camera), (alone, _) = balls(256, True, (-0.01, 0.0, 0.245), 0.02), balls(256, hand=False)
    look = replace(sample_look(np.random.default_rng(3)), object_color="gray", material="plain",
                   light_direction=(-0.6, -0.5, -0.62))
    background = np.full((256, 256, 3), 0.5, np.float32)
    generator = np.random.default_rng(0)
    pictures = [shade(g, camera, look, generator, background=background).mean(-1) for g in (with_hand, alone)]
    hand = np.argwhere(with_hand.label_map == 1)
    row, column = hand[:, 0].mean().astype(int), hand[:, 1].max()
    near, far = (slice(row - 4, row + 5), slice(column + 1, column + 3)), (slice(row - 4, row + 5), slice(165, 170))
    assert (with_hand.label_map[near] == 2).all() and (with_hand.label_map[far] == 2).all()
    ratio = pictures[0] / pictures[1]
    assert ratio[near].mean() < 0.9 * ratio[far].mean()


def test_light_comes_from_its_direction() -> None:
    gbuffer, camera = balls(hand=False)
    look = replace(sample_look(np.random.default_rng(3)), object_color="gray", material="plain", key_strength=0.6)
    background = np.full((128, 128, 3), 0.5, np.float32)
    for side in (-1, 1):
        lit = replace(look, light_direction=(0.8 * side, -0.3, -0.52))
        picture = shade(gbuffer, camera, lit, np.random.default_rng(0), background=background).mean(-1)
        left, right = picture[64, 45], picture[64, 82]
        assert (right - left) * side > 20


def features(picture: np.ndarray) -> np.ndarray:
    """Mean and spread of colour in a 4 x 4 grid."""
    blocks = reduce_image(picture, 2).reshape(4, 16, 4, 16, 3)
    return np.concatenate([blocks.mean((1, 3)).ravel(), blocks.std((1, 3)).ravel() * 2])


def test_backgrounds_are_told_apart_by_the_simplest_classifier(bank: dict) -> None:
    """Nearest mean of block colours: 8 draws of each kind to learn, 8 others to classify."""
    names = list(BACKGROUNDS)
    centers = np.stack([np.mean([features(p) for p in bank[name]], 0) for name in names])
    generator = np.random.default_rng(12)
    right = []
    for name in [name for name in names for _ in range(8)]:
        seen = features(paint_background(name, generator, 128, 128))
        right.append(names[np.linalg.norm(centers - seen, axis=1).argmin()] == name)
    assert np.mean(right) >= 0.95, np.reshape(right, (-1, 8)).mean(1).round(2)


@pytest.mark.parametrize("name", BACKGROUNDS)
def test_draws_of_one_background_differ(name: str, bank: dict) -> None:
    pairs = itertools.combinations(bank[name][:6], 2)
    assert min(np.abs(a - b).mean() for a, b in pairs) > 0.008
    assert all(p.dtype == np.float32 and 0 <= p.min() and p.max() <= 1 for p in bank[name])


def test_laboratory_looks_use_the_laboratory_alone_and_others_cover_every_word() -> None:
    generator = np.random.default_rng(0)
    lab = {sample_look(generator, "lab").background for _ in range(200)}
    assert lab == {name for name, background in BACKGROUNDS.items() if background.lab}
    looks = [sample_look(generator) for _ in range(1500)]
    assert {look.background for look in looks} == set(BACKGROUNDS)
    assert {look.object_color for look in looks} == {"", *COLORS}
    assert {look.material for look in looks} == set(MATERIALS)
    assert all(look.light_direction[1] < 0 for look in looks)


def test_reduced_silhouettes_are_antialiased() -> None:
    gbuffer, camera = balls(128)
    look = sample_look(np.random.default_rng(3))
    full = shade(gbuffer, camera, look, np.random.default_rng(1))
    half = shade(gbuffer, camera, look, np.random.default_rng(1), reduce=2)
    np.testing.assert_allclose(half[10, 20], full[20:22, 40:42].mean((0, 1)), atol=0.51)
    assert half.shape == (64, 64, 3)
