"""train.py and hoi/training/stages.py: resuming, sharing work between processes, what trains, and messages."""

import os
import platform
import resource
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from training_world import SIDE, assert_same, hoi_args, make_world, small_model

import train
from hoi.common import tensors
from hoi.common.files import held_alone
from hoi.data.folder import load_conditions, load_image, read_records
from hoi.network.model import stack_conditions
from hoi.network.pipeline import Pipeline, SamplingSettings
from hoi.training import data as training_data
from hoi.training import run as training_run
from hoi.training import stages
from hoi.training.data import Share, TrainingSet, draw_indices


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(world, tmp_path):
    train.train(hoi_args(world, tmp_path / "whole"))
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    (tmp_path / "resumed" / "state_000000004.pt").unlink()  # as if killed after the state of step 2
    (tmp_path / "resumed" / "model.safetensors").unlink()
    train.train(hoi_args(world, tmp_path / "resumed"))
    states = [training_run.load_training_state(tmp_path / name) for name in ("whole", "resumed")]
    assert states[0]["step"] == 4
    assert_same(*states)
    weights = [tensors.load_model_file(tmp_path / name / "model.safetensors")[0] for name in ("whole", "resumed")]
    assert_same(*weights)
    logs = [(tmp_path / name / "log.jsonl").read_text().count("\n") for name in ("whole", "resumed")]
    assert logs[0] == logs[1]


def test_a_finished_run_is_left_alone(world, tmp_path, capsys):
    train.train(hoi_args(world, tmp_path / "run"))
    before = (tmp_path / "run" / "model.safetensors").stat().st_mtime_ns
    train.train(hoi_args(world, tmp_path / "run"))
    assert "is finished: 4 steps done" in capsys.readouterr().out
    assert (tmp_path / "run" / "model.safetensors").stat().st_mtime_ns == before


def test_the_end_of_a_caption_that_no_text_encoder_reads_is_told_once(world, tmp_path, capsys):
    shutil.copytree(world / "data", tmp_path / "data")
    metadata = tmp_path / "data" / "metadata.jsonl"
    metadata.write_text(metadata.read_text().replace("a red mug", "a mug " * 40 + "on the beach"))
    train.train(hoi_args(world, tmp_path / "run", "--data", str(tmp_path / "data")))
    assert capsys.readouterr().out.count('a mug on the beach" of "A hand is') == 1


def test_resuming_with_other_settings_is_refused_by_name(world, tmp_path):
    train.train(hoi_args(world, tmp_path / "run"))
    with pytest.raises(ValueError, match=r"--seed was 0, is 5"):
        train.train(hoi_args(world, tmp_path / "run", "--seed", "5"))


def test_fewer_processes_go_on_only_when_they_accumulate_to_the_same_step(world, tmp_path):
    out = tmp_path / "run"
    train.train(hoi_args(world, out, "--steps", "2", "--accumulate", "2"))
    state = training_run.load_training_state(out)
    state["processes"], state["args"]["accumulate"] = 2, 1  # as two processes would have left it
    training_run.save_training_state(out, 2, state)
    with pytest.raises(ValueError, match=r"2 batches a step.*here they are 1 x 1: set --accumulate"):
        train.train(hoi_args(world, out))
    train.train(hoi_args(world, out, "--accumulate", "2"))
    train.train(hoi_args(world, tmp_path / "whole", "--accumulate", "2"))
    states = [training_run.load_training_state(path) for path in (out, tmp_path / "whole")]
    assert_same(states[0]["weights"], states[1]["weights"])


def test_fine_tuning_moves_decoder_and_condition_encoders_and_nothing_else(world, tmp_path):
    train.train(hoi_args(world, tmp_path / "run"))
    before, _ = tensors.load_model_file(world / "base.safetensors")
    after, metadata = tensors.load_model_file(tmp_path / "run" / "model.safetensors")
    assert metadata["stage"] == "hoi"
    for name in before:
        decoder = name.startswith(("unet.output_blocks.", "unet.out."))
        # A key bias adds the same to all of a query's scores, so it may stay; everything else in the decoder moves.
        assert torch.equal(before[name], after[name]) != decoder, name
    assert any(name.startswith("condition_encoders.") for name in after.keys() - before.keys())


def gradients(world: Path, share: Share) -> dict[str, torch.Tensor]:
    """Gradients of the hoi loss at step 3 in this process, averaged over processes by DDP if there are several."""
    torch.set_num_threads(1)
    model = small_model(with_conditions=True)
    pictures, buffer = (TrainingSet([world / name], SIDE, SIDE) for name in ("data", "buffer"))
    folder = world / f"latents-{share.world_size}"
    data, background = (training_data.cached(model, each, folder) for each in (pictures, buffer))
    model.freeze_for_fine_tuning()
    stage = stages.HoiStage(model, data, share, 1, 0.3, stages.Regularization(background, share.batch_size))
    if share.world_size > 1:
        stage = torch.nn.parallel.DistributedDataParallel(stage)
        batch = stage.module.batch(3)
    else:
        batch = stage.batch(3)
    loss, _ = stage(batch)
    loss.backward()
    named = (stage.module if share.world_size > 1 else stage).named_parameters()
    return {name: parameter.grad for name, parameter in named if parameter.grad is not None}


def half_the_work(rank: int, world: Path, port: int) -> None:
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    training_data.ROWS, written, write = 3, [], training_data.write_whole
    training_data.write_whole = lambda path, save: (written.append(path.name), write(path, save))
    found = gradients(world, Share(2, rank, 2))
    (world / f"written{rank}").write_text(" ".join(written))
    if rank == 0:
        torch.save(found, world / "two.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(world) -> Path:
    """The world, after two processes together encoded its pictures, three to a file, and made one step."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(half_the_work, args=(world, port), nprocs=2)
    return world


def test_processes_share_the_encoding_and_leave_the_bytes_of_one(two_processes, tmp_path, monkeypatch):
    world = two_processes
    # Files of ten pictures, then of the five of the buffer.
    assert [(world / f"written{rank}").read_text() for rank in range(2)] == [
        "00000.npy 00002.npy 00000.npy", "00001.npy 00003.npy 00001.npy"]  # fmt: skip
    monkeypatch.setattr(training_data, "ROWS", 3)
    torch.set_num_threads(1)
    for name in ("data", "buffer"):
        training_data.cached(small_model(with_conditions=True), TrainingSet([world / name], SIDE, SIDE), tmp_path)
    files = [path.relative_to(tmp_path) for path in tmp_path.rglob("*.npy")]
    assert len(files) == 6
    for name in files:
        assert (tmp_path / name).read_bytes() == (world / "latents-2" / name).read_bytes(), name


def test_an_interrupted_encoding_makes_only_what_is_missing(world, tmp_path, monkeypatch):
    monkeypatch.setattr(training_data, "ROWS", 4)
    model, pictures = small_model(with_conditions=False), TrainingSet([world / "data"], SIDE, SIDE)
    whole = training_data.cached(model, pictures, tmp_path).latents[range(10)]
    first, second, third = sorted(tmp_path.rglob("*.npy"))
    second.unlink()
    half = f".{second.name}.{os.getpid()}@{platform.node()}.tmp"  # as a killed process leaves it
    (second.parent / half).write_bytes(b"half")
    kept = [path.stat().st_mtime_ns for path in (first, third)]
    np.testing.assert_array_equal(training_data.cached(model, pictures, tmp_path).latents[range(10)], whole)
    assert [path.stat().st_mtime_ns for path in (first, third)] == kept
    assert sorted(second.parent.iterdir()) == [first, second, third]


def test_more_files_than_a_process_may_open_are_read_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(training_data, "ROWS", 1)
    monkeypatch.setattr(training_data, "OPEN", 4)
    rows = torch.arange(60.0)[:, None]
    limits, here = resource.getrlimit(resource.RLIMIT_NOFILE), len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (here + 20, limits[1]))
    try:
        written = training_data.write_rows(tmp_path, 60, lambda start, end: rows[start:end], 1)
        assert written[range(59, -1, -1)].ravel().tolist() == list(range(59, -1, -1))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_latents_are_encoded_anew_for_another_autoencoder_and_for_nothing_else(world, tmp_path):
    model, pictures = small_model(with_conditions=False), TrainingSet([world / "data"], SIDE, SIDE)
    training_data.cached(model, pictures, tmp_path)
    torch.nn.init.normal_(model.unet.out[2].weight)
    model.metadata, model.vae = {"step": "7"}, model.vae.to(memory_format=torch.channels_last)
    training_data.cached(model, pictures, tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    with torch.no_grad():
        model.vae.quant_conv.bias[0] += 1e-6
    training_data.cached(model, pictures, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_two_processes_have_the_gradients_of_one(two_processes):
    world = two_processes
    two, one = torch.load(world / "two.pt", weights_only=True), gradients(world, Share(4))
    assert two.keys() == one.keys() and len(one) > 50
    for name, gradient in one.items():
        torch.testing.assert_close(two[name], gradient, rtol=1e-4, atol=1e-7, msg=lambda text, n=name: f"{n}: {text}")


def test_every_record_is_seen_once_an_epoch_whatever_the_number_of_processes():
    records, seen = 12, []
    for step in range(3):
        shares = [draw_indices(records, Share(2, rank, 2), seed=4, step=step) for rank in range(2)]
        whole = draw_indices(records, Share(4), seed=4, step=step)
        np.testing.assert_array_equal(np.concatenate(shares), whole)
        seen += whole.tolist()
    assert sorted(seen) == list(range(records))


def test_latents_are_drawn_anew_from_the_cached_posterior(world):
    model = small_model(with_conditions=True)
    pictures = TrainingSet([world / "data"], SIDE, SIDE)
    data = training_data.cached(model, pictures, world / "latents-posterior")
    indices, noise = np.array([4, 1]), torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        posterior = model.vae.encode(pictures.images(indices))
    expected = 0.18215 * (posterior.mean + posterior.std * noise)
    torch.testing.assert_close(data.sample(indices, noise, 0.18215), expected, rtol=1e-4, atol=1e-5)


def test_previews_show_the_training_pictures_above_what_each_caption_and_geometry_gives_alone(world):
    model = small_model(with_conditions=True)
    data = TrainingSet([world / "data"], SIDE, SIDE)
    encoded = training_data.cached(model, data, world / "latents-preview")
    skeletons, _, shown, made = stages.HoiStage(model, encoded, Share(2), seed=0).preview()
    records = read_records(world / "data")
    settings = SamplingSettings("dpm++", 2, model.config.guidance_scale)
    for k in (0, 3, 9):
        np.testing.assert_array_equal(shown[k], load_image(world / "data", records[k]))
        conditions = load_conditions(world / "data", records[k])
        np.testing.assert_array_equal(skeletons[k], conditions.skeleton)
        maker = Pipeline(model, settings)
        features = maker.features(stack_conditions([conditions], SIDE, SIDE))
        alone = maker.pictures([records[k]["text"]], features, [torch.Generator().manual_seed(k)])[0]
        assert np.abs(made[k].astype(int) - alone).max() <= 1
        assert made[k].std() > 1 and np.abs(made[k].astype(int) - made[k - 1]).max() > 1


def test_the_measured_scaling_factor_gives_the_cached_latents_unit_deviation(world):
    data = TrainingSet([world / "data"], SIDE, SIDE)
    latents = training_data.cached(small_model(with_conditions=False), data, world / "latents-deviation").latents
    means = torch.from_numpy(latents[range(10)][:, 0])
    scaled = training_data.measured_scaling_factor(latents) * means.double()
    assert float((scaled - scaled.mean()).square().mean().sqrt()) == pytest.approx(1.0, rel=1e-12)


def test_pictures_of_another_size_are_refused_with_both_sizes(world):
    with pytest.raises(ValueError, match=r"32 x 32 px, the model takes 64 x 64"):
        TrainingSet([world / "data"], 64, 64)


def test_fine_tuning_without_a_base_says_what_is_missing(world, tmp_path):
    args = train.parse_args(["--data", str(world / "data"), "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="--stage hoi needs --base FILE"):
        train.train(args)


def test_a_second_training_in_one_folder_is_told_before_anything_is_loaded(tmp_path, monkeypatch):
    words = f"--stage hoi --data nowhere --base nowhere --device cpu --out {tmp_path}/run"
    monkeypatch.setattr("sys.argv", ["train.py", *words.split()])
    already = f"train.py: a training is running in {tmp_path}/run already; .*--out"
    with held_alone(tmp_path / "run", "a training"), pytest.raises(SystemExit, match=already):
        train.main()
    with pytest.raises(SystemExit, match="train.py: .*nowhere"):
        train.main()
    assert not (tmp_path / "run").exists()
