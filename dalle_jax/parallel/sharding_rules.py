"""Which axes of each parameter are spread over which axes of the mesh.

Source: Ramesh et al. 2021, appendix E: every weight is cut into as many parts as devices share the
state, across its output, the second matrix of the MLP across its input. Ours: tensor, and queries,
keys and values, which are cut across their input: 62 heads do not make 8 parts, and a cut through
the heads is lost where their axes become one, so that the compiler gathered whole float32 kernels.
"""

import math
from fnmatch import fnmatchcase

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec
from jaxtyping import PyTree

from dalle_jax.errors import UserError
from dalle_jax.parallel.mesh import FSDP, TENSOR

Rules = tuple[tuple[str, Spec], ...]
"""Patterns of paths, with * for any characters, and the axes of the parameters that they name.

The first that fits counts. Paths end with the parameter's, so that moments and averages of a
parameter lie where it does."""

MUON: Rules = (("layers/*/kernel", Spec(FSDP)),)  # whole matrices, each device some of the layers
PRIOR: Rules = (
    *((f"muon/*/{pattern}", spec) for pattern, spec in MUON),  # its momentum
    ("muon/*/ns_coeffs", Spec()),
    ("layers/qkv/kernel", Spec(None, FSDP, None, TENSOR)),  # L D 3 N H
    ("layers/qkv/bias", Spec(None, None, TENSOR)),
    ("layers/attention_out/kernel", Spec(None, TENSOR, None, FSDP)),  # L N H D
    ("layers/mlp_in/kernel", Spec(None, None, (TENSOR, FSDP))),  # L D F
    ("layers/mlp_in/bias", Spec(None, TENSOR)),
    ("layers/mlp_out/kernel", Spec(None, (TENSOR, FSDP))),  # L F D
    ("layers/*/*", Spec()),  # what is added to the residual stream, and its norms
    ("scales/*", Spec()),
    ("embed/start_*", Spec()),
    ("embed/query", Spec()),
    ("embed/*", Spec(None, FSDP)),
    ("head/*norm/*", Spec()),
    ("head/*/kernel", Spec(FSDP, TENSOR)),
    ("head/*/bias", Spec(TENSOR)),
)
CODEC: Rules = (("*", Spec()),)  # the dVAE has 98 million parameters: every device has them all
CLIP: Rules = CODEC  # ViT-B/32 has 151 million

SMALL = 2**18  # numbers; an array below this that cannot be cut evenly stays whole


def shardings(tree: PyTree, mesh: Mesh | AbstractMesh, rules: Rules) -> PyTree:
    """Says where each array of a tree lies, by its path; scalars are everywhere.

    Args:
      tree: arrays or their shapes: parameters, or anything that holds trees of them.
      mesh: from `make_mesh`.
      rules: of the model.
    Returns:
      A tree of shardings.
    Raises:
      ValueError: for an array that no rule covers, or a large one that cannot be cut evenly.
    """

    def place(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, _spec(name, leaf, mesh, rules) if leaf.ndim else Spec())

    return jax.tree_util.tree_map_with_path(place, tree)


def reshard(tree: PyTree, *, before: Rules, after: Rules) -> PyTree:
    """Sends arrays from where some rules put them to where others do, in a jitted function.

    Both are said, since what stands before and after would else be spread otherwise to save a part
    of the sending, and send more itself. Without a mesh of `jax.set_mesh`, nothing happens.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return tree
    for rules in (before, after):
        tree = jax.lax.with_sharding_constraint(tree, shardings(tree, mesh, rules))
    return tree


def _spec(name, leaf, mesh, rules):
    spec = next((s for pattern, s in rules if fnmatchcase(f"/{name}", f"*/{pattern}")), None)
    if spec is None:
        raise ValueError(
            f"no rule says where {name} {list(leaf.shape)} lies on the mesh; add one for it to "
            "dalle_jax/parallel/sharding_rules.py"
        )
    axes = list(spec)
    for i, axis in enumerate(axes):
        names = axis if isinstance(axis, tuple) else (axis,)
        parts = math.prod(mesh.shape[n] for n in names if n is not None)
        if leaf.shape[i] % parts:
            if leaf.size >= SMALL:
                raise UserError(
                    f"axis {i} of {name} {list(leaf.shape)} cannot be cut into {parts} equal parts "
                    f"({', '.join(f'{n}={mesh.shape[n]}' for n in names)}); choose another mesh"
                )
            axes[i] = None
    return Spec(*axes)
