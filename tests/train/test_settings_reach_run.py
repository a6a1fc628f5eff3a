"""Every setting of every stage changes what its row in tests/settings.py says."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import stages
from settings import ELSEWHERE, FIELDS, rows

from dalle_jax.train.state import init_state

STEP = 5  # in the middle of every schedule


def fields(run):
    own = {field.name for field in dataclasses.fields(run)} - {"model", "loop"}
    return own | {f"model.{field.name}" for field in dataclasses.fields(run.model)}


@pytest.mark.parametrize("name", stages.RUNS)
def test_every_field_has_a_row(name):
    elsewhere = {field for stage, field in ELSEWHERE if stage == name}
    assert fields(stages.RUNS[name]) == FIELDS[name].keys() | elsewhere
    assert {row[1] for row in FIELDS[name].values()} <= {"update", *SEEN}


@pytest.mark.parametrize("name", stages.RUNS)
def test_no_stage_begins_with_weak_types_for_which_its_step_would_compile_twice(name):
    stage = stages.stage(stages.RUNS[name])
    state = jax.eval_shape(lambda: init_state(stage, jax.random.key(0)))
    assert not [path for path, x in jax.tree.leaves_with_path(state) if x.weak_type]


# Where a setting shows


@functools.cache
def params(kind):
    """Shapes of the parameters, which are those of every run whose change shows in the loss."""
    (run,) = (run for run in stages.RUNS.values() if type(run) is kind)
    return jax.eval_shape(stages.stage(run).init, jax.random.key(0))


def graph(run):
    """The loss as a computation: all shapes, types, operations and constants."""
    loss, batch = stages.stage(run).loss, stages.batch(run)
    found = jax.make_jaxpr(loss)(params(type(run)), batch, jax.random.key(2), jnp.int32(STEP))
    return str(found), [np.asarray(x).tobytes() for x in found.consts]


def shapes(run):
    found = jax.eval_shape(stages.stage(run).init, jax.random.key(0))
    return {jax.tree_util.keystr(path): x.shape for path, x in jax.tree.leaves_with_path(found)}


def init(run):
    """How the parameters are drawn, as a computation."""
    return str(jax.make_jaxpr(stages.stage(run).init)(jax.random.key(0)))


def start(run):
    """The parameters that a run starts from."""
    rng, shapes = np.random.default_rng(0), params(type(run))
    some = jax.tree.map(lambda x: rng.normal(0, 0.5, x.shape).astype(x.dtype), shapes)
    return jax.tree.leaves(stages.stage(run).init_from_data(some))


def batches(run):
    """What an experiment asks the data for."""
    return stages.experiment_of(run, train_too=False).batches


SEEN = {"graph": graph, "shapes": shapes, "init": init, "start": start, "batches": batches}


@functools.cache
def before(name, where):
    return SEEN[where](stages.RUNS[name])


@pytest.mark.parametrize(("name", "field", "value", "where"), rows(*SEEN))
def test_a_setting_shows_where_its_row_says(name, field, value, where):
    run = stages.changed(stages.RUNS[name], field, value)
    first, second = before(name, where), SEEN[where](run)
    with pytest.raises(AssertionError):
        np.testing.assert_equal(first, second)
