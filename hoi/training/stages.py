"""What the paper's training learns, and by which loss.  model + encoded data -> loss of a step.  Paper: eq. 3.

`HoiStage` is the paper; `BaseStage` makes the text-to-image model that it starts from (hoi/training/stages.py the
other parts of that).  A stage is a module that holds what trains; what is frozen hangs on `self.frozen`, a plain dict,
so that DDP neither wraps nor synchronises it.

How the miniature Stable Diffusion gets its autoencoder and its text encoder.  model + TrainingSet -> loss of a step.

The paper starts from finished ones; these stages make small ones from nothing.  Like those of `stages`, a stage holds
what trains and turns (step, part) into a batch and a batch into a loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hoi.common.arrays import to_uint8
from hoi.common.sheets import contact_sheet
from hoi.network.diffusion import TrainingBatch, draw_training_noise, eps_loss, hoi_loss
from hoi.network.model import CONDITION_NAMES, HOIDiffusion
from hoi.network.pipeline import Pipeline, SamplingSettings
from hoi.network.text import tokenize
from hoi.network.vae import VAE, vae_loss
from hoi.training.data import Batch, EncodedData, Share, TrainingSet, draw_indices, step_generator
from hoi.training.small_clip import PictureText, small_clip_loss

PREVIEWS = 8
REG_MODES = ("sum", "swap")


@dataclass(frozen=True)
class Regularization:
    """How the background buffer keeps the model from forgetting (Sec. 3.3); its conditions are three black pictures.

    batch_size  background pictures a process and batch, mode "sum"
    mode        "sum" as in eq. 3: every step has hand-object pictures and background, the latter's term weighted by
                `weight` (w_r).  "swap" as in the official code: a process's whole step is background with probability
                `prob`, so the expected loss is (1 - prob) L_hoi + prob L_reg, eq. 3 with w_r = prob / (1 - prob) up to
                a factor.  (The official code takes background pictures by the hand-object pictures' indices modulo
                their number; here the buffer is shuffled on its own, so that all of it is seen.)
    """

    data: EncodedData
    batch_size: int
    mode: str = "sum"
    weight: float = 1.0
    prob: float = 0.1

    def __post_init__(self) -> None:
        if self.mode not in REG_MODES or not 0 <= self.prob <= 1:
            raise ValueError(f"mode {self.mode!r}, prob {self.prob}: expected one of {REG_MODES} and 0 to 1")


class BaseStage(nn.Module):
    """Text-to-image training without conditions: the miniature of Stable Diffusion."""

    def __init__(self, model: HOIDiffusion, data: EncodedData, share: Share, seed: int, caption_dropout: float):
        super().__init__()
        self.unet = model.unet
        self.frozen = {"model": model}
        self.data, self.pictures = data, data.pictures
        self.share, self.seed, self.caption_dropout = share, seed, caption_dropout
        self.schedule = model.config.noise_schedule()

    def batch(self, step: int, part: int = 0) -> Batch:
        return denoising_batch(self, self.data, self.share.part(part), step, purpose=0)

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
    """The paper's fine-tuning: condition encoders and U-Net decoder learn, the rest is frozen (Sec. 3.3, eq. 3).

    A model without condition encoders is fine-tuned on text alone: the paper's latent diffusion baseline.
    """

    def __init__(
        self,
        model: HOIDiffusion,
        data: EncodedData,
        share: Share,
        seed: int,
        caption_dropout: float = 0.0,
        regularization: Regularization | None = None,
    ):
        """Each term of eq. 3 averages over its own pictures."""
        super().__init__()
        self.unet, self.condition_encoders = model.unet, model.condition_encoders
        self.frozen = {"model": model}
        self.data, self.pictures, self.regularization = data, data.pictures, regularization
        self.share, self.seed, self.caption_dropout = share, seed, caption_dropout
        self.schedule = model.config.noise_schedule()

    def batch(self, step: int, part: int = 0) -> Batch:
        """One batch of hand-object pictures with conditions, and one of the background buffer (keys with `reg_`).

        In mode "swap" one of the two is there.
        """
        reg, share, batch = self.regularization, self.share.part(part), {}
        swapped = self.swapped(step)
        if not swapped:
            batch = denoising_batch(self, self.data, share, step, purpose=0)
            if self.condition_encoders is not None:
                batch |= self.pictures.conditions(batch["indices"].tolist())
        if reg is not None and (swapped or reg.mode == "sum"):
            size = share.batch_size if swapped else reg.batch_size
            share = Share(size, share.rank, share.world_size)
            other = denoising_batch(self, reg.data, share, step, purpose=1)
            batch |= {f"reg_{name}": value for name, value in other.items()}
        return batch

    def swapped(self, step: int) -> bool:
        """Whether this process's step is background: one uniform number a step and process, in mode "swap"."""
        if self.regularization is None or self.regularization.mode == "sum":
            return False
        draws = torch.rand(self.share.world_size, generator=step_generator(self.seed, step, purpose=2))
        return draws[self.share.rank].item() <= self.regularization.prob

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and its parts, "hoi" and "reg", whichever the batch holds."""
        reg = {k.removeprefix("reg_"): v for k, v in batch.items() if k.startswith("reg_")}
        hoi = self.training_batch(batch) if "latents" in batch else None
        reg = self.training_batch(reg) if reg else None
        weight = 1.0 if self.regularization is None else self.regularization.weight
        if self.condition_encoders is None:
            both = {"hoi": (1.0, hoi), "reg": (weight, reg)}
            terms = {name: w * eps_loss(self.conditioned, self.schedule, b) for name, (w, b) in both.items() if b}
            loss = sum(terms.values())
            return loss, {name: term.detach() for name, term in terms.items()}
        if hoi is None:  # swapped
            loss, parts = hoi_loss(self.conditioned, self.schedule, reg)
            return loss, {"reg": parts["hoi"]}
        return hoi_loss(self.conditioned, self.schedule, hoi, reg, weight)

    def training_batch(self, batch: Batch) -> TrainingBatch:
        """With conditions; black ones where the batch has none, as all of the background buffer."""
        conditions = None
        if self.condition_encoders is not None:
            side = self.frozen["model"].config.image_size
            black = batch["latents"].new_zeros((len(batch["latents"]), 3, side, side))
            conditions = tuple(batch.get(name, black) for name in CONDITION_NAMES)
        return as_training_batch(self.frozen["model"], batch, conditions)

    def conditioned(
        self, latents: Tensor, timesteps: Tensor, context: Tensor, conditions: Sequence[Tensor] | None
    ) -> Tensor:
        features = None if conditions is None else self.condition_encoders(*conditions)
        return self.unet(latents, timesteps, context, features)

    def preview(self) -> list[list[np.ndarray]]:
        """Skeleton and normal pictures, the training pictures, and what the model makes of their conditions."""
        picked = spread(len(self.pictures), 2 * PREVIEWS)
        true = [to_uint8(i) for i in self.pictures.images(picked).numpy()]
        if self.condition_encoders is None:
            return [true, sample_previews(self.frozen["model"], self.pictures.captions(picked), None)]
        conditions = self.pictures.conditions(picked)
        made = sample_previews(self.frozen["model"], self.pictures.captions(picked), conditions)
        shown = {name: [to_uint8(i) for i in (2 * images - 1).numpy()] for name, images in conditions.items()}
        return [shown["skeleton"], shown["normal"], true, made]

    def measure(self) -> dict[str, float]:
        return {}


def picture_names(stage: nn.Module, batch: Batch) -> list[str]:
    """The picture files that a batch was made of."""
    buffer = getattr(stage, "regularization", None)
    sets = {"indices": stage.pictures, "reg_indices": buffer and buffer.data.pictures}
    entries = [sets[key].entries[i] for key in sets if key in batch for i in batch[key].tolist()]
    return [str(folder / record["file_name"]) for folder, record in entries]


def spread(count: int, wanted: int) -> list[int]:
    """`wanted` record indices spread evenly over `count` (fewer when there are fewer)."""
    return [int(i) for i in np.linspace(0, count - 1, min(wanted, count))]


def denoising_batch(stage: BaseStage | HoiStage, data: EncodedData, share: Share, step: int, purpose: int) -> Batch:
    """Latents drawn from the cached posterior, timesteps, noise and text; some captions emptied for guidance.

    purpose   keeps the random numbers of the two batches of eq. 3 apart
    returns   the text as `context` where it is cached, else as `token_ids`
    """
    indices = draw_indices(len(data.pictures), share, stage.seed + purpose, step)
    generator = step_generator(stage.seed, step, purpose)
    shape = (share.total, *data.latents.shape)
    posterior_noise = torch.randn(shape, generator=generator)
    timesteps, noise = draw_training_noise(stage.schedule, torch.empty(shape), generator)
    dropped = share.of(torch.rand(share.total, generator=generator) < stage.caption_dropout)
    captions = ["" if drop else text for drop, text in zip(dropped, data.pictures.captions(indices), strict=True)]
    scaling_factor = stage.frozen["model"].config.vae.scaling_factor
    text = {"token_ids": tokenize(captions)} if data.text is None else {"context": data.text.context(captions)}
    return text | {
        "indices": torch.from_numpy(indices),
        "latents": data.latents.sample(indices, share.of(posterior_noise), scaling_factor),
        "timesteps": share.of(timesteps),
        "noise": share.of(noise),
    }


def as_training_batch(model: HOIDiffusion, batch: Batch, conditions: tuple[Tensor, ...] | None = None) -> TrainingBatch:
    """Add the frozen text encoder's context, unless it is there from the cache."""
    with torch.no_grad():
        context = batch["context"] if "context" in batch else model.text_encoder(batch["token_ids"])
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
    maker = Pipeline(model, SamplingSettings(config.sampler, config.num_inference_steps, config.guidance_scale))
    generators = [torch.Generator().manual_seed(k) for k in range(len(captions))]
    features = None if conditions is None else maker.features(conditions)
    return list(maker.pictures(captions, features, generators))


def save_preview(stage: nn.Module, path: Path) -> None:
    """Write the stage's preview sheet, if it has one."""
    rows = stage.preview()
    if rows:
        contact_sheet(rows).save(path)


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
        loss = small_clip_loss(pictures, texts, self.picture_text.log_temperature, batch["groups"])
        found = batch["groups"][(pictures.float() @ texts.float().T).argmax(dim=0)] == batch["groups"]
        return loss, {"found": found.float().mean()}

    def preview(self) -> None:
        return None

    def measure(self) -> dict[str, float]:
        return {}
