"""Built-in mugs, bowls, bottles and cans.  Generator -> closed triangle mesh, metres, z up, base at z = 0.

Every shape is a turned profile (as on a potter's wheel or a lathe) with rounded rims and foot rings, plus closed bodies
set into it: a handle, a cap, a ring pull.  A profile is (N, 2) points (radius, height) that run from the axis at the
bottom along the outside and back to the axis.  First the tools that make profiles and solids, then the four families.
Our stand-in for the object scans of the paper's data (Sec. 4); sizes are those of things in a cupboard.
"""

from __future__ import annotations

import numpy as np
from scipy.interpolate import PchipInterpolator
from trimesh.util import append_faces

from hoi.common.choices import CATEGORIES

Mesh = tuple[np.ndarray, np.ndarray]  # vertices (V, 3) metres, faces (F, 3)
MM = 1e-3
SECTIONS = 48  # steps around the axis: the outline of a mug's polygon is 0.1 mm off its circle
TUBE_SECTIONS = 14  # steps around a handle


def fillet(points: list[tuple[float, float]], radii: list[float], steps: int = 4) -> np.ndarray:
    """Round the inner corners of a polyline.

    points (N, 2), radii (N,) metres, ignored at both ends and shortened where the sides are too short
    returns (M, 2), each rounded corner as steps + 1 points on a tangent arc
    """
    corners = np.asarray(points, dtype=np.float64)
    result = [corners[:1]]
    for previous, corner, following, radius in zip(corners, corners[1:], corners[2:], radii[1:], strict=False):
        back, ahead = previous - corner, following - corner
        back_length, ahead_length = np.linalg.norm(back), np.linalg.norm(ahead)
        back, ahead = back / back_length, ahead / ahead_length
        half = np.arccos(np.clip(back @ ahead, -1.0, 1.0)) / 2.0
        # Less than half of each side, so that the arcs of neighbouring corners never meet.
        cut = min(radius / np.tan(half), 0.45 * back_length, 0.45 * ahead_length)
        if radius <= 0.0 or half > 1.56:  # straight on but for a degree: there is no corner
            result.append(corner[None])
            continue
        centre = corner + (back + ahead) / np.linalg.norm(back + ahead) * cut / np.cos(half)
        start, end = corner + cut * back - centre, corner + cut * ahead - centre
        sweep = np.pi - 2.0 * half
        turn = np.linspace(0.0, 1.0, steps + 1)[:, None]
        result.append(centre + (np.sin((1 - turn) * sweep) * start + np.sin(turn * sweep) * end) / np.sin(sweep))
    return np.concatenate([*result, corners[-1:]])


def resample(profile: np.ndarray, longest: float) -> np.ndarray:
    """Split segments longer than `longest` (metres); shorter ones and all corners stay."""
    pieces = [profile[:1]]
    for start, end in zip(profile, profile[1:], strict=False):
        count = max(1, int(np.ceil(np.linalg.norm(end - start) / longest)))
        pieces.append(start + np.linspace(0.0, 1.0, count + 1)[1:, None] * (end - start))
    return np.concatenate(pieces)


def smooth_side(knots: list[tuple[float, float]], count: int) -> np.ndarray:
    """Radius over height through knots (radius, height) of rising height, smooth without overshooting: (count, 2)."""
    radius, height = np.asarray(knots).T
    z = np.linspace(height[0], height[-1], count)
    return np.stack([PchipInterpolator(height, radius)(z), z], axis=1)


def bezier(control: list[tuple[float, float]], count: int) -> np.ndarray:
    """`count` points on the cubic Bezier curve of four control points: (count, 2)."""
    a, b, c, d = np.asarray(control, dtype=np.float64)
    t = np.linspace(0.0, 1.0, count)[:, None]
    return (1 - t) ** 3 * a + 3 * t * (1 - t) ** 2 * b + 3 * t**2 * (1 - t) * c + t**3 * d


def inner_side(outer: np.ndarray, wall: float) -> np.ndarray:
    """The outer side of a vessel moved inwards by the wall's thickness; same order, base to rim."""
    tangent = np.gradient(outer, axis=0)
    tangent /= np.linalg.norm(tangent, axis=1, keepdims=True)
    return outer + wall * np.stack([-tangent[:, 1], tangent[:, 0]], axis=1)


def rim(outer: np.ndarray, inner: np.ndarray, steps: int = 5) -> np.ndarray:
    """Half circle over the top, from the outer side's last point to the inner side's last point, ends excluded."""
    middle, arm = (outer + inner) / 2.0, (outer - inner) / 2.0
    up = np.array([-arm[1], arm[0]])
    angle = np.linspace(0.0, np.pi, steps + 2)[1:-1, None]
    return middle + np.cos(angle) * arm + np.sin(angle) * up


def revolve(profile: np.ndarray, sections: int = SECTIONS) -> Mesh:
    """Turn a profile (N, 2) that begins and ends on the axis into a closed mesh, faces outward."""
    rings = profile[1:-1]
    angle = 2.0 * np.pi * np.arange(sections) / sections
    circle = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    side = np.empty((len(rings), sections, 3))
    side[..., :2], side[..., 2] = rings[:, None, :1] * circle, rings[:, None, 1]
    poles = np.array([[0.0, 0.0, profile[0, 1]], [0.0, 0.0, profile[-1, 1]]])
    return np.concatenate([side.reshape(-1, 3), poles]), tube_faces(len(rings), sections)


def tube_faces(rings: int, sections: int) -> np.ndarray:
    """Faces (F, 3) of `rings` closed rings in a row, then one pole vertex for the first ring and one for the last."""
    ring, step = np.meshgrid(np.arange(rings - 1), np.arange(sections), indexing="ij")
    a, b = ring * sections + step, ring * sections + (step + 1) % sections
    quads = np.concatenate([np.stack([a, b, b + sections], -1), np.stack([a, b + sections, a + sections], -1)])
    first, following = np.arange(sections), (np.arange(sections) + 1) % sections
    last = (rings - 1) * sections
    bottom = np.stack([following, first, np.full(sections, rings * sections)], axis=1)
    top = np.stack([last + first, last + following, np.full(sections, rings * sections + 1)], axis=1)
    return np.concatenate([quads.reshape(-1, 3), bottom, top])


def sweep(path: np.ndarray, half_widths: np.ndarray, sections: int = TUBE_SECTIONS) -> Mesh:
    """A closed tube with an elliptic section along a path in the plane y = 0.

    path (N, 3); half_widths (N, 2) along y and across the path within the plane, metres
    """
    tangent = np.gradient(path, axis=0)
    tangent /= np.linalg.norm(tangent, axis=1, keepdims=True)
    across = np.cross(tangent, np.array([0.0, 1.0, 0.0]))
    angle = 2.0 * np.pi * np.arange(sections) / sections
    rings = (path[:, None]
             + (half_widths[:, :1] * np.cos(angle))[..., None] * np.array([0.0, 1.0, 0.0])
             + (half_widths[:, 1:] * np.sin(angle))[..., None] * across[:, None])
    return np.concatenate([rings.reshape(-1, 3), path[[0, -1]]]), tube_faces(len(path), sections)


def join(*meshes: Mesh) -> Mesh:
    """Several closed bodies as one mesh, which may overlap."""
    return append_faces(*zip(*meshes, strict=True))


def foot_profile(
    foot_radius: float, ring_height: float, ring_width: float, body_radius: float, body_height: float
) -> np.ndarray:
    """Underside of pottery: recessed base, ring to stand on, step up to where the body begins; all in metres."""
    inside = foot_radius - ring_width
    return fillet(
        [(0.0, ring_height * 0.8), (inside * 0.93, ring_height * 0.8), (inside, 0.0), (foot_radius, 0.0),
         (body_radius, body_height)],
        [0.0, 1.0 * MM, 1.2 * MM, 1.5 * MM, 0.0], steps=3)


def mug(generator: np.random.Generator) -> Mesh:
    """8 to 11 cm tall, walls 2.8 to 4 mm, handle towards +x."""
    uniform = generator.uniform
    height, radius, wall = uniform(82, 109) * MM, uniform(37, 45) * MM, uniform(2.8, 4.0) * MM
    kind = generator.choice(["straight", "tapered", "barrel", "waisted", "tulip"])
    # Radius at the foot, half way up and at the rim, of `radius`.
    low, middle, high = {
        "straight": (1.0, 1.0, 1.0), "tapered": (uniform(0.74, 0.86), uniform(0.88, 0.93), 1.0),
        "barrel": (uniform(0.84, 0.92), uniform(1.03, 1.08), uniform(0.9, 0.97)),
        "waisted": (1.0, uniform(0.88, 0.93), uniform(0.98, 1.03)),
        "tulip": (uniform(0.66, 0.76), uniform(0.93, 0.99), uniform(0.97, 1.03)),
    }[kind]
    start = 5.0 * MM
    outer = smooth_side([(radius * low, start), (radius * (low + 2 * middle) / 3, start + 0.25 * (height - start)),
                         (radius * middle, start + 0.5 * (height - start)), (radius * high, height - wall / 2)], 16)
    if kind == "straight":
        outer = smooth_side([(radius, start), (radius, height - wall / 2)], 12)
    foot = foot_profile(outer[0, 0] - uniform(2.0, 5.0) * MM, uniform(1.5, 3.0) * MM, 3.5 * MM, outer[0, 0], start)
    floor = start + uniform(1.0, 3.0) * MM
    inner = inner_side(outer, wall)
    inner = inner[inner[:, 1] > floor + 9.0 * MM]  # below that the inside rounds into the floor
    bottom_radius = np.interp(floor, outer[:, 1], outer[:, 0]) - wall
    inside = fillet([tuple(inner[0]), (bottom_radius, floor), (0.0, floor)], [0.0, uniform(5, 9) * MM, 0.0])[1:]
    profile = np.concatenate([foot[:-1], outer, rim(outer[-1], inner[-1]), inner[::-1], inside])
    return join(revolve(resample(profile, 8.0 * MM)), mug_handle(generator, outer, wall, height))


def mug_handle(generator: np.random.Generator, outer: np.ndarray, wall: float, height: float) -> Mesh:
    """An ear, a ring or a square loop with room for two to four fingers; its ends are buried in the wall."""
    uniform = generator.uniform
    top, bottom = uniform(0.82, 0.90) * height, uniform(0.14, 0.26) * height
    reach, power, lean = uniform(27, 36) * MM, uniform(2.0, 3.6), uniform(-0.05, 0.28)
    # Half a superellipse: power 2 is an ear, more is squarer; lean shifts its belly up.
    angle = np.linspace(0.5 * np.pi, -0.5 * np.pi, 240)
    loop = np.abs(np.cos(angle)) ** (2 / power) * (1.0 + lean * np.sin(angle)) * reach
    z = (top + bottom) / 2 + (top - bottom) / 2 * np.sign(np.sin(angle)) * np.abs(np.sin(angle)) ** (2 / power)
    wall_x = np.interp(z, outer[:, 1], outer[:, 0]) - 0.5 * wall
    ends = wall_x[[0, -1]]  # follow a straight chord, not the belly, so that the ends stay in the wall
    x = np.interp(z, z[[-1, 0]], ends[::-1]) + loop
    path = np.stack([x, np.zeros_like(x), z], axis=1)
    # The curve's own parameter crowds points where it bends; 44 rings at equal steps along it do not.
    run = np.append(0.0, np.cumsum(np.linalg.norm(np.diff(path, axis=0), axis=1)))
    even = np.linspace(0.0, run[-1], 44)
    path = np.stack([np.interp(even, run, path[:, axis]) for axis in range(3)], axis=1)
    width, depth = uniform(5.0, 7.0) * MM, uniform(3.4, 4.6) * MM
    # Thicker by a third where it joins the wall, fading within 6 mm.
    swell = 1.0 + 0.35 * (np.exp(-even / (6 * MM)) + np.exp(-(run[-1] - even) / (6 * MM)))
    vertices, faces = sweep(path, swell[:, None] * np.array([width, depth]))
    # Bend both end faces to the middle of the wall, which curves and slopes: none may show inside the mug.
    rings = len(vertices) - 2
    ends = np.concatenate([np.arange(TUBE_SECTIONS), np.arange(rings - TUBE_SECTIONS, rings + 2)])
    middle = np.interp(vertices[ends, 2], outer[:, 1], outer[:, 0]) - 0.5 * wall
    vertices[ends, 0] = np.sqrt(middle**2 - vertices[ends, 1] ** 2)
    return vertices, faces


def bowl(generator: np.random.Generator) -> Mesh:
    """12 to 18 cm wide, walls 3 to 4 mm, on a foot ring."""
    uniform = generator.uniform
    radius, wall, ring = uniform(61, 88) * MM, uniform(3.0, 4.0) * MM, uniform(3.0, 7.0) * MM
    height = uniform(0.72, 0.98) * radius
    foot_radius = uniform(0.42, 0.56) * radius
    kind = generator.choice(["round", "deep", "conical", "flared"])
    # Bezier handles of the outside, in widths and heights of the bowl: how soon and how steeply it rises.
    first, second = {
        "round": ((0.62, 0.04), (1.0, 0.40)), "deep": ((0.85, 0.02), (1.03, 0.42)),
        "conical": ((0.42, 0.10), (0.72, 0.50)), "flared": ((0.80, 0.05), (0.72, 0.66)),
    }[kind]
    begin, span, rise = foot_radius * 0.97, radius - foot_radius * 0.97, height - ring - wall / 2
    outer = bezier([(begin, ring), (begin + first[0] * span, ring + first[1] * rise),
                    (begin + second[0] * span, ring + second[1] * rise), (radius, ring + rise)], 24)
    foot = foot_profile(foot_radius, ring, 4.5 * MM, begin, ring)
    inner = inner_side(outer, wall)
    floor = ring + wall * 0.9
    inner = inner[inner[:, 1] > floor + 0.8 * MM]  # the rest is the rounded floor that follows
    middle = bezier([tuple(inner[0]), (0.75 * inner[0, 0], floor), (0.4 * inner[0, 0], floor), (0.0, floor)], 8)[1:]
    profile = np.concatenate([foot[:-1], outer, rim(outer[-1], inner[-1]), inner[::-1], middle])
    return revolve(resample(profile, 11.0 * MM), 56)  # wider than a mug, so more sections for as smooth a rim


def bottle(generator: np.random.Generator) -> Mesh:
    """16 to 24 cm tall with its cap on; round or oval, with one of several shoulders."""
    uniform = generator.uniform
    total, radius, neck = uniform(165, 238) * MM, uniform(27, 39) * MM, uniform(11.0, 15.0) * MM
    cap_height = uniform(13, 22) * MM
    neck_top = total - cap_height * 0.35
    kind = generator.choice(["round", "conical", "long", "soft"])
    shoulder = {"round": uniform(0.55, 0.9) * radius, "conical": uniform(0.7, 1.1) * radius,
                "long": uniform(0.30, 0.38) * total, "soft": uniform(0.9, 1.4) * radius}[kind]
    neck_start = total - cap_height - uniform(4, 9) * MM
    side_top = neck_start - shoulder
    # Two of five have a waist to hold.
    waist = uniform(0.86, 0.94) if generator.random() < 0.4 else 1.0
    side = smooth_side([(radius, 7 * MM), (radius * (1 + waist) / 2, 0.3 * side_top), (radius * waist, 0.55 * side_top),
                        (radius, side_top)], 12)
    turns = {"round": ((1.0, 0.62), (0.45, 1.0)), "conical": ((0.85, 0.15), (0.15, 0.85)),
             "long": ((1.02, 0.42), (0.02, 0.46)), "soft": ((1.0, 0.5), (0.05, 0.72))}[kind]
    curve = bezier([(radius, side_top), *((neck + r * (radius - neck), side_top + h * shoulder) for r, h in turns),
                    (neck, neck_start)], 12)
    under = fillet([(0.0, 3 * MM), (0.55 * radius, 2 * MM), (0.75 * radius, 0.0), (0.93 * radius, 0.0),
                    (radius, 7 * MM)], [0.0, 6 * MM, 2 * MM, 5 * MM, 0.0])
    bead = neck + 1.8 * MM  # the ring below the cap by which bottles are carried when they are filled
    collar = fillet([(neck, neck_start), (neck, neck_start + 1.5 * MM), (bead, neck_start + 2.2 * MM),
                     (bead, neck_start + 3.4 * MM), (neck * 0.97, neck_start + 4.2 * MM), (neck * 0.97, neck_top),
                     (0.0, neck_top)], [0.0, 0.5 * MM, 0.5 * MM, 0.5 * MM, 0.5 * MM, 1 * MM, 0.0], steps=2)
    body, faces = revolve(resample(np.concatenate([under[:-1], side, curve[1:], collar[1:]]), 9.0 * MM))
    if generator.random() < 0.35:  # oval below the neck, round above, as squeezed from a round preform
        upwards = np.clip((body[:, 2] - side_top * 0.9) / (neck_start - side_top * 0.9), 0.0, 1.0)
        flat = uniform(0.62, 0.8)
        body[:, 1] *= flat + (1.0 - flat) * upwards**2 * (3.0 - 2.0 * upwards)
    return join((body, faces), cap(total, cap_height, neck + uniform(1.5, 3.0) * MM))


def cap(top: float, height: float, radius: float) -> Mesh:
    """A ribbed screw cap whose top is at `top`."""
    base = top - height
    profile = fillet([(0.0, base), (radius * 1.02, base), (radius * 1.02, base + 2.5 * MM), (radius, base + 2.8 * MM),
                      (radius * 0.96, top), (0.0, top)], [0.0, 0.4 * MM, 0.4 * MM, 0.0, 2.0 * MM, 0.0], steps=3)
    vertices, faces = revolve(resample(profile, 8.0 * MM))
    ribbed = (vertices[:, 2] > base + 3.5 * MM) & (vertices[:, 2] < top - 2.5 * MM)
    rib = 1.0 - 0.012 * (np.arange(len(vertices)) % 2)  # every other section a tenth of a millimetre or two deeper
    vertices[ribbed, :2] *= rib[ribbed, None]
    return vertices, faces


def can(generator: np.random.Generator) -> Mesh:
    """8 to 13 cm tall: a necked drink can with its ring pull, or a seamed food can with beads."""
    return drink_can(generator) if generator.random() < 0.55 else food_can(generator)


def drink_can(generator: np.random.Generator) -> Mesh:
    """Domed underside, narrow foot, necked top, seam, sunken lid."""
    uniform = generator.uniform
    height, radius = uniform(90, 129) * MM, uniform(26, 33.5) * MM
    foot, lid = 0.74 * radius, uniform(0.80, 0.85) * radius
    top = height - 4 * MM
    outside = fillet(
        [(0.0, 9 * MM), (0.45 * foot, 7 * MM), (0.90 * foot, 0.8 * MM), (foot, 0.0), (1.06 * foot, 1.2 * MM),
         (radius, 10 * MM), (radius, height - uniform(13, 17) * MM), (lid, top), (lid + 0.2 * MM, top + 1 * MM),
         (lid + 1.4 * MM, top + 1.2 * MM), (lid + 1.4 * MM, height), (lid - 0.2 * MM, height),
         (lid - 2.2 * MM, top - 1.5 * MM), (lid - 4.2 * MM, top - 1.5 * MM), (lid - 4.8 * MM, top + 0.4 * MM),
         (0.0, top + 0.4 * MM)],
        [0.0, 20 * MM, 2 * MM, 1 * MM, 2 * MM, 7 * MM, 8 * MM, 1.5 * MM, 0.3 * MM, 0.6 * MM, 0.6 * MM, 0.6 * MM,
         0.8 * MM, 0.6 * MM, 0.5 * MM, 0.0], steps=3)
    pull = ring_pull(0.36 * lid, top + 1.1 * MM)  # set 0.2 mm into the lid, below the seam
    return join(revolve(resample(outside, 9.0 * MM)), pull)


def ring_pull(length: float, height: float) -> Mesh:
    """A flat rounded plate on the lid, pointing to +y."""
    half = fillet([(0.0, -0.9 * MM), (length, -0.9 * MM), (length, 0.9 * MM), (0.0, 0.9 * MM)],
                  [0.0, 0.7 * MM, 0.7 * MM, 0.0], steps=2)
    plate, faces = revolve(half, 28)
    plate[:, 0] *= 0.62  # a disk becomes an oval
    return plate + np.array([0.0, 0.35 * length, height]), faces


def food_can(generator: np.random.Generator) -> Mesh:
    """Straight wall with rolled beads, a double seam at both ends, sunken lids."""
    uniform = generator.uniform
    height, radius = uniform(82, 125) * MM, uniform(30, 39) * MM
    z = np.linspace(6 * MM, height - 6 * MM, 40)  # of the wall between both seams
    beads, depth = generator.integers(0, 6), uniform(0.5, 0.9) * MM
    middle = np.abs(z - height / 2) < 0.3 * height  # beads run over three fifths of the wall
    wave = depth * np.sin(np.pi * beads * (z - 0.2 * height) / (0.6 * height)) ** 2 * middle if beads else 0.0 * z
    if not beads:  # a plain wall needs fewer rings
        z, wave = z[::3], wave[::3]
    seam, deep = radius + 1.3 * MM, uniform(2.5, 4.0) * MM
    bottom = fillet([(0.0, deep), (radius - 4 * MM, deep), (radius - 2.0 * MM, deep * 0.9), (radius - 1.2 * MM, 0.0),
                     (seam, 0.0), (seam, 3 * MM), (radius, 3.6 * MM), (radius, 6 * MM)],
                    [0.0, 1 * MM, 1 * MM, 0.6 * MM, 0.6 * MM, 0.6 * MM, 0.4 * MM, 0.0], steps=2)
    top = bottom[::-1] * np.array([1.0, -1.0]) + np.array([0.0, height])
    side = np.stack([radius - wave, z], axis=1)
    return revolve(resample(np.concatenate([bottom[:-1], side, top[1:]]), 9.0 * MM))


FAMILIES = dict(zip(CATEGORIES, (mug, bowl, bottle, can), strict=True))
