"""PowerSGD against plain means, a version in numpy, and the paper's tables.

Run as a script, it writes what four devices make of one update.
"""

import functools
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as Spec

from dalle_jax.models.prior_config import PUBLISHED
from dalle_jax.parallel import powersgd
from dalle_jax.parallel.kernel_matrices import from_matrices, to_matrices
from dalle_jax.parallel.mesh import DATA, FSDP, MeshConfig, make_mesh
from dalle_jax.parallel.powersgd import PowerSGDConfig, PowerSGDState
from dalle_jax.parallel.sharding_rules import PRIOR

M, L, D, N, H, F = 2, 2, 4, 2, 2, 8
KERNELS = {
    "qkv": (L, D, 3, N, H),
    "attention_out": (L, N, H, D),
    "mlp_in": (L, D, F),
    "mlp_out": (L, F, D),
}
OTHERS = {"embed": {"code": (5, D)}, "head": {"image": {"kernel": (D, 5)}}}
FULL = PowerSGDConfig(rank=D)
THIN = PowerSGDConfig(rank=2)
WARM = PowerSGDConfig(rank=2, warm_start=True)
REDUCED = PowerSGDConfig(rank=2, low_precision=True, p_scale=2.0, q_scale=0.5)


def parameters(kernels=KERNELS, others=OTHERS):
    layers = {name: {"kernel": shape, "bias": (shape[0], 3)} for name, shape in kernels.items()}
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        others | {"layers": layers},
        is_leaf=lambda x: isinstance(x, tuple),
    )


def drawn(seed):
    """Gradients of M members."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.normal(size=(M, *x.shape)).astype("f"), parameters())


def begun(config, shards=1, error_seed=None):
    """States of M members: without errors, or with some."""
    state = jax.jit(lambda: powersgd.init(parameters(), config=config, shards=shards))()
    error = {path: np.zeros((M, *e.shape), "f") for path, e in state.error.items()}
    if error_seed is not None:
        error = kernels_of(drawn(error_seed))
    if config.low_precision:
        error = jax.jit(powersgd.stored_error, static_argnums=1)(error, config)
    return state.replace(error=error)


@functools.cache
def mapped_reduce(config, shards=1):
    """For all members at once; fails unless what it says is the same for all of them is so."""
    return jax.jit(
        jax.vmap(
            functools.partial(powersgd.reduce, config=config, axis_name="data", shards=shards),
            in_axes=(0, PowerSGDState(error=0, q=None)),
            out_axes=(None, PowerSGDState(error=0, q=None), None, None),
            axis_name="data",
        )
    )


def reduce(grads, state, *, config, shards=1):
    """Means, error buffers in float32, norm and flag."""
    means, state, norm, finite = mapped_reduce(config, shards)(grads, state)
    return means, read_error(state.error, config), norm, finite


read_error = jax.jit(powersgd.read_error, static_argnums=1)


def kernels_of(tree):
    return {f"layers/{name}/kernel": tree["layers"][name]["kernel"] for name in KERNELS}


def mean(tree):
    return jax.tree.map(lambda x: x.mean(axis=0), tree)


def test_matrices_of_a_written_out_kernel():
    kernel = jnp.arange(8.0).reshape(1, 2, 4)
    whole = to_matrices(kernel, "mlp_in")
    np.testing.assert_array_equal(whole, [[[0, 1, 2, 3], [4, 5, 6, 7]]])
    columns = to_matrices(kernel, "mlp_in", shards=2)
    np.testing.assert_array_equal(columns, [[[0, 1], [4, 5]], [[2, 3], [6, 7]]])
    tall = to_matrices(kernel.reshape(1, 4, 2), "mlp_out")
    np.testing.assert_array_equal(tall, [[[0, 2, 4, 6], [1, 3, 5, 7]]])
    rows = to_matrices(kernel.reshape(1, 4, 2), "mlp_out", shards=2)
    np.testing.assert_array_equal(rows, [[[0, 1], [2, 3]], [[4, 5], [6, 7]]])


def test_queries_keys_and_values_are_matrices_of_their_own():
    kernel = np.random.default_rng(0).normal(size=KERNELS["qkv"]).astype("f")
    matrices = to_matrices(jnp.asarray(kernel), "qkv")
    assert matrices.shape == (L * 3, D, N * H)
    np.testing.assert_array_equal(matrices[1 * 3 + 2], kernel[1, :, 2].reshape(D, N * H))


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("shards", [1, 2])
def test_matrices_turn_back_into_their_kernel(name, shards):
    kernel = jnp.arange(np.prod(KERNELS[name]), dtype=jnp.float32).reshape(KERNELS[name])
    matrices = to_matrices(kernel, name, shards=shards)
    assert matrices.shape[1] <= matrices.shape[2]
    back = from_matrices(matrices, name, kernel.shape, shards=shards)
    np.testing.assert_array_equal(back, kernel)


@pytest.mark.parametrize("name", KERNELS)
def test_slices_are_those_of_devices_that_share_the_state(name):
    kernel = jnp.arange(np.prod(KERNELS[name]), dtype=jnp.float32).reshape(KERNELS[name])
    spec = dict(PRIOR)[f"layers/{name}/kernel"]
    (axis,) = (i for i, names in enumerate(spec) if names is not None and FSDP in names)
    parts = [to_matrices(part, name) for part in jnp.split(kernel, 2, axis=axis)]
    np.testing.assert_array_equal(to_matrices(kernel, name, shards=2), np.concatenate(parts))


def test_full_rank_equals_the_plain_mean():
    grads = drawn(0)
    means, error, norm, finite = reduce(grads, begun(FULL), config=FULL)
    chex.assert_trees_all_close(means, mean(grads), atol=1e-5)
    total = np.sqrt(sum(np.square(x).sum() for x in jax.tree.leaves(mean(grads))))
    np.testing.assert_allclose(norm, total, rtol=1e-5)
    chex.assert_trees_all_close(mean(error), jax.tree.map(np.zeros_like, mean(error)), atol=1e-5)
    assert finite


def test_a_mean_gradient_of_rank_two_is_exact_at_rank_two():
    rng = np.random.default_rng(0)
    grads = drawn(1)
    low = (rng.normal(size=(L, D, 2)) @ rng.normal(size=(L, 2, F))).astype("f")
    noise = grads["layers"]["mlp_in"]["kernel"]  # of members, which cancels in the mean
    grads["layers"]["mlp_in"]["kernel"] = low + noise - noise.mean(axis=0)
    means, *_ = reduce(grads, begun(THIN), config=THIN)
    np.testing.assert_allclose(means["layers"]["mlp_in"]["kernel"], low, atol=1e-5)
    off = means["layers"]["mlp_out"]["kernel"] - mean(grads)["layers"]["mlp_out"]["kernel"]
    assert np.abs(off).max() > 0.1  # where the rank is higher


def test_an_update_of_slices_equals_numpy():
    grads, state = drawn(0), begun(THIN, shards=2, error_seed=1)
    means, error, norm, _ = reduce(grads, state, config=THIN, shards=2)
    path = "layers/mlp_in/kernel"
    e = state.error[path] + kernels_of(grads)[path]
    for shard in range(2):
        columns = slice(shard * F // 2, (shard + 1) * F // 2)
        for i in range(L):
            a = e[:, i, :, columns]
            p, _ = np.linalg.qr(a.mean(axis=0) @ state.q[path][shard * L + i] + 1e-6 * np.eye(D, 2))
            sent = p @ p.T @ a.mean(axis=0)
            got = means["layers"]["mlp_in"]["kernel"][i, :, columns]
            np.testing.assert_allclose(got, sent, atol=1e-5)
            np.testing.assert_allclose(error[path][:, i, :, columns], a - sent, atol=1e-5)
    squares = sum(np.square(x).sum() for x in jax.tree.leaves(means))  # P is orthonormal
    np.testing.assert_allclose(norm, np.sqrt(squares), rtol=1e-5)


def test_errors_fall_in_sum_by_what_was_sent():
    grads, state = drawn(0), begun(THIN, error_seed=1)
    means, error, *_ = reduce(grads, state, config=THIN)
    before = jax.tree.map(lambda e, g: (e + g).sum(0), state.error, kernels_of(grads))
    after = jax.tree.map(lambda e: e.sum(0), error)
    expected = jax.tree.map(lambda b, sent: b - M * sent, before, kernels_of(means))
    chex.assert_trees_all_close(after, expected, atol=1e-5)


def test_what_is_not_compressed_is_averaged_as_it_is():
    grads = drawn(0)
    means, error, *_ = reduce(grads, begun(THIN), config=THIN)
    for x in (means, expected := mean(grads)):
        for layer in x["layers"].values():
            del layer["kernel"]
    chex.assert_trees_all_close(means, expected, atol=1e-6)
    assert set(error) == {f"layers/{name}/kernel" for name in KERNELS}


@functools.partial(jax.jit, static_argnames="config")
def run(state, grads, config):
    def step(state, g):
        means, state, *_ = mapped_reduce(config)(g, state)
        return state, means

    return jax.lax.scan(step, state, grads)[1]


def shares_unsent(noise, config=THIN):
    """How much of the sum of all mean gradients is still unsent after 20 and after 400 updates."""
    rng = np.random.default_rng(0)
    params = {"layers": {"mlp_in": {"kernel": jax.ShapeDtypeStruct((1, 8, 16), jnp.float32)}}}
    state = powersgd.init(params, config=THIN)
    state = state.replace(error=jax.tree.map(lambda e: np.zeros((M, *e.shape), "f"), state.error))
    grads = rng.normal(size=(1, M, 1, 8, 16)) + noise * rng.normal(size=(400, M, 1, 8, 16))
    sent = run(state, {"layers": {"mlp_in": {"kernel": grads.astype("f")}}}, config)
    sent = sent["layers"]["mlp_in"]["kernel"].cumsum(axis=0)
    wanted = grads.mean(axis=1).cumsum(axis=0)
    return [np.linalg.norm(sent[t] - wanted[t]) / np.linalg.norm(wanted[t]) for t in (19, 399)]


def test_noisy_gradients_are_sent_in_full_in_the_long_run():
    early, late = shares_unsent(noise=1.0)
    assert late < 0.1 * early
    assert late < 0.05


def test_fixed_q_never_sends_the_rest_of_a_constant_gradient():
    early, late = shares_unsent(noise=0.0)
    assert early == pytest.approx(late, rel=1e-2)
    assert late > 0.5


def test_a_warm_q_sends_all_of_a_constant_gradient():
    early, late = shares_unsent(noise=0.0, config=WARM)
    assert late < 0.1 * early
    assert late < 0.05


def test_a_warm_q_is_the_mean_of_the_update_before_in_columns_of_size_1():
    grads, state = drawn(0), begun(WARM, error_seed=1)
    _, after, *_ = mapped_reduce(WARM)(grads, state)
    path = "layers/mlp_in/kernel"
    e = (state.error[path] + kernels_of(grads)[path]).mean(axis=0)
    for i in range(L):
        p, _ = np.linalg.qr(e[i] @ state.q[path][i] + 1e-6 * np.eye(D, 2))
        q = e[i].T @ p
        expected = q / np.sqrt(np.square(q).mean(axis=0))
        np.testing.assert_allclose(after.q[path][i], expected, atol=1e-5)
    _, fixed, *_ = mapped_reduce(THIN)(grads, begun(THIN, error_seed=1))
    chex.assert_trees_all_equal(fixed.q, state.q)


def test_a_warm_q_survives_gradients_that_are_zero_or_not_finite():
    zeros = jax.tree.map(np.zeros_like, drawn(0))
    _, state, _, finite = mapped_reduce(WARM)(zeros, begun(WARM))
    assert finite
    chex.assert_tree_all_finite(state.q)
    means, *_ = mapped_reduce(WARM)(drawn(0), state)  # Q is 0, and P then that of the identity
    assert np.abs(means["layers"]["mlp_in"]["kernel"]).max() > 0.1
    broken = drawn(1)
    broken["embed"]["code"][0, 0, 0] = np.nan
    before = begun(WARM)
    _, after, _, finite = mapped_reduce(WARM)(broken, before)
    assert not finite
    chex.assert_trees_all_equal(after.q, before.q)


def test_mean_error_times_q_is_zero_after_every_update():
    state = begun(THIN, error_seed=1)
    _, error, *_ = reduce(drawn(0), state, config=THIN)
    rest = to_matrices(mean(error)["layers/mlp_in/kernel"], "mlp_in")
    assert np.abs(rest).max() > 0.1
    np.testing.assert_allclose(rest @ state.q["layers/mlp_in/kernel"], 0, atol=1e-5)


def test_gradients_that_are_zero_stay_zero():
    grads = jax.tree.map(np.zeros_like, drawn(0))
    means, error, norm, finite = reduce(grads, begun(THIN), config=THIN)
    chex.assert_trees_all_equal(means, mean(grads))
    chex.assert_trees_all_equal(error, kernels_of(grads))
    assert norm == 0
    assert finite


def test_a_gradient_that_is_not_finite_on_one_member_is_seen_by_all_and_not_added():
    grads, state = drawn(0), begun(THIN, error_seed=1)
    without = jax.tree.map(np.copy, grads)
    grads["layers"]["mlp_in"]["kernel"][0, 1, 2, 3] = np.nan
    without["layers"]["mlp_in"]["kernel"][0, 1] = 0
    _, error, norm, finite = reduce(grads, state, config=THIN)
    _, expected, norm_without, finite_without = reduce(without, state, config=THIN)
    assert not finite
    assert norm == np.inf
    assert finite_without
    assert np.isfinite(norm_without)
    chex.assert_trees_all_equal(error, expected)


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_an_error_that_is_not_finite_is_zeroed_and_others_keep_theirs(bad):
    grads, state = drawn(0), begun(THIN, error_seed=1)
    _, well, *_ = reduce(grads, state, config=THIN)
    state.error["layers/mlp_in/kernel"][0, 1, 2, 3] = bad
    _, error, norm, finite = reduce(grads, state, config=THIN)
    assert not finite
    assert norm == np.inf
    path = "layers/mlp_in/kernel"
    np.testing.assert_array_equal(error[path][0, 1], 0)
    kept = state.error[path] + kernels_of(grads)[path]
    np.testing.assert_allclose(error[path][1:, 1], kept[1:, 1], rtol=1e-6)
    np.testing.assert_allclose(error[path][:, 0], well[path][:, 0], atol=1e-6)  # the other layer
    del error[path], well[path]
    chex.assert_trees_all_close(error, well, atol=1e-6)


@pytest.mark.parametrize("path", [("embed", "code"), ("layers", "mlp_in", "bias")])
def test_flags_cover_what_is_not_compressed(path):
    grads = drawn(0)
    leaf = functools.reduce(dict.__getitem__, path, grads)
    leaf[1, 0, 0] = -np.inf
    _, _, norm, finite = reduce(grads, begun(THIN), config=THIN)
    assert not finite
    assert norm == np.inf


def test_reduced_buffers_hold_numbers_of_1_6_9_and_stay_near_float32():
    grads = jax.tree.map(lambda g: 0.1 * g, drawn(0))
    means, error, norm, finite = reduce(grads, begun(REDUCED), config=REDUCED)
    exact, _, exact_norm, _ = reduce(grads, begun(THIN), config=THIN)
    chex.assert_trees_all_close(means, exact, atol=5e-3)
    np.testing.assert_allclose(norm, exact_norm, rtol=1e-2)
    assert finite
    for e in jax.tree.leaves(error):
        significand, _ = np.frexp(np.asarray(e))
        np.testing.assert_array_equal(significand * 2**10 % 1, 0)
    _, after, *_ = jax.eval_shape(mapped_reduce(REDUCED), grads, begun(REDUCED))
    assert {e.dtype for e in jax.tree.leaves(after.error)} == {jnp.dtype("uint16")}


def test_overflow_of_1_6_9_is_clamped_but_flagged():
    grads = jax.tree.map(np.zeros_like, drawn(0))
    grads["layers"]["mlp_in"]["kernel"][:, 1] = 15.0  # e holds it, P does not
    means, error, norm, finite = reduce(grads, begun(REDUCED), config=REDUCED)
    assert not finite
    assert norm == np.inf
    chex.assert_tree_all_finite(means)
    chex.assert_trees_all_equal(error, kernels_of(grads))


def test_q_is_redrawn_from_the_seed_alone():
    again = powersgd.init(parameters(), config=THIN)
    chex.assert_trees_all_equal(again.q, powersgd.init(parameters(), config=THIN).q)
    other = powersgd.init(parameters(), config=PowerSGDConfig(rank=2, seed=1))
    path = "layers/mlp_in/kernel"
    assert not np.allclose(other.q[path], again.q[path])
    assert not np.allclose(again.q[path][0], again.q[path][1])


@pytest.mark.parametrize(
    ("name", "rank", "rate"), [("2.8B", 512, 0.83), ("5.6B", 640, 0.85), ("12B", 896, 0.86)]
)
def test_bytes_are_those_of_the_papers_tables(name, rank, rate):
    sizes, m = PUBLISHED[name], 8
    d, r, layers, N = sizes.width, rank, sizes.depth, sizes.heads
    kernels = {
        "qkv": (layers, d, 3, N, d // N),
        "attention_out": (layers, N, d // N, d),
        "mlp_in": (layers, d, 4 * d),
        "mlp_out": (layers, 4 * d, d),
    }
    params = parameters(kernels, others={})
    config = PowerSGDConfig(rank=r // m)
    sent = powersgd.sent_bytes(params, config=config, shards=m)
    p, q = (5 * d * r * m + 4 * d * r) // m**2, (d * r * m + 8 * d * r) // m**2  # table 2
    assert sent["p"] + sent["q"] == 2 * layers * m * (p + q)
    assert sent["plain"] - sent["uncompressed"] == 2 * layers * m * (12 * d**2 // m)
    assert sent["uncompressed"] == 4 * 4 * layers * 3
    compression = 1 - (sent["p"] + sent["q"]) / (sent["plain"] - sent["uncompressed"])
    assert compression == pytest.approx(1 - 5 * r / (8 * d), rel=1e-9)
    assert compression == pytest.approx(rate, abs=5e-3)


def test_what_cannot_be_compressed_is_refused():
    with pytest.raises(
        ValueError, match=r"rank is 5, .*mlp_in.* matrices of 4 x 8 in 1 shards.* 4"
    ):
        powersgd.init(
            {"layers": {"mlp_in": parameters()["layers"]["mlp_in"]}}, config=PowerSGDConfig(rank=5)
        )
    with pytest.raises(ValueError, match="axis 2 of the mlp_in kernel .* into 3 equal shards"):
        to_matrices(jnp.zeros((L, D, F)), "mlp_in", shards=3)
    with pytest.raises(ValueError, match="kernel of 'router', only those of .*'qkv'"):
        powersgd.sent_bytes(parameters({"router": (L, D, 2)}), config=THIN)
    with pytest.raises(ValueError, match="rank is 0, but must be at least 1"):
        PowerSGDConfig(rank=0)
    with pytest.raises(ValueError, match="q_scale is 0.0, but must be positive"):
        PowerSGDConfig(q_scale=0.0)
    with pytest.raises(ValueError, match="rank is None, which stands for no compression"):
        powersgd.init(parameters(), config=PowerSGDConfig())


def on_four_devices(file):
    """Two members of two devices each, which share the kernels as the rules have it."""
    mesh = make_mesh(MeshConfig(fsdp=2))
    state = begun(THIN, shards=2, error_seed=1)
    error_specs = {path: Spec(DATA, *spec) for path, spec in PRIOR if path in state.error}

    def member(grads, error, q):
        grads, error = jax.tree.map(lambda x: x[0], (grads, error))
        state = PowerSGDState(error=error, q=q)
        means, state, norm, finite = powersgd.reduce(
            grads, state, config=THIN, axis_name=DATA, shards=2
        )
        return means, jax.tree.map(lambda e: e[None], state.error), norm, finite

    def placed(tree, specs):
        return jax.device_put(tree, jax.tree.map(lambda s: NamedSharding(mesh, s), specs))

    grads = drawn(0)
    specs = jax.tree.map(lambda _: Spec(DATA), grads)
    for name in KERNELS:
        specs["layers"][name]["kernel"] = error_specs[f"layers/{name}/kernel"]
    arguments = (
        placed(grads, specs),
        placed(state.error, error_specs),
        placed(state.q, jax.tree.map(lambda _: Spec(FSDP), state.q)),
    )
    mapped = jax.shard_map(
        member,
        mesh=mesh,
        in_specs=(Spec(DATA), Spec(DATA), Spec()),
        out_specs=(Spec(), Spec(DATA), Spec(), Spec()),
        axis_names={DATA},
    )
    compiled = jax.jit(mapped).lower(*arguments).compile()
    leaves = jax.tree.leaves(compiled(*arguments))
    np.savez(file, *leaves, program=compiled.as_text())


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    """What they got, and their compiled program."""
    file = tmp_path_factory.mktemp("four") / "update.npz"
    root = str(Path(powersgd.__file__).parents[2])
    done = subprocess.run(
        [sys.executable, __file__, str(file)],
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "4", "PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    with np.load(file) as arrays:
        return [arrays[f"arr_{i}"] for i in range(len(arrays.files) - 1)], str(arrays["program"])


def test_four_devices_give_what_one_gives(four):
    expected = reduce(drawn(0), begun(THIN, shards=2, error_seed=1), config=THIN, shards=2)
    got = jax.tree.unflatten(jax.tree.structure(expected), four[0])
    chex.assert_trees_all_close(got, expected, atol=1e-5)


def test_devices_send_as_many_bytes_as_counted(four):
    """Along data: P and Q of their slices, the rest whole. Along fsdp: no more than scalars."""
    along_data = ("replica_groups={{0,2},{1,3}}", "replica_groups=[2,2]<=[2,2]T(1,0)")
    sent, calls = 0, 0
    for line in four[1].splitlines():
        assert not re.search(r" (all-gather|all-to-all|collective-permute|reduce-scatter)\(", line)
        if " all-reduce(" in line:
            shapes = re.findall(r"(?:f32|pred)\[([\d,]*)\]", line.split(" all-reduce(")[0])
            sizes = [math.prod(int(n) for n in shape.split(",") if n) for shape in shapes]
            if any(groups in line for groups in along_data):
                sent += 4 * sum(sizes)
                calls += 1
            else:
                assert set(sizes) == {1}
    assert calls <= 4  # P, Q, what is not compressed, and the flag
    counted = powersgd.sent_bytes(parameters(), config=THIN, shards=2, bytes_per_number=4)
    assert sent == (counted["p"] + counted["q"]) // 2 + counted["uncompressed"] + 4


if __name__ == "__main__":
    on_four_devices(sys.argv[1])
