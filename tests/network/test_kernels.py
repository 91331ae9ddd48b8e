"""Packed layers against the plain ones, and the fall-backs where PyTorch lacks the private operators."""

import pytest
import torch
import torch.nn.functional as F
from rounding import rounding
from torch import nn

from hoi.common.files import read_json
from hoi.network import kernels
from hoi.network.kernels import (
    PackedConv2d,
    PackedLinear,
    PackedUpsample,
    Upsample,
    attend,
    can_pack,
    multiply_transposed,
    pack,
    plain_attention,
    sliced_attention,
)

DTYPES = [torch.float32, torch.bfloat16]
LINEARS = 0 if torch.backends.cpu.get_cpu_capability() == "AVX2" else 2  # where plain ones are faster
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.02}


@pytest.fixture(autouse=True)
def measured(tmp_path, monkeypatch) -> dict[str, bool]:
    """An empty list of what was measured, in a file of its own."""
    content: dict[str, bool] = {}
    monkeypatch.setattr(kernels, "measured_here", lambda: (tmp_path / "kernels.json", content))
    return content


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def network() -> nn.Module:
    """Every kind of layer that the networks have, over odd sizes."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 20, 3, padding=1),
        nn.Sequential(nn.GroupNorm(4, 20), nn.Conv2d(20, 24, 3, stride=2, padding=1), nn.SiLU()),
        nn.Conv2d(24, 40, 1),
        nn.Conv2d(40, 12, 3, stride=2),
        nn.Flatten(2),
        nn.Linear(9, 30, bias=False),
        nn.Linear(30, 7),
    ).requires_grad_(False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_layers_compute_what_the_plain_ones_do(network, dtype):
    if not can_pack(dtype):
        pytest.skip(f"no packed layers for {dtype} here")
    network, image = network.to(dtype), normal(2, 3, 13, 13).to(dtype)
    plain = network(image)
    assert pack(network) is network
    kinds = [type(layer) for layer in network.modules()]
    assert kinds.count(PackedConv2d) == 3 and kinds.count(PackedLinear) == LINEARS and kinds.count(nn.Conv2d) == 1
    for memory_format in (torch.contiguous_format, torch.channels_last):
        packed = network(image.contiguous(memory_format=memory_format))
        torch.testing.assert_close(packed, plain, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    still_plain = {"1.0", "2"} | (set() if LINEARS else {"5", "6"})
    assert {name.split(".weight")[0].split(".bias")[0] for name in network.state_dict()} == still_plain


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_a_packed_upsample_is_a_convolution_of_the_repeated_pixels(dtype):
    if not can_pack(dtype):
        pytest.skip(f"no packed layers for {dtype} here")
    torch.manual_seed(1)
    network = nn.Sequential(Upsample(12)).to(dtype)
    weight, bias, image = network[0].conv.weight.detach(), network[0].conv.bias.detach(), normal(2, 12, 5, 7).to(dtype)
    pixels = image.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    expected = F.conv2d(pixels.double(), weight.double(), bias.double(), padding=1)
    for _ in ("plain", "packed"):
        torch.testing.assert_close(network(image).double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
        pack(network)
    assert isinstance(network[0], PackedUpsample)


def test_a_packed_layer_takes_other_sizes_than_the_first(network):
    convolutions = nn.Sequential(*list(network)[:4])
    images = [normal(1, 3, side, 2 * side) for side in (13, 40)]
    plain = [convolutions(image) for image in images]
    pack(convolutions)
    for image, expected in zip(images, plain, strict=True):
        torch.testing.assert_close(convolutions(image), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("fault", [AttributeError, RuntimeError, TypeError, None])
def test_without_the_private_operators_everything_stays_plain(network, monkeypatch, fault):
    def fail(self, x):
        if fault is None:
            return torch.zeros(16, 16)  # an operator that now means something else
        raise fault("no such operator")

    monkeypatch.setattr(PackedLinear, "forward", fail)
    can_pack.cache_clear()
    try:
        before = [type(layer) for layer in network.modules()]
        assert [type(layer) for layer in pack(network).modules()] == before
        a, b = normal(5, 8), normal(6, 8, seed=1)
        torch.testing.assert_close(multiply_transposed(a, b), a @ b.T)
    finally:
        can_pack.cache_clear()


def test_layers_of_another_dtype_or_kind_stay_plain():
    network = nn.Sequential(nn.Linear(4, 4).double(), nn.MultiheadAttention(8, 2), nn.ConvTranspose2d(2, 2, 2))
    pack(network)
    assert not [layer for layer in network.modules() if isinstance(layer, (PackedLinear, PackedConv2d))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_attention_is_softmax_of_scores_times_values(monkeypatch, dtype):
    query, key, value = (
        normal(2, n, 3 * 8, seed=n).to(dtype).unflatten(2, (3, 8)).transpose(1, 2) for n in (37, 29, 29)
    )
    weights = torch.einsum("bhnd,bhmd->bhnm", query.double(), key.double()).div(8**0.5).softmax(dim=3)
    exact = torch.einsum("bhnm,bhmd->bhnd", weights, value.double())
    monkeypatch.setattr("hoi.network.kernels.SLICE_SCORES", 29 * 10)  # slices of 10, 10, 10 and 7 queries
    # Eight: scale, scores and exponential, which multiplies their errors by scores up to 4.6, then sums and quotient.
    tolerance = rounding(exact, 8, dtype)
    for attention in (plain_attention, sliced_attention, F.scaled_dot_product_attention):
        torch.testing.assert_close(attention(query, key, value).double(), exact, atol=tolerance, rtol=0)


@pytest.mark.parametrize("offset", [-300.0, -60.0, 0.0, 60.0, 300.0])
def test_scores_far_from_zero_change_no_attention(offset):
    query, key, value = (normal(1, 2, n, 8, seed=n).double() for n in (6, 9, 10))
    value = value[:, :, :9]
    query[..., 0], key[..., 0] = 8**0.5, offset  # shifts every score alike, which softmax does not see
    expected = plain_attention(query, key, value)
    attended = sliced_attention(query.float(), key.float(), value.float())
    torch.testing.assert_close(attended.double(), expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_a_wide_convolution_by_winograds_products_is_the_convolution(monkeypatch):
    monkeypatch.setattr(kernels, "TILES_AT_ONCE", 20)  # several stretches, the last one shorter
    monkeypatch.setattr(kernels, "is_faster", lambda *args: True)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(130, 129, 3, padding=1)).to(memory_format=torch.channels_last)
    weight, bias = network[0].weight.double(), network[0].bias.double()
    if not isinstance(pack(network)[0], PackedConv2d):
        pytest.skip("no packed layers here")
    for height, width in ((36, 44), (37, 44), (8, 8)):  # whole tiles, not whole, and smaller than the first picture
        image = normal(2, 130, height, width)
        exact = F.conv2d(image.double(), weight, bias, padding=1)
        made = network(image)
        assert (made.double() - exact).abs().max() < 1e-4 * exact.std()  # 5e-5 were seen
        torch.testing.assert_close(network(image[:1]), made[:1], atol=0, rtol=0)  # whatever else is in the batch
    assert network[0].winograd is not None


@torch.no_grad()
@pytest.mark.parametrize("layer, side", [
    (nn.Conv2d(128, 128, 3, padding=1, stride=2), 64), (nn.Conv2d(128, 128, 3), 66),
    (nn.Conv2d(128, 64, 3, padding=1), 32),
    (nn.Conv2d(128, 128, 3, padding=1), 16), (nn.Conv2d(128, 128, 3, padding=1).bfloat16(), 32),
])  # fmt: skip
def test_other_convolutions_stay_as_they_are(layer, side):
    network = nn.Sequential(layer)
    if isinstance(pack(network)[0], PackedConv2d):
        network(normal(1, 128, side, side).to(layer.weight.dtype))
        assert network[0].winograd is None


@torch.no_grad()
def test_without_free_memory_no_weights_are_turned(monkeypatch):
    monkeypatch.setattr(kernels, "available_memory", lambda: kernels.FREE_MEMORY)
    network = pack(nn.Sequential(nn.Conv2d(128, 128, 3, padding=1)))
    network(normal(1, 128, 32, 32))
    assert getattr(network[0], "winograd", None) is None


@torch.no_grad()
@pytest.mark.parametrize("found", [True, False])
def test_a_wide_convolution_goes_the_way_that_was_measured_as_faster(monkeypatch, found):
    asked: list[tuple] = []
    monkeypatch.setattr(kernels, "is_faster", lambda *args: asked.append(args) or found)
    layer, image = nn.Conv2d(128, 160, 3, padding=1), normal(2, 128, 68, 132)
    exact = layer(image)
    network = pack(nn.Sequential(layer))
    if not isinstance(network[0], PackedConv2d):
        pytest.skip("no packed layers here")
    for _ in range(2):  # asked once
        torch.testing.assert_close(network(image), exact, atol=1e-4, rtol=0)
    [(what, ours, theirs, part)] = asked
    assert what == "Winograd, [160, 128], [64, 64]" and part.shape == (1, 128, 64, 64)
    assert isinstance(ours, kernels.WinogradConv2d) and theirs is network[0]
    assert network[0].winograd is (ours if found else None)


def test_what_was_measured_is_kept_and_not_measured_again(measured, monkeypatch):
    x = normal(3)
    seconds = {torch.exp: 0.1, torch.sin: 0.2}
    monkeypatch.setattr(kernels.timeit, "repeat", lambda run, **_: [seconds[run.__defaults__[0]], 0.3])
    assert kernels.is_faster("exp", torch.exp, torch.sin, x)
    assert not kernels.is_faster("sin", torch.sin, torch.exp, x)
    threads = torch.get_num_threads()
    assert measured == {f"exp, {threads} threads": True, f"sin, {threads} threads": False}
    assert read_json(kernels.measured_here()[0], "list") == measured
    monkeypatch.setattr(kernels.timeit, "repeat", None)
    assert kernels.is_faster("exp", torch.exp, torch.sin, x)
    assert not kernels.is_faster("sin", torch.sin, torch.exp, x)


def test_a_damaged_list_of_measured_kernels_is_measured_anew(tmp_path, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kernels.measured_here.cache_clear()
    path, content = kernels.measured_here()
    assert content == {} and tmp_path in path.parents
    path.parent.mkdir(parents=True)
    path.write_text("{")
    kernels.measured_here.cache_clear()
    assert kernels.measured_here() == (path, {})
    kernels.measured_here.cache_clear()


def test_slices_are_taken_only_where_no_gradient_is_wanted(monkeypatch):
    calls: list[int] = []
    monkeypatch.setattr("hoi.network.kernels.MIN_SLICED_SCORES", 1)
    monkeypatch.setattr("hoi.network.kernels.sliced_attention", lambda *args: calls.append(1) or args[0])
    monkeypatch.setattr("hoi.network.kernels.is_faster", lambda *args: True)
    query, key, value = (normal(1, 2, 5, 4, seed=seed) for seed in range(3))
    for wanting in range(3):
        tensors = [tensor.clone().requires_grad_(i == wanting) for i, tensor in enumerate((query, key, value))]
        attend(*tensors).sum().backward()
        assert tensors[wanting].grad.abs().max() > 0
    assert not calls
    attend(query, key, value)
    assert calls
    assert kernels.can_pack(torch.float16) is False


def test_plain_products_are_taken_in_bf16_while_the_scores_of_all_heads_can_be_kept(monkeypatch):
    calls: list[int] = []
    counted = lambda *args: calls.append(1) or plain_attention(*args)  # noqa: E731
    monkeypatch.setattr("hoi.network.kernels.plain_attention", counted)
    query, key, value = (normal(2, 3, 5, 4, seed=seed).requires_grad_() for seed in range(3))
    for most, expected in ((2 * 3 * 5 * 5, 1), (2 * 3 * 5 * 5 - 1, 0)):
        monkeypatch.setattr("hoi.network.kernels.MAX_PLAIN_SCORES", most)
        calls.clear()
        attend(query, key, value)
        assert not calls
        attend(query.bfloat16(), key.bfloat16(), value.bfloat16())
        assert len(calls) == expected
