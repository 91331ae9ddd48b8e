"""Tokenizer and text encoder: equal to transformers' CLIP, on the same weights and open_clip's own merge list."""

import hashlib
import json
import socket
from pathlib import Path

import open_clip
import pytest
import torch
from fake_networks import text_weights
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from hoi.network import text
from hoi.network.text import TextConfig, TextEncoder, first_eos, reading_hints, tokenize, unread_end
from hoi.training.small_clip import PictureText, small_clip_loss
from hoi.weights.names import text_names

# sha256 of sorted lines "name [d0,d1,...]": 148 tensors in open_clip's ViT-L/14 text tower, 196 in Stable Diffusion.
OPEN_CLIP_TENSORS = "7d2ef2594602ab789a30a0890b7796d3a14f07724c1b9695759b8fa0f37d4901"
STABLE_DIFFUSION_TENSORS = "17f60827d7cddc3df6086becb109a3190970af5eb5c9ce91fca0f58b5731bc8c"

SMALL = TextConfig(width=64, heads=4, layers=3)

AWKWARD_PROMPTS = [
    "",
    "a photo of a hand grasping a pink mug on the beach",
    "elongated body, low resolution, bad anatomy",
    "it's we're they'll I'd can't",
    "1234567890 3.14 2x4",
    "  MiXeD   CaSe\tand\nwhitespace  ",
    "!?.,;:---...()[]{}<>|",
    "naïve café résumé über façade",
    "e\u0301 combining accent",
    "日本語の手とカップ",
    "Привет мир",
    "🙂🖐️☕ emoji",
    "hand " * 100,
    "a very long prompt, " * 30,
    "mug" * 60,
    "x",
    "!",
    "a!b!c",
    "Ünïcödé ß ẞ İstanbul",
    "http://example.com/path?x=1&y=2",
    "snake_case_and-hyphen",
    "C++ & C#, $100 50% #1 @home",
    "(mug:1.3) [bowl]",
    "don''t 's 's 'S 'LL",
    "\u200bzero\u200bwidth",
    "supercalifragilisticexpialidocious antidisestablishmentarianism",
]

# Recent transformers no longer repairs such text, Stable Diffusion's tokenizer did: recorded ids, without padding.
REPAIRED_PROMPTS = {
    "“curly” ‘quotes’ don’t": [49406, 257, 20795, 257, 262, 5808, 262, 847, 713, 49407],
    "a &amp; b &lt;c&gt; &quot;d&quot;": [49406, 320, 261, 321, 283, 322, 285, 257, 323, 257, 49407],
    "ﬁne ﬂuﬀy ½ ¾ ²": [49406, 3797, 17054, 33613, 126, 378, 41175, 49407],
}


@pytest.fixture(scope="module")
def clip_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> CLIPTokenizer:
    """transformers' tokenizer, its two files written from open_clip's merge list."""
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    ours = open_clip.SimpleTokenizer()
    spelling = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {spelling.get(token, token): index for token, index in ours.encoder.items()}
    merges = [" ".join(pair) for pair in ours.bpe_ranks]
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder)


def clip_twin(config: TextConfig, seed: int = 0) -> CLIPTextModel:
    """transformers' text model with random weights large enough to tell activations and orders apart."""
    twin = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.width,
            intermediate_size=4 * config.width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            hidden_act="quick_gelu" if config.quick_gelu else "gelu",
        )
    ).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in twin.named_parameters():
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.copy_((tensor.ndim == 1 and name.endswith("weight")) + 0.2 * noise)
    return twin


def hash_of(state: dict[str, Tensor]) -> str:
    lines = sorted(f"{name} [{','.join(map(str, tensor.shape))}]" for name, tensor in state.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@pytest.mark.parametrize("prompt", AWKWARD_PROMPTS)
def test_ids_equal_those_of_transformers(prompt: str, clip_tokenizer: CLIPTokenizer):
    expected = clip_tokenizer(prompt, padding="max_length", max_length=77, truncation=True)["input_ids"]
    assert tokenize([prompt])[0].tolist() == expected


@pytest.mark.parametrize("prompt", REPAIRED_PROMPTS)
def test_ids_of_quotes_entities_and_ligatures_are_the_recorded_ones(prompt: str):
    ids = REPAIRED_PROMPTS[prompt]
    assert tokenize([prompt])[0].tolist() == ids + [49407] * (77 - len(ids))


@pytest.mark.parametrize("prompt", [*AWKWARD_PROMPTS, "mug " * 75, "mug " * 76])
def test_the_end_that_is_not_read_is_what_transformers_cuts_off(prompt: str, clip_tokenizer: CLIPTokenizer):
    whole, read = (clip_tokenizer(prompt, truncation=cut, max_length=77).input_ids for cut in (False, True))
    expected = clip_tokenizer.decode(whole[len(read) - 1 : -1])
    assert unread_end(prompt).replace(" ", "") == expected.replace(" ", "")


def test_lost_ends_and_words_in_other_scripts_are_told_once():
    long = "A hand " * 37 + "is GRASPING a naïve mug"  # 74 tokens, and "is" the 75th
    assert reading_hints([long, long, "ein Häferl, déjà vu, 3 x 2"]) == [
        f'hint: the text encoder reads 75 tokens and never sees the end: "... grasping a naïve mug" of "{long}"'
    ]
    (hint,) = reading_hints(["粉色的杯子", "a кружка"])
    assert "it sees only bytes of 粉色的杯子, кружка" in hint


def test_a_bare_string_is_refused():
    with pytest.raises(ValueError, match=r"list of prompts, got the string 'a mug'"):
        tokenize("a mug")


@pytest.mark.parametrize("quick_gelu", [True, False])
@torch.no_grad()
def test_context_equals_the_last_hidden_state_of_transformers(quick_gelu: bool):
    config = TextConfig(width=64, heads=4, layers=3, quick_gelu=quick_gelu)
    twin, encoder = clip_twin(config), TextEncoder(config).eval()
    encoder.load_state_dict(text_weights(twin, config))
    token_ids = tokenize(["", "a pink mug", "a hand holding a wooden bowl on the beach", "mug " * 100])
    context, expected = encoder(token_ids), twin(token_ids).last_hidden_state
    assert expected.std() > 0.5
    torch.testing.assert_close(context, expected, atol=1e-4, rtol=0)


def test_names_and_shapes_are_those_of_open_clip_and_stable_diffusion():
    with torch.device("meta"):
        state = TextEncoder(TextConfig()).state_dict()
    assert len(state) == 148 and hash_of(state) == OPEN_CLIP_TENSORS
    stable_diffusion = {}
    for ours, theirs in text_names(TextConfig(), "text_model.").items():
        stable_diffusion |= zip(theirs, state[ours.removeprefix("text_encoder.")].chunk(len(theirs)), strict=True)
    assert len(stable_diffusion) == 196 and hash_of(stable_diffusion) == STABLE_DIFFUSION_TENSORS


def test_building_and_tokenizing_need_no_network(monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object) -> None:
        raise AssertionError("tried to open a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    text.clip_tokenizer.cache_clear()
    TextEncoder(SMALL)
    assert tokenize(["mug"])[0, :3].tolist() == [49406, 9722, 49407]


@torch.no_grad()
def test_padding_reaches_the_context_only_behind_the_prompt():
    encoder = TextEncoder(SMALL).eval()
    encoder.load_state_dict(text_weights(clip_twin(SMALL), SMALL))
    refilled = tokenize(["a pink mug"])
    padded_with_0 = open_clip.SimpleTokenizer()(["a pink mug"])
    end = int(first_eos(refilled))
    assert end == 4
    difference = (encoder(refilled) - encoder(padded_with_0)).abs()[0]
    assert difference[: end + 1].max() < 1e-5  # the causal mask: a prompt does not see its padding
    assert difference[end + 1 :].min(dim=0).values.max() > 0.1  # the U-Net does: hence the refill
    assert torch.equal(encoder.pooled(encoder(refilled), refilled), encoder(refilled)[:, 4])


def unit(batch: int, width: int, seed: int) -> Tensor:
    return torch.nn.functional.normalize(torch.randn((batch, width), generator=torch.Generator().manual_seed(seed)))


def test_loss_without_repeated_captions_is_that_of_open_clip():
    pictures, captions, log_temperature = unit(6, 8, 0), unit(6, 8, 1), torch.tensor(2.0)
    expected = open_clip.ClipLoss()(pictures, captions, log_temperature.exp())
    torch.testing.assert_close(small_clip_loss(pictures, captions, log_temperature, torch.arange(6)), expected)


def test_loss_shares_the_target_among_captions_with_the_same_words():
    pictures, captions, groups = unit(4, 8, 0), unit(4, 8, 1), torch.tensor([0, 1, 0, 2])
    log_probabilities = (
        (3.0 * pictures @ captions.T).log_softmax(dim=1),
        (3.0 * captions @ pictures.T).log_softmax(dim=1),
    )
    by_hand = 0.0
    for table in log_probabilities:
        for i, right in enumerate(([0, 2], [1], [0, 2], [3])):
            by_hand -= sum(table[i, j] for j in right) / len(right) / 8
    torch.testing.assert_close(small_clip_loss(pictures, captions, torch.tensor(3.0).log(), groups), by_hand)


def test_captions_learn_to_find_their_pictures():
    torch.manual_seed(1)  # only the starting weights
    colors = {"red": (1, -1, -1), "green": (-1, 1, -1), "blue": (-1, -1, 1), "white": (1, 1, 1)}
    images = torch.stack(
        [torch.tensor(c, dtype=torch.float32)[:, None, None].expand(3, 32, 32) for c in colors.values()]
    )
    images = images * torch.linspace(0.3, 1, 32)  # a shading
    token_ids, groups = tokenize([f"a {name} mug" for name in colors]), torch.arange(4)
    network = PictureText(TextEncoder(TextConfig(width=32, heads=2, layers=1)), embed_dim=16, channels=8)
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    for _ in range(30):
        optimizer.zero_grad()
        loss = small_clip_loss(*network(images, token_ids), network.log_temperature, groups)
        loss.backward()
        optimizer.step()
    pictures, captions = network(images, token_ids)
    assert (pictures @ captions.T).argmax(dim=0).tolist() == [0, 1, 2, 3]
    assert loss < 0.3
