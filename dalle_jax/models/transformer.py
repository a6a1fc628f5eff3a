"""What both priors share: the transformer's options, embeddings, layers and logits.

Letters: B batch, T positions, P text positions, I image positions, D width, F mlp, L layers,
V text vocabulary, K codebook, G grid side.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Key, PyTree

from dalle_jax.models.layers import init_layers, layer, layer_norm, layer_weights, normal
from dalle_jax.models.prior_config import PriorSizes


class PriorTransformer(nn.Module):
    """Options and parts of a prior; each style of generation is a class of its own.

    A subclass declares the parameters "embed", "layers" and "head" in `setup`. All parameters of
    the layers are stacked on a first axis of size L, whatever the options: `nn.scan` over a layer's
    module would stack them too, but only with `scan`, and the sampler and the optimizer want one
    form.
    """

    config: PriorSizes
    dtype: DTypeLike = jnp.float32
    """Of matrix products and attention; residual streams, norms and logits are float32."""
    scan: bool = False
    """Compile one layer of each kind and loop over it: for deep models."""
    remat: bool = False
    """Save only the input of each layer for the backward pass and compute the rest again."""
    grad_dtype: DTypeLike = jnp.float32
    """In which the gradients of kernels are summed, if dtype is of half precision."""
    constrain: Callable[[Array], Array] = lambda x: x
    """Constrains the sharding of residual streams [B, T, D]."""
    gather: Callable[[Array, Array], Array] = lambda table, ids: table[ids]
    """Takes rows [B, T, D] of an embedding table [V, D], which may be sharded."""

    def run_layer(self, weights, x, attend, scale=None):
        """One layer, see `layers.layer`."""
        return layer(weights, x, attend, dtype=self.dtype, scale=scale, grad_dtype=self.grad_dtype)

    def run_layers(
        self, body: Callable, x: Array, layers: PyTree, kinds: Sequence[Any] | None = None
    ) -> Array:
        """Runs x through stacked layers, in a loop of XLA or of Python.

        A scan goes over periods of four layers if their kinds differ, else over single layers. The
        kinds of all periods are the same but for the last one.

        Args:
          body: `(x, layer, is_last_period, (kind, kind in the last period)) -> x`.
          x: residual stream.
          layers: tree of arrays [L, ...]: what body needs of each layer.
          kinds: of each layer; None if all are the same.
        """
        depth = len(jax.tree.leaves(layers)[0])
        kinds = kinds or [None] * depth
        if self.remat:  # within a scan nothing could undo the recomputation, so it needs no guard
            body = jax.checkpoint(body, static_argnums=3, prevent_cse=not self.scan)
        period = 4 if len(set(kinds)) > 1 else 1
        scanned = depth // period * period if self.scan else 0
        if scanned:

            def periods(array):  # to scan but a part of the layers would copy their weights
                return array[:scanned].reshape(-1, period, *array.shape[1:])

            def run_period(x, item):
                is_last, layers = item
                for i in range(period):
                    pair = (kinds[i], kinds[scanned - period + i])
                    x = body(x, layer_weights(layers, i), is_last, pair)
                return x, None

            is_last = jnp.arange(period, scanned + 1, period) == scanned
            x, _ = jax.lax.scan(run_period, x, (is_last, jax.tree.map(periods, layers)))
        for i in range(scanned, depth):
            x = body(x, layer_weights(layers, i), True, (kinds[i],) * 2)
        return x

    def unstacked(self, start: int = 0, stop: int | None = None) -> list[PyTree]:
        """The weights of some layers, one by one."""
        return [layer_weights(self.layers, i) for i in range(self.config.depth)[start:stop]]

    def embed_text(self, text):
        """Start of text and caption slots [B, P, D]."""
        V = self.config.text_vocabulary
        token = self.gather(self.embed["text"], jnp.minimum(text, V - 1))
        token = token + self.embed["slot"][None]
        slots = jnp.where((text < V)[..., None], token, self.embed["pad"][None])
        return self.start_with("start_of_text", slots)

    def start_with(self, name, x):
        """Puts a learned vector ahead of all positions."""
        B, _, D = x.shape
        return jnp.concatenate([jnp.broadcast_to(self.embed[name], (B, 1, D)), x], axis=1)

    def embed_cells(self, cells, prefix=""):
        """Row and column embeddings of raster positions."""
        G = self.config.grid
        row, column = (self.embed[prefix + name] for name in ("row", "column"))
        return row[cells // G] + column[cells % G]

    def logits(self, x, head="image"):
        """Unnormalised log-probabilities in float32."""
        x = layer_norm(self.head["norm"], x)
        return jnp.einsum("BTD,DV->BTV", x, self.head[head]["kernel"])


def init_prior(prior: PriorTransformer, key: Key[Array, ""]) -> PyTree:
    """Initialises the parameters of a prior, without tracing its passes."""
    return prior.init(key, method=lambda prior: prior.head)["params"]


def init_embeddings(
    key: Key[Array, ""], config: PriorSizes, *, tables: dict[str, int], vectors: tuple[str, ...]
) -> PyTree:
    """Embedding tables and single vectors, all from N(0, 0.125 / sqrt(D)).

    Args:
      key: for the weights.
      config: of the prior.
      tables: rows of tables beside those of text, slots, pads, codes, rows and columns.
      vectors: names of single vectors.
    """
    rows = {
        "text": config.text_vocabulary,
        "slot": config.text_length - 1,
        "pad": config.text_length - 1,
        "code": config.codes,
        "row": config.grid,
        "column": config.grid,
    }
    rows |= tables | dict.fromkeys(vectors, 1)
    # one draw for all of them: each draw adds about half a second of compilation on a CPU
    numbers = normal(key, (sum(rows.values()), config.width), 0.125 * config.width**-0.5)
    parts = jnp.split(numbers, list(itertools.accumulate(rows.values()))[:-1])
    embed = dict(zip(rows, parts, strict=True))
    return embed | {name: embed[name][0] for name in vectors}


def init_stack(key: Key[Array, ""], config: PriorSizes) -> PyTree:
    """All layers of a prior, stacked on a first axis of size L."""
    L, D = config.depth, config.width
    F = D * config.mlp_ratio
    residual = (2 * L) ** -0.5
    stds = {
        "qkv": 0.125 * D**-0.5,
        "attention_out": 0.125 * residual * D**-0.5,
        "mlp_in": 0.125 * D**-0.5,
        "mlp_out": 0.125 * residual * F**-0.5,
    }
    return init_layers(key, depth=L, width=D, heads=config.heads, mlp=F, stds=stds)
