"""CLIP from a file: the features of the model that was saved, whatever the container; faults are named."""

import json

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from hoi.metrics.clip import load_clip

SIZES = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A small model known to open_clip as tiny-clip, and one that differs in one size as tiny-clip-wide."""
    folder = tmp_path_factory.mktemp("clip")
    (folder / "tiny-clip.json").write_text(json.dumps(SIZES))
    (folder / "tiny-clip-wide.json").write_text(json.dumps({**SIZES, "embed_dim": 24}))
    open_clip.add_model_config(folder)
    torch.manual_seed(0)
    model = open_clip.create_model("tiny-clip", pretrained=None).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model, folder


@pytest.mark.parametrize("container", ["safetensors", "half", "training checkpoint", "flat with OpenAI's extras"])
def test_features_are_those_of_the_saved_model_in_every_container(container, saved, tmp_path, caplog):
    model, _ = saved
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    path = tmp_path / ("clip.safetensors" if container in ("safetensors", "half") else "clip.pt")
    if container == "safetensors":
        save_file(state, path)
    elif container == "half":
        save_file({name: tensor.half() for name, tensor in state.items()}, path)
    elif container == "training checkpoint":
        content = {f"module.{name}": tensor for name, tensor in state.items()}
        torch.save({"epoch": 3, "name": "x", "state_dict": content, "optimizer": {"lr": 0.1}}, path)
    else:
        others = {"input_resolution": torch.tensor(32), "logit_scale": state["logit_scale"].reshape(1)}
        torch.save({**state, **others}, path)
    before = torch.get_rng_state()
    clip = load_clip("tiny-clip", path)
    assert torch.equal(torch.get_rng_state(), before)
    assert "randomly" not in caplog.text
    generator = np.random.default_rng(0)
    picture = Image.fromarray(generator.integers(0, 256, (40, 60, 3), dtype=np.uint8))
    pixels = np.asarray(picture.resize((48, 32), Image.BICUBIC), dtype=np.float32)[:, 8:40] / 255
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    expected = torch.tensor(((pixels - np.array(mean)) / std).transpose(2, 0, 1), dtype=torch.float32)
    ours = clip.preprocess(picture)
    assert (ours - expected).abs().max() < 1e-5
    tokens = clip.tokenizer(["A photo depicts a mug", ""])
    assert tokens.shape == (2, 77) and tokens[1, :2].tolist() == [49406, 49407]
    tolerance = 2e-2 if container == "half" else 1e-6
    with torch.no_grad():
        torch.testing.assert_close(clip.model.encode_image(ours[None]), model.encode_image(ours[None]),
                                   atol=tolerance, rtol=tolerance)  # fmt: skip
        torch.testing.assert_close(clip.model.encode_text(tokens), model.encode_text(tokens),
                                   atol=tolerance, rtol=tolerance)  # fmt: skip


def test_a_missing_file_an_unknown_name_and_a_downloaded_text_part_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no CLIP weights at .*none.pt.*too large to ship.*hoi.verify"):
        load_clip("ViT-B-32", tmp_path / "none.pt")
    with pytest.raises(ValueError, match="no model 'ViT-B/32'; similar names: .*ViT-B-32"):
        load_clip("ViT-B/32", tmp_path / "none.pt")
    with pytest.raises(ValueError, match="roberta-ViT-B-32 comes from the Hugging Face hub"):
        load_clip("roberta-ViT-B-32", tmp_path / "none.pt")


def test_a_file_of_another_architecture_is_refused(saved, tmp_path):
    model, _ = saved
    save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, tmp_path / "clip.safetensors")
    with pytest.raises(ValueError, match=r"clip.safetensors \(read as tiny-clip-wide\) does not fit CLIP.*2 of another "
                       r"shape: text_projection is \(32, 16\), expected \(32, 24\)"):  # fmt: skip
        load_clip("tiny-clip-wide", tmp_path / "clip.safetensors")


@pytest.mark.filterwarnings("ignore:.*TorchScript|`torch.jit")
def test_torchscript_and_pickled_code_are_refused_unrun(saved, tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(tmp_path / "ViT-B-32.pt"))
    with pytest.raises(ValueError, match="ViT-B-32.pt is a TorchScript archive.*open_clip's format"):
        load_clip("tiny-clip", tmp_path / "ViT-B-32.pt")

    class Runs:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")

    torch.save({"logit_scale": Runs()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="evil.pt is not a readable torch file"):
        load_clip("tiny-clip", tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()
