"""Updates by groups with compressed gradients, on 8 devices in a process of their own.

Run as a script, it writes what they give.
"""

import dataclasses
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as Spec

from dalle_jax.models.layers import matrices
from dalle_jax.optim.muon import Muon
from dalle_jax.optim.optimizer import adamw
from dalle_jax.parallel import powersgd
from dalle_jax.parallel.mesh import MeshConfig, make_mesh, place_batch
from dalle_jax.parallel.powersgd import PowerSGDConfig
from dalle_jax.parallel.powersgd_groups import PowerSGDGroups
from dalle_jax.precision.grad_scale import ScaleState, leave
from dalle_jax.train import state as state_lib
from dalle_jax.train.checkpoint import Checkpoints
from dalle_jax.train.loop import LoopConfig, train
from dalle_jax.train.stage import Stage
from dalle_jax.train.train_step import make_train_step

L, D, F, B = 2, 4, 8, 16


class Scaling:
    """Starts at 8 for each layer, doubles where finite and halves where not."""

    def create(self):
        return ScaleState(scale=jnp.full((L,), 8.0), since=jnp.zeros(L, jnp.int32))

    def unscale(self, grads, state):
        kernel = grads["layers"]["mlp_in"]["kernel"]
        layers = {"mlp_in": {"kernel": kernel / state.scale[:, None, None]}}
        return grads | {"layers": layers}, jnp.isfinite(kernel).all(axis=(1, 2))

    def update(self, state, finite):
        return state.replace(scale=state.scale * jnp.where(finite, 2, 0.5))


class Layered(Stage):
    """Two kernels side by side, which Muon moves, and a head."""

    name = "layered"
    rules = (
        ("layers/mlp_in/kernel", Spec(None, None, "fsdp")),
        ("out", Spec()),
        ("scales/*", Spec()),
        ("muon/*/ns_coeffs", Spec()),
    )
    optimizer = adamw(
        optax.constant_schedule(1e-2),
        b2=0.999,
        weight_decay=1e-4,
        muon=Muon(scale=1.0, matrices=matrices),
    )
    scaling = Scaling()

    def init(self, key):
        key_in, key_out = jax.random.split(key)
        kernel = jax.random.normal(key_in, (L, D, F))
        return {
            "layers": {"mlp_in": {"kernel": kernel}},
            "out": jax.random.normal(key_out, (F,)),
        }

    def loss(self, params, batch, key, step, *, scales):
        kernel = params["layers"]["mlp_in"]["kernel"]
        hidden = sum(leave(jnp.tanh(batch["x"] @ kernel[i]), scales[i]) for i in range(L))
        error = hidden @ params["out"] - batch["y"]
        return jnp.mean(error**2), {"seen_scale": scales[0]}


class Data:
    def __init__(self):
        self.position = 0

    def __next__(self):
        self.position += 1
        return batch(self.position)

    def get_state(self):
        return {"position": self.position}

    def set_state(self, state):
        self.position = state["position"]


def batch(seed):
    rng = np.random.default_rng(seed)
    return {
        "x": rng.normal(size=(B, D)).astype(np.float32),
        "y": rng.normal(size=B).astype(np.float32),
    }


def begun(sizes, rank):
    mesh, stage = make_mesh(sizes), Layered()
    groups = PowerSGDGroups(PowerSGDConfig(rank=rank), mesh) if rank else None

    def create(key):
        return state_lib.init_state(stage, key, groups)

    key = jax.random.key(0)
    shardings = state_lib.state_shardings(jax.eval_shape(create, key), mesh, stage.rules, groups)
    return mesh, shardings, groups, jax.jit(create, out_shardings=shardings)(key)


def three_updates(sizes, rank=None, accumulation_steps=1):
    mesh, shardings, groups, state = begun(sizes, rank)
    options = {"shardings": shardings, "groups": groups, "accumulation_steps": accumulation_steps}
    update = make_train_step(Layered(), **options)
    for seed in range(3):
        state, metrics = update(state, place_batch(mesh, batch(seed)))
    return {"params": state.params, "metrics": metrics, "scale": state.scales.scale}


def broken():
    """Before and after an update in which one of four groups has no finite gradient."""
    mesh, shardings, groups, state = begun(MeshConfig(data=4, fsdp=2), 1)
    update = make_train_step(Layered(), shardings=shardings, groups=groups)
    state, _ = update(state, place_batch(mesh, batch(0)))
    before = jax.tree.map(np.asarray, dataclasses.replace(state, key=()))
    bad = batch(1)
    bad["x"][5] = np.inf  # seen by group 1
    bad["y"][5] = np.inf
    state, metrics = update(state, place_batch(mesh, bad))
    return {"before": before, "after": dataclasses.replace(state, key=()), "metrics": metrics}


def program():
    """All of an update that is compiled for 8 groups."""
    mesh, _, groups, state = begun(MeshConfig(), 1)
    with jax.set_mesh(mesh):
        update = make_train_step(Layered(), groups=groups)
        return update.lower(state, place_batch(mesh, batch(0))).compile().as_text()


def trained(folder, sizes, save_every=3, **powersgd_options):
    config = LoopConfig(
        steps=6,
        save_every=save_every,
        evaluate_every=None,
        sheet_every=None,
        mesh=sizes,
        powersgd=PowerSGDConfig(rank=1, **powersgd_options),
    )
    return train(Layered(), Data(), config=config, workdir=folder, settings={})


def continued(folder):
    """A run of four groups, and what it becomes from its middle: with as many, and with two."""
    four, two = MeshConfig(data=4, fsdp=2), MeshConfig(data=2, fsdp=4)
    unbroken = trained(folder / "four", four)
    often = trained(folder / "often", four, save_every=1)
    results = {"unbroken": unbroken.params, "often": often.params}
    for name, sizes in (("again", four), ("once more", four), ("two", two)):
        shutil.copytree(
            folder / "four" / "checkpoints" / "000003", folder / name / "checkpoints" / "000003"
        )
        results[name] = trained(folder / name, sizes).params
    _, shardings, groups, state = begun(two, 1)
    wanted = state_lib.checkpoint_shapes(jax.eval_shape(lambda: state), shardings, groups)
    with Checkpoints(folder / "four" / "checkpoints") as checkpoints:
        _, kept, *_ = checkpoints.restore(wanted)
    resumed = state_lib.from_checkpoint(kept, shardings, groups)
    chex.assert_trees_all_equal(resumed.powersgd.q, state.powersgd.q)
    jax.tree.map(lambda x, place: _check(x.sharding, place, x.ndim), resumed, shardings)
    small = trained(folder / "small", four, low_precision=True, warm_start=True)
    assert all(e.dtype == jnp.uint16 for e in jax.tree.leaves(small.powersgd.error))
    for name in ("small again", "small once more"):
        shutil.copytree(
            folder / "small" / "checkpoints" / "000003", folder / name / "checkpoints" / "000003"
        )
        again = trained(folder / name, four, low_precision=True, warm_start=True)
        results[name] = again.params
    results["small"] = small.params
    of_two, of_four = (jax.tree.map(np.asarray, s.powersgd.error) for s in (resumed, unbroken))
    return results | {"errors of two": of_two, "errors of four": of_four}


def _check(sharding, place, ndim):
    assert sharding.is_equivalent_to(place, ndim), (sharding, place)


def main(folder):
    results = {
        "plain": three_updates(MeshConfig()),
        "full rank": three_updates(MeshConfig(data=4, fsdp=2), D, accumulation_steps=2),
        "broken": broken(),
        "continued": continued(folder),
    }
    for name, tree in results.items():
        leaves = {
            jax.tree_util.keystr(p): np.asarray(x) for p, x in jax.tree.leaves_with_path(tree)
        }
        np.savez(folder / f"{name}.npz", **leaves)
    (folder / "program").write_text(program())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("groups")
    root = str(Path(powersgd.__file__).parents[2])
    done = subprocess.run(
        [sys.executable, __file__, str(folder)],
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "8", "PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


def read(folder, name, start=""):
    with np.load(folder / f"{name}.npz") as arrays:
        return {path.removeprefix(start): arrays[path] for path in arrays if path.startswith(start)}


@pytest.mark.slow
def test_full_rank_equals_plain_means_also_with_slices_scales_and_micro_batches(folder):
    plain, groups = read(folder, "plain"), read(folder, "full rank")
    # the gradient of a quarter of the batch is four times as large
    assert 4 * groups.pop("['metrics']['seen_scale']") == plain.pop("['metrics']['seen_scale']")
    assert groups["['metrics']['skipped']"] == 0
    chex.assert_trees_all_close(groups, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_group_whose_gradient_is_not_finite_makes_all_skip_the_update(folder):
    before = read(folder, "broken", "['before']")
    after = read(folder, "broken", "['after']")
    metrics = read(folder, "broken", "['metrics']")
    assert metrics["['skipped']"] == 1 and metrics["['update_norm']"] == 0
    for name in before:
        if name.startswith((".params", ".opt_state")):
            np.testing.assert_array_equal(after[name], before[name])
    np.testing.assert_array_equal(before[".scales.scale"], [16, 16])
    np.testing.assert_array_equal(after[".scales.scale"], [8, 8])
    errors = [x for name, x in after.items() if name.startswith(".powersgd.error")]
    assert len(errors) == 1 and np.isfinite(errors[0]).all()


@pytest.mark.slow
def test_how_often_a_run_is_saved_changes_nothing_in_it(folder):
    unbroken = read(folder, "continued", "['unbroken']")
    chex.assert_trees_all_equal(read(folder, "continued", "['often']"), unbroken)


@pytest.mark.slow
def test_runs_that_go_on_from_one_checkpoint_are_equal_bit_for_bit(folder):
    unbroken = read(folder, "continued", "['unbroken']")
    again = read(folder, "continued", "['again']")
    chex.assert_trees_all_equal(again, read(folder, "continued", "['once more']"))
    # equal parts of the errors' sum in the place of each group's own change the rounding alone
    chex.assert_trees_all_close(again, unbroken, rtol=0, atol=1e-4)
    # rank 1 is the same with two groups but for rounding and for where kernels are cut
    chex.assert_trees_all_close(read(folder, "continued", "['two']"), unbroken, rtol=0, atol=0.05)


@pytest.mark.slow
def test_a_run_with_a_warm_q_and_small_buffers_goes_on(folder):
    """Q starts anew from the seed: the same each time, not the same as without a stop."""
    again = read(folder, "continued", "['small again']")
    chex.assert_trees_all_equal(again, read(folder, "continued", "['small once more']"))
    unbroken = read(folder, "continued", "['small']")
    chex.assert_trees_all_close(again, unbroken, rtol=0, atol=0.05)


@pytest.mark.slow
def test_another_number_of_groups_keeps_the_sum_of_the_errors(folder):
    (two,) = read(folder, "continued", "['errors of two']").values()
    (four,) = read(folder, "continued", "['errors of four']").values()
    assert two.shape[0] == 2 and four.shape[0] == 4
    assert np.abs(four).max() > 1e-3
    np.testing.assert_array_equal(two[0], two[1])
    np.testing.assert_allclose(two.sum(axis=0), four.sum(axis=0), rtol=1e-6)


@pytest.mark.slow
def test_groups_send_as_many_bytes_as_counted(folder):
    sent, calls = 0, 0
    for line in (folder / "program").read_text().splitlines():
        assert not re.search(r" (all-gather|all-to-all|collective-permute|reduce-scatter)\(", line)
        if " all-reduce(" in line:
            shapes = re.findall(r"(?:f32|s32)\[([\d,]*)\]", line.split(" all-reduce(")[0])
            sent += 4 * sum(math.prod(int(n) for n in x.split(",") if n) for x in shapes)
            calls += 1
    params = jax.eval_shape(Layered().init, jax.random.key(0))
    counted = powersgd.sent_bytes(params, config=PowerSGDConfig(rank=1), bytes_per_number=4)
    told = 4 * (1 + 2 + L)  # the flag of all, loss and metric, flags of layers
    assert sent == counted["p"] + counted["q"] + counted["uncompressed"] + told
    assert calls <= 5


def test_kernels_cut_by_heads_are_refused():
    mesh = AbstractMesh((2, 1, 2), ("data", "fsdp", "tensor"))
    with pytest.raises(
        ValueError, match="cannot compress kernels cut by tensor=2; set mesh.tensor"
    ):
        PowerSGDGroups(PowerSGDConfig(rank=1), mesh)


def test_a_model_without_layers_is_refused():
    mesh = AbstractMesh((2, 1, 1), ("data", "fsdp", "tensor"))
    with pytest.raises(ValueError, match="stacked kernels below .* leave powersgd.rank out"):
        PowerSGDGroups(PowerSGDConfig(rank=1), mesh).init(
            {"encoder": {"kernel": jnp.zeros((2, 2))}}
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
