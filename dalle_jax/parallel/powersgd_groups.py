"""Groups of devices that exchange compressed gradients: PowerSGD along the data axis of a mesh.

Each of the M groups, one entry of "data" each, has gradients of its own and an error buffer of its
own; within a group, "fsdp" is left to the compiler, and its shards are compressed one by one.

Source: Ramesh et al. 2021, section 2.5 and appendix E.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec
from jaxtyping import Array, Bool, Float, Key, PyTree

from dalle_jax.errors import UserError
from dalle_jax.parallel import powersgd
from dalle_jax.parallel.mesh import DATA, FSDP, TENSOR
from dalle_jax.parallel.powersgd import PowerSGDConfig, PowerSGDState


class PowerSGDGroups:
    """The groups of a mesh.

    The PowerSGDState here is that of all groups: error buffers [M, ...], one for each, and the Q
    that they share.

    Args:
      config: of the compression.
      mesh: from `make_mesh`.
    Raises:
      UserError: if the mesh shards kernels along tensor.
    """

    def __init__(self, config: PowerSGDConfig, mesh: Mesh | AbstractMesh):
        if mesh.shape[TENSOR] > 1:
            raise UserError(
                f"powersgd cannot compress kernels cut by tensor={mesh.shape[TENSOR]}; set "
                "mesh.tensor to 1 and mesh.fsdp higher, or leave powersgd.rank out"
            )
        self.count: int = mesh.shape[DATA]
        self._config, self._mesh = config, mesh
        self._shards = mesh.shape[FSDP]

    def init(self, params: PyTree) -> PowerSGDState:
        """Makes the state before the first step; see `powersgd.init`."""
        state = powersgd.init(params, config=self._config, shards=self._shards)
        return state.replace(error=self._for_each(state.error))

    def shardings(self, shardings: PyTree) -> PowerSGDState:
        """Shardings of the state: those of the parameters, which are given, with groups first."""

        def over(*axes):
            return NamedSharding(self._mesh, Spec(*axes))

        kernels = powersgd.compressed(shardings)
        return PowerSGDState(
            error={path: over(DATA, *sharding.spec) for path, sharding in kernels.items()},
            q=dict.fromkeys(kernels, over(FSDP)),
        )

    def reduce(
        self,
        gradients: Callable,
        state: PowerSGDState,
        params: PyTree,
        batch: PyTree,
        key: Key[Array, ""],
        *shared: Any,
    ) -> tuple[tuple, PyTree, PowerSGDState, Float[Array, ""], Bool[Array, ""]]:
        """Computes gradients in every group from its part of a batch, and their compressed mean.

        Args:
          gradients: `(params, batch, key, *shared) -> (measures, finite, grads)`: a tree of f32
            means over the batch, a tree of flags, and gradients divided by gradient scales.
          state: of all groups.
          params: the same for all groups.
          batch: first axis of every leaf spread over the groups.
          key: each group gets another one.
          *shared: passed on, the same for all groups.
        Returns:
          measures and flags: means over groups, and flags that are true in all groups.
          grads: compressed means, as `powersgd.reduce` gives them.
          state: with new error buffers.
          norm: of grads; infinite if an update with them has to be skipped.
          finite: whether everything in every group is.
        """

        def member(state, params, batch, key, *shared):
            key = jax.random.fold_in(key, jax.lax.axis_index(DATA))
            measures, flags, grads = gradients(params, batch, key, *shared)
            own = state.replace(error=jax.tree.map(lambda e: e[0], state.error))
            means, own, norm, finite = powersgd.reduce(
                grads, own, config=self._config, axis_name=DATA, shards=self._shards
            )
            measures = jax.lax.pmean(measures, DATA)
            flags = jax.tree.map(lambda f: jax.lax.pmin(f.astype(jnp.int32), DATA) > 0, flags)
            own = own.replace(error=jax.tree.map(lambda e: e[None], own.error))
            return (measures, flags), means, own, norm, finite

        by_group = PowerSGDState(error=Spec(DATA), q=Spec())
        averages, means, state, norm, finite = jax.shard_map(
            member,
            mesh=self._mesh,
            in_specs=(by_group, Spec(), Spec(DATA), Spec(), *(Spec() for _ in shared)),
            out_specs=(Spec(), Spec(), by_group, Spec(), Spec()),
            axis_names={DATA},
            check_vma=False,  # else JAX would sum gradients over the groups, uncompressed
        )(state, params, batch, key, *shared)
        return averages, means, state, norm, finite

    def summed_error(self, state: PowerSGDState) -> dict[str, Array]:
        """What a checkpoint saves: the f32 sum of the error buffers of all groups, by path."""
        return _sum_over_groups(state.error, self._config)

    def summed_error_shardings(self, shardings: PyTree) -> dict[str, NamedSharding]:
        """Shardings of that sum: those of the parameters, which are given."""
        return powersgd.compressed(shardings)

    def restore(
        self, summed_error: dict[str, Array], params: PyTree, shardings: PowerSGDState
    ) -> PowerSGDState:
        """Gives every group, of as many as there are now, an equal part of the summed error.

        Args:
          summed_error: from a checkpoint.
          params: parameters or their shapes; only these are used.
          shardings: of the state.
        """
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)

        def init(summed_error):
            error = jax.tree.map(lambda e: e / self.count, summed_error)
            error = powersgd.stored_error(error, self._config)
            return self.init(shapes).replace(error=self._for_each(error))

        return jax.jit(init, out_shardings=shardings)(summed_error)

    def _for_each(self, error):
        return jax.tree.map(lambda e: jnp.broadcast_to(e, (self.count, *e.shape)), error)


@partial(jax.jit, static_argnums=1)
def _sum_over_groups(error, config):
    return jax.tree.map(partial(jnp.sum, axis=0), powersgd.read_error(error, config))
