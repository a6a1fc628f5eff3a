"""Sizes and steps follow the number and size of the images."""

import dataclasses

import pytest
import tiny

from dalle_jax.errors import UserError
from dalle_jax.planner.recipe import choose_recipe, with_text_length

TABLE = [  # images, short side: px, grid, codes, width of the prior, CLIP, steps of the codec
    (100, 500, 64, 8, 512, 128, False, 1500),
    (746, 111, 64, 8, 512, 128, True, 1500),
    (1999, 500, 64, 8, 1024, 128, True, 1999),
    (6750, 500, 96, 12, 1024, 192, True, 6750),
    (6750, 80, 64, 8, 1024, 192, True, 6750),
    (30_000, 500, 128, 16, 1024, 256, True, 30_000),
    (6750, 20, 32, 8, 1024, 192, True, 6750),
]


@pytest.mark.parametrize(("images", "side", "px", "grid", "codes", "width", "clip", "steps"), TABLE)
def test_sizes_and_steps_are_those_of_the_table(
    images, side, px, grid, codes, width, clip, steps, monkeypatch
):
    monkeypatch.setattr("jax.device_count", lambda: 1)
    recipe = choose_recipe(images, side)
    prior = recipe.prior.model
    assert (recipe.codec.px, recipe.codec.px // recipe.codec.model.factor) == (px, grid)
    assert (prior.grid, prior.codes, prior.width) == (grid, codes, width)
    assert recipe.codec.model.codes == codes
    assert (recipe.clip is not None) == clip
    assert recipe.codec.loop.steps == steps
    assert recipe.prior.loop.steps == max(1500, -(-17 * images // 8))


def test_a_batch_can_be_spread_over_the_devices_there_are(monkeypatch):
    monkeypatch.setattr("jax.device_count", lambda: 3)
    recipe = choose_recipe(746, 111)
    assert [run.batch_size for _, run in recipe.stages()] == [9, 9, 129]


def test_px_is_the_users_choice_within_what_the_codec_can_do():
    assert choose_recipe(100, 500, px=96).prior.model.grid == 12
    with pytest.raises(UserError, match="--px is 70, but has to be a multiple of 8"):
        choose_recipe(100, 500, px=70)


def test_text_positions_hold_the_start_the_longest_captions_and_no_more_than_128():
    recipe = choose_recipe(746, 111)
    lengths = {tokens: with_text_length(recipe, tokens) for tokens in (5, 22, 23, 500)}
    assert {n: r.prior.model.text_length for n, r in lengths.items()} == {
        5: 24,
        22: 24,
        23: 32,
        500: 128,
    }
    assert lengths[23].clip.model.text_length == 32


def test_a_model_that_goes_on_keeps_its_sizes_and_codec():
    model = tiny.model(**tiny.progressive_parts())
    recipe = choose_recipe(100, 500, model=model)
    assert (recipe.codec, recipe.prior_stage) == (None, "progressive")
    assert recipe.prior.model == tiny.progressive_parts()["progressive"]
    assert recipe.prior.loop.steps == 300
    assert choose_recipe(800, 500, model=model).prior.loop.steps == 600
    assert recipe.prior.learning_rate < choose_recipe(100, 500).prior.learning_rate
    autoregressive = choose_recipe(100, 500, model=tiny.model())
    assert autoregressive.prior_stage == "prior"
    assert autoregressive.prior.model == tiny.parts()["prior"]


def test_a_model_that_cannot_go_on_is_refused():
    with pytest.raises(UserError, match="tiny has no prior that training can go on from"):
        choose_recipe(100, 500, model=tiny.model(prior=None, prior_params=None, tokenizer=None))
    with pytest.raises(UserError, match="--px is 64, but tiny makes images of 16 px"):
        choose_recipe(100, 500, px=64, model=tiny.model())


def test_other_steps_change_nothing_but_lengths_and_intervals():
    recipe = choose_recipe(746, 111)
    steps = {"vqgan": 900, "progressive": 800, "clip": 700}
    changed = recipe.with_steps(steps)
    assert {name: run.loop.steps for name, run in changed.stages()} == steps
    for (_, before), (_, after) in zip(recipe.stages(), changed.stages(), strict=True):
        assert dataclasses.replace(after, loop=before.loop) == before
        assert (after.loop.ema_every, after.loop.ema_decay) == (5, 0.95)  # must not change
