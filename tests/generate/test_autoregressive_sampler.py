import dataclasses
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax.generate import autoregressive_sampler
from dalle_jax.generate.autoregressive_sampler import sample, sample_rows
from dalle_jax.generate.sampling import SamplingConfig
from dalle_jax.models.autoregressive_prior import AutoregressivePrior
from dalle_jax.models.prior_config import PriorConfig

# four layers hold every kind: row, column, row, conv
TINY = PriorConfig(
    width=16, depth=4, heads=2, text_vocabulary=11, text_length=4, grid=3, codes=7, kernel=3
)


def _make_parameters():
    """Weights large enough for captions to change what is sampled."""
    shapes = jax.eval_shape(
        AutoregressivePrior(TINY).init,
        jax.random.key(0),
        jnp.zeros((1, 3), int),
        jnp.zeros((1, 9), int),
    )
    generator = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: jnp.asarray(0.6 * generator.normal(size=x.shape), x.dtype), shapes["params"]
    )


PARAMETERS = _make_parameters()
CAPTIONS = np.array([[1, 2, 3], [4, 12, 13], [11, 12, 13], [9, 8, 7], [5, 10, 13]])
EMPTY = np.array([[11, 12, 13]])


def draw(text, keys, *, prompt_codes=None, keep_rows=0, **options):
    sampling = SamplingConfig(**options)
    prompt = {"prompt_codes": prompt_codes, "keep_rows": keep_rows}
    return sample(TINY, PARAMETERS, text, keys, sampling=sampling, **prompt)


def _keys(number, seed=0):
    return jax.random.split(jax.random.key(seed), number)


@jax.jit
def _full_forward(text, codes):
    return AutoregressivePrior(TINY).apply({"params": PARAMETERS}, text, codes)[1]


def _uncached_greedy(text, guidance):
    """One whole forward pass for every code, for the caption and for the empty one."""
    codes = np.zeros((len(text), 9), int)
    for p in range(9):
        with_caption = _full_forward(text, codes)[:, p]
        without = _full_forward(np.repeat(EMPTY, len(text), 0), codes)[:, p]
        codes[:, p] = jnp.argmax(without + guidance * (with_caption - without), axis=-1)
    return codes.reshape(-1, 3, 3)


@pytest.mark.parametrize("guidance", [1.0, 2.5, 0.0, -1.0])
def test_greedy_codes_equal_uncached_guided_argmax(guidance):
    got = draw(CAPTIONS, _keys(5), temperature=0, guidance=guidance)
    expected = _uncached_greedy(CAPTIONS, guidance)
    np.testing.assert_array_equal(got, expected)
    assert guidance == 1 or (expected != _uncached_greedy(CAPTIONS, 1.0)).any()


def test_guidance_of_one_equals_no_guidance_but_three_does_not():
    # in float32 the first is 1, which compares the doubled batch with the single one
    on, strong = (draw(CAPTIONS, _keys(5), guidance=scale) for scale in (1 + 1e-12, 3.0))
    np.testing.assert_array_equal(on, draw(CAPTIONS, _keys(5)))
    assert (on != strong).any()


def test_callers_arrays_are_left_alone():
    text, prompt = CAPTIONS.copy(), np.arange(45).reshape(5, 3, 3) % 7
    before = text.copy(), prompt.copy()
    draw(text, _keys(5), guidance=2.5, prompt_codes=prompt, keep_rows=1)
    np.testing.assert_array_equal(text, before[0])
    np.testing.assert_array_equal(prompt, before[1])


def test_same_key_samples_the_same_image_in_any_batch_and_row():
    keys = _keys(5)
    batch = draw(CAPTIONS, keys)
    np.testing.assert_array_equal(draw(CAPTIONS[3:4], keys[3:4])[0], batch[3])
    order = np.array([4, 3, 2, 1, 0])
    np.testing.assert_array_equal(draw(CAPTIONS[order], keys[order]), batch[order])
    assert (draw(CAPTIONS, _keys(5, seed=1)) != batch).any()


def test_samples_that_share_a_caption_equal_those_sampled_with_a_caption_each():
    keys = _keys(15)
    shared = draw(CAPTIONS, keys, guidance=2.5)
    np.testing.assert_array_equal(shared, draw(CAPTIONS.repeat(3, 0), keys, guidance=2.5))
    assert len(np.unique(shared[:3].reshape(3, -1), axis=0)) == 3


def test_the_first_code_is_sampled_with_the_probability_of_the_prior():
    number = 4000
    logits = _full_forward(CAPTIONS[:1], np.zeros((1, 9), int))[0, 0]
    first = draw(CAPTIONS[:1], _keys(number), temperature=0.5)[:, 0, 0]
    got = np.bincount(first, minlength=7) / number
    expected = np.asarray(jax.nn.softmax(logits / 0.5))
    assert np.abs(got - expected).max() < 4 * math.sqrt(0.25 / number)  # four standard errors


def test_filters_apply_after_the_temperature():
    number = 200
    logits = np.asarray(_full_forward(CAPTIONS[:1], np.zeros((1, 9), int))[0, 0])
    likeliest = np.argsort(-logits)

    def drawn(**options):
        return set(np.asarray(draw(CAPTIONS[:1], _keys(number), **options)[:, 0, 0]).tolist())

    assert drawn(top_k=2, temperature=5) == set(likeliest[:2].tolist())
    assert drawn(top_k=7, temperature=50) == set(range(7))
    # flattened by the temperature, 0.5 of the probability needs more codes than before
    share = np.sort(np.asarray(jax.nn.softmax(logits / 50)))[::-1]
    needed = int(np.searchsorted(np.cumsum(share), 0.5)) + 1
    assert needed == 4
    assert drawn(top_p=0.5, temperature=50) == set(likeliest[:needed].tolist())


def test_top_k_of_one_and_tiny_temperature_are_greedy():
    greedy = draw(CAPTIONS, _keys(5), temperature=0)
    np.testing.assert_array_equal(draw(CAPTIONS, _keys(5), top_k=1), greedy)
    np.testing.assert_array_equal(draw(CAPTIONS, _keys(5), temperature=1e-38), greedy)


@pytest.mark.parametrize("rows", [0, 1, 2, 3])
def test_kept_rows_are_copied_and_the_rest_follows_from_them(rows):
    prompt = np.random.default_rng(1).integers(7, size=(5, 3, 3))
    got = draw(CAPTIONS, _keys(5), temperature=0, prompt_codes=prompt, keep_rows=rows)
    np.testing.assert_array_equal(got[:, :rows], prompt[:, :rows])
    best = jnp.argmax(_full_forward(CAPTIONS, np.asarray(got).reshape(5, 9)), -1).reshape(5, 3, 3)
    np.testing.assert_array_equal(got[:, rows:], best[:, rows:])


def test_new_values_do_not_compile_again():
    prompt = np.ones((5, 3, 3), int)
    draw(CAPTIONS, _keys(5), temperature=1.0)
    draw(CAPTIONS, _keys(5), guidance=2.0)
    before = autoregressive_sampler._sample_rows._cache_size()
    draw(CAPTIONS, _keys(5, seed=3), temperature=0, prompt_codes=prompt, keep_rows=2)
    draw(CAPTIONS, _keys(5), temperature=0.3, guidance=4.0)
    assert autoregressive_sampler._sample_rows._cache_size() == before


def test_codes_are_int32_within_the_codebook():
    codes = draw(CAPTIONS, _keys(5), temperature=1)
    chex.assert_shape(codes, (5, 3, 3))
    assert codes.dtype == jnp.int32
    assert 0 <= codes.min() <= codes.max() < 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 8}, r"top_k is 8, but must lie in 1\.\.7, the size of the codebook"),
        ({"keep_rows": 1}, "keep_rows is 1, but there is no image to keep rows of"),
        ({"keep_rows": 4}, r"keep_rows is 4, but must lie in 0\.\.3, the rows of the grid"),
        ({"keep_rows": -1}, r"keep_rows is -1, but must lie in 0\.\.3"),
        (
            {"prompt_codes": np.zeros((5, 2, 2), int), "keep_rows": 1},
            r"prompt_codes have shape \(5, 2, 2\), but 5 images on grid 3 need \(5, 3, 3\)",
        ),
        (
            {"prompt_codes": np.full((5, 3, 3), 7), "keep_rows": 1},
            r"prompt_codes lie in 7\.\.7, but the codebook has 0\.\.6; were they made by another",
        ),
    ],
)
def test_bad_options_say_what_is_allowed(options, message):
    with pytest.raises(ValueError, match=message):
        draw(CAPTIONS, _keys(5), **options)


def test_wrong_caption_length_says_what_the_config_needs():
    with pytest.raises(ValueError, match="got 2 caption slots, but text_length 4 needs 3"):
        draw(CAPTIONS[:, :2], _keys(5))


def test_keys_must_be_typed_and_one_an_image():
    # the shape checker would refuse them first
    unchecked = getattr(sample_rows, "__wrapped__", sample_rows)
    with pytest.raises(
        ValueError, match=r"got 5 captions and keys of shape \(4,\); give one key per image"
    ):
        next(unchecked(TINY, PARAMETERS, CAPTIONS, _keys(4)))
    with pytest.raises(ValueError, match=r"keys have dtype uint32, but must come from jax.random"):
        next(unchecked(TINY, PARAMETERS, CAPTIONS, jax.random.key_data(_keys(5))))


def test_grid_of_one_and_one_layer_samples():
    config = dataclasses.replace(TINY, depth=1, grid=1)
    cut = jax.tree.map(lambda x: x[:1], PARAMETERS["layers"])
    codes = sample(config, PARAMETERS | {"layers": cut, "embed": _cut_grid()}, EMPTY, _keys(1))
    chex.assert_shape(codes, (1, 1, 1))


def _cut_grid():
    embed = PARAMETERS["embed"]
    return embed | {"row": embed["row"][:1], "column": embed["column"][:1]}
