"""Prompts to text context.  list[str] -> token_ids (B,77) -> context (B,77,width).  Paper: Sec. 3.3 (CLIP).

The tokenizer and the tensor names are open_clip's; padding and length are Stable Diffusion's.
"""

from __future__ import annotations

import importlib.util
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hoi.common.command import first_few

CONTEXT_LENGTH = 77
READ_TOKENS = CONTEXT_LENGTH - 2  # of a prompt; begin and end of text take the other two
BOS_ID = 49406  # begin of text
EOS_ID = 49407  # end of text; Stable Diffusion's padding too


@dataclass(frozen=True)
class TextConfig:
    """Sizes; the defaults are CLIP ViT-L/14, the text encoder of Stable Diffusion 1.x."""

    width: int = 768
    heads: int = 12
    layers: int = 12
    context_length: int = CONTEXT_LENGTH
    vocab_size: int = 49408
    quick_gelu: bool = True


@lru_cache(maxsize=1)  # reading its vocabulary takes a tenth of a second
def clip_tokenizer() -> Any:
    """open_clip's SimpleTokenizer: CLIP's vocabulary and byte pairs."""
    # Its module alone: the package would bring torchvision and transformers, five seconds before the first picture.
    path = Path(importlib.util.find_spec("open_clip").origin).with_name("tokenizer.py")
    spec = importlib.util.spec_from_file_location("open_clip_tokenizer", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SimpleTokenizer()


def tokenize(prompts: list[str]) -> Tensor:
    """Prompts -> token ids (B,77) int64: 49406, at most 75 tokens of the prompt, then 49407 up to the end.

    open_clip pads with 0, which is a real token ("!"); Stable Diffusion pads with 49407 and its U-Net attends to all 77
    positions, so the places behind the first 49407 are refilled.  Raises ValueError when given a bare string.
    """
    if isinstance(prompts, str):
        raise ValueError(f"tokenize takes a list of prompts, got the string {prompts!r}; write [prompt]")
    if not prompts:
        return torch.empty((0, CONTEXT_LENGTH), dtype=torch.long)
    token_ids = clip_tokenizer()(list(prompts), context_length=CONTEXT_LENGTH)
    behind_eos = torch.arange(CONTEXT_LENGTH) > first_eos(token_ids)[:, None]
    return token_ids.masked_fill(behind_eos, EOS_ID)


def first_eos(token_ids: Tensor) -> Tensor:
    """Position (B,) of the first 49407 in token_ids (B,77)."""
    return ((token_ids == EOS_ID).cumsum(dim=1) == 0).sum(dim=1)


def unread_end(prompt: str) -> str:
    """What `tokenize` cuts off a prompt, in small letters: all behind its 75th token; "" for most prompts."""
    if len(prompt.encode()) <= READ_TOKENS:  # a token is a byte at least
        return ""
    return clip_tokenizer().decode(clip_tokenizer().encode(prompt)[READ_TOKENS:]).strip()


def reading_hints(prompts: Iterable[str]) -> list[str]:
    """Sentences for the user on what the text encoder will not take from the prompts; none when it reads all of it.

    Ends beyond 75 tokens are cut off, as in Stable Diffusion.  The vocabulary comes from English text: words in other
    scripts than Latin are spelt in bytes, of which public weights have learned little (Radford et al. 2021, Sec. 2.4).
    """
    prompts = list(dict.fromkeys(prompts))
    ends = [f'"... {end}" of "{prompt}"' for prompt in prompts if (end := unread_end(prompt))]
    words = dict.fromkeys(word for prompt in prompts for word in re.findall(r"[^\W\d_]+", prompt))
    foreign = [word for word in words if not all(unicodedata.name(letter, "").startswith("LATIN") for letter in word)]
    hints = []
    if ends:
        hints.append(f"hint: the text encoder reads {READ_TOKENS} tokens and never sees the end: {first_few(ends, 3)}")
    if foreign:
        hints.append(f"hint: the text encoder's vocabulary is English; it sees only bytes of {first_few(foreign, 3)}")
    return hints


def causal_mask(length: int) -> Tensor:
    """(length, length), added to the attention scores: no position sees a later one."""
    # On the CPU, whatever the default device is: on the meta device torch would import its compiler for it.
    return torch.full((length, length), -torch.inf, device="cpu").triu(1)


class QuickGELU(nn.Module):
    """The activation of OpenAI's CLIP models."""

    def forward(self, x: Tensor) -> Tensor:
        """Of any shape."""
        return x * torch.sigmoid(1.702 * x)


class Block(nn.Module):
    """A layer of the transformer: attention and two linear layers, each on a normalised residual branch."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        width = config.width
        self.ln_1 = nn.LayerNorm(width)
        # Batch second: otherwise torch's attention transposes, and in bf16 copies its weights for each position.
        self.attn = nn.MultiheadAttention(width, config.heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential()
        self.mlp.c_fc = nn.Linear(width, 4 * width)
        self.mlp.gelu = QuickGELU() if config.quick_gelu else nn.GELU()
        self.mlp.c_proj = nn.Linear(4 * width, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x (77, B, width), mask (77, 77) added to the scores -> (77, B, width)."""
        normal = self.ln_1(x)
        x = x + self.attn(normal, normal, normal, need_weights=False, attn_mask=mask.to(normal.dtype))[0]
        return x + self.mlp(self.ln_2(x))


class TextEncoder(nn.Module):
    """CLIP's text transformer up to and including the last layer norm: no pooling, no projection, no padding mask."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        # nn.Embedding would draw numbers, as _initialise does, and on the meta device import torch's compiler for it.
        self.token_embedding = nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.width), freeze=False)
        self.positional_embedding = nn.Parameter(torch.empty(config.context_length, config.width))
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.ln_final = nn.LayerNorm(config.width)
        self.register_buffer("attn_mask", causal_mask(config.context_length), persistent=False)
        if not self.positional_embedding.is_meta:
            self._initialise()

    def _initialise(self) -> None:
        """CLIP's own starting values (Radford et al. 2021, following GPT-2): the residual branches start small."""
        width, layers = self.config.width, self.config.layers
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        for block in self.transformer.resblocks:
            nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=width**-0.5 * (2 * layers) ** -0.5)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=width**-0.5 * (2 * layers) ** -0.5)

    def forward(self, token_ids: Tensor) -> Tensor:
        """token_ids (B,77) from `tokenize` -> context (B,77,width)."""
        x = self.token_embedding(token_ids) + self.positional_embedding  # (B,77) -> (B,77,width)
        x = x.transpose(0, 1)
        for block in self.transformer.resblocks:
            x = block(x, self.attn_mask)
        return self.ln_final(x.transpose(0, 1))

    def pooled(self, context: Tensor, token_ids: Tensor) -> Tensor:
        """The context at the first end-of-text position, which has seen the whole prompt: (B,77,width) -> (B,width)."""
        return context[torch.arange(len(context), device=context.device), first_eos(token_ids)]
