"""PowerSGD: groups of devices average low-rank approximations of their gradients.

Each member of a mapped axis, such as the data axis of a mesh, adds its gradient to an error buffer
e. The members average a few orthonormal columns P and Q = e'P, and P Q' replaces the mean gradient;
what it misses stays in e for later steps. Only the kernels of the layers are compressed, each as a
batch of matrices; embeddings, heads, gains and biases are averaged as they are.

Q is sampled once and never changes, as in the paper. So after every step the mean of e times Q is
0: what e holds gets out only when a later gradient turns P towards it. A gradient that is the same
in every step never does that; the noise of batches does. With `warm_start` the mean Q of a step is
the next one's, as in Vogels et al., which follows the gradient's largest directions.

Source: Vogels et al. 2019; Ramesh et al. 2021, section 2.5 and appendix E.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, PyTree

from dalle_jax.errors import UserError
from dalle_jax.parallel.kernel_matrices import from_matrices, matrix_plan, to_matrices
from dalle_jax.precision.formats import decode, encode, largest, round_to

FORMAT = "1-6-9"


@dataclass(frozen=True, kw_only=True)
class PowerSGDConfig:
    """How gradients are compressed."""

    rank: int | None = None
    """Columns of P for each shard of each matrix; None averages gradients in full. The paper's 896
    for 12 billion parameters is 112 for each of 8 shards."""
    epsilon: float = 1e-6
    """Times the identity, added to P before its columns are made orthonormal."""
    seed: int = 0
    """Of the Gaussian Q; the same for all members and for a resumed run."""
    warm_start: bool = False
    """Take the mean Q of an update as the Q of the next one, as Vogels et al. do; False leaves it
    as it was sampled, as the paper does."""
    low_precision: bool = False
    """Store error buffers in the 16 bits of the format 1-6-9, and round P and Q, and what is sent
    of them, to it; these are float32 arrays all the same, so that nothing is saved in sending."""
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
    """What one member carries between steps."""

    error: PyTree
    """Error buffers by the path of their kernel, in its shape: f32, or u16 in low precision, see
    `stored_error`. Each member has its own."""
    q: PyTree
    """Q [batch, n, rank] by path, the same for all members. A checkpoint does without it: it is
    drawn from the seed, and a warm-started one is again after an update."""


def init(params: PyTree, *, config: PowerSGDConfig, shards: int = 1) -> PowerSGDState:
    """Makes the state of one member before the first step: no error yet, and a Gaussian Q.

    Args:
      params: parameters or their shapes, with the stacked kernels below "layers".
      config: gives rank and seed.
      shards: shards of each matrix that this member holds; see `kernel_matrices.to_matrices`.
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
    return PowerSGDState(error=stored_error(error, config), q=q)


def stored_error(error: PyTree, config: PowerSGDConfig) -> PyTree:
    """Error buffers as they are kept between updates."""
    return jax.tree.map(lambda e: encode(e, FORMAT), error) if config.low_precision else error


def read_error(error: PyTree, config: PowerSGDConfig) -> PyTree:
    """Error buffers in float32, from those of `stored_error`."""
    return jax.tree.map(lambda e: decode(e, FORMAT), error) if config.low_precision else error


def reduce(
    grads: PyTree,
    state: PowerSGDState,
    *,
    config: PowerSGDConfig,
    axis_name: str,
    shards: int = 1,
) -> tuple[PyTree, PowerSGDState, Float[Array, ""], Bool[Array, ""]]:
    """Averages gradients over the members of a mapped axis, those of the kernels compressed.

    Every member calls it within `jax.shard_map` or a `jax.vmap` that names the axis; axes that
    devices share the state over are best left to the compiler. There are four collectives: of all
    P, of all Q, of what is not compressed, and of one flag.

    The caller has to skip a step with anything that is not finite. A matrix whose gradient is not
    finite leaves its e as it was; where P and Q are finite, e loses what was sent all the same, as
    in the paper.

    Args:
      grads: gradients of this member alone, divided by gradient scales.
      state: of this member.
      config: as for `init`.
      axis_name: the mapped axis.
      shards: as for `init`.
    Returns:
      grads: their mean over members in float32, that of the kernels approximate.
      state: with new error buffers, which are this member's own; all else is the same for all.
      norm: of all mean gradients together, for clipping; infinite if anything on any member is not
        finite. If shards lie on devices that are mapped too, it is that of this device's shards.
      finite: whether everything on every member is.
    Source: Ramesh et al. 2021, appendix E; comments have the numbers of its steps 2 to 12.
    """
    grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
    kernels, others = _split(grads)

    def matrices(tree):
        return {path: to_matrices(x, _name(path), shards=shards) for path, x in tree.items()}

    def to_kernels(tree):
        return {
            path: from_matrices(x, _name(path), kernels[path].shape, shards=shards)
            for path, x in tree.items()
        }

    def all_reduce(tree):
        """The mean over members, and for each matrix whether it was finite before clamping."""
        sent = {path: _stored(x, config) for path, x in tree.items()}
        received = _mean_at_once(sent, axis_name, shards)
        received = {path: _stored(x, config) for path, x in received.items()}
        bound = largest(FORMAT) if config.low_precision else jnp.inf
        clamped = {path: jnp.clip(x, -bound, bound) for path, x in received.items()}
        return clamped, {path: _finite(x) for path, x in received.items()}

    # 2. Add the gradient to the error buffer; leave it alone if the gradient is not finite.
    def add(e, g):
        return jnp.where(_finite(g), _stored(e + g, config), e)

    e = jax.tree.map(add, matrices(read_error(state.error, config)), matrices(kernels))
    # 3. P = e Q, scaled. 4. Average P over members and clamp infinities.
    p, p_finite = all_reduce({path: config.p_scale * (e[path] @ state.q[path]) for path in e})
    # 5. Make the columns of P orthonormal.
    p = {path: _orthonormal(x, config) for path, x in p.items()}
    # 6. Q = e' P, scaled. 7. Average Q over members and clamp infinities.
    q = {path: config.q_scale * (e[path].swapaxes(1, 2) @ p[path]) for path in e}
    q, q_finite = all_reduce(q)
    q = {path: x / config.q_scale for path, x in q.items()}
    # 8. Average what is not compressed.
    others = jax.lax.pmean(others, axis_name)
    # 9. The norm of all gradients; that of P Q' is that of Q, since P is orthonormal.
    squares = [jnp.sum(jnp.square(x)) for x in jax.tree.leaves((q, others))]
    # 10. Share whether anything is not finite; the norm is infinite then.
    flags = [_finite(x, axes=None).all() for x in jax.tree.leaves((grads, e, others))]
    flags += [flag.all() for flag in jax.tree.leaves((p_finite, q_finite))]
    finite = jax.lax.psum(1.0 - jnp.stack(flags).all(), axis_name) == 0
    norm = jnp.where(finite, jnp.sqrt(sum(squares)), jnp.inf)
    # 11. The approximate gradients, P Q'. The optimizer clips and applies them.
    approximate = {path: p[path] @ q[path].swapaxes(1, 2) for path in e}

    # 12. Subtract what was sent from the error buffer; zero it if it is not finite itself.
    def subtract(e, sent, p_finite, q_finite):
        unsent = jnp.where(_finite(e), e, 0)
        return jnp.where(p_finite & q_finite, e - sent, unsent)

    error = to_kernels(jax.tree.map(subtract, e, approximate, p_finite, q_finite))
    new_q = state.q
    if config.warm_start:
        new_q = {
            path: jnp.where(finite, _unit_columns(x, config), state.q[path])
            for path, x in q.items()
        }
    means = others | to_kernels(approximate)
    means = jax.tree_util.tree_map_with_path(lambda path, _: means[_path(path)], grads)
    return means, PowerSGDState(error=stored_error(error, config), q=new_q), norm, finite


def sent_bytes(
    params: PyTree, *, config: PowerSGDConfig, shards: int = 1, bytes_per_number: int = 2
) -> dict[str, int]:
    """Size of the arrays that one member averages with the others in a step.

    How often these bytes cross the network depends on how the all-reduce goes about it. The four
    of the flag are left out.

    Args:
      params: parameters or their shapes.
      config: gives the rank.
      shards: shards of each matrix; the count is that of all of them, so if each lies on a device
        of its own, one device sends 1 / shards of it.
      bytes_per_number: of P, Q and, without compression, the kernels' gradients; what is never
        compressed is sent in float32.
    Returns:
      Bytes of "p", "q" and "uncompressed", and of "plain", an all-reduce of everything.
    Raises:
      ValueError: as `init`.
    Source: Ramesh et al. 2021, appendix E, table 2, where no matrix is transposed: P and Q trade
      places in some rows, their sum is the same.
    """
    kernels, others = _split(params)
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
    """The means of all arrays in one collective; shards on several devices stay there."""
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


def _split(tree):
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
    _, stacked, m, n = matrix_plan(leaf.shape, _name(path), shards)
    m, n = sorted((m, n))
    if config.rank is None:
        raise ValueError("rank is None, which stands for no compression; give PowerSGD a number")
    if config.rank > m:
        raise UserError(
            f"rank is {config.rank}, but {path} {list(leaf.shape)} gives matrices of {m} x {n} in "
            f"{shards} shards; choose a rank of at most {m}"
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


def _unit_columns(q, config):
    """Scales each column to a root mean square of 1, as that of a Gaussian; zeros stay."""
    size = jnp.sqrt(jnp.mean(jnp.square(q), axis=1, keepdims=True))
    return _stored(q / jnp.where(size > 0, size, 1), config)
