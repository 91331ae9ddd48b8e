"""Model files of this project: what is saved comes back, and what does not fit is refused by name."""

import pytest
import torch
from fake_networks import model_inputs, small_model
from safetensors import safe_open

from hoi.common.tensors import load_model_file, save_model
from hoi.weights.export import export_own
from hoi.weights.load import load_model


@torch.no_grad()
def test_a_saved_model_predicts_the_same_and_knows_where_it_comes_from(tmp_path):
    model, path = small_model(), tmp_path / "model.safetensors"
    model.set_scaling_factor(0.7)
    export_own(model, path, metadata={"step": "12", "command": "train.py --stage hoi", "note": "a test"})
    assert model.vae.config == model.config.vae
    loaded = load_model(path)
    assert loaded.config == model.config and loaded.vae.config.scaling_factor == 0.7
    expected = {"preset": "small", "step": "12", "stage": "hoi", "command": "train.py --stage hoi", "note": "a test"}
    assert expected.items() <= loaded.metadata.items()
    assert not loaded.training
    for (name, ours), (other, theirs) in zip(model.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert name == other and torch.equal(ours, theirs)
    # Channels-last weights take other kernels, so the last bits may differ.
    torch.testing.assert_close(loaded(**model_inputs()), model(**model_inputs()), atol=1e-5, rtol=0)


@torch.no_grad()
def test_half_precision_files_load_as_the_rounded_weights(tmp_path):
    model, path = small_model(), tmp_path / "model.safetensors"
    export_own(model, path, half=True)
    with safe_open(path, framework="pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float16}
    loaded = load_model(path)
    exact = model.state_dict()
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, exact[name].half().float())
    assert {p.dtype for p in load_model(path, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}  # saving left the model alone


def test_a_file_with_nan_is_refused_by_the_tensor(tmp_path):
    model = small_model()
    with torch.no_grad():
        model.vae.quant_conv.bias[2] = float("nan")
    export_own(model, tmp_path / "bad.safetensors")
    with pytest.raises(ValueError, match=r"bad\.safetensors: vae\.quant_conv\.bias holds NaN"):
        load_model(tmp_path / "bad.safetensors")


def test_files_of_another_preset_version_or_kind_are_refused_by_name(tmp_path):
    path = tmp_path / "model.safetensors"
    export_own(small_model(), path)
    with pytest.raises(ValueError, match=r"model\.safetensors holds the preset 'small', expected 'tiny'"):
        load_model(path, preset="tiny")
    state, metadata = load_model_file(path)

    def resave(change: dict, drop: str | None = None) -> None:
        save_model(path, {k: v for k, v in state.items() if k != drop}, metadata | change)

    resave({"format_version": "99"})
    with pytest.raises(ValueError, match=r"model\.safetensors has format version 99, expected 1"):
        load_model(path)
    resave({"config": metadata["config"].replace("num_heads", "heads_count")})
    with pytest.raises(ValueError, match=r"model\.safetensors: expected sizes .*not a model config.*heads_count"):
        load_model(path)
    resave({}, drop="unet.out.2.bias")
    with pytest.raises(ValueError, match=r"model\.safetensors does not fit.*1 missing: unet\.out\.2\.bias"):
        load_model(path)
    resave({"config": metadata["config"].replace('"model_channels": 32', '"model_channels": 64')})
    with pytest.raises(ValueError, match="of another shape: condition_encoders"):
        load_model(path)
    resave({"stage": "base"})
    with pytest.raises(ValueError, match="unexpected: condition_encoders"):
        load_model(path)
    save_model(path, state, {})
    with pytest.raises(ValueError, match=r"model\.safetensors is no weight file .* or a model of this project"):
        load_model(path)


@torch.no_grad()
def test_a_base_model_comes_back_without_condition_encoders_and_with_what_is_known_of_it(tmp_path):
    export_own(small_model(with_conditions=False), tmp_path / "base.safetensors", metadata={"step": "5"})
    loaded = load_model(tmp_path / "base.safetensors")
    assert loaded.condition_encoders is None and loaded.metadata["stage"] == "base"
    loaded.add_condition_encoders()
    export_own(loaded, tmp_path / "hoi.safetensors")
    assert load_model(tmp_path / "hoi.safetensors").metadata["stage"] == "hoi"
    assert load_model(tmp_path / "hoi.safetensors").metadata["step"] == "5"
