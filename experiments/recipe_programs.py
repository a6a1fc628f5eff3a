"""What recipes of training consist of: numbers, and variants of the priors.

A recipe differs from its base in one thing. A number, such as a learning rate, is an argument of
the program that trains, so that recipes which differ in numbers share one. A variant of the network
is the product's own, with some of its functions replaced by others while a program is traced.
"""

import dataclasses
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
from people import prior

from dalle_jax.generate.progressive_sampler import cells_filled
from dalle_jax.losses import cross_entropy
from dalle_jax.models import autoregressive_prior, layers, progressive_prior, transformer
from dalle_jax.models.layers import matrices, split_qkv
from dalle_jax.optim.muon import Muon
from dalle_jax.optim.optimizer import adamw
from dalle_jax.optim.schedules import cosine, warm_up
from dalle_jax.train.cell_orders import mixed_orders
from dalle_jax.train.prior_stage import PriorRun, PriorStage
from dalle_jax.train.progressive_stage import ProgressiveStage, progressive_run, sample_stages

STAGES = 8  # of sampling
COOLDOWN = 0.45  # share of the updates in which a trapezoid falls


class Numbers(NamedTuple):
    """What recipes of one program can differ in."""

    muon: float = 0.01
    learning_rate: float = 2e-3
    trapezoid: float = 0.0  # 1 for a trapezoid, 0 for a cosine
    smoothing: float = 0.0
    first_random: float = 1.0  # share of images in a random order, the others in raster order
    last_random: float = 1.0
    outputs: float = 1.0  # factor on the first kernels that write to the residual stream


class Numbered:
    """A stage of training that takes its numbers from a recipe."""

    def __init__(self, run: PriorRun, numbers: Numbers):
        nothing = {"codec_model": None, "tokenizer": None, "validation": tuple, "captions": ()}
        super().__init__(run, **nothing)
        self.numbers = numbers
        muon = Muon(scale=numbers.muon / numbers.learning_rate, matrices=matrices)
        self.optimizer = adamw(
            schedule(run, numbers),
            b2=0.96,
            weight_decay=run.weight_decay,
            grad_clip_norm=run.grad_clip_norm,
            max_second_moment=run.max_second_moment,
            muon=muon if run.optimizer == "muon" else None,
        )

    def init(self, key):
        """Initialises the parameters, the kernels of output projections times their factor."""
        params = super().init(key)
        for name in ("attention_out", "mlp_out"):
            params["layers"][name]["kernel"] *= self.numbers.outputs
        return params

    def random_share(self, step):
        """Share of images in a random order at a step."""
        first, last = self.numbers.first_random, self.numbers.last_random
        return last + (first - last) * super().random_share(step)


class Progressive(Numbered, ProgressiveStage):
    """The progressive prior."""

    def loss(self, params, batch, key, step):
        """Mean cross-entropy of all codes, in nats, with label smoothing."""
        codes = batch["codes"].reshape(len(batch["codes"]), -1)
        logits = self.logits(params, batch["text"], codes, self._cut(key, codes, step))
        uniform = (jax.nn.logsumexp(logits, axis=-1) - logits.mean(axis=-1)).mean()
        nats, smoothing = cross_entropy(logits, codes).mean(), self.numbers.smoothing
        return (1 - smoothing) * nats + smoothing * uniform, {}

    def nats(self, params, text, codes, key):
        """Mean cross-entropy in the order of the last updates."""
        when = self._cut(key, codes, self.run.loop.steps)
        return cross_entropy(self.logits(params, text, codes, when), codes).mean()

    def _cut(self, key, codes, step):
        key_order, key_stages = jax.random.split(key)
        return sample_stages(key_stages, self._ranks(key_order, codes.shape, step))

    def _ranks(self, key, shape, step):
        return jnp.argsort(mixed_orders(key, shape, self.random_share(step)), axis=-1)

    def plan(self, key, shape):
        """Which of how many stages fills each cell of a sample."""
        rank = self._ranks(key, shape, self.run.loop.steps)
        filled = cells_filled(shape[1], min(STAGES, shape[1]), "cosine")
        return jnp.searchsorted(jnp.asarray(filled), rank, side="right"), len(filled)

    def logits(self, params, text, codes, when):
        """Logits of each code, given those of earlier stages."""
        return self.model.apply({"params": params}, text, codes, when)


class Autoregressive(Numbered, PriorStage):
    """The autoregressive prior."""

    def nats(self, params, text, codes, key):
        """Mean cross-entropy of the codes."""
        return cross_entropy(self.logits(params, text, codes, None), codes).mean()

    def plan(self, key, shape):
        """One cell after the other."""
        return jnp.broadcast_to(jnp.arange(shape[1]), shape), shape[1]

    def logits(self, params, text, codes, when):
        """Logits of each code, given those before it."""
        return self.model.apply({"params": params}, text, codes)[1]


class Ordered(Autoregressive):
    """The autoregressive prior whose order is annealed, or is always raster order."""


def schedule(run: PriorRun, numbers: Numbers) -> optax.Schedule:
    """The learning rate: warm-up, then a cosine or a trapezoid to the same end."""
    end, steps, warmup = run.learning_rate_end / run.learning_rate, run.loop.steps, run.warmup_steps
    length, cooldown = max(steps - warmup, 1), max(round(COOLDOWN * steps), 1)
    curve = warm_up(1.0, warmup, cosine(1.0, end, length))
    line = warm_up(1.0, warmup, optax.linear_schedule(1.0, end, cooldown, length - cooldown))

    def rate(step):
        return numbers.learning_rate * jnp.where(numbers.trapezoid, line(step), curve(step))

    return rate


# Variants of the network: functions of the product that others replace while a program is traced.


def rms_norm(weights, x, *, axis=-1, epsilon=layers.NORM_EPSILON):
    """Root mean square 1, then a gain, without mean and bias."""
    x = x * jax.lax.rsqrt(jnp.square(x).mean(axis, keepdims=True) + epsilon)
    return x * jnp.expand_dims(weights["scale"], range(x.ndim - 1))


def rms_weights(shape):
    """Weights of `rms_norm`."""
    return {"scale": jnp.ones(shape)}


def relu_squared(x):
    """The square of ReLU, in place of GELU."""
    return jnp.square(jax.nn.relu(x))


def normed_split_qkv(qkv):
    """Queries, keys and values, the first two with QK norm."""
    query, key, value = split_qkv(qkv)
    return progressive_prior._qk_norm(query), progressive_prior._qk_norm(key), value


def rotary(x, grid):
    """Turns each head by row and column of the cells, which come last; text stays as it is.

    Source: Su et al. 2021; in two axes, with frequencies from 1 to 1/100, Heo et al. 2024.
    """
    T, pairs = x.shape[1], x.shape[-1] // 4
    position = np.stack(np.divmod(np.arange(grid**2), grid), axis=-1)  # I 2
    angle = position[..., None] * 100.0 ** (-np.arange(pairs) / pairs)
    angle = np.pad(angle, ((T - grid**2, 0), (0, 0), (0, 0))).reshape(1, T, 1, -1)  # 1 T 1 H/2
    cos, sin = (jnp.asarray(turn(angle), jnp.float32) for turn in (np.cos, np.sin))
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1).astype(x.dtype)


def _rotary_dense(query, key, value, *, mask, grid, dense=progressive_prior.dense):
    return dense(rotary(query, grid), rotary(key, grid), value, mask=mask)


@dataclass(frozen=True)
class Program:
    """What recipes of one program share."""

    stage: type[Numbered] = Progressive
    optimizer: str = "muon"
    replaced: Callable[[Any], list] = lambda config: []
    """Functions to replace: module, name, function."""

    def run(self, steps: int) -> PriorRun:
        """Sizes and schedules: those of `people.py`."""
        start = prior()
        changes = {"loop": dataclasses.replace(start.loop, steps=steps)}
        changes["optimizer"] = self.optimizer
        if self.stage is Progressive:
            return progressive_run(start, **changes)
        if self.stage is Ordered:
            sizes = {"attention": "dense", "order": "annealed"}
            changes["model"] = dataclasses.replace(start.model, **sizes)
        return dataclasses.replace(start, **changes)

    def lower(self, function: Callable, *args):
        """Traces a function with the replaced functions in place."""
        with ExitStack() as stack:
            for part in self.replaced(prior().model):
                stack.enter_context(mock.patch.object(*part))
            return jax.jit(function).lower(*args)


PROGRAMS = {
    "progressive": Program(),
    "adamw": Program(optimizer="adamw"),
    "no QK norm": Program(replaced=lambda _: [(progressive_prior, "_qk_norm", lambda x: x)]),
    "2-D rotary": Program(
        replaced=lambda config: [
            (progressive_prior, "dense", partial(_rotary_dense, grid=config.grid))
        ]
    ),
    "ReLU squared": Program(
        replaced=lambda _: [(transformer, "layer", partial(layers.layer, gelu=relu_squared))]
    ),
    "RMS norm": Program(
        replaced=lambda _: [
            *((module, "layer_norm", rms_norm) for module in (layers, transformer)),
            (progressive_prior, "layer_norm", rms_norm),
            *((module, "init_norm", rms_weights) for module in (layers, progressive_prior)),
        ]
    ),
    "autoregressive": Program(Autoregressive),
    "autoregressive, QK norm": Program(
        Autoregressive, replaced=lambda _: [(autoregressive_prior, "split_qkv", normed_split_qkv)]
    ),
    "autoregressive, ordered": Program(Ordered),
}


class Recipe(NamedTuple):
    """A program and its numbers."""

    program: str = "progressive"
    numbers: Numbers = Numbers()


RECIPES = {
    "base": Recipe(),
    "adamw": Recipe("adamw"),
    "adamw-0.001": Recipe("adamw", Numbers(learning_rate=1e-3)),
    "adamw-0.004": Recipe("adamw", Numbers(learning_rate=4e-3)),
    "muon-0.003": Recipe(numbers=Numbers(muon=0.003)),
    "muon-0.03": Recipe(numbers=Numbers(muon=0.03)),
    "no-qk-norm": Recipe("no QK norm"),
    "rotary": Recipe("2-D rotary"),
    "relu-squared": Recipe("ReLU squared"),
    "zero-outputs": Recipe(numbers=Numbers(outputs=0.0)),
    "rms-norm": Recipe("RMS norm"),
    "trapezoid": Recipe(numbers=Numbers(trapezoid=1.0)),
    "label-smoothing": Recipe(numbers=Numbers(smoothing=0.1)),
    "raster-to-random": Recipe(numbers=Numbers(first_random=0.0)),
    "random-to-raster": Recipe(numbers=Numbers(last_random=0.0)),
    "ar": Recipe("autoregressive"),
    "ar-qk-norm": Recipe("autoregressive, QK norm"),
    "ar-raster": Recipe("autoregressive, ordered", Numbers(first_random=0.0, last_random=0.0)),
    "ar-annealed": Recipe("autoregressive, ordered", Numbers(last_random=0.0)),
}
