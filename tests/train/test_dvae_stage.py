"""The dVAE's stage: its loss, schedules, measurements and warnings."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax.models.dvae import DVAEConfig
from dalle_jax.train.codec_stage import random_crops
from dalle_jax.train.dvae_stage import DVAERun, DVAEStage, short_dvae_run
from dalle_jax.train.loop import LoopConfig

SIZES = DVAEConfig(width=8, groups=3, blocks_per_group=1, codes=16, code_width=8)


def images(count=8, px=16):
    return np.random.default_rng(0).integers(0, 256, (count, px, px, 3), np.uint8)


def stage(run):
    return DVAEStage(
        run, init_images=lambda: images(32), validation=lambda: iter([{"image": images()}])
    )


def short(**changes):
    return short_dvae_run(model=SIZES, loop=LoopConfig(steps=100), px=16, batch_size=4, **changes)


def test_defaults_are_the_papers():
    run = DVAERun()
    paper = stage(dataclasses.replace(run, model=SIZES))
    np.testing.assert_allclose(paper.kl_weight(0), 0, atol=1e-7)
    np.testing.assert_allclose(paper.kl_weight(5_000), 6.6, rtol=1e-6)
    np.testing.assert_allclose(paper.temperature(150_000), 1 / 16, rtol=1e-6)
    assert (run.batch_size, run.loop.steps, run.loop.ema_decay) == (512, 3_000_000, 0.999)
    assert (run.min_log_scale, run.rare_code_weight, run.kmeans_init) == (None, 0, False)


def test_loss_is_mean_nll_and_kl_over_the_values_of_a_cell(key):
    paper = stage(dataclasses.replace(DVAERun(), model=SIZES))
    params = jax.jit(paper.init)(key)
    loss, metrics = jax.jit(paper.loss)(params, {"image": images()}, key, 5_000)
    # 4 x 4 pixels of 3 channels under each cell; at f = 8 this is the paper's 192
    expected = metrics["nll"] + 6.6 / 48 * metrics["kl"]
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)


def test_a_codebook_starts_from_clusters_only_if_the_run_says_so(key):
    drawn = jax.jit(stage(short()).init)(key)
    begun = stage(short()).init_from_data(drawn)
    chex.assert_trees_all_equal(begun["encoder"]["input"], drawn["encoder"]["input"])
    assert not np.allclose(begun["decoder"]["input"]["kernel"], drawn["decoder"]["input"]["kernel"])
    chex.assert_trees_all_equal(stage(short(kmeans_init=False)).init_from_data(drawn), drawn)


def test_short_recipe_scales_with_the_run():
    for steps in (100, 1_000):
        s = stage(dataclasses.replace(short(), loop=LoopConfig(steps=steps)))
        assert float(s.temperature(0.35 * steps)) == pytest.approx(17 / 32, rel=1e-5)
        assert float(s.temperature(0.7 * steps)) == pytest.approx(1 / 16, rel=1e-5)


def test_training_lowers_the_loss_and_repeats(key):
    s = stage(short())

    @jax.jit
    def update(params, state, batch, step):
        def loss(p):
            return s.loss(p, batch, jax.random.fold_in(key, step), step)[0]

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = s.optimizer.update(grads, state, params, value=value)
        return jax.tree.map(jnp.add, params, updates), state, value

    def run():
        params = s.init_from_data(jax.jit(s.init)(key))
        state, values = s.optimizer.init(params), []
        for step in range(30):
            params, state, value = update(params, state, {"image": images()}, step)
            values.append(float(value))
        return values

    first = run()
    assert first[-1] < first[0]
    assert first == run()


def test_windows_lie_on_the_grid_and_inside_the_image(key):
    rows, columns = np.mgrid[:16, :16].astype(np.uint8)
    marked = jnp.asarray(np.stack([rows, columns, rows], -1))[None].repeat(64, 0)
    cut = np.asarray(random_crops(key, marked, 8, 4))
    corners = {tuple(map(int, window[0, 0, :2])) for window in cut}
    assert corners == {(r, c) for r in (0, 4, 8) for c in (0, 4, 8)}
    steps = cut[..., 0] - cut[:, :1, :1, 0]
    np.testing.assert_array_equal(steps, np.broadcast_to(np.mgrid[:8, :8][0], (64, 8, 8)))


def test_measurements_count_codes_and_decibels(key):
    s = stage(short())
    params = jax.jit(s.init)(key)
    measured = s.evaluate(params)
    assert 1 <= measured["perplexity"] <= measured["codes"] <= 16
    assert 0 < measured["psnr"] < 30
    assert s.sheet(params).ndim == 3


def test_a_collapsed_codebook_is_named_in_the_log(key, caplog):
    s = stage(short(kmeans_init=False))
    params = jax.jit(s.init)(key)
    output = params["encoder"]["output"]
    params["encoder"]["output"] = output | {"bias": 1e3 * jax.nn.one_hot(3, 16)}
    with caplog.at_level("WARNING"):
        assert s.evaluate(params)["codes"] == 1
    assert "the codebook has collapsed: 1 of 16 codes" in caplog.text


def test_sides_that_do_not_fit_the_grid_are_refused():
    with pytest.raises(ValueError, match="px is 18, but has to be a multiple of the model's f=4"):
        DVAERun(model=SIZES, px=18)
    with pytest.raises(ValueError, match="crop_px is 32, more than the images' px=16"):
        DVAERun(model=SIZES, px=16, crop_px=32)
