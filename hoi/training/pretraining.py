"""How the miniature Stable Diffusion gets its autoencoder and its text encoder.  model + TrainingSet -> loss of a step.

The paper starts from finished ones; these stages make small ones from nothing.  Like those of `stages`, a stage holds
what trains and turns (step, part) into a batch and a batch into a loss.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hoi.common.sheets import to_uint8
from hoi.network.model import HOIDiffusion
from hoi.network.text import tokenize
from hoi.network.vae import VAE, vae_loss
from hoi.training.data import Batch, Share, TrainingSet, draw_indices, step_generator
from hoi.training.small_clip import PictureText, clip_loss
from hoi.training.stages import PREVIEWS, spread

TEXT_SHRINK = 2  # half the size says as much about words as the whole picture, at a quarter of the work


class VaeStage(nn.Module):
    """Learn to compress pictures, on random crops: several times the steps a second of whole pictures."""

    def __init__(self, model: HOIDiffusion, pictures: TrainingSet, share: Share, seed: int, crop: int):
        super().__init__()
        self.vae: VAE = model.vae
        self.pictures, self.share, self.seed, self.crop = pictures, share, seed, crop

    def batch(self, step: int, part: int = 0) -> Batch:
        """images (B, 3, crop, crop) in [-1, 1], mirrored half of the time, and a seed for the posterior's draw."""
        share = self.share.part(part)
        indices = draw_indices(len(self.pictures), share, self.seed, step)
        images = self.pictures.images(indices)
        generator = step_generator(self.seed, step)
        tops, lefts = (
            torch.randint(size - self.crop + 1, (share.total,), generator=generator) for size in images.shape[2:]
        )
        crops = [
            image[:, top : top + self.crop, left : left + self.crop]
            for image, top, left in zip(images, share.of(tops), share.of(lefts), strict=True)
        ]
        flipped = torch.rand(share.total, generator=generator) < 0.5
        images = torch.stack([c.flip(2) if f else c for c, f in zip(crops, share.of(flipped), strict=True)])
        posterior_seed = torch.tensor([step * share.world_size + share.rank])
        return {"indices": torch.from_numpy(indices), "images": images, "seed": posterior_seed}

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        generator = step_generator(self.seed, int(batch["seed"]), purpose=1)
        return vae_loss(self.vae, batch["images"].contiguous(memory_format=torch.channels_last), generator)

    @torch.no_grad()
    def preview(self) -> list[list[np.ndarray]]:
        """Pictures above their reconstructions; the PSNR of the shown ones goes to the log through `measure`."""
        images = self.pictures.images(spread(len(self.pictures), 2 * PREVIEWS))
        made = self.vae.decode(self.vae.scale(self.vae.encode(images).mode())).float().clamp(-1, 1)
        return [[to_uint8(i) for i in images.numpy()], [to_uint8(i) for i in made.numpy()]]

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """PSNR in dB over 64 pictures (peak-to-peak 2)."""
        images = self.pictures.images(spread(len(self.pictures), 64))
        made = self.vae.decode(self.vae.scale(self.vae.encode(images).mode())).float().clamp(-1, 1)
        return {"psnr_db": float(10 * torch.log10(4 / (made - images).square().mean()))}


class TextStage(nn.Module):
    """Pretrain the text encoder as a small CLIP (Radford et al. 2021); the model has no place for its picture tower."""

    def __init__(
        self,
        model: HOIDiffusion,
        pictures: TrainingSet,
        share: Share,
        seed: int,
        words_of: Callable[[str], object],
    ):
        """words_of maps a caption to what it says; captions that say the same are right answers for one another."""
        super().__init__()
        self.picture_text = PictureText(model.text_encoder)
        self.pictures, self.share, self.seed = pictures, share, seed
        groups: dict[str, int] = {}
        texts = pictures.captions(range(len(pictures)))
        self.groups = torch.tensor([groups.setdefault(repr(words_of(text)), len(groups)) for text in texts])

    def batch(self, step: int, part: int = 0) -> Batch:
        indices = draw_indices(len(self.pictures), self.share.part(part), self.seed, step)
        return {
            "indices": torch.from_numpy(indices),
            "images": F.avg_pool2d(self.pictures.images(indices), TEXT_SHRINK),
            "token_ids": tokenize(self.pictures.captions(indices)),
            "groups": self.groups[indices],
        }

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        pictures, texts = self.picture_text(batch["images"], batch["token_ids"])
        loss = clip_loss(pictures, texts, self.picture_text.log_temperature, batch["groups"])
        found = batch["groups"][(pictures.float() @ texts.float().T).argmax(dim=0)] == batch["groups"]
        return loss, {"found": found.float().mean()}

    def preview(self) -> None:
        return None

    def measure(self) -> dict[str, float]:
        return {}
