"""What each stage of training learns, and by which loss.  model + pictures -> batch of a step -> loss.  Paper: eq. 3.

`HoiStage` is the paper: eq. 3, on top of Stable Diffusion.  The other three make a miniature of Stable Diffusion from
nothing: `VaeStage` its autoencoder, `TextStage` its text encoder, `BaseStage` its U-Net.

A stage is a module around what trains.  `batch(step, number)` reads what a step sees (in a thread, while the one before
computes) and `forward(batch)` is its loss, so that DDP can wrap it; the random numbers of both come from (seed, step).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hoi.common.arrays import to_uint8
from hoi.common.choices import CONDITION_NAMES
from hoi.network.diffusion import TrainingBatch, draw_training_noise, eps_loss, hoi_loss
from hoi.network.model import HOIDiffusion, to_floats
from hoi.network.pipeline import Pipeline, SamplingSettings
from hoi.network.text import tokenize
from hoi.network.vae import vae_loss
from hoi.training.data import Batch, EncodedData, Share, TrainingSet, draw_indices, step_generator
from hoi.training.small_clip import PictureText, small_clip_loss

PREVIEWS = 8  # pictures a row of a preview sheet
TEXT_SHRINK = 2  # half the size says as much about words as the whole picture, at a quarter of the work


class Stage(nn.Module):
    """What the stages share: pictures, this process's share of every step, and the seed of all random numbers.

    A stage has two methods more.  batch(step, number=0) is what this process sees in a step, on the CPU; `number` of
    `share.batches`.  forward(batch) returns the loss of a batch (scalar, has a gradient), and what else goes to the log
    (scalars, detached).
    """

    def __init__(self, pictures: TrainingSet, share: Share, seed: int) -> None:
        super().__init__()
        self.pictures, self.share, self.seed = pictures, share, seed

    def preview(self) -> list[list[np.ndarray]]:
        """Rows of a sheet that shows what is learned, pictures (H, W, 3) uint8; always of the same pictures."""
        return []

    def shown(self) -> list[int]:
        """Indices of the pictures in a preview: 16 (or fewer), spread evenly over all."""
        return [int(i) for i in np.linspace(0, len(self.pictures) - 1, min(2 * PREVIEWS, len(self.pictures)))]

    def picture_names(self, batch: Batch) -> list[str]:
        """The files that a batch was made of, for messages."""
        return self.pictures.names(batch["indices"].tolist())


class BaseStage(Stage):
    """Text-to-image training without conditions, of the whole U-Net: the miniature of Stable Diffusion (Sec. 3.1).

    caption_dropout  share of captions that are emptied, for guidance
    """

    def __init__(
        self, model: HOIDiffusion, data: EncodedData, share: Share, seed: int, caption_dropout: float = 0.0
    ) -> None:
        super().__init__(data.pictures, share, seed)
        self.model, self.data, self.caption_dropout = model, data, caption_dropout
        self.schedule = model.config.noise_schedule()

    def batch(self, step: int, number: int = 0) -> Batch:
        """See `draw`."""
        return self.draw(self.data, self.share.of_batch(number), step, purpose=0)

    def draw(self, data: EncodedData, share: Share, step: int, purpose: int) -> Batch:
        """Latents from the cached posterior, timesteps, noise and text; some captions emptied.

        purpose   keeps the random numbers of the two batches of eq. 3 apart
        returns   indices (B,), latents and noise (B, 4, h, w), timesteps (B,), token_ids (B, 77)

        Every process draws the numbers of the whole step and keeps its share, so the order of these lines is part of a
        run's result.
        """
        # Another seed for background pictures: equally many of both kinds would else be shuffled alike.
        indices = draw_indices(len(data.pictures), share, self.seed + purpose, step)
        generator = step_generator(self.seed, step, purpose)
        shape = (share.total, *data.latents.shape[1:])
        posterior_noise = torch.randn(shape, generator=generator)
        timesteps, noise = draw_training_noise(self.schedule, shape, generator)
        dropped = share.of(torch.rand(share.total, generator=generator) < self.caption_dropout)
        captions = ["" if drop else text for drop, text in zip(dropped, data.pictures.captions(indices), strict=True)]
        return {
            "token_ids": tokenize(captions),
            "indices": torch.from_numpy(indices),
            "latents": data.sample(indices, share.of(posterior_noise), self.model.config.vae.scaling_factor),
            "timesteps": share.of(timesteps),
            "noise": share.of(noise),
        }

    def training_batch(self, batch: Batch) -> TrainingBatch:
        """What the losses take: with the frozen text encoder's context."""
        with torch.no_grad():
            context = self.model.text_encoder(batch["token_ids"])
        # As the weights are laid out: convolutions would else turn every picture around, and back.  Conditions come
        # as bytes, so that a quarter of the memory goes to the device.
        conditions = to_floats(batch.get("conditions", {}), torch.channels_last)
        latents = batch["latents"].contiguous(memory_format=torch.channels_last)
        return TrainingBatch(latents, context, batch["timesteps"], batch["noise"], conditions or None)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The plain loss of Sec. 3.1."""
        return eps_loss(self.model, self.schedule, self.training_batch(batch)), {}

    def preview(self) -> list[list[np.ndarray]]:
        """Two rows from text alone, always from the same captions and noise."""
        made = self.sampled(None)
        return [made[:PREVIEWS], made[PREVIEWS:]]

    def sampled(self, conditions: dict[str, Tensor] | None) -> list[np.ndarray]:
        """What the model makes of the shown captions and conditions, with the preset's own sampling defaults.

        The noise comes from seeds 0, 1, ..., so that sheets compare.
        """
        config, captions = self.model.config, self.pictures.captions(self.shown())
        settings = SamplingSettings(config.sampler, config.num_inference_steps, config.guidance_scale)
        pipeline = Pipeline(self.model, settings)
        features = None if conditions is None else pipeline.features(conditions)
        generators = [torch.Generator().manual_seed(k) for k in range(len(captions))]
        return list(pipeline.pictures(captions, features, generators))


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


class HoiStage(BaseStage):
    """The paper's fine-tuning: condition encoders and U-Net decoder learn, the rest is frozen (Sec. 3.3, eq. 3).

    Its baselines (Sec. 4.2) are other models under the same loss: one without condition encoders is fine-tuned on text
    alone, as latent diffusion or, with all of the U-Net and other captions, as DreamBooth; one with a ControlNet trains
    that alone.

    condition_dropout  share of the hand-object pictures of which one or two conditions have weight 0, as sample.py's
                       --cond-scale NAME=0 has it, so that each carries a picture as far as it can (0 in the paper)
    """

    def __init__(
        self,
        model: HOIDiffusion,
        data: EncodedData,
        share: Share,
        seed: int,
        caption_dropout: float = 0.0,
        regularization: Regularization | None = None,
        condition_dropout: float = 0.0,
    ) -> None:
        super().__init__(model, data, share, seed, caption_dropout)
        self.regularization, self.condition_dropout = regularization, condition_dropout

    def batch(self, step: int, number: int = 0) -> Batch:
        """A batch a term of eq. 3: "hoi", pictures of hands and objects with their `conditions` (uint8), and "reg",
        background.

        In mode "swap" one of the two is there, without a background buffer "hoi" alone.
        """
        share, reg, swapped = self.share.of_batch(number), self.regularization, self.swapped(step)
        batch = {}
        if not swapped:
            batch["hoi"] = self.draw(self.data, share, step, purpose=0)
            if self.model.condition_encoders is not None:
                batch["hoi"]["conditions"] = self.pictures.conditions(batch["hoi"]["indices"].tolist())
                if self.condition_dropout:
                    batch["hoi"]["condition_weights"] = share.of(self.condition_weights(step, share.total))
        if reg is not None and (swapped or reg.mode == "sum"):
            # A swapped step stands in for a batch of the other kind, and is as large.
            size = share.batch_size if swapped else reg.batch_size
            batch["reg"] = self.draw(reg.data, Share(size, share.rank, share.world_size), step, purpose=1)
        return batch

    def condition_weights(self, step: int, count: int) -> Tensor:
        """(count, 3): 1 or, for conditions that a picture of this step does without, 0; at least one is kept."""
        generator = step_generator(self.seed, step, purpose=3)
        thinned = torch.rand(count, 1, generator=generator) < self.condition_dropout
        subset = torch.randint(1, 7, (count, 1), generator=generator)  # bits of the six that lack one or two
        return torch.where(thinned, subset >> torch.arange(3) & 1, 1).float()

    def swapped(self, step: int) -> bool:
        """Whether this process's step is background: one uniform number a step and process, in mode "swap"."""
        if self.regularization is None or self.regularization.mode == "sum":
            return False
        # By step and process, whichever batch of the step asks: so a step is the one or the other as a whole.
        draws = torch.rand(self.share.world_size, generator=step_generator(self.seed, step, purpose=2))
        return draws[self.share.rank].item() <= self.regularization.prob

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Eq. 3 and its terms, "hoi" and "reg", whichever the batch holds."""
        batches = {term: self.training_batch(each) for term, each in batch.items()}
        network = self.model
        if "condition_weights" in batch.get("hoi", {}):
            background = len(batch["reg"]["noise"]) if "reg" in batch else 0  # its black pictures keep weight 1
            shown = F.pad(batch["hoi"]["condition_weights"], (0, 0, 0, background), value=1)
            network = partial(self.model, condition_weights=shown.T[..., None, None, None])
        if len(batches) == 2:
            return hoi_loss(network, self.schedule, batches["hoi"], batches["reg"], self.regularization.weight)
        [(term, only)] = batches.items()
        loss = eps_loss(network, self.schedule, only)
        return loss, {term: loss.detach()}

    def training_batch(self, batch: Batch) -> TrainingBatch:
        """With conditions, made black here, on the device, for background pictures, which have none."""
        if self.model.condition_encoders is not None and "conditions" not in batch:
            side = self.model.config.image_size
            black = batch["latents"].new_zeros((len(batch["latents"]), 3, side, side))
            batch = batch | {"conditions": dict.fromkeys(CONDITION_NAMES, black)}
        return super().training_batch(batch)

    def preview(self) -> list[list[np.ndarray]]:
        """Skeleton and normal pictures, the training pictures, and what the model makes of their conditions."""
        true = [to_uint8(image) for image in self.pictures.images(self.shown()).numpy()]
        if self.model.condition_encoders is None:
            return [true, self.sampled(None)]
        conditions = self.pictures.conditions(self.shown())
        skeletons, normals = (list(conditions[name].movedim(1, -1).numpy()) for name in ("skeleton", "normal"))
        return [skeletons, normals, true, self.sampled(to_floats(conditions, torch.channels_last))]

    def picture_names(self, batch: Batch) -> list[str]:
        """Of both terms."""
        sets = {"hoi": self.pictures, "reg": self.regularization and self.regularization.data.pictures}
        return [name for term, each in batch.items() for name in sets[term].names(each["indices"].tolist())]


class VaeStage(Stage):
    """Learn to compress pictures, on random crops: several times the steps a second of whole pictures.

    crop   side of the crops in pixels, a multiple of 8
    """

    def __init__(self, model: HOIDiffusion, pictures: TrainingSet, share: Share, seed: int, crop: int) -> None:
        super().__init__(pictures, share, seed)
        self.vae, self.crop = model.vae, crop

    def batch(self, step: int, number: int = 0) -> Batch:
        """images (B, 3, crop, crop) in [-1, 1], mirrored half of the time, and a seed for the posterior's draw."""
        share = self.share.of_batch(number)
        indices = draw_indices(len(self.pictures), share, self.seed, step)
        images = self.pictures.images(indices)
        generator = step_generator(self.seed, step)
        # Of the whole step, as every number: what a picture gets does not depend on who works on it.
        tops, lefts = (
            torch.randint(size - self.crop + 1, (share.total,), generator=generator) for size in images.shape[2:]
        )
        crops = [
            image[:, top : top + self.crop, left : left + self.crop]
            for image, top, left in zip(images, share.of(tops), share.of(lefts), strict=True)
        ]
        flipped = torch.rand(share.total, generator=generator) < 0.5
        images = torch.stack([c.flip(2) if f else c for c, f in zip(crops, share.of(flipped), strict=True)])
        # The one noise that each process draws for itself: forward does, when the encoder has told its shape.
        posterior_seed = torch.tensor([step * share.world_size + share.rank])
        return {"indices": torch.from_numpy(indices), "images": images, "seed": posterior_seed}

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """See vae_loss; its parts go to the log."""
        generator = step_generator(self.seed, int(batch["seed"]), purpose=1)
        return vae_loss(self.vae, batch["images"].contiguous(memory_format=torch.channels_last), generator)

    @torch.no_grad()
    def preview(self) -> list[list[np.ndarray]]:
        """Pictures above their reconstructions."""
        images = self.pictures.images(self.shown()).to(self.vae.quant_conv.weight.device)
        made = self.vae.decode(self.vae.scale(self.vae.encode(images).mean)).float().clamp(-1, 1)
        return [[to_uint8(image) for image in row.cpu().numpy()] for row in (images, made)]


class TextStage(Stage):
    """Pretrain the text encoder as a small CLIP (Radford et al. 2021); the model has no place for its picture tower.

    words_of   a caption -> what it says; captions that say the same are right answers for one another
    """

    def __init__(
        self,
        model: HOIDiffusion,
        pictures: TrainingSet,
        share: Share,
        seed: int,
        words_of: Callable[[str], object],
    ) -> None:
        super().__init__(pictures, share, seed)
        self.picture_text = PictureText(model.text_encoder)
        groups: dict[str, int] = {}  # meaning -> number, in the order in which meanings are met
        texts = pictures.captions(range(len(pictures)))
        self.groups = torch.tensor([groups.setdefault(repr(words_of(text)), len(groups)) for text in texts])

    def batch(self, step: int, number: int = 0) -> Batch:
        """images (B, 3, H / 2, W / 2) in [-1, 1], token_ids (B, 77), groups (B,) of captions that say the same."""
        indices = draw_indices(len(self.pictures), self.share.of_batch(number), self.seed, step)
        return {
            "indices": torch.from_numpy(indices),
            "images": F.avg_pool2d(self.pictures.images(indices), TEXT_SHRINK),
            "token_ids": tokenize(self.pictures.captions(indices)),
            "groups": self.groups[indices],
        }

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """CLIP's loss; "found" is the share of captions whose most similar picture is right."""
        pictures, texts = self.picture_text(batch["images"], batch["token_ids"])
        loss = small_clip_loss(pictures, texts, self.picture_text.log_temperature, batch["groups"])
        # For every caption the picture most like it: has it the same meaning?
        found = batch["groups"][(pictures.float() @ texts.float().T).argmax(dim=0)] == batch["groups"]
        return loss, {"found": found.float().mean()}
