"""The losses against written-out numbers, integrals and their own definitions."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax import losses


@pytest.mark.parametrize(("mu", "log_b"), [(0.0, 0.0), (1.5, -1.0), (-0.7, 0.4)])
def test_logit_laplace_is_a_density(mu, log_b):
    x = jnp.linspace(1e-6, 1 - 1e-6, 640**2).reshape(1, 640, 640, 1)
    stats = jnp.broadcast_to(jnp.array([mu] * 3 + [log_b] * 3), (1, 640, 640, 6))
    nll = losses.logit_laplace_nll(jnp.broadcast_to(x, (1, 640, 640, 3)), stats)[..., 0]
    mass = np.trapezoid(np.exp(-np.asarray(nll).ravel()), np.asarray(x).ravel())
    # what lies outside [1e-6, 1 - 1e-6] in logit space: two Laplace tails
    b, edge = np.exp(log_b), np.log((1 - 1e-6) / 1e-6)
    tails = 0.5 * np.exp(-(edge - mu) / b) + 0.5 * np.exp(-(edge + mu) / b)
    assert mass + tails == pytest.approx(1, abs=2e-3)


def test_logit_laplace_equals_the_written_formula():
    x, mu, b = 0.3, 0.5, 2.0
    expected = np.log(2 * b * x * (1 - x)) + abs(np.log(x / (1 - x)) - mu) / b
    stats = jnp.array([mu] * 3 + [np.log(b)] * 3)[None, None, None]
    nll = losses.logit_laplace_nll(jnp.full((1, 1, 1, 3), x), stats)
    np.testing.assert_allclose(nll, np.full((1, 1, 1, 3), expected), rtol=1e-6)


def test_floor_of_log_scale_bounds_the_density():
    stats = jnp.array([0.0] * 3 + [-50.0] * 3)[None, None, None]
    x = jnp.full((1, 1, 1, 3), 0.5)
    free = losses.logit_laplace_nll(x, stats)
    floored = losses.logit_laplace_nll(x, stats, min_log_scale=-2.0)
    np.testing.assert_allclose(free, np.log(2) - 50 + np.log(0.25), rtol=1e-5)
    np.testing.assert_allclose(floored, np.log(2) - 2 + np.log(0.25), rtol=1e-5)


def test_kl_is_zero_for_uniform_and_ln_k_for_certain_cells():
    uniform = jnp.full((1, 2, 2, 8), 3.0)
    certain = 1e3 * jax.nn.one_hot(jnp.arange(4).reshape(1, 2, 2), 8)
    np.testing.assert_allclose(losses.kl_to_uniform(uniform), 0, atol=1e-6)
    np.testing.assert_allclose(losses.kl_to_uniform(certain), np.log(8), rtol=1e-6)


def test_kl_of_a_written_out_cell():
    q = np.array([0.5, 0.25, 0.25])
    kl = losses.kl_to_uniform(jnp.log(q)[None, None, None])
    assert float(kl[0, 0, 0]) == pytest.approx(np.log(3) - 1.5 * np.log(2), abs=1e-6)


def test_gumbel_softmax_at_low_temperature_draws_from_the_categorical(key):
    q = jnp.array([0.6, 0.3, 0.1])
    logits = jnp.broadcast_to(jnp.log(q), (200, 10, 10, 3))
    z = losses.gumbel_softmax(key, logits, 1e-3)
    np.testing.assert_allclose(z.mean((0, 1, 2)), q, atol=0.02)
    np.testing.assert_allclose(z.sum(-1), 1, atol=1e-5)
    chex.assert_trees_all_equal(z, losses.gumbel_softmax(key, logits, 1e-3))


def test_rare_code_penalty_is_zero_where_all_codes_have_their_share():
    assert float(losses.rare_code_penalty(jnp.zeros((2, 4, 4, 16)))) == 0


def test_rare_code_penalty_pulls_on_a_dead_code_where_the_kl_does_not(key):
    logits = jax.random.normal(key, (1, 4, 4, 8)).at[..., 5].set(-30.0)
    of_penalty = jax.grad(losses.rare_code_penalty)(logits)[..., 5].sum()
    of_kl = jax.grad(lambda x: losses.kl_to_uniform(x).mean())(logits)[..., 5].sum()
    assert float(of_penalty) == pytest.approx(-1 / 8, rel=1e-3)  # downhill is up for code 5
    assert abs(float(of_kl)) < 1e-9


def test_prior_loss_weighs_text_one_eighth_and_leaves_pads_out():
    V = 4
    text_logits = jnp.zeros((2, 3, V))
    image_logits = jnp.log(jnp.array([[[0.75, 0.25]] * 2] * 2))
    text = jnp.array([[0, 3, V + 2], [1, V + 1, V + 2]])
    codes = jnp.array([[0, 0], [0, 1]])
    loss, metrics = losses.prior_loss(text_logits, image_logits, text, codes)
    image = -(3 * np.log(0.75) + np.log(0.25)) / 4
    assert float(metrics["text_nats"]) == pytest.approx(np.log(V), rel=1e-6)
    assert float(metrics["image_nats"]) == pytest.approx(image, rel=1e-6)
    assert float(loss) == pytest.approx(np.log(V) / 8 + image * 7 / 8, rel=1e-6)
    changed, _ = losses.prior_loss(text_logits.at[0, 2].set(9.0), image_logits, text, codes)
    assert float(changed) == float(loss)


def test_a_batch_without_text_has_no_text_loss():
    loss, metrics = losses.prior_loss(
        jnp.zeros((1, 2, 4)), jnp.zeros((1, 1, 2)), jnp.array([[4, 5]]), jnp.array([[1]])
    )
    assert float(metrics["text_nats"]) == 0
    assert float(loss) == pytest.approx(np.log(2) * 7 / 8, rel=1e-6)


def features(rows, seed):
    drawn = np.random.default_rng(seed).normal(size=(rows, 3)).astype(np.float32)
    return jnp.asarray(drawn / np.linalg.norm(drawn, axis=1, keepdims=True))


def test_contrastive_loss_is_the_mean_of_both_cross_entropies():
    image, text = features(3, 0), features(3, 1)
    loss, _ = losses.contrastive_loss(image, text, jnp.float32(5), jnp.arange(3)[:, None])
    logits = 5 * np.asarray(image) @ np.asarray(text).T
    rows = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    columns = np.exp(logits) / np.exp(logits).sum(0, keepdims=True)
    expected = -(np.log(np.diag(rows)).mean() + np.log(np.diag(columns)).mean()) / 2
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_equal_captions_are_equally_right():
    image, text = (
        features(4, 0),
        features(4, 1),
    )  # as if the equal captions differed, so that order might matter
    tokens = jnp.array([[1, 2], [1, 3], [1, 2], [4, 2]])  # the first and the third are equal
    loss, _ = losses.contrastive_loss(image, text, jnp.float32(5), tokens)
    order = jnp.array([2, 1, 0, 3])  # which of both images is listed first changes nothing
    swapped, _ = losses.contrastive_loss(image[order], text, jnp.float32(5), tokens)
    assert float(loss) == pytest.approx(float(swapped), rel=1e-6)
    strangers, _ = losses.contrastive_loss(image, text, jnp.float32(5), jnp.arange(4)[:, None])
    swapped, _ = losses.contrastive_loss(image[order], text, jnp.float32(5), jnp.arange(4)[:, None])
    assert abs(float(strangers) - float(swapped)) > 0.01


def test_an_image_that_chooses_a_caption_equal_to_its_own_is_right():
    image = jnp.eye(3)
    text = jnp.eye(3)[jnp.array([1, 0, 2])]  # the first two images choose each other's caption
    _, apart = losses.contrastive_loss(image, text, jnp.float32(5), jnp.arange(3)[:, None])
    _, equal = losses.contrastive_loss(image, text, jnp.float32(5), jnp.array([[7], [7], [8]]))
    assert float(apart["image_to_text"]) == float(apart["text_to_image"]) == pytest.approx(1 / 3)
    assert float(equal["image_to_text"]) == float(equal["text_to_image"]) == 1
