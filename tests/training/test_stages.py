"""hoi/training/stages.py and hoi/training/data.py: modes of regularisation, ablations, accumulation."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from training_world import SIDE, assert_same, hoi_args, make_world, small_model

import train
from hoi.common import tensors
from hoi.common.choices import BASELINES
from hoi.network.diffusion import add_noise
from hoi.network.model import CONDITION_NAMES, HOIDiffusion
from hoi.network.text import tokenize
from hoi.training import data as training_data
from hoi.training import run as training_run
from hoi.training import stages
from hoi.training.data import Share, TrainingSet, draw_indices
from hoi.weights.describe import describe_weights
from hoi.weights.export import export_own
from hoi.weights.load import load_model, load_pipeline
from hoi.weights.names import official_adapter_names


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


def make_stage(world: Path, share: Share, reg: dict | None = None, **freeze) -> stages.HoiStage:
    """A stage on the world's data; `reg` are settings of the Regularization, None for none."""
    model = small_model(with_conditions=freeze.get("conditions") != ())
    sets = [TrainingSet([world / name], SIDE, SIDE) for name in ("data", "buffer")]
    data, buffer = (training_data.cached(model, each, world / "latents") for each in sets)
    model.freeze_for_fine_tuning(**freeze)
    regularization = None if reg is None else stages.Regularization(buffer, **{"batch_size": share.batch_size} | reg)
    return stages.HoiStage(model, data, share, 1, 0.3, regularization)


def same(a: training_data.Batch, b: training_data.Batch) -> bool:
    if not isinstance(a, dict):
        return torch.equal(a, b)
    return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)


def test_swapped_steps_are_background_with_the_given_probability_and_a_pure_batch_otherwise(world):
    modes = {prob: make_stage(world, Share(2), {"mode": "swap", "prob": prob}) for prob in (0.3, 0.0, 1.0)}
    swapped = []
    for step in range(400):
        batch, hands, background = (stage.batch(step) for stage in modes.values())
        assert not same(hands, background)
        swapped.append(same(batch, background))
        assert swapped[-1] or same(batch, hands)
    # So the expected loss is 0.7 L_hoi + 0.3 L_reg; three standard deviations of 400 draws are 0.069.
    assert abs(np.mean(swapped) - 0.3) < 0.069
    assert set(background) == {"reg"}
    assert set(background["reg"]) == {"indices", "latents", "timesteps", "noise", "token_ids"}


def test_every_process_draws_its_own_swaps_and_the_batches_of_a_step_share_one(world):
    draws = []
    for rank in range(2):
        stage = make_stage(world, Share(1, rank, 2, batches=3), {"mode": "swap", "prob": 0.5})
        draws.append([stage.swapped(step) for step in range(60)])
        for step in range(5):
            assert {"hoi" in stage.batch(step, number) for number in range(3)} == {not draws[-1][step]}
    agreeing = np.mean(np.equal(*draws))
    assert 0.3 < agreeing < 0.7  # three standard deviations around one half


@torch.no_grad()
def plain_loss(model: HOIDiffusion, latents, timesteps, noise, captions, conditions) -> torch.Tensor:
    """The squared error of the predicted noise, written out."""
    abar = model.config.noise_schedule().alphas_cumprod[timesteps].float().view(-1, 1, 1, 1)
    noisy = abar.sqrt() * latents + (1 - abar).sqrt() * noise
    return F.mse_loss(model(noisy, timesteps, model.text_encoder(tokenize(captions)), conditions), noise)


def test_the_loss_of_a_swapped_step_is_that_of_background_under_three_black_pictures(world):
    stage = make_stage(world, Share(3), {"mode": "swap", "prob": 1.0})
    batch, model = stage.batch(5), stage.model
    loss, terms = stage(batch)
    background = batch["reg"]
    captions = stage.regularization.data.pictures.captions(background["indices"].tolist())
    kept = [c if row.any() else "" for c, row in zip(captions, background["token_ids"] - tokenize([""]), strict=True)]
    black = dict.fromkeys(CONDITION_NAMES, torch.zeros(3, 3, SIDE, SIDE))
    inputs = (background[name] for name in ("latents", "timesteps", "noise"))
    assert loss.item() == pytest.approx(plain_loss(model, *inputs, kept, black).item(), rel=1e-5)
    assert terms.keys() == {"reg"}
    loss.backward()
    assert model.condition_encoders["normal"].body[0].block1.bias.grad.abs().max() > 0


def test_cached_latents_give_the_loss_that_encoding_everything_anew_gives(world):
    stage = make_stage(world, Share(4))
    batch, model = stage.batch(2), stage.model
    # The same generator state as the stage's: posterior, timesteps, noise, dropped captions in this order.
    generator = training_data.step_generator(1, 2, 0)
    posterior_noise = torch.randn(4, 4, 16, 16, generator=generator)
    timesteps = torch.randint(1000, (4,), generator=generator)
    noise = torch.randn(4, 4, 16, 16, generator=generator)
    dropped = torch.rand(4, generator=generator) < 0.3
    assert 0 < dropped.sum() < 4
    pictures, indices = stage.pictures, batch["hoi"]["indices"].tolist()
    with torch.no_grad():
        posterior = model.vae.encode(pictures.images(indices))
    latents = model.config.vae.scaling_factor * (posterior.mean + posterior.std * posterior_noise)
    captions = ["" if drop else text for drop, text in zip(dropped, pictures.captions(indices), strict=True)]
    conditions = {name: images.float() / 255 for name, images in pictures.conditions(indices).items()}
    expected = plain_loss(model, latents, timesteps, noise, captions, conditions)
    assert stage(batch)[0].item() == pytest.approx(expected.item(), rel=2e-5)


def gradients(stage: stages.HoiStage, batches: int) -> dict[str, torch.Tensor]:
    for number in range(batches):
        (stage(stage.batch(3, number))[0] / batches).backward()
    return {name: p.grad for name, p in stage.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reg", [{}, {"batch_size": 3}, {"mode": "swap", "prob": 0.5}])
def test_accumulated_gradients_are_those_of_the_large_batch(world, reg):
    large = {name: 3 * value if name == "batch_size" else value for name, value in reg.items()}
    small, one = make_stage(world, Share(2, batches=3), reg), make_stage(world, Share(6), large)
    added, expected = gradients(small, 3), gradients(one, 1)
    assert added.keys() == expected.keys() and len(expected) > 50
    for name, gradient in expected.items():
        torch.testing.assert_close(added[name], gradient, rtol=1e-4, atol=1e-7, msg=lambda text, n=name: f"{n}: {text}")


def saved_bytes_and_gradients(stage: stages.HoiStage) -> tuple[int, dict[str, torch.Tensor]]:
    """What one step keeps for its backward pass, weights left out, and the gradients."""
    weights, kept = {p.data_ptr() for p in stage.parameters()}, []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(0 if tensor.data_ptr() in weights else tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss, _ = stage(stage.batch(3))
    loss.backward()
    return sum(kept), {name: p.grad for name, p in stage.named_parameters() if p.grad is not None}


def test_gradient_checkpointing_keeps_less_and_gives_the_same_gradients(world):
    plain, saving = make_stage(world, Share(2), {}), make_stage(world, Share(2), {})
    saving.model.unet.gradient_checkpointing = True
    (usual, expected), (less, found) = saved_bytes_and_gradients(plain), saved_bytes_and_gradients(saving)
    assert less < 0.7 * usual
    assert_same(found, expected)


def test_an_accumulating_run_makes_the_steps_of_the_large_batch(world, tmp_path):
    lines = []
    for name, flags in (("large", ["--batch-size", "6"]), ("small", ["--batch-size", "2", "--accumulate", "3"])):
        train.train(hoi_args(world, tmp_path / name, *flags))
        lines.append(json.loads((tmp_path / name / "log.jsonl").read_text()))
    for key in ("step", "loss", "hoi", "reg", "gradient_norm"):
        assert lines[1][key] == pytest.approx(lines[0][key], rel=1e-4), key


def test_leaving_out_conditions_saves_a_model_that_is_blind_to_them(world, tmp_path):
    train.train(hoi_args(world, tmp_path, "--conditions", "segmentation", "skeleton"))
    model = load_model(tmp_path / "model.safetensors")
    assert model.metadata["conditions"] == "skeleton,segmentation"
    images = torch.rand(4, 2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    encoders = model.condition_encoders
    with torch.no_grad():
        conditions = dict(zip(CONDITION_NAMES, images[:3], strict=True))
        features, blind = encoders(conditions), encoders(conditions | {"normal": images[3]})
        alone = zip(encoders["skeleton"](images[0]), encoders["segmentation"](images[2]), strict=True)
        for feature, other, (skeleton, segmentation) in zip(features, blind, alone, strict=True):
            assert torch.equal(feature, other)
            assert torch.equal(feature, skeleton + segmentation)
        assert not torch.equal(features[0], encoders(conditions | {"skeleton": images[3]})[0])
    trained = training_run.load_training_state(tmp_path)["weights"]
    assert {name.split(".")[1] for name in trained if name.startswith("condition")} == {"skeleton", "segmentation"}


def test_without_conditions_the_decoder_alone_is_tuned_on_text_and_background(world, tmp_path):
    train.train(hoi_args(world, tmp_path, "--baseline", "ldm"))
    before, after = (tensors.load_model_file(p / f) for p, f in
                     ((world, "base.safetensors"), (tmp_path, "model.safetensors")))  # fmt: skip
    assert (after[1]["stage"], after[1]["baseline"]) == ("base", "ldm")
    train.train(hoi_args(world, tmp_path / "none", "--conditions", "none"))  # the flag's older name
    assert_same(tensors.load_model_file(tmp_path / "none" / "model.safetensors")[0], after[0])
    assert before[0].keys() == after[0].keys()
    for name, weight in before[0].items():
        assert torch.equal(weight, after[0][name]) != name.startswith(("unet.output_blocks.", "unet.out.")), name

    stage = make_stage(world, Share(3), {"weight": 0.5}, conditions=())
    stage.caption_dropout = 0.0
    batch, model = stage.batch(4), stage.model
    hoi, reg = (
        plain_loss(model, *(batch[term][name] for name in ("latents", "timesteps", "noise")),
                   pictures.captions(batch[term]["indices"].tolist()), None)
        for term, pictures in (("hoi", stage.pictures), ("reg", stage.regularization.data.pictures))
    )  # fmt: skip
    loss, terms = stage(batch)
    assert loss.item() == pytest.approx(hoi.item() + 0.5 * reg.item(), rel=1e-5)
    logged = {term: value.item() for term, value in terms.items()}  # as of the method: without w_r
    assert logged == pytest.approx({"hoi": hoi.item(), "reg": reg.item()}, rel=1e-5)


def test_the_controlnet_baseline_trains_the_copy_and_the_hint_alone_and_makes_pictures(world, tmp_path, capsys):
    train.train(hoi_args(world, tmp_path, "--baseline", "controlnet", "--gradient-checkpointing"))
    assert "a fresh ControlNet is added (Sec. 4.2)" in capsys.readouterr().out
    before, after = (tensors.load_model_file(p / f) for p, f in
                     ((world, "base.safetensors"), (tmp_path, "model.safetensors")))  # fmt: skip
    assert (after[1]["stage"], after[1]["baseline"]) == ("controlnet", "controlnet")
    assert all(torch.equal(weight, after[0][name]) for name, weight in before[0].items())
    for name, weight in after[0].items():
        if name.startswith("unet.control."):  # what is copied has left the copy's place, the others have left zero
            start = before[0].get(name.replace("control.", "", 1), torch.zeros(()))
            assert not torch.equal(weight, start.expand_as(weight)), name
    trained = training_run.load_training_state(tmp_path)["weights"]
    assert trained.keys() == after[0].keys() - before[0].keys()
    assert "with a ControlNet, the paper's baseline controlnet;" in describe_weights(tmp_path / "model.safetensors")

    def made(**weights: float) -> np.ndarray:
        pipeline = load_pipeline(tmp_path / "model.safetensors", device="cpu", cond_weights=weights)
        hint = pipeline.features(dict.fromkeys(CONDITION_NAMES, torch.ones(1, 3, SIDE, SIDE)))
        return pipeline.pictures(["a mug"], hint, [torch.Generator().manual_seed(0)])

    text_alone = load_pipeline(world / "base.safetensors", with_conditions=False, device="cpu")
    without = text_alone.pictures(["a mug"], None, [torch.Generator().manual_seed(0)])
    np.testing.assert_array_equal(made(all=0.0), without)
    assert (made() != without).any()
    with pytest.raises(ValueError, match="share one weight"):
        made(normal=0.5)
    with pytest.raises(ValueError, match="has a ControlNet: begin with a base model, or train with --baseline"):
        train.train(hoi_args(world, tmp_path / "other", "--base", str(tmp_path / "model.safetensors")))


@pytest.mark.parametrize("flags", [["--baseline", name] for name in BASELINES] + [["--conditions", "none"]])
def test_no_baseline_throws_away_condition_encoders(world, tmp_path, flags):
    model = small_model(with_conditions=True)
    export_own(model, tmp_path / "hoi.safetensors")
    of_adapter = official_adapter_names(state := model.state_dict())
    torch.save({theirs: state[ours] for ours, (theirs,) in of_adapter.items()}, tmp_path / "model_ad_5.pth")
    starts = {"hoi.safetensors": ["--base"]} | ({"model_ad_5.pth": ["--adapter"]} if "controlnet" in flags else {})
    for name, flag in starts.items():
        with pytest.raises(ValueError, match=f"{name} has condition encoders: begin with a base model"):
            train.starting_model(hoi_args(world, tmp_path, *flags, *flag, str(tmp_path / name)))


def test_the_loss_of_a_controlnet_is_equation_3_with_black_pictures_for_the_background(world):
    stage = make_stage(world, Share(3), {"weight": 0.5})
    stage.model.condition_encoders = None
    stage.model.add_condition_encoders(controlnet=True)
    batch, model = stage.batch(4), stage.model
    with torch.no_grad():
        for parameter in (*model.unet.control.parameters(), *model.condition_encoders.parameters()):
            parameter.add_(0.05)
    black = dict.fromkeys(CONDITION_NAMES, torch.zeros(3, 3, SIDE, SIDE))
    terms = []
    shown = {name: images.float() / 255 for name, images in batch["hoi"]["conditions"].items()}
    for each, conditions in ((batch["hoi"], shown), (batch["reg"], black)):
        noisy = add_noise(stage.schedule, each["latents"], each["noise"], each["timesteps"])
        with torch.no_grad():
            eps = model(noisy, each["timesteps"], model.text_encoder(each["token_ids"]), conditions)
        terms.append(F.mse_loss(eps, each["noise"]))
    assert stage(batch)[0].item() == pytest.approx((terms[0] + 0.5 * terms[1]).item(), rel=1e-5)


def test_dreambooth_trains_the_whole_unet_on_one_word_for_all_categories_and_keeps_the_prior(world, tmp_path):
    args = hoi_args(world, tmp_path, "--baseline", "dreambooth")
    stage = train.build_stage(args, train.starting_model(args), Share(3))
    seen = ["A hand is grasping a sks mug", "A hand is grasping a sks bowl", "A hand is grasping a sks object"]
    assert stage.pictures.captions(range(4)) == [*seen, seen[0]]
    prior = stage.regularization.data.pictures
    assert prior.captions(range(2)) == ["A hand is grasping a red mug", "A hand is grasping a green mug"]
    batch = stage.batch(0)
    for term, pictures in (("hoi", stage.pictures), ("reg", prior)):
        assert torch.equal(batch[term]["token_ids"], tokenize(pictures.captions(batch[term]["indices"].tolist())))
        assert "conditions" not in batch[term]
    assert {name.split(".")[1] for name, p in stage.named_parameters() if p.requires_grad} == {"unet"}

    train.train(hoi_args(world, tmp_path, "--baseline", "dreambooth", "--steps", "1", "--ema-decay", "0"))
    before, after = (tensors.load_model_file(p / f) for p, f in
                     ((world, "base.safetensors"), (tmp_path, "model.safetensors")))  # fmt: skip
    assert (after[1]["stage"], after[1]["baseline"]) == ("base", "dreambooth")
    for name, weight in before[0].items():
        assert torch.equal(weight, after[0][name]) != name.startswith("unet."), name
    pipeline = load_pipeline(tmp_path / "model.safetensors", with_conditions=False, device="cpu")
    pictures = pipeline.pictures(seen[:2], None, [torch.Generator().manual_seed(0) for _ in range(2)])
    assert pictures.shape == (2, SIDE, SIDE, 3)
    with pytest.raises(ValueError, match="is a base model without condition encoders"):
        load_pipeline(tmp_path / "model.safetensors", device="cpu")


def test_with_trainable_encoders_the_whole_unet_keeps_its_weights(world, tmp_path):
    train.train(hoi_args(world, tmp_path, "--trainable", "encoders"))
    before, after = (tensors.load_model_file(p)[0] for p in
                     (world / "base.safetensors", tmp_path / "model.safetensors"))  # fmt: skip
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())
    trained = training_run.load_training_state(tmp_path)["weights"]
    assert {name.split(".")[0] for name in trained} == {"condition_encoders"}
    assert all((value != 0).any() for value in trained.values())


@pytest.mark.parametrize(
    ("records", "batch_size", "world_size", "batches"), [(12, 2, 2, 1), (10, 3, 2, 2), (7, 2, 3, 1)]
)
def test_every_epoch_hands_out_every_record_once_over_all_processes(records, batch_size, world_size, batches):
    epochs, seen = 4, []
    step = 0
    while len(seen) < epochs * records:
        for rank in range(world_size):
            share = Share(batch_size, rank, world_size, batches)
            mine = [draw_indices(records, share.of_batch(k), seed=4, step=step) for k in range(batches)]
            np.testing.assert_array_equal(np.concatenate(mine), draw_indices(records, share, seed=4, step=step))
            seen += np.concatenate(mine).tolist()
        step += 1
    orders = [seen[k * records : (k + 1) * records] for k in range(epochs)]
    assert all(sorted(order) == list(range(records)) for order in orders)
    assert len({tuple(order) for order in orders}) == epochs


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--conditions", "none", "skeleton"], "leaves no encoder"),
        (["--conditions", "none", "--trainable", "encoders"], "leaves no encoder"),
        (["--conditions", "skeleton", "--init-branch", "normal=x.pth"], "normal=x.pth is for an encoder"),
        (["--reg-prob", "0.2"], "--reg-prob belongs to --reg-mode swap"),
        (["--reg-mode", "swap"], "needs --reg-data"),
        (["--reg-mode", "swap", "--reg-data", "b", "--reg-weight", "2"], "takes the place of --reg-weight"),
        (["--stage", "vae", "--trainable", "encoders"], "belong to stage hoi, not to vae"),
        (["--stage", "text", "--accumulate", "2"], "cannot serve stage text"),
        (["--stage", "base", "--baseline", "ldm"], "leaves nothing for --stage"),
        (["--baseline", "ldm", "--conditions", "none"], "leaves nothing for --conditions"),
        (["--baseline", "controlnet", "--condition-dropout", "0.1"], "leaves nothing for --condition-dropout"),
        (["--baseline", "controlnet", "--init-branch", "a=b", "--init-branch", "c=d"], "starts from one --init-branch"),
        (["--baseline", "controlnet", "--init-branch", "a=b", "--adapter", "c"], "from one --init-branch or --adapter"),
        (["--init-branch", "normal=b", "--init-branch", "normal=c"], "names normal twice"),
        (["--baseline", "dreambooth", "--adapter", "a.pth"], "leaves nothing for --adapter"),
        (["--baseline", "dreambooth"], "needs --reg-data"),
        (["--accumulate", "0"], "must be 1 or more"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(flags, message, capsys):
    with pytest.raises(SystemExit):
        train.parse_args(["--data", "d", "--out", "o", *flags])
    assert message in capsys.readouterr().err


def test_a_condition_at_weight_0_leaves_the_loss_of_a_model_without_its_encoder(world):
    stage = make_stage(world, Share(4), {})
    stage.condition_dropout = 1.0
    batch = stage.batch(0)
    weights = batch["hoi"]["condition_weights"]
    assert set(weights.sum(dim=1).tolist()) <= {1.0, 2.0}
    batch["hoi"]["condition_weights"] = torch.tensor([1.0, 0, 1]).repeat(4, 1)
    _, terms = stage(batch)
    full = stage(batch | {"hoi": batch["hoi"] | {"condition_weights": torch.ones(4, 3)}})[1]
    with torch.no_grad():
        for parameter in stage.model.condition_encoders["normal"].parameters():
            parameter.zero_()
    stage.condition_dropout = 0.0
    without = stage(batch)[1]
    assert torch.allclose(terms["hoi"], without["hoi"], rtol=1e-5)
    assert not torch.allclose(full["hoi"], without["hoi"], rtol=1e-4)  # the encoder did say something
    assert torch.equal(terms["reg"], full["reg"])  # background pictures keep all three, black


def test_a_step_thins_the_conditions_of_the_stated_share_of_pictures_evenly_over_the_six_subsets(world):
    stage = make_stage(world, Share(2))
    stage.condition_dropout = 0.4
    weights = torch.cat([stage.condition_weights(step, 64) for step in range(100)])
    codes = (weights @ torch.tensor([1.0, 2, 4])).long()
    shares = torch.bincount(codes, minlength=8) / len(codes)
    deviation = (0.6 * 0.4 / len(codes)) ** 0.5
    assert shares[0] == 0
    assert abs(shares[7] - 0.6) < 4 * deviation
    assert (shares[1:7] - 0.4 / 6).abs().max() < 4 * deviation
