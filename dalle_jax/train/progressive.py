"""Stage 2 in the progressive style: the prior learns each code from any groups of others.

Source: Fei et al. 2022 in our reading, docs/progressive.md.
"""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key

from dalle_jax.generate.progressive import filled
from dalle_jax.models.progressive_prior import ProgressiveConfig, ProgressivePrior, draw_params
from dalle_jax.train.orders import Order, order_scores, ranks
from dalle_jax.train.prior import PriorRun, PriorStage

STAGES = (2, 3, 4, 6, 8, 12, 16, 24, 32, 64)  # numbers of stages that training draws from


@dataclass(frozen=True, kw_only=True)
class ProgressiveRun(PriorRun):
    """One training run in the progressive style; the paper's own settings are not known."""

    model: ProgressiveConfig = field(default_factory=ProgressiveConfig)
    order: Order = "random"
    """Which cells are filled first: any, what the model finds easiest, what the codes fit best or
    worst, or a control."""


class ProgressiveStage(PriorStage):
    """The progressive prior as a stage of the training loop; arguments as for `PriorStage`.

    Each picture is cut into stages anew at every update, and one pass predicts all of its codes,
    each from the caption and the stages before its own.
    """

    name = "progressive"
    prior, draw = ProgressivePrior, staticmethod(draw_params)
    run: ProgressiveRun

    def loss(self, params, batch, key, step, *, scales=None):
        """Mean cross-entropy of all codes, in nats."""
        del step
        return self._loss(params, batch, scales, key)

    def _loss(self, params, batch, scales=None, key=None):
        # held-out pictures are always shown the same way
        key_order, key_stages = jax.random.split(jax.random.key(0) if key is None else key)
        text, codes = batch["text"], batch["codes"].reshape(len(batch["codes"]), -1)
        difficulty = self._difficulty(params, text, codes) if self.run.order == "dynamic" else None
        errors = batch["errors"].reshape(codes.shape) if "errors" in batch else None
        scores = order_scores(
            self.run.order, key_order, codes.shape, difficulty=difficulty, errors=errors
        )
        stage = draw_stages(key_stages, ranks(scores))
        logits = self.model.apply({"params": params}, text, codes, stage, scales=scales)
        nats = _nats(logits, codes).mean()
        return nats, {"image_nats": nats}

    def _difficulty(self, params, text, codes):
        """Nats of each code, given the caption alone."""
        prior = self.model.bind({"params": jax.lax.stop_gradient(params)})
        every = jnp.arange(codes.shape[1])[None]
        logits = prior.ask(prior.read(text), every, count=self.config.text_length)
        return _nats(logits, codes)


def draw_stages(key: Key[Array, ""], rank: Int[Array, "B I"]) -> Int[Array, "B I"]:
    """Draws a number of stages for each picture, and says which stage fills each cell.

    For half of the pictures the first few of them become one: as when cells are given.

    Args:
      key: for the numbers.
      rank: place of each cell in the order, from 0.
    """
    B, I = rank.shape
    numbers = [n for n in STAGES if n <= I]
    table = np.stack(
        [np.searchsorted(filled(I, n, "cosine"), np.arange(I), side="right") for n in numbers]
    )
    key_number, key_merge, key_first = jax.random.split(key, 3)
    number = jax.random.randint(key_number, (B,), 0, len(numbers))
    stage = jnp.take_along_axis(jnp.asarray(table)[number], rank, axis=1)
    first = jax.random.uniform(key_first, (B,)) * jnp.asarray(numbers)[number]
    first = jnp.where(jax.random.bernoulli(key_merge, 0.5, (B,)), first.astype(int), 0)
    return jnp.maximum(stage, first[:, None])


def _nats(logits, codes):
    log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), codes[..., None], axis=-1)
    return -log_p[..., 0]
