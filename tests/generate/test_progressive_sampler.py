import itertools
from functools import cache, partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax.generate import progressive_sampler
from dalle_jax.generate.progressive_sampler import cells_filled, sample
from dalle_jax.generate.sampling import SamplingConfig
from dalle_jax.models.progressive_prior import ProgressiveConfig, ProgressivePrior, init_params

CONFIG = ProgressiveConfig(
    width=16, depth=2, query_depth=1, heads=2, text_vocabulary=11, text_length=4, grid=4, codes=6
)
K = CONFIG.codes
TEXT = np.asarray([[1, 2, 13], [7, 12, 13]])


@cache
def params():
    init = jax.eval_shape(partial(init_params, CONFIG), jax.random.key(0))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.normal(0, 0.5, x.shape).astype(np.float32), init)


def draw(seed=0, text=TEXT, samples=2, stages=4, known=None, **options):
    keys = jax.random.split(jax.random.key(seed), samples * len(text))
    sampling = SamplingConfig(stages=stages, **options)
    return np.asarray(sample(CONFIG, params(), text, keys, sampling=sampling, known=known))


@cache
def forward():
    apply = jax.jit(
        lambda params, *inputs: ProgressivePrior(CONFIG).apply({"params": params}, *inputs)
    )
    return partial(apply, params())


def first_look():
    """Logits of both captions with no cell filled."""
    zeros = jnp.zeros((2, 16), int)
    return np.asarray(forward()(jnp.asarray(TEXT), zeros, zeros))


@pytest.mark.parametrize(
    ("stages", "left"),
    [
        (12, [253, 247, 236, 221, 203, 181, 155, 127, 97, 66, 33, 0]),
        (8, [251, 236, 212, 181, 142, 97, 49, 0]),
    ],
)
def test_the_cosine_schedule_has_maskgits_published_counts(stages, left):
    # but for their last 1, which is filled before the result is read
    assert (256 - cells_filled(256, stages, "cosine")).tolist() == left


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize(("cells", "stages"), [(256, 16), (10, 4), (7, 7), (5, 1), (64, 60)])
def test_every_stage_fills_a_cell_and_the_last_one_all(cells, stages, schedule):
    after = cells_filled(cells, stages, schedule)
    assert len(after) == stages
    assert after[-1] == cells
    assert (np.diff(after, prepend=0) >= 1).all()


def test_the_linear_schedule_fills_the_same_number_each_time():
    assert cells_filled(256, 16, "linear").tolist() == list(range(16, 257, 16))


def test_more_stages_than_cells_are_refused():
    with pytest.raises(ValueError, match=r"stages is 17, but must lie in 1\.\.16, the cells"):
        draw(stages=17)


ORDERS = ["dynamic", "confidence", "random", "raster"]


def test_new_values_and_another_order_do_not_compile_the_stages_again():
    draw(order="raster")
    before = progressive_sampler._sample_span._cache_size()
    draw(order="random", temperature=0.5, choice_temperature=2.0)
    draw(order="dynamic", seed=1)
    assert progressive_sampler._sample_span._cache_size() == before


@pytest.mark.parametrize("order", ORDERS)
def test_stages_fill_as_planned_and_keep_what_they_filled(order):
    grids = draw(order=order)
    chex.assert_shape(grids, (4, 4, 4, 4))
    counts = (grids < K).sum((2, 3))
    assert (counts == cells_filled(16, 4, "cosine")[:, None]).all()
    for before, after in itertools.pairwise(grids):
        assert (after == before)[before < K].all()


def test_given_cells_never_change_and_none_stays_empty():
    known = np.full((4, 4, 4), K)
    known[:, :2] = np.random.default_rng(0).integers(K, size=(4, 2, 4))
    grids = draw(known=known, stages=3)
    assert (grids[:, :, :2] == known[:, :2]).all()
    assert (grids[-1] < K).all()
    assert ((grids < K).sum((2, 3)) == 8 + cells_filled(8, 3, "cosine")[:, None]).all()


def test_each_image_may_be_given_other_cells_but_as_many():
    known = np.full((4, 4, 4), K)
    for j in range(4):
        known[j, j, :] = j
    grids = draw(known=known, stages=3)
    assert (grids[-1] < K).all()
    assert all((grids[:, j, j] == j).all() for j in range(4))
    known[0, 1, 0] = 1
    with pytest.raises(ValueError, match="with 6 in the cells to sample, the same number in each"):
        draw(known=known)


@pytest.mark.parametrize("order", ORDERS)
def test_one_stage_at_temperature_0_takes_the_likeliest_code_of_each_cell(order):
    grids = draw(samples=1, stages=1, temperature=0, order=order)
    np.testing.assert_array_equal(grids[-1].reshape(2, 16), first_look().argmax(-1))


def greedy_by_forward_pass(grids, known=None):
    """What temperature 0 takes in the stages that `grids` [stages, B, I] shows."""
    known = np.full(grids.shape[1:], K) if known is None else known
    stage = np.where(known < K, 0, (grids == K).sum(0) + 1)
    logits = forward()(jnp.asarray(TEXT), jnp.asarray(grids[-1]), jnp.asarray(stage))
    return np.where(known < K, known, np.asarray(logits).argmax(-1))


@pytest.mark.parametrize("stages", [2, 4, 11])
@pytest.mark.parametrize("order", ORDERS)
def test_sampling_in_stages_takes_what_the_forward_pass_predicts(order, stages):
    grids = draw(samples=1, temperature=0, order=order, stages=stages).reshape(stages, 2, 16)
    np.testing.assert_array_equal(grids[-1], greedy_by_forward_pass(grids))


def test_given_cells_are_a_stage_before_all_others():
    known = np.full((2, 4, 4), K)
    known[:, :2] = np.random.default_rng(0).integers(K, size=(2, 2, 4))
    grids = draw(samples=1, temperature=0, known=known, stages=3).reshape(3, 2, 16)
    np.testing.assert_array_equal(grids[-1], greedy_by_forward_pass(grids, known.reshape(2, 16)))


def test_the_dynamic_order_begins_where_the_caption_alone_says_most():
    log_p = jax.nn.log_softmax(first_look())
    entropy = np.asarray(-(jnp.exp(log_p) * log_p).sum(-1))
    options = {"samples": 1, "choice_temperature": 0, "schedule": "linear"}
    first = draw(order="dynamic", **options)[0].reshape(2, 16)
    for grid, score in zip(first, entropy, strict=True):
        assert set(np.flatnonzero(grid < K)) == set(np.argsort(score)[:4].tolist())


def test_confidence_begins_with_the_likeliest_codes():
    ready = np.asarray(jax.nn.log_softmax(first_look()).max(-1))
    options = {"samples": 1, "temperature": 0, "choice_temperature": 0, "schedule": "linear"}
    first = draw(order="confidence", **options)[0].reshape(2, 16)
    for grid, score in zip(first, ready, strict=True):
        assert set(np.flatnonzero(grid < K)) == set(np.argsort(-score)[:4].tolist())


def test_raster_goes_row_by_row_and_random_otherwise_for_each_image():
    counts = np.arange(1, 5)[:, None] * 4
    raster = draw(order="raster", schedule="linear").reshape(4, 4, 16)
    assert ((raster < K) == (np.arange(16) < counts[..., None])).all()
    places = draw(order="random")[0].reshape(4, 16) < K
    assert len(np.unique(places, axis=0)) > 1


def test_an_image_depends_on_its_key_and_caption_alone():
    keys = jax.random.split(jax.random.key(3), 4)
    four = SamplingConfig(stages=4)
    together = sample(CONFIG, params(), TEXT, keys, sampling=four)
    alone = sample(CONFIG, params(), TEXT[1:], keys[3:], sampling=four)
    chex.assert_trees_all_equal(alone, together[:, 3:])
    other_keys = jax.random.split(jax.random.key(4), 4)
    other = sample(CONFIG, params(), TEXT, other_keys, sampling=four)
    assert (np.asarray(other[-1]) != np.asarray(together[-1])).any()


def test_guidance_rises_along_a_line_to_its_full_value():
    grids = draw(samples=1, temperature=0, stages=4, guidance=3.0).reshape(4, 2, 16)
    stage = (grids == K).sum(0)
    empty = jnp.asarray(11 + np.arange(3))[None].repeat(2, axis=0)
    inputs = jnp.asarray(grids[-1]), jnp.asarray(stage)
    with_caption, without = (forward()(text, *inputs) for text in (jnp.asarray(TEXT), empty))
    scale = 1 + 2 * (stage + 1)[..., None] / 4
    guided = without + scale * (with_caption - without)
    np.testing.assert_array_equal(grids[-1], np.asarray(guided).argmax(-1))


def test_revision_replaces_codes_that_the_others_give_less_than_a_quarter_of_the_best():
    known = np.full((2, 4, 4), K)
    known[:, 0] = 1
    grids = draw(samples=1, stages=3, known=known, revise=2)
    assert grids.shape[0] == 5

    @jax.jit
    def look(params, text, codes):
        prior = ProgressivePrior(CONFIG).bind({"params": params})
        return prior.predict_left_out(prior.prefill(text), codes)

    replaced = 0
    for before, after in itertools.pairwise(grids[2:]):
        codes = before.reshape(2, 16)
        log_p = np.asarray(jax.nn.log_softmax(look(params(), jnp.asarray(TEXT), codes)))
        there = np.take_along_axis(log_p, codes[..., None], -1)[..., 0]
        unlikely = np.exp(there) * 4 < np.exp(log_p.max(-1))
        unlikely &= known.reshape(2, 16) == K
        wanted = np.where(unlikely, log_p.argmax(-1), codes)
        np.testing.assert_array_equal(after.reshape(2, 16), wanted)
        replaced += unlikely.sum()
        assert (unlikely != (codes != log_p.argmax(-1))).any()  # some only a little less likely
    assert replaced


def test_guidance_moves_codes_and_none_of_an_empty_caption():
    assert (draw(guidance=3.0) != draw()).any()
    empty = (11 + np.arange(3))[None].repeat(2, axis=0)
    plain, guided = (draw(text=empty, guidance=g) for g in (1.0, 3.0))
    chex.assert_trees_all_equal(plain, guided)


def test_stages_are_16_unless_fewer_cells_are_empty():
    known = np.full((4, 4, 4), K)
    known[:, :3] = 0
    assert [len(draw(stages=None)), len(draw(stages=None, known=known))] == [16, 4]


def test_a_top_k_above_the_codebook_is_refused():
    with pytest.raises(ValueError, match=r"top_k is 7, but must lie in 1\.\.6"):
        draw(top_k=7)


def test_kernels_of_bfloat16_are_multiplied_in_bfloat16():
    def sampled(params, keys):
        return sample(CONFIG, params, TEXT, keys, sampling=SamplingConfig(stages=2))

    half = jax.tree_util.tree_map_with_path(
        lambda path, x: x.astype(jnp.bfloat16) if path[-1].key == "kernel" else x,
        {"layers": params()["layers"]},
    )
    text = jax.jit(sampled).lower(params() | half, jax.random.split(jax.random.key(0), 2)).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    heads = [line for line in products if f"x{K}xf32>" in line]
    assert heads
    assert all("xbf16>" in line for line in products if line not in heads)
