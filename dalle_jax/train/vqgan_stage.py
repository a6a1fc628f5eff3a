"""Stage 1, the other way: a VQ-GAN learns to turn images into codes and back.

Source: Esser et al. 2021, section 3.1, without its perceptual loss; the recipe is ours.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from dalle_jax import losses
from dalle_jax.errors import UserError
from dalle_jax.models import discriminator
from dalle_jax.models.discriminator import Discriminator
from dalle_jax.models.vqgan import (
    VQGAN,
    VQGANConfig,
    matrices,
    nearest,
    preprocess,
    straight_through,
)
from dalle_jax.optim.muon import MuonOptions
from dalle_jax.optim.optimizer import adamw
from dalle_jax.optim.schedules import cosine, warm_up
from dalle_jax.parallel.mesh import on_one_device
from dalle_jax.train.codebook_init import kmeans_codebook
from dalle_jax.train.codec_stage import CodecStage, check_sides, random_crops
from dalle_jax.train.loop import LoopConfig


@dataclass(frozen=True, kw_only=True)
class VQGANRun(MuonOptions):
    """One training run of the VQ-GAN; docs/vqgan.md says what the settings cost and reach."""

    model: VQGANConfig = field(default_factory=VQGANConfig)
    loop: Annotated[LoopConfig, tyro.conf.arg(name="")] = field(
        default_factory=lambda: LoopConfig(steps=100_000)
    )
    px: int = 256
    """Side of the images the model is for, in pixels."""
    crop_px: int | None = None
    """Side of the squares cut from them for training, in pixels; None for whole images."""
    batch_size: int = 12
    """Images (or squares) in an update, over all devices."""
    learning_rate: float = 2e-3
    """Greatest learning rate."""
    learning_rate_end: float = 1e-4
    """Learning rate at the end of a cosine over the whole run."""
    warmup_steps: int = 100
    """Updates over which the learning rate rises from 0."""
    commitment: float = 0.25
    """Weight beta of the pull of features to their codes; that of codes to features is 1."""
    unused_code_weight: float = 0.1
    """Weight of the pull of codes that no cell has chosen to features (ours); 0 for none."""
    adversarial_weight: float = 0.0
    """Weight of the discriminator's judgement, on the scale of the pixels' part; 0 for none."""
    adversarial_start: int = 0
    """Updates before it judges."""
    discriminator_width: int = 64
    """Channels of the discriminator's first convolution."""
    discriminator_layers: int = 3
    """How often it halves images."""
    weight_decay: float = 1e-4
    """AdamW's weight decay, multiplied by the learning rate."""
    grad_clip_norm: float | None = 1.0
    """Global norm that gradients are clipped to; None for no clipping."""

    def __post_init__(self):
        check_sides(self.model, px=self.px, crop_px=self.crop_px)
        if self.model.quantizer != "nearest":
            raise UserError(
                f"the quantizer is {self.model.quantizer!r}, which imported networks have; "
                "training knows 'nearest' alone"
            )
        for name in ("unit_pixels", "wavelets"):
            if getattr(self.model, name):
                raise UserError(f"{name} is for imported networks; leave it out to train one")


class VQGANStage(CodecStage):
    """The VQ-GAN as a stage of the training loop; its arguments are those of `CodecStage`."""

    name = "vqgan"
    against_collapse = "a higher unused_code_weight, or a lower learning_rate, keeps more of them"

    def __init__(self, run: VQGANRun, *, init_images: Callable[[], np.ndarray], validation):
        super().__init__(run, init_images=init_images, validation=validation)
        self.model = VQGAN(run.model)
        length = max(run.loop.steps - run.warmup_steps, 1)
        after = cosine(run.learning_rate, run.learning_rate_end, length)
        optimizer = partial(
            adamw,
            warm_up(run.learning_rate, run.warmup_steps, after),
            b2=0.999,
            weight_decay=run.weight_decay,
            grad_clip_norm=run.grad_clip_norm,
        )
        self.optimizer = optimizer(muon=run.muon(run.learning_rate, matrices))
        self.judge = None
        if run.adversarial_weight:
            self.judge = Discriminator(run.discriminator_width, run.discriminator_layers)
            # each clipped by itself; they learn at the same time, from one gradient
            parts = {"network": self.optimizer, "judge": optimizer()}
            self.optimizer = optax.multi_transform(parts, {"network": "network", "judge": "judge"})

    def init(self, key):
        """Initialises the parameters; with a discriminator, those of "network" and "judge"."""
        if self.judge is None:
            return super().init(key)
        key_network, key_judge = jax.random.split(key)
        side = self.run.crop_px or self.run.px
        judge = discriminator.init_params(self.judge, side, key_judge)
        return {"network": super().init(key_network), "judge": judge}

    def network(self, params):
        """The parameters without those of the discriminator."""
        return params if self.judge is None else params["network"]

    def init_from_data(self, params):
        """Starts the codebook from clusters of images."""
        key = jax.random.key(self.run.loop.seed)
        network = on_one_device(self.network(params))
        network = kmeans_codebook(key, network, self.run.model, self._init_images())
        return network if self.judge is None else {**params, "network": network}

    def loss(self, params, batch, key, step):
        """Mean absolute error of pixels in [-1, 1], the codebook's and the unused codes' parts.

        With a discriminator also its own hinge loss, and its score of reconstructions, multiplied
        so that its gradient at their pixels is as long as that of their error. The release does so
        at the kernel of the last convolution.
        """
        run, judge = self.run, params
        params = self.network(params)
        images = batch["image"]
        if run.crop_px is not None:
            images = random_crops(key, images, run.crop_px, run.model.factor)
        x = preprocess(images)
        z = self._apply(params, x, "encode")
        table = params["quantize"]["embedding"]
        codes, _ = nearest(z, table)
        entries = table[codes]
        reconstructed = self._apply(params, straight_through(z, entries), "decode")
        metrics = {
            "pixels": jnp.abs(reconstructed - x).mean(),
            "codebook": losses.codebook_loss(z, entries, commitment=run.commitment),
            "unused": losses.unused_code_pull(z, table, codes),
        }
        loss = metrics["pixels"] + metrics["codebook"] + run.unused_code_weight * metrics["unused"]
        if self.judge is not None:
            adversarial, parts = self._adversarial(judge["judge"], x, reconstructed)
            loss += jnp.where(step < run.adversarial_start, 0.0, adversarial)
            metrics |= parts
        return loss, metrics

    def _adversarial(self, judge, x, reconstructed):
        """The discriminator's loss and its weighted score, which moves reconstructions alone."""

        def score(reconstructed):
            return -self.judge.apply({"params": jax.lax.stop_gradient(judge)}, reconstructed).mean()

        stopped = jax.lax.stop_gradient(reconstructed)
        lengths = [
            jnp.linalg.norm(jax.grad(part)(stopped))
            for part in (lambda reconstructed: jnp.abs(reconstructed - x).mean(), score)
        ]
        weight = jax.lax.stop_gradient(lengths[0] / (lengths[1] + 1e-6))
        real, fake = (self.judge.apply({"params": judge}, y) for y in (x, stopped))
        metrics = {"hinge": losses.hinge_loss(real, fake), "score": -score(stopped)}
        adversarial = metrics["hinge"] + self.run.adversarial_weight * weight * score(reconstructed)
        return adversarial, metrics

    def _apply(self, params, x, method):
        return self.model.apply({"params": params}, x, method=method)
