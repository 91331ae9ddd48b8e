"""Small datasets in the original layouts, with rendered hands and objects, so that the truth is known.

The layouts are written from their public descriptions; hands are posed by the formulas of MANO in numpy, never by the
project's own hand.
"""

import numpy as np
import trimesh
from PIL import Image
from scipy.spatial.transform import Rotation

from hoi.geometry.camera import Camera
from hoi.geometry.hand import HandParams
from hoi.geometry.render import Renderer

HEIGHT, WIDTH = 480, 640
FOCAL, CENTRE_X, CENTRE_Y = 613.0762329, 313.0279846, 245.0086517
INTRINSICS = np.array([[FOCAL, 0, CENTRE_X], [0, 611.9989624, CENTRE_Y], [0, 0, 1]])
SERIALS = ("836212060125", "839512060362", "840412060917", "841412060263", "932122060857", "932122060861",
           "932122061900", "932122062010")  # fmt: skip
SUBJECTS = ("20200709-subject-01", "20200813-subject-02")
MANOPTH_TIPS = {"right": (745, 317, 444, 556, 673), "left": (745, 317, 445, 556, 673)}
NATIVE_TO_FINGERS = [0, 13, 14, 15, 16, 1, 2, 3, 17, 4, 5, 6, 18, 10, 11, 12, 19, 7, 8, 9, 20]
PARENTS = (-1, 0, 1, 2, 0, 4, 5, 0, 7, 8, 0, 10, 11, 0, 13, 14)  # of MANO's joints
HAND_GREY, OBJECT_RED, TABLE_GREEN = (190, 150, 130), (200, 30, 30), (40, 110, 60)


def mano_in_numpy(arrays, pose, mirror=False):
    """MANO written out in float64: blend shapes, regressed joints, forward chain, skinning (Romero et al. 2017)."""
    flip = np.array([-1.0, 1.0, 1.0]) if mirror else np.ones(3)
    shaped = arrays["v_template"] + arrays["shapedirs"] @ pose.hand_betas[:arrays["shapedirs"].shape[2]]
    shaped = shaped * flip  # the left hand is a hand of its own here: mirrored at rest, then posed
    joints = arrays["J_regressor"] @ shaped
    local = Rotation.from_rotvec(np.concatenate([pose.global_orient[None], pose.hand_pose.reshape(15, 3)])).as_matrix()
    if "posedirs" in arrays:
        shaped = shaped + (arrays["posedirs"] @ (local[1:] - np.eye(3)).ravel()) * flip
    world = [None] * 16
    for joint, parent in enumerate(PARENTS):
        step = np.eye(4)
        step[:3, :3], step[:3, 3] = local[joint], joints[joint] - (joints[parent] if parent >= 0 else 0.0)
        world[joint] = step if parent < 0 else world[parent] @ step
    posed_joints = np.array([m[:3, 3] for m in world])
    moved = np.einsum("jab,vjb->vja", np.array(world)[:, :3, :3], shaped[:, None] - joints) + posed_joints
    vertices = np.einsum("vj,vja->va", arrays["weights"], moved)
    return vertices + pose.transl, posed_joints + pose.transl


def blocky_mano():
    """Arrays of MANO's sizes that look like a right hand of ellipsoids: the palm and each finger bone."""
    generator = np.random.default_rng(11)
    sphere = trimesh.creation.icosphere(subdivisions=1)  # 42 vertices
    bases = np.zeros((16, 3))
    ends = np.zeros((16, 3))
    ends[0] = [-0.08, 0, 0]
    for finger, z in enumerate((0.025, 0.0, -0.042, -0.021)):  # index, middle, little, ring: joints 1, 4, 7, 10
        for bone in range(3):
            joint = 1 + 3 * finger + bone
            bases[joint] = [-0.088 - 0.03 * bone, 0, z]
            ends[joint] = bases[joint] - [0.028, 0, 0]
    for bone in range(3):
        bases[13 + bone] = [-0.025 - 0.025 * bone, -0.005, 0.035 + 0.018 * bone]
        ends[13 + bone] = bases[13 + bone] + [-0.024, 0, 0.017]
    vertices, faces, weights = [], [], []
    regressor = np.zeros((16, 778))
    for joint in range(16):
        axis = ends[joint] - bases[joint]
        radii = [0.55 * np.linalg.norm(axis), 0.011, 0.04 if joint == 0 else 0.009]
        turn = Rotation.align_vectors([axis / np.linalg.norm(axis)], [[1.0, 0, 0]])[0]
        ellipsoid = turn.apply(sphere.vertices * radii) + (bases[joint] + ends[joint]) / 2
        nearest = np.argsort(np.linalg.norm(ellipsoid - bases[joint], axis=1))[:3]
        regressor[joint, 42 * joint + nearest] = 1 / 3
        vertices.append(ellipsoid)
        faces.append(sphere.faces + 42 * joint)
        weights.append(np.tile(np.eye(16)[joint], (42, 1)))
    # The rest of MANO's 778 vertices belongs to no face: copies of the tips, where hand packages look for them.
    rest = 778 - 16 * 42
    tips = np.array([15, 3, 6, 12, 9])[np.arange(rest) % 5]
    vertices.append(ends[tips] + generator.normal(size=(rest, 3)) * 1e-3)
    weights.append(np.eye(16)[tips])
    vertices = np.concatenate(vertices)
    shapedirs = np.zeros((778, 3, 10))
    for k in range(10):  # size, length and so on: linear in the place, so shapes stay closed
        shapedirs[:, :, k] = 0.03 * vertices @ (np.eye(3) if k == 0 else 0.3 * generator.normal(size=(3, 3)))
    return {
        "v_template": vertices, "f": np.concatenate(faces).astype(np.uint32), "shapedirs": shapedirs,
        "posedirs": np.zeros((778, 3, 135)), "J_regressor": regressor, "weights": np.concatenate(weights),
        "kintree_table": np.array([[4294967295, *PARENTS[1:]], range(16)], dtype=np.int64),
        "hands_components": np.linalg.qr(generator.normal(size=(45, 45)))[0],
        "hands_mean": generator.normal(size=45) * 0.1,
    }


def write_mano(folder):
    """MANO_RIGHT.npz in a folder of arrays: what read_mano also takes; returns the right hand's arrays and the path."""
    arrays = blocky_mano()
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "hand.npz", **arrays)
    return arrays, folder / "hand.npz"


def posed(arrays, global_orient, fingers, transl, betas, side):
    """Vertices (778, 3) and native joints (16, 3) of either hand, float64, by the formulas of the paper."""
    pose = HandParams(global_orient, fingers, transl, betas, side)
    return mano_in_numpy(arrays, pose, mirror=side == "left")


def mean_pose(arrays, side):
    turn = np.tile([1.0, -1.0, -1.0], 15) if side == "left" else 1.0
    return arrays["hands_mean"] * turn, arrays["hands_components"] * turn


def write_models(folder, names=("025_mug", "003_cracker_box")):
    """YCB models, off the origin and open to no view, as .obj of some thousand faces."""
    meshes = {}
    for k, name in enumerate(names):
        mesh = trimesh.creation.box([0.06, 0.09, 0.12]) if k else trimesh.creation.cylinder(0.04, 0.09, sections=48)
        mesh = mesh.subdivide()
        mesh.apply_translation([0.01, -0.02, 0.03])
        (folder / name).mkdir(parents=True)
        mesh.export(folder / name / "textured_simple.obj")
        meshes[name] = np.asarray(mesh.vertices), np.asarray(mesh.faces)
    return meshes


def project(points, intrinsics=INTRINSICS):
    homogeneous = points @ intrinsics.T
    return homogeneous[:, :2] / homogeneous[:, 2:]


def draw(hand_vertices, hand_faces, objects, intrinsics=INTRINSICS, height=HEIGHT, width=WIDTH):
    """Labels (0 background, -1 hand, 1, 2 ... object k), depth in metres, picture; everything in camera coordinates."""
    renderer = Renderer("numpy")
    camera = Camera(intrinsics, np.eye(4), height, width)
    depth, labels = np.full((height, width), np.inf), np.zeros((height, width), dtype=int)
    layers = [(k + 1, vertices, faces) for k, (vertices, faces) in enumerate(objects)]
    if hand_vertices is not None:
        layers.append((-1, hand_vertices, hand_faces))
    for label, vertices, faces in layers:
        piece = renderer.render(vertices, faces, None, None, camera)
        wins = (piece.depth > 0) & (piece.depth < depth)
        depth[wins], labels[wins] = piece.depth[wins], label
    depth[labels == 0] = 1.2  # a wall
    picture = np.zeros((height, width, 3), dtype=np.uint8)
    picture[:] = TABLE_GREEN
    picture[labels == -1] = HAND_GREY
    picture[labels > 0] = OBJECT_RED
    return labels, depth, picture


def write_dexycb(root, arrays, frames=2, sides=("right", "left"), serials=SERIALS[:2], seed=0):
    """Subject k has one sequence, of side k; frame 1 of the first camera has no hand. Truth by frame name."""
    generator = np.random.default_rng(seed)
    meshes = write_models(root / "models")
    (root / "calibration/intrinsics").mkdir(parents=True)
    for serial in SERIALS:
        (root / f"calibration/intrinsics/{serial}_640x480.yml").write_text(
            f"color:\n  fx: {FOCAL}\n  fy: 611.9989624\n  ppx: {CENTRE_X}\n  ppy: {CENTRE_Y}\ndepth:\n  fx: 1.0\n"
        )
    (root / "calibration/extrinsics_20200702_151821").mkdir()
    tuples = "".join(f"  '{serial}': !!python/tuple\n" + "".join(f"  - {x}\n" for x in np.eye(3, 4).ravel())
                     for serial in (*SERIALS, "apriltag"))  # fmt: skip
    (root / "calibration/extrinsics_20200702_151821/extrinsics.yml").write_text(
        f"extrinsics:\n{tuples}master: '{SERIALS[2]}'\n")
    truth = {}
    for subject, side in zip(SUBJECTS, sides, strict=False):
        calibration, sequence = f"{subject}_{side}", f"{subject[:8]}_141754"
        betas = generator.normal(size=10)
        (root / f"calibration/mano_{calibration}").mkdir()
        numbers = "".join(f"- {x!r}\n" for x in betas.tolist())
        (root / f"calibration/mano_{calibration}/mano.yml").write_text(f"betas: !!python/tuple\n{numbers}")
        folder = root / subject / sequence
        folder.mkdir(parents=True)
        listed = "".join(f"- '{serial}'\n" for serial in SERIALS)
        (folder / "meta.yml").write_text(
            f"extrinsics: 20200702_151821\nmano_calib:\n- {calibration}\nmano_sides:\n- {side}\nnum_frames: {frames}\n"
            f"serials:\n{listed}ycb_grasp_ind: 1\nycb_ids:\n- 2\n- 14\n"
        )
        for serial in serials:
            for frame in range(frames):
                has_hand = not (serial == serials[0] and frame == 1)
                name = f"{subject}/{sequence}/{serial}/{frame:06d}"
                truth[name] = _write_dexycb_frame(
                    folder / serial, frame, arrays, meshes, side, betas, generator, has_hand
                )
    return truth


def _write_dexycb_frame(folder, frame, arrays, meshes, side, betas, generator, has_hand):
    folder.mkdir(exist_ok=True)
    mean, components = mean_pose(arrays, side)
    coefficients = generator.normal(size=45) * 0.15
    orient = generator.normal(size=3) * 0.4 + [1.2, 0, 0]
    transl = np.array([0.08, 0.0, 0.7]) + generator.normal(size=3) * 0.02
    vertices, joints = posed(arrays, orient, mean + coefficients @ components, transl, betas, side)
    native = np.concatenate([joints, vertices[list(MANOPTH_TIPS[side])]])
    joint_3d = native[NATIVE_TO_FINGERS].astype(np.float32)
    poses = np.zeros((2, 3, 4))
    for k, place in enumerate(([-0.15, 0.0, 0.8], [0.02, 0.03, 0.75])):
        poses[k, :, :3] = Rotation.from_rotvec(generator.normal(size=3)).as_matrix()
        poses[k, :, 3] = place
    poses = poses.astype(np.float32)
    objects = [(meshes[name][0] @ pose[:, :3].T.astype(float) + pose[:, 3], meshes[name][1])
               for name, pose in zip(("003_cracker_box", "025_mug"), poses, strict=True)]  # fmt: skip
    labels, depth, picture = draw(vertices if has_hand else None, arrays["f"].astype(int) if side == "right" else
                                  arrays["f"].astype(int)[:, ::-1], objects)  # fmt: skip
    seg = np.choose(labels + 1, [255, 0, 2, 14]).astype(np.uint8)
    pose_m = np.concatenate([orient, coefficients, transl]).astype(np.float32)[None]
    nothing = {"pose_m": np.zeros((1, 51), np.float32), "joint_3d": np.full((1, 21, 3), -1, np.float32),
               "joint_2d": np.full((1, 21, 2), -1, np.float32)}  # fmt: skip
    found = {"pose_m": pose_m, "joint_3d": joint_3d[None], "joint_2d": project(joint_3d)[None].astype(np.float32)}
    np.savez_compressed(folder / f"labels_{frame:06d}.npz", seg=seg, pose_y=poses, **(found if has_hand else nothing))
    Image.fromarray(picture).save(folder / f"color_{frame:06d}.jpg", quality=95)
    Image.fromarray(np.rint(depth * 1000).astype(np.uint16)).save(folder / f"aligned_depth_to_color_{frame:06d}.png")
    return {"seg": seg, "pose_y": poses[1], "pose_m": pose_m[0], "joint_3d": joint_3d, "joint_2d": found["joint_2d"][0],
            "vertices": vertices, "betas": betas, "side": side, "fingers": mean + coefficients @ components,
            "object": objects[1], "has_hand": has_hand, "depth": depth}  # fmt: skip


def write_official_csv(folder):
    """A CSV as the authors' script writes it: JPEG masks, boxes as floats, a second header, one row of OakInk."""
    (folder / "mask").mkdir(parents=True)
    labels = np.zeros((480, 640), dtype=np.uint8)
    labels[150:250, 100:300], labels[200:400, 280:420] = 2, 1
    generator = np.random.default_rng(5)
    pictures = {
        "image": generator.integers(0, 255, (480, 640, 3), dtype=np.uint8),
        "mask": np.array([[0, 0, 0], [128, 128, 128], [153, 51, 51]], dtype=np.uint8)[labels],
        "seg": np.where(labels > 0, 255, 0).astype(np.uint8),
        "skeleton": np.where((labels == 1)[..., None], np.uint8(200), np.uint8(0)) * np.ones(3, dtype=np.uint8),
    }
    for name, picture in pictures.items():
        Image.fromarray(picture).save(folder / "mask" / f"{name}.jpg", quality=95)
    header = "image,skeleton,top,bottom,left,right,sentence,seg,mask\n"
    row = "mask/image.jpg,mask/skeleton.jpg,{box},{sentence},mask/seg.jpg,mask/mask.jpg\n"
    handover = "oakink/A01_0004_0002/1/north_1.png" + row.format(box="1,2,3,4", sentence="x")[len("mask/image.jpg"):]
    (folder / "train.csv").write_text(
        header + row.format(box="100.0,450.0,50.0,470.0", sentence="A hand is grasping a toy car") + header
        + row.format(box="100,450,50,470", sentence='"A red car, in a hand"')
        + row.format(box="100,900,50,470", sentence="A hand is grasping a mug") + handover
        + row.format(box="100,450,50,470", sentence="A hand is grasping a mug").replace("image.jpg", "gone.jpg")
    )
    return labels
