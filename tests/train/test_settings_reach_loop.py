"""Every field of LoopConfig, PowerSGDConfig and ScaleConfig changes what a run does or leaves."""

import dataclasses
import functools
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec
from saved import ema_params

from dalle_jax.parallel import powersgd
from dalle_jax.parallel.mesh import MeshConfig
from dalle_jax.parallel.powersgd import PowerSGDConfig
from dalle_jax.precision import grad_scale
from dalle_jax.precision.grad_scale import ScaleConfig
from dalle_jax.train import loop
from dalle_jax.train.checkpoint import Checkpoints
from dalle_jax.train.log import read_metrics
from dalle_jax.train.loop import LoopConfig
from dalle_jax.train.stage import Stage

LOOP = LoopConfig(
    steps=6,
    log_every=2,
    save_every=2,
    evaluate_every=2,
    sheet_every=2,
    max_to_keep=2,
    ema_decay=0.5,
)
# Another value of each field, and what of the run differs then: that, and nothing else of it.
CHANGES = {
    "steps": (4, {"parameters", "ema", "logged", "measured", "saved", "sheets"}),
    "log_every": (3, {"logged"}),
    "save_every": (1, {"saved"}),
    "evaluate_every": (3, {"measured"}),
    "sheet_every": (None, {"sheets"}),
    "max_to_keep": (3, {"saved"}),
    "accumulation_steps": (2, {"parameters", "ema"}),
    "ema_every": (4, {"ema"}),
    "ema_decay": (0.75, {"ema"}),
    "seed": (1, {"parameters", "ema"}),
}


class Slope(Stage):
    """One number that falls by a tenth of the batch's mean and of noise."""

    name = "slope"
    rules = (("*", PartitionSpec()),)
    optimizer = optax.with_extra_args_support(optax.sgd(0.1))

    def init(self, key):
        return {"x": jax.random.normal(key)}

    def loss(self, params, batch, key, step):
        return params["x"] * (batch["y"].mean() + jax.random.normal(key)), {}

    def evaluate(self, params):
        return params

    def sheet(self, params):
        return np.zeros((2, 3, 3), np.uint8)


class Numbers:
    """Batches that count up."""

    def __init__(self):
        self._numbers = itertools.count()

    def __next__(self):
        return {"y": np.full(4, next(self._numbers), np.float32)}

    def get_state(self):
        return {}

    def set_state(self, state):
        pass


def trained(folder, config):
    """What there is to see of a run."""
    state = loop.train(Slope(), Numbers(), config=config, workdir=folder, settings={})
    lines = read_metrics(folder / "metrics.jsonl")
    ema = float(state.ema_params["x"])
    assert float(ema_params(folder / "checkpoints")["x"]) == ema
    assert [line["eval/x"] for line in lines if "eval/x" in line][-1] == pytest.approx(ema)
    return {
        "parameters": float(state.params["x"]),
        "ema": ema,
        "logged": [line["step"] for line in lines if "loss" in line],
        "measured": [line["step"] for line in lines if "eval/x" in line],
        "saved": Checkpoints(folder / "checkpoints").steps(),
        "sheets": len(list(folder.glob("sheets/*"))),
    }


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("usual"), LOOP)


def test_every_field_of_the_loop_is_changed_here():
    fields = {field.name for field in dataclasses.fields(LoopConfig)}
    # mesh and powersgd: the test after the next; ema_on_host: tests/train/test_loop.py
    assert fields == CHANGES.keys() | {"mesh", "powersgd", "ema_on_host"}


@pytest.mark.parametrize("field", CHANGES)
def test_a_setting_of_the_loop_changes_what_it_names_and_nothing_else(field, usual, tmp_path):
    value, expected = CHANGES[field]
    found = trained(tmp_path, dataclasses.replace(LOOP, **{field: value}))
    assert {name for name in usual if found[name] != usual[name]} == expected


@pytest.mark.parametrize(
    ("place", "config"),
    [
        ("make_mesh", LoopConfig(steps=1, mesh=MeshConfig(fsdp=2))),
        ("PowerSGDGroups", LoopConfig(steps=1, powersgd=PowerSGDConfig(rank=3))),
    ],
)
def test_mesh_and_groups_are_made_as_the_loops_settings_say(place, config, tmp_path, monkeypatch):
    class Reached(Exception):
        pass

    def made(given, *_):
        assert given == (config.mesh if place == "make_mesh" else config.powersgd)
        raise Reached

    monkeypatch.setattr(loop, place, made)
    with pytest.raises(Reached):
        loop.train(Slope(), Numbers(), config=config, workdir=tmp_path, settings={})


# Compression of gradients, and scales of float16


@functools.cache
def compressed(config):
    """What PowerSGD makes of the gradients of two members."""
    kernel = np.random.default_rng(0).normal(size=(2, 1, 4, 6)).astype(np.float32)
    grads = {"layers": {"mlp_in": {"kernel": jnp.asarray(kernel)}}}
    one = jax.tree.map(lambda x: x[0], grads)
    state = powersgd.init(one, config=config)
    reduce = partial(powersgd.reduce, config=config, axis_name="data")
    reduce = jax.jit(jax.vmap(reduce, in_axes=(0, None), axis_name="data"))
    means, state, *_ = reduce(grads, state)
    return [x.tolist() for x in jax.tree.leaves((means, state))]


POWERSGD = PowerSGDConfig(rank=2, low_precision=True)


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(PowerSGDConfig)])
def test_every_setting_of_powersgd_changes_the_mean_gradient(field):
    other = {
        "rank": 1,
        "epsilon": 0.5,
        "seed": 1,
        "warm_start": True,
        "low_precision": False,
        "p_scale": 0.3,
        "q_scale": 0.3,
    }
    changed = dataclasses.replace(POWERSGD, **{field: other[field]})
    assert compressed(POWERSGD) != compressed(changed)


def scales(config):
    """The scales of two resblocks, of which one overflows now and then."""
    state, found = grad_scale.create(config, (2,), replicas=1), []
    for overflows in (1, 0, 1, 0, 0, 1, 1, 1, 1, 1, 0, 0):
        finite = jnp.array([True, not overflows])
        state = grad_scale.update(state, finite, config=config, replicas=1)
        found.append(state.scale.tolist())
    return found


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(ScaleConfig)])
def test_every_setting_of_the_gradient_scales_changes_them(field):
    config = ScaleConfig(
        init_scale=8.0,
        growth_factor=1.5,
        backoff_factor=0.4,
        backoff_interval=1,
        min_scale=1.0,
        max_scale=64.0,
    )
    other = {
        "init_scale": 9.0,
        "growth_factor": 1.4,
        "backoff_factor": 0.5,
        "backoff_interval": 3,
        "min_scale": 3.0,
        "max_scale": 9.0,
    }
    assert scales(config) != scales(dataclasses.replace(config, **{field: other[field]}))
