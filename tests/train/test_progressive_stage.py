"""Orders of cells, their stages, and the training stage that learns from them."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from dalle_jax.generate.progressive_sampler import cells_filled
from dalle_jax.generate.sampling import SamplingConfig
from dalle_jax.models.progressive_prior import ProgressivePrior, init_params
from dalle_jax.train.cell_orders import order_ranks, order_scores
from dalle_jax.train.loop import LoopConfig
from dalle_jax.train.prior_stage import short_prior_run
from dalle_jax.train.progressive_stage import ProgressiveStage, progressive_run, sample_stages

PARTS = tiny.progressive_parts()
CONFIG, RANDOM = PARTS["progressive"], PARTS["progressive_params"]
K = CONFIG.codes
TEXT = np.zeros((3, CONFIG.text_length - 1), np.int32)
CODES = np.random.default_rng(0).integers(0, K, (3, 4, 4), np.int32)
BATCH = {"text": jnp.asarray(TEXT), "codes": jnp.asarray(CODES)}

SHAPES = jax.eval_shape(partial(init_params, CONFIG), jax.random.key(0))
PARAMS = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), SHAPES)  # all codes equally likely


logits_of = partial(jax.jit(ProgressivePrior(CONFIG).apply), {"params": RANDOM})


def stage(validation=(), **changes):
    settings = {"loop": LoopConfig(steps=10), "batch_size": 3, "warmup_steps": 1}
    run = progressive_run(short_prior_run(model=tiny.parts()["prior"]), **(settings | changes))
    return ProgressiveStage(
        run,
        codec_model=tiny.model(prior=None, prior_params=None, tokenizer=None),
        tokenizer=tiny.tokenizer(),
        validation=lambda: iter(validation),
        captions=["red apple"],
    )


def test_its_run_takes_over_the_other_priors_settings():
    prior = short_prior_run(model=tiny.parts()["prior"], learning_rate=3e-3, bpe_dropout=0.25)
    run = progressive_run(prior)
    assert run.model == CONFIG
    assert (run.learning_rate, run.bpe_dropout, run.loop) == (3e-3, 0.25, prior.loop)


def test_the_loss_is_the_mean_nats_of_all_codes_by_their_stages(key):
    s = stage()
    loss, metrics = jax.jit(s.loss)(RANDOM, BATCH, key, 0)
    key_order, key_stages = jax.random.split(key)
    stages = sample_stages(key_stages, order_ranks(jax.random.uniform(key_order, (3, 16))))
    logits = logits_of(BATCH["text"], BATCH["codes"].reshape(3, 16), stages)
    log_p = np.asarray(jax.nn.log_softmax(logits))
    wanted = -np.mean([log_p[i, j, c] for i in range(3) for j, c in enumerate(CODES[i].ravel())])
    np.testing.assert_allclose([loss, metrics["image_nats"]], wanted, rtol=1e-5)
    other, _ = jax.jit(s.loss)(RANDOM, BATCH, jax.random.key(1), 0)
    assert abs(other - loss) > 1e-4


def test_the_dynamic_order_takes_the_easiest_codes_first(key):
    s = stage(order="dynamic")
    loss, _ = jax.jit(s.loss)(RANDOM, BATCH, key, 0)
    first = jnp.zeros((3, 16), int)
    codes = BATCH["codes"].reshape(3, 16)
    logits = logits_of(BATCH["text"], codes, first)
    nats = -np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), CODES.reshape(3, 16, 1), -1)[
        ..., 0
    ]
    stages = sample_stages(jax.random.split(key)[1], order_ranks(jnp.asarray(nats)))
    logits = logits_of(BATCH["text"], codes, stages)
    log_p = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), CODES.reshape(3, 16, 1), -1)
    np.testing.assert_allclose(loss, -log_p.mean(), rtol=1e-4)


def test_stages_are_those_of_the_schedule_in_the_order_of_the_ranks(key):
    rank = jnp.asarray(np.random.default_rng(0).permuted(np.tile(np.arange(16), (40, 1)), axis=1))
    stages = np.asarray(sample_stages(key, rank))
    numbers = set()
    for row, places in zip(stages, np.asarray(rank), strict=True):
        in_order = row[np.argsort(places)]
        assert (np.diff(in_order) >= 0).all()
        number = int(row.max()) + 1
        numbers.add(number)
        counts = np.bincount(row, minlength=number).cumsum()
        assert counts.tolist() == cells_filled(16, number, "cosine").tolist()
    assert numbers == {2, 3, 4, 6, 8, 12, 16}


def test_each_order_ranks_as_its_name_says(key):
    nats, errors = jnp.array([[3.0, 1.0, 2.0, 1.0]]), jnp.array([[-7.0, -9.0, 0.5, -8.0]])

    def ranked(order):
        scores = order_scores(order, key, (1, 4), difficulty=nats, errors=errors)
        return order_ranks(scores).tolist()

    assert ranked("dynamic") == [[3, 0, 2, 1]]  # the easiest first; equal ones in raster order
    assert ranked("certain") == [[2, 0, 3, 1]]
    assert ranked("uncertain") == [[1, 3, 0, 2]]
    assert ranked("raster") == [[0, 1, 2, 3]]
    assert sorted(ranked("random")[0]) == [0, 1, 2, 3]
    with pytest.raises(ValueError, match='the order "certain" needs the errors of the codes'):
        order_scores("certain", key, (1, 4), difficulty=nats)
    with pytest.raises(ValueError, match='the order "dynamic" needs the difficulties'):
        order_scores("dynamic", key, (1, 4))


def test_centre_goes_outwards_in_rings():
    rank = order_ranks(order_scores("centre", jax.random.key(0), (1, 16)))
    assert rank.reshape(4, 4).tolist() == [
        [4, 5, 6, 7],
        [8, 0, 1, 9],
        [10, 2, 3, 11],
        [12, 13, 14, 15],
    ]


def test_evaluation_counts_what_revision_would_repair():
    codes = np.where(CODES < 8, 0, CODES)
    s = stage([{"text": TEXT, "codes": codes}])
    fresh = s.evaluate(PARAMS)  # every code is as likely as any other: nothing is doubtful
    assert (fresh["repaired"], fresh["damaged"]) == (0, 0)
    assert fresh["image_nats"] == pytest.approx(np.log(K), rel=1e-5)
    # a model that says code 0, loudly, whatever it sees
    stubborn = jax.tree.map(np.copy, PARAMS)
    stubborn["head"]["norm"]["bias"][0] = 1
    stubborn["head"]["image"]["kernel"][0, 0] = 9
    mended = s.evaluate(stubborn)
    assert mended["damaged"] == pytest.approx((codes != 0).mean(), abs=0.1)
    assert mended["repaired"] == pytest.approx((codes == 0).mean(), abs=0.35)  # of few


def test_the_model_draws_and_keeps_the_top_of_an_image():
    s = stage()
    model = s.to_model(PARAMS)
    assert list(model.priors) == ["progressive"]
    drawn = model.generate("red apple", seed=1, sampling=SamplingConfig(stages=4))
    other = model.generate(
        "red apple",
        seed=2,
        sampling=SamplingConfig(stages=4, decoder="progressive"),
        image_prompt=drawn[0, 0],
        keep_rows=2,
    )
    chex.assert_equal_shape([drawn, other])
    assert (drawn != other).any()


def test_a_model_with_both_priors_draws_with_the_progressive_one():
    model = tiny.model(**tiny.progressive_parts())
    configs = [SamplingConfig(stages=4, decoder=decoder) for decoder in (None, "progressive")]
    chex.assert_trees_all_equal(*(model.generate("red apple", sampling=c) for c in configs))


def test_what_a_decoder_cannot_do_is_said():
    with pytest.raises(ValueError, match="has no progressive prior; its decoder is autoregressive"):
        tiny.model().generate("red apple", sampling=SamplingConfig(decoder="progressive"))
    with pytest.raises(ValueError, match="stages is 4, but only the progressive decoder has"):
        tiny.model().generate("red apple", sampling=SamplingConfig(stages=4))
