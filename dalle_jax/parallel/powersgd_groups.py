"""Groups of devices that exchange compressed gradients: PowerSGD along the data axis of a mesh.

Each of the M groups, one entry of "data" each, has gradients of its own and an error buffer of its
own; within a group, "fsdp" is left to the compiler, and its slices are compressed one by one.

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


class Groups:
    """The groups of a mesh.

    The PowerSGDState here is that of all groups: error buffers [M, ...], one for each, and the Q
    that they share.

    Args:
      config: of the compression.
      mesh: from `make_mesh`.
    Raises:
      UserError: if devices share the kernels in another way than by slices.
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

    def create(self, params: PyTree) -> PowerSGDState:
        """Makes the state before the first update; see `powersgd.create`."""
        state = powersgd.create(params, config=self._config, shards=self._shards)
        return state.replace(error=self._for_each(state.error))

    def places(self, places: PyTree) -> PowerSGDState:
        """Says where the state lies, given where the parameters do: as they, but by group."""

        def put(*axes):
            return NamedSharding(self._mesh, Spec(*axes))

        kernels = powersgd.compressed(places)
        return PowerSGDState(
            error={path: put(DATA, *place.spec) for path, place in kernels.items()},
            q=dict.fromkeys(kernels, put(FSDP)),
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
            means, error, norm, finite = powersgd.reduce(
                grads, own, config=self._config, axis_name=DATA, shards=self._shards
            )
            measures = jax.lax.pmean(measures, DATA)
            flags = jax.tree.map(lambda f: jax.lax.pmin(f.astype(jnp.int32), DATA) > 0, flags)
            error = jax.tree.map(lambda e: e[None], error)
            return (measures, flags), means, error, norm, finite

        by_group = PowerSGDState(error=Spec(DATA), q=Spec())
        told, means, error, norm, finite = jax.shard_map(
            member,
            mesh=self._mesh,
            in_specs=(by_group, Spec(), Spec(DATA), Spec(), *(Spec() for _ in shared)),
            out_specs=(Spec(), Spec(), Spec(DATA), Spec(), Spec()),
            axis_names={DATA},
            check_vma=False,  # else JAX would sum gradients over the groups, uncompressed
        )(state, params, batch, key, *shared)
        return told, means, state.replace(error=error), norm, finite

    def total(self, state: PowerSGDState) -> dict[str, Array]:
        """What a checkpoint keeps: the sum of the error buffers of all groups, by path."""
        return _total(state.error)

    def total_places(self, places: PyTree) -> dict[str, NamedSharding]:
        """Says where the total lies, given where the parameters do: as they."""
        return powersgd.compressed(places)

    def resumed(
        self, total: dict[str, Array], params: PyTree, places: PowerSGDState
    ) -> PowerSGDState:
        """Gives every group, of as many as there are now, an equal part of the sum.

        Args:
          total: from a checkpoint.
          params: parameters or their shapes; only these are looked at.
          places: where the state lies.
        """
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)

        def create(total):
            return self.create(shapes).replace(error=self._parts(total))

        return jax.jit(create, out_shardings=places)(total)

    def _parts(self, total):
        return self._for_each(jax.tree.map(lambda e: e / self.count, total))

    def _for_each(self, error):
        return jax.tree.map(lambda e: jnp.broadcast_to(e, (self.count, *e.shape)), error)


@jax.jit
def _total(error):
    return jax.tree.map(partial(jnp.sum, axis=0), error)
