"""Turn a rigged hand (glTF binary) into the built-in hand's arrays, in MANO's form.

    python tools/convert_hand.py path/to/right.glb hoi/assets/hand/builtin_hand.npz

The source is the generic right hand of the WebXR Input Profiles assets (MIT, see hoi/assets/hand/LICENSE.md): 25 joints
named after the WebXR hand input specification, skin weights, metres.  Prints the joint errors, sizes and file size.
The result has the field names of a MANO file, so that smplx runs both through one code path, plus three of its own:
tip_vertices (5,), flexion_axes (15, 3) and thumb_abduction_axis (3,).
"""

from __future__ import annotations

import argparse
import json
import struct
from pathlib import Path

import numpy as np
from scipy.optimize import nnls
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation

# MANO's order of the fingers; the WebXR name of each of its 16 joints.
FINGERS = ("index-finger", "middle-finger", "pinky-finger", "ring-finger")
PHALANGES = ("phalanx-proximal", "phalanx-intermediate", "phalanx-distal")
JOINTS = ("wrist", *(f"{finger}-{phalanx}" for finger in FINGERS for phalanx in PHALANGES),
          "thumb-metacarpal", "thumb-phalanx-proximal", "thumb-phalanx-distal")
TIPS = ("thumb-tip", "index-finger-tip", "middle-finger-tip", "ring-finger-tip", "pinky-finger-tip")
PARENTS = (-1, 0, 1, 2, 0, 4, 5, 0, 7, 8, 0, 10, 11, 0, 13, 14)
# MANO's (x, y, z) is the file's (y, x, -z): fingers along -x, back of the hand +y, thumb +z, palm facing -y.
FILE_TO_MANO = np.array([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, -1.0]])
# Where MANO has its wrist, to a millimetre: the origin then lies in the palm, near the knuckles.
WRIST = np.array([0.096, 0.006, 0.006])
# The file has no axis for this one: palmar abduction, found by looking at the opposed thumb.
THUMB_ABDUCTION_AXIS = np.array([0.48, 0.21, 0.85])
DTYPES = {5121: np.uint8, 5123: np.uint16, 5125: np.uint32, 5126: np.float32}
WIDTHS = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4, "MAT4": 16}


def read_glb(path: Path) -> tuple[dict, bytes]:
    """The JSON chunk and the binary chunk of a glTF 2.0 binary file."""
    data = path.read_bytes()
    if data[:4] != b"glTF":
        raise ValueError(f"{path} starts with {data[:4]!r}, expected b'glTF': give the binary (.glb) form")
    json_length = struct.unpack_from("<I", data, 12)[0]
    return json.loads(data[20:20 + json_length]), data[20 + json_length + 8:]


def accessor(header: dict, binary: bytes, index: int) -> np.ndarray:
    """One attribute as an array (count, components); tightly packed buffers only."""
    info = header["accessors"][index]
    view = header["bufferViews"][info["bufferView"]]
    width = WIDTHS[info["type"]]
    start = view.get("byteOffset", 0) + info.get("byteOffset", 0)
    values = np.frombuffer(binary, DTYPES[info["componentType"]], info["count"] * width, start)
    return values.reshape(info["count"], width)


def mano_joint_of(name: str) -> int:
    """Which of the 16 joints moves the skin that the file binds to this joint."""
    if name.endswith("finger-metacarpal"):
        return 0  # MANO's palm is one piece
    return JOINTS.index(name.replace("-tip", "-phalanx-distal"))


def merge_duplicates(vertices: np.ndarray, weights: np.ndarray, faces: np.ndarray):
    """One vertex per position: texture seams would otherwise be cuts in the skin."""
    _, first, inverse = np.unique(np.round(vertices, 7), axis=0, return_index=True, return_inverse=True)
    order = np.argsort(first)  # keep the file's order, neighbours compress better
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    faces = rank[inverse.ravel()][faces]
    distinct = (faces != np.roll(faces, 1, axis=1)).all(axis=1)
    return vertices[first[order]], weights[first[order]], faces[distinct]


def shape_directions(vertices: np.ndarray, weights: np.ndarray, joints: np.ndarray, tips: np.ndarray) -> np.ndarray:
    """Displacements (V, 3, 3) per unit of: overall size (5 %), finger length (6 %), thickness (6 %).

    Each bone says where it would move a point; the skin weights blend the bones, as they do in posing.
    Size keeps the wrist in place; length stretches along the bones beyond each knuckle; thickness pushes away from the
    bones (on the palm, away from the plane of the wrist and the knuckles).
    """
    length = np.zeros((len(vertices), 3))
    thickness = np.zeros((len(vertices), 3))
    knuckles = joints[[1, 4, 7, 10]]
    normal = np.cross(joints[1] - joints[0], joints[7] - joints[0])
    normal /= np.linalg.norm(normal)
    palm_offset = ((vertices - knuckles.mean(axis=0)) @ normal)[:, None] * normal
    thickness += weights[:, :1] * palm_offset
    for base, tip in zip((1, 4, 7, 10, 13), tips[[1, 2, 4, 3, 0]], strict=True):
        stretched = np.zeros(3)  # how far the joint at the start of this bone has moved
        for joint in range(base, base + 3):
            bone = (joints[joint + 1] if joint < base + 2 else tip) - joints[joint]
            along = (vertices - joints[joint]) @ bone / (bone @ bone)
            if joint == base:
                along = np.maximum(along, 0.0)  # behind the knuckle the palm stays
            weight = weights[:, joint:joint + 1]
            length += weight * (stretched + along[:, None] * bone)
            thickness += weight * (vertices - joints[joint] - along[:, None] * bone)
            stretched = stretched + bone
    return np.stack([0.05 * (vertices - joints[0]), 0.06 * length, 0.06 * thickness], axis=-1)


def joint_directions(joints: np.ndarray) -> np.ndarray:
    """What shape_directions means for the joints themselves, (16, 3, 3)."""
    length = np.zeros((16, 3))
    for base in (1, 4, 7, 10, 13):
        length[base:base + 3] = joints[base:base + 3] - joints[base]
    return np.stack([0.05 * (joints - joints[0]), 0.06 * length, np.zeros((16, 3))], axis=-1)


def joint_regressor(vertices: np.ndarray, directions: np.ndarray, joints: np.ndarray, neighbours: int) -> np.ndarray:
    """Non-negative weights (16, V), rows summing to one, that place each joint among nearby skin in every shape."""
    regressor = np.zeros((len(joints), len(vertices)))
    tree = cKDTree(vertices)
    for row, joint, moved in zip(regressor, joints, joint_directions(joints), strict=True):
        near = tree.query(joint, k=neighbours)[1]
        # One block of equations for the rest shape, three for one unit of each coefficient, one for the sum.
        system = np.vstack([vertices[near].T, *directions[near].transpose(2, 1, 0), np.ones(neighbours)])
        solution = nnls(system, np.concatenate([joint, moved.T.ravel(), [1.0]]))[0]
        row[near] = solution / solution.sum()
    return regressor


def convert(source: Path) -> dict[str, np.ndarray]:
    """All arrays of the built-in hand; float64 except faces and parents."""
    header, binary = read_glb(source)
    attributes = header["meshes"][0]["primitives"][0]
    read = {name: accessor(header, binary, i) for name, i in attributes["attributes"].items()}
    names = [header["nodes"][node]["name"] for node in header["skins"][0]["joints"]]
    node = {n["name"]: n for n in header["nodes"]}

    weights = np.zeros((len(read["POSITION"]), 16))
    for slot in range(4):
        target = np.array([mano_joint_of(name) for name in names])[read["JOINTS_0"][:, slot]]
        np.add.at(weights, (np.arange(len(weights)), target), read["WEIGHTS_0"][:, slot].astype(np.float64))
    weights /= weights.sum(axis=1, keepdims=True)
    faces = accessor(header, binary, attributes["indices"]).reshape(-1, 3).astype(np.int64)
    vertices, weights, faces = merge_duplicates(read["POSITION"].astype(np.float64) @ FILE_TO_MANO.T, weights, faces)
    # FILE_TO_MANO keeps handedness (determinant +1), so the winding stays.

    def place(name: str) -> np.ndarray:
        return FILE_TO_MANO @ np.array(node[name]["translation"])

    joints, tips = np.array([place(name) for name in JOINTS]), np.array([place(name) for name in TIPS])
    shift = WRIST - joints[0]
    vertices, joints, tips = vertices + shift, joints + shift, tips + shift
    directions = shape_directions(vertices, weights, joints, tips)
    local_x = Rotation.from_quat([node[name]["rotation"] for name in JOINTS[1:]]).as_matrix()[:, :, 0]
    return {
        "v_template": vertices, "f": faces, "weights": weights, "shapedirs": directions,
        "J_regressor": joint_regressor(vertices, directions, joints, neighbours=120),
        "kintree_table": np.array([PARENTS, range(16)]),
        "tip_vertices": cKDTree(vertices).query(tips)[1],
        "flexion_axes": -local_x @ FILE_TO_MANO.T,
        "thumb_abduction_axis": THUMB_ABDUCTION_AXIS / np.linalg.norm(THUMB_ABDUCTION_AXIS),
        "joints": joints, "tips": tips,
    }


def main(args: argparse.Namespace) -> None:
    hand = convert(args.source)
    joints, tips, vertices = hand.pop("joints"), hand.pop("tips"), hand["v_template"]
    print(f"{len(vertices)} vertices, {len(hand['f'])} faces")
    error = np.abs(hand["J_regressor"] @ vertices - joints).max()
    shaped = np.abs(np.einsum("jv,vdk->jdk", hand["J_regressor"], hand["shapedirs"]) - joint_directions(joints))
    print(f"joint regressor: {1e3 * error:.4f} mm at rest, {1e3 * shaped.max((0, 1))} mm per unit of each coefficient")
    print(f"tip vertex to tip joint: {1e3 * np.linalg.norm(vertices[hand['tip_vertices']] - tips, axis=1)} mm")
    small = {name: array.astype(np.int16 if array.dtype.kind == "i" else np.float32) for name, array in hand.items()}
    small["shapedirs"] = hand["shapedirs"].astype(np.float16)  # at most 10 mm: steps below 0.01 mm
    np.savez_compressed(args.target, **small)
    print(f"{args.target}: {args.target.stat().st_size / 1024:.0f} KB")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="rigged right hand, .glb, joints named after WebXR")
    parser.add_argument("target", type=Path, help=".npz to write")
    return parser.parse_args()


if __name__ == "__main__":
    main(parse_args())
