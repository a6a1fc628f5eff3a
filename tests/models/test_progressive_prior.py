"""The progressive prior: what sees what, and a cache that gives what the forward pass gives."""

import dataclasses
import itertools
from functools import cache, partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax.models import progressive_prior
from dalle_jax.models.progressive_prior import (
    ProgressiveConfig,
    ProgressivePrior,
    init_params,
    pad_cache,
)

TINY = ProgressiveConfig(
    width=16, depth=4, query_depth=2, heads=2, text_vocabulary=11, text_length=4, grid=2, codes=5
)
V, K, P, CELLS = 11, 5, 4, 4
STAGES = jnp.asarray([[2, 0, 1, 1], [0, 0, 0, 1]])


@cache
def params(config=TINY):
    shapes = jax.eval_shape(partial(init_params, config), jax.random.key(0))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: 0.3 * rng.normal(size=x.shape).astype(x.dtype), shapes)


def batch(size=2):
    rng = np.random.default_rng(size)
    text = rng.integers(V, size=(size, P - 1))
    return jnp.asarray(text), jnp.asarray(rng.integers(K, size=(size, CELLS)))


@jax.jit
def forward(params, text, codes, stage):
    return ProgressivePrior(TINY).apply({"params": params}, text, codes, stage)


def test_a_code_sees_the_text_and_the_stages_before_its_own():
    text, codes = batch()
    before = forward(params(), text, codes, STAGES)
    for slot in range(P - 1):
        after = forward(params(), text.at[:, slot].set((text[:, slot] + 1) % V), codes, STAGES)
        assert (jnp.abs(after - before).max(-1) > 1e-5).all()
    for cell in range(CELLS):
        after = forward(params(), text, codes.at[:, cell].set((codes[:, cell] + 1) % K), STAGES)
        changed = jnp.abs(after - before).max(-1) > 1e-5
        chex.assert_trees_all_equal(changed, STAGES[:, cell, None] < STAGES)


def test_pads_differ_from_words_and_from_each_other():
    text, codes = batch()
    words = forward(params(), text, codes, STAGES)
    pads = forward(params(), text.at[:, 1].set(V + 1), codes, STAGES)
    assert (jnp.abs(words - pads).max(-1) > 1e-5).all()


@pytest.mark.parametrize("logits", [progressive_prior.LOGITS, 1])
def test_cached_stages_equal_the_forward_pass(logits, monkeypatch):
    monkeypatch.setattr(progressive_prior, "LOGITS", logits)
    text, codes = batch()
    wanted = forward(params(), text, codes, STAGES)

    @jax.jit
    def in_stages(params, text, codes):
        prior = ProgressivePrior(TINY).bind({"params": params})
        more = CELLS + 1  # one more, for what does not count
        cache = jax.tree.map(lambda x: pad_cache(x, more), prior.prefill(text))
        found = []
        for cells in ([1, 0], [2, 3], [0, 1]):  # the second of the first stage does not count
            cells = jnp.asarray([cells])
            at, count = P + 2 * len(found) - (len(found) > 0), 1 if not found else 2
            found.append(prior.predict(cache, cells, count=at))
            pair = jnp.broadcast_to(cells, (2, 2))
            new = jnp.take_along_axis(codes, pair, axis=1)
            cache = prior.extend(cache, new, pair, at=at, count=count)
        return found

    first, second, third = in_stages(params(), text, codes)
    image = 0  # of stages 2, 0, 1, 1
    chex.assert_trees_all_close(first[image, 0], wanted[image, 1], atol=1e-5)
    chex.assert_trees_all_close(second[image], wanted[image, 2:], atol=1e-5)
    chex.assert_trees_all_close(third[image, 0], wanted[image, 0], atol=1e-5)


@pytest.mark.parametrize("grid", [1, 2, 3])
def test_a_code_that_is_left_out_is_predicted_from_the_other_quarters(grid):
    config = dataclasses.replace(TINY, grid=grid)
    text = batch(1)[0]
    codes = jnp.asarray(np.random.default_rng(1).integers(K, size=(1, grid**2)))
    quarter = np.add.outer(np.arange(grid) % 2 * 2, np.arange(grid) % 2).ravel()

    @jax.jit
    def look(params, codes):
        prior = ProgressivePrior(config).bind({"params": params})
        found = prior.predict_left_out(prior.prefill(text), codes)
        stages = [jnp.asarray(quarter == q, int)[None] for q in range(4)]
        return found, jnp.stack([prior(text, codes, stage) for stage in stages])

    found, wanted = look(params(config), codes)
    for cell, q in enumerate(quarter):
        chex.assert_trees_all_close(found[0, cell], wanted[q, 0, cell], atol=1e-5)
    own, _ = look(params(config), codes.at[0, 0].set((codes[0, 0] + 1) % K))
    chex.assert_trees_all_close(own[0, 0], found[0, 0], atol=1e-5)


def test_one_cell_a_stage_is_a_distribution_over_grids():
    config = dataclasses.replace(TINY, codes=2)
    grids = jnp.asarray(list(itertools.product((0, 1), repeat=4)))  # 16 4
    text = jnp.broadcast_to(batch(1)[0], (16, P - 1))
    order = jnp.broadcast_to(jnp.asarray([[3, 1, 0, 2]]), grids.shape)

    @jax.jit
    def log_chances(params):
        logits = ProgressivePrior(config).apply({"params": params}, text, grids, order)
        log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), grids[..., None], axis=-1)
        return log_p[..., 0].sum(-1)

    chances = np.exp(log_chances(params(config)))
    np.testing.assert_allclose(chances.sum(), 1, rtol=1e-5)
    assert chances.max() > 1.2 * chances.min()


def test_queries_and_keys_have_no_scale_of_their_own():
    text, codes = batch()
    before = forward(params(), text, codes, STAGES)
    larger = jax.tree.map(np.copy, params())
    for part in ("kernel", "bias"):
        qkv = larger["layers"]["qkv"][part]
        qkv[:, :, :2] *= 100 if part == "kernel" else 1
        if part == "bias":
            qkv[:, :2] *= 100
    chex.assert_trees_all_close(forward(larger, text, codes, STAGES), before, atol=1e-3)


def test_scanned_and_rematerialised_layers_give_the_same():
    text, codes = batch()

    def loss(params, **options):
        prior = ProgressivePrior(TINY, **options)
        return jnp.square(prior.apply({"params": params}, text, codes, STAGES)).sum()

    plain = jax.jit(jax.grad(loss))(params())
    other = jax.jit(jax.grad(lambda p: loss(p, scan=True, remat=True)))(params())
    chex.assert_trees_all_close(plain, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query_depth": 4}, r"query_depth is 4, but must be below depth \(=4\)"),
        ({"depth": 1}, "depth is 1, but must be at least 2"),
        ({"query_depth": 0}, "query_depth is 0, but must be at least 1"),
        ({"heads": 3}, r"width \(=16\) must be a multiple of heads \(=3\)"),
    ],
)
def test_sizes_that_do_not_fit_say_what_is_allowed(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **changes)


def test_lengths_that_do_not_fit_are_refused():
    text, codes = batch()
    with pytest.raises(ValueError, match="got 3 codes an image, but grid 2 needs 4"):
        forward(params(), text, codes[:, :3], STAGES[:, :3])
    with pytest.raises(ValueError, match="got 2 caption slots, but text_length 4"):
        forward(params(), text[:, :2], codes, STAGES)
