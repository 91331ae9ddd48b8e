"""Surface normals of photographs.  Sensor depth, depth files or an estimated depth -> normals.  Paper: Sec. 3.3.

The paper estimates an inverse depth with MiDaS (DPT-Hybrid) and takes its Sobel gradients.  Depth in metres deserves
better: the inverse depth of a plane is linear in the pixel, so fitting it linearly in a small window gives the plane's
normal exactly, with holes and borders of the region left out of the fit.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter

from hoi.common.choices import DPT_HYBRID
from hoi.common.files import read_npy
from hoi.conditions import normals_from_inverse_depth, scale_inverse_depth
from hoi.sources.frame import Crop, Rejected, box_around, read_or_reject, read_picture

# Of the Gaussian window, pixels of the depth picture.  On a tilted plane at 0.6 m whose depths have a millimetre of
# noise normals are 2 degrees off (5.6 with a sigma of 1.5, 0.8 with 4); a wider window would mix a finger, 13 pixels
# wide at DexYCB's distance, with its neighbours.
FIT_SIGMA_PX, FIT_REACH_PX = 2.5, 7
FARTHEST = 0.3  # metres from a region's median depth; what lies beyond is a fault of the sensor, not hand or object
MOST_DEPTH = 1e9  # in whatever unit; squares of more would leave the range of floats


def normals_from_depth(depth: np.ndarray, label_map: np.ndarray, intrinsics: np.ndarray) -> np.ndarray:
    """Normals of hand and object from metric depth, each region fitted by itself.

    depth       (H, W)     metres, 0 = unknown
    label_map   (H, W)     0 background, 1 hand, 2 object
    intrinsics  (3, 3)     pixels
    returns     (H, W, 3)  unit, outward, camera frame; zero in the background and where too little depth is known
    A plane n X = d has the inverse depth 1/z = (K^-T n / d) (u, v, 1), linear in the pixel (u, v); so the normal is
    K^T times the coefficients of the fit, turned to the camera.
    """
    normals = np.zeros((*depth.shape, 3))
    for label in (1, 2):
        region = label_map == label
        known = region & (depth > 0)
        if known.any():
            known &= np.abs(depth - np.median(depth[known])) < FARTHEST
        if known.sum() >= 3:
            left, top, right, bottom = box_around(region, FIT_REACH_PX)
            box = np.s_[top:bottom, left:right]  # the window reaches no farther
            shifted = np.asarray(intrinsics, dtype=np.float64) - [[0, 0, left], [0, 0, top], [0, 0, 0]]
            fit = _fit_inverse_depth(depth[box], known[box]) @ shifted
            length = np.linalg.norm(fit, axis=-1, keepdims=True)
            fit = -np.divide(fit, length, out=np.zeros_like(fit), where=length > 0)
            normals[box][region[box]] = fit[region[box]]
    return normals


def _fit_inverse_depth(depth: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Coefficients of 1/z = a u + b v + c around each pixel by weighted least squares: (H, W, 3), 0 if undetermined."""
    height, width = depth.shape
    v, u = np.mgrid[:height, :width] - np.array([[[height / 2]], [[width / 2]]])  # centred: smaller numbers
    weight = known.astype(np.float64)
    w = np.divide(1.0, depth, out=np.zeros(depth.shape), where=known)
    total, *moments = (
        gaussian_filter(weight * values, FIT_SIGMA_PX, mode="constant", radius=FIT_REACH_PX)
        for values in (1.0, u, v, w, u * u, u * v, v * v, u * w, v * w)
    )
    enough = total > 0.05  # of the window's weight: with less, a few pixels decide
    mu, mv, mw, uu, uv, vv, uw, vw = (np.divide(m, total, out=np.zeros_like(m), where=enough) for m in moments)
    uu, uv, vv, uw, vw = uu - mu * mu, uv - mu * mv, vv - mv * mv, uw - mu * mw, vw - mv * mw
    determinant = uu * vv - uv * uv
    enough &= determinant > 0.01  # pixels to the fourth; along a line there is no slope across it
    numerators = vv * uw - uv * vw, uu * vw - uv * uw
    a, b = (np.divide(x, determinant, out=np.zeros_like(x), where=enough) for x in numerators)
    c = mw - a * (mu + width / 2) - b * (mv + height / 2)
    return np.where(enough[..., None], np.stack([a, b, c], axis=-1), 0.0)


def resize_normals(normals: np.ndarray, size: int) -> np.ndarray:
    """(H, W, 3) -> (size, size, 3) by cubic interpolation, not made unit again, as in the release."""
    channels = [Image.fromarray(np.ascontiguousarray(normals[..., k], dtype=np.float32)) for k in range(3)]
    resized = [np.asarray(channel.resize((size, size), Image.Resampling.BICUBIC)) for channel in channels]
    return np.stack(resized, axis=-1)


def read_depth_file(folder: str | Path, name: str) -> tuple[np.ndarray, bool]:
    """Depth of one picture, from folder/<name>.npy or folder/<name>.png.

    .npy     (H, W) float: relative inverse depth, larger = nearer, in MiDaS's range of hundreds to thousands
    .png     (H, W) 16 bit: millimetres, 0 = unknown
    returns  (H, W) float64 and whether it is metres (then 0 = unknown)
    Raises Rejected when there is neither file or it is damaged.
    """
    # Below the folder that was given, also where a CSV names its pictures by absolute paths or from above itself.
    stem = Path(folder).joinpath(*(part for part in Path(name).parts if part not in (Path(name).anchor, "..")))
    npy, png = Path(f"{stem}.npy"), Path(f"{stem}.png")
    if npy.is_file():
        values = read_or_reject(npy, "the depth file", lambda path: read_npy(path, "depth file")).astype(np.float64)
    elif png.is_file():
        values = read_picture(png, "the depth file", None).astype(np.float64) / 1000
    else:
        raise Rejected("the depth file is missing", f"{npy} or .png")
    if values.ndim != 2 or not values.size or not (np.abs(values) < MOST_DEPTH).all():
        raise Rejected("the depth file is damaged", f"{folder}/{name} is {values.shape}, expected finite (H, W)")
    return values, not npy.is_file()


def normals_of_crop(
    depth: np.ndarray, in_metres: bool, crop: Crop, labels: np.ndarray, intrinsics: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Normals of hand and object in a crop, from a depth of the whole picture or of the square crop.

    depth, in_metres  as of read_depth_file; (H, W), or (S, S) of the crop in any resolution
    labels            (H, W), of the whole picture
    intrinsics        (3, 3), of the whole picture; without a camera metres say no more than a relative depth
    returns           (size, size, 3), and where they are known (size, size) bool
    Raises Rejected for a depth of another size.
    """
    is_whole = depth.shape == labels.shape
    if not is_whole and depth.shape[0] != depth.shape[1]:
        raise Rejected("the depth file has another size", f"{depth.shape}: neither the picture's nor a square")
    depth = crop.square(depth) if is_whole else depth
    if not in_metres or intrinsics is None:
        inverse_depth = scale_inverse_depth(depth) if in_metres else depth
        normals = resize_normals(normals_from_inverse_depth(inverse_depth), crop.size)
        return normals, np.ones(normals.shape[:2], dtype=bool)
    square = replace(crop, size=len(depth))
    normals = normals_from_depth(depth, square.cut_map(labels), square.intrinsics(intrinsics))
    normals = resize_normals(normals, crop.size)
    length = np.sqrt(np.einsum("hwk,hwk->hw", normals, normals))
    known = length > 0.1  # where a region ends, interpolation mixes normals with nothing
    normals[known] /= length[known, None]  # most of a crop is background
    return normals, known


class DepthEstimator:
    """Inverse depth of a picture by a DPT network of the optional package transformers.

    model   folder of a saved DPTForDepthEstimation, or its name at the Hugging Face hub (downloaded once)
    device  see choose_device; always in float32: normals are the depth's slopes, which 16 bits turn into steps
    Raises ValueError when the package is missing, the model cannot be loaded, or is no DPT network.
    """

    def __init__(self, model: str = DPT_HYBRID, device: str = "cpu") -> None:
        try:
            from transformers import DPTForDepthEstimation
        except ImportError as error:
            raise ValueError(
                "estimating depth needs the package transformers: pip install transformers; or choose --normals "
                "rendered, sensor-depth or depth-files"
            ) from error
        try:
            network, loading = DPTForDepthEstimation.from_pretrained(model, output_loading_info=True)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"no DPT depth network could be loaded from {model!r} ({error}); expected a folder written by "
                f"save_pretrained, or a name at the hub such as {DPT_HYBRID}"
            ) from error
        if loading["missing_keys"]:
            missing = sorted(loading["missing_keys"])
            raise ValueError(f"{model} lacks {len(missing)} weights of its network, the first is {missing[0]}")
        self.network, self.device = network.float().to(device).eval().requires_grad_(False), device
        self.side = int(network.config.image_size)

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """image (H, W, 3) uint8 -> relative inverse depth (side, side), larger = nearer; side is 384 for DPT-Hybrid.

        Resized to side x side by cubic interpolation and shifted to [-1, 1]: MiDaS's own preparation of a square crop.
        """
        import torch

        pixels = torch.from_numpy(np.array(image)).to(self.device).permute(2, 0, 1)[None].float() / 255
        pixels = torch.nn.functional.interpolate(pixels, (self.side, self.side), mode="bicubic", align_corners=False)
        with torch.inference_mode():
            return self.network(pixel_values=(pixels - 0.5) / 0.5).predicted_depth[0].cpu().double().numpy()
