"""PowerSGD: groups of devices that average gradients of low rank instead of whole ones.

Each member of a mapped axis, such as the data axis of a mesh, adds its gradient to an error buffer
e. The members agree on a few orthonormal columns P and on the mean of e'P, and put P (e'P)' in the
place of the mean gradient; what that misses stays in e for later updates. Only the kernels of the
layers are compressed, each as a batch of matrices; embeddings, heads, gains and biases are averaged
as they are.

Q is drawn once and kept, as in the paper. So after every update the mean of e times Q is 0: what e
holds gets out only when a later gradient turns P towards it. A gradient that is the same in every
update never does that; the noise of batches does.

Letters: L layers, D width, N heads, H head size, F mlp.

Source: Vogels et al. 2019; Ramesh et al. 2021, section 2.5 and appendix E.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, PyTree

from dalle_jax.errors import UserError
from dalle_jax.precision.formats import largest, round_to

FORMAT = "1-6-9"


@dataclass(frozen=True, kw_only=True)
class PowerSGDConfig:
    """How gradients are compressed."""

    rank: int | None = None
    """Columns of P for each slice of each matrix; None averages whole gradients. The paper's 896
    for 12 billion parameters is 112 for each of 8 slices."""
    epsilon: float = 1e-6
    """Times the identity, added to P before its columns are made orthonormal."""
    seed: int = 0
    """Of the Gaussian Q; the same for all members and for a resumed run."""
    low_precision: bool = False
    """Keep error buffers, P and Q, and what is sent of them, in the numbers of 1-6-9; simulated in
    float32, so that it shows what that precision costs but saves no bytes."""
    p_scale: float = 1.0
    """P is multiplied by this before it is rounded and sent."""
    q_scale: float = 1.0
    """The new Q is multiplied by this before it is rounded and sent, and divided after."""

    def __post_init__(self):
        if self.rank is not None and self.rank < 1:
            raise UserError(f"rank is {self.rank}, but must be at least 1")
        for name in ("epsilon", "p_scale", "q_scale"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise UserError(f"{name} is {value}, but must be positive and finite")


@struct.dataclass
class PowerSGDState:
    """What one member keeps between updates."""

    error: PyTree
    """f32 error buffers by the path of their kernel, in its shape; each member has its own."""
    q: PyTree
    """Q [batch, n, rank] by path: the same for all members, never changed, drawn from the seed, so
    that a checkpoint does without it."""


class _Kernel(NamedTuple):
    """How the axes of a kernel make matrices, and which one is cut into slices."""

    batch: tuple[int, ...]
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    cut: int
    """The axis that devices which share the state divide among them."""


_KERNELS = {
    "qkv": _Kernel((0, 2), (1,), (3, 4), cut=1),  # L D 3 N H
    "attention_out": _Kernel((0,), (1, 2), (3,), cut=3),  # L N H D
    "mlp_in": _Kernel((0,), (1,), (2,), cut=2),  # L D F
    "mlp_out": _Kernel((0,), (1,), (2,), cut=1),  # L F D
}


def to_matrices(
    kernel: Float[Array, "L ..."], name: str, *, shards: int = 1
) -> Float[Array, "batch m n"]:
    """Turns a stacked kernel into the matrices that are compressed one by one.

    Args:
      kernel: qkv [L, D, 3, N, H], attention_out [L, N, H, D], mlp_in [L, D, F] or
        mlp_out [L, F, D].
      name: which of these.
      shards: equal slices that each matrix is cut into, where `parallel.rules` cuts it: across its
        columns, mlp_out across its rows.
    Returns:
      Matrices with m <= n, transposed where that takes it; those of the first slices come first,
      so that slices which lie on several devices stay there.
    Raises:
      ValueError: for another name, or if the slices would not be equal.
    Source: Ramesh et al. 2021, appendix E, table 2.
    """
    order, _, m, n = _plan(kernel.shape, name, shards)
    kind = _KERNELS[name]
    before, after = kernel.shape[: kind.cut], kernel.shape[kind.cut + 1 :]
    slices = jnp.moveaxis(kernel.reshape(*before, shards, -1, *after), kind.cut, 0)
    x = slices.transpose(order).reshape(-1, m, n)
    return x.swapaxes(1, 2) if m > n else x


def from_matrices(
    matrices: Float[Array, "batch m n"], name: str, shape: tuple[int, ...], *, shards: int = 1
) -> Float[Array, "L ..."]:
    """Undoes `to_matrices`.

    Args:
      matrices: what it returned, or as many others of the same size.
      name: of the kernel.
      shape: of the kernel.
      shards: as given there.
    Returns:
      The kernel.
    Raises:
      ValueError: as there.
    """
    order, stacked, m, n = _plan(shape, name, shards)
    x = matrices.swapaxes(1, 2) if m > n else matrices
    slices = x.reshape([stacked[i] for i in order]).transpose(np.argsort(order))
    return jnp.moveaxis(slices, 0, _KERNELS[name].cut).reshape(shape)


def _plan(shape, name, shards):
    """Axes of the stacked slices in the order of matrices, the slices' shape, rows and columns."""
    if name not in _KERNELS:
        raise ValueError(
            f"cannot compress the kernel of {name!r}, only those of {list(_KERNELS)}; add to "
            "dalle_jax/parallel/powersgd.py how its axes make matrices"
        )
    kind = _KERNELS[name]
    if shape[kind.cut] % shards:
        raise UserError(
            f"axis {kind.cut} of the {name} kernel {list(shape)} cannot be cut into {shards} equal "
            "slices; choose shards that divide it"
        )
    slice_shape = list(shape)
    slice_shape[kind.cut] //= shards
    order = (0, *(axis + 1 for axis in kind.batch + kind.rows + kind.columns))
    m, n = (math.prod(slice_shape[axis] for axis in axes) for axes in (kind.rows, kind.columns))
    return order, (shards, *slice_shape), m, n


def create(params: PyTree, *, config: PowerSGDConfig, shards: int = 1) -> PowerSGDState:
    """Makes the state of one member before the first update: no error yet, and Q drawn.

    Args:
      params: parameters or their shapes, with the stacked kernels below "layers".
      config: gives rank and seed.
      shards: slices of each matrix that this member holds; see `to_matrices`.
    Returns:
      The state.
    Raises:
      ValueError: if there is no rank, a matrix cannot be cut or has fewer rows or columns than the
        rank, or nothing is to be compressed.
    Source: Ramesh et al. 2021, appendix E.
    """
    kernels = compressed(params)
    if not kernels:
        raise UserError(
            'powersgd compresses stacked kernels below "layers", but there are none here; leave '
            "powersgd.rank out for this model"
        )
    error, q = {}, {}
    for i, (path, leaf) in enumerate(sorted(kernels.items())):
        batch, _, n = _matrix_shape(path, leaf, config, shards)
        key = jax.random.fold_in(jax.random.key(config.seed), i)
        q[path] = _stored(jax.random.normal(key, (batch, n, config.rank)), config)
        error[path] = jnp.zeros(leaf.shape, jnp.float32)
    return PowerSGDState(error=error, q=q)


def reduce(
    grads: PyTree,
    state: PowerSGDState,
    *,
    config: PowerSGDConfig,
    axis_name: str,
    shards: int = 1,
) -> tuple[PyTree, dict[str, Array], Float[Array, ""], Bool[Array, ""]]:
    """Averages gradients over the members of a mapped axis, those of the kernels compressed.

    To be called by every member within `jax.shard_map` or a `jax.vmap` that names the axis; axes
    that devices share the state over are best left to the compiler. Members talk four times: on
    all P, on all Q, on what is not compressed, and on one flag.

    An update with anything that is not finite has to be skipped by the caller. A matrix whose
    gradient is not finite leaves its e as it was; where P and Q are finite, e loses what was sent
    all the same, as in the paper.

    Args:
      grads: gradients of this member alone, divided by gradient scales.
      state: of this member.
      config: as for `create`.
      axis_name: the mapped axis.
      shards: as for `create`.
    Returns:
      grads: their mean over members in float32, that of the kernels approximate.
      error: the new error buffers of this member; all else is the same for all members.
      norm: of all mean gradients together, for clipping; infinite if anything on any member is not
        finite. If slices lie on devices that are mapped too, it is that of this device's slices.
      finite: whether everything on every member is.
    Source: Ramesh et al. 2021, appendix E, steps 2 to 12.
    """
    grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
    kernels, others = _parted(grads)

    def matrices(tree):
        return {path: to_matrices(x, _name(path), shards=shards) for path, x in tree.items()}

    def whole(tree):
        shapes = {path: x.shape for path, x in kernels.items()}
        return {
            path: from_matrices(x, _name(path), shapes[path], shards=shards)
            for path, x in tree.items()
        }

    def mean(tree):
        """What arrives, and for each matrix whether it is finite."""
        sent = {path: _stored(x, config) for path, x in tree.items()}
        received = _mean_at_once(sent, axis_name, shards)
        received = {path: _stored(x, config) for path, x in received.items()}
        bound = largest(FORMAT) if config.low_precision else jnp.inf
        clamped = {path: jnp.clip(x, -bound, bound) for path, x in received.items()}
        return clamped, {path: _finite(x) for path, x in received.items()}

    def add(e, g):
        return jnp.where(_finite(g), _stored(e + g, config), e)

    e = jax.tree.map(add, matrices(state.error), matrices(kernels))
    p, p_finite = mean({path: config.p_scale * (e[path] @ state.q[path]) for path in e})
    p = {path: _orthonormal(x, config) for path, x in p.items()}
    q, q_finite = mean({path: config.q_scale * (e[path].swapaxes(1, 2) @ p[path]) for path in e})
    q = {path: x / config.q_scale for path, x in q.items()}
    approximate = {path: p[path] @ q[path].swapaxes(1, 2) for path in e}
    others = jax.lax.pmean(others, axis_name)

    all_finite = [_finite(x, axes=None).all() for x in jax.tree.leaves((grads, e, others))]
    all_finite += [flags.all() for flags in jax.tree.leaves((p_finite, q_finite))]
    unwell = jax.lax.psum(1.0 - jnp.stack(all_finite).all(), axis_name)
    finite = unwell == 0
    squares = [jnp.sum(jnp.square(x)) for x in jax.tree.leaves((q, others))]
    norm = jnp.where(finite, jnp.sqrt(sum(squares)), jnp.inf)

    def rest(e, sent, p_finite, q_finite):
        kept = jnp.where(_finite(e), e, 0)
        return jnp.where(p_finite & q_finite, _stored(e - sent, config), kept)

    error = whole(jax.tree.map(rest, e, approximate, p_finite, q_finite))
    means = others | whole(approximate)
    means = jax.tree_util.tree_map_with_path(lambda path, _: means[_path(path)], grads)
    return means, error, norm, finite


def sent_bytes(
    params: PyTree, *, config: PowerSGDConfig, shards: int = 1, bytes_per_number: int = 2
) -> dict[str, int]:
    """Size of the arrays that one member averages with the others in an update.

    How often these bytes cross the network depends on how the all-reduce goes about it. The four
    of the flag are left out.

    Args:
      params: parameters or their shapes.
      config: gives the rank.
      shards: slices of each matrix; the count is that of all of them, so if each lies on a device
        of its own, what one device sends of P and Q is this over shards.
      bytes_per_number: of P, Q and, without compression, the kernels' gradients; what is never
        compressed is sent in float32.
    Returns:
      Bytes of "p", "q" and "uncompressed", and of "plain", an all-reduce of everything.
    Raises:
      ValueError: as `create`.
    Source: Ramesh et al. 2021, appendix E, table 2, where no matrix is transposed: P and Q trade
      places in some rows, their sum is the same.
    """
    kernels, others = _parted(params)
    shapes = [_matrix_shape(path, leaf, config, shards) for path, leaf in kernels.items()]
    uncompressed = 4 * sum(leaf.size for leaf in others.values())
    number = bytes_per_number
    return {
        "p": number * sum(batch * m * config.rank for batch, m, _ in shapes),
        "q": number * sum(batch * n * config.rank for batch, _, n in shapes),
        "uncompressed": uncompressed,
        "plain": number * sum(leaf.size for leaf in kernels.values()) + uncompressed,
    }


def _mean_at_once(tree, axis_name, shards):
    """The means of all arrays, sent as one; what lies on several devices by slices stays there."""
    flat = [x.reshape(shards, -1) for x in tree.values()]
    ends = np.cumsum([x.shape[1] for x in flat])[:-1]
    parts = jnp.split(jax.lax.pmean(jnp.concatenate(flat, axis=1), axis_name), ends, axis=1)
    return {path: y.reshape(x.shape) for (path, x), y in zip(tree.items(), parts, strict=True)}


def compressed(tree: PyTree) -> dict[str, Any]:
    """The leaves of a tree like the parameters that are compressed, by path: kernels of layers."""

    def is_compressed(path):
        keys = path.split("/")
        return "layers" in keys[:-2] and keys[-1] == "kernel"

    return {path: leaf for path, leaf in _leaves(tree).items() if is_compressed(path)}


def _parted(tree):
    """Kernels of the layers, and everything else, both by path."""
    kernels = compressed(tree)
    return kernels, {path: leaf for path, leaf in _leaves(tree).items() if path not in kernels}


def _leaves(tree):
    return {_path(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def _path(keys):
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def _name(path):
    return path.split("/")[-2]


def _matrix_shape(path, leaf, config, shards):
    _, stacked, m, n = _plan(leaf.shape, _name(path), shards)
    m, n = sorted((m, n))
    if config.rank is None:
        raise ValueError("rank is None, which stands for no compression; give PowerSGD a number")
    if config.rank > m:
        raise UserError(
            f"rank is {config.rank}, but {path} {list(leaf.shape)} gives matrices of {m} x {n} in "
            f"{shards} slices; choose a rank of at most {m}"
        )
    return math.prod(stacked) // (m * n), m, n


def _stored(x, config):
    return round_to(x, FORMAT) if config.low_precision else x


def _finite(x, axes=(-2, -1)):
    return jnp.isfinite(x).all(axis=axes, keepdims=True)


def _orthonormal(p, config):
    """Orthonormal columns that span those of p, by Householder reflections."""
    identity = jnp.eye(*p.shape[1:])[None]
    return _stored(jnp.linalg.qr(p + config.epsilon * identity).Q, config)
