"""The Inception network of FID, sFID and Inception Score.  Pictures + the published weight file -> features.

It is torchvision's inception_v3 with the pooling of the TensorFlow graph of 2015 and 1008 classes.  The weights are
pt_inception-2015-12-05-6726825d.pth of pytorch-fid (torch-fidelity publishes the same under another name).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision.models.inception import Inception3, InceptionE

from hoi.common.tensors import load_model_file, strict_load

INPUT_SIDE = 299  # pixels
NUM_CLASSES = 1008  # of the 2015 graph: ImageNet's 1000 and eight unused
SPATIAL_CHANNELS = 7  # of Mixed_6d, whose first channels are branch1x1: TensorFlow's mixed_6/conv, 7 x 17 x 17 = 2023
# Blocks whose pooling branch averages; the graph leaves zero padding out of the average.
AVERAGING = ("Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e", "Mixed_7b")


class MaxPooledE(InceptionE):
    """The last block pools by maximum where torchvision's averages."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, 2048, 8, 8) -> (B, 2048, 8, 8)"""
        others = super().forward(x)[:, : -self.branch_pool.conv.out_channels]
        return torch.cat([others, self.branch_pool(F.max_pool2d(x, 3, stride=1, padding=1))], dim=1)


def leave_out_padding(branch_pool: nn.Module, inputs: tuple[Tensor]) -> Tensor:
    """Forward pre-hook: turn 3x3 averages that counted the zero padding into averages of what is there."""
    averages = inputs[0]
    share = F.avg_pool2d(torch.ones_like(averages[:1, :1]), 3, stride=1, padding=1)  # of each window: 1, 6/9 or 4/9
    return averages / share


class Inception(nn.Module):
    """Pictures (B, 3, 299, 299) in [-1, 1] -> {"pool": (B, 2048), "spatial": (B, 2023)}.

    pool     global average before the classifier: FID, Inception Score
    spatial  the first seven channels of Mixed_6d with their positions: sFID
    """

    def __init__(self) -> None:
        super().__init__()
        self.network = Inception3(NUM_CLASSES, aux_logits=False, init_weights=False)
        self.network.Mixed_7c = MaxPooledE(2048)
        for name in AVERAGING:
            self.network.get_submodule(name).branch_pool.register_forward_pre_hook(leave_out_padding)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, 299, 299) in [-1, 1] -> the features by name."""
        x = images
        for name, module in self.network.named_children():  # in the order of the network
            x = module(x)
            if name == "Mixed_6d":
                spatial = x[:, :SPATIAL_CHANNELS].flatten(1)  # (B, 7 * 17 * 17)
            if name == "avgpool":  # before the classifier
                break
        return {"pool": x.flatten(1), "spatial": spatial}

    def log_probabilities(self, pool: np.ndarray) -> np.ndarray:
        """Of the 1008 classes from pool features (N, 2048), in float64; without the bias, as ADM and torch-fidelity."""
        logits = torch.from_numpy(pool).double() @ self.network.fc.weight.double().cpu().T
        return logits.log_softmax(dim=1).numpy()


def load_inception(file: str | Path) -> Inception:
    """Read the published weights, strictly.

    Raises FileNotFoundError or ValueError for a file that is missing, unreadable or of another network, such as
    torchvision's own inception_v3 (1000 classes) or the TorchScript archive of StyleGAN's metrics.
    """
    if not Path(file).is_file():
        raise FileNotFoundError(
            f"no Inception weights at {file}. FID, sFID and IS need pt_inception-2015-12-05-6726825d.pth, which "
            "pytorch-fid publishes; it is too large to ship"
        )
    state, _ = load_model_file(file)
    with torch.random.fork_rng(devices=[]):  # the random start is overwritten; the caller's numbers stay as they are
        inception = Inception()
    # The published conversion wrote no counters of batch norm, other copies have them; inference reads none.
    counters = {name: tensor for name, tensor in inception.network.state_dict().items() if "num_batches" in name}
    strict_load(inception.network, counters | state, f"{file} (read as the Inception network of FID)")
    return inception.requires_grad_(False).eval()


def prepare(picture: Image.Image) -> Tensor:
    """An RGB picture of any size -> (3, 299, 299) in [-1, 1], as guided-diffusion (ADM) and torch-fidelity resize.

    Bilinear as TensorFlow 1 did it: pixel i lies at i * in / out, exactly.
    """
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float()  # (3, H, W)
    for axis in (1, 2):
        length = pixels.shape[axis]
        place = torch.arange(INPUT_SIDE) * torch.tensor(length / INPUT_SIDE)  # float32, as there
        low = place.long()
        fraction = (place - low).reshape([-1 if k == axis else 1 for k in range(3)])
        before, after = pixels.index_select(axis, low), pixels.index_select(axis, (low + 1).clamp(max=length - 1))
        pixels = before + (after - before) * fraction
    return (pixels - 128) / 128
