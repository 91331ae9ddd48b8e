"""Weight files are read strictly, without running code, and written whole or not at all."""

import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from hoi.common import tensors
from hoi.training import run as training_run


def small_network() -> torch.nn.Module:
    return torch.nn.Sequential(OrderedDict(first=torch.nn.Linear(3, 4), second=torch.nn.Linear(4, 2)))


def test_strict_load_names_file_counts_and_first_offending_keys_and_changes_nothing():
    module = small_network()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    state = {f"extra_{index}": torch.zeros(1) for index in range(8)}
    state |= {"first.weight": torch.zeros(4, 3), "first.bias": torch.zeros(5), "second.bias": torch.zeros(2)}
    with pytest.raises(ValueError) as caught:
        tensors.strict_load(module, state, "some/file.safetensors")
    message = str(caught.value)
    assert "some/file.safetensors does not fit Sequential: 4 tensors expected, 11 found" in message
    assert "1 missing: second.weight" in message
    assert "8 unexpected: extra_0, extra_1, extra_2, extra_3, extra_4 and 3 more" in message
    assert "1 of another shape: first.bias is (5,), expected (4,)" in message
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_strict_load_keeps_the_dtype_of_the_module():
    module = small_network()
    state = {name: torch.full_like(tensor, 0.5).half() for name, tensor in module.state_dict().items()}
    tensors.strict_load(module, state, "half")
    assert all(p.dtype == torch.float32 and (p == 0.5).all() for p in module.parameters())


def test_model_file_gives_back_tensors_and_metadata_and_any_safetensors_reader_opens_it(tmp_path):
    state = small_network().state_dict() | {"image": torch.arange(24.0).reshape(1, 2, 3, 4).permute(0, 3, 1, 2)}
    path = tmp_path / "folder" / "model.safetensors"
    tensors.save_model(path, state, {"preset": "tiny"})
    loaded, metadata = tensors.load_model_file(path)
    assert metadata == {"preset": "tiny"} and loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], state[name]) for name in state)
    assert os.listdir(path.parent) == ["model.safetensors"]


def test_equal_weights_make_equal_files(tmp_path):
    """safetensors alone orders metadata by chance."""
    state = {"b": torch.ones(3), "a": torch.zeros(2)}
    metadata = {f"{k} \u00e9\n\x1f\"\\/\x7f\u2028": "x" for k in range(9)}
    for k in range(5):
        tensors.save_model(tmp_path / f"{k}", state, metadata)
    assert len({(tmp_path / f"{k}").read_bytes() for k in range(5)}) == 1
    read, told = tensors.load_model_file(tmp_path / "0")
    assert told == metadata and all(torch.equal(read[name], tensor) for name, tensor in state.items())
    with safe_open(tmp_path / "0", "pt") as file:
        assert file.metadata() == metadata and torch.equal(file.get_tensor("b"), state["b"])


def test_torch_files_are_unwrapped_and_other_content_is_refused(tmp_path):
    state = small_network().state_dict()
    torch.save(state, tmp_path / "flat.pth")
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "nested.ckpt")
    for name in ("flat.pth", "nested.ckpt"):
        loaded, metadata = tensors.load_model_file(tmp_path / name)
        assert metadata == {} and all(torch.equal(loaded[key], state[key]) for key in state)
    torch.save({"weight": torch.zeros(1), "scale": 3}, tmp_path / "mixed.pth")
    with pytest.raises(ValueError, match=r"mixed\.pth should hold tensors only, but scale are something else"):
        tensors.load_model_file(tmp_path / "mixed.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match=r"list\.pth holds a list, expected a dict"):
        tensors.load_model_file(tmp_path / "list.pth")


@pytest.mark.parametrize("name", ["model.safetensors", "model.pth"])
@pytest.mark.parametrize("kept", [0.0, 0.5, 0.99])
def test_truncated_files_are_refused_by_name(tmp_path, name, kept):
    path = tmp_path / name
    state = {"weight": torch.randn(100, 100)}
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ValueError, match=rf"{name} is not a readable"):
        tensors.load_model_file(path)


def test_a_file_is_read_as_what_it_holds_whatever_its_suffix(tmp_path):
    state = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.ones(2)}
    tensors.save_model(tmp_path / "model.ckpt", state, {"step": "7"})
    shutil.copy(tmp_path / "model.ckpt", tmp_path / "MODEL.SAFETENSORS")
    torch.save(state, tmp_path / "model.safetensors")
    torch.save(state, tmp_path / "old.SafeTensors", _use_new_zipfile_serialization=False)
    torch.save({f"module.{name}": tensor for name, tensor in state.items()}, tmp_path / "wrapped.PTH")
    for path in sorted(tmp_path.iterdir()):
        found, metadata = tensors.load_model_file(path)
        assert found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state), path
        assert metadata == ({"step": "7"} if path.name in ("model.ckpt", "MODEL.SAFETENSORS") else {})
    torch.save({"module.a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "partly.pth")
    assert set(tensors.WeightFile(tmp_path / "partly.pth")) == {"module.a", "b"}


def test_a_trainers_notes_beside_tensors_are_left_out_with_a_word(tmp_path):
    torch.save({"a": torch.ones(2), "global_step": 470000, "epoch": 3}, tmp_path / "flat.ckpt")
    with pytest.warns(RuntimeWarning, match=r"flat\.ckpt: left out global_step, epoch"):
        assert set(tensors.WeightFile(tmp_path / "flat.ckpt")) == {"a"}


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no weight file at .*absent\.pth"):
        tensors.load_model_file(tmp_path / "absent.pth")


class Trap:
    """Creates a folder when unpickled by a reader that executes what a file asks for."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_a_file_cannot_run_code(tmp_path):
    sprung = tmp_path / "sprung"
    torch.save({"weight": Trap(str(sprung))}, tmp_path / "trap.pth")
    (tmp_path / "trap.ckpt").write_bytes(pickle.dumps({"weight": Trap(str(sprung))}, protocol=2))
    for name in ("trap.pth", "trap.ckpt"):
        with pytest.raises(ValueError, match="is not a readable torch file"):
            tensors.load_model_file(tmp_path / name)
    assert not sprung.exists()


def test_a_process_killed_while_writing_leaves_the_last_complete_state_to_resume_from(tmp_path):
    training_run.save_training_state(tmp_path, 10, {"step": 10, "weight": torch.ones(3)})
    killed = (
        "import os, torch; from hoi.training import run\n"
        "def save(state, stream):\n    stream.write(b'half'); stream.flush(); os._exit(9)\n"
        "torch.save = save\n"
        f"run.save_training_state({str(tmp_path)!r}, 20, {{'step': 20}})\n"
    )
    root = Path(tensors.__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", killed], cwd=root, timeout=60).returncode == 9
    assert len(os.listdir(tmp_path)) == 2  # the litter is there, under a name that nothing reads
    assert training_run.load_training_state(tmp_path)["step"] == 10
    training_run.save_training_state(tmp_path, 20, {"step": 20})
    assert sorted(os.listdir(tmp_path)) == ["state_000000010.pt", "state_000000020.pt"]


def test_training_state_comes_back_equal_and_only_the_newest_are_kept(tmp_path):
    module = small_network()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    module(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    assert training_run.load_training_state(tmp_path) is None
    for step in (5, 90, 100):
        state = {"step": step, "optimizer": optimizer.state_dict(), "model": module.state_dict()}
        training_run.save_training_state(tmp_path, step, state | {"random": torch.get_rng_state()}, keep=2)
    assert sorted(os.listdir(tmp_path)) == ["state_000000090.pt", "state_000000100.pt"]
    loaded = training_run.load_training_state(tmp_path)
    assert loaded["step"] == 100 and torch.equal(loaded["random"], torch.get_rng_state())
    assert loaded["optimizer"]["param_groups"] == optimizer.state_dict()["param_groups"]
    torch.testing.assert_close(loaded["optimizer"]["state"], optimizer.state_dict()["state"], atol=0, rtol=0)


def test_a_torch_file_of_a_few_bytes_cannot_ask_for_gigabytes(tmp_path):
    torch.save({"a": torch.zeros(1).expand(10**9)}, tmp_path / "stride.ckpt")
    with pytest.raises(ValueError, match="stride.ckpt: its tensors stand for 4000000000 bytes"):
        tensors.load_model_file(tmp_path / "stride.ckpt")
    torch.save({"a": torch.zeros(9)}, tmp_path / "a.ckpt")
    with zipfile.ZipFile(tmp_path / "a.ckpt") as whole, zipfile.ZipFile(tmp_path / "b.ckpt", "w", 8) as packed:
        for name in whole.namelist():
            packed.writestr(name, whole.read(name) if not name.endswith("/0") else bytes(1 << 28))
    with pytest.raises(ValueError, match="b.ckpt is not a readable torch file .*its .* bytes unpack to"):
        tensors.load_model_file(tmp_path / "b.ckpt")
