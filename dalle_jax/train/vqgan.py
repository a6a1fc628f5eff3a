"""Stage 1, the other way: a VQ-GAN learns to turn pictures into codes and back.

Source: Esser et al. 2021, section 3.1, without its perceptual loss; the recipe is ours.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from dalle_jax import losses
from dalle_jax.models.vqgan import (
    VQGAN,
    VQGANConfig,
    nearest,
    network_input,
    straight_through,
)
from dalle_jax.optim.optimizer import adamw
from dalle_jax.optim.schedules import cosine, warm_up
from dalle_jax.train.codebook import kmeans_table
from dalle_jax.train.codec import CodecStage, check_sides, windows
from dalle_jax.train.loop import LoopConfig


@dataclass(frozen=True, kw_only=True)
class VQGANRun:
    """One training run of the VQ-GAN; docs/vqgan.md says what the settings cost and reach."""

    model: VQGANConfig = field(default_factory=VQGANConfig)
    loop: Annotated[LoopConfig, tyro.conf.arg(name="")] = field(
        default_factory=lambda: LoopConfig(steps=100_000)
    )
    px: int = 256
    """Side of the pictures the model is for, in pixels."""
    crop_px: int | None = None
    """Side of the squares cut from them for training, in pixels; None for whole pictures."""
    batch_size: int = 12
    """Pictures (or squares) in an update, over all devices."""
    step_size: float = 2e-3
    """Greatest learning rate."""
    step_size_end: float = 1e-4
    """Learning rate at the end of a cosine over the whole run."""
    warmup_steps: int = 100
    """Updates over which the learning rate rises from 0."""
    commitment: float = 0.25
    """Weight beta of the pull of features to their codes; that of codes to features is 1."""
    unused_code_weight: float = 0.1
    """Weight of the pull of codes that no cell has chosen to features (ours); 0 for none."""
    weight_decay: float = 1e-4
    """AdamW's weight decay, multiplied by the learning rate."""
    clip_norm: float | None = 1.0
    """Global norm that gradients are clipped to; None for no clipping."""

    def __post_init__(self):
        check_sides(self.model, px=self.px, crop_px=self.crop_px)


class VQGANStage(CodecStage):
    """The VQ-GAN as a stage of the training loop; its arguments are those of `CodecStage`."""

    name = "vqgan"
    against_collapse = "a higher unused_code_weight, or a lower step_size, keeps more of them"

    def __init__(self, run: VQGANRun, *, start_images: Callable[[], np.ndarray], validation):
        super().__init__(run, start_images=start_images, validation=validation)
        self.model = VQGAN(run.model)
        length = max(run.loop.steps - run.warmup_steps, 1)
        after = cosine(run.step_size, run.step_size_end, length)
        self.optimizer = adamw(
            warm_up(run.step_size, run.warmup_steps, after),
            b2=0.999,
            weight_decay=run.weight_decay,
            clip_norm=run.clip_norm,
        )

    def begin(self, params):
        """Starts the codebook from clusters of pictures."""
        key = jax.random.key(self.run.loop.seed)
        return kmeans_table(key, params, self.run.model, self._start_images())

    def loss(self, params, batch, key, step):
        """Mean absolute error of pixels in [-1, 1], the codebook's and the unused codes' parts."""
        del step
        run = self.run
        images = batch["image"]
        if run.crop_px is not None:
            images = windows(key, images, run.crop_px, run.model.factor)
        x = network_input(images)
        z = self._apply(params, x, "encode")
        table = params["quantize"]["embedding"]
        codes, _ = nearest(z, table)
        entries = table[codes]
        drawn = self._apply(params, straight_through(z, entries), "decode")
        metrics = {
            "pixels": jnp.abs(drawn - x).mean(),
            "codebook": losses.codebook_loss(z, entries, commitment=run.commitment),
            "unused": losses.unused_code_pull(z, table, codes),
        }
        loss = metrics["pixels"] + metrics["codebook"] + run.unused_code_weight * metrics["unused"]
        return loss, metrics

    def _apply(self, params, x, method):
        return self.model.apply({"params": params}, x, method=method)
