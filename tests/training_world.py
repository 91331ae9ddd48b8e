"""A tiny model, dataset folders and settings that the tests of training share."""

from pathlib import Path

import numpy as np
import torch

import train
from hoi.conditions import Conditions
from hoi.data.writer import DatasetWriter, write_pictures
from hoi.network.config import ModelConfig
from hoi.network.model import HOIDiffusion
from hoi.network.text import TextConfig
from hoi.network.unet import UNetConfig
from hoi.network.vae import VAEConfig
from hoi.weights.export import export_own

SIDE = 32
COLORS = ("red", "green", "blue")


def small_model(with_conditions: bool, seed: int = 0) -> HOIDiffusion:
    """A model of a few thousand weights whose zero-initialised layers are not zero, so that all gradients flow."""
    torch.manual_seed(seed)
    config = ModelConfig(
        name="tiny",
        unet=UNetConfig(
            model_channels=8, channel_mult=(1, 2), num_res_blocks=1, attention_levels=(1,), num_heads=2,
            context_dim=16, norm_groups=4,
        ),
        vae=VAEConfig(channels=8, channel_mult=(1, 2), num_res_blocks=1, norm_groups=4),
        text=TextConfig(width=16, heads=2, layers=1),
        image_size=SIDE,
        num_inference_steps=2,
    )  # fmt: skip
    model = HOIDiffusion(config, with_conditions=with_conditions)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05)
    return model


def make_folder(folder: Path, count: int, with_conditions: bool) -> Path:
    writer = DatasetWriter(folder, {"command": "test"})
    for index in range(count):
        generator = np.random.default_rng([7, index])
        pictures = generator.integers(0, 256, (4, SIDE, SIDE, 3), dtype=np.uint8)
        record = {"text": f"A hand is grasping a {COLORS[index % 3]} mug", "category": ("mug", "bowl", None)[index % 3]}
        conditions = Conditions(*pictures[1:]) if with_conditions else None
        writer.append(write_pictures(folder, index, record, pictures[0], conditions))
    writer.finish(grid=False)
    return folder


def make_world(root: Path) -> Path:
    """A folder with data, a background buffer and a base model."""
    make_folder(root / "data", 10, with_conditions=True)
    make_folder(root / "buffer", 5, with_conditions=False)
    export_own(small_model(with_conditions=False), root / "base.safetensors", metadata={"command": "test"})
    return root


def hoi_args(world: Path, out: Path, *more: str):
    return train.parse_args(
        f"--stage hoi --data {world}/data --reg-data {world}/buffer --base {world}/base.safetensors --out {out}"
        f" --steps 4 --batch-size 3 --learning-rate 1e-3 --save-every 2 --preview-every 0 --dtype fp32 --device cpu"
        f" --ema-decay 0.9 --threads 1".split() + list(more)
    )  # fmt: skip


def assert_same(a, b, where: str = "") -> None:
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        for k, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{k}]")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), f"{where} differs by up to {(a - b).abs().max()}"
    elif not where.startswith(".args.out"):
        assert a == b, where
