"""Where a hand touches an object.  Two meshes -> signed distances, crossing edges, force closure.  Paper: Sec. 3.2.

The paper's grasps come from GrabNet, whose weights may not be shipped; these measures let grasp_search.py do without.
Lattice points on the surface -> DistanceField (how far is a point, on which side) -> crossing_edges (does a mesh pass
through) and closure_effort (would the contacts hold).
"""

from functools import cached_property
from itertools import chain

import numpy as np
from scipy import ndimage
from scipy.optimize import nnls
from scipy.spatial import cKDTree

# Of a distance field.  Measured on a mug, within 4 mm of its surface: the grid errs by 0.08 mm on average, by less than
# 0.5 mm in 99 of 100 places.  Nodes 2.5 mm apart would err by 0.16 and 1.0 mm, 0.9 mm apart by 0.07 and 0.42 mm, in
# twice the time.
CELL = 0.00125  # metres between grid nodes
MARGIN = 0.02  # metres of free space around the mesh inside the grid; beyond it distances are lower bounds
MAX_CELLS = 2_500_000  # 10 MB and half a second; a large object gets larger cells
SAMPLE_SPACING = 0.0015  # metres between the points that stand for the surface in the search tree; at 3 mm 6 % of the
# signs near the surface are wrong, at 0.8 mm nothing is gained
MAX_SAMPLES = 400_000
EXACT_BAND = 1.8  # cells: nearer to the surface than this, grid values are exact point-triangle distances.  Three of
# them cover every node that interpolation next to the surface reads; without the band 16 % of the signs are wrong
SIGN_BAND = 0.9  # cells: nearer than this the nearest face decides on the side, farther off the flood fill does
FRICTION = 0.6  # of dry skin on glazed or painted things
ROD_BALLS = (0.015, 0.027, 0.05)  # metres, radii of the balls in which a rod is looked for: of up to 6, 11 and 20 mm
LEAST_ROD = 0.01  # of the surface; less is a knob or a rim
ROD_POINTS = 2000  # that stand for the surface there: a mug's handle has 130 of them
CONE_SIDES = 6  # of the pyramid that stands for a friction cone: 9 % more effort than 16 sides, in half the time


def sample_faces(triangles: np.ndarray, spacing: float) -> tuple[np.ndarray, np.ndarray]:
    """Cover every triangle with a regular lattice, at least one point each.

    triangles  (F, 3, 3)  metres
    spacing               metres, largest step of the lattice along the two shorter edges
    returns    (S, 3) points and (S,) the face of each
    """
    edges = np.roll(triangles, -1, axis=1) - triangles
    # Start at the corner opposite the longest edge: a long thin face then gets few points across its width.
    corner = (np.linalg.norm(edges, axis=2).argmax(axis=1) + 2) % 3
    row = np.arange(len(triangles))
    origin = triangles[row, corner]
    side_u = triangles[row, (corner + 1) % 3] - origin
    side_v = triangles[row, (corner + 2) % 3] - origin
    count_u = np.maximum(1, np.ceil(np.linalg.norm(side_u, axis=1) / spacing)).astype(int)
    count_v = np.maximum(1, np.ceil(np.linalg.norm(side_v, axis=1) / spacing)).astype(int)
    face = np.repeat(row, count_u * count_v)
    within = np.arange(len(face)) - np.repeat(np.cumsum(count_u * count_v) - count_u * count_v, count_u * count_v)
    u = (within // count_v[face] + 0.5) / count_u[face]
    v = (within % count_v[face] + 0.5) / count_v[face]
    u = u * (1 - v)  # rows shrink towards the far corner: the whole triangle is covered, slivers too
    return origin[face] + u[:, None] * side_u[face] + v[:, None] * side_v[face], face


def closest_on_triangles(points: np.ndarray, triangles: np.ndarray) -> np.ndarray:
    """Nearest point of triangle i to point i.

    points     (N, 3)
    triangles  (N, 3, 3)
    returns    (N, 3)
    """
    a, b, c = triangles[:, 0], triangles[:, 1], triangles[:, 2]
    normal = np.cross(b - a, c - a)
    area = np.maximum(np.einsum("ni,ni->n", normal, normal), 1e-30)
    offset = points - a
    v = np.einsum("ni,ni->n", np.cross(offset, c - a), normal) / area  # barycentric weights of b and c
    w = np.einsum("ni,ni->n", np.cross(b - a, offset), normal) / area
    best = a + v[:, None] * (b - a) + w[:, None] * (c - a)
    outside = np.flatnonzero((v < 0) | (w < 0) | (v + w > 1))
    nearest = np.full(len(outside), np.inf)
    for start, end in ((a, b), (b, c), (c, a)):
        start, side, target = start[outside], (end - start)[outside], points[outside]
        along = np.einsum("ni,ni->n", target - start, side) / np.maximum(np.einsum("ni,ni->n", side, side), 1e-30)
        candidate = start + np.clip(along, 0, 1)[:, None] * side
        distance = np.linalg.norm(target - candidate, axis=1)
        closer = distance < nearest
        best[outside[closer]] = candidate[closer]
        nearest[closer] = distance[closer]
    return best


class DistanceField:
    """Signed distance to a mesh: a fast grid for the search, exact point-triangle distances for the final measures.

    vertices  (V, 3) metres    faces (F, 3), outward winding where the mesh is closed; some with an area
    Inside is what cannot be reached from outside through gaps wider than about two cells, so small holes of scans do
    no harm; within a cell of the surface the winding of the nearest face decides, which keeps thin walls solid.
    """

    def __init__(self, vertices: np.ndarray, faces: np.ndarray):
        self.triangles = np.asarray(vertices, dtype=np.float64)[np.asarray(faces)]
        normals = np.cross(self.triangles[:, 1] - self.triangles[:, 0], self.triangles[:, 2] - self.triangles[:, 0])
        length = np.linalg.norm(normals, axis=1)
        keep = length > 1e-14  # faces without area have no normal, and their neighbours cover them
        self.triangles, self.normals = self.triangles[keep], normals[keep] / length[keep, None]
        area = length[keep].sum() / 2
        self.spacing = max(SAMPLE_SPACING, np.sqrt(area / MAX_SAMPLES))
        self.samples, self.sample_face = sample_faces(self.triangles, self.spacing)
        self.tree = cKDTree(self.samples, balanced_tree=False)
        low, high = self.triangles.min(axis=(0, 1)) - MARGIN, self.triangles.max(axis=(0, 1)) + MARGIN
        self.cell = max(CELL, float(np.prod(high - low) / MAX_CELLS) ** (1 / 3))
        self.origin = low
        self.shape = np.ceil((high - low) / self.cell).astype(int) + 1
        self.grid = self._build_grid()

    def _build_grid(self) -> np.ndarray:
        """Signed distance at every node, flat, float32: to the nearest sample, exact in a band around the surface."""
        nodes = np.round((self.samples - self.origin) / self.cell).astype(int)
        flat = np.ravel_multi_index(nodes.T, self.shape)
        occupied = np.zeros(np.prod(self.shape), dtype=bool)
        occupied[flat] = True
        sample_of_node = np.zeros(np.prod(self.shape), dtype=np.int64)
        sample_of_node[flat] = np.arange(len(flat))
        index = ndimage.distance_transform_edt(~occupied.reshape(self.shape), return_distances=False,
                                               return_indices=True)
        nearest = sample_of_node[np.ravel_multi_index(index.reshape(3, -1), self.shape)]
        position = np.stack(np.meshgrid(*(np.arange(n) for n in self.shape), indexing="ij"), axis=-1).reshape(-1, 3)
        position = self.origin + self.cell * position
        distance = np.linalg.norm(position - self.samples[nearest], axis=1)
        near = np.flatnonzero(distance < EXACT_BAND * self.cell)
        exact, face, toward = self._closest(position[near])
        distance[near] = exact
        # What is outside reaches the grid's border through free nodes.
        free = (distance > SIGN_BAND * self.cell).reshape(self.shape)
        regions, _ = ndimage.label(free)
        border = np.ones(self.shape, dtype=bool)
        border[1:-1, 1:-1, 1:-1] = False
        outside = np.isin(regions, regions[border]) & free
        self._orient_normals(outside)
        sign = np.where(outside.ravel(), 1.0, -1.0)
        close = distance[near] <= SIGN_BAND * self.cell
        sign[near[close]] = np.where(np.einsum("ni,ni->n", toward, self.normals[face])[close] >= 0, 1.0, -1.0)
        return np.ascontiguousarray((sign * distance).astype(np.float32))

    def _orient_normals(self, outside: np.ndarray) -> None:
        """Turn the normals of faces that look into the solid (scans with mixed winding)."""
        centre, step = self.triangles.mean(axis=1), 1.5 * self.cell  # beyond the nodes that count as surface
        sides = []
        for direction in (1, -1):
            node = np.round((centre + direction * step * self.normals - self.origin) / self.cell).astype(int)
            sides.append(outside[tuple(np.clip(node, 0, self.shape - 1).T)])
        self.normals[~sides[0] & sides[1]] *= -1

    def _closest(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Distance (N,), face (N,) and vector from the surface (N, 3) of the nearest triangle.

        The triangles of the nearest samples are looked at, so another one may be nearer, by 0.03 mm at most on a mug.
        """
        distance, face, away = self._closest_of_nearest_samples(points, 4)
        # Nearest to an edge: the face beyond it is equally near and may be the one that looks at the point.
        unsure = np.flatnonzero(np.abs(np.einsum("ni,ni->n", away, self.normals[face])) < 0.99 * distance)
        distance[unsure], face[unsure], away[unsure] = self._closest_of_nearest_samples(points[unsure], 20)
        return distance, face, away

    def _closest_of_nearest_samples(self, points: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """As _closest, among the faces of the `count` samples nearest to each point."""
        _, index = self.tree.query(points, k=min(count, len(self.samples)))
        candidates = self.sample_face[index.reshape(len(points), min(count, len(self.samples)))]
        repeated = np.repeat(points, candidates.shape[1], axis=0)
        away = repeated - closest_on_triangles(repeated, self.triangles[candidates.ravel()])
        away = away.reshape(*candidates.shape, 3)
        distance = np.linalg.norm(away, axis=2)
        # Of equally near faces, only the one that looks straightest at the point knows the right sign: it is preferred
        # by up to a thousandth of the distance.
        looking = np.abs(np.einsum("nki,nki->nk", away, self.normals[candidates]))
        choice = (distance - 1e-3 * looking).argmin(axis=1)
        row = np.arange(len(points))
        return distance[row, choice], candidates[row, choice], away[row, choice]

    def signed_distance(self, points: np.ndarray) -> np.ndarray:
        """Trilinear look-up; off the grid a lower bound, so that steps of this length never pass the surface.

        points   (..., 3) metres
        returns  (...,) metres, negative inside
        """
        local = (points - self.origin) / self.cell
        clamped = np.clip(local, 0, self.shape - 1.000001)  # the last node has none beyond it
        base = clamped.astype(np.int64)
        fx, fy, fz = np.moveaxis((clamped - base).astype(np.float32), -1, 0)
        stride_x, stride_y = self.shape[1] * self.shape[2], self.shape[2]
        flat = base[..., 0] * stride_x + base[..., 1] * stride_y + base[..., 2]
        grid = self.grid
        along_z = [grid[flat + o] * (1 - fz) + grid[flat + o + 1] * fz for o in (0, stride_y, stride_x,
                                                                                 stride_x + stride_y)]
        low_x, high_x = along_z[0] * (1 - fy) + along_z[1] * fy, along_z[2] * (1 - fy) + along_z[3] * fy
        value = low_x * (1 - fx) + high_x * fx
        beyond = np.linalg.norm(local - clamped, axis=-1) * self.cell
        return np.where(beyond > 1e-5, np.hypot(value, beyond), value)

    @cached_property
    def rods(self) -> tuple[cKDTree, np.ndarray, np.ndarray]:
        """Surface points as a search tree, and what rod_parts says of them."""
        some = slice(None, None, 1 + len(self.samples) // ROD_POINTS)
        points = self.samples[some]
        return cKDTree(points), *rod_parts(points, self.normals[self.sample_face[some]])

    def exact(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Exact signed distance (N,), metres, and outward unit normal (N, 3) of the nearest face, for points (N, 3)."""
        distance, face, away = self._closest(points)
        far = distance > SIGN_BAND * self.cell  # there the flood fill knows better than a single face
        sign = np.where(np.einsum("ni,ni->n", away, self.normals[face]) >= 0, 1.0, -1.0)
        sign[far] = np.where(self.signed_distance(points[far]) >= 0, 1.0, -1.0)
        return sign * distance, self.normals[face]


def rod_parts(points: np.ndarray, normals: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What a hand may close around: handles, grips, stems and necks, by the shape alone.

    points, normals  (N, 3) evenly over the surface, metres; unit and outward
    returns          (N,) bool: the point is on a rod, and (N, 3) unit: the rod's axis there
    In a ball around a point of a rod the normals look to all sides (they cancel, and two directions are as good as
    equal), but none along the axis; and they look away from the middle, which those of a hollow wall do not.
    """
    squared = (points**2).sum(axis=1)
    apart = squared[:, None] + squared - 2 * points @ points.T
    outer = [np.einsum("ni,nj->nij", of, of).reshape(-1, 9) for of in (normals, points)]
    columns = np.concatenate([normals, points, np.einsum("ni,ni->n", points, normals)[:, None], *outer], axis=1)
    on_rod, axes = np.zeros(len(points), dtype=bool), np.zeros((len(points), 3))
    for radius in ROD_BALLS:
        near = apart < radius**2
        mean = near.astype(np.float32) @ columns.astype(np.float32) / near.sum(axis=1)[:, None]
        normal, middle, outward = mean[:, :3], mean[:, 3:6], mean[:, 6]
        share, directions = np.linalg.eigh(mean[:, 7:16].reshape(-1, 3, 3))
        axis = directions[:, :, 0]
        outward = outward - np.einsum("ni,ni->n", middle, normal)
        spread = mean[:, 16:].reshape(-1, 3, 3) - middle[:, :, None] * middle[:, None]
        across = np.trace(spread, axis1=1, axis2=2) - np.einsum("ni,nij,nj->n", axis, spread, axis)
        round_about = (np.linalg.norm(normal, axis=1) < 0.3) & (share[:, 0] < 0.15) & (share[:, 1] > 0.15)
        found = round_about & (outward > 0.6 * np.sqrt(np.maximum(across, 0))) & ~on_rod
        on_rod, axes[found] = on_rod | found, axis[found]
    return on_rod & (on_rod.mean() >= LEAST_ROD), axes


def mesh_edges(faces: np.ndarray) -> np.ndarray:
    """Each edge of a mesh once: faces (F, 3) -> (E, 2) vertex indices, the smaller first."""
    ends = np.sort(faces[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2), axis=1).astype(np.int64)
    # Two indices as one integer: np.unique of numbers is much faster than of rows.
    return np.stack(np.divmod(np.unique(ends[:, 0] * 2 ** 32 + ends[:, 1]), 2 ** 32), axis=1)


def crossing_edges(vertices: np.ndarray, edges: np.ndarray, field: DistanceField) -> int:
    """Number of edges of a mesh that pass through the surface of the field's mesh.

    A depth measured at vertices misses a finger pushed through a wall thinner than the finger; its edges do not.
    vertices  (V, 3) metres    edges (E, 2) from mesh_edges
    """
    start, end = vertices[edges[:, 0]], vertices[edges[:, 1]]
    middle, half = (start + end) / 2, np.linalg.norm(end - start, axis=1) / 2
    # Candidates first by the grid, with its error, then faces of which a sample lies in the ball around the edge.
    near = np.flatnonzero(np.abs(field.signed_distance(middle)) < half + 0.5 * field.cell)
    if not len(near):
        return 0
    balls = field.tree.query_ball_point(middle[near], half[near] + field.spacing)
    edge = np.repeat(near, [len(ball) for ball in balls])
    face = field.sample_face[np.fromiter(chain.from_iterable(balls), dtype=np.int64, count=len(edge))]
    edge, face = np.divmod(np.unique(edge * 2 ** 32 + face), 2 ** 32)
    hit = segments_hit_triangles(start[edge], end[edge], field.triangles[face])
    return len(np.unique(edge[hit]))


def segments_hit_triangles(start: np.ndarray, end: np.ndarray, triangles: np.ndarray) -> np.ndarray:
    """Whether segment i meets triangle i: start, end (N, 3), triangles (N, 3, 3) -> (N,) bool.  Moeller 1997."""
    direction, a = end - start, triangles[:, 0]
    side_1, side_2 = triangles[:, 1] - a, triangles[:, 2] - a
    cross = np.cross(direction, side_2)
    determinant = np.einsum("ni,ni->n", side_1, cross)
    safe = np.where(np.abs(determinant) < 1e-18, np.inf, determinant)
    offset = start - a
    u = np.einsum("ni,ni->n", offset, cross) / safe
    turned = np.cross(offset, side_1)
    v = np.einsum("ni,ni->n", direction, turned) / safe
    t = np.einsum("ni,ni->n", side_2, turned) / safe
    return np.isfinite(safe) & (u >= 0) & (v >= 0) & (u + v <= 1) & (t >= 0) & (t <= 1)


def closure_effort(points: np.ndarray, normals: np.ndarray, friction: float = FRICTION) -> float:
    """How hard the contacts must press to resist any push or twist: infinite without force closure.

    points   (C, 3) metres; normals (C, 3) unit, out of the object
    returns  the largest sum of contact forces that balances a unit wrench; torques are taken about the contacts' mean
             and divided by their root-mean-square distance from it, so the number has no unit
    Every wrench is a positive mix of the six axes and minus their sum, so seven non-negative least squares decide.
    Source: Nguyen 1988; Ferrari and Canny 1992.
    """
    if len(points) < 3:  # two points with friction cannot resist a twist about the line through them
        return np.inf
    # Any axis that is not along the normal gives two tangents.
    helper = np.where(np.abs(normals[:, :1]) < 0.7, [[1.0, 0.0, 0.0]], [[0.0, 1.0, 0.0]])
    tangent = np.cross(normals, helper)
    tangent /= np.linalg.norm(tangent, axis=1, keepdims=True)
    bitangent = np.cross(normals, tangent)
    angle = np.arange(CONE_SIDES) * 2 * np.pi / CONE_SIDES
    ring = np.cos(angle)[:, None, None] * tangent + np.sin(angle)[:, None, None] * bitangent
    force = (-normals + friction * ring).reshape(-1, 3)
    arm = points - points.mean(axis=0)
    arm = arm / max(np.sqrt((arm ** 2).sum(axis=1).mean()), 1e-6)
    wrenches = np.concatenate([force, np.cross(np.tile(arm, (CONE_SIDES, 1)), force)], axis=1).T  # (6, C*sides)
    effort = 0.0
    for target in np.concatenate([np.eye(6), -np.ones((1, 6)) / np.sqrt(6)]):
        forces, residual = nnls(wrenches, target, maxiter=50 * wrenches.shape[1])
        if residual > 1e-6:
            return np.inf
        effort = max(effort, float(forces.sum()))
    return effort
