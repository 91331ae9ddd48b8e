"""GrabNet: grasps from learned weights.  Object mesh + MANO + GrabNet's files -> list[Grasp].  Paper: Sec. 3.2.

The object is turned at random and described by its distances to 4096 fixed points.  CoarseNet makes a hand of these and
16 random numbers, RefineNet corrects it three times by the distances of its skin to the object (Taheri et al. 2020).
The hands then pass through the same measures and the same acceptance as those of the built-in search (grasp.py,
grasp_search.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation
from torch import Tensor, nn
from torch.nn.functional import leaky_relu
from trimesh.remesh import subdivide

from hoi.common.arrays import box_centre
from hoi.common.files import read_npz, sha256_of
from hoi.common.tensors import load_model_file, strict_load
from hoi.geometry.contact import DistanceField
from hoi.geometry.grasp import POOL, Grasp, choose_grasps, measure_grasp
from hoi.geometry.grasp_search import reach_faults
from hoi.geometry.hand import HandModel, HandParams
from hoi.geometry.mano import MANO_VERTICES
from hoi.geometry.objects import ObjectMesh

FILES = ("coarsenet.pt", "refinenet.pt", "bps.npz")
WHERE = (
    "Their licence (non-commercial research) forbids shipping them here: coarsenet.pt and refinenet.pt come with the "
    "registration at https://grab.is.tue.mpg.de, bps.npz lies in the official GrabNet code. Without GrabNet, the "
    "default, grasps come from the built-in search, which needs no file."
)
TRAINING_EXTRAS = "rhm_train."  # a MANO model that the official trainer may leave in refinenet.pt
# Of the official code, on which the weights depend: sizes of the networks, slope of their leaky ReLUs, passes of
# RefineNet, vertices picked of the object, and that a large object is shrunk to a fixed size first.
BASIS_SIZE, LATENT_SIZE, POSE_SIZE, WIDTH, HIDDEN = 4096, 16, 96, 512, 256
SLOPE = 0.2
REFINEMENTS = 3
POINT_COUNT = 10_000
LARGEST_NORM, RESCALED_NORM = 0.3, 0.08  # metres, of the object's farthest vertex
# Ours, by trial.  Several turns of the object share the draws, since one of them may be bad for all hands.
MAX_DRAWS = 1024
HANDS_PER_VIEW = 16  # random numbers tried on each random turn of the object


class ResidualBlock(nn.Module):
    """Two layers and a shortcut.  The published files have fc3, the shortcut's layer, in every block."""

    def __init__(self, size_in: int, size_out: int = WIDTH) -> None:
        super().__init__()
        self.fc1, self.bn1 = nn.Linear(size_in, HIDDEN), nn.BatchNorm1d(HIDDEN)
        self.fc2, self.bn2 = nn.Linear(HIDDEN, size_out), nn.BatchNorm1d(size_out)
        self.fc3 = nn.Linear(size_in, size_out)

    def forward(self, x: Tensor) -> Tensor:
        """(B, size_in) -> (B, size_out).  The shortcut passes a leaky ReLU of its own, as in the official code."""
        main = self.bn2(self.fc2(leaky_relu(self.bn1(self.fc1(x)), SLOPE)))
        return leaky_relu(leaky_relu(self.fc3(x), SLOPE) + main, SLOPE)


class CoarseNet(nn.Module):
    """Random numbers and the object's distances -> a hand near the object.  Names are those of coarsenet.pt."""

    def __init__(self) -> None:
        super().__init__()
        # The encoder serves training only (enc_bn0 not even that); it is here so that the file loads whole.
        encoded = BASIS_SIZE + 9 + 3  # distances, the wrist's rotation matrix and place
        self.enc_bn0, self.enc_bn1 = nn.BatchNorm1d(BASIS_SIZE), nn.BatchNorm1d(encoded)
        self.enc_rb1, self.enc_rb2 = ResidualBlock(encoded), ResidualBlock(encoded + WIDTH)
        self.enc_mu, self.enc_var = nn.Linear(WIDTH, LATENT_SIZE), nn.Linear(WIDTH, LATENT_SIZE)
        decoded = LATENT_SIZE + BASIS_SIZE
        self.dec_bn1 = nn.BatchNorm1d(BASIS_SIZE)
        self.dec_rb1, self.dec_rb2 = ResidualBlock(decoded), ResidualBlock(decoded + WIDTH)
        self.dec_pose, self.dec_trans = nn.Linear(WIDTH, POSE_SIZE), nn.Linear(WIDTH, 3)

    def forward(self, latents: Tensor, bps: Tensor) -> tuple[Tensor, Tensor]:
        """latents (B, 16) standard normal, bps (B, 4096) metres -> pose (B, 96), see rotations_of; transl (B, 3)."""
        x0 = torch.cat([latents, self.dec_bn1(bps)], dim=1)
        x = self.dec_rb1(x0)
        x = self.dec_rb2(torch.cat([x0, x], dim=1))
        return self.dec_pose(x), self.dec_trans(x)


class RefineNet(nn.Module):
    """A hand and the distances of its skin to the object -> a better hand.  Names are those of refinenet.pt."""

    def __init__(self) -> None:
        super().__init__()
        size_in = MANO_VERTICES + POSE_SIZE + 3
        self.bn1 = nn.BatchNorm1d(MANO_VERTICES)
        self.rb1, self.rb2, self.rb3 = (ResidualBlock(size) for size in (size_in, size_in + WIDTH, size_in + WIDTH))
        self.out_p, self.out_t = nn.Linear(WIDTH, POSE_SIZE), nn.Linear(WIDTH, 3)

    def forward(
        self, pose: Tensor, transl: Tensor, distances_of: Callable[[Tensor, Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """pose (B, 96) and transl (B, 3) refined.

        distances_of  (pose, transl) -> (B, 778) metres from every skin vertex of that hand to the object
        Between the passes pose stays as it comes out; it is made orthonormal only to build the hand.
        """
        for _ in range(REFINEMENTS):
            x0 = torch.cat([self.bn1(distances_of(pose, transl)), pose, transl], dim=1)
            x = self.rb1(x0)
            x = self.rb2(torch.cat([x, x0], dim=1))  # x first, unlike CoarseNet
            x = self.rb3(torch.cat([x, x0], dim=1))
            pose, transl = pose + self.out_p(x), transl + self.out_t(x)
        return pose, transl


@dataclass(frozen=True)
class GrabNet:
    """Both networks, ready for inference; basis (4096, 3) metres; digest of the three files."""

    coarse: CoarseNet
    refine: RefineNet
    basis: np.ndarray
    digest: str


@dataclass(frozen=True)
class PreparedObject:
    """An object as GrabNet wants it, and the way back: prepared = rotation @ (scale * canonical - offset).

    points    (10000, 3) float64, metres, vertices of the subdivided mesh
    scale     1 unless the object is large;  offset (3,) metres;  rotation (3, 3)
    """

    points: np.ndarray
    scale: float
    offset: np.ndarray
    rotation: np.ndarray

    def to_canonical(self, points: np.ndarray) -> np.ndarray:
        """(..., 3) of the prepared object -> of the object's canonical frame."""
        return (points @ self.rotation + self.offset) / self.scale


def load_grabnet(folder: str | Path) -> GrabNet:
    """Read coarsenet.pt, refinenet.pt and bps.npz, strictly and without running code from them.

    Raises FileNotFoundError that says which files are missing, why they are not here and what the default is;
    ValueError for a file that is damaged, holds NaN, or lacks or adds anything but refinenet.pt's rhm_train.*.
    """
    folder = Path(folder)
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"GrabNet needs {', '.join(FILES)} in {folder}; missing: {', '.join(missing)}. {WHERE}")
    coarse, refine, basis = (folder / name for name in FILES)
    digest = " ".join(sha256_of(path) for path in (coarse, refine, basis))
    return GrabNet(_load_network(CoarseNet, coarse), _load_network(RefineNet, refine), _load_basis(basis), digest)


def _load_network(network: type[nn.Module], path: Path) -> nn.Module:
    """One network with the weights of its file, ready for inference on the CPU."""
    with torch.device("meta"):  # no random start that the file replaces anyway
        module = network()
    state = {name: tensor for name, tensor in load_model_file(path)[0].items() if not name.startswith(TRAINING_EXTRAS)}
    bad = sorted(name for name, tensor in state.items() if not tensor.isfinite().all())
    if bad:
        raise ValueError(f"{path}: {len(bad)} tensors contain NaN or infinity, {bad[0]} first")
    module.to_empty(device="cpu")
    strict_load(module, state, path)
    return module.requires_grad_(False).eval()


def _load_basis(path: Path) -> np.ndarray:
    """The fixed points (4096, 3), metres, rounded to float32 as the official code has them."""
    arrays = read_npz(path, "set of basis points")
    basis = arrays.get("basis")
    if basis is None or basis.shape != (BASIS_SIZE, 3) or not np.isfinite(basis).all():
        found = {name: value.shape for name, value in arrays.items()}
        raise ValueError(f"{path} should hold finite points 'basis' of shape ({BASIS_SIZE}, 3), it holds {found}")
    return basis.astype(np.float32).astype(np.float64)


def rotations_of(pose: np.ndarray) -> np.ndarray:
    """pose (B, 96) -> (B, 16, 3, 3), global orientation first, then MANO's finger joints.

    Six numbers a joint are a 3x2 matrix in row-major order, the first two columns of the rotation, not yet orthonormal.
    Source: Zhou et al. 2019, in GrabNet's order.
    """
    columns = pose.reshape(len(pose), 16, 3, 2).astype(np.float64)
    first = columns[..., 0] / np.linalg.norm(columns[..., 0], axis=-1, keepdims=True)
    second = columns[..., 1] - (first * columns[..., 1]).sum(axis=-1, keepdims=True) * first
    second /= np.linalg.norm(second, axis=-1, keepdims=True)
    return np.stack([first, second, np.cross(first, second)], axis=-1)


def pose_of(rotations: np.ndarray) -> np.ndarray:
    """(B, 16, 3, 3) -> (B, 96), the inverse of rotations_of."""
    return rotations[..., :2].reshape(len(rotations), POSE_SIZE)


def prepare_object(vertices: np.ndarray, faces: np.ndarray, generator: np.random.Generator) -> PreparedObject:
    """Scale (large objects only), centre, turn at random, subdivide and pick points.

    vertices (V, 3) metres, faces (F, 3)
    What counts as size is the vertex farthest from the origin, before centring; angles about x, y and z are uniform.
    """
    largest = float(np.linalg.norm(vertices, axis=1).max())
    scale = RESCALED_NORM / largest if largest > LARGEST_NORM else 1.0
    offset = scale * box_centre(vertices)
    rotation = Rotation.from_euler("xyz", generator.uniform(0, 2 * np.pi, 3)).as_matrix()  # about x first: Rz Ry Rx
    points = (scale * vertices - offset) @ rotation.T
    # Coarse meshes would be described by their corners alone.
    while len(points) < POINT_COUNT:
        points, faces = subdivide(points, faces)
    return PreparedObject(points[generator.choice(len(points), POINT_COUNT, replace=False)], scale, offset, rotation)


@torch.no_grad()
def draw_hands(grabnet: GrabNet, hand: HandModel, prepared: PreparedObject, latents: np.ndarray) -> list[HandParams]:
    """Hands for one prepared object, in the object's canonical frame.

    latents  (B, 16), standard normal
    A hand cannot shrink with a large object: its skin point nearest to the object is put where that point of the
    scaled object is on the real one.  Without a scale every point of the hand goes back exactly.
    """
    count, tree = len(latents), cKDTree(prepared.points)
    mean_shape = np.zeros(10)

    def build(pose: Tensor, transl: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        rotations = rotations_of(pose.numpy())
        turns = Rotation.from_matrix(rotations.reshape(-1, 3, 3)).as_rotvec().reshape(count, 48)
        vertices, joints, _ = hand.pose_batch(turns[:, :3], turns[:, 3:], transl.numpy(), mean_shape)
        return rotations, turns, vertices, joints

    def distances_of(pose: Tensor, transl: Tensor) -> Tensor:
        return torch.tensor(tree.query(build(pose, transl)[2])[0], dtype=torch.float32)

    bps = torch.tensor(tree.query(grabnet.basis)[0], dtype=torch.float32)
    pose, transl = grabnet.coarse(torch.tensor(latents, dtype=torch.float32), bps.expand(count, -1))
    # CoarseNet's six numbers a joint are no rotation yet; RefineNet starts from one.
    start = torch.tensor(pose_of(rotations_of(pose.numpy())), dtype=torch.float32)
    pose, transl = grabnet.refine(start, transl, distances_of)
    rotations, turns, vertices, joints = build(pose, transl)
    anchors = vertices[np.arange(count), tree.query(vertices)[0].argmin(axis=1)]
    orients = Rotation.from_matrix(prepared.rotation.T @ rotations[:, 0]).as_rotvec()
    wrists = (joints[:, 0] - anchors) @ prepared.rotation + prepared.to_canonical(anchors)
    # The model turns about its wrist, so that joint alone says how far the turned hand has to move.
    moves = wrists - (joints[:, 0] - transl.numpy())
    return [HandParams(*row, mean_shape) for row in zip(orients, turns[:, 3:], moves, strict=True)]


def find_grabnet_grasps(
    object_mesh: ObjectMesh, hand: HandModel, grabnet: GrabNet, count: int, generator: np.random.Generator,
    max_draws: int = MAX_DRAWS, field: DistanceField | None = None,
) -> tuple[list[Grasp], str]:
    """Draw hands until there are enough to choose from, then choose good and different grasps.

    hand       a MANO hand: GrabNet's numbers mean nothing to another one
    count      grasps wanted, at least 1;  max_draws  hands drawn at most
    field      distance field of object_mesh, if there is one already
    returns    accepted grasps as find_grasps gives them, and a sentence: how many were drawn, and why others were not
               taken (a hand can have several faults)
    Raises ValueError for another hand.  The same generator state gives the same grasps.
    """
    if hand.name != "mano" or len(hand.weights) != MANO_VERTICES:
        raise ValueError(f"GrabNet needs the MANO hand, this is {hand.name!r}: give the MANO file too")
    field = field or DistanceField(object_mesh.vertices, object_mesh.faces)
    table = object_mesh.vertices[:, 2].min()
    found: list[Grasp] = []
    reasons: Counter[str] = Counter()
    for drawn in range(HANDS_PER_VIEW, max(max_draws, HANDS_PER_VIEW) + 1, HANDS_PER_VIEW):
        prepared = prepare_object(object_mesh.vertices, object_mesh.faces, generator)
        latents = generator.standard_normal((HANDS_PER_VIEW, LATENT_SIZE))
        for hand_params in draw_hands(grabnet, hand, prepared, latents):
            grasp = measure_grasp(hand_params, hand, field)
            faults = grasp.faults + reach_faults(hand_params, hand, field, table)
            reasons.update(faults)
            found += [] if faults else [grasp]
        # As in find_grasps: after a quarter of the draws what was asked for is enough, without a choice.
        if len(found) >= (POOL * count if drawn < max_draws / 4 else count):
            break
    note = f"{object_mesh.object_id}: GrabNet drew {drawn} hands, {len(found)} were accepted"
    if reasons:
        note += "; of the others " + ", ".join(f"{number} {reason}" for reason, number in reasons.most_common())
    return choose_grasps(found, hand, count), note
