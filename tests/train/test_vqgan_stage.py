"""The VQ-GAN's stage: its loss written out, dead codes, and that it learns the same each time."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax.losses import codebook_loss, hinge_loss, unused_code_pull
from dalle_jax.models.discriminator import Discriminator, init_params
from dalle_jax.models.vqgan import VQGANConfig, nearest
from dalle_jax.train.loop import LoopConfig
from dalle_jax.train.state import init_state
from dalle_jax.train.train_step import make_train_step
from dalle_jax.train.vqgan_stage import VQGANRun, VQGANStage

SIZES = VQGANConfig(
    width=4, multipliers=(1, 2), blocks_per_group=1, attention=(), z_width=4, codes=8, code_width=4
)


def images(count=8, px=8):
    return np.random.default_rng(0).integers(0, 256, (count, px, px, 3), np.uint8)


def stage(**changes):
    loop = LoopConfig(steps=100)
    run = VQGANRun(model=SIZES, loop=loop, px=8, batch_size=4, warmup_steps=5, **changes)
    return VQGANStage(
        run, init_images=lambda: images(32), validation=lambda: iter([{"image": images()}])
    )


def test_features_are_pulled_to_codes_a_quarter_as_much_as_codes_to_features():
    z = jnp.array([1.0, 2.0]).reshape(1, 1, 1, 2)
    entries = jnp.array([3.0, 1.0]).reshape(1, 1, 1, 2)
    loss, (to_z, to_entries) = jax.value_and_grad(codebook_loss, (0, 1))(z, entries)
    assert loss == 1.25 * (4 + 1) / 2
    np.testing.assert_allclose(to_z[0, 0, 0], 0.25 * np.array([-2.0, 1.0]))
    np.testing.assert_allclose(to_entries[0, 0, 0], [2.0, -1.0])


def test_only_codes_without_cells_are_pulled_each_to_its_nearest_cell():
    z = jnp.array([[0.0, 0.0], [4.0, 0.0]] * 2).reshape(1, 2, 2, 2)
    table = jnp.array([[0.5, 0.0], [5.0, 2.0], [-1.0, 3.0]])
    codes = jnp.zeros((1, 2, 2), jnp.int32)
    loss, gradient = jax.value_and_grad(unused_code_pull, 1)(z, table, codes)
    assert float(loss) == pytest.approx((1 + 4 + 1 + 9) / 6)
    np.testing.assert_allclose(gradient, np.array([[0, 0], [1, 2], [-1, 3]]) / 3, rtol=1e-6)
    chex.assert_trees_all_equal(jax.grad(unused_code_pull)(z, table, codes), jnp.zeros_like(z))


def test_a_dead_code_comes_back_into_use():
    rng = np.random.default_rng(0)
    z = jnp.asarray(rng.normal(size=(1, 4, 4, 2)), jnp.float32)
    table = jnp.array([[0.0, 0.0], [50.0, 50.0]])
    pull = jax.jit(jax.grad(unused_code_pull, 1))
    for _ in range(60):
        codes, _ = nearest(z, table)
        table -= 0.5 * pull(z, table, codes)
    assert set(np.asarray(codes).ravel()) == {0, 1}


def test_training_lowers_the_loss_repeats_and_measures(key):
    s = stage(crop_px=4)
    update = make_train_step(s, ema_decay=0.5)
    begun = jax.jit(lambda key: init_state(s, key))(key)
    table = s.init_from_data(begun.params)["quantize"]["embedding"]
    assert len(np.unique(table, axis=0)) == 8

    def run():
        state = jax.tree.map(jnp.copy, begun)
        losses = []
        for _ in range(30):
            state, metrics = update(state, {"image": images()})
            losses.append(float(metrics["loss"]))
        return state, losses

    state, losses = run()
    assert losses[-1] < 0.8 * losses[0]
    again, same = run()
    assert losses == same
    chex.assert_trees_all_equal(state.params, again.params)

    measured = s.evaluate(state.ema_params)
    assert 1 <= measured["perplexity"] <= measured["codes"] <= 8
    assert 0 < measured["psnr"] < 30
    assert s.sheet(state.ema_params).ndim == 3


def test_patches_count_until_they_are_told_apart_by_a_margin_of_one():
    real = jnp.array([2.0, 0.5, -1.0]).reshape(3, 1, 1)  # short of 1 by 0, 0.5, 2
    drawn = jnp.array([-3.0, 0.0, 1.0]).reshape(3, 1, 1)  # above -1 by 0, 1, 2
    assert float(hinge_loss(real, drawn)) == pytest.approx((2.5 / 3 + 3 / 3) / 2)


def test_published_discriminator_scores_30_by_30_patches_of_256_pixels():
    judge = Discriminator(64, 3)
    params = jax.eval_shape(lambda: init_params(judge, 256, jax.random.key(0)))
    image = jax.ShapeDtypeStruct((1, 256, 256, 3), jnp.float32)
    scores = jax.eval_shape(lambda p, x: judge.apply({"params": p}, x), params, image)
    chex.assert_shape(scores, (1, 30, 30))


def test_the_score_moves_what_is_drawn_as_far_as_its_error_and_the_hinge_the_discriminator(key):
    s = stage(adversarial_weight=0.5, discriminator_width=4, discriminator_layers=1)
    judge = init_params(s.judge, 8, key)
    x, drawn = jax.random.uniform(key, (2, 2, 8, 8, 3), minval=-1)

    @jax.jit
    def gradients(judge, drawn):
        def hinge(judge):
            return hinge_loss(*(s.judge.apply({"params": judge}, y) for y in (x, drawn)))

        both = jax.grad(lambda judge, drawn: s._adversarial(judge, x, drawn)[0], (0, 1))
        return *both(judge, drawn), jax.grad(hinge)(judge)

    to_judge, to_drawn, of_hinge = gradients(judge, drawn)
    chex.assert_trees_all_close(to_judge, of_hinge, rtol=1e-5, atol=1e-7)
    of_error = drawn.size**-0.5  # each pixel's mean absolute error has the gradient 1 / size
    assert float(jnp.linalg.norm(to_drawn)) == pytest.approx(0.5 * of_error, rel=1e-3)


def test_the_network_is_kept_without_its_discriminator(key):
    s = stage(adversarial_weight=0.5, discriminator_width=4, discriminator_layers=1)
    params = jax.eval_shape(s.init, key)
    plain = jax.eval_shape(stage().init, key)
    assert set(params) == {"network", "judge"}
    chex.assert_trees_all_equal_structs(s.network(params), plain)
    batch = {"image": jax.ShapeDtypeStruct((4, 8, 8, 3), jnp.uint8)}
    state = jax.eval_shape(lambda: init_state(s, jax.random.key(0)))
    updated, metrics = jax.eval_shape(make_train_step(s), state, batch)
    chex.assert_trees_all_equal_structs(updated, state)
    assert {"pixels", "codebook", "unused", "hinge", "score"} < set(metrics)


def test_sides_that_do_not_fit_the_grid_are_refused():
    with pytest.raises(ValueError, match="crop_px is 3, but has to be a multiple of the model's f"):
        stage(crop_px=3)


@pytest.mark.parametrize("quantizer", ["cosine", "logits"])
def test_quantizers_of_imported_networks_are_not_trained(quantizer):
    with pytest.raises(ValueError, match=f"'{quantizer}', which imported networks have"):
        VQGANRun(model=dataclasses.replace(SIZES, quantizer=quantizer), px=8)


@pytest.mark.parametrize("field", ["unit_pixels", "wavelets"])
def test_pixels_of_imported_networks_are_not_trained(field):
    with pytest.raises(ValueError, match=f"{field} is for imported networks"):
        VQGANRun(model=dataclasses.replace(SIZES, **{field: True}), px=8)
