import itertools
from functools import cache, partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax.generate.progressive import filled, sample
from dalle_jax.models.prior_parts import PriorConfig
from dalle_jax.models.transformer import Prior, draw_params

CONFIG = PriorConfig(
    width=16, depth=2, heads=2, text_vocabulary=11, text_length=4, grid=4, codes=6,
    style="progressive",
)  # fmt: skip
K = CONFIG.codes
TEXT = np.asarray([[1, 2, 13], [7, 12, 13]])


@cache
def params():
    init = jax.eval_shape(partial(draw_params, CONFIG), jax.random.key(0))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.normal(0, 0.5, x.shape).astype(np.float32), init)


def draw(seed=0, text=TEXT, samples=2, stages=4, **options):
    keys = jax.random.split(jax.random.key(seed), samples * len(text))
    found = sample(CONFIG, params(), text, keys, stages=stages, **options)
    return jax.tree.map(np.asarray, found)


@cache
def first_look():
    """Logits of both captions with no cell filled."""
    text, empty = jnp.asarray(TEXT), jnp.full((2, 16), K)
    return jax.jit(lambda p: Prior(CONFIG).apply({"params": p}, text, empty, method="predict"))(
        params()
    )


@pytest.mark.parametrize(
    ("stages", "left"),
    [
        (12, [253, 247, 236, 221, 203, 181, 155, 127, 97, 66, 33, 0]),
        (8, [251, 236, 212, 181, 142, 97, 49, 0]),
    ],
)
def test_the_cosine_schedule_has_maskgits_published_counts(stages, left):
    # but for their last 1, which is filled before the result is read
    assert (256 - filled(256, stages, "cosine")).tolist() == left


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize(("cells", "stages"), [(256, 16), (10, 4), (7, 7), (5, 1), (64, 60)])
def test_every_stage_fills_a_cell_and_the_last_one_all(cells, stages, schedule):
    after = filled(cells, stages, schedule)
    assert len(after) == stages
    assert after[-1] == cells
    assert (np.diff(after, prepend=0) >= 1).all()


def test_the_linear_schedule_fills_the_same_number_each_time():
    assert filled(256, 16, "linear").tolist() == list(range(16, 257, 16))


def test_more_stages_than_cells_are_refused():
    with pytest.raises(ValueError, match=r"stages is 17, but must lie in 1\.\.16, the cells"):
        draw(stages=17)


def test_stages_fill_as_planned_and_keep_what_they_filled_without_revision():
    cells = draw(revise=0).cells
    chex.assert_shape(cells, (4, 4, 4, 4))
    counts = (cells < K).sum((2, 3))
    assert (counts == filled(16, 4, "cosine")[:, None]).all()
    for before, after in itertools.pairwise(cells):
        assert (after == before)[before < K].all()


def test_revision_changes_filled_cells_alone_and_as_many_as_allowed():
    found = draw(revise=0.5, extra=1)
    assert len(found.cells) == 5
    assert not found.revised[0].any()
    assert found.revised[1:].any()
    before = np.concatenate([[0], filled(16, 4, "cosine"), [16]])[:5]
    allowed = np.floor([0.5 * (1 - k / 4) * n for k, n in enumerate(before[:4], 1)] + [0.5 * 16])
    assert (found.revised.sum((2, 3)) <= allowed[:, None]).all()
    for earlier, later, revised in zip(
        found.cells[:-1], found.cells[1:], found.revised[1:], strict=True
    ):
        changed = (earlier < K) & (earlier != later)
        assert (changed == revised).all()
    assert (found.cells[-1] < K).all()


def test_given_cells_never_change_and_none_stays_empty():
    given = np.full((4, 4, 4), K)
    given[:, :2] = np.random.default_rng(0).integers(K, size=(4, 2, 4))
    found = draw(given=given, stages=3, revise=1, extra=2)
    assert (found.cells[:, :, :2] == given[:, :2]).all()
    assert (found.cells[-1] < K).all()
    assert ((found.cells < K).sum((2, 3))[:3] == 8 + filled(8, 3, "cosine")[:, None]).all()


def test_each_picture_may_be_given_other_cells_but_as_many():
    given = np.full((4, 4, 4), K)
    for j in range(4):
        given[j, j, :] = j
    found = draw(given=given, stages=3)
    assert (found.cells[-1] < K).all()
    assert all((found.cells[:, j, j] == j).all() for j in range(4))
    given[0, 1, 0] = 1
    with pytest.raises(ValueError, match="with 6 in the cells to be drawn, as many in each"):
        draw(given=given)


def test_one_stage_at_temperature_0_takes_the_likeliest_code_of_each_cell():
    empty = jnp.full((2, 16), K)
    apply = jax.jit(
        lambda p: Prior(CONFIG).apply({"params": p}, jnp.asarray(TEXT), empty, method="predict")
    )
    wanted = apply(params())[0].argmax(-1)
    drawn = draw(samples=1, stages=1, temperature=0).cells[-1]
    np.testing.assert_array_equal(drawn.reshape(2, 16), wanted)


def test_the_readiest_cells_are_filled_first():
    empty = jnp.full((2, 16), K)
    apply = jax.jit(
        lambda p: Prior(CONFIG).apply({"params": p}, jnp.asarray(TEXT), empty, method="predict")
    )
    logits, fill = apply(params())
    ready = jax.nn.log_sigmoid(fill) + jax.nn.log_softmax(logits).max(-1)
    first = draw(samples=1, temperature=0, choice_temperature=0, schedule="linear").cells[0]
    for picture, score in zip(first.reshape(2, 16), ready, strict=True):
        assert set(np.flatnonzero(picture < K)) == set(np.argsort(-score)[:4].tolist())


def test_a_picture_depends_on_its_key_and_caption_alone():
    keys = jax.random.split(jax.random.key(3), 4)
    together = sample(CONFIG, params(), TEXT, keys, stages=4)
    alone = sample(CONFIG, params(), TEXT[1:], keys[3:], stages=4)
    chex.assert_trees_all_equal(alone, jax.tree.map(lambda x: x[:, 3:], together))
    other = sample(CONFIG, params(), TEXT, jax.random.split(jax.random.key(4), 4), stages=4)
    assert (np.asarray(other.cells[-1]) != np.asarray(together.cells[-1])).any()


def test_guidance_moves_codes_and_none_of_an_empty_caption():
    assert (draw(guidance=3.0).cells != draw().cells).any()
    empty = (11 + np.arange(3))[None].repeat(2, axis=0)
    plain, guided = (draw(text=empty, guidance=g) for g in (1.0, 3.0))
    chex.assert_trees_all_equal(plain, guided)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"revise": 1.5}, r"revise is 1.5, but must lie in \[0, 1\]"),
        ({"choice_temperature": -1.0}, "choice_temperature is -1.0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"top_k": 7}, r"top_k is 7, but must lie in 1\.\.6"),
    ],
)
def test_bad_options_say_what_is_allowed(options, message):
    with pytest.raises(ValueError, match=message):
        draw(**options)
