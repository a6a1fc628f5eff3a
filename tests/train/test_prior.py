"""The prior's stage and the codes it learns from."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from dalle_jax.data.batches import batches, once
from dalle_jax.data.shapes import ShapesSource
from dalle_jax.data.sources import Joined, SourceError
from dalle_jax.train.encode import EncodedBatches, encoded
from dalle_jax.train.loop import LoopConfig
from dalle_jax.train.prior import PriorRun, PriorStage, short_prior_run

SLOTS = tiny.parts()["prior"].text_length - 1


@pytest.fixture(scope="module")
def tokens():
    return tiny.model(prior=None, prior_params=None, tokenizer=None)


@pytest.fixture(scope="module")
def source():
    return ShapesSource("validation", px=tiny.PX)


def stage(tokens, validation=lambda: iter(())):
    run = short_prior_run(model=tiny.parts()["prior"], loop=LoopConfig(steps=10), batch_size=4)
    return PriorStage(
        run,
        tokens=tokens,
        tokenizer=tiny.tokenizer(),
        validation=validation,
        captions=["red apple"],
    )


def test_defaults_are_the_papers():
    run = PriorRun()
    assert (run.step_size, run.warmup_steps, run.weight_decay) == (4.5e-4, 5_000, 4.5e-2)
    assert (run.max_second_moment, run.clip_norm, run.bpe_dropout) == (5, 4, 0.1)
    assert (run.batch_size, run.loop.steps) == (1024, 430_000)
    assert (run.loop.average_every, run.loop.average_decay) == (25, 0.99)


def test_a_fresh_prior_gives_every_token_the_same_chance(tokens, key):
    s = stage(tokens)
    batch = {"text": jnp.zeros((2, SLOTS), jnp.int32), "codes": jnp.zeros((2, 4, 4), jnp.int32)}
    loss, metrics = jax.jit(lambda k: s.loss(s.init(k), batch, k, jnp.int32(0)))(key)
    text, image = np.log(tiny.tokenizer().vocabulary), np.log(12)
    assert float(metrics["text_nats"]) == pytest.approx(text, rel=1e-5)
    assert float(metrics["image_nats"]) == pytest.approx(image, rel=1e-5)
    assert float(loss) == pytest.approx(text / 8 + image * 7 / 8, rel=1e-5)


def test_evaluation_weighs_text_by_tokens_and_all_else_by_pictures(tokens):
    rng = np.random.default_rng(0)
    V = tiny.tokenizer().vocabulary
    text = rng.integers(0, V, (5, SLOTS), np.int32)
    text[:4, 2:] = V + np.arange(2, SLOTS)  # short captions in the first batch
    codes = rng.integers(0, 12, (5, 4, 4), np.int32)
    whole = [{"text": text, "codes": codes}]
    parts = [{"text": text[i], "codes": codes[i]} for i in (slice(0, 4), slice(4, 5))]
    params = tiny.parts()["prior_params"]
    first, second = (
        stage(tokens, lambda batches=b: iter(batches)).evaluate(params) for b in (whole, parts)
    )
    assert first == pytest.approx(second, rel=1e-5)


def test_sheet_draws_each_caption_and_the_model_is_whole(tokens):
    s = stage(tokens)
    params = tiny.parts()["prior_params"]
    assert s.sheet(params).ndim == 3
    assert s.to_model(params, card="made here").card == "made here"


def test_encoded_batches_are_the_dvaes_argmax_and_keep_the_position(tokens, source):
    def pictures():
        return batches(source, batch_size=4, seed=0, px=tiny.PX, crop="prior")

    coded, plain = EncodedBatches(pictures(), tokens), pictures()
    for _ in range(2):
        codes = next(coded)["codes"]
        np.testing.assert_array_equal(codes, tokens.encode(next(plain)["image"]))
    chex.assert_shape(codes, (4, 4, 4))
    assert coded.get_state() == plain.get_state()
    expected = next(coded)
    again = EncodedBatches(pictures(), tokens)
    again.set_state(plain.get_state())
    chex.assert_trees_all_equal(next(again), expected)


def test_codes_are_made_once_and_belong_to_their_codec(tokens, source, tmp_path):
    made = encoded(source, tokens, tmp_path)
    stamp = (tmp_path / "manifest.json").stat().st_mtime_ns
    again = encoded(source, tokens, tmp_path)
    assert (tmp_path / "manifest.json").stat().st_mtime_ns == stamp
    picture = next(once(source, batch_size=1, px=tiny.PX))["image"]
    np.testing.assert_array_equal(again[0]["codes"], tokens.encode(picture)[0])
    assert made[3]["captions"] == source[3]["captions"]
    with pytest.raises(SourceError, match="made of 10 pictures, but the data has 20 now; delete"):
        encoded(Joined(source, source), tokens, tmp_path)
    other = tiny.model(
        prior=None,
        prior_params=None,
        tokenizer=None,
        codec_params={
            **tiny.parts()["codec_params"],
            "encoder": tiny.parts()["codec_params"]["encoder"]
            | {"input": {"kernel": jnp.ones((7, 7, 3, 8)), "bias": jnp.zeros(8)}},
        },
    )
    with pytest.raises(SourceError, match="made by the codec"):
        encoded(source, other, tmp_path)
