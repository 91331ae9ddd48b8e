"""The U-Net against diffusers' on the same weights, and the invariants that the sampler and the training rely on."""

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from rounding import rounding, unet_operations

from hoi.network import unet as unet_module
from hoi.network.kernels import pack, plain_attention, sliced_attention
from hoi.network.unet import Anchor, Attention, UNet, UNetConfig, timestep_embedding

SMALL = UNetConfig(
    model_channels=32,
    channel_mult=(1, 2, 2, 3),
    num_res_blocks=2,
    attention_levels=(0, 1, 2),
    num_heads=4,
    context_dim=24,
)


def fill(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Random weights everywhere, the zero-initialised ones and the norms included, so that no path hides."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(1.5 * noise / parameter[0].numel() ** 0.5)
            else:  # biases around 0, the scales of norms around 1
                parameter.copy_(0.1 * noise + float(name.endswith("weight")))
    return module.eval()


def make_inputs(config: UNetConfig, batch: int = 2, size: int = 16, seed: int = 1) -> tuple:
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(batch, 4, size, size, generator=generator)
    context = torch.randn(batch, 77, config.context_dim, generator=generator)
    features = [
        torch.randn(batch, width, size >> level, size >> level, generator=generator)
        for level, width in enumerate(config.level_widths)
    ]
    return latents, torch.tensor([3, 981, 500, 20])[:batch], context, features


def diffusers_name(name: str, config: UNetConfig) -> str:
    """Our (Stable Diffusion's) tensor name -> diffusers' name; independent of the code under test."""
    levels, per_level = len(config.channel_mult), config.num_res_blocks + 1
    part, _, rest = name.partition(".")
    resnet = {
        "in_layers.0": "norm1",
        "in_layers.2": "conv1",
        "emb_layers.1": "time_emb_proj",
        "out_layers.0": "norm2",
        "out_layers.3": "conv2",
        "skip_connection": "conv_shortcut",
    }

    def inner(place: str, tail: str) -> str:
        for ours, theirs in resnet.items():
            if tail.startswith(ours + "."):
                return f"{place}.{theirs}{tail[len(ours) :]}"
        return f"{place}.{tail}"

    if part == "time_embed":
        return (
            rest.replace("0.", "time_embedding.linear_1.", 1)
            if rest[0] == "0"
            else f"time_embedding.linear_2.{rest[2:]}"
        )
    if part == "out":
        return rest.replace("0.", "conv_norm_out.", 1) if rest[0] == "0" else f"conv_out.{rest[2:]}"
    if part == "middle_block":
        number, tail = rest.split(".", 1)
        place = {"0": "resnets.0", "1": "attentions.0", "2": "resnets.1"}[number]
        return inner(f"mid_block.{place}", tail)
    number, sub, tail = rest.split(".", 2)
    number, sub = int(number), int(sub)
    if part == "input_blocks":
        if number == 0:
            return f"conv_in.{tail}"
        level, layer = divmod(number - 1, per_level)
        if layer == config.num_res_blocks:
            return f"down_blocks.{level}.downsamplers.0.conv.{tail.removeprefix('op.')}"
        return inner(f"down_blocks.{level}.{('resnets', 'attentions')[sub]}.{layer}", tail)
    level, layer = divmod(number, per_level)
    if tail.startswith("conv."):
        return f"up_blocks.{level}.upsamplers.0.{tail}"
    assert level < levels
    return inner(f"up_blocks.{level}.{('resnets', 'attentions')[sub]}.{layer}", tail)


def diffusers_twin(unet: UNet) -> UNet2DConditionModel:
    config = unet.config
    attends = [level in config.attention_levels for level in range(len(config.channel_mult))]
    twin = UNet2DConditionModel(
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        block_out_channels=config.level_widths,
        layers_per_block=config.num_res_blocks,
        down_block_types=tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends),
        up_block_types=tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
        attention_head_dim=config.num_heads,  # diffusers' misnomer: the number of heads
        cross_attention_dim=config.context_dim,
        norm_num_groups=32,
    )
    state = {diffusers_name(name, config): tensor for name, tensor in unet.state_dict().items()}
    twin.load_state_dict(state, strict=True)
    return twin.eval()


@pytest.mark.parametrize(
    "attention",
    [F.scaled_dot_product_attention, plain_attention, sliced_attention],
    ids=["sdpa", "plain", "sliced"],
)
@torch.no_grad()
def test_unet_equals_diffusers_with_and_without_condition_features(monkeypatch, attention):
    monkeypatch.setattr(unet_module, "attend", attention)
    unet = fill(UNet(SMALL), seed=0)
    twin = diffusers_twin(unet)
    latents, timesteps, context, features = make_inputs(SMALL)
    theirs = twin(latents, timesteps, context).sample
    torch.testing.assert_close(unet(latents, timesteps, context), theirs, atol=1e-4, rtol=0)
    theirs_with = twin(latents, timesteps, context, down_intrablock_additional_residuals=list(features)).sample
    torch.testing.assert_close(unet(latents, timesteps, context, features), theirs_with, atol=1e-4, rtol=0)
    assert theirs.std() > 0.1 and (theirs_with - theirs).abs().mean() > 0.1  # the comparison is about something


@torch.no_grad()
def test_a_packed_unet_equals_diffusers(monkeypatch):
    monkeypatch.setattr("hoi.network.kernels.MIN_SLICED_SCORES", 1000)
    unet = fill(UNet(SMALL), seed=9)
    twin = diffusers_twin(unet)
    latents, timesteps, context, features = make_inputs(SMALL)
    theirs = twin(latents, timesteps, context, down_intrablock_additional_residuals=list(features)).sample
    packed = pack(unet)(latents, timesteps, unet.cache_context(context), features)
    torch.testing.assert_close(packed, theirs, atol=1e-4, rtol=0)


@torch.no_grad()
def test_one_block_a_level_and_no_attention_on_the_first_equal_diffusers():
    config = UNetConfig(
        model_channels=32,
        channel_mult=(1, 2, 2, 2),
        num_res_blocks=1,
        attention_levels=(1, 2, 3),
        num_heads=4,
        context_dim=16,
    )
    unet = fill(UNet(config), seed=1)
    assert unet.feature_blocks == [1, 3, 5, 7]
    latents, timesteps, context, _ = make_inputs(config)  # diffusers takes no features where a level has no attention
    theirs = diffusers_twin(unet)(latents, timesteps, context).sample
    torch.testing.assert_close(unet(latents, timesteps, context), theirs, atol=1e-4, rtol=0)


@torch.no_grad()
def test_zero_condition_features_leave_the_output_bit_identical():
    unet = fill(UNet(SMALL), seed=2)
    latents, timesteps, context, features = make_inputs(SMALL)
    plain = unet(latents, timesteps, context)
    assert torch.equal(plain, unet(latents, timesteps, context, [torch.zeros_like(feature) for feature in features]))
    features = [torch.zeros_like(feature) for feature in features[:3]] + [features[3]]
    assert not torch.equal(plain, unet(latents, timesteps, context, features))


@torch.no_grad()
def test_feature_k_enters_after_the_last_block_of_level_k_on_main_path_and_skip():
    unet = UNet(UNetConfig(model_channels=32, channel_mult=(1, 1, 1, 1), num_heads=1, context_dim=8)).eval()
    latents, timesteps, context, features = make_inputs(unet.config)
    seen: dict[int, torch.Tensor] = {}
    for index in (3, 6, 9):
        unet.input_blocks[index].register_forward_pre_hook(lambda _, args, k=index // 3 - 1: seen.update({k: args[0]}))
    unet.middle_block.register_forward_pre_hook(lambda _, args: seen.update({3: args[0]}))
    skips: list[torch.Tensor] = []
    for block in unet.output_blocks:
        block.register_forward_pre_hook(lambda _, args: skips.append(args[0][:, -32:]))
    before: dict[int, torch.Tensor] = {}
    for k, index in enumerate((2, 5, 8, 11)):
        unet.input_blocks[index].register_forward_hook(lambda _, args, result, k=k: before.update({k: result}))
    unet(latents, timesteps, context, features)
    for k in range(4):
        assert torch.equal(seen[k], before[k] + features[k])
        assert torch.equal(skips[9 - 3 * k], before[k] + features[k])  # decoder block 0 takes input block 11, and so on


@torch.no_grad()
def test_cached_context_gives_the_same_bits_as_the_context_itself():
    unet = fill(UNet(SMALL), seed=3)
    latents, timesteps, context, features = make_inputs(SMALL)
    cached = unet.cache_context(context)
    calls: list[int] = []
    for attention in unet.cross_attentions():
        attention.to_k.register_forward_hook(lambda *_: calls.append(1))
    first = unet(latents, timesteps, cached, features)
    second = unet(latents * 2, timesteps, cached, features)
    assert not calls  # the text projections are not evaluated again
    assert torch.equal(first, unet(latents, timesteps, context, features))
    assert torch.equal(second, unet(latents * 2, timesteps, context, features))
    assert len(calls) == 2 * len(unet.cross_attentions())


@torch.no_grad()
def test_a_guidance_batch_equals_two_single_passes_and_both_halves_get_the_features():
    unet = fill(UNet(SMALL), seed=4)
    latents, timesteps, context, features = make_inputs(SMALL)
    uncond_context = torch.randn(context.shape, generator=torch.Generator().manual_seed(9))
    batched = unet(latents.repeat(2, 1, 1, 1), timesteps.repeat(2), torch.cat([uncond_context, context]), features)
    apart = torch.cat([unet(latents, timesteps, half, features) for half in (uncond_context, context)])
    # Not bit for bit: another batch size means other matrix kernels, which sum in another order.
    torch.testing.assert_close(batched, apart, atol=rounding(apart, unet_operations(unet)), rtol=0)


@pytest.mark.parametrize("min_sliced_scores", [1, 10**9], ids=["sliced", "plain"])
@torch.no_grad()
def test_bf16_is_as_close_to_fp32_as_diffusers_in_bf16(monkeypatch, min_sliced_scores):
    monkeypatch.setattr("hoi.network.kernels.MIN_SLICED_SCORES", min_sliced_scores)
    unet = fill(UNet(SMALL), seed=5)
    latents, timesteps, context, features = make_inputs(SMALL)
    exact = unet(latents, timesteps, context, features)
    twin, bf16 = diffusers_twin(unet), torch.bfloat16
    with torch.autocast("cpu", bf16):
        ours = {"autocast": unet(latents, timesteps, context, features)}
        theirs = twin(latents, timesteps, context, down_intrablock_additional_residuals=list(features)).sample
    limits = {"autocast": (theirs - exact).std()}
    unet.to(bf16, memory_format=torch.channels_last), twin.to(bf16, memory_format=torch.channels_last)
    ours["weights"] = unet(latents, timesteps, context.to(bf16), features)
    ours["packed"] = pack(unet)(latents, timesteps, context.to(bf16), features)
    residuals = [feature.to(bf16) for feature in features]
    theirs = twin(latents.to(bf16), timesteps, context.to(bf16), down_intrablock_additional_residuals=residuals).sample
    limits["weights"] = limits["packed"] = (theirs - exact).std()
    for name, approximate in ours.items():
        assert approximate.dtype == torch.float32
        assert 0 < limits[name] < 0.1 * exact.std()
        # Both are rounding errors, so their ratio varies: 0.94 to 1.32 over four sets of weights and the kernels of
        # three processors.  A softmax summed in bf16 or an attention rounded to 8 bits gives 1.7 to 2.8.
        assert (approximate - exact).std() < 1.5 * limits[name], name


def test_gradient_checkpointing_changes_no_gradient():
    unet = fill(UNet(SMALL), seed=6)
    latents, timesteps, context, features = make_inputs(SMALL)
    gradients = []
    for checkpointing in (False, True):
        unet.gradient_checkpointing = checkpointing
        unet.zero_grad()
        unet(latents, timesteps, context, features).square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in unet.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, atol=1e-7, rtol=1e-5)


def test_frozen_encoder_passes_gradients_to_the_features_and_keeps_nothing_before_the_first():
    unet = fill(UNet(SMALL), seed=7)
    unet.requires_grad_(False)
    trained = unet.decoder_parameters()
    for parameter in trained:
        parameter.requires_grad_(True)
    latents, timesteps, context, features = make_inputs(SMALL)
    features = [feature.requires_grad_() for feature in features]
    tracked: list[bool] = []
    for block in unet.input_blocks:
        block.register_forward_hook(lambda _, args, result: tracked.append(result.requires_grad))
    unet(latents, timesteps, context, features).square().mean().backward()
    assert tracked == [False] * 3 + [True] * 9  # blocks 0 to 2 come before feature 0 is added
    assert all(feature.grad.abs().max() > 0 for feature in features)
    for name, parameter in unet.named_parameters():
        assert (parameter.grad is not None) == name.startswith("out"), name


@torch.no_grad()
def test_latents_shared_by_two_texts_equal_their_repetition():
    config = UNetConfig(
        model_channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_levels=(1,), num_heads=4, context_dim=24
    )
    for unet in (UNet(SMALL), UNet(config)):  # in the second the halves part only at level 1
        fill(unet, seed=8)
        latents, timesteps, context, features = make_inputs(unet.config)
        context = torch.cat([context.flip(0), context])
        repeated = unet(latents.repeat(2, 1, 1, 1), timesteps.repeat(2), context, features)
        rows: list[int] = []
        for block in unet.input_blocks:
            block.register_forward_hook(lambda _, args, result, rows=rows: rows.append(len(result)))
        shared = unet(latents, timesteps, unet.cache_context(context), features)
        torch.testing.assert_close(shared, repeated, atol=1e-4, rtol=0)  # outputs are about 1
        first_text = 1 + 2 * unet.config.attention_levels[0]  # input blocks before it
        assert rows[:first_text] == [2] * first_text and rows[-1] == 4


def test_timestep_embedding_has_cosines_first():
    embedding = timestep_embedding(torch.tensor([0, 7]), 4)  # frequencies 1 and 0.01
    expected = [[1, 1, 0, 0], [0.7539022543, 0.9975510003, 0.6569865987, 0.0699428473]]
    torch.testing.assert_close(embedding, torch.tensor(expected), atol=1e-7, rtol=0)


def test_wrong_shapes_are_refused_with_what_was_expected():
    unet = UNet(SMALL)
    latents, timesteps, context, features = make_inputs(SMALL)
    with pytest.raises(ValueError, match="divisible by 8"):
        unet(latents[..., :12], timesteps, context)
    with pytest.raises(ValueError, match=r"timesteps have shape \(1,\), expected \(2,\)"):
        unet(latents, timesteps[:1], context)
    with pytest.raises(ValueError, match="context has batch 3, expected a multiple of the latents' batch 2"):
        unet(latents, timesteps, context[[0, 0, 1]])
    with pytest.raises(ValueError, match="got 3 condition features, expected 4"):
        unet(latents, timesteps, context, features[:3])
    with pytest.raises(ValueError, match="channels, height and width must agree"):
        unet(latents, timesteps, context, features[::-1])
    with pytest.raises(ValueError, match="width 48 must be a multiple of 32"):
        UNetConfig(model_channels=48)
    with pytest.raises(ValueError, match="64 channels times .* must be whole numbers"):
        UNetConfig(model_channels=64, channel_mult=(1, 1.3))


def test_widths_that_are_no_multiples_of_the_first_survive_the_rounding_of_their_ratio():
    assert 352 * (480 / 352) != 480
    assert UNetConfig(model_channels=352, channel_mult=(1, 480 / 352)).level_widths == (352, 480)


def anchored_reference(attention: torch.nn.Module, tokens: torch.Tensor, anchor: int, frames: int) -> torch.Tensor:
    """One frame and one head at a time, the softmax written out: Sec. 4.4 as the paper words it."""
    rows = []
    for item in range(len(tokens)):
        half = item // frames * frames
        seen = torch.cat([tokens[item], tokens[half + anchor]])  # own tokens, then the anchor's
        q, k, v = attention.to_q(tokens[item]), attention.to_k(seen), attention.to_v(seen)
        heads = []
        for part in range(attention.num_heads):
            cut = slice(part * q.shape[1] // attention.num_heads, (part + 1) * q.shape[1] // attention.num_heads)
            weights = (q[:, cut] @ k[:, cut].T / (cut.stop - cut.start) ** 0.5).exp()
            heads.append(weights / weights.sum(dim=1, keepdim=True) @ v[:, cut])
        rows.append(attention.to_out(torch.cat(heads, dim=1)))
    return torch.stack(rows)


@pytest.mark.parametrize("min_sliced_scores", [1, 10**9], ids=["sliced", "torch's"])
@torch.no_grad()
def test_self_attention_with_an_anchor_equals_the_plain_formula_in_both_halves(monkeypatch, min_sliced_scores):
    monkeypatch.setattr("hoi.network.kernels.MIN_SLICED_SCORES", min_sliced_scores)
    attention = fill(Attention(32, 4), seed=1)
    tokens = torch.randn(6, 20, 32, generator=torch.Generator().manual_seed(2))  # two halves of three frames
    for anchor in range(3):
        got = attention(tokens, anchor=Anchor(anchor, 3))
        torch.testing.assert_close(got, anchored_reference(attention, tokens, anchor, 3), atol=1e-5, rtol=0)
    assert (got - attention(tokens)).abs().max() > 0.1


@torch.no_grad()
def test_an_anchor_is_what_it_would_be_alone_and_the_others_do_not_see_each_other():
    unet = fill(UNet(SMALL), seed=3)
    latents, timesteps, context, features = make_inputs(SMALL, batch=4)
    timesteps = timesteps[:1].expand(4)

    def eps(items: list[int], anchor: int | None = None) -> torch.Tensor:  # two texts a frame: (2, items, ...)
        texts = torch.cat([context[items].flip(1), context[items]])
        eps = unet(latents[items], timesteps[items], texts, [f[items] for f in features], anchor)
        return eps.unflatten(0, (2, -1))

    clip, plain = eps([0, 1, 2, 3], 2), eps([0, 1, 2, 3])
    torch.testing.assert_close(clip[:, 2:3], eps([2]), atol=1e-4, rtol=0)
    for frame in (0, 1, 3):
        torch.testing.assert_close(clip[:, frame], eps([2, frame], 0)[:, 1], atol=1e-4, rtol=0)
        assert (clip[:, frame] - plain[:, frame]).abs().max() > 0.1


@torch.no_grad()
def test_shared_latents_with_an_anchor_equal_their_repetition_in_two_anchored_halves():
    unet = fill(UNet(SMALL), seed=8)
    latents, timesteps, context, features = make_inputs(SMALL, batch=3)
    texts = torch.cat([context.flip(1), context])
    shared = unet(latents, timesteps, unet.cache_context(texts), features, 1)
    apart = [unet(latents, timesteps, half, features, 1) for half in texts.chunk(2)]
    torch.testing.assert_close(shared, torch.cat(apart), atol=1e-4, rtol=0)


@torch.no_grad()
def test_every_self_attention_sees_the_anchor():
    unet = fill(UNet(SMALL), seed=4)
    latents, timesteps, context, features = make_inputs(SMALL)
    seen: dict[str, bool] = {}
    for name, module in unet.named_modules():
        if name.endswith("attn1"):
            module.register_forward_pre_hook(
                lambda _, args, kwargs, name=name: seen.update({name: kwargs["anchor"] is not None}), with_kwargs=True
            )
    unet(latents, timesteps, context, features, 0)
    assert len(seen) == 16 and all(seen.values())


@pytest.mark.slow
@torch.no_grad()
def test_torch_compile_takes_the_unet_as_a_whole(monkeypatch):
    """As it is sampled on a GPU; what the compiler would make of it is left out, where it would have to stop is not."""
    monkeypatch.setattr(unet_module, "attend", F.scaled_dot_product_attention)
    unet = fill(UNet(SMALL), seed=0)
    latents, timesteps, context, features = make_inputs(SMALL)
    cached = unet.cache_context(torch.cat([context, -context]))
    expected = unet(latents, timesteps, cached, features)
    unet.compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(unet(latents, timesteps, cached, features), expected)
