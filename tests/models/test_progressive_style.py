import dataclasses
from functools import cache, partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax.models.prior_parts import PriorConfig
from dalle_jax.models.transformer import Prior, draw_params

TINY = PriorConfig(
    width=16,
    depth=3,
    heads=2,
    text_vocabulary=11,
    text_length=4,
    grid=2,
    codes=5,
    style="progressive",
)
MASK = TINY.codes


@cache
def _parameters():
    init = jax.eval_shape(partial(draw_params, TINY), jax.random.key(0))
    generator = np.random.default_rng(0)
    return jax.tree.map(lambda x: 0.3 * generator.normal(size=x.shape).astype(x.dtype), init)


@jax.jit
def _apply(params, text, cells):
    return Prior(TINY).apply({"params": params}, text, cells, method="predict")


def _predict(text, cells):
    return _apply(_parameters(), text, cells)


def _batch(size):
    generator = np.random.default_rng(size)
    text = generator.integers(TINY.text_vocabulary, size=(size, TINY.text_length - 1))
    cells = generator.integers(MASK + 1, size=(size, TINY.image_length))
    return jnp.asarray(text), jnp.asarray(cells)


def test_its_parameters_are_those_of_the_other_style_but_for_the_ends():
    other = dataclasses.replace(TINY, style="autoregressive", attention="dense")
    other = jax.eval_shape(partial(draw_params, other), jax.random.key(0))
    own = jax.eval_shape(partial(draw_params, TINY), jax.random.key(0))
    assert own["embed"].keys() ^ other["embed"].keys() == {"mask", "start_of_image"}
    assert own["head"].keys() ^ other["head"].keys() == {"fill", "text"}
    chex.assert_trees_all_equal_shapes_and_dtypes(own["layers"], other["layers"])
    chex.assert_shape(own["head"]["fill"]["kernel"], (TINY.width, 1))


def test_every_cell_and_every_word_reach_every_output():
    text, cells = _batch(1)
    cells = cells.at[0, 1].set(MASK)
    before = _predict(text, cells)
    for changed in (
        *((text, cells.at[0, i].set((cells[0, i] + 1) % MASK)) for i in range(4)),
        *((text.at[0, i].set((text[0, i] + 1) % 11), cells) for i in range(3)),
    ):
        for was, became in zip(before, _predict(*changed), strict=True):
            difference = jnp.abs(was - became).reshape(4, -1).max(axis=1)
            assert (difference > 1e-5).all()


def test_text_read_once_gives_what_the_forward_pass_gives():
    text, _ = _batch(2)
    _, cells = _batch(6)  # three pictures of each caption

    @jax.jit
    def from_read(params, text, cells):
        prior = Prior(TINY).bind({"params": params})
        return prior.predict_from(prior.read(text), cells)

    wanted = _predict(jnp.repeat(text, 3, axis=0), cells)
    chex.assert_trees_all_close(from_read(_parameters(), text, cells), wanted, atol=1e-5)
    chex.assert_shape(wanted, [(6, 4, 5), (6, 4)])


def test_scanned_and_rematerialised_layers_give_the_same():
    text, cells = _batch(1)

    def loss(params, **options):
        outputs = Prior(TINY, **options).apply({"params": params}, text, cells, method="predict")
        return sum(jnp.square(output).sum() for output in outputs)

    plain = jax.jit(jax.grad(loss))(_parameters())
    other = jax.jit(jax.grad(lambda p: loss(p, scan=True, remat=True)))(_parameters())
    chex.assert_trees_all_close(plain, other, rtol=1e-4, atol=1e-5)


def test_a_wrong_number_of_cells_says_what_the_grid_needs():
    with pytest.raises(ValueError, match="got 3 codes a picture, but grid 2 needs 4"):
        _predict(jnp.zeros((1, 3), int), jnp.zeros((1, 3), int))
