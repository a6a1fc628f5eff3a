"""Orders of cells, partial pictures, and the stage that learns from them."""

import dataclasses
from functools import cache

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from dalle_jax.generate.progressive import filled
from dalle_jax.train import state as state_lib
from dalle_jax.train.loop import LoopConfig
from dalle_jax.train.orders import order_scores, ranks
from dalle_jax.train.prior import short_prior_run
from dalle_jax.train.progressive import ProgressiveRun, ProgressiveStage, in_progressive_style

CONFIG = dataclasses.replace(tiny.parts()["prior"], style="progressive")
K = CONFIG.codes
TEXT = np.zeros((3, CONFIG.text_length - 1), np.int32)
CODES = np.random.default_rng(0).integers(0, K, (3, 4, 4), np.int32)


def stage(validation=(), **changes):
    settings = {"loop": LoopConfig(steps=10), "batch_size": 3, "warmup_steps": 1, "stages": 4}
    prior = short_prior_run(model=tiny.parts()["prior"])
    run = in_progressive_style(prior, **(settings | changes))
    tokens = tiny.model(prior=None, prior_params=None, tokenizer=None)
    return ProgressiveStage(
        run,
        tokens=tokens,
        tokenizer=tiny.tokenizer(),
        validation=lambda: iter(validation),
        captions=["red apple"],
    )


def test_each_order_ranks_as_its_name_says(key):
    nats = jnp.array([[3.0, 1.0, 2.0, 1.0]])

    def ranked(order):
        return ranks(order_scores(order, key, nats)).tolist()

    assert ranked("dynamic") == [[3, 0, 2, 1]]  # the easiest first; equal ones in raster order
    assert ranked("raster") == [[0, 1, 2, 3]]
    assert sorted(ranked("random")[0]) == [0, 1, 2, 3]


def test_centre_goes_outwards_in_rings():
    rank = ranks(order_scores("centre", jax.random.key(0), jnp.zeros((1, 16))))
    assert rank.reshape(4, 4).tolist() == [
        [4, 5, 6, 7],
        [8, 0, 1, 9],
        [10, 2, 3, 11],
        [12, 13, 14, 15],
    ]


@cache
def shown(greatest_noise):
    """What the model is shown of CODES in raster order, by twelve keys: [12, 3, 16]."""
    s = stage(order="raster", greatest_noise=greatest_noise)

    @jax.jit
    def look(keys):
        batch = {"text": jnp.asarray(TEXT), "codes": jnp.asarray(CODES)}
        return jax.vmap(lambda key: s.shown(s.init(jax.random.key(0)), batch, key))(keys)

    return jax.tree.map(np.asarray, look(jax.random.split(jax.random.key(0), 12)))


def test_partial_pictures_are_nested_and_hold_as_many_cells_as_the_schedule():
    cells, now = (x.reshape(-1, 16) for x in shown(0.0))
    after = filled(16, 4, "linear").tolist()
    found = set()
    for picture, fills, codes in zip(
        cells, now, np.tile(CODES.reshape(3, -1), (12, 1)), strict=True
    ):
        held, then = int((picture < K).sum()), int(fills.sum())
        found.add((held, then))
        # in raster order S_k is the first cells, and so each S_k holds the one before
        assert (picture[:held] == codes[:held]).all()
        assert (picture[held:] == K).all()
        assert (fills == (np.arange(16) < then)).all()
    assert found == set(zip([0, *after], after, strict=False))


def test_noise_replaces_filled_cells_alone():
    clean, _ = shown(0.0)
    noisy, _ = shown(0.9)
    assert ((clean == K) == (noisy == K)).all()
    assert 0.2 < (clean != noisy).sum() / (clean < K).sum() < 0.6  # 0.45, less those that fit


def test_an_update_learns(key):
    s = stage(step_size=0.05)
    state = jax.jit(lambda k: state_lib.create(s, k))(key)
    update = state_lib.update_step(s)
    batch = {"text": TEXT, "codes": CODES}
    first = last = None
    for _ in range(20):
        state, metrics = update(state, batch)
        last = float(metrics["loss"])
        first = first or last
    assert last < first - 0.05
    chex.assert_tree_all_finite(state.params)


def test_evaluation_counts_what_revision_would_mend():
    codes = np.where(CODES < 8, 0, CODES)
    s = stage([{"text": TEXT, "codes": codes}])
    params = jax.jit(s.init)(jax.random.key(0))
    fresh = s.evaluate(params)  # every code is as likely as any other: nothing is doubtful
    assert (fresh["repaired"], fresh["damaged"]) == (0, 0)
    assert fresh["new_nats"] == pytest.approx(np.log(K), rel=1e-5)
    # a model that says code 0, loudly, whatever it sees
    stubborn = jax.tree.map(np.zeros_like, params)
    stubborn["head"]["norm"]["bias"][0] = 1
    stubborn["head"]["image"]["kernel"][0, 0] = 9
    mended = s.evaluate(stubborn)
    assert mended["damaged"] == pytest.approx((codes != 0).mean(), abs=0.1)
    assert mended["repaired"] == pytest.approx((codes == 0).mean(), abs=0.35)  # of few


def test_the_model_draws_with_either_prior_and_keeps_both(tmp_path):
    s = stage()
    alone = s.to_model(jax.jit(s.init)(jax.random.key(0)))
    assert list(alone.priors) == ["progressive"]
    both = alone.with_priors_of(tiny.model())
    both.save(tmp_path / "model")
    loaded = type(both).load(tmp_path / "model")
    assert sorted(loaded.priors) == ["prior", "progressive"]
    drawn = [
        loaded.generate("red apple", seed=1, decoder=d) for d in ("progressive", "autoregressive")
    ]
    chex.assert_trees_all_equal(drawn[0], alone.generate("red apple", seed=1))
    chex.assert_trees_all_equal(drawn[1], tiny.model().generate("red apple", seed=1))
    kept = loaded.generate(
        "red apple", decoder="progressive", stages=2, image_prompt=drawn[1][0, 0], keep_rows=2
    )
    assert kept.shape == (1, 1, tiny.PX, tiny.PX, 3)
    codes = loaded.encode(drawn[1][0])
    assert codes.shape == (1, 4, 4)
    with pytest.raises(ValueError, match="has no progressive prior; its decoder is autoregressive"):
        tiny.model().generate("red apple", decoder="progressive")
    with pytest.raises(ValueError, match="stages is 4 .* but only the progressive decoder has"):
        tiny.model().generate("red apple", stages=4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": dataclasses.replace(CONFIG, style="autoregressive")}, "has to be 'progressive'"),
        ({"model": CONFIG, "stages": 17}, r"stages is 17, but must lie in 1\.\.16"),
        ({"model": CONFIG, "greatest_noise": 1.0}, r"greatest_noise is 1.0, but has to be in"),
    ],
)
def test_bad_settings_say_what_is_allowed(changes, message):
    with pytest.raises(ValueError, match=message):
        ProgressiveRun(**changes)
