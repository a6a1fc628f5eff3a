"""Stage 2 in the progressive style: the prior learns each code from any groups of others.

Source: Fei et al. 2022 in our reading, docs/progressive.md.
"""

from dataclasses import dataclass, field
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key

from dalle_jax.generate.progressive_sampler import REVISION_MARGIN, cells_filled, revision_margins
from dalle_jax.losses import cross_entropy
from dalle_jax.models.progressive_prior import ProgressiveConfig, ProgressivePrior, init_params
from dalle_jax.train.cell_orders import Order, order_ranks, order_scores
from dalle_jax.train.prior_stage import PriorRun, PriorStage

STAGES = (2, 3, 4, 6, 8, 12, 16, 24, 32, 64)  # numbers of stages in training
WRONG = 0.1  # share of a held-out image's codes that are replaced to see what is repaired


@dataclass(frozen=True, kw_only=True)
class ProgressiveRun(PriorRun):
    """One training run in the progressive style; the paper's own settings are not known."""

    model: ProgressiveConfig = field(default_factory=ProgressiveConfig)
    order: Order = "random"
    """Which cells are filled first: any, what the model finds easiest, what the codes fit best or
    worst, or a control."""


def progressive_run(run: PriorRun, **changes) -> ProgressiveRun:
    """The progressive run that goes with one of the autoregressive prior.

    Args:
      run: its sizes, schedules and lengths are kept; half of the layers become query layers.
      changes: fields to replace.
    """
    own = {"kernel", "attention", "order"}  # of the autoregressive prior alone
    sizes = {name: size for name, size in vars(run.model).items() if name not in own}
    model = ProgressiveConfig(**sizes, query_depth=run.model.depth // 2)
    fields = {name: value for name, value in vars(run).items() if name != "model"}
    return ProgressiveRun(**(fields | {"model": model} | changes))


class ProgressiveStage(PriorStage):
    """The progressive prior as a stage of the training loop; arguments as for `PriorStage`.

    Each image is cut into stages anew at every update, and one pass predicts all of its codes,
    each from the caption and the stages before its own.
    """

    name = "progressive"
    prior, draw = ProgressivePrior, staticmethod(init_params)
    run: ProgressiveRun

    def loss(self, params, batch, key, step, *, scales=None):
        """Mean cross-entropy of all codes, in nats."""
        del step
        return self._loss(params, batch, scales, key)

    def evaluate(self, params) -> dict[str, float]:
        """Measures the loss on the validation set, and what a pass of revision does there.

        Returns:
          As the loss, and "repaired", the share of wrong codes in full images that revision puts
          right, and "damaged", the share of right ones that it changes.
        """
        measured = super().evaluate(params)
        counts = sum(np.asarray(self._repairs(params, batch)) for batch in self._validation())
        repaired, wrong, damaged, right = counts.tolist()
        return measured | {"repaired": repaired / wrong, "damaged": damaged / right}

    @cached_property
    def _repairs(self):
        """Counts cells: repaired of wrong ones, damaged of right ones."""

        @jax.jit
        def count(params, batch):
            key_wrong, key_code = jax.random.split(jax.random.key(1))
            codes, K = batch["codes"].reshape(len(batch["codes"]), -1), self.config.codes
            wrong = jax.random.uniform(key_wrong, codes.shape) < WRONG
            other = (codes + jax.random.randint(key_code, codes.shape, 1, K)) % K
            shown = jnp.where(wrong, other, codes)
            prior = self.model.bind({"params": params})
            likeliest, doubt = revision_margins(
                prior.predict_left_out(prior.prefill(batch["text"]), shown), shown
            )
            changed = doubt >= REVISION_MARGIN
            repaired = wrong & changed & (likeliest == codes)
            return jnp.stack([x.sum() for x in (repaired, wrong, ~wrong & changed, ~wrong)])

        return count

    def _loss(self, params, batch, scales=None, key=None):
        # held-out images are always shown the same way
        key_order, key_stages = jax.random.split(jax.random.key(0) if key is None else key)
        text, codes = batch["text"], batch["codes"].reshape(len(batch["codes"]), -1)
        difficulty = self._difficulty(params, text, codes) if self.run.order == "dynamic" else None
        errors = batch["errors"].reshape(codes.shape) if "errors" in batch else None
        scores = order_scores(
            self.run.order, key_order, codes.shape, difficulty=difficulty, errors=errors
        )
        stage = sample_stages(key_stages, order_ranks(scores))
        logits = self.model.apply({"params": params}, text, codes, stage, scales=scales)
        nats = cross_entropy(logits, codes).mean()
        return nats, {"image_nats": nats}

    def _difficulty(self, params, text, codes):
        """Nats of each code, given the caption alone."""
        prior = self.model.bind({"params": jax.lax.stop_gradient(params)})
        every = jnp.arange(codes.shape[1])[None]
        logits = prior.predict(prior.prefill(text), every, count=self.config.text_length)
        return cross_entropy(logits, codes)


def sample_stages(key: Key[Array, ""], rank: Int[Array, "B I"]) -> Int[Array, "B I"]:
    """Samples a number of stages for each image, and says which stage fills each cell.

    Args:
      key: for the numbers.
      rank: place of each cell in the order, from 0.
    """
    images, cells = rank.shape
    numbers = [n for n in STAGES if n <= cells]
    places = np.arange(cells)
    table = np.stack(
        [np.searchsorted(cells_filled(cells, n, "cosine"), places, side="right") for n in numbers]
    )
    number = jax.random.randint(key, (images,), 0, len(numbers))
    return jnp.take_along_axis(jnp.asarray(table)[number], rank, axis=1)
