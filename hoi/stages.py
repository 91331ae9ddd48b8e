"""What each training stage learns, and by which loss.  model + TrainingSet -> loss of step s.  Paper: Sec. 3.3, eq. 3.

`HoiStage` is the paper.  The other three make the miniature "Stable Diffusion" that it starts from: an autoencoder, a
text encoder that knows what words look like, and a text-to-image U-Net.  A stage is a module that holds what trains;
what is frozen hangs on `self.frozen`, a plain dict, so that DDP neither wraps nor synchronises it.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hoi.batches import LatentCache, Share, TrainingSet, cache_latents, draw_indices, step_generator
from hoi.diffusion import TrainingBatch, draw_training_noise, eps_loss, hoi_loss
from hoi.model import CONDITION_NAMES, HOIDiffusion
from hoi.pictures import PictureMaker, SamplingSettings
from hoi.sheets import contact_sheet, to_uint8
from hoi.text import PictureText, clip_loss, tokenize
from hoi.vae import VAE, vae_loss

Batch = dict[str, Tensor]
PREVIEWS = 8


class VaeStage(nn.Module):
    """Learn to compress pictures, on random crops: several times the steps a second of whole pictures."""

    def __init__(self, model: HOIDiffusion, pictures: TrainingSet, share: Share, seed: int, crop: int):
        super().__init__()
        self.vae: VAE = model.vae
        self.pictures, self.share, self.seed, self.crop = pictures, share, seed, crop

    def batch(self, step: int) -> Batch:
        """images (B, 3, crop, crop) in [-1, 1], mirrored half of the time, and a seed for the posterior's draw."""
        images = self.pictures.images(draw_indices(len(self.pictures), self.share, self.seed, step))
        generator = step_generator(self.seed, step)
        tops, lefts = (
            torch.randint(size - self.crop + 1, (self.share.total,), generator=generator) for size in images.shape[2:]
        )
        crops = [
            image[:, top : top + self.crop, left : left + self.crop]
            for image, top, left in zip(images, self.share.of(tops), self.share.of(lefts), strict=True)
        ]
        flipped = torch.rand(self.share.total, generator=generator) < 0.5
        images = torch.stack([c.flip(2) if f else c for c, f in zip(crops, self.share.of(flipped), strict=True)])
        return {"images": images, "seed": torch.tensor([step * self.share.world_size + self.share.rank])}

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
    """Pretrain the text encoder as a small CLIP (Radford et al. 2021); its picture tower is thrown away."""

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

    def batch(self, step: int) -> Batch:
        indices = draw_indices(len(self.pictures), self.share, self.seed, step)
        return {
            # Half the size says as much about words as the whole, at a quarter of the work.
            "images": F.avg_pool2d(self.pictures.images(indices), 2),
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


class BaseStage(nn.Module):
    """Text-to-image training without conditions: the miniature of Stable Diffusion, or its plain fine-tuning."""

    def __init__(
        self,
        model: HOIDiffusion,
        pictures: TrainingSet,
        latents: LatentCache,
        share: Share,
        seed: int,
        caption_dropout: float,
    ):
        super().__init__()
        self.unet = model.unet
        self.frozen = {"model": model}
        self.pictures, self.latents, self.share, self.seed = pictures, latents, share, seed
        self.caption_dropout = caption_dropout
        self.schedule = model.config.noise_schedule()

    def batch(self, step: int) -> Batch:
        return denoising_batch(self, self.pictures, self.latents, self.share, step, purpose=0)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return eps_loss(self.unet, self.schedule, as_training_batch(self.frozen["model"], batch)), {}

    def preview(self) -> list[list[np.ndarray]]:
        """16 pictures from text alone, always from the same captions and noise."""
        picked = spread(len(self.pictures), 2 * PREVIEWS)
        made = sample_previews(self.frozen["model"], self.pictures.captions(picked), None)
        return [made[:PREVIEWS], made[PREVIEWS:]]

    def measure(self) -> dict[str, float]:
        return {}


class HoiStage(nn.Module):
    """The paper's fine-tuning: condition encoders and U-Net decoder learn, the rest is frozen (Sec. 3.3, eq. 3)."""

    def __init__(
        self,
        model: HOIDiffusion,
        pictures: TrainingSet,
        latents: LatentCache,
        regularization: TrainingSet | None,
        reg_latents: LatentCache | None,
        share: Share,
        seed: int,
        caption_dropout: float,
        reg_weight: float,
        reg_batch_size: int,
    ):
        """reg_batch_size: background pictures a process and step; each term of eq. 3 averages over its own pictures."""
        super().__init__()
        self.unet, self.condition_encoders = model.unet, model.condition_encoders
        self.frozen = {"model": model}
        self.pictures, self.latents = pictures, latents
        self.regularization, self.reg_latents = regularization, reg_latents
        self.share, self.seed = share, seed
        self.reg_share = Share(reg_batch_size, share.rank, share.world_size)
        self.caption_dropout, self.reg_weight = caption_dropout, reg_weight
        self.schedule = model.config.noise_schedule()

    def batch(self, step: int) -> Batch:
        """One batch of hand-object pictures with conditions and one of the background buffer (keys with `reg_`)."""
        batch = denoising_batch(self, self.pictures, self.latents, self.share, step, purpose=0)
        batch |= self.pictures.conditions(batch["indices"].tolist())
        if self.regularization is not None:
            other = denoising_batch(self, self.regularization, self.reg_latents, self.reg_share, step, purpose=1)
            batch |= {f"reg_{name}": value for name, value in other.items()}
        return batch

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        model = self.frozen["model"]
        hoi = as_training_batch(model, batch, tuple(batch[name] for name in CONDITION_NAMES))
        reg = None
        if self.regularization is not None:
            reg = as_training_batch(
                model, {k.removeprefix("reg_"): v for k, v in batch.items() if k.startswith("reg_")}
            )
        return hoi_loss(self.conditioned, self.schedule, hoi, reg, self.reg_weight)

    def conditioned(self, latents: Tensor, timesteps: Tensor, context: Tensor, conditions: Sequence[Tensor]) -> Tensor:
        return self.unet(latents, timesteps, context, self.condition_encoders(*conditions))

    def preview(self) -> list[list[np.ndarray]]:
        """Segmentation and normal pictures, the training pictures, and what the model makes of their conditions."""
        picked = spread(len(self.pictures), 2 * PREVIEWS)
        conditions = self.pictures.conditions(picked)
        made = sample_previews(self.frozen["model"], self.pictures.captions(picked), conditions)
        shown = {name: [to_uint8(i) for i in (2 * images - 1).numpy()] for name, images in conditions.items()}
        true = [to_uint8(i) for i in self.pictures.images(picked).numpy()]
        return [shown["skeleton"], shown["normal"], true, made]

    def measure(self) -> dict[str, float]:
        return {}


def spread(count: int, wanted: int) -> list[int]:
    """`wanted` record indices spread evenly over `count` (fewer when there are fewer)."""
    return [int(i) for i in np.linspace(0, count - 1, min(wanted, count))]


def denoising_batch(
    stage: BaseStage | HoiStage, pictures: TrainingSet, latents: LatentCache, share: Share, step: int, purpose: int
) -> Batch:
    """Latents drawn from the cached posterior, timesteps, noise and token ids; some captions emptied for guidance.

    purpose   keeps the random numbers of the two batches of eq. 3 apart
    """
    indices = draw_indices(len(pictures), share, stage.seed + purpose, step)
    generator = step_generator(stage.seed, step, purpose)
    shape = (share.total, *latents.values.shape[2:])
    posterior_noise = torch.randn(shape, generator=generator)
    timesteps, noise = draw_training_noise(stage.schedule, torch.empty(shape), generator)
    dropped = share.of(torch.rand(share.total, generator=generator) < stage.caption_dropout)
    captions = ["" if drop else text for drop, text in zip(dropped, pictures.captions(indices), strict=True)]
    scaling_factor = stage.frozen["model"].config.vae.scaling_factor
    return {
        "indices": torch.from_numpy(indices),
        "latents": latents.sample(indices, share.of(posterior_noise), scaling_factor),
        "timesteps": share.of(timesteps),
        "noise": share.of(noise),
        "token_ids": tokenize(captions),
    }


def as_training_batch(model: HOIDiffusion, batch: Batch, conditions: tuple[Tensor, ...] | None = None) -> TrainingBatch:
    """Add the frozen text encoder's context."""
    with torch.no_grad():
        context = model.text_encoder(batch["token_ids"])
    last = torch.channels_last
    return TrainingBatch(
        latents=batch["latents"].contiguous(memory_format=last),
        context=context,
        timesteps=batch["timesteps"],
        noise=batch["noise"],
        conditions=None if conditions is None else tuple(c.contiguous(memory_format=last) for c in conditions),
    )


def sample_previews(model: HOIDiffusion, captions: list[str], conditions: dict[str, Tensor] | None) -> list[np.ndarray]:
    """One picture per caption with the preset's own sampling defaults; noise from seeds 0, 1, ...: sheets compare."""
    config = model.config
    maker = PictureMaker(model, SamplingSettings(config.sampler, config.num_inference_steps, config.guidance_scale))
    generators = [torch.Generator().manual_seed(k) for k in range(len(captions))]
    features = None if conditions is None else maker.features(conditions)
    return list(maker.pictures(captions, features, generators))


def encode_for_cache(model: HOIDiffusion) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """The frozen encoder as `cache_latents` wants it: images -> unscaled posterior mean and std, in fp32."""
    device = next(model.vae.parameters()).device

    @torch.no_grad()
    def encode(images: Tensor) -> tuple[Tensor, Tensor]:
        posterior = model.vae.encode(images.to(device))
        return posterior.mean, posterior.std

    return encode


def cached(model: HOIDiffusion, pictures: TrainingSet, folder: Path, key: str) -> LatentCache:
    """The pictures' latents under this model's encoder; `key` names its weights."""
    return cache_latents(pictures, encode_for_cache(model), key, folder)


def save_preview(stage: nn.Module, path: Path) -> None:
    """Write the stage's preview sheet, if it has one."""
    rows = stage.preview()
    if rows:
        contact_sheet(rows).save(path)


def measured_scaling_factor(latents: LatentCache) -> float:
    """1 / standard deviation of all cached posterior means: the VAE's `scaling_factor` once it is trained."""
    return float(1 / np.std(latents.values[:, 0], dtype=np.float64))
