"""Stage 1: the dVAE learns to turn images into codes and back.

Source: Ramesh et al. 2021, section 2.1 and appendix A; the short recipe is ours.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from dalle_jax import losses
from dalle_jax.models.dvae import DVAE, DVAEConfig, matrices, preprocess
from dalle_jax.optim.muon import MuonOptions
from dalle_jax.optim.optimizer import adamw
from dalle_jax.optim.schedules import cosine, warm_up
from dalle_jax.parallel.mesh import on_one_device
from dalle_jax.train.codebook_init import kmeans_init
from dalle_jax.train.codec_stage import CodecStage, check_sides, random_crops
from dalle_jax.train.loop import LoopConfig


@dataclass(frozen=True, kw_only=True)
class DVAERun(MuonOptions):
    """One training run of the dVAE; the defaults are the paper's, `short_dvae_run` is our recipe.

    A length of None stands for a share of the run, named beside it.
    """

    model: DVAEConfig = field(default_factory=DVAEConfig)
    loop: Annotated[LoopConfig, tyro.conf.arg(name="")] = field(
        default_factory=lambda: LoopConfig(steps=3_000_000)
    )
    px: int = 256
    """Side of the images the model is for, in pixels."""
    crop_px: int | None = None
    """Side of the squares cut from them for training, in pixels; None for whole images."""
    batch_size: int = 512
    """Images (or squares) in an update, over all devices."""
    learning_rate: float = 1e-4
    """Greatest learning rate."""
    learning_rate_end: float = 1.25e-6
    """Learning rate at the end of its cosine."""
    learning_rate_steps: int | None = 1_200_000
    """Updates of that cosine; None for the whole run."""
    warmup_steps: int = 0
    """Updates over which the learning rate rises from 0."""
    temperature_start: float = 1.0
    """Temperature of the relaxed samples at the start."""
    temperature_end: float = 1 / 16
    """Temperature at the end of its cosine."""
    temperature_steps: int | None = 150_000
    """Updates of that cosine; None for 70 % of the run."""
    kl_weight: float = 6.6
    """Weight beta of the KL to uniform: the loss is mean pixel NLL + beta / (3 f^2) * mean KL."""
    kl_steps: int | None = 5_000
    """Updates over which beta rises from 0 along a cosine; None for full weight at once."""
    rare_code_weight: float = 0.0
    """Weight of a penalty on codes falling out of use, on the scale of beta (ours); 0 for none."""
    kmeans_init: bool = False
    """Start the codebook from clusters of the untrained encoder's features (ours)."""
    min_log_scale: float | None = None
    """Floor of ln b in the likelihood (ours); None for none, as in the paper."""
    weight_decay: float = 1e-4
    """AdamW's weight decay, multiplied by the learning rate."""
    grad_clip_norm: float | None = None
    """Global norm that gradients are clipped to; None for no clipping."""

    def __post_init__(self):
        check_sides(self.model, px=self.px, crop_px=self.crop_px)


def short_dvae_run(**changes) -> DVAERun:
    """Our recipe for runs of thousands of updates, not millions; `changes` replace its fields.

    docs/dvae.md says what each departure from the paper bought.
    """
    recipe = {
        "learning_rate": 2e-3,
        "learning_rate_end": 1e-4,
        "learning_rate_steps": None,
        "warmup_steps": 100,
        "temperature_steps": None,
        "kl_steps": None,
        "kl_weight": 1.0,
        "rare_code_weight": 10.0,
        "kmeans_init": True,
        "min_log_scale": -2.0,
        "grad_clip_norm": 1.0,
    }
    return DVAERun(**(recipe | changes))


class DVAEStage(CodecStage):
    """The dVAE as a stage of the training loop; its arguments are those of `CodecStage`."""

    name = "dvae"
    against_collapse = (
        "a higher kl_weight or rare_code_weight, or a slower temperature, keeps more of them"
    )

    def __init__(self, run: DVAERun, *, init_images: Callable[[], np.ndarray], validation):
        super().__init__(run, init_images=init_images, validation=validation)
        self.model = DVAE(run.model)
        steps = run.loop.steps
        self.temperature = cosine(
            run.temperature_start,
            run.temperature_end,
            _steps(run.temperature_steps, 0.7 * steps),
        )
        self.kl_weight = cosine(0.0, run.kl_weight, _steps(run.kl_steps, 0))
        learning_rate = cosine(
            run.learning_rate,
            run.learning_rate_end,
            _steps(run.learning_rate_steps, max(steps - run.warmup_steps, 1)),
        )
        self.optimizer = adamw(
            warm_up(run.learning_rate, run.warmup_steps, learning_rate),
            b2=0.999,
            weight_decay=run.weight_decay,
            grad_clip_norm=run.grad_clip_norm,
            muon=run.muon(run.learning_rate, matrices),
        )

    def init_from_data(self, params):
        """Starts the codebook from clusters of images, if the run says so."""
        if not self.run.kmeans_init:
            return params
        key = jax.random.key(self.run.loop.seed)
        return kmeans_init(key, on_one_device(params), self.run.model, self._init_images())

    def loss(self, params, batch, key, step):
        """Mean pixel NLL + beta / (3 f^2) * mean cell KL.

        This is the paper's loss divided by the number of pixels and channels: at 256 px and f = 8
        it is mean NLL + (beta / 192) * mean KL.
        """
        run = self.run
        key_windows, key_codes = jax.random.split(key)
        images = batch["image"]
        if run.crop_px is not None:
            images = random_crops(key_windows, images, run.crop_px, run.model.factor)
        x = preprocess(images)
        logits = self._apply(params, x, "encode")
        z = losses.gumbel_softmax(key_codes, logits, self.temperature(step))
        stats = self._apply(params, z, "decode")
        nll = jnp.mean(losses.logit_laplace_nll(x, stats, min_log_scale=run.min_log_scale))
        kl = jnp.mean(losses.kl_to_uniform(logits))
        per_value = 1 / (3 * run.model.factor**2)
        loss = nll + self.kl_weight(step) * per_value * kl
        metrics = {"nll": nll, "kl": kl}
        if run.rare_code_weight:
            metrics["rare"] = losses.rare_code_penalty(logits)
            loss += run.rare_code_weight * per_value * metrics["rare"]
        return loss, metrics

    def _apply(self, params, x, method):
        return self.model.apply({"params": params}, x, method=method)


def _steps(given: int | None, otherwise: int | float) -> int:
    return round(otherwise) if given is None else given
