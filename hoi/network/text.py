"""Prompts to text context.  list[str] -> token_ids (B,77) -> context (B,77,width).  Paper: Sec. 3.3 (CLIP).

The transformer, the tokenizer and the tensor names are open_clip's.  `PictureText` at the end is the small CLIP
(Radford et al. 2021) that the built-in model's text encoder is pretrained with.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from open_clip import SimpleTokenizer
from open_clip.transformer import LayerNorm, QuickGELU, Transformer
from torch import Tensor, nn

CONTEXT_LENGTH = 77
BOS_ID = 49406
EOS_ID = 49407


@dataclass(frozen=True)
class TextConfig:
    """Sizes; the defaults are CLIP ViT-L/14, the text encoder of Stable Diffusion 1.x."""

    width: int = 768
    heads: int = 12
    layers: int = 12
    context_length: int = CONTEXT_LENGTH
    vocab_size: int = 49408
    quick_gelu: bool = True


@lru_cache(maxsize=1)
def _tokenizer() -> SimpleTokenizer:
    return SimpleTokenizer()


def tokenize(prompts: list[str]) -> Tensor:
    """Prompts -> token ids (B,77) int64: 49406, at most 75 tokens of the prompt, then 49407 up to the end.

    open_clip pads with 0, which is a real token ("!"); Stable Diffusion pads with 49407 and its U-Net attends to all 77
    positions, so the places behind the first 49407 are refilled.  Raises ValueError when given a bare string.
    """
    if isinstance(prompts, str):
        raise ValueError(f"tokenize takes a list of prompts, got the string {prompts!r}; write [prompt]")
    if not prompts:
        return torch.empty((0, CONTEXT_LENGTH), dtype=torch.long)
    token_ids = _tokenizer()(list(prompts), context_length=CONTEXT_LENGTH)
    behind_eos = torch.arange(CONTEXT_LENGTH) > first_eos(token_ids)[:, None]
    return token_ids.masked_fill(behind_eos, EOS_ID)


def first_eos(token_ids: Tensor) -> Tensor:
    """Position (B,) of the first 49407 in token_ids (B,77)."""
    return ((token_ids == EOS_ID).cumsum(dim=1) == 0).sum(dim=1)


def causal_mask(length: int) -> Tensor:
    """(length, length), added to the attention scores: no position sees a later one."""
    return torch.full((length, length), -torch.inf).triu(1)


class TextEncoder(nn.Module):
    """CLIP's text transformer up to and including the last layer norm: no pooling, no projection, no padding mask."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.positional_embedding = nn.Parameter(torch.empty(config.context_length, config.width))
        activation = QuickGELU if config.quick_gelu else nn.GELU
        # Batch second inside: otherwise torch's attention transposes, and in bf16 copies its weights for each position.
        self.transformer = Transformer(
            config.width, config.layers, config.heads, act_layer=activation, batch_first=False
        )
        self.ln_final = LayerNorm(config.width)
        self.register_buffer("attn_mask", causal_mask(config.context_length), persistent=False)
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
        x = self.token_embedding(token_ids) + self.positional_embedding
        return self.ln_final(self.transformer(x, attn_mask=self.attn_mask))

    def pooled(self, context: Tensor, token_ids: Tensor) -> Tensor:
        """The context at the first end-of-text position, which has seen the whole prompt: (B,77,width) -> (B,width)."""
        return context[torch.arange(len(context), device=context.device), first_eos(token_ids)]


# --- weights under the names of transformers' CLIPTextModel, as in a Stable Diffusion file ---

_HF_PREFIXES = ("cond_stage_model.transformer.text_model.", "cond_stage_model.transformer.", "text_model.")
_HF_OUTER = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
_HF_LAYER = {
    "layer_norm1": "ln_1",
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def hf_names(config: TextConfig) -> dict[str, tuple[str, ...]]:
    """open_clip name -> the HF tensors (without prefix) that are stacked along dimension 0 to make it."""
    names = {ours: (theirs,) for theirs, ours in _HF_OUTER.items()}
    for i in range(config.layers):
        here, there = f"transformer.resblocks.{i}.", f"encoder.layers.{i}."
        for kind in ("weight", "bias"):
            names[f"{here}attn.in_proj_{kind}"] = tuple(f"{there}self_attn.{p}_proj.{kind}" for p in "qkv")
            names.update({f"{here}{ours}.{kind}": (f"{there}{theirs}.{kind}",) for theirs, ours in _HF_LAYER.items()})
    return names


def open_clip_from_hf(hf_state: Mapping[str, Tensor], config: TextConfig) -> dict[str, Tensor]:
    """The text tower of a Stable Diffusion file or a transformers folder -> tensors of a `TextEncoder` (196 -> 148).

    Keys may carry `cond_stage_model.transformer.`, `text_model.`, both or neither; `position_ids` is ignored.
    Raises ValueError naming missing, unexpected or wrongly shaped tensors.
    """
    state: dict[str, Tensor] = {}
    for key, tensor in hf_state.items():
        prefix = next((p for p in _HF_PREFIXES if key.startswith(p)), "")
        if not key.endswith("embeddings.position_ids"):
            state[key.removeprefix(prefix)] = tensor
    names = hf_names(config)
    wanted = {key for keys in names.values() for key in keys}
    missing, unexpected = sorted(wanted - state.keys()), sorted(state.keys() - wanted)
    if missing or unexpected:
        raise ValueError(
            f"text encoder: expected the {len(wanted)} tensors of a CLIP text model with {config.layers} layers; "
            f"{len(missing)} are missing (first: {missing[:3]}), {len(unexpected)} unexpected (first: {unexpected[:3]})"
        )
    with torch.device("meta"):
        shapes = {key: tensor.shape for key, tensor in TextEncoder(config).state_dict().items()}
    for ours, keys in names.items():
        rows, *rest = shapes[ours]
        for key in keys:
            if list(state[key].shape) != [rows // len(keys), *rest]:
                expected = (rows // len(keys), *rest)
                raise ValueError(f"text encoder: {key} is {tuple(state[key].shape)}, expected {expected}")
    return {ours: torch.cat([state[key] for key in keys]) for ours, keys in names.items()}


def hf_from_open_clip(state: Mapping[str, Tensor], config: TextConfig) -> dict[str, Tensor]:
    """The reverse of `open_clip_from_hf`; the names start with `text_model.`."""
    hf_state: dict[str, Tensor] = {}
    for ours, keys in hf_names(config).items():
        hf_state.update(
            {f"text_model.{key}": part.clone() for key, part in zip(keys, state[ours].chunk(len(keys)), strict=True)}
        )
    return hf_state


# --- pretraining against pictures ---


class PictureText(nn.Module):
    """A small CLIP around a `TextEncoder`, trained so that captions find their pictures; a model keeps the encoder.

    The U-Net learns what words mean far sooner from such an encoder than through the noise prediction loss alone.
    """

    def __init__(self, text_encoder: TextEncoder, embed_dim: int = 128, channels: int = 32) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.text_projection = nn.Linear(text_encoder.config.width, embed_dim, bias=False)
        layers: list[nn.Module] = []
        widths = [3, channels, 2 * channels, 4 * channels, 4 * channels, 4 * channels]
        for before, after in zip(
            widths[:-1], widths[1:], strict=True
        ):  # every layer halves the picture: 128 -> 4 pixels
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(8, after), nn.SiLU()]
        self.picture_encoder = nn.Sequential(*layers)
        # Averaging over the whole picture would forget where a colour is; a 4x4 grid keeps object and background apart.
        self.picture_projection = nn.Linear(widths[-1] * 16, embed_dim, bias=False)
        self.log_temperature = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # CLIP's start

    def encode_image(self, image: Tensor) -> Tensor:
        """image (B,3,H,W) in [-1,1] -> (B,E), not normalised."""
        picture = F.adaptive_avg_pool2d(self.picture_encoder(image), 4).flatten(1)  # (B,C,h,w) -> (B,16C)
        return self.picture_projection(picture)

    def encode_text(self, token_ids: Tensor) -> Tensor:
        """token_ids (B,77) -> (B,E), not normalised."""
        return self.text_projection(self.text_encoder.pooled(self.text_encoder(token_ids), token_ids))

    def forward(self, image: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """The same of pictures and their captions, as unit vectors."""
        return F.normalize(self.encode_image(image), dim=1), F.normalize(self.encode_text(token_ids), dim=1)


def clip_loss(picture_vectors: Tensor, text_vectors: Tensor, log_temperature: Tensor, groups: Tensor) -> Tensor:
    """Symmetric contrastive loss in which every caption with the same words is a right answer.

    picture_vectors, text_vectors  (B,E) unit vectors, row i of both belong together
    log_temperature                scalar, logarithm of the factor on the cosines (held below 100)
    groups                         (B,) int, equal for captions with the same words
    returns                        scalar: cross-entropy to equal shares for the right answers, mean of both directions
    Source: Radford et al. 2021, figure 3; the shared targets are ours: in a small world captions repeat within a batch.
    """
    cosines = picture_vectors.float() @ text_vectors.float().T  # (B pictures, B captions)
    logits = log_temperature.exp().clamp(max=100) * cosines
    same = (groups[:, None] == groups[None, :]).to(logits)
    targets = same / same.sum(dim=1, keepdim=True)
    return 0.5 * (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets))
