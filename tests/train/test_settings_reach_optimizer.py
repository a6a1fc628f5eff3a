"""Each stage's optimizer moves numbers as its run says, update by update, written out in numpy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import stages
from settings import rows

PAPER = {  # what no setting changes: decays of both moments, and what is added to the root
    "dvae": (0.9, 0.999, 1e-8),
    "vqgan": (0.9, 0.999, 1e-8),
    "prior": (0.9, 0.96, 1e-8),
    "progressive": (0.9, 0.96, 1e-8),
    "clip": (0.9, 0.98, 1e-6),
}


def start():
    return {"layer": {"kernel": np.array([1.0, -2.0]), "bias": np.array([0.5, 3.0, -1.0])}}


def gradients():
    """Large ones that are clipped, and then small ones; one bias's are near epsilon."""
    rng = np.random.default_rng(0)
    found = []
    for size in [5.0] * 4 + [0.5] * 8:
        kernel, bias = size * rng.normal(size=2), size * rng.normal(size=3)
        found.append({"layer": {"kernel": kernel, "bias": bias * np.array([1.0, 1.0, 1e-6])}})
    return found


def moved(name, run):
    """What the stage's own optimizer makes of them: all parameters after each update."""
    optimizer = stages.stage(run).optimizer

    def shaped(tree):  # as the stage's parameters are
        tree = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)
        if name == "clip":
            return tree | {"log_scale": jnp.float32(0)}
        return {"network": tree, "judge": tree} if name == "vqgan" else tree

    params = shaped(start())
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    found = []
    for gradient in gradients():
        updates, state = update(shaped(gradient), state, params, value=jnp.float32(3))
        params = jax.tree.map(jnp.add, params, updates)
        if name == "vqgan":
            np.testing.assert_array_equal(*map(flat, (params["network"], params["judge"])))
        found.append(flat(params["network"] if name == "vqgan" else params))
    return np.stack(found)


def flat(tree):
    return np.concatenate([tree["layer"][part] for part in ("kernel", "bias")])


def written_out(name, run):
    b1, b2, epsilon = PAPER[name]
    is_kernel = np.array([1, 1, 0, 0, 0])
    p, m, v = flat(start()), np.zeros(5), np.zeros(5)
    found = []
    for t, gradient in enumerate(map(flat, gradients())):
        norm, most = np.linalg.norm(gradient), getattr(run, "grad_clip_norm", None)
        g = gradient * most / norm if most and norm > most else gradient
        m = b1 * m + (1 - b1) * g
        v = np.minimum(b2 * v + (1 - b2) * g**2, getattr(run, "max_second_moment", None) or np.inf)
        mean, variance = m / (1 - b1 ** (t + 1)), v / (1 - b2 ** (t + 1))
        direction = mean / (np.sqrt(variance) + epsilon) + run.weight_decay * is_kernel * p
        p = p - learning_rate(run, t) * direction
        found.append(p)
    return np.stack(found)


def learning_rate(run, t):
    """Of update t, counted from 0."""
    # the loss never falls: four spans after the first the rate is halved
    spans = (t + 1) // run.plateau_steps if getattr(run, "plateau_steps", None) else 0
    halved = 0.5 ** min(max(spans - 1, 0) // 4, 5)
    if t < run.warmup_steps:
        return halved * run.learning_rate * t / run.warmup_steps
    length = getattr(run, "learning_rate_steps", None) or run.loop.steps - run.warmup_steps
    share = min((t - run.warmup_steps) / length, 1)
    height = (1 + math.cos(math.pi * share)) / 2
    return halved * (run.learning_rate_end + (run.learning_rate - run.learning_rate_end) * height)


@pytest.mark.parametrize("name", stages.RUNS)
def test_updates_are_those_that_the_settings_write_out(name):
    run = stages.RUNS[name]
    np.testing.assert_allclose(moved(name, run), written_out(name, run), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "field", "value", "_"), rows("update"))
def test_a_changed_setting_changes_updates_as_written_out(name, field, value, _):
    run = stages.changed(stages.RUNS[name], field, value)
    expected = written_out(name, run)
    np.testing.assert_allclose(moved(name, run), expected, rtol=1e-4, atol=1e-5)
    assert np.abs(expected - written_out(name, stages.RUNS[name])).max() > 1e-3


def test_a_prior_without_an_end_stays_at_its_peak():
    run = stages.changed(stages.RUNS["prior"], "learning_rate_end", None)
    same = stages.changed(stages.RUNS["prior"], "learning_rate_end", run.learning_rate)
    np.testing.assert_allclose(moved("prior", run), written_out("prior", same), rtol=1e-4)
