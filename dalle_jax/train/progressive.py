"""Stage 2 in the progressive style: the prior learns to fill partial pictures, and to mend them.

Source: Fei et al. 2022 in our reading, docs/progressive.md.
"""

import dataclasses
from dataclasses import dataclass, field
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Key

from dalle_jax.errors import UserError
from dalle_jax.generate.progressive import DOUBT, Schedule, doubts, filled
from dalle_jax.losses import progressive_loss
from dalle_jax.models.prior_parts import PriorConfig
from dalle_jax.train.orders import Order, order_scores, ranks
from dalle_jax.train.prior import PriorRun, PriorStage

WRONG = 0.1  # share of a held-out picture's codes that are replaced to see what is mended


@dataclass(frozen=True, kw_only=True)
class ProgressiveRun(PriorRun):
    """One training run in the progressive style; the paper's own settings are not known."""

    model: PriorConfig = field(default_factory=lambda: PriorConfig(style="progressive"))
    order: Order = "dynamic"
    """Which cells are filled first: what the model finds easiest, what the codes fit best or
    worst, or a control."""
    stages: int = 16
    """Partial pictures of each picture; one of them is shown each time."""
    schedule: Schedule = "linear"
    """How many cells each stage fills: the same number, or few at first along a cosine."""
    greatest_noise: float = 0.2
    """Greatest share of the filled cells that hold a wrong code; it is drawn from 0 to this."""
    changed_weight: float = 10.0
    """Weight of codes that do not stand there yet; those to be kept have 1."""
    from_prior: bool = False
    """Begin with the weights of the autoregressive prior of the same experiment (ours)."""

    def __post_init__(self):
        if self.model.style != "progressive":
            raise UserError(f"model.style is {self.model.style!r}, but has to be 'progressive'")
        filled(self.model.image_length, self.stages, self.schedule)  # says what is allowed
        if not 0 <= self.greatest_noise < 1:
            raise UserError(f"greatest_noise is {self.greatest_noise}, but has to be in [0, 1)")


def in_progressive_style(run: PriorRun, **changes) -> ProgressiveRun:
    """The same run in the progressive style, so that only the way of drawing differs.

    Args:
      run: of a prior; its sizes, schedules and lengths are kept.
      changes: fields to replace.
    """
    fields = {name: value for name, value in vars(run).items() if name != "model"}
    model = dataclasses.replace(run.model, style="progressive")
    return ProgressiveRun(**(fields | {"model": model} | changes))


class ProgressiveStage(PriorStage):
    """The progressive prior as a stage of the training loop; arguments as for `PriorStage`.

    Each picture is shown partly filled, S_k for a stage k drawn at random, some of its codes
    replaced by wrong ones. One more pass, without gradients and without any cell, gives the
    difficulty of each code and half of the wrong ones: what the model itself draws at first.
    """

    name = "progressive"
    run: ProgressiveRun

    def begin(self, params):
        """Takes over all that the autoregressive prior has too, if the run is to."""
        if not self.run.from_prior:
            return params
        if self._tokens is None or "prior" not in self._tokens.priors:
            raise UserError(
                "from_prior begins with an autoregressive prior, but there is none; train one "
                "before (stage `prior`), or give --no-from-prior"
            )
        sizes, weights = self._tokens.priors["prior"]
        wanted = dataclasses.replace(self.config, style=sizes.style, attention=sizes.attention)
        if sizes != wanted or self._tokens.tokenizer.fingerprint != self._tokenizer.fingerprint:
            raise UserError(
                f"from_prior needs a prior of the same sizes and tokenizer, but there is {sizes} "
                f"for {wanted}; change one of them, or give --no-from-prior"
            )
        weights = jax.device_get(weights)
        return {
            part: own | {name: weights[part][name] for name in own.keys() & weights[part].keys()}
            for part, own in params.items()
        }

    def loss(self, params, batch, key, step, *, scales=None):
        """Weighted nats of all codes, and of whether to fill each empty cell now."""
        del step
        return self._loss(params, batch, scales, key)

    def evaluate(self, params) -> dict[str, float]:
        """Measures the loss on the validation set, and what is mended there.

        Returns:
          As the loss, and "repaired", the share of wrong codes in full pictures that one pass of
          revision would put right, and "damaged", the share of right ones it would change.
        """
        measured = super().evaluate(params)
        counts = sum(np.asarray(self._mended(params, batch)) for batch in self._validation())
        repaired, wrong, damaged, right = counts.tolist()
        return measured | {"repaired": repaired / wrong, "damaged": damaged / right}

    @cached_property
    def _mended(self):
        """Counts cells: repaired of wrong ones, damaged of right ones."""

        @jax.jit
        def count(params, batch):
            key_wrong, key_code = jax.random.split(jax.random.key(1))
            codes, K = _in_a_row(batch["codes"]), self.config.codes
            wrong = jax.random.uniform(key_wrong, codes.shape) < WRONG
            other = (codes + jax.random.randint(key_code, codes.shape, 1, K)) % K
            cells = jnp.where(wrong, other, codes)
            logits, _ = self._predict(params, batch["text"], cells)
            best, doubt = doubts(logits, cells)
            changes = doubt >= DOUBT
            repaired = wrong & changes & (best == codes)
            return jnp.stack([x.sum() for x in (repaired, wrong, ~wrong & changes, ~wrong)])

        return count

    def shown(
        self, params, batch, key: Key[Array, ""]
    ) -> tuple[Int[Array, "B I"], Bool[Array, "B I"]]:
        """Draws partial pictures of a batch: what the model sees, and which cells S_k fills.

        Args:
          params: as for the loss; nothing is differentiated here.
          batch: as for the loss.
          key: for stages, order and wrong codes.
        Returns:
          Codes, or K for an empty cell; True for the cells that are filled after this stage.
        """
        run, K = self.run, self.config.codes
        codes = _in_a_row(batch["codes"])
        key_order, key_stage, key_wrong, key_codes = jax.random.split(key, 4)
        blind, _ = self._predict(params, batch["text"], jnp.full_like(codes, K))
        blind = jax.lax.stop_gradient(blind)
        nats = -jnp.take_along_axis(jax.nn.log_softmax(blind), codes[..., None], axis=-1)[..., 0]
        errors = _in_a_row(batch["errors"]) if "errors" in batch else None
        rank = ranks(order_scores(run.order, key_order, nats, errors))

        after = filled(codes.shape[1], run.stages, run.schedule)
        stage = jax.random.randint(key_stage, (len(codes), 1), 0, run.stages)
        held = rank < jnp.asarray(np.pad(after, (1, 0)))[stage]
        wrong = held & _chosen(key_wrong, run.greatest_noise, codes.shape)
        cells = jnp.where(held, jnp.where(wrong, _mistakes(key_codes, blind), codes), K)
        return cells, rank < jnp.asarray(after)[stage]

    def _loss(self, params, batch, scales=None, key=None):
        # held-out pictures are always shown the same way
        cells, now = self.shown(params, batch, jax.random.key(0) if key is None else key)
        logits, fill = self._predict(params, batch["text"], cells, scales)
        return progressive_loss(
            logits,
            fill,
            cells=cells,
            codes=_in_a_row(batch["codes"]),
            now=now,
            changed_weight=self.run.changed_weight,
        )

    def _predict(self, params, text, cells, scales=None):
        return self.model.apply({"params": params}, text, cells, scales=scales, method="predict")


def _in_a_row(grids):
    return grids.reshape(len(grids), -1)


def _chosen(key, greatest, shape):
    """Marks cells, in each picture a share of them that is drawn from 0 to `greatest`."""
    key_share, key_cells = jax.random.split(key)
    share = jax.random.uniform(key_share, (shape[0], 1), maxval=greatest)
    return jax.random.uniform(key_cells, shape) < share


def _mistakes(key, logits):
    """Codes to stand where they are wrong: half of them any, half what the logits draw."""
    key_any, key_drawn, key_which = jax.random.split(key, 3)
    *shape, K = logits.shape
    anything = jax.random.randint(key_any, shape, 0, K)
    drawn = jax.random.categorical(key_drawn, logits)
    return jnp.where(jax.random.bernoulli(key_which, 0.5, shape), anything, drawn)
