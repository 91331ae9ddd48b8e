"""hoi/training/small_clip.py: the file that stage text writes holds what was trained, and scores as CLIPScore does."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from training_world import SIDE, make_folder, small_model

import train
from hoi.network.text import TextConfig, TextEncoder, tokenize
from hoi.training import run as training_run
from hoi.training.data import TrainingSet
from hoi.training.small_clip import PictureText, save_small_clip
from hoi.weights.export import export_own
from tools.toy_tables import load_small_clip, small_clip_scores

CAPTIONS = ["A hand is grasping a red mug", "an orange bowl in the snow", "Waves", "a can on the moon with night sky"]


@pytest.fixture
def pair() -> PictureText:
    torch.manual_seed(6)  # only the weights
    pair = PictureText(TextEncoder(TextConfig(width=32, heads=2, layers=1)), embed_dim=16, channels=8)
    for parameter in pair.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return pair.half().float()  # numbers that half precision keeps


def test_scores_are_two_and_a_half_cosines_of_the_saved_pair_and_never_negative(pair, tmp_path):
    save_small_clip(tmp_path / "clip.safetensors", pair, side=SIDE // 2)
    blots = np.random.default_rng(0).integers(0, 256, (40, 2, 2, 3), dtype=np.uint8)
    pictures = blots.repeat(SIDE // 2, axis=1).repeat(SIDE // 2, axis=2)
    pictures[:, ::3] //= 2  # pixels of a pair differ
    texts = [CAPTIONS[k % 4] for k in range(40)]
    scores = small_clip_scores(load_small_clip(tmp_path / "clip.safetensors"), list(pictures), texts)
    halves = pictures.reshape(40, SIDE // 2, 2, SIDE // 2, 2, 3).mean(axis=(2, 4)) / 127.5 - 1
    images = torch.from_numpy(halves).permute(0, 3, 1, 2).float()
    with torch.no_grad():
        cosines = [float(a @ b) for a, b in zip(*pair(images, tokenize(texts)), strict=True)]
    assert min(cosines) < -0.01 and max(cosines) > 0.01
    np.testing.assert_allclose(scores, [2.5 * max(cosine, 0) for cosine in cosines], atol=1e-5)


def test_stage_text_writes_the_pair_that_it_trained(tmp_path):
    data, out = make_folder(tmp_path / "data", 6, with_conditions=False), tmp_path / "text"
    export_own(small_model(with_conditions=False), tmp_path / "start.safetensors")
    train.train(train.parse_args(
        f"--stage text --data {data} --base {tmp_path}/start.safetensors --out {out} --steps 3 --batch-size 6"
        " --preview-every 0 --dtype fp32 --device cpu --threads 1".split()
    ))  # fmt: skip
    clip = load_small_clip(out / "clip.safetensors")
    state, saved = training_run.load_training_state(out)["weights"], clip.model.state_dict()
    assert {f"picture_text.{name}" for name in saved} == state.keys()
    for name, tensor in saved.items():
        assert torch.equal(tensor, state[f"picture_text.{name}"].half().float()), name
    pictures = TrainingSet([data], SIDE, SIDE)
    with Image.open(data / "images" / "000001.png") as picture:
        seen = clip.preprocess(picture)
    torch.testing.assert_close(seen, F.avg_pool2d(pictures.images([1]), 2)[0])  # what the stage learned from


def test_another_weight_file_is_refused(tmp_path):
    export_own(small_model(with_conditions=False), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="model.safetensors is no clip.safetensors of `train.py --stage text`"):
        load_small_clip(tmp_path / "model.safetensors")
