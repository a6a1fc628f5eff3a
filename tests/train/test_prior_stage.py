"""The prior's stage."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from dalle_jax.errors import UserError
from dalle_jax.parallel.mesh import MeshConfig
from dalle_jax.train.loop import LoopConfig
from dalle_jax.train.prior_stage import PriorRun, PriorStage, short_prior_run
from dalle_jax.train.progressive_stage import ProgressiveRun

SLOTS = tiny.parts()["prior"].text_length - 1


@pytest.fixture(scope="module")
def tokens():
    return tiny.model(prior=None, prior_params=None, tokenizer=None)


def stage(tokens, validation=lambda: iter(())):
    run = short_prior_run(model=tiny.parts()["prior"], loop=LoopConfig(steps=10), batch_size=4)
    return PriorStage(
        run,
        codec_model=tokens,
        tokenizer=tiny.tokenizer(),
        validation=validation,
        captions=["red apple", "crying cat " * 30],  # too long for the prior
    )


def test_defaults_are_the_papers():
    run = PriorRun()
    assert (run.learning_rate, run.warmup_steps, run.weight_decay) == (4.5e-4, 5_000, 4.5e-2)
    assert (run.max_second_moment, run.grad_clip_norm, run.bpe_dropout) == (5, 4, 0.1)
    assert (run.batch_size, run.loop.steps) == (1024, 430_000)
    assert (run.loop.ema_every, run.loop.ema_decay) == (25, 0.99)


@pytest.mark.parametrize("run", [PriorRun, ProgressiveRun])
def test_muon_refuses_kernels_that_are_cut_by_heads(run):
    loop = LoopConfig(steps=1, mesh=MeshConfig(tensor=2))
    assert run(loop=loop).optimizer == "adamw"
    with pytest.raises(ValueError, match=r"muon needs whole matrices, but tensor=2 .* mesh\.fsdp"):
        run(loop=loop, optimizer="muon")


def test_moments_of_kernels_are_stored_in_16_bits_if_the_run_says_so(tokens, key):
    run = dataclasses.replace(stage(tokens).run, moments="16-bit")
    options = {"codec_model": tokens, "tokenizer": None, "validation": iter, "captions": ()}
    s = PriorStage(run, **options)
    state = jax.eval_shape(lambda k: s.optimizer.init(s.init(k)), key)
    found = {
        jax.tree_util.keystr(path)
        for path, leaf in jax.tree.leaves_with_path(state)
        if leaf.dtype == jnp.uint16
    }
    assert len(found) == 2 * 4  # mean and variance of the four kernels of all layers
    assert all(path.endswith("['kernel']") and "['layers']" in path for path in found)
    with pytest.raises(UserError, match="muon has no Adam moments of the layers' kernels"):
        dataclasses.replace(run, optimizer="muon")


def test_a_fresh_prior_gives_every_token_the_same_chance(tokens, key):
    s = stage(tokens)
    batch = {"text": jnp.zeros((2, SLOTS), jnp.int32), "codes": jnp.zeros((2, 4, 4), jnp.int32)}
    loss, metrics = jax.jit(lambda k: s.loss(s.init(k), batch, k, jnp.int32(0)))(key)
    text, image = np.log(tiny.tokenizer().vocabulary), np.log(12)
    assert float(metrics["text_nats"]) == pytest.approx(text, rel=1e-5)
    assert float(metrics["image_nats"]) == pytest.approx(image, rel=1e-5)
    assert float(loss) == pytest.approx(text / 8 + image * 7 / 8, rel=1e-5)


def test_evaluation_weighs_text_by_tokens_and_all_else_by_images(tokens):
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


def test_sheet_draws_long_captions_too_and_the_model_is_whole(tokens):
    s = stage(tokens)
    params = tiny.parts()["prior_params"]
    assert s.sheet(params).ndim == 3
    assert s.to_model(params, card="made here").card == "made here"


def test_an_annealed_order_is_random_at_first_and_raster_order_at_the_end(tokens, key):
    model = dataclasses.replace(tiny.parts()["prior"], attention="dense", order="annealed")
    run = short_prior_run(model=model, loop=LoopConfig(steps=100), batch_size=4)
    options = {"codec_model": tokens, "tokenizer": None, "validation": iter, "captions": ()}
    s = PriorStage(run, **options)
    batch = {"text": jnp.zeros((4, SLOTS), jnp.int32), "codes": jnp.arange(64).reshape(4, 4, 4)}
    raster = np.arange(16)

    keys = jax.random.split(key, 100)
    cells_of = jax.jit(jax.vmap(lambda k, step: s._cells(k, batch, step), (0, None)))

    def in_raster_order(step):
        cells = np.asarray(cells_of(keys, step))
        assert (np.sort(cells, axis=-1) == raster).all()
        return (cells == raster).all(axis=-1).mean()

    found = [in_raster_order(step) for step in (0, 50, 62.5, 75, 100)]
    assert found == pytest.approx([0, 0, 0.5, 1, 1], abs=0.1)

    params = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(key, x.shape), s.init(key))
    batch["codes"] %= 12
    of = jax.jit(s.loss)
    first, middle, last = (float(of(params, batch, key, step)[0]) for step in (0, 40, 90))
    assert first == middle != last
    measured, _ = s._measure(params, batch)
    assert last == pytest.approx(float(measured), rel=1e-5)
    assert last != float(of(params, batch, key, 0)[0]), "the order is part of what is learned"
