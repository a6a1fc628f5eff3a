"""Every mesh gives what one device gives; those of 8 devices in a process of their own."""

import json
import os
import subprocess
import sys
from functools import partial

import chex
import eight
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as Spec

from dalle_jax.models.autoregressive_prior import init_params
from dalle_jax.models.prior_config import PUBLISHED
from dalle_jax.parallel.mesh import MeshConfig, make_mesh
from dalle_jax.parallel.sharding_rules import PRIOR, shardings


@pytest.fixture(scope="module")
def spread(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eight")
    done = subprocess.run(
        [sys.executable, eight.__file__, str(folder)],
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "8"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "rematerialization" not in done.stderr  # the compiler gave up and gathered something
    return folder


@pytest.fixture(scope="module")
def single():
    return {name: eight.two_updates(name) for name in ("dvae", "prior", "clip", "muon")}


@pytest.mark.slow
@pytest.mark.parametrize("case", eight.CASES)
def test_a_mesh_gives_the_losses_and_updates_of_one_device(spread, single, case):
    one = single[eight.CASES[case][0]]
    with np.load(spread / f"{case}.npz") as arrays:
        leaves = [arrays[name] for name in arrays.files]
    eight_devices = jax.tree.unflatten(jax.tree.structure(one), leaves)
    chex.assert_trees_all_close(eight_devices, one, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_muon_sends_each_kernel_to_the_device_of_its_layer_and_back_and_nothing_else(spread):
    D, L, T, B = eight.PRIOR["width"], eight.PRIOR["depth"], 24, 16
    sent = {
        (x["kind"], *x["axes"]): x["array_bytes"]
        for x in json.loads((spread / "sent.json").read_text())
    }
    kernels, heads = 12 * D * D * L, D * (40 + 32)
    embedded = 2 * B * T * D // 8  # what enters the layers and its gradient, spread anew
    assert sent["all-to-all", "fsdp"] == 4 * (2 * kernels // 4 + embedded)
    gathered = 2 * 2 * kernels + 4 * heads  # bfloat16, as without Muon
    assert gathered <= sent["all-gather", "fsdp"] < gathered * 1.01


@pytest.mark.slow
def test_a_model_spread_over_devices_is_drawn_from_and_written_as_on_one(spread):
    for path in (spread / "whole").iterdir():
        assert path.read_bytes() == (spread / "spread" / path.name).read_bytes(), path.name
    np.testing.assert_array_equal(np.load(spread / "spread.npy"), np.load(spread / "whole.npy"))


def abstract(data, fsdp, tensor):
    return AbstractMesh((data, fsdp, tensor), ("data", "fsdp", "tensor"))


@pytest.mark.parametrize("size", PUBLISHED)
def test_eight_devices_share_a_published_prior_evenly(size):
    config = PUBLISHED[size]
    params = jax.eval_shape(partial(init_params, config), jax.random.key(0))
    places = shardings(params, abstract(128, 8, 1), PRIOR)
    held = jax.tree.map(lambda x, place: np.prod(place.shard_shape(x.shape)), params, places)
    whole = sum(x.size for x in jax.tree.leaves(params))
    assert whole / 8 < sum(jax.tree.leaves(held)) < whole / 8 * 1.004  # norms and biases are whole


def test_moments_lie_where_their_parameters_do():
    params = {"layers": {"mlp_out": {"kernel": jnp.zeros((2, 16, 8)), "bias": jnp.zeros((2, 8))}}}
    state = jax.eval_shape(optax.adam(1e-3).init, params)
    places = shardings(state, abstract(2, 2, 2), PRIOR)[0]
    assert places.count.spec == Spec()
    for moment in (places.mu, places.nu):
        assert moment["layers"]["mlp_out"]["kernel"].spec == Spec(None, ("tensor", "fsdp"))
        assert moment["layers"]["mlp_out"]["bias"].spec == Spec()


def test_momentum_of_muon_lies_by_layers_or_whole_where_they_are_too_few():
    rules = partial(shardings, mesh=abstract(1, 4, 1), rules=PRIOR)
    kernels = {"mlp_in": {"kernel": jnp.zeros((8, 16, 32))}}
    (place,) = jax.tree.leaves(rules({"muon": {"mu": {"layers": kernels}}}))
    assert place.spec == Spec("fsdp")
    few = {"mlp_in": {"kernel": jnp.zeros((6, 16, 32))}}
    (place,) = jax.tree.leaves(rules({"muon": {"mu": {"layers": few}}}))
    assert place.spec == Spec(None)
    many = {"mlp_in": {"kernel": jax.ShapeDtypeStruct((6, 512, 2048), jnp.float32)}}
    with pytest.raises(ValueError, match="axis 0 of muon/mu/layers/mlp_in/kernel .* into 4 equal"):
        rules({"muon": {"mu": {"layers": many}}})


def test_a_parameter_without_a_rule_is_named():
    params = {"layers": {"gate": jnp.zeros((2, 8))}}
    with pytest.raises(ValueError, match=r"no rule says where layers/gate \[2, 8\] lies"):
        shardings(params, abstract(1, 2, 1), PRIOR)


def test_only_small_arrays_may_stay_whole_where_they_cannot_be_cut():
    rules = (("*/kernel", Spec(None, "fsdp")),)
    small = {"head": {"kernel": jnp.zeros((64, 6))}}
    places = shardings(small, abstract(1, 4, 1), rules)
    assert places["head"]["kernel"].spec == Spec(None, None)
    large = {"head": {"kernel": jax.ShapeDtypeStruct((2**17, 6), jnp.float32)}}
    with pytest.raises(ValueError, match="axis 1 of head/kernel .* cannot be cut into 4 .*fsdp=4"):
        shardings(large, abstract(1, 4, 1), rules)


def test_a_mesh_that_does_not_fit_the_devices_is_refused():
    with pytest.raises(ValueError, match="fsdp=3 x tensor=1 does not fit 1 devices"):
        make_mesh(MeshConfig(fsdp=3))
    with pytest.raises(ValueError, match="data=2 x fsdp=1 x tensor=1 does not fit 1 devices"):
        make_mesh(MeshConfig(data=2))
    with pytest.raises(ValueError, match="mesh tensor is 0"):
        MeshConfig(tensor=0)
